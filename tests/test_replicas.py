"""ReplicaCheck and DuplicateBatchCheck, in real processes: the rank that differs is named, and
nobody else notices.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_equal, fit, forked_ddp
from models import Manual, Plain, loader

from lightning_byz.callbacks.duplicate_batch_check import outliers, shared_batch
from lightning_byz.callbacks.replica_check import checksum, minority
from lightning_byz.lightning import ByzantineRobustStrategy, DuplicateBatchCheck, ReplicaCheck
from lightning_byz.transports.parsing import Refusals

DIVERGED = "Different from the others: rank 2 on host"


class Drifts(Plain):
    """From step 3 on, something changes on rank 2 alone."""

    what = "parameters"

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step == 3 and self.global_rank == 2:
            if self.what == "parameters":
                with torch.no_grad():
                    self.net[0].bias[0] += 1e-6
            else:
                state = self.trainer.optimizers[0].state[self.net[2].weight]
                state["momentum_buffer"][0, 0] *= 1.0001


@pytest.fixture
def log(tmp_path: Path) -> Any:
    handler = logging.FileHandler(tmp_path / "log")  # which forked ranks inherit
    logging.getLogger("lightning.pytorch.lightning_byz").addHandler(handler)
    yield lambda: (tmp_path / "log").read_text()
    logging.getLogger("lightning.pytorch.lightning_byz").removeHandler(handler)


def strategies() -> list[Any]:
    return [forked_ddp(), ByzantineRobustStrategy(start_method="fork")]


@pytest.mark.processes
@pytest.mark.parametrize("what", ["parameters", "optimizer state"])
def test_a_rank_that_differs_is_named(what: str, tmp_path: Path, log: Any) -> None:
    model = Drifts()
    model.what = what
    callbacks = [ReplicaCheck(every_n_steps=2, action="warn")]
    kwargs: dict[str, Any] = {
        "devices": 4,
        "data": loader(6),
        "callbacks": callbacks,
        "max_steps": 4,
        "extra": lambda t, m: None,
    }
    fit(tmp_path / "run", model, forked_ddp(), **kwargs)
    assert log().count("After step 4, ranks should hold the same ") == log().count(DIVERGED) == 1
    assert what in log()


@pytest.mark.processes
@pytest.mark.parametrize("which", [0, 1], ids=["ddp", "byzantine_robust"])
def test_equal_replicas_pass(which: int, tmp_path: Path, log: Any) -> None:
    checks = ReplicaCheck(every_n_steps=3)
    reports = fit(
        tmp_path / "run",
        Plain(optimizer="adamw"),
        strategies()[which],
        devices=3,
        data=loader(8),
        callbacks=[checks],
        extra=lambda t, m: t.callbacks[0].checks,
    )
    assert [report["extra"] for report in reports] == [3] * 3
    assert "Different" not in log()


@pytest.mark.processes
def test_it_raises_on_all_ranks(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="ranks should hold the same parameters"):
        fit(
            tmp_path,
            Drifts(),
            forked_ddp(),
            devices=3,
            data=loader(8),
            callbacks=[ReplicaCheck(every_n_steps=1)],
        )


def test_checksums() -> None:
    tensors = [
        torch.randn(5, 3),
        torch.tensor([True, False]),
        torch.arange(4),
        torch.randn(3, dtype=torch.bfloat16),
        torch.zeros(2),
    ]
    same = checksum(tensors)
    assert same == checksum([tensor.clone() for tensor in tensors])
    changes = []
    for i in range(len(tensors)):
        other = [t.clone() for t in tensors]
        other[i].view(torch.uint8)[..., 0] ^= 1
        changes.append(checksum(other))
    swapped = [tensors[0].flip(0), *tensors[1:]]
    assert (
        len({same, *changes, checksum(swapped), checksum(tensors[::-1]), checksum(tensors[:-1])})
        == len(tensors) + 4
    )
    assert checksum([torch.tensor([0.0])]) != checksum([torch.tensor([-0.0])])


def test_who_is_in_the_minority() -> None:
    assert minority([(1, 2)] * 3) == ([], "")
    assert minority([(1, 2), (1, 3), (1, 2)]) == ([1], "optimizer state")
    assert minority([(1, 2), (7, 3)]) == ([0, 1], "parameters and optimizer state")
    assert minority([(1, 2), (1, 2), (3, 2), (3, 2)]) == ([0, 1, 2, 3], "parameters")


# -- the same micro-batch --------------------------------------------------------------------------


class Miscomputes(Plain):
    """One unit of rank 2 is wrong by 2 %, in the same way every time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        return torch.cat([y[:, :1] * 1.02, y[:, 1:]], 1) if self.global_rank == 2 else y


