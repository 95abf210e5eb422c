"""A store hands out its file, makes receipts durable together, and never says so of what may be lost."""

import errno
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import PORTABLE, contents, in_threads, run_python

import blockstore as bs
from blockstore import ALIGNMENT, AllocatedRange, BlockStore, _os, align_up, journal, ledger, records

MIB = 1 << 20
SYNC = "fsync" if PORTABLE else "fdatasync"
"""The call of `os` that a flush waits for."""

untimed = settings(deadline=None)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    with bs.create(tmp_path / "data.bin", MIB) as store:
        yield store


def hello(store: BlockStore, *, tag: int = 0) -> AllocatedRange:
    r = store.allocate(5, tag=tag)
    r.write(b"hello")
    return r


def receipt_of(r: AllocatedRange) -> bs.WriteReceipt:
    assert r.receipt is not None
    return r.receipt


class Syncs:
    """Stands in front of the sync of the system: notes each, of "data" or "journal", and fails what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: BlockStore) -> None:
        self.done: list[str] = []
        self.failures: dict[str, OSError] = {}
        self.before: Callable[[str], object] = lambda what: None
        self._data = os.stat(store.path)
        self._really = getattr(os, SYNC)
        monkeypatch.setattr(os, SYNC, self)

    def __call__(self, fd: int) -> None:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            what = "data" if os.path.samestat(status, self._data) else "journal"
            self.done.append(what)
            self.before(what)
            if what in self.failures:
                raise self.failures.pop(what)
        self._really(fd)


FLUSH = ["data", "journal"]
"""What one flush syncs, in this order."""

each_sync = pytest.mark.parametrize("what", FLUSH)


@pytest.fixture
def syncs(store: BlockStore, monkeypatch: pytest.MonkeyPatch) -> Syncs:
    return Syncs(monkeypatch, store)


def found(store: BlockStore, boot: str | None = None) -> list[Any]:
    """Return the rows of the receipts that somebody finds who opens the file now, or after the machine was reset."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_os, "sync_file", lambda file: None)  # which the tests count
        if boot is not None:
            patch.setenv("BLOCKSTORE_BOOT_ID", boot)
        with bs.open(store.path, mode="r") as reader:
            rows: list[Any] = reader.receipts().tolist()
    return rows


RESET = "the boot after a reset"


def journal_of(store: BlockStore) -> Path:
    return Path(f"{store.path}.journal")


# -- flush ----------------------------------------------------------------------------------------


@untimed
@given(steps=st.lists(st.sampled_from(["write", "rewrite", "fail to rewrite", "flush"]), max_size=30))
def test_a_flush_says_how_many_receipts_it_made_durable(
    steps: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with bs.create(tmp_path_factory.mktemp("flush") / "data.bin", MIB) as store:
        durable: set[AllocatedRange] = set()
        written: set[AllocatedRange] = set()
        for step in [*steps, "flush"]:
            if step == "write":
                written.add(hello(store))
            elif step == "flush":
                assert store.flush() == len(written - durable)
                durable = set(written)
            elif written:
                r = max(written, key=lambda r: r.start)
                if step == "rewrite":
                    r.write(b"HELLO", rewrite=True)
                else:
                    with pytest.raises(ZeroDivisionError), r.writer(rewrite=True):
                        1 / 0
                    written.discard(r)
                durable.discard(r)


def test_a_receipt_is_durable_when_the_flush_has_returned_and_not_before(store: BlockStore, syncs: Syncs) -> None:
    receipt = receipt_of(hello(store))
    states: list[object] = [receipt.durable]
    syncs.before = lambda what: states.extend([what, receipt.durable, store.receipts()["durable"].tolist()])

    store.flush(receipt)

    assert [*states, receipt.durable] == [False, "data", False, [False], "journal", False, [False], True]


def test_a_flush_says_in_the_journal_what_is_durable_after_the_data_is_and_before_it_syncs_that(
    store: BlockStore, syncs: Syncs
) -> None:
    hello(store)
    seen: list[tuple[str, list[Any]]] = []
    syncs.before = lambda what: seen.append((what, found(store, RESET))) if len(seen) < 2 else None

    store.flush()

    assert [(what, len(rows)) for what, rows in seen] == [("data", 0), ("journal", 1)]


def test_a_flush_covers_every_receipt_so_far(store: BlockStore) -> None:
    ranges = [hello(store) for _ in range(3)]

    count = store.flush(receipt_of(ranges[1]))

    assert count == 3
    assert [receipt_of(r).durable for r in ranges] == [True] * 3


@each_sync
def test_a_receipt_that_was_made_during_a_sync_waits_for_the_next(store: BlockStore, syncs: Syncs, what: str) -> None:
    first = hello(store)
    late: list[AllocatedRange] = []
    syncs.before = lambda now: late.append(hello(store)) if now == what else None

    count = store.flush()

    assert (count, receipt_of(first).durable, receipt_of(late[0]).durable) == (1, True, False)
    assert [row[0] for row in found(store, RESET)] == [first.start]
    syncs.before = lambda now: None
    assert (store.flush(), receipt_of(late[0]).durable) == (1, True)


@pytest.mark.parametrize("wanted", ["all", "one", "several", "an iterator"])
def test_a_flush_with_nothing_left_to_do_syncs_nothing(store: BlockStore, syncs: Syncs, wanted: str) -> None:
    receipt = receipt_of(hello(store))
    store.flush()
    receipts: Any = {"all": None, "one": receipt, "several": [receipt], "an iterator": iter([receipt])}[wanted]
    size = store._ledger._journal.count

    assert (store.flush(receipts), syncs.done) == (0, FLUSH)
    assert store._ledger._journal.count == size


def test_a_store_that_was_opened_has_nothing_to_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with bs.create(tmp_path / "data.bin", MIB) as store:
        hello(store)

    with bs.open(store.path) as again:
        syncs = Syncs(monkeypatch, again)
        assert (again.flush(), syncs.done) == (0, [])


def test_a_sync_syncs_although_there_is_no_receipt(store: BlockStore, syncs: Syncs) -> None:
    store.raw.write_at(0, b"hello")

    store.sync()

    assert syncs.done == ["data"]


def test_receipts_of_any_iterable_are_flushed(store: BlockStore) -> None:
    receipts = [receipt_of(hello(store)) for _ in range(3)]

    assert store.flush(receipt for receipt in receipts) == 3
    assert all(receipt.durable for receipt in receipts)


def test_no_receipts_at_all_are_no_error(store: BlockStore, syncs: Syncs) -> None:
    hello(store)

    assert (store.flush([]), syncs.done) == (0, [])


def test_starting_the_write_back_promises_nothing(store: BlockStore, syncs: Syncs) -> None:
    receipt = receipt_of(hello(store))

    counts = store.flush(wait=False), store.flush(receipt, wait=False)

    assert (counts, receipt.durable, syncs.done) == ((0, 0), False, [])
    assert found(store, RESET) == []


def test_two_syncs_cover_ten_thousand_receipts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with bs.create(tmp_path / "data.bin", 10_000 * ALIGNMENT, access="sparse") as store:
        syncs = Syncs(monkeypatch, store)
        for r in store.allocate_many(10_000, 5):
            r.write(b"hello")
        before = syncs.done.copy()

        assert (before, store.flush(), syncs.done) == ([], 10_000, FLUSH)
        assert len(found(store, RESET)) == 10_000


@pytest.mark.parametrize("wait", [True, False])
def test_a_receipt_of_another_store_is_refused(store: BlockStore, tmp_path: Path, wait: bool) -> None:
    mine = receipt_of(hello(store))
    with bs.create(tmp_path / "other.bin", MIB) as other:
        theirs = receipt_of(hello(other))

        with pytest.raises(bs.ForeignRangeError, match=r"is of <BlockStore 'other\.bin'.*, not of .* 'data\.bin'"):
            store.flush([mine, theirs], wait=wait)

        assert (mine.durable, theirs.durable) == (False, False)


@pytest.mark.parametrize("wait", [True, False])
def test_a_revoked_receipt_is_refused(store: BlockStore, syncs: Syncs, wait: bool) -> None:
    r = hello(store)
    old = receipt_of(r)
    new = r.write(b"HELLO", rewrite=True)

    with pytest.raises(bs.RevokedReceiptError, match="was voided by a rewrite of its range"):
        store.flush([new, old], wait=wait)

    assert (new.durable, old.durable, syncs.done) == (False, False, [])


def test_a_receipt_that_was_durable_is_so_no_more_when_revoked(store: BlockStore) -> None:
    r = hello(store)
    old = receipt_of(r)
    store.flush()

    r.write(b"HELLO", rewrite=True)
    store.flush()

    assert (old.durable, old.revoked, receipt_of(r).durable) == (False, True, True)
    assert found(store, RESET) == [(0, 4096, 5, 0, True, 0)]


@pytest.mark.parametrize("wrong", [3, [None], ["receipt"], [object()]], ids=repr)
def test_what_is_no_receipt_cannot_be_flushed(store: BlockStore, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"flush takes receipts|not iterable"):
        store.flush(wrong)


# -- a sync that fails ----------------------------------------------------------------------------


def failing(store: BlockStore, syncs: Syncs, what: str) -> bs.WriteReceipt:
    """Flush a store, and let the disk fail once."""
    receipt = receipt_of(hello(store))
    syncs.failures[what] = OSError(errno.EIO, "Input/output error")
    with pytest.raises(bs.PoisonedStoreError, match=r"the sync failed \(.*Input/output error\).* may be lost"):
        store.flush()
    return receipt


@pytest.fixture(params=FLUSH)
def poisoned(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[BlockStore, Syncs, bs.WriteReceipt]]:
    store = bs.create(tmp_path / "data.bin", MIB)
    syncs = Syncs(monkeypatch, store)
    hello(store, tag=1)
    store.flush()
    yield store, syncs, failing(store, syncs, request.param)
    if not store.closed:
        with pytest.raises(bs.PoisonedStoreError):
            store.close()


Poisoned = tuple[BlockStore, Syncs, bs.WriteReceipt]

STANDS = [(0, 4096, 5, 1, True, 0)]
"""What was durable before the sync failed."""


def test_a_receipt_whose_sync_failed_is_void(poisoned: Poisoned) -> None:
    store, _, receipt = poisoned

    assert (receipt.durable, receipt.revoked) == (False, True)
    assert repr(receipt) == "<WriteReceipt [4096, 8192) 5 bytes, void>"
    assert store.receipts().tolist() == STANDS


def test_what_was_durable_before_a_failed_sync_stays_so(poisoned: Poisoned) -> None:
    store, syncs, _ = poisoned

    assert store.receipts().tolist() == STANDS
    assert store.pending().tolist() == [(4096, MIB, MIB - 4096)]
    assert [found(store), found(store, RESET)] == [STANDS, STANDS]
    assert syncs.failures == {}


def test_a_range_whose_receipt_is_void_cannot_be_read(store: BlockStore, syncs: Syncs) -> None:
    durable = hello(store)
    store.flush()
    r = hello(store)
    syncs.failures["data"] = OSError(errno.EIO, "Input/output error")
    with pytest.raises(bs.PoisonedStoreError, match="the sync failed"):
        store.flush()

    with pytest.raises(bs.NotWrittenError, match=r"cannot read range \[4096, 8192\): its receipt is void"):
        r.read()

    assert repr(r) == "<AllocatedRange [4096, 8192) 5 bytes, void>"
    assert bytes(durable.read()) == b"hello"
    with pytest.raises(bs.PoisonedStoreError):
        store.close()


@pytest.mark.parametrize(
    "again",
    [
        pytest.param(lambda store, receipt: store.flush(), id="flush"),
        pytest.param(lambda store, receipt: store.flush(receipt), id="flush a receipt"),
        pytest.param(lambda store, receipt: store.sync(), id="sync"),
        pytest.param(lambda store, receipt: store.raw.flush_range(0, 1), id="raw.flush_range"),
        pytest.param(lambda store, receipt: store.close(), id="close"),
    ],
)
def test_a_sync_that_failed_is_never_retried(
    poisoned: Poisoned, again: Callable[[BlockStore, bs.WriteReceipt], object]
) -> None:
    store, syncs, receipt = poisoned
    done = syncs.done.copy()

    with pytest.raises(OSError, match=r"an earlier sync failed .*: reopen the store") as refusal:
        again(store, receipt)

    assert isinstance(refusal.value, bs.PoisonedStoreError)
    assert refusal.value.errno == errno.EIO
    assert isinstance(refusal.value.__cause__, OSError)
    assert (syncs.done, receipt.durable) == (done, False)


def test_even_a_flush_with_nothing_to_do_tells_of_a_failed_sync(poisoned: Poisoned) -> None:
    with pytest.raises(bs.PoisonedStoreError, match="an earlier sync failed"):
        poisoned[0].flush([])


def put(r: AllocatedRange, how: str, *, rewrite: bool) -> None:
    """Write five bytes in one of two ways."""
    if how == "write":
        r.write(b"HELLO", rewrite=rewrite)
    else:
        with r.writer(rewrite=rewrite) as a:
            a[:] = list(b"HELLO")


@pytest.mark.parametrize("options", [{}, {"guard": "seal"}, {"access": "sparse"}], ids=str)
@pytest.mark.parametrize("rewrite", [False, True], ids=["write", "rewrite"])
@pytest.mark.parametrize("how", ["write", "writer"])
@each_sync
def test_nothing_that_is_written_after_a_failed_sync_gets_a_receipt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], what: str, rewrite: bool, how: str
) -> None:
    store = bs.create(tmp_path / "data.bin", MIB, **options)
    syncs = Syncs(monkeypatch, store)
    durable = hello(store, tag=1)
    store.flush()
    failing(store, syncs, what)
    r = durable if rewrite else store.allocate(5)

    with pytest.raises(bs.PoisonedStoreError, match="an earlier sync failed"):
        put(r, how, rewrite=rewrite)

    assert store.receipts().tolist() == STANDS
    assert contents(store)[:5] == b"hello"
    assert (receipt_of(durable).durable, store.allocate(5).receipt) == (True, None)
    with pytest.raises(bs.PoisonedStoreError):
        store.close()


