"""Where a grid's cells run: on SLURM and on Ray the same as here, and what is missing is said."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from test_grids import DIES, grid_file, rows
from test_launchers import environment, run_on_ray

from lightning_byz import cli
from lightning_byz.cli import grid_cells
from lightning_byz.cli.grid_file import Grid, GridError
from lightning_byz.cli.launchers import LAUNCHERS, RayLauncher, SlurmLauncher

ROOT = Path(__file__).parents[1]


def needs(module: str, extra: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None,
        reason=f"needs {module}: pip install 'lightning-byz[{extra}]'",
    )


has_submitit, has_ray = needs("submitit", "slurm"), needs("ray", "ray")

# What SLURM's commands do, as far as a grid needs them, on one machine. Jobs are processes, and
# files in $QUEUE are the queue.
SBATCH = """#!{python}
import os, re, subprocess, sys
script = sys.argv[1]
text = open(script).read()
if "refused" in text:
    sys.exit("sbatch: error: invalid partition")
last = int(re.search(r"--array=0-(\\d+)", text)[1])
error = re.search(r"--error=(\\S+)", text)[1]
for i in range(last + 1):
    job = {{**os.environ, "SLURM_JOB_ID": "7" + str(i), "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(i),
            "SLURM_JOB_NAME": "grid", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0",
            "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "localhost"}}
    entry = os.path.join(os.environ["QUEUE"], "7_" + str(i))
    open(entry, "w").close()
    said = open(error.replace("%A", "7").replace("%a", str(i)).replace("%t", "0"), "w")
    subprocess.Popen(["bash", "-c", 'bash "$1"; rm "$2"', "job", script, entry], env=job, stdout=said, stderr=said)
print("Submitted batch job 7")
"""
SQUEUE = """#!/bin/bash
ls "$QUEUE"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of commands that stand in for SLURM's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "queue").mkdir()
    for name, text in (
        ("sbatch", SBATCH.format(python=sys.executable)),
        ("squeue", SQUEUE),
        ("srun", "#!/bin/false\n"),
        ("scancel", '#!/bin/bash\necho "$@" > "$QUEUE/../cancelled"\n'),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(tmp_path / "queue"))
    return folder


def of_three_kinds(folder: Path, **more: Any) -> Path:
    """A grid file with a cell that trains, one that kills its process, and one that cannot run."""
    (folder / "deadly.py").write_text(DIES)
    path = grid_file(
        folder, rules=["CoordinateMedian", "deadly.Dies()", "Bulyan"], attacks=["none"]
    )
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **more}))
    return path


def check_three_kinds(path: Path, output: Path) -> Mapping[str, str]:
    """The line of the cell whose process died."""
    table = {row["rule"]: row for row in rows(output / "results.csv")}
    assert [table[rule]["status"] for rule in ("CoordinateMedian", "deadly.Dies()", "Bulyan")] == [
        "finished",
        "failed",
        "failed",
    ]
    assert "Bulyan with f=2 cannot take n=7 rows" in table["Bulyan"]["reason"]
    log = (output / "log.txt").read_text()
    assert "Traceback" in log
    assert "Bulyan with f=2" in log
    grid = Grid.read(path)
    cell = next(cell for cell in grid.cells() if cell.rule == "CoordinateMedian")
    here = grid_cells.run(grid.config(cell), grid.metric)["curve"]
    there = [p for p in rows(output / "curves.csv") if p["rule"] == "CoordinateMedian"]
    assert [float(point["accuracy"]) for point in there] == here["accuracy"]
    return table["deadly.Dies()"]


# -- SLURM -----------------------------------------------------------------------------------------


