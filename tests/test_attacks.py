"""Laws over every attack in the zoo, above all: each does harm where it says it does."""

import dataclasses
import math
import re
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zoo import ATTACKS, each, laws, rows_for, scene_of

from lightning_byz.aggregators import (
    CAF,
    CGE,
    NNM,
    Chain,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    Mean,
    MultiKrum,
    SpectralFilter,
    TrimmedMean,
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
    LabelFlip,
    LineSearch,
    Mimic,
    MinMax,
    MinSum,
    Mixture,
    OptimizedALIE,
    OptimizedIPM,
    RandomSign,
    Scene,
    ShiftBack,
    ShuffledLabels,
    SignFlip,
    Stuck,
    WorstLie,
    WrongScale,
    Zero,
)
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


@each(ATTACKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_of_the_messages_is_kept(case, dtype):
    honest, own = rows_for(5, 6, dtype=dtype), rows_for(2, 6, seed=1, dtype=dtype)
    assert case.attack(honest, own, scene_of(case, honest, own)).dtype == dtype


@each([case for case in ATTACKS if case.formula])
def test_colluders_send_what_the_formula_says(case):
    honest = rows_for(6, 30, seed=3)
    lies = case.attack(honest, rows_for(3, 30, seed=4))
    torch.testing.assert_close(lies, case.formula(honest).expand(3, -1))


@each(ATTACKS)
def test_same_stream_same_lies(case):
    honest, own = rows_for(6, 30), rows_for(3, 30, seed=4)
    first, second, other = (
        case.attack(honest, own, scene_of(case, honest, own, seed)) for seed in (1, 1, 2)
    )
    assert torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
    assert torch.allclose(first, other, rtol=0, atol=0, equal_nan=True) != case.random


@each(ATTACKS)
def test_it_damages_the_rule_that_it_says_it_damages(case):
    damage = case.damage
    for seed in range(5):
        rows = rows_for(
            damage.n, 300, seed=seed, mean=1.0, scale=damage.spread, dtype=torch.float32
        )
        honest, own = rows[damage.b :], rows[: damage.b]
        peace = damage.rule(rows)
        lies = case.attack(honest, own, scene_of(case, honest, own, seed, damage.rule))
        result = damage.rule(torch.cat([lies, honest]))
        harm = torch.nan_to_num(relative_error(result, honest), nan=torch.inf)
        assert harm >= damage.error
        if damage.reverses:
            assert (
                cosine_to_honest_mean(result, honest)
                < 0
                < 0.2
                < cosine_to_honest_mean(peace, honest)
            )
        else:
            assert relative_error(peace, honest) <= harm / 2


# -- formulas --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("b", "n", "z"), [(2, 10, "0"), (1, 5, "0"), (1, 4, "-0.43")])
def test_alie_says_where_its_formula_is_no_attack(b, n, z):
    with pytest.warns(
        UserWarning, match=rf"no attack with {b} of n={n} workers.* z={z}.* ALIE\(z=1.5\)"
    ):
        ALIE().check(range(b), n)


@pytest.mark.parametrize(
    ("attack", "b", "n"),
    [(ALIE(), 9, 20), (ALIE(z=0.5), 2, 10), (ALIE(z=0.0), 2, 10), (ALIE(), 0, 10)],
)
def test_alie_says_nothing_where_it_is_one_or_where_z_was_chosen(attack, b, n, recwarn):
    attack.check(range(b), n)
    assert not recwarn.list


def test_alie_by_hand():
    # means 2 and 1, unbiased deviations 2 and 0
    honest = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    assert ALIE(z=1.5)(honest, torch.zeros(1, 2)).tolist() == [[-1.0, 1.0]]
    # one row has no spread
    assert ALIE(z=1.5)(honest[:1], torch.zeros(2, 2)).tolist() == [[0.0, 1.0]] * 2


def test_gaussian_noise_has_its_mean_and_deviation_and_differs_between_workers():
    lies = Gaussian(mean=2.0, std=3.0)(torch.zeros(1, 20_000), torch.zeros(3, 20_000))
    assert lies.mean(1).tolist() == pytest.approx([2.0] * 3, abs=0.1)
    assert lies.std(1).tolist() == pytest.approx([3.0] * 3, abs=0.1)
    assert torch.corrcoef(lies)[0, 1].abs() < 0.03


# -- data ------------------------------------------------------------------------------------------


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
    # also where a batch holds one class only
    assert signed.flip(torch.tensor([1.0, 1.0])).tolist() == [-1, -1]
    assert LabelFlip(num_classes=2).flip(torch.tensor([0, 1, 1])).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="signed=True"):
        LabelFlip(num_classes=2).flip(torch.tensor([-1, 1]))