def test_a_poisoned_store_is_closed_all_the_same(poisoned: Poisoned) -> None:
    store = poisoned[0]

    with pytest.raises(bs.PoisonedStoreError, match="an earlier sync failed"):
        store.close()

    assert store.closed
    with pytest.raises(bs.ClosedStoreError, match="is closed"):
        store.allocate(1)


@pytest.mark.parametrize("discard", [False, True], ids=["as it is", "to discard"])
def test_a_poisoned_store_can_be_opened_anew(poisoned: Poisoned, discard: bool) -> None:
    store = poisoned[0]
    with pytest.raises(bs.PoisonedStoreError):
        store.close()

    with bs.open(store.path, discard=discard) as anew:
        assert (anew.receipts().tolist(), anew.free) == ([] if discard else STANDS, MIB if discard else MIB - 4096)
        receipt = anew.allocate(5).write(b"HELLO")
        assert (anew.flush(receipt), receipt.start, receipt.durable) == (1, 0 if discard else 4096, True)
    assert store.receipts().tolist() == STANDS


def test_a_failed_sync_without_receipts_poisons_the_store_as_well(store: BlockStore, syncs: Syncs) -> None:
    syncs.failures["data"] = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(bs.PoisonedStoreError, match="No space left on device") as refusal:
        store.sync()
    assert refusal.value.errno == errno.ENOSPC

    with pytest.raises(bs.PoisonedStoreError, match="an earlier sync failed"):
        store.flush()
    with pytest.raises(bs.PoisonedStoreError):
        store.close()


# -- what the system is asked to do ---------------------------------------------------------------

TRACED = "fdatasync,fsync,sync_file_range"


