"""What every compressor should hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from lightning_byz.compressors import Compressor
from lightning_byz.testing.laws import Case, Law, raise_broken, random_rows, stream, verdicts


def compressor_laws(
    compressor: Compressor, dims: Sequence[int] = (1, 2, 40, 1000), draws: int = 400
) -> list[Law]:
    """All laws, and whether a compressor holds them.

    Args:
        compressor: of this package's interface.
        dims: lengths of the vectors that are tried.
        draws: how often a random one is drawn, for its mean and its variance.
    """
    return verdicts(_compressor_cases(compressor, dims, draws))


def check_compressor(
    compressor: Compressor, dims: Sequence[int] = (1, 2, 40, 1000), draws: int = 400
) -> None:
    """Raises an AssertionError that names every law that a compressor breaks; the arguments are
    those of `compressor_laws`.
    """
    raise_broken(compressor, compressor_laws(compressor, dims, draws))


def _compressor_cases(compressor: Compressor, dims: Sequence[int], draws: int) -> Iterator[Case]:
    for dim in dims:
        # for those that look at the tensors of a model
        sized = compressor.for_sizes((dim - dim // 2, dim // 2))
        x = random_rows(1, dim, 5, dtype=torch.float32)[0]
        yield (
            f"d = {dim}: the payload has the layout, whatever the values",
            partial(_has_layout, sized, x),
        )
        yield (
            f"d = {dim}: same generator, same payload; the input is not modified",
            partial(_is_pure, sized, x),
        )
        yield (
            f"d = {dim}: its own payloads are valid, and those with a nan are not",
            partial(_guards, sized, x),
        )
        yield (
            f"d = {dim}: decoded into given memory, and added, it is what it decodes to",
            partial(_lands, sized, x),
        )
        yield (
            f"d = {dim}: a difference is encoded as what it is",
            partial(_takes_differences, sized, x),
        )
        if sized.sparse:
            yield f"d = {dim}: its entries are what it decodes to", partial(_has_entries, sized, x)
        if sized.tells_nonfinite:
            yield (
                f"d = {dim}: the payload of a vector with a nan or an inf is not valid",
                partial(_tells, sized, x),
            )
        if sized.coordinate_wise:
            yield (
                f"d = {dim}: the payloads of pieces make up the whole one",
                partial(_in_pieces, sized, x),
            )
        if sized.contraction(dim) is not None:
            yield f"d = {dim}: contracts as declared", partial(_contracts, sized, x, draws)
        if sized.variance(dim) is not None:
            yield (
                f"d = {dim}: unbiased, with the variance declared",
                partial(_unbiased, sized, x, draws),
            )


def _has_layout(compressor: Compressor, x: Tensor) -> None:
    for values in (x, torch.zeros_like(x), 1e20 * x, x.double()):
        layout = compressor.layout(len(x), values.dtype)
        payload = compressor.encode(values, stream())
        found = [(tuple(part.shape), part.dtype) for part in payload]
        assert found == [tuple(field) for field in layout], (
            f"a payload of {found} where {layout} is declared"
        )
        assert sum(part.nbytes for part in payload) == compressor.nbytes(len(x), values.dtype), (
            "another number of bytes"
        )
        decoded = compressor.decode(payload, len(x))
        assert decoded.shape == x.shape, f"decoded to shape {list(decoded.shape)}"


def _is_pure(compressor: Compressor, x: Tensor) -> None:
    given = x.clone()
    first, second = (compressor.encode(given, stream(3)) for _ in range(2))
    assert torch.equal(given, x), "the input was overwritten"
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), (
        "two encodings with the same generator differ"
    )


def _guards(compressor: Compressor, x: Tensor) -> None:
    payload = compressor.encode(x, stream())
    assert bool(compressor.valid(payload, len(x))), "its own payload is not valid"
    for i, part in enumerate(payload):
        if part.is_floating_point() and part.numel():
            bad = part.clone(memory_format=torch.contiguous_format)
            bad.view(-1)[-1] = math.nan
            assert not bool(compressor.valid((*payload[:i], bad, *payload[i + 1 :]), len(x))), (
                "a nan in the payload is valid"
            )


def _lands(compressor: Compressor, x: Tensor) -> None:
    payload, given = compressor.encode(x, stream()), x.clone()
    decoded = compressor.decode(payload, len(x))
    out = torch.full_like(x, 7.0)
    compressor.decode_into(payload, out)
    assert torch.equal(out, decoded), "decode_into and decode differ"
    assert torch.equal(compressor.added(given, payload), x + decoded), "added is not the sum"
    assert torch.equal(compressor.added(given, payload, out=out), x + decoded), (
        "added into given memory is not the sum"
    )
    assert torch.equal(compressor.added(out.copy_(given), payload, out=out), x + decoded), (
        "added in place is not the sum"
    )
    assert torch.equal(given, x), "added has overwritten its argument"


def _takes_differences(compressor: Compressor, x: Tensor) -> None:
    y = x.flip(0) / 2
    found, expected = (
        compressor.encode_difference(x, y, stream(1)),
        compressor.encode(x - y, stream(1)),
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (
        "encode_difference is not encode of the difference"
    )


def _has_entries(compressor: Compressor, x: Tensor) -> None:
    payload = compressor.encode(x, stream())
    index, numbers = compressor.entries(payload, len(x))
    assert index.dtype == torch.int64 and bool((index[1:] > index[:-1]).all()), (
        "the indices do not increase"
    )
    assert torch.equal(
        torch.zeros_like(x).index_copy(0, index, numbers), compressor.decode(payload, len(x))
    ), "they are other numbers"


def _tells(compressor: Compressor, x: Tensor) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        for place in {0, len(x) // 2, len(x) - 1}:
            vector = x.clone()
            vector[place] = bad
            assert not bool(compressor.valid(compressor.encode(vector, stream()), len(x))), (
                f"{bad} at {place} does not show"
            )


def _in_pieces(compressor: Compressor, x: Tensor) -> None:
    cuts = sorted({0, min(32, len(x)), min(96, len(x)), len(x)})
    pieces = [compressor.encode(x[first:last], stream()) for first, last in pairwise(cuts)]
    for found, expected in zip(
        map(torch.cat, zip(*pieces, strict=True)), compressor.encode(x, stream()), strict=True
    ):
        assert torch.equal(found, expected), (
            "it is not coordinate-wise: pieces encode to other numbers than the whole"
        )
    shares = compressor.split(compressor.encode(x, stream()), len(x), cuts)
    for share, piece in zip(shares, pieces, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(share, piece, strict=True)), (
            "a share is not its piece's payload"
        )


def _samples(compressor: Compressor, x: Tensor, draws: int) -> Tensor:
    return torch.stack(
        [compressor.decode(compressor.encode(x, stream(seed)), len(x)) for seed in range(draws)]
    ).double()


def _contracts(compressor: Compressor, x: Tensor, draws: int) -> None:
    alpha = compressor.contraction(len(x))
    assert alpha is not None and 0 < alpha <= 1, f"alpha should be in (0, 1]; found {alpha}"
    errors = (_samples(compressor, x, draws) - x.double()).square().sum(
        1
    ) / x.double().square().sum()
    slack = 3 * float(errors.std()) / draws**0.5 + 1e-6
    assert float(errors.mean()) <= 1 - alpha + slack, (
        f"loses {float(errors.mean()):.4g} of ||x||^2; declared: {1 - alpha:.4g}"
    )


def _unbiased(compressor: Compressor, x: Tensor, draws: int) -> None:
    omega = compressor.variance(len(x))
    assert omega is not None and omega >= 0, f"omega should be at least 0; found {omega}"
    samples, wide = _samples(compressor, x, draws), x.double()
    errors = (samples - wide).square().sum(1)
    slack = 3 * float(errors.std()) / draws**0.5 + 1e-6 * float(wide.square().sum())
    assert float(errors.mean()) <= omega * float(wide.square().sum()) + slack, (
        f"a variance of {float(errors.mean() / wide.square().sum()):.4g} ||x||^2; declared: "
        f"{omega:.4g}"
    )
    bias = float(torch.linalg.vector_norm(samples.mean(0) - wide))
    expected = float((samples - samples.mean(0)).square().sum(1).mean() / draws) ** 0.5
    assert bias <= 4 * expected + 1e-5 * float(torch.linalg.vector_norm(wide)), (
        f"the mean of {draws} draws is {bias:.3g} off"
    )
