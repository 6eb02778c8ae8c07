"""The algorithm interface: both halves of a method in one class."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_byz.aggregators import Aggregator, Mean
from lightning_byz.aggregators.base import Rule
from lightning_byz.algorithms.traits import (
    EncodedAnswers,
    ExtraGradients,
    InPieces,
    Memory,
    Participation,
    RuleMemory,
    SparseEstimates,
)
from lightning_byz.compressors import Compressor
from lightning_byz.numerics.rows import Rows
from lightning_byz.types import Gradients, Payload, Round

AlgorithmT = TypeVar("AlgorithmT", bound="Algorithm")


class NoState(NamedTuple):
    """The state of a half that remembers nothing."""


class Algorithm(
    Participation,
    ExtraGradients,
    InPieces,
    Memory,
    RuleMemory,
    SparseEstimates,
    EncodedAnswers,
    ABC,
):
    """One published method: what a worker sends, and what the server makes of it.

    It needs a rule, a codec and two pairs of functions: `init_worker` and `worker`, `init_server`
    and `server`. All else is a trait (`lightning_byz.algorithms.traits`) that may be left as it is.

    Subclasses are frozen dataclasses that hold hyperparameters only. All memory goes in and comes
    out as NamedTuples of tensors, and all randomness comes from the round, so both halves are pure
    functions.

    Attributes:
        aggregator: the robust rule at the server.
    """

    aggregator: Aggregator

    @abstractmethod
    def codec(self, round: Round) -> Compressor:
        """This round's wire format: a pure function of the round, the same on every worker and on
        the server.
        """

    @abstractmethod
    def init_worker(self, x: Tensor) -> Any:
        """A worker's state before its first round. ``x [d]``: the parameters, for their size, dtype
        and device.
        """

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

    # -- which parts it has, and for how many workers ----------------------------------------------

    def most_f(self, n: int) -> int:
        """The largest f that it allows for n workers; below 0 if it cannot run with n at all."""
        return self.aggregator.most_f(n)

    def check(self, n: int) -> None:
        """Raises ValueError unless it can run with n workers, in every kind of round."""
        self.aggregator.check(n)

    def check_parts(self) -> None:
        """Raises unless the rule is a rule and the compressor a compressor."""
        for name, kind in (("aggregator", Aggregator), ("compressor", Compressor)):
            part = getattr(self, name)
            if not isinstance(part, kind):
                raise TypeError(
                    f"`{name}` of {type(self).__name__} should be an instance of {kind.__name__}. "
                    f"Found {part!r}."
                )
        self.check_memory()

    def with_f(self: AlgorithmT, f: int) -> AlgorithmT:
        """The same algorithm with a rule that tolerates f Byzantine workers."""
        return dataclasses.replace(self, aggregator=self.aggregator.with_f(f))  # type: ignore[type-var]

    def averaging(self: AlgorithmT) -> AlgorithmT:
        """The same algorithm for one or two workers, of whom none can be outvoted: without
        robustness.
        """
        return dataclasses.replace(self, aggregator=Mean())  # type: ignore[type-var]

    def for_sizes(self: AlgorithmT, sizes: Sequence[int]) -> AlgorithmT:
        """The same algorithm with parts that know the parameters' numbers of elements
        (`Compressor.for_sizes`, `Rule.for_sizes`).
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        known = {
            name: part.for_sizes(sizes)
            for name, part in fields.items()
            if isinstance(part, (Compressor, Rule))
        }
        return dataclasses.replace(self, **known) if known else self  # type: ignore[type-var]


def draw(round: Round, size: int) -> Tensor:
    """``[n]`` bool: ``size`` of the n workers, drawn without replacement, the same ones
    everywhere.
    """
    chosen = torch.zeros(round.n, dtype=torch.bool)
    chosen[torch.randperm(round.n, generator=round.shared("cohort"))[:size]] = True
    return chosen


def among(rows: Rows, round: Round, cohort: Tensor) -> tuple[Rows, Tensor | None]:
    """The rows of a cohort, and which of them are present: what a rule, whose f is relative to the
    cohort, is to see.
    """
    if bool(cohort.all()):
        return rows, round.present
    return rows.select(cohort), None if round.present is None else round.present[cohort]
