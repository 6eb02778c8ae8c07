"""A checkpoint of a run with other workers: who is left keeps its state, everybody else is new."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from harness import assert_equal, fit, forked_ddp
from hypothesis import given
from hypothesis import strategies as st
from models import Plain, blobs, loader
from torch import Tensor
from zoo import ALGORITHMS, each, laws, robust

from lightning_byz import ByzEF21SGDM, InProcess, RobustSGD, TopK, WrongScale
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import Contribution
from lightning_byz.lightning import (
    ByzantineRobustStrategy,
    ByzantineWorkers,
    ShadowMode,
    SuspicionMonitor,
)
from lightning_byz.strategies import resuming_with_others as resuming
from lightning_byz.types import Gradients

D = 12
LIKE = torch.zeros(D)


def exchange_of(algorithm: Any, n: int) -> Exchange:
    transport = InProcess()
    transport.connect(0, 1, n, LIKE.device)
    return Exchange(algorithm, transport, 0)


def run(exchange: Exchange, rounds: int, workers: list[int]) -> list[Tensor]:
    """Rounds in which the i-th worker has the gradients of worker ``workers[i]``; the estimates."""
    estimates = []
    for _ in range(rounds):
        x = torch.full((D,), 0.01 * exchange.step)
        table = torch.randn(20, D, generator=torch.Generator().manual_seed(exchange.step))
        grads = [Gradients(table[w], 0.9 * table[w]) for w in workers]
        outcome = exchange.run(
            [Contribution(g, torch.ones(1, dtype=torch.bool)) for g in grads], x, table[0]
        )
        assert outcome.estimate is not None
        estimates.append(outcome.estimate.clone())
    return estimates


def saved_of(exchange: Exchange, n: int) -> dict[str, Any]:
    return {
        "n": n,
        "workers_per_process": n,
        "server": [exchange.server_state()],
        "workers": [exchange.worker_states()],
        "rng": {0: "the state of rank 0"},
        "silences": {w: w for w in range(n)},
    }


def resumed_by(saved: dict[str, Any], follow: list[int | None], algorithm: Any) -> Exchange:
    n = len(follow)
    adapted = resuming.adapted(saved, follow, n, [algorithm], [LIKE])
    exchange = exchange_of(algorithm, n)
    exchange.load(adapted["server"][0], adapted["workers"][0], LIKE)
    return exchange


FOLLOW = {
    "without two": [0, 2, 3, 5, 6, 7, 8],
    "one is new": [0, 1, None, 3, 4, 5, 6, 7, 8],
    "two more": [*range(9), None, None],
    "another order": [8, 3, 1, 0, 2, 4, 7, 6, 5],
}


@pytest.mark.thorough(keep=16)
@each(ALGORITHMS)
@pytest.mark.parametrize("name", FOLLOW)
def test_who_is_left_keeps_its_state_on_both_sides(case: Any, name: str) -> None:
    algorithm, follow = case.algorithm, FOLLOW[name]
    exchange = exchange_of(algorithm, 9)
    run(exchange, 5, [*range(9)])
    saved = saved_of(exchange, 9)
    before = copy.deepcopy(saved)
    if not _allows(algorithm, len(follow)):
        pytest.skip("it cannot run with so many workers")
    again = resumed_by(saved, follow, algorithm)
    assert again.step == 5
    for new, old in enumerate(follow):
        if old is not None:
            for now, then in zip(
                again.workers[new], before["workers"][0][old].values(), strict=True
            ):
                assert torch.equal(now, then)
    for field, value in again.server._asdict().items():
        then = before["server"][0]["server"][field]
        if value.ndim == 2:  # a mirror of each worker
            for new, old in enumerate(follow):
                assert torch.equal(value[new], torch.zeros(D) if old is None else then[old])
                if field in again.workers[new]._fields:  # both halves fit together
                    assert torch.equal(value[new], getattr(again.workers[new], field))
        else:
            assert torch.equal(value, then)
    estimates = run(again, 3, [12 if old is None else old for old in follow])
    assert all(bool(estimate.isfinite().all()) for estimate in estimates)


def _allows(algorithm: Any, n: int) -> bool:
    try:
        algorithm.check(n)
    except ValueError:
        return False
    return True


@each(ALGORITHMS)
def test_the_same_workers_go_on_with_the_same_bits(case: Any) -> None:
    exchange = exchange_of(case.algorithm, 9)
    run(exchange, 4, [*range(9)])
    again = resumed_by(saved_of(exchange, 9), [*range(9)], case.algorithm)
    for one, two in zip(run(exchange, 4, [*range(9)]), run(again, 4, [*range(9)]), strict=True):
        assert torch.equal(one, two)


@laws
@given(st.permutations(range(5)), st.integers(3, 5))
def test_a_run_without_some_workers_is_the_run_that_never_had_them_if_states_are_their_own(
    order: list[int], kept: int
) -> None:
    """EF21's mirrors depend on each worker's own messages alone: those that are left give the
    estimate of a run of their own.
    """
    algorithm, left = ByzEF21SGDM(robust(1), TopK(k=3)), order[:kept]
    whole, apart = exchange_of(algorithm, 5), exchange_of(algorithm, kept)
    run(whole, 4, [*range(5)])
    run(apart, 4, left)
    again = resumed_by(saved_of(whole, 5), [*left], algorithm)
    for one, two in zip(run(again, 3, left), run(apart, 3, left), strict=True):
        assert torch.equal(one, two)


def test_a_new_worker_starts_from_the_servers_mirror_of_it() -> None:
    algorithm = ByzEF21SGDM(robust(1), TopK(k=3))
    exchange = exchange_of(algorithm, 5)
    run(exchange, 4, [*range(5)])
    again = resumed_by(saved_of(exchange, 5), [0, None, 2, 3, 4, None], algorithm)
    for new in (1, 5):
        assert int(again.workers[new].rounds) == 0
        assert not again.workers[new].g.any()
        assert not again.server.g[new].any()
    run(again, 2, [0, 12, 2, 3, 4, 13])
    assert torch.equal(again.server.g[1], again.workers[1].g)


def test_random_states_follow_whole_ranks() -> None:
    saved = {
        "server": [],
        "workers": [],
        "workers_per_process": 2,
        "rng": {0: "a", 1: "b", 2: "c"},
        "silences": {},
    }

    def states(follow: list[int | None], workers_per_process: int = 2) -> dict[int, str]:
        return resuming.adapted(saved, follow, workers_per_process, [], [])["rng"]

    assert states([0, 1, 4, 5]) == {0: "a", 1: "c"}
    assert states([0, 2, 4, 5]) == {1: "c"}  # rank 0 is of two ranks
    assert states([None, None, 2, 3, 3, None]) == {1: "b"}
    assert states([0, 1, 2], 1) == {}


@pytest.mark.parametrize(
    ("workers", "match"),
    [
        ([0, 0], "each once"),
        ([-1], "each once"),
        ([True], "each once"),
        (["a"], "each once"),
        (3, "Found 3"),
    ],
)
def test_what_no_list_of_workers_is(workers: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ByzantineRobustStrategy(resume_workers=workers)


def test_whom_workers_follow() -> None:
    assert resuming.followed(None, 4, 3) == [0, 1, 2]
    assert resuming.followed(None, 3, 4) == [0, 1, 2, None]
    assert resuming.followed([0, 2], 4, 3) == [0, 2, None]
    for wrong in ([0, 4], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="should name up to n=3 workers, of 0 .. 3"):
            resuming.followed(wrong, 4, 3)


# -- whole runs ------------------------------------------------------------------------------------


class Saves(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def states(trainer: L.Trainer, module: L.LightningModule) -> Any:
    (exchange,) = trainer.strategy.exchanges
    return {
        "workers": exchange.worker_states(),
        "server": exchange.server,
        "silences": trainer.strategy.report.silences,
    }


class AtStart(L.Callback):
    """What a run goes on with."""

    def __init__(self) -> None:
        self.states: Any = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.states = states(trainer, module)


@pytest.mark.thorough(keep=3)
@pytest.mark.parametrize(
    "algorithm",
    [RobustSGD(worker_momentum=0.9), ByzEF21SGDM(compressor=TopK(ratio=0.3)), None],
    ids=repr,
)
@pytest.mark.parametrize(
    ("n", "workers"), [(3, [0, 2, 3]), (5, None), (4, [0, 1, None, 3]), (2, [3, 0])]
)
def test_a_run_resumes_with_other_workers(
    algorithm: Any, n: int, workers: Any, tmp_path: Path
) -> None:
    path = tmp_path / "saved.ckpt"

    def strategy(n: int, **kwargs: Any) -> ByzantineRobustStrategy:
        return ByzantineRobustStrategy(copy.deepcopy(algorithm), workers_per_process=n, **kwargs)

    (first,) = fit(tmp_path, Plain(), strategy(4), callbacks=[Saves(path)], extra=states)
    start = AtStart()
    settings = {"ckpt_path": str(path), "callbacks": [start], "max_epochs": 2}
    (second,) = fit(tmp_path, Plain(), strategy(n, resume_workers=workers), **settings)
    assert second["steps"] == 20
    follow = resuming.followed(workers, 4, n)
    if algorithm is None and n == 2:  # the default is a plain mean then
        assert start.states["workers"] == {}
        return
    for new, old in enumerate(follow):
        for name, value in start.states["workers"][new].items():
            then = first["extra"]["workers"][old][name] if old is not None else None
            assert torch.equal(value, torch.zeros_like(value) if then is None else then), (
                new,
                name,
            )
    if isinstance(algorithm, ByzEF21SGDM):
        for new in range(n):
            assert torch.equal(start.states["server"].g[new], start.states["workers"][new]["g"])


@pytest.mark.processes
@pytest.mark.parametrize(("before", "after", "workers"), [(4, 3, [0, 2, 3]), (3, 4, None)])
def test_ranks_resume_with_other_ranks(
    before: int, after: int, workers: Any, tmp_path: Path, capfd: Any
) -> None:
    path = tmp_path / "saved.ckpt"

    def strategy(**kwargs: Any) -> ByzantineRobustStrategy:
        return ByzantineRobustStrategy(
            ByzEF21SGDM(compressor=TopK(ratio=0.3)), start_method="fork", **kwargs
        )

    fit(tmp_path, Plain(), strategy(), devices=before, callbacks=[Saves(path)], data=loader(8))
    settings = {
        "ckpt_path": str(path),
        "max_epochs": 2,
        "data": loader(8),
        "extra": states,
        "devices": after,
    }
    reports = fit(tmp_path, Plain(), strategy(resume_workers=workers), **settings)
    for report in reports[1:]:
        assert_equal(reports[0], report)
    for rank, report in enumerate(reports):
        (own,) = report["extra"]["workers"].values()
        mirror = report["extra"]["server"].g[rank]
        if len(mirror) == len(own["g"]):
            assert torch.equal(mirror, own["g"])


@pytest.mark.processes
def test_shadow_mode_lets_ddp_resume_with_fewer_ranks(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    shadow = {"data": loader(6, blobs(480))}
    fit(tmp_path, Plain(), forked_ddp(), devices=4, callbacks=[ShadowMode(), Saves(path)], **shadow)

    class Says(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with (tmp_path / "said.txt").open("a") as file:
                file.write(record.getMessage() + "\n")

    handler = Says()
    logging.getLogger("lightning.pytorch.lightning_byz").addHandler(handler)

    def tested(trainer: L.Trainer, module: L.LightningModule) -> Any:
        (callback,) = (
            callback for callback in trainer.callbacks if isinstance(callback, ShadowMode)
        )
        return callback.test.pairs.tolist(), callback.looks

    try:
        settings = {"ckpt_path": str(path), "max_epochs": 2, "extra": tested, **shadow}
        reports = fit(
            tmp_path, Plain(), forked_ddp(), devices=3, callbacks=[ShadowMode()], **settings
        )
    finally:
        logging.getLogger("lightning.pytorch.lightning_byz").removeHandler(handler)
    pairs, looks = reports[0]["extra"]
    assert len(pairs) == 3
    assert looks == 2 * pairs[0] < 12
    said = [
        line for line in (tmp_path / "said.txt").read_text().splitlines() if "starts afresh" in line
    ]
    assert said == [
        "Shadow mode: its evidence starts afresh. The checkpoint's is of n=4 workers, or of other "
        "settings; here n=3, f=1, "
        "compare='others'."
    ]


def test_quarantine_goes_on_for_those_that_are_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "saved.ckpt"

    def go(n: int, workers: Any = None, **kwargs: Any) -> Any:
        liar = [ByzantineWorkers(WrongScale(), workers=[2])] if n == 7 else []
        monitor = SuspicionMonitor(quarantine=True)
        strategy = ByzantineRobustStrategy(
            RobustSGD(), workers_per_process=n, num_byzantine=2, resume_workers=workers
        )
        callbacks = [*liar, monitor, *([] if kwargs else [Saves(path)])]
        data = loader(42, blobs(2000), shuffle=False)
        fit(
            tmp_path,
            Plain(),
            strategy,
            callbacks=callbacks,
            data=data,
            max_epochs=9,
            **{"max_steps": 10, **kwargs},
        )
        return monitor

    assert go(7).quarantined == {2: 1}
    with caplog.at_level(logging.WARNING):
        moved = go(6, [0, 2, 3, 4, 5, 6], ckpt_path=str(path), max_steps=14)
    assert moved.quarantined == {1: 1}
    assert moved.tests[0].pairs.tolist() == [2, 0, 2, 2, 2, 2]  # afresh
    (said,) = (
        record.getMessage()
        for record in caplog.records
        if "still in quarantine" in record.getMessage()
    )
    assert "worker 1, rank 0" in said
    assert "since step 1" in said
    gone = go(6, [0, 1, 3, 4, 5, 6], ckpt_path=str(path), max_steps=14)
    assert gone.quarantined == {}
    assert gone.tests[0].pairs.tolist() == [2] * 6
