"""Runs cells of a grid, one after the other, in a process that a launcher has started."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import lightning_byz
from lightning_byz.cli.runs import ByzantineCLI
from lightning_byz.diagnostics.alerts import is_wandb
from lightning_byz.engine.outcome import Outcome
from lightning_byz.strategies.round_report import TooFewGradientsError
from lightning_byz.strategies.strategy import is_robust

if TYPE_CHECKING or lightning_byz.which_lightning.HOME == "lightning":
    from lightning.pytorch import Callback
else:
    from pytorch_lightning import Callback

COLUMNS = ("step", "bytes_up", "bytes_down", "simulated_seconds")
"""Of a curve, besides the metric: optimizer steps; payload of one worker, both ways, and seconds
that the server waited by the simulated clock, since the run began.
"""


class Curve(Callback):
    """Notes the metric after every validation, and what was sent until then.

    Args:
        metric: its name.

    Attributes:
        points: column -> values; the columns are `COLUMNS` and the metric.
    """

    def __init__(self, metric: str) -> None:
        super().__init__()
        self.metric = metric
        self.points: dict[str, list[float]] = {name: [] for name in (*COLUMNS, metric)}
        self._sums = dict.fromkeys(COLUMNS[1:], 0.0)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if is_robust(trainer.strategy):
            for exchange in trainer.strategy.exchanges:
                exchange.observers.append(self._count)

    def _count(self, outcome: Outcome) -> None:
        sent = (outcome.bytes_up, outcome.bytes_down, outcome.seconds)
        self._sums = {
            name: self._sums[name] + value for name, value in zip(self._sums, sent, strict=True)
        }

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        if self.metric not in trainer.callback_metrics:
            raise ValueError(
                f"The grid's `metric` should be one that validation logs. Found {self.metric!r}; "
                f"logged are {', '.join(trainer.callback_metrics) or 'none'}."
            )
        now = {
            "step": trainer.global_step,
            **self._sums,
            self.metric: float(trainer.callback_metrics[self.metric]),
        }
        for name, value in now.items():
            self.points[name].append(value)


def prepare(log: str | None, threads: int) -> None:
    """Makes a fresh process ready to run cells: quiet, deaf to Ctrl-C (the parent decides), gone
    when the parent is.

    Args:
        log: where a child of this machine's command prints to; None: it is no child.
        threads: that torch may use.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and log is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for stream in (1, 2):  # whatever a run prints would tear the progress bar
            os.dup2(file, stream)
    sys.argv = sys.argv[:1]
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    for name in (
        "lightning.pytorch",
        "lightning.fabric",
        "pytorch_lightning",
        "lightning_fabric",
        "lightning_byz",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


def run(config: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Trains one cell.

    Args:
        config: of the run, as for ``lightning-byz fit``.
        metric: what is compared.

    Returns:
        ``status``: "finished", "diverged" (the gradients of too many workers were not finite, and
            training stopped) or "failed";
        ``reason``: why, if not finished; ``curve``: `Curve.points`; ``seconds``: how long it took.
    """
    started, curve, status, reason = time.monotonic(), Curve(metric), "finished", ""
    trainer: Any = None
    try:
        cli = ByzantineCLI(config)
        trainer = cli.trainer
        trainer.callbacks.append(curve)
        try:
            trainer.fit(cli.model, datamodule=cli.datamodule)
        except TooFewGradientsError as error:
            status, reason = "diverged", str(error)
            trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
        if not curve.points["step"]:
            raise ValueError(
                "The run ended before its first validation. Let it run for longer, or set "
                "trainer.val_check_interval."
            )
    except Exception as error:  # whatever it is, the other cells go on, and the grid says why
        traceback.print_exc()
        status, reason = "failed", f"{type(error).__name__}: {error}"
    finally:
        _finish_wandb(trainer)
    return {
        "status": status,
        "reason": reason,
        "curve": curve.points,
        "seconds": round(time.monotonic() - started, 2),
    }


def _finish_wandb(trainer: Any) -> None:
    """Ends the run of a WandbLogger, which the next cell's would otherwise go on with."""
    if trainer is not None and any(is_wandb(logger) for logger in trainer.loggers):
        import wandb

        # a cell's result does not depend on what becomes of its log
        with contextlib.suppress(Exception):
            wandb.finish()


def run_elsewhere(
    folder: str, path: Sequence[str], threads: int, config: Mapping[str, Any], metric: str
) -> tuple[dict[str, Any], str]:
    """Trains one cell in a process that a cluster has started, as if it was one of this machine.

    Args:
        folder: the working folder of whoever runs the grid.
        path: where modules are found there.
        threads: that torch may use.
        config: see `run`.
        metric: see `run`.

    Returns:
        what `run` returns, and what was printed.
    """
    os.chdir(folder)
    sys.path[:] = dict.fromkeys((*path, *sys.path))
    # Lightning takes the tasks of a job of SLURM for the ranks of one run, except in this one:
    os.environ["SLURM_JOB_NAME"] = "interactive"
    prepare(None, threads)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        result = run(config, metric)
    return result, said.getvalue()


def pid() -> int:
    """Of the worker process; the first thing that it is asked, so that it can be ended."""
    return os.getpid()


def with_loggers_of_its_own(
    config: dict[str, Any], folder: Path, name: str, group: str
) -> dict[str, Any]:
    """The configuration with loggers, if it has any, that write to a folder of the cell's own."""
    loggers = config["trainer"].get("logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if not isinstance(logger, dict):
            continue
        arguments = logger.setdefault("init_args", {})
        arguments["save_dir"] = str(folder)
        if logger["class_path"].rpartition(".")[2] == "WandbLogger":
            arguments.update(name=name, group=arguments.get("group", group))
        else:
            arguments.update(name="", version="")
    return config
