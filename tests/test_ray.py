"""Ray Train: its workers are one robust run, one that dies does not change what comes out, and what
Ray decides cannot be set elsewhere.
"""

from __future__ import annotations

import importlib
import re
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from harness import fit
from test_launchers import run_on_ray

from lightning_byz import (
    ByzantineWorkers,
    DigitsDataModule,
    ParameterServer,
    RobustSGD,
    SignFlip,
    TrimmedMean,
)
from lightning_byz.demo.quickstart import DigitsClassifier
from lightning_byz.lightning import ByzantineRobustStrategy
from lightning_byz.optional_dependencies import MissingExtraError
from lightning_byz.strategies.validate import UnsupportedSetupError

EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_train.py"
has_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'lightning-byz[ray]'"
)


@has_ray
@pytest.mark.thorough
@pytest.mark.processes
def test_a_run_of_ray_with_a_liar_and_a_killed_worker_ends_as_one_without_ray(
    tmp_path: Path,
) -> None:
    """To the bit, as three forked ranks of which one lies, and none is killed."""
    said = run_on_ray(EXAMPLE, "--kill-rank=1", "--fast", "--epochs=3", folder=tmp_path)
    assert "The actor died unexpectedly" in said
    assert "Restored all states from the checkpoint" in said
    folder = re.search(r"3 workers on Ray, 1 lying: [\d.]+% of held-out digits, (\S+)", said)[1]
    saved = torch.load(Path(folder) / "checkpoint.ckpt", weights_only=True)
    assert (saved["epoch"], saved["global_step"]) == (2, 12)
    assert saved["lightning_byz"]["n"] == 3
    L.seed_everything(0)
    expected = fit(
        tmp_path / "forked",
        DigitsClassifier(),
        ByzantineRobustStrategy(start_method="fork"),
        devices=3,
        data=DigitsDataModule(batch_size=16),
        callbacks=[ByzantineWorkers(SignFlip(scale=10.0), count=1)],
        max_epochs=3,
        limit_train_batches=4,
    )
    for name, value in expected[0]["weights"].items():
        assert torch.equal(value, saved["state_dict"][name]), name


@has_ray
@pytest.mark.thorough
def test_the_strategy_belongs_to_the_lightning_that_ray_takes(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["lightning"] = None  # as if it were not installed
import pytorch_lightning
from lightning_byz.ray import HOME, RayByzantineRobustStrategy
assert HOME == "pytorch_lightning"
assert issubclass(RayByzantineRobustStrategy, pytorch_lightning.strategies.ParallelStrategy)
"""
    run_on_ray("-c", code, folder=tmp_path)


@has_ray
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"timeout": timedelta(1)}, r"Found timeout=.*TorchConfig\(timeout_s"),
        ({"process_group_backend": "gloo"}, r"backend='gloo'.*TorchConfig\(backend"),
        ({"start_method": "fork"}, r"start_method='fork'.*ScalingConfig\(num_workers"),
        ({"transport": ParameterServer()}, r"Found transport=ParameterServer\(\)"),
    ],
)
def test_what_ray_decides_cannot_be_set_elsewhere(argument: dict, message: str) -> None:
    from lightning_byz.ray import RayByzantineRobustStrategy

    with pytest.raises(UnsupportedSetupError, match=message):
        RayByzantineRobustStrategy(**argument)


@has_ray
def test_a_trainer_that_does_not_run_on_rays_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.train.lightning import RayLightningEnvironment

    from lightning_byz.ray import RayByzantineRobustStrategy, prepare_trainer

    rule = RobustSGD(TrimmedMean())
    strategy = RayByzantineRobustStrategy(algorithm=rule, num_byzantine=1)
    assert (strategy.algorithm, strategy.num_byzantine) == (rule, 1)
    trainer = SimpleNamespace(strategy=strategy)
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    with pytest.raises(UnsupportedSetupError, match="plugins=.*RayLightningEnvironment"):
        prepare_trainer(trainer)
    strategy.cluster_environment = RayLightningEnvironment()
    assert prepare_trainer(trainer) is trainer
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UnsupportedSetupError, match="init_method"):
        prepare_trainer(trainer)
    with pytest.raises(UnsupportedSetupError, match="Found ByzantineRobustStrategy"):
        prepare_trainer(SimpleNamespace(strategy=ByzantineRobustStrategy()))


@has_ray
def test_the_guide_is_rays_recipe_with_two_names_changed() -> None:
    page = (EXAMPLE.parents[1] / "docs" / "guides" / "clusters.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    for name in re.findall(r"\w*(?:Strategy|Environment|Callback)\(|prepare_trainer\(", code):
        assert name.removesuffix("(") in names


def test_without_ray_an_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, "lightning_byz.ray", raising=False)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "ray" else real(name, *a)
    )
    with pytest.raises(MissingExtraError, match=r"pip install 'lightning-byz\[ray\]'"):
        importlib.import_module("lightning_byz.ray")
