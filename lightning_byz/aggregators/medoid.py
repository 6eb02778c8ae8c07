"""Inner products that f rows cannot spoil."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_byz.rows import Rows


def around_medoid(rows: Rows, f: int) -> tuple[Tensor, Tensor]:
    """Inner products of the rows after the medoid is subtracted; those of honest rows are exact whatever the others hold.

    The medoid is the row with the smallest summed distance to its n - f nearest, which f rows cannot move far.

    Returns:
        near ``[k]``, the indices of the rows that are not infinitely far from the medoid (float64 rows beyond 1e154 may be), at least n - f
        of them; products ``[k, k]`` float64, ``<x_i - medoid, x_j - medoid>``.
    """
    distances = rows.squared_distances()
    medoid = int(distances.sqrt().sort(dim=1).values[:, : len(rows) - f].sum(1).argmin())
    near = torch.isfinite(distances[medoid]).nonzero().flatten()
    if len(near) < len(rows):
        rows, medoid = rows.select(near), int((near == medoid).nonzero())
    products = rows.agree(rows.gram())
    centred = products - products[medoid] - products[:, medoid : medoid + 1] + products[medoid, medoid]
    return near, centred
