"""Small integers packed side by side into bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

NUMPY_DTYPES = (torch.float16, torch.float32, torch.float64)
"""The floating-point numbers that numpy knows: it compares them and packs bits several times as
fast as torch does on a CPU.
"""

_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}
"""By the width of a code: the word whose bytes hold one code each, as many as one packed byte does.
"""


def packed_bytes(count: int, width: int) -> int:
    """Bytes that ``count`` integers of ``width`` bits take: whole 32-bit words."""
    return -(-count * width // 32) * 4


def pack_bits(values: Tensor, width: int) -> Tensor:
    """Packs integers ``[count]`` in 0 .. 2^width - 1 into bytes, uint8 ``[packed_bytes]``, the
    first one into the lowest bits.

    Args:
        values: uint8 or bool ``[count]``.
        width: bits of each, 1, 2, 4 or 8.
    """
    per_byte = 8 // width
    padding = packed_bytes(len(values), width) * per_byte - len(values)
    codes = values.view(torch.uint8) if values.dtype == torch.bool else values.to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, padding)) if padding else codes.contiguous()
    if per_byte == 1:
        return codes
    if width == 1 and codes.device.type == "cpu":
        return torch.from_numpy(np.packbits(codes.numpy(), bitorder="little"))
    # A product with sum_i 2^(8 (p - 1) - (8 - w) i) moves code i of p, at bit 8 i, to bit w i of
    # the word's highest byte, and nothing else there: all the shifts that two codes could meet by
    # are different.
    words, top = codes.view(_WORDS[width]), 8 * (per_byte - 1)
    return ((words * sum(1 << (top - (8 - width) * i) for i in range(per_byte))) >> top).to(
        torch.uint8
    )


def pack_signs(x: Tensor) -> Tensor:
    """A bit for each number of ``x [d]``, 1 where it is below 0, uint8 ``[packed_bytes]``."""
    on_cpu = x.device.type == "cpu" and x.dtype in NUMPY_DTYPES
    return pack_bits(torch.from_numpy(x.detach().numpy() < 0) if on_cpu else x < 0, 1)


def cut_bits(packed: Tensor, width: int, first: int, last: int) -> Tensor:
    """Integers first .. last - 1 of those that `pack_bits` packed, packed, without a copy; first is
    a multiple of 32.
    """
    start = first * width // 8 if first < last else 0
    return packed[start : start + packed_bytes(last - first, width)]


def can_cut(count: int, first: int, last: int) -> bool:
    """Whether `cut_bits` can cut first .. last - 1 out of ``count`` packed integers: whole words,
    or nothing.
    """
    return first == last or (first % 32 == 0 and (last % 32 == 0 or last == count))


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """The ``count`` integers that `pack_bits` packed, uint8 ``[count]``."""
    per_byte, mask = 8 // width, (1 << width) - 1
    shares = torch.stack([(packed >> (i * width)) & mask for i in range(per_byte)], dim=1)
    return shares.view(-1)[:count]


def look_up_bits(
    packed: Tensor, width: int, count: int, meaning: Tensor, out: Tensor | None = None
) -> Tensor:
    """``meaning[code]`` for each of the ``count`` codes that `pack_bits` packed, ``[count]``, in
    ``out`` if there is one.

    One look-up per byte, in a table of all 256: four times as fast as unpacking codes and computing
    with them.

    Args:
        packed: from `pack_bits`.
        width: bits of a code.
        count: number of codes.
        meaning: ``[2^width]``, what each code stands for.
        out: contiguous ``[count]``.
    """
    per_byte = 8 // width
    table, codes = meaning[_codes_of_bytes(width, packed.device)], packed.int()
    if out is not None and count == len(packed) * per_byte:
        torch.index_select(table, 0, codes, out=out.view(-1, per_byte))
        return out
    found = table.index_select(0, codes).view(-1)[:count]
    return found if out is None else out.copy_(found)


@cache
def _codes_of_bytes(width: int, device: torch.device) -> Tensor:
    """``[256, 8 / width]``: the codes in every byte."""
    every_byte = torch.arange(256, dtype=torch.uint8, device=device)
    return unpack_bits(every_byte, width, 256 * 8 // width).int().view(256, 8 // width)


def at_least(rows: Sequence[Tensor], count: int) -> Tensor:
    """The bits that are set in ``count >= 1`` of the rows or more, uint8 ``[bytes]``; nothing is
    unpacked.

    The rows are added up bit by bit: plane i holds bit i of all the sums, 32 of them in a word, so
    that a row costs two operations on words for every plane that its carry reaches; the sums are
    then compared with ``count`` from the highest plane down.

    Args:
        rows: packed bits of equal size, a multiple of 4 bytes.
        count: how many rows it takes.
    """
    if len(rows[0]) == 0:  # an empty slice may start anywhere, and cannot be viewed as words
        return rows[0].clone()
    words = [row.contiguous().view(torch.int32) for row in rows]
    planes: list[Tensor] = []
    for carry in words:
        for i, plane in enumerate(planes):
            planes[i], carry = plane ^ carry, plane & carry
        if len(planes) < len(words).bit_length():
            planes.append(carry)
    more, equal = torch.zeros_like(words[0]), torch.full_like(words[0], -1)
    for i in range(max(len(planes), count.bit_length()) - 1, -1, -1):
        plane = planes[i] if i < len(planes) else torch.zeros_like(more)
        if count >> i & 1:
            equal &= plane
        else:
            more |= equal & plane
            equal &= ~plane
    return (more | equal).view(torch.uint8)
