"""The algorithm interface: both halves of a method in one class."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_byz.aggregators import Aggregator
from lightning_byz.compressors import Compressor
from lightning_byz.rows import Rows
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
        needs_trusted: the server half uses a gradient on trusted data.
        stateless: neither half remembers anything, so that a closure may be evaluated several times a step (LBFGS).
    """

    aggregator: Aggregator
    needs_previous: bool = False  # no ClassVar: LightningCLI reads subclasses' annotations where that name may be unknown
    needs_trusted: bool = False

    def check_parts(self) -> None:
        """Raises unless the rule is a rule and the compressor a compressor."""
        for name, kind in (("aggregator", Aggregator), ("compressor", Compressor)):
            part = getattr(self, name)
            if not isinstance(part, kind):
                raise TypeError(f"`{name}` of {type(self).__name__} should be an instance of {kind.__name__}. Found {part!r}.")

    @property
    def stateless(self) -> bool:
        """Whether neither half remembers anything between rounds."""
        return False

    @abstractmethod
    def with_f(self: AlgorithmT, f: int) -> AlgorithmT:
        """The same algorithm with a rule that tolerates f Byzantine workers."""

    def for_sizes(self: AlgorithmT, sizes: Sequence[int]) -> AlgorithmT:
        """The same algorithm with compressors that know the parameters' numbers of elements (see `Compressor.for_sizes`)."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        known = {name: part.for_sizes(sizes) for name, part in fields.items() if isinstance(part, Compressor)}
        return dataclasses.replace(self, **known) if known else self  # type: ignore[type-var]

    @abstractmethod
    def codec(self, round: Round) -> Compressor:
        """This round's wire format."""

    def cohort(self, round: Round) -> Tensor:
        """``[n]`` bool: the workers that take part in this round; all of them by default."""
        return torch.ones(round.n, dtype=torch.bool)

    @abstractmethod
    def init_worker(self, x: Tensor) -> Any:
        """A worker's state before its first round. ``x [d]``: the parameters, for their size, dtype and device."""

    @abstractmethod
    def worker(self, grads: Gradients, state: Any, round: Round) -> tuple[Payload, Any]:
        """The payload that this worker sends, and its new state."""

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
        """The rows that the rule saw in this round, given the server's new state; for monitors."""
        return rows
