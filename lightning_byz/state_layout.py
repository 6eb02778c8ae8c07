"""Which tensors of an algorithm's state have a number for every coordinate: the one place that knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def columns_of(init: Callable[[Tensor], Any], dim: int, dtype: torch.dtype) -> tuple[bool, ...]:
    """For every tensor of a state, whether its last dimension is that of the coordinates.

    It is, if it grows with the number of coordinates. No memory is taken to find out.

    Args:
        init: makes the state for parameters ``[d]``.
        dim: d.
        dtype: of the parameters.
    """
    now, longer = (init(torch.empty(d, dtype=dtype, device="meta")) for d in (dim, dim + 1))
    return tuple(a.shape != b.shape for a, b in zip(now, longer, strict=True))


def piece_of(state: Any, first: int, last: int, dim: int, columns: Sequence[bool] | None = None) -> Any:
    """The state in the columns first .. last - 1: views.

    Args:
        state: a NamedTuple of tensors, such as ``[d]`` or ``[n, d]``.
        first: the first column.
        last: the column behind the last one.
        dim: d.
        columns: from `columns_of`; None: tensors whose last dimension is ``dim``.
    """
    cut = [t.ndim > 0 and t.shape[-1] == dim for t in state] if columns is None else columns
    return type(state)(*(t[..., first:last] if here else t for t, here in zip(state, cut, strict=True)))
