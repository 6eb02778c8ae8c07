"""How long a training step takes, and how much of it is the exchange: DDP and its communication
hooks beside this package's strategy.

``python benchmarks/step.py`` starts four processes on this machine. Under a launcher that sets
RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT (torchrun, SLURM's with these variables, or several
hosts by hand) every process runs the same command, and rank 0 prints. All methods take turns in one
run: some steps each, several times over. The *exposed exchange* is a method's step minus the step
of the same processes without communication, at the same time. Bytes are those that leave the
network interface named by GLOO_SOCKET_IFNAME, by the kernel's count.

    python benchmarks/step.py [--models resnet18] [--setting "1 Gbit/s"]
        [--output docs/performance/step.csv]
    python benchmarks/step.py --phases --models resnet18 --methods mean

``--phases`` says instead where the main thread of rank 0 spends the exchange.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
import torch.distributed as dist
from _runs import machine, markdown, write_csv
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from tasks import TASKS
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.utils.data import DataLoader, TensorDataset

from lightning_byz import (
    NNM,
    AllGather,
    ByzEF21SGDM,
    ByzEF21SGDMBC,
    Chain,
    CoordinateMedian,
    Mean,
    MultiKrum,
    RobustSGD,
    Sharded,
    SignSGDMajorityVote,
    TopK,
    TrimmedMean,
)
from lightning_byz.engine.server_side import ServerSide
from lightning_byz.lightning import ByzantineRobustStrategy
from lightning_byz.strategies.overlap import Overlap
from lightning_byz.transports import sharded

WARM_UP = 2


class Hooked(DDPStrategy):
    """DDP with a communication hook, also on a CPU, where Lightning leaves hooks out."""

    def __init__(self, hook: Callable[..., Any], state: Callable[[], Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hook, self.state = hook, state

    def configure_ddp(self) -> None:
        super().configure_ddp()
        self.model.register_comm_hook(self.state(), self.hook)


def power_sgd() -> PowerSGDState:
    return PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)


def robust(algorithm: Any, transport: Any = Sharded) -> Callable[[], Any]:
    return lambda: ByzantineRobustStrategy(algorithm, transport(), num_byzantine=None)


def ef21(rule: Any) -> ByzEF21SGDM:
    return ByzEF21SGDM(rule, TopK(ratio=0.01))


NNM_TRIMMED = Chain(pre=(NNM(),), rule=TrimmedMean())
METHODS: dict[str, Callable[[], Any]] = {
    "no communication": lambda: "auto",
    "DDP": DDPStrategy,
    "DDP, fp16 hook": lambda: Hooked(fp16_compress_hook, lambda: None),
    # One bucket: its callbacks wait for collectives of their own, which two buckets may start in
    # another order on another rank.
    "DDP, PowerSGD hook": lambda: Hooked(powerSGD_hook, power_sgd, bucket_cap_mb=1000),
    "mean": robust(RobustSGD(Mean())),
    "median": robust(RobustSGD(CoordinateMedian())),
    "NNM + trimmed mean": robust(RobustSGD(NNM_TRIMMED)),
    "Multi-Krum": robust(RobustSGD(MultiKrum())),
    "Byz-EF21-SGDM, Top-1%, median": robust(ef21(CoordinateMedian())),
    "Byz-EF21-SGDM, Top-1%, NNM (AllGather)": robust(ef21(NNM_TRIMMED), AllGather),
    "Byz-EF21-SGDM-BC, Top-1%, NNM": robust(
        ByzEF21SGDMBC(NNM_TRIMMED, TopK(ratio=0.01), server_compressor=TopK(ratio=0.01))
    ),
    "signSGD majority vote": robust(SignSGDMajorityVote()),
    "mean (AllGather)": robust(RobustSGD(Mean()), AllGather),
    "NNM + trimmed mean (AllGather)": robust(RobustSGD(NNM_TRIMMED), AllGather),
    "mean, transport as by default": lambda: ByzantineRobustStrategy(RobustSGD(Mean())),
    "the default": ByzantineRobustStrategy,
    "signSGD majority vote (AllGather)": robust(SignSGDMajorityVote(), AllGather),
}

BASES = ("no communication", "DDP")

AIMS: dict[str, dict[str, float]] = {
    **{key: {"1 Gbit/s": 1.2, "100 Mbit/s": 1.1, "loopback": 2} for key in ("mean", "median")},
    **{
        key: {"1 Gbit/s": 1.3, "100 Mbit/s": 1.1, "loopback": 2.5}
        for key in ("NNM + trimmed mean", "Multi-Krum")
    },
    **{key: {"1 Gbit/s": 0.35, "100 Mbit/s": 0.15} for key in METHODS if "EF21" in key},
    "signSGD majority vote": {"1 Gbit/s": 0.2, "100 Mbit/s": 0.06, "loopback": 0.6},
}
"""The most that a method's exposed exchange may be over DDP's, by setting."""
COLUMNS = ["setting", "machine", "threads_per_rank", "model", "ranks", "method", "step_ms"]
COLUMNS += ["step_over_ddp", "exposed_ms", "exposed_over_ddp", "aim", "mb_sent", "bytes_over_ddp"]


class Clock(L.Callback):
    """When every step ended, and how many bytes had left by then."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.sent: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.times.append(time.perf_counter())
        self.sent.append(bytes_sent())


