"""What is decided before the first step where the user left it open: the algorithm, its f, and the
transport.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

from lightning_byz.aggregators import SMEA, ByHeterogeneity, Chain, Mean, SpectralFilter
from lightning_byz.algorithms import Algorithm, RobustSGD
from lightning_byz.strategies.gradient_sync import parameters_of
from lightning_byz.strategies.local_steps import LocalSteps
from lightning_byz.strategies.validate import warn
from lightning_byz.transports import AllGather, InProcess, Sharded, Transport

log = logging.getLogger("lightning_byz")

DEFAULT_ALGORITHM = RobustSGD(
    aggregator=ByHeterogeneity(), worker_momentum=0.9, undo_worker_momentum=True
)
"""Two filters, for like and for unlike data, uncompressed: the choice of
docs/default-algorithm.md for a project whose learning rate was tuned for DDP, whether its workers'
data are alike or not.
"""

LOCAL_STEPS_ALGORITHM = RobustSGD(aggregator=SpectralFilter())
"""The filter for unlike data: local steps make honest workers differ, too. They average a worker's
noise themselves, so that none has momentum (docs/reproductions/local_steps.md).
"""


def resolve_algorithm(
    algorithm: Algorithm | None,
    num_byzantine: int | None,
    processes: int,
    workers_per_process: int,
    local_steps: LocalSteps | None = None,
) -> Algorithm:
    """The algorithm with its f filled in.

    Args:
        algorithm: None for the default.
        num_byzantine: f, or None for as many as the algorithm allows, up to a third. `Mean`
            tolerates nobody, whatever it is.
        processes: number of processes.
        workers_per_process: workers of each.
        local_steps: of the run; its ``participants`` are the workers that a rule sees.

    Raises:
        ValueError: if n is too small for it.
    """
    n, default = processes * workers_per_process, algorithm is None
    if local_steps is not None:
        n = min(n, local_steps.participants or n)
    algorithm = algorithm or (LOCAL_STEPS_ALGORITHM if local_steps else DEFAULT_ALGORITHM)
    rule = algorithm.aggregator
    if n <= 2 and not {f for f in (num_byzantine, rule.f) if f}:
        if n == 2:
            warn(
                f"byzantine_robust runs with n={n} workers: nothing can be outvoted, so gradients "
                "are averaged as DDP does. Use at least 3 workers (devices, or "
                "workers_per_process) to tolerate one that lies."
            )
        if n == 1 and not default and local_steps is None:
            warn(
                "One worker has nobody to exchange gradients with: this run is plain Lightning, "
                f"without {type(algorithm).__name__}. Use several (devices, or "
                "workers_per_process)."
            )
        return RobustSGD(aggregator=Mean()) if default else algorithm.averaging()
    if (
        num_byzantine is not None
        and rule.f not in (None, num_byzantine)
        and not isinstance(rule, Mean)
    ):
        raise ValueError(
            f"`num_byzantine` and the rule's f should agree. Found num_byzantine={num_byzantine} "
            f"and {rule!r}. Give f once."
        )
    f = num_byzantine if num_byzantine is not None else rule.f
    most, usual, caveats = algorithm.most_f(n), max(1, (n - 1) // 3), list[str]()
    if isinstance(rule, Mean):
        f = 0
    elif f is None:
        f = min(usual, max(0, most))
        if f < usual and isinstance(rule.rule if isinstance(rule, Chain) else rule, SMEA):
            caveats.append(
                f"SMEA tolerates f={f} of n={n} workers here, not a third, {usual}: these would "
                "be too many subsets to search."
            )
        log.info(
            f"byzantine_robust: n={n} workers, tolerating f={f}; set num_byzantine to change it."
        )
    resolved = algorithm.with_f(f)
    if f > most:
        try:
            resolved.check(n)
            message = f"{type(rule).__name__} tolerates at most f={most} for n={n} workers."
        except ValueError as error:
            message = str(error)
        raise ValueError(
            f"num_byzantine={f} is too large for n={n} workers (processes x workers_per_process = "
            f"{processes} x {workers_per_process}). {message}"
        )
    if f == 0 and num_byzantine != 0:
        warn(f"byzantine_robust: {type(rule).__name__} tolerates no Byzantine worker among n={n}.")
    resolved.check(n)
    caveats += filter(None, [resolved.aggregator.caveat(n)])
    if caveats:
        warn(f"byzantine_robust: {' '.join(caveats)}")
    return resolved


_SMALL = 1 << 20
"""Bytes of a whole gradient up to which the number of collectives counts, not their size."""


def default_transport(algorithm: Algorithm, processes: int, nbytes: int) -> Transport:
    """Where the user names none: in this process, or over torch.distributed as moves the fewest
    bytes, or, where these are few, in the fewest collectives.

    Args:
        algorithm: the resolved algorithm.
        processes: number of processes.
        nbytes: of the whole gradient.
    """
    if processes == 1:
        return InProcess()
    sparse_up_dense_down = (
        getattr(getattr(algorithm, "compressor", None), "sparse", False)
        and not algorithm.changes_few
    )
    return AllGather() if nbytes <= _SMALL or sparse_up_dense_down else Sharded()


@rank_zero_only
def explain_transport(algorithm: Algorithm, transport: Transport) -> None:
    """Logs how messages travel, and what comes down on shards in answer to messages that name few
    coordinates each.
    """
    log.info(f"byzantine_robust: messages travel by {type(transport).__name__}.")
    if not transport.in_shards or not getattr(
        getattr(algorithm, "compressor", None), "sparse", False
    ):
        return
    name, rule = type(algorithm).__name__, algorithm.aggregator
    if algorithm.changes_few:
        log.info(
            f"{name} on Sharded: of the estimate, only the coordinates that have changed are sent "
            "down."
        )
    else:
        log.info(
            f"{name} with {rule!r} on Sharded: the whole estimate is sent down, uncompressed. "
            "With few ranks AllGather moves fewer bytes; so do ByzEF21SGDM here, with a rule "
            "that looks at one coordinate at a time, such as CoordinateMedian or TrimmedMean, "
            "and ByzEF21SGDMBC, with any rule."
        )


def resolve_transport(strategy: Any) -> Transport:
    """The transport of a run, which knows then who takes part; logs which one it is.

    Args:
        strategy: the RobustStrategy, with its optimizers.
    """
    layouts = [
        strategy.processes.flat([p for p in parameters_of(optimizer) if p.requires_grad])
        for optimizer in strategy.optimizers
    ]
    largest = max((layout.nbytes for layout in layouts), default=0)
    algorithm, processes = strategy.resolved, strategy.processes
    transport: Transport = strategy.transport or default_transport(
        algorithm, processes.replicas, largest
    )
    processes.connect_transport(transport)
    explain_transport(algorithm, transport)
    return transport


def resolve_shares(
    weights: Sequence[float] | None, algorithm: Algorithm, n: int, device: torch.device
) -> Tensor | None:
    """Every worker's share of the data, ``[n]`` float64 of sum 1; None: all alike.

    Args:
        weights: ``worker_weights`` of the strategy.
        algorithm: the resolved algorithm.
        n: number of workers.
        device: where they are used.

    Raises:
        ValueError: if there are not n, or the rule cannot weigh rows.
    """
    if weights is None:
        return None
    if len(weights) != n:
        raise ValueError(
            f"`worker_weights` should hold a number for each of the n={n} workers (processes x "
            f"workers_per_process). Found {len(weights)}."
        )
    shares = torch.tensor(weights, dtype=torch.float64, device=device)
    algorithm.aggregator.check_shares(shares)
    return shares / shares.sum()
