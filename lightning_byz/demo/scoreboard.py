"""What the demo shows: a progress bar for each run, then a table and a picture of the
accuracies.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_byz.optional_dependencies import require

require("The demo", "demo", "matplotlib", "rich", "sklearn")

from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator, PercentFormatter  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402

# Okabe and Ito's colours, apart for the colour-blind; dashes and markers tell them apart in grey
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "--", "marker": "o"},
    {"color": "#D55E00", "linestyle": ":", "marker": "X"},
    {"color": "#009E73", "linestyle": "-", "marker": "s"},
)


class Scoreboard:
    """Follows the runs of a comparison, one after the other, and shows how they went.

    Inside a ``with`` block it draws the progress bars, and Lightning's hints about devices and data
    loaders are not printed.

    Args:
        names: what the runs are called, in the order in which they are made. The first one is what
            the others are compared with.
        epochs: epochs of one run.

    Attributes:
        curves: of every run, its accuracy in [0, 1] after each epoch so far.
        quiet: arguments of a Trainer that leave the screen to this board and the disk alone, and
            stay on the CPU.
    """

    quiet: dict[str, Any] = {  # noqa: RUF012
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }

    def __init__(self, names: Sequence[str], epochs: int) -> None:
        self.curves: dict[str, list[float]] = {name: [] for name in names}
        self.epochs = epochs
        self._console = Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[accuracy]:>6}"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._levels: dict[logging.Logger, int] = {}
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> Scoreboard:
        for package in (
            "lightning.pytorch",
            "lightning.fabric",
            "pytorch_lightning",
            "lightning_fabric",
            "lightning_byz",
        ):
            for logger in (
                logging.getLogger(package),
                logging.getLogger(f"{package}.utilities.rank_zero"),
                logging.getLogger(f"{package}.utilities.seed"),
            ):
                self._levels[logger] = logger.level
                logger.setLevel(logging.WARNING)
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*treespec.*")
        warnings.filterwarnings("ignore", message="The `srun` command is available")
        self._progress.start()
        for name in self.curves:
            self._tasks[name] = self._progress.add_task(
                name, start=False, total=self.epochs, accuracy=""
            )
        self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
        self._warnings.__exit__(kind, error, traceback)
        for logger, level in self._levels.items():
            logger.setLevel(level)

    @property
    def _current(self) -> str | None:
        return next((name for name, curve in self.curves.items() if len(curve) < self.epochs), None)

    def _begin(self) -> None:
        if self._current is not None:
            self._progress.start_task(self._tasks[self._current])

    def record(self, trainer: Any, module: Any) -> None:
        """Notes the "accuracy" that was logged in the validation that has just ended, for the
        current run.
        """
        name = self._current
        if name is None:
            raise RuntimeError(
                f"The board is full: it expects {len(self.curves)} runs of {self.epochs} epochs."
            )
        self.curves[name].append(float(trainer.callback_metrics["accuracy"]))
        self._progress.update(self._tasks[name], advance=1, accuracy=f"{self.curves[name][-1]:.1%}")
        if len(self.curves[name]) == self.epochs:
            self._begin()

    def show(self, path: Path) -> None:
        """Prints the table, writes the picture (the suffix gives its format), and says where it
        is.
        """
        self._console.print(self.table())
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure().savefig(path, dpi=150)
        self._console.print("Picture:", str(path.resolve()), soft_wrap=True, highlight=False)

    def table(self) -> Table:
        """Final accuracies, and how many points each run lost against the first one."""
        table = Table(
            "training",
            title=f"Accuracy on held-out digits after {self.epochs} epochs",
            title_justify="left",
        )
        table.add_column("accuracy", justify="right")
        table.add_column("lost, in points", justify="right")
        clean = next(iter(self.curves.values()))[-1]
        for name, curve in self.curves.items():
            table.add_row(
                name,
                f"{curve[-1]:.1%}",
                f"{100 * (clean - curve[-1]):.1f}" if curve[-1] is not clean else "",
            )
        return table

    def figure(self) -> Figure:
        """The accuracies over the epochs, every curve with its name beside it."""
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for (name, curve), style in zip(self.curves.items(), _STYLES, strict=False):
            axes.plot(
                range(1, len(curve) + 1), curve, label=name, linewidth=1.8, markersize=5, **style
            )
        axes.set(
            xlabel="epoch",
            ylabel="accuracy on held-out digits",
            xlim=(0.5, self.epochs + 0.5),
            ylim=(0, 1.02),
        )
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="center right", frameon=False, handlelength=3)
        return figure
