"""Rules that average the n - f rows which belong together best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_byz.aggregators.base import TooFewRowsError, WeightedAggregator, equal_weights
from lightning_byz.numerics.order_statistics import median_of_rows
from lightning_byz.numerics.rows import Rows


@dataclass(frozen=True)
class CGE(WeightedAggregator):
    """The mean of the n - f rows of smallest norm: comparative gradient elimination.

    Gupta, Liu, Vaidya 2020 (arXiv 2008.04699), whose authors sum where later work, and this,
    averages. Needs n > 2f. Not translation equivariant: it holds rows near the origin for honest.
    """

    def weights(self, rows: Rows) -> Tensor:
        assert self.f is not None
        n = len(rows)
        return equal_weights(rows.squared_norms().sort(stable=True).indices[: n - self.f], n)


@dataclass(frozen=True)
class FABA(WeightedAggregator):
    """Deletes, f times, the row farthest from the mean of those that are left; averages the rest.

    Xia, Tao, Hao, Li, IJCAI 2019. Needs n > 2f.
    """

    compares_rows: ClassVar[bool] = True

    def weights(self, rows: Rows) -> Tensor:
        assert self.f is not None
        n = len(rows)
        distances = rows.squared_distances()
        left = torch.arange(n, device=distances.device)
        for _ in range(self.f):
            # ||x_i - mean||^2 is the mean of row i of the squared distances, less a constant.
            farthest = distances[left][:, left].mean(1).argmax()
            left = left[torch.arange(len(left), device=left.device) != farthest]
        return equal_weights(left, n)


@dataclass(frozen=True)
class Aksel(WeightedAggregator):
    """The mean of the rows nearest to the coordinate-wise median.

    Boussetta, El-Mhamdi, Guerraoui, Maurer, Rouault, OPODIS 2020 (arXiv 2008.12632). Needs n > 2f.

    Args:
        half: average ceil(n / 2) rows instead of n - f.
    """

    half: bool = False

    def weights(self, rows: Rows) -> Tensor:
        assert self.f is not None
        n = len(rows)
        distances = rows.squared_distances_to(rows.map(median_of_rows))
        return equal_weights(
            distances.sort(stable=True).indices[: -(-n // 2) if self.half else n - self.f], n
        )


@dataclass(frozen=True)
class MoNNA(WeightedAggregator):
    """The mean of the n - f rows nearest to a trusted worker's, its own included.

    Farhadkhani et al., ICML 2023 (arXiv 2302.05865), where every worker of a decentralised run
    trusts itself. Needs n > 2f. Without the trusted row there is no result: the step is skipped.

    Args:
        trusted: index of the worker whose row is trusted.
    """

    trusted: int = 0

    def check(self, n: int) -> None:
        super().check(n)
        if not 0 <= self.trusted < n:
            raise ValueError(
                f"`trusted` should be the index of one of n={n} workers. Found {self.trusted}."
            )

    def weights(self, rows: Rows) -> Tensor:
        assert self.f is not None
        n = len(rows)
        trusted = torch.zeros(n, dtype=torch.float64)
        trusted[self._position(rows)] = 1
        distances = rows.squared_distances_to(rows.combine(trusted))
        return equal_weights(distances.sort(stable=True).indices[: n - self.f], n)

    def _position(self, rows: Rows) -> int:
        """Where the trusted row is among those that take part."""
        if rows.workers is None:
            return self.trusted
        here = (rows.workers == self.trusted).nonzero()
        if len(here) == 0:
            raise TooFewRowsError(
                f"MoNNA trusts worker {self.trusted}, whose row is silent in this round."
            )
        return int(here)
