"""Shard: one file of an array, from the hidden working file in which it is filled to the published one.

A published file never changes: one that is to be written again is first copied into a new working file, and replaced
whole when that is published. So whoever reads it, by whatever means, sees what was final when it was opened. The
working file is a `BlockStore`, whose journal says which blocks are written; of a published file its own index does, or,
of an ``.npy`` file, its being there. Offsets are bytes in the file; blocks are numbered as `ShardLayout` does.
"""

import contextlib
import errno
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from blockstore import _os, sidecar
from blockstore.checksums import ChecksumKind, checksum_function
from blockstore.draft import working_of
from blockstore.errors import (
    AlreadyWrittenError,
    ClosedStoreError,
    JournalMismatchError,
    ReadOnlyStoreError,
    WriterBusyError,
)
from blockstore.journal import Journal
from blockstore.layouts.grid import Grid, Index, ShardLayout
from blockstore.layouts.npy import encode_header
from blockstore.layouts.zarr import Metadata, ShardIndex, encode_index
from blockstore.opening import make, reopen
from blockstore.options import Options
from blockstore.published import Published, read_npy, read_shard
from blockstore.records import DURABLE, WRITTEN
from blockstore.resume import peek
from blockstore.store import BlockStore
from blockstore.views import Loan

OPEN_FILES = 64
"""Files of an array that are kept open at once; what nobody is writing is closed, and opened again if need be."""

_NEVER = np.int64(2**63 - 1)
_COPY_NBYTES = 1 << 26


@dataclass(slots=True)
class Plan:
    """What the shards of one array share."""

    path: str
    grid: Grid
    fill_value: np.generic
    metadata: Metadata | None
    """None for ``.npy``."""
    mode: Literal["r", "r+"]
    options: Options
    reserve: bool
    checksum: ChecksumKind | None
    keep_journal: bool
    replaces: bool
    """Whether an ``.npy`` file may be replaced that is not of this array."""
    is_closed: bool = False
    opened: "OrderedDict[Shard, None]" = field(default_factory=OrderedDict)
    """Those that have a file open, the one that was used last at the end."""
    completed: "deque[Shard]" = field(default_factory=deque)
    """Those whose last block was written, and which are not published."""
    lock: Any = field(default_factory=threading.Lock)
    """Held to change `opened`."""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return os.path.basename(self.path)

    @property
    def fill_is_zero(self) -> bool:
        """Whether the fill value is what a new file holds."""
        return not any(self.fill_value.tobytes())

    def refuse_writing(self) -> None:
        """Raise the error that says why nothing may be written, if so."""
        self.refuse_closed()
        if self.mode == "r":
            raise ReadOnlyStoreError(f"{self.path!r} was opened with mode='r', which writes nothing")

    def refuse_closed(self) -> None:
        """Raise `ClosedStoreError` if the array is closed."""
        if self.is_closed:
            raise ClosedStoreError(f"the array {self.path!r} is closed")

    def use(self, shard: "Shard") -> None:
        """Note that a shard has a file open and is being used; close others if there are too many."""
        with self.lock:
            self.opened[shard] = None
            self.opened.move_to_end(shard)
            others = [] if len(self.opened) <= OPEN_FILES else list(self.opened)[: len(self.opened) - OPEN_FILES]
        for other in others:
            other.rest()


