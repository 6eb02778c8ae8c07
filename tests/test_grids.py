"""Grids of runs: what a file means, that cells are run once, apart from each other, and that tables
and reports say what happened.
"""

import csv
import functools
import itertools
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lightning_byz import cli
from lightning_byz.cli import grid_cells
from lightning_byz.cli.grid_file import Cell, Grid, GridError, part
from lightning_byz.cli.grids import kept

GRIDS = Path(__file__).parents[1] / "configs" / "grids"

RUN = """
  model:
    class_path: lightning_byz.Classifier
    init_args:
      lr: 0.2
      net:
        class_path: lightning_byz.models.LogisticRegression
        init_args: {features: 64, classes: 10}
  data:
    class_path: lightning_byz.DigitsDataModule
    init_args: {batch_size: 4}
  trainer:
    accelerator: cpu
    max_steps: 6
    val_check_interval: 3
    check_val_every_n_epoch: null
    strategy:
      class_path: lightning_byz.ByzantineRobustStrategy
      init_args:
        workers_per_process: 7
        algorithm: {class_path: lightning_byz.RobustSGD}
"""


def grid_file(folder, name="small", **axes):
    content = {
        "rules": ["Mean", "CoordinateMedian"],
        "attacks": ["none", "SignFlip(scale=10.0)"],
        "f": [2],
        **axes,
    }
    content = {key: value for key, value in content.items() if value is not None}
    content.setdefault("run", yaml.safe_load(RUN))
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def rows(path):
    with path.open() as file:
        return [*csv.DictReader(file)]


# -- what a file means -----------------------------------------------------------------------------


def test_parts_are_written_like_calls():
    assert part("Krum") == {"class_path": "lightning_byz.Krum"}
    assert part("mine.rules.Rule(k=-3, names=['a', None], inner=TopK(ratio=0.5))") == {
        "class_path": "mine.rules.Rule",
        "init_args": {
            "k": -3,
            "names": ["a", None],
            "inner": {"class_path": "lightning_byz.TopK", "init_args": {"ratio": 0.5}},
        },
    }
    for wrong in (
        "Krum(",
        "MultiKrum(5)",
        "3",
        "Krum(m=f())(x=1)",
        "Krum(m=[x for x in y])",
        "Krum(**a)",
    ):
        with pytest.raises(GridError):
            part(wrong)


