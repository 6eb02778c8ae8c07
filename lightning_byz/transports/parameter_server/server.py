"""The server's thread: a ROUTER socket, who may talk to it, and the desk behind it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from lightning_byz.transports.parameter_server.desk import Call, Desk
from lightning_byz.transports.parameter_server.keys import Pair
from lightning_byz.transports.parameter_server.protocol import Head, Kind

log = logging.getLogger("lightning_byz")

HEARTBEAT = 2.0
"""Seconds between ZeroMQ's own heartbeats, which its threads exchange while Python computes."""
DEAD_AFTER = 10.0
"""Seconds without one after which a connection counts as broken. A killed process's connection breaks at once."""
_TICK = 0.02
_PING_EVERY = 0.25


def prepare(socket: zmq.Socket[bytes]) -> None:
    """Options that both ends share."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(1000 * HEARTBEAT))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(1000 * DEAD_AFTER))
    socket.setsockopt(zmq.HEARTBEAT_TTL, int(1000 * DEAD_AFTER))


class _Known:
    """Tells the authenticator which keys may connect."""

    def __init__(self, publics: Sequence[bytes]) -> None:
        self.publics = frozenset(publics)

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self.publics


class Server:
    """Serves a desk in a thread of its own, while the process's main thread computes.

    Args:
        desk: the bookkeeping.
        address: where to listen, such as ``tcp://*:5555``.
        keys: the server's pair.
        workers: the public key of every other rank.
        max_message_bytes: the largest frame that is read; who sends a larger one is disconnected.

    Raises:
        RuntimeError: if it cannot listen there.
    """

    def __init__(self, desk: Desk, address: str, keys: Pair, workers: Mapping[int, bytes], max_message_bytes: int) -> None:
        self.desk, self.address = desk, address
        self._owners = {public.decode(): rank for rank, public in workers.items()}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 4096)
        self._authenticator = ThreadAuthenticator(self._context, log=log)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", credentials_provider=_Known(list(workers.values())))
        self._router = self._context.socket(zmq.ROUTER)
        prepare(self._router)
        for option, value in (
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.CURVE_SERVER, 1),
            (zmq.MAXMSGSIZE, max_message_bytes),
            (zmq.RCVHWM, 8),
            (zmq.BACKLOG, 1024),
            (zmq.HANDSHAKE_IVL, 5000),
        ):
            self._router.setsockopt(option, value)
        self._router.curve_publickey, self._router.curve_secretkey = keys.public, keys.secret
        try:
            self._router.bind(address)
        except zmq.ZMQError as error:
            self._authenticator.stop()
            self._context.destroy(linger=0)
            raise RuntimeError(
                f"ParameterServer should be able to listen at {address}. Found: {error}. Set MASTER_PORT to a free port on every host, and "
                "MASTER_ADDR to this host."
            ) from error
        self._doorbell = self._context.socket(zmq.PULL)
        self._doorbell.bind("inproc://desk")
        self._bell = self._context.socket(zmq.PUSH)
        self._bell.setsockopt(zmq.SNDHWM, 0)
        self._bell.connect("inproc://desk")
        self._lock = threading.Lock()  # of the desk, and of what is open
        self._open: Future[Call] | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._serve, name="parameter-server", daemon=True)
        self._thread.start()

    # -- for the main thread ------------------------------------------------------------------------------------------

    def ask(self, action: Callable[[], Any]) -> Any:
        """Runs an action on the desk, while the server's thread keeps off, and has the answers sent that it gives rise to."""
        if not self._thread.is_alive():
            raise RuntimeError("The thread of ParameterServer has ended with the error above.")
        with self._lock:
            result = action()
            ring = bool(self.desk.outbox) or self._open is not None
        if ring:
            self._bell.send(b"")
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
        """Stops serving: after a run, once everybody has left or ``patience`` seconds have passed; after an error, at once.

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
        self._bell.send(b"")
        self._thread.join()
        self._authenticator.stop()
        self._context.destroy(linger=500)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._doorbell, zmq.POLLIN)
        while not self._stopped:
            ready = dict(poller.poll(int(1000 * _TICK)))
            if self._doorbell in ready:
                self._doorbell.recv()
            with self._lock:
                if self._router in ready:
                    self._read()
                now = time.monotonic()
                self._look_for_the_missing(now)
                if self._open is not None and self.desk.is_done(now):
                    done, self._open = self._open, None
                    done.set_result(self.desk.close())
                self._send()

    def _read(self) -> None:
        """What has arrived, up to a number of messages, so that nobody can keep the server from the rest of its work."""
        for _ in range(256):
            try:
                route, *frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            owner = self._owners.get(str(frames[0].get("User-Id"))) if frames else None
            self.desk.receive(route.bytes, [frame.buffer for frame in frames], -1 if owner is None else owner, time.monotonic())

    def _look_for_the_missing(self, now: float) -> None:
        """Pings connections that may be dead: sending to a broken one fails. The longer it is silent, the rarer."""
        for member in self.desk.members.values():
            since = now - max(member.heard, member.pinged)
            if member.route is not None and since > max(_PING_EVERY, 0.1 * (now - member.heard)):
                member.pinged = now
                self._send_one(member.route, Head(Kind.PING, self.desk.session).pack(), b"")

    def _send(self) -> None:
        outbox, self.desk.outbox = self.desk.outbox, []
        for route, head, body in outbox:
            if not self._send_one(route, head, body):
                self.desk.outbox.append((route, head, body))  # its queue is full of pings: once more at the next tick

    def _send_one(self, route: bytes, head: bytes, body: bytes) -> bool:
        """Whether it is on its way, or never will be."""
        try:
            self._router.send_multipart([route, head, body], zmq.NOBLOCK, copy=len(body) < 65536)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.desk.gone(route)
        return True
