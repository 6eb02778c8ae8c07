"""What the benchmarks share: data, runs that survive an interruption, and tables."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Run = dict[str, Any]


def a9a(data: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training samples and labels (0 or 1), then those of the test set, from ``libsvm/a9a.bz2`` and
    ``libsvm/a9a.t.bz2``.
    """
    from sklearn.datasets import load_svmlight_file

    parts = []
    for name in ("a9a.bz2", "a9a.t.bz2"):
        x, y = load_svmlight_file(str(Path(data) / "libsvm" / name), n_features=123)
        parts += [torch.tensor(x.toarray(), dtype=torch.float32), torch.tensor(y > 0).long()]
    return tuple(parts)


def _key(run: Run) -> str:
    return json.dumps(run, sort_keys=True)


def run_all(
    runs: Iterable[Run], work: Callable[[Run], Run], output: Path, jobs: int = 1
) -> list[tuple[Run, Run]]:
    """(run, result) of all runs; those that ``output/results.jsonl`` knows are not run again, the
    others are added to it.
    """
    runs = list(runs)
    output.mkdir(parents=True, exist_ok=True)
    cache = output / "results.jsonl"
    known = {}
    for line in cache.read_text().splitlines() if cache.exists() else []:
        try:
            run, result = json.loads(line)
        except ValueError:  # the line that an interrupted run left half written
            continue
        known[_key(run)] = result
    missing = [run for run in runs if _key(run) not in known]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress, cache.open("a") as file:
        bar = progress.add_task(output.name, total=len(runs), completed=len(runs) - len(missing))

        def finished(run: Run, result: Run) -> None:
            known[_key(run)] = result
            file.write(json.dumps([run, result]) + "\n")
            file.flush()
            progress.advance(bar)

        if jobs == 1:
            for run in missing:
                progress.update(bar, description=" ".join(map(str, run.values())))
                finished(run, work(run))
        else:
            with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
                futures = {pool.submit(work, run): run for run in missing}
                for future in as_completed(futures):
                    finished(futures[future], future.result())
    return [(run, known[_key(run)]) for run in runs]


def mean_by(
    results: Iterable[tuple[Run, Run]], *names: str, value: str = "accuracy"
) -> dict[tuple[Any, ...], float]:
    """The mean of ``value`` over all runs that agree in the fields ``names``."""

    def key(pair: tuple[Run, Run]) -> tuple[Any, ...]:
        return tuple(pair[0][name] for name in names)

    groups = groupby(sorted(results, key=lambda pair: repr(key(pair))), key)
    return {
        group: sum(x) / len(x)
        for group, pairs in groups
        if (x := [result[value] for _, result in pairs])
    }


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def write_csv(
    path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], add: bool = False
) -> None:
    """A table as a CSV file, in place of whatever it held; with ``add``, below it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = add and path.exists()
    with path.open("a" if add else "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows if begun else [header, *rows])


def machine() -> str:
    """The class of machine that this runs on."""
    names = [
        line.split(":")[1].strip()
        for line in _lines("/proc/cpuinfo")
        if line.startswith("model name")
    ]
    return (
        f"{names[0] if names else 'unknown CPU'}, {os.cpu_count()} cores, torch {torch.__version__}"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
