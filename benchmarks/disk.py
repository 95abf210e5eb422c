"""Where the benchmarks write: temporary folders on a real disk, and memory that the machine really has.

Sizes are bytes. ``TMPDIR`` says where the folders go. This module knows nothing of blockstore.
"""

import contextlib
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

_NO_DISK = ("tmpfs", "ramfs")


def filesystem(path: Path) -> str:
    """Return the type of the file system that holds `path`, such as ``"ext4"``; "unknown" where no table says so."""
    try:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    resolved, found, kind = path.resolve(), Path(), "unknown"
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].encode("latin-1").decode("unicode_escape"))
        if resolved.is_relative_to(point) and len(point.parts) >= len(found.parts):
            found, kind = point, after.split()[0]
    return kind


def new_folder() -> Path:
    """Make a temporary folder; raise `NotImplementedError`, which asv shows as skipped, if it would be in memory."""
    kind = filesystem(Path(tempfile.gettempdir()))
    if kind in _NO_DISK:
        raise NotImplementedError(f"the temporary folder is a {kind}: set TMPDIR to a folder on a disk")
    if not hasattr(os, "posix_fallocate") or not hasattr(mmap, "MADV_HUGEPAGE"):
        raise NotImplementedError("the floors need posix_fallocate and MADV_HUGEPAGE, that is, Linux")
    return Path(tempfile.mkdtemp(prefix="blockstore-benchmark-"))


def touch_memory(nbytes: int) -> None:
    """Use and free `nbytes` bytes of memory, so that they are there when the timing starts.

    A virtual machine may give free memory back to its host, and the first to use it again waits for the host.
    """
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        advise(memory, mmap.MADV_HUGEPAGE)
        np.ndarray(nbytes, np.uint8, memory)[::4096] = 1


def advise(mapped: mmap.mmap, advice: int) -> None:
    """Call ``madvise`` on the whole map; only a hint, so never an error."""
    with contextlib.suppress(OSError):
        mapped.madvise(advice)
