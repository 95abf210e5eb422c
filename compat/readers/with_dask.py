"""dask, from Zarr and from a map of an .npy file, computed in threads."""

# mypy: untyped-calls-exclude=dask

from typing import Any

import dask.array
import numpy as np
from numpy.typing import NDArray


def from_zarr(path: str) -> NDArray[Any]:
    """Read with `dask.array.from_zarr`."""
    return np.asarray(dask.array.from_zarr(path).compute(scheduler="threads"))


def from_npy(path: str) -> NDArray[Any]:
    """Read with `dask.array.from_array` of a map."""
    a = np.load(path, mmap_mode="r")
    return np.asarray(dask.array.from_array(a, chunks=(7, *a.shape[1:])).compute(scheduler="threads"))
