"""The demo: pack every file of a folder into one file, from several threads, and check every byte.

`with_blockstore` shows the library at work. `with_memmap` and `with_file` do the same without it: all three run in
turns, in equally many threads, from the same sources in a warm page cache, and end with the data on the disk.
Sizes and offsets are bytes. This module prints nothing: see `cli`.
"""

import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import blockstore as bs
from blockstore import sidecar


@dataclass(frozen=True, slots=True)
class Source:
    """A file to pack. `nbytes` is the size that it had when it was found."""

    path: Path
    nbytes: int

    def read_into(self, a: NDArray[np.uint8]) -> None:
        """Fill `a`, which takes `nbytes` bytes, with the file; raise `OSError` if the file has another size by now."""
        filled = 0
        with open(self.path, "rb", buffering=0) as file:
            while count := file.readinto(a.data[filled:]):
                filled += count
            if filled < self.nbytes or file.read(1):
                raise OSError(f"it had {self.nbytes} bytes when it was found, and has changed its size")


@dataclass(slots=True)
class Work:
    """What is to be packed, in how many threads, and what went wrong so far.

    `advance` is called from the main thread with the number of files that were dealt with since the last call.
    """

    sources: list[Source]
    workers: int
    advance: Callable[[int], object]
    failures: dict[Path, str] = field(default_factory=dict)

    def each(self, call: Callable[[int, Source], None]) -> set[int]:
        """Call a function with every index and source, from all threads; return the indices that it did not fail for.

        An `OSError` fails one file, and the rest goes on. Any other exception, and Ctrl-C, ends it all.
        """
        todo, done, shown = deque(enumerate(self.sources)), deque[int](), 0

        def work() -> None:
            while True:
                try:
                    index, source = todo.popleft()
                except IndexError:
                    return
                try:
                    call(index, source)
                    done.append(index)
                except OSError as error:
                    self.failures[source.path] = str(error)

        with ThreadPoolExecutor(self.workers) as pool:
            threads = [pool.submit(work) for _ in range(self.workers)]
            try:
                while wait(threads, timeout=0.1).not_done:
                    self.advance(len(done) - shown)
                    shown = len(done)
                for thread in threads:
                    thread.result()
            finally:
                todo.clear()
        self.advance(len(self.sources) - shown)
        return set(done)


def with_blockstore(target: Path, work: Work) -> dict[int, int]:
    """Read each file straight into a range of its own. The receipts say which files are in, and where they start."""
    with bs.create(target, sum(bs.align_up(source.nbytes) for source in work.sources), access="dense") as store:

        def pack(index: int, source: Source) -> None:
            r = store.allocate(source.nbytes, tag=index)
            with r.writer() as a:
                source.read_into(a)

        work.each(pack)
        store.flush()
        receipts = store.receipts()
    return dict(zip(receipts["tag"].tolist(), receipts["start"].tolist(), strict=True))


def with_memmap(target: Path, work: Work) -> dict[int, int]:
    """Read each file straight into a slice of a `numpy.memmap`."""
    starts = [0, *accumulate(bs.align_up(source.nbytes) for source in work.sources)]
    mapped = np.memmap(target, np.uint8, "w+", shape=(starts[-1],))

    def pack(index: int, source: Source) -> None:
        source.read_into(mapped[starts[index] : starts[index] + source.nbytes])

    packed = work.each(pack)
    mapped.flush()
    return {index: starts[index] for index in packed}


def with_file(target: Path, work: Work) -> dict[int, int]:
    """Read each file into memory, then seek and write under a lock."""
    starts = [0, *accumulate(bs.align_up(source.nbytes) for source in work.sources)]
    lock = threading.Lock()
    with open(target, "wb") as file:
        file.truncate(starts[-1])

        def pack(index: int, source: Source) -> None:
            data = np.empty(source.nbytes, np.uint8)
            source.read_into(data)
            with lock:
                file.seek(starts[index])
                file.write(data.data)

        packed = work.each(pack)
        file.flush()
        os.fsync(file.fileno())
    return {index: starts[index] for index in packed}


ROADS = {"blockstore": with_blockstore, "numpy.memmap": with_memmap, "file I/O": with_file}
"""Each makes `target` from `work`, durable, and returns where each source starts that is in it, by index."""


_MEMORY = 1 << 29
"""Bytes of memory taken and freed before each run, so that no run waits for what a virtual machine gave to its host."""


def find(folder: Path, failures: dict[Path, str]) -> tuple[list[Source], int]:
    """Return the regular files below a folder that have bytes in them, and how many others have none.

    Each is read once, which warms the page cache. What cannot be read goes to `failures`.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"there is no folder {str(folder)!r}")
    sources, empty, buffer = [], 0, bytearray(1 << 20)
    for parent, folders, names in os.walk(folder, onerror=lambda e: failures.update({Path(e.filename): str(e)})):
        folders.sort()
        for path in (Path(parent, name) for name in sorted(names)):
            try:
                status = path.lstat()
                if not stat.S_ISREG(status.st_mode):
                    continue
                with open(path, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass
            except OSError as error:
                failures[path] = str(error)
            else:
                sources.append(Source(path, status.st_size))
                empty += status.st_size == 0
    return [source for source in sources if source.nbytes], empty


def verify(target: Path, starts: dict[int, int], work: Work) -> None:
    """Reopen a packed file and compare every byte with its source. What differs goes to `work.failures`."""
    with bs.open(target, mode="r") as store:
        for index, start in starts.items():
            source = work.sources[index]
            try:
                same = np.array_equal(store.raw.array(start, source.nbytes), np.fromfile(source.path, np.uint8))
            except OSError as error:
                work.failures[source.path] = str(error)
            else:
                if not same:
                    where = f"[{start}, {start + source.nbytes}) of {target.name}"
                    work.failures[source.path] = f"bytes {where} are not those of the file"


def runs(target: Path, work: Work, rounds: int) -> Iterator[tuple[str, float, dict[int, int]]]:
    """Pack by each road in turn and verify; yield its name, the seconds it took, and where the sources start.

    Each round begins with another road. `target` is there when a run is yielded, and removed afterwards, with its
    journal if it has one.
    """
    names = list(ROADS)
    for index in range(rounds * len(names)):
        turn, at = divmod(index, len(names))
        name = names[(turn + at) % len(names)]
        np.ones(_MEMORY, np.uint8)
        began = time.perf_counter()
        starts = ROADS[name](target, work)
        seconds = time.perf_counter() - began
        verify(target, starts, work)
        yield name, seconds, starts
        for path in (target, Path(sidecar.path_of(str(target)))):
            path.unlink(missing_ok=True)
