"""All workers of a process in one pass, where that gives what one after the other gives."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_byz.strategies import random_states
from lightning_byz.strategies.gradient_sync import GradientGroup
from lightning_byz.strategies.module_attributes import ChangesByHand, put_back
from lightning_byz.strategies.overlap import is_lightnings
from lightning_byz.strategies.private_names import forward_hooks, has_hooks
from lightning_byz.strategies.stacked_pass import NotStackableError, Stacked, StackedPass, stack
from lightning_byz.strategies.step_logs import WorkerLog
from lightning_byz.strategies.validate import UnsupportedSetupError
from lightning_byz.strategies.workers import LocalWorkers, WorkersInTurn
from lightning_byz.strategies.workers_apart import OneWorkerApart, WorkersApartInTurn

log = logging.getLogger("lightning_byz")

Vectorize = Literal["auto"] | bool

LARGEST = 1_000_000
"""Numbers of a gradient up to which "auto" computes workers at once on a CPU: above, a pass is
bound by memory and arithmetic, of which one pass for all saves none.
"""

LARGEST_ON_ACCELERATOR = 4_000_000
"""The same on an accelerator."""

CACHED = 2**23
"""Numbers that the workers computed at a time on a CPU save for their backward passes, about: more
do not fit into its caches.
"""

FEWEST = 3
"""Workers that are worth a pass on a CPU."""

_ROOM = 2**28
"""Numbers of which the gradients of all workers that are computed at a time have at most."""

_CLOSE = 1e-5
"""How far a gradient of one pass may lie from the loop's, for its length."""

_Pattern = tuple[tuple[int, bool], ...]
"""By parameter, its number in the module, and whether some worker's gradient is not 0."""


class _Step(NamedTuple):
    """The workers that take part, their batches, and the training step's further arguments."""

    here: list[int]
    parts: list[Any]
    rest: Sequence[Any]
    kwargs: Mapping[str, Any]


class _Done(NamedTuple):
    """What one pass gave for the workers that took part."""

    here: list[int]
    stacked: Stacked
    pattern: _Pattern


def local_workers(strategy: Any, training_step: Callable[..., Any]) -> LocalWorkers:
    """The workers of this process, computed as the strategy's arguments say."""
    if strategy.local_steps is not None:
        apart = OneWorkerApart if strategy.workers_per_process == 1 else WorkersApartInTurn
        return apart(strategy, training_step)
    if strategy.workers_per_process == 1:
        worker: LocalWorkers = strategy.processes.one_worker(strategy, training_step)
        return worker
    if strategy.vectorize is False:
        return WorkersInTurn(strategy, training_step)
    return WorkersAtOnce(strategy, training_step, strategy.vectorize)


_PATTERNS = 32
"""Sets of parameters without a gradient, of which each costs a step in turn; where there are more,
workers are computed one after the other.
"""


