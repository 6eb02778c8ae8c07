"""A language model that no process holds alone: three replicas of two processes each, one of which
lies.

The module is written for Lightning's ModelParallelStrategy: it shards itself in `configure_model`
over the mesh that it is handed. Inside of a replica torch reduces gradients; between the replicas
they are aggregated robustly. A worker is a replica. The text is the reference of the Python
language, which comes with Python.

python examples/sharded_transformer.py [--fast] [--average]
"""

import argparse
import math
import pydoc_data.topics

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl  # type: ignore[no-redef]  # the other name of the same Lightning

from lightning_byz import ByzantineRobustStrategy, ByzantineWorkers, Mean, RobustSGD, SignFlip

LENGTH, WIDTH = 64, 64  # of the context, in characters; of the hidden vectors


def text() -> tuple[TensorDataset, TensorDataset]:
    """ASCII codes in pieces of LENGTH + 1 for training, and the last tenth of them for
    validation.
    """
    letters = "".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")
    whole = letters[: len(letters) // (LENGTH + 1) * (LENGTH + 1)]
    pieces = torch.tensor(list(whole)).view(-1, LENGTH + 1)
    cut = len(pieces) * 9 // 10
    return TensorDataset(pieces[:cut]), TensorDataset(pieces[cut:])


class Transformer(nn.Module):
    """Two layers, and from characters to the logits of the next ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.norm, self.predict = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128)

    def forward(self, letters: Tensor) -> Tensor:
        """Characters ``[B, LENGTH]`` to logits ``[B, LENGTH, 128]``."""
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=letters.device)
        hidden = self.embed(letters) + self.position.weight
        for layer in self.layers:
            hidden = layer(hidden, mask, is_causal=True)
        return self.predict(self.norm(hidden))


class LanguageModel(pl.LightningModule):
    """Predicts the next character. Nothing in it knows of this package."""

    def __init__(self, lr: float = 5e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net: nn.Module | None = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        self.net = Transformer()
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def bits(self, batch: list[Tensor]) -> Tensor:
        """Bits that it takes to say the next character."""
        (piece,) = batch  # [B, LENGTH + 1]
        logits = self.net(piece[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())
        return loss / math.log(2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.bits(batch)

    def on_train_start(self) -> None:
        own = sum(p.to_local().numel() for p in self.parameters())
        whole = sum(p.numel() for p in self.parameters())
        self.print(f"rank 0 holds {own:,} of {whole:,} parameters")

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("bits", self.bits(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)


def main() -> None:
    """Trains, and says what each process holds and how good the model is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--average", action="store_true", help="average replicas instead")
    parser.add_argument("--fast", action="store_true", help="two steps")
    options = parser.parse_args()

    pl.seed_everything(0)
    training, held_out = text()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=6,
        strategy=ByzantineRobustStrategy(
            RobustSGD(aggregator=Mean()) if options.average else None,
            data_parallel_size=2,
        ),
        callbacks=[ByzantineWorkers(SignFlip(scale=3.0), workers=[1])],
        max_epochs=1,
        limit_train_batches=2 if options.fast else 150,
        limit_val_batches=2 if options.fast else 10,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(LanguageModel(), DataLoader(training, 16, shuffle=True), DataLoader(held_out, 32))
    if trainer.is_global_zero:
        bits = trainer.callback_metrics["bits"]
        print(f"{trainer.strategy.n} workers: {bits:.2f} bits a character of held-out text")


if __name__ == "__main__":
    main()
