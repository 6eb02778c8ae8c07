"""Every process aggregates its share of the coordinates, of all workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_byz.compressors import Compressor, Field, Identity, WireFormat
from lightning_byz.transports.base import Message, Received
from lightning_byz.transports.collective import Collective
from lightning_byz.types import Payload, Round


def shard_bounds(dim: int, shards: int) -> list[int]:
    """Where equal shares of ``dim`` coordinates begin and end: multiples of 32, or ``dim``; those behind the end are empty."""
    size = -(-dim // (32 * shards)) * 32
    return [min(i * size, dim) for i in range(shards + 1)]


class Sharded(Collective):
    """All-to-all of the payloads by coordinates over torch.distributed: of d coordinates a rank aggregates d / ranks, of all n workers.

    A rank sends its message once, cut into shares, and receives the result once: as many bytes as an all-reduce moves without compression,
    whatever n is. Server state, an EF21 mirror say, lies in shares too. Norms, distances and the search for nan are of whole vectors: the
    shares' small sums are added up over the ranks. Payloads that cannot be cut (`LowRank`) are sent whole to everybody, and decoded there
    for its share only.

    Who must be honest: every *process*, as for `AllGather`; in addition each makes its share of the result for all others. What decisions
    depend on (distances, norms) is rank 0's.
    """

    def connect(self, rank: int, world_size: int, workers_per_process: int, device: torch.device) -> None:
        super().connect(rank, world_size, workers_per_process, device)
        self._room: dict[tuple[Field, ...], list[Tensor]] = {}

    def span(self, dim: int) -> tuple[int, int]:
        bounds = shard_bounds(dim, self.world_size)
        return bounds[self.rank], bounds[self.rank + 1]

    def total(self, tensor: Tensor) -> Tensor:
        shared = tensor.to(self._device, copy=True)
        dist.all_reduce(shared)
        return shared.to(tensor.device)

    def bytes_down(self, message: Message, answer: Payload) -> int:
        return sum(tensor.nbytes for tensor in answer)

    # -- up -----------------------------------------------------------------------------------------------------------

    def exchange(self, messages: Sequence[Message], codec: Compressor, dim: int, dtype: torch.dtype, round: Round) -> Received:
        """The result is in memory that the next exchange of the same layout uses again."""
        bounds = shard_bounds(dim, self.world_size)
        format = self._format(codec, dim)
        if format is None:
            return super().exchange(messages, codec, dim, dtype, round)
        shares = [codec.split(message.payload, dim, bounds) for message in messages]
        first, last = self.span(dim)
        flags = Field(tuple(messages[0].flags.shape), torch.uint8)
        if codec.sparse:
            layouts = self._announced(shares, codec.layout(dim, dtype))
            incoming = [[_empty(field, self._device) for field in (flags, *layout)] for layout in layouts]
            shares = [
                mine if layouts[worker] else [()] * self.world_size for worker, mine in zip(self.workers, shares, strict=True)
            ]
        else:
            layout = (flags, *format.layout(last - first, dtype))
            if layout not in self._room:
                self._room[layout] = [_empty(Field((self.n, *field.shape), field.dtype), self._device) for field in layout]
            incoming = [list(tensors) for tensors in zip(*self._room[layout], strict=True)]

        outgoing = [
            [tensor for message, mine in zip(messages, shares, strict=True) for tensor in (message.flags, *mine[rank])]
            for rank in range(self.world_size)
        ]
        expected = [
            [tensor for worker in range(rank * len(messages), (rank + 1) * len(messages)) for tensor in incoming[worker]]
            for rank in range(self.world_size)
        ]
        for tensor, out in zip(outgoing[self.rank], expected[self.rank], strict=True):
            out.copy_(tensor)
        self._swap(outgoing, expected)
        device = messages[0].flags.device
        received = [Message(flags.to(device), tuple(t.to(device) for t in payload)) for flags, *payload in incoming]
        return Received(received, format, self._valid(received, format, last - first))

    def _announced(self, shares: Sequence[Sequence[Payload]], whole: Sequence[Field]) -> list[list[Field]]:
        """The layouts of what will arrive here of all n workers' payloads, whose shares differ in size.

        A payload whose shares do not add up to the layout of a whole one is not sent at all: its layout is empty.

        Args:
            shares: of every local worker, for every rank.
            whole: the layout of a payload.
        """
        sizes = torch.tensor([[[len(tensor) for tensor in share] for share in mine] for mine in shares])
        gathered = self.gather([[worker] for worker in sizes], [Field(tuple(sizes.shape[1:]), torch.int64)])
        table = torch.stack([worker for (worker,) in gathered])  # [n, ranks, tensors]
        sound = (table >= 0).flatten(1).all(1) & (table.sum(1) == torch.tensor([field.shape[0] for field in whole])).all(1)
        return [
            [Field((size, *field.shape[1:]), field.dtype) for size, field in zip(here, whole, strict=True)] if fits else []
            for here, fits in zip(table[:, self.rank].tolist(), sound.tolist(), strict=True)
        ]

    def deliver(self, everybody: Sequence[Message], codec: Compressor, dim: int) -> Received:
        first, last = self.span(dim)
        format = self._format(codec, dim)
        if format is None:
            window = _Window(codec, dim, first)
            return Received(list(everybody), window, self._valid(everybody, window, last - first))
        bounds = shard_bounds(dim, self.world_size)
        here = [Message(flags, codec.split(payload, dim, bounds)[self.rank]) for flags, payload in everybody]
        return Received(here, format, self._valid(here, format, last - first))

    def _format(self, codec: Compressor, dim: int) -> WireFormat | None:
        """How this rank's share of a payload is decoded; None if payloads cannot be cut into all ranks' shares."""
        parts = [codec.part(dim, first, last) for first, last in pairwise(shard_bounds(dim, self.world_size))]
        return None if any(part is None for part in parts) else parts[self.rank]

    # -- down ---------------------------------------------------------------------------------------------------------

    def spread(
        self, answer: Payload, codec: Compressor, dim: int, dtype: torch.dtype, out: Tensor | None = None
    ) -> tuple[Tensor, Payload]:
        if isinstance(codec, Identity):  # numbers arrive where they belong
            whole = self._joined(answer[0], dim, range(self.world_size), out)
            return whole, (whole,)
        sizes = [last - first for first, last in pairwise(shard_bounds(dim, self.world_size))]
        answers = [[_empty(field, self._device) for field in codec.layout(size, dtype)] for size in sizes]
        device = answer[0].device
        for tensor, own in zip(answer, answers[self.rank], strict=True):
            own.copy_(tensor)
        self._swap([answer] * self.world_size, answers)
        decoded = [codec.decode(tuple(t.to(device) for t in share), size) for share, size in zip(answers, sizes, strict=True)]
        return torch.cat(decoded, out=out), tuple(tensor for share in answers for tensor in share)

    def revise(self, estimate: Tensor, last: Tensor) -> tuple[Tensor, Payload]:
        """Every rank sends the coordinates of its share that have changed, or all of it where that is less."""
        bounds = shard_bounds(len(last), self.world_size)
        spans = list(pairwise(bounds))
        first, end = spans[self.rank]
        changed = (estimate != last[first:end]).nonzero().flatten()
        share: Payload = (estimate[changed], changed.to(torch.int32))
        count = len(changed) if sum(tensor.nbytes for tensor in share) < estimate.nbytes else -1
        share = share if count >= 0 else (estimate,)
        said = self.gather([[torch.tensor([count])]] * self.workers_per_process, [Field((1,), torch.int64)])
        counts = [int(said[rank * self.workers_per_process][0]) for rank in range(self.world_size)]
        answers = [
            [_empty(Field((count,), dtype), self._device) for dtype in (estimate.dtype, torch.int32)]
            if count >= 0
            else [_empty(Field((end - first,), estimate.dtype), self._device)]
            for count, (first, end) in zip(counts, spans, strict=True)
        ]
        for tensor, out in zip(share, answers[self.rank], strict=True):
            out.copy_(tensor)
        self._swap([share] * self.world_size, answers)
        whole = last.clone()
        for (first, end), (numbers, *places) in zip(spans, answers, strict=True):
            numbers = numbers.to(whole.device)
            if places:
                whole[first:end].index_copy_(0, places[0].to(whole.device).long(), numbers)
            else:
                whole[first:end] = numbers
        return whole, tuple(tensor for answer in answers for tensor in answer)

    def assemble(self, columns: Tensor, dim: int) -> Tensor:
        return self._joined(columns, dim, range(self.world_size))

    def collect(self, columns: Tensor, dim: int) -> Tensor:
        return self._joined(columns, dim, range(1))

    def _joined(self, columns: Tensor, dim: int, ranks: Sequence[int], out: Tensor | None = None) -> Tensor:
        """Whole vectors at these ranks, in ``out`` if there is one that the backend can receive into; elsewhere this rank's columns."""
        rows = list(columns.reshape(math.prod(columns.shape[:-1]), columns.shape[-1]))
        outgoing = [rows if rank in ranks else [] for rank in range(self.world_size)]
        if self.rank not in ranks:
            self._swap(outgoing, [[]] * self.world_size)
            return columns
        whole = out
        if whole is None or whole.device != self._device:
            whole = torch.empty(*columns.shape[:-1], dim, dtype=columns.dtype, device=self._device)
        spans = list(pairwise(shard_bounds(dim, self.world_size)))
        incoming = [[row[first:last] for row in whole.view(-1, dim)] for first, last in spans]
        for row, own in zip(rows, incoming[self.rank], strict=True):
            own.copy_(row)
        self._swap(outgoing, incoming)
        return whole.to(columns.device)


@dataclass(frozen=True)
class _Window(WireFormat):
    """A whole payload of which some columns only are wanted.

    Args:
        codec: how payloads are decoded.
        dim: numbers of the whole vector.
        first: where the columns begin.
    """

    codec: Compressor
    dim: int
    first: int

    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        return self.codec.layout(self.dim, dtype)

    def decode(self, payload: Payload, dim: int) -> Tensor:
        return self.codec.decode(payload, self.dim)[self.first : self.first + dim]

    def valid(self, payload: Payload, dim: int) -> Tensor:
        return self.codec.valid(payload, self.dim)


def _empty(field: Field, device: torch.device) -> Tensor:
    return torch.empty(field.shape, dtype=field.dtype, device=device)
