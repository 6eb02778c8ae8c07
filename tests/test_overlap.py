"""Messages that leave during backward give what messages after it give, bit for bit, whatever
backward does.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from harness import assert_close, assert_equal, cpu_amp, fit
from models import Plain, loader, loss_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_byz import (
    NNM,
    AllGather,
    ByHeterogeneity,
    ByzEF21SGDM,
    Chain,
    CoordinateMedian,
    NotANumber,
    RobustSGD,
    Sharded,
    SignSGDMajorityVote,
    TrimmedMean,
)
from lightning_byz.lightning import (
    ByzantineRobustStrategy,
    ByzantineWorkers,
    RobustnessMonitor,
    SuspicionMonitor,
)
from lightning_byz.strategies import overlap
from lightning_byz.strategies.flat_parameters import FlatParameters
from lightning_byz.strategies.overlap import Overlap
from lightning_byz.transports import Transport
from lightning_byz.transports.meeting import RankLostError

pytestmark = pytest.mark.processes
MEDIAN = RobustSGD(CoordinateMedian())
RANKS = 3


class Lossless(Plain):
    """Rank 1 has no loss in the second step."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if self.global_rank == 1 and batch_idx == 1 else loss


class FirstHalfOnly(Plain):
    """The second layer gets a gradient in the first micro-batch of a step only."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        hidden = self.net[0](batch[0])
        return self.net[2](hidden).square().mean() if batch_idx % 2 == 0 else hidden.square().mean()


class Twice(Plain):
    """A layer that reentrant checkpointing meets twice gets two gradients in one backward pass."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x = batch[0].clone().requires_grad_()
        layer = self.net[0]
        for _ in range(2):
            x = checkpoint(lambda x: layer(x)[:, :10] + x, x, use_reentrant=True)
        return loss_of(self.net[1:], [torch.nn.functional.pad(x, (0, 6)), batch[1]])


class Compiled(Plain):
    def configure_model(self) -> None:
        self.net.compile(backend="aot_eager")


class Halves(Plain):
    """Changes its gradients after backward."""

    def on_after_backward(self) -> None:
        for p in self.parameters():
            p.grad = None if p.grad is None else p.grad / 2


class HalvesFromOutside(L.Callback):
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        Halves.on_after_backward(pl_module)


class BackwardTwice(Plain):
    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        (loss / 2).backward(retain_graph=True)
        (loss / 2).backward()


def run(
    folder: Path, make: Callable[[], Plain], algorithm: Any, transport: Transport, **trainer: Any
) -> list[dict[str, Any]]:
    """Every rank's report; its extra is how many buckets were gone when backward ended, by step,
    and what the log said.
    """
    gone: list[int] = []
    said: list[str] = []
    log = logging.getLogger("lightning_byz")
    wanted = Overlap.gradient

    def gradient(self: Overlap) -> Any:
        if self._upload is not None:
            gone.append(self._sent)
        return wanted(self)

    strategy = ByzantineRobustStrategy(algorithm, transport, start_method="fork", seed=5)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Overlap, "gradient", gradient)
        patched.setattr(log, "info", said.append)
        L.seed_everything(7)
        return fit(
            folder,
            make(),
            strategy,
            devices=RANKS,
            data=loader(8),
            extra=lambda *_: (list(gone), list(said)),
            **{"max_epochs": 9, "max_steps": 4, **trainer},
        )


