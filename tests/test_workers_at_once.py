"""All in-process workers in one pass train to what one after the other trains to, or are not tried."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torchmetrics
from harness import QUIET
from lightning.pytorch.callbacks import ModelPruning
from models import blobs, loader, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate
from zoo import ALGORITHMS, AlgorithmCase

from lightning_byz import (
    ALIE,
    ByzEF21SGDM,
    ByzVRMarinaPP,
    CoordinateMedian,
    LabelFlip,
    RobustSGD,
    SignFlip,
)
from lightning_byz.lightning import ByzantineRobustStrategy, ByzantineWorkers, Stragglers
from lightning_byz.strategies import workers_at_once

N = 4


class Model(L.LightningModule):
    """A step that can be computed at once; options switch on what a test is about."""

    def __init__(self, norm: bool = False, heads: bool = False, metric: bool = False) -> None:
        super().__init__()
        self.net = mlp(norm)
        self.head = nn.Linear(10, 3) if heads else None
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3) if metric else None
        self.metrics: list[dict[str, float]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y = batch
        logits = self.net(x)
        if self.head is not None and batch_idx % 3 == 2:
            logits = logits + self.head(x)
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"mean": logits.mean(), "two": 2.0})
        if self.accuracy is not None:
            self.log("accuracy", self.accuracy(logits, y), on_step=True, on_epoch=True)
            self.log("metric", self.accuracy, on_step=False, on_epoch=True)
        return {"loss": loss, "predictions": logits.argmax(1)}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        logged = self.trainer.callback_metrics
        self.metrics.append({name: float(value) for name, value in logged.items()})
        self.outputs = outputs.get("predictions")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def trained(
    module: L.LightningModule,
    vectorize: Any,
    algorithm: Any = None,
    callbacks: Sequence[L.Callback] = (),
    data: Any = None,
    ckpt_path: Any = None,
    workers: int = N,
    **trainer: Any,
) -> L.Trainer:
    """A run of some steps; the module is trained in place."""
    L.seed_everything(3, verbose=False)
    strategy = ByzantineRobustStrategy(algorithm, workers_per_process=workers, vectorize=vectorize)
    arguments: dict[str, Any] = {**QUIET, "max_epochs": 2, **trainer}
    fitted = L.Trainer(strategy=strategy, callbacks=list(callbacks), devices=1, **arguments)
    fitted.fit(module, loader(24) if data is None else data, ckpt_path=ckpt_path)
    return fitted


def at_once(trainer: L.Trainer) -> bool | None:
    """Whether workers were computed at once."""
    return trainer.strategy.local_workers.decided


def compare(make: Callable[[], L.LightningModule], exact: bool = False, **kwargs: Any) -> None:
    """The same run, one worker after the other and at once."""
    modules = []
    for vectorize in (False, "auto"):
        L.seed_everything(1, verbose=False)
        module, callbacks = make(), [callback() for callback in kwargs.get("callbacks", ())]
        trainer = trained(module, vectorize, **{**kwargs, "callbacks": callbacks})
        modules.append(module)
    assert at_once(trainer)
    alone, together = modules
    for (name, a), b in zip(
        alone.state_dict().items(), together.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(alone.metrics, together.metrics, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5, nan_ok=True)
    assert torch.equal(alone.outputs, together.outputs)


# -- the same training -----------------------------------------------------------------------------


@pytest.mark.thorough(keep=4)
@pytest.mark.parametrize("case", ALGORITHMS, ids=lambda case: case.name)
def test_every_algorithm_trains_as_one_after_the_other(case: AlgorithmCase) -> None:
    if case.algorithm.most_f(9) < 1 or case.tolerates is not None:
        pytest.skip("tolerates nobody among nine")
    compare(
        Model,
        algorithm=case.algorithm.with_f(1),
        workers=9,
        data=loader(45, blobs(450)),
        callbacks=[lambda: ByzantineWorkers(SignFlip(), count=1)],
        max_epochs=1,
    )


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"callbacks": [lambda: ByzantineWorkers(ALIE(z=1.0), count=1)]},
        {"callbacks": [lambda: ByzantineWorkers(LabelFlip(3), count=1)]},
        {"callbacks": [lambda: Stragglers(delay=1.0, workers=[3])]},
        {"accumulate_grad_batches": 2},
        {"data": loader(22)},  # parts of 6, 6, 5 and 5 samples, which no pass takes
        {"data": loader(24, blobs(228))},  # the last batch is a half
        {"precision": "64-true"},
        {"gradient_clip_val": 0.1},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "plain",
)
@pytest.mark.parametrize(
    "options", [{}, {"norm": True}, {"heads": True}, {"metric": True}], ids=str
)
def test_the_same_training(options: dict[str, bool], kwargs: dict[str, Any]) -> None:
    if "data" in kwargs and len(kwargs["data"]) == 11:
        with pytest.raises(AssertionError):  # nothing was decided: there was no step of equal parts
            compare(lambda: Model(**options), **kwargs)
        return
    compare(lambda: Model(**options), **kwargs)


class Scaled(Model):
    """A scalar parameter, as a temperature is, and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.zeros(0, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        scaled = batch[0] * self.scale + self.nothing.sum()
        return super().training_step([scaled, batch[1]], batch_idx)


def test_parameters_may_be_numbers_or_empty() -> None:
    compare(Scaled)


def test_inputs_may_require_gradients() -> None:
    data = DataLoader(blobs(), 24, collate_fn=lambda rows: wants_gradient(default_collate(rows)))
    compare(Model, data=data)


def wants_gradient(batch: list[Tensor]) -> list[Tensor]:
    return [batch[0].requires_grad_(), batch[1]]


class Masked(Model):
    """Twelve heads, of which a step's losses use some."""

    def __init__(self) -> None:
        super().__init__(norm=True)
        self.heads = nn.ModuleList(nn.Linear(10, 3) for _ in range(12))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        used = [float(batch_idx % 512 >> i & 1) for i in range(12)]
        x = batch[0] + sum(
            use * head(batch[0]).sum() for use, head in zip(used, self.heads, strict=True)
        )
        return super().training_step([x, batch[1]], batch_idx)


def test_where_other_parameters_are_used_in_every_step_nothing_grows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runs = []
    with caplog.at_level(logging.INFO, "lightning_byz"):
        for vectorize in (False, "auto"):
            L.seed_everything(1, verbose=False)
            runs.append(Masked())
            trainer = trained(runs[-1], vectorize, data=loader(24, blobs(24 * 50)), max_epochs=1)
    assert not at_once(trainer)
    assert "losses use other parameters in every step" in caplog.text
    assert trainer.strategy.local_workers.state()["at_once"]["used"] == []
    for a, b in zip(runs[0].state_dict().values(), runs[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_chunks_of_workers_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_at_once, "_ROOM", 2 * 227 + 1)  # two workers at a time
    compare(lambda: Model(norm=True, metric=True))


def test_what_fills_the_caches_is_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so many workers as a fixed rule of sizes says, after a resume, too."""
    chunks: list[int | None] = []
    one_pass = workers_at_once.StackedPass.__call__

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        chunks.append(kwargs["chunk"])
        return one_pass(self, *args, **kwargs)

    monkeypatch.setattr(workers_at_once.StackedPass, "__call__", spy)
    workers = trained(Model(), "auto").strategy.local_workers
    assert 6 * 16 <= workers._saved <= 10_000  # at least what the first layer of six samples gives
    assert set(chunks) == {None}
    chunks.clear()
    monkeypatch.setattr(workers_at_once, "CACHED", 3 * workers._saved)
    compare(Model)
    assert set(chunks) == {3}
    resumed = trained(Model(), "auto", max_steps=1).strategy.local_workers
    resumed._saved = None
    resumed.load(workers.state())
    assert resumed._at_a_time(1) == 3


def test_workers_of_whom_few_fit_are_computed_in_turn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers_at_once, "CACHED", 1)
    caplog.set_level(logging.INFO, "lightning_byz")
    assert at_once(trained(Model(), "auto")) is False
    assert "0 of them fill the processor's caches" in caplog.text


@pytest.mark.parametrize("vectorize", ["auto", True])
def test_a_checkpoint_goes_on_to_the_same_bits(vectorize: Any, tmp_path: Path) -> None:
    def made() -> Model:
        L.seed_everything(1, verbose=False)
        return Model(norm=True, heads=True)

    algorithm = ByzEF21SGDM(CoordinateMedian())
    whole, first, rest = made(), made(), made()
    trained(whole, vectorize, algorithm, max_epochs=4)
    trained(first, vectorize, algorithm, max_epochs=2).save_checkpoint(tmp_path / "c.ckpt")
    trainer = trained(rest, vectorize, algorithm, max_epochs=4, ckpt_path=tmp_path / "c.ckpt")
    assert at_once(trainer)
    for a, b in zip(whole.state_dict().values(), rest.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_a_run_in_turn_goes_on_in_turn(tmp_path: Path) -> None:
    module = Model()
    trained(module, False).save_checkpoint(tmp_path / "c.ckpt")
    assert not at_once(trained(module, "auto", max_epochs=3, ckpt_path=tmp_path / "c.ckpt"))


# -- where it is not tried -------------------------------------------------------------------------


class Counts(Model):
    """What it computes depends on how often it was called, which its log shows."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.log("worker", float(next(self.calls) % N))
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Dropout(Model):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return F.cross_entropy(F.dropout(self.net(batch[0]), 0.5), batch[1])


class Item(Model):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("item", loss.item())
        return loss


class Branch(Model):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        return loss if loss > 0.5 else 2 * loss


class Assigns(Model):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.last = self.net(batch[0])
        return F.cross_entropy(self.last, batch[1])


class Appends(Model):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.metrics.append({"batch": float(batch_idx)})
        return F.cross_entropy(self.net(batch[0]), batch[1])


class OwnBackward(Model):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def backward(self, loss: Tensor) -> None:  # type: ignore[override]
        loss.backward()


class UsesMetric(Model):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        assert self.accuracy is not None
        logits = self.net(batch[0])
        return F.cross_entropy(logits, batch[1]) * (1 + self.accuracy(logits, batch[1]))


class Hooked(Model):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].weight.register_hook(lambda gradient: 2 * gradient)


class Keeps(Model):
    """A step that keeps a tensor somewhere, which is looked at once it has ended."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.seen = where, list[Tensor]()
        self.kept: Any = {
            "a dict": {"last": torch.zeros(())},
            "a deque": deque([torch.zeros(())] * 2, maxlen=2),
            "a list of a dict": {"losses": [torch.zeros(())]},
            "an object": SimpleNamespace(last=torch.zeros(())),
            "a hook's": {"last": None},
        }[where]
        if where == "a hook's":
            keep = self.kept.__setitem__
            self.net[0].register_forward_hook(lambda *of: keep("last", of[2].detach().mean()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        out = super().training_step(batch, batch_idx)
        last = out["loss"].detach()
        if self.where == "a dict":
            self.kept["last"] = last
        elif self.where == "a deque":
            self.kept.append(last)
        elif self.where == "a list of a dict":
            self.kept["losses"][0] = last
        elif self.where == "an object":
            self.kept.last = self.kept.last / 2 + last
        return out

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        kept = self.kept
        if self.where != "an object":
            self.seen.append(
                {
                    "a deque": lambda: kept[-1],
                    "a list of a dict": lambda: kept["losses"][0],
                }.get(self.where, lambda: kept["last"])()
                * 1.0
            )


@pytest.mark.filterwarnings("ignore:byzantine_robust. training_step changes")
@pytest.mark.parametrize(
    "where", ["a dict", "a deque", "a list of a dict", "an object", "a hook's"]
)
def test_a_step_that_keeps_tensors_is_done_in_turn(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What the trial has left behind is of the last worker, as in turn."""
    runs = []
    for vectorize in (False, "auto"):
        L.seed_everything(1, verbose=False)
        runs.append(Keeps(where))
        with caplog.at_level(logging.INFO, "lightning_byz"):
            trainer = trained(runs[-1], vectorize)
    assert not at_once(trainer)
    assert "tensors are kept in kept" in caplog.text
    for a, b in zip(runs[0].seen, runs[1].seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, runs[0].parameters(), runs[1].parameters()))


