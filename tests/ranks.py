"""Real processes for a parameter server, forked so that they start in no time: each may be killed,
and started again.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ports import own_port

from lightning_byz import make_keys

_FORK = multiprocessing.get_context("fork")


class Ranks:
    """The processes of a run, started as somebody would by hand on several hosts: one command each,
    and keys.

    Args:
        folder: for keys, output and whatever the job writes.
        size: number of processes.
        job: what each runs, given the folder with the keys; every rank the same.
    """

    def __init__(self, folder: Path, size: int, job: Callable[[Path], Any]) -> None:
        self.folder, self.size, self.job, self.port = folder, size, job, own_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.keys = make_keys(folder / "keys", size)
        self.processes: dict[int, Any] = {}
        self.old: list[Any] = []

    def __enter__(self) -> Ranks:
        for rank in range(self.size):
            self.start(rank)
        return self

    def __exit__(self, *_: Any) -> None:
        for process in (*self.processes.values(), *self.old):
            if process.is_alive():
                process.kill()
            process.join()

    def start(self, rank: int) -> None:
        """Starts a rank, perhaps again."""
        if rank in self.processes:
            self.old.append(self.processes[rank])
        process = _FORK.Process(target=self._run, args=(rank,))
        process.start()
        self.processes[rank] = process

    def kill(self, rank: int) -> None:
        os.kill(self.processes[rank].pid, signal.SIGKILL)
        self.processes[rank].join()

    def wait(
        self, ranks: Sequence[int] | None = None, timeout: float = 500
    ) -> dict[int, int | None]:
        """The exit codes, once these have ended."""
        codes = {}
        for rank in range(self.size) if ranks is None else ranks:
            self.processes[rank].join(timeout)
            codes[rank] = self.processes[rank].exitcode
        return codes

    def output(self, rank: int) -> str:
        return (self.folder / f"output{rank}").read_text()

    def everything(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-6000:]}"
            for path in sorted(self.folder.glob("output*"))
        )

    def _run(self, rank: int) -> None:
        os.environ.update(
            LOCAL_RANK=str(rank),
            NODE_RANK="0",
            WORLD_SIZE=str(self.size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(self.port),
        )
        torch.set_num_threads(1)
        file = os.open(self.folder / f"output{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
        code = 1
        try:
            warnings.simplefilter("ignore")
            logging.basicConfig(level=logging.INFO, force=True)
            self.job(self.folder)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
