"""The geometric median, and its few-step approximation RFA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_byz.aggregators.base import WeightedAggregator
from lightning_byz.rows import Rows


@dataclass(frozen=True)
class GeometricMedian(WeightedAggregator):
    """The point whose summed distance to all rows is smallest, by the smoothed Weiszfeld algorithm; also known as RFA.

    ``z = sum_i beta_i x_i / sum_i beta_i`` with ``beta_i = 1 / max(nu, ||z - x_i||)``, repeated. Pillutla, Kakade, Harchaoui, IEEE TSP 2022
    (arXiv 1912.13445). Needs n > 2f, and does not use f otherwise. Every iterate is a weighted sum of rows, so all iterations run
    on the n x n matrix of inner products: the vectors are read twice, however many iterations there are.

    Args:
        iterations: at most so many. None: until the weights move by less than ``tolerance``, at most 1000.
        tolerance: largest change of a weight at which the iteration ends.
        nu: smoothing, in the units of the rows; None: 1e-6 of the median distance to the start.
        start: "medoid": the row with the smallest summed distance to its n - f nearest, which f rows cannot move far (ours);
            "mean"; or "zero": the origin, which makes the rule depend on where the origin is.
            ``GeometricMedian(iterations=8, nu=0.1, start="zero")`` is the RFA of Byz-VR-MARINA's and Byz-EF21-SGDM's code, and
            ``GeometricMedian(iterations=3, nu=0.1, start="zero")`` is ByzFL's.
    """

    iterations: int | None = None
    tolerance: float = 1e-10
    nu: float | None = None
    start: Literal["medoid", "mean", "zero"] = "medoid"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations is not None and self.iterations < 1:
            raise ValueError(f"`iterations` should be at least 1. Found {self.iterations}.")
        if self.start not in ("medoid", "mean", "zero"):
            raise ValueError(f"`start` should be 'medoid', 'mean' or 'zero'. Found {self.start!r}.")

    def weights(self, rows: Rows) -> Tensor:
        assert self.f is not None
        n = len(rows)
        distances = rows.squared_distances().sqrt()
        medoid = int(distances.sort(dim=1).values[:, : n - self.f].sum(1).argmin())
        near = (
            torch.isfinite(distances[medoid]).nonzero().flatten()
        )  # what is infinitely far (in float64, beyond 1e154) weighs nothing
        weights = torch.zeros(n, dtype=torch.float64, device=distances.device)
        weights[near] = self._weiszfeld(rows.select(near), distances[medoid][near], int((near == medoid).nonzero()))
        return weights

    def _weiszfeld(self, rows: Rows, to_medoid: Tensor, medoid: int) -> Tensor:
        n = len(rows)
        if self.start == "medoid":
            to_z = to_medoid
        elif self.start == "zero":
            to_z = rows.squared_norms().sqrt()
        else:
            to_z = rows.squared_distances_to(rows.combine(torch.full((n,), 1 / n, dtype=torch.float64))).sqrt()
        # Inner products of x_i - x_medoid: those of honest rows are exact whatever the others hold.
        products = rows.agree(rows.gram())
        centred = products - products[medoid] - products[:, medoid : medoid + 1] + products[medoid, medoid]

        nu = self.nu if self.nu is not None else max(1e-6 * float(to_z.median()), 1e-300)
        weights, before = torch.full_like(to_z, 1 / n), None
        for _ in range(self.iterations or 1000):
            beta = 1 / to_z.clamp_min(nu)
            weights = beta / beta.sum()
            if self.iterations is None and before is not None and float((weights - before).abs().max()) < self.tolerance:
                break
            before = weights
            squares = centred.diagonal() - 2 * centred @ weights + weights @ centred @ weights
            to_z = squares.clamp_min(0).sqrt()
        return weights
