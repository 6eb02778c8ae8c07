"""One instance of everything, one line each, with the properties that it claims; the laws in
``test_*.py`` run over all of them.

A new rule, compressor, attack or algorithm adds its line here and is tested by every law.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import oracles
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from lightning_byz.aggregators import (
    ARC,
    CAF,
    CGE,
    FABA,
    MDA,
    NNM,
    SMEA,
    Aggregator,
    Aksel,
    AutoGM,
    Bucketing,
    Bulyan,
    ByHeterogeneity,
    CenteredClip,
    Chain,
    CoordinateMedian,
    DnC,
    GeometricMedian,
    Krum,
    MajorityVote,
    MeaMed,
    Mean,
    MedianNormClipping,
    MoNNA,
    MultiKrum,
    Phocas,
    PreAggregator,
    SignGuard,
    SpectralFilter,
    StaticClipping,
    TrimmedMean,
)
from lightning_byz.algorithms import (
    EF14,
    Algorithm,
    ByzDIANA,
    ByzDM21,
    ByzEF21SGDM,
    ByzEF21SGDMBC,
    ByzVRDM21,
    ByzVRMarinaPP,
    ClippedDifferences,
    DeviationFilter,
    DStar,
    RobustSGD,
    SignSGDMajorityVote,
)
from lightning_byz.attacks import (
    ALIE,
    IPM,
    AntiCGE,
    Attack,
    BitFlip,
    FlippedBit,
    FoE,
    Gaussian,
    Huge,
    Infinity,
    LineSearch,
    Mimic,
    MinMax,
    MinSum,
    Mixture,
    NotANumber,
    OptimizedALIE,
    OptimizedIPM,
    RandomSign,
    Scene,
    ShiftBack,
    SignFlip,
    Stuck,
    WorstLie,
    WrongScale,
    Zero,
)
from lightning_byz.compressors import (
    QSGD,
    BFloat16,
    Compressor,
    Contractive,
    ContractiveRandK,
    Float16,
    Identity,
    LowRank,
    NaturalCompression,
    PerShard,
    PerTensor,
    RandK,
    ScaledSign,
    Sign,
    TernGrad,
    TopK,
)
from lightning_byz.engine.adversary import Adversary
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.simulation import Simulation

laws = settings(
    derandomize=True,
    deadline=None,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
"""Hypothesis without chance: the same examples in every run."""


def lied_to(
    exchange: Exchange,
    attack: Attack,
    workers: Sequence[int],
    active: Callable[[int], bool] = lambda step: True,
    x: Callable[[int], Tensor] | None = None,
) -> Exchange:
    """The exchange, in which these workers carry out the attack. Arguments as `Adversary`."""
    if not isinstance(exchange.simulation, Simulation):
        exchange.simulation = Simulation()
    exchange.simulation.adversaries.append(Adversary(attack, workers, active, x))
    return exchange


# -- rules -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RuleCase:
    """A rule, its definition as a slow loop, and what it claims.

    Attributes:
        robust: f arbitrary rows move it by no more than a constant of the honest spread.
        exact_ties: equal rows and equal distances are told apart as in the definition (the first
            row wins), also after rounding.
        unanimous: equal rows give that row.
        symmetric: the order of the rows does not matter.
        unique_from: the number of rows and columns from which its definition has one solution.
        tolerance: how closely it and the slow loop, both exact to rounding unless they iterate,
            agree.
        frozen: its value on `FROZEN_ROWS`, with f = 2.
        frozen_tolerance: how closely it gives that on every machine.
    """

    name: str
    rule: Aggregator
    oracle: oracles.Oracle
    frozen: tuple[float, ...]
    robust: bool = True
    exact_ties: bool = True
    translation_equivariant: bool = True
    scale_equivariant: bool = True
    unanimous: bool = True
    symmetric: bool = True
    unique_from: tuple[int, int] = (1, 1)
    tolerance: float = 1e-10
    frozen_tolerance: float = 1e-12


def nnm(rule: Aggregator, times: int = 1) -> Chain:
    return Chain(pre=(NNM(),) * times, rule=rule)


SPECTRAL = RuleCase(
    "spectral_filter",
    SpectralFilter(f=2),
    partial(oracles.spectral_filter, share=0.15, norm_floor=0.2),
    (1.3649693418939184, -1.4818570784283391, 1.472167712841813),
    exact_ties=False,
    unique_from=(3, 1),
    tolerance=1e-6,
    translation_equivariant=False,
)

RULES = [
    RuleCase("mean", Mean(), oracles.mean, (7 / 6, -23 / 18, 5 / 3), robust=False),
    RuleCase("median", CoordinateMedian(f=2), oracles.median, (1.5, -1.0, 2.0)),
    RuleCase("trimmed_mean", TrimmedMean(f=2), oracles.trimmed_mean, (1.25, -1.2, 2.0)),
    RuleCase("krum", Krum(f=2), oracles.krum, (0.5, -1.25, 2.0)),
    RuleCase("multi_krum", MultiKrum(f=2), oracles.multi_krum(), (1.35, -0.7, 2.55)),
    RuleCase("multi_krum_of_2", MultiKrum(f=2, m=2), oracles.multi_krum(2), (1.125, -1.875, 1.625)),
    RuleCase("meamed", MeaMed(f=2), oracles.meamed, (17 / 14, -17 / 14, 19 / 7)),
    RuleCase("phocas", Phocas(f=2), oracles.phocas, (17 / 14, -17 / 14, 19 / 7), exact_ties=False),
    RuleCase(
        "cge",
        CGE(f=2),
        oracles.cge,
        (17 / 14, -17 / 14, 25 / 14),
        translation_equivariant=False,
        exact_ties=False,
    ),
    RuleCase("faba", FABA(f=2), oracles.faba, (17 / 14, -17 / 14, 25 / 14), exact_ties=False),
    RuleCase(
        "aksel",
        Aksel(f=2),
        oracles.aksel(half=False),
        (17 / 14, -17 / 14, 25 / 14),
        exact_ties=False,
    ),
    RuleCase(
        "aksel_half",
        Aksel(f=2, half=True),
        oracles.aksel(half=True),
        (31 / 20, -9 / 5, 12 / 5),
        exact_ties=False,
    ),
    RuleCase(
        "geometric_median",
        GeometricMedian(f=2),
        oracles.geometric_median,
        (1.1048819001057253, -1.4103082321751594, 1.8080911627671001),
        exact_ties=False,
        unique_from=(3, 2),
        tolerance=1e-5,
    ),
    RuleCase(
        "rfa",
        GeometricMedian(f=2, iterations=8, nu=0.1, start="zero"),
        oracles.rfa(8, 0.1),
        (1.104678971314744, -1.4102051018538337, 1.8081878026132487),
        robust=False,
        translation_equivariant=False,
        scale_equivariant=False,
    ),
    RuleCase(
        "krum_byzfl",
        Krum(f=2, definition="byzfl"),
        oracles.krum_of(1, 2),
        (0.5, -1.25, 2.0),
        exact_ties=False,
    ),
    RuleCase(
        "krum_4th_powers",
        Krum(f=2, definition="vr_byzantine"),
        oracles.krum_of(2, 4),
        (0.5, -1.25, 2.0),
        exact_ties=False,
    ),
    RuleCase(
        "multi_krum_byzfl",
        MultiKrum(f=2, definition="byzfl"),
        oracles.krum_of(1, 2, 0),
        (1.214285714285714, -1.214285714285714, 1.785714285714286),
        robust=False,
    ),
    RuleCase(
        "multi_krum_unsquared",
        MultiKrum(f=2, definition="byzantine_momentum"),
        oracles.krum_of(1, 1, 2),
        (0.9500000000000001, -1.4, 2.0),
        exact_ties=False,
    ),
    RuleCase(
        "multi_krum_signsgd",
        MultiKrum(f=2, definition="signsgd"),
        oracles.krum_of(2, 1, 0),
        (1.214285714285714, -1.214285714285714, 1.785714285714286),
        robust=False,
    ),
    RuleCase("bulyan", Bulyan(f=1), oracles.bulyan, (1.25, -1.2, 2.0), exact_ties=False),
    RuleCase(
        "mda",
        MDA(f=2),
        oracles.mda,
        (1.214285714285714, -1.214285714285714, 1.785714285714286),
        exact_ties=False,
    ),
    RuleCase(
        "smea",
        SMEA(f=2),
        oracles.smea,
        (1.214285714285714, -1.214285714285714, 1.785714285714286),
        exact_ties=False,
        unique_from=(3, 1),
    ),
    RuleCase(
        "caf",
        CAF(f=2),
        oracles.caf,
        (1.176384524525057, -1.258895600763079, 1.828447100819241),
        exact_ties=False,
        unique_from=(3, 1),
        tolerance=1e-6,
    ),
    RuleCase(
        "caf_floor",
        CAF(f=2, norm_floor=0.9),
        partial(oracles.caf, norm_floor=0.9),
        (1.5323525456752916, -1.4512803565940944, 2.5979567675595283),
        exact_ties=False,
        unique_from=(3, 1),
        tolerance=1e-6,
        translation_equivariant=False,
    ),
    SPECTRAL,
    replace(
        SPECTRAL,
        name="spectral_filter_tight",
        rule=SpectralFilter(f=2, share=0.01, norm_floor=0.9),
        oracle=partial(oracles.spectral_filter, share=0.01, norm_floor=0.9),
        frozen=(1.6288908334211853, -1.6610336156119476, 1.7466633755469985),
    ),
    # nobody knows how unlike data are
    replace(SPECTRAL, name="by_heterogeneity", rule=ByHeterogeneity(f=2)),
    RuleCase(
        "dnc",
        DnC(f=2),
        oracles.dnc,
        (1.214285714285714, -1.214285714285714, 1.785714285714286),
        robust=False,
        exact_ties=False,
        unique_from=(3, 1),
    ),
    RuleCase(
        "monna",
        MoNNA(f=2),
        oracles.monna,
        (1.214285714285714, -1.214285714285714, 1.785714285714286),
        robust=False,
        exact_ties=False,
        symmetric=False,
    ),
    RuleCase(
        "centered_clip",
        CenteredClip(f=2, tau=2.0),
        oracles.centered_clip(2.0, 1),
        (0.5400456779175834, -0.5865023809084935, 0.7961239062745332),
        robust=False,
        translation_equivariant=False,
        scale_equivariant=False,
        unanimous=False,
    ),
    RuleCase(
        "centered_clip_from_median",
        CenteredClip(f=2, tau=2.0, iterations=3, start="median"),
        oracles.centered_clip(2.0, 3, oracles.median),
        (1.299634150338298, -1.342764480346427, 1.800778809091168),
        robust=False,
        scale_equivariant=False,
    ),
    RuleCase(
        "sign_guard",
        SignGuard(f=2),
        oracles.sign_guard,
        (0.5428891268509921, -0.7367990332528287, 2.120721212263811),
        robust=False,
        exact_ties=False,
        translation_equivariant=False,
    ),
    RuleCase(
        "auto_gm",
        AutoGM(f=2),
        oracles.auto_gm(),
        (1.75, -2.5, 1.25),  # one of the rows; its iterations end near it, where rounding says
        exact_ties=False,
        scale_equivariant=False,
        unique_from=(3, 2),
        tolerance=1e-4,
        frozen_tolerance=1e-7,
    ),
    RuleCase(
        "majority_vote",
        MajorityVote(f=2),
        oracles.majority_vote(1.0),
        (1.0, -1.0, 1.0),
        robust=False,
        translation_equivariant=False,
        scale_equivariant=False,
        unanimous=False,
    ),
    RuleCase(
        "clipping+median",
        Chain(pre=(StaticClipping(f=2, c=2.0),), rule=CoordinateMedian(f=2)),
        oracles.chain(oracles.clipped_to(lambda rows, f: 2.0), rule=oracles.median),
        (0.8173378965356998, -0.6488856845230502, 0.9790709277967582),
        translation_equivariant=False,
        scale_equivariant=False,
        unanimous=False,
    ),
    RuleCase(
        "median_norm_clipping+mean",
        Chain(pre=(MedianNormClipping(f=2),), rule=Mean()),
        oracles.chain(oracles.clipped_to(oracles.lower_median_norm), rule=oracles.mean),
        (0.8770178308485798, -0.9242637471300034, 1.2996460376029566),
        translation_equivariant=False,
    ),
    RuleCase(
        "arc+nnm+trimmed_mean",
        Chain(pre=(ARC(f=2), NNM(f=2)), rule=TrimmedMean(f=2)),
        oracles.chain(
            oracles.clipped_to(oracles.arc_limit), oracles.nnm, rule=oracles.trimmed_mean
        ),
        (1.3091214176444004, -1.4341704148954237, 1.6990528186842682),
        translation_equivariant=False,
        exact_ties=False,
    ),
    RuleCase(
        "bucketing+median",
        Chain(pre=(Bucketing(f=2),), rule=CoordinateMedian(f=2)),
        oracles.chain(oracles.bucketing(2), rule=oracles.median),
        (7 / 8, -5 / 2, 5 / 4),
        symmetric=False,
    ),
    RuleCase(
        "nnm+median",
        nnm(CoordinateMedian(f=2)),
        oracles.chain(oracles.nnm, rule=oracles.median),
        (17 / 14, -17 / 14, 25 / 14),
    ),
    RuleCase(
        "nnm+trimmed_mean",
        nnm(TrimmedMean(f=2)),
        oracles.chain(oracles.nnm, rule=oracles.trimmed_mean),
        (37 / 35, -79 / 70, 69 / 35),
    ),
    RuleCase(
        "nnm+krum",
        nnm(Krum(f=2)),
        oracles.chain(oracles.nnm, rule=oracles.krum),
        (17 / 14, -17 / 14, 25 / 14),
        exact_ties=False,
    ),
    RuleCase(
        "nnm+multi_krum",
        nnm(MultiKrum(f=2)),
        oracles.chain(oracles.nnm, rule=oracles.multi_krum()),
        (37 / 35, -79 / 70, 69 / 35),
        exact_ties=False,
    ),
    RuleCase(
        "nnm+nnm+median",
        nnm(CoordinateMedian(f=2), times=2),
        oracles.chain(oracles.nnm, oracles.nnm, rule=oracles.median),
        (209 / 196, -58 / 49, 94 / 49),
        exact_ties=False,
    ),
]
ROBUST_RULES = [case for case in RULES if case.robust]
PRE_AGGREGATORS: list[
    tuple[str, PreAggregator, Callable[[oracles.Matrix, int], oracles.Matrix]]
] = [("nnm", NNM(f=2), oracles.nnm)]

FROZEN_ROWS = (
    (0.5, -1.25, 2.0),
    (3.0, -0.75, 1.5),
    (0.25, -4.0, 2.25),
    (1.5, -1.0, -2.5),
    (-0.75, 1.5, 3.0),
    (2.25, -0.5, 5.0),
    (1.75, -2.5, 1.25),
    (-4.0, 2.0, 4.0),
    (6.0, -5.0, -1.5),
)


def rows_for(
    n: int,
    d: int,
    seed: int = 0,
    mean: float = 1.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Honest-looking rows ``[n, d]``: a common mean and a spread."""
    generator = torch.Generator().manual_seed(seed)
    return (mean + scale * torch.randn(n, d, generator=generator, dtype=torch.float64)).to(dtype)


