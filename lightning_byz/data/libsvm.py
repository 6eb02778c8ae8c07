"""Binary classification data sets of the LIBSVM collection: the convex problems of many papers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_byz.data.base import DataNotFoundError, WorkerData, download
from lightning_byz.data.partitions import Partition
from lightning_byz.optional_dependencies import require

HOME = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/"
"""Where the files come from."""


class _Known(NamedTuple):
    features: int
    # file name: SHA-256 of the original text, or None if it is not to be downloaded
    files: Mapping[str, str | None]


KNOWN = {
    "a9a": _Known(
        123,
        {
            "a9a": "f5d5ffd8d865ff41328e7ee043e4b020816914ff6843ff15b98905ddbedce906",
            "a9a.t": "1f448a153f0320399a7e40836eb207655b0bde0f21fc941cc472193daa9f5de9",
        },
    ),
    "w8a": _Known(
        300,
        {
            "w8a": "6a9fa8fd5f524303240a5db07d4b3d4a51e8b7b4b20a914105d8e3e8c81640f2",
            "w8a.t": "618929ecb01bebb841daec4cae4aa07b97832d29b08652452775598929547fde",
        },
    ),
    "mushrooms": _Known(
        112, {"mushrooms": "f39a4eb628dc61a7d43760815b061c9e497aa728ce1ad8bde57a09ef6043b538"}
    ),
    "phishing": _Known(68, {"phishing": None}),
}
"""The data sets whose sizes are known; any other name is read from its folder."""


def _find(folder: Path, name: str) -> Path | None:
    """The file of this name, as text or compressed."""
    found = (folder / (name + ending) for ending in ("", ".bz2", ".gz"))
    return next((path for path in found if path.is_file()), None)


class LIBSVMData(WorkerData):
    """All of LIBSVMDataModule but its Lightning base class (see `lightning_byz.lightning` and
    `.pytorch_lightning`).

    A data set of https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html, or any file
    in its format, held in memory, dense. A batch is ``(features [B, d] float32, labels [B]
    int64)``; the labels in the file, such as -1 and +1, become 0, 1, ... in increasing order.

    Files are looked for in ``folder``: the training set under its name (``a9a``), the held-out set,
    for validation and testing, with ``.t`` behind it (``a9a.t``), as text or with ``.bz2`` or
    ``.gz`` at the end. Without a ``.t`` file nothing is held out. Missing files of ``a9a``, ``w8a``
    and ``mushrooms`` are downloaded and checked.

    Args:
        name: the data set, "a9a", "w8a", "mushrooms", "phishing", or the name of a file in
            ``folder``.
        folder: where the files are, or are to be put.
        normalize: scale every row to unit L2 norm, as papers on logistic regression often do; rows
            of zeros stay as they are.
        batch_size: samples of *one worker* in one step.
        seed: seed of the partition and of the order in which workers see their samples. None: the
            one that ``seed_everything`` set, or 0.
        partition: which worker holds which samples, such as ``Replicated()``; None: every n-th.
        num_workers: processes that load data, as for DataLoader; 0 is fastest here.

    Raises:
        DataNotFoundError: if a file is neither in the folder nor to be had.
        MissingExtraError: without scikit-learn.
    """

    def __init__(
        self,
        name: str = "a9a",
        folder: str = "data/libsvm",
        normalize: bool = False,
        batch_size: int = 32,
        seed: int | None = None,
        partition: Partition | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, partition)
        self.dataset, self.folder, self.normalize = name, Path(folder), normalize

    def prepare_data(self) -> None:
        known = KNOWN.get(self.dataset)
        for name, sha256 in {} if known is None else known.files.items():
            if sha256 is not None and _find(self.folder, name) is None:
                try:
                    download(HOME + name, self.folder / name, sha256)
                except OSError as error:
                    raise self._missing(
                        name, f"and {HOME + name} did not give it: {error}"
                    ) from error

    def _missing(self, name: str, why: str) -> DataNotFoundError:
        return DataNotFoundError(
            f"LIBSVMDataModule({self.dataset!r}) reads the file {name}, {name}.bz2 or {name}.gz "
            f"in {self.folder.resolve()}. Found none of them, {why.rstrip('.')}. Put it there "
            f"from {HOME}, or set `folder` to where it is."
        )

    def setup(self, stage: str) -> None:
        require("LIBSVMDataModule", "data", "sklearn")
        from sklearn.datasets import load_svmlight_files

        known = KNOWN.get(self.dataset)
        training, held_out = (
            _find(self.folder, self.dataset),
            _find(self.folder, self.dataset + ".t"),
        )
        if training is None:
            raise self._missing(self.dataset, "and did not look elsewhere")
        if held_out is None and known is not None and self.dataset + ".t" in known.files:
            raise self._missing(self.dataset + ".t", "and did not look elsewhere")
        paths = [str(path) for path in (training, held_out) if path is not None]
        loaded = load_svmlight_files(paths, n_features=None if known is None else known.features)
        classes = torch.unique(torch.from_numpy(loaded[1]))
        sets = [
            TensorDataset(
                self._rows(torch.from_numpy(x.toarray()).float()),
                self._labels(torch.from_numpy(y), classes),
            )
            for x, y in zip(loaded[::2], loaded[1::2], strict=True)
        ]
        self.training, self.held_out = sets[0], sets[1] if len(sets) > 1 else None

    def _rows(self, x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x, dim=1) if self.normalize else x

    def _labels(self, y: Tensor, classes: Tensor) -> Tensor:
        if not bool(torch.isin(y, classes).all()):
            raise ValueError(
                f"{self.dataset}.t should have the labels of {self.dataset}, {classes.tolist()}. "
                f"Found {torch.unique(y).tolist()}. Use files that belong together."
            )
        return torch.searchsorted(classes, y)
