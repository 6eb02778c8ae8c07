"""Inner products that f rows cannot spoil."""

from __future__ import annotations

from torch import Tensor

from lightning_byz.numerics.rows import Rows


def around_medoid(rows: Rows, f: int) -> Tensor:
    """Inner products of the rows after the medoid is subtracted; those of honest rows are exact
    whatever the others hold.

    Returns:
        ``[n, n]`` float64, ``<x_i - medoid, x_j - medoid>``, in multiples of ``rows.unit`` squared.
    """
    medoid = _medoid(rows.squared_distances(), f)
    products = rows.gram()
    return products - products[medoid] - products[:, medoid : medoid + 1] + products[medoid, medoid]


def products_around_medoid(distances: Tensor, f: int) -> Tensor:
    """The same from the rows' squared distances ``[n, n]`` alone."""
    to_medoid = distances[_medoid(distances, f)]
    return (to_medoid + to_medoid[:, None] - distances) / 2


def _medoid(distances: Tensor, f: int) -> int:
    """The row with the smallest summed distance to its n - f nearest, which f rows cannot move far,
    given squared distances.
    """
    return int(distances.sqrt().sort(dim=1).values[:, : len(distances) - f].sum(1).argmin())
