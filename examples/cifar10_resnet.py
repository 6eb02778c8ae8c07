"""A ResNet on CIFAR-10, trained by ten workers with unlike data, of whom three lie.

Each worker holds its own mixture of the classes (`Dirichlet(1.0)`; `--alpha 0.1` is far more
unlike), which is where honest outliers and liars are hard to tell apart. `--average` shows what
plain averaging makes of the same lies.

python examples/cifar10_resnet.py [--data data] [--average] [--alpha 1.0] [--epochs 10] [--fast]
# downloads what is not there
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl  # type: ignore[no-redef]  # the other name of the same Lightning

from lightning_byz import (
    ALIE,
    ByzantineRobustStrategy,
    ByzantineWorkers,
    CIFAR10DataModule,
    Dirichlet,
    Mean,
    RobustSGD,
)

WORKERS, LIARS = 10, 3


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm1 = (
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.GroupNorm(8, outside),
        )
        self.second, self.norm2 = (
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.GroupNorm(8, outside),
        )
        self.around = (
            nn.Conv2d(inside, outside, 1, stride, bias=False) if stride > 1 else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm1(self.first(x)).relu()
        return (self.norm2(self.second(hidden)) + self.around(x)).relu()


class ResNet(pl.LightningModule):
    """He et al.'s ResNet for CIFAR (arXiv 1512.03385), 6 x blocks + 2 layers, with GroupNorm: it
    has no statistics to lie about.
    """

    def __init__(self, blocks: int = 1, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        layers: list[nn.Module] = [
            nn.Conv2d(3, 16, 3, 1, 1, bias=False),
            nn.GroupNorm(8, 16),
            nn.ReLU(),
        ]
        width = 16
        for stage in (16, 32, 64):
            for _ in range(blocks):
                layers.append(Block(width, stage, stride=stage // width))
                width = stage
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log(
            "accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True
        )

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Trains, and prints the accuracy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="data", help="folder that holds cifar-10-batches-py")
    parser.add_argument("--average", action="store_true")
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--fast", action="store_true", help="two steps")
    options = parser.parse_args()

    pl.seed_everything(0)
    trainer = pl.Trainer(
        strategy=ByzantineRobustStrategy(
            RobustSGD(aggregator=Mean()) if options.average else None,  # None: the default
            workers_per_process=WORKERS,
            num_byzantine=0 if options.average else LIARS,
        ),
        callbacks=[ByzantineWorkers(ALIE(z=1.5), count=LIARS)],
        devices=1,
        max_epochs=options.epochs,
        fast_dev_run=2 if options.fast else False,
        logger=False,
        enable_checkpointing=False,
    )
    data = CIFAR10DataModule(
        options.data, batch_size=32, partition=Dirichlet(options.alpha), augment=True
    )
    trainer.fit(ResNet(), data)
    print(f"{trainer.callback_metrics['accuracy']:.1%} of the test images")


if __name__ == "__main__":
    main()
