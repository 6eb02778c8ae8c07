"""Every process gathers every message and runs the rule itself."""

from __future__ import annotations

from torch import Tensor

from lightning_byz.transports.collective import Collective
from lightning_byz.transports.messages import Message
from lightning_byz.types import Payload


class AllGather(Collective):
    """One all-gather of the payloads over torch.distributed; every rank then aggregates all n
    messages.

    A rank moves n payloads a round. Who must be honest: every *process* (a collective waits for all
    of them, and each computes its own result); the gradients that they send may be anything. What
    decisions depend on (distances, norms) is rank 0's, so that unlike machines cannot pick
    different rows.
    """

    @property
    def in_shards(self) -> bool:  # type: ignore[override]
        """Where workers are held in parts, every rank aggregates its part only."""
        return self.has_parts

    def total(self, tensor: Tensor) -> Tensor:
        return self._over_parts(tensor)

    def bytes_down(self, message: Message, answer: Payload) -> int:
        return (self.n - 1) * message.nbytes
