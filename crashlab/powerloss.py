"""Power loss: a workload on a disk that keeps a log, and what is left of it wherever in that log the power goes.

For each seed a workload runs in a fresh file system, on a loop device, on a `crashlab.disk`. Then, for each of many
points of the log, a disk is made as the loss of power at that point may leave it, the kernel mounts it and repairs
what it repairs after any such loss, and what is there is compared with what had been promised by then. From one of
these disks a second workload goes on, and its log is examined in the same way: a loss after a loss.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from crashlab import check, disk, mounts, plain
from crashlab.history import History, content
from crashlab.plants import PLANTS
from crashlab.replay import FATES, Log, Replay, choose_points

_Check = Callable[..., check.Verdict]

SUBJECTS: dict[str, tuple[str, _Check]] = {
    "store": ("crashlab.workload", check.check_disk),
    "plain": ("crashlab.plain", plain.check_files),
}
"""What can be tested: the module that is the workload, and the check."""

_PROJECT = Path(__file__).resolve().parent.parent
_SLICE = 20  # points that a process examines at a time
_THOROUGH = 4  # one point of so many is checked thoroughly
_WORKLOAD_SECONDS = 600
_SPACE = 6 << 30


@dataclass(slots=True)
class Report:
    """What one run found."""

    fs: str
    seeds: list[int]
    plant: str | None = None
    points: int = 0
    promised: int = 0
    """Durable ranges, and stores, that had to be there, over all points."""
    entries: int = 0
    """Of the logs: writes and flushes."""
    lost: list[str] = field(default_factory=list)
    false: list[str] = field(default_factory=list)
    unopened: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def findings(self) -> list[str]:
        """All of them; none is what a run should have, unless a bug was planted."""
        return self.unopened + self.lost + self.false

    def add(self, verdict: check.Verdict, where: str) -> None:
        """Count a verdict."""
        self.promised += verdict.promised
        self.lost += [f"{where}: {text}" for text in verdict.lost]
        self.false += [f"{where}: {text}" for text in verdict.false]
        self.unopened += [f"{where}: {text}" for text in verdict.unopened]

    def __str__(self) -> str:
        seeds = f"{self.seeds[0]}-{self.seeds[-1]}" if len(self.seeds) > 1 else f"{self.seeds[0]}"
        bug = f" with {self.plant!r} planted" if self.plant else ""
        return (
            f"power loss on {self.fs}{bug}: {len(self.lost)} lost of {self.promised:,} acknowledged, "
            f"{len(self.false)} false, {len(self.unopened)} stores that do not open, {self.points:,} points in "
            f"{self.entries:,} writes and flushes, seeds {seeds}, {self.seconds:.0f} s"
        )


def missing() -> list[str]:
    """Say in words what this needs and this machine has not; an empty list if it can run."""
    lacks = []
    if sys.platform != "linux":
        return ["power loss needs Linux"]
    if os.geteuid() != 0:
        lacks.append("power loss needs root, to mount file systems")
    lacks += [
        f"power loss needs the program mkfs.{fs}"
        for fs in mounts.SIZES
        if shutil.which(f"mkfs.{fs}", path=_PATH) is None
    ]
    lacks += [f"power loss needs {path}" for path in ("/dev/fuse", "/dev/loop-control") if not Path(path).exists()]
    if importlib.util.find_spec("mfusepy") is None:
        lacks.append("power loss needs the package mfusepy: pip install '.[crash]'")
    else:
        try:
            importlib.import_module("mfusepy")
        except Exception as error:
            lacks.append(f"power loss needs libfuse: {error}")
    return lacks


_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


@dataclass(frozen=True, slots=True)
class Recording:
    """What is left of one workload: enough to lose power at any point of it, as often as one likes."""

    folder: Path
    fs: str
    seed: int
    subject: str
    first: int
    """Entries of the log when the file system was mounted."""
    last: int
    """Entries when the workload was over."""

    def save(self) -> None:
        """Note what it is in its folder, for `load`."""
        fields = {name: value for name, value in asdict(self).items() if name != "folder"}
        (self.folder / "recording").write_text(json.dumps(fields))

    @classmethod
    def load(cls, folder: Path) -> "Recording":
        """Find it in a folder, which may be a copy."""
        return cls(folder, **json.loads((folder / "recording").read_text()))

    def log(self) -> Log:
        """Return what the disk took."""
        return Log(self.folder / "log")

    def history(self) -> History:
        """Return what the workload began, and what it was promised."""
        return History.load(self.folder / "events", self.seed)


def record(folder: Path, fs: str, seed: int, *, subject: str = "store", plant: str | None = None) -> Recording:
    """Run a workload on a fresh disk in `folder`, which is empty.

    Raises
    ------
    RuntimeError
        If the workload failed by itself; its own words are in the message.
    """
    mounts.make_file_system(folder / "base.img", fs)
    (folder / "events").touch()
    return _run_workload(Recording(folder, fs, seed, subject, 0, 0), plant)


def record_again(folder: Path, before: Recording, point: int, plant: str | None = None) -> Recording:
    """Lose power at a point of another recording, and go on from there in `folder`, which is empty. Raises likewise."""
    rng = random.Random(f"{before.seed} {point} again")
    Replay(before.folder / "base.img", before.log(), before.first).make(point, "torn", rng, folder / "base.img")
    events = (line.split() for line in (before.folder / "events").read_text().splitlines())
    known = [f"{event} 0 {' '.join(rest)}" for event, position, *rest in events if int(position) <= point]
    (folder / "events").write_text("".join(f"{line}\n" for line in known))
    return _run_workload(replace(before, folder=folder), plant, again=True)


def _run_workload(recording: Recording, plant: str | None, *, again: bool = False) -> Recording:
    folder, fs = recording.folder, recording.fs
    image, served, mounted = folder / "disk.img", folder / "served", folder / "mounted"
    shutil.copyfile(folder / "base.img", image)
    served.mkdir()
    mounted.mkdir()
    module, seed = SUBJECTS[recording.subject][0], str(recording.seed)
    with disk.served(image, folder / "log", served) as a, mounts.mounted(a.image, mounted, fs):
        os.sync()
        first = a.entries()
        command: list[str | Path] = [
            sys.executable,
            "-m",
            module,
            mounted,
            a.position,
            folder / "events",
            seed,
            str(int(again)),
        ]
        done = subprocess.run(
            [*command, *filter(None, [plant])],
            cwd=_PROJECT,
            env=os.environ | {"BLOCKSTORE_BOOT_ID": "after the first loss" if again else "workload"},
            stderr=subprocess.PIPE,
            text=True,
            timeout=_WORKLOAD_SECONDS,
        )
        last = a.entries()
    image.unlink()
    if done.returncode != 0:
        raise RuntimeError(f"the workload ended with {done.returncode}: {done.stderr[-2000:]}")
    recording = replace(recording, first=first, last=last)
    recording.save()
    return recording


def examine(recording: Recording, trials: Iterable[tuple[int, int]]) -> Iterator[tuple[str, check.Verdict]]:
    """Lose power at points that rise, and yield where, and the verdict.

    Parameters
    ----------
    recording : Recording
    trials : iterable of (int, int)
        Points, each with a number that chooses among what may happen there; the same number, the same disk.

    Notes
    -----
    A file system can be beyond repair after torn sectors: of its superblock, say. Then the writes are taken as whole.
    """
    history, log = _loaded(recording)
    look = SUBJECTS[recording.subject][1]
    replay = Replay(recording.folder / "base.img", log, recording.first)
    image = recording.folder / f"{os.getpid()}.img"
    target = recording.folder / f"{os.getpid()}"
    target.mkdir(exist_ok=True)
    name = f"seed {recording.seed}, {recording.folder.name} loss"
    for point, trial in trials:
        rng = random.Random(f"{recording.seed} {point} {trial}")
        verdict = None
        for fate in (rng.choice(FATES), "some"):
            uncertain = replay.make(point, fate, rng, image)
            where = f"{name}, point {point}, trial {trial} ({fate} of {uncertain} writes)"
            try:
                with mounts.mounted(image, target, recording.fs):
                    verdict = check.in_child(
                        partial(look, target, history, point, thorough=point % _THOROUGH == 0),
                        boot=f"after the loss at {point}",
                    )
            except OSError as error:
                if verdict is not None:
                    raise
                refusal = str(error)
            finally:
                image.unlink()
            if verdict is not None:
                break
        yield where, verdict or check.Verdict(unopened=[f"the file system does not mount: {refusal}"])


def run(
    fs: str,
    count: int,
    seeds: Iterable[int],
    plant: str | None = None,
    *,
    subject: str = "store",
    progress: Callable[[str], None] = lambda text: None,
    keep: Path | None = None,
    enough: int = 100,
) -> Report:
    """Lose power at `count` points, spread over the workloads of all seeds, and report.

    Parameters
    ----------
    fs : {"ext4", "xfs"}
    count : int
        Points.
    seeds : iterable of int
        One workload for each.
    plant : str, optional
        The bug to plant: one of `crashlab.workload.PLANTS`.
    subject : {"store", "plain"}
        "plain" tests the laboratory itself.
    progress : callable
        Is told in words what is done.
    keep : path, optional
        A folder that gets the recordings which led to findings.
    enough : int
        Findings, after which it stops.

    Notes
    -----
    Moves the calling thread to mounts of its own (see `crashlab.mounts.private_namespace`), for good.
    """
    began = time.monotonic()
    report = Report(fs, list(seeds), plant)
    mounts.private_namespace()
    for number, seed in enumerate(report.seeds):
        share = count * (number + 1) // len(report.seeds) - count * number // len(report.seeds)
        with tempfile.TemporaryDirectory(prefix="crashlab-") as name, mounts.tmpfs(Path(name), _SPACE) as folder:
            try:
                for recording, points in _record_both(folder, report, seed, share, subject):
                    before = len(report.findings)
                    _examine_all(recording, points, report, enough)
                    if keep is not None and len(report.findings) > before:
                        _copy(recording, keep / f"{fs}-{seed}-{recording.folder.name}")
            except RuntimeError as error:
                report.false.append(f"seed {seed}: {error}")
        report.seconds = time.monotonic() - began
        progress(f"seed {seed}: {report.points} points, {len(report.findings)} findings, {report.seconds:.0f} s")
        if len(report.findings) >= enough:
            break
    return report


def _record_both(folder: Path, report: Report, seed: int, count: int, subject: str) -> Iterator[tuple[Recording, int]]:
    """Yield the recording of a workload, and of another one after a loss in the first; each with points to examine."""
    (folder / "first").mkdir()
    recording = record(folder / "first", report.fs, seed, subject=subject, plant=report.plant)
    created = recording.history().created
    if created is None:
        yield recording, count
        return
    yield recording, count - count // 3
    (folder / "second").mkdir()
    point = random.Random(seed).randint(created, recording.last)
    yield record_again(folder / "second", recording, point, report.plant), count // 3


def _examine_all(recording: Recording, count: int, report: Report, enough: int) -> None:
    """Examine a recording at some points, and add what is found to the report."""
    log, promises = recording.log(), recording.history().promises()
    report.entries += recording.last - recording.first
    chosen = choose_points(log, recording.first, recording.last, promises, count, random.Random(recording.seed))
    trials = list(zip(chosen, range(count), strict=False))
    slices = [(recording, trials[i : i + _SLICE]) for i in range(0, len(trials), _SLICE)]
    with get_context("fork").Pool(os.cpu_count()) as pool:
        for verdicts in pool.imap(_examine_slice, slices):
            for where, verdict in verdicts:
                report.points += 1
                report.add(verdict, where)
            if len(report.findings) >= enough:
                break


def main(arguments: list[str]) -> int:
    """Run from the command line, print the report, and return 1 if there are findings, 2 if it cannot run."""
    parser = argparse.ArgumentParser(prog="crashlab powerloss", description=__doc__, allow_abbrev=False)
    parser.add_argument("--fs", choices=list(mounts.SIZES), default="ext4")
    parser.add_argument("--points", type=int, default=1000, help="points at which the power goes (default: 1000)")
    parser.add_argument("--seeds", type=int, default=10, help="workloads (default: 10)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--plant", choices=list(PLANTS), help="a bug to plant, which must be found")
    parser.add_argument("--subject", choices=list(SUBJECTS), default="store", help="'plain' tests the laboratory")
    parser.add_argument("--keep", type=Path, help="a folder for the recordings that led to findings")
    chosen = parser.parse_args(arguments)
    if lacks := missing():
        print(*lacks, sep="\n", file=sys.stderr)
        return 2
    seeds = range(chosen.first_seed, chosen.first_seed + chosen.seeds)
    report = run(
        chosen.fs, chosen.points, seeds, chosen.plant, subject=chosen.subject, progress=print, keep=chosen.keep
    )
    print(*report.findings[:20], report, sep="\n")
    return 1 if report.findings else 0


def _copy(recording: Recording, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in ("base.img", "log", "events", "recording"):
        shutil.copyfile(recording.folder / name, target / name)


def _examine_slice(task: tuple[Recording, list[tuple[int, int]]]) -> list[tuple[str, check.Verdict]]:
    return list(examine(*task))


_cache: dict[Path, tuple[History, Log]] = {}


def _loaded(recording: Recording) -> tuple[History, Log]:
    """Return history and log, and have all contents ready before a child is forked."""
    if recording.folder not in _cache:
        history = recording.history()
        for tag, life in history.lives.items():
            for _, version in life.begun:
                content(history.seed, tag, version, life.nbytes)
        _cache[recording.folder] = history, recording.log()
    return _cache[recording.folder]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
