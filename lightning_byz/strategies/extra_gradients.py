"""Gradients besides the minibatch's own: at the previous parameters, over all of a worker's data,
on trusted data.

Each takes forward and backward passes that nobody notices: nothing is logged, and parameters,
``p.grad``, buffers, metrics and random states are afterwards what they were.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, zip_longest
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_byz.data.batches import BatchSplitter, copied
from lightning_byz.strategies import random_states
from lightning_byz.strategies.flat_parameters import FlatParameters
from lightning_byz.strategies.module_attributes import WorkerAttributes
from lightning_byz.strategies.module_buffers import WorkerBuffers
from lightning_byz.strategies.step_logs import WorkerLog
from lightning_byz.strategies.validate import UnsupportedSetupError
from lightning_byz.types import Gradients, Round, keyed_generator, keyed_seed

StepKey: TypeAlias = Callable[[int], "tuple[int, int, int]"]
"""From a worker to the key of its random stream in this step."""


class Pass(NamedTuple):
    """What a forward and a backward pass gave.

    Attributes:
        flat: the gradient, ``[d]``.
        used: ``[P]`` bool, the parameters that have one.
    """

    flat: Tensor
    used: Tensor


class ExtraGradients:
    """The gradients that a round needs besides the minibatch's, of this process's workers.

    Args:
        strategy: the RobustStrategy, set up.
        splitter: gives the splitter of the present loader's batches.
        passes: makes forward and backward passes that leave nothing behind.

    Attributes:
        trusted: the gradient on trusted data ``[d]``, at rank 0; elsewhere something of its shape.
            None: there is none in this round.
    """

    def __init__(
        self, strategy: Any, splitter: Callable[[], BatchSplitter], passes: QuietPasses
    ) -> None:
        self.strategy, self._splitter, self._passes = strategy, splitter, passes
        self.forget()

    def forget(self) -> None:
        """Back to before a round's first forward pass."""
        self._previous: list[Pass | None] | None = None
        self._full: list[Pass | None] | None = None
        self.trusted: Tensor | None = None

    def compute(
        self, round: Round, parts: Sequence[Any], rest: Sequence[Any], kwargs: Any, key: StepKey
    ) -> None:
        """Computes what this round needs. It comes first, while no worker's graph is alive.

        Args:
            round: the coming round.
            parts: by local worker, its part of the batch; None: it takes no part.
            rest: the training step's arguments after the batch.
            kwargs: and its keywords.
            key: by worker, the key of its random stream in this step.

        Raises:
            UnsupportedSetupError: if a second minibatch comes before the step.
        """
        strategy = self.strategy
        exchange, layout = strategy.exchanges[0], strategy.groups[0].layout
        algorithm = exchange.algorithm
        if layout is None:
            return
        if self._full is not None or self._previous is not None:
            raise UnsupportedSetupError(
                f"{type(algorithm).__name__} needs one minibatch per optimizer step. Found a "
                "second one before the step: gradient accumulation has been switched on. Leave "
                "GradientAccumulationScheduler out."
            )
        if strategy.trusted_data is not None and self.trusted is None:
            self.trusted = self._on_trusted_data(layout, round, rest, kwargs)
        if algorithm.full_gradient(round):
            self._full = self._over_all_data(layout, round, parts, rest, kwargs, key)
        elif algorithm.needs_previous and round.drift is not None:
            assert exchange.previous is not None
            before = parameters_at(layout, exchange.previous)
            with random_states_kept(strategy.root_device), before:
                self._previous = [
                    None
                    if part is None
                    else self._passes.gradient(layout, i, key(worker), (part, *rest), kwargs)
                    for i, (worker, part) in enumerate(
                        zip(exchange.transport.workers, parts, strict=True)
                    )
                ]

    def given(self, i: int, flat: Tensor | None, used: Tensor) -> tuple[Gradients | None, Tensor]:
        """What the i-th local worker's half of the algorithm is given.

        Args:
            i: the local worker.
            flat: its minibatch's gradient ``[d]``; None: it has none.
            used: ``[P]`` bool, the parameters that have one.

        Returns:
            the gradients, None if it has none to give, and the parameters that its losses used.
        """
        if flat is None or (self._full is None and self._previous is None):
            return None if flat is None else Gradients(flat), used
        extra = (self._previous if self._full is None else self._full)[i]  # type: ignore[index]
        if extra is None:
            return None, used
        if self._full is None:
            return Gradients(flat, extra.flat), used | extra.used
        return Gradients(extra.flat), used | extra.used

    def _over_all_data(
        self,
        layout: FlatParameters,
        round: Round,
        parts: Sequence[Any],
        rest: Sequence[Any],
        kwargs: Any,
        key: StepKey,
    ) -> list[Pass | None]:
        """Every local worker's gradient over its data; None for those that do not take part."""
        strategy = self.strategy
        exchange, trainer = strategy.exchanges[0], strategy.lightning_module.trainer
        workers = list(exchange.transport.workers)
        limit = exchange.algorithm.full_batches
        whole = (
            not isinstance(trainer.limit_train_batches, int) and trainer.limit_train_batches == 1.0
        )
        if limit is None and not whole:
            limit = int(trainer.num_training_batches)
        totals = [MeanGradient() for _ in workers]
        if all(part is None for part in parts):
            return [None for _ in workers]
        stream, splitter = (round.seed, round.step), self._splitter()
        loader = trainer.train_dataloader
        with whole_data(loader, workers, stream, strategy.root_device, splitter.by_hand) as batches:
            for b, batch_of in enumerate(islice(batches, limit)):
                for i, (worker, batch) in enumerate(zip(workers, batch_of, strict=True)):
                    if batch is None or parts[i] is None:
                        continue
                    batch = strategy.simulation.poisoned(worker, round.step, self._to_device(batch))
                    args = (batch, *rest)
                    done = self._passes.gradient(layout, i, (*key(worker), 1 + b), args, kwargs)
                    totals[i].add(done, splitter.size(batch))
        return [total.result() for total in totals]

    def _on_trusted_data(
        self, layout: FlatParameters, round: Round, rest: Sequence[Any], kwargs: Any
    ) -> Tensor:
        """Nan if the batch gives no loss."""
        strategy = self.strategy
        if not strategy.is_global_zero:
            return layout.like().zero_()
        key = (round.seed, round.step, strategy.n)  # no worker has this number
        with random_states_kept(strategy.root_device):
            batch = self._to_device(strategy.trusted_data.batch(round.seed, round.step))
            done = self._passes.gradient(layout, 0, key, (batch, *rest), kwargs)
        return layout.like().fill_(torch.nan) if done is None else done.flat

    def _to_device(self, batch: Any) -> Any:
        """A batch as the training loop hands it to training_step."""
        strategy = self.strategy
        module = strategy.lightning_module
        batch = strategy.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        return strategy.batch_to_device(batch, dataloader_idx=0)


