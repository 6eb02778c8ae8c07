"""The workers' half of a round: the local workers' messages, whole or bucket by bucket, and their
states.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lightning_byz.algorithms import Algorithm
from lightning_byz.compressors import Compressor
from lightning_byz.engine.outcome import (
    IDLE,
    SILENT,
    SPEAKS,
    Contribution,
    Outcome,
    comes,
    flags_of,
    flags_of_all,
)
from lightning_byz.engine.state_layout import (
    check_kept,
    check_state,
    columns_of,
    copied,
    piece_of,
    restored,
)
from lightning_byz.engine.workers_together import WorkersTogether
from lightning_byz.numerics.finite import all_finite
from lightning_byz.numerics.memory import TensorPool, one_after_the_other
from lightning_byz.transports import Message, Received, Transport, Uplink
from lightning_byz.types import Gradients, Payload, Round


class WorkerSide:
    """The local workers' halves of an algorithm.

    Args:
        algorithm: the method.
        transport: a connected transport.
        like: ``[d]``, for its size, dtype and device.

    Attributes:
        states: by worker, its state.
        unchecked: rounds in which the algorithm's own answers are looked at.
    """

    def __init__(self, algorithm: Algorithm, transport: Transport, like: Tensor) -> None:
        name = type(algorithm).__name__
        self.algorithm, self.unchecked = algorithm, 2
        self.states: dict[int, Any] = {w: algorithm.init_worker(like) for w in transport.workers}
        for state in self.states.values():
            check_state(state, f"{name}.init_worker")
        self._columns = columns_of(algorithm.init_worker, len(like), like.dtype)
        self._pool = TensorPool()
        self._together = WorkersTogether(self._columns, self._pool)

    def bucketed(
        self, transport: Transport, round: Round, x: Tensor, spend: bool
    ) -> BucketedMessages | None:
        """The coming round's messages in buckets; None where the algorithm or the transport wants
        whole ones.

        Args:
            transport: a connected transport.
            round: the round.
            x: ``[d]``, for its size, dtype and device.
            spend: messages may take the place of gradients.
        """
        if not (self.algorithm.coordinate_wise and transport.serves):
            return None
        codec = self.algorithm.codec(round)
        uplink = transport.uplink(codec, len(x), x.dtype, round)
        if uplink is None:
            return None
        check = self.unchecked > 0
        return BucketedMessages(
            self.algorithm, round, uplink, self.states, self._columns, self._pool, x, spend, check
        )

    def whole(
        self, contributions: Sequence[Contribution], round: Round, x: Tensor
    ) -> tuple[list[Message], dict[int, Any], dict[int, Payload]]:
        """The local workers' messages, and by worker its next state and its payload.

        Args:
            contributions: one for each local worker, in order.
            round: the round.
            x: ``[d]``, for its size, dtype and device.
        """
        assert round.cohort is not None
        codec = self.algorithm.codec(round)
        together = self._all_together(contributions, codec, round, x)
        if together is not None:
            payloads, states = together
            used_by = [contribution.used for contribution in contributions]
            flags = flags_of_all(SPEAKS, used_by)
            made = zip(flags, payloads, strict=True)
            return [Message(*each, checked=True) for each in made], states, {}
        messages, states, sent = [], dict[int, Any](), dict[int, Payload]()
        for worker, contribution in zip(self.states, contributions, strict=True):
            grads, used = contribution
            taken = bool(round.cohort[worker]) and comes(round, worker)
            says = IDLE if grads is None else SILENT
            if taken and _is_finite(grads, codec):
                payload, state = self._spoken(worker, grads, codec, round, x)
                if bool(codec.valid(payload, len(x))):  # a momentum or a narrow format may overflow
                    says, states[worker], sent[worker] = SPEAKS, state, payload
            if says != SPEAKS:  # absent workers send zeros of the same size
                payload = tuple(
                    torch.zeros(field.shape, dtype=field.dtype, device=x.device)
                    for field in codec.layout(len(x), x.dtype)
                )
            messages.append(Message(flags_of(says, used), payload, checked=says == SPEAKS))
        return messages, states, sent

    def _all_together(
        self, contributions: Sequence[Contribution], codec: Compressor, round: Round, x: Tensor
    ) -> tuple[list[Payload], dict[int, Any]] | None:
        """The payloads of all local workers, and by worker its next state, from one call of the
        algorithm; None where each has to be asked for its own.
        """
        assert round.cohort is not None
        all_speak = all(
            contribution.grads is not None
            and contribution.grads.previous is None
            and bool(round.cohort[worker])
            and comes(round, worker)
            for worker, contribution in zip(self.states, contributions, strict=True)
        )
        if not (self.algorithm.coordinate_wise and all_speak) or self.unchecked:
            return None
        grads = [
            None if contribution.grads is None else contribution.grads.current
            for contribution in contributions
        ]
        return self._together.spoken(self.algorithm, grads, self.states, codec, round)

    def _spoken(
        self, worker: int, grads: Gradients, codec: Compressor, round: Round, x: Tensor
    ) -> tuple[Payload, Any]:
        seen = round._replace(worker=worker, room=self._pool)
        payload, state = self.algorithm.worker(grads, self.states[worker], seen)
        if self.unchecked:
            owner = f"{type(self.algorithm).__name__}.worker"
            check_state(state, owner, self.states[worker])
            check_kept(state, grads.current, owner)
        codec.check(payload, len(x), x.dtype)
        return payload, state

    def finish(
        self, outcome: Outcome, states: Mapping[int, Any], sent: Mapping[int, Payload]
    ) -> None:
        """The local workers' states become those after the round; they stay if it gave no estimate.

        Args:
            outcome: of the round.
            states: by worker, its next state.
            sent: by worker, the payload that it sent whole.
        """
        self.unchecked = max(0, self.unchecked - 1)
        if outcome.estimate is None:
            return
        assert outcome.round.present is not None
        present = outcome.round.present
        if states and self._together.finished(states, present):
            self.states = dict(states)
            return
        for worker, state in states.items():
            if present[worker]:
                self._pool.take_back(self.states[worker], state)
                counted = self.algorithm.arrived(sent[worker], state) if worker in sent else state
                self.states[worker] = counted

    def memory(self) -> dict[int, Any]:
        """A copy of the states."""
        return {worker: copied(state) for worker, state in self.states.items()}

    def remember(self, memory: Mapping[int, Any]) -> None:
        """The states are those of `memory` again."""
        self.states = {worker: copied(state) for worker, state in memory.items()}

    def load(self, worker: int, saved: Mapping[str, Tensor]) -> None:
        """One worker's state becomes that of a checkpoint."""
        self.states[worker] = restored(self.states[worker], saved, f"worker {worker}")


