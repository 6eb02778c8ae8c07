"""What a round's outcome means for the run: who was silent, whether steps are skipped, what stays
still.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_byz.aggregators import Aggregator, Chain, Rule
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.heterogeneity import ENOUGH, UNLIKE, Heterogeneity
from lightning_byz.engine.outcome import NO_LOSS, Outcome, comes
from lightning_byz.strategies.unmoved_parameters import FewUsers, described
from lightning_byz.strategies.validate import warn
from lightning_byz.transports import Transport

log = logging.getLogger("lightning_byz")


class TooFewGradientsError(RuntimeError):
    """More steps in a row than ``max_skipped_steps`` allows had too few finite gradients: training
    has diverged.
    """


class RoundReport:
    """Says what rounds have in common, and stops a run that has diverged.

    Args:
        max_skipped_steps: see `RobustStrategy`.

    Attributes:
        silences: how often each worker's message did not count, since the run began.
        skipped_in_a_row: steps in a row without an estimate, up to now.
    """

    def __init__(self, max_skipped_steps: int) -> None:
        self.max_skipped_steps = max_skipped_steps
        self.silences: dict[int, int] = {}
        self.forget()

    def forget(self) -> None:
        """Back to before the first step; silences are counted on."""
        self.skipped_in_a_row = 0
        self._told_no_loss = self._told_unlike = False
        self._few_users = FewUsers()

    def note(self, outcome: Outcome, exchange: Exchange) -> None:
        """Says what is to be said of a round. Called where the server's half runs."""
        self.note_silence(outcome, exchange.transport)
        if exchange.heterogeneity is not None:
            self.note_heterogeneity(exchange.heterogeneity, outcome.rule)

    def note_silence(self, outcome: Outcome, transport: Transport) -> None:
        """Logs who was silent while others spoke, the 1st, 10th, 100th, ... time."""
        for worker in () if outcome.reason == NO_LOSS else outcome.silent:
            count = self.silences[worker] = self.silences.get(worker, 0) + 1
            if count in (1, 10, 100, 1000, 10_000, 100_000):
                why = transport.why_silent(worker)
                if worker in outcome.idle:
                    why = "had no batch, or no loss,"
                if not comes(outcome.round, worker):
                    why = "did not come"
                warn(
                    f"byzantine_robust: worker {worker} {why} in step {outcome.round.step}; the "
                    f"step went on without it. This was time {count}."
                )

    def note_unmoved(
        self,
        module: nn.Module,
        parameters: Sequence[Tensor],
        wanted: Sequence[Tensor],
        used: Tensor,
        f: int,
    ) -> None:
        """Warns once of parameters that no more than f workers ever use, on the ranks of these
        workers.

        Args:
            module: the LightningModule, for names.
            parameters: the P of the optimizer.
            wanted: ``[P]`` bool, for each local worker, of which it has gradients.
            used: ``[P]`` bool, of which more than f workers have.
            f: Byzantine workers to tolerate.
        """
        unmoved = self._few_users.observe(parameters, wanted, used)
        if unmoved:
            warnings.warn(described(unmoved, module, f), stacklevel=2)

    def note_heterogeneity(self, found: Heterogeneity, rule: Aggregator) -> None:
        """Warns once where workers' data differ so much that the rule is likely to lose what only
        some of them say.
        """
        value = found.value
        if self._told_unlike or value is None or value < UNLIKE or found.estimates < ENOUGH:
            return
        self._told_unlike = True
        if rule.f and not rule.bears_unlike_data:
            warn(
                "byzantine_robust: the workers' data differ. Their gradients' squared distances "
                f"are {100 * value:.0f} % data and {100 - 100 * value:.0f} % noise of batches "
                f"(byz/heterogeneity={value:.2f}), and {rule_name(rule)} takes the workers that "
                f"differ most for liars: with f={rule.f} it may lose what only they have seen, "
                "though nobody lies. Use ByHeterogeneity(), the default's rule, or a smaller "
                "num_byzantine. See docs/choose.md."
            )

    def count(self, outcome: Outcome) -> None:
        """Counts steps that are skipped.

        Raises:
            TooFewGradientsError: if there are too many in a row.
        """
        if outcome.estimate is not None:
            self.skipped_in_a_row = 0
            return
        step = outcome.round.step
        if outcome.reason == NO_LOSS:
            if not self._told_no_loss:
                log.info(
                    f"byzantine_robust: step {step} is skipped, and so are later ones like it. "
                    f"{NO_LOSS}"
                )
            self._told_no_loss = True
            return
        self.skipped_in_a_row += 1
        warn(f"byzantine_robust: step {step} is skipped. {outcome.reason}")
        if self.skipped_in_a_row > self.max_skipped_steps:
            raise TooFewGradientsError(
                f"{self.skipped_in_a_row} steps in a row had too few finite gradients "
                f"(max_skipped_steps={self.max_skipped_steps}). {outcome.reason} Silent in the "
                f"last one: workers {outcome.silent}. Look for nan or inf in their data or "
                "losses, or lower the learning rate."
            )

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        return {"skipped_in_a_row": self.skipped_in_a_row, "silences": dict(self.silences)}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restores what `state` gave."""
        self.skipped_in_a_row = saved["skipped_in_a_row"]
        self.silences = dict(saved["silences"])


def rule_name(rule: Rule) -> str:
    """Its class; of a chain, those of its parts."""
    parts = (*rule.pre, rule.rule) if isinstance(rule, Chain) else (rule,)
    return " + ".join(type(part).__name__ for part in parts)
