"""Where gradients are exchanged: at the end of a backward pass, as under DDP, or at the step of
their optimizer.

Parameters belong to groups: those of one optimizer, and those that are in none. A backward pass is
about the groups that have a parameter that requires a gradient. Where it ends, their gradients are
exchanged, so that ``p.grad`` is the aggregate for every hook, clipping and optimizer step that
follows. Three things put that off:

* inside `Strategy.block_backward_sync` gradients add up locally, as micro-batches do;
* if a backward pass is about several optimizers and the method remembers earlier gradients, each
  group waits for its own optimizer's step, or `clip_gradients`: the other optimizer's loss is not
  to enter its memory;
* ``loss.backward()`` by hand is seen by hooks on the parameters, and exchanged at the next step of
  an optimizer.
"""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lightning_byz.engine.exchange import Exchange
from lightning_byz.strategies.flat_parameters import FlatParameters
from lightning_byz.strategies.overlap import Overlap
from lightning_byz.strategies.sync import Sync

log = logging.getLogger("lightning_byz")

_TOGGLE = (
    "with self.toggled_optimizer(optimizer): ... around its forward and backward passes and its "
    "step"
)


class GradientGroup:
    """The parameters of one optimizer, or those that no optimizer has, and what is in their
    ``p.grad``.

    Args:
        name: for messages.
        parameters: gives them, as they are now.
        exchange: of their gradients.
        of_optimizer: whether an optimizer has them.
        flat: makes the layout of some of them.

    Attributes:
        layout: the parameters that the group's last backward pass was about.
        pending: a backward pass has left gradients of this process's own, which are not exchanged
            yet.
        local: ids of the parameters whose ``p.grad`` is this process's own.
        rows: by local worker, its gradients since the last exchange, in a process of several
            workers.
        used: by local worker, ``[P]`` the parameters that have one.
        poisoned: the last exchange gave no aggregate, and an inf in its place.
    """

    def __init__(
        self,
        name: str,
        parameters: Callable[[], Iterable[Tensor]],
        exchange: Exchange,
        of_optimizer: bool = True,
        flat: Callable[[Sequence[Tensor]], FlatParameters] = FlatParameters,
    ) -> None:
        self.name, self.parameters, self.exchange, self.of_optimizer = (
            name,
            parameters,
            exchange,
            of_optimizer,
        )
        self.fresh_starts, self._flat = 0, flat
        self._algorithm = exchange.algorithm  # which does not know the parameters' sizes yet
        self.forget()

    def forget(self) -> None:
        """Back to before the first backward pass."""
        self.pending, self.poisoned = False, False
        self.local: set[int] = set()
        self.rows: list[Tensor | None] = [None] * self.exchange.transport.workers_per_process
        self.used: list[Tensor | None] = [None] * len(self.rows)
        self.layout: FlatParameters | None = None
        self.overlap: Overlap | None = None
        self._aside: dict[int, Tensor] = {}
        self._norms: dict[int, Tensor] = {}
        self._versions: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._fresh = False
        self._seen: dict[int, weakref.ref[Tensor]] = {}

    def over(self, parameters: Sequence[Tensor]) -> FlatParameters:
        """The layout of these parameters, which the coming exchange is about."""
        before = self.layout
        if before is not None and [*map(id, before.parameters)] == [*map(id, parameters)]:
            return before
        if before is not None:
            self.fresh_starts += 1
            if self.fresh_starts == 1:
                log.warning(
                    "The set of trained parameters has changed: the algorithm's state (momenta, "
                    "EF21 estimates) starts afresh. Each time that it does is counted, and said "
                    "at the end."
                )
            self.exchange.dim = None
        self.layout, self.overlap = self._flat(parameters), None
        self.clear_rows()
        self.exchange.algorithm = self._algorithm.for_sizes(self.layout.sizes)
        return self.layout

    def clear_rows(self) -> None:
        """Forgets the gradients of a process of several workers."""
        self.rows, self.used = [None] * len(self.rows), [None] * len(self.rows)

    def present(self) -> FlatParameters:
        """The layout of the last backward pass, or what that of the next one will be."""
        return self.layout or self._flat([p for p in self.parameters() if p.requires_grad])

    def example(self) -> Tensor:
        """A vector of the size, dtype and device of a gradient, whose numbers are not stored."""
        return self.present().blank()

    def parameters_now(self) -> Tensor:
        """The parameters' values ``[d]``."""
        return self.present().read_parameters()

    # -- aggregates, and gradients of this process's own -------------------------------------------

    def _members(self) -> Sequence[Tensor]:
        assert self.layout is not None
        return self.layout.parameters

    def holds_aggregate(self) -> bool:
        """Whether some ``p.grad`` is an aggregate, or whatever else is not this process's own
        gradient, and not 0.
        """
        self.local.intersection_update(id(p) for p in self._members() if p.grad is not None)
        return any(
            p.grad is not None and id(p) not in self.local and bool(p.grad.any())
            for p in self._members()
        )

    def set_aside(self) -> None:
        """Takes aggregates out of ``p.grad``, so that the coming exchange is about this process's
        own gradients alone.
        """
        for p in self._members():
            if p.grad is None:
                self.local.discard(id(p))
                self._aside.pop(id(p), None)  # it has been zeroed
            elif id(p) not in self.local:
                self._aside[id(p)], p.grad = p.grad, None

    def put_back(self) -> None:
        """Adds what was set aside, into the tensor that it lay in."""
        for p in self._members():
            before = self._aside.get(id(p))
            if before is None or id(p) in self.local:
                continue
            if p.grad is not None:
                with torch.no_grad():
                    before.add_(p.grad)
            p.grad = before
            del self._aside[id(p)]

    def exchanged(self) -> None:
        """The exchange is done: what is in ``p.grad`` is the aggregate."""
        self.local.clear()
        self._norms.clear()
        self._versions.clear()
        self.pending, self._fresh = False, True
        self.put_back()

    def stepped(self) -> None:
        """An optimizer has used what is in ``p.grad``: other tensors that are there later on are no
        aggregates.
        """
        self._fresh = False
        self._seen = {id(p): weakref.ref(p.grad) for p in self.parameters() if p.grad is not None}

    def set_by_hand(self) -> bool:
        """Whether somebody has put gradients into ``p.grad`` himself, after the last step: those of
        torch.autograd.grad, say.
        """
        if self._fresh or self.pending:
            return False
        here = [p for p in self.parameters() if p.grad is not None]
        return any(id(p) not in self._seen or self._seen[id(p)]() is not p.grad for p in here)

    # -- what nobody may do in between -------------------------------------------------------------

    def note(self, p: Tensor) -> None:
        """Remembers a parameter's value: it should not change while its gradient is this process's
        own.
        """
        self._norms[id(p)] = torch.linalg.vector_norm(p.detach(), dtype=torch.float64)

    def note_gradients(self) -> None:
        """Remembers the gradients of this process's own: nobody should edit them before they are
        exchanged.
        """
        here = [p for p in self._members() if id(p) in self.local]
        self._versions = {
            id(p): (weakref.ref(p.grad), p.grad._version) for p in here if p.grad is not None
        }

    def check_parameters(self) -> None:
        """Raises if parameters have moved although their gradients were never exchanged."""
        if not self.pending:
            return
        for p in self._members():
            if p.grad is None or id(p) not in self._norms:
                continue
            if not torch.equal(
                torch.linalg.vector_norm(p.detach(), dtype=torch.float64), self._norms[id(p)]
            ):
                raise RuntimeError(
                    f"Parameters of {self.name} have changed while their gradients were those of "
                    "this process alone, so that every process has a model of its own now. "
                    "Gradients are exchanged at the end of self.manual_backward(loss), and at a "
                    "step of an optimizer. Call self.manual_backward(loss) instead of "
                    "loss.backward(), outside of toggle_model(sync_grad=False), before you "
                    "change parameters by hand."
                )

    def check_gradients(self) -> None:
        """Raises if somebody has edited gradients that wait for their optimizer's step."""
        for p in self._members() if self._versions else ():
            grad, version = self._versions.get(id(p), (None, 0))
            if grad is None or p.grad is None or (grad() is p.grad and p.grad._version == version):
                continue
            if not bool(p.grad.any()):  # it has been zeroed
                self.local.discard(id(p))
                self._aside.pop(id(p), None)
                continue
            if len(self.rows) > 1:
                raise RuntimeError(
                    "Gradients have been edited between micro-batches. In-process workers keep "
                    "their own ones until the exchange, and p.grad shows their mean, so that the "
                    "edit would be lost. Edit gradients after the last micro-batch, in "
                    "on_before_optimizer_step, or use accumulate_grad_batches=1."
                )
            raise RuntimeError(
                f"Gradients of {self.name} have been edited before they were exchanged. A "
                "backward pass that reaches the parameters of several optimizers leaves each "
                "one's gradients to its own optimizer.step() or self.clip_gradients(optimizer), "
                f"because {type(self.exchange.algorithm).__name__} remembers earlier ones. Train "
                f"one optimizer at a time: {_TOGGLE}; then gradients are exchanged where "
                "manual_backward ends."
            )


