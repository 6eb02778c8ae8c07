"""The server's bookkeeping, without a socket or a clock of its own: who is there, who said what,
what came of it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_byz.transports.parameter_server.protocol import BadFrameError, Head, Kind, parse

log = logging.getLogger("lightning_byz")

RECONNECT = 5.0
"""Seconds in which workers connect anew, after the server has lost all connections at once."""

Key = tuple[int, str]
"""Position and name of a collective."""


class Waiting(NamedTuple):
    """A call of a worker that has no answer yet."""

    key: Key
    layout: int
    body: memoryview


@dataclass
class Member:
    """What the desk knows of a rank.

    Attributes:
        token: names its process; empty before its first hello.
        route: where to answer; None if it is not connected.
        waiting: its only unanswered call.
        active: whether collectives wait for it; one that rejoins becomes active with its first
            call.
        wants: whether it waits for a snapshot.
        starting: whether it starts from one, and has not called yet.
        left: whether it said good-bye.
        dropped: whether it sent too much, and is not let in again.
        called: the latest position that it asked about.
        given: the position of the last snapshot that it was given; None if it had none.
        lost: when its connection broke; 0.0 if it never had one.
        heard: when it last said something.
        pinged: when it was last looked for.
        knocked: where another process stands that was told that this rank is taken, and its hello.
    """

    token: bytes = b""
    route: bytes | None = None
    waiting: Waiting | None = None
    active: bool = False
    wants: bool = False
    starting: bool = False
    left: bool = False
    dropped: bool = False
    called: int = 0
    given: int | None = None
    lost: float = 0.0
    heard: float = 0.0
    pinged: float = 0.0
    knocked: tuple[bytes, Head] | None = None


@dataclass
class Call:
    """A collective that the server has entered.

    Attributes:
        key: position and name.
        layout: the fingerprint that bodies have to bear.
        sizes: the least and the most bytes of a body; an empty one is silence.
        asked: how many workers of each rank are to take part, by rank.
        need: messages of as many workers are enough.
        least: of as many are enough at the deadline, and when nobody else is alive.
        deadline, give_up: when it closes with the least, and when with whatever there is.
        opened: when the server entered it.

    Attributes:
        bodies, seconds: what has come, and when, by rank.
        silent: ranks that have said nothing, or something that was refused.
        why: once it is closed, why there is no body of these ranks, unless they have none to send.
    """

    key: Key
    layout: int
    sizes: tuple[int, int]
    asked: dict[int, int]
    need: int
    least: int
    deadline: float
    give_up: float
    opened: float
    bodies: dict[int, memoryview] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)
    why: dict[int, str] = field(default_factory=dict)

    @property
    def heard(self) -> int:
        """How many workers' messages are here."""
        return sum(self.asked[rank] for rank in self.bodies)


