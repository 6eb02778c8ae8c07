"""SuspicionMonitor: which worker is lying? By what it sends, without any truth, with a false-alarm
rate that the user sets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_byz.algorithms import Algorithm, RobustSGD
from lightning_byz.compressors import Field
from lightning_byz.diagnostics.alerts import (
    Suspect,
    accuse,
    log_to_all,
    run_logger,
    starts_afresh,
)
from lightning_byz.diagnostics.sketch import Sketch
from lightning_byz.diagnostics.suspicion import Compare, SuspicionTest
from lightning_byz.diagnostics.worker_placement import Whereabouts, whereabouts
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import Outcome
from lightning_byz.strategies import resuming_with_others
from lightning_byz.strategies.strategy import is_robust

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Base

    from lightning_byz.strategies.strategy import RobustStrategy
else:
    _Base = object


class SuspicionMonitorCallback(_Base):
    """Scores every worker of a ``byzantine_robust`` run by the rows that the rule sees, and accuses
    one when chance explains them no longer.

    The statistics, the test, and what its false-alarm rate assumes are described in
    `lightning_byz.diagnostics.suspicion`. In two consecutive rounds of every ``every_n_steps`` it
    looks at (sketches of) the rows, and logs to all loggers ``byz/suspicion/worker_<i>`` (0 is no
    evidence, from 1 on a worker is accused) and ``byz/quarantined``, how many workers are in
    quarantine. The first time, rank 0 warns, naming its rank, host and device; it sends the same by
    ``wandb.alert`` if the Trainer has a WandbLogger, and calls ``on_suspect``. A worker without a
    finite message counts as infinitely far away.

    With ``compare="others"`` up to f workers that send whatever they like cannot have an honest one
    accused beyond that rate, as long as honest workers' rows are exchangeable; with "own_past" an
    accusation is evidence and no proof. At the end of the run rank 0 sums up.

    What the test knows, and who is in quarantine, goes into checkpoints. With other workers than
    the checkpoint's the evidence starts afresh, and those in quarantine that are left stay there
    (see ``resume_workers`` of the strategy).

    Args:
        every_n_steps: two of so many rounds are looked at. None: as many as the workers' momenta
            take to fade to 5 % (29 for 0.9; 30 for algorithms whose memory fades in another way; 2
            without memory), for the test takes what a row holds for fresh.
        false_alarm_rate: the probability that a run of honest workers ever accuses one, at most;
            shared among the run's optimizers.
        compare: "others", where workers draw from one pool of data; "own_past", where their data
            differ.
        num_byzantine: how many workers may be faulty; None: the f of the run's rule, or, where that
            is 0, max(1, (n - 1) // 3).
        quarantine: leave an accused worker's messages out from then on. The rule's f stays as it
            is, or becomes the most that the rule allows for the rows that are left: an accusation
            is evidence and no proof. When f workers are in quarantine, nobody else is looked for.
        probation: after so many rounds in quarantine a worker is reinstated, as if it was new.
            None: never, unless you call `reinstate`.
        sketch_size: how many numbers are kept of a row.
        on_suspect: called on rank 0 with every `Suspect`, once.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        false_alarm_rate: float = 0.01,
        compare: Compare = "others",
        num_byzantine: int | None = None,
        quarantine: bool = False,
        probation: int | None = None,
        sketch_size: int = 65_536,
        on_suspect: Callable[[Suspect], None] | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("every_n_steps", every_n_steps, 2),
            ("probation", probation, 1),
            ("sketch_size", sketch_size, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"`{name}` should be at least {least}. Found {name}={value}.")
        if probation is not None and not quarantine:
            raise ValueError(
                f"`probation` is the time in quarantine. Found probation={probation} with "
                "quarantine=False."
            )
        self.every_n_steps, self.false_alarm_rate, self.compare = (
            every_n_steps,
            false_alarm_rate,
            compare,
        )
        self.num_byzantine, self.quarantine, self.probation = num_byzantine, quarantine, probation
        self.sketch_size, self.on_suspect = sketch_size, on_suspect
        self.tests: list[SuspicionTest] = []
        self.places: list[Whereabouts] = []
        self.quarantined: dict[int, int] = {}
        """Since which round each worker in quarantine is there."""
        self._sketches: list[Sketch | None] = []
        self._exchanges: list[Exchange] = []
        self._told: set[int] = set()
        self._saved: dict[str, Any] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit" and not is_robust(trainer.strategy):
            raise ValueError(
                f"{type(self).__name__} looks at the rounds of "
                f"Trainer(strategy='byzantine_robust'). Found {type(trainer.strategy).__name__}. "
                "To watch the ranks of plain DDP, use ShadowMode."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        strategy: RobustStrategy = trainer.strategy
        self._exchanges = exchanges = strategy.exchanges
        algorithm, n = exchanges[0].algorithm, strategy.n
        if exchanges[0].transport.measured:
            raise ValueError(
                f"{type(self).__name__} scores workers on every rank alike, which takes a "
                "transport that shows every rank every round. Found "
                f"{type(exchanges[0].transport).__name__}. Use AllGather() or Sharded(), or "
                "RobustnessMonitor, which the server runs alone."
            )
        if self.quarantine and algorithm.sees_absent:
            raise ValueError(
                f"Quarantine leaves a worker's messages out. Found {type(algorithm).__name__}, "
                "whose rule goes on with what it knows of absent workers. Use quarantine=False, "
                "or an algorithm whose rule sees this round's messages only, such as RobustSGD."
            )
        f = (
            (algorithm.aggregator.f or max(1, (n - 1) // 3))
            if self.num_byzantine is None
            else self.num_byzantine
        )
        self.tests = [
            SuspicionTest(n, f, self.false_alarm_rate / len(exchanges), self.compare)
            for _ in exchanges
        ]
        self._sketches = [None] * len(exchanges)
        self.places = whereabouts(
            strategy.root_device,
            lambda own: self._gathered(strategy, own),
            strategy.workers_per_process,
        )
        self.quarantined, self._told = {}, set()
        if self._saved is not None:
            self._resume(trainer, self._saved)
            self._saved = None
        for index, exchange in enumerate(exchanges):
            exchange.quarantined.update(self.quarantined)

            def observe(outcome: Outcome, index: int = index) -> None:
                self._observe(trainer, index, outcome)

            exchange.observers.append(observe)

    def _resume(self, trainer: Any, saved: dict[str, Any]) -> None:
        """Goes on with a checkpoint's evidence if it is of the same workers; and with its
        quarantine, of those that are left.
        """
        states, before = saved["tests"], len(saved["tests"][0]["pairs"])
        follow = trainer.strategy.followed(before)
        if resuming_with_others.is_same(follow, before) and all(
            map(SuspicionTest.fits, self.tests, states)
        ):
            for test, state in zip(self.tests, states, strict=True):
                test.load_state_dict(state)
            self._told = set(saved["told"])
        elif trainer.is_global_zero:
            run_logger(trainer).warning(starts_afresh(type(self).__name__, self.tests[0], before))
        place = {old: new for new, old in enumerate(follow) if old is not None}
        self.quarantined = {
            place[worker]: since
            for worker, since in saved["quarantined"].items()
            if worker in place
        }
        self._told |= self.quarantined.keys()
        for test, worker in itertools.product(self.tests, self.quarantined):
            test.exclude(worker)
        if self.quarantined and trainer.is_global_zero:
            who = "; ".join(
                f"{self.places[worker]} since step {since}"
                for worker, since in self.quarantined.items()
            )
            run_logger(trainer).warning(f"{type(self).__name__}: still in quarantine: {who}.")

    @staticmethod
    def _gathered(strategy: RobustStrategy, own: Tensor) -> list[Tensor | None]:
        copies, field = strategy.workers_per_process, Field(tuple(own.shape), own.dtype)
        everybody = strategy.exchanges[0].transport.gather(
            [[own.to(strategy.root_device)]] * copies, [field]
        )
        return [None if heard is None else heard[0].cpu() for heard in everybody[::copies]]

    # -- a round -----------------------------------------------------------------------------------

    def _observe(self, trainer: Any, index: int, outcome: Outcome) -> None:
        step, every = (
            outcome.round.step,
            self.every_n_steps or rounds_to_forget(self._exchanges[index].algorithm),
        )
        if self.probation is not None:
            for worker in [
                worker
                for worker, since in self.quarantined.items()
                if step >= since + self.probation
            ]:
                self.reinstate(worker)
                if trainer.is_global_zero:
                    run_logger(trainer).warning(
                        f"{self.places[worker]} is reinstated in step {step}, after "
                        f"{self.probation} in quarantine."
                    )
        if step % every > 1:
            return
        assert outcome.round.cohort is not None
        here = outcome.round.cohort.clone()
        here[sorted(outcome.idle)] = False  # who has no batch has nothing to be judged by
        self.tests[index].observe(self._rows(index, outcome), here)
        if trainer.loggers:
            scores = torch.stack([test.scores for test in self.tests]).max(0).values
            values = {
                f"byz/suspicion/worker_{worker}": float(score)
                for worker, score in enumerate(scores)
            }
            log_to_all(trainer, {**values, "byz/quarantined": float(len(self.quarantined))})
        verdicts = torch.zeros(self.tests[index].n, dtype=torch.uint8)
        verdicts[sorted(self.tests[index].accused)] = 1
        agree = self._exchanges[index].transport.agree
        # rank 0 decides
        accused = agree(verdicts.to(trainer.strategy.root_device)).nonzero().flatten().tolist()
        for worker in sorted(set(accused) - self._told):
            self._accuse(trainer, index, worker, step)

    def _rows(self, index: int, outcome: Outcome) -> Tensor:
        """``[n, m]`` what rank 0 keeps of the rows; nan for those that were to speak and did
        not.
        """
        rows = outcome.seen
        dim = rows.values.shape[1] if rows.dim is None else rows.dim
        sketch = self._sketches[index]
        if sketch is None or sketch.dim != dim:
            sketch = self._sketches[index] = Sketch(dim, self.sketch_size, outcome.round.seed)
        out = sketch.new(outcome.round.n, device=rows.values.device)
        for offset, piece in rows.pieces():
            for first, _, block in piece.blocks():
                sketch.add(out, block, offset + first)
        out = rows.agree(rows.sum(out)).cpu()
        out[outcome.silent] = torch.nan
        return out

    # -- what follows ------------------------------------------------------------------------------

    def _accuse(self, trainer: Any, index: int, worker: int, step: int) -> None:
        self._told.add(worker)
        remark, f = "", self.tests[index].f
        if self.quarantine and len(self.quarantined) < f:
            self.quarantined[worker] = step
            for exchange, test in zip(self._exchanges, self.tests, strict=True):
                exchange.quarantined.add(worker)
                test.exclude(worker)
            left, rule = (
                self.tests[index].n - len(self.quarantined),
                self._exchanges[index].algorithm.aggregator,
            )
            remark = (
                "It is in quarantine now: its messages no longer count, and the rule goes on with "
                f"{left} rows and f={min(rule.f or 0, rule.most_f(left))}."
            )
        elif self.quarantine:
            remark = f"Its messages count as before: f={f} workers are in quarantine already."
        accuse(trainer, self.tests[index], self.places[worker], step, remark, self.on_suspect)

    def reinstate(self, worker: int) -> None:
        """Ends a worker's quarantine; what was held against it is forgotten. To be called on every
        rank, at the same step.

        Raises:
            ValueError: if it is not in quarantine.
        """
        if worker not in self.quarantined:
            raise ValueError(
                f"Only a worker in quarantine can be reinstated. Found {worker}; in quarantine: "
                f"{sorted(self.quarantined)}."
            )
        del self.quarantined[worker]
        self._told.discard(worker)
        for exchange, test in zip(self._exchanges, self.tests, strict=True):
            exchange.quarantined.discard(worker)
            test.readmit(worker)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if not self.tests or not trainer.is_global_zero:
            return
        scores = torch.stack([test.scores for test in self.tests]).max(0).values
        lines = []
        for place, score in zip(self.places, scores, strict=True):
            line = f"{place}: suspicion {float(score):.2f}" + (
                " (SUSPECT)" if place.worker in self._told else ""
            )
            since = self.quarantined.get(place.worker)
            lines.append(line + ("" if since is None else f", in quarantine since step {since}"))
        run_logger(trainer).info(
            f"{type(self).__name__}, at the end (suspicion 1 accuses):\n  " + "\n  ".join(lines)
        )

    # -- checkpoint --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the tests know, and who is in quarantine; the same on every rank."""
        tests = [test.state_dict() for test in self.tests]
        return (
            {"tests": tests, "quarantined": dict(self.quarantined), "told": sorted(self._told)}
            if tests
            else {}
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, as soon as the run begins."""
        self._saved = state_dict or None


def rounds_to_forget(algorithm: Algorithm) -> int:
    """After how many rounds 5 % of what a worker's row held are left in it: 2 at least, and 30
    where nobody has worked it out.
    """
    if algorithm.stateless:
        return 2
    if not isinstance(algorithm, RobustSGD):
        return 30
    beta = algorithm.worker_momentum
    return max(2, math.ceil(math.log(0.05) / math.log(beta))) if beta else 2
