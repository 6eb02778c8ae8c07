"""ByzantineWorkers: makes some workers lie, and logs what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightning_byz import attacks
from lightning_byz.aggregators import WeightedAggregator
from lightning_byz.aggregators.chain import Chain
from lightning_byz.attacks import Attack, DataAttack
from lightning_byz.exchange import Outcome
from lightning_byz.metrics import cosine_to_honest_mean, relative_error
from lightning_byz.strategy import is_robust
from lightning_byz.transports import ByzantineTransport

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Base

    from lightning_byz.strategy import RobustStrategy
else:
    _Base = object


class ByzantineWorkersCallback(_Base):
    """Makes some workers Byzantine, in-process and across processes alike, and logs how the rule fared.

    For every round in which they lie it logs, through the trainer's loggers: ``byz/cosine`` (of the angle between the aggregate and
    the honest mean: the fraction of the honest direction that survived), ``byz/relative_error`` (of the aggregate against the honest
    mean), ``byz/byzantine_weight`` (the total weight of Byzantine rows, where the rule has weights), ``byz/bytes_up`` and
    ``byz/bytes_down`` (payload that one worker sent and received), and ``byz/silent`` (workers whose message did not count).

    Args:
        attack: what they do: an `Attack` on messages, or a `DataAttack` on their own batches.
        workers: the indices of the Byzantine workers, in 0 .. n - 1.
        count: how many there are, instead of ``workers``: the last ``count`` ones.
        start: the first step in which they lie.
        stop: the first step in which they do not any more; None: never.
        every_n_steps: log every so many steps.
    """

    def __init__(
        self,
        attack: Attack | DataAttack,
        workers: Sequence[int] | None = None,
        count: int | None = None,
        start: int = 0,
        stop: int | None = None,
        every_n_steps: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(attack, (Attack, DataAttack)):
            known = sorted(name for name in attacks.__all__ if name not in ("Attack", "DataAttack"))
            raise ValueError(f"`attack` should be an Attack or a DataAttack. Found {attack!r}. Known ones: {', '.join(known)}.")
        if (workers is None) == (count is None):
            raise ValueError(
                f"Give either `workers`, the indices of those that lie, or `count`. Found workers={workers}, count={count}."
            )
        if start < 0 or (stop is not None and stop <= start):
            raise ValueError(f"They lie in steps start .. stop - 1, with 0 <= start < stop. Found start={start}, stop={stop}.")
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` should be at least 1. Found {every_n_steps}.")
        self.attack = attack
        self.workers = None if workers is None else sorted(set(workers))
        self.count = count
        self.start, self.stop = start, stop
        self.every_n_steps = every_n_steps
        self._logs: dict[str, float] = {}

    def active(self, step: int) -> bool:
        """Whether they lie in this step."""
        return self.start <= step and (self.stop is None or step < self.stop)

    def indices(self, n: int) -> list[int]:
        """The Byzantine workers of a run of n."""
        if self.count is not None:
            if not 0 <= self.count < n:
                raise ValueError(f"`count` should be in 0 .. n - 1 = {n - 1}. Found count={self.count}.")
            return list(range(n - self.count, n))
        assert self.workers is not None
        outside = [worker for worker in self.workers if not 0 <= worker < n]
        if outside:
            raise ValueError(
                f"`workers` should be indices in 0 .. n - 1 = {n - 1} (n = processes x workers_per_process). Found {outside}."
            )
        if len(self.workers) == n:
            raise ValueError(f"At least one worker should be honest. Found all n={n} in `workers`.")
        return self.workers

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if not is_robust(trainer.strategy):
            raise ValueError(
                f"{type(self).__name__} needs Trainer(strategy='byzantine_robust'). Found {type(trainer.strategy).__name__}. "
                "To see an attack on plain averaging, use ByzantineRobustStrategy(algorithm=RobustSGD(aggregator=Mean()))."
            )
        self.indices(trainer.strategy.n)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        strategy: RobustStrategy = trainer.strategy
        indices = self.indices(strategy.n)

        def liars(step: int) -> list[int]:
            return indices if self.active(step) else []

        strategy.liars.append(liars)
        attack = self.attack
        if isinstance(attack, DataAttack):

            def poisoned(worker: int, step: int, batch: Any) -> Any:
                return attack(batch) if worker in liars(step) else batch

            strategy.data_attacks.append(poisoned)
        else:
            strategy.wrap_transport(lambda inner: ByzantineTransport(inner, attack, indices, self.active))
        for exchange in strategy.exchanges:

            def observe(outcome: Outcome) -> None:
                if self.active(outcome.round.step) and outcome.round.step % self.every_n_steps == 0:
                    self._logs = self._measured(outcome, outcome.rule, indices)

            exchange.observers.append(observe)

    def _measured(self, outcome: Outcome, rule: Any, byzantine: list[int]) -> dict[str, float]:
        present = outcome.round.present
        assert present is not None
        values = {
            "byz/bytes_up": float(outcome.bytes_up),
            "byz/bytes_down": float(outcome.bytes_down),
            "byz/silent": float(len(outcome.silent)),
        }
        honest = torch.tensor([bool(here) and w not in byzantine for w, here in enumerate(present)])
        if outcome.estimate is None or not bool(honest.any()):
            return values
        rows = outcome.seen.select(honest).dense()
        values["byz/cosine"] = float(cosine_to_honest_mean(outcome.estimate, rows))
        values["byz/relative_error"] = float(relative_error(outcome.estimate, rows))
        weights = _weights(rule, outcome, present)
        if weights is not None:
            values["byz/byzantine_weight"] = float(weights[byzantine].sum())
        return values

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._logs:
            for name, value in self._logs.items():
                pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)
            self._logs = {}

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._logs = {}


def _weights(rule: Any, outcome: Outcome, present: torch.Tensor) -> torch.Tensor | None:
    """``[n]`` the weight of every worker's row, where the rule has weights."""
    rows = outcome.seen.select(present) if not bool(present.all()) else outcome.seen
    mixed = rows
    if isinstance(rule, Chain):
        heard = int(present.sum())
        rule = rule.with_f(max(0, min(rule.f or 0, rule.most_f(heard))))
        mixed, rule = rule.prepared(rows), rule.rule
    if not isinstance(rule, WeightedAggregator):
        return None
    rule = rule.with_f(max(0, min(rule.f or 0, rule.most_f(len(mixed)))))
    weights = rule.weights(mixed).cpu()
    if mixed.mixing is not None:
        weights = weights @ mixed.mixing.cpu()
    everyone = torch.zeros(len(present), dtype=torch.float64)
    everyone[present] = weights
    return everyone
