"""Published: a file of an array under its final name, mapped to be read. Such a file never changes.

`read_npy` and `read_shard` check what the file says of itself before they believe it, whoever wrote it. Blocks are
numbered as `ShardLayout` does. This module knows nothing of filling.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockstore import _os
from blockstore.errors import FormatError, LayoutError, NotRegularFileError
from blockstore.layouts.grid import Index, ShardLayout
from blockstore.layouts.npy import MAX_HEADER_NBYTES, NpyHeader, decode_header
from blockstore.layouts.shard_index import decode_index
from blockstore.layouts.zarr import Metadata
from blockstore.mapped import read_only

_EMPTY = np.uint64((1 << 64) - 1)


@dataclass(frozen=True, slots=True)
class Published:
    """A mapped file. Arrays of it are read-only, and stay valid for as long as they live."""

    layout: ShardLayout
    frozen: NDArray[np.uint8]
    """Its bytes, read-only."""
    written: NDArray[np.bool_]
    """Which blocks it has."""
    starts: NDArray[np.uint64] | None
    """Where each starts, in bytes; None if that is where `layout` puts it."""
    stamp: tuple[int, ...]
    """What tells the file from every other one, and from itself after a change."""
    whole: NDArray[Any] | None
    """All elements, if they lie as those of one array; what is not written among them means nothing."""

    def block(self, number: int) -> NDArray[Any]:
        """Return a block that is written, without a copy."""
        layout = self.layout
        if self.whole is not None:
            return self.whole[layout.slices(number)]
        start = layout.start(number) if self.starts is None else int(self.starts[number])
        return np.ndarray(layout.block_shape(number), layout.dtype, self.frozen, start, layout.strides(number))

    def raw(self, number: int) -> NDArray[np.uint8]:
        """Return the bytes of a block that is written, a Zarr edge block's padding included."""
        if self.starts is not None and self.whole is not None:
            return np.ascontiguousarray(self.block(number)).reshape(-1).view(np.uint8)
        start, nbytes = self.layout.extent(number)
        if self.starts is not None:
            start = int(self.starts[number])
        return self.frozen[start : start + nbytes]


def read_header(path: str) -> NpyHeader:
    """Read the header of an ``.npy`` file. Raises `FileNotFoundError` or `FormatError`."""
    try:
        file = _os.open_file(path, writable=False)
    except (LayoutError, NotRegularFileError) as error:
        raise FormatError(f"{path!r} is no .npy file: {error}") from None
    return decode_header(os.pread(file.fileno(), MAX_HEADER_NBYTES, 0), path)


def read_npy(path: str, layout: ShardLayout) -> Published:
    """Map an ``.npy`` file of the shape and dtype of `layout`."""
    file = _open(path)
    header = decode_header(os.pread(file.fileno(), MAX_HEADER_NBYTES, 0), path)
    if (header.shape, header.dtype) != (layout.region, layout.dtype):
        raise FormatError(
            f"{path!r} has shape {header.shape} of {header.dtype}, where {layout.region} of {layout.dtype} was expected"
            ": it was replaced"
        )
    size = os.fstat(file.fileno()).st_size
    needed = header.offset + math.prod(header.shape) * header.dtype.itemsize
    if needed > size:
        raise FormatError(f"{path!r} is cut off: its header asks for {needed} bytes, it has {size}")
    frozen = _frozen(file)
    whole: NDArray[Any] = np.ndarray(
        header.shape, header.dtype, frozen, header.offset, order="F" if header.fortran_order else "C"
    )
    starts = None
    if header.fortran_order or header.offset != layout.first:
        starts = np.empty(0, np.uint64)
    return Published(layout, frozen, np.ones(layout.count, np.bool_), starts, _stamp(file), whole)


def read_shard(path: str, layout: ShardLayout, metadata: Metadata, per_shard: Index) -> Published:
    """Map a shard of a Zarr array, or a chunk of one that has no shards, and check its index."""
    file = _open(path)
    size = os.fstat(file.fileno()).st_size
    index = metadata.index
    if index is None:
        if size != layout.block_nbytes:
            raise FormatError(f"the chunk {path!r} has {size} bytes, not {layout.block_nbytes}: it is damaged")
        frozen = _frozen(file)
        starts = np.zeros(1, np.uint64)
        whole: NDArray[Any] = np.ndarray(layout.region, layout.dtype, frozen, 0, layout.strides(0))
        return Published(layout, frozen, np.ones(1, np.bool_), starts, _stamp(file), whole)
    nbytes = index.nbytes(math.prod(per_shard))
    if nbytes > size:
        raise FormatError(f"the shard {path!r} is cut off: its index takes {nbytes} bytes, it has {size}")
    frozen = _frozen(file)
    at = 0 if index.location == "start" else size - nbytes
    entries = decode_index(frozen[at : at + nbytes].tobytes(), index, layout, per_shard, size, path)
    written = entries[:, 0] != _EMPTY
    if at != layout.data_stop or not np.array_equal(entries[written, 0], layout.starts()[written]):
        return Published(layout, frozen, written, np.ascontiguousarray(entries[:, 0]), _stamp(file), None)
    regular = np.ndarray(layout.region, layout.dtype, frozen, layout.first) if layout.is_array else None
    return Published(layout, frozen, written, None, _stamp(file), regular)


def _open(path: str) -> _os.File:
    try:
        return _os.open_file(path, writable=False)
    except (LayoutError, NotRegularFileError) as error:
        raise FormatError(f"{path!r} is no file of an array: {error}") from None


def _stamp(file: _os.File) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _frozen(file: _os.File) -> NDArray[np.uint8]:
    return read_only(_os.map_file(file, writable=False))
