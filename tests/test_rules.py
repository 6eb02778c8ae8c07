"""What single rules promise beyond the laws."""

import dataclasses
import itertools
import math
import time

import oracles
import pytest
import torch
from harness import apart
from hypothesis import given
from hypothesis import strategies as st
from zoo import laws, rows_for

from lightning_byz.aggregators import (
    CAF,
    MDA,
    NNM,
    SMEA,
    AutoGM,
    Bulyan,
    ByHeterogeneity,
    CenteredClip,
    Chain,
    CoordinateMedian,
    DnC,
    GeometricMedian,
    Krum,
    MajorityVote,
    Mean,
    MoNNA,
    MultiKrum,
    SignGuard,
    SpectralFilter,
    TooFewRowsError,
    TrimmedMean,
)
from lightning_byz.aggregators.sign_guard import largest_cluster
from lightning_byz.attacks import IPM
from lightning_byz.numerics import rows as rows_module
from lightning_byz.numerics.order_statistics import ColumnStatistic
from lightning_byz.numerics.rows import Rows


def honest_and(bad, n=11, d=13, **kwargs):
    return torch.cat([rows_for(n - len(bad), d, **kwargs), bad])


# -- definitions by name ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "n", "most"),
    [
        (Krum(definition="byzfl"), 7, 3),
        (Krum(definition="byzantine_momentum"), 7, 2),
        (MultiKrum(definition="byzfl"), 7, 3),
        (MultiKrum(definition="signsgd"), 7, 2),
        (Bulyan(), 11, 2),
        (Bulyan(), 10, 1),
    ],
)
def test_every_definition_has_its_own_largest_f(rule, n, most):
    assert rule.most_f(n) == most


def test_definitions_of_krum_differ_where_they_should():
    names = ("blanchard2017", "byzfl", "byzantine_momentum", "vr_byzantine")
    far = torch.tensor([[0.0], [2.0], [4.1], [10.0], [10.5], [13.4], [14.0]], dtype=torch.float64)
    chosen = {name: Krum(f=2, definition=name)(far).item() for name in names}
    assert len(set(chosen.values())) > 1, chosen


@pytest.mark.parametrize("rule", [Krum, MultiKrum, GeometricMedian])
def test_an_unknown_definition_is_refused_with_the_known_ones(rule):
    with pytest.raises(ValueError, match="should be one of .*byzfl.* Found 'blanchard'"):
        rule(definition="blanchard")


def test_the_geometric_medians_definitions_are_settings():
    x = honest_and(torch.full((2, 13), 30.0, dtype=torch.float64))
    named = GeometricMedian(f=2, definition="byzfl")
    assert torch.equal(named(x), GeometricMedian(f=2, iterations=3, nu=0.1, start="zero")(x))
    assert named.with_f(1) == GeometricMedian(f=1, definition="byzfl")
    with pytest.raises(ValueError, match="either the definition or the three settings"):
        GeometricMedian(definition="byzfl", iterations=5)


def test_the_lower_median_is_torchs():
    for n in (4, 5, 8):
        x = rows_for(n, 13)
        assert torch.equal(CoordinateMedian(f=1, middle="lower")(x), x.median(0).values)
    with pytest.raises(ValueError, match="'mean' or 'lower'"):
        CoordinateMedian(middle="upper")


# -- searches over subsets -------------------------------------------------------------------------


