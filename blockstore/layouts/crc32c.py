"""CRC-32C, the sum at the end of Zarr's shard index: of bytes, by NumPy alone.

Words of 32 bits are taken in rows; a row is advanced past the next one by table, all its words at once, and the last
row is folded in half until it is short. This module knows no file and no format. Sums are below 2**32, those of RFC
3720. It makes about 1.7 GB/s on one core; `blockstore.checksums` is for data, and faster, but needs a package.

Examples
--------
>>> hex(crc32c(b"123456789"))
'0xe3069283'
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78
"""Castagnoli's, the lowest bit being that of the highest power."""

_LOOP_NBYTES = 256
"""Up to here a loop over the bytes is as fast as calls of NumPy."""

_ROW_LOG2 = 14
_ROW_NBYTES = 1 << _ROW_LOG2
_LAST_WORDS = 16

_SHIFTS = np.array([[0], [8], [16], [24]], np.uint32)
_BASES = np.array([[0], [256], [512], [768]], np.uint32)


def crc32c(data: bytes | memoryview | NDArray[Any]) -> int:
    """Return the CRC-32C of bytes.

    Parameters
    ----------
    data : bytes, memoryview or numpy.ndarray
        C-contiguous, of any dtype without objects, read-only or writable. Its bytes count as they lie in memory.

    Returns
    -------
    int
        The sum, below 2**32; 0 of no bytes.

    Raises
    ------
    ValueError
        If `data` is not C-contiguous.

    Notes
    -----
    O(n), and a few hundred KiB of memory whatever `n` is. Safe in many threads. The first call on more than 16 KiB
    builds a table of 512 KiB, which is kept.

    Examples
    --------
    >>> crc32c(b""), hex(crc32c(np.zeros(8, "<u4")))
    (0, '0x8a9136aa')
    """
    octets = _octets(data)
    if octets.size <= _LOOP_NBYTES:
        return _loop(0xFFFFFFFF, octets.tobytes()) ^ 0xFFFFFFFF
    rows = (octets.size - 4) // _ROW_NBYTES
    head = octets.size - rows * _ROW_NBYTES
    if rows:
        words = _inverted(octets[:head], 2 * _ROW_NBYTES).reshape(2, -1)
        row = _advance_row(words[0])
        row ^= words[1]
        for stop in range(head + _ROW_NBYTES, octets.size + 1, _ROW_NBYTES):
            row = _advance_row(row)
            row ^= octets[stop - _ROW_NBYTES : stop].view("<u4")
    else:
        row = _inverted(octets, 1 << (head - 1).bit_length())
    while row.size > _LAST_WORDS:
        half = row.size // 2
        row = _advance(row[:half], half.bit_length() + 1) ^ row[half:]
    return _loop(0, row.astype("<u4").tobytes()) ^ 0xFFFFFFFF


def _octets(data: bytes | memoryview | NDArray[Any]) -> NDArray[np.uint8]:
    if isinstance(data, np.ndarray):
        if not data.flags.c_contiguous:
            raise ValueError("a checksum is of contiguous bytes: pass numpy.ascontiguousarray(a)")
        return data.reshape(-1).view(np.uint8)
    view = memoryview(data)
    if not view.c_contiguous:
        raise ValueError("a checksum is of contiguous bytes: this memoryview has gaps")
    return np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8)


def _inverted(head: NDArray[np.uint8], nbytes: int) -> NDArray[np.uint32]:
    """Return words that begin with zeros, which change no sum that begins with 0, and the head in the others' end.

    Its first 4 bytes are inverted: that is the same as to begin with all bits set.
    """
    octets = np.zeros(nbytes, np.uint8)
    octets[nbytes - head.size :] = head
    octets[nbytes - head.size :][:4] ^= 255
    return octets.view("<u4").astype(np.uint32, copy=False)


def _loop(state: int, octets: bytes) -> int:
    table = _byte_table()
    for octet in octets:
        state = table[(state ^ octet) & 255] ^ (state >> 8)
    return state


@cache
def _byte_table() -> tuple[int, ...]:
    table = []
    for octet in range(256):
        state = octet
        for _ in range(8):
            state = (state >> 1) ^ (_POLYNOMIAL if state & 1 else 0)
        table.append(state)
    return tuple(table)


@cache
def _table(log2: int) -> NDArray[np.uint32]:
    """Return what becomes of each byte of a state past 2**log2 bytes of zeros: 4 times 256 states, lowest byte first.

    Whatever follows, a state is the sum of what becomes of its bits; so the tables of its bytes are enough.
    """
    if log2:
        return _advance(_table(log2 - 1), log2 - 1)
    octets = np.arange(256, dtype=np.uint32)
    return np.concatenate([np.array(_byte_table(), np.uint32), octets, octets << 8, octets << 16])


def _advance(states: NDArray[np.uint32], log2: int) -> NDArray[np.uint32]:
    """Return what states become past 2**log2 bytes of zeros."""
    index = states >> _SHIFTS
    index &= 255
    index += _BASES
    advanced: NDArray[np.uint32] = np.bitwise_xor.reduce(_table(log2).take(index), axis=0)
    return advanced


@cache
def _row_tables() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return what becomes of the lower and the upper 16 bits of a state past a row."""
    a, b, c, d = _table(_ROW_LOG2).reshape(4, 256)
    return np.bitwise_xor.outer(b, a).reshape(-1), np.bitwise_xor.outer(d, c).reshape(-1)


def _advance_row(row: NDArray[np.uint32]) -> NDArray[np.uint32]:
    lower, upper = _row_tables()
    advanced = lower.take(row & 0xFFFF)
    advanced ^= upper.take(row >> 16)
    return advanced
