"""BlockStore: one file, one map, one allocator, and the receipts of what was written.

The file is the data, from byte 0, and nothing else. This module joins the layers below it: the system calls
from `_os`, the space from `allocators`, the objects from `ranges` and `writers`. It knows nothing of arrays and
formats. Offsets and sizes are bytes.

Examples
--------
>>> import blockstore as bs
>>> store = bs.create(tmp_path / "data.bin", 1 << 20)
>>> for r in store.ranges(1 << 18):
...     with r.writer(dtype="f8") as a:
...         a[:] = r.start
>>> store.flush()
4
>>> store
<BlockStore 'data.bin': 1048576 bytes, 0 free, 4 receipts, open "r+">
>>> store.close()
"""

import operator
import secrets
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from blockstore import live
from blockstore._disk import FileLock
from blockstore.allocators import Allocator, UntilFull, check_nbytes
from blockstore.checksums import ChecksumFunction
from blockstore.errors import (
    ClosedStoreError,
    ForeignRangeError,
    ForkedStoreError,
    LayoutError,
    OutOfSpaceError,
    ReadOnlyStoreError,
    RevokedReceiptError,
)
from blockstore.ledger import Ledger
from blockstore.mapped import MappedFile
from blockstore.options import Options
from blockstore.ranges import AllocatedRange, WriteReceipt, allocated
from blockstore.raw import RawStore
from blockstore.records import holes
from blockstore.sequences import RangeSequence
from blockstore.views import Layout, check_layout, layout_nbytes


