"""Gradients are exchanged where DDP reduces them: with a mean, every way to train ends with DDP's
weights; with memory, nothing mixes.
"""

from __future__ import annotations

import copy
import functools
import os
import random
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from harness import assert_close, assert_equal, averaging, cpu_amp, fit, forked_ddp
from models import Plain, loader, loss_of
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from zoo import ALGORITHMS

from lightning_byz import (
    AllGather,
    ByzEF21SGDM,
    CoordinateMedian,
    InProcess,
    Mean,
    RobustSGD,
    Sharded,
    TopK,
)
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import Contribution
from lightning_byz.lightning import ByzantineRobustStrategy
from lightning_byz.types import Gradients

RANKS = 3
processes = pytest.mark.processes
Batch = Sequence[torch.Tensor]


# -- ways to train ---------------------------------------------------------------------------------


class ByHand(Plain):
    """Manual optimization with one optimizer; `step` is what a subclass is about."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.step(batch, batch_idx)

    def loss(self, batch: Batch) -> torch.Tensor:
        return loss_of(self.net, batch)


class Raw(ByHand):
    def step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class RawClosure(ByHand):
    def step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


class OwnScaler(ByHand):
    """A loss scaler of one's own, whose step is given the raw optimizer; the seventh batch
    overflows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        self.scales: list[float] = []

    def step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        loss = self.loss(batch) * (torch.inf if batch_idx == 6 else 1.0)
        self.manual_backward(self.scaler.scale(loss))
        self.scaler.step(optimizer)
        self.scaler.update()
        self.scales.append(self.scaler.get_scale())


class InnerOptimizer(Plain):
    """An override that takes the optimizer out of Lightning's wrapper."""

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        optimizer_closure()
        optimizer.optimizer.step()


class Update(ByHand):
    """No optimizer steps: the update is written by hand."""

    def step(self, batch: Batch, batch_idx: int) -> None:
        self.zero_grad()
        self.manual_backward(self.loss(batch))
        with torch.no_grad():
            for p in self.parameters():
                p -= 0.1 * p.grad


