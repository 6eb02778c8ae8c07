"""Fashion-MNIST and CIFAR-10: images that are held in memory as bytes, and made ready a batch at a
time.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_byz.data.base import DataNotFoundError, WorkerData
from lightning_byz.data.partitions import Partition
from lightning_byz.data.sampler import WorkerSampler
from lightning_byz.optional_dependencies import require
from lightning_byz.types import keyed_generator

_PAD = 4


class Images(Dataset[Any]):
    """Images and their labels; `__getitems__` gives a whole batch
    ``(float32 [B, C, H, W], int64 [B])``.

    Args:
        images: uint8 ``[N, C, H, W]``.
        targets: int64 ``[N]``.
        mean: of each channel, of values in [0, 1]; subtracted.
        std: of each channel; divided by.
        augment: shift by up to 4 pixels and mirror at random. What happens to a sample depends on
            (seed, epoch, sample) alone.
        seed: of the augmentation.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        self.images, self.targets, self.augment, self.seed = images, targets, augment, seed
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        self.sampler: WorkerSampler | None = None
        self._ways: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(indices)
        images = self.images[index]
        if self.augment:
            images = self._moved(images, index)
        return images.float().div_(255).sub_(self.mean).div_(self.std), self.targets[index]

    def _moved(self, images: Tensor, index: Tensor) -> Tensor:
        """The images, each moved and mirrored in the way that this epoch has for its sample."""
        epoch, side = 0 if self.sampler is None else self.sampler.epoch, 2 * _PAD + 1
        if self._ways is None or self._ways[0] != epoch:
            generator = keyed_generator("augmentation", self.seed, epoch)
            self._ways = epoch, torch.randint(2 * side * side, (len(self),), generator=generator)
        way = self._ways[1][index][:, None]
        height, width = images.shape[2:]
        rows = torch.arange(height) + way // 2 // side
        columns = (
            torch.where(way % 2 == 0, torch.arange(width), torch.arange(width).flip(0))
            + way // 2 % side
        )
        padded = F.pad(images, [_PAD] * 4)
        batch = torch.arange(len(images))[:, None, None]
        return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def whole_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What `Images.__getitems__` gives is a batch already."""
    return batch


class _ImageData(WorkerData):
    collate = staticmethod(whole_batch)
    title: str
    layout: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool = False

    def __init__(
        self,
        folder: str = "data",
        batch_size: int = 32,
        seed: int | None = None,
        partition: Partition | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, partition)
        self.folder = Path(folder)

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        """All images, uint8 ``[N, C, H, W]``, and labels, int64 ``[N]``, of the training or the
        test set, from the folder.
        """
        raise NotImplementedError

    def fetch(self) -> None:
        """Downloads the data set into the folder."""
        raise NotImplementedError

    @property
    def present(self) -> bool:
        """Whether the folder holds the data set."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        if self.present:
            return
        require(f"Downloading {self.title}", "data", "torchvision")
        try:
            self.fetch()
        except (OSError, RuntimeError) as error:
            raise self._missing(f"and its home did not give it: {error}") from error

    def _missing(self, why: str) -> DataNotFoundError:
        return DataNotFoundError(
            f"{self.title} should lie in {self.folder.resolve()} as torchvision lays it out: "
            f"{self.layout}. Found no such files, {why.rstrip('.')}. Put them there, or set "
            "`folder` to where they are."
        )

    def setup(self, stage: str) -> None:
        if not self.present:
            raise self._missing("and did not look elsewhere")
        self.training = Images(*self.read(train=True), self.mean, self.std, self.augment)
        self.held_out = Images(*self.read(train=False), self.mean, self.std)

    def train_dataloader(self) -> DataLoader[Any]:
        loader = super().train_dataloader()
        assert isinstance(self.training, Images) and isinstance(loader.sampler, WorkerSampler)
        self.training.sampler, self.training.seed = loader.sampler, loader.sampler.seed
        return loader


