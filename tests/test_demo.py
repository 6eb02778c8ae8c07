"""The demo, from the command line: averaging breaks down under attack, byzantine_robust does not.
And an example of the documentation.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lightning_byz.attacks import Attack, Scene
from lightning_byz.demo import quickstart
from lightning_byz.demo.scoreboard import Scoreboard

EXAMPLE = Path(__file__).parents[1] / "examples" / "quickstart.py"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A shorter demo: what it printed, and its picture."""
    folder = tmp_path_factory.mktemp("demo")
    command = [
        sys.executable,
        "-m",
        "lightning_byz.cli",
        "demo",
        "--epochs",
        "6",
        "--output",
        "pictures/demo.png",
    ]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    return done, folder / "pictures" / "demo.png"


@pytest.mark.thorough
def test_averaging_breaks_down_and_byzantine_robust_does_not(demo):
    done, _ = demo
    table = done.stdout[done.stdout.index("lost, in points") :]
    accuracy = {
        name: float(value) for name, value in re.findall(r"│ (\w.*?) +│ +([\d.]+)% │", table)
    }
    assert len(accuracy) == 3
    clean = accuracy["averaging, all 10 honest"]
    assert clean > 85
    assert clean - accuracy["averaging, 3 of 10 lie"] >= 30
    assert clean - accuracy["byzantine_robust, 3 of 10 lie"] <= 6


def test_it_writes_a_picture_and_says_where(demo):
    done, picture = demo
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture.resolve()) in done.stdout


def test_it_keeps_the_screen_clean(demo):
    done, _ = demo
    assert done.stderr == ""


def test_the_example_is_the_demo():
    assert EXAMPLE.read_text() == Path(quickstart.__file__).read_text()


def test_a_full_board_says_so():
    with (
        Scoreboard(["only"], epochs=0) as board,
        pytest.raises(RuntimeError, match="1 runs of 0 epochs"),
    ):
        board.record(None, None)


def test_the_attack_in_the_documentation_works():
    text = (Path(__file__).parents[1] / "docs" / "attacks.md").read_text()
    source = text.split("```python")[1].split("```")[0]
    names = {"dataclass": dataclass, "Attack": Attack, "Scene": Scene}
    exec(source, names)
    scene, honest = Scene(), torch.arange(6.0).view(3, 2)
    assert names["Echo"]()(honest, honest[:1], scene).tolist() == [[2.0, 3.0]]
    assert names["Echo"]()(-honest, honest[:1], scene).tolist() == [[2.0, 3.0]]
    assert names["Echo"]()(honest, honest[:2], scene).tolist() == [[-2.0, -3.0]] * 2
