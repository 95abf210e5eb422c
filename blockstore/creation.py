"""Creation: how an array comes to be, from nothing, or from what is on the disk.

A path that ends in ``.npy`` is a file of that format; any other is the folder of a Zarr v3 array. This module joins
what `draft` remembers and what the formats say to a `BlockArray`.
"""

import contextlib
import errno
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from blockstore import _disk, _os, sidecar
from blockstore.array import BlockArray
from blockstore.checksums import ChecksumKind, checksum_function
from blockstore.chunking import divided
from blockstore.draft import (
    canonical,
    check_fingerprint,
    draft_of,
    exists,
    is_npy,
    lock_draft,
    mark_of,
    read_draft,
    warn_of_fingerprint,
    working_of,
)
from blockstore.errors import LayoutError
from blockstore.files import Files
from blockstore.finding import METADATA, is_array, plan_of_npy, plan_of_zarr
from blockstore.layouts.shard_index import ShardIndex
from blockstore.layouts.values import check_dtype, check_fill_value
from blockstore.layouts.zarr import Metadata, encode_metadata
from blockstore.opening import StrPath, absolute
from blockstore.options import Access, Escaped, Guard, Options, choice
from blockstore.plan import Plan, draft_from, folder_of
from blockstore.views import check_shape
from blockstore.working import clear_leftovers


def create_array(
    path: StrPath,
    *,
    shape: int | Sequence[int],
    dtype: DTypeLike,
    chunks: int | Sequence[int] | None = None,
    shards: int | Sequence[int] | None = None,
    fill_value: Any = 0,
    attributes: Mapping[str, Any] | None = None,
    dimension_names: Sequence[str | None] | None = None,
    fingerprint: Any = None,
    overwrite: bool = False,
    reserve: bool = True,
    access: Access | None = "dense",
    guard: Guard = "flag",
    escaped: Escaped = "warn",
    checksum: ChecksumKind | None = None,
    keep_journal: bool = False,
) -> BlockArray:
    """Create an array that is filled block by block: an ``.npy`` file, or a Zarr v3 array.

    Parameters
    ----------
    path : path
        ``.npy`` at its end makes it that; anything else is the folder of a Zarr array.
    shape : int or sequence of int
        Elements along each axis, one axis at least.
    dtype : dtype
        bool, int8 to int64, uint8 to uint64, float16 to float64, complex64 or complex128, of either byte order.
    chunks : int or sequence of int, optional
        Elements of a block along each axis; -1 is all of an axis, and an int is meant for each. Default: blocks that
        split the leading axis, of about 8 MiB, but not fewer than 64 if they have 1 MiB at least. Those of an ``.npy``
        have to follow each other in C order.
    shards : int or sequence of int, optional
        Elements of a file along each axis, multiples of `chunks`, for a Zarr array. Default: one file. Each is visible
        as soon as it is complete and durable.
    fill_value : scalar
        What is read where nothing is written. Zero bits for ``.npy``.
    attributes : mapping of str, optional
        What else is to be said of a Zarr array, as JSON can say it.
    dimension_names : sequence of (str or None), optional
        Names of the axes of a Zarr array.
    fingerprint : optional
        The settings that the content depends on, as JSON can say them. `open_array` refuses to go on with others.
    overwrite : bool
        Replace what is there: an ``.npy`` when the new one is published, a Zarr array at once, with all that is in its
        folder; and what is unfinished.
    reserve : bool
        Reserve the space on the disk, so that a full one is an `OSError` and not a SIGBUS: for an array of one file
        now, else for each file when its first block is written; there has to be enough for all of them now. A file in
        which nothing is written gives its space back when the array is closed.
    access, guard, escaped
        As in `create`; "dense" here, since blocks are written whole.
    checksum : {"crc32", "crc32c", "xxh3"}, optional
        Keep a checksum of each block, for `BlockArray.verify`.
    keep_journal : bool
        Keep the journal of each file beside it when it is complete, and with it the checksums.

    Returns
    -------
    BlockArray

    Raises
    ------
    FileExistsError
        If there is something, finished or not, and no `overwrite`; or something that is no array.
    LayoutError, DtypeError, ValueError, TypeError
        If an argument makes no sense, or the format cannot say it.
    StoreInUseError
        If what is to be replaced is being written.
    OSError
        If the disk is full, or the folder cannot be written; nothing is left behind.
    ModuleNotFoundError
        If the checksum's package is not installed.

    Warns
    -----
    FileSystemWarning
        As `create`.

    Notes
    -----
    O(1) in the number of blocks, but for the space that is reserved. Nothing unfinished is ever seen at `path`: see
    `BlockArray.publish`.

    Examples
    --------
    >>> import numpy as np
    >>> with create_array(tmp_path / "x.zarr", shape=(600, 400), dtype="f4", chunks=(200, 400), fill_value=np.nan) as x:
    ...     filled = x.fill(lambda a, block: np.copyto(a, block.index[0]))
    >>> filled, np.load(tmp_path / "x.zarr/c/0/0", mmap_mode="r")[::200, 0]
    (3, memmap([0., 1., 2.], dtype=float32))
    """
    target = _target(path)
    options = Options(access, guard, escaped, eager=True)
    if checksum is not None:
        checksum_function(checksum)
    npy = is_npy(target)
    items = check_dtype(dtype)
    grid = divided(check_shape(shape), items, chunks, shards, npy=npy)
    fill = check_fill_value(fill_value, items)
    metadata = None
    if npy:
        _check_npy(fill, shards, attributes, dimension_names)
    else:
        names = None if dimension_names is None else tuple(dimension_names)
        metadata = Metadata(grid, fill, dict(attributes or {}), names, ShardIndex())
    text = None if fingerprint is None else canonical(fingerprint)
    flags = bool(keep_journal), bool(overwrite)
    plan = Plan(target, grid, fill, metadata, "r+", options, bool(reserve), checksum, *flags, text)
    with _disk.folder_to_oneself(target):
        _recover(target)
        _clear(target, overwrite=overwrite)
        return (_create_npy if npy else _create_zarr)(plan)


