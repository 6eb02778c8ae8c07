"""State survives: save, kill, resume equals uninterrupted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from harness import assert_equal, fit
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loops.fit_loop import _FitLoop as FitLoop
from models import GAN, CountsBatches, Plain, StatefulLoader, blobs

from lightning_byz import (
    EF14,
    ByzDIANA,
    ByzEF21SGDM,
    ByzVRDM21,
    ByzVRMarinaPP,
    ClippedDifferences,
    CoordinateMedian,
    DStar,
    Mean,
    Mimic,
    Mixture,
    PerTensor,
    RandK,
    RobustSGD,
    Sharded,
    ShiftBack,
    SignSGDMajorityVote,
    Stuck,
    TopK,
    TrimmedMean,
)
from lightning_byz.lightning import ByzantineRobustStrategy, ByzantineWorkers

ALGORITHMS = {
    "default": None,
    "momentum": RobustSGD(
        aggregator=TrimmedMean(),
        compressor=RandK(ratio=0.5),
        worker_momentum=0.9,
        server_momentum=0.5,
    ),
    "ef21": ByzEF21SGDM(compressor=TopK(ratio=0.1)),
    "diana": ByzDIANA(compressor=RandK(ratio=0.2), alpha=0.2),
    "ef14": EF14(compressor=PerTensor(TopK(ratio=0.1))),
    "vr-dm21": ByzVRDM21(compressor=TopK(ratio=0.3)),
    "dstar": DStar(),
    "marina-pp": ByzVRMarinaPP(CoordinateMedian(), p=0.4, cohort_size=3, full_batches=2),
    "clipped": ClippedDifferences(RobustSGD(TrimmedMean(), worker_momentum=0.5), cohort_size=2),
    "signum": SignSGDMajorityVote(),
    "ef21 on shards": ByzEF21SGDM(compressor=TopK(ratio=0.1)),
}


class Killer(L.Callback):
    """SIGKILL to this rank, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Resumable(Plain):
    """Dropout, shuffling from the global RNG, and a loader that knows where it is within an
    epoch.
    """

    def __init__(self, stateful: bool = False) -> None:
        super().__init__(norm=True, dropout=0.2)
        self.stateful = stateful

    def train_dataloader(self) -> Any:
        if self.stateful:
            return StatefulLoader(blobs(), 24)
        return torch.utils.data.DataLoader(blobs(), batch_size=24, shuffle=True)


def strategy_of(name: str, devices: int) -> ByzantineRobustStrategy:
    return ByzantineRobustStrategy(
        algorithm=ALGORITHMS[name],
        transport=Sharded() if "on shards" in name else None,
        workers_per_process=1 if devices > 1 else 4,
        start_method="fork",
        seed=7,
    )


