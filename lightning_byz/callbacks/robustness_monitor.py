"""RobustnessMonitor: what every round cost, whom the rule trusted, and whether its guarantee still
holds.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_byz import metrics
from lightning_byz.diagnostics.rounds import (
    Aggregated,
    RoundLog,
    aggregated,
    guarantee,
    worker_weights,
)
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import Outcome
from lightning_byz.strategies.strategy import is_robust
from lightning_byz.transports import Transport

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Base

    from lightning_byz.strategies.strategy import RobustStrategy
else:
    _Base = object

_TOTALS = ("bytes_up", "bytes_down", "seconds")


class RobustnessMonitorCallback(_Base):
    """Logs every round's cost, the rule's choices and its guarantee, through whatever loggers the
    Trainer has.

    Always: ``byz/bytes_up`` and ``byz/bytes_down`` (payload that one worker sent and received),
    ``byz/seconds`` (how long the server waited, by the simulated clock), their sums since the run
    began (``byz/total_...``), ``byz/silent`` (workers whose message did not count), and
    ``byz/weight/worker_<i>`` where the rule has weights.

    Of uncompressed `RobustSGD`, as the default is: ``byz/heterogeneity`` in [0, 1], how much
    workers' gradients differ for their data, beside the noise of batches (see
    `lightning_byz.engine.heterogeneity`).

    The guarantee meter, where a kappa of the rule is proven (`Aggregator.kappa`): ``byz/spread`` is
    the honest rows' mean squared distance to their mean, ``byz/guarantee_ratio`` is
    ``sqrt(kappa * spread) / ||honest mean||``, and ``byz/guarantee`` is 1 while that is below 1:
    then no values that f rows could hold would have turned the aggregate against the honest
    workers' direction. Where nobody knows who is honest, they are estimated (see
    `lightning_byz.diagnostics.rounds.guarantee`).

    With known truth (a run with `ByzantineWorkers`, or ``byzantine=``), about the honest rows'
    mean: ``byz/aggregation_error``, ``byz/relative_error``, ``byz/cosine``; ``byz/kappa``, what the
    round needed of kappa; and where the rule has weights ``byz/byzantine_weight``,
    ``byz/filter_precision`` and ``byz/filter_recall`` (see `lightning_byz.metrics`).

    Args:
        every_n_steps: look at every so many rounds. A look costs a distance matrix, and with known
            truth the rule once more.
        byzantine: the workers that are known to lie in every step; None: those of the run's
            `ByzantineWorkers`, where there are any.
        per_worker: log the weight of each worker.
    """

    def __init__(
        self,
        every_n_steps: int = 1,
        byzantine: Collection[int] | None = None,
        per_worker: bool = True,
    ) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(
                f"`every_n_steps` should be at least 1. Found every_n_steps={every_n_steps}."
            )
        self.every_n_steps, self.byzantine, self.per_worker = every_n_steps, byzantine, per_worker
        self._totals = dict.fromkeys(_TOTALS, 0.0)
        self._log = RoundLog()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if not is_robust(trainer.strategy):
            raise ValueError(
                f"{type(self).__name__} looks at the rounds of "
                f"Trainer(strategy='byzantine_robust'). Found {type(trainer.strategy).__name__}. "
                "To watch the workers of plain DDP, use ShadowMode."
            )
        if trainer.global_step == 0:
            self._totals = dict.fromkeys(_TOTALS, 0.0)
        n = trainer.strategy.n
        outside = [worker for worker in self.byzantine or () if not 0 <= worker < n]
        if outside:
            raise ValueError(
                f"`byzantine` should be indices in 0 .. n - 1 = {n - 1}. Found {outside}."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        strategy: RobustStrategy = trainer.strategy

        def measure(outcome: Outcome, exchange: Exchange) -> dict[str, float]:
            for name in _TOTALS:
                self._totals[name] += getattr(outcome, name)
            step = outcome.round.step
            if step % self.every_n_steps:
                return {}
            values = self._measured(outcome, exchange, self._liars(strategy, step))
            found = exchange.heterogeneity
            unlike = None if found is None else found.value
            return values if unlike is None else {**values, "byz/heterogeneity": unlike}

        self._log.watch(strategy.exchanges, measure)

    def _liars(self, strategy: RobustStrategy, step: int) -> set[int] | None:
        """The workers that lie in a step; None: nobody knows."""
        if self.byzantine is None and not strategy.simulation.has_liars:
            return None
        return strategy.simulation.liars_at(step).union(self.byzantine or ())

    def _measured(
        self, outcome: Outcome, exchange: Exchange, byzantine: set[int] | None
    ) -> dict[str, float]:
        values = {f"byz/{name}": float(getattr(outcome, name)) for name in _TOTALS}
        values |= {f"byz/total_{name}": total for name, total in self._totals.items()}
        values["byz/silent"] = float(len(outcome.silent))
        seen = None if outcome.estimate is None else aggregated(exchange.algorithm, outcome)
        if seen is None:
            return values
        n = outcome.round.n
        weights = worker_weights(seen, n)
        honest = None
        if byzantine is not None:
            honest = torch.tensor([worker not in byzantine for worker in range(n)])
            values |= about_honest(outcome, exchange.transport, honest, weights)
            kappa = _needed_kappa(seen, honest)
            values |= {} if kappa is None else {"byz/kappa": kappa}
        if weights is not None and byzantine is not None:
            spoke = seen.workers.tolist()
            liars = [i for i, worker in enumerate(spoke) if worker in byzantine]
            values["byz/filter_precision"] = float(metrics.filter_precision(weights[spoke], liars))
            values["byz/filter_recall"] = float(metrics.filter_recall(weights[spoke], liars))
        if weights is not None and self.per_worker:
            values |= {
                f"byz/weight/worker_{worker}": float(weight)
                for worker, weight in enumerate(weights)
            }
        meter = guarantee(seen, honest)
        if meter is not None:
            values["byz/spread"] = meter.spread
            values["byz/guarantee_ratio"] = meter.ratio
            values["byz/guarantee"] = float(meter.ratio < 1)
        return values

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._log.log(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What the run has cost so far; the same on every rank."""
        return dict(self._totals)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._totals = dict(state_dict)


