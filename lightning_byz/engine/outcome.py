"""What goes into a round, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_byz.aggregators import Aggregator
from lightning_byz.numerics.rows import Rows
from lightning_byz.types import Gradients, Round

SILENT, SPEAKS, IDLE = 0, 1, 2
"""What a worker says of itself in its first flag: its gradient is not finite; it has a message; it
has no batch, or no loss.
"""

NO_LOSS = "No worker had a loss: training_step returned None, or there was no batch."
"""The reason of a round without an estimate that says nothing of the training."""


class Contribution(NamedTuple):
    """What a local worker has to say this round.

    Attributes:
        grads: its gradients, or None if it has none (no batch, no loss).
        used: ``[P]`` bool, the parameters that its loss depends on.
    """

    grads: Gradients | None
    used: Tensor


class Outcome(NamedTuple):
    """The result of a round.

    Attributes:
        round: the round, with ``present`` set.
        estimate: the gradient estimate ``[d]``, in memory that the next round may use again; None
            if too few rows were present: the step is to be skipped.
        used: ``[P]`` bool, the parameters that more than f present workers have a gradient of.
        decode: makes the messages' rows, until the next round.
        look: makes the rows that the estimate stands for, until the next round.
        rule: the rule that aggregated the cohort's rows.
        bytes_up: bytes of payload that one worker of the cohort sent.
        bytes_down: bytes of payload that one worker received.
        seconds: how long the server waited for messages, by the algorithm's simulated clock.
        reason: why there is no estimate; empty otherwise.
        quarantined: the workers whose messages were left out, whatever they held.
        idle: the workers of the cohort that said that they had nothing: no batch, or no loss.
    """

    round: Round
    estimate: Tensor | None
    used: Tensor
    decode: Callable[[], Rows]
    look: Callable[[], Rows]
    rule: Aggregator
    bytes_up: int
    bytes_down: int
    seconds: float = 0.0
    reason: str = ""
    quarantined: frozenset[int] = frozenset()
    idle: frozenset[int] = frozenset()

    @property
    def rows(self) -> Rows:
        """The decoded messages ``[n, d]``, or the columns of them that this rank aggregates; absent
        rows are 0.
        """
        return self.decode()

    @property
    def seen(self) -> Rows:
        """The rows that the estimate stands for, as ``rows``; those of workers that are not present
        mean nothing. On all ranks or on none.
        """
        return self.look()

    @property
    def silent(self) -> list[int]:
        """The workers that were to take part and whose message did not count, those in quarantine
        left aside.
        """
        assert self.round.present is not None and self.round.cohort is not None
        absent = (self.round.cohort & ~self.round.present).nonzero().flatten().tolist()
        return [worker for worker in absent if worker not in self.quarantined]


def comes(round: Round, worker: int) -> bool:
    """Whether this worker's message ever arrives, as far as the round knows."""
    return round.arrivals is None or bool(round.arrivals[worker].isfinite())


def flags_of(says: int, used: Tensor) -> Tensor:
    """A message's flags: what the worker says, then ``used``."""
    return torch.cat(
        [torch.tensor([says], dtype=torch.uint8, device=used.device), used.to(torch.uint8)]
    )


def flags_of_all(says: int, used: Sequence[Tensor]) -> list[Tensor]:
    """The flags of several workers that say the same, given what each one has used."""
    flags: list[Tensor] = []
    for i, own in enumerate(used):
        flags.append(flags[-1] if i and own is used[i - 1] else flags_of(says, own))
    return flags
