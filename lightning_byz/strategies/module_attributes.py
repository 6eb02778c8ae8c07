"""What a training step leaves on the module: every in-process worker has its own, as every process
would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_byz.strategies.private_names import of_last_worker

_MISSING = object()


class WorkerAttributes:
    """The attributes that training steps assign (an RNN's state, a counter), by local worker.

    Looked at are the attributes of the LightningModule and of all modules in it whose class is not
    torch's own. Metrics of torchmetrics are left out: one that is updated by all workers counts all
    of their samples. Attributes that are changed in place (a list, a replay buffer, an environment)
    are shared by the workers of a process.

    Args:
        module: the LightningModule.
        workers: number of local workers.
    """

    def __init__(self, module: nn.Module, workers: int) -> None:
        self._module = module
        self._own: list[dict[tuple[nn.Module, str], Any]] = [{} for _ in range(workers)]
        self._shown: dict[tuple[nn.Module, str], Any] = {}
        lightning = next(
            (base for base in type(module).__mro__ if base.__name__ == "LightningModule"), nn.Module
        )
        self._ignored = {*vars(lightning()), "log", "training"}

    def any(self) -> bool:
        """Whether training steps have assigned some."""
        return any(self._own)

    @contextmanager
    def none_assigned(self) -> Iterator[None]:
        """Inside, a training step runs that should assign none.

        Raises:
            ValueError: if it has; they are what they were then.
        """
        shared = self._found()
        yield
        after = self._found()
        if after.keys() != shared.keys() or any(after[key] is not shared[key] for key in after):
            self._restore(shared, after)
            raise ValueError("training_step assigns attributes of the module")

    def _found(self) -> dict[tuple[nn.Module, str], Any]:
        found = {}
        for part in self._module.modules():
            if type(part).__module__.startswith("torch.") or hasattr(part, "_update_count"):
                continue
            found.update(
                {
                    (part, name): value
                    for name, value in vars(part).items()
                    if name not in self._ignored
                }
            )
        return found

    @contextmanager
    def scratch(self, worker: int) -> Iterator[None]:
        """The module has this local worker's attributes inside; what is assigned there is
        forgotten.
        """
        shared = self._found()
        for (part, name), value in self._own[worker].items():
            setattr(part, name, value)
        try:
            yield
        finally:
            self._restore(shared, self._found())

    @staticmethod
    def _restore(
        shared: dict[tuple[nn.Module, str], Any], now: Iterable[tuple[nn.Module, str]]
    ) -> None:
        for part, name in now:
            if (part, name) not in shared:
                delattr(part, name)
        for (part, name), value in shared.items():
            if vars(part).get(name, _MISSING) is not value:
                setattr(part, name, value)

    @contextmanager
    def of(self, worker: int) -> Iterator[None]:
        """The module has this local worker's attributes inside."""
        if len(self._own) == 1:
            yield
            return
        shared, own = self._found(), self._own[worker]
        for key in [
            key
            for key in own
            if key in self._shown and shared.get(key, _MISSING) is not self._shown[key]
        ]:
            for each in self._own:  # somebody has assigned it between steps
                each.pop(key, None)
            del self._shown[key]
        for (part, name), value in own.items():
            setattr(part, name, value)
        before = {**shared, **own}
        try:
            yield
        finally:
            after = self._found()
            own.update(
                {
                    key: value
                    for key, value in after.items()
                    if before.get(key, _MISSING) is not value
                }
            )
            self._restore(shared, after)

    def show(self) -> None:
        """Outside of training steps the module has the first worker's attributes, as rank 0
        would.
        """
        self._shown = dict(self._own[0]) if len(self._own) > 1 else {}
        for (part, name), value in self._shown.items():
            setattr(part, name, value)


_DEPTH, _ITEMS = 4, 1000
"""How deep containers and objects are looked into, and how many of their last items."""


def put_back(module: nn.Module) -> list[str]:
    """Puts the last worker's tensors where one pass over all workers has left its own: in
    attributes of modules, and in containers and objects there. A later step could not read those.

    Returns:
        where.
    """
    found: list[str] = []
    seen: set[int] = set()

    def look(name: str, value: Any, put: Callable[[Any], None], depth: int) -> None:
        if isinstance(value, Tensor):
            mine = of_last_worker(value)
            if mine is not None:
                found.append(name)
                put(mine)
            return
        if depth == 0 or id(value) in seen or isinstance(value, (nn.Module, ModuleType, type)):
            return
        seen.add(id(value))
        for part, item, place in _items(value):
            look(f"{name}{part}", item, place, depth - 1)

    usual = vars(nn.Module())
    for prefix, part in module.named_modules():
        for name, value in list(vars(part).items()):
            if name not in usual and name != "_trainer":
                where = f"{prefix}.{name}".lstrip(".")
                look(where, value, partial(vars(part).__setitem__, name), _DEPTH)
    return found


def _items(value: Any) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    """The last entries of a container or an object: their names, what they hold, and what replaces
    that.
    """
    if isinstance(value, dict):
        for key in [*value][-_ITEMS:]:
            yield f"[{key!r}]", value[key], partial(value.__setitem__, key)
    elif isinstance(value, (list, deque)):
        for i in range(max(0, len(value) - _ITEMS), len(value)):
            yield f"[{i}]", value[i], partial(value.__setitem__, i)
    elif hasattr(value, "__dict__"):
        for name, item in [*vars(value).items()][-_ITEMS:]:
            yield f".{name}", item, partial(vars(value).__setitem__, name)


class ChangesByHand:
    """What one training step of an in-process worker changes that all workers share, so that it
    happens once for each.

    Args:
        module: the LightningModule.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.found: list[str] = []
        self._parameters = {name: self._print(p) for name, p in module.named_parameters()}
        self._sizes = self._containers()

    @staticmethod
    def _print(p: Tensor) -> Tensor:
        return (
            torch.linalg.vector_norm(p.detach(), dtype=torch.float64)
            if p.is_floating_point()
            else p.detach().double().sum()
        )

    def _containers(self) -> dict[str, int]:
        sizes = {}
        for prefix, part in self._module.named_modules():
            if not type(part).__module__.startswith("torch.") and not hasattr(
                part, "_update_count"
            ):
                mine = {
                    n: v
                    for n, v in vars(part).items()
                    if isinstance(v, (list, dict, set)) and not n.startswith("_")
                }
                sizes.update(
                    {f"{prefix}.{name}".lstrip("."): len(value) for name, value in mine.items()}
                )
        return sizes

    def names(self) -> list[str]:
        """The parameters and containers that have changed since this object was made."""
        now = dict(self._module.named_parameters())
        moved = [
            name
            for name, before in self._parameters.items()
            if name in now and not torch.equal(self._print(now[name]), before)
        ]
        sizes = self._containers()
        return moved + [name for name, size in sizes.items() if self._sizes.get(name, size) != size]
