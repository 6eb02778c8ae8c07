"""What the strategy does when a worker fails it, what it refuses, and what it says."""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from harness import QUIET, apart, assert_equal, averaging, cpu_amp, fit
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder
from lightning.pytorch.strategies import StrategyRegistry, launchers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import GAN, CountsBatches, Manual, Plain, blobs, loader
from torch import nn
from torch.nn import functional as F

from lightning_byz import (
    ALIE,
    IPM,
    NNM,
    QSGD,
    SMEA,
    AllGather,
    ByzEF21SGDM,
    Chain,
    CoordinateMedian,
    FlippedBit,
    Gaussian,
    Huge,
    InProcess,
    Krum,
    LabelFlip,
    Mean,
    MultiKrum,
    NotANumber,
    OptimizedALIE,
    RobustSGD,
    ShuffledLabels,
    SignFlip,
    TrimmedMean,
)
from lightning_byz.lightning import (
    ByzantineRobustStrategy,
    ByzantineWorkers,
    RobustnessMonitor,
)
from lightning_byz.strategies.resolve import resolve_algorithm


def in_process(n: int = 4, **kwargs: Any) -> ByzantineRobustStrategy:
    return ByzantineRobustStrategy(workers_per_process=n, **kwargs)


def on_ranks(**kwargs: Any) -> ByzantineRobustStrategy:
    return ByzantineRobustStrategy(start_method="fork", **kwargs)


BOTH = [pytest.param(1, id="in-process"), pytest.param(4, id="ranks", marks=pytest.mark.processes)]


def strategy_for(devices: int, **kwargs: Any) -> ByzantineRobustStrategy:
    return in_process(4, **kwargs) if devices == 1 else on_ranks(**kwargs)


# -- a worker that fails ---------------------------------------------------------------------------


class Faulty(Plain):
    """Worker ``bad`` has no loss, a nan loss, or skips its log, in some steps."""

    def __init__(self, fault: str, bad: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # which all workers of a process share
        self.fault, self.bad, self.calls = fault, bad, itertools.count()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        strategy = self.trainer.strategy
        worker = (
            strategy.global_rank * strategy.workers_per_process
            + next(self.calls) % strategy.workers_per_process
        )
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if worker == self.bad and batch_idx % 2:
            if self.fault == "none":
                return None
            if self.fault == "nan":
                loss = loss * torch.nan
            if self.fault == "inf weights":
                loss = loss + torch.inf * self.net[0].weight.sum()
        self.log(
            "loss", loss, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(batch[0])
        )
        if not (worker == self.bad and self.fault == "silent log"):
            self.log("extra", float(worker), sync_dist=True)
        return loss


@pytest.mark.parametrize("devices", BOTH)
@pytest.mark.parametrize("fault", ["none", "nan", "inf weights", "silent log"])
def test_a_failing_worker_is_absent_and_hurts_nobody(
    fault: str, devices: int, tmp_path: Path
) -> None:
    stop = EarlyStopping(
        "loss_epoch", patience=50, check_finite=True, check_on_train_epoch_end=True
    )
    silences = lambda trainer, module: trainer.strategy.report.silences  # noqa: E731
    reports = fit(
        tmp_path, Faulty(fault), strategy_for(devices, vectorize=False), devices=devices, data=loader(24 if devices == 1 else 6),
        max_epochs=3, callbacks=[stop], extra=silences,
    )  # fmt: skip
    for report in reports:
        assert_equal(reports[0], report)
        assert report["steps"] == 30
        assert all(torch.isfinite(v).all() for v in report["weights"].values())
        assert report["metrics"]["loss_epoch"] < 1.0
        assert report["metrics"]["extra"] == pytest.approx(
            {"silent log": (0 + 1 + 3) / 3, "none": (0 + 1 + 3) / 3}.get(fault, 1.5)
        )
        assert report["extra"] == ({} if fault == "silent log" else {2: 15})


def test_silence_is_named_in_the_log() -> None:
    with pytest.warns(UserWarning, match="worker 2 gave no finite gradient in step 1"):
        L.Trainer(**QUIET, devices=1, max_epochs=1, strategy=in_process(vectorize=False)).fit(
            Faulty("nan"), loader()
        )


class Taught(Plain):
    """A teacher that is in no optimizer, and that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            aim = self.teacher(batch[0])
        return (self.net(batch[0]) - aim.roll(1, 1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def test_parameters_that_nobody_uses_make_nobody_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Their round is no skipped step, and monitors tell of the other one."""
    caplog.set_level(logging.INFO, "lightning_byz")
    (report,) = fit(
        tmp_path,
        Taught(),
        in_process(),
        data=loader(),
        callbacks=[RobustnessMonitor(every_n_steps=1)],
        extra=lambda trainer, _: dict(trainer.strategy.report.silences),
    )
    assert report["extra"] == {}
    assert "is skipped" not in caplog.text
    assert report["metrics"]["byz/silent"] == 0 and report["metrics"]["byz/bytes_down"] > 0


class AlwaysNan(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1]) * (torch.nan if batch_idx >= 2 else 1)


