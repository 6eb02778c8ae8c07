"""Callbacks: some install a fault, others observe; none steers the training.

Faults, for simulations: `byzantine_workers` (lies), `stragglers` (late or dead workers). Observers:
`robustness_monitor` (what a rule let through), `suspicion_monitor` (who lies). For a run under
Lightning's own strategies: `shadow_mode` (what a rule would have said), `replica_check` and
`duplicate_batch_check` (copies that differ, batches that are the same).

``from lightning_byz.callbacks import ByzantineWorkers`` gives the class for the Lightning package
at hand (see `lightning_byz.which_lightning`); `lightning_byz.lightning` and
`lightning_byz.pytorch_lightning` hold the classes for one each. What is here, such as
`ByzantineWorkersCallback`, is all of a callback but its base class.
"""

from typing import TYPE_CHECKING, Any

from lightning_byz.callbacks.byzantine_workers import ByzantineWorkersCallback
from lightning_byz.callbacks.duplicate_batch_check import DuplicateBatchCheckCallback
from lightning_byz.callbacks.replica_check import ReplicaCheckCallback
from lightning_byz.callbacks.robustness_monitor import RobustnessMonitorCallback
from lightning_byz.callbacks.shadow_mode import ShadowModeCallback
from lightning_byz.callbacks.stragglers import StragglersCallback
from lightning_byz.callbacks.suspicion_monitor import SuspicionMonitorCallback
from lightning_byz.which_lightning import of_home

if TYPE_CHECKING:
    from lightning_byz.lightning import (
        ByzantineWorkers,
        DuplicateBatchCheck,
        ReplicaCheck,
        RobustnessMonitor,
        ShadowMode,
        Stragglers,
        SuspicionMonitor,
    )

_OF_LIGHTNING = (
    "ByzantineWorkers",
    "DuplicateBatchCheck",
    "ReplicaCheck",
    "RobustnessMonitor",
    "ShadowMode",
    "Stragglers",
    "SuspicionMonitor",
)


def __getattr__(name: str) -> Any:
    """The callbacks, of the Lightning package that the program uses."""
    return of_home(__name__, name, _OF_LIGHTNING)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "ByzantineWorkers",
    "ByzantineWorkersCallback",
    "DuplicateBatchCheck",
    "DuplicateBatchCheckCallback",
    "ReplicaCheck",
    "ReplicaCheckCallback",
    "RobustnessMonitor",
    "RobustnessMonitorCallback",
    "ShadowMode",
    "ShadowModeCallback",
    "Stragglers",
    "StragglersCallback",
    "SuspicionMonitor",
    "SuspicionMonitorCallback",
]
