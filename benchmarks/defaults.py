"""The table that chooses the default algorithm, as CSV and as a picture: rules on like and unlike
data, without and with attacks, two of which know the rule.

    python benchmarks/defaults.py --screen [--output runs/defaults] [--jobs 2]
    python benchmarks/defaults.py --data DIR [--output runs/defaults] [--jobs 2]
    python benchmarks/defaults.py --draw docs/default-algorithm.csv docs/images/default-algorithm.png

``--screen`` is a part of the table that takes less than an hour: the digits, an MLP, SGD, 6 liars
of 20, one seed. The whole table takes days; it goes on where it was interrupted, and what was not
run is blank. Every round is the package's own `Exchange` over in-process workers. DIR holds
Fashion-MNIST as torchvision lays it out; the digits come with scikit-learn.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _runs import Run, machine, mean_by, run_all, write_csv
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from lightning_byz.aggregators import (
    ARC,
    CAF,
    NNM,
    Aggregator,
    ByHeterogeneity,
    Chain,
    CoordinateMedian,
    GeometricMedian,
    Mean,
    MultiKrum,
    SpectralFilter,
    TrimmedMean,
)
from lightning_byz.algorithms import RobustSGD
from lightning_byz.attacks import (
    ALIE,
    IPM,
    Attack,
    LabelFlip,
    Mimic,
    MinMax,
    SignFlip,
    WorstLie,
    Zero,
)
from lightning_byz.cli.report_figures import style
from lightning_byz.data import IID, Dirichlet
from lightning_byz.engine.adversary import Adversary
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import Contribution
from lightning_byz.engine.simulation import Simulation
from lightning_byz.transports import InProcess
from lightning_byz.types import Gradients


class Candidate(NamedTuple):
    """A rule, and what workers send to it; ``momentum`` is undone by the server or not."""

    rule: Aggregator
    momentum: float = 0.9
    undone: bool = True


CHOSEN = "by heterogeneity"
CANDIDATES = {
    "Mean": Candidate(Mean(), 0.0, False),  # DDP
    CHOSEN: Candidate(ByHeterogeneity()),
    "SpectralFilter": Candidate(SpectralFilter()),
    "CAF, norm floor 0.3": Candidate(CAF(norm_floor=0.3)),
    "geometric median": Candidate(GeometricMedian()),
    "NNM + trimmed mean": Candidate(Chain(pre=(NNM(),), rule=TrimmedMean())),
    "ARC + mean": Candidate(Chain(pre=(ARC(),), rule=Mean())),
    "median": Candidate(CoordinateMedian()),
    "trimmed mean": Candidate(TrimmedMean()),
    "Multi-Krum": Candidate(MultiKrum()),
}
"""The rules, each with a worker momentum of 0.9 that the server undoes."""
MOMENTA = {
    f"{CHOSEN}, momentum 0": Candidate(ByHeterogeneity(), 0.0, False),
    f"{CHOSEN}, momentum 0.5": Candidate(ByHeterogeneity(), 0.5, False),
    f"{CHOSEN}, momentum 0.9": Candidate(ByHeterogeneity(), 0.9, False),
    f"{CHOSEN}, momentum 0.5, undone": Candidate(ByHeterogeneity(), 0.5, True),
}
"""The chosen rule with other momenta, under the attacks that do not search."""
PARTITIONS = {"iid": IID(), **{f"Dirichlet({a:g})": Dirichlet(a) for a in (1.0, 0.3, 0.1)}}
SEARCHES = ("mean", "pull")
ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "SignFlip": SignFlip(1.0),
    "ALIE": ALIE(z=1.5),
    "IPM(0.5)": IPM(0.5),
    "Zero": Zero(),
    "Mimic": Mimic(),
    "MinMax": MinMax(),
    "LabelFlip": None,  # of their labels
}
"""Besides them, WorstLie: "mean" against the honest mean, "pull" towards a wrong model."""
WORKERS = ((20, 6), (10, 3), (50, 10))
TASKS = ("digits", "fashion-mnist")
MODELS = ("mlp", "cnn")
OPTIMIZERS = ("SGD", "AdamW")
SEEDS = range(3)
BATCH = 16  # of one worker
STEPS = 200
RATES = {
    ("digits", "SGD"): 0.1,
    ("digits", "AdamW"): 5e-3,
    ("fashion-mnist", "SGD"): 0.03,
    ("fashion-mnist", "AdamW"): 2e-3,
}
SETTING = ("data", "model", "optimizer", "n", "f", "partition")
COLUMNS = (*SETTING, "candidate", *ATTACKS, *SEARCHES, "unlike")
"""``unlike``: the heterogeneity that the run with nobody lying ends with."""


@cache
def load(name: str, data: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images ``[N, 1, h, w]`` and labels."""
    if name == "digits":
        from sklearn.datasets import load_digits

        x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
        x = x.float().view(-1, 1, 8, 8) / 16
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        train, test = order[:1200], order[1200:]
        return x[train], y[train], x[test], y[test]
    from torchvision.datasets import FashionMNIST

    parts = []
    for train in (True, False):
        images = FashionMNIST(data, train=train)
        parts += [(images.data[:, None].float() / 255 - 0.2860) / 0.3530, images.targets]
    return parts[0], parts[1], parts[2], parts[3]