def test_pruned_models_are_computed_in_turn() -> None:
    """Their layers' hooks assign weights."""
    runs = []
    for vectorize in (False, "auto"):
        L.seed_everything(1, verbose=False)
        runs.append(Model())
        prune = ModelPruning("l1_unstructured", amount=0.3, parameter_names=["weight"])
        trainer = trained(runs[-1], vectorize, callbacks=[prune])
    assert not at_once(trainer)
    assert all(map(torch.equal, runs[0].parameters(), runs[1].parameters()))


@pytest.mark.filterwarnings("ignore:byzantine_robust. training_step changes")
@pytest.mark.parametrize(
    ("make", "trainer", "why"),
    [
        (Dropout, {}, "random"),
        (Item, {}, "item"),
        (Branch, {}, "control flow"),
        (Assigns, {}, "assigns attributes"),
        (Appends, {}, "changes metrics by hand"),
        (OwnBackward, {}, "`backward` of its own"),
        (lambda: UsesMetric(metric=True), {}, "metric"),
        (Hooked, {}, "hooks"),
        (Counts, {}, "logged values would be others"),
        (Model, {"precision": "bf16-mixed"}, "mixed precision"),
    ],
    ids=[
        "dropout",
        "item",
        "branch",
        "assigns",
        "appends",
        "backward",
        "metric",
        "hook",
        "counts",
        "mixed",
    ],
)
def test_what_one_pass_cannot_do_is_done_in_turn_and_said_once(
    make: Callable[[], L.LightningModule],
    trainer: dict[str, Any],
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    weights = []
    with caplog.at_level(logging.INFO, "lightning_byz"):
        for vectorize in (False, "auto"):
            L.seed_everything(1, verbose=False)
            module = make()
            run = trained(module, vectorize, max_epochs=1, **trainer)
            weights.append([p.detach().clone() for p in module.parameters()])
    assert at_once(run) is False
    said = [r.getMessage() for r in caplog.records if "one after the other" in r.getMessage()]
    assert len(said) == 1
    assert why in said[0]
    assert all(map(torch.equal, *weights))
    if not isinstance(module, (Dropout, Counts)):  # which True allows
        with pytest.raises(ValueError, match="vectorize=True computes all in-process workers"):
            trained(make(), True, max_epochs=1, **trainer)


def test_large_models_gain_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers_at_once, "LARGEST", 100)
    with caplog.at_level(logging.INFO, "lightning_byz"):
        assert at_once(trained(Model(), "auto", max_epochs=1)) is False
    assert "gradients of 227 numbers, more than 100, gain nothing" in caplog.text
    assert at_once(trained(Model(), True, max_epochs=1))


def test_true_takes_random_operations_from_one_stream(caplog: pytest.LogCaptureFixture) -> None:
    L.seed_everything(1, verbose=False)
    first, second = Dropout(), Dropout()
    second.load_state_dict(first.state_dict())
    caplog.set_level(logging.INFO, "lightning_byz")
    assert at_once(trained(first, True, max_epochs=1))
    assert "such as dropout, draw from one stream for all of them" in caplog.text
    trained(second, True, max_epochs=1)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_previous_gradients_are_computed_beside_it() -> None:
    compare(Model, algorithm=ByzVRMarinaPP(RobustSGD().aggregator, p=0.3))


def test_what_vectorize_may_be() -> None:
    with pytest.raises(ValueError, match="`vectorize` should be 'auto', True or False"):
        ByzantineRobustStrategy(vectorize="always")


def test_what_is_saved_may_be_sparse_or_nested() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    for x in (torch.eye(4).to_sparse(), torch.randn(5, 4), nested):
        with workers_at_once._counting() as numbers:
            y = torch.sparse.mm(x, weight) if x.is_sparse else x @ weight
            loss = (y.values() if y.is_nested else y).square().sum()
        loss.backward()
        assert sum(numbers.values()) >= 12
