"""Rows: honest distances survive whatever f others send, lazy operations equal dense ones, and
networks sort.
"""

import contextlib
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import JUNK, laws, rows_for

from lightning_byz.aggregators import StaticClipping
from lightning_byz.numerics import kernels
from lightning_byz.numerics import rows as rows_module
from lightning_byz.numerics.memory import empty_rows
from lightning_byz.numerics.networks import pruned_network
from lightning_byz.numerics.order_statistics import median_of_rows, sorted_rows
from lightning_byz.numerics.rows import Rows


def true_squared_distances(x):
    x = x.double()
    return ((x[:, None, :] - x[None, :, :]) ** 2).sum(-1)


@pytest.fixture
def small_blocks(monkeypatch):
    for name, columns in (("_BLOCK", 7), ("_NARROW", 3), ("_WIDE", 9)):
        monkeypatch.setattr(rows_module, name, columns)


# -- distances -------------------------------------------------------------------------------------


def test_ranks_agree_on_the_products_that_are_made_again():
    """Sums over shards are collectives: rank 0 says which there are, whatever a rank finds itself."""
    x = rows_for(5, 300, seed=1).float()
    x[1] = x[0] * (1 + 1e-4)  # this rank would make their product again
    sums = []

    def total(tensor):
        sums.append(tuple(tensor.shape))
        return tensor

    def rank_0_finds_none(tensor):
        return 300.0 * torch.eye(5, dtype=torch.float64)

    Rows(x, total=total).squared_distances()
    assert sums == [(5, 5), (2, 2)]
    sums.clear()
    Rows(x, total=total, agree=rank_0_finds_none).squared_distances()
    assert sums == [(5, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# the border removes those
@pytest.mark.parametrize("junk", [name for name in JUNK if "nan" not in name and "inf" not in name])
@pytest.mark.parametrize("n", [5, 26, 100])
def test_honest_distances_are_right_whatever_the_others_hold(n, junk, dtype):
    f, d = (n - 1) // 2, 40
    honest = rows_for(n - f, d, seed=n, mean=100.0, scale=0.1, dtype=dtype)
    x = torch.cat([JUNK[junk](f, d, dtype), honest])
    found = Rows(x).squared_distances()[f:, f:]
    torch.testing.assert_close(found, true_squared_distances(honest), rtol=1e-3, atol=0)


@pytest.mark.parametrize("huge", [1e100, 1e160, 1e308])
def test_honest_distances_survive_huge_float64_rows(huge):
    honest = rows_for(4, 9)
    x = torch.cat([honest, torch.full((3, 9), huge, dtype=torch.float64)])
    found = Rows(x).squared_distances()
    torch.testing.assert_close(found[:4, :4], true_squared_distances(honest), rtol=1e-6, atol=0)
    assert not found.isnan().any()
    assert (found[:4, 4:] > 1e100).all()


@pytest.mark.parametrize("junk", ["+1e30", "1e6, all the same", "+3e38", "a different size each"])
def test_distances_of_mixed_honest_rows_are_right_whatever_the_others_hold(junk):
    n, f, d = 11, 5, 20
    x = torch.cat(
        [
            JUNK[junk](f, d, torch.float32),
            rows_for(n - f, d, mean=100.0, scale=0.1, dtype=torch.float32),
        ]
    )
    weights = torch.zeros(n, n, dtype=torch.float64)
    weights[:f, 0] = 1
    weights[f:, f:] = torch.softmax(rows_for(n - f, n - f, seed=3), 1)
    found = Rows(x).mix(weights).squared_distances()[f:, f:]
    torch.testing.assert_close(
        found, true_squared_distances(weights[f:, f:] @ x[f:].double()), rtol=1e-3, atol=0
    )


def test_distances_of_clipped_rows_are_those_of_the_clipped_rows():
    """Weights that do not add up to 1: a shift of the rows does not cancel."""
    x = torch.cat([torch.full((2, 20), 1e30), rows_for(5, 20, mean=10.0, dtype=torch.float32)])
    clipped = (1 / torch.linalg.vector_norm(x.double(), dim=1)).clamp_max(1)[:, None] * x.double()
    factors = (1 / torch.linalg.vector_norm(x.double(), dim=1)).clamp_max(1)
    torch.testing.assert_close(
        Rows(x).mix(factors.diag()).squared_distances(),
        true_squared_distances(clipped),
        rtol=1e-5,
        atol=1e-9,
    )
    halves = torch.tensor([1, 1, 1, 0.5, 1, 1, 1], dtype=torch.float64)
    found = Rows(x).mix(halves.diag()).squared_distances()
    torch.testing.assert_close(
        found, true_squared_distances(halves[:, None] * x.double()), rtol=1e-5, atol=1e-9
    )


@pytest.mark.usefixtures("small_blocks")
def test_clipped_rows_that_come_close_keep_their_distances():
    """Rows that point almost the same way and differ in length are far from each other, until they
    are clipped to one length.
    """
    x = rows_for(9, 40, dtype=torch.float32)
    for i in range(1, 5):
        x[i] = (1 + i) * (x[0] + 1e-4 * x[i])
    factors = 1 / torch.linalg.vector_norm(x.double(), dim=1)
    clipped = factors[:, None] * x.double()
    torch.testing.assert_close(
        Rows(x).mix(factors.diag()).squared_distances(),
        true_squared_distances(clipped),
        rtol=1e-4,
        atol=0,
    )


def test_nearly_equal_float32_rows_keep_their_distances():
    x = rows_for(9, 50, mean=1e3, scale=1e-2, dtype=torch.float32)
    torch.testing.assert_close(
        Rows(x).squared_distances(), true_squared_distances(x), rtol=1e-3, atol=0
    )


def test_nearly_equal_float64_rows_keep_their_distances():
    x = rows_for(9, 50, mean=1e8, scale=1e-2)
    torch.testing.assert_close(
        Rows(x).squared_distances(), true_squared_distances(x), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("n", [3, 27])
def test_colluding_rows_have_distance_zero_and_none_is_negative(n):
    x = torch.cat(
        [
            rows_for(1, 1000, scale=1e3, dtype=torch.float32).expand(n, -1),
            rows_for(2, 1000, dtype=torch.float32),
        ]
    )
    distances = Rows(x).squared_distances()
    assert (distances >= 0).all()
    assert distances[:n, :n].max() <= 1e-9 * distances.max()


@pytest.mark.parametrize("n", [2, 7, 30])
def test_distances_are_symmetric_with_a_zero_diagonal(n):
    x = rows_for(n, 33, dtype=torch.float32)
    x[0] *= 1e25
    distances = Rows(x).squared_distances()
    assert torch.equal(distances, distances.T)
    assert not distances.diagonal().any()


def test_norms_and_distances_to_a_center_are_float64_and_do_not_overflow():
    x = torch.cat([rows_for(3, 20, dtype=torch.float32), torch.full((1, 20), 3e38)])
    center = rows_for(1, 20, seed=5, dtype=torch.float32)[0]
    torch.testing.assert_close(Rows(x).squared_norms(), (x.double() ** 2).sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        Rows(x).squared_distances_to(center),
        ((x.double() - center.double()) ** 2).sum(1),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e12, 1e22])
def test_products_and_norms_in_float32_are_right_over_all_of_its_range(scale):
    """Where float32 products are not enough, they are made again."""
    x = rows_for(9, 40, dtype=torch.float32)
    x[1] = x[0] * (1 + 1e-4)  # two rows that are close, for their length
    x[2] *= 1e-3
    x[3] *= 1e3
    x *= scale
    torch.testing.assert_close(
        Rows(x).squared_distances(), true_squared_distances(x), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(Rows(x).squared_norms(), (x.double() ** 2).sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_are_right_after_products_are_known(dtype):
    x = rows_for(5, 40, mean=10.0, dtype=dtype)
    known = Rows(x)
    known.gram()
    torch.testing.assert_close(known.squared_norms(), (x.double() ** 2).sum(1), rtol=1e-6, atol=0)


def test_products_are_float64_where_the_user_allows_coarse_ones():
    x, before = rows_for(5, 300, dtype=torch.float32), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        torch.testing.assert_close(
            Rows(x).gram(), x.double() @ x.double().T, rtol=1e-12, atol=1e-12
        )
    finally:
        torch.set_float32_matmul_precision(before)


def test_decisions_go_through_agree():
    """What unlike machines could round differently is rank 0's."""
    asked = []

    def rank_0(tensor):
        asked.append(tuple(tensor.shape))
        return (
            7.0 * torch.eye(3, dtype=torch.float64) if tensor.ndim == 2 else torch.ones(3).double()
        )

    for dtype in (torch.float32, torch.float64):
        x = rows_for(3, 4, dtype=dtype)
        rows = Rows(x, agree=rank_0)
        expected = 14.0 * (1 - torch.eye(3, dtype=torch.float64))
        assert torch.equal(Rows(x, agree=rank_0).squared_norms(), torch.ones(3).double())
        asked.clear()
        assert torch.equal(rows.squared_distances(), expected)
        assert torch.equal(rows.gram(), 7.0 * torch.eye(3, dtype=torch.float64))
        assert asked == [(3, 3)], "one question is enough"
        mixed = rows.mix(torch.full((3, 3), 1 / 3, dtype=torch.float64))
        asked.clear()
        mixed.squared_distances()
        mixed.gram()
        assert len(asked) == 2, "what unlike machines made of the base rows' products"
        assert torch.equal(rows.select(torch.tensor([2, 0, 1])).squared_distances(), expected)


@pytest.mark.parametrize("shape", [(4, 7), (4, 3), (5,), (1, 5, 5)])
def test_weights_of_mixtures_have_one_column_for_each_row(shape):
    with pytest.raises(ValueError, match=r"should be a matrix \[m, 5\]. Found shape"):
        Rows(rows_for(5, 20)).mix(torch.ones(shape))


@pytest.mark.parametrize(
    "center", [torch.zeros(19), torch.zeros(1), torch.zeros(20, device="meta")]
)
def test_a_center_is_one_of_these_rows(center):
    with pytest.raises(ValueError, match=r"should be a vector \[20\] on cpu. Found shape"):
        Rows(rows_for(5, 20, dtype=torch.float32)).squared_distances_to(center)


@pytest.mark.parametrize("d", [100, 8_192, 20_000, 600_000])
def test_products_without_kernels_count_all_columns(d):
    x = rows_for(3, d, dtype=torch.float32)
    with kernels.switched_off():
        found = Rows(x).gram()
    wide = x.double()
    lengths = wide.norm(dim=1)
    assert ((found - wide @ wide.T).abs() <= 1e-6 * lengths[:, None] * lengths).all()


def test_no_rows_have_no_products():
    assert Rows(torch.zeros(0, 5)).squared_distances().shape == (0, 0)


def test_a_faint_row_keeps_its_norm_beside_large_ones():
    x = rows_for(5, 100, dtype=torch.float32)
    x[2] = 1e-24
    x[3] = 0
    rows = Rows(x)
    assert rows.finite(by="products").all()
    torch.testing.assert_close(rows.squared_norms(), x.double().square().sum(1), rtol=1e-5, atol=0)


def test_clipped_rows_can_be_differentiated():
    x = rows_for(5, 20, dtype=torch.float32).requires_grad_()
    StaticClipping(c=1.0)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_without_weight_are_not_read_by_mixtures(dtype):
    x = rows_for(5, 100).to(dtype)
    x[3] = torch.inf
    mixing = torch.full((4, 5), 0.25, dtype=torch.float64)
    mixing[:, 3] = 0
    rows = Rows(x).mix(mixing)
    assert rows.finite().all()
    for switch in (contextlib.nullcontext, kernels.switched_off):
        with switch():
            assert rows.map(median_of_rows).isfinite().all()
            assert rows.dense().isfinite().all()


# -- lazy operations -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clipped", [True, False])
def test_norms_and_values_of_selected_and_mixed_rows_are_those_of_dense_ones(clipped, dtype):
    x = torch.randn(6, 700, dtype=dtype, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([5, 1, 2])
    mixing = torch.tensor([[0.5, 0, 0], [0, 2, 0], [0, 0, 1]] if clipped else [[0.5, 0.5, 0]] * 2)
    dense = mixing.to(dtype) @ x[keep]
    lazy = Rows(x).select(keep).mix(mixing)
    torch.testing.assert_close(lazy.dense(), dense)
    wide, close = dense.double(), {"rtol": 1e-5, "atol": 0}
    torch.testing.assert_close(lazy.squared_norms(), wide.square().sum(1), **close)
    distances = (wide - x[0].double()).square().sum(1)
    torch.testing.assert_close(lazy.squared_distances_to(x[0]), distances, **close)


@pytest.mark.usefixtures("small_blocks")
@laws
@given(st.data())
def test_lazy_selecting_and_mixing_equal_dense_matrices(data):
    n, d, seed = (
        data.draw(st.integers(1, 8)),
        data.draw(st.integers(1, 20)),
        data.draw(st.integers(0, 10**6)),
    )
    dense = rows_for(n, d, seed)
    lazy = Rows(dense.clone())
    for kind in data.draw(st.lists(st.sampled_from(["mask", "index", "mix"]), max_size=4)):
        if kind == "mask":
            keep = torch.tensor(
                data.draw(
                    st.lists(st.booleans(), min_size=len(dense), max_size=len(dense)).filter(any)
                )
            )
            lazy, dense = lazy.select(keep), dense[keep]
        elif kind == "index":
            keep = torch.tensor(
                data.draw(
                    st.lists(st.integers(0, len(dense) - 1), min_size=1, max_size=6, unique=True)
                )
            )
            lazy, dense = lazy.select(keep), dense[keep]
        else:
            weights = rows_for(data.draw(st.integers(1, 6)), len(dense), seed + 1)
            lazy, dense = lazy.mix(weights), weights @ dense
    assert len(lazy) == len(dense)
    weights = rows_for(1, len(dense), seed + 2)[0]
    columns = torch.tensor(data.draw(st.lists(st.integers(0, d - 1), min_size=1, max_size=5)))
    size = float((dense**2).sum()) + 1
    close = {"rtol": 1e-9, "atol": 1e-9 * size}
    torch.testing.assert_close(lazy.dense(), dense, **close)
    torch.testing.assert_close(lazy.columns(columns).dense(), dense[:, columns], **close)
    torch.testing.assert_close(lazy.combine(weights), weights @ dense, **close)
    torch.testing.assert_close(
        lazy.map(lambda block: block.max(0).values), dense.max(0).values, **close
    )
    torch.testing.assert_close(lazy.squared_norms(), (dense**2).sum(1), **close)
    torch.testing.assert_close(
        lazy.squared_distances_to(dense[0]), ((dense - dense[0]) ** 2).sum(1), **close
    )
    torch.testing.assert_close(lazy.squared_distances(), true_squared_distances(dense), **close)
    assert lazy.finite().all()


def test_a_lazy_row_that_needs_a_nan_is_not_finite():
    x = rows_for(3, 10)
    x[1, 4] = torch.nan
    assert Rows(x).finite().tolist() == [True, False, True]
    assert Rows(x).select(torch.tensor([2, 0])).finite().tolist() == [True, True]


# means, whose rows tell, and sums, which are looked at themselves
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_mixture_is_finite_if_all_of_its_blocks_are(small_blocks, weight):
    x = rows_for(3, 30)
    x[1, 4] = torch.nan
    mixed = Rows(x).mix(weight * torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.25, 0.25]]))
    assert mixed.finite().tolist() == [False, False]


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
def test_combine_never_reads_rows_of_weight_zero(junk):
    x = rows_for(4, 10, dtype=torch.float32)
    x[2] = junk
    out = Rows(x).combine(torch.tensor([0.5, 0.25, 0.0, 0.25]))
    torch.testing.assert_close(out, 0.5 * x[0] + 0.25 * x[1] + 0.25 * x[3])


def test_combine_of_one_row_is_that_row_exactly():
    x = rows_for(4, 300, scale=1e5, dtype=torch.float32)
    assert torch.equal(Rows(x).combine(torch.tensor([0, 0, 1.0, 0])), x[2])


def test_operations_leave_the_values_alone():
    x = rows_for(5, 30, dtype=torch.float32)
    before = x.clone()
    rows = Rows(x).select(torch.tensor([4, 2, 0])).mix(torch.full((2, 3), 1 / 3))
    (
        rows.squared_distances(),
        rows.dense(),
        rows.combine(torch.ones(2)),
        rows.map(median_of_rows),
        rows.finite(),
    )
    Rows(x).map(median_of_rows), Rows(x).squared_distances(), Rows(x.double()).squared_distances()
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "bad", [torch.zeros(3), torch.zeros(2, 2, 2), torch.zeros(2, 2, dtype=torch.int64)]
)
def test_only_floating_point_matrices_are_rows(bad):
    with pytest.raises(ValueError, match=r"matrix \[n, d\]"):
        Rows(bad)


@laws
@given(st.data())
def test_the_kth_largest_number_is_that_of_a_sort(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    numbers = data.draw(st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=40))
    # with equal ones
    x = torch.tensor(numbers * data.draw(st.integers(1, 3)), dtype=torch.float64).to(dtype)
    cut, k = data.draw(st.integers(0, len(x))), data.draw(st.integers(1, len(x) + 2))
    expected = x.sort(descending=True).values[min(k, len(x)) - 1]
    assert torch.equal(Rows(x[None]).kth_largest(x, k), expected)
    with ThreadPoolExecutor(2) as pool:  # two slices, which add up what they know
        meeting, said = threading.Barrier(2), [torch.empty(0)] * 2

        def found(rank):
            def total(tensor):
                said[rank] = tensor
                meeting.wait(10)
                both = said[0] + said[1]
                meeting.wait(10)
                return both

            part = x[:cut] if rank == 0 else x[cut:]
            return Rows(part[None], total=total).kth_largest(part, k)

        assert all(torch.equal(answer, expected) for answer in pool.map(found, range(2)))


@pytest.mark.parametrize("k", [1, 900, 60_000, 100_000])
def test_the_kth_largest_number_is_found_whatever_a_sample_says(k):
    x = rows_for(1, 4 * 32_768, dtype=torch.float32)[0].abs()
    for large in (slice(0, None, 4), slice(1, None, 4)):  # what a sample sees, and what it does not
        y = x.clone()
        y[large] += 1000
        assert Rows(y[None]).kth_largest(y, k) == y.sort(descending=True).values[k - 1]


@given(st.integers())
def test_no_example_has_a_deadline(number):
    """Whatever settings a test forgets."""
    assert settings().deadline is None


# -- what is taken for rows ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_lists_and_arrays_are_rows(dtype):
    array = np.random.default_rng(0).normal(size=(5, 3)).astype(dtype)
    read_only = array.copy()
    read_only.flags.writeable = False
    expected = torch.tensor(array)
    several = [
        list(expected),
        tuple(expected),
        array,
        read_only,
        list(array),
        np.ascontiguousarray(array[::-1])[::-1],
    ]
    for rows in [*several, [expected[0], *array[1:]]]:
        found = Rows.of(rows).values
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
    assert Rows.of(expected).values is expected
    assert torch.equal(
        Rows.of([[1.0, 2.0], [3.0, 4.0]]).values, torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    )


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (
            [torch.zeros(2), torch.zeros(3)],
            r"one length, dtype and device. Found \[2\] of torch.float32 on cpu, \[3\]",
        ),
        ([torch.zeros(2), torch.zeros(2).double()], "one length, dtype and device"),
        ([], "Found none"),
        (np.zeros((2, 2), dtype=int), r"matrix \[n, d\].*torch.int64"),
        (np.zeros(3), r"matrix \[n, d\].*shape \[3\]"),
        ("rows", r"matrix \[n, d\].*Found str"),
        (None, r"matrix \[n, d\].*Found NoneType"),
        (torch.zeros(2, 2, dtype=torch.cfloat), r"matrix \[n, d\].*torch.complex64"),
    ],
    ids=str,
)
def test_what_is_no_matrix_of_numbers_is_refused(rows, match):
    with pytest.raises(ValueError, match=match):
        Rows.of(rows)


