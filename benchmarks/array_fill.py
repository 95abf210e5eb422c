"""Arrays: filling, reading, opening and publishing them, and what a block costs."""

import contextlib
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import blockstore as bs
from benchmarks import disk
from benchmarks.base import KIB, OnDisk
from benchmarks.roads import BYTE

_F8 = np.dtype("<f8")
_LAYOUTS: dict[str, tuple[str, tuple[int, int], tuple[int, int]]] = {
    "x.npy": ("x.npy", (1024, 8192), (16, 8192)),
    "x.zarr, also an .npy": ("x.zarr", (1024, 8192), (16, 8192)),
    "x.zarr, blocks cut at the edges": ("x.zarr", (1000, 8400), (100, 1300)),
}
"""Names, shapes and blocks of about 64 MiB of float64 in about 64 blocks."""

_Extent = tuple[int, tuple[int, ...], tuple[int, ...]]


class _Arrays(OnDisk):
    """A folder, and an array that `teardown` lets go of."""

    array: bs.BlockArray | None = None

    def create(self, name: str, shape: tuple[int, ...], chunks: tuple[int, ...]) -> bs.BlockArray:
        self.array = bs.create_array(self.make_folder() / name, shape=shape, dtype=_F8, chunks=chunks)
        return self.array

    def teardown(self, *params: object) -> None:
        array, self.array = self.array, None
        if array is not None:
            with contextlib.suppress(KeyboardInterrupt), array:  # leaving by an exception publishes nothing
                raise KeyboardInterrupt
        super().teardown()


