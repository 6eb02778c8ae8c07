"""All workers live in this process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_byz.compressors import Field
from lightning_byz.transports.base import Transport
from lightning_byz.transports.messages import Message
from lightning_byz.types import Payload


class InProcess(Transport):
    """n workers in one process: nothing is sent, and bytes are counted as if a server gathered the
    messages.

    Who must be honest: nobody; this is a simulation.
    """

    def connect(
        self, rank: int, world_size: int, workers_per_process: int, device: torch.device
    ) -> None:
        if world_size != 1:
            raise ValueError(
                f"InProcess holds all workers in one process. Found world_size={world_size}. "
                "Use transport=AllGather(), or Trainer(devices=1) with workers_per_process=n."
            )
        super().connect(rank, world_size, workers_per_process, device)

    def gather(
        self, messages: Sequence[Sequence[Tensor]], layout: Sequence[Field]
    ) -> list[tuple[Tensor, ...]]:
        return [tuple(message) for message in messages]

    def agree(self, tensor: Tensor) -> Tensor:
        return tensor

    def bytes_down(self, message: Message, answer: Payload) -> int:
        return sum(tensor.nbytes for tensor in answer)
