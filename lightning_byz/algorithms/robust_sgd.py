"""Robust SGD: compress, gather, aggregate robustly, with momentum at the workers, at the server, or
in the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_byz.aggregators import NNM, Aggregator, Chain, TrimmedMean
from lightning_byz.algorithms.base import Algorithm
from lightning_byz.compressors import Compressor, Identity
from lightning_byz.numerics.rows import Rows
from lightning_byz.types import Gradients, Payload, Round


class WorkerState(NamedTuple):
    """What a worker of RobustSGD remembers.

    Attributes:
        m: momentum, ``[d]``; empty without worker momentum.
        rounds: rounds that it took part in, a 0-d tensor.
    """

    m: Tensor
    rounds: Tensor


class ServerState(NamedTuple):
    """What the server of RobustSGD remembers.

    Attributes:
        m: momentum, ``[d]``; empty without server momentum.
        a: the last aggregate of the workers' moving averages, ``[d]``; empty unless worker momentum
            is undone.
        last: the rule's last result, ``[d]``; empty unless the rule remembers it.
        rounds: rounds that gave an estimate, a 0-d tensor.
    """

    m: Tensor
    a: Tensor
    last: Tensor
    rounds: Tensor


def _corrected(m: Tensor, beta: float, rounds: Tensor, room: Callable[[], Tensor | None]) -> Tensor:
    """What an exponential moving average stands for once its start at 0, so many rounds ago, is
    corrected for; in ``room()`` if that is another tensor.
    """
    correction = 1 - beta ** float(rounds)
    return m if correction == 1 else torch.div(m, correction, out=room())


@dataclass(frozen=True)
class RobustSGD(Algorithm):
    """Every worker sends its (compressed) momentum, and the server aggregates with a robust rule.

    ``m_i = beta_w m_i + (1 - beta_w) g_i``; send ``C(m_i)``; ``g = Agg(C(m_1), ..., C(m_n))``;
    ``m = beta_s m + (1 - beta_s) g``.

    Karimireddy, He, Jaggi, ICML 2021 (arXiv 2012.10333) show that momentum at the workers is what
    makes a robust rule withstand attacks that hide in the gradients' noise; Farhadkhani et al.,
    ICML 2022 (arXiv 2205.12173), analyse it for any rule. Without momentum and compression, and
    with `Mean`, this is distributed SGD. Momenta are moving averages (the new gradient has weight 1
    - beta) and are corrected for their start at 0, as Adam's are (a deviation from those papers),
      so that the learning rate keeps its meaning from the first step on. The last momentum of the
      pipeline may be the optimizer's.

    Worker momentum in front of the optimizer's own is a delay too many: it makes learning rates
    unstable that DDP trains well with. With ``undo_worker_momentum`` the server takes it out again,
    after the rule has used it to tell liars from noise: ``a = Agg(m_1, ..., m_n)``;
    ``g = (a - beta_w a_previous) / (1 - beta_w)``. With `Mean` that is the mean gradient, whatever
    beta_w is; and an optimizer with heavy-ball momentum beta_w makes of it ``a / (1 - beta_w)``,
    which is the algorithm of both papers, where momentum is at the workers instead of in the
    optimizer. (An addition of this package.)

    Args:
        aggregator: the robust rule.
        compressor: the wire format. Biased ones (`TopK`) lose what they drop: ByzEF21SGDM makes up
            for that, this does not.
        worker_momentum: beta_w, in [0, 1). It adds to the optimizer's own momentum, unless it is
            undone: 0.9 in front of SGD with momentum 0.9 is unstable at learning rates that are
            safe for DDP (docs/default-algorithm.md).
        server_momentum: beta_s, in [0, 1).
        undo_worker_momentum: the server gives the optimizer gradients again, instead of momenta.
            The strategy's default, with ``worker_momentum=0.9``.
    """

    keeps_last = True

    aggregator: Aggregator = field(default_factory=lambda: Chain(pre=(NNM(),), rule=TrimmedMean()))
    compressor: Compressor = field(default_factory=Identity)
    worker_momentum: float = 0.0
    server_momentum: float = 0.0
    undo_worker_momentum: bool = False

    def __post_init__(self) -> None:
        self.check_parts()
        for name in ("worker_momentum", "server_momentum"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(
                    f"`{name}` is the weight of the past, in [0, 1). Found {name}={value}."
                )

    @property
    def stateless(self) -> bool:
        return (
            self.worker_momentum == 0
            and self.server_momentum == 0
            and not self.aggregator.remembers
        )

    @property
    def aggregates_messages(self) -> bool:
        return type(self).server is RobustSGD.server

    @property
    def coordinate_wise(self) -> bool:
        return self.compressor.coordinate_wise

    def codec(self, round: Round) -> Compressor:
        return self.compressor

    def init_worker(self, x: Tensor) -> WorkerState:
        return WorkerState(
            torch.zeros_like(x) if self.worker_momentum else x.new_empty(0),
            torch.zeros((), dtype=torch.int64),
        )

    def worker(
        self, grads: Gradients, state: WorkerState, round: Round
    ) -> tuple[Payload, WorkerState]:
        g = grads.current
        if self.worker_momentum:
            m = torch.lerp(g, state.m, self.worker_momentum, out=round.room(state.m))
            state, here = WorkerState(m, state.rounds + 1), g
            g = _corrected(m, self.worker_momentum, state.rounds, lambda: round.sent(here))
        return self.compressor.encode(g, round.private("compressor", g.device)), state

    @property
    def _undoes(self) -> bool:
        return self.undo_worker_momentum and self.worker_momentum > 0

    def init_server(self, x: Tensor, n: int) -> ServerState:
        empty = x.new_empty(0)
        m, a = (
            torch.zeros_like(x) if kept else empty for kept in (self.server_momentum, self._undoes)
        )
        return ServerState(m, a, self.init_last(x), torch.zeros((), dtype=torch.int64))

    def server(self, rows: Rows, state: ServerState, round: Round) -> tuple[Tensor, ServerState]:
        g, last = self.aggregate(rows, state.last, round)
        m, a, rounds = state.m, state.a, state.rounds
        if self._undoes:
            beta = self.worker_momentum
            # as it is without the correction for its start at 0
            a = g * (1 - beta ** float(rounds + 1))
            g = (a - beta * state.a) / (1 - beta)
        if self.server_momentum:
            m = torch.lerp(g, m, self.server_momentum)
            g = _corrected(m, self.server_momentum, rounds + 1, lambda: None)
            g = g.clone() if g is m else g  # who writes into the estimate changes no state
        return g, ServerState(
            m, a, last, rounds if self.server_momentum == 0 and not self._undoes else rounds + 1
        )
