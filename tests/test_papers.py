"""What the papers say of Byz-DM21, dSTAR, Byz-VR-MARINA-PP and signSGD: their invariants, rounds by
hand, their parents, their toys.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_algorithms import D, N, connected, contributions, frozen, gradients, play, same, start
from zoo import ALGORITHMS, ATTACKS, laws, lied_to, robust, rows_for

from lightning_byz import attacks
from lightning_byz.aggregators import (
    Bucketing,
    Chain,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MajorityVote,
    Mean,
    TooFewRowsError,
    TrimmedMean,
)
from lightning_byz.algorithms import (
    ByzDIANA,
    ByzDM21,
    ByzEF21SGDM,
    ByzVRDM21,
    ByzVRMarinaPP,
    ClippedDifferences,
    DeviationFilter,
    DStar,
    RobustSGD,
    ShiftedExponential,
    SignSGDMajorityVote,
)
from lightning_byz.attacks.base import Attack
from lightning_byz.compressors import Identity, RandK, TopK
from lightning_byz.engine.adversary import Adversary
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.simulation import Simulation
from lightning_byz.numerics.rows import Rows
from lightning_byz.types import Round, keyed_generator

ZERO = torch.zeros(D, dtype=torch.float64)


def attacked(algorithm, attack, liars, seed, when=lambda step: True, n=N):
    """An exchange in which some workers lie, seeing all; and a list whose last entry they take for
    the parameters.
    """
    exchange, x = Exchange(algorithm, connected(n), seed), [ZERO]
    return lied_to(exchange, attack, liars, when, lambda index: x[-1]), x


# -- Byz-DM21 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("vr", [False, True])
@pytest.mark.parametrize("k", [2, D])
def test_dm21_with_a_mean_is_the_formula(vr, k):
    algorithm = (ByzVRDM21 if vr else ByzDM21)(Mean(), TopK(k=k), eta=0.3)
    workers, server = start(algorithm)
    v = u = None
    g, total, eta = np.zeros((N, D)), np.zeros(D), 0.3
    for step in range(12):
        grads, previous = gradients(step), gradients(step + 400)
        estimate, workers, server, _ = play(
            algorithm, grads, workers, server, step, previous=previous
        )
        s, old = grads.numpy(), previous.numpy()
        if v is None:
            v, u = s.copy(), s.copy()
        else:
            v = s + (1 - eta) * (v - old) if vr else (1 - eta) * v + eta * s
            u = (1 - eta) * u + eta * v
        for i in range(N):
            for j in np.argsort(-np.abs(u[i] - g[i]))[:k]:
                g[i, j] = u[i, j]
        total = g.mean(0)
        assert estimate.numpy() == pytest.approx(total, abs=1e-9)


def test_dm21_without_second_gradient_falls_back_to_plain_momentum():
    a, b = ByzVRDM21(robust(), Identity(), 0.3), ByzDM21(robust(), Identity(), 0.3)
    states = [start(a), start(b)]
    for step in range(3):
        grads = gradients(step)
        x, *states[1], _ = play(b, grads, *states[1], step)
        round = Round(step, N, seed=3)
        workers = [
            a.worker(contributions(grads)[i].grads._replace(previous=None), states[0][0][i], round)[
                1
            ]
            for i in range(N)
        ]
        states[0] = (workers, states[0][1])
        assert torch.equal(workers[2].u, states[1][0][2].u)
    assert x.isfinite().all()


def test_eta_1_is_ef21():
    dm, ef = ByzDM21(robust(), TopK(k=3), eta=1.0), ByzEF21SGDM(robust(), TopK(k=3), eta=1.0)
    a, b = start(dm), start(ef)
    for step in range(5):
        x, *a, _ = play(dm, gradients(step), *a, step)
        y, *b, _ = play(ef, gradients(step), *b, step)
        assert torch.equal(x, y)


# -- DIANA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", [RandK(k=3), Identity()], ids=repr)
def test_diana_with_a_mean_is_the_formula(compressor):
    algorithm = ByzDIANA(Mean(), compressor, alpha=0.25)
    workers, server = start(algorithm)
    h = np.zeros((N, D))
    for step in range(12):
        grads = gradients(step)
        estimate, workers, server, _ = play(algorithm, grads, workers, server, step)
        g = np.zeros((N, D))
        for i in range(N):
            round = Round(step, N, i, 3)
            c = compressor.encode(grads[i] - torch.from_numpy(h[i]), round.private("compressor"))
            sent = compressor.decode(c, D).numpy()
            g[i], h[i] = h[i] + sent, h[i] + 0.25 * sent
        assert estimate.numpy() == pytest.approx(g.mean(0), abs=1e-9)
    assert server.h.numpy() == pytest.approx(h, abs=1e-9)
    assert all(torch.equal(workers[i].h, server.h[i]) for i in range(N))


def test_diana_s_shifts_learn_constant_gradients():
    """Its compression's noise vanishes, which that of compressed SGD does not."""
    algorithm, grads = ByzDIANA(Mean(), RandK(k=3), alpha=3 / D), gradients(0)
    workers, server = start(algorithm)
    for step in range(150):
        estimate, workers, server, _ = play(algorithm, grads, workers, server, step)
    assert estimate.numpy() == pytest.approx(grads.numpy().mean(0), abs=1e-6)