@laws
@given(st.data())
def test_mda_and_bulyan_do_not_depend_on_the_order_of_rows_that_tie(data):
    """Small integers: many distances are equal. The answer may be any of those that tie, but is the
    same for every order.
    """
    n = data.draw(st.integers(7, 9))
    x = torch.tensor(
        data.draw(
            st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=n, max_size=n)
        )
    ).double()
    kept = MDA(f=2).weights(Rows(x)).nonzero().flatten().tolist()
    diameter = {
        pair: oracles.squared_distance(x[pair[0]].tolist(), x[pair[1]].tolist())
        for pair in itertools.combinations(range(n), 2)
    }
    smallest = min(
        max(diameter[pair] for pair in itertools.combinations(s, 2))
        for s in itertools.combinations(range(n), n - 2)
    )
    assert len(kept) == n - 2
    assert max(diameter[pair] for pair in itertools.combinations(kept, 2)) == smallest


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("n", "f"), [(7, 1), (11, 2), (15, 3), (20, 4)])
def test_bulyan_does_not_depend_on_the_order_of_rows(n, f, seed):
    """Its last picks have one neighbour or none, where rows tie by definition."""
    x = rows_for(n, 5, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(Bulyan(f=f)(x[order]), Bulyan(f=f)(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "f"), [(30, 10), (50, 12), (50, 24)])
def test_mda_does_not_visit_every_subset(n, f):
    """binom(50, 24) is 1.2e14."""
    x = rows_for(n, 100)
    x[:f] += 30 * rows_for(1, 100, seed=5)
    start = time.monotonic()
    out = MDA(f=f)(x)
    assert time.monotonic() - start < 60
    torch.testing.assert_close(out, x[f:].mean(0))


def test_smea_refuses_more_than_a_million_subsets():
    assert math.comb(25, 7) < SMEA.most_subsets < math.comb(25, 8)
    assert SMEA().most_f(25) == 7
    with pytest.raises(ValueError, match=r"binom\(25, 8\) = 1,081,575.*f <= 7.*CAF"):
        SMEA(f=8)(rows_for(25, 3))
    with pytest.raises(TooFewRowsError, match="cannot take n=10"):
        SMEA(f=5)(rows_for(10, 3))
    assert [SMEA().most_f(n) for n in (0, 1, 2, 3)] == [-1, 0, 0, 1]


def test_mda_prefers_the_smaller_diameter_to_rows_that_are_nearer_on_the_whole():
    x = torch.tensor([[1.0, 1], [-6, 2], [-7, 5], [-6, 9], [1, 1], [4, 1]], dtype=torch.float64)
    torch.testing.assert_close(
        MDA(f=2)(x), torch.tensor(oracles.mda(x.tolist(), 2), dtype=torch.float64)
    )


def test_caf_gives_the_mean_of_smallest_variance_which_may_not_be_the_last():
    x = torch.tensor(
        [[-9.0, 4], [7, 2], [-1, -9], [-5, -6], [3, 0], [-1, 9], [-6, -8]], dtype=torch.float64
    )
    torch.testing.assert_close(
        CAF(f=3)(x), torch.tensor(oracles.caf(x.tolist(), 3), dtype=torch.float64)
    )


def test_caf_keeps_more_weight_than_a_search_drops():
    """Junk loses all of its weight, and honest rows keep most of theirs."""
    x = honest_and(torch.full((3, 13), 1e30, dtype=torch.float64))
    weights = CAF(f=3).weights(Rows(x))
    assert (weights[-3:] == 0).all()
    assert weights[:-3].max() <= 2 * weights[:-3].mean()


def test_caf_s_floor_takes_the_short_rows_out_of_the_noise():
    """Six equal lies of a tenth of the mean among fourteen rows of noise: as published, the filter
    ends on them.
    """
    generator = torch.Generator().manual_seed(0)
    mean = torch.nn.functional.normalize(torch.randn(2000, generator=generator), dim=0)
    honest = mean + 3 * torch.randn(14, 2000, generator=generator) / 2000**0.5
    x = torch.cat([honest, IPM(0.1)(honest, honest[:6])])
    assert float(CAF(f=6)(x) @ mean) < 0.7
    assert float(CAF(f=6, norm_floor=0.3)(x) @ mean) > 0.95
    assert (CAF(f=6, norm_floor=0.3).weights(Rows(x))[-6:] == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_caf_s_floor_leaves_the_mean_of_the_rest(seed):
    """Of four workers one sends a short lie: the filter does not go on until one honest row is
    left, whose variance is 0.
    """
    honest = 1 + torch.randn(3, 500, generator=torch.Generator().manual_seed(seed))
    x = torch.cat([honest, -0.1 * honest.mean(0, keepdim=True)])
    torch.testing.assert_close(CAF(f=1, norm_floor=0.3)(x), honest.mean(0))


def test_caf_s_floor_takes_f_rows_at_most_and_none_without_liars():
    x = torch.randn(9, 13, generator=torch.Generator().manual_seed(0)).double()
    x[:4] /= 100
    weights = CAF(f=2, norm_floor=0.5).weights(Rows(x))
    assert (weights[:4] == 0).sum() == 2
    assert torch.equal(CAF(f=0, norm_floor=0.5)(x), CAF(f=0)(x))
    torch.testing.assert_close(CAF(f=2, norm_floor=0.5)(1e3 * x), 1e3 * CAF(f=2, norm_floor=0.5)(x))
    with pytest.raises(ValueError, match="norm_floor=1"):
        CAF(norm_floor=1)


def groups(each: int, kinds: int, length: float = 1.0) -> torch.Tensor:
    """Rows of unlike workers: ``kinds`` groups of ``each``, every group in a direction of its own,
    with noise.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(kinds, 200, dtype=torch.float64).repeat_interleave(each, 0)
    noise = torch.randn(each * kinds, 200, generator=generator, dtype=torch.float64)
    return length * (directions + 0.1 * noise / 200**0.5)


def test_the_spectral_filter_takes_nothing_from_unlike_workers():
    """Seven kinds of data, nobody lies: every row counts."""
    x = groups(each=3, kinds=7)
    norms = x.norm(dim=1)
    clipped = x * (norms.median() / norms).clamp(max=1)[:, None]
    torch.testing.assert_close(SpectralFilter(f=6)(x), clipped.mean(0))


def test_the_spectral_filter_takes_weight_only_while_a_direction_holds_too_much():
    """Sixteen unlike rows and four equal lies, longer and longer: they count, clipped to the median
    norm; with less room for a direction only the short ones do.
    """
    honest = groups(each=1, kinds=16)
    lie = torch.zeros(4, 200, dtype=torch.float64)
    for length in (0.5, 0.9, 1.5, 50.0):
        lie[:, 100] = length
        rows = Rows(torch.cat([honest, lie]))
        assert bool((SpectralFilter(f=4).weights(rows)[-4:] > 0).all())
        assert float(SpectralFilter(f=4).aggregate(rows)[100]) <= 0.21
        trusted = SpectralFilter(f=4, share=0.05).weights(rows)[-4:] > 0
        assert bool(trusted.all() if length < 0.8 else (~trusted).all())


@pytest.mark.parametrize("f", [1, 3, 6])
def test_equal_lies_move_the_spectral_filter_by_no_more_than_it_says(f):
    n, share = 20, 0.15
    honest = torch.nn.functional.normalize(groups(each=1, kinds=n - f), dim=1)
    bound = (f * (1 + share * n)) ** 0.5 / n
    for length in 10.0 ** torch.linspace(-2, 3, 40):
        lie = torch.zeros(f, 200, dtype=torch.float64)
        lie[:, 100] = length
        moved = SpectralFilter(f=f, norm_floor=0.0)(torch.cat([honest, lie]))[100]
        assert float(moved) <= 1.05 * bound
        assert float(moved) <= 1.05 * f / n  # as they are clipped


def test_the_spectral_filter_tells_lies_from_like_workers():
    """Workers that agree leave little room: lies that turn the mean by a right angle count for
    nothing, whatever their length.
    """
    generator = torch.Generator().manual_seed(0)
    honest = 1 + 0.1 * torch.randn(8, 13, generator=generator, dtype=torch.float64)
    for length in (0.5, 1.0, 100.0):
        lie = torch.zeros(3, 13, dtype=torch.float64)
        lie[:, 0], lie[:, 1] = length, -length
        weights = SpectralFilter(f=3).weights(Rows(torch.cat([honest, lie])))
        assert float(weights[-3:].sum()) < 1e-9


def test_the_spectral_filter_s_floor_takes_f_rows_at_most_and_none_without_liars():
    generator = torch.Generator().manual_seed(0)
    mean = torch.nn.functional.normalize(torch.randn(2000, generator=generator), dim=0)
    honest = mean + 3 * torch.randn(14, 2000, generator=generator) / 2000**0.5
    x = torch.cat([honest, IPM(0.1)(honest, honest[:6])])
    assert (SpectralFilter(f=6).weights(Rows(x))[-6:] == 0).all()
    assert (SpectralFilter(f=6, norm_floor=0.0).weights(Rows(x))[-6:] > 0).all()
    x = torch.randn(9, 13, generator=generator).double()
    x[:4] /= 100
    assert int((SpectralFilter(f=2).weights(Rows(x))[:4] == 0).sum()) == 2
    torch.testing.assert_close(SpectralFilter(f=0)(x), x.mean(0))


def test_the_spectral_filter_does_not_take_all():
    """Two and two rows: all stand out alike, and none goes."""
    x = torch.tensor([[-4.0], [-4.0], [1.0], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(
        SpectralFilter(f=1).weights(Rows(x)), torch.tensor([1.0, 1, 4, 4], dtype=torch.float64) / 16
    )


def test_long_lies_cost_the_spectral_filter_no_digits():
    """It says of lies of any length what it says of those clipped to the median norm."""
    honest = groups(each=1, kinds=9)
    rule, clip = SpectralFilter(f=2, share=0.01), 1 + 1e-9
    lie = torch.zeros(2, 200, dtype=torch.float64)
    lie[:, 100], lie[:, 101] = 0.6, 0.8
    radius = torch.cat([honest, 2 * lie]).norm(dim=1).sort().values[5]
    expected = rule(torch.cat([honest, clip * radius * lie]))
    for length in (1e3, 1e9, 1e15, 1e30):
        found = rule(torch.cat([honest, length * lie]))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", [SpectralFilter, CAF])
def test_equal_lies_lose_their_weight_together(rule):
    """Rows on a line, those beyond the median clipped to it: what is rounded decides nothing."""
    moved = 0.0
    for seed in range(60):
        x = rows_for(11, 1, seed=seed, scale=10.0)
        x[-4:] = -20.0 - seed / 7
        found = [rule(f=4)(x * (1 + k * 2.0**-50)) for k in range(8)]
        moved = max(moved, *(float((a - found[0]).abs()) for a in found))
        weights = rule(f=4).weights(Rows(x))[-4:]
        assert float(weights.max() - weights.min()) < 1e-12
    assert moved < 1e-9


@pytest.mark.parametrize("option", [{"share": 0.0}, {"share": 1.0}, {"norm_floor": 1.0}])
def test_what_a_spectral_filter_refuses(option):
    with pytest.raises(ValueError, match="Found"):
        SpectralFilter(**option)


# -- by how unlike data are ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unlike", "part"),
    [(None, 1.0), (0.0, 0.0), (0.25, 0.0), (0.3, 0.25), (0.35, 0.5), (0.45, 1.0), (1.0, 1.0)],
)
def test_the_default_s_rule_passes_from_one_rule_to_the_other(unlike, part):
    """Four liars of ever other lengths among unlike rows, which the two rules take otherwise."""
    honest, apart = groups(each=1, kinds=16), []
    for length in (0.1, 0.9, 1.5, 50.0):
        lie = torch.zeros(4, 200, dtype=torch.float64)
        lie[:, 100] = length
        rows = Rows(torch.cat([honest, lie]), unlike=unlike)
        alike, differing = CAF(f=4, norm_floor=0.3)(rows), SpectralFilter(f=4)(rows)
        apart.append(float((alike - differing).norm()))
        expected = part * differing + (1 - part) * alike
        torch.testing.assert_close(ByHeterogeneity(f=4)(rows), expected)
        torch.testing.assert_close(
            ByHeterogeneity(f=4).weights(rows),
            part * SpectralFilter(f=4).weights(rows)
            + (1 - part) * CAF(f=4, norm_floor=0.3).weights(rows),
        )
    assert min(apart) > 1e-3


def test_the_default_s_rule_takes_other_rules_and_bounds():
    x = rows_for(9, 20, seed=1)
    rule = ByHeterogeneity(alike=Krum(), unlike=MultiKrum(f=2), low=0.5, high=0.6)
    assert (rule.f, rule.alike.f, rule.with_f(3).unlike.f) == (2, 2, 3)
    assert rule.most_f(9) == min(Krum(f=0).most_f(9), MultiKrum(f=0).most_f(9))
    assert not rule.bears_unlike_data
    assert torch.equal(rule(Rows(x, unlike=0.5)), Krum(f=2)(x))
    assert torch.equal(rule(Rows(x, unlike=0.6)), MultiKrum(f=2)(x))


def test_a_choice_of_rules_is_refused_where_one_of_them_is():
    with pytest.raises(ValueError, match="index of one of n=7 workers. Found 9"):
        ByHeterogeneity(f=2, alike=MoNNA(trusted=9)).check(7)


@pytest.mark.parametrize(
    "option",
    [
        {"alike": CoordinateMedian()},
        {"unlike": CenteredClip(tau=1.0)},
        {"low": -0.1},
        {"low": 0.5},
        {"high": 1.1},
        {"f": 1, "alike": CAF(f=2)},
    ],
)
def test_what_a_choice_of_rules_refuses(option):
    with pytest.raises(ValueError, match="Found"):
        ByHeterogeneity(**option)


# -- rules that sample -----------------------------------------------------------------------------


def test_dnc_draws_its_coordinates_from_the_rounds_stream():
    x = rows_for(11, 1000)
    x[:3, :40] += 6.0  # seen where enough of these coordinates are drawn

    def rule(seed, **kwargs):
        rows = Rows(x, generator=torch.Generator().manual_seed(seed))
        return DnC(f=3, **kwargs).weights(rows)

    assert torch.equal(rule(1, coordinates=20), rule(1, coordinates=20))
    assert len({tuple(rule(seed, coordinates=20).tolist()) for seed in range(8)}) > 1
    assert (rule(0, coordinates=1000)[:3] == 0).all()
    assert (rule(0, coordinates=300, iterations=5)[:3] == 0).all()
    # the intersection of five sets of 8
    assert int((rule(0, coordinates=20, iterations=5) > 0).sum()) <= 8


@pytest.mark.parametrize(
    "rule",
    [
        DnC(f=3, coordinates=10),
        DnC(f=3, coordinates=30, iterations=3),
        SignGuard(f=3),
        MajorityVote(f=3, tie="random"),
    ],
)
def test_slices_draw_what_the_whole_draws(rule):
    from test_aggregators import on_slices

    x = rows_for(10, 100, mean=0.3)
    torch.testing.assert_close(on_slices(rule, x, (0, 37, 64, 100)), rule(x))


@pytest.mark.parametrize("arguments", [{"coordinates": 0}, {"iterations": 0}, {"c": 0.0}])
def test_dnc_refuses_what_makes_no_sense(arguments):
    with pytest.raises(ValueError, match="should be positive"):
        DnC(**arguments)


@pytest.mark.parametrize("seed", range(30))
def test_clusters_are_scikit_learns(seed):
    sklearn_cluster = pytest.importorskip("sklearn.cluster")
    n = 6 + seed % 9
    points = rows_for(n, 3, seed, mean=0.0) + 4.0 * (torch.arange(n) % 3 == 0)[:, None]
    found = largest_cluster(points)
    bandwidth = sklearn_cluster.estimate_bandwidth(points.numpy(), quantile=0.5)
    labels = torch.tensor(
        sklearn_cluster.MeanShift(bandwidth=bandwidth).fit(points.numpy()).labels_
    ).long()
    counts = torch.bincount(labels)
    if int((counts == counts.max()).sum()) == 1:
        assert torch.equal(found, labels == counts.argmax())


def test_sign_guard_drops_flipped_and_huge_rows():
    x = rows_for(12, 2000, mean=1.0, scale=0.3)
    bad = torch.cat([-x[:2], 50 * x[2:4]])
    weights = SignGuard(f=4).weights(Rows(torch.cat([x[4:], bad])))
    assert (weights[-4:] == 0).all()
    assert (weights[:-4] > 0).all()
    assert SignGuard(f=1)(torch.zeros(5, 20)).eq(0).all()


@pytest.mark.parametrize("arguments", [{"low": 1.5}, {"high": 0.5}, {"share": 0.0}, {"share": 1.5}])
def test_sign_guard_refuses_what_makes_no_sense(arguments):
    with pytest.raises(ValueError, match="should be in|times the median"):
        SignGuard(**arguments)


# -- single rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [1e30, -1e30, 3e38, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_f_rows_move_centered_clip_farther_than_its_bound(junk, dtype):
    x, tau, f = rows_for(11, 13, dtype=dtype), 3.0, 3
    moved = torch.cat([x[:-f], torch.full((f, 13), junk, dtype=dtype)])
    distance = torch.linalg.vector_norm(
        (CenteredClip(f=f, tau=tau)(moved) - CenteredClip(f=f, tau=tau)(x)).double()
    )
    assert distance <= 2 * f * tau / 11 * (1 + 1e-5)
    assert distance > 0.1


def test_centered_clip_goes_on_from_its_last_result():
    x = rows_for(9, 13, mean=50.0)
    rule, last = CenteredClip(f=2, tau=5.0), None
    for _ in range(60):
        last = rule(Rows(x, last=last))
    torch.testing.assert_close(last, x.mean(0), atol=1.0, rtol=0)
    assert torch.linalg.vector_norm(rule(x)) <= 5.0
    assert CenteredClip(f=2).remembers and Chain(pre=(NNM(),), rule=CenteredClip(f=2)).remembers
    assert not CenteredClip(f=2, start="median").remembers
    torch.testing.assert_close(Chain(rule=rule)(Rows(x, last=last)), rule(Rows(x, last=last)))


@pytest.mark.parametrize("arguments", [{"tau": 0.0}, {"iterations": 0}, {"start": "zero"}])
def test_centered_clip_refuses_what_makes_no_sense(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        CenteredClip(**arguments)


def test_monna_needs_the_row_it_trusts():
    x = rows_for(7, 5)
    x[2] += 1.0
    assert (MoNNA(f=2, trusted=2).weights(Rows(x)) > 0)[2]
    silent = x.clone()
    silent[0] = torch.nan
    # one silent row: f shrinks only where it has to, and row 2 is found by its index
    after = MoNNA(f=2, trusted=2)(silent)
    torch.testing.assert_close(after, MoNNA(f=2, trusted=1)(x[1:]))
    silent[2] = torch.nan
    with pytest.raises(TooFewRowsError, match="worker 2, whose row is silent"):
        MoNNA(f=2, trusted=2)(silent)
    with pytest.raises(ValueError, match="one of n=7 workers. Found 7"):
        MoNNA(f=2, trusted=7)(x)


def test_monna_finds_the_row_it_trusts_among_other_numbers():
    """Rows that were made of those that speak, clipped ones say, are still their workers'."""
    x = rows_for(7, 5)
    speaking = torch.tensor([False, True, True, False, True, True, True])
    made = Rows(x).select(speaking)
    made = made.with_values(2 * made.dense()).select(torch.tensor([4, 3, 2, 1]))
    assert made.workers.tolist() == [6, 5, 4, 2]
    weights = MoNNA(f=1, trusted=2).weights(made.mix(torch.eye(4)))
    torch.testing.assert_close(weights, MoNNA(f=1, trusted=3).weights(Rows(2 * x[[6, 5, 4, 2]])))


@pytest.mark.parametrize(
    ("tie", "expected"), [("plus_one", {1.0}), ("zero", {0.0}), ("random", {1.0, -1.0})]
)
def test_ties_of_a_vote(tie, expected):
    x = torch.cat([torch.ones(2, 50), -torch.ones(2, 50)])
    assert set(MajorityVote(f=1, tie=tie)(x).tolist()) == expected
    # a zero votes +1
    assert MajorityVote(f=1, tie=tie)(torch.cat([x, torch.zeros(1, 50)])).eq(1).all()


@pytest.mark.parametrize("f", [0, 3, 4])
def test_a_vote_is_the_honest_majoritys_where_it_is_larger_than_f(f):
    honest = rows_for(9 - f, 200, mean=0.0)
    votes = (honest >= 0).sum(0)
    out = MajorityVote(f=4)(torch.cat([honest, 1e30 * torch.ones(f, 200, dtype=torch.float64)]))
    assert (out[votes <= 4 - f] == -1).all()
    assert (out[votes >= 5] == 1).all()


def test_auto_gm_gives_weight_to_near_rows_only():
    x = honest_and(torch.full((3, 13), 1e6, dtype=torch.float64))
    assert (AutoGM(f=3).weights(Rows(x))[-3:] == 0).all()
    equal = AutoGM(f=3, regularization=1e12)(x[:-3])  # strong enough to make all weights equal
    torch.testing.assert_close(equal, GeometricMedian(f=3)(x[:-3]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="should be positive"):
        AutoGM(regularization=0.0)


# -- unequal shares of the data --------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [Mean(), CoordinateMedian(f=1), CoordinateMedian(f=1, middle="lower"), GeometricMedian(f=1)],
)
def test_a_share_of_k_counts_as_k_rows(rule):
    x, shares = rows_for(6, 8), torch.tensor([1.0, 2, 1, 3, 1, 1])
    repeated = x.repeat_interleave(shares.long(), dim=0)
    weighted = rule(Rows(x, shares=shares.double() / 7))
    torch.testing.assert_close(weighted, rule(repeated), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(weighted, rule(x))
    torch.testing.assert_close(rule(Rows(x, shares=torch.ones(6).double())), rule(x))


def test_shares_go_with_their_rows():
    x, shares = rows_for(6, 8), torch.tensor([1.0, 2, 1, 3, 1, 1]).double()
    x[1] = torch.nan
    keep = torch.arange(6) != 1
    for rule in (Mean(), CoordinateMedian(f=1)):
        torch.testing.assert_close(
            rule(Rows(x, shares=shares)), rule(Rows(x[keep], shares=shares[keep]))
        )


@pytest.mark.parametrize(
    "rule", [Krum(f=1), TrimmedMean(f=1), Chain(pre=(NNM(),), rule=CoordinateMedian(f=1)), CAF(f=1)]
)
def test_a_rule_that_cannot_weigh_says_so(rule):
    with pytest.raises(
        ValueError, match=r"counts every row alike.*CoordinateMedian, GeometricMedian or Mean"
    ):
        rule(Rows(rows_for(6, 8), shares=torch.ones(6).double()))


def test_f_rows_with_half_of_the_data_are_refused():
    shares = torch.tensor([5.0, 1, 1, 1, 1, 1]).double()
    with pytest.raises(ValueError, match="less than half of the data. Found 1 with 50 % of it"):
        CoordinateMedian(f=1)(Rows(rows_for(6, 8), shares=shares))
    CoordinateMedian(f=1)(Rows(rows_for(6, 8), shares=shares - torch.tensor([0.1, 0, 0, 0, 0, 0])))


# -- torch.compile ---------------------------------------------------------------------------------


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize(
    "rule",
    [
        CoordinateMedian(f=2),
        MultiKrum(f=2),
        CenteredClip(f=2),
        CAF(f=2),
        Chain(pre=(NNM(),), rule=TrimmedMean(f=2)),
    ],
    ids=lambda rule: type(rule).__name__,
)
@apart
def test_rules_work_under_torch_compile(rule):
    """Captured as graphs, without generating code, which would need a compiler."""
    x = rows_for(11, 50)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(rule.__call__, backend="eager")(x), rule(x))


def test_a_chain_that_compiles_does_not_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("nothing is to be compiled"))
    for rule in (TrimmedMean(), CoordinateMedian(), Krum()):
        x, chain = rows_for(11, 1000), Chain(pre=(NNM(),), rule=rule, f=2, compile=True)
        assert torch.equal(chain(x), dataclasses.replace(chain, compile=False)(x))
        assert dataclasses.replace(chain, compile=False) != chain and chain.with_f(1).compile


def test_equal_statistics_are_compiled_once(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compiled.append(function) or function
    )
    monkeypatch.setattr(rows_module, "_COMPILED", {})
    x = rows_for(5, 50)
    for first in (1, 2, 1, 2):
        statistic = ColumnStatistic("mean", first, first + 2)
        assert torch.equal(
            rows_module._compiled(statistic)(x), x.sort(0).values[first : first + 2].mean(0)
        )
    assert len(compiled) == 2
    for factor in (2, 3):  # other functions may hold anything
        assert torch.equal(
            rows_module._compiled(lambda rows, k=factor: k * rows[0])(x), factor * x[0]
        )
    assert len(compiled) == 4
