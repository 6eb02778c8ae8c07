"""Parameters that too few workers use: they never move, and nobody would notice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_PATIENCE, _FIRST, _EVERY = 3, 20, 100


class FewUsers:
    """Finds parameters that some local worker has gradients of, round after round, and never more
    than f workers have.

    The rule's result counts for a parameter only where more than f workers have a gradient of it: f
    of them may be liars. A head that a single worker's data use, say, stays as it was initialized.
    """

    def __init__(self) -> None:
        self._rounds = 0
        self._waiting: dict[Tensor, int] = {}
        self._moved: set[Tensor] = set()
        self._told = False

    def observe(
        self, parameters: Sequence[Tensor], wanted: Sequence[Tensor], used: Tensor
    ) -> list[Tensor]:
        """Takes in a round that gave an estimate: the first 20, and then every 100th.

        Args:
            parameters: the P of the optimizer.
            wanted: ``[P]`` bool, for each local worker, of which it has gradients.
            used: ``[P]`` bool, of which more than f workers have.

        Returns:
            once, those that were wanted three times and never used; else nothing.
        """
        self._rounds += 1
        if self._told or (self._rounds > _FIRST and self._rounds % _EVERY):
            return []
        self._moved.update(p for p, moves in zip(parameters, used.tolist(), strict=True) if moves)
        stuck = torch.stack([*wanted]).any(0).cpu() & ~used.cpu()
        for place in stuck.nonzero().flatten().tolist():
            self._waiting[parameters[place]] = self._waiting.get(parameters[place], 0) + 1
        found = [
            p for p, rounds in self._waiting.items() if rounds >= _PATIENCE and p not in self._moved
        ]
        self._told = bool(found)
        return found


def described(found: Sequence[Tensor], module: nn.Module, f: int) -> str:
    """What to say about them."""
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    shown = [names.get(p, "one without a name") for p in found]
    more = f" and {len(shown) - 10} more" if len(shown) > 10 else ""
    return (
        f"byzantine_robust: parameters that only f={f} workers or fewer have gradients of do not "
        f"move, since these might all be liars. Found {', '.join(shown[:10])}{more}. Give more "
        "workers data that use them, or lower num_byzantine."
    )
