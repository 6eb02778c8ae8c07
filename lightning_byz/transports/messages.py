"""What travels in a round."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_byz.compressors import WireFormat
from lightning_byz.types import Payload


class Message(NamedTuple):
    """What one worker contributes to a round.

    Attributes:
        flags: uint8 ``[1 + P]``: whether the worker takes part, then for each of P parameters
            whether it has a gradient.
        payload: the encoded vector.
        checked: this process has made the payload, and found it to be valid. Never set for what
            comes from another one.
    """

    flags: Tensor
    payload: Payload
    checked: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return sum(tensor.nbytes for tensor in self.payload)


class Received(NamedTuple):
    """The messages of a round, or the shares of them that this rank aggregates.

    Attributes:
        messages: of all n workers, in order.
        format: how their payloads are decoded: to vectors of the columns of this rank's
            `Transport.span`.
        valid: ``[n]`` bool, whether they may be, by all ranks' shares of them.
    """

    messages: list[Message]
    format: WireFormat
    valid: Tensor


class Awaited(NamedTuple):
    """For whose messages a server waits in a round.

    Attributes:
        spare: how many messages of the round's cohort it does not wait for: all but the first k.
        least: so few are enough at the deadline.
        full: whether workers compute gradients over all of their data first.
    """

    spare: int
    least: int
    full: bool


class Verdict(NamedTuple):
    """What a server makes of a round, for workers that do not see each other's messages.

    Attributes:
        cohort: ``[n]`` bool, the workers that took part.
        present: ``[n]`` bool, the workers whose message counted.
        used: ``[P]`` bool, as in the round's outcome.
        answer: the estimate, in the downlink's wire format; None if the step is to be skipped.
        seconds: how long the server waited.
        reason: why there is no estimate; empty otherwise.
    """

    cohort: Tensor
    present: Tensor
    used: Tensor
    answer: Payload | None
    seconds: float
    reason: str
