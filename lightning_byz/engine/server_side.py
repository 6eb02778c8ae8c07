"""The server's half of a round: who is present, and how the estimate is made and sent.

How it is made is one of three plans, chosen once: `Whole`, `InPieces`, `Revised`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_byz.aggregators import Aggregator, TooFewRowsError
from lightning_byz.algorithms import Algorithm
from lightning_byz.compressors import Compressor, Identity
from lightning_byz.engine.heterogeneity import Heterogeneity
from lightning_byz.engine.outcome import IDLE, NO_LOSS, SPEAKS, Outcome
from lightning_byz.engine.state_layout import (
    check_shapes,
    check_state,
    columns_of,
    copied,
    piece_of,
)
from lightning_byz.numerics.memory import Lender, TensorPool, empty_rows, places_of, side_by_side
from lightning_byz.numerics.rows import AnyRows, Rows
from lightning_byz.transports import Message, Received, Transport, Verdict
from lightning_byz.types import Payload, Round


class _Heard(NamedTuple):
    """What a round's estimate is made of.

    Attributes:
        received: the messages.
        blank: ``[n, 0]`` what is known of the rows besides their numbers.
        decode: makes the rows.
        down: the format of the answer.
        round: with ``present`` set.
        out: ``[d]`` memory for the whole estimate; None: it comes in memory of its own.
    """

    received: Received
    blank: Rows
    decode: Callable[[], Rows]
    down: Compressor
    round: Round
    out: Tensor | None


class ServerSide:
    """The server's half of an algorithm, of all columns, or of those that this rank aggregates.

    Args:
        algorithm: the method.
        transport: a connected transport.
        like: ``[d]``, for its size, dtype and device.
        shares: ``[n]`` how much of the data each worker holds; None: all the same.
        seed: of the exchange's random streams.

    Attributes:
        heterogeneity: how unlike the workers' data are, as far as rounds have shown.
        state: the server's state; None where it is not held.
        unchecked: rounds in which the algorithm's own answers are looked at.
        last: ``[d]`` the last estimate, where the next one differs from it in few coordinates.
        columns: of every tensor of the state, whether its last dimension is that of the
            coordinates.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        transport: Transport,
        like: Tensor,
        shares: Tensor | None,
        seed: int,
    ) -> None:
        self.algorithm, self.transport, self.shares = algorithm, transport, shares
        self.heterogeneity = Heterogeneity(algorithm, seed)
        self.dim, self.dtype, self.unchecked = len(like), like.dtype, 2
        n = transport.n
        check_state(algorithm.init_server(like[:0], n), f"{type(algorithm).__name__}.init_server")
        self.columns = columns_of(lambda x: algorithm.init_server(x, n), len(like), like.dtype)
        mine = transport.columns(like)
        self.state: Any = algorithm.init_server(mine, n) if transport.serves else None
        self.last: Tensor | None = None
        self.pool = TensorPool()
        self._lender = Lender()
        self._rows: Tensor | None = None
        self._plan: _Plan | None = None

    @property
    def width(self) -> int:
        """Number of columns that this rank aggregates."""
        return sum(last - first for first, last in self.transport.spans(self.dim))

    def judge(
        self,
        received: Received,
        sent: Message,
        down: Compressor,
        round: Round,
        x: Tensor,
        quarantined: frozenset[int],
        spare: Tensor | None = None,
    ) -> Outcome:
        """What comes of a round's messages; the others are told.

        Args:
            received: the messages, as far as this rank aggregates them.
            sent: a local worker's message, for its size.
            down: the format of the answer.
            round: the round.
            x: ``[d]``, for its size, dtype and device.
            quarantined: workers whose messages do not count.
            spare: ``[d]`` memory that the estimate may lie in.
        """
        if round.measured:
            round = round._replace(arrivals=self.transport.arrivals())
            round = round._replace(cohort=self.algorithm.cohort(round))
        assert round.cohort is not None
        rule = self.algorithm.rule(round)
        said = torch.stack([message.flags for message in received.messages])
        flags = self.transport.of_whole_workers(said).cpu()
        spoke = (flags[:, 0] == SPEAKS) & round.cohort
        idle = (flags[:, 0] == IDLE) & round.cohort
        left_out = torch.zeros_like(spoke)
        left_out[sorted(quarantined)] = True
        left_out &= round.cohort
        present = spoke & ~left_out & received.valid.cpu()
        blank = replace(
            self._rows_of(x.new_empty(len(present), 0), round),
            exposed=spoke & ~present & ~left_out,  # an honest worker checks what it sends
            quarantined=left_out,
        )
        decode = cache(
            lambda: replace(blank, values=self._decoded(received, present, x[: self.width]))
        )
        round = self._as_seen_here(round, present)

        used = (flags[present, 1:] != 0).sum(0) > min(rule.f or 0, max(0, int(present.sum()) - 1))
        seconds = self.algorithm.seconds(round)
        outcome = Outcome(
            round,
            None,
            used,
            decode,
            decode,
            rule,
            sent.nbytes,
            0,
            seconds,
            quarantined=quarantined,
            idle=frozenset(idle.nonzero().flatten().tolist()),
        )
        answer: Payload | None = None
        try:
            out = self._room(x, spare)
            estimate, answer = self._answer(_Heard(received, blank, decode, down, round, out))
        except TooFewRowsError as error:
            # so that some honest worker says so
            nobody = not bool(spoke.any()) and int(idle.sum()) > (rule.f or 0)
            outcome = outcome._replace(reason=NO_LOSS if nobody else str(error))
        else:
            server = self.state
            outcome = outcome._replace(
                estimate=estimate,
                look=lambda: self.algorithm.seen(decode(), server, round),
                bytes_down=self.transport.bytes_down(sent, answer),
            )
        assert round.cohort is not None
        verdict = Verdict(round.cohort, present, used, answer, outcome.seconds, outcome.reason)
        self.transport.publish(verdict, down, len(x), x.dtype)
        self.heterogeneity.observe(outcome)
        self.unchecked = max(0, self.unchecked - 1)
        return outcome

    def _rows_of(self, values: Tensor, round: Round) -> Rows:
        """Rows ``[n, width]``, or ``[n, 0]``, with all that a rule may ask of them."""
        transport = self.transport
        rows = Rows if not transport.in_shards else partial(Rows, total=transport.total)
        return rows(
            values,
            agree=transport.agree,
            generator=round.shared("rule"),
            spans=transport.spans(self.dim),
            dim=self.dim,
            shares=self.shares,
            unlike=self.heterogeneity.value,
        )

    def _as_seen_here(self, round: Round, present: Tensor) -> Round:
        """The round as the algorithm's server half is given it."""
        trusted = None if round.trusted is None else self.transport.columns(round.trusted)
        return round._replace(present=present, trusted=trusted)

    def supposed(
        self, values: Tensor, present: Tensor, round: Round, algorithm: Algorithm, state: Any
    ) -> Tensor:
        """The whole estimate ``[d]`` that a round would give; no state changes. For simulated
        attackers.

        Args:
            values: ``[n, width]`` the decoded messages, in this rank's columns.
            present: ``[n]`` bool, whose messages count.
            round: the round.
            algorithm: this one, or one with another rule.
            state: the server's before the round.

        Returns:
            the estimate; zeros if the step would be skipped.
        """
        rows, seen = self._rows_of(values, round), self._as_seen_here(round, present)
        try:
            estimate, _ = algorithm.server(rows, state, seen)
        except TooFewRowsError:
            return values.new_zeros(self.dim)
        return self.transport.assemble(estimate, self.dim)

    def _answer(self, heard: _Heard) -> tuple[Tensor, Payload]:
        """The whole estimate as a worker decodes it, and the payload that told it; and the new
        state.
        """
        round = heard.round
        assert round.present is not None
        payloads = [heard.received.messages[w].payload for w in _indices(round.present)]
        answer = self.algorithm.tally(payloads, heard.blank, round)
        if answer is not None:
            return self.spread(answer, heard)
        if self._plan is None:
            self._plan = _plan(self, heard.down)
        return self._plan.answer(heard)

    def _room(self, like: Tensor, spare: Tensor | None) -> Tensor | None:
        """Memory for a whole estimate that comes in shares, or that differs from the last one in
        few coordinates; None: it comes in memory of its own.
        """
        if self.transport.in_shards:
            return self._lender(like) if spare is None else spare
        # a server may still be sending the estimate before
        copied = self.algorithm.changes_few and not self.transport.measured
        return self._lender(like) if copied else None

    def spread(self, answer: Payload, heard: _Heard) -> tuple[Tensor, Payload]:
        """The whole estimate as a worker decodes it, and the payload that told it.

        Args:
            answer: this rank's columns of it, encoded.
            heard: what it is made of.
        """
        out = heard.out if self.transport.in_shards else None
        whole, told = self.transport.spread(answer, heard.down, self.dim, self.dtype, out)
        if self.algorithm.changes_few:
            self.last = whole.clone()
        return whole, told

    def named(self, heard: _Heard) -> tuple[Tensor, Rows] | None:
        """The coordinates here that some message names, and the messages' rows in these columns;
        None if most may be named.
        """
        received, blank, round = heard.received, heard.blank, heard.round
        assert round.present is not None
        if not (
            (self.algorithm.absorbs or self.algorithm.changes_named)
            and self.algorithm.codec(round).sparse
        ):
            return None
        width = self.width
        speaking = _indices(round.present)
        entries = [
            received.format.entries(received.messages[worker].payload, width) for worker in speaking
        ]
        if 2 * sum(len(places) for places, _ in entries) > width:
            return None
        empty = torch.zeros(0, dtype=torch.int64, device=blank.values.device)
        index, places = torch.cat([empty, *(at for at, _ in entries)]).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        values = blank.values.new_zeros(round.n, len(index))
        for worker, (_, numbers), place in zip(
            speaking, entries, places.split([len(at) for at, _ in entries]), strict=True
        ):
            values[worker, place] = numbers
        return index, replace(blank, values=values, spans=None, dim=None)

    def on_columns(
        self, index: Tensor, half: Callable[[Any], tuple[Tensor, Any]]
    ) -> tuple[Tensor, Any]:
        """What a part of the server's half gives in some columns, and the state with what it left
        in them, which is written into.
        """
        cut = self.columns
        before = (
            t.index_select(-1, index) if columns else t
            for t, columns in zip(self.state, cut, strict=True)
        )
        result, after = half(type(self.state)(*before))
        state = (
            t.index_copy_(-1, index, new) if columns else new
            for t, new, columns in zip(self.state, after, cut, strict=True)
        )
        return result, type(self.state)(*state)

    def estimate(self, heard: _Heard, named: tuple[Tensor, Rows] | None) -> Tensor:
        """The estimate in all columns here. The server's state is the new one then. ``named``: from
        `named`.
        """
        blank, round = heard.blank, heard.round
        lent = round._replace(room=self.pool)
        if named is None or not self.algorithm.absorbs:
            estimate, after = self.algorithm.server(heard.decode(), self.state, lent)
            if self.unchecked:
                self._check_server(estimate, after, blank)
        else:
            index, rows = named
            _, absorbed = self.on_columns(
                index, lambda state: (index, self.algorithm.absorb(rows, state, round))
            )
            estimate, after = self.algorithm.answer(blank, absorbed, lent)
        self.pool.take_back(self.state, after)
        self.state = after
        return estimate

    def _check_server(self, estimate: Any, state: Any, blank: Rows) -> None:
        """Raises unless the server's half gave an estimate of all columns here, and a state like
        the one before.
        """
        owner = f"{type(self.algorithm).__name__}.server"
        check_state(state, owner, self.state)
        width = self.width
        if (
            not isinstance(estimate, Tensor)
            or estimate.shape != (width,)
            or estimate.dtype != blank.values.dtype
        ):
            found = (
                (tuple(estimate.shape), estimate.dtype)
                if isinstance(estimate, Tensor)
                else type(estimate).__name__
            )
            raise TypeError(
                f"{owner} should return an estimate of shape ({width},) and {blank.values.dtype}. "
                f"Found {found}."
            )

    def _decoded(self, received: Received, present: Tensor, like: Tensor) -> Tensor:
        """The messages' columns here as rows ``[n, width]``, in memory that the next round uses
        again; absent rows are 0.
        """
        dim = len(like)
        payloads = [
            message.payload if here else None
            for here, message in zip(present.tolist(), received.messages, strict=True)
        ]
        if isinstance(received.format, Identity):  # they may lie there already
            together = side_by_side(
                [None if payload is None else payload[0] for payload in payloads]
            )
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

    # -- what is remembered ------------------------------------------------------------------------

    def memory(self) -> tuple[Any, Tensor | None]:
        """A copy of the state and of the last estimate."""
        return copied(self.state), None if self.last is None else self.last.clone()

    def remember(self, memory: tuple[Any, Tensor | None]) -> None:
        """State and last estimate are those of `memory` again."""
        state, last = memory
        self.state, self.last = copied(state), None if last is None else last.clone()

    def collected(self, alone: bool) -> dict[str, Tensor] | None:
        """The whole state at rank 0, by name; elsewhere this rank's columns.

        Args:
            alone: this rank is the only one that asks; None then if the state lies in shards.
        """
        if self.state is None or (alone and self.transport.in_shards):
            return None
        state = {}
        for (name, value), here in zip(self.state._asdict().items(), self.columns, strict=True):
            whole = self.transport.collect(value, self.dim) if here else value
            state[name] = value.clone() if whole is value else whole  # it may be written into
        return state

    def experience(self, alone: bool) -> dict[str, Any]:
        """What rounds have shown, for a checkpoint. ``alone``: as in `collected`."""
        transport = self.transport
        apart = transport.has_parts or (alone and transport.in_shards)
        return self.heterogeneity.state(None if apart else transport.total)

    def load(self, whole: Mapping[str, Tensor]) -> None:
        """The state becomes that of a checkpoint.

        Args:
            whole: by name, the tensors of all columns.

        Raises:
            ValueError: if they are not those of this algorithm.
        """
        like = torch.empty(self.dim, dtype=self.dtype, device="meta")
        expected = self.algorithm.init_server(like, self.transport.n)
        shapes = {name: tuple(value.shape) for name, value in expected._asdict().items()}
        check_shapes(shapes, whole, "server")
        if self.state is None:
            return
        mine = (
            (self.transport.columns(whole[name]) if here else whole[name]).to(now, copy=True)
            for (name, now), here in zip(self.state._asdict().items(), self.columns, strict=True)
        )
        self.state = type(self.state)(*mine)


