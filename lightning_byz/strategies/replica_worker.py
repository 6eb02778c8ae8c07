"""A worker that several ranks compute together: each has a part of its gradient, and a share of its
samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from lightning_byz.strategies.mesh import ReplicaMesh
from lightning_byz.strategies.module_buffers import WorkerBuffers
from lightning_byz.strategies.step_logs import StepLogs, WorkerLog
from lightning_byz.strategies.workers import NoBatch, OneWorker
from lightning_byz.transports import AllGather, Transport
from lightning_byz.transports.ranks import Ranks


class ReplicaWorker(OneWorker):
    """This rank's part of a replica, which is one worker.

    Its loss, and what it logs, are the means over the ranks of the replica that compute different
    samples; its buffers are those of the first of them. Arguments as in `LocalWorkers`.
    """

    def __init__(self, strategy: Any, training_step: Callable[..., Any]) -> None:
        super().__init__(strategy, training_step)
        mesh = self._mesh = strategy.processes.mesh
        self.buffers = ReplicaBuffers(mesh, strategy.lightning_module, strategy.aggregated_buffers)
        self._inside = AllGather()
        self._group: dist.ProcessGroup | None = None
        members, group = mesh.along(1)
        if len(members) > 1:
            self._group, self._inside.ranks = group, Ranks(members, group)
            self._inside.connect(mesh.data, len(members), 1, strategy.root_device)
        self._inside_logs = StepLogs()

    def training_step(self, batch: Any, rest: Sequence[Any], kwargs: Any) -> Any:
        """A rank without a batch leaves its replica without one, as its ranks compute together."""
        if not self._everybody_has(batch):
            batch = NoBatch()
        return super().training_step(batch, rest, kwargs)

    def _everybody_has(self, batch: Any) -> bool:
        """Whether all ranks of the replica have a batch; asked where a loader may give None."""
        strategy = self.strategy
        loader = strategy.lightning_module.trainer.train_dataloader
        if isinstance(loader, DataLoader) and loader.collate_fn is default_collate:
            if isinstance(batch, NoBatch):
                raise ValueError(
                    "Every rank of a replica should have a batch, or say so before the others "
                    "compute. Found None, which default_collate does not give. Give None in a "
                    "collate_fn, not in a hook of the module."
                )
            return True
        none = torch.tensor(int(isinstance(batch, NoBatch)), device=strategy.root_device)
        dist.all_reduce(none, group=self._mesh.group)
        return int(none) == 0

    def _key(self, worker: int) -> tuple[int, int, int]:
        """Ranks that compute different samples draw different numbers."""
        seed, step, worker = super()._key(worker)
        return seed, step, worker * self._mesh.sizes[1] + self._mesh.data

    def _log(self, logs: Sequence[WorkerLog], cohort: Tensor, step: int) -> None:
        super()._log([self._of_replica(log) for log in logs], cohort, step)

    def _of_replica(self, log: WorkerLog) -> WorkerLog:
        """What the replica has to say, given what this rank has: by name, one number over its
        ranks.
        """
        if self._group is None:
            return log
        device, count = self.strategy.root_device, self._inside.n
        none = log.loss is None
        loss = 0.0 if log.loss is None else float(log.loss)
        said = torch.tensor([loss, none, log.samples], dtype=torch.float64, device=device)
        dist.all_reduce(said, group=self._group)
        calls = self._inside_logs.reduce([log], self._inside, [True] * count, device)
        replica = WorkerLog(loss=said[0] / count if said[1] == 0 else None, samples=int(said[2]))
        for call in calls:
            replica.note(call.name, call.value, **call.kwargs)
        return replica


class ReplicaBuffers(WorkerBuffers):
    """The buffers of a module that several ranks hold copies of, as DDP has them: the first one's
    count.

    Args:
        mesh: the run's.
        module: as in `WorkerBuffers`.
        statistics: as in `WorkerBuffers`.
    """

    def __init__(self, mesh: ReplicaMesh, module: Any, statistics: Sequence[str]) -> None:
        super().__init__(module, 1, statistics)
        self._mesh = mesh

    @torch.no_grad()
    def merge(self, transport: Transport, touched: Tensor, present: Tensor, f: int) -> None:
        members, group = self._mesh.along(1)
        if len(members) > 1:
            buffers = self._read()
            for i in touched.nonzero().flatten().tolist():
                shared = buffers[i].contiguous()
                dist.broadcast(shared, src=members[0], group=group)
                if shared is not buffers[i]:
                    buffers[i].copy_(shared)
        super().merge(transport, touched, present, f)
