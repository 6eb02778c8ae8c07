"""Attacks on a worker's own data."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_byz.attacks.base import DataAttack
from lightning_byz.data.batches import entry, with_entry


class LabelAttack(DataAttack):
    """Trains on other labels. Subclasses say where a batch keeps them, ``key``, and what becomes of
    them, `relabel`.
    """

    key: int | str

    @abstractmethod
    def relabel(self, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        """The labels to train on instead; the given ones are not modified."""

    def __call__(self, batch: Any, generator: torch.Generator | None = None) -> Any:
        name = type(self).__name__
        try:
            labels = entry(batch, self.key)
        except LookupError as error:
            raise ValueError(
                f"{name} looks for the labels at batch[{self.key!r}]. Found a batch of type "
                f"{type(batch).__name__} without it. Say where they are, e.g. {name}(..., "
                "key='labels')."
            ) from error
        if not isinstance(labels, torch.Tensor):
            raise ValueError(
                f"{name} needs a tensor of labels at batch[{self.key!r}]. Found "
                f"{type(labels).__name__}. Set `key` to where the labels are."
            )
        return with_entry(batch, self.key, self.relabel(labels, generator))


@dataclass(frozen=True)
class LabelFlip(LabelAttack):
    """Trains on the labels of other classes: class c becomes class num_classes - 1 - c.

    Labels may be class indices 0 .. num_classes - 1, of any dtype that holds them (bool for two
    classes), or distributions over the classes: tensors whose dimension 1 (or else the last one)
    has num_classes entries that are not negative and sum to 1, as one-hot, smoothed and mixed
    labels are. These are reversed along it. With two classes, floating-point numbers in [0, 1] are
    probabilities of class 1, and so are the labels of several tasks of two classes.

    Labels below 0 (such as -100, which losses ignore), and ``ignore_index``, stay as they are.

    No paper: folklore.

    Args:
        num_classes: number of classes, at least 2.
        key: where a batch keeps its labels: the index in a tuple or list, the key in a mapping, or
            the name of an attribute.
        signed: the two classes are -1 and +1, and change sign. A batch may hold only one of them,
            so nobody can tell from the labels.
        ignore_index: a label that stands for no class, such as 255 in segmentation; None: there is
            none, or one below 0 (with ``signed``, that one is to be given).

    Raises:
        ValueError: for a batch whose labels are none of these: beyond num_classes, several classes
            at a time, numbers of a regression.
    """

    num_classes: int
    key: int | str = 1
    signed: bool = False
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        if self.num_classes < 2 or (self.signed and self.num_classes != 2):
            least = "2, for signed=True is for labels -1 and +1" if self.signed else "at least 2"
            raise ValueError(
                f"`num_classes` should be {least}. Found num_classes={self.num_classes}."
            )
        classes = (-1, 1) if self.signed else range(self.num_classes)
        if self.ignore_index in classes:
            raise ValueError(
                f"`ignore_index` should be none of the classes {classes}. Found "
                f"ignore_index={self.ignore_index}."
            )

    def flip(self, labels: Tensor) -> Tensor:
        """The flipped labels."""
        if labels.is_complex():
            raise ValueError(
                "LabelFlip flips class indices or distributions over classes. Found labels of "
                f"{labels.dtype}."
            )
        kept = (
            torch.zeros_like(labels, dtype=torch.bool)
            if self.ignore_index is None
            else labels == self.ignore_index
        )
        if self.signed:
            return self._signs_changed(labels, kept)
        dimension = _class_dimension(labels, self.num_classes)
        if dimension is not None:
            return labels.flip(dimension)
        kept |= labels < 0
        if self.num_classes == 2 and bool((labels == -1).any()):
            raise ValueError(
                "LabelFlip(num_classes=2) flips labels 0 and 1. Found a label -1. If they are -1 "
                "and +1, write LabelFlip(num_classes=2, signed=True)."
            )
        self._check_indices(labels, kept)
        if labels.dtype == torch.bool:
            return ~labels
        if labels.is_floating_point():
            return torch.where(kept, labels, self.num_classes - 1 - labels)
        return torch.where(kept, labels, (self.num_classes - 1 - labels.long()).to(labels.dtype))

    def _signs_changed(self, labels: Tensor, kept: Tensor) -> Tensor:
        odd = labels[~kept & (labels != 1) & (labels != -1)]
        if odd.numel() or labels.dtype in (torch.bool, torch.uint8):
            found = (
                f"labels such as {odd[0].item()}" if odd.numel() else f"labels of {labels.dtype}"
            )
            raise ValueError(
                f"LabelFlip(signed=True) flips labels -1 and +1. Found {found}. For 0 and 1 leave "
                "`signed` out."
            )
        return torch.where(kept, labels, -labels)

    def _check_indices(self, labels: Tensor, kept: Tensor) -> None:
        """Raises unless these are class indices, or two classes' probabilities."""
        most = self.num_classes - 1
        outside = ~kept & ~(labels <= most)  # a nan is outside too
        if labels.is_floating_point():
            outside |= (labels != labels.round()) & (kept | bool(most > 1))
        if most > 1 and labels.ndim > 1 and self.num_classes in (labels.shape[1], labels.shape[-1]):
            # for each class, whether it is there
            outside |= labels.is_floating_point() or not bool((labels > 1).any())
        if bool(outside.any()):
            raise ValueError(
                f"LabelFlip(num_classes={self.num_classes}) flips class indices 0 .. {most}, or "
                "distributions over as many classes along dimension 1. Found labels of shape "
                f"{list(labels.shape)} with the number {labels[outside][0].item()}. Set "
                "`num_classes` to the number of classes, or `ignore_index` to a label that the "
                "loss ignores. Several classes at a time are tasks of two classes each: "
                "num_classes=2. A regression has no classes to flip."
            )
        if labels.dtype == torch.bool and most > 1:
            raise ValueError(
                "Labels of torch.bool should be of two classes. Found "
                f"num_classes={self.num_classes}."
            )
        if (
            not labels.is_floating_point()
            and labels.dtype != torch.bool
            and torch.iinfo(labels.dtype).max < most
        ):
            raise ValueError(
                f"Labels of {self.num_classes} classes should fit into their dtype. Found "
                f"{labels.dtype}."
            )

    def relabel(self, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.flip(labels)


def _class_dimension(labels: Tensor, num_classes: int) -> int | None:
    """The dimension along which labels are distributions over classes; None if they are not."""
    if labels.ndim < 2 or not labels.numel() or not bool((labels >= 0).all()):
        return None
    for dimension in (1, labels.ndim - 1):
        if labels.shape[dimension] != num_classes:
            continue
        sums = labels.sum(dimension, dtype=torch.float64)
        slack = 1e-2 if labels.dtype in (torch.float16, torch.bfloat16) else 1e-4
        if bool(((sums - 1).abs() <= slack).all()):
            return dimension
    return None
