"""Resume: read the journal of a file that is opened, and leave it in one lasting state.

What is durable stands. What was only written stands if it was written in this boot and on this mount, and is made
durable first; otherwise it is dropped for good. After that every receipt is durable. This module decides what records
mean for the next session; nothing of ranges and allocators.
"""

import errno
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blockstore import _cache, _os, sidecar
from blockstore.alignment import ALIGNMENT
from blockstore.errors import JournalDamageWarning, JournalMismatchError, JournalSpaceError, PoisonedStoreError
from blockstore.journal import Content, Journal, read_records
from blockstore.records import DURABLE, REVOKED, VOID, WRITTEN, Standing, holes, receipts_of, standing


class Resumed(NamedTuple):
    """A journal in a lasting state."""

    journal: Journal
    receipts: NDArray[np.void]
    """As `BlockStore.receipts`."""
    sequence: int
    """The next sequence number."""


def look(found: sidecar.Found, epoch: int) -> tuple[Content, Standing, NDArray[np.void]]:
    """Read a journal and return what stands, its receipts among it, without changing anything. Warns of damage.

    Raises `JournalMismatchError` if what stands cannot be: ranges that overlap or leave the file.
    """
    content = read_records(found.file, found.header)
    which = standing(content.records, epoch)
    receipts = receipts_of(content.records, which)
    starts, stops = receipts["start"], receipts["stop"]
    if not (
        np.all(starts < stops)
        and np.all(stops[:-1] <= starts[1:])
        and np.all(stops <= found.header.nbytes)
        and np.all(receipts["nbytes"] <= stops - starts)
        and (found.header.allocator == sidecar.BLOCKS or not np.any(starts % np.uint64(ALIGNMENT)))
    ):
        raise JournalMismatchError(
            f"the journal {found.path!r} contradicts itself: its receipts overlap, or leave the file of "
            f"{found.header.nbytes} bytes; discard=True makes the whole file free"
        )
    if content.is_cut:
        warnings.warn(
            f"the journal {found.path!r} is cut off at its end: ranges that were written may be missing",
            JournalDamageWarning,
            stacklevel=4,
        )
    if lost := _lost(content, epoch):
        warnings.warn(
            f"{lost} of {content.count} records of the journal {found.path!r} are damaged. What they said is lost: "
            "ranges that were written may be missing, and one that was being rewritten may look written",
            JournalDamageWarning,
            stacklevel=4,
        )
    return content, which, receipts


def peek(found: sidecar.Found, epoch: int) -> NDArray[np.void]:
    """Return the receipts that stand, as `BlockStore.receipts`, without changing anything."""
    receipts = look(found, epoch)[2]
    try:
        _os.sync_file(found.file)  # what a killed process said may not be on the disk yet
    except OSError:
        receipts["durable"] = False
    return receipts


def settle(path: str, file: _os.File, found: sidecar.Found, epoch: int, *, lasting: bool) -> Resumed:
    """Make durable what stands and forget the rest. Syncs the data once, if something was only written.

    `file` is not mapped by the caller. After a sync that had failed, what is not written is made fit to be so again.

    Raises
    ------
    PoisonedStoreError
        If a sync fails. Then what was only written is void, and opening again has only what was durable.
    OSError
        If a new journal is needed and there is no space for it; nothing is lost.
    """
    content, which, receipts = look(found, epoch)
    records = content.records
    below = int(records["sequence"].max()) + 1 if len(records) else 0
    fresh = records["sequence"][which.where[~which.durable]]
    low = int(fresh.min()) if len(fresh) else below
    identity = _os.identity(file)
    _, inode, generation, _ = identity
    header = replace(found.header, inode=inode, generation=generation)
    journal = Journal(found.file, found.header, content.count, epoch)
    try:
        if failed := bool(np.any(records["kind"] == VOID)):
            for start, stop, _ in holes(receipts, found.header.nbytes).tolist():
                _cache.renew(file, start, stop)
        if failed or len(fresh):
            _synced(partial(_os.sync_file, file), journal, low, below)
        if header != found.header or len(content.damaged) or _is_worth_rewriting(records, which):
            with sidecar.replacing(path, identity, header, epoch, len(which.where)) as (new, publish, _):
                stands = records[np.sort(which.where)]
                if lasting:
                    new.extend(stands)
                    new.append(DURABLE, below, 0, below)
                else:  # nothing vouches for them but the boot and mount of now
                    for fields in stands[["sequence", "start", "stop", "nbytes", "tag", "checksum"]].tolist():
                        new.append(WRITTEN, *fields)
                _synced(new.sync, journal, low, below)
                try:
                    publish()
                except OSError:  # it may be in place, but not for good: the next to open writes it anew
                    new.append_last(VOID, below + 1, below, below)
                    raise
            journal.close(trim=False)
            journal = new
        else:
            if lasting:
                journal.append(DURABLE, below, low, below)
            _synced(journal.sync, journal, low, below)
    except BaseException as error:
        journal.close(trim=False)
        if isinstance(error, JournalSpaceError) and error.errno != errno.ENOSPC:  # a folder that is not to be written
            raise OSError(error.errno, error.strerror, error.filename) from error
        raise
    receipts["durable"] = lasting
    return Resumed(journal, receipts, below + 1)


def _synced(sync: Callable[[], None], journal: Journal, low: int, below: int) -> None:
    """Sync; if that fails, void what was only written, for those who open the journal next."""
    try:
        sync()
    except OSError as error:
        journal.append_last(VOID, below + 1, low, below)
        raise PoisonedStoreError(
            error.errno, f"the sync failed ({error}): what was written and not durable may be lost"
        ) from error


def _is_worth_rewriting(records: NDArray[np.void], which: Standing) -> bool:
    """Whether a journal holds more than what stands: what is revoked or dropped, or the mark of a failed sync.

    None of that may stay: the boundaries of ranges can change from here on, and a number that was dropped must not be
    covered by a later DURABLE.
    """
    kinds = records["kind"]
    return bool(
        which.dropped or np.any((kinds == REVOKED) | (kinds == VOID)) or len(kinds) > 1000 + 3 * len(which.where)
    )


def _lost(content: Content, epoch: int) -> int:
    """Return how many records are damaged that the disk had: not those that a power loss tore.

    Without a power loss none is torn but the last. With one those may be that came after the last completed sync;
    what lies before the last DURABLE record but one was synced before the last one was made.
    """
    if not len(content.damaged):
        return 0
    if content.records["epoch"][-1] == epoch:
        return len(content.damaged)
    barriers = content.index[content.records["kind"] == DURABLE]
    return int(np.count_nonzero(content.damaged < barriers[-2])) if len(barriers) > 1 else 0