def traced(script: str, path: Path, *options: str) -> tuple[list[str], str]:
    """Run a script under strace; return its calls that sync something, after the line that it writes to start."""
    strace = shutil.which("strace")
    if strace is None or PORTABLE:
        pytest.skip("needs strace, and what only Linux has")
    log = path.with_suffix(".log")
    command = [strace, "-f", "-o", str(log), "-e", f"trace={TRACED},write", *options]
    done = subprocess.run(
        [*command, sys.executable, "-c", script, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "ptrace" in done.stderr:
        pytest.skip(f"nothing may be traced here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    text = log.read_text()
    calls = re.findall(rf"\b({TRACED.replace(',', '|')})\(", text[text.index("to be traced") :])
    return calls, done.stdout


TEN_THOUSAND = """
import os, sys
import blockstore as bs
store = bs.create(sys.argv[1], 10_000 * 4096, access="sparse")
for r in store.allocate_many(10_000, 5):
    r.write(b"hello")
os.write(2, b"to be traced")
print(store.flush({arguments}), flush=True)
os._exit(0)
"""


def test_the_disk_is_asked_twice_for_ten_thousand_receipts(tmp_path: Path) -> None:
    calls, printed = traced(TEN_THOUSAND.format(arguments=""), tmp_path / "data.bin")

    assert (calls, printed) == (["fdatasync", "fdatasync"], "10000\n")


def test_write_back_is_really_started(tmp_path: Path) -> None:
    calls, printed = traced(TEN_THOUSAND.format(arguments="wait=False"), tmp_path / "data.bin")

    assert (calls, printed) == (["sync_file_range"], "0\n")


ONE_FAILURE = """
import os, sys
import blockstore as bs
store = bs.create(sys.argv[1], 4096)
receipt = store.allocate(5).write(b"hello")
os.write(2, b"to be traced")
for _ in range(2):
    try:
        store.flush()
    except bs.PoisonedStoreError as error:
        print(error.errno, receipt.durable, receipt.revoked, flush=True)
os._exit(0)
"""

SYNCS_OF_CREATE = 1
"""Calls of ``fdatasync`` before the first flush: of the new journal."""


@pytest.mark.parametrize("number", [1, 2], ids=["of the data", "of the journal"])
def test_a_real_error_of_the_disk_is_reported_for_good(tmp_path: Path, number: int) -> None:
    nth = f"inject=fdatasync:error=EIO:when={SYNCS_OF_CREATE + number}"
    calls, printed = traced(ONE_FAILURE, tmp_path / "data.bin", "-e", nth)

    assert calls == ["fdatasync"] * number
    assert printed == f"{errno.EIO} False True\n" * 2


# -- while a flush waits --------------------------------------------------------------------------

HANG_SECONDS = 60
"""After which a test that hangs fails."""


class Stall:
    """Holds the next sync of the data, or of the journal, until it may end."""

    def __init__(self, syncs: Syncs, what: str) -> None:
        self.what = what
        self._begun, self._may_end = threading.Event(), threading.Event()
        syncs.before = self._wait

    def _wait(self, what: str) -> None:
        if what == self.what and not self._begun.is_set():
            self._begun.set()
            assert self._may_end.wait(HANG_SECONDS)

    def reached(self) -> None:
        """Return when the sync has begun."""
        assert self._begun.wait(HANG_SECONDS)

    def end(self) -> None:
        self._may_end.set()


@pytest.fixture(params=FLUSH)
def stall(request: pytest.FixtureRequest, syncs: Syncs) -> Iterator[Stall]:
    stall = Stall(syncs, request.param)
    yield stall
    stall.end()


class Noticing:
    """A lock that tells, before it waits, that it has to."""

    def __init__(self, lock: Any, notice: Callable[[], object]) -> None:
        self._lock, self._notice = lock, notice

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._notice()
            self._lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()

    def _is_owned(self) -> bool:
        return bool(self._lock._is_owned())


def wait_until(condition: Callable[[], bool]) -> None:
    """Let other threads run until they have done something."""
    while not condition():
        os.sched_yield()


def test_while_a_flush_waits_others_allocate_and_write(store: BlockStore, stall: Stall) -> None:
    first = hello(store)

    with ThreadPoolExecutor(1) as pool:
        flush = pool.submit(store.flush)
        stall.reached()
        ranges = in_threads(4, lambda tag: hello(store, tag=tag))
        states = [flush.done(), receipt_of(first).durable, *(receipt_of(r).durable for r in ranges)]
        stall.end()

        assert flush.result() == 1
    assert states == [False] * 6
    assert [bytes(r.read()) for r in ranges] == [b"hello"] * 4
    assert [receipt_of(r).durable for r in (first, *ranges)] == [True, False, False, False, False]


def use(store: BlockStore) -> None:
    """Do everything that needs no disk, with ranges that no flush has covered."""
    r = hello(store)
    r.write(b"HELLO", rewrite=True)
    with r.writer(rewrite=True) as a:
        a[:] = 7
    with pytest.raises(ZeroDivisionError), r.writer(rewrite=True):
        1 / 0
    r.write(b"hello")
    low, _ = store.allocate(8192).split_up(4096)
    assert low is not None
    low.write(bytes(4096))
    store.allocate_many(2, 5)[1].write(b"hello")
    next(store.ranges(5)).write(b"hello")
    assert store.flush(wait=False) == 0
    assert (len(store.receipts()), len(store.pending())) == (5, 2)
    assert "5 receipts" in repr(store)
    assert bytes(pickle.loads(pickle.dumps(r)).read()) == b"hello"


def use_while_a_flush_waits(store: BlockStore, stall: Stall) -> tuple[bool, list[str], int]:
    """Return whether the flush was over too early, who had to wait for it, and what it returned."""
    waited: list[str] = []

    def notice() -> None:
        waited.append(threading.current_thread().name)
        stall.end()

    hello(store)
    store._ledger._appending = Noticing(store._ledger._appending, notice)  # type: ignore[assignment]
    with ThreadPoolExecutor(1) as pool:
        flush = pool.submit(store.flush)
        stall.reached()
        use(store)
        over = flush.done()
        stall.end()
        return over, waited, flush.result()


def test_while_a_flush_waits_nobody_waits_for_it(store: BlockStore, stall: Stall) -> None:
    assert use_while_a_flush_waits(store, stall) == (False, [], 1)


def test_a_flush_that_keeps_others_waiting_is_caught_by_the_same_check(
    store: BlockStore, stall: Stall, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = ledger.Ledger._or_poison

    def hold(of: ledger.Ledger, call: Callable[[], None]) -> None:
        with of._appending:
            really(of, call)

    monkeypatch.setattr(ledger.Ledger, "_or_poison", hold)

    _, waited, _ = use_while_a_flush_waits(store, stall)

    assert waited[:1] == [threading.current_thread().name]


def test_a_second_flush_waits_for_the_first_and_covers_the_rest(store: BlockStore, syncs: Syncs, stall: Stall) -> None:
    hello(store)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(store.flush)
        stall.reached()
        late = hello(store)
        second = pool.submit(store.flush, receipt_of(late))
        stall.end()

        assert (first.result(), second.result()) == (1, 1)
    assert receipt_of(late).durable
    assert syncs.done == FLUSH * 2


def test_every_thread_that_waits_in_a_flush_is_told_that_the_sync_failed(
    store: BlockStore, syncs: Syncs, stall: Stall
) -> None:
    syncs.failures[stall.what] = OSError(errno.EIO, "Input/output error")
    waiting = threading.Semaphore(0)
    receipts = [receipt_of(hello(store))]

    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(store.flush)]
        stall.reached()
        store._ledger._flushing = Noticing(store._ledger._flushing, waiting.release)  # type: ignore[assignment]
        receipts += [receipt_of(hello(store)) for _ in range(3)]
        calls += [pool.submit(store.flush, receipt) for receipt in receipts]
        calls += [pool.submit(store.sync)]
        for _ in calls[1:]:
            assert waiting.acquire(timeout=HANG_SECONDS)
        stall.end()
        errors = [call.exception() for call in calls]

    assert [type(error) for error in errors] == [bs.PoisonedStoreError] * 6
    assert [(receipt.durable, receipt.revoked) for receipt in receipts] == [(False, True)] * 4
    assert syncs.done == FLUSH[: FLUSH.index(stall.what) + 1]
    assert [store.receipts().tolist(), found(store), found(store, RESET)] == [[], [], []]
    with pytest.raises(bs.PoisonedStoreError):
        store.close()


# -- what is rewritten ----------------------------------------------------------------------------

each_kind = pytest.mark.parametrize(
    "options", [{}, {"guard": "seal"}, {"access": "sparse"}, {"access": "dense"}], ids=str
)
each_way = pytest.mark.parametrize("how", ["write", "writer"])


def seen_during_a_rewrite(
    path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], how: str
) -> list[tuple[str, bytes, list[Any]]]:
    """Rewrite a durable range; return what the file holds, and what a reset would leave, at each step."""
    seen: list[tuple[str, bytes, list[Any]]] = []
    with bs.create(path / "data.bin", MIB, **options) as store:
        r = hello(store)
        store.flush()

        def look(what: str) -> None:
            seen.append((what, contents(store)[:5], found(store, RESET)))

        with monkeypatch.context() as patch:
            Syncs(patch, store).before = look
            if how == "write":
                r.write(b"HELLO", rewrite=True)
            else:
                with r.writer(rewrite=True) as a:
                    look("inside")
                    a[:] = list(b"HELLO")
            look("written")
    return seen


@each_kind
@each_way
def test_a_rewrite_of_a_durable_range_waits_for_the_journal_before_a_byte_can_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], how: str
) -> None:
    inside = [("inside", b"hello", [])] if how == "writer" else []

    seen = seen_during_a_rewrite(tmp_path, monkeypatch, options, how)

    assert seen == [("journal", b"hello", []), *inside, ("written", b"HELLO", [])]


def plant_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a ledger whose revocations reach the disk whenever the system likes."""
    revoke = ledger.Ledger.revoke

    def revoke_only(of: ledger.Ledger, extent: Any) -> None:
        of._promised = 0
        revoke(of, extent)

    monkeypatch.setattr(ledger.Ledger, "revoke", revoke_only)


def plant_late_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a ledger whose revocations are on the disk when the writer has left, and not when it enters."""
    plant_no_sync(monkeypatch)
    record = ledger.Ledger.record

    def sync_and_record(of: ledger.Ledger, *args: Any) -> int:
        assert of._journal is not None
        of._sync_journal(of._journal.count)
        return record(of, *args)

    monkeypatch.setattr(ledger.Ledger, "record", sync_and_record)


@each_way
@pytest.mark.parametrize(
    ("plant", "first"), [(plant_no_sync, None), (plant_late_sync, ("journal", b"HELLO", []))], ids=["never", "late"]
)
def test_a_rewrite_that_does_not_wait_for_the_journal_is_caught_by_the_same_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, plant: Callable[[Any], None], first: Any
) -> None:
    plant(monkeypatch)

    seen = seen_during_a_rewrite(tmp_path, monkeypatch, {"access": "dense"}, how)

    assert next((step for step in seen if step[0] == "journal"), None) == first


