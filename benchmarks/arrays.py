"""Arrays: ways to make an array on the disk and fill it block by block in threads, by blockstore and by others.

Every way does the same work: it makes an array, and each thread takes the next block and hands over what it is to hold,
which is ready and warm in memory. `measure` times that from nothing to closed, and on until the disk has all of it;
then it reads every block back. Seconds and bytes. Where a package is missing `Way.missing` says so.
"""

import importlib.util
import mmap
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import blockstore as bs
from benchmarks import disk

Reader = Callable[[int, int], Any]
"""Returns the rows ``[start, stop)`` of an array, read by something."""

_PAGE = 4096
_F8 = np.dtype("<f8")


class Work:
    """What is to be done: `blocks` blocks of `rows` rows each, which the threads take in order.

    The blocks are all different, and overlap in memory, so that they are about as warm as a single one.
    """

    def __init__(self, rows: int, columns: int, blocks: int, threads: int) -> None:
        self.rows, self.blocks, self.threads = rows, blocks, threads
        self.shape, self.chunks = (rows * blocks, columns), (rows, columns)
        self.each, step = rows * columns, _PAGE // _F8.itemsize
        self.nbytes = self.each * blocks * _F8.itemsize
        values = np.random.default_rng(0).random(self.each + step * blocks)
        self._sources = [values[n * step :][: self.each].reshape(self.chunks) for n in range(blocks)]

    def source(self, number: int) -> NDArray[np.float64]:
        """Return what a block is to hold, in C order."""
        return self._sources[number]

    def span(self, number: int) -> tuple[int, int]:
        """Return the first row of a block, and the one past its last."""
        return number * self.rows, (number + 1) * self.rows

    def in_threads(self, write: Callable[[int], object]) -> None:
        """Call `write` for each block, from all threads, each of which takes the next one when it is done."""

        def work(_: int) -> None:
            for number in iter(todo.popleft, -1):
                write(number)

        todo = deque([*range(self.blocks), *[-1] * self.threads])
        with ThreadPoolExecutor(self.threads) as pool:
            deque(pool.map(work, range(self.threads)), 0)

    def wrong(self, read: Reader) -> int:
        """Count the blocks that do not hold what they should; one that cannot be read is one of them."""
        count = 0
        for number in range(self.blocks):
            try:
                found = np.asarray(read(*self.span(number)))
                count += not np.array_equal(found, self.source(number))
            except Exception:  # a torn file: whatever its reader says to it
                count += 1
        return count


@dataclass(frozen=True, slots=True)
class Filled:
    """Seconds from the start to the end of each step, and wrong blocks by each reader."""

    created: float
    written: float
    closed: float
    durable: float
    wrong: dict[str, int]


class Way(ABC):
    """One way to make an array at `path`. `create`, `fill`, `close` and `sync` are timed, in this order."""

    label: str
    promise: str
    """What is known when it is closed."""
    unsynced: Literal["written", "closed"] = "closed"
    """The step before which it need not sync."""
    needs: tuple[str, ...] = ()
    file = "array"

    def __init__(self, folder: Path, work: Work) -> None:
        self.path, self.work = folder / self.file, work

    @classmethod
    def missing(cls) -> list[str]:
        """Return the packages that it needs and that are not here."""
        return [name for name in cls.needs if importlib.util.find_spec(name) is None]

    @abstractmethod
    def create(self) -> None:
        """Make the array."""

    def fill(self) -> None:
        """Write all blocks."""
        work, write = self.work, self.write
        work.in_threads(lambda number: write(*work.span(number), work.source(number)))

    def write(self, start: int, stop: int, source: NDArray[np.float64]) -> None:
        """Write the block of these rows."""
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Do what makes the array visible to everybody, as this way does it."""

    def sync(self) -> None:
        """Return when the disk has all of it."""
        sync_tree(self.path.parent, self.work.threads)

    @abstractmethod
    def readers(self) -> dict[str, Callable[[], Reader]]:
        """Return who is to read the array back."""


def measure(number: int, make: Callable[[Path, Work], Way], folder: Path, work: Work) -> Filled:
    """Fill a new array, sync it and read it back."""
    disk.touch_memory(2 * work.nbytes)
    here = folder / "here"
    here.mkdir()
    sync_folder(folder)  # what was removed before is not to burden the first sync of this one
    way = make(here, work)
    try:
        start = time.perf_counter()
        way.create()
        created = time.perf_counter()
        way.fill()
        written = time.perf_counter()
        way.close()
        closed = time.perf_counter()
        way.sync()
        durable = time.perf_counter()
        return Filled(
            created - start,
            written - start,
            closed - start,
            durable - start,
            {name: work.wrong(opened()) for name, opened in way.readers().items()},
        )
    finally:
        del way
        shutil.rmtree(here)


def warm_up(folder: Path, ways: Iterable[Callable[[Path, Work], Way]]) -> None:
    """Let each way do a little once, so that none pays for its imports and threads when it is measured."""
    for make in ways:
        measure(0, make, folder, Work(8, 512, 4, 2))


def sync_tree(folder: Path, threads: int) -> None:
    """Sync every file and folder below a folder, in threads, as somebody could whose library does not."""
    files = [Path(above, name) for above, _, names in os.walk(folder) for name in names]
    with ThreadPoolExecutor(threads) as pool:
        deque(pool.map(partial(_sync_path, flags=os.O_RDWR), files), 0)
    for above, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(above))


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder."""
    _sync_path(folder, os.O_RDONLY)


