"""Every example runs, and says what it should: on tiny files in the real sets' formats, for a few
steps.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ports import own_port
from test_data_sets import cifar10
from test_launchers import environment

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(*command, cwd, env=None):
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=env or environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tiny_a9a(folder):
    for name in ("a9a", "a9a.t"):
        (folder / name).write_text(
            "".join(f"{'+1' if i % 3 else '-1'} {1 + i % 9}:1 123:1\n" for i in range(60))
        )


IN_ONE_PROCESS = {
    "custom_rule": ([], r"SoftKrum: [\d.]+% of held-out digits"),
    "custom_attack": ([], r"mean: [\d.]+% of held-out digits(.|\n)*worker momentum: [\d.]+%"),
    "libsvm_logistic_regression": (
        ["--data", ".", "--fast"],
        r"Byz-EF21-SGDM, Top-12: [\d.]+% of the held-out rows, 96 bytes",
    ),
    "cifar10_resnet": (["--data", ".", "--fast"], r"[\d.]+% of the test images"),
    "transformer_text": (
        ["--fast"],
        r"all sound: [4-8]\.\d\d bits(.|\n)*byzantine_robust, one broken: [4-8]\.\d\d bits",
    ),
}
RUN_ALL = (
    "import json, runpy, sys\nfor sys.argv in json.loads(sys.argv[1]):\n    "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_the_examples_of_one_process_run(tmp_path):
    """All of them in the same one: importing torch and Lightning takes longer than their few
    steps.
    """
    list(cifar10(tmp_path, each=100))
    tiny_a9a(tmp_path)
    for name in IN_ONE_PROCESS:
        source = re.sub(
            r"epochs: int = \d+\) -> None",
            "epochs: int = 1) -> None",
            (EXAMPLES / f"{name}.py").read_text(),
        )
        (tmp_path / f"{name}.py").write_text(source)
    arguments = [[f"{name}.py", *options] for name, (options, _) in IN_ONE_PROCESS.items()]
    output = run(sys.executable, "-c", RUN_ALL, json.dumps(arguments), cwd=tmp_path)
    for name, (_, says) in IN_ONE_PROCESS.items():
        assert re.search(says, output), f"{name} should print {says}"


@pytest.mark.thorough
@pytest.mark.processes
def test_the_gan_runs(tmp_path):
    output = run(
        sys.executable, EXAMPLES / "gan_two_optimizers.py", "--devices=3", "--fast", cwd=tmp_path
    )
    assert re.search(r"\d of 8 points found; \d+% of what it makes", output)


@pytest.mark.thorough(keep=1)
@pytest.mark.processes
def test_the_sharded_transformer_runs(tmp_path):
    output = run(sys.executable, EXAMPLES / "sharded_transformer.py", "--fast", cwd=tmp_path)
    assert "rank 0 holds 60,352 of 120,704 parameters" in output
    assert re.search(r"3 workers: [4-8]\.\d\d bits a character", output)


def test_every_example_is_tested():
    elsewhere = {
        "quickstart",
        "retrofit_ddp",
        "gan_two_optimizers",
        "ray_train",
        "sharded_transformer",
    }  # test_demo.py; by the launchers of multi_node; above; test_ray.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*IN_ONE_PROCESS} | elsewhere
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir()} == {
        "multi_node",
        "wandb_sweep",
    }


def test_the_retrofit_is_the_diff_that_it_says():
    source = (EXAMPLES / "retrofit_ddp.py").read_text()
    lines = [
        line
        for line in source.splitlines()
        if "lightning_byz" in line or "byzantine_robust" in line
    ]
    code = [line for line in lines if line.startswith("import") or "add_argument" in line]
    assert len(code) == 2, (
        "besides its docstring, the example should name this package in the import and the "
        "strategy alone"
    )


# -- multi_node ------------------------------------------------------------------------------------


def commands(page):
    """The commands in the fenced blocks of a page, with continued lines joined."""
    blocks = re.findall(r"```\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def small(command):
    """The same command for half as many processes and one epoch, with this interpreter, on this
    machine.
    """
    command = (
        command.replace("=4", "=2")
        .replace("29500", "$MASTER_PORT")
        .replace("examples/", f"{EXAMPLES}/")
        + " --fast"
    )
    return re.sub("^torchrun", "python -m torch.distributed.run", command).replace(
        "python", sys.executable, 1
    )


@pytest.mark.thorough
@pytest.mark.processes
def test_the_commands_for_two_machines(tmp_path):
    """torchrun's; the one without a launcher starts the same script with the same options (and
    test_launchers.py has such a run).
    """
    launchers = commands(EXAMPLES / "multi_node" / "README.md")
    (command,) = (command for command in launchers if command.startswith("torchrun"))
    (plain,) = (command for command in launchers if command.startswith("python"))
    assert plain.split()[1:] == command.split()[-4:]
    shared = {**environment(), "MASTER_ADDR": "127.0.0.1"}
    nodes = [
        subprocess.Popen(["bash", "-c", f"exec {small(command)}"], cwd=tmp_path, env={**shared, "NODE_RANK": str(node)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for node in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=500)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert "byzantine_robust: " in outputs[0]
    assert "byzantine_robust: " not in outputs[1]


@pytest.mark.thorough
@pytest.mark.processes
def test_the_manifest_for_kubernetes(tmp_path):
    """Its command in every pod, with the variables that the training operator sets."""
    job = yaml.safe_load((EXAMPLES / "multi_node" / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    pods = [
        replicas[kind] for kind in ("Master", "Worker") for _ in range(replicas[kind]["replicas"])
    ]
    shared = {**environment(), "MASTER_ADDR": "localhost", "WORLD_SIZE": str(len(pods))}
    started = []
    for rank, pod in enumerate(pods):
        (container,) = pod["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        *shell, command = container["command"]
        started.append(
            subprocess.Popen(
                [*shell, small(command)], cwd=tmp_path, env={**shared, "RANK": str(rank)}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    outputs = [process.communicate(timeout=500)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    assert ["byzantine_robust: " in output for output in outputs] == [True, False]


SRUN = """#!/bin/bash
# What SLURM's srun does, on one machine: the command once for every task, each with its rank.
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$@" & tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit 1; done
"""


@pytest.mark.thorough
@pytest.mark.processes
def test_the_slurm_script(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    slurm = {
        "SLURM_JOB_ID": str(own_port()), "SLURM_JOB_NAME": "byzantine-robust", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "3",
        "SLURM_NTASKS_PER_NODE": "3", "SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = EXAMPLES / "multi_node" / "train.sbatch"
    output = run(
        "bash",
        script,
        "--fast",
        "--faulty-rank=2",
        cwd=tmp_path,
        env={**environment(), **slurm, "PATH": path},
    )
    assert output.count("byzantine_robust: ") == 1


# -- wandb_sweep -----------------------------------------------------------------------------------


@pytest.mark.thorough
def test_the_sweep(tmp_path):
    """The first and the last run of the sweep, as wandb's agent would start them, and the command
    of its page; without a network.
    """
    sweep = yaml.safe_load((ROOT / "configs" / "wandb_sweep.yaml").read_text())
    assert sweep["method"] == "grid"
    (alone,) = (
        command
        for command in commands(EXAMPLES / "wandb_sweep" / "README.md")
        if "WANDB_MODE" in command
    )
    mode, *alone = shlex.split(alone)
    assert mode == "WANDB_MODE=offline"
    runs = [alone]
    for end in (0, -1):
        options = [
            f"--{name}={choice['values'][end]}" for name, choice in sweep["parameters"].items()
        ]
        fill = {"${program}": [sweep["program"]], "${args}": options}
        runs.append([part for piece in sweep["command"] for part in fill.get(piece, [piece])])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    limits = [
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=2",
        "--trainer.log_every_n_steps=1",
    ]
    assert {command[0] for command in runs} == {"lightning-byz"}
    code = (
        "import json, sys, wandb\nfrom lightning_byz import cli\n"
        "for run in json.loads(sys.argv[1]):\n    assert cli.main(run[1:]) == 0\n    wandb.finish()"
    )
    offline = {**environment(), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    run(
        sys.executable,
        "-c",
        code,
        json.dumps([command + limits for command in runs]),
        cwd=tmp_path,
        env=offline,
    )
    assert len(list(tmp_path.glob("outputs/wandb/offline-run-*/*.wandb"))) == 3


# -- pages -----------------------------------------------------------------------------------------


def test_the_page_on_custom_rules_is_right():
    from dataclasses import dataclass

    from lightning_byz.aggregators import Aksel, WeightedAggregator
    from lightning_byz.aggregators.base import equal_weights
    from lightning_byz.numerics.order_statistics import median_of_rows
    from lightning_byz.testing import check_aggregator

    page = (ROOT / "docs" / "custom-rule.md").read_text()
    code = page[page.index("```python\n@dataclass") + 10 : page.index("```\n\n`Rows`")]
    names = {
        "dataclass": dataclass,
        "WeightedAggregator": WeightedAggregator,
        "equal_weights": equal_weights,
        "median_of_rows": median_of_rows,
    }
    exec(code, names)
    check_aggregator(names["NearestToMedian"]())
    check_aggregator(Aksel())
