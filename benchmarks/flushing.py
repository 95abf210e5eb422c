"""Flushing: what durable costs."""

import os
from collections.abc import Callable

import blockstore as bs
from benchmarks import disk, roads
from benchmarks.base import KIB, OnDisk


class Flush(OnDisk):
    """What does it cost to make receipts durable?

    Ranges of 4 KiB that were just written. The floor is one ``os.fdatasync`` on the same file, filled the same way.
    """

    params = (["flush(receipts)", "floor: os.fdatasync"], [1, 100, 10_000])
    param_names = ("way", "count (receipts)")

    def setup(self, way: str, count: int) -> None:
        self.store: bs.BlockStore | None = None
        source = roads.source_block(4 * KIB)
        disk.touch_memory(count * 8 * KIB)
        path = self.make_folder() / "store"
        self.store = store = bs.create(path, count * 4 * KIB)
        receipts = [r.write(source) for r in store.ranges(4 * KIB)]
        self.fd = os.open(path, os.O_RDWR)
        fd = self.fd
        self.flush: Callable[[], object] = lambda: store.flush(receipts)
        if way != "flush(receipts)":
            self.flush = lambda: os.fdatasync(fd)

    def teardown(self, *params: object) -> None:
        if self.store is not None:
            self.store.close()
            os.close(self.fd)
        super().teardown()

    def time_flush(self, way: str, count: int) -> None:
        self.flush()
