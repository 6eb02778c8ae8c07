"""What the parameter server is sent, and must not care about: the faults are data, and the server
keeps serving.
"""

from __future__ import annotations

import logging
import random
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ports import own_port

from lightning_byz import ParameterServer, make_keys
from lightning_byz.compressors import Field
from lightning_byz.transports import RunIsOverError, ServerLostError
from lightning_byz.transports.parameter_server import server as server_module
from lightning_byz.transports.parameter_server.client import Client
from lightning_byz.transports.parameter_server.desk import RECONNECT, Call, Desk
from lightning_byz.transports.parameter_server.door import KEPT
from lightning_byz.transports.parameter_server.keys import load_key
from lightning_byz.transports.parameter_server.protocol import Head, Kind, fingerprint, parse
from lightning_byz.transports.parameter_server.server import Server

SESSION, LAYOUT, SIZE = b"s" * 16, 77, 64
GOOD = b"x" * SIZE


def token(rank: int) -> bytes:
    return bytes([rank]) * 16


def entered(
    position: int = 1, name: str = "round#1", need: int = 4, now: float = 0.0, **settings: Any
) -> Call:
    ranks = dict.fromkeys(range(4), 1)
    times = {"deadline": 1e9, "give_up": 1e9, **settings}
    return Call((position, name), LAYOUT, (SIZE, SIZE), ranks, need, 1, opened=now, **times)


def a_desk(**settings: Any) -> Desk:
    """Four ranks, all there; the server is at batch 1, in a collective that waits for all."""
    desk = Desk(4, SESSION, 0, 2)
    for rank in (1, 2, 3):
        desk.receive(
            b"route%d" % rank,
            [Head(Kind.HELLO, token=token(rank), rank=rank).pack(), b""],
            rank,
            0.0,
        )
    desk.begun = True
    desk.advance(1)
    desk.enter(entered(**settings), GOOD)
    desk.outbox.clear()
    return desk


def message(rank: int = 1, **changes: Any) -> list[bytes]:
    fields = {
        "session": SESSION,
        "token": token(rank),
        "rank": rank,
        "position": 1,
        "layout": LAYOUT,
        "name": "round#1",
        **changes,
    }
    return [Head(fields.pop("kind", Kind.CALL), **fields).pack(), GOOD]


class Fault(NamedTuple):
    """Something that rank 1 sends, and the reason by which it is counted; "" if it is no fault by
    itself.
    """

    name: str
    frames: list[bytes]
    reason: str
    owner: int = 1


