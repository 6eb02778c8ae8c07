"""Byz-EF21-SGDM on CIFAR-10: a small convolutional network, 20 workers of which 9 are Byzantine,
Top-10 %, batch 64.

    python benchmarks/reproduce/ef21_images.py --data DIR [--full] [--output
    runs/reproduce/ef21_images] [--jobs 2] [--device cuda]

DIR holds cifar-10-batches-py. A run of Byz-EF21 with full gradients takes more than an hour on a
CPU, and two minutes on a GPU. Rounds are the package's own `Exchange` over in-process workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from _shared import (
    Classifier,
    Simulation,
    band,
    batches,
    figure,
    markdown,
    measure,
    parser,
    pick,
    publish,
    spread,
    verdict,
)
from ef21 import ATTACKS, LIARS, METHODS, RULES, HonestSplit, N, Run
from torch import Tensor

from lightning_byz.aggregators import NNM, Chain
from lightning_byz.algorithms import (
    Algorithm,
    ByzDIANA,
    ByzEF21SGDM,
    ByzEF21SGDMBC,
    ByzVRMarinaPP,
    RobustSGD,
)
from lightning_byz.compressors import RandK, TopK
from lightning_byz.types import Gradients, Round

SHARE = 0.1  # of the coordinates that a message holds
MAIN: Run = {"rule": "CWTM", "batch": 64, "lr": 0.05, "rounds": 300}
RATES = (0.5, 0.05)  # of which the paper takes the best for each method, and 0.005
FULL_BATCHES = 10  # of a worker, that stand for all of its data in Byz-VR-MARINA's full rounds
OURS, NO_MOMENTUM, WHOLE = (
    "Byz-EF21-SGDM, eta 0.1",
    "no momentum, eta 1",
    "Byz-EF21, full gradients",
)
PAPERS = (
    OURS,
    "Byz-EF21-SGDM, eta 0.01",
    NO_MOMENTUM,
    WHOLE,
    "compressed SGD",
    "Byz-DIANA",
    "Byz-VR-MARINA",
)
BOTH = "both directions, eta 0.1"  # this package's own
COMPARED = (*PAPERS, BOTH)
POINTS = 20
SEEDS = 2


def algorithm(run: Run) -> Algorithm:
    rule = Chain(pre=(NNM(),), rule=RULES[run["rule"]], f=LIARS)
    if run["method"] == "compressed SGD":
        return RobustSGD(rule, RandK(SHARE))
    if run["method"] == "Byz-DIANA":
        return ByzDIANA(rule, RandK(SHARE), alpha=SHARE)  # 1 / (1 + omega)
    if run["method"] == "Byz-VR-MARINA":
        return ByzVRMarinaPP(rule, compressor=RandK(SHARE), p=SHARE, clipping=None)
    if run["method"] == BOTH:
        return ByzEF21SGDMBC(rule, TopK(SHARE), eta=0.1, server_compressor=TopK(SHARE))
    return ByzEF21SGDM(rule, TopK(SHARE), eta=METHODS[run["method"]]["eta"])


@cache
def images(data: str, device: str) -> Classifier:
    return Classifier("cifar10", data, device=device)


def train(run: Run, data: str, device: str) -> Run:
    """The test accuracy along one run, against rounds and megabytes that a worker sent."""
    torch.set_num_threads(1)
    task, attack = images(data, device), ATTACKS[run["attack"]]
    flip = (torch.arange(N) >= N - LIARS) & (run["attack"] == "LF")
    made = Simulation(
        algorithm(run), task.start(run["seed"]), N, run["seed"], run["lr"], LIARS, attack
    )
    labels, partition = task.y.cpu(), HonestSplit(LIARS)
    stream = batches(labels, N, run["batch"], run["seed"], partition)
    # all liars hold the same
    parts = [torch.as_tensor(part) for part in partition(labels, N, run["seed"])[: N - LIARS + 1]]

    def gradients(round: Round, cohort: Tensor) -> Sequence[Gradients]:
        if run["method"] == WHOLE:
            *honest, liar = (
                task.whole_gradient(made.w, part, bool(flip[i])) for i, part in enumerate(parts)
            )
            return [Gradients(row) for row in honest] + [Gradients(liar)] * LIARS
        index = next(stream)
        if made.exchange.algorithm.full_gradient(round):
            more = [index, *(next(stream) for _ in range(FULL_BATCHES - 1))]
            return [
                Gradients(row)
                for row in sum(task.gradients(made.w, i, flip) for i in more) / FULL_BATCHES
            ]
        now = task.gradients(made.w, index, flip)
        if not made.exchange.algorithm.needs_previous:
            return [Gradients(row) for row in now]
        return [
            Gradients(*rows)
            for rows in zip(now, task.gradients(made.before, index, flip), strict=True)
        ]

    curves: Run = {"round": [], "megabytes": [], "accuracy": []}
    for step in range(run["rounds"] + 1):
        if step % (run["rounds"] // POINTS) == 0:
            for name, value in zip(
                curves, (step, made.bytes_up / 1e6, task.test(made.w)[1]), strict=True
            ):
                curves[name].append(value)
        made.step(gradients)
    return curves


def all_runs(full: bool) -> dict[str, list[Run]]:
    """The grid, by question; what comes first is run first."""
    if full:
        main = MAIN | {"rounds": 5000}
        everything = [
            main | {"method": m, "attack": a, "rule": r, "lr": lr, "seed": seed}
            for seed in range(3)
            for lr in (*RATES, 0.005)
            for r in RULES
            for a in ATTACKS
            for m in COMPARED
        ]
        return {"everything": everything}
    methods = [
        MAIN | {"method": m, "attack": a, "lr": lr, "seed": seed}
        for seed in range(SEEDS)
        for a in ATTACKS
        for lr in RATES
        for m in COMPARED
    ]
    rules = [
        MAIN | {"method": OURS, "attack": a, "rule": r, "lr": lr, "seed": seed}
        for seed in range(SEEDS)
        for lr in RATES
        for r in ("RFA", "CM")
        for a in ATTACKS
    ]
    return {"methods and attacks": methods, "rules": rules}


def settled(results: Sequence[Run]) -> Tensor:
    """The mean accuracy over the last fifth of every run."""
    ends = [result["accuracy"][-(POINTS // 5) :] for result in results]
    return torch.tensor([sum(end) / len(end) for end in ends], dtype=torch.float64)


def best(results: list[tuple[Run, Run]], rates: Sequence[float], **fields: Any) -> list[Run]:
    """The results at the step size that does best, as the paper chooses it for each method: by the
    mean accuracy over the run.
    """
    found = [pick(results, **fields, lr=lr) for lr in rates]
    return max(
        (f for f in found if f),
        key=lambda f: sum(sum(r["accuracy"]) for r in f) / len(f),
        default=[],
    )


def report(results: list[tuple[Run, Run]], rates: Sequence[float]) -> str:
    find = partial(best, results, rates)
    ends = {
        m: {a: settled(find(method=m, attack=a, rule="CWTM")) for a in ATTACKS} for m in COMPARED
    }
    rows = []
    for method in PAPERS[2:]:  # the first two are the paper's own
        pairs = {
            a: (ends[OURS][a], ends[method][a])
            for a in ATTACKS
            if len(ends[OURS][a]) and len(ends[method][a])
        }
        won = {a: float(mine.mean() - other.mean()) for a, (mine, other) in pairs.items()}
        measured = ", ".join(f"{a}: {points:+.1f}" for a, points in won.items())
        # A difference below a point is within what two seeds differ by.
        holds = (
            None
            if not won
            else "**holds**"
            if min(won.values()) >= 1
            else "**not clear**"
            if min(won.values()) > -1
            else None
        )
        rows.append(
            [f"more accurate than: {method}", measured, holds or verdict(False if won else None)]
        )
    clean = ends[OURS]["none"]
    lost = {
        a: float(clean.mean() - v.mean())
        for a, v in ends[OURS].items()
        if a != "none" and len(v) and len(clean)
    }
    measured = ", ".join(f"{a}: {points:.1f}" for a, points in lost.items())
    rows.append(
        [
            "9 of 20 lie: at most 5 points lost under every attack",
            measured,
            verdict(max(lost.values()) <= 5 if lost else None),
        ]
    )
    rows.append(["the same with ResNet-20, and on FEMNIST", "", verdict(None)])
    text = markdown(
        ["paper's claim", f"our measurement: points of {OURS} above it", "holds?"], rows
    )
    accuracies = [[m, *(spread(ends[m][a], ".1f") for a in ATTACKS)] for m in COMPARED]
    text += "\nTest accuracy over the last fifth of a run, in percent, NNM and trimmed mean, each at its best step size:\n\n"
    text += markdown(["method", *ATTACKS], accuracies)
    rules = [
        [r, *(spread(settled(find(method=OURS, attack=a, rule=r)), ".1f") for a in ATTACKS)]
        for r in RULES
    ]
    text += f"\n{OURS}, by rule:\n\n" + markdown(["rule behind NNM", *ATTACKS], rules)
    steps = [
        [
            m,
            *(
                spread(settled(pick(results, method=m, attack="SF", rule="CWTM", lr=lr)), ".1f")
                for lr in rates
            ),
        ]
        for m in COMPARED
    ]
    return (
        text
        + "\nBy step size:\n\n"
        + markdown(["SF, CWTM", *(f"step size {lr}" for lr in rates)], steps)
    )


def draw(results: list[tuple[Run, Run]], rates: Sequence[float]) -> Any:
    drawing, axes = figure(3, 2)
    for attack, here in zip(ATTACKS, axes.flat, strict=False):
        here.set(xlabel="round", ylabel="test accuracy, %", title=f"attack: {attack}", ylim=(0, 60))
        for place, method in enumerate(COMPARED):
            band(
                here,
                best(results, rates, method=method, attack=attack, rule="CWTM"),
                "round",
                "accuracy",
                method,
                place,
            )
    lines, labels = axes[0, 0].get_legend_handles_labels()
    axes[1, 2].axis("off")
    axes[1, 2].legend(lines, labels, loc="center", title="20 workers, 9 Byzantine, batch 64")
    return drawing


def main() -> None:
    arguments = parser(__doc__, "ef21_images").parse_args()
    grid = all_runs(arguments.full)
    size = ", ".join(f"{name} {len(runs)}" for name, runs in grid.items())
    print(f"{'The full grid' if arguments.full else 'A reduced grid'}: {size}")
    runs = sorted((run for part in grid.values() for run in part), key=lambda run: run["seed"])
    rates = sorted({run["lr"] for run in runs})
    results = measure(runs, partial(train, data=arguments.data, device=arguments.device), arguments)
    publish(report(results, rates), results, draw(results, rates), arguments.output)


if __name__ == "__main__":
    main()
