"""The command line: configuration files, and what is said when they are wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

import lightning_byz
from lightning_byz import cli
from lightning_byz.extras import MissingExtraError, require

CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"


def run(*arguments, cwd):
    command = [sys.executable, "-m", "lightning_byz.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.parametrize("config", sorted(CONFIG.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_in_the_repository_train(tmp_path, config):
    done = run(
        "fit",
        "--config",
        config,
        "--trainer.max_epochs",
        1,
        "--trainer.limit_train_batches",
        2,
        "--trainer.log_every_n_steps",
        1,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (metrics,) = tmp_path.glob(f"outputs/{config.stem}/*/metrics.csv")
    assert "byz/cosine" in metrics.read_text().splitlines()[0]


ATTACKS = """
    - class_path: lightning_byz.ByzantineWorkers
      init_args:
        workers: [7, 8, 9]
        every: 2
        attack:
          class_path: lightning_byz.Mixture
          init_args:
            counts: [1, 2]
            parts:
              - class_path: lightning_byz.OptimizedALIE
                init_args:
                  search:
                    evaluations: 3
                    delta: 0.5
              - class_path: lightning_byz.Mixture
                init_args:
                  parts:
                    - class_path: lightning_byz.FlippedBit
                      init_args:
                        bit: -1
                    - class_path: lightning_byz.Mimic
    - class_path: lightning_byz.ByzantineWorkers
      init_args:
        workers: [0]
        probability: 0.5
        attack:
          class_path: lightning_byz.ShuffledLabels
"""


def test_attacks_within_attacks_by_class_path(tmp_path):
    config = tmp_path / "config.yaml"
    text = CONFIG.read_text()
    config.write_text(text[: text.index("  callbacks:")] + "  callbacks:" + ATTACKS)
    done = run("fit", "--config", config, "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("outputs/digits/*/config.yaml")
    assert "evaluations: 3" in written.read_text()


def test_a_partition_is_set_in_a_config(tmp_path):
    config, text = tmp_path / "config.yaml", CONFIG.read_text()
    line = "    batch_size: 16 # of one worker\n"
    assert line in text
    partition = "    partition:\n      class_path: lightning_byz.Dirichlet\n      init_args:\n        alpha: 0.5\n"
    config.write_text(text.replace(line, line + partition))
    limits = ("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2, "--trainer.limit_val_batches", 1)
    done = run("fit", "--config", config, *limits, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (saved,) = tmp_path.glob("outputs/digits/*/config.yaml")
    assert "Dirichlet" in saved.read_text()
    config.write_text(text.replace(line, line + partition.replace("alpha: 0.5", "alpha: -1.0")))
    done = run("fit", "--config", config, *limits, cwd=tmp_path)
    assert done.returncode != 0
    assert "`alpha` should be a number above 0. Found alpha=-1.0" in done.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        (
            "lightning_byz.SignFlip",
            "lightning_byz.SignFlop",
            "no class SignFlop in lightning_byz. Did you mean lightning_byz.SignFlip?",
        ),
        ("lightning_byz.SignFlip", "SignFlop", "no class SignFlop in lightning_byz. Did you mean lightning_byz.SignFlip?"),
        ("lightning_byz.TrimmedMean", "lightning_byz.TrimedMean", "Did you mean lightning_byz.TrimmedMean?"),
        (
            "lightning_byz.TrimmedMean",
            "lightning_byz.SignFlip",
            "lightning_byz.SignFlip does not correspond to a subclass of Aggregator",
        ),
        ("scale: 3.0", "scales: 3.0", "lightning_byz.SignFlip has no argument 'scales'."),
    ],
)
def test_a_mistake_in_a_config_is_named(tmp_path, capsys, right, wrong, message):
    config = tmp_path / "config.yaml"
    text = CONFIG.read_text()
    assert right in text
    config.write_text(text.replace(right, wrong))
    with pytest.raises(SystemExit) as stop, pytest.warns(UserWarning, match="args parameter is intended"):
        cli.main(["fit", "--config", str(config)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_version_and_unknown_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert lightning_byz.__version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2
    assert "'trian'" in capsys.readouterr().err


def test_a_missing_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("lightning_byz.extras.importlib.util.find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(MissingExtraError, match=r"Not installed: matplotlib. Run: pip install 'lightning-byz\[plot\]'"):
        require("A picture", "plot", "rich", "matplotlib")
    assert cli.main(["demo"]) == 1
    assert "pip install 'lightning-byz[demo]'" in capsys.readouterr().err
