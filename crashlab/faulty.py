"""Faulty: a process that uses a store in every way while calls of the system fail, and tells what it was told.

`Kernel` stands between blockstore and `os`. It counts the calls, lets one of them fail, and plays what a failed sync
does to a disk: what was written since the last good one is gone, and later syncs succeed. `Workload` goes on after
errors. ``python -m crashlab.faulty FOLDER SEED STOP RESET`` runs it for ``strace``, which lets the real calls fail.

Examples
--------
>>> str(Fault("fsync", 2)), str(Fault("pwrite", 5, errno.ENOSPC, lasting=True))
('fsync 2 EIO', 'pwrite 5+ ENOSPC')
"""

import errno
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import blockstore as bs
from crashlab.truth import SIZE, content, nbytes_of

SYNCS = ("fsync", "fdatasync")
CALLS = {
    "fsync": "fsync",
    "fdatasync": "fdatasync",
    "pwrite": "pwrite64",
    "write": "write",
    "posix_fallocate": "fallocate",
    "ftruncate": "ftruncate",
    "link": "linkat",
    "rename": "rename",
    "replace": "rename",
}
"""The functions of `os` that are made to fail, and the calls of Linux behind them."""

ERRORS = (errno.EIO, errno.ENOSPC)

JOBS = 14
"""Jobs of the store."""

_SMALL = (("blockstore.ledger", "_COMPACT_MIN", 24), ("blockstore.journal", "_GROW_MIN", 4096))


def lower_thresholds() -> None:
    """Let a journal be compacted and grow after few records, in this process."""
    for name, attribute, value in _SMALL:
        if not hasattr(sys.modules[name], attribute):
            raise AttributeError(f"{name} has no {attribute} to lower")
        setattr(sys.modules[name], attribute, value)


@dataclass(frozen=True, slots=True)
class Fault:
    """The `number`-th call of `call` fails with `error`; with `lasting`, all later ones, too."""

    call: str
    """A name of `CALLS`, or "any"."""
    number: int
    error: int = errno.EIO
    lasting: bool = False

    def hits(self, call: str, counts: "Counter[str]") -> bool:
        """Whether a call, which is counted already, is to fail."""
        number = counts.total() if self.call == "any" else counts[call] if self.call == call else 0
        return number >= self.number if self.lasting else number == self.number

    def __str__(self) -> str:
        return f"{self.call} {self.number}{'+' if self.lasting else ''} {errno.errorcode[self.error]}"