FAULTS = [
    Fault("no_frame", [], "number of frames"),
    Fault("one_frame", message()[:1], "number of frames"),
    Fault("many_frames", [*message(), *[b""] * 1000], "number of frames"),
    Fault("empty_head", [b"", GOOD], "truncated head"),
    Fault("truncated_head", [message()[0][:30], GOOD], "truncated head"),
    Fault("another_protocol", [b"HTTP" + message()[0][4:], GOOD], "no head of this protocol"),
    Fault("longer_head", [message()[0] + b"x", GOOD], "length of the head"),
    Fault("oversized_head", [message()[0] + b"x" * 100_000, GOOD], "length of the head"),
    Fault(
        "unknown_kind",
        [message()[0][:4] + b"\xff" + message()[0][5:], GOOD],
        "unknown kind or name",
    ),
    Fault("a_name_of_bytes", [message()[0][:-1] + b"\xff", GOOD], "unknown kind or name"),
    Fault("the_servers_kind", message(kind=Kind.RESULT), "not for a server"),
    Fault("no_such_rank", message(rank=9), "no such rank", 9),
    Fault("the_servers_rank", message(rank=0), "no such rank", 0),
    Fault("another_ranks_name", message(rank=2), "rank of another key"),
    Fault("an_unknown_key", message(), "rank of another key", -1),
    Fault("another_session", message(session=b"t" * 16), "another session"),
    Fault("another_process", message(token=b"t" * 16), "another process of this rank"),
    Fault("taken_rank", [Head(Kind.HELLO, token=b"t" * 16, rank=1).pack(), b""], "rank is taken"),
    Fault(
        "talkative_hello",
        [Head(Kind.HELLO, token=token(1), rank=1).pack(), GOOD],
        "body of a hello",
    ),
    Fault("step_of_the_future", message(position=3), ""),
    Fault("step_of_the_far_future", message(position=2**64 - 1), ""),
    Fault("truncated", [message()[0], GOOD[:-1]], "size"),
    Fault("oversized", [message()[0], GOOD + b"x"], "size"),
    Fault("another_dtype_or_shape", message(layout=LAYOUT + 1), "layout"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_counted_and_nothing_else(fault: Fault) -> None:
    desk = a_desk()
    desk.receive(b"route1", fault.frames, fault.owner, 0.0)
    assert desk.rejected == ({fault.reason: 1} if fault.reason else {})
    call = desk.call
    assert call is not None and list(call.bodies) == [0]
    if fault.reason in ("size", "layout"):
        assert call.silent == {1}, "who speaks nonsense is not waited for"
    else:
        desk.receive(b"route1", message(), 1, 0.0)
        assert bytes(call.bodies[1]) == GOOD
    for rank in (2, 3):
        desk.receive(b"route%d" % rank, message(rank), rank, 0.0)
    assert desk.is_done(0.0)


@pytest.mark.parametrize("ahead", [1, 2, 50])
def test_a_worker_that_is_ahead_waits_for_the_server(ahead: int) -> None:
    """As far as batches without an exchange have brought it; meanwhile nobody waits for it."""
    desk = a_desk()
    desk.receive(b"route1", message(position=1 + ahead), 1, 0.0)
    assert desk.status() == "ahead: ranks 1; connected: ranks 2, 3"
    for rank in (2, 3):
        desk.receive(b"route%d" % rank, message(rank), rank, 0.0)
    assert desk.is_done(0.0)
    call = desk.close()
    assert set(call.bodies) == {0, 2, 3}
    assert call.why == {1: "was not heard (its process: ahead)"}
    for position in range(2, 2 + ahead):
        desk.advance(position)
    desk.enter(entered(1 + ahead), GOOD)
    assert desk.call is not None and bytes(desk.call.bodies[1]) == GOOD
    assert not desk.rejected and not desk.late


def test_whom_a_rank_is_refused_learns_that_the_run_is_over() -> None:
    """A process that was started again, and the server does not know yet that the one before it is
    dead.
    """
    desk = a_desk()
    hello = Head(Kind.HELLO, token=b"t" * 16, rank=1)
    desk.receive(b"again", [hello.pack(), b""], 1, 0.0)
    desk.outbox.clear()
    desk.shut("over")
    assert [(route, parse([head, body])[0].kind, body) for route, head, body in desk.outbox] == [
        (b"again", Kind.CLOSED, b"over")
    ]


def test_dtypes_and_shapes_have_other_fingerprints() -> None:
    layouts = [
        [Field((8,), torch.float32)], [Field((8,), torch.int32)], [Field((2, 4), torch.float32)], [Field((4,), torch.float64)],
        [Field((4,), torch.float32), Field((4,), torch.float32)], [Field((32,), torch.uint8)], [],
    ]  # fmt: skip
    assert len({fingerprint(layout) for layout in layouts}) == len(layouts)


def test_duplicates_replays_and_late_messages() -> None:
    desk = a_desk(need=3)
    other = [message()[0], b"y" * SIZE]
    desk.receive(b"route1", message(), 1, 0.0)
    desk.receive(b"route1", other, 1, 0.0)
    assert desk.rejected == {"duplicate": 1}
    desk.receive(b"route2", message(2), 2, 0.0)
    assert desk.is_done(0.0)
    call = desk.close()
    assert {rank: bytes(body) for rank, body in call.bodies.items()} == {0: GOOD, 1: GOOD, 2: GOOD}
    desk.receive(b"route3", message(3), 3, 0.0)  # closed, but its result is not there yet
    desk.publish(call.key, b"result")
    assert [(route, parse([head, body])[0].kind) for route, head, body in desk.outbox] == [
        (b"route%d" % rank, Kind.RESULT) for rank in (1, 2, 3)
    ]
    desk.outbox.clear()
    desk.receive(b"route1", other, 1, 0.0)  # a replay of a round that is over
    desk.receive(b"route3", message(3), 3, 0.0)
    assert (
        desk.late == {1: 1, 3: 1} and [bytes(body) for _, _, body in desk.outbox] == [b"result"] * 2
    )
    desk.advance(2)
    desk.advance(4)
    desk.outbox.clear()
    desk.receive(b"route1", other, 1, 0.0)
    assert parse(desk.outbox[0][1:])[0].kind is Kind.BEHIND
    desk.receive(b"route3", message(3, position=3, name="never"), 3, 0.0)
    assert parse(desk.outbox[1][1:])[0].kind is Kind.NEVER
    assert not desk.results


def test_who_is_waited_for() -> None:
    desk = a_desk(need=4, deadline=10.0, give_up=20.0)
    assert desk.call is not None
    desk.call.least = 2
    assert not desk.is_done(9.0) and not desk.is_done(11.0) and desk.is_done(20.0)
    desk.receive(b"route1", message(), 1, 0.0)
    assert not desk.is_done(9.0) and desk.is_done(10.0)
    desk.gone(b"route2", 0.0)
    assert not desk.is_done(0.0)
    # it waits elsewhere, so it will not come here
    desk.receive(b"route3", message(3, name="another"), 3, 0.0)
    assert desk.is_done(0.0)
    desk.receive(b"new route", message(2), 2, 0.0)  # its connection was made anew
    assert set(desk.call.bodies) == {0, 1, 2}

    desk = a_desk(deadline=10.0, give_up=20.0)
    assert desk.call is not None
    desk.call.least = 3
    for rank in (1, 2):
        desk.gone(b"route%d" % rank, 0.0)
    desk.receive(b"route3", message(3), 3, 0.0)
    assert not desk.is_done(9.0), "with too few it waits until the deadline for one to come back"
    assert desk.is_done(10.0)


def test_who_cannot_come_back_is_not_waited_for() -> None:
    """With too few in a collective: not who has left, nor who is lost for too long."""
    for ends in ("left", "lost", "dropped"):
        desk = a_desk(deadline=1000.0, give_up=2000.0)
        desk.return_within = 30.0
        assert desk.call is not None
        desk.call.least = 3
        for rank in (1, 2):
            if ends == "left":
                desk.receive(b"route%d" % rank, message(rank, kind=Kind.BYE), rank, 5.0)
            elif ends == "lost":
                desk.gone(b"route%d" % rank, 5.0)
            else:
                desk.drop(rank)
        assert not desk.is_done(6.0), "rank 3 may come"
        desk.receive(b"route3", message(3), 3, 6.0)
        assert desk.is_done(6.0) == (ends != "lost") and desk.is_done(36.0)


def test_all_connections_are_lost_at_once() -> None:
    """At the server's end: nobody is taken for dead before they had time to connect anew."""
    desk = a_desk(deadline=1000.0, give_up=2000.0)
    assert desk.call is not None
    desk.receive(b"route1", message(), 1, 0.0)
    desk.all_lost(10.0)
    assert not desk.is_done(11.0)
    desk.receive(b"new", message(2), 2, 12.0)
    assert (
        set(desk.call.bodies) == {0, 1, 2}
        and not desk.is_done(12.0)
        and desk.is_done(10.0 + RECONNECT)
    )


def test_the_log_says_where_a_worker_is() -> None:
    desk = a_desk()
    assert desk.status() == "connected: ranks 1, 2, 3"
    desk.gone(b"route1", 0.0)
    desk.receive(b"route2", message(2, layout=1), 2, 0.0)
    assert desk.call is not None
    assert desk.close().why == {
        1: "was not heard (its process: gone)",
        2: "sent a message that was refused (layout)",
        3: "was late",
    }
    desk.receive(b"route2", message(2, kind=Kind.BYE), 2, 0.0)
    desk.advance(2)
    desk.advance(3)
    assert desk.status() == "behind: ranks 3; gone: ranks 1; left: ranks 2"
    desk.drop(3)
    desk.receive(b"new", [Head(Kind.HELLO, token=b"n" * 16, rank=1).pack(), b""], 1, 0.0)
    assert desk.status() == "joining: ranks 1; left: ranks 2; refused: ranks 3"
    assert Desk(3, SESSION, 0, 2).status() == "not come yet: ranks 1, 2"


def test_a_worker_gets_a_snapshot_now_and_then_only() -> None:
    """Whatever it says, and from however many processes: making one keeps everybody waiting."""
    desk, given = a_desk(), []
    for position in range(2, 22):
        desk.advance(position)
        hello = Head(Kind.HELLO, token=bytes([position]) * 16, rank=1)
        desk.receive(b"route1", message(1, kind=Kind.BYE, token=desk.members[1].token), 1, 0.0)
        desk.receive(b"route1", [hello.pack(), b""], 1, 0.0)
        desk.receive(b"route1", message(1, kind=Kind.WANT, token=hello.token), 1, 0.0)
        if desk.wanting():
            desk.snapshot(desk.wanting(), b"checkpoint")
            given.append(position)
    assert given == list(range(2, 22, desk.backlog))


@pytest.mark.thorough(keep=3)
@pytest.mark.parametrize("seed", range(20))
def test_the_desk_stands_whatever_comes_in_whatever_state(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Mutated messages between all that the server does: no error, no wrong body, no growth."""
    caplog.set_level(logging.CRITICAL, logger="lightning_byz")
    generator, desk, now = random.Random(seed), a_desk(), 0.0
    desk.backlog = 3

    def server_does() -> None:
        what = generator.randrange(8)
        if what == 0 and desk.call is None:
            desk.advance(desk.position + 1)
        elif what == 1 and desk.call is None:
            name = generator.choice(["round#1", "gather#2", "barrier#1"])
            desk.enter(
                entered(
                    desk.position,
                    name,
                    need=generator.randrange(1, 5),
                    now=now,
                    deadline=now + 1,
                    give_up=now + 5,
                ),
                GOOD,
            )
        elif what in (2, 3) and desk.call is not None and desk.is_done(now):
            call = desk.close()
            assert all(bytes(body) == GOOD for body in call.bodies.values()) and set(
                call.bodies
            ) <= {0, 1, 2, 3}
            assert not set(call.why).intersection(call.bodies)
            desk.publish(call.key, b"result")
        elif what == 4:
            desk.gone(b"route%d" % generator.randrange(6), now)
        elif what == 5:
            ranks = desk.wanting()
            assert set(ranks) <= {1, 2, 3}
            desk.snapshot(ranks, b"checkpoint")
        elif what == 6 and generator.random() < 0.02:
            desk.all_lost(now)
        elif what == 7 and generator.random() < 0.001:
            desk.drop(generator.randrange(1, 4))

    for _ in range(5000):
        now += generator.random() / 100
        frames, owner = fuzzed(generator)
        if generator.random() < 0.7 and frames:  # in the present, so that most are of use
            changes = {
                "position": max(0, desk.position + generator.randrange(-4, 2)),
                "name": generator.choice(["round#1", "gather#2"]),
            }
            frames = [message(generator.randrange(1, 4), **changes)[0], *frames[1:]]
            owner = parse([frames[0], b""])[0].rank
        desk.receive(b"route%d" % generator.randrange(6), frames, owner, now)
        server_does()
        assert (
            len(desk.results) <= 3 * (desk.backlog + 1)
            and len(desk.outbox) < 20
            and isinstance(desk.status(), str)
        )
        assert desk.call is None or isinstance(desk.is_done(now), bool)
        for route, head, _ in desk.outbox:
            assert route.startswith(b"route") and parse([head, b""])[0].kind >= Kind.WELCOME
        desk.outbox.clear()
    assert desk.position > 20


def test_messages_before_the_server_is_there_are_kept() -> None:
    desk = a_desk()
    desk.close()
    desk.receive(b"route1", message(position=2), 1, 0.0)
    desk.receive(b"route2", message(2, position=2, layout=1), 2, 0.0)
    desk.advance(2)
    desk.enter(entered(position=2), b"")
    assert desk.call is not None and set(desk.call.bodies) == {1} and desk.call.silent == {0, 2}


def fuzzed(generator: random.Random) -> tuple[list[bytes], int]:
    """A message that is random, or a good one with something wrong, or a good one."""
    rank = generator.randrange(6)
    changes: dict[str, Any] = {}
    for name, values in {
        "kind": list(Kind), "session": [SESSION, bytes(16)], "token": [token(rank % 4), bytes(16)], "position": [0, 1, 2, 3, 2**63],
        "layout": [LAYOUT, 0], "name": ["round#1", "", "x" * 256, "gather#2"],
    }.items():  # fmt: skip
        if generator.random() < 0.2:
            changes[name] = generator.choice(values)
    frames = message(rank, **changes)
    how = generator.random()
    if how < 0.2:
        frames[0] = generator.randbytes(generator.randrange(200))
    elif how < 0.4:
        head = bytearray(frames[0])
        for _ in range(generator.randrange(1, 4)):
            head[generator.randrange(len(head))] = generator.randrange(256)
        frames[0] = bytes(head)
    elif how < 0.5:
        frames = frames[: generator.randrange(2)]
    elif how < 0.6:
        frames[1] = generator.randbytes(generator.choice([0, 1, SIZE - 1, SIZE + 1, 5000]))
    return frames, rank if generator.random() < 0.8 else generator.randrange(-1, 5)


@pytest.mark.thorough
def test_a_hundred_thousand_random_messages(caplog: pytest.LogCaptureFixture) -> None:
    """None is taken that is not as it should be, memory stays bounded, and each reason is logged
    once a second.
    """
    caplog.set_level(logging.WARNING, logger="lightning_byz")
    generator, desk, number = random.Random(0), a_desk(), 100_000
    taken = 0
    for i in range(number):
        frames, owner = fuzzed(generator)
        now = i / 10_000
        desk.receive(b"route%d" % generator.randrange(6), frames, owner, now)
        if i % 100 == 0:
            held = sum(
                len(member.waiting.body)
                for member in desk.members.values()
                if member.waiting is not None
            )
            assert held <= 3 * 5000 and len(desk.results) <= 4 and len(desk.rejected) < 20
            call = desk.close()
            assert all(bytes(body) == GOOD for body in call.bodies.values()) and set(
                call.bodies
            ) <= {0, 1, 2, 3}
            taken += len(call.bodies) - 1
            desk.publish(call.key, b"result")
            desk.enter(entered(now=now), GOOD)
            desk.results.clear()
        desk.outbox.clear()
    assert taken > 500 and sum(desk.rejected.values()) > number / 4
    logged = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(desk.rejected) <= len(logged) <= 11 * len(desk.rejected)


# -- real sockets ----------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Any]:
    """A server with three other ranks, and ``client(rank)``."""
    keys, port = make_keys(tmp_path / "keys", 4), own_port()
    desk = Desk(4, SESSION, 0, 2)
    publics = {rank: load_key(keys, f"rank{rank}", secret=False).public for rank in (1, 2, 3)}
    server = Server(
        desk, f"tcp://127.0.0.1:{port}", load_key(keys, "server", secret=True), publics, 1 << 20
    )

    class Served(NamedTuple):
        server: Server
        desk: Desk
        port: int
        keys: Path
        client: Callable[..., Client]

    def client(rank: int, mark: int | None = None, key: str | None = None) -> Client:
        pair = load_key(keys, key or f"rank{rank}", secret=True)
        public = load_key(keys, "server", secret=False).public
        return Client(
            f"tcp://127.0.0.1:{port}",
            rank,
            token(rank if mark is None else mark),
            pair,
            public,
            2.0,
        )

    yield Served(server, desk, port, keys, client)
    server.close("over", 0.1)


def serves(served: Any, client: Client) -> None:
    """Rank 1 and the server have a round together."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.call, served.desk.position, "round#1", LAYOUT, GOOD)
        call = entered(position=served.desk.position, need=2)
        call.asked = {0: 1, 1: 1}
        got = served.server.collect(call, GOOD)
        served.server.ask(lambda: served.desk.publish(call.key, b"result"))
        assert bytes(answer.result(10)) == b"result" and bytes(got.bodies[1]) == GOOD
    served.server.ask(lambda: served.desk.advance(served.desk.position + 1))


@pytest.mark.thorough
def test_random_messages_through_a_socket(served: Any) -> None:
    """As many at a time as nobody is dropped for; a hello is answered when they have been read."""
    honest, liar = served.client(1), served.client(2)
    assert not honest.join(0, 10.0) and not liar.join(0, 10.0)
    generator = random.Random(1)
    hello = [Head(Kind.HELLO, token=token(2), rank=2).pack(), b""]
    for i in range(1000):
        for _ in range(KEPT - 1):
            frames, _ = fuzzed(generator)
            liar._socket.send_multipart(frames or [b""])
        liar._socket.send_multipart(hello)
        while parse(liar._socket.recv_multipart())[0].kind not in (Kind.WELCOME, Kind.BEGUN):
            pass
        if i % 300 == 0:
            serves(served, honest)
    assert sum(served.desk.rejected.values()) > 1000 and not served.desk.members[2].dropped
    serves(served, honest)
    honest.leave()
    liar.close()


def test_a_wrong_key_and_a_key_of_another_rank(served: Any, tmp_path: Path) -> None:
    stranger = make_keys(tmp_path / "other", 4)
    unknown = Client(
        f"tcp://127.0.0.1:{served.port}", 1, token(1), load_key(stranger, "rank1", secret=True),
        load_key(served.keys, "server", secret=False).public, 2.0,
    )  # fmt: skip
    with pytest.raises(ServerLostError, match=r"does not know the key of rank 1.*rank1\.key"):
        unknown.join(0, 10.0)
    unknown.close()
    fooled = Client(
        f"tcp://127.0.0.1:{served.port}", 1, token(1), load_key(served.keys, "rank1", secret=True),
        load_key(stranger, "server", secret=False).public, 1.0,
    )  # fmt: skip
    with pytest.raises(ServerLostError):
        fooled.join(0, 1.0)
    fooled.close()
    assert not served.desk.members[1].token and not served.desk.rejected
    thief = served.client(2, key="rank1")  # rank 1's key, and rank 2's name
    with pytest.raises(ServerLostError):
        thief.join(0, 1.5)
    thief.close()
    assert not served.desk.members[2].token and served.desk.rejected["rank of another key"] >= 1
    honest = served.client(1)
    honest.join(0, 10.0)
    serves(served, honest)
    honest.leave()


def test_two_processes_of_one_rank(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is told, and the first goes on; once it is dead, the second may have its place."""
    first, second = served.client(1), served.client(1, mark=9)
    first.join(0, 10.0)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_byz.transports.parameter_server.client.DEAD_AFTER", 0.2)
        with pytest.raises(ServerLostError, match="Found another one that serves as rank 1"):
            second.join(0, 10.0)
    second.close()
    serves(served, first)
    first.close()
    third = served.client(1, mark=9)
    third.join(0, 10.0)
    serves(served, third)
    third.leave()


def test_slow_lorises_and_a_thousand_connections(served: Any) -> None:
    """They send nothing, or a byte now and then, and are dropped; the server serves meanwhile."""
    number = 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    honest = served.client(1)
    honest.join(0, 10.0)
    connections = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(number)]
    for i, connection in enumerate(connections):
        if i % 2:
            connection.send(b"\xff\x00\x00")
    serves(served, honest)
    for connection in connections[: number // 2]:
        connection.close()
    serves(served, honest)
    assert set(served.desk.members) == {1, 2, 3} and not served.desk.rejected
    for connection in connections:
        connection.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    honest.leave()


def test_a_message_that_is_too_large_cuts_its_sender_off(served: Any) -> None:
    honest, large = served.client(1), served.client(2)
    honest.join(0, 10.0)
    large.join(0, 10.0)
    large._socket.send_multipart([message(2)[0], bytes(2 << 20)])
    while served.desk.members[2].route is not None:
        time.sleep(0.01)
    serves(served, honest)
    honest.leave()
    large.close()


def test_a_port_in_use(tmp_path: Path) -> None:
    keys = make_keys(tmp_path, 2)
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"listen at tcp://\\*:{port}.*in use.*MASTER_PORT"):
            ParameterServer(keys=keys).open(0, 2, "127.0.0.1", port, 0)
    assert threading.active_count() < 20


def test_a_run_that_is_over(served: Any) -> None:
    """Who comes too late for one entry point of the program goes on to the next."""
    late = served.client(1)
    with ThreadPoolExecutor(1) as pool:
        served.server.ask(lambda: setattr(served.desk, "begun", True))
        assert late.join(0, 10.0)
        waits = pool.submit(late.want)
        while not served.server.ask(served.desk.wanting):
            time.sleep(0.01)
        served.server.ask(lambda: served.desk.shut("over"))
        with pytest.raises(RunIsOverError):
            waits.result(10)
    late.close()


def test_settings(tmp_path: Path) -> None:
    for settings in (
        {"deadline": 0},
        {"first_k": 0},
        {"backlog": True},
        {"lost_after": float("inf")},
        {"max_message_bytes": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ParameterServer(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Use Trainer\\(devices=n\\)"):
        ParameterServer().connect(0, 1, 4, torch.device("cpu"))
    with pytest.raises(ValueError, match="`first_k` should be at most n=4"):
        ParameterServer(first_k=5).connect(0, 4, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"`keys`.*make_keys"):
        ParameterServer().open(1, 2, "127.0.0.1", 1, 0)
    keys = make_keys(tmp_path / "keys", 3)
    assert sorted(path.name for path in keys.iterdir()) == sorted(
        f"{name}.key{end}" for name in ("server", "rank1", "rank2") for end in ("", "_secret")
    )
    assert not any(path.stat().st_mode & 0o077 for path in keys.iterdir())
    with pytest.raises(FileExistsError, match="should hold no keys yet"):
        make_keys(keys, 3)
    with pytest.raises(FileNotFoundError, match="rank3.key_secret"):
        ParameterServer(keys=keys).open(3, 4, "127.0.0.1", 1, 0)
    assert server_module.HEARTBEAT < server_module.DEAD_AFTER
