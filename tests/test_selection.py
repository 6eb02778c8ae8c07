"""Which tests are quick: each value of each parameter once, and no more than a mark says."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import _is_quick


def item(function: str, marker: Any = None, **params: Any) -> Any:
    """A test of a function, with its parameters."""
    return SimpleNamespace(
        nodeid=f"tests/a.py::{function}[{params}]",
        callspec=SimpleNamespace(params=params),
        get_closest_marker=lambda name: marker,
    )


def quick(items: list[Any]) -> list[bool]:
    """Of each test, whether it is quick."""
    seen: Any = defaultdict(set)
    kept: Any = defaultdict(int)
    return [_is_quick(each, seen, kept) for each in items]


def test_each_value_is_tried_once_and_not_each_combination() -> None:
    rules, attacks = ("krum", "median", "mean"), ("alie", "ipm")
    items = [item("f", rule=rule, attack=attack) for rule in rules for attack in attacks]
    assert quick(items) == [True, True, True, False, True, False]
    assert quick([item(f"f{i}", rule="krum") for i in range(3)]) == [True] * 3


@pytest.mark.parametrize("keep", [0, 2])
def test_of_what_takes_long_so_many_are_kept(keep: int) -> None:
    marker = SimpleNamespace(kwargs={"keep": keep} if keep else {})
    items = [item("f", marker, rule=str(i)) for i in range(5)]
    assert quick(items) == [i < keep for i in range(5)]


def test_a_test_without_parameters_is_quick() -> None:
    plain = SimpleNamespace(nodeid="tests/a.py::f", get_closest_marker=lambda name: None)
    assert quick([plain, plain]) == [True, True]
