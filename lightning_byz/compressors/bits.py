"""Small integers packed side by side into bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(count: int, width: int) -> int:
    """Bytes that ``count`` integers of ``width`` bits take: whole 32-bit words."""
    return -(-count * width // 32) * 4


def pack_bits(values: Tensor, width: int) -> Tensor:
    """Packs integers ``[count]`` in 0 .. 2^width - 1 into bytes, uint8 ``[packed_bytes]``, the first one into the lowest bits.

    Args:
        values: uint8 or bool ``[count]``.
        width: bits of each, 1, 2, 4 or 8.
    """
    per_byte = 8 // width
    padded = values.new_zeros(packed_bytes(len(values), width) * per_byte, dtype=torch.uint8)
    padded[: len(values)] = values
    shares = padded.view(-1, per_byte)
    out = shares[:, 0].clone()
    for i in range(1, per_byte):
        out |= shares[:, i] << (i * width)
    return out


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """The ``count`` integers that `pack_bits` packed, uint8 ``[count]``."""
    per_byte, mask = 8 // width, (1 << width) - 1
    shares = torch.stack([(packed >> (i * width)) & mask for i in range(per_byte)], dim=1)
    return shares.view(-1)[:count]
