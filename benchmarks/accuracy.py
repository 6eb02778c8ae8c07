"""The accuracy table: plain DDP and averaging against byzantine_robust, under every attack, on CPU
ranks and in-process workers.

    python benchmarks/accuracy.py --data DIR [--only resnet18|a9a] [--setup ranks|in-process]
    [--output runs/accuracy]

DIR holds libsvm/a9a.bz2, libsvm/a9a.t.bz2 and FashionMNIST/raw. Every run is a program of its own,
so that the ranks are launched as they are for a user. Interrupted, the same command goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _runs import Run, a9a, machine, markdown, mean_by, run_all
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_byz.strategies.resolve import DEFAULT_ALGORITHM


class Setting(NamedTuple):
    """How a task is trained in a setup."""

    batch: int  # of one worker
    steps: int
    optimizer: str
    rate: float
    seeds: int


SETUPS = {"ranks": (4, 1), "in-process": (20, 6)}  # workers, liars
SETTINGS = {
    ("a9a", "ranks"): Setting(64, 300, "SGD(momentum=0.9)", 0.1, 1),
    ("a9a", "in-process"): Setting(32, 300, "SGD(momentum=0.9)", 0.1, 1),
    ("resnet18", "ranks"): Setting(64, 60, "SGD(momentum=0.9)", 0.03, 1),
    ("resnet18", "in-process"): Setting(64, 50, "SGD(momentum=0.9)", 0.03, 1),
}
OPTIMIZERS = {"SGD(momentum=0.9)": partial(torch.optim.SGD, momentum=0.9)}
BREAKING = ("SignFlip(10)", "Gaussian(300)")  # those that averaging is shown
ATTACKS = (
    "SignFlip(1)",
    "SignFlip(10)",
    "IPM(0.1)",
    "ALIE(1.5)",
    "Gaussian(300)",
    "NotANumber",
    "LabelFlip",
)
GARBAGE = "garbage images"  # worker 0 trains on noise; images only
SAME = {"SignFlip(10)": "SignFlip(10) = IPM(10)"}


def all_runs(tasks: list[str], setups: list[str]) -> list[Run]:
    """Clean runs first, then the attacks, all with the first seed before any with the second."""
    runs = []
    for seed in range(max(setting.seeds for setting in SETTINGS.values())):
        for task in tasks:
            for setup in setups:
                if seed >= SETTINGS[task, setup].seeds:
                    continue
                garbage = (GARBAGE,) if (task, setup) == ("resnet18", "ranks") else ()
                wanted = [("ddp" if setup == "ranks" else "averaging", "none"), ("robust", "none")]
                wanted += [("averaging", attack) for attack in BREAKING]
                wanted += [("robust", attack) for attack in (*garbage, *ATTACKS)]
                for strategy, attack in wanted:
                    run = {
                        "task": task,
                        "setup": setup,
                        "strategy": strategy,
                        "attack": attack,
                        "seed": seed,
                    }
                    run["trained"] = "batch {}, {} steps, {}, lr {}".format(*SETTINGS[task, setup])
                    runs.append(
                        run
                        | ({"algorithm": repr(DEFAULT_ALGORITHM)} if strategy == "robust" else {})
                    )
    return runs


# -- one run: the part that Lightning sees ---------------------------------------------------------


def datasets(task: str, data: str) -> tuple[TensorDataset, TensorDataset]:
    if task == "a9a":
        x, y, x_test, y_test = a9a(data)
        return TensorDataset(x, y), TensorDataset(x_test, y_test)
    from torchvision.datasets import FashionMNIST

    parts = [FashionMNIST(data, train=train) for train in (True, False)]
    train, test = (
        TensorDataset((part.data[:, None] / 255 - 0.286) / 0.353, part.targets) for part in parts
    )
    return train, test


def network(task: str) -> nn.Module:
    if task == "a9a":
        return nn.Linear(123, 2)
    from torchvision.models import resnet18

    return nn.Sequential(Repeat(), resnet18(num_classes=10))


class Repeat(nn.Module):
    """One channel to three."""

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)


def train(run: Run, data: str) -> Run:
    """The test accuracy, in percent, at the end of one run; called in every rank."""
    import lightning

    import lightning_byz as byz
    from lightning_byz.attacks import DataAttack

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    setting, (n, f) = SETTINGS[run["task"], run["setup"]], SETUPS[run["setup"]]

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(run["task"])

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            x, y = batch
            return functional.cross_entropy(self.net(x), y)

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            x, y = batch
            self.log("accuracy", 100 * (self.net(x).argmax(1) == y).float().mean(), sync_dist=True)

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = OPTIMIZERS[setting.optimizer](self.parameters(), lr=setting.rate)
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, setting.rate, setting.steps, cycle_momentum=False
            )
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    @dataclass(frozen=True)
    class Garbage(DataAttack):
        def __call__(self, batch: Any, generator: Any = None) -> Any:
            return [100 * torch.randn_like(batch[0]), batch[1]]

    lightning.seed_everything(run["seed"], verbose=False)
    attacks = {
        "SignFlip(1)": byz.SignFlip(1.0),
        "SignFlip(10)": byz.SignFlip(10.0),
        "IPM(0.1)": byz.IPM(0.1),
        "ALIE(1.5)": byz.ALIE(z=1.5),
        "Gaussian(300)": byz.Gaussian(std=300.0),
        "NotANumber": byz.NotANumber(),
        "LabelFlip": byz.LabelFlip(2 if run["task"] == "a9a" else 10),
        GARBAGE: Garbage(),
    }
    callbacks = []
    if run["attack"] != "none":
        who = [0] if run["attack"] == GARBAGE else range(n - f, n)
        callbacks.append(
            byz.ByzantineWorkers(attacks[run["attack"]], workers=who, every_n_steps=10**9)
        )
    per_process = 1 if run["setup"] == "ranks" else n
    strategies = {
        "ddp": lambda: "ddp",
        "averaging": lambda: byz.ByzantineRobustStrategy(
            byz.RobustSGD(aggregator=byz.Mean()), workers_per_process=per_process
        ),
        "robust": lambda: byz.ByzantineRobustStrategy(
            workers_per_process=per_process, num_byzantine=f
        ),
    }
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=n // per_process,
        strategy=strategies[run["strategy"]](),
        max_steps=setting.steps,
        callbacks=callbacks,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    training, test = datasets(run["task"], data)
    module, start = Classifier(), time.monotonic()
    reason = ""
    try:
        trainer.fit(
            module,
            DataLoader(
                training, batch_size=setting.batch * per_process, shuffle=True, drop_last=True
            ),
        )
    except RuntimeError as error:
        # averaging under attack may end in nan, and byzantine_robust then stops
        if "finite gradients" not in str(error):
            raise
        reason = "stopped: no finite gradients"
    seconds = time.monotonic() - start
    trainer.limit_val_batches = 1.0
    metrics = trainer.validate(module, DataLoader(test, batch_size=500), verbose=False)[0]
    return {"accuracy": metrics["accuracy"], "seconds": round(seconds, 1), "note": reason}


# -- all runs --------------------------------------------------------------------------------------


def launch(run: Run, data: str) -> Run:
    """One run, as a program of its own."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        result = Path(folder) / "result.json"
        command = [
            sys.executable,
            __file__,
            "--data",
            data,
            "--run",
            json.dumps(run),
            "--result",
            str(result),
        ]
        threads = "1" if run["setup"] == "ranks" else os.environ.get("OMP_NUM_THREADS", "2")
        environment = {**os.environ, "MASTER_PORT": str(port), "OMP_NUM_THREADS": threads}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not result.exists():
            raise RuntimeError(f"{run} ended with code {done.returncode}:\n{done.stderr[-4000:]}")
        return json.loads(result.read_text())


