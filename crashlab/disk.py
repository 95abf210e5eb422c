"""A disk that keeps a log: every write and every flush, in the order in which they arrived.

``python -m crashlab.disk IMAGE LOG FOLDER`` serves, through FUSE and until it is unmounted, three files in FOLDER:

- ``disk.img``, the bytes of IMAGE. With a loop device on it, and a file system on that, a flush of the block layer
  arrives here as an fsync, and nothing is cached on the way.
- ``position``, a decimal number: the entries of the log so far.
- ``control``: writing ``fail START STOP`` makes all writes that touch these bytes of the disk fail with EIO,
  ``fail flushes`` all flushes, and ``heal`` ends both. It reads as the number of requests that failed.

LOG receives an entry per request that did not fail: `HEADER`, and then the bytes. This module knows bytes at offsets,
and nothing of file systems.
"""

import contextlib
import ctypes
import errno
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crashlab import mounts

HEADER = struct.Struct("<QQ")
"""Of an entry of the log: offset and count of the bytes that follow. A count of 0 is a flush."""

_FILES = ("disk.img", "position", "control")
_START_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1


class LoggedDisk:
    """The file system that is served. Its calls come one at a time, so the order of the log is that of the disk."""

    use_ns = True

    def __init__(self, image: Path, log: Path) -> None:
        self._image = os.open(image, os.O_RDWR)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        self._nbytes = os.fstat(self._image).st_size
        self._position = 0
        self._bad: list[tuple[int, int]] = []
        self._failing_flushes = False
        self._failed = 0

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        """Describe a file."""
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
        if path[1:] not in _FILES:
            raise OSError(errno.ENOENT, "no such file", path)
        return {
            "st_mode": stat.S_IFREG | 0o600,
            "st_nlink": 1,
            "st_size": self._nbytes if path == "/disk.img" else 0,
        }

    def readdir(self, path: str, fh: int) -> list[str]:
        """List the files."""
        return [".", "..", *_FILES]

    def open(self, path: str, flags: int) -> int:
        """Open a file: nothing to do."""
        return 0

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        """Let ``control`` be opened as shells do it; a disk keeps its size."""
        if path == "/disk.img":
            raise OSError(errno.EPERM, "a disk keeps its size")
        return 0

    def read(self, path: str, nbytes: int, offset: int, fh: int) -> bytes:
        """Read the disk, or a number."""
        if path == "/disk.img":
            return os.pread(self._image, nbytes, offset)
        number = self._position if path == "/position" else self._failed
        return b"%d\n" % number if offset == 0 else b""

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        """Write to the disk and log it, or fail as the disk was told to."""
        if path == "/disk.img":
            if any(start < offset + len(data) and offset < stop for start, stop in self._bad):
                self._failed += 1
                raise OSError(errno.EIO, "told to fail")
            os.pwrite(self._image, data, offset)
            self._append(HEADER.pack(offset, len(data)) + data)
        elif path == "/control":
            self._command(data.split())
        else:
            raise OSError(errno.EPERM, "read only", path)
        return len(data)

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        """Log a flush, or fail as the disk was told to."""
        if path == "/disk.img":
            if self._failing_flushes:
                self._failed += 1
                raise OSError(errno.EIO, "told to fail")
            self._append(HEADER.pack(0, 0))
        return 0

    def _append(self, entry: bytes) -> None:
        if os.write(self._log, entry) != len(entry):
            raise OSError(errno.ENOSPC, "the log is full")
        self._position += 1

    def _command(self, words: list[bytes]) -> None:
        match words:
            case [b"fail", b"flushes"]:
                self._failing_flushes = True
            case [b"fail", start, stop]:
                self._bad.append((int(start), int(stop)))
            case [b"heal"]:
                self._bad.clear()
                self._failing_flushes = False
            case _:
                raise OSError(errno.EINVAL, "no such command")


@dataclass(frozen=True, slots=True)
class Disk:
    """A logged disk that is being served, as its users see it."""

    folder: Path
    """Where it is mounted."""

    @property
    def image(self) -> Path:
        """The disk itself, for a loop device."""
        return self.folder / "disk.img"

    @property
    def position(self) -> Path:
        """The file that says how many entries the log has: see `Position`."""
        return self.folder / "position"

    def entries(self) -> int:
        """Return how many entries the log has."""
        return int(self.position.read_bytes())

    def failed(self) -> int:
        """Return how many requests failed so far because the disk was told so."""
        return int((self.folder / "control").read_bytes())

    def tell(self, command: str) -> None:
        """Give a command: ``fail START STOP``, ``fail flushes`` or ``heal``."""
        (self.folder / "control").write_text(command)


class Position:
    """Reads how many entries the log of a disk has. Safe to share among threads."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY)

    def __call__(self) -> int:
        return int(os.pread(self._handle, 32, 0))


@contextlib.contextmanager
def served(image: Path, log: Path, folder: Path) -> Iterator[Disk]:
    """Serve a logged disk on `folder` as long as the block lasts; `image` changes and `log` is made.

    The server is in a session of its own, so that Ctrl-C ends its users first, and ends with the thread that calls.
    """
    server = subprocess.Popen(
        [sys.executable, "-m", "crashlab.disk", image, log, folder], start_new_session=True, cwd=_PROJECT
    )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not os.path.ismount(folder):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the disk did not start (status {server.poll()})")
            time.sleep(0.005)
        yield Disk(folder)
    finally:
        try:
            mounts.unmount(folder)
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(_START_SECONDS)
            server.kill()
            server.wait()


_PROJECT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> None:
    """Serve a disk until it is unmounted."""
    import mfusepy

    image, log, folder = map(Path, arguments)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    mfusepy.FUSE(LoggedDisk(image, log), str(folder), foreground=True, nothreads=True, direct_io=True)


if __name__ == "__main__":
    main(sys.argv[1:])
