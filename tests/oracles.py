"""Slow, obvious rules on lists of lists of Python floats, written from the definitions and sharing
nothing with the package.
"""

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
    kept = [
        nearest_to(m, list(column), len(rows) - f)
        for m, column in zip(median(rows, f), zip(*rows, strict=True), strict=True)
    ]
    return [math.fsum(values) / len(values) for values in kept]


def phocas(rows: Matrix, f: int) -> list[float]:
    centers = trimmed_mean(rows, f)
    kept = [
        nearest_to(c, list(column), len(rows) - f)
        for c, column in zip(centers, zip(*rows, strict=True), strict=True)
    ]
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
        return max(
            (squared_distance(rows[i], rows[j]) for i, j in itertools.combinations(subset, 2)),
            default=0.0,
        )

    def spread(subset: tuple[int, ...]) -> float:
        return math.fsum(
            squared_distance(rows[i], rows[j]) for i, j in itertools.combinations(subset, 2)
        )

    best = min(
        itertools.combinations(range(len(rows)), len(rows) - f),
        key=lambda subset: (diameter(subset), spread(subset)),
    )
    return mean([rows[i] for i in best], f)


def bulyan(rows: Matrix, f: int) -> list[float]:
    left, picked = list(rows), []
    for _ in range(len(rows) - 2 * f):
        # ties are broken by counting one more neighbour, and one more
        def score(i: int) -> list[float]:
            others = sorted(squared_distance(left[i], left[j]) for j in range(len(left)) if j != i)
            return [
                math.fsum(others[:k])
                for k in range(max(0, len(others) + 1 - f - 2), len(others) + 1)
            ]

        picked.append(left.pop(min(range(len(left)), key=score)))
    keep = len(picked) - 2 * f
    centers = median(picked, f)
    kept = [
        nearest_to(c, list(column), keep)
        for c, column in zip(centers, zip(*picked, strict=True), strict=True)
    ]
    return [math.fsum(values) / len(values) for values in kept]


def weiszfeld(rows: Matrix, start: list[float], iterations: int, nu: float) -> list[float]:
    z = list(start)
    for _ in range(iterations):
        weights = [1 / max(nu, math.sqrt(squared_distance(row, z))) for row in rows]
        total = math.fsum(weights)
        z = [
            math.fsum(w * v for w, v in zip(weights, column, strict=True)) / total
            for column in zip(*rows, strict=True)
        ]
    return z


def rfa(iterations: int, nu: float) -> Oracle:
    return lambda rows, f: weiszfeld(rows, [0.0] * len(rows[0]), iterations, nu)


def geometric_median(rows: Matrix, f: int) -> list[float]:
    """Many small steps of Weiszfeld's algorithm, from the median."""
    return weiszfeld(rows, median(rows, f), 3000, 1e-12)


def clipped_to(limits: Callable[[Matrix, int], float]) -> Callable[[Matrix, int], Matrix]:
    def clip(rows: Matrix, f: int) -> Matrix:
        limit = limits(rows, f)
        return [
            [v * min(1.0, limit / norm(row)) for v in row] if norm(row) else list(row)
            for row in rows
        ]

    return clip


