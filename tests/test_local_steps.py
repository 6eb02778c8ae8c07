"""Local steps: FedAvg and DiLoCo are what their definitions say, in process and on ranks; on a
server they are in test_parameter_server.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from harness import QUIET, assert_close, assert_equal, cpu_amp, fit
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from models import GAN, Manual, Plain, blobs, loader, loss_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_byz import (
    EF14,
    NNM,
    ByzEF21SGDM,
    ByzVRMarinaPP,
    Chain,
    CoordinateMedian,
    DStar,
    LocalSteps,
    Mean,
    RobustSGD,
    SignFlip,
    SignSGDMajorityVote,
    SpectralFilter,
    TopK,
    TrimmedMean,
)
from lightning_byz.lightning import ByzantineRobustStrategy, ByzantineWorkers, ReplicaCheck
from lightning_byz.strategies.local_steps import DILOCO

FEDAVG = partial(torch.optim.SGD, lr=1.0)
MEAN = RobustSGD(aggregator=Mean())


class ChangesItsGroups(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1
        return result


OPTIMIZERS = {
    "changes its groups": ChangesItsGroups,
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "sgd with momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "lbfgs": partial(torch.optim.LBFGS, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"),
    "adagrad": partial(torch.optim.Adagrad, lr=0.05),  # has a state before its first step
}


class Net(Plain):
    """An MLP with an optimizer of the test's choice."""

    def __init__(self, make: str = "sgd", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.make = OPTIMIZERS[make]

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class Parts(L.LightningDataModule):
    """Batches of which each worker gets the same samples in one process and on ranks."""

    def __init__(self, n: int, batches: int = 6, each: int = 4) -> None:
        super().__init__()
        self.n, self.each, self.samples = n, each, blobs(n * each * batches)

    def train_dataloader(self) -> Batches:
        ranks, rank = self.trainer.num_devices, self.trainer.global_rank
        return Batches([[t.chunk(ranks)[rank] for t in batch] for batch in self.batches()])

    def val_dataloader(self) -> DataLoader:
        return loader()

    def batches(self) -> list[Any]:
        return list(DataLoader(self.samples, batch_size=self.n * self.each))


class Batches:
    """A loader that goes on where a checkpoint says."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.position, self.resumed = batches, 0, False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.position = self.position if self.resumed else 0
        self.resumed = False
        while self.position < len(self):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position, self.resumed = state["position"] % len(self), True


def train(
    folder: Path, net: L.LightningModule, n: int, ranks: bool, batches: int = 6, **kwargs: Any
) -> list[dict[str, Any]]:
    """Trains n workers, in one process or in one each; those without ``algorithm`` average."""
    trainer = {key: kwargs.pop(key) for key in [*kwargs] if key in TRAINER}
    own = {"start_method": "fork"} if ranks else {"workers_per_process": n}
    return fit(
        folder,
        copy.deepcopy(net),
        ByzantineRobustStrategy(**{"algorithm": MEAN, **own, **kwargs}),
        data=Parts(n, batches),
        devices=n if ranks else 1,
        **{"use_distributed_sampler": False, "limit_val_batches": 0, **trainer},
    )


TRAINER = {
    *("max_epochs", "callbacks", "ckpt_path", "extra", "plugins", "val_check_interval"),
    *("limit_val_batches", "accumulate_grad_batches", "gradient_clip_val", "enable_checkpointing"),
}


@pytest.mark.parametrize("ranks", [False, True], ids=["in process", "ranks"])
@pytest.mark.parametrize("rule", [Mean(), CoordinateMedian()], ids=["mean", "median"])
def test_one_step_of_sgd_a_phase_is_distributed_sgd(rule: Any, ranks: bool, tmp_path: Path) -> None:
    how = {"algorithm": RobustSGD(aggregator=rule)}
    local = {**how, "local_steps": 1, "outer_optimizer": FEDAVG}
    torch.manual_seed(1)
    net = Net()
    a, *_ = train(tmp_path / "a", net, 3, ranks, **local)
    b, *_ = train(tmp_path / "b", net, 3, ranks, **how)
    assert_close(a, b, 1e-5)
    assert a["metrics"]["loss_epoch"] == pytest.approx(b["metrics"]["loss_epoch"], rel=1e-4)


def diloco(
    net: nn.Module,
    batches: list[Any],
    n: int,
    steps: int,
    inner: Any,
    outer: Any,
    fresh: bool = False,
) -> nn.Module:
    """An independent DiLoCo: n models, n optimizers, their mean difference, an outer optimizer."""
    workers = [copy.deepcopy(net) for _ in range(n)]
    optimizers = [inner(worker.parameters()) for worker in workers]
    outer = outer(net.parameters())
    for t, batch in enumerate(batches):
        for worker, optimizer, part in zip(
            workers, optimizers, zip(*(x.chunk(n) for x in batch), strict=True), strict=True
        ):

            def closure(
                worker: Any = worker, part: Any = part, optimizer: Any = optimizer
            ) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(worker, part)
                loss.backward()
                return loss

            optimizer.step(closure)
        if (t + 1) % steps and t + 1 < len(batches):
            continue
        for group in zip(net.parameters(), *(w.parameters() for w in workers), strict=True):
            x, *of_workers = group
            x.grad = torch.stack([x.detach() - y.detach() for y in of_workers]).mean(0)
        outer.step()
        for worker in workers:
            worker.load_state_dict(net.state_dict())
        if fresh:
            optimizers = [inner(worker.parameters()) for worker in workers]
    return net


@pytest.mark.parametrize("inner", ["sgd with momentum", "adamw", "adagrad", "lbfgs"])
@pytest.mark.parametrize("fresh", [False, True], ids=["kept", "fresh"])
@pytest.mark.parametrize(("n", "ranks"), [(1, False), (3, False), (3, True)])
def test_it_is_diloco(n: int, ranks: bool, fresh: bool, inner: str, tmp_path: Path) -> None:
    """7 batches in phases of 3: the last one is cut short."""
    torch.manual_seed(2)
    net = Net(inner)
    outer = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
    expected = copy.deepcopy(net.net)
    diloco(expected, Parts(n, 7).batches(), n, 3, OPTIMIZERS[inner], outer, fresh)
    steps = LocalSteps(3, fresh_optimizer=fresh)
    reports = train(tmp_path, net, n, ranks, 7, local_steps=steps)
    for report in reports:
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(
                report["weights"][f"net.{name}"], value, rtol=1e-5, atol=1e-6
            )
        assert report["steps"] == 7


class Quadratic(L.LightningModule):
    """Worker i has the loss a_i (w - b_i)^2 / 2."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.w, self.a, self.b = nn.Parameter(torch.zeros(3)), a, b

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        (i,) = batch
        return (self.a[i] * (self.w - self.b[i]).square() / 2).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.w], lr=0.05)


