"""Buffers: every worker starts a step from the same ones. Statistics are aggregated by a robust
rule, data are one worker's.
"""

from __future__ import annotations

import fnmatch
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_byz.aggregators import CoordinateMedian, TooFewRowsError
from lightning_byz.compressors import Field
from lightning_byz.numerics.finite import all_finite
from lightning_byz.transports import Transport

log = logging.getLogger("lightning_byz")

NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
"""Whose buffers are statistics."""


def shared_tensors(module: nn.Module) -> list[Tensor]:
    """What all processes have in common at the start: parameters and buffers, but for sparse
    ones.
    """
    return [
        tensor
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.layout == torch.strided
    ]


class WorkerBuffers:
    """The buffers of a module, and a copy of them for every local worker.

    A process of one worker lets the module's own buffers change. In a process of several, each
    worker's forward and backward pass see a copy of its own, so that no pass changes in place what
    another one still needs.

    Buffers of torch's batch and instance normalization are statistics: numbers that all workers
    estimate. Others are data, such as a queue of keys, unless they are named: a median of different
    workers' data is nobody's.

    Args:
        module: the module; its submodules' buffers included.
        workers: number of local workers.
        statistics: names of buffers that are statistics too, as in ``named_buffers``, or patterns
            such as ``"*.running_*"``.

    Raises:
        ValueError: if a pattern fits no buffer.
    """

    def __init__(self, module: nn.Module, workers: int, statistics: Sequence[str] = ()) -> None:
        self._module, self._statistics = module, tuple(statistics)
        self._source = 0
        names = [name for name, _ in module.named_buffers()]
        for pattern in self._statistics:
            if not fnmatch.filter(names, pattern):
                raise ValueError(
                    f"`aggregated_buffers` should name buffers of the module. Found {pattern!r}, "
                    f"which fits none of {', '.join(names) or 'none'}."
                )
        self._places = self._found()
        self._copies: list[list[Tensor]] | None = None
        self._workers = workers
        self.start: list[Tensor] = []
        self.begin()

    def __len__(self) -> int:
        return len(self._places)

    def _found(self) -> list[tuple[nn.Module, str]]:
        """Where the module's buffers are now, each of them once. Sparse and distributed ones are
        each process's own.
        """
        places, seen, self._is_data = [], set(), []
        for prefix, owner in self._module.named_modules():
            norm = isinstance(owner, NORMS)
            for name, buffer in owner.named_buffers(recurse=False):
                plain = buffer.layout == torch.strided and not isinstance(buffer, DTensor)
                if id(buffer) not in seen and plain:
                    seen.add(id(buffer))
                    places.append((owner, name))
                    full = f"{prefix}.{name}".lstrip(".")
                    self._is_data.append(
                        not norm
                        and not any(fnmatch.fnmatch(full, pattern) for pattern in self._statistics)
                    )
        return places

    def _read(self) -> list[Tensor]:
        """The buffers. One that has been deleted, or set to None, since the step began counts as
        unchanged.
        """
        found = [getattr(owner, name, None) for owner, name in self._places]
        here = [isinstance(buffer, Tensor) and buffer.layout == torch.strided for buffer in found]
        return [
            now if ok else before  # type: ignore[misc]
            for now, ok, before in zip(found, here, self.start or found, strict=True)
        ]

    def _write(self, tensors: Sequence[Tensor]) -> None:
        for (owner, name), tensor in zip(self._places, tensors, strict=True):
            if getattr(owner, name, None) is not None:
                setattr(owner, name, tensor)

    def begin(self) -> None:
        """Starts a step: every worker has the module's buffers."""
        self.start = []
        self.start = [buffer.detach().clone() for buffer in self._read()]
        self._leave()
        if self._workers > 1:
            self._copies = [[buffer.clone() for buffer in self.start] for _ in range(self._workers)]

    def _leave(self) -> None:
        """Remembers the buffers as they are when the step leaves them."""
        self._left = [(weakref.ref(buffer), buffer._version) for buffer in self._read()]

    def refresh(self) -> None:
        """Takes over buffers that somebody changed, made or removed between steps (a callback, a
        loaded checkpoint, pruning).

        On ranks, all have to change them alike: such changes are not exchanged.
        """
        places = self._found()
        if places != self._places or (
            self._copies is not None and any(map(_differs, self._read(), self.start))
        ):
            self._places = places
            self.begin()
        elif self._copies is None:
            now = self._read()
            for i, (buffer, (before, version)) in enumerate(zip(now, self._left, strict=True)):
                if before() is not buffer or buffer._version != version:
                    self.start[i] = buffer.detach().clone()

    @contextmanager
    def of(self, worker: int) -> Iterator[None]:
        """The module has the buffers of this local worker inside."""
        if self._copies is None or not self._places:
            try:
                yield
            finally:
                self._leave()
            return
        original = self._read()
        self._write(self._copies[worker])
        try:
            yield
        finally:
            self._copies[worker] = self._read()  # a module may have replaced one
            self._write(original)

    @contextmanager
    def scratch(self, worker: int) -> Iterator[None]:
        """The module has copies of this local worker's buffers inside, which are then thrown
        away.
        """
        original = self._read()
        self._write([buffer.clone() for buffer in self._now(worker)])
        try:
            yield
        finally:
            self._write(original)

    @contextmanager
    def holding(self, tensors: Sequence[Tensor]) -> Iterator[Callable[[], list[Tensor]]]:
        """The module has these tensors in the places of its buffers inside; yields what reads what
        they have become.
        """
        original = self._read()
        self._write(tensors)
        try:
            yield self._read
        finally:
            self._write(original)

    def copies(self) -> list[list[Tensor]]:
        """By local worker, its buffers as they are."""
        assert self._copies is not None
        return [list(own) for own in self._copies]

    def put(self, copies: Sequence[Sequence[Tensor]]) -> None:
        """The local workers' buffers become what `copies` gave."""
        self._copies = [list(own) for own in copies]

    def restart(self) -> None:
        """The local workers' buffers become those of the step's beginning."""
        self.put([[buffer.clone() for buffer in self.start] for _ in range(self._workers)])

    def stacked(self, workers: Sequence[int]) -> list[Tensor]:
        """By buffer, those of these local workers: ``[m, ...]``."""
        assert self._copies is not None
        return [torch.stack(own) for own in zip(*(self._copies[w] for w in workers), strict=True)]

    def take(self, workers: Sequence[int], stacked: Sequence[Tensor]) -> None:
        """The buffers of these local workers become those of ``stacked``."""
        assert self._copies is not None
        for i, worker in enumerate(workers):
            self._copies[worker] = [tensor[i] for tensor in stacked]

    def _now(self, worker: int) -> list[Tensor]:
        return self._read() if self._copies is None else self._copies[worker]

    def changed(self, worker: int) -> Tensor:
        """``[B]`` bool: the buffers that this local worker has changed since the step began."""
        if not self._places:
            return torch.zeros(0, dtype=torch.bool)
        return torch.stack(list(map(_differs, self._now(worker), self.start))).cpu()

    def _groups(self, which: Sequence[int]) -> dict[tuple[torch.dtype, bool], list[int]]:
        """Which of these buffers have each dtype, and are data or not."""
        groups: dict[tuple[torch.dtype, bool], list[int]] = {}
        for i in which:
            groups.setdefault((self.start[i].dtype, self._is_data[i]), []).append(i)
        return groups

    def _believed(
        self, speaking: Sequence[tuple[int, Sequence[Tensor]]], data: Sequence[bool]
    ) -> Sequence[Tensor] | None:
        """What the first worker whose data are all finite has said; None if there is none."""
        if not any(data):
            return None
        for worker, vectors in speaking:
            if all(
                bool(all_finite(v))
                for v, is_data in zip(vectors, data, strict=True)
                if is_data and v.is_floating_point()
            ):
                if worker != self._source:
                    log.info(
                        "byzantine_robust: buffers that are data (queues, memory banks) are "
                        f"those of worker {worker} from now on."
                    )
                    self._source = worker
                return vectors
        return None

    @torch.no_grad()
    def merge(self, transport: Transport, touched: Tensor, present: Tensor, f: int) -> None:
        """Ends a step: all workers get the same buffers.

        Statistics in floating point are the coordinate-wise median over the workers that are
        present; their integers come from the first of these. Data are those of the first worker
        that is present and whose data are all finite: worker 0's, as a rule, who is believed. Those
        that no more than f workers changed are reset.

        Args:
            transport: the run's transport.
            touched: ``[B]`` bool, the buffers that more than f workers changed; the same on every
                rank.
            present: ``[n]`` bool.
            f: Byzantine workers to tolerate.
        """
        merged = list(self.start)
        which = touched.nonzero().flatten().tolist()
        if which:
            # one vector of each kind travels, and not every buffer alone
            groups = self._groups(which)
            layout = [
                Field((sum(self.start[i].numel() for i in group),), dtype)
                for (dtype, _), group in groups.items()
            ]
            messages = [
                [
                    torch.cat(
                        [
                            (
                                now[i] if now[i].shape == self.start[i].shape else self.start[i]
                            ).reshape(-1)
                            for i in group
                        ]
                    )
                    for group in groups.values()
                ]
                for now in map(self._now, range(self._workers))
            ]
            everybody = transport.gather(messages, layout)
            heard = [(worker, everybody[worker]) for worker in present.nonzero().flatten().tolist()]
            speaking = [(worker, vectors) for worker, vectors in heard if vectors is not None]
            data = [is_data for _, is_data in groups]
            believed = self._believed(speaking, data)
            for k, ((_, is_data), group) in enumerate(groups.items() if speaking else ()):
                sizes = [self.start[i].numel() for i in group]
                said = [vectors[k] for _, vectors in speaking]
                agreed: Sequence[Tensor | None] = [None] * len(group)
                if is_data:
                    agreed = agreed if believed is None else torch.split(believed[k], sizes)
                elif said[0].is_floating_point():
                    agreed = _medians(torch.stack(said), sizes, f)
                else:
                    agreed = torch.split(said[0], sizes)
                for i, value in zip(group, agreed, strict=True):
                    merged[i] = self.start[i] if value is None else value.view(self.start[i].shape)
        for buffer, value in zip(self._read(), merged, strict=True):
            if buffer.shape == value.shape and not torch.equal(buffer, value):
                buffer.copy_(value)
        self.begin()


def _medians(rows: Tensor, sizes: Sequence[int], f: int) -> Sequence[Tensor | None]:
    """The coordinate-wise median of ``rows [n, sum(sizes)]``, one row of each worker, cut into
    these sizes; None where too few are finite.
    """
    # who has a nan in one tensor has a say in the others
    if len(sizes) > 1 and not bool(all_finite(rows)):
        return [
            _medians(part, [size], f)[0]
            for part, size in zip(torch.split(rows, list(sizes), 1), sizes, strict=True)
        ]
    try:
        return torch.split(CoordinateMedian(f=min(f, (len(rows) - 1) // 2))(rows), list(sizes))
    except TooFewRowsError:
        return [None] * len(sizes)


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """Whether two buffers differ, a 0-d bool tensor; nan is equal to nan."""
    if a.shape != b.shape:
        return torch.ones((), dtype=torch.bool, device=b.device)
    return ((a != b) & ~((a != a) & (b != b))).any()