def _sync_path(path: Path, flags: int) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -- readers --------------------------------------------------------------------------------------------


def _rows(array: Any) -> Reader:
    return lambda start, stop: array[start:stop]


def by_blockstore(path: Path) -> Reader:
    return _rows(bs.open_array(path, mode="r"))


def by_numpy(path: Path) -> Reader:
    return _rows(np.load(path, mmap_mode="r"))


def by_zarr(path: Path) -> Reader:
    import zarr

    return _rows(zarr.open_array(path, mode="r"))


def by_tensorstore(path: Path) -> Reader:
    import tensorstore

    array = tensorstore.open({"driver": "zarr3", "kvstore": _kvstore(path)}, read=True).result()
    return lambda start, stop: array[start:stop].read().result()


def by_h5py(path: Path) -> Reader:
    import h5py

    return _rows(h5py.File(path, "r")["x"])


def _zarr_readers(path: Path, own: str) -> dict[str, Callable[[], Reader]]:
    known = {"blockstore": by_blockstore, "tensorstore": by_tensorstore, "zarr": by_zarr}
    return {name: partial(known[name], path) for name in (own, "zarr") if importlib.util.find_spec(name)}


# -- blockstore -----------------------------------------------------------------------------------------


class Array(Way):
    """blockstore, one shard, which is an ``.npy`` file as well."""

    label = "`with b.writer() as a: a[:] = source`"
    promise = "durable, whole or not at all; each block written once"
    unsynced = "written"

    def create(self) -> None:
        self.array = bs.create_array(self.path, shape=self.work.shape, dtype=_F8, chunks=self.work.chunks)

    def fill(self) -> None:
        work, blocks = self.work, self.array.blocks

        def write(number: int) -> None:
            with blocks[number, 0].writer() as a:
                a[:] = work.source(number)

        work.in_threads(write)

    def close(self) -> None:
        self.array.close()

    def sync(self) -> None:
        """Closing has done it."""

    def readers(self) -> dict[str, Callable[[], Reader]]:
        return _zarr_readers(self.path, "blockstore") | {"numpy": partial(by_numpy, self.path / "c" / "0" / "0")}


class ArrayAssign(Array):
    """blockstore, by assigning to the array."""

    label = "`x[i:j] = source`"

    def fill(self) -> None:
        Way.fill(self)

    def write(self, start: int, stop: int, source: NDArray[np.float64]) -> None:
        self.array[start:stop] = source


class ArrayFill(Array):
    """blockstore, which brings the threads, and flushes at the end of the fill."""

    label = "`x.fill(func, workers=2)`, which flushes"

    def fill(self) -> None:
        source = self.work.source
        self.array.fill(lambda a, b: np.copyto(a, source(b.index[0])), workers=self.work.threads)


class ArrayNpy(Array):
    """blockstore, an ``.npy`` file."""

    label = "an `.npy`, `with b.writer() as a: a[:] = source`"
    file = "array.npy"

    def readers(self) -> dict[str, Callable[[], Reader]]:
        return {"blockstore": partial(by_blockstore, self.path), "numpy": partial(by_numpy, self.path)}


