"""dSTAR on Fashion-MNIST and CIFAR-10: 20 workers, of which the server waits for the first k, f of
those Byzantine and the first to arrive.

    python benchmarks/reproduce/dstar.py --data DIR [--full] [--output runs/reproduce/dstar] [--jobs
    2]

DIR holds FashionMNIST/raw and cifar-10-batches-py. Rounds are the package's own `Exchange`; delays
are 1 s + Exp(1 s), drawn for every worker and round. The baselines are the same algorithm with
another rule in the filter's place, and so see the same k messages.
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
    last,
    markdown,
    measure,
    parser,
    pick,
    publish,
    spread,
    verdict,
)
from torch import Tensor

from lightning_byz.aggregators import (
    Aggregator,
    Bulyan,
    CoordinateMedian,
    Krum,
    Mean,
    MultiKrum,
    TrimmedMean,
)
from lightning_byz.algorithms import DeviationFilter, DStar
from lightning_byz.attacks import ALIE, IPM, Gaussian, Infinity, LabelFlip, SignFlip
from lightning_byz.data import IID
from lightning_byz.types import Gradients, Round, keyed_generator

Run = dict[str, Any]

N = 20
TASKS: dict[str, Run] = {
    "Fashion-MNIST": {"batch": 32, "hidden": 32, "lr": 0.1, "rounds": 120},
    "CIFAR-10": {"data": "cifar10", "batch": 32, "lr": 0.1, "rounds": 400},
}
FULL: dict[str, Run] = {
    "Fashion-MNIST": {"rounds": 4000, "hidden": 128},
    "CIFAR-10": {"rounds": 10_000},
}
RULES: dict[str, Aggregator] = {
    "dSTAR": DeviationFilter(),
    "mean": Mean(),
    "median": CoordinateMedian(),
    "trimmed mean": TrimmedMean(),
    "Krum": Krum(),
    "Multi-Krum": MultiKrum(),
    "Bulyan": Bulyan(),
}
ROBUST = tuple(RULES)[2:]
VARIANTS: dict[str, DeviationFilter] = {  # the last two with a trusted batch, of one worker's size
    "dSTAR, tolerance 1": DeviationFilter(tolerance=1.0),
    "dSTAR, trusted batch": DeviationFilter(),
    "dSTAR, reading 'trusted'": DeviationFilter(reading="trusted"),
}
TRUSTED = tuple(VARIANTS)[1:]
ATTACKS = {
    "none": None,
    "SF": SignFlip(1.0),
    "SF(10)": SignFlip(10.0),
    "ALIE": ALIE(),
    "IPM(0.5)": IPM(0.5),
    "Gaussian": Gaussian(std=1.0),
    "LF": LabelFlip(10),
    "Inf": Infinity(),
}
REDUCED = ("none", "SF", "ALIE", "IPM(0.5)", "LF", "Inf")
POINTS = 20


def rule(run: Run) -> Aggregator | None:
    """The rule, with its f of the k messages; None if it cannot take so many liars of so few."""
    made = {**RULES, **VARIANTS}[run["rule"]]
    if isinstance(made, Mean):
        return made
    return made.with_f(run["f"]) if made.most_f(run["k"]) >= run["f"] else None


@cache
def images(name: str, data: str, hidden: int, device: str) -> Classifier:
    return Classifier(name, data, hidden, device)


def train(run: Run, data: str, device: str) -> Run:
    """The test accuracy along one run, against rounds and against simulated seconds."""
    torch.set_num_threads(1)
    task, aggregator, f = (
        images(run.get("data", "fashion_mnist"), data, run.get("hidden", 0), device),
        rule(run),
        run["f"],
    )
    assert aggregator is not None
    start = task.start(run["seed"])
    made = Simulation(
        DStar(aggregator, k=run["k"]), start, N, run["seed"], run["lr"], f, ATTACKS[run["attack"]]
    )
    stream = batches(task.y, N, run["batch"], run["seed"], IID())
    generator = keyed_generator("trusted", run["seed"])
    flip = (torch.arange(N) >= N - f) & (run["attack"] == "LF")

    def gradients(round: Round, cohort: Tensor) -> Sequence[Gradients | None]:
        index, found = next(stream)[cohort], [None] * N
        for row, worker in zip(
            task.gradients(made.w, index, flip[cohort]),
            cohort.nonzero().flatten().tolist(),
            strict=True,
        ):
            found[worker] = Gradients(row)
        return found

    curves: Run = {"round": [], "seconds": [], "accuracy": []}
    for step in range(run["rounds"] + 1):
        if step % (run["rounds"] // POINTS) == 0:
            for name, value in zip(curves, (step, made.seconds, task.test(made.w)[1]), strict=True):
                curves[name].append(value)
        trusted = None
        if run["rule"] in TRUSTED:
            (trusted,) = task.gradients(
                made.w, torch.randint(len(task.y), (1, run["batch"]), generator=generator)
            )
        made.step(gradients, trusted)
    return curves


def all_runs(full: bool) -> list[Run]:
    """Every rule that can take f of k, without attack and under each."""
    pairs = (
        [(f, k) for f in (0, 3, 6) for k in (20, 16, 13) if k > 2 * f]
        if full
        else [(0, 20), (0, 13), (3, 16), (6, 13)]
    )
    runs = [
        main
        | (FULL[task] if full else {})
        | {"f": f, "k": k, "attack": attack, "rule": name, "seed": seed}
        for seed in range(3 if full else 2)
        for task, main in TASKS.items()
        for f, k in pairs
        for attack in ((ATTACKS if full else REDUCED) if f else ("none",))
        for name in (((*RULES, *VARIANTS) if full or f == 6 else RULES) if f else ("dSTAR", "mean"))
    ]
    return [run for run in runs if rule(run) is not None]


def losses(
    results: list[tuple[Run, Run]], name: str, reference: float, **fields: Any
) -> dict[str, float]:
    """By attack, the points of accuracy that a rule is below the reference."""
    found = {
        a: last(pick(results, rule=name, attack=a, **fields), "accuracy")
        for a in ATTACKS
        if a != "none"
    }
    return {a: reference - float(v.mean()) for a, v in found.items() if len(v)}


def worst(lost: dict[str, float]) -> str:
    return max(lost, key=lost.__getitem__)


def claims(task: str, results: list[tuple[Run, Run]]) -> list[list[str]]:
    """The claims' lines for one task."""
    end = lambda **fields: pick(results, **fields)  # noqa: E731
    reference = float(last(end(rule="mean", f=0, k=20, attack="none"), "accuracy").mean())
    rows = []
    for f, k in sorted({(run["f"], run["k"]) for run, _ in results if run["f"]}):
        setting, find = (
            f"{task}, f = {f}, k = {k}",
            partial(losses, results, reference=reference, f=f, k=k),
        )
        lost = find("dSTAR")
        if not lost:
            continue
        rows.append(
            [
                f"{setting}: dSTAR loses little (5 points at most) under every attack",
                f"at most {lost[worst(lost)]:.1f} ({worst(lost)})",
                verdict(lost[worst(lost)] <= 5),
            ]
        )
        broken = {
            f"{name} loses {{:.1f}} ({a})": loss
            for name in ROBUST
            for a, loss in find(name).items()
        }
        if broken:
            loss = broken[worst(broken)]
            rows.append(
                [
                    f"{setting}: a robust baseline loses 40 points",
                    worst(broken).format(loss),
                    verdict(loss >= 40),
                ]
            )
        for variant in VARIANTS:
            other = find(variant)
            if other:
                rows.append(
                    [
                        f"(ours: the same, {variant})",
                        f"at most {other[worst(other)]:.1f} ({worst(other)})",
                        "",
                    ]
                )
    if not rows:
        return [[f"{task}: dSTAR loses little, others 40 points", "", verdict(None)]]
    rounds = max(run["rounds"] for run, _ in results)
    times = {
        k: float(last(end(rule="dSTAR", f=0, k=k), "seconds").mean()) / rounds for k in (20, 13)
    }
    known = all(t == t for t in times.values())
    measured = (
        ", ".join(f"k = {k}: {seconds:.2f} s" for k, seconds in times.items()) + " (nobody lies)"
    )
    rows.append(
        [
            f"{task}: the round time falls with k",
            measured,
            verdict(times[13] < times[20] if known else None),
        ]
    )
    return rows


