"""Slow, obvious rules on lists of lists of Python floats, written from the definitions and sharing nothing with the package."""

from __future__ import annotations

import math
from collections.abc import Callable

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
