"""What the reproductions share: rounds without a Trainer, logistic regression, and how results are
written down and drawn.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _runs import Run, _key, machine, markdown, run_all  # noqa: F401

from lightning_byz.algorithms import Algorithm
from lightning_byz.attacks import Attack
from lightning_byz.data import Partition, WorkerSampler
from lightning_byz.engine.adversary import Adversary
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import Contribution, Outcome
from lightning_byz.engine.simulation import Simulation as Faults
from lightning_byz.transports import InProcess, Transport
from lightning_byz.types import Gradients, Round

Labelled = tuple[Tensor, Tensor]


def initial(sizes: list[int]) -> Tensor:
    """The flat parameters of an MLP, as torch.nn.Linear starts them."""
    return torch.cat(
        [torch.empty((a + 1) * b).uniform_(-(a**-0.5), a**-0.5) for a, b in pairwise(sizes)]
    )


def mlp(w: Tensor, x: Tensor, sizes: list[int]) -> Tensor:
    """Logits ``[..., batch, classes]`` of an MLP with flat parameters ``w [..., d]`` for
    ``x [..., batch, inputs]``.
    """
    for layer, (a, b) in enumerate(pairwise(sizes)):
        weight, bias, w = w.split([a * b, b, w.shape[-1] - (a + 1) * b], -1)
        x = (x if layer == 0 else x.relu()) @ weight.unflatten(-1, (a, b)) + bias.unsqueeze(-2)
    return x


# -- rounds ----------------------------------------------------------------------------------------


class Simulation:
    """Plain SGD on one vector by n in-process workers, of whom the last ``liars`` are Byzantine:
    what a Trainer does, without one.

    Args:
        algorithm: with its f.
        w: the first parameters, ``[d]``.
        n: number of workers.
        liars: how many of them carry out ``attack``; one on data is the gradients' affair.
        lr: the step size; a function of the round's number, or a number.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        w: Tensor,
        n: int,
        seed: int,
        lr: float | Callable[[int], float],
        liars: int = 0,
        attack: Any = None,
    ) -> None:
        transport: Transport = InProcess()
        transport.connect(0, 1, n, w.device)
        byzantine = range(n - liars, n)
        self.exchange = Exchange(algorithm, transport, seed)
        self.exchange.simulation = faults = Faults()
        faults.liars.append(lambda step: byzantine)
        if isinstance(attack, Attack):
            faults.adversaries.append(Adversary(attack, byzantine, x=lambda index: self.w))
        self.w, self.lr, self.n = w, lr, n
        self.before = w  # the parameters of the round before
        self.used = torch.ones(1, dtype=torch.uint8, device=w.device)
        self.bytes_up = self.bytes_down = 0  # of one worker that takes part in every round
        self.seconds = 0.0

    def step(
        self,
        gradients: Callable[[Round, Tensor], Sequence[Gradients | None]],
        trusted: Tensor | None = None,
    ) -> Outcome:
        """One round. ``gradients``: round, cohort ``[n]`` bool -> what each worker computes; None
        for those that do not take part.
        """
        round = self.exchange.next_round(self.w)
        assert round.cohort is not None
        contributions = [Contribution(found, self.used) for found in gradients(round, round.cohort)]
        outcome = self.exchange.run(contributions, self.w, trusted)
        self.bytes_up += outcome.bytes_up
        self.bytes_down += outcome.bytes_down
        self.seconds += outcome.seconds
        if outcome.estimate is not None:
            lr = self.lr(round.step) if callable(self.lr) else self.lr
            self.before, self.w = self.w, self.w - lr * outcome.estimate
        return outcome


def batches(
    labels: Tensor, n: int, batch: int, seed: int, partition: Partition
) -> Iterator[Tensor]:
    """The samples of every round, ``[n, batch]``, as `WorkerSampler` gives them to n in-process
    workers, epoch after epoch.
    """
    data = torch.utils.data.TensorDataset(labels)
    sampler = WorkerSampler(
        data, batch, workers_per_process=n, num_replicas=1, rank=0, seed=seed, partition=partition
    )
    for epoch in count():
        sampler.set_epoch(epoch)
        epoch = torch.tensor([sampler.indices_of(worker) for worker in range(n)])
        for first in range(0, epoch.shape[1], batch):
            yield epoch[:, first : first + batch]