def accuracies(task: str, results: list[tuple[Run, Run]]) -> str:
    """The table of one task."""

    def cell(name: str, **fields: Any) -> str:
        setting = {"rule": name, **fields}
        return spread(last(pick(results, **setting), "accuracy"), ".1f") if rule(setting) else "n/a"

    table = [
        [f, k, a, *(cell(name, f=f, k=k, attack=a) for name in (*RULES, *VARIANTS))]
        for f, k in sorted({(run["f"], run["k"]) for run, _ in results})
        for a in (ATTACKS if f else ("none",))
        if pick(results, f=f, k=k, attack=a)
    ]
    header = f"\n{task}, test accuracy at the end, in percent, mean of seeds (range):\n\n"
    return header + markdown(["f", "k", "attack", *RULES, *VARIANTS], table)


def of(task: str, results: list[tuple[Run, Run]]) -> list[tuple[Run, Run]]:
    """The results for one task."""
    return [pair for pair in results if pair[0].get("data") == TASKS[task].get("data")]


def report(results: list[tuple[Run, Run]]) -> str:
    rows = [row for task in TASKS for row in claims(task, of(task, results))]
    text = markdown(
        ["claim", "our measurement: points of test accuracy below clean averaging", "holds?"], rows
    )
    return text + "".join(accuracies(task, of(task, results)) for task in TASKS)


