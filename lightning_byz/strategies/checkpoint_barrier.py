"""StoreBarrier: whether all ranks come to a place, asked without a collective to hang in."""

from __future__ import annotations

import atexit
import logging
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

log = logging.getLogger("lightning_byz")

_LEFT = 2**62
"""The number of a rank that has left: larger than any other's."""


class StoreBarrier:
    """Ranks that come to the same place sign in at a key-value store, and learn whether all do.

    Ranks count what they all do (collectives, steps, ends of trainings) and publish their number. A
    place is known by it. Whoever has a larger one has passed the place, and does not come; whoever
    has a smaller one is late, and is waited for.

    A collective that is not counted (torch.distributed called by the user, or by a metric) leaves a
    doubt: a rank that waits in it looks as if it was on its way. Then rank 0 waits a while only.
    A call of rank 0 alone, with another one of all ranks directly after it, meets that one.

    Args:
        address: host name of rank 0.
        rank: this process.
        world_size: number of processes.
        timeout: how long ranks wait for rank 0, and the limit of one request to the store.
    """

    def __init__(self, address: str, rank: int, world_size: int, timeout: timedelta) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout.total_seconds()
        self._number, self._calls = 0, 0
        port = [0]
        if rank == 0:
            self._store = TCPStore(
                address, 0, is_master=True, wait_for_workers=False, timeout=timeout
            )
            port = [self._store.port]
        dist.broadcast_object_list(port, src=0)
        if rank != 0:
            self._store = TCPStore(
                address, port[0], is_master=False, wait_for_workers=False, timeout=timeout
            )
        self._publish(0)

    def move_on(self) -> None:
        """This rank is about to do something that all ranks do."""
        self._number, self._calls = self._number + 1, 0
        self._publish(self._number)

    def leave(self) -> None:
        """This rank takes part in nothing any more."""
        self._publish(_LEFT)

    def absent(self, patience: float) -> list[int]:
        """Ranks that do not come to this place, the same for all that do; none if all do.

        Args:
            patience: seconds that rank 0 waits where it cannot tell whether the others come.
        """
        self._calls += 1
        place = f"{self._number}#{self._calls}"
        self._store.set(f"{place}/{self.rank}", "")
        began, pause = time.monotonic(), 0.001
        while not self._store.check([f"{place}/absent"]):
            waited = time.monotonic() - began
            missing = [
                rank
                for rank in range(self.world_size)
                if not self._store.check([f"{place}/{rank}"])
            ]
            numbers = {rank: self._number_of(rank) for rank in missing}
            limit = (
                patience if self.rank == 0 and self._number in numbers.values() else self.timeout
            )
            passed = [rank for rank, number in numbers.items() if number > self._number]
            if passed or waited > limit or (self.rank == 0 and not missing):
                return self._decide(place, passed or missing)
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return self._decide(place, [])

    def _decide(self, place: str, absent: list[int]) -> list[int]:
        """The first decision counts, whoever makes it."""
        mine = ",".join(map(str, absent)) or "nobody"
        decision = self._store.compare_set(f"{place}/absent", "", mine).decode()
        return [] if decision == "nobody" else [int(rank) for rank in decision.split(",")]

    def _number_of(self, rank: int) -> int:
        return int(self._store.get(f"number/{rank}"))

    def _publish(self, number: int) -> None:
        self._store.set(f"number/{self.rank}", str(number))


_made: tuple[object, StoreBarrier] | None = None


def store_barrier(address: str, timeout: timedelta) -> StoreBarrier:
    """The roll call of the process group, whoever initialised that. All ranks ask for it together.

    Args:
        address: host name of rank 0.
        timeout: see `StoreBarrier`.
    """
    global _made
    group = dist.group.WORLD
    if _made is None or _made[0] is not group:
        made = StoreBarrier(address, dist.get_rank(), dist.get_world_size(), timeout)
        _made = group, made
        if made.rank != 0:
            atexit.register(_leave, made)
    return _made[1]


def _leave(made: StoreBarrier) -> None:
    """At the end of the process: rank 0 may have ended before, and its store with it."""
    try:
        made.leave()
    except RuntimeError as error:
        log.debug(f"Rank {made.rank} leaves after rank 0: {error}")
