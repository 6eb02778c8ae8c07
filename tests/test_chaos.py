"""Three of the thirty trainings of ``make chaos``: with one death, with two and a return, and with
a liar besides.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import POINT, TRAININGS, Chaos, run

pytestmark = pytest.mark.processes


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_training_whose_workers_are_killed(seed: int, tmp_path: Path) -> None:
    chaos, got, undisturbed = run(seed, tmp_path)
    assert got >= undisturbed - POINT, chaos


def test_what_is_drawn() -> None:
    drawn = [Chaos.drawn(seed) for seed in range(TRAININGS)]
    assert sum(chaos.liar is not None for chaos in drawn) == TRAININGS / 3
    assert {len(chaos.deaths) for chaos in drawn} == {1, 2, 3} and any(
        chaos.returns for chaos in drawn
    )
    for chaos in drawn:
        assert (
            1 <= len(chaos.deaths) + (chaos.liar is not None) <= chaos.f
            and 0 not in chaos.deaths
            and chaos.liar not in (0, *chaos.deaths)
        )
