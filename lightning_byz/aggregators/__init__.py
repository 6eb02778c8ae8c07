"""Aggregators: robust rules from n vectors to one, and the pre-aggregations that go before them."""

from lightning_byz.aggregators.base import Aggregator, PreAggregator, Rule, TooFewRowsError, WeightedAggregator
from lightning_byz.aggregators.chain import Chain
from lightning_byz.aggregators.coordinate_wise import CoordinateMedian, Mean, TrimmedMean
from lightning_byz.aggregators.krum import Krum, MultiKrum
from lightning_byz.aggregators.nearest_neighbor_mixing import NNM

__all__ = [
    "NNM",
    "Aggregator",
    "Chain",
    "CoordinateMedian",
    "Krum",
    "Mean",
    "MultiKrum",
    "PreAggregator",
    "Rule",
    "TooFewRowsError",
    "TrimmedMean",
    "WeightedAggregator",
]
