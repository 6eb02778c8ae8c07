"""Attacks on a worker's own data."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_byz.attacks.base import DataAttack


class LabelAttack(DataAttack):
    """Trains on other labels. Subclasses say where a batch keeps them, ``key``, and what becomes of them, `relabel`."""

    key: int | str

    @abstractmethod
    def relabel(self, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        """The labels to train on instead; the given ones are not modified."""

    def __call__(self, batch: Any, generator: torch.Generator | None = None) -> Any:
        name = type(self).__name__
        try:
            labels = batch[self.key]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{name} looks for the labels at batch[{self.key!r}]. Found a batch of type {type(batch).__name__} "
                f"without it. Say where they are, e.g. {name}(..., key='labels')."
            ) from error
        if not isinstance(labels, torch.Tensor):
            raise ValueError(
                f"{name} needs a tensor of labels at batch[{self.key!r}]. Found {type(labels).__name__}. "
                "Set `key` to where the labels are."
            )
        labels = self.relabel(labels, generator)
        if isinstance(batch, dict):
            return {**batch, self.key: labels}
        parts = list(batch)
        parts[int(self.key)] = labels
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


@dataclass(frozen=True)
class LabelFlip(LabelAttack):
    """Trains on labels y -> num_classes - 1 - y. Labels below 0 (such as -100, which losses ignore) stay as they are.

    No paper: folklore.

    Args:
        num_classes: number of classes; labels are 0 .. num_classes - 1.
        key: where a batch keeps its labels: the index in a tuple or list, or the key in a dict.
        signed: the two classes are -1 and +1, and change sign. A batch may hold only one of them, so nobody can tell from the labels.
    """

    num_classes: int
    key: int | str = 1
    signed: bool = False

    def flip(self, labels: Tensor) -> Tensor:
        """The flipped labels."""
        if self.signed:
            return -labels
        if self.num_classes == 2 and bool((labels == -1).any()):
            raise ValueError(
                "LabelFlip(num_classes=2) flips labels 0 and 1. Found a label -1. If they are -1 and +1, write "
                "LabelFlip(num_classes=2, signed=True)."
            )
        return torch.where(labels < 0, labels, self.num_classes - 1 - labels)

    def relabel(self, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.flip(labels)
