"""Where local steps are exchanged: after so many steps of an optimizer."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_byz.strategies.gradient_sync import GradientGroup, parameters_of
from lightning_byz.strategies.local_steps import DILOCO, LocalSteps, OuterOptimizer
from lightning_byz.strategies.optimizer_states import copied
from lightning_byz.strategies.sync import Sync
from lightning_byz.strategies.validate import UnsupportedSetupError
from lightning_byz.strategies.workers_apart import WorkersApart

log = logging.getLogger("lightning_byz")


class PhaseSync(Sync):
    """Counts local steps, and exchanges what they have come to (`LocalSteps`).

    Each optimizer has phases of its own. A phase ends early with the last batch of the training,
    where that is known beforehand (``max_epochs``, ``max_steps``), else where training ends. A
    round that gives no estimate leaves the parameters at the phase's start.

    Args:
        strategy: the RobustStrategy, with its optimizers.
        groups: of each optimizer.
        exchange: from what a group's workers have come to, to the aggregate in ``p.grad``.
        settings: of local steps.
        outer_optimizer: makes what steps on the aggregate; None: DiLoCo's.
    """

    blocked = True

    def __init__(
        self,
        strategy: Any,
        groups: Sequence[GradientGroup],
        exchange: Callable[[GradientGroup], None],
        settings: LocalSteps,
        outer_optimizer: OuterOptimizer | None,
    ) -> None:
        self.strategy, self.groups, self.settings = strategy, list(groups), settings
        self._exchange, self._outer_optimizer = exchange, outer_optimizer or DILOCO
        self.optimizers: list[Optimizer] = list(strategy.optimizers)
        self._first = [copied(optimizer.state) for optimizer in self.optimizers]
        self._stepping = False
        self._others: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.forget()
        self._hook = register_optimizer_step_pre_hook(self._before_step)

    def forget(self) -> None:
        self.steps = [0] * len(self.optimizers)
        self.outer = [
            self._outer_optimizer(parameters_of(optimizer)) for optimizer in self.optimizers
        ]
        for group in self.groups:
            group.forget()

    def remove(self) -> None:
        self._hook.remove()

    @property
    def workers(self) -> WorkersApart:
        """This process's."""
        workers = self.strategy.local_workers
        assert isinstance(workers, WorkersApart)
        return workers

    @property
    def between_rounds(self) -> bool:
        return not any(self.steps)

    @contextmanager
    def backward(self, overlap: bool) -> Iterator[list[GradientGroup]]:
        for group in self.groups:
            self.workers.note_start(list(group.parameters()))
        yield self.groups

    def blocking(self) -> AbstractContextManager[None]:
        return nullcontext()

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], take: Callable[..., Any]
    ) -> Any:
        if optimizer not in self.optimizers:
            return take(optimizer, closure)
        i = self.optimizers.index(optimizer)
        self.workers.note_start(parameters_of(optimizer))
        self._stepping = True
        try:
            result = self.workers.take_step(optimizer, closure, take)
        finally:
            self._stepping = False
        self.steps[i] += 1
        if self.steps[i] >= self.settings.steps or self._is_last():
            self._end(i)
        if self.strategy.lightning_module.trainer.is_last_batch:  # its values are of this epoch
            self._log_phase()
        return result

    def _log_phase(self) -> None:
        """Logs what the phase's steps have logged: now, or where the training step that takes an
        optimizer's step by hand has ended.
        """
        if self.strategy.lightning_module.automatic_optimization:
            self.workers.log_phase()
        else:
            self.workers.phase_over = True

    def _is_last(self) -> bool:
        """Whether this step is known to be the last one of the training."""
        trainer = self.strategy.lightning_module.trainer
        epochs, steps = trainer.max_epochs, trainer.max_steps
        last_epoch = epochs is not None and epochs != -1 and trainer.current_epoch + 1 >= epochs
        last_step = steps != -1 and trainer.global_step + 1 >= steps
        return bool(last_step or (last_epoch and trainer.is_last_batch))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Torch's hook on every optimizer's step."""
        if self._stepping or optimizer in self.outer or optimizer in self._others:
            return
        of_module = {id(p) for p in self.strategy.lightning_module.parameters()}
        if not any(id(p) in of_module for p in parameters_of(optimizer)):
            self._others.add(optimizer)  # of another model
            return
        raise RuntimeError(
            "Local steps are counted where Lightning steps. Found a step of "
            f"{type(optimizer).__name__} beside it. Return every optimizer of the module's "
            "parameters from configure_optimizers, and in manual optimization step those that "
            "self.optimizers() gives."
        )

    # -- the end of a phase ------------------------------------------------------------------------

    def _end(self, i: int) -> None:
        """Exchanges what the local steps of one optimizer have come to."""
        optimizer, group, outer, workers = (
            self.optimizers[i],
            self.groups[i],
            self.outer[i],
            self.workers,
        )
        members = [p for p in group.parameters() if id(p) in workers.start]
        self._log_phase()
        if members:
            group.over(members)
            gradients = [(p, p.grad) for p in parameters_of(optimizer)]
            for p, _ in gradients:
                p.grad = None
            workers.to_start(members)
            self._exchange(group)
            self._take_in(outer, optimizer)
            outer.step()
            for p, gradient in gradients:
                p.grad = gradient
        workers.begin_phase(optimizer, self._first[i] if self.settings.fresh_optimizer else None)
        self.steps[i] = 0

    @staticmethod
    def _take_in(outer: Optimizer, optimizer: Optimizer) -> None:
        """The outer optimizer has the parameters that the optimizer has by now."""
        known = {id(p) for p in parameters_of(outer)}
        new = [p for p in parameters_of(optimizer) if id(p) not in known]
        outer.param_groups[0]["params"].extend(new)  # one group, as in a run that resumes

    def showing_start(self) -> AbstractContextManager[None]:
        return nullcontext() if self.between_rounds else self.workers.showing_start()

    def end_training(self) -> None:
        if self.strategy.processes.interrupted:
            self.workers.to_start([p for p, _ in self.workers.start.values()])
            return
        for i, steps in enumerate(self.steps):
            if steps:
                self._end(i)
        self.workers.log_phase()

    # -- checkpoints -------------------------------------------------------------------------------

    def save(self, filepath: Any) -> dict[str, Any]:
        saved: dict[str, Any] = {
            "steps": [0] * len(self.steps),
            "outer": [outer.state_dict() for outer in self.outer],
        }
        whole = {**saved, "steps": list(self.steps)}
        if self.strategy.processes.size == 1:
            return {**whole, "phase": self.workers.phase_state()}
        if self.settings.checkpoints == "ranks" and filepath is not None:
            path, now = self._of_rank(filepath), self._now
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.save({**self.workers.phase_state(), "saved at": now}, path)
            return {**whole, "files": self.strategy.n, "saved at": now}
        if not self.between_rounds:
            log.info(
                f"byzantine_robust: {filepath} is saved {max(self.steps)} local steps into a "
                "phase. A run that resumes from it goes on from the phase's start."
            )
        return saved

    @property
    def _now(self) -> list[int]:
        """Which moment of the run this is: its round and its training step."""
        return [self.groups[0].exchange.step, self.workers.micro_step]

    def _of_rank(self, filepath: Any) -> str:
        """This rank's own file beside a checkpoint, which may be a link.

        Raises:
            UnsupportedSetupError: if the checkpoint is not on a file system.
        """
        if "://" in str(filepath):
            raise UnsupportedSetupError(
                "LocalSteps(checkpoints='ranks') writes files beside the checkpoint. Found "
                f"{filepath}, which is not on a file system. Use checkpoints='start', or a local "
                "path."
            )
        return f"{os.path.realpath(filepath)}.rank{self.strategy.global_rank}"

    def remove_files(self, filepath: Any) -> None:
        if self.settings.checkpoints == "ranks" and self.strategy.processes.size > 1:
            with suppress(FileNotFoundError):
                os.remove(self._of_rank(filepath))

    def load(self, saved: Mapping[str, Any], filepath: Any, same: bool) -> None:
        for outer, state in zip(self.outer, saved["outer"], strict=True):
            outer.load_state_dict(state)
        phase = saved.get("phase")
        if same and "files" in saved and self.strategy.processes.size > 1:
            phase = self._read(saved, filepath)
        if same and phase is not None and len(phase.get("own", [0])) == self.workers.count:
            self.workers.load_phase(phase)
            self.steps = list(saved["steps"])
        elif any(saved["steps"]):
            log.warning(
                f"byzantine_robust: {filepath} was saved in the middle of a phase by other "
                "workers, or other processes. This run goes on from the phase's start."
            )

    def _read(self, saved: Mapping[str, Any], filepath: Any) -> Mapping[str, Any]:
        """What this rank's own file holds."""
        path = self._of_rank(filepath)
        if not os.path.exists(path):
            raise FileNotFoundError(
                "A checkpoint of LocalSteps(checkpoints='ranks') has a file for each rank. Found "
                f"no {path}. Copy it beside {filepath}."
            )
        phase: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if phase["saved at"] != saved["saved at"]:
            raise ValueError(
                f"{path} should belong to {filepath}. Found one that was saved in round and "
                f"training step {phase['saved at']}, and not {saved['saved at']}. Resume from a "
                "checkpoint that all ranks have written."
            )
        return phase


def first_callback(base: type, trainer: Any) -> None:
    """Puts a callback before all others of a trainer, unless it is there: what they see in a
    validation, and at the end of the training, is what all workers have in common.

    Args:
        base: Lightning's Callback.
        trainer: the trainer of a RobustStrategy.
    """

    class LocalStepsCallback(base):  # type: ignore[misc]
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.strategy.show_start()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.strategy.sync is not None:
                trainer.strategy.sync.end_training()

    if not any(type(each).__name__ == LocalStepsCallback.__name__ for each in trainer.callbacks):
        trainer.callbacks.insert(0, LocalStepsCallback())
