"""Ctrl-C and signal handlers in the midst of a step, arrays that outlive their store: nothing is lost or doubled."""

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import PORTABLE, interrupt_at

import blockstore as bs
from blockstore import _os, ledger, sidecar
from blockstore.journal import Journal

linux_only = pytest.mark.skipif(PORTABLE, reason="says what Linux does")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.bin"


def tags(path: Path) -> list[int]:
    with bs.open(path, mode="r") as store:
        found: list[int] = store.receipts()["tag"].tolist()
        return found


# -- Ctrl-C while a journal is written anew ---------------------------------------------------------


@pytest.mark.parametrize("where", ["before", "behind"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_around_the_naming_of_a_new_journal_loses_no_receipt(
    path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: type[BaseException]
) -> None:
    monkeypatch.setattr(ledger, "_COMPACT_MIN", 4)
    publish = _os.publish

    def interrupted(*args: Any, **kwargs: Any) -> None:
        if where == "behind":
            publish(*args, **kwargs)
        raise error

    def rewrite(r: bs.AllocatedRange) -> None:
        for _ in range(20):
            r.write(b"HELLO", rewrite=True)

    with bs.create(path, 1 << 16) as store:
        r = store.allocate(5, tag=1)
        r.write(b"hello")
        monkeypatch.setattr(_os, "publish", interrupted)
        with pytest.raises(error):
            rewrite(r)
        monkeypatch.setattr(_os, "publish", publish)

        late = store.allocate(4, tag=2).write(b"late")
        store.flush()
        assert late.durable
        assert 2 in tags(path)
    assert 2 in tags(path)


def test_a_new_journal_that_is_forgotten_is_caught_by_the_same_check(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecar, "is_file", lambda path, identity: not path.endswith(".journal"))

    with pytest.raises(AssertionError):
        test_an_interrupt_around_the_naming_of_a_new_journal_loses_no_receipt(
            path, monkeypatch, "behind", KeyboardInterrupt
        )


# -- signal handlers --------------------------------------------------------------------------------


@contextmanager
def handled(call: Callable[[], object]) -> Iterator[list[str]]:
    """Handle SIGUSR1 by a call, and yield what came of it."""
    came: list[str] = []

    def handle(number: int, frame: Any) -> None:
        try:
            came.append(f"returned {call()!r}")
        except BaseException as error:
            came.append(type(error).__name__)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        yield came
    finally:
        signal.signal(signal.SIGUSR1, before)


CALLS: dict[str, Callable[[bs.BlockStore, bs.AllocatedRange], object]] = {
    "flush": lambda store, r: store.flush(),
    "sync": lambda store, r: store.sync(),
    "close": lambda store, r: store.close(),
    "write": lambda store, r: r.write(b"again", rewrite=True),
}


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs signals")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("step", ["append", "sync"])
def test_a_handler_that_interrupts_a_step_of_its_own_thread_is_refused_and_the_step_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: str
) -> None:
    with bs.create(path, 1 << 16) as store:
        other = store.allocate(5, tag=1)
        other.write(b"hello")
        r = store.allocate(5, tag=2)
        call = getattr(Journal, step)

        def signalled(journal: Journal, *args: Any, **kwargs: Any) -> Any:
            monkeypatch.setattr(Journal, step, call)
            os.kill(os.getpid(), signal.SIGUSR1)
            return call(journal, *args, **kwargs)

        with handled(lambda: CALLS[name](store, other)) as came:
            monkeypatch.setattr(Journal, step, signalled)
            r.write(b"world")
            store.flush()

        assert came == ["RuntimeError"]
        assert store.receipts()[["tag", "durable"]].tolist() == [(1, True), (2, True)]
    assert tags(path) == [1, 2]


# -- arrays that outlive their store ----------------------------------------------------------------


def test_a_file_that_a_writer_inside_can_still_write_is_not_opened_for_writing(path: Path) -> None:
    store = bs.create(path, 1 << 16)
    writer = store.allocate(4096).writer()
    a = writer.__enter__()
    store.close()

    with pytest.raises(bs.StoreInUseError, match="arrays of a closed store of this process"):
        bs.open(path)
    with bs.open(path, mode="r") as reader:
        assert len(reader.receipts()) == 0

    with pytest.raises(bs.ClosedStoreError):
        writer.__exit__(None, None, None)
    del a, writer
    gc.collect()
    bs.open(path).close()


def test_a_file_that_an_escaped_view_can_still_write_is_not_opened_for_writing(path: Path) -> None:
    store = bs.create(path, 1 << 16, escaped="raise")
    with pytest.raises(bs.EscapedViewError), store.allocate(4096).writer() as a:
        late = a[10:20]
    store.close()
    with pytest.raises(bs.StoreInUseError):
        bs.open(path)

    late[:] = 1
    del a, late
    gc.collect()
    bs.open(path).close()


@linux_only
def test_arrays_that_cannot_reach_the_file_keep_nobody_out(path: Path) -> None:
    store = bs.create(path, 1 << 24, guard="seal", escaped="ignore")
    small, large = store.allocate(4096), store.allocate(1 << 23)
    with small.writer() as a, large.writer() as b:
        late = a[:5], b[:5]
    inside = store.allocate(4096).writer()
    inside.__enter__()
    store.close()

    with bs.open(path, escaped="ignore") as again:
        late[0][:] = late[1][:] = 1
        assert again.raw.read_at(0, 5) == bytes(5)


def test_arrays_that_are_only_read_keep_nobody_out(path: Path) -> None:
    store = bs.create(path, 1 << 16)
    r = store.allocate(5)
    r.write(b"hello")
    a = r.read()
    store.close()

    bs.open(path).close()
    assert a.tobytes() == b"hello"
    assert isinstance(a, np.ndarray)


# -- processes that are about to run a program ------------------------------------------------------


@linux_only
def test_a_program_that_is_being_started_keeps_no_lock(path: Path) -> None:
    """A child that was forked to run a program has the lock's descriptor until it does."""
    bs.create(path, 1 << 16).close()
    stop = threading.Event()

    def run_programs() -> None:
        while not stop.is_set():
            subprocess.run([sys.executable, "--version"], capture_output=True, check=True)

    threads = [threading.Thread(target=run_programs) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(150):
            bs.open(path).close()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# -- Ctrl-C at any moment of a rewrite ------------------------------------------------------------


def test_an_interrupt_anywhere_in_a_revocation_leaves_range_and_journal_of_one_mind(path: Path) -> None:
    """The interrupt comes where Python handles signals: as a function begins, and behind each call of C."""
    for moment in range(100):
        with bs.create(path, 1 << 16, overwrite=True) as store:
            r = store.allocate(5, tag=1)
            r.write(b"hello")
            store.flush()
            interrupted = interrupt_at(moment, lambda r=r, store=store: store._ledger.revoke(r))
            assert (r.receipt is None) == (len(store.receipts()) == 0), f"at moment {moment}"
            if not interrupted:
                break
    assert 5 < moment < 99
