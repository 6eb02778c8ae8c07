"""What a training step leaves behind: attributes, outputs and buffers, of in-process workers and of
ranks.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from harness import QUIET, assert_close, assert_equal, averaging, fit, forked_ddp
from lightning.pytorch.plugins.environments import LightningEnvironment
from models import Plain, loader, loss_of
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_byz import SignSGDMajorityVote
from lightning_byz.lightning import ByzantineRobustStrategy
from lightning_byz.strategies.module_attributes import ChangesByHand, WorkerAttributes
from lightning_byz.strategies.module_buffers import WorkerBuffers
from lightning_byz.strategies.step_outputs import joined

N = 4
processes = pytest.mark.processes
BOTH = [pytest.param(1, id="in-process"), pytest.param(N, id="ranks", marks=processes)]


# -- attributes ------------------------------------------------------------------------------------


class Recurrent(L.LightningModule):
    """Truncated backpropagation through time: the hidden state goes from batch to batch in an
    attribute.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.RNN(3, 5, batch_first=True), nn.Linear(5, 1)
        self.hidden, self.steps = None, 0
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        y, hidden = self.rnn(batch[0], self.hidden)
        self.hidden, self._private = hidden.detach(), batch_idx
        self.steps += 1000  # no small integer, which Python has only once
        return (self.out(y) - batch[1]).pow(2).mean()

    def on_train_epoch_start(self) -> None:
        self.hidden = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@processes