def bytes_sent() -> int:
    """By this host's interface since it exists; 0 on loopback."""
    counter = (
        Path("/sys/class/net") / os.environ.get("GLOO_SOCKET_IFNAME", "lo") / "statistics/tx_bytes"
    )
    return int(counter.read_text()) if counter.exists() and counter.parts[-3] != "lo" else 0


def steps_of(
    method: str, model: str, steps: int, batch_size: int, world: int
) -> tuple[list[float], list[float]]:
    """Seconds and bytes of this many steps of a method. Every rank has samples of its own: equal
    messages would be cheaper to compare, and to revise.
    """
    task = TASKS[model]
    torch.manual_seed(0)
    module = task.module()
    torch.manual_seed(1 + dist.get_rank())
    tensors = task.draw()
    clock, alone = Clock(), method == "no communication"
    loader = DataLoader(TensorDataset(*tensors), batch_size=batch_size)
    trainer = L.Trainer(
        strategy=METHODS[method](),
        accelerator="cpu",
        devices=1,
        num_nodes=1 if alone else world,
        plugins=[] if alone else [LightningEnvironment()],
        max_steps=WARM_UP + steps,
        max_epochs=-1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*task.callbacks(), clock],
    )
    dist.barrier()
    trainer.fit(module, loader)
    dist.barrier()
    after = range(WARM_UP, len(clock.times))
    return [clock.times[i] - clock.times[i - 1] for i in after], [
        float(clock.sent[i] - clock.sent[i - 1]) for i in after
    ]


PHASES: dict[str, tuple[type, str]] = {
    "worker's half of the buckets": (Overlap, "arrived"),
    "waiting for messages": (sharded._Uplink, "close"),
    "rule and answer": (ServerSide, "judge"),
}
"""By part of the exchange, the method that the main thread is in meanwhile."""


@contextmanager
def timed_phases(spent: dict[str, float]) -> Iterator[None]:
    """Inside, seconds in each of `PHASES` are added to ``spent``."""

    def timed(original: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*args)
            finally:
                spent[phase] += time.perf_counter() - began

        return call

    with ExitStack() as stack:
        for phase, (owner, name) in PHASES.items():
            patch = mock.patch.object(owner, name, timed(getattr(owner, name), phase))
            stack.enter_context(patch)
        yield


def phases(arguments: argparse.Namespace, world: int) -> None:
    """Prints milliseconds a step, for each model and method."""
    for model in arguments.models:
        size = arguments.steps, arguments.batch_size, world
        base = [statistics.median(steps_of(name, model, *size)[0]) for name in BASES]
        for method in arguments.methods:
            spent = dict.fromkeys(PHASES, 0.0)
            with timed_phases(spent):
                step = statistics.median(steps_of(method, model, *size)[0])
            if dist.get_rank() == 0:
                rows = [
                    ["exposed exchange", f"{1000 * (step - base[0]):.1f}"],
                    ["of DDP", f"{1000 * (base[1] - base[0]):.1f}"],
                ]
                all_steps = arguments.steps + WARM_UP
                rows += [[name, f"{1000 * spent[name] / all_steps:.1f}"] for name in spent]
                print(markdown([f"{model}, {method}", "ms a step"], rows), flush=True)