@each_kind
@each_way
def test_a_rewrite_whose_revocation_does_not_reach_the_disk_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], how: str
) -> None:
    store = bs.create(tmp_path / "data.bin", MIB, **options)
    r = hello(store)
    store.flush()
    syncs = Syncs(monkeypatch, store)
    syncs.failures["journal"] = OSError(errno.EIO, "Input/output error")

    with pytest.raises(bs.PoisonedStoreError, match="the sync failed"):
        put(r, how, rewrite=True)

    assert (contents(store)[:5], syncs.done, r.receipt) == (b"hello", ["journal"], None)
    with pytest.raises(bs.PoisonedStoreError):
        store.close()


def test_only_the_first_rewrite_of_what_is_durable_waits_for_the_journal(store: BlockStore, syncs: Syncs) -> None:
    fresh, durable = hello(store), hello(store)
    fresh.write(b"HELLO", rewrite=True)
    before = syncs.done.copy()
    store.flush()
    flushed = syncs.done.copy()  # the journal first for what was revoked, so that nothing of it becomes durable
    late = hello(store)

    for _ in range(3):
        durable.write(b"HELLO", rewrite=True)
        late.write(b"HELLO", rewrite=True)

    assert (before, flushed, syncs.done[len(flushed) :]) == ([], ["data", "journal", "journal"], ["journal"])


def test_one_sync_of_the_journal_serves_every_rewrite_that_waits(store: BlockStore, syncs: Syncs) -> None:
    ranges = [hello(store) for _ in range(5)]
    receipts = [receipt_of(r) for r in ranges]
    store.flush()
    syncs.done.clear()
    stall = Stall(syncs, "journal")

    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(ranges[0].write, b"HELLO", rewrite=True)]
        stall.reached()
        calls += [pool.submit(r.write, b"HELLO", rewrite=True) for r in ranges[1:]]
        wait_until(lambda: all(r.revoked for r in receipts) or any(call.done() for call in calls))
        held = [contents(store)[r.start : r.start + 5] for r in ranges]
        stall.end()
        made = [call.result() for call in calls]

    assert held == [b"hello"] * 5
    assert syncs.done == ["journal", "journal"]
    assert [receipt.revoked for receipt in (*made, *receipts)] == [False] * 5 + [True] * 5


def rewrite_during_a_flush(store: BlockStore, stall: Stall, fails: bool) -> list[Any]:
    """Rewrite one of two ranges that a flush covers while it waits; return what stands, here and after a reset."""
    r, other = hello(store, tag=1), hello(store, tag=2)
    old = receipt_of(r)

    def rewrite() -> None:
        with suppress(ZeroDivisionError), r.writer(rewrite=True) as a:
            a[:] = list(b"HELLO")
            assert not fails or 1 / 0

    with ThreadPoolExecutor(2) as pool:
        flush = pool.submit(store.flush)
        stall.reached()
        writer = pool.submit(rewrite)
        if stall.what == "data":
            writer.result(HANG_SECONDS)
        else:
            wait_until(lambda: old.revoked or writer.done())
            assert (writer.done(), contents(store)[:5]) == (False, b"hello")
        assert not flush.done()
        stall.end()
        flush.result()
        writer.result()
    assert receipt_of(other).durable
    assert (old.durable, old.revoked, r.receipt is None) == (False, True, fails)
    return [[(row[3], row[4]) for row in rows] for rows in (store.receipts().tolist(), found(store, RESET))]


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_what_is_rewritten_while_a_flush_waits_is_not_durable(store: BlockStore, stall: Stall, fails: bool) -> None:
    rewritten = [] if fails else [(1, False)]

    assert rewrite_during_a_flush(store, stall, fails) == [[*rewritten, (2, True)], [(2, True)]]

    assert store.flush() == len(rewritten)
    assert store.receipts()["durable"].all()


def test_a_rewrite_of_which_the_journal_is_not_told_is_caught_by_the_same_check(
    store: BlockStore, stall: Stall, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = journal.Journal.append

    def forget(to: journal.Journal, kind: int, sequence: int, start: int, *args: Any) -> None:
        append(to, kind, sequence, MIB if kind == records.REVOKED else start, *args)

    monkeypatch.setattr(journal.Journal, "append", forget)

    assert rewrite_during_a_flush(store, stall, fails=True)[1] == [(1, True), (2, True)]


def test_flushes_of_many_threads_lose_no_receipt(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 8 * 100 * ALIGNMENT, allocator="concurrent") as store:

        def work(thread: int) -> int:
            done = 0
            for _ in range(10):
                for _ in range(10):
                    hello(store, tag=thread)
                done += store.flush()
            return done

        counts = in_threads(8, work)

        assert sum(counts) + store.flush() == 800
        assert store.receipts()["durable"].all()


# -- receipts -------------------------------------------------------------------------------------


@untimed
@given(rewrites=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=40), flush_after=st.integers(0, 40))
def test_receipts_are_an_array_of_what_stands(
    rewrites: list[tuple[int, bool]], flush_after: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with bs.create(tmp_path_factory.mktemp("receipts") / "data.bin", MIB) as store:
        ranges = [store.allocate(1 + 1000 * i, tag=2**64 - 1 - i) for i in range(10)]
        durable: dict[int, bool] = {}
        for step, (index, fails) in enumerate(rewrites):
            if step == flush_after:
                store.flush()
                durable = dict.fromkeys(durable, True)
            r = ranges[index]
            durable.pop(index, None)
            if fails:
                with pytest.raises(ZeroDivisionError), r.writer(rewrite=True):
                    1 / 0
            else:
                r.write(bytes(r.nbytes), rewrite=True)
                durable[index] = False

        rows = [(*_extent(ranges[index]), ranges[index].tag, durable[index], 0) for index in sorted(durable)]
        assert store.receipts().tolist() == rows
        assert found(store) == rows
        assert found(store, RESET) == [row for row in rows if row[4]]


def _extent(r: AllocatedRange) -> tuple[int, int, int]:
    return r.start, r.stop, r.nbytes


def test_receipts_are_a_structured_array_and_a_copy(store: BlockStore) -> None:
    hello(store, tag=2**64 - 1)

    receipts = store.receipts()
    receipts["durable"] = True

    assert receipts.dtype == np.dtype(
        [("start", "u8"), ("stop", "u8"), ("nbytes", "u8"), ("tag", "u8"), ("durable", "?"), ("checksum", "u8")]
    )
    assert store.receipts().tolist() == [(0, 4096, 5, 2**64 - 1, False, 0)]


def test_without_receipts_the_array_is_empty(store: BlockStore) -> None:
    assert store.receipts().shape == (0,)


def test_receipts_can_be_had_after_closing(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", MIB) as store:
        hello(store, tag=3)

    assert store.receipts().tolist() == [(0, 4096, 5, 3, True, 0)]


def test_receipts_survive_that_the_journal_is_compacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_COMPACT_MIN", 10)
    with bs.create(tmp_path / "data.bin", MIB) as store:
        ranges = [hello(store, tag=i) for i in range(20)]
        for turn in range(5):
            for r in ranges[turn:]:
                r.write(b"HELLO", rewrite=True)
            store.flush()
            assert store._ledger._journal.count <= most(ranges)
        with pytest.raises(ZeroDivisionError), ranges[7].writer(rewrite=True):
            1 / 0
        ranges[3].write(b"Hello", rewrite=True)

        rows = [(*_extent(r), tag, tag != 3, 0) for tag, r in enumerate(ranges) if tag != 7]
        assert store.receipts().tolist() == rows
        assert found(store) == rows
        assert found(store, RESET) == [row for row in rows if row[4]]

    assert journal_of(store).stat().st_size <= 4 * 4096 + 88 * most(ranges)
    with bs.open(store.path) as again:
        assert again.receipts().tolist() == [(*row[:4], True, 0) for row in rows]


def most(ranges: Sized) -> int:
    """Return how many records a journal of ranges has at most, with a `_COMPACT_MIN` of 10."""
    return 10 + 2 * len(ranges) + 3


def write_while_the_journal_is_compacted(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], ...]:
    """Return what should stand, and what does in the store, for others, after a reset, and when it is opened anew."""
    monkeypatch.setattr(ledger, "_COMPACT_MIN", 10)
    with bs.create(path / "data.bin", MIB) as store:
        syncs = Syncs(monkeypatch, store)
        ranges = [hello(store, tag=i) for i in range(11)]
        rewritten = store.allocate(5, tag=11)

        def use(what: str) -> None:
            if syncs.done == [*FLUSH, "journal"]:
                rewritten.write(b"hello")
                rewritten.write(b"HELLO", rewrite=True)
                ranges[3].write(b"HELLO", rewrite=True)
                with pytest.raises(ZeroDivisionError), ranges[5].writer(rewrite=True):
                    1 / 0

        syncs.before = use
        assert store.flush() == 11
        syncs.before = lambda what: None
        rows = [(*_extent(r), r.tag, r.tag not in (3, 11), 0) for r in (*ranges, rewritten) if r.tag != 5]
        stands = store.receipts().tolist(), found(store), found(store, RESET)
        assert store._ledger._journal.count < len(ranges) + 10
    with bs.open(store.path) as again:
        return rows, *stands, again.receipts().tolist()


def test_what_is_written_while_the_journal_is_compacted_is_in_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, here, others, after_a_reset, anew = write_while_the_journal_is_compacted(tmp_path, monkeypatch)

    assert (here, others) == (rows, rows)
    assert after_a_reset == [row for row in rows if row[4]]
    assert anew == [(*row[:4], True, 0) for row in rows]


def test_a_new_journal_that_lacks_what_was_written_meanwhile_is_caught_by_the_same_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = journal.Journal.records

    def forget(of: journal.Journal, first: int = 0, stop: int | None = None) -> Any:
        forgotten = stop is None and 0 < first < of.count - 1
        return really(of, first, first if forgotten else stop)

    monkeypatch.setattr(journal.Journal, "records", forget)

    rows, here, *_ = write_while_the_journal_is_compacted(tmp_path, monkeypatch)

    assert [row[3] for row in rows] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert [row[3] for row in here] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("allocator", ["sequential", "concurrent"])
def test_threads_that_rewrite_and_flush_while_the_journal_is_compacted_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocator: Any
) -> None:
    monkeypatch.setattr(ledger, "_COMPACT_MIN", 10)
    with bs.create(tmp_path / "data.bin", MIB, allocator=allocator) as store:
        compacted: list[int] = []
        compact = store._ledger._compact

        def count_and_compact() -> None:
            compact()
            compacted.append(store._ledger._journal.count)

        monkeypatch.setattr(store._ledger, "_compact", count_and_compact)

        def work(thread: int) -> dict[AllocatedRange, bytes]:
            ranges = [store.allocate(5, tag=8 * thread + i) for i in range(8)]
            held: dict[AllocatedRange, bytes] = {}
            for turn in range(40):
                for i, r in enumerate(ranges):
                    held.pop(r, None)
                    if (turn + i) % 5 == 4:
                        with pytest.raises(ZeroDivisionError), r.writer(rewrite=True):
                            1 / 0
                    else:
                        held[r] = b"%05d" % turn
                        r.write(held[r], rewrite=True)
                if turn % 4 == thread:
                    store.flush()
            return held

        held = {r: data for part in in_threads(4, work) for r, data in part.items()}
        rows = sorted((*_extent(r), r.tag) for r in held)

        assert [row[:4] for row in store.receipts().tolist()] == rows
        assert [row[:4] for row in found(store)] == rows
        store.flush()
        assert found(store, RESET) == [(*row, True, 0) for row in rows]
        assert len(compacted) > 1
        assert all(contents(store)[r.start : r.start + 5] == data for r, data in held.items())

    assert journal_of(store).stat().st_size <= 4 * 4096 + 88 * (10 + 2 * 32 + 4 * 4)
    with bs.open(store.path) as again:
        assert again.receipts().tolist() == [(*row, True, 0) for row in rows]


