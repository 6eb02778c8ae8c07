"""Pre-aggregations in front of a rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_byz.aggregators.base import Aggregator, PreAggregator, Rule
from lightning_byz.aggregators.coordinate_wise import Mean
from lightning_byz.aggregators.nearest_neighbor_mixing import NNM
from lightning_byz.numerics.rows import Rows


@dataclass(frozen=True)
class Chain(Aggregator):
    """Pre-aggregations, applied in order, and the rule that aggregates what they make.

    All parts tolerate the same f: give it once, to the chain or to every part. A `Mean` at the end
    tolerates nobody, unless a pre-aggregation in front of it bounds the rows
    (`PreAggregator.bounds_rows`); NNM does not. No paper: a composition.

    Args:
        pre: pre-aggregations, first to last, such as ``(NNM(),)``.
        rule: the aggregator at the end.
        compile: on an accelerator, coordinate-wise rules run as one pass over the rows that
            torch.compile makes of them: faster for a median, a trimmed mean, MeaMed or Phocas of
            large models (docs/performance.md). It needs what torch.compile needs, and some seconds
            in the first rounds, and again whenever the number of rows changes. Other rules, such as
            Krum, do not change; nor does anything on a CPU, where rules run as one pass anyway.
    """

    pre: Sequence[PreAggregator] = ()
    # a field without default cannot follow f=None
    rule: Aggregator = None  # type: ignore[assignment]
    compile: bool = False

    def __post_init__(self) -> None:
        are_pre = isinstance(self.pre, (list, tuple)) and all(
            isinstance(part, PreAggregator) for part in self.pre
        )
        if isinstance(self.f, Rule) or not isinstance(self.rule, Aggregator) or not are_pre:
            raise ValueError(
                "Chain takes a tuple of pre-aggregators and one aggregator, by name, such as "
                f"Chain(pre=(NNM(),), rule=TrimmedMean()). Found f={self.f!r}, pre={self.pre!r}, "
                f"rule={self.rule!r}."
            )
        super().__post_init__()
        counting = self.pre if self.pre and isinstance(self.rule, Mean) else (*self.pre, self.rule)
        given = {part.f for part in (self, *counting) if part.f is not None}
        if len(given) > 1:
            raise ValueError(
                f"All parts of a Chain should tolerate the same f. Found f in {sorted(given)}. "
                "Give it once."
            )
        f = given.pop() if given else None
        object.__setattr__(self, "f", f)
        object.__setattr__(
            self, "pre", tuple(part if f is None else part.with_f(f) for part in self.pre)
        )
        object.__setattr__(self, "rule", self.rule if f is None else self.rule.with_f(f))

    @property
    def asks_first_for(self) -> Literal["norms", "products"]:
        return (*self.pre, self.rule)[0].asks_first_for

    @property
    def weighted(self) -> bool:
        return not self.pre and self.rule.weighted

    @property
    def coordinate_wise(self) -> bool:
        return not self.pre and self.rule.coordinate_wise

    @property
    def bears_unlike_data(self) -> bool:
        # what bounds rows drops none
        return self.rule.bears_unlike_data and all(part.bounds_rows for part in self.pre)

    @property
    def remembers(self) -> bool:
        return self.rule.remembers

    def most_f(self, n: int) -> int:
        bounded = isinstance(self.rule, Mean) and any(part.bounds_rows for part in self.pre)
        limits = []
        for part in self.pre:
            limits.append(part.most_f(n))
            n = part.count(n)
        return min(limits if bounded else [*limits, self.rule.most_f(n)])

    def with_f(self, f: int) -> Chain:
        return dataclasses.replace(
            self, f=f, pre=tuple(part.with_f(f) for part in self.pre), rule=self.rule.with_f(f)
        )

    def for_sizes(self, sizes: Sequence[int]) -> Chain:
        pre = tuple(part.for_sizes(sizes) for part in self.pre)
        return dataclasses.replace(self, pre=pre, rule=self.rule.for_sizes(sizes))

    def caveat(self, n: int) -> str | None:
        for part in self.pre:
            n = part.count(n)
        return self.rule.caveat(n)

    def kappa(self, n: int) -> float | None:
        """With NNM in front, 8 f / (n - f) (kappa + 1) for the rule's own kappa; None for other
        pre-aggregations.
        """
        kappa = self.rule.kappa(n)
        for part in self.pre:
            if (
                not isinstance(part, NNM)
                or isinstance(self.rule, Mean)
                or kappa is None
                or self.f is None
            ):
                return None
            kappa = 8 * self.f / (n - self.f) * (kappa + 1)
        return kappa

    def prepared(self, rows: Rows) -> Rows:
        """The rows that the rule at the end sees."""
        for part in self.pre:
            rows = part.prepare(rows)
        return dataclasses.replace(rows, compiled=rows.compiled or self.compile)

    def at_once(self, rows: Rows) -> Tensor | None:
        return None if self.pre else self.rule.at_once(rows)

    def aggregate(self, rows: Rows) -> Tensor:
        return self.rule.aggregate(self.prepared(rows))

    def in_pieces(self, rows: Rows) -> Iterator[Tensor]:
        return self.rule.in_pieces(self.prepared(rows))
