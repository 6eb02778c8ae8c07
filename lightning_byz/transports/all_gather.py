"""Every process gathers every message and runs the rule itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_byz.compressors import Field
from lightning_byz.transports.base import Message, Transport
from lightning_byz.transports.wire import pack, packed_size, unpack
from lightning_byz.types import Payload


class AllGather(Transport):
    """One all-gather of the payloads over torch.distributed; every rank then aggregates all n messages.

    A rank moves n payloads a round. Who must be honest: every *process* (a collective waits for all of them, and each computes
    its own result); the gradients that they send may be anything. What decisions depend on (distances, norms) is rank 0's, so
    that unlike machines cannot pick different rows.
    """

    def connect(self, rank: int, world_size: int, workers_per_process: int, device: torch.device) -> None:
        if world_size == 1:
            raise ValueError(
                "AllGather connects several processes. Found one. Use Trainer(devices=n), or leave `transport` out to hold all workers in "
                "this process."
            )
        super().connect(rank, world_size, workers_per_process, device)
        self._gloo = dist.get_backend() == "gloo"
        self._device = torch.device("cpu") if self._gloo else device
        self._received: dict[int, Tensor] = {}

    def gather(self, messages: Sequence[Sequence[Tensor]], layout: Sequence[Field]) -> list[tuple[Tensor, ...]]:
        """The result is in memory that the next gather of the same size uses again."""
        device, size = messages[0][0].device, packed_size(layout)
        share = len(messages) * size
        if share not in self._received:
            self._received[share] = torch.zeros(self.world_size, share, dtype=torch.uint8, device=self._device)
        received = self._received[share]
        own = received[self.rank]
        for message, out in zip(messages, own.view(len(messages), size), strict=True):
            pack(message, layout, out)
        if self._gloo:
            self._gather_pairwise(received)
        else:
            dist.all_gather_into_tensor(received.view(-1), own.clone())
        return [unpack(buffer, layout) for buffer in received.to(device).view(self.n, size)]

    def _gather_pairwise(self, received: Tensor) -> None:
        """Every rank's share to every other rank directly: three to four times faster than gloo's own all-gather."""
        requests = []
        for distance in range(1, self.world_size):
            source, target = (self.rank - distance) % self.world_size, (self.rank + distance) % self.world_size
            requests += [dist.irecv(received[source], source), dist.isend(received[self.rank], target)]
        for request in requests:
            assert request is not None
            request.wait()

    def agree(self, tensor: Tensor) -> Tensor:
        shared = tensor.to(self._device, copy=True)
        dist.broadcast(shared, src=0)
        return shared.to(tensor.device)

    def bytes_down(self, message: Message, answer: Payload) -> int:
        return (self.n - 1) * message.nbytes
