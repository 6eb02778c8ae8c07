"""Order statistics in C: every column of a few rows, in one pass over memory.

`build` compiles ``columns.c`` with the package; where no C compiler was there, PyTorch's operations
give the same numbers, at a tenth of the speed.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_byz.numerics.kernels.build import INSTRUCTIONS, library
from lightning_byz.numerics.networks import pruned_network

log = logging.getLogger("lightning_byz")

MOST_ROWS = 256
"""More rows than these are left to PyTorch."""

MIDDLE, MEAN, NEAREST_TO_MIDDLE, NEAREST_TO_MEAN, VOTE = range(5)
"""What becomes of a column, as ``columns.c`` numbers it."""

ODD_INPUT, ODD_RESULT = 1, 2
"""What it says of numbers: some of the rows', or some of the result's, are nan or inf."""

_SHARE = 2**21
"""Numbers of the rows that are worth a thread."""

_ON = True


@contextmanager
def switched_off() -> Iterator[None]:
    """Inside, PyTorch's operations do all the work: to compare the two."""
    global _ON
    before, _ON = _ON, False
    try:
        yield
    finally:
        _ON = before


def fits(rows: Sequence[Tensor]) -> bool:
    """Whether these vectors ``[c]``, of one length and dtype, can be reduced here."""
    first = rows[0]
    return (
        _ON
        and not torch.compiler.is_compiling()
        and 1 <= len(rows) <= MOST_ROWS
        and first.device.type == "cpu"
        and first.stride(-1) == 1
        and not (torch.is_grad_enabled() and any(row.requires_grad for row in rows))
        and _library(str(first.dtype).removeprefix("torch.")) is not None
    )


def reduce_columns(
    rows: Sequence[Tensor],
    out: Tensor,
    what: int,
    first: int = 0,
    last: int = 0,
    keep: int = 0,
    tie: float = 0.0,
) -> int:
    """One number for every column of vectors that `fits` allows.

    Args:
        rows: n vectors ``[c]``.
        out: ``[c]``, where the numbers go.
        what: one of `MIDDLE`, `MEAN`, `NEAREST_TO_MIDDLE`, `NEAREST_TO_MEAN`, `VOTE`.
        first: the first sorted value that a mean counts.
        last: the one behind the last.
        keep: how many of the nearest values a mean counts.
        tie: what a divided vote gives.

    Returns:
        `ODD_INPUT` and `ODD_RESULT`, added up, where they hold.
    """
    n, count = len(rows), len(out)
    size = rows[0].element_size()
    places = (ctypes.c_void_p * n)(*(row.data_ptr() for row in rows))
    network = _network(n, what, first, last)
    threads = max(1, min(torch.get_num_threads(), n * count * size // (4 * _SHARE)))
    columns = _library(str(out.dtype).removeprefix("torch."))
    assert columns is not None
    return int(
        columns(
            *(places, n, count, network.ctypes.data, len(network)),
            *(what, first, last, keep, tie, out.data_ptr(), threads),
        )
    )


@cache
def _network(n: int, what: int, first: int, last: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The comparators that a reduction of n rows needs, ``[m, 3]``."""
    if what == VOTE:
        return np.empty((0, 3), dtype=np.int32)
    first, last = {MIDDLE: ((n - 1) // 2, n // 2 + 1), MEAN: (first, last)}.get(what, (0, n))
    network = pruned_network(n, first, last, ordered=False)
    return np.array(
        [(low, high, keep_low + 2 * keep_high) for low, high, keep_low, keep_high in network],
        dtype=np.int32,
    ).reshape(-1, 3)


@cache
def _library(dtype: str) -> Any:
    """The C function for a dtype; None if it was not built, or this processor cannot run it."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    names = [*INSTRUCTIONS]
    for instructions in names[names.index(best) if best in names else -1 :]:
        path = Path(__file__).parent / library(dtype, instructions)
        if path.exists():
            try:
                columns = ctypes.CDLL(str(path)).columns
            except OSError as error:
                log.info(f"lightning_byz: {path.name} cannot be loaded: {error}")
                continue
            columns.restype = ctypes.c_int
            columns.argtypes = [
                *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
                *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32),
                *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
                *(ctypes.c_double, ctypes.c_void_p, ctypes.c_int64),
            ]
            return columns
    if dtype == "float32":
        log.info(
            "lightning_byz: medians and trimmed means run without compiled kernels, at a tenth of "
            "their speed, because no C compiler was there when the package was installed. Install "
            "one (gcc or clang), and then the package again."
        )
    return None
