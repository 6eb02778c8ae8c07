"""The same over many rounds: torchmetrics' Metric classes, for loops of your own and for
``self.log``.

All ranks see the same rounds, so what ranks are to agree on is the same number everywhere: it is
averaged over ranks, never added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_byz.metrics import functional as F


class _MeanOverRounds(Metric):
    """The mean of a number per round, over all rounds."""

    full_state_update = False
    total: Tensor
    rounds: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="mean")
        self.add_state("rounds", torch.zeros((), dtype=torch.float64), dist_reduce_fx="mean")

    def _add(self, value: Tensor) -> None:
        self.total += value
        self.rounds += 1

    def compute(self) -> Tensor:
        return self.total / self.rounds


class AggregationError(_MeanOverRounds):
    """Mean over rounds of `functional.aggregation_error`."""

    higher_is_better = False

    def update(self, aggregate: Tensor, honest: Tensor) -> None:
        """A round's aggregate ``[d]`` and honest rows ``[h, d]``."""
        self._add(F.aggregation_error(aggregate, honest))


class RelativeError(_MeanOverRounds):
    """Mean over rounds of `functional.relative_error`."""

    higher_is_better = False

    def update(self, aggregate: Tensor, honest: Tensor) -> None:
        """A round's aggregate ``[d]`` and honest rows ``[h, d]``."""
        self._add(F.relative_error(aggregate, honest))


class CosineToHonestMean(_MeanOverRounds):
    """Mean over rounds of `functional.cosine_to_honest_mean`."""

    higher_is_better = True

    def update(self, aggregate: Tensor, honest: Tensor) -> None:
        """A round's aggregate ``[d]`` and honest rows ``[h, d]``."""
        self._add(F.cosine_to_honest_mean(aggregate, honest))


class EmpiricalKappa(Metric):
    """The largest `functional.empirical_kappa` of all rounds, for kappa is a bound on every one of
    them.
    """

    higher_is_better = False
    full_state_update = False
    worst: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("worst", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max")

    def update(self, aggregate: Tensor, honest: Tensor) -> None:
        """A round's aggregate ``[d]`` and honest rows ``[h, d]``."""
        self.worst = torch.maximum(self.worst, F.empirical_kappa(aggregate, honest))

    def compute(self) -> Tensor:
        return self.worst


class _Filter(Metric):
    higher_is_better = True
    full_state_update = False
    caught: Tensor
    wronged: Tensor
    missed: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in F.FilterCounts._fields:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="mean")

    def update(self, weights: Tensor, byzantine: Sequence[int]) -> None:
        """A round's weights ``[n]`` and the workers that are Byzantine in it."""
        for name, count in F.filter_counts(weights, byzantine)._asdict().items():
            setattr(self, name, getattr(self, name) + count)

    @staticmethod
    def _share(part: Tensor, rest: Tensor) -> Tensor:
        return torch.where(part + rest > 0, part / (part + rest), 1.0)


class FilterPrecision(_Filter):
    """Of all that were dropped in all rounds, the part that was Byzantine; 1 if nobody was
    dropped.
    """

    def compute(self) -> Tensor:
        return self._share(self.caught, self.wronged)


class FilterRecall(_Filter):
    """Of all Byzantine rows of all rounds, the part that was dropped; 1 if there were none."""

    def compute(self) -> Tensor:
        return self._share(self.caught, self.missed)


class Traffic(Metric):
    """What a worker has sent and received in all rounds, and how long the server has waited by its
    simulated clock.

    ``compute`` gives a dict with "bytes_up" and "bytes_down" (payload of one worker) and "seconds".
    """

    full_state_update = False
    bytes_up: Tensor
    bytes_down: Tensor
    seconds: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("bytes_up", "bytes_down", "seconds"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="mean")

    def update(self, bytes_up: float, bytes_down: float, seconds: float = 0.0) -> None:
        """A round's traffic, as in `Outcome`."""
        self.bytes_up += bytes_up
        self.bytes_down += bytes_down
        self.seconds += seconds

    def compute(self) -> dict[str, Tensor]:
        return {"bytes_up": self.bytes_up, "bytes_down": self.bytes_down, "seconds": self.seconds}
