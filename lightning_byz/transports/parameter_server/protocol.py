"""What a frame's head says, and how it is checked. Heads are fixed structures and bodies raw bytes:
nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from lightning_byz.compressors import Field

_MAGIC = b"LBZ1"
_HEAD = struct.Struct("<4sB16s16sIQQH")
LONGEST_NAME = 256


class Kind(IntEnum):
    """What a message is about: first those of workers, then those of the server."""

    # I am this rank, in this process (token), at this entry point of the program (position)
    HELLO = 1
    CALL = 2  # my part of the collective with this name at this position
    WANT = 3  # I cannot catch up: a snapshot, please
    BYE = 4  # I have left
    WELCOME = 65  # you are in, and the run has not begun
    BEGUN = 66  # you are in, and the run has begun without you
    RESULT = 67  # what the collective gave
    NEVER = 68  # the server passed this position without such a collective
    BEHIND = 69  # the results of this position are gone
    SNAPSHOT = 70  # the run's state at the beginning of this position
    REFUSED = 71  # you are not in: the body says why
    CLOSED = 72  # the run is over: the body says why
    PING = 73  # are you connected


class Head(NamedTuple):
    """The first frame of a message.

    Attributes:
        kind: what it is about.
        session: 16 bytes that name the server's process, made anew by each; zeros in a hello.
        token: 16 bytes that name the worker's process, made anew by each.
        rank: the worker's process. From the server: the same.
        position: how many batches the sender has come to in which a round begins. From
            the server: in a result that of the collective; in a snapshot that where it was made.
        layout: a fingerprint of the body's shapes and dtypes. From the server: the position that it
            is at.
        name: the collective's name, unique within a position.
    """

    kind: Kind
    session: bytes = bytes(16)
    token: bytes = bytes(16)
    rank: int = 0
    position: int = 0
    layout: int = 0
    name: str = ""

    def pack(self) -> bytes:
        """The frame."""
        name = self.name.encode()
        return _HEAD.pack(_MAGIC, *self[:6], len(name)) + name


def rank_of(head: bytes) -> int:
    """The rank in a head that this process has packed."""
    return int(_HEAD.unpack_from(head)[4])


class BadFrameError(ValueError):
    """A message that no honest peer sends. Its text is one of a few reasons, by which they are
    counted.
    """


def parse(frames: Sequence[memoryview | bytes]) -> tuple[Head, memoryview]:
    """Head and body of a message.

    Raises:
        BadFrameError: if it is not well-formed.
    """
    if len(frames) != 2:
        raise BadFrameError("number of frames")
    head = bytes(frames[0][: _HEAD.size + LONGEST_NAME + 1])
    if len(head) < _HEAD.size:
        raise BadFrameError("truncated head")
    magic, kind, session, token, rank, position, layout, length = _HEAD.unpack_from(head)
    if magic != _MAGIC:
        raise BadFrameError("no head of this protocol")
    if length > LONGEST_NAME or len(frames[0]) != _HEAD.size + length:
        raise BadFrameError("length of the head")
    try:
        return Head(
            Kind(kind), session, token, rank, position, layout, head[_HEAD.size :].decode("ascii")
        ), memoryview(frames[1])
    except ValueError as error:  # an unknown kind, or a name that is not ASCII
        raise BadFrameError("unknown kind or name") from error


def fingerprint(layout: Sequence[Field]) -> int:
    """64 bits that two layouts of other shapes or dtypes do not share."""
    text = ";".join(f"{field.dtype}{list(field.shape)}" for field in layout)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
