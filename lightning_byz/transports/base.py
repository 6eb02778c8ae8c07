"""The transport interface: the only place where processes meet.

A `Transport` has three methods to write: `gather`, `agree` and `bytes_down`. What else one may be
able to do has a class each, with answers that hold for a plain one.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_byz.compressors import Compressor, Field, WireFormat
from lightning_byz.transports.messages import Awaited, Message, Received, Verdict
from lightning_byz.types import Payload, Round


class Uplink(ABC):
    """The messages of a round on their way up, bucket by bucket, in the order of ``buckets``, which
    is the same on every rank.

    Attributes:
        buckets: the columns first .. last - 1 of each; the last ones of the vector come first, as
            backward passes fill them.
        sent: how many have been sent.
    """

    buckets: Sequence[tuple[int, int]]
    sent: int = 0

    @abstractmethod
    def send(self, payloads: Sequence[Payload]) -> None:
        """The next bucket of every local worker's message. The tensors are to be left alone until
        `close` has returned.
        """

    @abstractmethod
    def close(self, flags: Sequence[Tensor]) -> Received:
        """What this rank aggregates, once all buckets are sent. ``flags``: of every local worker,
        as in `Message`.
        """


class Downlink(ABC):
    """An estimate on its way down, piece by piece, in the order of `Transport.spans`."""

    @abstractmethod
    def send(self, piece: Tensor) -> None:
        """The next piece of this rank's columns."""

    @abstractmethod
    def close(self) -> Tensor:
        """The whole estimate ``[dim]``, once all pieces are sent."""


class Link(ABC):
    """Who is there, and small messages between all.

    A worker is one of ``workers_per_process`` in one of ``world_size`` processes; worker
    ``rank * workers_per_process + i`` is the i-th of its process.
    """

    rank: int = 0
    world_size: int = 1
    workers_per_process: int = 1
    connects_processes: bool = False
    """Whether it finds, connects and outlives the run's processes itself, in place of
    torch.distributed.
    """

    def connect(
        self, rank: int, world_size: int, workers_per_process: int, device: torch.device
    ) -> None:
        """Called once the processes know each other, before the first round."""
        self.rank, self.world_size = rank, world_size
        self.workers_per_process = workers_per_process

    @property
    def n(self) -> int:
        """Number of workers of the run."""
        return self.world_size * self.workers_per_process

    @property
    def workers(self) -> range:
        """The workers of this process."""
        first = self.rank * self.workers_per_process
        return range(first, first + self.workers_per_process)

    def meet(self, place: str) -> None:  # noqa: B027
        """Told before each exchange in which all ranks take part: where this rank is.

        Ranks that say different things raise an error that names them, where the transport can
        know.

        Args:
            place: a short text, the same on all ranks: what is exchanged, and in which step.
        """

    @abstractmethod
    def gather(
        self, messages: Sequence[Sequence[Tensor]], layout: Sequence[Field]
    ) -> Sequence[tuple[Tensor, ...] | None]:
        """One tuple of tensors of this layout from every local worker, to those of all n workers,
        in order; None for one not heard.
        """

    def post(self, messages: Sequence[Sequence[Tensor]], layout: Sequence[Field]) -> None:
        """A `gather` of which the result is `delivered`, later: where the transport can, small
        messages travel along with what comes next, so that nobody waits for them.
        """
        heard = self.gather(messages, layout)  # whose memory the next one uses again
        self._delivered = [
            None if message is None else tuple(tensor.clone() for tensor in message)
            for message in heard
        ]

    def delivered(self) -> Sequence[tuple[Tensor, ...] | None]:
        """The result of the last `post`."""
        return self._delivered

    @property
    def has_parts(self) -> bool:
        """Whether this rank holds parts of its workers' vectors, and other ranks the rest."""
        return False

    @abstractmethod
    def agree(self, tensor: Tensor) -> Tensor:
        """Rank 0's copy of a small tensor that decisions depend on."""

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a small tensor over the ranks that hold the other columns."""
        return tensor

    def norm(self, vector: Tensor) -> Tensor:
        """``||vector||``, a 0-d float64 tensor, of a vector of which this rank holds the part that
        it holds of its workers' gradients.
        """
        norm: Tensor = torch.linalg.vector_norm(vector, dtype=torch.float64)
        return norm

    def of_whole_workers(self, flags: Tensor) -> Tensor:
        """What workers say that are held in parts by several ranks, given what their parts here
        say: ``[n, 1 + P]`` uint8, as in `Message`.
        """
        return flags


class Columns(ABC):
    """Who aggregates which columns, and how the estimate reaches the ranks that did not. By default
    every rank has all columns.
    """

    in_shards: bool = False
    """Whether every rank aggregates its share of the coordinates only."""

    def spans(self, dim: int) -> tuple[tuple[int, int], ...]:
        """Which columns first .. last - 1 of vectors ``[dim]`` this rank aggregates, in order."""
        return ((0, dim),)

    def columns(self, whole: Tensor) -> Tensor:
        """This rank's columns of ``whole [..., dim]``; a view where they lie together."""
        parts = [whole[..., first:last] for first, last in self.spans(whole.shape[-1])]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def spread(
        self,
        answer: Payload,
        codec: Compressor,
        dim: int,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Payload]:
        """The whole estimate ``[dim]`` as a worker decodes it, and the payload that told it.

        Args:
            answer: this rank's columns of the estimate, encoded.
            codec: the answer's format.
            dim: number of all columns.
            dtype: of the estimate.
            out: ``[dim]``, where the estimate may be put.
        """
        return codec.decode(answer, dim), answer

    def revise(self, index: Tensor, numbers: Tensor, last: Tensor) -> Payload | None:
        """The last estimate becomes this one, which differs from it in few coordinates only.

        Args:
            index: which of this rank's columns may differ, ``[m]`` int64, increasing.
            numbers: what they are now, ``[m]``.
            last: ``[dim]`` the last estimate, which all ranks know; becomes this one.

        Returns:
            the payload that told of it; None where every rank has all columns.
        """
        last[index] = numbers
        return None

    def assemble(self, columns: Tensor, dim: int) -> Tensor:
        """Whole vectors ``[..., dim]`` on every rank, given this rank's columns ``[..., width]``:
        for simulations and monitors.
        """
        return columns

    def collect(self, columns: Tensor, dim: int) -> Tensor:
        """The same at rank 0 only, for checkpoints; elsewhere this rank's columns."""
        return columns


