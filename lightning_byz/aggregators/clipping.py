"""Clipping as a pre-aggregation."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
