"""Processes that somebody else has started: mpirun, SLURM, Kubernetes; and what is said where they
do not fit together. Ray is in test_ray.py, torchrun in test_launchers.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from harness import QUIET
from models import Plain, loader
from ports import own_port
from test_launchers import SCRIPT, assert_ranks_agree, environment
from test_worker_state import Theirs
from torch.multiprocessing import start_processes

from lightning_byz.lightning import ByzantineRobustStrategy
from lightning_byz.strategies.validate import UnsupportedSetupError
from lightning_byz.transports.meeting import RankLostError

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[1]


def train(rank: int, size: int, port: int) -> None:
    """In a process that is told a rank and a size."""
    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patched.setenv("MASTER_PORT", str(port))
        L.Trainer(
            **QUIET,
            devices=1,
            strategy=ByzantineRobustStrategy(timeout=timedelta(seconds=2)),
            num_nodes=size,
            plugins=[Theirs(rank, size, local_rank=0)],
        ).fit(Plain(), loader(8))


def comes_alone(index: int, ranks: list[int], ports: list[int]) -> None:
    with pytest.raises(RankLostError) as error:
        train(ranks[index], 2, ports[index])
    for part in ("All 2 processes", "on 2 node(s)", "127.0.0.1", f"Rank {ranks[index]} has not"):
        assert part in str(error.value)


def test_a_node_that_never_comes_is_an_error_that_says_what_to_do() -> None:
    ports = [own_port(), own_port()]
    start_processes(comes_alone, args=([0, 1], ports), nprocs=2, start_method="fork")


def has_another_rank(index: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=index, world_size=2
    )
    with pytest.raises(
        UnsupportedSetupError, match=f"Found {1 - index} by Theirs and {index} in the group"
    ):
        train(1 - index, 2, own_port())


def test_ranks_that_are_not_those_of_the_group_are_an_error(tmp_path: Path) -> None:
    start_processes(has_another_rank, args=(tmp_path,), nprocs=2, start_method="fork")


@pytest.mark.thorough
@pytest.mark.skipif(
    shutil.which("mpirun") is None or importlib.util.find_spec("mpi4py") is None,
    reason="needs MPI: apt-get install openmpi-bin libopenmpi-dev; pip install mpi4py",
)
def test_mpirun(tmp_path: Path) -> None:
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "3", sys.executable]
    done = subprocess.run(
        [*command, SCRIPT, str(tmp_path), "--devices", "3"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_ranks_agree(tmp_path, 3)


@pytest.mark.thorough
@pytest.mark.skipif(
    shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None,
    reason="needs SLURM: apt-get install slurm-wlm munge",
)
def test_two_nodes_of_slurm(tmp_path: Path) -> None:
    """The command of docs/guides/clusters.md, for one epoch."""
    page = (ROOT / "docs" / "guides" / "clusters.md").read_text()
    (command,) = re.findall(r"^bash (tools/local_slurm.sh .*)$", page, re.MULTILINE)
    for folder in ("tools", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", *command.split(), "--fast"],
        cwd=tmp_path,
        env={**environment(), "PATH": path},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    output = (tmp_path / "slurm-1.out").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + output
    for said in ("tolerating f=", "of held-out digits"):  # by rank 0 alone
        assert output.count(said) == 1
    assert {f"[rank: {rank}] Seed set to 0" for rank in range(4)} <= set(output.splitlines())
