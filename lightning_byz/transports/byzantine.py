"""A transport that lies: some of the workers behind it send what an attack says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_byz.attacks import Attack
from lightning_byz.compressors import Compressor, Field
from lightning_byz.transports.base import Message, Transport
from lightning_byz.types import Payload, Round, keyed_generator


class ByzantineTransport(Transport):
    """Replaces the messages of some workers by an attack's, after all honest messages of the round are known.

    The attack sees decoded messages and its answers go through the same codec. Every process computes the same lies.

    Args:
        inner: the transport that moves the messages.
        attack: what the Byzantine workers send.
        workers: their indices.
        active: whether they lie in the round with this step.
    """

    def __init__(self, inner: Transport, attack: Attack, workers: Sequence[int], active: Callable[[int], bool]) -> None:
        self.inner, self.attack, self.byzantine, self.active = inner, attack, sorted(workers), active
        self.rank, self.world_size, self.workers_per_process = inner.rank, inner.world_size, inner.workers_per_process

    def gather(self, messages: Sequence[Sequence[Tensor]], layout: Sequence[Field]) -> list[tuple[Tensor, ...]]:
        return self.inner.gather(messages, layout)

    def agree(self, tensor: Tensor) -> Tensor:
        return self.inner.agree(tensor)

    def bytes_down(self, message: Message, answer: Payload) -> int:
        return self.inner.bytes_down(message, answer)

    def exchange(self, messages: Sequence[Message], codec: Compressor, dim: int, dtype: torch.dtype, round: Round) -> list[Message]:
        everybody = self.inner.exchange(messages, codec, dim, dtype, round)
        if not self.active(round.step):
            return everybody

        def decoded(worker: int) -> Tensor | None:
            flags, payload = everybody[worker]
            spoke = bool(flags[0]) and bool(codec.valid(payload, dim))
            return codec.decode(payload, dim) if spoke else None

        honest = [row for w in range(round.n) if w not in self.byzantine and (row := decoded(w)) is not None]
        if not honest:
            return everybody
        own = [row if (row := decoded(w)) is not None else torch.zeros_like(honest[0]) for w in self.byzantine]
        device = honest[0].device
        lies = self.attack(torch.stack(honest), torch.stack(own), keyed_generator("attack", round.seed, round.step, device=device))
        for worker, lie in zip(self.byzantine, lies, strict=True):
            generator = round._replace(worker=worker).private("compressor", device)
            flags = everybody[worker].flags.clone()
            flags[0] = 1
            everybody[worker] = Message(flags, codec.encode(lie.to(dtype), generator))
        return everybody
