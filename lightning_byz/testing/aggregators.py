"""What every rule should hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_byz.aggregators import Aggregator, TooFewRowsError
from lightning_byz.testing.laws import Case, Law, near, raise_broken, random_rows, verdicts

AnyRule: TypeAlias = Callable[[Tensor], Tensor]

_JUNK: dict[str, float] = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "1e20": 1e20,
    "-1e30": -1e30,
    "1e38": 1e38,
    "zeros": 0.0,
}


def aggregator_laws(
    rule: AnyRule,
    n: int = 11,
    f: int = 2,
    d: int = 13,
    *,
    robust: bool = True,
    symmetric: bool = True,
    unanimous: bool = True,
    translation_equivariant: bool = True,
    scale_equivariant: bool = True,
) -> list[Law]:
    """All laws, and whether a rule holds them.

    Args:
        rule: maps ``[n, d]`` to ``[d]``. An `Aggregator` of this package gets ``f``; any other
            callable has to know it already.
        n: rows.
        f: rows that may be anything.
        d: columns.
        robust: f arbitrary rows move it by no more than (1 + sqrt n) times the honest rows'
            diameter.
        symmetric: the order of the rows does not matter.
        unanimous: equal rows give that row.
        translation_equivariant: it moves with the rows.
        scale_equivariant: it scales with the rows, also by negative numbers.
    """
    if isinstance(rule, Aggregator):
        rule = rule.with_f(f)
    claims = {name: value for name, value in locals().items() if isinstance(value, bool)}
    return verdicts(_aggregator_cases(rule, n, f, d, claims))


def check_aggregator(rule: AnyRule, n: int = 11, f: int = 2, d: int = 13, **claims: bool) -> None:
    """Raises an AssertionError that names every law that a rule breaks; the arguments are those of
    `aggregator_laws`.
    """
    raise_broken(rule, aggregator_laws(rule, n, f, d, **claims))


def _aggregator_cases(
    rule: AnyRule, n: int, f: int, d: int, claims: dict[str, bool]
) -> Iterator[Case]:
    x = random_rows(n, d, 0)

    def unanimity() -> None:
        row = random_rows(1, d, 4, scale=100.0)
        near(rule(row.repeat(n, 1)), row[0], 1e-5)

    def order() -> None:
        near(rule(x.flip(0)), rule(x), 1e-5)

    def shift() -> None:
        v = 100 * random_rows(1, d, 9)[0]
        near(rule(x + v), rule(x) + v, 1e-5)

    def scale() -> None:
        for factor in (-1.0, 1e-12, -7.0, 1e20):
            near(rule(factor * x), factor * rule(x), 1e-5)

    def untouched() -> None:
        for dtype in (torch.float64, torch.float32):
            given = (50 * x).to(dtype)
            rule(given)
            assert torch.equal(given, (50 * x).to(dtype)), (
                f"the caller's {dtype} rows were overwritten"
            )

    def own_memory() -> None:
        given = x.float()
        rule(given).fill_(7)
        assert torch.equal(given, x.float()), (
            "writing into the result writes into the caller's rows"
        )

    def bits() -> None:
        assert torch.equal(rule(x.clone()), rule(x.clone())), "two calls on the same rows differ"

    def common_mean() -> None:
        close = random_rows(n, 40, 3, mean=1e4, scale=1e-2, dtype=torch.float32)
        near(rule(close), rule(close.double()), 8 * torch.finfo(torch.float32).eps)

    if claims["unanimous"]:
        yield "equal rows give that row", unanimity
    if claims["symmetric"]:
        yield "the order of the rows does not matter", order
    if claims["translation_equivariant"]:
        yield "it moves with the rows", shift
    if claims["scale_equivariant"]:
        yield "it scales with the rows", scale
    yield "the input is not modified", untouched
    yield "the result has memory of its own", own_memory
    yield "same input, same bits", bits
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        yield (
            f"{str(dtype).removeprefix('torch.')} rows give such a result",
            partial(_keeps_dtype, rule, x, dtype),
        )
    yield "a large common mean costs no digits", common_mean
    if claims["robust"]:
        # far from 0, where a rule may not favour it
        mean = 50.0 if claims["translation_equivariant"] else 5.0
        for name, value in _JUNK.items():
            junk = torch.full((f, d), value, dtype=torch.float32)
            yield f"f rows of {name}", partial(_withstands, rule, n, junk, mean)
        one_nan = torch.cat([torch.zeros(f, d - 1), torch.full((f, 1), math.nan)], 1)
        yield "one nan in a row", partial(_withstands, rule, n, one_nan, mean)
        yield (
            "f equal rows, far away",
            partial(
                _withstands,
                rule,
                n,
                random_rows(1, d, 98, 0.0, 30.0, torch.float32).expand(f, d),
                mean,
            ),
        )
        sizes = 10.0 ** (6 * torch.arange(f) - 2)
        yield (
            "f rows of different sizes",
            partial(_withstands, rule, n, sizes[:, None].expand(f, d), mean),
        )
        if isinstance(rule, Aggregator):
            yield "n = 2f is refused", partial(_refuses, rule.with_f(n // 2), n // 2 * 2, d)


def _keeps_dtype(rule: AnyRule, x: Tensor, dtype: torch.dtype) -> None:
    out = rule(x.to(dtype))
    assert out.dtype == dtype, f"a result of {out.dtype}"
    assert out.shape == x.shape[1:], f"a result of shape {list(out.shape)}"
    near(out, rule(x.to(dtype).double()), 4 * torch.finfo(dtype).eps)


def _withstands(rule: AnyRule, n: int, junk: Tensor, mean: float) -> None:
    honest = random_rows(n - len(junk), junk.shape[1], 2, mean=mean, dtype=torch.float32)
    center = honest.double().mean(0)
    diameter = float(
        torch.cdist(
            honest.double(), honest.double(), compute_mode="donot_use_mm_for_euclid_dist"
        ).max()
    )
    for rows in (torch.cat([junk, honest]), torch.cat([honest, junk])):
        out = rule(rows.to(honest.dtype)).double()
        assert bool(torch.isfinite(out).all()), "the result is not finite"
        moved = float(torch.linalg.vector_norm(out - center))
        assert moved <= (1 + n**0.5) * diameter, (
            f"the result is {moved:.3g} from the honest mean; their diameter is {diameter:.3g}"
        )


def _refuses(rule: AnyRule, n: int, d: int) -> None:
    try:
        rule(random_rows(n, d, 0))
    except TooFewRowsError:
        return
    raise AssertionError("it answered")
