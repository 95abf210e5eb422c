"""Arrays outlive writers, ranges and stores; stores that are closed say so, and close nobody else's file."""

import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import PORTABLE, USES, contents, run_python, uses_of

import blockstore as bs

Array = np.ndarray[Any, Any]

linux_only = pytest.mark.skipif(PORTABLE, reason="says what Linux does")

HANG_SECONDS = 60
"""After which a test that hangs fails."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[bs.BlockStore]:
    with bs.create(tmp_path / "data.bin", 1 << 17) as store:
        yield store


def bases(a: Array) -> list[Any]:
    """Return the array and what it rests on, one below the other."""
    chain: list[Any] = [a]
    while getattr(chain[-1], "base", None) is not None:
        chain.append(chain[-1].base)
    return chain


# -- what arrays rest on --------------------------------------------------------------------------


def test_a_writers_array_is_a_plain_ndarray(store: bs.BlockStore) -> None:
    with store.allocate(shape=(2, 3), dtype="f8").writer() as a:
        kinds = [type(base) for base in bases(a)[:3]]

    assert kinds == [np.ndarray, np.ndarray, np.memmap]


def test_a_writers_array_shares_its_memory_with_the_map_of_the_store(store: bs.BlockStore) -> None:
    store.allocate(100)

    with store.allocate(100).writer() as a:
        shared = np.shares_memory(a, store.raw.array(4096, 100))

    assert shared


def test_a_read_shares_its_memory_with_the_map_of_the_store(store: bs.BlockStore) -> None:
    r = store.allocate(100)
    r.write(bytes(100))

    assert np.shares_memory(r.read(), store.raw.array(r.start, 100))


@pytest.mark.parametrize("size", [1, 100, 4096, 5000])
def test_a_writers_array_covers_the_bytes_that_were_asked_for_and_no_more(store: bs.BlockStore, size: int) -> None:
    store.raw.fill(0, store.nbytes, 7)
    r = store.allocate(size)

    with r.writer() as a:
        a[...] = 1

    assert contents(store) == b"\1" * size + b"\7" * (store.nbytes - size)


def test_no_array_below_a_read_can_be_made_writable(store: bs.BlockStore) -> None:
    r = store.allocate(100)
    r.write(bytes(100))

    for base in bases(r.read()):
        if isinstance(base, np.ndarray):
            with pytest.raises(ValueError, match="cannot set WRITEABLE flag to True"):
                base.setflags(write=True)


def test_a_read_array_lends_no_writable_buffer(store: bs.BlockStore) -> None:
    r = store.allocate(100)
    r.write(bytes(100))

    assert [memoryview(base).readonly for base in bases(r.read())[:-1]] == [True, True]


@pytest.mark.parametrize(
    "take",
    [
        pytest.param(lambda store, r: r.read(), id="read"),
        pytest.param(lambda store, r: store.raw.array(0, 5), id="raw.array"),
    ],
)
def test_an_array_shows_later_rewrites_of_its_range(
    store: bs.BlockStore, take: Callable[[bs.BlockStore, bs.AllocatedRange], Array]
) -> None:
    r = store.allocate(5)
    r.write(b"hello")
    a = take(store, r)

    r.write(b"HELLO", rewrite=True)

    assert a.tobytes() == b"HELLO"


# -- arrays outlive the store ---------------------------------------------------------------------


def map_below(a: Array) -> Any:
    """Return the `mmap.mmap` that an array rests on."""
    return next(base for base in bases(a) if isinstance(base, np.memmap))._mmap  # type: ignore[attr-defined]


def test_the_map_below_a_writers_array_cannot_be_closed(store: bs.BlockStore) -> None:
    with store.allocate(100).writer() as a, pytest.raises(BufferError, match="exported pointers exist"):
        map_below(a).close()


def test_the_map_below_an_array_cannot_be_closed_when_the_store_is(store: bs.BlockStore) -> None:
    a = store.raw.array(0, 100)
    store.close()
    gc.collect()

    with pytest.raises(BufferError, match="exported pointers exist"):
        map_below(a).close()


OUTLIVE = """
import gc, sys, warnings
import numpy as np
import blockstore as bs

warnings.simplefilter("ignore", bs.EscapedViewWarning)
store = bs.create(sys.argv[1], 16 << 20, **eval(sys.argv[2]))
large = store.allocate(shape=(1024, 512), dtype="f8")
small = store.allocate(shape=(4, 8), dtype="f8")
arrays = []
for r in large, small:
    with r.writer() as a:
        a[:] = 3
        arrays += [a, a[1:]]
    arrays += [r.read(), store.raw.array(r.start, (2, 2), "f8")]
