"""A worker's end of the line: one question at a time, and a limit to how long the server may be
away.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import zmq
from zmq.utils.monitor import recv_monitor_message

from lightning_byz.transports.parameter_server.errors import (
    LeftBehindError,
    RunIsOverError,
    ServerLostError,
)
from lightning_byz.transports.parameter_server.keys import Pair
from lightning_byz.transports.parameter_server.protocol import BadFrameError, Head, Kind, parse
from lightning_byz.transports.parameter_server.server import DEAD_AFTER, prepare

log = logging.getLogger("lightning_byz")

_ASK_AGAIN = 1.0
_TELL_AFTER = 3


class Client:
    """Asks the server, and waits for its answer.

    Args:
        address: of the server, such as ``tcp://10.0.0.1:5555``.
        rank: this process.
        token: 16 bytes that name it.
        keys: its pair.
        server_key: the server's public key.
        lost_after: seconds without a connection after which the server counts as dead.

    Attributes:
        latest: the position that the server was at when it last answered.
    """

    def __init__(
        self,
        address: str,
        rank: int,
        token: bytes,
        keys: Pair,
        server_key: bytes,
        lost_after: float,
    ) -> None:
        self.address, self.rank, self.token, self.lost_after = address, rank, token, lost_after
        self.session = bytes(16)
        self.latest = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        prepare(self._socket)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.curve_publickey, self._socket.curve_secretkey = keys.public, keys.secret
        self._socket.curve_serverkey = server_key
        failures = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | failures
        self._monitor = self._socket.get_monitor_socket(events)
        self._failed = 0  # handshakes since the last good one
        self._met = False  # whether there was a good one
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._away_since: float | None = time.monotonic()
        self._socket.connect(address)

    def join(self, entry: int, patience: float) -> bool:
        """Signs in, as soon as the server is there. Whether the run has begun without this process,
        which then `want`s a snapshot.

        Args:
            entry: which of the program's entry points (fit, test, ...) this is, counted from 0.
            patience: seconds to wait for the server.

        Raises:
            ServerLostError: if no server answers, or it refuses.
            RunIsOverError: if that entry point has ended.
        """
        self._away_since = time.monotonic() + patience - self.lost_after
        hello = Head(Kind.HELLO, token=self.token, rank=self.rank, position=entry)
        refused_until = time.monotonic() + 2 * DEAD_AFTER
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            head, _ = self._ask(
                hello,
                b"",
                (Kind.WELCOME, Kind.BEGUN, Kind.REFUSED, Kind.CLOSED),
                again=_ASK_AGAIN,
                until=deadline,
            )
            if head.kind in (Kind.WELCOME, Kind.BEGUN):
                self.session = head.session
                return head.kind is Kind.BEGUN
            if head.kind is Kind.CLOSED:
                raise RunIsOverError(
                    "This entry point of the program has ended without this process."
                )
            # until then it may be this rank's own connection of before
            if time.monotonic() > refused_until:
                raise ServerLostError(
                    "A rank should be one process. Found another one that serves as rank "
                    f"{self.rank} at {self.address}. Give every process its own NODE_RANK and "
                    "LOCAL_RANK."
                )
            time.sleep(_ASK_AGAIN)
        why = self._likely_cause()
        raise ServerLostError(
            f"No server at {self.address} let rank {self.rank} in for {patience:.0f} s.{why}"
        )

    def call(
        self, position: int, name: str, layout: int, body: bytes | memoryview
    ) -> memoryview | None:
        """What came of a collective; None if the server passed this position without it.

        Raises:
            LeftBehindError: if that is too long ago.
            ServerLostError: if the server is gone.
        """
        head = Head(Kind.CALL, self.session, self.token, self.rank, position, layout, name)
        answer, result = self._ask(head, body, (Kind.RESULT, Kind.NEVER, Kind.BEHIND))
        if answer.kind is Kind.BEHIND:
            raise LeftBehindError(
                f"Rank {self.rank} is at round {position}, and the server at {answer.layout}."
            )
        return result if answer.kind is Kind.RESULT else None

    def want(self) -> memoryview:
        """A snapshot of the run, as soon as the server makes one."""
        head = Head(Kind.WANT, self.session, self.token, self.rank)
        return self._ask(head, b"", (Kind.SNAPSHOT,))[1]

    def leave(self) -> None:
        """Says good-bye."""
        if self._away_since is None:
            self._socket.send_multipart(
                [Head(Kind.BYE, self.session, self.token, self.rank).pack(), b""], zmq.NOBLOCK
            )
        self.close()

    def close(self) -> None:
        """Hangs up."""
        self._socket.disable_monitor()
        self._context.destroy(linger=1000)

    def _ask(
        self,
        head: Head,
        body: bytes | memoryview,
        answers: Sequence[Kind],
        again: float | None = None,
        until: float | None = None,
    ) -> tuple[Head, memoryview]:
        """Sends a question, again whenever the connection was made anew, and waits for one of these
        answers to it.
        """
        question: list[bytes | memoryview] = [head.pack(), body]
        self._socket.send_multipart(question, copy=len(body) < 65536)
        asked = time.monotonic()
        while True:
            ready = dict(self._poller.poll(200))
            if self._monitor in ready and self._watch():
                self._socket.send_multipart(question, copy=len(body) < 65536)
            if self._socket in ready:
                frames = self._socket.recv_multipart(copy=False)
                try:
                    answer, result = parse([frame.buffer for frame in frames])
                except BadFrameError as error:
                    raise ServerLostError(
                        f"The server at {self.address} speaks another protocol: {error}."
                    ) from error
                if answer.kind is not Kind.PING:
                    self.latest = max(
                        self.latest, answer.layout if head.kind is not Kind.HELLO else 0
                    )
                if answer.kind in answers and (
                    head.kind is not Kind.CALL
                    or (answer.position, answer.name) == (head.position, head.name)
                ):
                    return answer, result
                self._refused(answer, result)
            now = time.monotonic()
            if self._away_since is not None and now - self._away_since > self.lost_after:
                raise ServerLostError(
                    f"The server at {self.address} has not been there for {self.lost_after:.0f} "
                    "s. The run has ended with it. Resume from its last checkpoint: "
                    f"trainer.fit(..., ckpt_path=...).{self._likely_cause()}"
                    if self._met
                    else f"No server at {self.address} has let rank {self.rank} in."
                    f"{self._likely_cause()}"
                )
            if until is not None and now > until:
                raise ServerLostError(
                    f"No server at {self.address} answered rank {self.rank}.{self._likely_cause()}"
                )
            if again is not None and now - asked > again and self._away_since is None:
                self._socket.send_multipart(question)
                asked = now

    def _likely_cause(self) -> str:
        if not self._failed:
            return ""
        return (
            f" It is reached, but has ended the handshake {self._failed} times. The likely cause "
            "is the key: `server.key` in the `keys` directory of this host should be that of the "
            "server's host."
        )

    def _refused(self, answer: Head, reason: memoryview) -> None:
        text = bytes(reason[:500]).decode(errors="replace")
        if answer.kind is Kind.CLOSED and text == "over":
            raise RunIsOverError("The run has ended without this process.")
        if answer.kind in (Kind.CLOSED, Kind.REFUSED):
            raise ServerLostError(
                f"The server at {self.address} has ended this process's run: {text}"
            )

    def _watch(self) -> bool:
        """Takes note of the connection's fate; whether it has just been made anew, and what was
        asked may be lost.
        """
        anew = False
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                anew, self._away_since, self._failed, self._met = True, None, 0, True
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise ServerLostError(
                    f"The server at {self.address} does not know the key of rank {self.rank}. Its "
                    f"`keys` directory should hold rank{self.rank}.key, and this host's the "
                    "secret half of the same pair. Or it has dropped this rank, and its log says "
                    "why."
                )
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._failed += 1
                if self._failed == _TELL_AFTER:
                    log.warning(f"Rank {self.rank} is not let in yet.{self._likely_cause()}")
            elif self._away_since is None:
                self._away_since = time.monotonic()
        return anew