@pytest.mark.thorough(keep=2)
@pytest.mark.processes
@pytest.mark.parametrize("where", ["epoch end", "inside an epoch"])
@pytest.mark.parametrize(
    ("name", "devices"),
    [
        (name, devices)
        for name in ALGORITHMS
        for devices in (1, 4)
        if devices > 1 or "on shards" not in name
    ],
)
def test_killed_and_resumed_is_uninterrupted(
    name: str, devices: int, where: str, tmp_path: Path
) -> None:
    if where == "epoch end" and devices == 1 and not hasattr(FitLoop, "is_resuming"):
        pytest.skip(
            "this Lightning draws the shuffling order twice when it resumes at the end of an epoch"
        )
    if name == "marina-pp" and where == "inside an epoch":
        pytest.skip("a full pass needs a DataLoader, and that one is none")
    stateful = where == "inside an epoch"
    trainer: dict[str, Any] = {
        "devices": devices,
        "max_epochs": 3,
        "use_distributed_sampler": not stateful,
    }

    def saving(folder: str) -> ModelCheckpoint:
        when = {"every_n_train_steps": 4} if stateful else {"every_n_epochs": 1}
        return ModelCheckpoint(tmp_path / folder, save_top_k=-1, filename="{step}", **when)

    def run(folder: str, **kwargs: Any) -> list[dict[str, Any]]:
        L.seed_everything(1)
        return fit(
            tmp_path / folder,
            Resumable(stateful),
            strategy_of(name, devices),
            enable_checkpointing=True,
            **{**trainer, **kwargs, "callbacks": [saving(folder), *kwargs.get("callbacks", [])]},
        )

    whole = run("whole")
    steps = whole[0]["steps"]
    if devices > 1:
        with pytest.raises(Exception, match="SIGKILL|Connection closed|reset by peer"):
            run("killed", callbacks=[Killer(steps // 2 + 1)])
    else:
        child = os.fork()  # the run that is to be killed must not take the tests with it
        if child == 0:
            try:
                run("killed", callbacks=[Killer(steps // 2 + 1)])
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
    saved = sorted(
        (tmp_path / "killed").glob("*.ckpt"),
        key=lambda path: int(path.stem.split("=")[1].split("-")[0]),
    )
    assert saved, "no checkpoint was written before the kill"
    last = int(saved[-1].stem.split("=")[1].split("-")[0])
    assert 0 < last < steps
    torch.manual_seed(99)  # a fresh process would have other random states
    np.random.seed(99)
    random.seed(99)
    resumed = fit(
        tmp_path / "resumed",
        Resumable(stateful),
        strategy_of(name, devices),
        enable_checkpointing=True,
        ckpt_path=str(saved[-1]),
        callbacks=[saving("resumed")],
        **trainer,
    )
    for a, b in zip(whole, resumed, strict=True):
        assert_equal(a, b)


REMEMBERING = {
    "stuck": Stuck(),
    "mimic": Mimic(warmup=6),
    "shift back": ShiftBack(),
    "mixture": Mixture((Stuck(), Mimic(warmup=6))),
}


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("name", REMEMBERING)
def test_what_an_attack_remembers_is_resumed(name: str, tmp_path: Path) -> None:
    """Two optimizers' worth of memory would be as easy; here are two attacks that remember, in one
    run.
    """
    # the majority of the four that are left
    byzantine = [0, 1, 2] if name == "shift back" else [0, 1]

    def run(folder: str, **kwargs: Any) -> dict[str, Any]:
        L.seed_everything(1)
        callbacks = [
            ByzantineWorkers(REMEMBERING[name], workers=byzantine),
            ByzantineWorkers(Stuck(), workers=[4], start=1, probability=0.7),
            ModelCheckpoint(
                tmp_path / folder, save_top_k=-1, filename="{step}", every_n_train_steps=4
            ),
        ]
        strategy = ByzantineRobustStrategy(
            algorithm=RobustSGD(aggregator=Mean()), workers_per_process=5, seed=7
        )
        options = {"max_epochs": 2, "use_distributed_sampler": False, "enable_checkpointing": True}
        return fit(
            tmp_path / folder,
            Resumable(stateful=True),
            strategy,
            callbacks=callbacks,
            **{**options, **kwargs},
        )[0]

    whole = run("whole")
    saved = tmp_path / "whole" / "step=4.ckpt"
    states = [
        value
        for key, value in torch.load(saved, weights_only=True)["callbacks"].items()
        if "ByzantineWorkers" in key
    ]
    assert len(states) == 2
    assert all(state["attack"][0]["memory"] for state in states)
    resumed = run("resumed", ckpt_path=str(saved))
    assert_equal(whole, resumed)
    forgotten = torch.load(saved, weights_only=True)
    for key in [key for key in forgotten["callbacks"] if "ByzantineWorkers" in key]:
        del forgotten["callbacks"][key]
    torch.save(forgotten, tmp_path / "forgotten.ckpt")
    with pytest.raises(AssertionError):
        assert_equal(whole, run("forgotten", ckpt_path=str(tmp_path / "forgotten.ckpt")))


def test_another_algorithm_is_refused(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path)
    fit(
        tmp_path, Plain(), strategy_of("ef21", 1), enable_checkpointing=True, callbacks=[checkpoint]
    )
    with pytest.raises(ValueError, match="belongs to another algorithm"):
        fit(
            tmp_path,
            Plain(),
            strategy_of("momentum", 1),
            ckpt_path=checkpoint.best_model_path,
            max_epochs=2,
        )


def test_a_checkpoint_of_plain_lightning_starts_the_algorithm_afresh(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path)
    fit(tmp_path, Plain(), "auto", enable_checkpointing=True, callbacks=[checkpoint])
    (report,) = fit(
        tmp_path,
        Plain(),
        strategy_of("ef21", 1),
        ckpt_path=checkpoint.best_model_path,
        max_epochs=2,
    )
    assert report["steps"] == 20


class Reversed(Plain):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([*self.parameters()][::-1], lr=0.1)


@pytest.mark.parametrize("module", [Plain, Reversed])
def test_a_checkpoint_of_an_earlier_version_is_taken_where_orders_are_the_same(
    module: type[Plain], tmp_path: Path
) -> None:
    """Its vectors were in the order of the optimizer's parameters, not of the module's."""
    checkpoint = ModelCheckpoint(tmp_path)
    strategy = strategy_of("momentum", 1)
    fit(tmp_path, module(), strategy, enable_checkpointing=True, callbacks=[checkpoint])
    saved = torch.load(checkpoint.best_model_path, weights_only=False)
    assert saved["lightning_byz"]["version"] == 2
    saved["lightning_byz"]["version"] = 1
    torch.save(saved, tmp_path / "old.ckpt")
    warned: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lightning_byz.strategies.checkpoint.warn", warned.append)
        (new,), (old,) = (
            fit(tmp_path, module(), strategy_of("momentum", 1), ckpt_path=path, max_epochs=2)
            for path in (checkpoint.best_model_path, str(tmp_path / "old.ckpt"))
        )
    afresh = module is Reversed
    assert ["of an earlier version" in text for text in warned] == [True] * afresh
    goes_on = [torch.equal(value, old["weights"][name]) for name, value in new["weights"].items()]
    assert all(goes_on) != afresh


@pytest.mark.processes
def test_state_is_per_optimizer(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path)
    strategy = ByzantineRobustStrategy(
        algorithm=RobustSGD(aggregator=TrimmedMean(), worker_momentum=0.9), start_method="fork"
    )
    data = Plain().train_dataloader()
    fit(
        tmp_path,
        GAN(),
        strategy,
        devices=3,
        data=data,
        enable_checkpointing=True,
        callbacks=[checkpoint],
    )
    saved = torch.load(
        checkpoint.best_model_path or next(tmp_path.glob("*.ckpt")), weights_only=True
    )["lightning_byz"]
    sizes = [sum(p.numel() for p in net.parameters()) for net in (GAN().generator, GAN().critic)]
    assert [server["dim"] for server in saved["server"]] == sizes
    assert [len(workers) for workers in saved["workers"]] == [3, 3]


@pytest.mark.thorough
def test_weights_load_without_this_package(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path)
    (report,) = fit(
        tmp_path, Plain(), strategy_of("ef21", 1), enable_checkpointing=True, callbacks=[checkpoint]
    )
    torch.save(report["weights"], tmp_path / "weights.pt")
    code = f"""
import sys, torch
sys.modules["lightning_byz"] = None
from models import Plain
model = Plain.load_from_checkpoint({checkpoint.best_model_path!r}, weights_only=True)
assert all(torch.equal(v, model.state_dict()[k]) for k, v in torch.load({str(tmp_path / "weights.pt")!r}).items())
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent, timeout=120)


def test_learning_rate_finder_leaves_a_clean_state(tmp_path: Path) -> None:
    """It saves before round 0, trains for a while, and restores: workers and server have then seen
    the real rounds only.
    """
    counter = CountsBatches()
    (report,) = fit(
        tmp_path,
        Plain(),
        ByzantineRobustStrategy(algorithm=ALGORITHMS["momentum"], workers_per_process=4),
        callbacks=[LearningRateFinder(num_training_steps=5, update_attr=False), counter],
        default_root_dir=tmp_path,
        enable_checkpointing=True,
        extra=lambda trainer, _: (
            trainer.strategy.exchanges[0].workers[3].rounds,
            trainer.strategy.exchanges[0].server.rounds,
        ),
    )
    assert report["extra"] == (counter.batches, counter.batches)
    assert counter.batches > 0


def test_mean_needs_no_state() -> None:
    assert RobustSGD(aggregator=Mean()).stateless
