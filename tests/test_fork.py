"""A store that crosses a fork goes on in the parent; the child is refused, and cannot harm the file."""

import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from support import PORTABLE, admitted, contents, in_child, run_python, uses_of

import blockstore as bs
from blockstore import _disk, _os

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")

Array = np.ndarray[Any, Any]
T = TypeVar("T")

linux_only = pytest.mark.skipif(PORTABLE, reason="maps are cut off in the child on Linux only")

HANG_SECONDS = 60
"""After which a test that hangs fails."""

OPTIONS: list[dict[str, Any]] = [{}, {"guard": "seal"}, {"access": "sparse"}, {"allocator": "concurrent"}]


@pytest.fixture(params=OPTIONS, ids=str)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[bs.BlockStore]:
    with bs.create(tmp_path / "data.bin", 8 << 20, **request.param) as store:
        yield store


def nothing() -> None:
    """What a child does that is merely there."""


def attempt(call: Callable[[], object]) -> str:
    """Return the name of what `call` raises, or what it returned."""
    try:
        return f"returned {call()!r}"
    except Exception as error:
        return type(error).__name__


class Sitting:
    """A thread that sits inside a call until it is released. Leaving the ``with`` block waits for it."""

    def __init__(self, call: Callable[[Callable[[], None]], object]) -> None:
        self._inside, self._release = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(call,))

    def _run(self, call: Callable[[Callable[[], None]], object]) -> None:
        try:
            call(self._sit)
        finally:
            self._inside.set()  # for a call that ended without sitting down

    def _sit(self) -> None:
        self._inside.set()
        self._release.wait()

    def __enter__(self) -> None:
        self._thread.start()
        self._inside.wait()

    def __exit__(self, *exc_info: object) -> None:
        self._release.set()
        self._thread.join()


# -- the parent goes on ---------------------------------------------------------------------------


def test_after_a_fork_the_parent_allocates_and_writes_on(store: bs.BlockStore) -> None:
    store.allocate(5).write(b"hello")
    in_child(nothing)

    r = store.allocate(5)
    r.write(b"world")

    assert (r.start, r.read().tobytes()) == (4096, b"world")


def test_after_a_fork_the_parent_flushes_what_was_written_before_and_after_it(store: bs.BlockStore) -> None:
    before = store.allocate(5).write(b"hello")
    in_child(nothing)
    after = store.allocate(5).write(b"world")

    store.flush()

    assert (before.durable, after.durable) == (True, True)


