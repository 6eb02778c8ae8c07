"""The attack interfaces: attacks on messages, attacks on a worker's data, and what an attacker
sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_byz.types import keyed_generator

_BLOCK = 65_536
"""Columns that fit into a cache."""


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Scene:
    """What an omniscient attacker sees of a round besides the messages. All of it is the same on
    every rank.

    Every field has a default, so that an attack can be tried by hand: ``ALIE(1.5)(honest, own)``,
    or ``OptimizedIPM()(honest, own, Scene(aggregate=lambda lies: rule(torch.cat([honest,
    lies]))))``.

    Attributes:
        generator: the attackers' common random stream of this round.
        step: number of this round, counted from 0.
        aggregate: what the server would make of these lies: ``[b, d] -> [d]``, through codec, rule
            and server state; zeros if it would skip the step.
        target: what it would make of the honest messages alone, had it known them and taken their
            mean: ``() -> [d]``. None: the mean of the honest messages.
        x: the current parameters: ``() -> [d]``.
        memory: what the attack remembers between rounds, for it to change; tensors are replaced,
            not modified. It goes into checkpoints.
        honest: the workers whose messages the honest rows are, in order. None: numbered as the rows
            are.
        own: the Byzantine workers whose messages the own rows are, in order. None: numbered as the
            rows are.
        byzantine: all workers that this attack commands, those included that take no part in this
            round. None: ``own``.
        agree: gives every rank rank 0's copy of a small tensor that decisions depend on.
    """

    generator: torch.Generator = field(default_factory=lambda: keyed_generator("attack", 0))
    step: int = 0
    aggregate: Callable[[Tensor], Tensor] | None = None
    target: Callable[[], Tensor] | None = None
    x: Callable[[], Tensor] | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    honest: Sequence[int] | None = None
    own: Sequence[int] | None = None
    byzantine: Sequence[int] | None = None
    agree: Callable[[Tensor], Tensor] = _itself

    def server(self, attack: Attack) -> Callable[[Tensor], Tensor]:
        """`aggregate`, for an attack that cannot do without."""
        if self.aggregate is None:
            raise ValueError(
                f"{type(attack).__name__} tries its lies on the server's rule, and the scene "
                "should hold it. Found Scene(aggregate=None). Use it with ByzantineWorkers, or "
                "by hand: Scene(aggregate=lambda lies: rule(torch.cat([honest, lies])))."
            )
        return self.aggregate

    def parameters(self, attack: Attack) -> Tensor:
        """The current parameters ``[d]``, for an attack that cannot do without."""
        if self.x is None:
            raise ValueError(
                f"{type(attack).__name__} looks at the current parameters, and the scene should "
                "hold them. Found Scene(x=None). Use it with ByzantineWorkers, or by hand: "
                "Scene(x=lambda: parameters)."
            )
        return self.x()


class Attack(ABC):
    """What colluding Byzantine workers send, chosen after all honest messages of the round are
    fixed.

    An attack sees the honest messages as the server decodes them, and answers in the same space
    (gradients, momenta or compressed differences, whatever the algorithm sends); what it answers
    then goes through the same codec. It picks values, never the wire format.
    """

    @property
    def alone(self) -> bool:
        """Whether it has an answer where no honest worker takes part, ``h = 0``; otherwise the
        Byzantine workers behave in such a round.
        """
        return False

    @abstractmethod
    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        """The Byzantine messages.

        Args:
            honest: ``[h, d]`` the messages of the honest workers that take part in this round; not
                to be modified. h >= 1, unless `alone`.
            own: ``[b, d]`` what the Byzantine workers that take part would have sent had they been
                honest; not to be modified. 0 for one that would have been silent.
            scene: what else the attackers see. None: nothing.

        Returns:
            ``[b, d]`` what they send instead.
        """

    def forges(self, b: int) -> list[bool]:
        """Of b Byzantine workers, which ones send something also where they have no message of
        their own (no batch, a nan).
        """
        return [True] * b

    def check(self, byzantine: Sequence[int], n: int) -> None:
        """Raises unless these of n workers can carry this attack out."""
        return


def checked_lies(attack: Attack, lies: Tensor, own: Tensor) -> Tensor:
    """What an attack answered.

    Raises:
        ValueError: unless it is a message ``[b, d]`` for each of the ``own [b, d]``.
    """
    if not isinstance(lies, Tensor) or lies.shape != own.shape or not lies.is_floating_point():
        found = (
            f"a tensor {list(lies.shape)} of {lies.dtype}"
            if isinstance(lies, Tensor)
            else repr(lies)
        )
        raise ValueError(
            f"{type(attack).__name__} should answer with a message for each Byzantine worker, [b, "
            f"d] = {list(own.shape)} of floating-point numbers. Found {found}. The same message "
            "for all: message.expand_as(own)."
        )
    return lies


class DataAttack(ABC):
    """What a Byzantine worker does to its own batch, before an otherwise honest step."""

    @abstractmethod
    def __call__(self, batch: Any, generator: torch.Generator | None = None) -> Any:
        """The batch that the worker trains on instead; the given one is not modified.

        Args:
            batch: the worker's batch.
            generator: this worker's random stream of this step, on the CPU.
        """


def spread(rows: Tensor) -> Tensor:
    """The standard deviation ``[d]`` of every coordinate of ``rows [h, d]``, with h - 1 in the
    denominator; 0 for one row.

    What ``rows.std(0)`` gives, by two passes over blocks of columns instead of torch's one, in a
    sixth of the time.
    """
    out = torch.zeros_like(rows[0])
    for first in range(0, len(out) if len(rows) > 1 else 0, _BLOCK):
        block = rows[:, first : first + _BLOCK]
        squares = (block - block.mean(0)).square_().sum(0)
        out[first : first + _BLOCK] = squares.div_(len(rows) - 1).sqrt_()
    return out


def everyone(message: Tensor, own: Tensor) -> Tensor:
    """The same message ``[d]`` from every Byzantine worker: ``[b, d]``."""
    return message.expand_as(own).clone()
