"""Sharded in three real processes gives what one process gives: every rule, algorithm, compressor
and attack of the zoo.
"""

from __future__ import annotations

import functools
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from zoo import ALGORITHMS, ATTACKS, COMPRESSORS, RULES, laws, lied_to, robust, rows_for

import lightning_byz as byz
from lightning_byz import (
    ALIE,
    ByzEF21SGDM,
    ByzEF21SGDMBC,
    CoordinateMedian,
    FoE,
    Identity,
    Mean,
    MinMax,
    PerTensor,
    RobustSGD,
    Sharded,
    Sign,
    SignSGDMajorityVote,
    TopK,
    TrimmedMean,
)
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import Contribution
from lightning_byz.strategies.resolve import default_transport
from lightning_byz.transports import AllGather, InProcess, Message, Transport
from lightning_byz.transports.sharded import shard_bounds
from lightning_byz.types import Gradients, Round

RANKS, N, D, P = 3, 12, 200, 2
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore:ALIE.. is no attack with 2 of n=12 workers"),
]


class Case(NamedTuple):
    """A run of a few rounds.

    Attributes:
        exact: sharded and whole give the same bits.
        attack: what workers 1 and 7 send.
    """

    algorithm: Any
    exact: bool = False
    attack: Any = None
    dtype: torch.dtype = torch.float64
    dim: int = D


class Averages(NamedTuple):
    """``[2, d]`` a worker's fast and slow average; or ``[n, d]`` what the server keeps of each
    worker, and a count of rounds.
    """

    rows: torch.Tensor
    rounds: torch.Tensor


@dataclass(frozen=True)
class ManyRows(RobustSGD):
    """A method whose states have several rows of coordinates."""

    @property
    def coordinate_wise(self) -> bool:
        return True

    def init_worker(self, x: torch.Tensor) -> Any:
        return Averages(x.new_zeros(2, len(x)), x.new_zeros(1))

    def worker(self, grads: Gradients, state: Any, round: Round) -> Any:
        rows = torch.stack(
            [
                torch.lerp(state.rows[0], grads.current, 0.5),
                torch.lerp(state.rows[1], grads.current, 0.1),
            ]
        )
        return (rows.sum(0),), Averages(rows, state.rounds + 1)

    def init_server(self, x: torch.Tensor, n: int) -> Any:
        return Averages(x.new_zeros(n, len(x)), x.new_zeros(1))

    def server(self, rows: Any, state: Any, round: Round) -> Any:
        kept = torch.lerp(state.rows, rows.values, 0.5)
        return self.aggregator(replace(rows, values=kept), round.present), Averages(
            kept, state.rounds + 1
        )


COORDINATE_WISE = ("mean", "median", "trimmed_mean", "meamed", "phocas", "majority_vote")
CASES: dict[str, Case] = {
    **{
        f"rule {c.name}": Case(RobustSGD(c.rule), c.name in COORDINATE_WISE, dtype=torch.float32)
        for c in RULES
    },
    **{f"algorithm {c.name}": Case(c.algorithm) for c in ALGORITHMS},
    **{
        f"compressor {c.name}": Case(RobustSGD(Mean(), c.of(D)), True, dtype=torch.float32)
        for c in COMPRESSORS
    },
    **{
        # MinMax is as far from one honest row as two of these are from each other: who is nearer,
        # for NNM, is a matter of rounding
        f"attack {c.name}": Case(
            RobustSGD(CoordinateMedian(f=2) if isinstance(c.attack, MinMax) else robust()),
            attack=c.attack,
            dtype=torch.float32,
        )
        for c in ATTACKS
    },
    "attacked mirrors": Case(ByzEF21SGDM(robust(), TopK(ratio=0.1)), attack=FoE()),
    "attacked median": Case(RobustSGD(CoordinateMedian(f=2)), True, ALIE(1.5)),
    "states of several rows": Case(ManyRows(CoordinateMedian(f=2)), True, dtype=torch.float32),
    "few coordinates change": Case(ByzEF21SGDM(Mean(), TopK(k=5)), True, dim=2000),
    "few coordinates change, per tensor": Case(
        ByzEF21SGDM(TrimmedMean(f=2), PerTensor(TopK(k=2), (900, 1100))), True, dim=2000
    ),
    "largest changes": Case(
        ByzEF21SGDMBC(CoordinateMedian(f=2), TopK(k=200), 0.1, TopK(k=30)), True, dim=2000
    ),
    "largest changes, fewer than ranks": Case(
        ByzEF21SGDMBC(robust(), TopK(k=200), 0.1, TopK(k=2)), dim=2000
    ),
    "fewer numbers than ranks": Case(ByzEF21SGDM(CoordinateMedian(f=2), TopK(k=2)), True, dim=8),
    "one word": Case(SignSGDMajorityVote(), True, dim=32),
}


