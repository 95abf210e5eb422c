"""Chunking: how an array is to be divided, from what a caller asks for, or says nothing of.

Sizes along axes are numbers of elements. This module knows what the formats allow, and no files.

Examples
--------
>>> default_chunks((8192, 8192), np.dtype("f8")), default_chunks((10, 100_000, 1000), np.dtype("f8"))
((128, 8192), (1, 1024, 1000))
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from blockstore.alignment import ALIGNMENT
from blockstore.errors import LayoutError
from blockstore.layouts.grid import Grid, Index, split_axis

_BLOCK_NBYTES = 1 << 23
_BLOCK_MIN_NBYTES = 1 << 20
_BLOCKS = 64


def divided(
    shape: Index,
    dtype: np.dtype[Any],
    chunks: int | Sequence[int] | None,
    shards: int | Sequence[int] | None,
    *,
    npy: bool,
) -> Grid:
    if not shape:
        raise LayoutError("an array has one axis at least: shape () was given")
    if math.prod(n or 1 for n in shape) * dtype.itemsize > 1 << 62:
        raise LayoutError(f"shape {shape} of {dtype} is more than a file can hold")
    per_block = default_chunks(shape, dtype) if chunks is None else _per_axis("chunks", chunks, shape)
    if npy and split_axis(shape, per_block) is None:
        nearest = (per_block[0], *(max(n, 1) for n in shape[1:]))
        raise LayoutError(
            f"blocks of {per_block} do not follow each other in an .npy of shape {shape}, which is in C order: "
            f"chunks={nearest} would, and a Zarr array takes any"
        )
    whole = tuple(-(-max(n, 1) // chunk) * chunk for n, chunk in zip(shape, per_block, strict=True))
    if shards is None:
        return Grid(shape, dtype, per_block, whole)
    if npy:
        raise LayoutError("an .npy is one file: shards are for Zarr arrays")
    per_file = _per_axis("shards", shards, whole)
    fitting = tuple(-(-n // chunk) * chunk for n, chunk in zip(per_file, per_block, strict=True))
    if per_file != fitting:
        raise LayoutError(f"shards {per_file} are no multiples of the chunks {per_block}: shards={fitting} would be")
    return Grid(shape, dtype, per_block, per_file)


def _per_axis(name: str, given: int | Sequence[int], shape: Index) -> Index:
    """Return a number of elements for each axis, none more than there are."""
    try:
        sizes = (operator.index(given),) * len(shape)  # type: ignore[arg-type]
    except TypeError:
        try:
            sizes = tuple(map(operator.index, given))  # type: ignore[arg-type]
        except TypeError:
            raise LayoutError(f"{name} are an int or ints, one for each axis, not {given!r}") from None
    if len(sizes) != len(shape):
        raise LayoutError(f"{name} {sizes} are for {len(sizes)} axes, shape {shape} has {len(shape)}")
    if any(size < 1 and size != -1 for size in sizes):
        raise LayoutError(f"{name} {sizes}: each is at least 1, or -1 for all of the axis")
    return tuple(max(n, 1) if size == -1 else min(size, max(n, 1)) for size, n in zip(sizes, shape, strict=True))


def default_chunks(shape: Index, dtype: np.dtype[Any]) -> Index:
    """Return blocks that follow each other in C order, and are neither small nor few."""
    nbytes = math.prod(n or 1 for n in shape) * dtype.itemsize
    aim = max(min(_BLOCK_NBYTES, nbytes // _BLOCKS), _BLOCK_MIN_NBYTES)
    row = dtype.itemsize
    chunks: list[int] = []
    for n in reversed(shape):
        if row > aim:
            chunks.append(1)
            continue
        count = max(n, 1)
        if row * count > aim:
            count = aim // row
            whole = ALIGNMENT // math.gcd(row, ALIGNMENT)  # so that blocks share no page
            count = count // whole * whole or count
        chunks.append(count)
        row *= max(n, 1)
    return tuple(reversed(chunks))
