"""The local workers' messages of a round on their way up, piece by piece."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_byz.algorithms import Algorithm
from lightning_byz.engine.state_layout import check_kept, check_state, piece_of
from lightning_byz.numerics.finite import all_finite
from lightning_byz.numerics.memory import Room
from lightning_byz.transports import Uplink
from lightning_byz.types import Gradients, Payload, Round

_BLOCK = 2**18
"""Coordinates of which a worker's half is computed at a time: what one pass reads is in the cache for the next."""


class Upload:
    """The local workers' messages of one round on their way up, bucket by bucket, and the states that they leave behind.

    Args:
        algorithm: a coordinate-wise one.
        round: the round.
        uplink: the way up.
        states: by worker, its state.
        columns: of every tensor of a state, whether its last dimension is that of the coordinates.
        room: memory for its next state, which is written piece by piece.
        x: ``[d]``, for its size, dtype and device.
        check: look at the states that the algorithm makes.

    Attributes:
        sound: by worker, whether each piece that it sent is finite: 0-d bool tensors, so that an accelerator is not waited for.
        states: by worker, its next state.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        round: Round,
        uplink: Uplink,
        states: dict[int, Any],
        columns: Sequence[bool],
        room: Room,
        x: Tensor,
        check: bool = False,
    ) -> None:
        self.check = check
        self.algorithm, self.round, self.uplink, self.dim = algorithm, round, uplink, len(x)
        self.codec = algorithm.codec(round)
        self.like = x[:0]
        self.before, self.columns = dict(states), columns
        self.states = {
            worker: type(state)(*(room(t) if here else t for t, here in zip(state, columns, strict=True)))
            for worker, state in states.items()
        }
        self.sound: dict[int, list[Tensor]] = {worker: [] for worker in states}

    @property
    def left(self) -> list[tuple[int, int]]:
        """The buckets that have not been sent, in order."""
        return list(self.uplink.buckets[self.uplink.sent :])

    @torch.no_grad()
    def send(self, grads: Sequence[Tensor | None]) -> None:
        """The next bucket of every local worker's gradient; None for those that have none. They are to be left alone until the round ends."""
        first, last = self.uplink.buckets[self.uplink.sent]
        payloads = []
        for worker, g in zip(self.before, grads, strict=True):
            if g is None:  # silence has the size of speech
                self.sound[worker].append(torch.zeros((), dtype=torch.bool, device=self.like.device))
                layout = self.codec.layout(last - first, self.like.dtype)
                payloads.append(tuple(self.like.new_zeros(field.shape, dtype=field.dtype) for field in layout))
                continue
            cuts = [*range(first, last, _BLOCK), last]
            blocks = [self._block(worker, g[a - first : b - first], a, b) for a, b in itertools.pairwise(cuts)]
            payloads.append(blocks[0] if len(blocks) == 1 else tuple(map(torch.cat, zip(*blocks, strict=True))))
        self.uplink.send(payloads)

    def _block(self, worker: int, g: Tensor, first: int, last: int) -> Payload:
        """What a worker sends of columns first .. last - 1."""
        whole = self.columns
        before, next_ = (piece_of(state[worker], first, last, self.dim, whole) for state in (self.before, self.states))
        places = {id(old): place for old, place, here in zip(before, next_, whole, strict=True) if here}
        round = self.round._replace(worker=worker, room=lambda old: places[id(old)] if id(old) in places else torch.empty_like(old))
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
            *(tensor if here else new for tensor, new, here in zip(self.states[worker], after, whole, strict=True))
        )
        return payload
