"""Differences: what a reader gave, compared with what it had to give, byte for byte.

The order of bytes is the one thing that may differ: a tool may give big-endian data in the machine's own order. Then
the bytes of each number are turned before they are compared; no number is ever converted.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compat.cases import Item
from compat.readers import Read


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """How what was read differs."""

    text: str
    error: str = ""
    """What the tool raised; empty if it gave an array."""
    wrong: NDArray[np.bool_] | None = None
    """Which elements differ, if shape and dtype are right."""
    got: NDArray[Any] | None = None
    """What was read, in the order of bytes of the expected array, if shape and dtype are right."""


def nbytes(read: Read) -> int:
    """Return how many bytes of an answer a read takes."""
    if "error" in read:
        return 0
    return int(np.prod(read["shape"], dtype=np.int64)) * np.dtype(read["dtype"]).itemsize


def compare(item: Item, read: Read, data: bytes) -> Difference | None:
    """Return how what was read of an item differs from what was expected; None if it does not."""
    if "error" in read:
        return Difference(f"raised {read['error']}", error=read["error"])
    expected = item.expected
    dtype, shape = np.dtype(read["dtype"]), tuple(read["shape"])
    if (dtype.newbyteorder("="), shape) != (expected.dtype.newbyteorder("="), expected.shape):
        return Difference(f"gave dtype {dtype} and shape {shape}, not {expected.dtype} and {expected.shape}")
    got = np.frombuffer(data, dtype).reshape(shape)
    if dtype != expected.dtype:
        got = got.byteswap().view(expected.dtype)
    wrong = (_bytes(got) != _bytes(expected)).any(axis=-1)
    if not wrong.any():
        return None
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    text = (
        f"{np.count_nonzero(wrong)} of {wrong.size} elements differ, the first at {list(first)}: "
        f"{got[first]} (0x{got[first].tobytes().hex()}), not {expected[first]} (0x{expected[first].tobytes().hex()})"
    )
    return Difference(text, wrong=wrong, got=got)


def _bytes(a: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(a).view(np.uint8).reshape(*a.shape, a.dtype.itemsize)