def test_an_rnns_state_is_each_workers_own_as_on_ranks(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(10, 8, 6, 3, generator=g), torch.randn(10, 8, 6, 1, generator=g)

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            ranks, rank = self.trainer.world_size, self.trainer.global_rank
            share = slice(8 * rank // ranks, 8 * (rank + 1) // ranks)
            return DataLoader(
                TensorDataset(x[:, share].flatten(0, 1), y[:, share].flatten(0, 1)),
                batch_size=8 // ranks,
            )

    runs = []
    for devices, strategy in ((1, averaging(workers_per_process=N)), (N, forked_ddp())):
        torch.manual_seed(1)
        extra = lambda _, module: (module.steps, module._private)  # noqa: E731
        runs += fit(
            tmp_path,
            Recurrent(),
            strategy,
            devices=devices,
            data=Data(),
            max_epochs=2,
            use_distributed_sampler=False,
            extra=extra,
        )[:1]
    assert_close(*runs)
    assert runs[0]["extra"] == runs[1]["extra"] == (20_000, 9)


def test_attributes_by_worker() -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.count, self.inner = "start", nn.Sequential()

    module = Module()
    attributes = WorkerAttributes(module, 2)
    for worker in (0, 1):
        with attributes.of(worker):
            assert module.count == "start"
            assert not hasattr(module, "made")
            module.count, module.made = f"{worker}", [worker]
        assert module.count == "start"
        assert not hasattr(module, "made")
    attributes.show()
    assert (module.count, module.made) == ("0", [0])
    for worker in (0, 1):
        with attributes.of(worker):
            assert (module.count, module.made) == (f"{worker}", [worker])
    with attributes.scratch(1):
        assert module.count == "1"
        module.count = "forgotten"
    attributes.show()
    module.count = "between"  # somebody assigns it between steps: it is everybody's
    for worker in (0, 1):
        with attributes.of(worker):
            assert (module.count, module.made) == ("between", [worker])


def test_what_a_step_changes_by_hand_is_named_once(tmp_path: Path) -> None:
    class Teacher(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)
            self.losses: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            for p, q in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                p.data.lerp_(q.data + 1, 0.1)
            self.losses.append(0.0)
            return loss_of(self.net, batch)

    with pytest.warns(
        UserWarning, match=r"training_step changes teacher.0.weight, .* and \d+ more by hand"
    ) as said:
        L.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            devices=1, max_epochs=1, strategy=averaging(workers_per_process=N),
        ).fit(Teacher(), loader())  # fmt: skip
    assert len([w for w in said if "by hand" in str(w.message)]) == 1
    module = Teacher()
    changes = ChangesByHand(module)
    module.seen.append(1)
    assert changes.names() == ["seen"]


# -- outputs ---------------------------------------------------------------------------------------


def test_outputs_of_workers_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    class Returns(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            logits = self.net(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            return {
                "loss": loss,
                "logits": logits.detach(),
                "mean": logits.detach().mean(),
                "names": ["a"] * len(logits),
            }

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert len(outputs["logits"]) == len(outputs["names"]) == len(batch[0])
            assert outputs["mean"] == pytest.approx(float(outputs["logits"].mean()), abs=1e-6)
            assert outputs["loss"].ndim == 0
            self.seen.append(outputs["logits"].sum().item())

    runs = []
    for strategy in ("auto", averaging(workers_per_process=N)):
        torch.manual_seed(1)
        runs += fit(tmp_path, Returns(), strategy)
    assert runs[0]["seen"] == pytest.approx(runs[1]["seen"], abs=1e-4)


def test_joined() -> None:
    a, b = torch.ones(2, 3), torch.zeros(1, 3)
    assert torch.equal(joined([a, b]), torch.cat([a, b]))
    assert joined([{"x": a, "only": 1}, {"x": b}])["x"].shape == (3, 3)
    assert [t.shape for t in joined([(a, a), (b, b)])] == [(3, 3), (3, 3)]
    assert joined(["first", "second"]) == "first"
    assert joined([a, torch.ones(2, 4)]) is a
    assert joined([torch.tensor(1), torch.tensor(2)]) == 1.5


# -- gradients past the rule -----------------------------------------------------------------------


class Gathers(Plain):
    sync_grads = True

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        z = self.net(batch[0])
        return (z @ self.all_gather(z, sync_grads=self.sync_grads).reshape(-1, 3).T).pow(2).mean()


class GathersConstants(Gathers):
    sync_grads = False


@pytest.mark.parametrize("devices", BOTH)
def test_gathering_with_gradients_is_refused(devices: int, tmp_path: Path) -> None:
    strategy = averaging(workers_per_process=N) if devices == 1 else averaging(start_method="fork")
    with pytest.raises(Exception, match="sync_grads=True.*past the rule"):
        fit(tmp_path, Gathers(), strategy, devices=devices, data=loader(24 if devices == 1 else 6))


def test_gathering_in_a_step_of_in_process_workers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"self.all_gather in training_step.*workers_per_process=4.*devices=n"
    ):
        fit(tmp_path, GathersConstants(), averaging(workers_per_process=N))


@processes
def test_gathering_constants_is_ddps(tmp_path: Path) -> None:
    runs = []
    for strategy in (forked_ddp(), averaging(start_method="fork")):
        L.seed_everything(1, verbose=False)
        runs += fit(tmp_path, GathersConstants(), strategy, devices=3, data=loader(8))[:1]
    assert_close(*runs)


def test_synchronized_batchnorm_in_the_module_is_refused(tmp_path: Path) -> None:
    class Synced(Plain):
        def __init__(self) -> None:
            super().__init__(norm=True)
            self.net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)

    with pytest.raises(ValueError, match=r"SyncBatchNorm lets every worker.*net.1.*Use BatchNorm"):
        fit(tmp_path, Synced(), averaging(workers_per_process=N))


# -- buffers ---------------------------------------------------------------------------------------


class Queue(Plain):
    """Keeps the last keys, of unit length, in a buffer that the loss looks at, and an average in
    another one.
    """

    def __init__(self, bad: int | None = None) -> None:
        super().__init__()
        self.bad = bad
        self.register_buffer("queue", F.normalize(torch.randn(12, 3), dim=1))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(3))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        z = F.normalize(self.net(batch[0]), dim=1)
        at, keys = int(self.at), z.detach()[:2]
        spoilt = self.bad is not None and self.global_rank == self.bad and batch_idx == 2
        self.queue[at : at + 2] = keys * (torch.nan if spoilt else 1)
        self.at.fill_((at + 2) % 12)
        self.average.lerp_(z.detach().mean(0), 0.5)
        return torch.logsumexp(z @ self.queue.clone().nan_to_num().T, 1).mean()


