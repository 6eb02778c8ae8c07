"""No compression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lightning_byz.compressors.base import Compressor, Field
from lightning_byz.types import Payload


@dataclass(frozen=True)
class Identity(Compressor):
    """Sends the vector as it is: alpha = 1, omega = 0. No paper: no compression."""

    @property
    def tells_nonfinite(self) -> bool:
        return True

    @property
    def coordinate_wise(self) -> bool:
        return True

    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        return (Field((dim,), dtype),)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        return (x,)

    def decode(self, payload: Payload, dim: int) -> Tensor:
        return payload[0]

    def part(self, dim: int, first: int, last: int) -> Identity:
        return self

    def split(self, payload: Payload, dim: int, bounds: Sequence[int]) -> list[Payload]:
        return [(payload[0][first:last],) for first, last in pairwise(bounds)]

    def contraction(self, dim: int) -> float:
        return 1.0

    def variance(self, dim: int) -> float:
        return 0.0
