"""What ReplicaCheck and DuplicateBatchCheck share: ranks that hold copies of one module, and what
is done about one that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lightning_byz.diagnostics.alerts import gathered, run_logger
from lightning_byz.diagnostics.worker_placement import Whereabouts, whereabouts
from lightning_byz.strategies.strategy import is_robust

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Base
else:
    _Base = object


class ReplicasDifferError(RuntimeError):
    """Ranks that should hold the same numbers do not."""


class ReplicasCallback(_Base):
    """Compares ranks every so many steps, and raises or warns.

    Args:
        every_n_steps: how often.
        action: "raise" a `ReplicasDifferError` on all ranks, or "warn", once for every set of ranks
            that differ.
        on_difference: called on rank 0 with the places of the ranks that differ.
    """

    def __init__(
        self,
        every_n_steps: int,
        action: Literal["raise", "warn"],
        on_difference: Callable[[list[Whereabouts]], None] | None,
    ) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(
                f"`every_n_steps` should be at least 1. Found every_n_steps={every_n_steps}."
            )
        if action not in ("raise", "warn"):
            raise ValueError(f"`action` should be 'raise' or 'warn'. Found {action!r}.")
        self.every_n_steps, self.action, self.on_difference = every_n_steps, action, on_difference
        self.checks = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        whole = isinstance(trainer.strategy.model, DistributedDataParallel) or is_robust(
            trainer.strategy
        )
        if not whole or trainer.world_size < 2 or not dist.is_initialized():
            raise ValueError(
                f"{type(self).__name__} compares ranks that hold copies of the same module, as "
                "Trainer(devices=n, strategy='ddp') or 'byzantine_robust' makes them. Found "
                f"{type(trainer.strategy).__name__} with {trainer.world_size} ranks."
            )
        self._told: set[frozenset[int]] = set()
        self._places = whereabouts(trainer.strategy.root_device, gathered)

    def report(self, trainer: Any, odd: list[int], message: str) -> None:
        """Says that the ranks ``odd`` differ, once for each set of them, and raises if that is the
        action.
        """
        if trainer.is_global_zero and frozenset(odd) not in self._told:
            self._told.add(frozenset(odd))
            run_logger(trainer).warning(message)
            if self.on_difference is not None:
                self.on_difference([self._places[rank] for rank in odd])
        if self.action == "raise":
            raise ReplicasDifferError(message)


def named(odd: Sequence[int], places: Sequence[Whereabouts]) -> str:
    """A sentence about the ranks that differ."""
    who = "; ".join(str(places[rank]) for rank in odd)
    return (
        f"No majority agrees: {who}."
        if len(odd) == len(places)
        else f"Different from the others: {who}."
    )
