"""Truth: what a store must and may hold after a crash, kept outside of the process that crashed.

A writer says each step on a pipe that outlives it: a write before it begins, a receipt after it was issued, a flush
after it returned. What is in the pipe counts. `Truth` keeps the account and holds a store against it: every
acknowledged receipt stands, each receipt stands for the bytes of one version that was begun, and no two share a byte.

A range is a job: its tag is the number of the job, and each of its words is a hash of seed, job, version and place.
Nothing here knows how a store records anything.

Examples
--------
>>> truth = Truth(str(tmp_path / "data.bin"), seed=0)
>>> truth.hear("b 5 0 0 16384".split()), truth.hear("w 5 0".split())
(None, None)
>>> truth.due
{5: (0, False)}
"""

import contextlib
import functools
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import blockstore as bs

SIZE = 4 * bs.ALIGNMENT
"""Bytes that the range of a job owns."""

BOOT = "BLOCKSTORE_BOOT_ID"
"""The environment variable that replaces the identity of the boot."""

_CHILD_SECONDS = 60


@functools.lru_cache(2048)
def content(seed: int, job: int, version: int) -> NDArray[np.uint64]:
    """Return the bytes of one version of a job as words of 8 bytes, each a hash of these and its place (splitmix64)."""
    base = seed * 0x9E3779B97F4A7C15 + job * 0xC2B2AE3D27D4EB4F + (version + 1) * 0x165667B19E3779F9
    words = np.arange(nbytes_of(job) // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words += np.uint64(base & 0xFFFFFFFFFFFFFFFF)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    words.flags.writeable = False
    return words


def nbytes_of(job: int) -> int:
    """Return the bytes that a job writes: some less than it owns."""
    return SIZE - 8 * (job % 4)


@dataclass(slots=True)
class Truth:
    """What the store at `path` must and may hold, and what was found wrong with it."""

    path: str
    seed: int
    due: dict[int, tuple[int, bool]] = field(default_factory=dict)
    """The version of each job that must be there, and whether it was called durable."""
    may: dict[int, set[int]] = field(default_factory=dict)
    """The versions of each job that can be there: the last one acknowledged, and those begun since."""
    extents: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Where each job was last begun: start and stop, in bytes of the file."""
    fresh: set[int] = field(default_factory=set)
    """Jobs acknowledged since the last check."""
    acknowledged: int = 0
    """Receipts that were acknowledged before a crash, and due after it."""
    lost: int = 0
    """Of these, the ones that were gone."""
    false: int = 0
    """Receipts for bytes that are not those of one version that was begun."""
    overlaps: int = 0
    unopened: bool = False
    """Whether the store did not open, with which all of it is lost."""
    failures: list[str] = field(default_factory=list)
    """What was found, in words."""

    def hear(self, words: Sequence[str]) -> None:
        """Take a line of a writer into account.

        ``b job version start stop``: it is about to enter. ``w job version``: there is a receipt. ``d job version``:
        a flush of it has returned. ``x ...``: an error that should not be. Others are ignored.
        """
        kind = words[0]
        if kind in "bwd":
            job, version = int(words[1]), int(words[2])
        if kind == "b":
            self.may.setdefault(job, set()).add(version)
            self.due.pop(job, None)
            self.extents[job] = int(words[3]), int(words[4])
        elif kind == "w":
            self.may[job] = {version}
            self.due[job] = version, False
            self.fresh.add(job)
        elif kind == "d" and job in self.due and self.due[job][0] == version:
            self.due[job] = version, True
        elif kind == "x":
            self.failures.append(" ".join(words[1:]))

    def check(self, where: str, *, reset: bool = False) -> NDArray[np.void]:
        """Open the store and hold it against this account; what was found is the account from here on.

        After a `reset` only what was durable must be there. Returns the receipts.
        """
        found: dict[int, tuple[int, bool]] = {}
        receipts: NDArray[np.void] = np.empty(0, [("tag", "u8"), ("start", "u8"), ("stop", "u8"), ("nbytes", "u8")])
        with contextlib.ExitStack() as stack:
            try:
                store = stack.enter_context(bs.open(self.path))
            except Exception as error:
                self.unopened = True
                self.failures.append(f"{where}: does not open: {type(error).__name__}: {error}")
            else:
                receipts = store.receipts()
                self._check_tiles(store, receipts, where)
            held = np.fromfile(self.path, np.uint8)
            for row in receipts:
                job, start, nbytes = int(row["tag"]), int(row["start"]), int(row["nbytes"])
                version = next((v for v in self.may.get(job, ()) if self._holds(job, v, held, start, nbytes)), None)
                if version is None or job in found:
                    self.false += 1
                    what = "a second receipt" if job in found else "not the bytes of a version that was begun"
                    self.failures.append(f"{where}: job {job} at [{start}, {row['stop']}): {what}")
                else:
                    found[job] = version, bool(row["durable"])
        for job, (version, durable) in self.due.items():
            if durable or not reset:
                self.acknowledged += job in self.fresh
                if job not in found or found[job][0] != version:
                    self.lost += 1
                    what = "durable" if durable else "written"
                    self.failures.append(f"{where}: job {job}, version {version}, {what}: found {found.get(job)}")
        self.fresh.clear()
        self.due = found
        self.may = {job: {version} for job, (version, _) in found.items()}
        return receipts

    def _holds(self, job: int, version: int, held: NDArray[np.uint8], start: int, nbytes: int) -> bool:
        """Whether the bytes are exactly those of one version."""
        if nbytes != nbytes_of(job) or start + nbytes > len(held):
            return False
        return np.array_equal(held[start : start + nbytes].view(np.uint64), content(self.seed, job, version))

    def _check_tiles(self, store: bs.BlockStore, receipts: NDArray[np.void], where: str) -> None:
        """Receipts and holes tile the file, and what is handed out now tiles the holes."""
        taken = [(int(row["start"]), int(row["stop"])) for row in receipts]
        pending: Any = store.pending()
        holes = [(int(row["start"]), int(row["stop"])) for row in pending]
        handed = [(r.start, r.stop) for r in store.ranges(SIZE)]
        for name, parts in (("pending", holes), ("handed out", handed)):
            at = 0
            for start, stop in [*sorted(taken + parts), (store.nbytes, store.nbytes)]:
                if start != at:
                    self.overlaps += 1
                    self.failures.append(f"{where}: receipts and what is {name}: [{start}, {stop}) follows {at}")
                at = stop


@dataclass(slots=True)
class Child:
    """A forked process and the pipe that it speaks on, line by line."""

    pid: int
    pipe: int
    lines: list[list[str]] = field(default_factory=list)
    """What it said so far, in words."""
    status: int | None = None
    """As `os.waitpid` says, once it has ended."""
    _rest: bytes = b""

    def hear(self, *, until: Callable[[list[str]], bool]) -> bool:
        """Read up to a certain line; False if it ends without it."""
        seen = 0
        while not any(until(line) for line in self.lines[seen:]):
            seen = len(self.lines)
            if not (got := os.read(self.pipe, 1 << 16)):
                return False
            *whole, self._rest = (self._rest + got).split(b"\n")
            self.lines += [line.decode().split(" ") for line in whole]
        return True

    def hear_lines(self, count: int) -> None:
        """Read up to `count` more lines."""
        left = iter(range(count))
        self.hear(until=lambda line: next(left, None) is None)

    def end(self, number: int = 0) -> int:
        """Send it a signal, read all that it said, and return its wait status."""
        if number:
            os.kill(self.pid, number)
        self.hear(until=lambda line: False)
        _, self.status = os.waitpid(self.pid, 0)
        os.close(self.pipe)
        return self.status


def fork(main: Callable[[Callable[..., None]], None]) -> Child:
    """Run `main` in a forked child, which never returns and cannot hang for ever; it is passed a function to speak.

    Each call is one line and one `os.write`, so no line is torn. An error that `main` raises is a line ``x error``.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later: threads are alive
        pid = os.fork()
    if pid == 0:
        write = os.write

        def say(*words: object) -> None:
            write(writing, (" ".join(map(str, words)).replace("\n", " ") + "\n").encode())

        try:
            os.close(reading)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_CHILD_SECONDS)
            main(say)
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            say("x", f"{type(error).__name__}: {error}", *(f"{frame.name}:{frame.lineno}" for frame in frames[-4:]))
        finally:
            os._exit(0)
    os.close(writing)
    return Child(pid, reading)


@contextlib.contextmanager
def boot_restored() -> Iterator[None]:
    """Give the identity of the boot back afterwards."""
    before = os.environ.get(BOOT)
    try:
        yield
    finally:
        os.environ.pop(BOOT, None)
        if before is not None:
            os.environ[BOOT] = before


def say_nothing(text: str) -> None:
    """The progress of whoever wants to hear none."""
