"""How far an aggregate is from the honest mean, and whom a rule has dropped: pure functions of
tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def _in_units(*tensors: Tensor) -> tuple[float, list[Tensor]]:
    """A power of two, and the tensors in float64 divided by it, so that their squares neither
    overflow nor vanish.

    It is 1 where no number is float64, for squares of the others do neither, and where all are of
    an ordinary size.
    """
    if all(tensor.dtype != torch.float64 for tensor in tensors):
        return 1.0, [tensor.double() for tensor in tensors]
    largest = (
        max(float(tensor.abs().max()) for tensor in tensors if tensor.numel())
        if any(map(len, tensors))
        else 0.0
    )
    ordinary = not largest or not math.isfinite(largest) or 2.0**-200 < largest < 2.0**200
    unit = 1.0 if ordinary else 2.0 ** max(-1000, math.frexp(largest)[1])
    return unit, [tensor.double() if unit == 1 else tensor.double() / unit for tensor in tensors]


def cosine_to_honest_mean(aggregate: Tensor, honest: Tensor) -> Tensor:
    """The cosine of the angle between an aggregate ``[d]`` and the mean of the honest rows
    ``[h, d]``; 0 if either is 0.
    """
    _, (aggregate,) = _in_units(aggregate)  # each in a unit of its own: no length matters
    mean = _in_units(honest)[1][0].mean(0)
    norms = torch.linalg.vector_norm(aggregate) * torch.linalg.vector_norm(mean)
    return torch.where(norms > 0, aggregate @ mean / norms, 0.0)


def _error(aggregate: Tensor, honest: Tensor) -> Tensor:
    """``||aggregate - mean||``, of float64 numbers whose squares do not overflow."""
    error: Tensor = torch.linalg.vector_norm(aggregate - honest.mean(0))
    return error


def aggregation_error(aggregate: Tensor, honest: Tensor) -> Tensor:
    """``||aggregate - mean||`` against the mean of the honest rows ``[h, d]``, in the gradients'
    own units.
    """
    unit, (aggregate, honest) = _in_units(aggregate, honest)
    return _error(aggregate, honest) * unit


def relative_error(aggregate: Tensor, honest: Tensor) -> Tensor:
    """``||aggregate - mean|| / ||mean||`` against the mean of the honest rows ``[h, d]``; inf if
    the mean is 0 and the aggregate is not.
    """
    _, (aggregate, honest) = _in_units(aggregate, honest)
    error, norm = _error(aggregate, honest), torch.linalg.vector_norm(honest.mean(0))
    return torch.where(error == 0, 0.0, error / norm)


def spread(rows: Tensor) -> Tensor:
    """``1/h sum_i ||x_i - mean||^2`` of rows ``[h, d]``: how much the workers' gradients differ,
    noise and data together.
    """
    unit, (rows,) = _in_units(rows)
    return _spread(rows) * unit * unit


def _spread(rows: Tensor) -> Tensor:
    """The same of float64 numbers whose squares do not overflow."""
    return (rows - rows.mean(0)).square().sum(1).mean()


def empirical_kappa(aggregate: Tensor, honest: Tensor) -> Tensor:
    """``||aggregate - mean||^2 / spread`` of the honest rows ``[h, d]``: what this round needed of
    the rule's kappa.

    A rule is (f, kappa)-robust if this is at most kappa for every set of n - f rows, whatever the
    other f hold (Allouah et al., AISTATS 2023, arXiv 2302.01772). 0 if the aggregate is the honest
    mean; inf if it is not, and the honest rows are all equal.
    """
    _, (aggregate, honest) = _in_units(aggregate, honest)
    error = _error(aggregate, honest)
    return torch.where(error == 0, 0.0, error.square() / _spread(honest))


def worst_relative_error(spread: Tensor, squared_norm: Tensor, kappa: float) -> Tensor:
    """``sqrt(kappa * spread) / ||mean||``: how far f rows could have moved a (f, kappa)-robust
    rule, relative to the honest mean.

    Below 1, the aggregate has a positive inner product with the honest mean, whatever f rows hold:
    ``<A, mean> >= ||mean||^2 - ||mean|| ||A - mean||``, and ``||A - mean||^2 <= kappa * spread`` by
    definition of kappa. Above 1, f rows could have turned the step around, and the bound does not
    exclude it.

    Args:
        spread: the honest rows' `spread`, 0-d.
        squared_norm: ``||mean||^2`` of the honest rows, 0-d.
        kappa: the rule's constant (`Aggregator.kappa`).
    """
    needed = kappa * spread
    return torch.where(needed == 0, 0.0, (needed / squared_norm).sqrt())


class FilterCounts(NamedTuple):
    """Whom a rule dropped, against the truth; 0-d int64 each.

    Attributes:
        caught: Byzantine workers that were dropped.
        wronged: honest workers that were dropped.
        missed: Byzantine workers that were not dropped.
    """

    caught: Tensor
    wronged: Tensor
    missed: Tensor


def dropped(weights: Tensor) -> Tensor:
    """``[n]`` bool: the rows whose weight ``[n]`` is less than half of an equal share, 1 / (2n).
    Rules that select give 0 or much more.
    """
    return weights < 0.5 / max(1, len(weights))


def filter_counts(weights: Tensor, byzantine: Sequence[int]) -> FilterCounts:
    """Whom the weights ``[n]`` drop (see `dropped`), if these workers are the Byzantine ones."""
    out = dropped(weights)
    lying = torch.zeros_like(out)
    lying[list(byzantine)] = True
    return FilterCounts((out & lying).sum(), (out & ~lying).sum(), (~out & lying).sum())


def filter_precision(weights: Tensor, byzantine: Sequence[int]) -> Tensor:
    """The part of the dropped workers that is Byzantine; 1 if nobody was dropped, for nobody was
    wronged.
    """
    caught, wronged, _ = filter_counts(weights, byzantine)
    return torch.where(caught + wronged > 0, caught.double() / (caught + wronged), 1.0)


def filter_recall(weights: Tensor, byzantine: Sequence[int]) -> Tensor:
    """The part of the Byzantine workers that was dropped; 1 if there are none."""
    caught, _, missed = filter_counts(weights, byzantine)
    return torch.where(caught + missed > 0, caught.double() / (caught + missed), 1.0)
