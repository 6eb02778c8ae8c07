"""The 19 workloads that ByzPy publishes its times of, against ByzFL: the same shapes, on this
machine, with our column beside theirs.

    python benchmarks/byzpy_workloads.py [--only MDA ARC]
        [--output docs/performance/byzpy_workloads.csv]

ByzPy's table (github.com/Byzpy/byzpy, benchmarks/README.md, version 0.1.4) gives, for each
workload, ByzFL's time, its own without actors and with pools of 2, 4 and 6 processes, on a machine
that it does not name; we quote ByzFL's, the one without actors, and the best pool. Here all three
libraries run in one process with torch's threads, interleaved, best of several calls after one that
is not counted; ByzPy without actors. Peers: ``pip install byzfl``,
``pip install --no-deps byzpy cloudpickle``.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import byzfl
import torch
from _runs import machine, markdown, write_csv
from byzpy.aggregators.coordinate_wise.mean_of_medians import MeanOfMedians
from byzpy.aggregators.coordinate_wise.median import CoordinateWiseMedian
from byzpy.aggregators.coordinate_wise.trimmed_mean import CoordinateWiseTrimmedMean
from byzpy.aggregators.geometric_wise.geometric_median import GeometricMedian
from byzpy.aggregators.geometric_wise.krum import MultiKrum
from byzpy.aggregators.geometric_wise.minimum_diameter_average import MinimumDiameterAveraging
from byzpy.aggregators.geometric_wise.monna import MoNNA
from byzpy.aggregators.geometric_wise.smea import SMEA
from byzpy.aggregators.norm_wise.caf import CAF
from byzpy.aggregators.norm_wise.center_clipping import CenteredClipping
from byzpy.aggregators.norm_wise.comparative_gradient_elimination import (
    ComparativeGradientElimination,
)
from byzpy.attacks.empire import EmpireAttack
from byzpy.attacks.gaussian import GaussianAttack
from byzpy.attacks.little import LittleAttack
from byzpy.pre_aggregators.arc import ARC
from byzpy.pre_aggregators.bucketing import Bucketing
from byzpy.pre_aggregators.clipping import Clipping
from byzpy.pre_aggregators.nnm import NearestNeighborMixing

import lightning_byz as byz
from lightning_byz.numerics.rows import Rows

Timed = Callable[[torch.Tensor], Any]
COLUMNS = ["workload", "shape", "ours_ms", "byzfl_ms", "byzpy_direct_ms", "fastest_peer_over_ours"]
COLUMNS += [f"published_{name}_ms" for name in ("byzfl", "byzpy_direct", "byzpy_best_pool")]
COLUMNS += ["best_published_over_ours"]


class Workload(NamedTuple):
    """One line of ByzPy's table.

    Attributes:
        n, d: the shape.
        ours: our operation.
        byzfl: ByzFL's; None where it has none, or did not end within ByzPy's ten seconds.
        byzpy: ByzPy's, without actors.
        published: milliseconds in ByzPy's table: ByzFL, ByzPy without actors, ByzPy's best pool;
            nan: none given.
    """

    n: int
    d: int
    ours: Timed
    byzfl: Timed | None
    byzpy: Timed | None
    published: tuple[float, float, float]


def _rule(rule: Any) -> Timed:
    return lambda rows: rule.aggregate(list(rows))


def _pre(rule: Any) -> Timed:
    return lambda rows: rule.pre_aggregate(list(rows))


def _attack(attack: Any) -> Timed:
    return lambda rows: attack.apply(honest_grads=list(rows))


def _mixed(rule: byz.PreAggregator) -> Timed:
    return lambda rows: rule(Rows(rows)).dense()


def _lie(attack: byz.Attack) -> Timed:
    return lambda rows: attack(rows, rows[:1])


NONE = math.nan
_LATE = math.inf

WORKLOADS = {
    "MDA": Workload(
        30, 2048, byz.MDA(f=10), None, _rule(MinimumDiameterAveraging(10)), (_LATE, 353, 166)
    ),
    "SMEA": Workload(16, 4096, byz.SMEA(f=5), None, _rule(SMEA(5)), (_LATE, 82, 48.0)),
    "ARC": Workload(
        256, 65536, _mixed(byz.ARC(f=8)), byzfl.ARC(f=8), _pre(ARC(8)), (191.27, 20.77, 50.87)
    ),
    "trimmed mean": Workload(
        64,
        65536,
        byz.TrimmedMean(f=8),
        byzfl.TrMean(f=8),
        _rule(CoordinateWiseTrimmedMean(8)),
        (68.08, 65.52, 15.15),
    ),
    "median": Workload(
        64,
        65536,
        byz.CoordinateMedian(f=31),
        byzfl.Median(),
        _rule(CoordinateWiseMedian()),
        (NONE, 52, 37),
    ),
    "Multi-Krum": Workload(
        80,
        65536,
        byz.MultiKrum(f=20, m=12),
        byzfl.MultiKrum(f=20),
        _rule(MultiKrum(20, 12)),
        (78.17, 59.66, 26.30),
    ),
    "geometric median": Workload(
        64,
        65536,
        byz.GeometricMedian(f=8),
        byzfl.GeometricMedian(),
        _rule(GeometricMedian()),
        (NONE, 398.21, 142.97),
    ),
    "CAF": Workload(64, 65536, byz.CAF(f=8), byzfl.CAF(f=8), _rule(CAF(8)), (72.65, 54.51, 54.94)),
    "MoNNA": Workload(64, 65536, byz.MoNNA(f=8), byzfl.MoNNA(f=8), _rule(MoNNA(8)), (51, 67, 11)),
    "CenteredClip": Workload(
        64,
        65536,
        byz.CenteredClip(f=8, tau=0.1, iterations=10),
        byzfl.CenteredClipping(L=10, tau=0.1),
        _rule(CenteredClipping(c_tau=0.1, M=10)),
        (146, 112, 50),
    ),
    "CGE": Workload(
        64, 65536, byz.CGE(f=8), None, _rule(ComparativeGradientElimination(8)), (NONE, 100, 23)
    ),
    "empire (IPM)": Workload(
        64,
        65536,
        _lie(byz.IPM(epsilon=2.0)),
        byzfl.InnerProductManipulation(tau=2.0),
        _attack(EmpireAttack(-2.0)),
        (50, 34, 14),
    ),
    "little (ALIE)": Workload(
        96,
        65536,
        _lie(byz.ALIE(z=1.5)),
        byzfl.ALittleIsEnough(tau=1.5),
        _attack(LittleAttack(12)),
        (70.39, 67.03, 32.86),
    ),
    "Gaussian": Workload(
        64,
        65536,
        _lie(byz.Gaussian()),
        byzfl.Gaussian(),
        _attack(GaussianAttack(seed=0)),
        (44.33, 12.6, 12.3),
    ),
    "NNM": Workload(
        196,
        4096,
        _mixed(byz.NNM(f=32)),
        byzfl.NNM(f=32),
        _pre(NearestNeighborMixing(32)),
        (58, 12, 137),
    ),
    "MeaMed": Workload(
        64, 65536, byz.MeaMed(f=8), byzfl.Meamed(f=8), _rule(MeanOfMedians(8)), (152, 113, 59)
    ),
    "bucketing": Workload(
        512,
        16384,
        _mixed(byz.Bucketing(s=32)),
        byzfl.Bucketing(s=32),
        _pre(Bucketing(32)),
        (23, 13.4, 21.7),
    ),
    "clipping": Workload(
        256,
        65536,
        _mixed(byz.StaticClipping(c=2.0)),
        byzfl.Clipping(c=2.0),
        _pre(Clipping(2.0)),
        (382, 46, 61),
    ),
}


def best(workload: Workload, patience: float = 3.0) -> list[float]:
    """Milliseconds of one call: ours, ByzFL's, ByzPy's without actors; nan where there is nothing
    to call.
    """
    rows = torch.randn(workload.n, workload.d, generator=torch.Generator().manual_seed(0))
    contestants = [workload.ours, workload.byzfl, workload.byzpy]
    found = [NONE if contestant is None else math.inf for contestant in contestants]
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or (rounds < 20 and time.perf_counter() - start < patience):
        for i, contestant in enumerate(contestants):
            if contestant is None:
                continue
            copy = rows.clone()  # some overwrite their input
            begun = time.perf_counter()
            contestant(copy)
            if rounds:
                found[i] = min(found[i], 1000 * (time.perf_counter() - begun))
        rounds += 1
    return found


# -- the nineteenth: a parameter server with Multi-Krum, 10 honest workers and 3 liars, the CNN of ByzFL for MNIST --

_HONEST, _LIARS, _ROUNDS, _BATCH = 10, 3, 50, 64


def images() -> torch.utils.data.TensorDataset:
    """Random images of MNIST's shape: the time of a round does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 1, 28, 28, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.randint(10, (6000,), generator=generator))


