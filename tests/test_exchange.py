"""The round in one process, without Lightning: who counts, what is kept, what is restored, and what
travels.
"""

import copy
import dataclasses
import json
import random
import re
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import MutableMapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from zoo import ALGORITHMS, each, laws, lied_to, robust, rows_for

from lightning_byz.aggregators import (
    Bucketing,
    Chain,
    CoordinateMedian,
    Krum,
    MajorityVote,
    Mean,
    TrimmedMean,
)
from lightning_byz.algorithms import (
    ByzDM21,
    ByzEF21SGDM,
    ByzEF21SGDMBC,
    DeviationFilter,
    DStar,
    RobustSGD,
    SignSGDMajorityVote,
)
from lightning_byz.attacks import (
    FlippedBit,
    FoE,
    LineSearch,
    Mimic,
    Mixture,
    NotANumber,
    SignFlip,
    Stuck,
)
from lightning_byz.attacks.base import Attack, checked_lies
from lightning_byz.compressors import QSGD, Contractive, Field, Identity, PerTensor, RandK, TopK
from lightning_byz.data.batches import BatchSplitter, batch_size, split_batch
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import NO_LOSS, Contribution
from lightning_byz.engine.simulation import Simulation
from lightning_byz.numerics.finite import all_finite
from lightning_byz.numerics.memory import TensorPool
from lightning_byz.numerics.rows import Rows
from lightning_byz.strategies.random_states import restore, snapshot, worker_rng
from lightning_byz.strategies.step_logs import StepLogs, WorkerLog
from lightning_byz.transports import InProcess
from lightning_byz.transports.wire import pack, packed_size, unpack
from lightning_byz.types import Gradients, Round, keyed_generator, keyed_seed

N, D, P = 5, 8, 3
CPU = torch.device("cpu")
LIKE = torch.zeros(D, dtype=torch.float64)
ALL_USED = torch.ones(P, dtype=torch.bool)


def connected(n=N, transport=None):
    transport = transport or InProcess()
    transport.connect(0, 1, n, CPU)
    return transport


def grads_of(step=0, n=N, d=D):
    return rows_for(n, d, seed=step)


def contributions(grads, absent=(), used=None):
    return [
        Contribution(
            None if worker in absent else Gradients(g, g.flip(0)),
            ALL_USED if used is None else used[worker],
        )
        for worker, g in enumerate(grads)
    ]


def frozen(exchange):
    server = [] if exchange.server is None else [*exchange.server]
    return [t.clone() for state in [server, *exchange.workers.values()] for t in state]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# -- who counts ------------------------------------------------------------------------------------


class Stopwatch(InProcess):
    """Messages arrive when the test says so, and that is measured."""

    measured = True

    def __init__(self, seconds):
        super().__init__()
        self.seconds = torch.tensor(seconds, dtype=torch.float64)

    def arrivals(self):
        return self.seconds


def test_of_messages_that_are_there_only_those_of_the_first_k_count():
    """More than k may have come by the time a round closes."""
    transport = connected(transport=Stopwatch([3.0, 1.0, 9.0, 2.0, torch.inf]))
    exchange = Exchange(DStar(DeviationFilter(f=1), k=3), transport, 0)
    for step in range(3):
        outcome = exchange.run(contributions(grads_of(step)), LIKE)
        assert outcome.round.present.tolist() == [True, True, False, True, False]
        assert torch.equal(outcome.round.cohort, outcome.round.present)


def test_absent_workers_are_silent_and_the_rule_sees_the_others():
    grads = grads_of()
    outcome = Exchange(RobustSGD(CoordinateMedian(f=2)), connected(), 0).run(
        contributions(grads, absent=(1, 3)), LIKE
    )
    assert outcome.silent == [1, 3]
    assert outcome.round.present.tolist() == [True, False, True, False, True]
    assert torch.equal(outcome.estimate, grads[[0, 2, 4]].median(0).values)
    assert not outcome.rows.dense()[[1, 3]].any()


@pytest.mark.parametrize(
    "algorithm",
    [RobustSGD(CoordinateMedian(f=2), worker_momentum=0.9), ByzEF21SGDM(CoordinateMedian(f=2))],
)
def test_whose_message_never_arrives_is_silent_whatever_its_gradient(algorithm):
    """Also once all workers' messages come from one call."""
    late = torch.zeros(N, dtype=torch.float64)
    exchange, other = (Exchange(algorithm, connected(), 0) for _ in range(2))
    exchange.simulation = Simulation()
    never = late.index_fill(0, torch.tensor(3), torch.inf)
    exchange.simulation.delays.append(lambda step: never if step in (2, 4) else late)
    for step in range(6):
        outcome = exchange.run(contributions(grads_of(step)), LIKE)
        absent = (3,) if step in (2, 4) else ()
        expected = other.run(contributions(grads_of(step), absent=absent), LIKE)
        assert outcome.silent == list(absent)
        assert torch.equal(outcome.estimate, expected.estimate)
        assert same(frozen(exchange), frozen(other))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_is_silence(bad):
    grads = grads_of()
    grads[2, 5] = bad
    exchange = Exchange(RobustSGD(CoordinateMedian(f=2), worker_momentum=0.5), connected(), 0)
    outcome = exchange.run(contributions(grads), LIKE)
    assert outcome.silent == [2]
    assert exchange.workers[2].rounds == 0
    assert not exchange.workers[2].m.any()
    assert [int(exchange.workers[worker].rounds) for worker in (0, 1, 3, 4)] == [1] * 4


class Corrupting(InProcess):
    """A wire that damages what one worker sends."""

    def __init__(self, worker, damage):
        self.worker, self.damage = worker, damage

    def gather(self, messages, layout):
        everybody = super().gather(messages, layout)
        everybody[self.worker] = self.damage(*(tensor.clone() for tensor in everybody[self.worker]))
        return everybody


@pytest.mark.parametrize(
    "damage",
    [
        lambda flags, values, index: (flags, values * torch.nan, index),
        lambda flags, values, index: (flags, values, index + D),
        lambda flags, values, index: (flags, values, index.flip(0)),
        lambda flags, values, index: (flags * 0, values, index),
        lambda flags, values, index: (flags + 1, values, index),
    ],
    ids=["nan", "outside", "unsorted", "silent", "another flag"],
)
@pytest.mark.parametrize(
    "algorithm",
    [ByzEF21SGDM(robust(1), TopK(k=3)), RobustSGD(robust(1), TopK(k=3), worker_momentum=0.9)],
    ids=["ef21", "momentum"],
)
def test_a_message_that_does_not_count_leaves_its_worker_and_its_mirror_as_they_were(
    algorithm, damage
):
    wire = connected(transport=Corrupting(2, lambda *message: message))
    exchange = Exchange(algorithm, wire, 0)
    exchange.run(contributions(grads_of(0)), LIKE)
    worker = [t.clone() for t in exchange.workers[2]]
    mirror = [t[2].clone() for t in exchange.server if t.ndim == 2]
    wire.damage = damage
    outcome = exchange.run(contributions(grads_of(1)), LIKE)
    assert outcome.silent == [2]
    assert outcome.estimate.isfinite().all()
    assert same(worker, [*exchange.workers[2]])
    assert same(mirror, [t[2] for t in exchange.server if t.ndim == 2])
    assert int(exchange.workers[0].rounds) == 2


def test_a_parameter_is_used_if_more_than_f_present_workers_have_a_gradient_of_it():
    used = [
        torch.tensor(flags) for flags in ([1, 1, 0], [1, 1, 0], [1, 0, 1], [1, 0, 0], [1, 0, 1])
    ]
    used = [flags.bool() for flags in used]

    def run(f, absent=()):
        exchange = Exchange(RobustSGD(CoordinateMedian(f=f)), connected(), 0)
        return exchange.run(contributions(grads_of(), absent, used), LIKE).used.tolist()

    assert run(0) == [True, True, True]
    assert run(1) == [True, True, True]
    assert run(2) == [True, False, False]
    assert run(1, absent=(2,)) == [True, True, False]
    # f shrinks: one present worker is enough
    assert run(2, absent=(0, 1, 2, 3)) == [True, False, True]


def test_nobody_present_gives_no_estimate_and_changes_nothing():
    exchange = Exchange(
        RobustSGD(TrimmedMean(f=1), worker_momentum=0.5, server_momentum=0.5), connected(), 0
    )
    exchange.run(contributions(grads_of(0)), LIKE)
    before = frozen(exchange)
    outcome = exchange.run(contributions(grads_of(1), absent=range(N)), LIKE)
    assert outcome.estimate is None
    assert outcome.reason == NO_LOSS
    assert outcome.silent == [*range(N)]
    assert same(before, frozen(exchange))
    assert exchange.step == 2  # the round has passed, and its random streams with it
    assert exchange.run(contributions(grads_of(2)), LIKE).estimate is not None


def test_too_few_rows_leave_the_workers_that_spoke_as_they_were():
    exchange = Exchange(RobustSGD(Krum(f=1), worker_momentum=0.5), connected(), 0)
    exchange.run(contributions(grads_of(0)), LIKE)
    before = frozen(exchange)
    assert exchange.run(contributions(grads_of(1), absent=(0, 1, 2)), LIKE).estimate is None
    assert same(before, frozen(exchange))


@each(ALGORITHMS)
def test_bytes_are_those_of_the_payload_also_of_silence(case):
    for absent in ((), (0,)):
        algorithm = case.algorithm
        exchange = Exchange(algorithm, connected(9), 0)
        if absent and algorithm.aggregator.f == 0:
            continue
        outcome = exchange.run(contributions(grads_of(n=9), absent), LIKE)
        assert outcome.bytes_up == algorithm.codec(outcome.round).nbytes(D, torch.float64)
        assert outcome.bytes_down == algorithm.downlink(outcome.round).nbytes(D, torch.float64)


