"""Shard: one file of an array, from the hidden working file in which it is filled to the published one.

A published file never changes: one that is to be written again is first copied into a new working file, and replaced
whole when that is published. So whoever reads it, by whatever means, sees what was final when it was opened. The
working file is a `BlockStore`, whose journal says which blocks are written; of a published file its own index does, or,
of an ``.npy`` file, its being there. Offsets are bytes in the file; blocks are numbered as `ShardLayout` does.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from blockstore import _os, sidecar
from blockstore.draft import working_of
from blockstore.errors import (
    AlreadyWrittenError,
    ClosedStoreError,
    FormatError,
    JournalMismatchError,
    LayoutError,
    NotRegularFileError,
)
from blockstore.journal import is_journal, open_journal, read_header
from blockstore.layouts.grid import Index, ShardLayout
from blockstore.layouts.shard_index import ShardIndex
from blockstore.opening import make, reopen
from blockstore.plan import Plan
from blockstore.published import Published, read_npy, read_shard
from blockstore.resume import peek
from blockstore.store import BlockStore
from blockstore.views import Loan
from blockstore.working import clear_leftovers, copy_published, make_folders, tidy, unlink

_NEVER = np.int64(2**63 - 1)
_PIECE = 1 << 16


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
    kind : {"unknown", "none", "working", "published"}
        What there is of the shard.
    escaped : dict of int to Loan
        What was lent of a block and is still held by somebody.
    handed : dict
        Tokens of ranges that were handed out, and have not begun to write.
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
        self.handed: dict[int, None] = {}
        self._ledger: Any = None
        self._published: Published | None = None
        self.kind: Literal["unknown", "none", "working", "published"] = "unknown"
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
        self.find()
        if self._sequences is None:
            return False
        return 0 <= int(self._sequences[number]) < self._void_from()

    def written(self) -> NDArray[np.bool_]:
        """Return which blocks are written, in order of their numbers: a copy, or a read-only constant."""
        self.find()
        if self._sequences is None:
            return np.broadcast_to(np.False_, self.layout.count)
        return np.asarray((self._sequences >= 0) & (self._sequences < self._void_from()))

    def counts(self) -> tuple[int, int]:
        """Return how many blocks are written, and how many of these are durable."""
        self.find()
        if self._sequences is None:
            return 0, 0
        return int(np.count_nonzero(self.written())), int(np.count_nonzero(self.durable()))

    def pending(self) -> Iterator[int]:
        """Iterate over the numbers of blocks that are not written."""
        self.find()
        if self._sequences is None:
            yield from range(self.layout.count)
            return
        pending = np.flatnonzero(~self.written())
        for first in range(0, len(pending), _PIECE):
            yield from pending[first : first + _PIECE].tolist()

    @property
    def is_open(self) -> bool:
        """Whether it has a file open."""
        return self.store is not None or self._published is not None

    def durable(self) -> NDArray[np.bool_]:
        """Return which blocks survive a power loss, in order of their numbers."""
        written = self.written()
        if self._sequences is None or self.kind == "published" or self._ledger is None:
            return written
        return np.asarray(written & (self._sequences < min(self._ledger.durable_below, _NEVER)))

    def state_of(self, number: int) -> str:
        """Return what a block is, for who reads it."""
        if self.is_written(number):
            return "durable" if self.durable()[number] else "written"
        store = self.store
        held = None if store is None else store._claims.get(self.layout.start(number))
        return "being written" if held is not None and held() is not None else "pending"

    def identity(self) -> tuple[object, ...]:
        """Return what names the content: of a published file, the same for whoever maps it."""
        self.find()
        if self.kind == "none":
            return ()
        with self.lock:
            frozen = self._frozen()
        if isinstance(frozen, Published):
            return frozen.stamp
        return self.plan.nonce, self._missing, None if self._ledger is None else self._ledger._next

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
        start, _, shape, strides = self.layout.place(number)
        return np.ndarray(shape, self.layout.dtype, frozen, start, strides)

    def whole(self) -> NDArray[Any] | None:
        """Return all elements of the shard without a copy, if they lie as those of one array; what is not written among
        them means nothing."""
        self.find()
        if self.kind == "none":
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
        if self.kind == "working":
            if self.store is None:
                self.open_working()
            self.plan.use(self)
            frozen = None if self.store is None else self.store._mapped.frozen
            if frozen is None:
                self._refuse()
            return frozen
        if self._published is None:
            self._published = self.read_published()
        self.plan.use(self)
        if self._missing == 0 and self.plan.is_one_file:
            self.plan.whole = self._published.whole
        return self._published

    def _refuse(self) -> NoReturn:
        """Say why the working file cannot be used."""
        if self.store is not None and self.store.closed:
            self.store._refuse()
        raise ClosedStoreError(f"the file of a part of {self.plan.path!r} is closed")

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

    def find(self) -> None:
        """Find out what there is of this shard, once."""
        if self.kind != "unknown":
            return
        with self.lock:
            if self.kind != "unknown":
                return
            self.plan.refuse_closed()
            work = working_of(self.path) if self.plan.is_begun else ""
            for _ in range(3):  # somebody else may be publishing it right now
                try:
                    if work and os.path.lexists(work) and not self._is_linked(work):
                        self.open_working()
                        return
                    self._published = published = self.read_published()
                except FileNotFoundError:
                    continue
                except OSError as error:
                    if error.errno != errno.ESTALE:
                        raise
                    continue
                self._believe(published)
                if self.plan.is_begun and self.plan.metadata is None:
                    self.plan.replaces = True  # it is of this array, whoever published it
                if work and self.plan.mode == "r+" and os.path.lexists(sidecar.path_of(work)):
                    tidy(self.plan, self.path)  # whoever published it was interrupted
                self.plan.use(self)
                return
            for name in (work, self.path):
                if name and os.path.lexists(name):
                    raise FormatError(f"{name!r} is a link to nothing, or changes all the time")
            self.kind = "none"

    def _is_linked(self, work: str) -> bool:
        """Whether the working file has its final name already: whoever gave it was interrupted."""
        try:
            if not os.path.samefile(work, self.path):
                return False
        except FileNotFoundError:
            return False
        if self.plan.mode == "r+":
            os.unlink(work)
        return True

    def read_published(self) -> Published:
        """Map the published file, and check it."""
        if (metadata := self.plan.metadata) is None:
            return read_npy(self.path, self.layout)
        return read_shard(self.path, self.layout, metadata, self.plan.grid.per_shard)

    def _believe(self, published: Published) -> None:
        """Take over what a published file says is written."""
        if self._sequences is None or not np.array_equal(self._sequences >= 0, published.written):
            self._sequences = np.where(published.written, np.arange(self.layout.count), -1)
        self._missing = int(np.count_nonzero(~published.written))
        self.kind, self._ledger = "published", None

    def open_working(self) -> None:
        """Open the working file that is there, and believe its journal. The lock is held."""
        work, layout = working_of(self.path), self.layout
        try:
            store = reopen(work, self.plan.options, self.plan.mode, adopt=self.plan.adopt, blocks=True)
        except (LayoutError, NotRegularFileError) as error:
            raise FormatError(f"{work!r} should be a file that is being filled: {error}") from None
        except JournalMismatchError as error:
            why = str(error).partition(":")[0]
            raise JournalMismatchError(
                f"{why}: adopt=True goes on with an unfinished array that was copied, and "
                "create_array(overwrite=True) begins anew"
            ) from None
        store._quiet = True
        try:
            if store._ledger.is_blank and self.plan.mode == "r+":
                raise JournalMismatchError(
                    f"{work!r} has no journal, so that nothing says what of it is written: "
                    "create_array(overwrite=True) begins anew"
                )
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
        self.kind = "working"
        if self._missing == 0:
            self.plan.completed.append(self)
        self.plan.use(self)

    # -- writing --------------------------------------------------------------------------------------

    def store_to_write(self, number: int, *, rewrite: bool, token: int) -> BlockStore:
        """Return the working file, to write a block of it; make it if there is none.

        It stays open until `token` is taken out of `handed`.
        """
        self.plan.refuse_writing()
        with self.lock:
            self.handed[token] = None
            self.find()
            if self.kind == "published" and not rewrite and self.is_written(number):
                raise AlreadyWrittenError(
                    f"cannot write block {self.block_index(number)} of {self.plan.name!r}: it is written, and "
                    "immutable unless rewrite=True is passed"
                )
            if self.store is None:
                if self.kind == "working":
                    self.open_working()
                else:
                    self.begin()
            self._sequences, self._touched = self.sequences, self.touched  # made here, once, and not by the writers
            self.plan.use(self)
            if self.store is None:
                self._refuse()
            return self.store

    def begin(self, *, announced: bool = False) -> None:
        """Make the working file: with what was published, if anything, or of zeros. The lock is held."""
        plan, work = self.plan, working_of(self.path)
        plan.whole = None
        if self.kind == "published":
            self._keep_as_before()
        if not announced:
            self._announce()
        make_folders(os.path.dirname(work), plan.path)
        unlink(work)  # which a creation was killed with
        clear_leftovers(self.path)
        old = None
        if self.kind == "published":
            self._published = old = self._published or self.read_published()
        begin = None
        if old is not None and old.written.any():
            begin = partial(copy_published, old, self.layout, self.sequences, plan.checksum, self._kept_checksums())
        store = make(
            work,
            self.total_nbytes,
            plan.options,
            sidecar.BLOCKS,
            plan.checksum,
            overwrite=False,
            reserve=plan.reserve,
            begin=begin,
            sequence=int(self.sequences.max()) + 2 if begin else 0,
        )
        store._quiet = True
        self.store, self._ledger, self._published = store, store._ledger, None
        self._touched = None if old is None else old.written.copy()
        self.kind = "working"

    def _keep_as_before(self) -> None:
        """Go on with the checksums of a finished file whose journal was kept."""
        name = sidecar.path_of(self.path)
        if self.plan.checksum is None and is_journal(name):
            self.plan.keep_journal = True
            kept: Any = read_header(open_journal(name, writable=False), name).checksum
            self.plan.checksum = kept

    def _kept_checksums(self) -> dict[tuple[int, int], int]:
        """Return the checksums in the journal of the published file, if it was kept, by start and bytes of blocks."""
        if not self.plan.keep_journal or self.plan.checksum is None or not is_journal(sidecar.path_of(self.path)):
            return {}
        file = _os.open_file(self.path, writable=False)
        found = sidecar.find(self.path, file, writable=False, adopt=True)
        if found is None or found.header.checksum != self.plan.checksum:
            return {}
        records = peek(found, 0)[["start", "nbytes", "checksum"]].tolist()
        return {(start, nbytes): checksum for start, nbytes, checksum in records}

    @property
    def is_complete(self) -> bool:
        """Whether every block is written."""
        self.find()
        return self._missing == 0 and (self._ledger is None or self._ledger.void_from > int(_NEVER))

    @property
    def is_published(self) -> bool:
        """Whether what is written of it is under its final name, and nothing else."""
        self.find()
        return self.kind != "working"

    def become_published(self) -> None:
        """Note that the working file, which is closed, has its final name. The lock is held."""
        self.kind, self._ledger, self._touched = "published", None, None
        self.escaped.clear()

    def flush(self) -> int:
        """Make what is written durable; return how many blocks that made so."""
        store = self.store
        try:
            return 0 if store is None or self.plan.mode == "r" else store.flush()
        except ClosedStoreError:
            if store is self.store:
                raise
            return 0  # it was published meanwhile, which flushed it

    # -- ending ---------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Close the file, if nobody is using it. It is opened again when it is needed."""
        if not self.lock.acquire(blocking=False):
            return
        try:
            store = self.store
            if store is not None:
                if self.handed or self.escaped or any(held() is not None for held in store._claims.copy().values()):
                    return
                self.store = None
                store.close()
            self._published = self.plan.whole = None
        finally:
            self.lock.release()
        with self.plan.lock:
            self.plan.opened.pop(self, None)

    def close(self) -> None:
        """Flush and close the file, and leave it where it is."""
        with self.lock:
            store, self.store, self._published, self.plan.whole = self.store, None, None, None
            if store is not None:
                store.close()

    def discard(self) -> None:
        """Remove a working file in which nothing is written."""
        with self.lock:
            self.find()
            if self.plan.metadata is None or self.kind != "working" or self.layout.count != self._missing:
                return
            if not os.path.lexists(self.path):  # or it lacks what is published, and is to be gone on with
                self.close()
                unlink(working_of(self.path))  # before its journal: a journal alone means nothing
                clear_leftovers(self.path)
                _os.sync_directory(os.path.dirname(self.path))
                self.kind, self._sequences, self._touched, self._ledger = "none", None, None, None