@pytest.mark.parametrize("ranks", [False, True], ids=["in process", "ranks"])
def test_fedavg_on_quadratics_is_its_closed_form(ranks: bool, tmp_path: Path) -> None:
    """A phase takes w to the mean of ``b_i + (1 - lr a_i)^H (w - b_i)``."""
    n, steps, phases = 3, 4, 5
    a, b = torch.rand(n, 3) * 5 + 0.5, torch.randn(n, 3)
    net, workers = Quadratic(a, b), torch.arange(n).repeat(steps * phases)
    reports = fit(
        tmp_path,
        net,
        ByzantineRobustStrategy(
            algorithm=MEAN,
            local_steps=steps,
            outer_optimizer=FEDAVG,
            **({"start_method": "fork"} if ranks else {"workers_per_process": n}),
        ),
        devices=n if ranks else 1,
        data=DataLoader(
            TensorDataset(workers), batch_size=1 if ranks else n, shuffle=False, drop_last=True
        ),
        callbacks=[InOrder()],
    )
    w = torch.zeros(3)
    for _ in range(phases):
        w = (b + (1 - 0.05 * a) ** steps * (w - b)).mean(0)
    for report in reports:
        torch.testing.assert_close(report["weights"]["w"], w)


class InOrder(L.Callback):
    """Every rank's sampler takes its samples in order."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        sampler = trainer.train_dataloader.sampler
        if hasattr(sampler, "shuffle"):
            sampler.shuffle = False
            assert len(list(sampler)) == len(list(trainer.train_dataloader))


@pytest.mark.parametrize(
    "algorithm",
    [
        RobustSGD(aggregator=TrimmedMean(f=1)),
        RobustSGD(aggregator=Chain(pre=(NNM(f=1),), rule=CoordinateMedian(f=1))),
        RobustSGD(aggregator=SpectralFilter(f=1), worker_momentum=0.5, undo_worker_momentum=True),
        ByzEF21SGDM(aggregator=TrimmedMean(f=1), compressor=TopK(ratio=0.2), eta=0.5),
        EF14(aggregator=TrimmedMean(f=1), compressor=TopK(ratio=0.2)),
        SignSGDMajorityVote(),
        None,
    ],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_ranks_are_in_process_workers(algorithm: Any, tmp_path: Path) -> None:
    """Batch normalization, a liar, and phases of two steps."""
    net = Net("adam", norm=True)
    how = {
        "algorithm": algorithm,
        "local_steps": 2,
        "num_byzantine": 1,
        "callbacks": [ByzantineWorkers(SignFlip(), workers=[1])],
    }
    alone, *_ = train(tmp_path / "a", net, 4, False, **how)
    reports = train(tmp_path / "b", net, 4, True, **how)
    for report in reports:
        assert_equal(report, reports[0])
    assert_close(alone, reports[0], 2e-5)
    for name in ("loss_step", "loss_epoch"):
        assert reports[0]["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-4)


def test_a_liar_is_outvoted(tmp_path: Path) -> None:
    how = {
        "local_steps": 5,
        "max_epochs": 4,
        "callbacks": [ByzantineWorkers(SignFlip(10), workers=[1])],
    }
    how["outer_optimizer"] = FEDAVG
    robust, *_ = train(tmp_path / "a", Net(), 5, False, 10, algorithm=None, **how)
    mean, *_ = train(tmp_path / "b", Net(), 5, False, 10, **how)
    clean, *_ = train(tmp_path / "c", Net(), 5, False, 10, **{**how, "callbacks": []})
    assert robust["metrics"]["loss_epoch"] < clean["metrics"]["loss_epoch"] + 0.1
    assert mean["metrics"]["loss_epoch"] > clean["metrics"]["loss_epoch"] + 0.3


# -- between steps ---------------------------------------------------------------------------------


class Looks(L.Callback):
    """What the model is in a validation, and in the state dict, after every batch."""

    def __init__(self) -> None:
        self.validated: list[torch.Tensor] = []
        self.saved: list[torch.Tensor] = []

    def on_validation_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.validated.append(flat(module.net))

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        state = trainer.strategy.lightning_module_state_dict()
        self.saved.append(torch.cat([v.flatten().double() for v in state.values()]))


def flat(net: nn.Module) -> torch.Tensor:
    return torch.cat([v.detach().flatten().double() for v in net.state_dict().values()])


@pytest.mark.parametrize("ranks", [False, True], ids=["in process", "ranks"])
def test_validation_and_checkpoints_see_what_all_workers_have_in_common(
    ranks: bool, tmp_path: Path
) -> None:
    """Phases of 4 steps, a look after each: it changes with the phases alone, alike everywhere."""
    looks = Looks()
    reports = train(
        tmp_path,
        Net(norm=True),
        3,
        ranks,
        8,
        local_steps=4,
        callbacks=[looks],
        val_check_interval=1,
        limit_val_batches=1,
        extra=lambda trainer, module: (looks.validated, looks.saved),
    )
    for report in reports:
        for seen in report["extra"]:
            assert len(seen) == 8
            assert all(torch.equal(seen[i], seen[0]) for i in (1, 2))
            assert all(torch.equal(seen[i], seen[3]) for i in (4, 5, 6))
            assert not torch.equal(seen[0], seen[3])
            assert not torch.equal(seen[3], seen[7])
        for mine, rank_0s in zip(report["extra"], reports[0]["extra"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, rank_0s, strict=True))


def test_a_phases_logged_values_are_averaged_and_logged_where_it_ends(tmp_path: Path) -> None:
    class Logs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("batch", float(batch_idx), on_step=True, on_epoch=True)
            self.log("most", float(batch_idx), on_step=False, on_epoch=True, reduce_fx="max")
            return super().training_step(batch, batch_idx)

    class Shows(L.Callback):
        shown: ClassVar[list[float]] = []

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.shown.append(float(trainer.callback_metrics.get("batch_step", -1.0)))

    Shows.shown.clear()
    for i, ranks in enumerate((False, True)):
        report, *_ = train(
            tmp_path / str(i),
            Logs(),
            3,
            ranks,
            8,
            local_steps=3,
            callbacks=[Shows()],
            extra=lambda *_: Shows.shown[-8:],
        )
        assert report["extra"] == [-1, -1, 1, 1, 1, 4, 4, 6.5]
        assert report["metrics"]["batch_epoch"] == pytest.approx(3.5)
        assert report["metrics"]["most"] == 7


def test_what_is_logged_by_hand_arrives(tmp_path: Path) -> None:
    """In manual optimization a phase ends inside of the training step, before its last log."""

    class Logs(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            self.log("batch", float(batch_idx), on_step=True, on_epoch=True)

    reports = train(tmp_path, Logs(), 3, True, 7, local_steps=2)
    for report in reports:
        assert report["metrics"]["batch_epoch"] == pytest.approx(3.0)
        assert report["metrics"]["batch_step"] == 6.0


def test_an_epochs_values_are_logged_where_it_ends(tmp_path: Path) -> None:
    """Phases of 4 steps, epochs of 6; nothing that is logged keeps its graph."""

    class Logs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            weight = self.net[0].weight.sum()
            self.log("epoch", weight * 0 + float(self.current_epoch), on_epoch=True, on_step=False)
            return super().training_step(batch, batch_idx)

    class Sees(L.Callback):
        def __init__(self) -> None:
            self.epochs: list[float] = []

        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.epochs.append(float(trainer.callback_metrics["epoch"]))

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            kept = [log for step in trainer.strategy.local_workers._phase for log in step]
            calls = [call.value for log in kept for call in log.calls]
            assert not any(torch.is_tensor(value) and value.requires_grad for value in calls)

    for i, ranks in enumerate((False, True)):
        sees = Sees()
        report, *_ = train(
            tmp_path / str(i),
            Logs(),
            3,
            ranks,
            local_steps=4,
            max_epochs=3,
            callbacks=[sees],
            extra=lambda *_: sees.epochs,  # noqa: B023
        )
        assert report["extra"] == [0.0, 1.0, 2.0]


class SwapsInAverage(L.Callback):
    """Validates an average of weights, which it puts into the model for that time."""

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        here = [p.detach().clone() for p in module.parameters()]
        before = getattr(self, "average", here)
        self.average = [a.lerp(b, 0.1) for a, b in zip(before, here, strict=True)]

    def on_validation_start(self, trainer: L.Trainer, module: Any) -> None:
        if hasattr(self, "average"):
            self.aside = [p.detach().clone() for p in module.parameters()]
            self.put(module, self.average)

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if hasattr(self, "average"):
            self.put(module, self.aside)

    def put(self, module: Any, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(module.parameters(), values, strict=True):
                p.copy_(value)


@pytest.mark.parametrize("ranks", [False, True], ids=["in process", "ranks"])
def test_a_callback_may_swap_weights_for_a_validation(ranks: bool, tmp_path: Path) -> None:
    looks = {"val_check_interval": 1, "limit_val_batches": 1, "local_steps": 3}
    net, swaps = Net(), [SwapsInAverage()]
    plain = train(tmp_path / "a", net, 3, ranks, 8, **looks)
    swapped = train(tmp_path / "b", net, 3, ranks, 8, callbacks=swaps, **looks)
    for report in swapped:
        assert_close(report, plain[0])


def test_who_is_not_drawn_does_nothing(tmp_path: Path) -> None:
    """In process and on ranks the same three of five train in each phase."""

    class Counts(L.Callback):
        drawn: ClassVar[list[list[int]]] = []

        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            exchange = trainer.strategy.exchanges[0]
            exchange.observers.append(
                lambda outcome: self.drawn.append(
                    outcome.round.present.nonzero().flatten().tolist()
                )
            )

    found, net = {}, Net("adam")
    for ranks in (False, True):
        Counts.drawn.clear()
        reports = train(
            tmp_path / str(ranks),
            net,
            5,
            ranks,
            8,
            local_steps=LocalSteps(2, participants=3),
            num_byzantine=0,
            callbacks=[Counts()],
            extra=lambda *_: (Counts.drawn[-4:], trained(_[0])),
        )
        found[ranks] = reports
    assert [len(set(cohort)) for cohort in found[False][0]["extra"][0]] == [3] * 4
    assert found[False][0]["extra"][0] == found[True][0]["extra"][0]
    assert_close(found[False][0], found[True][0])
    rounds = found[True][0]["extra"][0]
    for rank, report in enumerate(found[True]):
        assert report["extra"][1] == 2 * sum(rank in cohort for cohort in rounds)


def trained(trainer: L.Trainer) -> int:
    """Steps that an Adam has taken."""
    (optimizer,) = trainer.optimizers
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


class Talks(L.Callback):
    """How often the transport has been asked to say anything, after every batch."""

    def __init__(self) -> None:
        self.count, self.counts = 0, []

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        transport = trainer.strategy.exchanges[0].transport
        for name in ("meet", "gather", "post", "agree", "uplink", "everybody"):
            setattr(transport, name, self.counted(getattr(transport, name)))

    def counted(self, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return method(*args, **kwargs)

        return call

    def on_train_batch_end(self, *_: Any) -> None:
        self.counts.append(self.count)


def test_nobody_says_anything_in_the_middle_of_a_phase(tmp_path: Path) -> None:
    talks = Talks()
    reports = train(
        tmp_path,
        Net(norm=True),
        3,
        True,
        8,
        local_steps=4,
        callbacks=[talks],
        extra=lambda *_: talks.counts,
    )
    for report in reports:
        counts = report["extra"]
        assert counts[:3] == [0, 0, 0]
        assert 0 < counts[3] == counts[4] == counts[5] == counts[6] < counts[7]


def test_learning_rates_follow_their_schedule_and_gradients_are_clipped(tmp_path: Path) -> None:
    """The schedule counts local steps; the norm is that of a worker's own gradient."""

    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.3)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    net, inner = Scheduled("sgd with momentum"), OPTIMIZERS["sgd with momentum"]

    def clipped(parameters: Any) -> torch.optim.Optimizer:
        optimizer = inner(list(parameters))
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.3)
        clip = partial(nn.utils.clip_grad_norm_, optimizer.param_groups[0]["params"], 0.2)
        step = optimizer.step

        def clipping(closure: Any) -> None:
            closure()
            clip()
            step()

        optimizer.step = clipping
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        return optimizer

    expected = diloco(copy.deepcopy(net.net), Parts(3).batches(), 3, 3, clipped, DILOCO)
    for i, ranks in enumerate((False, True)):
        for report in train(tmp_path / str(i), net, 3, ranks, local_steps=3, gradient_clip_val=0.2):
            for name, value in expected.state_dict().items():
                torch.testing.assert_close(
                    report["weights"][f"net.{name}"], value, rtol=1e-5, atol=1e-6
                )


