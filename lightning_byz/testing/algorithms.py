"""What every algorithm should hold."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_byz.algorithms import Algorithm
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import Contribution, Outcome
from lightning_byz.engine.simulation import Simulation
from lightning_byz.engine.state_layout import check_state, columns_of, piece_of
from lightning_byz.testing.laws import Case, Law, raise_broken, random_rows, verdicts
from lightning_byz.transports import InProcess
from lightning_byz.types import Gradients, Round

_ROUNDS = 5


def algorithm_laws(algorithm: Algorithm, n: int = 9, f: int = 2, d: int = 96) -> list[Law]:
    """All laws, and whether an algorithm holds them.

    Args:
        algorithm: of this package's interface; its f is set.
        n: number of workers.
        f: how many of them may lie.
        d: number of coordinates, a multiple of 32.
    """
    return verdicts(_cases(algorithm.with_f(f).for_sizes((d - 40, 40)), n, f, d))


def check_algorithm(algorithm: Algorithm, n: int = 9, f: int = 2, d: int = 96) -> None:
    """Raises an AssertionError that names every law that an algorithm breaks.

    The arguments are those of `algorithm_laws`.
    """
    raise_broken(algorithm, algorithm_laws(algorithm, n, f, d))


def _cases(algorithm: Algorithm, n: int, f: int, d: int) -> Iterator[Case]:
    yield f"f = {f} of n = {n} is allowed, and kept", partial(_takes_f, algorithm, n, f)
    yield "states are NamedTuples of tensors, of one shape", partial(_keeps_shapes, algorithm, n, d)
    yield "both halves are pure: same arguments, same answers", partial(_is_pure, algorithm, n, d)
    yield "gradients are not modified, and not kept", partial(_leaves_gradients, algorithm, n, d)
    for dtype in (torch.float32, torch.float64):
        yield (
            f"the estimate is a vector [d] of {dtype}",
            partial(_estimates, algorithm, n, d, dtype),
        )
    yield "a run goes on from its checkpoint, bit for bit", partial(_resumes, algorithm, n, d)
    yield "a round that skips leaves all states as they were", partial(_skips, algorithm, n, d)
    yield "who is silent keeps its state", partial(_keeps_the_silent, algorithm, n, d)
    yield (
        "f liars that send junk move it by no more than honest rows",
        partial(_withstands, algorithm, n, f, d),
    )
    if algorithm.coordinate_wise:
        yield "the worker's half of pieces is that of the whole", partial(_in_pieces, algorithm, d)


class _Run:
    """An algorithm over n in-process workers, whose gradients are given."""

    def __init__(self, algorithm: Algorithm, n: int) -> None:
        transport = InProcess()
        transport.connect(0, 1, n, torch.device("cpu"))
        self.exchange = Exchange(algorithm, transport, seed=3)
        self.x: Tensor | None = None

    def round(self, grads: Sequence[Tensor | None]) -> Outcome:
        """One round; None: this worker has no gradient. Parameters move by a tenth of the
        estimate.
        """
        like = next(g for g in grads if g is not None)
        self.x = torch.zeros_like(like) if self.x is None else self.x
        used = torch.ones(1, dtype=torch.bool)
        previous = self.exchange.algorithm.needs_previous
        said = [
            Contribution(None if g is None else Gradients(g, g + 0.01 if previous else None), used)
            for g in grads
        ]
        trusted = None
        if self.exchange.algorithm.uses_trusted:
            trusted = torch.stack([g for g in grads if g is not None]).median(0).values
        outcome = self.exchange.run(said, self.x, trusted)
        if outcome.estimate is not None:
            outcome = outcome._replace(estimate=outcome.estimate.clone())
            assert outcome.estimate is not None
            self.x = self.x - 0.1 * outcome.estimate
        return outcome

    def states(self) -> Any:
        """A copy of both halves' states."""
        return copy.deepcopy((self.exchange.workers, self.exchange.server))


