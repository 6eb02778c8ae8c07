"""The algorithm's state in checkpoints of a sharded model: vectors of one rank's numbers, whole
ones, and tensors like the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_byz.algorithms import Algorithm
from lightning_byz.engine.state_layout import columns_of
from lightning_byz.strategies.checkpoint import CHECKPOINT_KEY
from lightning_byz.strategies.sharded_parameters import ShardedParameters

Convert = Callable[[int, str, Tensor], Tensor]
"""From the number of an optimizer, a name, and rows ``[..., d]`` to others."""


def _converted(saved: Mapping[str, Any], strategy: Any, convert: Convert) -> dict[str, Any]:
    """What `run_state` gave, with other vectors; everything else stays.

    Args:
        saved: from `run_state`.
        strategy: the RobustStrategy, with its groups.
        convert: makes the other vectors. Called in one order on all ranks.
    """
    servers, workers = list(saved["server"]), list(saved["workers"])
    pairs = zip(servers, workers, strict=True)
    for i, ((server, states), group) in enumerate(zip(pairs, strategy.groups, strict=False)):
        if server["dim"] is None:
            continue
        algorithm, n = group.exchange.algorithm, saved["n"]
        of_server = _vectors(partial(_server, algorithm, n))
        of_worker = _vectors(algorithm.init_worker)
        own, previous = server["server"], server["previous"]
        changed = {**server}
        if own is not None:
            changed["server"] = {
                name: convert(i, f"server.{name}", tensor) if name in of_server else tensor
                for name, tensor in sorted(own.items())
            }
        if previous is not None:
            changed["previous"] = convert(i, "previous", previous)
        servers[i] = changed
        workers[i] = {
            worker: {
                name: convert(i, f"worker_{worker}.{name}", tensor) if name in of_worker else tensor
                for name, tensor in sorted(state.items())
            }
            for worker, state in sorted(states.items())
        }
    return {**saved, "server": servers, "workers": workers}


def _server(algorithm: Algorithm, n: int, x: Tensor) -> Any:
    return algorithm.init_server(x, n)


def _vectors(init: Callable[[Tensor], Any]) -> set[str]:
    """The names of a state's tensors that have a number for every coordinate."""
    fields = init(torch.empty(1, device="meta"))._fields
    here = columns_of(init, 64, torch.float32)
    return {name for name, columns in zip(fields, here, strict=True) if columns}


def _layouts(strategy: Any) -> list[ShardedParameters]:
    return [group.present() for group in strategy.groups]


def _of_dims(saved: dict[str, Any], dims: list[int]) -> dict[str, Any]:
    """The same, that says that its vectors are of these sizes."""
    servers = [
        server if server["dim"] is None else {**server, "dim": dim}
        for server, dim in zip(saved["server"], dims, strict=False)
    ]
    return {**saved, "server": [*servers, *saved["server"][len(servers) :]]}


def _by_row(rows: Tensor, convert: Callable[[Tensor], Tensor]) -> Tensor:
    """``rows [..., d]`` with each vector converted."""
    flat = [convert(row) for row in rows.reshape(-1, rows.shape[-1])]
    return torch.stack(flat).view(*rows.shape[:-1], -1) if flat else rows


def _skips(strategy: Any, saved: Mapping[str, Any]) -> Callable[[str], bool]:
    """Which names are of workers that this replica does not go on with."""
    follow = strategy.followed(saved["n"])
    replica = strategy.processes.replica
    own = follow[replica] if replica < len(follow) else None
    return lambda name: name.startswith("worker_") and not name.startswith(f"worker_{own}.")


def with_whole_vectors(saved: Mapping[str, Any], strategy: Any) -> dict[str, Any]:
    """The state as that of a model that is not sharded. All ranks of the replica call it."""
    layouts = _layouts(strategy)

    def whole(i: int, name: str, rows: Tensor) -> Tensor:
        device = layouts[i].device
        return _by_row(rows, lambda row: layouts[i].whole(row.to(device)).cpu())

    return _of_dims(_converted(saved, strategy, whole), [layout.whole_dim for layout in layouts])


def with_parts(saved: Mapping[str, Any], strategy: Any) -> dict[str, Any]:
    """This rank's part of the state of a model that is not sharded."""
    layouts, skips = _layouts(strategy), _skips(strategy, saved)

    def part(i: int, name: str, rows: Tensor) -> Tensor:
        if skips(name) or rows.shape[-1] != layouts[i].whole_dim:
            return rows
        device = layouts[i].device
        return _by_row(rows, lambda row: layouts[i].part_of(row.to(device)).to(rows))

    return _of_dims(_converted(saved, strategy, part), [layout.dim for layout in layouts])


class SavedVectors:
    """The vectors of a state, as tensors like the parameters, which torch.distributed.checkpoint
    saves in parts and loads into other meshes.

    Attributes:
        tensors: by name.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def _names(self, strategy: Any, i: int, name: str, rows: Tensor) -> list[list[str]]:
        """By vector and parameter, the name of a tensor."""
        known = strategy.shards.names
        parameters = [known[id(p)] for p in _layouts(strategy)[i].parameters]
        count = rows.shape[:-1].numel()
        prefix = f"{CHECKPOINT_KEY}.optimizer_{i}.{name}"
        return [[f"{prefix}.{row}.{parameter}" for parameter in parameters] for row in range(count)]

    def taken_out_of(self, saved: Mapping[str, Any], strategy: Any) -> dict[str, Any]:
        """The state with empty vectors; theirs are `tensors` then. All ranks of the replica call
        it.
        """
        layouts = _layouts(strategy)

        def take(i: int, name: str, rows: Tensor) -> Tensor:
            vectors = rows.reshape(-1, rows.shape[-1]).to(layouts[i].device)
            names = self._names(strategy, i, name, rows)
            for row, of_row in zip(vectors, names, strict=True):
                self.tensors |= dict(zip(of_row, layouts[i].distributed(row), strict=True))
            return rows[..., :0].clone()

        return _converted(saved, strategy, take)

    def ask_for(self, saved: Mapping[str, Any], strategy: Any) -> None:
        """`tensors` become empty ones to load what belongs into a state with empty vectors."""
        layouts, skips = _layouts(strategy), _skips(strategy, saved)

        def ask(i: int, name: str, rows: Tensor) -> Tensor:
            for of_row in () if skips(name) else self._names(strategy, i, name, rows):
                for key, p in zip(of_row, layouts[i].parameters, strict=True):
                    self.tensors[key] = torch.empty_like(p, dtype=rows.dtype, requires_grad=False)
            return rows

        _converted(saved, strategy, ask)

    def put_into(self, saved: Mapping[str, Any], strategy: Any) -> dict[str, Any]:
        """The state with this rank's part of every vector."""
        layouts, skips = _layouts(strategy), _skips(strategy, saved)

        def put(i: int, name: str, rows: Tensor) -> Tensor:
            if skips(name):
                return rows
            vectors = [
                layouts[i].flattened([self.tensors[key] for key in of_row])
                for of_row in self._names(strategy, i, name, rows)
            ]
            return torch.stack(vectors).view(*rows.shape[:-1], -1) if vectors else rows

        return _of_dims(_converted(saved, strategy, put), [layout.dim for layout in layouts])
