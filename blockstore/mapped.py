"""MappedFile: an open file, its maps, and the fastest road for a copy into it.

One shared map carries views, reads and raw access. With sealing there is a second, the *windows*, from which
large views are lent and whose parts are cut off from the file one by one. This module knows bytes and offsets
from the start of the file; nothing of ranges or receipts.
"""

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockstore import _os
from blockstore.errors import ClosedStoreError
from blockstore.views import Shape

COPY_MAX_NBYTES = 1 << 15
"""Bytes up to which a copy into a densely filled file goes through the map, whose huge pages are there already.

Any other copy goes through ``pwrite``, which takes no page fault."""

VIEW_MIN_NBYTES = 1 << 22
"""Bytes from which a view on a map pays where a private array would do, too."""

WINDOWS_MAX = 16_000
"""Windows that the stores of a process may have sealed at once. Each can split a map in three, and Linux allows
65,530 mappings (``vm.max_map_count``). A store that is closed gives its windows back."""

_HUGE = 1 << 21
_PAGE = mmap.PAGESIZE
_windows_left = [None] * WINDOWS_MAX  # only popped and appended to: atomic


def read_only(mapped: Any) -> NDArray[np.uint8]:
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
    frozen : ndarray of uint8, shape (nbytes,), or None
        The bytes of `map`, read-only for good; None once dropped.
    zeroed : bool
        Whether every byte was zero when this object was made.
    copy_max : int
        Bytes up to which `put` goes through the map.
    """

    __slots__ = (
        "_file",
        "_taken",
        "advice",
        "copy_max",
        "frozen",
        "identity",
        "map",
        "nbytes",
        "windows",
        "writable",
        "zeroed",
    )

    def __init__(
        self, file: _os.File, *, writable: bool, zeroed: bool, dense: bool, advice: str | None, sealing: bool
    ) -> None:
        self._file: _os.File | None = file
        self.identity = _os.identity(file)
        self._taken: list[None] = []
        self.advice = advice
        self.writable = writable
        self.zeroed = zeroed
        self.copy_max = COPY_MAX_NBYTES if dense and not sealing else 0
        self.map: _os.Map | None = _os.map_file(file, writable=writable)
        self.nbytes = self.map.nbytes
        self.frozen: NDArray[np.uint8] | None = read_only(self.map)
        self.windows: _os.Map | None = None
        if sealing and writable and not _os.PORTABLE:
            self.windows = _os.map_file(file, writable=True)
        if advice is not None:
            for mapped in self._maps():
                _os.advise(mapped, advice, 0, self.nbytes)

    def keep(self) -> None:
        """Keep the file open until `drop` or `disown`, which the caller is sure to call."""
        if self._file is not None:
            self._file.keep()

    def put(self, data: NDArray[Any], start: int, strides: Shape | None = None) -> bool:
        """Copy an array into the file from `start`; return False, with nothing copied, if it was dropped.

        `strides` are those that the array has in the file, in bytes; None if it is C-ordered there.
        """
        file, shared = self._file, self.map
        if file is None or shared is None:
            return False
        if strides or data.nbytes <= self.copy_max or not _os.write_at(file, data, start):
            np.copyto(np.ndarray(data.shape, data.dtype, shared, start, strides), data)
        return True

    def get(self, data: NDArray[Any], start: int, strides: Shape | None = None) -> None:
        """Fill a C-ordered array with the bytes from `start`, the padding of records included. See `put`."""
        if (frozen := self.frozen) is None:
            return
        if strides:
            np.copyto(data, np.ndarray(data.shape, data.dtype, frozen, start, strides))
        else:
            data.reshape(-1).view(np.uint8)[:] = frozen[start : start + data.nbytes]

    def prepare_view(self, start: int, stop: int) -> bool:
        """Whether ``[start, stop)`` should be lent as a view on the map though access is sparse: with huge pages."""
        if stop - start < VIEW_MIN_NBYTES or (shared := self.map) is None:
            return False
        self._advise_huge(shared, start, stop)
        return True

    def take_window(self, start: int, stop: int) -> bool:
        """Whether ``[start, stop)`` may be lent from `windows`, to be sealed later."""
        windows = self.windows
        if windows is None or stop - start < VIEW_MIN_NBYTES or start % _PAGE or (stop % _PAGE and stop != self.nbytes):
            return False
        try:
            self._taken.append(_windows_left.pop())
        except IndexError:
            return False
        self._advise_huge(windows, start, stop)
        return True

    def _advise_huge(self, mapped: _os.Map, start: int, stop: int) -> None:
        """Ask for huge pages around ``[start, stop)``, if the map as a whole has none; they work on whole ones only."""
        if self.advice != "dense":
            _os.advise(mapped, "dense", start // _HUGE * _HUGE, min(-(-stop // _HUGE) * _HUGE, self.nbytes))

    def seal(self, start: int, stop: int) -> None:
        """Cut bytes ``[start, stop)`` of the windows off from the file. Dropping has done so for all of them."""
        file, windows = self._file, self.windows
        if file is not None and windows is not None:
            _os.seal(file, windows, start, stop)

    @property
    def file(self) -> _os.File:
        """The open file. Raises `ClosedStoreError` once dropped."""
        if (file := self._file) is None:
            raise ClosedStoreError("the store is closed")
        return file

    def cut_off(self) -> None:
        """See to it that nothing reaches the file through a map any more; what is lent stays readable."""
        if (file := self._file) is not None and not _os.PORTABLE:
            for mapped in self._maps():
                _os.seal(file, mapped, 0, self.nbytes)

    def sync(self) -> None:
        """Return when the disk has every byte."""
        file, shared = self._file, self.map
        if file is None or shared is None:
            raise ClosedStoreError("the store was closed before the sync")
        _os.sync(file, shared)

    def start_writeback(self, start: int, stop: int) -> None:
        """Start writing ``[start, stop)`` to the disk, and wait for nothing."""
        if (file := self._file) is not None:
            _os.start_writeback(file, start, stop)

    def drop(self) -> None:
        """Seal the windows and let go. The file is closed, and its maps unmapped, when nothing uses them any more."""
        try:
            if self.windows is not None:
                self.seal(0, self.nbytes)
                _windows_left.extend(self._taken)
                self._taken.clear()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self._file is not None:
            self._file.release()
        self._file = self.map = self.windows = self.frozen = None

    def disown(self) -> None:
        """In a forked child: cut every map off from the file, which is the parent's, and let go."""
        if self.writable:
            self.cut_off()
        if self._file is not None:
            self._file.close_now()
        self._file = self.map = self.windows = self.frozen = None

    def _maps(self) -> list[_os.Map]:
        return [mapped for mapped in (self.map, self.windows) if mapped is not None]
