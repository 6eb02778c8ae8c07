"""Sparsification: K values and their K indices."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_byz.compressors.base import Compressor, Field, WireFormat
from lightning_byz.compressors.bits import NUMPY_DTYPES
from lightning_byz.numerics.finite import all_finite
from lightning_byz.types import Payload

_SAMPLE = 32_768
"""Magnitudes that Top-K looks at to find a threshold."""
_BLOCK = 262_144
"""Numbers that are compared with it at a time: 1 MB of float32, which stays in a core's cache."""


def _index_dtype(dim: int) -> torch.dtype:
    return torch.int32 if dim <= torch.iinfo(torch.int32).max else torch.int64


def largest(x: Tensor, count: int, minus: Tensor | None = None) -> Tensor:
    """Increasing indices of the ``count`` numbers of largest magnitude in ``x [d]``, or in
    ``x - minus``; which ones of equals is left open.

    ``topk`` sorts far more than it needs. On a CPU, where few of many are wanted, the magnitudes of
    a sample give a threshold that a few more than ``count`` numbers reach; of those the smallest
    are dropped. If the sample was misleading, everything is sorted. A difference is made block by
    block, and never stored.
    """
    d = len(x)

    def numbers(at: Any) -> Tensor:
        return x[at] if minus is None else x[at] - minus[at]

    if x.device.type == "cpu" and x.dtype in NUMPY_DTYPES and d >= 2 * _SAMPLE and count <= d // 8:
        expected = _SAMPLE * count / d
        # five standard deviations on the safe side
        rank = math.ceil(expected + 5 * math.sqrt(expected) + 10)
        threshold = (
            numbers(torch.randint(d, (_SAMPLE,), generator=torch.Generator().manual_seed(0)))
            .abs_()
            .topk(rank)
            .values[-1]
        )
        room, found, sizes = x.new_empty(_BLOCK), [], []
        for first in range(0, d, _BLOCK):
            block = room[: min(_BLOCK, d - first)]
            here = slice(first, first + len(block))
            if minus is None:
                torch.abs(x[here], out=block)
            else:
                torch.sub(x[here], minus[here], out=block).abs_()
            magnitudes = block.numpy()  # where comparisons and finding take a fifth of the time
            # nan is among them, as topk takes it for the largest
            index = np.flatnonzero(~(magnitudes < threshold.numpy()))
            sizes.append(torch.from_numpy(magnitudes[index]))
            found.append(torch.from_numpy(index).add_(first))
        candidates, reached = torch.cat(found), torch.cat(sizes)
        if len(candidates) >= count:
            dropped = reached.topk(len(candidates) - count, largest=False, sorted=False).indices
            return candidates[
                torch.ones_like(candidates, dtype=torch.bool).index_fill_(0, dropped, False)
            ]
    return numbers(slice(None)).abs().topk(count, sorted=False).indices.sort().values


@dataclass(frozen=True)
class SparsePart(WireFormat):
    """Values and their strictly increasing indices: those of a sparse payload that lie in one share
    of the coordinates.

    Args:
        count: how many there are at most.
    """

    count: int

    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        count = min(self.count, dim)
        return Field((count,), dtype), Field((count,), _index_dtype(dim))

    def decode(self, payload: Payload, dim: int) -> Tensor:
        values, index = payload
        return values.new_zeros(dim).index_copy_(0, index.long(), values)

    def decode_into(self, payload: Payload, out: Tensor) -> None:
        values, index = payload
        out.zero_().index_copy_(0, index.long(), values)

    def entries(self, payload: Payload, dim: int) -> tuple[Tensor, Tensor]:
        values, index = payload
        return index.long(), values

    def valid(self, payload: Payload, dim: int) -> Tensor:
        values, index = payload
        if len(values) != len(index) or len(index) == 0:
            return torch.tensor(len(values) == len(index), device=values.device)
        inside = (index[0] >= 0) & (index[-1] < dim)
        return all_finite(values) & inside & (index[1:] > index[:-1]).all()