def test_a_journal_that_finds_no_space_to_be_compacted_goes_on_as_it_is(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_COMPACT_MIN", 10)

    def refuse(file: object, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    r = hello(store)
    with monkeypatch.context() as patch:
        patch.setattr(_os, "reserve_space", refuse)
        for _ in range(20):
            r.write(b"HELLO", rewrite=True)
        count = store._ledger._journal.count

        assert (store.flush(), receipt_of(r).durable, found(store, RESET)) == (1, True, store.receipts().tolist())
    for _ in range(100):
        r.write(b"hello", rewrite=True)

    assert count == 41
    assert store._ledger._journal.count < 41
    assert sorted(os.listdir(Path(store.path).parent)) == ["data.bin", "data.bin.journal"]


def test_a_store_that_was_replaced_leaves_the_journal_of_the_new_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_COMPACT_MIN", 10)
    with bs.create(tmp_path / "data.bin", 4096) as old:
        r = hello(old)
        with bs.create(tmp_path / "data.bin", 8192, overwrite=True) as new:
            kept = hello(new, tag=9)
            for _ in range(20):
                r.write(b"HELLO", rewrite=True)

            assert (old.flush(), len(old.receipts())) == (1, 1)
            assert found(new) == new.receipts().tolist() == [(*_extent(kept), 9, False, 0)]

    with bs.open(tmp_path / "data.bin") as again:
        assert again.receipts()["tag"].tolist() == [9]


# -- what is pending ------------------------------------------------------------------------------


def test_what_is_pending_is_all_that_is_not_written(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 10 * 4096 + 100) as store:
        new = store.pending().tolist()
        first, fresh, _, last, inside, failed = (hello(store) if i != 1 else store.allocate(5000) for i in range(6))
        with pytest.raises(ZeroDivisionError), failed.writer(rewrite=True):
            1 / 0
        with inside.writer(rewrite=True):
            pending = store.pending()
        store.flush()

    assert new == [(0, 41_060, 41_060)]
    assert pending.tolist() == [(fresh.start, fresh.stop, 8192), (last.stop, 41_060, 41_060 - last.stop)]
    assert pending.dtype == np.dtype([("start", "u8"), ("stop", "u8"), ("nbytes", "u8")])
    assert store.pending().tolist() == [(fresh.start, fresh.stop, 8192), (inside.stop, 41_060, 41_060 - inside.stop)]
    assert first.start == 0


def test_nothing_is_pending_when_all_is_written(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 10_000) as store:
        for r in store.ranges(4096):
            r.write(bytes(r.nbytes))

        assert store.pending().shape == (0,)


def test_what_is_pending_can_be_asked_for_however_a_store_was_opened(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 3 * 4096) as store:
        store.allocate(4096)
        hello(store)
    holes = [(0, 4096, 4096), (8192, 12288, 4096)]

    with bs.open(store.path, mode="r") as reader, bs.open(store.path) as writer:
        assert [each.pending().tolist() for each in (store, reader, writer)] == [holes] * 3
        assert [_extent(r) for r in writer.ranges(8192)] == [(0, 4096, 4096), (8192, 12288, 4096)]
    journal_of(store).unlink()
    with bs.open(store.path) as foreign:
        assert foreign.pending().tolist() == [(0, 12288, 12288)]


@pytest.mark.parametrize("tag", [0, 1, 2**63, 2**64 - 1, np.uint64(7)], ids=repr)
def test_a_tag_has_64_bits(store: BlockStore, tag: int) -> None:
    r = store.allocate(5, tag=tag)
    r.write(b"hello")

    assert (r.tag, receipt_of(r).tag, int(store.receipts()["tag"][0])) == (tag, tag, tag)


@pytest.mark.parametrize("tag", [-1, 2**64, -(2**64)])
@pytest.mark.parametrize("how", ["allocate", "allocate_many", "ranges"])
def test_a_tag_of_more_than_64_bits_is_refused(store: BlockStore, how: str, tag: int) -> None:
    calls: dict[str, Callable[[], object]] = {
        "allocate": lambda: store.allocate(5, tag=tag),
        "allocate_many": lambda: store.allocate_many(2, 5, tag=tag),
        "ranges": lambda: next(store.ranges(5, tag=tag)),
    }

    with pytest.raises(ValueError, match=rf"a tag is 64 bits, 0 to 2\*\*64 - 1, not {tag}"):
        calls[how]()

    assert store.free == store.nbytes


# -- ranges of one call ---------------------------------------------------------------------------


def test_ranges_go_on_until_the_space_is_used_up(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 20_000) as store:
        ranges = list(store.ranges(8192, tag=3))

        assert [(*_extent(r), r.tag) for r in ranges] == [
            (0, 8192, 8192, 3),
            (8192, 16384, 8192, 3),
            (16384, 20_000, 3616, 3),
        ]
        assert store.free == 0


@pytest.mark.parametrize("allocator", ["sequential", "concurrent"])
def test_each_range_of_an_iterator_goes_to_one_thread(tmp_path: Path, allocator: Any) -> None:
    with bs.create(tmp_path / "data.bin", 1000 * ALIGNMENT - 1, allocator=allocator) as store:
        ranges = store.ranges(2 * ALIGNMENT)

        def work(thread: int) -> list[AllocatedRange]:
            mine = []
            for r in ranges:
                with r.writer() as a:
                    a[:] = thread + 1
                mine.append(r)
            return mine

        shares = in_threads(8, work)

        starts = sorted(r.start for mine in shares for r in mine)
        assert starts == list(range(0, 1000 * ALIGNMENT, 2 * ALIGNMENT))
        for thread, mine in enumerate(shares):
            assert all((r.read() == thread + 1).all() for r in mine)
        assert b"\0" not in contents(store)


@untimed
@given(count=st.integers(1, 50), nbytes=st.integers(1, 3 * ALIGNMENT), data=st.data())
def test_many_ranges_are_a_sequence_like_the_list_of_them(
    count: int, nbytes: int, data: st.DataObject, arena: BlockStore
) -> None:
    rs = arena.allocate_many(count, nbytes, tag=5)
    model = list(rs)

    index = data.draw(st.integers(-count - 2, count + 1))
    part = data.draw(st.slices(count))

    assert [r.start for r in model] == rs.starts.tolist()
    assert [(*_extent(r), r.tag) for r in model] == [
        (start, start + align_up(nbytes), nbytes, 5) for start in rs.starts.tolist()
    ]
    assert (len(rs), rs[part], list(reversed(rs))) == (count, model[part], model[::-1])
    try:
        expected = model[index]
    except IndexError:
        with pytest.raises(IndexError, match=f"index {index} is out of bounds for {count} ranges"):
            rs[index]
    else:
        assert rs[index] is expected
        assert rs.index(expected) == index % count


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockStore]:
    """A store with room for every example of a property."""
    with bs.create(tmp_path_factory.mktemp("arena") / "data.bin", 1 << 32, reserve=False) as store:
        yield store


def test_many_ranges_are_made_when_they_are_touched(store: BlockStore) -> None:
    rs = store.allocate_many(100, 5)

    first = rs[7]

    assert len(rs._made) == 1
    assert rs[7] is first
    assert rs[np.int8(7)] is first


def test_a_range_of_many_is_the_same_object_in_every_thread(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 2000 * ALIGNMENT, reserve=False) as store:
        rs = store.allocate_many(2000, 5)

        seen = in_threads(8, lambda _: list(rs))

        assert all(a is b for mine in seen[1:] for a, b in zip(seen[0], mine, strict=True))


def test_the_starts_of_many_ranges_cannot_be_changed(store: BlockStore) -> None:
    rs = store.allocate_many(3, 5000)

    with pytest.raises(ValueError, match="read-only"):
        rs.starts[0] = 1


def test_many_typed_ranges_are_typed_each(store: BlockStore) -> None:
    rs = store.allocate_many(3, shape=(2, 3), dtype="f8")

    with rs[1].writer() as a:
        assert (a.shape, a.dtype) == ((2, 3), np.float64)
    assert repr(rs) == "<RangeSequence: 3 ranges of 48 bytes from 0>"


def test_the_last_of_many_ranges_may_end_with_the_file(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 13_192) as store:
        assert _extent(store.allocate_many(2, 5000)[-1]) == (8192, 13_192, 5000)
        assert store.free == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"count": 0, "nbytes": 5}, ValueError, "a count is at least 1, not 0", id="none"),
        pytest.param({"count": 2, "nbytes": 0}, ValueError, "cannot allocate 0 bytes", id="empty"),
        pytest.param({"count": 2}, TypeError, "a byte count is an int, not None", id="no size"),
        pytest.param({"count": 2, "dtype": "f8"}, bs.LayoutError, "a dtype alone says no size", id="dtype only"),
        pytest.param({"count": 257, "nbytes": 1}, bs.OutOfSpaceError, "1048576 bytes are free", id="too many"),
        pytest.param({"count": 2**70, "nbytes": 2**70}, bs.OutOfSpaceError, "1048576 bytes are free", id="absurd"),
    ],
)
def test_many_ranges_are_handed_out_all_or_none(
    store: BlockStore, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        store.allocate_many(**arguments)

    assert (store.free, store.allocator.next_start) == (MIB, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"shape": 0, "dtype": "f8"}, "cannot allocate 0 bytes", id="empty axis"),
        pytest.param({"shape": (3, 0)}, "cannot allocate 0 bytes", id="empty shape"),
        pytest.param({"nbytes": 0, "dtype": "u1"}, "cannot allocate 0 bytes", id="no bytes"),
        pytest.param({"nbytes": -8, "dtype": "f8"}, "cannot allocate -8 bytes", id="negative bytes"),
        pytest.param({"nbytes": -8, "shape": 0}, "needs 0 bytes|cannot allocate", id="nothing in less than nothing"),
        pytest.param({"nbytes": 4, "shape": 1, "dtype": "f8"}, "needs 8 bytes, the range has 4", id="too few bytes"),
        pytest.param({"nbytes": 12, "dtype": "f8"}, "are no whole number of", id="a fraction"),
        pytest.param(
            {"shape": 2, "dtype": "f8", "partial": True}, "a typed range is whole or not at all", id="partial"
        ),
    ],
)
def test_a_typed_range_of_a_size_that_makes_no_sense_is_refused(
    store: BlockStore, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        store.allocate(**arguments)

    assert (store.free, store.allocator.next_start) == (MIB, 0)


@pytest.mark.parametrize("arguments", [{"nbytes": 8.0, "dtype": "f8"}, {"nbytes": 8.0, "shape": 1}, {"nbytes": "8"}])
def test_a_size_that_is_no_integer_is_refused(store: BlockStore, arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="int"):
        store.allocate(**arguments)

    assert store.free == MIB


# -- create and open ------------------------------------------------------------------------------


def test_a_new_file_is_zeros_and_nothing_else(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 10_001):
        pass

    assert (tmp_path / "data.bin").read_bytes() == bytes(10_001)
    assert sorted(os.listdir(tmp_path)) == ["data.bin", "data.bin.journal"]


@pytest.mark.parametrize("path", [str, os.fsencode, Path], ids=["str", "bytes", "Path"])
def test_a_path_is_given_in_any_form(tmp_path: Path, path: Callable[[str], Any]) -> None:
    with bs.create(path(os.path.join(tmp_path, "data.bin")), 100) as store:
        assert store.path == str(tmp_path / "data.bin")


def test_a_relative_path_is_of_the_folder_at_that_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with bs.create("data.bin", 100) as store:
        monkeypatch.chdir("/")
        assert store.path == str(tmp_path / "data.bin")
        assert pickle.loads(pickle.dumps(store)) is store


def test_overwriting_replaces_the_file_and_the_old_store_keeps_its_own(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    with bs.create(path, 4096) as old:
        r = hello(old)

        with bs.create(path, 8192, overwrite=True) as new:
            assert path.read_bytes() == bytes(8192)
            r.write(b"HELLO", rewrite=True)
            old.flush()
            assert new.raw.read_at(0, 5) == bytes(5)
            assert (len(old.receipts()), len(new.receipts()), found(new)) == (1, 0, [])

        assert bytes(r.read()) == b"HELLO"
        assert sorted(os.listdir(tmp_path)) == ["data.bin", "data.bin.journal"]
    with bs.open(path) as again:
        assert (again.nbytes, again.free, len(again.receipts())) == (8192, 8192, 0)


def test_overwriting_what_is_not_there_creates_it(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 4096, overwrite=True) as store:
        assert contents(store) == bytes(4096)


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_file_without_a_journal_has_nothing_free(tmp_path: Path, mode: Any) -> None:
    (tmp_path / "data.bin").write_bytes(b"x" * 10_001)

    with bs.open(tmp_path / "data.bin", mode=mode) as store:
        assert (store.nbytes, store.free, store.mode, len(store.receipts())) == (10_001, 0, mode, 0)
        assert store.raw.read_at(0, 10_001) == b"x" * 10_001
    assert os.listdir(tmp_path) == ["data.bin"]


def test_a_file_without_a_journal_hands_out_nothing(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"x" * 10_001)

    with bs.open(tmp_path / "data.bin") as store:
        with pytest.raises(bs.OutOfSpaceError, match="cannot allocate 1 bytes: 0 bytes are free"):
            store.allocate(1)
        assert list(store.ranges(1)) == []


@pytest.mark.parametrize("allocator", ["sequential", "concurrent"])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_an_opened_file_knows_what_was_written_and_has_the_rest_free(tmp_path: Path, allocator: Any, mode: Any) -> None:
    with bs.create(tmp_path / "data.bin", 10_001, allocator=allocator) as created:
        store_tail(created)

    with bs.open(tmp_path / "data.bin", mode=mode) as store:
        assert (store.nbytes, store.mode) == (10_001, mode)
        assert store.receipts().tolist() == [(8192, 10_001, 1000, 7, True, 0)]
        assert type(store.allocator) is type(created.allocator)
        assert store.raw.read_at(8192, 1000) == b"x" * 1000
        assert store.free == (8192 if mode == "r+" else 0)
        if mode == "r+":
            assert [_extent(r) for r in store.ranges(5000)] == [(0, 8192, 5000)]


def store_tail(store: BlockStore) -> None:
    """Write the end of a store of 10,001 bytes."""
    store.allocate(5000)
    store.allocate(1000, tag=7).write(b"x" * 1000)


WRITE_AND_DIE = """
import os, sys
import blockstore as bs
store = bs.create(sys.argv[1], 3 * 4096)
store.allocate(5, tag=1).write(b"hello")
store.flush()
store.allocate(5, tag=2).write(b"world")
with store.allocate(5, tag=3).writer() as a:
    a[:] = 7
    os._exit(9)
"""


@pytest.mark.parametrize("reset", [False, True], ids=["same boot", "after a reset"])
def test_what_a_process_wrote_before_it_died_is_known_and_after_a_reset_what_was_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reset: bool
) -> None:
    ran = run_python(WRITE_AND_DIE, tmp_path / "data.bin")
    if reset:
        monkeypatch.setenv("BLOCKSTORE_BOOT_ID", RESET)

    with bs.open(tmp_path / "data.bin") as store:
        rows, free = store.receipts().tolist(), store.free

    kept = [(0, 4096, 5, 1, True, 0), (4096, 8192, 5, 2, True, 0)][: 1 if reset else 2]
    assert (ran.returncode, ran.stderr) == (9, "")
    assert (rows, free) == (kept, 12288 - 4096 * len(kept))
    monkeypatch.setenv("BLOCKSTORE_BOOT_ID", "yet another boot")
    with bs.open(tmp_path / "data.bin", mode="r") as again:
        assert again.receipts().tolist() == kept


@pytest.mark.parametrize("allocator", ["sequential", "concurrent"])
def test_discarding_hands_out_the_whole_file_again(tmp_path: Path, allocator: Any) -> None:
    (tmp_path / "data.bin").write_bytes(b"x" * 10_001)

    with bs.open(tmp_path / "data.bin", discard=True, allocator=allocator) as store:
        r = store.allocate(10_001)
        with r.writer() as a:
            assert bytes(a) == b"x" * 10_001
            a[:5] = list(b"hello")

    assert (tmp_path / "data.bin").read_bytes() == b"hello" + b"x" * 9_996


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda s: s.allocate(1), id="allocate"),
        pytest.param(lambda s: s.allocate(1, partial=True), id="allocate partial"),
        pytest.param(lambda s: s.allocate_many(1, 1), id="allocate_many"),
        pytest.param(lambda s: s.ranges(1), id="ranges"),
        pytest.param(lambda s: s.flush(), id="flush"),
        pytest.param(lambda s: s.flush(wait=False), id="flush without waiting"),
        pytest.param(lambda s: s.sync(), id="sync"),
        pytest.param(lambda s: s.raw.write_at(0, b"x"), id="raw.write_at"),
        pytest.param(lambda s: s.raw.fill(0, 1, 1), id="raw.fill"),
        pytest.param(lambda s: s.raw.zero(0, 1), id="raw.zero"),
        pytest.param(lambda s: s.raw.flush_range(0, 1), id="raw.flush_range"),
    ],
)
def test_a_store_that_is_open_to_read_writes_nothing(tmp_path: Path, use: Callable[[BlockStore], object]) -> None:
    (tmp_path / "data.bin").write_bytes(b"x" * 100)
    (tmp_path / "data.bin").chmod(0o444)

    with bs.open(tmp_path / "data.bin", mode="r") as store:
        with pytest.raises(bs.ReadOnlyStoreError, match=r"data\.bin' was opened with mode='r'"):
            use(store)
        assert not store.raw.array(0, 100).flags.writeable

    assert (tmp_path / "data.bin").read_bytes() == b"x" * 100


