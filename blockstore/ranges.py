"""AllocatedRange: bytes ``[start, stop)`` of a file, owned by whoever holds the object.

A range has one writer at a time, is immutable once written unless a rewrite is asked for, and is spent
when it is split. This module knows its store through the `Owner` protocol, and neither allocators nor disks.
Offsets and sizes are bytes from the start of the data.
"""

import operator
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, Protocol
from weakref import ref

import numpy as np
from numpy.typing import DTypeLike, NDArray

from blockstore.alignment import ALIGNMENT, align_down, align_up
from blockstore.checksums import ChecksumFunction
from blockstore.errors import (
    AlreadyWrittenError,
    DtypeError,
    EscapedViewError,
    LayoutError,
    LengthError,
    NotWrittenError,
    SpentRangeError,
    WriterBusyError,
)
from blockstore.ledger import Ledger
from blockstore.mapped import MappedFile
from blockstore.receipts import Extent, WriteReceipt, receipt_of
from blockstore.views import BYTE, Layout, Loan, check_layout, layout_nbytes

__all__ = ["ALIGNMENT", "AllocatedRange", "Owner", "WriteReceipt", "align_down", "align_up", "allocated"]

_SPLIT = "it was split: use its parts"
_REFERENCE = "it was unpickled, and a reference is for reading: write through the object that was allocated"


class Owner(Protocol):
    """What a range needs of the store it belongs to."""

    _mapped: MappedFile
    _ledger: Ledger
    _claims: "dict[int, ref[Any]]"
    """A weak reference of each open writer, by the start of its range, to what dies when nobody can write any more.

    Each change is one atomic step: `setdefault`, and what only the holder of a claim does to it."""
    _escapes: "list[ref[Any]]"
    """Weak references of what keeps the file's memory writable though its writer has left."""
    _stale: threading.Lock
    """Held to remove a claim whose writer was interrupted before it could."""
    _down: str | None
    """Why nothing may be done any more, or None."""
    _digest: ChecksumFunction | None
    """Computes what a receipt keeps of its bytes."""
    _escaped: str
    """What to do about escaped views: ``"warn"``, ``"raise"`` or ``"ignore"``."""

    @property
    def _writer(self) -> "Callable[[AllocatedRange, Layout | None, bool], AbstractContextManager[NDArray[Any]]]":
        """Makes the context manager of one write."""

    def _refuse(self) -> NoReturn:
        """Raise the error that says why the store is down."""


