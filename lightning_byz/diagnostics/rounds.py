"""What a round says about its workers, for callbacks: who spoke, with which weight, and how far the
rule's bound reaches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_byz.aggregators import Aggregator, TooFewRowsError, WeightedAggregator
from lightning_byz.aggregators.chain import Chain
from lightning_byz.algorithms import Algorithm
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import NO_LOSS, Outcome
from lightning_byz.metrics import worst_relative_error
from lightning_byz.numerics.rows import Rows
from lightning_byz.types import Round


class Aggregated(NamedTuple):
    """What the rule saw.

    Attributes:
        rule: with the f that was left for the rows that spoke.
        rows: their rows.
        workers: ``[m]`` whose rows they are.
        round: the round.
    """

    rule: Aggregator
    rows: Rows
    workers: Tensor
    round: Round

    def again(self) -> Rows:
        """The rows with the round's random stream at its start, so that the rule draws what it
        drew.
        """
        return dataclasses.replace(self.rows, generator=self.round.shared("rule"))


def aggregated(algorithm: Algorithm, outcome: Outcome) -> Aggregated | None:
    """What the rule saw in a round; None if it could not run, as an algorithm may go on without it
    (Byz-VR-MARINA-PP).
    """
    present, cohort, rule = outcome.round.present, outcome.round.cohort, outcome.rule
    assert present is not None
    part = torch.ones_like(present) if cohort is None else cohort
    spoke = part.clone() if algorithm.sees_absent else present & part
    try:
        rule, rows = rule.facing(outcome.seen.select(part), spoke[part])
    except TooFewRowsError:
        return None
    return Aggregated(rule, rows, spoke.nonzero().flatten(), outcome.round)


def worker_weights(seen: Aggregated, n: int) -> Tensor | None:
    """``[n]`` float64: the weight of every worker's row, 0 for those that did not speak; None where
    the rule has no weights.
    """
    rule, rows = seen.rule, seen.again()
    if isinstance(rule, Chain):
        rows, rule = rule.prepared(rows), rule.rule
    if not isinstance(rule, WeightedAggregator):
        return None
    weights = rule.weights(rows).cpu()
    if rows.mixing is not None:
        weights = weights @ rows.mixing.cpu()
    everyone = torch.zeros(n, dtype=torch.float64)
    everyone[seen.workers] = weights
    return everyone


class RoundLog:
    """What a callback logs of rounds: measured where the server's half runs, logged at the batch's
    end. Of a step's rounds the last one counts in which somebody had a gradient.
    """

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def watch(
        self,
        exchanges: Iterable[Exchange],
        measure: Callable[[Outcome, Exchange], dict[str, float]],
    ) -> None:
        """From now on: what ``measure`` says of every round."""
        self._values.clear()
        for exchange in exchanges:

            def note(outcome: Outcome, exchange: Exchange = exchange) -> None:
                values = measure(outcome, exchange)
                if outcome.reason != NO_LOSS or not self._values:
                    self._values.update(values)

            exchange.observers.append(note)

    def log(self, module: Any) -> None:
        """Logs what the rounds of a step gave, as values of this step, and forgets it."""
        for name, value in self._values.items():
            module.log(name, value, on_step=True, on_epoch=False, batch_size=1)
        self._values.clear()


class Guarantee(NamedTuple):
    """How the measured spread of the gradients compares with what the rule is proven to bear.

    Attributes:
        kappa: the rule's constant for the rows present (`Aggregator.kappa`).
        spread: ``1/h sum_i ||x_i - mean||^2`` of the honest rows, or of those that are taken for
            them.
        ratio: `worst_relative_error`; the guarantee holds below 1.
    """

    kappa: float
    spread: float
    ratio: float


def guarantee(seen: Aggregated, honest: Tensor | None = None) -> Guarantee | None:
    """The guarantee meter of a round; None for rules without a proven kappa, and for rows of
    unequal shares.

    Measured are the rows that the rule saw (momenta, EF21 mirrors, ..., whatever the algorithm
    aggregates). If the honest workers are known, these are the rows S. If not, S are the n - f rows
    nearest to each other: those nearest to the row whose n - f nearest, itself included, are
    nearest. Liars among them can make their spread look smaller or larger than the honest one's by
    no more than they are near, so it is an estimate, while "does not hold" of an honest set is a
    fact.

    Args:
        seen: what the rule saw.
        honest: ``[n]`` bool, who is honest; None: nobody knows.
    """
    rule = seen.rule
    rows = seen.rows.in_range(rule.f or 0)
    kappa = None if rows.shares is not None else rule.kappa(len(rows))
    if kappa is None:
        return None
    assert rule.f is not None
    if honest is not None:
        keep = honest[seen.workers].nonzero().flatten()
    else:
        nearest = rows.squared_distances().cpu().sort(dim=1, stable=True)
        center = nearest.values[:, : len(rows) - rule.f].sum(1).argmin()
        keep = nearest.indices[center, : len(rows) - rule.f]
    if not len(keep):
        return None
    chosen = rows.select(keep).wide()
    mean = chosen.mean(0)
    width = rows.sum((chosen - mean).square().sum() / len(chosen))  # over all slices of columns
    squared_norm = rows.sum(mean.square().sum())
    ratio = worst_relative_error(width, squared_norm, kappa)
    return Guarantee(kappa, float(width) * rows.unit * rows.unit, float(ratio))
