"""Attacks: what Byzantine workers do, for research and for tests."""

from lightning_byz.attacks.base import Attack, DataAttack
from lightning_byz.attacks.data import LabelFlip
from lightning_byz.attacks.messages import ALIE, IPM, Gaussian, NotANumber, SignFlip

__all__ = ["ALIE", "IPM", "Attack", "DataAttack", "Gaussian", "LabelFlip", "NotANumber", "SignFlip"]