def test_gradients_are_not_modified_and_the_dtype_is_kept():
    for dtype in (torch.float32, torch.float64):
        grads = grads_of().to(dtype)
        before = grads.clone()
        outcome = Exchange(ByzEF21SGDM(robust(1)), connected(), 0).run(
            contributions(grads), LIKE.to(dtype)
        )
        assert outcome.estimate.dtype == dtype
        assert torch.equal(grads, before)


@pytest.mark.parametrize("tie", ["plus_one", "zero", "random"])
@pytest.mark.parametrize("absent", [(), (1,), (0, 3), (0, 1, 2, 3)], ids=str)
def test_the_vote_on_packed_bits_is_the_rules(tie, absent):
    """Also where it is too few: four of five absent leave one, and nobody can be outvoted."""
    algorithm = SignSGDMajorityVote(MajorityVote(f=1, tie=tie), momentum=0.0)

    @dataclasses.dataclass(frozen=True)
    class Decoding(SignSGDMajorityVote):
        def tally(self, payloads, rows, round):
            return None

    decoding = Decoding(algorithm.aggregator, 0.0)
    grads = grads_of(d=70) - 1
    like = torch.zeros(70, dtype=torch.float64)
    found, expected = (
        Exchange(method, connected(), 3).run(contributions(grads, absent), like)
        for method in (algorithm, decoding)
    )
    assert found.reason == expected.reason
    if found.reason:
        assert found.estimate is None
    else:
        assert torch.equal(found.estimate, expected.estimate)
        assert found.bytes_down == expected.bytes_down
    assert torch.equal(found.rows.dense(), expected.rows.dense())


@dataclasses.dataclass(frozen=True)
class Disagrees(Identity):
    """Its payload is not what its layout says."""

    how: str = "longer"

    def encode(self, x, generator=None):
        return {
            "longer": (torch.cat([x, x[:1]]),),
            "narrower": (x.float(),),
            "two": (x, x),
            "none": (),
            "a number": (1.0,),
        }[self.how]


@pytest.mark.parametrize("how", ["longer", "narrower", "two", "none", "a number"])
def test_a_compressor_that_disagrees_with_its_layout_is_an_error_by_its_name(how):
    exchange = Exchange(RobustSGD(CoordinateMedian(f=1), Disagrees(how)), connected(), 0)
    with pytest.raises(
        ValueError,
        match=rf"`encode` of Disagrees .* `layout` declares for {D} numbers of torch.float64: \[{D}\]",
    ):
        exchange.run(contributions(grads_of()), LIKE)
    codec = Disagrees(how)
    codec.check((grads_of()[0],), D, torch.float64)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda own: own[0], r"\[7\]"),
        (lambda own: own[:1], r"\[1, 7\]"),
        (lambda own: own.long(), "int64"),
        (lambda own: None, "None"),
    ],
)
def test_an_attack_that_does_not_answer_for_each_worker_is_an_error_by_its_name(answer, found):
    class Wrong(SignFlip):
        def __call__(self, honest, own, scene=None):
            return answer(own)

    own = torch.zeros(2, 7)
    with pytest.raises(
        ValueError, match=rf"Wrong should answer .*\[b, d\] = \[2, 7\].* Found .*{found}"
    ):
        checked_lies(Wrong(), answer(own), own)
    assert checked_lies(Wrong(), own, own) is own


def test_observers_see_every_outcome_and_rounds_are_counted():
    exchange, seen = Exchange(RobustSGD(Mean()), connected(), 0), []
    exchange.observers.append(seen.append)
    outcomes = [exchange.run(contributions(grads_of(step)), LIKE) for step in range(3)]
    assert all(a is b for a, b in zip(seen, outcomes, strict=True))
    assert [outcome.round.step for outcome in seen] == [0, 1, 2]


def test_another_dimension_starts_afresh():
    exchange = Exchange(ByzEF21SGDM(robust(1)), connected(), 0)
    exchange.run(contributions(grads_of()), LIKE)
    outcome = exchange.run(
        contributions(grads_of(1, d=D + 2)), torch.zeros(D + 2, dtype=torch.float64)
    )
    assert outcome.estimate.shape == (D + 2,)
    assert exchange.server.g.shape == (N, D + 2)


@pytest.mark.parametrize(
    ("value", "finite"),
    [(0.0, True), (3e38, True), (torch.nan, False), (torch.inf, False), (-torch.inf, False)],
)
def test_all_finite(value, finite):
    x = torch.ones(1000)
    x[500] = value
    assert all_finite(x) == finite
    assert all_finite(torch.empty(0))


# -- checkpoint ------------------------------------------------------------------------------------


@each(ALGORITHMS)
def test_saved_and_loaded_goes_on_bit_for_bit(case, tmp_path):
    algorithm = case.algorithm
    straight = Exchange(algorithm, connected(9), seed=4)
    for step in range(3):
        straight.run(contributions(grads_of(step, n=9)), LIKE + step)
    torch.save(
        {"server": straight.server_state(), "workers": straight.worker_states()},
        tmp_path / "state.pt",
    )
    saved = torch.load(tmp_path / "state.pt", weights_only=True)

    resumed = Exchange(algorithm, connected(9), seed=4)
    resumed.load(saved["server"], saved["workers"], LIKE)
    assert resumed.step == 3
    assert same(frozen(straight), frozen(resumed))
    for step in range(3, 6):
        a, b = (
            exchange.run(contributions(grads_of(step, n=9)), LIKE + step**2)
            for exchange in (straight, resumed)
        )
        assert torch.equal(a.estimate, b.estimate)
    assert same(frozen(straight), frozen(resumed))


def test_a_checkpoint_from_before_the_first_round_is_a_clean_start():
    exchange, fresh = (Exchange(ByzEF21SGDM(robust(1)), connected(), 0) for _ in range(2))
    clean = copy.deepcopy((fresh.server_state(), fresh.worker_states()))
    exchange.run(contributions(grads_of()), LIKE)
    exchange.load(*clean, LIKE)
    assert exchange.step == 0
    assert torch.equal(
        exchange.run(contributions(grads_of(1)), LIKE).estimate,
        fresh.run(contributions(grads_of(1)), LIKE).estimate,
    )


def test_workers_that_a_checkpoint_does_not_know_start_afresh():
    exchange = Exchange(RobustSGD(robust(1), worker_momentum=0.5), connected(), 0)
    exchange.run(contributions(grads_of()), LIKE)
    states = exchange.worker_states()
    del states[2]
    exchange.load(exchange.server_state(), states, LIKE)
    assert [int(exchange.workers[worker].rounds) for worker in range(N)] == [1, 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("saved_by", "loaded_by", "n", "owner"),
    [
        (RobustSGD(robust(1)), ByzEF21SGDM(robust(1)), N, "server"),
        (ByzEF21SGDM(robust(1)), RobustSGD(robust(1)), N, "server"),
        (ByzEF21SGDM(robust(1)), ByzEF21SGDM(robust(1)), N + 2, "server"),
        (RobustSGD(robust(1)), RobustSGD(robust(1), server_momentum=0.9), N, "server"),
        (
            RobustSGD(robust(1), worker_momentum=0.0),
            RobustSGD(robust(1), worker_momentum=0.9),
            N,
            "worker 0",
        ),
    ],
)
def test_a_checkpoint_of_other_shapes_is_refused(saved_by, loaded_by, n, owner):
    exchange = Exchange(saved_by, connected(), 0)
    exchange.run(contributions(grads_of()), LIKE)
    with pytest.raises(
        ValueError, match=f"checkpoint's state of the {owner} should have .* another algorithm"
    ):
        Exchange(loaded_by, connected(n), 0).load(
            exchange.server_state(), exchange.worker_states(), LIKE
        )


class Waiting(InProcess):
    """Writes down for whom a server would wait."""

    measured = True

    def __init__(self):
        self.told = []

    def awaits(self, awaited):
        self.told.append((awaited.spare, awaited.least, awaited.full))


@pytest.mark.parametrize(
    ("algorithm", "told"),
    [
        # five are enough for f = 2 at the deadline
        (RobustSGD(robust(2)), (0, 5, False)),
        # the first 7 of 9
        (DStar(DeviationFilter(f=2), k=7), (2, 5, False)),
        # anybody is enough for a mean
        (RobustSGD(Mean()), (0, 1, False)),
    ],
    ids=["all", "the first k", "f = 0"],
)
def test_a_server_waits_for_no_more_than_the_round_needs(algorithm, told):
    transport = Waiting()
    transport.connect(0, 1, 9, CPU)
    Exchange(algorithm, transport, 0).next_round(LIKE)
    assert transport.told == [told]


# -- workers that lie ------------------------------------------------------------------------------


class Recording(Attack):
    def __init__(self, answer=lambda honest, own: torch.full_like(own, 5.0)):
        self.calls, self.answer = [], answer

    def __call__(self, honest, own, scene):
        self.calls.append(
            (honest.clone(), own.clone(), torch.rand(1, generator=scene.generator).item())
        )
        return self.answer(honest, own)


def lying(attack, workers, active=lambda step: True, codec=None, used=None):
    algorithm = RobustSGD(Mean() if codec is None else CoordinateMedian(f=2), codec or Identity())
    return lied_to(Exchange(algorithm, connected(), 0), attack, workers, active)


def test_byzantine_workers_send_the_attack_and_honest_ones_what_they_computed():
    attack, grads = Recording(), grads_of()
    outcome = lying(attack, [4, 1]).run(contributions(grads), LIKE)
    rows = outcome.rows.dense()
    assert torch.equal(rows[[0, 2, 3]], grads[[0, 2, 3]])
    assert (rows[[1, 4]] == 5).all()
    honest, own, _ = attack.calls[0]
    assert torch.equal(honest, grads[[0, 2, 3]])
    assert torch.equal(own, grads[[1, 4]])