class BlockStore:
    """One file that many threads fill at once. Made by `create` and `open`, safe to share among threads.

    A context manager: leaving it flushes and closes. Ranges, arrays and receipts outlive the store; arrays stay
    valid, everything else says that the store is closed. An open store that crosses a ``fork`` goes on in the
    parent; in the child every use of it is refused, and what an inherited array is set to never reaches the file.
    It pickles as a reference: unpickling finds the store of this process, or opens the same file to read.

    Attributes
    ----------
    path : str
        Absolute path of the file.
    nbytes : int
        Bytes of the file.
    mode : {"r", "r+"}
    closed : bool
    allocator : Allocator
        Who gets which bytes.
    free : int
        Bytes not handed out yet.
    raw : RawStore
        Bytes at offsets, without ranges, writers or receipts.
    """

    def __init__(
        self,
        path: str,
        mapped: MappedFile,
        options: Options,
        allocator: Allocator,
        ledger: Ledger,
        digest: ChecksumFunction | None,
        lock: FileLock | None,
    ) -> None:
        self.path = path
        self.nbytes = mapped.nbytes
        self.mode = "r+" if mapped.writable else "r"
        self.allocator = allocator
        self._mapped = mapped
        self._ledger = ledger
        self._digest = digest
        self._lock = lock  # on the file, while it is written
        if lock is not None:
            lock.keep()
        self._claims: dict[int, weakref.ref[Any]] = {}
        self._escapes: list[weakref.ref[Any]] = []
        self._stale = threading.Lock()
        self._token = secrets.token_bytes(8)  # tells it from other stores of the file
        self._quiet = False  # whether not to warn if it is never closed
        self._down: str | None = None
        self._escaped = options.escaped
        self._writer = options.writer
        self._take = self.allocator._take if mapped.writable else self._refuse_taking
        if mapped.writable and ledger.is_blank:
            self._take = self._take_nothing
        mapped.keep()
        live.add(self)

    @property
    def closed(self) -> bool:
        """Whether the store may not be used any more."""
        return self._down is not None

    @property
    def free(self) -> int:
        """Bytes not handed out yet. A snapshot."""
        return self.allocator.free

    @property
    def raw(self) -> RawStore:
        """Bytes at offsets, without ranges, writers or receipts."""
        self._mapped.zeroed = False  # whoever asks may write anywhere, and views show what the file holds
        return RawStore(self)

    def allocate(
        self,
        nbytes: int | None = None,
        *,
        shape: int | Sequence[int] | None = None,
        dtype: DTypeLike | None = None,
        tag: int = 0,
        partial: bool = False,
    ) -> AllocatedRange:
        """Hand out a range that nobody else gets.

        Parameters
        ----------
        nbytes : int, optional
            Bytes, at least 1. The range owns them rounded up to `ALIGNMENT`.
        shape, dtype : optional
            What `AllocatedRange.writer` and `read` default to; with a `shape`, `nbytes` is what it takes.
        tag : int
            64 bits, the caller's own, to say what the range is for.
        partial : bool
            Take what the hole has if it has less than `nbytes`; not for a typed range.

        Raises
        ------
        OutOfSpaceError
            If no hole is large enough; nothing is burned.
        LayoutError, DtypeError, ValueError
            If size, shape, dtype or tag are malformed.
        ReadOnlyStoreError, ClosedStoreError, ForkedStoreError
            If the store hands out nothing.

        Notes
        -----
        Well under a microsecond. See the allocators for what happens among threads.
        """
        layout = None
        if shape is not None or dtype is not None:
            nbytes, layout = _typed(nbytes, shape, dtype, partial)
        elif type(nbytes) is not int or nbytes < 1:
            nbytes = check_nbytes(nbytes)
        if tag != 0:
            tag = _check_tag(tag)
        start, stop = self._take(nbytes, partial)
        return allocated(self, start, stop, nbytes if nbytes <= stop - start else stop - start, tag, layout)

    def allocate_many(
        self,
        count: int,
        nbytes: int | None = None,
        *,
        shape: int | Sequence[int] | None = None,
        dtype: DTypeLike | None = None,
        tag: int = 0,
    ) -> RangeSequence:
        """Hand out `count` ranges of `nbytes` bytes each in one reservation: all of them or none.

        Returns
        -------
        RangeSequence
            A sequence of `AllocatedRange`, each made when it is first touched.

        Raises
        ------
        As `allocate`.
        """
        if self._down is not None or self.mode == "r":
            self._refuse_writing()
        layout = None
        if shape is not None or dtype is not None:
            each, layout = _typed(nbytes, shape, dtype, partial=False)
        else:
            each = check_nbytes(nbytes)
        tag = _check_tag(tag)
        return RangeSequence(self, self.allocator.allocate_many(count, each), each, tag, layout)

    def ranges(self, nbytes: int, *, tag: int = 0) -> Iterator[AllocatedRange]:
        """Iterate over ranges of `nbytes` bytes until the space is used up.

        A range is shorter where a hole ends. The iterator can be shared among threads: each range goes to one.
        """
        if self._down is not None or self.mode == "r":
            self._refuse_writing()
        return UntilFull(lambda: self.allocate(nbytes, tag=tag, partial=True))

    def flush(self, receipts: WriteReceipt | Iterable[WriteReceipt] | None = None, *, wait: bool = True) -> int:
        """Make receipts durable: return when the disk has what they stand for.

        Parameters
        ----------
        receipts : WriteReceipt or iterable of WriteReceipt, optional
            Default: every receipt so far.
        wait : bool
            False starts write-back now, waits for nothing and promises nothing.

        Returns
        -------
        int
            Receipts that this call made durable. One sync covers every receipt so far, so it can be more than were
            asked for, and it is 0 if there was nothing left to do.

        Raises
        ------
        ForeignRangeError
            If a receipt is another store's.
        RevokedReceiptError
            If the range of a receipt was opened for rewriting since.
        PoisonedStoreError
            If a sync failed, now or before. Nothing is called durable after that: reopen the store.

        Notes
        -----
        One ``fdatasync`` for any number of receipts, without the GIL; other threads go on meanwhile.
        """
        if self._down is not None or self.mode == "r":
            self._refuse_writing()
        if receipts is not None and not isinstance(receipts, Iterable):
            receipts = (receipts,)
        wanted = None if receipts is None else tuple(map(self._own, receipts))
        if not wait:
            self._start_writeback(wanted)
            return 0
        return self._ledger.flush(wanted)

    def sync(self) -> None:
        """Return when the disk has all bytes of the file, whoever wrote them and with or without a receipt."""
        if self._down is not None or self.mode == "r":
            self._refuse_writing()
        self._ledger.sync()

    def receipts(self) -> NDArray[np.void]:
        """Return the receipts that stand, in order of `start`.

        Returns
        -------
        ndarray, shape (n,)
            Structured: ``start``, ``stop``, ``nbytes``, ``tag`` (uint64), ``durable`` (bool) and ``checksum``
            (uint64, 0 if the store keeps none). A copy. With ``mode="r"``, those that stood when it was opened.

        Notes
        -----
        O(n) in the records of the journal: about 0.1 s for a million.
        """
        return self._ledger.as_array()

    def pending(self) -> NDArray[np.void]:
        """Return what is not written: fresh, handed out, or being written. A report, which owns nothing.

        Returns
        -------
        ndarray, shape (n,)
            Structured: ``start``, ``stop`` and ``nbytes`` (uint64), in order of ``start``; the receipts are what lies
            between. A copy.
        """
        return holes(self.receipts(), self.nbytes)

    def verify(self, *, progress: Callable[[int], object] | None = None) -> NDArray[np.void]:
        """Read back what the receipts stand for, and compare the checksums.

        Parameters
        ----------
        progress : callable, optional
            Called with the bytes of each range when it is done, such as ``tqdm(total=store.nbytes).update``.

        Returns
        -------
        ndarray, shape (n,)
            Those of `receipts` whose bytes differ from what was written; empty if all is well.

        Raises
        ------
        ValueError
            If the store was created without ``checksum=``.
        ClosedStoreError, ForkedStoreError
            If the store is not usable.

        Notes
        -----
        Reads as the system reads, which may have the bytes in memory still: what a disk really kept is seen after the
        machine was started anew. A range that is rewritten meanwhile is not reported; with ``mode="r"``, one is that
        its writer has rewritten since this store was opened.

        Examples
        --------
        >>> import blockstore as bs
        >>> with bs.create(tmp_path / "data.bin", 8192, checksum="crc32") as store:
        ...     receipts = [store.allocate(4096, tag=i).write(bytes(4096)) for i in range(2)]
        ...     store.raw.write_at(5000, b"!")
        ...     store.verify()["tag"]
        1
        array([1], dtype=uint64)
        """
        digest, frozen = self._digest, self._mapped.frozen
        if self._down is not None or frozen is None:
            self._refuse()
        if digest is None:
            raise ValueError(f"the receipts of {self.path!r} have no checksums: create it with checksum=")
        receipts, sequences = self._ledger.as_arrays()
        differs = np.zeros(len(receipts), np.bool_)
        for index, (start, nbytes, checksum) in enumerate(
            zip(*(receipts[name].tolist() for name in ("start", "nbytes", "checksum")), strict=True)
        ):
            differs[index] = digest(frozen[start : start + nbytes]) != checksum
            if progress is not None:
                progress(nbytes)
        return receipts[differs & np.isin(sequences, self._ledger.as_arrays()[1])]

    def close(self) -> None:
        """Flush, and use the file no more. Arrays that are alive stay valid. Closing twice does nothing.

        Writers that are still inside go on undisturbed, and get `ClosedStoreError` instead of a receipt.

        Raises
        ------
        PoisonedStoreError
            If the flush failed; the store is closed all the same.
        """
        if self._down is not None:
            return
        self._ledger.check_reentry()
        try:
            if self.mode == "r+":
                self._ledger.flush(None, last=True)
        finally:
            self._shut("closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_down", "never opened") is None:
            try:
                if not self._quiet:
                    warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)
            finally:
                self.close()

    def __repr__(self) -> str:
        if sys.is_finalizing():  # NumPy may want to import something to count
            state = self._down or f'open "{self.mode}"'
        elif self._down is None:
            state = f'{self.free} free, {len(self.receipts())} receipts, open "{self.mode}"'
        else:  # an allocator that crossed a fork may be locked for good
            state = self._down
        return f"<BlockStore {Path(self.path).name!r}: {self.nbytes} bytes, {state}>"

    # -- what ranges, writers and raw access use ----------------------------------------------------

    def _refuse(self) -> NoReturn:
        if self._down == "closed":
            raise ClosedStoreError(f"the store of {self.path!r} is closed")
        raise ForkedStoreError(
            f"the store of {self.path!r} was inherited through a fork: its parent goes on with it, reopen it here"
        )

    def _refuse_writing(self) -> NoReturn:
        if self._down is not None:
            self._refuse()
        raise ReadOnlyStoreError(f"the store of {self.path!r} was opened with mode='r', which writes nothing")

    def _buffer(self, *, writable: bool) -> NDArray[np.uint8]:
        if self._down is not None or (writable and self.mode == "r"):
            self._refuse_writing()
        shared, frozen = self._mapped.map, self._mapped.frozen
        if shared is None or frozen is None:
            self._refuse()
        return np.ndarray(self.nbytes, np.uint8, shared) if self.mode == "r+" else frozen

    def _own(self, receipt: WriteReceipt) -> WriteReceipt:
        if not isinstance(receipt, WriteReceipt):
            raise TypeError(f"flush takes receipts, such as r.receipt, not {receipt!r}")
        owner: object = receipt._extent._owner
        if owner is not self:
            raise ForeignRangeError(f"{receipt!r} is of {owner!r}, not of {self!r}")
        if receipt.revoked:
            self._ledger.check()
            raise RevokedReceiptError(f"{receipt!r} was voided by a rewrite of its range")
        return receipt

    def _start_writeback(self, wanted: Sequence[WriteReceipt] | None) -> None:
        if wanted is None:
            self._mapped.start_writeback(0, self.nbytes)
        else:
            for receipt in wanted:
                self._mapped.start_writeback(receipt.start, receipt.stop)

    def _shut(self, why: str) -> None:
        self._down = why
        self._take = self._refuse_taking
        shared, lock = self._mapped.map, self._lock
        try:
            self._ledger.close()
        finally:
            try:
                self._mapped.drop()
            finally:
                self._lock = None
                if lock is not None:  # who is still inside a writer, or let a view escape, can still write the file
                    held = [held() for held in (*self._claims.copy().values(), *self._escapes)]
                    lock.release([a for a in held if a is not None and getattr(a, "base", shared) is shared])

    def _disown(self) -> None:
        self._down = "inherited through a fork"
        self._take = self._refuse_taking
        self._ledger.abandon()
        self._mapped.disown()
        if self._lock is not None:
            self._lock.close()

    def _refuse_taking(self, nbytes: int, partial: bool) -> tuple[int, int]:
        self._refuse_writing()

    def _take_nothing(self, nbytes: int, partial: bool) -> tuple[int, int]:
        """Hand out nothing of a file without a journal, and say why."""
        hint = "; no journal says which bytes matter: open(..., discard=True) makes all of them free"
        raise OutOfSpaceError(nbytes, 0, 0, hint)


def _typed(
    nbytes: int | None, shape: int | Sequence[int] | None, dtype: DTypeLike | None, partial: bool
) -> tuple[int, Layout]:
    """Return the bytes and the layout of a typed range."""
    if partial:
        raise LayoutError("a typed range is whole or not at all: partial=True takes nbytes only")
    layout = check_layout(shape, dtype, nbytes)
    return check_nbytes(layout_nbytes(layout) if nbytes is None else nbytes), layout


def _check_tag(tag: int) -> int:
    try:
        checked = operator.index(tag)
    except TypeError:
        raise TypeError(f"a tag is an int of 64 bits, not {tag!r}") from None
    if not 0 <= checked < 1 << 64:
        raise ValueError(f"a tag is 64 bits, 0 to 2**64 - 1, not {tag}")
    return checked
