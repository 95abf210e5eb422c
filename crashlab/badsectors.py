"""Bad sectors: a store on a disk that fails some writes for a while, so that syncs fail as they do in real life.

The kernel reports such an error once, and drops the data: the next sync succeeds. A workload fills a store on a
`crashlab.disk`, lets writes fail under its data, under its journal, or all flushes, and goes on, as programs do that
catch errors. Then the store is opened again, in the same boot and after the disk was mounted anew, and whatever is
called durable must have its bytes.

``python -m crashlab.badsectors FOLDER SERVED EVENTS SEED [PLANT]`` is the workload.
"""

import contextlib
import ctypes
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import blockstore as bs
from crashlab import mounts
from crashlab.check import Verdict, check_disk, check_store, in_child
from crashlab.disk import Disk, Position, served
from crashlab.history import History, Recorder, content
from crashlab.plants import PLANTS

VICTIMS = ("flushes", "data", "journal", "data, unnoticed")
"""What fails. "flushes" comes last, since most file systems give up then. "unnoticed": the kernel writes back by
itself, and the process ends before it asks."""

_STORE_NBYTES = 4 << 20
_ROUNDS = 8
_BEYOND = 1 << 62  # a point after every event
_PROJECT = Path(__file__).resolve().parent.parent
_SPACE = 3 << 30
_SECONDS = 120


@dataclass(slots=True)
class Report:
    """What one run found."""

    fs: str
    seeds: list[int]
    plant: str | None = None
    errors: int = 0
    """Requests that the disk failed."""
    promised: int = 0
    """Durable ranges, and stores, that had to be there, over all checks."""
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        bug = f" with {self.plant!r} planted" if self.plant else ""
        return (
            f"bad sectors on {self.fs}{bug}: {len(self.findings)} findings, {self.promised:,} durable ranges checked, "
            f"{self.errors:,} failed requests, seeds {self.seeds[0]}-{self.seeds[-1]}, {self.seconds:.0f} s"
        )


def run(
    fs: str, seeds: Iterable[int], plant: str | None = None, *, progress: Callable[[str], None] = lambda text: None
) -> Report:
    """Run one workload for each seed, and report.

    Parameters
    ----------
    fs : {"ext4", "xfs"}
    seeds : iterable of int
    plant : str, optional
        The bug to plant: one of `crashlab.plants.PLANTS`.
    progress : callable
        Is told in words what is done.

    Notes
    -----
    Moves the calling thread to mounts of its own, for good.
    """
    began = time.monotonic()
    report = Report(fs, list(seeds), plant)
    mounts.private_namespace()
    for seed in report.seeds:
        with tempfile.TemporaryDirectory(prefix="crashlab-") as name, mounts.tmpfs(Path(name), _SPACE) as folder:
            _run_one(folder, seed, report)
        report.seconds = time.monotonic() - began
        progress(f"seed {seed}: {report.errors} errors, {len(report.findings)} findings, {report.seconds:.0f} s")
    return report


def _run_one(folder: Path, seed: int, report: Report) -> None:
    image, target, events = folder / "disk.img", folder / "mounted", folder / "events"
    mounts.make_file_system(image, report.fs)
    target.mkdir()
    (folder / "served").mkdir()
    with served(image, folder / "log", folder / "served") as disk:
        with mounts.mounted(disk.image, target, report.fs):
            done = subprocess.run(
                [sys.executable, "-m", __name__, target, disk.folder, events, str(seed), *filter(None, [report.plant])],
                cwd=_PROJECT,
                env=os.environ | {"BLOCKSTORE_BOOT_ID": "workload"},
                stderr=subprocess.PIPE,
                text=True,
                timeout=_SECONDS,
            )
            report.errors += disk.failed()
            disk.tell("heal")
        if done.returncode != 0:
            report.findings.append(f"seed {seed}: the workload ended with {done.returncode}: {done.stderr[-1500:]}")
        with mounts.mounted(disk.image, target, report.fs):
            history = History.load(events, seed)
            verdict = in_child(partial(check_disk, target, history, _BEYOND, thorough=True), boot="after mounting anew")
        report.promised += verdict.promised
        report.findings += [f"seed {seed}, mounted anew: {text}" for text in verdict.findings]
    shutil.rmtree(target, ignore_errors=True)


class Sufferer:
    """The workload: one store, and the disk below it.

    Parameters
    ----------
    path : path
        Of the store.
    disk : Disk
        What to break.
    record : Recorder
    seed : int
    """

    def __init__(self, path: Path, disk: Disk, record: Recorder, events: Path, seed: int) -> None:
        self._path = path
        self._disk = disk
        self._position = Position(disk.position)
        self._record = record
        self._events = events
        self._seed = seed
        self._random = random.Random(seed)
        self._tag = 0
        self._ranges: dict[int, tuple[int, bs.AllocatedRange]] = {}

    def live(self) -> None:
        """Fill, break, go on, and open again, some times."""
        store = bs.create(self._path, _STORE_NBYTES)
        self._record("created", self._position(), _STORE_NBYTES)
        for number in range(_ROUNDS):
            self._write(store)
            self._flush(store)
            victim = self._random.choice(VICTIMS[1:] if number < _ROUNDS - 1 else VICTIMS)
            if victim == "data, unnoticed":
                self._suffer_unnoticed(store)
            else:
                self._suffer(store, victim)
            self._ranges.clear()
            try:
                store = self._resume()
            except OSError as error:
                if isinstance(error, bs.BlockStoreError):
                    raise
                return  # the file system gave up; what is durable is seen when it is mounted anew
        with contextlib.suppress(bs.PoisonedStoreError):
            store.close()

    def _suffer(self, store: bs.BlockStore, victim: str) -> None:
        written = self._write(store)
        self._break(victim, written)
        self._flush(store)
        self._disk.tell("heal")
        for _ in range(3):  # programs go on
            with contextlib.suppress(OSError):
                self._write(store)
            self._flush(store)
        with contextlib.suppress(OSError):
            store.close()
            self._promise()

    def _suffer_unnoticed(self, store: bs.BlockStore) -> None:
        """Let the kernel write back and fail, and end without a sync: the next one to sync must be told."""
        with contextlib.suppress(OSError):
            store.close()
            self._promise()
        self._ranges.clear()
        child = os.fork()
        if child == 0:
            try:
                store = bs.open(self._path)
                self._break("data", self._write(store))
                handle = os.open(self._path, os.O_RDONLY)
                ctypes.CDLL(None).syncfs(handle)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        self._tag += 100  # beyond those of the child

    def _break(self, victim: str, written: list[bs.AllocatedRange]) -> None:
        if victim == "flushes":
            self._disk.tell("fail flushes")
            return
        spans = [(r.start, r.stop) for r in written[: self._random.randint(1, len(written))]]
        path = self._path
        if victim == "journal":
            path = Path(f"{path}.journal")
            spans = [(4096, path.stat().st_size)]
        for span in spans:
            for start, stop in mounts.on_disk(path, *span):
                self._disk.tell(f"fail {start} {stop}")

    def _write(self, store: bs.BlockStore) -> list[bs.AllocatedRange]:
        """Write some ranges, fresh ones and others, and return them."""
        written = []
        for _ in range(self._random.randint(2, 6)):
            if self._ranges and self._random.random() < 0.3:
                tag = self._random.choice(list(self._ranges))
                version, r = self._ranges[tag]
            else:
                self._tag += 1
                tag, version = self._tag, 0
                r = store.allocate(self._random.randint(8, 40_000), tag=tag)
            self._record("begun", self._position(), tag, version + 1, r.nbytes)
            r.write(content(self._seed, tag, version + 1, r.nbytes), rewrite=True)
            self._ranges[tag] = version + 1, r
            written.append(r)
        return written

    def _flush(self, store: bs.BlockStore) -> None:
        with contextlib.suppress(OSError):
            store.flush()
        self._promise()

    def _promise(self) -> None:
        """Take down what is called durable, whatever was raised."""
        for tag, (version, r) in self._ranges.items():
            if r.receipt is not None and r.receipt.durable:
                self._record("durable", self._position(), tag, version)

    def _resume(self) -> bs.BlockStore:
        """Open again in the same boot, and check what is called durable against the disk, not against the cache."""
        self._disk.tell("heal")
        with contextlib.suppress(bs.PoisonedStoreError):  # what was written is void; what was durable is still there
            bs.open(self._path).close()
        bs.open(self._path).close()
        handle = os.open(self._path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
        store = bs.open(self._path)
        verdict = Verdict()
        found = check_store(store, History.load(self._events, self._seed), _BEYOND, verdict)
        if verdict.findings:
            raise RuntimeError("after reopening: " + "; ".join(verdict.findings))
        for tag, version in found.items():
            self._record("durable", self._position(), tag, version)
        return store


def main(folder: Path, disk: Path, events: Path, seed: int) -> None:
    """Run the workload."""
    warnings.simplefilter("ignore")
    Sufferer(folder / "store", Disk(disk), Recorder(events), events, seed).live()


if __name__ == "__main__":
    if sys.argv[5:]:
        PLANTS[sys.argv[5]]()
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