class Floor(Way):
    """What blockstore does, without it: the space reserved, huge pages, a copy into the map, and ``fdatasync``."""

    label = "floor: a bare loop over such a map"
    promise = "nothing"
    file = "array.npy"

    def create(self) -> None:
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.posix_fallocate(self.fd, 0, self.work.nbytes)
        self.map = mmap.mmap(self.fd, self.work.nbytes)
        disk.advise(self.map, mmap.MADV_HUGEPAGE)

    def write(self, start: int, stop: int, source: NDArray[np.float64]) -> None:
        a: NDArray[np.float64] = np.ndarray(source.shape, _F8, self.map, start * self.work.shape[1] * _F8.itemsize)
        a[:] = source

    def close(self) -> None:
        self.map.close()

    def sync(self) -> None:
        os.fdatasync(self.fd)
        os.close(self.fd)

    def readers(self) -> dict[str, Callable[[], Reader]]:
        return {"numpy": lambda: _rows(np.memmap(self.path, _F8, "r", shape=self.work.shape))}


# -- one shard, block by block -----------------------------------------------------------------------------


class ZarrShard(Way):
    """zarr-python, all blocks in one shard."""

    label = "zarr-python, one shard"
    promise = "not synced; threads overwrite each other's blocks"
    needs = ("zarr",)

    def create(self) -> None:
        self.array = self._create(self.work.shape)

    def _create(self, shards: tuple[int, ...] | None) -> Any:
        import zarr

        shape, chunks = self.work.shape, self.work.chunks
        return zarr.create_array(
            self.path, shape=shape, chunks=chunks, shards=shards, dtype="f8", compressors=None, filters=None
        )

    def write(self, start: int, stop: int, source: NDArray[np.float64]) -> None:
        self.array[start:stop] = source

    def close(self) -> None:
        self.array.store.close()

    def readers(self) -> dict[str, Callable[[], Reader]]:
        return _zarr_readers(self.path, "zarr")


class ZarrShardInTurn(ZarrShard):
    """zarr-python, all blocks in one shard, in one thread."""

    label = "zarr-python, one shard, one thread"
    promise = "not synced"

    def fill(self) -> None:
        for number in range(self.work.blocks):
            self.write(*self.work.span(number), self.work.source(number))


class TensorstoreShard(Way):
    """tensorstore, all blocks in one shard."""

    label = "tensorstore, one shard"
    promise = "not synced"
    needs = ("tensorstore",)
    synced = False

    def create(self) -> None:
        self.array = self._create(self.work.shape)

    def _create(self, shards: tuple[int, ...] | None) -> Any:
        import tensorstore

        limit = {"limit": self.work.threads}
        codecs: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        if shards is not None:
            index = [*codecs, {"name": "crc32c"}]
            inner = {"chunk_shape": self.work.chunks, "codecs": codecs, "index_codecs": index}
            codecs = [{"name": "sharding_indexed", "configuration": inner}]
        grid = {"name": "regular", "configuration": {"chunk_shape": shards or self.work.chunks}}
        spec = {
            "driver": "zarr3",
            "kvstore": _kvstore(self.path, synced=self.synced),
            "context": {"data_copy_concurrency": limit, "file_io_concurrency": limit},
            "metadata": {"shape": self.work.shape, "data_type": "float64", "chunk_grid": grid, "codecs": codecs},
        }
        return tensorstore.open(spec, create=True).result()

    def write(self, start: int, stop: int, source: NDArray[np.float64]) -> None:
        self.array[start:stop].write(source, can_reference_source_data_indefinitely=True).result()

    def close(self) -> None:
        del self.array

    def readers(self) -> dict[str, Callable[[], Reader]]:
        return _zarr_readers(self.path, "tensorstore")


class TensorstoreAtOnce(TensorstoreShard):
    """tensorstore, all blocks in one shard, and all of it in one transaction."""

    label = "tensorstore, one shard, in one transaction"
    promise = "not synced; all in memory until the commit, and nothing kept before it"

    def create(self) -> None:
        import tensorstore

        self.transaction = tensorstore.Transaction()
        self.array = self._create(self.work.shape).with_transaction(self.transaction)

    def close(self) -> None:
        self.transaction.commit_sync()
        super().close()


def _kvstore(path: Path, *, synced: bool = True) -> dict[str, object]:
    return {"driver": "file", "path": f"{path}/", "file_io_sync": synced}


