"""Byzantine-robust training for PyTorch Lightning: ``import lightning_byz`` and
``Trainer(strategy="byzantine_robust")``.

``"byz_ef21_sgdm"``, ``"dstar"``, ``"byz_vr_marina_pp"`` and ``"signsgd_majority_vote"`` are names
of strategies too: this one with the algorithm of that name. The names work with every Lightning
package that is installed (``lightning`` and ``pytorch_lightning``), whichever is imported first.
`ByzantineRobustStrategy`, `ByzantineWorkers`, `Classifier` and the data modules are those of the
package that the program uses: the one that is installed, or, if both are, the one that was imported
before this package (``lightning`` if neither or both were). To choose, import them from
`lightning_byz.lightning` or `lightning_byz.pytorch_lightning`. Lightning is imported with the first
of these classes, unless the program has imported it; the strategy names are known to a Lightning
package as soon as both it and this package are imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_byz.aggregators import (
    ARC,
    CAF,
    CGE,
    FABA,
    MDA,
    NNM,
    SMEA,
    Aksel,
    AutoGM,
    Bucketing,
    Bulyan,
    ByHeterogeneity,
    CenteredClip,
    Chain,
    CoordinateMedian,
    DnC,
    GeometricMedian,
    Krum,
    MajorityVote,
    MeaMed,
    Mean,
    MedianNormClipping,
    MoNNA,
    MultiKrum,
    Phocas,
    SignGuard,
    SpectralFilter,
    StaticClipping,
    TrimmedMean,
)
from lightning_byz.algorithms import (
    EF14,
    ByzDIANA,
    ByzDM21,
    ByzEF21SGDM,
    ByzEF21SGDMBC,
    ByzVRDM21,
    ByzVRMarinaPP,
    ClippedDifferences,
    DeviationFilter,
    DStar,
    RobustSGD,
    ShiftedExponential,
    SignSGDMajorityVote,
)
from lightning_byz.attacks import (
    ALIE,
    IPM,
    AntiCGE,
    BitFlip,
    FlippedBit,
    FoE,
    Gaussian,
    Huge,
    Infinity,
    LabelFlip,
    LineSearch,
    Mimic,
    MinMax,
    MinSum,
    Mixture,
    NotANumber,
    OptimizedALIE,
    OptimizedIPM,
    RandomSign,
    ShiftBack,
    ShuffledLabels,
    SignFlip,
    Stuck,
    WorstLie,
    WrongScale,
    Zero,
)
from lightning_byz.compressors import (
    QSGD,
    BFloat16,
    Contractive,
    ContractiveRandK,
    Float16,
    Identity,
    LowRank,
    NaturalCompression,
    PerShard,
    PerTensor,
    RandK,
    ScaledSign,
    Sign,
    TernGrad,
    TopK,
)
from lightning_byz.data import IID, ByLabel, Dirichlet, GammaSimilarity, Replicated, WorkerSampler
from lightning_byz.strategies.local_steps import LocalSteps
from lightning_byz.transports import AllGather, InProcess, ParameterServer, Sharded, make_keys
from lightning_byz.which_lightning import INSTALLED, of_home, register_with

__version__ = "0.2.0"

if TYPE_CHECKING:
    from lightning_byz.lightning import (
        ByzantineRobustStrategy,
        ByzantineWorkers,
        CIFAR10DataModule,
        Classifier,
        DigitsDataModule,
        DuplicateBatchCheck,
        FashionMNISTDataModule,
        LIBSVMDataModule,
        ReplicaCheck,
        RobustnessMonitor,
        ShadowMode,
        Stragglers,
        SuspicionMonitor,
    )


_PARTS = frozenset(globals())
"""What is here without Lightning."""

register_with(INSTALLED)


def __getattr__(name: str) -> Any:
    """The classes that have bases of Lightning's, which is imported with the first of them."""
    return of_home(__name__, name, [known for known in __all__ if known not in _PARTS])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "ALIE",
    "ARC",
    "CAF",
    "CGE",
    "EF14",
    "FABA",
    "IID",
    "IPM",
    "MDA",
    "NNM",
    "QSGD",
    "SMEA",
    "Aksel",
    "AllGather",
    "AntiCGE",
    "AutoGM",
    "BFloat16",
    "BitFlip",
    "Bucketing",
    "Bulyan",
    "ByHeterogeneity",
    "ByLabel",
    "ByzDIANA",
    "ByzDM21",
    "ByzEF21SGDM",
    "ByzEF21SGDMBC",
    "ByzVRDM21",
    "ByzVRMarinaPP",
    "ByzantineRobustStrategy",
    "ByzantineWorkers",
    "CIFAR10DataModule",
    "CenteredClip",
    "Chain",
    "Classifier",
    "ClippedDifferences",
    "Contractive",
    "ContractiveRandK",
    "CoordinateMedian",
    "DStar",
    "DeviationFilter",
    "DigitsDataModule",
    "Dirichlet",
    "DnC",
    "DuplicateBatchCheck",
    "FashionMNISTDataModule",
    "FlippedBit",
    "Float16",
    "FoE",
    "GammaSimilarity",
    "Gaussian",
    "GeometricMedian",
    "Huge",
    "Identity",
    "InProcess",
    "Infinity",
    "Krum",
    "LIBSVMDataModule",
    "LabelFlip",
    "LineSearch",
    "LocalSteps",
    "LowRank",
    "MajorityVote",
    "MeaMed",
    "Mean",
    "MedianNormClipping",
    "Mimic",
    "MinMax",
    "MinSum",
    "Mixture",
    "MoNNA",
    "MultiKrum",
    "NaturalCompression",
    "NotANumber",
    "OptimizedALIE",
    "OptimizedIPM",
    "ParameterServer",
    "PerShard",
    "PerTensor",
    "Phocas",
    "RandK",
    "RandomSign",
    "ReplicaCheck",
    "Replicated",
    "RobustSGD",
    "RobustnessMonitor",
    "ScaledSign",
    "ShadowMode",
    "Sharded",
    "ShiftBack",
    "ShiftedExponential",
    "ShuffledLabels",
    "Sign",
    "SignFlip",
    "SignGuard",
    "SignSGDMajorityVote",
    "SpectralFilter",
    "StaticClipping",
    "Stragglers",
    "Stuck",
    "SuspicionMonitor",
    "TernGrad",
    "TopK",
    "TrimmedMean",
    "WorkerSampler",
    "WorstLie",
    "WrongScale",
    "Zero",
    "make_keys",
]
