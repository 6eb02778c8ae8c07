"""The round: from the local workers' gradients to one robust estimate, over any transport, for any algorithm."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from lightning_byz.aggregators import Aggregator, TooFewRowsError
from lightning_byz.algorithms import Algorithm
from lightning_byz.compressors import Compressor
from lightning_byz.finite import all_finite
from lightning_byz.rows import Rows
from lightning_byz.transports import Message, Transport
from lightning_byz.types import Gradients, Round


class Contribution(NamedTuple):
    """What a local worker has to say this round.

    Attributes:
        grads: its gradients, or None if it has none (no batch, no loss).
        used: ``[P]`` bool, the parameters that its loss depends on.
    """

    grads: Gradients | None
    used: Tensor


class Outcome(NamedTuple):
    """The result of a round.

    Attributes:
        round: the round, with ``present`` set.
        estimate: the gradient estimate ``[d]``, or None if too few rows were present: the step is to be skipped.
        used: ``[P]`` bool, the parameters that more than f present workers have a gradient of.
        rows: the decoded messages ``[n, d]``, until the next round; absent rows are 0.
        look: makes the rows that the estimate stands for, until the next round.
        rule: the rule that aggregated the cohort's rows.
        bytes_up: bytes of payload that one worker of the cohort sent.
        bytes_down: bytes of payload that one worker received.
        seconds: how long the server waited for messages, by the algorithm's simulated clock.
        reason: why there is no estimate; empty otherwise.
        quarantined: the workers whose messages were left out, whatever they held.
    """

    round: Round
    estimate: Tensor | None
    used: Tensor
    rows: Rows
    look: Callable[[], Rows]
    rule: Aggregator
    bytes_up: int
    bytes_down: int
    seconds: float = 0.0
    reason: str = ""
    quarantined: frozenset[int] = frozenset()

    @property
    def seen(self) -> Rows:
        """The rows that the estimate stands for, ``[n, d]``; those of workers that are not present mean nothing."""
        return self.look()

    @property
    def silent(self) -> list[int]:
        """The workers that were to take part and whose message did not count, those in quarantine left aside."""
        assert self.round.present is not None and self.round.cohort is not None
        absent = (self.round.cohort & ~self.round.present).nonzero().flatten().tolist()
        return [worker for worker in absent if worker not in self.quarantined]


class Exchange:
    """Runs an algorithm round by round and keeps its state: of the local workers, and of the server.

    Args:
        algorithm: the method, with f known.
        transport: a connected transport.
        seed: seed of all random streams.
        shares: ``[n]`` float64 > 0, how much of the data each worker holds, for rules that weigh rows; None: all the same.

    Attributes:
        step: number of the next round.
        previous: ``[d]`` the parameters at the last round that gave an estimate, for algorithms that need the drift.
        observers: called with every outcome.
        liars: step -> the workers that lie in it, in a simulation; in one with arrival times they are the first to arrive.
        quarantined: workers whose messages do not count from the next round on, the same on every rank; the rule's f is smaller by as many.
    """

    def __init__(self, algorithm: Algorithm, transport: Transport, seed: int, shares: Tensor | None = None) -> None:
        self.algorithm, self.transport, self.seed, self.shares = algorithm, transport, seed, shares
        self.step = 0
        self.dim: int | None = None
        self.workers: dict[int, Any] = {}
        self.server: Any = None
        self.previous: Tensor | None = None
        self._rows: Tensor | None = None
        self.observers: list[Callable[[Outcome], None]] = []
        self.liars: Callable[[int], Iterable[int]] = lambda step: ()
        self.quarantined: set[int] = set()

    def _start(self, like: Tensor) -> None:
        self.dim, self.previous = len(like), None
        self.workers = {worker: self.algorithm.init_worker(like) for worker in self.transport.workers}
        self.server = self.algorithm.init_server(like, self.transport.n)

    @torch.no_grad()
    def next_round(self, x: Tensor) -> Round:
        """The round that comes next, as far as it is known before the workers compute.

        Args:
            x: ``[d]``, the parameters; for algorithms that do not need the drift, any vector of their size, dtype and device.
        """
        n = self.transport.n
        rushing = torch.zeros(n, dtype=torch.bool)
        rushing[torch.tensor(sorted(self.liars(self.step)), dtype=torch.int64)] = True
        previous = self.previous if self.dim == len(x) else None
        drift = None if previous is None else torch.linalg.vector_norm(x - previous, dtype=torch.float64)
        round = Round(step=self.step, n=n, seed=self.seed, drift=drift, rushing=rushing)
        return round._replace(cohort=self.algorithm.cohort(round))

    @torch.no_grad()
    def run(self, contributions: Sequence[Contribution], x: Tensor, trusted: Tensor | None = None) -> Outcome:
        """One round.

        Args:
            contributions: one for each local worker, in order. Gradients are not modified.
            x: ``[d]``, the parameters; for algorithms that do not need the drift, any vector of their size, dtype and device.
            trusted: ``[d]`` a gradient on trusted data; rank 0's counts. None, on all ranks, if there is none.

        Returns:
            the outcome. Its estimate is the same on every rank. If it has none, no state has changed.
        """
        if self.dim != len(x):
            self._start(x)
        round = self._agreed(self.next_round(x), trusted)
        assert round.cohort is not None
        codec, rule = self.algorithm.codec(round), self.algorithm.rule(round)

        messages, new_states = [], {}
        for worker, contribution in zip(self.transport.workers, contributions, strict=True):
            message = None
            if bool(round.cohort[worker]) and _is_finite(contribution.grads):
                payload, state = self.algorithm.worker(contribution.grads, self.workers[worker], round._replace(worker=worker))
                if bool(codec.valid(payload, len(x))):  # a momentum or a narrow format may overflow: who knows that is silent
                    message, new_states[worker] = Message(_flags(True, contribution.used), payload), state
            if message is None:  # silence has the size of speech
                empty = tuple(
                    torch.zeros(field.shape, dtype=field.dtype, device=x.device) for field in codec.layout(len(x), x.dtype)
                )
                message = Message(_flags(False, contribution.used), empty)
            messages.append(message)

        received = self.transport.exchange(messages, codec, len(x), x.dtype, round)
        spoke = torch.stack([flags[0] == 1 for flags, _ in received]).cpu() & round.cohort
        left_out = torch.zeros_like(spoke)
        left_out[sorted(self.quarantined)] = True
        left_out &= round.cohort
        present = spoke & ~left_out & torch.stack([codec.valid(payload, len(x)) for _, payload in received]).cpu()
        rows = Rows(
            self._decoded(received, present, codec, x),
            agree=self.transport.agree,
            generator=round.shared("rule"),
            exposed=spoke & ~present | left_out,  # an honest worker checks what it sends
            shares=self.shares,
        )
        round = round._replace(present=present)

        flags = torch.stack([flags for flags, _ in received]).cpu()
        used = (flags[present, 1:] != 0).sum(0) > min(rule.f or 0, max(0, int(present.sum()) - 1))
        outcome = Outcome(
            round,
            None,
            used,
            rows,
            lambda: rows,
            rule,
            messages[0].nbytes,
            0,
            self.algorithm.seconds(round),
            quarantined=frozenset(self.quarantined),
        )
        self.step += 1
        try:
            estimate, self.server = self.algorithm.server(rows, self.server, round)
        except TooFewRowsError as error:
            outcome = outcome._replace(reason=str(error))
        else:
            self.workers.update({worker: state for worker, state in new_states.items() if present[worker]})
            if self.algorithm.needs_drift:
                self.previous = x.clone()
            outcome = self._answered(outcome, estimate, messages[0])
        for observer in self.observers:
            observer(outcome)
        return outcome

    def _agreed(self, round: Round, trusted: Tensor | None) -> Round:
        """The round with rank 0's drift and trusted gradient: every rank's decisions are to be the same."""
        if round.drift is not None:
            round = round._replace(drift=self.transport.agree(round.drift))
        if trusted is not None:
            trusted = self.transport.agree(trusted)
            round = round._replace(trusted=trusted if bool(all_finite(trusted)) else None)
        return round

    def _answered(self, outcome: Outcome, estimate: Tensor, message: Message) -> Outcome:
        """The outcome with its estimate, as a worker decodes what the server sends."""
        down = self.algorithm.downlink(outcome.round)
        answer = down.encode(estimate, outcome.round.shared("downlink", estimate.device))
        server, rows, round = self.server, outcome.rows, outcome.round
        return outcome._replace(
            estimate=down.decode(answer, len(estimate)),
            look=lambda: self.algorithm.seen(rows, server, round),
            bytes_down=self.transport.bytes_down(message, answer),
        )

    def _decoded(self, received: Sequence[Message], present: Tensor, codec: Compressor, like: Tensor) -> Tensor:
        """The messages as rows ``[n, d]``, in memory that the next round uses again; absent rows are 0."""
        dim = len(like)
        vectors = [
            codec.decode(payload, dim) if here else None for here, (_, payload) in zip(present.tolist(), received, strict=True)
        ]
        together = _side_by_side(vectors)
        if together is not None:
            return together
        if (
            self._rows is None
            or self._rows.shape != (len(vectors), dim)
            or self._rows.dtype != like.dtype
            or self._rows.device != like.device
        ):
            self._rows = like.new_empty(len(vectors), dim)
        for row, vector in zip(self._rows, vectors, strict=True):
            row.zero_() if vector is None else row.copy_(vector)
        return self._rows

    # -- checkpoint ---------------------------------------------------------------------------------------------------

    def server_state(self) -> dict[str, Any]:
        """The server's half and the round number, as plain containers of tensors."""
        return {
            "step": self.step,
            "dim": self.dim,
            "server": None if self.dim is None else self.server._asdict(),
            "previous": self.previous,
        }

    def worker_states(self) -> dict[int, dict[str, Tensor]]:
        """The local workers' halves, by worker, as plain containers of tensors."""
        return {worker: state._asdict() for worker, state in self.workers.items()}

    def load(self, server: dict[str, Any], workers: dict[int, dict[str, Tensor]], like: Tensor) -> None:
        """Restores what `server_state` and `worker_states` gave; workers that are missing start afresh.

        Args:
            server: from `server_state`.
            workers: from `worker_states` of every rank; only the local ones are read.
            like: an example of a gradient, for its device.
        """
        self.step = server["step"]
        self.dim, self.workers, self.server, self.previous = None, {}, None, None
        if server["dim"] is None:
            return
        self._start(like.new_zeros(server["dim"]))
        self.server = _restored(self.server, server["server"], "server")
        previous = server.get("previous")
        self.previous = None if previous is None else previous.to(like)
        for worker in self.transport.workers:
            if worker in workers:
                self.workers[worker] = _restored(self.workers[worker], workers[worker], f"worker {worker}")


