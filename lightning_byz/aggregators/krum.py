"""Krum, Multi-Krum and Bulyan: trust the rows whose neighbours are near."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_byz.aggregators.base import (
    Aggregator,
    TooFewRowsError,
    WeightedAggregator,
    equal_weights,
)
from lightning_byz.numerics.order_statistics import ColumnStatistic
from lightning_byz.numerics.rows import Rows


class KrumDefinition(NamedTuple):
    """What an implementation of Krum computes.

    Attributes:
        fewer: the score of a row counts its n - f - fewer nearest others.
        power: to which its distances to them are raised.
        kept: Multi-Krum averages n - f - kept rows.
        margin: needs n >= 2f + margin.
    """

    fewer: int
    power: int
    kept: int
    margin: int


DEFINITIONS = {
    "blanchard2017": KrumDefinition(fewer=2, power=2, kept=2, margin=3),
    "byzfl": KrumDefinition(fewer=1, power=2, kept=0, margin=1),
    "byzantine_momentum": KrumDefinition(fewer=1, power=1, kept=2, margin=3),
    "vr_byzantine": KrumDefinition(fewer=2, power=4, kept=2, margin=3),
    "signsgd": KrumDefinition(fewer=2, power=1, kept=0, margin=3),
}
"""The paper's; ByzFL's; LPD-EPFL/ByzantineMomentum's; that of SamuelHorvath/VR_Byzantine, which
squares squared distances; and that of PermiJW/signSGD-with-Majority-Vote, whose n - f - 1 nearest
include the row itself.
"""

Definition = Literal["blanchard2017", "byzfl", "byzantine_momentum", "vr_byzantine", "signsgd"]


def krum_scores(
    squared_distances: Tensor, f: int, definition: KrumDefinition = DEFINITIONS["blanchard2017"]
) -> Tensor:
    """``[n]``: for every row the sum of its squared (or so) distances to its nearest others."""
    n = len(squared_distances)
    # column 0 is the row itself
    nearest = squared_distances.sort(dim=1).values[:, 1 : 1 + n - f - definition.fewer]
    if definition.power != 2:
        nearest = nearest.pow(definition.power / 2)
    return nearest.sum(1)


@dataclass(frozen=True)
class MultiKrum(WeightedAggregator):
    """The mean of the m rows with the smallest Krum scores.

    Blanchard et al., NeurIPS 2017 (arXiv 1703.02757). The score of a row is the sum of its squared
    distances to its n - f - 2 nearest others. Needs n >= 2f + 3.

    Args:
        m: rows that are averaged, 1 <= m <= n - f - 2 (the paper's bound); None takes n - f - 2, or
            what the definition says.
        definition: whose Krum it is (docs/definitions.md); the paper's by default.
    """

    compares_rows: ClassVar[bool] = True

    m: int | None = None
    definition: Definition = "blanchard2017"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_definition(self.definition)
        if self.m is not None and (not isinstance(self.m, Integral) or self.m < 1):
            raise ValueError(
                "`m`, the number of rows to average, should be an integer of at least 1. Found "
                f"m={self.m!r}."
            )

    def most_f(self, n: int) -> int:
        definition = DEFINITIONS[self.definition]
        return min((n - definition.margin) // 2, n - definition.kept - (self.m or 1))

    def check(self, n: int) -> None:
        kept = DEFINITIONS[self.definition].kept
        if (
            self.m is not None
            and self.f is not None
            and self.f <= replace(self, m=None).most_f(n)
            and self.m > n - self.f - kept
        ):
            less = f" - {kept}" if kept else ""
            raise TooFewRowsError(
                f"`m`, the number of rows that MultiKrum averages, should be at most n - f{less} "
                f"= {n - self.f - kept} for n={n} rows and f={self.f}. Found m={self.m}. Use a "
                f"smaller m, or at least {self.m + self.f + kept} rows."
            )
        super().check(n)

    def weights(self, rows: Rows) -> Tensor:
        assert self.f is not None
        n, definition = len(rows), DEFINITIONS[self.definition]
        scores = krum_scores(rows.squared_distances(), self.f, definition)
        return equal_weights(
            scores.sort(stable=True).indices[: self.m or n - self.f - definition.kept], n
        )


@dataclass(frozen=True)
class Krum(WeightedAggregator):
    """The one row with the smallest Krum score (the first of them if several tie).

    Blanchard et al., NeurIPS 2017 (arXiv 1703.02757), with the paper's n - f - 2 neighbours. Needs
    n >= 2f + 3.

    Args:
        definition: whose Krum it is (docs/definitions.md); the paper's by default.
    """

    compares_rows: ClassVar[bool] = True

    definition: Definition = "blanchard2017"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_definition(self.definition)

    def most_f(self, n: int) -> int:
        return (n - DEFINITIONS[self.definition].margin) // 2

    def kappa(self, n: int) -> float | None:
        """Of the definition that counts the n - f nearest rows, the row itself included."""
        assert self.f is not None
        return 6 * (1 + self.f / (n - 2 * self.f)) if self.definition == "byzfl" else None

    def weights(self, rows: Rows) -> Tensor:
        assert self.f is not None
        scores = krum_scores(rows.squared_distances(), self.f, DEFINITIONS[self.definition])
        return equal_weights(scores.sort(stable=True).indices[:1], len(rows))


def _check_definition(name: str) -> None:
    if name not in DEFINITIONS:
        raise ValueError(f"`definition` should be one of {', '.join(DEFINITIONS)}. Found {name!r}.")


@dataclass(frozen=True)
class Bulyan(Aggregator):
    """Krum picks n - 2f rows, one after the other; in every coordinate, the n - 4f picked values
    nearest to their median are averaged.

    El Mhamdi, Guerraoui, Rouault, ICML 2018 (arXiv 1802.07927). Needs n >= 4f + 3. Every pick is
    the Krum winner of the rows that are left, m of them, with m - f - 2 neighbours. The last picks
    have one neighbour or none, where Krum scores tie by definition (two rows that are each other's
    nearest); the paper leaves open who wins, and here it is the row that is nearer to the rest: one
    more neighbour is counted until the scores differ, so that the order of the rows does not
    matter.
    """

    compares_rows: ClassVar[bool] = True

    def most_f(self, n: int) -> int:
        return (n - 3) // 4

    def picked(self, rows: Rows) -> Tensor:
        """The indices of the n - 2f rows that Krum picks."""
        assert self.f is not None
        distances = rows.squared_distances().cpu()
        left, picked = list(range(len(rows))), []
        for _ in range(len(rows) - 2 * self.f):
            nearest = distances[left][:, left].sort(dim=1).values[:, 1:]
            sums = nearest.cumsum(1)[:, max(0, len(left) - self.f - 3) :]
            winner = min(range(len(left)), key=lambda i: sums[i].tolist())
            picked.append(left.pop(winner))
        return torch.tensor(sorted(picked), device=rows.values.device)

    def aggregate(self, rows: Rows) -> Tensor:
        assert self.f is not None
        nearest = ColumnStatistic("middle", keep=len(rows) - 4 * self.f)
        return rows.select(self.picked(rows)).map(nearest, averages=True)
