"""Metrics and RobustnessMonitor: numbers worked out by hand, laws over the rules, and runs that log
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from harness import averaging, fit
from models import Plain, loader
from zoo import RULES, RuleCase, each

from lightning_byz import (
    IPM,
    NNM,
    AllGather,
    Chain,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    RobustSGD,
    Sharded,
    SignFlip,
    TrimmedMean,
)
from lightning_byz import metrics as M
from lightning_byz.lightning import ByzantineRobustStrategy, ByzantineWorkers, RobustnessMonitor


def test_metrics_by_hand() -> None:
    # mean (2, 1), spread (1 + 1 + 1 + 1 + 0 + 4) / 3
    honest = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
    aggregate = torch.tensor([2.0, 3.0])
    assert float(M.spread(honest)) == pytest.approx(8 / 3)
    assert float(M.aggregation_error(aggregate, honest)) == pytest.approx(2.0)
    assert float(M.relative_error(aggregate, honest)) == pytest.approx(2 / 5**0.5)
    assert float(M.cosine_to_honest_mean(aggregate, honest)) == pytest.approx(7 / 65**0.5)
    assert float(M.empirical_kappa(aggregate, honest)) == pytest.approx(4 / (8 / 3))
    assert float(M.worst_relative_error(M.spread(honest), torch.tensor(5.0), 1.5)) == pytest.approx(
        (4 / 5) ** 0.5
    )
    # 0.1 is half of an equal share of five, which is kept
    weights = torch.tensor([0.5, 0.0, 0.4, 0.1, 0.0])
    assert M.dropped(weights).tolist() == [False, True, False, False, True]
    assert M.filter_counts(weights, [0, 4]) == (1, 1, 1)
    assert float(M.filter_precision(weights, [0, 4])) == 0.5
    assert float(M.filter_recall(weights, [0, 1, 4])) == pytest.approx(2 / 3)


def test_metrics_where_there_is_nothing_to_divide_by() -> None:
    equal = torch.ones(3, 2)
    assert float(M.empirical_kappa(torch.ones(2), equal)) == 0
    assert float(M.empirical_kappa(torch.zeros(2), equal)) == float("inf")
    assert float(M.worst_relative_error(torch.tensor(0.0), torch.tensor(0.0), 2.0)) == 0
    assert float(M.worst_relative_error(torch.tensor(1.0), torch.tensor(0.0), 2.0)) == float("inf")
    assert float(M.filter_precision(torch.full((4,), 0.25), [1])) == 1
    assert float(M.filter_recall(torch.full((4,), 0.25), [])) == 1


def test_metrics_over_rounds() -> None:
    honest, other = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0]])  # spread 1 each
    error, kappa, cosine = M.AggregationError(), M.EmpiricalKappa(), M.CosineToHonestMean()
    for metric in (error, kappa, cosine):
        metric.update(torch.tensor([3.0]), honest)
        metric.update(torch.tensor([-2.0]), other)
    assert float(error.compute()) == 2
    assert float(kappa.compute()) == 9
    assert float(cosine.compute()) == 0
    precision, recall = M.FilterPrecision(), M.FilterRecall()
    for metric in (precision, recall):
        metric.update(torch.tensor([0.0, 0.5, 0.5]), [0])
        metric.update(torch.tensor([0.5, 0.0, 0.5]), [0])
        metric.update(torch.tensor([0.4, 0.3, 0.3]), [0])
    assert float(precision.compute()) == 0.5
    assert float(recall.compute()) == pytest.approx(1 / 3)
    traffic = M.Traffic()
    traffic.update(10, 20, 0.5)
    traffic.update(1, 2)
    assert {k: float(v) for k, v in traffic.compute().items()} == {
        "bytes_up": 11,
        "bytes_down": 22,
        "seconds": 0.5,
    }


PROVEN = [TrimmedMean(), CoordinateMedian(), GeometricMedian(), Krum(definition="byzfl")]


@pytest.mark.parametrize(
    "rule", [*PROVEN, *(Chain(pre=(NNM(),), rule=rule) for rule in PROVEN)], ids=repr
)
def test_no_rule_needs_more_than_its_kappa(rule: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for n, f in ((5, 1), (7, 3), (10, 2), (11, 5)):
        fitted = rule.with_f(f)
        kappa = fitted.kappa(n)
        assert kappa >= f / (n - 2 * f)  # which no rule can have less of
        for trial in range(60):
            honest = torch.randn(
                n - f, 3, generator=generator, dtype=torch.float64
            ) * 10.0 ** torch.randint(-2, 3, (n - f, 1), generator=generator)
            if trial % 3 == 0:  # most of them equal: the spread is due to few
                honest[: n - 2 * f] = honest[0]
            direction = torch.randn(3, generator=generator, dtype=torch.float64)
            liars = honest.mean(0) + direction * 10.0 ** (trial % 6 - 2) * torch.ones(
                f, 1, dtype=torch.float64
            )
            if trial % 2:
                liars = honest[:f] + 0.01 * liars  # as far out as honest ones are
            result = fitted(torch.cat([honest, liars]))
            assert float(M.empirical_kappa(result, honest)) <= kappa * (1 + 1e-6) + 1e-9


@each(RULES)
def test_kappa_is_a_number_or_unknown(case: RuleCase) -> None:
    kappa = case.rule.kappa(11)
    assert kappa is None or (case.robust and kappa >= 2 / 7) or (not case.robust and kappa == 0)


def logged(trainer: L.Trainer, module: L.LightningModule) -> list[dict[str, float]]:
    return next(callback.steps for callback in trainer.callbacks if isinstance(callback, Keeps))


class Keeps(L.Callback):
    """Every step's byz/ metrics."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.steps.append(
            {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("byz/")}
        )


