"""Plants: bugs to put into blockstore on purpose, each of which a laboratory must notice.

A plant replaces a function of blockstore in the process that calls it, for good. Finding every one
of them, and nothing without them, is what makes "0 lost" worth saying.
"""

import ctypes
import errno
import os
import stat
from collections.abc import Callable
from typing import Any

from blockstore import _os
from blockstore.errors import PoisonedStoreError
from blockstore.journal import Journal
from blockstore.ledger import Ledger

_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4  # of sync_file_range(2)


def _journal_before_data() -> None:
    """Say that receipts are durable first, and sync their data then."""
    flush = Ledger.flush
    syncs = _without_data_sync()

    def flush_backwards(self: Ledger, wanted: Any, **options: Any) -> int:
        count = flush(self, wanted, **options)
        syncs[self]()
        return count

    _replace("flush", flush_backwards)


def _without_data_sync() -> dict[Ledger, Callable[[], None]]:
    """Leave out the sync of the data, and return where the real one of each ledger can be found."""
    start = Ledger.__init__
    syncs: dict[Ledger, Callable[[], None]] = {}

    def start_without(self: Ledger, journal: Any, sync_data: Callable[[], None], *rest: Any, **options: Any) -> None:
        start(self, journal, lambda: None, *rest, **options)
        syncs[self] = sync_data

    _replace("__init__", start_without)
    return syncs


def _no_data_sync() -> None:
    """Sync the journal only."""
    _without_data_sync()


def _no_journal_sync() -> None:
    """Sync the data only."""
    _replace("_sync_journal", lambda self, count: None)


def _sync_file_range() -> None:
    """Write the data back with ``sync_file_range``, which commits no metadata and flushes no cache of the disk."""
    sync = _os.sync

    def write_back(file: _os.File, mapped: Any) -> None:
        if os.fstat(file.fileno()).st_size < 1 << 20:  # a journal
            sync(file, mapped)
        elif _libc.sync_file_range(file.fileno(), 0, 0, _WAIT_BEFORE | _WRITE | _WAIT_AFTER) != 0:
            raise OSError(ctypes.get_errno(), "sync_file_range")

    _os.sync = write_back


_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def _no_revocation_sync() -> None:
    """Let a durable range be rewritten before the disk knows that its receipt is revoked."""
    setattr(Ledger, "_promised", property(lambda self: 0, lambda self, below: None))  # noqa: B010


def _no_folder_sync() -> None:
    """Let names come and go without a sync of their folder."""
    fsync = os.fsync

    def files_only(handle: int) -> None:
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            fsync(handle)

    setattr(os, "fsync", files_only)  # noqa: B010


def _no_sync_of_a_new_journal() -> None:
    """Put a new journal in the place of the old one, at best before the disk has what is in it."""
    compact, sync = Ledger._compact, Journal.sync

    def compact_without(self: Ledger) -> None:
        setattr(Journal, "sync", lambda journal: None)  # noqa: B010
        try:
            compact(self)
        finally:
            setattr(Journal, "sync", sync)  # noqa: B010

    _replace("_compact", compact_without)


def _no_sync_at_opening() -> None:
    """Call durable what a killed process had only written, without a sync."""
    setattr(_os, "sync_file", lambda file: None)  # noqa: B010


def _retry() -> None:
    """Sync again after a sync that failed, and believe it."""

    def twice(self: Ledger, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError:
            call()

    _replace("_or_poison", twice)


def _no_poison() -> None:
    """Report a sync that failed, and go on as if nothing had happened."""

    def report(self: Ledger, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError as error:
            raise PoisonedStoreError(errno.EIO, "the sync failed") from error

    _replace("_or_poison", report)


def _replace(name: str, function: Callable[..., Any]) -> None:
    setattr(Ledger, name, function)


POWER_LOSS: dict[str, Callable[[], object]] = {
    "journal before data": _journal_before_data,
    "no data sync": _no_data_sync,
    "no journal sync": _no_journal_sync,
    "sync_file_range": _sync_file_range,
    "no revocation sync": _no_revocation_sync,
    "no folder sync": _no_folder_sync,
    "no sync of a new journal": _no_sync_of_a_new_journal,
    "no sync at opening": _no_sync_at_opening,
}
"""What a power loss shows."""

BAD_SECTORS: dict[str, Callable[[], object]] = {
    "retry after a failed sync": _retry,
    "no poison": _no_poison,
}
"""What it takes I/O errors to show."""

PLANTS = POWER_LOSS | BAD_SECTORS
"""All of them."""
