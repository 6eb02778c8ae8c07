"""Previous, full and trusted gradients, and cohorts, in real Trainer runs: they are right, and
nobody notices that they were computed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from harness import QUIET, assert_equal, cpu_amp, fit
from models import Manual, Plain, StatefulLoader, blobs, loader
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_byz import (
    IPM,
    ByzVRDM21,
    ByzVRMarinaPP,
    ClippedDifferences,
    CoordinateMedian,
    DeviationFilter,
    DStar,
    Identity,
    LabelFlip,
    Mean,
    RobustSGD,
    ShiftedExponential,
    SignFlip,
    SignSGDMajorityVote,
)
from lightning_byz.data import WorkerSampler
from lightning_byz.lightning import ByzantineRobustStrategy, ByzantineWorkers
from lightning_byz.strategies.extra_gradients import TrustedData
from lightning_byz.types import keyed_generator

N = 4
BOTH = [pytest.param(1, id="in-process"), pytest.param(N, id="ranks", marks=pytest.mark.processes)]


def strategy(algorithm: Any, devices: int = 1, **kwargs: Any) -> ByzantineRobustStrategy:
    return ByzantineRobustStrategy(
        algorithm=algorithm,
        workers_per_process=N // devices,
        start_method="fork",
        seed=7,
        num_byzantine=0,
        **kwargs,
    )


def parts_sampler(local: int, ranks: int, rank: int, batch: int = 6) -> WorkerSampler:
    return WorkerSampler(blobs(), batch, local, num_replicas=ranks, rank=rank, seed=3)


class Restless(Plain):
    """Everything that a second pass could disturb: dropout, BatchNorm, logs, a metric, and draws
    from all random states.
    """

    def __init__(self, lr: float = 0.1, workers_data: bool = False, **kwargs: Any) -> None:
        super().__init__(**{"norm": True, "dropout": 0.3, "lr": lr, **kwargs})
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)
        self.total = torchmetrics.SumMetric()
        self.workers_data = workers_data
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        shift = float(np.random.rand()) + float(torch.rand(()))
        logits = self.net(x + 0.1 * shift)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.total.update(float(x.sum()))
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("shift", shift)
        return loss

    def train_dataloader(self) -> DataLoader:
        if not self.workers_data:
            return loader(24, shuffle=True)
        ranks, rank = self.trainer.world_size, self.trainer.strategy.global_rank
        local = self.trainer.strategy.workers_per_process
        return DataLoader(blobs(), 6 * local, sampler=parts_sampler(local, ranks, rank))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def states_of(trainer: L.Trainer, module: Any) -> Any:
    return (
        float(module.accuracy.compute()),
        float(module.total.compute()),
        torch.rand(3),
        np.random.rand(3).tolist(),
    )


@dataclass(frozen=True)
class Watching(RobustSGD):
    """Asks for everything and uses nothing of it."""

    needs_previous = True
    needs_drift = True
    uses_trusted = True


@dataclass(frozen=True)
class Full(RobustSGD):
    """Always full gradients."""

    full_batches: int | None = None  # type: ignore[misc]

    def full_gradient(self, round: Any) -> bool:
        return True


# -- nobody notices --------------------------------------------------------------------------------


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("devices", BOTH)
def test_a_pass_at_the_previous_parameters_and_one_on_trusted_data_change_nothing(
    devices: int, precision: str, tmp_path: Path
) -> None:
    if devices > 1 and precision != "32-true":
        pytest.skip("once is enough")
    options = cpu_amp() if precision == "16-mixed" else {"precision": precision}
    runs = []
    for algorithm in (RobustSGD(Mean()), Watching(Mean())):
        L.seed_everything(1)
        trusted = (
            {"trusted_data": loader(10, blobs(50, seed=9))}
            if isinstance(algorithm, Watching)
            else {}
        )
        model = Restless()
        runs.append(
            fit(
                tmp_path,
                model,
                strategy(algorithm, devices, **trusted),
                devices=devices,
                max_epochs=2,
                extra=states_of,
                **options,
            )
        )
    for plain, watched in zip(*runs, strict=True):
        assert_equal(plain, watched)
        assert plain["metrics"] == watched["metrics"]
        assert str(plain["extra"]) == str(watched["extra"])


@pytest.mark.thorough
@pytest.mark.parametrize("workers_data", [False, True])
@pytest.mark.parametrize("devices", BOTH)
def test_a_pass_over_all_data_changes_nothing_but_the_gradient(
    devices: int, workers_data: bool, tmp_path: Path
) -> None:
    """With learning rate 0, all that can differ is what a pass leaves behind."""
    runs = []
    for algorithm in (RobustSGD(Mean()), Full(Mean())):
        L.seed_everything(1)
        model = Restless(lr=0.0, workers_data=workers_data)
        runs.append(
            fit(
                tmp_path,
                model,
                strategy(algorithm, devices),
                devices=devices,
                max_epochs=2,
                extra=states_of,
            )
        )
    for plain, full in zip(*runs, strict=True):
        assert_equal(plain, full)
        assert plain["metrics"] == full["metrics"]
        assert str(plain["extra"]) == str(full["extra"])


# -- they are right --------------------------------------------------------------------------------

RECORDS: list[Any] = []


@dataclass(frozen=True)
class Spy(Watching):
    def worker(self, grads: Any, state: Any, round: Any) -> Any:
        RECORDS.append(
            (
                round.step,
                round.worker,
                grads.current.clone(),
                None if grads.previous is None else grads.previous.clone(),
            )
        )
        return super().worker(grads, state, round)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_where_nothing_moved_the_previous_gradient_is_the_current_one_bit_for_bit(
    precision: str, tmp_path: Path
) -> None:
    """The same dropout masks, BatchNorm statistics and numpy draws."""
    RECORDS.clear()
    options = cpu_amp() if precision == "16-mixed" else {"precision": precision}
    if precision == "16-mixed":
        # nobody overflows
        options["plugins"][0].scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    fit(tmp_path, Restless(lr=0.0), strategy(Spy(Mean())), **options)
    assert [(step, worker) for step, worker, *_ in RECORDS] == [
        (step, worker) for step in range(10) for worker in range(N)
    ]
    assert all(previous is None for step, _, _, previous in RECORDS if step == 0)
    assert all(
        torch.equal(current, previous) and bool(current.any())
        for step, _, current, previous in RECORDS
        if step
    )


class Linear(L.LightningModule):
    """Least squares, so that an independent loop can follow."""

    def __init__(self, lr: float = 0.1, batch: int = 6) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(10, 1)
        self.lr, self.batch = lr, batch
        self.calls: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.calls.append(len(batch[0]))
        return F.mse_loss(self.layer(batch[0])[:, 0], batch[1].float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)

    def train_dataloader(self) -> DataLoader:
        local = self.trainer.strategy.workers_per_process
        sampler = parts_sampler(
            local, self.trainer.world_size, self.trainer.strategy.global_rank, self.batch
        )
        return DataLoader(blobs(), sampler.batch_size_per_process, sampler=sampler)


def least_squares_gradient(w: np.ndarray, b: float, index: Any) -> tuple[np.ndarray, float]:
    x, y = blobs().tensors[0].double().numpy()[index], blobs().tensors[1].double().numpy()[index]
    error = x @ w + b - y
    return 2 * x.T @ error / len(x), 2 * error.mean()


@pytest.mark.parametrize("devices", BOTH)
def test_marina_is_marina_step_for_step(devices: int, tmp_path: Path) -> None:
    """f = 0, a mean and no compression, against MARINA in numpy, with full gradients over each
    worker's own part.
    """
    p, lr, steps, batch = 0.3, 0.05, 18, 7  # parts of 60 samples: the last batch is smaller
    torch.manual_seed(1)
    model = Linear(lr, batch)
    w, b = (
        model.layer.weight.detach().double().numpy()[0].copy(),
        float(model.layer.bias.detach()[0]),
    )
    algorithm = ByzVRMarinaPP(Mean(), p=p, clipping=None)
    report = fit(tmp_path, model, strategy(algorithm, devices), devices=devices, max_epochs=2)[0]
    assert report["steps"] == steps

    sampler = parts_sampler(N, 1, 0, batch)
    g_w, g_b, old, coins = None, None, None, []
    for step in range(steps):
        sampler.set_epoch(step // 9)
        coin = (
            float(torch.rand((), generator=keyed_generator("coin", 7, step), dtype=torch.float64))
            < p
        )
        coins.append(coin)
        if coin or old is None:
            grads = [least_squares_gradient(w, b, list(sampler.parts[i])) for i in range(N)]
            g_w, g_b = np.mean([g for g, _ in grads], 0), np.mean([g for _, g in grads])
        else:
            for i in range(N):
                index = sampler.indices_of(i)[(step % 9) * batch : (step % 9 + 1) * batch]
                (new_w, new_b), (old_w, old_b) = (
                    least_squares_gradient(w, b, index),
                    least_squares_gradient(*old, index),
                )
                g_w, g_b = g_w + (new_w - old_w) / N, g_b + (new_b - old_b) / N
        old = (w, b)
        w, b = w - lr * g_w, b - lr * g_b
    assert 2 < sum(coins) < steps - 2
    assert report["weights"]["layer.weight"][0].numpy() == pytest.approx(w, abs=1e-5)
    assert float(report["weights"]["layer.bias"]) == pytest.approx(b, abs=1e-5)


def test_a_full_gradient_of_some_batches_takes_so_many(tmp_path: Path) -> None:
    model = Linear()
    fit(tmp_path, model, strategy(Full(Mean(), full_batches=2)), max_steps=3)
    assert model.calls == ([6] * 2 * N + [6] * N) * 3
    whole = Linear()
    fit(tmp_path, whole, strategy(Full(Mean())), max_steps=1)
    assert sum(whole.calls) == 240 + 6 * N


class TimeFirst(Plain):
    """Batches ``[time, sample, ...]``, which nobody can tell from others, cut by the module
    itself.
    """

    def __init__(self, by_hand: bool = True) -> None:
        super().__init__()
        self.shapes: list[list[int]] = []
        if by_hand:
            self.split_batch = lambda batch, parts: list(batch.chunk(parts, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.shapes.append(list(batch.shape))
        return self.net(batch).square().mean()


def test_a_module_splits_its_batches_in_full_gradient_rounds_too(tmp_path: Path) -> None:
    samples = [torch.randn(6, 10) for _ in range(16)]
    data = DataLoader(samples, batch_size=8, collate_fn=lambda batch: torch.stack(batch, 1))  # type: ignore[arg-type]
    model = TimeFirst()
    fit(tmp_path, model, strategy(Full(Mean())), data=data, max_steps=1)
    assert model.shapes == [[6, 2, 10]] * 3 * N  # two batches of the whole data, and the step's own


def test_samples_in_lists_are_counted_and_logged_as_samples(tmp_path: Path) -> None:
    class Lists(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = torch.stack([self.net(x).square().mean() for x in batch]).mean()
            self.log("count", float(len(batch)), on_step=False, on_epoch=True)
            return loss

    samples = [torch.randn(5 + i % 3, 10) for i in range(20)]
    data = DataLoader(samples, batch_size=12, collate_fn=list)  # type: ignore[arg-type]
    (report,) = fit(tmp_path, Lists(), strategy(RobustSGD()), data=data)
    # per sample: parts of 3, then of 2
    assert report["metrics"]["count"] == pytest.approx((3 * 12 + 2 * 8) / 20)


def test_a_users_limit_of_batches_limits_the_full_gradient_too(tmp_path: Path) -> None:
    model = Linear()
    fit(tmp_path, model, strategy(Full(Mean())), limit_train_batches=3)
    assert model.calls == ([6] * 3 * N + [6] * N) * 3


@pytest.mark.parametrize("devices", BOTH)
def test_the_trusted_gradient_is_the_trusted_datas_and_every_ranks(
    devices: int, tmp_path: Path
) -> None:
    """With learning rate 0, a batch of trusted samples, in training mode, by hand."""
    trusted = blobs(30, seed=5)
    torch.manual_seed(1)
    model = Linear(lr=0.0)
    x, y = trusted.tensors
    F.mse_loss(model.layer(x)[:, 0], y.float()).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in model.layer.parameters()])
    model.layer.zero_grad()

    def recorded(trainer: L.Trainer, module: Any) -> Any:
        return [outcome.round.trusted for outcome in OUTCOMES]

    OUTCOMES.clear()
    for report in fit(
        tmp_path,
        model,
        strategy(DStar(k=4), devices, trusted_data=trusted),
        devices=devices,
        callbacks=[Watch()],
        extra=recorded,
    ):
        assert len(report["extra"]) == 10
        for gradient in report["extra"]:
            torch.testing.assert_close(gradient, expected)


OUTCOMES: list[Any] = []


class Watch(L.Callback):
    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        trainer.strategy.exchanges[0].observers.append(OUTCOMES.append)


def test_trusted_batches_are_drawn_anew_in_every_step_and_again_after_a_restart() -> None:
    data = TrustedData(loader(10, blobs(50)))
    batches = [data.batch(seed=0, step=step)[0] for step in (0, 1, 0)]
    assert batches[0].shape == (10, 10)
    assert torch.equal(batches[0], batches[2])
    assert not torch.equal(batches[0], batches[1])
    assert len(torch.unique(batches[0], dim=0)) == 10
    assert len(TrustedData(blobs(50)).batch(0, 0)[0]) == 50
    batch = [torch.ones(3, 10), torch.ones(3)]
    assert TrustedData(batch).batch(0, 7) is batch


def test_a_trusted_gradient_that_is_not_finite_is_none(tmp_path: Path) -> None:
    OUTCOMES.clear()
    bad = [torch.full((4, 10), torch.nan), torch.zeros(4)]
    (report,) = fit(tmp_path, Linear(), strategy(DStar(k=4), trusted_data=bad), callbacks=[Watch()])
    assert all(
        outcome.round.trusted is None and outcome.estimate is not None for outcome in OUTCOMES
    )
    assert all(torch.isfinite(v).all() for v in report["weights"].values())


# -- cohorts ---------------------------------------------------------------------------------------

COHORTS = {
    "dstar": DStar(k=3),
    "marina_pp": ByzVRMarinaPP(CoordinateMedian(), p=0.2, cohort_size=2, full_batches=1),
    "clipped": ClippedDifferences(
        RobustSGD(CoordinateMedian(), worker_momentum=0.5), cohort_size=1
    ),
}


@pytest.mark.parametrize("devices", BOTH)
@pytest.mark.parametrize("name", COHORTS)
def test_workers_that_are_not_sampled_do_no_work_and_are_not_called_silent(
    name: str, devices: int, tmp_path: Path
) -> None:
    OUTCOMES.clear()

    def seen(trainer: L.Trainer, module: Any) -> Any:
        local = list(trainer.strategy.exchanges[0].transport.workers)
        cohorts = [outcome.round.cohort.tolist() for outcome in OUTCOMES]
        return (
            module.calls,
            local,
            cohorts,
            trainer.strategy.report.silences,
            [outcome.silent for outcome in OUTCOMES],
        )

    algorithm = COHORTS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        reports = fit(
            tmp_path,
            Linear(0.01),
            strategy(algorithm, devices),
            devices=devices,
            callbacks=[Watch()],
            extra=seen,
            max_epochs=2,
        )
    for report in reports:
        assert_equal(reports[0], report)
        calls, local, cohorts, silences, silent = report["extra"]
        assert silences == {}
        assert silent == [[]] * 20
        # at the previous parameters, or over a batch of all data
        passes = 2 if name == "marina_pp" else 1
        assert len(calls) == passes * sum(cohort[worker] for cohort in cohorts for worker in local)
        sizes = {sum(cohort) for cohort in cohorts}
        assert sizes == {"dstar": {3}, "marina_pp": {2, 4}, "clipped": {1, 4}}[name]


@pytest.mark.parametrize("devices", BOTH)
def test_liars_arrive_first(devices: int, tmp_path: Path) -> None:
    OUTCOMES.clear()
    slow = ShiftedExponential(slow=(3,), slowdown=1e6)
    reports = fit(
        tmp_path, Linear(), strategy(DStar(Mean(), k=2, delays=slow), devices), devices=devices,
        callbacks=[ByzantineWorkers(SignFlip(), workers=[3], start=4), Watch()],
        extra=lambda *_: [(outcome.round.cohort.tolist(), outcome.seconds) for outcome in OUTCOMES],
    )  # fmt: skip
    for report in reports:
        assert [cohort[3] for cohort, _ in report["extra"]] == [False] * 4 + [True] * 6
        assert all(sum(cohort) == 2 for cohort, _ in report["extra"])
        assert all(seconds > 1 for _, seconds in report["extra"])


def test_a_cohort_of_liars_alone_still_logs(tmp_path: Path) -> None:
    class Logs(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    delays = ShiftedExponential(slow=(0, 1), slowdown=1e6)
    lie = ByzantineWorkers(LabelFlip(num_classes=3), workers=[2, 3])
    (report,) = fit(
        tmp_path, Logs(0.01), strategy(DStar(Mean(), k=2, delays=delays)), callbacks=[lie]
    )
    assert np.isfinite(report["metrics"]["loss"])


def test_the_weight_of_liars_is_that_of_the_rounds_rule(tmp_path: Path) -> None:
    """The filter with this round's trusted gradient, not without."""
    trusted = DStar(DeviationFilter(reading="trusted"), k=4)
    lie = ByzantineWorkers(IPM(1000.0), workers=[1])
    (report,) = fit(
        tmp_path, Linear(0.01), strategy(trusted, trusted_data=blobs(20)), callbacks=[lie]
    )
    assert report["metrics"]["byz/byzantine_weight"] == 0