# -- what may change the parameters, and end a phase -----------------------------------------------


@pytest.mark.parametrize(
    "module", [Manual(), Manual(clip=0.1), GAN()], ids=["manual", "clip", "gan"]
)
def test_manual_optimization_counts_each_optimizers_steps(module: Any, tmp_path: Path) -> None:
    reports = train(tmp_path, module, 3, True, 7, local_steps=2, algorithm=None)
    for report in reports[1:]:
        assert_equal(report, reports[0])
    assert all(torch.isfinite(value).all() for value in reports[0]["weights"].values())


def test_an_overflow_of_one_worker_keeps_phases_in_step(tmp_path: Path) -> None:
    """With a loss scaler a worker leaves a step out that others take."""

    class Overflows(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            here = self.trainer.global_rank == 1 and batch_idx == 1
            return loss * (float("inf") if here else 1.0)

    reports = train(tmp_path, Overflows(), 3, True, local_steps=2, algorithm=None, **cpu_amp())
    for report in reports:
        assert_equal(report, reports[0])
        assert all(torch.isfinite(value).all() for value in report["weights"].values())


@pytest.mark.parametrize("ranks", [False, True], ids=["in process", "ranks"])
def test_a_loss_scaler_needs_no_gradient_of_those_that_are_not_drawn(
    ranks: bool, tmp_path: Path
) -> None:
    steps = LocalSteps(2, participants=2)
    for report in train(tmp_path, Net(), 4, ranks, local_steps=steps, **cpu_amp()):
        assert all(torch.isfinite(value).all() for value in report["weights"].values())


def test_parameters_that_join_in_the_middle_of_a_phase_are_exchanged(tmp_path: Path) -> None:
    class Unfreezes(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, i: int) -> None:
            if i == 1:
                module.net[0].requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(module.net[0].parameters())})

    class Frozen(Net):
        def configure_optimizers(self) -> Any:
            return self.make([p for p in self.parameters() if p.requires_grad])

    net = Frozen(frozen=True)
    how = {"local_steps": 4, "callbacks": [Unfreezes()]}
    how["extra"] = lambda trainer, _: len(trainer.strategy.sync.outer[0].param_groups)
    alone, *_ = train(tmp_path / "a", net, 3, False, 8, **how)
    reports = train(tmp_path / "b", net, 3, True, 8, **how)
    assert not torch.equal(alone["weights"]["net.0.weight"], net.net[0].weight)
    for report in reports:
        assert_equal(report, reports[0])
        assert report["extra"] == 1  # as in a run that resumes
    assert_close(alone, reports[0])


