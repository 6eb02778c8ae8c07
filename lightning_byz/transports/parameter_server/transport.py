"""ParameterServer: rank 0 gathers and aggregates, the others send and are told."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_byz.compressors import Compressor, Field
from lightning_byz.optional_dependencies import require
from lightning_byz.transports.base import Transport
from lightning_byz.transports.messages import Awaited, Message, Verdict
from lightning_byz.transports.parameter_server.protocol import fingerprint
from lightning_byz.transports.wire import pack, packed_size, unpack
from lightning_byz.types import Payload, Round

log = logging.getLogger("lightning_byz")

KEYS_VARIABLE = "LIGHTNING_BYZ_KEYS"
"""Where the launcher tells the processes that it starts on this machine which keys it made for
them.
"""

_REASON = 500


class ParameterServer(Transport):
    """A server at rank 0 gathers the messages, runs the server's half, and sends the result; it
    goes on without workers that die.

    A round closes when ``first_k`` messages have arrived, or those of all workers that are alive;
    at the latest ``deadline`` seconds after the server entered it, if the rule's minimum is there.
    Messages that come later are dropped and counted. A worker that is behind is told the results
    that it missed and applies them without computing. If they are gone it gets a snapshot, and so
    does a worker that is started again. A worker moves two payloads a round, the server n times as
    many.

    Who must be honest: the server's process. Workers may send anything, or nothing: messages are
    raw bytes whose size, shapes, dtypes and place in the run are checked, connections are encrypted
    and authenticated by CURVE keys, and each key is one rank's.

    Args:
        first_k: how many workers' messages close a round; None waits for all that are alive. An
            algorithm that waits for the first k (`DStar`) brings its own.
        deadline: seconds until a round closes without those that are alive but late.
        full_deadline: the same for rounds with gradients over all of the workers' data.
        start_timeout: seconds that the server waits for all ranks at the start, and a worker for
            the server.
        lost_after: seconds without a connection after which a worker takes the server for dead, and
            stops.
        backlog: for how many rounds the server keeps the results, for workers that are behind. A
            round begins with the first batch after an exchange.
        keys: directory of the keys (see `make_keys`); None makes keys for this run, where one
            command starts all ranks on one machine.
        max_message_bytes: the largest message that the server reads. None: four times the model's
            size, at least 64 MiB.
    """

    measured = True
    connects_processes = True

    def __init__(
        self,
        first_k: int | None = None,
        deadline: float = 30.0,
        full_deadline: float = 600.0,
        start_timeout: float = 300.0,
        lost_after: float = 30.0,
        backlog: int = 16,
        keys: str | Path | None = None,
        max_message_bytes: int | None = None,
    ) -> None:
        require("ParameterServer", "server", "zmq")
        for name, value in (
            ("deadline", deadline),
            ("full_deadline", full_deadline),
            ("start_timeout", start_timeout),
            ("lost_after", lost_after),
        ):
            if not 0 < value < float("inf"):
                raise ValueError(
                    f"`{name}` should be a positive number of seconds. Found {name}={value}."
                )
        for name, number in (
            ("first_k", first_k),
            ("backlog", backlog),
            ("max_message_bytes", max_message_bytes),
        ):
            if number is not None and (
                isinstance(number, bool) or not isinstance(number, int) or number < 1
            ):
                raise ValueError(
                    f"`{name}` should be an integer of at least 1. Found {name}={number!r}."
                )
        self.first_k, self.deadline, self.full_deadline = first_k, deadline, full_deadline
        self.start_timeout, self.lost_after, self.backlog = start_timeout, lost_after, backlog
        self.keys = None if keys is None else Path(keys)
        self.max_message_bytes = max_message_bytes
        self.position = 0
        self._entry = -1
        self._token = os.urandom(16)
        self._server: Any = None
        self._client: Any = None
        self._catching_up = False
        self._lost: set[int] = set()
        self._calls: dict[str, int] = {}
        self._awaited = Awaited(0, 1, False)
        self._arrivals: Tensor | None = None
        self._why_silent: dict[int, str] = {}

    # -- opening and closing the line --------------------------------------------------------------

    def make_own_keys(self, ranks: int) -> Path | None:
        """Keys for the processes that this one is about to start, and where they lie; None if a
        directory was given.
        """
        from lightning_byz.transports.parameter_server.keys import make_keys

        if self.keys is not None or KEYS_VARIABLE in os.environ:
            return None
        made = make_keys(tempfile.mkdtemp(prefix="lightning_byz_keys_"), ranks)
        os.environ[KEYS_VARIABLE] = str(made)
        return made

    def open(
        self, rank: int, world_size: int, host: str, port: int, model_bytes: int
    ) -> bytes | None:
        """Listens, at rank 0; elsewhere signs in. For one entry point of the program: fit, test,
        ...

        Args:
            rank: this process.
            world_size: number of processes.
            host: of rank 0.
            port: of rank 0.
            model_bytes: size of the model's parameters and buffers.

        Returns:
            a snapshot to start from, if the run has begun without this process.

        Raises:
            ServerLostError: if there is no server.
            RunIsOverError: if this entry point of the program has ended.
            RuntimeError: if the port is in use.
        """
        from lightning_byz.transports.parameter_server.client import Client
        from lightning_byz.transports.parameter_server.keys import SERVER, load_key

        self.rank, self.world_size = rank, world_size
        self._entry, self.position, self._calls, self._awaited = (
            self._entry + 1,
            0,
            {},
            Awaited(0, 1, False),
        )
        self._limit = self.max_message_bytes or max(64 * 2**20, 4 * model_bytes)
        directory = self.keys or Path(os.environ.get(KEYS_VARIABLE, ""))
        if not self.keys and KEYS_VARIABLE not in os.environ:
            raise ValueError(
                "`keys` of ParameterServer should be a directory of keys, where processes are not "
                "all started by one command on one machine. Found None. Make some with "
                "`lightning_byz.make_keys(directory, ranks)`, once, and copy them to the hosts."
            )
        if rank == 0:
            self._listen(directory, port)
            return None
        own = load_key(directory, f"rank{rank}", secret=True)
        server_key = load_key(directory, SERVER, secret=False).public
        self._client = Client(
            f"tcp://{host}:{port}", rank, self._token, own, server_key, self.lost_after
        )
        try:
            if self._client.join(self._entry, self.start_timeout):
                return self.rejoin()
        except BaseException:
            self._client.close()
            self._client = None
            raise
        self._catching_up = False
        return None

    def _listen(self, directory: Path, port: int) -> None:
        from lightning_byz.transports.parameter_server.desk import Desk
        from lightning_byz.transports.parameter_server.keys import SERVER, load_key
        from lightning_byz.transports.parameter_server.server import Server

        # keys that were made for this run are gone with a process: nobody can start it again
        return_within = float("inf") if self.keys is not None else self.lost_after
        desk = Desk(self.world_size, os.urandom(16), self._entry, self.backlog, return_within)
        workers = {
            rank: load_key(directory, f"rank{rank}", secret=False).public
            for rank in range(1, self.world_size)
        }
        self._server = Server(
            desk, f"tcp://*:{port}", load_key(directory, SERVER, secret=True), workers, self._limit
        )

    def rejoin(self) -> bytes:
        """A snapshot, once the server makes one. Until the first batch after it this process takes
        part in nothing.
        """
        self._catching_up = True
        return bytes(self._client.want())

    def wait_for_all(self) -> list[int]:
        """Rank 0 waits for the ranks to sign in, for a while: those that did not die before (in
        fit, when this is test). Who is missing.
        """
        if self._server is None:
            return []
        desk, deadline = self._server.desk, time.monotonic() + self.start_timeout
        told: list[int] = []
        while True:
            missing: list[int] = self._server.ask(
                lambda: [rank for rank, member in desk.members.items() if not member.token]
            )
            if self._lost.issuperset(missing) or time.monotonic() > deadline:
                break
            if missing != told:
                told = missing
                log.info(
                    f"ParameterServer at {self._server.address} waits for ranks {missing}, for "
                    f"{self.start_timeout:.0f} s at most."
                )
            time.sleep(0.01)

        def begin() -> None:
            desk.begun = True

        self._server.ask(begin)
        return missing

    def shut(self, reason: str = "over") -> None:
        """Leaves; at rank 0, once all others have left."""
        if self._server is not None:
            self._server.close(reason, self.lost_after)
            desk = self._server.desk
            if desk.late or desk.rejected:
                log.info(
                    f"ParameterServer: late messages by rank {dict(desk.late)}, refused ones by "
                    f"reason {dict(desk.rejected)}."
                )
            self._lost = {rank for rank, member in desk.members.items() if not member.left}
            self._server = None
        if self._client is not None:
            self._client.leave() if reason == "over" else self._client.close()
            self._client = None

    @property
    def is_open(self) -> bool:
        """Whether there is a line to the others."""
        return self._server is not None or self._client is not None

    @property
    def catching_up(self) -> bool:
        """Whether this process has a snapshot, and has not yet come to the batch where it was
        made.
        """
        return self._catching_up

    @property
    def behind(self) -> bool:
        """Whether the server is known to be at a later position, so that this round is closed."""
        return self._client is not None and self._client.latest > self.position

    # -- where the run is --------------------------------------------------------------------------

    def at(self, position: int) -> None:
        """This process has come to a batch in which a round begins, the position-th of these."""
        self.position, self._calls, self._catching_up = position, {}, False
        if self._server is not None:
            self._server.ask(lambda: self._server.desk.advance(position))

    def wanting(self) -> list[int]:
        """The ranks that wait for a snapshot; at rank 0."""
        return [] if self._server is None else self._server.ask(self._server.desk.wanting)

    def send_snapshot(self, ranks: Sequence[int], checkpoint: bytes) -> None:
        """A snapshot, made at the beginning of a batch, for these ranks."""
        self._server.ask(lambda: self._server.desk.snapshot(ranks, checkpoint))

    def awaits(self, awaited: Awaited) -> None:
        if self.first_k is not None and self.first_k < awaited.least:
            raise ValueError(
                f"`first_k` should be at least {awaited.least}, the fewest messages that the rule "
                f"can do with. Found first_k={self.first_k}."
            )
        self._awaited = (
            awaited
            if self.first_k is None
            else awaited._replace(spare=max(awaited.spare, self.n - self.first_k))
        )

    # -- collectives -------------------------------------------------------------------------------

    def _key(self, name: str) -> tuple[int, str]:
        self._calls[name] = self._calls.get(name, 0) + 1
        return self.position, f"{name[:200]}#{self._calls[name]}"

    def _collect(
        self,
        key: tuple[int, str],
        layout: int,
        sizes: tuple[int, int],
        own: bytes,
        awaited: Awaited,
        asked: dict[int, int] | None = None,
    ) -> Any:
        from lightning_byz.transports.parameter_server.desk import Call

        now = time.monotonic()
        asked = (
            dict.fromkeys(range(self.world_size), self.workers_per_process)
            if asked is None
            else asked
        )
        least = min(awaited.least, sum(asked.values()))
        need = max(least, sum(asked.values()) - awaited.spare)
        deadline = now + (self.full_deadline if awaited.full else self.deadline)
        call = Call(
            key,
            layout,
            sizes,
            asked,
            need,
            least,
            deadline,
            max(deadline, now + self.start_timeout),
            now,
        )
        return self._server.collect(call, own)

    def _publish(self, key: tuple[int, str], result: bytes) -> None:
        self._server.ask(lambda: self._server.desk.publish(key, result))

    @property
    def largest_message(self) -> int:
        """Bytes of the largest message that the server reads."""
        return self._limit

    def from_everybody(
        self,
        name: str,
        body: bytes,
        most: int,
        awaited: Awaited | None = None,
        layout: int = 0,
        tell: bool = True,
    ) -> dict[int, bytes]:
        """Bytes from every rank that is heard, for all of them.

        Args:
            name: of the collective.
            body: this rank's bytes; empty if it has none.
            most: the largest number of bytes that a rank may send; with a ``layout``, the only one.
            awaited: when to close; None waits for all that are alive.
            layout: fingerprint of the body's layout.
            tell: whether the others are told, and not the server alone.
        """
        key = self._key(name)
        self._check_size(len(body))
        if self._server is not None:
            sizes = (most, most) if layout else (1, most)
            call = self._collect(key, layout, sizes, body, awaited or Awaited(0, 1, False))
            result = b"".join(
                rank.to_bytes(4, "little")
                + len(call.bodies[rank]).to_bytes(8, "little")
                + bytes(call.bodies[rank])
                for rank in sorted(call.bodies)
            )
            self._publish(key, result if tell else b"")
            return {rank: bytes(call.bodies[rank]) for rank in sorted(call.bodies)}
        result = self._client.call(*key, layout, body)
        if result is None:
            return {self.rank: body}
        heard, position = {}, 0
        while position < len(result):
            rank, size = (
                int.from_bytes(result[position : position + 4], "little"),
                int.from_bytes(result[position + 4 : position + 12], "little"),
            )
            heard[rank] = bytes(result[position + 12 : position + 12 + size])
            position += 12 + size
        return heard or {self.rank: body}

    def from_server(self, name: str, body: bytes) -> bytes:
        """The server's bytes, for everybody; if it has passed without giving any, this rank's
        own.
        """
        key = self._key(name)
        if self._server is not None:
            self._publish(key, body)
            return body
        result = self._client.call(*key, 0, b"")
        return body if result is None else bytes(result)

    def _check_size(self, size: int) -> None:
        if size > self._limit:
            raise ValueError(
                f"`max_message_bytes` of ParameterServer should be at least {size}, the size of a "
                f"message. Found {self._limit}."
            )

    # -- the round ---------------------------------------------------------------------------------

    def connect(
        self, rank: int, world_size: int, workers_per_process: int, device: torch.device
    ) -> None:
        if world_size == 1:
            raise ValueError(
                "ParameterServer connects several processes. Found one. Use Trainer(devices=n), "
                "or leave `transport` out to hold all workers in this process."
            )
        super().connect(rank, world_size, workers_per_process, device)
        if self.first_k is not None and self.first_k > self.n:
            raise ValueError(
                f"`first_k` should be at most n={self.n}, the number of workers. Found "
                f"first_k={self.first_k}."
            )
        self._device = device

    @property
    def serves(self) -> bool:
        return self.rank == 0

    def _packed(self, messages: Sequence[Sequence[Tensor]], layout: Sequence[Field]) -> bytes:
        size = packed_size(layout)
        out = torch.zeros(len(messages) * size, dtype=torch.uint8)
        for message, piece in zip(messages, out.view(len(messages), size), strict=True):
            pack([tensor.cpu() for tensor in message], layout, piece)
        return out.numpy().tobytes()

    def _unpacked(
        self, body: bytes | memoryview, layout: Sequence[Field]
    ) -> list[tuple[Tensor, ...]]:
        buffer = torch.frombuffer(bytearray(body), dtype=torch.uint8).to(self._device)
        return [unpack(piece, layout) for piece in buffer.view(-1, packed_size(layout))]

    def gather(
        self, messages: Sequence[Sequence[Tensor]], layout: Sequence[Field]
    ) -> list[tuple[Tensor, ...] | None]:
        everybody: list[tuple[Tensor, ...] | None] = [None] * self.n
        if self._catching_up:
            bodies = {self.rank: self._packed(messages, layout)}
        else:
            size = self.workers_per_process * packed_size(layout)
            own = b"" if self.behind else self._packed(messages, layout)
            bodies = self.from_everybody("gather", own, size, self._awaited, fingerprint(layout))
        for rank, body in bodies.items():
            fits = len(body) == self.workers_per_process * packed_size(layout)
            for i, message in enumerate(self._unpacked(body, layout) if fits else []):
                everybody[rank * self.workers_per_process + i] = message
        return everybody

    def everybody(
        self,
        messages: Sequence[Message],
        codec: Compressor,
        dim: int,
        dtype: torch.dtype,
        round: Round,
    ) -> list[Message]:
        """The messages of all n workers, at the server; those of workers that were not heard are
        silent.
        """
        layout = self._layout(messages[0], codec, dim, dtype)
        assert round.cohort is not None
        counts = round.cohort.view(self.world_size, -1).sum(1).tolist()
        asked = {rank: count for rank, count in enumerate(counts) if count}
        size = self.workers_per_process * packed_size(layout)
        call = self._collect(
            self._key("round"),
            fingerprint(layout),
            (size, size),
            self._spoken(messages, layout),
            self._awaited,
            asked,
        )
        silent = Message(*self._silence(layout))
        everybody = [silent] * self.n
        self._why_silent = call.why
        self._arrivals = torch.full((self.n,), torch.inf, dtype=torch.float64)
        for rank, body in call.bodies.items():
            for i, (flags, *payload) in enumerate(self._unpacked(body, layout)):
                everybody[rank * self.workers_per_process + i] = Message(flags, tuple(payload))
                self._arrivals[rank * self.workers_per_process + i] = call.seconds[rank]
        return everybody

    def arrivals(self) -> Tensor | None:
        return self._arrivals

    def why_silent(self, worker: int) -> str:
        if not self.serves:
            return "was not heard, or gave no finite gradient (the server's log says which)"
        return self._why_silent.get(worker // self.workers_per_process, super().why_silent(worker))

    def _layout(
        self, message: Message, codec: Compressor, dim: int, dtype: torch.dtype
    ) -> tuple[Field, ...]:
        return (Field(tuple(message.flags.shape), torch.uint8), *codec.layout(dim, dtype))

    def _silence(self, layout: Sequence[Field]) -> tuple[Tensor, Payload]:
        flags, *payload = (
            torch.zeros(field.shape, dtype=field.dtype, device=self._device) for field in layout
        )
        return flags, tuple(payload)

    def _spoken(self, messages: Sequence[Message], layout: Sequence[Field]) -> bytes:
        """The messages' bytes; none if all are silent."""
        if not any(int(message.flags[0]) == 1 for message in messages):
            return b""
        return self._packed([(message.flags, *message.payload) for message in messages], layout)

    def publish(self, verdict: Verdict, down: Compressor, dim: int, dtype: torch.dtype) -> None:
        layout = self._verdict_layout(len(verdict.used))
        reason = verdict.reason.encode()[:_REASON]
        padded = torch.zeros(_REASON, dtype=torch.uint8)
        padded[: len(reason)] = (
            torch.frombuffer(bytearray(reason), dtype=torch.uint8) if reason else padded[:0]
        )
        seconds = torch.tensor([verdict.seconds], dtype=torch.float64)
        flags = [flag.to(torch.uint8) for flag in (verdict.cohort, verdict.present, verdict.used)]
        body = self._packed([(*flags, padded, seconds)], layout)
        if verdict.answer is not None:
            body += self._packed([verdict.answer], down.layout(dim, dtype))
        self._publish((self.position, f"round#{self._calls['round']}"), body)

    def submit(
        self,
        messages: Sequence[Message],
        codec: Compressor,
        down: Compressor,
        dim: int,
        dtype: torch.dtype,
        round: Round,
    ) -> Verdict:
        layout = self._layout(messages[0], codec, dim, dtype)
        body = b"" if self.behind else self._spoken(messages, layout)
        self._check_size(len(body))
        result = self._client.call(*self._key("round"), fingerprint(layout), body)
        nobody = torch.zeros(self.n, dtype=torch.bool)
        parameters = len(messages[0].flags) - 1
        if result is None:
            return Verdict(
                nobody,
                nobody,
                torch.zeros(parameters, dtype=torch.bool),
                None,
                0.0,
                "The server had no such round.",
            )
        head = self._verdict_layout(parameters)
        size = packed_size(head)
        ((cohort, present, used, reason, seconds),) = self._unpacked(result[:size], head)
        answer = (
            self._unpacked(result[size:], down.layout(dim, dtype))[0]
            if len(result) > size
            else None
        )
        text = bytes(reason.tolist()).rstrip(b"\0").decode(errors="replace")
        return Verdict(
            cohort.cpu() == 1, present.cpu() == 1, used == 1, answer, float(seconds), text
        )

    def _verdict_layout(self, parameters: int) -> tuple[Field, ...]:
        byte = torch.uint8
        return (
            Field((self.n,), byte),
            Field((self.n,), byte),
            Field((parameters,), byte),
            Field((_REASON,), byte),
            Field((1,), torch.float64),
        )

    def agree(self, tensor: Tensor) -> Tensor:
        return tensor

    def bytes_down(self, message: Message, answer: Payload) -> int:
        return sum(tensor.nbytes for tensor in answer)