each_opening = pytest.mark.parametrize("discard", [False, True], ids=["as it is", "to discard"])


@each_opening
def test_what_is_open_for_writing_cannot_be_opened_for_writing(store: BlockStore, discard: bool) -> None:
    hello(store)
    message = rf"cannot open '.*data\.bin' for writing: {re.escape(repr(store))} of this process has it open; mode='r'"

    with pytest.raises(BlockingIOError, match=message) as refusal:
        bs.open(store.path, discard=discard)

    assert isinstance(refusal.value, bs.StoreInUseError)
    assert (contents(store)[:5], len(store.receipts())) == (b"hello", 1)
    assert (store.flush(), len(found(store, RESET))) == (1, 1)


OPEN_IN_USE = """
import sys
import blockstore as bs
try:
    bs.open(sys.argv[1], discard=sys.argv[2] == "True")
except bs.StoreInUseError as error:
    print(error)
print(len(bs.open(sys.argv[1], mode="r").receipts()), flush=True)
import os
os._exit(0)
"""


@each_opening
def test_what_another_process_has_open_for_writing_cannot_be_opened_for_writing(
    store: BlockStore, discard: bool
) -> None:
    hello(store)

    ran = run_python(OPEN_IN_USE, store.path, discard)

    assert (ran.stderr, ran.returncode) == ("", 0)
    assert ran.stdout == (
        f"cannot open {store.path!r} for writing: a store of another process has it open; mode='r' reads it\n1\n"
    )