class Shard:
    """One file of an array. Safe to share among threads.

    Attributes
    ----------
    lock : RLock
        Held while the file changes from one kind to another, and for a moment to begin a write.
    store : BlockStore or None
        The working file, if it is open.
    sequences : ndarray of int64, shape (count,)
        The number under which the journal has each block, -1 of one that is not written.
    touched : ndarray of bool, shape (count,)
        Of the working file: whether a block may have other bytes than zeros.
    escaped : dict of int to Loan
        What was lent of a block and is still held by somebody.
    """

    def __init__(self, plan: Plan, index: Index, path: str, announce: Callable[[], None]) -> None:
        self.plan = plan
        self._announce = announce  # says that the array is being written, before a working file is made
        self.index = index
        self.path = path
        self.layout: ShardLayout = plan.grid.shard(index, npy=plan.metadata is None)
        self.lock: Any = threading.RLock()
        self.store: BlockStore | None = None
        self.escaped: dict[int, Loan] = {}
        self._ledger: Any = None
        self._published: Published | None = None
        self._kind: Literal["unknown", "none", "working", "published"] = "unknown"
        self._sequences: NDArray[np.int64] | None = None
        self._touched: NDArray[np.bool_] | None = None
        self._missing = self.layout.count

    # -- what is written ------------------------------------------------------------------------------

    @property
    def sequences(self) -> NDArray[np.int64]:
        """The number under which the journal has each block, -1 of one that is not written."""
        if self._sequences is None:
            self._sequences = np.full(self.layout.count, -1, np.int64)
        return self._sequences

    @property
    def touched(self) -> NDArray[np.bool_]:
        """Whether a block of the working file may have other bytes than zeros."""
        if self._touched is None:
            self._touched = np.zeros(self.layout.count, np.bool_)
        return self._touched

    def note(self, number: int, sequence: int | None) -> None:
        """Remember under which number a block is in the journal, if at all. The ledger's lock is held."""
        sequences = self.sequences
        had, has = sequences[number] >= 0, sequence is not None
        sequences[number] = -1 if sequence is None else sequence
        self._missing += int(had) - int(has)
        if self._missing == 0 and not had:
            self.plan.completed.append(self)

    def is_written(self, number: int) -> bool:
        """Whether a block is written."""
        self._find()
        if self._sequences is None:
            return False
        return 0 <= int(self._sequences[number]) < self._void_from()

    def written(self) -> NDArray[np.bool_]:
        """Return which blocks are written, in order of their numbers: a copy, or a read-only constant."""
        self._find()
        if self._sequences is None:
            return np.broadcast_to(np.False_, self.layout.count)
        return np.asarray((self._sequences >= 0) & (self._sequences < self._void_from()))

    def durable(self) -> NDArray[np.bool_]:
        """Return which blocks survive a power loss, in order of their numbers."""
        written = self.written()
        if self._sequences is None or self._kind == "published" or self._ledger is None:
            return written
        return np.asarray(written & (self._sequences < min(self._ledger.durable_below, _NEVER)))

    def state_of(self, number: int) -> str:
        """Return what a block is, for who reads it."""
        if self.is_written(number):
            return "durable" if self.durable()[number] else "written"
        store = self.store
        held = None if store is None else store._claims.get(self.layout.start(number))
        return "being written" if held is not None and held() is not None else "pending"

    @property
    def version(self) -> object:
        """What changes whenever this object has changed the content."""
        return self._kind, self._missing, None if self._ledger is None else self._ledger._next

    def block_index(self, number: int) -> Index:
        """Return where a block lies in the array's grid of blocks."""
        first = self.plan.grid.shard_blocks(self.index)
        return tuple(part.start + i for part, i in zip(first, self.layout.inner(number), strict=True))

    def _void_from(self) -> int:
        return int(_NEVER) if self._ledger is None else min(self._ledger.void_from, int(_NEVER))

    # -- reading --------------------------------------------------------------------------------------

    def read(self, number: int) -> NDArray[Any] | None:
        """Return a block, read-only and without a copy; None if it is not written."""
        if not self.is_written(number):
            return None
        with self.lock:
            frozen = self._frozen()
            if isinstance(frozen, Published):
                return frozen.block(number)
        layout = self.layout
        return np.ndarray(
            layout.block_shape(number), layout.dtype, frozen, layout.start(number), layout.strides(number)
        )

    def whole(self) -> NDArray[Any] | None:
        """Return all elements of the shard without a copy, if they lie as those of one array; what is not written among
        them means nothing."""
        self._find()
        if self._kind == "none":
            return None
        with self.lock:
            frozen = self._frozen()
            if isinstance(frozen, Published):
                return frozen.whole
        if not self.layout.is_array:
            return None
        return np.ndarray(self.layout.region, self.layout.dtype, frozen, self.layout.first)

    def _frozen(self) -> "NDArray[np.uint8] | Published":
        """Return what to read from. The lock is held."""
        self.plan.refuse_closed()
        if self._kind == "working":
            if self.store is None:
                self._open_working()
            self.plan.use(self)
            frozen = None if self.store is None else self.store._mapped.frozen
            if frozen is None:
                raise ClosedStoreError(f"the file of a part of {self.plan.path!r} is closed")
            return frozen
        if self._published is None:
            self._published = self._read_published()
        self.plan.use(self)
        return self._published

    # -- where it is ----------------------------------------------------------------------------------

    @property
    def total_nbytes(self) -> int:
        """Bytes of the file."""
        return self.layout.data_stop + self._index_nbytes

    @property
    def _index_nbytes(self) -> int:
        if self.plan.metadata is None:
            return 0
        count = 1
        for n in self.plan.grid.per_shard:
            count *= n
        return ShardIndex().nbytes(count)

    def _find(self) -> None:
        """Find out what there is of this shard, once."""
        if self._kind != "unknown":
            return
        with self.lock:
            if self._kind != "unknown":
                return
            self.plan.refuse_closed()
            work = working_of(self.path)
            if self.plan.metadata is not None and self.plan.metadata.index is None:
                work = ""
            for _ in range(3):  # somebody else may be publishing it right now
                try:
                    if work and os.path.lexists(work) and not self._is_linked(work):
                        self._open_working()
                        return
                    self._published = published = self._read_published()
                except FileNotFoundError:
                    continue
                except OSError as error:
                    if error.errno != errno.ESTALE:
                        raise
                    continue
                self._believe(published)
                self.plan.use(self)
                return
            self._kind = "none"

    def _is_linked(self, work: str) -> bool:
        """Whether the working file has its final name already: whoever gave it was interrupted."""
        try:
            if not os.path.samefile(work, self.path):
                return False
        except FileNotFoundError:
            return False
        if self.plan.mode == "r+":
            os.unlink(work)
            self._settle_journal(work)
        return True

    def _read_published(self) -> Published:
        if (metadata := self.plan.metadata) is None:
            return read_npy(self.path, self.layout)
        return read_shard(self.path, self.layout, metadata, self.plan.grid.per_shard)

    def _believe(self, published: Published) -> None:
        """Take over what a published file says is written."""
        if self._sequences is None or not np.array_equal(self._sequences >= 0, published.written):
            self._sequences = np.where(published.written, np.arange(self.layout.count), -1)
        self._missing = int(np.count_nonzero(~published.written))
        self._kind, self._ledger = "published", None

    def _open_working(self) -> None:
        """Open the working file that is there, and believe its journal. The lock is held."""
        work, layout = working_of(self.path), self.layout
        store = reopen(work, self.plan.options, self.plan.mode, blocks=True)
        store._quiet = True
        try:
            receipts, sequences = store._ledger.as_arrays()
            numbers = receipts["tag"].astype(np.int64)
            if (
                store.nbytes != self.total_nbytes
                or np.any(numbers < 0)
                or np.any(numbers >= layout.count)
                or not np.array_equal(receipts["start"], layout.starts()[numbers])
            ):
                raise JournalMismatchError(
                    f"{work!r} and its journal are not of this array: create the array with overwrite=True"
                )
        except BaseException:
            store.close()
            raise
        self.store, self._ledger = store, store._ledger
        self._sequences = np.full(layout.count, -1, np.int64)
        self._sequences[numbers] = sequences
        self._touched = np.ones(layout.count, np.bool_)
        self._missing = layout.count - len(numbers)
        self._kind = "working"
        if self._missing == 0:
            self.plan.completed.append(self)
        self.plan.use(self)

    # -- writing --------------------------------------------------------------------------------------

    def store_to_write(self, number: int, *, rewrite: bool) -> BlockStore:
        """Return the working file, to write a block of it; make it if there is none."""
        self.plan.refuse_writing()
        with self.lock:
            self._find()
            if self._kind == "published" and not rewrite and self.is_written(number):
                raise AlreadyWrittenError(
                    f"cannot write block {self.block_index(number)} of {self.plan.name!r}: it is written, and "
                    "immutable unless rewrite=True is passed"
                )
            if self.store is None:
                if self._kind == "working":
                    self._open_working()
                else:
                    self.begin()
            self.plan.use(self)
            if self.store is None:
                raise ClosedStoreError(f"the file of a part of {self.plan.path!r} is closed")
            return self.store

    def begin(self) -> None:
        """Make the working file: with what was published, if anything, or of zeros. The lock is held."""
        self._announce()
        plan, work = self.plan, working_of(self.path)
        _make_folders(os.path.dirname(work), plan.path)
        old = None
        if self._kind == "published":
            self._published = old = self._published or self._read_published()
        copied = old is not None and bool(old.written.any())
        store = make(
            work,
            self.total_nbytes,
            plan.options,
            sidecar.BLOCKS,
            plan.checksum,
            overwrite=True,
            reserve=plan.reserve,
            begin=self._copy_published if copied else None,
            sequence=int(self.sequences.max()) + 2 if copied else 0,
        )
        store._quiet = True
        self.store, self._ledger, self._published = store, store._ledger, None
        self._touched = np.zeros(self.layout.count, np.bool_) if old is None else old.written.copy()
        self._kind = "working"

    def _copy_published(self, file: _os.File, journal: Journal) -> None:
        """Give a new working file what is published, durably, under the numbers that it has in this session."""
        old = self._published
        if old is None:
            return
        digest = None if self.plan.checksum is None else checksum_function(self.plan.checksum)
        for start, source in _runs(old, self.layout):
            _copy(file, start, source)
        _os.sync_file(file)
        for number in np.flatnonzero(old.written).tolist():
            start, nbytes = self.layout.extent(number)
            at = old.extent(number)[0]
            checksum = 0 if digest is None else digest(old.frozen[at : at + nbytes])
            sequence = int(self.sequences[number])
            journal.append(WRITTEN, sequence, start, start + nbytes, nbytes, number, checksum)
        above = int(self.sequences.max()) + 1
        journal.append(DURABLE, above, 0, above)
        journal.sync()

    # -- publishing -----------------------------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        """Whether every block is written."""
        self._find()
        return self._missing == 0 and (self._ledger is None or self._ledger.void_from > int(_NEVER))

    @property
    def is_published(self) -> bool:
        """Whether what is written of it is under its final name, and nothing else."""
        self._find()
        return self._kind != "working"

    def flush(self) -> int:
        """Make what is written durable; return how many blocks that made so."""
        store = self.store
        try:
            return 0 if store is None or self.plan.mode == "r" else store.flush()
        except ClosedStoreError:
            if store is self.store:
                raise
            return 0  # it was published meanwhile, which flushed it

    def publish(self, *, closing: bool = False) -> None:
        """Flush, and bring the working file under its final name, in one step; do nothing if there is none.

        What is not written stays out. Raises `WriterBusyError` if somebody is writing; when `closing`, what they write
        is cut off from the file instead, and they get `ClosedStoreError`.
        """
        with self.lock:
            self._find()
            if self._kind != "working":
                return
            if self.store is None:
                self._open_working()
            store = self.store
            if store is None or (not self.written().any() and self.layout.count):
                return
            busy = [start for start, held in store._claims.copy().items() if held() is not None]
            if busy and not closing:
                number = int(np.searchsorted(self.layout.starts(), busy[0]))
                raise WriterBusyError(
                    f"cannot publish {self.plan.name!r}: block {self.block_index(number)} is being written"
                )
            store._mapped.cut_off()
            store.flush()
            written = self.written()
            file = store._mapped.file
            for offset, text in self._frame(written):
                _os.put_at(file, text, offset)
            store.sync()
            store.close()
            self.store = None
            self._rename()
            self._kind, self._ledger, self._touched = "published", None, None
            self.escaped.clear()

    def _frame(self, written: NDArray[np.bool_]) -> Iterator[tuple[int, bytes]]:
        """Return what makes the bytes of blocks a file of the format, and where it goes."""
        layout = self.layout
        if layout.is_array and written.all():
            yield 0, encode_header(layout.region, layout.dtype)
        if self.plan.metadata is not None:
            yield layout.data_stop, encode_index(layout, self.plan.grid.per_shard, written)

    def _rename(self) -> None:
        work, directory = working_of(self.path), os.path.dirname(self.path)
        snapshot = f"{work}.partial"
        if self.plan.metadata is not None or self.plan.replaces or _same(snapshot, self.path):
            os.replace(work, self.path)
        else:
            try:
                os.link(work, self.path)
            except FileExistsError:
                raise _os.exists(self.path) from None
            os.unlink(work)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(snapshot)
        self._settle_journal(work)
        _os.sync_directory(directory)

    def _settle_journal(self, work: str) -> None:
        """Remove the journal of a working file that was published, or give it the name that goes with the file's."""
        with contextlib.suppress(FileNotFoundError):
            if self.plan.keep_journal:
                os.replace(sidecar.path_of(work), sidecar.path_of(self.path))
            else:
                os.unlink(sidecar.path_of(work))
        if not self.plan.keep_journal:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(sidecar.path_of(self.path))

    def snapshot(self) -> None:
        """Put a copy of an incomplete ``.npy`` file under its final name; it is filled further where it is."""
        with self.lock:
            self._find()
            if self._kind == "working" and self.store is None:
                self._open_working()
            store = self.store
            if store is None:
                return
            store.flush()
            layout, written = self.layout, self.written()
            frozen = store._mapped.frozen
            if frozen is None:
                raise ClosedStoreError(f"the array {self.plan.path!r} is closed")
            directory = os.path.dirname(self.path)
            source = Published(layout, frozen, written, None, None)
            partial = f"{working_of(self.path)}.partial"
            replaces = self.plan.replaces or _same(partial, self.path)
            with _os.nameless(directory) as (file, name):
                os.ftruncate(file.fileno(), self.total_nbytes)
                _os.put_at(file, encode_header(layout.region, layout.dtype), 0)
                for start, run in _runs(source, layout):
                    _copy(file, start, run)
                _os.sync_file(file)
                if not replaces and os.path.lexists(self.path):
                    raise _os.exists(self.path)
                _os.publish(file, name, partial, directory, overwrite=True)
            with contextlib.ExitStack() as undo:
                undo.callback(_unlink, f"{partial}.new")
                os.link(partial, f"{partial}.new")
                os.replace(f"{partial}.new", self.path)
            _os.sync_directory(directory)

    def verify(self, progress: Callable[[int], object] | None) -> list[int]:
        """Return the numbers of the blocks whose bytes have not the checksum that their journal keeps.

        Raises `ValueError` if there is none.
        """
        if not self.written().any():
            return []
        with self.lock:
            self._frozen()
            store, published = self.store, self._published
        if store is not None:
            differing: list[int] = store.verify(progress=progress)["tag"].tolist()
            return differing
        file = _os.open_file(self.path, writable=False)
        found = sidecar.find(self.path, file, writable=False, adopt=False)
        if found is None or found.header.checksum is None or published is None:
            why = "it was published without keep_journal=True" if found is None else "it was created without checksum="
            raise ValueError(f"there are no checksums of {self.plan.path!r}: {why}")
        digest, wrong = checksum_function(found.header.checksum), []
        for start, nbytes, number, checksum in peek(found, 0)[["start", "nbytes", "tag", "checksum"]].tolist():
            if digest(published.frozen[start : start + nbytes]) != checksum:
                wrong.append(number)
            if progress is not None:
                progress(nbytes)
        return wrong

    # -- ending ---------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Close the file, if nobody is using it. It is opened again when it is needed."""
        if not self.lock.acquire(blocking=False):
            return
        try:
            store = self.store
            if store is not None:
                if self.escaped or any(held() is not None for held in store._claims.copy().values()):
                    return
                self.store = None
                store.close()
            self._published = None
        finally:
            self.lock.release()
        with self.plan.lock:
            self.plan.opened.pop(self, None)

    def close(self) -> None:
        """Flush and close the file, and leave it where it is."""
        with self.lock:
            store, self.store, self._published = self.store, None, None
            if store is not None:
                store.close()

    def discard(self) -> None:
        """Remove a working file in which nothing is written."""
        with self.lock:
            self._find()
            if self._kind == "working" and self.plan.metadata is not None and self.layout.count == self._missing:
                self.close()
                work = working_of(self.path)
                for name in (sidecar.path_of(work), work):
                    _unlink(name)
                _os.sync_directory(os.path.dirname(work))
                self._kind, self._sequences, self._touched, self._ledger = "none", None, None, None