def our_training() -> float:
    """Milliseconds of one of our rounds, in a Trainer."""
    import lightning
    from byzfl.fed_framework.models import cnn_mnist

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = cnn_mnist()
            self.times: list[float] = []

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return torch.nn.functional.nll_loss(self.net(batch[0]), batch[1])

        def on_train_batch_end(self, *args: Any) -> None:
            self.times.append(time.perf_counter())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-4)

    n = _HONEST + _LIARS
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy=byz.ByzantineRobustStrategy(
            byz.RobustSGD(aggregator=byz.MultiKrum(), worker_momentum=0.9),
            workers_per_process=n,
            num_byzantine=_LIARS,
        ),
        callbacks=[byz.ByzantineWorkers(byz.IPM(epsilon=3.0), count=_LIARS, every_n_steps=10**9)],
        max_steps=_ROUNDS + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier()
    trainer.fit(
        module,
        torch.utils.data.DataLoader(images(), batch_size=n * _BATCH, shuffle=True, drop_last=True),
    )
    return 1000 * (module.times[-1] - module.times[0]) / _ROUNDS


def their_training() -> float:
    """Milliseconds of one of ByzFL's rounds."""
    parameters = {
        "model_name": "cnn_mnist",
        "device": "cpu",
        "optimizer_name": "SGD",
        "learning_rate": 0.1,
        "weight_decay": 1e-4,
        "milestones": [_ROUNDS],
        "learning_rate_decay": 0.25,
    }

    def loader() -> Any:
        return torch.utils.data.DataLoader(images(), batch_size=_BATCH, shuffle=True)

    clients = [
        byzfl.Client(
            parameters
            | {
                "loss_name": "NLLLoss",
                "LabelFlipping": False,
                "training_dataloader": loader(),
                "momentum": 0.9,
            }
            | {"nb_labels": 10, "store_per_client_metrics": False}
        )
        for _ in range(_HONEST)
    ]
    rule = {"name": "MultiKrum", "parameters": {"f": _LIARS}}
    server = byzfl.Server(
        parameters | {"test_loader": loader(), "aggregator_info": rule, "pre_agg_list": []}
    )
    liars = byzfl.ByzantineClient(
        {"name": "InnerProductManipulation", "f": _LIARS, "parameters": {"tau": 3.0}}
    )

    def round() -> None:
        for client in clients:
            client.set_model_state(server.get_dict_parameters())
            client.compute_gradients()
        honest = [client.get_flat_gradients_with_momentum() for client in clients]
        server.update_model_with_gradients(honest + liars.apply_attack(honest))

    round()
    start = time.perf_counter()
    for _ in range(_ROUNDS):
        round()
    return 1000 * (time.perf_counter() - start) / _ROUNDS


