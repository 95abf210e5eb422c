"""Finding: what array there is at a path, finished or not, of blockstore or of anyone, as the `Plan` to open it by."""

import contextlib
import json
import os
from typing import Any, Literal

import numpy as np

from blockstore import _os
from blockstore.checksums import checksum_function
from blockstore.chunking import default_chunks, divided
from blockstore.draft import Draft, working_of
from blockstore.errors import DtypeError, FormatError, LayoutError, NotRegularFileError
from blockstore.layouts.grid import Grid
from blockstore.layouts.shard_index import ShardIndex
from blockstore.layouts.values import check_dtype
from blockstore.layouts.zarr import MAX_METADATA_NBYTES, Metadata, decode_metadata
from blockstore.options import Options
from blockstore.plan import Plan, folder_of
from blockstore.published import read_header
from blockstore.views import check_shape

METADATA = "zarr.json"
"""The name of a Zarr array's metadata in its folder."""


def plan_of_npy(target: str, draft: Draft | None, mode: Literal["r", "r+"], options: Options) -> Plan:
    if draft is not None and os.path.lexists(working_of(target)):
        try:
            grid = divided(check_shape(draft.shape or ()), check_dtype(draft.dtype or ""), draft.chunks, None, npy=True)
        except (LayoutError, DtypeError) as error:
            raise FormatError(f"the record of the unfinished array {target!r} makes no sense: {error}") from None
    else:
        header = read_header(target)
        if not header.shape:
            raise FormatError(f"{target!r} has no axis: blockstore's arrays have one at least; numpy.load reads it")
        chunks = header.shape if header.fortran_order else default_chunks(header.shape, header.dtype)
        whole = tuple(-(-max(n, 1) // max(c, 1)) * max(c, 1) for n, c in zip(header.shape, chunks, strict=True))
        grid = Grid(header.shape, header.dtype, tuple(max(c, 1) for c in chunks), whole)
        if draft is not None and draft.shape == header.shape:
            with contextlib.suppress(LayoutError):
                grid = divided(header.shape, header.dtype, draft.chunks, None, npy=True)
        if mode == "r+" and (header.fortran_order or header.dtype.names or not _is_writable(header.dtype)):
            raise FormatError(
                f"{target!r} is in Fortran order, or of a dtype ({header.dtype}) that blockstore does not write: "
                "mode='r' reads it"
            )
    fill = np.zeros((), grid.dtype)[()]
    return _plan(target, grid, fill, None, mode, options, draft)


def _is_writable(dtype: np.dtype[Any]) -> bool:
    try:
        check_dtype(dtype)
    except TypeError:
        return False
    return True


def plan_of_zarr(target: str, draft: Draft | None, mode: Literal["r", "r+"], options: Options) -> Plan:
    folder = folder_of(target)
    try:
        metadata = decode_metadata(_read_metadata(target), os.path.join(target, METADATA))
    except (FileNotFoundError, NotADirectoryError):
        _explain_missing(target)
        raise
    if mode == "r+" and metadata.index != ShardIndex():
        raise FormatError(
            f"{target!r} was made by something else, in a layout that blockstore does not write: mode='r' reads it"
        )
    plan = _plan(target, metadata.grid, metadata.fill_value, metadata, mode, options, draft)
    plan.folder = folder
    return plan


def _plan(
    target: str,
    grid: Grid,
    fill: Any,
    metadata: Metadata | None,
    mode: Literal["r", "r+"],
    options: Options,
    draft: Draft | None,
) -> Plan:
    if draft is None:
        return Plan(target, grid, fill, metadata, mode, options, True, None, False, True, None, is_begun=False)
    checksum: Any = draft.checksum
    try:
        if checksum is not None:
            checksum_function(checksum)
    except ValueError as error:
        raise FormatError(f"the unfinished array {target!r} is of another version: {error}") from None
    return Plan(
        target,
        grid,
        fill,
        metadata,
        mode,
        options,
        draft.reserve,
        checksum,
        draft.keep_journal,
        draft.replaces,
        draft.fingerprint,
        rewrites=draft.rewrites,
    )


def _read_metadata(folder: str) -> bytes:
    path = os.path.join(folder, METADATA)
    try:
        file = _os.open_file(path, writable=False)
    except (LayoutError, NotRegularFileError) as error:
        raise FormatError(f"{path!r} is no metadata of a Zarr array: {error}") from None
    return os.pread(file.fileno(), min(os.fstat(file.fileno()).st_size, MAX_METADATA_NBYTES + 1), 0)


def _explain_missing(target: str) -> None:
    """Say what is at a path that is no Zarr v3 array, if anything is."""
    if os.path.exists(target) and not os.path.isdir(target):
        raise FormatError(
            f"{target!r} is no folder: blockstore's arrays are .npy files and folders of Zarr v3"
        ) from None
    for name in (".zarray", ".zgroup"):
        if os.path.exists(os.path.join(target, name)):
            raise FormatError(f"{target!r} is of Zarr v2, blockstore reads v3: zarr.open reads it") from None
    if os.path.isdir(target):
        raise FormatError(f"the folder {target!r} has no zarr.json: it is no Zarr v3 array") from None


def is_array(folder: str) -> bool:
    """Whether a folder is a Zarr array, of what kind soever, and so may be replaced if that is asked for."""
    try:
        document = json.loads(_read_metadata(folder))
        return isinstance(document, dict) and document.get("node_type") == "array"
    except (OSError, ValueError, RecursionError):
        return False
