"""A robust rule of your own, checked against the laws that every rule should hold, then used to
train with liars.

python examples/custom_rule.py
"""

from dataclasses import dataclass

import torch

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl  # type: ignore[no-redef]  # the other name of the same Lightning

from lightning_byz import (
    ALIE,
    ByzantineRobustStrategy,
    ByzantineWorkers,
    DigitsDataModule,
    RobustSGD,
)
from lightning_byz.aggregators import WeightedAggregator
from lightning_byz.demo.quickstart import DigitsClassifier
from lightning_byz.numerics.rows import Rows
from lightning_byz.testing import check_aggregator


@dataclass(frozen=True)
class SoftKrum(WeightedAggregator):
    """Trusts every row by how near its n - f nearest neighbours are, instead of choosing some:
    weights ~ 1 / distance^power.
    """

    power: float = 4.0

    def weights(self, rows: Rows) -> torch.Tensor:
        # [n, n - f]
        nearest = rows.squared_distances().sqrt().sort(dim=1).values[:, : len(rows) - self.f]
        closeness = nearest.sum(1).clamp_min(1e-300)
        closeness = closeness / closeness.min()  # in [1, inf)
        weights = closeness.pow(-self.power)
        return weights / weights.sum()


def main(epochs: int = 5) -> None:
    """Checks the rule, then trains ten workers of which three lie."""
    check_aggregator(SoftKrum())  # raises an AssertionError that names every law that it breaks
    pl.seed_everything(0)
    trainer = pl.Trainer(
        strategy=ByzantineRobustStrategy(
            RobustSGD(aggregator=SoftKrum()), workers_per_process=10, num_byzantine=3
        ),
        callbacks=[ByzantineWorkers(ALIE(z=1.5), count=3)],
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
    )
    model = DigitsClassifier()
    trainer.fit(model, DigitsDataModule(batch_size=16))
    print(f"{SoftKrum.__name__}: {trainer.callback_metrics['accuracy']:.1%} of held-out digits")


if __name__ == "__main__":
    main()
