"""The aggregator interface: n rows, of which up to f may be anything, to one vector."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_byz.numerics.rows import AnyRows, Rows

RuleT = TypeVar("RuleT", bound="Rule")
AggregatorT = TypeVar("AggregatorT", bound="Aggregator")


class TooFewRowsError(ValueError):
    """The rows that are present are too few for the rule: nothing can be said about this round."""


@dataclass(frozen=True)
class Rule(ABC):
    """What aggregators and pre-aggregators share: the number f of Byzantine rows that they are to
    tolerate.

    Args:
        f: number of Byzantine rows to tolerate. None: not yet known; the strategy fills it in
            (``num_byzantine``).

    Attributes:
        compares_rows: it asks first for distances or inner products of all rows, which also tell
            which of them are finite.
    """

    compares_rows: ClassVar[bool] = False

    f: int | None = None

    @property
    def asks_first_for(self) -> Literal["norms", "products"]:
        """What also tells which rows are finite (`Rows.finite`)."""
        return "products" if self.compares_rows else "norms"

    def __post_init__(self) -> None:
        if self.f is not None and (
            isinstance(self.f, bool) or not isinstance(self.f, int) or self.f < 0
        ):
            raise ValueError(
                "`f`, the number of Byzantine rows to tolerate, should be a non-negative "
                f"integer. Found f={self.f!r}."
            )

    def most_f(self, n: int) -> int:
        """The largest f that this rule allows for n rows; below 0 if it cannot take n rows at
        all.
        """
        return (n - 1) // 2

    def with_f(self: RuleT, f: int) -> RuleT:
        """The same rule for another f.

        Raises:
            TypeError: if the rule's class is no dataclass, and has a constructor of its own.
        """
        try:
            return dataclasses.replace(self, f=f)
        except TypeError as error:
            raise TypeError(
                f"{type(self).__name__} should be a dataclass, whose fields are its parameters: "
                "write @dataclass(frozen=True) above it, and no __init__. Found a class of which "
                f"no copy with another f can be made: {error}"
            ) from error

    def for_sizes(self: RuleT, sizes: Sequence[int]) -> RuleT:
        """The same rule for vectors that are made of tensors with these numbers of elements, in
        order; itself if it does not look at tensors.
        """
        return self

    def caveat(self, n: int) -> str | None:
        """What somebody should know who is about to run this rule, whose f is known, on n rows in
        every step; None: nothing.
        """
        return None

    def check(self, n: int) -> None:
        """Raises unless this rule can take n rows."""
        name = type(self).__name__
        if self.f is None:
            raise ValueError(
                f"{name} needs to know f. Found f=None. Write {name}(f=1), or {name}().with_f(1)."
            )
        if self.f > self.most_f(n):
            advice = f"Use f <= {self.most_f(n)}" if self.most_f(n) >= 0 else "Use another rule"
            smallest = next(
                (m for m in range(1, 8 * self.f + 64) if self.most_f(m) >= self.f), None
            )
            more = "" if smallest is None else f", or at least {smallest} rows"
            raise TooFewRowsError(
                f"{name} with f={self.f} cannot take n={n} rows: for n={n} it tolerates at most "
                f"f={self.most_f(n)}. {advice}{more}."
            )


@dataclass(frozen=True)
class Aggregator(Rule):
    """A rule that makes one vector of n rows. Subclasses implement `aggregate`, or `weights` (see
    `WeightedAggregator`).
    """

    @property
    def weighted(self) -> bool:
        """Whether it takes ``rows.shares`` into account, how much of the data each row stands
        for.
        """
        return False

    @property
    def bears_unlike_data(self) -> bool:
        """Whether it stays near the mean where nobody lies and workers' data differ, so that it
        loses little of what only some workers have seen: measured, docs/default-algorithm.md. The
        strategy warns of the others on such data.
        """
        return False

    @property
    def coordinate_wise(self) -> bool:
        """Whether every coordinate of the result is a function of that coordinate of the rows
        alone, the same in every round.
        """
        return False

    @property
    def remembers(self) -> bool:
        """Whether the result depends on the last round's, which algorithms then keep and give it as
        ``rows.last``.
        """
        return False

    def __call__(self, rows: AnyRows, present: Tensor | None = None) -> Tensor:
        """Aggregates ``rows [n, d]`` to ``[d]``; the input is not modified and keeps its dtype.

        Rows that hold a nan or an inf, and rows that are not present, are silent: the rule does not
        see them. Those that are known to be faulty (``rows.exposed``) count as Byzantine rows that
        are gone, so f shrinks by as many. Each of the others may be one row less that can lie, so f
        shrinks with them too, but never by more than the rule needs it to, and not at all once more
        than f rows are silent. Rows of accused workers (``rows.quarantined``) do the same: an
        accusation is no proof, so f stays as large as the rule allows; and as they are probably
        Byzantine, a step does not fail for their absence.

        Args:
            rows: a matrix ``[n, d]`` of torch or of numpy, a list of n vectors ``[d]``, or Rows.
                The result is a tensor.
            present: ``[n]`` bool, the rows that count, already known to be finite; None looks for
                itself.

        Raises:
            TooFewRowsError: if f is too large for n, or for the rows that are left.
            ValueError: if rows have unequal shares of the data, and the rule cannot weigh them, or
                f of them have half of it; if rows are no floating-point matrix; if the rule's
                weights, or its result, are not what they should be.
        """
        rows = Rows.of(rows)
        result = self.at_once(rows) if present is None else None
        if result is None:
            rule, rows = self.facing(rows, present)
            result = rule.aggregate(rows)
        width = rows.values.shape[1]
        if (
            not isinstance(result, Tensor)
            or result.shape != (width,)
            or result.dtype != rows.values.dtype
        ):
            found = (
                f"a tensor {list(result.shape)} of {result.dtype}"
                if isinstance(result, Tensor)
                else repr(result)
            )
            raise ValueError(
                f"`aggregate` of {type(self).__name__} should give a vector [d] of the rows' "
                f"dtype: [{width}] of {rows.values.dtype}. Found {found}."
            )
        return result

    def at_once(self, rows: Rows) -> Tensor | None:
        """The result of rows of which nobody knows whether they are finite, where the pass that
        makes it tells that they are; None: they are to be looked at first.
        """
        return None

    def facing(
        self: AggregatorT, rows: Rows, present: Tensor | None = None
    ) -> tuple[AggregatorT, Rows]:
        """The rows that speak, and this rule with the f that is left for them; arguments and errors
        are those of a call.

        Rules that look across columns get them in a range where they can square numbers
        (`Rows.in_range`).
        """
        self.check(len(rows))
        if rows.shares is not None:
            self.check_shares(rows.shares)
        if present is None:
            present = rows.finite(by=self.asks_first_for)
        elif (
            not isinstance(present, Tensor)
            or present.dtype != torch.bool
            or present.shape != (len(rows),)
        ):
            found = (
                f"{present.dtype} {list(present.shape)}"
                if isinstance(present, Tensor)
                else repr(present)
            )
            raise ValueError(
                "`present` should say of each row whether it counts: a tensor of torch.bool "
                f"[{len(rows)}]. Found {found}."
            )
        rule, rows = self._hearing(rows, present)
        assert rule.f is not None
        return rule, rows if rule.coordinate_wise else rows.in_range(rule.f)

    def _hearing(self: AggregatorT, rows: Rows, speaking: Tensor) -> tuple[AggregatorT, Rows]:
        """The rows that speak ``[n]`` bool, and this rule with the f that is left for them."""
        heard = int(speaking.sum())
        silent = len(rows) - heard
        if silent == 0:
            return self, rows
        assert self.f is not None
        exposed = (
            0 if rows.exposed is None else int((rows.exposed.to(speaking.device) & ~speaking).sum())
        )
        exposed = exposed if exposed <= self.f else 0  # else nothing is as f says
        left = rows.select(speaking)
        most = (
            self.most_f(heard)
            if left.shares is None
            else min(self.most_f(heard), _most_below_half(left.shares))
        )
        accused = (
            0
            if rows.quarantined is None
            else int((rows.quarantined.to(speaking.device) & ~speaking).sum())
        )
        remaining, quiet = self.f - exposed, silent - exposed - accused
        f = min(remaining, most)
        # With at most f quiet rows, all of them may be Byzantine ones, and f - quiet are left. With
        # more, honest ones are quiet, and all f Byzantine ones may be among those that speak.
        least = max(0, remaining - accused)
        least = least - quiet if quiet <= least else least
        if heard == 0 or f < least:
            of_them = (
                f"{heard} rows"
                if left.shares is None
                else f"{heard} rows of these shares of the data"
            )
            raise TooFewRowsError(
                f"{type(self).__name__} with f={self.f} heard {heard} of n={len(rows)} rows, and "
                f"for {of_them} it tolerates at most f={most}. {least} of them may be Byzantine."
            )
        return self.with_f(f), left

    def check_shares(self, shares: Tensor) -> None:
        """Raises unless this rule can take rows that stand for such shares ``[n]`` of the data."""
        name = type(self).__name__
        if not self.weighted:
            raise ValueError(
                f"{name} counts every row alike. Found rows that stand for different shares of "
                "the data. Use CoordinateMedian, GeometricMedian or Mean, which weigh them, or "
                "no weights."
            )
        if self.f and self.f > _most_below_half(shares):
            largest = shares.sort(descending=True).values[: self.f]
            raise ValueError(
                f"Any f={self.f} rows should stand for less than half of the data. Found {self.f} "
                f"with {100 * float(largest.sum() / shares.sum()):.0f} % of it. Use a smaller f, "
                "or more even weights."
            )

    def kappa(self, n: int) -> float | None:
        """The constant with which it is proven to be (f, kappa)-robust for n rows; None where we
        know of no such proof.

        For every set S of n - f rows with mean m_S, whatever the other rows hold,
        ``||result - m_S||^2 <= kappa / |S| sum_S ||x_i - m_S||^2``. Allouah et al., AISTATS 2023
        (arXiv 2302.01772); no rule has one below f / (n - 2f).
        """
        return None

    @abstractmethod
    def aggregate(self, rows: Rows) -> Tensor:
        """The rule itself, on finite rows and with an f that fits: ``Rows [n, d] -> [d]``."""

    def in_pieces(self, rows: Rows) -> Iterator[Tensor]:
        """The result of `aggregate` for each of ``rows.pieces()``, as soon as it is known."""
        if self.coordinate_wise:
            yield from (self.aggregate(piece) for _, piece in rows.pieces())
        else:
            yield from torch.split(
                self.aggregate(rows), [piece.values.shape[1] for _, piece in rows.pieces()]
            )


@dataclass(frozen=True)
class ColumnwiseAggregator(Aggregator):
    """A rule that looks at the sorted values of one coordinate at a time.

    Attributes:
        averages: it gives means of them, whose sums may overflow where they do not.
    """

    averages: ClassVar[bool] = False

    @property
    def coordinate_wise(self) -> bool:
        return True

    @abstractmethod
    def statistic(self, rows: Rows) -> Callable[[Tensor], Tensor]:
        """What becomes of a column's values: a `ColumnStatistic`, or, where there is none for it,
        a function ``[n, c] -> [c]``.
        """

    def aggregate(self, rows: Rows) -> Tensor:
        return rows.map(self.statistic(rows), averages=self.averages)

    def at_once(self, rows: Rows) -> Tensor | None:
        if rows.shares is not None or type(self).aggregate is not ColumnwiseAggregator.aggregate:
            return None
        self.check(len(rows))
        return rows.map_if_finite(self.statistic(rows))


@dataclass(frozen=True)
class WeightedAggregator(Aggregator):
    """A rule whose result is a weighted sum of rows. Its weights tell whom it trusted.

    Attributes:
        clips: it shortens rows, so that its weights may sum to less than 1.
    """

    clips: ClassVar[bool] = False

    @abstractmethod
    def weights(self, rows: Rows) -> Tensor:
        """``[n]`` float64 weights >= 0 that sum to 1, or to less where a rule ``clips`` rows."""

    def aggregate(self, rows: Rows) -> Tensor:
        return rows.combine(self.checked_weights(rows))

    def checked_weights(self, rows: Rows) -> Tensor:
        """`weights`, once they are found to be what they should be.

        Raises:
            ValueError: else; one wrong weight would spoil every parameter.
        """
        weights, n = self.weights(rows), len(rows)
        if not isinstance(weights, Tensor) or weights.shape != (n,):
            found = f"shape {list(weights.shape)}" if isinstance(weights, Tensor) else repr(weights)
        else:
            listed = weights.tolist()
            total = math.fsum(listed) if all(map(math.isfinite, listed)) else math.nan
            if min(listed) >= 0 and total <= 1 + 1e-3 and (self.clips or total >= 1 - 1e-3):
                return weights
            found = f"{listed}, whose sum is {total:.6g}"
        raise ValueError(
            f"`weights` of {type(self).__name__} should be a tensor [{n}] of numbers >= 0, one "
            f"for each row, that sum to 1{' at most' if self.clips else ''}. Found {found}."
        )

    def in_pieces(self, rows: Rows) -> Iterator[Tensor]:
        if type(self).aggregate is not WeightedAggregator.aggregate:
            yield from super().in_pieces(rows)
            return
        weights = self.checked_weights(rows)
        yield from (piece.combine(weights) for _, piece in rows.pieces())


@dataclass(frozen=True)
class PreAggregator(Rule):
    """Maps n rows to rows that are easier to aggregate. Subclasses implement `prepare`.

    Attributes:
        bounds_rows: whether f rows can move the mean of the new rows by a bounded amount only, as
            clipping does; a chain may then end in `Mean`.
        needs_f: what it makes of rows depends on f.
    """

    bounds_rows: ClassVar[bool] = False
    needs_f: ClassVar[bool] = True

    def count(self, n: int) -> int:
        """How many rows it makes of n."""
        return n

    @abstractmethod
    def prepare(self, rows: Rows) -> Rows:
        """The new rows of finite ones; lazily, by `Rows.mix`."""

    @overload
    def __call__(self, rows: Rows) -> Rows: ...

    @overload
    def __call__(self, rows: Tensor | Sequence[Tensor] | NDArray[np.floating[Any]]) -> Tensor: ...

    def __call__(self, rows: AnyRows) -> Rows | Tensor:
        """The new rows: Rows of Rows, and a matrix ``[count(n), d]`` of all else that a rule takes.

        Raises:
            TooFewRowsError: if f is too large for n.
            ValueError: if f is not known and needed, or if rows are no floating-point matrix.
        """
        given = Rows.of(rows)
        if self.f is not None or self.needs_f:
            self.check(len(given))
        made = self.prepare(given.in_range(self.f or 0))
        return made if isinstance(rows, Rows) else made.dense().clone()


def _most_below_half(shares: Tensor) -> int:
    """The largest f for which any f rows stand for less than half of the data, of which rows have
    ``shares [n]``.
    """
    return int((2 * shares.sort(descending=True).values.cumsum(0) < shares.sum()).sum())


def equal_weights(chosen: Tensor, n: int) -> Tensor:
    """``[n]`` float64 weights: equal on the chosen indices, 0 elsewhere."""
    weights = torch.zeros(n, dtype=torch.float64, device=chosen.device)
    weights[chosen] = 1 / len(chosen)
    return weights
