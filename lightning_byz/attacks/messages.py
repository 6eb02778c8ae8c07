"""Attacks on messages."""

from __future__ import annotations

import statistics
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_byz.attacks.base import Attack, Scene, everyone, spread
from lightning_byz.numerics.rows import Rows


@dataclass(frozen=True)
class SignFlip(Attack):
    """Minus the honest mean, scaled: ``-scale * mean(honest)``.

    ByzFL's SignFlipping at scale 1, which is `IPM` with epsilon 1. Against the plain mean it
    reverses the step only if ``scale > h / b``, for h honest and b Byzantine workers; below that it
    shortens it. No paper: folklore.

    Args:
        scale: factor of the flipped mean, > 0.
    """

    scale: float = 1.0

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        return everyone(-self.scale * honest.mean(0), own)


@dataclass(frozen=True)
class IPM(Attack):
    """Inner product manipulation: ``-epsilon * mean(honest)``.

    Xie, Koyejo, Gupta, UAI 2019 (arXiv 1903.03936). A small epsilon hides among the honest rows and
    defeats rules that look at distances; epsilon > h / b reverses the mean of h honest and b
    Byzantine workers.

    Args:
        epsilon: factor, > 0. Byz-VR-MARINA and Byz-EF21-SGDM use 0.1; ByzFL's default is 2.
    """

    epsilon: float = 0.1

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        return everyone(-self.epsilon * honest.mean(0), own)


@dataclass(frozen=True)
class ALIE(Attack):
    """A little is enough: ``mean(honest) - z * std(honest)``, coordinate by coordinate.

    Baruch, Baruch, Goldberg, NeurIPS 2019 (arXiv 1902.06156), with the unbiased standard deviation,
    as in its authors' code.

    Args:
        z: how many standard deviations; None takes the paper's formula,
            ``Phi^-1((n - f - s) / (n - f))`` with ``s = floor(n / 2 + 1) - f``, which is 0 or less,
            no attack at all, for few workers: (5, 1), (10, 2).
    """

    z: float | None = None

    def factor(self, n: int, f: int) -> float:
        """Z for n workers of which f are Byzantine."""
        if self.z is not None:
            return self.z
        supporters = n // 2 + 1 - f
        share = (n - f - supporters) / (n - f)
        return statistics.NormalDist().inv_cdf(share) if 0 < share < 1 else 0.0

    def check(self, byzantine: Sequence[int], n: int) -> None:
        z = self.factor(n, len(byzantine))
        if byzantine and self.z is None and z <= 0:
            warnings.warn(
                f"ALIE() is no attack with {len(byzantine)} of n={n} workers: the paper's formula "
                f"gives z={z:.3g}, and workers that lie by it send the honest mean, or help. Give "
                "z, such as ALIE(z=1.5), or more Byzantine workers.",
                stacklevel=1,  # one place, whoever checks: said once
            )

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        return everyone(
            honest.mean(0) - self.factor(len(honest) + len(own), len(own)) * spread(honest), own
        )


@dataclass(frozen=True)
class Gaussian(Attack):
    """Noise of its own from every Byzantine worker: ``mean + std * N(0, I)``.

    Blanchard et al., NeurIPS 2017 (arXiv 1703.02757), test Krum with it.

    Args:
        mean: the noise's mean.
        std: its standard deviation, > 0.
    """

    mean: float = 0.0
    std: float = 1.0

    @property
    def alone(self) -> bool:
        return True

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        generator = (scene or Scene()).generator
        noise = torch.randn(
            own.shape, generator=generator, device=generator.device, dtype=torch.float32
        )
        return noise.mul_(self.std).add_(self.mean).to(device=own.device, dtype=own.dtype)


@dataclass(frozen=True)
class NotANumber(Attack):
    """All nan: a test of the border, where such a row becomes silence. No paper: a test."""

    @property
    def alone(self) -> bool:
        return True

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        return torch.full_like(own, torch.nan)


@dataclass(frozen=True)
class Infinity(Attack):
    """All inf, or all -inf: a test of the border, where such a row becomes silence.

    No paper: a test.

    Args:
        negative: send -inf.
    """

    negative: bool = False

    @property
    def alone(self) -> bool:
        return True

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        return torch.full_like(own, -torch.inf if self.negative else torch.inf)


@dataclass(frozen=True)
class Huge(Attack):
    """The same huge finite number everywhere: a test of rules' arithmetic.

    No paper: a test.

    Args:
        value: the number; finite in the dtype of the messages, or it is `Infinity`.
    """

    value: float = 1e30

    @property
    def alone(self) -> bool:
        return True

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        return torch.full_like(own, self.value)


@dataclass(frozen=True)
class Zero(Attack):
    """Zeros: a worker that contributes nothing, and shortens the mean. No paper: a test."""

    @property
    def alone(self) -> bool:
        return True

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        return torch.zeros_like(own)


@dataclass(frozen=True)
class BitFlip(Attack):
    """Minus what each would have sent had it been honest: ``-own_i``. No collusion, no knowledge of
    others.

    The "bit flip" of Karimireddy et al. (arXiv 2006.09365) and of Byz-VR-MARINA, and the sign
    inversion of signSGD's experiments.
    """

    @property
    def alone(self) -> bool:
        return True

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        return -own


