"""Order statistics over a handful of rows and millions of columns, by a pruned sorting network.

``torch.sort``, ``median`` and ``topk`` along a short first dimension move through memory column by
column. A sorting network does the same with whole rows: every comparator is one ``minimum`` and one
``maximum`` of two rows, which vectorises, and comparators that no wanted output depends on are
dropped (Batcher, "Sorting networks and their applications", 1968: the odd-even merge sort).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def _odd_even_merge_sort(n: int) -> list[tuple[int, int]]:
    """Comparators (low, high) that sort n wires: Batcher's odd-even merge sort, for any n."""
    comparators = []
    p = 1
    while p < n:
        k = p
        while k >= 1:
            for j in range(k % p, n - k, 2 * k):
                for i in range(min(k, n - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        comparators.append((i + j, i + j + k))
            k //= 2
        p *= 2
    return comparators


@cache
def pruned_network(
    n: int, first: int, last: int, ordered: bool = True
) -> tuple[tuple[int, int, bool, bool], ...]:
    """The comparators of a sort of n wires on which outputs first .. last - 1 depend.

    Args:
        n: number of wires.
        first: the first output that is wanted.
        last: the first one behind it that is not.
        ordered: False: two outputs may come in either order, which makes one that compares just
            them needless.

    Returns:
        tuples (low, high, keep_low, keep_high): which of the two results anything later reads.
    """
    wanted = set(range(first, last))
    kept: list[tuple[int, int, bool, bool]] = []
    for low, high in reversed(_odd_even_merge_sort(n)):
        if not (ordered or kept) and wanted == {low, high}:
            continue
        keep_low, keep_high = low in wanted, high in wanted
        if keep_low or keep_high:
            kept.append((low, high, keep_low, keep_high))
            wanted |= {low, high}
    return tuple(reversed(kept))


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


def median_of_rows(block: Tensor) -> Tensor:
    """The median of every column of ``block [n, c]``; for even n the mean of the two middle
    values.
    """
    n = len(block)
    return middle_of(sorted_rows(block, (n - 1) // 2, n // 2 + 1, ordered=False))


def middle_of(ordered: list[Tensor]) -> Tensor:
    """The middle one of rows in ascending order; for an even number the mean of the two middle
    ones, in either order.
    """
    n = len(ordered)
    return ordered[n // 2].clone() if n % 2 else ordered[n // 2 - 1] / 2 + ordered[n // 2] / 2
