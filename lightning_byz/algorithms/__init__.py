"""Algorithms: one published method per file, with its worker half and its server half side by side."""

from lightning_byz.algorithms.base import Algorithm, NoState
from lightning_byz.algorithms.byz_ef21_sgdm import ByzEF21SGDM
from lightning_byz.algorithms.ef14 import EF14
from lightning_byz.algorithms.robust_sgd import RobustSGD

__all__ = ["EF14", "Algorithm", "ByzEF21SGDM", "NoState", "RobustSGD"]
