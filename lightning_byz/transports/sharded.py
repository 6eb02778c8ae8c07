"""Every process aggregates its share of the coordinates, of all workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_byz.compressors import Compressor, Field, Identity, WireFormat
from lightning_byz.numerics.memory import empty_rows
from lightning_byz.transports.base import Downlink, Uplink
from lightning_byz.transports.collective import Collective
from lightning_byz.transports.meeting import Request
from lightning_byz.transports.messages import Message, Received
from lightning_byz.types import Payload, Round

_MOST_BUCKETS = 64
"""Parts of the coordinates that travel on their own."""
_STRIPES = 32
"""Parts of the coordinates of sparse messages, of which every rank has a share."""
_BLOCK = 2**18
"""Coordinates that are decoded at a time: 1 MB of float32, which stays in a core's cache."""
_UP, _DOWN = 1, 2
"""The lanes of messages on their way up, and of estimates on their way down."""


def shard_bounds(dim: int, shards: int) -> list[int]:
    """Where equal shares of ``dim`` coordinates begin and end: multiples of 32, or ``dim``; those
    behind the end are empty.
    """
    size = -(-dim // (32 * shards)) * 32
    return [min(i * size, dim) for i in range(shards + 1)]


class Sharded(Collective):
    """All-to-all of the payloads by coordinates over torch.distributed: of d coordinates a rank
    aggregates d / ranks, of all n workers.

    A rank sends its message once, cut into shares, and receives the result once: as many bytes as
    an all-reduce moves without compression, whatever n is. Server state, an EF21 mirror say, lies
    in shares too. Norms, distances and the search for nan are of whole vectors: the shares' small
    sums are added up over the ranks. Payloads that cannot be cut (`LowRank`) are sent whole to
    everybody, and decoded there for its share only.

    Messages of coordinate-wise algorithms (`Algorithm.coordinate_wise`) travel in buckets, of which
    every rank has a share. A bucket leaves as soon as the backward pass has filled it; the answer
    comes down bucket by bucket, too, as soon as the rule knows it. The results are those of whole
    messages. The last coordinates go first; a parameter without a gradient holds its bucket back
    until backward has ended. Sparse messages of other algorithms are cut into 32 stripes, of which
    every rank has a share: their largest coordinates lie together.

    Who must be honest: every *process*, as for `AllGather`; in addition each makes its share of the
    result for all others. What decisions depend on (distances, norms) is rank 0's.

    Args:
        overlap: send buckets; False: messages and results in one piece each, after backward. All
            ranks must be told the same.
        bucket_size: bytes of a bucket's message, about, and at most as many coordinates. There are
            64 buckets at most; then they are larger.
    """

    in_shards = True

    @property
    def overlaps(self) -> bool:  # type: ignore[override]
        """Not where workers are held in parts, which may have unlike numbers of buckets."""
        return self.overlap and not self.has_parts

    def __init__(self, overlap: bool = True, bucket_size: int = 2**22) -> None:
        if isinstance(bucket_size, bool) or not isinstance(bucket_size, int) or bucket_size < 1:
            raise ValueError(
                "`bucket_size` should be a number of bytes, an integer of at least 1. Found "
                f"{bucket_size!r}."
            )
        self.overlap, self.bucket_size = overlap, bucket_size
        self._bucket: int | None = None  # coordinates of a bucket; None: there is only one
        self._stripes = 1  # parts of the coordinates, of which every rank has a share
        self._bounds: dict[int, list[int]] = {}

    def connect(
        self, rank: int, world_size: int, workers_per_process: int, device: torch.device
    ) -> None:
        super().connect(rank, world_size, workers_per_process, device)
        self._room: dict[tuple[Field, ...], list[Tensor]] = {}
        self._bounds.clear()

    def cut(self, codec: Compressor, in_pieces: bool) -> None:
        self._bucket, self._stripes = None, 1
        if in_pieces and self.overlaps:
            self._bucket = min(
                32 * self.bucket_size // codec.nbytes(32, torch.float32), self.bucket_size
            )
        elif codec.sparse and codec.joins:
            self._stripes = _STRIPES
        self._bounds.clear()

    def bounds(self, dim: int) -> list[int]:
        """Where the ranks' shares of the buckets begin and end: bucket by bucket, rank by rank; all
        but the last are multiples of 32.
        """
        if dim in self._bounds:
            return self._bounds[dim]
        size, unit = dim, 32 * self.world_size
        if self._bucket is not None:
            size = -(-max(self._bucket, dim // _MOST_BUCKETS, 1) // unit) * unit
        elif self._stripes > 1:
            size = -(-max(dim // self._stripes, 1) // unit) * unit
        cuts = [0]
        for first in range(0, dim, max(1, size)) or (0,):
            cuts += [
                first + cut for cut in shard_bounds(min(size, dim - first), self.world_size)[1:]
            ]
        self._bounds[dim] = cuts
        return cuts

    def spans_of(self, rank: int, dim: int) -> tuple[tuple[int, int], ...]:
        """The columns that a rank aggregates: its share of every bucket."""
        bounds = self.bounds(dim)
        return tuple(
            (bounds[i], bounds[i + 1]) for i in range(rank, len(bounds) - 1, self.world_size)
        )

    def spans(self, dim: int) -> tuple[tuple[int, int], ...]:
        return self.spans_of(self.rank, dim)

    def total(self, tensor: Tensor) -> Tensor:
        return self._sum(tensor)

    def bytes_down(self, message: Message, answer: Payload) -> int:
        return sum(tensor.nbytes for tensor in answer)

    # -- up ----------------------------------------------------------------------------------------

    def exchange(
        self,
        messages: Sequence[Message],
        codec: Compressor,
        dim: int,
        dtype: torch.dtype,
        round: Round,
    ) -> Received:
        """The result is in memory that the next exchange of the same layout uses again."""
        uplink = self.uplink(codec, dim, dtype, round)
        if uplink is not None:
            cuts = [first for first, _ in reversed(uplink.buckets)] + [dim]
            pieces = [codec.split(message.payload, dim, cuts) for message in messages]
            for bucket in reversed(range(len(uplink.buckets))):
                uplink.send([mine[bucket] for mine in pieces])
            return uplink.close([message.flags for message in messages])
        format = self._format(codec, dim)
        if format is None:
            return super().exchange(messages, codec, dim, dtype, round)
        shares = [self._shares(codec, message.payload, dim) for message in messages]
        width = self._width(self.rank, dim)
        flags = Field(tuple(messages[0].flags.shape), torch.uint8)
        if codec.sparse:
            layouts = self._announced(shares, codec.layout(dim, dtype))
            incoming = [
                [_empty(field, self._device) for field in (flags, *layout)] for layout in layouts
            ]
            shares = [
                mine if layouts[worker] else [()] * self.world_size
                for worker, mine in zip(self.workers, shares, strict=True)
            ]
        else:
            incoming = [
                list(tensors)
                for tensors in zip(*self._rows((flags, *format.layout(width, dtype))), strict=True)
            ]

        outgoing = [
            [
                tensor
                for message, mine in zip(messages, shares, strict=True)
                for tensor in (message.flags, *mine[rank])
            ]
            for rank in range(self.world_size)
        ]
        expected = [
            [
                tensor
                for worker in range(rank * len(messages), (rank + 1) * len(messages))
                for tensor in incoming[worker]
            ]
            for rank in range(self.world_size)
        ]
        for tensor, out in zip(outgoing[self.rank], expected[self.rank], strict=True):
            out.copy_(tensor)
        self._swap(outgoing, expected)
        device = messages[0].flags.device
        received = [
            Message(flags.to(device), tuple(t.to(device) for t in payload))
            for flags, *payload in incoming
        ]
        return Received(received, format, self._valid(received, format, width))

    def uplink(
        self, codec: Compressor, dim: int, dtype: torch.dtype, round: Round
    ) -> Uplink | None:
        """Its result is in memory that the next round uses again."""
        return _Uplink(self, codec, dim, dtype) if codec.coordinate_wise else None

    def _rows(self, layout: tuple[Field, ...]) -> list[Tensor]:
        """Room for what arrives here of all n workers: a tensor ``[n, ...]`` for each field."""
        if layout not in self._room:
            likes = (torch.empty(0, dtype=field.dtype, device=self._device) for field in layout)
            self._room[layout] = [
                empty_rows(self.n, math.prod(field.shape), like).view(self.n, *field.shape)
                for field, like in zip(layout, likes, strict=True)
            ]
        return self._room[layout]

    def _announced(
        self, shares: Sequence[Sequence[Payload]], whole: Sequence[Field]
    ) -> list[list[Field]]:
        """The layouts of what will arrive here of all n workers' payloads, whose shares differ in
        size.

        A payload whose shares do not add up to the layout of a whole one is not sent at all: its
        layout is empty.

        Args:
            shares: of every local worker, for every rank.
            whole: the layout of a payload.
        """
        sizes = torch.tensor(
            [[[len(tensor) for tensor in share] for share in mine] for mine in shares]
        )
        gathered = self.gather(
            [[worker] for worker in sizes], [Field(tuple(sizes.shape[1:]), torch.int64)]
        )
        table = torch.stack([worker for (worker,) in gathered])  # [n, ranks, tensors]
        sound = (table >= 0).flatten(1).all(1) & (
            table.sum(1) == torch.tensor([field.shape[0] for field in whole])
        ).all(1)
        return [
            [
                Field((size, *field.shape[1:]), field.dtype)
                for size, field in zip(here, whole, strict=True)
            ]
            if fits
            else []
            for here, fits in zip(table[:, self.rank].tolist(), sound.tolist(), strict=True)
        ]

    def deliver(self, everybody: Sequence[Message], codec: Compressor, dim: int) -> Received:
        width, format = self._width(self.rank, dim), self._format(codec, dim)
        if format is None:
            window = _Window(codec, dim, self.spans(dim)[0][0])
            return Received(list(everybody), window, self._valid(everybody, window, width))
        here = [
            Message(flags, self._shares(codec, payload, dim)[self.rank])
            for flags, payload, _ in everybody
        ]
        return Received(here, format, self._valid(here, format, width))

    def _width(self, rank: int, dim: int) -> int:
        """How many columns a rank aggregates."""
        return sum(last - first for first, last in self.spans_of(rank, dim))

    def _shares(self, codec: Compressor, payload: Payload, dim: int) -> list[Payload]:
        """A payload's share for every rank."""
        bounds, world = self.bounds(dim), self.world_size
        pieces = codec.split(payload, dim, bounds)
        if len(pieces) == world:
            return pieces
        widths = [last - first for first, last in pairwise(bounds)]
        return [codec.join(pieces[rank::world], widths[rank::world]) for rank in range(world)]

    def _format(self, codec: Compressor, dim: int) -> WireFormat | None:
        """How this rank's share of a payload is decoded; None if payloads cannot be cut into all
        ranks' shares.
        """
        if codec.coordinate_wise:
            return codec
        parts = [codec.part(dim, first, last) for first, last in pairwise(self.bounds(dim))]
        whole = len(parts) == self.world_size or codec.joins
        return parts[self.rank] if whole and all(part is not None for part in parts) else None

    # -- down --------------------------------------------------------------------------------------

    def downlink(self, dim: int, like: Tensor, out: Tensor | None) -> Downlink:
        return _Downlink(self, dim, like, out)

    def spread(
        self,
        answer: Payload,
        codec: Compressor,
        dim: int,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Payload]:
        if isinstance(codec, Identity):  # numbers arrive where they belong
            whole = self._joined(answer[0], dim, range(self.world_size), out)
            return whole, (whole,)
        spans = [self.spans_of(rank, dim) for rank in range(self.world_size)]
        widths = [sum(last - first for first, last in mine) for mine in spans]
        answers = [
            [_empty(field, self._device) for field in codec.layout(width, dtype)]
            for width in widths
        ]
        device = answer[0].device
        for tensor, own in zip(answer, answers[self.rank], strict=True):
            own.copy_(tensor)
        self._swap([answer] * self.world_size, answers)
        whole = torch.empty(dim, dtype=dtype, device=device) if out is None else out
        for share, width, mine in zip(answers, widths, spans, strict=True):
            self._decode(tuple(t.to(device) for t in share), codec, width, mine, whole)
        return whole, tuple(tensor for share in answers for tensor in share)

    @staticmethod
    def _decode(
        share: Payload,
        codec: Compressor,
        width: int,
        spans: Sequence[tuple[int, int]],
        whole: Tensor,
    ) -> None:
        """Puts what a share of a payload stands for where it belongs; where that can be, in blocks
        that are in a cache when they are put.
        """
        if not codec.coordinate_wise:
            parts = torch.split(codec.decode(share, width), [last - first for first, last in spans])
            for (first, last), numbers in zip(spans, parts, strict=True):
                whole[first:last] = numbers
            return
        blocks = [
            (a, min(a + _BLOCK, last)) for first, last in spans for a in range(first, last, _BLOCK)
        ]
        pieces = codec.split(
            share, width, list(accumulate((last - first for first, last in blocks), initial=0))
        )
        for (first, last), piece in zip(blocks, pieces, strict=True):
            codec.decode_into(piece, whole[first:last])

    def revise(self, index: Tensor, numbers: Tensor, last: Tensor) -> Payload:
        """Every rank sends the coordinates of its share that have changed, or all of it where that
        is less.
        """
        dim = len(last)
        places = self._places(index, dim)
        changed = numbers != last[places]
        narrow = torch.int32 if dim <= torch.iinfo(torch.int32).max else torch.int64
        share: Payload = (numbers[changed], places[changed].to(narrow))
        count, width = len(share[0]), self._width(self.rank, dim)
        if sum(tensor.nbytes for tensor in share) >= width * last.element_size():
            count, share = -1, (self.columns(last).index_copy(0, index, numbers),)
        said = self.gather(
            [[torch.tensor([count])]] * self.workers_per_process, [Field((1,), torch.int64)]
        )
        counts = [int(said[rank * self.workers_per_process][0]) for rank in range(self.world_size)]
        answers = [
            [_empty(Field((count,), dtype), self._device) for dtype in (last.dtype, narrow)]
            if count >= 0
            else [_empty(Field((self._width(rank, dim),), last.dtype), self._device)]
            for rank, count in enumerate(counts)
        ]
        for tensor, out in zip(share, answers[self.rank], strict=True):
            out.copy_(tensor)
        self._swap([share] * self.world_size, answers)
        for rank, (sent, *changes) in enumerate(answers):
            sent = sent.to(last.device)
            if changes:
                last.index_copy_(0, changes[0].to(last.device).long(), sent)
                continue
            spans = self.spans_of(rank, dim)
            parts = torch.split(sent, [end - first for first, end in spans])
            for (first, end), part in zip(spans, parts, strict=True):
                last[first:end] = part
        return tuple(tensor for answer in answers for tensor in answer)

    def _places(self, index: Tensor, dim: int) -> Tensor:
        """Where this rank's columns lie in the whole vectors, given their numbers here."""
        spans = torch.tensor(self.spans(dim), device=index.device)
        widths = spans[:, 1] - spans[:, 0]
        ends = widths.cumsum(0)
        of_span = torch.searchsorted(ends, index, right=True)
        return index + (spans[:, 0] - ends + widths)[of_span]

    def assemble(self, columns: Tensor, dim: int) -> Tensor:
        return self._joined(columns, dim, range(self.world_size))

    def collect(self, columns: Tensor, dim: int) -> Tensor:
        return self._joined(columns, dim, range(1))

    def _joined(
        self, columns: Tensor, dim: int, ranks: Sequence[int], out: Tensor | None = None
    ) -> Tensor:
        """Whole vectors at these ranks, in ``out`` if there is one that the backend can receive
        into; elsewhere this rank's columns.
        """
        rows = columns.reshape(math.prod(columns.shape[:-1]), columns.shape[-1])
        own = [
            piece
            for row in rows
            for piece in torch.split(row, [last - first for first, last in self.spans(dim)])
        ]
        outgoing = [own if rank in ranks else [] for rank in range(self.world_size)]
        if self.rank not in ranks:
            self._swap(outgoing, [[]] * self.world_size)
            return columns
        whole = out
        if whole is None or whole.device != self._device:
            whole = torch.empty(*columns.shape[:-1], dim, dtype=columns.dtype, device=self._device)
        incoming = [
            [
                row[first:last]
                for row in whole.view(-1, dim)
                for first, last in self.spans_of(rank, dim)
            ]
            for rank in range(self.world_size)
        ]
        for piece, place in zip(own, incoming[self.rank], strict=True):
            place.copy_(piece)
        self._swap(outgoing, incoming)
        return whole.to(columns.device)


class _Uplink(Uplink):
    """All-to-all of one bucket after the other.

    Args:
        transport: whose ranks take part.
        codec: a coordinate-wise one.
        dim, dtype: of the vectors.
    """

    def __init__(self, transport: Sharded, codec: Compressor, dim: int, dtype: torch.dtype) -> None:
        self.transport, self.codec = transport, codec
        world, bounds = transport.world_size, transport.bounds(dim)
        starts = range(0, len(bounds) - 1, world)
        self.cuts = [bounds[start : start + world + 1] for start in reversed(starts)]
        self.buckets = [(cuts[0], cuts[-1]) for cuts in self.cuts]
        self.width = sum(last - first for first, last in transport.spans(dim))
        self.rows = transport._rows(codec.layout(self.width, dtype))
        self.requests: list[list[Request]] = [[] for _ in self.buckets]
        self.kept: list[Any] = []
        # where this rank's share of every bucket has its place in its rows, by field
        ends, place = [], self.width
        for cuts in self.cuts:
            ends.append((place - (cuts[transport.rank + 1] - cuts[transport.rank]), place))
            place = ends[-1][0]
        lengths = {
            at: [field.shape[0] for field in codec.layout(at, dtype)]
            for at in {at for pair in ends for at in pair}
        }
        self.places = [
            list(zip(lengths[first], lengths[last], strict=True)) for first, last in ends
        ]
        self._tag: int | None = None
        if transport._gloo:  # a sender need not wait for a receiver whose backward pass is slower
            for bucket, requests in enumerate(self.requests):
                requests += transport._start_swap([[]] * world, self._expected(bucket), _UP)
            self._tag = transport._meeting.tag  # a thread that sends asks for nothing else

    def _expected(self, bucket: int) -> list[list[Tensor]]:
        """What arrives of a bucket, by rank."""
        workers = self.transport.workers_per_process
        return [
            [
                rows[worker, first:last]
                for worker in range(rank * workers, (rank + 1) * workers)
                for rows, (first, last) in zip(self.rows, self.places[bucket], strict=True)
            ]
            for rank in range(self.transport.world_size)
        ]

    def send(self, payloads: Sequence[Payload]) -> None:
        transport, cuts = self.transport, self.cuts[self.sent]
        dim, bounds = cuts[-1] - cuts[0], [cut - cuts[0] for cut in cuts]
        shares = [
            self.codec.split(tuple(t.to(transport._device) for t in payload), dim, bounds)
            for payload in payloads
        ]
        outgoing = [
            [tensor for mine in shares for tensor in mine[rank]]
            for rank in range(transport.world_size)
        ]
        expected = self._expected(self.sent)
        for tensor, out in zip(outgoing[transport.rank], expected[transport.rank], strict=True):
            out.copy_(tensor)
        nothing: list[list[Tensor]] = [[]] * transport.world_size
        self.requests[self.sent] += transport._start_swap(
            outgoing, nothing if transport._gloo else expected, _UP, self._tag
        )
        self.kept.append(shares)
        self.sent += 1

    def close(self, flags: Sequence[Tensor]) -> Received:
        valid = torch.ones(self.transport.n, dtype=torch.bool, device=self.transport._device)
        self.transport._meeting.join()
        for requests, places, cuts in zip(self.requests, self.places, self.cuts, strict=True):
            self.transport._meeting.wait(requests)
            width = cuts[self.transport.rank + 1] - cuts[self.transport.rank]
            for worker in range(self.transport.n):  # while later buckets are on their way
                piece = tuple(
                    rows[worker, first:last]
                    for rows, (first, last) in zip(self.rows, places, strict=True)
                )
                valid[worker] &= self.codec.valid(piece, width)
        self.kept.clear()
        device = flags[0].device
        said = self.transport.gather(
            [[flag] for flag in flags], [Field(tuple(flags[0].shape), torch.uint8)]
        )
        received = [
            Message(flag, tuple(rows[worker].to(device) for rows in self.rows))
            for worker, (flag,) in enumerate(said)
        ]
        return Received(
            received, self.codec, self.transport.total((~valid).double()).to(device) == 0
        )


class _Downlink(Downlink):
    """Every rank's pieces to everybody, one after the other. Arguments as in
    `Transport.downlink`.
    """

    def __init__(self, transport: Sharded, dim: int, like: Tensor, out: Tensor | None) -> None:
        self.transport, self.device, whole = transport, like.device, out
        if whole is None or whole.device != transport._device:
            whole = torch.empty(dim, dtype=like.dtype, device=transport._device)
        self.whole, self.sent = whole, 0
        self.spans = [transport.spans_of(rank, dim) for rank in range(transport.world_size)]
        self.requests: list[Request] = []
        if transport._gloo:
            for piece in range(len(self.spans[0])):
                self.requests += transport._start_swap(
                    [[]] * transport.world_size, self._expected(piece), _DOWN
                )

    def _expected(self, piece: int) -> list[list[Tensor]]:
        return [[self.whole[slice(*spans[piece])]] for spans in self.spans]

    def send(self, piece: Tensor) -> None:
        transport, expected = self.transport, self._expected(self.sent)
        (own,) = expected[transport.rank]
        own.copy_(piece)
        nothing: list[list[Tensor]] = [[]] * transport.world_size
        self.requests += transport._start_swap(
            [[own]] * transport.world_size, nothing if transport._gloo else expected, _DOWN
        )
        self.sent += 1

    def close(self) -> Tensor:
        self.transport._meeting.wait(self.requests)
        return self.whole.to(self.device)


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
