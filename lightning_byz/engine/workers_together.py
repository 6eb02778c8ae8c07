"""The local workers' halves of a coordinate-wise algorithm as one: their vectors lie one after the
other in memory, and the algorithm sees one long vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_byz.algorithms import Algorithm
from lightning_byz.compressors import Compressor, Field
from lightning_byz.engine.state_layout import piece_of
from lightning_byz.numerics.finite import all_finite
from lightning_byz.numerics.memory import TensorPool, end_to_end, side_by_side
from lightning_byz.types import Gradients, Payload, Round


class WorkersTogether:
    """Several workers' halves in one call.

    What each worker sends and remembers is, coordinate by coordinate, what its own call would give,
    because the algorithm is coordinate-wise.

    Args:
        columns: of every tensor of a worker's state, whether its last dimension is that of the
            coordinates.
        pool: memory for the next state.
    """

    def __init__(self, columns: Sequence[bool], pool: TensorPool) -> None:
        self._columns, self._pool = columns, pool
        # the workers' states as they are seen from outside, and the one that they are pieces of
        self._pieces: Mapping[int, Any] = {}
        self._state: Any = None
        # the same after the coming round
        self._next: tuple[Mapping[int, Any], Any] = ({}, None)

    def spoken(
        self,
        algorithm: Algorithm,
        grads: Sequence[Tensor | None],
        states: Mapping[int, Any],
        codec: Compressor,
        round: Round,
    ) -> tuple[list[Payload], dict[int, Any]] | None:
        """By worker, its payload and its next state; None where workers have to be asked one by
        one: gradients are elsewhere or not finite, or workers remember different numbers of rounds.

        Args:
            algorithm: a coordinate-wise one.
            grads: by worker, its gradient ``[d]``.
            states: by worker, its state.
            codec: the messages' format.
            round: the round, in which all these workers take part.
        """
        rows = side_by_side(grads)
        flat = None if rows is None else end_to_end(rows)
        if rows is None or flat is None:
            return None
        (n, dim), width = rows.shape, rows.stride(0)
        if codec.layout(len(flat), flat.dtype) != (Field((len(flat),), flat.dtype),):
            return None  # payloads of another kind: not simply cut
        state = self._joined(states, width, dim)
        if state is None or not (codec.tells_nonfinite or bool(all_finite(flat))):
            return None
        seen = round._replace(worker=next(iter(states)), room=self._pool)
        payload, after = algorithm.worker(Gradients(flat), state, seen)
        if not bool(all_finite(payload[0])):  # a momentum may overflow
            return None
        pieces = {
            worker: piece_of(after, i * width, i * width + dim, 0, self._columns)
            for i, worker in enumerate(states)
        }
        self._next = (pieces, after)
        return [(row,) for row in payload[0].view(n, width)[:, :dim].unbind(0)], pieces

    def _joined(self, states: Mapping[int, Any], width: int, dim: int) -> Any:
        """The state that these are pieces of: a new one, unless they are what `finished` was given;
        None if they differ in what is not by coordinates.
        """
        if states and all(states[w] is self._pieces.get(w) for w in states):
            return self._state
        each = list(states.values())
        joined = []
        for tensors, here in zip(zip(*each, strict=True), self._columns, strict=True):
            if not here:
                if not all(torch.equal(tensor, tensors[0]) for tensor in tensors):
                    return None
                joined.append(tensors[0])
                continue
            whole = tensors[0].new_zeros(*tensors[0].shape[:-1], len(each) * width)
            for i, tensor in enumerate(tensors):
                whole[..., i * width : i * width + dim] = tensor
            joined.append(whole)
        return type(each[0])(*joined)

    def finished(self, states: Mapping[int, Any], present: Tensor) -> bool:
        """Whether these are the states that `spoken` gave, of which all count.

        Args:
            states: by worker, its next state.
            present: ``[n]`` bool, whose messages counted.
        """
        (pieces, after), self._next = self._next, ({}, None)
        if states is not pieces or not bool(present[list(states)].all()):
            return False
        if self._state is not None:
            self._pool.take_back(self._state, after)
        self._pieces, self._state = pieces, after
        return True
