"""A model of which every rank of a replica holds a part: how it is set up, saved and loaded, as
Lightning's ModelParallelStrategy does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_byz.strategies.checkpoint import CHECKPOINT_KEY
from lightning_byz.strategies.gradient_sync import parameters_of
from lightning_byz.strategies.mesh import local
from lightning_byz.strategies.sharded_parameters import ShardedParameters
from lightning_byz.strategies.sharded_state import SavedVectors, with_parts, with_whole_vectors
from lightning_byz.strategies.validate_shards import check_model, check_shards

_METADATA = "meta.pt"
"""Of a checkpoint that is a folder: what is no tensor of the model, of an optimizer, or of the
algorithm. Lightning's ModelParallelStrategy gives it this name.
"""


class ModelShards:
    """The sharded model of a strategy.

    Args:
        strategy: the RobustStrategy, whose processes are those of a mesh.
        distributed: checkpoints are folders into which every rank of the first replica writes its
            part; False: files with whole tensors, which rank 0 writes.

    Attributes:
        names: of the parameters, by id. Outside of set-up the module may show whole copies of them,
            which a forward pass has left.
    """

    def __init__(self, strategy: Any, distributed: bool) -> None:
        self.strategy, self.distributed = strategy, distributed
        self.names: dict[int, str] = {}
        self._clipped: ShardedParameters | None = None

    # -- set-up ------------------------------------------------------------------------------------

    def prepare(self, trainer: Any) -> None:
        """Checks that the model can be trained in shards, and gives parameters on the meta device
        memory.

        Raises:
            UnsupportedSetupError: says what should hold, what was found, and what to do.
        """
        strategy = self.strategy
        for part in strategy.lightning_module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # an earlier run may have ended with a forward pass
        check_model(strategy.lightning_module, strategy.processes.mesh)
        check_shards(strategy, trainer)
        materialize(strategy.lightning_module, strategy.root_device)
        clips = {"clip_grad_by_norm": self.clip_norm, "clip_grad_by_value": clip_values}
        vars(strategy.precision_plugin).update(clips)

    def name_parameters(self) -> None:
        """Called once the model is set up."""
        named = self.strategy.lightning_module.named_parameters()
        self.names = {id(p): name for name, p in named}

    def leave(self) -> None:
        """Gives the precision plugin its own functions back."""
        self._clipped = None
        for name in ("clip_grad_by_norm", "clip_grad_by_value"):
            vars(self.strategy.precision_plugin).pop(name, None)

    @torch.no_grad()
    def clip_norm(self, optimizer: Any, clip_val: float) -> None:
        """Scales an optimizer's gradients, so that the norm of all is at most ``clip_val``, as
        `torch.nn.utils.clip_grad_norm_` does, which takes no tensors of unlike meshes together.
        """
        used = [p for p in parameters_of(optimizer) if p.grad is not None]
        if not used:  # on no rank: the round was skipped
            return
        layout = self._clipped
        if layout is None or [*map(id, layout.parameters)] != [*map(id, used)]:
            layout = self._clipped = ShardedParameters(used, self.strategy.processes.mesh)
        square = torch.linalg.vector_norm(layout.read_gradients(), dtype=torch.float64).square()
        dist.all_reduce(square, group=layout.mesh.group)
        factor = (clip_val / (square.sqrt() + 1e-6)).clamp(max=1.0)
        for p in used:
            part = local(p.grad)  # type: ignore[arg-type]
            part.mul_(factor.to(part))

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None) -> Iterator[None]:
        """Parameters are not made on the accelerator, where a whole model may have no room."""
        precision = self.strategy.precision_plugin
        with torch.device("meta") if empty_init else nullcontext(), precision.tensor_init_context():
            yield

    # -- states ------------------------------------------------------------------------------------

    @property
    def _saving(self) -> StateDictOptions:
        return StateDictOptions(full_state_dict=not self.distributed, cpu_offload=True)

    def model_state(self) -> dict[str, Any]:
        """The model's state: DTensors; or whole tensors, at rank 0 only."""
        return get_model_state_dict(self.strategy.model, options=self._saving)

    def load_model_state(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        """Loads the model's state of a checkpoint that `load` gave."""
        state = checkpoint["state_dict"]
        options = StateDictOptions(full_state_dict=not _is_distributed(state), strict=strict)
        set_model_state_dict(self.strategy.model, state, options=options)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """An optimizer's state: by name, of DTensors; or by number as torch's optimizers have it,
        of whole tensors, at rank 0 only.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # LightningOptimizer's own
        state = self._named_state(optimizer, self._saving)
        return state if self.distributed or not state else _renamed(state, _numbers(state))

    def _named_state(self, optimizer: Any, options: StateDictOptions) -> dict[str, Any]:
        """Torch makes an empty step where there is no state yet, which is taken back."""
        sync, fresh = self.strategy.sync, not optimizer.state
        with nullcontext() if sync is None else sync.ignoring_steps():
            model = self.strategy.model
            state: dict[str, Any] = dict(
                get_optimizer_state_dict(model, optimizer, options=options)
            )
        if fresh:
            optimizer.state.clear()
            for of_parameter in state.get("state", {}).values():
                if "step" in of_parameter:
                    of_parameter["step"] = of_parameter["step"] * 0
        return state

    def _load_optimizer(self, optimizer: Any, state: dict[str, Any], whole: bool) -> None:
        if whole:  # numbered, or named as Lightning's Fabric does
            numbers = _numbers(self._named_state(optimizer, StateDictOptions()))
            state = _renamed(state, {number: name for name, number in numbers.items()})
        sync = self.strategy.sync
        options = StateDictOptions(full_state_dict=whole, strict=False)
        with nullcontext() if sync is None else sync.ignoring_steps():
            set_optimizer_state_dict(
                self.strategy.model, optimizer, optim_state_dict=state, options=options
            )
        for p in parameters_of(optimizer):  # those that had no gradient yet start afresh
            if self.names[id(p)] not in state["state"]:
                optimizer.state.pop(p, None)

    # -- files -------------------------------------------------------------------------------------

    def save(
        self,
        checkpoint: dict[str, Any],
        filepath: Any,
        storage_options: Any,
        write: Callable[[dict[str, Any], Path], None],
    ) -> None:
        """Writes a checkpoint: the first replica does. All ranks call it.

        Args:
            checkpoint: what Lightning collected, and this rank's part of the algorithm's state.
            filepath: where to.
            storage_options: should be None.
            write: Lightning's own way to write a file, at rank 0.
        """
        if storage_options is not None:
            raise TypeError(
                "A checkpoint of a sharded model should have no `storage_options`: it is not "
                f"written by the CheckpointIO. Found {storage_options!r}. Leave them out."
            )
        strategy = self.strategy
        mesh, path = strategy.processes.mesh, Path(strategy.broadcast(filepath))
        if path.is_dir() and not self.distributed and not (path / _METADATA).exists():
            raise IsADirectoryError(
                f"The path of a checkpoint should be a file. Found a folder: {path}. Use another "
                "path, or save_distributed_checkpoint=True."
            )
        if mesh.replica:
            return
        algorithm, vectors = checkpoint.get(CHECKPOINT_KEY), SavedVectors()
        if algorithm is not None:
            checkpoint[CHECKPOINT_KEY] = (
                vectors.taken_out_of(algorithm, strategy)
                if self.distributed
                else with_whole_vectors(algorithm, strategy)
            )
        if not self.distributed:
            if strategy.is_global_zero and path.is_dir():
                shutil.rmtree(path)
            write(checkpoint, path)
            return
        if strategy.is_global_zero and path.is_file():
            path.unlink()
        state = {"state_dict": checkpoint.pop("state_dict"), **vectors.tensors}
        optimizers = checkpoint.pop("optimizer_states", [])
        state |= {f"optimizer_{i}": optimizer for i, optimizer in enumerate(optimizers)}
        path.mkdir(parents=True, exist_ok=True)
        if strategy.is_global_zero:  # a folder without it is none, until all is written
            (path / _METADATA).unlink(missing_ok=True)
        save(state, checkpoint_id=path, process_group=mesh.group)
        if strategy.is_global_zero:
            torch.save(checkpoint, path / f"{_METADATA}.part")
            os.replace(path / f"{_METADATA}.part", path / _METADATA)

    def load(self, filepath: Any, weights_only: bool | None) -> dict[str, Any]:
        """A checkpoint of this strategy or of ModelParallelStrategy, or of a model that is not
        sharded, for this mesh: every replica reads it. Optimizers are loaded at once.
        """
        strategy = self.strategy
        fitting = strategy.lightning_module.trainer.state.fn == "fit"
        optimizers = strategy.optimizers if fitting else []
        path, group = Path(strategy.broadcast(filepath)), strategy.processes.mesh.group
        checkpoint: dict[str, Any]
        if path.is_file():
            checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
            states = checkpoint.get("optimizer_states", ())
            for optimizer, state in zip(optimizers, states, strict=False):
                self._load_optimizer(optimizer, state, whole=True)
            if CHECKPOINT_KEY in checkpoint and strategy.groups:
                checkpoint[CHECKPOINT_KEY] = with_parts(checkpoint[CHECKPOINT_KEY], strategy)
            return checkpoint
        if not (path / _METADATA).is_file():
            raise ValueError(
                "The path of a checkpoint should be a file, or a folder that "
                f"save_distributed_checkpoint=True has written to its end. Found {path}."
            )
        checkpoint = torch.load(path / _METADATA, map_location="cpu", weights_only=weights_only)
        checkpoint["state_dict"] = get_model_state_dict(strategy.model)
        load({"state_dict": checkpoint["state_dict"]}, checkpoint_id=path, process_group=group)
        saved = set(FileSystemReader(path).read_metadata().planner_data.values())
        if optimizers and not any(place[0] == "optimizer_0" for place in saved):
            return checkpoint  # of weights only, which Lightning refuses to resume from
        for i, optimizer in enumerate(optimizers):
            name = f"optimizer_{i}"
            state = {name: self._named_state(optimizer, StateDictOptions())}
            known = {place[2] for place in saved if place[:2] == (name, "state")}
            states = state[name]["state"]
            state[name]["state"] = {each: states[each] for each in states if each in known}
            load(state, checkpoint_id=path, process_group=group)
            self._load_optimizer(optimizer, state[name], whole=False)
        checkpoint.setdefault("optimizer_states", [])
        if CHECKPOINT_KEY in checkpoint and strategy.groups:
            vectors = SavedVectors()
            vectors.ask_for(checkpoint[CHECKPOINT_KEY], strategy)
            if vectors.tensors:
                load(vectors.tensors, checkpoint_id=path, process_group=group)
            checkpoint[CHECKPOINT_KEY] = vectors.put_into(checkpoint[CHECKPOINT_KEY], strategy)
        return checkpoint


@torch.no_grad()
def clip_values(optimizer: Any, clip_val: float) -> None:
    """Clips every number of an optimizer's gradients to at most this size."""
    for p in parameters_of(optimizer):
        if p.grad is not None:
            local(p.grad).clamp_(-clip_val, clip_val)


def _is_distributed(state: Mapping[str, Any]) -> bool:
    return any(isinstance(value, DTensor) for value in state.values())


def _numbers(state: Mapping[str, Any]) -> dict[str, int]:
    """By name, the number that torch's optimizers give a parameter."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    return {name: number for number, name in enumerate(names)}


def _renamed(state: Mapping[str, Any], keys: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other keys for its parameters; those without one stay."""
    groups = [
        {**group, "params": [keys.get(key, key) for key in group["params"]]}
        for group in state["param_groups"]
    ]
    states = {keys.get(key, key): value for key, value in state["state"].items()}
    return {**state, "state": states, "param_groups": groups}


@torch.no_grad()
def materialize(module: nn.Module, device: torch.device) -> None:
    """Gives a model's tensors on the meta device memory, and numbers by ``reset_parameters``;
    others keep theirs.

    Raises:
        TypeError: names the modules that have tensors and no such method.
    """
    if not any(t.is_meta for t in _tensors(module)):
        return
    on_meta = [
        part for part in module.modules() if any(t.is_meta for t in _tensors(part, recurse=False))
    ]
    kept = {i: local(t).clone() for i, t in enumerate(_tensors(module)) if not t.is_meta}
    module.to_empty(device=device)
    without = set[str]()
    for part in on_meta:
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
        else:
            without.add(type(part).__name__)
    if without:
        raise TypeError(
            "Modules that are made on the meta device should have a method reset_parameters(). "
            f"Found none in {', '.join(sorted(without))}. Write one that fills in the module's own "
            "parameters and buffers, or make them on a CPU."
        )
    tensors = _tensors(module)
    for i, value in kept.items():
        local(tensors[i]).copy_(value)


def _tensors(module: nn.Module, recurse: bool = True) -> list[Tensor]:
    return [*module.parameters(recurse), *module.buffers(recurse)]
