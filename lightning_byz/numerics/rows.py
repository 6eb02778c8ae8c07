"""Rows: the n vectors of a round, whole or one rank's slice of them, and the few operations that
rules need.

Every rule is either coordinate-wise, and then it is a `map` over blocks of columns, or it looks at
an n x n matrix of distances and answers with weights, and then it is `squared_distances` and
`combine`. A pre-aggregation is a `mix`. A rule that is written with these runs unchanged when each
rank holds only a slice of the columns, because whatever looks across columns goes through `sum`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_byz.numerics import kernels
from lightning_byz.numerics.finite import all_finite
from lightning_byz.numerics.memory import places_of
from lightning_byz.numerics.networks import pruned_network
from lightning_byz.numerics.order_statistics import ColumnStatistic, median_of_rows

_BLOCK = 65_536
"""Columns that a core works on at a time: three float32 rows of them, as many as an operation
touches, are 0.8 MB, about a second-level cache. Torch gives half as many to a thread at least, so
that a block of as many times this as there are threads keeps all of them busy.
"""

_BLOCK_ON_ACCELERATOR = 1 << 20
"""The same where kernels cost more to launch than to fetch a block from memory again."""

_NARROW = 8_192
"""Columns whose products and squares are summed in the rows' precision, by one thread, before they
are added up in float64.
"""

_WIDE = 32 * _NARROW
"""Columns of which that is done at a time, whatever the number of threads is: it is to change no
bit.
"""

_MIXED = 2_048
"""Columns of a mixture that a thread makes at a time."""

_BATCH = 8
"""Matrices of so many columns that are multiplied at a time: 5 MB of 20 float32 rows, which stay in
a cache.
"""

_SAMPLE = 32_768
"""Numbers of a slice that are looked at to guess how large the largest are."""

_CLOSE = 1e-2
"""Rows whose squared distance is a smaller part of their squared norms have lost digits of it in
float32 products, which keep 7 of the norms'.
"""

_REACH = 200
"""Rows may be 2^200 times as large as the others before they are shrunk: float64 holds fourth
powers of that.
"""

_NOTHING = -1100
"""The exponent of 0, below all others."""

_FAINT = 1e-20
"""Squared norms below it may have lost digits to underflow, and those of the largest rows overflow.
"""


AnyRows: TypeAlias = (
    "Tensor | Rows | Sequence[Tensor] | NDArray[np.floating[Any]] | "
    "Sequence[NDArray[np.floating[Any]]]"
)
"""What rules take for n vectors of d numbers; see `Rows.of`."""


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _tensor(values: Any) -> Tensor:
    """Numbers as a tensor; those of an array are copied, which may be read-only, or lie in memory
    backwards.
    """
    if isinstance(values, Tensor):
        return values
    return torch.tensor(np.ascontiguousarray(values) if isinstance(values, np.ndarray) else values)


@dataclass(frozen=True, eq=False)
class Rows:
    """n vectors of d numbers, or the slice of them that this rank holds.

    Attributes:
        values: ``[n_stored, d_local]``; never modified.
        index: the stored rows that take part, in order, or None for all. Selecting copies nothing.
        workers: ``[n]`` whose rows these are; None: those of workers 0, 1, ... in order.
        mixing: ``[n, n_taking_part]`` float64; row i of the result is
            ``sum_j mixing[i, j] * row_j``, made block by block.
        total: adds up a small tensor over the ranks that hold the other slices.
        agree: gives every rank rank 0's copy of a small tensor that decisions depend on.
        generator: the round's random stream, the same on every rank, for rules that shuffle or
            sample.
        spans: which columns first .. last - 1 of the whole vectors this slice holds, in order;
            None: it is all there is.
        dim: columns of the whole vectors; None: this slice is all there is.
        last: ``[d_local]``, the rule's last result, for rules that remember it
            (`Aggregator.remembers`); None in the first round.
        shares: ``[n]`` float64 > 0, how much of the data each row stands for, for rules that use it
            (`Aggregator.weighted`); None: all the same. They come from the run's configuration,
            never from a worker.
        exposed: ``[n]`` bool, the rows whose worker sent what no honest one can send, such as a
            nan; None: nobody knows.
        quarantined: ``[n]`` bool, the rows that are left out because their worker is accused; None:
            nobody is.
        unlike: how unlike the workers' data are, in [0, 1], from earlier rounds, for rules that use
            it (`lightning_byz.engine.heterogeneity`); None: nobody knows.
        compiled: on an accelerator coordinate-wise rules run as one pass that torch.compile makes
            of them, instead of one operation after the other.
        scales: ``[n_stored]`` float64 powers of two, by which the stored rows are multiplied when
            they are read (see `in_range`); None: by 1.
        unit: a power of two. Inner products and squared norms and distances are those of the rows
            divided by it, so that a length in the rows' own units has to be divided by it, too,
            before it is compared with theirs.
    """

    values: Tensor
    index: Tensor | None = None
    workers: Tensor | None = None
    mixing: Tensor | None = None
    total: Callable[[Tensor], Tensor] = _identity
    agree: Callable[[Tensor], Tensor] = _identity
    generator: torch.Generator | None = None
    spans: tuple[tuple[int, int], ...] | None = None
    dim: int | None = None
    last: Tensor | None = None
    shares: Tensor | None = None
    exposed: Tensor | None = None
    quarantined: Tensor | None = None
    unlike: float | None = None
    compiled: bool = False
    scales: Tensor | None = None
    unit: float = 1.0
    _cache: dict[str, tuple[Tensor, Tensor | None, Tensor]] = field(
        default_factory=dict, repr=False
    )
    """Values, index, and the inner products or the squared norms of these base rows, once somebody
    asked for them.
    """
    _room: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Memory for factors and results of products, of these rows and those made of them."""

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or not self.values.is_floating_point():
            raise ValueError(
                "Rows hold a floating-point matrix [n, d], one row per worker. Found a tensor of "
                f"shape {list(self.values.shape)} and {self.values.dtype}."
            )

    @classmethod
    def of(cls, rows: AnyRows) -> Rows:
        """Rows as they are; or a matrix ``[n, d]``, or n vectors ``[d]``, of torch or of numpy, as
        Rows.

        Raises:
            ValueError: if they are no floating-point matrix.
        """
        if isinstance(rows, Rows):
            return rows
        if isinstance(rows, Tensor):
            return cls(rows)
        try:
            together = isinstance(rows, (list, tuple))
            vectors = [_tensor(row) for row in (rows if together else [rows])]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                "Rows hold a floating-point matrix [n, d], one row per worker. Found "
                f"{type(rows).__name__}: {error}"
            ) from error
        if not together:
            return cls(vectors[0])
        kinds = {(tuple(vector.shape), vector.dtype, vector.device) for vector in vectors}
        if len(kinds) != 1:
            found = (
                ", ".join(
                    sorted(
                        f"{list(shape)} of {dtype} on {device}" for shape, dtype, device in kinds
                    )
                )
                or "none"
            )
            raise ValueError(
                "Rows in a list should be vectors [d] of one length, dtype and device. Found "
                f"{found}."
            )
        return cls(torch.stack(vectors))

    # -- size --------------------------------------------------------------------------------------

    def __len__(self) -> int:
        if self.mixing is not None:
            return len(self.mixing)
        return len(self.values) if self.index is None else len(self.index)

    @property
    def work_dtype(self) -> torch.dtype:
        """The dtype that arithmetic runs in: float32 for half-precision rows, else the rows'
        own.
        """
        return torch.float32 if self.values.element_size() < 4 else self.values.dtype

    # -- selecting and mixing ----------------------------------------------------------------------

    def select(self, keep: Tensor) -> Rows:
        """The rows at ``keep`` (indices, or a bool mask ``[n]``). Nothing is copied."""
        keep = keep.nonzero().flatten() if keep.dtype == torch.bool else keep
        shares = None if self.shares is None else self.shares[keep.to(self.shares.device)]
        exposed = None if self.exposed is None else self.exposed[keep.to(self.exposed.device)]
        quarantined = (
            None if self.quarantined is None else self.quarantined[keep.to(self.quarantined.device)]
        )
        workers = torch.arange(len(self)) if self.workers is None else self.workers
        chosen = replace(
            self,
            workers=workers[keep.to(workers.device)],
            shares=shares,
            exposed=exposed,
            quarantined=quarantined,
        )
        if self.mixing is not None:
            return replace(chosen, mixing=self.mixing[keep.to(self.mixing.device)])
        keep = keep.to(self.values.device)
        return replace(chosen, index=keep if self.index is None else self.index[keep])

    def mix(self, weights: Tensor) -> Rows:
        """M new rows ``weights [m, n] @ rows``, lazily: weights compose, rows are made block by
        block when they are read.

        Raises:
            ValueError: if the weights have another shape.
        """
        if weights.ndim != 2 or weights.shape[1] != len(self):
            raise ValueError(
                f"Weights of mixtures of {len(self)} rows should be a matrix [m, {len(self)}]. "
                f"Found shape {list(weights.shape)}."
            )
        weights = weights.to(device=self.values.device, dtype=torch.float64)
        return replace(
            self,
            mixing=weights if self.mixing is None else weights @ self.mixing,
            workers=self.workers if len(weights) == len(self) else None,
            shares=None,
            exposed=None,
            quarantined=None,
        )

    @property
    def _stored(self) -> Sequence[int]:
        """Where the rows that take part are stored."""
        return range(len(self.values)) if self.index is None else self.index.tolist()

    def _base(self, block: Tensor) -> Tensor:
        return block if self.index is None else block[self.index]

    @property
    def _on_cpu(self) -> bool:
        return self.values.device.type == "cpu"

    def _bounds(self, size: int | None = None) -> list[tuple[int, int]]:
        """Where the blocks of columns begin and end; on a CPU they have the given size, or fit into
        its caches.
        """
        width = self.values.shape[1]
        size = size or _BLOCK * torch.get_num_threads() if self._on_cpu else _BLOCK_ON_ACCELERATOR
        return [(first, min(first + size, width)) for first in range(0, width, size)]

    def block(self, first: int, last: int) -> Tensor:
        """Columns first .. last - 1 of this slice, ``[n, last - first]`` in `work_dtype`, for
        reading only.
        """
        block = self._base(self.values[:, first:last]).to(self.work_dtype)
        if self.scales is not None:
            block = self._base(self.scales)[:, None] * block
        if self._factors is not None:
            return self._factors.to(block.dtype)[:, None] * block
        return block if self.mixing is None else self._mixed(block)

    def _mixed(self, block: Tensor) -> Tensor:
        """``mixing @ block``, whose bits do not depend on how many columns it has."""
        assert self.mixing is not None
        mixing, used = self.mixing.to(block.dtype), (self.mixing != 0).any(0)
        if not bool(used.all()):  # 0 * inf is nan
            mixing, block = mixing[:, used], block[used]
        if not self._on_cpu:
            return mixing @ block
        out = block.new_empty(len(mixing), block.shape[1])
        for first, matrices in self._matrices(
            block, min(_MIXED, -(-self.values.shape[1] // 64) * 64)
        ):
            size = matrices.shape[2]
            made = self._reused("results", block, (len(matrices), len(mixing), size))
            torch.bmm(mixing.expand(len(matrices), -1, -1), matrices, out=made)
            made, here = made.transpose(0, 1), out[:, first : first + len(matrices) * size]
            whole, rest = divmod(here.shape[1], size)
            here[:, : whole * size].view(len(mixing), whole, size).copy_(made[:, :whole])
            if rest:
                here[:, whole * size :] = made[:, whole, :rest]
        return out

    def _reused(self, use: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Memory that the next call with this use and shape gets again: fresh memory is slow, and
        large pieces of it stay fresh.
        """
        room = self._room.get(use)
        if room is None or room.shape != shape or room.dtype != like.dtype:
            room = self._room[use] = like.new_empty(shape)
        return room

    def _matrices(self, block: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
        """The columns of ``block [n, width]`` as matrices of ``size`` columns, followed by zeros:
        some ``[c, n, size]`` at a time, and where they begin.

        With some libraries the bits of a product depend on where in memory a matrix begins, and its
        rows; on its width; and on the number of threads, unless each has a matrix of its own. Here
        all rows begin at multiples of 64 bytes (those that do not are copied), and there are no
        fewer matrices than threads.
        """
        (n, width), threads, unit = block.shape, torch.get_num_threads(), 64 // block.element_size()
        most = min(max(_BATCH, threads), max(threads, -(-width // size)))
        aligned = (
            block.data_ptr() % 64 == 0
            and block.stride(0) % unit == 0
            and block.stride(1) == 1
            and size % unit == 0
        )
        for begin in range(0, width, most * size):
            first, part = begin, block[:, begin : begin + most * size]
            whole = part.shape[1] // size
            if aligned and whole >= threads:
                yield first, part[:, : whole * size].view(n, whole, size).transpose(0, 1)
                first, part, whole = first + whole * size, part[:, whole * size :], 0
            if not part.shape[1]:
                continue
            room = self._reused("factors", block, (most, n, size))
            room[:whole].copy_(part[:, : whole * size].view(n, whole, size).transpose(0, 1))
            rest = part.shape[1] - whole * size
            if rest:
                room[whole, :, :rest] = part[:, whole * size :]
                room[whole, :, rest:] = 0
            filled = whole + (rest > 0)
            room[filled:threads] = 0  # not the matrices of an earlier batch
            yield first, room[: max(filled, threads)]

    @cached_property
    def _factors(self) -> Tensor | None:
        """``[n]``, if the rows are multiples of the base rows, as clipped ones are; else None."""
        if self.mixing is None or self.mixing.shape[0] != self.mixing.shape[1]:
            return None
        factors = self.mixing.diagonal()
        return factors if int(self.mixing.count_nonzero()) == int(factors.count_nonzero()) else None

    def _parts(self, first: int, last: int) -> Iterator[Tensor]:
        """The rows' columns first .. last - 1 one by one, in `work_dtype`, for reading only;
        nothing is copied that need not be.
        """
        if self.mixing is not None:
            yield from self.block(first, last)
        elif self.scales is not None:
            yield from (self.values[i, first:last] * self.scales[i] for i in self._stored)
        else:
            yield from (self.values[i, first:last].to(self.work_dtype) for i in self._stored)

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """Blocks of columns (first, last, ``[n, last - first]``) in `work_dtype`, for reading
        only.
        """
        for first, last in self._bounds():
            yield first, last, self.block(first, last)

    def dense(self) -> Tensor:
        """The rows as one matrix ``[n, d_local]`` (a copy where rows are selected or mixed)."""
        if self.index is None and self.mixing is None and self.scales is None:
            return self.values
        out = self.values.new_empty(len(self), self.values.shape[1])
        differentiable = torch.is_grad_enabled() and self.values.requires_grad
        if self._factors is not None and self.scales is None and not differentiable:
            for row, i, factor in zip(out, self._stored, self._factors.tolist(), strict=True):
                torch.mul(self.values[i], factor, out=row)
            return out
        for first, last, block in self.blocks():
            out[:, first:last] = block
        return out

    def wide(self) -> Tensor:
        """The rows in float64, divided by `unit`: ``[n, d_local]``, for reading only."""
        wide = self.dense().double()
        return wide if self.unit == 1 else wide / self.unit

    def with_values(self, values: Tensor) -> Rows:
        """Other rows ``[m, d_local]`` of which all else is as of these: columns, random stream,
        shares; and if there are as many, whose they are.
        """
        workers = self.workers if len(values) == len(self) else None
        return replace(self, values=values, index=None, workers=workers, mixing=None)

    @property
    def stream(self) -> torch.Generator:
        """The round's random stream; rows without one (a plain matrix) always get the same."""
        return self.generator or torch.Generator().manual_seed(0)

    def columns(self, index: Tensor) -> Rows:
        """The rows in some columns of the whole vectors only, given by their indices; a slice keeps
        those that it holds.
        """
        index = index.to(self.values.device)
        kept = [
            index[(index >= first) & (index < last)] - first + place
            for place, first, last in self._places()
        ]
        return replace(
            self, values=self.values[:, torch.cat(kept)], last=None, dim=None, spans=None
        )

    def holds(self, index: Tensor) -> Tensor:
        """``[k]`` bool: which columns of the whole vectors, given by their indices, are here."""
        held = torch.zeros(len(index), dtype=torch.bool)
        for _, first, last in self._places():
            held |= (index >= first) & (index < last)
        return held

    def span(self, first: int, last: int) -> Rows:
        """The rows in columns first .. last - 1 of the whole vectors only; a slice keeps those that
        it holds, copied where they lie apart.
        """
        kept = [
            self.values[:, place + max(first, begin) - begin : place + min(last, end) - begin]
            for place, begin, end in self._places()
            if max(first, begin) < min(last, end)
        ]
        values = kept[0] if len(kept) == 1 else torch.cat(kept, 1) if kept else self.values[:, :0]
        return replace(self, values=values, last=None, dim=None, spans=None)

    def _places(self) -> Iterator[tuple[int, int, int]]:
        """For every span: where it begins in this slice, and where it begins and ends in the whole
        vectors.
        """
        place = 0
        for first, last in ((0, self.values.shape[1]),) if self.spans is None else self.spans:
            yield place, first, last
            place += last - first

    def pieces(self) -> Iterator[tuple[int, Rows]]:
        """The rows of one span after the other, and where it begins in the whole vectors; for work
        on one coordinate at a time.
        """
        for place, first, last in self._places():
            values = self.values[:, place : place + last - first]
            yield first, replace(self, values=values, spans=((first, last),), last=None, _cache={})

    # -- looking across columns --------------------------------------------------------------------

    def sum(self, partial: Tensor) -> Tensor:
        """A small tensor of partial sums over this slice's columns, added up over all slices."""
        return self.total(partial)

    def finite(self, by: Literal["norms", "products"] | None = "norms") -> Tensor:
        """``[n]`` bool: the rows that hold neither nan nor inf, in any slice. ``by``: look by way
        of `squared_norms`, or of `gram`, where rules ask for these next; None: of all numbers.
        """
        base = replace(self, mixing=None)
        # finite rows may add up to others
        if self.mixing is not None and bool((self.mixing.abs().sum(1) > 1 + 1e-9).any()):
            bad = torch.zeros(len(self), dtype=torch.bool, device=self.values.device)
            for _, _, block in self.blocks():
                bad |= torch.stack([~all_finite(row) for row in block])
        elif not self._on_cpu and self.values.shape[1]:  # in one kernel
            low, high = torch.aminmax(base._base(self.values), dim=1)
            bad = ~(low.isfinite() & high.isfinite())
            bad = bad if self.mixing is None else ((self.mixing != 0) & bad).any(1)
        else:  # a finite norm tells
            if by == "products" and self._is_quick and self.total is _identity:
                base._keep_products_of_finite_rows()
            unsure = (
                (~base.squared_norms().isfinite()).nonzero().flatten().tolist()
                if by is not None and self._is_quick
                else range(len(base))
            )
            bad = torch.zeros(len(base), dtype=torch.bool, device=self.values.device)
            for i in unsure:
                bad[i] = ~all_finite(self.values[self._stored[i]])
            if self.mixing is not None:
                bad = ((self.mixing != 0) & bad).any(1)
        bad = bad.to(device=self.values.device, dtype=torch.float64)
        return self.sum(bad) == 0

    def _keeps_shifts(self) -> bool:
        """Whether all rows move by the same vector if all base rows do: the weights of each add up
        to the same number.
        """
        if self.mixing is None:
            return True
        sums = self.mixing.sum(1)
        return bool(((sums - sums[0]).abs() <= 1e-12 * self.mixing.abs().sum(1).max()).all())

    def gram(self) -> Tensor:
        """``[n, n]`` float64 inner products, after a shift of all rows that cancels in distances.

        No row's size may cost another row's digits. Products of float32 rows on a CPU are made in
        float32, block by block, and added up in float64, which keeps 7 digits of the rows' norms;
        where two rows are so close that their distance would not have 5 of them left, or a number
        leaves float32's range, they are made again in float64, where they are exact and cannot
        overflow. Rows that are float64 already are first centred by their coordinate-wise median,
        which f rows cannot move far from the others; if they were mixed with weights of different
        sums (clipped ones), they are made for that. For all other mixtures the base rows' products
        do.
        """
        if self.mixing is not None and self._keeps_shifts():
            return self.agree(self.mixing @ replace(self, mixing=None).gram() @ self.mixing.T)
        known = self._known("products")
        if known is not None:
            return known
        quick = self._is_quick and (self.mixing is None or self._factors is not None)
        return self._keep(
            "products", self._corrected(self._quick_products()) if quick else self._exact_products()
        )

    def _known(self, what: str) -> Tensor | None:
        """What somebody has asked for already, of exactly these rows."""
        values, index, known = self._cache.get(what, (None, None, None))
        return (
            known if values is self.values and index is self.index and self.mixing is None else None
        )

    def _keep(self, what: str, made: Tensor) -> Tensor:
        """The same, kept for whoever asks next."""
        if self.mixing is None:
            self._cache[what] = (self.values, self.index, made)
        return made

    @property
    def _is_quick(self) -> bool:
        """Whether float32 products are faster, and what they say."""
        # else the user allows products of fewer digits
        whole = torch.get_float32_matmul_precision() == "highest"
        return self._on_cpu and whole and self.work_dtype == torch.float32

    def _keep_products_of_finite_rows(self) -> None:
        """`gram` of base rows, for whoever asks next, if no row holds a nan or an inf."""
        if self._known("products") is None:
            products = self._quick_products()
            if bool(products.diagonal().isfinite().all()):
                self._keep("products", self._corrected(products))

    def _quick_products(self) -> Tensor:
        """Inner products in float32, rank 0's on all ranks."""
        if self._factors is not None:
            return self._factors * replace(self, mixing=None).gram() * self._factors[:, None]
        as_stored = self._as_stored()
        if as_stored is not None:
            return self.agree(self.sum(kernels.inner_products(as_stored)))
        products = torch.zeros(len(self), len(self), dtype=torch.float64)
        for first, last in self._bounds(_WIDE):
            block = self.block(first, last)
            if kernels.fits([*block]):
                products += kernels.inner_products([*block])
                continue
            for _, matrices in self._matrices(block, min(_NARROW, self.values.shape[1])):
                for product in torch.bmm(matrices, matrices.mT):
                    products += product
        return self.agree(self.sum(products))

    def _corrected(self, products: Tensor) -> Tensor:
        """Inner products from float32, with those of rows for which that is not enough made
        again.
        """
        squares = products.diagonal()
        both = squares[:, None] + squares[None, :]
        # no comparison with a nan or an inf holds on both sides
        apart = (both - 2 * products > _CLOSE * both) & (both > _FAINT)
        close = ~apart.fill_diagonal_(True).all(1) | ~products.isfinite().all(1)
        if bool(close.any()):
            products[close[:, None] & close] = self.select(close)._exact_products().flatten()
        return products

    def _exact_products(self) -> Tensor:
        """Inner products in float64, rank 0's on all ranks."""
        products = torch.zeros(len(self), len(self), dtype=torch.float64, device=self.values.device)
        room: Tensor | None = None
        for _, _, block in replace(self, mixing=None).blocks():
            for narrow in torch.split(block, _NARROW if self._on_cpu else block.shape[1], dim=1):
                if self.mixing is not None:
                    wide = self.mixing @ narrow.double()
                else:
                    room = (
                        torch.empty(narrow.shape, dtype=torch.float64, device=block.device)
                        if room is None
                        else room
                    )
                    wide = room[:, : narrow.shape[1]].copy_(narrow)
                if self.unit != 1:
                    wide /= self.unit
                if block.dtype == torch.float64:
                    wide -= median_of_rows(wide)
                products.addmm_(wide, wide.T)
        return self.agree(self.sum(products))

    def squared_distances(self) -> Tensor:
        """``[n, n]`` float64 ``||x_i - x_j||^2``, exactly symmetric, 0 on the diagonal; ``inf``
        where it overflows.
        """
        if self.mixing is None or not self._keeps_shifts():
            products = self.gram()
            squares = products.diagonal()
            distances = squares[:, None] + squares[None, :] - 2 * products
        else:
            # ||sum_k (m_ik - m_jk) x_k||^2, from base distances, whose entries depend on two rows
            # each
            products = replace(self, mixing=None).gram()
            squares = products.diagonal()
            pairs = squares[:, None] + squares[None, :] - 2 * products
            # [m, m, k], and sums to 0 over k
            difference = self.mixing[:, None, :] - self.mixing[None, :, :]
            distances = self.agree(
                -0.5 * torch.einsum("ijk,kl,ijl->ij", difference, pairs, difference)
            )
        distances = torch.nan_to_num(distances, nan=torch.inf, posinf=torch.inf).clamp_min(0)
        return torch.minimum(distances, distances.T).fill_diagonal_(0)

    def squared_norms(self) -> Tensor:
        """``[n]`` float64 ``||x_i||^2``."""
        known = self._known("squares")
        if known is not None:
            return known
        # float64 rows are shifted first
        products = None if self.work_dtype == torch.float64 else self._known("products")
        if products is None:
            return self._keep("squares", self._squares(None))
        squares = products.diagonal()
        faint = ~(squares > _FAINT)
        if bool(faint.any()):
            squares = squares.clone()
            squares[faint] = self.select(faint)._sums_of_squares(None, torch.float64)
        return self._keep("squares", squares)

    def squared_distances_to(self, center: Tensor | None) -> Tensor:
        """``[n]`` float64 ``||x_i - center||^2`` for a vector ``center [d_local]`` (None: the
        origin).

        Raises:
            ValueError: if the center is of another size, or on another device.
        """
        values = self.values
        if center is not None and (
            center.shape != values.shape[1:] or center.device != values.device
        ):
            raise ValueError(
                f"A center of these rows should be a vector [{values.shape[1]}] on "
                f"{values.device}. Found shape {list(center.shape)} on {center.device}."
            )
        return self.squared_norms() if center is None else self._squares(center)

    def _squares(self, center: Tensor | None) -> Tensor:
        """`squared_distances_to`, made anew: in float32 where that is enough."""
        if not self._is_quick:
            return self._sums_of_squares(center, torch.float64)
        squares = self._sums_of_squares(center, torch.float32)
        unsure = ~(squares > _FAINT) | ~squares.isfinite()
        if bool(unsure.any()):
            squares[unsure] = self.select(unsure)._sums_of_squares(center, torch.float64)
        return squares

    def _sums_of_squares(self, center: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The same from sums over blocks that are made in ``dtype``."""
        quick = dtype == torch.float32 and self.mixing is None and self.unit == 1
        as_stored = self._as_stored() if quick else None
        if as_stored is not None:
            middle = None if center is None else center.to(self.work_dtype).contiguous()
            return self.agree(self.sum(kernels.squared_distances(as_stored, middle)))
        squares = torch.zeros(len(self), dtype=torch.float64, device=self.values.device)
        for first, last in self._bounds(_WIDE):
            parts = self._parts(first, last)
            if self.unit != 1:
                parts = (part / self.unit for part in parts)
            if center is not None:
                middle = center[first:last].to(self.work_dtype) / self.unit
                room = torch.empty_like(middle)
                parts = (torch.sub(part, middle, out=room) for part in parts)
            if dtype == torch.float64:
                sums = [torch.dot(wide, wide) for wide in (part.double() for part in parts)]
            else:  # a norm is twice as fast as a product
                sums = [
                    torch.linalg.vector_norm(_chunks(part), dim=-1).double().square().sum()
                    for part in parts
                ]
            squares += torch.stack(sums)
        return self.agree(self.sum(squares))

    def norms(self) -> Tensor:
        """``[n]`` float64 ``||x_i||``, in the rows' own units, whatever their squares are."""
        squares = self.squared_norms()
        norms = squares.sqrt() * self.unit
        odd = ~((squares > 2.0**-900) & squares.isfinite())
        if self.work_dtype == torch.float64 and bool(odd.any()):
            rows = replace(self.select(odd), unit=1.0)
            sizes = 2.0 ** rows._exponents().clamp(-1000, 1000).double()
            norms[odd] = rows._times(1 / sizes).squared_norms().sqrt() * sizes
        return norms

    def in_range(self, f: int) -> Rows:
        """The same rows, for rules that square numbers: so that no square of theirs leaves
        float64's range.

        `unit` becomes about the size of the largest row when the f largest are left out, which f
        rows cannot choose: it is no larger than the largest of the other n - f. Rows that are 2^200
        times as large, f at most, are shrunk to that by a power of two: what bears whatever f rows
        hold bears these in their place. (Where not even that power can be written, they become 0.)
        Only float64 rows need it, and only if a norm is above 2^200 or below 2^-200; all others are
        returned as they are.
        """
        if self.work_dtype != torch.float64 or self.unit != 1 or self.scales is not None:
            return self
        squares = self.squared_norms()
        if bool(((squares > 2.0 ** (-2 * _REACH)) & (squares < 2.0 ** (2 * _REACH))).all()):
            return self
        exponents = self._exponents()
        ordered = exponents.sort().values.tolist()
        usual = ordered[-1 - f]
        if usual == _NOTHING:
            usual = next((exponent for exponent in ordered if exponent != _NOTHING), 0)
        if usual > -_REACH and ordered[-1] < _REACH:
            return self
        usual = max(-1000, min(1000, usual))
        beyond = (exponents - usual - _REACH).clamp_min(0)
        rows = replace(self, unit=2.0**usual, _cache={})
        if not bool(beyond.any()):
            return rows
        # products are those of the base rows, which may be large where the mixed ones are not
        if rows.mixing is not None:
            rows = rows.with_values(rows.dense())
        return rows._times(2.0 ** -beyond.double())

    def _exponents(self) -> Tensor:
        """``[n]`` int: 2 to that is the size of every row's largest number, about; `_NOTHING` if it
        is 0.
        """
        largest = torch.zeros(len(self), dtype=torch.float64, device=self.values.device)
        for _, _, block in self.blocks():
            largest = torch.maximum(largest, block.abs().amax(1))
        # no sum over slices overflows
        mantissa, exponent = torch.frexp(self.agree(self.sum(largest * 2.0**-32)))
        return torch.where(mantissa > 0, exponent + 32, _NOTHING)

    def _times(self, factors: Tensor) -> Rows:
        """Every row times a power of two ``factors [n]``."""
        if self.mixing is not None:
            return replace(self, mixing=factors[:, None] * self.mixing)
        scales = torch.ones(len(self.values), dtype=torch.float64, device=self.values.device)
        scales = scales if self.scales is None else scales * self.scales
        scales[slice(None) if self.index is None else self.index] *= factors
        return replace(self, scales=scales, _cache={})

    def kth_largest(self, magnitudes: Tensor, k: int) -> Tensor:
        """The k-th largest number of a vector ``[d_local]`` of numbers >= 0 that lies in slices as
        these rows do; the least one if it has fewer.

        Bits of such numbers are ordered as the numbers are, so that counting the leading ones, some
        more at a time, finds it in all slices.
        """
        bits = magnitudes.view(
            {2: torch.int16, 4: torch.int32, 8: torch.int64}[magnitudes.element_size()]
        )
        shift, found = 8 * magnitudes.element_size() - 1, 0
        left = min(k, int(self._count(bits)))
        # A sample tells below which number it need not be sought; if that was misleading, it is
        # sought among all.
        step, first = max(1, len(bits) // _SAMPLE), max(0, shift - 11)
        reached = self._leading(bits[::step], shift - first, first, step).flip(0).cumsum(0).flip(0)
        floor = (
            int((reached >= 1.5 * left).sum() - 1) << first if bool(reached[0] >= 1.5 * left) else 0
        )
        likely = bits[places_of(bits >= floor)]
        bits = likely if int(self._count(likely)) >= left else bits
        while shift:
            width = min(11, shift)
            shift -= width
            counts = self._leading(bits, width, shift)
            above = counts.flip(0).cumsum(0).flip(0) - counts  # how many are larger
            digit = int(((above < left) & (counts > 0)).nonzero()[0]) if left else 0
            left -= int(above[digit])
            found = found << width | digit
            bits = bits[places_of(bits >> shift == digit)] & (2**shift - 1)
        return torch.tensor(found, dtype=bits.dtype, device=bits.device).view(magnitudes.dtype)

    def _count(self, vector: Tensor) -> Tensor:
        """How many numbers a vector has that lies in slices as these rows do."""
        return self.sum(torch.tensor([len(vector)], dtype=torch.float64, device=vector.device))

    def _leading(self, bits: Tensor, width: int, shift: int, weight: float = 1.0) -> Tensor:
        """``[2^width]`` float64: how often each number occurs among ``bits >> shift``, in all
        slices, times this slice's weight.
        """
        return self.sum(weight * torch.bincount(bits >> shift, minlength=2**width).double())

    def norm(self, vector: Tensor) -> Tensor:
        """``||vector||``, a 0-d float64 tensor, of a vector ``[d_local]`` that lies in slices as
        these rows do.
        """
        square = self.agree(
            self.sum(torch.linalg.vector_norm(vector, dtype=torch.float64).square())
        )
        if 2.0**-900 < float(square) < torch.inf:
            return square.sqrt()
        return replace(
            self, values=vector[None], index=None, mixing=None, scales=None, unit=1.0, _cache={}
        ).norms()[0]

    # -- from n vectors to one ---------------------------------------------------------------------

    def map(self, rule: Callable[[Tensor], Tensor], averages: bool = False) -> Tensor:
        """A coordinate-wise rule, ``[n, c] -> [c]``, applied to every block of columns: a vector
        ``[d_local]``.

        Args:
            rule: of a block.
            averages: it gives means of numbers of a column, whose sums may overflow where they do
                not: then it is given smaller ones.
        """
        width = self.values.shape[1]
        out = self.values.new_empty(width)
        bounds, compiled = self._bounds(), self.compiled and not self._on_cpu
        if compiled:
            # one pass over rows as they are stored; over selected or mixed ones, as much at a time
            # as is worth a copy
            rule = _compiled(rule)
            whole = self.index is None and self.mixing is None
            size = width if whole else _BLOCK_ON_ACCELERATOR // 4
            bounds = [(first, min(first + size, width)) for first in range(0, width, size)]
        known = isinstance(rule, ColumnStatistic) and self._factors is None
        as_stored = self._as_stored() if known and not compiled else None
        if isinstance(rule, ColumnStatistic) and as_stored is not None:
            odd = bool(rule.by_kernel(as_stored, out, self.mixing) & kernels.ODD_RESULT)
        else:
            for first, last in bounds:
                out[first:last] = rule(self.block(first, last))
            odd = averages and not bool(all_finite(out))
        if averages and odd:
            part = 2.0 ** -len(self).bit_length()
            for first, last in bounds:
                block, found = self.block(first, last), out[first:last]
                again, most = rule(block * part) / part, block.abs().amax(0)
                found.copy_(torch.where(found.isfinite(), found, again.clamp(-most, most)))
        return out

    def map_if_finite(self, rule: Callable[[Tensor], Tensor]) -> Tensor | None:
        """`map`, if one pass over the rows gives the result and tells that all are finite; None:
        it does not, or some are not.
        """
        if not isinstance(rule, ColumnStatistic) or self.total is not _identity:
            return None
        as_stored = self._as_stored() if self.mixing is None else None
        if as_stored is None:
            return None
        out = self.values.new_empty(self.values.shape[1])
        return out if rule.by_kernel(as_stored, out) == 0 else None

    def _as_stored(self) -> list[Tensor] | None:
        """The base rows as they lie in memory, if a kernel can take them from there; else None."""
        if self.scales is not None or self.values.dtype != self.work_dtype:
            return None
        rows = [self.values[i] for i in self._stored]
        fit = 1 <= len(self) <= kernels.MOST_ROWS and kernels.fits(rows)
        return rows if fit else None

    def combine(self, weights: Tensor) -> Tensor:
        """``sum_i weights[i] * row_i``, a vector ``[d_local]``. Rows of weight 0 are never read: 0
        * inf is nan.

        A mean is never larger than the largest of its numbers, not even by rounding.
        """
        weights = weights.to(device=self.values.device, dtype=torch.float64)
        if self.mixing is not None:
            weights = weights @ self.mixing
        if self.scales is not None:
            weights = weights * self._base(self.scales)
        listed = [weight for weight in weights.tolist() if weight]
        places = zip(self._stored, weights.tolist(), strict=True)
        used = [self.values[place] for place, weight in places if weight]
        out = torch.empty(self.values.shape[1], dtype=self.work_dtype, device=self.values.device)
        if used and self.values.dtype == self.work_dtype and kernels.fits(used):
            odd = bool(kernels.weighted_sum(used, listed, out) & kernels.ODD_RESULT)
        else:
            self._add_up(used, listed, out.zero_())
            odd = not bool(all_finite(out))
        if odd and sum(map(abs, listed)) < 1 + 1e-9:
            most = torch.stack([row.abs() for row in used]).amax(0).to(out.dtype)
            out.clamp_(-most, most)
        return out.to(self.values.dtype)

    def _add_up(self, rows: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        """Adds a weighted sum of vectors ``[d_local]`` to ``out``, with the bits of the kernel."""
        for first, last in self._bounds(_WIDE * torch.get_num_threads() if self._on_cpu else None):
            for row, weight in zip(rows, weights, strict=True):
                out[first:last] += row[first:last].to(out.dtype) * weight


_COMPILED: dict[ColumnStatistic, Callable[[Tensor], Tensor]] = {}


def _compiled(rule: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The rule as torch.compile makes it. Wrapping takes milliseconds, longer than a rule takes on
    a GPU, so that it is done once for equal statistics; for other functions every time.
    """
    # here, as it imports the compiler
    torch.compiler.assume_constant_result(pruned_network)  # type: ignore[no-untyped-call]
    if not isinstance(rule, ColumnStatistic):
        return torch.compile(rule, dynamic=True)
    if rule not in _COMPILED:
        _COMPILED[rule] = torch.compile(rule.__call__, dynamic=True)
    return _COMPILED[rule]


def _chunks(block: Tensor) -> Tensor:
    """Columns ``[..., width]`` as ``[..., chunks, _NARROW]``, followed by zeros; as one chunk if
    they are fewer.
    """
    size = min(block.shape[-1], _NARROW)
    missing = -block.shape[-1] % size
    whole = torch.nn.functional.pad(block, (0, missing)) if missing else block
    return whole.view(*block.shape[:-1], -1, size)