def test_cells_are_the_product_and_the_baseline_runs_alone(tmp_path):
    grid = Grid.read(
        grid_file(
            tmp_path,
            pre_aggregations=["none", "NNM"],
            heterogeneity=["IID", "Dirichlet(alpha=0.5)"],
            seeds=[0, 1],
        )
    )
    cells = grid.cells()
    assert (
        len(cells) == len(set(cells)) == 2 * 2 * (2 + 2 * 2)
    )  # seeds, partitions; attacks on Mean, and on the other rule's two forms
    assert {cell.pre_aggregation for cell in cells if cell.rule == "Mean"} == {"none"}
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    cell = Cell(
        "as in run", "NNM", "CoordinateMedian", "SignFlip(scale=10.0)", 2, "Dirichlet(alpha=0.5)", 1
    )
    assert cell in cells
    config = grid.config(cell)
    strategy, (lies,) = config["trainer"]["strategy"]["init_args"], config["trainer"]["callbacks"]
    assert strategy["algorithm"]["init_args"]["aggregator"] == {
        "class_path": "lightning_byz.Chain",
        "init_args": {
            "pre": [{"class_path": "lightning_byz.NNM"}],
            "rule": {"class_path": "lightning_byz.CoordinateMedian"},
        },
    }
    assert (strategy["num_byzantine"], lies["init_args"]["count"], config["seed_everything"]) == (
        2,
        2,
        1,
    )
    assert config["data"]["init_args"] == {
        "batch_size": 4,
        "partition": {"class_path": "lightning_byz.Dirichlet", "init_args": {"alpha": 0.5}},
    }
    assert len({grid.identity(cell) for cell in cells}) == len(cells)
    baseline = grid.config(next(cell for cell in cells if cell.rule == "Mean"))
    # of which it tolerates none, and trains all the same
    assert baseline["trainer"]["strategy"]["init_args"]["num_byzantine"] == 2
    assert baseline["trainer"]["callbacks"] == []  # attack: none


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": ["Krumm"]}, "`rules` has no Krumm. Did you mean Krum?"),
        ({"rules": ["ALIE"]}, "`rules` has no ALIE."),
        ({"attacks": ["Krum"]}, "`attacks` has no Krum."),
        ({"pre_aggregations": ["NMM"]}, "Did you mean NNM?"),
        ({"rules": "Krum"}, "`rules` should be a list of at least one value. Found 'Krum'"),
        ({"attacks": []}, "`attacks` should be a list of at least one value"),
        ({"f": [-1]}, "`f` should be a list of integers of at least 0"),
        ({"sedes": [1]}, "has a key 'sedes'. Did you mean seeds?"),
        ({"slurm": "gpu"}, "`slurm` should be a mapping, such as {partition: gpu"),
        ({"run": None}, "should have a key `run`"),
        (
            {"run": {"trainer": {"strategy": "byzantine_robust"}}},
            "it says how many workers there are",
        ),
        (
            {"run": {"trainer": {"strategy": {"class_path": "x", "init_args": {}}}}},
            "should say which algorithm",
        ),
    ],
)
def test_a_mistake_in_a_grid_file_is_named(tmp_path, capsys, change, message):
    path = grid_file(tmp_path, **change)
    if "run" in change:
        content = yaml.safe_load(path.read_text())
        content["run"] = change["run"]
        path.write_text(yaml.safe_dump(content))
    assert cli.main(["grid", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert cli.main(["grid", str(tmp_path / "nothing.yaml")]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": ["Krum", "MultiKrum(mm=5)"]}, "has no argument 'mm'. Did you mean m?"),
        ({"attacks": ["none", "ALIE(zz=1.5)"]}, "has no argument 'zz'"),
        ({"algorithms": ["RobustSGD(worker_momentun=0.9)"]}, "Did you mean worker_momentum?"),
        ({"heterogeneity": ["Dirichlet(alfa=0.1)"]}, "'alfa'"),
        ({"trainer": {"max_stepz": 3}}, "max_stepz"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_a_mistake_in_an_argument_is_named_once_before_the_first_cell(
    tmp_path, capsys, change, message, dry
):
    path = grid_file(
        tmp_path, seeds=[0, 1], **{key: value for key, value in change.items() if key != "trainer"}
    )
    content = yaml.safe_load(path.read_text())
    content["run"]["trainer"] |= change.get("trainer", {})
    path.write_text(yaml.safe_dump(content))
    output = tmp_path / "out"
    assert (
        cli.main(["grid", str(path), "--output", str(output), *(["--dry-run"] if dry else [])]) == 2
    )
    said = capsys.readouterr().err
    assert message in said
    assert said.count("the cell ") == 1
    assert not output.exists()


def test_a_dry_run_lists_the_cells_and_runs_none(tmp_path, capsys):
    path, output = grid_file(tmp_path), tmp_path / "out"
    grid = Grid.read(path)
    names = [grid.identity(cell) for cell in grid.cells()]
    output.mkdir()
    (output / "results.jsonl").write_text(f'["{names[1]}", {{"status": "diverged"}}]\n')
    assert cli.main(["grid", str(path), "--output", str(output), "--dry-run"]) == 0
    *listed, total = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == names
    assert ["diverged" in line for line in listed] == [False, True, False, False]
    assert all(cell.label in line for cell, line in zip(grid.cells(), listed, strict=True))
    assert total == "small: 4 cells, 1 of them known."
    assert [file.name for file in output.iterdir()] == ["results.jsonl"]


MINE = """
from lightning_byz import Krum

class MyRule(Krum):
    pass
"""


@pytest.mark.thorough
@pytest.mark.processes
def test_a_cell_that_was_cut_short_is_run_again_with_a_logger_and_a_rule_of_this_folder(
    tmp_path, monkeypatch
):
    (tmp_path / "rule_of_this_folder.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    run = yaml.safe_load(RUN)
    run["trainer"]["logger"] = {"class_path": "CSVLogger"}
    path = grid_file(tmp_path, rules=["rule_of_this_folder.MyRule()"], attacks=["none"], run=run)
    grid = Grid.read(path)
    (cell,) = grid.cells()
    folder = tmp_path / "out" / "cells" / grid.identity(cell)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("of a run that was cut short")
    (folder / "metrics.csv").write_text("step,old\n1,2\n")
    assert cli.main(["grid", str(path), "--jobs", "1", "--output", str(tmp_path / "out")]) == 0
    (row,) = rows(tmp_path / "out" / "results.csv")
    assert row["status"] == "finished"
    assert "old" not in (folder / "metrics.csv").read_text()
    assert "rule_of_this_folder.MyRule" in (folder / "config.yaml").read_text()


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_grids_in_the_repository_are_valid(path):
    grid = Grid.read(path)
    assert len(grid.axes["rules"]) >= 6
    assert len(grid.axes["attacks"]) >= 6
    cells = grid.cells()
    assert all(grid.config(cell) for cell in cells)


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A grid of four good cells and one that cannot run, with its folder and exit status."""
    folder = tmp_path_factory.mktemp("grid")
    run = yaml.safe_load(RUN)
    run["trainer"]["logger"] = {"class_path": "CSVLogger"}
    path = grid_file(
        folder,
        rules=["Mean", "CoordinateMedian", "Bulyan"],
        attacks=["none", "Gaussian(std=1e+30)"],
        run=run,
    )
    status = cli.main(["grid", str(path), "--jobs", "2", "--output", str(folder / "out")])
    return path, folder / "out", status


@pytest.mark.thorough
@pytest.mark.processes
def test_every_cell_is_in_the_table_and_one_that_fails_says_why(finished):
    _, output, status = finished
    assert status == 1  # Bulyan needs n >= 4f + 3 = 11
    table = {(row["rule"], row["attack"]): row for row in rows(output / "results.csv")}
    assert len(table) == 6
    failed = [row for row in table.values() if row["status"] == "failed"]
    assert [row["rule"] for row in failed] == ["Bulyan"] * 2
    assert all(
        "Bulyan tolerates at most f=1" in row["reason"] or "n=7" in row["reason"] for row in failed
    )
    assert "Traceback" in (output / "log.txt").read_text()
    diverged = table["Mean", "Gaussian(std=1e+30)"]
    assert diverged["status"] in ("diverged", "finished")
    assert float(diverged["accuracy"]) < 0.2
    good = table["CoordinateMedian", "Gaussian(std=1e+30)"]
    assert (good["status"], good["step"]) == ("finished", "6")
    assert float(good["accuracy"]) > 0.2
    assert float(good["bytes_up"]) == 6 * 4 * 650  # steps, bytes of a number, parameters
    curves = rows(output / "curves.csv")
    assert [point["step"] for point in curves if point["cell"] == good["cell"]] == ["3", "6"]


@pytest.mark.processes
def test_tables_are_written_as_parquet_too(finished):
    parquet = pytest.importorskip("pyarrow.parquet")
    _, output, _ = finished
    for name in ("results", "curves"):
        table = parquet.read_table(output / f"{name}.parquet")
        assert table.num_rows == len(rows(output / f"{name}.csv"))
    assert "accuracy" in table.column_names


@pytest.mark.processes
def test_each_cell_is_an_ordinary_run_with_a_logger_of_its_own(finished):
    path, output, _ = finished
    grid = Grid.read(path)
    cell = next(
        cell for cell in grid.cells() if cell.rule == "CoordinateMedian" and cell.attack != "none"
    )
    folder = output / "cells" / grid.identity(cell)
    assert "accuracy" in (folder / "metrics.csv").read_text().splitlines()[0]
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert (
        saved["trainer"]["callbacks"][0]["init_args"]["attack"]["class_path"]
        == "lightning_byz.Gaussian"
    )


@pytest.mark.processes
def test_a_finished_cell_is_not_run_again_and_a_failed_one_is(finished, capsys):
    path, output, _ = finished
    before = [*kept(output / "results.jsonl")]
    with (output / "results.jsonl").open("a") as file:
        file.write('["cut short", {"sta')  # as a run that was killed leaves it
    content = yaml.safe_load(path.read_text())
    content["rules"] = ["Mean", "CoordinateMedian"]
    path.write_text(yaml.safe_dump(content))
    assert cli.main(["grid", str(path), "--jobs", "1", "--output", str(output)]) == 0
    assert "4 cells, 4 of them known" in capsys.readouterr().out
    assert [*kept(output / "results.jsonl")] == before
    assert len(rows(output / "results.csv")) == 4
    content["run"]["model"]["init_args"]["lr"] = 0.1  # another run
    path.write_text(yaml.safe_dump(content))
    grid = Grid.read(path)
    assert not {grid.identity(cell) for cell in grid.cells()} & {name for name, _ in before}


# as a grid's own processes do
@pytest.mark.filterwarnings("ignore:byzantine_robust. Mean tolerates no Byzantine worker")
def test_a_cell_depends_on_nothing_that_ran_before_it(tmp_path):
    grid = Grid.read(grid_file(tmp_path))
    mean, _, median, _ = grid.cells()
    first, *_, again = (
        grid_cells.run(grid.config(cell), grid.metric)["curve"] for cell in (median, mean, median)
    )
    assert first == again
    wrong = grid_cells.run(grid.config(mean), "acuracy")
    assert wrong["status"] == "failed"
    assert "should be one that validation logs. Found 'acuracy'; logged are" in wrong["reason"]


DIES = """
import os
from dataclasses import dataclass
from lightning_byz.aggregators import Aggregator

@dataclass(frozen=True)
class Dies(Aggregator):
    def aggregate(self, rows):
        os._exit(9)
"""


@pytest.mark.thorough
@pytest.mark.processes
def test_a_process_that_dies_takes_no_other_cell_with_it(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text(DIES)
    monkeypatch.syspath_prepend(tmp_path)
    path = grid_file(tmp_path, rules=["deadly.Dies()", "CoordinateMedian"], attacks=["none"])
    assert cli.main(["grid", str(path), "--jobs", "1", "--output", str(tmp_path / "out")]) == 1
    died, lived = rows(tmp_path / "out" / "results.csv")
    assert (died["status"], lived["status"]) == ("failed", "finished")
    assert "its process died" in died["reason"]
    assert died["accuracy"] == ""


@pytest.mark.thorough
@pytest.mark.processes
def test_an_interrupted_grid_keeps_what_is_done(tmp_path):
    path, output = grid_file(tmp_path, seeds=[*range(500)]), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "lightning_byz.cli",
        "grid",
        str(path),
        "--jobs",
        "2",
        "--output",
        str(output),
    ]
    heeds = functools.partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # whoever starts the tests in the background has it ignored
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, preexec_fn=heeds
    )
    memory = output / "results.jsonl"
    while process.poll() is None and not (memory.exists() and memory.read_text().count("\n") >= 2):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 130, said
    assert said.endswith("Interrupted. The same command goes on from here.\n")
    done = rows(output / "results.csv")
    assert 2 <= len(done) < 2000
    assert len(done) == len([*kept(memory)])
    assert {row["status"] for row in done} == {"finished"}


# -- reports ---------------------------------------------------------------------------------------


def write_csv(path, lines):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for line in lines for name in line))
        writer.writeheader()
        writer.writerows(lines)


def invented_grid(
    folder, seeds=(0, 1), rules=("Mean", "Krum"), attacks=("none", "ALIE(z=1.5)"), fs=(2, 3)
):
    """The tables of a grid that nobody ran."""
    lines, points = [], []
    for i, (f, rule, pre, attack, seed) in enumerate(
        itertools.product(fs, rules, ("none", "NNM"), attacks, seeds)
    ):
        if rule == "Mean" and pre != "none":
            continue
        good = 0.9 if rule != "Mean" or attack == "none" else 0.1 * f
        cell = {
            "algorithm": "as in run",
            "pre_aggregation": pre,
            "rule": rule,
            "attack": attack,
            "f": f,
        }
        cell |= {"heterogeneity": "IID", "seed": seed}
        curve = [
            {
                **cell,
                "step": s,
                "bytes_up": 4e5 * s,
                "accuracy": good * s / 30 + 0.01 * seed,
                "cell": i,
            }
            for s in (10, 20, 30)
        ]
        curve = [
            {**point, "bytes_down": 1, "simulated_seconds": point["step"] * 1.5} for point in curve
        ]
        points += curve
        lines.append(
            {**curve[-1], "status": "finished", "wall_seconds": 1, "reason": "", "cell": i}
        )
    lines[-1] |= {"status": "failed", "reason": "ValueError: <Krum> & co", "accuracy": ""}
    lines[-2] |= {"status": "diverged", "reason": "nan"}
    folder.mkdir()
    write_csv(folder / "results.csv", lines)
    write_csv(folder / "curves.csv", points)


def pictures(page):
    text = page.read_text()
    for outside in ("http:", "https:", 'src="/', "<script", "<link"):
        assert outside not in text, outside
    names = re.findall(r'<figure id="([^"]+)">', text)
    for name in names:
        assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (page.parent / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert text.count("data:image/png;base64,") == len(names)
    return names, text


def test_the_report_of_a_grid(tmp_path, capsys):
    invented_grid(tmp_path / "grid")
    assert cli.main(["report", str(tmp_path / "grid")]) == 0
    assert "index.html" in capsys.readouterr().out
    names, text = pictures(tmp_path / "grid" / "report" / "index.html")
    assert names[0] == "worst"
    assert {
        "heatmap-f-2",
        "curves-f-2",
        "curves-f-3-nnm",
        "accuracy-bytes-up-f-2",
        "accuracy-simulated-seconds-f-3",
    } <= set(names)
    assert "ValueError: &lt;Krum&gt; &amp; co" in text
    for f in ("2", "3"):
        assert f'<details id="table-f-{f}">' in text
        table = latex_table((tmp_path / "grid" / "report" / f"table-f-{f}.tex").read_text())
        assert set(table) == {"Mean", "Krum", "NNM + Krum"}
    assert "failed" in table["NNM + Krum"]["worst"]
    assert "NNM + Krum | ALIE(z=1.5) | f=3 | IID | seed 1: failed" in text


def test_the_report_of_a_grid_shows_suspicion_where_cells_logged_it(tmp_path):
    folder = tmp_path / "grid"
    invented_grid(folder)
    with (folder / "results.csv").open(newline="") as file:
        empty, row = [row for row in csv.DictReader(file) if row["attack"] != "none"][:2]
    for cell in (empty, row):
        (folder / "cells" / cell["cell"]).mkdir(parents=True)
    (folder / "cells" / empty["cell"] / "metrics.csv").write_text("step,epoch\n")
    logs = folder / "cells" / row["cell"]
    lines = [
        {"step": step, "epoch": 0, **{f"byz/suspicion/worker_{i}": float(i == 3) for i in range(5)}}
        for step in range(3)
    ]
    write_csv(logs / "metrics.csv", lines)
    assert cli.main(["report", str(folder)]) == 0
    names, text = pictures(folder / "report" / "index.html")
    assert len([name for name in names if name.startswith("suspicion-")]) == 1
    assert "Accused at some time: workers 3." in text


def test_the_worst_case_is_the_lowest_mean_over_seeds(tmp_path):
    from lightning_byz.cli import reports

    invented_grid(tmp_path / "grid", fs=(2,))
    page = reports._Page("")
    table = reports._read(tmp_path / "grid" / "results.csv")
    for row in table:
        row["aggregation"] = reports._aggregation(row)
    worst = reports._draw_setting(page, table, [], "accuracy", True, "")
    # of NNM + Krum, one seed has failed
    assert worst == pytest.approx({"Mean": 0.205, "Krum": 0.905})


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("unknown", ["failed", "not run"])
def test_a_rule_that_failed_under_an_attack_has_no_worst_case(tmp_path, monkeypatch, unknown):
    from lightning_byz.cli import report_figures, reports

    invented_grid(tmp_path / "grid", seeds=(0,))
    lines = rows(tmp_path / "grid" / "results.csv")
    chosen = [
        row
        for row in lines
        if (row["rule"], row["attack"], row["f"]) == ("Mean", "ALIE(z=1.5)", "2")
    ]
    assert len(chosen) == 1
    for row in lines:
        row |= {"status": "finished", "accuracy": row["accuracy"] or "0.5"}
    if unknown == "failed":
        chosen[0] |= {"status": "failed", "accuracy": ""}
    else:
        lines.remove(chosen[0])
    write_csv(tmp_path / "grid" / "results.csv", lines)
    drawn, heatmap = {}, report_figures.heatmap

    def draws(values, names, columns, notes, title, percent):
        drawn[title] = {
            name: (values[i, -1], notes.get((i, len(columns) - 1), ""))
            for i, name in enumerate(names)
        }
        return heatmap(values, names, columns, notes, title, percent)

    monkeypatch.setattr(report_figures, "heatmap", draws)
    reports.write_report(tmp_path / "grid")
    of_setting, overall = (
        drawn["Accuracy at the end, f = 2, in percent"],
        drawn["Worst accuracy over all attacks"],
    )
    assert of_setting["Mean"] == (
        pytest.approx(float("nan"), nan_ok=True),
        "failed" if unknown == "failed" else "?",
    )
    assert overall["Mean"] == (pytest.approx(float("nan"), nan_ok=True), "no result")
    for name in ("Krum", "NNM + Krum"):
        assert of_setting[name] == (pytest.approx(0.9), "")
        assert overall[name][0] == pytest.approx(0.5 if name == "NNM + Krum" else 0.9)


def test_the_spread_over_seeds_is_the_standard_deviation(tmp_path, monkeypatch):
    """In the pictures' cells, in bands, and in LaTeX, against Python's own `statistics`."""
    from lightning_byz.cli import report_figures, reports

    invented_grid(tmp_path / "grid", seeds=(0, 1, 5), fs=(2,))
    lines = rows(tmp_path / "grid" / "results.csv")
    for line in lines:
        line |= {"status": "finished", "accuracy": line["accuracy"] or "0.5"}
    write_csv(tmp_path / "grid" / "results.csv", lines)
    seen, heatmap = {}, report_figures.heatmap

    def draws(values, names, columns, notes, *more):
        seen.update({(names[i], columns[j]): note for (i, j), note in notes.items()})
        return heatmap(values, names, columns, notes, *more)

    monkeypatch.setattr(report_figures, "heatmap", draws)
    reports.write_report(tmp_path / "grid")
    table = latex_table((tmp_path / "grid" / "report" / "table.tex").read_text())
    for rule, attack in itertools.product(("Mean", "Krum"), ("none", "ALIE(z=1.5)")):
        found = [
            100 * float(line["accuracy"])
            for line in lines
            if (line["rule"], line["attack"], line["pre_aggregation"]) == (rule, attack, "none")
        ]
        assert len(found) == 3
        deviation = statistics.stdev(found)
        assert seen[rule, attack] == f"± {deviation:.0f}"
        mean = f"{statistics.mean(found):.1f}"
        assert table[rule][attack].replace(r"\textbf{", "").replace("}", "") == (
            rf"{mean} $\pm$ {deviation:.1f}"
        )
    curves = [[0.1, 0.5], [0.2, 0.9], [0.6, 0.7]]
    line = report_figures.band("", [[1, 2]] * 3, curves)
    for middle, low, high, *found in zip(line.middle, line.low, line.high, *curves, strict=True):
        assert middle == pytest.approx(statistics.mean(found))
        assert high - middle == pytest.approx(middle - low)
        assert high - middle == pytest.approx(statistics.stdev(found))
    one = report_figures.band("", [[1, 2]], [[0.1, 0.5]])
    assert (one.low == one.middle).all()


def latex_table(text):
    """Rule -> attack -> what its cell says."""
    header, *lines = [line.strip() for line in text.splitlines() if " & " in line]
    names = header.removesuffix(r" \\").split(" & ")
    cells = [line.removesuffix(r" \\").split(" & ") for line in lines]
    assert {len(line) for line in cells} == {len(names)}
    return {line[0]: dict(zip(names[1:], line[1:], strict=True)) for line in cells}


def test_latex_tables_say_what_failed_and_which_is_best(tmp_path):
    import numpy as np

    from lightning_byz.cli.report_tables import Comparison, latex

    nan = float("nan")
    values = np.array([[0.25, 0.9, 0.25], [0.5, nan, nan], [0.5004, 0.8, 0.5004]])
    marks = {(0, 1): "diverged", (1, 1): "failed", (1, 2): "failed", (2, 2): "missing"}
    spread = np.full_like(values, nan)
    text = latex(
        Comparison(["Krum_1", "A & B", "C"], ["none", "50%"], values, spread, marks),
        "Rules, ±, † and 50% {of} #1 \\ ~ ^ $x$",
        "table-f-2",
        percent=True,
    )
    table = latex_table(text.replace(r"A \& B", "AB"))
    assert table[r"Krum\_1"] == {
        "none": "25.0",
        r"50\%": r"\textbf{90.0} $^\dagger$",
        "worst": "25.0",
    }
    assert table["AB"] == {"none": r"\textbf{50.0}", r"50\%": "failed", "worst": "failed"}
    assert table["C"] == {"none": r"\textbf{50.0}", r"50\%": "80.0", "worst": r"\textbf{50.0} ?"}
    caption = r"Rules, $\pm$, $^\dagger$ and 50\% \{of\} \#1 \textbackslash{} \textasciitilde{} "
    assert caption + r"\textasciicircum{} \$x\$" in text
    assert r"\label{tab:table-f-2}" in text
    if shutil.which("pdflatex"):
        document = r"\documentclass{article}\usepackage{booktabs}\begin{document}" + text
        (tmp_path / "page.tex").write_text(document + r"\end{document}")
        command = ["pdflatex", "-halt-on-error", "page.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_the_report_of_a_run(tmp_path):
    folder = tmp_path / "logs" / "version_0"
    folder.mkdir(parents=True)
    lines = []
    for step in range(0, 100, 10):
        line = {
            "step": step,
            "epoch": 0,
            "train_loss": 1 / (1 + step),
            "byz/cosine": 0.9,
            "byz/bytes_up": 100,
            "byz/seconds": 2.0,
        }
        line |= {
            f"byz/suspicion/worker_{i}": 1.5 * step / 90 if i == 10 else 0.1 for i in range(12)
        }
        lines += [line, {"step": step, "epoch": 0, "accuracy": step / 100}]
    write_csv(folder / "metrics.csv", lines)
    assert cli.main(["report", str(tmp_path / "logs")]) == 0
    names, text = pictures(tmp_path / "logs" / "report" / "index.html")
    assert set(names) == {
        "scores",
        "losses",
        "aggregation",
        "accuracy-bytes-up",
        "accuracy-seconds",
        "suspicion",
    }
    assert "Workers that were accused: 10." in text


def test_bytes_between_logged_steps_are_filled_in():
    import numpy as np

    from lightning_byz.cli import reports

    logged = {"byz/bytes_up": (np.array([9.0, 19.0]), np.array([100.0, 200.0]))}
    steps, total = reports._total(logged, "bytes_up")
    assert (steps.tolist(), total.tolist()) == ([9, 19], [1000, 3000])
    logged["byz/total_bytes_up"] = (np.array([19.0]), np.array([3500.0]))
    assert reports._total(logged, "bytes_up")[1].tolist() == [3500]


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "should hold results.csv" in capsys.readouterr().err
    (tmp_path / "metrics.csv").write_text("step,accuracy\n")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "at least one line" in capsys.readouterr().err
