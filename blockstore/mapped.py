"""MappedFile: an open file, its maps, and the fastest road for a copy into it.

One shared map carries views, reads and raw access. With sealing there is a second, the *windows*, from which
large views are lent and whose parts are cut off from the file one by one. This module knows bytes and offsets
from the start of the file; nothing of ranges or receipts.
"""

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockstore import _os

COPY_MAX_NBYTES = 1 << 16
"""Bytes up to which a copy into a densely filled file goes through the map, whose huge pages are there already.

Any other copy goes through ``pwrite``, which takes no page fault."""

WINDOW_MIN_NBYTES = 1 << 22
"""Bytes from which a sealed view is a window; below, a private buffer that is copied is cheaper."""

WINDOWS_MAX = 16_000
"""Windows a process may seal. Each can split a map in three, and Linux allows 65,530 (``vm.max_map_count``)."""

_windows = itertools.count()


def _read_only(mapped: Any) -> NDArray[np.uint8]:
    """Return the bytes of a map as an array that no `setflags` makes writable."""
    return np.asarray(memoryview(mapped).toreadonly())


class MappedFile:
    """An open file and its maps. What it lends stays valid when it is dropped: the last array keeps the map.

    Attributes
    ----------
    map : memmap of uint8, shape (nbytes,), or None
        The shared map; None once dropped.
    windows : memmap of uint8, shape (nbytes,), or None
        A second one, where parts can be sealed.
    frozen : ndarray of uint8, shape (nbytes,)
        The bytes of `map`, read-only for good.
    zeroed : bool
        Whether every byte was zero when this object was made.
    copy_max : int
        Bytes up to which `put` goes through the map.
    """

    __slots__ = ("_file", "copy_max", "frozen", "identity", "map", "nbytes", "windows", "writable", "zeroed")

    def __init__(
        self, file: _os.File, *, writable: bool, zeroed: bool, dense: bool, advice: str | None, sealing: bool
    ) -> None:
        self._file: _os.File | None = file
        self.identity = _os.identity(file)
        self.writable = writable
        self.zeroed = zeroed
        self.copy_max = COPY_MAX_NBYTES if dense and not sealing else 0
        self.map: _os.Map | None = _os.map_file(file, writable=writable)
        self.nbytes = self.map.nbytes
        self.frozen: NDArray[np.uint8] = _read_only(self.map)
        self.windows: _os.Map | None = None
        if sealing and writable and not _os.PORTABLE:
            self.windows = _os.map_file(file, writable=True)
        if advice is not None:
            for mapped in self._maps():
                _os.advise(mapped, advice, 0, self.nbytes)

    def put(self, data: NDArray[Any], start: int) -> bool:
        """Copy an array into the file from `start`; return False, with nothing copied, if it was dropped."""
        file, shared = self._file, self.map
        if file is None or shared is None:
            return False
        if data.nbytes <= self.copy_max or not data.flags.c_contiguous:
            np.copyto(np.ndarray(data.shape, data.dtype, shared, start), data)
        else:
            _os.write_at(file, shared, data.reshape(-1).view(np.uint8), start)
        return True

    def get(self, buffer: bytearray, start: int) -> None:
        """Fill a buffer with what the file holds from `start`."""
        np.frombuffer(buffer, np.uint8)[:] = self.frozen[start : start + len(buffer)]

    def take_window(self, nbytes: int) -> bool:
        """Whether a view of this size may be lent from `windows`, to be sealed later."""
        return self.windows is not None and nbytes >= WINDOW_MIN_NBYTES and next(_windows) < WINDOWS_MAX

    def seal(self, start: int, stop: int) -> None:
        """Cut bytes ``[start, stop)`` of the windows off from the file. Dropping has done so for all of them."""
        file, windows = self._file, self.windows
        if file is not None and windows is not None:
            _os.seal(file, windows, start, stop)

    def sync(self) -> bool:
        """Return when the disk has every byte; False if it was dropped."""
        file, shared = self._file, self.map
        if file is None or shared is None:
            return False
        _os.sync(file, shared)
        return True

    def start_writeback(self, start: int, stop: int) -> None:
        """Start writing ``[start, stop)`` to the disk, and wait for nothing."""
        if (file := self._file) is not None:
            _os.start_writeback(file, start, stop)

    def drop(self) -> None:
        """Seal the windows and let go. The file is closed, and its maps unmapped, when nothing uses them any more."""
        if self.windows is not None:
            self.seal(0, self.nbytes)
        self._file = self.map = self.windows = None

    def disown(self) -> None:
        """In a forked child: cut every map off from the file, which is the parent's, and let go."""
        if self._file is not None and self.writable and not _os.PORTABLE:
            for mapped in self._maps():
                _os.seal(self._file, mapped, 0, self.nbytes)
        self._file = self.map = self.windows = None

    def _maps(self) -> list[_os.Map]:
        return [mapped for mapped in (self.map, self.windows) if mapped is not None]
