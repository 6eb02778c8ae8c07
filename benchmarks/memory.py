"""How much more memory a rank takes than under DDP, as a multiple of one gradient's size.

Every method trains in four fresh processes on this machine, in turns. What counts is the most
memory that any rank has held since its seventh step, when all states are there, by the kernel's
count (VmHWM, Linux only). Memory that processes share, such as libraries, is the same for all
methods.

    python benchmarks/memory.py [--methods mean "the default"] [--ranks 4] [--rounds 3]
        [--output docs/performance/memory.csv]
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from _runs import machine, markdown, write_csv
from lightning.pytorch.plugins.environments import LightningEnvironment
from step import METHODS
from tasks import Classifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SHOWN = [
    "mean",
    "NNM + trimmed mean",
    "signSGD majority vote",
    "the default",
    "Byz-EF21-SGDM, Top-1%, median",
    "Byz-EF21-SGDM-BC, Top-1%, NNM",
    "mean (AllGather)",
    "Byz-EF21-SGDM, Top-1%, NNM (AllGather)",
]
WIDTH, LAYERS = 2048, 12
GRADIENT = 4 * LAYERS * WIDTH * (WIDTH + 1)  # bytes
WARM_UP, STEPS = 6, 10


class Peak(L.Callback):
    """The most bytes that this process has held since the first steps."""

    peak = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, *_: object
    ) -> None:
        if trainer.global_step == WARM_UP:
            Path("/proc/self/clear_refs").write_text("5")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        self.peak = next(1024 * int(line.split()[1]) for line in lines if "VmHWM" in line)


def train(method: str, rank: int, world: int) -> None:
    """One rank of a training; rank 0 prints the most bytes that any of them held."""
    os.environ.update(NODE_RANK=str(rank), LOCAL_RANK="0")  # to Lightning, a node of one device
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    peak = Peak()
    trainer = L.Trainer(
        strategy=METHODS[method](),
        accelerator="cpu",
        devices=1,
        num_nodes=world,
        plugins=[LightningEnvironment()],
        max_steps=STEPS,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[peak],
    )
    data = TensorDataset(torch.randn(2 * STEPS, WIDTH), torch.randint(10, (2 * STEPS,)))
    net = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    dist.init_process_group("gloo", rank=rank, world_size=world)
    trainer.fit(Classifier(net), DataLoader(data, batch_size=2))
    most = torch.tensor([peak.peak])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if rank == 0:
        print(int(most), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def bytes_of(method: str, world: int) -> int:
    """The most bytes that a rank of a training holds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--method", method, "--ranks", str(world), "--rank"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank)],
            env={**os.environ, **shared},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(world)
    ]
    said = [each.communicate()[0] for each in ranks]
    if any(each.returncode for each in ranks):
        raise RuntimeError(f"A rank failed under {method}: {[each.returncode for each in ranks]}.")
    return int(said[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures memory beyond DDP's.")
    parser.add_argument("--methods", nargs="+", default=SHOWN, choices=list(METHODS))
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each method, in turns")
    parser.add_argument("--output", type=Path, help="a CSV file")
    parser.add_argument("--method", help=argparse.SUPPRESS)  # what a rank is told
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.method:
        train(arguments.method, arguments.rank, arguments.ranks)
        return
    held: dict[str, list[int]] = {name: [] for name in ("DDP", *arguments.methods)}
    for _ in range(arguments.rounds):
        for name, found in held.items():
            found.append(bytes_of(name, arguments.ranks))
            print(f"{name}: {found[-1] / GRADIENT:.2f} gradients", file=sys.stderr, flush=True)
    base = statistics.median(held["DDP"])
    columns = ["machine", "ranks", "parameters", "method", "held_over_gradient", "beyond_ddp"]
    rows = [
        [
            machine(),
            arguments.ranks,
            GRADIENT // 4,
            name,
            f"{statistics.median(found) / GRADIENT:.2f}",
            f"{(statistics.median(found) - base) / GRADIENT:.2f}",
        ]
        for name, found in held.items()
    ]
    if arguments.output:
        write_csv(arguments.output, columns, rows)
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()
