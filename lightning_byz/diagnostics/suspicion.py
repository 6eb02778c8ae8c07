"""Which worker is lying? A sequential test on what workers send, with a false-alarm rate that the
user sets. No truth is needed.

**What is measured.** Of every worker's row in two consecutive rounds (a *pair*): its distance to
the others' rows, its cosine with them, its norm, and how far it moved between the two rounds. A
flipped exponent bit or a wrong scale shows in the first or the third, wrong labels in the second, a
stuck worker in the last.

**Who is more extreme, whatever f others send.** A worker's norm and change are its own. Its
distance and cosine are not: f workers that know its row can move it away from, say, the mean of all
rows, in the direction of its own noise. So two workers i and j are compared by what they are to
each third worker k. ``c_ik`` is the cosine of i and k (or the logarithm of their distance). i has a
larger mean cosine with the honest workers than j, whoever they are, if ``c_ik - c_jk`` adds up to
more than 0 over the n - f - 2 workers k where it is smallest: for the others of i, j and the honest
ones are at least so many, and ``c_ij`` counts for both. Only then it counts as larger. With n = 3
no third worker is sure to be honest, and norms and changes alone can accuse.

**The test.** Every worker is bet against. A bet says "this worker is among the b most extreme ones
of this pair": all but b - 1 others are less extreme, in the sense above (b = 1 .. f; most and
least; each of the four numbers). If honest workers' rows are exchangeable given the past, that has
probability at most b / (n - f) for an honest one, *whatever up to f other workers send, and if they
know everybody's rows*: it implies that the worker is among the b most extreme honest ones, compared
with honest ones. A bet of a part lam of the wealth multiplies it by ``1 - lam + lam (n - f) / b``
if it is won and by ``1 - lam`` if not, so that it does not grow in expectation. The wealth of all
bets together, each begun at every pair t with the part 1 / (t (t + 1)) of a capital of 1 (so that a
fault may set in at any time), is a nonnegative supermartingale that starts at 1. By Ville's
inequality it ever reaches 1 / a with probability at most a. A worker is accused when its wealth
reaches 2 n / rate (2, for there is a second test below); so *in a run of honest workers, beside up
to f others, any of them is ever accused with probability at most the rate*, however long it runs.
(Betting and e-processes: Shafer, JRSS A 2021; Ramdas, Grunwald, Vovk, Shafer, Statistical Science
2023, arXiv 2210.01948.)

**The assumptions.** compare="others": workers draw from one pool of data (DDP's usual sampler, that
shuffles), and what a row holds is fresh in every pair, so that momentum of earlier pairs has faded.
Drawing without replacement, and parts of the data that a worker keeps, break this a little or a lot
(docs/suspicion.md says what was measured).

compare="own_past": for workers with data of their own. Who has unusual data is always extreme, and
nothing is exchangeable. Instead every worker's numbers, relative to the median worker's of the same
pair, are compared with its own of up to 50 earlier pairs, and at least 15: the bet is that one lies
more than 8 scaled median absolute deviations (its own, and the median worker's) from their median,
and farther than any other worker's. An honest worker is *assumed* to do that with probability at
most 1/50 a pair, given the past. This finds changes; a worker that was faulty from the first pair
on is its own normal. When a worker is accused, all pasts begin anew. It is for faults, not for
lies: workers that know an honest one's row can break the assumption, so that here an accusation is
evidence and no proof.

**Gross faults.** In both, a second test bets that a row is not finite, or its norm ``gross`` times
that of the median worker, or its distance to the others ``gross`` times that of most others, again
whoever the f are. An honest worker is assumed to do that with probability at most 1/1000 a round.
Two such rounds in a row accuse.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Compare = Literal["others", "own_past"]

STATISTICS = ("distance", "cosine", "norm", "change")
_STAKES = (0.25, 0.5, 0.9)
_GROSS_PROBABILITY, _GROSS_STAKE = 1e-3, 0.5
_RICH = 1e30
"""More is not kept: it would take as long to lose again."""
_ROUNDING = 1e-9
"""Numbers that differ by less are equal: rows of the same bits may differ by the order of sums."""
_FAR = 1e6
"""Stands for an infinite logarithm."""
_SHOWN = 10
"""An accusation shows what was measured in so many pairs."""
_MEMORY, _WARM_UP, _DEVIATIONS, _DEVIATION_PROBABILITY = 50, 15, 8.0, 0.02

_REASONS = {
    (
        "distance",
        "high",
    ): "its gradient lies farther from the others' than they lie from each other",
    ("distance", "low"): "its gradient lies closer to the others' than they lie to each other",
    ("cosine", "high"): "its gradient agrees with the others' more than they agree with each other",
    ("cosine", "low"): "its gradient points away from the others'",
    ("norm", "high"): "its gradient is longer than the others'",
    ("norm", "low"): "its gradient is shorter than the others'",
    ("change", "high"): "its gradient changes more from step to step than the others'",
    (
        "change",
        "low",
    ): "its gradient changes less from step to step than the others', as if it were stuck",
}


class Look(NamedTuple):
    """What was measured of a round.

    Attributes:
        rows: ``[n, m]`` the workers' rows, or sketches of them; 0 where they are not finite.
        here: ``[n]`` bool, who takes part.
        finite: ``[n]`` bool, whose row is.
        distances: ``[n, n]`` float64, of every row to every other one.
        cosines: ``[n, n]`` their cosines.
        distance: ``[n]`` the median distance to the other rows.
        cosine: ``[n]`` the mean cosine with them.
        norm: ``[n]``.
    """

    rows: Tensor
    here: Tensor
    finite: Tensor
    distances: Tensor
    cosines: Tensor
    distance: Tensor
    cosine: Tensor
    norm: Tensor


def look(rows: Tensor, here: Tensor) -> Look:
    """Measures the rows ``[n, m]`` of those that are here ``[n]``; a row with a nan or an inf is
    infinitely far from all others.
    """
    finite = torch.isfinite(rows).all(1)
    rows = torch.where(finite[:, None], rows, 0.0)
    wide = rows.double()
    products = wide @ wide.T
    squares = products.diagonal()
    norm = squares.sqrt()
    sums = squares[:, None] + squares[None, :]
    distances = torch.maximum(sums - 2 * products, 1e-14 * sums).sqrt()  # less is rounding
    cosines = products / (norm[:, None] * norm[None, :]).clamp_min(torch.finfo(torch.float64).tiny)
    useful = here.to(finite.device) & finite
    others = (useful[:, None] & useful[None, :]).fill_diagonal_(False)
    count = int(useful.sum()) - 1
    if count < 1:
        distance, cosine = torch.full_like(norm, torch.inf), torch.full_like(norm, -torch.inf)
    else:
        ordered = torch.where(others, distances, torch.inf).sort(dim=1).values
        distance = ordered[:, (count - 1) // 2]  # of an even number, the nearer middle one
        cosine = torch.where(useful, torch.where(others, cosines, 0.0).sum(1) / count, -torch.inf)
    norm = torch.where(finite, norm, torch.inf)
    return Look(
        rows, here, finite.cpu(), *(t.cpu() for t in (distances, cosines, distance, cosine, norm))
    )


def _surely_above(table: Tensor, count: int) -> Tensor:
    """``[m, m]`` bool: whether row i of ``table [m, m]`` has a larger mean than row j over the
    honest columns, whichever they are.

    Args:
        table: what each worker is to each other one; its diagonal does not count.
        count: how many of the others of i and j are honest at least.
    """
    m = len(table)
    above = torch.zeros(m, m, dtype=torch.bool)
    for i in range(m if count > 0 else 0):
        differences = table[i] - table  # [j, k]
        differences[:, i] = torch.inf
        differences.fill_diagonal_(torch.inf)
        above[i] = differences.sort(1).values[:, :count].sum(1) > _ROUNDING
    above.fill_diagonal_(False)
    return above


Bets = tuple[Tensor, Tensor, Tensor]
"""Which bets of a pair are won; with which probability, at most; and the sizes of what was
measured.
"""


class SuspicionTest:
    """The sequential test; the same rows give the same verdicts in every process.

    Args:
        n: number of workers.
        f: how many of them may be faulty, 1 <= f < n / 2.
        false_alarm_rate: the probability, at most, that any honest worker is ever accused in a run.
        compare: with the "others", where workers draw from one pool of data, or each with its
            "own_past", where their data differ.
        gross: how many times others' norms and distances no honest worker's ever are.
    """

    def __init__(
        self,
        n: int,
        f: int,
        false_alarm_rate: float = 0.01,
        compare: Compare = "others",
        gross: float = 100.0,
    ) -> None:
        if not 1 <= f < n / 2:
            raise ValueError(
                f"To tell a faulty worker from the others takes 1 <= f < n / 2. Found n={n}, f={f}."
            )
        if not 0 < false_alarm_rate < 1:
            raise ValueError(
                "`false_alarm_rate`, the probability that a run of honest workers ever accuses "
                f"one, should be in (0, 1). Found {false_alarm_rate}."
            )
        if compare not in get_args(Compare):
            raise ValueError(
                f"`compare` should be one of {', '.join(get_args(Compare))}. Found {compare!r}."
            )
        if gross <= 1:
            raise ValueError(f"`gross` should be above 1. Found {gross}.")
        self.n, self.f, self.false_alarm_rate, self.compare, self.gross = (
            n,
            f,
            false_alarm_rate,
            compare,
            gross,
        )
        self.accused: set[int] = set()
        self.excluded: set[int] = set()
        """Workers in quarantine: nobody is compared with them, and each is one of the f."""
        self.sides = ("high", "low") if compare == "others" else ("other",)
        sizes = f if compare == "others" else 1
        self._stakes = torch.tensor(_STAKES, dtype=torch.float64)
        self._wealth = torch.zeros(
            n, len(STATISTICS), len(self.sides), sizes, len(_STAKES), dtype=torch.float64
        )
        self._gross = torch.zeros(n, dtype=torch.float64)
        self._pairs = torch.zeros(n, dtype=torch.int64)
        self._looks = torch.zeros(n, dtype=torch.int64)
        self._past: list[Tensor] = []
        self._shown: list[tuple[Tensor, Tensor]] = []
        self._first: Look | None = None
        self.last: Look | None = None

    # -- what is known -----------------------------------------------------------------------------

    @property
    def evidence(self) -> Tensor:
        """``[n]`` float64: what was won by betting against each worker, from a capital of 1. See
        the module's text.
        """
        usual = self._wealth.mean((1, 2, 3, 4)) + 1 / (self._pairs + 1)
        return torch.maximum(usual, self._gross + 1 / (self._looks + 1)) / 2

    @property
    def threshold(self) -> float:
        """The evidence at which a worker is accused: with two tests and n workers, 1 / rate for
        each by the union bound.
        """
        return self.n / self.false_alarm_rate

    @property
    def scores(self) -> Tensor:
        """``[n]``: the evidence on a logarithmic scale: 0 is none, and at 1 a worker is accused."""
        return (self.evidence.clamp(1.0, 1e300).log() / math.log(self.threshold)).float()

    @property
    def pairs(self) -> Tensor:
        """``[n]`` int64: how many pairs of rounds each worker was tested in."""
        return self._pairs

    def reason(self, worker: int) -> str:
        """What speaks most against a worker."""
        if self._is_gross(worker):
            return (
                f"its gradient is not finite, or more than {self.gross:g} times as long as the "
                "median worker's, or as many times as far from the others' as most are from each "
                "other"
            )
        statistic, side, _, size, _, _ = self._decided(worker)
        if self.compare == "others":
            return _REASONS[STATISTICS[statistic], self.sides[side]]
        change = _REASONS[STATISTICS[statistic], "high" if size > 0 else "low"]
        return f"compared with its own past, {change}"

    def evidence_shown(self, worker: int) -> str:
        """The measurements that decided it, beside the median worker's or its past's, in words."""
        if self._is_gross(worker):
            return self._last_seen(worker)
        statistic, side, b, size, won, pairs = self._decided(worker)
        name, looks = STATISTICS[statistic], f"In {won} of its last {pairs} pairs of looks"
        beside = "the median worker's" if self.compare == "others" else "in its own past"
        if name == "cosine":
            by = f"on average {abs(size):.2g} {'above' if size > 0 else 'below'} {beside}"
        else:
            by = f"on average {math.exp(min(size, 700.0)):.3g} times {beside}"
        if self.compare == "own_past":
            return f"{looks} its {name} was off by more than {_DEVIATIONS:g} deviations, {by}"
        ends = {"high": "largest", "low": "smallest"}
        return f"{looks} its {name} was among the {b} {ends[self.sides[side]]}, {by}"

    def _is_gross(self, worker: int) -> bool:
        return bool(self._gross[worker] > self._wealth[worker].mean())

    def _decided(self, worker: int) -> tuple[int, int, int, float, int, int]:
        """The bet that won most against a worker, and its last pairs: the statistic, the side, b;
        by how much the statistic was larger, on average, in those that were won; how many these
        were, of how many.
        """
        per_bet = self._wealth[worker].mean(-1)
        place = int(per_bet.argmax())
        statistic, rest = divmod(place, per_bet[0].numel())
        side, b = divmod(rest, per_bet.shape[-1])
        tested = [
            (sizes[worker, statistic], won[worker, statistic, side, b])
            for sizes, won in self._shown
        ]
        tested = [(size, won) for size, won in tested if not size.isnan()]
        sizes = [float(size) for size, won in tested if won]
        mean = sum(sizes) / len(sizes) if sizes else 0.0
        return statistic, side, b + 1, mean, len(sizes), len(tested)

    def _last_seen(self, worker: int) -> str:
        if self.last is None or not bool(self.last.finite[worker]):
            return "Its last gradient is not finite"
        numbers = (("norm", self.last.norm), ("distance", self.last.distance))
        return "Last seen: " + ", ".join(
            f"{name} {float(values[worker]):.3g} (median worker "
            f"{float(values[self.last.here].median()):.3g})"
            for name, values in numbers
        )

    # -- a round -----------------------------------------------------------------------------------

    def observe(self, rows: Tensor, here: Tensor | None = None) -> list[int]:
        """Takes in one round: the first and the second of a pair in turn.

        Args:
            rows: ``[n, m]`` the workers' rows, or sketches of them.
            here: ``[n]`` bool, those that were to take part; None: all.

        Returns:
            the workers that are accused now and were not before.
        """
        here = torch.ones(self.n, dtype=torch.bool) if here is None else here.clone()
        here[sorted(self.excluded)] = False
        seen = look(rows, here)
        self.last = seen
        f = max(0, self.f - len(self.excluded))
        if f == 0 or int((here & ~seen.finite).sum()) > f or int(here.sum()) <= 2 * f:
            # nothing is as f says: an overflow of everybody's loss scale, or too few workers
            self._first = None
            return []
        self._bet_on_gross(seen, f)
        if self._first is None:
            self._first = seen
        else:
            first, self._first = self._first, None
            self._bet(first, seen, f)
        found = (self.evidence >= self.threshold).nonzero().flatten().tolist()
        new = [
            worker for worker in found if worker not in self.accused and worker not in self.excluded
        ]
        self.accused.update(new)
        if new and self.compare == "own_past":
            self._past = []  # what a faulty worker does to the others' numbers is their new normal
        return new

    def _bet_on_gross(self, seen: Look, f: int) -> None:
        here = seen.here
        long = seen.norm > self.gross * seen.norm[here].median()
        won = here & (~seen.finite | long | self._far(seen, f))
        gain = torch.where(
            won, 1 - _GROSS_STAKE + _GROSS_STAKE / _GROSS_PROBABILITY, 1 - _GROSS_STAKE
        )
        self._looks += here.long()
        self._gross = torch.where(
            here, ((self._gross + self._begun(self._looks)) * gain).clamp_max(_RICH), self._gross
        )

    def _far(self, seen: Look, f: int) -> Tensor:
        """``[n]`` whose distance to the k-th nearest honest worker is ``gross`` times that of most
        honest ones, whoever these are: the k-th nearest of them is not nearer than the k-th nearest
        of all, and not farther than the (k + f)-th. k is the middle of the n - f - 1 that at least
        are honest.
        """
        some = seen.here.nonzero().flatten()
        honest = len(some) - f - 1
        usable = (seen.finite[some, None] & seen.finite[None, some]).fill_diagonal_(False)
        ordered = torch.where(usable, seen.distances[some][:, some], torch.inf).sort(1).values
        k = (honest + 1) // 2
        least, most = ordered[:, k - 1], ordered[:, k + f - 1]
        beyond = (least[:, None] > self.gross * most[None, :]).sum(1)
        far = torch.zeros(self.n, dtype=torch.bool)
        far[some] = (beyond >= f + (honest + 1) // 2) & seen.finite[some]
        return far

    @staticmethod
    def _begun(rounds: Tensor) -> Tensor:
        """The part of the capital that is staked first in this round, 1 / (t (t + 1)): it adds up
        to 1 over all t.
        """
        return 1 / (rounds * (rounds + 1)).clamp_min(1).double()

    def _bet(self, first: Look, second: Look, f: int) -> None:
        here = first.here & second.here
        if int(here.sum()) <= 2 * f:
            return
        both = first.finite & second.finite
        change = (second.rows.double() - first.rows.double()).square().sum(1).sqrt().cpu()
        values = torch.stack(  # [n, statistics]
            [
                (first.distance.log() + second.distance.log()) / 2,
                (first.cosine + second.cosine) / 2,
                (first.norm.log() + second.norm.log()) / 2,
                torch.where(both, change, torch.inf).log(),
            ],
            dim=1,
        ).nan_to_num(nan=0.0, posinf=_FAR, neginf=-_FAR)
        if self.compare == "others":
            bets: Bets | None = self._extremes(
                self._above(first, second, values, f), values, here, f
            )
        else:
            bets = self._deviations(values, here)
        if bets is None:
            return
        won, chances, sizes = bets
        gain = (
            1 - self._stakes + self._stakes * won[..., None] / chances[..., None]
        )  # [n, statistics, sides, sizes, stakes]
        self._pairs += here.long()
        begun = self._begun(self._pairs)[:, None, None, None, None]
        self._wealth = torch.where(
            here[:, None, None, None, None],
            ((self._wealth + begun) * gain).clamp_max(_RICH),
            self._wealth,
        )
        self._shown = [*self._shown, (torch.where(here[:, None], sizes, torch.nan), won)][-_SHOWN:]

    def _above(self, first: Look, second: Look, values: Tensor, f: int) -> Tensor:
        """``[statistics, m, m]`` bool: whether each of the m workers that are here has more of a
        statistic than each other, whoever f of them are. ``values [n, statistics]`` are the
        workers' own numbers, and so count as they are.
        """
        some = (first.here & second.here).nonzero().flatten()
        finite = (first.finite & second.finite)[some]
        above = values[some].T[:, :, None] - values[some].T[:, None, :] > _ROUNDING
        distances = (first.distances.log() + second.distances.log()) / 2
        cosines = (first.cosines + second.cosines) / 2
        for statistic, table, broken in ((0, distances, _FAR), (1, cosines, -_FAR)):
            table = table[some][:, some].clamp(-_FAR, _FAR)
            table = torch.where(
                finite[None, :], table, 0.0
            )  # a partner that says nothing tells nothing
            table[~finite] = broken
            above[statistic] = _surely_above(table, len(some) - f - 2)
        return above

    def _extremes(self, above: Tensor, values: Tensor, here: Tensor, f: int) -> Bets:
        """Who is among the b most extreme, ``[n, statistics, sides, f]``; the probability that an
        honest worker is, ``[f]``; and by how much everybody's numbers differ from the median
        worker's.
        """
        some = here.nonzero().flatten()
        sizes = torch.arange(1, self.f + 1)
        ahead = (
            len(some) - 1 - torch.stack([above.sum(2).T, above.sum(1).T], dim=2)
        )  # [m, statistics, sides]
        won = torch.zeros(self.n, len(STATISTICS), 2, self.f, dtype=torch.bool)
        won[some] = (ahead[..., None] < sizes) & (sizes <= f)
        return (
            won,
            (sizes / (len(some) - f)).clamp_max(1.0).double(),
            values - values[some].median(0).values,
        )

    def _deviations(self, values: Tensor, here: Tensor) -> Bets | None:
        """Who is far from its own past, ``[n, statistics, 1, 1]``; the probability that is assumed
        for an honest worker; and by how much everybody's numbers differ from its past's.
        """
        relative = values - values[here].median(0).values
        relative = torch.where(here[:, None], relative, torch.nan).clamp(-_FAR, _FAR)
        past = (
            torch.stack(self._past)
            if self._past
            else relative[None, :0].new_zeros(0, *relative.shape)
        )
        known = (~past.isnan()).sum(0) >= _WARM_UP
        self._past = [*self._past, relative][-_MEMORY:]
        if not bool(known.any()):
            return None
        center = past.nanmedian(0).values
        width = 1.4826 * (past - center).abs().nanmedian(0).values
        width = torch.maximum(width, width.nanmedian(0).values).clamp_min(
            1e-9
        )  # who often is the median worker has a width of 0
        size = torch.where(known, ((relative - center) / width).abs(), 0.0)
        won = (size > _DEVIATIONS) & (
            size == size.max(0).values
        )  # a faulty worker moves the others' numbers too, but less
        return (
            won[:, :, None, None],
            torch.tensor([_DEVIATION_PROBABILITY], dtype=torch.float64),
            relative - center,
        )

    # -- what users decide -------------------------------------------------------------------------

    def exclude(self, worker: int) -> None:
        """Nobody is compared with this worker any more, and there is one less among the others."""
        self.excluded.add(worker)
        self._first = None

    def readmit(self, worker: int) -> None:
        """The worker counts again, as if it was new: what was held against it is forgotten."""
        self.excluded.discard(worker)
        self.accused.discard(worker)
        for tensor in (self._wealth, self._gross, self._pairs, self._looks):
            tensor[worker] = 0
        for past in (*self._past, *(sizes for sizes, _ in self._shown)):
            past[worker] = torch.nan
        self._first = None

    # -- checkpoint --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that it remembers but for the first half of a pair, as plain containers of
        tensors.
        """
        return {
            "wealth": self._wealth,
            "gross": self._gross,
            "pairs": self._pairs,
            "looks": self._looks,
            "past": list(self._past),
            "shown": list(self._shown),
            "accused": sorted(self.accused),
            "excluded": sorted(self.excluded),
        }

    def fits(self, state: dict[str, Any]) -> bool:
        """Whether the state is one of as many workers, and of these settings."""
        return bool(state["wealth"].shape == self._wealth.shape)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            ValueError: if it belongs to other settings.
        """
        if not self.fits(state):
            raise ValueError(
                f"The checkpoint's suspicions should be of n={self.n}, f={self.f}, "
                f"compare={self.compare!r}. Found tensors of shape {list(state['wealth'].shape)} "
                f"instead of {list(self._wealth.shape)}. Resume with the settings of the run that "
                "wrote it."
            )
        self._wealth, self._gross = state["wealth"].clone(), state["gross"].clone()
        self._pairs, self._looks = state["pairs"].clone(), state["looks"].clone()
        self._past = [past.clone() for past in state["past"]]
        self._shown = [(sizes.clone(), won.clone()) for sizes, won in state["shown"]]
        self.accused, self.excluded = set(state["accused"]), set(state["excluded"])
        self._first = None
