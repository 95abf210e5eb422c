"""Cycles: nanoseconds that the pieces of an empty write cost, for `benchmarks.side_by_side`.

Counts are ranges of 4 KiB. Nothing is written: what is timed is Python, not the disk.
"""

import gc
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

import blockstore as bs
from benchmarks.roads import BYTE

Allocator = Literal["sequential", "concurrent"]

_CYCLE = "**empty cycle: `allocate`, `with writer()`, `receipt`**"
_PARTS = (
    "part: `allocate(4096)`",
    "part: `writer()`",
    "part: enter",
    "part: exit",
    "part: `receipt`",
    "part: freeing all these objects",
)
_ROWS = "per row: a cycle of one range as 1024 rows"
_ROWS_VISITED = "per row: the same with `for row in a`"
_MANY = "per range: `allocate_many(256, 4096)` of a store"
_MANY_VISITED = "per range: the same, each range touched"
_BARE = "`allocate(4096)` of a bare allocator"
_BARE_MANY = "per range: `allocate_many(256, 4096)` of a bare allocator"

AIMS = {
    _CYCLE: "8",
    **dict.fromkeys(_PARTS, ""),
    _ROWS: "0.2",
    _ROWS_VISITED: "0.2",
    _MANY: "",
    _MANY_VISITED: "",
    _BARE: "",
    _BARE_MANY: "0.1",
}
"""What `cycle` measures, and what it may cost, as a ratio to a bare array."""

_clock = time.perf_counter_ns


def cycle(folder: Path, count: int, kind: Allocator, number: int) -> dict[str, float]:
    """Return nanoseconds per range, or per row, of all in `AIMS`."""
    with _store(folder, count, kind) as store:
        measured = {_CYCLE: _whole(store, count) / count}
    with _store(folder, count, kind) as store:
        measured |= _parts(store, count)
    times = max(count // 1000, 2)
    with _store(folder, 2 * times * 1024, kind) as store:
        measured[_ROWS] = _rows(store, times) / times / 1024
        measured[_ROWS_VISITED] = _visited_rows(store, times) / times / 1024
    times = count // 256
    with _store(folder, 2 * times * 256, kind) as store:
        measured[_MANY] = _many(store, times) / times / 256
        measured[_MANY_VISITED] = _visited_many(store, times) / times / 256
    make = bs.SequentialAllocator if kind == "sequential" else bs.ConcurrentAllocator
    measured[_BARE] = _one_by_one(make(2 * count * 4096), count) / count
    measured[_BARE_MANY] = _many(make(2 * count * 4096), times) / times / 256
    return measured


def bare(folder: Path, count: int, number: int) -> dict[str, float]:
    """Return nanoseconds per array over a map, without blockstore: the floors."""
    path = folder / "file"
    shared: Any = np.memmap(path, BYTE, "w+", shape=(count * 4096,))
    measured = {
        "mmap": _arrays(shared._mmap, count) / count,
        "np.memmap": _arrays(shared, count) / count,
        "slice": _slices(shared, count) / count,
        "row": _plain_rows(shared._mmap, count) / count,
    }
    path.unlink()
    return measured


@contextmanager
def no_collector() -> Iterator[None]:
    """Do without the garbage collector meanwhile, as `timeit` does."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def _store(folder: Path, count: int, kind: Allocator) -> Iterator[bs.BlockStore]:
    path = folder / "file"
    with bs.create(path, (count + 1) * 4096, allocator=kind) as store:  # one more: taking the last is a slower step
        yield store
    path.unlink()
    Path(f"{path}.journal").unlink()


def _whole(store: bs.BlockStore, count: int) -> int:
    allocate = store.allocate
    start = _clock()
    for _ in range(count):
        r = allocate(4096)
        with r.writer() as a:  # noqa: F841
            pass
        r.receipt  # noqa: B018
    return _clock() - start


def _parts(store: bs.BlockStore, count: int) -> dict[str, float]:
    allocate, spent, batch = store.allocate, dict.fromkeys(_PARTS, 0), 500
    for _ in range(count // batch):
        stamps = [_clock()]
        ranges = [allocate(4096) for _ in range(batch)]
        stamps.append(_clock())
        writers = [r.writer() for r in ranges]
        stamps.append(_clock())
        for writer in writers:
            writer.__enter__()
        stamps.append(_clock())
        for writer in writers:
            writer.__exit__(None, None, None)
        stamps.append(_clock())
        for r in ranges:
            r.receipt  # noqa: B018
        stamps.append(_clock())
        del ranges, writers, r, writer
        stamps.append(_clock())
        for part, (before, after) in zip(_PARTS, itertools.pairwise(stamps), strict=True):
            spent[part] += after - before
    return {part: total / (count // batch * batch) for part, total in spent.items()}


def _rows(store: bs.BlockStore, times: int) -> int:
    start = _clock()
    for _ in range(times):
        r = store.allocate(shape=(1024, 4096), dtype=BYTE)
        with r.writer() as a:  # noqa: F841
            pass
        r.receipt  # noqa: B018
    return _clock() - start


def _visited_rows(store: bs.BlockStore, times: int) -> int:
    start = _clock()
    for _ in range(times):
        r = store.allocate(shape=(1024, 4096), dtype=BYTE)
        with r.writer() as a:
            for _row in a:
                pass
            del _row  # or it would be reported as escaped
        r.receipt  # noqa: B018
    return _clock() - start


def _one_by_one(allocator: bs.SequentialAllocator | bs.ConcurrentAllocator, count: int) -> int:
    allocate = allocator.allocate
    start = _clock()
    for _ in range(count):
        allocate(4096)
    return _clock() - start


def _many(space: bs.BlockStore | bs.SequentialAllocator | bs.ConcurrentAllocator, times: int) -> int:
    start = _clock()
    for _ in range(times):
        space.allocate_many(256, 4096)
    return _clock() - start


def _visited_many(store: bs.BlockStore, times: int) -> int:
    start = _clock()
    for _ in range(times):
        for _r in store.allocate_many(256, 4096):
            pass
    return _clock() - start


def _arrays(shared: Any, count: int) -> int:
    ndarray, shape = np.ndarray, (4096,)
    start = _clock()
    for offset in range(0, count * 4096, 4096):
        a = ndarray(shape, BYTE, shared, offset)  # noqa: F841
    return _clock() - start


def _slices(shared: Any, count: int) -> int:
    start = _clock()
    for offset in range(0, count * 4096, 4096):
        a = shared[offset : offset + 4096]  # noqa: F841
    return _clock() - start


def _plain_rows(shared: Any, count: int) -> int:
    a = np.ndarray((count, 4096), BYTE, shared)
    start = _clock()
    for _row in a:
        pass
    return _clock() - start
