"""``lightning-byz report``: one page of HTML, with pictures as PNG and PDF and tables in LaTeX,
from a grid's folder or a run's ``metrics.csv``.
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

import lightning_byz
from lightning_byz.cli import report_figures as figures
from lightning_byz.cli import report_tables as tables
from lightning_byz.cli.grid_file import CELL_FIELDS, Cell
from lightning_byz.cli.grids import CURVES, RESULTS

Row = dict[str, str]


class ReportError(ValueError):
    """A folder that there is nothing to report of; the message says what was looked for."""


@dataclass
class _Page:
    """What the template shows.

    Attributes:
        title: of the page.
        facts: sentences at the top.
        pictures: name -> (figure, caption).
        tables: name -> LaTeX.
        header: of the table at the end.
        table: its lines.
        problems: (what, why) of everything that failed.
    """

    title: str
    facts: list[str] = field(default_factory=list)
    pictures: dict[str, tuple[Figure, str]] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    header: list[str] = field(default_factory=list)
    table: list[list[str]] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


def write_report(folder: Path) -> Path:
    """Writes ``folder/report``: index.html, which needs no other file and no network, each picture
    as PNG and PDF, and a grid's comparisons as tables in LaTeX.

    Args:
        folder: of a grid (with ``results.csv``), or of a run with a CSVLogger (with
            ``metrics.csv``, or the newest one below it).

    Returns:
        the page.

    Raises:
        ReportError: if the folder holds neither, or nothing in it.
    """
    with figures.style():
        if (folder / RESULTS).is_file():
            page = _of_grid(folder)
        else:
            metrics = sorted(folder.glob("**/metrics.csv"), key=lambda path: path.stat().st_mtime)
            if not metrics:
                raise ReportError(
                    f"{folder} should hold {RESULTS}, as `lightning-byz grid` writes it, or "
                    "metrics.csv, as a CSVLogger does. Found neither."
                )
            page = _of_run(metrics[-1])
        return _written(page, folder / "report")


def _written(page: _Page, output: Path) -> Path:
    output.mkdir(exist_ok=True)
    pictures = []
    for name, (figure, caption) in page.pictures.items():
        figure.savefig(output / f"{name}.pdf")
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=180)
        (output / f"{name}.png").write_bytes(image.getvalue())
        pictures.append(
            {"name": name, "caption": caption, "data": base64.b64encode(image.getvalue()).decode()}
        )
    for name, latex in page.tables.items():
        (output / f"{name}.tex").write_text(latex)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lightning_byz.cli", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("report.html").render(
        page=page,
        pictures=pictures,
        version=lightning_byz.__version__,
        when=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )
    (output / "index.html").write_text(text)
    return output / "index.html"


def _read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        rows = [*csv.DictReader(file)]
    if not rows:
        raise ReportError(
            f"{path} should hold at least one line besides its header. Found none: has anything "
            "been run?"
        )
    return rows


def _slug(*parts: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


# -- a grid ----------------------------------------------------------------------------------------


def _aggregation(row: Row) -> str:
    return (
        row["rule"]
        if row["pre_aggregation"] == "none"
        else f"{row['pre_aggregation']} + {row['rule']}"
    )


def _cell(row: Row) -> Cell:
    values: dict[str, Any] = {key: row[key] for key in CELL_FIELDS}
    return Cell(**{**values, "f": int(row["f"]), "seed": int(row["seed"])})


def _names(rows: Iterable[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _of_grid(folder: Path) -> _Page:
    rows, points = _read(folder / RESULTS), _read(folder / CURVES)
    for row in (*rows, *points):
        row["aggregation"] = _aggregation(row)
    metric = next(name for name in rows[0] if name not in _NOT_THE_METRIC)
    numbers = [float(row[metric]) for row in rows if row[metric]]
    percent = bool(numbers) and min(numbers) >= 0 and max(numbers) <= 1
    page = _Page(f"Grid {folder.resolve().name}")
    count = {
        status: sum(row["status"] == status for row in rows)
        for status in ("finished", "diverged", "failed")
    }
    page.facts = [
        f"{len(rows)} cells: "
        f"{', '.join(f'{number} {status}' for status, number in count.items() if number)}.",
        f"{len(_names(rows, 'aggregation'))} aggregations, {len(_names(rows, 'attack'))} attacks, "
        f"f in {{{', '.join(_names(rows, 'f'))}}}, heterogeneity: "
        f"{', '.join(_names(rows, 'heterogeneity'))}; {len(_names(rows, 'seed'))} seed(s).",
    ]
    settings = [_names(rows, key) for key in _SETTING]
    several = [key for key, values in zip(_SETTING, settings, strict=True) if len(values) > 1]
    worst: dict[str, dict[str, float]] = {}
    for setting in product(*settings):
        chosen = dict(zip(_SETTING, setting, strict=True))
        here, curves = (
            [row for row in table if all(row[k] == v for k, v in chosen.items())]
            for table in (rows, points)
        )
        if not here:
            continue
        name = ", ".join(f"f = {chosen[key]}" if key == "f" else chosen[key] for key in several)
        worst[name] = _draw_setting(page, here, curves, metric, percent, name)
    if len(worst) > 1:
        aggregations = _names(rows, "aggregation")
        values = np.array(
            [
                [found.get(aggregation, np.nan) for found in worst.values()]
                for aggregation in aggregations
            ]
        )
        values = np.hstack([values, values.min(1, keepdims=True)])  # nan where one is
        missing = {
            (int(i), int(j)): "no result"
            for i, j in zip(*np.nonzero(np.isnan(values)), strict=True)
        }
        figure = figures.heatmap(
            values,
            aggregations,
            [*worst, "worst"],
            missing,
            f"Worst {metric} over all attacks",
            percent,
        )
        caption = "Under the attack that is worst for the rule, by setting; means of seeds."
        caption += (
            " No result: it failed under an attack, or has not been run under all."
            if missing
            else ""
        )
        page.pictures = {"worst": (figure, caption), **page.pictures}
    _draw_suspicion(page, folder, rows)
    page.header = [*CELL_FIELDS, metric, "status", "wall_seconds"]
    for row in rows:
        page.table.append(
            [
                f"{float(row[metric]):.4f}" if key == metric and row[metric] else row[key]
                for key in page.header
            ]
        )
        if row["status"] != "finished":
            page.problems.append((f"{_cell(row).label}: {row['status']}", row["reason"]))
    return page


def _draw_suspicion(page: _Page, folder: Path, rows: list[Row]) -> None:
    """Adds the suspicion of each worker under each attack, of the first cell whose logs hold
    any.
    """
    for attack in _names(rows, "attack")[: figures.MOST_LINES]:
        for row in (row for row in rows if row["attack"] == attack):
            logs = sorted((folder / "cells" / row["cell"]).glob("**/metrics.csv"))
            try:
                found = (
                    _over_time(_columns(logs[-1]), "suspicion", f"{_SUSPICION}, {attack}", 1.0)
                    if logs
                    else None
                )
            except ReportError:  # its log has no line yet
                continue
            if found is not None:
                cell = (
                    ", ".join(row[key] for key in ("aggregation", "heterogeneity"))
                    + f", f = {row['f']}, seed {row['seed']}"
                )
                page.pictures[_slug("suspicion", attack)] = (
                    found[0],
                    f"{cell}. Crosses: accused. {_accusation(found[1])}.",
                )
                break


_SETTING = ("algorithm", "f", "heterogeneity")
"""What pictures do not mix."""
_MEASURES = {
    "step": "step",
    "bytes_up": "megabytes that one worker sent",
    "simulated_seconds": "simulated seconds",
}
_NOT_THE_METRIC = {
    *CELL_FIELDS,
    *_MEASURES,
    "bytes_down",
    "status",
    "wall_seconds",
    "reason",
    "cell",
    "aggregation",
}


_MARKS = {"failed": "failed", "diverged": "†", "missing": "?"}
"""What is written into a cell for what became of its runs."""
_MEANINGS = {
    "diverged": "training diverged",
    "failed": "a run failed, so that the rule has no worst case",
    "missing": "some attacks have not been run yet",
}
_OVER_SEEDS = "means of seeds, ± their standard deviation"


def _compared(rows: list[Row], metric: str) -> tables.Comparison:
    """Each aggregation under each attack, over the seeds, in rows of one setting."""
    aggregations, attacks = _names(rows, "aggregation"), _names(rows, "attack")
    values = np.full((len(aggregations), len(attacks) + 1), np.nan)
    spread = np.full_like(values, np.nan)
    marks: dict[tuple[int, int], str] = {}
    for (i, aggregation), (j, attack) in product(enumerate(aggregations), enumerate(attacks)):
        cells = [
            row for row in rows if (row["aggregation"], row["attack"]) == (aggregation, attack)
        ]
        results = [float(row[metric]) for row in cells if row["status"] != "failed" and row[metric]]
        if results:
            values[i, j] = np.mean(results)
        if len(results) > 1:
            spread[i, j] = np.std(results, ddof=1)
        for status in ("failed", "diverged"):
            if any(row["status"] == status for row in cells):
                marks.setdefault((i, j), status)
    worst = len(attacks)
    for i in range(len(aggregations)):
        if any(marks.get((i, j)) == "failed" for j in range(worst)):
            marks[i, worst] = "failed"
        elif np.isfinite(values[i, :-1]).all():
            values[i, -1] = values[i, :-1].min()
        else:
            marks[i, worst] = "missing"
    return tables.Comparison(aggregations, attacks, values, spread, marks)


def _draw_setting(
    page: _Page, rows: list[Row], points: list[Row], metric: str, percent: bool, name: str
) -> dict[str, float]:
    """Adds a setting's pictures to the page; each aggregation's worst result."""
    compared = _compared(rows, metric)
    aggregations, attacks = compared.aggregations, compared.attacks
    values, marks = compared.values, compared.marks
    several = bool(np.isfinite(compared.spread).any())
    notes = {place: _MARKS[mark] for place, mark in marks.items()}
    for i, j in zip(*np.nonzero(np.isfinite(compared.spread)), strict=True):
        if marks.get((int(i), int(j))) != "failed":
            spread = compared.spread[i, j]
            width = f"± {100 * spread:.0f}" if percent else f"± {spread:.2g}"
            notes[int(i), int(j)] = f"{width} {notes.get((int(i), int(j)), '')}".strip()
    title = f"{metric.capitalize()} at the end{f', {name}' if name else ''}"
    title += ", in percent" if percent else ""
    figure = figures.heatmap(values, aggregations, [*attacks, "worst"], notes, title, percent)
    said = ["Rules against attacks", "the last column is the worst of its row"]
    said.append(_OVER_SEEDS if several else "means of seeds")
    said += [f"{_MARKS[mark]}: {_MEANINGS[mark]}" for mark in _MEANINGS if mark in marks.values()]
    caption = "; ".join(said) + "."
    page.pictures[_slug("heatmap", name)] = figure, caption
    table = tables.latex(compared, f"{title}. {caption}", _slug("table", name), percent)
    page.tables[_slug("table", name)] = table

    for pre in _names(rows, "pre_aggregation"):
        shown = [
            a
            for a in aggregations
            if any(
                row["aggregation"] == a and row["pre_aggregation"] in (pre, "none") for row in rows
            )
        ]
        shown = [
            a
            for a in shown
            if pre == "none" or a.startswith(f"{pre} + ") or a.partition("(")[0] == "Mean"
        ][: figures.MOST_LINES]
        lines = {
            attack: [
                line
                for a in shown
                if (line := _line(points, a, attack, "step", metric)) is not None
            ]
            for attack in attacks
        }
        lines = {attack: group for attack, group in lines.items() if group}
        if lines:
            behind = "" if pre == "none" else f", {pre} in front of the rules"
            figure = figures.panels(
                lines,
                "step",
                metric,
                f"{metric.capitalize()} over time{f', {name}' if name else ''}{behind}",
                percent,
            )
            seeds = len(_names(rows, "seed"))
            caption = f"{seeds} seeds: {_OVER_SEEDS}." if seeds > 1 else "One seed."
            page.pictures[_slug("curves", name, "" if pre == "none" else pre)] = figure, caption

    worst_attack = {
        a: attacks[int(np.argmin(row[:-1]))]
        for a, row in zip(aggregations, values, strict=True)
        if np.isfinite(row[-1])
    }
    best = sorted(worst_attack, key=lambda a: -values[aggregations.index(a), -1])[
        : figures.MOST_LINES
    ]
    for measure in ("bytes_up", "simulated_seconds"):
        group = [
            line
            for a in best
            if (line := _line(points, a, worst_attack[a], measure, metric)) is not None
            and line.x[-1] > 0
        ]
        if group:
            group = [
                line._replace(x=line.x / 1e6) if measure == "bytes_up" else line for line in group
            ]
            title = (
                f"{metric.capitalize()} against {_MEASURES[measure]}{f', {name}' if name else ''}"
            )
            figure = figures.panels(
                {"under the attack that is worst for each": group},
                _MEASURES[measure],
                metric,
                title,
                percent,
            )
            page.pictures[_slug(metric, measure, name)] = (
                figure,
                "The best rules, each under the attack that is worst for it.",
            )
    return {
        aggregation: float(row[-1])
        for aggregation, row in zip(aggregations, values, strict=True)
        if np.isfinite(row[-1])
    }


def _line(points: list[Row], aggregation: str, attack: str, x: str, y: str) -> figures.Line | None:
    """The curves of all seeds of one rule under one attack, if there are any."""
    curves: dict[str, list[Row]] = {}
    for point in points:
        if (point["aggregation"], point["attack"]) == (aggregation, attack):
            curves.setdefault(point["cell"], []).append(point)
    if not curves:
        return None
    return figures.band(
        aggregation,
        *([[float(point[key]) for point in curve] for curve in curves.values()] for key in (x, y)),
    )


# -- a run -----------------------------------------------------------------------------------------


def _of_run(path: Path) -> _Page:
    columns = _columns(path)
    page = _Page(f"Run {path.resolve().parent.parent.name} {path.resolve().parent.name}")
    steps = max(int(column[0][-1]) for column in columns.values()) + 1
    page.facts = [f"{steps} steps. From {path}."]
    scores = {name: column for name, column in columns.items() if not name.startswith("byz/")}
    shares = {
        name: column
        for name, column in scores.items()
        if column[1].min() >= 0 and column[1].max() <= 1 and "loss" not in name
    }
    losses = {name: column for name, column in scores.items() if "loss" in name}
    for title, chosen, percent in (("Scores", shares, True), ("Losses", losses, False)):
        if chosen:
            page.pictures[_slug(title)] = _curves(chosen, title, percent), f"{', '.join(chosen)}."
    geometry = {
        name: columns[name]
        for name in ("byz/cosine", "byz/relative_error", "byz/byzantine_weight", "byz/kappa")
        if name in columns
    }
    if geometry:
        lines: dict[str, Sequence[figures.Line]] = {
            name: [figures.band("", [column[0].tolist()], [column[1].tolist()])]
            for name, column in geometry.items()
        }
        caption = (
            "What survived of the honest workers' direction (cosine: 1 is all), how far the "
            "aggregate was from their mean, and what weight the Byzantine rows had, where that is "
            "known."
        )
        page.pictures["aggregation"] = _apart(lines, "What the rule made of it"), caption
    main = next((name for name in shares if "acc" in name), None)
    for measure, label in (
        ("bytes_up", _MEASURES["bytes_up"]),
        ("seconds", _MEASURES["simulated_seconds"]),
    ):
        total = _total(columns, measure)
        if main is not None and total is not None and total[1][-1] > 0:
            at = np.interp(columns[main][0], *total) / (1e6 if measure == "bytes_up" else 1)
            line = figures.band(main, [at.tolist()], [columns[main][1].tolist()])
            figure = figures.panels(
                {"": [line]}, label, main, f"{main.capitalize()} against {label}", True
            )
            page.pictures[_slug(main, measure)] = (
                figure,
                "Summed up between the steps that were logged.",
            )
    for kind, title, mark in (
        ("suspicion", _SUSPICION, 1.0),
        ("weight", "Weight of each worker in the aggregate", None),
    ):
        found = _over_time(columns, kind, title, mark)
        if found is not None:
            figure, accused = found
            caption = (
                f"Crosses, from {mark:g} on: accused. {_accusation(accused)}."
                if mark is not None
                else "0: its message did not count."
            )
            page.pictures[kind] = figure, caption
            if accused:
                page.facts.append(f"Workers that were accused: {', '.join(accused)}.")
    page.header = ["metric", "first", "last", "smallest", "largest"]
    for name, (_, values) in columns.items():
        page.table.append(
            [
                name,
                *(f"{value:.4g}" for value in (values[0], values[-1], values.min(), values.max())),
            ]
        )
    return page


def _over_time(
    columns: Mapping[str, Column], kind: str, title: str, mark: float | None
) -> tuple[Figure, list[str]] | None:
    """What was logged of each worker as ``byz/KIND/worker_I``, step by step, and the workers that
    reached the mark; None if nothing was.
    """
    workers = _workers(columns, f"byz/{kind}/worker_")
    if not workers:
        return None
    at = np.unique(np.concatenate([columns[name][0] for name in workers.values()]))
    values = np.full((len(workers), len(at)), np.nan)
    for i, name in enumerate(workers.values()):
        values[i, np.searchsorted(at, columns[name][0])] = columns[name][1]
    figure = figures.over_time(
        values, at, [f"worker {worker}" for worker in workers], title, kind, mark
    )
    accused = [
        str(worker)
        for worker, row in zip(workers, values, strict=True)
        if mark is not None and np.nanmax(row) >= mark
    ]
    return figure, accused


def _accusation(accused: Sequence[str]) -> str:
    return f"Accused at some time: workers {', '.join(accused)}" if accused else "Nobody was"


Column = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


_SUSPICION = "Suspicion of each worker"


def _columns(path: Path) -> dict[str, Column]:
    """The metrics of a CSVLogger's file that have values."""
    rows = _read(path)
    found = {name: _column(rows, name) for name in rows[0] if name not in ("step", "epoch")}
    return {name: column for name, column in found.items() if len(column[0])}


