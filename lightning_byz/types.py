"""The small vocabulary that every layer shares: gradients, rounds, payloads and keyed random
streams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Payload: TypeAlias = tuple[Tensor, ...]
"""What one worker puts on the wire in one round: tensors whose shapes and dtypes the compressor's
layout fixes.
"""

State: TypeAlias = "NamedTuple"
"""All that an algorithm remembers between rounds: a NamedTuple of tensors. ``state._asdict()`` is
its checkpoint.
"""


def keyed_seed(use: str, *key: int) -> int:
    """A 63-bit seed that depends on a use and a key only, the same in every process and on every
    machine.
    """
    text = ":".join([use, *(str(int(part)) for part in key)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def keyed_generator(use: str, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random stream of its own for a use ("coin", "compressor", ...) and a key (seed, step,
    worker, ...).
    """
    return torch.Generator(device).manual_seed(keyed_seed(use, *key))


class Gradients(NamedTuple):
    """One worker's gradients of this round, flattened.

    Attributes:
        current: the gradient at the current parameters, ``[d]``.
        previous: the gradient of the same minibatch at the previous parameters, ``[d]``, for
            algorithms that declare ``needs_previous``.
    """

    current: Tensor
    previous: Tensor | None = None


class Round(NamedTuple):
    """All that both halves of an algorithm may know about a round besides the gradients.

    Attributes:
        step: number of this round, counted from 0.
        n: number of workers of the run.
        worker: index of the worker that this round is seen from (0 on the server).
        seed: seed of the run's random streams.
        drift: ``||x_k - x_{k-1}||``, a 0-d float64 tensor: how far the parameters have moved since
            the last round that gave an estimate, for algorithms that declare ``needs_drift``. None
            if no round has given one yet.
        drawn: ``[n]`` bool, the workers that the run has drawn for this round, or None for all.
        cohort: ``[n]`` bool, the workers that take part in this round, or None for all.
        rushing: ``[n]`` bool, the workers that answer at once, in a simulation: the worst case for
            whoever waits for the first k.
        arrivals: ``[n]`` float64, the seconds after which each worker's message arrives, inf for
            never; None where it is not known.
        measured: whether arrivals are measured, and so not known before the round has closed.
        present: ``[n]`` bool, the workers whose message counts this round, or None for all.
        trusted: ``[d]`` gradient on trusted data, for algorithms that declare ``uses_trusted``;
            None if there is none.
        room: a tensor of the half's state -> memory for the one that takes its place in the next
            state, all of which is to be written. It may come from a state that nobody needs any
            more, because fresh memory is slow.
        sent: the worker's gradient -> memory for what it sends in its place, number by number, all
            of which is to be written. It may be the gradient's own.
    """

    step: int
    n: int
    worker: int = 0
    seed: int = 0
    drift: Tensor | None = None
    drawn: Tensor | None = None
    cohort: Tensor | None = None
    rushing: Tensor | None = None
    arrivals: Tensor | None = None
    measured: bool = False
    present: Tensor | None = None
    trusted: Tensor | None = None
    room: Callable[[Tensor], Tensor] = torch.empty_like
    sent: Callable[[Tensor], Tensor] = torch.empty_like

    def shared(self, use: str, device: torch.device | str = "cpu") -> torch.Generator:
        """The stream that is the same on every worker and on the server: coins, cohorts, bucket
        permutations.
        """
        return keyed_generator(use, self.seed, self.step, device=device)

    def private(self, use: str, device: torch.device | str = "cpu") -> torch.Generator:
        """This worker's own stream: its compressor's randomness."""
        return keyed_generator(use, self.seed, self.step, 1 + self.worker, device=device)
