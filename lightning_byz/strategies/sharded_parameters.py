"""Between a sharded model's parameters and the part of flat vectors that one rank holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_byz.strategies.flat_parameters import FlatParameters
from lightning_byz.strategies.mesh import ReplicaMesh, local


class ShardedParameters(FlatParameters):
    """The parts of parameters that this rank holds, seen as one vector.

    Every number of the model belongs to one rank of the replica. Of parts that are copied over a
    dimension of the mesh the first rank's counts: the others leave it out of their vectors, and are
    told what became of it (`write_gradients`). So norms count each number once, and copies stay
    equal.

    Args:
        parameters: DTensors, or plain tensors, which every rank has a copy of.
        mesh: the run's.

    Attributes:
        dim: the length of this rank's vector, at least 1: a rank that no number belongs to sends a
            0.
        sizes: how many numbers of each parameter are in it; the 0 is of the last one.
    """

    def __init__(self, parameters: Sequence[Tensor], mesh: ReplicaMesh) -> None:
        super().__init__(parameters)
        self.mesh = mesh
        self._whole_sizes = self.sizes
        self._copied = {
            dimension: [mesh.is_copied(p, dimension) for p in self.parameters]
            for dimension in (1, 2)
        }
        first = {1: mesh.data == 0, 2: mesh.tensor == 0}
        self._owned = [
            all(first[dimension] or not copied[i] for dimension, copied in self._copied.items())
            for i in range(len(self.parameters))
        ]
        self._averaged = [mesh.is_averaged_inside(p) for p in self.parameters]
        self._shapes = [local(p).shape for p in self.parameters]
        self._held = [
            shape.numel() if owned else 0
            for shape, owned in zip(self._shapes, self._owned, strict=True)
        ]
        self.dim = max(1, sum(self._held))
        self.sizes = [*self._held[:-1], self.dim - sum(self._held[:-1])]

    def like(self) -> Tensor:
        return torch.zeros(self.dim, dtype=self.dtype, device=self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of a rank's vector, about; the same on all ranks."""
        return self.whole_dim * self.dtype.itemsize // self.mesh.places

    @staticmethod
    def watch(p: Any, arrived: Callable[[], None]) -> tuple[Any, Any]:
        """FSDP sets gradients itself, and calls these hooks; autograd knows no others of its
        parameters.
        """
        return None, p.register_post_accumulate_grad_hook(lambda _: arrived())

    # -- gradients ---------------------------------------------------------------------------------

    def used(self) -> Tensor:
        """``[P]`` bool: the parameters that have a gradient; of those that torch leaves alone, on
        some rank. All ranks of the replica call it.
        """
        used = super().used()
        if all(self._averaged):
            return used
        _, group = self.mesh.along(1)
        count = used.to(self.device, torch.int32)
        dist.all_reduce(count, group=group)
        return count.cpu() > 0

    @torch.no_grad()
    def read_gradients(self, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
        """This rank's part of the replica's gradient ``[dim]``. All its ranks call it."""
        flat = self.like() if out is None else out.zero_()
        parts = self._averages([self._gradient(p) for p in self.parameters])
        for piece, owned, part in zip(self._pieces(flat), self._owned, parts, strict=True):
            if owned and part is not None:
                piece.copy_(part.reshape(-1))
        return flat.mul_(scale) if scale != 1 else flat

    def _gradient(self, p: Tensor) -> Tensor | None:
        """This rank's part of a parameter's gradient."""
        grad = p.grad
        if isinstance(grad, DTensor) and isinstance(p, DTensor) and grad.placements != p.placements:
            grad = grad.redistribute(placements=p.placements)  # a sum that is still to be made
        return None if grad is None else local(grad)

    def _averages(self, parts: list[Tensor | None]) -> list[Tensor | None]:
        """The same, where torch leaves parameters alone, averaged over the replica's data."""
        own = [i for i, done in enumerate(self._averaged) if not done]
        if not own:
            return parts
        ranks, group = self.mesh.along(1)
        flat = self._packed(parts, own)
        dist.all_reduce(flat, group=group)
        return self._unpacked(flat / len(ranks), parts, own)

    def _packed(self, parts: Sequence[Tensor | None], which: Sequence[int]) -> Tensor:
        """Some parameters' parts, one after the other; 0 where there is none."""
        empty = torch.zeros(0, dtype=self.dtype, device=self.device)
        tensors = [
            empty.new_zeros(self._shapes[i].numel()) if part is None else part.reshape(-1)
            for i, part in ((i, parts[i]) for i in which)
        ]
        return torch.cat([empty, *(tensor.to(empty) for tensor in tensors)])

    def _unpacked(
        self, flat: Tensor, parts: Sequence[Tensor | None], which: Sequence[int]
    ) -> list[Tensor | None]:
        """All parts, of which those are taken from ``flat``."""
        sizes = [self._shapes[i].numel() for i in which]
        result = list(parts)
        for i, piece in zip(which, torch.split(flat, sizes), strict=True):
            result[i] = piece.view(self._shapes[i])
        return result

    def parts(self, flat: Tensor) -> list[Tensor]:
        """By parameter, this rank's part of what a vector ``[dim]`` stands for. Parts that are
        copied come from the rank that has them. All ranks of the replica call it.
        """
        held: list[Tensor | None] = [
            piece.view(shape) if owned else None
            for piece, shape, owned in zip(
                self._pieces(flat), self._shapes, self._owned, strict=True
            )
        ]
        for dimension, copied in self._copied.items():
            which = [i for i, is_copied in enumerate(copied) if is_copied]
            if which:
                ranks, group = self.mesh.along(dimension)
                packed = self._packed(held, which)
                dist.broadcast(packed, src=ranks[0], group=group)
                held = self._unpacked(packed, held, which)
        return [part for part in held if part is not None]

    def _pieces(self, flat: Tensor) -> Sequence[Tensor]:
        return torch.split(flat[: sum(self._held)], self._held)

    @torch.no_grad()
    def write_gradients(
        self, flat: Tensor, used: Sequence[bool], scale: float = 1.0, views: bool = False
    ) -> None:
        """All ranks of the replica call it."""
        self.part_with(flat)
        for p, part, is_used in zip(self.parameters, self.parts(flat), used, strict=True):
            if not is_used:
                p.grad = None
                continue
            fits = part.dtype == p.dtype and part.is_contiguous()
            kept = part if views and fits else part.to(p.dtype, copy=True)
            p.grad = _like(p, kept if scale == 1 else kept.mul_(scale))

    # -- parameters --------------------------------------------------------------------------------

    @torch.no_grad()
    def read_parameters(self) -> Tensor:
        flat = self.like()
        for piece, owned, p in zip(self._pieces(flat), self._owned, self.parameters, strict=True):
            if owned:
                piece.copy_(local(p).reshape(-1))
        return flat

    @torch.no_grad()
    def write_parameters(self, flat: Tensor) -> None:
        for p, part in zip(self.parameters, self.parts(flat), strict=True):
            local(p).copy_(part)

    # -- whole vectors, and other meshes -----------------------------------------------------------

    @property
    def whole_dim(self) -> int:
        """The number of all parameters' elements."""
        return sum(self._whole_sizes)

    def distributed(self, flat: Tensor) -> list[Tensor]:
        """What a vector ``[dim]`` stands for, as tensors like the parameters."""
        return [_like(p, part) for p, part in zip(self.parameters, self.parts(flat), strict=True)]

    def flattened(self, tensors: Sequence[Tensor]) -> Tensor:
        """The vector ``[dim]`` of tensors like the parameters."""
        owned = zip(tensors, self._owned, strict=True)
        parts = [local(tensor).reshape(-1) for tensor, is_owned in owned if is_owned]
        return torch.cat(parts) if sum(self._held) else self.like()

    def whole(self, flat: Tensor) -> Tensor:
        """The whole vector, as of a model that is not sharded, on every rank of the replica."""
        return torch.cat(
            [
                (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).reshape(-1)
                for tensor in self.distributed(flat)
            ]
        )

    def part_of(self, whole: Tensor) -> Tensor:
        """This rank's vector ``[dim]`` of a whole one."""
        tensors = []
        for p, piece in zip(self.parameters, torch.split(whole, self._whole_sizes), strict=True):
            tensor = piece.view(p.shape)
            if isinstance(p, DTensor):
                tensor = distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)
            tensors.append(tensor)
        return self.flattened(tensors)


def _like(p: Tensor, part: Tensor) -> Tensor:
    """A tensor that is distributed as a parameter is, of which this rank holds this part."""
    if not isinstance(p, DTensor):
        return part
    return DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
