"""What a training step is measured on: networks, their samples, and small modules of other kinds."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

Samples = tuple[Tensor, ...]


class Task(NamedTuple):
    """Something to train.

    Attributes:
        module: makes it.
        draw: 64 samples.
        callbacks: makes those that belong to it.
    """

    module: Callable[[], L.LightningModule]
    draw: Callable[[], Samples]
    callbacks: Callable[[], list[L.Callback]] = list


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def resnet18() -> nn.Module:
    """11.2 million parameters."""
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


def images() -> Samples:
    """Of 32 x 32, of ten classes."""
    return torch.randn(64, 3, 32, 32), torch.randint(10, (64,))


class _Wait(torch.autograd.Function):
    """Whose backward pass waits, and gives gradients that are there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, gradients: Any, *weights: Tensor) -> Tensor:
        ctx.seconds, ctx.gradients = seconds, gradients
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        time.sleep(ctx.seconds)
        return gradient, None, None, *ctx.gradients


class Elsewhere(nn.Module):
    """Layers of ResNet-18's sizes whose backward pass takes 130 ms and no processor: as if every
    rank had a core, or a device, beside the one that exchanges.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)
        layers = [list(module.parameters(recurse=False)) for module in resnet18().modules()]
        self.layers = nn.ModuleList(nn.ParameterList(layer) for layer in layers if layer)
        self.gradients = [[torch.randn_like(p) for p in layer] for layer in self.layers]

    def forward(self, images: Tensor) -> Tensor:
        z = self.head(images.mean((2, 3)))
        for layer, gradients in zip(self.layers, self.gradients, strict=True):
            z = _Wait.apply(z, 0.13 / len(self.layers), gradients, *layer)
        return z


class Transformer(nn.Module):
    """11.4 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, batch_first=True)
        self.embed, self.layers, self.head = (
            nn.Embedding(1000, 384),
            nn.TransformerEncoder(layer, 6),
            nn.Linear(384, 1000),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(tokens)).mean(1))


def sentences() -> Samples:
    """Of 32 tokens, with the token to tell."""
    return torch.randint(1000, (64, 32)), torch.randint(1000, (64,))


def logistic_regression() -> nn.Module:
    """248 parameters."""
    return nn.Linear(123, 2)


def features() -> Samples:
    """Of 123 numbers, of two classes."""
    return torch.randn(64, 123), torch.randint(2, (64,))


def small_layers() -> nn.Module:
    """34 layers, 36,930 parameters."""
    hidden = [layer for _ in range(32) for layer in (nn.ReLU(), nn.Linear(32, 32))]
    return nn.Sequential(nn.Linear(123, 32), *hidden, nn.Linear(32, 2))


def mlp(*widths: int) -> nn.Sequential:
    layers = [
        layer
        for i in range(1, len(widths))
        for layer in (nn.Linear(widths[i - 1], widths[i]), nn.SiLU())
    ]
    return nn.Sequential(*layers[:-1])


class Diffusion(L.LightningModule):
    """Predicts the noise in 8 x 8 images (Ho et al., 2020), with an MLP of 33,472 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(65, 128, 128, 64)
        self.register_buffer("kept", torch.linspace(0.9999, 0.98, 100).cumprod(0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        time = torch.randint(100, (len(x), 1), device=x.device)
        kept, noise = self.kept[time], torch.randn_like(x)
        noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise
        loss = (self.net(torch.cat([noisy, time / 100], 1)) - noise).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class VAE(L.LightningModule):
    """Of 8 x 8 images, with two MLPs of 2,720 and 3,216 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(64, 32, 16), mlp(8, 32, 64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        distortion = (self.decoder(code) - x).square().sum(1).mean()
        rate = (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean() / 2
        self.log_dict({"distortion": distortion, "rate": rate})
        return distortion + rate

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class DQN(L.LightningModule):
    """Q-learning with a target network (Mnih et al., 2015), on transitions of four numbers and two
    actions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 64, 64, 2)
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        state, action, reward, after = batch
        if batch_idx % 10 == 0:
            self.target.load_state_dict(self.net.state_dict())
        with torch.no_grad():
            goal = reward + 0.99 * self.target(after).max(1).values
        loss = nn.functional.smooth_l1_loss(self.net(state).gather(1, action)[:, 0], goal)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.parameters(), lr=1e-3)


def small_images() -> Samples:
    """Of 8 x 8."""
    return (torch.rand(64, 64),)


def transitions() -> Samples:
    """State, action, reward, next state."""
    return torch.randn(64, 4), torch.randint(2, (64, 1)), torch.randn(64), torch.randn(64, 4)


TASKS: dict[str, Task] = {
    "resnet18": Task(lambda: Classifier(resnet18()), images),
    "resnet18 elsewhere": Task(lambda: Classifier(Elsewhere()), images),
    "transformer": Task(lambda: Classifier(Transformer()), sentences),
    "logistic regression": Task(lambda: Classifier(logistic_regression()), features),
    "34 small layers": Task(lambda: Classifier(small_layers()), features),
    "diffusion, EMA": Task(Diffusion, small_images, lambda: [EMAWeightAveraging()]),
    "VAE": Task(VAE, small_images),
    "DQN": Task(DQN, transitions),
}
