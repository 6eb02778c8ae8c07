"""Attacks that try their lies on the server's rule, and send those that do the most harm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_byz.attacks.base import Attack, Scene, everyone, spread


@dataclass(frozen=True)
class LineSearch:
    """Looks for the factor x >= 0 that maximises a function, within a budget of evaluations.

    While the function grows, steps that double; from the first that does not help, steps that
    shrink by ``ratio``, around or past the best factor so far. It finds a local maximum at best.

    Args:
        evaluations: how often the function may be evaluated.
        start: the first factor.
        delta: the first step.
        ratio: what shrinking steps are multiplied by, in (0.5, 1).
        contraction: where shrinking steps go: "both", back from the last proposal while it is past
            the best factor and forth while it is below, as in LPD-EPFL's ``line_maximize``;
            "forward", past the best factor only, as in ByzFL's optimized attacks.
    """

    evaluations: int = 16
    start: float = 0.0
    delta: float = 1.0
    ratio: float = 0.8
    contraction: Literal["both", "forward"] = "both"

    def __post_init__(self) -> None:
        if self.evaluations < 1 or self.start < 0 or self.delta <= 0 or not 0.5 < self.ratio < 1:
            raise ValueError(
                "A line search needs evaluations >= 1, start >= 0, delta > 0 and ratio in (0.5, "
                f"1). Found {self!r}."
            )
        if self.contraction not in ("both", "forward"):
            raise ValueError(
                f"`contraction` should be 'both' or 'forward'. Found {self.contraction!r}."
            )

    def __call__(self, objective: Callable[[float], float]) -> float:
        """The best factor found. A value that is nan counts as no improvement."""
        best, step, left = self.start, self.delta, self.evaluations - 1
        most = objective(best)
        proposal = best
        while left > 0:
            proposal, left = best + step, left - 1
            value = objective(proposal)
            if not value > most:
                step *= self.ratio
                break
            best, most, step = proposal, value, 2 * step
        while left > 0:
            proposal, left = self._next(proposal, best, step), left - 1
            value = objective(proposal)
            if value > most:
                best, most = proposal, value
            step *= self.ratio
        return best

    def _next(self, proposal: float, best: float, step: float) -> float:
        if self.contraction == "forward":
            return best + step
        if proposal < best:
            return proposal + step
        back = proposal - step
        while back < 0:
            back = (back + proposal) / 2
        return back


@dataclass(frozen=True)
class _Optimized(Attack):
    """The lies of a one-parameter family that move the server's result farthest from that of the
    honest messages' mean.

    ``argmax_x || aggregate(message(x), ..., message(x)) - mean(honest) ||``, by a line search that
    tries each factor on the server's codec, rule and state, with the round's own random streams
    every time.
    """

    search: LineSearch = field(default_factory=LineSearch)

    @abstractmethod
    def message(self, honest: Tensor) -> Callable[[float], Tensor]:
        """The lie ``[d]`` for every factor."""

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        scene = scene or Scene()
        aggregate, message = scene.server(self), self.message(honest)
        if len(own) == 0:
            return torch.empty_like(own)
        target = honest.mean(0) if scene.target is None else scene.target()

        def harm(factor: float) -> float:
            distance = torch.linalg.vector_norm(
                aggregate(everyone(message(factor), own)) - target, dtype=torch.float64
            )
            return float(scene.agree(distance))

        return everyone(message(self.search(harm)), own)


def _byzfl_search() -> LineSearch:
    return LineSearch(evaluations=20, delta=10.0, contraction="forward")


@dataclass(frozen=True)
class FoE(_Optimized):
    """Fall of empires: ``(1 - a) * mean(honest)``, with the a that moves the server's result the
    farthest.

    After Xie, Koyejo, Gupta, UAI 2019 (arXiv 1903.03936), as LPD-EPFL's ``empire`` has it, with its
    line search of 16 evaluations. For a given a it is `IPM` with epsilon = a - 1, and ByzFL's
    FallOfEmpires.

    Args:
        search: how a is searched for.
    """

    def message(self, honest: Tensor) -> Callable[[float], Tensor]:
        mean = honest.mean(0)
        return lambda a: (1 - a) * mean


@dataclass(frozen=True)
class OptimizedIPM(_Optimized):
    """`IPM`, ``-tau * mean(honest)``, with the tau that moves the server's result the farthest:
    ByzFL's Optimal_InnerProductManipulation.

    No paper: ByzFL's.

    Args:
        search: how tau is searched for. The default has ByzFL's settings.
    """

    search: LineSearch = field(default_factory=_byzfl_search)

    def message(self, honest: Tensor) -> Callable[[float], Tensor]:
        mean = honest.mean(0)
        return lambda tau: -tau * mean


@dataclass(frozen=True)
class OptimizedALIE(_Optimized):
    """`ALIE`, ``mean(honest) - tau * std(honest)``, with the tau that moves the server's result the
    farthest.

    ByzFL's Optimal_ALittleIsEnough, and LPD-EPFL's ``little`` with a search; both add the
    deviations where this, as `ALIE`, subtracts them. No paper: ByzFL's.

    Args:
        search: how tau is searched for. The default has ByzFL's settings.
        negative: subtract the deviations. False adds them.
    """

    search: LineSearch = field(default_factory=_byzfl_search)
    negative: bool = True

    def message(self, honest: Tensor) -> Callable[[float], Tensor]:
        mean, deviation = honest.mean(0), spread(honest)
        sign = -1 if self.negative else 1
        return lambda tau: mean + sign * tau * deviation
