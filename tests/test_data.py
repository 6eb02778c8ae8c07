"""Every worker its own samples, in its own order, wherever it runs."""

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

import lightning_byz.lightning
import lightning_byz.pytorch_lightning
from lightning_byz import WorkerSampler
from lightning_byz.data.batches import split_batch
from lightning_byz.data.digits import TEST_IMAGES

SETTINGS = [
    (96, 4, 4, {}),
    (97, 4, 5, {}),
    (23, 3, 8, {}),
    (97, 4, 5, {"drop_last": True}),
    (97, 4, 5, {"shuffle": False}),
]


def streams(samples, n, batch_size, processes, epoch=0, **kwargs):
    """What each of the n workers sees in each step, when they live in some number of processes."""
    local = n // processes
    seen = []
    for rank in range(processes):
        sampler = WorkerSampler(
            range(samples), batch_size, local, num_replicas=processes, rank=rank, seed=5, **kwargs
        )
        sampler.set_epoch(epoch)
        loader = DataLoader(
            torch.arange(samples), batch_size=sampler.batch_size_per_process, sampler=sampler
        )
        steps = [[part.tolist() for part in split_batch(batch, local)] for batch in loader]
        assert len(sampler) == sum(len(part) for step in steps for part in step)
        seen += [[step[i] for step in steps] for i in range(local)]
    return seen


def flat(stream):
    return [index for step in stream for index in step]


@pytest.mark.parametrize(("samples", "n", "batch_size", "kwargs"), SETTINGS)
def test_a_worker_sees_the_same_samples_in_any_number_of_processes(samples, n, batch_size, kwargs):
    for epoch in (0, 3):
        everywhere = [
            streams(samples, n, batch_size, processes, epoch, **kwargs)
            for processes in (1, n)
            if n % processes == 0
        ]
        assert everywhere[0] == everywhere[1]
    assert streams(96, 4, 4, 1) == streams(96, 4, 4, 2) == streams(96, 4, 4, 4)


@pytest.mark.parametrize(("samples", "n", "batch_size", "kwargs"), SETTINGS)
def test_parts_are_disjoint_and_cover_the_data(samples, n, batch_size, kwargs):
    parts = [set(flat(stream)) for stream in streams(samples, n, batch_size, 1, **kwargs)]
    assert len(set.union(*parts)) == sum(map(len, parts))
    missing = samples - sum(map(len, parts))
    assert missing <= (n * batch_size + n - 1 if kwargs.get("drop_last") else 0)


@pytest.mark.parametrize(("samples", "n", "batch_size", "kwargs"), SETTINGS)
def test_all_workers_have_as_many_samples_in_every_step(samples, n, batch_size, kwargs):
    everybody = streams(samples, n, batch_size, n, **kwargs)
    for step in zip(*everybody, strict=True):
        sizes = {len(samples) for samples in step}
        assert len(sizes) == 1
        assert sizes <= ({batch_size} if kwargs.get("drop_last") else set(range(1, batch_size + 1)))


def test_a_worker_keeps_its_part_and_reshuffles_it_every_epoch():
    first, second = (streams(100, 4, 5, 1, epoch=epoch) for epoch in (0, 1))
    for before, after in zip(first, second, strict=True):
        assert flat(before) != flat(after)
        assert sorted(flat(before)) == sorted(flat(after))
    assert streams(100, 4, 5, 1, epoch=1) == second
    relative = [[index // 4 for index in flat(stream)] for stream in first]
    assert len({tuple(order) for order in relative}) == 4, "workers shuffle independently"


def test_without_shuffling_the_order_is_the_parts():
    assert [flat(stream) for stream in streams(12, 3, 2, 1, shuffle=False)] == [
        [0, 3, 6, 9],
        [1, 4, 7, 10],
        [2, 5, 8, 11],
    ]


def test_uneven_parts():
    parts = [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]]
    everybody = [flat(stream) for stream in streams(10, 3, 2, 1, parts=parts)]
    assert [set(stream) for stream in everybody] == [set(part) for part in parts]
    assert [len(stream) for stream in everybody] == [5, 5, 5]
    assert (
        max(everybody[1].count(index) for index in (5, 6))
        - min(everybody[1].count(index) for index in (5, 6))
        <= 1
    )
    short = [flat(stream) for stream in streams(10, 3, 2, 1, parts=parts, drop_last=True)]
    assert [len(stream) for stream in short] == [2, 2, 2]


def test_lightning_leaves_it_alone():
    assert isinstance(WorkerSampler(range(8), 2), DistributedSampler)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="batch_size=0"):
        WorkerSampler(range(8), 0)
    with pytest.raises(ValueError, match="Found 0 for worker 8, of 8 samples and n=9"):
        WorkerSampler(range(8), 2, workers_per_process=9)
    with pytest.raises(ValueError, match="at least 3 samples"):
        WorkerSampler(range(8), 3, workers_per_process=4, drop_last=True)
    with pytest.raises(ValueError, match="n = 1 x 2 = 2 workers. Found 1"):
        WorkerSampler(range(8), 2, workers_per_process=2, parts=[[1, 2]])


@pytest.mark.parametrize("package", [lightning_byz.lightning, lightning_byz.pytorch_lightning])
def test_digits(package):
    data = package.DigitsDataModule(batch_size=7)
    data.setup("fit")
    assert len(data.training) == 1797 - TEST_IMAGES
    assert len(data.held_out) == TEST_IMAGES
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (7, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    assert labels.dtype == torch.int64
    ((_, held_out),) = data.val_dataloader()
    assert torch.bincount(held_out, minlength=10).min() > 20
    again = package.DigitsDataModule(seed=3)
    again.setup("test")
    assert torch.equal(again.held_out.tensors[0], data.held_out.tensors[0]), (
        "the split depends on no seed"
    )