def test_what_an_attack_did_to_a_cohort_is_logged(tmp_path: Path) -> None:
    algorithm = ByzVRMarinaPP(
        CoordinateMedian(), p=0.2, cohort_size=3, full_batches=1, clipping=1.0
    )
    lie = ByzantineWorkers(IPM(3.0), workers=[1])
    (report,) = fit(tmp_path, Linear(0.01), strategy(replace(algorithm)), callbacks=[lie])
    assert 0.5 < report["metrics"]["byz/cosine"] <= 1.0
    assert report["metrics"]["byz/silent"] == 0


# -- refusals --------------------------------------------------------------------------------------


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(blobs())


MANUAL = Manual
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "accumulation": (ByzVRMarinaPP(), Plain, {"accumulate_grad_batches": 2}, "ByzVRMarinaPP.*two iterates.*accumulate_grad_batches=2"),
    "no trusted data": (DStar(DeviationFilter(reading="trusted")), Plain, {}, "compares with a gradient on trusted data.*trusted_data="),
    "loader that is none": (
        Full(Mean()), Plain, {"data": StatefulLoader(blobs(), 24)}, "second time.*Found StatefulLoader.*ClippedDifferences",
    ),
    "iterable dataset": (Full(Mean()), Plain, {"data": DataLoader(Endless(), 24)}, "Found DataLoader over Endless"),
    "k too large": (DStar(k=5), Plain, {}, "first k of n messages. Found k=5 and n=4"),
    "cohort too large": (ByzVRMarinaPP(cohort_size=5), Plain, {}, "cohort_size=5, full_cohort_size=4, n=4"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_way_out(case: str, tmp_path: Path) -> None:
    algorithm, module, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        fit(tmp_path, module(), strategy(algorithm), **options)


def test_trusted_data_that_nobody_uses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`trusted_data`.*Found RobustSGD.*Leave it out, or use DStar"
    ):
        fit(tmp_path, Plain(), strategy(RobustSGD(), trusted_data=blobs(8)))
    with pytest.raises(ValueError, match=r"`trusted_data` should be.*over Endless"):
        strategy(DStar(), trusted_data=DataLoader(Endless(), 4))


