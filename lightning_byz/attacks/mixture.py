"""Several attacks at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lightning_byz.attacks.base import Attack, Scene, checked_lies


@dataclass(frozen=True)
class Mixture(Attack):
    """Several attacks at once, each by a part of the Byzantine workers.

    The parts choose in order, and each knows the honest messages and its own workers only (ALIE's
    formula, say, counts those). One that tries its lies on the server finds there what the parts
    before it have chosen, and the honest messages of those after it. No paper: a composition.

    Args:
        parts: the attacks on messages. A `DataAttack` takes a ByzantineWorkers of its own.
        counts: how many Byzantine workers each part has, in the order of their indices. None: as
            equal as can be, the first ones having more.
    """

    parts: Sequence[Attack] = ()
    counts: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not self.parts or not all(isinstance(part, Attack) for part in self.parts):
            raise ValueError(
                "Mixture takes attacks on messages, such as Mixture(parts=(ALIE(1.5), "
                "SignFlip())); a DataAttack goes into a ByzantineWorkers of its own. Found "
                f"parts={self.parts!r}."
            )
        if self.counts is not None and (
            len(self.counts) != len(self.parts) or min(self.counts) < 1
        ):
            raise ValueError(
                f"`counts` should give each of the {len(self.parts)} parts at least one worker. "
                f"Found counts={list(self.counts)}."
            )
        object.__setattr__(self, "parts", tuple(self.parts))
        object.__setattr__(self, "counts", None if self.counts is None else tuple(self.counts))

    def shares(self, b: int) -> list[range]:
        """Each part's workers, as positions among the b Byzantine ones."""
        if self.counts is None:
            k = len(self.parts)
            counts: Sequence[int] = [b // k + (i < b % k) for i in range(k)]
        else:
            counts = self.counts
            if sum(counts) != b:
                raise ValueError(
                    f"The `counts` of a Mixture should add up to the {b} Byzantine workers. Found "
                    f"{list(counts)}."
                )
        ends = list(accumulate(counts))
        return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]

    @property
    def alone(self) -> bool:
        return all(part.alone for part in self.parts)

    def forges(self, b: int) -> list[bool]:
        return [
            answer
            for part, share in zip(self.parts, self.shares(b), strict=True)
            for answer in part.forges(len(share))
        ]

    def check(self, byzantine: Sequence[int], n: int) -> None:
        b = len(byzantine)
        if b < len(self.parts):
            raise ValueError(
                f"A Mixture of {len(self.parts)} parts needs at least one Byzantine worker for "
                f"each. Found {b}."
            )
        for part, share in zip(self.parts, self.shares(b), strict=True):
            part.check([byzantine[position] for position in share], n)

    def __call__(self, honest: Tensor, own: Tensor, scene: Scene | None = None) -> Tensor:
        scene = scene or Scene()
        workers = list(range(len(own)) if scene.own is None else scene.own)
        byzantine = list(workers if scene.byzantine is None else scene.byzantine)
        lies = own.clone()
        for i, (part, share) in enumerate(
            zip(self.parts, self.shares(len(byzantine)), strict=True)
        ):
            members = [byzantine[position] for position in share]
            here = [row for row, worker in enumerate(workers) if worker in members]
            rows = torch.tensor(here, dtype=torch.int64, device=own.device)
            memory = _within(scene.memory, i)
            view = dataclasses.replace(
                scene,
                memory=memory,
                own=[workers[row] for row in here],
                byzantine=members,
                aggregate=None
                if scene.aggregate is None
                else _of_part(scene.aggregate, lies, rows),
            )
            lies[rows] = checked_lies(part, part(honest, own[rows], view), own[rows])
            for name in [name for name in scene.memory if name.startswith(f"{i}/")]:
                del scene.memory[name]
            scene.memory.update({f"{i}/{name}": value for name, value in memory.items()})
        return lies


def _within(memory: dict[str, Tensor], part: int) -> dict[str, Tensor]:
    """What this part remembers."""
    prefix = f"{part}/"
    return {
        name.removeprefix(prefix): value
        for name, value in memory.items()
        if name.startswith(prefix)
    }


def _of_part(
    aggregate: Callable[[Tensor], Tensor], lies: Tensor, rows: Tensor
) -> Callable[[Tensor], Tensor]:
    """The server, for a part that tries lies of its own next to the others'."""
    return lambda candidate: aggregate(lies.index_copy(0, rows, candidate))
