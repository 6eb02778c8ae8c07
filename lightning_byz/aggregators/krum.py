"""Krum and Multi-Krum: trust the rows whose neighbours are near."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_byz.aggregators.base import WeightedAggregator, equal_weights
from lightning_byz.rows import Rows


def krum_scores(squared_distances: Tensor, f: int) -> Tensor:
    """``[n]``: for every row the sum of its squared distances to its n - f - 2 nearest others."""
    n = len(squared_distances)
    nearest = squared_distances.sort(dim=1).values[:, 1 : 1 + n - f - 2]  # column 0 is the row itself
    return nearest.sum(1)


@dataclass(frozen=True)
class MultiKrum(WeightedAggregator):
    """The mean of the m rows with the smallest Krum scores.

    Blanchard et al., NeurIPS 2017 (arXiv 1703.02757). The score of a row is the sum of its squared distances to its n - f - 2
    nearest others. Needs n >= 2f + 3.

    Args:
        m: rows that are averaged, 1 <= m <= n - f - 2; None takes n - f - 2. ByzFL takes n - f, and n - f - 1 neighbours.
    """

    m: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.m is not None and self.m < 1:
            raise ValueError(f"`m`, the number of rows to average, should be at least 1. Found m={self.m}.")

    def most_f(self, n: int) -> int:
        m = self.m or 1
        return min((n - 3) // 2, n - 2 - m)

    def weights(self, rows: Rows) -> Tensor:
        assert self.f is not None
        n = len(rows)
        scores = krum_scores(rows.squared_distances(), self.f)
        return equal_weights(scores.sort(stable=True).indices[: self.m or n - self.f - 2], n)


@dataclass(frozen=True)
class Krum(WeightedAggregator):
    """The one row with the smallest Krum score (the first of them if several tie).

    Blanchard et al., NeurIPS 2017 (arXiv 1703.02757), with the paper's n - f - 2 neighbours. Needs n >= 2f + 3.
    """

    def most_f(self, n: int) -> int:
        return (n - 3) // 2

    def weights(self, rows: Rows) -> Tensor:
        assert self.f is not None
        scores = krum_scores(rows.squared_distances(), self.f)
        return equal_weights(scores.sort(stable=True).indices[:1], len(rows))
