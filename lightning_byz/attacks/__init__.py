"""Attacks: what Byzantine workers do, for research and for tests."""

from lightning_byz.attacks.base import Attack, DataAttack
from lightning_byz.attacks.data import LabelFlip
from lightning_byz.attacks.messages import (
    ALIE,
    IPM,
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

__all__ = [
    "ALIE",
    "IPM",
    "Attack",
    "BitFlip",
    "DataAttack",
    "Gaussian",
    "Huge",
    "Infinity",
    "LabelFlip",
    "MinMax",
    "MinSum",
    "NotANumber",
    "RandomSign",
    "SignFlip",
    "Zero",
]
