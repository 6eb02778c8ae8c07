"""Compiled kernels: the same bits as PyTorch's operations, whatever the rows, threads and
instruction set.
"""

from __future__ import annotations

import ctypes
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
def test_every_rule_has_the_same_bits_without_kernels(case):
    n = 11
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = rows_for(n, 333, seed=5).to(dtype)
        fast = case.rule(x)
        with kernels.switched_off():
            assert torch.equal(fast, case.rule(x))


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
    with kernels.switched_off():
        expected = [statistic(x) for statistic in statistics(20)]
    for instructions in runs:
        function = ctypes.CDLL(str(tmp_path / build.library("float32", instructions))).columns
        known = kernels._library("float32")
        function.restype, function.argtypes = known.restype, known.argtypes
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_library", lambda dtype, found=function: found)
            for statistic, result in zip(statistics(20), expected, strict=True):
                assert torch.equal(statistic(x), result), (instructions, statistic)


def test_a_build_without_a_compiler_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.NoCompilerError, match="no C compiler 'no-such-compiler'"):
        build.build(tmp_path)


@compiler
def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "--no-such-flag"))
    with pytest.raises(build.NoCompilerError, match="no-such-flag"):
        build.build(tmp_path)
