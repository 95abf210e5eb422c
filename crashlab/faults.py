"""Faults: every sync, write, rename, link and allocation fails once, or from then on, while a store is used.

A workload creates, fills, flushes, rewrites, compacts, closes, opens and resumes. It runs once to count its calls of
the system, and then once per call that is made to fail. Two means do that: `Kernel`, which stands between
blockstore and `os`, and ``strace``, which lets the real call fail. With both, `Kernel` plays what a failed sync does:
what was written since the last good one is gone, and later syncs succeed. Each failure must surface as an `OSError`
in the call that hit it; afterwards, in the same boot and after a simulated reset, a store may report only what is
really there, and must report what it had acknowledged. See `crashlab.truth`.
"""

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product, repeat, starmap
from pathlib import Path

import blockstore as bs
from blockstore import _os
from crashlab import faulty
from crashlab.faulty import CALLS, ERRORS, Fault, Trial
from crashlab.truth import BOOT, SIZE, Truth, boot_restored, content, fork, nbytes_of, say_nothing

_QUIET = {
    *product(("ftruncate other",), ("close", "create other", "replace other", "open other")),
    *product(("posix_fallocate other", "write other", "pwrite other"), ("rewrite", "flush", "close")),
}
"""Calls that may fail in silence, with the step: giving space back in a close, and beginning to compact a journal."""

_BOOT = "crashlab-faults"
_STRACE = ["strace", "-f", "-qq", "--seccomp-bpf", "-o", os.devnull]
_STRACE_SECONDS = 120
_WAITING = 4
_AT_ONCE = 20
_PROJECT = str(Path(__file__).resolve().parent.parent)


@dataclass(frozen=True, slots=True)
class Report:
    """What failing calls found. `str` is one line."""

    means: str
    """How they were made to fail."""
    calls: dict[str, int]
    """Calls of the workload that were made to fail, by name."""
    trials: int
    """Runs: a call fails once or for good, with each error, ended then or gone on, in the same boot or a new one."""
    acknowledged: int
    """Receipts that had to be there afterwards."""
    lost: int
    false: int
    silent: int
    """Failures that no step told, or not by an `OSError`."""
    signals: int
    """Processes that did not end by themselves."""
    leftovers: int
    """Failed creations that left something behind."""
    waiting: int
    """Threads that waited in `flush` when its sync failed, and were told."""
    seeds: tuple[int, ...]
    findings: tuple[str, ...]
    """What was found, in words."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        calls = ", ".join(f"{name} {count}" for name, count in sorted(self.calls.items()))
        return (
            f"faults ({self.means}): {self.lost} lost of {self.acknowledged} acknowledged, {self.false} false, "
            f"{self.silent} silent, {self.signals} signals, {self.leftovers} leftovers, {self.trials} trials of "
            f"{sum(self.calls.values())} calls ({calls}), {self.waiting} waiting threads told, "
            f"{len(self.findings)} findings, seeds {', '.join(map(str, self.seeds))}"
        )


class Judge:
    """Holds trials against what they said; adds up what was found."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.trials = self.failed = self.silent = self.signals = self.leftovers = 0
        self.acknowledged = self.lost = self.false = 0
        self.failures: list[str] = []
        self.folder, self.seed = folder, seed
        self._paths = 0

    def path(self) -> Path:
        """Return a path in a new folder."""
        self._paths += 1
        folder = self.folder / f"{self.seed}-{self._paths}"
        folder.mkdir()
        return folder / "data.bin"

    def count(self, *, strace: bool) -> Counter[str]:
        """Run without a fault, and return the calls by name."""
        path, trial = self.path(), Trial(None, False, False)
        lines, status = by_strace(path, self.seed, trial) if strace else in_process(path, self.seed, trial)
        counted = [word.split("=") for line in lines if line[0] == "counts" for word in line[1:]]
        self.judge(trial, path, lines, status)
        return Counter({name: int(count) for name, count in counted})

    def judge(self, trial: Trial, path: Path, lines: Sequence[list[str]], status: int) -> None:
        """Judge a process by its lines and its exit status, and what it left at `path`."""
        truth = Truth(str(path), self.seed)
        name = f"seed {self.seed}, {trial}"
        self.trials += 1
        if status != 0:
            self.signals += 1
            self.failures.append(f"{name}: exit status {status}")
        first = next((line[1:3] for line in lines if line[0] == "i"), None)
        if (fault := trial.fault) is not None and fault.call != "any" and first != [fault.call, str(fault.number)]:
            self.failures.append(f"{name}: the first call that failed was {first}")
        self._hear(name, truth, lines)
        if trial.reset:
            os.environ[BOOT] = "crashlab-faults-reset"
        if Path(truth.path).exists():
            truth.check(name, reset=trial.reset)
        elif any(line[:2] == ["ok", "create"] for line in lines):
            truth.failures.append(f"{name}: the store is gone")
        os.environ[BOOT] = _BOOT
        self.acknowledged += truth.acknowledged
        self.lost += truth.lost
        self.false += truth.false + truth.overlaps
        self.failures += truth.failures
        shutil.rmtree(path.parent)

    def _hear(self, name: str, truth: Truth, lines: Sequence[list[str]]) -> None:
        hits: list[str] = []
        poisoned = False
        for line in lines:
            truth.hear(line)
            if line[0] == "i":
                self.failed += 1
                hits.append(f"{line[1]} {line[3]}")
            elif line[0] == "f":
                if line[-1] != "True":
                    self._note("silent", f"{name}: {line[-2]} is no OSError")
                hits.clear()
                if line[-2] == "PoisonedStoreError":
                    poisoned = True
                    for job in [job for job, (_, durable) in truth.due.items() if not durable]:
                        del truth.due[job]  # it may be there, if it really is
            elif line[0] == "ok":
                step = " ".join(line[1:])
                if any((hit, step) not in _QUIET for hit in hits):
                    self._note("silent", f"{name}: {step} succeeded though {', '.join(hits)} failed")
                hits.clear()
                if step in ("create", "open"):
                    poisoned = False
                elif poisoned and step in ("flush", "sync"):
                    self._note("silent", f"{name}: {step} succeeded on a poisoned store")
            elif line[0] == "left" and line[1:]:
                self._note("leftovers", f"{name}: a failed creation left {line[1:]}")

    def _note(self, what: str, text: str) -> None:
        setattr(self, what, getattr(self, what) + 1)
        self.failures.append(text)


