"""Trainings on a parameter server whose workers are killed at drawn moments:
``python tests/chaos.py [number ...]``, or ``make chaos``.

Each of 30 seeds draws the number of workers, who of them is killed (SIGKILL), in which step and how
many milliseconds into it, and who is started again; in every third training one of the living lies
besides. The dead and the liar are f at most. A training passes if it ends, with an accuracy within
one point of what the same seed gives undisturbed. The model is linear, so that equally good
trainings end at nearly the same place: networks with a hidden layer differ by half a point from one
seed to the next.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from harness import QUIET
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import Ranks
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_byz import IPM, NNM, Chain, ParameterServer, RobustSGD, SignFlip, TrimmedMean
from lightning_byz.lightning import ByzantineRobustStrategy, ByzantineWorkers

TRAININGS = 30
EPOCHS, SAMPLES, BATCH, POINT = 30, 1200, 256, 0.01


@dataclass(frozen=True)
class Chaos:
    """What happens in a training.

    Attributes:
        seed: of everything drawn.
        n: processes; rank 0 serves and computes.
        f: faults that the rule tolerates.
        deaths: rank -> (step, seconds into it); at most f, the liar counted.
        returns: the ranks that are started again.
        liar: a rank that lies from the beginning, or None.
    """

    seed: int
    n: int
    f: int
    deaths: dict[int, tuple[int, float]]
    returns: tuple[int, ...]
    liar: int | None

    @classmethod
    def drawn(cls, seed: int) -> Chaos:
        generator = random.Random(seed)
        n = generator.choice([5, 6, 7])
        f = (n - 1) // 2
        liar = seed % 3 == 2
        last = EPOCHS * (SAMPLES // BATCH) - 2
        order = generator.sample(range(1, n), n - 1)
        dead = order[: generator.randint(1, f - liar)]
        deaths = {rank: (generator.randrange(1, last), generator.uniform(0, 0.03)) for rank in dead}
        returns = tuple(rank for rank in dead if generator.random() < 0.5)
        return cls(seed, n, f, deaths, returns, order[-1] if liar else None)


@functools.cache
def digits() -> tuple[TensorDataset, TensorDataset]:
    """Training and test samples."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    data = torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y)[order]
    return TensorDataset(*(part[:SAMPLES] for part in data)), TensorDataset(
        *(part[SAMPLES:] for part in data)
    )


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 10))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        right = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", right, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=3e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


class Killed(L.Callback):
    """Kills this process some time into a step, wherever it is then; once."""

    def __init__(self, folder: Path, chaos: Chaos) -> None:
        self.folder, self.chaos = folder, chaos

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        step, seconds = self.chaos.deaths.get(trainer.global_rank, (None, 0.0))
        mark = self.folder / f"died{trainer.global_rank}"
        if step is not None and trainer.global_step >= step and not mark.exists():
            mark.touch()
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def trained(
    strategy: Any, chaos: Chaos, processes: int, callbacks: list[Any], folder: Path
) -> Digits:
    L.seed_everything(chaos.seed, verbose=False)
    train, test = digits()
    share = BATCH // chaos.n if processes > 1 else BATCH // chaos.n * chaos.n
    settings = {**QUIET, "enable_checkpointing": True, "devices": processes, "max_epochs": EPOCHS}
    module = Digits()
    trainer = L.Trainer(
        **settings,
        strategy=strategy,
        callbacks=[*callbacks, ModelCheckpoint(folder, filename="{epoch}")],
    )
    trainer.fit(
        module, DataLoader(train, share, shuffle=True, drop_last=True), DataLoader(test, 100)
    )
    return module


def accuracy(module: Digits) -> float:
    x, y = digits()[1].tensors
    module.eval()
    with torch.no_grad():
        return float((module.net(x).argmax(1) == y).float().mean())


def strategy(chaos: Chaos, **kwargs: Any) -> ByzantineRobustStrategy:
    rule = Chain(pre=(NNM(),), rule=TrimmedMean())
    return ByzantineRobustStrategy(
        RobustSGD(rule, worker_momentum=0.5), num_byzantine=chaos.f, **kwargs
    )


def undisturbed(chaos: Chaos, folder: Path) -> float:
    """The same training with all workers in one process, where nobody dies or lies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return accuracy(trained(strategy(chaos, workers_per_process=chaos.n), chaos, 1, [], folder))


def disturbed(chaos: Chaos, folder: Path) -> float:
    """The training itself, in real processes. Raises if it does not end as it should."""

    def job(folder: Path) -> None:
        transport = ParameterServer(
            keys=folder / "keys", lost_after=10.0, start_timeout=120.0, deadline=5.0
        )
        lie = SignFlip(2.0) if chaos.seed % 2 else IPM(2.0)
        liars = [] if chaos.liar is None else [ByzantineWorkers(lie, workers=[chaos.liar])]
        module = trained(
            strategy(chaos, transport=transport),
            chaos,
            chaos.n,
            [Killed(folder, chaos), *liars],
            folder,
        )
        if os.environ["LOCAL_RANK"] == "0":
            torch.save(accuracy(module), folder / "accuracy.pt")

    with Ranks(folder, chaos.n, job) as ranks:
        died = ranks.wait(sorted(chaos.deaths), 900)
        for rank in chaos.returns:
            ranks.start(rank)
        codes = ranks.wait(timeout=900)
        for rank in chaos.returns:  # one that comes back when all is over finds nobody
            codes[rank] = (
                0 if codes[rank] == 1 and "ServerLostError: " in ranks.output(rank) else codes[rank]
            )
        expected = {
            rank: -signal.SIGKILL if rank in chaos.deaths and rank not in chaos.returns else 0
            for rank in range(chaos.n)
        }
        assert died == dict.fromkeys(sorted(chaos.deaths), -signal.SIGKILL) and codes == expected, (
            f"{codes}\n{ranks.everything()}"
        )
    return float(torch.load(folder / "accuracy.pt"))


def run(seed: int, folder: Path) -> tuple[Chaos, float, float]:
    """A training, its accuracy, and the undisturbed one."""
    chaos = Chaos.drawn(seed)
    digits()
    return (
        chaos,
        disturbed(chaos, folder / f"chaos{seed}"),
        undisturbed(chaos, folder / f"undisturbed{seed}"),
    )


def main() -> int:
    seeds = [int(argument) for argument in sys.argv[1:]] or range(TRAININGS)
    torch.set_num_threads(1)
    passed = 0
    for seed in seeds:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                chaos, got, expected = run(seed, Path(folder))
            except AssertionError as error:
                print(f"seed {seed}: FAILED {error}", flush=True)
                continue
        good = got >= expected - POINT
        passed += good
        what = (
            f"n={chaos.n} f={chaos.f} deaths={sorted(chaos.deaths)} returns={list(chaos.returns)} "
            f"liar={chaos.liar}"
        )
        took = time.monotonic() - began
        print(
            f"seed {seed}: {'passed' if good else 'FAILED'} {100 * got:.1f} % "
            f"({100 * expected:.1f} %) {what} {took:.0f} s",
            flush=True,
        )
    print(f"{passed} of {len(seeds)} passed")
    return passed != len(seeds)


if __name__ == "__main__":
    sys.exit(main())