@pytest.mark.parametrize(
    "transport",
    [None, *(pytest.param(t, marks=pytest.mark.processes) for t in (AllGather(), Sharded()))],
)
def test_the_monitor_knows_what_the_truth_says(transport: Any, tmp_path: Path) -> None:
    devices = 4 if transport else 1
    strategy = (
        averaging(transport=transport, start_method="fork")
        if transport
        else averaging(workers_per_process=4)
    )
    callbacks = [
        ByzantineWorkers(SignFlip(10.0), workers=[1], start=2),
        RobustnessMonitor(),
        Keeps(),
    ]
    reports = fit(
        tmp_path,
        Plain(),
        strategy,
        devices=devices,
        data=loader(24 // devices),
        callbacks=callbacks,
        extra=logged,
        max_steps=4,
    )
    for report in reports:
        before, after = report["extra"][1], report["extra"][2]
        assert before["byz/relative_error"] == pytest.approx(0, abs=1e-6)
        assert before["byz/kappa"] == pytest.approx(0, abs=1e-9)
        assert before["byz/filter_recall"] == 1
        assert after["byz/relative_error"] == pytest.approx(11 / 4)
        assert after["byz/kappa"] == pytest.approx(
            after["byz/aggregation_error"] ** 2 / after["byz/spread"], rel=1e-4
        )
        assert after["byz/filter_recall"] == 0
        assert after["byz/filter_precision"] == 1
        assert [after[f"byz/weight/worker_{i}"] for i in range(4)] == [0.25] * 4
        assert after["byz/guarantee_ratio"] == 0  # an average that is told of no liars
        assert report["extra"][3]["byz/total_bytes_up"] == 4 * after["byz/bytes_up"]
        assert report["extra"] == reports[0]["extra"]


def test_the_monitor_without_the_truth(tmp_path: Path) -> None:
    strategy = ByzantineRobustStrategy(
        RobustSGD(aggregator=MultiKrum(definition="byzfl")), workers_per_process=5, num_byzantine=1
    )
    (report,) = fit(
        tmp_path,
        Plain(),
        strategy,
        data=loader(25),
        callbacks=[RobustnessMonitor(every_n_steps=2), Keeps()],
        extra=logged,
    )
    steps = report["extra"]
    # no truth, no proven kappa
    assert {"byz/cosine", "byz/kappa", "byz/filter_recall", "byz/guarantee"}.isdisjoint(steps[-1])
    assert sorted(steps[-1][f"byz/weight/worker_{i}"] for i in range(5)) == [
        0.0,
        0.25,
        0.25,
        0.25,
        0.25,
    ]
    # the second round was not looked at
    assert steps[1]["byz/total_bytes_up"] == steps[0]["byz/total_bytes_up"]
    assert steps[2]["byz/total_bytes_up"] == 3 * steps[0]["byz/total_bytes_up"]  # but it counts


@pytest.mark.parametrize("known", [True, False])
def test_the_guarantee_meter(known: bool, tmp_path: Path) -> None:
    class Still(Plain):
        """Workers whose gradients are the same, up to what ``apart`` adds to the first one's."""

        apart = 0.0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x = torch.ones(1, 10)
            loss = (
                self.net(x).sum()
                + self.apart * batch_idx * float(batch[0].sum()) * self.net(x).square().sum()
            )
            self.log("loss", loss)
            return loss

    model = Still(lr=0.0)
    model.apart = 1.0
    strategy = ByzantineRobustStrategy(
        RobustSGD(aggregator=TrimmedMean()), workers_per_process=6, num_byzantine=1
    )
    callbacks: list[Any] = [RobustnessMonitor(), Keeps()]
    if known:
        callbacks.insert(0, ByzantineWorkers(IPM(1000.0), workers=[5]))
    (report,) = fit(
        tmp_path, model, strategy, data=loader(24), callbacks=callbacks, extra=logged, max_steps=3
    )
    first, later = report["extra"][0], report["extra"][2]
    assert first["byz/guarantee"] == 1
    assert first["byz/guarantee_ratio"] < 1e-3
    assert later["byz/guarantee"] == 0
    assert later["byz/guarantee_ratio"] > 1
    assert later["byz/spread"] > 1e3 * first["byz/spread"]


def test_what_was_sent_before_a_restart_is_not_forgotten(tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "saved.ckpt")

    totals = []
    for steps, start in ((3, None), (5, tmp_path / "saved.ckpt")):
        callbacks = [RobustnessMonitor(), Keeps(), Saves()]
        strategy = ByzantineRobustStrategy(workers_per_process=4)
        (report,) = fit(
            tmp_path / "run",
            Plain(),
            strategy,
            callbacks=callbacks,
            extra=logged,
            max_steps=steps,
            max_epochs=9,
            ckpt_path=start,
        )
        totals.append(
            report["extra"][-1]["byz/total_bytes_up"] / report["extra"][-1]["byz/bytes_up"]
        )
    assert totals == [3, 5]


def test_what_the_monitor_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="looks at the rounds of"):
        fit(tmp_path, Plain(), "auto", callbacks=[RobustnessMonitor()])
    with pytest.raises(ValueError, match=r"indices in 0 .. n - 1 = 3. Found \[7\]"):
        fit(
            tmp_path,
            Plain(),
            ByzantineRobustStrategy(workers_per_process=4),
            callbacks=[RobustnessMonitor(byzantine=[1, 7])],
        )
    with pytest.raises(ValueError, match="should be at least 1"):
        RobustnessMonitor(every_n_steps=0)


def test_a_new_run_counts_from_nothing(tmp_path: Path) -> None:
    monitor, totals = RobustnessMonitor(every_n_steps=1), []
    for _ in range(2):
        strategy = ByzantineRobustStrategy(workers_per_process=4)
        (report,) = fit(tmp_path, Plain(), strategy, data=loader(24), callbacks=[monitor])
        totals.append(report["metrics"]["byz/total_bytes_up"])
    assert totals[0] == totals[1] > 0
