"""What is wrong with a configuration, in one sentence, from a parser's report of everything that it
tried.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

_TRIED = re.compile(
    r"Parser key \"[\w.]+\":$|Problem with given class_path .*:$|Does not validate "
    r"against|Subtypes: |Errors:|Expected a <class|Expected a collections|Given value|Expected a "
    r"path but|"
    r"Subclass types expect|a class path \(str\)|a dict with|a dict without|Not a valid subclass"
)
"""Lines of a report that tell what the parser tried, not what is wrong."""


def explained(message: str, settings: Sequence[str] = ()) -> str:
    """What a parser has to say about a configuration, with the mistake in front, and the name that
    was probably meant.

    Args:
        message: the parser's report.
        settings: all names that the parser knows, such as ``trainer.max_epochs``.
    """
    summary = _summary(message, settings)
    if summary is None:
        reasons = _reasons(message)
        return "\n".join(reasons) if reasons else message
    detail = [
        line
        for line in message.splitlines()
        if line.strip() and not line.lstrip(" -").startswith("Given value")
    ]
    return f"{summary}\n\nIn detail: " + "\n".join(detail) if len(detail) > 1 else summary


def _reasons(message: str) -> list[str]:
    """The lines of a report that say what is wrong."""
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    return [line for line in dict.fromkeys(lines) if line and not _TRIED.match(line)]


def _summary(message: str, settings: Sequence[str]) -> str | None:
    found: list[tuple[str, str]]
    if found := re.findall(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        module, name = found[-1]
        return _no_class(name, module, {known: f"{module}.{known}" for known in _public(module)})
    if bare := re.findall(r"Expected a dot import path string: ([^\s'\"]+)", message):
        return _no_class(bare[-1], "lightning_byz", _known_classes())
    if bare := re.findall(r"No module named '([\w.]+)'", message):
        wrong = re.findall(r"class_path '([\w.]+)'", message)
        near = _near(wrong[-1].rpartition(".")[2], _known_classes()) if wrong else ""
        return (
            f"there is no module {bare[-1]}, which {wrong[-1] if wrong else 'a class_path'} "
            f"names.{near}"
        )
    if found := re.findall(
        r"given class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", message
    ):
        path, option = found[-1] if "lightning.Callback" not in found[-1][0] else found[0]
        return (
            f"{path} has no argument "
            f"{option!r}.{_near(option, {name: name for name in _arguments(path)})}"
        )
    if bare := re.findall(
        r"does not accept option '([^']+)'|[Uu]nrecognized arguments: --([\w.]+)", message
    ):
        option = "".join(bare[0])
        return f"there is no setting {option}.{_near_setting(option, settings)}"
    if bare := re.findall(r"invalid strategy name: `strategy='([^']*)'`", message):
        return (
            "there is no strategy "
            f"{bare[0]!r}.{_near(bare[0], {name: name for name in _strategies()})}"
        )
    for key in re.findall(r"'(\w+)': ", message):
        if key not in ("class_path", "init_args") and difflib.get_close_matches(
            key, ("class_path", "init_args"), n=1, cutoff=0.85
        ):
            return (
                f"there is a key {key!r} where a class is "
                f"described.{_near(key, {k: k for k in ('class_path', 'init_args')})}"
            )
    if not _reasons(message) and (keys := [*re.finditer(r'Parser key "([\w.]+)"', message)]):
        report = message[keys[-1].end() :]
        types, value = (
            re.findall(r"Expected a <class '(\w+)'>", report),
            re.search(r"Given value: (.*)", report),
        )
        if types and value:
            return (
                f"{keys[-1][1]} should be {' or '.join(types).replace('NoneType', 'null')}. Found "
                f"{value[1]}."
            )
    return None


def _no_class(name: str, module: str, known: dict[str, str]) -> str:
    hint = " `lightning-byz list` names them all." if module == "lightning_byz" else ""
    return f"there is no class {name} in {module}.{_near(name.rpartition('.')[2], known)}{hint}"


def _near(name: str, known: dict[str, str]) -> str:
    """The known name that is most like this one, if any is; ``known``: name -> how to write it."""
    lower = {key.lower(): value for key, value in known.items()}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return f" Did you mean {lower[near[0]]}?" if near else ""


def _near_setting(name: str, settings: Sequence[str]) -> str:
    """Like `_near`, for a dotted name: the first part that is wrong counts, whatever comes behind
    it.
    """
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        known = {".".join(setting.split(".")[:depth]) for setting in settings}
        part = ".".join(parts[:depth])
        if part not in known:
            return _near(
                part, {setting: setting for setting in known if len(setting.split(".")) == depth}
            )
    return ""


def _public(module: str) -> Iterable[str]:
    """The names of a module's public members."""
    members = sys.modules.get(module)
    names: Iterable[str] = getattr(members, "__all__", None) or (
        name for name in dir(members) if not name.startswith("_")
    )
    return [*names]


def _known_classes() -> dict[str, str]:
    """How to write every class that a short name may mean: this package's, and Lightning's
    callbacks and loggers.
    """
    import lightning_byz

    known = {}
    pl = (
        "lightning.pytorch"
        if lightning_byz.which_lightning.HOME == "lightning"
        else "pytorch_lightning"
    )
    for module in (f"{pl}.callbacks", f"{pl}.loggers", "lightning_byz.models", "lightning_byz"):
        members = importlib.import_module(module)
        known.update(
            {
                name: f"{module}.{name}"
                for name in _public(module)
                if inspect.isclass(getattr(members, name, None))
            }
        )
    return known


def _arguments(path: str) -> Iterable[str]:
    module, _, name = path.rpartition(".")
    found: Any = getattr(sys.modules.get(module), name, None)
    try:
        return [*inspect.signature(found).parameters]
    except (TypeError, ValueError):  # written in C, without a signature
        return []


def _strategies() -> Iterable[str]:
    import lightning_byz

    pl = (
        "lightning.pytorch"
        if lightning_byz.which_lightning.HOME == "lightning"
        else "pytorch_lightning"
    )
    names: Iterable[str] = importlib.import_module(
        f"{pl}.strategies"
    ).StrategyRegistry.available_strategies()
    return names