store.close()
del store, large, small, r
gc.collect()
print(sorted({float(a.min()) for a in arrays} | {float(a.max()) for a in arrays}), len(arrays))
"""


@pytest.mark.parametrize(
    "options",
    [{"guard": "flag"}, {"guard": "seal"}, {"access": "sparse"}, {"access": "dense"}, {"reserve": False}],
    ids=str,
)
def test_every_array_outlives_its_store_with_its_values(tmp_path: Path, options: dict[str, Any]) -> None:
    ran = run_python(OUTLIVE, tmp_path / "data.bin", options)

    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "[3.0] 8\n", "")


UNPINNED = """
import sys
import blockstore as bs
from blockstore import mapped

if sys.platform != "win32":
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
drop = mapped.MappedFile.drop
def drop_and_unmap(self):
    shared = self.map
    drop(self)
    shared._blockstore_pin.release()
    shared._mmap.close()
mapped.MappedFile.drop = drop_and_unmap
store = bs.create(sys.argv[1], 1 << 20)
a = store.raw.array(0, 100)
del store.raw._owner._mapped.frozen
store.close()
print(a.sum())
"""


@linux_only
def test_an_array_whose_map_is_closed_kills_the_process_which_is_what_the_others_would_show(tmp_path: Path) -> None:
    ran = run_python(UNPINNED, tmp_path / "data.bin")

    assert (ran.returncode, ran.stdout) == (-signal.SIGSEGV, ""), ran.stderr


def mapped_of(folder: Path) -> list[str]:
    """Return the names of the files of a folder that this process has mapped."""
    inodes = {str(path.stat().st_ino): path.name for path in folder.iterdir()}
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return sorted({inodes[fields[4]] for fields in lines if fields[4] in inodes})


def opened_of(folder: Path) -> list[str]:
    """Return the names of the files of a folder that this process has open."""
    opened = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            opened.add(os.stat(f"/proc/self/fd/{name}").st_ino)
    return sorted(path.name for path in folder.iterdir() if path.stat().st_ino in opened)


@linux_only
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_closed_store_holds_on_to_no_map_of_its_files(tmp_path: Path, mode: Any) -> None:
    bs.create(tmp_path / "data.bin", 1 << 16).close()
    store = bs.open(tmp_path / "data.bin", mode=mode)
    before = mapped_of(tmp_path)

    store.close()

    assert (before, mapped_of(tmp_path)) == (["data.bin", "data.bin.journal"][: 2 if mode == "r+" else 1], [])


@linux_only
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_closed_store_holds_on_to_no_descriptor_of_its_files(tmp_path: Path, mode: Any) -> None:
    bs.create(tmp_path / "data.bin", 1 << 16).close()
    store = bs.open(tmp_path / "data.bin", mode=mode)
    before = opened_of(tmp_path)

    store.close()

    assert (before, opened_of(tmp_path)) == (["data.bin", "data.bin.journal"][: 2 if mode == "r+" else 1], [])


@linux_only
def test_a_store_whose_arrays_are_alive_keeps_nobody_from_its_file_once_it_is_closed(store: bs.BlockStore) -> None:
    with store.allocate(5).writer() as a:
        a[...] = 7
    store.close()

    with bs.open(store.path) as again:
        assert len(again.receipts()) == 1

    assert a.tolist() == [7] * 5


# -- closing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(USES))
def test_a_closed_store_refuses(store: bs.BlockStore, name: str) -> None:
    uses = uses_of(store)
    store.close()

    with pytest.raises(bs.ClosedStoreError, match=r"data\.bin' is closed"):
        USES[name](uses)
    uses.stack.pop_all()


@pytest.mark.parametrize("name", list(USES))
def test_an_open_store_refuses_none_of_that(store: bs.BlockStore, name: str) -> None:
    uses = uses_of(store)

    USES[name](uses)

    assert not store.closed
    uses.stack.close()


def test_a_closed_store_still_says_what_was_written(store: bs.BlockStore) -> None:
    store.allocate(5, tag=3).write(b"hello")

    store.close()

    assert store.receipts().tolist() == [(0, 4096, 5, 3, True, 0)]
    assert store.pending().tolist() == [(4096, 1 << 17, (1 << 17) - 4096)]


def test_a_refused_rewrite_leaves_the_receipt_standing(store: bs.BlockStore) -> None:
    r = store.allocate(5)
    receipt = r.write(b"hello")
    store.close()

    with pytest.raises(bs.ClosedStoreError, match="is closed"):
        r.write(b"HELLO", rewrite=True)

    assert (receipt.revoked, receipt.durable, contents(store)[:5]) == (False, True, b"hello")


def test_closing_twice_does_nothing(store: bs.BlockStore) -> None:
    store.close()
    store.close()

    assert store.closed


def test_an_error_in_the_body_of_a_store_closes_it_with_what_was_written(tmp_path: Path) -> None:
    store = bs.create(tmp_path / "data.bin", 4096)
    receipt = store.allocate(5).write(b"hello")

    with pytest.raises(ZeroDivisionError), store:
        raise ZeroDivisionError

    assert (store.closed, receipt.durable) == (True, True)


@pytest.mark.parametrize("options", [{}, {"guard": "seal"}, {"access": "sparse"}], ids=str)
def test_a_writer_that_is_inside_when_the_store_is_closed_gets_no_receipt(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    store = bs.create(tmp_path / "data.bin", 1 << 16, **options)
    r = store.allocate(100)

    with pytest.raises(bs.ClosedStoreError, match="is closed"), r.writer():
        store.close()

    assert (r.receipt, len(store.receipts())) == (None, 0)


def test_a_writer_that_is_inside_can_go_on_when_another_thread_closes_the_store(store: bs.BlockStore) -> None:
    r = store.allocate(100)
    inside, closed = threading.Event(), threading.Event()
    seen: list[object] = []

    def work() -> None:
        try:
            with r.writer() as a:
                inside.set()
                closed.wait()
                a[...] = 9
                seen.append(int(a.sum()))
        except bs.ClosedStoreError:
            seen.append("closed")

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    store.close()
    closed.set()
    thread.join()

    assert (seen, r.receipt) == ([900, "closed"], None)


def drop_unclosed(things: list[Any]) -> None:
    """Let go of a store that was never closed, which warns."""
    with pytest.warns(ResourceWarning, match=r"<BlockStore 'data\.bin': .*> was never closed"):
        collect(things)


def collect(things: list[Any]) -> None:
    """Leave things to the garbage collector, which finalizes what they refer to in any order."""
    things.append(list(things))
    things[-1].append(things[-1])
    things.clear()
    gc.collect()


def test_a_store_that_nobody_closed_warns(tmp_path: Path) -> None:
    drop_unclosed([bs.create(tmp_path / "data.bin", 4096)])


@pytest.mark.parametrize("options", [{}, {"guard": "seal"}, {"access": "sparse"}], ids=str)
def test_a_store_that_nobody_closed_is_closed_when_it_is_collected(tmp_path: Path, options: dict[str, Any]) -> None:
    store = bs.create(tmp_path / "data.bin", 8 << 20, **options)
    with (r := store.allocate(4 << 20)).writer() as a:
        a[...] = 7
    things = [store, r]
    del store, r

    drop_unclosed(things)

    assert (int(a.min()), int(a.max()), (tmp_path / "data.bin").read_bytes()[:2]) == (7, 7, b"\7\7")


@linux_only
def test_a_store_that_is_collected_lays_no_other_file_over_its_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log").write_bytes(b"L" * (8 << 20))
    opened = []

    def open_log(*args: object, **options: object) -> None:
        opened.append(os.open(tmp_path / "log", os.O_RDWR))

    things = [bs.create(tmp_path / "data.bin", 8 << 20, guard="seal")]
    with things[0].allocate(8 << 20).writer() as a:
        a[...] = 7

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", open_log)
        collect(things)

    for descriptor in opened:
        os.close(descriptor)
    assert (len(opened), int(a.min()), int(a.max())) == (1, 7, 7)


def test_a_warning_that_is_made_an_error_does_not_keep_a_store_from_being_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[str] = []
    store = bs.create(tmp_path / "data.bin", 8 << 20, guard="seal")
    writer = store.allocate(4 << 20).writer()
    a = writer.__enter__()

    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        monkeypatch.setattr(sys, "unraisablehook", lambda what: raised.append(what.exc_type.__name__))
        del store, writer
        gc.collect()
    a[...] = 7

    assert raised == ["ResourceWarning"]
    assert not np.fromfile(tmp_path / "data.bin", np.uint8).any()


def test_a_range_keeps_its_store_alive(tmp_path: Path) -> None:
    things: list[Any] = [bs.create(tmp_path / "data.bin", 4096).allocate(5)]
    gc.collect()

    things[0].write(b"hello")

    assert things[0].read().tobytes() == b"hello"
    drop_unclosed(things)


UNCLOSED = """
import sys
import blockstore as bs