JUNK: dict[str, Callable[[int, int, torch.dtype], Tensor]] = {
    "+1e30": lambda f, d, dtype: torch.full((f, d), 1e30, dtype=dtype),
    "-1e30": lambda f, d, dtype: torch.full((f, d), -1e30, dtype=dtype),
    "+inf": lambda f, d, dtype: torch.full((f, d), torch.inf, dtype=dtype),
    "-inf": lambda f, d, dtype: torch.full((f, d), -torch.inf, dtype=dtype),
    "nan": lambda f, d, dtype: torch.full((f, d), torch.nan, dtype=dtype),
    "one nan": lambda f, d, dtype: torch.cat(
        [torch.zeros(f, d - 1), torch.full((f, 1), torch.nan)], 1
    ).to(dtype),
    "+3e38": lambda f, d, dtype: torch.full((f, d), 3e38, dtype=dtype),
    "-3e38": lambda f, d, dtype: torch.full((f, d), -3e38, dtype=dtype),
    "3e38, signs alternate": lambda f, d, dtype: (
        3e38 * (-1.0) ** torch.arange(f)[:, None].expand(f, d)
    ).to(dtype),
    "the largest numbers": lambda f, d, dtype: (
        torch.finfo(dtype).max
        * (-1.0) ** torch.arange(f, dtype=torch.float64)[:, None].expand(f, d)
    ).to(dtype),
    "1e20": lambda f, d, dtype: torch.full((f, d), 1e20, dtype=dtype),
    "1e6, all the same": lambda f, d, dtype: rows_for(1, d, 99, 0.0, 1e6, dtype).expand(f, d),
    "30, all the same": lambda f, d, dtype: rows_for(1, d, 98, 0.0, 30.0, dtype).expand(f, d),
    "zeros": lambda f, d, dtype: torch.zeros(f, d, dtype=dtype),
    "one large coordinate": lambda f, d, dtype: torch.cat(
        [torch.full((f, 1), 1e15), torch.ones(f, d - 1)], 1
    ).to(dtype),
    "a different size each": lambda f, d, dtype: (
        (10.0 ** (5 * torch.arange(f, dtype=torch.float64) - 2))[:, None].expand(f, d).to(dtype)
    ),
    "nan and 1e30": lambda f, d, dtype: (
        torch.where(torch.arange(f)[:, None] % 2 == 0, torch.nan, 1e30).expand(f, d).to(dtype)
    ),
}