def test_diana_refuses_what_would_run_away():
    with pytest.raises(
        ValueError, match=r"alpha < 2 / \(1 \+ omega\). Found alpha=0.5 and omega=9.*Use alpha=0.1"
    ):
        ByzDIANA(Mean(), RandK(k=1), alpha=0.5).init_worker(torch.zeros(10))
    with pytest.raises(ValueError, match="unbiased.*TopK.*RandK"):
        ByzDIANA(Mean(), TopK(k=1))
    with pytest.raises(ValueError, match="alpha=0"):
        ByzDIANA(alpha=0)


# -- Byz-VR-MARINA-PP ------------------------------------------------------------------------------

F_A = {
    "krum": (Krum(f=2), 1.0),
    "geometric_median": (GeometricMedian(f=2), 1.0),
    "bucketing+median": (Chain(pre=(Bucketing(),), rule=CoordinateMedian(), f=2), math.sqrt(2)),
    "median": (CoordinateMedian(f=2), math.sqrt(2)),
    "mean": (Mean(), 1.0),
}


class Anything(Attack):
    """Everything at once: large, tiny, along the honest mean, against it, nan now and then."""

    def __repr__(self):
        return "Anything()"

    def __call__(self, honest, own, scene=None):
        scale = 10.0 ** torch.randint(-3, 30, (len(own), 1), generator=scene.generator).to(
            own.dtype
        )
        lies = scale * torch.randn(own.shape, generator=scene.generator, dtype=own.dtype)
        lies[torch.rand(len(own), generator=scene.generator) < 0.1] = torch.nan
        return lies


CONFIGURATIONS = {
    "cohort of 4": {"cohort_size": 4},
    "cohort of 1": {"cohort_size": 1, "difference_aggregator": Mean()},
    "everybody": {},
    "PP+": {"cohort_size": 4, "average_differences": True},
    "by estimate": {"cohort_size": 4, "clipping_unit": "estimate", "clipping": 0.1},
    "compressed": {"cohort_size": 4, "compressor": RandK(ratio=0.5)},
}


ALL = [case.attack for case in ATTACKS if case.name != "mimic_the_third"]  # who lies here
SOME = [
    *(
        case.attack
        for case in ATTACKS
        if case.name in ("huge", "ipm_3", "alie_1.5", "not_a_number")
    ),
    Anything(),
]
GRID = [
    *(
        (configuration, rule, attack)
        for configuration in CONFIGURATIONS
        for rule in F_A
        for attack in SOME
    ),
    *(
        ("cohort of 4", rule, attack)
        for rule in ("median", "krum")
        for attack in ALL
        if attack not in SOME
    ),
]


@pytest.mark.parametrize(
    ("configuration", "rule", "attack"),
    GRID,
    ids=lambda part: part if isinstance(part, str) else repr(part),
)
def test_the_estimate_never_moves_by_more_than_the_clipping_radius(configuration, rule, attack):
    """||g_{k+1} - g_k|| <= F_A lambda_{k+1}, with 6 of 9 workers lying: most cohorts have a
    Byzantine majority, some no honest worker.
    """
    aggregator, factor = F_A[rule]
    options = {"clipping": 0.8, **CONFIGURATIONS[configuration]}
    if options.get("average_differences"):
        factor = 1.0
    if rule == "krum" and options.get("cohort_size") == 4:
        options["cohort_size"] = 5  # Krum's least, with f = 1
    algorithm = ByzVRMarinaPP(aggregator, p=0.2, **options)
    exchange, seen = attacked(algorithm, attack, [0, 1, 2, 4, 5, 7], 2, lambda step: step > 0)
    x, moved = ZERO, 0
    for step in range(14):
        seen.append(x)
        outcome = exchange.run(contributions(gradients(step) + x, gradients(step) + ZERO), x)
        if outcome.estimate is None:
            continue
        if not algorithm.is_full(outcome.round):
            state, length = exchange.server, torch.linalg.vector_norm
            unit = outcome.round.drift if algorithm.clipping_unit == "drift" else length(state.base)
            assert float(state.lam) == pytest.approx(options["clipping"] * float(unit))
            assert length(state.g - state.base) <= factor * state.lam * (1 + 1e-9) + 1e-14 * length(
                state.g
            )
            assert torch.equal(state.g, outcome.estimate)
            moved += 1
        x = x - 0.1 * outcome.estimate / (1 + outcome.estimate.norm())
    assert moved >= 1


def test_without_clipping_a_byzantine_cohort_takes_it_anywhere():
    """The test above can fail."""

    def furthest(clipping):
        algorithm = ByzVRMarinaPP(CoordinateMedian(f=2), p=0.05, cohort_size=3, clipping=clipping)
        exchange, _ = attacked(algorithm, Anything(), [0, 1], 2, lambda step: step > 0)
        x, most = ZERO, 0.0
        for step in range(30):
            outcome = exchange.run(contributions(gradients(step) + x, gradients(step)), x)
            if outcome.estimate is not None:
                most = max(most, float(outcome.estimate.abs().max()))
                x = x - 0.1 * outcome.estimate / (1 + outcome.estimate.norm())
        return most

    assert furthest(1.0) < 10
    assert furthest(None) > 1e3


