"""The attack interfaces: attacks on messages, and attacks on a worker's data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Attack(ABC):
    """What colluding Byzantine workers send, chosen after all honest messages of the round are fixed.

    An attack sees the honest messages as the server decodes them, and answers in the same space (gradients, momenta or
    compressed differences, whatever the algorithm sends); what it answers then goes through the same codec. It picks
    values, never the wire format.
    """

    @abstractmethod
    def __call__(self, honest: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
        """The Byzantine messages.

        Args:
            honest: ``[h, d]`` the honest workers' messages, h >= 1; not to be modified.
            own: ``[b, d]`` what the Byzantine workers would have sent had they been honest; not to be modified.
            generator: the attackers' common random stream of this round.

        Returns:
            ``[b, d]`` what they send instead.
        """


class DataAttack(ABC):
    """What a Byzantine worker does to its own batch, before an otherwise honest step."""

    @abstractmethod
    def __call__(self, batch: Any) -> Any:
        """The batch that the worker trains on instead; the given one is not modified."""


def everyone(message: Tensor, own: Tensor) -> Tensor:
    """The same message ``[d]`` from every Byzantine worker: ``[b, d]``."""
    return message.expand_as(own).clone()
