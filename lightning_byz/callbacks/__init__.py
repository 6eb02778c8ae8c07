"""Callbacks: some install a fault, others observe; none steers the training.

The classes to use are those of the Lightning package at hand: ``lightning_byz.lightning.ByzantineWorkers`` or
``lightning_byz.pytorch_lightning.ByzantineWorkers``; ``lightning_byz.ByzantineWorkers`` is one of them.
"""

from lightning_byz.callbacks.byzantine_workers import ByzantineWorkersCallback
from lightning_byz.callbacks.duplicate_batch_check import DuplicateBatchCheckCallback
from lightning_byz.callbacks.replica_check import ReplicaCheckCallback
from lightning_byz.callbacks.robustness_monitor import RobustnessMonitorCallback
from lightning_byz.callbacks.shadow_mode import ShadowModeCallback
from lightning_byz.callbacks.stragglers import StragglersCallback
from lightning_byz.callbacks.suspicion_monitor import SuspicionMonitorCallback

__all__ = [
    "ByzantineWorkersCallback",
    "DuplicateBatchCheckCallback",
    "ReplicaCheckCallback",
    "RobustnessMonitorCallback",
    "ShadowModeCallback",
    "StragglersCallback",
    "SuspicionMonitorCallback",
]
