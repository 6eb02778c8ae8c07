"""The sequential test of suspicion: its false-alarm rate, how soon it finds faults, and the sketches that it looks at."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_byz.sketch import Sketch
from lightning_byz.suspicion import SuspicionTest


def draw(n: int, d: int, generator: torch.Generator, noise: float = 1.0) -> Tensor:
    """Rows of mean 1 / sqrt(d) (a vector of norm 1) and of noise."""
    return torch.full((n, d), d**-0.5) + noise * torch.randn(n, d, generator=generator) * d**-0.5


# -- sketches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [50, 64, 5000, 64 * 70 + 3])
def test_a_sketch_keeps_distances(dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, dim, generator=generator)
    errors = []
    for seed in range(20):
        sketch = Sketch(dim, 64, seed)
        out = sketch.new(6, device=rows.device)
        for first in range(0, dim, 700):
            sketch.add(out, rows[:, first : first + 700], first)
        one = sketch.new(device=rows.device)
        for first in range(0, dim, 700):
            sketch.add(one, rows[0, first : first + 700], first)
        assert torch.equal(one, out[0])
        ratio = torch.pdist(out.double()).square() / torch.pdist(rows.double()).square()
        errors.append(ratio)
    together = torch.stack(errors)
    if dim <= 64:
        torch.testing.assert_close(together, torch.ones_like(together))
    else:
        assert float((together.mean(0) - 1).abs().max()) < 4 * (2 / 64 / 20) ** 0.5
        assert float(together.std()) < 2 * (2 / 64) ** 0.5


def test_a_sketch_is_linear_and_sees_a_single_number() -> None:
    sketch = Sketch(10_000, 64)
    x, y = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(1))

    def of(vector: Tensor) -> Tensor:
        out = sketch.new(device=vector.device)
        sketch.add(out, vector, 0)
        return out

    torch.testing.assert_close(of(x + 3 * y), of(x) + 3 * of(y), atol=1e-4, rtol=1e-4)
    x[7777] = 1e30
    assert float(of(x).double().norm()) == pytest.approx(1e30)


# -- honest workers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.2, 0.01])
def test_honest_workers_are_accused_no_more_often_than_said(rate: float) -> None:
    alarms, runs = 0, 40
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        test = SuspicionTest(5, 1, rate)
        alarms += any(map(test.observe, [draw(5, 16, generator) for _ in range(100)]))
    assert alarms <= runs * rate + 2 * math.sqrt(runs * rate * (1 - rate))


def test_the_wealth_of_bets_against_honest_workers_does_not_grow_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    evidence = []
    for _ in range(300):
        test = SuspicionTest(4, 1)
        for _ in range(8):
            test.observe(draw(4, 8, generator))
        evidence.append(test.evidence.mean())
    assert float(torch.stack(evidence).mean()) < 0.62  # of the two tests' 1/2 each: the larger one


def test_a_liar_cannot_frame_an_honest_worker() -> None:
    """One that is always the least extreme leaves three to share the other places."""
    framed = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        test = SuspicionTest(4, 1, 0.1)
        for _ in range(150):
            rows = draw(4, 16, generator)
            rows[3] = rows[:3].mean(0)
            test.observe(rows)
        framed += bool(test.accused - {3})
        assert 3 in test.accused
    assert framed <= 2 + 2 * math.sqrt(1.8)


def test_different_data_need_a_past_of_their_own() -> None:
    def accused(compare: str, fault: bool) -> set[int]:
        generator = torch.Generator().manual_seed(1)
        own = 2 * torch.randn(8, 32, generator=torch.Generator().manual_seed(9)) * 32**-0.5
        test = SuspicionTest(8, 2, compare=compare)  # type: ignore[arg-type]
        for step in range(160):
            rows = draw(8, 32, generator, noise=0.5) * torch.linspace(0.5, 2, 8)[:, None] + own
            if fault and step >= 80:
                rows[2] *= 5
            test.observe(rows)
        return test.accused

    assert len(accused("others", False)) > 0  # the assumption does not hold, and it shows
    assert accused("own_past", False) == set()
    assert accused("own_past", True) == {2}


# -- faults ---------------------------------------------------------------------------------------------------------------


def pairs_to_find(fault: str, onset: int, n: int = 8, f: int = 2, seed: int = 0) -> int | None:
    """How many pairs of rounds after its onset worker 1 is accused; None: never, or somebody else is."""
    generator = torch.Generator().manual_seed(seed)
    test, held = SuspicionTest(n, f), torch.zeros(32)
    for step in range(2 * (onset + 40)):
        rows = draw(n, 32, generator)
        if step < 2 * onset:
            held = rows[1].clone()
        elif fault == "scale":
            rows[1] *= 65536
        elif fault == "half":
            rows[1] *= 0.5
        elif fault == "nan":
            rows[1, 3] = torch.nan
        elif fault == "bit":
            rows[1, step % 32] *= 2.0**100
        elif fault == "labels":
            rows[1] -= 2 * torch.full((32,), 32**-0.5)
        elif fault == "stuck":
            rows[1] = held
        new = test.observe(rows)
        if new:
            return (step - 2 * onset) // 2 if new == [1] and step >= 2 * onset else None
    return None


@pytest.mark.parametrize("onset", [1, 30])
@pytest.mark.parametrize(("fault", "within"), [("scale", 2), ("nan", 2), ("bit", 2), ("stuck", 15), ("labels", 15), ("half", 15)])
def test_faults_are_found_soon(fault: str, within: int, onset: int) -> None:
    found = pairs_to_find(fault, onset)
    assert found is not None
    assert found <= within


def test_an_overflow_of_all_is_nobodys_fault() -> None:
    generator = torch.Generator().manual_seed(0)
    test = SuspicionTest(4, 1)
    for step in range(40):
        rows = draw(4, 8, generator)
        if step % 3 == 0:
            rows[1:] = torch.inf
        test.observe(rows)
    assert test.accused == set()


def test_equal_rows_accuse_nobody() -> None:
    test = SuspicionTest(4, 1)
    for _ in range(100):
        test.observe(torch.ones(4, 3))
        test.observe(torch.zeros(4, 3))
    assert test.accused == set()


# -- what users decide, and checkpoints -----------------------------------------------------------------------------------


def test_quarantine_and_back() -> None:
    generator = torch.Generator().manual_seed(0)
    test = SuspicionTest(7, 2)

    def go(steps: int, liars: tuple[int, ...]) -> set[int]:
        found: set[int] = set()
        for _ in range(steps):
            rows = draw(7, 32, generator)
            for liar in liars:
                rows[liar] *= -4
            found.update(test.observe(rows))
        return found

    assert go(40, (3,)) == {3}
    test.exclude(3)
    assert go(60, (3, 5)) == {5}  # 3 counts no more, and 5 alone is as many as are left to be found
    test.readmit(3)
    assert float(test.scores[3]) == 0
    assert go(40, ()) == set()
    assert go(60, (3,)) == {3}


@pytest.mark.parametrize("compare", ["others", "own_past"])
def test_what_it_knows_survives_a_checkpoint(compare: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rounds = [draw(5, 16, generator) for _ in range(60)]
    straight, resumed = SuspicionTest(5, 1, compare=compare), SuspicionTest(5, 1, compare=compare)  # type: ignore[arg-type]
    for rows in rounds[:40]:
        straight.observe(rows)
    resumed.load_state_dict(straight.state_dict())
    for rows in rounds[40:]:
        straight.observe(rows)
        resumed.observe(rows)
    assert torch.equal(straight.evidence, resumed.evidence)
    fresh = SuspicionTest(5, 1, compare=compare)  # type: ignore[arg-type]
    for rows in rounds[40:]:
        fresh.observe(rows)
    assert not torch.equal(straight.evidence, fresh.evidence)
    with pytest.raises(ValueError, match="should be of n=6"):
        SuspicionTest(6, 1).load_state_dict(straight.state_dict())


def test_what_it_refuses() -> None:
    for n, f in ((2, 1), (4, 2), (4, 0)):
        with pytest.raises(ValueError, match="1 <= f < n / 2"):
            SuspicionTest(n, f)
    with pytest.raises(ValueError, match="should be in"):
        SuspicionTest(4, 1, false_alarm_rate=1.0)
    with pytest.raises(ValueError, match="should be one of others, own_past"):
        SuspicionTest(4, 1, compare="friends")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="above 1"):
        SuspicionTest(4, 1, gross=1.0)
