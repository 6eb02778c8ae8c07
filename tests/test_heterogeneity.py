"""How unlike the workers' data are: the estimate, where it is known, and who is told."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from harness import QUIET, Report, fit
from models import Plain, loader
from test_monitors import Keeps, logged

from lightning_byz import AllGather, ByLabel, Dirichlet, Sharded, SpectralFilter
from lightning_byz.aggregators import (
    ARC,
    CAF,
    NNM,
    Aggregator,
    ByHeterogeneity,
    Chain,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    Mean,
    StaticClipping,
    TrimmedMean,
    WeightedAggregator,
)
from lightning_byz.algorithms import ByzEF21SGDM, RobustSGD
from lightning_byz.compressors import TopK
from lightning_byz.demo.quickstart import DigitsClassifier
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.heterogeneity import ENOUGH, UNLIKE, Heterogeneity
from lightning_byz.engine.outcome import Contribution
from lightning_byz.lightning import (
    ByzantineRobustStrategy,
    DigitsDataModule,
    RobustnessMonitor,
)
from lightning_byz.numerics.rows import Rows
from lightning_byz.strategies.resuming_with_others import adapted
from lightning_byz.strategies.round_report import RoundReport
from lightning_byz.transports import InProcess
from lightning_byz.types import Gradients

N, D = 11, 6_000  # more columns than are looked at


def estimate(
    algorithm: RobustSGD, spread: float, rounds: int = 300, liars: float | None = None
) -> Heterogeneity:
    """From rounds with gradients of noise N(0, 1), of workers whose means lie N(0, spread^2) apart;
    ``liars``: what three of them send instead, times a row of ones.
    """
    transport = InProcess()
    transport.connect(0, 1, N, torch.device("cpu"))
    exchange = Exchange(algorithm, transport, 0)
    generator = torch.Generator().manual_seed(0)
    means = spread * torch.randn(N, D, generator=generator)
    used = torch.ones(1, dtype=torch.uint8)
    for _ in range(rounds):
        rows = means + torch.randn(N, D, generator=generator)
        if liars is not None:
            rows[-3:] = liars
        exchange.run([Contribution(Gradients(row), used) for row in rows], rows[0])
    assert exchange.heterogeneity is not None
    return exchange.heterogeneity


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0, 3.0])
def test_it_is_the_part_of_the_distances_that_is_data(beta: float, spread: float) -> None:
    found = estimate(RobustSGD(Mean(), worker_momentum=beta), spread)
    assert found.value == pytest.approx(spread**2 / (spread**2 + 1), abs=0.05)


@pytest.mark.parametrize("lie", [0.0, 10.0, 1e6])
def test_liars_do_not_make_it_what_they_like(lie: float) -> None:
    rule = SpectralFilter(f=3)
    alike = estimate(RobustSGD(rule, worker_momentum=0.9), 0.0, liars=lie).value
    unlike = estimate(RobustSGD(rule, worker_momentum=0.9), 2.0, liars=lie).value
    assert alike is not None
    assert unlike is not None
    assert alike < 0.1
    assert unlike > 0.6


def test_where_rows_are_no_moving_averages_there_is_none() -> None:
    for algorithm in (ByzEF21SGDM(Mean()), RobustSGD(Mean(), compressor=TopK(0.5))):
        found = estimate(algorithm, 1.0, rounds=40)  # type: ignore[arg-type]
        assert found.value is None
        assert found.estimates == 0


def test_a_worker_that_was_away_is_left_out_of_a_change() -> None:
    rows = torch.randn(40, N, 50, generator=torch.Generator().manual_seed(0))
    rows[20, 3] = torch.nan
    transport = InProcess()
    transport.connect(0, 1, N, torch.device("cpu"))
    algorithm = RobustSGD(CoordinateMedian(f=2))
    exchange = Exchange(algorithm, transport, 0)
    for gradients in rows:
        exchange.run(
            [Contribution(Gradients(g), torch.ones(1, dtype=torch.uint8)) for g in gradients],
            gradients[0],
        )
    found = exchange.heterogeneity
    assert found is not None
    assert found.estimates == 4  # rounds 1, 11, 21, 31
    assert found.value is not None
    assert found.value < 0.2


@dataclass(frozen=True)
class Asking(WeightedAggregator):
    """A mean that remembers what it was told of the workers' data."""

    f: int | None = 0
    told: list[float | None] = field(default_factory=list)

    def weights(self, rows: Rows) -> torch.Tensor:
        self.told.append(rows.unlike)
        return torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)


