"""Data: each worker its own part, in its own order, and data sets to start with.

The data modules to use are those of the Lightning package at hand: ``lightning_byz.lightning.DigitsDataModule`` or
``lightning_byz.pytorch_lightning.DigitsDataModule``; ``lightning_byz.DigitsDataModule`` is one of them.
"""

from lightning_byz.data.digits import DigitsData
from lightning_byz.data.sampler import WorkerSampler

__all__ = ["DigitsData", "WorkerSampler"]