class Kernel:
    """Stands in for the module `os` in the modules of blockstore: lets calls fail, and loses what such a sync loses.

    Attributes
    ----------
    counts : Counter
        Calls so far, by name.
    dirty : dict
        Start and bytes of each job that was written since the last good sync of `path`.
    touching : tuple
        The job that the next write to `path` is for, its start and its bytes.
    hit : bool
        Whether a call has failed.
    """

    def __init__(self, path: str, fault: Fault | None, say: Callable[..., None]) -> None:
        self.counts: Counter[str] = Counter()
        self.dirty: dict[int, tuple[int, int]] = {}
        self.touching = 0, 0, 0
        self.hit = False
        self._path, self._fault, self._say = path, fault, say

    def install(self) -> None:
        """Take the place of `os` in all of blockstore."""
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "blockstore" and getattr(module, "os", None) is os:
                module.os = self  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return (lambda *args, **options: self._call(name, real, args, options)) if name in CALLS else real

    def _call(self, name: str, real: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self.counts[name] += 1
        self.about_to(name)
        if name == "pwrite" and self._what(name, args[0]) == "data":
            self.dirty[self.touching[0]] = self.touching[1:]
        try:
            if self._fault is not None and self._fault.hits(name, self.counts):
                raise OSError(self._fault.error, os.strerror(self._fault.error))
            result = real(*args, **options)
        except OSError as error:
            if error.errno in ERRORS:
                self.hit = True
                self._say("i", name, self.counts[name], self._what(name, args[0]))
                if name in SYNCS and self._what(name, args[0]) == "data":
                    self.lose(args[0])
            raise
        if name in SYNCS and self._what(name, args[0]) == "data":
            self.dirty.clear()
        return result

    def about_to(self, name: str) -> None:
        """Called before each call that can fail."""

    def lose(self, handle: int) -> None:
        """Lose what no sync has covered."""
        for start, nbytes in self.dirty.values():
            os.pwritev(handle, [b"\xee" * nbytes], start)  # no call that can be made to fail
        self.dirty.clear()

    def _what(self, name: str, handle: int) -> str:
        """Say what a call is about: the file at `path`, another one, or names."""
        if name in ("link", "rename", "replace"):
            return "names"
        here = os.path.exists(self._path) and os.path.samestat(os.fstat(handle), os.stat(self._path))
        return "data" if here else "other"


class Workload:
    """One process that uses a store in every way, and goes on after errors as somebody would who ignores them.

    Besides the lines that `Truth` takes it says ``s step``, then ``ok step`` or ``f step error oserror``;
    ``i call number what`` where a call was made to fail; ``left names`` after a failed creation.
    """

    def __init__(self, path: str, seed: int, kernel: Kernel, say: Callable[..., None], *, stop: bool) -> None:
        self._path, self._seed, self._kernel, self._say, self._stop = path, seed, kernel, say, stop
        self._store: bs.BlockStore | None = None
        self._ranges: dict[int, bs.AllocatedRange] = {}
        self._versions: dict[int, int] = {}
        self._durable: dict[int, int] = {}
        self._version = 0

    def run(self) -> None:
        """Do all of it, or up to the first error."""
        for step, call in self._steps():
            self._say("s", step)
            try:
                call()
            except (OSError, bs.BlockStoreError) as error:
                self._say("f", step, type(error).__name__, isinstance(error, OSError))
            else:
                self._say("ok", step)
            self._say_durable()
            if self._stop and self._kernel.hit:
                return

    def _steps(self) -> Iterator[tuple[str, Callable[[], object]]]:
        yield "create", self._create
        if self._store is None:
            self._say("left", *sorted(os.listdir(os.path.dirname(self._path))))
            yield "create", self._create
        if self._store is not None:
            yield from self._fill(range(6))
            yield "flush", lambda: self._flush(range(2))
            yield from self._fill(range(6, 9))
            yield "flush", lambda: self._flush(None)
            yield from self._fill([9])
            for job in (1, 2, 9, 9):
                yield "rewrite", lambda job=job: self._put(job, rewrite=True)  # type: ignore[misc]
            yield "flush", lambda: self._flush(None)
            for _ in range(30):
                yield "rewrite", lambda: self._put(3, rewrite=True)
            yield from self._fill([10])
            yield "sync", self._store.sync
            yield "close", self._store.close
        self._store = None
        for _ in range(2):
            if self._store is None:
                yield "open", self._open
        if self._store is not None:
            yield from self._fill(range(JOBS))
            yield "flush", lambda: self._flush(None)
            for _ in range(3):
                yield "rewrite", lambda: self._put(min(self._ranges), rewrite=True)
        other = os.path.join(os.path.dirname(self._path), "other")
        yield "create other", lambda: bs.create(other, SIZE).close()
        yield "replace other", lambda: bs.create(other, SIZE, overwrite=True).close()
        yield "open other", lambda: bs.open(other).close() if os.path.exists(other) else None

    def _create(self) -> None:
        self._store = bs.create(self._path, JOBS * SIZE)

    def _open(self) -> None:
        self._ranges.clear()
        if os.path.exists(self._path):
            self._store = bs.open(self._path)

    def _fill(self, jobs: Sequence[int]) -> Iterator[tuple[str, Callable[[], object]]]:
        """Write the jobs that have no receipt."""
        if self._store is not None:
            done = set(self._store.receipts()["tag"].tolist())
            for job in jobs:
                if job not in done:
                    yield "fill", lambda job=job: self._put(job)  # type: ignore[misc]

    def _put(self, job: int, *, rewrite: bool = False) -> None:
        if self._store is None:
            return
        if job not in self._ranges:
            self._ranges[job] = self._store.allocate(nbytes_of(job), tag=job)
        r = self._ranges[job]
        self._version += 1
        words = content(self._seed, job, self._version)
        self._say("b", job, self._version, r.start, r.stop)
        if self._version % 2:
            self._kernel.touching = job, r.start, nbytes_of(job)
            r.write(words, rewrite=rewrite)
            self._kernel.dirty[job] = r.start, nbytes_of(job)
        else:
            with r.writer(dtype="u8", rewrite=rewrite) as a:
                self._kernel.dirty[job] = r.start, nbytes_of(job)
                a[:] = words
        self._versions[job] = self._version
        self._say("w", job, self._version)

    def _flush(self, jobs: Sequence[int] | None) -> None:
        if self._store is not None:
            receipts = [self._ranges[job].receipt for job in jobs or () if job in self._ranges]
            self._store.flush(None if jobs is None else [receipt for receipt in receipts if receipt is not None])

    def _say_durable(self) -> None:
        """Say of which jobs the store says that they are durable, at this moment."""
        for job, r in self._ranges.items():
            version = self._versions.get(job, 0)
            if r.receipt is not None and r.receipt.durable and self._durable.get(job) != version:
                self._durable[job] = version
                self._say("d", job, version)


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of the workload, and how its store is looked at afterwards."""

    fault: Fault | None
    stop: bool
    """Whether the process ends with the step that failed, and not at the end of all."""
    reset: bool
    """Whether the power fails then."""

    def __str__(self) -> str:
        return f"{self.fault}, {'ended at once' if self.stop else 'gone on'}{', reset' if self.reset else ''}"


def work(
    path: str, seed: int, trial: Trial, say: Callable[..., None], sabotage: Callable[[], object] | None = None
) -> None:
    """Run the workload in this process, of which nothing else is expected."""
    lower_thresholds()
    if sabotage is not None:
        sabotage()
    kernel = Kernel(path, trial.fault, say)
    kernel.install()
    workload = Workload(path, seed, kernel, say, stop=trial.stop)
    workload.run()
    if trial.reset and os.path.exists(path):
        kernel.lose(os.open(path, os.O_RDWR))
    say("counts", *(f"{name}={count}" for name, count in kernel.counts.items()))
    os._exit(0)  # as a process that is killed: nothing is closed


def main() -> None:
    """Run for ``strace``."""
    path, seed, stop, reset = sys.argv[1:]

    def say(*words: object) -> None:
        os.write(1, (" ".join(map(str, words)) + "\n").encode())

    work(path, int(seed), Trial(None, stop == "stop", reset == "reset"), say)


if __name__ == "__main__":
    main()
