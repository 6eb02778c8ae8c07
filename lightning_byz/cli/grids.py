"""``lightning-byz grid``: has a launcher run the cells of a grid file, and remembers those that are
done.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lightning_byz.cli import grid_cells
from lightning_byz.cli.grid_file import CELL_FIELDS, Cell, Grid, GridError
from lightning_byz.cli.launchers import LAUNCHERS, Result
from lightning_byz.cli.runs import ByzantineCLI, ConfigurationError

RESULTS, CURVES, KEPT = "results.csv", "curves.csv", "results.jsonl"
"""Files of a grid's folder: a line for each cell; a line for each point of each curve; what a rerun
reads.
"""


def run_grid(
    grid: Grid, output: Path, jobs: int | None, console: Console, launcher: str = "local"
) -> bool:
    """Runs all cells that ``output`` does not know yet, and writes the tables.

    Args:
        grid: what to run.
        output: the grid's folder. What is there and belongs to the same cells is kept.
        jobs: the most cells at a time; None: as many as the launcher has room for.
        console: for the progress bar, and the reasons of cells that fail.
        launcher: where they run, a name in `LAUNCHERS`.

    Returns:
        whether every cell has a result. Cells that failed have none: the same call tries them
            again.

    Raises:
        GridError: if the configuration of a cell cannot be read, or the launcher cannot be used,
            before any cell has run.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, once the tables are written.
    """
    cells = {grid.identity(cell): cell for cell in grid.cells()}
    results = _known(cells, output)
    check(
        [
            (cell, _config(grid, name, cell, output))
            for name, cell in cells.items()
            if name not in results
        ]
    )
    output.mkdir(parents=True, exist_ok=True)
    missing = {name: cell for name, cell in cells.items() if name not in results}
    launched = LAUNCHERS[launcher](grid, output, jobs)
    console.print(
        f"{grid.name}: {len(cells)} cells, {len(results)} of them known; {launched.where}. "
        f"Results go to {output}.",
        highlight=False,
        soft_wrap=True,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with (
            _sigterm_interrupts(),
            (output / KEPT).open("a") as file,
            Progress(*columns, console=console, speed_estimate_period=3600) as progress,
            closing(launched.results(_made_ready(grid, missing, output))) as found,
        ):
            bar = progress.add_task("cells", total=len(cells), completed=len(results))
            for name, result in found:
                results[name] = result
                file.write(json.dumps([name, result]) + "\n")
                file.flush()
                progress.advance(bar)
                if result["status"] != "finished":
                    reason = result["reason"].splitlines()[0]
                    progress.console.print(
                        f"{result['status']}: {cells[name].label}: {reason}",
                        markup=False,
                        highlight=False,
                    )
    finally:
        write_tables(
            grid, {name: (cells[name], results[name]) for name in cells if name in results}, output
        )
    return all(name in results and results[name]["status"] != "failed" for name in cells)


def _known(cells: Mapping[str, Cell], output: Path) -> dict[str, Result]:
    """The results of cells that need not be run again."""
    return {
        name: result
        for name, result in kept(output / KEPT)
        if name in cells and result["status"] != "failed"
    }


def _config(grid: Grid, name: str, cell: Cell, output: Path) -> dict[str, Any]:
    """The configuration of a cell's run, with loggers of its own."""
    return grid_cells.with_loggers_of_its_own(
        grid.config(cell), output / "cells" / name, cell.label, grid.name
    )


def check(cells: Sequence[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Reads configurations of cells in which every value of every axis occurs.

    Args:
        cells: with the configurations of their runs.

    Raises:
        GridError: names the first cell whose configuration cannot be read, and says what is wrong
            with it.
    """
    seen: set[tuple[str, Any]] = set()
    for cell, config in cells:
        values = {*asdict(cell).items()} - seen
        if any(key not in ("f", "seed") for key, _ in values) or not seen:
            try:
                ByzantineCLI.check(config)
            except ConfigurationError as error:
                raise GridError(f"the cell {cell.label} cannot run: {error}") from error
        seen |= values


def list_cells(grid: Grid, output: Path, console: Console) -> None:
    """Checks the grid and prints its cells, and which of them have a result already.

    Raises:
        GridError: as `run_grid`.
    """
    cells = {grid.identity(cell): cell for cell in grid.cells()}
    check([(cell, _config(grid, name, cell, output)) for name, cell in cells.items()])
    results = _known(cells, output)
    for name, cell in cells.items():
        status = results[name]["status"] if name in results else "to run"
        console.print(
            f"{name}  {status:8}  {cell.label}", markup=False, highlight=False, soft_wrap=True
        )
    console.print(
        f"{grid.name}: {len(cells)} cells, {len(results)} of them known.",
        highlight=False,
        soft_wrap=True,
    )


def kept(path: Path) -> Iterator[tuple[str, Result]]:
    """The cells' names and results in a folder's memory; a later one counts more. A line that was
    cut short is left out.
    """
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            name, result = json.loads(line)
        except ValueError:  # whoever wrote it was killed meanwhile
            continue
        yield name, result


def _made_ready(
    grid: Grid, cells: Mapping[str, Cell], output: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The names and configurations of cells, each with an empty folder for its loggers."""
    for name, cell in cells.items():
        folder = output / "cells" / name
        if folder.exists():  # what an attempt that was cut short, or failed, has left
            shutil.rmtree(folder)
        config = _config(grid, name, cell, output)
        if config["trainer"].get("logger"):
            folder.mkdir(parents=True)  # a WandbLogger wants it
        yield name, config


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM is as Ctrl-C: what is done is written down before the program ends."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def write_tables(grid: Grid, results: Mapping[str, tuple[Cell, Result]], output: Path) -> None:
    """Writes ``results.csv`` and ``curves.csv``, and the same as Parquet where pyarrow is
    installed.
    """
    measured = (*grid_cells.COLUMNS, grid.metric)
    lines, points = [], []
    for name, (cell, result) in results.items():
        curve = result["curve"]
        last = (
            {column: curve[column][-1] for column in measured}
            if curve.get("step")
            else dict.fromkeys(measured)
        )
        whole = {
            "status": result["status"],
            "wall_seconds": result["seconds"],
            "reason": result["reason"],
            "cell": name,
        }
        lines.append({**asdict(cell), **last, **whole})
        for values in zip(*(curve.get(column, ()) for column in measured), strict=True):
            points.append(
                {**asdict(cell), **dict(zip(measured, values, strict=True)), "cell": name}
            )
    _write(
        output / RESULTS,
        (*CELL_FIELDS, *measured, "status", "wall_seconds", "reason", "cell"),
        lines,
    )
    _write(output / CURVES, (*CELL_FIELDS, *measured, "cell"), points)


def _write(path: Path, header: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> None:
    """All of the table or nothing."""
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(lines)
    part.replace(path)
    if importlib.util.find_spec("pyarrow") is not None:
        from pyarrow import csv as arrow
        from pyarrow import parquet

        parquet.write_table(arrow.read_csv(path), path.with_suffix(".parquet"))
