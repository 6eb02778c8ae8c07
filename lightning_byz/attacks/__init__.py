"""Attacks: what Byzantine workers do, for research and for tests; and faults, which happen to
honest ones.

`base` holds the two interfaces. On messages: `messages`, `mixture` of several, `remembering` those
of earlier rounds, `optimized` against the server's rule, `worst` the lie that harms it most. On a
worker's own samples: `data`. Without intent: `faults`. The callback `ByzantineWorkers` puts them
into a run, where `lightning_byz.engine.adversary` applies those on messages.
"""

from lightning_byz.attacks.base import Attack, DataAttack, Scene
from lightning_byz.attacks.data import LabelFlip
from lightning_byz.attacks.faults import FlippedBit, ShuffledLabels, Stuck, WrongScale
from lightning_byz.attacks.messages import (
    ALIE,
    IPM,
    AntiCGE,
    BitFlip,
    Gaussian,
    Huge,
    Infinity,
    MinMax,
    MinSum,
    NotANumber,
    RandomSign,
    SignFlip,
    Zero,
)
from lightning_byz.attacks.mixture import Mixture
from lightning_byz.attacks.optimized import FoE, LineSearch, OptimizedALIE, OptimizedIPM
from lightning_byz.attacks.remembering import Mimic, ShiftBack
from lightning_byz.attacks.worst import WorstLie

__all__ = [
    "ALIE",
    "IPM",
    "AntiCGE",
    "Attack",
    "BitFlip",
    "DataAttack",
    "FlippedBit",
    "FoE",
    "Gaussian",
    "Huge",
    "Infinity",
    "LabelFlip",
    "LineSearch",
    "Mimic",
    "MinMax",
    "MinSum",
    "Mixture",
    "NotANumber",
    "OptimizedALIE",
    "OptimizedIPM",
    "RandomSign",
    "Scene",
    "ShiftBack",
    "ShuffledLabels",
    "SignFlip",
    "Stuck",
    "WorstLie",
    "WrongScale",
    "Zero",
]
