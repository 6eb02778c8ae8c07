"""SignGuard: compare rows by their norms and by the signs of their coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_byz.aggregators.base import WeightedAggregator
from lightning_byz.numerics.rows import Rows


@dataclass(frozen=True)
class SignGuard(WeightedAggregator):
    """The mean of the rows whose norm is ordinary and whose signs agree with most others', clipped
    to the median norm.

    Xu, Huang, Song, Lan, ICDCS 2022 (arXiv 2109.05872), the plain variant. Rows pass if their norm
    lies between ``low`` and ``high`` times the median norm, and if they belong to the largest
    cluster (mean shift, with a bandwidth that reaches half of the rows) by the shares of positive,
    zero and negative coordinates, each divided by its largest value, in a random contiguous block
    of coordinates. Where no row passes both, which the paper leaves open, those of the cluster
    count. Needs n > 2f, and does not use f otherwise. Its result is never longer than the median
    norm, but rows inside these bounds can still turn it: it has no bound by the honest rows'
    spread.

    The block is drawn from ``rows.generator``, which a run sets anew in every round, the same on
    every rank; rows without one (a plain matrix) always get the same.

    Args:
        low: smallest norm that passes, in median norms, exclusive.
        high: largest norm that passes, in median norms, exclusive.
        share: size of the block, as a share of all coordinates, in (0, 1].
    """

    clips: ClassVar[bool] = True

    low: float = 0.1
    high: float = 3.0
    share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low < 1 < self.high:
            raise ValueError(
                f"Norms between `low` < 1 and `high` > 1 times the median pass. Found {self.low} "
                f"and {self.high}."
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"`share` of the coordinates should be in (0, 1]. Found {self.share}.")

    def weights(self, rows: Rows) -> Tensor:
        norms = rows.squared_norms().sqrt()
        ordered = norms.sort().values
        median = (ordered[(len(rows) - 1) // 2] + ordered[len(rows) // 2]) / 2
        agree = largest_cluster(self._sign_shares(rows))
        ordinary = (norms > self.low * median) & (norms < self.high * median)
        passed = agree & ordinary if bool((agree & ordinary).any()) else agree
        factors = torch.where(
            norms > median, median / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0
        )
        return torch.where(passed, factors, 0.0) / passed.sum()

    def _sign_shares(self, rows: Rows) -> Tensor:
        """``[n, 3]`` features in [0, 1]."""
        dim = rows.values.shape[1] if rows.dim is None else rows.dim
        size = max(1, math.floor(self.share * dim))
        stream = rows.stream
        first = int(torch.randint(dim - size + 1, (1,), generator=stream, device=stream.device))
        counts = torch.zeros(len(rows), 3, dtype=torch.float64, device=rows.values.device)
        for _, _, block in rows.span(first, first + size).blocks():
            counts += torch.stack([(block > 0).sum(1), (block == 0).sum(1), (block < 0).sum(1)], 1)
        counts = rows.agree(rows.sum(counts))
        return counts / counts.amax(0).clamp_min(1)


def largest_cluster(points: Tensor) -> Tensor:
    """``[n]`` bool: the members of the largest cluster of ``points [n, p]`` by mean shift with a
    flat kernel.

    Comaniciu, Meer, IEEE TPAMI 2002. The bandwidth is the mean distance of the points to their
    floor(n / 2)-th nearest, themselves included; every point climbs to the mean of the points
    within it until it moves by less than 1e-3 of it; peaks closer than the bandwidth are one; a
    point belongs to the nearest peak. That is scikit-learn's MeanShift with
    ``estimate_bandwidth(quantile=0.5)``.
    """
    n = len(points)
    gaps = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    bandwidth = float(gaps.sort(dim=1).values[:, max(1, n // 2) - 1].mean())
    if bandwidth == 0.0:  # half of the points, or more, are equal
        return gaps[(gaps == 0).sum(1).argmax()] == 0
    peaks, reach = points.clone(), torch.zeros(n, dtype=torch.int64, device=points.device)
    climbing = torch.ones(n, dtype=torch.bool, device=points.device)
    for _ in range(300):
        within = (
            torch.cdist(peaks, points, compute_mode="donot_use_mm_for_euclid_dist") <= bandwidth
        )
        reach = torch.where(climbing, within.sum(1), reach)
        moved = within.double() @ points / within.sum(1, keepdim=True)
        climbing &= torch.linalg.vector_norm(moved - peaks, dim=1) > 1e-3 * bandwidth
        peaks = torch.where(climbing[:, None], moved, peaks)
        if not bool(climbing.any()):
            break
    order = sorted(
        range(n), key=lambda i: (-int(reach[i]), *(-value for value in peaks[i].tolist()))
    )
    kept: list[int] = []
    for i in order:
        if all(float(torch.linalg.vector_norm(peaks[i] - peaks[j])) > bandwidth for j in kept):
            kept.append(i)
    labels = torch.cdist(points, peaks[kept], compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    return labels == torch.bincount(labels).argmax()
