"""Attacks on messages."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byz.attacks.base import Attack, everyone


@dataclass(frozen=True)
class SignFlip(Attack):
    """Minus the honest mean, scaled: ``-scale * mean(honest)``.

    ByzFL's SignFlipping at scale 1, which is `IPM` with epsilon 1. Against the plain mean it reverses the step only if
    ``scale > h / b``, for h honest and b Byzantine workers; below that it shortens it.

    Args:
        scale: factor of the flipped mean, > 0.
    """

    scale: float = 1.0

    def __call__(self, honest: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
        return everyone(-self.scale * honest.mean(0), own)


@dataclass(frozen=True)
class IPM(Attack):
    """Inner product manipulation: ``-epsilon * mean(honest)``.

    Xie, Koyejo, Gupta, UAI 2019 (arXiv 1903.03936). A small epsilon hides among the honest rows and defeats rules that look
    at distances; epsilon > h / b reverses the mean of h honest and b Byzantine workers.

    Args:
        epsilon: factor, > 0. Byz-VR-MARINA and Byz-EF21-SGDM use 0.1; ByzFL's default is 2.
    """

    epsilon: float = 0.1

    def __call__(self, honest: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
        return everyone(-self.epsilon * honest.mean(0), own)


@dataclass(frozen=True)
class ALIE(Attack):
    """A little is enough: ``mean(honest) - z * std(honest)``, coordinate by coordinate.

    Baruch, Baruch, Goldberg, NeurIPS 2019 (arXiv 1902.06156), with the unbiased standard deviation, as in its authors' code.

    Args:
        z: how many standard deviations; None takes the paper's formula, ``Phi^-1((n - f - s) / (n - f))`` with
            ``s = floor(n / 2 + 1) - f``, which is 0 or less, no attack at all, for few workers: (5, 1), (10, 2).
    """

    z: float | None = None

    def factor(self, n: int, f: int) -> float:
        """Z for n workers of which f are Byzantine."""
        if self.z is not None:
            return self.z
        supporters = n // 2 + 1 - f
        share = (n - f - supporters) / (n - f)
        return statistics.NormalDist().inv_cdf(share) if 0 < share < 1 else 0.0

    def __call__(self, honest: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
        spread = honest.std(0) if len(honest) > 1 else torch.zeros_like(honest[0])
        return everyone(honest.mean(0) - self.factor(len(honest) + len(own), len(own)) * spread, own)


@dataclass(frozen=True)
class Gaussian(Attack):
    """Noise of its own from every Byzantine worker: ``mean + std * N(0, I)``.

    Args:
        mean: the noise's mean.
        std: its standard deviation, > 0.
    """

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, honest: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(own.shape, generator=generator, device=generator.device, dtype=torch.float32)
        return (self.mean + self.std * noise).to(device=own.device, dtype=own.dtype)


@dataclass(frozen=True)
class NotANumber(Attack):
    """All nan: a test of the border, where such a row becomes silence."""

    def __call__(self, honest: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
        return torch.full_like(own, torch.nan)
