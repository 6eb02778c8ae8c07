"""This process's workers during local steps: each has parameters and an optimizer of its own.

`OneWorkerApart` is the usual process: its parameters are the module's. `WorkersApart` computes
several, one after the other, on a copy of the parameters each.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_byz.strategies.flat_parameters import FlatParameters
from lightning_byz.strategies.gradient_sync import GradientGroup, parameters_of
from lightning_byz.strategies.optimizer_states import OptimizerStates
from lightning_byz.strategies.step_logs import WorkerLog
from lightning_byz.strategies.validate import UnsupportedSetupError
from lightning_byz.strategies.workers import LocalWorkers, OneWorker, WorkersInTurn, stand_in


class _NothingToStepError(Exception):
    """A worker has no gradient; holds what its closure gave."""


class WorkersApart(LocalWorkers):
    """What the local workers of a phase have in common.

    Values that a training step logs are averaged over a phase's steps, and logged where it ends, or
    where an epoch does: until then nobody waits for anybody.

    Args:
        strategy: the RobustStrategy, whose exchanges are set up.
        training_step: as in `LocalWorkers`.

    Attributes:
        start: by id, every parameter that has required a gradient in this phase, and its value at
            the phase's start, the same everywhere.
        states: of each optimizer, by worker.
        moved: of each optimizer, the workers that have had a gradient in this phase.
        phase_over: what has been logged is to be logged where this training step ends.
    """

    hears_later = False

    def __init__(self, strategy: Any, training_step: Callable[..., Any]) -> None:
        super().__init__(strategy, training_step)
        self.start: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[int, Tensor] = {}  # what the only worker has come to, while the start shows
        offload = strategy.root_device.type != "cpu" and bool(strategy.local_steps.participants)
        self.states = {
            optimizer: OptimizerStates(optimizer, self.count, offload)
            for optimizer in strategy.optimizers
        }
        self._phase: list[list[WorkerLog]] = []
        self._cohort: tuple[Tensor, int] | None = None
        self.moved = [[False] * self.count for _ in strategy.optimizers]
        self.phase_over = False

    def agreed(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The worker's own, whose loss is its own."""
        return closure

    def note_start(self, parameters: Sequence[Tensor]) -> None:
        """Remembers the values of parameters that no step of this phase has changed yet."""
        for p in parameters:
            if p.requires_grad and id(p) not in self.start:
                self.start[id(p)] = (p, self._kept(p))

    def _kept(self, p: Tensor) -> Tensor:
        """A parameter's value, which stays when it is trained."""
        return p.detach().clone()

    def take_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], take: Callable[..., Any]
    ) -> Any:
        """A local step of every worker that takes part in this phase.

        Args:
            optimizer: the optimizer.
            closure: its closure.
            take: ``(optimizer, closure)``, takes the step.
        """
        return self._take(0, optimizer, closure, take)

    def _take(
        self, i: int, optimizer: Optimizer, closure: Callable[[], Any], take: Callable[..., Any]
    ) -> Any:
        """A worker's step, unless it has no gradient: a loss scaler needs one."""

        def evaluate() -> Any:
            result = closure()
            if not any(p.grad is not None for p in parameters_of(optimizer)):
                raise _NothingToStepError(result)
            self.moved[self.strategy.optimizers.index(optimizer)][i] = True
            return result

        try:
            return take(optimizer, evaluate)
        except _NothingToStepError as nothing:
            return nothing.args[0]

    def _log(self, logs: Sequence[WorkerLog], cohort: Tensor, step: int) -> None:
        self._phase.append(list(logs))
        self._cohort = (cohort, step)
        if self.phase_over:
            self.log_phase()

    # -- the end of a phase ------------------------------------------------------------------------

    def log_phase(self) -> None:
        """Logs, once for all workers, what the phase's training steps have logged."""
        steps, self._phase, self.phase_over = self._phase, [], False
        if steps and self._cohort is not None:
            super()._log([WorkerLog.joined(own) for own in zip(*steps, strict=True)], *self._cohort)

    @property
    def _place(self) -> str:
        """A line search may take unlike numbers of training steps on unlike ranks."""
        return f"values before round {self.strategy.exchanges[0].step}"

    def to_start(self, parameters: Iterable[Tensor]) -> None:
        """These parameters of the module are those of the phase's start."""
        for p in parameters:
            p.data = self.start[id(p)][1]

    @contextmanager
    def showing_start(self) -> Iterator[None]:
        """Inside, the module has the parameters and buffers of the phase's start."""
        yield

    def begin_phase(self, optimizer: Optimizer, first: Mapping[Any, Any] | None) -> None:
        """All workers go on from the module's parameters.

        Args:
            optimizer: whose parameters.
            first: the state that it begins with; None: each worker keeps its own.
        """
        for p in parameters_of(optimizer):
            self.start.pop(id(p), None)
            self._own.pop(id(p), None)
        self.moved[self.strategy.optimizers.index(optimizer)] = [False] * self.count
        if first is not None:
            self.states[optimizer].begin(first)

    @abstractmethod
    def _come_to(self, i: int, p: Tensor) -> Tensor:
        """What a worker has made of a parameter."""

    @abstractmethod
    def phase_state(self) -> dict[str, Any]:
        """Where the workers are in this phase, for a checkpoint."""

    @abstractmethod
    def load_phase(self, saved: Mapping[str, Any]) -> None:
        """Restores what `phase_state` gave; the module has the parameters of the phase's start."""

    def _gradient(
        self, i: int, group: GradientGroup, layout: FlatParameters, unscale: float
    ) -> tuple[Tensor | None, Tensor]:
        """How far a worker has come: the start less what it has made of it."""
        if not self.moved[self.strategy.groups.index(group)][i]:
            return None, torch.zeros(len(layout.parameters), dtype=torch.bool)
        row, moved = layout.rows(self.count)[i], []
        pieces = torch.split(row, layout.sizes)
        for piece, p in zip(pieces, layout.parameters, strict=True):
            _, start = self.start[id(p)]
            torch.sub(start, self._come_to(i, p), out=piece.view(p.shape))
            moved.append(piece.any())
        return row, torch.stack(moved).cpu()


