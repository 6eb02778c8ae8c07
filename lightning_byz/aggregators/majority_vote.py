"""The vote of signSGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_byz.aggregators.base import ColumnwiseAggregator
from lightning_byz.numerics.order_statistics import ColumnStatistic
from lightning_byz.numerics.rows import Rows


@dataclass(frozen=True)
class MajorityVote(ColumnwiseAggregator):
    """The sign of the sum of the rows' signs, coordinate by coordinate: +1 or -1.

    Bernstein, Zhao, Azizzadenesheli, Anandkumar, ICLR 2019 (arXiv 1810.05291). Needs n > 2f.

    Args:
        zero: what a 0 votes: "plus_one", as in the authors' code, whose bit is 1 for values below
            0; or "abstain", neither (ours). Then the result is 0 where no more than f rows vote,
            who may all be liars.
        tie: what an even number of rows gives that are divided: "plus_one", as the authors' code
            does, "zero", or "random": a coin for every coordinate, from the round's stream.
    """

    tie: Literal["plus_one", "zero", "random"] = "plus_one"
    zero: Literal["plus_one", "abstain"] = "plus_one"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tie not in ("plus_one", "zero", "random"):
            raise ValueError(f"`tie` should be 'plus_one', 'zero' or 'random'. Found {self.tie!r}.")
        if self.zero not in ("plus_one", "abstain"):
            raise ValueError(f"`zero` should be 'plus_one' or 'abstain'. Found {self.zero!r}.")

    @property
    def coordinate_wise(self) -> bool:
        return self.tie != "random"

    def aggregate(self, rows: Rows) -> Tensor:
        if self.zero == "plus_one":
            return self._without_ties(super().aggregate(rows), rows)
        assert self.f is not None
        f = self.f
        vote = rows.map(lambda block: block.sign().sum(0).sign())
        used = rows.map(lambda block: ((block != 0).sum(0) > f).to(block.dtype))
        return self._without_ties(vote, rows) * used

    def statistic(self, rows: Rows) -> ColumnStatistic:
        return ColumnStatistic("vote", tie=1.0 if self.tie == "plus_one" else 0.0)

    def at_once(self, rows: Rows) -> Tensor | None:
        if self.zero != "plus_one" or self.tie == "random":
            return None
        self.check(len(rows))
        return None if rows.shares is not None else rows.map_if_finite(self.statistic(rows))

    def _without_ties(self, vote: Tensor, rows: Rows) -> Tensor:
        """The vote ``[d_local]``, whose ties are 0, with what they give."""
        if self.tie == "plus_one":
            return torch.where(vote == 0, 1, vote)
        if self.tie == "random":
            stream, dim = rows.stream, len(vote) if rows.dim is None else rows.dim
            coins = torch.randint(2, (dim,), generator=stream, device=stream.device)
            coins = torch.cat([coins[first:last] for first, last in rows.spans or ((0, dim),)])
            return torch.where(vote == 0, (2 * coins - 1).to(vote), vote)
        return vote
