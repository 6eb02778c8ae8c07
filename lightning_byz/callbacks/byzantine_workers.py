"""ByzantineWorkers: makes some workers lie, and logs what became of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightning_byz import attacks
from lightning_byz.attacks import Attack, DataAttack
from lightning_byz.callbacks.robustness_monitor import about_honest
from lightning_byz.diagnostics.rounds import RoundLog, aggregated, worker_weights
from lightning_byz.engine.adversary import Adversary
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import Outcome
from lightning_byz.strategies.strategy import is_robust
from lightning_byz.types import keyed_generator, keyed_seed

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Base

    from lightning_byz.strategies.strategy import RobustStrategy
else:
    _Base = object


class ByzantineWorkersCallback(_Base):
    """Makes some workers Byzantine, in-process and across processes alike, and logs how the rule
    fared.

    For every round in which they lie it logs, through the trainer's loggers: ``byz/cosine`` (of the
    angle between the aggregate and the honest mean: the fraction of the honest direction that
    survived), ``byz/relative_error`` (of the aggregate against the honest mean),
    ``byz/byzantine_weight`` (the total weight of Byzantine rows, where the rule has weights),
    ``byz/bytes_up`` and ``byz/bytes_down`` (payload that one worker sent and received), and
    ``byz/silent`` (workers whose message did not count).

    Several of these callbacks may be in one run: none takes the others' lies for honest messages. A
    worker tells one lie a step, so attacks on messages that are active together need workers of
    their own. One that tries its lies on the server's rule finds there the lies of the callbacks
    before it. What attacks remember goes into checkpoints.

    Args:
        attack: what they do: an `Attack` on messages, or a `DataAttack` on their own batches.
        workers: the indices of the Byzantine workers, in 0 .. n - 1.
        count: how many there are, instead of ``workers``: the last ``count`` ones.
        start: the first step in which they lie.
        stop: the first step in which they do not any more; None: never.
        every: they lie in every so many steps only, the first time at ``start``.
        probability: they lie in each of these steps with this probability, all of them or none; a
            coin that is keyed by seed and step, the same on every rank.
        every_n_steps: log every so many steps.
    """

    def __init__(
        self,
        attack: Attack | DataAttack,
        workers: Sequence[int] | None = None,
        count: int | None = None,
        start: int = 0,
        stop: int | None = None,
        every: int = 1,
        probability: float = 1.0,
        every_n_steps: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(attack, (Attack, DataAttack)):
            known = sorted(
                name
                for name in attacks.__all__
                if name not in ("Attack", "DataAttack", "LineSearch", "Scene")
            )
            raise ValueError(
                f"`attack` should be an Attack or a DataAttack. Found {attack!r}. Known ones: "
                f"{', '.join(known)}."
            )
        if (workers is None) == (count is None):
            raise ValueError(
                "Give either `workers`, the indices of those that lie, or `count`. Found "
                f"workers={workers}, count={count}."
            )
        if start < 0 or (stop is not None and stop <= start):
            raise ValueError(
                "They lie in steps start .. stop - 1, with 0 <= start < stop. Found "
                f"start={start}, stop={stop}."
            )
        for name, value in (("every", every), ("every_n_steps", every_n_steps)):
            if value < 1:
                raise ValueError(f"`{name}` should be at least 1. Found {name}={value}.")
        if not 0 < probability <= 1:
            raise ValueError(f"`probability` should be in (0, 1]. Found probability={probability}.")
        self.attack = attack
        self.workers = None if workers is None else sorted(set(workers))
        self.count = count
        self.start, self.stop, self.every, self.probability = start, stop, every, probability
        self.every_n_steps = every_n_steps
        self._coin_key = (0, 0)
        self._adversary: Adversary | None = None
        self._exchanges = 0
        self._saved: list[dict[str, Any]] = []
        self._log = RoundLog()

    def active(self, step: int) -> bool:
        """Whether they lie in this step."""
        if (
            step < self.start
            or (self.stop is not None and step >= self.stop)
            or (step - self.start) % self.every
        ):
            return False
        return (
            self.probability == 1
            or keyed_seed("do they lie", *self._coin_key, step) < self.probability * 2**63
        )

    def indices(self, n: int) -> list[int]:
        """The Byzantine workers of a run of n."""
        if self.count is not None:
            if not 0 <= self.count < n:
                raise ValueError(
                    f"`count` should be in 0 .. n - 1 = {n - 1}. Found count={self.count}."
                )
            return list(range(n - self.count, n))
        assert self.workers is not None
        outside = [worker for worker in self.workers if not 0 <= worker < n]
        if outside:
            raise ValueError(
                f"`workers` should be indices in 0 .. n - 1 = {n - 1} (n = processes x "
                f"workers_per_process). Found {outside}."
            )
        if len(self.workers) == n:
            raise ValueError(f"At least one worker should be honest. Found all n={n} in `workers`.")
        return self.workers

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if not is_robust(trainer.strategy):
            raise ValueError(
                f"{type(self).__name__} needs Trainer(strategy='byzantine_robust'). Found "
                f"{type(trainer.strategy).__name__}. To see an attack on plain averaging, use "
                "ByzantineRobustStrategy(algorithm=RobustSGD(aggregator=Mean()))."
            )
        self._adversary, self._saved = None, []
        indices = self.indices(trainer.strategy.n)
        if isinstance(self.attack, Attack):
            self.attack.check(indices, trainer.strategy.n)
            self._check_others(trainer, indices)

    def _check_others(self, trainer: Any, indices: list[int]) -> None:
        """Raises if another callback has the same workers lie in the same steps."""
        for other in trainer.callbacks:
            if (
                other is self
                or not isinstance(other, ByzantineWorkersCallback)
                or not isinstance(other.attack, Attack)
            ):
                continue
            both = sorted(set(indices).intersection(other.indices(trainer.strategy.n)))
            stops = [callback.stop for callback in (self, other) if callback.stop is not None]
            if both and (not stops or max(self.start, other.start) < min(stops)):
                raise ValueError(
                    f"A worker should tell one lie a step. Found workers {both} with two attacks "
                    f"on messages, {self.attack!r} and {other.attack!r}, whose steps start .. "
                    "stop - 1 overlap. Give each its own workers or steps, or one "
                    "ByzantineWorkers a Mixture of both."
                )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        strategy: RobustStrategy = trainer.strategy
        indices = self.indices(strategy.n)

        def liars(step: int) -> list[int]:
            return indices if self.active(step) else []

        simulation = strategy.simulate()
        self._coin_key = (strategy.exchanges[0].seed, len(simulation.liars))
        simulation.liars.append(liars)
        attack = self.attack
        if isinstance(attack, DataAttack):

            def poisoned(worker: int, step: int, batch: Any) -> Any:
                if worker not in liars(step):
                    return batch
                return attack(
                    batch, keyed_generator("data attack", strategy.exchanges[0].seed, step, worker)
                )

            simulation.data_attacks.append(poisoned)
        else:
            self._adversary = Adversary(
                attack, indices, self.active, lambda i: strategy.groups[i].parameters_now()
            )
            self._exchanges = len(strategy.exchanges)
            simulation.adversaries.append(self._adversary)
            self._restore()

        def measure(outcome: Outcome, exchange: Exchange) -> dict[str, float]:
            step = outcome.round.step
            if not self.active(step) or step % self.every_n_steps:
                return {}
            return self._measured(outcome, exchange, sorted(simulation.liars_at(step)))

        self._log.watch(strategy.exchanges, measure)

    # -- what the attack remembers -----------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The name of this callback's state in a checkpoint: that of what it does, for there may be
        several.
        """
        # an address, where a class has no repr of its own
        attack = re.sub(" at 0x[0-9a-f]+", "", repr(self.attack))
        who = f"workers={self.workers}" if self.count is None else f"count={self.count}"
        when = (
            f"start={self.start}, stop={self.stop}, every={self.every}, "
            f"probability={self.probability}"
        )
        return f"ByzantineWorkers({attack}, {who}, {when})"

    def state_dict(self) -> dict[str, Any]:
        """What the attack remembers, for every optimizer; the same on every rank."""
        adversary = self._adversary
        states = (
            [] if adversary is None else [adversary.state_dict(i) for i in range(self._exchanges)]
        )
        return {"attack": states} if any(state["memory"] for state in states) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, now or as soon as the run begins."""
        self._saved = state_dict["attack"]
        self._restore()

    def _restore(self) -> None:
        if self._adversary is not None:
            for index, saved in enumerate(self._saved):
                self._adversary.load_state_dict(index, saved)

    def _measured(
        self, outcome: Outcome, exchange: Exchange, byzantine: list[int]
    ) -> dict[str, float]:
        values = {
            "byz/bytes_up": float(outcome.bytes_up),
            "byz/bytes_down": float(outcome.bytes_down),
            "byz/silent": float(len(outcome.silent)),
        }
        seen = None if outcome.estimate is None else aggregated(exchange.algorithm, outcome)
        if outcome.estimate is not None:
            honest = torch.tensor([worker not in byzantine for worker in range(outcome.round.n)])
            weights = None if seen is None else worker_weights(seen, outcome.round.n)
            about = about_honest(outcome, exchange.transport, honest, weights)
            values |= {name: about[name] for name in about if name != "byz/aggregation_error"}
        return values

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._log.log(pl_module)
