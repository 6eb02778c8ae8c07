"""The door of a parameter server: a process of its own that holds the connections.

It has limits of open files and of memory of its own. If a connection brings it down, it is started
again; the workers connect anew, and ask again. It knows the ranks' keys and no more: what messages
say is for the desk. It runs as a script, without this package: it is small and starts at once.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

KEPT = 4
"""Messages of a rank that wait to be handed to the desk, and answers that wait for room. An honest
worker has one question at a time, and asks it again when its connection was made anew."""
QUOTA = 1000
"""Messages of a rank beyond these, and answers that it did not read, after which it is dropped."""
PERSISTENT = 10.0
"""Seconds after which the connection of a dropped rank is cut if it still sends."""
STRANGERS = 256
"""Connections of which nothing has been heard yet; with one more the oldest is cut."""
_AT_ONCE = 256
_WATCH_PARENT = 100
_RETRY = 20
_FAILED_CRYPTO = 0x11000001  # ZMQ_PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC
_MOST_FRAMES = 4
_HEAD = struct.Struct(f"<BqBB{_MOST_FRAMES}Q")


class Word(IntEnum):
    """What a parcel is about: first those of the server, then those of the door."""

    SETTINGS = 1  # frames: JSON, once, at the beginning
    ANSWER = 2  # number: the rank; frames: route, head, body
    PING = 3  # the same; it need not arrive
    LISTENING = 65
    DEAF = 66  # frames: why it cannot listen
    HEARD = 67  # number: the rank that the key is of; frames: route, and up to three that it sent
    LOST = 68  # frames: the route, which leads nowhere any more
    DROPPED = 69  # number: a rank that has sent too much, and is not let in again
    SAYS = 70  # frames: something for the log


class Parcel(NamedTuple):
    """One message of a link."""

    word: Word
    number: int
    frames: list[memoryview]


class Link:
    """One end of a socket pair. It never waits: what does not fit into the socket is kept.

    A last frame that is the same object as in the message before travels once.

    Args:
        end: the socket.

    Attributes:
        backlog: how many messages have not been sent yet.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._out: deque[memoryview] = deque()
        self._ends: deque[int] = deque()  # how many pieces each message has left
        self._sent: object = None
        self._head = bytearray(_HEAD.size)
        self._in, self._filled = memoryview(self._head), 0
        self._frame = memoryview(b"")

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def backlog(self) -> int:
        return len(self._ends)

    def put(self, word: Word, number: int = 0, frames: Sequence[bytes | memoryview] = ()) -> None:
        """Sends a message, as soon as there is room."""
        same = len(frames) > 0 and frames[-1] is self._sent
        self._sent = frames[-1] if frames else None
        lengths = [len(frame) for frame in frames] + [0] * (_MOST_FRAMES - len(frames))
        pieces = [memoryview(frame) for frame in (frames[:-1] if same else frames) if len(frame)]
        self._out += [memoryview(_HEAD.pack(word, number, len(frames), same, *lengths)), *pieces]
        self._ends.append(1 + len(pieces))
        self.flush()

    def flush(self) -> None:
        """Sends what there is room for.

        Raises:
            OSError: if nobody is at the other end.
        """
        while self._out:
            try:
                sent = self._socket.sendmsg(
                    [piece for piece, _ in zip(self._out, range(64), strict=False)]
                )
            except BlockingIOError:
                return
            while sent:
                piece = self._out[0]
                if sent < len(piece):
                    self._out[0] = piece[sent:]
                    break
                sent -= len(piece)
                self._out.popleft()
                self._ends[0] -= 1
                if not self._ends[0]:
                    self._ends.popleft()

    def get(self) -> Parcel | None:
        """The next message that has come whole; None if there is none.

        Raises:
            OSError: if nobody is at the other end.
        """
        while True:
            while self._filled < len(self._in):
                try:
                    received = self._socket.recv_into(self._in[self._filled :])
                except BlockingIOError:
                    return None
                if not received:
                    raise ConnectionResetError("The other end is closed.")
                self._filled += received
            word, number, count, same, *lengths = _HEAD.unpack(self._head)
            own = lengths[: count - same]
            if self._in.obj is self._head and sum(own):
                self._in, self._filled = memoryview(bytearray(sum(own))), 0
                continue
            frames, start = [], 0
            for length in own:
                frames.append(self._in[start : start + length] if length else memoryview(b""))
                start += length
            if same:
                frames.append(self._frame)
            self._frame = frames[-1] if frames else memoryview(b"")
            self._in, self._filled = memoryview(self._head), 0
            return Parcel(Word(word), number, frames)

    def close(self) -> None:
        """Hangs up."""
        self._socket.close()

    def finish(self) -> None:
        """Says that nothing more will be sent."""
        self._socket.shutdown(socket.SHUT_WR)


