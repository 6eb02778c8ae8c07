"""No compression."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byz.compressors.base import Compressor, Field
from lightning_byz.types import Payload


@dataclass(frozen=True)
class Identity(Compressor):
    """Sends the vector as it is: alpha = 1, omega = 0. No paper: no compression."""

    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        return (Field((dim,), dtype),)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        return (x,)

    def decode(self, payload: Payload, dim: int) -> Tensor:
        return payload[0]

    def contraction(self, dim: int) -> float:
        return 1.0

    def variance(self, dim: int) -> float:
        return 0.0
