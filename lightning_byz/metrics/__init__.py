"""Metrics: what survived of the honest workers' direction."""

from lightning_byz.metrics.functional import cosine_to_honest_mean, relative_error

__all__ = ["cosine_to_honest_mean", "relative_error"]
