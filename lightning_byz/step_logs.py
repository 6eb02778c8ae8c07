"""What training steps log, and their losses: gathered from all workers, reduced once, logged once."""

from __future__ import annotations

import json
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_byz.compressors import Field
from lightning_byz.transports import Transport


class Call(NamedTuple):
    """One ``self.log(name, value, **kwargs)`` of one worker."""

    name: str
    value: Any
    kwargs: dict[str, Any]


@dataclass
class WorkerLog:
    """What one local worker's training step had to say.

    Attributes:
        calls: its logged values, in order.
        loss: its loss, a detached 0-d tensor, or None if it gave none.
        samples: number of samples of its batch.
    """

    calls: list[Call] = field(default_factory=list)
    loss: Tensor | None = None
    samples: int = 0

    @property
    def record(self) -> Callable[..., None]:
        """Stands in for ``LightningModule.log``. A compiled training_step leaves its graph here, as
        it does for Lightning's own.
        """
        disable: Any = torch.compiler.disable  # here, as it imports the compiler
        record: Callable[..., None] = disable(self._record)
        return record

    def _record(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        names = ("prog_bar", "logger", "on_step", "on_epoch", "reduce_fx")
        self.calls.append(Call(name, value, {**dict(zip(names, args, strict=False)), **kwargs}))
        self.samples = kwargs.get("batch_size") or self.samples


def _number(value: Any) -> Tensor | None:
    """A logged value as a float64 number, or None for what reduces itself (torchmetrics)."""
    if isinstance(value, numbers.Real):  # bool, int, float, and numpy's
        return torch.tensor(float(value), dtype=torch.float64)
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().reshape(()).double()
    return None


_NOT_LOGGED = -1.7976931348623157e308
"""Stands for "this worker did not log it": the lowest float64, which no honest metric takes."""

_LOG_ARGUMENTS = frozenset(
    {"prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "enable_graph", "sync_dist", "add_dataloader_idx", "batch_size"}
    | {"metric_attribute", "rank_zero_only", "sync_dist_group"}
)

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "avg": torch.mean,
    "sum": torch.sum,
    "max": torch.max,
    "amax": torch.max,
    "min": torch.min,
    "amin": torch.min,
}


class StepLogs:
    """Reduces the workers' logged values to one each.

    Every rank says what it logged in one small collective, which all ranks enter after every training step, whether they logged
    anything or not: a worker that skips a ``self.log`` cannot leave the others waiting. Names travel as JSON, only when they change.

    Attributes:
        loss: the median of the workers' finite losses in the last step, or None.
        skipped: logged values that were not finite, and so left out, by name.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._kwargs: dict[str, dict[str, Any]] = {}
        self.loss: Tensor | None = None
        self.skipped: dict[str, int] = {}

    def reduce(self, logs: Sequence[WorkerLog], transport: Transport, honest: Sequence[bool], device: torch.device) -> list[Call]:
        """One call for every name that some worker logged, with the honest workers' reduced value.

        Args:
            logs: of the local workers.
            transport: the run's transport.
            honest: for all n workers, whether they count (a simulation knows; else all do).
            device: where to gather.
        """
        numbers: list[dict[str, Tensor]] = []
        own: list[Call] = []  # values that reduce themselves
        for log in logs:
            spoken: dict[str, list[Tensor]] = {}
            for call in log.calls:
                number = _number(call.value)
                if number is None:
                    own = [other for other in own if other.name != call.name] + [call]
                else:
                    spoken.setdefault(call.name, []).append(number.cpu())
                    self._kwargs[call.name] = call.kwargs
            numbers.append({name: _reduction(self._kwargs[name])(torch.stack(values)) for name, values in spoken.items()})
        local = sorted({name for values in numbers for name in values})

        gathered = self._gather(logs, numbers, local, transport, device)
        if gathered is None:  # somebody logged a name that is new
            self._names = self._union(local, transport, device)
            gathered = self._gather(logs, numbers, local, transport, device)
            assert gathered is not None
        table, losses, samples = gathered

        finite = losses[torch.isfinite(losses)]
        self.loss = None if not len(finite) else torch.quantile(finite, 0.5).to(device)
        counted = torch.tensor(list(honest))
        batch_size = int(samples[counted].sum()) or 1
        calls = []
        for name, column in zip(self._names, table.unbind(1), strict=True):
            if name not in self._kwargs or bool((column == _NOT_LOGGED).all()):
                continue
            kwargs = {key: value for key, value in self._kwargs[name].items() if key != "sync_dist"}
            said = counted & (column != _NOT_LOGGED)
            good = said & torch.isfinite(column)
            if int(said.sum() - good.sum()):
                self.skipped[name] = self.skipped.get(name, 0) + int(said.sum() - good.sum())
            value = _reduction(kwargs)(column[good]) if bool(good.any()) else torch.tensor(torch.nan)
            calls.append(Call(name, value.float(), {**kwargs, "batch_size": batch_size}))
        return calls + [call._replace(kwargs=dict(call.kwargs)) for call in own]

    def state(self) -> dict[str, dict[str, Any]]:
        """The names that all ranks know, and how they are logged."""
        return {name: _plain(self._kwargs[name]) for name in self._names if name in self._kwargs}

    def load(self, state: dict[str, dict[str, Any]]) -> None:
        """Restores what `state` gave, on every rank or on one that comes late."""
        self._names, self._kwargs = sorted(state), {name: dict(kwargs) for name, kwargs in state.items()}

    def _gather(
        self,
        logs: Sequence[WorkerLog],
        numbers: Sequence[dict[str, Tensor]],
        local: Sequence[str],
        transport: Transport,
        device: torch.device,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """(values ``[n, names]``, losses ``[n]``, samples ``[n]``), or None if not all names are known everywhere."""
        known = set(local) <= set(self._names)
        messages = []
        for log, values in zip(logs, numbers, strict=True):
            head = torch.tensor([float(known), float(log.samples)], dtype=torch.float64, device=device)
            loss = torch.nan if log.loss is None else log.loss
            body = [loss, *(values.get(name, _NOT_LOGGED) for name in self._names)]
            numbers_on_device = [torch.as_tensor(number, dtype=torch.float64, device=device).reshape(()) for number in body]
            messages.append([torch.cat([head, torch.stack(numbers_on_device)])])
        layout = [Field((3 + len(self._names),), torch.float64)]
        unheard = torch.tensor([1.0, 0.0, torch.nan, *[_NOT_LOGGED] * len(self._names)], dtype=torch.float64)
        table = torch.stack([unheard if row is None else row[0].cpu() for row in transport.gather(messages, layout)])
        if not bool((table[:, 0] == 1).all()):
            return None
        return table[:, 3:], table[:, 2], table[:, 1]

    def _union(self, local: Sequence[str], transport: Transport, device: torch.device) -> list[str]:
        """All names that any rank knows. A rank that has not logged one itself learns how the others log it."""
        text = json.dumps(
            {name: _plain(self._kwargs[name]) for name in sorted({*local, *self._names} & self._kwargs.keys())}
        ).encode()
        copies = transport.workers_per_process
        size = torch.tensor([len(text)], dtype=torch.int64, device=device)
        heard = transport.gather([[size]] * copies, [Field((1,), torch.int64)])
        sizes = [0 if length is None else min(max(int(length[0]), 0), _LONGEST_TEXT) for length in heard]
        longest = max(sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=device)
        padded[: len(text)] = torch.frombuffer(bytearray(text[:longest]), dtype=torch.uint8).to(device)
        names: set[str] = set()
        for length, data in zip(sizes, transport.gather([[padded]] * copies, [Field((longest,), torch.uint8)]), strict=True):
            theirs = {} if data is None else _understood(bytes(data[0][:length].cpu().tolist()))
            names.update(theirs)
            self._kwargs = {**theirs, **self._kwargs}
        return sorted(names)


_LONGEST_TEXT = 1 << 20
"""Bytes of names that are read from one worker."""


def _understood(text: bytes) -> dict[str, dict[str, Any]]:
    """What a worker says of the names that it logs; nothing, if it makes no sense."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(said, dict) or not all(
        isinstance(kwargs, dict) and set(kwargs) <= _LOG_ARGUMENTS for kwargs in said.values()
    ):
        return {}
    return said


def _reduction(kwargs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """How a ``self.log`` call wants its values reduced."""
    return _REDUCTIONS.get(_plain(kwargs)["reduce_fx"], torch.mean)


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a ``self.log`` call that are numbers, strings or flags, as JSON can carry them."""
    plain = {key: value for key, value in kwargs.items() if value is None or isinstance(value, (bool, int, float, str))}
    reduce_fx = kwargs.get("reduce_fx", "mean")
    return {**plain, "reduce_fx": reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "mean")}
