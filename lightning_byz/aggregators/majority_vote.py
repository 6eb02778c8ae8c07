"""The vote of signSGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_byz.aggregators.base import Aggregator
from lightning_byz.rows import Rows


@dataclass(frozen=True)
class MajorityVote(Aggregator):
    """The sign of the sum of the rows' signs, coordinate by coordinate: +1 or -1.

    Bernstein, Zhao, Azizzadenesheli, Anandkumar, ICLR 2019 (arXiv 1810.05291). Needs n > 2f, and does not use f otherwise. A zero votes +1,
    as in the authors' code, whose bit is 1 for values below 0.

    Args:
        tie: what an even number of rows gives that are divided: "plus_one", as the authors' code does, "zero", or "random": a coin for
            every coordinate, from the round's stream.
    """

    tie: Literal["plus_one", "zero", "random"] = "plus_one"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tie not in ("plus_one", "zero", "random"):
            raise ValueError(f"`tie` should be 'plus_one', 'zero' or 'random'. Found {self.tie!r}.")

    @property
    def coordinate_wise(self) -> bool:
        return self.tie != "random"

    def aggregate(self, rows: Rows) -> Tensor:
        n, tie = len(rows), self.tie
        vote = rows.map(lambda block: (n - 2 * (block < 0).sum(0)).sign().to(block.dtype))
        if tie == "plus_one":
            return torch.where(vote == 0, 1, vote)
        if tie == "random":
            stream, dim = rows.stream, len(vote) if rows.dim is None else rows.dim
            coins = torch.randint(2, (dim,), generator=stream, device=stream.device)
            coins = torch.cat([coins[first:last] for first, last in rows.spans or ((0, dim),)])
            return torch.where(vote == 0, (2 * coins - 1).to(vote), vote)
        return vote
