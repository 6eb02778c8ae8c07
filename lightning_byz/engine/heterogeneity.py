"""How unlike the workers' data are: what of the differences between rows does not average out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_byz.algorithms import Algorithm, RobustSGD
from lightning_byz.compressors import Identity
from lightning_byz.engine.outcome import Outcome
from lightning_byz.numerics.rows import Rows
from lightning_byz.types import keyed_generator

UNLIKE = 0.5
"""From here on rules that drop rows lose what only some workers' data say
(docs/default-algorithm.md): Dirichlet(1) has 0.38 there, Dirichlet(0.3) 0.51, Dirichlet(0.1) 0.56.
"""

ENOUGH = 5
"""Estimates, before anybody is told."""

_EVERY = 10
_COLUMNS = 4096
_KEPT = 0.9


class _Looked(NamedTuple):
    """What was seen in the first round of a pair.

    Attributes:
        turn: which round it was, of those that count.
        workers: ``[m]`` that spoke.
        columns: ``[k]`` the columns that were looked at.
        rows: ``[m, k]`` float64, theirs in these columns.
        whole: whether all of it is here; else columns of other slices are 0.
    """

    turn: int
    workers: Tensor
    columns: Tensor
    rows: Tensor
    whole: bool


class Heterogeneity:
    """An estimate of how much workers' gradients differ for their data, beside batches' noise.

    With g_i worker i's gradient of one batch, it is ``H / (H + N)``: H is the squared distance
    between two workers' expected gradients, N the squared distance that the noise of two batches
    makes. It is near 0 where all draw from one distribution, and near 1 where data differ much, or
    batches are large. Finite shares of the same data are different data, too.

    Rows are averages of a worker's gradients, as `RobustSGD` makes them, with weight beta of the
    past. After t gradients, each of which has noise of variance V, the average's is ``v(t) V``,
    with ``v(t) = (1 - beta) / (1 + beta) (1 + beta^t) / (1 - beta^t)``. So between two workers
    ``E ||m_i - m_j||^2 = H + (v(t_i) + v(t_j)) N / 2``. Noise is new in every round, so a row's
    change tells how much of it there is: ``m(t+1) - m(t) = a (g(t+1) - m(t))`` with ``a = (1 -
    beta) / (1 - beta^(t+1))``, and ``E ||m(t+1) - m(t)||^2 = a^2 (1 + v(t)) N / 2``.

    N is the median over the workers, H the median over the workers of the (upper) median to the
    others. So fewer than half of the workers cannot lower it: N is between those of honest ones,
    and so is H where all liars are near. They can raise it up to 1, by being unlike the others. The
    drift of gradients, as the model moves, counts as noise.

    Two rounds in succession of every ten are looked at, the first two at once, in 4,096 columns,
    and averaged over some hundred rounds; those of which more than 2f workers, and three, have
    spoken in both. Of an optimizer that evaluates its closure several times a step, an evaluation
    that another one replaces is no round.

    Args:
        algorithm: the run's. Only uncompressed `RobustSGD` has rows that are moving averages.
        seed: of the columns that are looked at.

    Attributes:
        estimates: how many there were.
    """

    def __init__(self, algorithm: Algorithm, seed: int = 0) -> None:
        self.seed, self.estimates = seed, 0
        fits = isinstance(algorithm, RobustSGD) and isinstance(algorithm.compressor, Identity)
        self._algorithm = algorithm if fits else None
        self._beta = algorithm.worker_momentum if isinstance(algorithm, RobustSGD) else 0.0
        self._turn = 0  # of the next round
        self._rounds: Tensor | None = None  # [n] int64: by worker, the gradients in its average
        self._counted: Tensor | None = None  # [n] bool: who spoke in the last round, if it counted
        self._last: _Looked | None = None
        self._sum = self._weight = 0.0  # of the estimates, each weighing more than those before

    @property
    def value(self) -> float | None:
        """In [0, 1]; None before the first estimate."""
        return self._sum / self._weight if self.estimates else None

    def observe(self, outcome: Outcome) -> None:
        """Looks at a round, where it is one to look at; on all ranks or on none."""
        self._counted = None
        if outcome.estimate is None:
            return
        self._counted = spoke = _spoke(outcome)
        self._rounds = spoke.long() if self._rounds is None else self._rounds + spoke
        turn, self._turn = self._turn, self._turn + 1
        if self._algorithm is None or turn % _EVERY > 1:
            return
        last, self._last = self._last, None
        rows, workers = outcome.seen.select(spoke), spoke.nonzero().flatten()
        index = self._index(rows)
        held, columns = rows.holds(index), rows.columns(index)
        values = columns.wide() * columns.unit
        if turn % _EVERY == 0:
            whole = values.new_zeros(len(values), len(index))
            whole[:, held] = values
            self._last = _Looked(turn, workers, index, whole, whole=False)
        elif last is not None and last.turn == turn - 1 and torch.equal(last.columns, index):
            common = torch.isin(workers, last.workers), torch.isin(last.workers, workers)
            now, before = values[common[0].to(values.device)], last.rows[common[1]]
            if len(now) > max(2, 2 * (outcome.rule.f or 0)):
                of_common = self._rounds[workers[common[0]]].to(now)
                self._estimate(rows, now, before.to(now)[:, held], of_common)

    def _index(self, rows: Rows) -> Tensor:
        """``[k]`` int64, increasing: the columns that are looked at, always the same."""
        dim = rows.values.shape[1] if rows.dim is None else rows.dim
        if dim <= _COLUMNS:
            return torch.arange(dim)
        draws = keyed_generator("heterogeneity", self.seed)
        return torch.randint(dim, (_COLUMNS,), generator=draws).sort().values

    def _estimate(self, rows: Rows, now: Tensor, before: Tensor, t: Tensor) -> None:
        """From the same workers' columns here in two rounds in succession, ``[m, k]`` each.

        Args:
            rows: of the second round, whose slices these are.
            now: in the second round.
            before: in the first.
            t: ``[m]`` the gradients in each average, in the second round.
        """
        gain = (1 - self._beta) / (1 - self._beta**t)
        changes = rows.sum((now - before).square().sum(1))
        noise = (2 * changes / (gain.square() * (1 + self._variance(t - 1)))).median()
        products = rows.sum(now @ now.T)  # over all slices of columns
        squares, part = products.diagonal(), self._variance(t) / 2
        distances = squares + squares[:, None] - 2 * products
        # those of rows whose squares no number holds are nan
        distances = distances.nan_to_num(nan=math.inf, posinf=math.inf)
        distances = distances - (part + part[:, None]) * noise
        to_others = distances.fill_diagonal_(-math.inf).sort(dim=1).values[:, 1:]
        data = to_others[:, (len(now) - 1) // 2].median()
        noise, data = rows.agree(torch.stack([noise, data])).tolist()
        data = max(0.0, data) if math.isfinite(data) else data
        if not 0 < data + noise < math.inf:
            return
        self._sum = _KEPT * self._sum + data / (data + noise)
        self._weight = _KEPT * self._weight + 1
        self.estimates += 1

    def _variance(self, t: Tensor) -> Tensor:
        """Of an average of t gradients, over that of one."""
        past = self._beta**t
        return (1 - self._beta) / (1 + self._beta) * (1 + past) / (1 - past)

    def repeat(self) -> None:
        """The round that comes next takes the last one's place."""
        self._last = None
        if self._counted is not None and self._rounds is not None:
            self._rounds, self._turn = self._rounds - self._counted.long(), self._turn - 1
        self._counted = None

    def state(self, total: Callable[[Tensor], Tensor] | None) -> dict[str, Any]:
        """What goes into a checkpoint.

        Args:
            total: adds up a tensor over the slices of columns; None: they cannot be added up, and
                the first round of a pair is left out.
        """
        last = None
        if total is not None and self._last is not None:
            rows = self._last.rows if self._last.whole else total(self._last.rows)
            last = self._last._replace(rows=rows.cpu(), whole=True)._asdict()
        return {
            "estimates": self.estimates,
            "sum": self._sum,
            "weight": self._weight,
            "turn": self._turn,
            "rounds": None if self._rounds is None else self._rounds.tolist(),
            "last": last,
        }

    def load(self, saved: Mapping[str, Any] | None, known: Set[int], n: int, step: int) -> None:
        """Restores what `state` gave.

        Args:
            saved: from `state`; None: of a run that did not count, whose averages are old.
            known: the workers that go on with their averages; those of others are new.
            n: the number of workers.
            step: the number of rounds before.
        """
        saved = saved or {"rounds": [step] * n, "turn": step}
        self.estimates, self._turn = saved.get("estimates", 0), saved["turn"]
        self._sum, self._weight = saved.get("sum", 0.0), saved.get("weight", 0.0)
        rounds, last = saved["rounds"], saved.get("last")
        if rounds is not None:
            self._rounds = torch.tensor([t if w in known else 0 for w, t in enumerate(rounds)])
        if last is not None and known >= set(last["workers"].tolist()):
            self._last = _Looked(**last)


def _spoke(outcome: Outcome) -> Tensor:
    """``[n]`` bool: the workers that spoke."""
    present, cohort = outcome.round.present, outcome.round.cohort
    assert present is not None
    return (present if cohort is None else present & cohort).cpu()
