"""The parameter server in real processes: the same results as in one, and runs that outlive their
workers.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchmetrics
from harness import QUIET, Report, assert_close, assert_equal, averaging, fit, forked_ddp
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from models import GAN, Plain, blobs, loader
from ports import own_port
from ranks import Ranks
from zoo import ALGORITHMS, rows_for

from lightning_byz import (
    ByzEF21SGDM,
    CoordinateMedian,
    DStar,
    ParameterServer,
    RobustSGD,
    TrimmedMean,
)
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import Contribution
from lightning_byz.lightning import ByzantineRobustStrategy, Stragglers
from lightning_byz.strategies.server_processes import ServerProcesses
from lightning_byz.strategies.validate import UnsupportedSetupError
from lightning_byz.transports import InProcess
from lightning_byz.types import Gradients

pytestmark = pytest.mark.processes


def job(
    devices: int,
    make: Callable[..., Any] = averaging,
    *,
    module: Callable[[], L.LightningModule] = Plain,
    callbacks: Callable[[Path], list[Any]] = lambda folder: [],
    data: Callable[[], Any] = loader,
    val: Callable[[], Any] = lambda: None,
    extra: Any = None,
    server: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
    **trainer: Any,
) -> Callable[[Path], None]:
    """What every rank runs: a fit with the strategy ``make(transport=...)``."""

    def run(folder: Path) -> None:
        torch.manual_seed(0)
        strategy = make(
            transport=ParameterServer(
                keys=folder / "keys",
                **{"lost_after": 5.0, "start_timeout": 300.0, **(server or {})},
            )
        )
        settings = {name: value() if name == "logger" else value for name, value in trainer.items()}
        fitted = L.Trainer(
            **{**QUIET, "max_epochs": 1, "devices": devices, **settings},
            strategy=strategy,
            callbacks=[*callbacks(folder), Report(folder, extra)],
        )
        fitted.fit(module(), data(), val(), ckpt_path=ckpt_path)

    return run


def reports(folder: Path, *ranks: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in ranks]


class Watch(L.Callback):
    """Writes down who was present in every round, at the server."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.present: list[list[int]] = []
        self.why: list[dict[int, str]] = []
        exchange = trainer.strategy.exchanges[0]

        def watch(outcome: Any) -> None:
            self.present.append(outcome.round.present.nonzero().flatten().tolist())
            self.why.append({w: exchange.transport.why_silent(w) for w in outcome.silent})

        exchange.observers.append(watch)


def watched(trainer: L.Trainer) -> Watch:
    return next(callback for callback in trainer.callbacks if isinstance(callback, Watch))


