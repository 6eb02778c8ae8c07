"""The reproductions drive algorithms without a Trainer; a Trainer with the same setting takes the
same steps.
"""

import importlib
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from harness import QUIET
from torch.utils.data import DataLoader, TensorDataset

from lightning_byz import Replicated, WorkerSampler
from lightning_byz.lightning import ByzantineRobustStrategy, ByzantineWorkers

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(
    not FOLDER.exists(), reason="benchmarks are not part of a source distribution"
)
sys.path[:0] = [str(FOLDER), str(FOLDER / "reproduce")]


def problem(l2):
    from _shared import Logistic

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 7, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + 0.3 * torch.randn(90, generator=generator, dtype=torch.float64) > 0).long()
    made = Logistic(x, y, l2)
    return made, made.optimum()[1]


class Module(L.LightningModule):
    """Logistic regression as a user writes it; remembers the gap after every step."""

    def __init__(self, logistic, best, lr):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))
        self.logistic, self.best, self.lr, self.gaps = logistic, best, lr, []

    def training_step(self, batch, index):
        x, y = batch
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ self.w, y.double())
        return loss + self.logistic.l2 / 2 * self.w @ self.w

    def on_train_batch_end(self, *_):
        self.gaps.append(self.logistic.loss(self.w.detach()) - self.best)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def gaps_of_a_trainer(logistic, best, run, algorithm, attack, n, liars, partition):
    data = TensorDataset(logistic.x, logistic.y)
    sampler = WorkerSampler(
        data,
        run["batch"],
        workers_per_process=n,
        num_replicas=1,
        rank=0,
        seed=run["seed"],
        partition=partition,
    )
    module = Module(logistic, best, run["lr"])
    strategy = ByzantineRobustStrategy(algorithm=algorithm, workers_per_process=n, seed=run["seed"])
    callbacks = [] if attack is None else [ByzantineWorkers(attack, count=liars)]
    trainer = L.Trainer(**QUIET, strategy=strategy, callbacks=callbacks, max_steps=run["rounds"])
    trainer.fit(module, DataLoader(data, sampler.batch_size_per_process, sampler=sampler))
    return module.gaps


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("attack", ["NA", "LF", "SHB"])
def test_marina_pp_is_what_a_trainer_does(monkeypatch, attack):
    import marina_pp

    found = problem(0.01)
    monkeypatch.setattr(marina_pp, "problem", lambda name, data: found)
    monkeypatch.setattr(marina_pp, "POINTS", 12)
    run = marina_pp.MAIN | {"attack": attack, "batch": 4, "p": 0.3, "rounds": 12, "seed": 1}
    gaps = marina_pp.train(run, "")["gap"]
    lie, n, liars = marina_pp.ATTACKS[attack], marina_pp.N, marina_pp.LIARS
    theirs = gaps_of_a_trainer(*found, run, marina_pp.algorithm(run), lie, n, liars, Replicated())
    assert gaps[1:] == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    assert gaps[-1] < gaps[0]


@pytest.mark.parametrize("method", ["Byz-EF21-SGDM, eta 0.01", "compressed SGD"])
@pytest.mark.parametrize("attack", ["LF", "SF"])
def test_ef21_is_what_a_trainer_does(monkeypatch, method, attack):
    import ef21

    found = problem(ef21.L2)
    monkeypatch.setattr(ef21, "problem", lambda data: found)
    monkeypatch.setattr(ef21, "POINTS", 10)
    run = ef21.MAIN | {"method": method, "attack": attack, "rounds": 10, "seed": 2}
    gaps = ef21.train(run, "")["gap"]
    theirs = gaps_of_a_trainer(
        *found,
        run,
        ef21.algorithm(run),
        ef21.ATTACKS[attack],
        ef21.N,
        ef21.LIARS,
        ef21.HonestSplit(ef21.LIARS),
    )
    assert gaps[1:] == pytest.approx(theirs, rel=1e-9, abs=1e-12)


def test_the_gradients_are_those_of_the_loss():
    logistic, best = problem(0.01)
    w = torch.randn(
        7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    ).requires_grad_()
    s = 2.0 * logistic.y - 1
    loss = torch.nn.functional.softplus(-s * (logistic.x @ w)).mean() + 0.005 * w @ w
    (gradient,) = torch.autograd.grad(loss, w)
    w = w.detach()
    assert logistic.loss(w) == pytest.approx(float(loss.detach()))
    assert torch.allclose(logistic.gradient(w), gradient)
    everything = torch.arange(90).expand(2, -1)
    rows = logistic.gradients(w, everything, torch.tensor([False, True]))
    assert torch.allclose(rows[0], gradient)
    assert torch.allclose(rows[1], logistic.gradient(w, flip=True))
    assert logistic.gradient(logistic.optimum()[0]).norm() < 1e-12
    assert best < float(loss.detach())


