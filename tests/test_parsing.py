"""What other processes say is read with suspicion: honest messages as they are, all others refused,
whatever the bytes.
"""

from __future__ import annotations

import json
import logging
import math
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo import laws

from lightning_byz.transports.parsing import (
    DIMENSIONS,
    DTYPES,
    Leaf,
    Refusals,
    RefusedError,
    described,
    leaf_header,
    logged_names,
    read_leaves,
    read_tensor,
    step_row,
    text,
)

# -- honest messages -------------------------------------------------------------------------------


@laws
@given(st.data(), st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4))
def test_described_tensors_are_read_as_they_were(
    data: Any, dtype: torch.dtype, shape: list[int]
) -> None:
    raw = torch.tensor(
        data.draw(st.lists(st.integers(0, 255), min_size=64, max_size=64)), dtype=torch.uint8
    )
    numel = math.prod(shape)
    tensor = (raw.repeat(1 + numel * dtype.itemsize // 64)[: numel * dtype.itemsize]).clone()
    tensor = ((tensor % 2).bool() if dtype == torch.bool else tensor.view(dtype)).view(shape)
    for same_shape in (True, False):
        again = read_tensor(described(tensor), tensor, same_shape)
        assert again.dtype == dtype
        assert again.shape == tensor.shape
        # nan is kept too
        assert torch.equal(
            again.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )


def test_other_ranks_tensors_may_have_another_first_size() -> None:
    like = torch.arange(6.0).view(2, 3)
    for first in (0, 1, 5):
        assert read_tensor(described(torch.zeros(first, 3)), like, False).shape == (first, 3)
    with pytest.raises(RefusedError, match="should have shape"):
        read_tensor(described(torch.zeros(5, 3)), like, True)


def named(like: torch.Tensor, *shape: int, body: bytes = b"", dtype: int | None = None) -> bytes:
    number = DTYPES.index(like.dtype) if dtype is None else dtype
    return struct.pack(f"<BB{len(shape)}Q", number, len(shape), *shape) + body


@pytest.mark.parametrize("same_shape", [True, False])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0",
        named(torch.zeros(1), 2, 3, body=b"x" * 23),
        named(torch.zeros(1), 2, 3, body=b"x" * 25),
        named(torch.zeros(1), 2, 3, body=b"x" * 24)[:10],
        named(torch.zeros(1), 2**63, 0),
        named(torch.zeros(1), 2**62, 0),
        named(torch.zeros(1), 0, 2**63),
        named(torch.zeros(1), 5, 0),
        named(torch.zeros(1), 0, 4),
        named(torch.zeros(1), 2**63, 2**63),  # whose product is 0 in 64 bits
        named(torch.zeros(1), 3, 2, body=b"x" * 24),
        named(torch.zeros(1), 6, body=b"x" * 24),
        named(torch.zeros(1), *[1] * 255, body=b"x" * 4),
        named(torch.zeros(1), 2, 3, body=b"x" * 24, dtype=1),
        named(torch.zeros(1), 2, 3, body=b"x" * 24, dtype=200),
    ],
)
def test_tensors_that_cannot_be_are_refused(body: bytes, same_shape: bool) -> None:
    with pytest.raises(RefusedError):
        read_tensor(body, torch.zeros(2, 3), same_shape)


def test_a_tensor_of_no_elements_has_no_size_of_its_own() -> None:
    """Any first size would take no bytes beside a size of 0."""
    like = torch.zeros(2, 0)
    assert read_tensor(described(like), like, False).shape == (2, 0)
    for first in (3, 2**62, 2**63):
        with pytest.raises(RefusedError, match="without elements"):
            read_tensor(named(like, first, 0), like, False)


def test_truth_values_are_truth_values() -> None:
    like = torch.tensor([True, False])
    read = read_tensor(described(like)[:-2] + b"\x02\xff", like, True)
    assert read.view(torch.uint8).tolist() == [1, 1]


