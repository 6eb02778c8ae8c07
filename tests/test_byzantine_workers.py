"""ByzantineWorkers in a Trainer: when they lie, who they are, and what they know of each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_equal, averaging, fit
from lightning.pytorch.callbacks import LearningRateFinder
from models import GAN, Plain, loader

from lightning_byz import IPM, LabelFlip, Mimic, Mixture, ShiftBack, ShuffledLabels, SignFlip, Stuck
from lightning_byz.lightning import ByzantineRobustStrategy, ByzantineWorkers


def in_process(n: int = 4, **kwargs: Any) -> ByzantineRobustStrategy:
    return ByzantineRobustStrategy(workers_per_process=n, **kwargs)


def test_a_schedule_of_lies() -> None:
    lie = ByzantineWorkers(SignFlip(), count=1, start=3, stop=20, every=4)
    assert [step for step in range(30) if lie.active(step)] == [3, 7, 11, 15, 19]
    lie = ByzantineWorkers(SignFlip(), count=1, probability=0.3)
    coins = [lie.active(step) for step in range(2000)]
    assert 0.26 < sum(coins) / 2000 < 0.34
    assert coins == [
        ByzantineWorkers(LabelFlip(3), count=2, probability=0.3).active(step)
        for step in range(2000)
    ]
    often = ByzantineWorkers(SignFlip(), count=1, probability=0.6)
    assert all(often.active(step) for step in range(2000) if coins[step])
    lie._coin_key = (1, 0)
    assert coins != [lie.active(step) for step in range(2000)]
    assert all(map(ByzantineWorkers(SignFlip(), count=1).active, range(100)))


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ({"workers": [0, 1]}, {"workers": [1, 2]}, True),
        ({"workers": [0, 1], "stop": 5}, {"workers": [1, 2], "start": 4}, True),
        ({"workers": [0, 1], "stop": 5}, {"workers": [1, 2], "start": 5}, False),
        ({"workers": [0]}, {"count": 1}, False),
    ],
    ids=repr,
)
def test_a_worker_tells_one_lie_a_step(
    first: Any, second: Any, refused: bool, tmp_path: Path
) -> None:
    lies = [ByzantineWorkers(SignFlip(), **first), ByzantineWorkers(IPM(0.1), **second)]
    if refused:
        with pytest.raises(
            ValueError, match=r"workers \[1\] with two attacks on messages, .*a Mixture of both"
        ):
            fit(tmp_path, Plain(), in_process(5), callbacks=lies)
    else:
        fit(tmp_path, Plain(), in_process(5), callbacks=lies, max_steps=2)


def test_an_attack_that_cannot_be_carried_out_is_refused_before_the_first_step(
    tmp_path: Path,
) -> None:
    for attack, message in (
        (Mimic(target=3), "honest one of the n=4"),
        (Mixture((SignFlip(), IPM())), "at least one Byzantine worker"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, Plain(), in_process(4), callbacks=[ByzantineWorkers(attack, count=1)])


def test_attacks_of_several_callbacks_know_of_each_other(tmp_path: Path) -> None:
    """Averaging, so that every row shows: -10 times the mean of the two that are honest, twice, and
    a poisoned batch elsewhere.
    """
    seen: list[Any] = []

    class Shows(SignFlip):
        def __call__(self, honest: Any, own: Any, scene: Any = None) -> Any:
            seen.append((scene.step, scene.honest, scene.own, scene.x().clone()))
            return super().__call__(honest, own, scene)

    lies = [
        ByzantineWorkers(Shows(10.0), workers=[0]),
        ByzantineWorkers(LabelFlip(3), workers=[1], every=2),
        ByzantineWorkers(Shows(10.0), workers=[4], start=1),
    ]
    model = Plain(lr=0.0)
    fit(tmp_path, model, averaging(workers_per_process=5), callbacks=lies, max_steps=3)
    everybody = [[1, 2, 3, 4], [2, 3, 4], [1, 2, 3], [2, 3]]
    expected = [
        (0, everybody[1], [0]),
        (1, everybody[2], [0]),
        (1, everybody[2], [4]),
        (2, everybody[3], [0]),
        (2, everybody[3], [4]),
    ]
    assert [call[:3] for call in seen] == expected
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert all(torch.equal(call[3], flat) for call in seen)


def test_every_step_shuffles_labels_its_own_way_whatever_the_number_of_accumulated_batches(
    tmp_path: Path,
) -> None:
    orders: list[Any] = []

    class Shows(ShuffledLabels):
        def __call__(self, batch: Any, generator: Any = None) -> Any:
            orders.append(super().__call__([batch[0], torch.arange(8)], generator)[1].tolist())
            return batch

    fit(
        tmp_path,
        Plain(),
        in_process(3),
        data=loader(24),
        callbacks=[ByzantineWorkers(Shows(), count=1)],
        accumulate_grad_batches=2,
    )
    assert len(orders) == 10
    assert len({tuple(order) for order in orders}) == 5


@pytest.mark.processes
def test_an_attack_sees_and_remembers_for_each_optimizer_apart(tmp_path: Path) -> None:
    lie = ByzantineWorkers(Mixture((Stuck(), ShiftBack())), count=2)
    assert lie.state_dict() == {}
    strategy = ByzantineRobustStrategy(start_method="fork")
    sizes = [sum(p.numel() for p in net.parameters()) for net in (GAN().generator, GAN().critic)]
    fit(
        tmp_path,
        GAN(),
        strategy,
        devices=3,
        data=Plain().train_dataloader(),
        callbacks=[lie],
        extra=lambda *_: lie.state_dict(),
    )
    for rank in range(3):
        state = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)["extra"]["attack"]
        assert [memory["dim"] for memory in state] == sizes
        for memory, size in zip(state, sizes, strict=True):
            assert {key: len(value) for key, value in memory["memory"].items()} == {
                "0/1": size,
                "1/x_0": size,
            }


def test_the_name_of_a_state_is_the_same_in_every_run() -> None:
    class Own(SignFlip):
        pass

    # a fault that is no dataclass, whose repr would name its place in memory
    class Plainer(Stuck.__mro__[1]):
        def __call__(self, honest: Any, own: Any, scene: Any = None) -> Any:
            return own

    for attack in (Own(2.0), Plainer(), Mixture((SignFlip(), Plainer()))):
        keys = {
            ByzantineWorkers(attack, workers=[w], start=s).state_key
            for w, s in ((1, 0), (1, 0), (2, 0), (1, 5))
        }
        assert len(keys) == 3
        assert not any("0x" in key for key in keys)


def test_rounds_in_search_of_a_learning_rate_are_not_remembered(tmp_path: Path) -> None:
    """Lightning restores all but its callbacks' states, which it has put aside, and starts again at
    round 0.
    """
    runs = []
    for more in ([], [LearningRateFinder(num_training_steps=6, update_attr=False)]):
        torch.manual_seed(1)
        lie = ByzantineWorkers(Stuck(), count=1, start=2)
        (report,) = fit(
            tmp_path,
            Plain(),
            averaging(workers_per_process=4),
            callbacks=[lie, *more],
            default_root_dir=tmp_path,
            enable_checkpointing=True,
            extra=lambda *_, lie=lie: lie.state_dict()["attack"][0]["memory"]["3"],
        )
        runs.append(report)
    assert torch.equal(runs[0]["extra"], runs[1]["extra"])
    assert_equal(*runs)
