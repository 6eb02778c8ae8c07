"""Workers that are replicas of a sharded model: the same results as with whole models."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
import torch.distributed as dist
from harness import QUIET, fit, whole
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from models import blobs
from ports import own_port
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing import start_processes
from torch.nn import functional as F
from torch.utils.data import DataLoader
from zoo import RULES

from lightning_byz import (
    AllGather,
    ByHeterogeneity,
    ByzDIANA,
    ByzDM21,
    ByzEF21SGDM,
    ByzVRMarinaPP,
    Chain,
    ClippedDifferences,
    CoordinateMedian,
    Identity,
    Krum,
    Mean,
    MedianNormClipping,
    ParameterServer,
    PerShard,
    RobustSGD,
    Sharded,
    SignFlip,
    SignSGDMajorityVote,
    SpectralFilter,
    TopK,
    TrimmedMean,
)
from lightning_byz.lightning import ByzantineRobustStrategy, ByzantineWorkers, SuspicionMonitor
from lightning_byz.strategies.validate import UnsupportedSetupError

pytestmark = pytest.mark.processes
STEPS, SHARE = 4, 3


class Ranked:
    """Batches of a run of ``replicas x data`` ranks, for all of them or for one.

    In every step, sample j of rank k is sample ``(step * SHARE + j) * ranks + k`` of the data.
    """

    def __init__(self, ranks: int, own: Sequence[int], steps: int = STEPS) -> None:
        self.ranks, self.own, self.steps = ranks, own, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            yield [
                (step * SHARE + j) * self.ranks + rank for rank in self.own for j in range(SHARE)
            ]


class Shards(L.LightningModule):
    """A network that shards itself if there is a mesh."""

    def __init__(
        self,
        ranks: int = 6,
        adam: bool = False,
        only: bool = False,
        norm: bool = False,
        own: Sequence[int] | None = None,
        steps: int = STEPS,
        data: bool = True,
        policy: Any = None,
    ) -> None:
        super().__init__()
        self.ranks, self.adam, self.only, self.norm = ranks, adam, only, norm
        self.own, self.steps = range(ranks) if own is None else own, steps
        self.data, self.policy = data, policy or MixedPrecisionPolicy()
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        )
        if self.norm:
            self.net.append(nn.BatchNorm1d(3))
        mesh = self.device_mesh
        if mesh is None:
            return
        if mesh["tensor_parallel"].size() > 1:
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, mesh["tensor_parallel"], plan)
        kwargs = {"mesh": mesh["data_parallel"], "mp_policy": self.policy}
        if not self.data:
            return
        fully_shard(self.net[0 if self.only else 2], **kwargs)
        if not self.only:
            fully_shard(self.net, **kwargs)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.adam:
            return torch.optim.AdamW(self.parameters(), lr=0.02, foreach=False)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, foreach=False)

    def train_dataloader(self) -> DataLoader:
        kwargs = self.trainer.distributed_sampler_kwargs or {}
        mesh = self.device_mesh
        own = self.own if mesh is None else [kwargs["rank"]]
        data = blobs(self.ranks * SHARE * self.steps)
        return DataLoader(data, batch_sampler=Ranked(self.ranks, own, self.steps))


def together(folder: Path, size: int, job: Callable[[int], Any]) -> list[Any]:
    """What a job gives on each of so many forked ranks, which torchrun could have started."""
    folder.mkdir(parents=True, exist_ok=True)
    port = own_port()

    def run(rank: int) -> None:
        os.environ.update(
            LOCAL_RANK=str(rank),
            NODE_RANK="0",
            WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        torch.save(job(rank), folder / f"job{rank}.pt")
        dist.destroy_process_group()

    start_processes(run, nprocs=size, start_method="fork")
    return [torch.load(folder / f"job{rank}.pt", weights_only=False) for rank in range(size)]


def trained(
    shape: tuple[int, int, int],
    algorithm: Any,
    module: L.LightningModule | None = None,
    strategy: dict[str, Any] | None = None,
    ckpt_path: Path | None = None,
    **trainer: Any,
) -> L.LightningModule:
    """A module, trained by this rank of several that `together` has started."""
    replicas, data, tensor = shape
    module = module or Shards(replicas * data)
    L.Trainer(
        **{**QUIET, "max_epochs": 1, "use_distributed_sampler": False, **trainer},
        devices=replicas * data * tensor,
        strategy=ByzantineRobustStrategy(
            algorithm=algorithm,
            data_parallel_size=data,
            tensor_parallel_size=tensor,
            **(strategy or {}),
        ),
        plugins=[LightningEnvironment()],
    ).fit(module, ckpt_path=ckpt_path)
    return module


def weights(module: L.LightningModule) -> dict[str, torch.Tensor]:
    return {name: whole(value) for name, value in module.state_dict().items()}


def in_process(replicas: int, algorithm: Any, module: Any, **trainer: Any) -> dict[str, Any]:
    """The weights of the same workers in one process, which hold whole models."""
    strategy = ByzantineRobustStrategy(algorithm=algorithm, workers_per_process=replicas)
    settings = {**QUIET, "max_epochs": 1, "use_distributed_sampler": False, **trainer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        L.Trainer(**settings, strategy=strategy).fit(module)
    return weights(module)


def assert_weights(found: dict[str, Any], expected: dict[str, Any], case: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{case}, {n}: {m}"
        )


DRAWS = {"dnc", "majority_vote", "sign_guard"}
"""They draw coordinates, or coins for them: of other vectors, other ones."""


def rules(n: int) -> dict[str, Any]:
    """Every rule, tolerating one worker where it can."""
    cases = {case.name: case.rule for case in RULES if case.name not in DRAWS}
    return {
        name: RobustSGD(rule.with_f(max(0, min(1, rule.most_f(n)))), worker_momentum=0.9)
        for name, rule in cases.items()
        if rule.most_f(n) >= 0
    }


def check_rules(shape: tuple[int, int, int], names: Sequence[str], folder: Path) -> None:
    """They give the same weights, on every rank, as in one process with whole models."""
    replicas, data, tensor = shape
    algorithms = {name: rules(replicas)[name] for name in names}
    steps = {"limit_train_batches": 2}

    def job(rank: int) -> Any:
        return {name: weights(trained(shape, each, **steps)) for name, each in algorithms.items()}

    ranks = together(folder, replicas * data * tensor, job)
    for name, algorithm in algorithms.items():
        expected = in_process(replicas, algorithm, Shards(replicas * data), **steps)
        for found in ranks:
            assert_weights(found[name], expected, name)


@pytest.mark.parametrize("shape", [(3, 1, 2), (3, 2, 2)])
def test_rules_on_tensor_parallel_replicas(shape: tuple[int, int, int], tmp_path: Path) -> None:
    """Some parameters are sharded along one dimension only, or along none; norms count them
    once.
    """
    some = ["median", "cge", "multi_krum", "caf", "spectral_filter"]
    check_rules(shape, some, tmp_path)


def by_default() -> Any:
    return RobustSGD(ByHeterogeneity(f=1), worker_momentum=0.9, undo_worker_momentum=True)


FEATURES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "server momentum": (RobustSGD(Krum(f=0), server_momentum=0.9), {}, {}),
    "ef21": (ByzEF21SGDM(CoordinateMedian(f=1), Identity(), eta=0.2), {}, {}),
    "dm21": (ByzDM21(CoordinateMedian(f=1), Identity(), eta=0.5), {}, {}),
    "diana": (ByzDIANA(CoordinateMedian(f=1), Identity(), alpha=0.5), {}, {}),
    "signum": (SignSGDMajorityVote(momentum=0.5), {}, {}),
    "drift": (
        ClippedDifferences(RobustSGD(Mean()), TrimmedMean(f=0), 2, 3.0, "drift"),
        {},
        {},
    ),
    "adamw": (by_default(), {"adam": True}, {}),
    "plain parameters": (by_default(), {"only": True}, {}),
    "clip": (by_default(), {}, {"gradient_clip_val": 0.05}),
    "clip plain parameters": (by_default(), {"only": True}, {"gradient_clip_val": 0.05}),
    "clip values": (
        by_default(),
        {},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ),
    "accumulate": (by_default(), {}, {"accumulate_grad_batches": 2}),
}


@pytest.mark.parametrize("shape", [(3, 2, 1), (3, 1, 2), (3, 2, 2)])
def test_features_are_those_of_whole_models(shape: tuple[int, int, int], tmp_path: Path) -> None:
    replicas, data, tensor = shape
    features = {k: v for k, v in FEATURES.items() if tensor == 1 or "clip" in k or "plain" in k}
    if data == 1:
        features = {"tensors alone": (by_default(), {"data": False}, {})}

    def job(rank: int) -> Any:
        return {
            name: weights(
                trained(
                    shape,
                    algorithm,
                    Shards(3 * data, **of_module),
                    {"transport": Sharded()},
                    **more,
                )
            )
            for name, (algorithm, of_module, more) in features.items()
        }

    ranks = together(tmp_path, replicas * data * tensor, job)
    for name, (algorithm, of_module, more) in features.items():
        expected = in_process(replicas, algorithm, Shards(3 * data, **of_module), **more)
        for found in ranks:
            assert_weights(found[name], expected, name)


class Uneven(Shards):
    """Rank 3 alone, a part of replica 1, uses a plain layer, and has no batch in step 1."""

    def configure_model(self) -> None:
        super().configure_model()
        torch.manual_seed(4)
        self.rare = nn.Linear(3, 3)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        z, places = self.net(batch[0]), range(0)
        if self.device_mesh is not None and self.global_rank == 3:
            places = range(SHARE)
        elif len(z) == 6 * SHARE:  # of all ranks
            places = range(3 * SHARE, 4 * SHARE)
        if places:
            z = torch.cat([z[: places.start], self.rare(z[places]), z[places.stop :]])
        return F.cross_entropy(z, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        """In one process, the samples of those that have some."""
        batches: list[Any] = [*super().train_dataloader()]
        if self.device_mesh is None:
            others = [place for place in range(6 * SHARE) if place // SHARE not in (2, 3)]
            batches[1] = [part[others] for part in batches[1]]
        elif self.global_rank == 3:
            batches[1] = None
        return DataLoader(batches, batch_size=None)


def test_a_rank_may_lack_a_gradient_or_a_batch(tmp_path: Path) -> None:
    """Then its replica has the gradient of the others, or no batch."""
    expected = in_process(1, RobustSGD(Mean()), Uneven(6))

    def job(rank: int) -> Any:
        return weights(trained((3, 2, 1), RobustSGD(Mean()), Uneven(6)))

    for found in together(tmp_path, 6, job):
        assert_weights(found, expected, "uneven")


class Spoiled(Shards):
    """Rank 3, a part of replica 1, has a nan in its part of a gradient."""

    def configure_model(self) -> None:
        super().configure_model()
        if self.global_rank == 3:
            self.net[0].weight.register_post_accumulate_grad_hook(
                lambda p: p.grad.to_local()[0].fill_(torch.nan)
            )


def test_one_bad_part_silences_its_replica(tmp_path: Path) -> None:
    shape, algorithm = (3, 2, 1), RobustSGD(CoordinateMedian(f=1))

    def job(rank: int) -> Any:
        return [
            weights(trained(shape, algorithm, Spoiled(6), {"transport": transport}))
            for transport in (None, Sharded())
        ]

    expected = in_process(2, RobustSGD(Mean()), Shards(6, own=[0, 1, 4, 5]))
    for found in together(tmp_path, 6, job):
        for case in found:
            assert_weights(case, expected, "a nan")


# -- checkpoints -----------------------------------------------------------------------------------


def remembers() -> Any:
    """A method with state in both halves."""
    return ByzEF21SGDM(CoordinateMedian(f=1), Identity(), eta=0.2)


def assert_equal_weights(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("shape", [(3, 2, 1), (3, 1, 2)])
@pytest.mark.parametrize("distributed", [True, False])
def test_resumed_is_uninterrupted(
    distributed: bool, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"save_distributed_checkpoint": distributed}
    path = tmp_path / "saved.ckpt"

    def job(rank: int) -> Any:
        ranks = shape[0] * shape[1]
        whole_run = trained(shape, remembers(), Shards(ranks, adam=True), options, max_epochs=2)
        first = trained(shape, remembers(), Shards(ranks, adam=True), options)
        torch.rand(rank + 1)
        first.trainer.save_checkpoint(path)
        module = Shards(ranks, adam=True)
        resumed = trained(shape, remembers(), module, options, path, max_epochs=2)
        return weights(whole_run), weights(resumed)

    size = shape[0] * shape[1] * shape[2]
    for expected, found in together(tmp_path, size, job):
        assert_equal_weights(found, expected)
    assert path.is_dir() == distributed


def test_checkpoints_go_from_mesh_to_mesh(tmp_path: Path) -> None:
    """From 3 x 2 into 3 x 1, into 3 x 1 x 2, and into whole models; from these into 3 x 2."""
    folder, file, plain = tmp_path / "folder.ckpt", tmp_path / "file.ckpt", tmp_path / "plain.ckpt"
    algorithm = remembers()
    strategy = ByzantineRobustStrategy(algorithm=algorithm, workers_per_process=3)
    settings = {**QUIET, "use_distributed_sampler": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(**settings, strategy=strategy, max_epochs=1)
        trainer.fit(Shards(6, adam=True))
    trainer.save_checkpoint(plain)

    def from_two(rank: int) -> Any:
        for path, distributed in ((folder, True), (file, False)):
            options = {"save_distributed_checkpoint": distributed}
            module = trained((3, 2, 1), algorithm, Shards(6, adam=True), options)
            module.trainer.save_checkpoint(path)
        module = Shards(6, adam=True)
        return weights(trained((3, 2, 1), algorithm, module, {}, plain, max_epochs=2))

    def into(shape: tuple[int, int, int], path: Path) -> Callable[[int], Any]:
        def job(rank: int) -> Any:
            module = Again(6, adam=True)
            return weights(trained(shape, algorithm, module, {}, path, max_epochs=2))

        return job

    expected = in_process(3, algorithm, Shards(6, adam=True), max_epochs=2)
    for found in together(tmp_path / "a", 6, from_two):
        assert_weights(found, expected, "from whole models")
    for path in (folder, file):
        for shape, size in (((3, 1, 1), 3), ((3, 1, 2), 6)):
            for found in together(tmp_path / "b", size, into(shape, path)):
                assert_weights(found, expected, f"{path.name} into {shape}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = Shards(6, adam=True)
        strategy = ByzantineRobustStrategy(algorithm=algorithm, workers_per_process=3)
        trainer = L.Trainer(**settings, strategy=strategy, max_epochs=2)
        trainer.fit(module, ckpt_path=file)
    assert_weights(weights(module), expected, "into whole models")


class Again(Shards):
    """Replica r computes the samples of ranks 2 r and 2 r + 1 of another mesh."""

    def train_dataloader(self) -> DataLoader:
        rank = (self.trainer.distributed_sampler_kwargs or {})["rank"]
        own = [2 * rank, 2 * rank + 1]
        return DataLoader(blobs(self.ranks * SHARE * STEPS), batch_sampler=Ranked(self.ranks, own))


class SavesFirst(Shards):
    """Saves before the first step, and has a layer that no loss needs."""

    path: Path | None = None

    def configure_model(self) -> None:
        super().configure_model()
        self.other = nn.Linear(4, 4)
        fully_shard(self.other, mesh=self.device_mesh["data_parallel"])

    def on_train_start(self) -> None:
        if self.path is not None and self.trainer.global_step == 0:
            self.trainer.save_checkpoint(self.path)

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        assert bool(self.net(batch[0]).isfinite().all())

    test_dataloader = Shards.train_dataloader


@pytest.mark.parametrize("distributed", [True, False])
def test_what_has_no_state_yet_is_saved_and_resumed(distributed: bool, tmp_path: Path) -> None:
    """Before the first step, of parameters without a gradient, and of weights alone."""
    options: dict[str, Any] = {"save_distributed_checkpoint": distributed}
    first, last, only = tmp_path / "first.ckpt", tmp_path / "last.ckpt", tmp_path / "weights.ckpt"

    def run(ckpt_path: Path | None = None, save: Path | None = None, epochs: int = 2) -> Any:
        module = SavesFirst(6, adam=True)
        module.path = save
        algorithm, more = RobustSGD(Mean()), {"max_epochs": epochs}
        return trained((3, 2, 1), algorithm, module, options, ckpt_path, **more)

    def job(rank: int) -> Any:
        expected = weights(run())
        runs = [run(save=first), run(first)]
        half = run(epochs=1)
        half.trainer.save_checkpoint(last)
        half.trainer.save_checkpoint(only, weights_only=True)
        runs.append(run(last))
        if distributed:
            with patch.object(os, "replace"):  # the end comes before it
                half.trainer.save_checkpoint(last)
            with pytest.raises(ValueError, match="has written to its end"):
                run(last)
        half.trainer.test(half, ckpt_path=only, verbose=False)
        return expected, [weights(module) for module in runs]

    for expected, runs in together(tmp_path, 6, job):
        for found in runs:
            assert_equal_weights(found, expected)


# -- beside Lightning's strategy -------------------------------------------------------------------


def test_a_mean_is_what_model_parallel_strategy_computes(tmp_path: Path) -> None:
    """And each loads the other's checkpoints."""
    theirs, ours = tmp_path / "theirs.ckpt", tmp_path / "ours.ckpt"

    def with_lightnings(ckpt_path: Path | None = None, **more: Any) -> Shards:
        module = Shards(6, adam=True)
        strategy = ModelParallelStrategy(data_parallel_size=6, tensor_parallel_size=1)
        settings = {**QUIET, "use_distributed_sampler": False, "max_epochs": 1, **more}
        trainer = L.Trainer(
            **settings, strategy=strategy, devices=6, plugins=[LightningEnvironment()]
        )
        trainer.fit(module, ckpt_path=ckpt_path)
        return module

    def job(rank: int) -> Any:
        found = []
        for module, path in (
            (with_lightnings(), theirs),
            (trained((3, 2, 1), RobustSGD(Mean()), Shards(6, adam=True)), ours),
        ):
            module.trainer.save_checkpoint(path)
            found.append(weights(module))
        module = Shards(6, adam=True)
        theirs_here = trained((3, 2, 1), RobustSGD(Mean()), module, {}, theirs, max_epochs=2)
        return [*found, weights(theirs_here), weights(with_lightnings(ours, max_epochs=2))]

    for lightnings, mean, theirs_here, ours_there in together(tmp_path, 6, job):
        assert_weights(mean, lightnings, "a mean")
        assert_weights(ours_there, theirs_here, "checkpoints of the other strategy")


