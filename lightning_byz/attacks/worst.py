"""An attack that knows the rule, and looks for the lie that moves the server where it wants to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_byz.attacks.base import Attack, Scene, everyone, spread
from lightning_byz.attacks.remembering import _unit


@dataclass(frozen=True)
class WorstLie(Attack):
    """The lie, among five families, that moves the server's result the farthest along a direction.

    ``argmax <aggregate(lies), u>``. u is minus the mean of the honest messages; or leads the
    parameters back to where they began; or towards a given model. Each family has one factor x > 0.
    With m the honest mean, s the median distance of honest rows from it, and h_1, h_2, ... the
    honest rows in order of ``<h_i, u>``, the largest first, liar i sends

    * ``m + x s u``, beside the mean;
    * ``m + x std(honest) sign(u)``, as `ALIE`, with the signs of u;
    * ``h_1 + x s u``, beside the honest row that is the farthest already;
    * ``h_i + x s u``, each beside an honest row of its own;
    * ``m + x (h_i - m)``, in the span of the honest rows.

    Each family is tried with x = 1/4, 1/2, 1, 2, 4 and 8, on the server's codec, rule and state.
    Around the best three of all, smaller and smaller steps follow. It costs ``budget`` runs of the
    rule in a round, draws nothing at random, and finds a local maximum at best. No paper: a search
    of this package, after the optimized attacks of LPD-EPFL and ByzFL, which search one family for
    the largest distance from the mean.

    Args:
        goal: "mean": against the honest mean; "drift": back to the parameters of the first round,
            as in `ShiftBack`, which it learns then; "model": towards ``model``.
        model: the parameters ``[d]`` to lead to, in the order of the module's trainable ones
            (``torch.nn.utils.parameters_to_vector``), or a file that ``torch.save`` wrote them to.
        budget: runs of the rule in a round, at least 30.
    """

    goal: Literal["mean", "drift", "model"] = "mean"
    model: Tensor | str | Path | None = field(default=None, compare=False)
    budget: int = 60

    def __post_init__(self) -> None:
        if self.goal not in ("mean", "drift", "model"):
            raise ValueError(f"`goal` should be 'mean', 'drift' or 'model'. Found {self.goal!r}.")
        if (self.goal == "model") != (self.model is not None):
            raise ValueError(
                "`model` is where goal='model' leads to, and goes with no other goal. Found "
                f"goal={self.goal!r} and "
                f"{'no model' if self.model is None else 'a model'}."
            )
        if self.budget < _FAMILIES * len(_FACTORS):
            raise ValueError(
                f"`budget` should be at least {_FAMILIES * len(_FACTORS)}. Found {self.budget}."
            )

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        scene = scene or Scene()
        aggregate, direction = scene.server(self), self._direction(honest, scene)
        if len(own) == 0 or not bool(direction.any()):
            return own.clone()
        families = _families(honest, direction, len(own))

        def gain(family: int, factor: float) -> float:
            result = aggregate(families[family](factor))
            along = float(scene.agree(torch.dot(result.double(), direction.double())))
            return along if math.isfinite(along) else -math.inf

        tried = {
            (family, factor): gain(family, factor)
            for family in range(_FAMILIES)
            for factor in _FACTORS
        }
        found = sorted(tried.items(), key=lambda pair: -pair[1])[:_STARTS]
        left = self.budget - len(tried)
        for i, ((family, factor), most) in enumerate(found):
            share = left // _STARTS + (i < left % _STARTS)
            found[i] = _climbed(partial(gain, family), family, factor, most, share)
        (family, factor), _ = max(found, key=lambda pair: pair[1])
        return families[family](factor)

    def _direction(self, honest: Tensor, scene: Scene) -> Tensor:
        """Where the result is to go, ``[d]`` of length 1; 0 if there is no such direction."""
        if self.goal == "mean":
            return -_unit(honest.mean(0))
        x = scene.parameters(self)
        if self.goal == "drift":
            if "x_0" not in scene.memory:
                scene.memory["x_0"] = x.clone()
            return _unit((x - scene.memory["x_0"]).to(honest))
        model = self.model if isinstance(self.model, Tensor) else _read(str(self.model))
        if model.shape != x.shape:
            raise ValueError(
                f"`model` should hold the trainable parameters [d] = {list(x.shape)}. Found "
                f"{list(model.shape)}."
            )
        return _unit((x - model.to(x)).to(honest))


def _climbed(
    gain: Callable[[float], float], family: int, factor: float, most: float, evaluations: int
) -> tuple[tuple[int, float], float]:
    """The best factor near this one, and what it gains: smaller and smaller steps."""
    step = 2.0**0.5
    while evaluations > 0:
        for near in (factor * step, factor / step)[:evaluations]:
            found, evaluations = gain(near), evaluations - 1
            if found > most:
                factor, most = near, found
                break
        else:
            step **= 0.5
    return (family, factor), most


_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_FAMILIES = 5
_STARTS = 3


def _families(honest: Tensor, u: Tensor, b: int) -> list[Callable[[float], Tensor]]:
    """From a factor to the lies ``[b, d]``."""
    mean, deviation = honest.mean(0), spread(honest) * u.sign()
    step = torch.linalg.vector_norm(honest - mean, dim=1).median() * u
    order = (honest @ u).argsort(descending=True, stable=True)
    farthest = honest[order[torch.arange(b, device=order.device) % len(order)]]
    return [
        lambda x: everyone(mean + x * step, farthest),
        lambda x: everyone(mean + x * deviation, farthest),
        lambda x: everyone(farthest[0] + x * step, farthest),
        lambda x: farthest + x * step,
        lambda x: mean + x * (farthest - mean),
    ]


@cache
def _read(path: str) -> Tensor:
    """A vector that torch.save wrote."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, Tensor) or found.ndim != 1:
        raise ValueError(
            f"{path} should hold a vector of parameters, as torch.save(parameters_to_vector("
            f"model.parameters()), path) writes it. Found {type(found).__name__}."
        )
    return found
