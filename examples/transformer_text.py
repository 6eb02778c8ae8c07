"""A small language model, trained by eight workers, one of which has a broken memory.

Its fault flips the highest exponent bit of one number of every message. With gradient clipping, as
every language model has it, that number scales all others to nothing: averaging stops learning,
without an error or a nan. The text is the reference of the Python language, which comes with
Python.

python examples/transformer_text.py [--fast]
"""

import argparse
import math
import pydoc_data.topics

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl  # type: ignore[no-redef]  # the other name of the same Lightning

from lightning_byz import ByzantineRobustStrategy, ByzantineWorkers, FlippedBit, Mean, RobustSGD

LENGTH = 64  # of the context, in characters


def text() -> tuple[TensorDataset, TensorDataset]:
    """ASCII codes in pieces of LENGTH + 1 for training, and the last tenth of them for
    validation.
    """
    letters = "".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")
    pieces = torch.tensor(list(letters[: len(letters) // (LENGTH + 1) * (LENGTH + 1)])).view(
        -1, LENGTH + 1
    )
    cut = len(pieces) * 9 // 10
    return TensorDataset(pieces[:cut]), TensorDataset(pieces[cut:])


class LanguageModel(pl.LightningModule):
    """A transformer of two layers that predicts the next character."""

    def __init__(self, width: int = 64, lr: float = 5e-3) -> None:
        super().__init__()
        self.lr = lr
        self.embed, self.position = (
            nn.Embedding(128, width),
            nn.Parameter(0.02 * torch.randn(LENGTH, width)),
        )
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, 2, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.predict = nn.Linear(width, 128)

    def bits(self, batch: list[Tensor]) -> Tensor:
        """Bits that it takes to say the next character."""
        (piece,) = batch  # [B, LENGTH + 1]
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=self.device)
        hidden = self.layers(self.embed(piece[:, :-1]) + self.position, mask, is_causal=True)
        return nn.functional.cross_entropy(
            self.predict(hidden).flatten(0, 1), piece[:, 1:].flatten()
        ) / math.log(2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.bits(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("bits", self.bits(batch), prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Trains by averaging without and with the fault, and robustly with it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="two steps")
    options = parser.parse_args()

    average, fault, (training, held_out) = (
        RobustSGD(aggregator=Mean()),
        ByzantineWorkers(FlippedBit(), count=1),
        text(),
    )
    runs = {
        "averaging, all sound": (
            ByzantineRobustStrategy(average, workers_per_process=8, num_byzantine=0),
            [],
        ),
        "averaging, one broken": (
            ByzantineRobustStrategy(average, workers_per_process=8, num_byzantine=0),
            [fault],
        ),
        "byzantine_robust, one broken": (ByzantineRobustStrategy(workers_per_process=8), [fault]),
    }
    for name, (strategy, callbacks) in runs.items():
        pl.seed_everything(0)
        trainer = pl.Trainer(
            accelerator="cpu",
            strategy=strategy,
            callbacks=callbacks,
            max_epochs=3,  # 303 steps
            gradient_clip_val=1.0,
            fast_dev_run=2 if options.fast else False,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(
            LanguageModel(), DataLoader(training, 64, shuffle=True), DataLoader(held_out, 128)
        )
        print(f"{name}: {trainer.callback_metrics['bits']:.2f} bits a character of held-out text")


if __name__ == "__main__":
    main()
