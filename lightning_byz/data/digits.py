"""Handwritten digits that come with scikit-learn: real images, nothing to download."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_byz.data.base import WorkerData
from lightning_byz.data.partitions import Partition
from lightning_byz.types import keyed_generator

TEST_IMAGES = 360
"""Of the 1,797 images, how many are held out."""


def load_digits() -> tuple[Tensor, Tensor]:
    """All images, ``[1797, 1, 8, 8]`` float32 in [0, 1], and their labels, ``[1797]`` int64 in 0 ..
    9.

    Raises:
        ImportError: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError(
            "The digits come with scikit-learn. Found no module `sklearn`. Run: pip install "
            "'lightning-byz[data]'"
        ) from error
    images, labels = load(return_X_y=True)
    return torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8), torch.from_numpy(
        labels
    ).long()


class DigitsData(WorkerData):
    """All of DigitsDataModule but its Lightning base class (see `lightning_byz.lightning` and
    `.pytorch_lightning`).

    The UCI "Optical Recognition of Handwritten Digits" test set: 1,797 images of 8 x 8 grey values,
    ten classes. 1,437 of them are for training; 360, always the same ones, are held out, both for
    validation and for testing. A batch is ``(images [B, 1, 8, 8] float32 in [0, 1], labels [B]
    int64)``.

    Every worker trains on its own part (see `WorkerSampler`), whether workers share a process or
    not. Without the ``byzantine_robust`` strategy a process is one worker.

    Args:
        batch_size: samples of *one worker* in one step; a process loads batch_size x
            workers_per_process at a time.
        seed: seed of the partition and of the order in which workers see their samples. None: the
            one that ``seed_everything`` set, or 0. The split into training and held-out images does
            not depend on it.
        num_workers: processes that load data, as for DataLoader; 0 is fastest here, as all images
            are in memory.
        partition: which worker holds which images, such as ``Dirichlet(0.1)``; None: every n-th.
    """

    held_out_batch_size = TEST_IMAGES

    def __init__(
        self,
        batch_size: int = 16,
        seed: int | None = None,
        num_workers: int = 0,
        partition: Partition | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, partition)

    def setup(self, stage: str) -> None:
        images, labels = load_digits()
        order = torch.randperm(len(images), generator=keyed_generator("digits split"))
        held_out, training = order[:TEST_IMAGES], order[TEST_IMAGES:]
        self.training = TensorDataset(images[training], labels[training])
        self.held_out = TensorDataset(images[held_out], labels[held_out])
