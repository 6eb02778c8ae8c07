"""Large tensors: fresh memory is slow, products of rows want them to begin at certain places, and
numpy is quicker at some passes.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


def empty_rows(n: int, width: int, like: Tensor) -> Tensor:
    """Room for rows ``[n, width]``, of the dtype and on the device of ``like``, each of which
    begins at a multiple of 64 bytes. What lies between two rows is 0.
    """
    unit = max(1, 64 // like.element_size())
    room = like.new_empty(n, -(-width // unit) * unit)
    room[:, width:] = 0
    return room[:, :width]


def side_by_side(vectors: Sequence[Tensor | None]) -> Tensor | None:
    """Vectors that lie in one storage at equal distances, as a matrix without a copy; else None."""
    first = vectors[0]
    if first is None or len(vectors) < 2:
        return None
    storage, size, starts = first.untyped_storage().data_ptr(), first.shape, []
    for vector in vectors:
        if (
            vector is None
            or vector.stride() != (1,)
            or vector.shape != size
            or vector.dtype != first.dtype
            or vector.untyped_storage().data_ptr() != storage
        ):
            return None
        starts.append(vector.storage_offset())
    gap = starts[1] - starts[0]
    if gap < len(first) or any(b - a != gap for a, b in itertools.pairwise(starts)):
        return None
    return torch.as_strided(first, (len(vectors), len(first)), (gap, 1))


def one_after_the_other(pieces: Sequence[Tensor]) -> Tensor:
    """Vectors as one: without a copy where they follow each other in one storage."""
    first, place = pieces[0], pieces[0].storage_offset()
    for piece in pieces:
        if (
            piece.dim() != 1
            or piece.stride() != (1,)
            or piece.dtype != first.dtype
            or piece.storage_offset() != place
            or not same_memory(piece, first)
        ):
            return torch.cat(tuple(pieces))
        place += len(piece)
    return torch.as_strided(first, (place - first.storage_offset(),), (1,))


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def end_to_end(rows: Tensor) -> Tensor | None:
    """Rows ``[n, d]`` of memory as one vector ``[n * width]`` without a copy, width being their
    distance: with what lies between them. None where the memory ends before.
    """
    n, width = len(rows), rows.stride(0)
    room = rows.untyped_storage().nbytes() // rows.element_size() - rows.storage_offset()
    return torch.as_strided(rows, (n * width,), (1,)) if n * width <= room else None


def places_of(mask: Tensor) -> Tensor:
    """Where a vector ``[d]`` of bools is true: increasing indices. On a CPU numpy takes a quarter
    of the time of ``nonzero``.
    """
    return (
        torch.from_numpy(np.flatnonzero(mask.numpy()))
        if mask.device.type == "cpu"
        else mask.nonzero().flatten()
    )


class Lender:
    """Memory for one vector after the other, because fresh memory is slow: a vector's is lent again
    once no tensor looks at it any more. On accelerators the allocator does that.
    """

    def __init__(self) -> None:
        # memory, and what lives as long as a tensor looks at it
        self._known: list[tuple[Tensor, weakref.ref[np.ndarray]]] = []

    def __call__(self, like: Tensor) -> Tensor:
        """Memory for a vector of this shape, dtype and device."""
        if like.device.type != "cpu":
            return torch.empty_like(like)
        free = [memory for memory, user in self._known if user() is None]
        memory = next((each for each in free if each.numel() == like.nbytes), None)
        if memory is None:
            memory = torch.empty(like.nbytes, dtype=torch.uint8)
        user = memory.numpy()
        in_use = [(each, user) for each, user in self._known if user() is not None]
        self._known = [*in_use, (memory, weakref.ref(user))]
        return torch.from_numpy(user).view(like.dtype)


class TensorPool:
    """Memory for the workers' next states (`Round.room`): that of states which nobody needs any
    more, because fresh memory is slow.

    What it has lent comes back once the state that holds it has had its day; tensors from elsewhere
    are never written into.
    """

    def __init__(self) -> None:
        self._lent: dict[int, weakref.ref[Tensor]] = {}
        self._spare: list[Tensor] = []

    def __call__(self, like: Tensor) -> Tensor:
        """Memory for a tensor of this shape, dtype and device."""
        for i, spare in enumerate(self._spare):
            if (spare.shape, spare.dtype, spare.device) == (like.shape, like.dtype, like.device):
                return self._spare.pop(i)
        made = torch.empty_like(like)
        self._lent = {key: lent for key, lent in self._lent.items() if lent() is not None} | {
            id(made): weakref.ref(made)
        }
        return made

    def take_back(self, old: Iterable[Tensor], new: Iterable[Tensor]) -> None:
        """What was lent for the tensors of an ``old`` state, which are not among those of the
        ``new`` one.
        """
        kept = {id(tensor) for tensor in new}
        for tensor in old:
            lent = self._lent.get(id(tensor))
            if lent is not None and lent() is tensor and id(tensor) not in kept:
                self._spare.append(tensor)
