"""Local steps: what a user says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

OuterOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
"""Makes the optimizer that steps on the aggregate, given the parameters."""

DILOCO: OuterOptimizer = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
"""The outer optimizer of DiLoCo (Douillard et al., arXiv 2311.08105, section 3)."""


@dataclass(frozen=True)
class LocalSteps:
    """Every worker takes several steps of the user's optimizer on its own. Then the workers
    exchange how far they have come.

    A phase begins with the same parameters x everywhere. Each worker takes ``steps`` steps on a
    copy of its own, which ends at x_i. What it contributes is x - x_i, and any algorithm
    compresses, gathers and aggregates that as it does gradients. The outer optimizer takes the
    aggregate for a gradient, and its step from x makes the next x. With SGD of learning rate 1 this
    is FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629, Algorithm 1), with Nesterov momentum
    DiLoCo (Douillard et al., arXiv 2311.08105, Algorithm 1); both with a mean.

    Args:
        steps: H, steps of a phase, at least 1.
        fresh_optimizer: every phase begins with the optimizer's first state, as FedAvg's workers
            do. False: each worker keeps the state of its own, as DiLoCo's do.
        participants: how many workers are drawn for each phase, the same on every rank; f counts
            the Byzantine ones among them. The others do nothing in that phase. None: all take part.
        checkpoints: what a checkpoint in the middle of a phase holds on several ranks. "start": one
            file, from which a run goes on at the phase's start, every worker with rank 0's
            optimizer state. "ranks": in addition each rank writes what it has come to into a file
            of its own, ``<checkpoint>.rank<r>``, and a run goes on bit for bit. In one process a
            checkpoint always holds all of it.
    """

    steps: int
    fresh_optimizer: bool = False
    participants: int | None = None
    checkpoints: Literal["start", "ranks"] = "start"

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("participants", self.participants)):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and value >= 1):
                raise ValueError(
                    f"`{name}` of LocalSteps should be an integer of at least 1. Found "
                    f"{name}={value!r}."
                )
        if self.checkpoints not in ("start", "ranks"):
            raise ValueError(
                "`checkpoints` of LocalSteps should be 'start' or 'ranks'. Found "
                f"{self.checkpoints!r}."
            )

    @staticmethod
    def of(
        local_steps: int | LocalSteps | None, outer_optimizer: OuterOptimizer | None
    ) -> LocalSteps | None:
        """What the strategy's arguments say.

        Raises:
            ValueError: for an outer optimizer without local steps, or what is no number of steps.
        """
        if local_steps is None:
            if outer_optimizer is not None:
                raise ValueError(
                    "`outer_optimizer` steps on what local steps have come to. Found no "
                    "`local_steps`. Give their number, or leave outer_optimizer out."
                )
            return None
        if outer_optimizer is not None and not callable(outer_optimizer):
            raise ValueError(
                "`outer_optimizer` should make an optimizer of parameters: "
                "functools.partial(torch.optim.SGD, lr=0.7), say. Found "
                f"{outer_optimizer!r}."
            )
        return local_steps if isinstance(local_steps, LocalSteps) else LocalSteps(local_steps)