def _side_by_side(vectors: Sequence[Tensor | None]) -> Tensor | None:
    """Vectors that lie in one storage at equal distances, as a matrix without a copy; else None."""
    first = vectors[0]
    if first is None or len(vectors) < 2:
        return None
    starts = []
    for vector in vectors:
        if vector is None or vector.stride() != (1,) or vector.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        starts.append(vector.storage_offset())
    gap = starts[1] - starts[0]
    if gap < len(first) or any(b - a != gap for a, b in itertools.pairwise(starts)):
        return None
    return torch.as_strided(first, (len(vectors), len(first)), (gap, 1))


def _is_finite(grads: Gradients | None) -> TypeGuard[Gradients]:
    """Whether there are gradients, and all of them finite."""
    return grads is not None and all(bool(all_finite(part)) for part in grads if part is not None)


def _flags(present: bool, used: Tensor) -> Tensor:
    return torch.cat([torch.tensor([present], device=used.device), used]).to(torch.uint8)


def _restored(fresh: Any, saved: dict[str, Tensor], owner: str) -> Any:
    shapes = {name: tuple(value.shape) for name, value in fresh._asdict().items()}
    found = {name: tuple(value.shape) for name, value in saved.items()}
    if shapes != found:
        raise ValueError(
            f"The checkpoint's state of the {owner} should have the tensors {shapes}. Found {found}. It belongs to another "
            "algorithm, or to other settings of it. Use the settings that the checkpoint was written with, or start a new run "
            "from its weights: Model.load_from_checkpoint(path)."
        )
    return type(fresh)(*(saved[name].to(getattr(fresh, name)) for name in shapes))