class AllocatedRange(Extent):
    """Bytes ``[start, stop)`` of a store, owned by whoever holds this object.

    Made by `BlockStore.allocate` and its relatives. Safe to share among threads: the second of two writers
    is refused with `WriterBusyError`.

    Examples
    --------
    >>> import blockstore as bs
    >>> store = bs.create(tmp_path / "data.bin", 1 << 20)
    >>> r = store.allocate(shape=(2, 3), dtype="f8", tag=7)
    >>> with r.writer() as a:
    ...     a[:] = 1.5
    >>> r.read().sum()
    np.float64(9.0)
    >>> r
    <AllocatedRange [0, 4096) 48 bytes, tag 7, written>
    >>> store.close()
    """

    __slots__ = ("_bar", "_layout", "_shown", "_touched")

    _owner: Owner
    _layout: Layout | None  # as allocated
    _shown: Layout | None  # as last written, and so as read
    _bar: str | Loan | None  # why it is spent, or whose views have escaped
    _touched: bool

    def __init__(self) -> None:
        raise TypeError("ranges are handed out by a store: see BlockStore.allocate")

    @property
    def receipt(self) -> WriteReceipt | None:
        """The receipt of the last clean exit, or None while the range is not written."""
        sequence = self._sequence
        return None if sequence is None else receipt_of(self, sequence)

    def writer(
        self,
        shape: int | Sequence[int] | None = None,
        dtype: DTypeLike | None = None,
        *,
        rewrite: bool = False,
    ) -> AbstractContextManager[NDArray[Any]]:
        """Return a context manager that lends the range as a writable array.

        Parameters
        ----------
        shape : int or sequence of int, optional
            Elements along each axis. Default: that of `allocate`, or one axis over all `nbytes`.
        dtype : dtype, optional
            Default: that of `allocate`, or ``uint8``.
        rewrite : bool
            Allow writing a range that is written already. Its receipt is revoked on entering, before the first
            byte can change.

        Returns
        -------
        context manager
            ``with r.writer() as a:`` binds `a` to a C-ordered `numpy.ndarray`, which shows what the file holds. It
            is on the file's memory map, or private and written at the exit: see `create` for `access` and `guard`.
            A clean exit makes `a` read-only and sets `receipt`.

        Raises
        ------
        LayoutError, DtypeError
            If shape or dtype do not fit the range; at once.
        AlreadyWrittenError, SpentRangeError, WriterBusyError, EscapedViewError, ClosedStoreError, ForkedStoreError
            If the range may not be written now; on entering.
        EscapedViewError
            On leaving, with ``escaped="raise"``: no receipt is made.

        Notes
        -----
        About a microsecond, in and out, whatever the size of the range. If the body raises there is no receipt
        and the range can be written again.
        """
        if shape is not None or dtype is not None:
            return self._owner._writer(self, check_layout(shape, dtype, self._nbytes), rewrite)
        return self._owner._writer(self, self._layout, rewrite)

    def write(self, data: Any, *, rewrite: bool = False) -> WriteReceipt:
        """Copy `data` into the range in one call, by the fastest road.

        Parameters
        ----------
        data : bytes-like or ndarray
            Exactly `nbytes` bytes. For a range allocated with a dtype an array has that dtype and shape.
        rewrite : bool
            As in `writer`.

        Returns
        -------
        WriteReceipt

        Raises
        ------
        LengthError, LayoutError, DtypeError
            If `data` does not match; before a byte moves.
        RangeStateError, ClosedStoreError, ForkedStoreError
            As in `writer`.
        OSError
            If the system refuses the write; there is no receipt.
        """
        array = _as_array(data, self._layout, self._nbytes)
        alive: set[None] = set()
        self._claim(ref(alive), rewrite)
        try:
            self._touched = True
            strides = (self._layout or ())[2:]
            if not self._owner._mapped.put(array, self._start, *strides) or self._owner._down is not None:
                self._owner._refuse()
            self._shown = self._layout
            return receipt_of(self, self._owner._ledger.record(self, self._checksum()))
        finally:
            self._owner._claims.pop(self._start, None)

    def read(self) -> NDArray[Any]:
        """Return what was written, without copying.

        Returns
        -------
        ndarray
            Read-only, shaped and typed like the array of the last writer. It stays valid after the store is
            closed, and shows later rewrites of the range.

        Raises
        ------
        NotWrittenError
            If the range has no receipt. `BlockStore.raw` reads whatever the bytes are.
        SpentRangeError, ClosedStoreError, ForkedStoreError
            If the range was split, or the store is not usable.
        """
        owner = self._owner
        frozen = owner._mapped.frozen
        if owner._down is not None or frozen is None:
            owner._refuse()
        if self._sequence is None and self._bar is not _REFERENCE:
            if isinstance(self._bar, str):
                raise SpentRangeError(f"cannot read {self._where()}: {self._bar}")
            why = "a writer is inside" if self._is_claimed() else "no writer has left it cleanly"
            raise NotWrittenError(f"cannot read {self._where()}: {why}")
        if self._sequence is not None and self._sequence >= owner._ledger.void_from:
            raise NotWrittenError(f"cannot read {self._where()}: its receipt is void, since a sync failed")
        shown = self._shown or ((self._nbytes,), BYTE)
        return np.ndarray(shown[0], shown[1], frozen, self._start, *shown[2:])

    def split_up(self, offset: int) -> "tuple[AllocatedRange | None, AllocatedRange | None]":
        """Split at ``align_up(start + offset)``; this range is spent.

        Parameters
        ----------
        offset : int
            Bytes from the start of the range, 0 to `nbytes`.

        Returns
        -------
        low, high : AllocatedRange or None
            Untyped ranges that share the bytes and the tag; None for an empty side.

        Raises
        ------
        ValueError
            If `offset` is out of bounds.
        RangeStateError
            If the range is spent, written, or has a writer inside.

        Examples
        --------
        >>> import blockstore as bs
        >>> with bs.create(tmp_path / "data.bin", 1 << 20) as store:
        ...     store.allocate(10000).split_up(5000)
        (<AllocatedRange [0, 8192) 8192 bytes, fresh>, <AllocatedRange [8192, 12288) 1808 bytes, fresh>)
        """
        return self._split(offset, align_up)

    def split_down(self, offset: int) -> "tuple[AllocatedRange | None, AllocatedRange | None]":
        """Split at ``align_down(start + offset)``; this range is spent. See `split_up`.

        Examples
        --------
        >>> import blockstore as bs
        >>> with bs.create(tmp_path / "data.bin", 1 << 20) as store:
        ...     store.allocate(10000).split_down(100)
        (None, <AllocatedRange [0, 12288) 10000 bytes, fresh>)
        """
        return self._split(offset, align_down)

    def _split(self, offset: int, align: Callable[[int], int]) -> "tuple[AllocatedRange | None, AllocatedRange | None]":
        offset = operator.index(offset)
        if not 0 <= offset <= self._nbytes:
            raise ValueError(f"offset {offset} is out of bounds: {self._where()} has {self._nbytes} bytes")
        cut = align(offset)
        alive: set[None] = set()
        self._claim(ref(alive), rewrite=False, verb="split")
        try:
            self._bar = _SPLIT
        finally:
            self._owner._claims.pop(self._start, None)
        middle = min(self._start + cut, self._stop)
        low = high = None
        if cut > 0:
            low = allocated(self._owner, self._start, middle, min(cut, self._nbytes), self._tag, None)
            low._touched = self._touched
        if cut < self._nbytes:
            high = allocated(self._owner, middle, self._stop, self._nbytes - cut, self._tag, None)
            high._touched = self._touched
        return low, high

    def _claim(self, token: "ref[Any]", rewrite: bool, verb: str = "write") -> None:
        """Become the one writer of this range, or say why not. `token` is a weak reference that nobody else has."""
        owner = self._owner
        held = owner._claims.setdefault(self._start, token)
        if held is not token:
            self._contest(held, token, verb)
        if self._sequence is not None or self._bar is not None or owner._down is not None:
            try:
                self._admit(rewrite, verb)
            except BaseException:
                owner._claims.pop(self._start, None)
                raise

    def _contest(self, held: "ref[Any]", token: "ref[Any]", verb: str) -> None:
        """Take over the claim of a writer that is gone, as one is that Ctrl-C hit in its exit."""
        owner = self._owner
        if owner._down is not None:
            owner._refuse()
        if held() is None:
            with owner._stale:
                if owner._claims.get(self._start) is held:
                    owner._claims.pop(self._start, None)
            held = owner._claims.setdefault(self._start, token)
        if held is not token:
            raise WriterBusyError(f"cannot {verb} {self._where()}: another writer is inside")

    def _admit(self, rewrite: bool, verb: str) -> None:
        """Check what stands against a writer that holds the claim; revoke the receipt of a rewrite."""
        if self._owner._down is not None:
            self._owner._refuse()
        if isinstance(self._bar, str):
            raise SpentRangeError(f"cannot {verb} {self._where()}: {self._bar}")
        if self._bar is not None and (count := self._bar.count(named=False)):
            raise EscapedViewError(self._start, self._stop, count, "no new writer while they live; drop them first")
        self._bar = None
        if self._sequence is not None:
            if not rewrite:
                unless = " unless rewrite=True is passed" if verb == "write" else ""
                raise AlreadyWrittenError(f"cannot {verb} {self._where()}: it is written, and immutable{unless}")
            self._owner._ledger.revoke(self)

    def _checksum(self) -> int:
        """Return the checksum of what the file holds here now, or 0 if the store keeps none."""
        owner = self._owner
        if (digest := owner._digest) is None:
            return 0
        if (shared := owner._mapped.map) is None:
            owner._refuse()
        return digest(np.ndarray(self._nbytes, BYTE, shared, self._start))

    def _is_claimed(self) -> bool:
        held = self._owner._claims.get(self._start)
        return held is not None and held() is not None

    def _where(self) -> str:
        return f"range [{self._start}, {self._stop})"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._sequence is None and self._bar is not _REFERENCE:
            raise NotWrittenError(f"cannot pickle {self._where()}: only a written range travels, as a reference")
        return _reference, (self._owner, self._start, self._stop, self._nbytes, self._tag, self._shown)

    def __copy__(self) -> "AllocatedRange":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "AllocatedRange":
        return self

    def __repr__(self) -> str:
        if isinstance(self._bar, str):
            state = "a reference" if self._bar is _REFERENCE else "spent"
        elif self._is_claimed():
            state = "being written"
        elif (receipt := self.receipt) is not None:
            state = "durable" if receipt.durable else "void" if receipt.revoked else "written"
        else:
            state = "fresh"
        return f"<AllocatedRange {self._text()}, {state}>"