def test_inactive_rounds_are_honest():
    attack, grads = Recording(), grads_of()
    exchange = lying(attack, [0], active=lambda step: step == 1)
    assert torch.equal(exchange.run(contributions(grads), LIKE).rows.dense(), grads)
    assert not attack.calls
    assert (exchange.run(contributions(grads), LIKE).rows.dense()[0] == 5).all()
    assert torch.equal(exchange.run(contributions(grads), LIKE).rows.dense(), grads)


def test_the_attack_sees_neither_absent_nor_broken_messages_and_speaks_for_absent_liars():
    attack, grads = Recording(), grads_of()
    grads[2, 0] = torch.nan
    outcome = lying(attack, [0, 1]).run(contributions(grads, absent=(1, 3)), LIKE)
    honest, own, _ = attack.calls[0]
    assert torch.equal(honest, grads[[4]])
    assert torch.equal(own, torch.stack([grads[0], torch.zeros(D, dtype=torch.float64)]))
    assert outcome.silent == [2, 3]
    assert (outcome.rows.dense()[1] == 5).all()


def test_without_honest_messages_there_is_nothing_to_attack():
    attack, grads = Recording(), grads_of()
    outcome = lying(attack, [0, 1]).run(contributions(grads, absent=(2, 3, 4)), LIKE)
    assert not attack.calls
    assert torch.equal(outcome.rows.dense()[:2], grads[:2])


def test_lies_go_through_the_codec():
    attack = Recording(lambda honest, own: torch.arange(1.0, D + 1).double().expand_as(own))
    outcome = lying(attack, [2], codec=TopK(k=3)).run(contributions(grads_of()), LIKE)
    assert outcome.rows.dense()[2].tolist() == [0, 0, 0, 0, 0, 6, 7, 8]
    # and honest messages are seen as the server decodes them
    assert (attack.calls[0][0] != 0).sum(1).tolist() == [3] * 4


@pytest.mark.parametrize("codec", [Identity(), TopK(k=2)])
def test_a_lie_that_is_not_finite_is_silence(codec):
    assert lying(NotANumber(), [1, 2], codec=codec).run(contributions(grads_of()), LIKE).silent == [
        1,
        2,
    ]


def test_every_process_tells_the_same_lies_and_every_round_others():
    attacks = [Recording() for _ in range(2)]
    for attack in attacks:
        exchange = lying(attack, [0])
        torch.rand(3)
        for step in range(2):
            exchange.run(contributions(grads_of(step)), LIKE)
    assert [call[2] for call in attacks[0].calls] == [call[2] for call in attacks[1].calls]
    assert attacks[0].calls[0][2] != attacks[0].calls[1][2]


class Seeing(Attack):
    """Writes down what it sees, and sends fives."""

    def __init__(self, forged=True):
        self.scenes, self.honest, self.forged = [], [], forged

    def __call__(self, honest, own, scene):
        self.scenes.append(scene)
        self.honest.append(honest)
        return torch.full_like(own, 5.0)

    def forges(self, b):
        return [self.forged] * b


def seen_by(attack, algorithm, workers=(0, 3), n=N, **kwargs):
    """An exchange whose attackers see everything."""
    return lied_to(Exchange(algorithm, connected(n), 0), attack, workers, **kwargs)


def test_the_scene_names_the_workers_and_the_step():
    attack = Seeing()
    exchange = seen_by(attack, RobustSGD(robust(1)), workers=(3, 0), x=lambda index: LIKE + 2)
    for step in range(2):
        exchange.run(contributions(grads_of(step), absent=(1, 3)), LIKE)
        scene = attack.scenes[step]
        assert (scene.step, scene.honest, scene.own, scene.byzantine) == (
            step,
            [2, 4],
            [0, 3],
            [0, 3],
        )
        assert torch.equal(scene.x(), LIKE + 2)
        assert scene.agree == exchange.transport.agree


def test_faulty_workers_without_a_message_stay_silent():
    attack = Seeing(forged=False)
    outcome = seen_by(attack, RobustSGD(robust(1))).run(
        contributions(grads_of(), absent=(3,)), LIKE
    )
    assert attack.scenes[0].own == [0]
    assert outcome.silent == [3]
    assert seen_by(FlippedBit(), RobustSGD(robust(1))).run(
        contributions(grads_of(), absent=(0, 3)), LIKE
    ).silent == [0, 3]


@dataclasses.dataclass(frozen=True)
class Sampled(RobustSGD):
    """Worker 4 and worker 3 are not in the cohort."""

    def cohort(self, round):
        return torch.tensor([True, True, True, False, False])


def test_workers_outside_the_cohort_neither_speak_nor_are_seen():
    attack = Seeing()
    outcome = seen_by(attack, Sampled(robust(1))).run(
        contributions(grads_of(), absent=(3, 4)), LIKE
    )
    assert (attack.scenes[0].honest, attack.scenes[0].own) == ([1, 2], [0])
    assert outcome.silent == [], "who was not asked is not silent"


@pytest.mark.parametrize(
    "name",
    [
        "robust_sgd",
        "robust_sgd_undone",
        "robust_sgd_both",
        "ef21_top_k",
        "robust_sgd_rand_k",
        "bucketing",
    ],
)
def test_an_attacker_knows_what_the_server_would_make_of_its_lies_and_changes_nothing(name):
    algorithm = next((case.algorithm for case in ALGORITHMS if case.name == name), None)
    algorithm = algorithm or RobustSGD(Chain(pre=(Bucketing(),), rule=CoordinateMedian(), f=2))
    tried = []

    class Tries(Seeing):
        def __call__(self, honest, own, scene):
            for value in (1e30, torch.nan, 1.0):
                scene.aggregate(torch.full_like(own, value))
            scene.target()
            lies = super().__call__(honest, own, scene)
            tried.append([scene.aggregate(lies).clone() for _ in range(2)])
            return lies

    exchanges = [seen_by(attack, algorithm, n=9) for attack in (Tries(), Seeing())]
    for step in range(4):
        grads = grads_of(step, 9)
        outcomes = [exchange.run(contributions(grads, absent=(5,)), LIKE) for exchange in exchanges]
        assert same([outcomes[0].estimate] * 3, [outcomes[1].estimate, *tried[step]])
        assert same(*map(frozen, exchanges))
        assert outcomes[0].silent == [5]


@pytest.mark.parametrize("name", ["robust_sgd", "robust_sgd_undone", "robust_sgd_server_momentum"])
def test_the_target_is_what_a_mean_of_the_honest_would_have_given(name):
    algorithm = next(case.algorithm for case in ALGORITHMS if case.name == name)
    attack = Seeing()
    exchange = seen_by(attack, algorithm, n=9)
    for step in range(3):
        before = None if exchange.server is None else copy.deepcopy(exchange.server)
        exchange.run(contributions(grads_of(step, 9), absent=(5,)), LIKE)
        mean = dataclasses.replace(algorithm, aggregator=Mean())
        honest = torch.stack(list(attack.honest[step]))
        expected, _ = mean.server(
            Rows(honest), before or mean.init_server(LIKE, 9), Round(step, len(honest))
        )
    scene = attack.scenes[-1]
    torch.testing.assert_close(scene.target(), expected)


def test_all_candidates_meet_the_same_chance_in_the_codec():
    """Then a search compares lies, not luck: an average of what Rand-K lets through is linear in
    the lies.
    """
    attack = Seeing()
    seen_by(attack, RobustSGD(Mean(), RandK(k=3))).run(contributions(grads_of()), LIKE)
    server, lies = attack.scenes[0].aggregate, rows_for(2, D, seed=5)
    nothing = server(0 * lies)
    torch.testing.assert_close(server(2 * lies) - nothing, 2 * (server(lies) - nothing))
    assert (server(lies) - nothing).abs().sum() > 0


def test_lies_that_would_skip_the_step_give_nothing():
    attack = Seeing()
    seen_by(attack, RobustSGD(CoordinateMedian(f=2)), workers=(0, 1, 2)).run(
        contributions(grads_of()), LIKE
    )
    assert not attack.scenes[0].aggregate(torch.full((3, D), torch.nan).double()).any()


def test_an_optimized_attack_does_more_harm_than_its_first_guess():
    def error(attack):
        outcome = seen_by(attack, RobustSGD(robust(2)), workers=(0, 1)).run(
            contributions(grads_of()), LIKE
        )
        return float((outcome.estimate - grads_of()[2:].mean(0)).norm())

    assert error(FoE()) > 1.2 * error(FoE(LineSearch(1)))


def test_memory_starts_anew_with_the_run_and_with_other_parameters():
    exchange = seen_by(Stuck(), RobustSGD(robust(1)))
    (adversary,) = exchange.simulation.adversaries
    for step in range(3):
        exchange.run(contributions(grads_of(step)), LIKE)
    assert torch.equal(adversary.memory(0)["0"], grads_of(0)[0])
    exchange.step = 0
    exchange.run(contributions(grads_of(7)), LIKE)
    assert torch.equal(adversary.memory(0)["0"], grads_of(7)[0])
    exchange.run(contributions(grads_of(8, d=3)), torch.zeros(3).double())
    assert torch.equal(adversary.memory(0)["0"], grads_of(8, d=3)[0])


