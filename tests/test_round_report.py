"""What is said of rounds, and when a run is stopped, does not depend on a checkpoint in between."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch  # noqa: F401  # says which rank this is, for warnings
import pytest

from lightning_byz.strategies.round_report import RoundReport, TooFewGradientsError

pytestmark = pytest.mark.filterwarnings("ignore:byzantine_robust. step")


def outcome(step: int, estimate: Any = None) -> Any:
    """Of a round with too few gradients, or with an estimate."""
    return SimpleNamespace(
        round=SimpleNamespace(step=step), estimate=estimate, reason="Too few.", silent=[1]
    )


def test_steps_that_are_skipped_are_counted_across_a_checkpoint() -> None:
    before, after = RoundReport(max_skipped_steps=3), RoundReport(max_skipped_steps=3)
    for step in range(2):
        before.count(outcome(step))
    after.load(before.state())
    after.count(outcome(2))
    with pytest.raises(TooFewGradientsError, match="4 steps in a row"):
        after.count(outcome(3))


def test_a_step_that_is_taken_ends_the_row() -> None:
    report = RoundReport(max_skipped_steps=2)
    for step in range(9):
        report.count(outcome(step, estimate=1.0 if step % 3 == 2 else None))
