"""Grid files: which cells a grid has, and the configuration of the Lightning run that each of them
is.
"""

from __future__ import annotations

import ast
import copy
import difflib
import hashlib
import inspect
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import lightning_byz
from lightning_byz.aggregators import Aggregator, PreAggregator
from lightning_byz.algorithms import Algorithm
from lightning_byz.attacks import Attack, DataAttack
from lightning_byz.data import Partition


class GridError(ValueError):
    """A grid file that no grid can be made of; the message says what is wrong."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid: a value of each axis, as the grid file writes it; ``none`` stands for
    nothing.
    """

    algorithm: str
    pre_aggregation: str
    rule: str
    attack: str
    f: int
    heterogeneity: str
    seed: int

    @property
    def aggregation(self) -> str:
        """The rule with what comes before it."""
        return (
            self.rule if self.pre_aggregation == "none" else f"{self.pre_aggregation} + {self.rule}"
        )

    @property
    def label(self) -> str:
        """All of it, for people."""
        parts = [
            self.algorithm,
            self.aggregation,
            self.attack,
            f"f={self.f}",
            self.heterogeneity,
            f"seed {self.seed}",
        ]
        return " | ".join(part for part in parts if part != "as in run")


CELL_FIELDS = tuple(field.name for field in fields(Cell))


class _Axis(NamedTuple):
    """An axis of a grid.

    Attributes:
        cell_field: the field of `Cell` that it sets.
        kinds: what its parts are instances of; empty for integers.
        default: its values where the file does not name it.
    """

    cell_field: str
    kinds: tuple[type, ...]
    default: tuple[Any, ...]


_AS_IN_RUN = "as in run"
AXES = {
    "algorithms": _Axis("algorithm", (Algorithm,), (_AS_IN_RUN,)),
    "rules": _Axis("rule", (Aggregator,), ()),
    "pre_aggregations": _Axis("pre_aggregation", (PreAggregator,), ("none",)),
    "attacks": _Axis("attack", (Attack, DataAttack), ()),
    "f": _Axis("f", (), ()),
    "heterogeneity": _Axis("heterogeneity", (Partition,), (_AS_IN_RUN,)),
    "seeds": _Axis("seed", (), (0,)),
}
"""The axes of a grid, by their key in a grid file."""

_LAUNCHERS = {
    "slurm": "{partition: gpu, time: 60, cpus_per_task: 4}",
    "ray": "{num_cpus: 2, num_gpus: 1}",
}
"""Launchers that are told, under this key in a grid file, what a cell needs; an example."""


def part(text: str) -> dict[str, Any]:
    """The ``class_path`` and ``init_args`` of what is written like a call in Python:
    ``MultiKrum(m=5)``, ``mine.Rule(inner=Krum())``.

    Args:
        text: a class, with named arguments if any: numbers, strings, lists, None, True, False, or
            classes again. Classes of this package need no module in front.

    Raises:
        GridError: if it is written otherwise.
    """
    try:
        made = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError) as error:
        raise GridError(
            f"{text!r} should be written like Krum or MultiKrum(m=5), with named arguments. "
            f"Found: {error}."
        ) from None
    if not isinstance(made, dict):
        raise GridError(f"{text!r} should name a class, like Krum or MultiKrum(m=5).")
    return made


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise ValueError(f"an argument without a name in {ast.unparse(node)}")
        if not isinstance(node.func, (ast.Name, ast.Attribute)):
            raise ValueError(f"a call of {ast.unparse(node.func)}, which is no class")
        made = _value(node.func)
        made["init_args"] = {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
        return made
    if isinstance(node, (ast.Name, ast.Attribute)):
        name = ast.unparse(node)
        return {"class_path": f"lightning_byz.{name}" if hasattr(lightning_byz, name) else name}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(element) for element in node.elts]
    return ast.literal_eval(node)


