"""Allocation: what it costs to hand out space."""

import itertools
from collections.abc import Callable
from typing import Literal

import numpy as np

import blockstore as bs
from benchmarks.base import KIB, OnDisk

WAYS = [
    "sequential store",
    "concurrent store",
    "sequential allocator",
    "concurrent allocator",
    "floor",
]


class Allocation(OnDisk):
    """What does it cost to hand out 1000 ranges, in the store and in a bare allocator?

    Milliseconds here are microseconds per range. The floor of one by one is a ticket from `itertools.count`, that of
    many at once is `numpy.arange`: neither knows where the space ends, nor makes an object that owns it.
    """

    params = (WAYS, [1000])
    param_names = ("way", "count (ranges of 4 KiB)")

    def setup(self, way: str, count: int) -> None:
        self.space: bs.BlockStore | bs.SequentialAllocator | bs.ConcurrentAllocator | None = None
        kind: Literal["sequential", "concurrent"] = "concurrent" if way.startswith("concurrent") else "sequential"
        if way.endswith("store"):
            self.space = bs.create(self.make_folder() / "store", count * 4 * KIB, allocator=kind)
        elif way.endswith("allocator"):
            self.space = (bs.SequentialAllocator if kind == "sequential" else bs.ConcurrentAllocator)(count * 4 * KIB)
        ticket = itertools.count(0, 4 * KIB).__next__
        self.allocate: Callable[[int], object] = self.space.allocate if self.space else lambda nbytes: ticket()

    def teardown(self, *params: object) -> None:
        if isinstance(self.space, bs.BlockStore):
            self.space.close()
        super().teardown()

    def time_one_by_one(self, way: str, count: int) -> None:
        allocate = self.allocate
        for _ in range(count):
            allocate(4096)

    def time_many_at_once(self, way: str, count: int) -> None:
        if self.space is None:
            np.arange(0, count * 4096, 4096)
        else:
            self.space.allocate_many(count, 4096)
