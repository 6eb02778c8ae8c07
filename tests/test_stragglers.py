"""Stragglers: who is late, by how much, and what that does to every algorithm on the virtual
clock.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import fit
from models import Plain, loader
from zoo import ALGORITHMS, each

from lightning_byz import DStar, Mean, RobustSGD, ShiftedExponential, SignFlip
from lightning_byz.lightning import ByzantineRobustStrategy, ByzantineWorkers, Stragglers

INF = math.inf


def outcomes_of(
    folder: Path, strategy: ByzantineRobustStrategy, *callbacks: Any, steps: int = 4
) -> tuple[list[Any], Any]:
    """Every round's outcome of an in-process run, and its report."""
    outcomes: list[Any] = []

    class Watch(Stragglers.__mro__[2]):  # the Callback of the package at hand
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.strategy.exchanges[0].observers.append(outcomes.append)

    (report,) = fit(
        folder, Plain(), strategy, data=loader(), callbacks=[*callbacks, Watch()], max_steps=steps
    )
    return outcomes, report


def test_delays() -> None:
    n, steps = 6, 4000
    constant = Stragglers(2.0, workers=[1, 4], start=3)
    assert constant.delays(n, 2).tolist() == [0.0] * n
    assert constant.delays(n, 3).tolist() == [0, 2, 0, 0, 2, 0]
    for kind, ten_times in (("exponential", math.exp(-10)), ("pareto", 30**-1.5)):
        late = Stragglers(2.0, workers=[1, 4], kind=kind)  # type: ignore[arg-type]
        drawn = torch.stack([late.delays(n, step) for step in range(steps)])
        assert drawn[:, [0, 2, 3, 5]].eq(0).all() and drawn[:, [1, 4]].gt(0).all()
        assert len(drawn[:, [1, 4]].unique()) == 2 * steps
        assert float(drawn[:, 1].median()) == pytest.approx(
            2 * math.log(2) if kind == "exponential" else 2 / 3 * 2 ** (2 / 3), rel=0.05
        )
        assert float((drawn[:, [1, 4]] > 20).double().mean()) == pytest.approx(
            ten_times, rel=0.5, abs=5e-4
        )
    assert Stragglers(workers=[0], kind="dead", start=1).delays(2, 1).tolist() == [INF, 0]


def test_a_fraction_is_drawn_once() -> None:
    late = Stragglers(1.0, fraction=0.3)
    assert len(late.indices(10)) == 3 and late.indices(10) == late.indices(10)
    drawn = set()
    for seed in range(20):
        late._key = (seed, 0)
        drawn.add(tuple(late.indices(10)))
    assert len(drawn) > 10


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"delay": 0.0, "workers": [1]}, "positive number of seconds"),
        ({"delay": math.nan, "workers": [1]}, "positive number of seconds"),
        ({"workers": [1]}, "positive number of seconds"),
        ({"delay": 1.0, "workers": [1], "kind": "dead"}, "None for kind='dead'"),
        ({"delay": 1.0, "workers": [1], "kind": "normal"}, "`kind`"),
        ({"delay": 1.0}, "either `workers`"),
        ({"delay": 1.0, "workers": [1], "fraction": 0.5}, "either `workers`"),
        ({"delay": 1.0, "fraction": 1.5}, "in \\(0, 1\\]"),
        ({"delay": 1.0, "workers": [1], "start": -1}, "`start`"),
    ],
    ids=repr,
)
def test_refused_settings(kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stragglers(**kwargs)


def test_refused_runs(tmp_path: Path) -> None:
    strategy = ByzantineRobustStrategy(workers_per_process=4)
    with pytest.raises(ValueError, match="in 0 .. n - 1 = 3"):
        fit(
            tmp_path,
            Plain(),
            strategy,
            data=loader(),
            callbacks=[Stragglers(1.0, workers=[4])],
            max_steps=1,
        )
    both = [
        Stragglers(workers=[0, 1], kind="dead"),
        Stragglers(workers=[2, 3], kind="dead", start=9),
    ]
    with pytest.raises(ValueError, match="one worker should stay alive"):
        fit(
            tmp_path,
            Plain(),
            ByzantineRobustStrategy(workers_per_process=4),
            data=loader(),
            callbacks=both,
            max_steps=1,
        )
    with pytest.raises(ValueError, match="byzantine_robust"):
        fit(
            tmp_path,
            Plain(),
            "auto",
            data=loader(),
            callbacks=[Stragglers(1.0, workers=[0])],
            max_steps=1,
        )


@each(ALGORITHMS)
def test_every_algorithm_waits_and_survives_the_dead(case: Any, tmp_path: Path) -> None:
    """Two seconds for a late one; a dead one is silent from its step on, and nobody waits for
    it.
    """
    n, algorithm = 10, case.algorithm
    strategy = ByzantineRobustStrategy(
        algorithm=algorithm, workers_per_process=n, num_byzantine=algorithm.aggregator.f
    )
    late = [Stragglers(2.0, workers=[2]), Stragglers(workers=[5], kind="dead", start=2)]
    outcomes, report = outcomes_of(tmp_path, strategy, *late)
    assert report["steps"] == len(outcomes) == 4
    for step, outcome in enumerate(outcomes):
        present, cohort = outcome.round.present, outcome.round.cohort
        assert not (present[5] and step >= 2)
        assert outcome.seconds == (2.0 if cohort[2] else 0.0)
        assert outcome.silent == ([5] if step >= 2 and cohort[5] else [])
    assert report["metrics"]["stragglers/seconds"] == sum(outcome.seconds for outcome in outcomes)


def test_dstar_takes_the_first_k_to_arrive(tmp_path: Path) -> None:
    """The callback's times take the place of its own; liars come first; the round lasts until the
    k-th message.
    """
    own = ShiftedExponential(base=100.0)
    strategy = ByzantineRobustStrategy(
        algorithm=DStar(Mean(), k=4, delays=own), workers_per_process=6
    )
    # 3, 5, 2, 2, 2 seconds, and 0
    late = [Stragglers(3.0, workers=[0, 1]), Stragglers(2.0, workers=[1, 2, 3, 4])]
    outcomes, _ = outcomes_of(tmp_path / "late", strategy, *late)
    assert all(
        outcome.round.cohort.tolist() == [False, False, True, True, True, True]
        for outcome in outcomes
    )
    assert [outcome.seconds for outcome in outcomes] == [2.0] * 4
    assert outcomes[0].round.present.tolist() == outcomes[0].round.cohort.tolist()

    strategy = ByzantineRobustStrategy(
        algorithm=DStar(Mean(), k=4, delays=own), workers_per_process=6
    )
    lie = ByzantineWorkers(SignFlip(), workers=[1], start=2)
    outcomes, _ = outcomes_of(tmp_path / "lie", strategy, lie, *late)
    assert [bool(outcome.round.cohort[1]) for outcome in outcomes] == [False, False, True, True]


def test_the_late_do_not_change_what_all_are_waited_for(tmp_path: Path) -> None:
    def weights(name: str, *callbacks: Any) -> Any:
        strategy = ByzantineRobustStrategy(algorithm=RobustSGD(), workers_per_process=5)
        torch.manual_seed(0)
        return outcomes_of(tmp_path / name, strategy, *callbacks)[1]["weights"]

    plain, late = weights("plain"), weights("late", Stragglers(1.0, fraction=0.5, kind="pareto"))
    assert all(torch.equal(value, late[name]) for name, value in plain.items())