@pytest.mark.parametrize("devices", BOTH)
def test_data_in_buffers_are_one_workers_and_statistics_are_aggregated(
    devices: int, tmp_path: Path
) -> None:
    common = {"aggregated_buffers": ["aver*"]}
    strategy = (
        ByzantineRobustStrategy(workers_per_process=N, **common)
        if devices == 1
        else ByzantineRobustStrategy(start_method="fork", **common)
    )
    reports = fit(
        tmp_path, Queue(), strategy, devices=devices, data=loader(24 if devices == 1 else 6)
    )
    for report in reports:
        assert_equal(reports[0], report)
        assert report["weights"]["queue"].norm(dim=1) == pytest.approx(torch.ones(12), abs=1e-5)
        assert int(report["weights"]["at"]) == 2 * 10 % 12


@processes
@pytest.mark.parametrize("bad", [0, 1])
def test_data_of_the_next_worker_where_the_first_ones_are_not_finite(
    bad: int, tmp_path: Path
) -> None:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(logging.getLogger("lightning_byz"), "info", said.append)
        reports = fit(
            tmp_path,
            Queue(bad),
            ByzantineRobustStrategy(start_method="fork"),
            devices=N,
            data=loader(6),
            extra=lambda *_: list(said),
        )
    for report in reports:
        assert_equal(reports[0], report)
        assert torch.isfinite(report["weights"]["queue"]).all()
    moved = [line for line in reports[0]["extra"] if "buffers that are data" in line]
    assert [line.partition("worker ")[2][0] for line in moved] == (["1", "0"] if bad == 0 else [])


def test_buffers_that_should_be_aggregated_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`aggregated_buffers`.*'nothing\*'.*queue, at, average"):
        fit(
            tmp_path,
            Queue(),
            ByzantineRobustStrategy(workers_per_process=N, aggregated_buffers=["nothing*"]),
        )


