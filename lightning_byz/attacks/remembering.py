"""Attacks that remember earlier rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byz.attacks.base import Attack, Scene, everyone


def _unit(v: Tensor) -> Tensor:
    """``v / ||v||``; 0 for 0."""
    unit: Tensor = v / torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny)
    return unit


@dataclass(frozen=True)
class Mimic(Attack):
    """All send what one honest worker sends, and so give its data a weight that it should not have.

    Karimireddy, He, Jaggi, ICLR 2022 (arXiv 2006.09365). It harms where workers hold different
    data, and no rule can tell it from honesty. Whom to mimic is learned in the first ``warmup``
    rounds, as in the authors' code: a direction z in which the honest messages differ most, by one
    step of a power iteration a round around their running mean; the target is
    ``argmax_i <h_i, z>``, chosen anew in each of these rounds and kept from then on. In a round in
    which the target does not take part, they mimic the one that z picks.

    Args:
        warmup: rounds until the target is kept, at least 1.
        target: the worker to mimic, known beforehand; nothing is learned then, and where it does
            not take part, they send the honest mean. ByzFL's Mimic has the first worker.
    """

    warmup: int = 1
    target: int | None = None

    def __post_init__(self) -> None:
        if self.warmup < 1 or (self.target is not None and self.target < 0):
            raise ValueError(
                "Mimic needs warmup >= 1 and a worker's index as `target`, or None. Found "
                f"{self!r}."
            )

    def check(self, byzantine: Sequence[int], n: int) -> None:
        if self.target is not None and (self.target >= n or self.target in byzantine):
            raise ValueError(
                f"Mimic's `target` should be an honest one of the n={n} workers. Found "
                f"target={self.target}, and {list(byzantine)} are Byzantine."
            )

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        scene = scene or Scene()
        memory, workers = (
            scene.memory,
            list(range(len(honest)) if scene.honest is None else scene.honest),
        )
        rounds = int(memory["rounds"]) if "rounds" in memory else 0
        learning = self.target is None and rounds < self.warmup
        target = self.target if self.target is not None or learning else int(memory["target"])
        if target in workers:
            return everyone(honest[workers.index(target)], own)
        if self.target is not None:
            return everyone(honest.mean(0), own)
        if learning:
            self._learn(honest, memory, rounds)
        row = int(scene.agree((honest @ memory["z"].to(honest)).argmax()))
        if learning:
            memory.update(target=torch.tensor(workers[row]), rounds=torch.tensor(rounds + 1))
            if rounds + 1 == self.warmup:
                del memory["mu"]
        return everyone(honest[row], own)

    @staticmethod
    def _learn(honest: Tensor, memory: dict[str, Tensor], t: int) -> None:
        """One round of the power iteration: mu and z."""
        mean = honest.mean(0)
        if t == 0:
            mu, z = (
                mean,
                torch.randn(len(mean), generator=torch.Generator().manual_seed(0)).to(mean),
            )
        else:
            z = memory["z"].to(mean)
            mu = t / (1 + t) * memory["mu"].to(mean) + mean / (1 + t)
        offsets = honest - mu
        step = _unit((offsets @ z) @ offsets)
        memory.update(mu=mu, z=step if t == 0 else _unit(t / (1 + t) * z + step / (1 + t)))


@dataclass(frozen=True)
class ShiftBack(Attack):
    """Where Byzantine workers are the majority of those that take part, they pull the model back to
    where it was; else they behave.

    From the paper of Byz-VR-MARINA-PP, NeurIPS 2024 (arXiv 2311.14127): under partial participation
    a sampled cohort may have more Byzantine than honest workers, and no rule can help. A strict
    majority sends the gradient ``scale * (x - x_0)``, whose SGD step moves the model by
    ``-lr * scale * (x - x_0)``; otherwise they send the mean of the honest messages. x_0: the
    parameters in the first round of the attack. (The authors' code averages all honest messages
    there, this those of the workers that take part.)

    Args:
        scale: the authors' ``mult / lr``: 1 is their choice for a9a, 2 / lr overshoots x_0 as far
            as the model had come.
    """

    scale: float = 1.0

    @property
    def alone(self) -> bool:
        return True

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        scene = scene or Scene()
        x = scene.parameters(self).to(own)
        start = scene.memory.setdefault("x_0", x.clone()).to(own)
        message = self.scale * (x - start) if len(own) > len(honest) else honest.mean(0)
        return everyone(message, own)
