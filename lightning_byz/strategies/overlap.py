"""A worker's gradient is read, and its message leaves, while its backward pass is still running."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.worker_side import BucketedMessages
from lightning_byz.strategies.flat_parameters import FlatParameters
from lightning_byz.transports import Transport

log = logging.getLogger("lightning_byz")


class Overlap:
    """Reads the only local worker's gradients as backward makes them, and sends its message's
    buckets as soon as they are filled.

    Backward fills the vector from its end, roughly: the last parameters get their gradients first.
    Buckets leave in one order, which all ranks share, so that a parameter without a gradient holds
    its bucket and all later ones back until `gradient` is asked for. What has been read of
    ``p.grad`` is released at once: the estimate will take its place. If the algorithm wants whole
    vectors, nothing is sent, but gradients are read while they are in a cache, and their memory
    serves for the next ones.

    Args:
        layout: the parameters.
        exchange: whose next round the message is for.
    """

    def __init__(self, layout: FlatParameters, exchange: Exchange) -> None:
        self.layout, self.exchange = layout, exchange
        self.broken = False
        """Whether a parameter's gradient has changed after it was sent, once: this model's backward
        passes cannot be overlapped.
        """
        self._starts = list(accumulate(layout.sizes, initial=0))
        self._upload: BucketedMessages | None = None
        self.began = False
        """Whether gradients have been read of which `gradient` has not been asked for."""
        self._late = False
        self._stream: Any = None  # of the accelerator, on which the backward pass was called
        self._written: set[int] = set()
        self._buckets: list[tuple[int, int]] = []
        self._touched: list[list[int]] = []  # by parameter, the buckets that it lies in
        self._missing: list[int] = []  # by bucket, how many of its parameters have no gradient yet

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """The last backward pass before the exchange."""
        in_pieces = self.exchange.algorithm.coordinate_wise and not self.broken
        self._upload = self.exchange.open(self.layout.blank(), spend=True) if in_pieces else None
        device = self.layout.device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._written, self._late = set(), False
        self._plan([] if self._upload is None else self._upload.left)
        self.began = True
        yield

    def _plan(self, buckets: list[tuple[int, int]]) -> None:
        if buckets != self._buckets:
            spans = list(pairwise(self._starts))
            self._buckets = buckets
            self._touched = [
                [b for b, (first, last) in enumerate(buckets) if a < last and first < z and a < z]
                for a, z in spans
            ]
        self._missing = [0] * len(buckets)
        for touched in self._touched:
            for b in touched:
                self._missing[b] += 1

    @torch.no_grad()
    def arrived(self, i: int, parameter: Tensor) -> None:
        """The gradient of the i-th parameter is there."""
        again = i in self._written
        if (
            again
            and self._upload is not None
            and any(b < self._upload.uplink.sent for b in self._touched[i])
        ):
            self._late = True
            return
        with self._on_one_stream(parameter.grad):
            row = self._write(i, parameter)
            parameter.grad = None
            if again or self._upload is None:
                return
            for b in self._touched[i]:
                self._missing[b] -= 1
            uplink = self._upload.uplink
            while uplink.sent < len(self._buckets) and self._missing[uplink.sent] == 0:
                first, last = self._buckets[uplink.sent]
                self._upload.send([row[first:last]])

    def _on_one_stream(self, gradient: Tensor | None) -> AbstractContextManager[object]:
        """A bucket holds gradients that autograd may have made on several streams of an
        accelerator, as it runs each operation's backward on the stream of its forward. They are
        read on one.
        """
        if self._stream is None:
            return nullcontext()
        made_on = torch.cuda.current_stream(self._stream.device)
        if made_on == self._stream:
            return nullcontext()
        self._stream.wait_stream(made_on)
        if gradient is not None:
            gradient.record_stream(self._stream)  # its memory is not to be used again before
        return torch.cuda.stream(self._stream)

    def _write(self, i: int, parameter: Tensor) -> Tensor:
        row = self.layout.rows(1)[0]
        place = row[self._starts[i] : self._starts[i + 1]]
        if i in self._written:
            place.view(parameter.shape).add_(parameter.grad)  # type: ignore[arg-type]
        else:
            self.layout.read_gradient(parameter, place)
        self._written.add(i)
        return row

    def used(self) -> Tensor:
        """``[P]`` bool: the parameters that have a gradient."""
        return self.layout.used() | torch.tensor(
            [i in self._written for i in range(len(self.layout.parameters))], dtype=torch.bool
        )

    def gradient(self) -> Tensor | None:
        """The whole gradient ``[d]``, after a backward pass that was overlapped; None if there is
        none, or another one than was sent.
        """
        self._upload, self.began = None, False
        if not bool(self.used().any()):
            return None
        if self._late:
            self.broken = True
            warnings.warn(
                "byzantine_robust: a parameter received a gradient a second time in one backward "
                "pass, after the first was sent (reentrant checkpointing does that). This worker "
                "is silent in this step, and sends its message after backward from now on. "
                "Sharded(overlap=False) does so from the start.",
                stacklevel=2,
            )
            return None
        for i, parameter in enumerate(self.layout.parameters):
            if i not in self._written:
                self._write(i, parameter)
        return self.layout.rows(1)[0]


def may_overlap(strategy: Any, transport: Transport) -> bool:
    """Whether gradients are read during backward, and sent where the algorithm lets them; logs why
    not.
    """
    if not transport.overlaps or strategy.workers_per_process > 1:
        return False
    algorithm = strategy.resolved
    reason = obstacle(strategy.lightning_module, strategy.precision_plugin)
    whole = f"{type(algorithm).__name__} looks at the whole vector"
    why = (None if algorithm.coordinate_wise else whole) if reason is None else reason
    log.info(
        "byzantine_robust: gradients are exchanged while backward runs."
        if why is None
        else f"byzantine_robust: gradients are exchanged after backward, not during it: {why}."
    )
    return reason is None


def obstacle(module: Any, precision: Any) -> str | None:
    """Why a run's gradients cannot be read before backward has ended; None: they can."""
    if getattr(precision, "scaler", None) is not None:
        return "a loss scaler looks for overflows first"
    if not is_lightnings(module.backward):
        return f"{type(module).__name__} has a `backward` of its own"
    return None


def is_lightnings(method: Any) -> bool:
    """Whether a hook is Lightning's own, which changes no gradient."""
    return getattr(method, "__module__", "").startswith(("lightning.", "pytorch_lightning."))
