"""Runs a Trainer, in this process or in forked ranks, and brings back what every rank ended
with.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from ports import own_port
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes

from lightning_byz import Mean, RobustSGD
from lightning_byz.lightning import ByzantineRobustStrategy

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}


def whole(tensor: Any) -> Any:
    """A copy of a tensor; of one that is sharded, with all of its shards."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


class Report(L.Callback):
    """Writes what a rank ended with."""

    def __init__(
        self, folder: Path, extra: Callable[[L.Trainer, L.LightningModule], Any] | None = None
    ) -> None:
        self.folder, self.extra = folder, extra

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(
            {
                "weights": {k: whole(v) for k, v in pl_module.state_dict().items()},
                "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
                "seen": getattr(pl_module, "seen", []),
                "steps": trainer.global_step,
                "extra": None if self.extra is None else self.extra(trainer, pl_module),
            },
            self.folder / f"rank{trainer.global_rank}.pt",
        )


def apart(test: Callable[..., None]) -> Callable[..., None]:
    """A test in a forked process of its own: once this process has compiled something, processes
    that it forks cannot compute gradients.
    """

    @functools.wraps(test)
    def forked(*args: Any, **kwargs: Any) -> None:
        start_processes(lambda rank: test(*args, **kwargs), nprocs=1, start_method="fork")

    return forked


def averaging(**kwargs: Any) -> ByzantineRobustStrategy:
    """The strategy with a plain mean: what DDP computes."""
    return ByzantineRobustStrategy(algorithm=RobustSGD(aggregator=Mean()), **kwargs)


def fit(
    folder: Path,
    module: L.LightningModule,
    strategy: Any,
    *,
    devices: int = 1,
    data: Any = None,
    val: Any = None,
    ckpt_path: str | None = None,
    extra: Callable[[L.Trainer, L.LightningModule], Any] | None = None,
    callbacks: list[L.Callback] | None = None,
    **trainer: Any,
) -> list[dict[str, Any]]:
    """Trains and returns every rank's report. Strategies of several ranks should have
    ``start_method="fork"``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("rank*.pt"):
        old.unlink()
    os.environ["MASTER_PORT"] = str(own_port())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        L.Trainer(
            **{**QUIET, "max_epochs": 1, "devices": devices, "strategy": strategy, **trainer},
            callbacks=[*(callbacks or []), Report(folder, extra)],
        ).fit(module, data, val, ckpt_path=ckpt_path)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(devices)]


def cpu_amp() -> dict[str, Any]:
    """Trainer arguments for float16 with a loss scaler on the CPU, where Lightning would quietly
    take bfloat16.
    """
    return {"plugins": [MixedPrecision("16-mixed", "cpu")]}


def forked_ddp(**kwargs: Any) -> DDPStrategy:
    return DDPStrategy(start_method="fork", **kwargs)


def assert_close(a: dict[str, Any], b: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Two reports have the same weights, up to summation order."""
    assert a["weights"].keys() == b["weights"].keys()
    for name, value in a["weights"].items():
        torch.testing.assert_close(
            value,
            b["weights"][name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Two reports have the same weights, bit for bit."""
    assert a["weights"].keys() == b["weights"].keys()
    for name, value in a["weights"].items():
        assert torch.equal(value, b["weights"][name]), name