@pytest.mark.processes
@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        (
            ByzVRDM21(compressor=Identity()),
            {},
            "ByzVRDM21.*two iterates. Found manual optimization",
        ),
        (DStar(), {"trusted_data": blobs(8)}, "`trusted_data` needs automatic optimization"),
    ],
)
def test_manual_optimization_is_refused(
    algorithm: Any, options: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match=f"(?s){message}"):
        fit(tmp_path, Manual(), strategy(algorithm, N, **options), devices=N)


@pytest.mark.processes
def test_cohorts_and_manual_optimization(tmp_path: Path) -> None:
    """There, workers that are not sampled work for nothing, and the run is that of automatic
    optimization.
    """
    runs = []
    for module in (Plain, Manual):
        torch.manual_seed(1)
        runs.append(fit(tmp_path, module(), strategy(DStar(k=3), N), devices=N, data=loader(24)))
    assert_equal(runs[0][0], runs[1][0])


def test_accumulation_that_is_switched_on_later_is_refused(tmp_path: Path) -> None:
    later = L.pytorch.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
    with pytest.raises(
        ValueError,
        match="ByzVRMarinaPP needs one minibatch per optimizer step.*GradientAccumulationScheduler",
    ):
        fit(
            tmp_path,
            Linear(0.01),
            strategy(ByzVRMarinaPP(CoordinateMedian(), p=0.1)),
            max_epochs=2,
            callbacks=[later],
        )