def test_frozen_parameters_stay_whatever_the_outer_momentum_is(tmp_path: Path) -> None:
    class Zeros(Net):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=False)

    class Freezes(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, i: int) -> None:
            if i == 4:
                module.net[0].requires_grad_(False)
                self.before = module.net[0].weight.clone()

    freezes = Freezes()
    report, *_ = train(tmp_path, Zeros(), 3, False, 8, local_steps=2, callbacks=[freezes])
    assert torch.equal(report["weights"]["net.0.weight"], freezes.before)


@pytest.mark.parametrize("ranks", [False, True], ids=["in process", "ranks"])
def test_training_that_stops_in_the_middle_of_a_phase_ends_it(ranks: bool, tmp_path: Path) -> None:
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 5

    class AtTheEnd(L.Callback):
        def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
            torch.save(flat(module.net), tmp_path / f"end{trainer.global_rank}.pt")

    net = Net()
    train(tmp_path, net, 3, ranks, 8, local_steps=4, callbacks=[Stops(), AtTheEnd()])
    ends = [torch.load(tmp_path / f"end{rank}.pt") for rank in range(3 if ranks else 1)]
    assert all(torch.equal(end, ends[0]) for end in ends)
    expected = diloco(copy.deepcopy(net.net), Parts(3, 8).batches()[:5], 3, 4, net.make, DILOCO)
    torch.testing.assert_close(ends[0], flat(expected), rtol=1e-5, atol=1e-6)


