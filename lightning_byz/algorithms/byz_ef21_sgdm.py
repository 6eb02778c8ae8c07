"""Byz-EF21-SGDM: robust aggregation of EF21 estimates, with Polyak momentum at the workers."""

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
    """What a worker of Byz-EF21-SGDM remembers.

    Attributes:
        v: momentum, ``[d]``.
        g: the estimate of v that the server has of this worker, ``[d]``.
        rounds: rounds that it took part in, a 0-d tensor.
    """

    v: Tensor
    g: Tensor
    rounds: Tensor


class ServerState(NamedTuple):
    """What the server of Byz-EF21-SGDM remembers.

    Attributes:
        g: a mirror of every worker's estimate, Byzantine workers included, ``[n, d]``.
        last: the rule's last result, ``[d]``; empty unless the rule remembers it.
    """

    g: Tensor
    last: Tensor


@dataclass(frozen=True)
class ByzEF21SGDM(Algorithm):
    """Workers send a compressed difference of their momentum to the server's estimate of it, which
    follows.

    ``v_i = (1 - eta) v_i + eta grad_i``; ``c_i = C(v_i - g_i)``; ``g_i = g_i + c_i`` on both sides;
    ``g = Agg(g_1, ..., g_n)``.

    arXiv 2409.08640, after EF21-SGDM (arXiv 2305.15155). The rule aggregates the estimates, never
    the raw ``c_i``. Both sides start from g_i = 0, and v_i from the worker's first gradient, so
    nothing is ever sent uncompressed. With the identity compressor this is robust SGD with worker
    momentum; with `Mean` and f = 0 it is EF21-SGDM. With ``eta=1`` it is EF21 (arXiv 2106.05203)
    with a robust rule.

    Args:
        aggregator: the robust rule; the paper puts NNM in front of a median, trimmed mean or RFA.
        compressor: any contractive compressor. An unbiased, d / K-scaled one makes the recursion
            blow up and is refused.
        eta: weight of the new gradient in the momentum, in (0, 1]. 1: no momentum. The authors'
            code uses 0.1 for images, 0.01 for a9a.
    """

    keeps_last = True
    sees_absent = True
    absorbs = True

    aggregator: Aggregator = field(default_factory=lambda: Chain(pre=(NNM(),), rule=TrimmedMean()))
    compressor: Compressor = field(default_factory=lambda: TopK(ratio=0.1))
    eta: float = 0.1

    def __post_init__(self) -> None:
        self.check_parts()
        if not 0 < self.eta <= 1:
            raise ValueError(
                f"`eta` is the weight of the new gradient, in (0, 1]. Found eta={self.eta}."
            )
        if not self.compressor.contractive:
            raise ValueError(
                f"{type(self).__name__} needs a contractive compressor. Found "
                f"{self.compressor!r}. Use TopK(ratio=0.1), or ContractiveRandK(ratio=0.1)."
            )

    def codec(self, round: Round) -> Compressor:
        return self.compressor

    @property
    def changes_few(self) -> bool:
        return self.changes_named

    @property
    def changes_named(self) -> bool:
        return self.aggregator.coordinate_wise and self.compressor.sparse

    def init_worker(self, x: Tensor) -> WorkerState:
        return WorkerState(
            torch.zeros_like(x), torch.zeros_like(x), torch.zeros((), dtype=torch.int64)
        )

    def rejoined(self, x: Tensor, server: ServerState, worker: int) -> WorkerState:
        # what it sends is a difference to the server's mirror
        return self.init_worker(x)._replace(g=server.g[worker].clone())

    def worker(
        self, grads: Gradients, state: WorkerState, round: Round
    ) -> tuple[Payload, WorkerState]:
        v = round.room(state.v)
        torch.lerp(state.v, grads.current, self.eta, out=v) if state.rounds else v.copy_(
            grads.current
        )
        c = self.compressor.encode_difference(v, state.g, round.private("compressor", v.device))
        return c, WorkerState(v, state.g, state.rounds + 1)

    def arrived(self, payload: Payload, state: WorkerState) -> WorkerState:
        self.compressor.added(state.g, payload, out=state.g)
        return state

    def init_server(self, x: Tensor, n: int) -> ServerState:
        return ServerState(x.new_zeros(n, len(x)), self.init_last(x))

    def server(self, rows: Rows, state: ServerState, round: Round) -> tuple[Tensor, ServerState]:
        return self.answer(rows, self.absorb(rows, state, round), round)

    def absorb(self, rows: Rows, state: ServerState, round: Round) -> ServerState:
        g = torch.add(state.g, rows.dense(), out=round.room(state.g))
        finite = rows.with_values(g).finite(by=None)
        # a Byzantine worker may add 3e38 twice; its mirror then stays as it was
        if not finite.all():
            g[~finite] = state.g[~finite]
        return state._replace(g=g)

    def answer(self, rows: Rows, state: ServerState, round: Round) -> tuple[Tensor, ServerState]:
        mirrors = self.seen(rows, state, round)
        everybody = torch.ones(len(state.g), dtype=torch.bool, device=state.g.device)
        estimate, last = self.aggregate(mirrors, state.last, round._replace(present=everybody))
        return estimate, state._replace(last=last)

    def seen(self, rows: Rows, state: ServerState, round: Round) -> Rows:
        return rows.with_values(state.g)
