"""What runs on CPUs runs on a GPU, and over NCCL: several ranks share the one GPU that is there."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import harness
import lightning as L
import pytest
import torch
import torch.distributed as dist
from harness import assert_close
from lightning.pytorch.plugins.environments import LightningEnvironment
from models import Plain, loader
from ports import own_port
from zoo import ALGORITHMS, COMPRESSORS, RULES, rows_for

from lightning_byz import (
    NNM,
    AllGather,
    ByzEF21SGDM,
    Chain,
    CoordinateMedian,
    Krum,
    RobustSGD,
    Sharded,
    SignFlip,
    SignSGDMajorityVote,
    SpectralFilter,
    TopK,
    TrimmedMean,
)
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import Contribution
from lightning_byz.lightning import ByzantineRobustStrategy, ByzantineWorkers
from lightning_byz.numerics.rows import Rows
from lightning_byz.transports import InProcess
from lightning_byz.types import Gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
QUIET = harness.QUIET | {"accelerator": "gpu", "devices": 1}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_found_there(bad: float) -> None:
    x = rows_for(5, 70_000, dtype=torch.float32).to(GPU)
    x[1, -1], x[3, 0] = bad, torch.finfo(torch.float32).max
    rows = Rows(x)
    assert rows.finite().tolist() == [True, False, True, True, True]
    assert rows.select(torch.tensor([1, 4], device=GPU)).finite().tolist() == [False, True]
    weights = torch.tensor([[0.5, 0, 0.5, 0, 0], [0.5, 0.5, 0, 0, 0]])
    assert rows.mix(weights).finite().tolist() == [True, False]
    assert rows.kth_largest(x[0].abs(), 7) == x[0].abs().sort(descending=True).values[6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", RULES, ids=lambda case: case.name)
def test_every_rule_gives_there_what_it_gives_here(case: Any, dtype: torch.dtype) -> None:
    x = rows_for(13, 3000, dtype=dtype)
    rule = case.rule.with_f(min(2, case.rule.most_f(13)))
    here, there = rule(x.clone()), rule(x.to(GPU))
    assert there.device.type == "cuda" and there.dtype == dtype
    tolerance = {
        torch.float64: max(case.tolerance, 1e-9),
        torch.float32: max(case.tolerance, 1e-4),
        torch.bfloat16: 2e-2,
    }[dtype]
    torch.testing.assert_close(there.cpu(), here, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", COMPRESSORS, ids=lambda case: case.name)
def test_every_compressor_speaks_one_language(case: Any) -> None:
    """What one device encodes the other decodes."""
    codec, x = case.of(1000), rows_for(1, 1000, dtype=torch.float32)[0]
    for source, target in ((GPU, CPU), (CPU, GPU)):
        payload = codec.encode(x.to(source), torch.Generator(source).manual_seed(1))
        assert [(tuple(t.shape), t.dtype) for t in payload] == [
            tuple(field) for field in codec.layout(1000, torch.float32)
        ]
        moved = tuple(t.to(target) for t in payload)
        assert bool(codec.valid(moved, 1000)) and bool(codec.valid(payload, 1000))
        torch.testing.assert_close(
            codec.decode(moved, 1000).cpu(), codec.decode(payload, 1000).cpu()
        )


def rounds(
    algorithm: Any, device: torch.device, transport: Any = None, n: int = 9, d: int = 3000
) -> list[torch.Tensor]:
    """The estimates of four rounds, of which one has an absent worker, and one a nan."""
    if transport is None:
        transport = InProcess()
        transport.connect(0, 1, n, device)
    exchange, found = Exchange(algorithm, transport, seed=3), []
    for step in range(4):
        grads = rows_for(n, d, seed=step, dtype=torch.float32).to(device)
        grads[5, -1] = torch.nan if step == 1 else grads[5, -1]
        used = torch.ones(2, dtype=torch.bool, device=device)
        mine = [
            Contribution(
                None if step == 2 and w == 3 else Gradients(grads[w], grads[w].flip(0)), used
            )
            for w in transport.workers
        ]
        x = torch.zeros(d, device=device) + step**2
        outcome = exchange.run(mine, x, trusted=torch.ones(d, device=device))
        if outcome.estimate is not None:
            found.append(outcome.estimate.clone().cpu())
    return found


@pytest.mark.parametrize("case", ALGORITHMS, ids=lambda case: case.name)
def test_every_algorithm_runs_there(case: Any) -> None:
    here, there = rounds(case.algorithm, CPU, d=200), rounds(case.algorithm, GPU, d=200)
    assert len(here) == len(there)
    chance = any(
        name in repr(case.algorithm)
        for name in ("RandK", "QSGD", "random", "TernGrad", "Natural", "Bucketing", "LowRank")
    )
    for a, b in zip(here, there, strict=True):
        assert torch.isfinite(b).all()
        if not chance:  # a device's own generator draws other numbers
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings(
    "ignore:byzantine_robust. worker"
)  # gradients of half precision overflow while the scaler looks for its scale
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_in_process_workers_train_there(precision: str, tmp_path: Path) -> None:
    strategy = ByzantineRobustStrategy(workers_per_process=4)
    module = Plain(norm=True, dropout=0.1)
    trainer = L.Trainer(
        **QUIET,
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=6,
        callbacks=[ByzantineWorkers(SignFlip(5.0), count=1)],
    )
    trainer.fit(module, loader())
    assert trainer.callback_metrics["loss"] < 0.8
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = L.Trainer(
        **QUIET, strategy=ByzantineRobustStrategy(workers_per_process=4), max_epochs=7
    )
    again.fit(Plain(norm=True, dropout=0.1), loader(), ckpt_path=tmp_path / "model.ckpt")
    assert again.global_step == 70


# -- NCCL ------------------------------------------------------------------------------------------

RANKS = 3
CASES: dict[str, Any] = {
    "median": RobustSGD(CoordinateMedian(f=2)),
    "distances": RobustSGD(Chain(pre=(NNM(),), rule=TrimmedMean(), f=2)),
    "krum": RobustSGD(Krum(f=2)),
    "momenta": RobustSGD(SpectralFilter(f=2), worker_momentum=0.9, undo_worker_momentum=True),
    "votes": SignSGDMajorityVote().with_f(2),
    "few coordinates": ByzEF21SGDM(CoordinateMedian(f=2), TopK(ratio=0.01)),
    "few coordinates, distances": ByzEF21SGDM(
        Chain(pre=(NNM(),), rule=TrimmedMean(), f=2), TopK(ratio=0.01)
    ),
}
TRANSPORTS: dict[str, Callable[[], Any]] = {
    "all_gather": AllGather,
    "sharded": Sharded,
    "in buckets": lambda: Sharded(bucket_size=4096),
}


def rank_main(rank: int, port: int, folder: Path, work: Callable[[int, Path], Any]) -> None:
    # To NCCL every rank is a host of its own: it refuses two ranks of one host on one GPU.
    os.environ.update(
        NCCL_HOSTID=f"host{rank}",
        NCCL_SOCKET_IFNAME="lo",
        NCCL_IB_DISABLE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        NODE_RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(RANKS),
    )
    torch.cuda.set_device(0)
    torch.save(work(rank, folder), folder / f"{rank}.pt")


def in_ranks(folder: Path, work: Callable[[int, Path], Any]) -> list[Any]:
    """What each of three ranks makes of its number."""
    port = own_port()
    context = multiprocessing.get_context("spawn")
    children = [
        context.Process(target=rank_main, args=(rank, port, folder, work)) for rank in range(RANKS)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(200)
        child.kill()
    assert [child.exitcode for child in children] == [0] * RANKS
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def exchanged(rank: int, folder: Path) -> Any:
    dist.init_process_group(
        "nccl", rank=rank, world_size=RANKS, timeout=timedelta(seconds=100), device_id=GPU
    )
    found = {}
    for way, make in TRANSPORTS.items():
        for name, algorithm in CASES.items():
            transport = make()
            transport.connect(rank, RANKS, 3, GPU)
            found[way, name] = rounds(algorithm, GPU, transport)
    dist.destroy_process_group()
    return found


def test_over_nccl_every_transport_gives_what_one_process_gives(tmp_path: Path) -> None:
    ranks = in_ranks(tmp_path, exchanged)
    for (way, name), estimates in ranks[0].items():
        for other in ranks[1:]:
            assert all(map(torch.equal, estimates, other[way, name])), (way, name)
        for a, b in zip(rounds(CASES[name], GPU), estimates, strict=True):
            torch.testing.assert_close(
                b, a, rtol=1e-4, atol=1e-5, msg=lambda m, at=(way, name): f"{at}: {m}"
            )


class SideStream(Plain):
    """A forward pass of which every second one runs on a stream of its own, and its backward pass
    with it.
    """

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            beside = torch.stack([p.square().mean() for p in self.parameters()]).sum()
        loss = super().training_step(batch, batch_idx)
        here.wait_stream(side)
        return loss + 0.01 * beside


def trained_on_streams(rank: int, folder: Path) -> Any:
    found = {}
    for overlap in (False, True):
        L.seed_everything(7)
        module = SideStream()
        strategy = ByzantineRobustStrategy(
            RobustSGD(CoordinateMedian()), Sharded(overlap=overlap, bucket_size=128)
        )
        L.Trainer(
            **QUIET,
            strategy=strategy,
            num_nodes=RANKS,
            plugins=[LightningEnvironment()],
            max_epochs=4,
        ).fit(module, loader(8))
        found[overlap] = {k: v.cpu() for k, v in module.state_dict().items()}
    return found


def test_over_nccl_gradients_of_several_streams_are_all_there_when_they_are_sent(
    tmp_path: Path,
) -> None:
    for found in in_ranks(tmp_path, trained_on_streams):
        for name, value in found[False].items():
            assert torch.equal(found[True][name], value), name


def trained(rank: int, folder: Path) -> Any:
    found = {}
    for name, algorithm in {
        "default": None,
        "median": RobustSGD(CoordinateMedian()),
        "votes": SignSGDMajorityVote(),
    }.items():
        for overlap in (False, True):
            L.seed_everything(7)
            module = Plain(norm=True, lr=0.001 if name == "votes" else 0.1)
            trainer = L.Trainer(
                **QUIET,
                strategy=ByzantineRobustStrategy(
                    algorithm, Sharded(overlap=overlap, bucket_size=128)
                ),
                num_nodes=RANKS,
                plugins=[LightningEnvironment()],
                max_epochs=4,
            )
            trainer.fit(module, loader(8))
            found[name, overlap] = {"weights": {k: v.cpu() for k, v in module.state_dict().items()}}
    return found


def test_over_nccl_messages_leave_during_backward_and_change_nothing(tmp_path: Path) -> None:
    ranks = in_ranks(tmp_path, trained)
    for name in ("default", "median", "votes"):
        assert_close(ranks[0][name, False], ranks[0][name, True])
        for other in ranks[1:]:
            for key, value in ranks[0][name, True]["weights"].items():
                assert torch.equal(value, other[name, True]["weights"][key]), (name, key)
