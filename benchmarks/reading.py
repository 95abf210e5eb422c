"""Reading: what zero-copy costs."""

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import blockstore as bs
from benchmarks import disk, roads
from benchmarks.base import KIB, MIB, OnDisk

WORD = np.dtype(np.uint64)


class Read(OnDisk):
    """What does `read` cost, alone and with a sum over every byte?

    A file of 48 MiB that is in the page cache, mapped anew. The floors are a slice of `numpy.memmap`, and
    `numpy.frombuffer` over a map.
    """

    params = (["read()", "floor: np.memmap slice", "floor: np.frombuffer"], [64, 12 * 1024])
    param_names = ("way", "each (KiB)")

    nbytes = 48 * MIB

    def setup(self, way: str, each: int) -> None:
        disk.touch_memory(2 * self.nbytes)
        path = self.make_folder() / "file"
        self.store = bs.create(path, self.nbytes)
        source = roads.source_block(each * KIB).view(WORD)
        ranges = [self.store.allocate(shape=source.shape, dtype=WORD) for _ in range(self.nbytes // (each * KIB))]
        for r in ranges:
            r.write(source)
        offsets, count = [r.start for r in ranges], len(source)
        self.handles: list[Any] = offsets
        self.read: Callable[[Any], NDArray[Any]]
        if way == "read()":
            self.handles, self.read = ranges, bs.AllocatedRange.read
        elif way == "floor: np.memmap slice":
            words = np.memmap(path, WORD, "r")
            self.read = lambda offset: words[offset // 8 : offset // 8 + count]
        else:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.read = lambda offset: np.frombuffer(mapped, WORD, count, offset)

    def teardown(self, *params: object) -> None:
        del self.read
        self.store.close()
        super().teardown()

    def time_read(self, way: str, each: int) -> None:
        read = self.read
        for handle in self.handles:
            read(handle)

    def time_read_and_sum(self, way: str, each: int) -> None:
        read, add = self.read, np.add.reduce
        for handle in self.handles:
            add(read(handle))
