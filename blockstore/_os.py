"""The one seam to the operating system: reserve space, map, advise, write, sync, seal.

Offsets and sizes are bytes from the start of the file. This module knows files and mappings and
nothing of ranges, receipts or stores. What only Linux has is used where it is there and replaced by
plain maps and ``fsync`` elsewhere; setting ``BLOCKSTORE_PORTABLE=1`` before the import switches it off
everywhere, which is how the test suite runs the replacement.

Why each call is the one it is:

- Python's ``mmap.flush``, ``mmap.madvise`` and slice assignment hold the GIL; ``os.pwrite``,
  ``os.fdatasync``, ``os.posix_fallocate`` and every `ctypes.CDLL` call release it.
- ``MS_ASYNC`` does nothing on Linux (``msync(2)``); ``sync_file_range`` starts write-back and promises
  nothing (``sync_file_range(2)``, Warning).
- ``np.ndarray(buffer=mmap)`` holds no buffer export, so ``mmap.close()`` would leave arrays that crash;
  each map therefore carries an export of its own that lives as long as the last array over it.
"""

import contextlib
import ctypes
import errno
import io
import mmap
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from blockstore.errors import LayoutError, NotRegularFileError

PORTABLE = sys.platform != "linux" or os.environ.get("BLOCKSTORE_PORTABLE", "0") not in ("", "0")
"""Whether to do without everything that only Linux has."""

Map = np.memmap[tuple[int], np.dtype[np.uint8]]

ADVICE = {"dense": 14, "sparse": 1}
"""``madvise(2)`` values: ``MADV_HUGEPAGE`` for dense filling, ``MADV_RANDOM`` for sparse access."""

_SYNC_FILE_RANGE_WRITE = 2
_MAP_NORESERVE = 0x4000
_MAP_FIXED = 0x10
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_FS_IOC_GETVERSION = 0x80087601
_MAX_NBYTES = 1 << 62
_FDS = "/proc/self/fd"
_BINARY = getattr(os, "O_BINARY", 0)

if not PORTABLE:
    import fcntl

    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    _libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    _libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    )
    _libc.mmap.restype = ctypes.c_void_p


class File:
    """An open file, closed when the last reference to it is gone.

    There is no `close`: whoever is inside a system call holds a reference, so the descriptor can never be closed
    under it and given to another file. The garbage collector may finalize a file before the store it is collected
    with, which has yet to flush; so a store keeps its file open until it releases it.
    """

    __slots__ = ("__weakref__", "_fd", "_finalized", "_kept")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._kept = self._finalized = False

    def fileno(self) -> int:
        return self._fd

    def keep(self) -> None:
        """Stay open until `release`, even if finalized."""
        self._kept = True

    def release(self) -> None:
        """Close with the last reference; now, if that is gone."""
        self._kept = False
        if self._finalized:
            self._finalized = False
            os.close(self._fd)

    def close_now(self) -> None:
        """Close, whoever has a reference: for what nobody else uses, and in a forked child, where nobody else runs."""
        if self._fd >= 0 and (self._kept or not self._finalized):
            self._kept, self._finalized = True, False
            descriptor, self._fd = self._fd, -1
            os.close(descriptor)

    def __del__(self, _close: Callable[[int], None] = os.close) -> None:
        self._finalized = True
        if not self._kept:
            _close(self._fd)


@contextlib.contextmanager
def new_file(path: str, nbytes: int, *, overwrite: bool, reserve: bool) -> Iterator[File]:
    """Create a file of `nbytes` zeros that appears under `path` whole, or not at all.

    The file is made without a name, its space is reserved and synced, and when the body has left without an error it
    is linked to `path`, which fails if another creator was faster. With `overwrite` it replaces an existing regular
    file in one step. Raises `OSError` or `LayoutError` with nothing left behind; only if the folder cannot be synced
    after a replacement, the new file stays, since the old one is gone.
    """
    if not 0 < nbytes <= _MAX_NBYTES:
        raise LayoutError(f"a store takes 1 to 2**62 bytes, {nbytes} were asked for")
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise _not_regular(path, mode)
        if not overwrite:
            raise exists(path)
    directory = os.path.dirname(path) or "."
    with nameless(directory) as (file, name):
        _size(file, nbytes, path, reserve=reserve)
        os.fsync(file.fileno())
        yield file
        publish(file, name, path, directory, overwrite=overwrite)


