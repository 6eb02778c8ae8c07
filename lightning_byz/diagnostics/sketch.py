"""Sketch: short vectors whose distances are those of the long ones, so that monitors need not hold
n gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_byz.types import keyed_generator

_ROWS = 8
"""So many times the sketch's size are worked on at a time: 2 MB, which stay in a core's cache."""


class Sketch:
    """A linear map of vectors ``[dim]`` to vectors ``[min(dim, size)]`` that keeps squared
    distances, in expectation, and norms.

    Coordinate i, with a random sign, is added to coordinate i mod size (a count sketch: Charikar,
    Chen, Farach-Colton, ICALP 2002; as a Johnson-Lindenstrauss map: Weinberger et al., ICML 2009,
    arXiv 0902.2206). A squared distance is off by about sqrt(2 / size) of itself, 0.55 % for
    65,536. Vectors that are no longer than that are kept as they are.

    The map is the same in all processes on the same kind of device, and in all steps of a run.

    Args:
        dim: length of the vectors.
        size: length of their sketches, at most.
        seed: seed of the signs.
    """

    def __init__(self, dim: int, size: int = 65_536, seed: int = 0) -> None:
        self.dim, self.size, self.seed = dim, min(dim, size), seed

    def new(self, *shape: int, device: torch.device) -> Tensor:
        """Sketches ``[*shape, size]`` of zeros, to `add` to."""
        return torch.zeros(*shape, self.size, device=device)

    def add(self, out: Tensor, piece: Tensor, offset: int) -> None:
        """Adds the sketch of a piece of the vectors.

        Args:
            out: ``[..., size]`` float32, what it is added to.
            piece: ``[..., k]`` coordinates offset .. offset + k - 1 of the vectors. Vectors are to
                be cut at the same places every time.
            offset: where the piece begins.
        """
        length = piece.shape[-1]
        if self.dim == self.size:
            out[..., offset : offset + length] += piece
            return
        generator = keyed_generator("sketch", self.seed, offset, device=piece.device)
        done = 0
        while done < length:
            start = (offset + done) % self.size
            take = min(length - done, self.size - start)
            rows = min(_ROWS, (length - done) // self.size) if start == 0 else 0
            take = rows * self.size if rows else take
            signed = piece[..., done : done + take] * _signs(take, generator, piece.device)
            if rows:
                out += signed.view(*signed.shape[:-1], rows, self.size).sum(-2)
            else:
                out[..., start : start + take] += signed
            done += take


def _signs(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """``[count]`` float32, +1 or -1; eight of every random byte, for drawing is what takes the
    time.
    """
    drawn = torch.randint(
        0, 256, ((count + 7) // 8, 1), generator=generator, device=device, dtype=torch.uint8
    )
    bits = (drawn >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
    return bits.flatten()[:count].float().mul_(2).sub_(1)
