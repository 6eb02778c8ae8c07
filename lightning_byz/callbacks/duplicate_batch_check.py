"""DuplicateBatchCheck: do all ranks compute the same gradient of the same micro-batch?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_byz.diagnostics.alerts import gathered
from lightning_byz.diagnostics.replicas import ReplicasCallback, named
from lightning_byz.diagnostics.sketch import Sketch
from lightning_byz.diagnostics.worker_placement import Whereabouts
from lightning_byz.strategies.extra_gradients import QuietPasses, random_states_kept
from lightning_byz.strategies.flat_parameters import FlatParameters
from lightning_byz.strategies.module_attributes import WorkerAttributes
from lightning_byz.strategies.module_buffers import WorkerBuffers
from lightning_byz.transports.parsing import DIMENSIONS, Refusals, leaf_header, read_leaves

_LEAVES = 32
"""How many tensors a batch may hold."""

_LARGEST, _MUCH = 1 << 36, 64
"""How many bytes a batch may have, and how many times as many as the median rank's."""


class DuplicateBatchCheckCallback(ReplicasCallback):
    """Every so many batches, all ranks compute the gradient of one rank's micro-batch (each rank's
    in turn), and the one that gets another result is named.

    A device whose arithmetic is wrong in the same way every time replays its own errors faithfully;
    other devices do not make them. A check costs every rank one forward and backward pass, and a
    broadcast of the batch. Nothing else notices: random states, logs, buffers, metrics and
    ``p.grad`` are afterwards what they were. The passes draw from one random stream, so that all
    ranks drop the same units.

    Works with every strategy whose ranks hold whole copies (``"ddp"``, ``"byzantine_robust"``), in
    automatic optimization. Batches are nested containers of tensors; what else they hold (strings,
    numbers) is each rank's own and must not matter for the loss.

    Args:
        every_n_steps: batches between two checks.
        tolerance: how far from the ranks' median gradient a rank's may lie, in parts of its length.
            Kernels that add up in any order differ by rounding; a device that is the same
            everywhere and deterministic allows 0. Compared are sketches (see
            `lightning_byz.diagnostics.sketch`), which keep such distances.
        action: "raise" a `ReplicasDifferError` on all ranks, or "warn", once for every set of
            ranks.
        on_difference: called on rank 0 with the places of the ranks that differ.

    Raises:
        ValueError: on all ranks, if no more than half of them hold batches of one form. A rank
            whose batch has another form is left out, and logged.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        tolerance: float = 1e-3,
        action: Literal["raise", "warn"] = "warn",
        on_difference: Callable[[list[Whereabouts]], None] | None = None,
    ) -> None:
        super().__init__(every_n_steps, action, on_difference)
        if tolerance < 0:
            raise ValueError(f"`tolerance` should be at least 0. Found tolerance={tolerance}.")
        self.tolerance = tolerance
        self._refusals = Refusals("batches to check", "rank")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(self).__name__} computes a training step without its optimizer step, "
                "which manual optimization does not allow. Found automatic_optimization=False. "
                "Use ReplicaCheck or ShadowMode."
            )
        self._batches = 0

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        if self._batches % self.every_n_steps:
            return
        subject = self.checks % trainer.world_size
        self.checks += 1
        shared, alike = shared_batch(batch, subject, trainer.strategy.root_device, self._refusals)
        if subject not in alike:
            return
        sketches = torch.stack(gathered(self._gradient(trainer, pl_module, shared, batch_idx)))
        odd = [rank for rank in outliers(sketches, self.tolerance) if rank in alike]
        if odd:
            message = (
                f"Batch {self._batches}: all ranks computed the gradient of rank {subject}'s "
                f"micro-batch. {named(odd, self._places)} The same input and parameters gave "
                "another gradient there: a silent fault of the device or its software."
            )
            self.report(trainer, odd, message)

    def _gradient(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> Tensor:
        """The sketch of the batch's gradient at the parameters as they are; nan if it gives no
        loss, or there is no batch.
        """
        device, precision = trainer.strategy.root_device, trainer.precision_plugin
        layout = FlatParameters([p for p in module.parameters() if p.requires_grad])

        def training_step(*args: Any) -> Any:
            with precision.train_step_context():
                return module.training_step(*args)

        passes = QuietPasses(
            module,
            WorkerBuffers(module, 1),
            WorkerAttributes(module, 1),
            precision,
            device,
            training_step,
        )
        with random_states_kept(device):
            done = (
                None
                if batch is None
                else passes.gradient(layout, 0, (self.checks,), (batch, batch_idx), {})
            )
        sketch = Sketch(layout.dim)
        out = sketch.new(device=device)
        if done is None:
            return out.fill_(torch.nan)
        sketch.add(out, done.flat, 0)
        return out


def outliers(sketches: Tensor, tolerance: float) -> list[int]:
    """The ranks whose row of ``[n, m]`` is not finite where others' are, or farther than
    ``tolerance`` times its norm from the coordinate-wise median.

    Two ranks are both as far from their median as each other: both are returned.
    """
    finite = torch.isfinite(sketches).all(1)
    if not bool(finite.any()):
        return []
    good = sketches[finite].double()
    median = (
        good.quantile(0.5, dim=0)
        if len(good) < 3
        else good.sort(dim=0).values[(len(good) - 1) // 2]
    )
    far = (sketches.double() - median).norm(dim=1) > tolerance * median.norm()
    odd: list[int] = (~finite | far).nonzero().flatten().tolist()
    return odd


def shared_batch(
    batch: Any, subject: int, device: torch.device, refusals: Refusals
) -> tuple[Any, set[int]]:
    """Rank ``subject``'s batch, on every rank: its tensors, in the containers of this rank's own
    batch. A collective.

    Returns:
        the batch, and the ranks, the same everywhere, whose own are made like those of most ranks:
        of the same number of tensors, of the same dtypes and numbers of dimensions, not `_MUCH`
        times as large as the median rank's. Others are left out: the batch is None on these ranks,
        and on all ranks if the subject is among them, or if half of the ranks have no batch.

    Raises:
        ValueError: on all ranks, if no more than half of the batches are made of the same number of
            tensors, of the same dtypes and numbers of dimensions.
    """
    leaves: list[Tensor] = []
    apply_to_collection(batch, Tensor, leaves.append)
    headers = gathered(leaf_header(leaves, _LEAVES))
    if 2 * sum(int(header[0]) == 0 for header in headers) >= len(headers):
        return None, set()
    said = [
        refusals.read(rank, read_leaves, header.tolist(), _LARGEST)
        for rank, header in enumerate(headers)
    ]
    kinds = [
        None if named is None else tuple((leaf.dtype, len(leaf.shape)) for leaf in named)
        for named in said
    ]
    common, count = Counter(kinds).most_common(1)[0]
    if common is None or 2 * count <= len(kinds):
        raise ValueError(
            "To compute each other's batches, most ranks' should hold the same number of "
            f"tensors, 1 .. {_LEAVES} of at most {DIMENSIONS} dimensions, of the same dtypes and "
            f"numbers of dimensions. Found {[0 if kind is None else len(kind) for kind in kinds]} "
            "tensors in the ranks' batches. Leave DuplicateBatchCheck out."
        )
    sizes = sorted(
        sum(leaf.nbytes for leaf in named)
        for named, kind in zip(said, kinds, strict=True)
        if named and kind == common
    )
    most = _MUCH * max(sizes[len(sizes) // 2], 1)
    alike = {
        rank
        for rank, (leaves_there, kind) in enumerate(zip(said, kinds, strict=True))
        if leaves_there is not None
        and kind == common
        and sum(leaf.nbytes for leaf in leaves_there) <= most
    }
    for rank, leaves_there in enumerate(said):
        if rank not in alike and leaves_there is not None:
            refusals.note(rank, "It is not made like those of most ranks.")
    theirs = said[subject]
    if theirs is None or subject not in alike:
        return None, alike
    rank, received = dist.get_rank(), []
    for i, leaf in enumerate(theirs):
        sent = (
            leaves[i].detach().contiguous()
            if rank == subject
            else torch.empty(leaf.shape, dtype=leaf.dtype)
        )
        sent = sent.to(device if dist.get_backend() == "nccl" else "cpu")
        dist.broadcast(sent, src=subject)
        received.append(sent)
    if rank not in alike:
        return None, alike
    queue = iter(zip(received, leaves, strict=True))

    def replaced(leaf: Tensor) -> Tensor:
        sent, own = next(queue)
        return sent.to(own.device)

    return apply_to_collection(batch, Tensor, replaced), alike
