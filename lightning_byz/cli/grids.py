"""``lightning-byz grid``: runs the cells of a grid file in parallel, and remembers those that are
done.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
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
from lightning_byz.cli.runs import ByzantineCLI, ConfigurationError

RESULTS, CURVES, KEPT, LOG = "results.csv", "curves.csv", "results.jsonl", "log.txt"
"""Files of a grid's folder: a line for each cell; a line for each point of each curve; what a rerun
reads; what the runs printed.
"""

Result = dict[str, Any]


def run_grid(grid: Grid, output: Path, jobs: int, console: Console) -> bool:
    """Runs all cells that ``output`` does not know yet, and writes the tables.

    Args:
        grid: what to run.
        output: the grid's folder. What is there and belongs to the same cells is kept.
        jobs: processes, each of which runs one cell after the other.
        console: for the progress bar, and the reasons of cells that fail.

    Returns:
        whether every cell has a result. Cells that failed have none: the same call tries them
            again.

    Raises:
        GridError: if the configuration of a cell cannot be read, before any cell has run.
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
    missing = [name for name in cells if name not in results]
    console.print(
        f"{grid.name}: {len(cells)} cells, {len(results)} of them known; {jobs} at a time. "
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
        ):
            bar = progress.add_task("cells", total=len(cells), completed=len(results))
            for name, result in _results(
                grid, {name: cells[name] for name in missing}, output, jobs
            ):
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


class _Worker:
    """A process that runs cells, and is started anew after one that killed it."""

    def __init__(self, log: Path, threads: int) -> None:
        self._arguments = (str(log), threads)
        self._start()

    def _start(self) -> None:
        self._pool = ProcessPoolExecutor(
            1, get_context("spawn"), grid_cells.prepare, self._arguments
        )
        self._pid = self._pool.submit(grid_cells.pid)

    def submit(self, config: Mapping[str, Any], metric: str) -> Future[Result]:
        return self._pool.submit(grid_cells.run, config, metric)

    def restart(self) -> None:
        self._pool.shutdown(wait=False)
        self._start()

    def end(self) -> None:
        """At once, whatever it does."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._pid.done() and self._pid.exception() is None:
            try:
                os.kill(self._pid.result(), signal.SIGKILL)
            except ProcessLookupError:
                return


def _results(
    grid: Grid, cells: Mapping[str, Cell], output: Path, jobs: int
) -> Iterator[tuple[str, Result]]:
    """The results of the cells, as they come."""
    jobs = min(jobs, len(cells))
    threads = max(1, (os.cpu_count() or 1) // max(1, jobs))
    workers = [_Worker(output / LOG, threads) for _ in range(jobs)]
    waiting = iter(cells.items())
    running: dict[Future[Result], tuple[str, _Worker]] = {}

    def give(worker: _Worker) -> None:
        name, cell = next(waiting, (None, None))
        if name is not None and cell is not None:
            folder = output / "cells" / name
            if folder.exists():  # what an attempt that was cut short, or failed, has left
                shutil.rmtree(folder)
            config = _config(grid, name, cell, output)
            if config["trainer"].get("logger"):
                folder.mkdir(parents=True)  # a WandbLogger wants it
            running[worker.submit(config, grid.metric)] = name, worker

    try:
        for worker in workers:
            give(worker)
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                name, worker = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    reason = (
                        f"its process died, for want of memory perhaps; {output / LOG} holds what "
                        "it said last"
                    )
                    result = {"status": "failed", "reason": reason, "curve": {}, "seconds": None}
                    worker.restart()
                give(worker)
                yield name, result
    finally:
        for worker in workers:
            worker.end()


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
