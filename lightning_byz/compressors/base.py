"""The compressor interface: an operator and its wire format in one object."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_byz.finite import all_finite
from lightning_byz.types import Payload


class Field(NamedTuple):
    """Shape and dtype of one tensor of a payload."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of this tensor on the wire."""
        return math.prod(self.shape) * self.dtype.itemsize


class Compressor(ABC):
    """Maps a vector to the payload that goes on the wire, and back.

    A payload's size depends on the dimension alone, never on values, so that a receiver knows every shape before a byte
    arrives. Compressors are frozen dataclasses: they hold parameters, never state.
    """

    @abstractmethod
    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        """The shapes and dtypes of the payload of a vector of ``dim`` numbers of ``dtype``."""

    @abstractmethod
    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        """The payload of ``x [d]``; ``x`` is not modified. Random compressors draw from ``generator`` alone."""

    @abstractmethod
    def decode(self, payload: Payload, dim: int) -> Tensor:
        """The vector ``[dim]`` that a valid payload stands for."""

    def valid(self, payload: Payload, dim: int) -> Tensor:
        """Whether a payload that has this layout may be decoded: a 0-d bool tensor.

        The payload comes from a worker that may be an adversary: every claim it makes about indices or lengths is checked
        here. By default every floating-point number must be finite.
        """
        return torch.stack([all_finite(t) for t in payload if t.is_floating_point()]).all()

    def nbytes(self, dim: int, dtype: torch.dtype) -> int:
        """Bytes of one payload."""
        return sum(field.nbytes for field in self.layout(dim, dtype))

    def for_sizes(self, sizes: Sequence[int]) -> Compressor:
        """The same compressor for vectors that are laid out as tensors of these numbers of elements, one after the other.

        The strategy asks for it once it knows the model. Only compressors that treat tensors separately care.
        """
        return self

    def contraction(self, dim: int) -> float | None:
        """Alpha with ``E ||C(x) - x||^2 <= (1 - alpha) ||x||^2``, or None if this compressor is not contractive."""
        return None

    def variance(self, dim: int) -> float | None:
        """Omega with ``E C(x) = x`` and ``E ||C(x) - x||^2 <= omega ||x||^2``, or None if this compressor is biased."""
        return None

    @property
    def contractive(self) -> bool:
        """Whether it declares a contraction, whatever the dimension: what error feedback needs."""
        return self.contraction(1) is not None

    @property
    def unbiased(self) -> bool:
        """Whether it declares a variance, whatever the dimension."""
        return self.variance(1) is not None
