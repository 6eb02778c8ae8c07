"""How a worker's part in a run may end before the run does."""

from __future__ import annotations


class ServerLostError(RuntimeError):
    """The server is gone, or does not want this process, and the run has ended for it."""


class RunIsOverError(RuntimeError):
    """This entry point of the program (fit, test, ...) has ended without this process."""


class LeftBehindError(RuntimeError):
    """The server no longer keeps what this process has missed."""