def draw(results: list[tuple[Run, Run]]) -> Any:
    drawing, axes = figure(3, 3)
    for here, (task, attack) in zip(
        axes.flat, [(t, a) for t in TASKS for a in ("SF", "ALIE", "IPM(0.5)")], strict=False
    ):
        for place, name in enumerate(RULES):
            band(
                here,
                pick(of(task, results), rule=name, f=3, k=16, attack=attack),
                "round",
                "accuracy",
                name,
                place,
            )
        here.set(
            xlabel="round",
            ylabel="test accuracy, %",
            title=f"{task}: 3 of the first 16 lie: {attack}",
        )
    axes[0, 0].legend(fontsize=7)
    for here, task in zip(axes[2], TASKS, strict=False):
        for place, name in enumerate(RULES):
            band(
                here,
                pick(of(task, results), rule=name, f=6, k=13, attack="ALIE"),
                "round",
                "accuracy",
                name,
                place,
            )
        here.set(
            xlabel="round", ylabel="test accuracy, %", title=f"{task}: 6 of the first 13 lie: ALIE"
        )
        here.legend(fontsize=7)
    for place, (task, k) in enumerate((task, k) for task in TASKS for k in (20, 13)):
        clean = pick(of(task, results), rule="dSTAR", f=0, k=k, attack="none")
        band(axes[2, 2], clean, "seconds", "accuracy", f"{task}, k = {k}", place)
    axes[2, 2].set(
        xlabel="simulated seconds",
        ylabel="test accuracy, %",
        title="accuracy against time, nobody lies",
    )
    axes[2, 2].legend(fontsize=7)
    for here in axes.flat:
        here.set_ylim(0, 90)
    return drawing


def main() -> None:
    arguments = parser(__doc__, "dstar").parse_args()
    runs = all_runs(arguments.full)
    print(f"{'The full grid' if arguments.full else 'A reduced grid'}: {len(runs)} runs")
    results = measure(runs, partial(train, data=arguments.data, device=arguments.device), arguments)
    publish(report(results), results, draw(results), arguments.output)


if __name__ == "__main__":
    main()
