"""What the Rust crate ranged-mmap has, and what becomes of it: one test for each row of that comparison.

The names say what is true here. What the crate does instead is in the comments, where it is not the same.
"""

import asyncio
import ctypes
import errno
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import contents, in_threads, run_python

import blockstore as bs
from blockstore import _os

ALLOCATORS = ["sequential", "concurrent"]

each_allocator = pytest.mark.parametrize("allocator", ALLOCATORS)


@each_allocator
def test_create_and_open_take_an_allocator_and_an_existing_file_is_replaced_only_on_request(
    tmp_path: Path, allocator: Any
) -> None:  # the crate truncates it silently
    with bs.create(tmp_path / "data.bin", 8192, allocator=allocator) as store:
        store.allocate(5).write(b"hello")

    with pytest.raises(FileExistsError, match="the file exists; open\\(\\) it, or pass overwrite=True"):
        bs.create(tmp_path / "data.bin", 8192, allocator=allocator)
    kept = contents(store)[:5]
    with bs.open(tmp_path / "data.bin", allocator=allocator) as opened:
        kinds = type(store.allocator).__name__, type(opened.allocator).__name__
    bs.create(tmp_path / "data.bin", 4096, allocator=allocator, overwrite=True).close()

    assert kept == b"hello"
    assert kinds == (f"{allocator.title()}Allocator",) * 2
    assert contents(store) == bytes(4096)


@each_allocator
def test_open_knows_what_was_written_and_hands_out_none_of_it_unless_it_is_to_be_discarded(
    tmp_path: Path, allocator: Any
) -> None:
    with bs.create(tmp_path / "data.bin", 8192, allocator=allocator) as store:
        store.allocate(5, tag=7).write(b"hello")

    with bs.open(tmp_path / "data.bin") as store:  # the crate begins at 0 again, over the data
        known, free, kind = store.receipts().tolist(), store.free, type(store.allocator).__name__
        r = store.allocate(4096)
        with pytest.raises(bs.OutOfSpaceError, match="cannot allocate 1 bytes: 0 bytes are free"):
            store.allocate(1)
    with bs.open(tmp_path / "data.bin", allocator=allocator, discard=True) as store:
        discarded = store.free, len(store.receipts())

    assert (known, free, kind) == ([(0, 4096, 5, 7, True, 0)], 4096, f"{allocator.title()}Allocator")
    assert (r.start, r.stop, contents(store)[:5]) == (4096, 8192, b"hello")
    assert discarded == (8192, 0)


@each_allocator
def test_allocate_raises_with_both_numbers_and_burns_nothing_and_the_short_tail_is_taken_on_purpose(
    tmp_path: Path, allocator: Any
) -> None:  # the crate returns None, or a range that is silently shorter
    with bs.create(tmp_path / "data.bin", 10_000, allocator=allocator) as store:
        store.allocate(4096)
        with pytest.raises(bs.OutOfSpaceError, match="cannot allocate 8192 bytes: 5904 bytes are free") as caught:
            store.allocate(8192)
        free = store.free
        first = store.allocate(4096, partial=True)
        rest = list(store.ranges(4096))

    assert (caught.value.requested, caught.value.free, free) == (8192, 5904, 5904)
    assert (first.nbytes, [r.nbytes for r in rest]) == (4096, [1808])


@each_allocator
def test_both_allocators_account_for_every_byte_while_many_threads_allocate(tmp_path: Path, allocator: Any) -> None:
    with bs.create(tmp_path / "data.bin", 1 << 22, allocator=allocator, reserve=False) as store:
        space = store.allocator
        fresh = space.free, space.next_start, space.nbytes
        store.allocate(5000)
        used = space.free, space.next_start, space.nbytes
        parts = in_threads(4, lambda thread: [(r.start, r.stop) for r in store.ranges(4096 * (thread + 1))])
        full = space.free, space.next_start, space.nbytes

    ranges = sorted(r for part in parts for r in part)
    assert fresh == (1 << 22, 0, 1 << 22)
    assert used == ((1 << 22) - 8192, 8192, 1 << 22)
    assert full == (0, 1 << 22, 1 << 22)
    assert all(below[1] == above[0] for below, above in pairwise(ranges))
    assert (ranges[0][0], ranges[-1][1]) == (8192, 1 << 22)