def test_label_flip_leaves_ignored_labels_ignored():
    assert LabelFlip(num_classes=10).flip(torch.tensor([-100, 3])).tolist() == [-100, 6]


def flipped_one_by_one(labels, classes, ignored=()):
    """Class indices, the slow way."""
    flat = [y if y < 0 or y in ignored else classes - 1 - y for y in labels.flatten().tolist()]
    return torch.tensor(flat).reshape(labels.shape)


@laws
@given(st.data(), st.integers(2, 30), st.sampled_from([(5,), (4, 3), (2, 3, 3)]))
def test_label_flip_is_the_same_on_indices_and_on_distributions(data, classes, shape):
    """One-hot and smoothed labels, along dimension 1 or the last; their arg max flips as indices
    do. Twice is not at all.
    """
    labels = torch.tensor(
        data.draw(
            st.lists(
                st.integers(0, classes - 1), min_size=math.prod(shape), max_size=math.prod(shape)
            )
        )
    )
    labels = labels.reshape(shape)
    flip = LabelFlip(classes).flip
    expected = flipped_one_by_one(labels, classes)
    if classes in shape:  # class indices of such a shape may look like distributions
        return
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64):
        assert torch.equal(flip(labels.to(dtype)), expected.to(dtype))
    one_hot = nn.functional.one_hot(labels, classes)
    for hot in (one_hot, one_hot.movedim(-1, 1)):
        dimension = -1 if hot is one_hot else 1
        for kind in (hot, hot.bool(), hot.float(), 0.9 * hot.double() + 0.1 / classes, hot.half()):
            assert torch.equal(flip(flip(kind)), kind)
            assert flip(kind).dtype == kind.dtype
            assert torch.equal(flip(kind).float().argmax(dimension), expected)


def test_label_flip_of_two_classes():
    flip = LabelFlip(2).flip
    assert flip(torch.tensor([True, False])).tolist() == [False, True]
    # three tasks
    assert flip(torch.tensor([[True, True, False]])).tolist() == [[False, False, True]]
    # probabilities of class 1
    assert flip(torch.tensor([0.0, 0.25, 1.0])).tolist() == [1.0, 0.75, 0.0]
    assert flip(torch.tensor([[0.0, 1.0], [1.0, 1.0]])).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert flip(torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_labels_that_a_loss_ignores_stay():
    labels = torch.tensor([[0, 255, 5], [20, -100, 255]])
    assert LabelFlip(21, ignore_index=255).flip(labels).tolist() == [[20, 255, 15], [0, -100, 255]]
    assert LabelFlip(21, ignore_index=255).flip(labels.clamp_min(0).byte()).tolist() == [
        [20, 255, 15],
        [0, 20, 255],
    ]
    assert LabelFlip(2, signed=True, ignore_index=0).flip(torch.tensor([-1, 0, 1])).tolist() == [
        1,
        0,
        -1,
    ]


@pytest.mark.parametrize(
    ("attack", "labels"),
    [
        (LabelFlip(21), torch.tensor([0, 5, 255])),  # ignored by a loss that we do not know
        (LabelFlip(5), torch.tensor([0, 7])),  # too few classes
        (LabelFlip(10), torch.tensor([0.25, 3.5])),  # a regression
        (LabelFlip(10), torch.tensor([torch.nan, 1.0])),
        (LabelFlip(2), torch.tensor([0.5, 1.5])),
        (LabelFlip(2), torch.tensor([-0.5, 0.5])),
        (LabelFlip(4), torch.tensor([[1.0, 1.0, 0.0, 0.0]])),  # several classes at a time
        (LabelFlip(4), torch.tensor([[1, 1, 0, 0]])),
        (LabelFlip(4), torch.tensor([[True, True, False, False]])),
        (LabelFlip(4), torch.tensor([[0.0, 0.0, 0.0, 0.0]])),
        (LabelFlip(3), torch.tensor([True, False])),
        (LabelFlip(1000), torch.tensor([3], dtype=torch.uint8)),  # whose new label would not fit
        (LabelFlip(2, signed=True), torch.tensor([0, 1])),
        (LabelFlip(2, signed=True), torch.tensor([1], dtype=torch.uint8)),
        (LabelFlip(2), torch.tensor([1j])),
    ],
    ids=repr,
)
def test_labels_that_are_no_classes_are_refused_by_name(attack, labels):
    with pytest.raises(ValueError, match=r"LabelFlip|Labels of"):
        attack((torch.zeros(len(labels), 2), labels))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_classes": 1},
        {"num_classes": 3, "signed": True},
        {"num_classes": 21, "ignore_index": 3},
    ],
)
def test_label_flip_settings_that_mean_nothing(settings):
    with pytest.raises(ValueError, match="should be"):
        LabelFlip(**settings)