def missing() -> list[str]:
    """Say what is missing to let the real calls fail."""
    if _os.PORTABLE:
        return ["strace is for the calls of Linux"]
    if shutil.which("strace") is None:
        return ["strace is not installed"]
    tried = subprocess.run([*_STRACE, "-e", "trace=fsync", "true"], capture_output=True, text=True, check=False)
    return [] if tried.returncode == 0 else [f"strace may not trace here: {tried.stderr.strip()}"]


def trials(counts: Counter[str], *, every: int = 1, altogether: int = 0) -> list[Trial]:
    """Return the trials of a workload that makes these calls, in random order; one in `every`.

    Of `altogether` calls, whatever they are, all fail from each one on.
    """
    faults = [
        Fault(call, number, error, lasting)
        for call, count in counts.items()
        for number, error, lasting in product(range(1, count + 1), ERRORS, (False, True))
    ]
    faults += [Fault("any", number, error, True) for number, error in product(range(1, altogether + 1), ERRORS)]
    found = list(starmap(Trial, product(faults, (True, False), (False, True))))
    random.Random(0).shuffle(found)
    return found[::every]


def in_process(
    path: Path, seed: int, trial: Trial, sabotage: Callable[[], object] | None = None
) -> tuple[list[list[str]], int]:
    """Run the workload in a forked child, with calls that `faulty.Kernel` lets fail."""
    child = fork(lambda say: faulty.work(str(path), seed, trial, say, sabotage))
    status = child.end()
    return child.lines, status


def by_strace(
    path: Path, seed: int, trial: Trial, sabotage: Callable[[], object] | None = None
) -> tuple[list[list[str]], int]:
    """Run the workload in a Python of its own, with calls that the kernel lets fail, and no sabotage."""
    words = [sys.executable, "-m", "crashlab.faulty", str(path), str(seed), "stop" if trial.stop else "on"]
    command = [*words, "reset" if trial.reset else "same"]
    if (fault := trial.fault) is not None:
        call, error = CALLS[fault.call], errno.errorcode[fault.error]
        inject = f"{call}:error={error}:when={fault.number}{'+' if fault.lasting else ''}"
        command = [*_STRACE, "-e", f"trace={call}", "-e", f"inject={inject}", *command]
    environment = {**os.environ, BOOT: _BOOT, "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_PROJECT, *sys.path]))
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_STRACE_SECONDS, check=False
    )
    lines = [line.split(" ") for line in done.stdout.splitlines()]
    return lines + ([["x", *done.stderr.split()]] if done.stderr else []), done.returncode


