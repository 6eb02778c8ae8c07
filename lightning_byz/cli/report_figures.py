"""The pictures of reports: legible in print, in grey and for the colour-blind (numbers in cells,
markers and dashes besides colours).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Okabe and Ito's, and a grey
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#999999")
DASHES: tuple[Any, ...] = (
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1, 1, 1, 1, 1)),
    (0, (1, 1)),
    (0, (8, 2)),
    (0, (3, 1, 1, 1)),
)
MARKERS = "osD^vXP*"
MOST_LINES = len(COLOURS)
"""Of one panel; more cannot be told apart."""

_STYLE: Any = {
    "font.size": 9,
    "axes.grid": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,  # letters stay letters
    "legend.frameon": False,
}


class Line(NamedTuple):
    """One curve of a panel.

    Attributes:
        label: what it is.
        x: increasing.
        middle: mean of its seeds, at x.
        low: a standard deviation of its seeds below.
        high: a standard deviation above.
    """

    label: str
    x: np.ndarray[Any, Any]
    middle: np.ndarray[Any, Any]
    low: np.ndarray[Any, Any]
    high: np.ndarray[Any, Any]


def style() -> Any:
    """A context in which all pictures are drawn and saved."""
    return matplotlib.rc_context(_STYLE)


def band(label: str, x: Sequence[Sequence[float]], y: Sequence[Sequence[float]]) -> Line:
    """The curves of several seeds as one line with a band of their sample standard deviation, up to
    where the shortest ends.
    """
    at = np.asarray(min(x, key=lambda points: points[-1]), dtype=float)
    curves = np.stack([np.interp(at, points, values) for points, values in zip(x, y, strict=True)])
    middle = curves.mean(0)
    spread = curves.std(0, ddof=1) if len(curves) > 1 else np.zeros_like(middle)
    return Line(label, at, middle, middle - spread, middle + spread)


def heatmap(
    values: np.ndarray[Any, Any],
    rows: Sequence[str],
    columns: Sequence[str],
    notes: Mapping[tuple[int, int], str],
    title: str,
    percent: bool,
) -> Figure:
    """Numbers in coloured cells; the last column stands apart.

    Args:
        values: ``[rows, columns]``, nan where there is none.
        rows: names.
        columns: names.
        notes: (row, column) -> what is written under, or instead of, the number.
        title: above.
        percent: values are shares: 0 to 1, shown as percents.
    """
    wide = max(1, len(columns) - 1)
    figure = Figure(
        figsize=(2.6 + 0.95 * len(columns), 1.5 + 0.42 * len(rows)), layout="constrained"
    )
    parts = (
        figure.subplots(1, 2, width_ratios=[wide, 1], squeeze=False)[0]
        if len(columns) > 1
        else [figure.subplots()]
    )
    shown = values[np.isfinite(values)]
    low, high = (
        (0.0, 1.0)
        if percent
        else (float(shown.min()), float(shown.max()))
        if len(shown)
        else (0.0, 1.0)
    )
    colours = matplotlib.colormaps["cividis"]
    image = None
    first = 0
    for axes, count in zip(parts, (wide, 1) if len(columns) > 1 else (1,), strict=True):
        piece = values[:, first : first + count]
        image = axes.imshow(piece, cmap=colours, vmin=low, vmax=high, aspect="auto")
        for i, j in np.ndindex(*piece.shape):
            value, note = float(piece[i, j]), notes.get((i, first + j), "")
            number = (
                "" if math.isnan(value) else f"{100 * value:.0f}" if percent else f"{value:.3g}"
            )
            shade = (value - low) / max(high - low, 1e-12)
            colour = "black" if math.isnan(value) or shade > 0.55 else "white"
            text = f"{number} {note}".strip()
            axes.text(
                j, i, text, ha="center", va="center", color=colour, fontsize=7.5 if note else 9
            )
        axes.set_xticks(
            range(count),
            columns[first : first + count],
            rotation=30,
            ha="right",
            rotation_mode="anchor",
        )
        axes.set_yticks(range(len(rows)), rows if first == 0 else [""] * len(rows))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xticks(np.arange(0.5, count - 1), minor=True)
        axes.set_yticks(np.arange(0.5, len(rows) - 1), minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="minor", length=0)
        first += count
    assert image is not None
    bar = figure.colorbar(image, ax=list(parts), fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    if percent:
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle(title, fontsize=10)
    return figure


def panels(
    lines: Mapping[str, Sequence[Line]], x: str, y: str, title: str, percent: bool
) -> Figure:
    """A panel for each key of ``lines``, with one legend for all."""
    labels = list(dict.fromkeys(line.label for group in lines.values() for line in group))
    across = min(3, len(lines))
    down = math.ceil(len(lines) / across)
    figure = Figure(
        figsize=(max(7.2, 3.1 * across), 2.5 * down + 0.5 + 0.2 * math.ceil(len(labels) / 3)),
        layout="constrained",
    )
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(lines) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes, (name, group) in zip(grid.flat, lines.items(), strict=False):
        for line in group:
            i = labels.index(line.label)
            look = {
                "color": COLOURS[i],
                "linestyle": DASHES[i],
                "marker": MARKERS[i],
                "markersize": 4,
                "linewidth": 1.4,
            }
            every = max(1, len(line.x) // 6)
            (handles[line.label],) = axes.plot(
                line.x, line.middle, markevery=(i % every, every), **look
            )
            if np.any(line.high > line.low):
                axes.fill_between(
                    line.x, line.low, line.high, color=COLOURS[i], alpha=0.15, linewidth=0
                )
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if percent:
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel(y)
    for place, axes in enumerate(grid.flat[: len(lines)]):
        if place + across >= len(lines):
            axes.set_xlabel(x)
    if labels != [""]:
        figure.legend(
            [handles[label] for label in labels],
            labels,
            loc="outside lower center",
            ncols=min(3, len(labels)),
            fontsize=8,
        )
    figure.suptitle(title, fontsize=10)
    return figure


def over_time(
    values: np.ndarray[Any, Any],
    steps: np.ndarray[Any, Any],
    rows: Sequence[str],
    title: str,
    label: str,
    mark: float | None,
) -> Figure:
    """A row for each worker, a column for each step.

    Args:
        values: ``[rows, steps]``, nan where there is none.
        steps: increasing.
        rows: names.
        title: above.
        label: of the colours.
        mark: values from this on get a cross; None: none does.
    """
    figure = Figure(figsize=(7.2, 1.4 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    ends = np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1))
    top = max(1.0, float(np.nanmax(values))) if np.isfinite(values).any() else 1.0
    image = axes.pcolormesh(
        ends,
        np.arange(len(rows) + 1),
        values,
        cmap="cividis",
        vmin=min(0.0, float(np.nanmin(values))),
        vmax=top,
    )
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.invert_yaxis()
    axes.set_xlabel("step")
    if mark is not None:
        for i, row in enumerate(values):
            marked = np.flatnonzero(row >= mark)
            chosen = marked[:: max(1, len(marked) // 25)]
            axes.scatter(
                (ends[chosen] + ends[chosen + 1]) / 2,
                np.full(len(chosen), i + 0.5),
                marker="X",
                color="#B00020",
                edgecolors="white",
                s=34,
                linewidths=0.7,
            )
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, label=label)
    bar.outline.set_visible(False)
    axes.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure
