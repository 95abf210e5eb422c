"""Ledger: what was written and stands, and how much of it is durable.

A log of fixed-size records in the order of the exits; the last record of a range wins. Each record draws a sequence
number, and one sync covers every number drawn before it began (group commit), so a flush costs the same for any
number of receipts. A sync that failed poisons the ledger for good: the kernel reports success the second time and
the data is gone. This module knows extents and a callable that syncs; nothing of files.
"""

import errno
import itertools
import struct
import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from blockstore.errors import PoisonedStoreError
from blockstore.receipts import Extent, WriteReceipt

RECEIPT = np.dtype([("start", "<u8"), ("stop", "<u8"), ("nbytes", "<u8"), ("tag", "<u8"), ("durable", "?")])
"""The dtype of `BlockStore.receipts`."""

_RECORD = np.dtype([("start", "<u8"), ("stop", "<u8"), ("nbytes", "<u8"), ("tag", "<u8"), ("sequence", "<u8")])
_pack = struct.Struct("<5Q").pack
_REVOKED = 0  # as `stop` of a record
_COMPACT_MIN = 10_000


class Ledger:
    """The receipts of one store. Recording takes no lock: each step is one atomic operation.

    Parameters
    ----------
    sync : callable
        Returns when the disk has all bytes, or raises `OSError`.
    """

    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._draw = itertools.count().__next__
        self._log: list[bytes] = []  # each item one record or more
        self._flushing = threading.Lock()
        self._flushed = 0  # items of the log that a flush has covered
        self._compacted = 0  # records that stood when the log was last compacted
        self._failure: OSError | None = None
        self.durable_below = 0
        """Records with a smaller sequence number are durable."""

    def record(self, extent: Extent) -> int:
        """Note that a writer of `extent` has just left, and return its sequence number. The caller holds the claim."""
        sequence = self._draw()
        self._log.append(_pack(extent._start, extent._stop, extent._nbytes, extent._tag, sequence))
        return sequence

    def revoke(self, extent: Extent) -> None:
        """Void what was recorded of `extent`. The caller holds its claim."""
        self._log.append(_pack(extent._start, _REVOKED, 0, 0, self._draw()))
        if len(self._log) > _COMPACT_MIN + 2 * self._compacted and not self._flushing.locked():
            with self._flushing:  # and not a plain acquire, after which Ctrl-C could leave it locked
                self._compact(len(self._log))

    def flush(self, wanted: Sequence[WriteReceipt] | None) -> int:
        """Make `wanted` durable, or all; return how many receipts became so. See `BlockStore.flush`."""
        with self._flushing:
            done = self._flushed == len(self._log) if wanted is None else all(receipt.durable for receipt in wanted)
            if done and self._failure is None:
                return 0
            items = len(self._log)
            below = self._draw()  # what is recorded from here on waits for the next sync
            self._sync_or_poison()
            self.durable_below = below
            covered = _replay(self._log[self._flushed : items])
            self._flushed = items
            if items > _COMPACT_MIN + 2 * self._compacted:
                self._compact(items)
            return len(covered)

    def sync(self) -> None:
        """Sync, whether or not a record waits for it."""
        with self._flushing:
            self._sync_or_poison()

    def as_array(self) -> NDArray[np.void]:
        """Return the receipts that stand, in order of `start`. See `BlockStore.receipts`."""
        below = self.durable_below
        records = _replay(self._log.copy())
        receipts = np.empty(records.shape, RECEIPT)
        for name in ("start", "stop", "nbytes", "tag"):
            receipts[name] = records[name]
        receipts["durable"] = records["sequence"] < below
        return receipts

    def _compact(self, items: int) -> None:
        """Replace the first items, which are at least those that were flushed, by what stands of them."""
        standing = _replay(self._log[:items])
        durable = standing["sequence"] < self.durable_below
        parts = [part.tobytes() for part in (standing[durable], standing[~durable])]
        self._log[:items] = filter(None, parts)
        self._flushed = int(bool(parts[0]))
        self._compacted = len(standing)

    def _sync_or_poison(self) -> None:
        if self._failure is not None:
            raise PoisonedStoreError(
                self._failure.errno or errno.EIO, f"an earlier sync failed ({self._failure}): reopen the store to go on"
            ) from self._failure
        try:
            self._sync()
        except OSError as error:
            self._failure = error
            raise PoisonedStoreError(
                error.errno or errno.EIO, f"the sync failed ({error}): what was not durable may be lost"
            ) from error


def _replay(log: list[bytes]) -> NDArray[np.void]:
    """Return the last record of each range that is not revoked, in order of `start`."""
    records = np.frombuffer(b"".join(log), _RECORD)
    order = np.argsort(records["start"], kind="stable")
    starts = records["start"][order]
    last = np.flatnonzero(np.append(starts[1:] != starts[:-1], True)) if len(starts) else order
    standing: NDArray[np.void] = records[order[last]]
    stands: NDArray[np.bool_] = standing["stop"] != _REVOKED
    return standing[stands]
