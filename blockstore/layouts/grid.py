"""Grid: an array divided into shards, each a file, and these into blocks, each one extent of its file.

Numbers of elements along axes are called shape, chunks and shards, as in Zarr; `nbytes`, `start` and `stop` are bytes,
from the start of the file. Blocks of a shard are numbered in C order, those beyond the edge of the array left out. This
module knows no format's text and no file.

Examples
--------
>>> grid = Grid((1000, 300), np.dtype("f8"), chunks=(256, 300), shards=(512, 300))
>>> grid.blocks, grid.files
((4, 1), (2, 1))
>>> shard = grid.shard((1, 0), npy=True)
>>> shard.blocks, shard.region, [shard.start(number) for number in range(shard.count)]
((2, 1), (488, 300), [4096, 618496])
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockstore.alignment import ALIGNMENT, align_up

Index = tuple[int, ...]

HEADER_NBYTES = 4096
"""Bytes before the data of what is to be an ``.npy`` file."""

_PACKED = 64
"""What blocks below `ALIGNMENT` bytes are aligned to: each item of NumPy's, and a cache line."""


@dataclass(frozen=True)
class Grid:
    """An array's shape, divided. `shards` are multiples of `chunks`; all have as many axes, 1 or more."""

    shape: Index
    dtype: np.dtype[Any]
    chunks: Index
    """Elements of a block along each axis, at least 1."""
    shards: Index
    """Elements of a shard along each axis."""

    @cached_property
    def blocks(self) -> Index:
        """How many blocks there are along each axis."""
        return tuple(-(-n // chunk) for n, chunk in zip(self.shape, self.chunks, strict=True))

    @cached_property
    def files(self) -> Index:
        """How many shards there are along each axis."""
        return tuple(-(-n // shard) for n, shard in zip(self.shape, self.shards, strict=True))

    @cached_property
    def per_shard(self) -> Index:
        """How many blocks a shard has along each axis, those beyond the array's edge included."""
        return tuple(shard // chunk for shard, chunk in zip(self.shards, self.chunks, strict=True))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the array's elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def block_nbytes(self) -> int:
        """Bytes of a whole block."""
        return math.prod(self.chunks) * self.dtype.itemsize

    def slices(self, index: Index) -> tuple[slice, ...]:
        """Return where in the array the block `index` lies."""
        return tuple(
            slice(i * chunk, min((i + 1) * chunk, n))
            for i, chunk, n in zip(index, self.chunks, self.shape, strict=True)
        )

    def block_shape(self, index: Index) -> Index:
        """Return the shape of a block, less at the edge of the array."""
        return tuple(min(chunk, n - i * chunk) for i, chunk, n in zip(index, self.chunks, self.shape, strict=True))

    def locate(self, index: Index) -> tuple[Index, Index]:
        """Return the index of the shard that a block lies in, and that of the block within the shard."""
        pairs = [divmod(i, per) for i, per in zip(index, self.per_shard, strict=True)]
        return tuple(shard for shard, _ in pairs), tuple(inner for _, inner in pairs)

    def shard_indices(self) -> Iterator[Index]:
        """Iterate over the indices of all shards, in C order."""
        return indices(self.files)

    def shard_blocks(self, shard: Index) -> tuple[slice, ...]:
        """Return which blocks of the array lie in a shard, as slices of the grid of blocks."""
        return tuple(
            slice(i * per, min((i + 1) * per, n)) for i, per, n in zip(shard, self.per_shard, self.blocks, strict=True)
        )

    def shard(self, index: Index, *, npy: bool) -> "ShardLayout":
        """Return where blocks lie in the file of a shard: exact to the byte as in ``.npy``, or as Zarr allows."""
        region = tuple(min(shard, n - i * shard) for i, shard, n in zip(index, self.shards, self.shape, strict=True))
        blocks = tuple(-(-n // chunk) for n, chunk in zip(region, self.chunks, strict=True))
        return ShardLayout(region, self.dtype, self.chunks, blocks, npy)


@dataclass(frozen=True)
class ShardLayout:
    """Where the blocks of one file lie. Blocks are numbered in C order of `blocks`."""

    region: Index
    """Elements of the array that the file holds, along each axis."""
    dtype: np.dtype[Any]
    chunks: Index
    blocks: Index
    """Blocks that the file holds, along each axis."""
    exact: bool
    """Whether each block takes no more than its elements, also at the edge: as in ``.npy``."""

    @cached_property
    def count(self) -> int:
        """How many blocks the file holds."""
        return math.prod(self.blocks)

    @cached_property
    def block_nbytes(self) -> int:
        """Bytes of a whole block."""
        return math.prod(self.chunks) * self.dtype.itemsize

    @cached_property
    def split_axis(self) -> int | None:
        """The axis that blocks split if each is contiguous in the region and they follow each other; None if not."""
        return split_axis(self.region, self.chunks)

    @cached_property
    def is_array(self) -> bool:
        """Whether the blocks, in order and without gaps, are the region in C order: what an ``.npy`` file holds."""
        axis = self.split_axis
        if axis is None:
            return False
        if self.exact or self.count <= 1:
            return True
        cut = math.prod(self.blocks[:axis]) > 1 and self.region[axis] % self.chunks[axis] != 0
        return not cut and all(chunk == 1 for chunk in self.chunks[:axis])

    @cached_property
    def first(self) -> int:
        """Bytes before the first block."""
        return HEADER_NBYTES if self.is_array else 0

    @cached_property
    def step(self) -> int:
        """Bytes from a block to the next along the last axis that is split, of one that is not `exact` to any next."""
        if self.is_array:
            return self.block_nbytes
        if self.block_nbytes >= ALIGNMENT:
            return align_up(self.block_nbytes)
        return -(-self.block_nbytes // _PACKED) * _PACKED

    @cached_property
    def data_stop(self) -> int:
        """Bytes to past the last block."""
        if self.exact:
            return self.first + math.prod(self.region) * self.dtype.itemsize
        return self.first + self.count * self.step

    def number(self, inner: Index) -> int:
        """Return the number of a block from its index within the shard."""
        number = 0
        for i, n in zip(inner, self.blocks, strict=True):
            number = number * n + i
        return number

    def inner(self, number: int) -> Index:
        """Return the index within the shard of a block from its number."""
        index: list[int] = []
        for n in reversed(self.blocks):
            number, i = divmod(number, n)
            index.append(i)
        return tuple(reversed(index))

    def start(self, number: int) -> int:
        """Return where in the file a block starts, in bytes."""
        if not self.exact:
            return self.first + number * self.step
        axis = self.split_axis or 0
        outer, i = divmod(number, max(self.blocks[axis], 1))
        rows = outer * self.region[axis] + i * self.chunks[axis]
        return self.first + rows * math.prod(self.region[axis + 1 :]) * self.dtype.itemsize

    def starts(self) -> NDArray[np.uint64]:
        """Return where each block starts, in order of their numbers: an array of shape (count,), in bytes."""
        numbers = np.arange(self.count, dtype=np.uint64)
        if not self.exact:
            return numbers * np.uint64(self.step) + np.uint64(self.first)
        axis = self.split_axis or 0
        along = np.uint64(max(self.blocks[axis], 1))
        outer, i = numbers // along, numbers % along
        rows = outer * np.uint64(self.region[axis]) + i * np.uint64(self.chunks[axis])
        row = math.prod(self.region[axis + 1 :]) * self.dtype.itemsize
        return rows * np.uint64(row) + np.uint64(self.first)

    def extent(self, number: int) -> tuple[int, int]:
        """Return the start of a block and its bytes, those of a Zarr edge block's padding included."""
        nbytes = math.prod(self.block_shape(number)) * self.dtype.itemsize if self.exact else self.block_nbytes
        return self.start(number), nbytes

    def block_shape(self, number: int) -> Index:
        """Return the shape of a block, less at the edge."""
        return tuple(
            min(chunk, n - i * chunk) for i, chunk, n in zip(self.inner(number), self.chunks, self.region, strict=True)
        )

    def place(self, number: int) -> tuple[int, int, Index, Index | None]:
        """Return `start`, bytes, `block_shape` and `strides` of a block."""
        shape = self.block_shape(number)
        if self.exact:
            return self.start(number), math.prod(shape) * self.dtype.itemsize, shape, None
        strides = None if shape == self.chunks else self.strides(number)
        return self.first + number * self.step, self.block_nbytes, shape, strides

    def slices(self, number: int) -> tuple[slice, ...]:
        """Return where in the region a block lies."""
        return tuple(
            slice(i * chunk, min((i + 1) * chunk, n))
            for i, chunk, n in zip(self.inner(number), self.chunks, self.region, strict=True)
        )

    def strides(self, number: int) -> Index | None:
        """Return the bytes between elements along each axis of a block; None if its elements are all of its bytes."""
        if self.exact or self.block_shape(number) == self.chunks:
            return None
        strides: list[int] = []
        step = self.dtype.itemsize
        for chunk in reversed(self.chunks):
            strides.append(step)
            step *= chunk
        return tuple(reversed(strides))


def indices(shape: Index) -> Iterator[Index]:
    """Iterate over the indices of a grid, in C order; lazily, however large it is."""
    if not shape:
        yield ()
        return
    if 0 in shape:
        return
    for i in range(shape[0]):
        for rest in indices(shape[1:]):
            yield (i, *rest)


def split_axis(region: Index, chunks: Index) -> int | None:
    """Return the axis along which contiguous blocks split a region in C order: 1 before it, all behind it.

    None if blocks of this shape are not contiguous.

    Examples
    --------
    >>> split_axis((8, 600, 400), (1, 100, 400)), split_axis((8, 600, 400), (2, 100, 400))
    (1, None)
    """
    axis = len(region) - 1
    while axis > 0 and chunks[axis] == max(region[axis], 1):
        axis -= 1
    if all(chunk == 1 or n <= 1 for n, chunk in zip(region[:axis], chunks[:axis], strict=True)):
        return axis
    return None
