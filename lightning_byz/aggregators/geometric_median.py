"""The geometric median, its few-step approximation RFA, and AutoGM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_byz.aggregators.base import WeightedAggregator
from lightning_byz.aggregators.medoid import around_medoid
from lightning_byz.numerics.rows import Rows


class WeiszfeldDefinition(NamedTuple):
    """How an implementation approximates the geometric median; see `GeometricMedian`."""

    iterations: int | None
    nu: float | None
    start: Literal["medoid", "mean", "zero"]


DEFINITIONS = {
    "exact": WeiszfeldDefinition(None, None, "medoid"),
    "pillutla2022": WeiszfeldDefinition(3, 1e-6, "mean"),
    "vr_byzantine": WeiszfeldDefinition(8, 0.1, "zero"),
    "byzfl": WeiszfeldDefinition(3, 0.1, "zero"),
}
"""The median itself; the RFA paper's settings (as we recall them); those of the code of
Byz-VR-MARINA and Byz-EF21-SGDM; ByzFL's.
"""


@dataclass(frozen=True)
class GeometricMedian(WeightedAggregator):
    """The point whose summed distance to all rows is smallest, by the smoothed Weiszfeld algorithm;
    also known as RFA.

    ``z = sum_i beta_i x_i / sum_i beta_i`` with ``beta_i = a_i / max(nu, ||z - x_i||)``, repeated;
    a_i is the row's share of the data. Pillutla, Kakade, Harchaoui, IEEE TSP 2022 (arXiv
    1912.13445). Needs n > 2f, and does not use f otherwise. Every iterate is a weighted sum of
    rows, so all iterations run on the n x n matrix of inner products: the vectors are read twice,
    however many iterations there are.

    Args:
        iterations: at most so many. None: until the weights move by less than ``tolerance``, at
            most 1000.
        tolerance: largest change of a weight at which the iteration ends.
        nu: smoothing, in the units of the rows; None: 1e-6 of the median distance to the start.
        start: "medoid": the row with the smallest summed distance to its n - f nearest, which f
            rows cannot move far (ours); "mean"; or "zero": the origin, which makes the rule depend
            on where the origin is.
        definition: sets the three above to those of somebody's implementation: "exact" (the
            default), "pillutla2022" (RFA), "vr_byzantine" or "byzfl" (docs/definitions.md).
    """

    compares_rows: ClassVar[bool] = True

    iterations: int | None = None
    tolerance: float = 1e-10
    nu: float | None = None
    start: Literal["medoid", "mean", "zero"] = "medoid"
    definition: Literal["exact", "pillutla2022", "vr_byzantine", "byzfl"] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.definition not in DEFINITIONS:
            raise ValueError(
                f"`definition` should be one of {', '.join(DEFINITIONS)}. Found "
                f"{self.definition!r}."
            )
        if self.definition != "exact":
            settings = DEFINITIONS[self.definition]
            given = WeiszfeldDefinition(self.iterations, self.nu, self.start)
            if given not in (settings, DEFINITIONS["exact"]):
                raise ValueError(
                    f"definition={self.definition!r} means {settings._asdict()}. Found "
                    f"{given._asdict()}. Give either the definition or the three settings."
                )
            for name, value in settings._asdict().items():
                object.__setattr__(self, name, value)
        if self.iterations is not None and self.iterations < 1:
            raise ValueError(f"`iterations` should be at least 1. Found {self.iterations}.")
        if self.start not in ("medoid", "mean", "zero"):
            raise ValueError(f"`start` should be 'medoid', 'mean' or 'zero'. Found {self.start!r}.")

    @property
    def weighted(self) -> bool:
        return True

    def kappa(self, n: int) -> float | None:
        assert self.f is not None
        exact = self.iterations is None and self.nu is None
        return 4 * (1 + self.f / (n - 2 * self.f)) ** 2 if exact else None

    @property
    def bears_unlike_data(self) -> bool:
        return True

    def weights(self, rows: Rows) -> Tensor:
        assert self.f is not None
        n, products = len(rows), around_medoid(rows, self.f)
        shares = (
            torch.full((n,), 1 / n, dtype=torch.float64)
            if rows.shares is None
            else rows.shares / rows.shares.sum()
        )
        shares = shares.to(products.device)
        if self.start == "medoid":
            to_z = products.diagonal().clamp_min(0).sqrt()
        elif self.start == "zero":
            to_z = rows.squared_norms().sqrt()
        else:
            to_z = _distances(products, shares)
        nu = (
            self.nu / rows.unit if self.nu is not None else max(1e-6 * float(to_z.median()), 1e-300)
        )
        weights, before = shares, None
        for _ in range(self.iterations or 1000):
            beta = shares / to_z.clamp_min(nu)
            weights = beta / beta.sum()
            if (
                self.iterations is None
                and before is not None
                and float((weights - before).abs().max()) < self.tolerance
            ):
                break
            before = weights
            to_z = _distances(products, weights)
        return weights


def _distances(products: Tensor, weights: Tensor) -> Tensor:
    """``[n]`` distances of the rows to their weighted mean, from inner products after any common
    shift.
    """
    squares = products.diagonal() - 2 * products @ weights + weights @ products @ weights
    return squares.clamp_min(0).sqrt()


@dataclass(frozen=True)
class AutoGM(WeightedAggregator):
    """A geometric median whose weights adapt: rows far from it lose weight, down to none.

    Li et al., IEEE Internet of Things Journal 2022:
    ``min over z and a in the simplex of sum_i a_i ||z - x_i|| + lambda / 2 ||a||^2``, by
    alternating between z, the geometric median with weights a, and a, which has a closed form.
    Needs n > 2f, and does not use f otherwise. Blades' code orders the rows by their index where
    the closed form wants them by distance; this one does as it should.

    Args:
        regularization: lambda, > 0, in the units of the rows: the larger, the more equal the
            weights. None: n, as in Blades.
        iterations: alternations, at most.
        tolerance: largest change of a weight at which they end.
    """

    compares_rows: ClassVar[bool] = True

    regularization: float | None = None
    iterations: int = 100
    tolerance: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regularization is not None and not self.regularization > 0:
            raise ValueError(f"`regularization` should be positive. Found {self.regularization}.")
        if self.iterations < 1:
            raise ValueError(f"`iterations` should be at least 1. Found {self.iterations}.")

    def weights(self, rows: Rows) -> Tensor:
        assert self.f is not None
        n, products = len(rows), around_medoid(rows, self.f)
        strength = float(n if self.regularization is None else self.regularization) / rows.unit
        trust = torch.full((n,), 1 / n, dtype=torch.float64, device=products.device)
        beta = trust
        for _ in range(self.iterations):
            beta = _weighted_median(products, trust)
            before, trust = trust, _simplex_weights(_distances(products, beta), strength)
            if float((trust - before).abs().max()) < self.tolerance:
                break
        return beta


def _weighted_median(products: Tensor, trust: Tensor) -> Tensor:
    """The geometric median of rows with weights ``trust``, as weights that sum to 1."""
    to_z = products.diagonal().clamp_min(0).sqrt()  # from the medoid
    nu = max(1e-9 * float(to_z.median()), 1e-300)
    weights = trust
    for _ in range(1000):
        beta = trust / to_z.clamp_min(nu)
        before, weights = weights, beta / beta.sum()
        to_z = _distances(products, weights)
        if float((weights - before).abs().max()) < 1e-10:
            break
    return weights


def _simplex_weights(distances: Tensor, strength: float) -> Tensor:
    """``argmin over a in the simplex of sum_i a_i d_i + strength / 2 ||a||^2``."""
    distances = distances - distances.min()  # changes no weight, and keeps the digits of strength
    ordered = distances.sort().values
    levels = (ordered.cumsum(0) + strength) / torch.arange(
        1, len(ordered) + 1, device=ordered.device
    )
    level = levels[int((levels > ordered).nonzero()[-1])]
    return (level - distances).clamp_min(0) / strength
