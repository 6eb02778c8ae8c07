"""Local steps (FedAvg, DiLoCo) with liars: 12 workers on the digits and on Fashion-MNIST, accuracy
against the bytes that a worker sends.

    python benchmarks/reproduce/local_steps.py --data DIR [--full]
    [--output runs/reproduce/local_steps] [--jobs 2]

DIR holds FashionMNIST/raw; the digits come with scikit-learn. Every exchange is the package's own
`Exchange` over in-process workers, and the outer optimizer is torch's. The workers' local steps are
computed in one pass, which is what a Trainer with `LocalSteps` computes one after the other
(`tests/test_reproductions.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _shared import COLOURS, STYLES, figure, last, markdown, measure, parser, pick, publish
from torch import nn
from torch.func import grad, vmap

from lightning_byz.aggregators import (
    NNM,
    Chain,
    Mean,
    MedianNormClipping,
    SpectralFilter,
    TrimmedMean,
)
from lightning_byz.algorithms import EF14, Algorithm, RobustSGD
from lightning_byz.attacks import ALIE, IPM, Attack, LabelFlip, MinMax, SignFlip
from lightning_byz.compressors import TopK
from lightning_byz.data import IID, Dirichlet
from lightning_byz.engine.adversary import Adversary
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import Contribution
from lightning_byz.engine.simulation import Simulation
from lightning_byz.transports import InProcess
from lightning_byz.types import Gradients

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defaults import Model, load

Run = dict[str, Any]

N, F, BATCH, STEPS = 12, 3, 16, 500
METHODS: dict[str, Algorithm] = {
    "averaging": RobustSGD(Mean()),
    "median norm clipping": RobustSGD(Chain(pre=(MedianNormClipping(),), rule=Mean(), f=F)),
    "NNM + trimmed mean": RobustSGD(Chain(pre=(NNM(),), rule=TrimmedMean(), f=F)),
    "SpectralFilter": RobustSGD(SpectralFilter(f=F)),
    "SpectralFilter, Top-5 %": EF14(SpectralFilter(f=F), TopK(ratio=0.05)),
}
ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "SignFlip": SignFlip(1.0),
    "SignFlip(10)": SignFlip(10.0),
    "ALIE": ALIE(z=1.5),
    "IPM(0.5)": IPM(0.5),
    "MinMax": MinMax(),
    "LabelFlip": None,  # of their labels
}
PARTITIONS = {"iid": IID(), "Dirichlet(0.3)": Dirichlet(0.3)}
TASKS = ("digits", "fashion-mnist")


class Kind(NamedTuple):
    """What workers do between exchanges, and what is made of them.

    Attributes:
        inner: makes the workers' optimizer, given the task.
        outer: makes the outer optimizer.
        lengths: numbers of local steps.
    """

    inner: Any
    outer: Any
    lengths: tuple[int, ...]


RATES = {"digits": 0.1, "fashion-mnist": 0.05}
KINDS = {
    "FedAvg": Kind(
        lambda task: partial(torch.optim.SGD, lr=RATES[task]),
        partial(torch.optim.SGD, lr=1.0),
        (1, 10, 50),
    ),
    "DiLoCo": Kind(
        lambda task: partial(torch.optim.AdamW, lr=2e-3),
        partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True),
        (10, 50),
    ),
}


@cache
def model(task: str, data: str, seed: int) -> Model:
    """An MLP with 64 hidden units."""
    return Model("mlp", load(task, data)[0].shape[-1], seed)


def train(run: Run, data: str) -> Run:
    """Test accuracy in percent, and the megabytes that a worker has sent, at the end."""
    torch.set_num_threads(1)
    x, y, x_test, y_test = load(run["task"], data)
    net, kind, liars = model(run["task"], data, run["seed"]), KINDS[run["kind"]], range(N - F, N)
    gradients = vmap(grad(net.loss))  # of every worker at its own parameters, [n, d]
    parts = PARTITIONS[run["partition"]](y, N, run["seed"])
    w = nn.Parameter(net.start.clone())
    own = nn.Parameter(w.detach().repeat(N, 1))  # elementwise optimizers: n of them in one
    outer, inner = kind.outer([w]), kind.inner(run["task"])([own])
    transport = InProcess()
    transport.connect(0, 1, N, w.device)
    exchange = Exchange(METHODS[run["method"]], transport, run["seed"])
    exchange.simulation = faults = Simulation()
    attack, used = ATTACKS[run["attack"]], torch.ones(1, dtype=torch.uint8)
    if attack is not None:
        faults.adversaries.append(Adversary(attack, liars, x=lambda index: w.detach()))
    draws, sent = torch.Generator().manual_seed(run["seed"]), 0
    for step in range(1, STEPS + 1):
        picked = torch.stack(
            [part[torch.randint(len(part), (BATCH,), generator=draws)] for part in parts]
        )
        labels = y[picked]
        if run["attack"] == "LabelFlip":
            labels[list(liars)] = LabelFlip(10).flip(labels[list(liars)])
        own.grad = gradients(own.detach(), x[picked], labels)
        inner.step()
        if step % run["local_steps"]:
            continue
        differences = w.detach() - own.detach()
        outcome = exchange.run([Contribution(Gradients(d), used) for d in differences], w.detach())
        sent += outcome.bytes_up
        if outcome.estimate is not None:
            w.grad = outcome.estimate
            outer.step()
        own.data.copy_(w.detach().expand(N, -1))
    with torch.no_grad():
        right = net(w, x_test).argmax(1) == y_test
    return {"megabytes": [sent / 1e6], "accuracy": [100 * right.double().mean().item()]}


def all_runs(full: bool) -> list[Run]:
    return [
        {
            "task": task,
            "partition": partition,
            "kind": kind,
            "local_steps": length,
            "method": method,
            "attack": attack,
            "seed": seed,
            "trained": f"batch {BATCH}, {STEPS} steps",
        }
        for seed, task, partition, (kind, settings), method, attack in product(
            range(3 if full else 1), TASKS, PARTITIONS, KINDS.items(), METHODS, ATTACKS
        )
        for length in settings.lengths
    ]


def ways() -> list[tuple[str, int]]:
    """Kinds with their numbers of local steps."""
    return [(kind, length) for kind, settings in KINDS.items() for length in settings.lengths]


def cell(results: Sequence[tuple[Run, Run]], **fields: Any) -> str:
    """The accuracy with nobody lying, and that under the worst attack, by name."""
    clean = last(pick(results, attack="none", **fields), "accuracy")
    ends = {a: last(pick(results, attack=a, **fields), "accuracy") for a in ATTACKS if a != "none"}
    if not len(clean) or not all(map(len, ends.values())):
        return ""
    worst = min(ends, key=lambda attack: float(ends[attack].mean()))
    return f"{clean.mean():.1f}, {ends[worst].mean():.1f} ({worst})"


def report(results: list[tuple[Run, Run]]) -> str:
    """One table for each task and partition."""
    text = ""
    for task, partition in product(TASKS, PARTITIONS):
        here = {"task": task, "partition": partition}
        rows = []
        for kind, length in ways():
            now = {**here, "kind": kind, "local_steps": length}
            sent = [
                float(last(pick(results, method=method, attack="none", **now), "megabytes").mean())
                for method in METHODS
            ]
            rows.append(
                [
                    kind,
                    length,
                    f"{sent[0]:.3g}, {sent[-1]:.3g}",
                    *(cell(results, method=method, **now) for method in METHODS),
                ]
            )
        text += f"\n{task}, {partition}:\n\n"
        text += markdown(["", "H", "MB sent", *METHODS], rows)
    return text


def draw(results: list[tuple[Run, Run]]) -> Any:
    """Accuracy under the worst of the attacks against the bytes sent."""
    drawing, panels = figure(len(PARTITIONS), len(TASKS))
    for row, task in zip(panels, TASKS, strict=True):
        for axes, partition in zip(row, PARTITIONS, strict=True):
            axes.set(
                xscale="log",
                xlabel="MB that a worker sends",
                ylabel="accuracy, worst of six attacks, %",
                title=f"{task}, {partition}",
                ylim=(0, 100),
            )
            for place, (method, kind) in enumerate(product(METHODS, KINDS)):
                colour = COLOURS[place // len(KINDS)]
                points = []
                for length in KINDS[kind].lengths:
                    here = partial(
                        pick,
                        results,
                        task=task,
                        partition=partition,
                        kind=kind,
                        local_steps=length,
                        method=method,
                    )
                    ends = [last(here(attack=a), "accuracy") for a in ATTACKS if a != "none"]
                    if not all(map(len, ends)):
                        continue
                    sent = float(last(here(attack="none"), "megabytes").mean())
                    points.append((sent, min(float(end.mean()) for end in ends)))
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        color=colour,
                        linestyle=STYLES[list(KINDS).index(kind)],
                        marker="o" if kind == "FedAvg" else "s",
                        label=f"{method}, {kind}",
                    )
    panels[0][0].legend(fontsize=6)
    return drawing


def main() -> None:
    arguments = parser(__doc__, "local_steps").parse_args()
    results = measure(all_runs(arguments.full), partial(train, data=arguments.data), arguments)
    publish(report(results), results, draw(results), arguments.output)


if __name__ == "__main__":
    main()
