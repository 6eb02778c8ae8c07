"""The pictures of docs/concepts.md, computed with this package's rules and attacks on made-up
gradients.

python benchmarks/concepts.py [--output docs/images]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_byz import ALIE, IPM, NNM, Chain, CoordinateMedian, Krum, Mean, SignFlip, TrimmedMean
from lightning_byz.aggregators import Aggregator
from lightning_byz.attacks import Attack

# Okabe and Ito's, apart for the colour-blind
HONEST, LIAR, MEAN, ROBUST = "#0072B2", "#D55E00", "#E69F00", "#009E73"
RULES: dict[str, tuple[Aggregator, str, str]] = {
    "mean": (Mean(), MEAN, ":"),
    "median": (CoordinateMedian(), "#56B4E9", "-."),
    "Krum": (Krum(definition="byzfl"), "#CC79A7", "--"),
    "NNM + trimmed mean": (Chain(pre=(NNM(),), rule=TrimmedMean()), ROBUST, "-"),
}
ROBUST_RULE = RULES["NNM + trimmed mean"][0]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scatter(axes: Axes, honest: Tensor, lies: Tensor, title: str, clip: float) -> None:
    """Honest messages and lies as points in a plane, with what the mean and a robust rule make of
    all of them.
    """
    rows = torch.cat([honest, lies])
    points = [
        (honest, {"color": HONEST, "marker": "o", "s": 28, "label": "honest workers"}),
        (
            lies,
            {"color": LIAR, "marker": "X", "s": 60, "label": f"{len(lies)} liars, at one place"},
        ),
        (honest.mean(0)[None], {"color": "black", "marker": "+", "s": 130, "label": "honest mean"}),
        (
            rows.mean(0)[None],
            {"color": MEAN, "marker": "v", "s": 90, "edgecolor": "black", "label": "mean of all"},
        ),
        (
            ROBUST_RULE.with_f(len(lies))(rows)[None],
            {
                "color": ROBUST,
                "marker": "s",
                "s": 70,
                "edgecolor": "black",
                "label": "robust result",
            },
        ),
    ]
    for xy, style in points:
        axes.scatter(*xy.T.tolist(), **style)
    axes.axhline(0, color="0.85", zorder=0), axes.axvline(0, color="0.85", zorder=0)
    axes.set(
        title=title, xlim=(-clip, clip), ylim=(-clip, clip), aspect="equal", xticks=[], yticks=[]
    )


def legend_below(figure: Figure, axes: Axes) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.2,
    )


def error(rule: Aggregator, attack: Attack, honest: Tensor, liars: int, f: int) -> float:
    """Distance of the rule's result from the honest mean, over the length of that mean."""
    rows = torch.cat([honest, attack(honest, honest[:liars])]) if liars else honest
    result = (rule if isinstance(rule, Mean) else rule.with_f(f))(rows)
    return float((result - honest.mean(0)).norm() / honest.mean(0).norm())


def threat() -> Figure:
    """A lie that is easily told, and one that hides."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    honest = torch.tensor([1.0, 0.6]) + 0.5 * normal(3, 7, 2)
    scatter(
        left,
        honest,
        SignFlip(scale=3.0)(honest, honest[:3]),
        "a blatant lie: minus 3 times the mean",
        3.6,
    )
    scatter(right, honest, ALIE(z=1.5)(honest, honest[:3]), "a lie that hides: ALIE", 3.6)
    legend_below(figure, left)
    return figure


def number() -> Figure:
    """The error against the number of liars, for rules that are told f = 3 of n = 10."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    n, d, trials = 10, 1000, 20
    for name, (rule, color, line) in RULES.items():
        curve = []
        for liars in range(6):
            worst = [
                max(
                    error(rule, attack, 1 + 2 * normal(seed, n - liars, d), liars, f=3)
                    for attack in (SignFlip(10.0), ALIE(1.5), IPM(0.1))
                )
                for seed in range(trials)
            ]
            curve.append(sum(worst) / trials)
        axes.plot(range(6), curve, line, color=color, marker="o", markersize=4, label=name)
    axes.axvline(3, color="0.6", linewidth=1, zorder=0)
    axes.annotate(
        "f = 3",
        (3, 0.97),
        xycoords=("data", "axes fraction"),
        ha="right",
        va="top",
        rotation=90,
        color="0.4",
    )
    axes.set(
        xlabel="liars among 10 workers", ylabel="error / length of the honest mean", ylim=(0, 4)
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def heterogeneity() -> Figure:
    """Unlike workers leave room for lies."""
    figure = Figure(figsize=(8, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    honest = torch.tensor([1.0, 0.6]) + 1.3 * normal(3, 7, 2)
    scatter(left, honest, ALIE(z=1.5)(honest, honest[:3]), "unlike workers, the same attack", 3.6)
    left.legend(loc="upper left", frameon=False, fontsize="x-small")
    spreads = [0.0, 0.5, 1.0, 2.0, 3.0, 4.0]
    for name, (rule, color, line) in RULES.items():
        curve = [
            sum(
                max(
                    error(rule, attack, 1 + spread * normal(seed, 7, 1000), 3, f=3)
                    for attack in (ALIE(1.5), IPM(0.1))
                )
                for seed in range(20)
            )
            / 20
            for spread in spreads
        ]
        right.plot(spreads, curve, line, color=color, marker="o", markersize=4, label=name)
    right.set(
        xlabel="spread of honest workers / length of the true gradient",
        ylabel="error / length of the honest mean",
        ylim=(0, None),
    )
    right.set_title("3 liars of 10, the worse of ALIE and IPM")
    right.legend(frameon=False, fontsize="small")
    right.spines[["top", "right"]].set_visible(False)
    return figure


def momentum() -> Figure:
    """The same workers, whose noise momentum averages away."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    truth, steps, beta = torch.tensor([1.0, 0.6]), 60, 0.9
    gradients = truth + 1.3 * normal(8, steps, 7, 2)
    mean = gradients[0]
    for gradient in gradients[1:]:
        mean = beta * mean + (1 - beta) * gradient
    left, right = figure.subplots(1, 2)
    for axes, honest, title in (
        (left, gradients[-1], "gradients of one step"),
        (right, mean, "worker momentum 0.9"),
    ):
        scatter(axes, honest, SignFlip(scale=1.0)(honest, honest[:3]), title, 3.6)
    legend_below(figure, left)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for name, picture in {
        "threat": threat,
        "f": number,
        "heterogeneity": heterogeneity,
        "momentum": momentum,
    }.items():
        picture().savefig(output / f"concepts-{name}.png", dpi=110)


if __name__ == "__main__":
    main()
