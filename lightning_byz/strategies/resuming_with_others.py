"""A checkpoint of a run with other workers: whose state each worker of this run goes on with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_byz.algorithms import Algorithm

Followed = list[int | None]
"""For each worker of this run, the worker of the run that wrote the checkpoint whose state it goes
on with; None: it is new.
"""


def check_argument(workers: Sequence[int | None] | None) -> None:
    """Raises ValueError unless ``resume_workers`` names workers, each once."""
    given = workers if isinstance(workers, Iterable) else [workers]
    named = [worker for worker in given if worker is not None]
    numbers = (workers is None or given is workers) and all(
        isinstance(worker, int) and not isinstance(worker, bool) and worker >= 0 for worker in named
    )
    if not numbers or len(set(named)) < len(named):
        raise ValueError(
            "`resume_workers` should name workers of the run that wrote the checkpoint, each once, "
            f"and None for a new one: resume_workers=[0, 2, 3]. Found {workers!r}."
        )


def followed(workers: Sequence[int | None] | None, before: int, n: int) -> Followed:
    """Whom each of n workers follows.

    Args:
        workers: ``resume_workers`` of the strategy; None: every worker follows its own number.
        before: how many workers there were.
        n: how many there are.

    Raises:
        ValueError: if ``workers`` does not fit.
    """
    if workers is None:
        return [worker if worker < before else None for worker in range(n)]
    outside = [worker for worker in workers if worker is not None and worker >= before]
    if len(workers) > n or outside:
        raise ValueError(
            f"`resume_workers` should name up to n={n} workers, of 0 .. {before - 1}: the "
            f"checkpoint is of {before} workers. Found {list(workers)}."
        )
    return [*workers, *[None] * (n - len(workers))]


def is_same(follow: Followed, before: int) -> bool:
    """Whether these are the workers that wrote the checkpoint, in their order."""
    return follow == list(range(before))


def described(follow: Followed, before: int) -> str:
    """Who goes on with whose state, in words."""
    pairs = [f"{new} of {old}" for new, old in enumerate(follow) if old is not None]
    new = [worker for worker, old in enumerate(follow) if old is None]
    gone = sorted(set(range(before)) - {old for old in follow if old is not None})
    parts = [
        f"Workers go on, with the state of these workers of it: {', '.join(pairs)}."
        if pairs
        else ""
    ]
    parts += [f"New are workers {new}." if new else ""]
    parts += [f"The state of its workers {gone} is left out." if gone else ""]
    parts += ["To say otherwise: ByzantineRobustStrategy(resume_workers=[...])."]
    return f"the checkpoint is of n={before} workers, this run has n={len(follow)}. " + " ".join(
        part for part in parts if part
    )


def without_states(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint would hold had its algorithm not begun."""
    server = [
        {"step": state["step"], "dim": None, "server": None, "previous": None, "experience": None}
        for state in saved["server"]
    ]
    return {**saved, "server": server, "workers": [{} for _ in server]}


def adapted(
    saved: Mapping[str, Any],
    follow: Followed,
    workers_per_process: int,
    algorithms: Sequence[Algorithm],
    likes: Sequence[Tensor],
) -> dict[str, Any]:
    """What the checkpoint would hold had it been written by the workers of this run.

    Workers that are new have no state in it: they start as `Algorithm.rejoined` says. Where the
    server's state has a row for each worker, a new worker's is that of `Algorithm.init_server`.

    Args:
        saved: from `RobustStrategy.run_state`.
        follow: from `followed`.
        workers_per_process: of this run.
        algorithms: of each optimizer.
        likes: for each optimizer, an example of a gradient ``[d]``.
    """
    place = {old: new for new, old in enumerate(follow) if old is not None}
    server = [
        _server(state, algorithm, like, follow)
        for state, algorithm, like in zip(saved["server"], algorithms, likes, strict=True)
    ]
    return {
        **saved,
        "n": len(follow),
        "workers_per_process": workers_per_process,
        "server": server,
        "workers": [
            {place[w]: state for w, state in states.items() if w in place}
            for states in saved["workers"]
        ],
        "rng": _random_states(saved, follow, workers_per_process),
        "silences": {place[w]: count for w, count in saved["silences"].items() if w in place},
    }


def _random_states(
    saved: Mapping[str, Any], follow: Followed, workers_per_process: int
) -> dict[int, Any]:
    """The random states of ranks all of whose workers are those of one rank of the other run."""
    if saved["workers_per_process"] != workers_per_process:
        return {}
    states = {}
    for rank in range(len(follow) // workers_per_process):
        mine = follow[rank * workers_per_process : (rank + 1) * workers_per_process]
        other = None if mine[0] is None else mine[0] // workers_per_process
        if other is not None and mine == [
            *range(other * workers_per_process, (other + 1) * workers_per_process)
        ]:
            states[rank] = saved["rng"].get(other)
    return {rank: state for rank, state in states.items() if state is not None}


def _server(
    saved: Mapping[str, Any], algorithm: Algorithm, like: Tensor, follow: Followed
) -> dict[str, Any]:
    experience = saved.get("experience")
    if experience is not None and experience["rounds"] is not None:
        rounds = [0 if old is None else experience["rounds"][old] for old in follow]
        saved = {**saved, "experience": {**experience, "rounds": rounds, "last": None}}
    if saved["dim"] is None or saved["server"] is None:
        return dict(saved)
    x, n = like.new_zeros(saved["dim"]).cpu(), len(follow)
    fresh = algorithm.init_server(x, n)._asdict()
    one, two = (algorithm.init_server(x.to("meta"), m)._asdict() for m in (n, n + 1))
    new = torch.tensor(
        [worker for worker, old in enumerate(follow) if old is not None], dtype=torch.int64
    )
    old = torch.tensor([old for old in follow if old is not None], dtype=torch.int64)
    state = {}
    for name, value in saved["server"].items():
        if (
            name not in fresh or value.ndim != fresh[name].ndim
        ):  # `Exchange.load` says what is wrong
            state[name] = value
            continue
        of_workers = [d for d in range(value.ndim) if one[name].shape[d] != two[name].shape[d]]
        state[name] = _placed(fresh[name], value.cpu(), of_workers, new, old)
    return {**saved, "server": state}


def _placed(
    fresh: Tensor, saved: Tensor, of_workers: list[int], new: Tensor, old: Tensor
) -> Tensor:
    """``saved``, where the places ``old`` are the places ``new`` in each of the dimensions
    ``of_workers``, and others are fresh.
    """
    if not of_workers:
        return saved
    dim, *rest = of_workers
    return fresh.index_copy(
        dim,
        new,
        _placed(fresh.index_select(dim, new), saved.index_select(dim, old), rest, new, old),
    )