def test_the_last_validation_is_of_what_training_ends_with(tmp_path: Path) -> None:
    """The last phase ends with the last batch, where that is known beforehand, and not after it."""

    class Sees(L.Callback):
        def on_validation_start(self, trainer: L.Trainer, module: Any) -> None:
            self.seen = flat(module.net).clone()

    sees, net = Sees(), Net()
    validated = {"callbacks": [sees], "limit_val_batches": 1}
    report, *_ = train(tmp_path, net, 3, False, 7, local_steps=3, **validated)
    final = torch.cat([v.flatten().double() for v in report["weights"].values()])
    assert torch.equal(sees.seen, final)
    expected = diloco(copy.deepcopy(net.net), Parts(3, 7).batches(), 3, 3, net.make, DILOCO)
    torch.testing.assert_close(final, flat(expected), rtol=1e-5, atol=1e-6)


# -- checkpoints -----------------------------------------------------------------------------------


class Saves(L.Callback):
    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.at = folder, at

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.folder / "middle.ckpt")


@pytest.mark.parametrize("fresh", [False, True], ids=["kept", "fresh"])
@pytest.mark.parametrize("at", [3, 4, 6], ids="after {} steps".format)
@pytest.mark.parametrize(("n", "ranks"), [(1, False), (3, False), (3, True)])
def test_a_run_resumes_bit_for_bit_in_the_middle_of_a_phase(
    n: int, ranks: bool, at: int, fresh: bool, tmp_path: Path
) -> None:
    steps = LocalSteps(4, fresh_optimizer=fresh, checkpoints="ranks")
    how = {
        "local_steps": steps,
        "algorithm": RobustSGD(aggregator=CoordinateMedian(), worker_momentum=0.5),
    }
    torch.manual_seed(3)
    net = Net("adam", norm=True, dropout=0.2)
    whole = train(tmp_path, net, n, ranks, 10, callbacks=[Saves(tmp_path, at)], **how)
    torch.manual_seed(4)
    other = Net("adam", norm=True, dropout=0.2)
    resumed = train(tmp_path, other, n, ranks, 10, ckpt_path=tmp_path / "middle.ckpt", **how)
    for a, b in zip(whole, resumed, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("ranks", [False, True], ids=["in process", "ranks"])
def test_a_checkpoint_in_a_validation_disturbs_nothing_and_resumes(
    ranks: bool, tmp_path: Path
) -> None:
    """In the middle of a phase, as ModelCheckpoint writes it where validation ends."""

    class SavesInValidation(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"step{trainer.global_step}.ckpt")

    how = {"local_steps": LocalSteps(4, checkpoints="ranks")}
    looks = {"val_check_interval": 1, "limit_val_batches": 1}
    net = Net("adam", norm=True)
    plain = train(tmp_path / "a", net, 3, ranks, 8, **how)
    seen = train(tmp_path / "b", net, 3, ranks, 8, callbacks=[SavesInValidation()], **looks, **how)
    middle = tmp_path / "step6.ckpt"
    resumed = train(tmp_path / "c", Net("adam", norm=True), 3, ranks, 8, ckpt_path=middle, **how)
    for report in (*seen, *resumed):
        assert_equal(plain[0], report)


def test_a_run_without_local_steps_says_what_it_leaves(tmp_path: Path) -> None:
    train(tmp_path, Net(), 3, False, 6, local_steps=4, callbacks=[Saves(tmp_path, 5)])
    strategy = ByzantineRobustStrategy(algorithm=MEAN, workers_per_process=3)
    trainer = L.Trainer(**QUIET, max_epochs=2, strategy=strategy)
    with pytest.warns(UserWarning, match="of a run with local_steps"):
        trainer.fit(Net(), Parts(3, 6), ckpt_path=tmp_path / "middle.ckpt")


def test_one_file_resumes_at_the_phases_start(tmp_path: Path) -> None:
    """Saved in the second step of the second phase: what all had in common is what goes on."""
    net = Net()
    train(tmp_path, net, 3, True, 10, local_steps=4, callbacks=[Saves(tmp_path, 6)])
    assert [path.name for path in tmp_path.glob("middle*")] == ["middle.ckpt"]
    batches, expected = Parts(3, 10).batches(), copy.deepcopy(net.net)
    outer = DILOCO(expected.parameters())
    diloco(expected, batches[:4], 3, 4, net.make, lambda parameters: outer)
    saved = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    torch.testing.assert_close(saved["state_dict"]["net.0.weight"], expected[0].weight.detach())
    diloco(expected, batches[6:], 3, 4, net.make, lambda parameters: outer)
    resumed = train(tmp_path, Net(), 3, True, 10, local_steps=4, ckpt_path=tmp_path / "middle.ckpt")
    for report in resumed:
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(
                report["weights"][f"net.{name}"], value, rtol=1e-5, atol=1e-6
            )


def test_files_of_ranks_go_with_their_checkpoint(tmp_path: Path) -> None:
    """What ModelCheckpoint removes, links to, and what an old save left behind."""
    how: dict[str, Any] = {"local_steps": LocalSteps(4, checkpoints="ranks")}
    keeps = ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=1, save_top_k=1, monitor="step", mode="max"
    )
    keeps.CHECKPOINT_NAME_LAST, keeps.save_last = "last", "link"
    callbacks = [keeps, Saves(tmp_path, 2)]
    whole = train(
        tmp_path, Net(), 3, True, 7, callbacks=callbacks, enable_checkpointing=True, **how
    )
    files = sorted(path.name for path in tmp_path.glob("step*"))
    assert files == ["step=7.ckpt", *(f"step=7.ckpt.rank{rank}" for rank in range(3))]
    again = train(tmp_path, Net(), 3, True, 7, ckpt_path=tmp_path / "last.ckpt", **how)
    for a, b in zip(whole, again, strict=True):
        assert_equal(a, b)
    (tmp_path / "step=7.ckpt.rank1").write_bytes((tmp_path / "middle.ckpt.rank1").read_bytes())
    with pytest.raises(Exception, match=r"should belong to .*Found one that was saved in"):
        train(tmp_path, Net(), 3, True, 9, ckpt_path=tmp_path / "step=7.ckpt", **how)


