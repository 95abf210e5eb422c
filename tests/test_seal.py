"""With ``guard="seal"`` nothing that outlives a writer reaches the file, not even through a raw address."""

import ctypes
import errno
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import PORTABLE

import blockstore as bs
from blockstore import _os, mapped
from blockstore.mapped import VIEW_MIN_NBYTES, MappedFile
from blockstore.writers import Writer

Array = np.ndarray[Any, Any]
Late = Callable[[], object]

MIB = 1 << 20
LATE = 0xEE
"""The byte that is written too late. No payload has it."""

windows_only = pytest.mark.skipif(PORTABLE, reason="windows are sealed on Linux only")


# -- ways to write too late -----------------------------------------------------------------------


def through_the_array(a: Array) -> Late:
    def write() -> None:
        a.flags.writeable = True
        a[...] = LATE

    return write


def through_a_slice(a: Array) -> Late:
    part = a[:]
    return lambda: part.fill(LATE)


def through_an_address(a: Array) -> Late:
    address = a.ctypes.data
    return lambda: ctypes.memset(address, LATE, a.nbytes)


ROADS = [through_the_array, through_a_slice, through_an_address]
every_road = pytest.mark.parametrize("road", ROADS, ids=["array", "slice", "address"])


def held(store: bs.BlockStore) -> Array:
    """Return the bytes of the file, read as any other program would."""
    return np.fromfile(store.path, np.uint8)


def payload(nbytes: int, seed: int = 0) -> Array:
    """Return random bytes below `LATE`."""
    return np.random.default_rng(seed).integers(1, LATE, nbytes, np.uint8)


def write_and_go_on(
    r: bs.AllocatedRange, data: Array, road: Callable[[Array], Late], *, rewrite: bool = False, failing: bool = False
) -> Array:
    """Fill a range, and write to it once more from a thread that was running at the exit.

    Returns the array, through which the late write can be seen: it did happen.
    """
    left = threading.Event()

    def go_on(late: Late) -> None:
        left.wait()
        late()

    try:
        with suppress(ZeroDivisionError), r.writer(rewrite=rewrite) as a:
            a[...] = data
            thread = threading.Thread(target=go_on, args=(road(a),))
            thread.start()
            if failing:
                raise ZeroDivisionError
    finally:
        left.set()
        thread.join()
    if not (a == LATE).all():
        raise AssertionError("the late write did not happen")
    return a


def seal_nothing(self: MappedFile, start: int, stop: int) -> None:
    """Stand in for `MappedFile.seal`, with the bug that these tests are for."""


@pytest.fixture
def create(tmp_path: Path) -> Iterator[Callable[..., bs.BlockStore]]:
    """Create sealing stores that are closed at the end."""
    stores: list[bs.BlockStore] = []

    def make(nbytes: int, **options: Any) -> bs.BlockStore:
        options = {"guard": "seal", "escaped": "ignore"} | options
        stores.append(bs.create(tmp_path / f"{len(stores)}.bin", nbytes, **options))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


Create = Callable[..., bs.BlockStore]


# -- the promise, at every size -------------------------------------------------------------------

SIZES = [
    pytest.param(1, 8192, id="1 byte"),
    pytest.param(4096, 8192, id="4 KiB"),
    pytest.param(MIB, 8192, id="1 MiB"),
    pytest.param(4 * MIB, 8192, id="4 MiB"),
    pytest.param(12 * MIB, 8192, id="12 MiB"),
    pytest.param(777, 0, id="777 bytes at the end of the file"),
    pytest.param(4 * MIB + 777, 0, id="4 MiB and 777 bytes at the end of the file"),
]


def fill_and_go_on(store: bs.BlockStore, nbytes: int, road: Callable[[Array], Late]) -> tuple[Array, Array]:
    """Fill a range after a neighbour; return what the file ought to hold after a late write, and what it holds."""
    store.allocate(4096).write(payload(4096, seed=1))
    data = payload(nbytes)
    r = store.allocate(nbytes)
    expected = np.zeros(store.nbytes, np.uint8)
    expected[:4096] = payload(4096, seed=1)
    expected[r.start : r.start + nbytes] = data

    write_and_go_on(r, data, road)

    return expected, held(store)


@every_road
@pytest.mark.parametrize(("nbytes", "rest"), SIZES)
def test_a_late_write_never_reaches_the_file(
    create: Create, nbytes: int, rest: int, road: Callable[[Array], Late]
) -> None:
    expected, found = fill_and_go_on(create(4096 + nbytes + rest), nbytes, road)

    assert np.array_equal(found, expected)


