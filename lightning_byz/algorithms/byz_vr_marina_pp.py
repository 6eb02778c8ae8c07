"""Byz-VR-MARINA-PP: variance reduction, client sampling and clipped differences; and the clipping
alone, for other methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_byz.aggregators import NNM, Aggregator, Chain, Mean, TooFewRowsError, TrimmedMean
from lightning_byz.algorithms.base import Algorithm, NoState, among, draw
from lightning_byz.algorithms.robust_sgd import RobustSGD
from lightning_byz.compressors import Compressor, Identity
from lightning_byz.numerics.rows import Rows
from lightning_byz.types import Gradients, Payload, Round

Unit = Literal["drift", "estimate"]

_UNLIMITED = torch.finfo(torch.float64).max


class ServerState(NamedTuple):
    """What the server remembers.

    Attributes:
        g: the estimate, ``[d]``.
        base: what the last round's clipped rows were added to, ``[d]``: the estimate before it, or
            0 in a full round.
        lam: the norm that they were clipped to, a 0-d tensor; the largest float64 without clipping.
    """

    g: Tensor
    base: Tensor
    lam: Tensor


class _Clipped(Algorithm):
    """What Byz-VR-MARINA-PP and its heuristic for other methods share: an estimate that moves by
    clipped rows.

    Subclasses say which rounds are full ones, and whether rows are differences already.
    """

    needs_drift = True

    clipping: float | None
    clipping_unit: Unit
    cohort_size: int | None
    difference_aggregator: Aggregator | None

    def check_clipping(self) -> None:
        """Raises unless the fields that all subclasses have make sense."""
        name = type(self).__name__
        if self.clipping is not None and not self.clipping > 0:
            raise ValueError(
                "`clipping` should be positive, or None for no clipping. Found "
                f"clipping={self.clipping}."
            )
        if self.clipping_unit not in ("drift", "estimate"):
            raise ValueError(
                f"`clipping_unit` should be 'drift' or 'estimate'. Found {self.clipping_unit!r}."
            )
        if self.cohort_size is not None and self.cohort_size < 1:
            raise ValueError(
                f"`cohort_size` of {name} should be at least 1. Found {self.cohort_size}."
            )
        if self.difference_aggregator is not None and not isinstance(
            self.difference_aggregator, Aggregator
        ):
            raise TypeError(
                f"`difference_aggregator` of {name} should be an instance of Aggregator. Found "
                f"{self.difference_aggregator!r}."
            )

    def is_full(self, round: Round) -> bool:
        """Whether this round makes the estimate anew; the first one always does."""
        return round.drift is None

    def full_size(self, n: int) -> int:
        """How many workers take part in a full round."""
        return n

    def difference_rule(self, n: int) -> Aggregator:
        """The rule of the other rounds, which see the cohort only, with an f of its own."""
        size, rule = self.cohort_size or n, self.difference_aggregator
        if rule is not None and rule.f is not None:
            return rule
        rule = rule or self.aggregator
        return rule.with_f(min(self.aggregator.f or 0, rule.most_f(size)))

    def most_f(self, n: int) -> int:
        return self.aggregator.most_f(self.full_size(n))

    def check(self, n: int) -> None:
        size, full = self.cohort_size or n, self.full_size(n)
        if not 1 <= size <= full <= n:
            raise ValueError(
                f"{type(self).__name__} draws its cohorts from the n workers: 1 <= cohort_size <= "
                f"full_cohort_size <= n. Found cohort_size={size}, full_cohort_size={full}, n={n}."
            )
        self.aggregator.check(full)
        if self.difference_aggregator is None and self.aggregator.most_f(size) < 0:
            raise ValueError(
                f"The rounds between the full ones see {size} rows. Found {self.aggregator!r}, "
                "which cannot take so few. Give another `difference_aggregator`, such as "
                "CoordinateMedian(f=0), or a larger `cohort_size`."
            )
        self.difference_rule(n).check(size)

    def cohort(self, round: Round) -> Tensor:
        return draw(
            round, self.full_size(round.n) if self.is_full(round) else self.cohort_size or round.n
        )

    def rule(self, round: Round) -> Aggregator:
        return self.aggregator if self.is_full(round) else self.difference_rule(round.n)

    def init_server(self, x: Tensor, n: int) -> ServerState:
        return ServerState(
            torch.zeros_like(x),
            torch.zeros_like(x),
            x.new_full((), _UNLIMITED, dtype=torch.float64),
        )

    def limit(self, g: Tensor, rows: Rows, round: Round) -> Tensor:
        """lambda_{k+1}, the norm that rows are clipped to: a 0-d float64 tensor. ``g [d]`` is the
        estimate so far.
        """
        if self.clipping is None:
            return torch.full((), _UNLIMITED, dtype=torch.float64, device=g.device)
        assert round.drift is not None
        length = round.drift if self.clipping_unit == "drift" else rows.norm(g)
        return self.clipping * length

    def differences(self, rows: Rows, base: Tensor) -> Rows:
        """The rows as differences to the estimate so far; those of workers that are not present
        stay 0.
        """
        return rows

    def server(self, rows: Rows, state: ServerState, round: Round) -> tuple[Tensor, ServerState]:
        rule, cohort = self.rule(round), self.cohort(round)
        if self.is_full(round):
            g = rule(*among(rows, round, cohort))
            state = self.init_server(g, round.n)._replace(g=g)
            return g.clone(), state
        lam = self.limit(state.g, rows, round)
        here, present = among(rows, round, cohort)
        if (
            self.clipping is not None and present is not None
        ):  # the cohort may be Byzantine as a whole: f is what its speakers allow
            here, heard = here.select(present), int(present.sum())
            most = rule.most_f(heard)
            if heard == 0 or most < 0:
                raise TooFewRowsError(
                    f"{type(rule).__name__} cannot take the {heard} rows of {int(cohort.sum())} "
                    "that were heard."
                )
            rule, present = rule.with_f(min(rule.f or 0, most)), torch.ones(heard, dtype=torch.bool)
        g = state.g + rule(clipped(self.differences(here, state.g), lam), present)
        return g.clone(), ServerState(g, state.g, lam)

    def seen(self, rows: Rows, state: ServerState, round: Round) -> Rows:
        if self.is_full(round):
            return rows
        steps = clipped(self.differences(rows, state.base), state.lam)
        return steps.with_values(state.base + steps.dense())


def clipped(rows: Rows, lam: Tensor) -> Rows:
    """Every row scaled down to norm ``lam`` at most (0-d): ``min(1, lam / ||x_i||) x_i``, and 0 for
    x_i = 0.
    """
    norms = rows.norms()
    factors = torch.where(norms > lam, lam / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0)
    # In float64, where the factor of a row of 3e38 is not rounded to 0 and its product has no error
    # worth a name.
    values = (
        (rows.dense().double() * factors[:, None]).to(rows.values.dtype)
        if bool((factors < 1).any())
        else rows.dense()
    )
    return rows.with_values(values)


@dataclass(frozen=True)
class ByzVRMarinaPP(_Clipped):
    """Now and then a full gradient; between, compressed and clipped differences of a few sampled
    workers.

    With a common coin c of probability p, at parameters x that were x' a round before:

    * c = 1: workers of a cohort of C-hat send their full gradients, uncompressed;
      ``g = Agg({grad f_i(x)})``;
    * c = 0: workers of a cohort of C send ``Q(grad_i(x) - grad_i(x'))``, both of the *same*
      minibatch; ``g = g + Agg({clip_lam(Q_i)})`` with ``lam = clipping * ||x - x'||``.

    arXiv 2311.14127 (NeurIPS 2024), Algorithm 1. The server clips, as Byzantine workers would not,
    so that ``||g_{k+1} - g_k|| <= F_A lam_{k+1}`` (F_A = 1 for Krum and the geometric median,
    sqrt(2) for the median) even where the cohort holds Byzantine workers only.
    ``cohort_size=None, clipping=None`` is Byz-VR-MARINA (arXiv 2206.00529);
    ``average_differences=True`` is Byz-VR-MARINA-PP+ (Algorithm 3); ``full_batches`` is Algorithms
    4 and 5. The first round is a full one (the paper takes any g_0).

    It is for plain SGD: momentum, weight decay or an adaptive step in the optimizer count as part
    of the drift ``||x - x'||``, which is measured. BatchNorm statistics are not clipped; prefer
    GroupNorm or LayerNorm with small cohorts.

    Args:
        aggregator: the rule of full rounds, whose f is of the C-hat workers there. Default: NNM and
            a trimmed mean, as elsewhere in this package; the paper's is
            ``Chain(pre=(Bucketing(),), rule=CoordinateMedian())``, which tolerates nobody among 4.
        difference_aggregator: the rule of the other rounds, with its f of the C workers there.
            None: ``aggregator``, with as much of its f as C rows allow: 4 sampled workers in
            buckets of 2 are 2 rows, and f = 0. Clipping is the safeguard then.
        compressor: Q, unbiased, such as `RandK` or `QSGD`.
        p: probability of a full round, in (0, 1]. Theory: about
            ``min(C / n, batch / samples of a worker, 1 / (1 + omega))``; the authors' code makes
            one at the start of every epoch.
        cohort_size: C; None: all workers take part.
        full_cohort_size: C-hat; None: all workers.
        clipping: the paper's lambda (alpha_k = lambda): 2L in theory; 0.1, 1 and 10 in its
            experiments. Too large is no protection, too small lets g lag behind the gradient. None:
            no clipping.
        clipping_unit: "drift": lam = clipping * ||x - x'||, the paper's. "estimate": lam = clipping
            * ||g||, that of the authors' code, where the learning rate is missing: clipping there
              is the paper's lambda times the learning rate.
        average_differences: a plain mean instead of ``difference_aggregator`` (PP+).
        full_batches: how many batches make a full gradient; None: all of the worker's data.
    """

    needs_previous = True

    aggregator: Aggregator = field(default_factory=lambda: Chain(pre=(NNM(),), rule=TrimmedMean()))
    difference_aggregator: Aggregator | None = None
    compressor: Compressor = field(default_factory=Identity)
    p: float = 0.1
    cohort_size: int | None = None
    full_cohort_size: int | None = None
    clipping: float | None = 10.0
    clipping_unit: Unit = "drift"
    average_differences: bool = False
    full_batches: int | None = None

    def __post_init__(self) -> None:
        self.check_parts()
        self.check_clipping()
        if not 0 < self.p <= 1:
            raise ValueError(
                f"`p` is the probability of a full round, in (0, 1]. Found p={self.p}."
            )
        if self.full_batches is not None and self.full_batches < 1:
            raise ValueError(
                "`full_batches` should be at least 1, or None for all data. Found "
                f"{self.full_batches}."
            )
        if self.average_differences and self.difference_aggregator is not None:
            raise ValueError(
                "`average_differences` takes the mean in place of `difference_aggregator`. Found "
                f"difference_aggregator={self.difference_aggregator!r} as well. Give one of the "
                "two."
            )
        if not self.compressor.unbiased:
            raise ValueError(
                f"ByzVRMarinaPP needs an unbiased compressor. Found {self.compressor!r}. Use "
                "RandK(ratio=0.1) or QSGD(), or ByzEF21SGDM for biased ones."
            )

    def full_size(self, n: int) -> int:
        return self.full_cohort_size or n

    def is_full(self, round: Round) -> bool:
        coin = torch.rand((), generator=round.shared("coin"), dtype=torch.float64)
        return round.drift is None or bool(coin < self.p)

    def full_gradient(self, round: Round) -> bool:
        return self.is_full(round)

    def difference_rule(self, n: int) -> Aggregator:
        return Mean() if self.average_differences else super().difference_rule(n)

    def codec(self, round: Round) -> Compressor:
        return Identity() if self.is_full(round) else self.compressor

    def init_worker(self, x: Tensor) -> NoState:
        return NoState()

    def worker(self, grads: Gradients, state: NoState, round: Round) -> tuple[Payload, NoState]:
        if self.is_full(round):
            return (grads.current,), state
        assert grads.previous is not None
        difference = grads.current - grads.previous
        return self.compressor.encode(
            difference, round.private("compressor", difference.device)
        ), state


@dataclass(frozen=True)
class ClippedDifferences(_Clipped):
    """Any robust method with client sampling: what workers send is clipped around the last
    estimate.

    ``g = g + Agg({clip_lam(m_i - g)})`` over a cohort of C sampled workers, where m_i is what
    worker i sends in ``inner``, and ``x = x - lr g``. Heuristic (10) of arXiv 2311.14127; the
    paper's neural networks use it with momentum at the workers. The first round has everybody and
    no clipping, as in the authors' code. A worker that is not sampled leaves its momentum as it is.

    Args:
        inner: the method: RobustSGD without server momentum and without undone worker momentum. Its
            rule, with its f of all n workers, is that of the first round.
        difference_aggregator: the rule of the later rounds, with its f of the C workers there.
            None: ``inner``'s, with as much of its f as C rows allow.
        cohort_size: C; None: all workers take part.
        clipping: lambda. None: no clipping.
        clipping_unit: "estimate": lam = clipping * ||g||, as in the authors' code, with 0.1 to 10.
            "drift": lam = clipping * ||x - x'||, as in the paper; but ``m_i - g`` does not shrink
            with the step as differences of gradients do, so that clipping = 1 and a learning rate
            of 0.01 let g move by 1% of its norm in a round.
        aggregator: the rule of the first round, in place of ``inner``'s.
    """

    inner: RobustSGD = field(default_factory=lambda: RobustSGD(worker_momentum=0.9))
    difference_aggregator: Aggregator | None = None
    cohort_size: int | None = None
    clipping: float | None = 1.0
    clipping_unit: Unit = "estimate"
    aggregator: Aggregator = None  # type: ignore[assignment]  # filled in below

    def __post_init__(self) -> None:
        self.check_clipping()
        if (
            not isinstance(self.inner, RobustSGD)
            or self.inner.server_momentum
            or self.inner.undo_worker_momentum
        ):
            raise ValueError(
                "ClippedDifferences aggregates what workers send and nothing else, so its "
                "`inner` should be RobustSGD with server_momentum=0 and "
                f"undo_worker_momentum=False. Found {self.inner!r}."
            )

        object.__setattr__(self, "aggregator", self.aggregator or self.inner.aggregator)
        object.__setattr__(self, "inner", replace(self.inner, aggregator=self.aggregator))
        self.check_memory()

    def for_sizes(self, sizes: Sequence[int]) -> ClippedDifferences:
        return replace(self, inner=self.inner.for_sizes(sizes))

    def codec(self, round: Round) -> Compressor:
        return self.inner.codec(round)

    def init_worker(self, x: Tensor) -> Any:
        return self.inner.init_worker(x)

    def worker(self, grads: Gradients, state: Any, round: Round) -> tuple[Payload, Any]:
        return self.inner.worker(grads, state, round)

    def differences(self, rows: Rows, base: Tensor) -> Rows:
        return rows.with_values(rows.dense() - base)
