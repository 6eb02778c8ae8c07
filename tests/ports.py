"""A port of its own for every run of several processes."""

from __future__ import annotations

import fcntl
import itertools
import os
import socket
import tempfile
from collections.abc import Iterator
from typing import IO

_FIRST, _LAST, _BLOCK = 10_000, 32_000, 200
"""Below the ports that the system hands out, so that nobody is given one between its choice and
its use. A process that tests owns one block of them.
"""


def _locked_block() -> tuple[range, IO[bytes]]:
    """Ports that no other process gives, for as long as the file is open."""
    for first in range(_FIRST, _LAST, _BLOCK):
        path = os.path.join(tempfile.gettempdir(), f"lightning-byz-test-ports-{first}")
        file = open(path, "ab")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        return range(first, first + _BLOCK), file
    raise OSError(f"All blocks of ports from {_FIRST} to {_LAST} are taken by processes that test.")


def _ports() -> Iterator[int]:
    block, lock = _locked_block()
    with lock:
        yield from itertools.cycle(block)


_next = _ports()


def own_port() -> int:
    """A free port, which no process that tests is given at the same time."""
    for port in _next:
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("A cycle has no end.")
