"""What a method may have beside its codec and its two halves. Each trait is off unless it says
more.

`Algorithm` has all of them. A method overrides what it needs of those that it is about, and reads
no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_byz.aggregators import Aggregator
from lightning_byz.compressors import Compressor, Identity
from lightning_byz.numerics.rows import Rows
from lightning_byz.types import Payload, Round


class Participation:
    """Who takes part in a round: a drawn cohort, or the first k.

    All are pure functions of the round, the same on every worker and on the server. By default all
    workers take part, and all are waited for.
    """

    aggregator: Aggregator

    def cohort(self, round: Round) -> Tensor:
        """``[n]`` bool: the workers that take part in this round; as a rule those that the run has
        drawn.
        """
        return torch.ones(round.n, dtype=torch.bool) if round.drawn is None else round.drawn

    def first(self, n: int) -> int:
        """How many of n workers' messages a server waits for."""
        return n

    def rule(self, round: Round) -> Aggregator:
        """The rule that aggregates this round's cohort, with its f."""
        return self.aggregator

    def seconds(self, round: Round) -> float:
        """How long the server waits for messages, by the simulated clock: for the last of the
        cohort that ever comes.
        """
        if round.arrivals is None:
            return 0.0
        awaited = round.arrivals[self.cohort(round)]
        arrived = awaited[awaited.isfinite()]
        return float(arrived.max(dim=0).values) if len(arrived) else 0.0


class ExtraGradients:
    """Which gradients a round needs beside that of the minibatch at the current parameters.

    Attributes:
        needs_previous: the worker half uses the gradient of the same minibatch at the previous
            parameters (`Gradients.previous`).
        needs_drift: a half uses how far the parameters have moved (`Round.drift`).
        uses_trusted: the server half uses a gradient on trusted data where there is one
            (`Round.trusted`).
        needs_trusted: it cannot do without.
        full_batches: of how many batches `full_gradient` is made; None: of all of the worker's
            data.
    """

    # no ClassVar: LightningCLI reads annotations where that name may be unknown
    needs_previous: bool = False
    needs_drift: bool = False
    uses_trusted: bool = False
    needs_trusted: bool = False
    full_batches: int | None = None

    def full_gradient(self, round: Round) -> bool:
        """Whether workers send the gradient over all their data in this round, instead of a
        minibatch's.
        """
        return False


class InPieces:
    """Whether a round may be computed piece by piece, so that messages leave while backward still
    runs.

    Attributes:
        coordinate_wise: every coordinate of what a worker sends is a function of that coordinate of
            its gradients and state alone, in every round; and of the server's estimate and state
            likewise, if the rule is coordinate-wise.
        aggregates_messages: the server's half gives its rule the messages as they are, once. Then
            estimates of rules with distances come down in pieces, too.
    """

    @property
    def coordinate_wise(self) -> bool:
        return False

    @property
    def aggregates_messages(self) -> bool:
        return False


class Memory:
    """How what both halves remember is kept together when a worker is absent, or comes back.

    Attributes:
        stateless: neither half remembers anything between rounds.
        sees_absent: the rule also sees what the server knows of workers that are absent (EF21's
            mirrors).
    """

    sees_absent: bool = False

    @property
    def stateless(self) -> bool:
        return False

    def init_worker(self, x: Tensor) -> Any:
        raise NotImplementedError

    def arrived(self, payload: Payload, state: Any) -> Any:
        """The worker's state once its message has counted. May write into the state's tensors.

        Not asked of `coordinate_wise` methods, whose messages travel in pieces.

        Args:
            payload: what it sent.
            state: what `worker` gave; what is to be in it only then comes in now.
        """
        return state

    def rejoined(self, x: Tensor, server: Any, worker: int) -> Any:
        """The state of a worker that has lost its own, given the server's: the two have to fit
        together again.
        """
        return self.init_worker(x)

    def seen(self, rows: Rows, state: Any, round: Round) -> Rows:
        """``[n, d]`` the rows that the estimate stands for, given the server's new state; for
        monitors.
        """
        return rows


class RuleMemory:
    """A server that keeps its rule's last result, for rules that start from it (CenteredClip).

    Attributes:
        keeps_last: it does; its server's state holds ``last``.
    """

    aggregator: Aggregator
    keeps_last: bool = False

    def check_memory(self) -> None:
        """Raises if the rule remembers its last result and this method does not keep it."""
        if self.aggregator.remembers and not self.keeps_last:
            raise ValueError(
                f"{type(self).__name__} does not keep the last result of its rule. Found "
                f"{self.aggregator!r}, which starts from it. Use CenteredClip(start='median'), or "
                "another rule."
            )

    def init_last(self, x: Tensor) -> Tensor:
        """``last`` before the first round: 0 for rules that remember, as the papers start; else
        empty.
        """
        return torch.zeros_like(x) if self.aggregator.remembers else x.new_empty(0)

    def aggregate(self, rows: Rows, last: Tensor, round: Round) -> tuple[Tensor, Tensor]:
        """The rule's result, and what to keep of it as ``last`` for the next round.

        Args:
            rows: what the rule aggregates.
            last: ``[d]`` the rule's last result; empty for a rule that remembers nothing.
            round: with ``present`` set.
        """
        if not self.aggregator.remembers:
            return self.aggregator(rows, round.present), last
        result = self.aggregator(replace(rows, last=last), round.present)
        return result, result.clone()  # who writes into the estimate changes no state


class SparseEstimates:
    """An estimate that differs from the last one in few coordinates, so that no others are computed
    or sent.

    Attributes:
        changes_few: it does, and a transport may send these alone.
        changes_named: ..., and they are among those that some message names, to which the server's
            half may then be confined.
        absorbs: the server's half is `absorb`, which takes in what messages say of each coordinate,
            and then `answer`.
    """

    absorbs: bool = False

    @property
    def changes_few(self) -> bool:
        return False

    @property
    def changes_named(self) -> bool:
        return False

    def absorb(self, rows: Rows, state: Any, round: Round) -> Any:
        """The first part of `server`: the state with what the messages say in it, one coordinate at
        a time.

        Where no message names a coordinate, the state stays as it was there, so that this may be
        given the other columns alone.
        """
        raise NotImplementedError(f"{type(self).__name__} has no first part of its server's half.")

    def answer(self, rows: Rows, state: Any, round: Round) -> tuple[Tensor, Any]:
        """The second part of `server`: the estimate, and the server's new state. It always has one.

        Args:
            rows: ``[n, 0]`` what is known of all workers' rows besides their numbers.
            state: from `absorb`.
            round: with ``present`` set.
        """
        raise NotImplementedError(f"{type(self).__name__} has no second part of its server's half.")


class EncodedAnswers:
    """A server that answers in a wire format of its own, or straight from encoded messages, as
    votes on signs.
    """

    def downlink(self, round: Round) -> Compressor:
        """The wire format in which a server sends the estimate; it has to keep every estimate as it
        is.
        """
        return Identity()

    def tally(self, payloads: Sequence[Payload], rows: Rows, round: Round) -> Payload | None:
        """The answer that `server` and `downlink` would give; None: messages are to be decoded.

        For methods whose server remembers nothing.

        Args:
            payloads: of the workers that are present, or one share of the coordinates of each.
            rows: ``[n, 0]`` what is known of all workers' rows besides their numbers.
            round: with ``present`` set.

        Raises:
            TooFewRowsError: as `Algorithm.server`.
        """
        return None
