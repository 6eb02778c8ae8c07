"""Stragglers: makes some workers late, or dead, by a virtual clock in one process and in truth
across processes.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_byz.algorithms import DStar
from lightning_byz.diagnostics.rounds import RoundLog
from lightning_byz.engine.exchange import Exchange
from lightning_byz.engine.outcome import Outcome
from lightning_byz.strategies.strategy import is_robust
from lightning_byz.strategies.validate import UnsupportedSetupError
from lightning_byz.types import keyed_generator

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Base

    from lightning_byz.strategies.strategy import RobustStrategy
else:
    _Base = object

PARETO_SHAPE = 1.5
"""Tail index of the Pareto delays: a finite mean and an infinite variance, as a cluster's tail is
usually described.
"""


class StragglersCallback(_Base):
    """Makes some workers late, or dead.

    In one process nobody sleeps: the callback says when each message arrives (`Round.arrivals`), an
    algorithm that waits for the first k of n (`DStar`) takes those, in place of its own ``delays``,
    and the round takes as long as the last message that was waited for: the k-th order statistic.
    It is logged as ``stragglers/round_seconds``, and their sum since the run began as
    ``stragglers/seconds``. Workers that are not late, and liars of the same simulation, arrive at
    second 0.

    Across processes, each rank sleeps before its step, for the slowest of its workers.

    Args:
        delay: mean delay of a step, in seconds; None for ``kind="dead"``.
        workers: the late workers' indices, in 0 .. n - 1.
        fraction: which part of the n workers is late, instead of ``workers``: drawn once, from a
            stream keyed by the run's seed, and rounded to the nearest number.
        kind: how delays are distributed, drawn anew for each worker and step: "constant";
            "exponential"; "pareto", of which one in 160 is longer than ten times the mean; or
            "dead": a worker stops for good. In one process it is silent then; on the parameter
            server its process kills itself.
        start: the first step in which they are late, or dead.
    """

    def __init__(
        self,
        delay: float | None = None,
        workers: Sequence[int] | None = None,
        fraction: float | None = None,
        kind: Literal["constant", "exponential", "pareto", "dead"] = "constant",
        start: int = 0,
    ) -> None:
        super().__init__()
        if kind not in ("constant", "exponential", "pareto", "dead"):
            raise ValueError(
                f"`kind` should be 'constant', 'exponential', 'pareto' or 'dead'. Found {kind!r}."
            )
        if (delay is None) != (kind == "dead") or (delay is not None and not 0 < delay < math.inf):
            raise ValueError(
                "`delay` should be a positive number of seconds, and None for kind='dead'. Found "
                f"delay={delay} with kind={kind!r}."
            )
        if (workers is None) == (fraction is None):
            raise ValueError(
                "Give either `workers`, the indices of those that are late, or `fraction`. Found "
                f"workers={workers}, fraction={fraction}."
            )
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(f"`fraction` should be in (0, 1]. Found fraction={fraction}.")
        if start < 0:
            raise ValueError(f"`start` should be a step, at least 0. Found start={start}.")
        self.delay, self.workers, self.fraction, self.kind, self.start = (
            delay,
            workers,
            fraction,
            kind,
            start,
        )
        self.seconds = 0.0
        self._log = RoundLog()
        self._key = (0, 0)

    def indices(self, n: int) -> list[int]:
        """The late workers of a run of n."""
        if self.fraction is not None:
            order = torch.randperm(n, generator=keyed_generator("who is late", *self._key))
            return sorted(order[: round(self.fraction * n)].tolist())
        assert self.workers is not None
        outside = [worker for worker in self.workers if not 0 <= worker < n]
        if outside:
            raise ValueError(
                f"`workers` should be indices in 0 .. n - 1 = {n - 1} (n = processes x "
                f"workers_per_process). Found {outside}."
            )
        return sorted(set(self.workers))

    def delays(self, n: int, step: int) -> Tensor:
        """``[n]`` float64: the seconds by which each worker is late in a step; inf for one that is
        dead.
        """
        delays = torch.zeros(n, dtype=torch.float64)
        if step < self.start:
            return delays
        late = self.indices(n)
        delays[late] = self._drawn(n, step)[late]
        return delays

    def _drawn(self, n: int, step: int) -> Tensor:
        if self.delay is None:
            return torch.full((n,), math.inf, dtype=torch.float64)
        if self.kind == "constant":
            return torch.full((n,), self.delay, dtype=torch.float64)
        exponential = (
            -torch.rand(n, generator=keyed_generator("late", *self._key, step), dtype=torch.float64)
            .neg()
            .log1p()
        )
        if self.kind == "exponential":
            return self.delay * exponential
        return self.delay * (PARETO_SHAPE - 1) / PARETO_SHAPE * (exponential / PARETO_SHAPE).exp()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit" and not is_robust(trainer.strategy):
            raise ValueError(
                f"{type(self).__name__} needs Trainer(strategy='byzantine_robust'). Found "
                f"{type(trainer.strategy).__name__}."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        strategy: RobustStrategy = trainer.strategy
        exchange = strategy.exchanges[0]
        others = [
            callback for callback in trainer.callbacks if isinstance(callback, StragglersCallback)
        ]
        self._key = (exchange.seed, others.index(self))
        dead = [
            w
            for w in range(strategy.n)
            if sum(float(other.delays(strategy.n, 2**62)[w]) for other in others) == math.inf
        ]
        if len(dead) == strategy.n:
            raise ValueError(
                f"At least one worker should stay alive. Found all n={strategy.n} among the dead."
            )
        if exchange.transport.world_size == 1:
            strategy.simulate().delays.append(lambda step: self.delays(strategy.n, step))
            self._log.watch(strategy.exchanges, self._measured)
            return
        self._check_processes(strategy)

    def _check_processes(self, strategy: RobustStrategy) -> None:
        """Refuses what collectives cannot simulate, as they wait for every rank, and what no server
        survives.
        """
        exchange = strategy.exchanges[0]
        transport = type(exchange.transport).__name__
        if exchange.transport.measured:
            if self.kind == "dead" and any(
                worker < strategy.workers_per_process for worker in self.indices(strategy.n)
            ):
                raise UnsupportedSetupError(
                    "Rank 0 is the server, whose death is the end. Found Stragglers(kind='dead') "
                    f"with workers {self.indices(strategy.n)}. Leave out those of rank 0."
                )
            return
        if self.kind == "dead":
            raise UnsupportedSetupError(
                f"Over {transport} every process waits for a dead one until its timeout. Found "
                "Stragglers(kind='dead'). Use one process with workers_per_process=n, or "
                "ParameterServer."
            )
        if isinstance(exchange.algorithm, DStar):
            raise UnsupportedSetupError(
                f"Over {transport} every process waits for all, and who is among DStar's first k "
                "is simulated by DStar(delays=...). Found Stragglers besides, whose delays are "
                "real. Give one of the two, or use one process with workers_per_process=n, or "
                "ParameterServer."
            )

    def _measured(self, outcome: Outcome, exchange: Exchange) -> dict[str, float]:
        self.seconds += outcome.seconds
        return {
            "stragglers/round_seconds": outcome.seconds,
            "stragglers/seconds": self.seconds,
        }

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        exchange = trainer.strategy.exchanges[0]
        if exchange.transport.world_size > 1:
            delay = float(
                self.delays(exchange.transport.n, exchange.step)[
                    list(exchange.transport.workers)
                ].max()
            )
            if delay == math.inf:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(delay)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._log.log(pl_module)

    # -- checkpoint --------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The name of this callback's state in a checkpoint; there may be several."""
        who = f"workers={self.workers}" if self.fraction is None else f"fraction={self.fraction}"
        return f"Stragglers(delay={self.delay}, {who}, kind={self.kind!r}, start={self.start})"

    def state_dict(self) -> dict[str, Any]:
        """The simulated seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.seconds = state_dict["seconds"]
