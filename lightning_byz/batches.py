"""Batches of any nesting: their entries, and splitting them among the workers of one process."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import UserDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from _tensors(getattr(batch, field.name))


def batch_size(batch: Any) -> int | None:
    """The first dimension of the first tensor in a batch that has one, or None if it holds no such tensor."""
    first = next(_tensors(batch), None)
    return None if first is None else len(first)


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Cuts a batch into consecutive parts of almost equal size.

    Tensors are cut along their first dimension (as views), and so are lists and tuples of strings or numbers that are as long as
    the batch; numbers, 0-d tensors and other objects go to every part. Dicts, lists, tuples, named tuples and dataclasses keep
    their type, at any depth. If there are fewer samples than parts, the last parts are None.

    Raises:
        ValueError: if the batch holds no tensor, or tensors of different first dimension.
    """
    size = batch_size(batch)
    if size is None:
        raise ValueError(
            f"To split a batch among {parts} in-process workers, it should hold tensors whose first dimension is the batch. "
            f"Found none in a batch of type {type(batch).__name__}. Use one worker per process (workers_per_process=1)."
        )
    odd = next((tensor for tensor in _tensors(batch) if len(tensor) != size), None)
    if odd is not None:
        raise ValueError(
            f"To split a batch among {parts} in-process workers, all its tensors should have the same first dimension. Found "
            f"shapes starting with {size} and {len(odd)}. Put the samples first in every tensor, or use one worker per process "
            "(workers_per_process=1)."
        )
    bounds = [(i * size) // parts for i in range(parts + 1)] if size >= parts else [*range(size + 1)]
    chunks = list(itertools.pairwise(bounds))
    return [_cut(batch, first, last, size) for first, last in chunks] + [None] * (parts - len(chunks))


def _cut(item: Any, first: int, last: int, size: int) -> Any:
    if isinstance(item, Tensor):
        return item[first:last] if item.ndim else item
    if isinstance(item, Mapping):
        cut = {key: _cut(value, first, last, size) for key, value in item.items()}
        return _rebuilt_mapping(item, cut)
    if isinstance(item, (list, tuple)):
        is_record = hasattr(item, "_fields")  # a named tuple has one entry per field, never one per sample
        nested = any(isinstance(part, (Tensor, Mapping, list, tuple)) for part in item) or next(_tensors(item), None) is not None
        is_leaf_list = len(item) == size and not is_record and not nested
        parts = list(item[first:last]) if is_leaf_list else [_cut(value, first, last, size) for value in item]
        return type(item)(*parts) if is_record else type(item)(parts)
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        changed = {
            field.name: _cut(getattr(item, field.name), first, last, size) for field in dataclasses.fields(item) if field.init
        }
        return dataclasses.replace(item, **changed)
    return item


def _rebuilt_mapping(item: Mapping[Any, Any], cut: dict[Any, Any]) -> Any:
    """A mapping of this type with other values for the same keys."""
    if type(item) is dict:
        return cut
    if isinstance(item, (dict, UserDict)):  # whose copies share no entries, and keep attributes and default factories
        rebuilt = copy.copy(item)
        for key, value in cut.items():
            rebuilt[key] = value
        return rebuilt
    return type(item)(cut)  # type: ignore[call-arg]


def entry(batch: Any, key: int | str) -> Any:
    """A batch's entry: by index in a tuple or list, by key in a mapping, by name in any other object.

    Raises:
        LookupError: if there is none.
    """
    if isinstance(batch, Mapping) or (isinstance(batch, (list, tuple)) and isinstance(key, int)):
        return batch[key]
    if isinstance(batch, Tensor) or not isinstance(key, str) or not hasattr(batch, key):
        raise LookupError(f"{type(batch).__name__} has no entry {key!r}.")
    return getattr(batch, key)


def with_entry(batch: Any, key: int | str, value: Any) -> Any:
    """A batch of the same type with another value in one entry, see `entry`; the given one is not modified."""
    if isinstance(batch, Mapping):
        return _rebuilt_mapping(batch, {**batch, key: value})
    if isinstance(batch, (list, tuple)) and isinstance(key, int):
        parts = list(batch)
        parts[key] = value
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if hasattr(batch, "_fields"):
        return batch._replace(**{str(key): value})
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(batch, **{str(key): value})
    changed = copy.copy(batch)
    setattr(changed, str(key), value)
    return changed