def open_array(
    path: StrPath,
    *,
    mode: Literal["r", "r+"] = "r+",
    fingerprint: Any = None,
    adopt: bool = False,
    access: Access | None = "dense",
    guard: Guard = "flag",
    escaped: Escaped = "warn",
) -> BlockArray:
    """Open an array, finished or not, and go on with what is not written.

    Parameters
    ----------
    path : path
        An ``.npy`` file, or the folder of a Zarr v3 array, of blockstore or of anyone.
    mode : {"r+", "r"}
        Reading and writing, or reading only. One array of one process at a time writes. What is read is what stood when
        a file of the array was first looked at.
    fingerprint : optional
        The settings that it is to be filled with. An unfinished array that was created with others is refused.
    adopt : bool
        Accept the journals of files of the same size: for an unfinished array that was copied, hidden files and all.
    access, guard, escaped
        As in `create_array`. They are not remembered.

    Returns
    -------
    BlockArray

    Raises
    ------
    FileNotFoundError
        If there is no array.
    FormatError
        If it is damaged, or of a kind that cannot be mapped: compressed, say. The message says what would be.
    FingerprintError
        If it was begun with other settings.
    StoreInUseError
        If somebody else has it open to write.
    JournalMismatchError
        If the journal of a working file is not that of this array.

    Warns
    -----
    FingerprintWarning
        If a fingerprint was given for an array that is finished, and so keeps none.
    JournalDamageWarning
        If records in the midst of a journal are damaged; the others hold.

    Notes
    -----
    O(1): the files of an array are opened when they are come to.

    Examples
    --------
    >>> x = create_array(tmp_path / "x.npy", shape=(4, 1000), dtype="i4", chunks=(1, 1000), fingerprint={"seed": 7})
    >>> receipt = x.blocks[2, 0].write(np.arange(1000, dtype="i4").reshape(1, 1000))
    >>> x.close()
    >>> x = open_array(tmp_path / "x.npy", fingerprint={"seed": 7})
    >>> [b.index for b in x.pending()], int(x[2, 999])
    ([(0, 0), (1, 0), (3, 0)], 999)
    >>> x.close()
    """
    choice("mode", mode, ("r", "r+"))
    options = Options(access, guard, escaped, eager=True)
    target = _target(path)
    lock = None
    with contextlib.ExitStack() as undo:
        if mode == "r+":
            _recover(target)
        if mode == "r+" and (lock := lock_draft(draft_of(target), target)) is not None:
            undo.callback(lock.release)
            if not is_npy(target):
                _clear_aside(target)
        found = read_draft(draft_of(target))
        draft = None if found is None else found[1]
        plan = (plan_of_npy if is_npy(target) else plan_of_zarr)(target, draft, mode, options)
        plan.adopt = bool(adopt)
        if fingerprint is not None and draft is None:
            plan.fingerprint = canonical(fingerprint)
            warn_of_fingerprint(target)
        elif fingerprint is not None and draft is not None:
            check_fingerprint(target, draft.fingerprint, fingerprint)
        array = BlockArray(Files(plan, lock))
        undo.pop_all()
    return array


# -- what is to be created ----------------------------------------------------------------------------


def _target(path: StrPath) -> str:
    """Return where an array is or is to be: of a folder, not the link to it."""
    target = absolute(path)
    return os.path.realpath(target) if os.path.islink(target) and not is_npy(target) else target


