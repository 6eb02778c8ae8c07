"""Networks for the configurations in ``configs/``, and the LightningModule that trains them: an
ordinary one.

The module to use is that of the Lightning package at hand: ``lightning_byz.lightning.Classifier``
or ``lightning_byz.pytorch_lightning.Classifier``; ``lightning_byz.Classifier`` is one of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_byz.optional_dependencies import require

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object


class LogisticRegression(nn.Sequential):
    """A linear layer: with the cross-entropy, multinomial logistic regression. ``[B, ...]`` ->
    ``[B, classes]``, from all zeros.

    Args:
        features: numbers in a sample, such as a9a's 123.
        classes: number of classes.
    """

    def __init__(self, features: int = 123, classes: int = 2) -> None:
        linear = nn.Linear(features, classes)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.Flatten(), linear)


class SmallCNN(nn.Sequential):
    """Two convolutions, each with pooling, and two linear layers, without normalization.
    ``[B, channels, side, side]`` -> ``[B, classes]``.

    Args:
        channels: of an image.
        side: height and width of an image, at least 4.
        classes: number of classes.
        width: channels of the first convolution; the second has twice as many.
    """

    def __init__(
        self, channels: int = 1, side: int = 28, classes: int = 10, width: int = 16
    ) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * (side // 4) ** 2, 64),
            nn.ReLU(),
            nn.Linear(64, classes),
        )


class ResNet18(nn.Module):
    """torchvision's ResNet-18, with a first layer for small images: 3 x 3, stride 1, no pooling.
    ``[B, channels, H, W]`` -> ``[B, classes]``.

    He, Zhang, Ren, Sun, CVPR 2016 (arXiv 1512.03385).

    Args:
        channels: of an image.
        classes: number of classes.

    Raises:
        MissingExtraError: without torchvision.
    """

    def __init__(self, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        require("ResNet18", "data", "torchvision")
        from torchvision.models import resnet18

        self.net = resnet18(num_classes=classes)
        self.net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.net.maxpool = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


class ClassifierModel(_Base):
    """All of Classifier but its Lightning base class (see `lightning_byz.lightning` and
    `.pytorch_lightning`).

    Trains a network on batches ``(inputs [B, ...], labels [B] int64)`` with the cross-entropy and
    SGD, and logs ``train_loss``, ``accuracy`` and ``loss`` (on validation data), ``test_accuracy``
    and ``test_loss``. Nothing in it knows of workers or attacks.

    Args:
        net: the network, inputs -> logits ``[B, classes]``.
        lr: the step size.
        momentum: of SGD, after aggregation; methods that have a momentum of their own want 0.
        weight_decay: of SGD.
    """

    def __init__(
        self, net: nn.Module, lr: float = 0.1, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__()
        self.net, self.lr, self.momentum, self.weight_decay = net, lr, momentum, weight_decay

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test_")

    def _evaluate(self, batch: tuple[Tensor, Tensor], prefix: str) -> None:
        x, y = batch
        logits = self(x)
        self.log(
            f"{prefix}accuracy",
            (logits.argmax(1) == y).float().mean(),
            prog_bar=True,
            sync_dist=True,
            batch_size=len(y),
        )
        self.log(f"{prefix}loss", F.cross_entropy(logits, y), sync_dist=True, batch_size=len(y))

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits: Tensor = self(batch[0])
        return logits.argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
