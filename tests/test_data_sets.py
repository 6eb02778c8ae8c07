"""Data modules on tiny files in the formats of the real ones."""

import bz2
import gzip
import hashlib
import io
import pickle
import struct

import numpy as np
import pytest
import torch

import lightning_byz.lightning
import lightning_byz.pytorch_lightning
from lightning_byz import (
    CIFAR10DataModule,
    Dirichlet,
    FashionMNISTDataModule,
    LIBSVMDataModule,
    Replicated,
)
from lightning_byz.data import DataNotFoundError, base, libsvm
from lightning_byz.data.images import Images
from lightning_byz.optional_dependencies import MissingExtraError

TRAINING = b"-1 1:3 3:4\n+1 2:1\n-1 \n+1 1:-2 4:0.5\n"
HELD_OUT = b"+1 4:1\n-1 1:1\n"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(url, timeout):
        raise OSError(f"no network for {url}")

    monkeypatch.setattr(base.urllib.request, "urlopen", refuse)


def serve(monkeypatch, files):
    asked = []

    def give(url, timeout):
        asked.append(url)
        return io.BytesIO(files[url.removeprefix(libsvm.HOME)])

    monkeypatch.setattr(base.urllib.request, "urlopen", give)
    return asked


def known(monkeypatch, files, features=5):
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setitem(libsvm.KNOWN, "tiny", libsvm._Known(features, hashes))


# -- LIBSVM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [lightning_byz.lightning, lightning_byz.pytorch_lightning])
@pytest.mark.parametrize(
    ("ending", "pack"), [("", bytes), (".bz2", bz2.compress), (".gz", gzip.compress)]
)
def test_files_in_the_folder_are_read(tmp_path, package, ending, pack):
    (tmp_path / f"mine{ending}").write_bytes(pack(TRAINING))
    (tmp_path / f"mine.t{ending}").write_bytes(pack(HELD_OUT))
    module = package.LIBSVMDataModule("mine", str(tmp_path), batch_size=2)
    module.prepare_data()
    module.setup("fit")
    x, y = module.training.tensors
    assert x.tolist() == [[3, 0, 4, 0], [0, 1, 0, 0], [0, 0, 0, 0], [-2, 0, 0, 0.5]]
    assert y.tolist() == [0, 1, 0, 1]
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    (held_out,) = module.val_dataloader()
    assert held_out[0].tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    assert held_out[1].tolist() == [1, 0]
    assert [len(batch[0]) for batch in module.train_dataloader()] == [2, 2]


def test_normalized_rows_have_length_one(tmp_path):
    (tmp_path / "mine").write_bytes(TRAINING)
    module = LIBSVMDataModule("mine", str(tmp_path), normalize=True)
    module.setup("fit")
    x = module.training.tensors[0]
    torch.testing.assert_close(x[0], torch.tensor([0.6, 0, 0.8, 0]))
    torch.testing.assert_close(x.norm(dim=1), torch.tensor([1.0, 1, 0, 1]))
    assert module.held_out is None
    assert module.val_dataloader() == []


def test_labels_become_0_and_1_whatever_they_were(tmp_path):
    (tmp_path / "mine").write_bytes(b"2 1:1\n1 2:1\n")
    module = LIBSVMDataModule("mine", str(tmp_path))
    module.setup("fit")
    assert module.training.tensors[1].tolist() == [1, 0]
    (tmp_path / "mine.t").write_bytes(b"3 1:1\n1 2:1\n")
    with pytest.raises(
        ValueError, match=r"mine.t should have the labels of mine, \[1.0, 2.0\]. Found \[1.0, 3.0\]"
    ):
        module.setup("fit")


def test_known_data_sets_have_all_their_columns(tmp_path, no_network):
    for name in ("a9a", "a9a.t"):
        (tmp_path / name).write_bytes(TRAINING)
    module = LIBSVMDataModule(folder=str(tmp_path))
    module.prepare_data()
    module.setup("fit")
    assert module.training.tensors[0].shape == (4, 123)
    assert {name: known.features for name, known in libsvm.KNOWN.items()} == {
        "a9a": 123,
        "w8a": 300,
        "mushrooms": 112,
        "phishing": 68,
    }


def test_missing_files_are_downloaded_once(tmp_path, monkeypatch):
    files = {"tiny": TRAINING, "tiny.t": HELD_OUT}
    known(monkeypatch, files)
    asked = serve(monkeypatch, files)
    module = LIBSVMDataModule("tiny", str(tmp_path / "new" / "folder"))
    for _ in range(2):
        module.prepare_data()
    module.setup("fit")
    assert asked == [libsvm.HOME + "tiny", libsvm.HOME + "tiny.t"]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "tiny",
        "tiny.t",
    ]
    assert module.training.tensors[0].shape == (4, 5)


