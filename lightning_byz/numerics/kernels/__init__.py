"""What rules do with a few long rows, in C, in one pass over memory: order statistics of every
column (``columns.c``), weighted sums (``sums.c``), inner products (``products.c``), and distances
to a point (``distances.c``).

`build` compiles them with the package. Where no C compiler was there, PyTorch's operations take
their place. Order statistics of rows, and their weighted sums, then have the same bits; order
statistics take four to nine times as long. All else, order statistics of mixtures among it, is the
same to rounding, and takes about twice as long.
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
"""Numbers that are worth a thread."""

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
    if not rows:
        return False
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
    mixing: Tensor | None = None,
) -> int:
    """One number for every column of vectors that `fits` allows, or of mixtures of them.

    Args:
        rows: n vectors ``[c]``.
        out: ``[c]``, where the numbers go.
        what: one of `MIDDLE`, `MEAN`, `NEAREST_TO_MIDDLE`, `NEAREST_TO_MEAN`, `VOTE`.
        first: the first sorted value that a mean counts.
        last: the one behind the last.
        keep: how many of the nearest values a mean counts.
        tie: what a divided vote gives.
        mixing: ``[m, n]``; the columns are those of ``mixing @ rows``, m <= `MOST_ROWS`; sums run
            in the order of the rows, and what is to be multiplied by 0 is left out. None: of the
            rows.

    Returns:
        `ODD_INPUT` and `ODD_RESULT`, added up, where they hold.

    Raises:
        ValueError: if there are fewer values than are asked for, or if the mixing has another
            shape.
    """
    n = len(rows) if mixing is None else len(mixing)
    if not 1 <= n <= MOST_ROWS or (mixing is not None and mixing.shape != (n, len(rows))):
        raise ValueError(
            f"Columns should be of 1 to {MOST_ROWS} rows, or of mixtures [m, {len(rows)}] of "
            f"these. Found {len(rows) if mixing is None else list(mixing.shape)}."
        )
    means, nearest = what in (MEAN, NEAREST_TO_MEAN), what in (NEAREST_TO_MIDDLE, NEAREST_TO_MEAN)
    if (means and not 0 <= first < last <= n) or (nearest and not 1 <= keep <= n):
        raise ValueError(
            f"The mean of sorted values {first} to {last - 1}, or of the {keep} nearest ones, "
            f"should be of some of n={n} values."
        )
    terms = () if mixing is None else _terms(mixing, out.dtype)
    network = _network(n, what, first, last)
    threads = _threads(len(rows) * out.nbytes, len(rows) * n * len(out) if terms else 0)
    return int(
        _library_for(out).columns(
            *(_places(rows), len(rows)),
            *([part.data_ptr() for part in terms] or (None, None, None)),
            *(n, len(out), network.ctypes.data, len(network)),
            *(what, first, last, keep, tie, out.data_ptr(), threads),
        )
    )


def weighted_sum(rows: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> int:
    """``sum_i weights[i] * rows[i]`` of vectors ``[c]`` that `fits` allows, into ``out [c]``, added
    up in their order; returns `ODD_RESULT`, or 0.
    """
    library, factors = _library_for(out), torch.tensor(weights, dtype=torch.float64)
    odd = library.weighted_sum(
        *(_places(rows), factors.data_ptr(), len(rows), len(out), out.data_ptr()),
        _threads(len(rows) * out.nbytes),
    )
    return ODD_RESULT if odd else 0


def inner_products(rows: Sequence[Tensor]) -> Tensor:
    """``[n, n]`` float64 of n vectors ``[c]`` that `fits` allows: products in their dtype, of which
    so many are added up in it as make 2 kB of a row, and those sums in float64.

    Raises:
        MemoryError: if there is none for the sums.
    """
    n, count = len(rows), len(rows[0])
    out = torch.empty(n, n, dtype=torch.float64)
    threads = _threads(n * rows[0].nbytes, n * n * count // 2)
    if _library_for(rows[0]).products(_places(rows), n, count, out.data_ptr(), threads):
        raise MemoryError(f"There is no memory for the inner products of {n} rows.")
    return out


def squared_distances(rows: Sequence[Tensor], center: Tensor | None) -> Tensor:
    """``[n]`` float64 ``||rows[i] - center||^2``, of n vectors ``[c]`` that `fits` allows, to a
    vector ``[c]`` of their kind, or to the origin. So many squares are added up in their dtype as
    make 16 kB of a row, and those sums in float64.

    Raises:
        MemoryError: if there is none for the sums.
    """
    n = len(rows)
    out = torch.empty(n, dtype=torch.float64)
    if _library_for(rows[0]).squares(
        *(_places(rows), n, len(rows[0]), None if center is None else center.data_ptr()),
        *(out.data_ptr(), _threads(n * rows[0].nbytes)),
    ):
        raise MemoryError(f"There is no memory for the squared norms of {n} rows.")
    return out


def _terms(mixing: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``mixing [m, n]`` what is not 0: where each mixture begins and ends ``[m + 1]``, and the
    rows and weights of all, one mixture after the other.
    """
    mixing = mixing.cpu()
    owners, places = mixing.nonzero(as_tuple=True)
    starts = torch.zeros(len(mixing) + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(owners, minlength=len(mixing)), 0, out=starts[1:])
    return starts, places.contiguous(), mixing[owners, places].to(dtype)


def _places(rows: Sequence[Tensor]) -> Any:
    """Where rows begin in memory, for C."""
    return (ctypes.c_void_p * len(rows))(*(row.data_ptr() for row in rows))


def _threads(size: int, products: int = 0) -> int:
    """How many threads it is worth to read so many bytes, or to multiply so many numbers."""
    worth = max(size // (4 * _SHARE), products // _SHARE)
    return max(1, min(torch.get_num_threads(), worth))


def _library_for(tensor: Tensor) -> Any:
    library = _library(str(tensor.dtype).removeprefix("torch."))
    assert library is not None
    return library


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
    """The C functions for a dtype; None if they were not built, or this processor cannot run
    them.
    """
    best = torch.backends.cpu.get_cpu_capability().lower()
    names = [*INSTRUCTIONS]
    for instructions in names[names.index(best) if best in names else -1 :]:
        path = Path(__file__).parent / library(dtype, instructions)
        if path.exists():
            try:
                return opened(path)
            except (OSError, AttributeError) as error:
                log.info(f"lightning_byz: {path.name} cannot be loaded: {error}")
    if dtype == "float32":
        log.info(
            "lightning_byz: rules run without compiled kernels, so that medians and trimmed means "
            "take four to nine times as long, because no C compiler was there when the package "
            "was installed, or its sources have changed since. Install gcc or clang, and then the "
            "package again."
        )
    return None


def opened(path: Path) -> Any:
    """The C functions of a library."""
    found, place, integer = ctypes.CDLL(str(path)), ctypes.c_void_p, ctypes.c_int64
    found.columns.argtypes = [
        *(place, integer, place, place, place, integer, integer),
        *(place, integer, ctypes.c_int32, integer, integer, integer),
        *(ctypes.c_double, place, integer),
    ]
    found.products.argtypes = [place, integer, integer, place, integer]
    found.squares.argtypes = [place, integer, integer, place, place, integer]
    found.weighted_sum.argtypes = [place, place, integer, integer, place, integer]
    return found
