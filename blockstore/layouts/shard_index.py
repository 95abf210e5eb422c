"""The index of a Zarr shard: where in the file each block lies, and which blocks there are.

An entry is where a block starts and its bytes, two numbers of 64 bits; of a block that is not there both are 2**64 - 1.
This module opens no file; offsets are bytes from a file's start.

Examples
--------
>>> ShardIndex().nbytes(10)
164
"""

import math
from dataclasses import dataclass
from typing import Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from blockstore.errors import FormatError
from blockstore.layouts.crc32c import crc32c
from blockstore.layouts.grid import Index, ShardLayout

_EMPTY = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """How the index of a shard is written, and where in the file."""

    location: Literal["start", "end"] = "end"
    checksum: bool = True
    """Whether the CRC-32C of the entries follows them."""
    little: bool = True
    """Whether the numbers of the entries are little-endian; a checksum always is."""

    def nbytes(self, count: int) -> int:
        """Return the bytes of the index of a shard of `count` blocks, those beyond the array's edge included."""
        return 16 * count + 4 * self.checksum


def encode_index(layout: ShardLayout, per_shard: Index, written: NDArray[np.bool]) -> bytes:
    """Return the index of a shard, little-endian, with its checksum.

    Parameters
    ----------
    layout : ShardLayout
        Not `exact`: each block has all its bytes in the file, also at the edge of the array.
    per_shard : tuple of int
        Blocks of a shard along each axis, those beyond the edge included, which are empty.
    written : numpy.ndarray
        Of shape ``(layout.count,)``: whether a block has been written, in order of their numbers.

    Returns
    -------
    bytes
        ``ShardIndex().nbytes(math.prod(per_shard))``, for the end of the file.

    Raises
    ------
    ValueError
        If `written` has another shape, or the layout is exact.

    Examples
    --------
    >>> from blockstore.layouts.grid import Grid
    >>> layout = Grid((3,), np.dtype("u1"), chunks=(2,), shards=(6,)).shard((0,), npy=False)
    >>> np.frombuffer(encode_index(layout, (3,), np.array([False, True])), "<i8", 6).reshape(3, 2).tolist()
    [[-1, -1], [4098, 2], [-1, -1]]
    """
    if layout.exact or written.shape != (layout.count,):
        raise ValueError(f"an index of {layout.count} whole blocks needs as many flags: {written.shape} were given")
    entries = np.full((math.prod(per_shard), 2), _EMPTY, "<u8")
    numbers = _positions(layout.blocks, per_shard)[written]
    entries[numbers, 0] = layout.starts()[written]
    entries[numbers, 1] = layout.block_nbytes
    encoded = entries.tobytes()
    return encoded + crc32c(encoded).to_bytes(4, "little")


def decode_index(
    raw: bytes, index: ShardIndex, layout: ShardLayout, per_shard: Index, file_nbytes: int, path: str
) -> NDArray[np.uint64]:
    """Return where the blocks of a shard lie in its file.

    Parameters
    ----------
    raw : bytes
        The index, and nothing else: ``index.nbytes(math.prod(per_shard))`` bytes from the start or end of the file.
    index : ShardIndex
        How it is written.
    layout : ShardLayout
        What blocks there are; where it would put them does not matter.
    per_shard : tuple of int
        Blocks of a shard along each axis, those beyond the edge included, whose entries are not looked at.
    file_nbytes : int
        Bytes of the file.
    path : str
        For messages.

    Returns
    -------
    numpy.ndarray
        Of shape ``(layout.count, 2)``, in order of the blocks' numbers: bytes from the file's start, and of the block,
        which are `layout.block_nbytes`; both 2**64 - 1 of an empty one.

    Raises
    ------
    FormatError
        If its length or checksum is wrong, a block is not within the file, or not as long as its elements.

    Notes
    -----
    O(n) in the entries of the index.
    """
    count = math.prod(per_shard)
    if len(raw) != index.nbytes(count):
        _damaged(path, f"the index of {count} blocks has {len(raw)} bytes, not {index.nbytes(count)}")
    if index.checksum and crc32c(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        _damaged(path, "the shard's index is damaged: its checksum differs")
    stored = np.frombuffer(raw, "<u8" if index.little else ">u8", 2 * count).reshape(count, 2)
    entries = stored[_positions(layout.blocks, per_shard)].astype(np.uint64, copy=False)
    starts, lengths = entries.T
    nbytes = layout.block_nbytes
    empty = (starts == _EMPTY) & (lengths == _EMPTY)
    for wrong, what in (
        (lengths != nbytes, f"not the {nbytes} of its elements"),
        (starts > max(file_nbytes - nbytes, 0), f"which is not within the {file_nbytes} bytes of the file"),
    ):
        numbers = np.flatnonzero(wrong & ~empty)
        if numbers.size:
            start, length = entries[numbers[0]].tolist()
            block = layout.inner(int(numbers[0]))
            _damaged(
                path, f"the shard's index is damaged: block {block} has {length} bytes from byte {start} on, {what}"
            )
    if file_nbytes < nbytes and not empty.all():
        _damaged(path, f"the shard's index is damaged: blocks of {nbytes} bytes in a file of {file_nbytes}")
    return entries


def _positions(blocks: Index, per_shard: Index) -> NDArray[np.intp]:
    """Return the number that each block has if those beyond the array's edge count too."""
    positions = np.zeros(1, np.intp)
    for n, per in zip(blocks, per_shard, strict=True):
        positions = (positions[:, np.newaxis] * per + np.arange(n)).reshape(-1)
    return positions


def _damaged(path: str, what: str) -> NoReturn:
    raise FormatError(f"{path}: {what}")
