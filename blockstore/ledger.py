"""Ledger: what was written and stands, and how much of it is durable. The protocol over a journal.

Each exit draws a sequence number and appends a record, at no system call. A flush makes durable, in this order and
whatever their number, all receipts drawn before it began: sync the data, append one record that says so, sync the
journal; only then are they called durable. A rewrite appends its revocation first, and waits for the disk to have it
if what it revokes is on the disk, or may come to be. A sync or a journal write that failed poisons the ledger for good:
the kernel reports success the second time and the data is gone. Why each step is there is in docs/durability.md.

This module knows extents, records and a callable that syncs the data; nothing of files.
"""

import contextlib
import errno
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from blockstore.errors import ClosedStoreError, JournalSpaceError, PoisonedStoreError
from blockstore.journal import Header, Journal
from blockstore.receipts import Extent, WriteReceipt
from blockstore.records import DURABLE, RECEIPT, REVOKED, VOID, WRITTEN, Standing, receipts_of, standing

_COMPACT_MIN = 10_000
_NEVER = 1 << 64

Replace = Callable[[Header, int, int], AbstractContextManager[tuple[Journal, Callable[[], None], Callable[[], bool]]]]
"""Makes an empty journal, a function that puts it in the place of the old one, and one that tells whether it is there.

Takes the header, boot and mount, and a number of records to have space for. Raises `JournalSpaceError` if it cannot be
made, and leaves nothing behind unless the function was called."""


_Swap = tuple[Journal, Journal, int, Callable[[], bool]]


