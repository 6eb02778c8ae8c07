"""Aggregators: robust rules from n vectors to one, and the pre-aggregations that go before them.

`base` is what a rule has to be: one method. A new one goes into a file of its own, or beside its
kin, and into ``__all__`` here; the command line lists what is there.

* One coordinate at a time: `coordinate_wise` (median, trimmed mean, MeaMed, Phocas),
  `majority_vote`.
* By distances: `krum`, `geometric_median`, `centered_clipping`, `subsets` (MDA, MoNNA, ... keep the
  n - f rows that belong together), `subset_search` (the same by trying all), `spectral` (CAF,
  SpectralFilter, DnC), `sign_guard`, `medoid` (inner products that f rows cannot spoil).
* By how unlike data are: `by_heterogeneity` (the default's choice between two rules).
* Before a rule: `nearest_neighbor_mixing`, `bucketing`, `clipping` (ARC); `chain` puts them there.

Only numerics is below them.
"""

from lightning_byz.aggregators.base import (
    Aggregator,
    PreAggregator,
    Rule,
    TooFewRowsError,
    WeightedAggregator,
)
from lightning_byz.aggregators.bucketing import Bucketing
from lightning_byz.aggregators.by_heterogeneity import ByHeterogeneity
from lightning_byz.aggregators.centered_clipping import CenteredClip
from lightning_byz.aggregators.chain import Chain
from lightning_byz.aggregators.clipping import ARC, MedianNormClipping, StaticClipping
from lightning_byz.aggregators.coordinate_wise import (
    CoordinateMedian,
    MeaMed,
    Mean,
    Phocas,
    TrimmedMean,
)
from lightning_byz.aggregators.geometric_median import AutoGM, GeometricMedian
from lightning_byz.aggregators.krum import Bulyan, Krum, MultiKrum
from lightning_byz.aggregators.majority_vote import MajorityVote
from lightning_byz.aggregators.nearest_neighbor_mixing import NNM
from lightning_byz.aggregators.sign_guard import SignGuard
from lightning_byz.aggregators.spectral import CAF, DnC, SpectralFilter
from lightning_byz.aggregators.subset_search import MDA, SMEA
from lightning_byz.aggregators.subsets import CGE, FABA, Aksel, MoNNA

__all__ = [
    "ARC",
    "CAF",
    "CGE",
    "FABA",
    "MDA",
    "NNM",
    "SMEA",
    "Aggregator",
    "Aksel",
    "AutoGM",
    "Bucketing",
    "Bulyan",
    "ByHeterogeneity",
    "CenteredClip",
    "Chain",
    "CoordinateMedian",
    "DnC",
    "GeometricMedian",
    "Krum",
    "MajorityVote",
    "MeaMed",
    "Mean",
    "MedianNormClipping",
    "MoNNA",
    "MultiKrum",
    "Phocas",
    "PreAggregator",
    "Rule",
    "SignGuard",
    "SpectralFilter",
    "StaticClipping",
    "TooFewRowsError",
    "TrimmedMean",
    "WeightedAggregator",
]