CASES: dict[str, tuple[Callable[[], Plain], Any, dict[str, Any], bool]] = {
    # the model, the algorithm, arguments of the Trainer, and whether all of a step's buckets but
    # the last should be gone before backward ends
    "median": (Plain, MEDIAN, {}, True),
    "adam": (lambda: Plain(optimizer="adam"), MEDIAN, {}, True),
    "momenta": (
        Plain,
        RobustSGD(TrimmedMean(), worker_momentum=0.9, undo_worker_momentum=True),
        {},
        True,
    ),
    "server momentum": (Plain, RobustSGD(CoordinateMedian(), server_momentum=0.9), {}, True),
    "a rule that needs distances": (
        Plain,
        RobustSGD(Chain(pre=(NNM(),), rule=TrimmedMean()), worker_momentum=0.5),
        {},
        True,
    ),
    "the default": (
        Plain,
        RobustSGD(ByHeterogeneity(), worker_momentum=0.9, undo_worker_momentum=True),
        {},
        True,
    ),
    "votes": (Plain, SignSGDMajorityVote(), {}, True),
    "accumulation": (Plain, MEDIAN, {"accumulate_grad_batches": 2}, True),
    "a gradient from an earlier micro-batch": (
        FirstHalfOnly,
        MEDIAN,
        {"accumulate_grad_batches": 2},
        False,
    ),
    "clipping": (Plain, MEDIAN, {"gradient_clip_val": 0.1}, True),
    "batch norm": (lambda: Plain(norm=True), MEDIAN, {}, True),
    "frozen": (lambda: Plain(frozen=True), MEDIAN, {}, True),
    "unused": (lambda: Plain(unused=True), MEDIAN, {}, False),
    "no loss": (Lossless, MEDIAN, {}, True),
    "bfloat16": (Plain, MEDIAN, {"precision": "bf16-true"}, True),
    "bfloat16, mixed": (Plain, MEDIAN, {"precision": "bf16-mixed"}, True),
    "checkpointing": (lambda: Plain(checkpointing=True), MEDIAN, {}, True),
    "lbfgs": (lambda: Plain(optimizer="lbfgs"), MEDIAN, {}, True),
    "a hook that changes gradients": (Halves, MEDIAN, {}, True),
    "a callback that changes gradients": (
        Plain,
        MEDIAN,
        {"callbacks": [HalvesFromOutside()]},
        True,
    ),
    "compiled": (Compiled, MEDIAN, {}, False),  # gradients may come all at once
}


@pytest.mark.thorough(keep=5)
@pytest.mark.parametrize("name", CASES)
def test_overlap_changes_nothing_but_when_bytes_leave(name: str, tmp_path: Path) -> None:
    make, algorithm, trainer, early = CASES[name]
    after = run(tmp_path / "after", make, algorithm, Sharded(overlap=False), **trainer)
    during = run(tmp_path / "during", make, algorithm, Sharded(bucket_size=1), **trainer)
    for a, b in zip(after, during, strict=True):
        assert a["extra"][0] == []
        # its sums are added up shard by shard
        assert_close(a, b, tolerance=1e-6) if name == "the default" else assert_equal(a, b)
    counts, said = during[0]["extra"]
    assert "byzantine_robust: gradients are exchanged while backward runs." in said
    assert len(counts) > 4 if name == "lbfgs" else len(counts) == 4
    if early:
        assert min(counts) >= 1, counts


@pytest.mark.parametrize(
    ("make", "algorithm", "trainer", "reason"),
    [
        (Plain, ByzEF21SGDM(CoordinateMedian()), {}, "ByzEF21SGDM looks at the whole vector"),
        (
            lambda: Plain(unused=True, norm=True),
            ByzEF21SGDM(),
            {"accumulate_grad_batches": 2},
            "ByzEF21SGDM looks at the whole vector",
        ),
        (Plain, MEDIAN, cpu_amp(), "a loss scaler"),
        (BackwardTwice, MEDIAN, {}, "BackwardTwice has a `backward` of its own"),
    ],
    ids=["whole vector", "whole vector, accumulation", "loss scaler", "backward"],
)
def test_what_needs_the_whole_gradient_waits_and_says_so(
    make: Any, algorithm: Any, trainer: Any, reason: str, tmp_path: Path
) -> None:
    after = run(tmp_path / "after", make, algorithm, Sharded(overlap=False), **trainer)
    during = run(tmp_path / "during", make, algorithm, Sharded(bucket_size=1), **trainer)
    for a, b in zip(after, during, strict=True):
        assert b["extra"][0] == []
        assert_equal(a, b)
    assert len([line for line in during[0]["extra"][1] if reason in line]) == 1


