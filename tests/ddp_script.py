"""An ordinary DDP script that knows nothing of lightning_byz:
``python ddp_script.py FOLDER [--package P] [--faulty RANK]``.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--package", default="lightning.pytorch")
parser.add_argument("--faulty", type=int, default=None)
arguments = parser.parse_args()
pl = importlib.import_module(arguments.package)
loggers = importlib.import_module(f"{arguments.package}.loggers")


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(10, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.global_rank == arguments.faulty:
            y = 2 - y
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


if __name__ == "__main__":
    pl.seed_everything(1)
    x = torch.randn(4800, 10)
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long())
    trainer = pl.Trainer(
        strategy="ddp",
        devices=4,
        accelerator="cpu",
        max_epochs=2,
        logger=loggers.CSVLogger(arguments.folder, name="", version=""),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    model = Model()
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=8, shuffle=True))
    torch.save(model.state_dict(), arguments.folder / f"rank{trainer.global_rank}.pt")
    ours = [
        type(callback).__name__
        for callback in trainer.callbacks
        if "byz" in type(callback).__module__
    ]
    print(f"callbacks: {ours}\n", end="", flush=True)  # in one piece: four processes print
