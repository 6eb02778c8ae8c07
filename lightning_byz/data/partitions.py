"""Partitions: which worker holds which samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from lightning_byz.types import keyed_seed

_DRAWS = 100


class Partition(ABC):
    """Divides samples among n workers, by their labels and a seed alone: every process finds the
    same parts.

    Subclasses are frozen dataclasses that define `split`. Every sample goes to one worker, unless
    the subclass says otherwise.

    Attributes:
        needs_labels: whether the parts depend on labels.
    """

    needs_labels: bool = True

    @abstractmethod
    def split(
        self, labels: np.ndarray[Any, Any], n: int, rng: np.random.Generator
    ) -> Sequence[np.ndarray[Any, Any]]:
        """The indices of each of the n workers' samples; chance comes from ``rng`` alone."""

    def __call__(self, labels: Tensor, n: int, seed: int = 0) -> list[Tensor]:
        """The parts: for each of n workers the indices of its samples, increasing.

        Args:
            labels: ``[N]``; a partition that needs none looks at their number only.
            n: number of workers.
            seed: another seed is another division.

        Raises:
            ValueError: if a worker would have no sample.
        """
        if not 1 <= n <= len(labels):
            raise ValueError(
                f"There should be at least one worker, and a sample for each. Found n={n} and "
                f"{len(labels)} samples."
            )
        rng = np.random.default_rng(keyed_seed("partition", seed))
        parts = self.split(labels.cpu().numpy(), n, rng)
        empty = [worker for worker, part in enumerate(parts) if len(part) == 0]
        if empty:
            raise ValueError(
                f"Every worker should have a sample. {self!r} leaves none to worker {empty[0]} of "
                f"n={n}."
            )
        return [torch.from_numpy(np.sort(part)) for part in parts]


def check_partition(partition: object) -> None:
    """Raises a TypeError unless this is a partition, or None."""
    if not isinstance(partition, Partition | None):
        raise TypeError(
            "`partition` should be an instance of Partition, such as IID() or Dirichlet(0.1). "
            f"Found {partition!r}."
        )


def labels_of(dataset: Sized) -> Tensor:
    """The labels of a dataset: its ``targets`` (as torchvision's have them), or the last tensor of
    a TensorDataset.

    Raises:
        ValueError: if it has neither, or not one number for each sample.
    """
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices)]  # type: ignore[arg-type]
    found = (
        dataset.tensors[-1]
        if isinstance(dataset, TensorDataset)
        else getattr(dataset, "targets", None)
    )
    labels = None if found is None else torch.as_tensor(found)
    if labels is None or labels.shape != (len(dataset),):
        raise ValueError(
            "A partition by labels needs one label for each sample: the dataset's attribute "
            f"`targets`, or the last tensor of a TensorDataset. Found a {type(dataset).__name__} "
            f"with {'none' if labels is None else f'labels of shape {list(labels.shape)}'}. Set "
            "`targets`, or compute the parts: WorkerSampler(..., parts=Dirichlet(0.1)(labels, n))."
        )
    return labels


