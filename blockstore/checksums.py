"""Checksum kinds: each turns the bytes of an array into one integer, and has a name.

A kind knows neither ranges nor files, nor where its sums are kept. A sum is below 2**32, for xxh3 below 2**64, and does
not depend on the machine's byte order. None of this is cryptography: it finds accidents, not forgers.

======  ===========================  ====================  =========
name    what                         package               GB/s
======  ===========================  ====================  =========
crc32   CRC-32 of gzip, PNG and zip  ``zlib``, of Python   7.5
crc32c  CRC-32C of RFC 3720          ``crc32c``, of PyPI   17 to 35
xxh3    XXH3, 64 bits, seed 0        ``xxhash``, of PyPI   35 to 115
======  ===========================  ====================  =========

Speeds are of one core of an x86-64 server, from memory and from cache. ``crc32c`` has no hardware path for ARM outside
of Linux; without one it made 2.6 on the same core. The GIL is free for arrays above 5 KiB
(crc32), 32 KiB (crc32c) and 64 KiB (xxh3).

Examples
--------
>>> import numpy as np
>>> a = np.frombuffer(b"123456789", np.uint8)
>>> hex(checksum_function("crc32")(a))
'0xcbf43926'
"""

import zlib
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

ChecksumKind = Literal["crc32", "crc32c", "xxh3"]
ChecksumFunction = Callable[[NDArray[np.uint8]], int]

KINDS: tuple[ChecksumKind, ...] = ("crc32", "crc32c", "xxh3")

_PIECE = 1 << 30
"""Bytes that a CRC takes in one call: ``crc32c`` counts in a C long, of 32 bits on Windows, and Apple's zlib is wrong
from 2 GiB on in Pythons without the workaround (python/cpython#105967)."""


def checksum_function(name: str) -> ChecksumFunction:
    """Return the function that computes sums of a kind; its package is imported now, and not before.

    Parameters
    ----------
    name : str
        One of `KINDS`.

    Returns
    -------
    Callable
        Takes an array of shape ``(n,)`` and dtype uint8, C-contiguous, read-only or writable, of any length, and
        returns its sum. It raises `ValueError` if the array is not contiguous.

    Raises
    ------
    ValueError
        If there is no such kind.
    ModuleNotFoundError
        If the package that computes it is not installed.

    Notes
    -----
    The sum takes O(n) time and no memory. The function is thread-safe, and keeps the array's memory exported while it
    runs. Who changes the bytes meanwhile gets a sum of neither the old nor the new ones.

    Examples
    --------
    >>> checksum_function("md5")
    Traceback (most recent call last):
    ValueError: checksum is one of 'crc32', 'crc32c', 'xxh3', not 'md5'
    """
    if name not in KINDS:
        raise ValueError(f"checksum is one of {', '.join(map(repr, KINDS))}, not {name!r}")
    try:
        if name == "crc32":
            return _in_pieces(zlib.crc32)
        if name == "crc32c":
            from crc32c import crc32c

            return _in_pieces(crc32c)
        from xxhash import xxh3_64_intdigest

        whole: Callable[..., int] = xxh3_64_intdigest  # to NumPy's stubs, arrays are buffers from Python 3.12 on
        return whole
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"checksum={name!r} needs the package {error.name!r}: pip install 'ndblockstore[checksum]'", name=error.name
        ) from error


def _in_pieces(crc: Callable[..., int]) -> ChecksumFunction:
    """Return a function that calls `crc` once for each `_PIECE`, with what the pieces before it came to."""

    def checksum(a: NDArray[np.uint8]) -> int:
        value = crc(a[:_PIECE], 0)
        for start in range(_PIECE, a.nbytes, _PIECE):
            value = crc(a[start : start + _PIECE], value)
        return value

    return checksum