class Buckets:
    """Whether messages travel in pieces, so that they leave while backward runs. By default they do
    not.
    """

    overlaps: bool = False
    """Whether messages may leave while backward runs."""

    def cut(self, codec: Compressor, in_pieces: bool) -> None:
        """Told before the first round.

        Args:
            codec: of the messages.
            in_pieces: whether they may travel in many pieces, as those of a coordinate-wise
                algorithm.
        """

    def uplink(
        self, codec: Compressor, dim: int, dtype: torch.dtype, round: Round
    ) -> Uplink | None:
        """The way up for the messages of a round of a coordinate-wise algorithm; None: whole
        messages only.
        """
        return None

    def downlink(self, dim: int, like: Tensor, out: Tensor | None) -> Downlink:
        """The way down for an estimate in several pieces, one for each of `Columns.spans`, where
        there are several.

        ``out``: as in `Columns.spread`.
        """
        raise NotImplementedError


class Serving:
    """Whether one process serves, and the others see no messages but their own. By default every
    process runs the server's half.
    """

    measured: bool = False
    """Whether messages arrive one by one: a round closes when the first k have come, and goes on
    without the dead.
    """

    @property
    def serves(self) -> bool:
        """Whether this process has all messages, and runs the server's half of the algorithm."""
        return True

    def awaits(self, awaited: Awaited) -> None:
        """Told before workers compute: for whom the coming round will wait."""

    def arrivals(self) -> Tensor | None:
        """``[n]`` float64, the seconds after which the messages of the last round came, inf for
        those that did not.

        None if not `measured`.
        """
        return None

    def why_silent(self, worker: int) -> str:
        """Why a worker's message did not count in the last round, as a verb for the log."""
        return "gave no finite gradient"

    def publish(self, verdict: Verdict, down: Compressor, dim: int, dtype: torch.dtype) -> None:
        """Tells the others what came of the round, in a process that serves. ``down``: the format
        of the answer.
        """

    def submit(
        self,
        messages: Sequence[Message],
        codec: Compressor,
        down: Compressor,
        dim: int,
        dtype: torch.dtype,
        round: Round,
    ) -> Verdict:
        """The local workers' messages to the server, and what came of the round, in a process that
        does not serve.
        """
        raise NotImplementedError


class Transport(Link, Columns, Buckets, Serving):
    """Moves the messages of a round from all workers to wherever they are aggregated, and the
    estimate back.
    """

    @abstractmethod
    def bytes_down(self, message: Message, answer: Payload) -> int:
        """Bytes of payload that a worker receives in a round in which each sends ``message`` and a
        server would send ``answer``.
        """

    def exchange(
        self,
        messages: Sequence[Message],
        codec: Compressor,
        dim: int,
        dtype: torch.dtype,
        round: Round,
    ) -> Received:
        """What this rank aggregates of the messages of all n workers, given those of the local
        ones.
        """
        return self.deliver(self.everybody(messages, codec, dim, dtype, round), codec, dim)

    def everybody(
        self,
        messages: Sequence[Message],
        codec: Compressor,
        dim: int,
        dtype: torch.dtype,
        round: Round,
    ) -> list[Message]:
        """The whole messages of all n workers, in order, given those of the local ones."""
        layout = (Field(tuple(messages[0].flags.shape), torch.uint8), *codec.layout(dim, dtype))
        given = [(message.flags, *message.payload) for message in messages]
        mine = dict(zip(self.workers, zip(given, messages, strict=True), strict=True))
        everybody = []
        for worker, heard in enumerate(self.gather(given, layout)):
            if heard is None:
                continue
            sent, message = mine.get(worker, ((), None))
            if message is None or not all(map(operator.is_, heard, sent)):
                message = Message(heard[0], tuple(heard[1:]))
            everybody.append(message)
        return everybody

    def deliver(self, everybody: Sequence[Message], codec: Compressor, dim: int) -> Received:
        """What this rank aggregates of whole messages that every rank has."""
        return Received(list(everybody), codec, self._valid(everybody, codec, dim))

    def _valid(self, messages: Sequence[Message], format: WireFormat, width: int) -> Tensor:
        """``[n]`` bool: whether these messages are valid here and at the ranks that hold the other
        columns; those without a payload are not.
        """
        unsure = [i for i, message in enumerate(messages) if not message.checked]
        valid = torch.ones(len(messages), dtype=torch.bool, device=messages[0].flags.device)
        if unsure:
            found = format.which_valid([messages[i].payload for i in unsure], width)
            valid[unsure] = found.to(valid.device)
        return self.total((~valid).double()) == 0