def _indices(mask: Tensor) -> list[int]:
    found: list[int] = mask.nonzero().flatten().tolist()
    return found


# -- plans -----------------------------------------------------------------------------------------


def _plan(side: ServerSide, down: Compressor) -> _Plan:
    """How estimates are made in this run."""
    algorithm = side.algorithm
    rule = algorithm.aggregator
    plain = not rule.remembers and type(rule).__call__ is Aggregator.__call__
    plain = plain and (rule.coordinate_wise or algorithm.aggregates_messages)
    pieces = len(side.transport.spans(side.dim)) > 1
    if plain and algorithm.coordinate_wise and isinstance(down, Identity) and pieces:
        return InPieces(side)
    return Revised(side) if algorithm.changes_few else Whole(side)


class _Plan(ABC):
    """How an estimate is made and sent, given the messages.

    Args:
        side: the server's half, whose state becomes the new one.
    """

    def __init__(self, side: ServerSide) -> None:
        self.side = side

    @abstractmethod
    def answer(self, heard: _Heard) -> tuple[Tensor, Payload]:
        """The whole estimate as a worker decodes it, and the payload that told it.

        Raises:
            TooFewRowsError: if nothing can be said; no state has changed then.
        """


class Whole(_Plan):
    """All columns at once."""

    def answer(self, heard: _Heard) -> tuple[Tensor, Payload]:
        side = self.side
        estimate = side.estimate(heard, side.named(heard))
        answer = heard.down.encode(estimate, heard.round.shared("downlink", estimate.device))
        return side.spread(answer, heard)


