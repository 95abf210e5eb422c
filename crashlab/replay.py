"""Replay: what a disk may hold after a power loss, from the log of `crashlab.disk`.

A disk that loses power after the first p entries of its log has everything that a flush among them covered. Each
later write it may have, or not, or in part: whole sectors of 512 bytes, any of them. `Replay` makes such images, point
after point in rising order, and applies what is certain only once. This module knows bytes at offsets, and nothing of
file systems.

Notes
-----
The log is in the order in which the disk took the requests. A write that came before a flush counts as covered by it,
though a real disk promises that only for those that it had answered when the flush was sent. File systems wait for
the answer before they rely on it.
"""

import mmap
import os
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crashlab.disk import HEADER

SECTOR = 512
"""Bytes that a disk writes whole or not at all."""

_PAGE = 4096

FATES = ("all", "none", "some", "torn", "prefix", "one missing", "one only")
"""What becomes of the writes that no flush covered.

"some": each is kept or dropped. "torn": each is kept, dropped, cut off after some sectors, or has only some sectors.
"prefix": the first ones are kept, the next is cut off. "one missing", "one only": all but one are kept, or only one.
"""


class Log:
    """The entries of a log file, by number."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._bytes = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        self._offsets: list[int] = []  # on the disk, of each entry
        self._bodies: list[tuple[int, int]] = []  # in the log, of each entry
        at = 0
        while at < len(self._bytes):
            offset, nbytes = HEADER.unpack_from(self._bytes, at)
            at += HEADER.size
            self._offsets.append(offset)
            self._bodies.append((at, at + nbytes))
            at += nbytes

    def __len__(self) -> int:
        return len(self._offsets)

    def write(self, entry: int) -> tuple[int, memoryview]:
        """Return offset and bytes of an entry; a flush has no bytes."""
        start, stop = self._bodies[entry]
        return self._offsets[entry], self._bytes[start:stop]

    def flushes(self) -> list[int]:
        """Return the numbers of the entries that are flushes."""
        return [entry for entry, (start, stop) in enumerate(self._bodies) if start == stop]


class Replay:
    """The states of one disk, in rising order of their points.

    Parameters
    ----------
    base : path
        The image when the log began.
    log : Log
    first : int
        Entries that are certain at any point, flushed or not. Points begin there.
    """

    def __init__(self, base: Path, log: Log, first: int = 0) -> None:
        self._log = log
        self._certain = mmap.mmap(-1, base.stat().st_size)
        self._used: NDArray[np.bool_] = np.zeros(len(self._certain) // _PAGE, bool)
        self._applied = 0
        self._flushes = log.flushes()
        for offset, data in _extents(base):
            self._apply(offset, data)
        self._advance(first)

    def make(self, point: int, fate: str, rng: random.Random, image: Path) -> int:
        """Write to the new sparse file `image` what the disk may hold after `point` entries.

        Returns
        -------
        int
            Writes that no flush covered, to which `fate` (one of `FATES`) happened.
        """
        if point < self._applied:
            raise ValueError(f"point {point} comes after a later one: {self._applied} entries are applied")
        self._advance(max((entry + 1 for entry in self._flushes if entry < point), default=0))
        handle = os.open(image, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            os.ftruncate(handle, len(self._certain))
            with memoryview(self._certain) as certain:
                for start, stop in self._runs():
                    _write(handle, certain[start:stop], start)
            writes = [self._log.write(entry) for entry in range(self._applied, point)]
            for write, pieces in zip(writes, _fates(fate, writes, rng), strict=True):
                offset, data = write
                for start, stop in pieces:
                    _write(handle, data[start:stop], offset + start)
        finally:
            os.close(handle)
        return len(writes)

    def _advance(self, entries: int) -> None:
        for entry in range(self._applied, entries):
            self._apply(*self._log.write(entry))
        self._applied = max(self._applied, entries)

    def _apply(self, offset: int, data: memoryview) -> None:
        if len(data):
            self._certain[offset : offset + len(data)] = data
            self._used[offset // _PAGE : -(-(offset + len(data)) // _PAGE)] = True

    def _runs(self) -> list[tuple[int, int]]:
        """Return the bytes ``[start, stop)`` that may be other than zero."""
        edges = np.flatnonzero(np.diff(self._used, prepend=False, append=False)) * _PAGE
        return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def choose_points(
    log: Log, first: int, last: int, acknowledged: list[int], count: int, rng: random.Random
) -> list[int]:
    """Choose `count` points in rising order, all over the log and around its flushes and what was acknowledged.

    Parameters
    ----------
    log : Log
    first, last : int
        No point is below or above these.
    acknowledged : list of int
        The lengths of the log when something was promised.
    count : int
        Points, at most. One comes twice only if what happens there is uncertain.
    """
    flushes = log.flushes()
    settled = {entry + 1 for entry in flushes}  # where nothing is uncertain, and once is enough
    chosen: list[int] = []
    for _ in range(100 * count):
        if len(chosen) == count:
            break
        kind = rng.random()
        if kind < 0.35 and acknowledged:
            point = rng.choice(acknowledged) + rng.choice((0, 0, 1, 2, 4))
        elif kind < 0.7 and flushes:
            point = rng.choice(flushes) + rng.choice((-1, 0, 0, 1, 2, 3))
        else:
            point = rng.randint(first, last)
        point = min(max(point, first), last)
        if point not in settled or point not in chosen:
            chosen.append(point)
    return sorted(chosen)


def _fates(fate: str, writes: list[tuple[int, memoryview]], rng: random.Random) -> Iterator[list[tuple[int, int]]]:
    """Yield which bytes ``[start, stop)`` of each write reach the disk."""
    chosen = rng.randrange(len(writes)) if writes else 0
    for number, (_, data) in enumerate(writes):
        whole, nothing = [(0, len(data))], list[tuple[int, int]]()
        match fate:
            case "all":
                yield whole
            case "none":
                yield nothing
            case "some":
                yield rng.choice((whole, nothing))
            case "torn":
                yield rng.choice((whole, nothing, _cut_off(data, rng), _some_sectors(data, rng)))
            case "prefix":
                yield whole if number < chosen else _cut_off(data, rng) if number == chosen else nothing
            case "one missing":
                yield whole if number != chosen else nothing
            case "one only":
                yield whole if number == chosen else nothing
            case _:
                raise ValueError(f"there is no fate {fate!r}")


def _cut_off(data: memoryview, rng: random.Random) -> list[tuple[int, int]]:
    return [(0, SECTOR * rng.randint(0, len(data) // SECTOR))]


def _some_sectors(data: memoryview, rng: random.Random) -> list[tuple[int, int]]:
    """Cut at up to 8 places, and keep every other piece."""
    cuts = sorted(SECTOR * rng.randint(0, len(data) // SECTOR) for _ in range(8))
    return list(pairwise([0, *cuts, len(data)]))[rng.randrange(2) :: 2]


def _extents(image: Path) -> Iterator[tuple[int, memoryview]]:
    """Yield offset and bytes of what is no hole in a file."""
    with image.open("rb") as file:
        whole = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    used = np.frombuffer(whole, np.uint8).reshape(-1, _PAGE).any(axis=1)
    for page in np.flatnonzero(used).tolist():
        yield page * _PAGE, whole[page * _PAGE : (page + 1) * _PAGE]


def _write(handle: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], offset + done)
