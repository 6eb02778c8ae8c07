"""The strategy, callbacks and data modules for the package ``pytorch_lightning``.

``pytorch_lightning`` and ``lightning`` have separate class trees: a Trainer of the one refuses a
Strategy of the other. Everything is written once, elsewhere; this module only adds the base
classes. The launchers are Lightning's private names; they stand here alone.
"""

from __future__ import annotations

from pytorch_lightning import Callback, LightningDataModule, LightningModule
from pytorch_lightning.strategies import (
    ParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
    launchers,
)

from lightning_byz.callbacks import (
    ByzantineWorkersCallback,
    DuplicateBatchCheckCallback,
    ReplicaCheckCallback,
    RobustnessMonitorCallback,
    ShadowModeCallback,
    StragglersCallback,
    SuspicionMonitorCallback,
)
from lightning_byz.data import (
    CIFAR10Data,
    DigitsData,
    FashionMNISTData,
    LIBSVMData,
)
from lightning_byz.models import ClassifierModel
from lightning_byz.strategies.names import NAMED_STRATEGIES
from lightning_byz.strategies.strategy import RobustStrategy

__all__ = [
    "ByzantineRobustStrategy",
    "ByzantineWorkers",
    "CIFAR10DataModule",
    "Classifier",
    "DigitsDataModule",
    "DuplicateBatchCheck",
    "FashionMNISTDataModule",
    "LIBSVMDataModule",
    "ReplicaCheck",
    "RobustnessMonitor",
    "ShadowMode",
    "Stragglers",
    "SuspicionMonitor",
]


class ByzantineRobustStrategy(RobustStrategy, ParallelStrategy):  # type: ignore[misc]
    """Robust aggregation of the workers' gradients in place of DDP's all-reduce; see
    `lightning_byz.strategies.strategy.RobustStrategy`.
    """

    strategy_name = "byzantine_robust"
    _launchers, _callback = launchers, Callback


class ByzantineWorkers(ByzantineWorkersCallback, Callback):  # type: ignore[misc]
    """Makes some workers lie; see `lightning_byz.callbacks.ByzantineWorkersCallback`."""


class Stragglers(StragglersCallback, Callback):  # type: ignore[misc]
    """Makes some workers late, or dead; see `lightning_byz.callbacks.StragglersCallback`."""


class RobustnessMonitor(RobustnessMonitorCallback, Callback):  # type: ignore[misc]
    """Logs what rounds cost, whom the rule trusts and whether its guarantee holds; see
    `lightning_byz.callbacks.RobustnessMonitorCallback`.
    """


class ShadowMode(ShadowModeCallback, Callback):  # type: ignore[misc]
    """Under plain DDP, reports which rank a robust rule would drop; see
    `lightning_byz.callbacks.ShadowModeCallback`.
    """


class SuspicionMonitor(SuspicionMonitorCallback, Callback):  # type: ignore[misc]
    """Scores workers by what they send, accuses, and quarantines; see
    `lightning_byz.callbacks.SuspicionMonitorCallback`.
    """


class ReplicaCheck(ReplicaCheckCallback, Callback):  # type: ignore[misc]
    """Compares checksums of parameters and optimizer states across ranks; see
    `lightning_byz.callbacks.ReplicaCheckCallback`.
    """


class DuplicateBatchCheck(DuplicateBatchCheckCallback, Callback):  # type: ignore[misc]
    """All ranks compute the same micro-batch now and then; see
    `lightning_byz.callbacks.DuplicateBatchCheckCallback`.
    """


class DigitsDataModule(DigitsData, LightningDataModule):  # type: ignore[misc]
    """Handwritten digits, every worker its own part; see `lightning_byz.data.DigitsData`."""


class LIBSVMDataModule(LIBSVMData, LightningDataModule):  # type: ignore[misc]
    """a9a, w8a, mushrooms, ..., every worker its own part; see `lightning_byz.data.LIBSVMData`."""


class FashionMNISTDataModule(FashionMNISTData, LightningDataModule):  # type: ignore[misc]
    """Fashion-MNIST, every worker its own part; see `lightning_byz.data.FashionMNISTData`."""


class CIFAR10DataModule(CIFAR10Data, LightningDataModule):  # type: ignore[misc]
    """CIFAR-10, every worker its own part; see `lightning_byz.data.CIFAR10Data`."""


class Classifier(ClassifierModel, LightningModule):  # type: ignore[misc]
    """A network, trained with the cross-entropy and SGD; see
    `lightning_byz.models.ClassifierModel`.
    """


# Lightning trains a torch.compile'd module with an instance of a short list of its own strategies
# only. Ours leaves the module as unwrapped as this one of them does.
SingleDeviceStrategy.register(ByzantineRobustStrategy)

for _name, _settings in NAMED_STRATEGIES.items():
    if _name not in StrategyRegistry:
        StrategyRegistry.register(_name, ByzantineRobustStrategy, **_settings)
