"""Tensors to bytes and back, for messages whose layout the receiver already knows. Nothing is ever
unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_byz.compressors import Field

_ALIGNMENT = 8


def _offsets(layout: Sequence[Field]) -> tuple[list[int], int]:
    offsets, end = [], 0
    for field in layout:
        offsets.append(end)
        end += -(-field.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def packed_size(layout: Sequence[Field]) -> int:
    """Bytes of a packed message of this layout, every tensor padded to a multiple of 8 bytes."""
    return _offsets(layout)[1]


def pack(message: Sequence[Tensor], layout: Sequence[Field], out: Tensor) -> None:
    """Writes the tensors of a message into ``out``, uint8 ``[packed_size]``."""
    offsets, _ = _offsets(layout)
    for tensor, field, offset in zip(message, layout, offsets, strict=True):
        if tuple(tensor.shape) != field.shape or tensor.dtype != field.dtype:
            raise ValueError(
                f"A message should hold {field}. Found shape {tuple(tensor.shape)}, "
                f"{tensor.dtype}. A compressor's encode must follow its layout."
            )
        if field.nbytes:  # an empty slice may start anywhere, and cannot be viewed as another dtype
            out[offset : offset + field.nbytes].view(field.dtype).copy_(tensor.reshape(-1))


def unpack(buffer: Tensor, layout: Sequence[Field]) -> tuple[Tensor, ...]:
    """The tensors of a packed message, as views of ``buffer``, uint8 ``[packed_size]``."""
    offsets, _ = _offsets(layout)
    return tuple(
        buffer[offset : offset + field.nbytes].view(field.dtype).view(field.shape)
        if field.nbytes
        else torch.empty(field.shape, dtype=field.dtype, device=buffer.device)
        for field, offset in zip(layout, offsets, strict=True)
    )
