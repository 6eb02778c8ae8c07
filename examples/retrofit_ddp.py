"""An ordinary Lightning project, made to bear faulty workers by one import and one line.

    +import lightning_byz
    -trainer = pl.Trainer(strategy="ddp", ...)
    +trainer = pl.Trainer(strategy="byzantine_robust", ...)

Model, data, optimizer, schedule, clipping, logging and checkpoints stay what they were.
`--faulty-rank 3` plants a fault: that process gets its images unscaled and its labels shifted by
one, as a machine with an old preprocessing might.

python examples/retrofit_ddp.py [--strategy ddp] [--faulty-rank 3] [--devices 4] [--num-nodes 1]
[--accelerator cpu] [--fast]
"""

import argparse

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_byz  # noqa: F401  # the import that registers the strategy


class Digits(pl.LightningDataModule):
    """Handwritten digits, as this project always loaded them; Lightning gives every process its
    part.
    """

    def __init__(self, batch_size: int = 32, faulty_rank: int | None = None) -> None:
        super().__init__()
        self.batch_size, self.faulty_rank = batch_size, faulty_rank

    def setup(self, stage: str) -> None:
        x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
        x = x.float() / 16
        self.held_out = TensorDataset(x[1437:], y[1437:])
        if self.trainer.global_rank == self.faulty_rank:
            x, y = x * 16, (y + 1) % 10
        self.training = TensorDataset(x[:1437], y[:1437])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.training, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, 120)


class Classifier(pl.LightningModule):
    """A model with a schedule, dropout and BatchNorm."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log(
            "accuracy",
            (self.net(batch[0]).argmax(1) == batch[1]).float().mean(),
            prog_bar=True,
            sync_dist=True,
        )

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.hparams.lr, momentum=0.9, weight_decay=1e-4
        )
        steps = int(self.trainer.estimated_stepping_batches)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
                "interval": "step",
            },
        }


def main() -> None:
    """Trains, and prints the accuracy of the best checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--strategy", default="byzantine_robust")
    parser.add_argument("--faulty-rank", type=int)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--fast", action="store_true", help="one epoch")
    options = parser.parse_args()

    pl.seed_everything(0)
    best = pl.callbacks.ModelCheckpoint(monitor="accuracy", mode="max")
    trainer = pl.Trainer(
        strategy=options.strategy,
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        max_epochs=1 if options.fast else 15,
        gradient_clip_val=1.0,
        callbacks=[best],
        logger=pl.loggers.CSVLogger("outputs", "retrofit_ddp"),
        log_every_n_steps=5,
    )
    trainer.fit(Classifier(), Digits(faulty_rank=options.faulty_rank))
    if trainer.is_global_zero:
        print(
            f"{options.strategy}: {best.best_model_score:.1%} of held-out digits, "
            f"{best.best_model_path}"
        )


if __name__ == "__main__":
    main()
