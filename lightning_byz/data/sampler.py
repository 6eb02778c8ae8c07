"""WorkerSampler: every worker has its own samples, in its own order, wherever it runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from lightning_byz.data.partitions import Partition, check_partition, labels_of
from lightning_byz.types import keyed_generator


class WorkerSampler(DistributedSampler[Any]):
    """The indices of the samples that the workers of one process see, step by step.

    Each of the n = ``num_replicas`` x ``workers_per_process`` workers draws from its own part of
    the data, in an order that depends on (seed, epoch, worker) alone. A step's indices are those of
    this process's first worker, then its second one's, and so on, ``batch_size`` each: where the
    strategy cuts the batch into equal parts, every worker gets its own. A run of n in-process
    workers and a run of n processes therefore see the same samples, worker by worker and step by
    step. Use it as ``DataLoader(dataset, batch_size=sampler.batch_size_per_process,
    sampler=sampler)``.

    It is a DistributedSampler, so Lightning does not replace it and tells it the epoch.

    Args:
        dataset: the data; only its length is used, and its labels where a partition needs them.
        batch_size: samples of one worker in one step.
        workers_per_process: workers that this process simulates.
        num_replicas: number of processes. None: those of torch.distributed, or 1 without it.
        rank: this process. None: torch.distributed's, or 0 without it.
        shuffle: draw every worker's order anew in every epoch; False keeps the order of its part.
        seed: seed of the orders; the same on every process.
        drop_last: False: an epoch ends when the largest part is through; workers with smaller ones
            start over with theirs, and the last step may be smaller, by the same number for all.
            True: it ends with the last full step of the smallest part; what is left out differs
            from epoch to epoch.
        parts: for each of the n workers the indices of its part. None: every n-th sample (worker w
            has w, w + n, w + 2n, ...).
        partition: how to make the parts, such as ``Dirichlet(0.1)``, by the dataset's labels (see
            `labels_of`) and the seed: its attribute ``targets``, or the last tensor of a
            TensorDataset.

    Raises:
        ValueError: if ``batch_size`` or ``workers_per_process`` is below 1, if there are not n
            parts, if both ``parts`` and ``partition`` are given, if the partition finds no labels,
            or if a part is too small: empty, or without one full batch where ``drop_last`` wants
            one.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        workers_per_process: int = 1,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        parts: Sequence[Sequence[int]] | None = None,
        partition: Partition | None = None,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("workers_per_process", workers_per_process),
        ):
            if value < 1:
                raise ValueError(f"`{name}` should be at least 1. Found {name}={value}.")
        connected = dist.is_available() and dist.is_initialized()
        replicas = (
            (dist.get_world_size() if connected else 1) if num_replicas is None else num_replicas
        )
        rank = (dist.get_rank() if connected else 0) if rank is None else rank
        super().__init__(dataset, replicas, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)  # type: ignore[arg-type]

        n = replicas * workers_per_process
        check_partition(partition)
        if parts is not None and partition is not None:
            raise ValueError(
                f"At most one of `parts` and `partition` should be given. Found {len(parts)} "
                f"parts and {partition!r}."
            )
        if partition is not None:
            labels = labels_of(dataset) if partition.needs_labels else torch.empty(len(dataset))
            parts = [part.tolist() for part in partition(labels, n, seed)]
        elif parts is None:
            parts = [range(worker, len(dataset), n) for worker in range(n)]
        if len(parts) != n:
            raise ValueError(
                f"`parts` should have one entry for each of the n = {replicas} x "
                f"{workers_per_process} = {n} workers. Found {len(parts)}."
            )
        least = batch_size if drop_last else 1
        small = [worker for worker, part in enumerate(parts) if len(part) < least]
        if small:
            raise ValueError(
                f"Every worker's part should hold at least {least} "
                f"samples{' (batch_size, with drop_last)' if drop_last else ''}. Found "
                f"{len(parts[small[0]])} for worker {small[0]}, of {len(dataset)} samples and "
                f"n={n} workers. Use fewer workers, or more data."
            )
        self.batch_size, self.workers_per_process, self.parts = (
            batch_size,
            workers_per_process,
            parts,
        )
        sizes = [len(part) for part in parts]
        self.samples_per_worker = min(sizes) // batch_size * batch_size if drop_last else max(sizes)
        self.num_samples = self.samples_per_worker * workers_per_process
        self.total_size = self.num_samples * replicas

    @property
    def batch_size_per_process(self) -> int:
        """What the DataLoader's ``batch_size`` should be."""
        return self.batch_size * self.workers_per_process

    def __len__(self) -> int:
        return self.num_samples

    def indices_of(self, worker: int) -> list[int]:
        """The samples of one of the n workers in this epoch, in order, ``[samples_per_worker]``."""
        part = self.parts[worker]
        passes = math.ceil(self.samples_per_worker / len(part))
        orders: list[Sequence[int]] = [range(len(part))] * passes
        if self.shuffle:
            generator = keyed_generator("sampler", self.seed, self.epoch, worker)
            orders = [
                torch.randperm(len(part), generator=generator).tolist() for _ in range(passes)
            ]
        return [
            int(part[i])
            for i in itertools.islice(itertools.chain(*orders), self.samples_per_worker)
        ]

    def __iter__(self) -> Iterator[int]:
        first = self.rank * self.workers_per_process
        streams = [
            self.indices_of(worker) for worker in range(first, first + self.workers_per_process)
        ]
        for start in range(0, self.samples_per_worker, self.batch_size):
            for stream in streams:
                yield from stream[start : start + self.batch_size]