class OneWorkerApart(WorkersApart, OneWorker):
    """The only worker of its process. Its parameters are the module's."""

    def __init__(self, strategy: Any, training_step: Callable[..., Any]) -> None:
        super().__init__(strategy, training_step)
        self._aside: dict[str, Any] | None = None  # its module's state while the start is shown

    def to_start(self, parameters: Iterable[Tensor]) -> None:
        parameters = list(parameters)
        self._own = {id(p): p.data for p in parameters}
        super().to_start(parameters)

    @contextmanager
    def showing_start(self) -> Iterator[None]:
        if self._aside is not None:  # a checkpoint in a validation
            yield
            return
        parameters = [p for p, _ in self.start.values()]
        self._aside = self.strategy.lightning_module.state_dict()
        self.to_start(parameters)
        try:
            with self.buffers.holding([buffer.clone() for buffer in self.buffers.start]):
                yield
        finally:
            self._aside = None
            for p in parameters:
                p.data = self._own[id(p)]

    def _come_to(self, i: int, p: Tensor) -> Tensor:
        return self._own[id(p)]

    def phase_state(self) -> dict[str, Any]:
        order = [p for optimizer in self.states for p in parameters_of(optimizer)]
        return {
            "module": self._aside or self.strategy.lightning_module.state_dict(),
            "started": [i for i, p in enumerate(order) if id(p) in self.start],
            "moved": [list(moved) for moved in self.moved],
            "optimizers": [optimizer.state_dict() for optimizer in self.states],
        }

    def load_phase(self, saved: Mapping[str, Any]) -> None:
        order = [p for optimizer in self.states for p in parameters_of(optimizer)]
        self.note_start([order[i] for i in saved["started"]])
        self.moved = [list(moved) for moved in saved["moved"]]
        with self.buffers.of(0):
            self.strategy.lightning_module.load_state_dict(saved["module"])
        for optimizer, state in zip(self.states, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)