store = bs.create(sys.argv[1], 8 << 20, guard=sys.argv[2])
r = store.allocate(5)
r.write(b"hello")
writer = store.allocate(4 << 20).writer()
a = writer.__enter__()
"""


@pytest.mark.parametrize("guard", ["flag", "seal"])
def test_an_interpreter_that_ends_with_an_open_store_keeps_what_was_written(tmp_path: Path, guard: str) -> None:
    ran = run_python(UNCLOSED, tmp_path / "data.bin", guard)

    assert (ran.returncode, ran.stderr) == (0, "")
    assert (tmp_path / "data.bin").read_bytes()[:5] == b"hello"


# -- closing while others write -------------------------------------------------------------------

DESCRIPTORS = """
import os, sys
import numpy as np
import blockstore as bs
from blockstore import mapped

folder, twin = sys.argv[1], sys.argv[2] == "twin"
if twin:  # a store that closes its descriptor while another thread is about to use it
    drop = mapped.MappedFile.drop
    def drop_and_close(self):
        descriptor = self._file.fileno()
        drop(self)
        os.close(descriptor)
    mapped.MappedFile.drop = drop_and_close

store = bs.create(os.path.join(folder, "data.bin"), 1 << 20)
r = store.allocate(100)
others = []
pwrite = os.pwrite
def close_first(*args):
    store.close()
    for name in range(20):
        others.append(os.open(os.path.join(folder, str(name)), os.O_RDWR | os.O_CREAT))
    return pwrite(*args)
