"""Batches of any nesting: their entries, how many samples they hold, and splitting them among the
workers of one process.

A batch does not say which of its dimensions is the batch. Two readings are possible for a list or
tuple: it holds *fields*, each of which holds all samples (what PyTorch's ``default_collate`` makes
of a tuple), or it holds *samples*, one in each entry (what ``collate_fn=list`` leaves).
`BatchSplitter` takes the reading in which everything has the same number of samples. Where both
have, what is known of the DataLoader decides. Where nothing does, it refuses.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, default_collate

_Path = tuple[Any, ...]
_DEPTH = 3
"""How deep an object's attributes are searched for tensors."""


# -- what a batch is made of -----------------------------------------------------------------------


def _rows(item: Any) -> int | None:
    """The number of samples of a tensor or a packed sequence; None for anything else."""
    if isinstance(item, PackedSequence):
        return int(item.batch_sizes[0])
    return item.shape[0] if isinstance(item, Tensor) and item.ndim else None


def _is_list(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and not hasattr(item, "_fields")


def _children(item: Any) -> list[tuple[Any, Any]]:
    """The entries of a container, with their places; none for anything else."""
    if isinstance(item, Mapping):
        return list(item.items())
    if isinstance(item, PackedSequence):
        return []
    if isinstance(item, (list, tuple)):
        return list(enumerate(item))
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return [(field.name, getattr(item, field.name)) for field in dataclasses.fields(item)]
    return []


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch
    else:
        for _, value in _children(batch):
            yield from _tensors(value)


def _hides_tensors(item: Any, depth: int = _DEPTH) -> bool:
    """Whether an object that is no container holds tensors, which nobody here knows how to cut."""
    if (
        isinstance(item, type)
        or _rows(item) is not None
        or _children(item)
        or not hasattr(item, "__dict__")
        or not depth
    ):
        return False
    for value in vars(item).values():
        inner = [value, *(child for _, child in _children(value))]
        if any(_rows(each) is not None or _hides_tensors(each, depth - 1) for each in inner):
            return True
    return False


def _constrains(item: Any) -> bool:
    """Whether there is something in it that has a number of samples, or hides one."""
    if _rows(item) is not None or _hides_tensors(item):
        return True
    return any(_constrains(child) for _, child in _children(item))


def _has_list(item: Any) -> bool:
    return (
        _is_list(item)
        or isinstance(item, np.ndarray)
        or any(_has_list(child) for _, child in _children(item))
    )


def _bare_rows(item: Any) -> int | None:
    """What `_rows` is in a batch without any tensor: the length of an array, or of a list that has
    no list inside; else None.
    """
    if isinstance(item, np.ndarray) and item.ndim:
        return len(item)
    return len(item) if _is_list(item) and not any(map(_has_list, item)) else None


def _kind(item: Any) -> Any:
    """What the samples of a batch have in common."""
    if isinstance(item, Tensor):
        return item.dtype, item.ndim
    if isinstance(item, Mapping):
        return type(item), frozenset(item)
    return (type(item), len(item)) if isinstance(item, tuple) else type(item)


def batch_size(batch: Any) -> int | None:
    """The first dimension of the first tensor in a batch that has one, or None if it holds no such
    tensor.
    """
    first = next(_tensors(batch), None)
    return None if first is None else len(first)


# -- splitting -------------------------------------------------------------------------------------


class _Reading(NamedTuple):
    """A reading of a batch.

    Attributes:
        size: number of samples.
        samples: the places of lists that hold one sample in each entry.
        either: those that may hold fields as well.
    """

    size: int
    samples: frozenset[_Path]
    either: frozenset[_Path]


class BatchSplitter:
    """Cuts batches into one part for each worker of a process. All batches of a run go through the
    same one.

    Tensors are cut along their first dimension (as views), packed sequences by their sequences,
    lists of samples by their entries. Lists, tuples and arrays without tensors are cut where they
    are as long as the batch. Numbers, strings, 0-d tensors and objects without tensors go to every
    part. Containers keep their type, at any depth. Batches of several loaders (a dict or a list, as
    Lightning's CombinedLoader makes them) are cut one by one, and may differ in size.

    How the lists of a run were read is remembered: the last batch of an epoch, which may be small,
    is read like the others.

    Args:
        loader: where batches come from: ``trainer.train_dataloader``. Of a DataLoader the batch
            size, and whether it collates by ``default_collate``, decide what a batch itself leaves
            open. None: nothing is known.
        parts: number of workers.
        by_hand: ``split_batch(batch, parts)`` of the LightningModule, which is asked instead; None:
            there is none.
    """

    def __init__(
        self, loader: Any, parts: int, by_hand: Callable[[Any, int], Any] | None = None
    ) -> None:
        self.loader, self.parts, self.by_hand = loader, parts, by_hand
        self._size = getattr(loader, "batch_size", None) or getattr(
            getattr(loader, "batch_sampler", None), "batch_size", None
        )
        self._collated = isinstance(loader, DataLoader) and loader.collate_fn is default_collate
        self._samples: set[_Path] = set()
        self._fields: set[_Path] = set()
        several = (
            [] if isinstance(loader, DataLoader) or _rows(loader) is not None else _children(loader)
        )
        self._inner = {place: BatchSplitter(inner, parts) for place, inner in several}

    def _one_by_one(self, batch: Any) -> bool:
        """Whether this is a batch of several loaders' batches."""
        return (
            bool(self._inner)
            and type(batch) is type(self.loader)
            and [*dict(_children(batch))] == [*self._inner]
        )

    def split(self, batch: Any) -> list[Any]:
        """Consecutive parts of almost equal size. If there are fewer samples than parts, the last
        ones are None.

        Raises:
            ValueError: if it is not clear where the samples are.
        """
        if self.by_hand is not None:
            parts = self.by_hand(batch, self.parts)
            if not isinstance(parts, (list, tuple)) or len(parts) != self.parts:
                found = (
                    f"{len(parts)} parts"
                    if isinstance(parts, (list, tuple))
                    else type(parts).__name__
                )
                raise ValueError(
                    "split_batch(batch, parts) of the LightningModule should return a list of "
                    f"{self.parts} parts, None for one without samples. Found {found}."
                )
            return list(parts)
        if self._one_by_one(batch):
            return self._split_one_by_one(batch)
        reading = self._read(batch)
        if isinstance(reading, str):
            raise ValueError(
                f"To split a batch among {self.parts} in-process workers, {reading} Define "
                "split_batch(self, batch, parts) on the LightningModule, which returns a list of "
                "each worker's part, or use one worker per process (workers_per_process=1)."
            )
        size = reading.size
        bounds = (
            [(i * size) // self.parts for i in range(self.parts + 1)]
            if size >= self.parts
            else [*range(size + 1)]
        )
        chunks = list(itertools.pairwise(bounds))
        parts = [_cut(batch, (), first, last, reading) for first, last in chunks]
        return parts + [None] * (self.parts - len(chunks))

    def _split_one_by_one(self, batch: Any) -> list[Any]:
        """Each loader's batch is cut by itself; a worker has a part if it has one of each batch
        that is there.
        """
        cut = {
            place: [None] * self.parts if inner is None else self._inner[place].split(inner)
            for place, inner in _children(batch)
        }
        there = [place for place, inner in _children(batch) if inner is not None]
        return [
            _rebuilt(batch, {place: of[i] for place, of in cut.items()})
            if all(cut[place][i] is not None for place in there)
            else None
            for i in range(self.parts)
        ]

    def size(self, batch: Any) -> int:
        """How many samples a batch, or a part of one, holds: at least 1, but 0 for None. A guess
        where it is not clear.
        """
        if batch is None:
            return 0
        if self.by_hand is None and self._one_by_one(batch):
            first = next((place for place, inner in _children(batch) if inner is not None), None)
            return 0 if first is None else self._inner[first].size(dict(_children(batch))[first])
        reading = "" if self.by_hand is not None else self._read(batch)
        return (batch_size(batch) if isinstance(reading, str) else reading.size) or 1

    # -- reading -----------------------------------------------------------------------------------

    def _read(self, batch: Any) -> _Reading | str:
        """How a batch is to be read, or why nobody can tell, as a sentence."""
        bare = not _constrains(batch)
        sizes = dict.fromkeys(_sizes(batch, bare))
        if bare and not sizes:
            return (
                "it should hold tensors whose first dimension is the batch. Found none in a "
                f"batch of type {type(batch).__name__}."
            )
        # as before, or else, if that is impossible, afresh
        for samples, fields in ((self._samples, self._fields), (set(), set())):
            readings = [
                read
                for size in sizes
                if (read := _fitting(batch, bare, size, samples, fields)) is not None
            ]
            reading = self._chosen(batch, readings) if readings else None
            if isinstance(reading, _Reading):
                self._remember(batch, (), reading)
            if reading is not None:
                return reading
        lengths = dict.fromkeys(len(tensor) for tensor in _tensors(batch))
        if len(lengths) > 1:
            first, second, *_ = lengths
            return (
                "all its tensors should have the same first dimension. Found shapes starting "
                f"with {first} and {second}."
            )
        return (
            f"it should be clear how to cut all that holds tensors. Found a {_opaque(batch)}, "
            "which has a form of its own."
        )

    def _chosen(self, batch: Any, readings: Sequence[_Reading]) -> _Reading | str | None:
        """The reading that what is known of the loader speaks for; a sentence, if nothing does;
        None, if the only one is too far-fetched.
        """
        # in which lists hold fields
        plain = next((read for read in readings if read.samples == read.either), None)
        fitting = next((read for read in readings if read.size == self._size), None)
        if plain is not None and (self._collated or len(readings) == 1):
            reading = plain
        elif len(readings) == 1:
            (reading,) = readings
            if (
                () in reading.samples - self._samples
                and isinstance(batch, tuple)
                and reading is not fitting
            ):
                # two tensors, say, of different lengths: rather a mistake than two samples
                return None
        elif fitting is not None:
            reading = fitting
        elif plain is not None and not any(
            self._may_be_samples(batch, read) for read in readings if read is not plain
        ):
            reading = plain
        else:
            return self._doubtful(readings)
        if not self._collated and self._may_be_samples(
            batch, reading._replace(samples=reading.either)
        ):
            return self._doubtful([reading])
        return reading._replace(samples=reading.samples - reading.either, either=frozenset())

    def _may_be_samples(self, batch: Any, reading: _Reading) -> bool:
        """Whether its lists may hold samples: tuples rather hold fields, and so do lists with less
        than an entry for each worker.
        """
        return any(
            isinstance(found := _at(batch, path), list) and len(found) >= self.parts
            for path in reading.samples
        )

    @staticmethod
    def _doubtful(readings: Sequence[_Reading]) -> str:
        sizes = sorted({read.size for read in readings})
        return (
            "it should be clear whether its lists hold one sample in each entry, or fields that "
            "hold all samples. Found a batch that may be read both ways, as "
            f"{' or '.join(map(str, sizes))} samples."
        )

    def _remember(self, item: Any, path: _Path, reading: _Reading) -> None:
        if path in reading.samples:
            self._samples.add(path)
            return
        if _is_list(item) and len(item) > 1:
            self._fields.add(path)
        for place, child in _children(item):
            self._remember(child, (*path, place), reading)


def split_batch(batch: Any, parts: int) -> list[Any]:
    """A single batch, of a loader that nothing is known of, cut as by a `BatchSplitter`."""
    return BatchSplitter(None, parts).split(batch)


def _sizes(item: Any, bare: bool) -> list[int]:
    """Numbers of samples that a batch may have: those that the first of its entries allows which
    has any. ``bare``: it holds no tensor.
    """
    rows = _bare_rows(item) if bare else _rows(item)
    if rows is not None:
        return [rows]
    inner: list[int] = next(
        (sizes for _, child in _children(item) if (sizes := _sizes(child, bare))), []
    )
    return [*inner, len(item)] if _is_list(item) and (bare or _constrains(item)) else inner


def _fitting(
    batch: Any, bare: bool, size: int, samples: set[_Path], fields: set[_Path]
) -> _Reading | None:
    """The reading with this number of samples, in which these lists hold samples, and those fields;
    None if there is none.
    """
    found: set[_Path] = set()
    either: set[_Path] = set()

    def fits(item: Any, path: _Path) -> bool:
        nonlocal found, either
        rows = _bare_rows(item) if bare else _rows(item)
        if rows is not None:
            return rows == size
        if not (_has_list(item) if bare else _constrains(item)):
            return True
        if _hides_tensors(item):
            return False
        as_samples = (
            _is_list(item)
            and len(item) == size
            and len(set(map(_kind, item))) == 1
            and path not in fields
        )
        before = set(found), set(either)
        as_fields = path not in samples and all(
            fits(child, (*path, place)) for place, child in _children(item)
        )
        if as_samples and not (as_fields and size == 1):  # one sample is cut alike either way
            found, either = (
                (found | {path}, either | {path}) if as_fields else (before[0] | {path}, before[1])
            )
        return as_samples or as_fields

    return _Reading(size, frozenset(found), frozenset(either)) if fits(batch, ()) else None


def _opaque(item: Any) -> str:
    """The name of the first class whose objects hide tensors."""
    if _hides_tensors(item):
        return type(item).__name__
    return next((name for _, child in _children(item) if (name := _opaque(child))), "")


def _at(item: Any, path: _Path) -> Any:
    for place in path:
        item = dict(_children(item))[place]
    return item


# -- cutting ---------------------------------------------------------------------------------------


def _cut(item: Any, path: _Path, first: int, last: int, reading: _Reading) -> Any:
    """Samples first .. last - 1."""
    if isinstance(item, PackedSequence):
        padded, lengths = pad_packed_sequence(item, batch_first=True)
        sorted_already = item.sorted_indices is None
        return pack_padded_sequence(
            padded[first:last], lengths[first:last], batch_first=True, enforce_sorted=sorted_already
        )
    if isinstance(item, Tensor):
        return _sliced(item, first, last) if item.ndim else item
    if isinstance(item, np.ndarray):
        return item[first:last] if item.ndim and len(item) == reading.size else item
    if _is_list(item) and (
        path in reading.samples or (len(item) == reading.size and not _constrains(item))
    ):
        return type(item)(item[first:last])
    children = _children(item)
    if not children:
        return item
    cut = _rebuilt(
        item,
        {place: _cut(child, (*path, place), first, last, reading) for place, child in children},
    )
    # such as the tokenizer's own records in a BatchEncoding, one for each sample
    if isinstance(item, UserDict):
        for name, value in vars(item).items():
            if name != "data" and _is_list(value) and len(value) == reading.size:
                setattr(cut, name, value[first:last])
    return cut


def _sliced(tensor: Tensor, first: int, last: int) -> Tensor:
    if tensor.is_nested:
        return torch.nested.as_nested_tensor(
            list(tensor.unbind()[first:last]), layout=tensor.layout
        )
    rows = torch.arange(first, last, device=tensor.device)
    if tensor.layout == torch.sparse_coo:
        return tensor.index_select(0, rows)
    if tensor.layout in (torch.sparse_csr, torch.sparse_csc):
        return (
            tensor.to_sparse(layout=torch.sparse_coo)
            .index_select(0, rows)
            .to_sparse(layout=tensor.layout)
        )
    part = tensor[first:last]
    # Autograd counts changes in place of all views together: a worker that changes its part would
    # spoil what it has saved of the others'.
    return part.data if type(part) is Tensor and not part.requires_grad else part


def copied(batch: Any) -> Any:
    """A batch whose tensors and containers may be changed: the same objects otherwise."""
    if isinstance(batch, Tensor):
        return batch.detach().clone().requires_grad_(batch.requires_grad)
    children = _children(batch)
    return _rebuilt(batch, {at: copied(item) for at, item in children}) if children else batch


def _rebuilt(item: Any, entries: Mapping[Any, Any]) -> Any:
    """A container of the same type, with other values in the same places; see `_children`."""
    if isinstance(item, Mapping):
        if type(item) is dict:
            return dict(entries)
        if not isinstance(item, (dict, UserDict)):
            return type(item)(dict(entries))  # type: ignore[call-arg]
        # which shares no entries, and keeps attributes and default factories
        rebuilt = copy.copy(item)
        for key, value in entries.items():
            rebuilt[key] = value
        return rebuilt
    if isinstance(item, (list, tuple)):
        return (
            type(item)(*entries.values())
            if hasattr(item, "_fields")
            else type(item)(entries.values())
        )
    return dataclasses.replace(
        item,
        **{field.name: entries[field.name] for field in dataclasses.fields(item) if field.init},
    )


# -- entries ---------------------------------------------------------------------------------------


def entry(batch: Any, key: int | str) -> Any:
    """A batch's entry: by index in a tuple or list, by key in a mapping, by name in any other
    object.

    Raises:
        LookupError: if there is none.
    """
    if isinstance(batch, Mapping):
        return batch[key]
    if isinstance(batch, (list, tuple)) and isinstance(key, int):
        return batch[key]
    if isinstance(batch, Tensor) or not isinstance(key, str) or not hasattr(batch, key):
        raise LookupError(f"{type(batch).__name__} has no entry {key!r}.")
    return getattr(batch, key)


def with_entry(batch: Any, key: int | str, value: Any) -> Any:
    """A batch of the same type with another value in one entry, see `entry`; the given one is not
    modified.
    """
    if isinstance(key, int) and isinstance(batch, (list, tuple)):
        key %= len(batch)
    if isinstance(batch, PackedSequence) or not (children := dict(_children(batch))):
        changed = copy.copy(batch)
        setattr(changed, str(key), value)
        return changed
    if hasattr(batch, "_fields") and isinstance(key, str):
        return batch._replace(**{key: value})
    return _rebuilt(batch, {**children, key: value})