def waiting(path: Path, number: int, sabotage: Callable[[], object] | None = None) -> list[str]:
    """Let threads flush at once, of whose syncs the `number`-th fails and all others succeed; say what went wrong."""
    call = "fsync" if _os.PORTABLE else "fdatasync"

    def work(say: Callable[..., None]) -> None:
        class Kernel(faulty.Kernel):
            """Lets a sync fail once all are about to flush."""

            def about_to(self, name: str) -> None:
                if name == call and self.counts[name] == number:
                    together.wait()

        def flush(thread: int) -> None:
            if thread:
                together.wait()
            try:
                store.flush(ranges[thread].receipt)
            except OSError as error:
                say("told", thread, type(error).__name__)

        if sabotage is not None:
            sabotage()
        together = threading.Barrier(_WAITING)
        store = bs.create(path, _WAITING * SIZE)
        ranges = [store.allocate(nbytes_of(job), tag=job) for job in range(_WAITING)]
        for r in ranges:
            r.write(content(0, r.tag, 0))
        Kernel(str(path), Fault(call, number), say).install()
        threads = [threading.Thread(target=flush, args=(thread,)) for thread in range(_WAITING)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        os._exit(0)

    child = fork(work)
    status = child.end()
    told = sorted(" ".join(line[1:]) for line in child.lines if line[0] == "told")
    if status == 0 and told == [f"{thread} PoisonedStoreError" for thread in range(_WAITING)]:
        return []
    return [f"waiting in flush when {call} {number} failed: status {status}, told {told}, {child.lines}"]


def run(
    folder: Path,
    *,
    strace: bool = False,
    every: int = 1,
    everything: bool = False,
    calls: Collection[str] = tuple(CALLS),
    seeds: Sequence[int] = (0,),
    progress: Callable[[str], None] = say_nothing,
    sabotage: Callable[[], object] | None = None,
) -> Report:
    """Let calls fail, in an empty folder on a real disk.

    Parameters
    ----------
    folder : Path
    strace : bool
        Let the real calls fail, and not those that `faulty.Kernel` passes on.
    every : int
        Try only one in so many trials.
    everything : bool
        Besides, let all calls fail from each one on, not only those of one name: a device that is gone, and back later
        in the same mount. Not with `strace`.
    calls : collection of str
        The calls of `faulty.CALLS` that are made to fail.
    seeds : sequence of int
    progress : callable
        Is told how far it is.
    sabotage : callable, optional
        Called in each child first, to break blockstore there; it ends with the first finding.
    """
    judges = [Judge(folder, seed) for seed in seeds]
    counts: Counter[str] = Counter()
    with boot_restored(), ThreadPoolExecutor(2) as pool:
        os.environ[BOOT] = _BOOT
        for judge in judges:
            counts = judge.count(strace=strace)
            altogether = counts.total() if everything and not strace else 0
            counts = Counter({call: count for call, count in counts.items() if call in calls})
            todo = trials(counts, every=every, altogether=altogether)
            for start in range(0, len(todo), _AT_ONCE):
                if sabotage is not None and judge.failures:
                    break
                part = todo[start : start + _AT_ONCE]
                paths = [judge.path() for _ in part]
                runner = pool.map if strace else map
                told = list(
                    runner(by_strace if strace else in_process, paths, repeat(judge.seed), part, repeat(sabotage))
                )
                for trial, path, (lines, status) in zip(part, paths, told, strict=True):
                    judge.judge(trial, path, lines, status)
                progress(f"faults: {start + len(part)} of {len(todo)}")
        untold = [text for number in (1, 2) for text in waiting(folder / f"waiting-{number}", number, sabotage)]

    def total(name: str) -> int:
        return sum(getattr(judge, name) for judge in judges)

    return Report(
        means="strace" if strace else "in process",
        calls=dict(counts),
        trials=total("trials"),
        acknowledged=total("acknowledged"),
        lost=total("lost"),
        false=total("false"),
        silent=total("silent"),
        signals=total("signals"),
        leftovers=total("leftovers"),
        waiting=2 * _WAITING - len(untold),
        seeds=tuple(seeds),
        findings=(*untold, *(text for judge in judges for text in judge.failures)),
    )