class Ledger:
    """The receipts of one store.

    Parameters
    ----------
    journal : Journal or None
        Where records go; None for a store that has none, and hands out nothing.
    sync_data : callable
        Returns when the disk has all bytes of the store, or raises `OSError`.
    replace : callable
        See `Replace`.
    sequence : int
        The next sequence number: above all in the journal.
    lasting : bool
        Whether a sync means anything on this file system. If not, nothing is ever called durable.
    """

    def __init__(
        self,
        journal: Journal | None,
        sync_data: Callable[[], None],
        replace: Replace,
        *,
        sequence: int = 0,
        lasting: bool = True,
        known: NDArray[np.void] | None = None,
    ) -> None:
        self._journal = journal
        self._sync_data = sync_data
        self._replace = replace
        self._lasting = lasting
        self._known = np.empty(0, RECEIPT) if known is None else known
        self._known_sequences = np.arange(len(self._known), dtype=np.uint64)
        self._swap: _Swap | None = None
        # Reentrant only so that a signal handler that comes in between can be told: nothing here is reentrant.
        self._appending: Any = threading.RLock()  # held for an append, never for a system call that waits
        self._syncing: Any = threading.RLock()  # held for a sync of the journal
        self._flushing: Any = threading.RLock()  # held for a flush; taken before the other two
        self._in_flush = False
        self._next = sequence
        self._failure: OSError | None = None
        self._closed = False
        if journal is not None:
            journal.keep()
        self._flushed = 0 if journal is None else journal.count  # records that a flush has covered
        self._synced = self._flushed  # records that the disk has
        self._compacted = self._flushed  # records when the journal was last compacted
        self._promised = sequence  # receipts below are durable on the disk, or may become so
        self._revoked_at = 0  # records up to the last revocation
        self.durable_below = sequence if lasting else 0
        """Receipts with a smaller sequence number are durable."""
        self.void_from = _NEVER
        """Receipts with this sequence number or a larger one are void: a sync failed."""

    # -- what writers do ------------------------------------------------------------------------------

    def record(self, extent: Extent, checksum: int = 0) -> int:
        """Note that a writer of `extent` has just left; give the extent its sequence number, and return it.

        The caller holds the claim. Raises `OSError`, with nothing noted, if there is no space for the record.
        """
        if self._appending._is_owned():
            self._reentered()
        with self._appending:
            if (journal := self._journal) is None:
                journal = self._settled()
            if journal is None or self._failure is not None:
                self._refuse()
            sequence = self._next
            self._next = sequence + 1
            try:
                journal.append(WRITTEN, sequence, extent._start, extent._stop, extent._nbytes, extent._tag, checksum)
                extent._sequence = sequence
            except BaseException:  # Ctrl-C: the record may be there, but there will be no receipt
                if journal.ends_with(sequence) and extent._sequence != sequence:
                    journal.append(REVOKED, sequence, extent._start, extent._stop)
                raise
        return sequence

    def revoke(self, extent: Extent) -> None:
        """Void what was recorded of `extent`, on the disk too, before a byte changes. The caller holds its claim."""
        if self._appending._is_owned() or self._syncing._is_owned():
            self._reentered()
        with self._appending:
            journal, revoked = self._settled(), extent._sequence
            if journal is None or revoked is None or self._failure is not None or self._closed:
                self._refuse()
            sequence = self._next
            self._next = sequence + 1
            promised = revoked < self._promised
            try:
                journal.append(REVOKED, sequence, extent._start, extent._stop)
                extent._sequence = None
                self._revoked_at = count = journal.count
            except BaseException:  # Ctrl-C: the record may be there
                if journal.ends_with(sequence):
                    extent._sequence = None
                    self._revoked_at = journal.count
                raise
        if promised:
            self._sync_journal(count)
        if count > _COMPACT_MIN + 2 * self._compacted and not self._in_flush:
            with self._flushing:  # and not a plain acquire, after which Ctrl-C could leave it locked
                self._compact()

    # -- what makes it last ---------------------------------------------------------------------------

    def flush(self, wanted: Sequence[WriteReceipt] | None, *, last: bool = False) -> int:
        """Make `wanted` durable, or all; return how many receipts became so. See `BlockStore.flush`.

        The `last` one of a store counts nothing, and leaves the journal as long as it is.
        """
        self.check_reentry()
        with self._flushing:
            self.check()
            self._in_flush = True
            try:
                return self._flush(wanted, last)
            finally:
                self._in_flush = False

    def _flush(self, wanted: Sequence[WriteReceipt] | None, last: bool) -> int:
        with self._appending:
            journal = self._settled()
            if self._closed:
                self._refuse()
            if journal is None:
                return 0
            count, below = journal.count, self._next
            if count == self._flushed or (wanted is not None and all(receipt.durable for receipt in wanted)):
                return 0
            self._next = below + 1
            self._promised = below
            revoked_at = self._revoked_at
        self._or_poison(self._sync_data)
        if not self._lasting:
            return 0
        self._sync_journal(revoked_at)
        self._say_durable(journal, below)
        self._sync_journal(journal.count)
        self.durable_below = below
        if last:
            return 0
        news = journal.records(self._flushed)
        covered = news["sequence"][standing(news, journal.epoch).where] < below
        self._flushed = count + 1 if journal.count == count + 1 else count
        if count > _COMPACT_MIN + 2 * self._compacted:
            self._compact()
        return int(np.count_nonzero(covered))

    def sync(self) -> None:
        """Sync the data, whether or not a record waits for it."""
        self.check_reentry()
        with self._flushing:
            if self._failure is not None:
                self._refuse()
            self._or_poison(self._sync_data)

    def close(self) -> None:
        """Record nothing any more, remember what stands, and let go of the journal, when nobody waits for it."""
        with self._flushing, self._syncing, self._appending:
            self._closed = True
            journal = self._settled()
            if journal is not None:
                try:
                    if not sys.is_finalizing():  # NumPy may want to import something
                        self._known, self._known_sequences = self.as_arrays()
                finally:
                    self._journal = None
                    journal.close(trim=self._failure is None)

    def abandon(self) -> None:
        """In a forked child: let go of the journal, which is the parent's. No lock may be taken."""
        self._closed = True
        if self._journal is not None:
            self._journal.abandon()

    # -- what it knows --------------------------------------------------------------------------------

    @property
    def is_blank(self) -> bool:
        """Whether there is no journal, and never was."""
        return self._journal is None and self._swap is None and not self._closed

    def as_array(self) -> NDArray[np.void]:
        """Return the receipts that stand, in order of `start`. See `BlockStore.receipts`."""
        return self.as_arrays()[0]

    def as_arrays(self) -> tuple[NDArray[np.void], NDArray[np.uint64]]:
        """Return the receipts that stand, and their sequence numbers."""
        if (journal := self._journal) is None and self._swap is not None:
            with self._appending:
                journal = self._settled()
        if journal is None:
            return self._known.copy(), self._known_sequences
        below = self.durable_below
        records = journal.records()
        found = standing(records, journal.epoch)
        sequences = records["sequence"][found.where]
        stands = sequences < min(self.void_from, _NEVER - 1)
        sequences = sequences[stands]
        return receipts_of(records, Standing(found.where[stands], sequences < below, 0)), sequences

    # -- steps ----------------------------------------------------------------------------------------

    def _say_durable(self, journal: Journal, below: int) -> None:
        """Append the record that makes all that was drawn before `below` durable."""
        with self._appending:
            journal.append(DURABLE, below, self.durable_below, below)

    def _sync_journal(self, count: int) -> None:
        """Return when the disk has the first `count` records; one sync serves all who wait."""
        with self._syncing:
            if self._failure is not None:
                self._refuse()
            with self._appending:
                journal = self._settled()
            if journal is None:
                self._refuse()
            if self._synced < count:
                appended = journal.count
                self._or_poison(journal.sync)
                self._synced = appended

    def _compact(self) -> None:
        """Put a new journal in place, of what stands. `_flushing` is held: nothing becomes durable meanwhile.

        Other threads go on until the new one is on the disk, but for what they add to the old one.
        """
        with self._appending:
            old, below = self._settled(), self.durable_below
        if old is None or self._failure is not None or self._closed:
            return
        count = old.count
        self._compacted = count  # if it fails for want of space, try again when there are as many again
        stands = old.records(0, count)
        stands = stands[np.sort(standing(stands, old.epoch).where)]
        durable = stands["sequence"] < below

        def swap() -> None:
            with self._replace(old.header, old.epoch, len(stands) + _COMPACT_MIN) as (new, publish, is_in_place):
                new.extend(stands[durable])
                if self._lasting:
                    new.append(DURABLE, below, 0, below)
                flushed = new.count
                new.extend(stands[~durable])
                new.sync()
                with self._syncing, self._appending:
                    if old.count > count:
                        new.extend(old.records(count))
                        new.sync()
                    new.keep()
                    self._swap = (old, new, flushed, is_in_place)
                    self._journal = None  # whatever is raised from here on, `_settled` finds out which one it is
                    try:
                        publish()
                    finally:
                        self._settled()
            self._compacted = len(stands)

        with contextlib.suppress(JournalSpaceError):
            self._or_poison(swap)

    def _settled(self) -> Journal | None:
        """Return the journal; if one was being put in the place of the other, the one that is there. Under the lock."""
        if self._swap is not None:
            old, new, flushed, is_in_place = self._swap
            count = new.count
            if is_in_place():
                self._flushed, self._synced, self._revoked_at = flushed, count, 0
                self._journal, other = new, old
            else:
                self._journal, other = old, new
            self._swap = None  # no call since it is known: Ctrl-C comes before all of it or behind
            other.close(trim=False)
        return self._journal

    def _or_poison(self, call: Callable[[], None]) -> None:
        """Call what syncs or writes the journal; an error of that is the last one."""
        try:
            call()
        except JournalSpaceError:
            raise
        except OSError as error:
            with self._appending:
                if self._failure is None:
                    self._failure = error
                    self.void_from = self.durable_below
                    if (journal := self._settled()) is not None:
                        with contextlib.suppress(OSError):
                            journal.append_last(VOID, self._next, self.durable_below, self._next)
            raise PoisonedStoreError(
                error.errno or errno.EIO, f"the sync failed ({error}): what was not durable may be lost"
            ) from error

    def check_reentry(self) -> None:
        """Raise `RuntimeError` in a signal handler that has interrupted this very thread in the midst of a step."""
        if self._appending._is_owned() or self._syncing._is_owned() or self._flushing._is_owned():
            self._reentered()

    def _reentered(self) -> NoReturn:
        raise RuntimeError(
            "the store was called from a signal handler that interrupted a flush or an exit of the same thread: "
            "let the handler raise, or set a flag"
        )

    def check(self) -> None:
        """Raise `PoisonedStoreError` if a sync has failed."""
        if self._failure is not None:
            self._refuse()

    def _refuse(self) -> NoReturn:
        if self._failure is not None:
            raise PoisonedStoreError(
                self._failure.errno or errno.EIO, f"an earlier sync failed ({self._failure}): reopen the store to go on"
            ) from self._failure
        raise ClosedStoreError("the store was closed before the record was made")
