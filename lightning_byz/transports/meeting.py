"""Meetings: before the processes of torch.distributed exchange anything, each says where it is."""

from __future__ import annotations

import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

_SIZE = 160
"""Bytes of what a rank says of its place."""
_ATTACHED = 2048 - _SIZE
"""Bytes that may travel with it."""
_PROBE = timedelta(seconds=1)
"""How long a message that looks for lost ranks waits to be taken."""
_TAG = 1
"""Of what ranks say of their places; tags of messages are multiples of 4, or up to 2 more."""


Request: TypeAlias = "tuple[int | None, dist.Work | None]"
"""A message on its way, and from or to which rank; None where torch.distributed does not tell."""


class OutOfStepError(RuntimeError):
    """The ranks of a run are at different places, so that they cannot exchange anything."""


class RankLostError(RuntimeError):
    """Another rank has ended, or does not answer."""


class Meeting:
    """Tells ranks that are at different places from each other, before they wait for each other.

    Every rank sends a short text to every other one over gloo, on a CPU, whatever the backend of
    the run is. The texts are read before anything that follows them is waited for, and messages
    that follow carry a tag that is made of the text. So a rank that has left out an exchange, or
    has run out of data, is named in an error on all ranks, instead of a hang or a crash.

    The text leaves with whatever comes first after it, and takes small messages along: all texts
    have one size, so that ranks at different places understand each other.

    Args:
        group: the process group of the texts; None: no texts are sent.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.place = "the start"
        self._said = torch.zeros(_SIZE + _ATTACHED, dtype=torch.uint8)
        self._heard = torch.zeros(self.size, _SIZE + _ATTACHED, dtype=torch.uint8)
        self._unsaid = False
        self._requests: list[tuple[int, dist.Work | None]] = []
        self._posted: Tensor | None = None
        self._delivered: Tensor | None = None

    @property
    def others(self) -> Iterator[int]:
        """The other ranks; every rank begins with another one."""
        return ((self.rank + distance) % self.size for distance in range(1, self.size))

    @property
    def tag(self) -> int:
        """The tag of messages that belong to this place; the next two are its as well."""
        return 4 + 4 * (zlib.crc32(self.place.encode()) % 2**28)

    def begin(self, place: str) -> None:
        """From here on this rank is at another place, which it says with what follows.

        Args:
            place: the same text on all ranks that are at the same place.
        """
        self.join()
        self.place, self._unsaid = place, self.group is not None

    def say(self, attached: Tensor | None = None) -> None:
        """Says where this rank is, unless it has.

        Args:
            attached: up to `_ATTACHED` bytes that travel along.
        """
        if not self._unsaid:
            return
        self._unsaid = False
        said = self.place.encode()[:_SIZE].ljust(_SIZE)
        self._said[:_SIZE] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        first = self._free
        if self._posted is not None:
            self._said[_SIZE:first] = self._posted
        if attached is not None:
            self._said[first : first + len(attached)] = attached
        receive = [
            (r, partial(dist.irecv, self._heard[r], r, self.group, _TAG)) for r in self.others
        ]
        send = [(r, partial(dist.isend, self._said, r, self.group, _TAG)) for r in self.others]
        self._requests = [(rank, self._started(rank, start)) for rank, start in receive + send]

    @property
    def _free(self) -> int:
        """Where room for a message begins, in what this rank says."""
        return _SIZE + (0 if self._posted is None else len(self._posted))

    def along(self, message: Tensor) -> Tensor | None:
        """Every rank's message, if it is small and this rank has still to say where it is.

        Args:
            message: uint8, of one size on all ranks that are at this place.

        Returns:
            the messages ``[ranks, size]``, until the next place; None: they travel on their own.
        """
        first = self._free
        if not self._unsaid or first + len(message) > _SIZE + _ATTACHED:
            return None
        message = message.cpu()
        self.say(message)
        self.join()
        self._heard[self.rank, first : first + len(message)] = message
        return self._heard[:, first : first + len(message)]

    def post(self, message: Tensor) -> bool:
        """A small message for every other rank, which leaves with what this rank says next.

        Args:
            message: uint8, of one size on all ranks that are at this place.

        Returns:
            whether it will: this rank has still to say where it is, and there is room.
        """
        self._delivered = None
        if not self._unsaid or len(message) > _ATTACHED:
            return False
        self._posted = message.cpu()
        return True

    def delivered(self) -> Tensor:
        """Every rank's posted message, ``[ranks, size]``."""
        self.join()
        assert self._delivered is not None
        return self._delivered

    def _started(self, rank: int, start: Callable[[], dist.Work | None]) -> dist.Work | None:
        try:
            return start()
        except RuntimeError as error:
            raise self._lost([rank], error) from error

    def join(self) -> None:
        """Waits until all ranks have said where they are.

        Raises:
            OutOfStepError: if they are not all at one place.
            RankLostError: if one has ended.
        """
        self.say()
        requests, self._requests = self._requests, []
        if not requests:
            return
        posted, self._posted = self._posted, None
        failed = [
            (rank, error) for rank, request in requests if (error := _failure(request)) is not None
        ]
        lost = dict(failed)
        heard = {rank: self._heard[rank, :_SIZE] for rank in self.others if rank not in lost}
        mine = self._said[:_SIZE]
        if all(torch.equal(said, mine) for said in heard.values()):
            if lost:
                raise self._lost(sorted(lost), next(iter(lost.values())))
            if posted is not None:
                self._delivered = self._heard[:, _SIZE : _SIZE + len(posted)].clone()
                self._delivered[self.rank] = posted
            return
        places: dict[str, list[int]] = {}
        for rank, said in sorted({**heard, self.rank: mine}.items()):
            places.setdefault(_text(said), []).append(rank)
        found = "; ".join(f"{_ranks(ranks)} at {text!r}" for text, ranks in places.items())
        gone = f"; {_ranks(sorted(lost))} did not answer" if lost else ""
        raise OutOfStepError(
            f"Ranks are out of step, as with uneven numbers of batches: {found}{gone}. All should "
            "be at the same place before they exchange anything. Give every rank the same model "
            "and number of batches, and let all ranks, or none, take part in each backward pass, "
            "optimizer step, barrier and reduction."
        )

    def wait(self, requests: Iterable[Request]) -> None:
        """Waits for messages.

        Raises:
            RankLostError: names the rank that has ended.
        """
        for rank, request in requests:
            error = _failure(request)
            if error is not None:
                raise self._lost(self._unreachable() if rank is None else [rank], error) from error

    @contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """An error of torch.distributed inside becomes one that names the ranks that are lost."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, (OutOfStepError, RankLostError)):
                raise
            raise self._lost(self._unreachable(), error) from error

    def _unreachable(self) -> list[int]:
        """The ranks to which nothing can be sent any more; a message that nobody takes tells
        nothing.
        """
        probe = torch.zeros(1, dtype=torch.uint8)
        gone = []
        for rank in self.others if self.group is not None else ():
            began = time.monotonic()
            if _failure(partial(dist.isend, probe, rank, self.group, _TAG + 1), _PROBE) is not None:
                if time.monotonic() - began >= _PROBE.total_seconds():
                    # after this gloo closes every connection, so that all other ranks would look
                    # gone
                    break
                gone.append(rank)
        return gone

    def _lost(self, ranks: Sequence[int], error: RuntimeError) -> RankLostError:
        who = f"{_ranks(ranks)} did" if ranks else "another rank did"
        return RankLostError(
            f"Rank {self.rank} was at {self.place!r}, and {who} not answer: a process has ended, "
            "hangs, or has left this part of the program. Look at its own output first. "
            f"torch.distributed said: {str(error).splitlines()[0][:300]}"
        )


def _failure(
    request: dist.Work | Callable[[], dist.Work | None] | None, within: timedelta | None = None
) -> RuntimeError | None:
    """What became of a message: None, or an error. It may still have to be sent."""
    try:
        request = request() if callable(request) else request
        if request is not None:
            request.wait() if within is None else request.wait(within)
    except RuntimeError as error:
        return error
    return None


def _text(said: Tensor) -> str:
    text = bytes(said.tolist()).decode("ascii", errors="replace").rstrip()
    return "".join(c if c.isprintable() else "?" for c in text)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


_meetings: list[tuple[weakref.ref[dist.ProcessGroup], Meeting]] = []


def meeting() -> Meeting:
    """The meeting of all processes of torch.distributed's default group.

    All ranks have to ask for it the first time at the same place, where another backend than gloo
    is used.
    """
    world = dist.group.WORLD
    assert world is not None
    for known, made in _meetings:
        if known() is world:
            return made
    group: Any = world
    if dist.get_backend() != "gloo":
        group = dist.new_group(backend="gloo") if dist.is_gloo_available() else None
    _meetings[:] = [(weakref.ref(world), Meeting(group))]
    return _meetings[0][1]