class Logistic:
    """Logistic regression without bias, ``mean log(1 + exp(-s w.x)) + (l2 / 2) ||w||^2``, in
    float64.

    Args:
        x: ``[m, d]``.
        y: ``[m]``, 0 or 1.
        l2: weight of the regulariser.
    """

    def __init__(self, x: Tensor, y: Tensor, l2: float) -> None:
        self.x, self.y, self.s, self.l2 = x.double(), y, 2.0 * y.double() - 1, l2

    def loss(self, w: Tensor) -> float:
        losses = torch.nn.functional.softplus(-self.s * (self.x @ w))
        return float(losses.mean() + self.l2 / 2 * w @ w)

    def gradient(self, w: Tensor, flip: bool = False) -> Tensor:
        """Over all samples, ``[d]``; ``flip``: of the other labels."""
        s = -self.s if flip else self.s
        return -(s * torch.sigmoid(-s * (self.x @ w))) @ self.x / len(s) + self.l2 * w

    def gradients(self, w: Tensor, index: Tensor, flip: Tensor) -> Tensor:
        """``[n, d]``, of n batches ``index [n, b]``; ``flip [n]`` bool: the workers that take the
        other labels.
        """
        x = self.x[index]
        s = torch.where(flip[:, None], -self.s[index], self.s[index])
        return ((-s * torch.sigmoid(-s * (x @ w))).unsqueeze(1) @ x).squeeze(1) / index.shape[
            1
        ] + self.l2 * w

    def optimum(self) -> tuple[Tensor, float]:
        """The best parameters and their loss, by Newton's method with halved steps."""
        w = self.x.new_zeros(self.x.shape[1])
        for _ in range(100):
            g = self.gradient(w)
            if g.norm() < 1e-13:
                break
            q = torch.sigmoid(self.x @ w)
            hessian = (self.x * (q * (1 - q))[:, None]).T @ self.x / len(q) + self.l2 * torch.eye(
                len(w), dtype=w.dtype
            )
            step, size, here = torch.linalg.solve(hessian, g), 1.0, self.loss(w)
            while size > 1e-6 and self.loss(w - size * step) > here:
                size /= 2
            w = w - size * step
        return w, self.loss(w)


def libsvm(name: str, data: str, normalize: bool) -> Labelled:
    """The training samples and labels (0 or 1) of a LIBSVM data set in ``DIR/libsvm``."""
    from lightning_byz import LIBSVMDataModule

    module = LIBSVMDataModule(name, folder=str(Path(data) / "libsvm"), normalize=normalize)
    module.setup("fit")
    x, y = module.training.tensors
    return x, y


