"""Byz-DIANA: unbiased compression of differences to shifts that learn the gradients, with a robust
rule. A baseline.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_byz.aggregators import NNM, Aggregator, Chain, TrimmedMean
from lightning_byz.algorithms.base import Algorithm
from lightning_byz.compressors import Compressor, RandK
from lightning_byz.numerics.rows import Rows
from lightning_byz.types import Gradients, Payload, Round


class WorkerState(NamedTuple):
    """What a worker of Byz-DIANA remembers.

    Attributes:
        h: its shift, ``[d]``, which the server has too.
    """

    h: Tensor


class ServerState(NamedTuple):
    """What the server of Byz-DIANA remembers.

    Attributes:
        h: every worker's shift, Byzantine workers included, ``[n, d]``.
        last: the rule's last result, ``[d]``; empty unless the rule remembers it.
    """

    h: Tensor
    last: Tensor


@dataclass(frozen=True)
class ByzDIANA(Algorithm):
    """Workers send a randomly compressed difference of their gradient to a shift, which moves
    towards it by a part of what was sent.

    ``c_i = Q(grad_i - h_i)``; ``g = Agg(h_1 + c_1, ..., h_n + c_n)``; ``h_i = h_i + alpha c_i`` on
    both sides; all shifts begin at 0.

    DIANA (Mishchenko et al., arXiv 1901.09269, Algorithm 1) with a robust rule in place of its
    mean; the "BR-DIANA" that Byz-VR-MARINA (arXiv 2206.00529) and Byz-EF21-SGDM (arXiv 2409.08640)
    are compared with. ``h_i + c_i`` is unbiased, so the compression costs variance, which shrinks
    as the shifts settle, but that of the minibatches stays. With the identity compressor and
    ``alpha=1`` it is robust SGD. A worker that sends nothing counts with its shift.

    Args:
        aggregator: the robust rule.
        compressor: any unbiased compressor.
        alpha: how much of what was sent goes into the shift, in (0, 1]. Usual is 1 / (1 + omega)
            for the compressor's variance omega, which is K / d for `RandK`: 0.1 fits the default.
            From 2 / (1 + omega) on the shifts would run away; refused at the first step.
    """

    keeps_last = True
    sees_absent = True

    aggregator: Aggregator = field(default_factory=lambda: Chain(pre=(NNM(),), rule=TrimmedMean()))
    compressor: Compressor = field(default_factory=lambda: RandK(ratio=0.1))
    alpha: float = 0.1

    def __post_init__(self) -> None:
        self.check_parts()
        if not 0 < self.alpha <= 1:
            raise ValueError(
                "`alpha` is the part of what was sent that goes into the shift, in (0, 1]. Found "
                f"alpha={self.alpha}."
            )
        if not self.compressor.unbiased:
            raise ValueError(
                f"ByzDIANA needs an unbiased compressor. Found {self.compressor!r}. Use "
                "RandK(ratio=0.1) or QSGD(), or ByzEF21SGDM for a contractive one."
            )

    def codec(self, round: Round) -> Compressor:
        return self.compressor

    def init_worker(self, x: Tensor) -> WorkerState:
        omega = self.compressor.variance(len(x))
        if omega is not None and self.alpha * (1 + omega) >= 2:
            raise ValueError(
                "ByzDIANA's shifts run away unless alpha < 2 / (1 + omega). Found "
                f"alpha={self.alpha} and omega={omega:.4g}, that of {self.compressor!r} for "
                f"{len(x)} parameters. Use alpha={1 / (1 + omega):.2g}."
            )
        return WorkerState(torch.zeros_like(x))

    def rejoined(self, x: Tensor, server: ServerState, worker: int) -> WorkerState:
        return WorkerState(server.h[worker].clone())

    def worker(
        self, grads: Gradients, state: WorkerState, round: Round
    ) -> tuple[Payload, WorkerState]:
        c = self.compressor.encode(
            grads.current - state.h, round.private("compressor", state.h.device)
        )
        return c, WorkerState(state.h + self.alpha * self.compressor.decode(c, len(state.h)))

    def init_server(self, x: Tensor, n: int) -> ServerState:
        return ServerState(x.new_zeros(n, len(x)), self.init_last(x))

    def server(self, rows: Rows, state: ServerState, round: Round) -> tuple[Tensor, ServerState]:
        g = self._around(state.h, rows, 1.0)
        everybody = torch.ones(round.n, dtype=torch.bool, device=g.values.device)
        estimate, last = self.aggregate(g, state.last, round._replace(present=everybody))
        return estimate, ServerState(self._around(state.h, rows, self.alpha).values, last)

    def seen(self, rows: Rows, state: ServerState, round: Round) -> Rows:
        return self._around(state.h, rows, 1 - self.alpha)

    def _around(self, h: Tensor, rows: Rows, part: float) -> Rows:
        """``h_i + part c_i``; where a Byzantine worker makes that infinite, by sending 3e38 twice,
        its shift stays as it was.
        """
        moved = rows.with_values(torch.add(h, rows.dense(), alpha=part))
        finite = moved.finite()
        if not finite.all():
            moved.values[~finite] = h[~finite]
        return moved
