"""All in-process workers' training steps in one pass: `torch.func.vmap` over the workers.

What a step does beside computing a loss is taken out of the pass: logged values and calls of
metrics are recorded inside, and replayed outside for each worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from lightning_byz.strategies.module_buffers import WorkerBuffers


class NotStackableError(Exception):
    """Why workers' steps cannot be computed in one pass."""


class _Later:
    """Stands inside of the pass for what a metric will answer outside."""

    def __init__(self, index: int) -> None:
        self.index = index

    @classmethod
    def _refuse(cls, *_: Any, **__: Any) -> NoReturn:
        raise NotStackableError("training_step computes with what a metric answers")

    __torch_function__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = (
        _refuse
    )
    __neg__ = __pow__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __float__ = _refuse


@dataclass
class _Slot:
    """Stands for a tensor of the pass, which each worker has its own of."""

    index: int


@dataclass
class _Nested:
    """A value of any nesting, in which slots, and what metrics will answer, may be."""

    inside: Any


@dataclass
class _Record:
    """What a training step does besides: calls of metrics and logged values, in order.

    Attributes:
        events: function, positional and keyword arguments, in which `_Slot` and `_Later` stand for
            what each worker has its own of.
        tensors: what the slots stand for.
    """

    events: list[tuple[Callable[..., Any] | None, tuple[Any, ...], dict[str, Any]]] = field(
        default_factory=list
    )
    tensors: list[Tensor] = field(default_factory=list)

    def kept(self, value: Any) -> Any:
        """A value of any nesting, with slots in the place of its tensors."""
        if isinstance(value, Tensor):
            return self._slot(value)
        if value is None or isinstance(value, (str, bool, int, float, _Later)):
            return value
        return _Nested(apply_to_collection(value, Tensor, self._slot))

    def _slot(self, leaf: Tensor) -> _Slot:
        self.tensors.append(leaf)
        return _Slot(len(self.tensors) - 1)

    def add(self, function: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> _Later:
        """Notes a call. ``function``: None for ``self.log``."""
        named = {name: self.kept(value) for name, value in kwargs.items()}
        self.events.append((function, tuple(map(self.kept, args)), named))
        return _Later(len(self.events) - 1)


class Stacked(NamedTuple):
    """What one pass gives for m workers.

    Attributes:
        losses: ``[m]``.
        gradients: by parameter, ``[m, ...]``.
        outputs: by worker, what its training step returned, with its own tensors.
        replay: ``(worker, log)``, does for one worker what its step did besides; ``log`` stands for
            ``self.log``.
        logged: ``(worker)``, the values that it logged itself, and no metric, by name.
    """

    losses: Tensor
    gradients: tuple[Tensor, ...]
    outputs: list[Any]
    replay: Callable[[int, Callable[..., None]], None]
    logged: Callable[[int], dict[str, Any]]


class StackedPass:
    """The workers' training steps, their gradients and buffers, in one pass.

    Args:
        module: the LightningModule.
        buffers: its buffers, and each worker's own.
        training_step: its training step in the precision plugin's context.
    """

    def __init__(
        self, module: nn.Module, buffers: WorkerBuffers, training_step: Callable[..., Any]
    ) -> None:
        self._module, self._buffers = module, buffers
        self._step = _Step(module, training_step)

    def __call__(
        self,
        parameters: Sequence[Tensor],
        workers: Sequence[int],
        parts: Sequence[Any],
        rest: Sequence[Any],
        kwargs: Mapping[str, Any],
        randomness: str,
        chunk: int | None,
    ) -> Stacked:
        """One pass.

        Args:
            parameters: with respect to which gradients are computed.
            workers: the local workers that take part; their buffers become what the pass makes of
                them.
            parts: their batches, which have the same form and shapes.
            rest: further arguments of the training step.
            kwargs: its keywords.
            randomness: vmap's, for random operations: "error", or "different" for each worker.
            chunk: workers that are computed at a time; None: all.

        Raises:
            NotStackableError: if the batches do not have one form, or the step does what cannot be
                stacked.
        """
        stacked, rebuild = stack(parts)
        names = {id(p): name for name, p in self._step.named_parameters()}
        given = {names[id(p)]: p.detach() for p in parameters}
        shape: dict[str, Any] = {}

        def one(params: dict[str, Tensor], buffers: list[Tensor], tensors: list[Tensor]) -> Any:
            record = _Record()
            with self._buffers.holding(buffers) as now, self._recording(record):
                arguments = (rebuild(tensors), *rest)
                output = functional_call(self._step, params, arguments, dict(kwargs))
                after = now()
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if not isinstance(loss, Tensor) or loss.dim() > 0:
                raise NotStackableError("training_step does not return a loss of one number")
            shape["output"], shape["events"] = record.kept(output), record.events
            return loss, (after, record.tensors)

        step = vmap(
            grad_and_value(one, has_aux=True),
            in_dims=(None, 0, 0),
            randomness=randomness,
            chunk_size=chunk,
        )
        gradients, (losses, (after, tensors)) = step(given, self._buffers.stacked(workers), stacked)
        self._buffers.take(workers, after)
        own = [tensor.unbind(0) for tensor in tensors]
        outputs = [_of(i, own, shape["output"]) for i in range(len(parts))]
        replay = partial(_replay, shape["events"], own)
        calls = [args for function, args, _ in shape["events"] if function is None]
        said = {name: value for name, value, *_ in calls if not isinstance(value, _Later)}

        def logged(worker: int) -> dict[str, Any]:
            return {name: _of(worker, own, value) for name, value in said.items()}

        of_each = tuple(gradients[names[id(p)]] for p in parameters)
        return Stacked(losses, of_each, outputs, replay, logged)

    @contextmanager
    def _recording(self, record: _Record) -> Iterator[None]:
        """Inside, ``self.log`` and metrics are recorded only."""
        own = vars(self._module)
        outer = own.get("log")

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            record.add(None, name, value, *args, **kwargs)

        metrics = [part for part in self._module.modules() if _is_metric(part)]
        before = [dict(vars(metric)) for metric in metrics]
        own["log"] = log
        for metric in metrics:
            for name in ("forward", "update", "compute"):
                vars(metric)[name] = partial(record.add, partial(_call, metric, name))
        try:
            yield
        finally:
            for metric, values in zip(metrics, before, strict=True):
                for name in ("forward", "update", "compute"):
                    vars(metric).pop(name)
                    if name in values:
                        vars(metric)[name] = values[name]
            if outer is None:
                del own["log"]
            else:
                own["log"] = outer


class _Step(nn.Module):
    """The training step as a module's forward pass, whose parameters may be exchanged."""

    def __init__(self, module: nn.Module, training_step: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self._training_step = training_step

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._training_step(*args, **kwargs)


def _is_metric(part: nn.Module) -> bool:
    """Whether it is a metric, or a collection of metrics, of torchmetrics."""
    return all(callable(getattr(part, name, None)) for name in ("update", "compute", "reset"))


def _call(metric: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    return (metric if name == "forward" else getattr(metric, name))(*args, **kwargs)


def _of(
    worker: int, own: Sequence[Sequence[Tensor]], value: Any, answers: Sequence[Any] = ()
) -> Any:
    """One worker's value.

    Args:
        worker: the worker, by its place in the pass.
        own: by slot, each worker's tensor.
        value: that of all, with slots.
        answers: what metrics have answered this worker.
    """
    if isinstance(value, _Slot):
        return own[value.index][worker]
    if isinstance(value, _Later):
        return answers[value.index]
    if isinstance(value, _Nested):
        return apply_to_collection(
            value.inside, (_Slot, _Later), lambda part: _of(worker, own, part, answers)
        )
    return value


def _replay(
    events: Sequence[tuple[Callable[..., Any] | None, tuple[Any, ...], dict[str, Any]]],
    own: Sequence[Sequence[Tensor]],
    worker: int,
    log: Callable[..., None],
) -> None:
    answers: list[Any] = []
    for function, args, kwargs in events:
        given = [_of(worker, own, value, answers) for value in args]
        named = {name: _of(worker, own, value, answers) for name, value in kwargs.items()}
        answers.append((function or log)(*given, **named))


def stack(parts: Sequence[Any]) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """Batches of one form as tensors ``[m, ...]``, and what makes a batch of one worker's tensors.

    Raises:
        NotStackableError: if they differ in form, in shapes, or in what is no tensor.
    """
    leaves, forms = zip(*map(_taken_apart, parts), strict=True)
    if not leaves[0]:
        raise NotStackableError("a batch holds no tensors that can be found in it")
    if any(form != forms[0] for form in forms):
        raise NotStackableError("the workers' batches differ in form or size")

    def rebuild(tensors: list[Tensor]) -> Any:
        left = iter(tensors)
        return apply_to_collection(parts[0], Tensor, lambda _: next(left))

    return [torch.stack(column) for column in zip(*leaves, strict=True)], rebuild


class _Form(NamedTuple):
    """What tensors that are stacked have to have in common."""

    shape: torch.Size
    dtype: torch.dtype
    layout: torch.layout


def _taken_apart(value: Any) -> tuple[list[Tensor], Any]:
    """The tensors in a value of any nesting, in order, and the value with `_Form` in their
    places.
    """
    found: list[Tensor] = []

    def form(tensor: Tensor) -> _Form:
        found.append(tensor)
        return _Form(tensor.shape, tensor.dtype, tensor.layout)

    return found, apply_to_collection(value, Tensor, form)
