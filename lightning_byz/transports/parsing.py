"""What other processes say, read with suspicion: bounded, checked, and refused where no honest
process says so.

All that crosses the wire in a form of its own is read here: rows of logged values, names as JSON,
described tensors, texts. (Messages of a fixed layout are not: there, every sequence of bytes is a
value.) Nothing here raises anything but `RefusedError`, whatever the bytes, and nothing takes more
memory than what was received. Who reads takes a refused message for silence, and `Refusals` says so
once in a while.
"""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

log = logging.getLogger("lightning_byz")

_Read = TypeVar("_Read")


class RefusedError(ValueError):
    """What another process sent is nothing that an honest one sends."""


class Refusals:
    """Counts what was refused of each sender, and logs the 1st, 10th, 100th, ... time.

    Args:
        what: what is left out, as the subject of a sentence.
        who: what a sender is called.
    """

    def __init__(self, what: str, who: str = "worker") -> None:
        self.what, self.who = what, who
        self.counts: dict[int, int] = {}

    def read(self, sender: int, parse: Callable[..., _Read], *message: Any) -> _Read | None:
        """What ``parse(*message)`` makes of a sender's message; None, which is noted, if it refuses
        it.
        """
        try:
            return parse(*message)
        except RefusedError as error:
            self.note(sender, error)
            return None

    def note(self, sender: int, reason: object) -> None:
        """One more message of this sender was refused."""
        count = self.counts[sender] = self.counts.get(sender, 0) + 1
        if count == 10 ** (len(str(count)) - 1):
            log.warning(
                f"byzantine_robust: {self.what} of {self.who} {sender} are left out, time "
                f"{count}. {reason}"
            )


# -- numbers ---------------------------------------------------------------------------------------

_MOST = 1 << 40
"""No honest count of samples, and no size of a tensor, is larger."""


def flag(value: float) -> bool:
    """A truth value that travelled as a number."""
    if value not in (0.0, 1.0):
        raise RefusedError(f"A flag should be 0 or 1. Found {value}.")
    return bool(value)


def count(value: float) -> int:
    """A number of samples that travelled as a floating-point number."""
    if not (0 <= value <= _MOST and value == int(value)):
        raise RefusedError(
            f"A number of samples should be an integer in 0 .. {_MOST}. Found {value}."
        )
    return int(value)


class StepRow(NamedTuple):
    """What a worker's training step logged, see `lightning_byz.strategies.step_logs`.

    Attributes:
        known: whether all names that it has logged are known to all.
        samples: number of samples.
        loss: its loss; may be anything.
        values: one for each known name; may be anything.
        sizes: for each of them the number of samples that it stands for.
    """

    known: bool
    samples: int
    loss: float
    values: list[float]
    sizes: list[int]


def step_row(row: Sequence[float]) -> StepRow:
    """A row of numbers: flag, samples, loss, values, sizes."""
    if len(row) < 3 or len(row) % 2 == 0:
        raise RefusedError(
            "A row should hold a flag, a number of samples, a loss, values and their sizes. "
            f"Found {len(row)} numbers."
        )
    names = (len(row) - 3) // 2
    return StepRow(
        flag(row[0]),
        count(row[1]),
        row[2],
        list(row[3 : 3 + names]),
        [count(size) for size in row[3 + names :]],
    )


# -- texts -----------------------------------------------------------------------------------------


def text(data: bytes, longest: int) -> str:
    """Text for people, up to its first zero byte. What cannot be printed is a question mark, line
    breaks aside; what cannot be decoded, U+FFFD.
    """
    decoded = data[:longest].partition(b"\0")[0].decode(errors="replace")
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in decoded)


_LONGEST_NAME = 1024
FLAGS = frozenset(
    {
        "prog_bar",
        "logger",
        "on_step",
        "on_epoch",
        "enable_graph",
        "sync_dist",
        "add_dataloader_idx",
        "rank_zero_only",
        "float64",
    }
)
"""Arguments of ``LightningModule.log`` that are true, false or None, and ``float64``: whether
values have that precision.
"""


def logged_names(data: bytes) -> dict[str, dict[str, Any]]:
    """The names that a worker logs, each with arguments of ``LightningModule.log``: FLAGS,
    ``reduce_fx`` by name, ``metric_attribute``.

    All that Lightning would refuse is refused here, so that nobody can have the others log it.
    """
    try:
        said = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"Names should be JSON. Found {type(error).__name__}.") from error
    if not isinstance(said, dict):
        raise RefusedError(f"Names should be a JSON object. Found {type(said).__name__}.")
    for name, arguments in said.items():
        check_logged(name, arguments)
    return said


def check_logged(name: str, arguments: Any) -> None:
    """One logged value.

    Raises:
        RefusedError: if nobody should log this.
    """
    shown = repr(name[:80])
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise RefusedError(
            f"A logged name should be printable, of 1 .. {_LONGEST_NAME} characters. Found {shown}."
        )
    if not isinstance(arguments, dict):
        raise RefusedError(
            "The arguments of a logged value should be a JSON object. Found "
            f"{type(arguments).__name__} for {shown}."
        )
    for key, value in arguments.items():
        if key in FLAGS:
            fits = value is None or isinstance(value, bool)
        elif key == "reduce_fx":
            fits = value in ("mean", "sum", "max", "min")
        else:
            fits = key == "metric_attribute" and (
                value is None or (isinstance(value, str) and len(value) <= _LONGEST_NAME)
            )
        if not fits:
            raise RefusedError(
                "A logged value's arguments should be those of LightningModule.log. Found "
                f"{key[:80]!r} for {shown}."
            )
    if arguments.get("on_step") is False and not arguments.get("on_epoch"):
        raise RefusedError(
            f"A value should be logged on a step or on an epoch. Found neither for {shown}."
        )
    if "/dataloader_idx_" in name and arguments.get("add_dataloader_idx") is not False:
        raise RefusedError(f"A logged name should not contain '/dataloader_idx_'. Found {shown}.")


