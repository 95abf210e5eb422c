"""Mounts: file systems in files, through loop devices, by system calls and without a process for each.

`mount(8)` and `losetup(8)` cost some milliseconds and leave a device behind when their caller dies in between. Here a
loop device belongs to its mount and goes with it. This module knows paths and file systems, and nothing of crashes.
All of it needs root, and Linux.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

SIZES = {"ext4": 64 << 20, "xfs": 300 << 20}
"""The file systems that can be made, and the bytes of their images: as small as is useful (xfs refuses less)."""

_MAKE = {
    "ext4": "mkfs.ext4 -q -F -b 4096 -m 0 -N 128 -J size=4 -E nodiscard,lazy_itable_init=0,lazy_journal_init=0",
    "xfs": "mkfs.xfs -q -f -K",
}

_OPTIONS = {"ext4": "", "xfs": "nouuid"}  # several states of one disk are mounted at the same time

_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_AUTOCLEAR = 4
_FIEMAP = 0xC020660B
_NO_PLACE = 0x2 | 0x4  # flags of an extent: unknown, delayed
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x20000, 0x4000, 0x40000, 2
_BUSY_SECONDS = 10.0

_libc = ctypes.CDLL(None, use_errno=True)


def private_namespace() -> None:
    """Move the calling thread, and what it starts, to mounts of its own: nobody else sees them; they end with it."""
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "/")


def make_file_system(image: Path, fs: str) -> None:
    """Make `image`, a sparse file with an empty file system in it."""
    with image.open("xb") as file:
        file.truncate(SIZES[fs])
    subprocess.run([*_MAKE[fs].split(), image], check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def tmpfs(target: Path, nbytes: int) -> Iterator[Path]:
    """Mount an empty tmpfs of at most `nbytes` bytes on the folder `target`, as long as the block lasts.

    What still uses it afterwards goes on, without a name.
    """
    _mount("tmpfs", target, "tmpfs", f"size={nbytes}")
    try:
        yield target
    finally:
        _libc.umount2(os.fsencode(target), _MNT_DETACH)


@contextlib.contextmanager
def mounted(image: Path, target: Path, fs: str) -> Iterator[Path]:
    """Mount the file system in the file `image` on the folder `target`, as long as the block lasts.

    Raises
    ------
    OSError
        If there is no loop device, or the kernel does not take what is in the image for a file system.
    """
    device, handle = _attach(image)
    try:
        _mount(device, target, fs, _OPTIONS[fs])
    finally:
        os.close(handle)  # from now on the device lives as long as the mount, or not at all
    try:
        yield target
    finally:
        unmount(target)


def unmount(target: Path) -> None:
    """Unmount `target`, and wait a while for who still uses it; after that, take the name away and raise."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while _libc.umount2(os.fsencode(target), 0) != 0:
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOENT):  # it is not mounted
            return
        if code != errno.EBUSY or time.monotonic() > deadline:
            _libc.umount2(os.fsencode(target), _MNT_DETACH)
            raise OSError(code, os.strerror(code), str(target))
        time.sleep(0.01)


def on_disk(path: Path, first: int, last: int) -> list[tuple[int, int]]:
    """Return where bytes ``[first, last)`` of a file lie: ``[start, stop)`` in bytes from the start of its device.

    What has no place yet, a hole or what waits in memory, is not among them.
    """
    count = 512
    request = bytearray(struct.pack("<QQIIII", first, last - first, 0, 0, count, 0) + bytes(56 * count))
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(handle, _FIEMAP, request)
    finally:
        os.close(handle)
    pieces = []
    for number in range(struct.unpack_from("<I", request, 20)[0]):
        logical, physical, nbytes, _, _, flags = struct.unpack_from("<QQQQQI", request, 32 + 56 * number)
        if not flags & _NO_PLACE:
            start, stop = max(first, logical), min(last, logical + nbytes)
            pieces.append((physical + start - logical, physical + stop - logical))
    return pieces


def _attach(image: Path) -> tuple[str, int]:
    """Return a loop device on `image` and an open descriptor of it; the device goes when nothing has it open."""
    backing = os.open(image, os.O_RDWR)
    try:
        while True:
            control = os.open("/dev/loop-control", os.O_RDWR)
            try:
                device = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            finally:
                os.close(control)
            handle = os.open(device, os.O_RDWR)
            info = struct.pack("<52xI176x", _AUTOCLEAR)  # struct loop_info64
            try:
                fcntl.ioctl(handle, _LOOP_CONFIGURE, struct.pack("<II", backing, 512) + info + bytes(64))
            except OSError as error:
                os.close(handle)
                if error.errno != errno.EBUSY:  # somebody else was faster: ask for another
                    raise
            else:
                return device, handle
    finally:
        os.close(backing)


def _mount(source: str, target: Path, fs: str, options: str) -> None:
    done = _libc.mount(source.encode(), os.fsencode(target), fs.encode(), 0, options.encode())
    _check(done, f"{fs} on {target}")


def _check(done: int, what: str) -> None:
    if done != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)
