"""A transport that lies: some of the workers behind it send what an attack says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_byz.aggregators import Aggregator, TooFewRowsError
from lightning_byz.algorithms import Algorithm
from lightning_byz.attacks import Attack, Scene
from lightning_byz.attacks.base import checked_lies
from lightning_byz.compressors import Compressor, Field
from lightning_byz.numerics.rows import AnyRows, Rows
from lightning_byz.transports.base import Awaited, Downlink, Message, Received, Transport, Verdict
from lightning_byz.types import Payload, Round, keyed_generator


class ByzantineTransport(Transport):
    """Replaces the messages of some workers by an attack's, after all honest messages of the round are known.

    The attack sees decoded messages and its answers go through the same codec. Every process computes the same lies.

    Args:
        inner: the transport that moves the messages.
        attack: what the Byzantine workers send.
        workers: their indices.
        active: whether they lie in the round with this step.
        liars: all workers that lie in the round with this step, here or by another fault; their messages are not shown as honest ones.
        algorithm: the run's algorithm, for attacks that try their lies on the server.
        state: the server's state before the round.
        x: the current parameters ``[d]``, for attacks that look at them.
        shares: ``[n]`` how much of the data each worker holds, as in `Exchange`.
    """

    def __init__(
        self,
        inner: Transport,
        attack: Attack,
        workers: Sequence[int],
        active: Callable[[int], bool],
        liars: Callable[[int], Collection[int]] | None = None,
        algorithm: Algorithm | None = None,
        state: Callable[[], Any] | None = None,
        x: Callable[[], Tensor] | None = None,
        shares: Tensor | None = None,
    ) -> None:
        self.inner, self.attack, self.byzantine, self.active = inner, attack, sorted(workers), active
        self.liars, self.algorithm, self.state, self.x = liars or (lambda step: ()), algorithm, state, x
        self.shares = shares
        self.rank, self.world_size, self.workers_per_process = inner.rank, inner.world_size, inner.workers_per_process
        attack.check(self.byzantine, self.n)
        self.memory: dict[str, Tensor] = {}
        self._dim: int | None = None

    @property
    def serves(self) -> bool:
        return self.inner.serves

    @property
    def measured(self) -> bool:  # type: ignore[override]
        return self.inner.measured

    @property
    def in_shards(self) -> bool:  # type: ignore[override]
        return self.inner.in_shards

    def spans(self, dim: int) -> tuple[tuple[int, int], ...]:
        return self.inner.spans(dim)

    def cut(self, codec: Compressor | None) -> None:
        self.inner.cut(codec)

    def meet(self, place: str) -> None:
        self.inner.meet(place)

    def gather(self, messages: Sequence[Sequence[Tensor]], layout: Sequence[Field]) -> Sequence[tuple[Tensor, ...] | None]:
        return self.inner.gather(messages, layout)

    def awaits(self, awaited: Awaited) -> None:
        self.inner.awaits(awaited)

    def arrivals(self) -> Tensor | None:
        return self.inner.arrivals()

    def why_silent(self, worker: int) -> str:
        return self.inner.why_silent(worker)

    def publish(self, verdict: Verdict, down: Compressor, dim: int, dtype: torch.dtype) -> None:
        self.inner.publish(verdict, down, dim, dtype)

    def submit(
        self, messages: Sequence[Message], codec: Compressor, down: Compressor, dim: int, dtype: torch.dtype, round: Round
    ) -> Verdict:
        return self.inner.submit(messages, codec, down, dim, dtype, round)

    def agree(self, tensor: Tensor) -> Tensor:
        return self.inner.agree(tensor)

    def total(self, tensor: Tensor) -> Tensor:
        return self.inner.total(tensor)

    def bytes_down(self, message: Message, answer: Payload) -> int:
        return self.inner.bytes_down(message, answer)

    def deliver(self, everybody: Sequence[Message], codec: Compressor, dim: int) -> Received:
        return self.inner.deliver(everybody, codec, dim)

    def spread(
        self, answer: Payload, codec: Compressor, dim: int, dtype: torch.dtype, out: Tensor | None = None
    ) -> tuple[Tensor, Payload]:
        return self.inner.spread(answer, codec, dim, dtype, out)

    def downlink(self, dim: int, like: Tensor, out: Tensor | None) -> Downlink:
        return self.inner.downlink(dim, like, out)

    def revise(self, index: Tensor, numbers: Tensor, last: Tensor) -> Payload | None:
        return self.inner.revise(index, numbers, last)

    def assemble(self, columns: Tensor, dim: int) -> Tensor:
        return self.inner.assemble(columns, dim)

    def collect(self, columns: Tensor, dim: int) -> Tensor:
        return self.inner.collect(columns, dim)

    def state_dict(self) -> dict[str, Any]:
        """What the attack remembers, as plain containers of tensors; the same on every rank."""
        return {"dim": self._dim, "memory": dict(self.memory)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._dim, self.memory = state["dim"], dict(state["memory"])

    def exchange(self, messages: Sequence[Message], codec: Compressor, dim: int, dtype: torch.dtype, round: Round) -> Received:
        """On shards, whole messages are gathered for the attackers to see; that is a simulation's traffic, and counted nowhere."""
        if not self.active(round.step):
            self._begin(dim, round)
            return self.inner.exchange(messages, codec, dim, dtype, round)
        return self.deliver(self.everybody(messages, codec, dim, dtype, round), codec, dim)

    def _begin(self, dim: int, round: Round) -> None:
        """Forgets what belongs to another run, or to other parameters."""
        if round.step == 0 or dim != self._dim:
            self._dim, self.memory = dim, {}

    def everybody(
        self, messages: Sequence[Message], codec: Compressor, dim: int, dtype: torch.dtype, round: Round
    ) -> list[Message]:
        everybody = self.inner.everybody(messages, codec, dim, dtype, round)
        self._begin(dim, round)
        if not self.active(round.step):
            return everybody

        cohort = (torch.ones(round.n) if self.algorithm is None else self.algorithm.cohort(round)).tolist()
        others = set(self.liars(round.step)).difference(self.byzantine)
        rows = {}
        for worker, (flags, payload) in enumerate(everybody):
            if cohort[worker] and worker not in others and int(flags[0]) == 1 and bool(codec.valid(payload, dim)):
                rows[worker] = codec.decode(payload, dim)
        honest = [worker for worker in rows if worker not in self.byzantine]
        if not honest and not self.attack.alone:
            return everybody
        forges = zip(self.byzantine, self.attack.forges(len(self.byzantine)), strict=True)
        own = [worker for worker, forged in forges if worker in rows or (forged and cohort[worker])]
        zero = torch.zeros(dim, dtype=dtype, device=everybody[0].flags.device)
        seen = torch.stack([rows[worker] for worker in honest]) if honest else zero.new_empty(0, dim)
        server = None
        if self.algorithm is not None and self.state is not None:
            server = _Server(
                self.algorithm, self.state(), everybody, honest, own, codec, dim, dtype, round, self.inner, self.shares
            )
        scene = Scene(
            generator=keyed_generator("attack", round.seed, round.step, device=seen.device),
            step=round.step,
            aggregate=None if server is None else server.aggregate,
            target=None if server is None else server.target,
            x=self.x,
            memory=self.memory,
            honest=honest,
            own=own,
            byzantine=self.byzantine,
            agree=self.inner.agree,
        )
        before = torch.stack([rows.get(worker, zero) for worker in own]) if own else seen[:0]
        lies = checked_lies(self.attack, self.attack(seen, before, scene), before)
        for worker, lie in zip(own, lies, strict=True):
            flags = everybody[worker].flags.clone()
            flags[0] = 1
            everybody[worker] = Message(flags, _encoded(lie, worker, codec, dtype, round))
        return everybody