# -- tensors ---------------------------------------------------------------------------------------

DTYPES = (
    *(
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
    ),
    *(torch.uint8, torch.bool, torch.complex64, torch.complex128),
)
"""The dtypes of tensors that travel with a description, by their number on the wire."""

DIMENSIONS = 8
"""How many dimensions these may have."""


def described(tensor: Tensor) -> bytes:
    """A tensor's dtype, shape and values, for `read_tensor`.

    Raises:
        ValueError: for a tensor of another dtype than DTYPES, or of more than DIMENSIONS
            dimensions.
    """
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype not in DTYPES or tensor.ndim > DIMENSIONS:
        raise ValueError(
            f"A tensor that travels should be an ordinary one of at most {DIMENSIONS} dimensions. "
            f"Found {tensor.dtype}, {list(tensor.shape)}."
        )
    head = struct.pack(f"<BB{tensor.ndim}Q", DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape)
    return head + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def read_tensor(body: bytes, like: Tensor, same_shape: bool) -> Tensor:
    """The tensor that `described` described.

    Args:
        body: what was received.
        like: a tensor of the dtype that it has to have, on the device where it is to be.
        same_shape: whether it has to have its shape; else the sizes of all dimensions but the
            first, so that they can be concatenated.

    Raises:
        RefusedError: if it is anything else.
    """
    if (
        len(body) < 2
        or body[0] >= len(DTYPES)
        or DTYPES[body[0]] != like.dtype
        or body[1] != like.ndim
    ):
        raise RefusedError(
            f"A tensor should be of {like.dtype} and {like.ndim} dimensions. Found the head "
            f"{body[:2]!r}."
        )
    start = 2 + 8 * like.ndim
    if like.ndim > DIMENSIONS or len(body) < start:
        raise RefusedError(f"A tensor's description should have {start} bytes. Found {len(body)}.")
    shape = struct.unpack_from(f"<{like.ndim}Q", body, 2)
    if shape != tuple(like.shape) and (
        same_shape or not like.ndim or shape[1:] != tuple(like.shape[1:])
    ):
        raise RefusedError(
            "A tensor should have shape "
            f"{list(like.shape)}{'' if same_shape else ', or another first size'}. Found {shape}."
        )
    row = math.prod(shape[1:]) * like.element_size()
    if shape != tuple(like.shape) and not row:  # any first size takes no bytes
        raise RefusedError(
            f"A tensor without elements should have shape {list(like.shape)}. Found {shape}."
        )
    numel = math.prod(shape)
    if numel * like.element_size() != len(body) - start:
        raise RefusedError(
            f"A tensor of shape {shape} should have {numel * like.element_size()} bytes. Found "
            f"{len(body) - start}."
        )
    if not numel:
        return like.new_empty(shape)
    raw = torch.frombuffer(bytearray(body[start:]), dtype=torch.uint8)
    values = raw != 0 if like.dtype == torch.bool else raw.view(like.dtype)
    return values.view(shape).to(like.device)


class Leaf(NamedTuple):
    """A tensor that somebody is about to send: its dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def leaf_header(leaves: Sequence[Tensor], most: int) -> Tensor:
    """What `read_leaves` reads: int64 ``[1 + most * (DIMENSIONS + 2)]``. All -1 if there are none,
    more than ``most``, or odd ones.
    """
    header = torch.full((1 + most * (DIMENSIONS + 2),), -1, dtype=torch.int64)
    if 0 < len(leaves) <= most and all(
        leaf.ndim <= DIMENSIONS and leaf.dtype in DTYPES for leaf in leaves
    ):
        header[0] = len(leaves)
        for i, leaf in enumerate(leaves):
            said = [leaf.ndim, DTYPES.index(leaf.dtype), *leaf.shape]
            header[1 + i * (DIMENSIONS + 2) :][: len(said)] = torch.tensor(said, dtype=torch.int64)
    return header


def read_leaves(header: Sequence[int], largest: int) -> list[Leaf]:
    """The tensors that a header names.

    Args:
        header: the numbers of `leaf_header`.
        largest: bytes that they may have, all of them together.
    """
    most = (len(header) - 1) // (DIMENSIONS + 2)
    if not 0 < header[0] <= most:
        raise RefusedError(
            f"A batch should hold 1 .. {most} tensors, of at most {DIMENSIONS} dimensions."
        )
    leaves = []
    for i in range(header[0]):
        ndim, dtype, *sizes = header[1 + i * (DIMENSIONS + 2) : 1 + (i + 1) * (DIMENSIONS + 2)]
        if not (
            0 <= ndim <= DIMENSIONS
            and 0 <= dtype < len(DTYPES)
            and all(0 <= size <= _MOST for size in sizes[:ndim])
        ):
            raise RefusedError(
                "A tensor should have a dtype and sizes. Found the numbers "
                f"{[ndim, dtype, *sizes]}."
            )
        leaves.append(Leaf(DTYPES[dtype], tuple(sizes[:ndim])))
    nbytes = sum(leaf.nbytes for leaf in leaves)
    if nbytes > largest or any(
        math.prod(max(1, size) for size in leaf.shape) > _MOST for leaf in leaves
    ):
        raise RefusedError(f"A batch should have at most {largest} bytes. Found {nbytes}.")
    return leaves
