"""A user's script, for launchers that start it again for every rank:
``python script.py FOLDER CASE [--devices N ...]``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--package", default="lightning.pytorch")
parser.add_argument("--first", choices=["package", "lightning_byz"], default="package")
parser.add_argument("--strategy", default="byzantine_robust")
parser.add_argument("--start-method", default=None)
parser.add_argument("--devices", type=int, default=4)
parser.add_argument("--num-nodes", type=int, default=1)
parser.add_argument("--fail-rank", type=int, default=None)
parser.add_argument("--saves-alone", type=int, default=None)
arguments = parser.parse_args()

if arguments.first == "lightning_byz":
    import lightning_byz
pl = importlib.import_module(arguments.package)
import lightning_byz  # noqa: E402

glue = importlib.import_module(f"lightning_byz.{arguments.package.partition('.')[0]}")


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(10, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = torch.nn.functional.cross_entropy(self.layer(x), y)
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        return loss

    def on_train_batch_end(self, *args):
        if self.trainer.global_step == 3 and self.trainer.global_rank == arguments.fail_rank:
            raise RuntimeError("planted")
        if self.trainer.global_step == 2 and self.trainer.global_rank == arguments.saves_alone:
            self.trainer.strategy.save_patience = 2.0
            self.trainer.save_checkpoint(arguments.folder / "alone.ckpt")
            self.trainer.strategy.save_patience = 60.0

    def on_train_end(self):
        torch.save(
            {
                "weights": self.state_dict(),
                "metrics": {k: float(v) for k, v in self.trainer.callback_metrics.items()},
            },
            arguments.folder / f"rank{self.trainer.global_rank}.pt",
        )

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


if __name__ == "__main__":
    pl.seed_everything(1)
    x = torch.randn(240, 10)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()), batch_size=12, shuffle=True
    )
    strategy = arguments.strategy
    if arguments.start_method:
        strategy = glue.ByzantineRobustStrategy(start_method=arguments.start_method)
    checkpoint = pl.callbacks.ModelCheckpoint(
        arguments.folder, save_on_exception=True, filename="saved"
    )
    trainer = pl.Trainer(
        strategy=strategy,
        devices=arguments.devices,
        num_nodes=arguments.num_nodes,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoint],
    )
    assert type(trainer.strategy) is glue.ByzantineRobustStrategy
    trainer.fit(Model(), data)
    found = type(trainer.strategy).__module__
    home = lightning_byz.ByzantineRobustStrategy.__module__
    print(f"strategy: {found} home: {home}\n", end="", flush=True)  # in one piece: all ranks print
    sys.exit(0)