@dataclasses.dataclass(frozen=True)
class Record:
    x: torch.Tensor
    y: torch.Tensor


class Encoding(UserDict):
    """As transformers' BatchEncoding: entries are attributes too."""

    def __init__(self, data, encodings=None):
        super().__init__(data)
        self.encodings = encodings


class NamedXY(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Graph:
    """As torch_geometric's Data, more or less."""

    def __init__(self, x, y):
        self.x, self.y = x, y


@pytest.mark.parametrize("attack", [LabelFlip(10, key="y"), ShuffledLabels(key="y")], ids=repr)
@pytest.mark.parametrize(
    "kind",
    [
        dict,
        OrderedDict,
        Encoding,
        MappingProxyType,
        lambda entries: defaultdict(list, entries),
        lambda entries: Record(**entries),
        lambda entries: Graph(**entries),
        lambda entries: NamedXY(**entries),
    ],
)
def test_labels_are_found_in_every_kind_of_batch(attack, kind):
    x = torch.ones(4, 2)
    batch = kind({"x": x, "y": LABELS})
    read = (lambda b: b["y"]) if isinstance(batch, Mapping) else (lambda b: b.y)
    out = attack(batch, torch.Generator().manual_seed(0))
    assert type(out) is type(batch)
    assert torch.equal(
        read(out).sort().values,
        (FLIPPED if isinstance(attack, LabelFlip) else LABELS).sort().values,
    )
    assert not torch.equal(read(out), LABELS)
    assert torch.equal(read(batch), LABELS)


@pytest.mark.parametrize(
    "kind",
    [torch.tensor([True, False]), torch.eye(2), torch.tensor([0.5, 2.5]), torch.eye(2).long()],
)
def test_shuffled_labels_of_every_kind(kind):
    out = ShuffledLabels()((torch.zeros(2, 1), kind))[1]
    assert torch.equal(out, kind.flip(0))
    with pytest.raises(ValueError, match="ShuffledLabels exchanges labels along their first"):
        ShuffledLabels()((torch.zeros(2, 1), torch.tensor(1)))


@pytest.mark.parametrize(
    ("key", "batch"),
    [(3, (LABELS, LABELS)), ("y", {"x": LABELS}), ("y", LABELS), (1, (LABELS, "cat"))],
)
def test_label_flip_says_where_it_looked(key, batch):
    with pytest.raises(ValueError, match=r"LabelFlip.*batch\["):
        LabelFlip(num_classes=10, key=key)(batch)


def test_label_flip_damages_a_mean_that_it_outvotes():
    """Logistic regression on separable data, 3 of 5 workers flipped: what is learned is worse than
    a guess; with none flipped it is right.
    """
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


# -- attacks that try their lies -------------------------------------------------------------------


def traced(objective, tried):
    def evaluate(x):
        tried.append(x)
        return objective(x)

    return evaluate


@pytest.mark.parametrize(
    ("search", "objective", "expected", "best"),
    [
        (LineSearch(8), lambda x: -((x - 5) ** 2), [0, 1, 3, 7, 3.8, 1.24, 3.288, 4.9264], 4.9264),
        (
            LineSearch(6, delta=10.0, contraction="forward"),
            lambda x: -((x - 5) ** 2),
            [0, 10, 8, 14.4, 13.12, 12.096],
            8,
        ),
        (LineSearch(4), lambda x: -x, [0, 1, 0.2, 0.04], 0),  # back, but never below 0
        (LineSearch(5), lambda x: x, [0, 1, 3, 7, 15], 15),  # all growth and no end
        (LineSearch(3, start=2.0, delta=0.5), lambda x: 0.0, [2, 2.5, 2.1], 2),
        (LineSearch(1, start=4.0), lambda x: x, [4], 4),
        (LineSearch(4), lambda x: torch.nan if x else 1.0, [0, 1, 0.2, 0.04], 0),
    ],
)
def test_the_line_search_tries_what_its_definition_says(search, objective, expected, best):
    """By hand, from LPD-EPFL's ``line_maximize`` ("both") and ByzFL's Optimal_* ("forward")."""
    tried = []
    assert search(traced(objective, tried)) == pytest.approx(best)
    assert tried == pytest.approx(expected)


def test_the_libraries_settings():
    assert FoE().search == LineSearch(16, 0.0, 1.0, 0.8, "both")
    assert (
        OptimizedIPM().search == OptimizedALIE().search == LineSearch(20, 0.0, 10.0, 0.8, "forward")
    )


@pytest.mark.parametrize(
    "arguments",
    [{"evaluations": 0}, {"start": -1.0}, {"delta": 0.0}, {"ratio": 0.5}, {"ratio": 1.0}],
)
def test_a_line_search_without_sense_is_refused(arguments):
    with pytest.raises(ValueError, match=r"evaluations >= 1.*Found LineSearch"):
        LineSearch(**arguments)
    with pytest.raises(ValueError, match="'both' or 'forward'. Found 'back'"):
        LineSearch(contraction="back")


FAMILIES = [
    (FoE, lambda h, x: (1 - x) * h.mean(0)),
    (OptimizedIPM, lambda h, x: -x * h.mean(0)),
    (OptimizedALIE, lambda h, x: h.mean(0) - x * h.std(0)),
    (lambda search: OptimizedALIE(search, negative=False), lambda h, x: h.mean(0) + x * h.std(0)),
]


@pytest.mark.parametrize(("attack", "family"), FAMILIES)
def test_optimized_attacks_send_the_most_harmful_of_their_family(attack, family):
    """The server believes what is near enough and ignores the rest: the most harmful factor is
    6.
    """
    honest, own = rows_for(6, 20), torch.zeros(2, 20).double()
    limit = torch.linalg.vector_norm(family(honest, 6.0) - honest.mean(0))

    def server(lies):
        assert lies.shape == (2, 20)
        assert torch.equal(lies[0], lies[1])
        near = torch.linalg.vector_norm(lies[0] - honest.mean(0)) <= limit
        return lies[0] if near else honest.mean(0)

    lies = attack(search=LineSearch(40))(honest, own, Scene(aggregate=server))
    torch.testing.assert_close(lies, family(honest, 6.0).expand(2, -1), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("attack", "family"), FAMILIES)
def test_optimized_attacks_are_about_as_harmful_as_the_best_of_a_grid(attack, family):
    honest, rule = rows_for(11, 50, seed=3), CoordinateMedian(f=4)

    def harm(lie):
        return float(
            torch.linalg.vector_norm(rule(torch.cat([lie.expand(4, -1), honest])) - honest.mean(0))
        )

    lies = attack(search=LineSearch())(
        honest,
        torch.zeros(4, 50).double(),
        Scene(aggregate=lambda lies: rule(torch.cat([lies, honest]))),
    )
    assert harm(lies[0]) > 0.99 * max(harm(family(honest, x / 4)) for x in range(80))


def test_an_optimized_attack_moves_away_from_the_target():
    """A server with momentum, say, gives another vector than the honest mean where nobody lies."""
    honest = rows_for(4, 5)
    far = honest.mean(0) + 100
    scene = Scene(aggregate=lambda lies: lies[0] + 100, target=lambda: far)
    lies = FoE(LineSearch(2))(honest, torch.zeros(1, 5).double(), scene)
    # a = 1: some harm, where a = 0 does none; by the honest mean a = 0 had more
    torch.testing.assert_close(lies[0], 0 * far)


@pytest.mark.parametrize("attack", [FoE(), OptimizedIPM(), OptimizedALIE()], ids=repr)
def test_without_a_server_there_is_nothing_to_optimize(attack):
    with pytest.raises(
        ValueError,
        match=rf"{type(attack).__name__} tries its lies.*Found Scene\(aggregate=None\).*ByzantineWorkers",
    ):
        attack(rows_for(3, 4), rows_for(1, 4))


def test_anti_cge_is_kept_and_as_long_as_can_be():
    honest, own = rows_for(9, 30, mean=0.3, seed=5), torch.zeros(3, 30).double()
    order = sorted(range(9), key=lambda i: float(honest[i].norm()))
    kept = sum(honest[i] for i in order[:6])
    expected = -kept / kept.norm() * honest[order[6]].norm()
    lies = AntiCGE()(honest, own)
    torch.testing.assert_close(lies, expected.expand(3, -1), rtol=1e-5, atol=1e-5)
    assert lies[0].norm() < honest[order[6]].norm()
    everything_kept = torch.cat([lies, honest[order[:6]]]).mean(0)
    torch.testing.assert_close(CGE(f=3)(torch.cat([honest, lies])), everything_kept)
    for_more = AntiCGE(f=4)(honest, own)
    assert (
        lies[0].norm()
        > for_more[0].norm()
        == pytest.approx(float(honest[order[5]].norm()), rel=1e-5)
    )
    assert AntiCGE()(torch.zeros(3, 4), torch.ones(1, 4)).tolist() == [[0.0] * 4]
    with pytest.raises(ValueError, match="Found f=-1"):
        AntiCGE(f=-1)


# -- attacks that remember -------------------------------------------------------------------------


def test_mimic_learns_as_its_definition_says():
    """The authors' loop, with Python's sums."""
    memory, warmup = {}, 3
    mu = z = target = None
    for t in range(6):
        honest = rows_for(5, 8, seed=t)
        mean = honest.mean(0)
        if t == 0:
            mu = mean
            z = torch.randn(8, generator=torch.Generator().manual_seed(0)).double()
            z = sum(float((h - mu) @ z) * (h - mu) for h in honest)
            z = z / z.norm()
        elif t < warmup:
            mu = t / (1 + t) * mu + mean / (1 + t)
            step = sum(float((h - mu) @ z) * (h - mu) for h in honest)
            z = t / (1 + t) * z + step / step.norm() / (1 + t)
            z = z / z.norm()
        if t < warmup:
            target = max(range(5), key=lambda i: float(honest[i] @ z))
        lies = Mimic(warmup=warmup)(honest, torch.zeros(2, 8).double(), Scene(memory=memory))
        assert torch.equal(lies, honest[target].expand(2, -1))
        torch.testing.assert_close(memory["z"], z)


def test_mimic_keeps_its_target_and_its_bias_does_not_average_out():
    """Workers with data of their own: the mean over rounds is off, where noise of the same size
    would vanish.
    """
    centers, memory, attack = rows_for(6, 40, mean=0.0, scale=2.0), {}, Mimic(warmup=5)
    targets, total = [], torch.zeros(40).double()
    for t in range(60):
        honest = centers + rows_for(6, 40, seed=100 + t, mean=0.0)
        lies = attack(honest, torch.zeros(3, 40).double(), Scene(memory=memory))
        targets.append(int((honest == lies[0]).all(1).nonzero()))
        total += torch.cat([lies, honest]).mean(0) / 60
    assert len(set(targets[5:])) == 1
    bias = torch.linalg.vector_norm(total - centers.mean(0))
    assert bias > 0.8 * torch.linalg.vector_norm(centers[targets[-1]] - centers.mean(0)) / 3


def test_mimic_follows_a_worker_not_a_row():
    honest, own, memory = rows_for(4, 6), torch.zeros(1, 6).double(), {}
    first = Mimic()(honest, own, Scene(memory=memory, honest=[1, 2, 5, 7], byzantine=[0]))[0]
    row = int((honest == first).all(1).nonzero())
    worker = [1, 2, 5, 7][row]
    others = [w for w in (1, 2, 5, 7) if w != worker]
    again = Mimic()(
        rows_for(2, 6, seed=9), own, Scene(memory=memory, honest=[worker, 8], byzantine=[0])
    )[0]
    assert torch.equal(again, rows_for(2, 6, seed=9)[0])
    absent = rows_for(3, 6, seed=4)
    stand_in = Mimic()(absent, own, Scene(memory=memory, honest=others, byzantine=[0]))[0]
    assert torch.equal(stand_in, absent[(absent @ memory["z"]).argmax()])
    assert int(memory["target"]) == worker


def test_mimic_of_a_given_worker():
    honest, own = rows_for(4, 6), torch.zeros(2, 6).double()
    assert torch.equal(Mimic(target=3)(honest, own), honest[3].expand(2, -1))
    assert torch.equal(
        Mimic(target=3)(honest, own, Scene(honest=[0, 1, 2, 4])), honest.mean(0).expand(2, -1)
    )
    for byzantine, target in (([0, 3], 3), ([0], 5)):
        with pytest.raises(
            ValueError, match=rf"honest one of the n=5 workers. Found target={target}"
        ):
            Mimic(target=target).check(byzantine, 5)
    with pytest.raises(ValueError, match="warmup >= 1"):
        Mimic(warmup=0)


def test_mimic_of_equal_messages():
    assert torch.equal(Mimic()(torch.ones(3, 4), torch.zeros(1, 4)), torch.ones(1, 4))


def test_shift_back_pulls_towards_the_first_parameters_where_it_has_the_majority():
    honest, memory = rows_for(2, 5), {}
    x = [rows_for(1, 5, seed=seed)[0] for seed in range(3)]

    def send(t, b):
        return ShiftBack(scale=2.0)(
            honest, torch.zeros(b, 5).double(), Scene(x=lambda: x[t], memory=memory)
        )

    assert torch.equal(send(0, 2), honest.mean(0).expand(2, -1))  # a tie is no majority
    assert torch.equal(send(1, 1), honest.mean(0).expand(1, -1))
    torch.testing.assert_close(send(2, 3), (2 * (x[2] - x[0])).expand(3, -1))
    assert torch.equal(memory["x_0"], x[0])
    with pytest.raises(
        ValueError, match=r"ShiftBack looks at the current parameters.*Found Scene\(x=None\)"
    ):
        ShiftBack()(honest, honest)


# -- faults ----------------------------------------------------------------------------------------

INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_flipped_bit_flips_the_bit_that_it_says_in_one_number_of_each_message(dtype):
    own, width = rows_for(3, 9, dtype=dtype), 8 * dtype.itemsize
    for bit in (*range(width), -1, -2, -width):
        lies = FlippedBit(bit=bit)(
            own, own, Scene(generator=torch.Generator().manual_seed(bit % 7))
        )
        changed = lies.view(INTEGERS[dtype]) ^ own.view(INTEGERS[dtype])
        assert (changed != 0).sum(1).tolist() == [1, 1, 1]
        assert {int(mask) & (2**width - 1) for mask in changed[changed != 0]} == {1 << bit % width}
    sign = FlippedBit(bit=-1, position=4)(own, own)
    assert torch.equal(sign[:, 4], -own[:, 4])
    assert torch.equal(sign[:, :4], own[:, :4])


def test_flipped_bit_hits_other_places_and_bits_by_chance():
    own, scene = torch.ones(1, 50), Scene()
    lies = torch.cat([FlippedBit(bit=None)(own, own, scene) for _ in range(200)])
    changed = lies.view(torch.int32) ^ own.view(torch.int32)
    assert len((changed != 0).nonzero()[:, 1].unique()) > 40
    assert len(changed[changed != 0].unique()) > 25


def test_the_highest_bit_of_the_exponent_makes_small_numbers_huge():
    assert FlippedBit(position=0)(torch.ones(1, 1), torch.tensor([[0.75, 0.5]])).tolist()[
        0
    ] == pytest.approx([0.75 * 2.0**128, 0.5], rel=1e-3)


def test_a_bit_or_a_place_that_is_not_there_is_refused():
    own = torch.ones(1, 3)
    with pytest.raises(ValueError, match=r"-32 .. 31 for messages of torch.float32. Found bit=32"):
        FlippedBit(bit=32)(own, own)
    with pytest.raises(ValueError, match=r"0 .. 2. Found position=3"):
        FlippedBit(position=3)(own, own)


def test_stuck_workers_repeat_their_first_message_each_its_own():
    memory, attack = {}, Stuck()
    first, later = rows_for(3, 4), rows_for(3, 4, seed=1)
    assert torch.equal(attack(first, first[:2], Scene(memory=memory, own=[4, 7])), first[:2])
    # worker 2 gets stuck only now
    again = attack(later, later, Scene(memory=memory, own=[2, 4, 7]))
    assert torch.equal(again, torch.stack([later[0], first[0], first[1]]))
    assert torch.equal(attack(later, later[1:2], Scene(memory=memory, own=[2])), later[:1])
    first.zero_()
    assert memory["4"].abs().sum() > 0


def test_wrong_scale_scales_ones_own():
    own = rows_for(2, 4)
    assert torch.equal(WrongScale(0.5)(own, own), own / 2)


@pytest.mark.parametrize("fault", [FlippedBit(), Stuck(), WrongScale()], ids=repr)
def test_a_faulty_worker_does_not_speak_where_an_honest_one_is_silent(fault):
    assert fault.forges(3) == [False] * 3
    assert SignFlip().forges(2) == [True] * 2


@pytest.mark.parametrize("m", [2, 3, 17])
def test_shuffled_labels_belong_to_other_samples(m):
    attack, labels = ShuffledLabels(), torch.arange(m)
    orders = set()
    for seed in range(20):
        x, shuffled = attack((torch.ones(m, 2), labels), torch.Generator().manual_seed(seed))
        assert (shuffled != labels).all()
        assert torch.equal(shuffled.sort().values, labels)
        assert x.shape == (m, 2)
        orders.add(tuple(shuffled.tolist()))
        assert torch.equal(shuffled, attack((x, labels), torch.Generator().manual_seed(seed))[1])
    assert torch.equal(labels, torch.arange(m))
    assert len(orders) == {2: 1, 3: 2, 17: 20}[m]


@pytest.mark.parametrize(
    "batch",
    [
        {"x": torch.ones(4, 2), "y": LABELS},
        Pair(torch.ones(4, 2), LABELS),
        [torch.ones(4, 2), LABELS],
    ],
)
def test_shuffled_labels_keep_the_batchs_type(batch):
    key = "y" if isinstance(batch, dict) else 1
    out = ShuffledLabels(key=key)(batch)
    assert type(out) is type(batch)
    assert torch.equal(out[key].sort().values, LABELS.sort().values)
    assert not torch.equal(out[key], LABELS)


def test_shuffled_labels_of_one_sample_and_of_none():
    assert ShuffledLabels()([torch.ones(1, 2), torch.tensor([7])])[1].tolist() == [7]
    with pytest.raises(ValueError, match=r"ShuffledLabels looks for the labels at batch\['y'\]"):
        ShuffledLabels(key="y")((1, 2))


def test_shuffled_labels_teach_nothing():
    """Logistic regression, all workers faulty: the gradient at 0 has nearly lost its signal."""
    w_true, x = rows_for(1, 6, seed=1, mean=0.0)[0], rows_for(400, 6, seed=2, mean=0.0)
    y = (x @ w_true > 0).double()

    def gradient(labels):
        return x.T @ (0.5 - labels) / len(labels)

    shuffled = ShuffledLabels()((x, y), torch.Generator().manual_seed(3))[1]
    assert gradient(shuffled).norm() < 0.25 * gradient(y).norm()


# -- a mixture -------------------------------------------------------------------------------------


def test_a_mixture_splits_the_workers_in_order():
    honest, own = rows_for(5, 6), rows_for(4, 6, seed=1)
    lies = Mixture((Zero(), BitFlip(), SignFlip()))(honest, own)
    assert torch.equal(lies, torch.stack([0 * own[0], 0 * own[1], -own[2], -honest.mean(0)]))
    lies = Mixture((Zero(), BitFlip()), counts=(1, 3))(honest, own)
    assert torch.equal(lies, torch.cat([0 * own[:1], -own[1:]]))


def test_the_split_does_not_depend_on_who_is_absent():
    honest, own = rows_for(5, 6), rows_for(2, 6, seed=1)
    lies = Mixture((Zero(), BitFlip()))(honest, own, Scene(own=[7, 9], byzantine=[1, 7, 8, 9]))
    assert torch.equal(lies, torch.stack([0 * own[0], -own[1]]))
    lies = Mixture((Zero(), BitFlip()))(honest, own, Scene(own=[8, 9], byzantine=[1, 7, 8, 9]))
    assert torch.equal(lies, -own)


def test_parts_of_a_mixture_remember_apart_at_any_depth():
    memory, first, later = {}, rows_for(4, 6), rows_for(4, 6, seed=1)
    attack = Mixture((Stuck(), Mixture((Stuck(), Mimic(warmup=2))), ALIE(1.0)), counts=(1, 2, 1))
    attack(first, first, Scene(memory=memory))
    assert sorted(memory) == ["0/0", "1/0/1", "1/1/mu", "1/1/rounds", "1/1/target", "1/1/z"]
    kept = dict(memory)
    lies = attack(later, later, Scene(memory=memory))
    assert torch.equal(lies[:2], first[:2])
    assert kept["0/0"] is memory["0/0"]
    assert int(memory["1/1/rounds"]) == 2


def test_a_part_tries_its_lies_next_to_those_of_the_parts_before_it():
    tried = []

    def server(lies):
        tried.append(lies.clone())
        return lies.mean(0)

    honest, own = rows_for(3, 4), rows_for(4, 4, seed=1)
    lies = Mixture((Zero(), OptimizedIPM(LineSearch(2)), BitFlip()), counts=(1, 2, 1))(
        honest, own, Scene(aggregate=server)
    )
    assert len(tried) == 2
    for factor, seen in zip((0.0, 1.0), tried, strict=True):
        torch.testing.assert_close(
            seen,
            torch.stack([0 * own[0], -factor * honest.mean(0), -factor * honest.mean(0), own[3]]),
        )
    assert torch.equal(lies[3], -own[3])


class Forgetful(Attack):
    def __call__(self, honest, own, scene=None):
        scene.memory.clear()
        scene.memory[str(scene.step)] = own.sum()
        return own


def test_what_a_part_forgets_is_forgotten():
    memory, rows = {"9/other": torch.ones(1)}, rows_for(2, 3)
    for step in range(3):
        Mixture((Forgetful(), Zero()))(rows, rows, Scene(memory=memory, step=step))
        assert sorted(memory) == [f"0/{step}", "9/other"]


def test_a_mixture_that_does_not_add_up_is_refused():
    rows = rows_for(4, 3)
    with pytest.raises(ValueError, match=r"add up to the 4 Byzantine workers. Found \[1, 2\]"):
        Mixture((Zero(), SignFlip()), counts=[1, 2])(rows, rows)
    with pytest.raises(ValueError, match="2 parts at least one worker. Found counts=\\[1, 0\\]"):
        Mixture((Zero(), SignFlip()), counts=(1, 0))
    with pytest.raises(
        ValueError, match="2 parts needs at least one Byzantine worker for each. Found 1"
    ):
        Mixture((Zero(), SignFlip())).check([3], 5)
    with pytest.raises(ValueError, match="target=1"):
        Mixture((Zero(), Mimic(target=1))).check([0, 1], 5)
    for parts in ((), (Zero(), LabelFlip(3))):
        with pytest.raises(
            ValueError, match="a DataAttack goes into a ByzantineWorkers of its own"
        ):
            Mixture(parts)
    assert Mixture((Stuck(), Zero())).forges(3) == [False, False, True]


def test_attacks_work_by_hand():
    honest, own = rows_for(4, 3), rows_for(2, 3, seed=1)
    assert torch.equal(IPM(0.5)(honest, own), -0.5 * honest.mean(0).expand(2, -1))
    assert torch.equal(Gaussian()(honest, own), Gaussian()(honest, own))


# -- the worst lie ---------------------------------------------------------------------------------

KNOWN = [
    SignFlip(1.0),
    SignFlip(3.0),
    IPM(0.1),
    IPM(0.5),
    ALIE(z=1.0),
    ALIE(z=1.5),
    MinMax(),
    FoE(),
]
RULES_AND_ROOM = {
    CoordinateMedian(f=4): 1e-6,
    TrimmedMean(f=4): 1e-6,
    GeometricMedian(f=4): 1e-3,
    MultiKrum(f=4): 0.05,
    Chain(pre=(NNM(),), rule=TrimmedMean(), f=4): 0.05,
    CAF(f=4, norm_floor=0.3): 0.1,
    SpectralFilter(f=4): 0.1,
    Krum(f=4): 0.05,
}
"""By rule, what another attack may lead farther, as a part of that."""


@pytest.mark.parametrize("rule", RULES_AND_ROOM, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("seed", range(3))
def test_the_worst_lie_leads_as_far_as_any_known_one(rule, seed):
    honest = rows_for(16, 50, seed=seed, mean=0.5)
    own, against = honest[:4].clone(), -honest.mean(0) / honest.mean(0).norm()
    calls = []

    def aggregate(lies):
        calls.append(lies)
        return rule(torch.cat([lies, honest]))

    def reached(attack):
        lies = attack(honest, own, Scene(aggregate=aggregate))
        return float(rule(torch.cat([lies, honest])) @ against)

    best = max(map(reached, KNOWN))
    for budget in (60, 30, 37):
        calls.clear()
        found = reached(WorstLie(budget=budget))
        assert len(calls) == budget
        assert budget < 60 or found >= best - RULES_AND_ROOM[rule] * abs(best)
    assert torch.equal(
        WorstLie()(honest, own, Scene(aggregate=aggregate)),
        WorstLie()(honest, own, Scene(aggregate=aggregate)),
    )


def test_the_worst_lie_leads_to_a_model(tmp_path):
    """Under a mean it gets there; the median lets it not past the honest rows."""
    goal, path = torch.tensor([5.0, -3.0, 1.0]).double(), tmp_path / "model.pt"
    torch.save(goal, path)
    for model in (goal, path, str(path)):
        for rule, close in ((Mean(), True), (CoordinateMedian(f=3), False)):
            x, attack = torch.zeros(3).double(), WorstLie("model", model)
            for step in range(60):
                honest = x + rows_for(7, 3, seed=step, mean=0.0)  # of |x|^2 / 2, with noise
                scene = Scene(
                    aggregate=lambda lies, h=honest, r=rule: r(torch.cat([h, lies])),
                    x=lambda x=x: x,
                )
                lies = attack(honest, honest[:3], scene)
                x = x - 0.1 * rule(torch.cat([honest, lies]))
            reached = float(x @ goal / goal.norm())
            assert bool(reached > goal.norm() / 2) == close, (rule, reached)


def test_the_worst_lie_behaves_where_it_knows_no_direction():
    honest = rows_for(7, 3)
    scene = Scene(aggregate=lambda lies: lies.mean(0), x=lambda: torch.ones(3).double())
    assert torch.equal(WorstLie("drift")(honest, honest[:2], scene), honest[:2])
    assert torch.equal(scene.memory["x_0"], torch.ones(3).double())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: WorstLie("model"), "Found goal='model' and no model"),
        (lambda: WorstLie("mean", torch.ones(3)), "Found goal='mean' and a model"),
        (lambda: WorstLie(budget=29), "`budget` should be at least 30. Found 29"),
        (lambda: WorstLie("up"), "should be 'mean', 'drift' or 'model'. Found 'up'"),
    ],
)
def test_worst_lies_that_make_no_sense_are_errors(make, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make()


def test_a_model_of_another_size_is_an_error(tmp_path):
    honest = rows_for(7, 3)
    scene = Scene(aggregate=lambda lies: lies.mean(0), x=lambda: torch.zeros(3).double())
    with pytest.raises(ValueError, match=re.escape("parameters [d] = [3]. Found [4]")):
        WorstLie("model", torch.ones(4))(honest, honest[:2], scene)
    torch.save({"weight": torch.ones(3)}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="should hold a vector of parameters.*Found dict"):
        WorstLie("model", tmp_path / "m.pt")(honest, honest[:2], scene)
