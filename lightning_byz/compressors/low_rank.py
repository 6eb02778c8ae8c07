"""Low rank: the vector as a matrix, and that as a product of two thin ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byz.compressors.base import Compressor, Field
from lightning_byz.numerics.finite import all_finite
from lightning_byz.types import Payload


@dataclass(frozen=True)
class LowRank(Compressor):
    """Projects the vector, as a matrix M, onto r of its directions: sends P and ``Q = M^T P``, and
    ``P Q^T`` stands for M.

    In the manner of PowerSGD (Vogels, Karimireddy, Jaggi, NeurIPS 2019, arXiv 1905.13727, algorithm
    1): P is an orthonormal basis of ``M S`` for a sketch S, r columns of Gaussian noise. Two
    deviations make it a compressor without state, for any vector:

    * M is the flat vector of all parameters, filled up with zeros to a nearly square matrix with
      ``ceil(sqrt(d))`` rows, where PowerSGD has a matrix for every layer. ``PerTensor(LowRank())``
      makes one for every parameter (nearly square too, not in the parameter's shape).
    * S is drawn anew in each round, where PowerSGD starts from the last round's Q (the warm start).
      More ``iterations`` stand in for it.

    A worker's P is its own, so messages are not summed on the way, as PowerSGD's all-reduce does: a
    robust rule needs each worker's.

    Contractive with alpha = r / p, where p is the smaller side of M. (``C(x)`` is an orthogonal
    projection. The expected leverage scores of the singular directions of M sum to r, and are
    larger where singular values are, as those of two directions trade places with the rows of the
    sketch; so by Chebyshev's sum inequality the projection keeps at least the share r / p of
    ``||x||^2`` on average. It is exactly that if all singular values are equal; gradients of low
    rank lose far less.) The argument is for exact arithmetic: in half precision, rounding P and Q
    adds its own error.

    Args:
        rank: r, the number of columns of P and Q; capped at p, where the compressor is exact but
            for rounding.
        iterations: power iterations: how often M and its transpose are applied to find the basis, 1
            as in PowerSGD. Each further one costs two more products with M, and follows the largest
            singular directions better.
    """

    rank: int = 4
    iterations: int = 1

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("iterations", self.iterations)):
            if value < 1:
                raise ValueError(f"`{name}` should be at least 1. Found {name}={value}.")

    def shape(self, dim: int) -> tuple[int, int, int]:
        """Rows and columns of M for vectors of ``dim`` numbers, and the rank of what is sent."""
        rows = math.isqrt(dim - 1) + 1
        columns = -(-dim // rows)
        return rows, columns, min(self.rank, columns)

    def layout(self, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
        rows, columns, rank = self.shape(dim)
        return Field((rows, rank), dtype), Field((columns, rank), dtype)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        if generator is None:
            raise ValueError(
                "LowRank draws a sketch from a generator. Found generator=None. Pass "
                "torch.Generator().manual_seed(...), or round.private('compressor') inside an "
                "algorithm."
            )
        rows, columns, rank = self.shape(len(x))
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale = torch.linalg.vector_norm(x, torch.inf).to(dtype).clamp_min(torch.finfo(dtype).tiny)
        m = torch.nn.functional.pad(x.to(dtype) / scale, (0, rows * columns - len(x))).view(
            rows, columns
        )
        q = torch.randn(
            columns, rank, generator=generator, device=generator.device, dtype=dtype
        ).to(x.device)
        for _ in range(self.iterations):
            p = torch.linalg.qr(m @ q).Q
            q = m.T @ p
        largest = self._largest(x.dtype, rank)
        return p.clamp(-1, 1).to(x.dtype), (q * scale).clamp(-largest, largest).to(x.dtype)

    def decode(self, payload: Payload, dim: int) -> Tensor:
        p, q = payload
        return (p @ q.T).view(-1)[:dim]

    @staticmethod
    def _largest(dtype: torch.dtype, rank: int) -> float:
        """The largest entry of Q with which no product with P, of entries up to 1, overflows."""
        return torch.finfo(dtype).max / (2 * rank)

    def valid(self, payload: Payload, dim: int) -> Tensor:
        p, q = payload
        bounded = (p.abs() <= 1).all() & (q.abs() <= self._largest(q.dtype, q.shape[1])).all()
        return all_finite(p) & all_finite(q) & bounded

    def contraction(self, dim: int) -> float:
        _, columns, rank = self.shape(dim)
        return rank / columns
