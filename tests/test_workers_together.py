"""Local workers' halves in one call of a coordinate-wise algorithm: where gradients lie in memory
changes no bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from zoo import ALGORITHMS, each, rows_for

from lightning_byz import CoordinateMedian, RobustSGD
from lightning_byz.algorithms import Algorithm
from lightning_byz.compressors import BFloat16
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import Contribution
from lightning_byz.numerics.memory import empty_rows, end_to_end, side_by_side
from lightning_byz.transports import InProcess
from lightning_byz.types import Gradients

N, D, ROUNDS = 9, 37, 8
USED = torch.ones(2, dtype=torch.bool)
COORDINATE_WISE = [case for case in ALGORITHMS if case.algorithm.coordinate_wise]


def begun(algorithm: Algorithm) -> Exchange:
    transport = InProcess()
    transport.connect(0, 1, N, torch.device("cpu"))
    return Exchange(algorithm, transport, 0)


def near(grads: Tensor) -> list[Tensor]:
    """The same gradients, side by side."""
    return [*empty_rows(*grads.shape, grads).copy_(grads)]


def far(grads: Tensor) -> list[Tensor]:
    """The same gradients, each in memory of its own."""
    return [row.clone() for row in grads]


def run(exchange: Exchange, rows: Sequence[Tensor], absent: Sequence[int] = ()) -> Tensor | None:
    said = [
        Contribution(None if i in absent else Gradients(row), USED) for i, row in enumerate(rows)
    ]
    estimate = exchange.run(said, torch.zeros(D, dtype=rows[0].dtype)).estimate
    return None if estimate is None else estimate.clone()


def assert_same(one: Exchange, other: Exchange) -> None:
    for worker, state in one.workers.items():
        for a, b in zip(state, other.workers[worker], strict=True):
            assert torch.equal(a, b)
    for a, b in zip(one.server, other.server, strict=True):
        assert torch.equal(a, b)


@each(COORDINATE_WISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_gradients_lie_changes_no_bit(case, dtype):
    together, apart = begun(case.algorithm), begun(case.algorithm)
    for step in range(ROUNDS):
        grads = rows_for(N, D, seed=step).to(dtype)
        if step == 5:
            grads[3, 7] = torch.nan
        absent = (2, 4) if step == 3 else ()
        a, b = run(together, near(grads), absent), run(apart, far(grads), absent)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
        assert_same(together, apart)


def test_one_call_serves_all_workers(monkeypatch):
    calls = []
    one = RobustSGD.worker
    monkeypatch.setattr(RobustSGD, "worker", lambda *a: calls.append(a[3].worker) or one(*a))
    exchange = begun(RobustSGD(CoordinateMedian(f=2), worker_momentum=0.5))
    rounds = []
    for step in range(5):
        calls.clear()
        run(exchange, near(rows_for(N, D, seed=step)))
        rounds.append(len(calls))
    assert rounds == [N, N, 1, 1, 1]  # the first two are looked at, worker by worker


def test_no_copy_of_the_states_is_made_from_round_to_round(monkeypatch):
    exchange = begun(RobustSGD(CoordinateMedian(f=2), worker_momentum=0.5))
    for step in range(4):
        run(exchange, near(rows_for(N, D, seed=step)))
    side = exchange._worker_side
    assert side is not None
    state = side._together._state
    assert side._together._joined(side.states, 48, D) is state
    places = set()
    for step in range(6):
        run(exchange, near(rows_for(N, D, seed=step)))
        places.add(side._together._state.m.data_ptr())
    assert len(places) == 2


def test_workers_with_unlike_pasts_are_asked_one_by_one():
    exchange = begun(RobustSGD(CoordinateMedian(f=2), worker_momentum=0.5))
    for step in range(4):
        run(exchange, near(rows_for(N, D, seed=step)), absent=(2,) if step == 3 else ())
    side = exchange._worker_side
    assert side is not None
    assert side._together._joined(side.states, 48, D) is None  # worker 2 has one round less


def test_a_state_that_was_loaded_is_what_goes_on():
    algorithm = RobustSGD(CoordinateMedian(f=2), worker_momentum=0.5)
    first = begun(algorithm)
    for step in range(4):
        run(first, near(rows_for(N, D, seed=step)))
    second = begun(algorithm)
    second.load(first.server_state(), first.worker_states(), torch.zeros(D, dtype=torch.float64))
    for step in range(4, 8):
        grads = rows_for(N, D, seed=step)
        assert torch.equal(run(first, near(grads)), run(second, near(grads)))
    assert_same(first, second)


def test_a_round_without_an_estimate_leaves_the_states():
    exchange = begun(RobustSGD(CoordinateMedian(f=4), worker_momentum=0.5))
    for step in range(3):
        run(exchange, near(rows_for(N, D, seed=step)))
    before = exchange.worker_states()
    exchange.quarantined = set(range(N))
    assert run(exchange, near(rows_for(N, D, seed=3))) is None
    after = exchange.worker_states()
    for worker in range(N):
        for name in before[worker]:
            assert torch.equal(before[worker][name], after[worker][name])
    exchange.quarantined = {1}
    run(exchange, near(rows_for(N, D, seed=4)))
    now = exchange.worker_states()
    assert torch.equal(now[1]["m"], before[1]["m"])
    assert not torch.equal(now[2]["m"], before[2]["m"])


def test_a_momentum_that_overflows_silences_its_worker_alone():
    algorithm = RobustSGD(CoordinateMedian(f=2), worker_momentum=0.5)
    together, apart = begun(algorithm), begun(algorithm)
    outcomes, exposed = [], []
    together.observers.append(outcomes.append)
    together.observers.append(lambda outcome: exposed.append(bool(outcome.rows.exposed.any())))
    most = torch.finfo(torch.float32).max
    for step in range(5):
        grads = rows_for(N, D, seed=step).float()
        grads[0, 0] = -most if step == 3 else most
        assert torch.equal(run(together, near(grads)), run(apart, far(grads)))
        assert_same(together, apart)
    assert [outcome.silent for outcome in outcomes] == [[], [], [], [0], []]
    assert not any(exposed)  # it says itself that its message is none


def test_payloads_of_another_kind_are_made_one_by_one():
    exchange = begun(RobustSGD(CoordinateMedian(f=2), BFloat16(), worker_momentum=0.5))
    other = begun(RobustSGD(CoordinateMedian(f=2), BFloat16(), worker_momentum=0.5))
    for step in range(4):
        grads = rows_for(N, D, seed=step).float()
        assert torch.equal(run(exchange, near(grads)), run(other, far(grads)))


# -- memory ----------------------------------------------------------------------------------------


def test_side_by_side_tells_what_is_one_matrix():
    rows = empty_rows(4, 5, torch.empty(0)).normal_()
    assert torch.equal(side_by_side(list(rows)), rows)
    assert side_by_side(list(rows)).data_ptr() == rows.data_ptr()
    assert torch.equal(side_by_side(list(rows[1:3])), rows[1:3])
    assert torch.equal(side_by_side(list(rows[::2])), rows[::2])
    for vectors in (
        [rows[0], rows[1], rows[3]],  # unequal distances
        [rows[1], rows[0]],
        [rows[0], None],
        [rows[0], rows[1].clone()],
        [rows[0], rows[1, :4]],
        [rows[0]],
        [rows[0, :4:2], rows[1, :4:2]],
    ):
        assert side_by_side(vectors) is None


def test_end_to_end_holds_the_rows_and_zeros_between_them():
    rows = empty_rows(3, 5, torch.empty(0)).fill_(1.0)
    flat = end_to_end(rows)
    assert flat is not None
    assert len(flat) == 48
    assert float(flat.sum()) == 15
    assert flat.data_ptr() == rows.data_ptr()
    base = torch.ones(15)
    assert end_to_end(base.as_strided((2, 5), (10, 1))) is None  # the second row ends the memory
