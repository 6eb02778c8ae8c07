"""Laws over every attack in the zoo, above all: each does harm where it says it does."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo import ATTACKS, each, laws, rows_for, scene_of

from lightning_byz.attacks import ALIE, BitFlip, Gaussian, LabelFlip, MinMax, MinSum, RandomSign
from lightning_byz.metrics import cosine_to_honest_mean, relative_error


@each(ATTACKS)
@laws
@given(h=st.integers(1, 8), b=st.integers(0, 4), d=st.integers(1, 9))
def test_shape_dtype_and_nobodys_rows_are_touched(case, h, b, d):
    honest, own = rows_for(h, d, dtype=torch.float32), rows_for(b, d, seed=1, dtype=torch.float32)
    before = honest.clone(), own.clone()
    lies = case.attack(honest, own, scene_of(case, honest, own))
    assert lies.shape == (b, d)
    assert lies.dtype == torch.float32
    assert torch.equal(honest, before[0])
    assert torch.equal(own, before[1])
    others = lies[1:].clone()
    lies[:1].fill_(3)  # a message of its own
    assert torch.allclose(lies[1:], others, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(honest, before[0])
    assert torch.equal(own, before[1])


@each(ATTACKS)
def test_no_attackers_no_message(case):
    honest, own = rows_for(4, 5), torch.empty(0, 5, dtype=torch.float64)
    assert case.attack(honest, own, scene_of(case, honest, own)).shape == (0, 5)


@each([case for case in ATTACKS if case.formula])
def test_colluders_send_what_the_formula_says(case):
    honest = rows_for(6, 30, seed=3)
    lies = case.attack(honest, rows_for(3, 30, seed=4))
    torch.testing.assert_close(lies, case.formula(honest).expand(3, -1))


@each(ATTACKS)
def test_same_stream_same_lies(case):
    honest, own = rows_for(6, 30), rows_for(3, 30, seed=4)
    first, second, other = (case.attack(honest, own, scene_of(case, honest, own, seed)) for seed in (1, 1, 2))
    assert torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
    assert torch.allclose(first, other, rtol=0, atol=0, equal_nan=True) != case.random


@each(ATTACKS)
def test_it_damages_the_rule_that_it_says_it_damages(case):
    damage = case.damage
    for seed in range(5):
        rows = rows_for(damage.n, 300, seed=seed, mean=1.0, scale=damage.spread, dtype=torch.float32)
        honest, own = rows[damage.b :], rows[: damage.b]
        peace = damage.rule(rows)
        lies = case.attack(honest, own, scene_of(case, honest, own, seed, damage.rule))
        result = damage.rule(torch.cat([lies, honest]))
        harm = torch.nan_to_num(relative_error(result, honest), nan=torch.inf)
        assert harm >= damage.error
        if damage.reverses:
            assert cosine_to_honest_mean(result, honest) < 0 < 0.2 < cosine_to_honest_mean(peace, honest)
        else:
            assert relative_error(peace, honest) <= harm / 2


# -- formulas -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "f", "z"),
    [
        (5, 1, 0.0),
        (10, 2, 0.0),
        (7, 3, 0.674),
        (15, 3, 0.210),
        (16, 3, 0.097),
        (20, 5, 0.253),
        (20, 8, 0.674),
        (20, 9, 0.908),
        (25, 5, 0.253),
        (50, 12, 0.336),
    ],
)
def test_the_z_table_of_alie(n, f, z):
    assert ALIE().factor(n, f) == pytest.approx(z, abs=6e-4)
    rows = rows_for(n, 12)
    expected = rows[f:].mean(0) - ALIE().factor(n, f) * rows[f:].std(0, unbiased=True)
    torch.testing.assert_close(ALIE()(rows[f:], rows[:f]), expected.expand(f, -1))


def test_alie_by_hand():
    honest = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])  # means 2 and 1, unbiased deviations 2 and 0
    assert ALIE(z=1.5)(honest, torch.zeros(1, 2)).tolist() == [[-1.0, 1.0]]
    assert ALIE(z=1.5)(honest[:1], torch.zeros(2, 2)).tolist() == [[0.0, 1.0]] * 2  # one row has no spread


def test_gaussian_noise_has_its_mean_and_deviation_and_differs_between_workers():
    lies = Gaussian(mean=2.0, std=3.0)(torch.zeros(1, 20_000), torch.zeros(3, 20_000))
    assert lies.mean(1).tolist() == pytest.approx([2.0] * 3, abs=0.1)
    assert lies.std(1).tolist() == pytest.approx([3.0] * 3, abs=0.1)
    assert torch.corrcoef(lies)[0, 1].abs() < 0.03


# -- data -----------------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor


LABELS = torch.tensor([0, 1, 9, 4])
FLIPPED = torch.tensor([9, 8, 0, 5])


@pytest.mark.parametrize(
    ("key", "batch", "read"),
    [
        (1, (torch.ones(4, 2), LABELS), lambda batch: batch[1]),
        (1, [torch.ones(4, 2), LABELS], lambda batch: batch[1]),
        (-1, (torch.ones(4, 2), "id", LABELS), lambda batch: batch[-1]),
        (1, Pair(torch.ones(4, 2), LABELS), lambda batch: batch.label),
        ("y", {"x": torch.ones(4, 2), "y": LABELS}, lambda batch: batch["y"]),
    ],
)
def test_label_flip_changes_the_labels_only_and_keeps_the_batchs_type(key, batch, read):
    out = LabelFlip(num_classes=10, key=key)(batch)
    assert type(out) is type(batch)
    assert torch.equal(read(out), FLIPPED)
    assert torch.equal(read(batch), LABELS)
    first = "x" if isinstance(batch, dict) else 0
    assert out[first] is batch[first]
    assert torch.equal(read(LabelFlip(num_classes=10, key=key)(out)), LABELS)


def test_label_flip_of_signs_and_of_two_classes():
    signed = LabelFlip(num_classes=2, signed=True)
    assert signed.flip(torch.tensor([-1, 1, 1])).tolist() == [1, -1, -1]
    assert signed.flip(torch.tensor([1.0, 1.0])).tolist() == [-1, -1]  # also where a batch holds one class only
    assert LabelFlip(num_classes=2).flip(torch.tensor([0, 1, 1])).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="signed=True"):
        LabelFlip(num_classes=2).flip(torch.tensor([-1, 1]))


def test_label_flip_leaves_ignored_labels_ignored():
    assert LabelFlip(num_classes=10).flip(torch.tensor([-100, 3])).tolist() == [-100, 6]


@pytest.mark.parametrize(("key", "batch"), [(3, (LABELS, LABELS)), ("y", {"x": LABELS}), ("y", LABELS), (1, (LABELS, "cat"))])
def test_label_flip_says_where_it_looked(key, batch):
    with pytest.raises(ValueError, match=r"LabelFlip.*batch\["):
        LabelFlip(num_classes=10, key=key)(batch)


def test_label_flip_damages_a_mean_that_it_outvotes():
    """Logistic regression on separable data, 3 of 5 workers flipped: what is learned is worse than a guess; with none flipped it is right."""
    w_true = rows_for(1, 6, seed=1, mean=0.0)[0]
    x = rows_for(200, 6, seed=2, mean=0.0)
    y = (x @ w_true > 0).long()

    def accuracy(flipped):
        w = torch.zeros(6, dtype=torch.float64)
        for _ in range(60):
            gradients = []
            for worker in range(5):
                batch = x[worker::5], y[worker::5]
                features, labels = LabelFlip(num_classes=2)(batch) if worker < flipped else batch
                gradients.append(features.T @ (torch.sigmoid(features @ w) - labels) / len(labels))
            w -= torch.stack(gradients).mean(0)
        return float(((x @ w > 0) == y).double().mean())

    assert accuracy(0) > 0.9
    assert accuracy(3) < 0.4  # worse than a guess


@pytest.mark.parametrize("direction", ["std", "sign", "unit"])
@pytest.mark.parametrize("kind", ["max", "sum min", "sum max"])
@pytest.mark.parametrize("h", [2, 5, 12])
def test_hiding_attacks_go_as_far_as_they_may_and_no_farther(kind, direction, h):
    """Against the definition, by bisection over gamma with explicit distances."""
    honest = rows_for(h, 40, seed=h)
    attack = MinMax(direction) if kind == "max" else MinSum(direction, bound=kind.split()[1])
    mean = honest.mean(0)
    p = {"std": honest.std(0), "sign": mean.sign(), "unit": mean / mean.norm()}[direction]
    squares = torch.stack([((honest - row) ** 2).sum(1) for row in honest])

    def hidden(gamma):
        distances = ((mean - gamma * p - honest) ** 2).sum(1)
        if kind == "max":
            return bool(distances.max() <= squares.max())
        sums = squares.sum(1)
        return bool(distances.sum() <= (sums.min() if kind == "sum min" else sums.max()))

    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if hidden(middle) else (low, middle)
    lies = attack(honest, torch.zeros(2, 40).double())
    assert low > 0
    torch.testing.assert_close(lies, (mean - low * p).expand(2, -1), rtol=1e-8, atol=1e-8)


def test_bit_flip_and_random_sign_are_about_ones_own_message():
    honest, own = rows_for(4, 2000), rows_for(3, 2000, seed=9)
    assert torch.equal(BitFlip()(honest, own), -own)
    lies = RandomSign()(honest, own)
    assert torch.equal(lies.abs(), own.abs())
    assert 0.45 < float((lies == own).double().mean()) < 0.55
    assert not torch.equal(lies[0] == own[0], lies[1] == own[1])


def test_an_unknown_direction_is_refused():
    with pytest.raises(ValueError, match="one of std, sign, unit. Found 'up'"):
        MinMax("up")
