"""What several test modules share: scripts in a Python of their own, forked children, and every use of a store."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import blockstore as bs
from blockstore import _os
from blockstore.sequences import RangeSequence

PORTABLE = _os.PORTABLE

T = TypeVar("T")

CHILD_SECONDS = 10
"""After which a forked child that hangs kills itself."""


def contents(store: bs.BlockStore) -> bytes:
    """Return what the file of a store holds, read as any other program would."""
    return Path(store.path).read_bytes()


def run_python(
    script: str, *args: object, options: Sequence[str] = (), under: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter that is set up like this one, with options, under another program."""
    flags = [] if getattr(sys, "_is_gil_enabled", lambda: True)() else ["-X", "gil=0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [*under, sys.executable, *flags, *options, "-c", script, *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def in_child(call: Callable[[], T]) -> T:
    """Return what `call` returns in a forked child. It must pickle; a child that hangs or dies is an error here."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later: threads are alive
        pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(CHILD_SECONDS)
            try:
                answer: tuple[bool, Any] = (True, call())
            except BaseException as error:
                answer = (False, f"{type(error).__name__}: {error}")
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(answer, pipe)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        pickled = pipe.read()
    _, status = os.waitpid(pid, 0)
    if not pickled:
        raise AssertionError(f"the child gave no answer: wait status {status}")
    succeeded, answered = pickle.loads(pickled)
    if not succeeded:
        raise AssertionError(f"in the child: {answered}")
    result: T = answered
    return result


def in_threads(count: int, call: Callable[[int], T]) -> list[T]:
    """Call a function with 0 to `count` - 1, each in a thread of its own, all at once; return what it returned."""
    together = threading.Barrier(count)

    def begin(thread: int) -> T:
        together.wait()
        return call(thread)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def interrupt_at(moment: int, call: Callable[[], object], within: Container[str] | None = None) -> bool:
    """Call something, and raise KeyboardInterrupt at one of the moments in it; return whether it came.

    Moments are those where Python handles signals: as a function begins, and behind each call of C. Only those in the
    files `within` count, if these are given.
    """
    left = moment

    def profile(frame: Any, event: str, argument: object) -> None:
        nonlocal left
        if event in ("call", "c_return") and (within is None or frame.f_code.co_filename in within):
            left -= 1
            if left == -1:
                sys.setprofile(None)
                raise KeyboardInterrupt

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(before)
    return False


class Uses(NamedTuple):
    """A store, and one of each thing that it hands out."""

    store: bs.BlockStore
    written: bs.AllocatedRange
    fresh: bs.AllocatedRange
    rows: RangeSequence
    rest: Iterator[bs.AllocatedRange]
    stack: ExitStack
    """Holds the writer of a further range, which is inside."""


def uses_of(store: bs.BlockStore) -> Uses:
    """Use a new store of at least 64 KiB, so that `USES` applies to it."""
    written, fresh, open_ = store.allocate(5), store.allocate(5000), store.allocate(5)
    written.write(b"hello")
    stack = ExitStack()
    stack.enter_context(open_.writer())
    return Uses(store, written, fresh, store.allocate_many(2, 100), store.ranges(4096), stack)


def _enter(r: bs.AllocatedRange, *, rewrite: bool = False) -> None:
    with r.writer(rewrite=rewrite):
        pass


USES: dict[str, Callable[[Uses], object]] = {
    "allocate": lambda u: u.store.allocate(1),
    "allocate partial": lambda u: u.store.allocate(1, partial=True),
    "allocate typed": lambda u: u.store.allocate(shape=2, dtype="f8"),
    "allocate_many": lambda u: u.store.allocate_many(2, 100),
    "ranges": lambda u: u.store.ranges(4096),
    "next of ranges": lambda u: next(u.rest),
    "flush": lambda u: u.store.flush(),
    "flush a receipt": lambda u: u.store.flush(u.written.receipt),
    "flush without waiting": lambda u: u.store.flush(wait=False),
    "sync": lambda u: u.store.sync(),
    "raw.write_at": lambda u: u.store.raw.write_at(0, b"x"),
    "raw.read_at": lambda u: u.store.raw.read_at(0, 1),
    "raw.fill": lambda u: u.store.raw.fill(0, 1, 1),
    "raw.zero": lambda u: u.store.raw.zero(0, 1),
    "raw.flush_range": lambda u: u.store.raw.flush_range(0, 1),
    "raw.array": lambda u: u.store.raw.array(0, 1),
    "raw.address": lambda u: u.store.raw.address(),
    "writer": lambda u: _enter(u.fresh),
    "writer of a row": lambda u: _enter(u.rows[1]),
    "writer that rewrites": lambda u: _enter(u.written, rewrite=True),
    "exit of a writer": lambda u: u.stack.close(),
    "write": lambda u: u.fresh.write(bytes(5000)),
    "write that rewrites": lambda u: u.written.write(b"HELLO", rewrite=True),
    "read": lambda u: u.written.read(),
    "split_up": lambda u: u.fresh.split_up(4096),
    "split_down": lambda u: u.fresh.split_down(4096),
    "pickle the store": lambda u: pickle.dumps(u.store),
    "pickle a range": lambda u: pickle.dumps(u.written),
}
"""Every use of a store and of what it hands out that must be refused once the store is down."""


def admitted(uses: Uses, error: type[Exception]) -> list[str]:
    """Return the names of the uses that did not raise `error`, each with what happened."""
    names = []
    for name, use in USES.items():
        try:
            names.append(f"{name} returned {use(uses)!r}")
        except error:
            pass
        except Exception as other:
            names.append(f"{name} raised {other!r}")
    return names