def test_a_file_with_another_checksum_is_refused(tmp_path, monkeypatch):
    known(monkeypatch, {"tiny": TRAINING})
    serve(monkeypatch, {"tiny": TRAINING + b"+1 1:9\n"})
    with pytest.raises(DataNotFoundError, match="did not give it: its SHA-256 should be"):
        LIBSVMDataModule("tiny", str(tmp_path)).prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_what_to_do_without_the_file_and_the_network(tmp_path, no_network):
    with pytest.raises(
        DataNotFoundError,
        match=r"reads the file a9a, a9a.bz2 or a9a.gz in .*no network.*Put it there from https",
    ):
        LIBSVMDataModule("a9a", str(tmp_path)).prepare_data()
    for name in ("phishing", "nothing"):  # no checksum is known
        module = LIBSVMDataModule(name, str(tmp_path))
        module.prepare_data()
        with pytest.raises(DataNotFoundError, match=f"reads the file {name}.*set `folder`"):
            module.setup("fit")
    (tmp_path / "a9a").write_bytes(TRAINING)
    with pytest.raises(DataNotFoundError, match="reads the file a9a.t"):
        LIBSVMDataModule("a9a", str(tmp_path)).setup("fit")


def test_workers_may_all_hold_everything(tmp_path):
    (tmp_path / "mine").write_bytes(TRAINING)
    module = LIBSVMDataModule("mine", str(tmp_path), partition=Replicated())
    module.setup("fit")
    assert sorted(module.train_sampler()) == [0, 1, 2, 3]


# -- images ----------------------------------------------------------------------------------------


def fashion_mnist(folder, training=30, held_out=10):
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", training), ("t10k", held_out)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes()
        )
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, count) + labels.tobytes()
        )
        yield images


def python2_pickle(data, labels):
    """As the original files were written: no Python 3 writes strings of bytes in this way."""

    def string(content):
        return b"T" + struct.pack("<i", len(content)) + content

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    state = b"(K\x01(" + b"".join(b"J" + struct.pack("<i", size) for size in data.shape) + b"t"
    state += b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state += b"I00\n" + string(data.tobytes()) + b"tb"
    items = b"".join(b"K" + bytes([label]) for label in labels)
    return (
        b"\x80\x02}(" + string(b"data") + array + state + string(b"labels") + b"](" + items + b"eu."
    )


def cifar10(folder, each=4, old=False, **other):
    home = folder / "cifar-10-batches-py"
    home.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        data = rng.integers(0, 256, (each, 3072), dtype=np.uint8)
        labels = [i % 10 for i in range(each)]
        content = pickle.dumps({"data": data, "labels": labels, **other}, protocol=2)
        (home / name).write_bytes(python2_pickle(data, labels) if old else content)
        yield data


@pytest.mark.parametrize("package", [lightning_byz.lightning, lightning_byz.pytorch_lightning])
def test_fashion_mnist(tmp_path, package):
    training, held_out = fashion_mnist(tmp_path)
    module = package.FashionMNISTDataModule(str(tmp_path), batch_size=8, partition=Dirichlet(1.0))
    module.prepare_data()
    module.setup("fit")
    assert (len(module.training), len(module.held_out)) == (30, 10)
    x, y = module.training[3]
    assert y == 3
    torch.testing.assert_close(x[0], (torch.from_numpy(training[3]) / 255 - 0.2860) / 0.3530)
    ((x, y),) = module.val_dataloader()
    torch.testing.assert_close(x[:, 0], (torch.from_numpy(held_out) / 255 - 0.2860) / 0.3530)
    assert y.tolist() == list(range(10))
    batches = list(module.train_dataloader())
    assert [len(images) for images, _ in batches] == [8, 8, 8, 6]
    assert batches[0][0].shape == (8, 1, 28, 28)
    assert torch.cat([labels for _, labels in batches]).sort().values.tolist() == sorted(
        [*range(10)] * 3
    )


