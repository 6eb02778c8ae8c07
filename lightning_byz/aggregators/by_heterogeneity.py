"""A choice between two rules, by how unlike the workers' data have been found to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_byz.aggregators.base import WeightedAggregator
from lightning_byz.aggregators.spectral import CAF, SpectralFilter
from lightning_byz.numerics.rows import Rows


@dataclass(frozen=True)
class ByHeterogeneity(WeightedAggregator):
    """One rule where workers' data are alike, another one where they differ. The default
    algorithm's rule.

    What tells lies from honest rows that merely differ depends on the data. Where all workers draw
    from one distribution, `CAF` loses least, because leaving somebody out costs little there. Where
    they do not, it costs much, and `SpectralFilter` loses least (docs/default-algorithm.md).

    ``rows.unlike`` is how unlike the data have been found to be in earlier rounds, in [0, 1]. Up to
    ``low`` the weights are those of ``alike``, from ``high`` on those of ``unlike``, and in between
    they pass from the first to the second linearly. While nobody knows, they are those of
    ``unlike``: in the first two rounds, for rows of a plain matrix, and all through a run whose
    algorithm is not `RobustSGD`, or is compressed, or of which too few workers speak in two rounds
    in succession. Fewer than half of the workers can raise the number, but not lower it
    (`lightning_byz.engine.heterogeneity`).

    Tolerates what both rules tolerate. Both get this rule's f. No paper: a composition.

    Args:
        alike: a `WeightedAggregator`.
        unlike: another one.
        low: heterogeneity up to which data are alike: those dealt at random have 0.23 in
            docs/default-algorithm.md.
        high: from here on they differ: there labels by Dirichlet(1) have 0.38, by Dirichlet(0.3)
            0.51.
    """

    compares_rows: ClassVar[bool] = True

    clips: ClassVar[bool] = True

    alike: WeightedAggregator = CAF(norm_floor=0.3)  # noqa: RUF009
    unlike: WeightedAggregator = SpectralFilter()  # noqa: RUF009
    low: float = 0.25
    high: float = 0.45

    def __post_init__(self) -> None:
        rules = (self.alike, self.unlike)
        if any(not isinstance(rule, WeightedAggregator) or rule.remembers for rule in rules):
            raise ValueError(
                "ByHeterogeneity takes two rules that give weights from one round alone, such as "
                f"ByHeterogeneity(alike=CAF(), unlike=SpectralFilter()). Found alike={self.alike!r}"
                f" and unlike={self.unlike!r}."
            )
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                "`low` and `high` are bounds of heterogeneity, 0 <= low < high <= 1. Found "
                f"low={self.low} and high={self.high}."
            )
        super().__post_init__()
        given = {rule.f for rule in (self, *rules) if rule.f is not None}
        if len(given) > 1:
            raise ValueError(
                "ByHeterogeneity and its two rules should tolerate the same f. Found f in "
                f"{sorted(given)}. Give it once."
            )
        for f in given:
            object.__setattr__(self, "f", f)
            object.__setattr__(self, "alike", self.alike.with_f(f))
            object.__setattr__(self, "unlike", self.unlike.with_f(f))

    @property
    def asks_first_for(self) -> Literal["norms", "products"]:
        return self.unlike.asks_first_for

    @property
    def weighted(self) -> bool:
        return self.alike.weighted and self.unlike.weighted

    @property
    def bears_unlike_data(self) -> bool:
        return self.unlike.bears_unlike_data

    def most_f(self, n: int) -> int:
        return min(self.alike.most_f(n), self.unlike.most_f(n))

    def with_f(self, f: int) -> ByHeterogeneity:
        return dataclasses.replace(
            self, f=f, alike=self.alike.with_f(f), unlike=self.unlike.with_f(f)
        )

    def for_sizes(self, sizes: Sequence[int]) -> ByHeterogeneity:
        return dataclasses.replace(
            self, alike=self.alike.for_sizes(sizes), unlike=self.unlike.for_sizes(sizes)
        )

    def check(self, n: int) -> None:
        super().check(n)
        self.alike.check(n)
        self.unlike.check(n)

    def caveat(self, n: int) -> str | None:
        return self.alike.caveat(n) or self.unlike.caveat(n)

    def weights(self, rows: Rows) -> Tensor:
        part = 1.0 if rows.unlike is None else (rows.unlike - self.low) / (self.high - self.low)
        if part <= 0:
            return self.alike.weights(rows)
        if part >= 1:
            return self.unlike.weights(rows)
        weights = self.unlike.weights(rows)
        return weights.lerp(self.alike.weights(rows).to(weights), 1 - part)