@each_opening
def test_a_file_is_known_by_its_identity_and_not_by_its_name(store: BlockStore, tmp_path: Path, discard: bool) -> None:
    os.link(store.path, tmp_path / "other name.bin")
    os.symlink(store.path, tmp_path / "symlink.bin")

    for name in ("other name.bin", "symlink.bin"):
        with pytest.raises(bs.StoreInUseError, match=rf"cannot open '.*{name}' for writing: <BlockStore 'data.bin'"):
            bs.open(tmp_path / name, discard=discard)


@each_opening
def test_a_refused_opening_leaves_the_lock_with_the_store_that_has_it(store: BlockStore, discard: bool) -> None:
    for _ in range(2):
        with pytest.raises(bs.StoreInUseError, match="has it open"):
            bs.open(store.path, discard=discard)
    store.close()

    with bs.open(store.path, discard=discard) as again:
        assert again.free == MIB


def test_what_others_only_read_can_be_discarded(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 4096) as store:
        hello(store)

    with bs.open(store.path, mode="r") as reader, bs.open(store.path, discard=True) as writer:
        writer.allocate(5).write(b"HELLO")
        assert reader.raw.read_at(0, 5) == b"HELLO"
        assert len(reader.receipts()) == 1


def test_a_file_that_was_closed_can_be_discarded(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 8192) as store:
        hello(store)

    with bs.open(tmp_path / "data.bin", discard=True) as store:
        assert (store.free, len(store.receipts()), found(store)) == (8192, 0, [])


@pytest.mark.parametrize("call", [bs.create, bs.open], ids=["create", "open"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        pytest.param({"allocator": "random"}, "allocator is one of 'sequential', 'concurrent', not 'random'", id="a"),
        pytest.param({"access": "wild"}, "access is one of 'dense', 'sparse', not 'wild'", id="b"),
        pytest.param({"guard": None}, "guard is one of 'flag', 'seal', not None", id="c"),
        pytest.param({"escaped": "shout"}, "escaped is one of 'warn', 'raise', 'ignore', not 'shout'", id="d"),
    ],
)
def test_an_option_that_does_not_exist_is_refused(
    tmp_path: Path, call: Callable[..., object], option: dict[str, Any], message: str
) -> None:
    arguments = (4096,) if call is bs.create else ()

    with pytest.raises(ValueError, match=message):
        call(tmp_path / "data.bin", *arguments, **option)

    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"mode": "w"}, r"mode is one of 'r', 'r\+', not 'w'", id="mode"),
        pytest.param({"mode": "r", "discard": True}, r"needs mode='r\+'", id="discard to read"),
        pytest.param({"checksum": "crc32"}, "the checksum is what the store was created with", id="checksum"),
    ],
)
def test_opening_in_a_way_that_makes_no_sense_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "data.bin").write_bytes(b"x")

    with pytest.raises(ValueError, match=message):
        bs.open(tmp_path / "data.bin", **options)


# -- close ----------------------------------------------------------------------------------------


def test_leaving_the_block_makes_everything_durable(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 4096) as store:
        receipt = receipt_of(hello(store))

    assert (receipt.durable, store.closed) == (True, True)