def test_a_range_has_one_writer_at_a_time_is_spent_once_split_and_counts_in_its_own_store_only(
    tmp_path: Path,
) -> None:  # the crate's are copied freely
    with bs.create(tmp_path / "data.bin", 1 << 16) as store, bs.create(tmp_path / "other.bin", 4096) as other:
        r, split = store.allocate(5), store.allocate(8192)
        with r.writer() as a:
            with pytest.raises(bs.WriterBusyError, match="another writer is inside"):
                r.write(b"world")
            a[:] = list(b"hello")
        split.split_up(4096)
        with pytest.raises(bs.SpentRangeError, match="it was split: use its parts"):
            split.write(bytes(8192))
        with pytest.raises(bs.ForeignRangeError, match=r"other\.bin"):
            other.flush(r.receipt)

    assert contents(store) == b"hello" + bytes(store.nbytes - 5)


LENGTHS = """
import sys
import blockstore as bs

store = bs.create(sys.argv[1], 8192)
r = store.allocate(5000)
for nbytes in 0, 4999, 5001, 8192:
    try:
        r.write(bytes([1]) * nbytes)
    except bs.LengthError as error:
        print(error)
print(__debug__, store.raw.array(0, 8192).any(), r.receipt)
store.close()
"""


def test_a_length_is_checked_before_a_byte_moves_without_debug_assertions_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # the crate checks in debug builds only
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")

    ran = run_python(LENGTHS, tmp_path / "data.bin")

    refused = [f"the range takes exactly 5000 bytes, {nbytes} bytes were given" for nbytes in (0, 4999, 5001, 8192)]
    assert (ran.stdout.splitlines(), ran.stderr) == ([*refused, "False False None"], "")


def test_a_writer_fills_the_file_in_place_and_write_copies(tmp_path: Path) -> None:  # the crate copies
    data = np.arange(1000.0)
    with bs.create(tmp_path / "data.bin", 1 << 16) as store:
        in_place, copied = store.allocate(shape=1000, dtype="f8"), store.allocate(shape=1000, dtype="f8")
        with in_place.writer() as a:
            shared = np.shares_memory(a, store.raw.array(in_place.start, 8000))
            np.multiply(data, 2, out=a)
        copied.write(data)
        data[:] = -1
        read = in_place.read().copy(), copied.read().copy()

    assert shared
    assert np.array_equal(read[0], np.arange(1000.0) * 2)
    assert np.array_equal(read[1], np.arange(1000.0))


def test_flush_waits_for_the_disk_and_without_waiting_starts_write_back_and_promises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # the crate's flush_range is MS_ASYNC, which does nothing on Linux
    calls: list[tuple[Any, ...]] = []
    sync, start = _os.sync, _os.start_writeback
    with bs.create(tmp_path / "data.bin", 1 << 16) as store:
        store.allocate(4096)
        receipt = store.allocate(5000).write(bytes(5000))
        monkeypatch.setattr(_os, "sync", lambda *a: calls.append(("sync", receipt.durable, sync(*a))))
        monkeypatch.setattr(_os, "start_writeback", lambda f, *a: calls.append(("start", *a, start(f, *a))))

        states = [(store.flush(receipt, wait=False), receipt.durable), (store.flush(receipt), receipt.durable)]

    assert states == [(0, False), (1, True)]
    assert calls == [("start", 4096, 12288, None), ("sync", False, None), ("sync", False, None)]  # data, then journal


def test_flush_makes_every_receipt_durable_and_sync_covers_all_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bs.create(tmp_path / "data.bin", 1 << 16) as store:
        for r in store.allocate_many(3, 100):
            r.write(bytes(100))
        written = store.receipts()["durable"].tolist()
        flushed, again = store.flush(), store.flush()
        durable = store.receipts()["durable"].tolist()
        store.raw.write_at(0, b"header")  # which leaves no receipt, so that only a sync covers it
        syncs: list[object] = []
        sync = _os.sync
        monkeypatch.setattr(_os, "sync", lambda *args: syncs.append(sync(*args)))
        store.flush()
        without = len(syncs)
        store.sync()

    assert (written, flushed, durable, again) == ([False] * 3, 3, [True] * 3, 0)
    assert (without, len(syncs)) == (0, 1)