def _gradients(n: int, d: int, k: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(random_rows(n, d, 10 + k, dtype=dtype).unbind())


def _same(a: Any, b: Any) -> bool:
    """Whether nested states are equal, bit for bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _takes_f(algorithm: Algorithm, n: int, f: int) -> None:
    algorithm.check(n)
    assert algorithm.most_f(n) >= f, f"most_f({n}) is {algorithm.most_f(n)}"
    assert algorithm.aggregator.f == f, f"the rule's f is {algorithm.aggregator.f}"


def _keeps_shapes(algorithm: Algorithm, n: int, d: int) -> None:
    run = _Run(algorithm, n)
    for k in range(_ROUNDS):
        before = run.states()
        run.round(_gradients(n, d, k))
        for worker, state in run.exchange.workers.items():
            check_state(state, "the worker's half", before[0].get(worker))
        check_state(run.exchange.server, "the server's half", before[1])


def _is_pure(algorithm: Algorithm, n: int, d: int) -> None:
    first, second = _Run(algorithm, n), _Run(algorithm, n)
    for k in range(_ROUNDS):
        a, b = first.round(_gradients(n, d, k)), second.round(_gradients(n, d, k))
        assert _same(a.estimate, b.estimate), f"two runs differ in round {k}"
    assert _same(first.states(), second.states()), "two runs end with different states"


def _leaves_gradients(algorithm: Algorithm, n: int, d: int) -> None:
    run, memory = _Run(algorithm, n), _gradients(n, d, 0)
    other = _Run(algorithm, n)
    for k in range(_ROUNDS):  # the same memory in every round, as the strategy uses it
        for place, g in zip(memory, _gradients(n, d, k), strict=True):
            place.copy_(g)
        before = [g.clone() for g in memory]
        a, b = run.round(memory), other.round(_gradients(n, d, k))
        assert _same(memory, before), f"a gradient has changed in round {k}"
        assert _same(a.estimate, b.estimate), f"a gradient of an earlier round was kept: round {k}"


def _estimates(algorithm: Algorithm, n: int, d: int, dtype: torch.dtype) -> None:
    run = _Run(algorithm, n)
    for k in range(_ROUNDS):
        estimate = run.round(_gradients(n, d, k, dtype)).estimate
        assert estimate is not None, f"round {k} gave no estimate"
        assert (estimate.shape, estimate.dtype) == ((d,), dtype), (
            f"found {estimate.shape} {estimate.dtype}"
        )
        assert bool(estimate.isfinite().all()), f"not finite in round {k}"


def _resumes(algorithm: Algorithm, n: int, d: int) -> None:
    whole, first, second = _Run(algorithm, n), _Run(algorithm, n), _Run(algorithm, n)
    for k in range(_ROUNDS):
        whole.round(_gradients(n, d, k))
        if k < _ROUNDS - 2:
            first.round(_gradients(n, d, k))
    server, workers = first.exchange.server_state(), first.exchange.worker_states()
    second.exchange.load(server, workers, torch.empty(d))
    second.x = first.x
    for k in range(_ROUNDS - 2, _ROUNDS):
        second.round(_gradients(n, d, k))
    assert _same(whole.x, second.x), "a resumed run ends elsewhere"
    assert _same(whole.states(), second.states()), "a resumed run ends with other states"


def _skips(algorithm: Algorithm, n: int, d: int) -> None:
    run = _Run(algorithm, n)
    run.round(_gradients(n, d, 0))
    before = run.states()
    outcome = run.round([torch.full((d,), torch.nan)] * n)
    if outcome.estimate is None:  # a client sampling of nobody may still have one
        assert _same(run.states(), before), "a state has changed in a round without an estimate"


def _keeps_the_silent(algorithm: Algorithm, n: int, d: int) -> None:
    run = _Run(algorithm, n)
    run.round(_gradients(n, d, 0))
    before = run.states()[0][0]
    run.round([torch.full((d,), torch.nan), *_gradients(n, d, 1)[1:]])
    assert _same(run.exchange.workers[0], before), "the state of a worker with a nan has changed"


def _withstands(algorithm: Algorithm, n: int, f: int, d: int) -> None:
    for junk in (1e10, -1e10, 0.0, torch.nan):
        run = _Run(algorithm, n)
        run.exchange.simulation = simulation = Simulation()
        simulation.liars.append(lambda step: range(n - f, n))
        largest = 0.0
        for k in range(_ROUNDS):
            grads = _gradients(n, d, k)
            honest = grads[: n - f]
            largest = max([largest, *(float(g.norm()) for g in honest)])
            estimate = run.round([*honest, *[torch.full((d,), junk)] * f]).estimate
            if estimate is not None:
                found = float(estimate.norm())
                assert found <= 20 * largest, f"{junk} by f workers gives a norm of {found:.3g}"


def _in_pieces(algorithm: Algorithm, d: int) -> None:
    x = torch.empty(d)
    whole = algorithm.init_worker(x)
    cuts = list(pairwise([0, 32, d]))
    columns = columns_of(algorithm.init_worker, d, torch.float32)
    pieces = [algorithm.init_worker(x[first:last]) for first, last in cuts]
    codec = algorithm.codec(Round(step=0, n=3))
    for k in range(_ROUNDS):
        (g,) = _gradients(1, d, k)
        round = Round(step=k, n=3)
        payload, whole = algorithm.worker(Gradients(g), whole, round)
        done = [
            algorithm.worker(Gradients(g[first:last]), state, round)
            for state, (first, last) in zip(pieces, cuts, strict=True)
        ]
        pieces = [state for _, state in done]
        shares = codec.split(payload, d, [0, 32, d])
        for (piece, state), share, (first, last) in zip(done, shares, cuts, strict=True):
            assert _same(tuple(piece), tuple(share)), f"the payload of {first} .. {last} differs"
            expected = piece_of(whole, first, last, d, columns)
            assert _same(tuple(state), tuple(expected)), f"the state of {first} .. {last} differs"