class WorkersAtOnce(WorkersInTurn):
    """Several workers of one process, in one pass (`torch.func.vmap`).

    The first step is computed one worker after the other. In "auto" its gradients are then compared
    with those of one pass over the same batches. If they agree, later steps take one pass; else one
    line in the log says why not. The decision goes into checkpoints, and depends on no timing.

    A step in which the workers' batches differ in size is computed one after the other. So is one
    whose gradients are exactly 0 for other parameters than before: whether a loss uses these, one
    pass does not tell.

    Args:
        strategy: as in `LocalWorkers`.
        training_step: as in `LocalWorkers`.
        vectorize: "auto", or True: an error where it cannot be; random operations then draw from
            one stream for all workers, and so differ from those of the workers one after the other.

    Attributes:
        decided: whether workers are computed at once; None: that is open yet.
    """

    def __init__(
        self, strategy: Any, training_step: Callable[..., Any], vectorize: Vectorize
    ) -> None:
        super().__init__(strategy, training_step)
        self._vectorize = vectorize
        self.decided: bool | None = None
        self._hooks: int | None = None  # on the module's parts, when it was decided
        self._pass = StackedPass(strategy.lightning_module, self.buffers, training_step)
        self._by_hand: list[str] = []
        self._first: list[WorkerLog] = []  # of those that took part in the first step
        self._done: _Done | None = None
        # what a step that is computed one after the other is to tell: everything, or which
        # parameters are used where a pass has this pattern
        self._in_turn: _Step | _Pattern | None = None
        self._used: dict[_Pattern, list[Tensor]] = {}
        # numbers that a worker's forward pass saves for its backward pass
        self._saved: int | None = None

    # -- whether -----------------------------------------------------------------------------------

    def _obstacle(self, groups: Sequence[GradientGroup]) -> str | None:
        """Why workers cannot be computed at once, as far as it is known beforehand; None: they may
        be.
        """
        strategy = self.strategy
        module, plugin = strategy.lightning_module, strategy.precision_plugin
        if getattr(plugin, "scaler", None) is not None:
            return "a loss scaler scales each worker's loss before its backward pass"
        if "mixed" in str(plugin.precision):
            return "mixed precision rounds differently in one pass"
        if not is_lightnings(module.backward):
            return f"{type(module).__name__} has a `backward` of its own"
        if self._by_hand:
            return f"training_step changes {self._by_hand[0]} by hand"
        if self.attributes.any():
            return "training_step assigns attributes of the module"
        if any(has_hooks(p) for group in groups if group.layout for p in group.layout.parameters):
            return "a parameter has hooks, which one pass does not call"
        size = sum(group.layout.dim for group in groups if group.layout is not None)
        on_cpu = strategy.root_device.type == "cpu"
        largest = LARGEST if on_cpu else LARGEST_ON_ACCELERATOR
        if self._vectorize == "auto" and size > largest:
            return f"gradients of {size:,} numbers, more than {largest:,}, gain nothing"
        fit = CACHED // self._saved if on_cpu and self._saved else self.count
        if self._vectorize == "auto" and fit < min(FEWEST, self.count):
            return f"{fit} of them fill the processor's caches, so that there is nothing to gain"
        return None

    def _at_a_time(self, size: int) -> int:
        """Workers that are computed at a time, by the numbers of a gradient."""
        most = _ROOM // max(1, size)
        if self.strategy.root_device.type == "cpu" and self._saved:
            most = min(most, CACHED // self._saved)
        return max(1, most)

    def _name_changes_by_hand(self, changes: ChangesByHand | None) -> list[str]:
        found = super()._name_changes_by_hand(changes)
        self._by_hand = self._by_hand or found
        return found

    def _decide(self, reason: str | None) -> None:
        self.decided = reason is None
        if not self.decided:
            self._used.clear()
        if reason is None:
            more = (
                " Random operations, such as dropout, draw from one stream for all of them."
                if self._vectorize is True
                else ""
            )
            log.info(f"byzantine_robust: in-process workers are computed in one pass.{more}")
        elif self._vectorize == "auto":
            log.info(
                f"byzantine_robust: in-process workers are computed one after the other: {reason}."
            )
        else:
            raise UnsupportedSetupError(
                "vectorize=True computes all in-process workers in one pass. Found that it cannot: "
                f'{reason}. Use vectorize="auto", or False.'
            )

    # -- forward -----------------------------------------------------------------------------------

    def _forward(
        self, parts: Sequence[Any], rest: Sequence[Any], kwargs: Any
    ) -> tuple[list[Any], list[WorkerLog]]:
        self._done, self._in_turn = None, None
        here = [i for i, part in enumerate(parts) if part is not None]
        hooks = forward_hooks(self.strategy.lightning_module)
        if self._hooks not in (None, hooks) and self.decided:
            self.decided = None  # new ones may keep tensors, as those of pruning do
        self._hooks = hooks
        if self.decided is False or not here:
            return super()._forward(parts, rest, kwargs)
        step = _Step(here, [parts[i] for i in here], rest, kwargs)
        if self.decided is None:
            self._in_turn = step
            with _counting() as numbers:
                outputs_and_logs = super()._forward(parts, rest, kwargs)
            self._saved = sum(numbers.values()) // len(here)
            self._first = [outputs_and_logs[1][i] for i in here]
            return outputs_and_logs
        try:
            stack(step.parts)
        except NotStackableError:  # batches of unlike sizes, in this step
            return super()._forward(parts, rest, kwargs)
        before = self.buffers.copies()
        try:
            done = self._in_one_pass(step)
        except Exception as error:
            put_back(self.strategy.lightning_module)
            self._decide(_said(error))
            return super()._forward(parts, rest, kwargs)
        if done.pattern not in self._used:
            self.buffers.put(before)
            if self._vectorize == "auto" and len(self._used) >= _PATTERNS:
                self._decide("losses use other parameters in every step")
            else:
                self._in_turn = done.pattern
            return super()._forward(parts, rest, kwargs)
        self._done = done
        size = self.batches.size(step.parts[0])  # they have one form
        logs = [WorkerLog(samples=0 if part is None else size) for part in parts]
        outputs: list[Any] = [None] * self.count
        self._losses = [None] * self.count
        losses = done.stacked.losses.detach().unbind(0)
        for place, i in enumerate(here):
            outputs[i] = done.stacked.outputs[place]
            logs[i].loss = self._losses[i] = losses[place]
            done.stacked.replay(place, logs[i].note)
        return outputs, logs

    def _in_one_pass(self, step: _Step) -> _Done:
        strategy = self.strategy
        parameters = [
            p for group in strategy.groups if group.layout for p in group.layout.parameters
        ]
        chunk = self._at_a_time(sum(p.numel() for p in parameters))
        with (
            strategy.sync.training_step(),
            self.attributes.none_assigned(),
            random_states.worker_rng(strategy.root_device, *self._key(0)),
        ):
            stacked = self._pass(
                parameters,
                *step,
                randomness="different" if self._vectorize is True else "error",
                chunk=chunk if chunk < len(step.here) else None,
            )
        places = {id(p): i for i, p in enumerate(strategy.lightning_module.parameters())}
        some = torch.stack([_any(gradient) for gradient in stacked.gradients]).tolist()
        pattern = tuple(
            (places[id(p)], bool(any_)) for p, any_ in zip(parameters, some, strict=True)
        )
        return _Done(step.here, stacked, pattern)

    # -- backward ----------------------------------------------------------------------------------

    def _add_gradients(
        self,
        groups: Sequence[GradientGroup],
        factor: Tensor,
        backward: Callable[[Tensor], None],
    ) -> None:
        done, in_turn = self._done, self._in_turn
        if done is None:
            super()._add_gradients(groups, factor, backward)
            if isinstance(in_turn, _Step):
                self._try(groups, factor, in_turn)
            elif in_turn is not None:
                self._note_used(groups, in_turn)
            return
        left, used = iter(done.stacked.gradients), iter(self._used[done.pattern])
        for group in groups:
            assert group.layout is not None
            gradients, mine = _flat(left, group.layout.parameters), next(used)
            if len(done.here) == self.count and all(row is None for row in group.rows):
                rows = group.layout.rows(self.count)
                torch.cat(gradients, 1, out=rows)
                group.rows = [*(rows if factor == 1 else rows.mul_(factor)).unbind(0)]
                group.used = [mine] * self.count
                continue
            for place, i in enumerate(done.here):
                self._add_up(i, group, mine, partial(_row, gradients, place, factor))
        self._done = None

    def _try(self, groups: Sequence[GradientGroup], factor: Tensor, step: _Step) -> None:
        """Decides, by one pass over the batches of the first step, whose gradients are in the
        rows.
        """
        reason, looped = self._obstacle(groups), self.buffers.copies()
        if reason is None:
            self.buffers.restart()
            try:
                done = self._in_one_pass(step)
            except Exception as error:
                reason = _said(error)
            else:
                reason = self._difference(groups, factor, done, looped)
            finally:
                self.buffers.put(looped)
                kept = put_back(self.strategy.lightning_module)
            if kept and reason is None:
                reason = f"tensors are kept in {', '.join(kept[:3])}"
        self._decide(reason)
        if reason is None:
            self._note_used(groups, done.pattern)

    def _difference(
        self,
        groups: Sequence[GradientGroup],
        factor: Tensor,
        done: _Done,
        looped: Sequence[Sequence[Tensor]],
    ) -> str | None:
        """What tells a pass from the workers one after the other; None: nothing."""
        logged = map(done.stacked.logged, range(len(done.here)))
        said = zip(self._first, done.stacked.losses, logged, strict=True)
        if self._vectorize == "auto" and not all(itertools.starmap(_said_the_same, said)):
            return "losses or logged values would be others"
        left, first = iter(done.stacked.gradients), done.here[0]
        for group in groups:
            assert group.layout is not None
            gradients = _flat(left, group.layout.parameters)
            flags = group.used[first]
            for place, i in enumerate(done.here):
                row, mine = group.rows[i], group.used[i]
                if row is None or mine is None or flags is None or not torch.equal(mine, flags):
                    return "workers use different parameters"
                if self._vectorize is True:
                    continue  # random operations may draw otherwise
                error = torch.linalg.vector_norm(_row(gradients, place, factor) - row)
                if not bool(error <= _CLOSE * torch.linalg.vector_norm(row)):
                    return "its gradients would be others"
        buffers = itertools.chain(*self.buffers.copies())
        if self._vectorize == "auto" and not all(map(_close, buffers, itertools.chain(*looped))):
            return "buffers would become others"
        return None

    def _note_used(self, groups: Sequence[GradientGroup], pattern: _Pattern) -> None:
        """The parameters that the losses of this step use, which the rows tell."""
        flags = [next((used for used in group.used if used is not None), None) for group in groups]
        if all(used is not None for used in flags):
            self._used[pattern] = [used for used in flags if used is not None]

    # -- checkpoint --------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        used = [
            {"pattern": [list(part) for part in pattern], "used": [f.tolist() for f in flags]}
            for pattern, flags in self._used.items()
        ]
        at_once = {"decided": self.decided, "used": used, "saved": self._saved}
        return {**super().state(), "at_once": at_once}

    def load(self, saved: Mapping[str, Any]) -> None:
        super().load(saved)
        at_once = saved.get("at_once", {"decided": False, "used": []})
        self.decided, self._saved = at_once["decided"], at_once.get("saved")
        if self._vectorize is True and not self.decided:
            self.decided = None  # a run in turn, which is to go on at once
        for entry in at_once["used"] if self.decided else ():
            pattern = tuple((int(i), bool(some)) for i, some in entry["pattern"])
            self._used[pattern] = [torch.tensor(flags) for flags in entry["used"]]


