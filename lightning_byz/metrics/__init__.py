"""Metrics: what survived of the honest workers' direction, whom a rule dropped, and what it cost.

`functional` holds pure functions of one round; `modular` holds torchmetrics' Metrics over many
rounds, which import torchmetrics with the first of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_byz.metrics.functional import (
    aggregation_error,
    cosine_to_honest_mean,
    dropped,
    empirical_kappa,
    filter_counts,
    filter_precision,
    filter_recall,
    relative_error,
    spread,
    worst_relative_error,
)

if TYPE_CHECKING:
    from lightning_byz.metrics.modular import (
        AggregationError,
        CosineToHonestMean,
        EmpiricalKappa,
        FilterPrecision,
        FilterRecall,
        RelativeError,
        Traffic,
    )

__all__ = [
    "AggregationError",
    "CosineToHonestMean",
    "EmpiricalKappa",
    "FilterPrecision",
    "FilterRecall",
    "RelativeError",
    "Traffic",
    "aggregation_error",
    "cosine_to_honest_mean",
    "dropped",
    "empirical_kappa",
    "filter_counts",
    "filter_precision",
    "filter_recall",
    "relative_error",
    "spread",
    "worst_relative_error",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("lightning_byz.metrics.modular"), name)
