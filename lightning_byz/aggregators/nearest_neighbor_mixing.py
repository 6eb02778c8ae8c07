"""Nearest-neighbour mixing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_byz.aggregators.base import PreAggregator
from lightning_byz.numerics.rows import Rows


@dataclass(frozen=True)
class NNM(PreAggregator):
    """Replaces every row by the mean of the n - f rows nearest to it, itself included.

    Allouah et al., AISTATS 2023 (arXiv 2302.01772), Algorithm 2. Makes a rule robust where honest
    workers' data differ. Costs one n x n distance matrix; the mixed rows are never stored.
    """

    compares_rows: ClassVar[bool] = True

    def prepare(self, rows: Rows) -> Rows:
        assert self.f is not None
        n = len(rows)
        # [n, n - f]
        nearest = rows.squared_distances().sort(dim=1, stable=True).indices[:, : n - self.f]
        weights = torch.zeros(n, n, dtype=torch.float64, device=nearest.device)
        return rows.mix(weights.scatter_(1, nearest, 1 / (n - self.f)))
