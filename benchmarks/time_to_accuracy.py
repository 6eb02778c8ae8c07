"""How long a whole training takes until it is as accurate: DDP beside signSGD with majority vote,
over whatever link there is.

``python benchmarks/time_to_accuracy.py --data DIR`` starts four processes on this machine; under a
launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT every process runs the same
command, and rank 0 prints. DIR holds FashionMNIST/raw. The model is an MLP, 784 - 2048 - 2048 -
2048 - 10, of 10 million parameters; every rank has a part of the training set. The clock stands
still while the accuracy on the test set is taken.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from itertools import pairwise
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from step import on_this_machine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_byz import FashionMNISTDataModule, Sharded, SignSGDMajorityVote
from lightning_byz.lightning import ByzantineRobustStrategy

METHODS: dict[str, Any] = {
    "DDP": (DDPStrategy, {"lr": 0.1, "momentum": 0.9}),
    "signSGD majority vote": (
        lambda: ByzantineRobustStrategy(SignSGDMajorityVote(), Sharded()),
        {"lr": 1e-4},
    ),
}


class Module(L.LightningModule):
    def __init__(self, lr: float, momentum: float = 0.0) -> None:
        super().__init__()
        self.lr, self.momentum = lr, momentum
        sizes = [784, 2048, 2048, 2048, 10]
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*layers[:-1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


class Race(L.Callback):
    """Seconds of training and the test accuracy in percent, every few steps; ends the training once
    the goal is reached twice in a row.
    """

    def __init__(self, test: tuple[Tensor, Tensor], every: int, goal: float) -> None:
        self.test, self.every, self.goal, self.seconds = test, every, goal, 0.0
        self.curve: list[tuple[int, float, float]] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        self.seconds += time.perf_counter() - self.began
        if trainer.global_step % self.every:
            return
        module.eval()
        with torch.no_grad():
            x, y = self.test
            accuracy = 100 * float((module.net(x).argmax(1) == y).double().mean())
        module.train()
        self.curve.append((trainer.global_step, self.seconds, accuracy))
        last = [accuracy for *_, accuracy in self.curve[-2:]]
        both = torch.tensor([len(last) == 2 and min(last) >= self.goal], dtype=torch.int64)
        dist.broadcast(both, src=0)
        trainer.should_stop = bool(both)


def train(
    method: str,
    arguments: argparse.Namespace,
    training: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    strategy, optimizer = METHODS[method]
    torch.manual_seed(arguments.seed)
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = TensorDataset(*(part[rank::world] for part in training))
    generator = torch.Generator().manual_seed(arguments.seed + rank)
    loader = DataLoader(
        mine, arguments.batch_size, shuffle=True, generator=generator, drop_last=True
    )
    race = Race(test, arguments.every, arguments.goal)
    trainer = L.Trainer(
        strategy=strategy(),
        accelerator="cpu",
        devices=1,
        num_nodes=world,
        plugins=[LightningEnvironment()],
        max_steps=arguments.steps,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[race],
    )
    dist.barrier()
    trainer.fit(Module(**optimizer), loader)
    dist.barrier()
    reached = [
        point for point, after in pairwise(race.curve) if min(point[2], after[2]) >= arguments.goal
    ]
    step, seconds, _ = reached[0] if reached else (None, None, None)
    steps, total, _ = race.curve[-1]
    return {
        "method": method,
        "goal": arguments.goal,
        "seconds": seconds,
        "steps": step,
        "ms a step": 1000 * total / steps,
        "curve": race.curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--goal", type=float, default=85.0, help="test accuracy in percent")
    parser.add_argument("--steps", type=int, default=600, help="at most")
    parser.add_argument("--every", type=int, default=10, help="steps between looks at the accuracy")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ranks", type=int, default=4, help="processes to start where no launcher did"
    )
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit(on_this_machine(arguments.ranks))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ.update(NODE_RANK=str(rank), LOCAL_RANK="0")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    module = FashionMNISTDataModule(arguments.data)
    module.setup("fit")
    training, test = (
        [
            part.flatten(1) if part.ndim > 1 else part
            for part in images.__getitems__(range(len(images)))
        ]
        for images in (module.training, module.held_out)
    )
    test = [part[:2000] for part in test]
    for method in arguments.methods:
        found = train(method, arguments, training, test)
        if rank == 0:
            print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
