"""When this process's workers exchange with the others: the interface between Lightning's hooks and
an exchange.

`lightning_byz.strategies.gradient_sync.GradientSync` exchanges gradients at the end of backward, as
DDP does. `lightning_byz.strategies.phases.PhaseSync` exchanges what several local steps have made
of the parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning_byz.strategies.gradient_sync import GradientGroup


class Sync(ABC):
    """Sees training steps, backward passes and optimizer steps, and exchanges where it is time.

    Attributes:
        groups: one for each optimizer, and one for parameters that are in none, if there are any.
        blocked: no exchange follows the coming backward pass.
        in_training_step: a local worker's training step runs.
    """

    groups: list[GradientGroup]
    blocked: bool
    in_training_step: bool = False

    @property
    def between_rounds(self) -> bool:
        """Whether all workers have the same parameters now."""
        return True

    @contextmanager
    def training_step(self) -> Iterator[None]:
        """Inside, one local worker's training step runs."""
        self.in_training_step = True
        try:
            yield
        finally:
            self.in_training_step = False

    def begin_training_step(self) -> None:  # noqa: B027  # some look at nothing here
        """A training step begins."""

    @abstractmethod
    def backward(self, overlap: bool) -> AbstractContextManager[list[GradientGroup]]:
        """Inside, a backward pass runs.

        Args:
            overlap: whether this process's message may leave while it runs.

        Yields:
            the groups that it is about.
        """

    @abstractmethod
    def blocking(self) -> AbstractContextManager[None]:
        """Inside, gradients add up locally."""

    @abstractmethod
    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], take: Callable[..., Any]
    ) -> Any:
        """One step of an optimizer.

        Args:
            optimizer: the optimizer.
            closure: its closure.
            take: ``(optimizer, closure)``, takes the step.

        Returns:
            what the step gave.
        """

    def ignoring_steps(self) -> AbstractContextManager[None]:
        """Inside, steps of optimizers are none: torch makes an empty one where it asks for a state
        that there is not yet.
        """
        return _nothing()

    def showing_start(self) -> AbstractContextManager[None]:
        """Inside, the module has the parameters and buffers that all workers have in common."""
        return _nothing()

    def end_training(self) -> None:  # noqa: B027  # most have nothing left
        """The last batch has been trained on."""

    @abstractmethod
    def forget(self) -> None:
        """Back to before the first step."""

    @abstractmethod
    def remove(self) -> None:
        """Takes all hooks off."""

    # -- checkpoints -------------------------------------------------------------------------------

    def save(self, filepath: Any) -> dict[str, Any]:
        """What goes into a checkpoint; may write files of this rank's own beside it."""
        return {}

    def load(self, saved: Mapping[str, Any], filepath: Any, same: bool) -> None:  # noqa: B027
        """Restores what `save` gave. ``same``: the workers are those that saved it."""

    def remove_files(self, filepath: Any) -> None:  # noqa: B027  # most write none
        """The checkpoint there is removed: so are this rank's own files beside it."""


@contextmanager
def _nothing() -> Iterator[None]:
    yield
