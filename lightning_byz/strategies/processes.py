"""The processes of a run: how they start, find each other, and what they say to each other.

`Processes` is all that the strategy asks for. `TorchProcesses` are those of torch.distributed, or a
single one. `lightning_byz.strategies.server_processes.ServerProcesses` meet at a parameter server.
"""

from __future__ import annotations

import atexit
import os
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from lightning_byz.compressors import Field
from lightning_byz.strategies import random_states
from lightning_byz.strategies.checkpoint_barrier import StoreBarrier, store_barrier
from lightning_byz.strategies.flat_parameters import FlatParameters
from lightning_byz.strategies.module_buffers import shared_tensors
from lightning_byz.strategies.validate import UnsupportedSetupError
from lightning_byz.strategies.workers import LocalWorkers, OneWorker
from lightning_byz.transports import Transport
from lightning_byz.transports.meeting import RankLostError, meeting
from lightning_byz.transports.wire import pack, packed_size, unpack

States = list[dict[int, dict[str, Tensor]]]
"""For each optimizer, by worker, the tensors of its state."""


class Processes(ABC):
    """The processes of a run, as the strategy sees them.

    Args:
        strategy: the RobustStrategy of this process.

    Attributes:
        saved_alone: this process writes a checkpoint without the others.
    """

    one_worker: type[LocalWorkers] = OneWorker
    """What computes the only worker of a process."""
    is_behind = False
    """Whether this batch's round is known to be closed, so that nothing has to be computed for it.
    """

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.saved_alone = False
        self._size: int | None = None

    @property
    def size(self) -> int:
        """How many there are: what the cluster environment says, once it has been told ours."""
        strategy = self.strategy
        return strategy.num_nodes * strategy.num_processes if self._size is None else self._size

    @property
    def replicas(self) -> int:
        """How many models there are: one in each process, or in each group of them that holds one
        together.
        """
        return self.size

    @property
    def replica(self) -> int:
        """The number of this process's."""
        return int(self.strategy.global_rank)

    @property
    def mesh_sizes(self) -> tuple[int, ...] | None:
        """Replicas, and the ranks of each along two dimensions; None: every process has a model."""
        return None

    @property
    def sampler_kwargs(self) -> dict[str, int]:
        """Which part of the data is this process's, for a DistributedSampler."""
        return {"num_replicas": self.size, "rank": self.strategy.global_rank}

    def flat(self, parameters: Sequence[Tensor]) -> FlatParameters:
        """Parameters as one vector, as far as this process has to exchange their gradients."""
        return FlatParameters(parameters)

    def connect_transport(self, transport: Transport) -> None:
        """Tells a transport who takes part."""
        strategy = self.strategy
        workers, device = strategy.workers_per_process, strategy.root_device
        transport.connect(self.replica, self.replicas, workers, device)

    def name_ranks(self) -> None:
        """Tells the cluster environment, and all that logs on rank 0 only, which rank this is."""
        strategy, environment = self.strategy, self.strategy.cluster_environment
        if environment is not None:
            environment.set_global_rank(
                strategy.node_rank * strategy.num_processes + strategy.local_rank
            )
            environment.set_world_size(strategy.num_nodes * strategy.num_processes)
            self._size = environment.world_size()  # whoever has started the processes knows better
        rank_zero_only.rank = strategy.global_rank  # type: ignore[attr-defined]

    @property
    def interrupted(self) -> bool:
        """Whether this process is on its way out, so that the others may not follow it."""
        trainer = getattr(self.strategy.lightning_module, "_trainer", None)
        return trainer is not None and bool(trainer.interrupted)

    @property
    @abstractmethod
    def alone(self) -> bool:
        """Whether this process may wait for no other: there is none, or none may come."""

    @abstractmethod
    def launcher(self) -> Any:
        """What starts the other processes; None: nothing has to."""

    @abstractmethod
    def connect(self) -> None:
        """The processes get to know each other."""

    @abstractmethod
    def leave(self) -> None:
        """This entry point of the program has ended."""

    @abstractmethod
    def share_model(self, module: Any) -> None:
        """Rank 0's parameters and buffers for everybody."""

    def begin_training(self, module: Any) -> None:  # noqa: B027  # most have nothing to prepare
        """Everything is set up."""

    def move_on(self) -> None:  # noqa: B027  # some do not count
        """This process is about to do something that all processes do."""

    def begin_batch(self, batch_idx: int) -> None:  # noqa: B027
        """A training batch begins."""

    def note_validated(self, samples: int) -> None:  # noqa: B027
        """This process validates so many samples more."""

    def end_validation(self) -> None:  # noqa: B027
        """A validation has ended."""

    # -- what Lightning asks for -------------------------------------------------------------------

    @abstractmethod
    def barrier(self, name: str | None) -> None:
        """Waits for all."""

    @abstractmethod
    def broadcast(self, obj: Any, src: int) -> Any:
        """An object of rank ``src`` for everybody."""

    @abstractmethod
    def gather(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        """The tensors, of one shape, of all processes that are heard."""

    @abstractmethod
    def decide(self, decision: bool, everybody: bool) -> bool:
        """One decision for all: whether everybody votes for it, or anybody."""

    # -- checkpoints -------------------------------------------------------------------------------

    @abstractmethod
    def begin_checkpoint(self, checkpoint: dict[str, Any], filepath: Any) -> bool:
        """Whether this checkpoint is to be written; sets ``saved_alone``."""

    def snapshot(self, path: Any) -> dict[str, Any] | None:
        """The checkpoint at this path, if the processes themselves hold it there."""
        return None

    def collected(self, local: States, states: tuple[Tensor, ...]) -> tuple[States, dict[int, Any]]:
        """All workers' states and all ranks' random states, at rank 0.

        Elsewhere, and where this process saves alone, its own.
        """
        if self.alone or self.saved_alone:
            return local, {self.strategy.global_rank: states}
        rank, share = self.replica, self.strategy.workers_per_process
        keys = [
            (i, worker - rank * share, name)
            for i, workers in enumerate(local)
            for worker in sorted(workers)
            for name in workers[worker]
        ]
        tensors = [*states, *(local[i][w + rank * share][name] for i, w, name in keys)]
        layout = [Field(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        bodies = self._to_rank_0(tensors, layout)
        if bodies is None:
            return local, {rank: states}
        everybody: States = [{} for _ in local]
        of_ranks: dict[int, Any] = {}
        for other, body in bodies.items():
            unpacked = [tensor.cpu().clone() for tensor in unpack(body, layout)]
            of_ranks[other] = tuple(unpacked[: len(states)])
            for (i, w, name), tensor in zip(keys, unpacked[len(states) :], strict=True):
                everybody[i].setdefault(w + other * share, {})[name] = tensor
        return everybody, of_ranks

    @abstractmethod
    def _to_rank_0(self, tensors: list[Tensor], layout: list[Field]) -> dict[int, Tensor] | None:
        """At rank 0, by rank, the packed tensors of all that are heard; elsewhere None or its
        own.
        """


class TorchProcesses(Processes):
    """The processes of torch.distributed, or the only one.

    A process of its own is a group of one, for samplers and code of the project that ask for a
    rank.
    """

    def __init__(self, strategy: Any) -> None:
        super().__init__(strategy)
        self._group_of_one = False
        self._store_barrier: StoreBarrier | None = None

    @property
    def alone(self) -> bool:
        return self.size == 1 or not dist.is_initialized() or self.interrupted

    def launcher(self) -> Any:
        strategy = self.strategy
        launchers, environment = strategy._launchers, strategy.cluster_environment
        if self.size == 1:
            return None  # so that it works in a notebook
        if strategy._start_method != "popen":
            return launchers._MultiProcessingLauncher(strategy, start_method=strategy._start_method)
        return launchers._SubprocessScriptLauncher(
            environment, strategy.num_processes, strategy.num_nodes
        )

    def connect(self) -> None:
        if self.size > 1:
            random_states.reset()
            self.name_ranks()
            with self._naming_nodes_that_do_not_come():
                self._join_process_group()
        elif not dist.is_initialized():
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
            self._group_of_one = True
            # Lightning takes any process group for several processes, and asks for sync_dist=True.
            warnings.filterwarnings("ignore", r"It is recommended to use `self\.log")
        self._check_process_group()
        if self.size > 1:
            meeting()
            timeout = self.strategy._timeout or timedelta(minutes=30)
            with self._naming_nodes_that_do_not_come():
                self._store_barrier = store_barrier(self._address, timeout)

    @property
    def _address(self) -> str:
        """Rank 0's host."""
        return str(self.strategy.cluster_environment.main_address)

    def _join_process_group(self) -> None:
        strategy, environment = self.strategy, self.strategy.cluster_environment
        cuda = strategy.root_device.type == "cuda"
        if strategy._process_group_backend is None:
            strategy._process_group_backend = "nccl" if cuda else "gloo"
        if not dist.is_initialized():
            os.environ["MASTER_ADDR"] = self._address
            os.environ["MASTER_PORT"] = str(environment.main_port)
            dist.init_process_group(
                strategy._process_group_backend,
                rank=environment.global_rank(),
                world_size=environment.world_size(),
                timeout=strategy._timeout,
                device_id=strategy.root_device if cuda else None,
            )
            atexit.register(_leave_process_group)

    @contextmanager
    def _naming_nodes_that_do_not_come(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            strategy = self.strategy
            raise RankLostError(
                f"All {self.size} processes of the run, on {strategy.num_nodes} node(s), should "
                f"meet at {self._address} within {strategy._timeout}. Rank {strategy.global_rank} "
                "has not met them all. Start the same command on every node, and see that each "
                "reaches that address and port of rank 0's (MASTER_ADDR, MASTER_PORT). "
                "ByzantineRobustStrategy(timeout=...) sets how long they wait. torch.distributed "
                f"said: {str(error).splitlines()[0][:300]}"
            ) from error

    def _check_process_group(self) -> None:
        """That somebody else may have made."""
        strategy = self.strategy
        environment = type(strategy.cluster_environment).__name__
        if dist.get_world_size() != self.size:
            raise UnsupportedSetupError(
                "The run should have as many processes as torch.distributed's process group. "
                f"Found {self.size} (Trainer(num_nodes={strategy.num_nodes}, "
                f"devices={strategy.num_processes}), cluster environment {environment}) and a "
                f"group of {dist.get_world_size()}. Give the Trainer the devices and nodes of the "
                "whole group, or a cluster environment that knows its world_size."
            )
        if dist.get_rank() != strategy.global_rank:
            raise UnsupportedSetupError(
                "The cluster environment should give every process its rank in "
                f"torch.distributed's process group. Found {strategy.global_rank} by {environment} "
                f"and {dist.get_rank()} in the group. Give the Trainer the cluster environment of "
                "what has started the processes: Trainer(plugins=[...])."
            )

    def leave(self) -> None:
        if self._group_of_one:
            _leave_process_group()
        self._group_of_one = False

    @torch.no_grad()
    def share_model(self, module: Any) -> None:
        tensors = shared_tensors(module)
        numbers = sum(tensor.numel() for tensor in tensors)
        kinds = zlib.crc32(repr([(*t.shape, t.dtype) for t in tensors]).encode())
        with self._met(f"a model of {numbers} numbers in {len(tensors)} tensors ({kinds:08x})"):
            for tensor in tensors:
                shared = tensor.detach().clone(memory_format=torch.contiguous_format)
                dist.broadcast(shared, src=0)
                if self.strategy.global_rank != 0 and not torch.equal(shared, tensor):
                    tensor.copy_(shared)

    def move_on(self) -> None:
        """Those that wait with a checkpoint learn that this process has passed their place."""
        if self._store_barrier is not None:
            self._store_barrier.move_on()

    @contextmanager
    def _met(self, place: str, group: Any = None) -> Iterator[None]:
        """A collective inside: all ranks are at it, or an error says where they are."""
        if self.alone or group not in (None, dist.group.WORLD):
            yield
            return
        self.move_on()
        ranks = meeting()
        ranks.begin(place)
        ranks.join()
        with ranks.naming_lost_ranks():
            yield

    def barrier(self, name: str | None) -> None:
        if name == "Trainer.save_checkpoint" and self.saved_alone:
            self.saved_alone = False
            return
        nccl = dist.get_backend() == "nccl"
        with self._met(f"barrier {name}"):
            dist.barrier(device_ids=[self.strategy.root_device.index] if nccl else None)

    def broadcast(self, obj: Any, src: int) -> Any:
        objects = [obj]
        with self._met("broadcast"):
            dist.broadcast_object_list(objects, src)
        return objects[0]

    def gather(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        received = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        with self._met("gather", group):
            dist.all_gather(received, tensor.contiguous(), group=group)
        return received

    def decide(self, decision: bool, everybody: bool) -> bool:
        device = self.strategy.root_device
        votes = torch.tensor(int(decision), device=device)
        with self._met("a decision"):
            dist.all_reduce(votes)
        return int(votes) == self.size if everybody else int(votes) > 0

    def begin_checkpoint(self, checkpoint: dict[str, Any], filepath: Any) -> bool:
        """Always. Asks at the store whether all ranks are here, so that they may enter
        collectives.
        """
        self.saved_alone = self.interrupted
        if self.alone or self._store_barrier is None:
            return True
        absent = self._store_barrier.absent(self.strategy.save_patience)
        if absent:
            warnings.warn(
                f"Rank {self.strategy.global_rank} saves {filepath} without ranks {absent}, which "
                "do not come here. The checkpoint holds the weights, but the algorithm's state "
                "at rank 0 only: a run that resumes from it starts the rest of it afresh. Call "
                "trainer.save_checkpoint on every rank.",
                stacklevel=2,
            )
        self.saved_alone = bool(absent)
        return True

    def _to_rank_0(self, tensors: list[Tensor], layout: list[Field]) -> dict[int, Tensor] | None:
        return self._gathered(tensors, layout, range(self.size))

    def _gathered(
        self,
        tensors: list[Tensor],
        layout: list[Field],
        members: Sequence[int],
        group: dist.ProcessGroup | None = None,
    ) -> dict[int, Tensor] | None:
        """At the first of these ranks, which are a group, by place in it, all of their packed
        tensors; elsewhere None.
        """
        gloo = dist.get_backend() == "gloo"
        device = torch.device("cpu") if gloo else self.strategy.root_device
        sent = torch.zeros(packed_size(layout), dtype=torch.uint8, device=device)
        pack([tensor.to(device) for tensor in tensors], layout, sent)
        first = self.strategy.global_rank == members[0]
        received = [torch.empty_like(sent) for _ in members] if first else None
        dist.gather(sent, received, dst=members[0], group=group)
        return None if received is None else dict(enumerate(received))


def _leave_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