class FashionMNISTData(_ImageData):
    """All of FashionMNISTDataModule but its Lightning base class (see `lightning_byz.lightning` and
    `.pytorch_lightning`).

    Zalando's Fashion-MNIST (arXiv 1708.07747): 60,000 images for training and 10,000, held out for
    validation and testing, of 28 x 28 grey values, ten classes. A batch is
    ``(images [B, 1, 28, 28] float32, of mean 0 and variance 1 over the training set, labels [B]
    int64)``.

    Args:
        folder: where the data set is, or is to be put: files in ``folder/FashionMNIST/raw``, as
            torchvision lays them out.
        batch_size: samples of *one worker* in one step.
        seed: seed of the partition and of the order in which workers see their samples. None: the
            one that ``seed_everything`` set, or 0.
        partition: which worker holds which samples, such as ``Dirichlet(0.1)``; None: every n-th.
        num_workers: processes that load data, as for DataLoader.

    Raises:
        DataNotFoundError: if the files are neither in the folder nor to be had.
        MissingExtraError: without torchvision.
    """

    title, layout = "Fashion-MNIST", "FashionMNIST/raw/train-images-idx3-ubyte and three more"
    mean, std = (0.2860,), (0.3530,)

    @property
    def present(self) -> bool:
        raw = self.folder / "FashionMNIST" / "raw"
        return all(
            (raw / f"{part}-{kind}-ubyte").is_file()
            for part in ("train", "t10k")
            for kind in ("images-idx3", "labels-idx1")
        )

    def fetch(self) -> None:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(self.folder), download=True)  # checks an MD5 of each file

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        require("FashionMNISTDataModule", "data", "torchvision")
        from torchvision.datasets import FashionMNIST

        data = FashionMNIST(str(self.folder), train=train)
        return data.data[:, None], data.targets


class CIFAR10Data(_ImageData):
    """All of CIFAR10DataModule but its Lightning base class (see `lightning_byz.lightning` and
    `.pytorch_lightning`).

    CIFAR-10 (Krizhevsky 2009): 50,000 images for training and 10,000, held out for validation and
    testing, of 32 x 32 pixels, ten classes. A batch is ``(images [B, 3, 32, 32] float32, every
    channel of mean 0 and variance 1 over the training set, labels [B] int64)``.

    Args:
        folder: where the data set is, or is to be put: files in ``folder/cifar-10-batches-py``, as
            torchvision lays them out. They are pickles; nothing but arrays is read from them.
        batch_size: samples of *one worker* in one step.
        seed: seed of the partition, the order in which workers see their samples, and the
            augmentation. None: the one that ``seed_everything`` set, or 0.
        partition: which worker holds which samples, such as ``Dirichlet(0.1)``; None: every n-th.
        num_workers: processes that load data, as for DataLoader.
        augment: shift training images by up to 4 pixels and mirror them, at random. What happens to
            a sample depends on the seed and the epoch alone, not on the worker that sees it.

    Raises:
        DataNotFoundError: if the files are neither in the folder nor to be had.
        MissingExtraError: without torchvision, where the files have to be downloaded.
    """

    title, layout = "CIFAR-10", "cifar-10-batches-py/data_batch_1 to data_batch_5, and test_batch"
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    def __init__(
        self,
        folder: str = "data",
        batch_size: int = 32,
        seed: int | None = None,
        partition: Partition | None = None,
        num_workers: int = 0,
        augment: bool = False,
    ) -> None:
        super().__init__(folder, batch_size, seed, partition, num_workers)
        self.augment = augment

    def _files(self, train: bool) -> list[Path]:
        names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
        return [self.folder / "cifar-10-batches-py" / name for name in names]

    @property
    def present(self) -> bool:
        return all(path.is_file() for path in self._files(True) + self._files(False))

    def fetch(self) -> None:
        from torchvision.datasets import CIFAR10

        CIFAR10(str(self.folder), download=True)  # checks an MD5 of each file

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        batches = [_Arrays.read(path) for path in self._files(train)]
        images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([batch["labels"] for batch in batches])
        return torch.from_numpy(images), torch.from_numpy(labels).long()


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes into pickles that Python 2 can read."""
    return text.encode("latin1")


_HARMLESS = {
    ("numpy", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}
"""All that a pickle of numpy arrays has to name, by package and name."""


class _Arrays(pickle.Unpickler):
    """Reads numpy arrays and plain values from a pickle, and calls nothing else that it names."""

    def find_class(self, module: str, name: str) -> Any:
        harmless = _HARMLESS.get((module.split(".")[0], name))
        if harmless is not None:
            return harmless
        raise pickle.UnpicklingError(
            f"A file of CIFAR-10 should hold arrays and lists. Found a call of {module}.{name}. "
            "Download the data set again."
        )

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """The content of a file."""
        with path.open("rb") as file:
            content: dict[str, Any] = cls(file, encoding="latin1").load()
        return content
