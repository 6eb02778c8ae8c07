"""Rules that look at one coordinate at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byz.aggregators.base import Aggregator, WeightedAggregator
from lightning_byz.order_statistics import median_of_rows, middle_of, sorted_rows
from lightning_byz.rows import Rows


@dataclass(frozen=True)
class Mean(WeightedAggregator):
    """The average of all rows. Not robust: one row can move it anywhere, so its f is always 0."""

    f: int | None = 0

    def most_f(self, n: int) -> int:
        return 0 if n else -1

    def with_f(self, f: int) -> Mean:
        return self

    def weights(self, rows: Rows) -> Tensor:
        return torch.full((len(rows),), 1 / len(rows), dtype=torch.float64, device=rows.values.device)

    def aggregate(self, rows: Rows) -> Tensor:
        return rows.map(lambda block: _running_sum(block) / len(block))


@dataclass(frozen=True)
class CoordinateMedian(Aggregator):
    """The median of every coordinate; for even n the mean of the two middle values (``torch.median`` takes the lower one).

    Yin et al., ICML 2018 (arXiv 1803.01498). Needs n > 2f, and does not use f otherwise.
    """

    def aggregate(self, rows: Rows) -> Tensor:
        return rows.map(median_of_rows)


@dataclass(frozen=True)
class TrimmedMean(Aggregator):
    """The mean of what is left of every coordinate after its f smallest and f largest values are dropped.

    Yin et al., ICML 2018 (arXiv 1803.01498), CWTM. Needs n > 2f. The values that are left are added up in sorted order;
    nothing is subtracted from a sum, so that a row of 1e30 costs the others no digit.
    """

    def aggregate(self, rows: Rows) -> Tensor:
        assert self.f is not None
        n, f = len(rows), self.f
        return rows.map(lambda block: _running_sum(sorted_rows(block, f, n - f)) / (n - 2 * f))


@dataclass(frozen=True)
class MeaMed(Aggregator):
    """The mean, in every coordinate, of the n - f values nearest to the median.

    Xie, Koyejo, Gupta 2018 (arXiv 1802.10116), mean around median. Needs n > 2f. Of two values at the same distance the smaller one
    counts as nearer.
    """

    def aggregate(self, rows: Rows) -> Tensor:
        assert self.f is not None
        n, f = len(rows), self.f

        def rule(block: Tensor) -> Tensor:
            ordered = sorted_rows(block, 0, n)
            return mean_of_nearest(ordered, middle_of(ordered), n - f)

        return rows.map(rule)


@dataclass(frozen=True)
class Phocas(Aggregator):
    """The mean, in every coordinate, of the n - f values nearest to the trimmed mean.

    Xie, Koyejo, Gupta 2018 (arXiv 1805.09682). Needs n > 2f. Of two values at the same distance the smaller one counts as nearer.
    """

    def aggregate(self, rows: Rows) -> Tensor:
        assert self.f is not None
        n, f = len(rows), self.f

        def rule(block: Tensor) -> Tensor:
            ordered = sorted_rows(block, 0, n)
            return mean_of_nearest(ordered, _running_sum(ordered[f : n - f]) / (n - 2 * f), n - f)

        return rows.map(rule)


def mean_of_nearest(ordered: list[Tensor], center: Tensor, keep: int) -> Tensor:
    """The mean of the ``keep`` values nearest to ``center [c]``, column by column, of rows ``[c]`` in ascending order.

    The nearest values stand side by side in the order. A window of them moves up by one as long as the value that enters is nearer than
    the one that leaves.
    """
    n = len(ordered)
    start = torch.zeros_like(center, dtype=torch.int16)
    for k in range(n - keep):
        start += ordered[k + keep] - center < center - ordered[k]
    total = torch.zeros_like(center)
    for i, row in enumerate(ordered):
        if n - keep <= i < keep:  # in every window
            total += row
        else:
            total += torch.where((start <= i) & (i < start + keep), row, 0)
    return total / keep


def _running_sum(rows: Tensor | list[Tensor]) -> Tensor:
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total
