"""Byzantine-robust training for PyTorch Lightning: ``import lightning_byz`` and ``Trainer(strategy="byzantine_robust")``.

``"byz_ef21_sgdm"``, ``"dstar"``, ``"byz_vr_marina_pp"`` and ``"signsgd_majority_vote"`` are names of strategies too: this one with the
algorithm of that name. The names work with every Lightning package that is installed (``lightning`` and ``pytorch_lightning``),
whichever is imported first. `ByzantineRobustStrategy`, `ByzantineWorkers` and `DigitsDataModule` are those of the package that the
program uses: the one that is installed, or, if both are, the one that was imported before this package (``lightning`` if neither or
both were). To choose, import them from `lightning_byz.lightning` or `lightning_byz.pytorch_lightning`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

from lightning_byz.aggregators import (
    ARC,
    CGE,
    FABA,
    NNM,
    Aksel,
    Bucketing,
    Chain,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MeaMed,
    Mean,
    MultiKrum,
    Phocas,
    StaticClipping,
    TrimmedMean,
)
from lightning_byz.algorithms import (
    ByzDM21,
    ByzEF21SGDM,
    ByzVRDM21,
    ByzVRMarinaPP,
    ClippedDifferences,
    DeviationFilter,
    DStar,
    MajorityVote,
    RobustSGD,
    ShiftedExponential,
    SignSGDMajorityVote,
)
from lightning_byz.attacks import (
    ALIE,
    IPM,
    BitFlip,
    Gaussian,
    Huge,
    Infinity,
    LabelFlip,
    MinMax,
    MinSum,
    NotANumber,
    RandomSign,
    SignFlip,
    Zero,
)
from lightning_byz.compressors import (
    QSGD,
    BFloat16,
    Contractive,
    Float16,
    Identity,
    NaturalCompression,
    RandK,
    Sign,
    TernGrad,
    TopK,
)
from lightning_byz.data import WorkerSampler
from lightning_byz.transports import AllGather, InProcess

__version__ = "0.1.0"

_installed = [name for name in ("lightning", "pytorch_lightning") if importlib.util.find_spec(name) is not None]
if not _installed:
    raise ImportError(
        "lightning_byz needs Lightning. Found neither `lightning` nor `pytorch_lightning`. Run: pip install lightning"
    )
_imported = [name for name in _installed if name in sys.modules]
_home = (_imported if len(_imported) == 1 else _installed)[0]

if TYPE_CHECKING:
    from lightning_byz.lightning import ByzantineRobustStrategy, ByzantineWorkers, DigitsDataModule
else:
    _glue = {name: importlib.import_module(f"lightning_byz.{name}") for name in _installed}  # registers the strategy names
    ByzantineRobustStrategy = _glue[_home].ByzantineRobustStrategy
    ByzantineWorkers = _glue[_home].ByzantineWorkers
    DigitsDataModule = _glue[_home].DigitsDataModule

__all__ = [
    "ALIE",
    "ARC",
    "CGE",
    "FABA",
    "IPM",
    "NNM",
    "QSGD",
    "Aksel",
    "AllGather",
    "BFloat16",
    "BitFlip",
    "Bucketing",
    "ByzDM21",
    "ByzEF21SGDM",
    "ByzVRDM21",
    "ByzVRMarinaPP",
    "ByzantineRobustStrategy",
    "ByzantineWorkers",
    "Chain",
    "ClippedDifferences",
    "Contractive",
    "CoordinateMedian",
    "DStar",
    "DeviationFilter",
    "DigitsDataModule",
    "Float16",
    "Gaussian",
    "GeometricMedian",
    "Huge",
    "Identity",
    "InProcess",
    "Infinity",
    "Krum",
    "LabelFlip",
    "MajorityVote",
    "MeaMed",
    "Mean",
    "MinMax",
    "MinSum",
    "MultiKrum",
    "NaturalCompression",
    "NotANumber",
    "Phocas",
    "RandK",
    "RandomSign",
    "RobustSGD",
    "ShiftedExponential",
    "Sign",
    "SignFlip",
    "SignSGDMajorityVote",
    "StaticClipping",
    "TernGrad",
    "TopK",
    "TrimmedMean",
    "WorkerSampler",
    "Zero",
]