class QuietPasses:
    """Forward and backward passes of a module's training step that leave nothing behind but their
    gradient.

    Args:
        module: the LightningModule.
        buffers: its buffers.
        attributes: what training steps assign on it.
        precision: the precision plugin, whose autocast and loss scale are used.
        device: the device of the module.
        training_step: ``(batch, *rest, **kwargs) -> output``, the module's training step in the
            plugin's context.
    """

    def __init__(
        self,
        module: Any,
        buffers: WorkerBuffers,
        attributes: WorkerAttributes,
        precision: Any,
        device: torch.device,
        training_step: Callable[..., Any],
    ) -> None:
        self.module, self.buffers, self.attributes, self.precision, self.device = (
            module,
            buffers,
            attributes,
            precision,
            device,
        )
        self.training_step = training_step

    def gradient(
        self,
        layout: FlatParameters,
        worker: int,
        key: Sequence[int],
        args: Sequence[Any],
        kwargs: Any,
    ) -> Pass | None:
        """The gradient of one batch's loss at the parameters as they are, or None if it gives no
        loss.

        Args:
            layout: the parameters.
            worker: index of the local worker whose buffers the pass is to see.
            key: of torch's random stream inside: the same key, the same dropout masks.
            args: of the training step: batch, index, ...; the batch is copied, as a step may change
                it, and others are to see it as it was.
            kwargs: of the training step.
        """
        parameters = list(self.module.parameters())
        grads = [p.grad for p in parameters]
        self._set_grads(parameters, [None] * len(parameters))
        outer = vars(self.module).get("log")
        vars(self.module)["log"] = WorkerLog().record
        try:
            with (
                self.buffers.scratch(worker),
                self.attributes.scratch(worker),
                _metrics_kept(self.module),
                random_states.worker_rng(self.device, *key),
            ):
                output = self.training_step(copied(args[0]), *args[1:], **kwargs)
                loss = output.get("loss") if isinstance(output, dict) else output
                if not isinstance(loss, Tensor):
                    return None
                scale = self._backward(loss)
            return Pass(layout.read_gradients(1 / scale), layout.used())
        finally:
            if outer is None:
                del vars(self.module)["log"]
            else:
                vars(self.module)["log"] = outer
            self._set_grads(parameters, grads)

    def _backward(self, loss: Tensor) -> float:
        """The backward pass; what the gradients have to be divided by."""
        scaler = getattr(self.precision, "scaler", None)
        if scaler is None or not scaler.is_enabled():
            self.precision.backward(loss, self.module, None)
            return 1.0
        self.precision.backward(scaler.scale(loss), self.module, None)
        return float(scaler.get_scale())

    @staticmethod
    def _set_grads(parameters: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad


class MeanGradient:
    """The gradient of the mean loss over all samples of several batches."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._used: Tensor | None = None
        self._samples = 0

    def add(self, done: Pass | None, samples: int) -> None:
        """One more batch's pass; None if it gave no loss."""
        if done is None:
            return
        self._samples += samples
        weighted = done.flat * samples
        self._total = weighted if self._total is None else self._total.add_(weighted)
        self._used = done.used if self._used is None else self._used | done.used

    def result(self) -> Pass | None:
        """The mean over all samples, or None if there was none."""
        if self._total is None or self._used is None:
            return None
        return Pass(self._total / self._samples, self._used)


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """All global random states (torch, CUDA, numpy, Python) are afterwards what they were
    before.
    """
    before = random_states.snapshot(device)
    try:
        yield
    finally:
        random_states.restore(device, before)


@contextmanager
def _metrics_kept(module: nn.Module) -> Iterator[None]:
    """The states of torchmetrics inside the module are afterwards what they were before."""
    metrics: list[Any] = [
        part
        for part in module.modules()
        if hasattr(part, "_defaults") and hasattr(part, "_update_count")
    ]
    names = ("_update_count", "_computed", "_forward_cache")
    before = [
        {name: _copied(getattr(metric, name, None)) for name in (*metric._defaults, *names)}
        for metric in metrics
    ]
    try:
        yield
    finally:
        for metric, state in zip(metrics, before, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)


def _copied(value: Any) -> Any:
    return (
        value.clone()
        if isinstance(value, Tensor)
        else list(value)
        if isinstance(value, list)
        else value
    )


@contextmanager
def parameters_at(layout: FlatParameters, x: Tensor) -> Iterator[None]:
    """The parameters have the values ``x [d]`` inside, and their own again afterwards, bit for bit.
    No graph may be alive.
    """
    before = [p.detach().clone() for p in layout.parameters]
    layout.write_parameters(x)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(layout.parameters, before, strict=True):
                p.copy_(value)


# -- a worker's whole data -------------------------------------------------------------------------


@runtime_checkable
class _Parted(Protocol):
    """A sampler that knows every worker's part of the data, such as WorkerSampler."""

    parts: Sequence[Sequence[int]]
    batch_size: int


@contextmanager
def whole_data(
    loader: Any,
    workers: Sequence[int],
    key: tuple[int, int],
    device: torch.device,
    by_hand: Callable[[Any, int], Any] | None = None,
) -> Iterator[Iterator[Sequence[Any]]]:
    """A second pass over the training data, beside the one that is under way, which does not
    notice.

    Augmentation, shuffling and the loader's processes run on random streams of this key.

    Args:
        loader: the training DataLoader, over a map-style dataset.
        workers: the local workers.
        key: seed and step.
        device: whose random state is to be kept.
        by_hand: how the module cuts a batch, see `BatchSplitter`.

    Yields:
        an iterator over one batch, or None, for each local worker. With WorkerSampler these are the
        worker's own part, every sample once, shuffled; else the process's batches, cut as in a
        step.

    Raises:
        ValueError: if the data cannot be read a second time.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "Full-gradient rounds read the training data a second time, beside the epoch under "
            "way, which needs one DataLoader over a map-style dataset. Found "
            f"{type(loader).__name__}"
            + (f" over {type(loader.dataset).__name__}" if isinstance(loader, DataLoader) else "")
            + ". Use such a DataLoader, or an algorithm without full gradients, such as "
            "ClippedDifferences."
        )
    sources = (
        loader.generator,
        getattr(loader.sampler, "generator", None),
        getattr(loader.batch_sampler, "generator", None),
    )
    generators = [source for source in sources if isinstance(source, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    with random_states_kept(device):
        _seed_everything(keyed_seed("full data", *key))
        try:
            yield _parts(loader, workers, key, BatchSplitter(loader, len(workers), by_hand))
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def _parts(
    loader: DataLoader[Any], workers: Sequence[int], key: tuple[int, int], splitter: BatchSplitter
) -> Iterator[Sequence[Any]]:
    sampler = loader.sampler
    if isinstance(sampler, _Parted):
        streams = [
            iter(_again(loader, _chunks(sampler, worker, key), (*key, worker)))
            for worker in workers
        ]
        yield from zip_longest(*streams)
        return
    for batch in _again(loader, loader.batch_sampler, key):
        yield splitter.split(batch) if len(workers) > 1 else [batch]


def _chunks(sampler: _Parted, worker: int, key: tuple[int, int]) -> list[list[int]]:
    part, generator = sampler.parts[worker], keyed_generator("full data order", *key, worker)
    order = [int(part[i]) for i in torch.randperm(len(part), generator=generator).tolist()]
    return [
        order[first : first + sampler.batch_size]
        for first in range(0, len(order), sampler.batch_size)
    ]


def _again(loader: DataLoader[Any], batch_sampler: Any, key: Sequence[int]) -> DataLoader[Any]:
    """The same loader with another batch sampler, and with processes of its own."""
    how: dict[str, Any] = {"batch_sampler": batch_sampler}
    if batch_sampler is None:  # the dataset's items are batches already
        how = {"batch_size": None, "sampler": loader.sampler}
    return DataLoader(
        loader.dataset,
        **how,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=keyed_generator("full data processes", *key),
    )


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


# -- trusted data ----------------------------------------------------------------------------------


class TrustedData:
    """Batches of trusted samples, drawn from a stream keyed by the step, so that a resumed run
    draws the same ones.

    Args:
        data: a DataLoader over a map-style dataset, whose batch size and ``collate_fn`` count; a
            dataset, which is one batch; or a batch.

    Raises:
        ValueError: if a DataLoader's dataset cannot be indexed.
    """

    def __init__(self, data: Any) -> None:
        self._batch, self._loader = None, None
        if isinstance(data, Dataset):
            data = DataLoader(data, batch_size=max(1, len(data)))  # type: ignore[arg-type]
        if not isinstance(data, DataLoader):
            self._batch = data
            return
        if isinstance(data.dataset, IterableDataset) or not data.batch_size:
            raise ValueError(
                "`trusted_data` should be a DataLoader with a batch_size over a map-style "
                "dataset, a dataset, or a batch. Found a DataLoader over "
                f"{type(data.dataset).__name__} with batch_size={data.batch_size}."
            )
        self._loader = data

    def batch(self, seed: int, step: int) -> Any:
        """This step's batch: samples drawn without replacement."""
        if self._loader is None:
            return self._batch
        dataset, size = self._loader.dataset, self._loader.batch_size
        order = torch.randperm(len(dataset), generator=keyed_generator("trusted", seed, step))  # type: ignore[arg-type]
        return self._loader.collate_fn([dataset[int(i)] for i in islice(order.tolist(), size)])
