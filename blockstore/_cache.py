"""Cached pages of a file whose write-back has failed, and how to make the disk take them again.

ext4 (seen on Linux 6.18) never marks reserved space as written if the first write-back of a cached page fails. Writing
the page again then succeeds, and so does the sync; but once the page leaves the cache, the file reads zeros there. It
comes right only if the page leaves the cache before it is written again. Where pages may not leave, because
something maps them, they are written again over space that is reserved anew. On other file systems this does no harm.
"""

import ctypes
import mmap
import os

import numpy as np

from blockstore import _os

_ZERO_RANGE = 0x10  # FALLOC_FL_ZERO_RANGE of fallocate(2), Linux 3.15: drops the cache and keeps the reservation
_PIECE = 1 << 28


def renew(file: _os.File, start: int, stop: int) -> None:
    """Make all of ``[start, stop)``, whole pages that nobody writes, go to the disk as if for the first time.

    The bytes stay what they are. O(n) in what is cached. Raises `OSError` if the disk fails; does nothing where there
    are no such calls.
    """
    granule = mmap.ALLOCATIONGRANULARITY  # 4096 where pages are; larger ones may have durable neighbours
    start = -(-start // granule) * granule
    if _os.PORTABLE or stop <= start:
        return
    os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)
    for piece in range(start, stop, _PIECE):
        pages = _cached(file, piece, min(piece + _PIECE, stop))
        edges = np.flatnonzero(np.diff(pages, prepend=False, append=False)) * mmap.PAGESIZE + piece
        for low, high in edges.reshape(-1, 2).tolist():
            _write_again(file, low, min(high, stop))


def _cached(file: _os.File, start: int, stop: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which pages are in the cache."""
    mapped = mmap.mmap(file.fileno(), stop - start, access=mmap.ACCESS_READ, offset=start)
    answer = np.zeros(-(-(stop - start) // mmap.PAGESIZE), np.uint8)
    address = np.frombuffer(mapped, np.uint8).ctypes.data
    if _libc.mincore(address, stop - start, answer.ctypes.data) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return (answer & 1).astype(np.bool_)


def _write_again(file: _os.File, start: int, stop: int) -> None:
    while start < stop:
        data = os.pread(file.fileno(), min(stop - start, 1 << 24), start)
        if not data or _libc.fallocate(file.fileno(), _ZERO_RANGE, start, len(data)) != 0:
            return
        _os.put_at(file, data, start)
        start += len(data)


if not _os.PORTABLE:
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    _libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
