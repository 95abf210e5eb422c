"""What is asked of the machine about a file: which boot and mount it is in, on what file system, who has it locked.

Nothing here changes a file. What cannot be known is None, 0 or "", and whoever asks takes the careful way then.

- The boot is ``/proc/sys/kernel/random/boot_id`` (``random(4)``). ``BLOCKSTORE_BOOT_ID`` replaces it, so that a test
  can play a reset.
- The mount is the unique mount id of ``statx(2)`` (Linux 6.8), which no later mount gets again, or the reusable one.
- The lock is an open file description lock (``fcntl_locking(2)``): gone with the process at once, even after
  ``kill -9``, and not lost when the file is opened and closed elsewhere. A forked child shares it, and so closes it.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import struct
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

from blockstore import _os

if sys.platform != "win32":
    import fcntl

FORGETFUL = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
"""File systems in memory: a sync promises nothing there."""

COPY_ON_WRITE = frozenset({"btrfs", "zfs", "bcachefs", "apfs", "nilfs2"})
"""File systems on which reserved space does not protect a later write from a full disk."""

_LOCK_AT = 1 << 62
_AT_EMPTY_PATH = 0x1000
_STATX_MNT_ID, _STATX_MNT_ID_UNIQUE = 0x1000, 0x4000
_BUSY = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def boot() -> str:
    """Return what names the time since the machine was last started; empty if that is not known."""
    if replaced := os.environ.get("BLOCKSTORE_BOOT_ID"):
        return replaced
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except (FileNotFoundError, PermissionError):
        return ""


def epoch(file: _os.File) -> int:
    """Return 64 bits that name the boot and the mount in which a file is open; 0 if they are not known."""
    if not (since := boot()):
        return 0
    name = f"{since} {os.fstat(file.fileno()).st_dev} {_mount(file)}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") or 1


def filesystem(file: _os.File) -> str:
    """Return the kind of the file system, such as ``"ext4"``; empty if that is not known."""
    try:
        mount = f"{_reusable_mount(file)} "
        for line in Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines():
            if line.startswith(mount):
                return line.partition(" - ")[2].split()[0]
    except (FileNotFoundError, PermissionError, IndexError):
        pass
    return ""


class FileLock:
    """The right to write a file: the only one on this machine, until it is released, or the process ends.

    It has a descriptor of its own, since a map keeps a copy of the one it was made from for as long as an array over
    it lives. Raises `BlockingIOError` if somebody else has the right. Where the file system knows no locks, nobody is
    kept out. The file may have no name yet; `path` is where it has one otherwise.
    """

    def __init__(self, file: _os.File, path: str) -> None:
        self._needed = self._finalized = False
        self._held: _os.File | None = None
        if sys.platform == "win32":
            return
        try:
            held = _os.File(os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR))
        except FileNotFoundError:
            try:
                held = _os.open_file(path, writable=True)
            except FileNotFoundError:
                return
            if not os.path.samestat(os.fstat(held.fileno()), os.fstat(file.fileno())):
                return
        self._held = held
        _locks[id(self)] = self
        try:
            _set_lock(held.fileno(), fcntl.F_WRLCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            if error.errno in _BUSY:
                raise BlockingIOError(error.errno, "somebody else writes it", path) from None
            if error.errno not in _NO_LOCKS:
                raise

    def keep(self) -> None:
        """Stay until `release`, even if finalized: the garbage collector may come here before it comes to a store."""
        self._needed = True

    def release(self, holders: Sequence[object] = ()) -> None:
        """Let others write the file, once all of `holders` are gone."""
        self._needed = False  # first, so that Ctrl-C leaks nothing
        for holder in holders:
            reference = weakref.ref(holder, self._gone)
            _waits[id(reference)] = reference
        if not holders or self._finalized:
            self._unlock()

    def _gone(self, reference: "weakref.ref[object]") -> None:
        """Forget a holder; with the last one goes the last reference to this lock."""
        _waits.pop(id(reference), None)

    def close(self) -> None:
        """Close the descriptor and leave the lock to whoever shares it: a forked child leaves it to its parent."""
        held, self._held = self._held, None
        if held is not None:
            held.close_now()

    def _unlock(self) -> None:
        if self._held is not None:  # closing alone would leave the lock to a child that is about to run a program
            with contextlib.suppress(OSError):
                _set_lock(self._held.fileno(), fcntl.F_UNLCK, fcntl.LOCK_UN)
            self.close()

    def __del__(self) -> None:
        self._finalized = True
        if not self._needed:
            self._unlock()


def is_locked_here(file: _os.File) -> bool:
    """Whether this process holds the lock of a file."""
    locks = [reference() for reference in _locks.valuerefs()]
    held = [lock._held for lock in locks if lock is not None]
    this = os.fstat(file.fileno())
    return any(os.path.samestat(os.fstat(each.fileno()), this) for each in held if each is not None)


def _set_lock(descriptor: int, kind: int, portable: int) -> None:
    if _os.PORTABLE:
        fcntl.flock(descriptor, portable)
    else:
        whole = struct.pack("hhqqi", kind, os.SEEK_SET, _LOCK_AT, 1, 0)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, whole)


_waits: "dict[int, weakref.ref[object]]" = {}
"""What locks wait for; each refers to its lock by its callback."""

_folders: "weakref.WeakValueDictionary[int, _os.File]" = weakref.WeakValueDictionary()
_locks: "weakref.WeakValueDictionary[int, FileLock]" = weakref.WeakValueDictionary()


def _leave_locks() -> None:
    """In a forked child: leave all locks to the parent."""
    for reference in _locks.valuerefs():
        if (lock := reference()) is not None:
            lock.close()
    for folder in _folders.valuerefs():
        if (file := folder()) is not None:
            file.close_now()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks)


@contextlib.contextmanager
def folder_to_oneself(path: str) -> Iterator[None]:
    """Keep others out who are about to give or change names in the folder of `path`.

    Where the file system knows no locks, or somebody keeps this one for more than `_PATIENCE_SECONDS`, nobody is kept
    out: creators are told apart by `link` all the same. A thread may come here again while it is inside.
    """
    if sys.platform == "win32":
        yield
        return
    folder = _os.File(os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY))
    _folders[id(folder)] = folder
    status = os.fstat(folder.fileno())
    inside: set[tuple[int, int]] = _own_folders.__dict__.setdefault("inside", set())
    if (which := (status.st_dev, status.st_ino)) in inside:
        folder.close_now()
        yield
        return
    try:
        until = time.monotonic() + _PATIENCE_SECONDS
        while not _try_folder(folder) and time.monotonic() < until:
            time.sleep(0.002)
        inside.add(which)
        yield
    finally:
        inside.discard(which)
        folder.close_now()


_PATIENCE_SECONDS = 10.0
_own_folders = threading.local()
"""Which folders each thread has to itself."""


def _try_folder(folder: _os.File) -> bool:
    try:
        fcntl.flock(folder.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _mount(file: _os.File) -> int:
    statx = None if _os.PORTABLE else getattr(ctypes.CDLL(None), "statx", None)
    if statx is not None:
        answer = ctypes.create_string_buffer(256)
        if statx(file.fileno(), b"", _AT_EMPTY_PATH, _STATX_MNT_ID_UNIQUE | _STATX_MNT_ID, answer) == 0:
            (mask,), (mount,) = struct.unpack_from("<I", answer), struct.unpack_from("<Q", answer, 0x90)
            if mask & (_STATX_MNT_ID_UNIQUE | _STATX_MNT_ID):
                return int(mount)
    with contextlib.suppress(FileNotFoundError, PermissionError):
        return _reusable_mount(file)
    return 0


def _reusable_mount(file: _os.File) -> int:
    """Return the mount id that ``/proc/self/mountinfo`` uses."""
    for line in Path(f"/proc/self/fdinfo/{file.fileno()}").read_text("ascii").splitlines():
        if line.startswith("mnt_id:"):
            return int(line[7:])
    return 0
