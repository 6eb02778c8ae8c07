"""ReplicaCheck: do all ranks still hold the same parameters and optimizer state?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_byz.diagnostics.alerts import gathered
from lightning_byz.diagnostics.replicas import ReplicasCallback, named
from lightning_byz.diagnostics.worker_placement import Whereabouts
from lightning_byz.strategies.gradient_sync import in_module_order
from lightning_byz.types import keyed_seed

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1 << 20


class ReplicaCheckCallback(ReplicasCallback):
    """Every so many steps, compares a checksum of the parameters and of the optimizers' state
    across ranks, and names the rank that differs.

    In data-parallel training every rank applies the same update to the same weights, so that all
    must hold the same bits: a difference is a fault of a device's memory or arithmetic, of a link,
    or of code that draws random numbers or logs into parameters on its own. Two checksums of 64
    bits are compared, one of the parameters and one of the optimizers' states, 16 bytes a rank; a
    check reads everything once. Whoever differs from the majority is named; without one, all ranks
    are.

    Works with every strategy whose ranks hold whole copies (``"ddp"``, ``"byzantine_robust"``).
    Buffers are left out: DDP's BatchNorm statistics differ between steps.

    Args:
        every_n_steps: optimizer steps between two checks.
        action: "raise" a `ReplicasDifferError` on all ranks, or "warn", once for every set of ranks
            that differ.
        on_difference: called on rank 0 with the places of the ranks that differ.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        action: Literal["raise", "warn"] = "raise",
        on_difference: Callable[[list[Whereabouts]], None] | None = None,
    ) -> None:
        super().__init__(every_n_steps, action, on_difference)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        self._step = -1

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step or step % self.every_n_steps:
            return
        self._step = step  # batches of one accumulation window see the same step
        self.checks += 1
        own = torch.tensor(
            [checksum(pl_module.parameters()), checksum(_states(pl_module, trainer.optimizers))],
            dtype=torch.int64,
        )
        sums = [tuple(other.tolist()) for other in gathered(own)]
        odd, what = minority(sums)
        if odd:
            message = (
                f"After step {step}, ranks should hold the same {what}. "
                f"{named(odd, self._places)} Look at the hardware of that host, and for code that "
                "changes parameters on some ranks only."
            )
            self.report(trainer, odd, message)


def minority(sums: list[tuple[int, ...]]) -> tuple[list[int], str]:
    """The ranks whose checksums are not the majority's, all of them if there is no majority, and
    what differs.
    """
    common, count = Counter(sums).most_common(1)[0]
    if count == len(sums):
        return [], ""
    parts = [
        name
        for i, name in enumerate(("parameters", "optimizer state"))
        if len({each[i] for each in sums}) > 1
    ]
    odd = (
        list(range(len(sums)))
        if 2 * count <= len(sums)
        else [rank for rank, each in enumerate(sums) if each != common]
    )
    return odd, " and ".join(parts)


def _states(module: Any, optimizers: Any) -> Iterator[Tensor]:
    """All tensors of the optimizers' states, in the order of the module's parameters: an optimizer
    may have them in another one on every rank.
    """
    for optimizer in optimizers:
        for p in in_module_order(module, optimizer)():
            state = optimizer.state.get(p, {})
            yield from (state[key] for key in sorted(state) if isinstance(state[key], Tensor))


@torch.no_grad()
def checksum(tensors: Any) -> int:
    """A 63-bit sum of all bits of the tensors, each word times an odd number that depends on its
    place; the same on every device.
    """
    total = 0
    for index, tensor in enumerate(tensors):
        words = tensor.detach().contiguous().reshape(-1)
        words = words.to(torch.uint8) if words.dtype == torch.bool else words
        words = torch.view_as_real(words).reshape(-1) if words.is_complex() else words
        words = words.view(_INTEGERS[words.element_size()])
        for first in range(0, len(words), _BLOCK):
            block = words[first : first + _BLOCK].to(torch.int64)
            place = torch.arange(first, first + len(block), device=block.device)
            mixed = (block + place) * 0x2545F4914F6CDD1D  # wraps, as integers do
            mixed = (mixed ^ (mixed >> 29)) * (2 * place + 1)
            total += keyed_seed("replica", index, int(mixed.sum()))
    return total % (1 << 63)
