"""Sorting networks (Batcher, "Sorting networks and their applications", 1968).

Needs nothing but Python: the kernels are built with it before anything else is there.
"""

from __future__ import annotations

from functools import cache


def odd_even_merge_sort(n: int) -> list[tuple[int, int]]:
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
    for low, high in reversed(odd_even_merge_sort(n)):
        if not (ordered or kept) and wanted == {low, high}:
            continue
        keep_low, keep_high = low in wanted, high in wanted
        if keep_low or keep_high:
            kept.append((low, high, keep_low, keep_high))
            wanted |= {low, high}
    return tuple(reversed(kept))
