"""Data: each worker its own part, in its own order, and data sets to start with.

`partitions` says which worker holds which samples, `sampler` gives them in that worker's order, and
`batches` cuts a batch among the workers of one process. `base` is what the data modules share:
`digits`, `images`, `libsvm`.

``from lightning_byz.data import DigitsDataModule`` gives the class for the Lightning package at
hand (see `lightning_byz.which_lightning`); `lightning_byz.lightning` and
`lightning_byz.pytorch_lightning` hold the classes for one each.
"""

from typing import TYPE_CHECKING, Any

from lightning_byz.data.base import DataNotFoundError
from lightning_byz.data.digits import DigitsData
from lightning_byz.data.images import CIFAR10Data, FashionMNISTData
from lightning_byz.data.libsvm import LIBSVMData
from lightning_byz.data.partitions import (
    IID,
    ByLabel,
    Dirichlet,
    GammaSimilarity,
    Partition,
    Replicated,
    labels_of,
)
from lightning_byz.data.sampler import WorkerSampler
from lightning_byz.which_lightning import of_home

if TYPE_CHECKING:
    from lightning_byz.lightning import (
        CIFAR10DataModule,
        DigitsDataModule,
        FashionMNISTDataModule,
        LIBSVMDataModule,
    )

_OF_LIGHTNING = (
    "CIFAR10DataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "LIBSVMDataModule",
)


def __getattr__(name: str) -> Any:
    """The data modules, of the Lightning package that the program uses."""
    return of_home(__name__, name, _OF_LIGHTNING)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "IID",
    "ByLabel",
    "CIFAR10Data",
    "CIFAR10DataModule",
    "DataNotFoundError",
    "DigitsData",
    "DigitsDataModule",
    "Dirichlet",
    "FashionMNISTData",
    "FashionMNISTDataModule",
    "GammaSimilarity",
    "LIBSVMData",
    "LIBSVMDataModule",
    "Partition",
    "Replicated",
    "WorkerSampler",
    "labels_of",
]
