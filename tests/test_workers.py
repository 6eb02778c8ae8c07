"""In-process workers: the same run as ranks, the same run as plain Lightning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from harness import QUIET, assert_close, assert_equal, averaging, cpu_amp, fit
from models import Manual, Plain, blobs, loader, loss_of
from torch.utils.data import DataLoader

from lightning_byz import (
    ALIE,
    EF14,
    IPM,
    NNM,
    ByzEF21SGDM,
    ByzVRDM21,
    ByzVRMarinaPP,
    Chain,
    ClippedDifferences,
    CoordinateMedian,
    DStar,
    FlippedBit,
    Krum,
    Mean,
    Mimic,
    Mixture,
    NotANumber,
    OptimizedALIE,
    PerTensor,
    RandK,
    RobustSGD,
    Sharded,
    ShuffledLabels,
    SignSGDMajorityVote,
    Stuck,
    TopK,
    TrimmedMean,
)
from lightning_byz.data import WorkerSampler
from lightning_byz.lightning import ByzantineRobustStrategy, ByzantineWorkers

N = 4

PARITY: dict[str, tuple[dict[str, Any], Any]] = {
    "32-true": ({}, dict),
    "adamw": ({"optimizer": "adamw"}, dict),
    "lbfgs": ({"optimizer": "lbfgs"}, lambda: {"precision": "64-true"}),
    "bf16-mixed": ({}, lambda: {"precision": "bf16-mixed"}),
    "16-mixed": ({}, cpu_amp),
    "accumulate": ({}, lambda: {"accumulate_grad_batches": 2}),
    "accumulate 16-mixed": ({}, lambda: {"accumulate_grad_batches": 2, **cpu_amp()}),
    "clip norm": ({}, lambda: {"gradient_clip_val": 0.05}),
    "clip value": ({}, lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "unused": ({"unused": True}, dict),
    "frozen": ({"frozen": True}, dict),
    "gradient checkpointing": ({"checkpointing": True}, dict),
    "swa": (
        {},
        lambda: {
            "max_epochs": 3,
            "callbacks": [L.pytorch.callbacks.StochasticWeightAveraging(0.05, 1)],
        },
    ),
    "early stopping": (
        {},
        lambda: {"max_epochs": 4, "callbacks": [L.pytorch.callbacks.EarlyStopping("loss", 9, 0)]},
    ),
}


@pytest.mark.parametrize("case", PARITY)
def test_mean_of_in_process_workers_is_plain_lightning(case: str, tmp_path: Path) -> None:
    options, trainer = PARITY[case]
    runs = []
    for strategy in ("auto", averaging(workers_per_process=N)):
        torch.manual_seed(1)
        runs += fit(tmp_path, Plain(**options), strategy, **trainer())
    assert runs[0]["steps"] == runs[1]["steps"] > 0
    assert_close(*runs, 2e-3 if "16" in case else 1e-5)
    assert runs[0]["metrics"]["loss_step"] == pytest.approx(
        runs[1]["metrics"]["loss_step"], rel=2e-2 if "16" in case else 1e-4
    )


ALGORITHMS = {
    "default": None,
    "momentum": RobustSGD(aggregator=TrimmedMean(), worker_momentum=0.9, server_momentum=0.5),
    "rand-k": RobustSGD(
        aggregator=Chain(pre=(NNM(),), rule=TrimmedMean()),
        compressor=RandK(ratio=0.3),
        worker_momentum=0.9,
    ),
    "krum": RobustSGD(aggregator=Krum(f=0)),
    "ef21": ByzEF21SGDM(compressor=TopK(ratio=0.1)),
    "ef14": EF14(compressor=PerTensor(TopK(ratio=0.1))),
    "vr-dm21": ByzVRDM21(compressor=TopK(ratio=0.3)),
    "dstar": DStar(),
    "marina": ByzVRMarinaPP(TrimmedMean(), compressor=RandK(ratio=0.5), p=0.3, clipping=None),
    "marina-pp": ByzVRMarinaPP(
        CoordinateMedian(), p=0.3, cohort_size=2, full_cohort_size=3, full_batches=2
    ),
    "clipped": ClippedDifferences(RobustSGD(TrimmedMean(), worker_momentum=0.5), cohort_size=2),
    "signum": SignSGDMajorityVote(),
}


class Streams(Plain):
    """Every worker draws from its own sampler stream, in-process and across ranks alike."""

    def train_dataloader(self) -> DataLoader:
        strategy = self.trainer.strategy
        local, ranks = strategy.workers_per_process, self.trainer.world_size
        sampler = WorkerSampler(
            blobs(), 6, local, num_replicas=ranks, rank=strategy.global_rank, seed=3
        )
        return DataLoader(blobs(), batch_size=6 * local, sampler=sampler)


@pytest.mark.thorough(keep=3)
@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "attack"),
    [
        (name, attack)
        for name in ALGORITHMS
        for attack in (None, ALIE(z=1.5), IPM(10.0), NotANumber())
        if name != "krum" or not attack
    ],
    ids=repr,
)
def test_in_process_is_across_processes(name: str, attack: Any, tmp_path: Path) -> None:
    """The same seed with n workers in one process, in n ranks, and in between: the same bits."""
    runs = []
    for devices in (1, 2, 4):
        torch.manual_seed(1)
        strategy = ByzantineRobustStrategy(
            algorithm=ALGORITHMS[name],
            workers_per_process=N // devices,
            start_method="fork",
            seed=7,
        )
        callbacks = [] if attack is None else [ByzantineWorkers(attack, workers=[1])]
        options = {"norm": True, "dropout": 0.2}
        runs.append(
            fit(
                tmp_path,
                Streams(**options),
                strategy,
                devices=devices,
                callbacks=callbacks,
                max_epochs=2,
            )
        )
    for run in runs:
        for report in run:
            assert_equal(runs[0][0], report)
            for metric in ("loss", "byz/cosine", "byz/relative_error", "byz/byzantine_weight"):
                assert report["metrics"].get(metric) == pytest.approx(
                    runs[0][0]["metrics"].get(metric), nan_ok=True
                )
    assert runs[0][0]["steps"] == 20


@pytest.mark.thorough(keep=1)
@pytest.mark.processes
@pytest.mark.parametrize(
    ("algorithm", "attack", "exact"),
    [
        (RobustSGD(CoordinateMedian(), worker_momentum=0.9), NotANumber(), True),
        (SignSGDMajorityVote(), ALIE(z=1.5), True),
        (ByzEF21SGDM(compressor=TopK(ratio=0.1)), IPM(10.0), False),
        (DStar(), OptimizedALIE(), False),
    ],
    ids=repr,
)
def test_shards_are_in_process(algorithm: Any, attack: Any, exact: bool, tmp_path: Path) -> None:
    """The same seed with all workers in one process, and with a shard of the coordinates in each of
    two.
    """
    runs = []
    for devices, transport in ((1, None), (2, Sharded())):
        torch.manual_seed(1)
        strategy = ByzantineRobustStrategy(
            algorithm=algorithm,
            transport=transport,
            workers_per_process=6 // devices,
            start_method="fork",
            seed=7,
        )
        callbacks = [ByzantineWorkers(attack, workers=[1])]
        runs += fit(
            tmp_path,
            Streams(norm=True, dropout=0.2),
            strategy,
            devices=devices,
            callbacks=callbacks,
        )
    for report in runs[1:]:
        (assert_equal if exact else assert_close)(runs[0], report)
        assert_equal(runs[1], report)
        assert report["metrics"].keys() == runs[0]["metrics"].keys()
        for metric, value in runs[0]["metrics"].items():
            assert report["metrics"][metric] == pytest.approx(value, rel=1e-4, nan_ok=True)


@pytest.mark.thorough(keep=1)
@pytest.mark.processes
@pytest.mark.parametrize(
    "attack",
    [
        Mixture((OptimizedALIE(), Mimic(warmup=3))),
        Mixture((Stuck(), FlippedBit())),
        ShuffledLabels(),
    ],
    ids=repr,
)
def test_omniscient_attacks_and_faults_are_the_same_across_processes(
    attack: Any, tmp_path: Path
) -> None:
    runs = []
    for devices in (1, 2):
        torch.manual_seed(1)
        strategy = ByzantineRobustStrategy(
            workers_per_process=6 // devices, num_byzantine=2, start_method="fork", seed=7
        )
        callbacks = [ByzantineWorkers(attack, workers=[1, 4], probability=0.8)]
        remembered = lambda _trainer, _, callbacks=callbacks: callbacks[0].state_dict()  # noqa: E731
        runs += fit(
            tmp_path, Streams(), strategy, devices=devices, callbacks=callbacks, extra=remembered
        )
    for report in runs:
        assert_equal(runs[0], report)
        for a, b in zip(
            runs[0]["extra"].get("attack", []), report["extra"].get("attack", []), strict=True
        ):
            assert a["memory"].keys() == b["memory"].keys()
            assert all(torch.equal(value, b["memory"][key]) for key, value in a["memory"].items())


def test_the_strategy_tells_a_compressor_the_tensors_sizes(tmp_path: Path) -> None:
    algorithm = EF14(compressor=PerTensor(TopK(ratio=0.01)))
    strategy = ByzantineRobustStrategy(algorithm=algorithm, workers_per_process=N)

    def seen(trainer: Any, module: Any) -> Any:
        return trainer.strategy.exchanges[0].algorithm.compressor.sizes, [
            p.numel() for p in module.parameters()
        ]

    (report,) = fit(tmp_path, Plain(), strategy, extra=seen)
    found, sizes = report["extra"]
    assert found == tuple(sizes)
    assert algorithm.compressor.sizes is None, "the user's own object stays as it was"


@pytest.mark.parametrize("module", [Manual], ids=["manual"])
def test_manual_optimization_is_refused_in_process(module: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"workers_per_process=4.*manual.*Use one worker per process"
    ):
        fit(tmp_path, module(), averaging(workers_per_process=N))


def test_workers_that_hold_more_data_weigh_more(tmp_path: Path) -> None:
    """A mean weighted 3:1:1:1 is the step that the weighted mean of the workers' gradients makes;
    equal weights are no weights.
    """
    reports = []
    for weights in (None, [2, 2, 2, 2], [3, 1, 1, 1]):
        torch.manual_seed(1)
        strategy = ByzantineRobustStrategy(
            RobustSGD(Mean()), workers_per_process=N, num_byzantine=0, worker_weights=weights
        )
        reports += fit(tmp_path, Plain(), strategy)
    assert_close(reports[0], reports[1])
    with pytest.raises(AssertionError):
        assert_close(reports[0], reports[2])


@pytest.mark.parametrize(
    ("weights", "rule", "message"),
    [
        ([1.0, 2.0], CoordinateMedian(), r"each of the n=4 workers.*Found 2"),
        ([1, 1, 1, 1], Krum(), r"Krum counts every row alike"),
        ([5, 1, 1, 1], CoordinateMedian(), r"less than half of the data. Found 1 with 62 % of it"),
    ],
)
def test_weights_that_cannot_work_are_refused_before_the_first_step(
    weights: list[float], rule: Any, message: str, tmp_path: Path
) -> None:
    strategy = ByzantineRobustStrategy(
        RobustSGD(rule),
        workers_per_process=N,
        worker_weights=weights,
        num_byzantine=0 if isinstance(rule, Krum) else 1,
    )
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Plain(), strategy)


def test_weights_are_positive_numbers() -> None:
    with pytest.raises(ValueError, match="positive numbers"):
        ByzantineRobustStrategy(worker_weights=[1.0, 0.0])


class InPlace(Plain):
    """Changes its batch in place, before autograd saves it."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        x.mul_(0.5)
        loss = loss_of(self.net, [x, y])
        self.log("loss", loss)
        return loss


