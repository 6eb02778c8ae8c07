"""The process that holds a parameter server's connections: floods, strangers, and its own end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from ports import own_port

from lightning_byz import make_keys
from lightning_byz.transports import ServerLostError
from lightning_byz.transports.parameter_server import door as door_module
from lightning_byz.transports.parameter_server.client import Client
from lightning_byz.transports.parameter_server.desk import Call, Desk
from lightning_byz.transports.parameter_server.door import Link, Word
from lightning_byz.transports.parameter_server.keys import load_key
from lightning_byz.transports.parameter_server.protocol import Head, Kind, parse
from lightning_byz.transports.parameter_server.server import Server

pytestmark = pytest.mark.processes
_FORK = multiprocessing.get_context("fork")
RANKS = 4


class Served(NamedTuple):
    server: Server
    desk: Desk
    port: int
    keys: Path

    @property
    def door(self) -> int:
        assert self.server._door is not None
        return self.server._door.pid

    def client(self, rank: int) -> Client:
        pair, public = (
            load_key(self.keys, f"rank{rank}", secret=True),
            load_key(self.keys, "server", secret=False).public,
        )
        client = Client(
            f"tcp://127.0.0.1:{self.port}", rank, bytes([rank]) * 16, pair, public, 20.0
        )
        client.join(0, 20.0)
        return client

    def serves(self, client: Client) -> None:
        """This rank and the server have a round together."""
        position = self.desk.position
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.call, position, "round#1", 7, b"x" * 64)
            asked = {0: 1, client.rank: 1}
            call = Call(
                (position, "round#1"), 7, (64, 64), asked, 2, 1, 1e12, 1e12, time.monotonic()
            )
            got = self.server.collect(call, b"x" * 64)
            self.server.ask(lambda: self.desk.publish(call.key, b"result"))
            assert bytes(answer.result(20)) == b"result" and set(got.bodies) == {0, client.rank}
        self.server.ask(lambda: self.desk.advance(position + 1))


def until(here: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not here():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    keys, port = make_keys(tmp_path / "keys", RANKS), own_port()
    desk = Desk(RANKS, b"s" * 16, 0, 4)
    publics = {rank: load_key(keys, f"rank{rank}", secret=False).public for rank in range(1, RANKS)}
    server = Server(
        desk, f"tcp://127.0.0.1:{port}", load_key(keys, "server", secret=True), publics, 1 << 20
    )
    yield Served(server, desk, port, keys)
    server.close("over", 0.1)


def memory(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


REFUSED, UNHEARD = 3, 4


def _flood(keys: Path, port: int, rank: int, seconds: float) -> None:
    """A worker that asks again and again, never reads, and then closes; or is `REFUSED`."""
    one = zmq.Context().socket(zmq.DEALER)
    pair = load_key(keys, f"rank{rank}", secret=True)
    one.curve_publickey, one.curve_secretkey = pair.public, pair.secret
    one.curve_serverkey = load_key(keys, "server", secret=False).public
    for option, value in (
        (zmq.RCVHWM, 1), (zmq.SNDHWM, 0), (zmq.LINGER, 0), (zmq.RCVBUF, 4096),
        (zmq.HEARTBEAT_IVL, 200), (zmq.HEARTBEAT_TIMEOUT, 60_000),
    ):  # fmt: skip
        one.setsockopt(option, value)
    failures = one.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    one.connect(f"tcp://127.0.0.1:{port}")
    token, poller = bytes([rank]) * 16, zmq.Poller()
    one.send_multipart([Head(Kind.HELLO, token=token, rank=rank).pack(), b""])
    poller.register(one, zmq.POLLIN)
    poller.register(failures, zmq.POLLIN)
    ready = dict(poller.poll(20_000))
    if one not in ready:
        os._exit(REFUSED if failures in ready else UNHEARD)
    session = parse(one.recv_multipart())[0].session
    head, sent, end = (
        Head(Kind.CALL, session, token, rank, 0, 0, "model#1").pack(),
        0,
        time.monotonic() + seconds,
    )
    while sent < 20_000 or time.monotonic() < end:
        for _ in range(100):
            one.send_multipart([head, b""], zmq.NOBLOCK)
            sent += 1
        time.sleep(0.001)
    one.close()
    os._exit(0)


def flooded(served: Served, rank: int, seconds: float) -> Any:
    flood = _FORK.Process(target=_flood, args=(served.keys, served.port, rank, seconds))
    flood.start()
    return flood


def test_five_floods_end_nothing_and_keep_nobody_waiting(served: Served) -> None:
    """The flooder is dropped and refused; memory stays bounded; others are answered meanwhile."""
    served.server.ask(lambda: served.desk.publish((0, "model#1"), bytes(200_000)))
    honest = served.client(1)
    before = memory(served.door), memory(os.getpid())
    said = []
    for rank in (2, 2, 3, 3, 2):
        flood = flooded(served, rank, 2.0)
        while flood.is_alive():
            began = time.monotonic()
            served.serves(honest)
            assert time.monotonic() - began < 20.0
        said.append(flood.exitcode)
        assert memory(served.door) < before[0] + (200 << 20) and memory(os.getpid()) < before[1] + (
            200 << 20
        )
    assert said == [0, REFUSED, 0, REFUSED, REFUSED]
    assert all(served.desk.whereabouts(rank) == "refused" for rank in (2, 3))
    assert not any(served.desk.members[rank].active for rank in (2, 3)), (
        "nobody waits for a dropped rank"
    )
    served.serves(honest)
    honest.leave()


def test_who_does_not_read_a_large_answer_again_and_again_costs_no_memory(served: Served) -> None:
    served.server.ask(lambda: served.desk.publish((0, "model#1"), os.urandom(8 << 20)))
    before = memory(served.door)
    flooded(served, 2, 4.0).join()
    until(lambda: served.desk.members[2].dropped)
    assert memory(served.door) < before + (300 << 20)
    honest = served.client(1)
    served.serves(honest)
    honest.leave()


def test_a_door_that_ends_is_opened_again(served: Served) -> None:
    """In a round, and between rounds: the workers ask again, and nobody is taken for dead."""
    clients = [served.client(rank) for rank in (1, 2)]
    for client in clients:
        served.serves(client)
    with ThreadPoolExecutor(2) as pool:
        position = served.desk.position
        call = Call(
            (position, "round#1"),
            7,
            (64, 64),
            dict.fromkeys(range(3), 1),
            3,
            1,
            1e12,
            1e12,
            time.monotonic(),
        )
        closed = pool.submit(served.server.collect, call, b"x" * 64)
        until(lambda: served.desk.call is call)
        first = served.door
        os.kill(first, signal.SIGKILL)
        until(lambda: served.server._door is None or served.door != first)
        answers = [
            ThreadPoolExecutor(1).submit(client.call, position, "round#1", 7, b"x" * 64)
            for client in clients
        ]
        assert set(closed.result(30).bodies) == {0, 1, 2}
        served.server.ask(lambda: served.desk.publish(call.key, b"result"))
        assert [bytes(answer.result(30)) for answer in answers] == [b"result"] * 2
    served.server.ask(lambda: served.desk.advance(position + 1))
    os.kill(served.door, signal.SIGKILL)
    for client in clients:
        served.serves(client)
        client.leave()


def test_who_was_dropped_stays_so_when_the_door_is_opened_again(served: Served) -> None:
    flooded(served, 2, 2.0).join()
    until(lambda: served.desk.members[2].dropped)
    first = served.door
    os.kill(first, signal.SIGKILL)
    until(lambda: served.server._door is not None and served.door != first)
    honest = served.client(1)
    served.serves(honest)
    again = flooded(served, 2, 1.0)
    again.join()
    assert again.exitcode == REFUSED
    honest.leave()


def test_strangers_take_no_descriptor_of_the_training_and_keep_nobody_out(served: Served) -> None:
    """Hundreds that never shake hands: few are kept, and a worker that comes then is let in."""
    before = len(os.listdir("/proc/self/fd"))
    strangers = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(600)]
    until(lambda: _is_closed(strangers[0]), 4.0)  # all of them end after 5 s
    assert len(os.listdir("/proc/self/fd")) - len(strangers) <= before
    honest = served.client(1)
    served.serves(honest)
    assert len(os.listdir(f"/proc/{served.door}/fd")) < door_module.STRANGERS + 50
    for stranger in strangers:
        stranger.close()
    served.serves(honest)
    honest.leave()


def _is_closed(connection: socket.socket) -> bool:
    """Whether the other end has hung up: it has sent its greeting before."""
    connection.setblocking(False)
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    return True


def _training(folder: Path, port: int) -> None:
    keys = make_keys(folder / "keys", 2)
    public = load_key(keys, "rank1", secret=False).public
    server = Server(
        Desk(2, b"s" * 16, 0, 4),
        f"tcp://127.0.0.1:{port}",
        load_key(keys, "server", secret=True),
        {1: public},
        1 << 20,
    )
    child = os.fork()
    if child == 0:  # a data loader's worker, which has all that is open here
        time.sleep(600)
    assert server._door is not None
    (folder / "new").write_text(f"{server._door.pid} {child}")
    (folder / "new").rename(folder / "processes")
    time.sleep(600)


def test_the_door_ends_with_the_training(tmp_path: Path) -> None:
    """However that ends: nobody keeps workers waiting at a server that is no more."""
    training = _FORK.Process(target=_training, args=(tmp_path, own_port()))
    training.start()
    until((tmp_path / "processes").exists)
    door, child = map(int, (tmp_path / "processes").read_text().split())
    try:
        assert not _has_ended(door)
        training.kill()
        training.join()
        until(lambda: _has_ended(door))
    finally:
        os.kill(child, signal.SIGKILL)


def _has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_door_is_small() -> None:
    """It starts at once, and holds no torch: the script imports ZeroMQ and the standard library."""
    code = (
        f"import runpy, sys; runpy.run_path({door_module.__file__!r}); "
        "print('torch' in sys.modules, 'lightning_byz' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_wrong_server_key_is_named(
    served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the worker, as the likely cause; in the server's log, as a refused handshake."""
    stranger = make_keys(tmp_path / "other", 2)
    public = load_key(stranger, "server", secret=False).public
    fooled = Client(
        f"tcp://127.0.0.1:{served.port}",
        1,
        b"t" * 16,
        load_key(served.keys, "rank1", secret=True),
        public,
        3.0,
    )
    with pytest.raises(
        ServerLostError,
        match=r"ended the handshake \d+ times. The likely cause is the key: `server.key`",
    ):
        fooled.join(0, 3.0)
    fooled.close()
    until(
        lambda: any(
            "does not have this server's server.key" in record.getMessage()
            for record in caplog.records
        )
    )
    unknown = Client(
        f"tcp://127.0.0.1:{served.port}", 1, b"t" * 16, load_key(stranger, "rank1", secret=True),
        load_key(served.keys, "server", secret=False).public, 3.0,
    )  # fmt: skip
    with pytest.raises(ServerLostError, match="does not know the key of rank 1"):
        unknown.join(0, 10.0)
    unknown.close()
    until(
        lambda: any("refused: an unknown key" in record.getMessage() for record in caplog.records)
    )


