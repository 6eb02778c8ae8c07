"""What the strategy adds to a checkpoint, and how it comes back."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_byz.strategies import random_states, resuming_with_others
from lightning_byz.strategies.gradient_sync import parameters_of
from lightning_byz.strategies.validate import warn

log = logging.getLogger("lightning_byz")

CHECKPOINT_KEY = "lightning_byz"


def run_state(
    strategy: Any,
    server: list[dict[str, Any]],
    workers: list[dict[int, dict[str, Tensor]]],
    states: dict[int, Any],
    filepath: Any = None,
) -> dict[str, Any]:
    """What is added to a checkpoint.

    Args:
        strategy: the RobustStrategy.
        server: by optimizer, from `Exchange.server_state`.
        workers: by optimizer and worker, from `Exchange.worker_states`.
        states: by rank, the random states.
        filepath: where the checkpoint is written; None: nowhere.
    """
    return {
        "version": 2,
        "n": strategy.n,
        "workers_per_process": strategy.workers_per_process,
        "mesh": strategy.processes.mesh_sizes,
        "algorithm": repr(strategy.resolved),
        "server": server,
        "workers": workers,
        "rng": states,
        "sync": {} if strategy.sync is None else strategy.sync.save(filepath),
        **strategy.local_workers.state(),
        **strategy.report.state(),
    }


def collect(strategy: Any, filepath: Any) -> dict[str, Any]:
    """All workers' states and ranks' random states, at rank 0. All ranks call it, unless one saves
    alone.
    """
    processes = strategy.processes
    local = [exchange.worker_states() for exchange in strategy.exchanges]
    workers, states = processes.collected(local, random_states.snapshot(strategy.root_device))
    alone = processes.alone or processes.saved_alone
    server = [exchange.server_state(alone) for exchange in strategy.exchanges]
    return run_state(strategy, server, workers, states, filepath)


def restore(strategy: Any, saved: Mapping[str, Any] | None, filepath: Any) -> None:
    """Goes on from what `run_state` gave; None: from the weights alone.

    Args:
        strategy: the RobustStrategy.
        saved: from `run_state`.
        filepath: where the checkpoint was found.

    Raises:
        ValueError: if it is of another algorithm, or of other optimizers.
    """
    if saved is None:
        strategy.forget()
        if strategy.n > 1:
            log.info(
                "The checkpoint holds no state of byzantine_robust: the algorithm starts afresh "
                "from its weights."
            )
        return
    if saved["version"] == 1 and any(
        any(map(operator.is_not, parameters_of(optimizer), group.parameters()))
        for optimizer, group in zip(strategy.optimizers, strategy.groups, strict=False)
    ):
        strategy.forget()
        warn(
            "byzantine_robust: the checkpoint is of an earlier version, whose vectors were in the "
            "order of the optimizer's parameters. Here that is another order than the module's: "
            "the algorithm starts afresh from the weights."
        )
        return
    if len(saved["server"]) not in (len(strategy.optimizers), len(strategy.exchanges)):
        raise ValueError(
            f"The checkpoint holds the state of {len(saved['server'])} optimizers. Found "
            f"{len(strategy.optimizers)}. Resume with the same optimizers, or start a new run "
            "from its weights: Model.load_from_checkpoint(path)."
        )
    follow = strategy.followed(saved["n"])
    groups = strategy.groups[: len(saved["server"])]
    saved = _adapted(strategy, saved, groups, follow)
    strategy.forget()
    for group, server, workers in zip(groups, saved["server"], saved["workers"], strict=True):
        group.exchange.load(server, workers, group.example())
    _say_what_is_missing(saved, follow)
    strategy.local_workers.load(saved)
    strategy.report.load(saved)
    if saved.get("sync") and strategy.local_steps is None:
        warn(
            "byzantine_robust: the checkpoint is of a run with local_steps. This run has none: it "
            "goes on from the start of the phase that was saved, without the outer optimizer."
        )
    elif strategy.sync is not None and saved.get("sync"):
        same = resuming_with_others.is_same(follow, saved["n"])
        strategy.sync.load(saved["sync"], filepath, same)
    states = saved["rng"] if saved.get("mesh") == strategy.processes.mesh_sizes else {}
    if strategy.global_rank in states:
        random_states.restore(strategy.root_device, states[strategy.global_rank])


def _adapted(
    strategy: Any,
    saved: Mapping[str, Any],
    groups: list[Any],
    follow: resuming_with_others.Followed,
) -> Mapping[str, Any]:
    """The state for the workers of this run, which may be others."""
    before, n = saved["n"], strategy.n
    if resuming_with_others.is_same(follow, before):
        return saved
    warn(f"byzantine_robust: {resuming_with_others.described(follow, before)}")
    if strategy.algorithm is None and min(before, n) <= 2 < max(before, n):
        warn(
            f"byzantine_robust: the default algorithm is another one for n={n} workers, and starts "
            "afresh."
        )
        saved = resuming_with_others.without_states(saved)
    likes = [group.example() for group in groups]
    algorithms = [group.exchange.algorithm for group in groups]
    return resuming_with_others.adapted(
        saved, follow, strategy.workers_per_process, algorithms, likes
    )


def _say_what_is_missing(saved: Mapping[str, Any], follow: resuming_with_others.Followed) -> None:
    """One rank that saved alone had its own part of the state only."""
    server = saved["server"][0]
    kept = {worker for worker, old in enumerate(follow) if old is not None}
    missing = kept - set(saved["workers"][0])
    if server["dim"] is None:
        return
    if server["server"] is None:
        warn(
            "The checkpoint was written by one rank alone, which held its shard of the state "
            "only. The algorithm starts afresh."
        )
    elif missing:
        warn(
            f"The checkpoint was written by one rank alone. Workers {sorted(missing)} start with "
            "a fresh state."
        )
