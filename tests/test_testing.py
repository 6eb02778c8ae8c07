"""The conformance kit says yes to what this package has, and names what is wrong with what is not
right.
"""

import dataclasses

import pytest
import torch
from zoo import ATTACKS, COMPRESSORS, RULES, each

from lightning_byz.aggregators import CoordinateMedian, TrimmedMean
from lightning_byz.attacks import Attack, LabelFlip, SignFlip
from lightning_byz.compressors import Identity, RandK, ScaledSign, TopK
from lightning_byz.testing import (
    aggregator_laws,
    attack_laws,
    check_aggregator,
    check_attack,
    check_compressor,
    compressor_laws,
)


@each(RULES)
def test_every_rule_passes(case):
    claims = {
        name: getattr(case, name)
        for name in (
            "robust",
            "symmetric",
            "unanimous",
            "translation_equivariant",
            "scale_equivariant",
        )
    }
    check_aggregator(case.rule, n=11, f=min(2, max(0, case.rule.most_f(11))), **claims)


@each(COMPRESSORS)
def test_every_compressor_passes(case):
    check_compressor(case.compressor, draws=100)


@each(ATTACKS)
def test_every_attack_passes(case):
    check_attack(case.attack, symmetric=case.name != "mimic_the_third")


def broken(laws):
    return {law.name for law in laws if not law.holds}


def subtracting_trimmed_mean(rows):
    """The trimmed mean of two libraries: the sum, less the extremes."""
    return (
        rows.sum(0) - rows.topk(2, 0).values.sum(0) - rows.topk(2, 0, largest=False).values.sum(0)
    ) / (len(rows) - 4)


def in_place(rows):
    rows -= rows.mean(0)
    return rows.median(0).values


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (
            lambda rows: rows.mean(0),
            {"f rows of nan", "f rows of 1e20", "one nan in a row", "f rows of -1e30"},
        ),
        (lambda rows: rows.median(0).values, {"f rows of nan", "one nan in a row"}),
        (subtracting_trimmed_mean, {"f rows of 1e20", "f rows of 1e38"}),
        (
            in_place,
            {"the input is not modified", "equal rows give that row", "it moves with the rows"},
        ),
        (
            lambda rows: rows[0],
            {
                "the order of the rows does not matter",
                "f rows of inf",
                "the result has memory of its own",
            },
        ),
        (
            lambda rows: CoordinateMedian(f=2)(rows.float()),
            {"float64 rows give such a result", "bfloat16 rows give such a result"},
        ),
        (
            lambda rows: CoordinateMedian(f=2)(rows) + torch.rand(()),
            {"same input, same bits", "equal rows give that row"},
        ),
        (lambda rows: CoordinateMedian(f=2)(rows).abs(), {"it scales with the rows"}),
    ],
)
def test_a_broken_rule_is_named(rule, expected):
    laws = aggregator_laws(rule)
    assert expected <= broken(laws)
    assert all(law.found for law in laws if not law.holds)
    with pytest.raises(AssertionError, match=rf"breaks \d+ of {len(laws)} laws"):
        check_aggregator(rule)


@dataclasses.dataclass(frozen=True)
class Generous(TrimmedMean):
    def most_f(self, n):
        return n


def test_a_rule_that_takes_half_liars_is_named():
    assert "n = 2f is refused" in broken(aggregator_laws(Generous()))


def test_claims_that_are_not_made_are_not_checked():
    assert not {"it moves with the rows"} & {
        law.name for law in aggregator_laws(lambda rows: rows[0], translation_equivariant=False)
    }
    assert not any(
        law.name.startswith("f rows")
        for law in aggregator_laws(lambda rows: rows.mean(0), robust=False)
    )


class Unscaled(RandK):
    def scale(self, dim):
        return 1.0

    def variance(self, dim):
        return dim / self.count(dim) - 1


class Optimistic(TopK):
    def contraction(self, dim):
        return 1.0


class Leaky(Identity):
    def valid(self, payload, dim):
        return torch.tensor(True)

    def encode(self, x, generator=None):
        x += 1
        return (x,)


@pytest.mark.parametrize(
    ("compressor", "expected"),
    [
        (Unscaled(k=3), "unbiased, with the variance declared"),
        (Optimistic(k=3), "contracts as declared"),
        (Leaky(), "same generator, same payload; the input is not modified"),
        (Leaky(), "its own payloads are valid, and those with a nan are not"),
    ],
)
def test_a_broken_compressor_is_named(compressor, expected):
    assert any(name.endswith(expected) for name in broken(compressor_laws(compressor, dims=(40,))))
    with pytest.raises(AssertionError, match="laws"):
        check_compressor(compressor, dims=(40,))


class Overwrites(Attack):
    def __call__(self, honest, own, scene=None):
        honest *= -1
        return honest[: len(own)]


def test_a_broken_attack_is_named():
    assert {"what it sees is not modified"} <= broken(attack_laws(Overwrites()))
    with pytest.raises(AssertionError, match="overwritten"):
        check_attack(Overwrites())
    with pytest.raises(TypeError, match="an attack on data"):
        attack_laws(LabelFlip(10))
    check_attack(SignFlip())


def test_a_scale_of_the_whole_vector_is_not_coordinate_wise():
    class Claims(ScaledSign):
        coordinate_wise = True

    assert {
        "d = 40: the payloads of pieces make up the whole one",
        "d = 1000: the payloads of pieces make up the whole one",
    } <= broken(compressor_laws(Claims()))


def test_memory_that_is_given_is_written_to():
    class Forgets(Identity):
        def decode_into(self, payload, out):
            out.add_(payload[0])

        def added(self, x, payload):
            return x.add_(payload[0])

    assert "d = 40: decoded into given memory, and added, it is what it decodes to" in broken(
        compressor_laws(Forgets())
    )
