"""The hooks of the strategy that are about processes. Each hands over to `Processes`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_byz.strategies.processes import Processes
from lightning_byz.strategies.reductions import MetricReducer
from lightning_byz.strategies.validate import check_all_gather

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ParallelStrategy as _Base
else:
    _Base = object


class ProcessHooks(_Base):
    """How processes start, and the collectives that Lightning asks for.

    Attributes:
        processes: the run's.
        workers_per_process: workers of each.
    """

    processes: Processes
    workers_per_process: int
    _num_nodes: int
    _process_group_backend: str | None
    _reducer: MetricReducer

    @property
    def num_nodes(self) -> int:
        """Number of machines."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """Number of processes on this machine."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 1

    @property
    def n(self) -> int:
        """Number of workers of the run."""
        return self.processes.replicas * self.workers_per_process

    @property
    def is_distributed(self) -> bool:
        """Whether Lightning is to give every process its own part of the data."""
        return self.processes.size > 1

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return self.processes.sampler_kwargs

    @property
    def process_group_backend(self) -> str | None:
        """Backend of torch.distributed."""
        return self._process_group_backend

    def set_world_ranks(self) -> None:
        """Tells the cluster environment, and all that logs on rank 0 only, which rank this is."""
        self.processes.name_ranks()

    def _configure_launcher(self) -> None:
        self._launcher = self.processes.launcher()

    def setup_environment(self) -> None:
        super().setup_environment()
        self.processes.connect()

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    # -- collectives that Lightning asks for -------------------------------------------------------

    def barrier(self, name: str | None = None) -> None:
        if not self.processes.alone:
            self.processes.barrier(name)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """An object of rank ``src``, which is one of the run's own processes, for everybody."""
        return obj if self.processes.alone else self.processes.broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Over the ranks, leaving out values that are nan or inf, as long as there are others."""
        if not isinstance(tensor, Tensor) or self.processes.alone:
            return tensor
        return self._reducer.reduce(tensor, reduce_op, partial(self.processes.gather, group=group))

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision if self.processes.alone else self.processes.decide(decision, all)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """The ranks' tensors, stacked; on a parameter server those of the ranks that are heard."""
        check_all_gather(self, sync_grads)
        if self.processes.size == 1:
            return tensor
        if self.processes.alone:
            return tensor[None]
        return torch.stack(self.processes.gather(tensor.detach(), group))