# -- order statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 34))
def test_the_sorting_network_is_a_sort(n):
    x = rows_for(n, 60, seed=n, dtype=torch.float32)
    x[:, :10] = x[:, :10].round()  # ties
    expected = x.sort(0).values
    assert torch.equal(torch.stack(sorted_rows(x, 0, n)), expected)
    for first, last in {(0, 1), (n - 1, n), (n // 2, n // 2 + 1), (n // 3, n - n // 3)}:
        assert torch.equal(torch.stack(sorted_rows(x, first, last)), expected[first:last])
    for first in range(n - 1):  # a pair in either order
        assert torch.equal(
            torch.stack(sorted_rows(x, first, first + 2, ordered=False)).sort(0).values,
            expected[first : first + 2],
        )


@pytest.mark.parametrize("n", range(1, 13))
def test_the_sorting_network_sorts_every_sequence_of_zeros_and_ones(n):
    """By the 0-1 principle it then sorts everything."""
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n))).T
    assert torch.equal(torch.stack(sorted_rows(x, 0, n)), x.sort(0).values)


@pytest.mark.parametrize("n", range(1, 34))
def test_the_median_is_torchs_for_odd_n_and_the_mean_of_the_middle_two_for_even_n(n):
    x = rows_for(n, 200, seed=n, scale=1e3, dtype=torch.float32)
    if n % 2:
        assert torch.equal(median_of_rows(x), x.median(0).values)
    else:
        middle = x.sort(0).values[n // 2 - 1 : n // 2 + 1].double()
        torch.testing.assert_close(median_of_rows(x).double(), middle.mean(0), rtol=3e-7, atol=0)
        assert not torch.equal(median_of_rows(x), x.median(0).values)  # torch takes the lower one


def test_pruning_drops_comparators_that_nothing_depends_on():
    assert len(pruned_network(25, 12, 13)) < len(pruned_network(25, 0, 25))
    assert pruned_network(1, 0, 1) == ()
    assert len(pruned_network(4, 1, 3, ordered=False)) == len(pruned_network(4, 1, 3)) - 1
    for first, last in ((0, 3), (2, 7), (0, 8)):  # more than two have an order
        assert pruned_network(8, first, last, ordered=False) == pruned_network(8, first, last)


def test_the_median_of_the_largest_numbers_does_not_overflow():
    assert median_of_rows(torch.full((4, 2), 3e38)).tolist() == torch.full((2,), 3e38).tolist()


@pytest.mark.parametrize("d", [187, 1000, 8192, 70_000])
def test_where_rows_lie_in_memory_changes_no_bit(d):
    """Matrix products of some libraries depend on it; transports and simulations keep rows in
    different places.
    """
    generator = torch.Generator().manual_seed(0)
    x, weights, mixing = (
        torch.randn(4, d, generator=generator),
        torch.rand(4, generator=generator).double(),
        torch.rand(4, 4, generator=generator).double(),
    )
    expected = Rows(x.clone())
    for offset in (0, 1, 2, 5, 8, 15):
        for gap in (0, 1, 3, 8):
            place = torch.empty(4 * (d + gap) + offset)[offset:].view(4, d + gap)[:, :d]
            rows = Rows(place.copy_(x))
            assert torch.equal(rows.gram(), expected.gram())
            assert torch.equal(rows.squared_norms(), expected.squared_norms())
            assert torch.equal(rows.combine(weights), expected.combine(weights))
            assert torch.equal(rows.mix(mixing).dense(), expected.mix(mixing).dense())


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("d", [40, 8192, 8192 + 24, 5 * 8192 + 17, 2 * 65536 + 8200])
def test_mixed_rows_are_the_product_of_weights_and_rows(d, threads, aligned):
    rows = rows_for(5, d, dtype=torch.float32)
    weights = rows_for(5, 5, seed=1)
    if aligned:
        rows = empty_rows(5, d, rows).copy_(rows)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        mixed = Rows(rows).mix(weights).dense()
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(
        mixed.double(), weights.double() @ rows.double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("d", [8 * 8192 + 10, 9 * 8192, 32 * 8192 + 1, 40 * 8192 + 3])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("made", [contextlib.nullcontext, kernels.switched_off])
def test_a_last_batch_with_fewer_matrices_than_threads_adds_nothing_of_an_earlier_one(
    d, threads, made
):
    # copied, for its rows begin anywhere
    x = torch.randn(5, d + 1, generator=torch.Generator().manual_seed(1))[:, 1:]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with made():
            rows = Rows(x)
            mixed = rows.mix(torch.eye(5, dtype=torch.float64).roll(1, 0)).dense()
            gram = rows.gram()
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(gram, x.double() @ x.double().T, rtol=1e-4, atol=1e-2)
    assert torch.equal(mixed, x.roll(1, 0))
