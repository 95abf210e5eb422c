"""Filling: how fast data gets into the file."""

import mmap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from benchmarks import disk, roads
from benchmarks.base import KIB, MIB, OnDisk
from benchmarks.roads import Road

DENSE: dict[str, Callable[..., Road]] = {
    "writer()": partial(roads.Store, access="dense"),
    "write()": partial(roads.StoreCopy, access="dense"),
    "floor: bare loop over the same map": partial(roads.MapCopy, advice=mmap.MADV_HUGEPAGE),
    "floor: os.pwrite of a ready buffer": roads.PlainWrite,
    "np.memmap": roads.Memmap,
}
SPARSE: dict[str, Callable[..., Road]] = {
    "writer()": partial(roads.Store, access="sparse"),
    "write()": partial(roads.StoreCopy, access="sparse"),
    "floor: os.pwrite of a ready buffer": roads.PlainWrite,
}


class _Filling(OnDisk):
    road: Road | None = None

    def prepare(self, make: Callable[..., Road], nbytes: int, each: int) -> Road:
        disk.touch_memory(nbytes)
        self.road = make(self.make_folder() / "file", nbytes, each)
        self.source = roads.source_block(each)
        self.handles: Sequence[Iterable[Any]] = ()
        return self.road

    def teardown(self, *params: object) -> None:
        if self.road is not None:
            self.road.close()
            self.road = None
        super().teardown()


class DenseFill(_Filling):
    """How fast is a file filled from end to end in large ranges?

    A ready block is copied into each range: 252 MiB in ranges of 12 MiB, without waiting for the disk. The floors are
    a bare loop over the same map (space reserved, huge pages), and ``os.pwrite``. `numpy.memmap` makes a sparse file,
    as it always does.
    """

    params = (list(DENSE), [1, 2])
    param_names = ("way", "threads")

    def setup(self, way: str, threads: int) -> None:
        self.handles = self.prepare(DENSE[way], 252 * MIB, 12 * MIB).share(threads)

    def time_fill(self, way: str, threads: int) -> None:
        if self.road is not None:
            roads.fill(self.road, self.handles, self.source)


class SparseWrite(_Filling):
    """What do small writes cost that lie far apart?

    A ready block is copied into ranges in random order over a file that is 8 times larger than what is written: 4 MiB
    of 4 KiB, or 32 MiB of anything larger, without waiting for the disk. The ranges are allocated before. The floor is
    ``os.pwrite``.
    """

    params = (list(SPARSE), [4, 64, 1024])
    param_names = ("way", "each (KiB)")

    def setup(self, way: str, each: int) -> None:
        written = 4 * MIB if each == 4 else 32 * MIB
        count = written // (each * KIB)
        road = self.prepare(SPARSE[way], 8 * written, each * KIB)
        self.handles = [road.reserve(roads.random_order(count, 8 * count, seed=0))]

    def time_write(self, way: str, each: int) -> None:
        if self.road is not None:
            roads.fill(self.road, self.handles, self.source)
