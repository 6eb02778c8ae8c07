"""Every example runs, and says what it should."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(("name", "says"), [("custom_rule", "of held-out digits")])
def test_an_example_runs(name, says, tmp_path):
    source = (EXAMPLES / f"{name}.py").read_text().replace("epochs: int = 5", "epochs: int = 1")
    (tmp_path / "example.py").write_text(source)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"quickstart", "custom_rule"}


def test_the_page_on_custom_rules_is_right():
    from dataclasses import dataclass

    from lightning_byz.aggregators import Aksel, WeightedAggregator
    from lightning_byz.aggregators.base import equal_weights
    from lightning_byz.order_statistics import median_of_rows
    from lightning_byz.testing import check_aggregator

    page = (Path(__file__).parents[1] / "docs" / "custom-rule.md").read_text()
    code = page[page.index("```python\n@dataclass") + 10 : page.index("```\n\n`Rows`")]
    names = {
        "dataclass": dataclass,
        "WeightedAggregator": WeightedAggregator,
        "equal_weights": equal_weights,
        "median_of_rows": median_of_rows,
    }
    exec(code, names)
    check_aggregator(names["NearestToMedian"]())
    check_aggregator(Aksel())
