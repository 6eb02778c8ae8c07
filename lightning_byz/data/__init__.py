"""Data: each worker its own part, in its own order, and data sets to start with.

The data modules to use are those of the Lightning package at hand: ``lightning_byz.lightning.DigitsDataModule`` or
``lightning_byz.pytorch_lightning.DigitsDataModule``; ``lightning_byz.DigitsDataModule`` is one of them. Likewise for the others.
"""

from lightning_byz.data.base import DataNotFoundError
from lightning_byz.data.digits import DigitsData
from lightning_byz.data.images import CIFAR10Data, FashionMNISTData
from lightning_byz.data.libsvm import LIBSVMData
from lightning_byz.data.partitions import IID, ByLabel, Dirichlet, GammaSimilarity, Partition, Replicated, labels_of
from lightning_byz.data.sampler import WorkerSampler

__all__ = [
    "IID",
    "ByLabel",
    "CIFAR10Data",
    "DataNotFoundError",
    "DigitsData",
    "Dirichlet",
    "FashionMNISTData",
    "GammaSimilarity",
    "LIBSVMData",
    "Partition",
    "Replicated",
    "WorkerSampler",
    "labels_of",
]
