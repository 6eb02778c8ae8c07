"""The round: from the local workers' gradients to one robust estimate, over any transport, for any
method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lightning_byz.algorithms import Algorithm
from lightning_byz.algorithms.base import draw
from lightning_byz.compressors import Compressor
from lightning_byz.engine.heterogeneity import Heterogeneity
from lightning_byz.engine.outcome import Contribution, Outcome
from lightning_byz.engine.server_side import ServerSide
from lightning_byz.engine.simulation import HONEST, Honest
from lightning_byz.engine.worker_side import BucketedMessages, WorkerSide
from lightning_byz.numerics.finite import all_finite
from lightning_byz.numerics.memory import same_memory
from lightning_byz.numerics.rows import Rows
from lightning_byz.transports import Awaited, Message, Transport, Verdict
from lightning_byz.types import Payload, Round


class Exchange:
    """Runs an algorithm round by round and keeps its state: of the local workers, and of the
    server.

    Args:
        algorithm: the method, with f known.
        transport: a connected transport.
        seed: seed of the run's random streams.
        shares: ``[n]`` float64 > 0, how much of the data each worker holds, for rules that weigh
            rows; None: all the same.
        index: number of the exchange in a run of several, each of which has streams of its own.
        name: what the gradients are of, for messages.
        participants: how many workers are drawn for each round; None: all take part.

    Attributes:
        step: number of the next round.
        previous: ``[d]`` the parameters at the last round that gave an estimate, for algorithms
            that need the drift.
        observers: called with every outcome, where the server's half runs.
        simulation: what simulated faults say of a step; liars are the first to arrive, and who
            never arrives is silent.
        quarantined: workers whose messages do not count from the next round on, the same on every
            rank; the rule's f stays, as far as it allows that for the rows that are left.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        transport: Transport,
        seed: int,
        shares: Tensor | None = None,
        index: int = 0,
        name: str = "all parameters",
        participants: int | None = None,
    ) -> None:
        self.algorithm, self.transport, self.shares, self.name = algorithm, transport, shares, name
        self.seed, self.index, self.participants = seed + index, index, participants
        self.step = 0
        self.dim: int | None = None
        self.previous: Tensor | None = None
        self.observers: list[Callable[[Outcome], None]] = []
        self.simulation: Honest = HONEST
        self.quarantined: set[int] = set()
        self._worker_side: WorkerSide | None = None
        self._server_side: ServerSide | None = None
        self._opened: BucketedMessages | None = None  # of the coming round
        self._announced = -1
        coordinate_wise = algorithm.coordinate_wise
        first = Round(step=0, n=transport.n, seed=self.seed)
        transport.cut(algorithm.codec(first), coordinate_wise)

    @property
    def workers(self) -> dict[int, Any]:
        """By local worker, its state."""
        return {} if self._worker_side is None else self._worker_side.states

    @property
    def server(self) -> Any:
        """The server's state, or this rank's columns of it; None where it is not held."""
        return None if self._server_side is None else self._server_side.state

    @property
    def heterogeneity(self) -> Heterogeneity | None:
        """How unlike the workers' data are; None before the first round."""
        return None if self._server_side is None else self._server_side.heterogeneity

    def _start(self, like: Tensor) -> None:
        self.dim, self.previous, self._opened = len(like), None, None
        self._worker_side = WorkerSide(self.algorithm, self.transport, like)
        self._server_side = ServerSide(self.algorithm, self.transport, like, self.shares, self.seed)

    def _sides(self, like: Tensor) -> tuple[WorkerSide, ServerSide]:
        """Both halves, begun anew if vectors have another length.

        The algorithm may have learned the parameters' sizes.
        """
        if self.dim != len(like):
            self._start(like)
        workers, server = self._worker_side, self._server_side
        assert workers is not None and server is not None
        workers.algorithm = server.algorithm = self.algorithm
        return workers, server

    @torch.no_grad()
    def next_round(self, x: Tensor) -> Round:
        """The round that comes next, as far as it is known before the workers compute.

        Args:
            x: ``[d]``, the parameters; for algorithms that do not need the drift, any vector of
                their size, dtype and device.
        """
        n = self.transport.n
        rushing = torch.zeros(n, dtype=torch.bool)
        rushing[torch.tensor(sorted(self.simulation.liars_at(self.step)), dtype=torch.int64)] = True
        previous = self.previous if self.dim == len(x) else None
        drift = None if previous is None else self.transport.norm(x - previous)
        round = Round(
            step=self.step,
            n=n,
            seed=self.seed,
            drift=drift,
            rushing=rushing,
            arrivals=self.simulation.arrivals_at(self.step),
        )
        if self.participants is not None:
            round = round._replace(drawn=draw(round, self.participants))
        round = round._replace(measured=self.transport.measured)
        round = round._replace(cohort=self.algorithm.cohort(round))
        self.transport.awaits(self._awaited(round))
        return round

    def _awaited(self, round: Round) -> Awaited:
        """For whose messages a server waits."""
        assert round.cohort is not None
        cohort, rule = int(round.cohort.sum()), self.algorithm.rule(round)
        f, need = rule.f or 0, min(cohort, self.algorithm.first(round.n))
        enough = (
            m
            for m in range(1, need + 1)
            if min(f, rule.most_f(m)) >= (f - need + m if need - m <= f else f)
        )
        return Awaited(cohort - need, next(enough, need), self.algorithm.full_gradient(round))

    @torch.no_grad()
    def open(self, x: Tensor, spend: bool = False) -> BucketedMessages | None:
        """Begins the next round, so that buckets of the local workers' messages may leave before
        their gradients are complete.

        Every rank may, and need not: what it has not sent is sent in `run`. None where the
        algorithm or the transport wants whole messages.

        Args:
            x: as in `run`.
            spend: as in `run`.
        """
        workers, _ = self._sides(x)
        self._meet(len(x))
        self._opened = self._bucketed(workers, self.next_round(x), x, spend)
        return self._opened

    def _bucketed(
        self, workers: WorkerSide, round: Round, x: Tensor, spend: bool
    ) -> BucketedMessages | None:
        whole = self.simulation.forges  # who lies sees the others' whole messages first
        return None if whole else workers.bucketed(self.transport, round, x, spend)

    def place(self, dim: int) -> str:
        """The coming round, in words that are the same on all ranks. ``dim``: d, which is to be
        theirs too, unless they hold parts.
        """
        size = "" if self.transport.has_parts else f", d = {dim}"
        return f"round {self.step} of {self.name}{size}"

    def announce(self) -> None:
        """All ranks have just met, and said that the coming round is what they do next."""
        self._announced = self.step

    @property
    def announced(self) -> bool:
        """Whether all ranks are known to come to the coming round."""
        return self._announced == self.step

    def _meet(self, dim: int) -> None:
        if not self.announced:
            self.transport.meet(self.place(dim))

    @torch.no_grad()
    def run(
        self,
        contributions: Sequence[Contribution],
        x: Tensor,
        trusted: Tensor | None = None,
        spend: bool = False,
    ) -> Outcome:
        """One round.

        Args:
            contributions: one for each local worker, in order. Gradients are not modified, unless
                they are to be spent.
            x: ``[d]``, the parameters; for algorithms that do not need the drift, any vector of
                their size, dtype and device.
            trusted: ``[d]`` a gradient on trusted data; rank 0's counts. None, on all ranks, if
                there is none.
            spend: messages may take the place of gradients, and the estimate that of the only
                local worker's.

        Returns:
            the outcome. Its estimate is the same on every rank. If it has none, no state has
            changed.
        """
        workers, server = self._sides(x)
        if self._opened is None:
            self._meet(len(x))
        round = self._agreed(self.next_round(x), trusted)
        codec, down = self.algorithm.codec(round), self.algorithm.downlink(round)
        buckets = self._opened or self._bucketed(workers, round, x, spend)
        self._opened = None
        transport, quarantined = self.transport, frozenset(self.quarantined)
        sent: Mapping[int, Payload] = MappingProxyType({})
        if buckets is not None:
            received, message, states = buckets.close(contributions)
            spare = _spare(contributions, ()) if spend else None
            outcome = server.judge(received, message, down, round, x, quarantined, spare)
        else:
            messages, states, sent = workers.whole(contributions, round, x)
            if transport.serves:
                received = self.simulation.received(messages, codec, round, server, self.index)
                spare = _spare(contributions, messages) if spend else None
                outcome = server.judge(received, messages[0], down, round, x, quarantined, spare)
            else:
                verdict = transport.submit(messages, codec, down, len(x), x.dtype, round)
                outcome = self._told(verdict, down, round, messages[0])
        self.step, self._announced = self.step + 1, -1
        workers.finish(outcome, states, sent)
        if outcome.estimate is not None and self.algorithm.needs_drift:
            self.previous = x.clone()
        for observer in self.observers if transport.serves else ():
            observer(outcome)
        return outcome

    def _told(self, verdict: Verdict, down: Compressor, round: Round, message: Message) -> Outcome:
        """The outcome as a worker knows it that does not see the others' messages."""
        dim = self.dim
        assert dim is not None
        round = round._replace(cohort=verdict.cohort, present=verdict.present)
        rows = Rows(torch.zeros(round.n, 0))
        outcome = Outcome(
            round,
            None,
            verdict.used,
            lambda: rows,
            lambda: rows,
            self.algorithm.rule(round),
            message.nbytes,
            0,
            verdict.seconds,
        )
        if verdict.answer is None:
            return outcome._replace(reason=verdict.reason)
        down_bytes = self.transport.bytes_down(message, verdict.answer)
        return outcome._replace(estimate=down.decode(verdict.answer, dim), bytes_down=down_bytes)

    def _agreed(self, round: Round, trusted: Tensor | None) -> Round:
        """The round with rank 0's drift and trusted gradient: every rank's decisions are to be the
        same.
        """
        if round.drift is not None:
            round = round._replace(drift=self.transport.agree(round.drift))
        if trusted is not None:
            trusted = self.transport.agree(trusted)
            round = round._replace(trusted=trusted if bool(all_finite(trusted)) else None)
        return round

    # -- a closure that is evaluated again ---------------------------------------------------------

    def memory(self) -> Any:
        """A copy of all that both halves remember here, for `repeat`."""
        workers, server = self._worker_side, self._server_side
        if self.algorithm.stateless or self.dim is None or workers is None or server is None:
            return self.dim
        return workers.memory(), server.memory()

    def repeat(self, memory: Any) -> None:
        """The next round takes the last one's place in what is remembered.

        Args:
            memory: from `memory`, before the last round.

        Raises:
            ValueError: for methods that look at earlier parameters.
        """
        algorithm = self.algorithm
        if algorithm.needs_drift or algorithm.needs_previous:
            raise ValueError(
                f"{type(algorithm).__name__} takes one gradient a step, because it looks at "
                "earlier parameters. Found an optimizer that evaluates its closure several times "
                "a step, as LBFGS and SAM do. Use another optimizer, or another algorithm, such "
                "as RobustSGD."
            )
        if self._server_side is not None:
            self._server_side.heterogeneity.repeat()
        if memory is None:
            self.dim = None
        elif not isinstance(memory, int):
            assert self._worker_side is not None and self._server_side is not None
            workers, server = memory
            self._worker_side.remember(workers)
            self._server_side.remember(server)

    # -- checkpoint --------------------------------------------------------------------------------

    def server_state(self, alone: bool = False) -> dict[str, Any]:
        """The server's half and the round number, as plain containers of tensors.

        Where the server's state lies in shards it is collected at rank 0; the other ranks' answers
        hold their shards.

        Args:
            alone: this rank is the only one that asks. Without the other ranks' shards there is no
                server state then.
        """
        side = self._server_side if self.dim is not None else None
        return {
            "step": self.step,
            "dim": self.dim,
            "server": None if side is None else side.collected(alone),
            "previous": self.previous,
            "experience": None if side is None else side.experience(alone),
        }

    def worker_states(self) -> dict[int, dict[str, Tensor]]:
        """The local workers' halves, by worker, as plain containers of tensors of their own."""
        return {
            worker: {name: t.clone() for name, t in state._asdict().items()}
            for worker, state in self.workers.items()
        }

    def load(
        self, server: dict[str, Any], workers: dict[int, dict[str, Tensor]], like: Tensor
    ) -> None:
        """Restores what `server_state` and `worker_states` gave; workers that are missing start
        afresh.

        Args:
            server: from `server_state`.
            workers: from `worker_states` of every rank; only the local ones are read.
            like: an example of a gradient, for its device.
        """
        self.step, self._announced = server["step"], -1
        self.dim, self.previous, self._worker_side, self._server_side = None, None, None, None
        if server["dim"] is None:
            return
        x, whole = like.new_zeros(server["dim"]), server["server"]
        worker_side, server_side = self._sides(x)
        if whole is not None:
            server_side.load(whole)
        elif self.transport.serves:
            # one rank saved without the others' shards: momenta are worth nothing without mirrors
            return
        server_side.heterogeneity.load(
            server.get("experience"), workers.keys(), self.transport.n, self.step
        )
        previous = server.get("previous")
        self.previous = None if previous is None else previous.to(like)
        for worker in self.transport.workers:
            if worker in workers:
                worker_side.load(worker, workers[worker])
            elif whole is not None:
                fresh = self.algorithm.init_server(x, self.transport.n)
                known = (whole[name].to(now) for name, now in fresh._asdict().items())
                state = self.algorithm.rejoined(x, type(fresh)(*known), worker)
                worker_side.states[worker] = state

    def rejoined(self, workers: Iterable[int], like: Tensor) -> dict[int, dict[str, Tensor]]:
        """States for workers that have lost theirs, as plain containers of tensors.

        Called where the server's half runs.
        """
        x = torch.zeros_like(like)
        if self.dim is None:
            return {}
        return {w: self.algorithm.rejoined(x, self.server, w)._asdict() for w in workers}


def _spare(contributions: Sequence[Contribution], messages: Sequence[Message]) -> Tensor | None:
    """The only local worker's gradient, if none of these messages lies in its memory."""
    if len(contributions) != 1 or contributions[0].grads is None:
        return None
    grads = contributions[0].grads
    payloads = (tensor for message in messages for tensor in message.payload)
    kept = [*payloads] if grads.previous is None else [*payloads, grads.previous]
    return None if any(same_memory(grads.current, t) for t in kept) else grads.current
