"""A conformance kit: what every rule, compressor and attack should hold, runnable on anybody's.

``check_aggregator(rule)``, ``check_compressor(compressor)`` and ``check_attack(attack)`` raise an AssertionError that lists every law that is broken;
``aggregator_laws(rule)`` and its siblings answer with all laws and what was found. A rule is anything that maps a matrix ``[n, d]`` to a vector
``[d]``, of this package or of another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_byz.aggregators import Aggregator, TooFewRowsError
from lightning_byz.attacks import Attack, DataAttack, Scene
from lightning_byz.compressors import Compressor

AnyRule: TypeAlias = Callable[[Tensor], Tensor]


class Law(NamedTuple):
    """What became of a law.

    Attributes:
        name: the law, in words.
        holds: whether it does.
        found: what was found instead; empty if it holds.
    """

    name: str
    holds: bool
    found: str = ""


_Case: TypeAlias = "tuple[str, Callable[[], None]]"


def _verdicts(cases: Iterator[_Case]) -> list[Law]:
    laws = []
    for name, law in cases:
        try:
            law()
        except Exception as error:  # noqa: PERF203 - a broken law may end in anything
            laws.append(Law(name, False, f"{type(error).__name__}: {error}".strip().split("\n")[0]))
        else:
            laws.append(Law(name, True))
    return laws


def _raise(subject: Any, laws: Sequence[Law]) -> None:
    broken = [law for law in laws if not law.holds]
    if broken:
        lines = "\n".join(f"  - {law.name}: {law.found}" for law in broken)
        raise AssertionError(f"{subject!r} breaks {len(broken)} of {len(laws)} laws:\n{lines}")


def _near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    size = float(expected.double().abs().max())
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance * max(size, 1e-30))


def _rows(n: int, d: int, seed: int, mean: float = 1.0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    noise = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (mean + scale * noise).to(dtype)


# -- aggregators ----------------------------------------------------------------------------------------------------------

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
        rule: maps ``[n, d]`` to ``[d]``. An `Aggregator` of this package gets ``f``; any other callable has to know it already.
        n: rows.
        f: rows that may be anything.
        d: columns.
        robust: f arbitrary rows move it by no more than (1 + sqrt n) times the honest rows' diameter.
        symmetric: the order of the rows does not matter.
        unanimous: equal rows give that row.
        translation_equivariant: it moves with the rows.
        scale_equivariant: it scales with the rows, also by negative numbers.
    """
    if isinstance(rule, Aggregator):
        rule = rule.with_f(f)
    claims = {name: value for name, value in locals().items() if isinstance(value, bool)}
    return _verdicts(_aggregator_cases(rule, n, f, d, claims))


def check_aggregator(rule: AnyRule, n: int = 11, f: int = 2, d: int = 13, **claims: bool) -> None:
    """Raises an AssertionError that names every law that a rule breaks; the arguments are those of `aggregator_laws`."""
    _raise(rule, aggregator_laws(rule, n, f, d, **claims))


