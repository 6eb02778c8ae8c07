"""Reductions over workers or ranks: what ``reduce_fx`` and ``reduce_op`` name, over the values that
are finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_byz.strategies.validate import warn


class Reduction(NamedTuple):
    """A reduction over the first dimension.

    Attributes:
        name: as PyTorch and Lightning call it.
        of: from values ``[n, ...]`` to their reduction ``[...]``.
        neutral: the value that changes nothing, in place of one that is left out.
    """

    name: str
    of: Callable[[Tensor], Tensor]
    neutral: float


def _mean(values: Tensor) -> Tensor:
    total = values.sum(0)
    # integers stay integers, as in DDP
    return total / len(values) if total.is_floating_point() else total // len(values)


REDUCTIONS = {
    reduction.name: reduction
    for reduction in (
        Reduction("mean", _mean, 0.0),
        Reduction("sum", lambda values: values.sum(0), 0.0),
        Reduction("max", lambda values: values.amax(0), -torch.inf),
        Reduction("min", lambda values: values.amin(0), torch.inf),
        Reduction("product", lambda values: values.prod(0), 1.0),
    )
}

_FUNCTIONS = {
    torch.mean: "mean",
    torch.sum: "sum",
    torch.max: "max",
    torch.min: "min",
    sum: "sum",
    max: "max",
    min: "min",
}


def reduction(how: Any) -> Reduction | None:
    """The reduction of this name, in capitals or not, or that a function or a ``ReduceOp`` of
    PyTorch stands for; None if there is none.

    ``"avg"`` is the mean. Of functions these are known: `torch.mean`, `torch.sum`, `torch.max`,
    `torch.min`, and Python's ``sum``, ``max`` and ``min``, as in ``LightningModule.log``.
    """
    if callable(how) and not hasattr(how, "name"):
        return REDUCTIONS.get(_FUNCTIONS.get(how, ""))
    name = str(getattr(how, "name", how)).lower().removeprefix("redoptype.").rpartition(".")[2]
    return REDUCTIONS.get("mean" if name == "avg" else name)


def is_finite(values: Tensor) -> Tensor:
    """Which values are neither nan nor infinite; integers all are."""
    return (
        torch.isfinite(values)
        if values.is_floating_point()
        else torch.ones_like(values, dtype=torch.bool)
    )


def over_finite(values: Tensor, how: Reduction) -> Tensor:
    """The reduction of ``values [n, ...]`` over those that are finite, element by element.

    Where none is, the mean is nan, and another reduction gives the first value. The dtype is kept.
    """
    finite = is_finite(values)
    if bool(finite.all()):
        return how.of(values).to(values.dtype)
    count = finite.sum(0)
    kept = torch.where(finite, values, how.neutral)
    if how.name == "mean":
        return kept.sum(0) / count
    return torch.where(count > 0, how.of(kept), values[0])


class MetricReducer:
    """Reduces tensors over ranks, and remembers what Lightning's two calls for a mean have in
    common.

    Lightning reduces a metric's mean in two calls: the sum of the values, then that of their
    weights, an integer. So the mean of an integer right after one of floating-point numbers is over
    the ranks whose number was finite, and exact.
    """

    def __init__(self) -> None:
        # which values were finite; their dtype
        self._weighed: tuple[Tensor, torch.dtype] | None = None

    def reduce(
        self, tensor: Tensor, reduce_op: Any, gather: Callable[[Tensor], list[Tensor]]
    ) -> Tensor:
        """The reduction over all ranks, leaving out values that are nan or inf if there are others.

        Args:
            tensor: this rank's.
            reduce_op: see `reduction`.
            gather: from this rank's tensor to those of all ranks.

        Raises:
            ValueError: for a reduction that is not known.
        """
        how = reduction(reduce_op)
        if how is None:
            raise ValueError(
                f"`reduce_op` should be one of mean, sum, max, min, product. Found {reduce_op!r}."
            )
        values = torch.stack(gather(tensor))
        finite, weighed, self._weighed = is_finite(values), self._weighed, None
        if not bool(finite.all()):
            warn(
                f"byzantine_robust: {int((~finite).sum())} of {len(values)} values of a reduction "
                "were not finite and left out."
            )
        if how.name != "mean":
            return over_finite(values, how)
        if values.is_floating_point():
            self._weighed = (finite, values.dtype)
        elif weighed is not None and weighed[0].shape == values.shape:
            total = torch.where(weighed[0], values, 0).sum(0).double()
            return (total / weighed[0].sum(0)).to(weighed[1])
        return over_finite(values, how)
