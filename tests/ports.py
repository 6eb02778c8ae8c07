"""A port of its own for every run of several processes."""

from __future__ import annotations

import itertools
import os
import socket

_FIRST, _LAST = 10_000, 32_000
"""Below the ports that the system hands out, so that nobody is given one between its choice and
its use.
"""

_next = itertools.count(os.getpid() * 41)


def own_port() -> int:
    """A free port, which this process gives once. Processes begin at different ones."""
    for candidate in _next:
        port = _FIRST + candidate % (_LAST - _FIRST)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("There is no end of numbers.")
