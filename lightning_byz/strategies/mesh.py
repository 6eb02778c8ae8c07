"""The ranks of a run as a grid: replicas, and the places inside of each one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from lightning_byz.strategies.validate import UnsupportedSetupError
from lightning_byz.transports.ranks import Ranks

DIMENSIONS = ("replicate", "data_parallel", "tensor_parallel")


class ReplicaMesh:
    """A mesh (replicate, data_parallel, tensor_parallel) of all ranks. A worker is a replica.

    Rank ``(r * S + s) * T + t`` is of replica r, and has the place (s, t) in it. All ranks make it
    together.

    Args:
        device: this rank's.
        data_parallel: S, the ranks of a replica that compute different samples.
        tensor_parallel: T, the ranks of a replica that compute the same samples together.

    Attributes:
        whole: the three-dimensional mesh.
        of_replica: its last two dimensions, what modules are handed.
        replica, data, tensor: this rank's coordinates.
        group: the ranks of this replica.
        world: the default group, of all ranks.

    Raises:
        UnsupportedSetupError: if the sizes do not divide the number of ranks.
    """

    def __init__(self, device: torch.device, data_parallel: int, tensor_parallel: int) -> None:
        self.world = dist.group.WORLD
        world, places = dist.get_world_size(), data_parallel * tensor_parallel
        if world % places:
            raise UnsupportedSetupError(
                "`data_parallel_size` times `tensor_parallel_size` should divide the number of "
                f"processes, of which every replica of the model takes so many. Found "
                f"{data_parallel} x {tensor_parallel} = {places}, and {world} processes. Use other "
                "sizes, or another number of devices."
            )
        self.replicas, self.places = world // places, places
        self.sizes = (self.replicas, data_parallel, tensor_parallel)
        self.whole = init_device_mesh(device.type, self.sizes, mesh_dim_names=DIMENSIONS)
        self.of_replica: DeviceMesh = self.whole[DIMENSIONS[1:]]
        coordinates = self.whole.get_coordinate()
        assert coordinates is not None
        self.replica, self.data, self.tensor = coordinates
        ranks = self.whole.mesh.flatten(1).tolist()
        groups = [dist.new_group(members) for members in ranks]
        self.group: Any = groups[self.replica]
        self.members: list[int] = ranks[self.replica]
        lines = [self.whole[dimension] for dimension in DIMENSIONS]
        self._along = [(mesh.mesh.tolist(), mesh.get_group()) for mesh in lines]
        self._held: dict[Any, list[tuple[int, ...] | None]] = {}

    @property
    def ranks(self) -> Ranks:
        """Who has this rank's place in each replica."""
        mesh, parts = self.whole["replicate"], self.group if self.places > 1 else None
        return Ranks(mesh.mesh.tolist(), mesh.get_group(), parts)

    def along(self, dimension: int) -> tuple[list[int], dist.ProcessGroup]:
        """The ranks that differ from this one in this dimension of the mesh only, in order, and
        their group.
        """
        return self._along[dimension]

    def _held_along(self, p: Tensor, dimension: int) -> list[tuple[int, ...] | None]:
        """By rank along a dimension, which part of a parameter it has; found once for all that are
        distributed alike.
        """
        alike = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
        if (alike, dimension) not in self._held:
            ranks, _ = self.along(dimension)
            self._held[alike, dimension] = [_part_of(p, rank) for rank in ranks]
        return self._held[alike, dimension]

    def is_copied(self, p: Tensor, dimension: int) -> bool:
        """Whether all ranks along a dimension of the replica have the same part of a parameter;
        else each has a part of its own.

        Raises:
            UnsupportedSetupError: if some ranks have a part of their own and others do not.
        """
        ranks, _ = self.along(dimension)
        if len(ranks) == 1:
            return False
        held = self._held_along(p, dimension)
        if None in held:  # on meshes of their own, which are alike
            return True
        if len(set(held)) in (1, len(ranks)):
            return len(set(held)) == 1
        raise UnsupportedSetupError(
            "A parameter should be sharded over all ranks of a dimension of the mesh, or over "
            f"none. Found placements {p.placements} on {p.device_mesh} for one of shape "  # type: ignore[attr-defined]
            f"{list(p.shape)}. Shard it on self.device_mesh or on one of its dimensions."
        )

    def is_averaged_inside(self, p: Tensor) -> bool:
        """Whether torch averages a parameter's gradient over the replica's data."""
        ranks, _ = self.along(1)
        return len(ranks) == 1 or None not in self._held_along(p, 1)


def _part_of(p: Tensor, rank: int) -> tuple[int, ...] | None:
    """Which part of a parameter a rank has, as far as this one's mesh tells; None: it is not in
    it.
    """
    if not isinstance(p, DTensor):
        return () if rank == dist.get_rank() else None
    place = (p.device_mesh.mesh == rank).nonzero()
    if not len(place):
        return None
    sharded = (not isinstance(placement, Replicate) for placement in p.placements)
    return tuple(at for at, cut in zip(place[0].tolist(), sharded, strict=True) if cut)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds; of a tensor that is not distributed, all of it."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part
