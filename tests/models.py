"""Small models and data that the strategy's tests train."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset


def blobs(samples: int = 240, seed: int = 0) -> TensorDataset:
    """Ten numbers, of which the first two decide between three classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 10, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    return TensorDataset(x, y)


def loader(
    batch_size: int = 24, dataset: Dataset | None = None, shuffle: bool = False
) -> DataLoader:
    return DataLoader(dataset or blobs(), batch_size=batch_size, shuffle=shuffle)


def mlp(norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    middle = [nn.BatchNorm1d(16)] if norm else []
    drop = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(nn.Linear(10, 16), *middle, nn.Tanh(), *drop, nn.Linear(16, 3))


def loss_of(net: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(net(x), y)


class Plain(L.LightningModule):
    """Automatic optimization; options switch on what a test is about."""

    def __init__(
        self,
        optimizer: str = "sgd",
        norm: bool = False,
        dropout: float = 0.0,
        unused: bool = False,
        frozen: bool = False,
        checkpointing: bool = False,
        lr: float = 0.1,
        batch_size: int = 24,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.batch_size = lr, batch_size
        self.net = mlp(norm, dropout)
        if unused:
            self.never = nn.Linear(4, 4)
            self.sometimes = nn.Linear(10, 3)
        if frozen:
            self.net[0].requires_grad_(False)
        self.seen: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.hparams.checkpointing:
            return self.net[-1](checkpoint(self.net[:-1], x, use_reentrant=False))
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        self.seen += x[:, 0].tolist()
        logits = self(x)
        if self.hparams.unused and batch_idx % 2:
            logits = logits + self.sometimes(x)
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = list(self.parameters())
        if self.hparams.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=1e-3)
        if self.hparams.optimizer == "lbfgs":
            return torch.optim.LBFGS(parameters, lr=0.2, max_iter=5)
        return torch.optim.AdamW(parameters, lr=0.01)

    def train_dataloader(self) -> DataLoader:
        return loader(self.batch_size)


class Manual(Plain):
    """Manual optimization, with clipping if ``clip`` is set."""

    def __init__(self, clip: float = 0.0, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.clip = clip

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = loss_of(self.net, batch)
        self.manual_backward(loss)
        if self.clip:
            self.clip_gradients(
                optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm"
            )
        optimizer.step()
        self.log("loss", loss)


class GAN(L.LightningModule):
    """Two optimizers that take turns, toggled as in Lightning's own example."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 10))
        self.critic = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        x, _ = batch
        for_generator, for_critic = self.optimizers()
        z = x[:, :4].flip(1)
        self.toggle_optimizer(for_generator)
        loss = F.softplus(-self.critic(self.generator(z))).mean()
        self.manual_backward(loss)
        for_generator.step()
        for_generator.zero_grad()
        self.untoggle_optimizer(for_generator)
        self.toggle_optimizer(for_critic)
        loss = (
            F.softplus(-self.critic(x)).mean()
            + F.softplus(self.critic(self.generator(z).detach())).mean()
        )
        self.manual_backward(loss)
        for_critic.step()
        for_critic.zero_grad()
        self.untoggle_optimizer(for_critic)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(self.generator.parameters(), 0.01),
            torch.optim.SGD(self.critic.parameters(), 0.1),
        ]


class CountsBatches(L.Callback):
    """Lightning leaves its callbacks out while it looks for a learning rate."""

    batches = 0

    def on_train_batch_end(self, *args: object) -> None:
        self.batches += 1


class StatefulLoader:
    """A loader that shuffles by epoch and can say, and be told, where it is: what torchdata's
    StatefulDataLoader does.
    """

    def __init__(self, dataset: TensorDataset, batch_size: int) -> None:
        self.dataset, self.batch_size, self.epoch, self.position = dataset, batch_size, 0, 0
        self.resumed = False

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        if not self.resumed:
            self.position = 0
        self.resumed = False
        order = torch.randperm(
            len(self.dataset), generator=torch.Generator().manual_seed(self.epoch)
        )
        while self.position < len(self):
            first = self.position * self.batch_size
            self.position += 1
            if self.position == len(self):
                self.epoch += 1
            yield [t[order[first : first + self.batch_size]] for t in self.dataset.tensors]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position, self.resumed = (
            state["epoch"],
            state["position"] % len(self),
            True,
        )