def measure(arguments: argparse.Namespace, world: int) -> None:
    names = [
        name for name in METHODS if not arguments.methods or name in (*BASES, *arguments.methods)
    ]
    for model in arguments.models:
        seconds: dict[str, list[float]] = {name: [] for name in names}
        sent: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                times, counts = steps_of(name, model, arguments.steps, arguments.batch_size, world)
                seconds[name] += times
                sent[name] += counts
                if dist.get_rank() == 0:
                    print(
                        f"{model}, {name}: {1000 * statistics.median(times):.3g} ms",
                        file=sys.stderr,
                        flush=True,
                    )
        if dist.get_rank() == 0:
            rows = table(arguments.setting, model, seconds, sent)
            if arguments.output:
                write_csv(arguments.output, COLUMNS, rows, add=True)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(
                f"{markdown(COLUMNS, rows)}\n{os.getloadavg()[0]:.1f} processes running; "
                f"peak memory of rank 0: {memory:.1f} GB.",
                flush=True,
            )


def table(
    setting: str, model: str, seconds: dict[str, list[float]], sent: dict[str, list[float]]
) -> list[list[Any]]:
    """What `COLUMNS` names."""
    run = [setting, machine(), torch.get_num_threads(), model, dist.get_world_size()]
    step = {name: statistics.median(times) for name, times in seconds.items()}
    sizes = {name: statistics.median(counts) for name, counts in sent.items()}
    base, rows = step["no communication"], []
    for name, time_of_step in step.items():
        if name == "no communication":
            rows.append([*run, name, f"{1000 * base:.3g}", *[""] * 6])
            continue
        exposed, ddp = time_of_step - base, step["DDP"] - base
        ratio = sizes[name] / sizes["DDP"] if sizes["DDP"] else 0.0
        wire = [f"{sizes[name] / 1e6:.2f}", f"{ratio:.3f}"] if ratio else ["", ""]
        rows.append(
            [
                *run,
                name,
                f"{1000 * time_of_step:.3g}",
                f"{time_of_step / step['DDP']:.2f}",
                f"{1000 * exposed:.3g}",
                f"{exposed / ddp:.2f}",
                AIMS.get(name, {}).get(setting, ""),
                *wire,
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), help="these only, beside DDP"
    )
    parser.add_argument("--steps", type=int, default=3, help="measured steps at a time")
    parser.add_argument(
        "--rounds", type=int, default=3, help="how often all methods take their turn"
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument(
        "--ranks", type=int, default=4, help="processes to start where no launcher did"
    )
    parser.add_argument(
        "--setting", default="loopback", help="the network, as the table names it: 1 Gbit/s"
    )
    parser.add_argument("--output", type=Path, help="a CSV file to which the rows are added")
    parser.add_argument("--phases", action="store_true", help="where the exchange of METHODS goes")
    arguments = parser.parse_args()
    if arguments.phases and not arguments.methods:
        parser.error("--phases needs --methods")
    if "RANK" not in os.environ:
        sys.exit(on_this_machine(arguments.ranks))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # to Lightning, every process is a node of one device
    os.environ.update(NODE_RANK=str(rank), LOCAL_RANK="0")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    (phases if arguments.phases else measure)(arguments, world)
    dist.barrier()
    dist.destroy_process_group()


def on_this_machine(ranks: int) -> int:
    """Runs this command once for each rank; the exit status is that of the first rank that
    fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    shared.setdefault("OMP_NUM_THREADS", "1")
    children = [
        subprocess.Popen([sys.executable, *sys.argv], env={**shared, "RANK": str(rank)})
        for rank in range(ranks)
    ]
    return next((code for code in [child.wait() for child in children] if code), 0)


if __name__ == "__main__":
    main()