def test_two_marina_rounds_by_hand():
    """d = 2, three workers, mean, lambda = 1/2, ||x - x'|| = 4, so rows are clipped to 2.

    Round 0 is full: g = mean of (3, 0), (0, 3), (3, 3) = (2, 2). Round 1: differences (0, 0), (6,
    8) of norm 10, (0, -1); clipped: (0, 0), (1.2, 1.6), (0, -1); g = (2, 2) + (1.2, 0.6) / 3 =
       (2.4, 2.2).
    """
    algorithm = ByzVRMarinaPP(Mean(), p=1e-9, clipping=0.5)
    workers, server = start(algorithm, n=3, d=2)
    first = torch.tensor([[3.0, 0], [0, 3], [3, 3]], dtype=torch.float64)
    estimate, workers, server, _ = play(algorithm, first, workers, server, 0)
    assert estimate.tolist() == [2, 2]
    old = torch.tensor([[1.0, 1], [0, 0], [5, 5]], dtype=torch.float64)
    new = torch.tensor([[1.0, 1], [6, 8], [5, 4]], dtype=torch.float64)
    estimate, workers, server, payloads = play(
        algorithm, new, workers, server, 1, previous=old, drift=4.0
    )
    assert payloads[1][0].tolist() == [6, 8]
    assert estimate.tolist() == pytest.approx([2.4, 2.2])
    assert server.base.tolist() == [2, 2]
    assert float(server.lam) == 2


def test_full_rounds_see_the_large_cohort_and_the_others_the_small_one_each_with_its_own_f():
    algorithm = ByzVRMarinaPP(
        robust(), CoordinateMedian(f=1), p=0.5, cohort_size=3, full_cohort_size=7
    )
    sizes, rules = set(), set()
    for step in range(40):
        round = Round(step, N, drift=torch.tensor(1.0))
        full = algorithm.is_full(round)
        assert int(algorithm.cohort(round).sum()) == (7 if full else 3)
        assert algorithm.rule(round) == (robust() if full else CoordinateMedian(f=1))
        assert (algorithm.codec(round) == Identity()) or not full
        sizes.add(int(algorithm.cohort(round).sum()))
        rules.add(type(algorithm.rule(round)).__name__)
    assert sizes == {3, 7}
    assert rules == {"Chain", "CoordinateMedian"}
    assert algorithm.is_full(Round(0, N))  # without an estimate so far, whatever the coin says


@pytest.mark.parametrize(
    ("cohort", "rule", "f"),
    [
        (4, Chain(pre=(Bucketing(),), rule=CoordinateMedian(), f=2), 0),
        (4, CoordinateMedian(f=2), 1),
        (9, robust(), 2),
        (5, Krum(f=2), 1),
    ],
)
def test_difference_rounds_take_as_much_of_f_as_their_cohort_allows(cohort, rule, f):
    algorithm = ByzVRMarinaPP(rule, cohort_size=cohort)
    algorithm.check(N)
    assert algorithm.difference_rule(N).f == f


def test_coins_fall_with_probability_p_and_cohorts_are_uniform():
    algorithm = ByzVRMarinaPP(robust(), p=0.3, cohort_size=4)
    rounds = [Round(step, N, drift=torch.tensor(1.0)) for step in range(2000)]
    assert np.mean([algorithm.is_full(round) for round in rounds]) == pytest.approx(0.3, abs=0.04)
    counts = (
        torch.stack([algorithm.cohort(round) for round in rounds if not algorithm.is_full(round)])
        .double()
        .mean(0)
    )
    assert counts.tolist() == pytest.approx([4 / 9] * 9, abs=0.05)


def test_full_participation_without_clipping_is_byz_vr_marina():
    """An independent loop: g_i = full gradient, or g + difference; g = Agg(g_1, ..., g_n)."""
    algorithm = ByzVRMarinaPP(TrimmedMean(f=2), p=0.4, clipping=None)
    workers, server = start(algorithm)
    g = None
    for step in range(20):
        grads, previous = gradients(step), gradients(step + 300)
        estimate, workers, server, _ = play(
            algorithm, grads, workers, server, step, previous=previous
        )
        coin = (
            float(torch.rand((), generator=keyed_generator("coin", 3, step), dtype=torch.float64))
            < 0.4
        )
        rows = grads.numpy() if g is None or coin else g + grads.numpy() - previous.numpy()
        g = np.sort(rows, axis=0)[2:-2].mean(0)
        assert estimate.numpy() == pytest.approx(g, abs=1e-6)


def test_clipped_differences_without_sampling_and_clipping_are_the_inner_method():
    inner = RobustSGD(robust(), worker_momentum=0.7)
    outer = ClippedDifferences(inner, clipping=None)
    a, b = start(inner), start(outer)
    for step in range(6):
        x, *a, _ = play(inner, gradients(step), *a, step)
        y, *b, _ = play(outer, gradients(step), *b, step)
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_another_rule_for_clipped_differences_is_its_inner_methods_too():
    algorithm = replace(
        ClippedDifferences(RobustSGD(robust()), cohort_size=4), aggregator=CoordinateMedian(f=1)
    )
    assert algorithm.inner.aggregator == algorithm.aggregator == CoordinateMedian(f=1)
    assert algorithm.with_f(2).inner.aggregator == CoordinateMedian(f=2)
    assert algorithm.averaging().aggregator == Mean()