def lower_median_norm(rows: Matrix, f: int) -> float:
    return sorted(norm(row) for row in rows)[(len(rows) - 1) // 2]


def arc_limit(rows: Matrix, f: int) -> float:
    n = len(rows)
    return sorted((norm(row) for row in rows), reverse=True)[math.floor(2 * f / n * (n - f) + 1e-9)]


def bucketing(s: int) -> Callable[[Matrix, int], Matrix]:
    """Means of buckets of s, in the order in which a fresh generator of seed 0 shuffles."""

    def rule(rows: Matrix, f: int) -> Matrix:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        return [
            mean([rows[i] for i in order[first : first + s]], f) for first in range(0, len(rows), s)
        ]

    return rule


def krum_of(fewer: int, power: int, kept: int | None = None) -> Oracle:
    """Krum (``kept`` None) or Multi-Krum of n - f - kept rows, with n - f - fewer neighbours and
    distances to a power.
    """

    def rule(rows: Matrix, f: int) -> list[float]:
        n, scores = len(rows), []
        for i in range(n):
            others = sorted(
                math.sqrt(squared_distance(rows[i], rows[j])) ** power for j in range(n) if j != i
            )
            scores.append(math.fsum(others[: n - f - fewer]))
        order = sorted(range(n), key=lambda i: (scores[i], i))
        return mean([rows[i] for i in order[: 1 if kept is None else n - f - kept]], f)

    return rule


def top_eigenpair(matrix: Matrix) -> tuple[float, list[float]]:
    values, vectors = torch.linalg.eigh(torch.tensor(matrix, dtype=torch.float64))
    return float(values[-1]), vectors[:, -1].tolist()


def covariance(rows: Matrix, weights: list[float]) -> tuple[list[float], Matrix]:
    """The weighted mean and covariance ``[d, d]``."""
    total, d = math.fsum(weights), len(rows[0])
    mu = [
        math.fsum(w * row[k] for w, row in zip(weights, rows, strict=True)) / total
        for k in range(d)
    ]

    def entry(k: int, m: int) -> float:
        return (
            math.fsum(
                w * (row[k] - mu[k]) * (row[m] - mu[m])
                for w, row in zip(weights, rows, strict=True)
            )
            / total
        )

    return mu, [[entry(k, m) for m in range(d)] for k in range(d)]


def along(row: list[float], mu: list[float], v: list[float]) -> float:
    return math.fsum((a - b) * c for a, b, c in zip(row, mu, v, strict=True))


def smea(rows: Matrix, f: int) -> list[float]:
    def spread(subset: tuple[int, ...]) -> float:
        return top_eigenpair(covariance([rows[i] for i in subset], [1.0] * len(subset))[1])[0]

    best = min(itertools.combinations(range(len(rows)), len(rows) - f), key=spread)
    return mean([rows[i] for i in best], f)


def caf(rows: Matrix, f: int, norm_floor: float = 0.0) -> list[float]:
    norms = [math.sqrt(squared_distance(row, [0.0] * len(row))) for row in rows]
    order, floor = (
        sorted(range(len(rows)), key=lambda i: norms[i]),
        norm_floor * sorted(norms)[(len(rows) - 1) // 2],
    )
    c, best, out = (
        [
            0.0 if i in order[: min(f, len(rows) - 2 * f - 1)] and norms[i] < floor else 1.0
            for i in range(len(rows))
        ],
        math.inf,
        rows[0],
    )
    taken = len(rows) - round(math.fsum(c))
    while math.fsum(c) > len(rows) - taken - 2 * f or math.isinf(best):
        mu, cov = covariance(rows, c)
        value, v = top_eigenpair(cov)
        effective = math.fsum(c) ** 2 / math.fsum(weight**2 for weight in c)
        if taken:
            value = value * effective / (effective - 1) if effective - 1 > 1e-9 else math.inf
        if value < best:
            best, out = value, mu
        tau = [
            along(row, mu, v) ** 2 if weight > 0 else 0.0
            for row, weight in zip(rows, c, strict=True)
        ]
        if max(tau) == 0:
            break
        c = [weight * less(t / max(tau)) for weight, t in zip(c, tau, strict=True)]
    return out


def less(part: float) -> float:
    """What a row keeps; those that tie with the farthest keep nothing."""
    return 0.0 if part > 1 - 1e-9 else 1 - part


def spectral_filter(rows: Matrix, f: int, share: float, norm_floor: float) -> list[float]:
    n = len(rows)
    if f == 0:
        return mean(rows, f)
    norms = [math.sqrt(squared_distance(row, [0.0] * len(row))) for row in rows]
    radius = sorted(norms)[(n - 1) // 2]
    clipped = [
        [x * (radius / norm if norm > radius else 1.0) for x in row]
        for row, norm in zip(rows, norms, strict=True)
    ]
    usual = sorted(
        sorted(squared_distance(a, b) for j, b in enumerate(clipped) if j != i)[(n - 2) // 2]
        for i, a in enumerate(clipped)
    )[(n - 1) // 2]
    limit = (1 + share * n) * min(0.75 * usual, radius**2)
    shortest = sorted(range(n), key=lambda i: norms[i])[: min(f, n - 2 * f - 1)]
    c = [float(i not in shortest or norms[i] >= norm_floor * radius) for i in range(n)]
    least = math.fsum(c) - 2 * f
    while True:
        mu, cov = covariance(clipped, c)
        value, v = top_eigenpair(cov)
        tau = [
            along(row, mu, v) ** 2 if weight > 0 else 0.0
            for row, weight in zip(clipped, c, strict=True)
        ]
        if value * math.fsum(c) <= limit or max(tau) == 0:
            return mu
        fewer = [weight * less(t / max(tau)) for weight, t in zip(c, tau, strict=True)]
        if math.fsum(fewer) < least:
            return mu
        c = fewer


def dnc(rows: Matrix, f: int) -> list[float]:
    """One iteration on all coordinates."""
    mu, cov = covariance(rows, [1.0] * len(rows))
    v = top_eigenpair(cov)[1]
    order = sorted(range(len(rows)), key=lambda i: (along(rows[i], mu, v) ** 2, i))
    return mean([rows[i] for i in order[: len(rows) - f]], f)


def monna(rows: Matrix, f: int) -> list[float]:
    order = sorted(range(len(rows)), key=lambda i: (squared_distance(rows[i], rows[0]), i))
    return mean([rows[i] for i in order[: len(rows) - f]], f)


def centered_clip(tau: float, iterations: int, start: Oracle | None = None) -> Oracle:
    def rule(rows: Matrix, f: int) -> list[float]:
        v, n = [0.0] * len(rows[0]) if start is None else start(rows, f), len(rows)
        for _ in range(iterations):
            factors = [
                min(1.0, tau / d) if (d := math.sqrt(squared_distance(row, v))) else 1.0
                for row in rows
            ]
            v = [
                old + math.fsum(s * (x - old) for s, x in zip(factors, column, strict=True)) / n
                for old, column in zip(v, zip(*rows, strict=True), strict=True)
            ]
        return v

    return rule


def majority_vote(tie: float) -> Oracle:
    def rule(rows: Matrix, f: int) -> list[float]:
        sums = [
            sum(-1 if value < 0 else 1 for value in column) for column in zip(*rows, strict=True)
        ]
        return [math.copysign(1.0, total) if total else tie for total in sums]

    return rule


def sign_guard(rows: Matrix, f: int) -> list[float]:
    """The block of a fresh generator of seed 0; clusters by scikit-learn."""
    from sklearn.cluster import MeanShift

    n, d = len(rows), len(rows[0])
    size = max(1, math.floor(0.1 * d))
    first = int(torch.randint(d - size + 1, (1,), generator=torch.Generator().manual_seed(0)))
    shares = []
    for row in rows:
        block = row[first : first + size]
        shares.append(
            [
                float(sum(v > 0 for v in block)),
                float(sum(v == 0 for v in block)),
                float(sum(v < 0 for v in block)),
            ]
        )
    shares = [
        [v / (max(column) or 1.0) for v, column in zip(row, zip(*shares, strict=True), strict=True)]
        for row in shares
    ]
    distances = [sorted(math.sqrt(squared_distance(a, b)) for b in shares) for a in shares]
    bandwidth = math.fsum(row[max(1, n // 2) - 1] for row in distances) / n
    labels = MeanShift(bandwidth=bandwidth).fit(shares).labels_ if bandwidth else None
    groups = (
        {tuple(row): 0 for row in shares} if labels is None else dict.fromkeys(labels.tolist(), 0)
    )
    for key in [tuple(row) for row in shares] if labels is None else labels.tolist():
        groups[key] += 1
    largest = max(groups, key=lambda key: groups[key])
    cluster = [
        i for i in range(n) if (tuple(shares[i]) if labels is None else int(labels[i])) == largest
    ]
    limit = median([[norm(row)] for row in rows], f)[0]
    passed = [i for i in cluster if 0.1 * limit < norm(rows[i]) < 3 * limit] or cluster
    return mean([[v * min(1.0, limit / norm(rows[i])) for v in rows[i]] for i in passed], f)


def auto_gm(strength: float | None = None) -> Oracle:
    """Alternating minimisation, with the weights by bisection instead of the closed form."""

    def rule(rows: Matrix, f: int) -> list[float]:
        n = len(rows)
        lam, a, z = n if strength is None else strength, [1 / n] * n, median(rows, f)
        for _ in range(100):
            for _ in range(300):
                beta = [
                    w / max(1e-12, math.sqrt(squared_distance(row, z)))
                    for w, row in zip(a, rows, strict=True)
                ]
                total = math.fsum(beta)
                z = [
                    math.fsum(b * v for b, v in zip(beta, column, strict=True)) / total
                    for column in zip(*rows, strict=True)
                ]
            distances = [math.sqrt(squared_distance(row, z)) for row in rows]
            low, high = min(distances), max(distances) + lam
            for _ in range(200):
                eta = (low + high) / 2
                low, high = (
                    (eta, high) if sum(max(eta - d, 0) for d in distances) < lam else (low, eta)
                )
            a = [max(low - d, 0) / lam for d in distances]
        return z

    return rule