def report(results: list[tuple[Run, Run]]) -> str:
    """A Markdown table for every task and setup."""
    text = ""
    accuracy = mean_by(results, "task", "setup", "strategy", "attack")
    for task, setup in dict.fromkeys((run["task"], run["setup"]) for run, _ in results):
        setting, (n, f) = SETTINGS[task, setup], SETUPS[setup]
        known = {key[2:]: value for key, value in accuracy.items() if key[:2] == (task, setup)}
        clean = known["ddp" if setup == "ranks" else "averaging", "none"]

        def cell(
            strategy: str, attack: str, known: dict[Any, float] = known, clean: float = clean
        ) -> str:
            value = known.get((strategy, attack))
            return "" if value is None else f"{value:.2f} ({value - clean:+.2f})"

        minutes = (
            sum(
                result["seconds"]
                for run, result in results
                if (run["task"], run["setup"]) == (task, setup)
            )
            / 60
        )
        text += f"### {task}, {n} {'CPU ranks' if setup == 'ranks' else 'in-process workers'}, {f} lying\n\n"
        text += (
            f"Batch {setting.batch} a worker, {setting.steps} steps of {setting.optimizer}, "
            "OneCycleLR up to "
            f"{setting.rate}; mean of {setting.seeds} seed(s). Clean "
            f"{'DDP' if setup == 'ranks' else 'averaging, which is DDP,'} "
            f"reaches **{clean:.2f} %**; in brackets: the difference to it, in points. Training "
            f"took {minutes:.0f} minutes in all.\n\n"
        )
        rows = [["none", cell("averaging", "none") or cell("ddp", "none"), cell("robust", "none")]]
        rows += [
            [SAME.get(a, a), cell("averaging", a), cell("robust", a)]
            for a in (*ATTACKS, GARBAGE)
            if {("robust", a), ("averaging", a)} & set(known)
        ]
        text += markdown(["attack", "averaging", "byzantine_robust"], rows) + "\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measures accuracy under attack, against plain DDP."
    )
    parser.add_argument("--data", required=True, help="folder that holds libsvm/ and FashionMNIST/")
    parser.add_argument("--only", choices=["resnet18", "a9a"], help="one task")
    parser.add_argument("--setup", choices=list(SETUPS), help="one setup")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/accuracy"),
        help="where results are kept; a rerun goes on there",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at a time; for in-process runs, with OMP_NUM_THREADS=1",
    )
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        result = train(arguments.run, arguments.data)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            arguments.result.write_text(json.dumps(result))
        return
    tasks = [arguments.only] if arguments.only else ["a9a", "resnet18"]
    setups = [arguments.setup] if arguments.setup else list(SETUPS)
    results = run_all(
        all_runs(tasks, setups),
        partial(launch, data=arguments.data),
        arguments.output,
        arguments.jobs,
    )
    text = report(results) + f"{machine()}.\n"
    (arguments.output / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