def test_a_lost_file_of_a_rank_is_named(tmp_path: Path) -> None:
    steps = LocalSteps(4, checkpoints="ranks")
    train(tmp_path, Net(), 3, True, 6, local_steps=steps, callbacks=[Saves(tmp_path, 3)])
    for path in tmp_path.glob("middle.ckpt.rank*"):
        path.unlink()
    with pytest.raises(Exception, match=r"no .*middle\.ckpt\.rank\d.*Copy it"):
        train(tmp_path, Net(), 3, True, 6, local_steps=steps, ckpt_path=tmp_path / "middle.ckpt")


# -- bad input -------------------------------------------------------------------------------------


def test_refused_arguments() -> None:
    with pytest.raises(ValueError, match="`steps` of LocalSteps"):
        ByzantineRobustStrategy(local_steps=0)
    with pytest.raises(ValueError, match="`participants` of LocalSteps"):
        LocalSteps(2, participants=0)
    with pytest.raises(ValueError, match="`checkpoints` of LocalSteps"):
        LocalSteps(2, checkpoints="every")
    with pytest.raises(ValueError, match="Found no `local_steps`"):
        ByzantineRobustStrategy(outer_optimizer=FEDAVG)
    with pytest.raises(ValueError, match="`outer_optimizer` should make.*Found 'sgd'"):
        ByzantineRobustStrategy(local_steps=2, outer_optimizer="sgd")  # type: ignore[arg-type]


