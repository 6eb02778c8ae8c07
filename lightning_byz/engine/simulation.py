"""What simulated faults say of a step. An honest run holds `HONEST`, which says nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_byz.compressors import Compressor
from lightning_byz.transports import Message, Received
from lightning_byz.types import Round

if TYPE_CHECKING:
    from lightning_byz.engine.adversary import Adversary
    from lightning_byz.engine.server_side import ServerSide


class Honest:
    """A run without simulated faults."""

    @property
    def has_liars(self) -> bool:
        """Whether some fault names workers that lie."""
        return False

    def liars_at(self, step: int) -> set[int]:
        """The workers that are known to lie in a step."""
        return set()

    def arrivals_at(self, step: int) -> Tensor | None:
        """``[n]`` float64, the seconds after which the workers' messages arrive in a step.

        inf: never, so that the worker is silent. None: nobody is late.
        """
        return None

    def poisoned(self, worker: int, step: int, batch: Any) -> Any:
        """A worker's batch, as faults of its data leave it."""
        return batch

    @property
    def forges(self) -> bool:
        """Whether messages may be replaced, by liars that see the others' first."""
        return False

    def received(
        self,
        messages: Sequence[Message],
        codec: Compressor,
        round: Round,
        server: ServerSide,
        index: int,
    ) -> Received:
        """What this rank aggregates of the messages of all workers.

        Args:
            messages: whole ones, of the local workers.
            codec: their format.
            round: the round.
            server: the server's half.
            index: number of the exchange in a run of several.
        """
        return server.transport.exchange(messages, codec, server.dim, server.dtype, round)


HONEST = Honest()


class Simulation(Honest):
    """The faults that callbacks install.

    Attributes:
        liars: step -> the workers that lie in it.
        delays: step -> ``[n]`` the seconds by which each worker is late in it, inf for ever.
        data_attacks: (worker, step, batch) -> batch.
        adversaries: who replaces messages, in turn: each one sees what those before it left.
    """

    def __init__(self) -> None:
        self.liars: list[Callable[[int], Sequence[int]]] = []
        self.delays: list[Callable[[int], Tensor]] = []
        self.data_attacks: list[Callable[[int, int, Any], Any]] = []
        self.adversaries: list[Adversary] = []

    @property
    def has_liars(self) -> bool:
        return bool(self.liars)

    def liars_at(self, step: int) -> set[int]:
        return {worker for liars in self.liars for worker in liars(step)}

    def arrivals_at(self, step: int) -> Tensor | None:
        """Those of all delays together; liars are the first."""
        if not self.delays:
            return None
        arrivals = torch.stack([delay(step) for delay in self.delays]).sum(0)
        liars = torch.tensor(sorted(self.liars_at(step)), dtype=torch.int64)
        return arrivals.index_fill_(0, liars, 0.0)

    def poisoned(self, worker: int, step: int, batch: Any) -> Any:
        for attack in self.data_attacks:
            batch = attack(worker, step, batch)
        return batch

    @property
    def forges(self) -> bool:
        return bool(self.adversaries)

    def received(
        self,
        messages: Sequence[Message],
        codec: Compressor,
        round: Round,
        server: ServerSide,
        index: int,
    ) -> Received:
        """On shards, whole messages are gathered for the adversaries to see; nobody counts these
        bytes.
        """
        transport, dim, dtype = server.transport, server.dim, server.dtype
        for adversary in self.adversaries:
            adversary.begin(index, dim, round)
        active = [adversary for adversary in self.adversaries if adversary.active(round.step)]
        if not active:
            return transport.exchange(messages, codec, dim, dtype, round)
        everybody = transport.everybody(messages, codec, dim, dtype, round)
        liars = self.liars_at(round.step)
        for adversary in active:
            everybody = adversary.forge(everybody, codec, round, server, index, liars)
        return transport.deliver(everybody, codec, dim)
