"""Writers: the ``with`` block in which a range is a writable array.

A clean exit makes the array read-only and issues the receipt; any other exit issues none. `Writer` lends
a view on the file's map. `SealedWriter` lends memory that is cut off from the file at the exit. This module
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

import warnings
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockstore.errors import EscapedViewError, EscapedViewWarning, escaped_text
from blockstore.ranges import AllocatedRange
from blockstore.views import Layout, Loan


class Writer:
    """Lends the range as a view on the file's map; made by `AllocatedRange.writer`."""

    __slots__ = ("_layout", "_loan", "_range", "_rewrite")

    _loan: Loan

    def __init__(self, range_: AllocatedRange, layout: Layout, rewrite: bool) -> None:
        self._range = range_
        self._layout = layout
        self._rewrite = rewrite

    def __enter__(self) -> NDArray[Any]:
        r = self._range
        loan = Loan()
        shape, dtype = self._layout
        view = loan.lend(shape, dtype, r._owner._mapped.map, r._start)
        r._claim(loan, self._rewrite)
        self._loan = loan
        return view

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        r = self._range
        owner = r._owner
        try:
            if self._loan.take_back() or kind is not None or owner._down is not None:
                self._leave(kind, stacklevel=3)
            else:
                r._settle(self._layout)
        finally:
            owner._claims.pop(r._start, None)
            del self._loan

    def _leave(self, kind: type[BaseException] | None, stacklevel: int) -> None:
        """Leave in any way but the plain one."""
        r = self._range
        owner = r._owner
        count = self._loan.count()
        if count:
            r._loan = self._loan
        if kind is not None:
            return
        if owner._down is not None:
            owner._refuse()
        if count and owner._escaped == "raise":
            raise EscapedViewError(r._start, r._stop, count, "no receipt was made; drop them and write again")
        if count and owner._escaped == "warn":
            text = f"{escaped_text(r._start, r._stop, count)}: {self._danger}"
            warnings.warn(text, EscapedViewWarning, stacklevel=stacklevel)
        r._settle(self._layout)

    _danger = "what is written through them from now on may reach the file"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._range!r}>"


class SealedWriter(Writer):
    """Lends memory that cannot reach the file after the exit, not even through a raw address.

    A large range that nobody tried before is lent as a window on a map, which the exit replaces by a private
    copy-on-write mapping. Any other is lent as a private buffer, which a clean exit writes to the file.
    """

    __slots__ = ("_buffer",)

    _buffer: bytearray | None
    _danger = "what is written through them from now on is lost"

    def __enter__(self) -> NDArray[Any]:
        r = self._range
        owner = r._owner
        mapped = owner._mapped
        loan = Loan()
        r._claim(loan, self._rewrite)
        try:
            shape, dtype = self._layout
            if not r._touched and mapped.take_window(r._stop - r._start):
                self._buffer = None
                view = loan.lend(shape, dtype, mapped.windows, r._start)
            else:
                self._buffer = bytearray(r._nbytes)
                np.frombuffer(self._buffer, np.uint8)[:] = mapped.frozen[r._start : r._start + r._nbytes]
                view = loan.lend(shape, dtype, self._buffer, 0)
        except BaseException:
            owner._claims.pop(r._start, None)
            raise
        r._touched = True
        self._loan = loan
        return view

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        r = self._range
        owner = r._owner
        try:
            self._loan.take_back()
            if owner._down is None:  # closing and forking have sealed every window already
                if self._buffer is None:
                    owner._mapped.seal(r._start, r._stop)
                elif kind is None:
                    owner._mapped.put(np.frombuffer(self._buffer, np.uint8), r._start)
            self._leave(kind, stacklevel=3)
        finally:
            owner._claims.pop(r._start, None)
            del self._loan, self._buffer
