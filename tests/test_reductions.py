"""What ranks report is reduced without what is not finite."""

from __future__ import annotations

import lightning.pytorch  # noqa: F401  # says which rank this is, for warnings
import pytest
import torch
from torch import Tensor

from lightning_byz.strategies.reductions import MetricReducer

VALUES = torch.tensor([1.0, torch.nan, 4.0, -torch.inf])


def reduced(reducer: MetricReducer, values: Tensor, how: str) -> Tensor:
    """What rank 0 gets of the values of all ranks."""
    return reducer.reduce(values[0], how, lambda mine: list(values))


@pytest.mark.filterwarnings("ignore:byzantine_robust. 2 of 4 values")
@pytest.mark.parametrize(
    ("how", "expected"), [("mean", 2.5), ("sum", 5.0), ("max", 4.0), ("min", 1.0)]
)
def test_values_that_are_not_finite_are_left_out(how: str, expected: float) -> None:
    assert float(reduced(MetricReducer(), VALUES, how)) == expected


@pytest.mark.filterwarnings("ignore:byzantine_robust. 2 of 4 values")
def test_with_their_weight() -> None:
    """Lightning reduces a mean as a value times its batch size, and then the sizes."""
    reducer, sizes = MetricReducer(), torch.tensor([2, 100, 6, 100])
    total = reduced(reducer, VALUES * sizes, "mean")
    size = reduced(reducer, sizes, "mean")
    assert float(total / size) == (1 * 2 + 4 * 6) / (2 + 6)
