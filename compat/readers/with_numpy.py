"""NumPy, three ways. Files are read as users do it: with default arguments."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def load(path: str) -> NDArray[Any]:
    """Read with `numpy.load`."""
    a: NDArray[Any] = np.load(path)
    return a


def mmap(path: str) -> NDArray[Any]:
    """Map with `numpy.load`."""
    a: NDArray[Any] = np.load(path, mmap_mode="r")
    return a


def open_memmap(path: str) -> NDArray[Any]:
    """Map with `numpy.lib.format.open_memmap`."""
    a: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    return a