def network(name: str, side: int) -> nn.Module:
    """An MLP with 64 hidden units, or a CNN with two layers."""
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(side * side, 64), nn.ReLU(), nn.Linear(64, 10))
    left = side // 4
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * left * left, 10)),
    )


class Model:
    """A network as a function of its flat parameters."""

    def __init__(self, name: str, side: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.net = network(name, side)
        self.shapes = {key: value.shape for key, value in self.net.named_parameters()}
        self.start = nn.utils.parameters_to_vector(self.net.parameters()).detach()
        self.gradients = vmap(grad(self.loss), (None, 0, 0))  # of every worker, [n, d]

    def __call__(self, w: Tensor, x: Tensor) -> Tensor:
        pieces = w.split([shape.numel() for shape in self.shapes.values()])
        named = {
            key: piece.view(shape)
            for (key, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }
        return functional_call(self.net, named, (x,))

    def loss(self, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The mean cross-entropy of one batch."""
        return functional.cross_entropy(self(w, x), y)


@cache
def wrong_model(task: str, data: str, model: str, optimizer: str) -> Tensor:
    """Parameters of a network trained on labels y + 1, by averaging."""
    x, y, *_ = load(task, data)
    net = Model(model, x.shape[-1], seed=99)
    w, step = optimizer_of(net.start, optimizer, RATES[task, optimizer])
    draws = torch.Generator().manual_seed(99)
    for _ in range(STEPS):
        picked = torch.randint(len(x), (1, 20 * BATCH), generator=draws)
        w.grad = net.gradients(w.detach(), x[picked], (y[picked] + 1) % 10)[0]
        step()
    return w.detach().clone()


def optimizer_of(start: Tensor, name: str, rate: float) -> tuple[nn.Parameter, Any]:
    """The parameters, and one step of their optimizer and its schedule, which ends at 0."""
    w = nn.Parameter(start.clone())
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD([w], lr=rate, momentum=0.9)
        if name == "SGD"
        else torch.optim.AdamW([w], lr=rate)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def step() -> None:
        optimizer.step()
        schedule.step()

    return w, step


def train(run: Run, data: str) -> Run:
    """The test accuracy, in percent, and the heterogeneity at the end of one run."""
    torch.set_num_threads(1)
    x, y, x_test, y_test = load(run["data"], data)
    n, liars = run["n"], list(range(run["n"] - run["f"], run["n"]))
    parts = PARTITIONS[run["partition"]](y, n, run["seed"])
    model = Model(run["model"], x.shape[-1], run["seed"])
    w, step = optimizer_of(model.start, run["optimizer"], RATES[run["data"], run["optimizer"]])
    candidate = {**CANDIDATES, **MOMENTA}[run["candidate"]]
    is_mean = isinstance(candidate.rule, Mean)
    exchange = Exchange(
        RobustSGD(
            candidate.rule if is_mean else candidate.rule.with_f(run["f"]),
            worker_momentum=candidate.momentum,
            undo_worker_momentum=candidate.undone,
        ),
        transport(n),
        run["seed"],
    )
    attack = ATTACKS.get(run["attack"])
    if run["attack"] == "mean":
        attack = WorstLie("mean", budget=30)
    elif run["attack"] == "pull":
        wrong = wrong_model(run["data"], data, run["model"], run["optimizer"])
        attack = WorstLie("model", wrong, budget=30)
    if attack is not None:
        exchange.simulation = simulation = Simulation()
        simulation.adversaries.append(Adversary(attack, liars, x=lambda index: w.detach()))

    used = torch.ones(1, dtype=torch.uint8)
    draws = torch.Generator().manual_seed(run["seed"])
    for _ in range(STEPS):
        picked = torch.stack(
            [part[torch.randint(len(part), (BATCH,), generator=draws)] for part in parts]
        )
        labels = y[picked]
        if run["attack"] == "LabelFlip":
            labels[liars] = LabelFlip(10).flip(labels[liars])
        rows = model.gradients(w.detach(), x[picked], labels)
        w.grad = exchange.run(
            [Contribution(Gradients(row), used) for row in rows], w.detach()
        ).estimate
        if w.grad is None:  # no finite gradient is left: averaging under attack
            break
        step()
    with torch.no_grad():
        right = model(w, x_test).argmax(1) == y_test
    found = exchange.heterogeneity
    unlike = None if found is None else found.value
    return {"accuracy": 100 * right.double().mean().item(), "unlike": unlike}


def transport(n: int) -> InProcess:
    """One process with n workers."""
    found = InProcess()
    found.connect(0, 1, n, torch.device("cpu"))
    return found


def all_runs(screen: bool) -> list[Run]:
    """The cells of the table, those of the screen first."""
    runs = []
    for seed, optimizer, task, model, (n, f) in product(SEEDS, OPTIMIZERS, TASKS, MODELS, WORKERS):
        first = (seed, optimizer, task, model, n) == (0, "SGD", "digits", "mlp", 20)
        if screen and not first:
            continue
        rate = RATES[task, optimizer]
        for partition, candidate, attack in product(
            PARTITIONS, {**CANDIDATES, **MOMENTA}, (*ATTACKS, *SEARCHES)
        ):
            if candidate in MOMENTA and (attack in SEARCHES or not first):
                continue
            values = (task, model, optimizer, n, f, partition)
            runs.append(
                dict(zip(SETTING, values, strict=True))
                | {"candidate": candidate, "attack": attack, "seed": seed}
                | {"trained": f"batch {BATCH}, {STEPS} steps, lr {rate}"}
            )
    return runs


def table(results: list[tuple[Run, Run]]) -> list[list[str]]:
    """Lines of `COLUMNS`; what was not run is blank."""
    accuracy = mean_by(results, *SETTING, "candidate", "attack")
    known = [pair for pair in results if pair[1].get("unlike") is not None]
    unlike = mean_by(known, *SETTING, "candidate", "attack", value="unlike")
    lines = dict.fromkeys(key[:-1] for key in accuracy)
    order = [*CANDIDATES, *MOMENTA]
    return [
        [
            *map(str, line),
            *(
                f"{accuracy[(*line, attack)]:.1f}" if (*line, attack) in accuracy else ""
                for attack in (*ATTACKS, *SEARCHES)
            ),
            f"{unlike[(*line, 'none')]:.2f}" if (*line, "none") in unlike else "",
        ]
        for line in sorted(
            lines,
            key=lambda line: (*line[:5], list(PARTITIONS).index(line[5]), order.index(line[6])),
        )
    ]


def draw(source: Path, picture: Path) -> None:
    """A heatmap for each partition of the screen: rules by attacks, in percent."""
    with source.open(newline="") as file:
        lines = [
            line
            for line in csv.DictReader(file)
            if (line["data"], line["model"], line["optimizer"], line["n"])
            == ("digits", "mlp", "SGD", "20")
            and line["candidate"] in CANDIDATES
        ]
    attacks = [*ATTACKS, *SEARCHES]
    with style():
        figure = Figure(figsize=(11, 6.4), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True, sharey=True).flatten()
        for axes, partition in zip(panels, PARTITIONS, strict=True):
            here = {line["candidate"]: line for line in lines if line["partition"] == partition}
            values = [
                [float(here[rule][attack] or math.nan) for attack in attacks]
                for rule in CANDIDATES
                if rule in here
            ]
            axes.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
            for row, line in enumerate(values):
                for column, value in enumerate(line):
                    axes.text(
                        *(column, row, "" if math.isnan(value) else f"{value:.0f}"),
                        ha="center",
                        va="center",
                        color="white" if value < 55 else "black",
                        fontsize=8,
                    )
            axes.set_title(partition, fontsize=10)
            axes.set_xticks(range(len(attacks)), attacks, rotation=35, ha="right")
            axes.set_yticks(range(len(CANDIDATES)), list(CANDIDATES))
            for label in axes.get_yticklabels():
                label.set_fontweight("bold" if label.get_text() == CHOSEN else "normal")
        figure.supxlabel(
            "attack; mean and pull search for the worst lie against the rule", fontsize=9
        )
        figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measures the candidates for the default algorithm."
    )
    parser.add_argument("--data", default="", help="folder that holds FashionMNIST")
    parser.add_argument(
        "--screen", action="store_true", help="only the digits, MLP, SGD, 6 of 20, one seed"
    )
    parser.add_argument(
        "--draw",
        nargs=2,
        type=Path,
        metavar=("CSV", "PNG"),
        help="only draw the picture of a table",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/defaults"),
        help="where results are kept; a rerun goes on there",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(*arguments.draw)
        return
    if not (arguments.screen or arguments.data):
        parser.error("--data is needed, or --screen")
    start = time.monotonic()
    results = run_all(
        all_runs(arguments.screen),
        partial(train, data=arguments.data),
        arguments.output,
        arguments.jobs,
    )
    path = arguments.output / "default-algorithm.csv"
    write_csv(path, COLUMNS, table(results))
    draw(path, path.with_suffix(".png"))
    print(f"{path}; {machine()}; this call took {(time.monotonic() - start) / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