class Manual(Shards):
    """Steps by hand."""

    def __init__(self, ranks: int = 6, **kwargs: Any) -> None:
        super().__init__(ranks, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip_gradients(optimizer, 0.05)
        optimizer.step()


def test_manual_optimization_logs_and_buffers(tmp_path: Path) -> None:
    algorithm, clip = by_default(), {"gradient_clip_val": 0.05}

    def job(rank: int) -> Any:
        logged = trained((3, 2, 1), algorithm)
        buffers = trained((3, 2, 1), algorithm, Shards(6, norm=True), limit_train_batches=1)
        return (
            weights(trained((3, 2, 1), algorithm, Manual(6))),
            {name: float(value) for name, value in logged.trainer.callback_metrics.items()},
            {name: value.clone() for name, value in buffers.named_buffers()},
        )

    by_hand = in_process(3, algorithm, Shards(6), **clip)
    module = Shards(6)
    in_process(3, algorithm, module)
    loss = float(module.trainer.callback_metrics["loss"])
    module = Shards(6, norm=True, own=[0, 2, 4])  # the first rank of each replica
    in_process(3, algorithm, module, limit_train_batches=1)
    for found, metrics, buffers in together(tmp_path, 6, job):
        assert_weights(found, by_hand, "manual optimization")
        assert metrics == {"loss": pytest.approx(loss, abs=1e-5)}
        assert_weights(buffers, dict(module.named_buffers()), "buffers")


def accuracy(state: dict[str, torch.Tensor]) -> float:
    x, y = blobs(3000, seed=1).tensors
    net = nn.Sequential(
        nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3)
    )
    net.load_state_dict({name.removeprefix("net."): value for name, value in state.items()})
    return 100 * float((net(x).argmax(1) == y).float().mean())


