"""xarray, whose arrays lie in groups: the folder that the array's lies in."""

from pathlib import Path
from typing import Any

import numpy as np
import xarray
from numpy.typing import NDArray


def read(path: str) -> NDArray[Any]:
    """Read a variable of a group with `xarray.open_zarr`."""
    with xarray.open_zarr(Path(path).parent, consolidated=False, chunks=None) as group:
        return np.asarray(group[Path(path).name].values)
