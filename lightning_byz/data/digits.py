"""Handwritten digits that come with scikit-learn: real images, nothing to download."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_byz.data.sampler import WorkerSampler
from lightning_byz.types import keyed_generator

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule as _Base
else:
    _Base = object

TEST_IMAGES = 360
"""Of the 1,797 images, how many are held out."""


def load_digits() -> tuple[Tensor, Tensor]:
    """All images, ``[1797, 1, 8, 8]`` float32 in [0, 1], and their labels, ``[1797]`` int64 in 0 .. 9.

    Raises:
        ImportError: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError(
            "The digits come with scikit-learn. Found no module `sklearn`. Run: pip install 'lightning-byz[data]'"
        ) from error
    images, labels = load(return_X_y=True)
    return torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8), torch.from_numpy(labels).long()


class DigitsData(_Base):
    """All of DigitsDataModule but its Lightning base class (see `lightning_byz.lightning` and `.pytorch_lightning`).

    The UCI "Optical Recognition of Handwritten Digits" test set: 1,797 images of 8 x 8 grey values, ten classes. 1,437 of them are
    for training; 360, always the same ones, are held out, both for validation and for testing. A batch is ``(images
    [B, 1, 8, 8] float32 in [0, 1], labels [B] int64)``.

    Every worker trains on its own part (see `WorkerSampler`), whether workers share a process or not. Without the
    ``byzantine_robust`` strategy a process is one worker.

    Args:
        batch_size: samples of *one worker* in one step; a process loads batch_size x workers_per_process at a time.
        seed: seed of the order in which workers see their samples. None: the one that ``seed_everything`` set, or 0. The split into
            training and held-out images does not depend on it.
        num_workers: processes that load data, as for DataLoader; 0 is fastest here, as all images are in memory.
    """

    def __init__(self, batch_size: int = 16, seed: int | None = None, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"`batch_size` should be at least 1. Found batch_size={batch_size}.")
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers

    def setup(self, stage: str) -> None:
        images, labels = load_digits()
        order = torch.randperm(len(images), generator=keyed_generator("digits split"))
        held_out, training = order[:TEST_IMAGES], order[TEST_IMAGES:]
        self.training = TensorDataset(images[training], labels[training])
        self.held_out = TensorDataset(images[held_out], labels[held_out])

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        sampler = WorkerSampler(
            self.training,
            self.batch_size,
            workers_per_process=1 if trainer is None else getattr(trainer.strategy, "workers_per_process", 1),
            num_replicas=None if trainer is None else trainer.world_size,
            rank=None if trainer is None else trainer.global_rank,
            seed=int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed,
        )
        return DataLoader(self.training, sampler.batch_size_per_process, sampler=sampler, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.held_out, batch_size=TEST_IMAGES, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()
