"""With a mean rule the strategy is DDP: feature by feature, on real ranks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from harness import assert_close, assert_equal, averaging, cpu_amp, fit, forked_ddp
from models import GAN, Manual, Plain

from lightning_byz import AllGather, Sharded
from lightning_byz.lightning import ByzantineRobustStrategy, ReplicaCheck

pytestmark = pytest.mark.processes
RANKS = 3


CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "32-true": (Plain, {}, dict),
    "adamw": (Plain, {"optimizer": "adamw"}, dict),
    "bf16-mixed": (Plain, {}, lambda: {"precision": "bf16-mixed"}),
    "16-mixed": (Plain, {}, cpu_amp),
    "64-true": (Plain, {}, lambda: {"precision": "64-true"}),
    "accumulate": (Plain, {}, lambda: {"accumulate_grad_batches": 2}),
    "accumulate 16-mixed": (Plain, {}, lambda: {"accumulate_grad_batches": 2, **cpu_amp()}),
    "clip norm": (Plain, {}, lambda: {"gradient_clip_val": 0.05}),
    "clip value": (
        Plain,
        {},
        lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ),
    "clip norm 16-mixed": (Plain, {}, lambda: {"gradient_clip_val": 0.05, **cpu_amp()}),
    "manual": (Manual, {}, dict),
    "manual clip": (Manual, {"clip": 0.05}, dict),
    "gan": (GAN, {}, dict),
    "unused": (Plain, {"unused": True}, dict),
    "frozen": (Plain, {"frozen": True}, dict),
    "gradient checkpointing": (Plain, {"checkpointing": True}, dict),
    "swa": (
        Plain,
        {},
        lambda: {
            "max_epochs": 3,
            "callbacks": [L.pytorch.callbacks.StochasticWeightAveraging(0.05, 1)],
        },
    ),
    "early stopping": (
        Plain,
        {},
        lambda: {"max_epochs": 4, "callbacks": [L.pytorch.callbacks.EarlyStopping("loss", 9, 0)]},
    ),
}


@pytest.mark.thorough(keep=3)
@pytest.mark.parametrize("case", CASES)
def test_mean_is_ddp(case: str, tmp_path: Path) -> None:
    module, options, trainer = CASES[case]
    runs = {}
    for name, strategy in (
        ("ddp", forked_ddp(find_unused_parameters=case in ("unused", "gan"))),
        ("byz", averaging(start_method="fork")),
    ):
        torch.manual_seed(1)
        model = module(**options)
        runs[name] = fit(
            tmp_path / name,
            model,
            strategy,
            devices=RANKS,
            data=Plain().train_dataloader(),
            **trainer(),
        )
    for rank in range(1, RANKS):
        assert_equal(runs["byz"][0], runs["byz"][rank])
    assert runs["ddp"][0]["steps"] == runs["byz"][0]["steps"] > 0
    assert_close(runs["ddp"][0], runs["byz"][0], 2e-3 if "16" in case else 1e-5)
    torch.manual_seed(1)
    start = module(**options).state_dict()
    assert any(
        not torch.equal(start[name], value.float())
        for name, value in runs["byz"][0]["weights"].items()
    ), "it did not train"


class Shuffled(Plain):
    """An optimizer that has the parameters in an order of this rank's own, as where its groups are
    made from sets of names; or in the module's.
    """

    def __init__(self, shuffles: bool = True) -> None:
        super().__init__()
        self.shuffles = shuffles

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = list(self.parameters())
        if self.shuffles:
            random.Random(self.global_rank).shuffle(parameters)
        groups = [{"params": parameters[i::2], "weight_decay": 0.1} for i in (0, 1)]
        return torch.optim.AdamW(groups, lr=0.01)


@pytest.mark.parametrize("local_steps", [None, 2])
@pytest.mark.parametrize("transport", [AllGather, Sharded])
def test_ranks_may_have_parameters_in_unlike_orders(
    transport: Any, local_steps: int | None, tmp_path: Path
) -> None:
    """The same training as with one order, and states that `ReplicaCheck` finds equal."""
    runs = []
    for shuffles in (True, False):
        torch.manual_seed(1)
        module = Shuffled(shuffles)
        strategy = ByzantineRobustStrategy(
            transport=transport(), start_method="fork", local_steps=local_steps
        )
        callbacks = [] if local_steps else [ReplicaCheck(every_n_steps=1)]
        data = Plain().train_dataloader()
        runs.append(fit(tmp_path, module, strategy, devices=RANKS, data=data, callbacks=callbacks))
    for shuffled, plain in zip(*runs, strict=True):
        assert_equal(shuffled, plain)


def test_samples_of_ranks_are_disjoint(tmp_path: Path) -> None:
    reports = fit(tmp_path, Plain(), averaging(start_method="fork"), devices=RANKS)
    seen = [set(report["seen"]) for report in reports]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 240


def test_batchnorm_in_training_mode(tmp_path: Path) -> None:
    """Parameters are DDP's; running statistics are the median of the ranks', the same
    everywhere.
    """
    runs = {}
    for name, strategy in (("ddp", forked_ddp()), ("byz", averaging(start_method="fork"))):
        torch.manual_seed(1)
        runs[name] = fit(tmp_path / name, Plain(norm=True), strategy, devices=RANKS)
    for rank in range(1, RANKS):
        assert_equal(runs["byz"][0], runs["byz"][rank])
    for key, value in runs["ddp"][0]["weights"].items():
        if "running" not in key:
            torch.testing.assert_close(value, runs["byz"][0]["weights"][key], rtol=1e-5, atol=1e-5)
    assert not torch.equal(runs["byz"][0]["weights"]["net.1.running_mean"], torch.zeros(16))


def test_lbfgs_takes_the_same_branches_on_every_rank(tmp_path: Path) -> None:
    """Its closure returns the aggregated loss; rank-local losses would make ranks stop at different
    evaluations and hang.
    """
    runs = []
    for strategy, devices in ((averaging(start_method="fork"), RANKS), ("auto", 1)):
        torch.manual_seed(1)
        # whole epochs, because ranks' samples are shuffled
        model = Plain(optimizer="lbfgs", batch_size=240 // devices)
        runs.append(
            fit(tmp_path, model, strategy, devices=devices, max_epochs=4, precision="64-true")
        )
    for report in runs[0]:
        assert_close(runs[1][0], report, 1e-7)
