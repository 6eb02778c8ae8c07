"""Private names of torch mean what the package takes them for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import launchers
from torch.utils.data import DataLoader

from lightning_byz.strategies.private_names import (
    bring_no_weights,
    forward_hooks,
    give_mesh,
    has_hooks,
    logging_in,
    of_last_worker,
)


def test_hooks_of_forward_passes_are_counted() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Tanh())
    assert forward_hooks(net) == 0
    net[0].register_forward_hook(lambda *of: None)
    net.register_forward_pre_hook(lambda *of: None)
    assert forward_hooks(net) == 2


def test_tensors_that_have_escaped_from_a_pass_are_found() -> None:
    kept: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.extend([x, x.sum(), torch.func.vmap(lambda y: kept.append(y * 2) or y)(x)])
        return x

    x = torch.arange(6.0).view(3, 2)
    torch.func.vmap(keep)(x)
    found = [of_last_worker(tensor) for tensor in kept]
    assert [value.tolist() for value in found if value is not None] == [
        10.0,
        [4.0, 5.0],
        9.0,
        [4.0, 5.0],
    ]
    assert of_last_worker(x) is None


def test_hooks_on_a_parameter_are_found() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    assert not has_hooks(p)
    hook = p.register_hook(lambda gradient: None)
    assert has_hooks(p)
    hook.remove()
    assert not has_hooks(p)
    hook = p.register_post_accumulate_grad_hook(lambda parameter: None)
    assert has_hooks(p)
    hook.remove()
    assert not has_hooks(p)


class LogsLater(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).mean()

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        with logging_in(self, "training_step"):
            self.log("late", 3.0, on_step=True, on_epoch=True)
        self.log("here", 4.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_what_is_logged_later_is_filed_under_its_hook() -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = LogsLater()
    hooks = []
    log = module.log

    def watched(name: str, value: float, **kwargs: bool) -> None:
        hooks.append((name, module._current_fx_name))
        log(name, value, **kwargs)

    module.log = watched  # type: ignore[method-assign]
    trainer.fit(module, DataLoader(torch.randn(2, 1)))
    assert trainer.callback_metrics["late_epoch"] == 3.0
    assert set(hooks) == {("late", "training_step"), ("here", "backward")}


def test_a_module_is_handed_a_mesh() -> None:
    module, mesh = LogsLater(), SimpleNamespace()
    give_mesh(module, mesh)  # type: ignore[arg-type]
    assert module.device_mesh is mesh


def test_a_launcher_brings_no_weights_back(tmp_path: Path) -> None:
    """And no file of them stays; what else it brings arrives."""
    loaded: list[Any] = []
    strategy: Any = SimpleNamespace(checkpoint_io=SimpleNamespace(load_checkpoint=loaded.append))
    launcher = launchers._MultiProcessingLauncher(strategy, start_method="fork")
    bring_no_weights(launcher)
    folder = tmp_path / "weights"
    folder.mkdir()
    source: Any = SimpleNamespace(callback_metrics={"loss": torch.tensor(2.0)})
    output = launchers.multiprocessing._WorkerOutput(
        None,
        folder / "file",
        "a state",
        None,
        launcher.get_extra_results(source),  # type: ignore[arg-type]
    )
    trainer: Any = SimpleNamespace(checkpoint_callback=None, state=None, callback_metrics={})
    launcher._recover_results_in_main_process(output, trainer)
    assert not folder.exists() and loaded == []
    assert trainer.state == "a state" and float(trainer.callback_metrics["loss"]) == 2.0
