"""signSGD and SIGNUM with majority vote: one bit a coordinate, in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_byz.aggregators import Aggregator, MajorityVote
from lightning_byz.algorithms.base import Algorithm, NoState
from lightning_byz.compressors import Compressor, Identity, Sign, TernGrad
from lightning_byz.compressors.bits import at_least
from lightning_byz.numerics.rows import Rows
from lightning_byz.types import Gradients, Payload, Round


class WorkerState(NamedTuple):
    """What a worker of SIGNUM remembers.

    Attributes:
        v: momentum, ``[d]``; empty without momentum.
    """

    v: Tensor


@dataclass(frozen=True)
class SignSGDMajorityVote(Algorithm):
    """Workers send the signs of their momentum, the server the sign of their sum: d bits up, d bits
    down.

    ``v_i = beta v_i + (1 - beta) grad_i``; send ``sign(v_i)``; ``g = sign(sum_i sign(v_i))``.

    Bernstein, Zhao, Azizzadenesheli, Anandkumar, ICLR 2019 (arXiv 1810.05291), Algorithm 1: SIGNUM,
    and signSGD with momentum 0. The estimate holds +1 and -1 only, so the learning rate is the step
    of every coordinate: the paper's is 1e-4, with plain SGD without momentum. Weight decay is the
    optimizer's, and so stays outside the vote, as in the paper: ``x = x - lr (g + lambda x)``.

    A bit has no room for a 0, and coordinates whose gradient is exactly 0 for most workers (rows of
    an embedding that no batch names, unused units) move by the learning rate in every step all the
    same. By default all zeros of a round vote alike, +1 and -1 in turn: such coordinates are back
    where they were after every second step, and liars have no say in them. In the authors' code a 0
    always votes +1, and they drift by -lr in every step. ``zero="abstain"`` leaves them exactly
    where they are, for two bits a coordinate in both directions: a 0 has no vote, and where no more
    than f workers vote, the estimate is 0.

    Every worker has one vote, whatever it holds, so fewer than n / 2 colluding workers can decide a
    coordinate only where the honest ones are split. The paper's guarantee is for adversaries that
    do not cooperate.

    Args:
        aggregator: the vote. An odd number of workers knows no ties. Another rule over the signs
            may stand in its place; what it gives is then sent down as it is.
        momentum: beta, in [0, 1); 0 is signSGD. The paper's default is 0.9.
        zero: what a worker votes where its momentum is 0: "in_turn", +1 in one round and -1 in the
            next (ours); "plus_one", the authors' code's; "random", a coin of its own; or "abstain",
            nothing (ours).
    """

    aggregator: Aggregator = field(default_factory=MajorityVote)
    momentum: float = 0.9
    zero: Literal["in_turn", "plus_one", "random", "abstain"] = "in_turn"

    def __post_init__(self) -> None:
        if not isinstance(self.aggregator, Aggregator):
            raise TypeError(
                "`aggregator` should be an Aggregator, such as MajorityVote(). Found "
                f"{self.aggregator!r}."
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"`momentum` is the weight of the past, in [0, 1). Found momentum={self.momentum}."
            )
        if self.zero not in ("in_turn", "plus_one", "random", "abstain"):
            raise ValueError(
                "`zero` should be 'in_turn', 'plus_one', 'random' or 'abstain'. Found "
                f"{self.zero!r}."
            )
        if self.zero == "abstain" and isinstance(self.aggregator, MajorityVote):  # it is said once
            object.__setattr__(self, "aggregator", replace(self.aggregator, zero="abstain"))
        self.check_memory()

    @property
    def stateless(self) -> bool:
        return self.momentum == 0

    @property
    def coordinate_wise(self) -> bool:
        # whose coins, and the scale of whose payloads, are the whole vector's
        return self.zero not in ("random", "abstain")

    def averaging(self) -> SignSGDMajorityVote:
        return self.with_f(0)

    def codec(self, round: Round) -> Compressor:
        return TernGrad() if self.zero == "abstain" else Sign()

    def downlink(self, round: Round) -> Compressor:
        if not isinstance(self.aggregator, MajorityVote):
            return Identity()
        # Of -1, 0 and +1, TernGrad's two bits a coordinate keep everything; nothing is left to
        # chance.
        return TernGrad() if self.aggregator.tie == "zero" or self.zero == "abstain" else Sign()

    def init_worker(self, x: Tensor) -> WorkerState:
        return WorkerState(torch.zeros_like(x) if self.momentum else x.new_empty(0))

    def worker(
        self, grads: Gradients, state: WorkerState, round: Round
    ) -> tuple[Payload, WorkerState]:
        v = grads.current
        if self.momentum:
            v = torch.lerp(v, state.v, self.momentum, out=round.room(state.v))
            state = WorkerState(v)
        if self.zero == "random":
            generator = round.private("zero", v.device)
            coins = torch.randint(2, v.shape, generator=generator, device=v.device).to(v.dtype)
            v = torch.where(v == 0, 2 * coins - 1, v)
        elif self.zero == "abstain":  # TernGrad keeps -1, 0 and +1; nothing is left to chance
            return self.codec(round).encode(v.sign(), round.private("compressor", v.device)), state
        elif self.zero == "in_turn" and round.step % 2:
            v = torch.where(v == 0, -1, v)
        return self.codec(round).encode(v), state

    def tally(self, payloads: Sequence[Payload], rows: Rows, round: Round) -> Payload | None:
        rule, heard = self.aggregator, len(payloads)
        if (
            not isinstance(rule, MajorityVote)
            or rule.tie == "zero"
            or rule.zero == "abstain"
            or (rule.tie == "random" and heard % 2 == 0)
        ):
            return None
        rule.facing(rows, round.present)
        return at_least([bits for bits, _ in payloads], heard // 2 + 1), payloads[0][1]

    def init_server(self, x: Tensor, n: int) -> NoState:
        return NoState()

    def server(self, rows: Rows, state: NoState, round: Round) -> tuple[Tensor, NoState]:
        return self.aggregator(rows, round.present), state
