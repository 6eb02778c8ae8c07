"""EF14: what a compressor drops is kept, and added to the next gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_byz.aggregators import NNM, Aggregator, Chain, TrimmedMean
from lightning_byz.algorithms.base import Algorithm
from lightning_byz.compressors import Compressor, TopK
from lightning_byz.numerics.rows import Rows
from lightning_byz.types import Gradients, Payload, Round


class WorkerState(NamedTuple):
    """What a worker of EF14 remembers.

    Attributes:
        e: what it has not sent yet, ``[d]``.
    """

    e: Tensor


class ServerState(NamedTuple):
    """What the server of EF14 remembers.

    Attributes:
        last: the rule's last result, ``[d]``; empty unless the rule remembers it.
    """

    last: Tensor


@dataclass(frozen=True)
class EF14(Algorithm):
    """Classic error feedback: ``u_i = grad_i + e_i``; send ``c_i = C(u_i)``; ``e_i = u_i - c_i``;
    ``g = Agg(c_1, ..., c_n)``.

    Seide et al., Interspeech 2014; analysed by Stich et al. 2018 (arXiv 1809.07599) and Karimireddy
    et al., ICML 2019 (arXiv 1901.09847). Here as a baseline. With the identity compressor it is
    robust SGD without momentum; with `Mean` it is compressed SGD with error feedback. Deviation:
    the step size multiplies what the server returns, not the gradient that enters ``u_i``; the two
    are the same for a constant one.

    Warning: its messages are a poor input for a robust rule. Those of honest workers differ by what
    each has kept back, more than their gradients do: with Top-K one sends coordinates that another
    does not, so a median of them is mostly 0, and attacks hide in the spread. (An argument, and a
    measurement: with 2 liars of 9, Top-1 of 10 and a median, it stops at 0.4 of the first distance
    to a quadratic's optimum, EF21 at less than 0.1.) `ByzEF21SGDM` aggregates estimates of
    gradients instead; with ``eta=1`` it is EF21 (arXiv 2106.05203) with a robust rule.

    Args:
        aggregator: the robust rule.
        compressor: any contractive compressor.
    """

    keeps_last = True

    aggregator: Aggregator = field(default_factory=lambda: Chain(pre=(NNM(),), rule=TrimmedMean()))
    compressor: Compressor = field(default_factory=lambda: TopK(ratio=0.1))

    def __post_init__(self) -> None:
        self.check_parts()
        if not self.compressor.contractive:
            raise ValueError(
                f"EF14 needs a contractive compressor. Found {self.compressor!r}. Use "
                "TopK(ratio=0.1), or ContractiveRandK(ratio=0.1)."
            )

    def codec(self, round: Round) -> Compressor:
        return self.compressor

    def init_worker(self, x: Tensor) -> WorkerState:
        return WorkerState(torch.zeros_like(x))

    def worker(
        self, grads: Gradients, state: WorkerState, round: Round
    ) -> tuple[Payload, WorkerState]:
        u = grads.current + state.e
        c = self.compressor.encode(u, round.private("compressor", u.device))
        return c, WorkerState(u - self.compressor.decode(c, len(u)))

    def init_server(self, x: Tensor, n: int) -> ServerState:
        return ServerState(self.init_last(x))

    def server(self, rows: Rows, state: ServerState, round: Round) -> tuple[Tensor, ServerState]:
        estimate, last = self.aggregate(rows, state.last, round)
        return estimate, ServerState(last)