def test_only_ordinary_tensors_travel() -> None:
    for odd in (torch.zeros(2, dtype=torch.uint16), torch.zeros([1] * (DIMENSIONS + 1))):
        with pytest.raises(ValueError, match="should be an ordinary one"):
            described(odd)


def test_the_leaves_of_a_batch() -> None:
    leaves = [torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.tensor(True)]
    header = leaf_header(leaves, 4).tolist()
    assert read_leaves(header, 1000) == [Leaf(leaf.dtype, tuple(leaf.shape)) for leaf in leaves]
    with pytest.raises(RefusedError, match="at most 40 bytes"):
        read_leaves(header, 40)
    for odd in (
        [],
        leaves * 2,
        [torch.zeros([1] * (DIMENSIONS + 1))],
        [torch.zeros(1, dtype=torch.uint16)],
    ):
        with pytest.raises(RefusedError, match="should hold 1 .. 4 tensors"):
            read_leaves(leaf_header(odd, 4).tolist(), 1000)
    for place, number in (
        (0, 5),
        (0, -7),
        (1, 9),
        (1, -1),
        (2, 99),
        (2, -1),
        (3, -4),
        (3, 2**62),
        (3, 2**40),
    ):
        changed = [*header]
        changed[place] = number
        with pytest.raises(RefusedError):
            read_leaves(changed, 1000)
    no_bytes = leaf_header([torch.zeros(0, 2, 2)], 1).tolist()
    no_bytes[4] = no_bytes[5] = 2**40  # beside a size of 0
    with pytest.raises(RefusedError):
        read_leaves(no_bytes, 1000)


NAMES: dict[str, dict[str, Any]] = {
    "loss": {
        "prog_bar": True,
        "on_step": None,
        "on_epoch": True,
        "reduce_fx": "mean",
        "float64": True,
    },
    "Größe / Ω": {"reduce_fx": "max", "metric_attribute": "metric", "add_dataloader_idx": True},
    "a/dataloader_idx_0": {"add_dataloader_idx": False, "reduce_fx": "sum"},
}


def test_names_are_read_as_they_were() -> None:
    assert logged_names(json.dumps(NAMES).encode()) == NAMES
    assert logged_names(b"{}") == {}


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\xff",
        b"[" * 100_000,
        b"1" * 100_000,
        b"[]",
        b"null",
        b'{"a": []}',
        b'{"": {}}',
        b'{"a\\nb": {}}',
        b'{"\\ud800": {}}',  # which nobody can encode again
        json.dumps({"a" * 2000: {}}).encode(),
        b'{"a": {"unknown": 1}}',
        b'{"a": {"prog_bar": "yes"}}',
        b'{"a": {"prog_bar": 1}}',
        b'{"a": {"reduce_fx": "median"}}',
        b'{"a": {"reduce_fx": null}}',
        b'{"a": {"reduce_fx": ["mean"]}}',
        b'{"a": {"batch_size": -1}}',
        b'{"a": {"metric_attribute": 3}}',
        b'{"a": {"on_step": false}}',
        b'{"a": {"on_step": false, "on_epoch": false}}',
        b'{"a/dataloader_idx_0": {}}',
    ],
)
def test_names_that_lightning_would_refuse_are_refused(said: bytes) -> None:
    with pytest.raises(RefusedError):
        logged_names(said)


def test_rows_of_logged_values() -> None:
    row = step_row([1.0, 8.0, 0.5, 1.0, -math.inf, 4.0, 2.0])
    assert row == (True, 8, 0.5, [1.0, -math.inf], [4, 2])
    for wrong in ([], [1.0, 8.0], [1.0, 8.0, 0.5, 1.0], [1.0, 8.0, 0.5, 1.0, -1.0], [1.0, 8.0, 0.5, 1.0, math.nan], [2.0, 8.0, 0.5], [math.nan, 8.0, 0.5], [1.0, math.nan, 0.5], [1.0, math.inf, 0.5], [1.0, -1.0, 0.5],
                  [1.0, 0.5, 0.5], [1.0, 1e300, 0.5]):  # fmt: skip
        with pytest.raises(RefusedError):
            step_row(wrong)


