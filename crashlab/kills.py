"""Kills: a writer process is ended by ``kill -9`` at random, and the store it leaves is held against what it said.

A child fills, rewrites, flushes and closes a store in four threads. It is killed at a random instant of a chosen
phase, or while it opens what another one left; then the next child resumes the same store. When it is complete, the
jobs that are written once have the bytes of a run that nobody interrupted, and the others those of the version that
was acknowledged last. See `crashlab.truth` for what is checked, and `crashlab.races` for two that create one path.

A kill says nothing of power loss: what was written is in the cache of the system. Some checks begin a new boot, after
which only what was durable is believed.
"""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blockstore as bs
from crashlab.faulty import lower_thresholds
from crashlab.races import race
from crashlab.truth import BOOT, SIZE, Child, Truth, boot_restored, content, fork, nbytes_of, say_nothing

JOBS = 240
"""Jobs of one store, a range each."""

PHASES = ("creation", "filling", "rewriting", "flushing", "closing", "opening")

_THREADS = 4
_MAX_DELAY = 0.02
"""Seconds after which every phase is surely over."""


@dataclass(frozen=True, slots=True)
class Report:
    """What random kills found. `str` is one line."""

    acknowledged: int
    """Receipts that were acknowledged before a kill, and due after it."""
    lost: int
    false: int
    overlaps: int
    points: dict[str, int]
    """Kills that hit each phase."""
    resets: int
    """Checks after which only what was durable was believed."""
    completed: int
    """Stores that were filled to the end in spite of the kills, and equal the uninterrupted run."""
    races: int
    """Rounds in which two processes created one path."""
    seeds: tuple[int, ...]
    findings: tuple[str, ...]
    """What was found, in words; with whatever else went wrong."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not (self.lost or self.false or self.overlaps or self.findings)

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {self.points.get(name, 0)}" for name in PHASES)
        return (
            f"kills: {self.lost} lost of {self.acknowledged} acknowledged, {self.false} false, "
            f"{self.overlaps} overlaps, {sum(self.points.values())} points ({phases}), {self.resets} checked after a "
            f"reset, {self.completed} stores completed as uninterrupted, {self.races} races to create, "
            f"{len(self.findings)} findings, seeds {', '.join(map(str, self.seeds))}"
        )


def rewritten(job: int) -> bool:
    """Whether a job is one of those that are written again and again."""
    return job % 3 == 0


class Writer:
    """The process that is killed: works on one store, and says what it does.

    Besides the lines that `Truth` takes it says ``p phase`` where a phase begins, ``m`` in the midst of a write, and
    ``e`` at the end.
    """

    def __init__(self, path: str, seed: int, life: int, say: Callable[..., None]) -> None:
        self._path, self._seed, self._say = path, seed, say
        self._random = random.Random(f"{seed} {life}")
        self._version = life << 20
        self._draw = threading.Lock()
        self._again: list[list[bs.AllocatedRange]] = [[] for _ in range(_THREADS)]

    def live(self, phase: str) -> None:
        """Do what leads to `phase`, then that, then close."""
        self._say("p", "creation" if phase == "creation" else "opening")
        with self._store(new=phase == "creation") as store:
            done = {int(tag) for tag in store.receipts()["tag"]}
            jobs = [job for job in range(JOBS) if job not in done]
            first = [job for job in jobs if rewritten(job)][: 2 * _THREADS]
            rest = [job for job in jobs if job not in first]
            self._say("p", "opened" if phase == "opening" else "filling")
            if phase in ("creation", "filling"):
                self._together(lambda thread: self._fill(store, thread, jobs))
            elif phase != "opening":
                self._together(lambda thread: self._fill(store, thread, first))
                self._say("p", "flushing" if phase == "flushing" else "rewriting")
                if phase == "flushing":
                    self._together(lambda thread: self._flush(store, thread, rest))
                else:
                    self._together(lambda thread: self._rewrite(thread, 400 if phase == "rewriting" else 2))
            self._say("p", "closing")
        self._say("e")

    def _store(self, *, new: bool) -> bs.BlockStore:
        """Create or open the store, with options at random."""
        options: dict[str, Any] = {
            "access": self._random.choice((None, "dense", "dense", "sparse")),
            "guard": self._random.choice(("flag", "flag", "seal")),
            "allocator": self._random.choice(("sequential", "concurrent")),
        }
        if new:
            return bs.create(self._path, JOBS * SIZE, overwrite=os.path.exists(self._path), **options)
        return bs.open(self._path, **options)

    def _together(self, step: Callable[[int], None]) -> None:
        def run(thread: int) -> None:
            try:
                step(thread)
            except BaseException as error:
                errors.append(error)

        errors: list[BaseException] = []
        threads = [threading.Thread(target=run, args=(thread,)) for thread in range(_THREADS)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        if errors:
            raise errors[0]

    def _put(self, r: bs.AllocatedRange, *, rewrite: bool = False) -> tuple[int, int]:
        version = 0
        if rewritten(r.tag):
            with self._draw:
                version = self._version = self._version + 1
        words = content(self._seed, r.tag, version)
        self._say("b", r.tag, version, r.start, r.stop)
        if version % 4 == 1:
            r.write(words, rewrite=rewrite)
        else:
            with r.writer(dtype="u8", rewrite=rewrite) as a:
                for part in range(0, len(words), 512):  # in parts, so that a kill can tear it
                    a[part : part + 512] = words[part : part + 512]
                    if version % 4 > 1:
                        self._say("m")
        self._say("w", r.tag, version)
        return r.tag, version

    def _fill(self, store: bs.BlockStore, thread: int, jobs: Sequence[int]) -> None:
        for job in jobs[thread::_THREADS]:
            r = store.allocate(nbytes_of(job), tag=job)
            self._put(r)
            if rewritten(job):
                self._again[thread].append(r)

    def _rewrite(self, thread: int, rounds: int) -> None:
        for _ in range(rounds):
            for r in self._again[thread]:
                self._put(r, rewrite=True)

    def _flush(self, store: bs.BlockStore, thread: int, jobs: Sequence[int]) -> None:
        """By turns: write a job and another one again, and flush these two, or everything."""
        for count, job in enumerate(jobs[thread::_THREADS]):
            ranges = [store.allocate(nbytes_of(job), tag=job)]
            wrote = [self._put(ranges[0])]
            if again := self._again[thread]:
                ranges.append(again[count % len(again)])
                wrote.append(self._put(ranges[1], rewrite=True))
            store.flush(None if count % 2 else [r.receipt for r in ranges if r.receipt is not None])
            for written in wrote:
                self._say("d", *written)


class Siege:
    """Stores that are killed again and again, for one seed.

    Parameters
    ----------
    folder : Path
        Empty, on a real disk.
    seed : int
        Drives all that is random but the scheduling of the system.
    sabotage : callable, optional
        Called in each child before it begins, to break blockstore there and see that it is noticed.
    """

    def __init__(self, folder: Path, seed: int, sabotage: Callable[[], None] | None = None) -> None:
        self.points: Counter[str] = Counter()
        self.resets = self.completed = 0
        self.accounts: list[Truth] = []
        self._folder, self._seed, self._sabotage = folder, seed, sabotage
        self._random = random.Random(seed)
        self._lives = self._boots = 0
        self._phases: list[str] = []
        self._delay = dict.fromkeys(PHASES, _MAX_DELAY / 10)  # learnt from hits and misses
        self._store: Truth | None = None
        self._spare: Truth | None = None  # a store that the next creation may overwrite
        self._expected = self._to_the_end("creation", self._new())

    def kill(self) -> None:
        """Start a child, kill it, check what it left."""
        self._phases = self._phases or self._random.sample(PHASES[:5], 5)
        phase = self._phases.pop()
        truth = self._store
        old = None
        if phase == "creation" or truth is None:
            old = self._spare if self._random.random() < 0.4 else None
            phase, truth = "creation", self._new(old)
        inode = old and os.stat(old.path).st_ino
        point = self._kill(phase, truth, old)
        if old is not None and os.stat(old.path).st_ino == inode:  # it was not replaced: then it is all there
            if point != "creation":
                truth.failures.append(f"{self._where(phase)}: the store was created, and the old one is there")
            truth = old
        while self._random.random() < 0.3 and Path(truth.path).exists():  # open what nobody has opened since the kill
            self._kill("opening", truth)
        self._check(phase, truth)
        if truth.unopened:
            self._store = None if truth is self._store else self._store
        elif self._store is None:
            self._store = truth
            if self._spare is not None and self._spare.path == truth.path:
                self._spare = None
        elif truth is not self._store:
            self._retire(truth)
        elif sum(map(rewritten, truth.due)) > JOBS // 3 - 2 * _THREADS or len(truth.due) > 9 * JOBS // 10:
            self._complete(truth)
            self._store = None

    @property
    def failed(self) -> bool:
        """Whether anything was found."""
        return any(truth.failures for truth in self.accounts)

    def _kill(self, phase: str, truth: Truth, old: Truth | None = None) -> str:
        """Start a child, and kill it in `phase`; return the phase that it was killed in."""
        child = self._child(phase, truth)
        child.hear(until=lambda line: line in (["p", phase], ["e"]) or line[0] == "x")
        if phase in ("filling", "rewriting", "flushing"):
            child.hear_lines(self._random.randrange(60))
        time.sleep(self._random.random() * self._delay[phase])  # waits for nothing: this is the random instant
        status = child.end(signal.SIGKILL)
        self._hear(child, truth)
        point = next((line[1] for line in reversed(child.lines) if line[0] == "p"), "")
        ended = ["e"] in child.lines or not os.WIFSIGNALED(status)
        self._delay[phase] = min(self._delay[phase] * (1.1 if point == phase and not ended else 0.8), _MAX_DELAY)
        if not ended and point:
            self.points["opening" if point == "opened" else point] += 1
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
            truth.failures.append(f"{self._where(point)}: signal {os.WTERMSIG(status)}")
        if phase == "creation" and not Path(truth.path).exists():
            if point != "creation" or old is not None:
                truth.failures.append(f"{self._where(phase)}: there was a store, and is none")
            bs.create(truth.path, JOBS * SIZE).close()  # nothing is in the way of the next one
        return point

    def _child(self, phase: str, truth: Truth) -> Child:
        self._lives += 1

        def main(say: Callable[..., None]) -> None:
            lower_thresholds()
            if self._sabotage is not None:
                self._sabotage()
            Writer(truth.path, self._seed, self._lives, say).live(phase)

        return fork(main)

    def _check(self, phase: str, truth: Truth) -> None:
        """Hold the store against what was said; now and then after a simulated reset."""
        if reset := self._random.random() < 0.25:
            self._boots += 1
            self.resets += 1
            os.environ[BOOT] = f"crashlab-{self._seed}-{self._boots}"
        truth.check(f"{self._where(phase)}{' and reset' if reset else ''}", reset=reset)

    def _complete(self, truth: Truth) -> None:
        """Resume once more, to the end, and compare with the uninterrupted run."""
        if self._to_the_end("filling", truth) != self._expected:
            truth.failures.append(f"{self._where('complete')}: the file is not that of an uninterrupted run")
        self.completed += 1

    def _to_the_end(self, phase: str, truth: Truth) -> list[bytes]:
        """Fill the store without a kill; return the bytes of each job that is never rewritten, or nothing."""
        child = self._child(phase, truth)
        child.end()
        self._hear(child, truth)
        receipts = truth.check(self._where("to the end"))
        held = Path(truth.path).read_bytes()
        self._remove(truth)
        by_job = {int(r["tag"]): held[int(r["start"]) : int(r["start"] + r["nbytes"])] for r in receipts}
        return [by_job.get(job, b"") for job in range(JOBS) if not rewritten(job)] + [b""] * (JOBS - len(by_job))

    def _hear(self, child: Child, truth: Truth) -> None:
        for line in child.lines:
            truth.hear([*line, f"in {self._where('the child')}"] if line[0] == "x" else line)

    def _new(self, old: Truth | None = None) -> Truth:
        """Begin the account of a new store, which may be about to overwrite an old one."""
        path = str(self._folder / f"{len(self.accounts)}.bin") if old is None else old.path
        self.accounts.append(Truth(path, self._seed))
        return self.accounts[-1]

    def _retire(self, truth: Truth) -> None:
        """Keep one spare store, and remove the one before."""
        if self._spare is not None and self._spare.path != truth.path:
            self._remove(self._spare)
        self._spare = truth

    def _remove(self, truth: Truth) -> None:
        for path in self._folder.glob(f"{Path(truth.path).name}*"):
            path.unlink()

    def _where(self, what: str) -> str:
        return f"seed {self._seed}, life {self._lives}, {what}"


def run(
    folder: Path,
    *,
    kills: int = 1000,
    races: int = 200,
    seeds: Sequence[int] = (0, 1),
    progress: Callable[[str], None] = say_nothing,
    sabotage: Callable[[], None] | None = None,
) -> Report:
    """Kill writers at `kills` points, shared out among the seeds, in an empty folder on a real disk.

    With `sabotage`, which is called in each child first, it ends with the first finding.
    """
    points: Counter[str] = Counter()
    failures: list[str] = []
    accounts: list[Truth] = []
    resets = completed = 0
    with boot_restored():
        for number, seed in enumerate(seeds):
            siege = Siege(folder, seed, sabotage)
            share = kills * (number + 1) // len(seeds) - kills * number // len(seeds)
            while siege.points.total() < share and not (sabotage and siege.failed):
                siege.kill()
                progress(f"kills: {points.total() + siege.points.total()} of {kills}")
            points += siege.points
            accounts += siege.accounts
            resets += siege.resets
            completed += siege.completed
            for path in folder.iterdir():
                path.unlink()
        failures += race(folder, races, sabotage) if races else []
    return Report(
        acknowledged=sum(truth.acknowledged for truth in accounts),
        lost=sum(truth.lost for truth in accounts),
        false=sum(truth.false for truth in accounts),
        overlaps=sum(truth.overlaps for truth in accounts),
        points=dict(points),
        resets=resets,
        completed=completed,
        races=races,
        seeds=tuple(seeds),
        findings=(*failures, *(text for truth in accounts for text in truth.failures)),
    )
