"""Algorithms: one published method per file, with its worker half and its server half side by
side.

`base` is what a method has to have: a rule, a codec, and two pairs of functions. `traits` holds
what it may have besides, with a paragraph each. `robust_sgd` is the one to read first: momentum
and a rule; the default is one of these. The others are named after their papers.
"""

from lightning_byz.algorithms.base import Algorithm, NoState
from lightning_byz.algorithms.byz_diana import ByzDIANA
from lightning_byz.algorithms.byz_dm21 import ByzDM21, ByzVRDM21
from lightning_byz.algorithms.byz_ef21_sgdm import ByzEF21SGDM
from lightning_byz.algorithms.byz_ef21_sgdm_bc import ByzEF21SGDMBC
from lightning_byz.algorithms.byz_vr_marina_pp import ByzVRMarinaPP, ClippedDifferences
from lightning_byz.algorithms.dstar import DeviationFilter, DStar, ShiftedExponential
from lightning_byz.algorithms.ef14 import EF14
from lightning_byz.algorithms.robust_sgd import RobustSGD
from lightning_byz.algorithms.signsgd_majority_vote import SignSGDMajorityVote

__all__ = [
    "EF14",
    "Algorithm",
    "ByzDIANA",
    "ByzDM21",
    "ByzEF21SGDM",
    "ByzEF21SGDMBC",
    "ByzVRDM21",
    "ByzVRMarinaPP",
    "ClippedDifferences",
    "DStar",
    "DeviationFilter",
    "NoState",
    "RobustSGD",
    "ShiftedExponential",
    "SignSGDMajorityVote",
]
