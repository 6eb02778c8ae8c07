"""The documentation: links lead somewhere on a forge too, and code runs. That the site builds
without warnings is a step of its own (make docs).
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_launchers import environment

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
NOTEBOOK = ROOT / "examples" / "byzantine_robustness.ipynb"


def blocks(page, language):
    """The fenced blocks of a page in a language."""
    found = re.findall(
        rf"^( *)```{language}\n(.*?)^ *```",
        (ROOT / page).read_text(),
        flags=re.DOTALL | re.MULTILINE,
    )
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
    for target, anchor in re.findall(r"\]\(([^):\s]*)#([^)\s]+)\)", text):
        headings = re.findall(
            r"^#+ (.*)$", (page.parent / target if target else page).read_text(), flags=re.MULTILINE
        )
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs, f"{page.name} links to {target}#{anchor}, which is not there"


def test_the_first_page_trains(tmp_path):
    (code,) = blocks("docs/index.md", "python")
    code = code.replace(
        "max_epochs=5",
        "max_epochs=1, limit_train_batches=2, logger=False, enable_checkpointing=False",
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"tensor\(0\.\d+\) tensor\(-?[01]\.\d+\)", done.stdout)


def test_the_pages_that_set_up_a_trainer():
    """Their code, as far as the Trainer's constructor; on a CPU, whatever they have."""
    from functools import partial

    from lightning.pytorch import Trainer

    names = {"Trainer": partial(Trainer, accelerator="cpu", logger=False)}
    for page in ("docs/guides/retrofit.md", "README.md"):
        for code in blocks(page, "python"):
            exec(code, names)
    assert type(names["trainer"].strategy).__name__ == "ByzantineRobustStrategy"


def test_the_module_that_splits_its_batches():
    """The page's module, with a stand-in for torch_geometric's Batch."""
    import lightning

    class Batch(list):
        to_data_list = list.copy
        from_data_list = classmethod(lambda kind, graphs: kind(graphs))

    names = {"L": lightning, "Batch": Batch}
    (code,) = blocks("docs/compatibility.md", "python")
    exec(code, names)
    assert names["GraphModule"]().split_batch(Batch("abcde"), 3) == [["a", "d"], ["b", "e"], ["c"]]
    assert names["GraphModule"]().split_batch(Batch("a"), 2) == [["a"], None]


def test_the_diff_is_the_same_everywhere():
    diffs = [
        blocks(page, "diff") for page in ("README.md", "docs/index.md", "docs/guides/retrofit.md")
    ]
    assert diffs[0] == diffs[1] == diffs[2]
    assert len(diffs[0]) == 1


def test_the_contributors_rule_keeps_the_laws():
    from lightning_byz.testing import check_aggregator

    names = {}
    (code,) = blocks("CONTRIBUTING.md", "python")
    exec(code, names)
    check_aggregator(names["NearestToAll"]())


def test_the_navigation_names_every_page():
    """Through its globs, or by name; the site's build says so if a page is missing, and this is the
    quick way to know.
    """
    nav = yaml.safe_load((ROOT / "docs" / ".nav.yml").read_text())["nav"]
    flat = json.dumps(nav)
    for folder in {
        page.parent.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/*/**/*.md")
    }:
        assert f"{folder}/*" in flat


@pytest.mark.thorough
def test_the_notebook_runs(tmp_path):
    cells = [
        cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    assert "epochs = 12" in code
    done = subprocess.run(
        [sys.executable, "-c", code.replace("epochs = 12", "epochs = 1").replace("steps=100", "steps=20")],
        cwd=tmp_path, env={**environment(), "MPLBACKEND": "agg"}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_notebook_was_run():
    cells = [
        cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [output for cell in cells for output in cell["outputs"]]
    assert all("image/png" in output["data"] for output in pictures)
    assert len(pictures) == 6
    assert NOTEBOOK.stat().st_size < 400_000
