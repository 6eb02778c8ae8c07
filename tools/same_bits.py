"""Whether two commits train to the same bits, on this machine.

    python tools/same_bits.py BASE [HEAD]

trains a zoo at both commits (HEAD: the files as they lie here): each algorithm in process, over
every transport, with an attack, a checkpoint, and a resume from it. Compared are the weights and
the algorithm's state. Hashes are not stored: they differ by processor and by version of torch.
Exits 0 if all are equal. Only the public API is used, so that both commits understand it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ranks import run_ranks

ROOT = Path(__file__).parents[1]
RANKS = 3
WORLDS = ("in_process", "ranks", "server")
AT_SERVER = ("default", "momenta", "ef21_sgdm", "dstar", "signsgd")
"""Algorithms that are tried at a parameter server, each in processes of its own, without a resume.
"""


# -- one world of runs, in a process that has one commit's package ---------------------------------


def cells(world: str, folder: Path) -> dict[str, Any]:
    """By name, what `ByzantineRobustStrategy` and the attack of each run are made of."""
    import lightning_byz as byz

    chain = byz.Chain(pre=(byz.NNM(),), rule=byz.TrimmedMean())
    algorithms = {
        "default": None,
        "mean": byz.RobustSGD(aggregator=byz.Mean()),
        "momenta": byz.RobustSGD(aggregator=chain, worker_momentum=0.9, server_momentum=0.5),
        "top_k": byz.RobustSGD(aggregator=byz.CoordinateMedian(), compressor=byz.TopK(ratio=0.2)),
        "centered_clip": byz.RobustSGD(aggregator=byz.CenteredClip(), worker_momentum=0.9),
        "ef14": byz.EF14(),
        "ef21_sgdm": byz.ByzEF21SGDM(),
        "ef21_sgdm_bc": byz.ByzEF21SGDMBC(),
        "dm21": byz.ByzDM21(),
        "vr_dm21": byz.ByzVRDM21(),
        "diana": byz.ByzDIANA(),
        "marina_pp": byz.ByzVRMarinaPP(),
        "dstar": byz.DStar(),
        "signsgd": byz.SignSGDMajorityVote(),
    }
    transports = {
        "in_process": {"": lambda: None},
        "ranks": {
            "AllGather": byz.AllGather,
            "Sharded": byz.Sharded,
            "Sharded, whole": lambda: byz.Sharded(overlap=False),
        },
        "server": {"ParameterServer": lambda: byz.ParameterServer(keys=folder / "keys")},
    }[world]
    attacks = {"SignFlip": byz.SignFlip(), "ALIE": byz.ALIE(z=1.0)}
    return {
        " / ".join(filter(None, (algorithm_name, transport_name, attack_name))): (
            algorithm,
            transport,
            attack,
        )
        for algorithm_name, algorithm in algorithms.items()
        for transport_name, transport in transports.items()
        for attack_name, attack in attacks.items()
        if attack_name == "SignFlip" or world == "in_process"
        if world != "server" or algorithm_name in AT_SERVER
    }


def train(world: str, folder: Path, algorithm: Any, transport: Any, attack: Any) -> dict[str, str]:
    """Trains for some steps, goes on from the checkpoint in a new Trainer, and hashes what is
    left.
    """
    import lightning as L
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    import lightning_byz as byz

    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3)
            )

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    workers = 8 if world == "in_process" else RANKS
    g = torch.Generator().manual_seed(5)
    x = torch.randn(8 * 48, 20, generator=g)
    data = TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long())

    trusted = TensorDataset(x[:16], data.tensors[1][:16])

    def fit(epochs: int, resume: Path | None) -> Any:
        L.seed_everything(7, verbose=False)
        strategy = byz.ByzantineRobustStrategy(
            algorithm,
            transport(),
            workers_per_process=8 if world == "in_process" else 1,
            num_byzantine=1,
            trusted_data=trusted if isinstance(algorithm, byz.DStar) else None,
        )
        trainer = L.Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=1 if world == "in_process" else RANKS,
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[byz.ByzantineWorkers(attack, workers=[workers - 1])],
        )
        model = Model()
        batch = 48 if world == "in_process" else 48 // RANKS
        loader = DataLoader(data, batch_size=batch, shuffle=True)
        trainer.fit(model, loader, ckpt_path=None if resume is None else str(resume))
        return trainer, model

    path = folder / "saved.ckpt"
    trainer, model = fit(1, None)
    trainer.save_checkpoint(path)
    if world != "server":
        trainer, model = fit(2, path)
        trainer.save_checkpoint(path)
    hashes = {name: digest(tensor) for name, tensor in model.state_dict().items()}
    if trainer.global_rank == 0:
        state = torch.load(path, weights_only=True)["lightning_byz"]
        for part in ("server", "workers"):
            hashes.update({f"{part}{at}": digest(tensor) for at, tensor in leaves(state[part])})
    return hashes


def leaves(value: Any, at: str = "") -> list[tuple[str, Any]]:
    """The tensors and numbers in nested containers, and where they are."""
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in leaves(part, f"{at}.{key}")]
    if isinstance(value, (list, tuple)):
        return [leaf for i, part in enumerate(value) for leaf in leaves(part, f"{at}[{i}]")]
    return [(at, value)]


def digest(value: Any) -> str:
    """A hash of a tensor's shape, dtype and bits, or of another value's text."""
    import torch

    if not isinstance(value, torch.Tensor):
        return repr(value)
    raw = value.detach().contiguous().reshape(-1).view(torch.uint8)
    text = f"{tuple(value.shape)} {value.dtype} ".encode()
    return hashlib.sha256(text + raw.numpy().tobytes()).hexdigest()[:16]


def run(world: str, folder: Path, only: str | None) -> None:
    """Runs the cells of a world in this process, which is one of its ranks, and writes their
    hashes.

    Args:
        world: one of `WORLDS`.
        folder: where to.
        only: the algorithm to try; None: all.
    """
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    results = {}
    for name, parts in cells(world, folder).items():
        if only is not None and not name.startswith(f"{only} /"):
            continue
        try:
            results[name] = train(world, folder, *parts)
        except (ValueError, TypeError) as error:  # a combination that is refused, in both commits
            results[name] = {"refused": f"{type(error).__name__}: {error}"}
    (folder / f"{world}{rank}.json").write_text(json.dumps(results))


# -- both commits ----------------------------------------------------------------------------------


def results_of(tree: Path, world: str, only: str | None = None) -> dict[str, dict[str, str]]:
    """By cell and rank, the hashes that the package in a checkout gives. ``only``: see `run`."""
    if world == "server" and only is None:
        parts = (results_of(tree, world, name) for name in AT_SERVER)
        return {cell: hashes for part in parts for cell, hashes in part.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = 1 if world == "in_process" else RANKS
        command = [str(Path(__file__).resolve()), "--world", world, "--to", name]
        command += [] if only is None else ["--only", only]
        run_ranks(command, ranks, tree, folder / "keys" if world == "server" else None)
        files = [folder / f"{world}{rank}.json" for rank in range(ranks)]
        loaded = [json.loads(file.read_text()) for file in files]
    return {
        f"{name}, rank {r}": hashes
        for r, all_ in enumerate(loaded)
        for name, hashes in all_.items()
    }


def main() -> int:
    """Compares, prints what differs, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", help="a commit")
    parser.add_argument("head", nargs="?", help="another one; left out: the files as they lie here")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--world", choices=WORLDS, help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.world is not None:
        run(arguments.world, arguments.to, arguments.only)
        return 0
    if arguments.base is None:
        parser.error("a commit to compare with is needed")
    different = total = refused_runs = 0
    with tempfile.TemporaryDirectory() as name:
        trees = []
        for commit in (arguments.base, arguments.head):
            tree = ROOT if commit is None else Path(name) / commit.replace("/", "_")
            if commit is not None:
                subprocess.run(
                    ["git", "worktree", "add", "-q", "--detach", str(tree), commit],
                    cwd=ROOT,
                    check=True,
                )
            trees.append(tree)
        try:
            for world in arguments.worlds:
                base, head = (results_of(tree, world) for tree in trees)
                total += len(base)
                for cell in sorted({*base, *head}):
                    before, after = base.get(cell, {}), head.get(cell, {})
                    names = [
                        key for key in {**before, **after} if before.get(key) != after.get(key)
                    ]
                    if names:
                        different += 1
                        print(f"DIFFERENT {world}: {cell}: {', '.join(names[:6])}")
                        if "refused" in names:
                            print(f"    {before.get('refused')} | {after.get('refused')}")
                refused = sum("refused" in hashes for hashes in base.values())
                refused_runs += refused
                print(f"{world}: {len(base)} runs, {refused} of them refused", flush=True)
        finally:
            for tree in trees:
                if tree != ROOT:
                    subprocess.run(
                        ["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True
                    )
    print(f"{total - different} of {total} the same")
    if refused_runs > total // 4:
        raise SystemExit("Most runs were refused: this compares nothing.")
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
