"""How long a step of many in-process workers takes, beside ByzFL's own loop and a plain Lightning
step on the same samples.

    python benchmarks/simulation.py [--models mlp] [--workers 20]
        [--output docs/performance/simulation.csv]

Every worker has 25 samples, a fifth of the workers lie with ALIE, the rule is NNM + trimmed mean,
workers keep a momentum of 0.9, and loss and accuracy are logged. ByzFL runs its Client, Server and
ByzantineClient: there only honest workers compute gradients. All methods take turns in one run,
several times over. A ratio is the median of the turns' ratios. Peer: ``pip install byzfl``.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import byzfl
import lightning as L
import torch
import torchmetrics
from _runs import machine, markdown, write_csv
from byzfl.fed_framework import models
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_byz as byz
from lightning_byz.lightning import ByzantineRobustStrategy, ByzantineWorkers

SAMPLES, WARM_UP = 25, 5
MODELS = {"logistic regression": "logreg_mnist", "mlp": "fc_mnist", "cnn": "cnn_mnist"}
AIMS = {  # over ByzFL's rounds a second, and over a plain step
    ("logistic regression", 20): (">= 2", ""),
    ("mlp", 20): (">= 8", "<= 3"),
    ("cnn", 20): (">= 3", "<= 1.4"),
    ("mlp", 100): (">= 8", ""),
}
COLUMNS = ["model", "workers", "method", "step, ms", "ByzFL's step over it", "aim"]
COLUMNS += ["over plain Lightning", "aim "]


class Module(L.LightningModule):
    """A classifier as users write it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.times = net, list[float]()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=10)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        outputs = self.net(batch[0])
        loss = nn.functional.cross_entropy(outputs, batch[1])
        self.log("train/loss", loss)
        self.log("train/accuracy", self.accuracy(outputs, batch[1]))
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.times.append(time.perf_counter())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def images(count: int) -> TensorDataset:
    """Random images of MNIST's shape: the time of a step does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 28, 28, generator=generator)
    return TensorDataset(x, torch.randint(10, (count,), generator=generator))


def lightning_steps(model: str, n: int, steps: int, **options: Any) -> list[float]:
    """Seconds of each step in a Trainer."""
    module = Module(getattr(models, MODELS[model])())
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=WARM_UP + steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(images((WARM_UP + steps) * n * SAMPLES), batch_size=n * SAMPLES))
    return [b - a for a, b in pairwise(module.times[WARM_UP - 1 :])]


def our_steps(model: str, n: int, steps: int, **options: Any) -> list[float]:
    """Seconds of each step with in-process workers."""
    rule = byz.Chain(pre=(byz.NNM(),), rule=byz.TrimmedMean())
    strategy = ByzantineRobustStrategy(
        byz.RobustSGD(aggregator=rule, worker_momentum=0.9),
        workers_per_process=n,
        num_byzantine=n // 5,
        **options,
    )
    liars = ByzantineWorkers(byz.ALIE(z=1.5), count=n // 5, every_n_steps=10**9)
    return lightning_steps(model, n, steps, strategy=strategy, callbacks=[liars])


def their_steps(model: str, n: int, steps: int) -> list[float]:
    """Seconds of each of ByzFL's rounds."""
    parameters = {
        "model_name": MODELS[model],
        "device": "cpu",
        "optimizer_name": "SGD",
        "learning_rate": 0.01,
        "weight_decay": 0.0,
        "milestones": [10**9],
        "learning_rate_decay": 0.25,
    }
    f, data = n // 5, images((WARM_UP + steps) * SAMPLES)
    client = parameters | {
        "loss_name": "CrossEntropyLoss",
        "LabelFlipping": False,
        "momentum": 0.9,
        "nb_labels": 10,
        "store_per_client_metrics": True,
    }
    clients = [
        byzfl.Client(client | {"training_dataloader": DataLoader(data, batch_size=SAMPLES)})
        for _ in range(n - f)
    ]
    server = byzfl.Server(
        parameters
        | {
            "test_loader": DataLoader(data, batch_size=SAMPLES),
            "aggregator_info": {"name": "TrMean", "parameters": {"f": f}},
            "pre_agg_list": [{"name": "NNM", "parameters": {"f": f}}],
        }
    )
    liars = byzfl.ByzantineClient({"name": "ALittleIsEnough", "f": f, "parameters": {"tau": 1.5}})
    times = []
    for _ in range(WARM_UP + steps + 1):
        times.append(time.perf_counter())
        for one in clients:
            one.compute_gradients()
        honest = [one.get_flat_gradients_with_momentum() for one in clients]
        server.update_model_with_gradients(honest + liars.apply_attack(honest))
        for one in clients:
            one.set_model_state(server.get_dict_parameters())
    return [b - a for a, b in pairwise(times[WARM_UP:])]


METHODS: dict[str, Callable[[str, int, int], list[float]]] = {
    "plain Lightning": lightning_steps,
    "ByzFL": their_steps,
    "all workers at once": our_steps,
    "one worker after the other": lambda *run: our_steps(*run, vectorize=False),
}


def table(model: str, n: int, steps: int, turns: int) -> list[list[Any]]:
    """What `COLUMNS` names."""
    medians: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(turns):
        for name, run in METHODS.items():
            medians[name].append(1000 * statistics.median(run(model, n, steps)))
            print(f"{model}, {n}, {name}: {medians[name][-1]:.1f} ms", file=sys.stderr, flush=True)

    def ratio(above: str, below: str) -> str:
        pairs = zip(medians[above], medians[below], strict=True)
        return f"{statistics.median(a / b for a, b in pairs):.2f}"

    rows = []
    for name, times in medians.items():
        aims = AIMS.get((model, n), ("", "")) if name == "all workers at once" else ("", "")
        rows.append(
            [
                *(model, n, name, f"{statistics.median(times):.1f}"),
                *(ratio("ByzFL", name), aims[0]),
                *(ratio(name, "plain Lightning"), aims[1]),
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--workers", nargs="+", type=int, default=[20])
    parser.add_argument("--steps", type=int, default=30, help="measured steps of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a CSV file; rows are added to what it holds")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = [
        row
        for n in arguments.workers
        for model in arguments.models
        for row in table(model, n, arguments.steps, arguments.turns)
    ]
    if arguments.output:
        write_csv(arguments.output, COLUMNS, rows, add=True)
    print(f"{markdown(COLUMNS, rows)}\n{machine()}, {torch.get_num_threads()} threads.")


if __name__ == "__main__":
    main()