@pytest.mark.parametrize("package", [lightning_byz.lightning, lightning_byz.pytorch_lightning])
@pytest.mark.parametrize("old", [False, True])
def test_cifar10(tmp_path, package, old):
    data = list(cifar10(tmp_path, old=old))
    module = package.CIFAR10DataModule(str(tmp_path), batch_size=5)
    module.prepare_data()
    module.setup("fit")
    assert (len(module.training), len(module.held_out)) == (20, 4)
    x, y = module.training[6]
    assert y == 2
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    expected = torch.from_numpy(data[1][2]).view(3, 32, 32) / 255
    torch.testing.assert_close(x, (expected - mean[:, None, None]) / std[:, None, None])
    assert next(iter(module.train_dataloader()))[0].shape == (5, 3, 32, 32)


class Evil:
    def __reduce__(self):
        return print, ("called",)


def test_a_pickle_that_calls_something_is_refused(tmp_path, capsys):
    list(cifar10(tmp_path, more=Evil()))
    with pytest.raises(
        pickle.UnpicklingError, match=r"Found a call of (__builtin__|builtins).print"
    ):
        CIFAR10DataModule(str(tmp_path)).setup("fit")
    assert "called" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "dataset"),
    [(FashionMNISTDataModule, "FashionMNIST"), (CIFAR10DataModule, "CIFAR10")],
)
def test_what_to_do_without_images(tmp_path, monkeypatch, module, dataset):
    calls = []

    def fail(root, download):
        calls.append((root, download))
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(f"torchvision.datasets.{dataset}", fail)
    with pytest.raises(
        DataNotFoundError,
        match=r"as torchvision lays it out.*did not give it: Error downloading. Put them there",
    ):
        module(str(tmp_path)).prepare_data()
    assert calls == [(str(tmp_path), True)]
    with pytest.raises(DataNotFoundError, match="did not look elsewhere"):
        module(str(tmp_path)).setup("fit")
    monkeypatch.setattr(
        "lightning_byz.optional_dependencies.importlib.util.find_spec", lambda name: None
    )
    with pytest.raises(MissingExtraError, match=r"pip install 'lightning-byz\[data\]'"):
        module(str(tmp_path)).prepare_data()


# -- augmentation ----------------------------------------------------------------------------------


def photos(count=200):
    return torch.randint(256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )


def test_augmented_images_are_all_81_shifts_and_their_mirror_images():
    image = photos(1)
    padded = torch.zeros(3, 40, 40, dtype=torch.uint8)
    padded[:, 4:36, 4:36] = image[0]
    crops = {
        padded[:, i : i + 32, j : j + 32].numpy().tobytes(): (i, j, 0)
        for i in range(9)
        for j in range(9)
    }
    crops |= {
        padded[:, i : i + 32, j : j + 32].flip(2).contiguous().numpy().tobytes(): (i, j, 1)
        for i in range(9)
        for j in range(9)
    }
    images = Images(
        image.repeat(3000, 1, 1, 1),
        torch.zeros(3000).long(),
        (0.0,) * 3,
        (1 / 255,) * 3,
        augment=True,
    )
    seen = [
        crops[x.round().to(torch.uint8).contiguous().numpy().tobytes()]
        for x in images.__getitems__(range(3000))[0]
    ]
    assert len(set(seen)) == 162
    assert max(seen.count(way) for way in set(seen)) < 45  # 18.5 expected


def test_what_happens_to_a_sample_depends_on_the_epoch_alone(tmp_path):
    list(cifar10(tmp_path, each=10))

    def epoch(number, batch_size, num_workers=0, seed=3):
        module = CIFAR10DataModule(
            str(tmp_path), batch_size, seed, num_workers=num_workers, augment=True
        )
        module.setup("fit")
        module.training.targets = torch.arange(50)
        loader = module.train_dataloader()
        loader.sampler.set_epoch(number)
        pairs = [
            (int(i), x) for images, indices in loader for i, x in zip(indices, images, strict=True)
        ]
        return torch.stack([x for _, x in sorted(pairs, key=lambda pair: pair[0])])

    first = epoch(0, 7)
    assert torch.equal(first, epoch(0, 50))
    assert torch.equal(epoch(1, 7), epoch(1, 7, num_workers=1))
    assert (first == epoch(1, 7)).flatten(1).all(1).float().mean() < 0.1
    assert (first == epoch(0, 7, seed=4)).flatten(1).all(1).float().mean() < 0.1


def test_held_out_images_are_not_augmented(tmp_path):
    list(cifar10(tmp_path))
    modules = [CIFAR10DataModule(str(tmp_path), augment=augment) for augment in (False, True)]
    for module in modules:
        module.setup("fit")
    assert torch.equal(*(next(iter(module.val_dataloader()))[0] for module in modules))
    assert not torch.equal(*(module.training.__getitems__(range(20))[0] for module in modules))
