"""Agreement with ByzFL wherever the definitions agree, on random asymmetric rows; runs where
``byzfl`` is installed (dev extra).

CAF is not here: ByzFL takes one step of a power iteration from a random start for the direction of
largest variance, and two calls on the same rows differ.
"""

import itertools

import pytest
import torch
from zoo import rows_for

from lightning_byz.aggregators import (
    ARC,
    MDA,
    NNM,
    SMEA,
    CenteredClip,
    Chain,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MeaMed,
    Mean,
    MoNNA,
    MultiKrum,
    StaticClipping,
    TrimmedMean,
)
from lightning_byz.attacks import ALIE, IPM, SignFlip
from lightning_byz.numerics.rows import Rows

byzfl = pytest.importorskip("byzfl")

N, F, D = 11, 3, 17
RULES = {
    "Average": (Mean(), lambda: byzfl.Average()),
    "Median": (CoordinateMedian(f=F), lambda: byzfl.Median()),
    "TrMean": (TrimmedMean(f=F), lambda: byzfl.TrMean(f=F)),
    "GeometricMedian": (
        GeometricMedian(f=F, definition="byzfl"),
        lambda: byzfl.GeometricMedian(nu=0.1, T=3),
    ),
    "Krum": (Krum(f=F, definition="byzfl"), lambda: byzfl.Krum(f=F)),
    "MultiKrum": (MultiKrum(f=F, definition="byzfl"), lambda: byzfl.MultiKrum(f=F)),
    "CenteredClipping": (
        CenteredClip(f=F, tau=3.0, iterations=2),
        lambda: byzfl.CenteredClipping(m=None, L=2, tau=3.0),
    ),
    "MDA": (MDA(f=F), lambda: byzfl.MDA(f=F)),
    "MoNNA": (MoNNA(f=F, trusted=2), lambda: byzfl.MoNNA(f=F, idx=2)),
    "Meamed": (MeaMed(f=F), lambda: byzfl.Meamed(f=F)),
}
PRE = {
    "NNM": (NNM(f=F), lambda: byzfl.NNM(f=F)),
    "Clipping": (StaticClipping(f=F, c=4.0), lambda: byzfl.Clipping(c=4.0)),
    "ARC": (ARC(f=F), lambda: byzfl.ARC(f=F)),
}


def rows(seed):
    """Rows of unlike sizes around a mean, with f of them elsewhere."""
    x = rows_for(N, D, seed) * torch.linspace(0.5, 2.0, N, dtype=torch.float64)[:, None]
    x[:F] += 3.0 * rows_for(1, D, seed + 100)[0]
    return x


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", RULES)
def test_rules_agree_with_byzfl(name, seed):
    ours, theirs = RULES[name]
    x = rows(seed)
    expected = torch.as_tensor(theirs()(x.clone()))
    torch.testing.assert_close(ours(x), expected.to(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", PRE)
def test_pre_aggregations_agree_with_byzfl(name, seed):
    ours, theirs = PRE[name]
    x = rows(seed)
    torch.testing.assert_close(
        ours(Rows(x)).dense(), torch.as_tensor(theirs()(x.clone())).to(x), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("seed", range(5))
def test_smea_finds_a_subset_at_least_as_good_as_byzfls(seed):
    """ByzFL estimates the eigenvalue by one random step, so it may pick another subset; never a
    better one.
    """
    x = rows(seed)

    def spread(mean):
        for subset in itertools.combinations(range(N), N - F):
            if torch.allclose(x[list(subset)].mean(0), mean, atol=1e-9):
                centred = x[list(subset)] - x[list(subset)].mean(0)
                return float(torch.linalg.eigvalsh(centred @ centred.T)[-1])
        raise AssertionError("not the mean of n - f rows")

    assert spread(SMEA(f=F)(x)) <= spread(torch.as_tensor(byzfl.SMEA(f=F)(x.clone())).to(x)) + 1e-9


def test_a_chain_agrees_with_byzfls_pipeline():
    x = rows(7)
    theirs = byzfl.TrMean(f=F)(byzfl.NNM(f=F)(x.clone()))
    torch.testing.assert_close(
        Chain(pre=(NNM(),), rule=TrimmedMean(), f=F)(x),
        torch.as_tensor(theirs).to(x),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SignFlip(), lambda: byzfl.SignFlipping()),
        (IPM(2.0), lambda: byzfl.InnerProductManipulation(tau=2.0)),
        (ALIE(z=-1.5), lambda: byzfl.ALittleIsEnough(tau=1.5)),
    ],
    ids=["SignFlipping", "InnerProductManipulation", "ALittleIsEnough"],
)
def test_attacks_agree_with_byzfl(ours, theirs):
    honest = rows(1)
    torch.testing.assert_close(
        ours(honest, honest[:2])[0],
        torch.as_tensor(theirs()(honest.clone())).to(honest),
        rtol=1e-6,
        atol=1e-6,
    )
