"""Bucketing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_byz.aggregators.base import PreAggregator
from lightning_byz.numerics.rows import Rows


@dataclass(frozen=True)
class Bucketing(PreAggregator):
    """Puts the rows at random into buckets of s and replaces each bucket by its mean.

    Karimireddy, He, Jaggi, ICLR 2022 (arXiv 2006.09365); Algorithm 2 of arXiv 2311.14127. Up to f
    of the ceil(n / s) buckets hold a Byzantine row, so the rule behind it has to tolerate f of so
    many. A last bucket that is short is divided by its true size, as in the authors' code; the
    paper divides by s.

    The order is drawn from ``rows.generator``, which a run sets anew in every round, the same on
    every rank. Rows without one (a plain matrix) are always shuffled the same way.

    Args:
        s: rows in a bucket, at least 1. 2 is the papers' choice.
    """

    needs_f: ClassVar[bool] = False

    s: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.s < 1:
            raise ValueError(
                f"`s`, the number of rows in a bucket, should be at least 1. Found s={self.s}."
            )

    def count(self, n: int) -> int:
        return -(-n // self.s)

    def most_f(self, n: int) -> int:
        return (self.count(n) - 1) // 2

    def prepare(self, rows: Rows) -> Rows:
        n = len(rows)
        order = torch.randperm(n, generator=rows.stream, device=rows.stream.device).cpu()
        weights = torch.zeros(self.count(n), n, dtype=torch.float64)
        for i, bucket in enumerate(torch.split(order, self.s)):
            weights[i, bucket] = 1 / len(bucket)
        return rows.mix(weights)