def test_one_worker_is_told_that_its_algorithm_has_nothing_to_do() -> None:
    alone = ByzantineRobustStrategy(algorithm=SignSGDMajorityVote())
    with pytest.warns(
        UserWarning, match="plain Lightning, without SignSGDMajorityVote. Use several"
    ):
        L.Trainer(**QUIET, devices=1, max_steps=1, strategy=alone).fit(Plain())


# -- names -----------------------------------------------------------------------------------------

NAMES = {
    "byz_ef21_sgdm": "ByzEF21SGDM",
    "dstar": "DStar",
    "byz_vr_marina_pp": "ByzVRMarinaPP",
    "signsgd_majority_vote": "SignSGDMajorityVote",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_a_strategy_of_both_packages(name: str) -> None:
    import pytorch_lightning as pl

    for package in (L, pl):
        trainer = package.Trainer(**QUIET, strategy=name, devices=1)
        assert type(trainer.strategy.algorithm).__name__ == NAMES[name]


def test_signsgd_with_two_workers_still_sends_signs(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Linear(lr=0.01)
    before = model.layer.weight.detach().clone()
    fit(
        tmp_path,
        model,
        ByzantineRobustStrategy(algorithm=SignSGDMajorityVote(momentum=0), workers_per_process=2),
        max_steps=1,
    )
    torch.testing.assert_close((model.layer.weight - before).abs(), torch.full_like(before, 0.01))


class InPlace(Plain):
    """Takes its batch apart, and scales its inputs: in place, or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.in_place:
            y = batch.pop("y")
            return F.cross_entropy(self.net(batch["x"].mul_(1.5)), y)
        return F.cross_entropy(self.net(batch["x"] * 1.5), batch["y"])

    def train_dataloader(self) -> DataLoader:
        def named(rows: Any) -> dict[str, torch.Tensor]:
            return dict(zip("xy", torch.utils.data.default_collate(rows), strict=True))

        return DataLoader(blobs(), batch_size=24, collate_fn=named)


@pytest.mark.parametrize("devices", BOTH)
@pytest.mark.parametrize(
    "algorithm",
    [ByzVRDM21(Mean()), ByzVRMarinaPP(Mean(), p=0.5), DStar(DeviationFilter())],
    ids=["vrdm21", "marina", "dstar"],
)
def test_a_step_may_change_its_batch(algorithm: Any, devices: int, tmp_path: Path) -> None:
    """Every pass over it sees it as it was."""
    runs = []
    for in_place in (False, True):
        L.seed_everything(1, verbose=False)
        x, y = (torch.stack(column) for column in zip(*[blobs()[i] for i in range(8)], strict=True))
        trusted = {"x": x, "y": y} if isinstance(algorithm, DStar) else None
        run = strategy(algorithm, devices, trusted_data=trusted)
        runs.append(fit(tmp_path, InPlace(in_place), run, devices=devices, max_epochs=2)[0])
    assert_equal(*runs)