class Outside(ByHand):
    """A parameter that no optimizer has, and that is updated by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), 0.1)

    def step(self, batch: Batch, batch_idx: int) -> None:
        self.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]) * self.scale, batch[1]))
        self.optimizers().step()
        self.scale.data -= 0.1 * self.scale.grad


class Blocked(ByHand):
    """Two micro-batches add up locally, the third one is exchanged with them."""

    def step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        ends = batch_idx % 3 == 2
        with optimizer.toggle_model(sync_grad=ends):
            self.manual_backward(self.loss(batch) / 3)
        if ends:
            optimizer.step()
            optimizer.zero_grad()


class AddsUp(ByHand):
    """Every micro-batch is exchanged, and aggregates add up in ``p.grad``, into the same
    tensors.
    """

    set_to_none = True

    def step(self, batch: Batch, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch) / 3)
        if batch_idx % 3 == 2:
            self.optimizers().step()
            self.optimizers().zero_grad(set_to_none=self.set_to_none)


class AddsUpInPlace(AddsUp):
    set_to_none = False


class ClipsEach(ByHand):
    """Clips what has added up after every backward pass."""

    def step(self, batch: Batch, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        self.clip_gradients(self.optimizers(), 0.1, "norm")
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class ClipsByTorch(ByHand):
    def step(self, batch: Batch, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(self.loss(batch))
        nn.utils.clip_grad_norm_(self.parameters(), 0.05)
        self.optimizers().step()


class SAM(torch.optim.SGD):
    """Sharpness-aware minimization (arXiv:2010.01412), whose closure is evaluated twice, or whose
    halves are called one by one.
    """

    @torch.no_grad()
    def first(self) -> None:
        self.parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in self.parameters]).norm() + 1e-12
        self.moves = [0.05 * p.grad / norm for p in self.parameters]
        for p, move in zip(self.parameters, self.moves, strict=True):
            p.add_(move)

    @torch.no_grad()
    def second(self) -> None:
        for p, move in zip(self.parameters, self.moves, strict=True):
            p.sub_(move)
        super().step()

    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> Any:
        if closure is None:
            return super().step()
        with torch.enable_grad():
            loss = closure()
        self.first()
        with torch.enable_grad():
            closure()
        self.second()
        return loss


class Sharp(Plain):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SAM(self.parameters(), 0.1)


class SharpByHand(ByHand):
    configure_optimizers = Sharp.configure_optimizers

    def step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        for half in (optimizer.first, optimizer.second):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            half()


class Scheduled(ByHand):
    def step(self, batch: Batch, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(self.loss(batch))
        self.optimizers().step()


def gan(how: str, critics: int = 1, zero: str = "before") -> type[L.LightningModule]:
    """A GAN of two optimizers, whose every loss reaches both networks.

    Args:
        how: "toggled" or "".
        critics: steps of the critic for one of the generator.
        zero: gradients are zeroed "before" the backward pass, or "after" the step.
    """

    class Game(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 10))
            self.critic = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1))

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [
                torch.optim.Adam(self.generator.parameters(), 0.01),
                torch.optim.SGD(self.critic.parameters(), 0.1),
            ]

        def turn(self, optimizer: Any, loss: Callable[[], torch.Tensor]) -> None:
            if how == "toggled":
                self.toggle_optimizer(optimizer)
            if zero == "before":
                optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()
            if zero == "after":
                self.zero_grad()
            if how == "toggled":
                self.untoggle_optimizer(optimizer)

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            x, z = batch[0], batch[0][:, :4].flip(1)
            for_generator, for_critic = self.optimizers()
            for _ in range(critics):
                self.turn(
                    for_critic,
                    lambda: (
                        F.softplus(-self.critic(x)) + F.softplus(self.critic(self.generator(z)))
                    ).mean(),
                )
            self.turn(for_generator, lambda: F.softplus(-self.critic(self.generator(z))).mean())

    return Game


WAYS: dict[str, tuple[Callable[[], L.LightningModule], Callable[[], dict[str, Any]]]] = {
    "raw optimizer": (Raw, dict),
    "raw optimizer with a closure": (RawClosure, dict),
    "a loss scaler of one's own": (OwnScaler, dict),
    "the optimizer out of the wrapper": (InnerOptimizer, dict),
    "an update by hand": (Update, dict),
    "a parameter in no optimizer": (Outside, dict),
    "blocked micro-batches": (Blocked, dict),
    "micro-batches that are exchanged": (AddsUp, dict),
    "micro-batches into the same tensors": (AddsUpInPlace, dict),
    "clipping after every backward": (ClipsEach, dict),
    "torch's clipping": (ClipsByTorch, dict),
    "SAM with a closure": (Sharp, dict),
    "SAM by hand": (SharpByHand, dict),
    "manual in 16-mixed": (Scheduled, cpu_amp),
    "manual in bf16-mixed": (Scheduled, lambda: {"precision": "bf16-mixed"}),
    "a GAN, toggled": (gan("toggled"), dict),
    "a GAN, not toggled": (gan(""), dict),
    "a GAN, not toggled, zeroed after": (gan("", zero="after"), dict),
    "a critic's loop": (gan("", critics=3), dict),
    "a critic's loop, toggled": (gan("toggled", critics=3), dict),
}


def rand(rank: int, samples: int = 16) -> torch.Tensor:
    return torch.randn(samples, 10, generator=torch.Generator().manual_seed(rank))


@pytest.mark.thorough(keep=6)
@processes
@pytest.mark.parametrize("way", WAYS)
def test_with_a_mean_every_way_to_train_is_ddps(way: str, tmp_path: Path) -> None:
    make, trainer = WAYS[way]
    runs = {}
    for name, strategy in (
        ("ddp", forked_ddp(find_unused_parameters="GAN" in way or "critic" in way)),
        ("byz", averaging(start_method="fork")),
    ):
        L.seed_everything(1, verbose=False)
        runs[name] = fit(
            tmp_path / name,
            make(),
            strategy,
            devices=RANKS,
            data=loader(8),
            extra=lambda _, m: getattr(m, "scales", None),
            **trainer(),
        )
    for report in runs["byz"][1:]:
        assert_equal(runs["byz"][0], report)
    assert_close(runs["ddp"][0], runs["byz"][0], 2e-3 if "16" in way else 1e-5)
    assert runs["ddp"][0]["extra"] == runs["byz"][0]["extra"]
    assert runs["ddp"][0]["steps"] == runs["byz"][0]["steps"]
    L.seed_everything(1, verbose=False)
    start = make().state_dict()
    assert any(
        not torch.equal(start[name], value) for name, value in runs["byz"][0]["weights"].items()
    ), "it did not train"


@processes
@pytest.mark.parametrize("way", ["micro-batches that are exchanged", "SAM by hand"])
def test_aggregates_that_come_in_shards_add_up(way: str, tmp_path: Path) -> None:
    """The memory of one is not the next one's while it is looked at."""
    runs = []
    for strategy in (forked_ddp(), averaging(start_method="fork", transport=Sharded())):
        L.seed_everything(1, verbose=False)
        runs += fit(tmp_path, WAYS[way][0](), strategy, devices=RANKS, data=loader(8))[:1]
    assert_close(runs[0], runs[1])


