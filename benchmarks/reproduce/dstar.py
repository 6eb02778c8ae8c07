"""dSTAR on Fashion-MNIST: 20 workers, of which the server waits for the first k, f of those Byzantine and the first to arrive.

    python benchmarks/reproduce/dstar.py --data DIR [--full] [--output runs/reproduce/dstar] [--jobs 2]

DIR holds FashionMNIST/raw. Rounds are the package's own `Exchange`; delays are 1 s + Exp(1 s), drawn for every worker and round. The
baselines are the same algorithm with another rule in the filter's place, and so see the same k messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from _shared import (
    Simulation,
    band,
    batches,
    fashion_mnist,
    figure,
    last,
    markdown,
    measure,
    mlp_gradients,
    parser,
    pick,
    publish,
    spread,
    verdict,
)
from defaults import initial, mlp
from torch import Tensor

from lightning_byz.aggregators import Aggregator, Bulyan, CoordinateMedian, Krum, Mean, MultiKrum, TrimmedMean
from lightning_byz.algorithms import DeviationFilter, DStar
from lightning_byz.attacks import ALIE, IPM, Gaussian, Infinity, LabelFlip, SignFlip
from lightning_byz.data import IID
from lightning_byz.types import Gradients, Round, keyed_generator

Run = dict[str, Any]

N = 20
MAIN: Run = {"batch": 32, "hidden": 32, "lr": 0.1, "rounds": 120}
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
def images(data: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fashion_mnist(data)


def train(run: Run, data: str) -> Run:
    """The test accuracy along one run, against rounds and against simulated seconds."""
    torch.set_num_threads(1)
    x, y, x_test, y_test = images(data)
    sizes, aggregator, f = [x.shape[1], run["hidden"], 10], rule(run), run["f"]
    assert aggregator is not None
    torch.manual_seed(run["seed"])
    made = Simulation(DStar(aggregator, k=run["k"]), initial(sizes), N, run["seed"], run["lr"], f, ATTACKS[run["attack"]])
    stream = batches(y, N, run["batch"], run["seed"], IID())
    generator = keyed_generator("trusted", run["seed"])
    flip = (torch.arange(N) >= N - f) & (run["attack"] == "LF")

    def gradients(round: Round, cohort: Tensor) -> Sequence[Gradients | None]:
        index, found = next(stream)[cohort], [None] * N
        labels = torch.where(flip[cohort][:, None], 9 - y[index], y[index])
        rows = mlp_gradients(made.w, x[index], labels, sizes)
        for row, worker in zip(rows, cohort.nonzero().flatten().tolist(), strict=True):
            found[worker] = Gradients(row)
        return found

    curves: Run = {"round": [], "seconds": [], "accuracy": []}
    for step in range(run["rounds"] + 1):
        if step % (run["rounds"] // POINTS) == 0:
            accuracy = 100 * float((mlp(made.w, x_test, sizes).argmax(1) == y_test).double().mean())
            for name, value in zip(curves, (step, made.seconds, accuracy), strict=True):
                curves[name].append(value)
        trusted = None
        if run["rule"] in TRUSTED:
            index = torch.randint(len(y), (1, run["batch"]), generator=generator)
            (trusted,) = mlp_gradients(made.w, x[index], y[index], sizes)
        made.step(gradients, trusted)
    return curves


def all_runs(full: bool) -> list[Run]:
    """Every rule that can take f of k, without attack and under each."""
    main = MAIN | ({"rounds": 4000, "hidden": 128} if full else {})
    pairs = [(f, k) for f in (0, 3, 6) for k in (20, 16, 13) if k > 2 * f] if full else [(0, 20), (0, 13), (3, 16), (6, 13)]
    runs = [
        main | {"f": f, "k": k, "attack": attack, "rule": name, "seed": seed}
        for seed in range(3 if full else 2)
        for f, k in pairs
        for attack in ((ATTACKS if full else REDUCED) if f else ("none",))
        for name in (((*RULES, *VARIANTS) if full or f == 6 else RULES) if f else ("dSTAR", "mean"))
    ]
    return [run for run in runs if rule(run) is not None]


def report(results: list[tuple[Run, Run]]) -> str:
    find = partial(pick, results)
    end = lambda **fields: last(find(**fields), "accuracy")  # noqa: E731
    pairs = sorted({(run["f"], run["k"]) for run, _ in results})
    attacked = [pair for pair in pairs if pair[0]]
    reference = float(end(rule="mean", f=0, k=20, attack="none").mean())

    def losses(name: str, f: int, k: int) -> dict[str, float]:
        found = {a: end(rule=name, f=f, k=k, attack=a) for a in ATTACKS if a != "none"}
        return {a: reference - float(v.mean()) for a, v in found.items() if len(v)}

    def cell(name: str, f: int, k: int, attack: str) -> str:
        return spread(end(rule=name, f=f, k=k, attack=attack), ".1f") if rule({"rule": name, "f": f, "k": k}) else "n/a"

    rows = []
    for f, k in attacked:
        lost = losses("dSTAR", f, k)
        if not lost:
            continue
        worst = max(lost, key=lost.__getitem__)
        rows.append(
            [
                f"f = {f}, k = {k}: dSTAR loses little (5 points at most) under every attack",
                f"at most {lost[worst]:.1f} ({worst})",
                verdict(lost[worst] <= 5),
            ]
        )
        broken = {(name, a): loss for name in ROBUST for a, loss in losses(name, f, k).items()}
        if broken:
            name, attack = max(broken, key=broken.__getitem__)
            loss = broken[name, attack]
            rows.append(
                [f"f = {f}, k = {k}: a robust baseline loses 40 points", f"{name} loses {loss:.1f} ({attack})", verdict(loss >= 40)]
            )
        for variant in VARIANTS:
            other = losses(variant, f, k)
            if other:
                worst = max(other, key=other.__getitem__)
                rows.append([f"(ours: the same, {variant})", f"at most {other[worst]:.1f} ({worst})", ""])
    times = {k: float(last(find(rule="dSTAR", f=0, k=k), "seconds").mean()) / MAIN["rounds"] for k in (20, 13)}
    rows.append(
        [
            "the round time falls with k",
            ", ".join(f"k = {k}: {seconds:.2f} s" for k, seconds in times.items()) + " (nobody lies)",
            verdict(times[13] < times[20] if all(t == t for t in times.values()) else None),
        ]
    )
    rows.append(["the same on CIFAR-10", "", verdict(None)])
    table = [
        [
            f,
            k,
            a,
            *(cell(name, f, k, a) for name in (*RULES, *VARIANTS)),
        ]
        for f, k in pairs
        for a in (ATTACKS if f else ("none",))
        if find(f=f, k=k, attack=a)
    ]
    return (
        markdown(["claim", "our measurement: points of test accuracy below clean averaging", "holds?"], rows)
        + f"\nTest accuracy at the end, in percent, mean of seeds (range); clean averaging of all 20: {reference:.1f}.\n\n"
        + markdown(["f", "k", "attack", *RULES, *VARIANTS], table)
    )


def draw(results: list[tuple[Run, Run]]) -> Any:
    find = partial(pick, results)
    drawing, axes = figure(3, 2)
    for attack, here in zip(("SF", "ALIE", "IPM(0.5)", "LF"), axes.flat, strict=False):
        for place, name in enumerate(RULES):
            band(here, find(rule=name, f=3, k=16, attack=attack), "round", "accuracy", name, place)
        here.set(xlabel="round", ylabel="test accuracy, %", ylim=(0, 90), title=f"3 of the first 16 lie: {attack}")
    axes[0, 0].legend(fontsize=7)
    for place, (f, k) in enumerate(((0, 20), (0, 13))):
        band(axes[1, 1], find(rule="dSTAR", f=f, k=k, attack="none"), "seconds", "accuracy", f"k = {k}, nobody lies", place)
    axes[1, 1].set(xlabel="simulated seconds", ylabel="test accuracy, %", title="accuracy against time")
    for place, name in enumerate(RULES):
        band(axes[1, 2], find(rule=name, f=6, k=13, attack="ALIE"), "round", "accuracy", name, place)
    axes[1, 2].set(xlabel="round", ylabel="test accuracy, %", ylim=(0, 90), title="6 of the first 13 lie: ALIE")
    for here in (axes[1, 1], axes[1, 2]):
        here.legend(fontsize=7)
    return drawing


def main() -> None:
    arguments = parser(__doc__, "dstar").parse_args()
    runs = all_runs(arguments.full)
    print(f"{'The full grid' if arguments.full else 'A reduced grid'}: {len(runs)} runs")
    results = measure(runs, partial(train, data=arguments.data), arguments)
    publish(report(results), results, draw(results), arguments.output)


if __name__ == "__main__":
    main()