@processes
def test_buffers_that_a_callback_changes_between_steps_do_not_travel(tmp_path: Path) -> None:
    class Smooth(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            module.smooth.lerp_(module.net[0].weight.detach(), 0.5)

    class Smoothed(Plain):
        def __init__(self) -> None:
            super().__init__(norm=True)
            self.register_buffer("smooth", torch.zeros(16, 10))

    travelled: list[int] = []
    merge = WorkerBuffers.merge

    def counting(self: WorkerBuffers, transport: Any, touched: torch.Tensor, *args: Any) -> None:
        travelled.append(sum(self.start[i].numel() for i in touched.nonzero().flatten().tolist()))
        merge(self, transport, touched, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(WorkerBuffers, "merge", counting)
        reports = fit(
            tmp_path, Smoothed(), averaging(start_method="fork"), devices=3, data=loader(8), callbacks=[Smooth()],
            extra=lambda *_: list(travelled),
        )  # fmt: skip
    for report in reports:
        assert_equal(reports[0], report)
        assert set(report["extra"]) == {16 + 16 + 1}  # BatchNorm's own
        assert report["weights"]["smooth"].any()


@pytest.mark.parametrize("devices", BOTH)
def test_buffers_may_come_go_and_be_sparse(devices: int, tmp_path: Path) -> None:
    class Prunes(Plain):
        def __init__(self) -> None:
            super().__init__(norm=True)
            prune.l1_unstructured(self.net[0], "weight", amount=0.5)
            self.register_buffer("table", torch.eye(4).to_sparse())
            self.register_buffer("later", None)
            self.register_buffer("gone", torch.zeros(2))

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                prune.remove(self.net[0], "weight")
            if batch_idx == 4:
                self.later, self.gone = torch.zeros(3), None

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.later is not None:
                self.later += 1
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net[3].parameters(), 0.1)

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {
                k: v
                for k, v in super().state_dict(*args, **kwargs).items()
                if v is not None and not v.is_sparse
            }

    strategy = averaging(workers_per_process=N) if devices == 1 else averaging(start_method="fork")
    reports = fit(
        tmp_path, Prunes(), strategy, devices=devices, data=loader(24 if devices == 1 else 6)
    )
    for report in reports:
        assert_equal(reports[0], report)
        assert report["weights"]["later"].tolist() == [6.0] * 3


# -- what is never sent ----------------------------------------------------------------------------


@pytest.mark.parametrize("devices", BOTH)
def test_frozen_parameters_may_be_anything(devices: int, tmp_path: Path) -> None:
    class Quantized(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Parameter(
                torch.randint(0, 255, (10, 10), dtype=torch.uint8), requires_grad=False
            )
            self.small = nn.Parameter(torch.ones(10, dtype=torch.int8), requires_grad=False)
            self.phase = nn.Parameter(torch.ones(10, dtype=torch.complex64), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x @ (self.base.float() / 128 - 1) * self.small * self.phase.real)

    runs = []
    others = (
        ("auto", averaging(workers_per_process=N))
        if devices == 1
        else (forked_ddp(), averaging(start_method="fork"))
    )
    for strategy in others:
        L.seed_everything(1, verbose=False)
        runs += fit(
            tmp_path, Quantized(), strategy, devices=devices, data=loader(24 if devices == 1 else 6)
        )[:1]
    assert_close(*runs)


# -- processes that somebody else started ----------------------------------------------------------


class Theirs(LightningEnvironment):
    """What Ray's trainer hands to Lightning: it knows the ranks, and takes no other numbers for
    them.
    """

    creates_processes_externally = True

    def __init__(self, rank: int, size: int, local_rank: int | None = None) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self._local_rank = rank if local_rank is None else local_rank

    def world_size(self) -> int:
        return self.size

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self.rank

    def local_rank(self) -> int:
        return self._local_rank

    def set_global_rank(self, rank: int) -> None:
        pass


def train_as_told(rank: int, size: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size
    )

    class OnTheirDevice(ByzantineRobustStrategy):
        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu")

    L.seed_everything(1, verbose=False)
    model = Plain()
    trainer = L.Trainer(
        **QUIET, devices=1, max_epochs=1, strategy=OnTheirDevice(), plugins=[Theirs(rank, size)]
    )
    trainer.fit(model, loader(8))
    torch.save((trainer.world_size, model.seen, model.state_dict()), folder / f"told{rank}.pt")


@processes
def test_processes_that_somebody_else_started_are_one_run(tmp_path: Path) -> None:
    start_processes(train_as_told, args=(3, tmp_path), nprocs=3, start_method="fork")
    worlds, seen, weights = zip(
        *(torch.load(tmp_path / f"told{rank}.pt") for rank in range(3)), strict=True
    )
    assert worlds == (3, 3, 3)
    assert sum(map(len, seen)) == len(set().union(*seen)) == 240
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())


def test_one_process_has_a_group_for_code_that_asks(tmp_path: Path) -> None:
    class Asks(Plain):
        def on_train_start(self) -> None:
            assert torch.distributed.get_rank() == 0
            assert torch.distributed.get_world_size() == 1

    fit(tmp_path, Asks(), ByzantineRobustStrategy(workers_per_process=N))
    assert not torch.distributed.is_initialized()


def test_a_group_that_is_larger_than_the_run_is_an_error(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.distributed, "is_initialized", lambda: True)
        patched.setattr(torch.distributed, "get_world_size", lambda *_: 3)
        with pytest.raises(ValueError, match=r"Found 1 .* and a group of 3"):
            fit(tmp_path, Plain(), ByzantineRobustStrategy(workers_per_process=N))


def test_arguments_of_ddp_are_taken_and_answered() -> None:
    with pytest.warns(
        UserWarning, match=r"not needed.*find_unused_parameters: .*static_graph: "
    ) as said:
        ByzantineRobustStrategy(
            SignSGDMajorityVote(), find_unused_parameters=True, static_graph=False
        )
    assert len(said) == 1
    with pytest.raises(TypeError, match="no argument 'num_byzantin'"):
        ByzantineRobustStrategy(num_byzantin=1)


@pytest.mark.parametrize(
    ("samples", "words"), [(6, "at least two samples for each worker"), (24, None)]
)
def test_batch_normalization_with_one_sample_says_so_in_words_about_workers(
    tmp_path: Path, samples: int, words: str | None
) -> None:
    strategy = ByzantineRobustStrategy(workers_per_process=6)
    trainer = L.Trainer(**QUIET, max_epochs=1, limit_train_batches=1, strategy=strategy)
    if words is None:
        trainer.fit(Plain(norm=True), loader(samples))
        return
    with pytest.raises(ValueError, match=words) as failed:
        trainer.fit(Plain(norm=True), loader(samples))
    assert "batch_size of at least 12" in str(failed.value)
    assert "more than 1 value per channel" in str(failed.value)
