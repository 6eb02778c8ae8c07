"""Slow, obvious rules on lists of lists of Python floats, written from the definitions and sharing nothing with the package."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

Matrix = list[list[float]]
Oracle = Callable[[Matrix, int], list[float]]


def mean(rows: Matrix, f: int) -> list[float]:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def median(rows: Matrix, f: int) -> list[float]:
    out = []
    for column in zip(*rows, strict=True):
        ordered = sorted(column)
        n = len(ordered)
        out.append(ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2)
    return out


def trimmed_mean(rows: Matrix, f: int) -> list[float]:
    out = []
    for column in zip(*rows, strict=True):
        left = list(column)
        for _ in range(f):
            left.remove(min(left))
            left.remove(max(left))
        out.append(math.fsum(left) / len(left))
    return out


def squared_distance(a: list[float], b: list[float]) -> float:
    return math.fsum((p - q) ** 2 for p, q in zip(a, b, strict=True))


def krum_order(rows: Matrix, f: int) -> list[int]:
    """The rows' indices from the smallest Krum score to the largest."""
    n = len(rows)
    scores = []
    for i in range(n):
        others = sorted(squared_distance(rows[i], rows[j]) for j in range(n) if j != i)
        scores.append(math.fsum(others[: n - f - 2]))
    return sorted(range(n), key=lambda i: (scores[i], i))


def krum(rows: Matrix, f: int) -> list[float]:
    return list(rows[krum_order(rows, f)[0]])


def multi_krum(m: int | None = None) -> Oracle:
    def rule(rows: Matrix, f: int) -> list[float]:
        chosen = krum_order(rows, f)[: m or len(rows) - f - 2]
        return mean([rows[i] for i in chosen], f)

    return rule


def nnm(rows: Matrix, f: int) -> Matrix:
    """Every row replaced by the mean of its n - f nearest, itself included."""
    n, mixed = len(rows), []
    for i in range(n):
        nearest = sorted(range(n), key=lambda j: (squared_distance(rows[i], rows[j]), j))[: n - f]
        mixed.append(mean([rows[j] for j in nearest], f))
    return mixed


def chain(*pre: Callable[[Matrix, int], Matrix], rule: Oracle) -> Oracle:
    def composed(rows: Matrix, f: int) -> list[float]:
        for part in pre:
            rows = part(rows, f)
        return rule(rows, f)

    return composed


def nearest_to(center: float, column: list[float], keep: int) -> list[float]:
    return sorted(column, key=lambda value: (abs(value - center), value))[:keep]


def meamed(rows: Matrix, f: int) -> list[float]:
    kept = [nearest_to(m, list(column), len(rows) - f) for m, column in zip(median(rows, f), zip(*rows, strict=True), strict=True)]
    return [math.fsum(values) / len(values) for values in kept]


def phocas(rows: Matrix, f: int) -> list[float]:
    centers = trimmed_mean(rows, f)
    kept = [nearest_to(c, list(column), len(rows) - f) for c, column in zip(centers, zip(*rows, strict=True), strict=True)]
    return [math.fsum(values) / len(values) for values in kept]


def norm(x: list[float]) -> float:
    return math.sqrt(math.fsum(v * v for v in x))


def cge(rows: Matrix, f: int) -> list[float]:
    order = sorted(range(len(rows)), key=lambda i: (norm(rows[i]), i))
    return mean([rows[i] for i in order[: len(rows) - f]], f)


def faba(rows: Matrix, f: int) -> list[float]:
    left = list(rows)
    for _ in range(f):
        center = mean(left, f)
        distances = [squared_distance(row, center) for row in left]
        left.pop(distances.index(max(distances)))
    return mean(left, f)


def aksel(half: bool) -> Oracle:
    def rule(rows: Matrix, f: int) -> list[float]:
        center, n = median(rows, f), len(rows)
        order = sorted(range(n), key=lambda i: (squared_distance(rows[i], center), i))
        return mean([rows[i] for i in order[: math.ceil(n / 2) if half else n - f]], f)

    return rule


def mda(rows: Matrix, f: int) -> list[float]:
    def diameter(subset: tuple[int, ...]) -> float:
        return max((squared_distance(rows[i], rows[j]) for i, j in itertools.combinations(subset, 2)), default=0.0)

    best = min(itertools.combinations(range(len(rows)), len(rows) - f), key=diameter)  # the first of the smallest
    return mean([rows[i] for i in best], f)


def bulyan(rows: Matrix, f: int) -> list[float]:
    left, picked = list(rows), []
    for _ in range(len(rows) - 2 * f):
        winner = 0 if len(left) < 3 else krum_order(left, min(f, len(left) - 3))[0]
        picked.append(left.pop(winner))
    keep = len(picked) - 2 * f
    centers = median(picked, f)
    kept = [nearest_to(c, list(column), keep) for c, column in zip(centers, zip(*picked, strict=True), strict=True)]
    return [math.fsum(values) / len(values) for values in kept]


def weiszfeld(rows: Matrix, start: list[float], iterations: int, nu: float) -> list[float]:
    z = list(start)
    for _ in range(iterations):
        weights = [1 / max(nu, math.sqrt(squared_distance(row, z))) for row in rows]
        total = math.fsum(weights)
        z = [math.fsum(w * v for w, v in zip(weights, column, strict=True)) / total for column in zip(*rows, strict=True)]
    return z


def rfa(iterations: int, nu: float) -> Oracle:
    return lambda rows, f: weiszfeld(rows, [0.0] * len(rows[0]), iterations, nu)


def geometric_median(rows: Matrix, f: int) -> list[float]:
    """Many small steps of Weiszfeld's algorithm, from the median."""
    return weiszfeld(rows, median(rows, f), 3000, 1e-12)


def clipped_to(limits: Callable[[Matrix, int], float]) -> Callable[[Matrix, int], Matrix]:
    def clip(rows: Matrix, f: int) -> Matrix:
        limit = limits(rows, f)
        return [[v * min(1.0, limit / norm(row)) for v in row] if norm(row) else list(row) for row in rows]

    return clip


def arc_limit(rows: Matrix, f: int) -> float:
    n = len(rows)
    return sorted((norm(row) for row in rows), reverse=True)[math.floor(2 * f / n * (n - f) + 1e-9)]


def bucketing(s: int) -> Callable[[Matrix, int], Matrix]:
    """Means of buckets of s, in the order in which a fresh generator of seed 0 shuffles."""

    def rule(rows: Matrix, f: int) -> Matrix:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        return [mean([rows[i] for i in order[first : first + s]], f) for first in range(0, len(rows), s)]

    return rule