class GradientSync(Sync):
    """Decides when the gradients of which groups are exchanged, and sees every way in which they
    get into ``p.grad``.

    Args:
        groups: one for each optimizer, and one for parameters that are in none, if there are any.
        exchange: from a group's local gradients to the aggregate in ``p.grad``.
        manual: whether the module optimizes by hand.
        overlap: whether messages may leave during backward.
        precision: the precision plugin, whose ``clip_gradients`` is to act on aggregates.
    """

    def __init__(
        self,
        groups: Sequence[GradientGroup],
        exchange: Callable[[GradientGroup], None],
        manual: bool,
        overlap: bool,
        precision: Any,
    ) -> None:
        self.groups, self._exchange, self.manual, self._may_overlap = (
            list(groups),
            exchange,
            manual,
            overlap,
        )
        self.blocked = False
        self._alone = all(group.exchange.transport.workers_per_process == 1 for group in groups)
        self._in_backward = False
        self._stepping = False  # inside of Strategy.optimizer_step
        self._ignores_steps = False
        self._overlapped: GradientGroup | None = None
        # by id of a parameter: its group now, and where in its layout
        self._places: dict[int, tuple[GradientGroup, int]] = {}
        # by id of a parameter: what accumulates its gradient, and our hook on it
        self._nodes: dict[int, tuple[Any, Any]] = {}
        self._of_optimizer: weakref.WeakKeyDictionary[
            Optimizer, tuple[int, list[GradientGroup]]
        ] = weakref.WeakKeyDictionary()
        self._hooks = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        self._precision, self._clip = precision, precision.clip_gradients
        vars(precision)["clip_gradients"] = self._clip_gradients

    def remove(self) -> None:
        """Takes all hooks off."""
        for hook in (*self._hooks, *(hook for _, hook in self._nodes.values())):
            hook.remove()
        self._hooks, self._nodes = [], {}
        vars(self._precision).pop("clip_gradients", None)
        fresh_starts = sum(group.fresh_starts for group in self.groups)
        if fresh_starts > 1:
            log.warning(
                f"The algorithm's state has started afresh {fresh_starts} times: so often the "
                "trained parameters changed."
            )

    def forget(self) -> None:
        """Back to before the first backward pass."""
        for group in self.groups:
            group.forget()

    @contextmanager
    def blocking(self) -> Iterator[None]:
        """Inside, gradients add up locally."""
        before, self.blocked = self.blocked, True
        try:
            yield
        finally:
            self.blocked = before

    def begin_training_step(self) -> None:
        """A training step begins: parameters should have moved by aggregates only."""
        for group in self.groups if self.manual else ():
            group.check_parameters()
        self.about()

    # -- a backward pass ---------------------------------------------------------------------------

    def about(self) -> list[GradientGroup]:
        """The groups that a backward pass is about now, each with its layout.

        A parameter of several optimizers counts for the one of which the fewest parameters are
        frozen, so that it goes with the optimizer that is toggled.
        """
        members = [(group, list(group.parameters())) for group in self.groups]
        members.sort(key=lambda pair: sum(not p.requires_grad for p in pair[1]))
        places: dict[int, tuple[GradientGroup, int]] = {}
        found = []
        for group, parameters in members:
            mine = [p for p in parameters if p.requires_grad and id(p) not in places]
            if mine:
                group.over(mine)
                places.update((id(p), (group, i)) for i, p in enumerate(mine))
                found.append(group)
        if self._alone and places.keys() != self._places.keys():
            self._watch(found)
        self._places = places
        return sorted(found, key=self.groups.index)

    def _watch(self, groups: Sequence[GradientGroup]) -> None:
        """Puts hooks where gradients are accumulated: there they run after every hook on the
        parameter itself.
        """
        for layout in (group.layout for group in groups if group.layout is not None):
            for p in layout.parameters:
                if id(p) not in self._nodes:
                    self._nodes[id(p)] = layout.watch(p, partial(self._arrived, p))

    def _arrived(self, p: Tensor) -> None:
        """A gradient has been accumulated."""
        place = self._places.get(id(p))
        if place is None or p.grad is None:
            return
        group, i = place
        group.local.add(id(p))
        if group is self._overlapped:
            assert group.overlap is not None
            group.overlap.arrived(i, p)
        elif not self._in_backward and (self.manual or not group.of_optimizer):
            # loss.backward() by hand
            if self.manual:
                group.note(p)
            for each in self.groups:
                each.pending |= each.layout is not None and any(
                    q.requires_grad for q in each.layout.parameters
                )

    @contextmanager
    def backward(self, overlap: bool) -> Iterator[list[GradientGroup]]:
        """A backward pass; where it ends the gradients are exchanged, unless that is put off.

        Args:
            overlap: whether this process's message may leave while the pass is running.

        Yields:
            the groups that it is about.
        """
        groups = self.about()
        at_once = [] if self.blocked else self._at_once(groups)
        for group in groups:
            group.check_gradients()
            if self.blocked and group.holds_aggregate():
                raise RuntimeError(
                    "A backward pass inside toggle_model(sync_grad=False) should start from "
                    "zeroed gradients, or add to such a pass's. Found the aggregate of an "
                    f"earlier exchange in the gradients of {group.name}. Call "
                    "optimizer.zero_grad() first."
                )
            if not self.blocked:
                group.set_aside()
            group.pending = True
        with self._running(at_once, overlap):
            yield groups
        for group in groups:
            if group in at_once:
                self._exchange(group)
                group.exchanged()
                continue
            for p in group._members() if self.manual else ():
                if id(p) in group.local:
                    group.note(p)
            if not self.blocked:
                group.put_back()
            if not (self.blocked and self._alone):
                group.note_gradients()

    def _at_once(self, groups: Sequence[GradientGroup]) -> list[GradientGroup]:
        """The groups whose gradients are exchanged where this backward pass ends."""
        several = self.manual and sum(group.of_optimizer for group in groups) > 1
        return [
            g
            for g in groups
            if not (several and g.of_optimizer and not g.exchange.algorithm.stateless)
        ]

    @contextmanager
    def _running(self, at_once: Sequence[GradientGroup], overlap: bool) -> Iterator[None]:
        during: AbstractContextManager[None] = nullcontext()
        if overlap and self._may_overlap and len(at_once) == 1:
            (group,) = at_once
            if group.overlap is None and group.exchange.transport.in_shards:
                assert group.layout is not None
                group.overlap = Overlap(group.layout, group.exchange)
            if group.overlap is not None:
                self._overlapped, during = group, group.overlap.during_backward()
        self._in_backward = True
        try:
            with during:
                yield
        finally:
            self._in_backward, self._overlapped = False, None

    def _clip_gradients(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Stands in for the precision plugin's: here a group that waits for its step is
        exchanged.
        """
        self.settle(optimizer)
        self._clip(optimizer, *args, **kwargs)

    # -- an optimizer's step -----------------------------------------------------------------------

    def of(self, optimizer: Optimizer) -> list[GradientGroup]:
        """The groups that have parameters of this optimizer."""
        if self._ignores_steps:
            return []
        count = sum(len(part["params"]) for part in optimizer.param_groups)
        known, groups = self._of_optimizer.get(optimizer, (-1, []))
        if known != count:
            mine = {id(p) for part in optimizer.param_groups for p in part["params"]}
            groups = [
                group for group in self.groups if any(id(p) in mine for p in group.parameters())
            ]
            self._of_optimizer[optimizer] = (count, groups)
        return groups

    def settle(self, optimizer: Optimizer) -> None:
        """Exchanges what is still this process's own among the gradients of an optimizer; leaves
        aggregates alone.
        """
        for group in self.of(optimizer):
            if not group.pending and not (self.manual and group.set_by_hand()):
                continue
            if not self._alone and self.in_training_step:
                raise RuntimeError(
                    "In-process workers share one model, so that no optimizer may step inside "
                    f"training_step. Found a step of {type(optimizer).__name__}. Return the loss "
                    "and let Lightning step, or use one worker per process."
                )
            if group.layout is None or not group.pending:
                group.over([p for p in group.parameters() if p.requires_grad])
                group.local = {id(p) for p in group._members() if p.grad is not None}
            group.check_gradients()
            group.set_aside()
            self._exchange(group)
            group.exchanged()

    def step(
        self, optimizer: Optimizer, closure: Callable[..., Any], may_repeat: bool
    ) -> Callable[..., Any]:
        """The closure of a step, after which gradients are aggregates. Evaluated again, it begins
        with the memory of before.

        Args:
            optimizer: the optimizer.
            closure: its closure.
            may_repeat: the optimizer may evaluate it several times.
        """
        groups = self.of(optimizer)
        kept = [group.exchange.memory() if may_repeat else None for group in groups]
        evaluations = 0

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            nonlocal evaluations
            evaluations += 1
            for group, memory in zip(groups, kept, strict=True):
                if evaluations > 1:
                    group.exchange.repeat(memory)
            result = closure(*args, **kwargs)
            self.settle(optimizer)
            return result

        return evaluate

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], take: Callable[..., Any]
    ) -> Any:
        """Lightning's step of an optimizer, with a closure of `step`."""
        before, self._stepping = self._stepping, True
        try:
            return take(optimizer, self.step(optimizer, closure, may_repeat(optimizer)))
        finally:
            self._stepping = before

    @contextmanager
    def ignoring_steps(self) -> Iterator[None]:
        """Inside, steps of optimizers are none: torch makes an empty one where it asks for a state
        that there is not yet.
        """
        before, self._ignores_steps = self._ignores_steps, True
        try:
            yield
        finally:
            self._ignores_steps = before

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Torch's hook on every optimizer's step, raw ones included."""
        groups = self.of(optimizer)
        if not groups:
            return None
        if self._in_backward:
            raise RuntimeError(
                "An optimizer should step after backward. Found a step of "
                f"{type(optimizer).__name__} during it, before the gradients are exchanged, as "
                "hooks that step each parameter alone make it. Step after backward."
            )
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if callable(closure):
            if self._stepping:
                return None
            wrapped = self.step(optimizer, closure, may_repeat(optimizer))
            return (
                (args, {**kwargs, "closure": wrapped})
                if "closure" in kwargs
                else ((args[0], wrapped, *args[2:]), kwargs)
            )
        self.settle(optimizer)
        for group in groups:
            # no loss scaler has looked at it: the step is left out
            if group.poisoned and group.layout is not None:
                group.layout.clear_gradients()
        return None

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.manual:
            for group in self.of(optimizer):
                group.stepped()


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer, in its order."""
    return [p for part in optimizer.param_groups for p in part["params"]]


def in_module_order(module: Any, optimizer: Optimizer) -> Callable[[], list[Tensor]]:
    """All parameters of an optimizer, in the order in which the module has them, and after them
    those that it has not.

    An optimizer's own order may be another one in every process, as where its groups were made from
    sets of names. DDP does not mind that.
    """
    known: list[Tensor] = []
    ordered: list[Tensor] = []

    def parameters() -> list[Tensor]:
        now = parameters_of(optimizer)
        if len(now) != len(known) or any(map(operator.is_not, now, known)):
            places = {id(p): i for i, p in enumerate(module.parameters())}
            known[:] = now
            ordered[:] = sorted(now, key=lambda p: places.get(id(p), len(places)))
        return ordered

    return parameters


def gradient_groups(
    module: Any,
    optimizers: Sequence[Optimizer],
    exchange: Callable[[int, str], Exchange],
    alone: bool,
    flat: Callable[[Sequence[Tensor]], FlatParameters] = FlatParameters,
) -> list[GradientGroup]:
    """The parameters of each optimizer, and those that need a gradient and are in none.

    Args:
        module: the LightningModule.
        optimizers: the run's.
        exchange: ``(index, name) -> Exchange``, makes that of a group.
        alone: there is nobody to exchange with.
        flat: makes the layout of parameters.
    """
    groups = []
    for i, optimizer in enumerate(optimizers):
        name = f"optimizer {i} ({type(optimizer).__name__})"
        parameters = in_module_order(module, optimizer)
        groups.append(GradientGroup(name, parameters, exchange(i, name), flat=flat))
    inside = {id(p) for optimizer in optimizers for p in parameters_of(optimizer)}
    rest = [
        (name, p)
        for name, p in module.named_parameters()
        if p.requires_grad and id(p) not in inside
    ]
    if alone or not rest:
        return groups
    names = ", ".join(name for name, _ in rest[:3]) + (
        f" and {len(rest) - 3} more" if len(rest) > 3 else ""
    )
    log.info(
        f"byzantine_robust: {names} need a gradient and are in no optimizer. Their gradients are "
        "exchanged too, as DDP does; requires_grad_(False) spares that."
    )

    def parameters_of_nobody() -> list[Tensor]:
        now = {id(p) for optimizer in optimizers for p in parameters_of(optimizer)}
        return [p for _, p in rest if id(p) not in now]

    name = "the parameters in no optimizer"
    return [
        *groups,
        GradientGroup(name, parameters_of_nobody, exchange(len(groups), name), False, flat),
    ]


def may_repeat(optimizer: Optimizer) -> bool:
    """Whether an optimizer may evaluate its closure several times a step: of torch's own only LBFGS
    does.
    """
    return isinstance(optimizer, torch.optim.LBFGS) or not type(optimizer).__module__.startswith(
        "torch.optim."
    )
