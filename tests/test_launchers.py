"""Every way of starting a run: popen, spawn, fork, torchrun, both Lightning packages in either
import order.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ports import own_port

pytestmark = pytest.mark.processes
SCRIPT = str(Path(__file__).with_name("script.py"))


def environment() -> dict[str, str]:
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
    }
    return {**clean, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(own_port())}


def run_on_ray(*command: object, folder: Path, status: int = 0) -> str:
    """What a program says that starts a Ray cluster on this machine, however busy that is."""
    patient = {
        "RAY_raylet_start_wait_time_s": "400",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "400",
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**environment(), "RAY_USAGE_STATS_ENABLED": "0", **patient},
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == status, said
    return said


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def assert_ranks_agree(folder: Path, ranks: int) -> None:
    reports = [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]
    assert not torch.equal(reports[0]["weights"]["layer.weight"], torch.zeros(3, 10))
    for report in reports[1:]:
        assert all(torch.equal(v, report["weights"][k]) for k, v in reports[0]["weights"].items())
        assert report["metrics"] == reports[0]["metrics"]


@pytest.mark.thorough
@pytest.mark.parametrize("first", ["package", "lightning_byz"])
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_the_strategy_name_works_in_both_packages_and_import_orders(
    package: str, first: str, tmp_path: Path
) -> None:
    """With both packages installed, through the popen launcher."""
    done = run(
        sys.executable,
        SCRIPT,
        str(tmp_path),
        "--package",
        package,
        "--first",
        first,
        "--devices",
        "3",
    )
    assert f"strategy: lightning_byz.{package.partition('.')[0]} " in done.stdout
    if first == "package":
        assert f"home: lightning_byz.{package.partition('.')[0]}" in done.stdout
    assert_ranks_agree(tmp_path, 3)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", ["byz_ef21_sgdm", "dstar", "byz_vr_marina_pp", "signsgd_majority_vote"]
)
def test_the_four_systems_train_by_their_names_alone(name: str, tmp_path: Path) -> None:
    """``Trainer(strategy=NAME, devices=4)``, and the run goes through a checkpoint."""
    run(sys.executable, SCRIPT, str(tmp_path), "--strategy", name, "--devices", "4")
    assert_ranks_agree(tmp_path, 4)
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)["lightning_byz"]
    assert saved["n"] == 4
    assert saved["algorithm"].lower().startswith(name.replace("_", ""))


@pytest.mark.thorough
@pytest.mark.parametrize("hidden", ["lightning", "pytorch_lightning"])
def test_one_package_alone(hidden: str) -> None:
    """As if the other one were not installed."""
    shown = {"lightning": "pytorch_lightning", "pytorch_lightning": "lightning"}[hidden]
    code = f"""
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.partition(".")[0] == {hidden!r} else real(name, *a)
import lightning_byz
assert lightning_byz.ByzantineRobustStrategy.__module__ == "lightning_byz.{shown}"
assert lightning_byz.ByzantineWorkers.__module__ == "lightning_byz.{shown}"
assert {hidden!r} not in sys.modules
from {shown + ".pytorch" if shown == "lightning" else shown}.strategies import StrategyRegistry
assert "byzantine_robust" in StrategyRegistry
"""
    run(sys.executable, "-c", code)


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_start_methods(method: str, tmp_path: Path) -> None:
    run(sys.executable, SCRIPT, str(tmp_path), "--start-method", method, "--devices", "3")
    assert_ranks_agree(tmp_path, 3)


@pytest.mark.thorough
def test_torchrun(tmp_path: Path) -> None:
    run(
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=4",
            f"--master_port={own_port()}",
        ),
        *(SCRIPT, str(tmp_path), "--devices", "4"),
    )
    assert_ranks_agree(tmp_path, 4)


@pytest.mark.thorough
def test_two_nodes(tmp_path: Path) -> None:
    """Two launches of the script, as on two machines, with two ranks each."""
    shared = {**environment(), "MASTER_ADDR": "127.0.0.1"}
    nodes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(tmp_path), "--devices", "2", "--num-nodes", "2"],
            env={**shared, "NODE_RANK": str(node)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    for node in nodes:
        output, _ = node.communicate(timeout=500)
        assert node.returncode == 0, output
    assert_ranks_agree(tmp_path, 4)


@pytest.mark.thorough
def test_a_checkpoint_that_one_rank_alone_asks_for_starts_no_collective(tmp_path: Path) -> None:
    """Rank 0 fails and saves on its way out, while the others wait in the next step's
    collective.
    """
    done = run(sys.executable, SCRIPT, str(tmp_path), "--fail-rank", "0", check=False)
    assert done.returncode != 0
    assert "planted" in done.stderr
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)["lightning_byz"]
    assert list(saved["workers"][0]) == [0]
    assert list(saved["rng"]) == [0]


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 1])
def test_a_guarded_save_on_one_rank_does_not_hang_the_run(rank: int, tmp_path: Path) -> None:
    """``if trainer.is_global_zero: trainer.save_checkpoint(...)`` would leave DDP's ranks waiting
    for one another.
    """
    done = run(sys.executable, SCRIPT, str(tmp_path), "--saves-alone", str(rank), "--devices", "3")
    assert f"Rank {rank} saves" in done.stderr
    assert_ranks_agree(tmp_path, 3)
    assert (tmp_path / "alone.ckpt").exists() == (rank == 0)
    if rank == 0:
        assert list(
            torch.load(tmp_path / "alone.ckpt", weights_only=True)["lightning_byz"]["rng"]
        ) == [0]
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)["lightning_byz"]
    assert sorted(saved["rng"]) == sorted(saved["workers"][0]) == [0, 1, 2]