PARCELS = st.lists(
    st.tuples(
        st.sampled_from(list(Word)),
        st.integers(-(2**40), 2**40),
        st.lists(st.binary(max_size=40), max_size=4),
    ),
    max_size=20,
)


@settings(deadline=None, max_examples=50)
@given(PARCELS, st.integers(0, 3))
def test_a_link_gives_what_was_put_in(parcels: list[Any], large: int) -> None:
    """In order, whatever fits into the socket, and the same frame as often as it was sent."""
    one, other = (Link(end) for end in socket.socketpair())
    shared = os.urandom(700_000)
    expected = [
        (word, number, [*frames[:3], shared] if i % 4 < large else frames)
        for i, (word, number, frames) in enumerate(parcels)
    ]
    got = []
    for word, number, frames in expected:
        one.put(word, number, frames)
    while len(got) < len(expected):
        one.flush()
        parcel = other.get()
        if parcel is not None:
            got.append((parcel.word, parcel.number, [bytes(frame) for frame in parcel.frames]))
    assert got == expected and not one.backlog
    one.close()
    with pytest.raises(ConnectionError):
        other.get()
    other.close()


def test_the_server_answers_a_flood_of_hellos_of_many_processes(served: Served) -> None:
    """Each from a connection of its own with the same key: no route is kept for ever."""
    pair, public = (
        load_key(served.keys, "rank2", secret=True),
        load_key(served.keys, "server", secret=False).public,
    )
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    for i in range(50):
        one = context.socket(zmq.DEALER)
        one.curve_publickey, one.curve_secretkey, one.curve_serverkey = (
            pair.public,
            pair.secret,
            public,
        )
        one.connect(f"tcp://127.0.0.1:{served.port}")
        one.send_multipart([Head(Kind.HELLO, token=i.to_bytes(16, "little"), rank=2).pack(), b""])
        assert one.poll(20_000) and parse(one.recv_multipart())[0].kind in (
            Kind.WELCOME,
            Kind.REFUSED,
        )
        one.close(0)
    context.destroy(0)
    honest = served.client(1)
    served.serves(honest)
    honest.leave()
