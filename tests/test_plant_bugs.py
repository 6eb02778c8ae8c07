"""The list of planted bugs fits the source: each has its place, once.
``python tests/plant_bugs.py`` plants them.
"""

import pytest
from plant_bugs import BUGS, ROOT


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "_"))
def test_every_bug_has_its_place(bug):
    assert (ROOT / "lightning_byz" / bug.file).read_text().count(bug.old) == 1
    assert bug.old != bug.new
    assert all((ROOT / "tests" / f"test_{name}.py").exists() for name in bug.tests.split())
