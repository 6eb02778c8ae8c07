"""CURVE keys: one pair for the server, and one for every rank, so that a key is one worker's
identity.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

SERVER = "server"


class Pair(NamedTuple):
    """A key pair in ZeroMQ's Z85 text. The secret half is None where this host does not have it."""

    public: bytes
    secret: bytes | None


def make_keys(directory: str | Path, ranks: int) -> Path:
    """Writes ``server.key``, ``rank1.key``, ... and their secret halves ``*.key_secret``, readable
    by this user only.

    The server's host needs all public halves and its own secret; rank r's host needs ``server.key``
    and ``rank{r}.key_secret``.

    Args:
        directory: made if it does not exist. Existing keys are not replaced.
        ranks: number of processes of the run, the server's rank 0 included.

    Raises:
        FileExistsError: if it holds keys already.
    """
    from zmq.auth import create_certificates

    directory = Path(directory)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    present = sorted(path.name for path in directory.glob("*.key*"))
    if present:
        raise FileExistsError(
            f"`directory` should hold no keys yet. Found {', '.join(present)} in {directory}. "
            "Take an empty one."
        )
    umask = os.umask(0o077)
    try:
        for name in (SERVER, *(f"rank{rank}" for rank in range(1, ranks))):
            create_certificates(directory, name)
    finally:
        os.umask(umask)
    return directory


def load_key(directory: Path, name: str, secret: bool) -> Pair:
    """A key pair, or its public half alone.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if it holds no key.
    """
    from zmq.auth import load_certificate

    path = directory / f"{name}.key{'_secret' if secret else ''}"
    if not path.exists():
        raise FileNotFoundError(
            f"`keys` of ParameterServer should hold {path.name}. Not found in {directory}. Make "
            "keys with `lightning_byz.make_keys(directory, ranks)`, and copy to each host those "
            "that it needs."
        )
    public, private = load_certificate(path)
    if secret and private is None:
        raise ValueError(f"{path} should hold a secret key. Found a public one only.")
    return Pair(public, private)