def test_a_lying_replica_costs_less_than_two_points(tmp_path: Path) -> None:
    def module() -> Shards:
        return Shards(6, adam=True, steps=100)

    def lying() -> dict[str, Any]:
        return {"callbacks": [ByzantineWorkers(SignFlip(scale=3.0), workers=[1])]}

    spectral = RobustSGD(SpectralFilter(f=1), worker_momentum=0.9, undo_worker_momentum=True)
    honest = accuracy(in_process(3, spectral, module()))
    undefended = accuracy(in_process(3, RobustSGD(Mean()), module(), **lying()))
    for found in together(
        tmp_path, 6, lambda rank: weights(trained((3, 2, 1), spectral, module(), **lying()))
    ):
        assert honest > 78
        assert honest - accuracy(found) < 2
        assert honest - undefended > 10


def test_each_rank_holds_its_part_only(tmp_path: Path) -> None:
    """Of the gradient, of momenta, and of what the server remembers of every worker."""

    def job(rank: int) -> Any:
        module = trained((3, 2, 2), remembers(), strategy={"transport": Sharded()})
        (exchange,) = module.trainer.strategy.exchanges
        state = exchange.workers[rank // 4]
        own = sum(p.to_local().numel() for p in module.parameters())
        return exchange.dim, [len(t) for t in state if t.ndim], exchange.server, own

    ranks = together(tmp_path, 12, job)
    whole_dim = sum(p.numel() for p in configured().parameters())
    for replica in range(3):
        assert sum(dim for dim, *_ in ranks[4 * replica : 4 * replica + 4]) == whole_dim
    for dim, states, server, own in ranks:
        assert dim <= own and all(length == dim for length in states)
        assert all(t.shape[-1] <= dim for t in server if t.ndim)


def configured() -> Shards:
    module = Shards()
    module.configure_model()
    return module


# -- bad input -------------------------------------------------------------------------------------


class Unsharded(Shards):
    def configure_model(self) -> None:
        self.net = nn.Linear(10, 3)


class WholeWorld(Shards):
    """Forgets the mesh, and sizes that the number of processes does not divide."""

    def configure_model(self) -> None:
        self.net = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 3))
        fully_shard(self.net)


