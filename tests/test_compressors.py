"""Laws over every compressor in the zoo."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo import COMPRESSORS, each, laws, rows_for

from lightning_byz import compressors
from lightning_byz.compressors import (
    QSGD,
    Contractive,
    ContractiveRandK,
    Field,
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
from lightning_byz.compressors.bits import (
    at_least,
    look_up_bits,
    pack_bits,
    packed_bytes,
    unpack_bits,
)
from lightning_byz.compressors.sparse import largest

D = 20
SPARSE = [case for case in COMPRESSORS if case.sparse]
RANDOM = [case for case in COMPRESSORS if case.random]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def round_trips(compressor, x, times, seed=0):
    generator = stream(seed)
    return torch.stack(
        [compressor.decode(compressor.encode(x, generator), len(x)) for _ in range(times)]
    )


# -- the wire --------------------------------------------------------------------------------------


@each(COMPRESSORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 7, 20, 1000])
def test_the_layout_is_what_encode_gives_and_bytes_are_those_on_the_wire(case, dtype, dim):
    for x in (
        rows_for(1, dim, dtype=dtype)[0],
        torch.zeros(dim, dtype=dtype),
        torch.ones(dim, dtype=dtype),
    ):
        compressor = case.of(dim)
        payload = compressor.encode(x, stream())
        layout = compressor.layout(dim, dtype)
        assert tuple(Field(tuple(t.shape), t.dtype) for t in payload) == layout
        assert (
            sum(t.nbytes for t in payload)
            == compressor.nbytes(dim, dtype)
            == sum(field.nbytes for field in layout)
        )
        assert compressor.valid(payload, dim)
        decoded = compressor.decode(payload, dim)
        assert decoded.shape == (dim,)
        assert decoded.dtype == dtype


@pytest.mark.parametrize(
    ("compressor", "dim", "nbytes"),
    [
        (Identity(), 100, 400),
        (TopK(ratio=0.1), 100, 80),
        (TopK(k=5), 100, 40),
        (RandK(ratio=0.01), 50, 8),
        (TopK(k=500), 100, 800),
    ],
)
def test_bytes(compressor, dim, nbytes):
    assert compressor.nbytes(dim, torch.float32) == nbytes


def test_indices_are_64_bit_only_where_32_do_not_suffice():
    assert TopK(k=1).layout(2**31 - 1, torch.float32)[1].dtype == torch.int32
    assert TopK(k=1).layout(2**31, torch.float32)[1].dtype == torch.int64


@each(COMPRESSORS)
def test_same_generator_same_payload_and_the_input_is_untouched(case):
    x = rows_for(1, D)[0]
    before = x.clone()
    payloads = [case.of(D).encode(x, stream(5)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*payloads, strict=True))
    decoded = case.of(D).decode(payloads[0], D)
    assert torch.equal(decoded, case.of(D).decode(payloads[0], D))
    assert torch.equal(x, before)


@each(COMPRESSORS)
def test_the_global_generator_is_neither_used_nor_moved(case):
    torch.manual_seed(1)
    first, state = case.of(D).encode(rows_for(1, D)[0], stream(5)), torch.get_rng_state()
    torch.manual_seed(2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first, case.of(D).encode(rows_for(1, D)[0], stream(5)), strict=True)
    )
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


@each([case for case in SPARSE if case.random and case.compressor.count(D) < D])
def test_another_generator_draws_other_coordinates(case):
    picks = {
        tuple(case.compressor.encode(torch.ones(D), stream(seed))[1].tolist()) for seed in range(10)
    }
    assert len(picks) > 5


# -- the operator ----------------------------------------------------------------------------------


@each([case for case in COMPRESSORS if case.of(D).contraction(D) is not None])
@pytest.mark.parametrize(
    "x",
    [rows_for(1, D, seed)[0] for seed in range(3)]
    + [torch.ones(D).double(), torch.eye(D).double()[3]],
)
def test_contraction_is_at_least_what_is_declared(case, x):
    alpha = case.of(D).contraction(D)
    errors = ((round_trips(case.of(D), x, 600 if case.random else 1) - x) ** 2).sum(1) / (
        x**2
    ).sum()
    slack = 3 * float(errors.std()) / math.sqrt(len(errors)) if case.random else 0.0
    assert 0 < alpha <= 1
    assert errors.mean() <= 1 - alpha + slack + 1e-12


@each([case for case in COMPRESSORS if case.of(D).variance(D) is not None])
@pytest.mark.parametrize("d", [D, 6])
def test_unbiased_with_the_declared_variance(case, d):
    x, times = rows_for(1, d, seed=2)[0], 4000 if case.random else 2
    omega = case.of(d).variance(d)
    out = round_trips(case.of(d), x, times)
    standard_error = math.sqrt(omega * float((x**2).sum()) / times)
    assert torch.linalg.vector_norm(out.mean(0) - x) <= 3 * standard_error + 1e-12
    variance, declared = float(((out - x) ** 2).sum(1).mean()), omega * float((x**2).sum())
    assert (
        variance == pytest.approx(declared, rel=0.06, abs=1e-12)
        if case.tight
        else variance <= 1.06 * declared
    )


@each(SPARSE)
def test_nothing_is_declared_both_biased_and_unbiased_wrongly(case):
    """Scaled Rand-K blows up in an EF21 recursion, so it must not call itself contractive."""
    assert (case.compressor.contraction(D) is None) == isinstance(case.compressor, RandK)
    assert case.compressor.variance(D) is None or case.compressor.variance(D) == pytest.approx(
        D / case.compressor.count(D) - 1
    )


@pytest.mark.parametrize(
    ("compressor", "bits"),
    [
        (Sign(), 1),
        (ScaledSign(), 1),
        (TernGrad(), 2),
        (QSGD(levels=7), 4),
        (QSGD(levels=127), 8),
        (NaturalCompression(), 9),
    ],
    ids=repr,
)
def test_bits_of_a_coordinate_on_the_wire(compressor, bits):
    assert 0 <= compressor.nbytes(32_000, torch.float32) - 4000 * bits <= 4


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@laws
@given(seed=st.integers(0, 10**6), count=st.integers(1, 100))
def test_bits_pack_and_unpack(width, seed, count):
    values = torch.randint(2**width, (count,), generator=stream(seed)).to(torch.uint8)
    packed = pack_bits(values, width)
    assert len(packed) == packed_bytes(count, width) == 4 * math.ceil(count * width / 32)
    assert torch.equal(unpack_bits(packed, width, count), values)
    by_hand = [sum(code << (width * i) for i, code in enumerate(values[first : first + 8 // width].tolist()))
               for first in range(0, count, 8 // width)]  # fmt: skip
    assert packed.tolist() == by_hand + [0] * (len(packed) - len(by_hand))
    meaning = torch.randn(2**width, generator=stream(seed))
    assert torch.equal(look_up_bits(packed, width, count, meaning), meaning[values.int()])


def test_signs_of_zeros_are_plus_one_and_the_scale_is_the_mean_magnitude():
    x = torch.tensor([0.0, -0.0, -3.0, 5.0])
    assert Sign().decode(Sign().encode(x), 4).tolist() == [1, 1, -1, 1]
    assert ScaledSign().decode(ScaledSign().encode(x), 4).tolist() == [2, 2, -2, 2]


def test_natural_compression_gives_the_powers_of_two_around_a_number():
    x = torch.tensor([3.0, -0.3, 4.0, 0.0, 1e-45, -3.3e38]).repeat(500)
    out = round_trips(NaturalCompression(), x, 1)[0].view(500, 6)
    assert [sorted(column.unique().tolist()) for column in out.T] == [
        [2, 4],
        [-0.5, -0.25],
        [4],
        [0],
        [0],
        [-(2.0**127)],
    ]


def test_float16_does_not_overflow():
    x = torch.tensor([1e30, -2e30, 1e27])
    torch.testing.assert_close(Float16().decode(Float16().encode(x), 3), x, rtol=2**-10, atol=0)


@each(SPARSE)
@laws
@given(seed=st.integers(0, 10**6), d=st.integers(1, 60))
def test_sparse_messages_hold_k_scaled_values_of_x_in_increasing_order(case, seed, d):
    x = rows_for(1, d, seed)[0]
    values, index = case.compressor.encode(x, stream(seed))
    k = case.compressor.count(d)
    assert len(index) == len(index.unique()) == k
    assert torch.equal(index, index.sort().values)
    scale = d / k if isinstance(case.compressor, RandK) else 1
    torch.testing.assert_close(values, scale * x[index.long()])
    expected = torch.zeros(d, dtype=x.dtype)
    for value, i in zip(values.tolist(), index.tolist(), strict=True):
        expected[i] = value
    assert torch.equal(case.compressor.decode((values, index), d), expected)


@laws
@given(seed=st.integers(0, 10**6), d=st.integers(1, 40), k=st.integers(1, 40))
def test_top_k_keeps_the_largest_and_exactly_k_of_them_also_among_ties(seed, d, k):
    x = rows_for(1, d, seed, scale=2.0)[0].round()
    out = TopK(k=k).decode(TopK(k=k).encode(x), d)
    kept = x.abs().sort(descending=True).values[: min(k, d)].sum()
    assert out.abs().sum() == kept
    assert len(TopK(k=k).encode(x)[1]) == min(k, d)


LONG = 300_000  # long enough for a sampled threshold, and for two blocks
SHAPES = {
    "normal": lambda: torch.randn(LONG, generator=stream()),
    "half precision": lambda: torch.randn(LONG, generator=stream()).bfloat16(),
    "heavy tails": lambda: torch.randn(LONG, generator=stream()) ** 9,
    "few different": lambda: torch.randn(LONG, generator=stream()).round(),
    "zeros": lambda: torch.zeros(LONG),
    "sorted": lambda: torch.arange(LONG) - LONG / 3,
    "one block of large numbers": lambda: torch.cat([torch.randn(LONG - 900, generator=stream()), 1e6 + torch.arange(900.0)]),
    "few that are not 0": lambda: torch.zeros(LONG).index_fill_(0, torch.arange(0, LONG, 3331), 1.0),
    "with infinities and nan": lambda: torch.randn(LONG, generator=stream()).index_fill_(0, torch.arange(50), torch.nan).index_fill_(
        0, torch.arange(50, 99), -torch.inf
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 60, 1000, LONG // 8, LONG // 2])
def test_a_sampled_threshold_finds_what_topk_finds(shape, k):
    x = SHAPES[shape]()
    index, state = largest(x, k), torch.get_rng_state()
    assert len(index) == len(index.unique()) == k
    found, expected = x[index].abs().sort().values, x.abs().topk(k).values.sort().values
    assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_misleading_sample_does_not_mislead():
    sampled = torch.randint(LONG, (32_768,), generator=torch.Generator().manual_seed(0))
    x = torch.ones(LONG).index_fill_(0, sampled, 2.0)
    # the threshold that the sample gives, 2, is reached by enough; now by too few
    k = int((x == 2).sum()) // 4
    assert (x[largest(x, k)] == 2).all()
    x = torch.arange(1.0, LONG + 1) / LONG
    x[sampled] = 3.0
    x[sampled.unique()[40:]] = 0.0  # most of the sample is 0, all else is not
    for k in (30, 40, 41, 500, 5000):
        assert torch.equal(x[largest(x, k)].sort().values, x.topk(k).values.sort().values)


def test_the_norm_that_qsgd_sends_is_right_for_many_numbers():
    """In float32 a sum of squares of one stops at 2^24 times the number of its partial sums."""
    x = torch.ones(1).expand(2**27 + 2**26)
    torch.testing.assert_close(QSGD().scale(x).item(), math.sqrt(len(x)))


# -- low rank --------------------------------------------------------------------------------------


@laws
@given(
    seed=st.integers(0, 10**6),
    d=st.integers(1, 80),
    rank=st.integers(1, 9),
    iterations=st.integers(1, 3),
)
def test_low_rank_is_an_orthogonal_projection_of_the_nearly_square_matrix(
    seed, d, rank, iterations
):
    x = rows_for(1, d, seed, mean=0.1)[0]
    compressor = LowRank(rank, iterations)
    p, q = compressor.encode(x, stream(seed))
    side = math.ceil(math.sqrt(d))
    assert p.shape[0] == side
    assert side - 2 <= q.shape[0] <= side
    assert p.shape[1] == q.shape[1] == min(rank, q.shape[0])
    torch.testing.assert_close(p.T @ p, torch.eye(p.shape[1]).double(), rtol=0, atol=1e-9)
    m = np.zeros(p.shape[0] * q.shape[0])
    m[:d] = x
    m = m.reshape(p.shape[0], q.shape[0])
    decoded = compressor.decode((p, q), d)
    assert decoded.numpy() == pytest.approx(
        (p.numpy() @ (p.numpy().T @ m)).reshape(-1)[:d], abs=1e-9
    )
    if rank >= q.shape[0]:
        torch.testing.assert_close(decoded, x, rtol=0, atol=1e-9)
    best = (np.linalg.svd(m, compute_uv=False)[rank:] ** 2).sum()
    error = float(((decoded - x) ** 2).sum())
    assert error >= best - float(((m - (p @ q.T).numpy()).reshape(-1)[d:] ** 2).sum()) - 1e-9


def test_low_rank_keeps_what_has_low_rank_and_more_iterations_keep_more():
    u, v = torch.randn(2, 12, 2, generator=stream(3), dtype=torch.float64)
    exact = (u @ v.T).flatten()
    torch.testing.assert_close(round_trips(LowRank(rank=2), exact, 1)[0], exact)
    x = exact + 0.5 * rows_for(1, 144, mean=0.0)[0]
    once, thrice = (((round_trips(LowRank(2, i), x, 200) - x) ** 2).sum(1).mean() for i in (1, 3))
    best = (torch.linalg.svdvals(x.view(12, 12))[2:] ** 2).sum()
    assert best <= thrice
    assert thrice - best < 0.3 * (once - best)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_contraction_of_low_rank_is_reached_where_no_direction_is_larger_than_another(rank):
    x = torch.linalg.qr(torch.randn(7, 7, generator=stream(), dtype=torch.float64)).Q.flatten()
    error = ((round_trips(LowRank(rank), x, 1)[0] - x) ** 2).sum() / (x**2).sum()
    assert error.item() == pytest.approx(1 - LowRank(rank).contraction(49), abs=1e-12)


def test_low_rank_survives_the_largest_and_the_smallest_numbers():
    for value in (3e38, 1e-40, 0.0):
        x = torch.full((30,), value)
        payload = LowRank(rank=2).encode(x, stream())
        assert LowRank(rank=2).valid(payload, 30)
        assert torch.isfinite(LowRank(rank=2).decode(payload, 30)).all()


# -- per tensor, per shard -------------------------------------------------------------------------


def test_per_tensor_is_the_compressor_of_each_tensor():
    x, sizes = rows_for(1, 50, mean=0.0)[0], (7, 0, 30, 13)
    compressor = PerTensor(TopK(ratio=0.1), sizes=sizes)
    parts = [
        TopK(ratio=0.1).decode(TopK(ratio=0.1).encode(part), len(part))
        for part in x.split((7, 30, 13))
    ]
    assert torch.equal(compressor.decode(compressor.encode(x), 50), torch.cat(parts))
    assert [int(part.count_nonzero()) for part in parts] == [1, 3, 1]
    assert compressor.contraction(50) == 1 / 13
    assert PerTensor(RandK(k=1), sizes).variance(50) == 29
    assert compressor.for_sizes((1, 2)) == compressor, "given sizes stay"
    assert Contractive(PerTensor(RandK(k=1))).for_sizes(sizes).inner.sizes == sizes
    assert PerShard(PerTensor(TopK(k=1))).for_sizes(sizes).inner.sizes == sizes


def test_per_tensor_needs_the_sizes():
    compressor = PerTensor(TopK(k=1))
    assert compressor.contractive
    assert not compressor.unbiased
    for use in (
        lambda: compressor.layout(3, torch.float32),
        lambda: compressor.encode(torch.ones(3)),
        lambda: compressor.contraction(3),
    ):
        with pytest.raises(
            ValueError, match=r"vector's 3. Found sizes=None.*strategy fills them in"
        ):
            use()
    with pytest.raises(ValueError, match=r"vector's 4. Found sizes=\(1, 2\)"):
        PerTensor(TopK(k=1), (1, 2)).encode(torch.ones(4))
    with pytest.raises(TypeError, match="should be a compressor.*Found 0.1"):
        PerTensor(0.1)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 9, 20])
def test_votes_are_counted_on_packed_bits(n):
    votes = torch.rand(n, 100, generator=stream(n)) < torch.linspace(0, 1, 100)
    packed = [pack_bits(row, 1) for row in votes]
    before = [row.clone() for row in packed]
    for count in range(1, n + 2):
        assert torch.equal(
            unpack_bits(at_least(packed, count), 1, 100).bool(), votes.sum(0) >= count
        )
    assert all(torch.equal(a, b) for a, b in zip(packed, before, strict=True))


@each(COMPRESSORS)
@laws
@given(d=st.integers(1, 400), shards=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_the_shares_of_a_payload_are_the_columns_of_what_it_stands_for(case, d, shards, seed):
    compressor, x = case.of(d), rows_for(1, d, seed, mean=0.0, dtype=torch.float32)[0]
    size = 32 * -(-d // (32 * shards))
    bounds = [min(i * size, d) for i in range(shards + 1)]
    parts = [compressor.part(d, first, last) for first, last in itertools.pairwise(bounds)]
    payload = compressor.encode(x, stream(seed))
    if any(part is None for part in parts):
        with pytest.raises(TypeError, match="cannot be split"):
            compressor.split(payload, d, bounds)
        return
    shares, decoded = compressor.split(payload, d, bounds), []
    for part, share, (first, last) in zip(parts, shares, itertools.pairwise(bounds), strict=True):
        layout = part.layout(last - first, torch.float32)
        assert [tensor.dtype for tensor in share] == [field.dtype for field in layout]
        if compressor.sparse:
            assert all(
                tensor.shape <= field.shape for tensor, field in zip(share, layout, strict=True)
            )
        else:
            assert [tuple(tensor.shape) for tensor in share] == [field.shape for field in layout]
        assert part.valid(share, last - first)
        decoded.append(part.decode(share, last - first))
    assert torch.equal(torch.cat(decoded), compressor.decode(payload, d))
    if compressor.sparse:
        sizes = [sum(len(share[i]) for share in shares) for i in range(len(payload))]
        assert sizes == [len(tensor) for tensor in payload]


def test_which_payloads_cannot_be_cut():
    """Those of low rank, and codes that are packed for tensors that begin inside a word."""
    whole = {case.name for case in COMPRESSORS if case.of(200).part(200, 32, 64) is None}
    assert whole == {"rank_1", "rank_2_twice", "low_rank_per_tensor"}
    assert PerTensor(Sign(), (40, 60)).part(100, 0, 32) is not None
    assert PerTensor(Sign(), (40, 60)).part(100, 32, 64) is None


@laws
@given(d=st.integers(1, 400), shards=st.integers(1, 6))
def test_shards_are_equal_and_their_bounds_multiples_of_32(d, shards):
    sizes = PerShard(Identity(), shards=shards).blocks(d)
    assert sum(sizes) == d
    assert 1 <= len(sizes) <= shards
    assert len(set(sizes[:-1])) <= 1
    assert all(size % 32 == 0 for size in sizes[:-1])
    assert 0 < sizes[-1] <= max(sizes)


@pytest.mark.parametrize(("k", "d"), [(3, 20), (1, 8), (5, 7), (2, 16), (10, 40), (9, 36)])
def test_rand_k_picks_every_coordinate_and_every_pair_equally_often(k, d):
    times, generator = 3000, stream(7)
    picked = torch.zeros(times, d)
    for row in picked:
        row[RandK(k=k).encode(torch.ones(d), generator)[1].long()] = 1
    p = k / d
    assert (picked.mean(0) - p).abs().max() <= 4.5 * math.sqrt(p * (1 - p) / times)
    pairs, q = (
        (picked.T @ picked / times)[~torch.eye(d, dtype=torch.bool)],
        k * (k - 1) / (d * (d - 1)),
    )
    assert (pairs - q).abs().max() <= 5 * math.sqrt(q * (1 - q) / times) + 1e-9


# -- what an adversary may send --------------------------------------------------------------------

D_WIRE, K_WIRE = 10, 3


@pytest.mark.parametrize("compressor", [TopK(k=K_WIRE), RandK(k=K_WIRE)])
@pytest.mark.parametrize(
    ("index", "valid"),
    [
        ([0, 4, 9], True),
        ([7, 8, 9], True),
        ([-1, 4, 9], False),
        ([0, 4, 10], False),
        ([0, 4, 2**31 - 1], False),
        ([-(2**31), 4, 9], False),
        ([4, 4, 9], False),
        ([0, 9, 9], False),
        ([0, 9, 4], False),
        ([9, 4, 0], False),
        ([0, 12, 4], False),
    ],
)
def test_valid_refuses_indices_that_are_outside_repeated_or_unsorted(compressor, index, valid):
    payload = torch.ones(K_WIRE), torch.tensor(index, dtype=torch.int32)
    assert bool(compressor.valid(payload, D_WIRE)) == valid


@pytest.mark.parametrize("levels", [1, 2, 4, 100])
def test_valid_refuses_codes_beyond_the_levels(levels):
    """0 to 2s say something; bits have room for more."""
    codec, d = QSGD(levels=levels), 7
    for code in range(2**codec.width):
        for place in (0, d - 1):
            codes = torch.zeros(d, dtype=torch.uint8)
            codes[place] = code
            payload = pack_bits(codes, codec.width), torch.ones(1)
            assert bool(codec.valid(payload, d)) == (code <= 2 * levels)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@each(COMPRESSORS)
def test_valid_refuses_numbers_that_are_not_finite(case, bad):
    for position in (0, -1):
        payload = [tensor.clone() for tensor in case.of(D).encode(torch.ones(D), stream())]
        assert case.of(D).valid(tuple(payload), D)
        number = next((t for t in payload if t.is_floating_point() and t.numel()), None)
        if number is None:  # every bit pattern is a number
            return
        number[position] = bad
        verdict = case.of(D).valid(tuple(payload), D)
        assert verdict.shape == ()
        assert verdict.dtype == torch.bool
        assert not verdict


@each(COMPRESSORS)
@laws
@given(seed=st.integers(0, 10**6), d=st.integers(1, 40))
def test_whatever_bytes_are_valid_decode_to_finite_numbers(case, seed, d):
    """An adversary chooses the bytes; what passes the check must not bring an inf into a rule."""
    generator = stream(seed)
    for codes in (256, 4):  # anything, and mostly small codes, so that some pass
        payload = []
        for field in case.of(d).layout(d, torch.float32):
            noise = torch.randint(codes, (field.nbytes,), generator=generator).to(torch.uint8)
            tensor = noise.view(field.dtype).view(field.shape)
            if tensor.is_floating_point():
                tensor = torch.where(
                    torch.rand(field.shape, generator=generator) < 0.3,
                    torch.finfo(field.dtype).max,
                    tensor,
                )
            payload.append(tensor)
        if case.of(d).valid(tuple(payload), d):
            assert torch.isfinite(case.of(d).decode(tuple(payload), d)).all()


@laws
@given(
    st.lists(st.integers(-3, D_WIRE + 3), min_size=K_WIRE, max_size=K_WIRE),
    st.lists(st.floats(width=32), min_size=3, max_size=3),
)
def test_whatever_is_valid_can_be_decoded_and_says_what_it_claims(index, values):
    payload = torch.tensor(values, dtype=torch.float32), torch.tensor(index, dtype=torch.int32)
    expected = all(map(math.isfinite, values)) and 0 <= index[0] < index[1] < index[2] < D_WIRE
    assert bool(TopK(k=K_WIRE).valid(payload, D_WIRE)) == expected
    if expected:
        out = TopK(k=K_WIRE).decode(payload, D_WIRE)
        assert torch.equal(out[payload[1].long()], payload[0])
        assert out.count_nonzero() == payload[0].count_nonzero()


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TopK, RandK, ContractiveRandK])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of"),
        ({"ratio": 0.1, "k": 3}, "exactly one of"),
        ({"ratio": 0.0}, r"in \(0, 1\]"),
        ({"ratio": 1.5}, r"in \(0, 1\]"),
        ({"ratio": -0.1}, r"in \(0, 1\]"),
        ({"k": 0}, "at least 1"),
        ({"k": 2.5}, "an integer of at least 1. Found k=2.5"),
    ],
)
def test_wrong_settings_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@each(RANDOM)
def test_without_a_generator_it_is_refused(case):
    with pytest.raises(ValueError, match=r"generator=None. Pass torch.Generator"):
        case.of(3).encode(torch.arange(1.0, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(rank=0), "rank=0"),
        (lambda: LowRank(iterations=0), "iterations=0"),
        (lambda: PerShard(TopK(k=1), 0), "shards=0"),
    ],
)
def test_wrong_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@each(COMPRESSORS)
def test_compressors_are_values(case):
    assert hash(case.compressor) == hash(case.compressor)
    assert eval(repr(case.compressor), vars(compressors)) == case.compressor


@pytest.mark.parametrize(
    "codec", [TopK(ratio=0.01), PerTensor(TopK(ratio=0.01), (70_000, 130_000))], ids=repr
)
def test_the_largest_of_a_difference_are_found_without_storing_it(codec):
    x, noise = rows_for(2, 200_000, seed=3, dtype=torch.float32)
    y = x / 2 + noise / 5  # near x, as a mirror is: the largest of x are others
    for found, expected in zip(codec.encode_difference(x, y), codec.encode(x - y), strict=True):
        assert torch.equal(found, expected)


def test_numbers_may_be_numpys():
    """As where they are computed from sizes."""
    assert TopK(k=np.int64(3)).encode(torch.arange(5.0), torch.Generator())[0].numel() == 3
    assert QSGD(levels=np.int32(4)).levels == 4
