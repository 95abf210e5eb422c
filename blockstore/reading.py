"""Reading: what NumPy's basic indexing takes of an array that lies in files, and where data that is assigned goes.

This module joins `indexing`, which knows numbers, to `Files`, which know bytes.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from blockstore.files import Files
from blockstore.indexing import Selection, block_range, overlap, parse
from blockstore.layouts.grid import Index
from blockstore.shard import Shard


class Part(NamedTuple):
    """What a selection takes of one block."""

    block: Index
    """Its index in the array's grid of blocks."""
    targets: tuple[slice, ...]
    """Where in what is gathered it goes."""
    sources: tuple[slice, ...]
    """Which elements of the block."""


def take(files: Files, key: object, *, copy: bool | None = None) -> Any:
    """Return what an index takes: read-only, and without a copy where that can be. See `BlockArray.__getitem__`.

    With ``copy=True`` it is a copy, which can be written; with ``copy=False``, and where there must be one, it raises
    `ValueError`.
    """
    grid = files.plan.grid
    selection = parse(key, grid.shape)
    shape = tuple(map(len, selection.axes))
    is_empty = 0 in shape
    found = None if is_empty else _view(files, selection)
    if found is not None and copy:
        found = found.copy()
    if found is None and copy is False and not is_empty:
        raise ValueError(f"{files.plan.name!r} is not all written, or not in one piece: there is no view of all of it")
    if found is None:
        found = np.empty(shape, grid.dtype)
        for part in parts(files, selection):
            shard, number = files.place(part.block)
            block = shard.read(number)
            found[part.targets] = files.plan.fill_value if block is None else block[part.sources]
        found.setflags(write=bool(copy))
    return found[selection.post]


def parts(files: Files, selection: Selection) -> Iterator[Part]:
    """Iterate over the blocks that a selection takes something of, in C order."""
    grid = files.plan.grid
    if not all(selection.axes):
        return
    per_axis = []
    for axis, chunk, n in zip(selection.axes, grid.chunks, grid.shape, strict=True):
        found = []
        for i in block_range(axis, chunk):
            if (part := overlap(axis, i * chunk, min((i + 1) * chunk, n))) is not None:
                found.append((i, *part))
        per_axis.append(found)
    for combination in itertools.product(*per_axis):
        yield Part(*map(tuple, zip(*combination, strict=True)))


def as_source(data: ArrayLike, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return data that is to be assigned as an array of numbers, which need nothing but a cast that cannot fail.

    Raises what NumPy's assignment raises if there is no such cast.
    """
    if not hasattr(data, "__array__"):
        return np.asarray(data, dtype)
    array = np.asarray(data)
    return array if array.dtype.kind in "biufc" else array.astype(dtype)


def spread(source: NDArray[Any], selection: Selection) -> NDArray[Any]:
    """Return data as it is to be gathered for a selection, broadcast as NumPy's assignment does, without a copy.

    Raises `ValueError` if it does not broadcast.
    """
    given = source.shape
    extra = source.ndim - len(selection.shape)
    if extra > 0 and set(source.shape[:extra]) == {1}:
        source = source.reshape(source.shape[extra:])
    try:
        return np.asarray(np.broadcast_to(source, selection.shape)[selection.inverse])
    except ValueError:
        raise ValueError(f"could not broadcast input array from shape {given} into shape {selection.shape}") from None


def _view(files: Files, selection: Selection) -> NDArray[Any] | None:
    """Return what a selection takes as a view, if it is written and lies in one block or one regular file."""
    grid = files.plan.grid
    per_axis = [block_range(axis, chunk) for axis, chunk in zip(selection.axes, grid.chunks, strict=True)]
    first = tuple(blocks[0] for blocks in per_axis)
    index, inner = grid.locate(first)
    per_shard = grid.per_shard
    if any(blocks[-1] // per != i for blocks, per, i in zip(per_axis, per_shard, index, strict=True)):
        return None
    shard = files.shard(index)
    if all(len(blocks) == 1 for blocks in per_axis):
        found = shard.read(shard.layout.number(inner))
        starts = [i * chunk for i, chunk in zip(first, grid.chunks, strict=True)]
    else:
        found = _regular(
            shard,
            [
                slice(blocks[0] - i * per, blocks[-1] - i * per + 1)
                for blocks, i, per in zip(per_axis, index, per_shard, strict=True)
            ],
        )
        starts = [i * n for i, n in zip(index, grid.shards, strict=True)]
    if found is None:
        return None
    taken = [
        overlap(axis, start, start + n) for axis, start, n in zip(selection.axes, starts, found.shape, strict=True)
    ]
    return np.asarray(found[tuple(each[1] for each in taken if each is not None)])


def _regular(shard: Shard, blocks: list[slice]) -> NDArray[Any] | None:
    """Return all of a shard as one array, if it is one and these blocks of it are written."""
    if not shard.layout.is_array and shard.is_published is False:
        return None
    if not shard.written().reshape(shard.layout.blocks)[tuple(blocks)].all():
        return None
    return shard.whole()
