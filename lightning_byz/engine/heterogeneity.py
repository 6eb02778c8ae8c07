"""How unlike the workers' data are: what of the differences between rows does not average out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_byz.algorithms import Algorithm, RobustSGD
from lightning_byz.compressors import Identity
from lightning_byz.engine.outcome import Outcome
from lightning_byz.numerics.rows import Rows
from lightning_byz.types import keyed_generator

UNLIKE = 0.4
"""From here on rules that drop rows lose what only some workers' data say
(docs/default-algorithm.md): Dirichlet(1) has about 0.3, Dirichlet(0.3) 0.5, Dirichlet(0.1) 0.7.
"""

ENOUGH = 5
"""Estimates, before anybody is told."""

_EVERY = 10
_COLUMNS = 4096
_KEPT = 0.9


class _Looked(NamedTuple):
    """What was seen in the first round of a pair.

    Attributes:
        step: the round.
        workers: ``[m]`` that spoke.
        rows: ``[m, k]`` float64, theirs in the columns that are looked at; what is not held here
            may be 0.
    """

    step: int
    workers: Tensor
    rows: Tensor


class Heterogeneity:
    """An estimate of how much workers' gradients differ for their data, beside batches' noise.

    With g_i worker i's gradient of one batch, it is ``H / (H + N)``: H is the squared distance
    between two workers' expected gradients, N the squared distance that the noise of two batches
    makes. It is near 0 where all draw from one distribution, and near 1 where data differ much, or
    batches are large. Finite shares of the same data are different data, too.

    Rows are averages of a worker's gradients, as `RobustSGD` makes them, with weight beta of the
    past. After t gradients, each of which has noise of variance V, the average's is ``v_t V``, with
    ``v_t = (1 - beta) / (1 + beta) (1 + beta^t) / (1 - beta^t)``. So between two workers
    ``E ||m_i - m_j||^2 = H + v_t N``. Noise is new in every round, so a row's change tells how much
    of it there is: ``m_(t+1) - m_t = a (g_(t+1) - m_t)`` with ``a = (1 - beta) / (1 -
    beta^(t+1))``, and ``E ||m_(t+1) - m_t||^2 = a^2 (1 + v_t) N / 2``.

    Changes are the median over the workers, distances the median over the workers of the median to
    the others, so that fewer than half of the workers cannot make it what they like; liars still
    make it larger, as they differ. The drift of gradients, as the model moves, counts as noise.

    Two rounds in succession of every ten are looked at, the first two at once, in 4,096 columns,
    and averaged over some hundred rounds.

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
        self._rounds = 0  # that gave an estimate
        self._last: _Looked | None = None
        self._sum = self._weight = 0.0  # of the estimates, each weighing more than those before

    @property
    def value(self) -> float | None:
        """In [0, 1]; None before the first estimate."""
        return self._sum / self._weight if self.estimates else None

    def observe(self, outcome: Outcome) -> None:
        """Looks at a round, where it is one to look at; on all ranks or on none."""
        if self._algorithm is None or outcome.estimate is None:
            return
        self._rounds += 1
        step = outcome.round.step
        if step % _EVERY > 1:
            return
        workers, seen = _spoken(outcome)
        if len(workers) < 3:
            self._last = None
            return
        index = self._index(seen)
        held = seen.holds(index)
        columns = seen.columns(index)
        values = columns.wide() * columns.unit
        last, self._last = self._last, None
        if step % _EVERY == 0:
            whole = values.new_zeros(len(values), len(index))
            whole[:, held] = values
            self._last = _Looked(step, workers, whole)
        elif last is not None and last.step == step - 1:
            common = torch.isin(workers, last.workers), torch.isin(last.workers, workers)
            now, before = values[common[0].to(values.device)], last.rows[common[1]]
            self._estimate(seen, now, before.to(now)[:, held])

    def _index(self, rows: Rows) -> Tensor:
        """``[k]`` int64, increasing: the columns that are looked at, always the same."""
        dim = rows.values.shape[1] if rows.dim is None else rows.dim
        if dim <= _COLUMNS:
            return torch.arange(dim)
        draws = keyed_generator("heterogeneity", self.seed)
        return torch.randint(dim, (_COLUMNS,), generator=draws).sort().values

    def _estimate(self, rows: Rows, now: Tensor, before: Tensor) -> None:
        """From the same workers' columns here in two rounds in succession, ``[m, k]`` each."""
        if len(now) < 3:
            return
        products = rows.sum(now @ now.T)  # over all slices of columns
        changes = rows.sum((now - before).square().sum(1))
        squares = products.diagonal()
        distances = squares + squares[:, None] - 2 * products
        to_others = distances.fill_diagonal_(-1.0).sort(dim=1).values[:, 1:]
        between = to_others.median(dim=1).values.median()
        apart, changed = rows.agree(torch.stack([between, changes.median()])).tolist()
        gain = (1 - self._beta) / (1 - self._beta**self._rounds)
        noise = 2 * changed / (gain**2 * (1 + self._variance(self._rounds - 1)))
        data = max(0.0, apart - self._variance(self._rounds) * noise)
        if not 0 < data + noise < math.inf:
            return
        self._sum = _KEPT * self._sum + data / (data + noise)
        self._weight = _KEPT * self._weight + 1
        self.estimates += 1

    def _variance(self, t: int) -> float:
        """Of an average of t gradients, over that of one."""
        past = self._beta**t
        return (1 - self._beta) / (1 + self._beta) * (1 + past) / (1 - past)

    def repeat(self) -> None:
        """The round that comes next takes the last one's place."""
        self._rounds, self._last = self._rounds - 1, None

    def state(self, total: Callable[[Tensor], Tensor] | None) -> dict[str, Any]:
        """What goes into a checkpoint.

        Args:
            total: adds up a tensor over the slices of columns; None: they cannot be added up, and
                the first round of a pair is left out.
        """
        last = None
        if total is not None and self._last is not None:
            last = self._last._replace(rows=total(self._last.rows).cpu())._asdict()
        return {
            "estimates": self.estimates,
            "rounds": self._rounds,
            "sum": self._sum,
            "weight": self._weight,
            "last": last,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restores what `state` gave."""
        self.estimates, self._rounds = saved["estimates"], saved["rounds"]
        self._sum, self._weight = saved["sum"], saved["weight"]
        self._last = None if saved["last"] is None else _Looked(**saved["last"])


def _spoken(outcome: Outcome) -> tuple[Tensor, Rows]:
    """The workers that spoke, and their rows."""
    present, cohort = outcome.round.present, outcome.round.cohort
    assert present is not None
    spoke = present if cohort is None else present & cohort
    return spoke.nonzero().flatten(), outcome.seen.select(spoke)
