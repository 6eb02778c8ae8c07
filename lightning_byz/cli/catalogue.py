"""``lightning-byz list``: every part that a run can be made of, what it does, and where it comes
from; all from the docstrings.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

import lightning_byz
from lightning_byz import aggregators, algorithms, attacks, callbacks, compressors, data, transports

KINDS: dict[str, tuple[type, ...]] = {
    "algorithms": (algorithms.Algorithm,),
    "rules": (aggregators.Aggregator,),
    "pre-aggregations": (aggregators.PreAggregator,),
    "attacks": (attacks.Attack, attacks.DataAttack),
    "compressors": (compressors.Compressor,),
    "transports": (transports.Transport,),
    "partitions": (data.Partition,),
    "callbacks": (),
}
"""Kinds of parts, and what their classes derive from."""

_VENUE = (
    r"(?:NeurIPS|ICML|ICLR|AISTATS|UAI|NDSS|IJCAI|PODC|OPODIS|ICDCS|Interspeech|MSML|CVPR|AAAI|"
    r"ESORICS|JMLR|MLSys|SIAM [\w ]+?|"
    r"IEEE [\w ]+?|AdvML-Frontiers at NeurIPS)"
)
_ARXIV = r"arXiv \d{4}\.\d{5}"
_ID = rf"(?:,? \({_ARXIV}\)|, {_ARXIV})"
_AUTHORS = r"[A-Z][\w'-]+(?:,? (?:[A-Z][\w'-]*|et al\.|and))*"
_CITED = re.compile(
    rf"(?:{_AUTHORS},? )?(?:{_VENUE} )?(?:19|20)\d\d{_ID}?|(?:(?!of|in|on)[\w'-]+(?: et al\.,?)? "
    rf"\(?)?{_ARXIV}\)?(?: \({_VENUE} \d{{4}}\))?"
)
_LEADS = re.compile(r"^(?:After|As in|In|From|Here|The|Algorithm|See) ")


class Entry(NamedTuple):
    """A part of a run.

    Attributes:
        name: of the class, in `lightning_byz`.
        summary: what it does, one sentence.
        source: the paper that it comes from, or what it is if there is none.
    """

    name: str
    summary: str
    source: str


def catalogue(kind: str) -> list[Entry]:
    """All parts of a kind, a key of `KINDS`."""
    return [_entry(name, part) for name, part in _parts(kind)]


def described(name: str) -> str:
    """A part's import path and whole docstring, however the letters of its name are written.

    Raises:
        ValueError: if there is no such part; it names one that is like it.
    """
    known = {part.lower(): found for kind in KINDS for part, found in _parts(kind)}
    if name.lower() in known:
        part = known[name.lower()]
        return f"lightning_byz.{_name(part)}{_signature(part)}\n\n{documentation(part)}"
    near = difflib.get_close_matches(name.lower(), [*known, *KINDS], n=1)
    meant = (
        f" Did you mean {_name(known[near[0]]) if near[0] in known else near[0]}?" if near else ""
    )
    raise ValueError(
        f"there is neither a part nor a kind of parts called {name}.{meant} Kinds: "
        f"{', '.join(KINDS)}."
    )


def _signature(part: type) -> str:
    parameters = inspect.signature(part).parameters.values()
    shown = (p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    return f"({', '.join(shown)})"


def table(kinds: Iterable[str]) -> Table:
    """What `catalogue` says of these kinds, a line for each part."""
    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column("name", no_wrap=True)
    made.add_column("summary")
    made.add_column("source")
    for i, kind in enumerate(kinds):
        if i:
            made.add_row()
        made.add_row(Text(kind, style="bold"))
        for entry in catalogue(kind):
            made.add_row(
                Text(f"  {entry.name}"), Text(entry.summary), Text(entry.source, style="dim")
            )
    return made


def source(part: type) -> str:
    """The paper that a part's docstring cites first, or what it says after "No paper: "; "" if it
    says neither.
    """
    text = " ".join(documentation(part).split("\nArgs:")[0].split())
    none, cited = re.search(r"No paper: (.*?)\.(?:\s|$)", text), _CITED.search(text)
    if none is not None:
        return f"({none[1]})"
    paper = _LEADS.sub("", cited[0]) if cited is not None else ""
    return paper if "(" in paper else paper.rstrip(")")


def _parts(kind: str) -> Iterator[tuple[str, type]]:
    """The names and classes of a kind; of a callback the class that holds its logic, so that
    Lightning need not be imported.
    """
    for name in sorted(lightning_byz.__all__, key=str.lower):
        callback = getattr(callbacks, f"{name}Callback", None)
        if kind == "callbacks" and callback is not None:
            yield name, callback
        elif name in vars(lightning_byz) and KINDS[kind]:
            part = getattr(lightning_byz, name)
            if inspect.isclass(part) and issubclass(part, KINDS[kind]):
                yield name, part


def _name(part: type) -> str:
    return part.__name__.removesuffix("Callback")


def documentation(part: type) -> str:
    """A part's docstring."""
    return inspect.getdoc(part) or ""


def _entry(name: str, part: type) -> Entry:
    summary = " ".join(documentation(part).split("\n\n")[0].split())
    return Entry(name, re.sub(r"\.\s.*", ".", summary), source(part))
