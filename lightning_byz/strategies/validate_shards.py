"""What is refused before the first step of a sharded model."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lightning_byz.algorithms import Algorithm
from lightning_byz.compressors import Compressor, PerShard
from lightning_byz.strategies.mesh import ReplicaMesh
from lightning_byz.strategies.module_buffers import NORMS
from lightning_byz.strategies.overlap import is_lightnings
from lightning_byz.strategies.validate import UnsupportedSetupError
from lightning_byz.transports import Transport
from lightning_byz.transports.collective import Collective

_SEE_RANKS = ("SuspicionMonitor", "ReplicaCheck", "DuplicateBatchCheck", "ShadowMode")
"""Callbacks that take a rank for a worker with a whole model."""


def check_sizes(
    data_parallel: Any, tensor_parallel: Any, workers_per_process: int, transport: Transport | None
) -> None:
    """Refuses arguments of the strategy that cannot go together.

    Raises:
        ValueError: for sizes that are no numbers of ranks.
        UnsupportedSetupError: for other arguments that do not fit.
    """
    for name, value in (
        ("data_parallel_size", data_parallel),
        ("tensor_parallel_size", tensor_parallel),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"`{name}` should be an integer of at least 1, a number of processes of each "
                f"replica. Found {name}={value!r}."
            )
    if workers_per_process != 1:
        raise UnsupportedSetupError(
            "A worker that several processes hold together should be the only one of each. Found "
            f"workers_per_process={workers_per_process}. Leave it out."
        )
    if transport is not None and not isinstance(transport, Collective):
        raise UnsupportedSetupError(
            "The parts of a sharded model should be exchanged over torch.distributed. Found "
            f"transport={type(transport).__name__}(). Use Sharded() or AllGather(), or leave it "
            "out."
        )


def check_model(module: nn.Module, mesh: ReplicaMesh) -> None:
    """Refuses models that their `configure_model` does not shard.

    Raises:
        UnsupportedSetupError: says what to do.
    """
    if is_lightnings(module.configure_model):
        raise UnsupportedSetupError(
            "A model for data_parallel_size and tensor_parallel_size should be sharded in the "
            f"hook `configure_model`. Found none in {type(module).__name__}. Write one that calls "
            "fully_shard(..., mesh=self.device_mesh['data_parallel']), or leave the sizes out."
        )
    if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        raise UnsupportedSetupError(
            "A model should be sharded by torch.distributed.fsdp.fully_shard. Found a "
            "FullyShardedDataParallel in it. Use fully_shard(module, mesh=...) in its place."
        )
    if mesh.places > 1 and not any(isinstance(p, DTensor) for p in module.parameters()):
        raise UnsupportedSetupError(
            f"`configure_model` should shard the model over the {mesh.places} ranks of a replica. "
            f"Found no distributed parameter in {type(module).__name__}. Call fully_shard or "
            "parallelize_module with self.device_mesh in it."
        )
    for name, p in module.named_parameters():
        ranks = p.device_mesh.mesh.flatten().tolist() if isinstance(p, DTensor) else []
        if not set(ranks) <= set(mesh.members):
            raise UnsupportedSetupError(
                "A model should be sharded over the ranks of its replica, here "
                f"{mesh.members}. Found {name} on the ranks {ranks}, as fully_shard places it "
                "without a mesh. Pass mesh=self.device_mesh['data_parallel']."
            )
        if isinstance(p, DTensor) and p.device.type not in (p.device_mesh.device_type, "meta"):
            raise UnsupportedSetupError(
                "Parameters should stay on the accelerator, where they are exchanged. Found "
                f"{name} on {p.device}, as a CPUOffloadPolicy leaves it. Leave offload_policy out."
            )
    for name, part in module.named_modules():
        found = [
            b for b, buffer in part.named_buffers(recurse=False) if isinstance(buffer, DTensor)
        ]
        if found and isinstance(part, NORMS):
            raise UnsupportedSetupError(
                "Buffers of batch normalization should be plain tensors, which the strategy "
                f"merges. Found {name}.{found[0]}, which is distributed. Leave the module out of "
                "parallelize_module."
            )


def check_shards(strategy: Any, trainer: Any) -> None:
    """Refuses what cannot be done with a model of which every rank holds a part.

    Raises:
        UnsupportedSetupError: says what should hold, what was found, and what to do.
    """
    if getattr(strategy.precision_plugin, "scaler", None) is not None:
        raise UnsupportedSetupError(
            "A sharded model should be trained without a loss scaler. Found precision='16-mixed'. "
            "Use 'bf16-mixed', or a MixedPrecisionPolicy of fully_shard."
        )
    callbacks = {kind.__name__ for each in trainer.callbacks for kind in type(each).__mro__}
    for name in _SEE_RANKS:
        if name in callbacks:
            raise UnsupportedSetupError(
                f"{name} takes every rank for a worker that holds a whole model. Found it with "
                "data_parallel_size or tensor_parallel_size. Leave it out."
            )
    if strategy.resolved is not None and strategy.n > 1:
        check_algorithm(strategy.resolved)
    elif strategy.resolved is not None:
        check_one_replica(strategy.lightning_module, strategy.processes.mesh)


def check_one_replica(module: nn.Module, mesh: ReplicaMesh) -> None:
    """Refuses trainable parameters that nobody would average: a single replica exchanges nothing.

    Raises:
        UnsupportedSetupError: says what to do.
    """
    for name, p in module.named_parameters():
        if p.requires_grad and not mesh.is_averaged_inside(p):
            raise UnsupportedSetupError(
                "With one replica every trainable parameter should be sharded over the data, as "
                f"only torch averages gradients. Found {name}, which is not. Call "
                "fully_shard(..., mesh=self.device_mesh['data_parallel']) on the module that has "
                "it, use several replicas, or requires_grad_(False)."
            )


def check_algorithm(algorithm: Algorithm) -> None:
    """Refuses algorithms that need more of a worker than the parts of one gradient.

    Raises:
        UnsupportedSetupError: says what to use.
    """
    name = type(algorithm).__name__
    if algorithm.needs_previous or algorithm.uses_trusted:
        raise UnsupportedSetupError(
            "The algorithm of a sharded model should take one gradient a step. Found "
            f"{name}, which asks for further ones, at other parameters or on other data. Use "
            "another, such as RobustSGD() or ByzEF21SGDM()."
        )
    for field in dataclasses.fields(algorithm):  # type: ignore[arg-type]
        part = getattr(algorithm, field.name)
        if not isinstance(part, Compressor) or _fits_shards(part):
            continue
        raise UnsupportedSetupError(
            f"{part!r} looks at the whole vector, of which every rank of a sharded model has a "
            f"part. Found it as {name}(..., {field.name}=...). Write "
            f"PerShard({part!r}, shards=1), which compresses every rank's part on its own."
        )


def _fits_shards(compressor: Compressor) -> bool:
    """Whether a compressor looks at no whole vector, or its user knows that it looks at parts."""
    inner = getattr(compressor, "inner", None)
    known = isinstance(compressor, PerShard)
    return known or compressor.coordinate_wise or (inner is not None and _fits_shards(inner))