# -- compressors -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompressorCase:
    name: str
    compressor: Compressor
    sparse: bool = False
    random: bool = False
    tight: bool = True  # its variance is what it declares, not only bounded by it

    def of(self, dim: int) -> Compressor:
        """The compressor for vectors ``[dim]`` that are made of three tensors, one of them
        empty.
        """
        return self.compressor.for_sizes((dim // 3, 0, dim - dim // 3))


COMPRESSORS = [
    CompressorCase("identity", Identity()),
    CompressorCase("top_k_ratio", TopK(ratio=0.2), sparse=True),
    CompressorCase("top_3", TopK(k=3), sparse=True),
    # drawn from a permutation
    CompressorCase("rand_k_ratio", RandK(ratio=0.4), sparse=True, random=True),
    # drawn one by one where d >= 12
    CompressorCase("rand_3", RandK(k=3), sparse=True, random=True),
    CompressorCase("rand_3_contractive", ContractiveRandK(k=3), sparse=True, random=True),
    CompressorCase("rand_k_everything", RandK(ratio=1.0), sparse=True, random=True),
    CompressorCase("sign", Sign()),
    CompressorCase("scaled_sign", ScaledSign()),
    CompressorCase("qsgd_1", QSGD(levels=1), random=True, tight=False),
    CompressorCase("qsgd_7", QSGD(levels=7), random=True, tight=False),
    CompressorCase("qsgd_100", QSGD(levels=100), random=True, tight=False),
    CompressorCase("terngrad", TernGrad(), random=True, tight=False),
    CompressorCase("natural", NaturalCompression(), random=True, tight=False),
    CompressorCase("float16", Float16()),
    CompressorCase("bfloat16", BFloat16()),
    CompressorCase("contractive_qsgd", Contractive(QSGD(levels=7)), random=True),
    CompressorCase("contractive_rand_k", Contractive(RandK(k=3)), random=True),
    CompressorCase("rank_1", LowRank(rank=1), random=True),
    CompressorCase("rank_2_twice", LowRank(rank=2, iterations=2), random=True),
    CompressorCase("top_k_per_tensor", PerTensor(TopK(ratio=0.2))),
    CompressorCase("rand_k_per_tensor", PerTensor(RandK(k=2)), random=True, tight=False),
    CompressorCase("low_rank_per_tensor", PerTensor(LowRank(rank=1)), random=True),
    CompressorCase("top_k_per_shard", PerShard(TopK(ratio=0.2), shards=3)),
    CompressorCase(
        "contractive_qsgd_per_shard", Contractive(PerShard(QSGD(levels=7), shards=3)), random=True
    ),
]


# -- attacks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """A rule and a setting that an attack must damage: b of n workers, honest rows of mean 1 and
    the given spread.

    Attributes:
        error: ``||result - honest mean|| / ||honest mean||`` is at least this.
        reverses: the result points away from the honest mean, and along it if nobody lies. If
            False, the error is twice what it is if nobody lies, or more.
    """

    rule: Callable[[Tensor], Tensor]
    n: int
    b: int
    spread: float
    error: float
    reverses: bool = False


@dataclass(frozen=True)
class AttackCase:
    name: str
    attack: Attack
    damage: Damage
    # the common message, from the honest rows; None: see the tests
    formula: Callable[[Tensor], Tensor] | None = None
    random: bool = False
    # what it remembers of rounds before
    memory: Callable[[Tensor], dict[str, Tensor]] = lambda own: {}


def scene_of(
    case: AttackCase,
    honest: Tensor,
    own: Tensor,
    seed: int = 0,
    rule: Callable[[Tensor], Tensor] | None = None,
) -> Scene:
    """What the attackers see: the server's rule (a mean), and a model that gradients of mean 1 have
    brought from 0 to -10.
    """
    rule = rule or without_border
    return Scene(
        generator=torch.Generator().manual_seed(seed),
        aggregate=lambda lies: rule(torch.cat([lies, honest])),
        x=lambda: torch.full_like(honest[0], -10.0),
        memory=case.memory(own),
    )


def without_border(rows: Tensor) -> Tensor:
    """An average that looks at nothing before it adds up."""
    return rows.mean(0)


ATTACKS = [
    AttackCase("sign_flip", SignFlip(), Damage(Mean(), 10, 3, 0.5, 0.5), lambda h: -h.mean(0)),
    AttackCase(
        "sign_flip_x10",
        SignFlip(scale=10),
        Damage(Mean(), 10, 3, 0.5, 3.0, True),
        lambda h: -10 * h.mean(0),
    ),
    AttackCase(
        "ipm_0.1", IPM(), Damage(Krum(f=8), 20, 8, 2.0, 1.05, True), lambda h: -0.1 * h.mean(0)
    ),
    AttackCase(
        "ipm_0.1_median",
        IPM(0.1),
        Damage(CoordinateMedian(f=8), 20, 8, 1.0, 0.5),
        lambda h: -0.1 * h.mean(0),
    ),
    AttackCase("ipm_3", IPM(3.0), Damage(Mean(), 10, 3, 0.5, 1.1, True), lambda h: -3 * h.mean(0)),
    AttackCase(
        "alie_1.5",
        ALIE(z=1.5),
        Damage(Krum(f=8), 20, 8, 4.0, 3.5, True),
        lambda h: h.mean(0) - 1.5 * h.std(0),
    ),
    AttackCase(
        "alie_1.5_median",
        ALIE(z=1.5),
        Damage(CoordinateMedian(f=8), 20, 8, 1.0, 0.8),
        lambda h: h.mean(0) - 1.5 * h.std(0),
    ),
    AttackCase("alie_formula", ALIE(), Damage(CoordinateMedian(f=9), 20, 9, 1.0, 0.6)),
    AttackCase("gaussian", Gaussian(std=100.0), Damage(Mean(), 10, 3, 0.5, 5.0), random=True),
    AttackCase(
        "gaussian_shifted", Gaussian(mean=-10.0), Damage(Mean(), 10, 3, 0.5, 2.0, True), random=True
    ),
    AttackCase("zero", Zero(), Damage(Mean(), 10, 3, 0.5, 0.28), lambda h: 0 * h[0]),
    AttackCase("bit_flip", BitFlip(), Damage(Mean(), 10, 3, 0.5, 0.5)),
    AttackCase("random_sign", RandomSign(), Damage(Mean(), 10, 3, 0.5, 0.3), random=True),
    AttackCase("min_max_std", MinMax(), Damage(CoordinateMedian(f=8), 20, 8, 2.0, 1.3, True)),
    AttackCase("min_max_sign", MinMax("sign"), Damage(TrimmedMean(f=8), 20, 8, 2.0, 1.2, True)),
    AttackCase("min_max_unit", MinMax("unit"), Damage(Krum(f=8), 20, 8, 2.0, 1.6, True)),
    AttackCase("min_sum_std", MinSum(), Damage(CoordinateMedian(f=8), 20, 8, 2.0, 1.2, True)),
    AttackCase("min_sum_unit", MinSum("unit"), Damage(Krum(f=8), 20, 8, 2.0, 1.3, True)),
    AttackCase(
        "min_sum_max", MinSum("unit", bound="max"), Damage(TrimmedMean(f=8), 20, 8, 2.0, 1.0, True)
    ),
    AttackCase("huge", Huge(), Damage(without_border, 10, 1, 0.5, 1e28), lambda h: 0 * h[0] + 1e30),
    AttackCase("infinity", Infinity(), Damage(without_border, 10, 1, 0.5, 1e300)),
    AttackCase(
        "minus_infinity", Infinity(negative=True), Damage(without_border, 10, 1, 0.5, 1e300)
    ),
    AttackCase("not_a_number", NotANumber(), Damage(without_border, 10, 1, 0.5, torch.inf)),
    AttackCase("anti_cge", AntiCGE(), Damage(CGE(f=8), 20, 8, 1.0, 1.0, True)),
    AttackCase("foe", FoE(), Damage(CoordinateMedian(f=8), 20, 8, 1.0, 0.5)),
    AttackCase("optimized_ipm", OptimizedIPM(), Damage(CoordinateMedian(f=8), 20, 8, 1.0, 0.5)),
    AttackCase(
        "optimized_alie", OptimizedALIE(), Damage(CoordinateMedian(f=8), 20, 8, 2.0, 1.0, True)
    ),
    AttackCase(
        "optimized_alie_nnm",
        OptimizedALIE(LineSearch(), negative=False),
        Damage(nnm(TrimmedMean(f=8)), 20, 8, 1.0, 0.5),
    ),
    AttackCase("worst_lie", WorstLie(), Damage(CoordinateMedian(f=8), 20, 8, 1.0, 0.5)),
    AttackCase(
        "worst_lie_drift",
        WorstLie("drift"),
        Damage(Mean(), 10, 3, 0.5, 2.0, True),
        memory=lambda own: {"x_0": torch.zeros_like(own.new_empty(own.shape[1]))},
    ),
    AttackCase("mimic", Mimic(), Damage(TrimmedMean(f=8), 20, 8, 4.0, 1.0)),
    AttackCase("mimic_the_third", Mimic(target=2), Damage(TrimmedMean(f=8), 20, 8, 4.0, 1.0)),
    AttackCase(
        "shift_back",
        ShiftBack(),
        Damage(CoordinateMedian(f=2), 5, 3, 0.5, 5.0, True),
        memory=lambda own: {"x_0": torch.zeros_like(own.new_empty(own.shape[1]))},
    ),
    AttackCase(
        "mixture", Mixture((SignFlip(scale=10), Zero())), Damage(Mean(), 10, 3, 0.5, 2.0, True)
    ),
    AttackCase(
        "mixture_of_mixtures",
        Mixture((Mixture((OptimizedALIE(),)), Gaussian(std=100.0))),
        Damage(Mean(), 20, 8, 2.0, 100.0, True),
        random=True,
    ),
    # faults
    AttackCase("flipped_bit", FlippedBit(), Damage(without_border, 10, 1, 0.2, 1e20), random=True),
    AttackCase(
        "stuck",
        Stuck(),
        Damage(Mean(), 10, 3, 0.5, 1.0),
        memory=lambda own: {str(i): torch.full_like(row, -5.0) for i, row in enumerate(own)},
    ),
    AttackCase("wrong_scale", WrongScale(), Damage(Mean(), 10, 1, 0.5, 1000.0)),
]


# -- algorithms ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AlgorithmCase:
    """An algorithm for 9 workers.

    Attributes:
        tolerates: the attacks, by name, of 2 of 9 workers under which it reaches the optimum of a
            quadratic; None: all.
        lr: its learning rate there, and by what it shrinks in every step.
    """

    name: str
    algorithm: Algorithm
    tolerates: Sequence[str] | None = None
    lr: tuple[float, float] = (0.15, 1.0)


def robust(f: int = 2) -> Chain:
    return Chain(pre=(NNM(),), rule=TrimmedMean(), f=f)


ALGORITHMS = [
    AlgorithmCase("sgd", RobustSGD(Mean()), tolerates=()),
    AlgorithmCase("robust_sgd", RobustSGD(robust())),
    AlgorithmCase("robust_sgd_half_worker_momentum", RobustSGD(robust(), worker_momentum=0.5)),
    AlgorithmCase("robust_sgd_median", RobustSGD(CoordinateMedian(f=2))),
    AlgorithmCase("robust_sgd_worker_momentum", RobustSGD(robust(), worker_momentum=0.9)),
    AlgorithmCase("robust_sgd_server_momentum", RobustSGD(robust(), server_momentum=0.9)),
    AlgorithmCase("robust_sgd_both", RobustSGD(robust(), worker_momentum=0.5, server_momentum=0.5)),
    AlgorithmCase(
        "robust_sgd_undone", RobustSGD(robust(), worker_momentum=0.9, undo_worker_momentum=True)
    ),
    AlgorithmCase(
        "robust_sgd_undone_then_server",
        RobustSGD(robust(), worker_momentum=0.5, server_momentum=0.5, undo_worker_momentum=True),
    ),
    AlgorithmCase("robust_sgd_rand_k", RobustSGD(robust(), RandK(ratio=0.5)), tolerates=()),
    AlgorithmCase("ef21_identity", ByzEF21SGDM(robust(), Identity(), eta=0.2)),
    AlgorithmCase("ef21_top_k", ByzEF21SGDM(robust(), TopK(ratio=0.3), eta=0.2)),
    AlgorithmCase(
        "ef21_top_1_no_momentum", ByzEF21SGDM(robust(), TopK(k=1), eta=1.0), tolerates=()
    ),
    AlgorithmCase("ef21_rand_k", ByzEF21SGDM(robust(), ContractiveRandK(ratio=0.5), eta=0.2)),
    AlgorithmCase("ef21_scaled_sign", ByzEF21SGDM(robust(), ScaledSign(), eta=0.2), tolerates=()),
    AlgorithmCase("ef21_low_rank", ByzEF21SGDM(robust(), LowRank(rank=2), eta=0.2), tolerates=()),
    AlgorithmCase("ef21_bc", ByzEF21SGDMBC(robust(), TopK(ratio=0.3), 0.2, TopK(ratio=0.4))),
    AlgorithmCase(
        "ef21_bc_median",
        ByzEF21SGDMBC(CoordinateMedian(f=2), TopK(k=4), 0.2, TopK(k=2)),
        tolerates=(),
    ),
    AlgorithmCase("ef21_bc_down_only", ByzEF21SGDMBC(robust(), Identity(), 0.2, TopK(ratio=0.5))),
    AlgorithmCase("ef14_top_k", EF14(robust(), TopK(ratio=0.3)), tolerates=()),
    AlgorithmCase("ef14_mean", EF14(Mean(), ScaledSign()), tolerates=()),
    AlgorithmCase("ef21_mean", ByzEF21SGDM(Mean(), TopK(ratio=0.3), eta=0.2), tolerates=()),
    AlgorithmCase("diana_identity", ByzDIANA(robust(), Identity(), alpha=0.5)),
    AlgorithmCase("diana_rand_k", ByzDIANA(robust(), RandK(ratio=0.5), alpha=0.5), tolerates=()),
    AlgorithmCase("diana_qsgd", ByzDIANA(robust(), QSGD(levels=7), alpha=0.5)),
    AlgorithmCase("dm21_identity", ByzDM21(robust(), Identity(), eta=0.5)),
    AlgorithmCase("dm21_top_k", ByzDM21(robust(), TopK(ratio=0.3), eta=0.5)),
    AlgorithmCase("vr_dm21_top_k", ByzVRDM21(robust(), TopK(ratio=0.3), eta=0.3)),
    AlgorithmCase("dstar", DStar(DeviationFilter(f=2))),
    AlgorithmCase(
        "dstar_5_geometric_median", DStar(DeviationFilter(f=2, center="geometric_median"), k=5)
    ),
    AlgorithmCase("dstar_all", DStar(DeviationFilter(f=2, tolerance=1.0), k=9)),
    AlgorithmCase("dstar_krum", DStar(Krum(f=2), k=8)),
    AlgorithmCase("marina", ByzVRMarinaPP(robust(), p=0.3, clipping=None)),
    AlgorithmCase(
        "marina_qsgd", ByzVRMarinaPP(robust(), compressor=QSGD(levels=7), p=0.3, clipping=None)
    ),
    AlgorithmCase("marina_pp", ByzVRMarinaPP(robust(), p=0.3, cohort_size=4, clipping=1.0)),
    AlgorithmCase(
        "marina_pp_plus",
        ByzVRMarinaPP(robust(), p=0.3, cohort_size=4, clipping=1.0, average_differences=True),
    ),
    AlgorithmCase(
        "marina_pp_rand_k",
        ByzVRMarinaPP(robust(), CoordinateMedian(f=2), RandK(ratio=0.5), 0.3, 6, 8, 1.0),
    ),
    AlgorithmCase(
        "marina_pp_estimate",
        ByzVRMarinaPP(
            robust(), p=0.3, cohort_size=5, clipping=0.15, clipping_unit="estimate", full_batches=2
        ),
    ),
    AlgorithmCase(
        "clipped_differences",
        ClippedDifferences(RobustSGD(robust(), worker_momentum=0.5), cohort_size=6),
    ),
    AlgorithmCase(
        "clipped_differences_by_drift",
        ClippedDifferences(
            RobustSGD(robust(), worker_momentum=0.5), CoordinateMedian(f=2), 6, 3.0, "drift"
        ),
    ),
    AlgorithmCase("signsgd", SignSGDMajorityVote(MajorityVote(f=2), momentum=0.0), lr=(0.4, 0.95)),
    AlgorithmCase("signum", SignSGDMajorityVote(MajorityVote(f=2), momentum=0.5), lr=(0.4, 0.95)),
    AlgorithmCase(
        "signum_abstain", SignSGDMajorityVote(MajorityVote(f=2), 0.5, "abstain"), lr=(0.4, 0.95)
    ),
    AlgorithmCase(
        "signum_ties",
        SignSGDMajorityVote(MajorityVote(f=2, tie="zero"), 0.5, "random"),
        lr=(0.4, 0.95),
    ),
]


# -- for parametrize -------------------------------------------------------------------------------


def each(cases: Sequence[Any]) -> pytest.MarkDecorator:
    """``@each(RULES)``: the test runs with every ``case``."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])
