"""Which tensors of an algorithm's state have a number for every coordinate: the one place that
knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def check_state(state: Any, owner: str, before: Any = None) -> None:
    """Raises unless an algorithm's state is a NamedTuple of tensors, of the shapes and dtypes that
    it had before.

    Args:
        state: what a half of the algorithm gave.
        owner: which method of which algorithm, for the message.
        before: the state of the round before; None: this is the first one.
    """
    if not isinstance(state, tuple) or not hasattr(state, "_asdict"):
        raise TypeError(
            f"{owner} should return a state that is a NamedTuple of tensors. Found "
            f"{type(state).__name__}."
        )
    for name, value in state._asdict().items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{owner} should return a state that is a NamedTuple of tensors. Found {name}: "
                f"{type(value).__name__}. Use torch.tensor(...) for numbers."
            )
    if before is None:
        return
    kinds = [
        {name: (tuple(t.shape), t.dtype) for name, t in each._asdict().items()}
        for each in (before, state)
    ]
    if kinds[0] != kinds[1]:
        raise TypeError(
            f"{owner} should return a state like the one that it was given: {kinds[0]}. Found "
            f"{kinds[1]}."
        )


def check_kept(state: Any, gradient: Tensor, owner: str) -> None:
    """Raises if a state holds the gradient that it was made of, whose memory the next round uses
    again.
    """
    for name, value in state._asdict().items():
        if (
            value.numel()
            and value.untyped_storage().data_ptr() == gradient.untyped_storage().data_ptr()
        ):
            raise ValueError(
                f"{owner} keeps the gradient that it was given in its state: {name}. Its memory "
                "is used again in the next round. Keep a copy: grads.current.clone()."
            )


def piece_of(
    state: Any, first: int, last: int, dim: int, columns: Sequence[bool] | None = None
) -> Any:
    """The state in the columns first .. last - 1: views.

    Args:
        state: a NamedTuple of tensors, such as ``[d]`` or ``[n, d]``.
        first: the first column.
        last: the column behind the last one.
        dim: d.
        columns: from `columns_of`; None: tensors whose last dimension is ``dim``.
    """
    cut = [t.ndim > 0 and t.shape[-1] == dim for t in state] if columns is None else columns
    return type(state)(
        *(t[..., first:last] if here else t for t, here in zip(state, cut, strict=True))
    )


def copied(state: Any) -> Any:
    """A state with tensors of its own; None stays None."""
    return None if state is None else type(state)(*(tensor.clone() for tensor in state))


def restored(fresh: Any, saved: Mapping[str, Tensor], owner: str) -> Any:
    """A state with the numbers of a checkpoint.

    Args:
        fresh: a state of the same kind.
        saved: its tensors by name.
        owner: whose it is, for the error.

    Raises:
        ValueError: if names or shapes differ.
    """
    check_shapes(
        {name: tuple(value.shape) for name, value in fresh._asdict().items()}, saved, owner
    )
    tensors = (saved[name].to(now, copy=True) for name, now in fresh._asdict().items())
    return type(fresh)(*tensors)  # with memory of its own, for it may be written into


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]], saved: Mapping[str, Tensor], owner: str
) -> None:
    """Raises ValueError unless a checkpoint's state has these tensors."""
    found = {name: tuple(value.shape) for name, value in saved.items()}
    if shapes != found:
        raise ValueError(
            f"The checkpoint's state of the {owner} should have the tensors {dict(shapes)}. Found "
            f"{found}. It belongs to another algorithm, or to other settings of it. Use the "
            "settings that the checkpoint was written with, or start a new run from its weights: "
            "Model.load_from_checkpoint(path)."
        )
