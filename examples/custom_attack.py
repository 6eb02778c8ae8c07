"""An attack of your own, checked against the laws that every attack should keep, then tried on four
rules.

They end at 89.4 % (mean), 85.0 % (median), 90.3 % (NNM and a trimmed mean) and 92.8 % (the same
behind worker momentum) of held-out digits.

python examples/custom_attack.py
"""

from dataclasses import dataclass

import torch

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl  # type: ignore[no-redef]  # the other name of the same Lightning

from lightning_byz import (
    NNM,
    ByzantineRobustStrategy,
    ByzantineWorkers,
    Chain,
    CoordinateMedian,
    DigitsDataModule,
    Mean,
    RobustSGD,
    TrimmedMean,
)
from lightning_byz.attacks import Attack, Scene
from lightning_byz.attacks.base import everyone
from lightning_byz.demo.quickstart import DigitsClassifier
from lightning_byz.testing import check_attack


@dataclass(frozen=True)
class Headwind(Attack):
    """Pushes against the way that training has taken so far, by no more than honest workers differ:
    small lies that add up.

    Args:
        force: length of the push, in mean distances of an honest message from the honest mean.
        memory: how much of the direction before is kept in each step, in [0, 1).
    """

    force: float = 1.0
    memory: float = 0.9

    def __call__(
        self, honest: torch.Tensor, own: torch.Tensor, scene: Scene | None = None
    ) -> torch.Tensor:
        scene = scene or Scene()
        mean = honest.mean(0)  # [d]
        before = scene.memory.get("way", mean)  # what is in here survives checkpoints
        scene.memory["way"] = way = self.memory * before + (1 - self.memory) * mean
        spread = (honest - mean).norm(dim=1).mean()
        push = self.force * spread * way / way.norm().clamp_min(torch.finfo(way.dtype).tiny)
        return everyone(mean - push, own)  # [b, d], the same from every liar


def main(epochs: int = 10) -> None:
    """Checks the attack, then lets three of ten workers carry it out against each rule."""
    check_attack(Headwind())  # raises an AssertionError that names every law that it breaks
    robust = Chain(pre=(NNM(),), rule=TrimmedMean())
    algorithms = {
        "mean": RobustSGD(aggregator=Mean()),
        "median": RobustSGD(aggregator=CoordinateMedian()),
        "NNM + trimmed mean": RobustSGD(aggregator=robust),
        "NNM + trimmed mean, worker momentum": RobustSGD(
            aggregator=robust, worker_momentum=0.9, undo_worker_momentum=True
        ),
    }
    for name, algorithm in algorithms.items():
        pl.seed_everything(0)
        trainer = pl.Trainer(
            accelerator="cpu",
            strategy=ByzantineRobustStrategy(
                algorithm, workers_per_process=10, num_byzantine=0 if name == "mean" else 3
            ),
            callbacks=[ByzantineWorkers(Headwind(), count=3)],
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(DigitsClassifier(), DigitsDataModule(batch_size=16))
        print(f"{name}: {trainer.callback_metrics['accuracy']:.1%} of held-out digits")


if __name__ == "__main__":
    main()
