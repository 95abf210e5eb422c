"""Check: whether a store holds what was promised of it, after whatever has happened.

It compares a store that was just opened with the history of the workload that filled it, of which the disk had seen a
part. It knows blockstore by its public names only.
"""

import json
import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

import blockstore as bs
from crashlab.history import History, content

_FILL_TAG = 1 << 40
_FILL_NBYTES = 1 << 20
_SECONDS = 60


@dataclass(slots=True)
class Verdict:
    """What one check found; each finding is a sentence."""

    promised: int = 0
    """Durable versions, and the store itself, that had to be there."""
    lost: list[str] = field(default_factory=list)
    """Promised, and not there."""
    false: list[str] = field(default_factory=list)
    """Reported, and not true."""
    unopened: list[str] = field(default_factory=list)
    """Stores that do not open."""

    @property
    def findings(self) -> list[str]:
        """All of them."""
        return self.unopened + self.lost + self.false


def in_child(look: Callable[[], Verdict], *, boot: str) -> Verdict:
    """Check in a process of its own: a map can end it, and everything it had open is closed when it is gone.

    Parameters
    ----------
    look : callable
        The check.
    boot : str
        Identity of the boot that the library is to believe in.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(_SECONDS)
            os.close(reading)
            os.environ["BLOCKSTORE_BOOT_ID"] = boot
            try:
                verdict = look()
            except Exception as error:
                verdict = Verdict(false=[f"the check failed: {type(error).__name__}: {error}"])
            with open(writing, "w") as file:
                json.dump(asdict(verdict), file)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        return Verdict(unopened=[f"the check ended with {os.waitstatus_to_exitcode(status)}"])
    return Verdict(**json.loads(text))


def check_disk(folder: Path, history: History, point: int, *, thorough: bool) -> Verdict:
    """Check the store in `folder`, a file system that lost power after `point` entries of the log of its disk.

    Parameters
    ----------
    thorough : bool
        Also fill what is free, close, reset once more, and check that everything is there.
    """
    verdict = Verdict()
    path = folder / "store"
    if history.created is not None and point >= history.created:
        verdict.promised += 1
    elif not path.exists():
        return verdict
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with bs.open(path, mode="r") as store:
                before = store.receipts()
            store = bs.open(path)
    except Exception as error:
        verdict.unopened.append(f"{type(error).__name__}: {error}")
        return verdict
    verdict.false += [f"a warning: {warning.message}" for warning in caught]
    with store:
        if before.tobytes() != store.receipts().tobytes():
            verdict.false.append("mode='r' and mode='r+' do not report the same receipts")
        check_store(store, history, point, verdict)
        taken = _take_all(store, verdict)
        if thorough and not verdict.findings:
            for r in taken:
                r.write(content(history.seed, _FILL_TAG, r.start, r.nbytes))
    if thorough and not verdict.findings:
        _check_filled(path, history, point, verdict)
    return verdict


def check_store(store: bs.BlockStore, history: History, point: int, verdict: Verdict) -> dict[int, int]:
    """Add to `verdict` what is wrong with an open store, and return the version of each range that it reports.

    Parameters
    ----------
    store : BlockStore
        After a reset, or a reopening: all receipts must be durable.
    history : History
    point : int
        Entries of the log; what was begun or promised later is not known.
    verdict : Verdict
        Is added to.

    Returns
    -------
    dict
        Version by tag, of the receipts that are true.
    """
    receipts = store.receipts()
    found: dict[int, int] = {}
    for start, nbytes, tag, durable in receipts[["start", "nbytes", "tag", "durable"]].tolist():
        data = store.raw.array(start, nbytes, np.uint8)
        version = history.version_of(tag, data, point)
        name = f"range {tag} at {start} ({nbytes} bytes)"
        if not version:
            verdict.false.append(
                f"{name} is reported, and has the bytes of no version: {_describe(history, tag, data)}"
            )
        elif version < history.lives[tag].promised_by(point):
            verdict.false.append(f"{name} has version {version}: {_promise(history, tag, point)}")
        elif not durable:
            verdict.false.append(f"{name} is reported as not durable right after opening")
        elif tag in found:
            verdict.false.append(f"{name} is reported twice")
        found[tag] = version
    for tag, life in history.lives.items():
        promised = life.promised_by(point)
        if promised and promised == max(life.begun_by(point)):
            verdict.promised += 1
            if tag not in found:
                verdict.lost.append(f"range {tag} ({life.nbytes} bytes) is gone: {_promise(history, tag, point)}")
    _check_tiling(store, verdict)
    return found


def _check_tiling(store: bs.BlockStore, verdict: Verdict) -> None:
    pieces = [(start, stop) for start, stop in store.receipts()[["start", "stop"]].tolist()]
    pieces += [(start, stop) for start, stop in store.pending()[["start", "stop"]].tolist()]
    at = 0
    for start, stop in sorted(pieces):
        if start != at:
            verdict.false.append(f"receipts and holes do not tile the store: [{start}, {stop}) comes after {at}")
        at = stop
    if at != store.nbytes:
        verdict.false.append(f"receipts and holes end at {at}, the store at {store.nbytes}")


def _take_all(store: bs.BlockStore, verdict: Verdict) -> list[bs.AllocatedRange]:
    """Allocate all that is free, and see that it belongs to nobody."""
    free = store.free
    taken = list(store.ranges(_FILL_NBYTES, tag=_FILL_TAG))
    owned = sorted((start, stop) for start, stop in store.receipts()[["start", "stop"]].tolist())
    everything = sorted([*owned, *((r.start, r.stop) for r in taken)])
    for (_, stop), (start, _) in pairwise(everything):
        if start < stop:
            verdict.false.append(f"what was allocated after opening overlaps something at {start}")
    if sum(r.stop - r.start for r in taken) != free:
        verdict.false.append(f"{free} bytes were free, and {sum(r.stop - r.start for r in taken)} could be taken")
    return taken


def _check_filled(path: Path, history: History, point: int, verdict: Verdict) -> None:
    """Check a store once more that was full when it was closed, after another reset."""
    os.environ["BLOCKSTORE_BOOT_ID"] += " and another reset"
    with bs.open(path) as store:
        if store.free:
            verdict.lost.append(f"{store.free} bytes are free in a store that was filled after the reset, and closed")
        for start, nbytes, tag in store.receipts()[["start", "nbytes", "tag"]].tolist():
            data = store.raw.array(start, nbytes, np.uint8)
            if tag == _FILL_TAG:
                right = np.array_equal(data, content(history.seed, tag, start, nbytes))
            else:
                right = history.version_of(tag, data, point) > 0
            if not right:
                verdict.false.append(f"range {tag} at {start} is wrong after it was closed and reset once more")


def _promise(history: History, tag: int, point: int) -> str:
    """Say when the last promise was made."""
    position, version = max(pair for pair in history.lives[tag].durable if pair[0] <= point)
    return f"version {version} was durable after {position} entries"


def _describe(history: History, tag: int, data: np.typing.NDArray[np.uint8]) -> str:
    """Say what the bytes of a range are instead of a version."""
    life = history.lives.get(tag)
    if life is None:
        return "nobody began such a range"
    if life.nbytes != len(data):
        return f"it has {life.nbytes} bytes"
    parts = [f"{int((data == 0).sum())} zeros"]
    for position, version in life.begun:
        same = int((data == content(history.seed, tag, version, life.nbytes)).sum())
        parts.append(f"{same} as in version {version} (begun after {position})")
    return f"of {len(data)} bytes, " + ", ".join(parts)