@pytest.mark.parametrize(
    "attack", [Stuck(), Mimic(warmup=3), Mixture((Stuck(), Mimic(warmup=3)))], ids=repr
)
def test_memory_survives_a_checkpoint(attack):
    whole, resumed = (seen_by(attack, RobustSGD(robust(2), worker_momentum=0.5)) for _ in range(2))
    for step in range(2):
        whole.run(contributions(grads_of(step)), LIKE)
    (before,), (after,) = (exchange.simulation.adversaries for exchange in (whole, resumed))
    saved = copy.deepcopy(before.state_dict(0))
    resumed.load(copy.deepcopy(whole.server_state()), copy.deepcopy(whole.worker_states()), LIKE)
    after.load_state_dict(0, saved)
    for step in range(2, 5):
        estimates = [
            exchange.run(contributions(grads_of(step)), LIKE).estimate
            for exchange in (whole, resumed)
        ]
        assert torch.equal(*estimates)
    assert sorted(before.memory(0)) == sorted(after.memory(0))


def test_nobody_takes_anothers_lies_for_honest_messages():
    """Two attacks in one run, and a third worker whose data are poisoned."""
    attacks, algorithm = [Seeing(), Seeing()], RobustSGD(robust(1))
    exchange = Exchange(algorithm, connected(), 0)
    for attack, worker in zip(attacks, (1, 2), strict=True):
        lied_to(exchange, attack, [worker]).simulation.liars.append(lambda step: {1, 2, 4})
    outcome = exchange.run(contributions(grads_of()), LIKE)
    for attack, own in zip(attacks, (1, 2), strict=True):
        assert (attack.scenes[0].honest, attack.scenes[0].own) == ([0, 3], [own])
        assert torch.equal(attack.honest[0], grads_of()[[0, 3]])
    lies = torch.full((1, D), 5.0).double()
    # the lies of the first are known to the second
    assert torch.equal(attacks[1].scenes[0].aggregate(lies), outcome.estimate)


@pytest.mark.parametrize("attack", [SignFlip(), FoE(), Mimic(), Stuck(), FlippedBit()], ids=repr)
def test_without_byzantine_workers_nothing_changes(attack):
    outcome = seen_by(attack, RobustSGD(robust(1)), workers=()).run(contributions(grads_of()), LIKE)
    assert torch.equal(outcome.rows.dense(), grads_of())


def test_an_attack_that_its_workers_cannot_carry_out_is_refused():
    with pytest.raises(ValueError, match="needs at least one Byzantine worker for each. Found 1"):
        lying(Mixture((Stuck(), SignFlip())), [1]).run(contributions(grads_of()), LIKE)


def test_in_process_refuses_several_processes():
    with pytest.raises(ValueError, match="world_size=2"):
        InProcess().connect(0, 2, 1, CPU)


# -- the wire --------------------------------------------------------------------------------------

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.int8,
    torch.bool,
]
FIELDS = st.lists(
    st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES)), max_size=6
)


def bits(tensor):
    return (
        tensor.contiguous().view(-1).view(torch.uint8)
        if tensor.numel()
        else torch.empty(0, dtype=torch.uint8)
    )


@laws
@given(FIELDS, st.integers(1, 4), st.integers(0, 10**6))
def test_what_is_packed_is_unpacked_bit_for_bit_from_any_row_of_a_buffer(fields, copies, seed):
    layout = [Field(tuple(shape), dtype) for shape, dtype in fields]
    generator = torch.Generator().manual_seed(seed)

    def noise(field):
        if field.dtype == torch.bool:
            return torch.rand(field.shape, generator=generator) < 0.5
        # nan, inf and subnormals too
        raw = torch.randint(0, 256, (field.nbytes,), generator=generator, dtype=torch.uint8)
        return raw.view(field.dtype).view(field.shape)

    messages = [[noise(field) for field in layout] for _ in range(copies)]
    buffer = torch.zeros(copies, packed_size(layout), dtype=torch.uint8)
    for message, out in zip(messages, buffer, strict=True):
        pack(message, layout, out)
    assert packed_size(layout) % 8 == 0
    assert (
        sum(field.nbytes for field in layout)
        <= packed_size(layout)
        <= sum(field.nbytes + 7 for field in layout)
    )
    for message, row in zip(messages, buffer.clone(), strict=True):
        for sent, received in zip(message, unpack(row, layout), strict=True):
            assert sent.shape == received.shape
            assert sent.dtype == received.dtype
            assert torch.equal(bits(sent), bits(received))


@pytest.mark.parametrize(
    "tensor", [torch.zeros(4), torch.zeros(3, dtype=torch.float64), torch.zeros(3, 1)]
)
def test_a_message_of_another_layout_is_not_packed(tensor):
    layout = [Field((3,), torch.float32)]
    with pytest.raises(ValueError, match="must follow its layout"):
        pack([tensor], layout, torch.zeros(packed_size(layout), dtype=torch.uint8))


# -- splitting batches -----------------------------------------------------------------------------


class Item(NamedTuple):
    x: object
    y: object


@dataclasses.dataclass
class Sample:
    x: object
    name: object = "sample"


class Bag(OrderedDict):
    pass


def nestings(size):
    tensors = st.sampled_from([(), (2,), (1, 3)]).map(
        lambda shape: torch.arange(size).float().view(-1, *[1] * len(shape)).expand(size, *shape)
    )
    leaves = st.one_of(
        tensors,
        st.just([f"id{i}" for i in range(size)]),
        st.just(torch.tensor(3.0)),
        st.sampled_from([None, 1.5, "text", True]),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3).map(tuple),
            st.lists(inner, min_size=1, max_size=3),
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1),
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1).map(Bag),
            st.tuples(inner, inner).map(lambda pair: Item(*pair)),
            st.tuples(inner, inner).map(lambda pair: Sample(*pair)),
        ),
        max_leaves=8,
    ).map(lambda nested: (torch.arange(size), {"nested": nested}))


def samples(part, whole, size):
    """Walks a part next to the whole batch; yields, for every leaf that is cut, which samples the
    part holds.
    """
    assert type(part) is type(whole)
    if isinstance(whole, torch.Tensor):
        if whole.ndim:
            assert part.shape[1:] == whole.shape[1:]
            yield part.reshape(len(part), -1)[:, 0].long().tolist()
        else:
            assert part is whole
    elif (
        isinstance(whole, list)
        and whole
        and all(isinstance(leaf, str) and leaf.startswith("id") for leaf in whole)
    ):
        yield [int(leaf[2:]) for leaf in part]
    elif isinstance(whole, dict):
        assert part.keys() == whole.keys()
        for key in whole:
            yield from samples(part[key], whole[key], size)
    elif isinstance(whole, (list, tuple)) and not (len(part) != len(whole) and len(whole) == size):
        for a, b in zip(part, whole, strict=True):
            yield from samples(a, b, size)
    elif isinstance(whole, Sample):
        yield from samples(part.x, whole.x, size)
        yield from samples(part.name, whole.name, size)
    elif not isinstance(whole, (list, tuple)):
        assert part is whole


@laws
@given(st.data(), st.integers(4, 11), st.integers(1, 6))
def test_parts_hold_every_sample_once_in_order_whatever_the_nesting(data, size, parts):
    batch = data.draw(nestings(size))
    cut = split_batch(batch, parts)
    assert len(cut) == parts
    held = [part for part in cut if part is not None]
    assert len(held) == min(size, parts)
    owners = []
    for part in held:
        assert batch_size(part) in (size // len(held), size // len(held) + 1)
        leaves = list(samples(part, batch, size))
        assert all(leaf == leaves[0] for leaf in leaves)
        owners += leaves[0]
    assert owners == list(range(size))


@pytest.mark.parametrize(
    ("size", "parts", "sizes"),
    [(10, 4, [2, 3, 2, 3]), (2, 4, [1, 1, None, None]), (0, 2, [None, None]), (3, 1, [3])],
)
def test_sizes_of_parts(size, parts, sizes):
    assert [
        None if part is None else len(part) for part in split_batch(torch.zeros(size, 2), parts)
    ] == sizes


def test_parts_are_views_and_the_batch_is_untouched():
    x = torch.arange(6.0)
    batch = {"x": x, "names": ["a"] * 6}
    first, second = split_batch(batch, 2)
    assert first["x"].data_ptr() == x.data_ptr()
    assert second["x"].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert len(batch["names"]) == 6
    assert len(batch["x"]) == 6


def test_a_record_as_long_as_the_batch_is_not_cut():
    """Two samples, and a named tuple of two numbers: it has two fields, not one field per
    sample.
    """
    first, second = split_batch((torch.zeros(2, 3), Item(0.5, "sgd")), 2)
    assert first[1] == second[1] == Item(0.5, "sgd")


def test_lists_that_default_collate_makes_hold_no_samples():
    views = [Sample(torch.arange(2)), Sample(torch.arange(2))]
    first, second = BatchSplitter(DataLoader(range(2)), 2).split(views)
    assert [view.x.tolist() for view in first] == [[0], [0]]
    assert [view.x.tolist() for view in second] == [[1], [1]]


class Box(MutableMapping):
    """A mapping whose shallow copies share their entries."""

    def __init__(self, entries):
        self.entries = dict(entries)

    def __getitem__(self, key):
        return self.entries[key]

    def __setitem__(self, key, value):
        self.entries[key] = value

    def __delitem__(self, key):
        del self.entries[key]

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)


@pytest.mark.parametrize(
    "kind", [dict, OrderedDict, UserDict, Box, MappingProxyType, lambda x: defaultdict(list, x)]
)
def test_every_kind_of_mapping_keeps_its_type_and_its_entries(kind):
    batch = kind({"x": torch.arange(4), "n": 3})
    parts = split_batch(batch, 2)
    assert [type(part) for part in parts] == [type(batch)] * 2
    assert [part["x"].tolist() for part in parts] == [[0, 1], [2, 3]]
    assert batch["x"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"a": 1, "b": "text"}, "Found none in a batch of type dict"),
        (torch.tensor(1.0), "Found none"),
        ((torch.zeros(4), torch.zeros(3)), "starting with 4 and 3"),
    ],
)
def test_batches_that_cannot_be_split_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        split_batch(batch, 2)


