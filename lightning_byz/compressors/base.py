"""The compressor interface: an operator and its wire format in one object."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_byz.numerics.finite import all_finite
from lightning_byz.numerics.memory import side_by_side
from lightning_byz.types import Payload


class Field(NamedTuple):
    """Shape and dtype of one tensor of a payload."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of this tensor on the wire."""
        return math.prod(self.shape) * self.dtype.itemsize


def _listed(fields: Sequence[Any]) -> str:
    return (
        ", ".join(
            f"{list(part.shape)} of {part.dtype}" if isinstance(part, Field) else repr(part)
            for part in fields
        )
        or "none"
    )


class WireFormat(ABC):
    """What a receiver knows of a payload: its layout, whether it may be decoded, and what it stands
    for.
    """

    @abstractmethod
    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        """The shapes and dtypes of the payload of a vector of ``dim`` numbers of ``dtype``."""

    @abstractmethod
    def decode(self, payload: Payload, dim: int) -> Tensor:
        """The vector ``[dim]`` that a valid payload stands for."""

    def decode_into(self, payload: Payload, out: Tensor) -> None:
        """The same, into ``out [dim]``."""
        out.copy_(self.decode(payload, len(out)))

    def added(self, x: Tensor, payload: Payload, out: Tensor | None = None) -> Tensor:
        """``x [dim]`` plus the vector that a valid payload stands for, in ``out [dim]`` if there is
        one, which may be ``x``; else ``x`` is not modified.
        """
        return torch.add(x, self.decode(payload, len(x)), out=out)

    def entries(self, payload: Payload, dim: int) -> tuple[Tensor, Tensor]:
        """What a valid payload names, where it names some coordinates only: their indices ``[K]``,
        int64, increasing, and their numbers ``[K]``.
        """
        raise TypeError(
            f"The payloads of {self!r} name all coordinates: a wire format whose payloads are "
            "sparse should have `entries`."
        )

    def valid(self, payload: Payload, dim: int) -> Tensor:
        """Whether a payload that has this layout may be decoded: a 0-d bool tensor.

        The payload comes from a worker that may be an adversary: every claim it makes about indices
        or lengths is checked here. By default every floating-point number must be finite.
        """
        looked_at = [all_finite(t) for t in payload if t.is_floating_point() and t.numel()]
        return (
            torch.stack(looked_at).all() if looked_at else payload[0].new_ones((), dtype=torch.bool)
        )

    def which_valid(self, payloads: Sequence[Payload], dim: int) -> Tensor:
        """``[m]`` bool: which of these payloads are `valid`; those without a tensor are not.

        Vectors that lie side by side are looked at all at once first.
        """
        if type(self).valid is WireFormat.valid and all(len(payload) == 1 for payload in payloads):
            rows = side_by_side([payload[0] for payload in payloads])
            if rows is not None and rows.is_floating_point() and bool(all_finite(rows)):
                return torch.ones(len(payloads), dtype=torch.bool, device=rows.device)
        device = next((payload[0].device for payload in payloads if payload), None)
        no = torch.zeros((), dtype=torch.bool, device=device)
        return torch.stack([self.valid(payload, dim) if payload else no for payload in payloads])


class Compressor(WireFormat):
    """Maps a vector to the payload that goes on the wire, and back.

    A payload's size depends on the dimension alone, never on values, so that a receiver knows every
    shape before a byte arrives. Compressors are frozen dataclasses: they hold parameters, never
    state.
    """

    @abstractmethod
    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        """The payload of ``x [d]``; ``x`` is not modified. Random compressors draw from
        ``generator`` alone.
        """

    def check(self, payload: Payload, dim: int, dtype: torch.dtype) -> None:
        """Raises ValueError unless a payload that this has encoded, of ``dim`` numbers of
        ``dtype``, has its layout.
        """
        layout = self.layout(dim, dtype)
        found = [
            Field(tuple(part.shape), part.dtype) if isinstance(part, Tensor) else part
            for part in payload
        ]
        if found != list(layout):
            raise ValueError(
                f"`encode` of {type(self).__name__} should give the tensors that its `layout` "
                f"declares for {dim} numbers of {dtype}: {_listed(layout)}. Found {_listed(found)}."
            )

    def encode_difference(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> Payload:
        """The payload of ``x - y``; for error feedback."""
        return self.encode(x - y, generator)

    def nbytes(self, dim: int, dtype: torch.dtype) -> int:
        """Bytes of one payload."""
        return sum(field.nbytes for field in self.layout(dim, dtype))

    @property
    def sparse(self) -> bool:
        """Whether a payload lists some coordinates only, so that the sizes of its shares depend on
        where these lie.
        """
        return False

    @property
    def tells_nonfinite(self) -> bool:
        """Whether the payload of a vector that holds a nan or an inf is never valid, so that nobody
        need look at the vector.
        """
        return False

    @property
    def coordinate_wise(self) -> bool:
        """Whether the payload of a piece of the vector, cut at multiples of 32, is that piece's
        share of the payload.

        Payloads of pieces, tensor by tensor one after the other, then are the payload of the vector
        that the pieces make up.
        """
        return False

    def part(self, dim: int, first: int, last: int) -> WireFormat | None:
        """The wire format of a payload's share of coordinates first .. last - 1 of ``dim``, as of a
        vector ``[last - first]``.

        The shares of a sparse compressor's payload may be of any sizes, but tensor i of all shares,
        one after the other, is as long as tensor i of the payload; the part's layout is that of the
        largest share. None, the default: a payload cannot be cut there.

        Args:
            dim: numbers of the whole vector.
            first: where the share begins, a multiple of 32, or ``dim``.
            last: where it ends, likewise.
        """
        return None

    def split(self, payload: Payload, dim: int, bounds: Sequence[int]) -> list[Payload]:
        """The shares of a payload: that of coordinates ``bounds[i] .. bounds[i + 1] - 1`` for each
        i, where there is a `part` for it.
        """
        raise TypeError(
            f"The payloads of {self!r} cannot be split: a compressor whose `part` is not None "
            "should have a `split`."
        )

    @property
    def joins(self) -> bool:
        """Whether shares that do not lie side by side can be one payload (`join`)."""
        return self.coordinate_wise

    def join(self, shares: Sequence[Payload], widths: Sequence[int]) -> Payload:
        """One payload of shares that `split` has made: of a vector in which their coordinates lie
        one after the other.

        Args:
            shares: at least one.
            widths: how many coordinates each is of.
        """
        return tuple(torch.cat(parts) for parts in zip(*shares, strict=True))

    def for_sizes(self, sizes: Sequence[int]) -> Compressor:
        """The same compressor for vectors that are laid out as tensors of these numbers of
        elements, one after the other.

        The strategy asks for it once it knows the model. Only compressors that treat tensors
        separately care.
        """
        return self

    def contraction(self, dim: int) -> float | None:
        """Alpha with ``E ||C(x) - x||^2 <= (1 - alpha) ||x||^2``, or None if this compressor is not
        contractive.
        """
        return None

    def variance(self, dim: int) -> float | None:
        """Omega with ``E C(x) = x`` and ``E ||C(x) - x||^2 <= omega ||x||^2``, or None if this
        compressor is biased.
        """
        return None

    @property
    def contractive(self) -> bool:
        """Whether it declares a contraction, whatever the dimension: what error feedback needs."""
        return self.contraction(1) is not None

    @property
    def unbiased(self) -> bool:
        """Whether it declares a variance, whatever the dimension."""
        return self.variance(1) is not None
