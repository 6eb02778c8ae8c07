"""ShadowMode: which rank of a plain DDP run would a robust rule have dropped? Nothing about the
training changes.

DDP reduces gradients inside the backward pass, so a rank's own gradient is gone when any callback
runs. While it exists, PyTorch's `Tensor.register_post_accumulate_grad_hook` sees it: it runs when a
parameter's gradient is complete, before DDP's own hook behind it puts the gradient into a bucket.
The hooks are there only in the steps that are looked at. Each adds the sketch of one gradient to a
short vector (see `lightning_byz.diagnostics.sketch`); after the backward pass these vectors, 256
KiB a rank at most, are gathered. A communication hook would do too, but DDP takes only one, for the
whole run, and it might be the user's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_byz.aggregators import Aggregator, MultiKrum, TooFewRowsError, WeightedAggregator
from lightning_byz.diagnostics.alerts import (
    Suspect,
    accuse,
    gathered,
    log_to_all,
    run_logger,
    scores,
    starts_afresh,
)
from lightning_byz.diagnostics.sketch import Sketch
from lightning_byz.diagnostics.suspicion import Compare, SuspicionTest
from lightning_byz.diagnostics.worker_placement import Whereabouts, whereabouts
from lightning_byz.metrics import dropped
from lightning_byz.numerics.rows import Rows

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Base
else:
    _Base = object


class ShadowModeCallback(_Base):
    """Under ``Trainer(strategy="ddp")``, reports which rank a robust rule would have dropped, and
    which is suspect. The mean is applied as ever.

    In two consecutive steps of every ``every_n_steps`` it compares the ranks' gradients as they are
    before DDP averages them (of the last micro-batch's backward pass, so with accumulated gradients
    all of them). It logs, at these steps and to all loggers, ``byz/dropped/worker_<i>`` (1 if the
    rule would have dropped the rank), and ``byz/suspicion/worker_<i>`` (0: no evidence; from 1 on
    the rank is accused, see `lightning_byz.diagnostics.suspicion`). The first time that a rank is
    accused, one warning names its rank, host and device. With ``LIGHTNING_BYZ_SHADOW=1`` in the
    environment every Trainer has this callback.

    Compared are the parameters that need a gradient when a looked-at batch begins and that the last
    micro-batch uses. In manual optimization, a step with several backward passes compares each of
    them.

    Args:
        every_n_steps: two of so many steps are looked at.
        aggregator: the rule that is asked, with weights; None: MultiKrum as in ByzFL, which drops
            the f rows with the worst scores.
        num_byzantine: f; None: the most that the rule allows, up to max(1, (n - 1) // 3).
        false_alarm_rate: the probability that a run of honest ranks ever accuses one, at most.
        compare: "others", where ranks draw from one pool of data, as DDP's usual sampler makes
            them; "own_past", where their data differ.
        sketch_size: numbers that a rank sends of its gradient.
        on_suspect: called on rank 0 with every `Suspect`, once.
        strict: raise where nothing can be compared (another strategy, fewer than three ranks),
            instead of a warning.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        aggregator: Aggregator | None = None,
        num_byzantine: int | None = None,
        false_alarm_rate: float = 0.01,
        compare: Compare = "others",
        sketch_size: int = 65_536,
        on_suspect: Callable[[Suspect], None] | None = None,
        strict: bool = True,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("every_n_steps", every_n_steps, 2),
            ("sketch_size", sketch_size, 1),
        ):
            if value < least:
                raise ValueError(f"`{name}` should be at least {least}. Found {name}={value}.")
        aggregator = MultiKrum(definition="byzfl") if aggregator is None else aggregator
        if not isinstance(aggregator, WeightedAggregator):
            raise ValueError(
                "`aggregator` should be a rule with weights, such as MultiKrum(), to say whom it "
                f"drops. Found {aggregator!r}."
            )
        self.aggregator: WeightedAggregator = aggregator
        self.every_n_steps, self.num_byzantine, self.sketch_size = (
            every_n_steps,
            num_byzantine,
            sketch_size,
        )
        self.false_alarm_rate, self.compare, self.on_suspect, self.strict = (
            false_alarm_rate,
            compare,
            on_suspect,
            strict,
        )
        self.places: list[Whereabouts] = []
        self.test: SuspicionTest | None = None
        self.drops: Tensor = torch.zeros(0)
        self.looks = 0
        self._saved: dict[str, Any] | None = None
        self._forget()

    def _forget(self) -> None:
        self._handles: list[Any] = []
        self._sketch: Sketch | None = None
        self._own: Tensor | None = None
        self._age = 0
        self._reduced = False
        self._broken: set[int] = set()

    # -- a run -------------------------------------------------------------------------------------

    def _impossible(self, trainer: Any) -> str:
        if not isinstance(trainer.strategy.model, DistributedDataParallel):
            return (
                "It watches the ranks of Trainer(strategy='ddp'). Found "
                f"{type(trainer.strategy).__name__}."
            )
        if trainer.world_size < 3:
            return f"To tell who is wrong takes three ranks or more. Found {trainer.world_size}."
        return ""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._forget()
        self.test, why = None, self._impossible(trainer)
        if why:
            if self.strict:
                raise ValueError(f"{type(self).__name__} cannot compare gradients. {why}")
            if trainer.is_global_zero:
                run_logger(trainer).warning(f"Shadow mode is off. {why}")
            return
        n = trainer.world_size
        most = self.aggregator.most_f(n)
        f = min(most, max(1, (n - 1) // 3)) if self.num_byzantine is None else self.num_byzantine
        self._rule = self.aggregator.with_f(f)
        self._rule.check(n)
        self.test = SuspicionTest(n, f, self.false_alarm_rate, self.compare)
        self.drops, self.looks = torch.zeros(n), 0
        self.places = whereabouts(trainer.strategy.root_device, gathered)
        if self._saved is not None and self.test.fits(self._saved["test"]):
            self.test.load_state_dict(self._saved["test"])
            self.drops, self.looks = self._saved["drops"].clone(), self._saved["looks"]
        elif self._saved is not None and trainer.is_global_zero:
            run_logger(trainer).warning(
                starts_afresh("Shadow mode", self.test, len(self._saved["drops"]))
            )
        self._saved = None
        if trainer.is_global_zero:
            run_logger(trainer).info(
                f"Shadow mode: {self._rule!r} is asked in 2 of every {self.every_n_steps} steps "
                f"whom of {n} ranks it would drop; DDP's mean is applied "
                "as ever. " + "; ".join(str(place) for place in self.places) + "."
            )

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.test is None or self._age % self.every_n_steps > 1:
            return
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        sizes = [p.numel() for p in parameters]
        offsets = [0, *itertools.accumulate(sizes)]
        if self._sketch is None or self._sketch.dim != offsets[-1]:
            self._sketch = Sketch(offsets[-1], self.sketch_size)
        model = trainer.strategy.model
        for p, offset in zip(parameters, offsets, strict=False):
            self._handles.append(
                p.register_post_accumulate_grad_hook(self._reader(model, self._sketch, offset))
            )

    def _reader(
        self, model: DistributedDataParallel, sketch: Sketch, offset: int
    ) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def read(p: Tensor) -> None:
            # a micro-batch whose gradient is not reduced yet
            if not model.require_backward_grad_sync or p.grad is None:
                return
            if self._own is None:
                self._own = sketch.new(device=p.device)
            grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
            sketch.add(self._own, grad.detach().reshape(-1), offset)

        return read

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self._own = None
        self._reduced |= self.test is not None and trainer.strategy.model.require_backward_grad_sync

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if (
            not self._handles
            or self.test is None
            or not trainer.strategy.model.require_backward_grad_sync
        ):
            return
        assert self._sketch is not None
        own = self._sketch.new(device=pl_module.device) if self._own is None else self._own
        self._own = None
        self._compare(trainer, torch.stack(gathered(own)))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._age += self._reduced
        self._handles, self._reduced = [], False

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.test is None or not self.looks or not trainer.is_global_zero:
            return
        lines = [
            f"{place}: would have been dropped in {int(drops)} of {self.looks} looks, suspicion "
            f"{float(score):.2f}" + (" (SUSPECT)" if place.worker in self.test.accused else "")
            for place, drops, score in zip(self.places, self.drops, self.test.scores, strict=True)
        ]
        run_logger(trainer).info(
            "Shadow mode, at the end (suspicion 1 accuses):\n  " + "\n  ".join(lines)
        )

    # -- a look ------------------------------------------------------------------------------------

    def _compare(self, trainer: Any, rows: Tensor) -> None:
        assert self.test is not None
        self.looks += 1
        out = self._dropped(rows)
        self.drops += out
        self._name_the_broken(trainer, rows)
        new = self.test.observe(rows)
        if trainer.loggers:
            values = {
                f"byz/dropped/worker_{place.worker}": float(out[place.worker])
                for place in self.places
            }
            log_to_all(trainer, {**values, **scores(self.test, self.places)})
        for worker in new:
            remark = (
                f"{type(self._rule).__name__} would have dropped it in {int(self.drops[worker])} "
                f"of {self.looks} looks."
            )
            accuse(
                trainer,
                self.test,
                self.places[worker],
                trainer.global_step,
                remark,
                self.on_suspect,
            )

    def _name_the_broken(self, trainer: Any, rows: Tensor) -> None:
        """Says, once for each, whose gradient is not finite while others' are: at the next step
        everybody's will be. A loss scaler expects that.
        """
        broken = (~torch.isfinite(rows).all(1)).nonzero().flatten().tolist()
        if (
            len(broken) == len(rows)
            or getattr(trainer.precision_plugin, "scaler", None) is not None
            or not trainer.is_global_zero
        ):
            return
        for worker in set(broken) - self._broken:
            self._broken.add(worker)
            run_logger(trainer).warning(
                f"Step {trainer.global_step}: the gradient of {self.places[worker]} is not "
                "finite, and those of other ranks are. DDP's mean spreads it to all."
            )

    def _dropped(self, rows: Tensor) -> Tensor:
        """``[n]`` whom the rule would have dropped: those of little weight, and those whose
        gradient is not finite.
        """
        finite = torch.isfinite(rows).all(1)
        try:
            rule, heard = self._rule.facing(Rows(rows), finite)
        except TooFewRowsError:  # most gradients overflowed; DDP's loss scaler skips such a step
            return torch.zeros(len(rows))
        out = ~finite
        out[finite] = dropped(rule.weights(heard))
        return out.float()

    # -- checkpoint --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the test knows, the same on every rank."""
        return (
            {}
            if self.test is None
            else {"test": self.test.state_dict(), "drops": self.drops, "looks": self.looks}
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, as soon as the run begins."""
        self._saved = state_dict or None
