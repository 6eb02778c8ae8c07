"""The table that chooses the default algorithm, as CSV and as a picture: candidates, with and
without attack, against plain averaging.

    python benchmarks/defaults.py --data DIR [--output runs/defaults] [--jobs 2]
    python benchmarks/defaults.py --draw docs/default-algorithm.csv docs/images/default-algorithm.png

Every round is the package's own `Exchange` over in-process workers; plain averaging is
RobustSGD(aggregator=Mean()), whose trajectory is that of DDP. DIR holds libsvm/a9a.bz2 and
libsvm/a9a.t.bz2; the digits come with scikit-learn.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _runs import Run, a9a, machine, mean_by, run_all
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from torch.nn import functional

from lightning_byz.aggregators import CAF, NNM, Chain, CoordinateMedian, Mean, TrimmedMean
from lightning_byz.algorithms import RobustSGD
from lightning_byz.attacks import ALIE, IPM, Attack, Gaussian, LabelFlip, NotANumber, SignFlip
from lightning_byz.cli.report_figures import COLOURS, style
from lightning_byz.engine.adversary import Adversary
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import Contribution
from lightning_byz.engine.simulation import Simulation
from lightning_byz.transports import InProcess
from lightning_byz.types import Gradients

RULES = {
    "TrimmedMean": TrimmedMean(),
    "CoordinateMedian": CoordinateMedian(),
    "NNM + TrimmedMean": Chain(pre=(NNM(),), rule=TrimmedMean()),
    "NNM + CoordinateMedian": Chain(pre=(NNM(),), rule=CoordinateMedian()),
    "CAF": CAF(),
    "CAF, norm floor 0.3": CAF(norm_floor=0.3),
    "NNM + CAF": Chain(pre=(NNM(),), rule=CAF()),
}
# at the workers; undone: undo_worker_momentum
MOMENTA = ("0", "0.5", "0.9", "0.5, undone", "0.9, undone")
SEEDS = range(2)
CLEAN_POINTS, ATTACKED_POINTS = 1.0, 2.0  # that a candidate may lose
CLEAN = "none"
SUBTLE = {
    "SignFlip(1)": SignFlip(1.0),
    "IPM(0.1)": IPM(0.1),
    "ALIE(1.5)": ALIE(z=1.5),
    "LabelFlip": LabelFlip,
}
BLATANT = {
    "SignFlip(10)": SignFlip(10.0),  # IPM(10) is the same attack
    "Gaussian(1)": Gaussian(std=1.0),
    "Gaussian(100)": Gaussian(std=100.0),
    "NotANumber": NotANumber(),
}
ATTACKS = {CLEAN: None, **SUBTLE, **BLATANT}


class Setting(NamedTuple):
    """A task, its workers, and how it is trained."""

    data: str
    n: int
    f: int
    batch: int  # of one worker
    steps: int
    rates: dict[str, float]


SETTINGS = {
    "digits, 1 of 4": Setting("digits", 4, 1, 32, 300, {"SGD": 0.1, "AdamW": 5e-3}),
    "digits, 3 of 10": Setting("digits", 10, 3, 32, 300, {"SGD": 0.1, "AdamW": 5e-3}),
    "a9a, 6 of 20": Setting("a9a", 20, 6, 32, 300, {"SGD": 0.1, "AdamW": 1e-2}),
}
OPTIMIZERS = {"SGD": partial(torch.optim.SGD, momentum=0.9), "AdamW": torch.optim.AdamW}


@cache
def load(name: str, data: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test samples; the digits are split anew for every seed, into two thirds and one
    third.
    """
    if name == "a9a":
        return a9a(data)
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x, order = x.float() / 16, torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1200], order[1200:]
    return x[train], y[train], x[test], y[test]


