"""tensorstore, with its driver for Zarr v3."""

from typing import Any

import numpy as np
import tensorstore
from numpy.typing import NDArray


def read(path: str) -> NDArray[Any]:
    """Read with `tensorstore.open`."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())