class Classifier:
    """A small network and the images that it learns: ``"fashion_mnist"`` with an MLP, 784 - hidden
    - 10, or ``"cifar10"`` with two convolutions.

    The convolutions: 16 of 5 x 5 and 32 of 3 x 3, both with stride 2 and ReLU, then a linear layer;
    26,346 parameters.

    Args:
        name: which.
        data: folder that holds FashionMNIST/raw or cifar-10-batches-py.
        hidden: hidden units of the MLP.
        device: where images, parameters and gradients are.
    """

    def __init__(self, name: str, data: str, hidden: int = 32, device: str = "cpu") -> None:
        from lightning_byz import CIFAR10DataModule, FashionMNISTDataModule

        module = {"fashion_mnist": FashionMNISTDataModule, "cifar10": CIFAR10DataModule}[name](data)
        module.setup("fit")
        parts = [
            images.__getitems__(range(len(images))) for images in (module.training, module.held_out)
        ]
        (self.x, self.y), (self.x_test, self.y_test) = (
            [tensor.to(device) for tensor in part] for part in parts
        )
        self.sizes = [784, hidden, 10]
        self.flat = name == "fashion_mnist"
        if self.flat:
            self.x, self.x_test = self.x.flatten(1), self.x_test.flatten(1)
        self.shapes = [(16, 3, 5, 5), (16,), (32, 16, 3, 3), (32,), (10, 2048), (10,)]

    def start(self, seed: int) -> Tensor:
        """The first parameters ``[d]``, as torch's layers start theirs."""
        torch.manual_seed(seed)
        if self.flat:
            return initial(self.sizes).to(self.x)
        fans = [math.prod(shape[1:]) for shape in self.shapes[::2] for _ in range(2)]
        return torch.cat(
            [
                torch.empty(shape).uniform_(-(fan**-0.5), fan**-0.5).flatten()
                for shape, fan in zip(self.shapes, fans, strict=True)
            ]
        ).to(self.x)

    def logits(self, w: Tensor, x: Tensor) -> Tensor:
        """``[batch, 10]``."""
        if self.flat:
            return mlp(w, x, self.sizes)
        parts = w.split([math.prod(shape) for shape in self.shapes])
        k1, b1, k2, b2, k3, b3 = (
            part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)
        )
        x = functional.conv2d(x, k1, b1, stride=2, padding=2).relu()
        x = functional.conv2d(x, k2, b2, stride=2, padding=1).relu()
        return functional.linear(x.flatten(1), k3, b3)

    def gradients(self, w: Tensor, index: Tensor, flip: Tensor | None = None) -> Tensor:
        """``[n, d]``: of the mean cross-entropy of n batches ``index [n, b]``; ``flip [n]`` bool:
        the workers that take 9 - y for y.
        """
        index = index.to(self.x.device)
        x, y = self.x[index], self.y[index]
        if flip is not None:
            y = torch.where(flip[:, None].to(y.device), 9 - y, y)
        if self.flat:  # all workers in one pass
            copies = w.expand(len(x), -1).clone().requires_grad_()
            loss = (
                functional.cross_entropy(
                    mlp(copies, x, self.sizes).flatten(0, 1), y.flatten(), reduction="sum"
                )
                / x.shape[1]
            )
            return torch.autograd.grad(loss, copies)[0]
        w = w.detach().requires_grad_()
        losses = (
            functional.cross_entropy(self.logits(w, images), labels)
            for images, labels in zip(x, y, strict=True)
        )
        return torch.stack([torch.autograd.grad(loss, w)[0] for loss in losses])

    def whole_gradient(self, w: Tensor, samples: Tensor, flip: bool = False) -> Tensor:
        """``[d]``: of the mean cross-entropy of all these samples, a few thousand at a time;
        ``flip``: with 9 - y for y.
        """
        total = torch.zeros_like(w)
        for index in samples.split(5000):
            total += len(index) * self.gradients(w, index[None], torch.tensor([flip]))[0]
        return total / len(samples)

    @torch.no_grad()
    def test(self, w: Tensor) -> tuple[float, float]:
        """The mean cross-entropy on the test set, and the accuracy in percent."""
        logits = torch.cat([self.logits(w, x) for x in self.x_test.split(1000)])
        loss = float(functional.cross_entropy(logits, self.y_test).nan_to_num(1e9))
        return loss, 100 * float((logits.argmax(1) == self.y_test).double().mean())


