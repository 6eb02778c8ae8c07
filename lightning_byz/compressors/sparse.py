"""Sparsification: K values and their K indices."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byz.compressors.base import Compressor, Field
from lightning_byz.finite import all_finite
from lightning_byz.types import Payload


def _index_dtype(dim: int) -> torch.dtype:
    return torch.int32 if dim <= torch.iinfo(torch.int32).max else torch.int64


@dataclass(frozen=True)
class _Sparse(Compressor):
    """Keeps K of d coordinates. The wire holds K values and K strictly increasing indices (int32, or int64 for d > 2^31 - 1).

    Args:
        ratio: K / d, in (0, 1]; K is ``max(1, floor(ratio * d))``.
        k: K itself, instead of ``ratio``; capped at d.
    """

    ratio: float | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        if (self.ratio is None) == (self.k is None):
            raise ValueError(
                f"{name} needs exactly one of `ratio` and `k`. Found ratio={self.ratio}, k={self.k}. "
                f"Write {name}(ratio=0.01) to keep 1% of the coordinates, or {name}(k=100)."
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"`ratio` should be in (0, 1]. Found ratio={self.ratio}. {name}(ratio=0.01) keeps 1%.")
        if self.k is not None and self.k < 1:
            raise ValueError(f"`k` should be at least 1. Found k={self.k}.")

    def count(self, dim: int) -> int:
        """K for vectors of ``dim`` numbers."""
        if self.k is not None:
            return min(self.k, dim)
        assert self.ratio is not None
        return max(1, math.floor(self.ratio * dim))

    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        count = self.count(dim)
        return Field((count,), dtype), Field((count,), _index_dtype(dim))

    @abstractmethod
    def pick(self, x: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        """The ``count`` different indices to keep, in any order."""

    def scale(self, dim: int) -> float:
        """What the kept values are multiplied with."""
        return 1.0

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        index = self.pick(x, self.count(len(x)), generator).sort().values
        return x[index] * self.scale(len(x)), index.to(_index_dtype(len(x)))

    def decode(self, payload: Payload, dim: int) -> Tensor:
        values, index = payload
        return values.new_zeros(dim).index_copy_(0, index.long(), values)

    def valid(self, payload: Payload, dim: int) -> Tensor:
        values, index = payload
        inside = (index[0] >= 0) & (index[-1] < dim)
        return all_finite(values) & inside & (index[1:] > index[:-1]).all()


@dataclass(frozen=True)
class TopK(_Sparse):
    """Keeps the K coordinates of largest magnitude, exactly K of them: biased, contractive with alpha = K / d.

    Alistarh et al. 2018 (arXiv 1809.10505); Stich et al. 2018 (arXiv 1809.07599). Use it inside an algorithm that makes up
    for its bias, such as ByzEF21SGDM.
    """

    def pick(self, x: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        return x.abs().topk(count, sorted=False).indices

    def contraction(self, dim: int) -> float:
        return self.count(dim) / dim


@dataclass(frozen=True)
class RandK(_Sparse):
    """Keeps K coordinates drawn at random and scales them by d / K: unbiased, omega = d / K - 1.

    For error feedback use ``RandK(..., scaled=False)``, which is contractive with alpha = K / d, and biased.

    Args:
        scaled: multiply by d / K.
    """

    scaled: bool = True

    def pick(self, x: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            raise ValueError(
                "RandK draws its coordinates from a generator. Found generator=None. Pass "
                "torch.Generator().manual_seed(...), or round.private('compressor') inside an algorithm."
            )
        # A permutation of 11 million costs 40 times the draw of 1% of them, so draw, drop repetitions, and draw again.
        if 4 * count > len(x):
            return torch.randperm(len(x), generator=generator, device=generator.device)[:count].to(x.device)
        picked = torch.empty(0, dtype=torch.int64, device=generator.device)
        while len(picked) < count:
            more = torch.randint(len(x), (2 * (count - len(picked)) + 8,), generator=generator, device=generator.device)
            picked = torch.cat([picked, more])
            values, inverse = torch.unique(picked, return_inverse=True)
            # A coordinate counts where it was first drawn, so that the first K different ones are a fair sample.
            first = torch.full_like(values, len(picked)).scatter_reduce_(
                0, inverse, torch.arange(len(picked), device=picked.device), "amin"
            )
            picked = picked[first.sort().values]
        return picked[:count].to(x.device)

    def scale(self, dim: int) -> float:
        return dim / self.count(dim) if self.scaled else 1.0

    def contraction(self, dim: int) -> float | None:
        return None if self.scaled else self.count(dim) / dim

    def variance(self, dim: int) -> float | None:
        return dim / self.count(dim) - 1 if self.scaled else None