class Watches(SuspicionMonitor):
    """A kind of it."""


class NoHook(Shards):
    configure_model = L.LightningModule.configure_model

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(10, 3)


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "sizes": ("should divide the number of processes", {"shape": (1, 2, 1), "data": 4}),
    "no hook": ("should be sharded in the hook `configure_model`", {"module": NoHook}),
    "unsharded": ("Found no distributed parameter in Unsharded", {"module": Unsharded}),
    "top-k": (r"PerShard\(TopK\(", {"algorithm": ByzEF21SGDM(Mean(), TopK(ratio=0.1))}),
    "previous": ("asks for further ones", {"algorithm": ByzVRMarinaPP(Mean())}),
    "callback": ("SuspicionMonitor takes every rank", {"callbacks": [Watches()]}),
    "no mesh": (r"\[[0-9], [0-9]\]. Found net.0.weight on the ranks", {"module": WholeWorld}),
    "plain": (
        "Found net.2.weight, which is not",
        {"data": 6, "module": partial(Shards, only=True)},
    ),
}


def test_what_cannot_be_sharded_is_refused_before_the_first_step(tmp_path: Path) -> None:
    def job(rank: int) -> Any:
        messages = {}
        for name, (_, case) in REFUSED.items():
            data = case.get("data", 2)
            module = case.get("module", Shards)()
            strategy = ByzantineRobustStrategy(
                algorithm=case.get("algorithm", RobustSGD(Mean())), data_parallel_size=data
            )
            settings = {**QUIET, "use_distributed_sampler": False, "max_epochs": 1}
            trainer = L.Trainer(
                **settings,
                strategy=strategy,
                devices=6,
                plugins=[LightningEnvironment()],
                callbacks=case.get("callbacks", []),
            )
            with pytest.raises(UnsupportedSetupError) as error:
                trainer.fit(module)
            messages[name] = str(error.value), trainer.global_step
        return messages

    for messages in together(tmp_path, 6, job):
        for name, (pattern, _) in REFUSED.items():
            message, steps = messages[name]
            assert re.search(pattern, message) and "Found" in message, (name, message)
            assert steps == 0


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("data_parallel_size=0", {"data_parallel_size": 0}),
        ("tensor_parallel_size='auto'", {"tensor_parallel_size": "auto"}),
        ("workers_per_process=2", {"data_parallel_size": 2, "workers_per_process": 2}),
        ("transport=ParameterServer", {"data_parallel_size": 2, "transport": ParameterServer()}),
    ],
)
def test_arguments_that_do_not_fit_are_refused(message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ByzantineRobustStrategy(**arguments)


def test_compressors_of_whole_vectors_may_compress_parts(tmp_path: Path) -> None:
    algorithm = ByzEF21SGDM(CoordinateMedian(f=1), PerShard(TopK(ratio=0.3), shards=1), eta=0.5)

    def job(rank: int) -> Any:
        return weights(trained((3, 2, 1), algorithm, Shards(6, adam=True, steps=60)))

    first, *others = together(tmp_path, 6, job)
    for other in others:
        assert_equal_weights(other, first)
    assert accuracy(first) > 70


# -- set-up ----------------------------------------------------------------------------------------


class OnMeta(Shards):
    """Is made without memory, and initialized in its shards."""

    def configure_model(self) -> None:
        with torch.device("meta"):
            super().configure_model()
        torch.manual_seed(self.global_rank)


class Half(Shards):
    """A part of it is made on the meta device, and another one of 7s."""

    def configure_model(self) -> None:
        head = nn.Linear(8, 3)
        nn.init.constant_(head.weight, 7.0)
        with torch.device("meta"):
            body = nn.Linear(10, 8)
        self.net = nn.Sequential(body, head)
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def on_train_start(self) -> None:
        assert bool((whole(self.net[1].weight.detach()) == 7).all())
        assert bool(whole(self.net[0].weight.detach()).any())


def test_a_model_on_the_meta_device_and_half_precision(tmp_path: Path) -> None:
    """Replicas start from the first one's numbers; a policy of fully_shard reduces in its own
    precision, and rounds are in float32.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def job(rank: int) -> Any:
        trained((3, 2, 1), by_default(), Half(6), max_steps=1)
        on_meta = trained((3, 2, 1), by_default(), OnMeta(6))
        half = trained((3, 2, 1), by_default(), Shards(6, policy=policy))
        dtype = half.trainer.strategy.groups[0].layout.dtype
        return weights(on_meta), weights(half), dtype

    first, *others = together(tmp_path, 6, job)
    expected = in_process(3, by_default(), Shards(6))
    for other in others:
        assert_equal_weights(other[0], first[0])
    assert first[2] == torch.float32
    for name, value in first[1].items():
        torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0.05, msg=name)


class Validated(Shards):
    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    val_dataloader = Shards.train_dataloader


def test_a_model_that_validates_between_steps_is_saved_and_trained_on(tmp_path: Path) -> None:
    """A forward pass leaves whole copies of parameters in the module."""
    path = tmp_path / "saved.ckpt"

    def job(rank: int) -> Any:
        once = trained((3, 2, 1), remembers(), Validated(6), max_epochs=2)
        half = trained((3, 2, 1), remembers(), Validated(6))
        half.trainer.save_checkpoint(path)
        module = Validated(6)
        strategy = ByzantineRobustStrategy(remembers(), data_parallel_size=2)
        settings = {**QUIET, "max_epochs": 2, "use_distributed_sampler": False}
        trainer = L.Trainer(
            **settings, strategy=strategy, devices=6, plugins=[LightningEnvironment()]
        )
        trainer.validate(module, ckpt_path=path, verbose=False)
        trainer.fit(module, ckpt_path=path)
        return weights(once), weights(module), float(trainer.callback_metrics["val"])

    results = together(tmp_path, 6, job)
    for expected, found, value in results:
        assert_equal_weights(found, expected)
        assert value == results[0][2]


def test_ranks_that_fork_and_samplers(tmp_path: Path) -> None:
    """Lightning's own launcher and sampler: ranks of one tensor-parallel group share samples."""
    strategy = ByzantineRobustStrategy(
        RobustSGD(Mean()), data_parallel_size=2, tensor_parallel_size=2, start_method="fork"
    )
    data = DataLoader(blobs(96), batch_size=3)
    reports = fit(tmp_path, Shards(4), strategy, devices=8, data=data, extra=sampled, max_steps=2)
    kwargs = [report["extra"] for report in reports]
    assert kwargs == [(4, rank) for rank in (0, 0, 1, 1, 2, 2, 3, 3)]


def sampled(trainer: L.Trainer, module: L.LightningModule) -> tuple[int, int]:
    kwargs = trainer.distributed_sampler_kwargs or {}
    return kwargs["num_replicas"], kwargs["rank"]


class Tiny(Shards):
    """So few numbers that some ranks have none."""

    def configure_model(self) -> None:
        if self.net is not None:
            return
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(10, 1), nn.Linear(1, 1))
        if self.device_mesh is not None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return (self.net(batch[0])[:, 0] - batch[1]).square().mean()


