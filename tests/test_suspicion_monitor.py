"""SuspicionMonitor on the strategy's rounds: whom it accuses, what it tells whom, quarantine, and
checkpoints.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from harness import averaging, fit
from models import GAN, Plain, blobs, loader

from lightning_byz import (
    AllGather,
    ByzEF21SGDM,
    LabelFlip,
    Mean,
    NotANumber,
    RobustSGD,
    Sharded,
    SignFlip,
    WrongScale,
)
from lightning_byz.lightning import (
    ByzantineRobustStrategy,
    ByzantineWorkers,
    RobustnessMonitor,
    SuspicionMonitor,
)


def plain_momentum_free(n: int = 5, **kwargs: Any) -> ByzantineRobustStrategy:
    return ByzantineRobustStrategy(RobustSGD(), workers_per_process=n, num_byzantine=1, **kwargs)


def data(devices: int = 1) -> Any:
    return loader(40 // devices, blobs(2000), shuffle=False)


def suspicions(trainer: L.Trainer, module: L.LightningModule) -> Any:
    monitor = next(
        callback for callback in trainer.callbacks if isinstance(callback, SuspicionMonitor)
    )
    return {
        "accused": [sorted(test.accused) for test in monitor.tests],
        "quarantined": monitor.quarantined,
        "state": monitor.state_dict(),
    }


class Keeps(L.pytorch.loggers.logger.DummyLogger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.rows.append((int(step or 0), dict(metrics)))


class KeepsAlerts(L.pytorch.loggers.WandbLogger):
    """A WandbLogger without a run: what it would send is kept."""

    def __init__(self) -> None:
        super().__init__(save_dir="unused", offline=True)
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.alerts: list[dict[str, str]] = []

    log_metrics = Keeps.log_metrics  # type: ignore[assignment]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def finalize(self, status: str) -> None:
        pass

    @property
    def experiment(self) -> Any:
        return self

    def alert(self, **kwargs: str) -> None:
        self.alerts.append(kwargs)


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize(
    ("fault", "within"), [(WrongScale(), 2), (SignFlip(), 60), (LabelFlip(3), 100)], ids=repr
)
def test_it_finds_the_worker_and_tells_everybody(
    fault: Any, within: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    suspects: list[Any] = []
    logger = KeepsAlerts()
    callbacks = [
        ByzantineWorkers(fault, workers=[3], start=10),
        SuspicionMonitor(on_suspect=suspects.append),
    ]
    with caplog.at_level(logging.WARNING):
        (report,) = fit(
            tmp_path,
            Plain(),
            plain_momentum_free(),
            data=data(),
            callbacks=callbacks,
            extra=suspicions,
            max_epochs=3,
            logger=logger,
        )
    assert report["extra"]["accused"] == [[3]]
    (suspect,) = suspects
    assert (suspect.worker, suspect.rank, suspect.device) == (3, 0, "cpu")
    assert 10 <= suspect.step < 10 + within
    assert [record.message for record in caplog.records if "Suspect" in record.message] == [
        suspect.message
    ]
    assert (
        f"Suspect: worker 3, rank 0 on host {suspect.host}, device cpu. Step {suspect.step}: "
        in suspect.message
    )
    assert [alert["text"] for alert in logger.alerts] == [suspect.message]
    looks = [(step, row) for step, row in logger.rows if "byz/suspicion/worker_3" in row]
    assert [step for step, _ in looks[:4]] == [0, 1, 2, 3]
    before, after = dict(looks)[suspect.step - 1], dict(looks)[suspect.step]
    assert before["byz/suspicion/worker_3"] < 1 <= after["byz/suspicion/worker_3"]
    assert max(after[f"byz/suspicion/worker_{i}"] for i in (0, 1, 2, 4)) < 1


def test_an_honest_run_accuses_nobody(tmp_path: Path) -> None:
    (report,) = fit(
        tmp_path,
        Plain(),
        plain_momentum_free(),
        data=data(),
        callbacks=[SuspicionMonitor()],
        extra=suspicions,
        max_epochs=3,
    )
    assert report["extra"]["accused"] == [[]]


def test_who_has_no_batch_is_not_accused(tmp_path: Path) -> None:
    """The last batch of every epoch has samples for five of six workers; who gets which is drawn."""
    (report,) = fit(
        tmp_path,
        Plain(),
        plain_momentum_free(6),
        data=loader(24, blobs(24 * 3 + 5), shuffle=True),
        callbacks=[SuspicionMonitor(every_n_steps=2)],
        extra=suspicions,
        max_epochs=12,
    )
    assert report["steps"] == 48 and report["extra"]["accused"] == [[]]


@pytest.mark.processes
@pytest.mark.parametrize("transport", [AllGather(), Sharded()], ids=lambda t: type(t).__name__)
def test_on_ranks_all_agree(transport: Any, tmp_path: Path) -> None:
    strategy = ByzantineRobustStrategy(RobustSGD(), transport, start_method="fork", num_byzantine=1)
    callbacks = [
        ByzantineWorkers(WrongScale(), workers=[2], start=4),
        SuspicionMonitor(quarantine=True),
    ]
    reports = fit(
        tmp_path,
        Plain(),
        strategy,
        devices=4,
        data=data(4),
        callbacks=callbacks,
        extra=suspicions,
        max_steps=12,
    )
    for report in reports:
        assert report["extra"]["accused"] == [[2]]
        assert report["extra"]["quarantined"] == {2: 5}
        assert torch.equal(
            report["extra"]["state"]["tests"][0]["wealth"],
            reports[0]["extra"]["state"]["tests"][0]["wealth"],
        )
        assert all(
            torch.equal(report["weights"][name], value)
            for name, value in reports[0]["weights"].items()
        )


def test_quarantine_leaves_the_messages_out(tmp_path: Path) -> None:
    """An average of the others, which is what a run without the worker computes."""

    class Keeps(L.Callback):
        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            self.steps.append(
                {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("byz/")}
            )

    keeps, model = Keeps(), Plain(lr=0.0)
    monitor = SuspicionMonitor(quarantine=True, probation=6)
    callbacks = [
        ByzantineWorkers(WrongScale(-1e6), workers=[1], start=2, stop=8),
        RobustnessMonitor(),
        keeps,
        monitor,
    ]
    (report,) = fit(
        tmp_path,
        model,
        averaging(workers_per_process=5),
        data=data(),
        callbacks=callbacks,
        extra=suspicions,
        max_steps=14,
    )
    weights = [step["byz/weight/worker_1"] for step in keeps.steps]
    assert weights[:4] == pytest.approx([0.2] * 4)
    assert weights[4:10] == [0.0] * 6  # from the round after the verdict until its time is over
    assert weights[10:] == pytest.approx([0.2] * 4)
    assert [step["byz/silent"] for step in keeps.steps] == [0] * 14
    assert keeps.steps[3]["byz/relative_error"] > 1e4
    assert max(step["byz/relative_error"] for step in keeps.steps[4:8]) < 1e-5
    assert report["extra"]["accused"] == [[]]
    assert report["extra"]["quarantined"] == {}


def test_two_faulty_workers_one_after_the_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = Keeps()
    callbacks = [
        ByzantineWorkers(WrongScale(), workers=[1]),
        ByzantineWorkers(WrongScale(), workers=[2], start=20),
        SuspicionMonitor(quarantine=True),
    ]
    strategy = ByzantineRobustStrategy(RobustSGD(), workers_per_process=7, num_byzantine=2)
    settings = {"data": data(), "callbacks": callbacks, "extra": suspicions, "max_steps": 40}
    with caplog.at_level(logging.INFO):
        (report,) = fit(tmp_path, Plain(), strategy, logger=logger, **settings)
    assert report["extra"]["quarantined"][1] == 1
    last = report["extra"]["quarantined"][2]
    assert 21 <= last <= 23
    looks = {step: row["byz/quarantined"] for step, row in logger.rows if "byz/quarantined" in row}
    # of the round's beginning
    assert [looks[step] for step in (0, 1, 2, 20, last, last + 1)] == [0, 0, 1, 1, 1, 2]
    said = [record.getMessage() for record in caplog.records]
    (first, second) = (message for message in said if message.startswith("Suspect"))
    assert "the rule goes on with 6 rows and f=2" in first
    assert "the rule goes on with 5 rows and f=2" in second
    (summary,) = (message for message in said if "at the end (suspicion 1 accuses)" in message)
    lines = summary.splitlines()[1:]
    assert len(lines) == 7
    quarantined = {
        1: "(SUSPECT), in quarantine since step 1",
        2: f"(SUSPECT), in quarantine since step {last}",
    }
    for worker, line in enumerate(lines):
        assert "rank 0 on host " in line
        assert line.endswith(quarantined.get(worker, "")) and ("SUSPECT" in line) == (
            worker in quarantined
        )


def test_silence_is_suspicious_if_it_goes_on(tmp_path: Path) -> None:
    callbacks = [ByzantineWorkers(NotANumber(), workers=[0], start=6), SuspicionMonitor()]
    (report,) = fit(
        tmp_path,
        Plain(),
        plain_momentum_free(),
        data=data(),
        callbacks=callbacks,
        extra=suspicions,
        max_steps=12,
    )
    assert report["extra"]["accused"] == [[0]]


def test_what_it_knows_survives_a_checkpoint(tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "saved.ckpt")

    suspects: list[Any] = []
    reports = []
    for steps, start in ((10, None), (20, tmp_path / "saved.ckpt")):
        callbacks = [
            ByzantineWorkers(WrongScale(), workers=[2]),
            SuspicionMonitor(quarantine=True, on_suspect=suspects.append),
            Saves(),
        ]
        kwargs = {
            "max_steps": steps,
            "max_epochs": 9,
            "ckpt_path": start,
            "callbacks": callbacks,
            "extra": suspicions,
        }
        strategy = ByzantineRobustStrategy(RobustSGD(), workers_per_process=7, num_byzantine=2)
        reports += fit(tmp_path / "run", Plain(), strategy, data=data(), **kwargs)
    assert len(suspects) == 1  # it is not accused a second time
    assert reports[1]["extra"]["quarantined"] == {2: 1}
    assert reports[1]["extra"]["state"]["tests"][0]["pairs"].tolist() == [10, 10, 1, 10, 10, 10, 10]


@pytest.mark.processes
def test_every_optimizer_has_a_test(tmp_path: Path) -> None:
    strategy = averaging(start_method="fork")
    (report, *_) = fit(
        tmp_path,
        GAN(),
        strategy,
        devices=3,
        data=loader(8),
        callbacks=[SuspicionMonitor()],
        extra=suspicions,
    )
    assert report["extra"]["accused"] == [[], []]
    assert [state["pairs"].tolist() for state in report["extra"]["state"]["tests"]] == [
        [5, 5, 5]
    ] * 2


def test_momentum_spreads_the_looks() -> None:
    from lightning_byz.callbacks.suspicion_monitor import rounds_to_forget

    assert rounds_to_forget(RobustSGD(aggregator=Mean())) == 2
    assert rounds_to_forget(RobustSGD(worker_momentum=0.9)) == 29
    assert rounds_to_forget(ByzEF21SGDM()) == 30


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="To watch the ranks of plain DDP, use ShadowMode"):
        fit(tmp_path, Plain(), "auto", callbacks=[SuspicionMonitor()])
    strategy = ByzantineRobustStrategy(ByzEF21SGDM(), workers_per_process=5)
    with pytest.raises(ValueError, match="whose rule goes on with what it knows of absent"):
        fit(tmp_path, Plain(), strategy, callbacks=[SuspicionMonitor(quarantine=True)])
    with pytest.raises(ValueError, match="is the time in quarantine"):
        SuspicionMonitor(probation=3)
    with pytest.raises(ValueError, match="`every_n_steps` should be at least 2"):
        SuspicionMonitor(every_n_steps=1)
    with pytest.raises(ValueError, match="Only a worker in quarantine"):
        SuspicionMonitor(quarantine=True).reinstate(3)


def test_in_process_workers_are_named_by_their_number(tmp_path: Path) -> None:
    """They all are of rank 0."""
    (report,) = fit(
        tmp_path,
        Plain(),
        plain_momentum_free(3),
        data=data(),
        callbacks=[SuspicionMonitor()],
        extra=lambda trainer, _: [str(place) for place in trainer.callbacks[0].places],
        max_steps=1,
    )
    assert [place.split(" on ")[0] for place in report["extra"]] == [
        f"worker {worker}, rank 0" for worker in range(3)
    ]