@pytest.mark.parametrize("vectorize", ["auto", False])
def test_a_step_may_change_its_batch_in_place(vectorize: Any, tmp_path: Path) -> None:
    runs = []
    for strategy in ("auto", averaging(workers_per_process=4, vectorize=vectorize)):
        L.seed_everything(1, verbose=False)
        runs += fit(tmp_path, InPlace(), strategy, data=loader(24))
    assert_close(*runs)


# -- what a training step returns and logs ---------------------------------------------------------


class Returns(Plain):
    def __init__(self, make: Callable[[torch.Tensor], Any], **logged: Any) -> None:
        super().__init__()
        self.make, self.logged = make, logged

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
        loss = loss_of(self.net, batch)
        if self.logged:
            self.log(value=loss, **self.logged)
        return self.make(loss)


@pytest.mark.parametrize("vectorize", ["auto", False])
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda loss: {"x": loss}, "a dict whose 'loss' is None"),
        (lambda loss: {}, "a dict whose 'loss' is None"),
        (lambda loss: {"loss": 1.5}, "a dict whose 'loss' is 1.5"),
        (float, r"\d"),
        (lambda loss: (loss, 1), r"\(tensor"),
    ],
    ids=["no loss", "empty", "a number in a dict", "a number", "a tuple"],
)
def test_a_step_that_returns_no_loss_is_refused(make: Any, found: str, vectorize: Any) -> None:
    """It would train nothing."""
    strategy = ByzantineRobustStrategy(workers_per_process=3, vectorize=vectorize)
    trainer = L.Trainer(**QUIET, devices=1, max_epochs=1, strategy=strategy)
    with pytest.raises(TypeError, match=f"should return a loss.*Found {found}"):
        trainer.fit(Returns(make), loader())


@pytest.mark.parametrize(
    ("logged", "message"),
    [
        ({"name": "x", "on_step": False, "on_epoch": False}, "on a step or on an epoch.*'x'"),
        ({"name": "x/dataloader_idx_0"}, "should not contain '/dataloader_idx_'"),
        ({"name": "two\nlines"}, "should be printable"),
    ],
    ids=["nowhere", "dataloader", "two lines"],
)
def test_what_nobody_should_log_is_refused(logged: dict[str, Any], message: str) -> None:
    """Else the others would take all that this worker logs for its silence."""
    strategy = ByzantineRobustStrategy(workers_per_process=3)
    trainer = L.Trainer(**QUIET, devices=1, max_epochs=1, strategy=strategy)
    with pytest.raises(ValueError, match=message):
        trainer.fit(Returns(lambda loss: loss, **logged), loader())
