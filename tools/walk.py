"""How long the way is from `backward` to ``p.grad`` on rank 0: functions, files, changes of file.

    python tools/walk.py [--list]

trains a small model for some steps in three ways, and counts in the last one what of this package
is called between the beginning and the end of `Strategy.backward`, in all threads. A change of file
is a call, or a return, that leads from one file to another. Files of the rule, the codec and the
method are counted apart. ``--list`` prints the functions.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from ranks import run_ranks

ROOT = Path(__file__).parents[1]
RANKS = 3
WAYS = {
    "RobustSGD, Sharded, overlap": "sharded",
    "default, in process": "in_process",
    "default, parameter server": "server",
}
PARTS = ("aggregators", "compressors", "algorithms")
STEPS = 6


class Walk:
    """Counts what is called of the package, while it is on."""

    def __init__(self, root: Path) -> None:
        self._root = str(root) + os.sep
        self.functions: dict[str, int] = {}
        self.changes = 0
        self._stacks: dict[int, list[str]] = {}

    def _see(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(self._root):
            return
        if code.co_name in ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>"):
            return  # a loop, and no place to go to
        file = frame.f_code.co_filename[len(self._root) :]
        stack = self._stacks.setdefault(threading.get_ident(), [])
        if event == "call":
            name = (
                f"{file}:{frame.f_code.co_qualname}"
                if sys.version_info >= (3, 11)
                else frame.f_code.co_name
            )
            self.functions[name] = self.functions.get(name, 0) + 1
            self.changes += bool(stack) and stack[-1] != file
            stack.append(file)
        elif stack:
            stack.pop()
            self.changes += bool(stack) and stack[-1] != file

    def __enter__(self) -> Walk:
        threading.setprofile(self._see)
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]

    def summary(self) -> dict[str, Any]:
        """The counts."""
        files = {name.partition(":")[0] for name in self.functions}
        parts = {file for file in files if file.startswith(PARTS)}
        return {
            "functions": len(self.functions),
            "changes": self.changes,
            "files": len(files - parts),
            "parts": len(parts),
            "names": self.functions,
        }


def run(way: str, folder: Path) -> None:
    """Trains in this process, which may be one of several, and writes what rank 0 counted."""
    import logging
    import warnings

    import lightning as L
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    import lightning_byz as byz

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    walk = Walk(Path(byz.__file__).parent)

    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))
            self.loss = nn.CrossEntropyLoss()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    strategy = {
        "sharded": lambda: byz.ByzantineRobustStrategy(byz.RobustSGD(), byz.Sharded()),
        "in_process": lambda: byz.ByzantineRobustStrategy(workers_per_process=8),
        "server": lambda: byz.ByzantineRobustStrategy(
            transport=byz.ParameterServer(keys=folder / "keys")
        ),
    }[way]()
    backward = strategy.backward

    def watched(*args: Any, **kwargs: Any) -> Any:
        if strategy.exchanges[0].step < STEPS - 1:
            return backward(*args, **kwargs)
        with walk:
            return backward(*args, **kwargs)

    strategy.backward = watched
    g = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(48, 20, generator=g), torch.randint(3, (48,), generator=g))
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1 if way == "in_process" else RANKS,
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), DataLoader(data, batch_size=8))
    if trainer.global_rank == 0:
        (folder / "walk.json").write_text(json.dumps(walk.summary()))


def measured(way: str) -> dict[str, Any]:
    """Starts the processes of one way, and returns what rank 0 counted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [str(Path(__file__).resolve()), "--way", way, "--to", name]
        ranks = 1 if way == "in_process" else RANKS
        run_ranks(command, ranks, ROOT, folder / "keys" if way == "server" else None)
        counted: dict[str, Any] = json.loads((folder / "walk.json").read_text())
    return counted


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the functions")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way is not None:
        run(arguments.way, arguments.to)
        return
    print("| from backward to p.grad, rank 0 | functions | changes of file | files | parts |")
    print("|---|---|---|---|---|")
    for name, way in WAYS.items():
        walk = measured(way)
        row = (walk["functions"], walk["changes"], walk["files"], walk["parts"])
        print(f"| {name} | {' | '.join(map(str, row))} |", flush=True)
        for function, calls in walk["names"].items() if arguments.list else ():
            print(f"    {calls:4} {function}")


if __name__ == "__main__":
    main()
