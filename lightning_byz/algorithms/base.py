"""The algorithm interface: both halves of a method in one class."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_byz.aggregators import Aggregator, Mean
from lightning_byz.compressors import Compressor, Identity
from lightning_byz.numerics.rows import Rows
from lightning_byz.types import Gradients, Payload, Round

AlgorithmT = TypeVar("AlgorithmT", bound="Algorithm")


class NoState(NamedTuple):
    """The state of a half that remembers nothing."""


class Algorithm(ABC):
    """One published method: what a worker sends, and what the server makes of it.

    Subclasses are frozen dataclasses that hold hyperparameters only. All memory goes in and comes out as NamedTuples of
    tensors, and all randomness comes from the round, so both halves are pure functions.

    Attributes:
        aggregator: the robust rule at the server.
        needs_previous: the worker half uses the gradient of the same minibatch at the previous parameters.
        needs_drift: a half uses how far the parameters have moved (`Round.drift`).
        uses_trusted: the server half uses a gradient on trusted data where there is one (`Round.trusted`).
        needs_trusted: it cannot do without.
        sees_absent: the rule also sees what it knows of workers that are absent (EF21's mirrors).
        keeps_last: it keeps the rule's last result, for rules that remember it (`aggregate`).
        absorbs: the server's half is `absorb`, which takes in what messages say of each coordinate, and then `answer`.
        changes_few: the estimate differs from the last one in few coordinates only, which a transport may send alone.
        changes_named: ..., and in those alone that some message names, to which the server's half may then be confined.
        stateless: neither half remembers anything.
        aggregates_messages: the server's half gives its rule the messages as they are, once. Then estimates of rules with distances come
            down in pieces, too.
        coordinate_wise: every coordinate of what a worker sends is a function of that coordinate of its gradients and state alone, in every
            round; and of the server's estimate and state likewise, if the rule is coordinate-wise. Such a message may leave piece by piece.
    """

    aggregator: Aggregator
    needs_previous: bool = False  # no ClassVar: LightningCLI reads subclasses' annotations where that name may be unknown
    needs_drift: bool = False
    uses_trusted: bool = False
    needs_trusted: bool = False
    sees_absent: bool = False
    keeps_last: bool = False
    absorbs: bool = False

    def check_parts(self) -> None:
        """Raises unless the rule is a rule and the compressor a compressor."""
        for name, kind in (("aggregator", Aggregator), ("compressor", Compressor)):
            part = getattr(self, name)
            if not isinstance(part, kind):
                raise TypeError(f"`{name}` of {type(self).__name__} should be an instance of {kind.__name__}. Found {part!r}.")
        self.check_memory()

    def check_memory(self) -> None:
        """Raises if the rule remembers its last result and this algorithm does not keep it."""
        if self.aggregator.remembers and not self.keeps_last:
            raise ValueError(
                f"{type(self).__name__} does not keep the last result of its rule. Found {self.aggregator!r}, which starts from it. Use "
                "CenteredClip(start='median'), or another rule."
            )

    @property
    def changes_few(self) -> bool:
        """Whether the estimate differs from the last one in few coordinates only, which a transport may then send alone."""
        return False

    @property
    def changes_named(self) -> bool:
        """Whether these are among the coordinates that messages name, which then are all that the server's half has to look at."""
        return False

    @property
    def stateless(self) -> bool:
        """Whether neither half remembers anything between rounds."""
        return False

    @property
    def coordinate_wise(self) -> bool:
        """Whether both halves, the rule aside, look at one coordinate at a time."""
        return False

    @property
    def aggregates_messages(self) -> bool:
        """Whether the server's half gives its rule the messages as they are, once, so that the rule's result may be known beforehand."""
        return False

    def with_f(self: AlgorithmT, f: int) -> AlgorithmT:
        """The same algorithm with a rule that tolerates f Byzantine workers."""
        return dataclasses.replace(self, aggregator=self.aggregator.with_f(f))  # type: ignore[type-var]

    def for_sizes(self: AlgorithmT, sizes: Sequence[int]) -> AlgorithmT:
        """The same algorithm with compressors that know the parameters' numbers of elements (see `Compressor.for_sizes`)."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        known = {name: part.for_sizes(sizes) for name, part in fields.items() if isinstance(part, Compressor)}
        return dataclasses.replace(self, **known) if known else self  # type: ignore[type-var]

    def averaging(self: AlgorithmT) -> AlgorithmT:
        """The same algorithm for one or two workers, of whom none can be outvoted: without robustness."""
        return dataclasses.replace(self, aggregator=Mean())  # type: ignore[type-var]

    def most_f(self, n: int) -> int:
        """The largest f that it allows for n workers; below 0 if it cannot run with n at all."""
        return self.aggregator.most_f(n)

    def check(self, n: int) -> None:
        """Raises ValueError unless it can run with n workers, in every kind of round."""
        self.aggregator.check(n)

    # -- what kind of round it is: pure functions of the round, the same on every worker and on the server --------------

    @abstractmethod
    def codec(self, round: Round) -> Compressor:
        """This round's wire format."""

    def cohort(self, round: Round) -> Tensor:
        """``[n]`` bool: the workers that take part in this round; all of them by default."""
        return torch.ones(round.n, dtype=torch.bool)

    def first(self, n: int) -> int:
        """How many of n workers' messages a server waits for; all of them by default."""
        return n

    def full_gradient(self, round: Round) -> bool:
        """Whether workers send the gradient over all their data in this round, instead of a minibatch's."""
        return False

    @property
    def full_batches(self) -> int | None:
        """Of how many batches `full_gradient` is made; None: of all of the worker's data."""
        return None

    def rule(self, round: Round) -> Aggregator:
        """The rule that aggregates this round's cohort, with its f."""
        return self.aggregator

    def downlink(self, round: Round) -> Compressor:
        """The wire format in which a server sends the estimate; it has to keep every estimate as it is."""
        return Identity()

    def seconds(self, round: Round) -> float:
        """How long the server waits for messages in this round: until the last one of the cohort that ever comes."""
        if round.arrivals is None:
            return 0.0
        awaited = round.arrivals[self.cohort(round)]
        return float(awaited[awaited.isfinite()].max(dim=0).values) if bool(awaited.isfinite().any()) else 0.0

    # -- the two halves -----------------------------------------------------------------------------------------------

    @abstractmethod
    def init_worker(self, x: Tensor) -> Any:
        """A worker's state before its first round. ``x [d]``: the parameters, for their size, dtype and device."""

    @abstractmethod
    def worker(self, grads: Gradients, state: Any, round: Round) -> tuple[Payload, Any]:
        """The payload that this worker sends, and its new state."""

    def arrived(self, payload: Payload, state: Any) -> Any:
        """The worker's state once its message has counted: what `worker` gave, with what is to be in it only then. May write into its tensors.

        Not asked of `coordinate_wise` algorithms, whose messages travel in pieces.
        """
        return state

    def rejoined(self, x: Tensor, server: Any, worker: int) -> Any:
        """The state of a worker that has lost its own, given the server's: the two halves have to fit together again."""
        return self.init_worker(x)

    @abstractmethod
    def init_server(self, x: Tensor, n: int) -> Any:
        """The server's state before the first round."""

    @abstractmethod
    def server(self, rows: Rows, state: Any, round: Round) -> tuple[Tensor, Any]:
        """The gradient estimate ``[d]``, and the server's new state.

        Args:
            rows: ``[n, d]`` the decoded messages; the rows of workers that are not present are 0.
            state: as the last round, or `init_server`, returned it.
            round: with ``present`` set.

        Raises:
            TooFewRowsError: if nothing can be said about this round; no state has changed then.
        """

    def absorb(self, rows: Rows, state: Any, round: Round) -> Any:
        """The first part of `server`, if it ``absorbs``: the state with what the messages say in it, one coordinate at a time.

        Where no message names a coordinate, the state stays as it was there, so that this may be given the other columns alone.
        """
        raise NotImplementedError(f"{type(self).__name__} has no first part of its server's half.")

    def answer(self, rows: Rows, state: Any, round: Round) -> tuple[Tensor, Any]:
        """The second part of `server`, if it ``absorbs``: the estimate, and the server's new state. It always has one.

        Args:
            rows: ``[n, 0]`` what is known of all workers' rows besides their numbers.
            state: from `absorb`.
            round: with ``present`` set.
        """
        raise NotImplementedError(f"{type(self).__name__} has no second part of its server's half.")

    def tally(self, payloads: Sequence[Payload], rows: Rows, round: Round) -> Payload | None:
        """The answer that `server` and `downlink` would give, straight from encoded messages; None, the default: they are to be decoded.

        For algorithms whose server remembers nothing.

        Args:
            payloads: of the workers that are present, or one share of the coordinates of each.
            rows: ``[n, 0]`` what is known of all workers' rows besides their numbers.
            round: with ``present`` set.

        Raises:
            TooFewRowsError: as `server`.
        """
        return None

    def aggregate(self, rows: Rows, last: Tensor, round: Round) -> tuple[Tensor, Tensor]:
        """The rule's result, and what to keep of it as ``last`` for the next round.

        Args:
            rows: what the rule aggregates.
            last: ``[d]`` the rule's last result; empty for a rule that remembers nothing.
            round: with ``present`` set.
        """
        if not self.aggregator.remembers:
            return self.aggregator(rows, round.present), last
        result = self.aggregator(dataclasses.replace(rows, last=last), round.present)
        return result, result.clone()  # who writes into the estimate changes no state

    def init_last(self, x: Tensor) -> Tensor:
        """``last`` before the first round: 0 for rules that remember, as the papers start; else empty."""
        return torch.zeros_like(x) if self.aggregator.remembers else x.new_empty(0)

    def seen(self, rows: Rows, state: Any, round: Round) -> Rows:
        """``[n, d]`` the rows that the estimate stands for, given the server's new state; for monitors."""
        return rows


def draw(round: Round, size: int) -> Tensor:
    """``[n]`` bool: ``size`` of the n workers, drawn without replacement, the same ones everywhere."""
    chosen = torch.zeros(round.n, dtype=torch.bool)
    chosen[torch.randperm(round.n, generator=round.shared("cohort"))[:size]] = True
    return chosen


def among(rows: Rows, round: Round, cohort: Tensor) -> tuple[Rows, Tensor | None]:
    """The rows of a cohort, and which of them are present: what a rule, whose f is relative to the cohort, is to see."""
    if bool(cohort.all()):
        return rows, round.present
    return rows.select(cohort), None if round.present is None else round.present[cohort]
