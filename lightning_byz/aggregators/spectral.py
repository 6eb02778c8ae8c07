"""Rules that look for the direction in which rows differ most, and distrust those that stand out
along it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_byz.aggregators.base import WeightedAggregator, equal_weights
from lightning_byz.aggregators.medoid import around_medoid, products_around_medoid
from lightning_byz.numerics.rows import Rows


def _top_direction(products: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    """The direction of largest weighted variance.

    Args:
        products: ``[n, n]`` inner products of the rows, after any common shift.
        weights: ``[n]``, >= 0.

    Returns:
        the variance along it, and ``[n]`` the square of every row's distance from the weighted mean
        along it.
    """
    share = weights / weights.sum()
    to_mean = products @ share
    centred = products - to_mean - to_mean[:, None] + share @ to_mean
    root = share.sqrt()
    values, vectors = torch.linalg.eigh(root[:, None] * centred * root)
    variance = max(float(values[-1]), 0.0)
    if variance == 0.0:
        return 0.0, torch.zeros_like(weights)
    along = centred @ (root * vectors[:, -1])
    return variance, along.square() / variance


def _with_less(weights: Tensor, tau: Tensor) -> Tensor:
    """Weights ``[n]`` less the part of them that each row's ``tau`` is of the largest one, which is
    positive.

    Rows that are as far as the farthest lose all, however their ``tau`` is rounded: equal lies are.
    """
    left = 1 - tau / tau.max()
    return weights * torch.where(left > _TIED, left, 0.0)


_TIED = 1e-9
"""Squared distances that differ by a smaller part may be those of equal rows."""


def _long_enough(rows: Rows, f: int, floor: float) -> Tensor:
    """``[n]`` float64 weights to start with: 1, and 0 for rows shorter than ``floor`` times the
    median norm; for the min(f, n - 2f - 1) shortest at most, so that f liars stay a minority of
    those with weight.
    """
    n, start = len(rows), torch.ones(len(rows), dtype=torch.float64)
    most = min(f, n - 2 * f - 1)
    if floor and most:
        norms = rows.squared_norms().sqrt().cpu()
        shortest = norms.sort(stable=True).indices[:most]
        start[shortest] = (norms[shortest] >= floor * norms.median()).double()
    return start


def _check_floor(floor: float) -> None:
    if not 0 <= floor < 1:
        raise ValueError(
            f"`norm_floor` is a part of the median norm, in [0, 1). Found norm_floor={floor}."
        )


@dataclass(frozen=True)
class CAF(WeightedAggregator):
    """Covariance-bound agnostic filter: takes weight from the rows that stand out most, until n -
    2f is left; keeps the best mean.

    Allouah, Guerraoui, Stephan, ICML 2025. Needs n > 2f. All rows start with weight 1. A row's
    weight shrinks by its squared distance from the weighted mean along the direction of largest
    variance, relative to the farthest row's, which loses all of its weight. The result is the
    weighted mean with the smallest largest variance on the way. Every step runs on the n x n matrix
    of inner products; the vectors are read twice. The direction is exact; ByzFL estimates it by one
    step of a power iteration from a random start.

    Where honest rows are mostly noise, equal lies near the origin (`IPM(0.1)`) add less variance
    than an honest row does, and the filter as published takes them for the best rows: with noise
    three times as long as the mean, and 6 liars of 20, half of the mean is left. ``norm_floor``,
    which is ours, closes this gap; a longer lie stands out along the mean again. The floor is
    SignGuard's lower norm threshold (arXiv 2109.05872), there 0.1.

    Args:
        norm_floor: rows shorter than this part of the median norm start without weight; the min(f,
            n - 2f - 1) shortest at most, so that f liars stay a minority of those with weight.
            Where it takes any, variances are compared without the bias of unequal weights, divided
            by ``1 - sum_i w_i^2``: the filter would else end on one or two of the few rows that are
            left, which vary little because there are so few. In [0, 1). 0, the paper's rule, has no
            floor.
    """

    compares_rows: ClassVar[bool] = True

    norm_floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_floor(self.norm_floor)

    def weights(self, rows: Rows) -> Tensor:
        assert self.f is not None
        n = len(rows)
        products = around_medoid(rows, self.f)
        start = _long_enough(rows, self.f, self.norm_floor)
        taken = float(start.sum()) < n
        least = float(start.sum()) - 2 * self.f
        c = start.to(products)
        best, chosen = math.inf, c
        while float(c.sum()) > least or math.isinf(best):
            variance, tau = _top_direction(products, c)
            if taken:  # the unbiased one of weighted rows: one row alone has none
                spare = 1 - float((c / c.sum()).square().sum())
                variance = variance / spare if spare > 1e-9 else math.inf
            if variance < best:
                best, chosen = variance, c
            tau = torch.where(c > 0, tau, 0.0)
            if not float(tau.max()) > 0:
                break  # all rows that have weight are equal
            c = _with_less(c, tau)
        return chosen / chosen.sum()


@dataclass(frozen=True)
class SpectralFilter(WeightedAggregator):
    """Clips rows to their median norm, then takes weight from those that stand out along a
    direction, while that direction holds more than its part of the variance. The default
    algorithm's rule for unlike data (`ByHeterogeneity`).

    Where nobody lies, workers' rows differ for two reasons: each has noise of its own, and workers
    with data of one kind agree. The first gives every direction the variance of one row at most,
    the second gives a few directions a part of all variance. So one direction may hold ``1 + share
    n`` times the variance of a typical row, summed over the n rows. As long as none holds more, no
    row loses weight, and the result is the mean of the clipped rows. Else rows lose weight as in
    `CAF`: in proportion to their squared distance from the weighted mean along the direction of
    largest variance, the farthest all of it; until no direction holds too much, or more than 2f
    rows' weight would be gone. The variance of a typical row is the median, over the rows, of half
    the median squared distance to the others, times 1.5; and at most the squared median norm.

    f equal lies that the filter lets pass move the result by about ``sqrt(f (1 + share n)) / n``
    times the median norm, along any direction. `CAF` has no such limit: it keeps the mean that
    varies least, whoever it leaves out. That costs little where all workers draw from one
    distribution, and much where they do not.

    Needs n > 2f. Lengths are measured from 0, so the result does not move with the rows. With f = 0
    it is the mean. No paper: the parts are those of `ARC` (arXiv 2405.14432), with the median norm
    for a radius, and of the filter of Diakonikolas et al., ICML 2017 (arXiv 1703.00893), with a
    limit that is read off the rows. docs/default-algorithm.md measures the whole.

    Args:
        share: the part of all variance that one direction may hold, besides one row's; between 0
            and 1. A smaller one leaves less room to liars, and takes more from honest workers whose
            data differ.
        norm_floor: rows shorter than this part of the median norm start without weight, the min(f,
            n - 2f - 1) shortest at most, as in `CAF`. Such short lies slow the training, and stand
            out nowhere. In [0, 1).
    """

    compares_rows: ClassVar[bool] = True

    clips: ClassVar[bool] = True

    share: float = 0.15
    norm_floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise ValueError(
                "`share` is a part of the rows' variance, between 0 and 1. Found "
                f"share={self.share}."
            )
        _check_floor(self.norm_floor)

    @property
    def bears_unlike_data(self) -> bool:
        return True

    def weights(self, rows: Rows) -> Tensor:
        assert self.f is not None
        n = len(rows)
        if self.f == 0:
            return equal_weights(torch.arange(n, device=rows.values.device), n)
        distances, squares = rows.squared_distances(), rows.squared_norms()
        radius = squares.median().sqrt()  # the lower one: at most half of the rows are clipped
        factors = torch.where(squares > radius.square(), radius / squares.sqrt(), 1.0)
        if float(factors.min()) > _MOST_SHRUNK:
            distances = _scaled_distances(distances, squares, factors)
        else:
            distances = rows.mix(torch.diag(factors)).squared_distances()
        products = products_around_medoid(distances, self.f)
        typical = min(1.5 * _usual_variance(distances), float(radius) ** 2)
        limit = (1 + self.share * n) * typical
        weights = _long_enough(rows, self.f, self.norm_floor).to(products)
        least = float(weights.sum()) - 2 * self.f
        while True:
            variance, tau = _top_direction(products, weights)
            tau = torch.where(weights > 0, tau, 0.0)
            if variance * float(weights.sum()) <= limit or not float(tau.max()) > 0:
                break
            fewer = _with_less(weights, tau)
            if float(fewer.sum()) < least:
                break
            weights = fewer
        return weights / weights.sum() * factors


_MOST_SHRUNK = 1e-2
"""Rows that are shortened more have lost digits of their distances, which are made anew."""


def _scaled_distances(distances: Tensor, squares: Tensor, factors: Tensor) -> Tensor:
    """``[n, n]`` ``||a_i x_i - a_j x_j||^2``, from ``||x_i - x_j||^2``, ``||x_i||^2`` and a_i."""
    scaled = factors * squares
    change = (factors - factors[:, None]) * (scaled - scaled[:, None])
    return (factors * factors[:, None] * distances + change).clamp_min(0)


def _usual_variance(distances: Tensor) -> float:
    """Half the median, over the rows, of the median squared distance to the other rows, from
    squared distances ``[n, n]``.
    """
    others = distances.clone().fill_diagonal_(-1.0).sort(dim=1).values[:, 1:]
    return float(others.median(dim=1).values.median()) / 2


@dataclass(frozen=True)
class DnC(WeightedAggregator):
    """Divide and conquer: drops the rows that stand out along the direction of largest variance in
    a random set of coordinates.

    Shejwalkar, Houmansadr, NDSS 2021, Algorithm 2. Each time, the floor(c f) rows farthest from the
    mean along that direction are bad; the result is the mean of the rows that never were. Where
    none is left, which the paper leaves open, those that were bad least often are averaged. Needs n
    > 2f. A few rows of very different sizes defeat it: the largest of them alone decides the
    direction.

    Coordinates are drawn from ``rows.generator``, which a run sets anew in every round, the same on
    every rank; rows without one (a plain matrix) always get the same.

    Args:
        coordinates: how many are drawn, the paper's b; all of them if there are fewer.
        iterations: how often.
        c: the share of f that is dropped each time, > 0.
    """

    coordinates: int = 10_000
    iterations: int = 1
    c: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("coordinates", "iterations", "c"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` should be positive. Found {getattr(self, name)}.")

    def most_f(self, n: int) -> int:
        return min((n - 1) // 2, math.ceil(n / self.c) - 1)  # floor(c f) < n

    def weights(self, rows: Rows) -> Tensor:
        assert self.f is not None
        n, drop = len(rows), math.floor(self.c * self.f)
        stream = rows.stream
        bad = torch.zeros(n, dtype=torch.int64, device=rows.values.device)
        for _ in range(self.iterations):
            products = around_medoid(self._sampled(rows, stream), self.f)
            scores = _top_direction(
                products, torch.ones(n, dtype=torch.float64, device=products.device)
            )[1]
            bad[scores.sort(stable=True).indices[n - drop :]] += 1
        return equal_weights((bad == bad.min()).nonzero().flatten(), n)

    def _sampled(self, rows: Rows, stream: torch.Generator) -> Rows:
        dim = rows.values.shape[1] if rows.dim is None else rows.dim
        if dim <= self.coordinates:
            return rows
        if dim <= 4 * self.coordinates:
            return rows.columns(
                torch.randperm(dim, generator=stream, device=stream.device)[: self.coordinates]
            )
        drawn = (
            torch.randint(dim, (self.coordinates,), generator=stream, device=stream.device)
            .sort()
            .values
        )
        first = torch.cat([drawn.new_ones(1, dtype=torch.bool), drawn[1:] > drawn[:-1]])
        return rows.columns(drawn[first])  # a few fewer than wanted, where draws coincide