def _column(rows: Sequence[Row], name: str) -> Column:
    """(steps, values) of a metric, where it was logged and finite."""
    pairs = [(float(row["step"]), float(row[name])) for row in rows if row[name] and row["step"]]
    finite = np.array([pair for pair in pairs if np.isfinite(pair[1])]).reshape(-1, 2)
    return finite[:, 0], finite[:, 1]


def _total(columns: Mapping[str, Column], measure: str) -> Column | None:
    """(steps, sum since the run began): as it was logged, or from what single steps logged, taken
    to hold until the next that did.
    """
    if f"byz/total_{measure}" in columns:
        return columns[f"byz/total_{measure}"]
    if f"byz/{measure}" not in columns:
        return None
    steps, values = columns[f"byz/{measure}"]
    return steps, np.cumsum(values * np.diff(steps, prepend=-1.0))


def _workers(columns: Mapping[str, Column], prefix: str) -> dict[int, str]:
    found = {
        int(name.removeprefix(prefix)): name
        for name in columns
        if re.fullmatch(re.escape(prefix) + r"\d+", name)
    }
    return dict(sorted(found.items()))


def _curves(columns: Mapping[str, Column], title: str, percent: bool) -> Figure:
    chosen = list(columns.items())[: figures.MOST_LINES]
    lines = [
        figures.band(name, [steps.tolist()], [values.tolist()]) for name, (steps, values) in chosen
    ]
    return figures.panels({"": lines}, "step", "", title, percent)


def _apart(lines: Mapping[str, Sequence[figures.Line]], title: str) -> Figure:
    """Panels whose axes differ."""
    figure = Figure(figsize=(max(4.8, 3.1 * len(lines)), 2.8), layout="constrained")
    for axes, (name, group) in zip(
        figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True
    ):
        for line in group:
            axes.plot(line.x, line.middle, color=figures.COLOURS[0], linewidth=1.2)
        if "error" in name or "kappa" in name:
            axes.set_yscale("log" if all((line.middle > 0).all() for line in group) else "linear")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    return figure
