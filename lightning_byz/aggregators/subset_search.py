"""Rules that search all subsets of n - f rows for the one that belongs together best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_byz.aggregators.base import WeightedAggregator, equal_weights
from lightning_byz.aggregators.medoid import around_medoid
from lightning_byz.numerics.rows import Rows


@dataclass(frozen=True)
class MDA(WeightedAggregator):
    """The mean of the n - f rows of smallest diameter: minimum diameter averaging.

    Rousseeuw 1985; El Mhamdi, Guerraoui, Guirguis, Hoang, Rouault, PODC 2020 (arXiv 1905.03853).
    Needs n > 2f. Of several subsets with the same diameter, which the definition leaves open, the
    one with the smallest sum of squared distances is taken, so that the order of the rows does not
    matter.

    No subset is visited that holds two rows too far from each other: for a given diameter, the rows
    to leave out are a vertex cover, of size f, of the graph of pairs that are farther apart, and a
    bounded search tree finds all of these. The smallest diameter is found by bisection over the n
    (n - 1) / 2 distances.
    """

    compares_rows: ClassVar[bool] = True

    def weights(self, rows: Rows) -> Tensor:
        assert self.f is not None
        n, f = len(rows), self.f
        distances = rows.squared_distances().cpu()
        levels = sorted(set(distances[torch.triu_indices(n, n, 1).unbind()].tolist()))
        low, high = 0, len(levels) - 1
        while low < high:
            middle = (low + high) // 2
            if next(_covers(_farther(distances, levels[middle]), f), None) is None:
                low = middle + 1
            else:
                high = middle
        graph = _farther(distances, levels[low]) if levels else [0] * n
        best = min(
            (_completed(cover, distances, f) for cover in _covers(graph, f)),
            key=lambda kept: _spread(kept, distances),
        )
        return equal_weights(torch.tensor(best, device=rows.values.device), n)


def _farther(distances: Tensor, limit: float) -> list[int]:
    """For every row the bit set of the rows that are farther from it than the limit."""
    return [sum(1 << j for j, far in enumerate(row) if far) for row in (distances > limit).tolist()]


def _covers(graph: list[int], budget: int, removed: int = 0) -> Iterator[int]:
    """Bit sets of at most ``budget`` rows without which no edge is left, each as often as the
    search meets it.
    """
    left = [0 if removed >> i & 1 else neighbours & ~removed for i, neighbours in enumerate(graph)]
    degree, vertex = max((neighbours.bit_count(), -i) for i, neighbours in enumerate(left))
    vertex = -vertex
    edges = sum(neighbours.bit_count() for neighbours in left) // 2
    if edges == 0:
        yield removed
    elif edges <= budget * degree:  # every row that is left out covers `degree` edges at most
        if degree <= budget:  # leave out all its neighbours
            yield from _covers(graph, budget - degree, removed | left[vertex])
        yield from (
            cover
            for cover in _covers(graph, budget - 1, removed | 1 << vertex)
            if degree > budget or left[vertex] & ~cover
        )


def _completed(cover: int, distances: Tensor, f: int) -> list[int]:
    """The n - f rows outside a cover; where it is smaller than f (distances tie), the farthest from
    the others go too.
    """
    kept = [i for i in range(len(distances)) if not cover >> i & 1]
    while len(kept) > len(distances) - f:
        kept.pop(int(distances[kept][:, kept].sum(1).argmax()))
    return kept


def _spread(kept: list[int], distances: Tensor) -> float:
    return float(distances[kept][:, kept].sum())


@dataclass(frozen=True)
class SMEA(WeightedAggregator):
    """The mean of the n - f rows whose covariance has the smallest largest eigenvalue: smallest
    maximum eigenvalue averaging.

    Allouah, Guerraoui, Gupta, Pinot, Stephan, ICML 2023 (arXiv 2302.04787). Needs n > 2f, and
    visits all binom(n, f) subsets, so more than a million of them are refused. The eigenvalue is
    that of the subset's n - f inner products, exact to rounding; ByzFL estimates it by one step of
    a power iteration from a random start.
    """

    compares_rows: ClassVar[bool] = True

    most_subsets: ClassVar[int] = 1_000_000
    many_subsets: ClassVar[int] = 20_000

    def most_f(self, n: int) -> int:
        return next(
            (f for f in range((n - 1) // 2, 0, -1) if math.comb(n, f) <= self.most_subsets),
            min(0, n - 1),
        )

    def check(self, n: int) -> None:
        if self.f is not None and self.most_f(n) < self.f <= (n - 1) // 2:
            raise ValueError(
                f"SMEA visits every subset of n - f rows, at most {self.most_subsets:,} of them. "
                f"Found binom({n}, {self.f}) = {math.comb(n, self.f):,}. Use f <= "
                f"{self.most_f(n)}, or CAF, which needs no search."
            )
        super().check(n)

    def caveat(self, n: int) -> str | None:
        assert self.f is not None
        subsets = math.comb(n, self.f)
        if subsets <= self.many_subsets:
            return None
        return (
            f"SMEA with f={self.f} searches {subsets:,} subsets of n={n} rows in every step, some "
            "10,000 a second. Use a smaller num_byzantine, or CAF, which needs no search."
        )

    def weights(self, rows: Rows) -> Tensor:
        assert self.f is not None
        n, keep = len(rows), len(rows) - self.f
        products = around_medoid(rows, self.f).cpu()
        best, chosen = math.inf, tuple(range(keep))
        subsets = itertools.combinations(range(n), keep)
        while batch := list(itertools.islice(subsets, 4096)):
            index = torch.tensor(batch)
            among = products[index[:, :, None], index[:, None, :]]  # [subsets, n - f, n - f]
            centred = (
                among
                - among.mean(1, keepdim=True)
                - among.mean(2, keepdim=True)
                + among.mean((1, 2), keepdim=True)
            )
            largest = torch.linalg.eigvalsh(centred)[:, -1]
            if float(largest.min()) < best:
                best, chosen = float(largest.min()), batch[int(largest.argmin())]
        return equal_weights(torch.tensor(chosen, device=rows.values.device), n)