def test_what_monitors_see_averages_to_the_estimate_of_a_mean():
    for algorithm in (
        ByzVRMarinaPP(Mean(), p=0.2, cohort_size=4, clipping=0.5),
        ClippedDifferences(RobustSGD(Mean()), cohort_size=4, clipping=0.1),
    ):
        exchange = Exchange(algorithm, connected(), seed=0)
        for step in range(8):
            outcome = exchange.run(
                contributions(gradients(step), gradients(step + 100)), ZERO + step
            )
            here = outcome.round.cohort
            torch.testing.assert_close(
                outcome.seen.dense()[here].mean(0), outcome.estimate, rtol=1e-9, atol=1e-9
            )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ByzVRMarinaPP(compressor=TopK(k=1)), "unbiased compressor. Found TopK.*RandK"),
        (lambda: ByzVRMarinaPP(p=0.0), r"`p`.*\(0, 1\]. Found p=0.0"),
        (
            lambda: ByzVRMarinaPP(clipping=0.0),
            "`clipping` should be positive, or None.*Found clipping=0.0",
        ),
        (lambda: ByzVRMarinaPP(clipping_unit="gamma"), "`clipping_unit`.*Found 'gamma'"),
        (lambda: ByzVRMarinaPP(cohort_size=0), "`cohort_size`.*at least 1. Found 0"),
        (lambda: ByzVRMarinaPP(full_batches=0), "`full_batches`.*at least 1"),
        (
            lambda: ByzVRMarinaPP(average_differences=True, difference_aggregator=Mean()),
            "Give one of the two",
        ),
        (lambda: ByzVRMarinaPP(robust(), full_cohort_size=10).check(N), "full_cohort_size=10, n=9"),
        (
            lambda: ByzVRMarinaPP(robust(), cohort_size=5, full_cohort_size=4).check(N),
            "cohort_size=5, full_cohort_size=4",
        ),
        (
            lambda: ByzVRMarinaPP(Krum(f=2), cohort_size=2).check(N),
            "see 2 rows. Found Krum.*difference_aggregator",
        ),
        (
            lambda: ByzVRMarinaPP(robust(), CoordinateMedian(f=3), cohort_size=4).check(N),
            "f=3 cannot take n=4 rows",
        ),
        (
            lambda: ClippedDifferences(RobustSGD(server_momentum=0.5)),
            "server_momentum=0 and undo_worker_momentum=False",
        ),
        (
            lambda: ClippedDifferences(RobustSGD(worker_momentum=0.9, undo_worker_momentum=True)),
            "undo_worker_momentum=False",
        ),
        (lambda: ClippedDifferences(ByzEF21SGDM()), "RobustSGD with"),
    ],
)
def test_marina_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make()


def test_a_difference_rule_that_is_none_is_refused():
    with pytest.raises(
        TypeError,
        match="`difference_aggregator` of ByzVRMarinaPP should be an instance of Aggregator",
    ):
        ByzVRMarinaPP(difference_aggregator="median")


# -- dSTAR -----------------------------------------------------------------------------------------


def filter_by_hand(rows, tolerance, trusted=None, reading="ensemble"):
    """The kept rows, by the inequalities, on numpy arrays."""
    center = np.median(rows, axis=0) if reading == "ensemble" else trusted
    d = np.array([math.sqrt(((row - center) ** 2).sum()) for row in rows])
    limit = sorted(d)[(len(d) - 1) // 2]
    if reading == "ensemble" and trusted is not None:
        limit = max(limit, math.sqrt(((trusted - center) ** 2).sum()))
    return rows[d <= tolerance * limit].mean(0)


@laws
@given(
    st.integers(3, 14),
    st.integers(1, 6),
    st.sampled_from([1.0, 1.5, 3.0]),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_the_filter_is_its_inequality(n, d, tolerance, seed, with_trusted):
    rows = rows_for(n, d, seed)
    rows[: (n - 1) // 2] += 3 * rows_for((n - 1) // 2, d, seed + 1, mean=0.0)
    trusted = rows_for(1, d, seed + 2, scale=2.0)[0]
    f = (n - 1) // 2
    given_ = trusted if with_trusted else None
    got = DeviationFilter(f, tolerance, trusted=given_)(rows)
    assert got.numpy() == pytest.approx(
        filter_by_hand(rows.numpy(), tolerance, None if given_ is None else trusted.numpy())
    )
    got = DeviationFilter(f, tolerance, reading="trusted", trusted=trusted)(rows)
    assert got.numpy() == pytest.approx(
        filter_by_hand(rows.numpy(), tolerance, trusted.numpy(), "trusted")
    )


def test_everybody_and_no_limit_is_the_mean():
    algorithm, grads = DStar(DeviationFilter(f=2, tolerance=math.inf), k=N), gradients(0)
    workers, server = start(algorithm)
    estimate, *_ = play(algorithm, grads, workers, server, 0)
    torch.testing.assert_close(estimate, grads.mean(0), rtol=1e-12, atol=1e-12)
    same_rows = torch.ones(5, 3)
    assert torch.equal(DeviationFilter(f=2, tolerance=math.inf)(same_rows), same_rows[0])


def test_late_messages_never_enter():
    """What the late workers' gradients are changes no bit of the estimate."""
    for case in ALGORITHMS:
        if not isinstance(case.algorithm, DStar) or case.algorithm.count(N) == N:
            continue
        estimates = []
        for lateness in (1.0, 1e6, torch.nan):
            exchange, parts = Exchange(case.algorithm, connected(), seed=0), []
            for step in range(5):
                grads, here = gradients(step), exchange.next_round(ZERO).cohort
                grads[~here] *= lateness
                outcome = exchange.run(contributions(grads), ZERO)
                assert int(outcome.round.cohort.sum()) == case.algorithm.count(N)
                assert not bool((outcome.round.present & ~here).any())
                assert not outcome.rows.dense()[~here].any()
                parts.append(outcome.estimate)
            estimates.append(torch.stack(parts))
        assert torch.equal(estimates[0], estimates[1])
        assert torch.equal(estimates[0], estimates[2])


def cosines_with_all_liars_among_the_first(attack, reading):
    """f = 4 of the k = 9 that arrive first of n = 13, in noise as large as the gradient."""
    exchange, seen = attacked(
        DStar(DeviationFilter(f=4, reading=reading), k=9), attack, [0, 3, 6, 9], 0, n=13
    )
    exchange.simulation.liars.append(lambda step: (0, 3, 6, 9))
    d = 200
    seen.append(torch.zeros(d).double())
    for step in range(6):
        grads = rows_for(13, d, seed=step, mean=1.0, scale=1.0)
        outcome = exchange.run(
            contributions(grads),
            torch.zeros(d).double(),
            trusted=rows_for(1, d, seed=500 + step)[0],
        )
        assert outcome.round.cohort[[0, 3, 6, 9]].all()
        yield float(
            torch.nn.functional.cosine_similarity(outcome.estimate, torch.ones(d).double(), dim=0)
        )


SEARCHING = (
    "foe",
    "optimized_ipm",
    "worst_lie",
)  # they know the filter, and stay just inside of it


@pytest.mark.parametrize("reading", ["ensemble", "trusted"])
@pytest.mark.parametrize(
    "attack", [case for case in ATTACKS if case.name not in SEARCHING], ids=lambda case: case.name
)
def test_with_all_liars_among_the_first_the_estimate_points_along_the_gradient(attack, reading):
    assert min(cosines_with_all_liars_among_the_first(attack.attack, reading)) > 0


@pytest.mark.parametrize(
    "attack", [case for case in ATTACKS if case.name in SEARCHING], ids=lambda case: case.name
)
def test_trusted_data_withstands_a_search_against_the_filter_and_the_ensemble_alone_does_not(
    attack,
):
    """What docs/algorithms/dstar.md warns of."""
    assert min(cosines_with_all_liars_among_the_first(attack.attack, "trusted")) > 0
    assert max(cosines_with_all_liars_among_the_first(attack.attack, "ensemble")) < 0


def test_arrival_times_are_shifted_exponential_and_the_round_ends_with_the_kth():
    delays, n, k = ShiftedExponential(base=2.0, mean=3.0, slow=(1,), slowdown=10.0), 20, 13
    times = torch.stack([delays(Round(step, n, seed=1)) for step in range(3000)])
    others = times[:, torch.arange(n) != 1]
    assert float(others.min()) >= 2
    assert float(others.mean()) == pytest.approx(5, rel=0.02)
    assert float(times[:, 1].mean()) == pytest.approx(50, rel=0.05)
    plain = DStar(DeviationFilter(f=6), k=k, delays=ShiftedExponential(base=0.0, mean=1.0))
    harmonic = sum(1 / i for i in range(n - k + 1, n + 1))  # H_N - H_(N-k)
    assert np.mean([plain.seconds(Round(step, n)) for step in range(3000)]) == pytest.approx(
        harmonic, rel=0.02
    )
    assert torch.equal(delays(Round(5, n, seed=1)), times[5])
    rushing = torch.zeros(n, dtype=torch.bool)
    rushing[4] = True
    assert float(delays(Round(5, n, seed=1, rushing=rushing))[4]) == 0


def test_a_trusted_gradient_widens_the_tolerance_and_never_narrows_it():
    # median 2, deviations 2 1 0 1 8
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]], dtype=torch.float64)
    for trusted, kept in ((None, 3), (2.0, 3), (4.0, 4), (10.0, 5)):
        value = None if trusted is None else torch.tensor([trusted], dtype=torch.float64)
        weights = DeviationFilter(f=1, tolerance=1.0, trusted=value).weights(Rows(rows))
        assert int((weights > 0).sum()) == kept


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: DStar(DeviationFilter(f=3), k=6).check(9),
            TooFewRowsError,
            "k > 2f.*Found k=6 of n=9. Use k >= 7, or f <= 2",
        ),
        (lambda: DStar(DeviationFilter(f=3)).check(9), TooFewRowsError, "Found k=6 of n=9"),
        (lambda: DStar(DeviationFilter(f=0), k=10).check(9), ValueError, "Found k=10 and n=9"),
        (lambda: DStar(k=0), ValueError, "`k`.*at least 1. Found k=0"),
        (
            lambda: DeviationFilter(tolerance=0.5),
            ValueError,
            "`tolerance` should be at least 1.*Found 0.5",
        ),
        (lambda: DeviationFilter(reading="c"), ValueError, "`reading` should be one of.*Found 'c'"),
        (
            lambda: DeviationFilter(center="mean"),
            ValueError,
            "`center` should be one of.*Found 'mean'",
        ),
        (
            lambda: DeviationFilter(f=1, reading="trusted")(torch.ones(5, 2)),
            TooFewRowsError,
            "finite trusted gradient. Found none",
        ),
        (lambda: ShiftedExponential(base=-1.0), ValueError, "base=-1.0"),
    ],
)
def test_dstar_settings_that_make_no_sense_are_refused(make, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        make()


def test_f_of_dstar_is_what_the_first_k_allow():
    assert DStar().most_f(20) == 6  # k = n - f > 2f
    assert DStar(k=13).most_f(20) == 6
    assert DStar(Krum(), k=13).most_f(20) == 5
    assert DStar(k=20).most_f(20) == 9
    assert [DStar(DeviationFilter(f=f)).count(20) for f in (0, 3, 6)] == [20, 17, 14]


# -- signSGD ---------------------------------------------------------------------------------------


def test_one_worker_without_momentum_is_sign_descent():
    algorithm = SignSGDMajorityVote(MajorityVote(f=0), momentum=0.0)
    grads = gradients(0, n=1, mean=0.0)
    grads[0, 3] = 0.0
    estimate, *_ = play(algorithm, grads, *start(algorithm, n=1), 0)
    assert estimate.tolist() == [1.0 if g >= 0 else -1.0 for g in grads[0].tolist()]


def test_signum_step_for_step():
    """Algorithm 1 in numpy: momentum before the sign, sign(0) = +1, ties +1; an even number of
    workers.
    """
    beta, n, lr = 0.8, 6, 0.05
    algorithm = SignSGDMajorityVote(MajorityVote(f=0), momentum=beta)
    workers, server = start(algorithm, n=n)
    x, their_x, v = ZERO, np.zeros(D), np.zeros((n, D))
    for step in range(30):
        grads = gradients(step, n=n, mean=0.0) + x
        estimate, workers, server, _ = play(algorithm, grads, workers, server, step)
        x = x - lr * estimate
        v = beta * v + (1 - beta) * (gradients(step, n=n, mean=0.0).numpy() + their_x)
        votes = np.where(v < 0, -1, 1).sum(0)
        their_x = their_x - lr * np.where(votes < 0, -1, 1)
        assert x.numpy() == pytest.approx(their_x, abs=1e-6)


def test_a_vote_by_hand():
    rows = torch.tensor([[1.0, -1, 1, 0], [-1, -1, 2, 0], [1, -3, -9, -1], [-1, 1, -1, 1]])
    assert MajorityVote(f=1)(rows).tolist() == [1, -1, 1, 1]
    assert MajorityVote(f=1, tie="zero")(rows).tolist() == [0, -1, 0, 1]
    broken = torch.stack(
        [
            MajorityVote(f=1, tie="random")(Rows(rows, generator=torch.Generator().manual_seed(i)))
            for i in range(400)
        ]
    )
    assert set(broken.unique().tolist()) == {-1.0, 1.0}
    assert broken[:, [1, 3]].unique(dim=0).tolist() == [[-1, 1]]
    assert broken[:, [0, 2]].mean(0).tolist() == pytest.approx([0, 0], abs=0.15)


def test_a_zero_votes_plus_one_or_at_random():
    grads = torch.zeros(9, 400, dtype=torch.float64)
    plus = SignSGDMajorityVote(MajorityVote(f=2), momentum=0.0, zero="plus_one")
    assert play(plus, grads, *start(plus, d=400), 0)[0].unique().tolist() == [1.0]
    chance = SignSGDMajorityVote(MajorityVote(f=2), momentum=0.0, zero="random")
    assert float(play(chance, grads, *start(chance, d=400), 0)[0].mean()) == pytest.approx(
        0, abs=0.2
    )
    ties = SignSGDMajorityVote(MajorityVote(f=2, tie="zero"), momentum=0.0, zero="random")
    assert play(ties, grads[:8], *start(ties, d=400, n=8), 0)[0].unique().tolist() == [-1, 0, 1]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("tie", ["plus_one", "zero", "random"])
@pytest.mark.parametrize(
    ("zero", "sums"), [("in_turn", (1.0, 0.0)), ("abstain", (0.0, 0.0)), ("plus_one", (1.0, 2.0))]
)
def test_coordinates_that_nobody_uses_stay_where_they_are(momentum, tie, zero, sums):
    """After one step and after two; f liars that vote on them change nothing, but for the code
    whose zeros all vote +1.
    """
    algorithm = SignSGDMajorityVote(MajorityVote(f=2, tie=tie), momentum=momentum, zero=zero)
    workers, server = start(algorithm, n=9)
    moved = torch.zeros(D, dtype=torch.float64)
    for step, expected in enumerate(sums):
        grads = gradients(step, n=9, mean=0.5)
        grads[:, 1] = 0.0
        grads[:2, 1] = -5.0
        estimate, workers, server, _ = play(algorithm, grads, workers, server, step)
        moved += estimate
        assert moved[1] == expected


def test_who_abstains_leaves_a_coordinate_to_those_that_use_it():
    grads = torch.zeros(9, 4, dtype=torch.float64)
    grads[:3, 0], grads[:2, 1], grads[:3, 2], grads[5, 3] = (
        -1.0,
        -1.0,
        torch.tensor([2.0, -3.0, -1e-30]),
        torch.inf,
    )
    algorithm = SignSGDMajorityVote(MajorityVote(f=2), momentum=0.0, zero="abstain")
    estimate, *_ = play(
        algorithm, grads[[0, 1, 2, 3, 4, 6, 7, 8, 5]][:8], *start(algorithm, d=4, n=8), 0
    )
    assert estimate.tolist() == [-1, 0, -1, 0]
    four = torch.tensor([[1.0], [1], [-1], [-1], [0], [0]])
    assert [
        MajorityVote(f=2, tie=tie, zero="abstain")(four).item() for tie in ("plus_one", "zero")
    ] == [1, 0]
    assert MajorityVote(f=2, tie="random", zero="abstain")(four).item() in (1, -1)


@pytest.mark.parametrize("d", [1, 33, 1000])
def test_two_bits_a_coordinate_where_zeros_abstain(d):
    exchange = Exchange(
        SignSGDMajorityVote(MajorityVote(f=1), zero="abstain"), connected(4), seed=0
    )
    outcome = exchange.run(
        contributions(rows_for(4, d, mean=0.0, dtype=torch.float32)), torch.zeros(d)
    )
    assert outcome.bytes_up == outcome.bytes_down == 4 * math.ceil(2 * d / 32) + 4


@pytest.mark.parametrize("d", [1, 31, 32, 33, 1000])
@pytest.mark.parametrize("tie", ["plus_one", "zero", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_bit_a_coordinate_in_both_directions(d, tie, dtype):
    """Bytes of the payload: 32-bit words up, and down unless ties are told from both signs, which
    takes 2 bits.
    """
    exchange = Exchange(SignSGDMajorityVote(MajorityVote(f=1, tie=tie)), connected(4), seed=0)
    outcome = exchange.run(
        contributions(rows_for(4, d, mean=0.0, dtype=dtype)), torch.zeros(d, dtype=dtype)
    )
    assert outcome.bytes_up == 4 * math.ceil(d / 32)
    if tie == "zero":
        assert outcome.bytes_down == 4 * math.ceil(2 * d / 32) + dtype.itemsize
        assert set(outcome.estimate.tolist()) <= {-1.0, 0.0, 1.0}
    else:
        assert outcome.bytes_down == 4 * math.ceil(d / 32)
        assert set(outcome.estimate.tolist()) <= {-1.0, 1.0}


def test_the_downlink_keeps_every_estimate_bit_for_bit():
    for case in ALGORITHMS:
        seen = []

        class Remembers(type(case.algorithm)):
            def server(self, rows, state, round, seen=seen):
                estimate, state = super().server(rows, state, round)
                seen.append(estimate.clone())
                return estimate, state

            def tally(self, payloads, rows, round):
                return None  # votes go through the server's half as well

        fields = {
            name: getattr(case.algorithm, name) for name in case.algorithm.__dataclass_fields__
        }
        exchange = Exchange(Remembers(**fields), connected(), seed=0)
        for step in range(4):
            outcome = exchange.run(contributions(gradients(step, mean=0.0)), ZERO + step)
            assert torch.equal(outcome.estimate, seen[-1])


def test_another_rule_over_signs_is_sent_down_as_it_is():
    algorithm = SignSGDMajorityVote(Mean(), momentum=0.0)
    outcome = Exchange(algorithm, connected(4), seed=0).run(
        contributions(rows_for(4, 50, mean=0.0)), torch.zeros(50).double()
    )
    assert set(outcome.estimate.tolist()) == {-1, -0.5, 0, 0.5, 1}
    assert outcome.bytes_down == 50 * 8


def test_honest_votes_without_noise_win_against_fewer_than_half():
    truth = gradients(0, n=1, mean=0.0)[0]
    for liars in range(5):
        rows = (
            truth.sign()
            * torch.tensor([-1.0] * liars + [1.0] * (9 - liars), dtype=torch.float64)[:, None]
        )
        assert torch.equal(MajorityVote(f=liars)(rows), truth.sign())


@pytest.mark.parametrize(
    ("inverters", "low", "high"),
    [(0, 0.0, 3.0), (8, 0.0, 5.0), (12, 2.0, 15.0), (13, 10.0, 60.0), (14, 1e3, 1e9)],
)
def test_the_toy_of_27_workers_breaks_between_13_and_14_inverters(inverters, low, high):
    """f(x) = ||x||^2 / 2 in 1000 dimensions, noise N(0, 1), learning rate 0.01, 1500 steps, from
    N(0, 1).
    """
    algorithm = SignSGDMajorityVote(MajorityVote(f=min(13, inverters)), momentum=0.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=generator)
    sign = torch.ones(27, 1).index_fill_(0, torch.arange(inverters), -1.0)
    round = Round(0, 27, present=torch.ones(27, dtype=torch.bool))
    for _ in range(1500):
        rows = sign * (x + torch.randn(27, 1000, generator=generator))
        estimate, _ = algorithm.server(Rows(rows), None, round)
        x = x - 0.01 * estimate
    assert low <= float(x.square().sum() / 2) <= high


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: SignSGDMajorityVote("majority"),
            TypeError,
            "an Aggregator, such as MajorityVote.*Found 'majority'",
        ),
        (
            lambda: SignSGDMajorityVote(momentum=1.0),
            ValueError,
            r"`momentum`.*\[0, 1\). Found momentum=1.0",
        ),
        (lambda: SignSGDMajorityVote(zero="minus"), ValueError, "`zero` should be.*Found 'minus'"),
        (lambda: MajorityVote(tie="minus_one"), ValueError, "`tie` should be.*Found 'minus_one'"),
    ],
)
def test_vote_settings_that_make_no_sense_are_refused(make, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        make()


# -- cohorts in the exchange -----------------------------------------------------------------------


def test_a_worker_outside_the_cohort_keeps_its_state_and_a_liar_there_is_not_heard():
    algorithm = ClippedDifferences(
        RobustSGD(CoordinateMedian(f=2), worker_momentum=0.5), cohort_size=3
    )
    exchange, _ = attacked(algorithm, Anything(), [0, 1], 0)
    for step in range(8):
        before = {w: frozen(state) for w, state in exchange.workers.items()}
        outcome = exchange.run(contributions(gradients(step)), ZERO + step)
        cohort = outcome.round.cohort
        assert int(cohort.sum()) == (N if step == 0 else 3)
        assert not bool((outcome.round.present & ~cohort).any())
        for worker in (~cohort).nonzero().flatten().tolist():
            assert same(before[worker], frozen(exchange.workers[worker]))
            assert worker not in outcome.silent


def test_the_drift_is_since_the_last_estimate():
    algorithm = ByzVRMarinaPP(CoordinateMedian(f=2), p=1e-9)
    exchange = Exchange(algorithm, connected(), seed=0)
    nobody = [contribution._replace(grads=None) for contribution in contributions(gradients(0))]
    assert exchange.run(nobody, ZERO).round.drift is None
    assert exchange.run(contributions(gradients(0)), ZERO + 1).round.drift is None
    assert float(exchange.run(nobody, ZERO + 2).round.drift) == pytest.approx(math.sqrt(D))
    assert float(exchange.run(contributions(gradients(0)), ZERO + 3).round.drift) == pytest.approx(
        2 * math.sqrt(D)
    )
    assert float(exchange.run(contributions(gradients(0)), ZERO + 3).round.drift) == 0


# -- the paper's experiment, small -----------------------------------------------------------------


class ShiftBack(Adversary):
    """SHB of arXiv 2311.14127: a Byzantine majority of the cohort pulls the model back to its
    start; a minority behaves.
    """

    def __init__(self, workers, where):
        super().__init__(Anything(), workers)
        self.where = where

    def forge(self, everybody, codec, round, server, index, liars):
        liars = [w for w in self.byzantine if round.cohort[w]]
        if 2 * len(liars) > int(round.cohort.sum()):
            for w in liars:
                everybody[w] = everybody[w]._replace(
                    payload=codec.encode(self.where() - ZERO, None)
                )
        return everybody


@pytest.mark.thorough
@pytest.mark.parametrize(("clipping", "converges"), [(0.3, True), (None, False)])
def test_clipping_is_what_survives_cohorts_with_a_byzantine_majority(clipping, converges):
    """Ridge regression, everybody has all data, 5 of 20 lie by shift-back, 4 are sampled, a median
    of buckets of 2.
    """
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(256, D, generator=generator, dtype=torch.float64)
    a /= a.norm(dim=1, keepdim=True)
    y = (
        a @ torch.randn(D, generator=generator, dtype=torch.float64)
        + 0.1 * torch.randn(256, generator=generator).double()
    )
    ridge = 0.01

    def gradient(x, index=slice(None)):
        return a[index].T @ (a[index] @ x - y[index]) / len(a[index]) + ridge * x

    def loss(x):
        return float((a @ x - y).square().mean() / 2 + ridge * x.square().sum() / 2)

    optimum = torch.linalg.solve(a.T @ a / 256 + ridge * torch.eye(D).double(), a.T @ y / 256)
    algorithm = ByzVRMarinaPP(
        Chain(pre=(Bucketing(),), rule=CoordinateMedian(), f=4),
        p=0.05,
        cohort_size=4,
        clipping=clipping,
    )
    x = before = start_at = 3 * torch.ones(D, dtype=torch.float64)
    exchange = Exchange(algorithm, connected(20), seed=0)
    exchange.simulation = Simulation()
    exchange.simulation.adversaries.append(ShiftBack(range(5), lambda: x - start_at))
    for step in range(900):
        round = exchange.next_round(x)
        grads, previous = torch.zeros(20, D).double(), torch.zeros(20, D).double()
        for worker in round.cohort.nonzero().flatten().tolist():
            batch = torch.randperm(256, generator=keyed_generator("batch", step, worker))[:32]
            full = algorithm.is_full(round)
            grads[worker] = gradient(x) if full else gradient(x, batch)
            previous[worker] = gradient(before, batch)
        outcome = exchange.run(contributions(grads, previous), x)
        x, before = x - 0.5 * outcome.estimate, x
    gap = loss(x) - loss(optimum)
    assert (gap < 1e-6) == converges
    assert converges or gap > 1e-2


def test_a_cohort_without_honest_workers_is_pulled_back_too():
    """In such a round an attack that needs nobody to look at acts; one that does behaves."""
    algorithm = ByzVRMarinaPP(CoordinateMedian(f=1), p=1e-9, cohort_size=2, clipping=None)
    for attack, acts in ((attacks.ShiftBack(scale=5.0), True), (attacks.SignFlip(), False)):
        exchange, x = attacked(algorithm, attack, range(N - 1), 0)
        acted, before = [], ZERO
        for step in range(12):
            x.append(torch.full((D,), float(step), dtype=torch.float64))
            outcome = exchange.run(
                contributions(torch.ones(N, D).double(), torch.ones(N, D).double()), x[-1]
            )
            if step and not outcome.round.cohort[N - 1]:
                acted.append(not torch.equal(outcome.estimate, before))
            before = outcome.estimate
        assert len(acted) > 3
        assert set(acted) == {acts}