def of_size(size, collate_fn=list):
    """A loader of batches of this size."""
    return DataLoader(range(size), batch_size=size, collate_fn=collate_fn)


def sequences(lengths, mark=0):
    """One sequence for each length, with the sample's number as its values."""
    return [torch.full((length, 4), float(mark + i)) for i, length in enumerate(lengths)]


def image(i, height=5, width=6):
    return torch.full((3, height, width), float(i))


def target(i, boxes):
    return {
        "boxes": torch.full((boxes, 4), float(i)),
        "labels": torch.full((boxes,), i),
        "name": f"image{i}",
    }


class Opaque:
    """As torch_geometric's Data: no container, and holds tensors."""

    def __init__(self, i):
        self.x, self.inner = (
            torch.full((2 + i, 3), float(i)),
            {"edge_index": torch.zeros(2, 5, dtype=torch.int64)},
        )


def numbers(item):
    """All sample numbers in an entry that is one sample."""
    if isinstance(item, torch.Tensor):
        return set(item.flatten().tolist())
    if isinstance(item, dict):
        return set().union(*(numbers(value) for value in item.values()))
    if isinstance(item, (list, tuple)):
        return set().union(*map(numbers, item))
    if isinstance(item, Opaque):
        return numbers(item.x)
    return {float(re.sub("[a-z]", "", item))} if isinstance(item, str) else {float(item)}


LISTS_OF_SAMPLES = {
    "sequences of one length": lambda n: sequences([16] * n),
    "sequences of several lengths": lambda n: sequences([3 + i % 5 for i in range(n)]),
    "images": lambda n: [image(i) for i in range(n)],
    "images of several sizes": lambda n: [image(i, 4 + i, 6 - i % 3) for i in range(n)],
    "a tuple of sequences": lambda n: tuple(sequences([16] * n)),
    "dicts": lambda n: [{"image": image(i), **target(i, 1 + i % 3)} for i in range(n)],
    "pairs": lambda n: [(image(i), i) for i in range(n)],
    "objects": lambda n: [Opaque(i) for i in range(n)],
    "texts": lambda n: [f"text{i}" for i in range(n)],
    "records without tensors": lambda n: [{"text": f"text{i}", "label": i} for i in range(n)],
}
RECORDS_OF_LISTS = {
    "detection": lambda n: (
        [image(i, 4 + i) for i in range(n)],
        [target(i, 1 + i % 3) for i in range(n)],
    ),
    "detection, zipped": lambda n: tuple(
        zip(*[(image(i), target(i, 1 + i % 3)) for i in range(n)], strict=True)
    ),
    "images and labels": lambda n: ([image(i) for i in range(n)], torch.arange(n)),
    "labels one by one": lambda n: {
        "x": [image(i) for i in range(n)],
        "y": [torch.tensor(i) for i in range(n)],
    },
    "sequences, lengths, names": lambda n: {
        "x": {"sequences": sequences([3 + i % 4 for i in range(n)])},
        "lengths": torch.arange(n),
        "names": [f"s{i}" for i in range(n)],
    },
    "texts and labels": lambda n: {"text": [f"text{i}" for i in range(n)], "label": list(range(n))},
    "texts and tokens": lambda n: {
        "text": [f"text{i}" for i in range(n)],
        "tokens": [[i] * (1 + i % 3) for i in range(n)],
    },
    "arrays": lambda n: {
        "x": torch.arange(n),
        "id": np.arange(n),
        "names": np.array([f"s{i}" for i in range(n)]),
    },
}


def held(part, inside=False):
    """Which samples each list in a record holds; the outer tuple is a record."""
    if isinstance(part, dict) or (isinstance(part, tuple) and not inside):
        values = part.values() if isinstance(part, dict) else part
        return [owners for value in values for owners in held(value, True)]
    return [[max(numbers(entry)) for entry in part]]


@pytest.mark.parametrize("n", [8, 7, 12])
@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("name", [*LISTS_OF_SAMPLES])
def test_lists_of_samples_are_cut_by_samples(name, n, parts):
    splitter = BatchSplitter(of_size(n), parts)
    for size in (n, n, parts + 1, 2):  # the last batch of an epoch is smaller
        batch = LISTS_OF_SAMPLES[name](size)
        cut = splitter.split(batch)
        assert [splitter.size(part) for part in cut] == [
            0 if part is None else len(part) for part in cut
        ]
        assert all(type(part) is type(batch) for part in cut if part is not None)
        together = [entry for part in cut if part is not None for entry in part]
        assert len(together) == size
        assert all(mine is theirs for mine, theirs in zip(together, batch, strict=True))


@pytest.mark.parametrize("n", [8, 7])
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", [*RECORDS_OF_LISTS])
def test_records_of_lists_are_cut_alike(name, n, parts):
    splitter = BatchSplitter(of_size(n), parts)
    for size in (n, parts + 1):
        cut = splitter.split(RECORDS_OF_LISTS[name](size))
        owners = []
        for part in cut:
            first, *others = held(part)
            assert all(other == first for other in others)
            assert splitter.size(part) == len(first)
            owners += first
        assert owners == list(range(size))


@pytest.mark.parametrize("views", [2, 4, 8])
def test_views_of_a_batch_are_fields(views):
    """Two crops of every image, or eight: the list is as long as the crops, and every tensor as the
    batch.
    """
    for loader, sizes in (
        (of_size(12), (12, 12, 5)),
        (DataLoader(range(12), batch_size=12), (12, 4, views)),
    ):
        splitter = BatchSplitter(loader, 4)
        for size in sizes:
            cut = splitter.split(
                [torch.arange(size)[:, None].expand(size, 3 + i % 2) for i in range(views)]
            )
            owners = [
                sample for part in cut if part is not None for sample in part[-1][:, 0].tolist()
            ]
            assert owners == list(range(size))
            assert all(len(part) == views for part in cut if part is not None)


@pytest.mark.parametrize(
    "batch",
    [
        sequences([8] * 8),  # eight sequences of eight steps, or eight fields of eight samples
        [image(i) for i in range(3)],
        sequences([16] * 8),  # of a loader that nobody knows
    ],
)
def test_lists_that_may_be_read_both_ways_are_refused(batch):
    loader = None if batch[0].shape[0] == 16 else of_size(len(batch))
    with pytest.raises(ValueError, match=r"both ways.*Define split_batch\(self, batch, parts\)"):
        BatchSplitter(loader, 3).split(batch)


@pytest.mark.parametrize("batch", [Opaque(3), (Opaque(3), torch.zeros(4)), {"graph": Opaque(1)}])
def test_objects_that_hide_tensors_are_refused(batch):
    with pytest.raises(ValueError, match="Found a Opaque"):
        BatchSplitter(of_size(4), 2).split(batch)


@pytest.mark.parametrize("sort", [True, False])
def test_packed_sequences_are_cut_by_sequences(sort):
    whole = (
        sorted(sequences([3, 1, 4, 2, 5]), key=len, reverse=True)
        if sort
        else sequences([3, 1, 4, 2, 5])
    )
    packed = torch.nn.utils.rnn.pack_sequence(whole, enforce_sorted=sort)
    splitter = BatchSplitter(of_size(5), 2)
    cut = splitter.split((packed, torch.arange(5)))
    assert [splitter.size(part) for part in cut] == [2, 3]
    together = [
        sequence for part, _ in cut for sequence in torch.nn.utils.rnn.unpack_sequence(part)
    ]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(together, whole, strict=True))
    assert [(part.sorted_indices is None) for part, _ in cut] == [sort, sort]


@pytest.mark.filterwarnings("ignore:Sparse CS")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_nested_and_sparse_tensors_are_cut(layout):
    nested = torch.nested.nested_tensor(sequences([3, 1, 4, 2]), layout=torch.jagged)
    sparse = torch.eye(4).to_sparse(layout=layout)
    first, second = split_batch({"n": nested, "s": sparse}, 2)
    assert [len(sequence) for part in (first, second) for sequence in part["n"].unbind()] == [
        3,
        1,
        4,
        2,
    ]
    assert first["s"].layout == layout
    assert torch.equal(torch.cat([first["s"].to_dense(), second["s"].to_dense()]), torch.eye(4))


def test_a_mappings_own_records_are_cut_with_it():
    class Encoding(UserDict):
        """As transformers' BatchEncoding keeps what its tokenizer knows of each sample."""

    batch = Encoding({"input_ids": torch.zeros(4, 3)})
    batch.encodings, batch.n = ["a", "b", "c", "d"], 2
    cut = split_batch(batch, 2)
    assert [part.encodings for part in cut] == [["a", "b"], ["c", "d"]]
    assert [part.n for part in cut] == [2, 2]
    assert batch.encodings == ["a", "b", "c", "d"]


def test_batches_of_several_loaders_are_cut_one_by_one():
    loaders = {"a": of_size(8), "b": DataLoader(range(9), batch_size=3)}
    splitter = BatchSplitter(loaders, 2)
    cut = splitter.split({"a": sequences([16] * 8), "b": [torch.arange(3), torch.arange(3)]})
    assert [len(part["a"]) for part in cut] == [4, 4]
    assert [[field.tolist() for field in part["b"]] for part in cut] == [
        [[0], [0]],
        [[1, 2], [1, 2]],
    ]
    assert [splitter.size(part) for part in cut] == [4, 4]
    exhausted = splitter.split({"a": None, "b": [torch.arange(3)]})
    assert [part["a"] for part in exhausted] == [None, None]
    assert [splitter.size(part) for part in exhausted] == [1, 2]
    # no sample of b for this worker
    assert splitter.split({"a": sequences([16] * 8), "b": [torch.arange(1)]})[1] is None