def test_leaving_the_block_by_an_exception_makes_everything_durable_too(tmp_path: Path) -> None:
    receipts: list[bs.WriteReceipt] = []

    def fill_and_fail() -> None:
        with bs.create(tmp_path / "data.bin", 4096) as store:
            receipts.append(receipt_of(hello(store)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_and_fail()

    assert receipts[0].durable


def test_closing_twice_does_nothing(store: BlockStore, syncs: Syncs) -> None:
    hello(store)
    store.close()
    done = syncs.done.copy()

    store.close()

    assert (syncs.done, done) == (FLUSH, FLUSH)


def test_closing_what_was_flushed_syncs_nothing(store: BlockStore, syncs: Syncs) -> None:
    hello(store)
    store.flush()

    store.close()

    assert syncs.done == FLUSH


def test_a_writer_that_is_inside_when_the_store_is_closed_gets_no_receipt(tmp_path: Path) -> None:
    store = bs.create(tmp_path / "data.bin", 4096)
    r = store.allocate(5)

    with pytest.raises(bs.ClosedStoreError, match=r"data\.bin' is closed"):
        close_inside(r, store)

    assert (r.receipt, len(store.receipts())) == (None, 0)


def close_inside(r: AllocatedRange, store: BlockStore) -> None:
    with r.writer() as a:
        a[:] = 1
        store.close()
        a[:] = 2


def test_the_block_refuses_a_store_that_is_closed_only_when_it_is_used(tmp_path: Path) -> None:
    store = bs.create(tmp_path / "data.bin", 4096)
    store.close()

    with store:
        with pytest.raises(bs.ClosedStoreError, match="is closed"):
            store.allocate(1)
        with pytest.raises(bs.ClosedStoreError, match="is closed"):
            store.raw.read_at(0, 1)


def test_a_store_that_nobody_closed_is_flushed_and_says_so(tmp_path: Path) -> None:
    script = f"""
import gc, os, sys, warnings
import blockstore as bs
really = os.{SYNC}
store = bs.create(sys.argv[1], 4096)
os.{SYNC} = lambda fd: (really(fd), print("synced"))
store.allocate(5).write(b"hello")
warnings.showwarning = lambda message, *_: print(message)
warnings.simplefilter("always")
del store
gc.collect()
"""
    done = run_python(script, tmp_path / "data.bin")

    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == (
        "<BlockStore 'data.bin': 4096 bytes, 0 free, 1 receipts, open \"r+\"> was never closed\nsynced\nsynced\n"
    )


def test_a_store_lives_as_long_as_a_range_of_it(tmp_path: Path) -> None:
    r = hello(bs.create(tmp_path / "data.bin", 4096))

    assert bytes(r.read()) == b"hello"
    r._owner.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("open_", "text"),
    [
        pytest.param(
            lambda p: bs.create(p, 8192), 'data.bin\': 8192 bytes, 4096 free, 1 receipts, open "r+"', id="new"
        ),
        pytest.param(
            lambda p: p.write_bytes(b"x") and bs.open(p), 'data.bin\': 1 bytes, 0 free, 0 receipts, open "r+"', id="r+"
        ),
        pytest.param(
            lambda p: p.write_bytes(b"x") and bs.open(p, mode="r"),
            'data.bin\': 1 bytes, 0 free, 0 receipts, open "r"',
            id="r",
        ),
    ],
)
def test_a_store_says_what_it_is(tmp_path: Path, open_: Callable[[Path], BlockStore], text: str) -> None:
    with open_(tmp_path / "data.bin") as store:
        if store.free:
            hello(store)

        assert repr(store) == f"<BlockStore '{text}>"

    assert repr(store) == f"<BlockStore 'data.bin': {store.nbytes} bytes, closed>"


# -- close while others flush and rewrite ---------------------------------------------------------


def shut_late(store: BlockStore, monkeypatch: pytest.MonkeyPatch, before: Callable[[], Stall]) -> None:
    """Close a store; when it has flushed, let others begin something that stalls, and end that when it is shut."""
    shut = store._shut

    def begin_and_shut(why: str) -> None:
        stall = before()
        for name in ("_flushing", "_syncing"):  # should the store wait for them
            monkeypatch.setattr(store._ledger, name, Noticing(getattr(store._ledger, name), stall.end))
        shut(why)
        stall.end()

    monkeypatch.setattr(store, "_shut", begin_and_shut)
    store.close()


@each_sync
def test_a_flush_that_waits_while_the_store_is_closed_is_refused_or_has_synced_what_it_calls_durable(
    store: BlockStore, syncs: Syncs, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    receipts: list[bs.WriteReceipt] = []
    flushes: list[Future[int]] = []

    def begin() -> Stall:
        receipts.append(receipt_of(hello(store)))
        stall = Stall(syncs, what)
        flushes.append(pool.submit(store.flush))
        stall.reached()
        return stall

    with ThreadPoolExecutor(1) as pool:
        shut_late(store, monkeypatch, begin)
        error = flushes[0].exception()

    assert type(error) in (type(None), bs.ClosedStoreError)
    assert receipts[0].durable == (error is None and syncs.done == FLUSH)


def test_a_rewrite_that_waits_while_the_store_is_closed_is_refused_or_has_its_revocation_on_the_disk(
    store: BlockStore, syncs: Syncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = [hello(store), hello(store)]
    receipts = [receipt_of(r) for r in ranges]
    calls: list[Future[None]] = []
    entered: list[tuple[int, list[str]]] = []

    def rewrite(r: AllocatedRange) -> None:
        with suppress(bs.ClosedStoreError), r.writer(rewrite=True) as a:
            entered.append((r.start, syncs.done.copy()))
            a[:] = list(b"HELLO")

    def begin() -> Stall:
        syncs.done.clear()
        stall = Stall(syncs, "journal")
        calls.append(pool.submit(rewrite, ranges[0]))
        stall.reached()
        calls.append(pool.submit(rewrite, ranges[1]))
        wait_until(lambda: receipts[1].revoked or calls[1].done())
        return stall

    store.flush()
    with ThreadPoolExecutor(2) as pool:
        shut_late(store, monkeypatch, begin)
        for call in calls:
            call.result()

    second = [done for start, done in entered if start == ranges[1].start]
    assert second in ([], [["journal", "journal"]])
    assert bool(second) or contents(store)[4096:4101] == b"hello"


# -- by reference ---------------------------------------------------------------------------------


def test_a_store_unpickles_to_itself_in_the_same_process(store: BlockStore) -> None:
    assert pickle.loads(pickle.dumps(store)) is store


def test_a_store_unpickles_to_itself_while_others_are_open_on_its_file(store: BlockStore) -> None:
    with bs.open(store.path, mode="r") as reader, bs.open(store.path, mode="r") as other:
        unpickled = [pickle.loads(pickle.dumps(each)) for each in (store, reader, other)]

        assert unpickled == [store, reader, other]


def test_a_written_range_unpickles_to_a_reference(store: BlockStore) -> None:
    r = store.allocate(shape=(2, 3), dtype="f4", tag=7)
    r.write(np.arange(6, dtype="f4").reshape(2, 3))

    b = pickle.loads(pickle.dumps(r))

    assert (b.start, b.stop, b.nbytes, b.tag, b._owner) == (r.start, r.stop, r.nbytes, r.tag, store)
    np.testing.assert_array_equal(b.read(), r.read())


def test_a_reference_can_be_passed_on(store: BlockStore) -> None:
    r = hello(store)

    b = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(r))))

    assert bytes(b.read()) == b"hello"


def test_a_pickle_is_as_small_for_any_content(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 64 * MIB) as store:
        small, large = store.allocate(2**20), store.allocate(2**25)
        for r in (small, large):
            r.write(np.zeros(r.nbytes, "u1"))

        sizes = len(pickle.dumps(store)), len(pickle.dumps(small)), len(pickle.dumps(large))

        assert max(sizes) < 1000
        assert abs(sizes[1] - sizes[2]) < 16


def total(r: AllocatedRange) -> tuple[int, float, str]:
    """Called in another process."""
    return os.getpid(), float(r.read().sum()), r._owner.mode  # type: ignore[attr-defined]


def test_a_written_range_is_read_in_another_process(store: BlockStore) -> None:
    r = store.allocate(shape=1000, dtype="f8")
    with r.writer() as a:
        a[:] = np.arange(1000)

    script = """
import pickle, sys
r = pickle.loads(bytes.fromhex(sys.argv[1]))
print(r.read().sum(), r._owner.mode, r)
try:
    r.writer().__enter__()
except ValueError as error:
    print(type(error).__name__)
r._owner.close()
"""
    done = run_python(script, pickle.dumps(r).hex())

    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == "499500.0 r <AllocatedRange [0, 8192) 8000 bytes, a reference>\nSpentRangeError\n"


def test_ranges_are_sent_to_a_pool_of_processes(store: BlockStore) -> None:
    ranges = [store.allocate(shape=100, dtype="f8") for _ in range(4)]
    for value, r in enumerate(ranges):
        r.write(np.full(100, value, "f8"))

    with get_context("spawn").Pool(1) as pool:
        answers = pool.map(total, ranges)

    assert os.getpid() not in {pid for pid, _, _ in answers}
    assert [(value, mode) for _, value, mode in answers] == [(0, "r"), (100, "r"), (200, "r"), (300, "r")]


@pytest.mark.parametrize("what", ["store", "range"])
def test_a_reference_to_a_file_that_was_replaced_is_stale(tmp_path: Path, what: str) -> None:
    with bs.create(tmp_path / "data.bin", 4096) as old:
        r = hello(old)
        pickled = pickle.dumps(old if what == "store" else r)
        with bs.create(tmp_path / "data.bin", 4096, overwrite=True):
            pass
        script = """
import pickle, sys
import blockstore as bs
try:
    pickle.loads(bytes.fromhex(sys.argv[1]))
except bs.StaleReferenceError as error:
    print(isinstance(error, ValueError), error)
"""
        done = run_python(script, pickled.hex())

    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.startswith("True ")
    assert "data.bin' is not the file that this reference was made for: it was replaced" in done.stdout


def test_a_reference_finds_the_store_that_is_open_although_its_file_was_replaced(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 4096) as old:
        pickled = pickle.dumps(hello(old))
        with bs.create(tmp_path / "data.bin", 4096, overwrite=True):
            assert bytes(pickle.loads(pickled).read()) == b"hello"


def test_a_reference_to_a_file_that_is_gone_says_so(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 4096) as store:
        pickled = pickle.dumps(store)
    os.unlink(store.path)

    with pytest.raises(FileNotFoundError, match=r"data\.bin"):
        pickle.loads(pickled)


def test_a_closed_store_does_not_travel(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 4096) as store:
        r = hello(store)

    for what in (store, r):
        with pytest.raises(bs.ClosedStoreError, match="is closed"):
            pickle.dumps(what)