def _runs(source: Published, layout: ShardLayout) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Return the bytes of all blocks that are written, as few extents as they make, and where each goes by `layout`."""
    numbers = np.flatnonzero(source.written)
    if source.starts is not None:
        for number in numbers.tolist():
            start, nbytes = source.extent(number)
            yield layout.start(number), source.frozen[start : start + nbytes]
        return
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    for first, last in ((run[0], run[-1]) for run in np.split(numbers, breaks) if len(run)):
        start = layout.start(int(first))
        stop, nbytes = layout.extent(int(last))
        yield start, source.frozen[start : stop + nbytes]


def _copy(file: _os.File, start: int, source: NDArray[np.uint8]) -> None:
    for at in range(0, len(source), _COPY_NBYTES):
        piece = source[at : at + _COPY_NBYTES]
        if not _os.write_at(file, piece, start + at):
            _os.put_at(file, piece.tobytes(), start + at)


def _same(a: str, b: str) -> bool:
    try:
        return os.path.samefile(a, b)
    except FileNotFoundError:
        return False


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _make_folders(folder: str, top: str) -> None:
    """Make the folders of a shard below that of its array, so that they last."""
    if os.path.isdir(folder):
        return
    if len(folder) > len(top):
        _make_folders(os.path.dirname(folder), top)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    _os.sync_directory(os.path.dirname(folder))