# -- the table -------------------------------------------------------------------------------------


def _ms(value: float) -> str:
    return "" if math.isnan(value) else "> 10000" if math.isinf(value) else f"{value:.3g}"


def line(
    name: str, shape: str, found: list[float], published: tuple[float, float, float]
) -> list[str]:
    rivals = [value for value in found[1:] if not math.isnan(value)]
    faster = f"{min(rivals) / found[0]:.1f}" if rivals else ""
    beats = f"{min(value for value in published if not math.isnan(value)) / found[0]:.1f}"
    cells = [
        name,
        shape,
        *map(_ms, found),
        faster,
        *map(_ms, published),
        beats,
    ]
    print(" | ".join(cells), file=sys.stderr, flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description="ByzPy's published workloads.")
    parser.add_argument("--only", nargs="+", help="these workloads")
    parser.add_argument(
        "--output",
        type=Path,
        help="a CSV file to write; what it held is replaced",
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = [
        line(name, f"{work.n} x {work.d}", best(work), work.published)
        for name, work in WORKLOADS.items()
        if not arguments.only or name in arguments.only
    ]
    training = "parameter server, Multi-Krum: a round of 13 workers"
    if not arguments.only or training in arguments.only:
        rows.append(
            line(training, "CNN, batch 64", [our_training(), their_training(), NONE], (57, 71, 42))
        )
    if arguments.output:
        write_csv(arguments.output, COLUMNS, rows)
    print(f"{markdown(COLUMNS, rows)}\n{machine()}, {torch.get_num_threads()} threads.")


if __name__ == "__main__":
    main()