@pytest.mark.parametrize("flat", [True, False], ids=["mlp", "convolutions"])
def test_the_classifier_is_the_network_that_it_says_it_is(flat):
    from _shared import Classifier

    made = object.__new__(Classifier)
    made.flat, made.sizes = flat, [784, 5, 10]
    made.shapes = [(16, 3, 5, 5), (16,), (32, 16, 3, 3), (32,), (10, 2048), (10,)]
    generator = torch.Generator().manual_seed(4)
    made.x = (
        torch.randn(12, 784, generator=generator)
        if flat
        else torch.randn(12, 3, 32, 32, generator=generator)
    )
    made.y = torch.randint(10, (12,), generator=generator)
    made.x_test, made.y_test = made.x, made.y
    relu, linear, convolution = torch.nn.ReLU(), torch.nn.Linear, torch.nn.Conv2d
    layers = [linear(784, 5), relu, linear(5, 10)]
    if not flat:
        layers = [
            convolution(3, 16, 5, 2, 2),
            relu,
            convolution(16, 32, 3, 2, 1),
            relu,
            torch.nn.Flatten(),
            linear(2048, 10),
        ]
    net = torch.nn.Sequential(*layers)
    w = made.start(seed=3)
    # the MLP keeps [inputs, outputs]
    turned = [part.T if flat and part.ndim == 2 else part for part in net.parameters()]
    for part, numbers in zip(turned, w.split([p.numel() for p in net.parameters()]), strict=True):
        part.data.copy_(numbers.view(part.shape))
    assert len(w) == sum(p.numel() for p in net.parameters()) == (3985 if flat else 26_346)

    index, flip = torch.arange(12).view(3, 4), torch.tensor([False, True, False])
    for row, mine, flipped in zip(made.gradients(w, index, flip), index, flip, strict=True):
        labels = 9 - made.y[mine] if flipped else made.y[mine]
        found = torch.autograd.grad(
            torch.nn.functional.cross_entropy(net(made.x[mine]), labels), list(net.parameters())
        )
        theirs = torch.cat([(g.T if flat and g.ndim == 2 else g).flatten() for g in found])
        torch.testing.assert_close(row, theirs)
    loss, accuracy = made.test(w)
    assert loss == pytest.approx(
        float(torch.nn.functional.cross_entropy(net(made.x), made.y)), rel=1e-5
    )
    assert accuracy == pytest.approx(100 * float((net(made.x).argmax(1) == made.y).float().mean()))


@pytest.mark.parametrize("name", ["marina_pp", "signsgd", "ef21", "ef21_images", "dstar"])
def test_what_has_not_been_run_is_not_judged(name):
    script = importlib.import_module(name)
    arguments = {
        "marina_pp": [script.__dict__.get("MAIN")],
        "ef21": [[0.02]],
        "ef21_images": [[0.5, 0.05]],
    }.get(name, [])
    page = script.report([], *arguments)
    assert "not run" in page
    assert "holds**" not in page
    assert "does not hold" not in page


class Images(L.LightningModule):
    """The MLP of the reproduction of local steps, as a user writes it."""

    def __init__(self, net, make):
        super().__init__()
        self.net, self.make = net, make

    def training_step(self, batch, index):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return self.make(self.parameters())


@pytest.mark.parametrize(("kind", "length"), [("FedAvg", 5), ("DiLoCo", 4)])
@pytest.mark.parametrize("method", ["SpectralFilter", "NNM + trimmed mean"])
def test_local_steps_are_those_of_a_trainer(kind, length, method, monkeypatch):
    """The batches of the reproduction, handed to a Trainer's in-process workers."""
    module = importlib.import_module("local_steps")
    monkeypatch.setattr(module, "STEPS", 20)
    run = {"task": "digits", "partition": "iid", "kind": kind, "local_steps": length}
    run |= {"method": method, "attack": "IPM(0.5)", "seed": 3}
    found = module.train(run, "")
    x, y, x_test, y_test = module.load("digits", "")
    parts = module.PARTITIONS["iid"](y, module.N, 3)
    draws = torch.Generator().manual_seed(3)
    order = torch.cat(
        [
            part[torch.randint(len(part), (module.BATCH,), generator=draws)]
            for _ in range(20)
            for part in parts
        ]
    )
    made = Images(module.Model("mlp", 8, 3).net, module.KINDS[kind].inner("digits"))
    strategy = ByzantineRobustStrategy(
        module.METHODS[method],
        workers_per_process=module.N,
        local_steps=length,
        outer_optimizer=module.KINDS[kind].outer,
        seed=3,
    )
    L.Trainer(
        **QUIET,
        max_epochs=1,
        strategy=strategy,
        callbacks=[
            ByzantineWorkers(module.ATTACKS["IPM(0.5)"], workers=range(module.N - module.F, 12))
        ],
    ).fit(made, DataLoader(TensorDataset(x[order], y[order]), module.N * module.BATCH))
    with torch.no_grad():
        accuracy = 100 * (made.net(x_test).argmax(1) == y_test).double().mean().item()
    assert accuracy == pytest.approx(found["accuracy"][0], abs=0.4)
    assert accuracy > 25