def test_splits_return_low_and_high_none_for_an_empty_side_and_refuse_what_is_out_of_bounds(
    tmp_path: Path,
) -> None:  # the crate has enums of three variants
    def bounds(parts: tuple[bs.AllocatedRange | None, ...]) -> list[tuple[int, int, int] | None]:
        return [None if r is None else (r.start, r.stop, r.nbytes) for r in parts]

    with bs.create(tmp_path / "data.bin", 1 << 16) as store:
        up, down, none_low, none_high = (store.allocate(8192) for _ in range(4))
        with pytest.raises(ValueError, match="offset 8193 is out of bounds"):
            up.split_up(8193)
        with pytest.raises(ValueError, match="offset -1 is out of bounds"):
            down.split_down(-1)
        splits = [
            bounds(parts)
            for parts in (up.split_up(1), down.split_down(4097), none_low.split_down(4095), none_high.split_up(4097))
        ]

    assert splits == [
        [(0, 4096, 4096), (4096, 8192, 4096)],
        [(8192, 12288, 4096), (12288, 16384, 4096)],
        [None, (16384, 24576, 8192)],
        [(24576, 32768, 8192), None],
    ]


def test_read_is_read_only_and_copies_nothing_and_raw_read_at_copies(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 4096) as store:
        r = store.allocate(5)
        r.write(b"hello")
        a, copied = r.read(), store.raw.read_at(0, 5)
        r.write(b"HELLO", rewrite=True)
        with pytest.raises(ValueError, match="read-only"):
            a[0] = 0
        shown = a.tobytes()

    assert (shown, copied) == (b"HELLO", b"hello")


def test_raw_access_writes_reads_fills_zeroes_flushes_and_lends_arrays_and_addresses(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 8192) as store:
        raw = store.raw
        count = raw.write_at(100, b"hello")
        raw.fill(200, 10, 7)
        raw.zero(205, 5)
        raw.flush_range(100, 110)
        raw.array(300, (2, 2), "u1")[:] = [[1, 2], [3, 4]]
        ctypes.memset(raw.address(400), 9, 3)
        read = raw.read_at(100, 5)

    expected = np.zeros(8192, np.uint8)
    expected[100:105] = list(b"hello")
    expected[200:205] = 7
    expected[300:304] = [1, 2, 3, 4]
    expected[400:403] = 9
    assert (count, read, contents(store)) == (5, b"hello", expected.tobytes())


def test_many_ranges_come_of_one_reservation_and_many_rows_of_one_range_with_one_receipt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # the crate has no batches
    with bs.create(tmp_path / "data.bin", 1 << 20) as store:
        takes: list[int] = []
        take = store.allocator._take
        monkeypatch.setattr(store.allocator, "_take", lambda n, partial: takes.append(n) or take(n, partial))
        rs = store.allocate_many(100, 5000)
        starts = [r.start for r in rs]
        rows = store.allocate(shape=(1000, 8), dtype="u4")
        with rows.writer() as a:
            for number, row in enumerate(a):
                row[:] = number
            del row
        receipts = store.receipts()

    held = np.fromfile(store.path, "u4", 8000, offset=rows.start).reshape(1000, 8)
    assert (starts, len(takes)) == (list(range(0, 100 * 8192, 8192)), 1)
    assert receipts["nbytes"].tolist() == [32_000]
    assert np.array_equal(held, np.repeat(np.arange(1000), 8).reshape(1000, 8))


READ_PICKLES = """
import pickle, sys
from pathlib import Path

store = pickle.loads(Path(sys.argv[1]).read_bytes())
r = pickle.loads(Path(sys.argv[2]).read_bytes())
receipts = pickle.loads(Path(sys.argv[3]).read_bytes())
a = r.read()
print(store.mode, r.start, r.nbytes, a.dtype, a.shape, int(a.sum()), receipts["tag"].tolist())
store.close()
"""


