"""CenteredClip: start from the last result, and let every row pull by no more than tau."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_byz.aggregators.base import Aggregator
from lightning_byz.numerics.order_statistics import median_of_rows
from lightning_byz.numerics.rows import Rows


@dataclass(frozen=True)
class CenteredClip(Aggregator):
    """Moves from its last result towards the rows, each of which pulls by at most tau / n.

    ``v = v + (1/n) sum_i (x_i - v) min(1, tau / ||x_i - v||)``, L times, from v = the last result
    (0 in the first round). Karimireddy, He, Jaggi, ICML 2021 (arXiv 2012.10333). Needs n > 2f, and
    does not use f otherwise. Any f rows move one step by at most 2 f tau / n, however large they
    are; but tau has to fit the honest rows' spread, and the first results follow a gradient that is
    longer than tau slowly.

    Args:
        tau: the largest pull, > 0, in the units of the rows. epfml's code uses 10, ByzFL 100.
        iterations: L. epfml's code uses 3, ByzFL 1, Blades 5.
        start: "last", the paper's, or "median": the coordinate-wise median of this round's rows,
            which remembers nothing (ours).
    """

    tau: float = 10.0
    iterations: int = 1
    start: Literal["last", "median"] = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau > 0:
            raise ValueError(f"`tau`, the largest pull, should be positive. Found tau={self.tau}.")
        if self.iterations < 1:
            raise ValueError(f"`iterations` should be at least 1. Found {self.iterations}.")
        if self.start not in ("last", "median"):
            raise ValueError(f"`start` should be 'last' or 'median'. Found {self.start!r}.")

    @property
    def bears_unlike_data(self) -> bool:
        return True

    @property
    def remembers(self) -> bool:
        return self.start == "last"

    def aggregate(self, rows: Rows) -> Tensor:
        n, v, tau = len(rows), self._start(rows), self.tau / rows.unit
        for _ in range(self.iterations):
            distances = rows.squared_distances_to(v).sqrt()
            pulls = torch.where(distances > tau, tau / distances, 1.0) / n
            moved = rows.combine(pulls)
            v = moved if v is None else moved.add_(v, alpha=1 - float(pulls.sum()))
        assert v is not None
        return v

    def _start(self, rows: Rows) -> Tensor | None:
        """Where v starts; None: at the origin."""
        return rows.map(median_of_rows) if self.start == "median" else rows.last