_new: Callable[[type[Any]], Any] = object.__new__


def allocated(owner: Owner, start: int, stop: int, nbytes: int, tag: int, layout: Layout | None) -> AllocatedRange:
    """Make the object that owns ``[start, stop)``. For stores: whoever calls this vouches for no overlap."""
    r: AllocatedRange = _new(AllocatedRange)
    r._owner = owner
    r._start = start
    r._stop = stop
    r._nbytes = nbytes
    r._tag = tag
    r._layout = r._shown = layout
    r._sequence = r._bar = None
    r._touched = False
    return r


def _reference(owner: Owner, start: int, stop: int, nbytes: int, tag: int, layout: Layout | None) -> AllocatedRange:
    """Rebuild a written range from its pickle: readable, and spent for writing."""
    r = allocated(owner, start, stop, nbytes, tag, layout)
    r._bar = _REFERENCE
    return r


def _as_array(data: Any, layout: Layout | None, nbytes: int) -> NDArray[Any]:
    """Return `data` as an array that fills a range of `nbytes` bytes exactly."""
    if type(data) is np.ndarray or hasattr(data, "__array__"):
        if isinstance(data, np.ma.MaskedArray):
            raise DtypeError("a masked array has no bytes for its mask: pass a.filled() or a.data")
        array: NDArray[Any] = np.asarray(data)
        if array.dtype.hasobject:
            raise DtypeError(f"cannot write dtype {array.dtype}: it holds Python objects")
        if layout is not None:
            if array.dtype != layout[1]:
                raise DtypeError(f"the range holds {layout[1]}, an array of {array.dtype} was given")
            if array.shape != layout[0]:
                raise LayoutError(f"the range has shape {layout[0]}, an array of shape {array.shape} was given")
    else:
        try:
            array = np.frombuffer(data, BYTE)
        except (TypeError, ValueError, BufferError) as error:
            raise TypeError(f"write() takes a contiguous bytes-like object or an array: {error}") from None
    strided = layout is not None and len(layout) == 3
    if layout is not None and strided:  # the bytes between its rows are not the array's
        nbytes = layout_nbytes(layout)
    if array.nbytes != nbytes:
        raise LengthError(nbytes, array.nbytes)
    return array if layout is None or not strided else array.view(layout[1]).reshape(layout[0])
