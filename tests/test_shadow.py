"""ShadowMode under plain DDP, in real processes: it sees each rank's own gradient, changes nothing,
and names the rank that is wrong.
"""

from __future__ import annotations

import csv
import importlib.metadata
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from harness import assert_equal, fit, forked_ddp
from lightning.pytorch.strategies import DDPStrategy
from models import GAN, Manual, Plain, loader
from ports import own_port

import lightning_byz.pytorch_lightning
import lightning_byz_shadow
from lightning_byz import CoordinateMedian
from lightning_byz.lightning import ByzantineRobustStrategy, ShadowMode

HERE = Path(__file__).parent


def launch(folder: Path, *arguments: str, shadow: str | None = "1") -> str:
    """The output of ``ddp_script.py`` with the package's entry points installed."""
    site = folder / "site"
    info = site / "shadow_entry_points-0.dist-info"
    info.mkdir(parents=True)
    groups = ("lightning.pytorch", "pytorch_lightning")
    if not importlib.metadata.entry_points(
        group=f"{groups[0]}.callbacks_factory", name="lightning_byz"
    ):  # an installation from before them
        factories = zip(groups, ("lightning", "pytorch_lightning"), strict=True)
        lines = [
            f"[{group}.callbacks_factory]\nlightning_byz = lightning_byz_shadow:{name}\n"
            for group, name in factories
        ]
        (info / "entry_points.txt").write_text("".join(lines))
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: shadow-entry-points\nVersion: 0\n"
        )
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MASTER_PORT", lightning_byz_shadow.VARIABLE)
    }
    environment |= {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{site}", "OMP_NUM_THREADS": "1"}
    environment["MASTER_PORT"] = str(own_port())
    environment |= {} if shadow is None else {lightning_byz_shadow.VARIABLE: shadow}
    command = [sys.executable, str(HERE / "ddp_script.py"), str(folder), *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_entry_points_are_those_of_the_project() -> None:
    text = (HERE.parent / "pyproject.toml").read_text()
    for group, name in (
        ("lightning.pytorch", "lightning"),
        ("pytorch_lightning", "pytorch_lightning"),
    ):
        assert (
            f'[project.entry-points."{group}.callbacks_factory"]\nlightning_byz = "lightning_byz_shadow:{name}"'
            in text
        )


@pytest.mark.thorough
@pytest.mark.processes
def test_one_variable_names_the_faulty_rank(tmp_path: Path) -> None:
    output = launch(tmp_path, "--faulty", "2")
    assert output.count("Suspect: ") == 1  # one warning, of one rank, from one process
    (accusation,) = [line for line in output.splitlines() if "Suspect: " in line]
    assert f"rank 2 on host {os.uname().nodename}, device cpu" in accusation
    assert "would have dropped it in" in accusation
    assert "at most 0.01" in accusation
    assert "rank 2 on host" in next(
        line for line in output.splitlines() if line.endswith("(SUSPECT)")
    )
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = rows[-1]
    assert float(last["byz/suspicion/worker_2"]) > 1
    assert max(float(last[f"byz/suspicion/worker_{i}"]) for i in (0, 1, 3)) < 1
    assert [int(row["step"]) for row in rows[:4]] == [0, 1, 10, 11]
    shares = [
        sum(float(row[f"byz/dropped/worker_{i}"]) for row in rows) / len(rows) for i in range(4)
    ]
    assert max(range(4), key=shares.__getitem__) == 2


@pytest.mark.thorough
@pytest.mark.processes
def test_without_the_variable_there_is_no_callback(tmp_path: Path) -> None:
    output = launch(tmp_path, "--package", "pytorch_lightning", shadow=None)
    assert "Shadow mode" not in output
    assert output.count("callbacks: []") == 4


def test_the_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import lightning_byz_shadow as s, sys; assert s.lightning() == [] == "
        "s.pytorch_lightning(); assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=HERE.parent, env={"LIGHTNING_BYZ_SHADOW": "0"}
    )
    monkeypatch.setenv("LIGHTNING_BYZ_SHADOW", "1")
    (callback,) = lightning_byz_shadow.lightning()
    assert type(callback) is ShadowMode
    (callback,) = lightning_byz_shadow.pytorch_lightning()
    assert type(callback) is lightning_byz.pytorch_lightning.ShadowMode
    monkeypatch.setenv("LIGHTNING_BYZ_SHADOW", "yes")
    with pytest.raises(ValueError, match=r"should be 1 \(shadow mode\) or 0"):
        lightning_byz_shadow.lightning()


# -- what it sees ----------------------------------------------------------------------------------


class Watches(ShadowMode):
    """Keeps the rows that it compares, and gives them as long as they are: no sketch."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"every_n_steps": 2, **kwargs})
        self.rows: list[torch.Tensor] = []

    def _compare(self, trainer: Any, rows: torch.Tensor) -> None:
        self.rows.append(rows)
        super()._compare(trainer, rows)


def watched(trainer: L.Trainer, module: L.LightningModule) -> Any:
    callback = next(callback for callback in trainer.callbacks if isinstance(callback, Watches))
    return callback.rows, getattr(module, "means", [])


class Remembers(Plain):
    """What DDP has made of the gradients, and whose batches they were."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.means: list[torch.Tensor] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters()]
        self.means.append(torch.cat([p.reshape(-1) for p in parts]).clone())


@pytest.mark.processes
@pytest.mark.parametrize(
    ("model", "strategy", "trainer"),
    [
        ({}, {}, {"accumulate_grad_batches": 3}),
        ({}, {"gradient_as_bucket_view": True}, {"accumulate_grad_batches": 2}),
        ({}, {"static_graph": True}, {}),
        ({"unused": True}, {"find_unused_parameters": True}, {}),
        ({"norm": True, "dropout": 0.5}, {"bucket_cap_mb": 1e-4}, {"precision": "bf16-mixed"}),
    ],
    ids=[
        "accumulation",
        "bucket views, accumulation",
        "static graph",
        "unused parameters",
        "buckets, bf16",
    ],
)
def test_it_sees_what_ddp_averages(model: Any, strategy: Any, trainer: Any, tmp_path: Path) -> None:
    runs = []
    for callbacks in ([], [Watches()]):
        torch.manual_seed(1)
        extra = watched if callbacks else None
        runs.append(
            fit(
                tmp_path,
                Remembers(**model),
                forked_ddp(**strategy),
                devices=3,
                data=loader(8),
                callbacks=callbacks,
                extra=extra,
                **trainer,
            )
        )
    for rank in range(3):
        assert_equal(runs[0][rank], runs[1][rank])
        rows, means = runs[1][rank]["extra"]
        assert len(rows) == len(means) == runs[1][rank]["steps"]
        for row, mean in zip(rows, means, strict=True):
            torch.testing.assert_close(
                row.mean(0), mean, rtol=1e-4, atol=1e-5 if "precision" not in trainer else 1e-3
            )
            assert float(torch.pdist(row).min()) > 0  # every rank's own


@pytest.mark.processes
@pytest.mark.parametrize("module", [Manual, GAN])
def test_manual_optimization(module: Any, tmp_path: Path) -> None:
    runs = []
    for callbacks in ([], [Watches(every_n_steps=3)]):
        torch.manual_seed(1)
        extra = watched if callbacks else None
        strategy = forked_ddp(find_unused_parameters=True)
        runs.append(
            fit(
                tmp_path,
                module(),
                strategy,
                devices=3,
                data=loader(8),
                callbacks=callbacks,
                extra=extra,
            )
        )
    assert_equal(runs[0][0], runs[1][0])
    rows, _ = runs[1][0]["extra"]
    # batches 0, 1, 3, 4, ..., 9, and a GAN's two backward passes
    assert len(rows) == 7 * (2 if module is GAN else 1)
    assert all(float(torch.pdist(row).min()) > 0 for row in rows)


@pytest.mark.processes
def test_what_it_knows_survives_a_checkpoint(tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "saved.ckpt")

    def known(trainer: L.Trainer, module: L.LightningModule) -> Any:
        callback = next(
            callback for callback in trainer.callbacks if isinstance(callback, ShadowMode)
        )
        return callback.looks, callback.test.pairs.tolist(), callback.state_dict()

    seen = []
    for steps, start in ((4, None), (8, tmp_path / "saved.ckpt")):
        callbacks = [ShadowMode(every_n_steps=2), Saves()]
        kwargs = {
            "max_steps": steps,
            "max_epochs": 9,
            "ckpt_path": start,
            "callbacks": callbacks,
            "extra": known,
        }
        seen.append(
            [
                report["extra"]
                for report in fit(
                    tmp_path / "run", Plain(), forked_ddp(), devices=3, data=loader(8), **kwargs
                )
            ]
        )
    assert [rank[:2] for rank in seen[0]] == [(4, [2, 2, 2])] * 3
    assert [rank[:2] for rank in seen[1]] == [(8, [4, 4, 4])] * 3
    assert torch.equal(seen[1][0][2]["test"]["wealth"], seen[1][2][2]["test"]["wealth"])


class Wrong(Plain):
    """Rank 1's loss is a thousand times too large, or not finite."""

    factor = 65536.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (
            self.factor if self.global_rank == 1 else 1.0
        )


def told(trainer: L.Trainer, module: L.LightningModule) -> Any:
    callback = next(callback for callback in trainer.callbacks if isinstance(callback, ShadowMode))
    return [
        (suspect.worker, suspect.rank, suspect.step, suspect.reason)
        for suspect in callback.on_suspect.__self__
    ]


@pytest.mark.processes
def test_gross_faults_are_found_at_once(tmp_path: Path) -> None:
    suspects: list[Any] = []
    callbacks = [ShadowMode(on_suspect=suspects.append)]
    reports = fit(
        tmp_path,
        Wrong(lr=0.0),
        forked_ddp(),
        devices=4,
        data=loader(8),
        callbacks=callbacks,
        extra=told,
        max_steps=4,
    )
    assert [report["extra"] for report in reports[1:]] == [[]] * 3  # rank 0 tells
    ((worker, rank, step, reason),) = reports[0]["extra"]
    assert (worker, rank, step) == (1, 1, 1)
    assert "not finite, or more than 100 times as long" in reason


@pytest.mark.processes
def test_who_spreads_nan_is_named_before_all_have_it(tmp_path: Path) -> None:
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger("lightning.pytorch.lightning_byz").addHandler(handler)
    model = Wrong()
    model.factor = float("nan")
    fit(
        tmp_path / "run",
        model,
        forked_ddp(),
        devices=4,
        data=loader(8),
        callbacks=[ShadowMode()],
        max_steps=6,
    )
    logging.getLogger("lightning.pytorch.lightning_byz").removeHandler(handler)
    assert (tmp_path / "log").read_text().count("Step 0: the gradient of rank 1 on host") == 1


# -- where it cannot look --------------------------------------------------------------------------


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="should be a rule with weights"):
        ShadowMode(aggregator=CoordinateMedian())
    with pytest.raises(ValueError, match="`every_n_steps` should be at least 2"):
        ShadowMode(every_n_steps=1)
    with pytest.raises(
        ValueError,
        match=r"watches the ranks of Trainer\(strategy='ddp'\). Found SingleDeviceStrategy",
    ):
        fit(tmp_path, Plain(), "auto", callbacks=[ShadowMode()])
    with pytest.raises(ValueError, match="Found ByzantineRobustStrategy"):
        fit(
            tmp_path,
            Plain(),
            ByzantineRobustStrategy(workers_per_process=4),
            callbacks=[ShadowMode()],
        )
    # as the variable loads it: it must not stop anybody's run
    fit(tmp_path, Plain(), "auto", callbacks=[ShadowMode(strict=False)])


@pytest.mark.processes
def test_two_ranks_cannot_outvote_each_other(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="takes three ranks or more. Found 2"):
        fit(
            tmp_path,
            Plain(),
            DDPStrategy(start_method="fork"),
            devices=2,
            data=loader(8),
            callbacks=[ShadowMode()],
        )
