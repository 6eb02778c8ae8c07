"""Byz-EF21-SGDM with compression in both directions, for rules whose result may change in every
coordinate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_byz.algorithms.byz_ef21_sgdm import ByzEF21SGDM
from lightning_byz.compressors import TopK
from lightning_byz.numerics.memory import places_of
from lightning_byz.numerics.rows import Rows
from lightning_byz.types import Round


class ServerState(NamedTuple):
    """What the server of Byz-EF21-SGDM-BC remembers.

    Attributes:
        g: a mirror of every worker's estimate, Byzantine workers included, ``[n, d]``.
        last: the rule's last result, ``[d]``; empty unless the rule remembers it.
        h: the estimate that all workers have, ``[d]``.
    """

    g: Tensor
    last: Tensor
    h: Tensor


@dataclass(frozen=True)
class ByzEF21SGDMBC(ByzEF21SGDM):
    """Byz-EF21-SGDM whose server compresses, too: workers learn the largest changes of the estimate
    only, whatever the rule.

    Workers as in `ByzEF21SGDM`. The server's ``a = Agg(g_1, ..., g_n)`` goes down by another EF21:
    ``h = h + C_s(a - h)``, with C_s = Top-K, and h, which starts at 0, is the estimate. With
    ``server_compressor=TopK(ratio=1.0)`` it is Byz-EF21-SGDM.

    Bidirectional compression is EF21-BC's (arXiv 2110.03294), which compresses the server's
    gradient estimate in this way, without Byzantine workers and momentum; Byz-EF21-BC (arXiv
    2310.09804), known to us by its authors' code, compresses the model instead. **The combination
    with momentum and a rule is ours**: no paper proves a rate for it. It lags behind Byz-EF21-SGDM
    as far as h lags behind a. What a Byzantine worker can do to a it can do to h, no sooner.

    The K largest are those of the whole vector, on every transport; values that are as large as the
    K-th all count. Where one is chosen, h takes a's number itself.

    Args:
        aggregator: the robust rule.
        compressor: the workers', any contractive one.
        eta: weight of the new gradient in the momentum, in (0, 1]. 1: no momentum.
        server_compressor: the server's.
    """

    server_compressor: TopK = field(default_factory=lambda: TopK(ratio=0.1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.server_compressor, TopK):
            raise TypeError(
                f"`server_compressor` of {type(self).__name__} should be a TopK. Found "
                f"{self.server_compressor!r}. Use TopK(ratio=0.1)."
            )

    @property
    def changes_few(self) -> bool:
        return True

    @property
    def changes_named(self) -> bool:
        return False

    def init_server(self, x: Tensor, n: int) -> ServerState:  # type: ignore[override]
        return ServerState(*super().init_server(x, n), torch.zeros_like(x))

    def answer(self, rows: Rows, state: ServerState, round: Round) -> tuple[Tensor, ServerState]:  # type: ignore[override]
        a, state = super().answer(rows, state, round)  # type: ignore[arg-type, assignment]
        h = round.room(state.h)
        change = torch.sub(a, state.h, out=h).abs_()
        count = self.server_compressor.count(rows.dim or len(change))
        index = places_of(change >= rows.kth_largest(change, count))
        h.copy_(state.h)[index] = a[index]
        return a.copy_(h), state._replace(h=h)
