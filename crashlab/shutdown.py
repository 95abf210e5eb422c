"""Shutdown: a file system goes down under a writer, as at a power loss, and what was durable is there afterwards.

``EXT4_IOC_SHUTDOWN`` and ``XFS_IOC_GOINGDOWN`` end every later write of a mounted file system with an error, with or
without a last flush of its own log. A writer fills and flushes in four threads and says so on a pipe; then it writes
what nobody flushes; between two writers the file system goes down. The next flush must raise. Unmounting drops the
cache, mounting replays the log, and the store must hold all that was durable, and nothing else: another mount is as a
reset. Writers are not caught inside, since touching a fresh mapped page is SIGBUS then, on xfs.
"""

import fcntl
import os
import random
import shutil
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import blockstore as bs
from crashlab import mounts
from crashlab.truth import SIZE, Truth, content, fork, nbytes_of, say_nothing

JOBS = 400
"""Jobs of one store."""

FLAGS = {"without its log": 2, "with its log": 1}
"""What to do with the log of the file system: ``XFS_FSOP_GOING_FLAGS_NOLOGFLUSH`` and ``_LOGFLUSH``, and ext4 alike."""

_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32)
_THREADS = 4


@dataclass(frozen=True, slots=True)
class Report:
    """What shutdowns found. `str` is one line."""

    acknowledged: int
    """Receipts that were called durable before a shutdown, and due after it."""
    lost: int
    false: int
    believed: int
    """Receipts that were reported after it though they had only been written."""
    silent: int
    """Shutdowns after which a flush did not raise."""
    points: dict[str, int]
    """Shutdowns by file system."""
    seeds: tuple[int, ...]
    seconds: float
    findings: tuple[str, ...]
    """What was found, in words."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        points = ", ".join(f"{fs} {count}" for fs, count in self.points.items())
        return (
            f"shutdown: {self.lost} lost of {self.acknowledged} acknowledged, {self.false} false, {self.believed} "
            f"believed though only written, {self.silent} flushes that did not raise, "
            f"{sum(self.points.values())} points ({points}), {len(self.findings)} findings, "
            f"seeds {', '.join(map(str, self.seeds))}, {self.seconds:.0f} s"
        )


def missing() -> list[str]:
    """Say in words what this needs and this machine has not; an empty list if it can run."""
    if sys.platform != "linux":
        return ["shutdown needs Linux"]
    lacks = [] if os.geteuid() == 0 else ["shutdown needs root, to mount file systems"]
    if not Path("/dev/loop-control").exists():
        lacks.append("shutdown needs /dev/loop-control")
    where = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return lacks + [
        f"shutdown needs the program mkfs.{fs}" for fs in mounts.SIZES if shutil.which(f"mkfs.{fs}", path=where) is None
    ]


class Writer:
    """The process whose file system goes down. It says the lines that `Truth` takes, and ``f`` or ``ok`` of a flush."""

    def __init__(self, path: Path, seed: int, life: int, say: Callable[..., None]) -> None:
        self._path, self._seed, self._say = path, seed, say
        self._random = random.Random(f"{seed} {life}")
        self._version = life << 20
        self._draw = threading.Lock()

    def live(self, flag: int) -> None:
        """Fill and flush, write what is not flushed, shut the file system down, and flush."""
        store = bs.open(self._path) if self._path.exists() else bs.create(self._path, JOBS * SIZE)
        folder = os.open(self._path.parent, os.O_RDONLY)
        done = set(store.receipts()["tag"].tolist())
        jobs = [job for job in range(JOBS) if job not in done]
        ranges: list[list[bs.AllocatedRange]] = [[] for _ in range(_THREADS)]
        rounds = self._random.randrange(1, 6)

        def fill(thread: int) -> None:
            for job in jobs[thread::_THREADS][:rounds]:
                ranges[thread].append(store.allocate(nbytes_of(job), tag=job))
                self._write(store, ranges[thread][-1], flush=True)

        threads = [threading.Thread(target=fill, args=(thread,)) for thread in range(_THREADS)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        written = [r for part in ranges for r in part]
        again = self._random.sample(written, min(4, len(written)))
        for number, r in enumerate(again):  # those that are not flushed come last, since a flush covers all
            self._write(store, r, rewrite=True, flush=number < 2)
        for job in jobs[_THREADS * rounds :][: self._random.randrange(1, 6)]:
            self._write(store, store.allocate(nbytes_of(job), tag=job))
        fcntl.ioctl(folder, _SHUTDOWN, struct.pack("=I", flag))
        for name, end in (("flush", store.flush), ("flush", store.flush), ("close", store.close)):
            try:
                end()
            except OSError as error:
                self._say("f", name, type(error).__name__)
            else:
                self._say("ok", name)
        os._exit(0)

    def _write(self, store: bs.BlockStore, r: bs.AllocatedRange, *, rewrite: bool = False, flush: bool = False) -> None:
        with self._draw:
            version = self._version = self._version + 1
        words = content(self._seed, r.tag, version)
        self._say("b", r.tag, version, r.start, r.stop)
        if version % 2:
            receipt = r.write(words, rewrite=rewrite)
        else:
            with r.writer(dtype="u8", rewrite=rewrite) as a:
                a[:] = words
            if (receipt := r.receipt) is None:  # type: ignore[assignment]
                raise RuntimeError("no receipt after a clean exit")
        self._say("w", r.tag, version)
        if flush:
            store.flush(receipt)
            self._say("d", r.tag, version)


class Siege:
    """One file system that goes down again and again, for one seed."""

    def __init__(self, folder: Path, fs: str, seed: int, sabotage: Callable[[], object] | None = None) -> None:
        self._fs, self._seed, self._sabotage = fs, seed, sabotage
        self._image, self._target = folder / f"{fs}-{seed}.img", folder / f"{fs}-{seed}"
        self._target.mkdir()
        self._truth = Truth(str(self._target / "data.bin"), seed)
        self.rounds = self.believed = self.silent = 0
        self.accounts = [self._truth]
        self.failures: list[str] = []

    def run(self, rounds: int) -> None:
        """Shut it down `rounds` times, and check what is left each time."""
        mounts.make_file_system(self._image, self._fs)
        flags = list(FLAGS.items())
        for number in range(rounds):
            how, flag = flags[number % len(flags)]
            where = f"{self._fs}, seed {self._seed}, round {number}, {how}"
            with mounts.mounted(self._image, self._target, self._fs):
                if len(self._truth.due) > JOBS - 40:
                    self._begin()
                child = fork(lambda say, number=number, flag=flag: self._write(number, flag, say))  # type: ignore[misc]
                status = child.end()
            self.rounds += 1
            for line in child.lines:
                self._truth.hear(line)
            said = [line for line in child.lines if line[0] in ("f", "ok")]
            if status != 0:
                self.failures.append(f"{where}: wait status {status}")
            if said[:2] != 2 * [["f", "flush", "PoisonedStoreError"]]:
                self.silent += 1
                self.failures.append(f"{where}: after the shutdown: {said}")
            with mounts.mounted(self._image, self._target, self._fs):
                self._check(where)

    def _write(self, number: int, flag: int, say: Callable[..., None]) -> None:
        if self._sabotage is not None:
            self._sabotage()
        Writer(Path(self._truth.path), self._seed, number, say).live(flag)

    def _begin(self) -> None:
        for path in self._target.glob("data.bin*"):
            path.unlink()
        self._truth = Truth(self._truth.path, self._seed)
        self.accounts.append(self._truth)

    def _check(self, where: str) -> None:
        truth = self._truth
        only_written = {(job, version) for job, (version, durable) in truth.due.items() if not durable}
        truth.check(where, reset=True)
        for job, version in only_written & {(job, version) for job, (version, _) in truth.due.items()}:
            self.believed += 1
            self.failures.append(f"{where}: job {job}, version {version} was only written, and is reported")


def run(
    folder: Path,
    *,
    rounds: int = 20,
    file_systems: Sequence[str] = ("ext4", "xfs"),
    seeds: Sequence[int] = (0, 1),
    progress: Callable[[str], None] = say_nothing,
    sabotage: Callable[[], object] | None = None,
) -> Report:
    """Shut each file system down `rounds` times per seed; its image is in an empty folder.

    `sabotage` is called in each writer first, to break blockstore there and see that it is noticed.
    Moves the calling thread to mounts of its own (see `crashlab.mounts.private_namespace`), for good.
    """
    mounts.private_namespace()
    began = time.monotonic()
    points: Counter[str] = Counter()
    sieges = []
    for fs in file_systems:
        for seed in seeds:
            siege = Siege(folder, fs, seed, sabotage)
            siege.run(rounds)
            sieges.append(siege)
            points[fs] += siege.rounds
            progress(f"shutdown: {points.total()} of {rounds * len(seeds) * len(file_systems)}")
    accounts = [truth for siege in sieges for truth in siege.accounts]
    return Report(
        acknowledged=sum(truth.acknowledged for truth in accounts),
        lost=sum(truth.lost for truth in accounts),
        false=sum(truth.false + truth.overlaps for truth in accounts),
        believed=sum(siege.believed for siege in sieges),
        silent=sum(siege.silent for siege in sieges),
        points=dict(points),
        seeds=tuple(seeds),
        seconds=time.monotonic() - began,
        findings=tuple(
            text
            for siege in sieges
            for text in (*siege.failures, *(text for truth in siege.accounts for text in truth.failures))
        ),
    )