def _is_finite(grads: Gradients | None, codec: Compressor) -> TypeGuard[Gradients]:
    """Whether there are gradients, and all of them finite; not looked at where the payload would
    show it.
    """
    if grads is None or codec.tells_nonfinite:
        return grads is not None
    return all(bool(all_finite(part)) for part in grads if part is not None)


_BLOCK = 2**18
"""Coordinates of which a worker's half is computed at a time: what one pass reads is in the cache
for the next.
"""


class BucketedMessages:
    """The local workers' messages of one round on their way up, bucket by bucket, and the states
    that they leave behind.

    Args:
        algorithm: a coordinate-wise one.
        round: the round.
        uplink: the way up.
        states: by worker, its state.
        columns: of every tensor of a state, whether its last dimension is that of the coordinates.
        room: memory for its next state, which is written piece by piece.
        x: ``[d]``, for its size, dtype and device.
        spend: messages may take the place of gradients.
        check: look at the states that the algorithm makes.

    Attributes:
        sound: by worker, whether each piece that it sent is finite: 0-d bool tensors, so that an
            accelerator is not waited for.
        states: by worker, its next state.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        round: Round,
        uplink: Uplink,
        states: dict[int, Any],
        columns: Sequence[bool],
        room: TensorPool,
        x: Tensor,
        spend: bool,
        check: bool = False,
    ) -> None:
        self.check, self.spend = check, spend
        self.algorithm, self.round, self.uplink, self.dim = algorithm, round, uplink, len(x)
        self.codec = algorithm.codec(round)
        self.like = x[:0]
        self.before, self.columns = dict(states), columns
        self.states = {
            worker: type(state)(
                *(room(t) if here else t for t, here in zip(state, columns, strict=True))
            )
            for worker, state in states.items()
        }
        self.sound: dict[int, list[Tensor]] = {worker: [] for worker in states}

    @property
    def left(self) -> list[tuple[int, int]]:
        """The buckets that have not been sent, in order."""
        return list(self.uplink.buckets[self.uplink.sent :])

    def close(
        self, contributions: Sequence[Contribution]
    ) -> tuple[Received, Message, dict[int, Any]]:
        """Sends what is left.

        Args:
            contributions: one for each local worker, in order.

        Returns:
            what this rank aggregates; a local worker's message, for its size; and the next state of
            the local workers that have spoken.
        """
        round = self.round
        assert round.cohort is not None
        speaks = [
            bool(round.cohort[worker]) and comes(round, worker) and contribution.grads is not None
            for worker, contribution in zip(self.before, contributions, strict=True)
        ]
        rows = [
            contribution.grads.current if here and contribution.grads is not None else None
            for here, contribution in zip(speaks, contributions, strict=True)
        ]
        for first, last in self.left:
            self.send([None if row is None else row[first:last] for row in rows])
        for worker, here in zip(self.before, speaks, strict=True):
            if not (here and bool(torch.stack(self.sound[worker]).all())):
                self.states.pop(worker, None)
        flags = [
            flags_of(
                SPEAKS if w in self.states else IDLE if contribution.grads is None else SILENT,
                contribution.used,
            )
            for w, contribution in zip(self.before, contributions, strict=True)
        ]
        layout = self.codec.layout(self.dim, self.like.dtype)
        empty = (torch.empty(f.shape, dtype=f.dtype, device="meta") for f in layout)
        return self.uplink.close(flags), Message(flags[0], tuple(empty)), self.states

    @torch.no_grad()
    def send(self, grads: Sequence[Tensor | None]) -> None:
        """The next bucket of every local worker's gradient; None for those that have none. They are
        to be left alone until the round ends, and may be written into if they are spent.
        """
        first, last = self.uplink.buckets[self.uplink.sent]
        payloads = []
        for worker, g in zip(self.before, grads, strict=True):
            if g is None:  # absent workers send zeros of the same size
                self.sound[worker].append(
                    torch.zeros((), dtype=torch.bool, device=self.like.device)
                )
                layout = self.codec.layout(last - first, self.like.dtype)
                payloads.append(
                    tuple(self.like.new_zeros(field.shape, dtype=field.dtype) for field in layout)
                )
                continue
            cuts = [*range(first, last, _BLOCK), last]
            blocks = [
                self._block(worker, g[a - first : b - first], a, b)
                for a, b in itertools.pairwise(cuts)
            ]
            payloads.append(tuple(map(one_after_the_other, zip(*blocks, strict=True))))
        self.uplink.send(payloads)

    def _block(self, worker: int, g: Tensor, first: int, last: int) -> Payload:
        """What a worker sends of columns first .. last - 1."""
        whole = self.columns
        before, next_ = (
            piece_of(state[worker], first, last, self.dim, whole)
            for state in (self.before, self.states)
        )
        places = {
            id(old): place for old, place, here in zip(before, next_, whole, strict=True) if here
        }
        round = self.round._replace(
            worker=worker,
            room=lambda old: places[id(old)] if id(old) in places else torch.empty_like(old),
            sent=(lambda gradient: gradient) if self.spend else torch.empty_like,
        )
        payload, after = self.algorithm.worker(Gradients(g), before, round)
        if self.check:
            owner = f"{type(self.algorithm).__name__}.worker"
            check_state(after, owner, before)
            check_kept(after, g, owner)
        self.codec.check(payload, last - first, self.like.dtype)
        self.sound[worker].append(self.codec.valid(payload, last - first))
        if not self.codec.tells_nonfinite:
            self.sound[worker].append(all_finite(g))
        for place, new, here in zip(next_, after, whole, strict=True):
            if here and new is not place:
                place.copy_(new)
        self.states[worker] = type(after)(
            *(
                tensor if here else new
                for tensor, new, here in zip(self.states[worker], after, whole, strict=True)
            )
        )
        return payload