@every_road
@pytest.mark.parametrize(("nbytes", "rest"), SIZES)
def test_a_late_write_never_reaches_the_file_when_the_store_is_closed_after_it(
    create: Create, nbytes: int, rest: int, road: Callable[[Array], Late]
) -> None:
    store = create(4096 + nbytes + rest)
    expected, _ = fill_and_go_on(store, nbytes, road)

    store.close()

    assert np.array_equal(held(store), expected)


@windows_only
@every_road
def test_a_window_that_is_not_sealed_is_caught_by_the_same_check(
    create: Create, monkeypatch: pytest.MonkeyPatch, road: Callable[[Array], Late]
) -> None:
    monkeypatch.setattr(MappedFile, "seal", seal_nothing)

    expected, found = fill_and_go_on(create(8 * MIB), VIEW_MIN_NBYTES, road)

    assert not np.array_equal(found, expected)


@every_road
@pytest.mark.parametrize("nbytes", [1, 4096, MIB])
def test_a_small_view_on_the_map_is_caught_by_the_same_check(
    create: Create, nbytes: int, road: Callable[[Array], Late]
) -> None:
    store = create(2 * MIB)
    store._writer = Writer  # what the other guard lends

    expected, found = fill_and_go_on(store, nbytes, road)

    assert not np.array_equal(found, expected)


# -- a thread that never stops --------------------------------------------------------------------


def snapshots_around_a_busy_thread(store: bs.BlockStore, nbytes: int) -> tuple[Array, Array]:
    """Leave a writer while a thread fills its view over and over; return the file after the exit, and later."""
    stop, beats = threading.Event(), threading.Semaphore(0)

    def fill(numbers: Array) -> None:
        for value in itertools.count(1):
            numbers[...] = value
            beats.release()
            if stop.is_set():
                return

    def wait_for_beats(count: int) -> None:
        for _ in range(count):
            beats.acquire()

    try:
        with store.allocate(nbytes).writer() as a:
            thread = threading.Thread(target=fill, args=(a.view(np.uint64),))
            thread.start()
            wait_for_beats(2)
        before = held(store)
        while beats.acquire(blocking=False):
            pass
        wait_for_beats(3)
        return before, held(store)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("nbytes", [4096, MIB, 4 * MIB])
def test_a_thread_that_writes_through_the_exit_is_cut_off_by_it(create: Create, nbytes: int) -> None:
    before, after = snapshots_around_a_busy_thread(create(4 * MIB), nbytes)

    assert np.array_equal(after, before)


def test_a_busy_thread_is_caught_where_nothing_cuts_it_off(create: Create) -> None:
    before, after = snapshots_around_a_busy_thread(create(4 * MIB, guard="flag"), 4 * MIB)

    assert not np.array_equal(after, before)


def test_windows_that_are_sealed_at_once_in_many_threads_keep_to_themselves(create: Create) -> None:
    store = create(32 * MIB)

    def work() -> None:
        for r in store.ranges(4 * MIB):
            write_and_go_on(r, payload(4 * MIB, seed=r.start), through_an_address)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    parts = [payload(4 * MIB, seed=start) for start in range(0, 32 * MIB, 4 * MIB)]
    assert np.array_equal(held(store), np.concatenate(parts))


# -- late reads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("nbytes", "rest"), SIZES)
def test_a_late_read_sees_what_was_written(create: Create, nbytes: int, rest: int) -> None:
    with create(nbytes + rest).allocate(nbytes).writer() as a:
        a[...] = payload(nbytes)

    assert np.array_equal(a, payload(nbytes))


@pytest.mark.parametrize(("nbytes", "rest"), SIZES)
def test_a_read_after_closing_sees_what_was_written(create: Create, nbytes: int, rest: int) -> None:
    store = create(nbytes + rest)
    with store.allocate(nbytes).writer() as a:
        a[...] = payload(nbytes)

    store.close()

    assert np.array_equal(a, payload(nbytes))


@every_road
@pytest.mark.parametrize(("nbytes", "rest"), SIZES)
def test_read_is_not_affected_by_a_late_write(
    create: Create, nbytes: int, rest: int, road: Callable[[Array], Late]
) -> None:
    r = create(nbytes + rest).allocate(nbytes)

    write_and_go_on(r, payload(nbytes), road)

    assert np.array_equal(r.read(), payload(nbytes))


def test_what_is_read_in_the_body_is_what_the_file_held(create: Create) -> None:
    store = create(8 * MIB)
    store.raw.write_at(0, payload(8 * MIB))
    store.close()

    with bs.open(store.path, discard=True, guard="seal") as store:
        large, small = store.allocate(4 * MIB), store.allocate(100)
        with large.writer() as a, small.writer() as b:
            seen = np.concatenate([a, b])

    assert np.array_equal(seen, payload(8 * MIB)[: 4 * MIB + 100])


