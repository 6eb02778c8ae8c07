"""Order statistics over a handful of rows and millions of columns.

``torch.sort``, ``median`` and ``topk`` along a short first dimension move through memory column by
column. A sorting network does the same with whole rows: every comparator is one minimum and one
maximum of two rows. In `kernels` the rows are a few columns wide and stay in registers; where there
are no kernels, every comparator is two operations of PyTorch, with the same results (but for the
sign of a zero).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byz.numerics import kernels
from lightning_byz.numerics.networks import pruned_network


@dataclass(frozen=True)
class ColumnStatistic:
    """What becomes of the values of every column, such as their median.

    Attributes:
        center: the "middle" one (for an even number the mean of the two middle ones); or the "mean"
            of the sorted values first .. last - 1; or their "vote": 1 or -1, as most are at least 0
            or below it.
        first: see there.
        last: see there.
        keep: not the center, but the mean of so many values that are nearest to it; of two at the
            same distance the smaller one is nearer. None: the center.
        tie: what a divided vote gives.
    """

    center: str = "middle"
    first: int = 0
    last: int = 0
    keep: int | None = None
    tie: float = 0.0

    def __call__(self, block: Tensor) -> Tensor:
        """Of every column of ``block [n, c]`` (finite values): ``[c]``."""
        rows = list(block.unbind(0))
        if kernels.fits(rows):
            out = torch.empty_like(rows[0])
            self.by_kernel(rows, out)
            return out
        return self._by_torch(block)

    def by_kernel(self, rows: list[Tensor], out: Tensor, mixing: Tensor | None = None) -> int:
        """The same of n vectors ``[c]`` that `kernels.fits` allows, or of ``mixing [m, n]`` of
        them, into ``out [c]``; what `kernels.reduce_columns` says of the numbers.
        """
        nearest = self.keep is not None
        if self.center == "vote":
            what = kernels.VOTE
        elif self.center == "middle":
            what = kernels.NEAREST_TO_MIDDLE if nearest else kernels.MIDDLE
        else:
            what = kernels.NEAREST_TO_MEAN if nearest else kernels.MEAN
        return kernels.reduce_columns(
            rows, out, what, self.first, self.last, self.keep or 0, self.tie, mixing
        )

    def _by_torch(self, block: Tensor) -> Tensor:
        n = len(block)
        if self.center == "vote":
            votes = (n - 2 * (block < 0).sum(0)).sign().to(block.dtype)
            return votes.masked_fill_(votes == 0, self.tie) if self.tie else votes
        if self.keep is not None:
            ordered = sorted_rows(block, 0, n)
            middle = self.center == "middle"
            center = middle_of(ordered) if middle else mean_of(ordered[self.first : self.last])
            return mean_of_nearest(ordered, center, self.keep)
        if self.center == "middle":
            return middle_of(sorted_rows(block, (n - 1) // 2, n // 2 + 1, ordered=False))
        return mean_of(sorted_rows(block, self.first, self.last, ordered=False))


median_of_rows = ColumnStatistic()
"""The median of every column of ``block [n, c]``."""


def sorted_rows(block: Tensor, first: int, last: int, ordered: bool = True) -> list[Tensor]:
    """The first-th to (last - 1)-th smallest value of every column of ``block [n, c]`` (finite
    values), as rows ``[c]``.

    ``ordered=False``: if they are two, in either order, for whoever adds them up.
    """
    rows = list(block.unbind(0))
    for low, high, keep_low, keep_high in pruned_network(len(rows), first, last, ordered):
        a, b = rows[low], rows[high]
        if keep_low:
            rows[low] = torch.minimum(a, b)
        if keep_high:
            rows[high] = torch.maximum(a, b)
    return rows[first:last]


def middle_of(ordered: list[Tensor]) -> Tensor:
    """The middle one of rows in ascending order; for an even number the mean of the two middle
    ones, in either order.
    """
    n = len(ordered)
    return ordered[n // 2].clone() if n % 2 else ordered[n // 2 - 1] / 2 + ordered[n // 2] / 2


def mean_of_nearest(ordered: list[Tensor], center: Tensor, keep: int) -> Tensor:
    """The mean of the ``keep`` values nearest to ``center [c]``, column by column, of rows ``[c]``
    in ascending order.

    The nearest values stand side by side in the order. A window of them moves up by one,
    ``ordered[k + keep]`` in place of ``ordered[k]``, as long as the value that enters is nearer
    than the one that leaves.
    """
    window = ordered[:keep]
    for k, entering in enumerate(ordered[keep:]):
        window[k % keep] = torch.where(
            entering - center < center - ordered[k], entering, window[k % keep]
        )
    return mean_of(window)


def mean_of(rows: Tensor | list[Tensor]) -> Tensor:
    """The mean of a few rows, added up one after the other."""
    total = rows[0] + rows[1] if len(rows) > 1 else rows[0].clone()
    for row in rows[2:]:
        total += row
    return total.div_(len(rows))
