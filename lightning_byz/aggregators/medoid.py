"""Inner products that f rows cannot spoil."""

from __future__ import annotations

from torch import Tensor

from lightning_byz.numerics.rows import Rows


def around_medoid(rows: Rows, f: int) -> Tensor:
    """Inner products of the rows after the medoid is subtracted; those of honest rows are exact
    whatever the others hold.

    The medoid is the row with the smallest summed distance to its n - f nearest, which f rows
    cannot move far.

    Returns:
        ``[n, n]`` float64, ``<x_i - medoid, x_j - medoid>``, in multiples of ``rows.unit`` squared.
    """
    distances = rows.squared_distances()
    medoid = int(distances.sqrt().sort(dim=1).values[:, : len(rows) - f].sum(1).argmin())
    products = rows.agree(rows.gram())
    return products - products[medoid] - products[:, medoid : medoid + 1] + products[medoid, medoid]