@pytest.mark.processes
@pytest.mark.parametrize("which", [0, 1], ids=["ddp", "byzantine_robust"])
def test_a_device_that_miscomputes_is_named(which: int, tmp_path: Path, log: Any) -> None:
    callbacks = [DuplicateBatchCheck(every_n_steps=2)]
    fit(
        tmp_path / "run",
        Miscomputes(dropout=0.5),
        strategies()[which],
        devices=4,
        data=loader(6),
        callbacks=callbacks,
    )
    assert log().count(DIVERGED) == 1
    assert "Batch 2: all ranks computed the gradient of rank 0's micro-batch" in log()


@pytest.mark.processes
@pytest.mark.parametrize("which", [0, 1], ids=["ddp", "byzantine_robust"])
def test_nobody_notices(which: int, tmp_path: Path, log: Any) -> None:
    """Weights, BatchNorm's statistics, logs and random numbers are those of a run without; also
    within an accumulation window.
    """

    class Draws(Plain):
        def on_train_batch_end(self, *args: Any) -> None:
            self.seen.append(float(torch.rand(1)))

    runs = []
    for callbacks in ([], [DuplicateBatchCheck(every_n_steps=1, tolerance=0.0)]):
        torch.manual_seed(3)
        kwargs: dict[str, Any] = {
            "devices": 3,
            "data": loader(7),
            "callbacks": callbacks,
            "accumulate_grad_batches": 2,
        }
        runs.append(
            fit(tmp_path / "run", Draws(norm=True, dropout=0.5), strategies()[which], **kwargs)
        )
    for without, with_it in zip(*runs, strict=True):
        assert_equal(without, with_it)
        assert without["metrics"] == with_it["metrics"]
        assert [value for value in without["seen"] if 0 <= value < 1] == [
            value for value in _once(with_it["seen"], without["seen"]) if 0 <= value < 1
        ]
    assert "Different" not in log()


def _once(seen: list[float], expected: list[float]) -> list[float]:
    """What was seen, without what the quiet passes saw of their batches."""
    wanted = iter(expected)
    kept, goal = [], next(wanted, None)
    for value in seen:
        if value == goal:
            kept.append(value)
            goal = next(wanted, None)
    return kept


@pytest.mark.processes
def test_batches_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    class Odd(Plain):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [*batch, batch[0]] if self.global_rank == 1 else batch

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch[:2], batch_idx)

    with pytest.raises(Exception, match=r"Found \[2, 3\] tensors"):
        fit(
            tmp_path,
            Odd(),
            forked_ddp(),
            devices=2,
            data=loader(8),
            callbacks=[DuplicateBatchCheck(every_n_steps=1)],
        )
    # of three, the odd one is left out, and not accused
    check = DuplicateBatchCheck(every_n_steps=1, action="raise")
    fit(tmp_path, Odd(), forked_ddp(), devices=3, data=loader(20), callbacks=[check])


def test_who_is_an_outlier() -> None:
    rows = torch.ones(4, 8)
    assert outliers(rows, 0.0) == []
    rows[3, 2] += 0.1
    assert outliers(rows, 1e-3) == [3]
    assert outliers(rows, 0.1) == []
    rows[1, 0] = torch.nan
    assert outliers(rows, 1e-3) == [1, 3]
    assert outliers(torch.full((3, 2), torch.nan), 0.0) == []
    assert outliers(rows[2:], 1e-3) == [0, 1]  # of two, nobody knows which