class Halves(ByHand):
    """Two halves of a batch, exchanged one after the other, with zeroed gradients in between or
    not.
    """

    def __init__(self, zeroed: bool) -> None:
        super().__init__()
        self.zeroed, self.estimates = zeroed, []

    def on_fit_start(self) -> None:
        (exchange,) = self.trainer.strategy.exchanges
        exchange.observers.append(lambda outcome: self.estimates.append(outcome.estimate.clone()))

    def step(self, batch: Batch, batch_idx: int) -> None:
        self.zero_grad()
        for half in (0, 1):
            if half and self.zeroed:
                self.zero_grad()
            self.manual_backward(self.loss([part[half::2] for part in batch]))


@processes
@pytest.mark.parametrize("transport", [AllGather, Sharded])
def test_what_is_sent_holds_no_aggregate(transport: Any, tmp_path: Path) -> None:
    """A momentum of workers would remember it."""
    seen = []
    for zeroed in (False, True):
        L.seed_everything(1, verbose=False)
        strategy = ByzantineRobustStrategy(
            RobustSGD(Mean(), worker_momentum=0.9),
            transport(),
            num_byzantine=0,
            start_method="fork",
        )
        run = fit(
            tmp_path,
            Halves(zeroed),
            strategy,
            devices=2,
            data=loader(24),
            extra=lambda _, module: module.estimates,
        )
        seen.append(run[0]["extra"])
    assert len(seen[0]) >= 4
    for kept, zeroed in zip(*seen, strict=True):
        torch.testing.assert_close(kept, zeroed, rtol=1e-5, atol=1e-7)


class Both(Plain):
    """One loss for two optimizers, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seen: list[list[torch.Tensor]] = []

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.net[i].parameters(), 0.1) for i in (0, 2)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.zero_grad()
        self.manual_backward(loss_of(self.net, batch))
        self.seen.append([p.grad.clone() for p in self.parameters()])
        for optimizer in self.optimizers():
            optimizer.step()


@processes
@pytest.mark.parametrize("remembers", [False, True])
def test_groups_wait_for_their_optimizers_only_where_earlier_gradients_are_remembered(
    remembers: bool, tmp_path: Path
) -> None:
    """Else the gradient is everybody's where backward has ended, as under DDP."""
    strategy = ByzantineRobustStrategy(
        RobustSGD(Mean(), worker_momentum=0.9 if remembers else 0.0),
        num_byzantine=0,
        start_method="fork",
    )
    first, second = fit(
        tmp_path, Both(), strategy, devices=2, data=loader(24), extra=lambda _, m: m.seen
    )
    assert len(first["extra"]) >= 4
    for mine, theirs in zip(first["extra"], second["extra"], strict=True):
        equal = [torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)]
        assert equal == [not remembers] * 4
    assert_equal(first, second)


class Keeps(Plain):
    """Keeps all gradients, without a copy."""

    def on_fit_start(self) -> None:
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.kept += [(p.grad, p.grad.clone()) for p in self.parameters()]


@pytest.mark.parametrize(
    ("transport", "algorithm"),
    [
        pytest.param(Sharded, RobustSGD(Mean()), marks=processes),
        pytest.param(AllGather, RobustSGD(Mean()), marks=processes),
        pytest.param(AllGather, ByzEF21SGDM(Mean(), TopK(0.1)), marks=processes),
        pytest.param(InProcess, ByzEF21SGDM(Mean(), TopK(0.1))),
    ],
    ids=["sharded", "gathered", "few change, gathered", "few change, in-process"],
)
def test_a_gradient_that_somebody_keeps_stays_what_it_was(
    transport: Any, algorithm: Any, tmp_path: Path
) -> None:
    alone = transport is InProcess
    strategy = ByzantineRobustStrategy(
        algorithm,
        transport(),
        num_byzantine=0,
        start_method="fork",
        workers_per_process=2 if alone else 1,
    )
    reports = fit(
        tmp_path,
        Keeps(),
        strategy,
        devices=1 if alone else 2,
        data=loader(24),
        extra=lambda _, m: [torch.equal(*pair) for pair in m.kept],
    )
    for report in reports:
        assert len(report["extra"]) >= 20 and all(report["extra"])