# -- results ---------------------------------------------------------------------------------------


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """``--data``, ``--full``, ``--output`` and ``--jobs``; ``description``: the script's
    docstring.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--data",
        required=True,
        help="folder of data sets: libsvm, FashionMNIST/raw, cifar-10-batches-py",
    )
    made.add_argument(
        "--full", action="store_true", help="the paper's size instead of the reduced grid"
    )
    made.add_argument(
        "--output",
        type=Path,
        default=Path("runs/reproduce") / name,
        help="where results are kept; a rerun goes on there",
    )
    made.add_argument("--jobs", type=int, default=1, help="processes")
    made.add_argument(
        "--device", default="cpu", help="where images, parameters and gradients are: cpu, or cuda"
    )
    made.add_argument(
        "--known",
        action="store_true",
        help="run nothing: write the page from the results that are there",
    )
    return made


def measure(
    runs: Sequence[Run], work: Callable[[Run], Run], arguments: argparse.Namespace
) -> list[tuple[Run, Run]]:
    """The results of these runs; with ``--known``, of those that have any."""
    cache = arguments.output / "results.jsonl"
    if arguments.known and cache.exists():
        known = {
            _key(json.loads(line)[0])
            for line in cache.read_text().splitlines()
            if line.endswith("]")
        }
        runs = [run for run in runs if _key(run) in known]
    return run_all(runs, work, arguments.output, arguments.jobs)


def verdict(holds: bool | None) -> str:
    """A table's last column; None: not measured."""
    return "not run" if holds is None else "**holds**" if holds else "**does not hold**"


def all_of(values: Sequence[Tensor], condition: Callable[[Tensor], Tensor]) -> bool | None:
    """Whether the condition holds for every seed of every group; None if a group is empty."""
    return all(bool(condition(v).all()) for v in values) if all(map(len, values)) else None


def write_csv(results: Iterable[tuple[Run, Run]], path: Path) -> None:
    """One line for each point of each run's curves: a result is a dict of lists of the same
    length.
    """
    results = list(results)
    fields = {name: None for run, result in results for name in (*run, *result)}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for run, result in results:
            for values in zip(*result.values(), strict=True):
                writer.writerow(run | dict(zip(result, (f"{v:.6g}" for v in values), strict=True)))


def pick(results: Iterable[tuple[Run, Run]], **fields: Any) -> list[Run]:
    """The results of all runs, such as one for each seed, that have these fields."""
    return [
        result
        for run, result in results
        if all(run.get(name) == value for name, value in fields.items())
    ]


def last(results: Sequence[Run], value: str) -> Tensor:
    """The last point of every curve."""
    return torch.tensor([result[value][-1] for result in results], dtype=torch.float64)


def spread(values: Tensor, digits: str = ".1e") -> str:
    """The mean of seeds, and their range."""
    if len(values) == 0:
        return "not run"
    return f"{values.mean():{digits}} ({values.min():{digits}} to {values.max():{digits}})"


# Okabe and Ito's
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))


def band(axes: Any, results: Sequence[Run], x: str, y: str, label: str, place: int) -> None:
    """The mean of the seeds' curves, and their range as a band; ``place`` chooses colour and line
    style.
    """
    if not results:
        return
    at = min((result[x] for result in results), key=lambda points: points[-1])
    logarithmic = axes.get_yscale() == "log"  # between a curve's points, and for the mean
    curves = torch.tensor(
        np.array(
            [
                np.interp(at, result[x], np.log(result[y]) if logarithmic else result[y])
                for result in results
            ]
        )
    )
    curves, middle = (
        (curves.exp(), curves.mean(0).exp()) if logarithmic else (curves, curves.mean(0))
    )
    colour, style = (
        COLOURS[place % len(COLOURS)],
        STYLES[(place + place // len(COLOURS)) % len(STYLES)],
    )
    axes.plot(at, middle, color=colour, linestyle=style, linewidth=1.8, label=label)
    axes.fill_between(at, curves.amin(0), curves.amax(0), color=colour, alpha=0.18, linewidth=0)


def figure(columns: int, rows: int = 1, height: float = 3.6) -> tuple[Any, Any]:
    """A figure and its axes, ``[rows, columns]``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.size": 9,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    return pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, height * rows), squeeze=False, layout="constrained"
    )


def publish(text: str, results: list[tuple[Run, Run]], drawing: Any, output: Path) -> None:
    """Writes the page, the picture and the curves to the output folder, and prints the page."""
    write_csv(results, output / "curves.csv")
    drawing.savefig(output / "curves.png", dpi=130)
    text += f"\n{len(results)} runs; {machine()}, one thread each.\n"
    (output / "report.md").write_text(text)
    print(text)
