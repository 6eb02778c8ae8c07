"""What all data modules share: every worker its own part, and where to get data from."""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset

from lightning_byz.data.partitions import Partition, check_partition
from lightning_byz.data.sampler import WorkerSampler

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule as _Base
else:
    _Base = object


class DataNotFoundError(FileNotFoundError):
    """A data set is neither in its folder nor to be had from its home."""


class WorkerData(_Base):
    """A data module's loaders. Subclasses set ``training`` and ``held_out`` in ``setup``.

    Every worker trains on its own part (see `WorkerSampler`), whether workers share a process or
    not. Without the ``byzantine_robust`` strategy a process is one worker.

    Args:
        batch_size: samples of *one worker* in one step; a process loads batch_size x
            workers_per_process at a time.
        seed: seed of the partition and of the order in which workers see their samples. None: the
            one that ``seed_everything`` set, or 0.
        num_workers: processes that load data, as for DataLoader.
        partition: which worker holds which samples; None: every n-th.
    """

    training: Dataset[Any]
    held_out: Dataset[Any] | None
    held_out_batch_size: int = 1000
    collate: Callable[[Any], Any] | None = None

    def __init__(
        self, batch_size: int, seed: int | None, num_workers: int, partition: Partition | None
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"`batch_size` should be at least 1. Found batch_size={batch_size}.")
        check_partition(partition)
        self.batch_size, self.seed, self.num_workers, self.partition = (
            batch_size,
            seed,
            num_workers,
            partition,
        )

    def train_sampler(self) -> WorkerSampler:
        """The workers' streams of this process."""
        trainer = self.trainer
        alone = {"num_replicas": 1, "rank": 0}  # or not distributed by ranks
        return WorkerSampler(
            self.training,  # type: ignore[arg-type]
            self.batch_size,
            workers_per_process=1
            if trainer is None
            else getattr(trainer.strategy, "workers_per_process", 1),
            **({} if trainer is None else trainer.distributed_sampler_kwargs or alone),
            seed=int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed,
            partition=self.partition,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = self.train_sampler()
        return DataLoader(
            self.training,
            sampler.batch_size_per_process,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.collate,
        )

    def val_dataloader(self) -> Any:
        if self.held_out is None:
            return []
        return DataLoader(
            self.held_out,
            self.held_out_batch_size,
            num_workers=self.num_workers,
            collate_fn=self.collate,
        )

    def test_dataloader(self) -> Any:
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        return self.val_dataloader()


def download(url: str, path: Path, sha256: str) -> None:
    """Writes what is at ``url`` to ``path``, all of it or nothing, once its checksum is right.

    Raises:
        OSError: if the file cannot be had, or is not what it should be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as part:
        try:
            digest = hashlib.sha256()
            with urllib.request.urlopen(url, timeout=30) as source:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    part.write(chunk)
            if digest.hexdigest() != sha256:
                raise OSError(f"its SHA-256 should be {sha256}. Found {digest.hexdigest()}.")
            part.close()
            os.replace(part.name, path)
        except BaseException:
            part.close()
            os.unlink(part.name)
            raise
