"""The command line: configuration files, and what is said when they are wrong."""

import csv
import importlib
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import lightning_byz
from lightning_byz import cli
from lightning_byz.cli import catalogue
from lightning_byz.optional_dependencies import MissingExtraError, require

CONFIGS = Path(__file__).parents[1] / "configs"
CONFIG = CONFIGS / "digits.yaml"
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


@pytest.fixture(autouse=True)
def no_wandb_run_is_left():
    """One in progress would be taken over by the next test's logger, and what was in the
    environment is remembered.
    """
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
        sys.modules["wandb"].teardown()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(*arguments, quiet=QUIET):
    return cli.main(["fit", *map(str, arguments), *quiet])


def logged(folder):
    """The columns of a run's metrics.csv: name -> values, where there are any."""
    (path,) = folder.glob("**/metrics.csv")
    with path.open() as file:
        rows = [*csv.DictReader(file)]
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


# -- the configurations in the repository ----------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    """A folder with a9a, Fashion-MNIST and CIFAR-10 in their own formats, but for their size and
    content.
    """
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (folder / "libsvm").mkdir()
    for name, count in (("a9a", 60), ("a9a.t", 10)):
        lines = (
            f"{2 * (i % 2) - 1:+d} {1 + i % 2}:1 {3 + int(rng.integers(120))}:1"
            for i in range(count)
        )
        (folder / "libsvm" / name).write_text("\n".join(lines) + "\n")
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 60), ("t10k", 10)):
        images, labels = (
            rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            (np.arange(count) % 10).astype(np.uint8),
        )
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, count) + labels.tobytes()
        )
    batches = folder / "cifar-10-batches-py"
    batches.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        content = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 3]}
        (batches / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder


@pytest.mark.thorough(keep=2)
@pytest.mark.parametrize(
    "config", sorted(CONFIGS.glob("*/*_*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_the_configs_for_data_sets_train(here, tiny_data, config):
    folder = tiny_data / "libsvm" if config.parent.name == "a9a" else tiny_data
    small = ("--data.batch_size=1", "--data.folder", folder)
    # a ResNet's passes take seconds here: one of the four has it
    if config.parent.name == "cifar10":
        small += (
            ()
            if config.stem == "dstar"
            else (
                "--model.net=lightning_byz.models.SmallCNN",
                "--model.net.channels=3",
                "--model.net.side=32",
            )
        )
    assert (
        fit(
            "--config",
            config,
            f"--trainer.fast_dev_run={1 if config.stem == 'dstar' else 2}",
            *small,
        )
        == 0
    )


def test_there_is_a_config_for_every_system_and_data_set():
    systems = {"byz_ef21_sgdm", "dstar", "byz_vr_marina_pp", "signsgd_majority_vote"}
    found = {
        folder: {path.stem for path in (CONFIGS / folder).glob("*.yaml")}
        for folder in ("a9a", "fashion_mnist", "cifar10")
    }
    assert found == dict.fromkeys(found, systems)
    assert systems <= {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize(
    "config",
    [
        path
        for path in sorted(CONFIGS.glob("*.yaml"))
        if path.stem not in ("multi_node", "wandb_sweep")
    ],
    ids=lambda p: p.stem,
)
def test_the_configs_for_the_digits_train_and_log(here, config):
    limits = (
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=2",
        "--trainer.log_every_n_steps=1",
    )
    assert fit("--config", config, *limits) == 0
    metrics = logged(here / "outputs" / config.stem)
    assert all(
        len(metrics[name]) == 2
        for name in ("byz/cosine", "byz/bytes_up", "byz/bytes_down", "byz/silent")
    )
    (saved,) = here.glob("outputs/*/*/hparams.yaml")  # the whole configuration, defaults included
    saved = yaml.safe_load(saved.read_text())
    assert saved["trainer"]["max_epochs"] == 1
    assert saved["trainer"]["strategy"]["init_args"]["max_skipped_steps"] == 10


def test_the_config_for_several_machines_runs_on_one(here):
    one = (
        "--trainer.num_nodes=1",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.strategy.workers_per_process=4",
    )
    assert fit("--config", CONFIGS / "multi_node.yaml", *one, "--trainer.fast_dev_run=2") == 0


# -- loggers ---------------------------------------------------------------------------------------

THREE_LOGGERS = """
    - class_path: CSVLogger
      init_args: {save_dir: csv}
    - class_path: TensorBoardLogger
      init_args: {save_dir: board}
    - class_path: WandbLogger
      init_args: {save_dir: wandb, offline: true}
