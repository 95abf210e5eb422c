"""Working: what it takes to have hidden working files: folders, copies of what is written, and no leftovers.

Offsets are bytes in a file. This module knows files by name, and nothing of how a shard changes from one to the other.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockstore import _os, sidecar
from blockstore.checksums import ChecksumKind, checksum_function
from blockstore.draft import copy_of, mark_of, working_of
from blockstore.journal import Journal, is_journal, open_journal, read_header
from blockstore.layouts.grid import ShardLayout
from blockstore.plan import Plan
from blockstore.published import Published
from blockstore.records import DURABLE, WRITTEN
from blockstore.resume import peek

_COPY_NBYTES = 1 << 26


def tidy(plan: Plan, path: str) -> None:
    """Remove what a working file that was published leaves, or give its journal the name that goes with it."""
    work = working_of(path)
    if plan.metadata is None:
        unlink(mark_of(path))
    with contextlib.suppress(FileNotFoundError):
        if plan.keep_journal:
            os.replace(sidecar.path_of(work), sidecar.path_of(path))
        else:
            os.unlink(sidecar.path_of(work))
    if not plan.keep_journal and is_journal(sidecar.path_of(path)):
        unlink(sidecar.path_of(path))


def runs(source: Published, layout: ShardLayout) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Return the bytes of all blocks that are written, as few extents as they make, and where each goes by `layout`."""
    numbers = np.flatnonzero(source.written)
    if source.starts is not None:
        for number in numbers.tolist():
            yield layout.start(number), source.raw(number)
        return
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    for first, last in ((run[0], run[-1]) for run in np.split(numbers, breaks) if len(run)):
        start = layout.start(int(first))
        stop, nbytes = layout.extent(int(last))
        yield start, source.frozen[start : stop + nbytes]


def mark(path: str) -> None:
    """Say that the ``.npy`` under the final name, if there is one, is of this array, and to be replaced."""
    os.close(os.open(mark_of(path), os.O_CREAT | os.O_WRONLY, 0o666))


def clear_leftovers(path: str) -> None:
    """Remove what interrupted steps leave beside the file of an array that has no working file."""
    work = working_of(path)
    journal = sidecar.path_of(work)
    for name in (journal, f"{journal}.new", sidecar.temporary_of(work), copy_of(path), mark_of(path)):
        unlink(name)


def copy_bytes(file: _os.File, start: int, source: NDArray[np.uint8]) -> None:
    for at in range(0, len(source), _COPY_NBYTES):
        piece = source[at : at + _COPY_NBYTES]
        if not _os.write_at(file, piece, start + at):
            _os.put_at(file, piece.tobytes(), start + at)


def unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def make_folders(folder: str, top: str) -> None:
    """Make the folders of a shard below that of its array, so that they last."""
    if os.path.isdir(folder):
        return
    if len(folder) > len(top):
        make_folders(os.path.dirname(folder), top)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    _os.sync_directory(os.path.dirname(folder))


def copy_published(
    old: Published,
    layout: ShardLayout,
    sequences: NDArray[np.int64],
    checksum: ChecksumKind | None,
    path: str,
    file: _os.File,
    journal: Journal,
) -> None:
    """Give a new working file what is published, durably, under the numbers that it has in this session.

    The checksums of a journal that was kept are kept: what has changed since is not to be hidden.
    """
    digest, kept = None if checksum is None else checksum_function(checksum), _kept_checksums(path, checksum)
    for start, source in runs(old, layout):
        copy_bytes(file, start, source)
    sidecar.keep_access(file, path)
    _os.sync_file(file)
    for number in np.flatnonzero(old.written).tolist():
        start, nbytes = layout.extent(number)
        if (value := kept.get((start, nbytes))) is None:
            value = 0 if digest is None else digest(old.raw(number))
        journal.append(WRITTEN, int(sequences[number]), start, start + nbytes, nbytes, number, value)
    above = int(sequences.max()) + 1
    journal.append(DURABLE, above, 0, above)
    journal.sync()


def kept_checksum(path: str) -> Any:
    """Return the kind of checksum in the journal of a published file; None if none was kept."""
    name = sidecar.path_of(path)
    return read_header(open_journal(name, writable=False), name).checksum if is_journal(name) else None


def _kept_checksums(path: str, kind: ChecksumKind | None) -> dict[tuple[int, int], int]:
    """Return the checksums of a kind in the journal of a published file, by start and bytes of the blocks."""
    if kind is None or kept_checksum(path) != kind:
        return {}
    found = sidecar.find(path, _os.open_file(path, writable=False), writable=False, adopt=True)
    records = [] if found is None else peek(found, 0)[["start", "nbytes", "checksum"]].tolist()
    return {(start, nbytes): checksum for start, nbytes, checksum in records}
