"""Rules that look at one coordinate at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_byz.aggregators.base import ColumnwiseAggregator, WeightedAggregator
from lightning_byz.numerics.order_statistics import ColumnStatistic, mean_of, median_of_rows
from lightning_byz.numerics.rows import Rows


@dataclass(frozen=True)
class Mean(WeightedAggregator):
    """The average of all rows. Not robust: one row can move it anywhere, so its f is always 0. No
    paper: what DDP computes.
    """

    f: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.f is None:  # a configuration that replaces another rule keeps that rule's f
            object.__setattr__(self, "f", 0)

    def most_f(self, n: int) -> int:
        return 0 if n else -1

    def with_f(self, f: int) -> Mean:
        return self

    def kappa(self, n: int) -> float | None:
        return 0.0

    @property
    def bears_unlike_data(self) -> bool:
        return True

    @property
    def coordinate_wise(self) -> bool:
        return True

    @property
    def weighted(self) -> bool:
        return True

    def weights(self, rows: Rows) -> Tensor:
        if rows.shares is not None:
            return rows.shares / rows.shares.sum()
        return torch.full(
            (len(rows),), 1 / len(rows), dtype=torch.float64, device=rows.values.device
        )

    def aggregate(self, rows: Rows) -> Tensor:
        if rows.shares is not None or rows.mixing is not None:
            return super().aggregate(rows)
        return rows.map(mean_of, averages=True)


@dataclass(frozen=True)
class CoordinateMedian(ColumnwiseAggregator):
    """The median of every coordinate; for even n the mean of the two middle values
    (``torch.median`` takes the lower one).

    Yin et al., ICML 2018 (arXiv 1803.01498). Needs n > 2f, and does not use f otherwise. Where rows
    stand for unequal shares of the data: the weighted median, the middle of all values that have at
    most half of the weight below them and at most half above.

    Args:
        middle: what an even number gives: "mean" of the two middle values, or the "lower" one of
            them, as in code built on ``torch.median`` (docs/definitions.md). With "lower", -x does
            not give minus the result of x.
    """

    middle: Literal["mean", "lower"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.middle not in ("mean", "lower"):
            raise ValueError(f"`middle` should be 'mean' or 'lower'. Found {self.middle!r}.")

    @property
    def weighted(self) -> bool:
        return True

    def kappa(self, n: int) -> float | None:
        assert self.f is not None
        return 4 * (1 + self.f / (n - 2 * self.f)) ** 2 if self.middle == "mean" else None

    def statistic(self, rows: Rows) -> Callable[[Tensor], Tensor]:
        if rows.shares is not None:
            return self._weighted_median(rows.shares)
        low = (len(rows) - 1) // 2
        return ColumnStatistic("mean", low, low + 1) if self.middle == "lower" else median_of_rows

    def _weighted_median(self, shares: Tensor) -> Callable[[Tensor], Tensor]:
        shares = shares / shares.sum()

        def rule(block: Tensor) -> Tensor:
            ordered, order = block.sort(dim=0)
            # [n, c] weight of all values up to this one
            below = shares.to(block.device)[order].cumsum(0)
            low = (below < 0.5 - 1e-12).sum(0, keepdim=True)
            high = (below < 0.5 + 1e-12).sum(0, keepdim=True)
            lower = ordered.gather(0, low)[0]
            return lower if self.middle == "lower" else lower / 2 + ordered.gather(0, high)[0] / 2

        return rule


@dataclass(frozen=True)
class TrimmedMean(ColumnwiseAggregator):
    """The mean of what is left of every coordinate after its f smallest and f largest values are
    dropped.

    Yin et al., ICML 2018 (arXiv 1803.01498), CWTM. Needs n > 2f. The values that are left are added
    up in sorted order; nothing is subtracted from a sum, so that a row of 1e30 costs the others no
    digit.
    """

    averages = True

    def kappa(self, n: int) -> float | None:
        assert self.f is not None
        ratio = self.f / (n - 2 * self.f)
        return 6 * ratio * (1 + ratio)

    def statistic(self, rows: Rows) -> ColumnStatistic:
        assert self.f is not None
        return ColumnStatistic("mean", self.f, len(rows) - self.f)


@dataclass(frozen=True)
class MeaMed(ColumnwiseAggregator):
    """The mean, in every coordinate, of the n - f values nearest to the median.

    Xie, Koyejo, Gupta 2018 (arXiv 1802.10116), mean around median. Needs n > 2f. Of two values at
    the same distance the smaller one counts as nearer.
    """

    averages = True

    def statistic(self, rows: Rows) -> ColumnStatistic:
        assert self.f is not None
        return ColumnStatistic("middle", keep=len(rows) - self.f)


@dataclass(frozen=True)
class Phocas(ColumnwiseAggregator):
    """The mean, in every coordinate, of the n - f values nearest to the trimmed mean.

    Xie, Koyejo, Gupta 2018 (arXiv 1805.09682). Needs n > 2f. Of two values at the same distance the
    smaller one counts as nearer.
    """

    averages = True

    def statistic(self, rows: Rows) -> ColumnStatistic:
        assert self.f is not None
        n = len(rows)
        return ColumnStatistic("mean", self.f, n - self.f, keep=n - self.f)