# -- other layouts -----------------------------------------------------------------------------------------


class Memmap(Way):
    """NumPy's own, in place."""

    label = "`open_memmap`, in place"
    promise = "not synced; visible and of zeros from the start"
    file = "array.npy"

    def create(self) -> None:
        self.array = np.lib.format.open_memmap(self.path, "w+", _F8, self.work.shape)

    def write(self, start: int, stop: int, source: NDArray[np.float64]) -> None:
        self.array[start:stop] = source

    def close(self) -> None:
        del self.array

    def readers(self) -> dict[str, Callable[[], Reader]]:
        return {"numpy": partial(by_numpy, self.path)}


def _store_by_dask(work: Work, ready: Any, target: Any) -> None:
    import dask.array as da

    da.store(ready, target, lock=False, scheduler="threads", num_workers=work.threads)


def _dask_array(work: Work) -> Any:
    """Return a dask array of the blocks, each of which is ready."""
    import dask.array as da

    blocks = (work.source(number) for number in range(work.blocks))
    return da.concatenate([da.from_array(block, chunks=-1, name=f"block-{n}") for n, block in enumerate(blocks)])


class MemmapByDask(Memmap):
    """NumPy's own, filled by dask."""

    label = "`open_memmap` and `dask.array.store`"
    needs = ("dask",)

    def __init__(self, folder: Path, work: Work) -> None:
        super().__init__(folder, work)
        self.ready = _dask_array(work)

    def fill(self) -> None:
        _store_by_dask(self.work, self.ready, self.array)


class ArrayByDask(Array):
    """blockstore, filled by dask."""

    label = "`dask.array.store` into it"
    needs = ("dask",)

    def __init__(self, folder: Path, work: Work) -> None:
        super().__init__(folder, work)
        self.ready = _dask_array(work)

    def fill(self) -> None:
        _store_by_dask(self.work, self.ready, self.array)


class Hdf5(Way):
    """h5py, a contiguous dataset."""

    label = "h5py, contiguous"
    promise = "not synced; unreadable before it is closed"
    needs = ("h5py",)
    file = "array.h5"

    def create(self) -> None:
        import h5py

        self.opened = h5py.File(self.path, "w")
        self.array = self.opened.create_dataset("x", self.work.shape, _F8)

    def write(self, start: int, stop: int, source: NDArray[np.float64]) -> None:
        self.array[start:stop] = source

    def close(self) -> None:
        self.opened.close()

    def readers(self) -> dict[str, Callable[[], Reader]]:
        return {"h5py": partial(by_h5py, self.path)}


class ZarrFiles(ZarrShard):
    """zarr-python, a file for each block."""

    label = "zarr-python, a file for each block"
    promise = "not synced"

    def create(self) -> None:
        self.array = self._create(None)


class TensorstoreFiles(TensorstoreShard):
    """tensorstore, a file for each block."""

    label = "tensorstore, a file for each block"

    def create(self) -> None:
        self.array = self._create(None)


class TensorstoreSynced(TensorstoreFiles):
    """tensorstore, a file for each block, which it syncs."""

    label = "tensorstore, a file for each block, `file_io_sync`"
    promise = "each block durable when it is written"
    synced = True


ONE_SHARD: tuple[type[Way], ...] = (Array, ZarrShard, ZarrShardInTurn, TensorstoreShard, TensorstoreAtOnce)
"""Ways to fill one shard. All but the first and the last write it anew for each block."""

ANY_LAYOUT: tuple[type[Way], ...] = (
    Array,
    ArrayAssign,
    ArrayFill,
    ArrayNpy,
    ArrayByDask,
    Floor,
    Memmap,
    MemmapByDask,
    Hdf5,
    TensorstoreFiles,
    TensorstoreSynced,
    ZarrFiles,
)
"""Ways to have the array on the disk in whatever layout suits them."""


def present(ways: Iterable[type[Way]]) -> Iterator[type[Way]]:
    """Iterate over the ways whose packages are here."""
    return (way for way in ways if not way.missing())


def versions() -> str:
    """Say which packages the ways are of, and which are missing."""
    names = sorted({name for way in (*ONE_SHARD, *ANY_LAYOUT) for name in way.needs})
    return ", ".join(
        f"{name} {version(name)}" if importlib.util.find_spec(name) else f"{name} is not installed" for name in names
    )