def open_file(path: str, *, writable: bool, follow: bool = True) -> File:
    """Open an existing regular file that is not empty; through a symlink only if told to `follow`.

    Opens without blocking, so that a FIFO is refused and not waited for.
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | _BINARY | getattr(os, "O_NONBLOCK", 0)
    flags |= 0 if follow else getattr(os, "O_NOFOLLOW", 0)
    try:
        file = File(os.open(path, flags))
    except OSError:
        if Path(path).exists() and not Path(path).is_file():
            raise _not_regular(path, os.stat(path).st_mode) from None
        raise
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise _not_regular(path, status.st_mode)
    if status.st_size == 0:
        raise LayoutError(f"{path!r} is empty: there is nothing to map")
    return file


def identity(file: File) -> tuple[int, ...]:
    """Return what tells this file from every other on the machine: device, inode, generation and size.

    The generation tells a file from a later one that got the same inode; where the file system keeps none it
    is 0 (``FS_IOC_GETVERSION``, ``ioctl_iflags(2)``).
    """
    status = os.fstat(file.fileno())
    generation = 0
    if not PORTABLE:
        with contextlib.suppress(OSError):
            answer = fcntl.ioctl(file.fileno(), _FS_IOC_GETVERSION, bytes(8))
            generation = int.from_bytes(answer[:4], sys.byteorder)
    return status.st_dev, status.st_ino, generation, status.st_size


def map_file(file: File, *, writable: bool) -> Map:
    """Map the whole file, shared. The map lives until the last array over it is gone."""
    opened: Any = io.FileIO(file.fileno(), "r+" if writable else "r", closefd=False)
    try:
        mapped: Map = np.memmap(opened, dtype=np.uint8, mode="r+" if writable else "r")
    except OSError as error:
        size = os.fstat(file.fileno()).st_size
        raise OSError(error.errno, f"cannot map {size} bytes: {error.strerror}") from None
    mapped._blockstore_pin = memoryview(mapped._mmap)  # type: ignore[attr-defined]
    return mapped


def advise(mapped: Map, access: str, start: int, stop: int) -> None:
    """Tell the kernel how bytes ``[start, stop)`` will be used; only a hint, so never an error."""
    if not PORTABLE:
        start -= start % mmap.PAGESIZE
        _libc.madvise(_address(mapped) + start, stop - start, ADVICE[access])


def write_at(file: File, data: Any, offset: int) -> bool:
    """Copy an array to `offset` by ``pwrite``; return False if there is none, or the array is no C-ordered buffer."""
    if PORTABLE:
        return False
    nbytes = data.nbytes
    try:
        done = os.pwrite(file.fileno(), data, offset)
    except (ValueError, BufferError):  # strided, or a dtype such as datetime64 that NumPy exports no buffer of
        return False
    while done < nbytes:
        done += os.pwrite(file.fileno(), data.reshape(-1).view(np.uint8)[done:], offset + done)
    return True


def put_at(file: File, data: bytes, offset: int) -> None:
    """Write bytes to `offset`, past whatever is mapped there."""
    if hasattr(os, "pwrite"):
        while data:
            done = os.pwrite(file.fileno(), data, offset)
            data, offset = data[done:], offset + done
    else:
        os.lseek(file.fileno(), offset, os.SEEK_SET)
        while data:
            data = data[os.write(file.fileno(), data) :]


def poke(address: int, data: bytes) -> None:
    """Store bytes in a map of this process. Where that would be SIGBUS, it is an `OSError`."""
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(data)


def reserve_space(file: File, nbytes: int) -> None:
    """See to it that a file has `nbytes` bytes, and space on the disk for each."""
    if not PORTABLE:
        os.posix_fallocate(file.fileno(), 0, nbytes)
        return
    os.lseek(file.fileno(), 0, os.SEEK_END)
    zeros, left = memoryview(bytes(1 << 20)), nbytes - os.fstat(file.fileno()).st_size
    while left > 0:
        left -= os.write(file.fileno(), zeros[:left])


def shrink(file: File, nbytes: int) -> None:
    """Cut a file down to `nbytes`, if it has more. What is mapped beyond may not be touched any more."""
    if os.fstat(file.fileno()).st_size > nbytes:
        os.ftruncate(file.fileno(), nbytes)


def sync(file: File, mapped: Map | mmap.mmap) -> None:
    """Return when the disk has every byte written so far, through the map or the file."""
    if not PORTABLE:
        os.fdatasync(file.fileno())
        return
    mapped.flush()
    if sys.platform == "darwin":
        import fcntl as darwin

        darwin.fcntl(file.fileno(), darwin.F_FULLFSYNC)
    else:
        os.fsync(file.fileno())


def sync_file(file: File) -> None:
    """Return when the disk has every byte of a file that is not mapped here."""
    (os.fsync if PORTABLE else os.fdatasync)(file.fileno())


def start_writeback(file: File, start: int, stop: int) -> None:
    """Start writing ``[start, stop)`` to the disk now, wait for nothing and promise nothing."""
    if not PORTABLE:
        _libc.sync_file_range(file.fileno(), start, stop - start, _SYNC_FILE_RANGE_WRITE)


def seal(file: File, mapped: Map, start: int, stop: int) -> None:
    """Replace the pages of ``[start, stop)`` by a private copy-on-write mapping of the same bytes.

    Addresses stay valid: late reads see the file, late writes stay in this process and never reach it.
    `start` is page-aligned. Raises `OSError` if the kernel has no mapping left (``vm.max_map_count``).
    """
    address = _address(mapped) + start
    flags = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
    got = _libc.mmap(address, stop - start, mmap.PROT_READ | mmap.PROT_WRITE, flags, file.fileno(), start)
    if got != address:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot seal bytes [{start}, {stop}): {os.strerror(code)}")


def _address(mapped: Map) -> int:
    return int(mapped.__array_interface__["data"][0])


def _size(file: File, nbytes: int, path: str, *, reserve: bool) -> None:
    """Give a new file its size and, to `reserve`, its space; a full disk is told before a byte is written."""
    if reserve and hasattr(os, "fstatvfs"):
        disk = os.fstatvfs(file.fileno())
        if nbytes > (free := disk.f_bfree * disk.f_frsize):
            raise OSError(errno.ENOSPC, f"cannot reserve {nbytes} bytes: the disk has {free} bytes left", path)
    try:
        if not reserve:
            os.ftruncate(file.fileno(), nbytes)
        else:
            reserve_space(file, nbytes)
    except OSError as error:
        what = "reserve" if reserve else "make a file of"
        raise OSError(error.errno, f"cannot {what} {nbytes} bytes: {error.strerror}", path) from None


@contextlib.contextmanager
def nameless(directory: str) -> Iterator[tuple[File, str | None]]:
    """Yield a new file, and its temporary name if it must have one; an error removes both."""
    name, fd = None, -1
    if not PORTABLE and Path(_FDS).is_dir():
        try:
            fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o666)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
    if fd < 0:
        name = _temporary(directory)
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY | getattr(os, "O_NOFOLLOW", 0), 0o666)
    file = File(fd)
    with removed_on_error(name, file) if name is not None else contextlib.nullcontext():
        yield file, name


def publish(
    file: File, name: str | None, path: str, directory: str, *, overwrite: bool, temporary: str | None = None
) -> None:
    """Give the new file its name for good: `link` never replaces, `replace` does so in one step.

    A file without a name that is to replace another one has a `temporary` one for a moment, which must be free; by
    default a random one.
    """
    if overwrite:
        temporary = name or temporary or _temporary(directory)
        with removed_on_error(temporary, file):
            if name is None:
                _link(file, None, temporary)
            os.replace(temporary, path)
        sync_directory(directory)
        return
    try:
        _link(file, name, path)
    except FileExistsError:
        raise exists(path) from None
    with removed_on_error(path, file):
        if name is not None and sys.platform != "win32":
            os.unlink(name)
        sync_directory(directory)


def exchange(a: str, b: str) -> bool:
    """Let two names change places in one step; return False, with nothing changed, where that is not possible."""
    if PORTABLE or not hasattr(_libc, "renameat2"):
        return False
    return int(_libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)) == 0


def sync_directory(directory: str) -> None:
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def removed_on_error(path: str, file: File) -> Iterator[None]:
    """Remove the name that `file` was given if the body fails, unless another file has it by now."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(path), os.fstat(file.fileno())):
                os.unlink(path)
        raise


def _link(file: File, name: str | None, path: str) -> None:
    if name is None:  # linkat(2): the way to name an O_TMPFILE; src_dir_fd makes Python call linkat
        handle = os.open(_FDS, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.link(str(file.fileno()), path, src_dir_fd=handle, follow_symlinks=True)
        finally:
            os.close(handle)
    elif sys.platform == "win32":
        os.rename(name, path)  # refuses to replace on Windows
    else:
        os.link(name, path)


def _temporary(directory: str) -> str:
    return os.path.join(directory, f".blockstore-{secrets.token_hex(8)}.tmp")


def exists(path: str) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "the file exists; open() it, or pass overwrite=True to replace it", path)


def _not_regular(path: str, mode: int) -> NotRegularFileError:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    what = kinds.get(stat.S_IFMT(mode), "a device")
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    return NotRegularFileError(code, f"a store needs a regular file, this is {what}", path)
