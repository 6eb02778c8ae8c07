"""Attacks on a worker's own data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_byz.attacks.base import DataAttack


@dataclass(frozen=True)
class LabelFlip(DataAttack):
    """Trains on labels y -> num_classes - 1 - y (labels -1 and +1 change sign).

    Args:
        num_classes: number of classes; labels are 0 .. num_classes - 1, or -1 and +1 if it is 2.
        key: where a batch keeps its labels: the index in a tuple or list, or the key in a dict.
    """

    num_classes: int
    key: int | str = 1

    def flip(self, labels: Tensor) -> Tensor:
        """The flipped labels."""
        if self.num_classes == 2 and bool((labels < 0).any()):
            return -labels
        return self.num_classes - 1 - labels

    def __call__(self, batch: Any) -> Any:
        try:
            labels = batch[self.key]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"LabelFlip looks for the labels at batch[{self.key!r}]. Found a batch of type {type(batch).__name__} "
                "without it. Say where they are, e.g. LabelFlip(num_classes=10, key='labels')."
            ) from error
        if not isinstance(labels, torch.Tensor):
            raise ValueError(
                f"LabelFlip needs a tensor of labels at batch[{self.key!r}]. Found {type(labels).__name__}. "
                "Set `key` to where the labels are."
            )
        if isinstance(batch, dict):
            return {**batch, self.key: self.flip(labels)}
        parts = list(batch)
        parts[int(self.key)] = self.flip(labels)
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
