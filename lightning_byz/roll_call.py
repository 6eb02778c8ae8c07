"""RollCall: whether all ranks are at the same place, asked without a collective, so that nobody can be left waiting in one."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]


class RollCall:
    """Ranks sign in at a key-value store; rank 0 waits for the others for a while, then decides whether all are there.

    Args:
        address: host name of rank 0.
        rank: this process.
        world_size: number of processes.
        timeout: limit of one request to the store.
    """

    def __init__(self, address: str, rank: int, world_size: int, timeout: timedelta) -> None:
        self.rank, self.world_size = rank, world_size
        self._calls: dict[str, int] = {}
        port = [0]
        if rank == 0:
            self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            port = [self._store.port]
        dist.broadcast_object_list(port, src=0)
        if rank != 0:
            self._store = TCPStore(address, port[0], is_master=False, wait_for_workers=False, timeout=timeout)

    def everybody(self, place: str, patience: float) -> bool:
        """Whether all ranks have come to this place; the same answer for all that have.

        Args:
            place: a name that ranks at the same place agree on. They may come back to it.
            patience: seconds to wait for the others.
        """
        self._calls[place] = self._calls.get(place, 0) + 1
        key = f"{place}#{self._calls[place]}"
        present = self._store.add(key, 1)
        deadline = time.monotonic() + patience
        if self.rank == 0:
            while present < self.world_size and time.monotonic() < deadline:
                time.sleep(0.002)
                present = self._store.add(key, 0)
            return self._decide(key, present >= self.world_size)
        while time.monotonic() < deadline:
            if self._store.check([f"{key}/decision"]):
                return self._decide(key, False)
            time.sleep(0.002)
        return self._decide(key, False)

    def _decide(self, key: str, everybody: bool) -> bool:
        """The first decision counts, whoever makes it; it is the same for all."""
        decision = self._store.compare_set(f"{key}/decision", "", "all" if everybody else "not all")
        return bool(decision == b"all")
