"""Laws over every rule in the zoo."""

import dataclasses
import itertools
import math
import threading

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo import (
    FROZEN_ROWS,
    JUNK,
    PRE_AGGREGATORS,
    ROBUST_RULES,
    RULES,
    RuleCase,
    each,
    laws,
    rows_for,
)

from lightning_byz.aggregators import (
    CGE,
    NNM,
    AutoGM,
    CenteredClip,
    Chain,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    Mean,
    MedianNormClipping,
    MultiKrum,
    StaticClipping,
    TooFewRowsError,
    TrimmedMean,
    WeightedAggregator,
)
from lightning_byz.algorithms import RobustSGD
from lightning_byz.numerics import rows as rows_module
from lightning_byz.numerics.rows import Rows

N, F, D = 11, 3, 13


def set_up(case: RuleCase, n: int = N, f: int = F):
    """The case's rule for the largest f up to the given one that it allows for n rows."""
    return case.rule.with_f(max(0, min(f, case.rule.most_f(n))))


def close(found, expected, tolerance=1e-10, cancelled=0.0):
    """``cancelled``: the size of numbers that may have cancelled, but for their rounding."""
    size = float(expected.double().abs().max()) if expected.numel() else 0.0
    atol = max(tolerance * max(size, 1e-30), 1e-14 * cancelled)
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=atol)


# -- the definition --------------------------------------------------------------------------------


@each(RULES)
def test_frozen_values(case):
    out = case.rule(torch.tensor(FROZEN_ROWS, dtype=torch.float64))
    assert out.tolist() == pytest.approx(
        case.frozen, rel=case.frozen_tolerance, abs=case.frozen_tolerance
    )


@each(RULES)
@laws
@given(st.data())
def test_equals_the_slow_loop(case, data):
    n = data.draw(st.integers(case.unique_from[0], 14).filter(lambda n: case.rule.most_f(n) >= 0))
    rule = case.rule.with_f(data.draw(st.integers(0, case.rule.most_f(n))))
    x = rows_for(
        n,
        data.draw(st.integers(case.unique_from[1], 6)),
        data.draw(st.integers(0, 10**6)),
        scale=10.0 ** data.draw(st.integers(-6, 6)),
    )
    expected = torch.tensor(case.oracle(x.tolist(), rule.f), dtype=torch.float64)
    close(rule(x), expected, case.tolerance, cancelled=float(x.abs().max()))


@each([case for case in RULES if case.exact_ties])
@laws
@given(st.data())
def test_equals_the_slow_loop_where_values_tie(case, data):
    n = data.draw(st.integers(1, 10).filter(lambda n: case.rule.most_f(n) >= 0))
    rule = case.rule.with_f(data.draw(st.integers(0, case.rule.most_f(n))))
    d = data.draw(st.integers(1, 3))
    x = torch.tensor(
        data.draw(
            st.lists(st.lists(st.integers(-2, 2), min_size=d, max_size=d), min_size=n, max_size=n)
        )
    ).double()
    close(rule(x), torch.tensor(case.oracle(x.tolist(), rule.f), dtype=torch.float64))


@pytest.mark.parametrize(
    ("part", "oracle"),
    [pytest.param(part, oracle, id=name) for name, part, oracle in PRE_AGGREGATORS],
)
@laws
@given(st.data())
def test_pre_aggregations_equal_the_slow_loop(part, oracle, data):
    n = data.draw(st.integers(1, 12))
    part = part.with_f(data.draw(st.integers(0, part.most_f(n))))
    x = rows_for(n, data.draw(st.integers(1, 6)), data.draw(st.integers(0, 10**6)))
    close(part(Rows(x)).dense(), torch.tensor(oracle(x.tolist(), part.f), dtype=torch.float64))


@each([case for case in RULES if isinstance(case.rule, WeightedAggregator)])
def test_weights_say_whom_a_rule_trusts(case):
    x = rows_for(N, D)
    rule = set_up(case)
    weights = rule.weights(Rows(x))
    assert weights.shape == (N,)
    # which clips
    assert weights.sum() == pytest.approx(1) or (rule.clips and weights.sum() < 1)
    assert (weights >= 0).all()
    close(rule(x), weights @ x)


def test_krum_chooses_one_of_its_rows_and_the_first_of_several_that_tie():
    x = rows_for(7, D, dtype=torch.float32)
    assert any(torch.equal(Krum(f=2)(x), row) for row in x)
    square = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert Krum(f=0)(square).tolist() == [1, 0]


def test_the_median_of_an_even_number_is_the_middle():
    assert CoordinateMedian(f=1)(torch.tensor([[1.0], [2.0], [4.0], [100.0]])).item() == 3


# -- symmetries ------------------------------------------------------------------------------------


