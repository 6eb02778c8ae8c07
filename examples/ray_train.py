"""Ray Train: three workers, of which one lies, and one may be killed on the way.

Ray starts the processes, wherever its cluster has room; here, on this machine. `--kill-rank 1` has
that worker killed in the second epoch: Ray starts all workers again, and they go on from the last
checkpoint that was reported to Ray.

python examples/ray_train.py [--workers 3] [--liars 1] [--kill-rank 1] [--epochs 4] [--fast]
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.lightning import RayLightningEnvironment, RayTrainReportCallback
from ray.train.torch import TorchTrainer

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl  # type: ignore[no-redef]  # the other name of the same Lightning

from lightning_byz import ByzantineWorkers, DigitsDataModule, SignFlip
from lightning_byz.demo.quickstart import DigitsClassifier
from lightning_byz.ray import RayByzantineRobustStrategy, prepare_trainer


class Killed(pl.Callback):
    """Ends this process in the middle of the second epoch, as the kernel does when memory runs
    out.
    """

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.current_epoch == 1:
            ray.train.get_all_reported_checkpoints()  # waits until Ray has the first epoch's
            os.kill(os.getpid(), signal.SIGKILL)


def train(options: dict[str, Any]) -> None:
    """What every worker of Ray runs."""
    before = ray.train.get_checkpoint()
    pl.seed_everything(0)
    callbacks = [
        ByzantineWorkers(SignFlip(scale=10.0), count=options["liars"]),
        RayTrainReportCallback(),
    ]
    if before is None and ray.train.get_context().get_world_rank() == options["kill_rank"]:
        callbacks.append(Killed())
    trainer = pl.Trainer(
        accelerator="auto",
        devices="auto",
        strategy=RayByzantineRobustStrategy(),
        plugins=[RayLightningEnvironment()],
        callbacks=callbacks,
        max_epochs=options["epochs"],
        limit_train_batches=4 if options["fast"] else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer = prepare_trainer(trainer)
    model, data = DigitsClassifier(), DigitsDataModule(batch_size=16)
    if before is None:
        trainer.fit(model, data)
        return
    with before.as_directory() as folder:
        path = Path(folder) / RayTrainReportCallback.CHECKPOINT_NAME
        trainer.fit(model, data, ckpt_path=str(path))


def main() -> None:
    """Trains on Ray, and prints the accuracy at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--liars", type=int, default=1)
    parser.add_argument("--kill-rank", type=int)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--storage", type=Path, default=Path("outputs/ray"))
    parser.add_argument("--fast", action="store_true", help="four steps an epoch")
    options = parser.parse_args()

    if not ray.is_initialized():
        ray.init(num_cpus=options.workers)  # on this machine; RAY_ADDRESS names another cluster
    result = TorchTrainer(
        train,
        train_loop_config=vars(options),
        scaling_config=ScalingConfig(num_workers=options.workers),
        run_config=RunConfig(
            storage_path=str(options.storage.resolve()),
            failure_config=FailureConfig(max_failures=1),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    ).fit()
    print(
        f"{options.workers} workers on Ray, {options.liars} lying: "
        f"{result.metrics['accuracy']:.1%} of held-out digits, {result.checkpoint.path}"
    )


if __name__ == "__main__":
    main()
