"""Laws over every partition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset, TensorDataset
from zoo import laws

from lightning_byz import DigitsDataModule, data
from lightning_byz.data import (
    IID,
    ByLabel,
    Dirichlet,
    GammaSimilarity,
    Partition,
    Replicated,
    WorkerSampler,
    labels_of,
)
from lightning_byz.data.batches import split_batch

EQUAL = [IID(), ByLabel(), GammaSimilarity(0.0), GammaSimilarity(0.3), GammaSimilarity(1.0)]
PARTITIONS = [*EQUAL, Dirichlet(0.5), Dirichlet(100.0), Dirichlet(0.5, min_samples=2), Replicated()]
each_partition = pytest.mark.parametrize("partition", PARTITIONS, ids=repr)


def labels(samples, classes, seed=0):
    return torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(seed))


@each_partition
@laws
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 8),
    samples=st.integers(60, 200),
    classes=st.integers(1, 5),
)
def test_every_sample_goes_to_one_worker_and_every_worker_has_some(
    partition, seed, n, samples, classes
):
    y = labels(samples, classes, seed)
    before, state = y.clone(), torch.get_rng_state()
    parts = partition(y, n, seed)
    assert len(parts) == n
    assert all(
        part.dtype == torch.int64 and len(part) >= getattr(partition, "min_samples", 1)
        for part in parts
    )
    assert all((part[1:] > part[:-1]).all() for part in parts)
    if partition == Replicated():
        assert all(torch.equal(part, torch.arange(samples)) for part in parts)
    else:
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(samples))
    if partition in EQUAL:
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(torch.equal(a, b) for a, b in zip(parts, partition(y, n, seed), strict=True))
    assert torch.equal(y, before)
    assert torch.equal(torch.get_rng_state(), state)


@each_partition
def test_another_seed_divides_otherwise(partition):
    y = labels(100, 2)
    seeds = {tuple(tuple(part.tolist()) for part in partition(y, 3, seed)) for seed in range(5)}
    assert len(seeds) == (1 if partition == Replicated() else 5)


@each_partition
def test_partitions_are_values(partition):
    assert hash(partition) == hash(partition)
    assert eval(repr(partition), vars(data)) == partition


@pytest.mark.parametrize("n", [1, 3, 10])
def test_by_label_cuts_the_sorted_samples(n):
    y = labels(101, 10)
    parts = ByLabel()(y, n, 4)
    assert torch.cat([y[part].sort().values for part in parts]).tolist() == sorted(y.tolist())
    assert ByLabel()(y, n, 4)[0].tolist() == GammaSimilarity(0.0)(y, n, 4)[0].tolist()


def test_a_share_gamma_is_drawn_at_random():
    """Ten classes, ten workers: a worker of its own class alone would have 200 of it; with gamma it
    has 200 (1 - gamma) + 20 gamma.
    """
    y = torch.arange(2000) % 10
    for gamma in (0.0, 0.25, 0.75, 1.0):
        parts = GammaSimilarity(gamma)(y, 10, 1)
        own = [int(y[part].bincount(minlength=10).max()) for part in parts]
        assert sum(own) / 10 == pytest.approx(200 * (1 - gamma) + 20 * gamma, abs=9)
    assert [part.tolist() for part in GammaSimilarity(1.0)(y, 10, 1)] == [
        part.tolist() for part in IID()(y, 10, 1)
    ]


@pytest.mark.parametrize("alpha", [0.3, 1.0, 10.0])
def test_the_shares_of_a_class_have_the_moments_of_the_dirichlet_distribution(alpha):
    n, members, times = 4, 400, 400
    y = torch.arange(2).repeat_interleave(members)
    shares = torch.stack(
        [
            torch.stack([(y[part] == 1).sum() for part in Dirichlet(alpha)(y, n, seed)])
            for seed in range(times)
        ]
    ).double()
    shares /= members
    variance = (1 / n) * (1 - 1 / n) / (n * alpha + 1)
    assert (shares.mean(0) - 1 / n).abs().max() < 4 * math.sqrt(variance / times)
    assert shares.var(0).tolist() == pytest.approx([variance] * n, rel=0.3)


def test_classes_are_divided_independently():
    y = torch.arange(2).repeat_interleave(300)
    pairs = torch.tensor(
        [
            [int((y[part] == label).sum()) for label in (0, 1)]
            for seed in range(300)
            for part in Dirichlet(0.5)(y, 3, seed)[:1]
        ]
    )
    assert abs(float(torch.corrcoef(pairs.T.double())[0, 1])) < 0.2


# -- in the sampler --------------------------------------------------------------------------------


def streams(dataset, partition, n, processes, epoch=0):
    """What each of the n workers sees in each step."""
    local, seen = n // processes, []
    for rank in range(processes):
        sampler = WorkerSampler(
            dataset, 3, local, num_replicas=processes, rank=rank, seed=5, partition=partition
        )
        sampler.set_epoch(epoch)
        loader = DataLoader(
            torch.arange(len(dataset)), sampler.batch_size_per_process, sampler=sampler
        )
        steps = [[part.tolist() for part in split_batch(batch, local)] for batch in loader]
        seen += [[step[i] for step in steps] for i in range(local)]
    return seen


@each_partition
def test_a_worker_has_the_same_samples_in_any_number_of_processes(partition):
    dataset = TensorDataset(torch.zeros(62, 2), labels(62, 4))
    for epoch in (0, 1):
        everywhere = [streams(dataset, partition, 4, processes, epoch) for processes in (1, 2, 4)]
        assert everywhere[0] == everywhere[1] == everywhere[2]
    parts = partition(dataset.tensors[1], 4, 5)
    seen = [{index for step in stream for index in step} for stream in everywhere[0]]
    assert seen == [set(part.tolist()) for part in parts]
    orders = {tuple(index for step in stream for index in step) for stream in everywhere[0]}
    assert len(orders) == 4


def test_labels_are_found_where_datasets_keep_them():
    y = labels(12, 3)

    class Targets:
        targets = y.tolist()

        def __len__(self):
            return 12

    assert torch.equal(labels_of(TensorDataset(torch.zeros(12), y)), y)
    assert torch.equal(labels_of(Targets()), y)
    assert torch.equal(labels_of(Subset(Targets(), [3, 1])), y[[3, 1]])
    with pytest.raises(
        ValueError, match=r"one label for each sample.*Found a range with none.*parts=Dirichlet"
    ):
        WorkerSampler(range(8), 2, partition=Dirichlet(0.1))
    with pytest.raises(ValueError, match=r"labels of shape \[4, 2\]"):
        labels_of(TensorDataset(torch.zeros(4, 2)))
    assert len(WorkerSampler(range(8), 2, 2, partition=IID())) == 8


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dirichlet(0.0), "alpha=0.0"),
        (lambda: Dirichlet(float("nan")), "alpha=nan"),
        (lambda: Dirichlet(float("inf")), "alpha=inf"),
        (lambda: Dirichlet(1.0, min_samples=0), "min_samples=0"),
        (lambda: GammaSimilarity(1.5), r"in \[0, 1\]. Found gamma=1.5"),
        (lambda: GammaSimilarity(-0.1), "gamma=-0.1"),
        (lambda: IID()(labels(3, 2), 4), "Found n=4 and 3 samples"),
        (lambda: IID()(labels(3, 2), 0), "Found n=0"),
        (
            lambda: Dirichlet(0.01)(labels(40, 2), 20),
            r"min_samples=1 samples. Found 0.*Dirichlet\(alpha=0.01\).*n=20.*larger alpha",
        ),
        (
            lambda: WorkerSampler(range(4), 1, 2, parts=[[1], [2]], partition=IID()),
            "At most one of `parts` and `partition`",
        ),
        (lambda: Nobody()(labels(9, 2), 3), r"Nobody.* leaves none to worker 1 of n=3"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("wrong", ["iid", Dirichlet, [[0], [1]]])
def test_what_is_no_partition_is_refused(wrong):
    with pytest.raises(TypeError, match=r"instance of Partition, such as IID\(\)"):
        WorkerSampler(range(4), 1, partition=wrong)
    with pytest.raises(TypeError, match="instance of Partition"):
        DigitsDataModule(partition=wrong)


class Nobody(Partition):
    def split(self, labels, n, rng):
        return [rng.permutation(len(labels)), *[rng.permutation(0)] * (n - 1)]

    def __repr__(self):
        return "Nobody()"
