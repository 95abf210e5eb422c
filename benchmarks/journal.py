"""Journal: what it costs to keep receipts, and to read them back."""

import gc
import itertools
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import blockstore as bs
from benchmarks import roads
from benchmarks.base import KIB, MIB, OnDisk
from blockstore.receipts import Extent
from blockstore.records import RECORD, WRITTEN, Draft, own, receipts_of, standing, valid


class InMemory:
    """A ledger that keeps its records in a list: what the journal is measured against. It forgets with the process."""

    durable_below = 0
    void_from = 1 << 64

    def __init__(self) -> None:
        self._draw = itertools.count().__next__
        self._pack = struct.Struct("<5Q").pack
        self._log: list[bytes] = []

    def record(self, extent: Extent, checksum: int = 0) -> int:
        sequence = self._draw()
        self._log.append(self._pack(extent._start, extent._stop, extent._nbytes, extent._tag, sequence))
        extent._sequence = sequence
        return sequence


@contextmanager
def store_with(folder: Path, nbytes: int, *, journal: bool) -> Iterator[bs.BlockStore]:
    """Create a dense store whose writers leave their receipts in a journal, or in memory."""
    with bs.create(folder / "store", nbytes, access="dense", overwrite=True) as store:
        kept = store._ledger
        if not journal:
            store._ledger = InMemory()  # type: ignore[assignment]
        try:
            yield store
        finally:
            store._ledger = kept


def fill(number: int, folder: Path, nbytes: int, *, journal: bool, copy: bool) -> float:
    """Return the seconds that filling a file in ranges of 64 KiB takes, through views or by `write`."""
    source = roads.source_block(64 * KIB)
    with store_with(folder, nbytes, journal=journal) as store:
        start = time.perf_counter()
        for r in store.ranges(64 * KIB):
            if copy:
                r.write(source)
            else:
                with r.writer() as a:
                    a[:] = source
        return time.perf_counter() - start


def cycle(number: int, folder: Path, count: int, *, journal: bool) -> float:
    """Return the seconds that an empty cycle takes: allocate, writer, receipt."""
    with store_with(folder, count * 4 * KIB, journal=journal) as store:
        allocate = store.allocate
        gc.disable()
        try:
            start = time.perf_counter()
            for _ in range(count):
                r = allocate(4096)
                with r.writer():
                    pass
                r.receipt  # noqa: B018
            return (time.perf_counter() - start) / count
        finally:
            gc.enable()


_UUID = bytes(range(16))


def million(folder: Path, count: int) -> Path:
    """Write the records of a journal with `count` receipts, in the order of their ranges; return the file."""
    pack = Draft(_UUID, 1).pack
    path = folder / "records"
    path.write_bytes(b"".join(pack(WRITTEN, i, i << 12, (i + 1) << 12, 4096, i, 0) for i in range(count)))
    return path


def replay(number: int, path: Path) -> float:
    """Return the seconds that reading and believing all records takes."""
    start = time.perf_counter()
    records = np.fromfile(path, np.uint8).view(RECORD)
    if not (valid(records) & own(records, _UUID)).all():
        raise ValueError("a record is damaged")
    receipts_of(records, standing(records, 1))
    return time.perf_counter() - start


def read(number: int, path: Path) -> float:
    """Return the seconds that reading the same bytes takes."""
    start = time.perf_counter()
    np.fromfile(path, np.uint8)
    return time.perf_counter() - start


class Journal(OnDisk):
    """What does the journal cost? Floors: the same with receipts in memory, and reading the bytes of the records."""

    def setup(self) -> None:
        self.make_folder()

    def _time(self, call: Callable[..., float], **arguments: Any) -> None:
        if self.folder is not None:
            call(0, self.folder, **arguments)

    def time_fill_64k(self) -> None:
        self._time(fill, nbytes=128 * MIB, journal=True, copy=False)

    def time_fill_64k_floor_in_memory(self) -> None:
        self._time(fill, nbytes=128 * MIB, journal=False, copy=False)

    def time_cycle_10000(self) -> None:
        self._time(cycle, count=10_000, journal=True)

    def time_cycle_10000_floor_in_memory(self) -> None:
        self._time(cycle, count=10_000, journal=False)


class Replay(OnDisk):
    """How long does it take to believe a million records? The floor is reading their bytes."""

    def setup(self) -> None:
        self.path = million(self.make_folder(), 1_000_000)

    def time_replay(self) -> None:
        replay(0, self.path)

    def time_floor_fromfile(self) -> None:
        read(0, self.path)