def test_an_attack_sees_whole_messages(tmp_path: Path) -> None:
    found = [
        run(
            tmp_path / name,
            Plain,
            MEDIAN,
            transport,
            callbacks=[ByzantineWorkers(NotANumber(), workers=[2])],
        )
        for name, transport in (
            ("after", Sharded(overlap=False)),
            ("during", Sharded(bucket_size=1)),
        )
    ]
    assert found[1][0]["extra"][0] == []
    assert_equal(found[0][0], found[1][0])


def test_monitors_see_the_same_rows(tmp_path: Path) -> None:
    found = []
    for name, transport in (("whole", AllGather()), ("during", Sharded(bucket_size=1))):
        monitors = [RobustnessMonitor(every_n_steps=1), SuspicionMonitor(every_n_steps=2)]
        found.append(run(tmp_path / name, Plain, MEDIAN, transport, callbacks=monitors))
    (whole, *_), (during, *_) = found
    assert_equal(whole, during)
    assert len(during["extra"][0]) == 4
    assert {name for name in during["metrics"] if name.startswith("byz/")} == {
        n for n in whole["metrics"] if n.startswith("byz/")
    }
    for name, value in whole["metrics"].items():
        if "bytes" not in name:
            assert during["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_gradient_that_comes_twice_costs_a_step_and_no_more(tmp_path: Path) -> None:
    """What was sent of it is wrong, so that everybody is silent in the first step; then nobody
    sends during backward any more.
    """
    after = run(tmp_path / "after", Twice, MEDIAN, Sharded(overlap=False), max_steps=3)
    during = run(
        tmp_path / "during",
        Twice,
        MEDIAN,
        Sharded(bucket_size=1),
        max_steps=4,
        limit_train_batches=4,
    )
    assert len(during[0]["extra"][0]) == 1
    assert all(
        torch.equal(during[0]["weights"][name], during[1]["weights"][name])
        for name in during[0]["weights"]
    )
    assert after[0]["steps"] == 3


def test_a_module_keeps_no_hook_of_a_run_that_is_over(tmp_path: Path) -> None:
    """Its next backward pass is nobody's but its own."""

    class Afterwards(Plain):
        def on_fit_end(self) -> None:
            self.trainer.strategy.teardown()
            self.net(torch.ones(2, 10)).sum().backward()
            kept = [
                p.grad is not None and not p._post_accumulate_grad_hooks for p in self.parameters()
            ]
            torch.save(kept, tmp_path / f"kept{self.trainer.global_rank}.pt")

    found = run(tmp_path / "during", Afterwards, MEDIAN, Sharded(bucket_size=1))
    assert len(found[0]["extra"][0]) == 4
    assert all(torch.load(tmp_path / f"kept{rank}.pt") == [True] * 4 for rank in range(RANKS))


@pytest.mark.parametrize("size", [0, 1.5, True])
def test_a_bucket_holds_something(size: Any) -> None:
    with pytest.raises(ValueError, match="bucket_size"):
        Sharded(bucket_size=size)


class Gathers(Plain):
    """Ranks gather something in the middle of a backward pass."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        def met(gradient: torch.Tensor) -> None:
            ranks = self.all_gather(torch.tensor(float(self.global_rank)))
            assert ranks.tolist() == [0.0, 1.0, 2.0]

        hidden = self.net[0](batch[0])
        hidden.register_hook(met)
        return loss_of(self.net[1:], [hidden, batch[1]])


def test_ranks_may_exchange_something_else_during_backward(tmp_path: Path) -> None:
    after = run(tmp_path / "after", Gathers, MEDIAN, Sharded(overlap=False))
    during = run(tmp_path / "during", Gathers, MEDIAN, Sharded(bucket_size=1))
    for a, b in zip(after, during, strict=True):
        assert_equal(a, b)
    assert min(during[0]["extra"][0]) >= 1


# -- the thread ------------------------------------------------------------------------------------


class Upload:
    """Takes the buckets of some layers as `BucketedMessages` does, once it may."""

    def __init__(self, layers: int) -> None:
        self.left = [(30 * i, 30 * i + 30) for i in reversed(range(layers))]
        self.may, self.fails = threading.Event(), False
        self.sent: list[torch.Tensor] = []
        self.threads: list[int] = []
        self.opened: list[int] = []  # how many were sent before

    def open(self, x: torch.Tensor, spend: bool) -> Upload:
        self.opened.append(len(self.sent))
        return self

    def send(self, grads: list[torch.Tensor]) -> None:
        assert self.may.wait(100)
        if self.fails:
            self.fails = False
            raise RankLostError("rank 1")
        assert not torch.is_grad_enabled()
        self.sent.append(grads[0].clone())
        self.threads.append(threading.get_ident())


class Waiting(deque):
    """Lets an upload go on when somebody waits for it."""

    def __init__(self, upload: Upload) -> None:
        super().__init__()
        self.upload, self.most = upload, 0

    def append(self, job: Any) -> None:
        super().append(job)
        self.most = max(self.most, len(self))

    def popleft(self) -> Any:
        self.upload.may.set()
        return super().popleft()


class Layers:
    """Some layers whose buckets an upload takes, and a pass through all but the first ``skip``."""

    def __init__(self, count: int = 4, skip: int = 0) -> None:
        self.upload, self.skip = Upload(count), skip
        self.net = nn.Sequential(*(nn.Linear(5, 5) for _ in range(count)))
        layout = FlatParameters(list(self.net.parameters()))
        algorithm = SimpleNamespace(coordinate_wise=True)
        exchange = SimpleNamespace(algorithm=algorithm, open=self.upload.open)
        self.overlap = Overlap(layout, exchange)  # type: ignore[arg-type]
        self.overlap._under_way = self.waiting = Waiting(self.upload)
        self.watched = [
            layout.watch(p, partial(self.overlap.arrived, i, p))
            for i, p in enumerate(layout.parameters)
        ]

    def backward(self) -> None:
        with self.overlap.during_backward():
            self.net[self.skip :](torch.randn(3, 5)).square().sum().backward()

    def assert_sent(self, sent: list[torch.Tensor]) -> None:
        """They are the gradient's buckets, as far as those were full."""
        whole = self.overlap.gradient()
        assert whole is not None and len(sent) == len(self.net) - self.skip
        for (first, last), bucket in zip(self.upload.left, sent, strict=False):
            assert bucket.any() and torch.equal(bucket, whole[first:last])


@pytest.mark.parametrize(("count", "skip", "behind"), [(4, 0, 3), (4, 1, 3), (9, 0, 3), (2, 1, 1)])
def test_backward_goes_on_while_buckets_are_sent(
    count: int, skip: int, behind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread may be behind, by 360 bytes here; what it has sent is the gradient all the
    same.
    """
    monkeypatch.setattr(overlap, "_BACKLOG", 360)
    layers = Layers(count, skip)
    layers.backward()
    here = threading.get_ident()
    if skip:  # the last bucket is never full, so that nobody has waited
        assert layers.upload.sent == []
    layers.overlap.gradient()
    assert layers.waiting.most == behind
    assert [t == here for t in layers.upload.threads] == [False] * (count - 1) + [True] * (not skip)
    layers.assert_sent(layers.upload.sent)
    assert all(p.grad is None for p in layers.net.parameters())


def test_what_the_thread_meets_is_raised_where_backward_ends() -> None:
    """Nothing is sent in the place of what could not be."""
    layers = Layers()
    layers.upload.fails = True
    with pytest.raises(RankLostError, match="rank 1"):
        layers.backward()
    with pytest.raises(RuntimeError, match="broken off"):
        layers.overlap.gradient()
    assert layers.upload.sent == []


def test_a_pass_that_is_broken_off_leaves_nothing_to_the_next() -> None:
    layers = Layers()
    stop = layers.net[0].register_forward_hook(
        lambda _, inputs, out: out.register_hook(lambda gradient: 1 / 0) and None
    )
    with pytest.raises(ZeroDivisionError):
        layers.backward()
    assert layers.upload.sent == []  # not yet
    stop.remove()
    layers.backward()
    assert layers.upload.opened == [0, 3]
    layers.assert_sent(layers.upload.sent[3:])