@has_submitit
@pytest.mark.thorough
@pytest.mark.processes
def test_cells_as_jobs_of_slurm_are_as_here(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By submitit's own job script, with commands that stand in for SLURM's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(SlurmLauncher, "patience", 1.0)
    monkeypatch.setattr(SlurmLauncher, "pause", 0.2)
    path = of_three_kinds(tmp_path, slurm={"cpus_per_task": 1})
    command = ["grid", str(path), "--launcher", "slurm", "--jobs", "2", "--output", "out"]
    assert cli.main(command) == 1
    died = check_three_kinds(path, tmp_path / "out")
    assert "its job 7_1 ended without a result" in died["reason"]
    (script,) = (tmp_path / "out" / "slurm").glob("*/7_submission.sh")
    for line in ("--array=0-2%2", "--cpus-per-task=1", "--time=60", "--job-name=small"):
        assert line in script.read_text()


@has_submitit
@pytest.mark.thorough
@pytest.mark.processes
@pytest.mark.skipif(
    shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None,
    reason="needs SLURM: apt-get install slurm-wlm munge",
)
def test_cells_on_two_nodes_of_slurm(tmp_path: Path) -> None:
    path = of_three_kinds(tmp_path)
    command = [sys.executable, "-m", "lightning_byz.cli", "grid", path, "--launcher", "slurm"]
    done = subprocess.run(
        ["bash", ROOT / "tools" / "local_slurm.sh", *command, "--output", tmp_path / "out"],
        cwd=tmp_path,
        env={**environment(), "CPUS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ended without a result" in check_three_kinds(path, tmp_path / "out")["reason"]


class Job:
    """A job as submitit knows it, which said something, and may have a result."""

    def __init__(self, folder: Path, job_id: str, result: Any = None) -> None:
        self.job_id, self._result = job_id, result
        self.paths = SimpleNamespace(result_pickle=folder / job_id, stderr=f"{job_id}.err")
        if result is not None:
            self.paths.result_pickle.touch()

    def exception(self) -> None:
        return None

    def result(self) -> Any:
        return self._result

    def stderr(self) -> str:
        return "started\nKilled\n"


@has_submitit
def test_a_job_that_is_gone_has_failed_and_those_that_are_left_are_cancelled(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid.read(grid_file(tmp_path))
    launcher = SlurmLauncher(grid, tmp_path / "out", None)
    assert launcher.where == "as many at a time as there is room for, as jobs of SLURM"
    jobs = [
        Job(tmp_path, "5_0", ({"status": "finished"}, "hello\n")),
        Job(tmp_path, "5_1"),
        Job(tmp_path, "5_2"),
    ]
    (tmp_path / "queue" / "5_2").touch()
    monkeypatch.setattr(SlurmLauncher, "patience", 0.0)
    monkeypatch.setattr(SlurmLauncher, "pause", 0.0)
    launcher._executor = SimpleNamespace(map_array=lambda *_: jobs)
    results = launcher.results([("a", {}), ("b", {}), ("c", {})])
    assert next(results) == ("a", {"status": "finished"})
    assert (tmp_path / "out" / "log.txt").read_text() == "hello\n"
    name, died = next(results)
    assert (name, died["status"]) == ("b", "failed")
    assert died["reason"] == "its job 5_1 ended without a result: Killed (5_1.err)"
    results.close()
    assert (tmp_path / "cancelled").read_text() == "5_2\n"
    assert list(launcher.results([])) == []


@has_submitit
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"partitio": "x"},
            r"`slurm` in the grid file: Unavailable parameter\(s\): \['partitio'\]",
        ),
        ({"partition": "refused"}, "SLURM has not taken the jobs. It said: .*invalid partition"),
    ],
)
def test_what_slurm_does_not_take_is_said(
    slurm: Path, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    path = of_three_kinds(tmp_path, slurm=options)

    def launch() -> None:
        launcher = SlurmLauncher(Grid.read(path), tmp_path / "out", None)
        list(launcher.results([("a", {}), ("b", {})]))

    with pytest.raises(GridError, match=message):
        launch()


@has_submitit
def test_without_slurms_commands_an_error_says_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = grid_file(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["grid", str(path), "--launcher", "slurm", "--output", str(tmp_path)]) == 2
    assert "Not found: sbatch, squeue, srun. Log in to a host" in capsys.readouterr().err


# -- Ray -------------------------------------------------------------------------------------------


@has_ray
@pytest.mark.thorough
@pytest.mark.processes
def test_cells_as_tasks_of_ray_are_as_here(tmp_path: Path) -> None:
    path = of_three_kinds(tmp_path, ray={"num_cpus": 0.5})
    command = ["-m", "lightning_byz.cli", "grid", path, "--launcher=ray", "--output=out"]
    run_on_ray(*command, folder=tmp_path, status=1)
    assert "WorkerCrashedError" in check_three_kinds(path, tmp_path / "out")["reason"]


@has_ray
def test_what_ray_does_not_take_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(GridError, match="`ray` in the grid file: Invalid option keyword num_cpu "):
        RayLauncher(Grid.read(of_three_kinds(tmp_path, ray={"num_cpu": 1})), tmp_path, None)
    grid = Grid.read(of_three_kinds(tmp_path, ray={"num_gpus": 2}))
    launcher = RayLauncher(grid, tmp_path, 3)
    assert launcher.where == "3 at a time, as tasks of Ray"
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}]
    with caplog.at_level(logging.WARNING, "lightning_byz"):
        launcher._warn_if_no_node_suffices(
            [*nodes, {"Alive": True, "Resources": {"CPU": 4, "GPU": 2}}]
        )
        assert caplog.text == ""
        launcher._warn_if_no_node_suffices(
            [*nodes, {"Alive": False, "Resources": {"CPU": 4, "GPU": 2}}]
        )
    assert "Found {'CPU': 8.0, 'GPU': 1.0}. The cells wait" in caplog.text


# -- either ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "module", "extra"), [("slurm", "submitit", "slurm"), ("ray", "ray", "ray")]
)
def test_an_extra_that_is_absent_is_named(
    launcher: str,
    module: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == module else real(name, *a)
    )
    path = grid_file(tmp_path)
    assert cli.main(["grid", str(path), "--launcher", launcher, "--output", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"lightning-byz grid --launcher {launcher} needs the Python modules {module}." in said
    assert f"pip install 'lightning-byz[{extra}]'" in said


def test_the_command_line_knows_every_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["grid", "x.yaml", "--launcher", "moon"])
    offered = capsys.readouterr().err.partition("choose from ")[2]
    assert re.findall(r"\w+", offered) == list(LAUNCHERS)
