"""Which worker is lying? A sequential test on what workers send, with a false-alarm rate that the user sets. No truth is needed.

**What is measured.** Of every worker's row in two consecutive rounds (a *pair*): its distance to the others (the median one), its mean cosine with them, its
norm, and how far it moved between the two rounds. A flipped exponent bit or a wrong scale shows in the first or the third, wrong labels in the second,
a stuck worker in the last.

**The test.** Every worker is bet against. A bet says "this worker is among the b most extreme ones of this pair" (b = 1 .. f; most and least; each
of the four numbers). If workers are exchangeable given the past, that has probability at most b / (n - f) for an honest one, *whatever up to f other
workers send independently of its noise*: those above it count against it only if they are honest. A bet of a part lam of the wealth
multiplies it by ``1 - lam + lam (n - f) / b`` if it is won and by ``1 - lam`` if not, so that it does not grow in expectation. The wealth of all bets
together, each begun at every pair t with the part 1 / (t (t + 1)) of a capital of 1 (so that a fault may set in at any time), is a nonnegative
supermartingale that starts at 1. By Ville's inequality it ever reaches 1 / a with probability at most a. A worker is accused when its wealth reaches
2 n / rate (2, for there is a second test below); so *in a run of honest workers anybody is ever accused with probability at most the rate*, however long
it runs. (Betting and e-processes: Shafer, JRSS A 2021; Ramdas, Grunwald, Vovk, Shafer, Statistical Science 2023, arXiv 2210.01948.)

**The assumptions.** compare="others": workers draw from one pool of data (DDP's usual sampler, that shuffles), and what a row holds is fresh in every pair, so that
momentum of earlier pairs has faded. Drawing without replacement, and parts of the data that a worker keeps, break this a little or a lot (docs/suspicion.md says what was
measured).

compare="own_past": for workers with data of their own. Who has unusual data is always extreme, and nothing is exchangeable. Instead
every worker's numbers, relative to the median worker's of the same pair, are compared with its own of up to 50 earlier pairs, and at least 15: the bet is that
one lies more than 8 scaled median absolute deviations (its own, and the median worker's) from their median, and farther than any other worker's. An honest worker is *assumed* to do that with
probability at most 1/50 a pair, given the past. This finds changes; a worker that was faulty from the first pair on is its own normal. When a worker is accused,
all pasts begin anew.

**Gross faults.** In both, a second test bets that a row is not finite, or ``gross`` times as far from the others as the median worker. An honest worker is
assumed to do that with probability at most 1/1000 a round. Two such rounds in a row accuse.
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
_MEMORY, _WARM_UP, _DEVIATIONS, _DEVIATION_PROBABILITY = 50, 15, 8.0, 0.02

_REASONS = {
    ("distance", "high"): "its gradient lies farther from the others' than they lie from each other",
    ("distance", "low"): "its gradient lies closer to the others' than they lie to each other",
    ("cosine", "high"): "its gradient agrees with the others' more than they agree with each other",
    ("cosine", "low"): "its gradient points away from the others'",
    ("norm", "high"): "its gradient is longer than the others'",
    ("norm", "low"): "its gradient is shorter than the others'",
    ("change", "high"): "its gradient changes more from step to step than the others'",
    ("change", "low"): "its gradient changes less from step to step than the others', as if it were stuck",
}


class Look(NamedTuple):
    """What was measured of a round.

    Attributes:
        rows: ``[n, m]`` the workers' rows, or sketches of them; 0 where they are not finite.
        here: ``[n]`` bool, who takes part.
        finite: ``[n]`` bool, whose row is.
        distance: ``[n]`` float64, the median distance to the other rows.
        cosine: ``[n]`` the mean cosine with them.
        norm: ``[n]``.
    """

    rows: Tensor
    here: Tensor
    finite: Tensor
    distance: Tensor
    cosine: Tensor
    norm: Tensor


def look(rows: Tensor, here: Tensor) -> Look:
    """Measures the rows ``[n, m]`` of those that are here ``[n]``; a row with a nan or an inf is infinitely far from all others."""
    finite = torch.isfinite(rows).all(1)
    rows = torch.where(finite[:, None], rows, 0.0)
    wide = rows.double()
    products = wide @ wide.T
    squares = products.diagonal()
    norm = squares.sqrt()
    distances = (squares[:, None] + squares[None, :] - 2 * products).clamp_min(0).sqrt()
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
    return Look(rows, here, finite, distance.cpu(), cosine.cpu(), torch.where(finite, norm, torch.inf).cpu())


class SuspicionTest:
    """The sequential test; the same rows give the same verdicts in every process.

    Args:
        n: number of workers.
        f: how many of them may be faulty, 1 <= f < n / 2.
        false_alarm_rate: the probability, at most, that any honest worker is ever accused in a run.
        compare: with the "others", where workers draw from one pool of data, or each with its "own_past", where their data differ.
        gross: how many times the median worker's distance no honest worker ever reaches.
    """

    def __init__(self, n: int, f: int, false_alarm_rate: float = 0.01, compare: Compare = "others", gross: float = 100.0) -> None:
        if not 1 <= f < n / 2:
            raise ValueError(f"To tell a faulty worker from the others takes 1 <= f < n / 2. Found n={n}, f={f}.")
        if not 0 < false_alarm_rate < 1:
            raise ValueError(
                "`false_alarm_rate`, the probability that a run of honest workers ever accuses one, should be in (0, 1). Found "
                f"{false_alarm_rate}."
            )
        if compare not in get_args(Compare):
            raise ValueError(f"`compare` should be one of {', '.join(get_args(Compare))}. Found {compare!r}.")
        if gross <= 1:
            raise ValueError(f"`gross` should be above 1. Found {gross}.")
        self.n, self.f, self.false_alarm_rate, self.compare, self.gross = n, f, false_alarm_rate, compare, gross
        self.accused: set[int] = set()
        self.excluded: set[int] = set()
        """Workers that are in quarantine: nobody is compared with them, and each of them makes f smaller by one."""
        self.sides = ("high", "low") if compare == "others" else ("other",)
        sizes = f if compare == "others" else 1
        self._stakes = torch.tensor(_STAKES, dtype=torch.float64)
        self._wealth = torch.zeros(n, len(STATISTICS), len(self.sides), sizes, len(_STAKES), dtype=torch.float64)
        self._gross = torch.zeros(n, dtype=torch.float64)
        self._pairs = torch.zeros(n, dtype=torch.int64)
        self._looks = torch.zeros(n, dtype=torch.int64)
        self._past: list[Tensor] = []
        self._first: Look | None = None
        self.last: Look | None = None

    # -- what is known ------------------------------------------------------------------------------------------------

    @property
    def evidence(self) -> Tensor:
        """``[n]`` float64: what was won by betting against each worker, from a capital of 1. See the module's text."""
        usual = self._wealth.mean((1, 2, 3, 4)) + 1 / (self._pairs + 1)
        return torch.maximum(usual, self._gross + 1 / (self._looks + 1)) / 2

    @property
    def threshold(self) -> float:
        """The evidence at which a worker is accused: with two tests and n workers, 1 / rate for each by the union bound."""
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
        if self._gross[worker] > self._wealth[worker].mean():
            return f"its gradient is not finite, or more than {self.gross:g} times as far from the others' as the median worker's"
        per_bet = self._wealth[worker].mean((2, 3))  # [statistics, sides]
        statistic, side = divmod(int(per_bet.argmax()), len(self.sides))
        name = STATISTICS[statistic]
        if self.compare == "others":
            return _REASONS[name, self.sides[side]]
        side_now = "high" if self._deviation is None or self._deviation[worker, statistic] > 0 else "low"
        return f"compared with its own past, {_REASONS[name, side_now]}"

    def numbers(self, worker: int) -> str:
        """A worker's last measurements beside the median worker's, in words."""
        if self.last is None or not bool(self.last.finite[worker]):
            return "its last gradient is not finite"
        return ", ".join(
            f"{name} {float(values[worker]):.3g} (median worker {float(values[self.last.here].median()):.3g})"
            for name, values in (("distance", self.last.distance), ("cosine", self.last.cosine), ("norm", self.last.norm))
        )

    # -- a round ------------------------------------------------------------------------------------------------------

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
            self._first = None  # nothing is as f says: an overflow of everybody's loss scale, or too few workers
            return []
        self._bet_on_gross(seen)
        if self._first is None:
            self._first = seen
        else:
            first, self._first = self._first, None
            self._bet(first, seen, f)
        found = (self.evidence >= self.threshold).nonzero().flatten().tolist()
        new = [worker for worker in found if worker not in self.accused and worker not in self.excluded]
        self.accused.update(new)
        if new and self.compare == "own_past":
            self._past = []  # what a faulty worker does to the others' numbers is their new normal
        return new

    def _bet_on_gross(self, seen: Look) -> None:
        here = seen.here
        usual = seen.distance[here].median()
        won = here & (~seen.finite | (seen.distance > self.gross * usual))
        gain = torch.where(won, 1 - _GROSS_STAKE + _GROSS_STAKE / _GROSS_PROBABILITY, 1 - _GROSS_STAKE)
        self._looks += here.long()
        self._gross = torch.where(here, ((self._gross + self._begun(self._looks)) * gain).clamp_max(_RICH), self._gross)

    @staticmethod
    def _begun(rounds: Tensor) -> Tensor:
        """The part of the capital that is staked first in this round, 1 / (t (t + 1)): it adds up to 1 over all t."""
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
        ).nan_to_num(nan=0.0, posinf=1e6, neginf=-1e6)
        bets = self._extremes(values, here, f) if self.compare == "others" else self._deviations(values, here)
        if bets is None:
            return
        won, chances = bets
        gain = 1 - self._stakes + self._stakes * won[..., None] / chances[..., None]  # [n, statistics, sides, sizes, stakes]
        self._pairs += here.long()
        begun = self._begun(self._pairs)[:, None, None, None, None]
        self._wealth = torch.where(here[:, None, None, None, None], ((self._wealth + begun) * gain).clamp_max(_RICH), self._wealth)

    def _extremes(self, values: Tensor, here: Tensor, f: int) -> tuple[Tensor, Tensor]:
        """Who is among the b most extreme, ``[n, statistics, sides, f]``, and the probability that an honest worker is, ``[f]``."""
        some = here.nonzero().flatten()
        table = values[some]  # [m, statistics]
        sizes = torch.arange(1, self.f + 1)
        ahead = torch.stack(
            [
                (table[None, :, :] >= table[:, None, :]).sum(1) - 1,  # a tie counts as ahead, for every side
                (table[None, :, :] <= table[:, None, :]).sum(1) - 1,
            ],
            dim=2,
        )
        won = torch.zeros(self.n, len(STATISTICS), 2, self.f, dtype=torch.bool)
        won[some] = (ahead[..., None] < sizes) & (sizes <= f)
        return won, (sizes / (len(some) - f)).clamp_max(1.0).double()

    _deviation: Tensor | None = None

    def _deviations(self, values: Tensor, here: Tensor) -> tuple[Tensor, Tensor] | None:
        """Who is far from its own past, ``[n, statistics, 1, 1]``, and the probability that is assumed for an honest worker."""
        relative = values - values[here].median(0).values
        relative = torch.where(here[:, None], relative, torch.nan).clamp(-1e6, 1e6)
        past = torch.stack(self._past) if self._past else relative[None, :0].new_zeros(0, *relative.shape)
        known = (~past.isnan()).sum(0) >= _WARM_UP
        self._past = [*self._past, relative][-_MEMORY:]
        if not bool(known.any()):
            return None
        center = past.nanmedian(0).values
        width = 1.4826 * (past - center).abs().nanmedian(0).values
        width = torch.maximum(width, width.nanmedian(0).values).clamp_min(1e-9)  # who often is the median worker has a width of 0
        self._deviation = deviation = (relative - center) / width
        size = torch.where(known, deviation.abs(), 0.0)
        won = (size > _DEVIATIONS) & (size == size.max(0).values)  # a faulty worker moves the others' numbers too, but less
        return won[:, :, None, None], torch.tensor([_DEVIATION_PROBABILITY], dtype=torch.float64)

    # -- what users decide --------------------------------------------------------------------------------------------

    def exclude(self, worker: int) -> None:
        """Nobody is compared with this worker any more, and it makes f smaller by one."""
        self.excluded.add(worker)
        self._first = None

    def readmit(self, worker: int) -> None:
        """The worker counts again, as if it was new: what was held against it is forgotten."""
        self.excluded.discard(worker)
        self.accused.discard(worker)
        for tensor in (self._wealth, self._gross, self._pairs, self._looks):
            tensor[worker] = 0
        for past in self._past:
            past[worker] = torch.nan
        self._first = None

    # -- checkpoint ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that it remembers but for the first half of a pair, as plain containers of tensors."""
        return {
            "wealth": self._wealth,
            "gross": self._gross,
            "pairs": self._pairs,
            "looks": self._looks,
            "past": list(self._past),
            "accused": sorted(self.accused),
            "excluded": sorted(self.excluded),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            ValueError: if it belongs to other settings.
        """
        if state["wealth"].shape != self._wealth.shape:
            raise ValueError(
                f"The checkpoint's suspicions should be of n={self.n}, f={self.f}, compare={self.compare!r}. Found tensors of shape "
                f"{list(state['wealth'].shape)} instead of {list(self._wealth.shape)}. Resume with the settings of the run that wrote it."
            )
        self._wealth, self._gross = state["wealth"].clone(), state["gross"].clone()
        self._pairs, self._looks = state["pairs"].clone(), state["looks"].clone()
        self._past = [past.clone() for past in state["past"]]
        self.accused, self.excluded = set(state["accused"]), set(state["excluded"])
        self._first = None
