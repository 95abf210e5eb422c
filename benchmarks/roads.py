"""Roads into a file: ways to fill ranges of equal size, by blockstore and without it, that do the same work.

A road makes its file, hands out *handles* of the ranges, and copies a source block into each of them. What a caller
times is `Road.fill`, one call per thread. Sizes and offsets are bytes.
"""

import mmap
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import blockstore as bs
from benchmarks import disk

Block = NDArray[np.uint8]

BYTE = np.dtype(np.uint8)


def source_block(nbytes: int) -> Block:
    """Return random bytes, the same ones each time."""
    return np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)


def random_order(count: int, among: int, seed: int) -> list[int]:
    """Return `count` different slots of `among`, in random order."""
    slots: list[int] = np.random.default_rng(seed).permutation(among)[:count].tolist()
    return slots


class Road(ABC):
    """One file of `nbytes` bytes at `path`, to be filled in ranges of `each` bytes."""

    def __init__(self, path: Path, nbytes: int, each: int) -> None:
        self.path, self.nbytes, self.each = path, nbytes, each

    @abstractmethod
    def reserve(self, order: Sequence[int]) -> list[Any]:
        """Return the handles of these slots of `each` bytes; once."""

    @abstractmethod
    def share(self, threads: int) -> list[Iterator[Any]]:
        """Return an iterator per thread; together they hand out the whole file, front to back."""

    @abstractmethod
    def fill(self, handles: Iterable[Any], source: Block) -> None:
        """Copy the source into each range."""

    @abstractmethod
    def flush(self) -> None:
        """Return when the disk has everything."""

    @abstractmethod
    def release(self) -> None:
        """Let go of the file."""

    def close(self) -> None:
        """Remove the file, first what it holds, so that nothing more is written to the disk."""
        os.truncate(self.path, 0)
        self.release()
        self.path.unlink()
        Path(f"{self.path}.journal").unlink(missing_ok=True)


class Store(Road):
    """blockstore, through `writer`."""

    def __init__(
        self,
        path: Path,
        nbytes: int,
        each: int,
        access: Literal["dense", "sparse"] | None = None,
        guard: Literal["flag", "seal"] = "flag",
    ) -> None:
        super().__init__(path, nbytes, each)
        self.store = bs.create(path, nbytes, access=access, guard=guard)

    def reserve(self, order: Sequence[int]) -> list[Any]:
        ranges = self.store.allocate_many(self.nbytes // self.each, self.each)
        return [ranges[slot] for slot in order]

    def share(self, threads: int) -> list[Iterator[Any]]:
        return [self.store.ranges(self.each)] * threads

    def fill(self, handles: Iterable[Any], source: Block) -> None:
        for r in handles:
            with r.writer() as a:
                a[:] = source

    def flush(self) -> None:
        self.store.flush()

    def release(self) -> None:
        self.store.close()


class StoreCopy(Store):
    """blockstore, through `write`."""

    def fill(self, handles: Iterable[Any], source: Block) -> None:
        for r in handles:
            r.write(source)


class _Offsets(Road):
    """Roads whose handle is an offset, and whose ranges nobody keeps apart."""

    def reserve(self, order: Sequence[int]) -> list[Any]:
        return [slot * self.each for slot in order]

    def share(self, threads: int) -> list[Iterator[Any]]:
        offsets: deque[int | None] = deque(range(0, self.nbytes, self.each))
        offsets.extend([None] * threads)
        return [iter(offsets.popleft, None) for _ in range(threads)]


class _File(_Offsets):
    """A file with its space reserved, as `blockstore.create` does."""

    def __init__(self, path: Path, nbytes: int, each: int) -> None:
        super().__init__(path, nbytes, each)
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.posix_fallocate(self.fd, 0, nbytes)
        os.fsync(self.fd)

    def flush(self) -> None:
        os.fdatasync(self.fd)

    def release(self) -> None:
        os.close(self.fd)


class MapCopy(_File):
    """A bare loop over the map: no owner, no receipt, no check. `advice` is for ``madvise``, None for no advice."""

    def __init__(self, path: Path, nbytes: int, each: int, advice: int | None) -> None:
        super().__init__(path, nbytes, each)
        self.map = mmap.mmap(self.fd, nbytes)
        if advice is not None:
            disk.advise(self.map, advice)

    def fill(self, handles: Iterable[Any], source: Block) -> None:
        ndarray, shape, shared = np.ndarray, (self.each,), self.map
        for offset in handles:
            a: Block = ndarray(shape, BYTE, shared, offset)
            a[:] = source

    def release(self) -> None:
        self.map.close()
        super().release()


class PlainWrite(_File):
    """``os.pwrite`` of a buffer that is ready: what costs least where the data is there already."""

    def fill(self, handles: Iterable[Any], source: Block) -> None:
        data: Any = source
        pwrite, fd = os.pwrite, self.fd
        for offset in handles:
            pwrite(fd, data, offset)


class BufferWrite(_File):
    """Fill a private buffer, then ``os.pwrite`` it: the same work as a writer, without a map."""

    def fill(self, handles: Iterable[Any], source: Block) -> None:
        a: Any = np.empty(self.each, BYTE)
        pwrite, fd = os.pwrite, self.fd
        for offset in handles:
            a[:] = source
            pwrite(fd, a, offset)


class Memmap(_Offsets):
    """``np.memmap`` as its documentation shows it: a sparse file, and slices of the map."""

    def __init__(self, path: Path, nbytes: int, each: int) -> None:
        super().__init__(path, nbytes, each)
        self.map: Any = np.memmap(path, BYTE, "w+", shape=(nbytes,))

    def fill(self, handles: Iterable[Any], source: Block) -> None:
        shared, each = self.map, self.each
        for offset in handles:
            a = shared[offset : offset + each]
            a[:] = source

    def flush(self) -> None:
        self.map.flush()

    def release(self) -> None:
        del self.map


def fill(road: Road, handles: Sequence[Iterable[Any]], source: Block) -> float:
    """Fill from one thread per iterable; return the seconds from the first start to the last end."""

    def work(mine: Iterable[Any], wait: Callable[[], object]) -> tuple[float, float]:
        wait()
        start = time.perf_counter()
        road.fill(mine, source)
        return start, time.perf_counter()

    if len(handles) == 1:
        start, stop = work(handles[0], lambda: None)
        return stop - start
    barrier = threading.Barrier(len(handles))
    with ThreadPoolExecutor(len(handles)) as pool:
        spans = list(pool.map(lambda mine: work(mine, barrier.wait), handles))
    return max(stop for _, stop in spans) - min(start for start, _ in spans)
