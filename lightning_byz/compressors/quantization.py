"""Quantization: every coordinate, in few bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor

from lightning_byz.compressors.base import Compressor, Field, WireFormat
from lightning_byz.compressors.bits import (
    can_cut,
    cut_bits,
    look_up_bits,
    pack_bits,
    pack_signs,
    packed_bytes,
    unpack_bits,
)
from lightning_byz.types import Payload


def _uniform(x: Tensor, generator: torch.Generator | None, who: Compressor) -> Tensor:
    """A number in [0, 1) for every coordinate."""
    if generator is None:
        raise ValueError(
            f"{type(who).__name__} rounds at random and draws from a generator. Found "
            "generator=None. Pass torch.Generator().manual_seed(...), or "
            "round.private('compressor') inside an algorithm."
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.rand(x.shape, generator=generator, device=generator.device, dtype=dtype).to(
        x.device
    )


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.element_size() < 4 else x


@dataclass(frozen=True)
class Sign(Compressor):
    """The sign of every coordinate, one bit each: ``sign(x)``, as in signSGD (Bernstein et al.,
    arXiv 1810.05291).

    The length is lost, so it is neither contractive nor unbiased. The sign of 0 is +1, as in the
    authors' code.
    """

    @property
    def coordinate_wise(self) -> bool:
        return True

    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        return Field((packed_bytes(dim, 1),), torch.uint8), Field((0,), dtype)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        return pack_signs(x), x.new_empty(0)

    def decode(self, payload: Payload, dim: int) -> Tensor:
        bits, like = payload
        return look_up_bits(bits, 1, dim, like.new_tensor([1.0, -1.0]))

    def decode_into(self, payload: Payload, out: Tensor) -> None:
        bits, like = payload
        look_up_bits(bits, 1, len(out), like.new_tensor([1.0, -1.0]), out=out)

    def part(self, dim: int, first: int, last: int) -> WireFormat | None:
        return self if can_cut(dim, first, last) else None

    def split(self, payload: Payload, dim: int, bounds: Sequence[int]) -> list[Payload]:
        packed, rest = payload
        return [(cut_bits(packed, 1, first, last), rest) for first, last in pairwise(bounds)]


@dataclass(frozen=True)
class ScaledSign(Compressor):
    """The sign of every coordinate, one bit each, and their mean magnitude:
    ``(||x||_1 / d) sign(x)``.

    Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019 (arXiv 1901.09847): contractive
    with alpha = ``||x||_1^2 / (d ||x||_2^2)``, at least 1 / d. The sign of 0 is +1.
    """

    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        return Field((packed_bytes(dim, 1),), torch.uint8), Field((1,), dtype)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        return pack_signs(x), _wide(x).abs().mean(0, keepdim=True).to(x.dtype)

    def decode(self, payload: Payload, dim: int) -> Tensor:
        bits, scale = payload
        return look_up_bits(bits, 1, dim, torch.cat([scale, -scale]))

    def part(self, dim: int, first: int, last: int) -> WireFormat | None:
        return self if can_cut(dim, first, last) else None

    def split(self, payload: Payload, dim: int, bounds: Sequence[int]) -> list[Payload]:
        packed, rest = payload
        return [(cut_bits(packed, 1, first, last), rest) for first, last in pairwise(bounds)]

    def contraction(self, dim: int) -> float:
        return 1 / dim


@dataclass(frozen=True)
class QSGD(Compressor):
    """Rounds ``|x_j| / ||x||_2`` at random to one of s + 1 levels 0, 1/s, ..., 1, without bias.

    Alistarh et al., NeurIPS 2017 (arXiv 1610.02132): omega <= min(d / s^2, sqrt(d) / s). The wire
    holds the norm, and sign and level of every coordinate in 2 bits for s = 1, 4 bits for s <= 7,
    else 8 bits (the paper's variable-length Elias code would make a payload's size depend on
    values).

    Args:
        levels: s, in 1 .. 127.
    """

    levels: int = 7

    def __post_init__(self) -> None:
        if not isinstance(self.levels, Integral) or not 1 <= self.levels <= 127:
            raise ValueError(
                f"`levels` should be an integer in 1 .. 127. Found levels={self.levels!r}."
            )

    @property
    def width(self) -> int:
        """Bits of a coordinate."""
        return 2 if self.levels == 1 else 4 if self.levels <= 7 else 8

    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        return Field((packed_bytes(dim, self.width),), torch.uint8), Field((1,), dtype)

    def scale(self, x: Tensor) -> Tensor:
        """The length that levels are fractions of, ``[1]``."""
        # in float32 it stops growing at some ten million numbers
        norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
        return norm.reshape(1)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        wide = _wide(x)
        scale = self.scale(wide).to(x.dtype)
        fraction = (wide.abs() / _wide(scale).clamp_min(torch.finfo(wide.dtype).tiny)).clamp_max(1)
        level = (
            (self.levels * fraction + _uniform(x, generator, self)).floor_().clamp_max_(self.levels)
        )
        code = torch.where(wide < 0, -level, level) + self.levels  # 0 .. 2s
        return pack_bits(code.to(torch.uint8), self.width), scale

    def decode(self, payload: Payload, dim: int) -> Tensor:
        codes, scale = payload
        level = (
            torch.arange(2**self.width, dtype=_wide(scale).dtype, device=scale.device) - self.levels
        )
        # never above the scale
        meaning = (level.clamp_max(self.levels) / self.levels * scale).to(scale.dtype)
        return look_up_bits(codes, self.width, dim, meaning)

    def valid(self, payload: Payload, dim: int) -> Tensor:
        return (
            super().valid(payload, dim)
            & (unpack_bits(payload[0], self.width, dim) <= 2 * self.levels).all()
        )

    def part(self, dim: int, first: int, last: int) -> WireFormat | None:
        return self if can_cut(dim, first, last) else None

    def split(self, payload: Payload, dim: int, bounds: Sequence[int]) -> list[Payload]:
        packed, rest = payload
        return [
            (cut_bits(packed, self.width, first, last), rest) for first, last in pairwise(bounds)
        ]

    def variance(self, dim: int) -> float:
        return min(dim / self.levels**2, math.sqrt(dim) / self.levels)


@dataclass(frozen=True)
class TernGrad(QSGD):
    """Rounds ``|x_j| / max |x|`` at random to 0 or 1, without bias: two bits a coordinate.

    Wen et al., NeurIPS 2017 (arXiv 1705.07878), without its gradient clipping. omega <= sqrt(d) -
    1, because ``max |x| ||x||_1 <= ||x||_2 sqrt(d) ||x||_2``.
    """

    levels: int = 1

    def __post_init__(self) -> None:
        if self.levels != 1:
            raise ValueError(
                f"TernGrad has one level. Found levels={self.levels}. Use QSGD for more."
            )

    def scale(self, x: Tensor) -> Tensor:
        largest: Tensor = torch.linalg.vector_norm(x, torch.inf) if len(x) else x.new_zeros(())
        return largest.reshape(1)

    def variance(self, dim: int) -> float:
        return math.sqrt(dim) - 1


@dataclass(frozen=True)
class NaturalCompression(Compressor):
    """Rounds every magnitude at random to one of the two powers of two around it, without bias:
    omega = 1/8.

    Horvath et al., MSML 2022 (arXiv 1905.10988). Nine bits a coordinate: sign and exponent.
    Magnitudes below 2^-126 become 0, and the largest power is 2^127, as in float32.
    """

    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        return (
            Field((dim,), torch.uint8),
            Field((packed_bytes(dim, 1),), torch.uint8),
            Field((0,), dtype),
        )

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        # |x| = mantissa * 2^exponent, mantissa in [1/2, 1)
        mantissa, exponent = torch.frexp(_wide(x).abs())
        power = exponent - 1 + (_uniform(x, generator, self) < 2 * mantissa - 1)
        code = torch.where((mantissa == 0) | (power < -126), 0, power.clamp_max(127) + 127)
        return code.to(torch.uint8), pack_signs(x), x.new_empty(0)

    def decode(self, payload: Payload, dim: int) -> Tensor:
        code, signs, like = payload
        one = torch.ones(code.shape, dtype=_wide(like).dtype, device=code.device)
        magnitude = torch.ldexp(one, code.to(torch.int32) - 127).to(like.dtype)
        sign = look_up_bits(signs, 1, dim, like.new_tensor([1.0, -1.0]))
        return torch.where(code == 0, 0, magnitude * sign)

    def valid(self, payload: Payload, dim: int) -> Tensor:
        return (payload[0] <= 254).all()

    def part(self, dim: int, first: int, last: int) -> WireFormat | None:
        return self if can_cut(dim, first, last) else None

    def split(self, payload: Payload, dim: int, bounds: Sequence[int]) -> list[Payload]:
        code, signs, like = payload
        return [
            (code[first:last], cut_bits(signs, 1, first, last), like)
            for first, last in pairwise(bounds)
        ]

    def variance(self, dim: int) -> float:
        return 1 / 8


@dataclass(frozen=True)
class BFloat16(Compressor):
    """Rounds to bfloat16: half the bytes, 8 significant bits, the range of float32. alpha = 1 -
    2^-16.

    No paper: a number format.
    """

    @property
    def coordinate_wise(self) -> bool:
        return True

    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        return Field((dim,), torch.bfloat16), Field((0,), dtype)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        largest = torch.finfo(torch.bfloat16).max
        return x.clamp(-largest, largest).to(torch.bfloat16), x.new_empty(0)

    def decode(self, payload: Payload, dim: int) -> Tensor:
        values, like = payload
        return values.to(like.dtype)

    def part(self, dim: int, first: int, last: int) -> WireFormat:
        return self

    def split(self, payload: Payload, dim: int, bounds: Sequence[int]) -> list[Payload]:
        return [(payload[0][first:last], payload[1]) for first, last in pairwise(bounds)]

    def contraction(self, dim: int) -> float:
        return 1 - 2.0**-16


@dataclass(frozen=True)
class Float16(Compressor):
    """Rounds ``x / max |x|`` to float16: half the bytes, 11 significant bits, and no overflow.
    alpha = 1 - 2^-21 - d 2^-48.

    No paper: a number format.
    """

    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        return Field((dim,), torch.float16), Field((1,), dtype)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        scale = torch.linalg.vector_norm(_wide(x), torch.inf).reshape(1).to(x.dtype)
        return (_wide(x) / _wide(scale).clamp_min(torch.finfo(_wide(x).dtype).tiny)).to(
            torch.float16
        ), scale

    def decode(self, payload: Payload, dim: int) -> Tensor:
        values, scale = payload
        return (values.to(_wide(scale).dtype) * scale).to(scale.dtype)

    def valid(self, payload: Payload, dim: int) -> Tensor:
        return super().valid(payload, dim) & (payload[0].abs() <= 1).all()

    def part(self, dim: int, first: int, last: int) -> WireFormat:
        return self

    def split(self, payload: Payload, dim: int, bounds: Sequence[int]) -> list[Payload]:
        return [(payload[0][first:last], payload[1]) for first, last in pairwise(bounds)]

    def contraction(self, dim: int) -> float:
        return 1 - 2.0**-21 - dim * 2.0**-48


@dataclass(frozen=True)
class Contractive(Compressor):
    """An unbiased compressor made contractive: ``Q(x) / (1 + omega)``, with alpha = 1 / (1 +
    omega), for error feedback.

    Beznosikov et al., JMLR 2023 (arXiv 2002.12410), show that it is.

    Args:
        inner: a compressor that declares its variance omega.
    """

    inner: Compressor

    def __post_init__(self) -> None:
        if not self.inner.unbiased:
            raise ValueError(
                f"Contractive takes an unbiased compressor, such as QSGD(). Found {self.inner!r}."
            )

    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        return self.inner.layout(dim, dtype)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        return self.inner.encode(x, generator)

    def decode(self, payload: Payload, dim: int) -> Tensor:
        return self.inner.decode(payload, dim) * self.contraction(dim)

    def entries(self, payload: Payload, dim: int) -> tuple[Tensor, Tensor]:
        index, values = self.inner.entries(payload, dim)
        return index, values * self.contraction(dim)

    def valid(self, payload: Payload, dim: int) -> Tensor:
        return self.inner.valid(payload, dim)

    @property
    def sparse(self) -> bool:
        return self.inner.sparse

    def part(self, dim: int, first: int, last: int) -> WireFormat | None:
        inner = self.inner.part(dim, first, last)
        return None if inner is None else _Shrunk(inner, self.contraction(dim))

    def split(self, payload: Payload, dim: int, bounds: Sequence[int]) -> list[Payload]:
        return self.inner.split(payload, dim, bounds)

    def for_sizes(self, sizes: Sequence[int]) -> Contractive:
        return replace(self, inner=self.inner.for_sizes(sizes))

    @property
    def contractive(self) -> bool:
        return True

    def contraction(self, dim: int) -> float:
        omega = self.inner.variance(dim)
        assert omega is not None
        return 1 / (1 + omega)


@dataclass(frozen=True)
class _Shrunk(WireFormat):
    """A share of a `Contractive` payload: its factor is that of the whole vector."""

    inner: WireFormat
    factor: float

    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        return self.inner.layout(dim, dtype)

    def decode(self, payload: Payload, dim: int) -> Tensor:
        return self.inner.decode(payload, dim) * self.factor

    def entries(self, payload: Payload, dim: int) -> tuple[Tensor, Tensor]:
        index, values = self.inner.entries(payload, dim)
        return index, values * self.factor

    def valid(self, payload: Payload, dim: int) -> Tensor:
        return self.inner.valid(payload, dim)