def _sorted_by_label(
    order: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """The indices in ``order``, sorted by label; those of one label keep their order."""
    return order[np.argsort(labels[order], kind="stable")]


@dataclass(frozen=True)
class IID(Partition):
    """Samples are shuffled and dealt out, as many to each worker, within one."""

    needs_labels = False

    def split(
        self, labels: np.ndarray[Any, Any], n: int, rng: np.random.Generator
    ) -> Sequence[np.ndarray[Any, Any]]:
        return np.array_split(rng.permutation(len(labels)), n)


@dataclass(frozen=True)
class ByLabel(Partition):
    """Samples are sorted by label and cut into equal runs: a worker knows one class, or few. The
    most unlike that workers can be.
    """

    def split(
        self, labels: np.ndarray[Any, Any], n: int, rng: np.random.Generator
    ) -> Sequence[np.ndarray[Any, Any]]:
        return np.array_split(_sorted_by_label(rng.permutation(len(labels)), labels), n)


@dataclass(frozen=True)
class GammaSimilarity(Partition):
    """A share gamma of each worker's samples is drawn at random, the others come from a run of
    samples sorted by label.

    As "s% similarity" in SCAFFOLD's experiments (Karimireddy et al., ICML 2020, arXiv 1910.06378).
    gamma = 1 is `IID`, gamma = 0 `ByLabel`. All workers hold as many samples, within one.

    Args:
        gamma: in [0, 1].
    """

    gamma: float

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(
                "`gamma` is the share that is drawn at random, in [0, 1]. Found "
                f"gamma={self.gamma}."
            )

    def split(
        self, labels: np.ndarray[Any, Any], n: int, rng: np.random.Generator
    ) -> Sequence[np.ndarray[Any, Any]]:
        order = rng.permutation(len(labels))
        common = round(self.gamma * len(labels))
        dealt = np.array_split(order[:common], n)
        sizes = [len(part) for part in np.array_split(order, n)]
        left = [size - len(part) for size, part in zip(sizes, dealt, strict=True)]
        runs = np.split(_sorted_by_label(order[common:], labels), np.cumsum(left)[:-1])
        return [np.concatenate(pair) for pair in zip(dealt, runs, strict=True)]


@dataclass(frozen=True)
class Dirichlet(Partition):
    """Every class is divided among the workers in proportions drawn from a symmetric Dirichlet
    distribution.

    As in Yurochkin et al., ICML 2019 (arXiv 1905.12022) and Li et al., ICDE 2022 (arXiv
    2102.02079). (In Hsu et al., arXiv 1909.06335, every *worker's* mix of classes is drawn instead,
    and all hold as many samples.) Workers hold unequal numbers of samples. The division is drawn
    again, up to 100 times, until each worker has ``min_samples``.

    Args:
        alpha: concentration, above 0: 0.1 gives workers few classes, 100 nearly equal mixes.
        min_samples: least number of samples of a worker.

    Raises:
        ValueError: when no division gives every worker ``min_samples``.
    """

    alpha: float
    min_samples: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"`alpha` should be a number above 0. Found alpha={self.alpha}.")
        if self.min_samples < 1:
            raise ValueError(
                f"`min_samples` should be at least 1. Found min_samples={self.min_samples}."
            )

    def split(
        self, labels: np.ndarray[Any, Any], n: int, rng: np.random.Generator
    ) -> Sequence[np.ndarray[Any, Any]]:
        for _ in range(_DRAWS):
            parts = self._draw(labels, n, rng)
            least = min(map(len, parts))
            if least >= self.min_samples:
                return parts
        raise ValueError(
            f"Every worker should have at least min_samples={self.min_samples} samples. Found "
            f"{least} in the last of {_DRAWS} draws of Dirichlet(alpha={self.alpha}), of "
            f"{len(labels)} samples for n={n} workers. Use a larger alpha, or fewer workers."
        )

    def _draw(
        self, labels: np.ndarray[Any, Any], n: int, rng: np.random.Generator
    ) -> list[np.ndarray[Any, Any]]:
        shares: list[list[np.ndarray[Any, Any]]] = [[] for _ in range(n)]
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            cuts = (
                (np.cumsum(rng.dirichlet(np.full(n, self.alpha)))[:-1] * len(members))
                .round()
                .astype(int)
            )
            for share, piece in zip(shares, np.split(members, cuts), strict=True):
                share.append(piece)
        return [np.concatenate(share) for share in shares]


@dataclass(frozen=True)
class Replicated(Partition):
    """Every worker holds all samples, and sees them in an order of its own: the homogeneous setting
    of many papers' experiments.
    """

    needs_labels = False

    def split(
        self, labels: np.ndarray[Any, Any], n: int, rng: np.random.Generator
    ) -> Sequence[np.ndarray[Any, Any]]:
        return [np.arange(len(labels))] * n