class ArrayFill(_Arrays):
    """How fast is an array of 64 MiB filled, block by block in 2 threads or one, until the disk has it or not?

    A ready block is copied into each block. `fill` ends with a flush; its floor is a bare loop over such a map and
    ``os.fdatasync``. `writer` in one thread promises nothing yet; its floor is the loop alone, in one thread. Blocks
    that are cut at the edges are strided, for the floor as well.
    """

    ways = ("fill(workers=2)", "floor: bare loop and os.fdatasync", "writer()", "floor: bare loop")
    params = (list(ways), list(_LAYOUTS))
    param_names = ("way", "layout")

    def setup(self, way: str, layout: str) -> None:
        name, shape, chunks = _LAYOUTS[layout]
        disk.touch_memory(160 * KIB * KIB)
        self.source = np.random.default_rng(0).random(chunks)
        self.fd: int | None = None
        self.run: Callable[[], object]
        if way.startswith("floor"):
            extents = list(_extents(shape, chunks))
            self.fd = fd = os.open(self.make_folder() / "file", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            nbytes = extents[-1][0] + self.source.nbytes
            os.posix_fallocate(fd, 0, nbytes)
            os.fsync(fd)
            shared = mmap.mmap(fd, nbytes)
            disk.advise(shared, mmap.MADV_HUGEPAGE)
            self.run = lambda: self._bare(shared, extents, sync=fd if way.endswith("fdatasync") else None)
            return
        array = self.create(name, shape, chunks)
        blocks = list(array.pending())
        self.run = (lambda: array.fill(self._copy, workers=2)) if way.startswith("fill") else lambda: self._loop(blocks)

    def teardown(self, *params: object) -> None:
        del self.run
        if self.fd is not None:
            os.close(self.fd)
        super().teardown()

    def time_fill(self, way: str, layout: str) -> None:
        self.run()

    def _copy(self, a: NDArray[Any], block: bs.Block) -> None:
        a[...] = self.source[tuple(map(slice, a.shape))]

    def _loop(self, blocks: list[bs.Block]) -> None:
        for b in blocks:
            with b.writer() as a:
                self._copy(a, b)

    def _bare(self, shared: mmap.mmap, extents: list[_Extent], sync: int | None) -> None:
        for offset, shape, strides in extents:
            a: NDArray[np.float64] = np.ndarray(shape, _F8, shared, offset, strides)
            a[...] = self.source[tuple(map(slice, shape))]
        if sync is not None:
            os.fdatasync(sync)


def _extents(shape: tuple[int, int], chunks: tuple[int, int]) -> Iterable[_Extent]:
    """Iterate over offset, shape and strides of blocks that follow each other in a file, each at a whole page."""
    strides = (chunks[1] * 8, 8)
    step = -(-chunks[0] * strides[0] // 4096) * 4096
    starts = [(i, j) for i in range(0, shape[0], chunks[0]) for j in range(0, shape[1], chunks[1])]
    for number, start in enumerate(starts):
        cut = tuple(min(chunk, n - i) for i, n, chunk in zip(start, shape, chunks, strict=True))
        yield number * step, cut, strides


class ArrayRead(_Arrays):
    """What does indexing an array cost where nothing is copied?

    Each timed call indexes 1000 times: milliseconds here are microseconds each. An array of 1000 rows of 4 KiB, one
    row a block or all rows one, published, in the page cache. The floors are `numpy.load` with a map, which makes a
    `numpy.memmap` each time, and a plain array over that map.
    """

    params = (["blockstore", "np.memmap", "floor: plain ndarray"], [1, 1000])
    param_names = ("way", "rows of a block")

    def setup(self, way: str, rows: int) -> None:
        x = self.create("x.zarr", (1000, 512), (rows, 512))
        x.fill(lambda a, b: a.fill(1.0))
        x.close()
        mapped: Any = np.load(Path(x.path, "c/0/0"), mmap_mode="r")
        self.x: Any = mapped if way == "np.memmap" else np.asarray(mapped)
        if way == "blockstore":
            self.x = self.array = bs.open_array(x.path, mode="r")
        self.x[0]  # opens the file

    def teardown(self, *params: object) -> None:
        del self.x
        super().teardown()

    def time_all_of_it(self, way: str, rows: int) -> None:
        x = self.x
        for _ in range(1000):
            x[...]

    def time_row(self, way: str, rows: int) -> None:
        x = self.x
        for i in range(1000):
            x[i]

    def time_element(self, way: str, rows: int) -> None:
        x = self.x
        for i in range(1000):
            x[i, 7]


class ArrayOpen(_Arrays):
    """What does it cost to open a finished array and to read its first element?

    Each timed call does it 10 times. Files are opened when they are come to, so that an array of many costs no more.
    The floors are `numpy.load` with a map, and reading ``zarr.json`` and mapping the shard.
    """

    params = (["x.npy", "x.zarr, 1 file", "x.zarr, 100 files", "floor: np.load", "floor: read and map"],)
    param_names = ("way",)

    def setup(self, way: str) -> None:
        name = "x.npy" if way in ("x.npy", "floor: np.load") else "x.zarr"
        shards = (10, 512) if "100" in way else None
        path = self.make_folder() / name
        with bs.create_array(path, shape=(1000, 512), dtype=_F8, chunks=(10, 512), shards=shards) as x:
            x.fill(lambda a, b: a.fill(1.0))
        self.open: Callable[[], object] = lambda: self._own(path)
        if way == "floor: np.load":
            self.open = lambda: np.load(path, mmap_mode="r")[0, 0]
        elif way.startswith("floor"):
            self.open = lambda: self._map(path)

    @staticmethod
    def _own(path: Path) -> None:
        with bs.open_array(path, mode="r") as x:
            x[0, 0]

    @staticmethod
    def _map(path: Path) -> object:
        (path / "zarr.json").read_bytes()
        mapped: Any = np.memmap(path / "c" / "0" / "0", BYTE, "r")
        return np.ndarray((), _F8, mapped, 4096)[()]

    def time_open(self, way: str) -> None:
        for _ in range(10):
            self.open()


class ArrayPublish(_Arrays):
    """What does it cost to publish an array of 1000 blocks, whose bytes the disk has already?

    With the closing that follows. The floor writes a header, syncs the file, renames it and syncs the folder.
    """

    params = (["x.npy", "x.zarr", "floor"],)
    param_names = ("way",)

    def setup(self, way: str) -> None:
        self.fd = -1
        if way == "floor":
            self.path = self.make_folder() / "file"
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            os.pwrite(self.fd, bytes(1000 * 4 * KIB), 4096)
            os.fsync(self.fd)
        else:
            self.create(way, (1000, 512), (1, 512)).fill(lambda a, b: a.fill(1.0))

    def teardown(self, *params: object) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        super().teardown()

    def time_publish(self, way: str) -> None:
        if self.array is not None:
            self.array.close()
            return
        os.pwrite(self.fd, bytes(4096), 0)
        os.fdatasync(self.fd)
        os.rename(self.path, self.path.with_suffix(".npy"))
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


class ArrayCreate(_Arrays):
    """What does it cost to create an array of 64 MiB, with its space, and to throw it away?

    The floor makes a file, reserves its space and syncs it and its folder.
    """

    params = (["x.npy", "x.zarr", "floor"],)
    param_names = ("way",)

    def setup(self, way: str) -> None:
        if way == "floor":
            self.make_folder()

    def time_create(self, way: str) -> None:
        if way != "floor":
            self.create(way, (1024, 8192), (16, 8192))
            return
        folder = self.folder or Path()
        for path, flags in ((folder / "file", os.O_RDWR | os.O_CREAT | os.O_EXCL), (folder, os.O_RDONLY)):
            fd = os.open(path, flags, 0o600)
            if path != folder:
                os.posix_fallocate(fd, 0, 1024 * 8192 * 8)
            os.fsync(fd)
            os.close(fd)


class BlockCycle(_Arrays):
    """What does a block cost, in and out, beside its filling?

    Each timed call does it 1000 times: milliseconds here are microseconds per block. Beside it the cycle of a range of
    bytes, and the floor, a bare ``np.ndarray(shape, dtype, map, offset)``.
    """

    params = ([8, 4096], [1000])
    param_names = ("each (bytes)", "count (blocks)")

    def setup(self, each: int, count: int) -> None:
        items = each // 8
        self.x = self.create("x.zarr", (count * items,), (items,))
        self.source = np.zeros(items)
        self.store = bs.create(Path(self.x.path).with_name("store"), (count + 1) * 4 * KIB, access="dense")
        self.map = mmap.mmap(-1, count * 4 * KIB)

    def teardown(self, *params: object) -> None:
        self.store.close()
        self.map.close()
        del self.x
        super().teardown()

    def time_writer(self, each: int, count: int) -> None:
        for b in self.x.blocks:
            with b.writer():
                pass

    def time_write(self, each: int, count: int) -> None:
        source = self.source
        for b in self.x.blocks:
            b.write(source)

    def time_fill_in_one_thread(self, each: int, count: int) -> None:
        self.x.fill(lambda a, b: None, workers=1)

    def time_range_of_bytes(self, each: int, count: int) -> None:
        allocate = self.store.allocate
        for _ in range(count):
            r = allocate(each)
            with r.writer():
                pass
            r.receipt  # noqa: B018

    def time_floor_bare_ndarray(self, each: int, count: int) -> None:
        ndarray, shape, shared = np.ndarray, (each,), self.map
        for offset in range(0, count * 4 * KIB, 4 * KIB):
            ndarray(shape, BYTE, shared, offset)
