"""Processes of a script that trains, one for each rank, on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_ranks(command: Sequence[str], ranks: int, tree: Path, keys: Path | None = None) -> None:
    """Runs a command once for each rank, and waits for all.

    Args:
        command: what follows the name of the Python interpreter.
        ranks: how many; a single one is told of no rank.
        tree: the checkout whose package is imported.
        keys: where to make the keys of a parameter server; None: it needs none.

    Raises:
        SystemExit: if one fails.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    if keys is not None:
        made = f"import lightning_byz as b; b.make_keys({str(keys)!r}, {ranks})"
        subprocess.run([sys.executable, "-c", made], env=environment, cwd=tree, check=True)
    own = [{"LOCAL_RANK": str(r), "NODE_RANK": "0"} if ranks > 1 else {} for r in range(ranks)]
    started = [
        subprocess.Popen([sys.executable, *command], env={**environment, **mine}, cwd=tree)
        for mine in own
    ]
    statuses = [process.wait() for process in started]
    if any(statuses):
        raise SystemExit(f"{' '.join(command)} failed in {tree}.")