def train(run: Run, data: str) -> Run:
    """The test accuracy, in percent, at the end of one run."""
    torch.set_num_threads(1)
    setting = SETTINGS[run["setting"]]
    x, y, x_test, y_test = load(setting.data, data, run["seed"])
    torch.manual_seed(run["seed"])
    classes = int(y.max()) + 1
    sizes = [x.shape[1], classes] if setting.data == "a9a" else [x.shape[1], 64, classes]
    w = torch.nn.Parameter(initial(sizes))
    optimizer = OPTIMIZERS[run["optimizer"]]([w], lr=setting.rates[run["optimizer"]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)

    n, liars = setting.n, list(range(setting.n - setting.f, setting.n))
    rule = Mean() if run["rule"] == "Mean" else RULES[run["rule"]].with_f(setting.f)
    transport = InProcess()
    transport.connect(0, 1, n, torch.device("cpu"))
    attack = ATTACKS[run["attack"]]
    momentum, _, undone = run["worker_momentum"].partition(", ")
    algorithm = RobustSGD(
        aggregator=rule, worker_momentum=float(momentum), undo_worker_momentum=bool(undone)
    )
    exchange = Exchange(algorithm, transport, run["seed"])
    if isinstance(attack, Attack):
        exchange.simulation = simulation = Simulation()
        simulation.adversaries.append(Adversary(attack, liars))

    used = torch.ones(1, dtype=torch.uint8)
    order, place = torch.empty(0, dtype=torch.int64), 0
    for _ in range(setting.steps):
        if place + n * setting.batch > len(order):
            order, place = torch.randperm(len(x)), 0
        picked = order[place : place + n * setting.batch]
        place += len(picked)
        inputs, labels = x[picked].unflatten(0, (n, -1)), y[picked].unflatten(0, (n, -1)).clone()
        if attack is LabelFlip:
            labels[liars] = LabelFlip(classes).flip(labels[liars])
        copies = w.detach().expand(n, -1).clone().requires_grad_()
        loss = functional.cross_entropy(
            mlp(copies, inputs, sizes).flatten(0, 1), labels.flatten(), reduction="sum"
        )
        (rows,) = torch.autograd.grad(loss / setting.batch, copies)  # [n, d]
        w.grad = exchange.run(
            [Contribution(Gradients(row), used) for row in rows], rows[0]
        ).estimate
        if w.grad is None:  # no finite gradient is left: averaging under attack
            break
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return {
            "accuracy": 100 * (mlp(w, x_test, sizes).argmax(1) == y_test).double().mean().item()
        }


def initial(sizes: list[int]) -> Tensor:
    """The flat parameters of an MLP, as torch.nn.Linear starts them."""
    return torch.cat(
        [torch.empty((a + 1) * b).uniform_(-(a**-0.5), a**-0.5) for a, b in pairwise(sizes)]
    )


def mlp(w: Tensor, x: Tensor, sizes: list[int]) -> Tensor:
    """Logits ``[..., batch, classes]`` of an MLP with flat parameters ``w [..., d]`` for
    ``x [..., batch, inputs]``.
    """
    for layer, (a, b) in enumerate(pairwise(sizes)):
        weight, bias, w = w.split([a * b, b, w.shape[-1] - (a + 1) * b], -1)
        x = (x if layer == 0 else x.relu()) @ weight.unflatten(-1, (a, b)) + bias.unsqueeze(-2)
    return x


Candidate = tuple[str, str]
AVERAGING: Candidate = ("Mean", "0")
CHOSEN: Candidate = ("CAF, norm floor 0.3", "0.9, undone")
CANDIDATES: list[Candidate] = [(rule, momentum) for rule in RULES for momentum in MOMENTA]
TABLES = [(setting, optimizer) for setting in SETTINGS for optimizer in OPTIMIZERS]
COLUMNS = [
    *("rule", "worker_momentum", "setting", "optimizer", "clean", "clean_minus_ddp"),
    *SUBTLE,
    *BLATANT,
]


def all_runs(candidates: list[Candidate], attacks: Sequence[str]) -> list[Run]:
    """Every seed of these candidates under these attacks."""
    return [
        {
            "setting": setting,
            "optimizer": optimizer,
            "rule": rule,
            "worker_momentum": momentum,
            "attack": attack,
            "seed": seed,
        }
        | {
            "trained": (
                f"batch {SETTINGS[setting].batch}, {SETTINGS[setting].steps} steps, lr "
                f"{SETTINGS[setting].rates[optimizer]}"
            )
        }
        for seed in SEEDS
        for setting, optimizer in TABLES
        for rule, momentum in candidates
        for attack in attacks
    ]


def measure(
    work: Callable[[Run], Run], output: Path, jobs: int, wanted: list[Candidate]
) -> list[dict[str, str]]:
    """Runs what is missing, in stages: a candidate that has lost too much is not run any further.
    Returns the lines of the table, those of plain averaging first.
    """

    def stage(candidates: list[Candidate], attacks: Sequence[str]) -> dict[tuple[Any, ...], float]:
        names = ("rule", "worker_momentum", "setting", "optimizer", "attack")
        return mean_by(run_all(all_runs(candidates, attacks), work, output, jobs), *names)

    accuracy = stage([AVERAGING, *wanted], [CLEAN])

    def below(c: Candidate, table: tuple[str, str]) -> float:
        return accuracy[(*c, *table, CLEAN)] - accuracy[(*AVERAGING, *table, CLEAN)]

    def lost(c: Candidate, table: tuple[str, str], attack: str) -> float:
        return accuracy[(*c, *table, attack)] - accuracy[(*c, *table, CLEAN)]

    kept = [c for c in wanted if min(below(c, table) for table in TABLES) >= -CLEAN_POINTS]
    for attacks in (SUBTLE, BLATANT):
        accuracy |= stage(kept, attacks)
        kept = [
            c
            for c in kept
            if min(lost(c, table, a) for table in TABLES for a in attacks) >= -ATTACKED_POINTS
        ]

    return [
        dict(zip(COLUMNS, (*c, *table), strict=False))
        | {
            "clean": f"{accuracy[(*c, *table, CLEAN)]:.2f}",
            "clean_minus_ddp": f"{below(c, table):.2f}",
        }
        | {
            a: f"{lost(c, table, a):.2f}"
            for a in (*SUBTLE, *BLATANT)
            if (*c, *table, a) in accuracy
        }
        for c in (AVERAGING, *wanted)
        for table in TABLES
    ]


def write(lines: list[dict[str, str]], path: Path) -> None:
    """The table as CSV; what was not run is empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def draw(table: Path, picture: Path) -> None:
    """Two dots for each candidate of the table: its worst loss without and with an attack."""
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    worst: dict[Candidate, tuple[float, float]] = {}  # attacked (-inf where not run), clean
    for line in lines:
        c = (line["rule"], line["worker_momentum"])
        if c == AVERAGING:
            continue
        attacked, clean = worst.get(c, (math.inf, math.inf))
        losses = [float(line[a]) for a in (*SUBTLE, *BLATANT) if line[a]] or [-math.inf]
        worst[c] = min(attacked, *losses), min(clean, float(line["clean_minus_ddp"]))
    order = sorted(worst, key=lambda c: worst[c])  # the best at the top
    measured = [attacked for attacked, _ in worst.values() if attacked > -math.inf]
    left = min(measured, default=-ATTACKED_POINTS) - 0.5

    with style():
        figure = Figure(figsize=(7.2, 1.2 + 0.19 * len(order)), layout="constrained")
        axes = figure.subplots()
        for place, c in enumerate(order):
            attacked, clean = worst[c]
            axes.plot(attacked, place, "D", color=COLOURS[1], markeredgecolor="black", markersize=5)
            if clean >= left:
                axes.plot(clean, place, "o", color=COLOURS[0], markersize=5)
            else:
                text = f"\u25c0 {clean:.2f} clean; attacks not run"
                axes.text(left + 0.1, place, text, va="center", color=COLOURS[0], fontsize=8)
        for limit, dashes, colour in (
            (-CLEAN_POINTS, (4, 2), COLOURS[0]),
            (-ATTACKED_POINTS, (1, 1), COLOURS[1]),
        ):
            axes.axvline(limit, color=colour, linestyle=(0, dashes), linewidth=1.3, zorder=0)
        axes.set_yticks(
            range(len(order)), [f"{rule}; momentum {momentum}" for rule, momentum in order]
        )
        if CHOSEN in worst:
            axes.get_yticklabels()[order.index(CHOSEN)].set_fontweight("bold")
        axes.set(xlim=(left, 0.2), ylim=(-0.7, len(order) - 0.3))
        axes.set_xlabel("worst change of test accuracy, in points")
        axes.grid(alpha=0.3)
        handles = [
            Line2D([], [], marker="o", linestyle="", color=COLOURS[0]),
            Line2D([], [], marker="D", linestyle="", color=COLOURS[1], markeredgecolor="black"),
            Line2D([], [], color=COLOURS[0], linestyle=(0, (4, 2))),
            Line2D([], [], color=COLOURS[1], linestyle=(0, (1, 1))),
        ]
        labels = [
            "clean, against DDP",
            "attacked, against own clean",
            "limit clean",
            "limit attacked",
        ]
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
        figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measures the candidates for the default algorithm."
    )
    parser.add_argument("--data", help="folder that holds libsvm/a9a.bz2 and libsvm/a9a.t.bz2")
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
    parser.add_argument(
        "--rules", nargs="+", choices=list(RULES), default=list(RULES), help="only these"
    )
    arguments = parser.parse_args()
    if arguments.draw:
        draw(*arguments.draw)
        return
    if arguments.data is None:
        parser.error("--data is needed")
    start = time.monotonic()
    lines = measure(
        partial(train, data=arguments.data),
        arguments.output,
        arguments.jobs,
        [c for c in CANDIDATES if c[0] in arguments.rules],
    )
    table = arguments.output / "default-algorithm.csv"
    write(lines, table)
    draw(table, table.with_suffix(".png"))
    print(f"{table}; {machine()}; this call took {(time.monotonic() - start) / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