class Revised(Whole):
    """An estimate that differs from the last one in few coordinates, which alone are sent.

    If messages name them, the server's half looks at no others.
    """

    def answer(self, heard: _Heard) -> tuple[Tensor, Payload]:
        side = self.side
        algorithm, transport, last = side.algorithm, side.transport, side.last
        if last is None:
            return super().answer(heard)
        named = side.named(heard)
        if named is not None and algorithm.changes_named:
            index, rows = named
            numbers, side.state = side.on_columns(
                index, lambda state: algorithm.server(rows, state, heard.round)
            )
        else:
            estimate = side.estimate(heard, named)
            index = places_of(estimate != transport.columns(last))
            numbers = estimate[index]
        answer = transport.revise(index, numbers, last)
        # who writes into the estimate changes no state
        whole = last.clone() if heard.out is None else heard.out.copy_(last)
        return whole, heard.down.encode(whole) if answer is None else answer


class InPieces(_Plan):
    """Piece by piece: one is on its way while the next one is made."""

    def answer(self, heard: _Heard) -> tuple[Tensor, Payload]:
        side, rows, round = self.side, heard.decode(), heard.round
        width, place, states, downlink = rows.values.shape[1], 0, [], None
        for piece, algorithm in self._with_results(rows, round):
            size = piece.values.shape[1]
            before = piece_of(side.state, place, place + size, width, side.columns)
            estimate, state = algorithm.server(piece, before, round)
            if downlink is None:  # there will be an estimate
                downlink = side.transport.downlink(side.dim, rows.values, heard.out)
            downlink.send(estimate)
            states.append(state)
            place += size
        assert downlink is not None
        side.state = type(side.state)(
            *(
                torch.cat([state[i] for state in states], -1) if here else states[-1][i]
                for i, here in enumerate(side.columns)
            )
        )
        whole = downlink.close()
        return whole, (whole,)

    def _with_results(self, rows: Rows, round: Round) -> Iterator[tuple[Rows, Algorithm]]:
        """The rows' pieces, and the algorithm for each: with its rule, or with what its rule has
        found.
        """
        algorithm = self.side.algorithm
        if algorithm.aggregator.coordinate_wise:
            yield from ((piece, algorithm) for _, piece in rows.pieces())
            return
        rule, speaking = algorithm.aggregator.facing(rows, round.present)
        for (_, piece), result in zip(rows.pieces(), rule.in_pieces(speaking), strict=True):
            yield piece, replace(algorithm, aggregator=_Known(rule.f, result))  # type: ignore[type-var]


@dataclass(frozen=True)
class _Known(Aggregator):
    """A rule whose result is known already."""

    result: Tensor | None = None

    def __call__(self, rows: AnyRows, present: Tensor | None = None) -> Tensor:
        return self.aggregate(Rows.of(rows))

    def aggregate(self, rows: Rows) -> Tensor:
        assert self.result is not None
        return self.result