def test_receipts_are_a_structured_array_and_stores_and_written_ranges_pickle_by_reference(tmp_path: Path) -> None:
    sizes, answers = set(), []
    for count in 100, 1_000_000:
        path = tmp_path / f"{count}.bin"
        with bs.create(path, 5 << 20) as store:
            r = store.allocate(shape=count, dtype="u4", tag=7)
            r.write(np.ones(count, "u4"))
            store.flush()
            pickles = [pickle.dumps(store), pickle.dumps(r), pickle.dumps(store.receipts())]
            paths = [tmp_path / f"{count}.{index}" for index in range(3)]
            for where, pickled in zip(paths, pickles, strict=True):
                where.write_bytes(pickled)
            ran = run_python(READ_PICKLES, *paths)
        sizes.add(max(len(pickled) for pickled in pickles) // 1000)
        answers.append((ran.stdout, ran.stderr))

    assert store.receipts().dtype.names == ("start", "stop", "nbytes", "tag", "durable", "checksum")
    assert sizes == {0}
    assert answers == [(f"r 0 {4 * n} uint32 ({n},) {n} [7]\n", "") for n in (100, 1_000_000)]


def by_threads(work: Callable[[int], object], count: int) -> None:
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


def by_asyncio(work: Callable[[int], object], count: int) -> None:
    async def main() -> None:
        await asyncio.gather(*(asyncio.to_thread(work, number) for number in range(count)))

    asyncio.run(main())


def by_trio(work: Callable[[int], object], count: int) -> None:
    trio = pytest.importorskip("trio")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(trio.to_thread.run_sync, work, number)

    trio.run(main)


@pytest.mark.parametrize("run", [by_threads, by_asyncio, by_trio])
def test_a_store_is_shared_among_the_threads_of_any_runtime(
    tmp_path: Path, run: Callable[[Callable[[int], object], int], None]
) -> None:
    threads = set()
    with bs.create(tmp_path / "data.bin", 8 << 12, allocator="concurrent") as store:
        together = threading.Barrier(4)

        def work(number: int) -> None:
            together.wait(60)
            threads.add(threading.get_ident())
            for part in range(2):
                r = store.allocate(4096, tag=number * 2 + part)
                with r.writer() as a:
                    a[:] = r.tag + 1
                store.flush(r.receipt)

        run(work, 4)
        receipts = store.receipts()

    held = np.fromfile(store.path, np.uint8).reshape(8, 4096)
    assert (len(threads), sorted(receipts["tag"].tolist())) == (4, list(range(8)))
    assert receipts["durable"].all()
    assert np.array_equal(held, np.repeat(receipts["tag"].astype("u1") + 1, 4096).reshape(8, 4096))


@pytest.mark.skipif(not hasattr(os, "fstatvfs"), reason="this system does not say what the disk has left")
def test_space_is_reserved_at_creation_so_that_a_full_disk_is_an_error_there_and_then(tmp_path: Path) -> None:
    bs.create(tmp_path / "data.bin", 1 << 20).close()  # the crate's is sparse: a full disk kills the process
    disk = os.statvfs(tmp_path)

    with pytest.raises(OSError, match=r"cannot reserve \d+ bytes: the disk has") as caught:
        bs.create(tmp_path / "large.bin", disk.f_blocks * disk.f_frsize + 1)

    assert (caught.value.errno, sorted(os.listdir(tmp_path))) == (errno.ENOSPC, ["data.bin", "data.bin.journal"])
    assert os.stat(tmp_path / "data.bin").st_blocks * 512 >= 1 << 20


def test_a_range_has_a_shape_and_a_dtype_and_refuses_others(tmp_path: Path) -> None:  # the crate's is bytes
    with bs.create(tmp_path / "data.bin", 1 << 16) as store:
        r = store.allocate(shape=(2, 3), dtype="f8")
        with pytest.raises(bs.DtypeError, match="the range holds float64, an array of int64 was given"):
            r.write(np.zeros((2, 3), "i8"))
        with pytest.raises(bs.LayoutError, match=r"the range has shape \(2, 3\), an array of shape \(3, 2\) was given"):
            r.write(np.zeros((3, 2)))
        with r.writer() as a:
            a[:] = [[1, 2, 3], [4, 5, 6]]
        read = r.read()

    assert (read.dtype, read.tolist()) == (np.dtype("f8"), [[1, 2, 3], [4, 5, 6]])
