"""Compiled kernels: the same bits as PyTorch's operations, or the same to rounding; and the same
bits whatever the number of threads and the instruction set.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from zoo import RULES, each, rows_for

from lightning_byz.aggregators import (
    Chain,
    CoordinateMedian,
    MajorityVote,
    MeaMed,
    MultiKrum,
    Phocas,
    TrimmedMean,
)
from lightning_byz.numerics import kernels
from lightning_byz.numerics.kernels import build
from lightning_byz.numerics.order_statistics import ColumnStatistic
from lightning_byz.numerics.rows import Rows

compiler = pytest.mark.skipif(
    os.name != "posix"
    or shutil.which((os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0])
    is None,
    reason="kernels need a C compiler",
)


def statistics(n: int) -> list[ColumnStatistic]:
    f = (n - 1) // 2 // 2
    return [
        ColumnStatistic(),
        ColumnStatistic("mean", f, n - f),
        ColumnStatistic("mean", 0, 1),
        ColumnStatistic("mean", n - 1, n),
        ColumnStatistic(keep=n - f),
        ColumnStatistic(keep=1),
        ColumnStatistic("mean", f, n - f, keep=n - f),
        ColumnStatistic("vote", tie=1.0),
        ColumnStatistic("vote"),
    ]


def hard_rows(n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    x = rows_for(n, d, seed=n, dtype=dtype)
    x[:, : d // 4] = x[:, : d // 4].round()  # ties
    x[:, 1::7] = 0.0
    x[n // 2, 2::5] *= 1e30
    return x


@compiler
def test_the_kernels_were_built():
    for dtype in build.DTYPES:
        assert kernels._library(dtype) is not None


@compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [*range(1, 35), 50, 64, 100, 255, kernels.MOST_ROWS])
@pytest.mark.thorough(keep=8)
def test_every_statistic_has_the_bits_of_pytorchs_operations(n, dtype):
    x = hard_rows(n, 75, dtype)
    for statistic in statistics(n):
        assert kernels.fits([*x])
        fast = statistic(x)
        with kernels.switched_off():
            assert not kernels.fits([*x])
            assert torch.equal(fast, statistic(x)), statistic


@compiler
@pytest.mark.parametrize("d", [0, 1, 15, 16, 17, 31, 32, 33, 64, 100, 4097])
def test_any_number_of_columns(d):
    x = hard_rows(9, d, torch.float32)
    for statistic in statistics(9):
        with kernels.switched_off():
            slow = statistic(x)
        assert torch.equal(statistic(x), slow)


@compiler
def test_bits_do_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(kernels, "_SHARE", 64)
    x, before = hard_rows(11, 5003, torch.float32), torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 3, 7, 100):
            torch.set_num_threads(threads)
            made.append([statistic(x) for statistic in statistics(11)])
    finally:
        torch.set_num_threads(before)
    for others in made[1:]:
        for a, b in zip(made[0], others, strict=True):
            assert torch.equal(a, b)


@compiler
def test_rows_of_any_place_in_memory_are_read():
    wide = hard_rows(14, 300, torch.float32)
    for x in (wide[:, 3:207], wide[::2], wide[:7, 100:], wide.flip(0)):
        with kernels.switched_off():
            slow = ColumnStatistic(keep=4)(x)
        assert torch.equal(ColumnStatistic(keep=4)(x), slow)
    columns = wide.T[:9]  # numbers of a row lie apart
    assert not kernels.fits([*columns])
    assert torch.equal(ColumnStatistic()(columns), columns.median(0).values)


@compiler
@each(RULES)
def test_every_rule_gives_the_same_without_kernels(case):
    """The same bits, if it is coordinate-wise; norms and inner products round differently."""
    n, exact = 11, case.rule.coordinate_wise
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = rows_for(n, 333, seed=5).to(dtype)
        fast = case.rule(x)
        with kernels.switched_off():
            slow = case.rule(x)
        torch.testing.assert_close(fast, slow, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)


# -- inner products, sums and mixtures -------------------------------------------------------------


@compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 20, 33, kernels.MOST_ROWS])
@pytest.mark.parametrize("d", [0, 1, 255, 512, 513, 40_000])
@pytest.mark.thorough(keep=12)
def test_inner_products_are_those_of_float64(n, d, dtype):
    x = rows_for(n, d, seed=d, dtype=dtype)
    wide = x.double()
    expected = wide @ wide.T
    found = kernels.inner_products([*x])
    digits = 2e-7 if dtype == torch.float32 else 1e-13
    lengths = wide.norm(dim=1)
    assert ((found - expected).abs() <= digits * lengths[:, None] * lengths + 1e-300).all()
    assert torch.equal(found, found.T)


@compiler
def test_bits_of_products_and_mixtures_do_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(kernels, "_SHARE", 1)
    x = rows_for(9, 70_001, dtype=torch.float32)
    mixing = torch.rand(6, 9, dtype=torch.float64)

    def numbers(threads: int) -> tuple[torch.Tensor, ...]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        mixed, summed = torch.empty(70_001), torch.empty(70_001)
        ColumnStatistic("mean", 1, 5).by_kernel([*x], mixed, mixing)
        kernels.weighted_sum([*x], mixing[0, :9].tolist(), summed)
        return kernels.inner_products([*x]), mixed, summed

    alone = numbers(1)
    for threads in (2, 3, 7, 200):
        assert all(map(torch.equal, alone, numbers(threads)))


@compiler
@pytest.mark.parametrize("statistic", statistics(11), ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_of_mixed_rows_are_those_of_the_mixtures(statistic, dtype):
    x = rows_for(9, 1000, dtype=dtype)
    mixing = torch.rand(11, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mixing[mixing < 0.3] = 0
    mixing -= 0.3
    found = Rows(x).mix(mixing).map(statistic)
    expected = statistic._by_torch((mixing @ x.double()).to(dtype))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@compiler
def test_what_has_no_weight_is_not_read():
    x = rows_for(5, 100, dtype=torch.float32)
    x[2] = torch.nan
    mixing = torch.eye(5, dtype=torch.float64)
    mixing[2] = mixing[1]
    found = torch.empty(100)
    assert ColumnStatistic().by_kernel([*x], found, mixing) == kernels.ODD_INPUT
    assert torch.equal(found, ColumnStatistic()(x[[0, 1, 1, 3, 4]]))
    assert Rows(x).combine(torch.tensor([0.5, 0.5, 0, 0, 0])).isfinite().all()


@compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weighted_sums_have_the_bits_of_pytorchs_operations(dtype):
    rows = Rows(rows_for(9, 300_001, dtype=dtype))
    weights = torch.rand(9, dtype=torch.float64)
    weights[4] = 0
    fast = rows.combine(weights)
    with kernels.switched_off():
        assert torch.equal(fast, rows.combine(weights))


@compiler
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_products_tell_that_rows_are_finite(bad, monkeypatch):
    x = rows_for(11, 1000, dtype=torch.float32)
    rule = MultiKrum(f=2)
    expected = rule(x, torch.ones(11, dtype=torch.bool))
    odd = x.clone()
    odd[4, 999] = bad
    assert torch.equal(rule(odd), rule(x, torch.arange(11) != 4))
    monkeypatch.setattr(Rows, "_sums_of_squares", lambda *_: pytest.fail("rows were read twice"))
    assert torch.equal(rule(x), expected)


# -- what is not finite ----------------------------------------------------------------------------

AT_ONCE = [
    CoordinateMedian(f=2),
    CoordinateMedian(f=2, middle="lower"),
    TrimmedMean(f=2),
    MeaMed(f=2),
    Phocas(f=2),
    MajorityVote(f=2),
    Chain(rule=TrimmedMean(), f=2),
]


@compiler
@pytest.mark.parametrize("rule", AT_ONCE, ids=repr)
def test_one_pass_tells_that_rows_are_finite(rule, monkeypatch):
    x = rows_for(9, 1000, dtype=torch.float32)
    expected = rule(x, torch.ones(9, dtype=torch.bool))
    monkeypatch.setattr(Rows, "finite", lambda *_: pytest.fail("rows were read twice"))
    assert torch.equal(rule(x), expected)


@compiler
@pytest.mark.parametrize("rule", AT_ONCE, ids=repr)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 31, 32, 990, 999])
def test_a_row_that_is_not_finite_is_silent_wherever_it_shows(rule, bad, place):
    x = rows_for(9, 1000, dtype=torch.float32)
    expected = rule(x, torch.arange(9) != 4)
    x[4, place] = bad
    assert torch.equal(rule(x), expected)


@compiler
def test_means_of_the_largest_numbers_do_not_overflow():
    x = torch.full((9, 40), 3e38)
    for rule in (TrimmedMean(f=2), MeaMed(f=2), Phocas(f=2)):
        assert torch.equal(rule(x), x[0])


@compiler
def test_slices_are_looked_at_on_all_ranks():
    """A rank that sees finite numbers only cannot know that its others do."""
    x = rows_for(9, 100, dtype=torch.float32)
    said = []

    def total(partial):
        said.append(partial)
        return (
            partial + torch.eye(9, dtype=torch.float64)[3]
        )  # another rank's slice of row 3 is odd

    rule = CoordinateMedian(f=2)
    present = torch.arange(9) != 3
    assert torch.equal(rule(Rows(x, total=total)), rule(x, present))
    assert said


@compiler
@pytest.mark.parametrize(
    "statistic",
    [
        ColumnStatistic("mean", 0, 5),
        ColumnStatistic("mean", 0, 400),
        ColumnStatistic("mean", 2, 2),
        ColumnStatistic(keep=4),
        ColumnStatistic(keep=0),
    ],
    ids=repr,
)
def test_no_more_values_are_averaged_than_there_are(statistic):
    rows = Rows(rows_for(5, 40, dtype=torch.float32)).mix(torch.ones(3, 5))
    with pytest.raises(ValueError, match="should be of some of n=3 values"):
        rows.map(statistic)


@compiler
def test_mixtures_of_other_rows_are_refused():
    rows, out = [*rows_for(5, 40, dtype=torch.float32)], torch.empty(40)
    for mixing in (torch.ones(3, 6), torch.ones(0, 5), torch.ones(kernels.MOST_ROWS + 1, 5)):
        with pytest.raises(ValueError, match="Columns should be of 1 to 256 rows"):
            ColumnStatistic().by_kernel(rows, out, mixing)


def test_libraries_of_other_sources_are_not_loaded(monkeypatch):
    build.version.cache_clear()
    before = build.library("float32", "avx2")
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b" ")
    build.version.cache_clear()
    try:
        assert build.library("float32", "avx2") != before
    finally:
        build.version.cache_clear()


# -- where there is no kernel ----------------------------------------------------------------------


def test_more_rows_than_the_kernels_take_are_sorted_by_pytorch():
    x = rows_for(kernels.MOST_ROWS + 1, 50, dtype=torch.float32)
    assert not kernels.fits([*x])
    assert torch.equal(ColumnStatistic()(x), x.median(0).values)


def test_gradients_flow_through_a_rule():
    x = rows_for(9, 20, dtype=torch.float32).requires_grad_()
    (gradient,) = torch.autograd.grad(TrimmedMean(f=2)(x, torch.ones(9, dtype=torch.bool)).sum(), x)
    assert torch.allclose(gradient.sum(0), torch.ones(20))


def test_a_package_without_kernels_says_so_once_and_gives_the_same(monkeypatch, caplog, tmp_path):
    x = rows_for(9, 100, dtype=torch.float32)
    expected = {rule: rule(x) for rule in AT_ONCE}
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "__init__.py"))
    kernels._library.cache_clear()
    caplog.set_level(logging.INFO, "lightning_byz")
    try:
        for rule, result in expected.items():
            assert torch.equal(rule(x), result)
            assert torch.equal(
                rule(x.double()).float(), dataclasses.replace(rule)(x.double()).float()
            )
    finally:
        kernels._library.cache_clear()
    assert len([r for r in caplog.records if "no C compiler was there" in r.getMessage()]) == 1


@compiler
def test_a_library_that_cannot_be_loaded_gives_way_to_the_next(monkeypatch, tmp_path):
    names = [build.library("float32", instructions) for instructions in build.INSTRUCTIONS]
    real = Path(kernels.__file__).parent
    for name in names:
        if (real / name).exists():
            shutil.copy(real / name, tmp_path)
    best = torch.backends.cpu.get_cpu_capability().lower()
    best = best if best in build.INSTRUCTIONS else "baseline"
    if best == "baseline":
        pytest.skip("there is but one")
    (tmp_path / build.library("float32", best)).write_text("no library")
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "__init__.py"))
    kernels._library.cache_clear()
    try:
        x = rows_for(5, 10, dtype=torch.float32)
        assert torch.equal(ColumnStatistic()(x), x.median(0).values)
        assert kernels._library("float32") is not None
    finally:
        kernels._library.cache_clear()


# -- the build -------------------------------------------------------------------------------------


@compiler
@pytest.mark.thorough
def test_every_instruction_set_that_this_processor_has_gives_the_same(tmp_path):
    made = build.build(tmp_path)
    assert {path.name for path in made} == {path.name for path in tmp_path.iterdir()}
    has = torch.backends.cpu.get_cpu_capability().lower()
    order = [*build.INSTRUCTIONS]
    runs = [i for i in order if has in order and order.index(i) >= order.index(has)] or ["baseline"]
    x = hard_rows(20, 1003, torch.float32)
    mixing = torch.rand(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with kernels.switched_off():
        expected = [statistic(x) for statistic in statistics(20)]
    of_others = []
    for instructions in runs:
        library = kernels.opened(tmp_path / build.library("float32", instructions))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_library", lambda dtype, found=library: found)
            for statistic, result in zip(statistics(20), expected, strict=True):
                assert torch.equal(statistic(x), result), (instructions, statistic)
            mixed = Rows(x).mix(mixing).map(ColumnStatistic())
            of_others.append((kernels.inner_products([*x]), mixed))
    for products, mixed in of_others:
        assert torch.equal(products, of_others[0][0])
        assert torch.equal(mixed, of_others[0][1])


def test_a_build_without_a_compiler_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.NoCompilerError, match="no C compiler 'no-such-compiler'"):
        build.build(tmp_path)


@compiler
def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "--no-such-flag"))
    with pytest.raises(build.NoCompilerError, match="no-such-flag"):
        build.build(tmp_path)