def test_texts_are_printable() -> None:
    assert text(b"host\nGPU" + b"\0" * 9, 256) == "host\nGPU"
    assert text(b"\x1b[31mred\xff\0hidden", 256) == "?[31mred\ufffd"
    assert text(b"abc", 2) == "ab"


# -- any message -----------------------------------------------------------------------------------


def mutated(rng: random.Random, message: bytes) -> bytes:
    """A message with some bytes changed, cut out, put in, or repeated."""
    data = bytearray(message)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[place % len(data)] = rng.randrange(256)
        elif kind == 1:
            del data[place : place + rng.randrange(1, 9)]
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 3:
            data[place : place + 8] = struct.pack(
                "<q", rng.choice((0, -1, 1, 2**62, -(2**63), 2**40, 2**31))
            )
        else:
            data[place : place + 8] = struct.pack(
                "<d", rng.choice((math.nan, math.inf, -math.inf, -1e9, 1e308, 5e-324, -0.0))
            )
    return bytes(data)


def doubles(data: bytes) -> list[float]:
    return [number for (number,) in struct.iter_unpack("<d", data[: len(data) // 8 * 8])]


def integers(data: bytes) -> list[int]:
    return [number for (number,) in struct.iter_unpack("<q", data[: len(data) // 8 * 8])] or [0]


LIKE, FLAGS_LIKE = torch.arange(6.0).view(2, 3), torch.tensor([True, False])
KINDS: dict[str, tuple[bytes, Callable[[bytes], Any]]] = {
    "row": (
        struct.pack("<7d", 1.0, 8.0, 0.5, 1.0, 2.0, 8.0, 4.0),
        lambda data: step_row(doubles(data)),
    ),
    "names": (json.dumps(NAMES).encode(), logged_names),
    "tensor": (described(LIKE), lambda data: read_tensor(data, LIKE, True)),
    "tensor of any length": (described(LIKE), lambda data: read_tensor(data, LIKE, False)),
    "flags": (described(FLAGS_LIKE), lambda data: read_tensor(data, FLAGS_LIKE, False)),
    "leaves": (
        leaf_header([LIKE, FLAGS_LIKE], 4).numpy().tobytes(),
        lambda data: read_leaves(integers(data), 1 << 20),
    ),
    "text": (b"host\ncuda:0 GPU", lambda data: text(data, 256)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_message_makes_an_exception_leave_the_parser(kind: str) -> None:
    """100,000 messages over all kinds: each is refused by name, or what it gives can be worked
    with.
    """
    honest, parse = KINDS[kind]
    rng, refused = random.Random(kind), 0
    for _ in range(100_000 // len(KINDS) + 1):
        try:
            read = parse(mutated(rng, honest))
        except RefusedError:
            refused += 1
            continue
        if isinstance(read, torch.Tensor):
            assert torch.cat([read, read]).shape[1:] == read.shape[1:]
        elif kind == "leaves":
            assert sum(leaf.nbytes for leaf in read) <= 1 << 20
        elif kind == "row":
            assert 0 <= read.samples <= 1 << 40
        elif kind == "names":
            json.dumps(read, ensure_ascii=False).encode()
        else:
            assert read.replace("\n", "").isprintable()
    assert (refused == 0) == (kind == "text")  # which is never refused, but cleaned
    assert kind == "text" or refused > 1000


# -- refusals --------------------------------------------------------------------------------------


def test_a_refusal_is_logged_the_first_tenth_and_hundredth_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    refusals = Refusals("logged values", "rank")
    with caplog.at_level(logging.WARNING, logger="lightning_byz"):
        for _ in range(120):
            assert refusals.read(3, step_row, [math.nan, 1.0, 1.0]) is None
            assert refusals.read(0, step_row, [1.0, 4.0, 0.5]) == (True, 4, 0.5, [], [])
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(".")[0] for line in said] == [
        f"byzantine_robust: logged values of rank 3 are left out, time {count}"
        for count in (1, 10, 100)
    ]
    assert refusals.counts == {3: 120}
