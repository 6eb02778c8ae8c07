"""Silent hardware and software faults: no worker colludes, and nothing raises an error.

A faulty worker spoils its own message or its own data, and is silent where an honest one would be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byz.attacks.base import Attack, Scene
from lightning_byz.attacks.data import LabelAttack

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fault(Attack):
    """Something that happens to each worker's own message."""

    @property
    def alone(self) -> bool:
        return True

    def forges(self, b: int) -> list[bool]:
        return [False] * b


@dataclass(frozen=True)
class FlippedBit(Fault):
    """One bit of one number of the worker's own message is flipped, at a place drawn anew in every
    round.

    No paper: a fault.

    Args:
        bit: which bit of the number, 0 for the lowest of the mantissa; negative ones count from the
            top, for any dtype: -1 is the sign, -2 the highest of the exponent, which makes of a
            number below 1 one near the largest. None: drawn too.
        position: which coordinate of the message, for a defect that stays where it is. None: drawn.
    """

    bit: int | None = -2
    position: int | None = None

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        generator = (scene or Scene()).generator
        (b, d), width = own.shape, 8 * own.element_size()
        if self.bit is not None and not -width <= self.bit < width:
            raise ValueError(
                f"`bit` should be in -{width} .. {width - 1} for messages of {own.dtype}. Found "
                f"bit={self.bit}."
            )
        if self.position is not None and not 0 <= self.position < d:
            raise ValueError(
                f"`position` should be a coordinate, in 0 .. {d - 1}. Found "
                f"position={self.position}."
            )
        places = torch.randint(d, (b,), generator=generator, device=generator.device)
        bits = torch.randint(width, (b,), generator=generator, device=generator.device)
        if self.position is not None:
            places.fill_(self.position)
        if self.bit is not None:
            bits.fill_(self.bit % width)
        lies = own.clone()
        raw, rows = lies.view(_INTEGERS[own.element_size()]), torch.arange(b, device=own.device)
        places = places.to(own.device)
        masks = torch.ones_like(raw[:, 0]) << bits.to(raw)
        raw[rows, places] = raw[rows, places] ^ masks
        return lies


@dataclass(frozen=True)
class Stuck(Fault):
    """The worker repeats its last message: the one of the first round in which it is stuck, which
    is still as it should be.

    No paper: a fault.
    """

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        scene = scene or Scene()
        workers = range(len(own)) if scene.own is None else scene.own
        rows = [
            scene.memory.setdefault(str(worker), row.clone()).to(own)
            for worker, row in zip(workers, own, strict=True)
        ]
        return torch.stack(rows) if rows else own.clone()


@dataclass(frozen=True)
class WrongScale(Fault):
    """The worker's own message times a factor: a loss scale that was never taken out, a sum where a
    mean should be.

    No paper: a fault.

    Args:
        factor: the factor. The default is the scale that PyTorch's GradScaler starts with.
    """

    factor: float = 65536.0

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        return self.factor * own


@dataclass(frozen=True)
class ShuffledLabels(LabelAttack):
    """The worker reads inputs and labels in different orders: every label is that of another sample
    of the batch.

    Labels are exchanged along one cycle through all samples, drawn anew in every step. A batch of
    one sample stays as it is. No paper: a fault.

    Args:
        key: where a batch keeps its labels: the index in a tuple or list, the key in a mapping, or
            the name of an attribute.

    Raises:
        ValueError: for labels without a dimension of samples.
    """

    key: int | str = 1

    def relabel(self, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        if labels.ndim == 0:
            raise ValueError(
                "ShuffledLabels exchanges labels along their first dimension. Found one number "
                f"at batch[{self.key!r}]. Set `key` to where the labels are."
            )
        cycle = torch.randperm(len(labels), generator=generator).to(labels.device)
        return labels.index_copy(0, cycle, labels[cycle.roll(1)])