"""


def three_loggers(folder):
    text = CONFIG.read_text()
    first, last = text.index("    class_path: CSVLogger"), text.index("  strategy:")
    config = folder / "config.yaml"
    config.write_text(text[:first].rstrip() + THREE_LOGGERS + text[last:])
    return config


def test_all_loggers_get_the_same_metrics_and_the_configuration(here):
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (here / "wandb").mkdir()
    limits = (
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=3",
        "--trainer.log_every_n_steps=1",
    )
    assert fit("--config", three_loggers(here), *limits) == 0
    of_csv = logged(here / "csv")
    assert len(of_csv["byz/cosine"]) == 3
    assert "accuracy" in of_csv

    (events,) = here.glob("board/**/events*")
    board = EventAccumulator(str(events))
    board.Reload()
    of_board = {
        name: [event.value for event in board.Scalars(name)] for name in board.Tags()["scalars"]
    }
    of_wandb, config = dict(wandb.run.summary), dict(wandb.run.config)
    wandb.finish()
    for name in set(of_csv) - {"epoch", "step"}:
        assert of_board[name] == pytest.approx(of_csv[name], rel=1e-5), name
        assert of_wandb[name] == pytest.approx(of_csv[name][-1], rel=1e-5), name

    (saved,) = here.glob("csv/**/hparams.yaml")
    for found in (yaml.safe_load(saved.read_text()), config):
        assert found["trainer"]["strategy"]["init_args"]["num_byzantine"] == 3
        assert found["trainer"]["callbacks"][0]["init_args"]["attack"]["init_args"] == {
            "scale": 3.0
        }
    (saved,) = here.glob("board/**/hparams.yaml")
    assert "num_byzantine: 3" in saved.read_text()
    assert list(here.glob("wandb/wandb/offline-run-*/*.wandb"))
    assert not (here / "wandb" / "config.yaml").exists()  # the next run's would be refused


def test_a_run_without_a_logger_leaves_no_file(here):
    assert (
        fit(
            "--config",
            CONFIG,
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
            "--trainer.max_steps=1",
        )
        == 0
    )
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("logger", "extra"), [("WandbLogger", "wandb"), ("TensorBoardLogger", "tensorboard")]
)
def test_a_logger_that_is_not_installed_says_what_to_install(
    here, monkeypatch, capsys, logger, extra
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "lightning_byz.optional_dependencies.importlib.util.find_spec",
        lambda name: None if name == extra else find(name),
    )
    assert fit("--config", CONFIG, f"--trainer.logger={logger}", "--trainer.logger.save_dir=x") == 1
    assert (
        f"{logger} needs the Python modules {extra}. Not installed: {extra}. Run: pip install "
        f"'lightning-byz[{extra}]'" in (capsys.readouterr().err)
    )


# -- what can be set -------------------------------------------------------------------------------


def test_validate_and_test_read_a_checkpoint(here, capsys):
    assert fit("--config", CONFIGS / "a_checkpoint.yaml") == 2  # no such file
    assert "File does not exist" in capsys.readouterr().err
    network = (
        "--model=lightning_byz.Classifier",
        "--model.net=lightning_byz.models.SmallCNN",
        "--model.net.side=8",
    )
    where = ("--config", str(CONFIG), *network, "--trainer.logger=false")
    assert fit(*where, "--trainer.max_epochs=2", "--trainer.default_root_dir=run") == 0
    (checkpoint,) = here.glob("run/**/*.ckpt")
    for command, metric in (("validate", "accuracy"), ("test", "test_accuracy")):
        assert cli.main([command, *where, f"--ckpt_path={checkpoint}", *QUIET]) == 0
        shown = capsys.readouterr().out
        assert metric in shown
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())


def test_parts_are_set_on_the_command_line_by_their_short_names(here):
    rule, attack = "--trainer.strategy.algorithm.aggregator.rule", "--trainer.callbacks.attack"
    chosen = (
        f"{rule}=MultiKrum",
        f"{rule}.m=4",
        f"{attack}=IPM",
        f"{attack}.epsilon=0.25",
        "--trainer.callbacks.count=2",
    )
    assert (
        fit(
            "--config",
            CONFIG,
            *chosen,
            "--data.partition=Dirichlet",
            "--data.partition.alpha=0.5",
            "--trainer.max_steps=1",
        )
        == 0
    )
    (saved,) = here.glob("outputs/digits/*/config.yaml")
    saved = yaml.safe_load(saved.read_text())
    strategy, callbacks = (
        saved["trainer"]["strategy"]["init_args"],
        saved["trainer"]["callbacks"][0]["init_args"],
    )
    assert strategy["algorithm"]["init_args"]["aggregator"]["init_args"]["rule"] == {
        "class_path": "lightning_byz.MultiKrum",
        "init_args": {"f": None, "m": 4, "definition": "blanchard2017"},
    }
    assert callbacks["attack"] == {
        "class_path": "lightning_byz.IPM",
        "init_args": {"epsilon": 0.25},
    }
    assert (callbacks["count"], saved["data"]["init_args"]["partition"]["init_args"]["alpha"]) == (
        2,
        0.5,
    )


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


def test_attacks_within_attacks_by_class_path(here):
    config = here / "config.yaml"
    text = CONFIG.read_text()
    config.write_text(text[: text.index("  callbacks:")] + "  callbacks:" + ATTACKS)
    assert fit("--config", config, "--trainer.max_epochs=1", "--trainer.limit_train_batches=3") == 0
    (written,) = here.glob("outputs/digits/*/config.yaml")
    assert "evaluations: 3" in written.read_text()


def test_a_partition_is_set_in_a_config(here, capsys):
    config, text = here / "config.yaml", CONFIG.read_text()
    line = "    batch_size: 16 # of one worker\n"
    assert line in text
    partition = (
        "    partition:\n      class_path: lightning_byz.Dirichlet\n      init_args:\n        "
        "alpha: 0.5\n"
    )
    config.write_text(text.replace(line, line + partition))
    limits = (
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=2",
        "--trainer.limit_val_batches=1",
    )
    assert fit("--config", config, *limits) == 0
    (saved,) = here.glob("outputs/digits/*/config.yaml")
    assert "Dirichlet" in saved.read_text()
    config.write_text(text.replace(line, line + partition.replace("alpha: 0.5", "alpha: -1.0")))
    assert fit("--config", config, *limits) == 2
    assert "`alpha` should be a number above 0. Found alpha=-1.0" in capsys.readouterr().err


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        (
            "lightning_byz.SignFlip",
            "lightning_byz.SignFlop",
            "no class SignFlop in lightning_byz. Did you mean lightning_byz.SignFlip?",
        ),
        (
            "lightning_byz.SignFlip",
            "SignFlop",
            "no class SignFlop in lightning_byz. Did you mean lightning_byz.SignFlip?",
        ),
        (
            "lightning_byz.NNM",
            "NMM",
            "no class NMM in lightning_byz. Did you mean lightning_byz.NNM?",
        ),
        ("lightning_byz.NNM", "nnm", "Did you mean lightning_byz.NNM?"),
        (
            "lightning_byz.TrimmedMean",
            "lightning_byz.TrimedMean",
            "Did you mean lightning_byz.TrimmedMean?",
        ),
        (
            "lightning_byz.DigitsDataModule",
            "DigitDataModule",
            "Did you mean lightning_byz.DigitsDataModule?",
        ),
        ("CSVLogger", "CSVLoger", "Did you mean lightning.pytorch.loggers.CSVLogger?"),
        (
            "quickstart.DigitsClassifier",
            "quickstart.DigitClassifier",
            "Did you mean lightning_byz.demo.quickstart.DigitsClassifier?",
        ),
        (
            "lightning_byz.SignFlip",
            "lightningbyz.SignFlip",
            "no module lightningbyz, which lightningbyz.SignFlip names",
        ),
        (
            "lightning_byz.TrimmedMean",
            "lightning_byz.SignFlip",
            "lightning_byz.SignFlip does not correspond to a subclass of Aggregator",
        ),
        (
            "scale: 3.0",
            "scales: 3.0",
            "lightning_byz.SignFlip has no argument 'scales'. Did you mean scale?",
        ),
        (
            "worker_momentum:",
            "worker_momentm:",
            "has no argument 'worker_momentm'. Did you mean worker_momentum?",
        ),
        (
            "max_epochs:",
            "max_epoch:",
            "no setting trainer.max_epoch. Did you mean trainer.max_epochs?",
        ),
        ("trainer:", "trainr:", "Did you mean trainer?"),
        (
            "class_path: lightning_byz.SignFlip",
            "class_pth: lightning_byz.SignFlip",
            "a key 'class_pth' where a class is described",
        ),
        (
            "num_byzantine: 3",
            "num_byzantine: three",
            "num_byzantine should be int or null. Found three.",
        ),
        (
            "num_byzantine: 3",
            "num_byzantine: -3",
            "`num_byzantine` should be an integer of at least 0. Found num_byzantine=-3.",
        ),
        (
            "accelerator: cpu",
            "strategy: byzantine_robst\n  accelerator: cpu",
            "Did you mean byzantine_robust?",
        ),
    ],
)
def test_a_mistake_in_a_config_is_named(here, capsys, right, wrong, message):
    text = CONFIG.read_text()
    assert right in text
    if "strategy:" in wrong:  # by name, instead of the whole one
        text = text[: text.index("  strategy:")]
    (here / "config.yaml").write_text(text.replace(right, wrong))
    assert fit("--config", "config.yaml") == 2
    said = capsys.readouterr().err
    assert said.startswith("lightning-byz fit: ")
    assert message in said


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--trainer.max_epohcs=3",
            "no setting trainer.max_epohcs. Did you mean trainer.max_epochs?",
        ),
        ("--trainer.strategy.algorithm.aggregator.rule=Kru", "Did you mean lightning_byz.Krum?"),
        (
            "--trainer.strategy.algorithm.aggregator.rule.ff=3",
            "has no argument 'ff'. Did you mean f?",
        ),
        ("--trainer.callbacks.attack=ALI", "Did you mean lightning_byz.ALIE?"),
        ("--data=FashionMNISTDataModul", "Did you mean lightning_byz.FashionMNISTDataModule?"),
        ("--trainer.max_epochs=many", "trainer.max_epochs should be int or null. Found many."),
    ],
)
def test_a_mistake_on_the_command_line_is_named(here, capsys, argument, message):
    assert fit("--config", CONFIG, argument) == 2
    assert message in capsys.readouterr().err


# -- the catalogue ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["algorithms", "rules", "pre-aggregations", "attacks", "compressors"]
)
def test_every_part_says_what_it_does_and_where_it_comes_from(kind):
    for entry in catalogue.catalogue(kind):
        assert entry.summary.endswith((".", "`")), entry
        assert entry.source, (
            f"{entry.name}: the docstring should cite a paper, or say `No paper: ...`"
        )


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = f"{sys.executable} -m lightning_byz.cli list | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("algorithms")
    assert done.stderr == ""


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("command", ["--help", "list", "list Krum", "list SuspicionMonitor"])
def test_what_can_be_asked_is_answered_without_lightning(command):
    """Its import takes seconds, and PyTorch's compiler's too."""
    program = (
        f"import sys\nfrom lightning_byz import cli\ntry:\n    assert cli.main({command.split()}) "
        "== 0\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = ('lightning', 'pytorch_lightning', 'lightning_fabric', 'torchmetrics', "
        "'torch._dynamo', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0, shown.stderr
    *said, last = shown.stdout.splitlines()
    assert last == "[]"
    assert len(said) > 5
    assert command != "list" or max(map(len, said)) <= 100


@pytest.mark.thorough
@pytest.mark.parametrize("first", ["lightning_byz", "lightning", "pytorch_lightning"])
def test_strategy_names_are_known_once_both_are_imported(first):
    program = (
        f"import {first}, lightning_byz, lightning, pytorch_lightning\n"
        "for package in (lightning.pytorch, pytorch_lightning):\n"
        "    assert 'byzantine_robust' in "
        "package.strategies.StrategyRegistry.available_strategies()\n"
        "home = lightning_byz.ByzantineRobustStrategy.__module__\n"
        "assert home == "
        f"'lightning_byz.{'pytorch_lightning' if first == 'pytorch_lightning' else 'lightning'}', "
        "home\n"
        "assert set(lightning_byz.__all__) <= set(dir(lightning_byz))\n"
        "assert all(hasattr(lightning_byz, name) for name in lightning_byz.__all__)\n"
        "assert not hasattr(lightning_byz, 'Nothing')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_everything_that_a_run_is_made_of_is_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "320")  # a line each
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    helpers = {
        "LineSearch",
        "ShiftedExponential",
        "WorkerSampler",
        "Classifier",
        "ByzantineRobustStrategy",
        "make_keys",
        "LocalSteps",
    }
    assert set(lightning_byz.__all__) - set(lines) == helpers | {
        name for name in lightning_byz.__all__ if "DataModule" in name
    }
    assert set(catalogue.KINDS) <= set(lines)
    assert "one row with the smallest Krum score" in lines["Krum"]
    assert "Blanchard et al., NeurIPS 2017 (arXiv 1703.02757)" in lines["Krum"]
    assert "Rousseeuw 1985" in lines["MDA"]
    assert "signSGD (arXiv 1810.05291)" in lines["RandomSign"]
    assert "(a fault)" in lines["Stuck"]
    assert cli.main(["list", "compressors"]) == 0
    assert "Krum" not in capsys.readouterr().out


def test_one_part_is_described(capsys):
    assert cli.main(["list", "multikrum"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("lightning_byz.MultiKrum(f=None, m=None")
    assert "Args:" in shown
    assert cli.main(["list", "ByzantineWorkers"]) == 0
    assert "attack: what they do" in capsys.readouterr().out
    assert cli.main(["list", "Krumm"]) == 2
    assert "Did you mean Krum? Kinds: algorithms, rules," in capsys.readouterr().err


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
    monkeypatch.setattr(
        "lightning_byz.optional_dependencies.importlib.util.find_spec",
        lambda name: None if name == "matplotlib" else object(),
    )
    with pytest.raises(
        MissingExtraError,
        match=r"Not installed: matplotlib. Run: pip install 'lightning-byz\[plot\]'",
    ):
        require("A picture", "plot", "rich", "matplotlib")
    assert cli.main(["demo"]) == 1
    assert "pip install 'lightning-byz[demo]'" in capsys.readouterr().err


def test_keys_are_made_once_and_the_hosts_are_named(here, capsys):
    assert cli.main(["keys", "3"]) == 0
    said = capsys.readouterr().out
    assert (
        str(here / "keys") in said and "server.key_secret" in said and "rank{r}.key_secret" in said
    )
    names = {f"{name}.key{end}" for name in ("server", "rank1", "rank2") for end in ("", "_secret")}
    assert {path.name for path in (here / "keys").iterdir()} == names
    before = (here / "keys" / "rank1.key").read_bytes()
    assert cli.main(["keys", "3"]) == 2
    assert (
        "should hold no keys yet" in capsys.readouterr().err
        and (here / "keys" / "rank1.key").read_bytes() == before
    )
    assert (
        cli.main(["keys", "2", "elsewhere"]) == 0
        and (here / "elsewhere" / "rank1.key_secret").exists()
    )
    assert cli.main(["keys", "1", "one"]) == 2 and not (here / "one").exists()
    for wrong in (["keys"], ["keys", "0"], ["keys", "many"]):
        with pytest.raises(SystemExit):
            cli.main(wrong)
