"""Shard: one file of an array, from the hidden working file in which it is filled to the published one.

A published file never changes: one that is to be written again is first copied into a new working file, and replaced
whole when that is published. So whoever reads it, by whatever means, sees what was final when it was opened. The
working file is a `BlockStore`, whose journal says which blocks are written; of a published file its own index does, or,
of an ``.npy`` file, its being there. Offsets are bytes in the file; blocks are numbered as `ShardLayout` does.
"""

import errno
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

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
from blockstore.journal import is_journal
from blockstore.layouts.grid import Index
from blockstore.layouts.shard_index import ShardIndex
from blockstore.opening import make, reopen
from blockstore.plan import Plan
from blockstore.published import Published, read_npy, read_shard
from blockstore.states import BlockStates
from blockstore.store import BlockStore
from blockstore.views import Loan
from blockstore.working import (
    clear_leftovers,
    copy_published,
    kept_checksum,
    make_folders,
    mark,
    tidy,
    unlink,
)


class Shard(BlockStates):
    """One file of an array. Safe to share among threads.

    Attributes
    ----------
    lock : RLock
        Held while the file changes from one kind to another, and for a moment to begin a write.
    store : BlockStore or None
        The working file, if it is open.
    escaped : dict of int to Loan
        What was lent of a block and is still held by somebody.
    handed : dict
        Tokens of ranges that were handed out, and have not begun to write.
    """

    def __init__(self, plan: Plan, index: Index, path: str, announce: Callable[[], None]) -> None:
        super().__init__(plan, index)
        self._announce = announce  # says that the array is being written, before a working file is made
        self.path = path
        self.lock: Any = threading.RLock()
        self.store: BlockStore | None = None
        self.escaped: dict[int, Loan] = {}
        self.handed: dict[int, None] = {}
        self._leaving: BlockStore | None = None  # a working file that is being closed for good
        self._published: Published | None = None

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

    @property
    def is_open(self) -> bool:
        """Whether it has a file open."""
        return self.store is not None or self._published is not None or self._leaving is not None

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
            self._leave()
            work = working_of(self.path) if self.plan.is_begun else ""
            for _ in range(3):  # somebody else may be publishing it right now
                try:
                    if work and os.path.lexists(work) and not self._is_linked(work):
                        self.open_working()
                        if self.plan.mode == "r+" or self.lacking() is None:
                            return
                        self._step_back()
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
            self.plan.check_same()
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
        published = read_shard(self.path, self.layout, metadata, self.plan.grid.per_shard)
        self.plan.check_same()
        return published

    def lacking(self) -> int | None:
        """Return the number of a block that is published of this array, but not written now, if there is one."""
        written = self.written()
        if written.all() or not os.path.lexists(self.path):
            return None
        if self.plan.metadata is None and not self.plan.rewrites:
            return None
        lacking = np.flatnonzero(self.read_published().written & ~written)
        return int(lacking[0]) if len(lacking) else None

    def _step_back(self) -> None:
        """Leave a working file from which something published is missing: who only reads sees what is published."""
        store, self.store = self.store, None
        self._sequences = self._touched = self._ledger = None
        if store is not None:
            store.close()

    def _believe(self, published: Published) -> None:
        """Take over what a published file says is written."""
        if self._sequences is None or not np.array_equal(self._sequences >= 0, published.written):
            self._sequences = np.where(published.written, np.arange(self.layout.count), -1)
        self._missing = int(np.count_nonzero(~published.written))
        self.kind, self._ledger = "published", None

    def open_working(self) -> None:
        """Open the working file that is there, and believe its journal. The lock is held."""
        work, layout = working_of(self.path), self.layout
        self.plan.check_same()
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
        plan, work, was_published = self.plan, working_of(self.path), self.kind == "published"
        plan.whole = None
        if was_published:
            plan.checksum = plan.checksum or kept_checksum(self.path)
            plan.keep_journal = plan.keep_journal or is_journal(sidecar.path_of(self.path))
        self.kind = "unknown"  # before it is announced, and until it is there: whatever comes in between, the disk says
        if not announced:
            self._announce()
        make_folders(os.path.dirname(work), plan.path)
        unlink(work)  # which a creation was killed with
        clear_leftovers(self.path)
        old = None
        if was_published:
            self._published = old = self._published or self.read_published()
            if plan.metadata is None:
                mark(self.path)
        begin = None
        if old is not None and old.written.any():
            begin = partial(copy_published, old, self.layout, self.sequences, plan.checksum, self.path)
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
        self._ledger, self._published = store._ledger, None
        self._touched = None if old is None else old.written.copy()
        self.kind, self.store = "working", store

    @property
    def is_published(self) -> bool:
        """Whether what is written of it is under its final name, and nothing else."""
        self.find()
        return self.kind != "working"

    def leave_working(self) -> None:
        """Close the working file for good, and cut off what is lent of it. The lock is held.

        From the first step on the disk says what there is of the shard; `become_published` saves looking.
        """
        self._leaving, self.kind, self.store = self.store, "unknown", None
        self._leave()

    def _leave(self) -> None:
        if (store := self._leaving) is not None:
            try:
                store._mapped.cut_off()
            finally:
                store.close()
                self.escaped.clear()
                self._leaving = None

    def become_published(self) -> None:
        """Note that the working file, which is closed, has its final name. The lock is held."""
        self._ledger = self._touched = None
        self.kind = "published"

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
            self._leave()
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
