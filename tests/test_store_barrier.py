"""Checkpoints that all ranks save, some, or one: who is waited for, and that nobody hangs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from harness import QUIET
from models import Plain, loader
from ranks import Ranks

from lightning_byz.lightning import ByzantineRobustStrategy
from lightning_byz.strategies.checkpoint_barrier import StoreBarrier, store_barrier

pytestmark = pytest.mark.processes

SIZE = 3
LONG = 500.0  # a rank that waits for so long has failed


def joined(folder: Path, rank: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=SIZE
    )


def until(here: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not here():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def answers(folder: Path, play: Callable[[StoreBarrier], Any]) -> list[Any]:
    """What every rank gets out of a play with a roll call of three."""

    def job(folder: Path) -> None:
        rank = int(os.environ["LOCAL_RANK"])
        joined(folder, rank)
        got = play(store_barrier("127.0.0.1", timedelta(seconds=LONG)))
        dist.barrier()
        (folder / f"got{rank}.json").write_text(json.dumps(got))

    with Ranks(folder, SIZE, job) as ranks:
        assert ranks.wait(timeout=40) == dict.fromkeys(range(SIZE), 0), ranks.everything()
    return [json.loads((folder / f"got{rank}.json").read_text()) for rank in range(SIZE)]


def signed_in(call: StoreBarrier, place: str, *ranks: int) -> Callable[[], bool]:
    return lambda: call._store.check([f"{place}/{rank}" for rank in ranks])


def test_who_comes_late_is_waited_for(tmp_path: Path) -> None:
    """Longer than patience: rank 0 comes last to the first place, and rank 1 to the second."""

    def play(call: StoreBarrier) -> Any:
        if call.rank == 0:
            until(signed_in(call, "0#1", 1, 2))
        first = call.absent(0.0)
        if call.rank == 1:
            until(signed_in(call, "1#1", 0, 2))
            time.sleep(1.5)  # longer than who would not wait has patience
        call.move_on()
        if call.rank == 0:  # of rank 2 it would be in doubt
            until(signed_in(call, "1#1", 2))
        # patience for the moment between a rank's moving on and its signing in
        return first, call.absent(1.0)

    assert answers(tmp_path, play) == [[[], []]] * SIZE


@pytest.mark.parametrize("savers", [(0,), (1,), (0, 2), (1, 2)])
def test_who_has_passed_is_not_waited_for(savers: tuple[int, ...], tmp_path: Path) -> None:
    """All that are there learn the same, at once; the next place finds everybody again."""

    def play(call: StoreBarrier) -> Any:
        call.move_on()
        absent = call.absent(LONG) if call.rank in savers else []
        call.move_on()
        dist.barrier()
        return absent, call.absent(LONG)

    began = time.monotonic()
    for rank, (absent, after) in enumerate(answers(tmp_path, play)):
        assert after == []
        assert bool(absent) == (rank in savers) and not set(absent).intersection(savers)
    assert time.monotonic() - began < LONG / 5


def test_who_has_left_is_not_waited_for(tmp_path: Path) -> None:
    def play(call: StoreBarrier) -> Any:
        if call.rank == 0:
            return sorted(call.absent(LONG))
        return call.leave()

    assert answers(tmp_path, play)[0] in ([1], [2], [1, 2])


def test_in_doubt_rank_0_waits_for_a_while_and_its_decision_holds(tmp_path: Path) -> None:
    """The others are in a collective that nobody counts; they come to this place afterwards."""

    def play(call: StoreBarrier) -> Any:
        if call.rank:
            until(lambda: call._store.check(["0#1/absent"]))
        return call.absent(0.1)

    assert answers(tmp_path, play) == [[1, 2]] * SIZE


def test_there_is_one_for_each_process_group(tmp_path: Path) -> None:
    def play(call: StoreBarrier) -> Any:
        same = store_barrier("127.0.0.1", timedelta(seconds=LONG)) is call
        dist.barrier()
        dist.destroy_process_group()
        dist.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/again", rank=call.rank, world_size=SIZE
        )
        again = store_barrier("127.0.0.1", timedelta(seconds=LONG))
        return same, again is call, again.absent(0.0) if call.rank else again.absent(LONG)

    assert answers(tmp_path, play) == [[True, False, []]] * SIZE


class Guarded(Plain):
    """Rank 0 alone saves at the end of an epoch."""

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.path = path

    def on_train_epoch_end(self) -> None:
        if self.path is not None and self.trainer.is_global_zero:
            with pytest.warns(UserWarning, match=r"Rank 0 saves .* without ranks \[.*every rank"):
                self.trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("own_group", [False, True], ids=["first_trainers_group", "own_group"])
def test_in_a_second_trainer_and_into_folders_that_differ(own_group: bool, tmp_path: Path) -> None:
    """Two Trainers, or a process group of the script's own; a folder that differs by rank."""

    def job(folder: Path) -> None:
        rank = int(os.environ["LOCAL_RANK"])
        os.environ.pop("WORLD_SIZE")
        if own_group:
            joined(folder, rank)
        for i in range(1 if own_group else 2):
            strategy = ByzantineRobustStrategy()
            strategy.save_patience = LONG
            trainer = L.Trainer(**{**QUIET, "devices": SIZE, "max_epochs": 1}, strategy=strategy)
            trainer.fit(Guarded(str(folder / "alone.ckpt") if own_group or i else None), loader())
        trainer.save_checkpoint(folder / f"of_rank_{rank}_{os.getpid()}" / "all.ckpt")

    with Ranks(tmp_path, SIZE, job) as ranks:
        assert ranks.wait(timeout=LONG / 5) == dict.fromkeys(range(SIZE), 0), ranks.everything()
    (whole,) = tmp_path.glob("of_rank_0_*/all.ckpt")
    saved = torch.load(whole, weights_only=True)["lightning_byz"]
    assert sorted(saved["workers"][0]) == sorted(saved["rng"]) == [0, 1, 2]
    alone = torch.load(tmp_path / "alone.ckpt", weights_only=True)["lightning_byz"]
    assert sorted(alone["rng"]) == [0]
