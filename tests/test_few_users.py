"""What too few workers use does not move, and what changes all the time starts afresh: both are
said, and once.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Plain, blobs, loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from zoo import laws

from lightning_byz import RobustSGD, TrimmedMean
from lightning_byz.lightning import ByzantineRobustStrategy
from lightning_byz.strategies.unmoved_parameters import FewUsers

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}


@laws
@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=30))
def test_who_is_named_was_wanted_three_times_and_never_moved(users: list[list[int]]) -> None:
    """``users``: of each round, how many of three workers use each of three parameters; f = 1."""
    parameters = [nn.Parameter(torch.full((1,), float(j))) for j in range(3)]
    watch, told = FewUsers(), []
    for i, counts in enumerate(users[:20]):
        wanted = [torch.tensor([worker < count for count in counts]) for worker in range(3)]
        found = watch.observe(parameters, wanted, torch.tensor([count > 1 for count in counts]))
        so_far = users[: i + 1]
        right = [
            j
            for j in range(3)
            if all(c[j] < 2 for c in so_far) and sum(c[j] == 1 for c in so_far) >= 3
        ]
        assert sorted(int(p) for p in found) == ([] if told else right)
        told += found


def test_later_rounds_are_looked_at_now_and_then() -> None:
    parameter, watch = nn.Parameter(torch.zeros(1)), FewUsers()
    yes, no = torch.tensor([True]), torch.tensor([False])
    rounds = [i for i in range(1, 400) if watch.observe([parameter], [yes if i > 20 else no], no)]
    assert rounds == [300]


class Heads(Plain):
    """A head for each worker of six, as its data say, and a body that all share."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 3) for _ in range(6))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(
            self.heads[int(batch[2][0])](self.body(batch[0])), batch[1]
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([*self.body.parameters(), *self.heads.parameters()], lr=0.1)


@pytest.mark.parametrize(("f", "shared"), [(1, False), (1, True), (0, False)])
def test_a_head_of_one_worker_is_named_once(f: int, shared: bool) -> None:
    domain = (torch.arange(96) % 24) // (12 if shared else 4)
    data = TensorDataset(torch.randn(96, 6), torch.randint(0, 3, (96,)), domain)
    module, strategy = (
        Heads(),
        ByzantineRobustStrategy(RobustSGD(TrimmedMean()), workers_per_process=6, num_byzantine=f),
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        L.Trainer(**QUIET, max_epochs=3, strategy=strategy).fit(
            module, DataLoader(data, batch_size=24)
        )
    said = [str(w.message) for w in seen if "do not move" in str(w.message)]
    still = {
        name
        for name, p in module.named_parameters()
        if name.startswith("heads") and torch.equal(p, before[name])
    }
    if f == 0 or shared:
        assert said == []
        assert len(still) == (0 if f == 0 else 8)  # four heads that nobody uses
        return
    (message,) = said
    assert len(still) == 12
    assert "f=1 workers or fewer" in message
    assert message.count("heads.") == 10
    assert "heads.0.weight" in message
    assert " and 2 more" in message
    assert "body" not in message


class InTurns(Plain):
    """One of two layers is frozen in every step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for i, p in enumerate(self.parameters()):
            p.requires_grad_(i % 2 == batch_idx % 2)


def test_layers_frozen_in_turns_are_said_once_and_counted(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    strategy = ByzantineRobustStrategy(workers_per_process=4)
    with caplog.at_level(logging.WARNING, "lightning_byz"):
        L.Trainer(**QUIET, max_epochs=1, strategy=strategy).fit(InTurns(), loader(24, blobs()))
    said = [record.getMessage() for record in caplog.records if "afresh" in record.getMessage()]
    assert len(said) == 2
    assert "The set of trained parameters has changed" in said[0]
    assert int(said[1].split("afresh ")[1].split()[0]) >= 9  # ten steps