@pytest.mark.parametrize(
    "options", [{"guard": "flag"}, {"guard": "seal"}, {"guard": "flag", "access": "sparse"}], ids=str
)
@pytest.mark.parametrize("nbytes", [100, 4 * MIB], ids=["100 bytes", "4 MiB"])
def test_what_raw_access_wrote_is_seen_in_the_body_and_kept(
    create: Create, options: dict[str, Any], nbytes: int
) -> None:
    store = create(4 * MIB, **options)
    r = store.allocate(nbytes)
    store.raw.write_at(r.start, b"header")

    with r.writer() as a:
        a[6:] = 1

    assert held(store)[:8].tobytes() == b"header\1\1"


@pytest.mark.parametrize(
    "options", [{"guard": "flag"}, {"guard": "seal"}, {"guard": "flag", "access": "sparse"}], ids=str
)
def test_the_padding_of_records_stays_what_the_file_held(create: Create, options: dict[str, Any]) -> None:
    store = create(4096, **options)
    store.raw.fill(0, 4096, 0xAB)
    r = store.allocate(shape=50, dtype=np.dtype([("x", "u1"), ("y", "<u8")], align=True))
    for _ in range(50):
        np.full(r.nbytes, 0xCD, np.uint8)  # is freed at once, and what an uninitialized array of this size may show

    with r.writer() as a:
        a["x"] = 1
        a["y"] = 2

    assert held(store)[: r.nbytes].tobytes() == (b"\1" + b"\xab" * 7 + b"\2" + bytes(7)) * 50


# -- bodies that raise ----------------------------------------------------------------------------


@every_road
@pytest.mark.parametrize("nbytes", [100, 4 * MIB], ids=["100 bytes", "4 MiB"])
def test_after_a_body_that_raised_a_late_write_never_reaches_the_file(
    create: Create, nbytes: int, road: Callable[[Array], Late]
) -> None:
    store = create(4 * MIB)

    write_and_go_on(store.allocate(nbytes), payload(nbytes), road, failing=True)

    assert LATE not in held(store)


@windows_only
def test_a_window_that_a_failed_body_leaves_unsealed_is_caught_by_the_same_check(
    create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MappedFile, "seal", seal_nothing)
    store = create(4 * MIB)

    write_and_go_on(store.allocate(4 * MIB), payload(4 * MIB), through_an_address, failing=True)

    assert LATE in held(store)


def test_a_small_body_that_raised_leaves_the_file_as_it_was(create: Create) -> None:
    store = create(MIB)

    write_and_go_on(store.allocate(MIB), payload(MIB), through_an_address, failing=True)

    assert not held(store).any()


@pytest.mark.parametrize("nbytes", [100, 4 * MIB], ids=["100 bytes", "4 MiB"])
def test_a_range_whose_first_writer_failed_is_written_by_the_second(create: Create, nbytes: int) -> None:
    store = create(4 * MIB)
    r = store.allocate(nbytes)
    first = write_and_go_on(r, payload(nbytes, seed=1), through_the_array, failing=True)

    write_and_go_on(r, payload(nbytes), through_the_array)

    assert np.array_equal(held(store)[:nbytes], payload(nbytes))
    assert (first == LATE).all()


def write_failing_then_split(store: bs.BlockStore) -> tuple[bs.AllocatedRange, bs.AllocatedRange]:
    """Return the halves of a large range whose first writer failed."""
    r = store.allocate(8 * MIB)
    write_and_go_on(r, payload(8 * MIB, seed=1), through_the_array, failing=True)
    low, high = r.split_up(4 * MIB)
    if low is None or high is None:
        raise AssertionError("the range was not split in two")
    return low, high


def test_the_parts_of_a_range_whose_writer_failed_can_be_written(create: Create) -> None:
    store = create(8 * MIB)

    for part in write_failing_then_split(store):
        write_and_go_on(part, payload(4 * MIB, seed=part.start), through_the_array)

    assert np.array_equal(held(store), np.concatenate([payload(4 * MIB, seed=0), payload(4 * MIB, seed=4 * MIB)]))


@windows_only
def test_a_part_that_forgot_its_failed_writer_would_lose_its_data(create: Create) -> None:
    store = create(8 * MIB)
    low, _ = write_failing_then_split(store)
    low._touched = False  # its window is cut off from the file already

    write_and_go_on(low, payload(4 * MIB), through_the_array)

    assert not np.array_equal(held(store)[: 4 * MIB], payload(4 * MIB))


# -- rewriting ------------------------------------------------------------------------------------


@every_road
@pytest.mark.parametrize("nbytes", [100, 4 * MIB], ids=["100 bytes", "4 MiB"])
def test_a_sealed_range_is_rewritten_and_sealed_again(
    create: Create, nbytes: int, road: Callable[[Array], Late]
) -> None:
    store = create(4 * MIB)
    r = store.allocate(nbytes)
    with r.writer() as a:
        a[...] = payload(nbytes, seed=1)

    write_and_go_on(r, payload(nbytes), road, rewrite=True)

    assert np.array_equal(held(store)[:nbytes], payload(nbytes))