@dataclass(frozen=True)
class RandomSign(Attack):
    """Each worker's own message with a random sign at every coordinate: the randomising adversary
    of signSGD (arXiv 1810.05291).
    """

    @property
    def alone(self) -> bool:
        return True

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        generator = (scene or Scene()).generator
        heads = torch.rand(own.shape, generator=generator, device=generator.device) < 0.5
        return torch.where(heads.to(own.device), own, -own)


@dataclass(frozen=True)
class AntiCGE(Attack):
    """Against `CGE`: as long as a vector may be that is sure to be kept, and opposite to the honest
    ones that are kept beside it.

    Minus the sum of the h - f honest messages of smallest norm, at a norm just below that of the
    next. An attack of LPD-EPFL's ByzantineMomentum code (``anticge``), which counts the smallest
    one twice in that sum; here every one counts once. No paper: LPD-EPFL's code.

    Args:
        f: the f of the server's rule. None: the number of Byzantine workers.
    """

    f: int | None = None

    def __post_init__(self) -> None:
        if self.f is not None and self.f < 0:
            raise ValueError(
                f"`f`, that of the server's rule, should be at least 0. Found f={self.f}."
            )

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        h, f = len(honest), len(own) if self.f is None else self.f
        norms, order = torch.linalg.vector_norm(honest, dim=1, dtype=torch.float64).sort(
            stable=True
        )
        kept = max(1, h - f)  # of the honest ones, if all liars are kept
        message = -honest[order[:kept]].mean(0)
        length = torch.linalg.vector_norm(message, dtype=torch.float64)
        limit = (1 - 1e-6) * norms[min(kept, h - 1)]
        return everyone((message * torch.where(length > 0, limit / length, 0.0)).to(own.dtype), own)


_DIRECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "std": lambda honest, mean: spread(honest),
    "sign": lambda honest, mean: mean.sign(),
    "unit": lambda honest, mean: (
        mean / torch.linalg.vector_norm(mean).clamp_min(torch.finfo(mean.dtype).tiny)
    ),
}


@dataclass(frozen=True)
class _Hiding(Attack):
    """``mean(honest) - gamma * p`` with the largest gamma that still hides among the honest
    messages.

    Args:
        direction: p: "std", the honest standard deviation; "sign" of the mean; "unit", the mean at
            length 1.
    """

    direction: Literal["std", "sign", "unit"] = "std"

    def __post_init__(self) -> None:
        if self.direction not in _DIRECTIONS:
            raise ValueError(
                f"`direction` should be one of {', '.join(_DIRECTIONS)}. Found {self.direction!r}."
            )

    @abstractmethod
    def gamma(self, pairs: Tensor, to_mean: Tensor, along: Tensor, square: Tensor) -> Tensor:
        """The largest gamma.

        Args:
            pairs: ``[h, h]`` squared distances of the honest messages.
            to_mean: ``[h]`` ``||mean - h_i||^2``.
            along: ``[h]`` ``<p, mean - h_i>``.
            square: ``||p||^2``.
        """

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        mean = honest.mean(0)
        p = _DIRECTIONS[self.direction](honest, mean)
        offsets, wide = (mean - honest).double(), p.double()
        square = wide @ wide
        if not square > 0:
            return everyone(mean, own)
        gamma = self.gamma(
            Rows(honest).squared_distances(), (offsets**2).sum(1), offsets @ wide, square
        )
        return everyone(mean - gamma.to(mean.dtype) * p, own)


@dataclass(frozen=True)
class MinMax(_Hiding):
    """As far from the honest mean as no farther from any honest message than two of these are from
    each other.

    Shejwalkar, Houmansadr, NDSS 2021. The largest gamma is computed exactly, where the authors'
    code halves steps until it is known to 1e-5.
    """

    def gamma(self, pairs: Tensor, to_mean: Tensor, along: Tensor, square: Tensor) -> Tensor:
        # ||mean - gamma p - h_i||^2 = to_mean_i - 2 gamma along_i + gamma^2 square <= max pairs
        return (
            (along + (along**2 + square * (pairs.max() - to_mean).clamp_min(0)).sqrt()) / square
        ).min()


@dataclass(frozen=True)
class MinSum(_Hiding):
    """As far from the honest mean as its summed squared distance to the honest messages is no
    larger than an honest message's.

    Shejwalkar, Houmansadr, NDSS 2021. The largest gamma is computed exactly.

    Args:
        bound: the honest message to stay below: "min", the one with the smallest sum, as in the
            authors' code; or "max".
    """

    bound: Literal["min", "max"] = "min"

    def gamma(self, pairs: Tensor, to_mean: Tensor, along: Tensor, square: Tensor) -> Tensor:
        # sum_i ||mean - gamma p - h_i||^2 = sum to_mean + h gamma^2 square, because the offsets
        # from the mean add up to 0
        limit = pairs.sum(1).min() if self.bound == "min" else pairs.sum(1).max()
        return ((limit - to_mean.sum()).clamp_min(0) / (len(to_mean) * square)).sqrt()