def _aggregator_cases(rule: AnyRule, n: int, f: int, d: int, claims: dict[str, bool]) -> Iterator[_Case]:
    x = _rows(n, d, 0)

    def unanimity() -> None:
        row = _rows(1, d, 4, scale=100.0)
        _near(rule(row.repeat(n, 1)), row[0], 1e-5)

    def order() -> None:
        _near(rule(x.flip(0)), rule(x), 1e-5)

    def shift() -> None:
        v = 100 * _rows(1, d, 9)[0]
        _near(rule(x + v), rule(x) + v, 1e-5)

    def scale() -> None:
        for factor in (-1.0, 1e-12, -7.0, 1e20):
            _near(rule(factor * x), factor * rule(x), 1e-5)

    def untouched() -> None:
        for dtype in (torch.float64, torch.float32):
            given = (50 * x).to(dtype)
            rule(given)
            assert torch.equal(given, (50 * x).to(dtype)), f"the caller's {dtype} rows were overwritten"

    def own_memory() -> None:
        given = x.float()
        rule(given).fill_(7)
        assert torch.equal(given, x.float()), "writing into the result writes into the caller's rows"

    def bits() -> None:
        assert torch.equal(rule(x.clone()), rule(x.clone())), "two calls on the same rows differ"

    def common_mean() -> None:
        close = _rows(n, 40, 3, mean=1e4, scale=1e-2, dtype=torch.float32)
        _near(rule(close), rule(close.double()), 8 * torch.finfo(torch.float32).eps)

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
        yield f"{str(dtype).removeprefix('torch.')} rows give such a result", partial(_keeps_dtype, rule, x, dtype)
    yield "a large common mean costs no digits", common_mean
    if claims["robust"]:
        mean = 50.0 if claims["translation_equivariant"] else 5.0  # far from 0, where a rule may not favour it
        for name, value in _JUNK.items():
            junk = torch.full((f, d), value, dtype=torch.float32)
            yield f"f rows of {name}", partial(_withstands, rule, n, junk, mean)
        one_nan = torch.cat([torch.zeros(f, d - 1), torch.full((f, 1), math.nan)], 1)
        yield "one nan in a row", partial(_withstands, rule, n, one_nan, mean)
        yield "f equal rows, far away", partial(_withstands, rule, n, _rows(1, d, 98, 0.0, 30.0, torch.float32).expand(f, d), mean)
        sizes = 10.0 ** (6 * torch.arange(f) - 2)
        yield "f rows of different sizes", partial(_withstands, rule, n, sizes[:, None].expand(f, d), mean)
        if isinstance(rule, Aggregator):
            yield "n = 2f is refused", partial(_refuses, rule.with_f(n // 2), n // 2 * 2, d)


def _keeps_dtype(rule: AnyRule, x: Tensor, dtype: torch.dtype) -> None:
    out = rule(x.to(dtype))
    assert out.dtype == dtype, f"a result of {out.dtype}"
    assert out.shape == x.shape[1:], f"a result of shape {list(out.shape)}"
    _near(out, rule(x.to(dtype).double()), 4 * torch.finfo(dtype).eps)


def _withstands(rule: AnyRule, n: int, junk: Tensor, mean: float) -> None:
    honest = _rows(n - len(junk), junk.shape[1], 2, mean=mean, dtype=torch.float32)
    center = honest.double().mean(0)
    diameter = float(torch.cdist(honest.double(), honest.double(), compute_mode="donot_use_mm_for_euclid_dist").max())
    for rows in (torch.cat([junk, honest]), torch.cat([honest, junk])):
        out = rule(rows.to(honest.dtype)).double()
        assert bool(torch.isfinite(out).all()), "the result is not finite"
        moved = float(torch.linalg.vector_norm(out - center))
        assert moved <= (1 + n**0.5) * diameter, f"the result is {moved:.3g} from the honest mean; their diameter is {diameter:.3g}"


def _refuses(rule: AnyRule, n: int, d: int) -> None:
    try:
        rule(_rows(n, d, 0))
    except TooFewRowsError:
        return
    raise AssertionError("it answered")


# -- compressors ----------------------------------------------------------------------------------------------------------


def compressor_laws(compressor: Compressor, dims: Sequence[int] = (1, 2, 40, 1000), draws: int = 400) -> list[Law]:
    """All laws, and whether a compressor holds them.

    Args:
        compressor: of this package's interface.
        dims: lengths of the vectors that are tried.
        draws: how often a random one is drawn, for its mean and its variance.
    """
    return _verdicts(_compressor_cases(compressor, dims, draws))


def check_compressor(compressor: Compressor, dims: Sequence[int] = (1, 2, 40, 1000), draws: int = 400) -> None:
    """Raises an AssertionError that names every law that a compressor breaks; the arguments are those of `compressor_laws`."""
    _raise(compressor, compressor_laws(compressor, dims, draws))


def _stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _compressor_cases(compressor: Compressor, dims: Sequence[int], draws: int) -> Iterator[_Case]:
    for dim in dims:
        sized = compressor.for_sizes((dim - dim // 2, dim // 2))  # for those that look at the tensors of a model
        x = _rows(1, dim, 5, dtype=torch.float32)[0]
        yield f"d = {dim}: the payload has the layout, whatever the values", partial(_has_layout, sized, x)
        yield f"d = {dim}: same generator, same payload; the input is not modified", partial(_is_pure, sized, x)
        yield f"d = {dim}: its own payloads are valid, and those with a nan are not", partial(_guards, sized, x)
        yield f"d = {dim}: decoded into given memory, and added, it is what it decodes to", partial(_lands, sized, x)
        yield f"d = {dim}: a difference is encoded as what it is", partial(_takes_differences, sized, x)
        if sized.sparse:
            yield f"d = {dim}: its entries are what it decodes to", partial(_has_entries, sized, x)
        if sized.tells_nonfinite:
            yield f"d = {dim}: the payload of a vector with a nan or an inf is not valid", partial(_tells, sized, x)
        if sized.coordinate_wise:
            yield f"d = {dim}: the payloads of pieces make up the whole one", partial(_in_pieces, sized, x)
        if sized.contraction(dim) is not None:
            yield f"d = {dim}: contracts as declared", partial(_contracts, sized, x, draws)
        if sized.variance(dim) is not None:
            yield f"d = {dim}: unbiased, with the variance declared", partial(_unbiased, sized, x, draws)


def _has_layout(compressor: Compressor, x: Tensor) -> None:
    for values in (x, torch.zeros_like(x), 1e20 * x, x.double()):
        layout = compressor.layout(len(x), values.dtype)
        payload = compressor.encode(values, _stream())
        found = [(tuple(part.shape), part.dtype) for part in payload]
        assert found == [tuple(field) for field in layout], f"a payload of {found} where {layout} is declared"
        assert sum(part.nbytes for part in payload) == compressor.nbytes(len(x), values.dtype), "another number of bytes"
        decoded = compressor.decode(payload, len(x))
        assert decoded.shape == x.shape, f"decoded to shape {list(decoded.shape)}"


def _is_pure(compressor: Compressor, x: Tensor) -> None:
    given = x.clone()
    first, second = (compressor.encode(given, _stream(3)) for _ in range(2))
    assert torch.equal(given, x), "the input was overwritten"
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two encodings with the same generator differ"


def _guards(compressor: Compressor, x: Tensor) -> None:
    payload = compressor.encode(x, _stream())
    assert bool(compressor.valid(payload, len(x))), "its own payload is not valid"
    for i, part in enumerate(payload):
        if part.is_floating_point() and part.numel():
            bad = part.clone(memory_format=torch.contiguous_format)
            bad.view(-1)[-1] = math.nan
            assert not bool(compressor.valid((*payload[:i], bad, *payload[i + 1 :]), len(x))), "a nan in the payload is valid"


def _lands(compressor: Compressor, x: Tensor) -> None:
    payload, given = compressor.encode(x, _stream()), x.clone()
    decoded = compressor.decode(payload, len(x))
    out = torch.full_like(x, 7.0)
    compressor.decode_into(payload, out)
    assert torch.equal(out, decoded), "decode_into and decode differ"
    assert torch.equal(compressor.added(given, payload), x + decoded), "added is not the sum"
    assert torch.equal(compressor.added(given, payload, out=out), x + decoded), "added into given memory is not the sum"
    assert torch.equal(compressor.added(out.copy_(given), payload, out=out), x + decoded), "added in place is not the sum"
    assert torch.equal(given, x), "added has overwritten its argument"


def _takes_differences(compressor: Compressor, x: Tensor) -> None:
    y = x.flip(0) / 2
    found, expected = compressor.encode_difference(x, y, _stream(1)), compressor.encode(x - y, _stream(1))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), "encode_difference is not encode of the difference"


def _has_entries(compressor: Compressor, x: Tensor) -> None:
    payload = compressor.encode(x, _stream())
    index, numbers = compressor.entries(payload, len(x))
    assert index.dtype == torch.int64 and bool((index[1:] > index[:-1]).all()), "the indices do not increase"
    assert torch.equal(torch.zeros_like(x).index_copy(0, index, numbers), compressor.decode(payload, len(x))), (
        "they are other numbers"
    )


def _tells(compressor: Compressor, x: Tensor) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        for place in {0, len(x) // 2, len(x) - 1}:
            vector = x.clone()
            vector[place] = bad
            assert not bool(compressor.valid(compressor.encode(vector, _stream()), len(x))), f"{bad} at {place} does not show"


def _in_pieces(compressor: Compressor, x: Tensor) -> None:
    cuts = sorted({0, min(32, len(x)), min(96, len(x)), len(x)})
    pieces = [compressor.encode(x[first:last], _stream()) for first, last in pairwise(cuts)]
    for found, expected in zip(map(torch.cat, zip(*pieces, strict=True)), compressor.encode(x, _stream()), strict=True):
        assert torch.equal(found, expected), "it is not coordinate-wise: pieces encode to other numbers than the whole"
    shares = compressor.split(compressor.encode(x, _stream()), len(x), cuts)
    for share, piece in zip(shares, pieces, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(share, piece, strict=True)), "a share is not its piece's payload"


def _samples(compressor: Compressor, x: Tensor, draws: int) -> Tensor:
    return torch.stack([compressor.decode(compressor.encode(x, _stream(seed)), len(x)) for seed in range(draws)]).double()


def _contracts(compressor: Compressor, x: Tensor, draws: int) -> None:
    alpha = compressor.contraction(len(x))
    assert alpha is not None and 0 < alpha <= 1, f"alpha should be in (0, 1]; found {alpha}"
    errors = (_samples(compressor, x, draws) - x.double()).square().sum(1) / x.double().square().sum()
    slack = 3 * float(errors.std()) / draws**0.5 + 1e-6
    assert float(errors.mean()) <= 1 - alpha + slack, f"loses {float(errors.mean()):.4g} of ||x||^2; declared: {1 - alpha:.4g}"


def _unbiased(compressor: Compressor, x: Tensor, draws: int) -> None:
    omega = compressor.variance(len(x))
    assert omega is not None and omega >= 0, f"omega should be at least 0; found {omega}"
    samples, wide = _samples(compressor, x, draws), x.double()
    errors = (samples - wide).square().sum(1)
    slack = 3 * float(errors.std()) / draws**0.5 + 1e-6 * float(wide.square().sum())
    assert float(errors.mean()) <= omega * float(wide.square().sum()) + slack, (
        f"a variance of {float(errors.mean() / wide.square().sum()):.4g} ||x||^2; declared: {omega:.4g}"
    )
    bias = float(torch.linalg.vector_norm(samples.mean(0) - wide))
    expected = float((samples - samples.mean(0)).square().sum(1).mean() / draws) ** 0.5
    assert bias <= 4 * expected + 1e-5 * float(torch.linalg.vector_norm(wide)), f"the mean of {draws} draws is {bias:.3g} off"


# -- attacks --------------------------------------------------------------------------------------------------------------


def attack_laws(attack: Attack, h: int = 8, b: int = 3, d: int = 13, *, symmetric: bool = True) -> list[Law]:
    """All laws, and whether an attack on messages holds them.

    Args:
        attack: on messages; attacks on data change batches, whose form only their user knows.
        h: honest workers.
        b: Byzantine workers.
        d: length of the messages.
        symmetric: the order of the honest messages does not matter.
    """
    if isinstance(attack, DataAttack):
        raise TypeError(f"The laws are about attacks on messages. Found {attack!r}, an attack on data.")
    return _verdicts(_attack_cases(attack, h, b, d, symmetric))


def check_attack(attack: Attack, h: int = 8, b: int = 3, d: int = 13, *, symmetric: bool = True) -> None:
    """Raises an AssertionError that names every law that an attack breaks; the arguments are those of `attack_laws`."""
    _raise(attack, attack_laws(attack, h, b, d, symmetric=symmetric))


def _attack_cases(attack: Attack, h: int, b: int, d: int, symmetric: bool) -> Iterator[_Case]:
    honest, own = _rows(h, d, 1, dtype=torch.float32), _rows(b, d, 2, dtype=torch.float32)

    def lies(honest: Tensor = honest, own: Tensor = own) -> Tensor:
        scene = Scene(
            generator=_stream(7),
            aggregate=lambda candidate: torch.cat([honest, candidate.to(honest)]).median(0).values,
            x=lambda: torch.ones(honest.shape[1], dtype=honest.dtype),
            memory={},
        )
        return attack(honest, own, scene)

    def shape() -> None:
        for dtype in (torch.float32, torch.float64):
            out = lies(honest.to(dtype), own.to(dtype))
            assert out.shape == own.shape, f"messages of shape {list(out.shape)} for {list(own.shape)}"
            assert out.dtype == dtype, f"messages of {out.dtype} among {dtype}"

    def untouched() -> None:
        seen, theirs = honest.clone(), own.clone()
        lies(seen, theirs).fill_(7)
        assert torch.equal(seen, honest), "the honest messages were overwritten"
        assert torch.equal(theirs, own), "the Byzantine workers' own messages were overwritten"

    def nobody() -> None:
        assert lies(honest, own[:0]).shape == (0, d), "messages from nobody"

    def bits() -> None:
        assert torch.equal(lies().nan_to_num(), lies().nan_to_num()), "two calls with the same stream differ"

    def alone() -> None:
        assert lies(honest[:1], own[:1]).shape == (1, d), "one honest worker is not enough for it"
        if attack.alone:
            assert lies(honest[:0], own).shape == (b, d), "it says that it needs no honest worker, and does"

    def order() -> None:
        torch.testing.assert_close(lies(honest.flip(0)), lies(), equal_nan=True)

    yield "one message for every Byzantine worker, in their dtype", shape
    yield "what it sees is not modified", untouched
    yield "nobody sends nothing", nobody
    yield "same stream, same messages", bits
    yield "one honest and one Byzantine worker are enough", alone
    if symmetric:
        yield "the order of the honest messages does not matter", order
