"""A GAN: two optimizers, stepped by hand, on four processes of which one lies.

Manual optimization needs one worker per process. Each optimizer's gradients go through a robust
exchange of their own, with a state of their own. The data are eight points of noise on a circle;
what counts is how many of them the generator finds: all 8, with 87 % of what it makes near one of
them. With `--average` it finds none: that is what DDP would do with the same lies.

python examples/gan_two_optimizers.py [--average] [--devices 4] [--fast]
"""

import argparse
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl  # type: ignore[no-redef]  # the other name of the same Lightning

from lightning_byz import ByzantineRobustStrategy, ByzantineWorkers, Mean, RobustSGD, SignFlip

# [8, 2]
MODES = 2 * torch.tensor([(math.cos(i * math.pi / 4), math.sin(i * math.pi / 4)) for i in range(8)])


def samples(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        MODES.repeat(count // 8, 1) + 0.05 * torch.randn(count, 2, generator=generator)
    )


class GAN(pl.LightningModule):
    """Generator and critic, which take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
        )
        self.critic = nn.Sequential(
            nn.Linear(2, 64),
            nn.LeakyReLU(0.2),
            nn.Linear(64, 64),
            nn.LeakyReLU(0.2),
            nn.Linear(64, 1),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (real,) = batch
        for_generator, for_critic = self.optimizers()
        fake = self.generator(torch.randn(len(real), 2, device=self.device))

        self.toggle_optimizer(for_critic)
        self.manual_backward(
            softplus(-self.critic(real)).mean() + softplus(self.critic(fake.detach())).mean()
        )
        for_critic.step()
        for_critic.zero_grad()
        self.untoggle_optimizer(for_critic)

        self.toggle_optimizer(for_generator)
        self.manual_backward(softplus(-self.critic(fake)).mean())
        for_generator.step()
        for_generator.zero_grad()
        self.untoggle_optimizer(for_generator)

    @torch.no_grad()
    def on_train_end(self) -> None:
        points = self.generator(
            torch.randn(
                1000, 2, device=self.device, generator=torch.Generator(self.device).manual_seed(0)
            )
        )
        distance, nearest = torch.cdist(points, MODES.to(points)).min(1)
        # of 125 each, if all were found and equally often
        found = nearest[distance < 0.4].bincount(minlength=8)
        self.print(
            f"{(found >= 20).sum()} of 8 points found; {(distance < 0.4).float().mean():.0%} of "
            "what it makes is near one"
        )

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(net.parameters(), lr, (0.5, 0.9))
            for net, lr in ((self.generator, 1e-3), (self.critic, 2e-3))
        ]


def main() -> None:
    """Trains, and prints what the generator has learned."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--average", action="store_true")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--fast", action="store_true", help="one batch")
    options = parser.parse_args()

    pl.seed_everything(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=options.devices,
        strategy=ByzantineRobustStrategy(RobustSGD(aggregator=Mean()) if options.average else None),
        callbacks=[ByzantineWorkers(SignFlip(scale=10.0), count=1)],
        max_epochs=1 if options.fast else 40,
        limit_train_batches=1 if options.fast else 1.0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(GAN(), DataLoader(samples(8192), batch_size=64, shuffle=True))


if __name__ == "__main__":
    main()