def test_a_module_may_split_by_hand():
    splitter = BatchSplitter(
        of_size(4), 2, lambda batch, parts: [batch[:, i::parts] for i in range(parts)]
    )
    assert [part.tolist() for part in splitter.split(torch.arange(8).view(2, 4))] == [
        [[0, 2], [4, 6]],
        [[1, 3], [5, 7]],
    ]
    for wrong in ([1], None, "ab", iter([1, 2])):
        with pytest.raises(
            ValueError,
            match=r"split_batch\(batch, parts\) of the LightningModule should return a list of 2 parts",
        ):
            BatchSplitter(None, 2, lambda batch, parts, wrong=wrong: wrong).split(torch.zeros(2))


# -- what workers log ------------------------------------------------------------------------------


def logs(*workers):
    out = []
    for values in workers:
        log = WorkerLog(samples=2)
        for name, value in values.items():
            if name == "loss":
                log.loss = torch.tensor(value)
            else:
                log.record(name, value, prog_bar=True, sync_dist=True)
        out.append(log)
    return out


def reduced(step_logs, worker_logs, honest=None):
    n = len(worker_logs)
    calls = step_logs.reduce(
        worker_logs, connected(n), [True] * n if honest is None else honest, CPU
    )
    return {call.name: float(call.value) for call in calls}, calls


def test_logs_are_averaged_over_the_workers_that_logged():
    values, calls = reduced(
        StepLogs(),
        logs({"a": 1.0, "b": torch.tensor(4.0)}, {"a": 3}, {"a": np.float32(2.0), "b": True}),
    )
    assert values == {"a": 2.0, "b": 2.5}
    assert calls[0].kwargs == {"prog_bar": True, "batch_size": 6}  # sync_dist is done


def test_new_and_forgotten_names():
    step_logs = StepLogs()
    assert reduced(step_logs, logs({}, {}))[0] == {}
    assert reduced(step_logs, logs({"a": 1.0}, {}))[0] == {"a": 1.0}
    assert reduced(step_logs, logs({"b": 1.0}, {"c": 2.0}))[0] == {"b": 1.0, "c": 2.0}
    assert reduced(step_logs, logs({"a": 1.0, "c": 3.0}, {"a": 5.0}))[0] == {"a": 3.0, "c": 3.0}


@pytest.mark.parametrize(
    ("reduce_fx", "value"), [("mean", 1.5), ("sum", 3.0), ("max", 2.0), (torch.min, 1.0)]
)
def test_several_calls_of_one_worker_are_reduced_as_the_call_says(reduce_fx, value):
    log = WorkerLog(samples=1)
    log.record("a", 1.0, reduce_fx=reduce_fx)
    log.record("a", 2.0, reduce_fx=reduce_fx)
    assert reduced(StepLogs(), [log])[0] == {"a": value}


def test_the_batch_size_that_a_worker_gives_counts():
    log = WorkerLog(samples=1)
    log.record("a", 1.0, batch_size=50)
    assert reduced(StepLogs(), [log])[1][0].kwargs["batch_size"] == 50


def test_every_value_has_a_batch_size_of_its_own():
    worker_logs = logs({"a": 1.0}, {"a": 1.0})
    worker_logs[0].record("b", 1.0, batch_size=50)
    worker_logs[1].record("b", 1.0, batch_size=7)
    assert [call.kwargs["batch_size"] for call in reduced(StepLogs(), worker_logs)[1]] == [4, 57]


def test_only_honest_workers_are_logged_and_their_samples_counted():
    values, calls = reduced(
        StepLogs(), logs({"a": 1.0}, {"a": 1e9}, {"a": 3.0}), honest=[True, False, True]
    )
    assert values == {"a": 2.0}
    assert calls[0].kwargs["batch_size"] == 4


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("mean", 3.0), ("sum", 9.0), ("max", 6.0), ("min", 1.0), (torch.sum, 9.0), (max, 6.0)],
)
def test_reductions(kind, expected):
    worker_logs = logs({}, {}, {})
    for log, value in zip(worker_logs, (1.0, 2.0, 6.0), strict=True):
        log.record("a", value, reduce_fx=kind)
    assert reduced(StepLogs(), worker_logs)[0] == {"a": expected}


def test_values_that_are_not_finite_are_left_out_and_counted():
    step_logs = StepLogs()
    values, _ = reduced(step_logs, logs({"a": 1.0, "b": torch.nan}, {"a": torch.inf}, {"a": 3.0}))
    assert values["a"] == 2.0
    assert np.isnan(values["b"])
    assert step_logs.skipped == {"a": 1, "b": 1}


def test_the_loss_is_the_median_of_the_finite_ones():
    step_logs = StepLogs()
    reduced(step_logs, logs({"loss": 1.0}, {"loss": 1e9}, {"loss": 2.0}, {"loss": torch.nan}, {}))
    assert step_logs.loss == 2.0
    reduced(step_logs, logs({"loss": torch.nan}, {}))
    assert step_logs.loss is None


class Lying:
    """Two or more workers, of which the last ones send what ``change`` makes of worker 0's
    messages.
    """

    workers_per_process = 1

    def __init__(self, change, n=2):
        self.change, self.n, self.gathers = change, n, 0

    def gather(self, messages, layout):
        assert [(tuple(t.shape), t.dtype) for t in messages[0]] == [
            (field.shape, field.dtype) for field in layout
        ]
        self.gathers += 1
        theirs = tuple(t.clone() for t in messages[0])
        return [messages[0]] * (self.n - 1) + [self.change(theirs)]

    def post(self, messages, layout):
        self.posted = self.gather(messages, layout)

    def delivered(self):
        return self.posted


def of_rows(change):
    def changed(message):
        if message[0].dtype == torch.float64:
            change(message[0])
        return message

    return changed


