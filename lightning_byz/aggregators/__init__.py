"""Aggregators: robust rules from n vectors to one, and the pre-aggregations that go before them."""

from lightning_byz.aggregators.base import Aggregator, PreAggregator, Rule, TooFewRowsError, WeightedAggregator
from lightning_byz.aggregators.bucketing import Bucketing
from lightning_byz.aggregators.chain import Chain
from lightning_byz.aggregators.clipping import ARC, StaticClipping
from lightning_byz.aggregators.coordinate_wise import CoordinateMedian, MeaMed, Mean, Phocas, TrimmedMean
from lightning_byz.aggregators.geometric_median import GeometricMedian
from lightning_byz.aggregators.krum import Krum, MultiKrum
from lightning_byz.aggregators.nearest_neighbor_mixing import NNM
from lightning_byz.aggregators.subsets import CGE, FABA, Aksel

__all__ = [
    "ARC",
    "CGE",
    "FABA",
    "NNM",
    "Aggregator",
    "Aksel",
    "Bucketing",
    "Chain",
    "CoordinateMedian",
    "GeometricMedian",
    "Krum",
    "MeaMed",
    "Mean",
    "MultiKrum",
    "Phocas",
    "PreAggregator",
    "Rule",
    "StaticClipping",
    "TooFewRowsError",
    "TrimmedMean",
    "WeightedAggregator",
]
