"""Processes of torch.distributed of which several hold one model together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_byz.compressors import Field
from lightning_byz.strategies.flat_parameters import FlatParameters
from lightning_byz.strategies.mesh import ReplicaMesh, local
from lightning_byz.strategies.module_buffers import shared_tensors
from lightning_byz.strategies.private_names import bring_no_weights, give_mesh
from lightning_byz.strategies.processes import States, TorchProcesses
from lightning_byz.strategies.replica_worker import ReplicaWorker
from lightning_byz.strategies.sharded_parameters import ShardedParameters
from lightning_byz.transports import Transport
from lightning_byz.transports.collective import Collective
from lightning_byz.transports.wire import unpack


class MeshProcesses(TorchProcesses):
    """Groups of processes, each of which holds one model, and is a worker.

    Args:
        strategy: the RobustStrategy.
        data_parallel: ranks of a replica that compute different samples.
        tensor_parallel: ranks of a replica that compute the same samples together.
    """

    one_worker = ReplicaWorker

    def __init__(self, strategy: Any, data_parallel: int, tensor_parallel: int) -> None:
        super().__init__(strategy)
        self._sizes = data_parallel, tensor_parallel
        self._mesh: ReplicaMesh | None = None

    @property
    def mesh(self) -> ReplicaMesh:
        """Of all ranks, once they are connected."""
        if self._mesh is None:
            raise RuntimeError(
                "The device mesh should be asked for once processes are connected, as in "
                "configure_model. Found a call before."
            )
        return self._mesh

    @property
    def replicas(self) -> int:
        return self.mesh.replicas

    @property
    def replica(self) -> int:
        return self.mesh.replica

    @property
    def mesh_sizes(self) -> tuple[int, ...]:
        return self.mesh.sizes

    @property
    def sampler_kwargs(self) -> dict[str, int]:
        """Ranks of one tensor-parallel group share samples."""
        replicas, data, _ = self.mesh.sizes
        return {"num_replicas": replicas * data, "rank": self.replica * data + self.mesh.data}

    def launcher(self) -> Any:
        launcher = super().launcher()
        if self.strategy._start_method != "popen" and launcher is not None:
            bring_no_weights(launcher)
        return launcher

    def connect(self) -> None:
        super().connect()
        if self._mesh is None or self._mesh.world is not dist.group.WORLD:
            self._mesh = ReplicaMesh(self.strategy.root_device, *self._sizes)
        give_mesh(self.strategy.lightning_module, self._mesh.of_replica)

    def connect_transport(self, transport: Transport) -> None:
        if isinstance(transport, Collective):
            transport.ranks = self.mesh.ranks
        super().connect_transport(transport)

    def begin_checkpoint(self, checkpoint: dict[str, Any], filepath: Any) -> bool:
        """Not without the others, who have the rest of the model."""
        super().begin_checkpoint(checkpoint, filepath)
        if self.saved_alone:
            warnings.warn(
                f"{filepath} is not written: some ranks do not come here, and a sharded model "
                "needs all of them. Call trainer.save_checkpoint on every rank.",
                stacklevel=2,
            )
        return not self.saved_alone

    def collected(self, local: States, states: tuple[Tensor, ...]) -> tuple[States, dict[int, Any]]:
        """This rank's part of all workers' states, in the first replica; all ranks' random states
        at rank 0.
        """
        everybody, of_replicas = super().collected(local, states)
        if self.replica:
            return everybody, {}
        tensors = [tensor for replica in sorted(of_replicas) for tensor in of_replicas[replica]]
        layout = [Field(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        bodies = self._gathered(tensors, layout, self.mesh.members, self.mesh.group)
        of_ranks: dict[int, Any] = {}
        for place, body in (bodies or {}).items():
            unpacked = iter(tensor.cpu().clone() for tensor in unpack(body, layout))
            for replica in sorted(of_replicas):
                rank = replica * self.mesh.places + place
                of_ranks[rank] = tuple(next(unpacked) for _ in states)
        return everybody, of_ranks

    def _to_rank_0(self, tensors: list[Tensor], layout: list[Field]) -> dict[int, Tensor] | None:
        return self._gathered(tensors, layout, *self.mesh.along(0))

    def flat(self, parameters: Sequence[Tensor]) -> FlatParameters:
        return ShardedParameters(parameters, self.mesh)

    @torch.no_grad()
    def share_model(self, module: Any) -> None:
        """The first replica's parameters and buffers for everybody. What all ranks of a replica
        have a copy of is rank 0's.
        """
        ranks, group = self.mesh.along(0)
        tensors = shared_tensors(module)
        for tensor in tensors:
            part = local(tensor)
            shared = part.detach().clone(memory_format=torch.contiguous_format)
            for dimension in (2, 1):
                if self.mesh.is_copied(tensor, dimension):
                    inside, inside_group = self.mesh.along(dimension)
                    dist.broadcast(shared, src=inside[0], group=inside_group)
            dist.broadcast(shared, src=ranks[0], group=group)
            if not torch.equal(shared, part):
                part.copy_(shared)