@dataclass(frozen=True)
class _Sparse(Compressor):
    """Keeps K of d coordinates. The wire holds K values and K strictly increasing indices (int32,
    or int64 for d > 2^31 - 1).

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
                f"{name} needs exactly one of `ratio` and `k`. Found ratio={self.ratio}, "
                f"k={self.k}. Write {name}(ratio=0.01) to keep 1% of the coordinates, or "
                f"{name}(k=100)."
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(
                f"`ratio` should be in (0, 1]. Found ratio={self.ratio}. {name}(ratio=0.01) keeps "
                "1%."
            )
        if self.k is not None and (not isinstance(self.k, Integral) or self.k < 1):
            raise ValueError(f"`k` should be an integer of at least 1. Found k={self.k!r}.")

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
        """The ``count`` different indices to keep, in increasing order."""

    def scale(self, dim: int) -> float:
        """What the kept values are multiplied with."""
        return 1.0

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        index = self.pick(x, self.count(len(x)), generator)
        return x[index] * self.scale(len(x)), index.to(_index_dtype(len(x)))

    def decode(self, payload: Payload, dim: int) -> Tensor:
        return SparsePart(self.count(dim)).decode(payload, dim)

    def decode_into(self, payload: Payload, out: Tensor) -> None:
        SparsePart(self.count(len(out))).decode_into(payload, out)

    def added(self, x: Tensor, payload: Payload, out: Tensor | None = None) -> Tensor:
        values, index = payload
        out = x.clone() if out is None else out.copy_(x)
        return out.index_add_(0, index.long(), values)

    def entries(self, payload: Payload, dim: int) -> tuple[Tensor, Tensor]:
        return SparsePart(self.count(dim)).entries(payload, dim)

    def valid(self, payload: Payload, dim: int) -> Tensor:
        return SparsePart(self.count(dim)).valid(payload, dim)

    @property
    def sparse(self) -> bool:
        return True

    def part(self, dim: int, first: int, last: int) -> WireFormat:
        return SparsePart(self.count(dim))

    def split(self, payload: Payload, dim: int, bounds: Sequence[int]) -> list[Payload]:
        values, index = payload
        places = torch.searchsorted(
            index, torch.tensor(bounds, dtype=index.dtype, device=index.device)
        ).tolist()
        cuts = zip(pairwise(places), bounds, strict=False)
        return [(values[start:end], index[start:end] - first) for (start, end), first in cuts]

    @property
    def joins(self) -> bool:
        return True

    def join(self, shares: Sequence[Payload], widths: Sequence[int]) -> Payload:
        starts = accumulate(widths, initial=0)
        values, index = zip(*shares, strict=True)
        return torch.cat(values), torch.cat(
            [places + start for places, start in zip(index, starts, strict=False)]
        )


@dataclass(frozen=True)
class TopK(_Sparse):
    """Keeps the K coordinates of largest magnitude, exactly K of them: biased, contractive with
    alpha = K / d.

    Alistarh et al. 2018 (arXiv 1809.10505); Stich et al. 2018 (arXiv 1809.07599). Use it inside an
    algorithm that makes up for its bias, such as ByzEF21SGDM. `PerTensor` and `PerShard` choose K
    of every tensor's, or shard's, coordinates instead.
    """

    def pick(self, x: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        return largest(x, count)

    def encode_difference(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> Payload:
        index = largest(x, self.count(len(x)), minus=y)
        return x[index] - y[index], index.to(_index_dtype(len(x)))

    @property
    def tells_nonfinite(self) -> bool:
        return True  # nothing is larger

    def contraction(self, dim: int) -> float:
        return self.count(dim) / dim


@dataclass(frozen=True)
class _Random(_Sparse):
    """Keeps K coordinates drawn at random, every subset equally likely."""

    def pick(self, x: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            raise ValueError(
                f"{type(self).__name__} draws its coordinates from a generator. Found "
                "generator=None. Pass torch.Generator().manual_seed(...), or "
                "round.private('compressor') inside an algorithm."
            )
        # A permutation of 11 million costs 40 times the draw of 1% of them, so draw, drop
        # repetitions, and draw again.
        if 4 * count > len(x):
            return (
                torch.randperm(len(x), generator=generator, device=generator.device)[:count]
                .sort()
                .values.to(x.device)
            )
        picked = torch.empty(0, dtype=torch.int64, device=generator.device)
        while len(picked) < count:
            more = torch.randint(
                len(x),
                (2 * (count - len(picked)) + 8,),
                generator=generator,
                device=generator.device,
            )
            picked = torch.cat([picked, more])
            values, inverse = torch.unique(picked, return_inverse=True)
            # A coordinate counts where it was first drawn, so that the first K different ones are a
            # fair sample.
            first = torch.full_like(values, len(picked)).scatter_reduce_(
                0, inverse, torch.arange(len(picked), device=picked.device), "amin"
            )
            picked = picked[first.sort().values]
        return picked[:count].sort().values.to(x.device)


@dataclass(frozen=True)
class RandK(_Random):
    """Keeps K coordinates drawn at random, times d / K: unbiased, omega = d / K - 1. For MARINA and
    DIANA, not for error feedback.

    Konecny et al. 2016 (arXiv 1610.05492), random masks.
    """

    def scale(self, dim: int) -> float:
        return dim / self.count(dim)

    def variance(self, dim: int) -> float:
        return dim / self.count(dim) - 1


@dataclass(frozen=True)
class ContractiveRandK(_Random):
    """Keeps K coordinates drawn at random, as they are: biased, contractive with alpha = K / d. For
    error feedback.

    Stich et al., NeurIPS 2018 (arXiv 1809.07599).
    """

    def contraction(self, dim: int) -> float:
        return self.count(dim) / dim
