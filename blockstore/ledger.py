"""Ledger: which receipts stand, and which of them are durable.

Group commit: one sync covers every receipt that was recorded before it began. A sync that failed poisons the
ledger for good, since the kernel reports success the second time and the data is gone. This module knows
receipts and a callable that syncs; nothing of files.
"""

import errno
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockstore.errors import PoisonedStoreError
from blockstore.receipts import Extent, WriteReceipt

RECEIPT = np.dtype([("start", "<u8"), ("stop", "<u8"), ("nbytes", "<u8"), ("tag", "<u8"), ("durable", "?")])
"""The dtype of `BlockStore.receipts`."""

_new: Callable[[type[Any]], Any] = object.__new__


class Ledger:
    """The receipts of one store. Recording takes no lock: each step is one atomic operation.

    Parameters
    ----------
    sync : callable
        Returns when the disk has all bytes, or raises `OSError`.
    """

    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._standing: dict[int, WriteReceipt] = {}
        self._unflushed: deque[WriteReceipt] = deque()
        self._flushing = threading.Lock()
        self._failure: OSError | None = None

    def __len__(self) -> int:
        return len(self._standing)

    def issue(self, extent: Extent) -> WriteReceipt:
        """Make and keep the receipt of a writer that has just left. The caller holds the claim of its range."""
        receipt: WriteReceipt = _new(WriteReceipt)
        receipt._owner = extent._owner
        receipt._start = start = extent._start
        receipt._stop = extent._stop
        receipt._nbytes = extent._nbytes
        receipt._tag = extent._tag
        receipt._durable = receipt._revoked = False
        self._standing[start] = receipt
        self._unflushed.append(receipt)
        return receipt

    def revoke(self, receipt: WriteReceipt) -> None:
        """Void a receipt. The caller holds the claim of its range."""
        receipt._revoked = True
        self._standing.pop(receipt._start, None)

    def flush(self, wanted: Sequence[WriteReceipt] | None) -> int:
        """Make `wanted` durable, or all; return how many receipts became so. See `BlockStore.flush`."""
        with self._flushing:
            nothing = not self._unflushed if wanted is None else all(receipt._durable for receipt in wanted)
            if nothing and self._failure is None:
                return 0
            count = len(self._unflushed)  # what is recorded from here on waits for the next sync
            self._sync_or_poison()
            for _ in range(count):
                self._unflushed.popleft()._durable = True
            return count

    def sync(self) -> None:
        """Sync, whether or not a receipt waits for it."""
        with self._flushing:
            self._sync_or_poison()

    def as_array(self) -> NDArray[np.void]:
        """Return the receipts that stand, in order of `start`. See `BlockStore.receipts`."""
        standing = sorted(self._standing.copy().values(), key=lambda receipt: receipt._start)
        return np.array([(r._start, r._stop, r._nbytes, r._tag, r._durable) for r in standing], RECEIPT)

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