# -- edits of gradients in hooks -------------------------------------------------------------------


def edit(module: L.LightningModule) -> None:
    """Clips, which is not the same before averaging and after it."""
    nn.utils.clip_grad_norm_(module.parameters(), 0.05)
    for p in module.parameters():
        if p.grad is not None:
            p.grad[0] = 0


class AfterBackward(Plain):
    def on_after_backward(self) -> None:
        edit(self)


class BeforeStep(Plain):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        edit(self)


class InStep(Plain):
    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        optimizer_closure()
        edit(self)
        optimizer.step()


class InClipping(Plain):
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        edit(self)


class Replaces(Plain):
    """Other tensors in place of the gradients."""

    def on_after_backward(self) -> None:
        for p in self.parameters():
            p.grad = p.grad.clamp(-0.01, 0.01)


class EditingCallback(L.Callback):
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        edit(pl_module)


class FromOutside(Plain):
    def configure_callbacks(self) -> list[L.Callback]:
        return [EditingCallback()]


EDITS = [AfterBackward, BeforeStep, InStep, InClipping, Replaces, FromOutside]


@pytest.mark.parametrize(
    "devices", [pytest.param(1, id="in-process"), pytest.param(RANKS, id="ranks", marks=processes)]
)
@pytest.mark.parametrize("make", EDITS, ids=lambda make: make.__name__)
def test_an_edit_of_the_gradients_is_an_edit_of_the_aggregate(
    make: type[Plain], devices: int, tmp_path: Path
) -> None:
    runs = []
    others = (
        ("auto", averaging(workers_per_process=4))
        if devices == 1
        else (forked_ddp(), averaging(start_method="fork"))
    )
    for strategy in others:
        L.seed_everything(1, verbose=False)
        runs.append(
            fit(tmp_path, make(), strategy, devices=devices, data=loader(24 if devices == 1 else 8))
        )
    assert_close(runs[0][0], runs[1][0])
    for report in runs[1][1:]:
        assert_equal(runs[1][0], report)


@processes
def test_a_users_hook_on_a_parameter_runs_before_the_exchange(tmp_path: Path) -> None:
    """It sees this rank's own gradient, and what it makes of it is what is sent; registered before
    or during the run.
    """

    def clamp(p: torch.Tensor) -> None:
        p.grad.clamp_(-0.02, 0.02)

    class Hooked(Plain):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx in (0, 3):
                for p in self.parameters():
                    p.register_post_accumulate_grad_hook(clamp)

    runs = []
    for strategy in (
        forked_ddp(),
        *(
            averaging(start_method="fork", transport=t)
            for t in (AllGather(), Sharded(bucket_size=1))
        ),
    ):
        L.seed_everything(1, verbose=False)
        runs += fit(tmp_path, Hooked(), strategy, devices=RANKS, data=loader(8))[:1]
    assert_close(runs[0], runs[1])
    assert_close(runs[0], runs[2])


def test_an_edit_between_micro_batches_of_in_process_workers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match="edited between micro-batches.*on_before_optimizer_step"
    ):
        fit(tmp_path, AfterBackward(), averaging(workers_per_process=4), accumulate_grad_batches=2)


