"""A worker's gradient is read, and its message leaves, while its backward pass is still running."""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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

_BACKLOG = 2**24
"""Bytes of gradients that may wait for the thread; backward waits for it then, so that few are held
twice.
"""


class Overlap:
    """Reads the only local worker's gradients as backward makes them, and sends its message's
    buckets as soon as they are filled.

    Backward fills the vector from its end, roughly: the last parameters get their gradients first.
    Buckets leave in one order, which all ranks share, so that a parameter without a gradient holds
    its bucket and all later ones back until `gradient` is asked for. What has come in ``p.grad`` is
    taken out of it at once: the estimate will take its place. On a CPU a thread reads and sends
    buckets, so that they take no time of the backward pass where there is a core for it; on an
    accelerator backward itself runs beside this process. If the algorithm wants whole vectors,
    nothing is sent, but gradients are read while they are in a cache, and their memory serves for
    the next ones.

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
        self._thread: ThreadPoolExecutor | None = None
        if layout.device.type == "cpu":
            self._thread = ThreadPoolExecutor(1, "lightning_byz buckets")
        # what the thread has to do, and the bytes of its gradients
        self._under_way: deque[tuple[Future[None], int]] = deque()
        self._here: set[int] = set()  # parameters whose gradients have come
        self._unread: list[tuple[int, Tensor]] = []  # of them, by parameter, those to be read
        self._read: set[int] = set()
        self._failed = False
        self._sent = 0  # buckets, also those that the thread has still to send
        self._buckets: list[tuple[int, int]] = []
        # by parameter, the buckets that it lies in
        self._touched: list[list[int]] = [[] for _ in layout.sizes]
        self._missing: list[int] = []  # by bucket, how many of its parameters have no gradient yet

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """The last backward pass before the exchange."""
        self._settle()  # a pass that was broken off may have left something
        in_pieces = self.exchange.algorithm.coordinate_wise and not self.broken
        self._upload = self.exchange.open(self.layout.blank(), spend=True) if in_pieces else None
        device = self.layout.device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._here, self._unread, self._read = set(), [], set()
        self._sent, self._late, self._failed = 0, False, False
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

    def arrived(self, i: int, parameter: Tensor) -> None:
        """The gradient of the i-th parameter is there."""
        again = i in self._here
        if again and any(b < self._sent for b in self._touched[i]):
            self._late = True
            return
        assert parameter.grad is not None
        self._here.add(i)
        self._unread.append((i, parameter.grad))
        parameter.grad = None
        for b in () if again else self._touched[i]:
            self._missing[b] -= 1
        first = self._sent
        while self._sent < len(self._buckets) and self._missing[self._sent] == 0:
            self._sent += 1
        full = self._buckets[first : self._sent]
        if self._upload is None or self._thread is None or self._sent == len(self._buckets):
            self._settle()  # backward has nothing left to do beside the last bucket
            with self._on_one_stream(self._unread[-1][1]):
                self._take(self._unread, full)
        elif full:
            nbytes = sum(gradient.nbytes for _, gradient in self._unread)
            self._settle(_BACKLOG - nbytes)
            self._under_way.append((self._thread.submit(self._take, self._unread, full), nbytes))
        else:
            return
        self._unread = []

    def _settle(self, most: int = -1) -> None:
        """Waits until the thread has so few bytes to read, or nothing to do, and raises what it has
        met.
        """
        while self._under_way and sum(nbytes for _, nbytes in self._under_way) > most:
            future, _ = self._under_way.popleft()
            future.result()

    @torch.no_grad()
    def _take(
        self, gradients: Sequence[tuple[int, Tensor]], buckets: Sequence[tuple[int, int]]
    ) -> None:
        """Reads gradients, by parameter, and sends the buckets that are full by now.

        Raises:
            RuntimeError: once that has failed: buckets have one order.
        """
        if self._failed:
            raise RuntimeError("This step's message is broken off by the error before this one.")
        self._failed = True
        row = self.layout.rows(1)[0]
        for i, gradient in gradients:
            place = row[self._starts[i] : self._starts[i + 1]]
            if i in self._read:
                place.view(gradient.shape).add_(gradient)
            else:
                self.layout.read_gradient(gradient, place)
            self._read.add(i)
        for first, last in buckets:
            assert self._upload is not None
            self._upload.send([row[first:last]])
        self._failed = False

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

    def used(self) -> Tensor:
        """``[P]`` bool: the parameters that have a gradient."""
        return self.layout.used() | torch.tensor(
            [i in self._here for i in range(len(self.layout.parameters))], dtype=torch.bool
        )

    def gradient(self) -> Tensor | None:
        """The whole gradient ``[d]``, after a backward pass that was overlapped; None if there is
        none, or another one than was sent.
        """
        self._settle()
        self._take(self._unread, [])
        self._upload, self.began, self._unread = None, False, []
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
        row = self.layout.rows(1)[0]
        for i, parameter in enumerate(self.layout.parameters):
            if i not in self._here:
                self.layout.read_gradient(
                    parameter.grad, row[self._starts[i] : self._starts[i + 1]]
                )
        return row


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
