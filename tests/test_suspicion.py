"""The sequential test of suspicion: its false-alarm rate, how soon it finds faults, and the
sketches that it looks at.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from zoo import laws

from lightning_byz.diagnostics.sketch import Sketch
from lightning_byz.diagnostics.suspicion import SuspicionTest


def draw(n: int, d: int, generator: torch.Generator, noise: float = 1.0) -> Tensor:
    """Rows of mean 1 / sqrt(d) (a vector of norm 1) and of noise."""
    return torch.full((n, d), d**-0.5) + noise * torch.randn(n, d, generator=generator) * d**-0.5


# -- sketches --------------------------------------------------------------------------------------


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


# -- honest workers --------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("rate", [0.2, 0.01])
def test_honest_workers_are_accused_no_more_often_than_said(rate: float) -> None:
    alarms, runs = 0, 40
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        test = SuspicionTest(5, 1, rate)
        alarms += any(map(test.observe, [draw(5, 16, generator) for _ in range(100)]))
    assert alarms <= runs * rate + 2 * math.sqrt(runs * rate * (1 - rate))


@pytest.mark.thorough
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


@pytest.mark.parametrize("kappa", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(("n", "f"), [(5, 1), (7, 3), (10, 3)])
def test_colluders_that_know_everybodys_rows_cannot_frame_an_honest_worker(
    n: int, f: int, kappa: float
) -> None:
    """They subtract a part of its noise from what an honest worker would send, or add it, or sit
    next to everybody else.
    """
    framed, runs = 0, 4
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        test = SuspicionTest(n, f, 0.1)
        for _ in range(60):
            rows = draw(n, 256, generator)
            noise = rows[0] - rows[: n - f].mean(0)
            rows[n - f :] = rows[n - f :] * (1 - kappa**2) ** 0.5 + kappa * (
                (-1) ** seed * noise if seed < 2 else rows[1] - noise
            )
            test.observe(rows)
        framed += bool(test.accused & set(range(n - f)))
    assert framed <= runs * 0.1 + 2 * math.sqrt(runs * 0.1 * 0.9)


def lies(honest: Tensor, f: int, kind: int, generator: torch.Generator) -> Tensor:
    """f rows ``[f, d]`` of workers that know the honest ones ``[h, d]``, and want worker 0 to look
    odd.
    """
    noise = honest[0] - honest.mean(0)
    if kind == 0:
        return honest[1:].mean(0) - 3 * noise + torch.randn(f, len(noise), generator=generator)
    if kind == 1:  # next to the others
        return honest[1 : 1 + f].clone() if len(honest) > f else honest[1:2].repeat(f, 1)
    if kind == 2:
        return torch.full((f, len(noise)), torch.nan)
    if kind == 3:
        return honest[0].repeat(f, 1)
    if kind == 4:
        return 1e30 * honest[1].repeat(f, 1)
    return torch.zeros(f, len(noise))


@laws
@given(
    st.integers(0, 10**6),
    st.sampled_from([(4, 1), (5, 2), (7, 2), (9, 4)]),
    st.integers(0, 5),
    st.sampled_from([1, 3, 40]),
)
def test_who_is_surely_extreme_is_extreme_among_the_honest(
    seed: int, sizes: tuple[int, int], kind: int, d: int
) -> None:
    """What the false-alarm rate rests on: whatever f rows hold, a won bet is won among the honest
    workers alone.
    """
    n, f = sizes
    generator = torch.Generator().manual_seed(seed)
    pair = []
    for _ in range(2):
        honest = torch.randn(n - f, d, generator=generator).round(decimals=1)  # with ties
        pair.append(torch.cat([honest, lies(honest, f, kind, generator)]))
    test = SuspicionTest(n, f)
    for rows in pair:
        test.observe(rows)
    if not test._shown:
        return
    _, won = test._shown[-1]
    # the honest workers' numbers, without the others
    table = torch.zeros(n - f, 4, dtype=torch.float64)
    a, b = (rows[: n - f].double() for rows in pair)
    for i in range(n - f):
        partners = [k for k in range(n - f) if k != i]
        for rows in (a, b):
            for k in partners:
                apart, sides = (
                    float((rows[i] - rows[k]).norm()),
                    float(rows[i].norm() * rows[k].norm()),
                )
                table[i, 0] += math.log(apart) if apart > 1e-6 else -1e6
                table[i, 1] += float(rows[i] @ rows[k]) / sides if sides else 0.0
            table[i, 2] += math.log(float(rows[i].norm())) if float(rows[i].norm()) else -1e6
        table[i, 3] = float((a[i] - b[i]).norm())
    for statistic in range(4):
        column = table[:, statistic]
        for side, ahead in enumerate(
            (column[None, :] >= column[:, None] - 1e-9, column[None, :] <= column[:, None] + 1e-9)
        ):
            place = ahead.sum(1)  # with itself
            for size in range(f):
                assert bool((place[won[: n - f, statistic, side, size]] <= size + 1).all()), (
                    statistic,
                    side,
                    size,
                )


def test_of_three_workers_directions_accuse_nobody() -> None:
    """The third may be next to either of the two others; longer rows, and stuck ones, are found."""
    generator = torch.Generator().manual_seed(0)
    test = SuspicionTest(3, 1)
    for _ in range(120):
        rows = draw(3, 64, generator)
        rows[2] = -rows[2]
        test.observe(rows)
    assert test.accused == set()


def test_two_that_copy_a_third_do_not_make_the_others_gross() -> None:
    generator = torch.Generator().manual_seed(0)
    test = SuspicionTest(5, 2)
    for _ in range(20):
        rows = draw(5, 64, generator)
        rows[3:] = rows[0]
        test.observe(rows)
        assert test.accused <= {3, 4}


def test_who_is_far_beside_one_worker_alone_is_not_gross() -> None:
    """One stands in the middle of five others, which are twice as far from each other; three are
    150 times as far from it. Who is where changes.
    """
    test, generator = SuspicionTest(9, 2), torch.Generator().manual_seed(0)
    for _ in range(40):
        side, *far = torch.linalg.qr(torch.randn(64, 4, generator=generator))[0].T
        around = [torch.zeros(64), *[side] * 3, *[-side] * 2]
        places = torch.stack([*around, *(150 * direction for direction in far)])
        rows = 1e4 * torch.randn(64, generator=generator) + places
        test.observe(rows[torch.randperm(9, generator=generator)])
    assert not test.accused


def test_rows_of_the_same_bits_accuse_nobody_and_another_direction_is_found() -> None:
    """Replicated data: distances are rounding errors, and a liar with a usual norm is infinitely
    farther.
    """
    generator, found = torch.Generator().manual_seed(0), []
    test = SuspicionTest(6, 2)
    for step in range(60):
        rows = torch.randn(1, 50, generator=generator).repeat(6, 1)
        if step >= 40:
            rows[4] = rows[4].flip(0)
        found += [(worker, step) for worker in test.observe(rows)]
    ((worker, step),) = found
    assert worker == 4
    assert 40 <= step < 46


@pytest.mark.parametrize("compare", ["others", "own_past"])
@pytest.mark.parametrize(
    ("scale", "word"), [(0.5, ("shorter", "less", "closer")), (2.0, ("longer", "more", "farther"))]
)
def test_an_accusation_shows_what_decided_it(
    compare: str, scale: float, word: tuple[str, ...]
) -> None:
    """Also if the worker's last row was as the others'."""
    generator = torch.Generator().manual_seed(0)
    test = SuspicionTest(8, 2, compare=compare)  # type: ignore[arg-type]
    for step in range(160):
        rows = draw(8, 32, generator, noise=0.1)
        rows[5] *= scale if step >= 60 and step % 2 == 0 else 1
        if test.observe(rows):
            break
    assert test.accused == {5}
    shown = test.evidence_shown(5)
    size = float(shown.split(" on average ")[1].split(" times")[0])
    assert (
        min(scale, 1.0) <= size <= max(scale, 1.0)
        if "distance" not in shown and "change" not in shown
        else size > 1.0
    )
    assert "the median worker's" in shown if compare == "others" else "its own past" in shown
    if "norm" in shown:
        assert any(each in test.reason(5) for each in word)
        assert size == pytest.approx(scale**0.5, rel=0.1)  # one of two rows


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


# -- faults ----------------------------------------------------------------------------------------


def pairs_to_find(fault: str, onset: int, n: int = 8, f: int = 2, seed: int = 0) -> int | None:
    """How many pairs of rounds after its onset worker 1 is accused; None: never, or somebody else
    is.
    """
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
@pytest.mark.parametrize(
    ("fault", "within"),
    [("scale", 2), ("nan", 2), ("bit", 2), ("stuck", 15), ("labels", 15), ("half", 15)],
)
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


@laws
@given(st.lists(st.binary(min_size=32, max_size=32), min_size=10, max_size=10))
def test_no_bytes_of_a_worker_raise_or_frame_another(said: list[bytes]) -> None:
    """What a worker says is a row of fixed size: every sequence of bytes is one, nan, infinities and
    numbers whose squares overflow among them.
    """
    generator = torch.Generator().manual_seed(0)
    test = SuspicionTest(5, 1)
    for raw in said:
        rows = draw(5, 8, generator)
        rows[2] = torch.frombuffer(bytearray(raw), dtype=torch.float32)
        test.observe(rows)
        here = torch.tensor([True, True, False, True, True])
        test.observe(draw(5, 8, generator), here)
    assert test.accused <= {2}
    assert test.evidence.isfinite().all()
    assert all(test.evidence_shown(worker) for worker in range(5))


def test_equal_rows_accuse_nobody() -> None:
    test = SuspicionTest(4, 1)
    for _ in range(100):
        test.observe(torch.ones(4, 3))
        test.observe(torch.zeros(4, 3))
    assert test.accused == set()


# -- what users decide, and checkpoints ------------------------------------------------------------


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
    assert [straight.evidence_shown(worker) for worker in range(5)] == [
        resumed.evidence_shown(worker) for worker in range(5)
    ]
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