class Door:
    """Passes messages from connections to the desk, and answers back.

    Args:
        link: to the server.
        settings: ``address``, the server's pair ``public`` and ``secret``, the ranks' public keys
            ``workers``, the ranks ``dropped`` before, ``max_message_bytes``, ``heartbeat`` and
            ``dead_after`` in seconds.
    """

    def __init__(self, link: Link, settings: Mapping[str, Any]) -> None:
        self._link, self._parent = link, os.getppid()
        self._ranks = {
            z85.decode(key.encode()): int(rank) for rank, key in settings["workers"].items()
        }
        self._dropped: dict[int, float] = dict.fromkeys(settings["dropped"], time.monotonic())
        self._inbox = {rank: deque[list[Any]](maxlen=KEPT) for rank in self._ranks.values()}
        self._outbox: dict[bytes, deque[tuple[int, list[Any]]]] = {}
        self._excess: Counter[int] = Counter()
        self._strangers: dict[int, None] = {}
        self._most_strangers = max(STRANGERS, 2 * len(self._ranks))
        self._said: dict[str, float] = {}
        self._unsaid: Counter[str] = Counter()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 4096)
        self._gate = self._context.socket(zmq.REP)
        self._gate.bind("inproc://zeromq.zap.01")
        self._router = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.CURVE_SERVER, 1),
            (zmq.MAXMSGSIZE, settings["max_message_bytes"]),
            (
                zmq.RCVHWM,
                0,
            ),  # libzmq 4.3.5 may abort where it has to stop reading (its issues 3937, 4767)
            (zmq.SNDHWM, 16),
            (zmq.BACKLOG, 1024),
            (zmq.HANDSHAKE_IVL, 5000),
            (zmq.LINGER, 0),
            (zmq.HEARTBEAT_IVL, int(1000 * settings["heartbeat"])),
            (zmq.HEARTBEAT_TIMEOUT, int(1000 * settings["dead_after"])),
            (zmq.HEARTBEAT_TTL, int(1000 * settings["dead_after"])),
        ):
            self._router.setsockopt(option, value)
        self._router.curve_publickey, self._router.curve_secretkey = (
            settings["public"].encode(),
            settings["secret"].encode(),
        )
        events = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        self._monitor = self._router.get_monitor_socket(events | zmq.EVENT_ACCEPT_FAILED)
        self._router.bind(settings["address"])
        self._link.put(Word.LISTENING)

    def serve(self) -> None:
        """Until the server hangs up, or is no more."""
        poller = zmq.Poller()
        for end in (self._gate, self._monitor, self._router):
            poller.register(end, zmq.POLLIN)
        try:
            while os.getppid() == self._parent:
                poller.register(self._link, zmq.POLLIN | (zmq.POLLOUT if self._link.backlog else 0))
                ready = dict(poller.poll(_RETRY if self._outbox else _WATCH_PARENT))
                if self._gate in ready:
                    self._admit()
                if self._monitor in ready:
                    self._watch()
                if self._router in ready:
                    self._read()
                self._take_answers()
                self._send_answers()
                self._hand_over()
                self._say_more()
        except ConnectionError:  # the server has hung up
            self._send_answers()
            self._context.destroy(linger=500)

    # -- connections -------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Who asks to be let in: ZeroMQ's authentication protocol (RFC 27)."""
        version, request, _, address, _, mechanism, *credentials = self._gate.recv_multipart()
        rank = self._ranks.get(credentials[0]) if mechanism == b"CURVE" and credentials else None
        in_ = rank is not None and rank not in self._dropped
        code, text = (
            (b"200", b"OK") if in_ else (b"400", b"unknown key" if rank is None else b"dropped")
        )
        self._gate.send_multipart(
            [version, request, code, text, str(rank).encode() if in_ else b"", b""]
        )
        if not in_:
            who = "an unknown key" if rank is None else f"rank {rank}, which was dropped"
            self._say(f"a handshake from {address.decode(errors='replace')} was refused: {who}")

    def _watch(self) -> None:
        """Counts connections of which nothing has been heard, and keeps them few."""
        for _ in range(_AT_ONCE):
            if not self._monitor.poll(0):
                return
            event = recv_monitor_message(self._monitor)
            kind, value = event["event"], event["value"]
            if kind == zmq.EVENT_ACCEPTED:
                self._strangers.pop(value, None)
                self._strangers[value] = None
                if len(self._strangers) > self._most_strangers:
                    oldest = next(iter(self._strangers))
                    del self._strangers[oldest]
                    self._cut(oldest)
                    self._say("too many connections of which nothing was heard; the oldest was cut")
            elif kind == zmq.EVENT_DISCONNECTED:
                self._strangers.pop(value, None)
            elif kind == zmq.EVENT_ACCEPT_FAILED:
                self._say(f"a connection could not be accepted: {os.strerror(value)}")
            elif value == _FAILED_CRYPTO:
                self._say("a handshake failed: the peer does not have this server's server.key")

    def _cut(self, descriptor: int) -> None:
        """Ends a connection below ZeroMQ, which has no call for it."""
        try:
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                connection.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOTCONN):  # else it has ended by itself
                raise

    # -- messages ----------------------------------------------------------------------------------

    def _read(self) -> None:
        """What has arrived. All is read, so that ZeroMQ never stops; too much is thrown away."""
        for _ in range(_AT_ONCE):
            try:
                route, *frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            rank, descriptor = int(frames[0].get("User-Id")), frames[0].get(zmq.SRCFD)
            self._strangers.pop(descriptor, None)
            if rank not in self._dropped:
                inbox = self._inbox[rank]
                full = len(inbox) == KEPT
                inbox.append([route.bytes, *(frame.buffer for frame in frames[:3])])
                if full:
                    self._count(rank)
            elif time.monotonic() > self._dropped[rank] + PERSISTENT:
                self._cut(descriptor)

    def _count(self, rank: int) -> None:
        """One more that is too much."""
        self._excess[rank] += 1
        if self._excess[rank] > QUOTA:
            self._dropped[rank] = time.monotonic()
            self._inbox[rank].clear()
            self._link.put(Word.DROPPED, rank)

    def _hand_over(self) -> None:
        """Messages to the desk, as many as it takes now, of all ranks in turn."""
        self._link.flush()
        while not self._link.backlog and any(self._inbox.values()):
            for rank, inbox in self._inbox.items():
                if inbox:
                    self._link.put(Word.HEARD, rank, inbox.popleft())

    def _take_answers(self) -> None:
        for _ in range(_AT_ONCE):
            parcel = self._link.get()
            if parcel is None:
                return
            route, frames = bytes(parcel.frames[0]), parcel.frames[1:]
            if parcel.word is Word.PING:
                self._send(route, frames)
            elif parcel.number not in self._dropped:
                waiting = self._outbox.setdefault(route, deque(maxlen=KEPT))
                if len(waiting) == KEPT:
                    self._count(parcel.number)
                waiting.append((parcel.number, frames))
                self._send_answers(route)

    def _send_answers(self, *routes: bytes) -> None:
        """Answers for which there is room."""
        for route in routes or tuple(self._outbox):
            waiting = self._outbox[route]
            while waiting and (waiting[0][0] in self._dropped or self._send(route, waiting[0][1])):
                waiting.popleft()
            if not waiting:
                del self._outbox[route]

    def _send(self, route: bytes, frames: list[Any]) -> bool:
        """Whether it is on its way, or never will be."""
        try:
            self._router.send_multipart([route, *frames], zmq.NOBLOCK, copy=len(frames[-1]) < 65536)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._link.put(Word.LOST, 0, [route])
        return True

    # -- the log -----------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self._unsaid[text] += 1

    def _say_more(self) -> None:
        """Each thing at most once in ten seconds, with the number of times."""
        now = time.monotonic()
        for text, times in list(self._unsaid.items()):
            if now - self._said.get(text, now - 10) >= 10:
                self._said[text] = now
                del self._unsaid[text]
                self._link.put(Word.SAYS, 0, [f"{text} ({times} times)".encode()])
        for counted in (self._said, self._unsaid):
            while len(counted) > 1000:  # addresses are many
                counted.pop(next(iter(counted)))


def main() -> None:
    """Serves what comes through standard input, which is one end of a socket pair."""
    import resource

    for name in (
        "SIGINT",
        "SIGTERM",
    ):  # these are for the training, which ends this process by hanging up
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    end = socket.socket(fileno=os.dup(0))
    end.setblocking(True)
    link = Link(end)
    while (parcel := link.get()) is None:
        time.sleep(0.001)
    settings = json.loads(bytes(parcel.frames[0]))
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    if sys.platform == "linux":  # elsewhere the kernel does not hold to it
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        memory = (
            settings["memory"] if hard == resource.RLIM_INFINITY else min(settings["memory"], hard)
        )
        resource.setrlimit(resource.RLIMIT_AS, (memory, hard))
    try:
        door = Door(link, settings)
    except zmq.ZMQError as error:
        link.put(Word.DEAF, 0, [str(error).encode()])
        return
    door.serve()


if __name__ == "__main__":
    main()