def contributions(step: int, case: Case, workers: range) -> list[Contribution]:
    """Worker 3 is absent in one round, and worker 5 has a nan, in the last shard, in another."""
    grads = rows_for(N, case.dim, seed=step, dtype=case.dtype)
    grads[5, -1] = torch.nan if step == 1 else grads[5, -1]
    used = torch.ones(N, P, dtype=torch.bool)
    used[::2, 1] = False
    everybody = [
        Contribution(None if step == 2 and w == 3 else Gradients(g, g.flip(0)), used[w])
        for w, g in enumerate(grads)
    ]
    return [everybody[worker] for worker in workers]


def connected(transport: Transport, rank: int = 0, world: int = 1) -> Transport:
    transport.connect(rank, world, N // world, CPU)
    return transport


def quietly(make: Callable[[], Any]) -> Callable[[], Any]:
    """Without warnings."""

    @functools.wraps(make)
    def silent() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()

    return silent


def play(case: Case, transport: Transport, early: int | None = None) -> dict[str, Any]:
    """What a rank sees of a run; in its middle, its state goes through a checkpoint into another
    exchange.

    ``early``: how many buckets of its messages leave before a round is run; None: it is not opened
    before.
    """
    like = torch.zeros(case.dim, dtype=case.dtype)

    @quietly  # the paper's formula of ALIE is no attack with 2 of 12 workers, and says so
    def made() -> Exchange:
        exchange = Exchange(
            case.algorithm.with_f(case.algorithm.aggregator.f or 0), transport, seed=3
        )
        if case.attack is not None:
            lied_to(exchange, case.attack, [1, 7], lambda step: step < 3, lambda index: like + 1)
        return exchange

    exchange, outcomes, state = made(), [], None
    for step in range(4):
        mine = contributions(step, case, transport.workers)
        upload = None if early is None else exchange.open(like + step**2)
        if upload is not None:
            for first, last in upload.left[:early]:
                upload.send(
                    [None if c.grads is None else c.grads.current[first:last] for c in mine]
                )
        outcome = exchange.run(mine, like + step**2, trusted=like + 1)
        outcomes.append(
            {
                "estimate": outcome.estimate.clone(),
                "used": outcome.used,
                "silent": outcome.silent,
                "up": outcome.bytes_up,
                "down": outcome.bytes_down,
                "seen": transport.assemble(outcome.seen.dense(), case.dim).clone(),
            }
        )
        if step == 1:
            state = exchange.server_state()
            whole = [state]
            if transport.world_size > 1:
                dist.broadcast_object_list(whole, src=0)  # as every rank reads the same file
            workers, lying = exchange.worker_states(), exchange.simulation
            exchange = made()
            exchange.load(whole[0], workers, like)
            if case.attack is not None:
                (before,), (after,) = lying.adversaries, exchange.simulation.adversaries
                after.load_state_dict(0, before.state_dict(0))
    return {"outcomes": outcomes, "state": state}


def rank_main(rank: int, folder: Path, work: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    try:
        meet = f"file://{folder}/meet"
        dist.init_process_group(
            "gloo", init_method=meet, rank=rank, world_size=RANKS, timeout=timedelta(minutes=5)
        )
        torch.save(work(rank), folder / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def in_ranks(folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """What each of three forked ranks makes of its number."""
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            rank_main(rank, folder, work)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * RANKS
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


FEW_CHANGE = {"largest changes": 30, "largest changes, fewer than ranks": 2}
"""Cases whose estimate changes in so many coordinates only."""


@pytest.fixture(scope="module")
def selected(request: pytest.FixtureRequest) -> dict[str, Case]:
    """The cases that some test of this run is about."""
    found = [getattr(item, "callspec", None) for item in request.session.items]
    names = {spec.params.get("name") for spec in found if spec is not None}
    names |= {"few coordinates change", *FEW_CHANGE}  # whose bytes are counted below
    return {name: case for name, case in CASES.items() if name in names}


@pytest.fixture(scope="module")
def sharded(
    tmp_path_factory: pytest.TempPathFactory, selected: dict[str, Case]
) -> Iterator[list[dict[str, Any]]]:
    """The cases, by rank."""

    def work(rank: int) -> dict[str, Any]:
        transport = connected(Sharded(), rank, RANKS)
        return {name: play(case, transport) for name, case in selected.items()}

    return in_ranks(tmp_path_factory.mktemp("ranks"), work)


@pytest.fixture(scope="module")
def bucketed(
    tmp_path_factory: pytest.TempPathFactory, selected: dict[str, Case]
) -> Iterator[list[dict[str, Any]]]:
    """The cases, by rank, in buckets of 96 float32 coordinates, of which some have left before the
    round is run, by other ranks more than by this.
    """

    def work(rank: int) -> dict[str, Any]:
        transport = connected(Sharded(bucket_size=4 * 96), rank, RANKS)
        return {name: play(case, transport, early=rank) for name, case in selected.items()}

    return in_ranks(tmp_path_factory.mktemp("buckets"), work)


@pytest.mark.parametrize("way", ["sharded", "bucketed"])
@pytest.mark.parametrize("name", CASES)
def test_shards_give_what_the_whole_gives(
    name: str, way: str, request: pytest.FixtureRequest
) -> None:
    case, sharded = CASES[name], request.getfixturevalue(way)
    whole = play(case, connected(InProcess()))
    exact = {"rtol": 0, "atol": 0} if case.exact else {}
    for rank in range(RANKS):
        found = sharded[rank][name]
        for a, b, first in zip(
            whole["outcomes"], found["outcomes"], sharded[0][name]["outcomes"], strict=True
        ):
            torch.testing.assert_close(b["estimate"], a["estimate"], **exact)
            torch.testing.assert_close(b["seen"], a["seen"], **exact)
            assert torch.equal(b["estimate"], first["estimate"]), "ranks differ"
            assert torch.equal(b["used"], a["used"])
            assert (b["silent"], b["up"]) == (a["silent"], a["up"])
    for name_of, value in whole["state"]["server"].items():
        torch.testing.assert_close(sharded[0][name]["state"]["server"][name_of], value, **exact)


def test_only_the_coordinates_that_changed_travel_down(sharded: list[dict[str, Any]]) -> None:
    """At most K of each of n workers, as a number and its index; all of them, once, after the
    checkpoint in the middle.
    """
    outcomes = sharded[0]["few coordinates change"]["outcomes"]
    assert [outcomes[step]["down"] == 8 * 2000 for step in range(4)] == [True, False, True, False]
    assert all(0 < outcomes[step]["down"] <= N * 5 * (8 + 4) for step in (1, 3))


def test_only_the_largest_changes_travel_down_whatever_the_rule(
    sharded: list[dict[str, Any]],
) -> None:
    for name, k in FEW_CHANGE.items():
        outcomes = sharded[0][name]["outcomes"]
        assert [outcomes[step]["down"] for step in (1, 3)] == [k * (8 + 4)] * 2
        assert [outcomes[step]["down"] for step in (0, 2)] == [8 * 2000] * 2


# -- the border ------------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[..., Any]] = {
    "nan in the last shard": lambda values, index: (
        torch.cat([values[:-1], values[:1] * torch.nan]),
        index,
    ),
    "unsorted": lambda values, index: (values, index.flip(0)),
    "two of a kind": lambda values, index: (values, torch.cat([index[:1], index[:-1]])),
    "outside": lambda values, index: (values, torch.cat([index[:-1], index[-1:] + D])),
    "below": lambda values, index: (values, index - D),
    "too few": lambda values, index: (values[:-1], index[:-1]),
}


def test_a_broken_message_is_silence_on_every_rank_and_hurts_no_other(tmp_path: Path) -> None:
    codec, grads = TopK(k=10), rows_for(N, D, dtype=torch.float32)
    payloads = [codec.encode(row) for row in grads]

    def work(rank: int) -> Any:
        transport, found = connected(Sharded(), rank, RANKS), {}
        ((first, last),) = transport.spans(D)
        for name, damage in DAMAGE.items():
            messages = [
                Message(
                    torch.ones(3, dtype=torch.uint8), damage(*payload) if worker == 5 else payload
                )
                for worker, payload in enumerate(payloads)
                if worker in transport.workers
            ]
            received = transport.exchange(messages, codec, D, torch.float32, None)
            rows = [
                received.format.decode(m.payload, last - first)
                for w, m in enumerate(received.messages)
                if w != 5
            ]
            found[name] = received.valid.tolist(), torch.stack(rows)
        return found

    everybody = in_ranks(tmp_path, work)
    for name in DAMAGE:
        assert all(found[name][0] == [worker != 5 for worker in range(N)] for found in everybody), (
            name
        )
        whole = torch.stack(
            [codec.decode(payload, D) for worker, payload in enumerate(payloads) if worker != 5]
        )
        assert torch.equal(torch.cat([found[name][1] for found in everybody], 1), whole)


def test_a_nan_in_a_bucket_is_found_by_who_receives_it(tmp_path: Path) -> None:
    """A worker may say that all is well: nobody believes it."""
    grads = rows_for(N, D, dtype=torch.float32)
    grads[5, 100], grads[7, 199] = torch.nan, torch.inf

    def work(rank: int) -> Any:
        transport = connected(Sharded(bucket_size=4 * 96), rank, RANKS)
        transport.cut(Identity(), True)
        messages = [
            Message(torch.ones(3, dtype=torch.uint8), (grads[worker],))
            for worker in transport.workers
        ]
        received = transport.exchange(messages, Identity(), D, torch.float32, Round(step=0, n=N))
        mine = transport.columns(grads)
        return received.valid.tolist(), [
            torch.equal(m.payload[0].nan_to_num(), g.nan_to_num())
            for m, g in zip(received.messages, mine, strict=True)
        ]

    assert (
        in_ranks(tmp_path, work)
        == [([worker not in (5, 7) for worker in range(N)], [True] * N)] * RANKS
    )


SPENDING = {
    "rows": RobustSGD(CoordinateMedian(f=1)),
    "momentum": RobustSGD(TrimmedMean(f=1), worker_momentum=0.9, undo_worker_momentum=True),
    "votes": SignSGDMajorityVote().with_f(1),
    "few coordinates change": ByzEF21SGDM(CoordinateMedian(f=1), TopK(k=5)),
    "gradients in the message": RobustSGD(CoordinateMedian(f=1), PerTensor(Identity(), [D])),
}


@pytest.mark.parametrize("bucket_size", [96, 4096])
def test_an_estimate_may_take_the_place_of_the_gradient(tmp_path: Path, bucket_size: int) -> None:
    """One worker a rank; also where part of the message has left before."""

    def work(rank: int) -> Any:
        transport = Sharded(bucket_size=bucket_size)
        transport.connect(rank, RANKS, 1, CPU)
        made = {}
        for name, algorithm in SPENDING.items():
            like, found = torch.zeros(D).double(), []
            for spend in (False, True):
                exchange, estimates = Exchange(algorithm, transport, seed=3), []
                for step in range(4):
                    row = rows_for(RANKS, D, seed=step)[rank].clone()
                    said = [Contribution(Gradients(row), torch.ones(P, dtype=torch.bool))]
                    upload = exchange.open(like) if step % 2 else None
                    if upload is not None:
                        first, last = upload.left[0]
                        upload.send([row[first:last]])
                    outcome = exchange.run(said, like, spend=spend)
                    seen = transport.assemble(outcome.seen.dense(), D)
                    estimates += [outcome.estimate.clone(), seen.clone()]
                found.append(estimates)
                in_place = outcome.estimate.data_ptr() == row.data_ptr()
                untouched = torch.equal(row, rows_for(RANKS, D, seed=3)[rank])
            same = all(map(torch.equal, *found))
            made[name] = same, in_place, untouched
        return made

    for made in in_ranks(tmp_path, work):
        kept = made.pop("gradients in the message")
        assert kept == (True, False, True)
        assert made == dict.fromkeys(made, (True, True, False))


def test_one_rank_alone_saves_no_shard_and_all_start_afresh(tmp_path: Path) -> None:
    """EF21's estimates without their mirrors would be worth nothing."""
    case = CASES["algorithm ef21_top_k"]

    def work(rank: int) -> Any:
        transport = connected(Sharded(), rank, RANKS)
        exchange, resumed = (Exchange(case.algorithm, transport, seed=3) for _ in range(2))
        exchange.run(contributions(0, case, transport.workers), torch.zeros(D).double())
        state = exchange.server_state(alone=True)
        resumed.load(state, exchange.worker_states(), torch.zeros(D).double())
        return (
            state["server"],
            resumed.step,
            resumed.server.g.any().item(),
            any(w.g.any() for w in resumed.workers.values()),
        )

    assert in_ranks(tmp_path, work) == [(None, 1, False, False)] * RANKS


def test_what_a_checkpoint_was_given_does_not_change_afterwards(tmp_path: Path) -> None:
    """It may be written while training goes on."""
    case = Case(RobustSGD(CoordinateMedian(f=2), worker_momentum=0.9, server_momentum=0.5))

    def work(rank: int) -> Any:
        transport = connected(Sharded(bucket_size=96), rank, RANKS)
        exchange, like, kept = (
            Exchange(case.algorithm, transport, seed=3),
            torch.zeros(D).double(),
            [],
        )
        for step in range(4):
            exchange.run(contributions(step, case, transport.workers), like)
            states = {**exchange.worker_states(), -1: exchange.server_state()["server"]}
            kept += [
                (tensor, tensor.clone()) for state in states.values() for tensor in state.values()
            ]
        return all(torch.equal(tensor, before) for tensor, before in kept), len(kept)

    assert in_ranks(tmp_path, work) == [(True, 4 * (N // RANKS * 2 + 4))] * RANKS


def test_buckets_are_cut_into_everybodys_shares() -> None:
    """Of 64 at most; one bucket where messages are whole."""
    transport = Sharded(bucket_size=4 * 96)
    Transport.connect(transport, 1, 3, 1, CPU)
    assert transport.bounds(200) == [0, 96, 192, 200]
    transport.cut(Identity(), True)
    assert transport.bounds(200) == [0, 32, 64, 96, 128, 160, 192, 200, 200, 200]
    assert transport.spans(200) == ((32, 64), (128, 160), (200, 200))
    assert len(transport.bounds(96 * 1000)) - 1 <= 64 * 3
    # 32 times as many for so many bytes; no more coordinates than bytes, though
    transport.cut(Sign(), True)
    assert transport.bounds(1000)[::3] == [0, 384, 768, 1000]
    transport.cut(Identity(), False)
    assert transport.bounds(96 * 1000) == [0, 32_000, 64_000, 96_000]


def test_sparse_messages_are_cut_into_stripes() -> None:
    """The largest coordinates lie together, in one layer say: every rank has a share of them."""
    d, codec = 40_000, TopK(ratio=0.01)
    transport = Sharded()
    Transport.connect(transport, 1, 4, 1, CPU)
    transport.cut(codec, False)
    assert len(transport.bounds(d)) - 1 <= 4 * 33
    x = torch.randn(d, generator=torch.Generator().manual_seed(0))
    x[:4000] *= 100  # where all of the largest lie
    shares = transport._shares(codec, codec.encode(x), d)
    assert [len(values) for values, _ in shares] == pytest.approx([100] * 4, abs=30)
    # ranks' columns of what the whole message stands for
    whole = codec.decode(codec.encode(x), d)
    for rank, share in enumerate(shares):
        mine = torch.cat([whole[first:last] for first, last in transport.spans_of(rank, d)])
        part = codec.part(d, 0, d)
        assert torch.equal(part.decode(share, len(mine)), mine)
        assert bool(part.valid(share, len(mine)))
    # and back
    index = torch.arange(0, transport._width(1, d), 7)
    assert torch.equal(whole[transport._places(index, d)], transport.columns(whole)[index])


@laws
@given(dim=st.integers(0, 500), shards=st.integers(1, 9))
def test_shards_are_equal_words_that_cover_everything_once(dim: int, shards: int) -> None:
    bounds = shard_bounds(dim, shards)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, dim, shards + 1)
    assert all(bound % 32 == 0 or bound == dim for bound in bounds)
    assert sorted(bounds) == bounds
    assert max(b - a for a, b in pairwise(bounds)) < dim / shards + 32


@pytest.mark.parametrize(
    "transport", [AllGather(), Sharded()], ids=lambda transport: type(transport).__name__
)
def test_one_process_has_nobody_to_connect_with(transport: Transport) -> None:
    with pytest.raises(ValueError, match=r"connects several processes. Found one"):
        transport.connect(0, 1, 4, CPU)


# -- which transport a run has that names none -----------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "processes", "nbytes", "expected"),
    [
        (byz.RobustSGD(), 1, 10**9, InProcess),
        (byz.RobustSGD(), 4, 10**9, Sharded),
        # so few bytes that the number of collectives counts
        (byz.RobustSGD(), 4, 10**5, AllGather),
        (byz.SignSGDMajorityVote(), 4, 10**9, Sharded),
        # few coordinates both ways
        (byz.ByzEF21SGDM(byz.CoordinateMedian(), byz.TopK(ratio=0.01)), 4, 10**9, Sharded),
        (
            byz.ByzEF21SGDM(
                byz.Chain(pre=(byz.NNM(),), rule=byz.TrimmedMean()), byz.TopK(ratio=0.01)
            ),
            4,
            10**9,
            AllGather,
        ),
        (byz.ByzEF21SGDMBC(), 4, 10**9, Sharded),
        (byz.ByzDIANA(), 4, 10**9, AllGather),
    ],
)
def test_the_default_transport_moves_the_fewest_bytes(algorithm, processes, nbytes, expected):
    assert type(default_transport(algorithm, processes, nbytes)) is expected
