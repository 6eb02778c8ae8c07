"""How far from the true gradient dSTAR's filter ends up, by reading and tolerance: the table of
docs/algorithms/dstar.md.

    python benchmarks/dstar_filter.py

The true gradient has norm 1, every worker's noise has norm ``spread``, the trusted gradient's is
half of that. Printed are the error's mean over the attacks, and the worst of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_byz import (
    ALIE,
    IPM,
    BitFlip,
    CoordinateMedian,
    DeviationFilter,
    Gaussian,
    Krum,
    MinMax,
    MinSum,
    SignFlip,
    TrimmedMean,
    Zero,
)  # fmt: skip

ATTACKS = [
    SignFlip(), SignFlip(scale=10), IPM(0.1), IPM(1.0), ALIE(z=1.5), Gaussian(std=10.0), MinMax(), MinSum(), Zero(), BitFlip(),
]  # fmt: skip
TOLERANCES = (1.0, 1.2, 1.5, 2.0)
SEEDS = 6

Rule = Callable[[int, Tensor], Callable[[Tensor], Tensor]]
"""(f, trusted gradient) -> rule."""

RULES: dict[str, Rule] = {
    **{f"ensemble, tolerance {t}": lambda f, v, t=t: DeviationFilter(f, t) for t in TOLERANCES},
    **{
        f"ensemble and trusted data, tolerance {t}": lambda f, v, t=t: DeviationFilter(
            f, t, trusted=v
        )
        for t in TOLERANCES
    },
    **{
        f"trusted, tolerance {t}": lambda f, v, t=t: DeviationFilter(
            f, t, reading="trusted", trusted=v
        )
        for t in TOLERANCES
    },
    "trimmed mean": lambda f, v: TrimmedMean(f),
    "coordinate-wise median": lambda f, v: CoordinateMedian(f),
    "Krum": lambda f, v: Krum(f),
}


def errors(rule: Rule, k: int, f: int, d: int, unlike: bool) -> list[float]:
    """``||result - true gradient||`` for every attack, averaged over seeds."""
    means = []
    for attack in ATTACKS:
        total = 0.0
        for seed in range(SEEDS):
            generator = torch.Generator().manual_seed(seed)

            def around(rows: int, generator: torch.Generator = generator) -> Tensor:
                return torch.randn(rows, d, generator=generator, dtype=torch.float64) / math.sqrt(d)

            truth = around(1)[0]
            truth /= truth.norm()
            spread = 1 + 2 * unlike * torch.rand(k - f, 1, generator=generator, dtype=torch.float64)
            honest = truth + spread * around(k - f)
            lies = attack(honest, truth + around(f), generator)
            trusted = truth + around(1)[0] / 2
            total += float((rule(f, trusted)(torch.cat([honest, lies])) - truth).norm())
        means.append(total / SEEDS)
    return means


def main() -> None:
    for k, f in ((16, 3), (13, 6)):
        for d in (20, 2000):
            for unlike in (False, True):
                print(f"\nk = {k}, f = {f}, d = {d}, noise {'of 1 to 3' if unlike else 'of 1'}")
                for name, rule in RULES.items():
                    if name == "Krum" and k < 2 * f + 3:
                        continue
                    means = errors(rule, k, f, d, unlike)
                    print(
                        f"  {name:42s} mean {sum(means) / len(means):.2f}   worst {max(means):.2f}"
                    )


if __name__ == "__main__":
    main()