LIES = {
    "it never knows a name": of_rows(lambda row: row.__setitem__(0, 0.0)),
    "a flag that is none": of_rows(lambda row: row.__setitem__(0, 0.5)),
    "nan samples": of_rows(lambda row: row.__setitem__(1, torch.nan)),
    "infinitely many samples": of_rows(lambda row: row.__setitem__(1, torch.inf)),
    "negative samples": of_rows(lambda row: row.__setitem__(1, -1e9)),
    "half a sample": of_rows(lambda row: row.__setitem__(1, 0.5)),
    "all nan": of_rows(lambda row: row.fill_(torch.nan)),
    "silence": lambda message: None,
    "no text": lambda message: (message[0] * 0,) if message[0].dtype != torch.float64 else message,
    "a text too long": lambda message: (
        (message[0] + 10**12,) if message[0].dtype == torch.int64 else message
    ),
    "a negative length": lambda message: (
        (message[0] * 0 - 5,) if message[0].dtype == torch.int64 else message
    ),
    "garbage for a text": lambda message: (
        (message[0] + 77,) if message[0].dtype == torch.uint8 else message
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_liars_row_is_silence(lie):
    step_logs = StepLogs()
    for value in (1.0, 2.0, 3.0):
        log = WorkerLog(samples=8)
        log.record("a", value)
        log.loss = torch.tensor(value)
        (call,) = step_logs.reduce([log], Lying(LIES[lie]), [True, True], CPU)
        assert (call.name, float(call.value)) == ("a", value)
        assert call.kwargs["batch_size"] in (8, 16)
        assert step_logs.loss == value
    assert bool(step_logs.refusals.counts.get(1)) == (lie != "silence")
    assert not step_logs.refusals.counts.get(0)


def test_a_liars_number_of_samples_does_not_count():
    log = WorkerLog(samples=8)
    log.record("a", 1.0)
    (call,) = StepLogs().reduce([log], Lying(LIES["negative samples"]), [True, True], CPU)
    assert call.kwargs["batch_size"] == 8


@pytest.mark.parametrize(
    "arguments", [{"on_step": False}, {"reduce_fx": "nothing"}, {"rank": 1}, {"prog_bar": "yes"}]
)
def test_names_that_lightning_would_refuse_are_not_taken_from_others(arguments):
    text = json.dumps({"theirs": arguments}).encode()

    def change(message):
        if message[0].dtype == torch.float64:
            message[0][0] = 0.0
        elif message[0].dtype == torch.int64:
            message[0][0] = len(text)
        else:
            message[0][: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return message

    step_logs = StepLogs()
    log = WorkerLog(samples=8)
    log.record("ours" * 20, 1.0)
    calls = step_logs.reduce([log], Lying(change), [True, True], CPU)
    assert [call.name for call in calls] == ["ours" * 20]
    assert step_logs.refusals.counts


def test_most_workers_say_how_a_name_is_logged():
    """Worker 0 has not logged it itself; one of the three others says that it is a sum."""
    texts = [
        json.dumps({"a": {"reduce_fx": fx}}).encode().ljust(40) for fx in ("sum", "mean", "mean")
    ]

    class Others(Lying):
        def gather(self, messages, layout):
            own = messages[0][0]
            if own.dtype == torch.float64:
                rows = [own.clone() for _ in texts]
                for row in rows:
                    row[0] = float(len(own) > 3)
                    row[3:4] = 4.0
            elif own.dtype == torch.int64:
                rows = [torch.tensor([len(text)]) for text in texts]
            else:
                rows = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts]
            return [messages[0], *[(row,) for row in rows]]

    step_logs = StepLogs()
    (call,) = step_logs.reduce([WorkerLog(samples=8)], Others(None, 4), [True] * 4, CPU)
    assert (call.name, float(call.value), call.kwargs["reduce_fx"]) == ("a", 4.0, "mean")
    log = WorkerLog(samples=8)
    log.record("a", 4.0, reduce_fx="max")  # Lightning knows it as a mean
    (call,) = step_logs.reduce([log], Others(None, 4), [True] * 4, CPU)
    assert call.kwargs["reduce_fx"] == "mean"


def test_a_run_logs_no_more_names_than_it_can(monkeypatch):
    monkeypatch.setattr("lightning_byz.strategies.step_logs._MOST_NAMES", 3)
    step_logs = StepLogs()
    for step in range(3):
        values, _ = reduced(step_logs, logs({f"a{step}": 1.0, f"b{step}": 1.0}, {"a0": 3.0}))
        assert set(values) == {0: {"a0", "b0"}, 1: {"a0", "a1"}, 2: {"a0"}}[step]
    assert step_logs.refusals.counts


def test_workers_in_quarantine_are_not_logged():
    step_logs = StepLogs()
    worker_logs = logs({"a": 1.0, "loss": 1.0}, {"a": 1e9, "loss": 1e9}, {"a": 3.0, "loss": 3.0})
    calls = step_logs.reduce(worker_logs, connected(3), [True] * 3, CPU, {1})
    assert [(call.name, float(call.value), call.kwargs["batch_size"]) for call in calls] == [
        ("a", 2.0, 4)
    ]
    assert step_logs.loss == 2.0


@pytest.mark.parametrize("name", ["SUM", "Sum", "sum", torch.sum, sum])
def test_reductions_in_capitals_are_the_same(name):
    worker_logs = logs({}, {}, {})
    for log, value in zip(worker_logs, (1.0, 2.0, 6.0), strict=True):
        log.record("a", value, reduce_fx=name)
    assert reduced(StepLogs(), worker_logs)[0] == {"a": 9.0}


@pytest.mark.parametrize(
    ("value", "default", "kept"),
    [
        (torch.tensor(1 + 1e-10, dtype=torch.float64), torch.float32, torch.float64),
        (torch.tensor(1.5), torch.float64, torch.float32),
        (torch.tensor(1.5, dtype=torch.bfloat16), torch.float32, torch.float32),
        (1 + 1e-10, torch.float32, torch.float32),
        (1 + 1e-10, torch.float64, torch.float64),
    ],
)
def test_logged_values_keep_their_precision(value, default, kept):
    """As Lightning's own results keep it."""
    before = torch.get_default_dtype()
    step_logs, worker_logs = StepLogs(), logs({}, {})
    torch.set_default_dtype(default)
    try:
        for log in worker_logs:
            log.record("a", value)
    finally:
        torch.set_default_dtype(before)
    again = StepLogs()
    for known in (step_logs, again):
        (call,) = known.reduce(
            worker_logs if known is step_logs else logs({"a": 1.0}, {"a": 2.0}),
            connected(2),
            [True] * 2,
            CPU,
        )
        assert call.value.dtype == kept
        again.load(json.loads(json.dumps(step_logs.state())))  # what a checkpoint keeps
    assert float(step_logs.reduce(worker_logs, connected(2), [True] * 2, CPU)[0].value) == float(
        torch.as_tensor(value, dtype=torch.float64).to(kept)
    )


def test_positional_arguments_of_log_are_named():
    log = WorkerLog(samples=1)
    log.record("a", 1.0, True, False, on_epoch=True)
    assert log.calls[0].kwargs == {"prog_bar": True, "logger": False, "on_epoch": True}


# -- random streams --------------------------------------------------------------------------------


def draw():
    return (
        torch.rand(2).tolist(),
        np.random.rand(2).tolist(),
        np.random.randn(),
        random.random(),
        random.gauss(0, 1),
    )


@pytest.mark.parametrize("odd", [0, 1])
def test_snapshot_and_restore_bring_back_every_global_stream(odd):
    outside = snapshot(CPU)
    try:
        torch.manual_seed(1), np.random.seed(2), random.seed(3)
        for _ in range(odd):  # both gaussian streams now hold a spare number
            random.gauss(0, 1), np.random.randn()
        states = snapshot(CPU)
        first = draw()
        assert draw() != first
        restore(CPU, states)
        assert draw() == first
        restore(CPU, tuple(state.clone() for state in states))
        assert draw() == first
    finally:
        restore(CPU, outside)


def test_a_snapshots_shapes_do_not_depend_on_the_state():
    outside, shapes = snapshot(CPU), set()
    for _ in range(3):
        random.gauss(0, 1), np.random.randn(), torch.randn(1)
        shapes.add(tuple((tuple(state.shape), state.dtype) for state in snapshot(CPU)))
    restore(CPU, outside)
    assert len(shapes) == 1


def test_a_workers_stream_is_its_own_and_leaves_the_outer_one_alone():
    torch.manual_seed(0)
    expected = torch.rand(3).tolist()
    torch.manual_seed(0)
    found, inside = [], {}
    for key in [(0, 0), (0, 1), (1, 0)]:
        with worker_rng(CPU, *key):
            inside[key] = torch.rand(1).item()
        found.append(torch.rand(1).item())
    assert found == pytest.approx(expected)
    assert len(set(inside.values())) == 3
    with worker_rng(CPU, 0, 1):
        assert torch.rand(1).item() == inside[0, 1]


def test_keyed_streams_depend_on_use_seed_step_and_worker_alone():
    base = Round(step=3, n=5, worker=2, seed=1)
    private = {
        torch.rand(1, generator=round.private("a")).item()
        for round in [base, base._replace(step=4), base._replace(worker=3)]
    }
    private |= {
        torch.rand(1, generator=g).item()
        for g in [base._replace(seed=2).private("a"), base.private("b"), base.shared("a")]
    }
    assert len(private) == 6
    assert torch.rand(1, generator=base.shared("a")) == torch.rand(
        1, generator=base._replace(worker=4, n=9).shared("a")
    )
    assert torch.rand(1, generator=keyed_generator("a", 1, 3)) == torch.rand(
        1, generator=base.shared("a")
    )


def test_seeds_are_the_same_on_every_machine():
    assert keyed_seed("coin", 1, 2) == 2790703710520139026
    assert keyed_seed("coin", 12) != keyed_seed("coin", 1, 2)


def test_rules_that_shuffle_do_so_anew_in_every_round_and_alike_on_every_rank():
    """Bucketing draws from the round's shared stream, which depends on the seed and the step
    alone.
    """
    x = rows_for(9, 30, dtype=torch.float32)
    everybody = [Contribution(Gradients(row), torch.ones(1, dtype=torch.bool)) for row in x]

    def estimates(seed):
        transport = InProcess()
        transport.connect(0, 1, 9, torch.device("cpu"))
        rule = Chain(pre=(Bucketing(f=1),), rule=CoordinateMedian(f=1))
        exchange = Exchange(RobustSGD(aggregator=rule), transport, seed)
        return [exchange.run(everybody, x[0]).estimate.clone() for _ in range(3)]

    first, again, other = estimates(0), estimates(0), estimates(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_a_liar_that_sends_nan_is_gone_and_the_others_need_not_be_distrusted():
    """One of four, f = 1: what is left is the mean of the honest three. An honest worker that is
    absent may stand for a liar that is not.
    """
    grads = grads_of()[:4]
    exchange = Exchange(RobustSGD(robust(1)), connected(4), seed=0)
    lied_to(exchange, NotANumber(), [2])
    outcome = exchange.run(contributions(grads), LIKE)
    assert outcome.silent == [2]
    torch.testing.assert_close(outcome.estimate, grads[[0, 1, 3]].mean(0))
    absent = Exchange(RobustSGD(robust(1)), connected(4), seed=0).run(
        contributions(grads, absent=(2,)), LIKE
    )
    torch.testing.assert_close(absent.estimate, robust(1)(grads[[0, 1, 3]]))
    assert not torch.allclose(absent.estimate, outcome.estimate)


def test_a_worker_whose_own_message_overflows_is_silent_and_keeps_its_state():
    """The norm of 1e200 does. It knows that itself, so nobody takes it for a liar."""
    grads = grads_of()[:4].clone()
    grads[1] *= 1e200
    exchange = Exchange(
        RobustSGD(robust(1), QSGD(levels=7), worker_momentum=0.5), connected(4), seed=0
    )
    outcome = exchange.run(contributions(grads), LIKE)
    assert outcome.silent == [1]
    assert not outcome.rows.exposed.any()
    assert int(exchange.workers[1].rounds) == 0
    assert int(exchange.workers[0].rounds) == 1


def test_an_attacker_tries_its_lies_on_the_weighted_rule():
    tried, shares = [], torch.tensor([4.0, 1, 1, 1, 1]).double()

    class Tries(Attack):
        def __call__(self, honest, own, scene=None):
            tried.append(scene.aggregate(-own))
            return -own

    exchange = Exchange(RobustSGD(Mean()), connected(5), seed=0, shares=shares)
    lied_to(exchange, Tries(), [0])
    outcome = exchange.run(contributions(grads_of(n=5)), LIKE)
    torch.testing.assert_close(tried[0], outcome.estimate)


# -- memory, and what changes ----------------------------------------------------------------------


@pytest.mark.parametrize("case", ALGORITHMS, ids=lambda case: case.name)
def test_states_that_nobody_needs_any_more_may_be_overwritten(case, monkeypatch):
    """Their memory serves for later states: a run is the same if it is spoilt at once, and if none
    is used again.
    """

    def run():
        exchange, found = Exchange(case.algorithm, connected(9), seed=1), []
        for step in range(6):
            grads = grads_of(step, 9)
            outcome = exchange.run(
                contributions(grads, absent=(step,)), LIKE + step / 9, trusted=grads.mean(0)
            )
            found.append(None if outcome.estimate is None else outcome.estimate.clone())
        return found, exchange.worker_states(), exchange.server_state()["server"]

    take_back = TensorPool.take_back

    def spoil(self, old, new):
        old, before = list(old), len(self._spare)
        take_back(self, old, new)
        for tensor in self._spare[before:]:
            tensor.fill_(torch.nan)

    monkeypatch.setattr(TensorPool, "take_back", spoil)
    spoilt = run()
    monkeypatch.setattr(TensorPool, "take_back", lambda self, old, new: None)
    fresh = run()
    for a, b in zip(spoilt[0], fresh[0], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    for worker, state in fresh[1].items():
        assert all(torch.equal(value, spoilt[1][worker][name]) for name, value in state.items())
    assert all(torch.equal(value, spoilt[2][name]) for name, value in fresh[2].items())


def test_memory_is_lent_once_and_only_what_was_lent_comes_back():
    room, like = TensorPool(), torch.zeros(5)
    a, b = room(like), room(like)
    room.take_back([a, like, b], [b])
    assert room(like) is a
    fresh = room(like)
    assert all(fresh is not other for other in (a, b, like))
    room.take_back([a], [])
    assert (
        room(torch.zeros(5, dtype=torch.float64)) is not a
        and room(torch.zeros(4)) is not a
        and room(like) is a
    )


FEW = {
    "median": ByzEF21SGDM(CoordinateMedian(f=1), TopK(k=2)),
    "trimmed mean": ByzEF21SGDM(TrimmedMean(f=1), TopK(ratio=0.02), eta=0.5),
    "mean, of momenta's momenta": ByzDM21(Mean(), TopK(k=3)),
    "blocks": ByzEF21SGDM(CoordinateMedian(f=1), PerTensor(TopK(k=1), (90, 110))),
    "shrunk": ByzEF21SGDM(Mean(), Contractive(RandK(k=2))),
    "NNM, which looks at all coordinates": ByzEF21SGDM(robust(1), TopK(k=2)),
    "both directions": ByzEF21SGDMBC(robust(1), TopK(k=2), 0.5, TopK(k=7)),
    "so many that all are looked at": ByzEF21SGDM(CoordinateMedian(f=1), TopK(ratio=0.3)),
}


@pytest.mark.parametrize("name", FEW)
def test_a_server_that_looks_at_named_coordinates_only_is_the_papers(name):
    """Bit for bit what both halves give on whole vectors: with absent workers, a nan, and a liar
    whose mirror overflows.
    """
    algorithm, n, d = FEW[name], 5, 200
    exchange = Exchange(algorithm, connected(n, Lies()), seed=1)
    x, everybody = torch.zeros(d), torch.ones(n, dtype=torch.bool)
    workers, server = {w: algorithm.init_worker(x) for w in range(n)}, algorithm.init_server(x, n)
    for step in range(7):
        # what all agree on
        grads = rows_for(n, d, seed=step, dtype=torch.float32) + 9 * (torch.arange(d) % 100 == 3)
        grads[2, 7] = torch.nan if step == 3 else grads[2, 7]
        absent = (1,) if step == 2 else ()
        outcome = exchange.run(contributions(grads, absent=absent), x)
        rows, present = torch.zeros(n, d), everybody.clone()
        for w in range(n):
            if w in absent or not grads[w].isfinite().all():
                present[w] = False
                continue
            round = Round(step, n, worker=w, seed=1)
            payload, state = algorithm.worker(Gradients(grads[w]), workers[w], round)
            workers[w] = algorithm.arrived(payload, state)
            rows[w] = algorithm.codec(round).decode(Lies.lie(w, payload), d)
        estimate, server = algorithm.server(
            Rows(rows), server, Round(step, n, seed=1, present=present)
        )
        assert torch.equal(outcome.estimate, estimate), step
        assert torch.equal(exchange.server.g, server.g), step
        assert torch.equal(outcome.seen.dense(), server.g)
        outcome.estimate.fill_(1e6)  # as clipping may: it is the optimizer's
    assert bool((estimate != 0).any())


def test_a_server_that_goes_back_to_a_checkpoint_forgets_its_last_estimate():
    algorithm, x = FEW["mean, of momenta's momenta"], torch.zeros(200)
    exchange, again = (Exchange(algorithm, connected(5), seed=1) for _ in range(2))
    for step in range(2):
        exchange.run(contributions(rows_for(5, 200, seed=step, dtype=torch.float32)), x)
    saved = copy.deepcopy((exchange.server_state(), exchange.worker_states()))
    for step in (8, 9):
        exchange.run(contributions(rows_for(5, 200, seed=step, dtype=torch.float32)), x)
    grads = rows_for(5, 200, seed=2, dtype=torch.float32)
    for resumed in (exchange, again):
        resumed.load(*copy.deepcopy(saved), x)
    assert torch.equal(
        exchange.run(contributions(grads), x).estimate, again.run(contributions(grads), x).estimate
    )


def test_a_server_of_few_coordinates_starts_afresh_with_other_parameters():
    exchange = Exchange(FEW["trimmed mean"], connected(5), seed=1)
    for d in (200, 120):
        for step in range(3):
            estimate = exchange.run(
                contributions(rows_for(5, d, seed=step, dtype=torch.float32)), torch.zeros(d)
            ).estimate
    assert len(estimate) == 120


class Lies(InProcess):
    """Worker 4 multiplies what it sends by 1e37, so that its mirror overflows some rounds later."""

    @staticmethod
    def lie(worker, payload):
        return tuple(t * 1e37 if worker == 4 and t.is_floating_point() else t for t in payload)

    def gather(self, messages, layout):
        return [
            (flags, *self.lie(worker, payload))
            for worker, (flags, *payload) in enumerate(super().gather(messages, layout))
        ]


# -- algorithms of one's own that are wrong --------------------------------------------------------


class Kept(NamedTuple):
    last: torch.Tensor


@dataclass(frozen=True)
class OwnAlgorithm(RobustSGD):
    """Sends the difference to the last gradient; one thing about it is wrong."""

    wrong: str = ""

    @property
    def coordinate_wise(self) -> bool:
        return True

    def init_worker(self, x: torch.Tensor) -> Any:
        return {"dict": {"last": x}, "number": Kept(0.5)}.get(self.wrong, Kept(torch.zeros_like(x)))

    def worker(self, grads: Gradients, state: Any, round: Round) -> Any:
        kept = grads.current if self.wrong == "keeps" else grads.current.clone()
        state = Kept(kept[:-1]) if self.wrong == "shorter" else Kept(kept)
        return (grads.current.clone(),), state

    def init_server(self, x: torch.Tensor, n: int) -> Any:
        return [x] if self.wrong == "list" else Kept(torch.zeros_like(x))

    def server(self, rows: Any, state: Any, round: Round) -> Any:
        estimate = self.aggregator(rows, round.present)
        if self.wrong == "estimate":
            estimate = estimate[:-1]
        return (estimate.tolist() if self.wrong == "no tensor" else estimate), Kept(
            0.0
        ) if self.wrong == "server" else state


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("dict", r"OwnAlgorithm.init_worker.*NamedTuple of tensors. Found dict"),
        ("number", r"OwnAlgorithm.init_worker.*Found last: float.*torch.tensor"),
        ("keeps", r"OwnAlgorithm.worker keeps the gradient.*last.*clone"),
        ("shorter", r"OwnAlgorithm.worker should return a state like the one"),
        ("list", r"OwnAlgorithm.init_server.*Found list"),
        (
            "estimate",
            r"OwnAlgorithm.server should return an estimate of shape \(5,\).*Found \(\(4,\)",
        ),
        ("no tensor", r"OwnAlgorithm.server should return an estimate.*Found list"),
        ("server", r"OwnAlgorithm.server.*Found last: float"),
    ],
)
def test_an_algorithm_that_is_wrong_is_named_in_the_first_round(wrong: str, message: str) -> None:
    transport = InProcess()
    transport.connect(0, 1, 4, CPU)
    contributions = [
        Contribution(Gradients(torch.ones(5)), torch.ones(1, dtype=torch.bool)) for _ in range(4)
    ]
    right, broken = (
        Exchange(OwnAlgorithm(CoordinateMedian(f=1), wrong=w), transport, seed=1)
        for w in ("", wrong)
    )
    for _ in range(3):
        right.run(contributions, torch.zeros(5))
    with pytest.raises((TypeError, ValueError), match=message):
        broken.run(contributions, torch.zeros(5))


# -- quarantine ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "n", "out", "absent", "f"),
    [
        (TrimmedMean(f=2), 7, {4}, (), 2),  # an accusation is no proof: all f may still be there
        (TrimmedMean(f=2), 7, {4, 5}, (), 2),
        (TrimmedMean(f=2), 6, {4, 5}, (), 1),  # the most that it allows for four rows
        (Krum(f=2), 7, {4}, (), 1),
        # and a step does not fail for the absence of the accused
        (TrimmedMean(f=2), 7, {4, 5}, (0, 1), 1),
    ],
    ids=str,
)
def test_quarantine_leaves_f_as_it_is_as_far_as_the_rule_allows(rule, n, out, absent, f):
    exchange, grads = Exchange(RobustSGD(rule), connected(n), 0), grads_of(n=n)
    exchange.quarantined.update(out)
    outcome = exchange.run(contributions(grads, absent=absent, used=[ALL_USED] * n), LIKE)
    left = [worker for worker in range(n) if worker not in out | {*absent}]
    assert rule.most_f(len(left)) >= f
    assert torch.equal(outcome.estimate, rule.with_f(f)(grads[left]))
    assert outcome.silent == [*absent]


def test_an_attack_that_writes_into_the_honest_rows_is_an_error():
    @dataclass(frozen=True)
    class Vandal(Attack):
        def __call__(self, honest, own, scene=None):
            return honest.zero_()[: len(own)]

    exchange = Exchange(RobustSGD(CoordinateMedian(f=1)), connected(), 0)
    lied_to(exchange, Vandal(), [4])
    with pytest.raises(ValueError, match="Vandal does. Work on a copy"):
        exchange.run(contributions(grads_of()), LIKE)
