"""Metrics: what survived of the honest workers' direction, whom a rule dropped, and what it cost.

Pure functions of one round are in `lightning_byz.metrics.functional`; the classes here are torchmetrics' Metrics over many rounds.
"""

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
