"""Compressors that treat the parts of a vector separately: per tensor, per shard."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from lightning_byz.compressors.base import Compressor, Field, WireFormat
from lightning_byz.types import Payload


@dataclass(frozen=True)
class _Blocks(Compressor):
    """Compresses consecutive blocks of a vector, each as a vector of its own; a payload is the
    blocks' payloads, one after the other.

    Contractive with the least alpha of its blocks, or unbiased with their largest omega: the
    blocks' squared errors and lengths add up.
    """

    inner: Compressor

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Compressor):
            raise TypeError(
                f"`inner` of {type(self).__name__} should be a compressor, such as "
                f"TopK(ratio=0.01). Found {self.inner!r}."
            )

    @abstractmethod
    def blocks(self, dim: int) -> Sequence[int]:
        """The blocks' numbers of elements, none 0; they add up to ``dim``."""

    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        return tuple(field for size in self.blocks(dim) for field in self.inner.layout(size, dtype))

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        blocks = torch.split(x, list(self.blocks(len(x))))
        return tuple(tensor for block in blocks for tensor in self.inner.encode(block, generator))

    def encode_difference(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> Payload:
        sizes = list(self.blocks(len(x)))
        blocks = zip(torch.split(x, sizes), torch.split(y, sizes), strict=True)
        return tuple(
            tensor for a, b in blocks for tensor in self.inner.encode_difference(a, b, generator)
        )

    def _shares(self, payload: Payload, dim: int) -> Iterator[tuple[Payload, int]]:
        """Every block's payload, and its size."""
        sizes, first = self.blocks(dim), 0
        for size in sizes:
            last = first + len(payload) // len(sizes)
            yield payload[first:last], size
            first = last

    def decode(self, payload: Payload, dim: int) -> Tensor:
        return torch.cat(
            [self.inner.decode(share, size) for share, size in self._shares(payload, dim)]
        )

    def valid(self, payload: Payload, dim: int) -> Tensor:
        return torch.stack(
            [self.inner.valid(share, size) for share, size in self._shares(payload, dim)]
        ).all()

    def entries(self, payload: Payload, dim: int) -> tuple[Tensor, Tensor]:
        return _side_by_side(
            [(*self.inner.entries(share, size), size) for share, size in self._shares(payload, dim)]
        )

    @property
    def sparse(self) -> bool:
        return self.inner.sparse

    @property
    def tells_nonfinite(self) -> bool:
        return self.inner.tells_nonfinite

    def part(self, dim: int, first: int, last: int) -> WireFormat | None:
        parts, sizes = [], self.blocks(dim)
        for size, (start, end) in zip(sizes, _inside(sizes, (first, last)), strict=True):
            part = self.inner.part(size, start, end)
            if part is None:
                return None
            parts.append((part, end - start))
        return _BlockParts(tuple(parts))

    def split(self, payload: Payload, dim: int, bounds: Sequence[int]) -> list[Payload]:
        shares: list[Payload] = [()] * (len(bounds) - 1)
        for (block, size), inside in zip(
            self._shares(payload, dim), _inside(self.blocks(dim), bounds), strict=True
        ):
            shares = [
                (*share, *more)
                for share, more in zip(shares, self.inner.split(block, size, inside), strict=True)
            ]
        return shares

    def contraction(self, dim: int) -> float | None:
        return (
            None
            if not self.contractive
            else min(self.inner.contraction(size) or 0.0 for size in self.blocks(dim))
        )

    def variance(self, dim: int) -> float | None:
        return (
            None
            if not self.unbiased
            else max(self.inner.variance(size) or 0.0 for size in self.blocks(dim))
        )

    @property
    def contractive(self) -> bool:
        return self.inner.contractive

    @property
    def unbiased(self) -> bool:
        return self.inner.unbiased


def _side_by_side(blocks: Sequence[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor]:
    """The entries of a vector, given those of its blocks, and the blocks' sizes."""
    starts = accumulate((size for _, _, size in blocks), initial=0)
    index = [index + start for (index, _, _), start in zip(blocks, starts, strict=False)]
    return torch.cat(index), torch.cat([values for _, values, _ in blocks])


def _inside(sizes: Sequence[int], bounds: Sequence[int]) -> Iterator[list[int]]:
    """The bounds as seen from the beginning of each block, and no farther than its ends."""
    start = 0
    for size in sizes:
        yield [min(max(bound - start, 0), size) for bound in bounds]
        start += size


@dataclass(frozen=True)
class _BlockParts(WireFormat):
    """What of every block lies in one share of the coordinates; blocks that lie elsewhere are
    there, and empty.

    Args:
        parts: every block's format there, and how many coordinates of it.
    """

    parts: tuple[tuple[WireFormat, int], ...]

    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        return tuple(field for part, size in self.parts for field in part.layout(size, dtype))

    def _shares(self, payload: Payload) -> Iterator[tuple[WireFormat, Payload, int]]:
        each = len(payload) // len(self.parts)
        for i, (part, size) in enumerate(self.parts):
            yield part, payload[i * each : (i + 1) * each], size

    def decode(self, payload: Payload, dim: int) -> Tensor:
        return torch.cat([part.decode(share, size) for part, share, size in self._shares(payload)])

    def entries(self, payload: Payload, dim: int) -> tuple[Tensor, Tensor]:
        return _side_by_side(
            [(*part.entries(share, size), size) for part, share, size in self._shares(payload)]
        )

    def valid(self, payload: Payload, dim: int) -> Tensor:
        return torch.stack(
            [part.valid(share, size) for part, share, size in self._shares(payload)]
        ).all()


@dataclass(frozen=True)
class PerTensor(_Blocks):
    """Compresses every parameter's gradient separately: ``PerTensor(TopK(ratio=0.01))`` keeps 1% of
    each, and at least one number.

    No paper: a composition.

    Args:
        inner: the compressor of one tensor.
        sizes: the tensors' numbers of elements, in order. None: the strategy fills in those of the
            parameters that are trained.

    Raises:
        ValueError: when it is to compress without knowing the sizes, or a vector of another size.
    """

    sizes: tuple[int, ...] | None = None

    def for_sizes(self, sizes: Sequence[int]) -> PerTensor:
        inner = self.inner.for_sizes(sizes)
        return replace(self, inner=inner, sizes=tuple(sizes) if self.sizes is None else self.sizes)

    def blocks(self, dim: int) -> Sequence[int]:
        if self.sizes is None or sum(self.sizes) != dim or min(self.sizes) < 0:
            raise ValueError(
                "PerTensor should know the tensors' numbers of elements, which add up to the "
                f"vector's {dim}. Found sizes={self.sizes}. The strategy fills them in; elsewhere "
                "write compressor.for_sizes([p.numel() for p in model.parameters()])."
            )
        return [size for size in self.sizes if size > 0]


@dataclass(frozen=True)
class PerShard(_Blocks):
    """Compresses equal shares of the vector separately, so that a rank that aggregates one of them
    needs nothing of the others.

    The bounds are multiples of 32; a vector too short for that many shards has fewer. No paper: a
    composition.

    Args:
        inner: the compressor of one shard.
        shards: how many.
    """

    shards: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shards < 1:
            raise ValueError(f"`shards` should be at least 1. Found shards={self.shards}.")

    def for_sizes(self, sizes: Sequence[int]) -> PerShard:
        return replace(self, inner=self.inner.for_sizes(sizes))

    def blocks(self, dim: int) -> Sequence[int]:
        size = -(-dim // (32 * self.shards)) * 32
        return [min(size, dim - first) for first in range(0, dim, size)]