@contextmanager
def _counting() -> Iterator[dict[int, int]]:
    """Notes, by where it lies in memory, the size of all that is saved for backward passes inside,
    but for parameters.
    """
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        plain = tensor.layout == torch.strided and not tensor.is_nested  # else it has no one place
        if plain and not (tensor.is_leaf and tensor.requires_grad):
            found[tensor.data_ptr()] = tensor.numel()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


def _any(gradient: Tensor) -> Tensor:
    """Whether some number is not 0, nan included: a 0-d bool tensor. Faster than ``any``, which
    writes a mask.
    """
    if gradient.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=gradient.device)
    low, high = torch.aminmax(gradient)
    return (low != 0) | (high != 0)


def _flat(stacked: Iterator[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The next gradients, by parameter, as ``[m, numel]``; a parameter may be 0-d, or empty."""
    return [
        gradient.detach().reshape(len(gradient), p.numel())
        for p, gradient in zip(parameters, stacked, strict=False)
    ]


def _row(
    gradients: Sequence[Tensor], place: int, factor: Tensor, out: Tensor | None = None
) -> Tensor:
    """One worker's gradient ``[d]``, times a factor.

    Args:
        gradients: by parameter, ``[m, numel]``.
        place: which of the m.
        factor: 0-d.
        out: where to; None: into a new one.
    """
    row = torch.cat([gradient[place] for gradient in gradients], out=out)
    return row.mul_(factor)


def _said_the_same(first: WorkerLog, loss: Tensor, logged: Mapping[str, Any]) -> bool:
    """Whether a worker has this loss, and logged these values, in the step that was computed in
    turn.
    """
    values = {call.name: call.value for call in first.calls}
    pairs = [(first.loss, loss), *((values.get(name), value) for name, value in logged.items())]
    return all(
        a is b
        or (
            a is not None
            and b is not None
            and _close(torch.as_tensor(a).detach(), torch.as_tensor(b).detach())
        )
        for a, b in pairs
    )


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=_CLOSE, atol=_CLOSE, equal_nan=True)


def _said(error: Exception) -> str:
    """The first line of an error, in a sentence about the training step."""
    first = str(error).strip().partition("\n")[0].rstrip(".")
    kind = "" if isinstance(error, NotStackableError) else f"{type(error).__name__}: "
    return f"{kind}{first}"
