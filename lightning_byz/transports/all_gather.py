"""Every process gathers every message and runs the rule itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_byz.compressors import Field
from lightning_byz.transports.base import Message, Transport
from lightning_byz.transports.wire import pack, packed_size, unpack


class AllGather(Transport):
    """One all-gather of the payloads over torch.distributed; every rank then aggregates all n messages.

    A rank moves n payloads a round. Who must be honest: every *process* (a collective waits for all of them, and each computes
    its own result); the gradients that they send may be anything. What decisions depend on (distances, norms) is rank 0's, so
    that unlike machines cannot pick different rows.
    """

    def connect(self, rank: int, world_size: int, workers_per_process: int, device: torch.device) -> None:
        super().connect(rank, world_size, workers_per_process, device)
        self._device = torch.device("cpu") if dist.get_backend() == "gloo" else device

    def gather(self, messages: Sequence[Sequence[Tensor]], layout: Sequence[Field]) -> list[tuple[Tensor, ...]]:
        device, size = messages[0][0].device, packed_size(layout)
        sent = torch.zeros(len(messages), size, dtype=torch.uint8, device=self._device)
        for message, out in zip(messages, sent, strict=True):
            pack(message, layout, out)
        received = torch.empty(self.world_size * len(messages) * size, dtype=torch.uint8, device=self._device)
        dist.all_gather_into_tensor(received, sent.view(-1))
        return [unpack(buffer, layout) for buffer in received.to(device).view(self.n, size)]

    def agree(self, tensor: Tensor) -> Tensor:
        shared = tensor.to(self._device, copy=True)
        dist.broadcast(shared, src=0)
        return shared.to(tensor.device)

    def bytes_down(self, message: Message, estimate: Tensor) -> int:
        return (self.n - 1) * message.nbytes
