"""From this process's gradients to the aggregate in ``p.grad``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_byz.engine.outcome import NO_LOSS
from lightning_byz.strategies.gradient_sync import GradientGroup
from lightning_byz.strategies.workers import parameters_of_round


def exchange_gradients(
    strategy: Any, group: GradientGroup, find_scaler: Callable[[Any], Any] = lambda strategy: None
) -> None:
    """Runs one round for what a group's workers contribute, and writes what comes of it.

    Where there is no estimate, ``p.grad`` is None, so that an optimizer leaves the parameters
    alone; with a loss scaler it is inf, so that the scaler skips the step and backs off.

    Args:
        strategy: the RobustStrategy.
        group: a group whose backward pass has ended.
        find_scaler: given the strategy, what has scaled its gradients; None: nothing has.

    Raises:
        TooFewGradientsError: if too many rounds in a row gave no estimate.
    """
    layout, exchange, workers = group.layout, group.exchange, strategy.local_workers
    assert layout is not None
    scaler = find_scaler(strategy)
    scale = 1.0 if scaler is None else float(scaler.get_scale())
    # This may run inside of the precision plugin's autocast, which is not for aggregation.
    with torch.autocast(strategy.root_device.type, enabled=False):
        contributions = workers.contributions(group, 1 / scale)
        if not exchange.announced:
            strategy.processes.move_on()
        trusted = workers.extra.trusted if group is strategy.groups[0] else None
        outcome = exchange.run(contributions, parameters_of_round(group), trusted, spend=True)

    parameters, f = len(layout.parameters), outcome.rule.f or 0
    used, touched = outcome.used[:parameters], outcome.used[parameters:]
    overflow = scale > 1.0 and len(outcome.silent) > f
    group.poisoned = overflow or (outcome.estimate is None and scaler is not None)
    if group.poisoned:
        layout.poison_gradients()
    elif outcome.estimate is None:
        layout.clear_gradients()
    else:
        views = not exchange.transport.measured  # a server may still be sending the estimate
        layout.write_gradients(outcome.estimate, used.tolist(), scale, views)
        wanted = [contribution.used[:parameters] for contribution in contributions]
        module = strategy.lightning_module
        strategy.report.note_unmoved(module, layout.parameters, wanted, used, f)
    assert outcome.round.present is not None
    workers.buffers.merge(exchange.transport, touched, outcome.round.present, f)
    group.clear_rows()
    workers.extra.forget()
    if not overflow and (group.of_optimizer or outcome.reason != NO_LOSS):
        strategy.report.count(outcome)


def loss_scaler(strategy: Any) -> Any:
    """What scales the loss: the precision plugin's, or in manual optimization one of the
    module's.
    """
    module = strategy.lightning_module
    scaler = getattr(strategy.precision_plugin, "scaler", None)
    if scaler is None and module is not None and not module.automatic_optimization:
        scalers = (v for v in vars(module).values() if isinstance(v, torch.amp.GradScaler))
        scaler = next(scalers, None)
    return scaler if scaler is not None and scaler.is_enabled() else None