def _checked(key: str, text: Any) -> str:
    """A value of an axis of classes, as text. Raises unless it is one of the axis' kind, as far as
    that can be known from here.
    """
    if not isinstance(text, str):
        raise GridError(
            f"`{key}` should be a list of names, such as Krum or MultiKrum(m=5). Found {text!r} "
            "in it."
        )
    if text in ("none", _AS_IN_RUN):
        return text
    name, kinds = part(text)["class_path"], AXES[key].kinds
    if "." in name and not name.startswith("lightning_byz."):
        return text  # somebody's own
    known = {
        n: c
        for n in lightning_byz.__all__
        if inspect.isclass(c := getattr(lightning_byz, n)) and issubclass(c, kinds)
    }
    if name.removeprefix("lightning_byz.") not in known:
        near = difflib.get_close_matches(name.removeprefix("lightning_byz."), known, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise GridError(
            f"`{key}` has no {name.removeprefix('lightning_byz.')}.{meant} Known: "
            f"{', '.join(known)}; others by their module."
        )
    return text


@dataclass(frozen=True)
class Grid:
    """What a grid file says.

    Attributes:
        name: of the file, without its ending.
        axes: key of `AXES` -> values.
        run: the configuration that all runs share, as for ``lightning-byz fit``.
        metric: what is compared: a metric that the model logs in validation, larger is better.
        output: where results go.
        launchers: launcher -> what it is told of the room that a cell needs.
    """

    name: str
    axes: Mapping[str, Sequence[Any]]
    run: Mapping[str, Any]
    metric: str
    output: Path
    launchers: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Grid:
        """Reads a grid file.

        Raises:
            GridError: if it is not one; the message says what is wrong, and what was probably
                meant.
        """
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise GridError(f"{path} should be a grid file. {error}") from None
        known = {*AXES, *_LAUNCHERS, "run", "metric", "output"}
        if not isinstance(content, dict) or not isinstance(content.get("run"), dict):
            raise GridError(
                f"{path} should have a key `run`, the configuration that all cells share, as for "
                "lightning-byz fit."
            )
        for key in content:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                raise GridError(
                    f"{path} has a key {key!r}.{f' Did you mean {near[0]}?' if near else ''} "
                    f"Known: {', '.join(sorted(known))}."
                )
        axes = {key: content.get(key, axis.default) for key, axis in AXES.items()}
        for key, values in axes.items():
            if not isinstance(values, (list, tuple)) or not values:
                raise GridError(
                    f"`{key}` should be a list of at least one value. Found {values!r} in {path}."
                )
            if AXES[key].kinds:
                axes[key] = [_checked(key, text) for text in values]
            elif not all(
                isinstance(value, int) and not isinstance(value, bool) and value >= 0
                for value in values
            ):
                raise GridError(
                    f"`{key}` should be a list of integers of at least 0. Found {values!r} in "
                    f"{path}."
                )
        launchers = {name: content.get(name) or {} for name in _LAUNCHERS}
        for name, options in launchers.items():
            if not isinstance(options, dict):
                raise GridError(
                    f"`{name}` should be a mapping, such as {_LAUNCHERS[name]}. Found {options!r} "
                    f"in {path}."
                )
        grid = cls(
            path.stem,
            axes,
            content["run"],
            content.get("metric", "accuracy"),
            Path(content.get("output", f"outputs/grids/{path.stem}")),
            launchers,
        )
        grid._check_run(path)
        return grid

    def _check_run(self, path: Path) -> None:
        strategy = self.run.get("trainer", {}).get("strategy")
        if not isinstance(strategy, dict) or "init_args" not in strategy:
            raise GridError(
                f"`run` in {path} should have a trainer.strategy with class_path and init_args: "
                "it says how many workers there are."
            )
        if _AS_IN_RUN in self.axes["algorithms"] and not isinstance(
            strategy["init_args"].get("algorithm"), dict
        ):
            raise GridError(
                f"{path} should say which algorithm: by an axis `algorithms`, or in "
                "run.trainer.strategy.init_args.algorithm."
            )
        if any("ByzantineWorkers" in str(callback) for callback in self._callbacks()):
            raise GridError(
                f"`run` in {path} should have no ByzantineWorkers: the axes `attacks` and `f` say "
                "who lies."
            )

    def _callbacks(self) -> list[Any]:
        callbacks = self.run["trainer"].get("callbacks") or []
        return callbacks if isinstance(callbacks, list) else [callbacks]

    def cells(self) -> list[Cell]:
        """All cells, with the first seed first, so that an interrupted grid has something of
        everything.
        """
        order = (
            "seeds",
            "f",
            "heterogeneity",
            "algorithms",
            "pre_aggregations",
            "rules",
            "attacks",
        )
        found: dict[Cell, None] = {}
        for values in itertools.product(*(self.axes[key] for key in order)):
            named = {AXES[key].cell_field: value for key, value in zip(order, values, strict=True)}
            if _is_mean(named["rule"]):
                # it tolerates nobody, so it is what others are compared with, alone
                named["pre_aggregation"] = "none"
            found[Cell(**named)] = None
        return [*found]

    def config(self, cell: Cell) -> dict[str, Any]:
        """The configuration of a cell's run, as for ``lightning-byz fit``."""
        config = copy.deepcopy(dict(self.run))
        trainer = config["trainer"]
        config["seed_everything"] = cell.seed
        strategy = trainer["strategy"]["init_args"]
        strategy["num_byzantine"] = cell.f
        if cell.algorithm != _AS_IN_RUN:
            strategy["algorithm"] = part(cell.algorithm)
        rule = part(cell.rule)
        if cell.pre_aggregation != "none":
            chain = {"pre": [part(cell.pre_aggregation)], "rule": rule}
            rule = {"class_path": "lightning_byz.Chain", "init_args": chain}
        strategy["algorithm"].setdefault("init_args", {})["aggregator"] = rule
        if cell.heterogeneity != _AS_IN_RUN:
            config.setdefault("data", {}).setdefault("init_args", {})["partition"] = (
                None if cell.heterogeneity == "none" else part(cell.heterogeneity)
            )
        trainer["callbacks"] = self._callbacks()
        if cell.attack != "none" and cell.f:
            lies = {
                "attack": part(cell.attack),
                "count": cell.f,
                "every_n_steps": trainer.get("log_every_n_steps", 50),
            }
            trainer["callbacks"] = [
                *trainer["callbacks"],
                {"class_path": "lightning_byz.ByzantineWorkers", "init_args": lies},
            ]
        for setting, value in _DEFAULTS.items():
            trainer.setdefault(setting, value)
        return config

    def identity(self, cell: Cell) -> str:
        """A short name of a cell's run, which changes with anything in its configuration."""
        text = json.dumps([self.config(cell), self.metric], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


_DEFAULTS = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
"""Of the Trainer, where the grid file does not say otherwise."""


def _is_mean(rule: str) -> bool:
    return rule.partition("(")[0].strip() in ("Mean", "lightning_byz.Mean")
