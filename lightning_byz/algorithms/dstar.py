"""dSTAR: the first k gradients, filtered by their deviation from an ensemble median."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_byz.aggregators import Aggregator, CoordinateMedian, GeometricMedian, TooFewRowsError
from lightning_byz.aggregators.base import WeightedAggregator, equal_weights
from lightning_byz.algorithms.base import Algorithm, NoState, among
from lightning_byz.compressors import Compressor, Identity
from lightning_byz.numerics.rows import Rows
from lightning_byz.types import Gradients, Payload, Round, keyed_generator


@dataclass(frozen=True)
class ShiftedExponential:
    """How long workers take in a simulation: ``base + Exp(mean)`` seconds, times ``slowdown`` for
    the slow ones.

    Drawn anew for every worker and every round from a stream keyed by the run's seed, so every rank
    knows every delay.

    Args:
        base: the least that a round takes, in seconds.
        mean: mean of the exponential part, in seconds.
        slow: workers that are always slow.
        slowdown: how many times as long they take.
    """

    base: float = 1.0
    mean: float = 1.0
    slow: Sequence[int] = ()
    slowdown: float = 5.0

    def __post_init__(self) -> None:
        if self.base < 0 or self.mean < 0 or self.slowdown <= 0:
            raise ValueError(
                "Delays should not be negative: base >= 0, mean >= 0 and slowdown > 0. Found "
                f"base={self.base}, mean={self.mean}, slowdown={self.slowdown}."
            )

    def __call__(self, round: Round) -> Tensor:
        """``[n]`` float64: the seconds after which each worker's message arrives; 0 for
        `Round.rushing` ones.
        """
        generator = keyed_generator("delay", round.seed, round.step)
        seconds = (
            self.base
            - self.mean
            * torch.rand(round.n, generator=generator, dtype=torch.float64).neg().log1p()
        )
        late = torch.tensor([worker for worker in self.slow if worker < round.n], dtype=torch.int64)
        seconds[late] *= self.slowdown
        return seconds if round.rushing is None else seconds.masked_fill(round.rushing, 0.0)


@dataclass(frozen=True)
class DeviationFilter(WeightedAggregator):
    """The mean of the rows that deviate from a centre by no more than a tolerance: dSTAR's rule.

    The abstract of arXiv 2412.07151 speaks of "deviations calculated using an ensemble median", a
    summary of "deviations from an ensemble median against a local validation gradient", at a cost
    of O(n d). **The inequality below is a reconstruction** from these words; the paper's own was
    not available. With d_i the rows' Euclidean deviations, a row is kept if

    * reading "ensemble": ``d_i = ||g_i - median(g_1, ..., g_n)|| <= tolerance * max(d_v, median of
      d)``, where d_v is the trusted gradient's own deviation, or 0 without one;
    * reading "trusted": ``d_i = ||g_i - g_v|| <= tolerance * median of d``, with the trusted
      gradient g_v, which it cannot do without.

    Needs n > 2f: the medians are then between honest values. At least half of the rows are always
    kept. Without a trusted gradient and with tolerance 1 this is Aksel (Boussetta et al. 2021) with
    ceil(n / 2) rows.

    Args:
        tolerance: 1 keeps half of the rows, inf all of them. Honest gradients of a large model
            deviate all by about the same, so a little more than 1 keeps all of them.
        reading: of the two above.
        center: "median" of every coordinate, or "geometric_median"; of reading "ensemble".
        trusted: this round's trusted gradient ``[d]``; `DStar` fills it in.
    """

    tolerance: float = 1.5
    reading: Literal["ensemble", "trusted"] = "ensemble"
    center: Literal["median", "geometric_median"] = "median"
    trusted: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tolerance >= 1:
            raise ValueError(
                "`tolerance` should be at least 1: below, fewer than half of the rows are kept. "
                f"Found {self.tolerance}."
            )
        for name, known in (
            ("reading", ("ensemble", "trusted")),
            ("center", ("median", "geometric_median")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` should be one of {known}. Found {getattr(self, name)!r}."
                )

    def _center(self, rows: Rows) -> Tensor:
        if self.reading == "ensemble":
            rule = (
                CoordinateMedian(f=self.f) if self.center == "median" else GeometricMedian(f=self.f)
            )
            return rule.aggregate(rows)
        if self.trusted is None:
            raise TooFewRowsError(
                "DeviationFilter(reading='trusted') needs a finite trusted gradient. Found none "
                "in this round."
            )
        return self.trusted

    def weights(self, rows: Rows) -> Tensor:
        center = self._center(rows)
        deviations = rows.squared_distances_to(center).sqrt()
        # the lower median, which is an honest row's or below one
        limit = deviations.sort().values[(len(rows) - 1) // 2]
        if self.reading == "ensemble" and self.trusted is not None:
            squares = (
                (self.trusted.double() / rows.unit - center.double() / rows.unit).square().sum()
            )
            limit = torch.maximum(limit, rows.agree(rows.sum(squares)).sqrt())
        kept = (
            torch.ones_like(deviations)
            if math.isinf(self.tolerance)
            else deviations <= self.tolerance * limit
        )
        return equal_weights(kept.nonzero().flatten(), len(rows))


@dataclass(frozen=True)
class DStar(Algorithm):
    """The server takes the first k gradients that arrive, drops those that deviate too far, and
    averages the rest.

    Yan, Chaudhari, Kleinrock, AdvML-Frontiers at NeurIPS 2024 (arXiv 2412.07151). From the paper's
    abstract: the first k responses, and a filter by deviations from an ensemble median, with a
    validation gradient. A reconstruction: the filter itself (see `DeviationFilter`), and every
    default here.

    Late messages never enter: who is among the first k is decided by arrival times before any
    content is looked at. Times are simulated (``delays``, or in their place a `Stragglers`
    callback's), in-process and across ranks alike, and late workers do no work. A message that is
    not finite has arrived and counts as silence. Byzantine workers of a simulation arrive first,
    which is the worst case; k > 2f is needed for it.

    Args:
        aggregator: the filter. Another rule in its place is a baseline that is fed the same k
            messages.
        k: how many messages the server waits for, in 2f + 1 .. n. None: n - f, as f workers may
            never answer.
        delays: the simulated clock.
        compressor: the wire format.
    """

    aggregator: Aggregator = field(default_factory=DeviationFilter)
    k: int | None = None
    delays: ShiftedExponential = field(default_factory=ShiftedExponential)
    compressor: Compressor = field(default_factory=Identity)

    uses_trusted = True

    def __post_init__(self) -> None:
        self.check_parts()
        if self.k is not None and self.k < 1:
            raise ValueError(
                f"`k`, the number of messages to wait for, should be at least 1. Found k={self.k}."
            )

    @property
    def stateless(self) -> bool:
        return True

    @property
    def needs_trusted(self) -> bool:  # type: ignore[override]
        return isinstance(self.aggregator, DeviationFilter) and self.aggregator.reading == "trusted"

    def count(self, n: int) -> int:
        """How many messages it waits for, of n workers."""
        return n - (self.aggregator.f or 0) if self.k is None else self.k

    def most_f(self, n: int) -> int:
        if self.k is not None:
            return self.aggregator.most_f(self.k)
        return max((f for f in range(n) if f <= self.aggregator.most_f(n - f)), default=-1)

    def check(self, n: int) -> None:
        k, f = self.count(n), self.aggregator.f or 0
        if k > n:
            raise ValueError(
                f"DStar waits for the first k of n messages. Found k={k} and n={n}. Use k <= {n}."
            )
        if k <= 2 * f:
            raise TooFewRowsError(
                f"DStar needs k > 2f: all f={f} Byzantine workers may be among the first k, and "
                f"have to be outvoted there. Found k={k} of n={n}. Use k >= {2 * f + 1}, or f <= "
                f"{(k - 1) // 2}."
            )
        self.aggregator.check(k)

    def codec(self, round: Round) -> Compressor:
        return self.compressor

    def arrivals(self, round: Round) -> Tensor:
        """``[n]`` float64: the seconds after which each worker's message arrives: the round's own
        if it knows, else ``delays``.
        """
        return self.delays(round) if round.arrivals is None else round.arrivals

    def first(self, n: int) -> int:
        return self.count(n)

    def cohort(self, round: Round) -> Tensor:
        # who is first will be known when they have come
        if round.measured and round.arrivals is None:
            return torch.ones(round.n, dtype=torch.bool)
        first = self.arrivals(round).sort(stable=True).indices[: self.count(round.n)]
        return torch.zeros(round.n, dtype=torch.bool).index_fill_(0, first, True)

    def seconds(self, round: Round) -> float:
        return super().seconds(
            round if round.measured else round._replace(arrivals=self.arrivals(round))
        )

    def rule(self, round: Round) -> Aggregator:
        rule = self.aggregator
        return replace(rule, trusted=round.trusted) if isinstance(rule, DeviationFilter) else rule

    def init_worker(self, x: Tensor) -> NoState:
        return NoState()

    def worker(self, grads: Gradients, state: NoState, round: Round) -> tuple[Payload, NoState]:
        return self.compressor.encode(
            grads.current, round.private("compressor", grads.current.device)
        ), state

    def init_server(self, x: Tensor, n: int) -> NoState:
        return NoState()

    def server(self, rows: Rows, state: NoState, round: Round) -> tuple[Tensor, NoState]:
        return self.rule(round)(*among(rows, round, self.cohort(round))), state