def about_honest(
    outcome: Outcome, transport: Transport, honest: Tensor, weights: Tensor | None
) -> dict[str, float]:
    """The estimate against the honest rows' mean, and the weight of the others.

    Args:
        outcome: of a round that gave an estimate.
        transport: the run's, which puts slices of columns together.
        honest: ``[n]`` bool, who is honest.
        weights: ``[n]``, see `worker_weights`.
    """
    assert outcome.estimate is not None and outcome.round.present is not None
    here = honest & outcome.round.present
    if not bool(here.any()):
        return {}
    heard = outcome.seen.select(here).in_range(0)
    mean = heard.wide().mean(0) * heard.unit
    rows = transport.assemble(mean, len(outcome.estimate))[None]
    values = {
        "byz/aggregation_error": float(metrics.aggregation_error(outcome.estimate, rows)),
        "byz/relative_error": float(metrics.relative_error(outcome.estimate, rows)),
        "byz/cosine": float(metrics.cosine_to_honest_mean(outcome.estimate, rows)),
    }
    if weights is not None:
        values["byz/byzantine_weight"] = float(weights[~honest].sum())
    return values


def _needed_kappa(seen: Aggregated, honest: Tensor) -> float | None:
    """What the round needed of kappa; None for rules that remember, whose result is not of this
    round alone, and where nobody is honest.
    """
    keep = honest[seen.workers]
    if seen.rule.remembers or not bool(keep.any()):
        return None
    here = seen.rows.in_range(seen.rule.f or 0).select(keep)
    result, rows = seen.rule.aggregate(seen.again()).double() / here.unit, here.wide()
    mean = rows.mean(0)
    error = float(seen.rows.sum((result - mean).square().sum()))  # over all slices of columns
    width = float(seen.rows.sum((rows - mean).square().sum() / len(rows)))
    return 0.0 if error == 0 else error / width if width else float("inf")