def _check_npy(
    fill: np.generic,
    shards: object,
    attributes: Mapping[str, Any] | None,
    dimension_names: Sequence[str | None] | None,
) -> None:
    if any(fill.tobytes()):
        raise ValueError(
            f"an .npy cannot say what is not written, which is zeros there: fill_value {fill!r} is for Zarr"
        )
    if attributes:
        raise ValueError("an .npy keeps no attributes: a Zarr array does")
    if dimension_names is not None:
        raise ValueError("an .npy keeps no dimension_names: a Zarr array does")


def _clear(target: str, *, overwrite: bool) -> None:
    """Make way for a new array, or say what is in the way. The folder is ours alone."""
    draft, npy = draft_of(target), is_npy(target)
    if os.path.lexists(target) and os.path.isdir(target) == npy:
        kind = "a folder" if npy else "a file"
        raise FileExistsError(errno.EEXIST, f"this is {kind}: move it away, or pass another path", target)
    if not npy and os.path.lexists(target) and not is_array(target) and os.listdir(target):
        raise FileExistsError(
            errno.EEXIST, "the folder is not empty, and no Zarr array: move it away, or pass another path", target
        )
    if os.path.lexists(draft):
        is_lost = npy and not os.path.lexists(target) and not os.path.lexists(working_of(target))
        if not overwrite and not is_lost:
            raise exists(target, "there is an unfinished array")
        lock = lock_draft(draft, target)
        if lock is not None:
            lock.release()
    elif os.path.lexists(target) and not overwrite:
        raise exists(target, "it exists")
    if npy:
        for name in (draft, working_of(target), mark_of(target)):
            _unlink(name)
        clear_leftovers(target)


def _create_npy(plan: Plan) -> BlockArray:
    with contextlib.ExitStack() as undo:
        array = BlockArray(Files(plan, None))
        undo.callback(array._files.close, publish=False)
        for name in (draft_of(plan.path), working_of(plan.path), sidecar.path_of(working_of(plan.path))):
            undo.callback(_unlink, name)
        array._files.begin()
        undo.pop_all()
    return array


def _create_zarr(plan: Plan) -> BlockArray:
    target, metadata = plan.path, plan.metadata
    if metadata is None:
        raise LayoutError("a Zarr array has metadata")
    parent = os.path.dirname(target)
    new, old = _aside(target, "new"), _aside(target, "old")
    if plan.reserve:
        _check_space(parent, plan.grid.nbytes, target)
    text = encode_metadata(metadata)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    with contextlib.ExitStack() as undo:
        os.mkdir(new)
        undo.callback(shutil.rmtree, new, ignore_errors=True)
        _write(os.path.join(new, METADATA), text)
        _write(os.path.join(new, os.path.basename(draft_of(target))), draft_from(plan).encode())
        _os.sync_directory(new)
        if not os.path.lexists(target):
            os.rename(new, target)
            undo.callback(shutil.rmtree, target, ignore_errors=True)
        elif _os.exchange(new, target):
            undo.callback(_os.exchange, new, target)
        else:
            os.rename(target, old)
            undo.callback(os.rename, old, target)
            os.rename(new, target)
            undo.callback(shutil.rmtree, target, ignore_errors=True)
        _os.sync_directory(parent)
        plan.folder = folder_of(target)
        array = BlockArray(Files(plan, lock_draft(draft_of(target), target)))
        undo.callback(array._files.close, publish=False)
        if math.prod(plan.grid.files) == 1:
            array._files.begin()
        undo.pop_all()
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    return array


def _aside(target: str, which: str) -> str:
    parent, name = os.path.split(target)
    return os.path.join(parent, f".{name}.{which}")


def _recover(target: str) -> None:
    """Put back what was moved aside to be replaced by an array that never came."""
    if not os.path.lexists(target) and os.path.isdir(old := _aside(target, "old")):
        os.rename(old, target)


def _clear_aside(target: str) -> None:
    """Remove what an interrupted creation has left of an array that it replaced. The draft's lock is held."""
    with _disk.folder_to_oneself(target):
        for name in (_aside(target, "new"), _aside(target, "old")):
            if os.path.lexists(name):
                shutil.rmtree(name, ignore_errors=True)


def _check_space(folder: str, nbytes: int, path: str) -> None:
    if hasattr(os, "statvfs"):
        disk = os.statvfs(folder)
        if nbytes > (free := disk.f_bfree * disk.f_frsize):
            raise OSError(
                errno.ENOSPC,
                f"cannot reserve {nbytes} bytes: the disk has {free} bytes left; reserve=False makes sparse files, and "
                "a full disk a SIGBUS",
                path,
            )


def _write(path: str, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


# -- what is there --------------------------------------------------------------------------------------
