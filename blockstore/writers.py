"""Writers: the ``with`` block in which a range is a writable array.

A clean exit makes the array read-only and issues the receipt; any other exit issues none. `Writer` lends
a view on the file's map. `DetachedWriter` lends memory that is cut off from the file at the exit. This module
knows ranges and loans, and of the store only what `Owner` says.

Examples
--------
>>> import blockstore as bs
>>> store = bs.create(tmp_path / "data.bin", 1 << 20)
>>> r = store.allocate(3)
>>> with r.writer() as a:
...     a[:] = [1, 2, 3]
>>> a[0] = 9
Traceback (most recent call last):
    ...
ValueError: assignment destination is read-only
>>> r.receipt
<WriteReceipt [0, 4096) 3 bytes, written>
>>> store.close()
"""

import contextlib
import warnings
from types import TracebackType
from typing import Any
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from blockstore import writeback
from blockstore.errors import ClosedStoreError, EscapedViewError, EscapedViewWarning, RangeStateError, escaped_text
from blockstore.ranges import AllocatedRange
from blockstore.views import BYTE, Layout, Loan

WRITEBACK_MIN_NBYTES = 1 << 20
"""Bytes from which it pays to let the disk begin early."""


class Writer(Loan):
    """Lends the range as a view on the file's map; made by `AllocatedRange.writer`."""

    __slots__ = ("_layout", "_range", "_rewrite")

    _stacklevel = 3

    def __init__(self, range_: AllocatedRange, layout: Layout | None, rewrite: bool) -> None:
        self._range = range_
        self._layout = layout
        self._rewrite = rewrite

    def __enter__(self) -> NDArray[Any]:
        r = self._range
        shared = r._owner._mapped.map
        if (layout := self._layout) is None:
            root = np.ndarray(r._nbytes, BYTE, shared, r._start)
        else:
            root = np.ndarray(layout[0], layout[1], shared, r._start, *layout[2:])
        r._claim(ref(root), self._rewrite)
        return self.lend(root)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        r = self._range
        owner = r._owner
        try:
            held = self.take_back()
        except AttributeError:
            raise self._outside() from None
        try:
            if held or kind is not None or owner._down is not None:
                self._leave(kind, stacklevel=self._stacklevel)
            else:
                del self._root, self._view
                r._shown = self._layout
                owner._ledger.record(r, 0 if owner._digest is None else r._checksum())
        finally:
            owner._claims.pop(r._start, None)

    def _outside(self) -> RangeStateError:
        """Return the error of an exit that belongs to no block: nothing is lent, and the claim is another's."""
        return RangeStateError(f"cannot leave {self._range._where()}: this writer is not inside")

    def _leave(self, kind: type[BaseException] | None, stacklevel: int) -> None:
        """Leave in any way but the plain one."""
        r = self._range
        owner = r._owner
        count = self._keep_escaped()
        if kind is not None:
            return
        if owner._down is not None:
            owner._refuse()
        if count and owner._escaped == "raise":
            raise EscapedViewError(r._start, r._stop, count, "no receipt was made; drop them and write again")
        if count and owner._escaped == "warn":
            text = f"{escaped_text(r._start, r._stop, count)}: {self._danger}"
            warnings.warn(text, EscapedViewWarning, stacklevel=stacklevel)
        r._shown = self._layout
        owner._ledger.record(r, r._checksum())

    def _keep_escaped(self) -> int:
        """Count the views that escaped; while there are any, the range takes no new writer."""
        loan = self.pass_on()
        owner = self._range._owner
        count = loan.count(scan=owner._escaped != "ignore")
        if count:
            self._range._bar = loan
            owner._escapes[:] = [*(held for held in owner._escapes if held() is not None), ref(loan._root)]
        return count

    _danger = "what is written through them from now on may reach the file"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._range!r}>"


class EagerWriter(Writer):
    """A `Writer` that lets the disk begin with what was written, where that is much."""

    __slots__ = ()

    _stacklevel = 4

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        if kind is None:
            start_writeback(self._range)


def start_writeback(range_: AllocatedRange) -> None:
    """Let the disk begin with what was written to a range, if that is much; wait for nothing, promise nothing."""
    if range_._nbytes >= WRITEBACK_MIN_NBYTES:
        with contextlib.suppress(ClosedStoreError):  # which has synced it
            writeback.begin(range_._owner._mapped.file, range_._start, range_._stop)


class DetachedWriter(Writer):
    """Lends memory that cannot reach the file after the exit, not even through a raw address.

    With ``guard="seal"``, a large range that nobody tried before is lent as a window on a map, which the exit
    replaces by a private copy-on-write mapping. Any other range, and a small one with ``access="sparse"``, is lent
    as a private array, which a clean exit writes to the file.
    """

    __slots__ = ("_window",)

    _window: bool
    _danger = "what is written through them from now on is lost"

    def __enter__(self) -> NDArray[Any]:
        r = self._range
        mapped = r._owner._mapped
        layout = self._layout or ((r._nbytes,), BYTE)
        shape, dtype, strides = layout[0], layout[1], layout[2:]
        window = not r._touched and mapped.take_window(r._start, r._stop)
        if window:
            root = np.ndarray(shape, dtype, mapped.windows, r._start, *strides)
        elif not r._touched and mapped.zeroed:
            root = np.zeros(shape, dtype)
        else:
            root = np.empty(shape, dtype)
        r._claim(ref(root), self._rewrite)
        if window and r._touched:  # another writer has come and gone since, and used the window up
            private = np.empty(shape, dtype)
            r._owner._claims[r._start] = ref(private)
            window, root = False, private
        if not window and (r._touched or not mapped.zeroed):
            mapped.get(root, r._start, *strides)
        r._touched = True
        self._window = window
        return self.lend(root)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        r = self._range
        mapped = r._owner._mapped
        try:
            self.take_back()
        except AttributeError:
            raise self._outside() from None
        try:
            try:
                if self._window:
                    mapped.seal(r._start, r._stop)
                elif kind is None and r._owner._down is None:
                    mapped.put(self._root, r._start, *(self._layout or ())[2:])
            except BaseException:
                self._keep_escaped()
                raise
            self._leave(kind, stacklevel=3)
        finally:
            r._owner._claims.pop(r._start, None)


def sparse_writer(range_: AllocatedRange, layout: Layout | None, rewrite: bool) -> Writer:
    """Make the writer of a sparsely filled store: of large ranges a view on huge pages, else a private array."""
    if range_._owner._mapped.prepare_view(range_._start, range_._stop):
        range_._touched = True
        return Writer(range_, layout, rewrite)
    return DetachedWriter(range_, layout, rewrite)
