"""Clipping as a pre-aggregation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from torch import Tensor

from lightning_byz.aggregators.base import PreAggregator
from lightning_byz.numerics.rows import Rows


def _clipped(rows: Rows, norms: Tensor, limit: Tensor) -> Rows:
    factors = torch.where(
        norms > limit, limit / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0
    )
    return rows.mix(torch.diag(factors))


@dataclass(frozen=True)
class StaticClipping(PreAggregator):
    """Scales every row down to norm c at most: ``x_i min(1, c / ||x_i||)``.

    Compared with `ARC` by Allouah et al., ICLR 2025 (arXiv 2405.14432).

    Args:
        c: the largest norm, > 0, in the units of the rows. ByzFL's default is 2.
    """

    bounds_rows: ClassVar[bool] = True
    needs_f: ClassVar[bool] = False

    c: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.c > 0:
            raise ValueError(f"`c`, the largest norm, should be positive. Found c={self.c}.")

    def prepare(self, rows: Rows) -> Rows:
        norms = rows.norms()
        return _clipped(rows, norms, torch.full_like(norms[0], self.c))


@dataclass(frozen=True)
class ARC(PreAggregator):
    """Adaptive robust clipping: the k = floor(2 (f / n) (n - f)) largest rows are clipped to the
    norm of the next largest.

    Allouah et al., ICLR 2025 (arXiv 2405.14432), Algorithm 2. With f = 0 nothing is clipped.
    """

    bounds_rows: ClassVar[bool] = True

    def prepare(self, rows: Rows) -> Rows:
        assert self.f is not None
        n = len(rows)
        k = math.floor(2 * self.f * (n - self.f) / n)
        norms = rows.norms()
        return _clipped(rows, norms, norms.sort(descending=True).values[k])


@dataclass(frozen=True)
class MedianNormClipping(PreAggregator):
    """Scales every row down to the rows' median norm at most, as a whole or tensor by tensor.

    Open training runs with local steps and untrusted peers bound what a peer contributes by the
    median of all (Covenant-72B, arXiv 2603.08163). The rule is stated there in words; the two
    variants are ours. Of an even number of norms the lower one in the middle counts, so that f <
    n / 2 rows cannot raise it above an honest one's. Clipping bounds what f rows add to a mean,
    ``f / n`` times the median norm, and does not tell liars from others: put a rule behind it.

    Args:
        by_tensor: each tensor of the model is clipped to the median of its own norms. The strategy
            says where tensors begin.
        sizes: numbers of elements of the tensors, in order, for use without the strategy.
    """

    bounds_rows: ClassVar[bool] = True
    needs_f: ClassVar[bool] = False

    by_tensor: bool = False
    sizes: tuple[int, ...] | None = None

    def for_sizes(self, sizes: Sequence[int]) -> MedianNormClipping:
        return replace(self, sizes=tuple(sizes)) if self.by_tensor else self

    def prepare(self, rows: Rows) -> Rows:
        if not self.by_tensor:
            norms = rows.norms()
            return _clipped(rows, norms, norms.median())
        values = rows.dense().clone()
        pieces = list(self._pieces(rows))
        squares = values.new_zeros(len(values), len(self.sizes or ()), dtype=torch.float64)
        for tensor, first, last in pieces:
            squares[:, tensor] += values[:, first:last].double().square().sum(1)
        norms = rows.sum(squares).sqrt()
        factors = (norms.median(0).values / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(
            max=1.0
        )
        for tensor, first, last in pieces:
            values[:, first:last] *= factors[:, tensor, None].to(values.dtype)
        return rows.with_values(values)

    def _pieces(self, rows: Rows) -> Iterator[tuple[int, int, int]]:
        """By tensor, the columns first .. last - 1 of these rows that belong to it."""
        width = rows.values.shape[1]
        spans = ((0, width),) if rows.spans is None else rows.spans
        dim = width if rows.dim is None else rows.dim
        if self.sizes is None or sum(self.sizes) != dim:
            raise ValueError(
                f"`sizes` should be the numbers of elements of the tensors that make up {dim} "
                f"columns. Found {self.sizes}. Give them: MedianNormClipping(by_tensor=True, "
                "sizes=[p.numel() for p in model.parameters()])."
            )
        bounds, place = list(pairwise(accumulate(self.sizes, initial=0))), 0
        for begin, end in spans:
            for tensor, (first, last) in enumerate(bounds):
                a, b = max(first, begin), min(last, end)
                if a < b:
                    yield tensor, place + a - begin, place + b - begin
            place += end - begin
