"""Workers that lie: once all honest messages of a round are known, theirs become what an attack
says.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_byz.aggregators import Aggregator
from lightning_byz.algorithms import Algorithm
from lightning_byz.attacks import Attack, Scene
from lightning_byz.attacks.base import checked_lies
from lightning_byz.compressors import Compressor
from lightning_byz.engine.outcome import SPEAKS
from lightning_byz.engine.server_side import ServerSide
from lightning_byz.numerics.memory import side_by_side
from lightning_byz.numerics.rows import AnyRows, Rows
from lightning_byz.transports import Message
from lightning_byz.types import Payload, Round, keyed_generator


class Adversary:
    """Some workers, and the attack that says what they send instead of their messages.

    The attack sees decoded messages and its answers go through the same codec. Every process
    computes the same lies. The attacker knows the server's state, and may try its lies on the
    server's half.

    Args:
        attack: what the Byzantine workers send.
        workers: their indices.
        active: whether they lie in the round with this step.
        x: by number of the exchange, the current parameters ``[d]``, for attacks that look at them.
    """

    def __init__(
        self,
        attack: Attack,
        workers: Sequence[int],
        active: Callable[[int], bool] = lambda step: True,
        x: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.attack, self.byzantine, self.active, self.x = attack, sorted(workers), active, x
        self._memories: dict[int, tuple[int | None, dict[str, Tensor]]] = {}

    def memory(self, index: int) -> dict[str, Tensor]:
        """What the attack remembers of the exchange with this number."""
        return self._memories.get(index, (None, {}))[1]

    def state_dict(self, index: int) -> dict[str, Any]:
        """The same, as plain containers of tensors, for a checkpoint; equal on every rank."""
        dim, memory = self._memories.get(index, (None, {}))
        return {"dim": dim, "memory": dict(memory)}

    def load_state_dict(self, index: int, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._memories[index] = (state["dim"], dict(state["memory"]))

    def begin(self, index: int, dim: int, round: Round) -> None:
        """Told of every round: forgets what belongs to another run, or to other parameters.

        Raises:
            ValueError: if the attack needs other workers.
        """
        if round.step == 0 or dim != self._memories.get(index, (None,))[0]:
            self.attack.check(self.byzantine, round.n)
            self._memories[index] = (dim, {})

    def forge(
        self,
        everybody: Sequence[Message],
        codec: Compressor,
        round: Round,
        server: ServerSide,
        index: int,
        liars: Collection[int],
    ) -> list[Message]:
        """The messages of all n workers, given those that they would send if all were honest.

        Args:
            everybody: whole messages, in order of the workers.
            codec: their format.
            round: the round.
            server: the server's half, whose state does not change.
            index: number of the exchange.
            liars: all workers that lie in this round, here or by another fault; their messages are
                not shown as honest ones.
        """
        messages, dim, dtype = list(everybody), server.dim, server.dtype
        cohort = server.algorithm.cohort(round).tolist()
        others = set(liars).difference(self.byzantine)
        says = torch.stack([message.flags[0] for message in messages]).tolist()
        rows = {
            worker: codec.decode(message.payload, dim)
            for worker, message in enumerate(messages)
            if cohort[worker]
            and worker not in others
            and says[worker] == SPEAKS
            and (message.checked or bool(codec.valid(message.payload, dim)))
        }
        honest = [worker for worker in rows if worker not in self.byzantine]
        if not honest and not self.attack.alone:
            return messages
        forges = zip(self.byzantine, self.attack.forges(len(self.byzantine)), strict=True)
        own = [worker for worker, forged in forges if worker in rows or (forged and cohort[worker])]
        zero = torch.zeros(dim, dtype=dtype, device=messages[0].flags.device)
        seen = _together([rows[worker] for worker in honest]) if honest else zero.new_empty(0, dim)
        trial = _Trial(server, server.state, tuple(messages), honest, own, codec, round)
        scene = Scene(
            generator=keyed_generator("attack", round.seed, round.step, device=seen.device),
            step=round.step,
            aggregate=trial.aggregate,
            target=trial.target,
            x=None if self.x is None else functools.partial(self.x, index),
            memory=self.memory(index),
            honest=honest,
            own=own,
            byzantine=self.byzantine,
            agree=server.transport.agree,
        )
        before = torch.stack([rows.get(worker, zero) for worker in own]) if own else seen[:0]
        version = seen._version
        lies = checked_lies(self.attack, self.attack(seen, before, scene), before)
        if seen._version != version:
            raise ValueError(
                f"An attack should not write into the honest rows that it is shown. Found that "
                f"{type(self.attack).__name__} does. Work on a copy: honest.clone()."
            )
        for worker, lie in zip(own, lies, strict=True):
            flags = messages[worker].flags.clone()
            flags[0] = SPEAKS
            messages[worker] = Message(flags, _encoded(lie.to(dtype), worker, codec, round))
        return messages


def _together(vectors: Sequence[Tensor]) -> Tensor:
    """Vectors ``[d]`` as rows, for reading only."""
    rows = side_by_side(vectors)
    return torch.stack(list(vectors)) if rows is None else rows


def _encoded(lie: Tensor, worker: int, codec: Compressor, round: Round) -> Payload:
    generator = round._replace(worker=worker).private("compressor", lie.device)
    return codec.encode(lie, generator)


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
class _Trial:
    """What the server would make of a round in which some workers lie.

    Args:
        server: the server's half.
        state: its state before the round.
        everybody: the messages of all workers, those of the liars being honest still.
        honest: the honest workers.
        own: the workers whose lies are tried.
        codec: the messages' format.
        round: the round.
    """

    server: ServerSide
    state: Any
    everybody: Sequence[Message]
    honest: Sequence[int]
    own: Sequence[int]
    codec: Compressor
    round: Round

    def _columns(self, payload: Payload) -> Tensor:
        """A decoded message, as far as this rank aggregates it."""
        return self.server.transport.columns(self.codec.decode(payload, self.server.dim))

    @cached_property
    def _decoded(self) -> tuple[Tensor, Tensor]:
        """``[n, width]`` and ``[n]`` bool: all messages, and who is present."""
        server = self.server
        says = torch.stack([message.flags[0] for message in self.everybody]).cpu()
        payloads = [message.payload for message in self.everybody]
        valid = self.codec.which_valid(payloads, server.dim)
        present = (says == SPEAKS) & valid.cpu()
        device = self.everybody[0].payload[0].device
        values = torch.zeros(len(present), server.width, dtype=server.dtype, device=device)
        for row, here, payload in zip(values, present.tolist(), payloads, strict=True):
            if here:
                row.copy_(self._columns(payload))
        return values, present

    def _estimate(self, algorithm: Algorithm) -> Tensor:
        return self.server.supposed(*self._decoded, self.round, algorithm, self.state)

    def aggregate(self, lies: Tensor) -> Tensor:
        """The server's estimate ``[d]`` for these lies ``[b, d]``; zeros if it would skip the
        step.
        """
        values, present = self._decoded
        for worker, lie in zip(self.own, lies, strict=True):
            payload = _encoded(lie.to(self.server.dtype), worker, self.codec, self.round)
            present[worker] = bool(self.codec.valid(payload, self.server.dim))
            values[worker] = self._columns(payload) if present[worker] else 0.0
        return self._estimate(self.server.algorithm)

    def target(self) -> Tensor:
        """The server's estimate ``[d]`` if it took the mean of the honest messages."""
        algorithm = self.server.algorithm
        if algorithm.sees_absent:  # what the rule aggregates is not what was sent
            mean = _HonestMean(honest=tuple(self.honest))
            return self._estimate(dataclasses.replace(algorithm, aggregator=mean))  # type: ignore[type-var]
        values, present = self._decoded
        everybody = [*self.honest, *self.own]
        # a unanimous rule gives what all agree on
        values[everybody] = values[list(self.honest)].mean(0)
        present[everybody] = True
        try:
            return self._estimate(algorithm)
        finally:
            del self._decoded  # made anew for the next lies