def test_what_they_refuse(tmp_path: Path) -> None:
    for callback in (ReplicaCheck(), DuplicateBatchCheck()):
        with pytest.raises(ValueError, match="compares ranks that hold copies of the same module"):
            fit(tmp_path, Plain(), "auto", callbacks=[callback])
    for kind in (ReplicaCheck, DuplicateBatchCheck):
        with pytest.raises(ValueError, match="`every_n_steps` should be at least 1"):
            kind(every_n_steps=0)
        with pytest.raises(ValueError, match="should be 'raise' or 'warn'"):
            kind(action="stop")
    with pytest.raises(ValueError, match="at least 0"):
        DuplicateBatchCheck(tolerance=-1.0)


@pytest.mark.processes
def test_manual_optimization_has_no_step_without_its_optimizer(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="manual optimization does not allow"):
        fit(
            tmp_path,
            Manual(),
            forked_ddp(),
            devices=2,
            data=loader(8),
            callbacks=[DuplicateBatchCheck()],
        )


class Header:
    """Stands in for what ranks gather: the honest header of each, and a liar's."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, lie: list[int] | None, ranks: int = 4
    ) -> None:
        self.lie, self.ranks, self.sent = lie, ranks, 0
        module = "lightning_byz.callbacks.duplicate_batch_check"
        monkeypatch.setattr(f"{module}.gathered", self.gathered)
        monkeypatch.setattr(f"{module}.dist.get_rank", lambda: 0)
        monkeypatch.setattr(f"{module}.dist.get_backend", lambda: "gloo")
        monkeypatch.setattr(f"{module}.dist.broadcast", self.broadcast)

    def gathered(self, own: torch.Tensor) -> list[torch.Tensor]:
        theirs = own.clone()
        for place, number in enumerate(self.lie or []):
            theirs[place] = number
        return [own] * (self.ranks - 1) + [theirs]

    def broadcast(self, sent: torch.Tensor, src: int) -> None:
        self.sent += 1
        sent.fill_(7)


@pytest.mark.parametrize(
    "lie",
    [
        [-1],
        [1 << 62],
        [2, 2, 0, -5, 3],  # [number of tensors, dimensions, dtype, sizes ...]
        [2, 2, 0, 1 << 40, 1 << 40],
        [2, 2, 0, 1 << 20, 3],  # much larger than the others'
        [2, 3, 0, 4, 3, 1],
        [2, 2, 1, 4, 3],
        [2, 2, 99, 4, 3],
        [2, 99, 0, 4, 3],
    ],
)
def test_a_rank_that_lies_about_its_batch_is_left_out(
    lie: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for its tensors, nor makes room for them; the other ranks' batches are compared
    as before.
    """
    batch, cpu = {"x": torch.zeros(4, 3), "y": torch.zeros(4)}, torch.device("cpu")
    header, refusals = Header(monkeypatch, lie), Refusals("batches")
    assert shared_batch(batch, 3, cpu, refusals) == (None, {0, 1, 2})
    assert header.sent == 0
    assert set(refusals.counts) == {3}
    shared, alike = shared_batch(batch, 1, cpu, refusals)
    assert alike == {0, 1, 2}
    assert header.sent == 2
    assert torch.equal(shared["x"], torch.full((4, 3), 7.0))
    assert shared["y"].shape == (4,)


def test_a_batch_of_another_length_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    Header(monkeypatch, [2, 2, 0, 9, 3])
    shared, alike = shared_batch(
        {"x": torch.zeros(4, 3), "y": torch.zeros(4)}, 3, torch.device("cpu"), Refusals("batches")
    )
    assert alike == {0, 1, 2, 3}
    assert shared["x"].shape == (9, 3)


def test_ranks_without_a_common_form_of_batch_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    Header(monkeypatch, [2, 3, 0, 4, 3, 1], ranks=2)
    with pytest.raises(ValueError, match="most ranks' should hold the same number of tensors"):
        shared_batch(
            {"x": torch.zeros(4, 3), "y": torch.zeros(4)},
            1,
            torch.device("cpu"),
            Refusals("batches"),
        )


def test_where_half_of_the_ranks_have_no_batch_nothing_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None batches are no fault of a run."""
    Header(monkeypatch, [0] * 6, ranks=2)
    batch = {"x": torch.zeros(4, 3), "y": torch.zeros(4)}
    for subject in (0, 1):
        shared = shared_batch(batch, subject, torch.device("cpu"), Refusals("batches"))
        assert shared == (None, set())
