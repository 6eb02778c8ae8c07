"""What the training steps of several workers return, as one step's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def joined(values: Sequence[Any]) -> Any:
    """The workers' values as the value of the whole batch.

    Tensors of one sample a row are concatenated, numbers in tensors without a dimension are
    averaged, lists are put one behind the other, dicts and tuples are joined entry by entry. Of
    anything else the first one is taken.

    Args:
        values: one for each worker that has one, at least one.
    """
    first = values[0]
    if len(values) == 1:
        return first
    if all(isinstance(value, Tensor) for value in values):
        shapes = {(value.ndim, value.shape[1:]) for value in values}
        if len(shapes) > 1:
            return first
        if first.ndim:
            return torch.cat(list(values))
        mean = torch.stack([value.detach() for value in values]).double().mean()
        return mean.to(first.dtype) if first.is_floating_point() else mean
    if all(isinstance(value, Mapping) for value in values):
        names = [name for name in first if all(name in value for value in values)]
        return {**first, **{name: joined([value[name] for value in values]) for name in names}}
    if all(isinstance(value, list) for value in values):
        return [item for value in values for item in value]
    if all(type(value) is tuple and len(value) == len(first) for value in values):
        return tuple(joined(parts) for parts in zip(*values, strict=True))
    return first