def run_rounds(exchange: Exchange, first: int, last: int, spread: float = 1.0) -> list[Any]:
    """The states of the estimate after each of these rounds."""
    means = spread * torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    used, states = torch.ones(1, dtype=torch.uint8), []
    for step in range(first, last):
        noise = torch.randn(N, D, generator=torch.Generator().manual_seed(step + 1))
        exchange.run([Contribution(Gradients(row), used) for row in means + noise], means[0])
        assert exchange.heterogeneity is not None
        states.append(exchange.heterogeneity.state(lambda tensor: tensor))
    return states


def alone(algorithm: RobustSGD, n: int = N) -> Exchange:
    transport = InProcess()
    transport.connect(0, 1, n, torch.device("cpu"))
    return Exchange(algorithm, transport, 0)


def test_rules_are_told_what_earlier_rounds_have_shown() -> None:
    rule = Asking()
    exchange = alone(RobustSGD(rule, worker_momentum=0.5))
    run_rounds(exchange, 0, 13)
    first, second = rule.told[2], rule.told[12]
    assert rule.told == [None] * 2 + [first] * 10 + [second]
    assert first is not None
    assert second not in (None, first)
    assert second == exchange.heterogeneity.value  # type: ignore[union-attr]


@pytest.mark.parametrize("saved_at", range(9, 13))
def test_a_resumed_run_estimates_what_the_uninterrupted_one_does(
    saved_at: int, tmp_path: Path
) -> None:
    """Also between the two rounds that are looked at together."""
    algorithm = RobustSGD(SpectralFilter(f=3), worker_momentum=0.5)
    whole, resumed = alone(algorithm), alone(algorithm)
    before = run_rounds(whole, 0, saved_at)[-1]
    assert (before["last"] is not None) == (saved_at == 11)
    torch.save((whole.server_state(), whole.worker_states()), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load(*saved, torch.zeros(D))
    ends = [run_rounds(exchange, saved_at, 23)[-1] for exchange in (whole, resumed)]
    assert ends[0] == ends[1]
    assert ends[0]["estimates"] == 3


def test_a_closure_that_is_evaluated_again_is_no_next_round() -> None:
    exchange = alone(RobustSGD(Mean(), worker_momentum=0.5))
    run_rounds(exchange, 0, 10)
    memory = exchange.memory()
    run_rounds(exchange, 10, 11)
    exchange.repeat(memory)
    again = run_rounds(exchange, 11, 12)[-1]
    assert (again["estimates"], again["turn"], again["rounds"]) == (1, 11, [11] * N)
    assert run_rounds(exchange, 12, 22)[-1]["estimates"] == 2


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_evaluations_without_an_estimate_count_for_nothing(beta: float) -> None:
    """A line search in which everything is nan, for a while."""
    exchange, bad = alone(RobustSGD(Mean(), worker_momentum=beta)), torch.full((N, D), torch.nan)
    used = torch.ones(1, dtype=torch.uint8)
    run_rounds(exchange, 0, 10)
    for _ in range(12):
        memory = exchange.memory()
        exchange.run([Contribution(Gradients(row), used) for row in bad], bad[0])
        exchange.repeat(memory)
    state = run_rounds(exchange, 10, 30)[-1]
    assert (state["turn"], state["rounds"], state["estimates"]) == (30, [30] * N, 3)
    assert exchange.heterogeneity.value == pytest.approx(0.5, abs=0.05)  # type: ignore[union-attr]


@pytest.mark.parametrize("evaluations", [2, 5])
def test_two_steps_are_compared_however_often_a_closure_is_evaluated(evaluations: int) -> None:
    exchange = alone(RobustSGD(Mean(), worker_momentum=0.5))
    for step in range(30):
        for k in range(evaluations):
            memory = exchange.memory()
            run_rounds(exchange, 5 * step + k, 5 * step + k + 1)
            if k < evaluations - 1:
                exchange.repeat(memory)
    found = exchange.heterogeneity
    assert found is not None
    assert found.estimates == 3
    assert found.value == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_with_another_seed_compares_no_other_columns(seed: int) -> None:
    algorithm = RobustSGD(Mean(), worker_momentum=0.5)
    exchange, other = alone(algorithm), alone(algorithm)
    run_rounds(exchange, 0, 11)
    other.seed = seed
    other.load(exchange.server_state(), exchange.worker_states(), torch.zeros(D))
    assert run_rounds(other, 11, 12)[-1]["estimates"] == (2 if seed == exchange.seed else 1)
    assert other.heterogeneity.value == pytest.approx(0.5, abs=0.05)  # type: ignore[union-attr]


@pytest.mark.parametrize("lie", [1e160, 1e307])
@pytest.mark.parametrize("liars", [1, 3])
def test_rows_that_no_number_can_square_do_not_hide_the_data(lie: float, liars: int) -> None:
    exchange, used = alone(RobustSGD(CoordinateMedian(f=3), worker_momentum=0.9)), torch.ones(1)
    means = 3 * torch.randn(N, 50, generator=torch.Generator().manual_seed(0)).double()
    for step in range(22):
        rows = means + torch.randn(N, 50, generator=torch.Generator().manual_seed(step + 1))
        rows[-liars:] = lie * rows[:liars].sign()
        exchange.run([Contribution(Gradients(row), used) for row in rows], rows[0])
    assert exchange.heterogeneity is not None
    assert exchange.heterogeneity.estimates == 3
    assert exchange.heterogeneity.value == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize(("n", "f"), [(3, 1), (5, 2), (7, 3), (11, 5), (10, 3)])
@pytest.mark.parametrize("attack", ["mimic", "mean"])
def test_liars_that_agree_with_honest_workers_do_not_hide_the_data(
    n: int, f: int, attack: str
) -> None:
    exchange, used = alone(RobustSGD(CoordinateMedian(f=f), worker_momentum=0.9), n), torch.ones(1)
    means = torch.randn(n, D, generator=torch.Generator().manual_seed(0))
    for step in range(42):
        rows = means + torch.randn(n, D, generator=torch.Generator().manual_seed(step + 1))
        rows[n - f :] = rows[0] if attack == "mimic" else rows[: n - f].mean(0)
        exchange.run([Contribution(Gradients(row), used) for row in rows], rows[0])
    assert exchange.heterogeneity is not None
    assert exchange.heterogeneity.value == pytest.approx(0.5, abs=0.1)


def test_a_checkpoint_of_a_run_that_did_not_count_has_old_averages() -> None:
    algorithm = RobustSGD(Mean(), worker_momentum=0.9)
    exchange, other = alone(algorithm), alone(algorithm)
    run_rounds(exchange, 0, 60)
    saved = exchange.server_state()
    del saved["experience"]
    other.load(saved, exchange.worker_states(), torch.zeros(D))
    assert run_rounds(other, 60, 62)[-1]["estimates"] == 1
    assert other.heterogeneity.value == pytest.approx(0.5, abs=0.05)  # type: ignore[union-attr]


def test_workers_that_begin_later_or_come_seldom_do_not_change_it() -> None:
    exchange, used = alone(RobustSGD(Mean(), worker_momentum=0.9)), torch.ones(1)
    means = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    for step in range(52):
        rows = means + torch.randn(N, D, generator=torch.Generator().manual_seed(step + 1))
        rows[:7] *= torch.nan if step < 8 else 1
        rows[7] *= torch.nan if step % 10 > 1 else 1
        exchange.run([Contribution(Gradients(row), used) for row in rows], means[0])
        if step in (11, 51):
            found = exchange.heterogeneity
            assert found is not None
            assert found.value == pytest.approx(0.5, abs=0.05)
    saved = exchange.server_state(), exchange.worker_states()
    del saved[1][3]  # it starts afresh
    other = alone(RobustSGD(Mean(), worker_momentum=0.9))
    other.load(*saved, torch.zeros(D))
    assert run_rounds(other, 52, 72)[-1]["rounds"][3] == 20
    assert other.heterogeneity.value == pytest.approx(0.5, abs=0.05)  # type: ignore[union-attr]


@pytest.mark.parametrize("f", [1, 3])
def test_workers_of_whom_most_may_lie_are_not_compared(f: int) -> None:
    """Three speak in both rounds of a pair."""
    exchange, used = alone(RobustSGD(CoordinateMedian(f=f))), torch.ones(1)
    for step in range(2):
        rows = torch.randn(N, D, generator=torch.Generator().manual_seed(step))
        rows[slice(7, N) if step == 0 else slice(0, 4)] = torch.nan
        exchange.run([Contribution(Gradients(row), used) for row in rows], rows[5])
    assert exchange.heterogeneity is not None
    assert exchange.heterogeneity.estimates == (1 if f == 1 else 0)


def test_a_run_of_other_workers_keeps_the_estimate_but_no_rows() -> None:
    algorithm = RobustSGD(Mean(), worker_momentum=0.5)
    exchange, other = alone(algorithm), alone(algorithm, N + 1)
    run_rounds(exchange, 0, 21)
    server = [exchange.server_state()]
    assert server[0]["experience"]["last"] is not None
    saved = {"server": server, "workers": [exchange.worker_states()], "silences": {}}
    saved |= {"workers_per_process": N, "rng": {}}
    follow = [*range(N), None]
    made = adapted(saved, follow, N + 1, [algorithm], [torch.zeros(D)])
    other.load(made["server"][0], made["workers"][0], torch.zeros(D))
    assert other.heterogeneity is not None
    before = exchange.heterogeneity.state(None)  # type: ignore[union-attr]
    assert other.heterogeneity.state(None) == {**before, "rounds": [*before["rounds"], 0]}
    assert other.heterogeneity.state(lambda tensor: tensor)["last"] is None


# -- who is told -----------------------------------------------------------------------------------


class Found:
    """An estimate that is known."""

    def __init__(self, value: float | None, estimates: int = ENOUGH) -> None:
        self.value, self.estimates = value, estimates


def told(rule: Aggregator, *found: Found) -> list[str]:
    """What a run with this rule warns of."""

    report = RoundReport(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for each in found:
            report.note_heterogeneity(each, rule)  # type: ignore[arg-type]
    return [str(warning.message) for warning in caught]


def test_who_loses_on_unlike_data_is_told_once() -> None:
    rule = Chain(pre=(NNM(),), rule=TrimmedMean(), f=2)
    (said,) = told(rule, Found(None), Found(0.9, ENOUGH - 1), Found(0.7), Found(0.9))
    assert "70 % data" in said
    assert "NNM + TrimmedMean" in said
    assert "f=2" in said
    assert "ByHeterogeneity()" in said
    for quiet in (Found(None), Found(UNLIKE - 0.01), Found(0.9, ENOUGH - 1)):
        assert not told(rule, quiet)


@pytest.mark.parametrize(
    ("rule", "bears"),
    [
        (SpectralFilter(f=2), True),
        (ByHeterogeneity(f=2), True),
        (GeometricMedian(f=2), True),
        (Chain(pre=(ARC(),), rule=Mean(), f=2), True),
        (Chain(pre=(StaticClipping(), ARC()), rule=GeometricMedian(), f=2), True),
        (Chain(pre=(NNM(),), rule=GeometricMedian(), f=2), False),
        (Chain(pre=(ARC(),), rule=CAF(), f=2), False),
        (CAF(f=2), False),
        (CAF(f=0), True),  # takes nobody for a liar
        (Krum(f=2), False),
        (CoordinateMedian(f=2), False),
    ],
)
def test_which_rules_are_warned_of(rule: Aggregator, bears: bool) -> None:
    assert bool(told(rule, Found(0.8))) != bears


@pytest.mark.parametrize(
    ("partition", "unlike"), [(None, False), (Dirichlet(0.1), True), (ByLabel(), True)]
)
def test_a_run_warns_where_data_differ(partition: Any, unlike: bool, tmp_path: Path) -> None:
    """Ten workers; CAF is warned of, and the default is not."""
    for rule, warned in ((CAF(), unlike), (ByHeterogeneity(), False)):
        strategy = ByzantineRobustStrategy(
            RobustSGD(rule, worker_momentum=0.9, undo_worker_momentum=True), workers_per_process=10
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (report,) = fit_told(tmp_path, strategy, partition)
        said = [str(each.message) for each in caught if "workers' data differ" in str(each.message)]
        assert len(said) == warned
        value = report["extra"][-1]["byz/heterogeneity"]
        assert (value > UNLIKE) == unlike


def fit_told(folder: Path, strategy: Any, partition: Any) -> list[dict[str, Any]]:
    """80 steps on the digits; unlike `fit`, warnings are heard."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        **{**QUIET, "max_epochs": -1, "max_steps": 80, "strategy": strategy},
        callbacks=[RobustnessMonitor(per_worker=False), Keeps(), Report(folder, logged)],
    )
    trainer.fit(DigitsClassifier(lr=0.005), DigitsDataModule(16, partition=partition))
    return [torch.load(folder / "rank0.pt", weights_only=False)]


@pytest.mark.processes
def test_slices_of_rows_say_what_whole_rows_say(tmp_path: Path) -> None:
    class Unlike(Plain):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            pull = torch.stack([parameter.mean() for parameter in self.parameters()]).sum()
            return super().training_step(batch, batch_idx) + 0.3 * self.global_rank * pull

    values = []
    for transport in (AllGather(), Sharded()):
        L.seed_everything(0, verbose=False)
        reports = fit(
            tmp_path,
            Unlike(),
            ByzantineRobustStrategy(
                RobustSGD(CoordinateMedian(), worker_momentum=0.5),
                num_byzantine=1,
                transport=transport,
                start_method="fork",
            ),
            devices=4,
            data=loader(6, shuffle=True),
            callbacks=[RobustnessMonitor(), Keeps()],
            extra=logged,
            max_epochs=-1,
            max_steps=24,
        )
        assert all(report["extra"] == reports[0]["extra"] for report in reports)
        values.append(reports[0]["extra"][-1]["byz/heterogeneity"])
    assert values[1] == pytest.approx(values[0], rel=1e-3)
    assert 0.05 < values[0] < 0.95
