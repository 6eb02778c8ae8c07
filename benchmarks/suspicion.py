"""How soon the suspicion test finds silent faults, and how often it accuses honest workers: the
table of docs/suspicion.md.

    python benchmarks/suspicion.py [--output FOLDER] [--jobs N] [--honest RUNS] [--seeds RUNS]

Eight workers train a small network on the digits, without a Trainer: their gradients go through the
worker half of RobustSGD's momentum where there is one, the fault, and the test; the step is the
mean of the honest workers' gradients, so that a faulty worker does not change the training that the
others are watched in. Runs that are done are not done again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from _runs import Run, markdown, run_all
from torch.func import grad, vmap

from lightning_byz import Dirichlet, FlippedBit, LabelFlip, Stuck, WrongScale
from lightning_byz.attacks import Attack, Scene
from lightning_byz.data.digits import load_digits
from lightning_byz.diagnostics.suspicion import SuspicionTest
from lightning_byz.types import keyed_generator

WORKERS, F, STEPS, ONSET, FAULTY, BATCH = 8, 2, 1000, 300, 5, 16
FAULTS: dict[str, Any] = {
    "flipped exponent bit": FlippedBit(),
    "loss scale left in (65536)": WrongScale(),
    "gradient half as long": WrongScale(0.5),
    "stuck": Stuck(),
    "flipped labels": LabelFlip(10),
}
SETTINGS: dict[str, Run] = {
    "one pool of data, as DDP's sampler draws": {
        "data": "pool",
        "beta": 0.0,
        "every": 10,
        "compare": "others",
    },
    "the same, worker momentum 0.9": {
        "data": "pool",
        "beta": 0.9,
        "every": 29,
        "compare": "others",
    },
    "every worker keeps its own random eighth": {
        "data": "parts",
        "beta": 0.0,
        "every": 10,
        "compare": "others",
    },
    "Dirichlet(0.1) labels": {"data": "dirichlet", "beta": 0.0, "every": 10, "compare": "others"},
    "Dirichlet(0.1) labels, compare='own_past'": {
        "data": "dirichlet",
        "beta": 0.0,
        "every": 10,
        "compare": "own_past",
    },
}


def parts(data: str, labels: torch.Tensor, seed: int) -> list[torch.Tensor]:
    if data == "dirichlet":
        return [torch.as_tensor(part) for part in Dirichlet(0.1)(labels, WORKERS, seed)]
    order = torch.randperm(len(labels), generator=keyed_generator("parts", seed))
    return list(order.chunk(WORKERS)) if data == "parts" else [order] * WORKERS


def loss(weights: tuple[torch.Tensor, ...], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    a, b, c, d = weights
    return torch.nn.functional.cross_entropy(torch.relu(x @ a + b) @ c + d, y)


def work(run: Run) -> Run:
    """The step at which the faulty worker is accused, and the honest workers that ever are."""
    torch.set_num_threads(1)
    images, labels = load_digits()
    images, seed = images.flatten(1), run["seed"]
    own = parts(run["data"], labels, seed)
    generator = keyed_generator("run", seed)
    shapes = ((64, 32), (32,), (32, 10), (10,))
    weights = tuple(
        torch.randn(shape, generator=generator) * (shape[0] ** -0.5 if len(shape) > 1 else 0)
        for shape in shapes
    )
    gradients = vmap(grad(loss), in_dims=(None, 0, 0))
    fault = FAULTS.get(run["fault"])
    test, momentum, memory = SuspicionTest(WORKERS, F, compare=run["compare"]), torch.zeros(1), {}
    pool = torch.empty(0, dtype=torch.int64)
    found: dict[int, int] = {}
    for step in range(STEPS):
        if run["data"] == "pool":  # without replacement, every epoch anew
            if len(pool) < WORKERS * BATCH:
                pool = own[0][torch.randperm(len(labels), generator=generator)]
            chosen, pool = pool[: WORKERS * BATCH].view(WORKERS, BATCH), pool[WORKERS * BATCH :]
        else:
            chosen = torch.stack(
                [part[torch.randint(len(part), (BATCH,), generator=generator)] for part in own]
            )
        faulty = fault is not None and step >= ONSET
        y = labels[chosen]
        if faulty and isinstance(fault, LabelFlip):
            y[FAULTY] = fault.flip(y[FAULTY])
        parts_of = gradients(weights, images[chosen], y)
        rows = torch.cat([part.reshape(WORKERS, -1) for part in parts_of], 1)
        honest = torch.ones(WORKERS, dtype=torch.bool)
        honest[FAULTY] = fault is None
        mean = rows[honest].mean(0)
        momentum = torch.lerp(rows, momentum, run["beta"]) if run["beta"] else rows
        sent = momentum / (1 - run["beta"] ** (step + 1)) if run["beta"] else rows
        if faulty and isinstance(fault, Attack):
            sent = sent.clone()
            scene = Scene(
                generator=keyed_generator("attack", seed, step),
                step=step,
                memory=memory,
                own=[FAULTY],
            )
            sent[FAULTY] = fault(sent[honest], sent[FAULTY : FAULTY + 1].clone(), scene)[0]
        if step % run["every"] < 2:
            for worker in test.observe(sent):
                found.setdefault(worker, step)
        with torch.no_grad():
            pieces = mean.split([w.numel() for w in weights])
            weights = tuple(
                w - 0.1 * piece.view(w.shape) for w, piece in zip(weights, pieces, strict=True)
            )
    after = found.pop(FAULTY, None) if fault is not None else None
    return {"steps": None if after is None else after - ONSET, "honest": sorted(found)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/suspicion"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--honest", type=int, default=20, help="honest runs of each setting")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each fault in each setting")
    arguments = parser.parse_args()
    counts = {"none": arguments.honest, **dict.fromkeys(FAULTS, arguments.seeds)}
    runs = [
        {**how, "fault": fault, "seed": seed}
        for how in SETTINGS.values()
        for fault, count in counts.items()
        for seed in range(count)
    ]
    results = run_all(runs, work, arguments.output, arguments.jobs)

    def cell(how: Run, fault: str) -> str:
        mine = [
            result
            for run, result in results
            if run["fault"] == fault and all(run[key] == value for key, value in how.items())
        ]
        if fault == "none":
            return f"{sum(bool(result['honest']) for result in mine)} of {len(mine)}"
        times = [
            result["steps"]
            for result in mine
            if result["steps"] is not None and result["steps"] >= 0
        ]
        before = sum(result["steps"] is not None and result["steps"] < 0 for result in mine)
        others = sum(bool(result["honest"]) for result in mine)
        text = (
            f"{statistics.median(times):.0f} ({len(times)} of {len(mine)})"
            if times
            else f"never (0 of {len(mine)})"
        )
        return (
            text
            + (f", {before} before" if before else "")
            + (f", {others} with others" if others else "")
        )

    header = ["setting", *FAULTS, "honest runs that accused anybody"]
    rows = [
        [name, *(cell(how, fault) for fault in FAULTS), cell(how, "none")]
        for name, how in SETTINGS.items()
    ]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