os.pwrite = close_first
try:
    r.write(np.full(100, 7, np.uint8))
except bs.ClosedStoreError:
    sizes = [os.path.getsize(os.path.join(folder, str(name))) for name in range(20)]
    print("refused", r.receipt, [size for size in sizes if size], flush=True)
os._exit(0)  # the twin would close what others have opened
"""


@linux_only
def test_a_write_that_is_under_way_when_the_store_is_closed_touches_no_file_opened_since(tmp_path: Path) -> None:
    ran = run_python(DESCRIPTORS, tmp_path, "real")

    assert (ran.returncode, ran.stdout) == (0, "refused None []\n"), ran.stderr


@linux_only
def test_a_store_that_closes_its_descriptor_at_once_is_caught_writing_into_another_file(tmp_path: Path) -> None:
    ran = run_python(DESCRIPTORS, tmp_path, "twin")

    assert (ran.returncode, ran.stdout) == (0, "refused None [100]\n"), ran.stderr


class WritersUntilClosed:
    """Threads that write ranges until the store is closed under them."""

    def __init__(self, store: bs.BlockStore, write: Callable[[bs.AllocatedRange], object]) -> None:
        self.written = threading.Semaphore(0)
        self.errors: list[BaseException] = []
        self._write = write
        self._rest = store.ranges(64 << 10)
        self._threads = [threading.Thread(target=self._work) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        try:
            for r in self._rest:
                self._write(r)
                self.written.release()
        except bs.ClosedStoreError:
            pass
        except BaseException as error:
            self.errors.append(error)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


def through_write(r: bs.AllocatedRange) -> None:
    r.write(bytes([r.start // 4096 % 251 + 1]) * r.nbytes)


def through_writer(r: bs.AllocatedRange) -> None:
    with r.writer() as a:
        a[...] = r.start // 4096 % 251 + 1


ways_to_write = pytest.mark.parametrize("write", [through_write, through_writer])
kinds_of_store = pytest.mark.parametrize("options", [{}, {"guard": "seal"}, {"access": "sparse"}], ids=str)


@ways_to_write
@kinds_of_store
def test_files_that_are_opened_while_a_busy_store_is_closed_stay_as_they_are(
    tmp_path: Path, options: dict[str, Any], write: Callable[[bs.AllocatedRange], None]
) -> None:
    others = [tmp_path / f"other-{name}" for name in range(10)]
    for round_ in range(5):
        store = bs.create(tmp_path / f"{round_}.bin", 16 << 20, **options)
        writers = WritersUntilClosed(store, write)
        writers.written.acquire(timeout=HANG_SECONDS)

        store.close()
        opened = [other.open("w+b", buffering=0) for other in others]
        writers.join()
        for file in opened:
            file.close()

        assert writers.errors == []
        assert [other.stat().st_size for other in others] == [0] * 10


@ways_to_write
@kinds_of_store
def test_every_receipt_that_a_busy_store_gave_before_it_was_closed_is_true(
    tmp_path: Path, options: dict[str, Any], write: Callable[[bs.AllocatedRange], None]
) -> None:
    store = bs.create(tmp_path / "data.bin", 16 << 20, **options)
    writers = WritersUntilClosed(store, write)
    for _ in range(8):
        writers.written.acquire(timeout=HANG_SECONDS)

    store.close()
    writers.join()

    held = np.fromfile(store.path, np.uint8)
    receipts = store.receipts()
    assert writers.errors == []
    assert len(receipts) >= 8
    assert all((held[r["start"] : r["stop"]] == r["start"] // 4096 % 251 + 1).all() for r in receipts)
