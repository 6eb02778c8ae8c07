"""Ten workers learn to read digits, and three of them lie: averaging breaks down, byzantine_robust
does not.

Run it with `lightning-byz demo`, or directly: examples/quickstart.py is this file.
"""

from pathlib import Path

import torch
from torch import nn

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl  # type: ignore[no-redef]  # the other name of the same Lightning

from lightning_byz import (
    ByzantineRobustStrategy,
    ByzantineWorkers,
    DigitsDataModule,
    Mean,
    RobustSGD,
    SignFlip,
)
from lightning_byz.demo.scoreboard import Scoreboard

WORKERS, LIARS = 10, 3


class DigitsClassifier(pl.LightningModule):
    """A small convolutional network. An ordinary LightningModule: nothing in it knows of workers or
    attacks.
    """

    def __init__(self, lr: float = 0.005) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(288, 10),
        )

    def training_step(
        self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int
    ) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log(
            "accuracy",
            (self.net(images).argmax(1) == labels).float().mean(),
            prog_bar=True,
            sync_dist=True,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def main(output: str = "byzantine_demo.png", seed: int = 0, epochs: int = 20) -> None:
    """Trains three times, then prints a table and writes a picture to ``output``."""
    average = RobustSGD(aggregator=Mean())  # what DDP does
    # they send -3 times the mean of what the honest ones send
    lies = ByzantineWorkers(SignFlip(scale=3.0), count=LIARS)
    all_honest, some_lie = f"all {WORKERS} honest", f"{LIARS} of {WORKERS} lie"
    # all workers live in this process; without workers_per_process there is one per device
    runs = {
        f"averaging, {all_honest}": (
            ByzantineRobustStrategy(average, workers_per_process=WORKERS, num_byzantine=0),
            [],
        ),
        f"averaging, {some_lie}": (
            ByzantineRobustStrategy(average, workers_per_process=WORKERS, num_byzantine=0),
            [lies],
        ),
        f"byzantine_robust, {some_lie}": (
            ByzantineRobustStrategy(workers_per_process=WORKERS, num_byzantine=LIARS),
            [lies],
        ),
    }
    torch.set_num_threads(1)  # the network is too small to share its work
    with Scoreboard([*runs], epochs) as board:
        for strategy, callbacks in runs.values():
            pl.seed_everything(seed)
            trainer = pl.Trainer(
                strategy=strategy,
                callbacks=[*callbacks, pl.callbacks.LambdaCallback(on_validation_end=board.record)],
                max_epochs=epochs,
                **board.quiet,
            )
            trainer.fit(DigitsClassifier(), DigitsDataModule(batch_size=16))
    board.show(Path(output))


if __name__ == "__main__":
    main()