def _encoded(lie: Tensor, worker: int, codec: Compressor, dtype: torch.dtype, round: Round) -> Payload:
    generator = round._replace(worker=worker).private("compressor", lie.device)
    return codec.encode(lie.to(dtype), generator)


@dataclass(frozen=True)
class _HonestMean(Aggregator):
    """What nobody can be: a rule that knows who is honest, and takes their mean."""

    f: int | None = 0
    honest: Sequence[int] = ()

    def __call__(self, rows: AnyRows, present: Tensor | None = None) -> Tensor:
        return Rows.of(rows).select(torch.tensor(self.honest)).dense().mean(0)

    def aggregate(self, rows: Rows) -> Tensor:
        return self(rows)


@dataclass
class _Server:
    """What the server would make of this round; its state does not change.

    Args:
        algorithm: the run's algorithm.
        state: the server's state before the round.
        everybody: the messages of all workers, those of the liars being honest still.
        honest: the honest workers.
        own: the workers whose lies are tried.
        codec, dim, dtype, round: as in `Transport.exchange`.
        transport: the one that moves the messages; on shards each rank makes its columns of the estimate.
        shares: as in `Exchange`.
    """

    algorithm: Algorithm
    state: Any
    everybody: Sequence[Message]
    honest: Sequence[int]
    own: Sequence[int]
    codec: Compressor
    dim: int
    dtype: torch.dtype
    round: Round
    transport: Transport
    shares: Tensor | None

    def _columns(self, payload: Payload) -> Tensor:
        """A decoded message, as far as this rank aggregates it."""
        return self.transport.columns(self.codec.decode(payload, self.dim))

    @cached_property
    def _decoded(self) -> tuple[Tensor, Tensor]:
        """``[n, width]`` and ``[n]`` bool: all messages, and who is present."""
        present = torch.stack([(flags[0] == 1) & self.codec.valid(payload, self.dim) for flags, payload in self.everybody]).cpu()
        like = self.everybody[0].payload[0]
        width = sum(last - first for first, last in self.transport.spans(self.dim))
        values = torch.zeros(len(present), width, dtype=self.dtype, device=like.device)
        for row, here, (_, payload) in zip(values, present.tolist(), self.everybody, strict=True):
            if here:
                row.copy_(self._columns(payload))
        return values, present

    def _estimate(self, algorithm: Algorithm) -> Tensor:
        values, present = self._decoded
        rows = Rows(
            values,
            total=self.transport.total,
            agree=self.transport.agree,
            generator=self.round.shared("rule"),
            spans=self.transport.spans(self.dim),
            dim=self.dim,
            shares=self.shares,
        )
        trusted = None if self.round.trusted is None else self.transport.columns(self.round.trusted)
        try:
            estimate, _ = algorithm.server(rows, self.state, self.round._replace(present=present, trusted=trusted))
        except TooFewRowsError:
            return values.new_zeros(self.dim)
        return self.transport.assemble(estimate, self.dim)

    def aggregate(self, lies: Tensor) -> Tensor:
        """The server's estimate ``[d]`` for these lies ``[b, d]``; zeros if it would skip the step."""
        values, present = self._decoded
        for worker, lie in zip(self.own, lies, strict=True):
            payload = _encoded(lie, worker, self.codec, self.dtype, self.round)
            present[worker] = bool(self.codec.valid(payload, self.dim))
            values[worker] = self._columns(payload) if present[worker] else 0.0
        return self._estimate(self.algorithm)

    def target(self) -> Tensor:
        """The server's estimate ``[d]`` if it took the mean of the honest messages."""
        if self.algorithm.sees_absent:  # what the rule aggregates is not what was sent
            averaging = dataclasses.replace(self.algorithm, aggregator=_HonestMean(honest=tuple(self.honest)))  # type: ignore[type-var]
            return self._estimate(averaging)
        values, present = self._decoded
        everybody = [*self.honest, *self.own]
        values[everybody] = values[list(self.honest)].mean(0)  # a unanimous rule gives what all agree on
        present[everybody] = True
        try:
            return self._estimate(self.algorithm)
        finally:
            del self._decoded  # made anew for the next lies
