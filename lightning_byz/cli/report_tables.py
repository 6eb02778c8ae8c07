"""The tables of reports in LaTeX: rules against attacks, as papers print them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Comparison(NamedTuple):
    """Rules against attacks, in one setting.

    Attributes:
        aggregations: names of the rows.
        attacks: names of the columns, without the last.
        values: ``[rows, columns]``, means over the seeds; the last column is the worst of its row.
            nan where there is none.
        spread: ``[rows, columns]``, their sample standard deviations; nan for less than two seeds.
        marks: (row, column) -> "failed", "diverged" or "missing", where that is so.
    """

    aggregations: Sequence[str]
    attacks: Sequence[str]
    values: np.ndarray[Any, Any]
    spread: np.ndarray[Any, Any]
    marks: Mapping[tuple[int, int], str]


_ESCAPED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}
_MARKS = {"failed": "failed", "diverged": r"$^\dagger$", "missing": "?"}


def escaped(text: str) -> str:
    """A text as LaTeX, which would take some letters for commands."""
    return "".join(_ESCAPED.get(letter, letter) for letter in text)


def latex(compared: Comparison, caption: str, label: str, percent: bool) -> str:
    """A table that needs the package booktabs; the best of each column is bold.

    Args:
        compared: what it shows.
        caption: plain text.
        label: what the document refers to it by, after ``tab:``.
        percent: values are shares: 0 to 1, shown as percents.
    """
    shown = [
        [_number(value, percent) for value in row] for row in compared.values.tolist()
    ]  # "" for nan
    best = [_best(compared.values[:, j], [row[j] for row in shown]) for j in range(len(shown[0]))]
    lines = []
    for i, aggregation in enumerate(compared.aggregations):
        cells = [escaped(aggregation)]
        for j, number in enumerate(shown[i]):
            text = rf"\textbf{{{number}}}" if number and number == best[j] else number
            if number and np.isfinite(compared.spread[i, j]):
                text += rf" $\pm$ {_number(compared.spread[i, j], percent)}"
            mark = compared.marks.get((i, j))
            cells.append(f"{text} {_MARKS[mark]}".strip() if mark else text or "--")
        lines.append("    " + " & ".join(cells) + r" \\")
    header = " & ".join(["rule", *map(escaped, compared.attacks), "worst"])
    columns = "l" + "r" * len(compared.attacks) + "r"
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{escaped(caption)}}}",
            rf"  \label{{tab:{label}}}",
            rf"  \begin{{tabular}}{{{columns}}}",
            r"    \toprule",
            rf"    {header} \\",
            r"    \midrule",
            *lines,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _number(value: float, percent: bool) -> str:
    if not np.isfinite(value):
        return ""
    return f"{100 * value:.1f}" if percent else f"{value:.3g}"


def _best(column: np.ndarray[Any, Any], shown: Sequence[str]) -> str | None:
    """The largest number of a column, as it is shown."""
    return shown[int(np.nanargmax(column))] if np.isfinite(column).any() else None