@each([case for case in RULES if case.unanimous])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unanimity_and_dtype(case, dtype):
    row = rows_for(1, D, seed=4, scale=100.0, dtype=dtype)
    x = row.repeat(N, 1)
    out = set_up(case)(x)
    assert out.dtype == dtype
    assert out.shape == (D,)
    torch.testing.assert_close(out, row[0], rtol=8 * torch.finfo(dtype).eps, atol=0)


@each(RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_agree_with_float64(case, dtype):
    x = rows_for(N, D, seed=6, dtype=dtype)
    close(set_up(case)(x), set_up(case)(x.double()), 4 * torch.finfo(dtype).eps)


@each([case for case in RULES if case.symmetric])
@laws
@given(seed=st.integers(0, 10**6), n=st.integers(5, 13))
def test_the_order_of_the_rows_does_not_matter(case, seed, n):
    x = rows_for(n, D, seed)
    permutation = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    rule = set_up(case, n)
    close(rule(x[permutation]), rule(x), max(1e-12, 1e-3 * case.tolerance))


@each([case for case in RULES if case.translation_equivariant])
@pytest.mark.parametrize("shift", [-3.0, 1e4])
def test_translation_equivariance(case, shift):
    x, v = rows_for(N, D), shift * rows_for(1, D, seed=9)[0]
    close(set_up(case)(x + v), set_up(case)(x) + v)


@each([case for case in RULES if case.scale_equivariant])
@pytest.mark.parametrize("factor", [-1.0, 0.0, 1e-12, -7.0, 1e20])
def test_scale_equivariance(case, factor):
    x = rows_for(N, D)
    close(set_up(case)(factor * x), factor * set_up(case)(x))


@each(RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_input_is_not_touched_and_not_returned(case, dtype):
    x = rows_for(N, D, dtype=dtype)
    before = x.clone()
    out = set_up(case)(x)
    assert torch.equal(x, before)
    out.fill_(7)
    assert torch.equal(x, before)


@each(RULES)
def test_same_input_same_bits(case):
    x = rows_for(N, 50, dtype=torch.float32)
    assert torch.equal(set_up(case)(x), set_up(case)(x.clone()))


@each([case for case in RULES if case.unanimous])
def test_one_row_is_its_own_aggregate_where_a_rule_takes_one(case):
    if case.rule.most_f(1) < 0:
        with pytest.raises(TooFewRowsError):
            case.rule.with_f(0)(rows_for(1, D))
    else:
        close(case.rule.with_f(0)(rows_for(1, D)), rows_for(1, D)[0])


# -- robustness ------------------------------------------------------------------------------------


def assert_near_the_honest(out, honest, n):
    """Within a constant of the honest spread: what Krum, the loosest of the rules, keeps for every
    n, f and d.
    """
    assert out.isfinite().all()
    size = 2.0 ** (math.frexp(float(honest.abs().max()))[1] - 1) if honest.any() else 1.0
    out, honest, rounding = (
        out.double() / size,
        honest.double() / size,
        max(1e-5, 8 * torch.finfo(honest.dtype).eps),
    )
    diameter = torch.cdist(honest, honest, compute_mode="donot_use_mm_for_euclid_dist").max()
    assert torch.linalg.vector_norm(out - honest.mean(0)) <= (1 + n**0.5) * diameter + rounding


@pytest.mark.parametrize("size", [1e-30, 1e20, 1e150])
@each(RULES)
def test_rows_of_any_size_have_a_result(case, size):
    """Whatever lengths its settings are meant for."""
    assert set_up(case)(rows_for(N, D) * size).isfinite().all()


@each(ROBUST_RULES)
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_f_rows_of_junk_leave_the_result_near_the_honest_rows(case, junk, dtype):
    f = case.rule.most_f(N)
    honest = rows_for(N - f, D, mean=5.0, dtype=dtype)
    bad = JUNK[junk](f, D, dtype)
    for x in (
        torch.cat([bad, honest]),
        torch.cat([honest, bad]),
        torch.cat([honest[:2], bad, honest[2:]]),
    ):
        assert_near_the_honest(case.rule.with_f(f)(x), honest, N)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def any_number(dtype):
    """Every finite number of a dtype, about as often of one size as of another, and ordinary
    ones.
    """
    largest = torch.finfo(dtype).max
    low, high = math.frexp(torch.finfo(dtype).tiny)[1], math.frexp(largest)[1]
    of_a_size = st.builds(
        lambda sign, part, power: sign * math.ldexp(part, power),
        SIGN,
        st.floats(0.5, 0.99),
        st.integers(low, high),
    )
    return st.one_of(st.sampled_from([0.0, largest, -largest]), of_a_size, st.floats(-10, 10))


SIGN = st.sampled_from([-1.0, 1.0])


@laws
@given(st.data())
def test_cge_is_never_longer_than_the_longest_honest_row(data):
    n = data.draw(st.integers(5, 14))
    f, d = data.draw(st.integers(1, (n - 1) // 2)), data.draw(st.integers(1, 8))
    honest = rows_for(n - f, d, data.draw(st.integers(0, 10**6)), mean=3.0)
    rows = st.lists(any_number(torch.float64), min_size=d, max_size=d)
    bad = torch.tensor(data.draw(st.lists(rows, min_size=f, max_size=f)), dtype=torch.float64)
    longest = torch.linalg.vector_norm(honest, dim=1).max()
    assert torch.linalg.vector_norm(CGE(f=f)(torch.cat([bad, honest]))) <= longest * (1 + 1e-9)


# CGE leaves out the longest rows, and so never one of zeros: it is near honest rows that are
# spread around 0 only.
@each([case for case in ROBUST_RULES if not isinstance(case.rule, CGE)])
@laws
@given(st.data())
def test_f_arbitrary_rows_leave_the_result_near_the_honest_rows(case, data):
    """Whatever finite numbers they hold; and honest rows may be of any size, where a rule scales
    with them.
    """
    dtype = data.draw(st.sampled_from(DTYPES))
    n = data.draw(st.integers(5, 14).filter(lambda n: case.rule.most_f(n) >= 1))
    f = data.draw(st.integers(1, case.rule.most_f(n)))
    d = data.draw(st.integers(1, 8))
    honest = rows_for(n - f, d, data.draw(st.integers(0, 10**6)), mean=3.0)
    if case.scale_equivariant:
        info = torch.finfo(dtype)
        highest = math.frexp(info.max)[1] - math.frexp(float(honest.abs().max()))[1]
        honest *= 2.0 ** data.draw(
            st.one_of(
                st.just(0), st.integers(math.frexp(info.tiny)[1] // 2, highest), st.just(highest)
            )
        )
    honest = honest.to(dtype)
    rows = st.lists(any_number(dtype), min_size=d, max_size=d)
    bad = torch.tensor(data.draw(st.lists(rows, min_size=f, max_size=f)), dtype=torch.float64).to(
        dtype
    )
    order = torch.randperm(
        n, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    )
    assert_near_the_honest(case.rule.with_f(f)(torch.cat([honest, bad])[order]), honest, n)


@each([case for case in ROBUST_RULES if not isinstance(case.rule, WeightedAggregator)])
def test_far_junk_stays_out_of_every_coordinates_honest_range(case):
    rule = set_up(case)
    honest = rows_for(N - rule.f, D)
    out = rule(torch.cat([honest, torch.full((rule.f, D), 1e30, dtype=torch.float64)]))
    assert (out >= honest.min(0).values - 1e-9).all()
    assert (out <= honest.max(0).values + 1e-9).all()


@each(RULES)
@pytest.mark.parametrize(("mean", "scale"), [(1e3, 1e-2), (-1e4, 1.0), (1.0, 1e-5)])
def test_nearly_equal_float32_rows_agree_with_float64(case, mean, scale):
    """Decisions are the same, and values are right to a few units in the last place of the common
    mean.
    """
    x = rows_for(N, 40, mean=mean, scale=scale, dtype=torch.float32)
    expected = torch.tensor(case.oracle(x.double().tolist(), set_up(case).f), dtype=torch.float64)
    assert (set_up(case)(x).double() - expected).abs().max() <= 8 * torch.finfo(
        torch.float32
    ).eps * abs(mean)


# -- how many rows, and which ----------------------------------------------------------------------


@each(ROBUST_RULES)
@pytest.mark.parametrize("n", [2, 4, 10])
def test_n_equal_to_2f_is_refused(case, n):
    with pytest.raises(
        TooFewRowsError, match=rf"with f={n // 2} cannot take n={n} rows: .* tolerates at most f="
    ):
        case.rule.with_f(n // 2)(rows_for(n, D))


@each(RULES)
def test_no_rows_are_refused(case):
    with pytest.raises(TooFewRowsError):
        case.rule.with_f(0)(torch.empty(0, D))


@each(ROBUST_RULES)
@pytest.mark.parametrize("n", range(1, 16))
def test_the_largest_f_is_taken_and_one_more_is_refused_with_advice_that_works(case, n):
    most = case.rule.most_f(n)
    assert 2 * most < n
    if most >= 0:
        case.rule.with_f(most)(rows_for(n, D))
    with pytest.raises(TooFewRowsError, match=r"at least \d+ rows") as error:
        case.rule.with_f(max(most, -1) + 1)(rows_for(n, D))
    enough = int(str(error.value).split("at least ")[1].split()[0])
    case.rule.with_f(max(most, -1) + 1)(rows_for(enough, D))


@pytest.mark.parametrize(
    ("rule", "n", "most"),
    [
        (CoordinateMedian(), 5, 2),
        (TrimmedMean(), 6, 2),
        (Krum(), 6, 1),
        (Krum(), 7, 2),
        (MultiKrum(), 7, 2),
        (MultiKrum(m=4), 8, 2),
    ],
)
def test_the_largest_f_of_the_literature(rule, n, most):
    assert rule.most_f(n) == most


@pytest.mark.parametrize("f", [-1, 1.0, True, "2"])
def test_f_is_a_non_negative_integer(f):
    with pytest.raises(ValueError, match="non-negative integer"):
        CoordinateMedian(f=f)


@pytest.mark.parametrize(
    "rule", [CoordinateMedian(), Krum(), Chain(pre=(NNM(),), rule=TrimmedMean())]
)
def test_an_unknown_f_is_refused(rule):
    with pytest.raises(ValueError, match="needs to know f"):
        rule(rows_for(5, D))


@each(RULES)
def test_absent_rows_are_as_if_they_were_not_there(case):
    x = rows_for(N, D)
    present = torch.ones(N, dtype=torch.bool)
    present[[1, 6]] = False
    rule = set_up(case, f=min(2, case.rule.most_f(N - 2)))
    expected = rule(x[present])
    assert torch.equal(rule(x, present), expected)
    x[~present] = torch.nan  # they are never read
    assert torch.equal(rule(x, present), expected)
    assert torch.equal(rule(x), expected)  # and found to be silent where nobody says so
    assert torch.equal(rule(Rows(x)), expected)


@each(ROBUST_RULES)
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n", range(3, 14))
def test_nobody_can_stop_the_training_by_sending_nan(case, n, junk):
    """However many of the f send nan, the rule answers, and the rest of the f may still lie."""
    f = case.rule.most_f(n)
    if f < 1:
        return
    honest = rows_for(n - f, D, mean=5.0)
    for silent in range(f + 1):
        bad = torch.full((f, D), 1e30, dtype=torch.float64)
        bad[:silent, 3] = junk
        assert_near_the_honest(case.rule.with_f(f)(torch.cat([bad, honest])), honest, n)


@dataclasses.dataclass(frozen=True)
class Spy(CoordinateMedian):
    """A rule that needs n >= 2f + 3 and tells which f it ran with."""

    def most_f(self, n):
        return (n - 3) // 2

    def aggregate(self, rows):
        return torch.full_like(rows.values[0], 100 * self.f + len(rows))


@pytest.mark.parametrize(
    ("n", "f", "silent", "f_used"),
    [
        (7, 2, 0, 2),
        (7, 2, 1, 1),
        (7, 2, 2, 1),
        (9, 2, 2, 2),
        (11, 2, 3, 2),
        (9, 3, 1, 2),
        (9, 3, 3, 1),
    ],
)
def test_f_shrinks_with_silence_by_as_little_as_the_rule_needs(n, f, silent, f_used):
    x = rows_for(n, D)
    x[:silent] = torch.nan
    assert Spy(f=f)(x).tolist() == [100 * f_used + n - silent] * D


@pytest.mark.parametrize(
    ("n", "f", "silent", "exposed", "f_used"),
    [
        (5, 1, 1, 1, 0),
        (7, 2, 1, 1, 1),
        (9, 3, 3, 2, 1),
        (9, 2, 3, 1, 1),
        (9, 2, 2, 0, 2),
        (13, 2, 4, 3, 2),
    ],
)
def test_who_sends_what_no_honest_worker_can_is_a_liar_that_is_gone(n, f, silent, exposed, f_used):
    """More than f of them, and nothing is as f says: then it does not shrink."""
    x = rows_for(n, D)
    x[:silent] = torch.nan
    rows = Rows(x, exposed=torch.arange(n) < exposed)
    assert Spy(f=f)(rows).tolist() == [100 * f_used + n - silent] * D


@pytest.mark.parametrize(("n", "f", "silent"), [(9, 2, 3), (9, 3, 4), (9, 3, 6), (10, 3, 9)])
def test_more_silence_than_f_leaves_all_liars_speaking(n, f, silent):
    """Honest workers are silent then, so f does not shrink: else f liars and a few honest rows
    would be taken for honest.
    """
    x = rows_for(n, D)
    x[:silent] = torch.nan
    with pytest.raises(TooFewRowsError, match=f"heard {n - silent} of n={n}"):
        Spy(f=f)(x)
    x[-f:] = 1e6  # ten workers of which three lie, and six honest ones have no batch
    with pytest.raises(TooFewRowsError):
        TrimmedMean(f=f)(
            torch.cat([x[: n - f], x[-f:]]).index_fill(0, torch.arange(n - f - 1), torch.nan)
        )


def test_the_step_is_refused_where_silence_leaves_too_few_rows():
    x = rows_for(7, D)
    x[:5] = torch.nan
    with pytest.raises(TooFewRowsError, match="heard 2 of n=7 rows"):
        Krum(f=2)(x)
    with pytest.raises(TooFewRowsError, match="heard 0 of n=7"):
        CoordinateMedian(f=2)(torch.full_like(x, torch.nan))


@pytest.mark.parametrize("f", [0, 1, 4])
def test_a_mean_never_claims_to_tolerate_anybody(f):
    assert Mean().with_f(f).f == 0
    assert Mean(f=None).f == 0  # as a configuration leaves it that puts it in another rule's place
    assert Mean().most_f(9) == 0


# -- chains ----------------------------------------------------------------------------------------


def test_a_chain_has_one_f():
    assert Chain(pre=(NNM(),), rule=TrimmedMean(), f=2) == Chain(
        pre=(NNM(f=2),), rule=TrimmedMean(f=2)
    )
    assert Chain(pre=[NNM()], rule=Krum(f=1)).pre == (NNM(f=1),)
    assert Chain(pre=(NNM(f=1),), rule=Krum(f=1)).with_f(3) == Chain(
        pre=(NNM(f=3),), rule=Krum(f=3), f=3
    )
    with pytest.raises(ValueError, match=r"same f.*\[1, 2\]"):
        Chain(pre=(NNM(f=1),), rule=TrimmedMean(f=2))


@pytest.mark.parametrize(
    "arguments",
    [{"pre": (NNM(),)}, {"pre": (Krum(),), "rule": Krum()}, {"pre": (NNM(),), "rule": NNM()}],
)
def test_a_chain_of_other_things_is_refused(arguments):
    with pytest.raises(ValueError, match="pre-aggregators and one aggregator"):
        Chain(**arguments)


def test_a_chain_that_is_not_robust_does_not_claim_to_be():
    """NNM gives a Byzantine row back as a mixture of itself and others, and a mean takes all of
    it.
    """
    x = torch.cat([rows_for(8, D), torch.full((2, D), 1e30, dtype=torch.float64)])
    with pytest.raises(TooFewRowsError, match="at most f=0"):
        Chain(pre=(NNM(f=2),), rule=Mean())(x)

    class Clip(NNM):
        bounds_rows = True

    assert Chain(pre=(Clip(f=2),), rule=Mean()).most_f(10) == 4
    assert Chain(rule=Mean()).f == Chain(rule=Mean()).most_f(10) == 0


# -- slices and threads ----------------------------------------------------------------------------


def on_slices(rule, x, bounds, present=None):
    """What ranks that hold a slice of the columns each make of a rule, side by side; every rank is
    a thread.
    """
    ranks = len(bounds) - 1
    barrier, box, out, errors = (
        threading.Barrier(ranks, timeout=20),
        [None] * ranks,
        [None] * ranks,
        [],
    )

    def rank_main(rank):
        def meet(tensor, answer):
            box[rank] = tensor.clone()
            barrier.wait()
            result = answer()
            barrier.wait()
            return result

        try:
            rows = Rows(
                x[:, bounds[rank] : bounds[rank + 1]],
                total=lambda t: meet(t, lambda: torch.stack(box).sum(0)),
                agree=lambda t: meet(t, lambda: box[0].clone()),
                spans=((bounds[rank], bounds[rank + 1]),),
                dim=bounds[-1],
            )
            out[rank] = rule(rows, present)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next(
            (error for error in errors if not isinstance(error, threading.BrokenBarrierError)),
            errors[0],
        )
    return torch.cat(out)


@each(RULES)
def test_in_pieces_it_gives_the_same(case):
    """Wherever its columns lie, and rows that are silent left out."""
    x = rows_for(11, 90, seed=3)
    x[4, 50] = torch.nan
    rule = (
        case.rule.with_f(min(2, case.rule.most_f(10))) if case.rule.most_f(11) >= 0 else case.rule
    )
    present = torch.arange(11) != 4
    spans = ((0, 32), (64, 64), (96, 154))
    rows = Rows(x, spans=spans, dim=160)
    facing, speaking = rule.facing(rows, present)
    pieces = list(facing.in_pieces(speaking))
    assert [len(piece) for piece in pieces] == [32, 0, 58]
    torch.testing.assert_close(torch.cat(pieces), rule(rows, present))
    if rule.coordinate_wise:
        torch.testing.assert_close(pieces[2], rule(x[:, 32:], present), rtol=0, atol=0)


@each(RULES)
@pytest.mark.parametrize("bounds", [(0, 40), (0, 1, 40), (0, 13, 26, 40), (0, 20, 20, 40)], ids=str)
@pytest.mark.parametrize("bad", ["none", "1e30", "nan in one slice"])
def test_slices_of_the_columns_give_what_the_whole_rows_give(case, bounds, bad):
    x = rows_for(N, 40, mean=10.0, dtype=torch.float32)
    if bad == "1e30":
        x[2] = 1e30
    elif bad == "nan in one slice":
        x[2, 5] = torch.nan
    rule = set_up(case)
    whole = rule(x)
    close(on_slices(rule, x, bounds), whole, 1e-6)
    if bad == "nan in one slice":
        present = torch.arange(N) != 2
        close(on_slices(rule, x, bounds, present), whole, 1e-6)


@each(RULES)
def test_blocks_of_columns_change_nothing(case, monkeypatch):
    x = rows_for(N, 40, mean=10.0, dtype=torch.float32)
    whole = set_up(case)(x)
    for name, columns in (("_BLOCK", 7), ("_NARROW", 3), ("_WIDE", 9)):
        monkeypatch.setattr(rows_module, name, columns)
    close(set_up(case)(x), whole, 1e-6)
    x[4, 2] = torch.nan
    close(set_up(case)(x), set_up(case)(x, torch.arange(N) != 4), 1e-6)


@each(RULES)
def test_the_number_of_threads_changes_no_bit(case):
    x = rows_for(N, 100_000, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(set_up(case)(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_oracles_agree_with_values_from_the_literature():
    x = [[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert oracles.trimmed_mean(x, 1) == oracles.median(x, 1) == oracles.mean(x, 0) == [4, 5, 6]


# -- numbers whose squares are no float64 ----------------------------------------------------------


@pytest.mark.parametrize("size", [1e77, 1e100, 1e154, 1e200, 1e300])
@each([case for case in ROBUST_RULES if case.rule.most_f(N) >= F and case.scale_equivariant])
def test_float64_rows_whose_squares_overflow_hurt_nobody(case, size):
    honest = rows_for(N - F, D)
    # also one that is large only beside the honest ones
    for sizes in ([size, -size, 0.5 * size], [1e10, size, -size]):
        bad = torch.tensor(sizes, dtype=torch.float64)[:, None].expand(F, D)
        out = case.rule.with_f(F)(torch.cat([bad[:1], honest, bad[1:]]))
        assert torch.isfinite(out).all()
        assert (out - honest.mean(0)).abs().max() < 20


@each([case for case in RULES if case.scale_equivariant])
@pytest.mark.parametrize("power", [-1000, -600, -300, 300, 600, 1015])
def test_scale_equivariance_over_all_of_float64(case, power):
    x, factor = rows_for(N, D), 2.0**power
    close(set_up(case)(factor * x) / factor, set_up(case)(x), 1e-12)


def in_lengths(unit):
    """Rules with a length in the rows' units, and what it is for rows in units of ``unit``."""
    clipped = Chain(pre=(StaticClipping(c=2.0 * unit),), rule=CoordinateMedian(), f=F)
    settings = [
        clipped,
        CenteredClip(f=F, tau=unit),
        CenteredClip(f=F, tau=unit, iterations=3, start="median"),
    ]
    return [*settings, GeometricMedian(f=F, nu=0.5 * unit), AutoGM(f=F, regularization=3.0 * unit)]


@pytest.mark.parametrize("power", [-900, -300, 300, 900])
def test_lengths_are_in_the_rows_units_over_all_of_float64(power):
    x, unit = rows_for(N, D), 2.0**power
    for rule, scaled in zip(in_lengths(1.0), in_lengths(unit), strict=True):
        close(scaled(unit * x) / unit, rule(x), 1e-9)


@pytest.mark.parametrize("rule", in_lengths(1.0), ids=repr)
def test_a_length_bounds_rows_whose_squares_overflow(rule):
    """What they may do is as large as the length says, or as the honest rows are."""
    x = torch.cat(
        [
            rows_for(N - F, D),
            torch.tensor([[1e300], [-1e200], [1e160]], dtype=torch.float64).expand(F, D),
        ]
    )
    assert rule(x).abs().max() < 20


@each([case for case in RULES if case.unanimous])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_sum_of_rows_near_the_largest_number_overflows(case, dtype):
    row = torch.tensor([1.0, -1.0, 0.25], dtype=torch.float64) * 0.99 * torch.finfo(dtype).max
    out = set_up(case)(row.to(dtype).repeat(N, 1))
    torch.testing.assert_close(out, row.to(dtype), rtol=8 * torch.finfo(dtype).eps, atol=0)


@each(RULES)
def test_slices_of_rows_whose_squares_overflow_give_what_the_whole_rows_give(case):
    x = rows_for(N, 40, mean=10.0)
    x[2], x[5], x[7, 30] = 1e200, 0.0, -1e300
    rule = set_up(case, f=2)
    close(on_slices(rule, x, (0, 13, 26, 40)), rule(x), 1e-6)


@pytest.mark.parametrize("columns", [1, 40])
def test_norms_are_right_whatever_their_squares_are(columns):
    """Each row's own, beside rows of any other size; of mixed and of selected ones, too."""
    sizes = torch.tensor([1e300, 1.0, 1e-300, 0.0, 1e160, 1e-170, -1e10], dtype=torch.float64)
    x = sizes[:, None] * rows_for(1, columns).abs()
    expected = torch.tensor([math.hypot(*row) for row in x.tolist()], dtype=torch.float64)
    rows, keep = Rows(x), torch.tensor([6, 0, 2])
    torch.testing.assert_close(rows.norms(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(rows.select(keep).norms(), expected[keep], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        rows.mix(torch.eye(7)[keep]).norms(), expected[keep], rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        torch.stack([rows.norm(row) for row in x]), expected, rtol=1e-12, atol=0
    )


@laws
@given(st.data())
def test_only_rows_far_larger_than_n_minus_f_others_are_shrunk(data):
    n = data.draw(st.integers(1, 9))
    f = data.draw(st.integers(0, (n - 1) // 2))
    x = (
        torch.tensor(
            [[data.draw(any_number(torch.float64))] for _ in range(n)], dtype=torch.float64
        )
        / 2
    )
    read = Rows(x).in_range(f)
    changed = (read.dense() != x).any(1)
    usual = x.abs().flatten().sort().values[n - 1 - f]
    assert int(changed.sum()) <= f or usual == 0
    assert (x[changed].abs() > 2.0**190 * usual).all()
    assert read.squared_norms().isfinite().all()
    assert read.in_range(f) is read
    assert Rows(x.float()).in_range(f).unit == 1.0


def test_a_mean_weighs_no_row_by_more_than_it_may_where_shares_are_left():
    """Of any f rows that are left, too, the shares are to be less than half."""
    x, shares = (
        torch.tensor([[0.0], [1], [2], [3], [1e9]]),
        torch.tensor([1.0, 1, 1, 1, 3], dtype=torch.float64),
    )
    for rule in (CoordinateMedian(f=1), GeometricMedian(f=1), Chain(rule=CoordinateMedian(f=1))):
        assert rule(Rows(x, shares=shares)) < 10
        with pytest.raises(
            TooFewRowsError, match="heard 3 of n=5 rows, and for 3 rows of these shares"
        ):
            rule(Rows(x, shares=shares), torch.tensor([False, False, True, True, True]))


@laws
@given(st.data())
def test_f_liars_never_hold_half_of_the_data_that_is_left(data):
    """Unless so many rows are silent that they may be the liars themselves."""
    n = data.draw(st.integers(3, 9))
    shares = torch.tensor(
        [float(data.draw(st.integers(1, 6))) for _ in range(n)], dtype=torch.float64
    )
    present = torch.tensor([data.draw(st.booleans()) for _ in range(n)])
    f = data.draw(st.integers(1, (n - 1) // 2))
    rows, rule = Rows(rows_for(n, 2), shares=shares), CoordinateMedian(f=f)
    silent = int((~present).sum())
    try:
        used, left = rule.facing(rows, present)
    except ValueError:
        return
    largest = shares[present].sort(descending=True).values[: used.f]
    assert 2 * largest.sum() < shares[present].sum() or used.f == 0
    assert used.f >= (f - silent if silent <= f else f)
    assert torch.equal(left.shares, shares[present])


# -- rules of one's own that are wrong -------------------------------------------------------------


def with_weights(make):
    @dataclasses.dataclass(frozen=True)
    class Own(WeightedAggregator):
        def weights(self, rows):
            return make(len(rows))

    return Own(f=1)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda n: torch.ones(n - 1) / (n - 1), r"shape \[4\]"),
        (lambda n: torch.ones(n, 1) / n, r"shape \[5, 1\]"),
        (lambda n: torch.ones(n), "whose sum is 5"),
        (lambda n: torch.zeros(n), "whose sum is 0"),
        (lambda n: torch.full((n,), torch.nan), "whose sum is nan"),
        (lambda n: torch.tensor([torch.inf, -torch.inf, 1, 0, 0]), "whose sum is nan"),
        (lambda n: torch.tensor([2.0, -1, 0, 0, 0]), "2.0, -1.0"),
        (lambda n: [1.0] * n, "1.0, 1.0"),
    ],
)
def test_weights_that_are_none_are_an_error_by_the_rules_name(make, found):
    rule = with_weights(make)
    for aggregate in (
        rule,
        lambda x: list(rule.in_pieces(Rows(x))),
        Chain(pre=(NNM(),), rule=rule),
    ):
        with pytest.raises(
            ValueError,
            match=f"`weights` of Own should be a tensor .5. of numbers >= 0.*Found.*{found}",
        ):
            aggregate(rows_for(5, D))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_weights_may_be_rounded(dtype):
    x = rows_for(7, D)
    close(with_weights(lambda n: torch.full((n,), 1 / n, dtype=dtype))(x), x.mean(0), 1e-3)


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (torch.zeros(D - 1).double(), r"\[12\]"),
        (torch.zeros(D), "torch.float32"),
        (torch.zeros(1, D).double(), r"\[1, 13\]"),
        (None, "None"),
    ],
)
def test_a_result_that_is_no_vector_of_the_rows_is_an_error_by_the_rules_name(result, found):
    @dataclasses.dataclass(frozen=True)
    class Own(CoordinateMedian):
        def aggregate(self, rows):
            return result

    with pytest.raises(
        ValueError,
        match=f"`aggregate` of Own should give a vector.*\\[13\\] of torch.float64. Found.*{found}",
    ):
        Own(f=1)(rows_for(5, D))


def test_a_rule_that_is_no_dataclass_is_an_error_by_its_name():
    class Own(CoordinateMedian):
        def __init__(self, strength):
            super().__init__(f=1)

    with pytest.raises(TypeError, match="Own should be a dataclass"):
        Own(3).with_f(2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Chain(pre=NNM(), rule=Krum()),
        lambda: Chain(NNM(), Krum()),
        lambda: Chain(NNM(f=1), rule=Krum()),
    ],
)
def test_a_chain_whose_parts_are_in_the_wrong_place_is_refused(make):
    with pytest.raises(ValueError, match="a tuple of pre-aggregators and one aggregator, by name"):
        make()


def test_an_m_that_is_too_large_is_named():
    with pytest.raises(
        TooFewRowsError,
        match=r"`m`.* at most n - f - 2 = 4 for n=7 rows and f=1. Found m=6. .* at least 9 rows",
    ):
        MultiKrum(f=1, m=6)(rows_for(7, D))
    with pytest.raises(
        TooFewRowsError,
        match=r"at most n - f = 6 for n=7 rows and f=1. Found m=7. .* at least 8 rows",
    ):
        MultiKrum(f=1, m=7, definition="byzfl")(rows_for(7, D))


@pytest.mark.parametrize("spans", [((0, 9),), ((6, 9), (2, 4))], ids=["whole", "shares"])
def test_clipping_by_tensor_clips_each_to_the_median_of_its_own_norms(spans):
    """Tensors of 1, 4, 0 and 4 numbers; in shares each rank has some columns of all rows."""
    sizes, x = (1, 4, 0, 4), torch.randn(5, 9, dtype=torch.float64)
    x[0], x[3, :5] = x[0] * 50, 0.0
    bounds = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
    expected = torch.cat(
        [
            torch.tensor(
                oracles.clipped_to(oracles.lower_median_norm)(x[:, a:b].tolist(), 2),
                dtype=torch.float64,
            ).view(5, b - a)
            for a, b in bounds
        ],
        1,
    )
    here = torch.cat([torch.arange(first, last) for first, last in spans])
    elsewhere = torch.tensor([i for i in range(9) if i not in here.tolist()], dtype=torch.int64)
    others = torch.stack(
        [
            sum(
                (x[:, i].square() for i in elsewhere.tolist() if a <= i < b),
                torch.zeros(5, dtype=torch.float64),
            )
            for a, b in bounds
        ],
        1,
    )

    def total(sums: torch.Tensor) -> torch.Tensor:
        return sums + others if sums.shape == others.shape else sums

    rows = Rows(x[:, here].clone(), spans=spans, dim=9, total=total)
    clipped = MedianNormClipping(by_tensor=True, f=2, sizes=sizes)(rows).dense()
    torch.testing.assert_close(clipped, expected[:, here])
    assert torch.equal(rows.values, x[:, here])


def test_clipping_by_tensor_learns_the_tensors_from_the_strategy():
    rule = Chain(pre=(MedianNormClipping(by_tensor=True),), rule=Mean(), f=1)
    with pytest.raises(ValueError, match="`sizes` should be"):
        rule(torch.randn(4, 6))
    known = RobustSGD(aggregator=rule).for_sizes([4, 2]).aggregator
    assert known.pre[0].sizes == (4, 2)
    assert known(torch.randn(4, 6)).shape == (6,)
    whole = Chain(pre=(MedianNormClipping(),), rule=Mean(), f=1)
    assert whole.for_sizes([4, 2]) == whole


def test_pre_aggregations_of_a_matrix_give_a_matrix():
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    mixed = torch.tensor([[2.5, 3.5, 4.5], [2.5, 3.5, 4.5], [5.5, 6.5, 7.5]])
    for rows in (x, x.numpy(), list(x)):
        torch.testing.assert_close(NNM(f=1)(rows), mixed)
    torch.testing.assert_close(NNM(f=1)(Rows(x)).dense(), mixed)
    torch.testing.assert_close(
        torch.linalg.vector_norm(StaticClipping(c=2.0)(x), dim=1), torch.full((3,), 2.0)
    )
    whole = StaticClipping(c=100.0)(x)
    whole.fill_(7)
    assert x[0, 0] == 1
    with pytest.raises(ValueError, match="NNM needs to know f"):
        NNM()(x)
    with pytest.raises(TooFewRowsError, match="at most f=1"):
        NNM(f=2)(x)
    far = torch.cat([x.double(), torch.full((2, 3), 1e300, dtype=torch.float64)])
    torch.testing.assert_close(NNM(f=2)(far)[:3], x.double().mean(0).expand(3, -1))


@each(RULES)
@pytest.mark.parametrize(
    "present",
    [torch.ones(3, dtype=torch.bool), torch.ones(9), [True] * 9],
    ids=["of too few", "numbers", "a list"],
)
def test_who_counts_is_said_of_every_row(case, present):
    """Else others would be left out than those that were meant."""
    with pytest.raises(ValueError, match=r"`present` should say of each row.*\[9\]"):
        case.rule.with_f(1)(rows_for(9, 20), present)
