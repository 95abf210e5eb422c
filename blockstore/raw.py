"""Raw access: bytes at offsets, without ranges, writers or receipts. Bounds are still checked.

For headers, for files that something else lays out, and for kernels that want an address. Nothing here is
recorded, and nothing keeps two callers out of the same bytes. Offsets are bytes from the start of the file.

Examples
--------
>>> import blockstore as bs
>>> store = bs.create(tmp_path / "data.bin", 1 << 20)
>>> store.raw.write_at(100, b"hello")
5
>>> store.raw.read_at(100, 5)
b'hello'
>>> store.raw.array(100, 5).sum()
np.uint64(532)
>>> store.close()
"""

import operator
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from blockstore.errors import LayoutError
from blockstore.mapped import MappedFile
from blockstore.views import BYTE, check_layout, layout_nbytes


class RawOwner(Protocol):
    """What raw access needs of a store."""

    _mapped: MappedFile

    def _buffer(self, *, writable: bool) -> NDArray[np.uint8]:
        """Return all bytes of the file; refuse a store that is closed or, to write, read-only."""

    def sync(self) -> None:
        """Return when the disk has them."""


class RawStore:
    """The bytes of a store, without guard rails; `BlockStore.raw`.

    Every method raises `LayoutError` for bytes outside the file, `ClosedStoreError` on a closed store, and
    every one that writes raises `ReadOnlyStoreError` on a store opened with ``mode="r"``.
    """

    __slots__ = ("_owner",)

    def __init__(self, owner: RawOwner) -> None:
        self._owner = owner

    def write_at(self, offset: int, data: Any) -> int:
        """Copy `data` (bytes-like, or an array in C order) to `offset`; return the bytes written."""
        target = self._owner._buffer(writable=True)
        array = np.frombuffer(data, BYTE) if not isinstance(data, np.ndarray) else np.ascontiguousarray(data)
        if array.dtype.hasobject:
            raise LayoutError(f"dtype {array.dtype} holds Python objects, whose addresses mean nothing in a file")
        self._slice(offset, array.nbytes, target.nbytes)
        if array.nbytes:
            self._owner._mapped.put(array, operator.index(offset))
        return array.nbytes

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """Return a copy of `nbytes` bytes from `offset`."""
        source = self._owner._buffer(writable=False)
        return source[self._slice(offset, nbytes, source.nbytes)].tobytes()

    def fill(self, offset: int, nbytes: int, value: int) -> None:
        """Set `nbytes` bytes from `offset` to `value`, 0 to 255."""
        if not 0 <= operator.index(value) <= 255:
            raise LayoutError(f"a byte is 0 to 255, not {value}")
        target = self._owner._buffer(writable=True)
        target[self._slice(offset, nbytes, target.nbytes)] = value

    def zero(self, offset: int, nbytes: int) -> None:
        """Set `nbytes` bytes from `offset` to zero. The space stays reserved."""
        self.fill(offset, nbytes, 0)

    def flush_range(self, offset: int, nbytes: int) -> None:
        """Return when the disk has `nbytes` bytes from `offset`, whoever wrote them.

        Costs as much as `BlockStore.sync`: the system offers no lasting promise for a part of a file.
        """
        self._slice(offset, nbytes, self._owner._buffer(writable=True).nbytes)
        self._owner.sync()

    def array(self, offset: int, shape: int | Sequence[int], dtype: DTypeLike = np.uint8) -> NDArray[Any]:
        """Return an array on the file's map, C-ordered, from `offset`; read-only on a read-only store.

        It stays valid after the store is closed, and unlike a writer's array it is never made read-only.
        """
        source = self._owner._buffer(writable=False)
        axes, items = check_layout(shape, dtype)[:2]
        where = self._slice(offset, layout_nbytes((axes, items)), source.nbytes)
        return np.ndarray(axes, items, source, where.start)

    def address(self, offset: int = 0) -> int:
        """Return the address of the byte at `offset`; valid while the store or an array over it lives."""
        source = self._owner._buffer(writable=False)
        where = self._slice(offset, 0, source.nbytes)
        return int(source.ctypes.data) + int(where.start)

    @staticmethod
    def _slice(offset: int, nbytes: int, available: int) -> slice:
        start, count = operator.index(offset), operator.index(nbytes)
        if start < 0 or count < 0 or start + count > available:
            raise LayoutError(f"bytes [{start}, {start + count}) are not all in the file, which has {available} bytes")
        return slice(start, start + count)

    def __repr__(self) -> str:
        return f"<RawStore of {self._owner!r}>"
