"""Byz-DM21 and Byz-VR-DM21: Byz-EF21-SGDM with a second momentum, and with variance reduction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_byz.algorithms.byz_ef21_sgdm import ByzEF21SGDM
from lightning_byz.types import Gradients, Payload, Round


class WorkerState(NamedTuple):
    """What a worker of Byz-DM21 and Byz-VR-DM21 remembers.

    Attributes:
        v: first momentum, ``[d]``.
        u: second momentum, of v, ``[d]``.
        g: the estimate of u that the server has of this worker, ``[d]``.
        rounds: rounds that it took part in, a 0-d tensor.
    """

    v: Tensor
    u: Tensor
    g: Tensor
    rounds: Tensor


@dataclass(frozen=True)
class ByzDM21(ByzEF21SGDM):
    """Byz-EF21-SGDM with double momentum: what is compressed is the momentum of the momentum.

    ``v_i = (1 - eta) v_i + eta grad_i``; ``u_i = (1 - eta) u_i + eta v_i``; ``c_i = C(u_i - g_i)``;
    ``g_i = g_i + c_i`` on both sides; ``g = Agg(g_1, ..., g_n)``.

    arXiv 2603.15144, after EF21-SGD2M (arXiv 2305.15155). Its abstract was at hand, not its text:
    the update rule is that of an independent implementation and agrees with the abstract. v_i and
    u_i start from the worker's first gradient and g_i from 0, so nothing is ever sent uncompressed
    (the authors' code sends nothing in its first round). The server half is Byz-EF21-SGDM's.

    Args:
        aggregator: the robust rule.
        compressor: any contractive compressor.
        eta: weight of the new gradient in both momenta, in (0, 1]. 1: no momentum.
    """

    def init_worker(self, x: Tensor) -> WorkerState:  # type: ignore[override]
        return WorkerState(
            torch.zeros_like(x),
            torch.zeros_like(x),
            torch.zeros_like(x),
            torch.zeros((), dtype=torch.int64),
        )

    def momentum(self, grads: Gradients, state: WorkerState) -> Tensor:
        """The new v, ``[d]``, from the second round on."""
        return torch.lerp(state.v, grads.current, self.eta)

    def worker(  # type: ignore[override]
        self, grads: Gradients, state: WorkerState, round: Round
    ) -> tuple[Payload, WorkerState]:
        if state.rounds:
            v = self.momentum(grads, state)
            u = torch.lerp(state.u, v, self.eta)
        else:
            v, u = grads.current.clone(), grads.current.clone()
        c = self.compressor.encode_difference(u, state.g, round.private("compressor", u.device))
        return c, WorkerState(v, u, state.g, state.rounds + 1)


@dataclass(frozen=True)
class ByzVRDM21(ByzDM21):
    """Byz-DM21 with local variance reduction: the first momentum is STORM's.

    ``v_i = grad_i(x_t) + (1 - eta) (v_i - grad_i(x_{t-1}))``, both gradients of the *same*
    minibatch; the rest as in `ByzDM21`. Every step takes two forward and backward passes.

    arXiv 2603.15144; the formula is that of the authors' code. A worker that was absent from the
    last round corrects its v by the last step alone; what it missed fades with 1 - eta, as all
    errors of v do.
    """

    needs_previous = True
    needs_drift = True

    def momentum(self, grads: Gradients, state: WorkerState) -> Tensor:
        # no round has given an estimate yet, so the parameters are where they were
        if grads.previous is None:
            return super().momentum(grads, state)
        return grads.current + (1 - self.eta) * (state.v - grads.previous)
