"""The strategy on processes that Ray Train has started: ``strategy=RayByzantineRobustStrategy()``
and `prepare_trainer`, in place of ``RayDDPStrategy`` and Ray's ``prepare_trainer``.

Ray's Lightning classes belong to ``lightning`` where that is installed, otherwise to
``pytorch_lightning``. The strategy belongs to the same one, and so should the Trainer.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

import torch

from lightning_byz.optional_dependencies import require
from lightning_byz.strategies.validate import UnsupportedSetupError

require("lightning_byz.ray", "ray", "ray", "pyarrow")

import ray.train.torch  # noqa: E402
from ray.train.lightning import RayLightningEnvironment, RayTrainReportCallback  # noqa: E402

HOME = RayTrainReportCallback.__base__.__module__.partition(".")[0]
"""The Lightning package that Ray's classes belong to."""

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_byz.lightning import ByzantineRobustStrategy
else:
    ByzantineRobustStrategy = importlib.import_module(
        f"lightning_byz.{HOME}"
    ).ByzantineRobustStrategy

__all__ = ["RayByzantineRobustStrategy", "prepare_trainer"]

_OF_RAY = {
    "process_group_backend": "TorchConfig(backend=...)",
    "timeout": "TorchConfig(timeout_s=...)",
    "start_method": "ScalingConfig(num_workers=...), which says how many processes Ray starts",
}
"""Arguments that Ray decides, and where."""


class RayByzantineRobustStrategy(ByzantineRobustStrategy):
    """Robust aggregation of the gradients of a Ray Train run's workers.

    A worker of Ray is a process, on the device that Ray gives it. If one dies, Ray ends the others
    too and starts all anew, as often as ``FailureConfig(max_failures=...)`` says; the training
    function finds the last checkpoint that it reported in ``ray.train.get_checkpoint()``.

    Args:
        **arguments: those of ``ByzantineRobustStrategy``, except ``process_group_backend``,
            ``timeout`` and ``start_method``, which are Ray's to say (``TorchConfig``,
            ``ScalingConfig``), and ``transport=ParameterServer()``.

    Raises:
        UnsupportedSetupError: for arguments that have no effect on a run of Ray's.
    """

    def __init__(self, **arguments: Any) -> None:
        for name, instead in _OF_RAY.items():
            if name in arguments:
                raise UnsupportedSetupError(
                    f"Ray starts and connects the processes. Found {name}={arguments[name]!r}. "
                    f"Leave it out, and use TorchTrainer's {instead}."
                )
        super().__init__(**arguments)
        if self.transport is not None and self.transport.connects_processes:
            raise UnsupportedSetupError(
                "Ray connects the processes, and restarts all of them when one dies. Found "
                f"transport={type(self.transport).__name__}(), which does both itself. Use another "
                "transport, or start the processes without Ray."
            )

    @property
    def root_device(self) -> torch.device:
        device: torch.device = ray.train.torch.get_device()
        return device


def prepare_trainer(trainer: Trainer) -> Trainer:
    """Checks that a Trainer runs on Ray's processes.

    Ray's own function of this name accepts the three strategies of Ray only.

    Args:
        trainer: made in the training function of a ``TorchTrainer``, with
            ``strategy=RayByzantineRobustStrategy()`` and ``plugins=[RayLightningEnvironment()]``.

    Returns:
        the same one.

    Raises:
        UnsupportedSetupError: if the strategy or the cluster environment is another one, or where
            ranks other than rank 0 cannot know rank 0's address.
    """
    if not isinstance(trainer.strategy, RayByzantineRobustStrategy):
        raise UnsupportedSetupError(
            "A Trainer on Ray should have strategy=lightning_byz.ray.RayByzantineRobustStrategy()."
            f" Found {type(trainer.strategy).__name__}. Set that, or use "
            "ray.train.lightning.prepare_trainer for Ray's own strategies."
        )
    environment = trainer.strategy.cluster_environment
    if not isinstance(environment, RayLightningEnvironment):
        raise UnsupportedSetupError(
            "A Trainer on Ray should take its ranks from Ray. Found the cluster environment "
            f"{type(environment).__name__}. Add "
            "Trainer(plugins=[ray.train.lightning.RayLightningEnvironment()])."
        )
    if "MASTER_ADDR" not in os.environ:
        raise UnsupportedSetupError(
            "All ranks should know the address of rank 0, by the variable MASTER_ADDR. It is not "
            "set. Leave TorchConfig(init_method=...) at 'env'."
        )
    return trainer