def present(trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
    return watched(trainer).present


def present_and_why(trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
    return watched(trainer).present, watched(trainer).why


class Dies(L.Callback):
    """Kills its own process, once, at a certain moment: (rank, moment, step)."""

    def __init__(self, folder: Path, *deaths: tuple[int, str, int]) -> None:
        self.folder, self.deaths = folder, deaths

    def _perhaps(self, trainer: L.Trainer, moment: str) -> None:
        for rank, when, step in self.deaths:
            mark = self.folder / f"died{rank}"
            if (
                trainer.global_rank == rank
                and when == moment
                and trainer.global_step >= step
                and not mark.exists()
            ):
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._perhaps(trainer, "forward")

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self._perhaps(trainer, "after the exchange")

    def on_after_backward(self, trainer: L.Trainer, *_: Any) -> None:
        if any(rank == trainer.global_rank and when == "exchange" for rank, when, _ in self.deaths):
            client = trainer.strategy.transport._client
            poll = client._poller.poll
            name = f"round#{trainer.strategy.transport._calls.get('round', 0) + 1}"

            def asked(timeout: int) -> Any:
                if trainer.strategy.transport._calls.get("round") and name:
                    self._perhaps(trainer, "exchange")  # the message is on its way, or not
                return poll(timeout)

            client._poller.poll = asked

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._perhaps(trainer, "validation")

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self._perhaps(trainer, "checkpoint")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._perhaps(trainer, "end of the epoch")


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize(
    "module",
    [Plain, functools.partial(Plain, norm=True), GAN],
    ids=["plain", "buffers", "two_optimizers"],
)
def test_a_mean_is_what_collectives_compute(module: Any, tmp_path: Path) -> None:
    """Weights, buffers and logged values; automatic and manual optimization."""
    with Ranks(tmp_path / "served", 3, job(3, module=module)) as ranks:
        assert ranks.wait() == {0: 0, 1: 0, 2: 0}, ranks.everything()
    served = reports(tmp_path / "served", 0, 1, 2)
    torch.manual_seed(0)
    gathered = fit(
        tmp_path / "gathered", module(), averaging(start_method="fork"), devices=3, data=loader()
    )
    for report in served:
        assert_equal(report, served[0])
        assert_close(report, gathered[0])
        assert report["metrics"] == pytest.approx(gathered[0]["metrics"])


@pytest.mark.thorough
def test_every_algorithm_gives_what_it_gives_in_one_process(tmp_path: Path) -> None:
    """Bit for bit: three processes of three workers each, the worker's half there and the server's
    here.
    """
    n, d, rounds = 9, 8, 4
    like = torch.zeros(d, dtype=torch.float64)
    used = torch.ones(2, dtype=torch.bool)

    def estimates(exchange: Exchange) -> list[Any]:
        made: list[Any] = []
        for step in range(rounds):
            grads = rows_for(n, d, seed=step)
            rows = [
                Contribution(Gradients(grads[w], grads[w].flip(0)), used)
                for w in exchange.transport.workers
            ]
            outcome = exchange.run(rows, like + step)
            # its memory is used again
            made.append((outcome.estimate.clone(), outcome.round.present, outcome.used))
        return made

    def every_algorithm(folder: Path) -> None:
        rank = int(os.environ["LOCAL_RANK"])
        transport = ParameterServer(keys=folder / "keys", start_timeout=300.0)
        transport.open(rank, 3, "127.0.0.1", int(os.environ["MASTER_PORT"]), 1000)
        transport.wait_for_all()
        transport.connect(rank, 3, 3, torch.device("cpu"))
        made = {}
        for position, case in enumerate(ALGORITHMS):
            transport.at(position + 1)
            made[case.name] = estimates(Exchange(case.algorithm, transport, seed=3))
        transport.shut()
        torch.save(made, folder / f"made{rank}.pt")

    with Ranks(tmp_path, 3, every_algorithm) as ranks:
        assert ranks.wait() == {0: 0, 1: 0, 2: 0}, ranks.everything()
    made = [torch.load(tmp_path / f"made{rank}.pt") for rank in range(3)]
    for case in ALGORITHMS:
        alone = InProcess()
        alone.connect(0, 1, n, torch.device("cpu"))
        expected = estimates(Exchange(case.algorithm, alone, seed=3))
        for step in range(rounds):
            for rank in range(3):
                (estimate, here, uses), (server, server_here, _) = (
                    made[rank][case.name][step],
                    made[0][case.name][step],
                )
                assert (
                    torch.equal(estimate, server)
                    and torch.equal(here, server_here)
                    and bool(uses.all())
                ), case.name
                if isinstance(case.algorithm, DStar):  # the first k that really arrive
                    assert int(here.sum()) == case.algorithm.count(n), case.name
                    continue
                assert torch.equal(here, expected[step][1])
                # a matrix product's last bits depend on where in memory its factors lie
                if "low_rank" in case.name:
                    torch.testing.assert_close(estimate, expected[step][0], rtol=1e-12, atol=1e-12)
                else:
                    assert torch.equal(estimate, expected[step][0]), (case.name, step)


def test_workers_killed_at_any_moment(tmp_path: Path) -> None:
    """Each in another one, until the server is alone; Lightning's own collectives go on with those
    that are left.
    """
    deaths = [
        (1, "forward", 2),
        (2, "exchange", 4),
        (3, "validation", 5),
        (4, "checkpoint", 5),
        (5, "end of the epoch", 5),
    ]

    def callbacks(folder: Path) -> list[Any]:
        checkpoints = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", monitor="val_loss")
        return [Watch(), Dies(folder, *deaths), checkpoints]

    settings = {"enable_checkpointing": True, "max_epochs": 2, "num_sanity_val_steps": 1}
    run = job(
        6,
        callbacks=callbacks,
        val=loader,
        data=lambda: loader(8),
        extra=present_and_why,
        **settings,
    )
    with Ranks(tmp_path, 6, run) as ranks:
        assert ranks.wait() == {0: 0, **dict.fromkeys(range(1, 6), -signal.SIGKILL)}, (
            ranks.everything()
        )
    (report,) = reports(tmp_path, 0)
    heard, why = report["extra"]
    assert report["steps"] == len(heard) == 10
    assert heard[0] == [0, 1, 2, 3, 4, 5] and heard[2] == [0, 2, 3, 4, 5] and heard[-1] == [0]
    assert why[0] == {} and why[2] == {1: "was not heard (its process: gone)"}
    assert {"epoch=0.ckpt", "epoch=1.ckpt"} <= {path.name for path in tmp_path.iterdir()}
    assert "val_loss" in report["metrics"]


def appears(file: Path) -> None:
    """Waits for a file."""
    deadline = time.monotonic() + 300
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.01)


class ComesBack(L.Callback):
    """At the server: waits in a batch until this rank, which has died, asks to join again, and in
    a later one, by default the next, until it is there.
    """

    def __init__(self, folder: Path, step: int, rank: int, there: int | None = None) -> None:
        self.folder, self.step, self.rank, self.there = folder, step, rank, there or step + 1

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank != 0 or trainer.global_step not in (self.step, self.there):
            return
        (self.folder / "waits").touch()
        member = trainer.strategy.transport._server.desk.members[self.rank]
        deadline = time.monotonic() + 300
        while not (member.wants if trainer.global_step == self.step else member.active):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize(
    "algorithm",
    [RobustSGD(CoordinateMedian()), ByzEF21SGDM(TrimmedMean())],
    ids=["momentum", "mirrors"],
)
def test_a_worker_that_is_started_again_contributes(algorithm: Any, tmp_path: Path) -> None:
    """It comes with a fresh process from a snapshot, in the middle of an epoch, and ends with the
    same weights as everybody.
    """

    def make(transport: ParameterServer) -> Any:
        return ByzantineRobustStrategy(algorithm, transport, num_byzantine=1)

    def callbacks(folder: Path) -> list[Any]:
        return [
            Watch(),
            Dies(folder, (2, "forward", 3)),
            ComesBack(folder, 6, 2),
            ModelCheckpoint(folder, filename="{epoch}"),
        ]

    settings = {"enable_checkpointing": True, "max_epochs": 2}
    with Ranks(
        tmp_path,
        4,
        job(
            4,
            make,
            callbacks=callbacks,
            val=loader,
            data=lambda: loader(6),
            extra=present,
            **settings,
        ),
    ) as ranks:
        assert ranks.wait([2]) == {2: -signal.SIGKILL}, ranks.everything()
        appears(tmp_path / "waits")  # not before: it would join an earlier step
        ranks.start(2)
        assert ranks.wait() == dict.fromkeys(range(4), 0), ranks.everything()
    made = reports(tmp_path, 0, 1, 2, 3)
    for report in made:
        assert_equal(report, made[0])
        assert report["steps"] == 20
    rounds = made[0]["extra"]
    assert len(rounds) == 20
    assert all(rounds[step] == [0, 1, 3] for step in (3, 4, 5))
    assert rounds[0] == rounds[7] == rounds[-1] == [0, 1, 2, 3]
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["lightning_byz"]
    assert sorted(saved["workers"][0]) == sorted(saved["rng"]) == [0, 1, 2, 3]
    if (
        "server" in saved and "g" in saved["server"][0]["server"]
    ):  # what the server believes of a worker is what the worker believes
        for worker in range(4):
            assert torch.equal(
                saved["server"][0]["server"]["g"][worker], saved["workers"][0][worker]["g"]
            )


def test_local_steps_are_what_they_are_in_one_process(tmp_path: Path) -> None:
    how = {"local_steps": 4, "num_byzantine": 1, "algorithm": RobustSGD(CoordinateMedian())}
    served = functools.partial(ByzantineRobustStrategy, **how)
    with Ranks(tmp_path, 3, job(3, served, data=lambda: loader(8))) as ranks:
        assert ranks.wait() == dict.fromkeys(range(3), 0), ranks.everything()
    made = reports(tmp_path, 0, 1, 2)
    torch.manual_seed(0)
    collective, *_ = fit(
        tmp_path / "collective",
        Plain(),
        ByzantineRobustStrategy(start_method="fork", **how),
        devices=3,
        data=loader(8),
    )
    for report in made:
        assert_equal(report, made[0])
    assert_close(made[0], collective)


class NowAndThen(Plain):
    """Takes an optimizer's step in every third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        if batch_idx % 3 != 2:
            return
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class WaitsForOthers(L.Callback):
    """At the server: does not begin its first batch before all workers wait in their first round."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == 0 and trainer.global_step == 0:
            server = trainer.strategy.transport._server
            deadline = time.monotonic() + 300
            while not server.ask(lambda: all(m.waiting for m in server.desk.members.values())):
                assert time.monotonic() < deadline, server.desk.status()
                time.sleep(0.01)


@pytest.mark.parametrize(
    ("module", "settings"),
    [(Plain, {"accumulate_grad_batches": 4}), (NowAndThen, {})],
    ids=["accumulated", "by_hand"],
)
def test_workers_may_be_batches_ahead_of_the_server(
    module: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Where batches have no exchange: what they say counts when the server comes."""
    run = job(
        3,
        module=module,
        data=lambda: loader(8),
        callbacks=lambda folder: [Watch(), WaitsForOthers()],
        extra=present,
        **settings,
    )
    with Ranks(tmp_path, 3, run) as ranks:
        assert ranks.wait() == dict.fromkeys(range(3), 0), ranks.everything()
    made = reports(tmp_path, 0, 1, 2)
    for report in made:
        assert_equal(report, made[0])
    assert made[0]["extra"] == [[0, 1, 2]] * 3


def test_a_worker_joins_where_a_phase_of_local_steps_begins(tmp_path: Path) -> None:
    """It dies in batch 3, asks to join in the middle of a phase of two steps, and takes part in
    the next.
    """

    def make(transport: ParameterServer) -> Any:
        rule = RobustSGD(CoordinateMedian())
        return ByzantineRobustStrategy(rule, transport, num_byzantine=1, local_steps=2)

    def callbacks(folder: Path) -> list[Any]:
        return [Watch(), Dies(folder, (2, "forward", 3)), ComesBack(folder, 7, 2, there=9)]

    patient = {"lost_after": 20.0}
    run = job(4, make, callbacks=callbacks, data=lambda: loader(5), extra=present, server=patient)
    with Ranks(tmp_path, 4, run) as ranks:
        assert ranks.wait([2]) == {2: -signal.SIGKILL}, ranks.everything()
        appears(tmp_path / "waits")
        ranks.start(2)
        assert ranks.wait() == dict.fromkeys(range(4), 0), ranks.everything()
    made = reports(tmp_path, 0, 1, 2, 3)
    for report in made:
        assert_equal(report, made[0])
        assert report["steps"] == 12
    assert made[0]["extra"] == [[0, 1, 2, 3], *[[0, 1, 3]] * 3, *[[0, 1, 2, 3]] * 2]


@pytest.mark.thorough
def test_the_servers_death_is_the_end_and_the_last_checkpoint_resumes(tmp_path: Path) -> None:
    def callbacks(folder: Path) -> list[Any]:
        return [Dies(folder, (0, "forward", 7)), ModelCheckpoint(folder, filename="{epoch}")]

    settings = {"enable_checkpointing": True, "max_epochs": 2, "data": lambda: loader(16)}
    began = time.monotonic()
    with Ranks(
        tmp_path, 3, job(3, callbacks=callbacks, server={"lost_after": 2.0}, **settings)
    ) as ranks:
        assert ranks.wait() == {0: -signal.SIGKILL, 1: 1, 2: 1}, ranks.everything()
        assert all("ServerLostError: The server" in ranks.output(rank) for rank in (1, 2))
    resumed = job(3, ckpt_path=str(tmp_path / "epoch=0.ckpt"), **settings)
    with Ranks(tmp_path / "resumed", 3, resumed) as ranks:
        assert ranks.wait() == {0: 0, 1: 0, 2: 0}, ranks.everything()
    assert time.monotonic() - began < 60
    with Ranks(tmp_path / "whole", 3, job(3, **settings)) as ranks:
        assert ranks.wait() == {0: 0, 1: 0, 2: 0}, ranks.everything()
    resumed_reports, whole = (
        reports(tmp_path / "resumed", 0, 1, 2),
        reports(tmp_path / "whole", 0, 1, 2),
    )
    for report in resumed_reports:
        assert_equal(report, whole[0])


def test_who_is_left_behind_goes_on_from_a_snapshot(tmp_path: Path) -> None:
    """A worker that sleeps through more batches than the server keeps results for."""

    class Sleeps(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            step, rank = trainer.global_step, trainer.global_rank
            mark, awake = tmp_path / "asleep", tmp_path / "awake"
            if rank == 2 and step == 3 and not mark.exists():
                mark.touch()
                while not awake.exists():
                    time.sleep(0.01)
            if rank == 0 and step == 12:
                awake.touch()

    def callbacks(folder: Path) -> list[Any]:
        return [Watch(), Sleeps(), ComesBack(folder, 12, 2)]

    server = {"first_k": 2, "backlog": 4}
    with Ranks(
        tmp_path,
        3,
        job(3, callbacks=callbacks, server=server, data=lambda: loader(4), extra=present),
    ) as ranks:
        assert ranks.wait() == {0: 0, 1: 0, 2: 0}, ranks.everything()
        assert "goes on from a snapshot" in ranks.output(2)
    for report in reports(tmp_path, 0, 1):
        assert report["steps"] == 20
    assert not any(2 in heard for heard in reports(tmp_path, 0)[0]["extra"][3:12])


def test_a_late_worker_skips_to_the_current_step(tmp_path: Path) -> None:
    """It applies the results that it missed, and computes nothing."""

    class Counts(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.computed: list[int] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.computed.append(self.trainer.global_step)
            return super().training_step(batch, batch_idx)

    def computed(trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        return pl_module.computed

    class Sleeps(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            step, rank = trainer.global_step, trainer.global_rank
            (tmp_path / f"rank {rank} begins {step}").touch()
            # rank 1 is never late, and rank 2 not before step 3, however busy the machine is
            if rank == 0:
                appears(tmp_path / f"rank 1 begins {step}")
                appears(tmp_path / f"rank 2 begins {min(step, 3)}")
            if rank == 2 and step == 3:
                while not (tmp_path / "awake").exists():
                    time.sleep(0.01)
                time.sleep(0.1)
            if rank == 0 and step == 9:
                (tmp_path / "awake").touch()
                deadline = time.monotonic() + 300
                while (
                    len(trainer.strategy.transport._server.desk.late) == 0
                    and time.monotonic() < deadline
                ):
                    time.sleep(0.01)

    settings = {
        "server": {"first_k": 2, "backlog": 100},
        "data": lambda: loader(4),
        "extra": computed,
    }
    with Ranks(
        tmp_path, 3, job(3, callbacks=lambda folder: [Sleeps()], module=Counts, **settings)
    ) as ranks:
        assert ranks.wait() == {0: 0, 1: 0, 2: 0}, ranks.everything()
    made = reports(tmp_path, 0, 1, 2)
    assert made[0]["extra"] == made[1]["extra"] == list(range(20))
    assert 3 in made[2]["extra"] and not {4, 5, 6, 7}.intersection(made[2]["extra"])
    for report in made:
        assert_equal(report, made[0])


class Measured(Plain):
    """Validates with metrics of torchmetrics: sums, and a list of all predictions of uneven
    length.
    """

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3, average="micro")
        self.cat = torchmetrics.CatMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        out = self(batch[0])
        self.accuracy(out, batch[1])
        self.cat(out[:, 0])
        self.log("accuracy", self.accuracy)
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        values = self.cat.compute()
        self.log("norm", values.norm())
        self.log("values", float(len(values)))
        self.cat.reset()


class Samples(Logger):
    """Keeps what is logged under "validated_samples"."""

    name = version = "samples"

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[float] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged += [value for name, value in metrics.items() if name == "validated_samples"]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def test_torchmetrics_are_ddps_and_validation_says_how_much_it_covered(tmp_path: Path) -> None:
    def val() -> Any:
        return loader(24, blobs(60, seed=5))

    def logged(trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        return [logger.logged for logger in trainer.loggers]

    with Ranks(
        tmp_path / "served",
        3,
        job(3, module=Measured, val=val, logger=lambda: [Samples()], extra=logged),
    ) as ranks:
        assert ranks.wait() == {0: 0, 1: 0, 2: 0}, ranks.everything()
    torch.manual_seed(0)
    ddp = fit(tmp_path / "ddp", Measured(), forked_ddp(), devices=3, data=loader(), val=val())
    for served in reports(tmp_path / "served", 0, 1, 2):
        for name in ("accuracy", "norm", "values", "val_loss"):
            assert served["metrics"][name] == pytest.approx(ddp[0]["metrics"][name], rel=1e-5), name
    assert reports(tmp_path / "served", 0)[0]["extra"] == [[60.0]]


def test_dstar_takes_who_really_arrives_first_and_stragglers_really_sleep_or_die(
    tmp_path: Path,
) -> None:
    def make(transport: ParameterServer) -> Any:
        return ByzantineRobustStrategy(DStar(k=3), transport, num_byzantine=1)

    def callbacks(folder: Path) -> list[Any]:
        return [
            Watch(),
            Stragglers(0.4, workers=[2], start=2),
            Stragglers(workers=[3], kind="dead", start=4),
        ]

    settings = {"data": lambda: loader(10), "server": {"backlog": 100}}
    with Ranks(tmp_path, 4, job(4, make, callbacks=callbacks, extra=present, **settings)) as ranks:
        assert ranks.wait() == {0: 0, 1: 0, 2: 0, 3: -signal.SIGKILL}, ranks.everything()
    made = reports(tmp_path, 0, 1, 2)
    for report in made:
        assert_equal(report, made[0])
    rounds = made[0]["extra"]
    assert rounds[2] == rounds[3] == [0, 1, 3], "the late one is not among the first three"
    assert all(heard == [0, 1, 2] for heard in rounds[4:]), (
        "with one dead the late one is waited for"
    )


@pytest.mark.thorough
def test_one_command_on_one_machine(tmp_path: Path) -> None:
    """The launcher starts the ranks, makes their keys, and does not kill everybody when one dies;
    fit, then validate, then test.
    """
    script = tmp_path / "script.py"
    script.write_text("""
import os, signal, sys
import lightning as L, torch
sys.path.insert(0, sys.argv[1])
from models import Plain, loader
from lightning_byz import ByzantineRobustStrategy, ParameterServer, RobustSGD, TrimmedMean

class Dies(L.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    L.seed_everything(1, verbose=False)
    strategy = ByzantineRobustStrategy(RobustSGD(TrimmedMean()), ParameterServer(lost_after=5.0), num_byzantine=1)
    trainer = L.Trainer(accelerator="cpu", devices=3, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, callbacks=[Dies()])
    module = Plain()
    trainer.fit(module, loader(8), loader())
    if trainer.global_rank == 0:
        keys, group = os.environ["LIGHTNING_BYZ_KEYS"], torch.distributed.is_initialized()
        print(f"keys {keys} steps {trainer.global_step} group {group}\\n", end="", flush=True)
    trainer.validate(module, loader(), verbose=False)
    trainer.test(module, loader(), verbose=False)
""")
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
    }
    command = [sys.executable, str(script), str(Path(__file__).parent)]
    settings = {
        "env": {**clean, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(own_port())},
        "capture_output": True,
        "text": True,
        "timeout": 500,
    }
    done = subprocess.run(command, check=False, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    words = next(line for line in done.stdout.splitlines() if line.startswith("keys ")).split()
    assert words[2:] == ["steps", "10", "group", "False"]
    assert not Path(words[1]).exists()


@pytest.mark.parametrize("f", [0, 1])
@pytest.mark.parametrize("everybody", [False, True])
def test_up_to_f_workers_force_no_decision(everybody: bool, f: int) -> None:
    """One "no" is enough for "no", or one "yes" for "yes": of the server, or of f + 1 workers."""
    strategy = ByzantineRobustStrategy(transport=ParameterServer())
    strategy.resolved = RobustSGD(TrimmedMean(f=f))
    strong, weak = (b"\2", b"\1") if everybody else (b"\1", b"\2")

    def forced(*strong_ranks: int) -> bool:
        votes = {rank: strong if rank in strong_ranks else weak for rank in range(5)}
        strategy.transport.from_everybody = lambda name, body, most: votes
        return strategy.processes.decide(everybody, everybody) != everybody

    assert forced(0)
    assert not forced()
    assert all(forced(rank) == (f == 0) for rank in range(1, 5))
    assert forced(2, 4)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSetupError, match="popen"):
        L.Trainer(
            **{
                **QUIET,
                "devices": 3,
                "strategy": ByzantineRobustStrategy(
                    transport=ParameterServer(), start_method="fork"
                ),
            }
        )
    strategy = ByzantineRobustStrategy(transport=ParameterServer())
    assert isinstance(strategy.processes, ServerProcesses)
    with pytest.raises(UnsupportedSetupError, match="src=1"):
        strategy.processes.broadcast("x", 1)
    with pytest.raises(UnsupportedSetupError, match="sync_grads"):
        ByzantineRobustStrategy(workers_per_process=3).all_gather(torch.zeros(1), sync_grads=True)
    with pytest.raises(UnsupportedSetupError, match="broadcasts tensors, numbers, strings"):
        strategy.processes.broadcast(Plain(), 0)