def test_a_rank_that_no_number_belongs_to_takes_part(tmp_path: Path) -> None:
    def job(rank: int) -> Any:
        return [
            weights(trained((3, 2, 1), algorithm, Tiny(6), {"transport": transport}))
            for algorithm in algorithms
            for transport in (AllGather(), Sharded())
        ]

    by_tensor = Chain(pre=(MedianNormClipping(by_tensor=True),), rule=Mean())
    algorithms = (by_default(), remembers(), RobustSGD(by_tensor))
    for found in together(tmp_path, 6, job):
        for i, algorithm in enumerate(algorithms):
            for case in found[2 * i : 2 * i + 2]:
                assert_weights(case, in_process(3, algorithm, Tiny(6)), "an empty part")


def test_one_replica_is_plain_training(tmp_path: Path) -> None:
    def job(rank: int) -> Any:
        return weights(trained((1, 2, 1), None, Shards(2)))

    expected = in_process(1, None, Shards(2))
    for found in together(tmp_path, 2, job):
        assert_weights(found, expected, "one replica")


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("shape", [(3, 2, 1), (4, 2, 1)])
def test_every_rule_gives_what_it_gives_whole_models(
    shape: tuple[int, int, int], tmp_path: Path
) -> None:
    check_rules(shape, list(rules(shape[0])), tmp_path)
