"""The server: the desk, a thread that serves it, and a process that holds the connections."""

from __future__ import annotations

import json
import logging
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from typing import Any

import zmq

from lightning_byz.transports.parameter_server import door
from lightning_byz.transports.parameter_server.desk import Call, Desk
from lightning_byz.transports.parameter_server.door import Link, Parcel, Word
from lightning_byz.transports.parameter_server.keys import Pair
from lightning_byz.transports.parameter_server.protocol import Head, Kind, rank_of

log = logging.getLogger("lightning_byz")

HEARTBEAT = 2.0
"""Seconds between ZeroMQ's own heartbeats, which its threads exchange while Python computes."""
DEAD_AFTER = 10.0
"""Seconds without one after which a connection counts as broken. A killed process's connection
breaks at once.
"""
_TICK = 0.02
_PING_EVERY = 0.25
_STATUS_EVERY = 10.0
_AT_ONCE = 256
_LONGEST_START = 120.0
_RESTART_AFTER = (0.0, 0.1, 0.5, 2.0, 5.0)
"""Seconds before the door is started again, by how often it has ended."""


def prepare(socket: zmq.Socket[bytes]) -> None:
    """Options of a worker's end that fit the server's."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(1000 * HEARTBEAT))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(1000 * DEAD_AFTER))
    socket.setsockopt(zmq.HEARTBEAT_TTL, int(1000 * DEAD_AFTER))


class Server:
    """Serves a desk in a thread of its own, while the process's main thread computes.

    The connections are held by another process, the `door`. If that ends, it is started again.

    Args:
        desk: the bookkeeping.
        address: where to listen, such as ``tcp://*:5555``.
        keys: the server's pair.
        workers: the public key of every other rank.
        max_message_bytes: the largest frame that is read; who sends a larger one is disconnected.

    Raises:
        RuntimeError: if it cannot listen there.
    """

    def __init__(
        self,
        desk: Desk,
        address: str,
        keys: Pair,
        workers: Mapping[int, bytes],
        max_message_bytes: int,
    ) -> None:
        assert keys.secret is not None
        self.desk, self.address = desk, address
        # a frame in and one out for every rank, and what Python, ZeroMQ and the allocators reserve
        memory = (2 << 30) + (2 * len(workers) + 8) * max_message_bytes
        self._settings = {
            "address": address,
            "public": keys.public.decode(),
            "secret": keys.secret.decode(),
            "workers": {rank: public.decode() for rank, public in workers.items()},
            "max_message_bytes": max_message_bytes,
            "memory": memory,
            "heartbeat": HEARTBEAT,
            "dead_after": DEAD_AFTER,
        }
        self._dropped: set[int] = set()
        self._bell, self._doorbell = socket.socketpair()
        self._bell.setblocking(False)
        self._doorbell.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._doorbell, selectors.EVENT_READ)
        self._lock = threading.Lock()  # of the desk, and of what is open
        self._open: Future[Call] | None = None
        self._stopped = False
        self._ends, self._closed_at = 0, -1.0
        self._status, self._told_status = "", -_STATUS_EVERY
        self._door: subprocess.Popen[bytes] | None = None
        self._start_door()
        self._wait_until_it_listens()
        self._thread = threading.Thread(target=self._serve, name="parameter-server", daemon=True)
        self._thread.start()

    # -- for the main thread -----------------------------------------------------------------------

    def ask(self, action: Callable[[], Any]) -> Any:
        """Runs an action on the desk, while the server's thread keeps off, and has the answers sent
        that it gives rise to.
        """
        if not self._thread.is_alive():
            raise RuntimeError("The thread of ParameterServer has ended with the error above.")
        with self._lock:
            result = action()
            ring = bool(self.desk.outbox) or self._open is not None
        if ring:
            self._ring()
        return result

    def collect(self, call: Call, own: bytes) -> Call:
        """Enters a collective and waits until it closes."""
        done: Future[Call] = Future()

        def enter() -> None:
            self.desk.enter(call, own)
            self._open = done

        self.ask(enter)
        while not wait([done], timeout=1.0).done:
            if not self._thread.is_alive():
                raise RuntimeError("The thread of ParameterServer has ended with the error above.")
        return done.result()

    def close(self, reason: str, patience: float) -> None:
        """Stops serving: after a run, once everybody has left or ``patience`` seconds have passed;
        after an error, at once.

        Args:
            reason: "over" at a run's end; else what went wrong.
            patience: seconds.
        """
        if self._stopped:
            return
        self.ask(lambda: self.desk.shut(reason))
        deadline = time.monotonic() + (patience if reason == "over" else 0.2)
        while time.monotonic() < deadline:
            if self.ask(self.desk.deserted):
                break
            time.sleep(_TICK)
        self._stopped = True
        self._ring()
        self._thread.join()
        self._stop_door()
        self._selector.close()
        self._bell.close()
        self._doorbell.close()

    def _ring(self) -> None:
        try:
            self._bell.send(b"\0")
        except BlockingIOError:
            return  # it rings already

    # -- the thread --------------------------------------------------------------------------------

    def _serve(self) -> None:
        while not self._stopped:
            for key, _ in self._selector.select(_TICK):
                if key.fileobj is self._doorbell:
                    self._doorbell.recv(4096)
            with self._lock:
                now = time.monotonic()
                self._work(now)
                if self._open is not None and self.desk.is_done(now):
                    done, self._open = self._open, None
                    done.set_result(self.desk.close())
                self._tell_status(now)

    def _work(self, now: float) -> None:
        """What has arrived, what is to be sent, and another door if this one has ended."""
        if self._door is None:
            delay = _RESTART_AFTER[min(self._ends, len(_RESTART_AFTER)) - 1]
            if now < self._closed_at + delay:
                return
            self._start_door()
        try:
            self._read(now)
            self._look_for_the_missing(now)
            self._send()
        except ConnectionError:
            self._stop_door()
            self._ends, self._closed_at = self._ends + 1, now
            log.warning(
                "ParameterServer: the process that holds the connections has ended. It is started "
                "again, and the workers connect anew."
            )
            self.desk.all_lost(now)

    def _read(self, now: float) -> None:
        """What has arrived, up to a number of messages, so that nobody can keep the server from the
        rest of its work.
        """
        for _ in range(_AT_ONCE):
            parcel = self._link.get() if self._link.backlog < _AT_ONCE else None
            if parcel is None:
                return
            self._take(parcel, now)

    def _take(self, parcel: Parcel, now: float) -> None:
        word, rank, frames = parcel
        if word is Word.HEARD:
            self.desk.receive(bytes(frames[0]), frames[1:], rank, now)
        elif word is Word.LOST:
            self.desk.gone(bytes(frames[0]), now)
        elif word is Word.DROPPED:
            self._dropped.add(rank)
            self.desk.drop(rank)
        elif word is Word.SAYS:
            log.warning(f"ParameterServer: {bytes(frames[0]).decode(errors='replace')}.")
        elif word is Word.DEAF:
            log.warning(
                f"ParameterServer cannot listen at {self.address} again: "
                f"{bytes(frames[0]).decode(errors='replace')}."
            )

    def _look_for_the_missing(self, now: float) -> None:
        """Pings connections that may be dead: sending to a broken one fails. The longer it is
        silent, the rarer.
        """
        for rank, member in self.desk.members.items():
            since = now - max(member.heard, member.pinged)
            if member.route is not None and since > max(_PING_EVERY, 0.1 * (now - member.heard)):
                member.pinged = now
                self._link.put(
                    Word.PING, rank, [member.route, Head(Kind.PING, self.desk.session).pack(), b""]
                )

    def _send(self) -> None:
        outbox, self.desk.outbox = self.desk.outbox, []
        for route, head, body in outbox:
            self._link.put(Word.ANSWER, rank_of(head), [route, head, body])
        self._link.flush()
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._link.backlog else 0)
        self._selector.modify(self._link, events)

    def _tell_status(self, now: float) -> None:
        """Says who is there when that has changed, and at most every ten seconds."""
        if now - self._told_status < _STATUS_EVERY:
            return
        status = self.desk.status()
        if status != self._status:
            log.info(f"ParameterServer: {status}.")
        self._status, self._told_status = status, now

    # -- the door ----------------------------------------------------------------------------------

    def _start_door(self) -> None:
        own, others = socket.socketpair()
        with others:
            self._door = subprocess.Popen(
                [sys.executable, os.path.abspath(door.__file__)], stdin=others.fileno()
            )
        self._link = Link(own)
        self._selector.register(self._link, selectors.EVENT_READ)
        settings = {**self._settings, "dropped": sorted(self._dropped)}
        self._link.put(Word.SETTINGS, 0, [json.dumps(settings).encode()])

    def _wait_until_it_listens(self) -> None:
        deadline, why = time.monotonic() + _LONGEST_START, "it does not answer"
        while time.monotonic() < deadline:
            try:
                parcel = self._link.get()
            except ConnectionError:
                why = "the process that holds the connections has ended with the error above"
                break
            if parcel is None:
                time.sleep(0.002)
            elif parcel.word is Word.LISTENING:
                return
            elif parcel.word is Word.DEAF:
                why = bytes(parcel.frames[0]).decode(errors="replace")
                break
        self._stop_door()
        raise RuntimeError(
            f"ParameterServer should be able to listen at {self.address}. Found: {why}. Set "
            "MASTER_PORT to a free port on every host, and MASTER_ADDR to this host."
        )

    def _stop_door(self) -> None:
        """Lets it send its last answers, and waits for its end."""
        if self._door is None:
            return
        self._selector.unregister(self._link)
        try:
            deadline = time.monotonic() + 1.0
            while self._link.backlog and time.monotonic() < deadline:
                self._link.flush()
                time.sleep(0.001)
            self._link.finish()
            self._door.wait(timeout=5.0)
        except (OSError, subprocess.TimeoutExpired):
            self._door.kill()
            self._door.wait()
        self._link.close()
        self._door = None
