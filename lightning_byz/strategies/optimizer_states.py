"""The state of one optimizer for each local worker."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_byz.strategies.validate import UnsupportedSetupError

State = dict[Any, Any]


class OptimizerStates:
    """What an optimizer remembers for each of several workers: its ``state``, by worker.

    Its settings (``param_groups``: learning rates, which schedules set) are the same for all.

    Args:
        optimizer: the optimizer.
        workers: how many.
        offload: states of workers that do nothing in a phase are moved to the CPU.
    """

    def __init__(self, optimizer: Optimizer, workers: int, offload: bool = False) -> None:
        self._optimizer, self._offload = optimizer, offload
        self._kept: list[State]
        self._devices: list[dict[tuple[Any, str], torch.device]] = [{} for _ in range(workers)]
        self.begin(optimizer.state)

    def begin(self, state: Mapping[Any, Any]) -> None:
        """Every worker has a copy of this state."""
        self._kept = [copied(state) for _ in self._devices]
        self.show()

    def show(self) -> None:
        """The optimizer has the first worker's state, for whoever looks at it between steps."""
        self._put(self._kept[0])

    def _put(self, state: State) -> None:
        self._optimizer.state.clear()
        self._optimizer.state.update(state)

    @contextmanager
    def of(self, i: int) -> Iterator[None]:
        """The optimizer has this worker's state inside.

        Raises:
            UnsupportedSetupError: if its step changes its settings, which all workers share.
        """
        before = self._settings()
        self._put(self._kept[i])
        try:
            yield
        finally:
            self._kept[i] = dict(self._optimizer.state)
        if len(self._kept) > 1 and self._settings() != before:
            raise UnsupportedSetupError(
                "In-process workers with local_steps share their optimizer's param_groups. Found "
                f"that a step of {type(self._optimizer).__name__} changes them. Use one worker per "
                "process: Trainer(devices=n)."
            )

    def _settings(self) -> list[dict[str, Any]]:
        return [
            {
                name: float(value) if isinstance(value, Tensor) and value.numel() == 1 else value
                for name, value in part.items()
                if name != "params"
            }
            for part in self._optimizer.param_groups
        ]

    def bring(self, workers: list[int]) -> None:
        """These workers' states go to where they are needed, the others' to the CPU."""
        if not self._offload:
            return
        for i, state in enumerate(self._kept):
            here, devices = i in workers, self._devices[i]
            for p, entry in state.items():
                for name, value in entry.items():
                    if not isinstance(value, Tensor):
                        continue
                    home = devices.setdefault((p, name), value.device)
                    entry[name] = value.to(home if here else "cpu")

    # -- checkpoint --------------------------------------------------------------------------------

    def save(self) -> list[Any]:
        """By worker, what the optimizer's ``state_dict`` says of its state."""
        saved = []
        for i in range(len(self._kept)):
            self._put(self._kept[i])
            saved.append(self._optimizer.state_dict()["state"])
        self.show()
        return saved

    def load(self, saved: list[Mapping[Any, Any]]) -> None:
        """Restores what `save` gave."""
        for i, state in enumerate(saved):
            whole = self._optimizer.state_dict()
            self._optimizer.load_state_dict({**whole, "state": copy.deepcopy(dict(state))})
            self._kept[i] = dict(self._optimizer.state)
        self.show()


def copied(state: Mapping[Any, Any]) -> State:
    """The same parameters, each with a copy of what is remembered of it."""
    return {p: copy.deepcopy(value) for p, value in state.items()}