class Desk:
    """Takes messages in, and puts answers into ``outbox``.

    Every worker has at most one unanswered call, so what is held is bounded: a body for each rank,
    and the results of the last ``backlog`` positions.

    Args:
        ranks: number of processes; the server is rank 0.
        session: 16 bytes that name this server.
        entry: which of the program's entry points (fit, test, ...) it serves, counted from 0.
        backlog: how many positions' results it keeps.
        return_within: seconds after the loss of its connection in which a worker may come back.

    Attributes:
        outbox: answers to send: (route, head, body).
        rejected: how many messages were refused, by reason.
        late: how many messages came after their collective had closed, by rank.
    """

    def __init__(
        self,
        ranks: int,
        session: bytes,
        entry: int,
        backlog: int,
        return_within: float = float("inf"),
    ) -> None:
        self.session, self.entry, self.backlog, self.return_within = (
            session,
            entry,
            backlog,
            return_within,
        )
        self.members = {rank: Member() for rank in range(1, ranks)}
        self.position = 0
        self.begun = False
        self.closing = ""
        self.call: Call | None = None
        self.results: dict[Key, bytes] = {}
        self.outbox: list[tuple[bytes, bytes, bytes]] = []
        self.rejected: Counter[str] = Counter()
        self.late: Counter[int] = Counter()
        self._told: dict[str, float] = {}
        self._all_lost = -RECONNECT

    # -- what comes in -----------------------------------------------------------------------------

    def receive(
        self, route: bytes, frames: Sequence[memoryview | bytes], owner: int | None, now: float
    ) -> None:
        """One message.

        Args:
            route: where it came from.
            frames: it.
            owner: the rank whose key its connection has; None if keys are not looked at.
            now: seconds of a monotonic clock.
        """
        try:
            head, body = parse(frames)
            self._receive(route, head, body, owner, now)
        except BadFrameError as error:
            self._reject(str(error), owner, now)

    def _receive(
        self, route: bytes, head: Head, body: memoryview, owner: int | None, now: float
    ) -> None:
        if owner is not None and head.rank != owner:
            raise BadFrameError("rank of another key")
        member = self.members.get(head.rank)
        if member is None:
            raise BadFrameError("no such rank")
        if head.kind is Kind.HELLO:
            self._hello(member, route, head, body, now)
            return
        if member.dropped:
            raise BadFrameError("dropped rank")
        if head.session != self.session:
            self._answer(route, Kind.CLOSED, head, b"This is another run's server.")
            raise BadFrameError("another session")
        if head.token != member.token:
            self._answer(route, Kind.REFUSED, head, b"Another process has taken this rank.")
            raise BadFrameError("another process of this rank")
        member.route, member.heard = route, now
        if head.kind is Kind.CALL:
            self._called(head.rank, member, route, head, body, now)
        elif head.kind is Kind.WANT:
            member.wants, member.starting, member.active, member.waiting = True, False, False, None
        elif head.kind is Kind.BYE:
            member.left, member.active, member.waiting = True, False, None
        else:
            raise BadFrameError("not for a server")

    def _hello(
        self, member: Member, route: bytes, head: Head, body: memoryview, now: float
    ) -> None:
        if len(body):
            raise BadFrameError("body of a hello")
        if member.dropped:
            raise BadFrameError("dropped rank")
        if head.position > self.entry:
            return  # it is ahead, at the program's next entry point: it will ask again
        if head.position < self.entry or self.closing:
            self._answer(route, Kind.CLOSED, head, b"over")
            return
        if member.token != head.token:
            if member.route is not None and not member.left:
                member.knocked = route, head
                # until its connection is known to be gone
                self._answer(route, Kind.REFUSED, head, b"taken")
                raise BadFrameError("rank is taken")
            member.token, member.waiting, member.left, member.starting = (
                head.token,
                None,
                False,
                False,
            )
            member.active, member.wants = not self.begun, self.begun
        member.route, member.heard, member.knocked = route, now, None
        self._answer(route, Kind.BEGUN if member.wants else Kind.WELCOME, head)

    def _called(
        self, rank: int, member: Member, route: bytes, head: Head, body: memoryview, now: float
    ) -> None:
        key = (head.position, head.name)
        member.wants = member.starting = False
        if member.waiting is not None and member.waiting.key == key:
            raise BadFrameError("duplicate")
        member.active, member.left, member.called = True, False, max(member.called, head.position)
        if key in self.results:
            if len(body):
                self.late[rank] += 1
            self._answer(route, Kind.RESULT, head, self.results[key])
        elif head.position < self.position - self.backlog:
            self._answer(route, Kind.BEHIND, head)
        elif head.position < self.position:
            self._answer(route, Kind.NEVER, head)
        else:
            # a worker may be ahead, where batches have no exchange: it waits for the server
            member.waiting = Waiting(key, head.layout, body)
            self._take(rank, now)

    def _take(self, rank: int, now: float) -> None:
        """Moves a waiting call's body into the open collective, if that is where it belongs."""
        call, waiting = self.call, self.members[rank].waiting
        if (
            call is None
            or waiting is None
            or waiting.key != call.key
            or rank in call.bodies
            or rank in call.silent
        ):
            return
        self.members[rank].waiting = waiting._replace(body=memoryview(b""))
        call.seconds[rank] = now - call.opened
        least, most = call.sizes
        if (
            rank in call.asked
            and len(waiting.body)
            and waiting.layout == call.layout
            and least <= len(waiting.body) <= most
        ):
            call.bodies[rank] = waiting.body
            return
        call.silent.add(rank)
        if len(waiting.body) and rank in call.asked:
            reason = "layout" if waiting.layout != call.layout else "size"
            call.why[rank] = f"sent a message that was refused ({reason})"
            self._reject(reason, rank, now)

    def _reject(self, reason: str, rank: int | None, now: float) -> None:
        self.rejected[reason] += 1
        if now - self._told.get(reason, -1.0) >= 1.0 or reason not in self._told:
            self._told[reason] = now
            log.warning(
                f"ParameterServer refused a message{'' if rank is None else f' of rank {rank}'}: "
                f"{reason}. This was number {self.rejected[reason]}."
            )

    # -- what the server does ----------------------------------------------------------------------

    def advance(self, position: int) -> None:
        """The server has come to a new position: what it did not enter before, it never will."""
        self.position = position
        oldest = position - self.backlog
        self.results = {key: result for key, result in self.results.items() if key[0] >= oldest}
        for rank, member in self.members.items():
            if (
                member.waiting is not None
                and member.waiting.key[0] < position
                and member.route is not None
            ):
                kind = Kind.NEVER if member.waiting.key[0] >= oldest else Kind.BEHIND
                self._settle(rank, kind)

    def enter(self, call: Call, own: bytes) -> None:
        """The server enters a collective, with its own body."""
        self.call = call
        if own and 0 in call.asked:
            call.bodies[0] = memoryview(own)
        else:
            call.silent.add(0)
        call.seconds[0] = 0.0
        for rank in self.members:
            self._take(rank, call.opened)

    def is_done(self, now: float) -> bool:
        """Whether the open collective may close."""
        call = self.call
        assert call is not None
        if call.heard >= call.need or now >= call.give_up:
            return True
        missing = set(call.asked).difference(call.bodies, call.silent)
        if any(self._may_come(rank, call, now) for rank in missing):
            return call.heard >= call.least and now >= call.deadline
        return (
            call.heard >= call.least
            or now >= call.deadline
            or not any(self._may_return(rank, now) for rank in missing)
        )

    def _may_come(self, rank: int, call: Call, now: float) -> bool:
        """Whether a rank that has not answered this collective may still do so: it is alive, and
        does not wait in a later one.
        """
        member = self.members[rank]
        here = member.route is not None or (now < self._all_lost + RECONNECT and not member.dropped)
        return (
            member.active
            and here
            and (member.waiting is None or member.waiting.key[0] < call.key[0])
        )

    def _may_return(self, rank: int, now: float) -> bool:
        """Whether a rank that is not there may come back to a collective that has too few."""
        member = self.members[rank]
        if member.left or member.dropped:
            return False
        if member.route is not None:
            return not member.active  # else it waits in another collective
        return now < member.lost + self.return_within

    def close(self) -> Call:
        """Closes the open collective: who comes now is late."""
        call = self.call
        assert call is not None
        self.call = None
        for rank in set(call.asked).difference(call.bodies, call.silent):
            where = self.whereabouts(rank)
            call.why[rank] = (
                "was late" if where == "connected" else f"was not heard (its process: {where})"
            )
        return call

    def publish(self, key: Key, result: bytes) -> None:
        """The result of a collective, for all that wait and for those that come later."""
        self.results[key] = result
        for rank, member in self.members.items():
            if member.waiting is not None and member.waiting.key == key:
                self._settle(rank, Kind.RESULT, result)

    def snapshot(self, ranks: Sequence[int], checkpoint: bytes) -> None:
        """A snapshot for ranks that want one."""
        for rank in ranks:
            member = self.members[rank]
            if member.wants and member.route is not None:
                member.wants, member.starting, member.given = False, True, self.position
                self._answer(
                    member.route,
                    Kind.SNAPSHOT,
                    Head(Kind.WANT, token=member.token, rank=rank),
                    checkpoint,
                )

    def wanting(self) -> list[int]:
        """The ranks that wait for a snapshot, and have not had one just before."""
        return [
            rank
            for rank, member in self.members.items()
            if member.wants
            and member.route is not None
            and (member.given is None or self.position >= member.given + self.backlog)
        ]

    def deserted(self) -> bool:
        """Whether nobody is left who may still ask for something."""
        present = [
            member
            for member in self.members.values()
            if member.route is not None and not member.left
        ]
        return not any(member.active or member.wants or member.starting for member in present)

    def all_lost(self, now: float) -> None:
        """All connections have broken at once, at the server's end: the workers connect anew."""
        self._all_lost = now
        self.outbox.clear()  # they ask again
        for member in self.members.values():
            if member.route is not None:
                member.route, member.lost = None, now

    def drop(self, rank: int) -> None:
        """A rank has sent more than anybody reads: it takes part in nothing any more."""
        member = self.members[rank]
        member.dropped, member.active, member.wants, member.starting = True, False, False, False
        member.route = member.waiting = None
        log.warning(
            f"ParameterServer: rank {rank} has sent many more messages than it may, or does not "
            "read what it is answered. It is dropped, and not let in again in this run."
        )

    def status(self) -> str:
        """Who is where, in words."""
        groups: dict[str, list[str]] = {}
        for rank in self.members:
            groups.setdefault(self.whereabouts(rank), []).append(str(rank))
        return "; ".join(
            f"{what}: ranks {', '.join(ranks)}" for what, ranks in sorted(groups.items())
        )

    def whereabouts(self, rank: int) -> str:
        """Where a worker is, in words."""
        member = self.members[rank]
        if member.dropped:
            return "refused"
        if not member.token:
            return "not come yet"
        if member.left:
            return "left"
        if member.route is None:
            return "gone"
        if not member.active:
            return "joining"
        if member.waiting is not None and member.waiting.key[0] > self.position:
            return "ahead"
        return "behind" if member.called < self.position - 1 else "connected"

    def gone(self, route: bytes, now: float) -> None:
        """A connection has broken: its rank is dead, unless it comes back."""
        for rank, member in self.members.items():
            if member.route == route:
                member.route, member.lost = None, now
                if not member.left:
                    log.warning(
                        f"ParameterServer: rank {rank} is gone. The run goes on without it."
                    )

    def shut(self, reason: str) -> None:
        """Tells everybody that the run is over."""
        self.closing = reason
        for rank, member in self.members.items():
            if member.route is not None and not member.left and (member.wants or reason != "over"):
                self._answer(
                    member.route,
                    Kind.CLOSED,
                    Head(Kind.BYE, token=member.token, rank=rank),
                    reason.encode(),
                )
            if member.knocked is not None:
                route, hello = member.knocked
                self._answer(route, Kind.CLOSED, hello, reason.encode())

    def _settle(self, rank: int, kind: Kind, body: bytes = b"") -> None:
        """Answers a rank's waiting call."""
        member = self.members[rank]
        assert member.waiting is not None
        position, name = member.waiting.key
        member.waiting = None
        if member.route is not None:
            self._answer(
                member.route,
                kind,
                Head(Kind.CALL, token=member.token, rank=rank, position=position, name=name),
                body,
            )

    def _answer(self, route: bytes, kind: Kind, to: Head, body: bytes = b"") -> None:
        head = Head(kind, self.session, to.token, to.rank, to.position, self.position, to.name)
        self.outbox.append((route, head.pack(), body))