class WorkersApartInTurn(WorkersApart, WorkersInTurn):
    """Several workers of one process, one after the other. Between steps the module has the
    parameters of the phase's start.

    They take as much memory as so many copies of the parameters and of the optimizer's state.
    """

    def __init__(self, strategy: Any, training_step: Callable[..., Any]) -> None:
        super().__init__(strategy, training_step)
        self.own: list[dict[int, Tensor]] = [{} for _ in range(self.count)]
        self._now: int | None = None  # the worker whose step is computed
        self._parts_now: list[Any] | None = None
        self._logs: list[WorkerLog] = []
        self._in_step = False
        self._taking: list[int] = []

    def _kept(self, p: Tensor) -> Tensor:
        return p.data

    def begin_phase(self, optimizer: Optimizer, first: Mapping[Any, Any] | None) -> None:
        super().begin_phase(optimizer, first)
        for p in parameters_of(optimizer):
            for own in self.own:
                own.pop(id(p), None)

    def _come_to(self, i: int, p: Tensor) -> Tensor:
        own = self.own[i].get(id(p))
        return self.start[id(p)][1] if own is None else own

    @contextmanager
    def _model_of(self, i: int) -> Iterator[None]:
        """The module has this worker's parameters inside."""
        own = self.own[i]
        for key, (p, start) in self.start.items():
            if key not in own:
                own[key] = start.clone()
            p.data = own[key]
        try:
            yield
        finally:
            for key, (p, start) in self.start.items():
                own[key], p.data = p.data, start

    def take_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], take: Callable[..., Any]
    ) -> Any:
        self.hear()
        self.buffers.refresh()
        self._cohort = (self._who_comes()[0], self.strategy.exchanges[0].step)
        here = self.strategy.exchanges[0].transport.workers
        self._taking = [i for i, worker in enumerate(here) if bool(self._cohort[0][worker])]
        self._parts_now, self._logs = None, [WorkerLog() for _ in here]
        self._in_step = True
        states, result = self.states[optimizer], None
        states.bring(self._taking)
        for i in self._taking:
            self._now = i
            with self._model_of(i), states.of(i):
                result = self._take(i, optimizer, closure, take)
        self._now = None
        if not self._taking:
            result = closure()
        self._in_step = False
        states.show()
        self._log(self._logs, *self._cohort)
        self.micro_step += 1
        return result

    def training_step(self, batch: Any, rest: Sequence[Any], kwargs: Any) -> Any:
        """The training step of the worker whose turn it is, on its part of the batch."""
        if not self._in_step or self._cohort is None:
            raise UnsupportedSetupError(
                "In-process workers with local_steps take a step with every batch. Found a "
                "training step without one, as gradient accumulation makes it, or an "
                "`optimizer_step` that calls its closure alone. Use one worker per process: "
                "Trainer(devices=n)."
            )
        if self._parts_now is None:
            self._parts_now = self._dealt(batch, self._cohort[0])
        i = self._now
        if i is None or self._parts_now[i] is None:
            return stand_in(None, self.strategy.root_device)
        alone = [part if j == i else None for j, part in enumerate(self._parts_now)]
        outputs, logs = self._forward(alone, rest, kwargs)
        self._logs[i] = logs[i]
        return outputs[i]

    def backward(
        self,
        scaled: Tensor,
        groups: Sequence[GradientGroup],
        optimizer: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        plugin, module = self.strategy.precision_plugin, self.strategy.lightning_module
        with self.buffers.of(self._now or 0):
            plugin.backward(scaled, module, optimizer, *args, **kwargs)

    # -- checkpoint --------------------------------------------------------------------------------

    def phase_state(self) -> dict[str, Any]:
        order = [p for optimizer in self.states for p in parameters_of(optimizer)]
        place = {id(p): i for i, p in enumerate(order)}
        return {
            "own": [{place[key]: value for key, value in own.items()} for own in self.own],
            "started": [place[key] for key in self.start],
            "moved": [list(moved) for moved in self.moved],
            "optimizers": [states.save() for states in self.states.values()],
            "buffers": self.buffers.copies(),
        }

    def load_phase(self, saved: Mapping[str, Any]) -> None:
        order = [p for optimizer in self.states for p in parameters_of(optimizer)]
        self.note_start([order[i] for i in saved["started"]])
        self.own = [
            {id(order[i]): value.to(order[i], copy=True) for i, value in own.items()}
            for own in saved["own"]
        ]
        self.moved = [list(moved) for moved in saved["moved"]]
        for states, of_workers in zip(self.states.values(), saved["optimizers"], strict=True):
            states.load(of_workers)
        device = self.strategy.root_device
        self.buffers.put([[b.to(device, copy=True) for b in own] for own in saved["buffers"]])