def test_an_outer_optimizer_that_cannot_be_made_leaves_no_hook(tmp_path: Path) -> None:
    """Else every later optimizer of the process would fail."""

    def fails(parameters: Any) -> Any:
        raise RuntimeError("no memory")

    strategy = ByzantineRobustStrategy(workers_per_process=2, local_steps=2, outer_optimizer=fails)
    with pytest.raises(RuntimeError, match="no memory"):
        fit(tmp_path, Plain(), strategy, data=loader(8))
    fit(tmp_path, Plain(), "auto", data=loader(8))


class TwoOptimizers(Manual):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]


class OwnScaler(Manual):
    def __init__(self) -> None:
        super().__init__()
        self.scaler = torch.amp.GradScaler("cpu")


class ByHand(Net):
    """Has a second optimizer that Lightning does not know."""

    def on_train_start(self) -> None:
        self.second = torch.optim.SGD(self.net[0].parameters(), lr=0.1)

    def on_train_batch_end(self, *_: Any) -> None:
        self.second.step()


class NoOptimizer(Net):
    def configure_optimizers(self) -> None:
        return None


class RawSteps(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(loss_of(self.net, batch))
        self.optimizers(use_pl_optimizer=False).step()


@pytest.mark.parametrize(
    ("module", "how", "says"),
    [
        (Net(), {"algorithm": ByzVRMarinaPP(aggregator=Mean())}, "further gradients"),
        (Net(), {"trusted_data": blobs(8), "algorithm": DStar()}, "further gradients"),
        (Net(), {"local_steps": LocalSteps(2, participants=4)}, "Found 4 of n=3"),
        (Net(), {"algorithm": DStar(), "local_steps": LocalSteps(2, participants=2)}, "its own"),
        (Net(), {"vectorize": True}, "vectorize"),
        (Net(), {"data_parallel_size": 1, "ranks": True}, "sharded"),
        (Net(), {"accumulate_grad_batches": 2}, "accumulate_grad_batches"),
        (Net("changes its groups"), {}, "changes them"),
        (TwoOptimizers(), {"ranks": True}, "several optimizers"),
        (OwnScaler(), {"ranks": True}, "scaler"),
        (RawSteps(), {"ranks": True}, r"self\.optimizers\(\)"),
        (ByHand(), {"ranks": True}, r"from configure_optimizers"),
        (NoOptimizer(), {}, "gives none"),
        (Manual(), {"local_steps": LocalSteps(2, participants=2), "ranks": True}, "automatic"),
        (
            Net(),
            {"local_steps": LocalSteps(2, participants=3), "algorithm": ByzEF21SGDM(Mean())},
            "knows of all n",
        ),
        (Net(), {"callbacks": [ReplicaCheck()], "ranks": True}, "ReplicaCheck compares"),
        (
            Net(),
            {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})], "max_epochs": 2},
            "step without one",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_refused_set_ups(module: Any, how: dict[str, Any], says: str, tmp_path: Path) -> None:
    ranks = how.pop("ranks", False)
    with pytest.raises(Exception, match=says):
        train(tmp_path, module, 3, ranks, **{"local_steps": 2, **how})
