"""The round: from the local workers' gradients to one robust estimate, over any transport, for any algorithm."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from lightning_byz.aggregators import Aggregator, TooFewRowsError
from lightning_byz.algorithms import Algorithm
from lightning_byz.compressors import Compressor, Identity
from lightning_byz.engine.bucketed_messages import Upload
from lightning_byz.engine.state_layout import check_kept, check_state, columns_of, piece_of
from lightning_byz.numerics.finite import all_finite
from lightning_byz.numerics.memory import Room, empty_rows, places_of
from lightning_byz.numerics.rows import AnyRows, Rows
from lightning_byz.transports import Awaited, Message, Received, Transport, Verdict
from lightning_byz.types import Gradients, Payload, Round


class Contribution(NamedTuple):
    """What a local worker has to say this round.

    Attributes:
        grads: its gradients, or None if it has none (no batch, no loss).
        used: ``[P]`` bool, the parameters that its loss depends on.
    """

    grads: Gradients | None
    used: Tensor


class Outcome(NamedTuple):
    """The result of a round.

    Attributes:
        round: the round, with ``present`` set.
        estimate: the gradient estimate ``[d]``, in memory that the next round may use again; None if too few rows were present: the
            step is to be skipped.
        used: ``[P]`` bool, the parameters that more than f present workers have a gradient of.
        decode: makes the messages' rows, until the next round.
        look: makes the rows that the estimate stands for, until the next round.
        rule: the rule that aggregated the cohort's rows.
        bytes_up: bytes of payload that one worker of the cohort sent.
        bytes_down: bytes of payload that one worker received.
        seconds: how long the server waited for messages, by the algorithm's simulated clock.
        reason: why there is no estimate; empty otherwise.
        quarantined: the workers whose messages were left out, whatever they held.
    """

    round: Round
    estimate: Tensor | None
    used: Tensor
    decode: Callable[[], Rows]
    look: Callable[[], Rows]
    rule: Aggregator
    bytes_up: int
    bytes_down: int
    seconds: float = 0.0
    reason: str = ""
    quarantined: frozenset[int] = frozenset()

    @property
    def rows(self) -> Rows:
        """The decoded messages ``[n, d]``, or the columns of them that this rank aggregates; absent rows are 0."""
        return self.decode()

    @property
    def seen(self) -> Rows:
        """The rows that the estimate stands for, as ``rows``; those of workers that are not present mean nothing. On all ranks or on none."""
        return self.look()

    @property
    def silent(self) -> list[int]:
        """The workers that were to take part and whose message did not count, those in quarantine left aside."""
        assert self.round.present is not None and self.round.cohort is not None
        absent = (self.round.cohort & ~self.round.present).nonzero().flatten().tolist()
        return [worker for worker in absent if worker not in self.quarantined]


class Exchange:
    """Runs an algorithm round by round and keeps its state: of the local workers, and of the server.

    Args:
        algorithm: the method, with f known.
        transport: a connected transport.
        seed: seed of all random streams.
        shares: ``[n]`` float64 > 0, how much of the data each worker holds, for rules that weigh rows; None: all the same.
        name: what the gradients are of, for messages.

    Attributes:
        step: number of the next round.
        previous: ``[d]`` the parameters at the last round that gave an estimate, for algorithms that need the drift.
        observers: called with every outcome, where the server's half runs.
        liars: step -> the workers that lie in it, in a simulation; in one with arrival times they are the first to arrive.
        arrivals: step -> ``Round.arrivals``, in a simulation that knows them beforehand; a worker whose message never comes is silent.
        quarantined: workers whose messages do not count from the next round on, the same on every
            rank; the rule's f stays, as far as it allows that for the rows that are left.
    """

    def __init__(
        self, algorithm: Algorithm, transport: Transport, seed: int, shares: Tensor | None = None, name: str = "all parameters"
    ) -> None:
        self.algorithm, self.transport, self.seed, self.shares, self.name = algorithm, transport, seed, shares, name
        self.step = 0
        self.dim: int | None = None
        self.dtype = torch.float32
        self.workers: dict[int, Any] = {}
        self._columns: tuple[tuple[bool, ...], tuple[bool, ...]] = ((), ())  # of the workers' states, and of the server's
        self.server: Any = None
        self.previous: Tensor | None = None
        self._rows: Tensor | None = None
        self._whole: Tensor | None = None  # room for an estimate that comes in shares
        self._last: Tensor | None = None  # the last estimate, for algorithms whose next one differs from it in few coordinates
        self.observers: list[Callable[[Outcome], None]] = []
        self.liars: Callable[[int], Iterable[int]] = lambda step: ()
        self.arrivals: Callable[[int], Tensor | None] = lambda step: None
        self.quarantined: set[int] = set()
        self._unchecked = 2  # rounds in which an algorithm's own answers are looked at
        self._upload: Upload | None = None  # of the coming round, if it has been opened
        self._room, self._server_room = Room(), Room()  # for the local workers' next states, and the server's
        transport.cut(algorithm.codec(Round(step=0, n=transport.n, seed=seed)) if algorithm.coordinate_wise else None)

    def _start(self, like: Tensor) -> None:
        self.dim, self.dtype, self.previous, self._last = len(like), like.dtype, None, None
        self._upload, self._whole = None, None
        self._room, self._server_room = Room(), Room()
        name = type(self.algorithm).__name__
        self.workers = {worker: self.algorithm.init_worker(like) for worker in self.transport.workers}
        for state in self.workers.values():
            check_state(state, f"{name}.init_worker")
        check_state(self.algorithm.init_server(like[:0], self.transport.n), f"{name}.init_server")
        self._unchecked = 2
        self._columns = (
            columns_of(self.algorithm.init_worker, len(like), like.dtype),
            columns_of(lambda x: self.algorithm.init_server(x, self.transport.n), len(like), like.dtype),
        )
        mine = self.transport.columns(like)
        self.server = self.algorithm.init_server(mine, self.transport.n) if self.transport.serves else None

    @torch.no_grad()
    def next_round(self, x: Tensor) -> Round:
        """The round that comes next, as far as it is known before the workers compute.

        Args:
            x: ``[d]``, the parameters; for algorithms that do not need the drift, any vector of their size, dtype and device.
        """
        n = self.transport.n
        rushing = torch.zeros(n, dtype=torch.bool)
        rushing[torch.tensor(sorted(self.liars(self.step)), dtype=torch.int64)] = True
        previous = self.previous if self.dim == len(x) else None
        drift = None if previous is None else torch.linalg.vector_norm(x - previous, dtype=torch.float64)
        round = Round(step=self.step, n=n, seed=self.seed, drift=drift, rushing=rushing, arrivals=self.arrivals(self.step))
        round = round._replace(measured=self.transport.measured)
        round = round._replace(cohort=self.algorithm.cohort(round))
        self.transport.awaits(self._awaited(round))
        return round

    def _awaited(self, round: Round) -> Awaited:
        """For whose messages a server waits."""
        assert round.cohort is not None
        cohort, rule = int(round.cohort.sum()), self.algorithm.rule(round)
        f, need = rule.f or 0, min(cohort, self.algorithm.first(round.n))
        enough = (m for m in range(1, need + 1) if min(f, rule.most_f(m)) >= (f - need + m if need - m <= f else f))
        return Awaited(cohort - need, next(enough, need), self.algorithm.full_gradient(round))

    @torch.no_grad()
    def open(self, x: Tensor) -> Upload | None:
        """Begins the next round's way up, so that pieces of the local workers' messages may leave before their gradients are complete.

        Every rank may, and need not: what it has not sent is sent in `run`. None where the algorithm or the transport wants whole messages.

        Args:
            x: as in `run`.
        """
        if self.dim != len(x):
            self._start(x)
        self._meet()
        self._upload = self._opened(self.next_round(x), x)
        return self._upload

    def _meet(self) -> None:
        self.transport.meet(f"round {self.step} of {self.name}")

    def _opened(self, round: Round, x: Tensor) -> Upload | None:
        if not (self.algorithm.coordinate_wise and self.transport.serves):
            return None
        uplink = self.transport.uplink(self.algorithm.codec(round), len(x), x.dtype, round)
        if uplink is None:
            return None
        return Upload(self.algorithm, round, uplink, self.workers, self._columns[0], self._room, x, self._unchecked > 0)

    @torch.no_grad()
    def run(self, contributions: Sequence[Contribution], x: Tensor, trusted: Tensor | None = None) -> Outcome:
        """One round.

        Args:
            contributions: one for each local worker, in order. Gradients are not modified.
            x: ``[d]``, the parameters; for algorithms that do not need the drift, any vector of their size, dtype and device.
            trusted: ``[d]`` a gradient on trusted data; rank 0's counts. None, on all ranks, if there is none.

        Returns:
            the outcome. Its estimate is the same on every rank. If it has none, no state has changed.
        """
        if self.dim != len(x):
            self._start(x)
        if self._upload is None:
            self._meet()
        round = self._agreed(self.next_round(x), trusted)
        assert round.cohort is not None
        codec, down = self.algorithm.codec(round), self.algorithm.downlink(round)
        upload = self._upload or self._opened(round, x)
        self._upload = None
        if upload is not None:
            return self._finished(self._uploaded(upload, contributions, down, round, x), upload.states, x)

        messages, new_states, sent = [], {}, {}
        for worker, contribution in zip(self.transport.workers, contributions, strict=True):
            message = None
            if bool(round.cohort[worker]) and comes(round, worker) and _is_finite(contribution.grads, codec):
                seen = round._replace(worker=worker, room=self._room)
                payload, state = self.algorithm.worker(contribution.grads, self.workers[worker], seen)
                if self._unchecked:
                    owner = f"{type(self.algorithm).__name__}.worker"
                    check_state(state, owner, self.workers[worker])
                    check_kept(state, contribution.grads.current, owner)
                codec.check(payload, len(x), x.dtype)
                if bool(codec.valid(payload, len(x))):  # a momentum or a narrow format may overflow: who knows that is silent
                    message, new_states[worker] = Message(_flags(_SPEAKS, contribution.used), payload), state
                    sent[worker] = payload
            if message is None:  # silence has the size of speech
                empty = tuple(
                    torch.zeros(field.shape, dtype=field.dtype, device=x.device) for field in codec.layout(len(x), x.dtype)
                )
                message = Message(_flags(_IDLE if contribution.grads is None else _SILENT, contribution.used), empty)
            messages.append(message)

        if self.transport.serves:
            received = self.transport.exchange(messages, codec, len(x), x.dtype, round)
            outcome = self._served(received, messages[0], down, round, x)
        else:
            outcome = self._told(self.transport.submit(messages, codec, down, len(x), x.dtype, round), down, round, messages[0])
        return self._finished(outcome, new_states, x, sent)

    def _uploaded(
        self, upload: Upload, contributions: Sequence[Contribution], down: Compressor, round: Round, x: Tensor
    ) -> Outcome:
        """A round whose messages travel in pieces: what is left of them, and the server's half."""
        assert round.cohort is not None
        speaks = [
            bool(round.cohort[worker]) and comes(round, worker) and contribution.grads is not None
            for worker, contribution in zip(self.transport.workers, contributions, strict=True)
        ]
        rows = [
            contribution.grads.current if here and contribution.grads is not None else None
            for here, contribution in zip(speaks, contributions, strict=True)
        ]
        for first, last in upload.left:
            upload.send([None if row is None else row[first:last] for row in rows])
        for worker, here in zip(self.transport.workers, speaks, strict=True):
            if not (here and bool(torch.stack(upload.sound[worker]).all())):
                upload.states.pop(worker, None)
        flags = [
            _flags(_SPEAKS if worker in upload.states else _IDLE if contribution.grads is None else _SILENT, contribution.used)
            for worker, contribution in zip(self.transport.workers, contributions, strict=True)
        ]
        layout = self.algorithm.codec(round).layout(len(x), x.dtype)
        sent = Message(flags[0], tuple(torch.empty(field.shape, dtype=field.dtype, device="meta") for field in layout))
        return self._served(upload.uplink.close(flags), sent, down, round, x)

    def _finished(
        self, outcome: Outcome, new_states: dict[int, Any], x: Tensor, sent: Mapping[int, Payload] = MappingProxyType({})
    ) -> Outcome:
        """The outcome, once the local workers' states are those after the round; as they were if it gave no estimate. ``sent``: whole messages."""
        self.step += 1
        self._unchecked = max(0, self._unchecked - 1)
        if outcome.estimate is not None:
            assert outcome.round.present is not None
            present = outcome.round.present
            for worker, state in new_states.items():
                if present[worker]:
                    self._room.take_back(self.workers[worker], state)
                    self.workers[worker] = self.algorithm.arrived(sent[worker], state) if worker in sent else state
            if self.algorithm.needs_drift:
                self.previous = x.clone()
        for observer in self.observers if self.transport.serves else ():
            observer(outcome)
        return outcome

    def _served(self, received: Received, sent: Message, down: Compressor, round: Round, x: Tensor) -> Outcome:
        """The server's half. ``sent``: a local worker's message, for its size."""
        if round.measured:
            round = round._replace(arrivals=self.transport.arrivals())
            round = round._replace(cohort=self.algorithm.cohort(round))
        assert round.cohort is not None
        rule = self.algorithm.rule(round)
        flags = torch.stack([flags for flags, _ in received.messages]).cpu()
        spoke = (flags[:, 0] == _SPEAKS) & round.cohort
        idle = (flags[:, 0] == _IDLE) & round.cohort
        left_out = torch.zeros_like(spoke)
        left_out[sorted(self.quarantined)] = True
        left_out &= round.cohort
        present = spoke & ~left_out & received.valid.cpu()
        spans = self.transport.spans(len(x))
        width = sum(last - first for first, last in spans)
        blank = Rows(
            x.new_empty(len(present), 0),
            total=self.transport.total,
            agree=self.transport.agree,
            generator=round.shared("rule"),
            spans=spans,
            dim=len(x),
            exposed=spoke & ~present & ~left_out,  # an honest worker checks what it sends
            quarantined=left_out,
            shares=self.shares,
        )
        decode = cache(lambda: replace(blank, values=self._decoded(received, present, x[:width])))
        trusted = None if round.trusted is None else self.transport.columns(round.trusted)
        round = round._replace(present=present, trusted=trusted)

        used = (flags[present, 1:] != 0).sum(0) > min(rule.f or 0, max(0, int(present.sum()) - 1))
        seconds, quarantined = self.algorithm.seconds(round), frozenset(self.quarantined)
        outcome = Outcome(round, None, used, decode, decode, rule, sent.nbytes, 0, seconds, quarantined=quarantined)
        answer: Payload | None = None
        try:
            estimate, answer = self._answer(received, blank, decode, down, round)
        except TooFewRowsError as error:
            nobody = not bool(spoke.any()) and int(idle.sum()) > (rule.f or 0)  # so that some honest worker says so
            outcome = outcome._replace(reason=NO_LOSS if nobody else str(error))
        else:
            server = self.server
            outcome = outcome._replace(
                estimate=estimate,
                look=lambda: self.algorithm.seen(decode(), server, round),
                bytes_down=self.transport.bytes_down(sent, answer),
            )
        assert round.cohort is not None
        verdict = Verdict(round.cohort, present, used, answer, outcome.seconds, outcome.reason)
        self.transport.publish(verdict, down, len(x), x.dtype)
        return outcome

    def _told(self, verdict: Verdict, down: Compressor, round: Round, message: Message) -> Outcome:
        """The outcome as a worker knows it that does not see the others' messages."""
        dim = self.dim
        assert dim is not None
        round = round._replace(cohort=verdict.cohort, present=verdict.present)
        rows = Rows(torch.zeros(round.n, 0))
        outcome = Outcome(
            round, None, verdict.used, lambda: rows, lambda: rows, self.algorithm.rule(round), message.nbytes, 0, verdict.seconds
        )
        if verdict.answer is None:
            return outcome._replace(reason=verdict.reason)
        down_bytes = self.transport.bytes_down(message, verdict.answer)
        return outcome._replace(estimate=down.decode(verdict.answer, dim), bytes_down=down_bytes)

    def _agreed(self, round: Round, trusted: Tensor | None) -> Round:
        """The round with rank 0's drift and trusted gradient: every rank's decisions are to be the same."""
        if round.drift is not None:
            round = round._replace(drift=self.transport.agree(round.drift))
        if trusted is not None:
            trusted = self.transport.agree(trusted)
            round = round._replace(trusted=trusted if bool(all_finite(trusted)) else None)
        return round

    def _answer(
        self, received: Received, blank: Rows, decode: Callable[[], Rows], down: Compressor, round: Round
    ) -> tuple[Tensor, Payload]:
        """The whole estimate as a worker decodes it, and the payload that told it; and the server's new state."""
        assert self.dim is not None and round.present is not None
        dtype = blank.values.dtype
        speaking = round.present.nonzero().flatten().tolist()
        shared = self.transport.in_shards
        if shared and (self._whole is None or self._whole.shape != (self.dim,) or self._whole.dtype != dtype):
            self._whole = torch.empty(self.dim, dtype=dtype, device=blank.values.device)
        answer = self.algorithm.tally([received.messages[worker].payload for worker in speaking], blank, round)
        if answer is None:
            if self._answers_in_pieces(down):
                return self._answer_in_pieces(decode(), round)
            if self._last is not None:
                return self._answer_revised(received, blank, decode, down, round)
            estimate = self._by_server(blank, decode, self._named(received, blank, round), round)
            answer = down.encode(estimate, round.shared("downlink", estimate.device))
        whole, answer = self.transport.spread(answer, down, self.dim, dtype, self._whole)
        if self.algorithm.changes_few:
            self._last = whole.clone()
        return whole, answer

    def _answer_revised(
        self, received: Received, blank: Rows, decode: Callable[[], Rows], down: Compressor, round: Round
    ) -> tuple[Tensor, Payload]:
        """As `_answer`, of an estimate that differs from the last one in few coordinates. If messages name them, the server's half looks at no others."""
        assert self.dim is not None and self._last is not None and round.present is not None
        named = self._named(received, blank, round)
        if named is not None and self.algorithm.changes_named:
            index, rows = named
            numbers, self.server = self._on_columns(index, lambda state: self.algorithm.server(rows, state, round))
        else:
            estimate = self._by_server(blank, decode, named, round)
            index = places_of(estimate != self.transport.columns(self._last))
            numbers = estimate[index]
        answer = self.transport.revise(index, numbers, self._last)
        # who writes into the estimate changes no state; a server may still be sending the one before
        if self._whole is None or self.transport.measured:
            self._whole = self._last.clone()
        else:
            self._whole.copy_(self._last)
        return self._whole, down.encode(self._whole) if answer is None else answer

    def _named(self, received: Received, blank: Rows, round: Round) -> tuple[Tensor, Rows] | None:
        """The coordinates here that some message names, and the messages' rows in these columns; None if most may be named."""
        assert self.dim is not None and round.present is not None
        if not ((self.algorithm.absorbs or self.algorithm.changes_named) and self.algorithm.codec(round).sparse):
            return None
        width = sum(last - first for first, last in self.transport.spans(self.dim))
        speaking = round.present.nonzero().flatten().tolist()
        entries = [received.format.entries(received.messages[worker].payload, width) for worker in speaking]
        if 2 * sum(len(places) for places, _ in entries) > width:
            return None
        empty = torch.zeros(0, dtype=torch.int64, device=blank.values.device)
        index, places = torch.cat([empty, *(at for at, _ in entries)]).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        values = blank.values.new_zeros(round.n, len(index))
        for worker, (_, numbers), place in zip(speaking, entries, places.split([len(at) for at, _ in entries]), strict=True):
            values[worker, place] = numbers
        return index, replace(blank, values=values, spans=None, dim=None)

    def _on_columns(self, index: Tensor, half: Callable[[Any], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        """What a part of the server's half gives in some columns, and the state with what it left in them, which is written into."""
        cut = self._columns[1]
        before = (t.index_select(-1, index) if columns else t for t, columns in zip(self.server, cut, strict=True))
        result, after = half(type(self.server)(*before))
        state = (t.index_copy_(-1, index, new) if columns else new for t, new, columns in zip(self.server, after, cut, strict=True))
        return result, type(self.server)(*state)

    def _by_server(self, blank: Rows, decode: Callable[[], Rows], named: tuple[Tensor, Rows] | None, round: Round) -> Tensor:
        """The estimate in all columns here. The server's state is the new one then. ``named``: from `_named`."""
        lent = round._replace(room=self._server_room)
        if named is None or not self.algorithm.absorbs:
            estimate, after = self.algorithm.server(decode(), self.server, lent)
            if self._unchecked:
                self._check_server(estimate, after, blank)
        else:
            index, rows = named
            _, absorbed = self._on_columns(index, lambda state: (index, self.algorithm.absorb(rows, state, round)))
            estimate, after = self.algorithm.answer(blank, absorbed, lent)
        self._server_room.take_back(self.server, after)
        self.server = after
        return estimate

    def _check_server(self, estimate: Any, state: Any, blank: Rows) -> None:
        """Raises unless the server's half gave an estimate of all columns here, and a state like the one before."""
        owner = f"{type(self.algorithm).__name__}.server"
        check_state(state, owner, self.server)
        assert self.dim is not None
        width = sum(last - first for first, last in self.transport.spans(self.dim))
        if not isinstance(estimate, Tensor) or estimate.shape != (width,) or estimate.dtype != blank.values.dtype:
            found = (tuple(estimate.shape), estimate.dtype) if isinstance(estimate, Tensor) else type(estimate).__name__
            raise TypeError(f"{owner} should return an estimate of shape ({width},) and {blank.values.dtype}. Found {found}.")

    def _answers_in_pieces(self, down: Compressor) -> bool:
        """Whether the estimate may be made and sent piece by piece."""
        assert self.dim is not None
        rule = self.algorithm.aggregator
        plain = not rule.remembers and type(rule).__call__ is Aggregator.__call__
        plain = plain and (rule.coordinate_wise or self.algorithm.aggregates_messages)
        return plain and self.algorithm.coordinate_wise and isinstance(down, Identity) and len(self.transport.spans(self.dim)) > 1

    def _answer_in_pieces(self, rows: Rows, round: Round) -> tuple[Tensor, Payload]:
        """As `_answer`; a piece is on its way while the next one is made."""
        assert self.dim is not None
        width, place, states, downlink = rows.values.shape[1], 0, [], None
        for piece, algorithm in self._with_results(rows, round):
            size = piece.values.shape[1]
            estimate, state = algorithm.server(piece, piece_of(self.server, place, place + size, width, self._columns[1]), round)
            if downlink is None:  # there will be an estimate
                downlink = self.transport.downlink(self.dim, rows.values, self._whole)
            downlink.send(estimate)
            states.append(state)
            place += size
        assert downlink is not None
        self.server = type(self.server)(
            *(
                torch.cat([state[i] for state in states], -1) if here else states[-1][i]
                for i, here in enumerate(self._columns[1])
            )
        )
        whole = downlink.close()
        return whole, (whole,)

    def _with_results(self, rows: Rows, round: Round) -> Iterator[tuple[Rows, Algorithm]]:
        """The pieces of the rows, and the algorithm for each: with its rule, or with what a rule of whole rows has found."""
        if self.algorithm.aggregator.coordinate_wise:
            yield from ((piece, self.algorithm) for _, piece in rows.pieces())
            return
        rule, speaking = self.algorithm.aggregator.facing(rows, round.present)
        for (_, piece), result in zip(rows.pieces(), rule.in_pieces(speaking), strict=True):
            yield piece, replace(self.algorithm, aggregator=_Known(rule.f, result))  # type: ignore[type-var]

    def _decoded(self, received: Received, present: Tensor, like: Tensor) -> Tensor:
        """The messages' columns here as rows ``[n, width]``, in memory that the next round uses again; absent rows are 0."""
        dim = len(like)
        payloads = [message.payload if here else None for here, message in zip(present.tolist(), received.messages, strict=True)]
        if isinstance(received.format, Identity):  # they may lie there already
            together = _side_by_side([None if payload is None else payload[0] for payload in payloads])
            if together is not None:
                return together
        if (
            self._rows is None
            or self._rows.shape != (len(payloads), dim)
            or self._rows.dtype != like.dtype
            or self._rows.device != like.device
        ):
            self._rows = empty_rows(len(payloads), dim, like)
        for row, payload in zip(self._rows, payloads, strict=True):
            row.zero_() if payload is None else received.format.decode_into(payload, row)
        return self._rows

    # -- a closure that is evaluated again ----------------------------------------------------------------------------

    def memory(self) -> Any:
        """A copy of all that both halves remember here, for `repeat`."""
        if self.algorithm.stateless or self.dim is None:
            return self.dim
        workers = {worker: _copied(state) for worker, state in self.workers.items()}
        return workers, _copied(self.server), None if self._last is None else self._last.clone()

    def repeat(self, memory: Any) -> None:
        """The next round takes the last one's place in what is remembered.

        Args:
            memory: from `memory`, before the last round.

        Raises:
            ValueError: for methods that look at earlier parameters.
        """
        algorithm = self.algorithm
        if algorithm.needs_drift or algorithm.needs_previous:
            raise ValueError(
                f"{type(algorithm).__name__} takes one gradient a step, because it looks at earlier parameters. "
                "Found an optimizer that evaluates its closure several times a step, as LBFGS and SAM do. Use another optimizer, or "
                "another algorithm, such as RobustSGD."
            )
        if memory is None:
            self.dim = None
        elif not isinstance(memory, int):
            workers, server, last = memory
            self.workers = {worker: _copied(state) for worker, state in workers.items()}
            self.server, self._last = _copied(server), None if last is None else last.clone()

    # -- checkpoint ---------------------------------------------------------------------------------------------------

    def server_state(self, alone: bool = False) -> dict[str, Any]:
        """The server's half and the round number, as plain containers of tensors.

        Where the server's state lies in shards it is collected at rank 0; the other ranks' answers hold their shards.

        Args:
            alone: this rank is the only one that asks. Without the other ranks' shards there is no server state then.
        """
        server = None
        if self.dim is not None and self.server is not None and not (alone and self.transport.in_shards):
            server = {
                name: self.transport.collect(value, self.dim) if here else value
                for (name, value), here in zip(self.server._asdict().items(), self._columns[1], strict=True)
            }
            for name, value in self.server._asdict().items():  # it may be written into
                server[name] = value.clone() if server[name] is value else server[name]
        return {"step": self.step, "dim": self.dim, "server": server, "previous": self.previous}

    def worker_states(self) -> dict[int, dict[str, Tensor]]:
        """The local workers' halves, by worker, as plain containers of tensors of their own."""
        return {worker: {name: t.clone() for name, t in state._asdict().items()} for worker, state in self.workers.items()}

    def load(self, server: dict[str, Any], workers: dict[int, dict[str, Tensor]], like: Tensor) -> None:
        """Restores what `server_state` and `worker_states` gave; workers that are missing start afresh.

        Args:
            server: from `server_state`.
            workers: from `worker_states` of every rank; only the local ones are read.
            like: an example of a gradient, for its device.
        """
        self.step = server["step"]
        self.dim, self.workers, self.server, self.previous = None, {}, None, None
        if server["dim"] is None:
            return
        self._start(like.new_zeros(server["dim"]))
        whole = server["server"]
        if whole is not None:
            expected = self.algorithm.init_server(torch.empty(server["dim"], dtype=self.dtype, device="meta"), self.transport.n)
            _check_shapes({name: tuple(value.shape) for name, value in expected._asdict().items()}, whole, "server")
        if self.transport.serves:
            if whole is None:  # one rank saved alone, without the others' shards: momenta without their mirrors are worth nothing
                return
            self.server = type(self.server)(
                *(
                    (self.transport.columns(whole[name]) if here else whole[name]).to(now, copy=True)
                    for (name, now), here in zip(self.server._asdict().items(), self._columns[1], strict=True)
                )
            )
        previous = server.get("previous")
        self.previous = None if previous is None else previous.to(like)
        for worker in self.transport.workers:
            if worker in workers:
                self.workers[worker] = _restored(self.workers[worker], workers[worker], f"worker {worker}")
            elif whole is not None:
                fresh = self.algorithm.init_server(like.new_zeros(server["dim"]), self.transport.n)
                known = type(fresh)(*(whole[name].to(now) for name, now in fresh._asdict().items()))
                self.workers[worker] = self.algorithm.rejoined(like.new_zeros(server["dim"]), known, worker)

    def rejoined(self, workers: Iterable[int], like: Tensor) -> dict[int, dict[str, Tensor]]:
        """States for workers that have lost theirs, as plain containers of tensors; where the server's half runs."""
        x = torch.zeros_like(like)
        return {} if self.dim is None else {w: self.algorithm.rejoined(x, self.server, w)._asdict() for w in workers}


def _copied(state: Any) -> Any:
    return None if state is None else type(state)(*(tensor.clone() for tensor in state))


@dataclass(frozen=True)
class _Known(Aggregator):
    """A rule whose result is known already."""

    result: Tensor | None = None

    def __call__(self, rows: AnyRows, present: Tensor | None = None) -> Tensor:
        return self.aggregate(Rows.of(rows))

    def aggregate(self, rows: Rows) -> Tensor:
        assert self.result is not None
        return self.result


def comes(round: Round, worker: int) -> bool:
    """Whether this worker's message ever arrives, as far as the round knows."""
    return round.arrivals is None or bool(round.arrivals[worker].isfinite())


def _side_by_side(vectors: Sequence[Tensor | None]) -> Tensor | None:
    """Vectors that lie in one storage at equal distances, as a matrix without a copy; else None."""
    first = vectors[0]
    if first is None or len(vectors) < 2:
        return None
    starts = []
    for vector in vectors:
        if vector is None or vector.stride() != (1,) or vector.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        starts.append(vector.storage_offset())
    gap = starts[1] - starts[0]
    if gap < len(first) or any(b - a != gap for a, b in itertools.pairwise(starts)):
        return None
    return torch.as_strided(first, (len(vectors), len(first)), (gap, 1))


def _is_finite(grads: Gradients | None, codec: Compressor) -> TypeGuard[Gradients]:
    """Whether there are gradients, and all of them finite; not looked at where the payload would show it."""
    if grads is None or codec.tells_nonfinite:
        return grads is not None
    return all(bool(all_finite(part)) for part in grads if part is not None)


_SILENT, _SPEAKS, _IDLE = 0, 1, 2
"""What a worker says of itself in its first flag: its gradient is not finite; it has a message; it has no batch, or no loss."""

NO_LOSS = "No worker had a loss: training_step returned None, or there was no batch."
"""The reason of a round without an estimate that says nothing of the training."""


def _flags(says: int, used: Tensor) -> Tensor:
    return torch.cat([torch.tensor([says], dtype=torch.uint8, device=used.device), used.to(torch.uint8)])


def _restored(fresh: Any, saved: dict[str, Tensor], owner: str) -> Any:
    _check_shapes({name: tuple(value.shape) for name, value in fresh._asdict().items()}, saved, owner)
    return type(fresh)(*(saved[name].to(value, copy=True) for name, value in fresh._asdict().items()))  # it will be written into


def _check_shapes(shapes: dict[str, tuple[int, ...]], saved: dict[str, Tensor], owner: str) -> None:
    found = {name: tuple(value.shape) for name, value in saved.items()}
    if shapes != found:
        raise ValueError(
            f"The checkpoint's state of the {owner} should have the tensors {shapes}. Found {found}. It belongs to another "
            "algorithm, or to other settings of it. Use the settings that the checkpoint was written with, or start a new run "
            "from its weights: Model.load_from_checkpoint(path)."
        )
