"""The readers: each a function that is given a path and returns the array that a tool reads there.

A reader runs where its tool is installed: ``python -m compat.readers JOB``, with a file that `Job` describes. All reads
are written to one file, one after the other, as raw bytes in the tool's own byte order, with a list of their dtypes and
shapes, or of what was raised, beside it. ``with_zarrita.mjs`` does the same in JavaScript. Nothing here imports more
than the standard library before a tool is known.
"""

import importlib
import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict


@dataclass(frozen=True, slots=True)
class Reader:
    """A tool, and one way to read with it."""

    name: str
    """As the page says it."""
    environment: str
    """Where it is installed: a name that `environments.prepare` knows."""
    read: str
    """``module:function`` in this package."""
    packages: tuple[str, ...]
    """The distributions that it needs, whose versions are told."""
    npy: bool = False
    """Whether it reads ``.npy``; else Zarr."""


_ZARR = ("zarr", "numcodecs", "numpy")

READERS = (
    Reader("`numpy.load`", "here", "with_numpy:load", ("numpy",), npy=True),
    Reader("`numpy.load(mmap_mode=)`", "here", "with_numpy:mmap", ("numpy",), npy=True),
    Reader("`open_memmap`", "here", "with_numpy:open_memmap", ("numpy",), npy=True),
    Reader("dask `from_array`", "here", "with_dask:from_npy", ("dask", "numpy"), npy=True),
    Reader("zarr-python (oldest)", "zarr-oldest", "with_zarr:read", _ZARR),
    Reader("zarr-python (installed)", "here", "with_zarr:read", _ZARR),
    Reader("zarr-python (newest)", "zarr-newest", "with_zarr:read", _ZARR),
    Reader("zarrs", "here", "with_zarr:read_with_zarrs", ("zarrs", *_ZARR)),
    Reader("tensorstore", "here", "with_tensorstore:read", ("tensorstore", "numpy")),
    Reader("xarray", "here", "with_xarray:read", ("xarray", *_ZARR)),
    Reader("dask `from_zarr`", "here", "with_dask:from_zarr", ("dask", *_ZARR)),
    Reader("zarrita.js", "zarrita", "with_zarrita:read", ("zarrita", "@zarrita/storage")),
)


class Job(TypedDict):
    """What a reader is asked, as JSON."""

    read: str
    """``module:function`` in this package."""
    versions: list[str]
    """Distributions to name the versions of."""
    paths: list[str]
    bytes: str
    """The file to write bytes to."""
    answer: str
    """The file to write an `Answer` to."""


class Read(TypedDict, total=False):
    """What came of one path: a dtype and a shape, or an error."""

    dtype: str
    """As NumPy's `dtype.str`."""
    shape: list[int]
    error: str
    """The type of an exception, and what it says."""


class Answer(TypedDict):
    """What a reader writes, as JSON."""

    versions: dict[str, str]
    reads: list[Read]


def work(job: Job) -> None:
    """Read all that a job asks for, and write what was read, and the answer."""
    module, _, function = job["read"].partition(":")
    read = getattr(importlib.import_module(f"compat.readers.{module}"), function)
    reads: list[Read] = []
    with open(job["bytes"], "wb") as file:
        for path in job["paths"]:
            try:
                a = read(path)
                file.write(a.tobytes())
                reads.append({"dtype": a.dtype.str, "shape": list(a.shape)})
            except Exception as error:
                reads.append({"error": f"{type(error).__name__}: {error}"})
    versions = {"python": platform.python_version(), **{name: version(name) for name in job["versions"]}}
    answer: Any = {"versions": versions, "reads": reads}
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")