@pytest.mark.parametrize("nbytes", [100, 4 << 20], ids=["100 bytes", "4 MiB"])
def test_a_writer_that_is_inside_during_a_fork_goes_on_in_the_parent(store: bs.BlockStore, nbytes: int) -> None:
    r = store.allocate(nbytes)

    with r.writer() as a:
        a[: nbytes // 2] = 1
        in_child(nothing)
        a[nbytes // 2 :] = 2

    expected = np.repeat(np.array([1, 2], np.uint8), nbytes // 2)
    assert np.array_equal(np.fromfile(store.path, np.uint8, nbytes), expected)


def test_a_child_that_ends_leaves_the_parent_its_claims(store: bs.BlockStore) -> None:
    r = store.allocate(100)
    stack = ExitStack()
    stack.enter_context(r.writer())
    in_child(lambda: attempt(stack.close))

    with pytest.raises(bs.WriterBusyError, match="another writer is inside"), r.writer():
        pass

    stack.close()


# -- the child is refused -------------------------------------------------------------------------


def test_the_child_is_refused_whatever_it_tries(store: bs.BlockStore) -> None:
    uses = uses_of(store)

    assert in_child(lambda: admitted(uses, bs.ForkedStoreError)) == []
    uses.stack.close()


def test_a_child_that_is_not_refused_is_caught_by_the_same_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bs.BlockStore, "_disown", lambda store: None)
    with bs.create(tmp_path / "data.bin", 8 << 20) as store:
        uses = uses_of(store)
        names = in_child(lambda: admitted(uses, bs.ForkedStoreError))
        uses.stack.close()

    assert len(names) > 20


def test_the_refusal_says_what_to_do(store: bs.BlockStore) -> None:
    def message() -> str:
        try:
            store.sync()
        except bs.ForkedStoreError as error:
            return str(error)
        return "nothing was raised"

    assert in_child(message).endswith("was inherited through a fork: its parent goes on with it, reopen it here")


def test_the_child_of_a_child_is_refused_as_well(store: bs.BlockStore) -> None:
    assert in_child(lambda: in_child(lambda: attempt(store.sync))) == "ForkedStoreError"


def test_in_the_child_the_exit_of_an_inherited_writer_is_refused_and_leaves_no_receipt(store: bs.BlockStore) -> None:
    r = store.allocate(100)

    def leave(stack: ExitStack) -> tuple[str, bs.WriteReceipt | None]:
        return attempt(stack.close), r.receipt

    with ExitStack() as stack:
        stack.enter_context(r.writer())
        assert in_child(lambda: leave(stack)) == ("ForkedStoreError", None)


def test_in_the_child_an_inherited_array_is_read_only_once_its_writer_was_left(store: bs.BlockStore) -> None:
    def leave(stack: ExitStack, a: Array) -> bool:
        attempt(stack.close)
        return a.flags.writeable

    with ExitStack() as stack:
        a = stack.enter_context(store.allocate(100).writer())
        assert not in_child(lambda: leave(stack, a))


def test_in_the_child_closing_and_leaving_the_store_do_nothing(store: bs.BlockStore) -> None:
    store.allocate(5).write(b"hello")

    def close() -> bool:
        with store:
            store.close()
        return store.closed

    assert in_child(close)
    assert (store.closed, store.flush()) == (False, 1)


def test_in_the_child_the_store_says_what_it_is(store: bs.BlockStore) -> None:
    assert "inherited through a fork" in in_child(lambda: repr(store))


# -- the child cannot harm the file ---------------------------------------------------------------


@linux_only
@pytest.mark.parametrize("nbytes", [100, 4 << 20], ids=["100 bytes", "4 MiB"])
def test_what_a_child_writes_to_an_inherited_view_never_reaches_the_file(store: bs.BlockStore, nbytes: int) -> None:
    with store.allocate(nbytes).writer() as a:
        a[...] = 1
        in_child(lambda: a.fill(2))

    assert np.fromfile(store.path, np.uint8).max() == 1


@linux_only
def test_what_a_child_writes_to_an_inherited_raw_array_never_reaches_the_file(store: bs.BlockStore) -> None:
    a = store.raw.array(0, store.nbytes)

    in_child(lambda: a.fill(2))

    assert not np.fromfile(store.path, np.uint8).any()


def test_a_child_that_keeps_its_maps_is_caught_by_the_same_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_os, "seal", lambda *args: None)
    with bs.create(tmp_path / "data.bin", 4096) as store:
        a = store.raw.array(0, 4096)
        in_child(lambda: a.fill(2))

    assert contents(store) == b"\2" * 4096


@linux_only
def test_in_the_child_an_inherited_array_still_shows_what_the_file_holds(store: bs.BlockStore) -> None:
    r = store.allocate(5)
    r.write(b"hello")
    a = r.read()

    assert in_child(a.tobytes) == b"hello"


@linux_only
def test_what_a_child_left_in_a_view_is_not_seen_by_the_parent(store: bs.BlockStore) -> None:
    with store.allocate(100).writer() as a:
        a[...] = 1
        in_child(lambda: a.fill(2))
        seen = a.max()

    assert seen == 1


# -- the child can begin anew ---------------------------------------------------------------------


def write_world(path: str) -> list[Any]:
    """Open a store of which five bytes are written, write five more, and return its receipts."""
    with bs.open(path) as again:
        again.allocate(5, tag=2).write(b"world")
        return again.receipts().tolist()


@pytest.mark.parametrize("discard", [False, True], ids=["as it is", "to discard"])
def test_the_child_may_not_open_for_writing_what_its_parent_holds(store: bs.BlockStore, discard: bool) -> None:
    store.allocate(5).write(b"hello")

    def reopen() -> str:
        try:
            bs.open(store.path, discard=discard)
        except bs.StoreInUseError as error:
            return str(error)
        return "it was opened"

    assert in_child(reopen).endswith("data.bin' for writing: a store of another process has it open; mode='r' reads it")
    assert (len(store.receipts()), store.raw.read_at(0, 5)) == (1, b"hello")


def test_the_child_opens_to_read_what_its_parent_holds(store: bs.BlockStore) -> None:
    store.allocate(5, tag=1).write(b"hello")

    def reopen() -> tuple[bytes, list[Any], int]:
        with bs.open(store.path, mode="r") as again:
            return again.raw.read_at(0, 5), again.receipts()["tag"].tolist(), again.free

    assert in_child(reopen) == (b"hello", [1], 0)


def test_when_the_parent_has_closed_it_the_child_may_go_on_with_the_file(store: bs.BlockStore) -> None:
    store.allocate(5, tag=1).write(b"hello")
    reading, writing = os.pipe()

    def wait_and_reopen() -> tuple[str, list[Any]]:
        before = attempt(lambda: bs.open(store.path))
        os.write(answering, b"?")
        os.read(reading, 1)
        return before, write_world(store.path)

    asking, answering = os.pipe()
    with ThreadPoolExecutor(1) as pool:
        child = pool.submit(in_child, wait_and_reopen)
        os.read(asking, 1)
        store.close()
        os.write(writing, b"!")
        before, receipts = child.result()
    for descriptor in (reading, writing, asking, answering):
        os.close(descriptor)

    assert before == "StoreInUseError"
    assert receipts == [(0, 4096, 5, 1, True, 0), (4096, 8192, 5, 2, False, 0)]
    assert contents(store)[4096:4101] == b"world"
    with bs.open(store.path, mode="r") as again:
        assert again.receipts()["durable"].tolist() == [True, True]


def test_a_child_that_was_forked_after_the_parent_closed_goes_on_with_the_file(store: bs.BlockStore) -> None:
    store.allocate(5, tag=1).write(b"hello")
    store.close()

    receipts = in_child(lambda: write_world(store.path))

    assert receipts == [(0, 4096, 5, 1, True, 0), (4096, 8192, 5, 2, False, 0)]


OPEN = """
import sys
import blockstore as bs
try:
    bs.open(sys.argv[1])
except bs.StoreInUseError:
    print("in use")
"""


def test_a_child_that_ends_leaves_the_parent_the_file_to_itself(store: bs.BlockStore) -> None:
    in_child(lambda: attempt(store.close))

    ran = run_python(OPEN, store.path)

    assert (ran.stdout, ran.stderr) == ("in use\n", "")


def test_a_child_that_lives_on_does_not_keep_others_from_a_file_that_its_parent_closed(store: bs.BlockStore) -> None:
    assert open_beside_a_child(store) == "returned None"


@linux_only
def test_a_child_that_keeps_the_lock_is_caught_by_the_same_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, parent = _disk.FileLock.close, os.getpid()
    monkeypatch.setattr(_disk.FileLock, "close", lambda lock: close(lock) if os.getpid() == parent else None)
    monkeypatch.setattr(_disk.FileLock, "_unlock", lambda lock: lock.close())

    assert open_beside_a_child(bs.create(tmp_path / "data.bin", 4096)) == "StoreInUseError"


def open_beside_a_child(store: bs.BlockStore) -> str:
    """Close a store after a fork, and return what comes of opening its file anew while the child is alive."""
    asking, answering = os.pipe()
    reading, writing = os.pipe()

    def wait() -> None:
        os.write(answering, b"?")
        os.read(reading, 1)

    with ThreadPoolExecutor(1) as pool:
        child = pool.submit(in_child, wait)
        os.read(asking, 1)
        store.close()
        outcome = attempt(lambda: bs.open(store.path).close())
        os.write(writing, b"!")
        child.result()
    for descriptor in (asking, answering, reading, writing):
        os.close(descriptor)
    return outcome


def test_a_receipt_of_the_parent_is_not_touched_by_a_child_that_leaves_its_writers(store: bs.BlockStore) -> None:
    uses = uses_of(store)
    in_child(lambda: admitted(uses, bs.ForkedStoreError))
    uses.stack.close()
    store.close()

    with bs.open(store.path, mode="r") as again:
        assert again.receipts().tolist() == store.receipts().tolist()
        assert len(again.receipts()) == 2


def test_the_child_unpickles_a_range_from_before_the_fork(store: bs.BlockStore) -> None:
    r = store.allocate(shape=(2, 3), dtype="f8")
    r.write(np.arange(6.0).reshape(2, 3))
    token = pickle.dumps(r)

    assert in_child(lambda: pickle.loads(token).read().tolist()) == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_the_child_unpickles_the_store_from_before_the_fork_to_read(store: bs.BlockStore) -> None:
    store.allocate(5).write(b"hello")
    token = pickle.dumps(store)

    def reopen() -> tuple[str, bytes]:
        with pickle.loads(token) as again:
            return again.mode, again.raw.read_at(0, 5)

    assert in_child(reopen) == ("r", b"hello")


def test_the_child_creates_stores_of_its_own(store: bs.BlockStore, tmp_path: Path) -> None:
    def create() -> int:
        with bs.create(tmp_path / "child.bin", 4096) as own:
            own.allocate(5).write(b"hello")
            return own.flush()

    assert in_child(create) == 1
    assert (tmp_path / "child.bin").read_bytes()[:5] == b"hello"


# -- forks while other threads are busy -----------------------------------------------------------


def test_a_fork_during_a_flush_leaves_a_child_that_is_refused_and_does_not_hang(
    store: bs.BlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    uses = uses_of(store)
    sync = _os.sync

    def flush(sit: Callable[[], None]) -> None:
        def sit_and_sync(file: _os.File, mapped: _os.Map) -> None:
            sit()
            sync(file, mapped)

        with monkeypatch.context() as patch:
            patch.setattr(_os, "sync", sit_and_sync)
            store.flush()

    def answer() -> tuple[bool, list[str]]:
        return not store._ledger._flushing.acquire(blocking=False), admitted(uses, bs.ForkedStoreError)

    with Sitting(flush):
        answered = in_child(answer)

    assert answered == (True, [])
    assert uses.written.receipt is not None
    assert uses.written.receipt.durable
    uses.stack.close()


def in_child_of_an_allocation(store: bs.BlockStore, call: Callable[[], T]) -> T:
    """Fork while another thread holds the lock of the allocator, and return what `call` returns in the child."""

    def allocate(sit: Callable[[], None]) -> None:
        with store.allocator._lock:
            sit()

    with Sitting(allocate):
        return in_child(call)


def test_a_fork_during_an_allocation_leaves_a_child_that_is_refused_and_does_not_hang(store: bs.BlockStore) -> None:
    uses = uses_of(store)

    def answer() -> tuple[bool, list[str]]:
        return store.allocator._lock.locked(), admitted(uses, bs.ForkedStoreError)

    assert in_child_of_an_allocation(store, answer) == (True, [])
    uses.stack.close()


@pytest.mark.parametrize("allocator", ["sequential", "concurrent"])
def test_after_a_fork_during_an_allocation_the_child_can_still_print_the_store(tmp_path: Path, allocator: Any) -> None:
    with bs.create(tmp_path / "data.bin", 1 << 16, allocator=allocator) as store:
        text = in_child_of_an_allocation(store, lambda: repr(store))

    assert "inherited through a fork" in text


def test_after_a_fork_during_an_allocation_the_child_can_close_the_store(store: bs.BlockStore) -> None:
    assert in_child_of_an_allocation(store, lambda: attempt(store.close)) == "returned None"


def test_forks_among_busy_threads_lose_nothing_in_the_parent_and_hang_no_child(store: bs.BlockStore) -> None:
    uses = uses_of(store)
    errors: list[BaseException] = []
    written = threading.Semaphore(0)

    def work() -> None:
        try:
            for r in store.ranges(8192):
                with r.writer() as a:
                    a[...] = r.start // 4096 % 251 + 1
                written.release()
                store.flush(r.receipt)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    answers = []
    for _ in range(6):
        written.acquire(timeout=HANG_SECONDS)
        answers.append(in_child(lambda: admitted(uses, bs.ForkedStoreError)))
    for thread in threads:
        thread.join()
    uses.stack.close()

    held = np.fromfile(store.path, np.uint8)
    own = store.receipts()[store.receipts()["nbytes"] == 8192]
    assert (answers, errors, store.free) == ([[]] * 6, [], 0)
    assert len(own) == (store.nbytes - uses.rows[1].stop) // 8192
    assert all((held[r["start"] : r["stop"]] == r["start"] // 4096 % 251 + 1).all() for r in own)
