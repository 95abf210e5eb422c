"""Writer cycle: what a range costs beside the filling."""

import mmap

import numpy as np

import blockstore as bs
from benchmarks.base import KIB, OnDisk
from benchmarks.roads import BYTE


class WriterCycle(OnDisk):
    """What does an empty writer cost, from `allocate` to the receipt?

    Each timed call does it 1000 times: milliseconds here are microseconds per range. The floor is a bare
    ``np.ndarray(shape, dtype, map, offset)``, without which no array lies on a map. The parts are measured too, and
    the cycle of one range of 1000 rows, which is how many small rows should be written.
    """

    params = ([1000],)
    param_names = ("count (ranges of 4 KiB)",)

    def setup(self, count: int) -> None:
        self.store = bs.create(self.make_folder() / "store", count * 8 * KIB)
        self.ranges = [self.store.allocate(4 * KIB) for _ in range(count)]
        self.offsets = [r.start for r in self.ranges]
        self.map = mmap.mmap(-1, count * 4 * KIB)

    def teardown(self, *params: object) -> None:
        self.store.close()
        self.map.close()
        super().teardown()

    def time_cycle(self, count: int) -> None:
        allocate = self.store.allocate
        for _ in range(count):
            r = allocate(4096)
            with r.writer():
                pass
            r.receipt  # noqa: B018

    def time_floor_bare_ndarray(self, count: int) -> None:
        ndarray, shape, shared = np.ndarray, (4096,), self.map
        for offset in self.offsets:
            ndarray(shape, BYTE, shared, offset)

    def time_part_allocate(self, count: int) -> None:
        allocate = self.store.allocate
        for _ in range(count):
            allocate(4096)

    def time_part_writer(self, count: int) -> None:
        for r in self.ranges:
            with r.writer():
                pass

    def time_rows_of_one_range(self, count: int) -> None:
        r = self.store.allocate(shape=(count, 4096), dtype=BYTE)
        with r.writer() as a:
            for _row in a:
                pass
            del _row
        r.receipt  # noqa: B018
