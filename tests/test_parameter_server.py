"""The parameter server in real processes: the same results as in one, and runs that outlive their workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from harness import QUIET, Report, assert_close, assert_equal, averaging, fit
from models import Plain, loader
from ranks import Ranks

from lightning_byz import ParameterServer, RobustSGD
from lightning_byz.lightning import ByzantineRobustStrategy

pytestmark = pytest.mark.processes


def job(make: Any, devices: int, *, callbacks: Any = lambda: [], data: Any = loader, **trainer: Any) -> Any:
    """What every rank runs: a fit whose strategy ``make(transport)`` gives."""

    def run(folder: Path) -> None:
        torch.manual_seed(0)
        module = trainer.pop("module", Plain)()
        strategy = make(ParameterServer(keys=folder / "keys", lost_after=10.0, start_timeout=30.0))
        settings = {**QUIET, "max_epochs": 1, "devices": devices, **trainer}
        L.Trainer(**settings, strategy=strategy, callbacks=[*callbacks(), Report(folder)]).fit(module, data())

    return run


def reports(folder: Path, size: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(size)]


def test_a_mean_is_ddps(tmp_path: Path) -> None:
    def make(transport: ParameterServer) -> Any:
        return averaging(transport=transport)

    with Ranks(tmp_path / "served", 3, job(make, 3)) as ranks:
        assert ranks.wait() == {0: 0, 1: 0, 2: 0}, ranks.everything()
    served = reports(tmp_path / "served", 3)
    torch.manual_seed(0)
    gathered = fit(tmp_path / "gathered", Plain(), averaging(start_method="fork"), devices=3, data=loader())
    for report in served:
        assert_equal(report, served[0])
        assert_close(report, gathered[0])
        assert report["metrics"].keys() == gathered[0]["metrics"].keys()
