"""zarr-python, as it is, and with the codecs of zarrs in it."""

from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray


def read(path: str) -> NDArray[Any]:
    """Read with `zarr.open_array`."""
    return np.asarray(zarr.open_array(path, mode="r")[...])


def read_with_zarrs(path: str) -> NDArray[Any]:
    """Read with `zarr.open_array` through zarrs alone: where it would leave an array to zarr-python, it raises."""
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}):
        array = zarr.open_array(path, mode="r")
        pipeline = type(array._async_array.codec_pipeline).__name__
        if pipeline != "ZarrsCodecPipeline":
            raise RuntimeError(f"this was read by {pipeline}, not by zarrs")
        return np.asarray(array[...])