@pytest.mark.parametrize("devices", BOTH)
def test_steps_without_enough_workers_are_skipped_then_stop_the_run(
    devices: int, tmp_path: Path
) -> None:
    with pytest.raises(
        Exception, match=r"4 steps in a row had too few finite gradients \(max_skipped_steps=3\)"
    ):
        fit(
            tmp_path,
            AlwaysNan(),
            strategy_for(devices, max_skipped_steps=3),
            devices=devices,
            data=loader(24 if devices == 1 else 6),
        )


@pytest.mark.parametrize("devices", BOTH)
def test_steps_without_a_loss_are_left_out_as_long_as_there_is_none(
    devices: int, tmp_path: Path
) -> None:
    """A replay buffer that fills, say: nothing diverges, and nothing moves. A liar that claims a
    nan changes nothing about it.
    """

    class Fills(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx < 8 else super().training_step(batch, batch_idx)

    moved: list[bool] = []

    class Watches(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            moved.append(bool(module.net[0].weight.grad is not None))

    reports = fit(
        tmp_path, Fills(), strategy_for(devices, max_skipped_steps=3), devices=devices, data=loader(24 if devices == 1 else 6),
        callbacks=[Watches()], extra=lambda *_: list(moved),
    )  # fmt: skip
    for report in reports:
        assert_equal(reports[0], report)
        assert report["extra"] == [False] * 8 + [True] * 2


def test_a_skipped_step_changes_nothing(tmp_path: Path) -> None:
    (short,) = fit(
        tmp_path, AlwaysNan(optimizer="adamw"), in_process(max_skipped_steps=20), max_steps=2
    )
    torch.manual_seed(0)
    start = AlwaysNan(optimizer="adamw")
    runs = []
    for steps in (2, 6):
        model = AlwaysNan(optimizer="adamw")
        model.load_state_dict(start.state_dict())
        runs += fit(tmp_path, model, in_process(max_skipped_steps=20), max_steps=steps)
    assert_equal(*runs)
    assert runs[1]["steps"] == 6
    assert short["steps"] == 2


def test_overflow_of_most_workers_backs_the_loss_scale_off(tmp_path: Path) -> None:
    """The scaler starts far too high; every worker overflows until it has come down, and nothing is
    counted as skipped.
    """
    plugin = cpu_amp()["plugins"][0]
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    (report,) = fit(
        tmp_path, Plain(), in_process(max_skipped_steps=0), plugins=[plugin], max_epochs=6
    )
    assert plugin.scaler.get_scale() < 2.0**30
    assert report["metrics"]["loss_epoch"] < 1.05
    assert all(torch.isfinite(v).all() for v in report["weights"].values())


# -- what is logged --------------------------------------------------------------------------------


class LogsWorker(Plain):
    """Every worker logs its own index, and how many samples it has."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        strategy = self.trainer.strategy
        worker = (
            strategy.global_rank * strategy.workers_per_process
            + next(self.calls) % strategy.workers_per_process
        )
        self.log("worker", float(worker), on_step=True, on_epoch=True)
        self.log_dict({"most": float(worker), "all": 1.0}, reduce_fx="max")
        self.log("count", 1.0, reduce_fx="sum", on_step=True, on_epoch=False)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("devices", BOTH)
def test_a_logged_value_is_the_honest_workers_mean_once_a_step(
    devices: int, tmp_path: Path
) -> None:
    lie = ByzantineWorkers(IPM(0.1), workers=[0])
    for report in fit(
        tmp_path, LogsWorker(), strategy_for(devices), devices=devices, callbacks=[lie]
    ):
        assert report["metrics"]["worker_step"] == report["metrics"]["worker_epoch"] == 2.0
        assert report["metrics"]["most"] == 3.0
        assert report["metrics"]["count"] == 3.0


@pytest.mark.parametrize("devices", BOTH)
def test_what_an_attack_did_is_logged(devices: int, tmp_path: Path) -> None:
    lie = ByzantineWorkers(IPM(10.0), workers=[3], start=2, stop=4)
    steps: list[dict[str, float]] = []

    class Seen(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            steps.append(
                {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("byz/")}
            )

    reports = fit(
        tmp_path, Plain(), strategy_for(devices, algorithm=RobustSGD(aggregator=Mean())), devices=devices, data=loader(24),
        callbacks=[lie, Seen()], extra=lambda *_: steps,
    )  # fmt: skip
    for report in reports:
        seen = report["extra"]
        assert seen[0] == seen[1] == {}
        parameters = sum(p.numel() for p in Plain().parameters())
        assert seen[2]["byz/cosine"] == pytest.approx(-1)
        assert seen[2]["byz/relative_error"] == pytest.approx(11 / 4)
        assert seen[2]["byz/byzantine_weight"] == pytest.approx(1 / 4)
        assert seen[2]["byz/bytes_up"] == 4 * parameters
        assert seen[2]["byz/bytes_down"] == 4 * parameters * (1 if devices == 1 else 3)


# -- buffers ---------------------------------------------------------------------------------------


class Garbage(LabelFlip):
    """Feeds a worker noise instead of its batch."""

    def __call__(self, batch: Any, generator: Any = None) -> Any:
        return [torch.full_like(batch[0], 1e3), *batch[1:]]


@pytest.mark.parametrize("devices", BOTH)
def test_garbage_in_one_worker_leaves_batchnorm_statistics_sane(
    devices: int, tmp_path: Path
) -> None:
    attack = ByzantineWorkers(Garbage(num_classes=3), workers=[0])
    runs = []
    for callbacks in ([], [attack]):
        torch.manual_seed(1)
        data = loader(24 if devices == 1 else 6)
        runs.append(
            fit(
                tmp_path,
                Plain(norm=True),
                strategy_for(devices),
                devices=devices,
                data=data,
                callbacks=callbacks,
            )
        )
        for report in runs[-1]:
            assert_equal(runs[-1][0], report)
            assert int(report["weights"]["net.1.num_batches_tracked"]) == report["steps"] == 10
    clean, attacked = (run[0]["weights"] for run in runs)
    for name in ("net.1.running_mean", "net.1.running_var"):
        assert (attacked[name] - clean[name]).abs().max() < 1.0
    assert abs(float(attacked["net.1.running_mean"].abs().max())) < 10


# -- f ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "f"), [(3, 1), (4, 1), (7, 2), (10, 3), (20, 6)])
def test_f_defaults_to_the_most_up_to_a_third(
    n: int, f: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lightning_byz")
    fs = fit(
        tmp_path,
        Plain(),
        in_process(n),
        extra=lambda trainer, _: trainer.strategy.exchanges[0].algorithm.aggregator.f,
    )
    assert fs[0]["extra"] == f
    said = [
        record.message
        for record in caplog.records
        if f"n={n} workers, tolerating f={f}" in record.message
    ]
    assert len(said) == 1


def test_f_defaults_to_what_the_rule_allows(tmp_path: Path) -> None:
    strategy = in_process(5, algorithm=RobustSGD(aggregator=Krum()))
    (report,) = fit(
        tmp_path,
        Plain(),
        strategy,
        extra=lambda t, _: t.strategy.exchanges[0].algorithm.aggregator.f,
    )
    assert report["extra"] == 1


@pytest.mark.parametrize("n", [1, 2])
def test_two_workers_run_as_ddp_and_warn(n: int, tmp_path: Path) -> None:
    runs = []
    for strategy in ("auto", in_process(n)):
        torch.manual_seed(1)
        runs += fit(tmp_path, Plain(), strategy)
    for name, value in runs[0]["weights"].items():
        torch.testing.assert_close(value, runs[1]["weights"][name], rtol=1e-5, atol=1e-6)
    if n == 2:
        with pytest.warns(UserWarning, match="n=2 workers: nothing can be outvoted"):
            L.Trainer(**QUIET, devices=1, max_epochs=1, strategy=in_process(2)).fit(Plain())


# -- refusals --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NeedsPrevious(RobustSGD):
    needs_previous: ClassVar[bool] = True


class HeadOnly(Plain):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net[2].parameters(), 0.1)


class WithTable(Plain):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=sparse)


REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "f too large": (lambda: in_process(4, num_byzantine=2), Plain, {}, r"num_byzantine=2 is too large for n=4.*at most f=1"),
    "f too large for Krum": (
        lambda: in_process(4, num_byzantine=1, algorithm=RobustSGD(aggregator=Krum())), Plain, {},
        r"num_byzantine=1 is too large for n=4.*Krum.*at least 5",
    ),
    "f too large in the rule": (
        lambda: in_process(4, algorithm=RobustSGD(aggregator=MultiKrum(f=1))), Plain, {}, r"too large for n=4",
    ),
    "f given twice": (
        lambda: in_process(10, num_byzantine=2, algorithm=RobustSGD(aggregator=TrimmedMean(f=1))), Plain, {}, "should agree",
    ),
    "f for two workers": (lambda: in_process(2, num_byzantine=1), Plain, {}, "num_byzantine=1 is too large for n=2"),
    "sync_batchnorm": (in_process, Plain, {"sync_batchnorm": True}, "sync_batchnorm=True.*Leave it out"),
    "gan in-process": (in_process, GAN, {}, "manual optimization.*one worker per process"),
    "lbfgs with earlier parameters": (
        lambda: in_process(algorithm=NeedsPrevious()), lambda: Plain(optimizer="lbfgs"), {}, r"LBFGS.*NeedsPrevious.*such as RobustSGD\(\)",
    ),
    "previous gradients of parameters in no optimizer": (
        lambda: in_process(algorithm=NeedsPrevious()), HeadOnly, {}, r"in no optimizer: net.0.weight.*requires_grad_\(False\)",
    ),
    "previous gradient with accumulation": (
        lambda: in_process(algorithm=NeedsPrevious()), Plain, {"accumulate_grad_batches": 2},
        r"NeedsPrevious.*accumulate_grad_batches=2.*accumulate_grad_batches=1",
    ),
    "sparse gradients": (in_process, lambda: WithTable(sparse=True), {}, "Found sparse=True in table. Set sparse=False"),
    "averaged BatchNorm in-process": (
        in_process, lambda: Plain(norm=True), {"callbacks": [L.pytorch.callbacks.StochasticWeightAveraging(0.1)]},
        "StochasticWeightAveraging recomputes BatchNorm",
    ),
    "all-gather in one process": (lambda: in_process(transport=AllGather()), Plain, {}, "AllGather connects several processes"),
    "first batch too small": (lambda: in_process(30), Plain, {}, "first batch.*30 in-process workers. Found 24"),
    "in-process transport on ranks": (lambda: on_ranks(transport=InProcess()), Plain, {"devices": 3}, "Use transport=AllGather"),
}  # fmt: skip


@pytest.mark.parametrize("num_byzantine", [None, 1, 4])
def test_a_mean_tolerates_nobody_says_so_once_and_trains(num_byzantine: int | None) -> None:
    with pytest.warns(UserWarning, match="Mean tolerates no Byzantine worker among n=10") as seen:
        resolved = resolve_algorithm(RobustSGD(aggregator=Mean()), num_byzantine, 1, 10)
    assert resolved.aggregator.f == 0
    assert len(seen) == 1


@pytest.mark.parametrize("chained", [False, True])
def test_a_search_that_takes_long_or_tolerates_less_says_so_once(chained: bool) -> None:
    def warned(num_byzantine: int | None, n: int) -> str:
        rule = Chain(pre=(NNM(),), rule=SMEA()) if chained else SMEA()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            resolve_algorithm(RobustSGD(aggregator=rule), num_byzantine, 1, n)
        assert len(seen) <= 1
        return str(seen[0].message) if seen else ""

    assert "f=6 of n=30 workers here, not a third, 9" in warned(None, 30)
    assert "searches 593,775 subsets of n=30" in warned(None, 30)
    assert "f=2 of n=200 workers here, not a third, 66" in warned(None, 200)
    assert "searches" in warned(6, 30)
    assert "not a third" not in warned(6, 30)
    assert warned(2, 30) == warned(None, 10) == ""


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_step_with_a_way_out(case: str, tmp_path: Path) -> None:
    strategy, module, trainer, message = REFUSED[case]
    with pytest.raises(Exception, match=f"(?s){message}"):
        fit(tmp_path, module(), strategy(), data=Plain().train_dataloader(), **trainer)
    assert not list(tmp_path.glob("rank*.pt"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ByzantineRobustStrategy(num_byzantine=-1), "`num_byzantine` should be an integer of at least 0. Found num_byzantine=-1"),
        (lambda: ByzantineRobustStrategy(workers_per_process=0), "`workers_per_process` should be an integer of at least 1"),
        (lambda: ByzantineRobustStrategy(workers_per_process=None), "`workers_per_process` should be an integer of at least 1"),
        (lambda: ByzantineRobustStrategy(max_skipped_steps=None), "`max_skipped_steps` should be an integer of at least 0"),
        (lambda: ByzantineRobustStrategy(worker_weights=2), "`worker_weights` should be positive numbers.*Found 2"),
        (lambda: ByzantineRobustStrategy(worker_weights=[None, 1]), "`worker_weights` should be positive numbers.*Found .None, 1"),
        (lambda: ByzantineRobustStrategy(aggregated_buffers="net.*"), "`aggregated_buffers` should be a list.*Write .'net.."),
        (lambda: MultiKrum(m=1.5), "`m`.*should be an integer of at least 1. Found m=1.5"),
        (lambda: QSGD(levels=1.5), "`levels` should be an integer in 1 .. 127. Found levels=1.5"),
        (lambda: ByzantineRobustStrategy(algorithm=TrimmedMean()), "`algorithm` should be an Algorithm"),
        (lambda: ByzantineRobustStrategy(transport="nccl"), "`transport` should be a Transport"),
        (lambda: TrimmedMean(f=-1), "`f`.*non-negative integer. Found f=-1"),
        (lambda: RobustSGD(worker_momentum=1.0), "`worker_momentum`.*Found worker_momentum=1.0"),
        (lambda: ByzantineWorkers("sign_flip", count=1), "Known ones: ALIE, AntiCGE, BitFlip, .*SignFlip"),
        (lambda: ByzantineWorkers(SignFlip()), "either `workers`.*or `count`"),
        (lambda: ByzantineWorkers(SignFlip(), workers=[0], count=1), "either `workers`.*or `count`"),
        (lambda: ByzantineWorkers(SignFlip(), count=1, start=3, stop=3), "start=3, stop=3"),
        (lambda: ByzantineWorkers(SignFlip(), count=1, every=0), "`every` should be at least 1. Found every=0"),
        (lambda: ByzantineWorkers(SignFlip(), count=1, every_n_steps=0), "`every_n_steps` should be at least 1"),
        (lambda: ByzantineWorkers(SignFlip(), count=1, probability=0.0), r"`probability` should be in \(0, 1\]. Found probability=0.0"),
        (lambda: ByzantineWorkers(SignFlip(), workers=[0, 4]).indices(4), r"indices in 0 .. n - 1 = 3.*Found \[4\]"),
        (lambda: ByzantineWorkers(SignFlip(), count=4).indices(4), "Found count=4"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_byzantine_workers_needs_the_strategy(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match="needs Trainer\\(strategy='byzantine_robust'\\). Found SingleDeviceStrategy",
    ):
        fit(tmp_path, Plain(), "auto", callbacks=[ByzantineWorkers(SignFlip(), count=1)])


def test_a_later_short_batch_leaves_some_workers_absent(tmp_path: Path) -> None:
    """The last batch has two samples for four workers: two of them are absent, and too few are left
    to be sure of.
    """
    data = loader(24, blobs(24 * 3 + 3))
    (report,) = fit(
        tmp_path,
        Plain(),
        in_process(4),
        data=data,
        extra=lambda trainer, _: trainer.strategy.report.silences,
    )
    assert report["steps"] == 4
    assert report["extra"] == {3: 1}


def test_a_batch_that_cannot_be_split_says_so(tmp_path: Path) -> None:
    class Ragged(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(8, 10), torch.zeros(5)

    with pytest.raises(
        ValueError, match="same first dimension. Found shapes starting with 8 and 5"
    ):
        fit(
            tmp_path,
            Plain(),
            in_process(4),
            data=torch.utils.data.DataLoader(Ragged(), batch_size=None),
        )


# -- the rest of Lightning -------------------------------------------------------------------------


@pytest.mark.processes
def test_validate_test_and_predict_on_ranks(tmp_path: Path) -> None:
    """The same numbers as on one device, from every rank."""
    model, data = Plain(), loader(20)
    expected = L.Trainer(**QUIET, devices=1).validate(model, data, verbose=False)[0]["val_loss"]
    for run in ("validate", "test"):
        trainer = L.Trainer(**QUIET, devices=3, strategy=on_ranks())
        (metrics,) = getattr(trainer, run)(model, data, verbose=False)
        assert metrics["val_loss"] == pytest.approx(expected, rel=1e-5)
    predictions = L.Trainer(**QUIET, devices=1, strategy=in_process(4)).predict(model, data)
    assert torch.equal(torch.cat(predictions), model(blobs().tensors[0]).argmax(1))


def test_batch_size_finder_works_in_process(tmp_path: Path) -> None:
    finder = BatchSizeFinder("power", steps_per_trial=1, init_val=8, max_trials=2)
    (report,) = fit(
        tmp_path, Plain(batch_size=8), in_process(4), val=loader(), callbacks=[finder], default_root_dir=tmp_path, enable_checkpointing=True,
        extra=lambda _, module: module.batch_size,
    )  # fmt: skip
    assert report["extra"] in (16, 32)  # Lightning versions count trials differently
    assert report["steps"] == -(-240 // report["extra"])


@pytest.mark.processes
def test_learning_rate_finder_on_ranks(tmp_path: Path) -> None:
    """It leaves no trace in the algorithm's state, and every rank takes the same rate."""
    counter = CountsBatches()
    finder = LearningRateFinder(num_training_steps=30, early_stop_threshold=None)
    reports = fit(
        tmp_path, Plain(batch_size=2), on_ranks(algorithm=ByzEF21SGDM()), devices=3, callbacks=[finder, counter], default_root_dir=tmp_path,
        enable_checkpointing=True, extra=lambda trainer, module: (module.lr, trainer.strategy.exchanges[0].step, counter.batches),
    )  # fmt: skip
    assert reports[0]["extra"][0] != Plain().lr
    for report in reports:
        assert_equal(reports[0], report)
        assert report["extra"] == reports[0]["extra"]
        assert report["extra"][1] == report["extra"][2] > 0


@pytest.mark.processes
def test_batch_size_finder_is_refused_on_ranks(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="not supported with distributed strategies"):
        fit(tmp_path, Plain(), on_ranks(), devices=3, callbacks=[BatchSizeFinder()])


@pytest.mark.thorough
@pytest.mark.parametrize("devices", BOTH)
def test_torch_compile(devices: int, tmp_path: Path) -> None:
    def check() -> None:
        runs = []
        for wrap in (
            lambda module: module,
            lambda module: torch.compile(module, backend="aot_eager"),
        ):
            torch.manual_seed(1)
            runs.append(
                fit(
                    tmp_path,
                    wrap(Plain(norm=True)),
                    strategy_for(devices),
                    devices=devices,
                    max_steps=3,
                )[0]
            )
        for (name, a), b in zip(
            runs[0]["weights"].items(), runs[1]["weights"].values(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)

    (check if devices > 1 else apart(check))()


class Thaws(Plain):
    """Trains one layer more from step 3 on."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[0].requires_grad_(batch_idx >= 3)


def test_state_starts_afresh_when_other_parameters_are_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, Thaws(), in_process(4, algorithm=ByzEF21SGDM()))
    assert "set of trained parameters has changed" in caplog.text


def test_the_names_that_are_registered() -> None:
    import pytorch_lightning as pl

    assert "byzantine_robust" in StrategyRegistry
    assert "byzantine_robust" in pl.strategies.StrategyRegistry


def test_lightnings_private_names_that_we_use_are_where_we_expect_them() -> None:
    """If this fails, Lightning has moved them: change `lightning_byz.lightning`,
    `.pytorch_lightning` and RobustStrategy.
    """
    import pytorch_lightning as pl

    for package in (launchers, pl.strategies.launchers):
        assert hasattr(package, "_SubprocessScriptLauncher")
        assert hasattr(package, "_MultiProcessingLauncher")
    for base in (L.pytorch.strategies.ParallelStrategy, pl.strategies.ParallelStrategy):
        assert "_configure_launcher" in dir(base)
        strategy = averaging()
        assert hasattr(strategy, "_layer_sync")
        assert hasattr(strategy, "_launcher")


# -- defects that were found by review -------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_manual_optimization_aggregates_outside_of_autocast(precision: str, tmp_path: Path) -> None:
    """In bfloat16 the mixing matrix times 3.4e38 would be inf, and 0 * inf nan."""
    lie = ByzantineWorkers(Huge(3.4e38), workers=[1])
    for report in fit(
        tmp_path,
        Manual(),
        on_ranks(),
        devices=3,
        data=loader(8),
        callbacks=[lie],
        precision=precision,
    ):
        assert all(torch.isfinite(v).all() for v in report["weights"].values())
        assert report["metrics"]["loss"] < 1.3


def test_gradients_that_the_user_zeroes_are_gone_in_process(tmp_path: Path) -> None:
    class Restarts(Plain):
        """Throws the first half of every accumulation window away."""

        def on_after_backward(self) -> None:
            if self.trainer.fit_loop.epoch_loop.batch_idx % 2 == 0:
                self.zero_grad()

    runs = []
    for strategy in ("auto", averaging(workers_per_process=4)):
        torch.manual_seed(1)
        runs += fit(tmp_path, Restarts(), strategy, accumulate_grad_batches=2)
    for name, value in runs[0]["weights"].items():
        torch.testing.assert_close(value, runs[1]["weights"][name], rtol=1e-5, atol=1e-5)


def test_buffers_changed_between_steps_stay_changed_in_process(tmp_path: Path) -> None:
    class Cools(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("temperature", torch.ones(1))
            self.register_buffer("mask", torch.zeros(1).expand(5))  # overlaps itself

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.temperature *= 0.5

    (report,) = fit(tmp_path, Cools(), in_process(4), max_steps=4)
    assert report["weights"]["temperature"].item() == 0.5**4


def test_a_nan_in_a_buffer_does_not_undo_what_others_learn_between_micro_batches(
    tmp_path: Path,
) -> None:
    class Counts(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("broken", torch.full((2,), torch.nan))
            self.register_buffer("flags", torch.tensor([True, False]))
            self.register_buffer("batches", torch.zeros(1))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.batches += 1
            return super().training_step(batch, batch_idx)

    (report,) = fit(tmp_path, Counts(), in_process(4), accumulate_grad_batches=5)
    assert report["weights"]["batches"].item() == 10


def test_an_optimizer_in_a_wrapper_of_the_users_own_is_stepped(tmp_path: Path) -> None:
    class Wrapper(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, 0.1)
            # as lookahead wrappers have
            self.optimizer = torch.optim.Adam(self.param_groups[0]["params"])

    class Wraps(Plain):
        def configure_optimizers(self) -> Any:
            return Wrapper(list(self.parameters()))

    (report,) = fit(tmp_path, Wraps(), in_process(4))
    assert report["steps"] == 10


def test_a_second_fit_does_not_attack_twice(tmp_path: Path) -> None:
    strategy = in_process(4)
    trainer = L.Trainer(
        **QUIET,
        devices=1,
        max_epochs=1,
        strategy=strategy,
        callbacks=[ByzantineWorkers(LabelFlip(3), count=1)],
    )
    for _ in range(2):
        trainer.fit(Plain(), loader())
        assert len(strategy.simulation.data_attacks) == len(strategy.simulation.liars) == 1


def test_nan_under_a_loss_scaler_stops_the_run_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="steps in a row had too few finite gradients"):
        fit(tmp_path, AlwaysNan(), in_process(max_skipped_steps=3), max_epochs=20, **cpu_amp())


# -- what is logged --------------------------------------------------------------------------------


class LogsMuch(Plain):
    """All that ``self.log`` can do, of values that are the same for every worker."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        values = {
            "double": torch.tensor(1 + 1e-10, dtype=torch.float64),
            "number": 1 + 1e-10,
            "half": torch.tensor(0.1).half(),
        }
        for name, value in values.items():
            self.log(name, value, on_step=True, on_epoch=True, prog_bar=name == "half")
            self.log(f"{name} on epoch", value * (batch_idx + 1), on_step=False, on_epoch=True)
            self.log(f"{name} on step", value, prog_bar=True)
        self.log(
            "weighed", float(batch_idx), on_step=False, on_epoch=True, batch_size=batch_idx + 1
        )
        self.log("largest", float(batch_idx), on_step=False, on_epoch=True, reduce_fx="MAX")
        self.log("quiet", 1.0, logger=False)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_what_is_logged_is_what_plain_lightning_logs(precision: Any) -> None:
    """Names, forks, precision and values, beside a run without this package; workers' values are
    alike.
    """
    seen = []
    for strategy in ("auto", in_process(4)):
        trainer = L.Trainer(**QUIET, max_epochs=1, precision=precision, strategy=strategy)
        trainer.fit(LogsMuch(), loader(12))
        seen.append(
            (trainer.callback_metrics, trainer.progress_bar_metrics, trainer.logged_metrics)
        )
    for plain, ours in zip(*seen, strict=True):
        names = {name for name in plain if not name.startswith("loss")}
        assert names == {name for name in ours if not name.startswith("loss")}
        for name in names:
            assert getattr(plain[name], "dtype", float) == getattr(ours[name], "dtype", float), name
            assert float(plain[name]) == pytest.approx(
                float(ours[name]), rel=1e-15 if "double" in name else 1e-6
            ), name
    assert float(seen[1][0]["double on step"]) == 1 + 1e-10


def test_functions_that_lightning_does_not_take_are_refused_as_there() -> None:
    class Odd(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("a", 1.0, reduce_fx=torch.median)
            return super().training_step(batch, batch_idx)

    for strategy in ("auto", in_process(4)):
        with pytest.raises(MisconfigurationException, match="reduce_fx"):
            L.Trainer(**QUIET, max_epochs=1, strategy=strategy).fit(Odd(), loader(12))


class Validates(Plain):
    """Ranks validate unequal numbers of samples; one has a nan."""

    bad = 2
    sizes = (5, 6, 100, 9)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        rank = self.global_rank
        loss = torch.tensor(torch.nan if rank == self.bad and batch_idx == 1 else float(rank + 1))
        for fx in ("mean", "SUM", "max", torch.min):
            self.log(
                f"val_{getattr(fx, '__name__', fx)}",
                loss,
                sync_dist=True,
                reduce_fx=fx,
                batch_size=self.sizes[rank],
            )


@pytest.mark.processes
@pytest.mark.parametrize("bad", [2, None])
def test_the_weight_of_a_rank_whose_value_is_not_finite_does_not_count(
    bad: int | None, tmp_path: Path
) -> None:
    model = Validates()
    model.bad = -1 if bad is None else bad
    for report in fit(tmp_path, model, on_ranks(), devices=4, data=loader(24), val=loader(6)):
        good = [rank for rank in range(4) if rank != bad]
        mean = sum((rank + 1) * Validates.sizes[rank] for rank in good) / sum(
            Validates.sizes[rank] for rank in good
        )
        assert report["metrics"]["val_mean"] == pytest.approx(mean, rel=1e-6)
        assert report["metrics"]["val_SUM"] == 10 * sum(rank + 1 for rank in good)
        assert report["metrics"]["val_max"] == 4


def test_a_worker_in_quarantine_is_not_logged(tmp_path: Path) -> None:
    class Quarantine(L.Callback):
        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            trainer.strategy.exchanges[0].quarantined.add(2)

    class Worker(Plain):
        calls = itertools.count()  # which all workers of a process share

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            worker = next(self.calls) % 4
            self.log("value", 10.0 if worker == 2 else 0.25, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    (report,) = fit(tmp_path, Worker(), in_process(4), data=loader(12), callbacks=[Quarantine()])
    assert report["metrics"]["value_step"] == report["metrics"]["value_epoch"] == 0.25


# -- robustness, end to end ------------------------------------------------------------------------

ATTACKS = [
    SignFlip(5.0),
    IPM(0.1),
    IPM(10.0),
    ALIE(1.5),
    Gaussian(std=100.0),
    NotANumber(),
    LabelFlip(num_classes=3),
    OptimizedALIE(),
    FlippedBit(),
    ShuffledLabels(),
]


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
@pytest.mark.parametrize("devices", BOTH)
def test_it_trains_under_every_attack(
    attack: Any, devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # samplers and attacks draw by it, and tests before this one may have set it
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    accuracy = []
    x, y = blobs(600, seed=5).tensors
    for callbacks in ([], [ByzantineWorkers(attack, count=1)]):
        torch.manual_seed(1)
        model = Plain()
        data = loader(40 if devices == 1 else 10, blobs(480), shuffle=True)
        report = fit(
            tmp_path,
            model,
            strategy_for(devices),
            devices=devices,
            data=data,
            max_epochs=15,
            callbacks=callbacks,
        )[0]
        model.load_state_dict(report["weights"])
        accuracy.append(float((model(x).argmax(1) == y).float().mean()))
    assert accuracy[0] > 0.9
    assert accuracy[1] > accuracy[0] - 0.04


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize(
    "attack", [SignFlip(10.0), IPM(10.0), Gaussian(std=100.0), NotANumber()], ids=repr
)
def test_averaging_does_not(attack: Any, tmp_path: Path) -> None:
    x, y = blobs(600, seed=5).tensors
    torch.manual_seed(1)
    model = Plain()
    strategy = averaging(workers_per_process=4)
    callbacks = [ByzantineWorkers(attack, count=1)]
    (report,) = fit(
        tmp_path,
        model,
        strategy,
        data=loader(40, blobs(480), shuffle=True),
        max_epochs=15,
        callbacks=callbacks,
    )
    model.load_state_dict(report["weights"])
    accuracy = float((model(x).argmax(1) == y).float().mean())
    if isinstance(attack, NotANumber):  # the border stops it, whatever the rule
        assert accuracy > 0.9
    else:
        assert accuracy < 0.6


def test_transports_say_who_they_are() -> None:
    assert AllGather().n == InProcess().n == 1
    assert CoordinateMedian().most_f(5) == 2
