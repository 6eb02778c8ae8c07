"""What training steps log, and their losses: gathered from all workers, reduced once, logged
once.
"""

from __future__ import annotations

import json
import math
import numbers
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_byz.compressors import Field
from lightning_byz.strategies.reductions import (
    REDUCTIONS,
    Reduction,
    is_finite,
    over_finite,
    reduction,
)
from lightning_byz.transports import Transport
from lightning_byz.transports.parsing import (
    FLAGS,
    Refusals,
    StepRow,
    check_logged,
    logged_names,
    step_row,
)


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
        sizes: the ``batch_size`` of values that were logged with one, by name.
        float64: names of values that have this precision, as Lightning would keep them.
    """

    calls: list[Call] = field(default_factory=list)
    loss: Tensor | None = None
    samples: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    float64: set[str] = field(default_factory=set)

    @classmethod
    def joined(cls, logs: Sequence[WorkerLog]) -> WorkerLog:
        """What one worker's training steps, one after the other, had to say: as one step that
        logged every value.
        """
        losses = [log.loss for log in logs if log.loss is not None]
        sizes: Counter[str] = Counter()
        for log in logs:
            sizes.update(log.sizes)
        return cls(
            [call for log in logs for call in log.calls],
            torch.stack(losses).mean() if losses else None,
            sum(log.samples for log in logs),
            dict(sizes),
            set[str]().union(*(log.float64 for log in logs)),
        )

    @property
    def record(self) -> Callable[..., None]:
        """Stands in for ``LightningModule.log``. A compiled training_step leaves its graph here, as
        it does for Lightning's own.
        """
        disable: Any = torch.compiler.disable  # here, as it imports the compiler
        record: Callable[..., None] = disable(self.note)
        return record

    def note(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """The same, where nothing is compiled."""
        value = value.detach() if isinstance(value, Tensor) else value
        names = ("prog_bar", "logger", "on_step", "on_epoch", "reduce_fx")
        self.calls.append(Call(name, value, {**dict(zip(names, args, strict=False)), **kwargs}))
        if kwargs.get("batch_size"):
            self.sizes[name] = int(kwargs["batch_size"])
        kept = isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64)
        if (value.dtype if kept else torch.get_default_dtype()) == torch.float64:
            self.float64.add(name)


def _number(value: Any) -> float | None:
    """A logged value as a number, or None for what reduces itself (torchmetrics)."""
    if isinstance(value, numbers.Real):  # bool, int, float, and numpy's
        return float(value)
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.detach().double())
    return None


def _over(values: Sequence[float], how: Reduction) -> float:
    """The reduction of what one worker logged under one name."""
    if len(values) == 1:
        return values[0]
    return float(how.of(torch.tensor(values, dtype=torch.float64)))


_NOT_LOGGED = -1.7976931348623157e308
"""Stands for "this worker did not log it": the lowest float64, which no honest metric takes."""


class StepLogs:
    """Reduces the workers' logged values to one each.

    Every rank says something after every training step, whether it logged anything or not: a worker
    that skips a ``self.log`` cannot leave the others waiting. Names travel as JSON, only when one
    is new. What cannot be an honest worker's is taken for its silence.

    Attributes:
        loss: the median of the workers' finite losses in the last step, or None.
        skipped: logged values that were not finite, and so left out, by name.
        refusals: what was refused of each worker.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._kwargs: dict[str, dict[str, Any]] = {}
        self._float64: set[str] = set()
        self._learned: set[str] = set()  # names that were logged in the way that others log them
        self.loss: Tensor | None = None
        self.skipped: dict[str, int] = {}
        self.refusals = Refusals("logged values")

    def reduce(
        self,
        logs: Sequence[WorkerLog],
        transport: Transport,
        honest: Sequence[bool],
        device: torch.device,
        silenced: Collection[int] = (),
    ) -> list[Call]:
        """One call for every name that some worker logged, with the honest workers' reduced value.

        Args:
            logs: of the local workers.
            transport: the run's transport.
            honest: for all n workers, whether they count (a simulation knows; else all do).
            device: where to gather.
            silenced: workers in quarantine, of whom nothing is taken; the same on every rank.
        """
        return self.say(logs, transport, device)(honest, silenced)

    def say(
        self, logs: Sequence[WorkerLog], transport: Transport, device: torch.device
    ) -> Callable[[Sequence[bool], Collection[int]], list[Call]]:
        """Says to the others what was logged here; arguments are those of `reduce`.

        Returns:
            a function of ``honest`` and ``silenced`` that hears the others, and gives the calls.
            All ranks call it at the same place, before they exchange anything of another place.
        """
        spoken: list[dict[str, float]] = []
        own: list[Call] = []  # values that reduce themselves
        for log in logs:
            said: dict[str, list[float]] = {}
            for call in log.calls:
                number = _number(call.value)
                if number is None:
                    own = [other for other in own if other.name != call.name] + [call]
                else:
                    said.setdefault(call.name, []).append(number)
                    self._note_kwargs(call)
            self._float64 |= log.float64
            spoken.append(
                {
                    name: _over(values, _reduction(self._kwargs[name]))
                    for name, values in said.items()
                }
            )
        transport.post(*self._messages(logs, spoken, device))

        def hear(honest: Sequence[bool], silenced: Collection[int]) -> list[Call]:
            rows = self._read(transport.delivered(), silenced)
            news = [worker for worker, row in enumerate(rows) if row is not None and not row.known]
            if news:
                self._learn({name for said in spoken for name in said}, news, transport, device)
                again = transport.gather(*self._messages(logs, spoken, device))
                rows = self._read(again, silenced)
            losses = [row.loss for row in rows if row is not None and math.isfinite(row.loss)]
            self.loss = None
            if losses:
                self.loss = torch.tensor(median(losses), dtype=torch.float64, device=device)
            return self._calls(rows, honest) + [
                call._replace(kwargs=dict(call.kwargs)) for call in own
            ]

        return hear

    def _calls(self, rows: Sequence[StepRow | None], honest: Sequence[bool]) -> list[Call]:
        """What is logged of all workers' numbers."""
        counted = [
            row for row, counts in zip(rows, honest, strict=True) if row is not None and counts
        ]
        calls = []
        for i, name in enumerate(self._names):
            if name not in self._kwargs or all(
                row is None or row.values[i] == _NOT_LOGGED for row in rows
            ):
                continue
            kwargs = {key: value for key, value in self._kwargs[name].items() if key != "sync_dist"}
            column = torch.tensor(
                [row.values[i] for row in counted if row.values[i] != _NOT_LOGGED],
                dtype=torch.float64,
            )
            skipped = int((~is_finite(column)).sum())
            if skipped:
                self.skipped[name] = self.skipped.get(name, 0) + skipped
            value = (
                over_finite(column, _reduction(kwargs))
                if skipped < len(column)
                else torch.tensor(torch.nan)
            )
            precision = torch.float64 if name in self._float64 else torch.float32
            size = sum(row.sizes[i] for row in counted) or 1
            calls.append(Call(name, value.to(precision), {**kwargs, "batch_size": size}))
        return calls

    def _note_kwargs(self, call: Call) -> None:
        """How a value is logged here. Lightning wants it to be logged in one way, so a way that was
        learned from others stays.

        Raises:
            RefusedError: if nobody should log this: the others would take it for silence.
        """
        if call.name not in self._kwargs:
            check_logged(call.name, _plain(call.kwargs))
        if call.name not in self._learned:
            self._kwargs[call.name] = call.kwargs

    def state(self) -> dict[str, dict[str, Any]]:
        """The names that all ranks know, and how they are logged."""
        return {name: self._described(name) for name in self._names if name in self._kwargs}

    def load(self, state: dict[str, dict[str, Any]]) -> None:
        """Restores what `state` gave, on every rank or on one that comes late."""
        self._names, self._kwargs, self._float64, self._learned = sorted(state), {}, set(), set()
        for name, described in state.items():
            self._take(name, described)

    def _described(self, name: str) -> dict[str, Any]:
        return {
            **_plain(self._kwargs[name]),
            **({"float64": True} if name in self._float64 else {}),
        }

    def _take(self, name: str, described: dict[str, Any]) -> None:
        """Logs a name as somebody else does."""
        self._kwargs[name] = {key: value for key, value in described.items() if key != "float64"}
        if described.get("float64"):
            self._float64.add(name)

    def _messages(
        self, logs: Sequence[WorkerLog], spoken: Sequence[dict[str, float]], device: torch.device
    ) -> tuple[list[list[Tensor]], list[Field]]:
        """What the local workers say, and its layout."""
        known = {name for said in spoken for name in said} <= set(self._names)
        messages = []
        for log, values in zip(logs, spoken, strict=True):
            loss = torch.nan if log.loss is None else float(log.loss.double())
            own = [values.get(name, _NOT_LOGGED) for name in self._names]
            sizes = [float(log.sizes.get(name, log.samples)) for name in self._names]
            row = [float(known), float(log.samples), loss, *own, *sizes]
            messages.append([torch.tensor(row, dtype=torch.float64, device=device)])
        return messages, [Field((3 + 2 * len(self._names),), torch.float64)]

    def _read(
        self, heard: Sequence[tuple[Tensor, ...] | None], silenced: Collection[int]
    ) -> list[StepRow | None]:
        """All n workers' rows; None for one that was not heard, or makes no sense."""
        return [
            None
            if message is None or worker in silenced
            else self.refusals.read(worker, step_row, message[0].tolist())
            for worker, message in enumerate(heard)
        ]

    def _learn(
        self,
        local: Collection[str],
        news: Sequence[int],
        transport: Transport,
        device: torch.device,
    ) -> None:
        """All ranks learn all names, and how most log them. ``news``: the workers that say that
        they have new ones.
        """
        described = {
            name: self._described(name)
            for name in sorted({*local, *self._names} & self._kwargs.keys())
        }
        everybody = self._texts(json.dumps(described).encode(), transport, device)
        ways = dict[str, Counter[str]]()
        for worker, said in enumerate(everybody):
            new = [] if said is None else [name for name in said if name not in self._names]
            if worker in news and not new:
                self.refusals.note(worker, "It claims to log something new, and does not say what.")
            for name in new:
                if name in ways or len(self._names) + len(ways) < _MOST_NAMES:
                    ways.setdefault(name, Counter())[
                        json.dumps((said or {})[name], sort_keys=True)
                    ] += 1
                else:
                    self.refusals.note(
                        worker,
                        f"At most {_MOST_NAMES} names are logged. Found more, such as "
                        f"{name[:80]!r}.",
                    )
        self._names = sorted([*self._names, *ways])
        for name, counts in ways.items():
            if name not in self._kwargs:
                self._take(name, json.loads(counts.most_common(1)[0][0]))
                self._learned.add(name)

    def _texts(
        self, text: bytes, transport: Transport, device: torch.device
    ) -> list[dict[str, dict[str, Any]] | None]:
        """What all n workers say of their names; None for one that was not heard, or makes no
        sense.
        """
        copies = transport.workers_per_process
        size = torch.tensor([len(text)], dtype=torch.int64, device=device)
        heard = transport.gather([[size]] * copies, [Field((1,), torch.int64)])
        sizes = [
            0 if length is None else min(max(int(length[0]), 0), _LONGEST_TEXT) for length in heard
        ]
        longest = max(sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=device)
        padded[: len(text)] = torch.frombuffer(bytearray(text[:longest]), dtype=torch.uint8).to(
            device
        )
        received = transport.gather([[padded]] * copies, [Field((longest,), torch.uint8)])
        return [
            None
            if data is None
            else self.refusals.read(worker, logged_names, bytes(data[0][:length].cpu().tolist()))
            for worker, (length, data) in enumerate(zip(sizes, received, strict=True))
        ]


_LONGEST_TEXT = 1 << 20
"""Bytes of names that are read from one worker."""

_MOST_NAMES = 10_000
"""Names that a run logs in training steps, at most."""


def _reduction(kwargs: dict[str, Any]) -> Reduction:
    """How a ``self.log`` call wants its values reduced. Lightning refuses functions that
    `reduction` does not know, once it is told to log.
    """
    return reduction(kwargs.get("reduce_fx", "mean")) or REDUCTIONS["mean"]


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a ``self.log`` call that others need to log the same, as JSON can carry
    them.
    """
    flags = {
        key: None if value is None else bool(value) for key, value in kwargs.items() if key in FLAGS
    }
    attribute = {
        key: value
        for key, value in kwargs.items()
        if key == "metric_attribute" and isinstance(value, str)
    }
    return {**flags, **attribute, "reduce_fx": _reduction(kwargs).name}