def test_backward_with_a_graph_in_process(tmp_path: Path) -> None:
    class Graph(Plain):
        def backward(self, loss: torch.Tensor) -> None:
            loss.backward(create_graph=True)

        def on_after_backward(self) -> None:
            assert not any(p.grad.requires_grad for p in self.parameters())

    runs = []
    for make, strategy in ((Plain, "auto"), (Graph, averaging(workers_per_process=4))):
        L.seed_everything(1, verbose=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs += fit(tmp_path, make(), strategy)
    assert_close(*runs)


# -- methods that remember -------------------------------------------------------------------------

REMEMBER = {"default": None, "ef21": ByzEF21SGDM(CoordinateMedian(), TopK(ratio=0.2))}


def states(trainer: L.Trainer, module: L.LightningModule) -> list[Any]:
    """What the algorithm remembers of every optimizer, and how many rounds there were."""
    exchanges = trainer.strategy.exchanges
    return copy.deepcopy([(e.step, e.workers, e.server) for e in exchanges])


def assert_same_states(a: Any, b: Any) -> None:
    for (step_a, workers_a, server_a), (step_b, workers_b, server_b) in zip(a, b, strict=True):
        assert step_a == step_b > 0
        pairs = [*((workers_a[w], workers_b[w]) for w in workers_a), (server_a, server_b)]
        for one, other in pairs:
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.thorough(keep=1)
@processes
@pytest.mark.parametrize(
    "transport", [AllGather(), Sharded(bucket_size=64)], ids=["all-gather", "sharded"]
)
@pytest.mark.parametrize("name", REMEMBER)
def test_a_gan_that_is_not_toggled_remembers_what_the_toggled_one_does(
    name: str, transport: Any, tmp_path: Path
) -> None:
    runs = []
    for how, zero in (("toggled", "before"), ("", "before"), ("", "after")):
        L.seed_everything(1, verbose=False)
        strategy = ByzantineRobustStrategy(
            REMEMBER[name], copy.deepcopy(transport), start_method="fork"
        )
        runs.append(
            fit(
                tmp_path,
                gan(how, critics=2, zero=zero)(),
                strategy,
                devices=RANKS,
                data=loader(8),
                extra=states,
            )
        )
    for run in runs:
        for report, first in zip(run, runs[0], strict=True):
            assert_equal(first, report)
            assert_same_states(first["extra"], report["extra"])


@processes
def test_gradients_that_wait_for_their_optimizer_may_not_be_edited(tmp_path: Path) -> None:
    class Edits(gan("")):  # type: ignore[misc]
        def on_after_backward(self) -> None:
            edit(self)

    with pytest.raises(Exception, match=r"edited before they were exchanged.*toggled_optimizer"):
        fit(
            tmp_path,
            Edits(),
            ByzantineRobustStrategy(start_method="fork"),
            devices=RANKS,
            data=loader(8),
        )


@processes
@pytest.mark.parametrize("name", REMEMBER)
def test_blocked_micro_batches_send_one_message(name: str, tmp_path: Path) -> None:
    reports = fit(
        tmp_path, Blocked(), ByzantineRobustStrategy(REMEMBER[name], start_method="fork"), devices=RANKS, data=loader(8),
        extra=lambda trainer, _: [exchange.step for exchange in trainer.strategy.exchanges], limit_train_batches=9,
    )  # fmt: skip
    for report in reports:
        assert_equal(reports[0], report)
        assert report["extra"] == [3]


@pytest.mark.thorough(keep=1)
@processes
@pytest.mark.parametrize(
    "make", [Scheduled, Blocked, AddsUp, Raw, SharpByHand], ids=lambda make: make.__name__
)
def test_overlap_changes_no_bit_of_manual_optimization(make: Any, tmp_path: Path) -> None:
    runs = []
    for transport in (Sharded(overlap=False), Sharded(bucket_size=1)):
        L.seed_everything(1, verbose=False)
        strategy = ByzantineRobustStrategy(
            RobustSGD(CoordinateMedian(), worker_momentum=0.9), transport, start_method="fork"
        )
        extra = lambda trainer, _: trainer.strategy.groups[0].overlap is not None  # noqa: E731
        runs.append(fit(tmp_path, make(), strategy, devices=RANKS, data=loader(8), extra=extra))
    assert [run[0]["extra"] for run in runs] == [False, True]
    assert_equal(runs[0][0], runs[1][0])


# -- gradients that come by other ways -------------------------------------------------------------


class PlainBackward(ByHand):
    def step(self, batch: Batch, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.loss(batch).backward()
        self.optimizers().step()


class ByAutograd(ByHand):
    def step(self, batch: Batch, batch_idx: int) -> None:
        parameters = list(self.parameters())
        for p, grad in zip(
            parameters, torch.autograd.grad(self.loss(batch), parameters), strict=True
        ):
            p.grad = grad
        self.optimizers(use_pl_optimizer=False).step()


@pytest.mark.thorough(keep=2)
@processes
@pytest.mark.parametrize("make", [PlainBackward, ByAutograd], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["mean", *REMEMBER])
def test_gradients_from_elsewhere_are_exchanged_at_the_step(
    make: Any, name: str, tmp_path: Path
) -> None:
    runs = []
    for module in (Scheduled, make):
        L.seed_everything(1, verbose=False)
        algorithm = RobustSGD(Mean()) if name == "mean" else REMEMBER[name]
        runs.append(
            fit(
                tmp_path,
                module(),
                ByzantineRobustStrategy(algorithm, start_method="fork"),
                devices=RANKS,
                data=loader(8),
                extra=states,
            )
        )
    for first, report in zip(*runs, strict=True):
        assert_equal(first, report)
        assert_same_states(first["extra"], report["extra"])


@processes
@pytest.mark.parametrize("by_data", [False, True])
def test_an_update_by_gradients_that_nobody_exchanged_raises(by_data: bool, tmp_path: Path) -> None:
    class Drifts(ByHand):
        def step(self, batch: Batch, batch_idx: int) -> None:
            self.zero_grad()
            self.loss(batch).backward()
            with torch.no_grad():
                for p in self.parameters():
                    (p.data if by_data else p).sub_(0.1 * p.grad)

    with pytest.raises(
        Exception, match=r"have changed while their gradients.*Call self.manual_backward"
    ):
        fit(tmp_path, Drifts(), averaging(start_method="fork"), devices=RANKS, data=loader(8))


@processes
def test_a_blocked_backward_onto_an_aggregate_raises(tmp_path: Path) -> None:
    class Mixes(ByHand):
        def step(self, batch: Batch, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            with self.optimizers().toggle_model(sync_grad=False):
                self.manual_backward(self.loss(batch))

    with pytest.raises(Exception, match=r"aggregate of an earlier exchange.*zero_grad"):
        fit(tmp_path, Mixes(), averaging(start_method="fork"), devices=RANKS, data=loader(8))


@processes
def test_an_optimizer_that_steps_during_backward_is_refused(tmp_path: Path) -> None:
    class Eager(ByHand):
        def on_train_start(self) -> None:
            self.inner = {p: torch.optim.SGD([p], 0.1) for p in self.parameters()}
            for p in self.parameters():
                p.register_post_accumulate_grad_hook(lambda p: self.inner[p].step())

        def step(self, batch: Batch, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))

    with pytest.raises(Exception, match="An optimizer should step after backward"):
        fit(tmp_path, Eager(), averaging(start_method="fork"), devices=RANKS, data=loader(8))


# -- a closure that is evaluated again -------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [Sharp, functools.partial(Plain, optimizer="lbfgs")], ids=["SAM", "LBFGS"]
)
def test_optimizers_that_evaluate_their_closure_again_in_process(make: Any, tmp_path: Path) -> None:
    runs = []
    for strategy in ("auto", averaging(workers_per_process=4)):
        L.seed_everything(1, verbose=False)
        runs += fit(tmp_path, make(), strategy, precision="64-true")
    assert_close(*runs, 1e-6)


@pytest.mark.parametrize("case", ALGORITHMS, ids=lambda case: case.name)
def test_a_round_that_is_repeated_takes_the_last_ones_place(case: Any) -> None:
    """The memory after it is what it would be if the last round had never been."""
    n, d = 10, 64
    generator = torch.Generator().manual_seed(1)
    rounds = [torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(4)]

    def contributions(rows: torch.Tensor) -> list[Contribution]:
        return [Contribution(Gradients(row, row), torch.ones(1, dtype=torch.bool)) for row in rows]

    def run(order: Sequence[int], repeated: int) -> Exchange:
        transport = InProcess()
        transport.connect(0, 1, n, torch.device("cpu"))
        exchange = Exchange(case.algorithm.for_sizes([d]), transport, seed=3)
        x = torch.zeros(d, dtype=torch.float64)
        for place, i in enumerate(order):
            memory = exchange.memory()
            if place == repeated:
                exchange.run(contributions(rounds[3]), x)
                exchange.repeat(memory)
                exchange.step -= 1  # the same keys for its random streams
            exchange.run(contributions(rounds[i]), x)
        return exchange

    algorithm = case.algorithm
    if algorithm.needs_drift or algorithm.needs_previous:
        with pytest.raises(ValueError, match="closure several times"):
            run((0, 1, 2), 1)
        return
    for repeated in (0, 1, 2):
        plain, again = run((0, 1, 2), -1), run((0, 1, 2), repeated)
        pairs = [
            *((plain.workers[w], again.workers[w]) for w in range(n)),
            (plain.server, again.server),
        ]
        for one, other in pairs:
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


# -- ranks that are not where the others are -------------------------------------------------------


@processes
def test_a_rank_that_skips_a_manual_step_is_named(tmp_path: Path) -> None:
    class Skips(ByHand):
        def step(self, batch: Batch, batch_idx: int) -> None:
            if self.global_rank == 1 and batch_idx == 4:
                return
            Scheduled.step(self, batch, batch_idx)

    with pytest.raises(Exception, match=r"out of step.*'round 4 of optimizer 0.*'training step 4"):
        fit(tmp_path, Skips(), averaging(start_method="fork"), devices=RANKS, data=loader(8))


class Uneven(IterableDataset):
    def __iter__(self) -> Any:
        rank = torch.distributed.get_rank()
        for row in rand(rank, 24 + 8 * rank):
            yield row, (row[0] > 0).long()


@processes
def test_uneven_numbers_of_batches_are_told_on_every_rank(tmp_path: Path) -> None:
    with pytest.raises(
        Exception,
        match=r"uneven numbers of batches.*rank 0 at 'training step 2, the last one of its epoch, then",
    ):
        fit(
            tmp_path,
            Plain(),
            averaging(start_method="fork"),
            devices=RANKS,
            data=torch.utils.data.DataLoader(Uneven(), batch_size=8),
        )


@processes
def test_a_rank_without_a_batch_is_silent(tmp_path: Path) -> None:
    class Sometimes(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            def collate(samples: Any) -> Any:
                batch = torch.utils.data.default_collate(samples)
                self.count = getattr(self, "count", 0) + 1
                return None if self.trainer.global_rank == 1 and self.count in (1, 4) else batch

            data = loader(8)
            return torch.utils.data.DataLoader(data.dataset, batch_size=8, collate_fn=collate)

    silences = lambda trainer, _: trainer.strategy.report.silences  # noqa: E731
    reports = fit(
        tmp_path,
        Plain(),
        averaging(start_method="fork"),
        devices=RANKS,
        data=Sometimes(),
        extra=silences,
    )
    for report in reports:
        assert_equal(reports[0], report)
        assert report["steps"] == 10
        assert report["extra"] == {1: 2}


@processes
def test_a_rank_that_dies_is_named(tmp_path: Path) -> None:
    class Dies(Plain):
        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            if self.global_rank == 1 and batch_idx == 3:
                os._exit(0)
            return super().training_step(batch, batch_idx)

    class Says(L.Callback):
        def on_exception(self, trainer: Any, module: Any, error: BaseException) -> None:
            (tmp_path / f"error{trainer.global_rank}").write_text(
                f"{type(error).__name__}: {error}"
            )

    with pytest.raises(Exception, match="."):
        fit(
            tmp_path,
            Dies(),
            averaging(start_method="fork"),
            devices=RANKS,
            data=loader(8),
            callbacks=[Says()],
        )
    said = [path.read_text() for path in tmp_path.glob("error*")]
    assert any(
        "RankLostError" in text and "rank 1 did not answer" in text and "training step 3" in text
        for text in said
    ), said


# -- random states ---------------------------------------------------------------------------------


@processes
def test_ranks_begin_with_the_random_states_of_seed_everything(tmp_path: Path) -> None:
    """Whatever a rank drew before, as under DDP: it splits the data as the others do."""

    class Draws(Plain):
        def configure_callbacks(self) -> list[L.Callback]:
            torch.rand(self.trainer.local_rank), np.random.rand(self.trainer.local_rank)
            random.seed(self.trainer.local_rank)
            return []

        def setup(self, stage: str) -> None:
            self.drawn = [torch.rand(1).item(), np.random.rand(), random.random()]

    drawn = []
    for strategy in (forked_ddp(), averaging(start_method="fork")):
        L.seed_everything(5, verbose=False)
        drawn += fit(
            tmp_path,
            Draws(),
            strategy,
            devices=RANKS,
            data=loader(8),
            extra=lambda _, module: module.drawn,
        )
    assert all(report["extra"] == drawn[0]["extra"] for report in drawn)


# -- what is logged travels with the gradients -----------------------------------------------------


class LogsItsRank(Plain):
    """Logs numbers that tell the rank and the step; one name on rank 1 only, from step 2 on."""

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.log("step_and_rank", 10.0 * batch_idx + self.global_rank, on_step=True, on_epoch=True)
        if self.global_rank == 1 and batch_idx >= 2:
            self.log("late", float(batch_idx))
        return super().training_step(batch, batch_idx)


class SeenAfterBatch(L.Callback):
    """What `callback_metrics` holds when backward, and when the batch, has ended."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def _look(self, trainer: L.Trainer) -> None:
        self.seen.append({key: float(v) for key, v in trainer.callback_metrics.items()})

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._look(trainer)


@processes
@pytest.mark.parametrize("transport", [AllGather, Sharded, lambda: Sharded(overlap=False)])
def test_every_step_logs_its_own_numbers_on_all_ranks(transport, tmp_path) -> None:
    seen = SeenAfterBatch()
    reports = fit(
        tmp_path,
        LogsItsRank(),
        averaging(transport=transport(), start_method="fork"),
        devices=RANKS,
        data=loader(),
        callbacks=[seen],
        max_steps=4,
        extra=lambda trainer, module: trainer.callbacks[0].seen,
    )
    for report in reports:
        assert len(report["extra"]) == 8
        for k in range(4):
            for metrics in report["extra"][2 * k : 2 * k + 2]:
                assert metrics["step_and_rank_step"] == pytest.approx(10.0 * k + 1)
                assert metrics.get("late") == (float(k) if k >= 2 else None)
        assert report["extra"] == reports[0]["extra"]
        assert report["metrics"] == reports[0]["metrics"]


class WithoutBatches(LogsItsRank):
    """Rank 1 has no batch from step 1 on."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return (self(batch[0]) * 0).sum() + 3.0 + 3.0 * batch_idx

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ended.append(float(outputs["loss"]))


class NoneLater(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        for k in range(3):
            alone = int(os.environ.get("LOCAL_RANK", "0")) == 1
            yield None if alone and k else [torch.randn(4, 10), torch.zeros(4, dtype=torch.int64)]


@processes
def test_a_rank_without_a_batch_goes_along_and_shows_the_loss_before(tmp_path) -> None:
    data = torch.utils.data.DataLoader(NoneLater(), batch_size=None)
    reports = fit(
        tmp_path,
        WithoutBatches(),
        averaging(transport=AllGather(), start_method="fork"),
        devices=2,
        data=data,
        max_steps=3,
        use_distributed_sampler=False,
        extra=lambda trainer, module: module.ended,
    )
    assert [report["extra"] for report in reports] == [[3.0, 6.0, 9.0], [3.0, 3.0, 6.0]]


class Unlike(Plain):
    """A model that is another one on rank 1: from the start, or from some step on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def configure_model(self) -> None:
        if self.global_rank == 1:
            if self.how == "wider":
                self.net[2] = nn.Linear(16, 4)
            if self.how == "more":
                self.more = nn.Linear(2, 2)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        frozen = {"frozen": (1, (0,)), "frozen apart": (1, (0, 2))}.get(self.how)
        if frozen is not None and batch_idx == frozen[0]:
            layer = frozen[1][self.global_rank % len(frozen[1])]
            if self.global_rank == 1 or len(frozen[1]) > 1:
                self.net[layer].requires_grad_(False)


@processes
@pytest.mark.parametrize("transport", [AllGather, Sharded])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("wider", "rank 1 at 'a model of 244 numbers in 4 tensors"),
        ("more", "rank 1 at 'a model of 233 numbers in 6 tensors"),
        ("frozen", "d = 51"),
        ("frozen apart", "d = 176"),
    ],
)
def test_ranks_with_unlike_models_are_named(
    how: str, said: str, transport: Any, tmp_path: Path
) -> None:
    """They would add up what does not belong together, or wait for ever."""
    strategy = averaging(start_method="fork", transport=transport())
    with pytest.raises(Exception, match=f"out of step.*{re.escape(said)}"):
        fit(tmp_path, Unlike(how), strategy, devices=RANKS, data=loader(8))