@pytest.mark.parametrize("nbytes", [100, 4 * MIB], ids=["100 bytes", "4 MiB"])
def test_a_rewrite_begins_with_what_the_file_holds_and_not_with_a_late_write(create: Create, nbytes: int) -> None:
    r = create(4 * MIB).allocate(nbytes)
    write_and_go_on(r, payload(nbytes), through_the_array)

    with r.writer(rewrite=True) as a:
        seen = a.copy()

    assert np.array_equal(seen, payload(nbytes))


@pytest.mark.parametrize("nbytes", [100, 4 * MIB], ids=["100 bytes", "4 MiB"])
def test_the_array_of_the_first_writer_does_not_reach_a_rewrite(create: Create, nbytes: int) -> None:
    store = create(4 * MIB)
    r = store.allocate(nbytes)
    with r.writer() as first:
        first[...] = payload(nbytes, seed=1)
    late = through_the_array(first)
    del first

    with r.writer(rewrite=True) as a:
        a[...] = payload(nbytes)
        late()

    assert np.array_equal(held(store)[:nbytes], payload(nbytes))


# -- closing --------------------------------------------------------------------------------------


@every_road
@pytest.mark.parametrize("nbytes", [100, 4 * MIB], ids=["100 bytes", "4 MiB"])
def test_a_writer_that_is_inside_when_the_store_is_closed_is_cut_off(
    create: Create, nbytes: int, road: Callable[[Array], Late]
) -> None:
    store = create(4 * MIB)
    r = store.allocate(nbytes)

    def close_inside() -> Late:
        with suppress(bs.ClosedStoreError), r.writer() as a:
            late = road(a)
            store.close()
            late()
        return late

    close_inside()()

    assert LATE not in held(store)


@windows_only
def test_a_writer_that_closing_does_not_cut_off_is_caught_by_the_same_check(
    create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MappedFile, "seal", seal_nothing)
    store = create(4 * MIB)

    with suppress(bs.ClosedStoreError), store.allocate(4 * MIB).writer() as a:
        store.close()
        a[...] = LATE

    assert LATE in held(store)


# -- when windows run out -------------------------------------------------------------------------


@windows_only
def test_views_are_private_buffers_once_the_windows_are_used_up(
    create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "_windows_left", [None, None])
    kinds = []

    for r in create(16 * MIB).ranges(4 * MIB):
        with r.writer() as a:
            kinds.append(type(a.base.base))

    assert kinds == [np.memmap, np.memmap, type(None), type(None)]


def test_more_views_than_there_are_windows_are_all_sealed(create: Create, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_windows_left", [None, None])
    store = create(16 * MIB)

    for r in store.ranges(4 * MIB):
        write_and_go_on(r, payload(4 * MIB, seed=r.start), through_an_address)

    parts = [payload(4 * MIB, seed=start) for start in range(0, 16 * MIB, 4 * MIB)]
    assert np.array_equal(held(store), np.concatenate(parts))


@windows_only
def test_a_store_that_is_closed_gives_its_windows_back(create: Create, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_windows_left", [None, None])
    kinds = []

    for _ in range(2):
        with create(8 * MIB) as store:
            for r in store.ranges(4 * MIB):
                with r.writer() as a:
                    kinds.append(type(a.base.base))

    assert kinds == [np.memmap] * 4


@pytest.fixture
def refusing_system(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the system have no mapping left, as a process with very many does."""

    def refuse(file: _os.File, windows: _os.Map, start: int, stop: int) -> None:
        raise OSError(errno.ENOMEM, "no mapping left")

    with monkeypatch.context() as patch:
        patch.setattr(_os, "seal", refuse)
        yield


def write_whole(r: bs.AllocatedRange, kept: list[Array]) -> None:
    with r.writer() as a:
        a[...] = 1
        kept.append(a[:10])


@windows_only
def test_a_seal_that_the_system_refuses_is_an_error_without_a_receipt(create: Create, refusing_system: None) -> None:
    r = create(4 * MIB).allocate(4 * MIB)

    with pytest.raises(OSError, match="no mapping left"):
        write_whole(r, [])

    assert r.receipt is None


@windows_only
def test_a_view_that_could_not_be_sealed_keeps_new_writers_out(create: Create, refusing_system: None) -> None:
    r = create(4 * MIB).allocate(4 * MIB)
    kept: list[Array] = []
    with pytest.raises(OSError, match="no mapping left"):
        write_whole(r, kept)

    with pytest.raises(bs.EscapedViewError, match="no new writer while they live"), r.writer():
        pass
