"""Which tests run: one of each kind, the rest, or all.

``pytest`` runs each law over everything in the zoo, but not every combination: of a test with
several parameters it keeps those that try a value which no earlier one has tried. Of those that
take long besides, ``thorough(keep=...)`` says how many are kept, none by default. ``pytest --select rest`` runs what is left out, and
``pytest --select all`` everything.
"""

from __future__ import annotations

import os
from collections import defaultdict

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine takes longer over an example than any deadline allows; `zoo.laws` says the rest.
settings.register_profile("without a deadline", deadline=None, derandomize=True, database=None)
settings.load_profile("without a deadline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--select",
        choices=("quick", "rest", "all"),
        default="quick",
        help="one test of each kind (default), the rest, or all; a test that is named always runs",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    select = config.getoption("--select")
    if select == "all" or any("::" in argument for argument in config.args):
        return
    seen: defaultdict[str, set[tuple[str, object]]] = defaultdict(set)
    kept: defaultdict[str, int] = defaultdict(int)
    chosen: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        chosen[_is_quick(item, seen, kept)].append(item)
    quick = select == "quick"
    config.hook.pytest_deselected(items=chosen[not quick])
    items[:] = chosen[quick]


def _is_quick(
    item: pytest.Item,
    seen: defaultdict[str, set[tuple[str, object]]],
    kept: defaultdict[str, int],
) -> bool:
    """Whether it is the first of its test to try some value of a parameter.

    Args:
        item: the test.
        seen: by function, the values of its parameters that have been tried.
        kept: by function, how many of its tests are quick.
    """
    function = item.nodeid.partition("[")[0]
    thorough = item.get_closest_marker("thorough")
    if thorough is not None and kept[function] >= thorough.kwargs.get("keep", 0):
        return False
    callspec = getattr(item, "callspec", None)
    if callspec is not None and callspec.params:
        values = {(name, id(value)) for name, value in callspec.params.items()}
        if values <= seen[function]:
            return False
        seen[function].update(values)
    kept[function] += 1
    return True
