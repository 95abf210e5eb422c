"""Creation: how an array comes to be, from nothing, or from what is on the disk.

A path that ends in ``.npy`` is a file of that format; any other is the folder of a Zarr v3 array. This module joins
what `draft` remembers and what the formats say to a `BlockArray`.
"""

import contextlib
import errno
import math
import operator
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from blockstore import _disk, _os, sidecar
from blockstore.array import BlockArray
from blockstore.checksums import ChecksumKind, checksum_function
from blockstore.draft import (
    Draft,
    canonical,
    check_fingerprint,
    draft_of,
    exists,
    is_npy,
    lock_draft,
    read_draft,
    warn_of_fingerprint,
    working_of,
    write_draft,
)
from blockstore.errors import FormatError, LayoutError
from blockstore.layouts.grid import Grid, Index, split_axis
from blockstore.layouts.zarr import (
    MAX_METADATA_NBYTES,
    Metadata,
    ShardIndex,
    check_dtype,
    check_fill_value,
    decode_metadata,
    encode_metadata,
)
from blockstore.opening import StrPath, absolute
from blockstore.options import Access, Escaped, Guard, Options, choice
from blockstore.published import read_header
from blockstore.shard import Plan
from blockstore.views import check_shape

_METADATA = "zarr.json"
_BLOCK_NBYTES = 1 << 23
_BLOCK_MIN_NBYTES = 1 << 20
_BLOCKS = 64


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
        Replace what is there: an ``.npy`` when the new one is published, a Zarr array at once; and what is unfinished.
    reserve : bool
        Reserve the space on the disk, so that a full one is an `OSError` and not a SIGBUS: for an array of one file
        now, else for each file when its first block is written.
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
    target = absolute(path)
    options = Options(access, guard, escaped)
    if checksum is not None:
        checksum_function(checksum)
    npy = is_npy(target)
    items = check_dtype(dtype)
    grid = _grid(check_shape(shape), items, chunks, shards, npy=npy)
    fill = check_fill_value(fill_value, items)
    metadata = None
    if npy:
        _check_npy(fill, shards, attributes, dimension_names)
    else:
        names = None if dimension_names is None else tuple(dimension_names)
        metadata = Metadata(grid, fill, dict(attributes or {}), names, ShardIndex())
    draft = Draft(
        secrets.token_hex(16),
        checksum,
        bool(reserve),
        bool(keep_journal),
        bool(overwrite),
        None if fingerprint is None else canonical(fingerprint),
        *((grid.shape, grid.chunks, items.str) if npy else ()),
    )
    plan = Plan(target, grid, fill, metadata, "r+", options, reserve, checksum, keep_journal, overwrite)
    with _disk.folder_to_oneself(target):
        _clear(target, overwrite=overwrite)
        return (_create_npy if npy else _create_zarr)(plan, draft)


def open_array(
    path: StrPath,
    *,
    mode: Literal["r", "r+"] = "r+",
    fingerprint: Any = None,
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
        Reading and writing, or reading only. One array of one process at a time writes.
    fingerprint : optional
        The settings that it is to be filled with. An unfinished array that was created with others is refused.
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
    options = Options(access, guard, escaped)
    target = absolute(path)
    lock = None
    with contextlib.ExitStack() as undo:
        if mode == "r+" and (lock := lock_draft(draft_of(target), target)) is not None:
            undo.callback(lock.release)
        found = read_draft(draft_of(target))
        draft = None if found is None else found[1]
        plan = (_plan_of_npy if is_npy(target) else _plan_of_zarr)(target, draft, mode, options)
        if fingerprint is not None and draft is None:
            canonical(fingerprint)
            warn_of_fingerprint(target)
        elif fingerprint is not None and draft is not None:
            check_fingerprint(target, draft.fingerprint, fingerprint)
        array = BlockArray(plan, lock, _starter(plan))
        undo.pop_all()
    return array


# -- what is to be created ----------------------------------------------------------------------------


def _grid(
    shape: Index,
    dtype: np.dtype[Any],
    chunks: int | Sequence[int] | None,
    shards: int | Sequence[int] | None,
    *,
    npy: bool,
) -> Grid:
    if not shape:
        raise LayoutError("an array has one axis at least: shape () was given")
    if math.prod(n or 1 for n in shape) * dtype.itemsize > 1 << 62:
        raise LayoutError(f"shape {shape} of {dtype} is more than a file can hold")
    per_block = default_chunks(shape, dtype) if chunks is None else _per_axis("chunks", chunks, shape)
    if npy and split_axis(shape, per_block) is None:
        nearest = (per_block[0], *(max(n, 1) for n in shape[1:]))
        raise LayoutError(
            f"blocks of {per_block} do not follow each other in an .npy of shape {shape}, which is in C order: "
            f"chunks={nearest} would, and a Zarr array takes any"
        )
    whole = tuple(-(-max(n, 1) // chunk) * chunk for n, chunk in zip(shape, per_block, strict=True))
    if shards is None:
        return Grid(shape, dtype, per_block, whole)
    if npy:
        raise LayoutError("an .npy is one file: shards are for Zarr arrays")
    per_file = _per_axis("shards", shards, whole)
    fitting = tuple(-(-n // chunk) * chunk for n, chunk in zip(per_file, per_block, strict=True))
    if per_file != fitting:
        raise LayoutError(f"shards {per_file} are no multiples of the chunks {per_block}: shards={fitting} would be")
    return Grid(shape, dtype, per_block, per_file)


def _per_axis(name: str, given: int | Sequence[int], shape: Index) -> Index:
    """Return a number of elements for each axis, none more than there are."""
    try:
        sizes = (operator.index(given),) * len(shape)  # type: ignore[arg-type]
    except TypeError:
        try:
            sizes = tuple(map(operator.index, given))  # type: ignore[arg-type]
        except TypeError:
            raise LayoutError(f"{name} are an int or ints, one for each axis, not {given!r}") from None
    if len(sizes) != len(shape):
        raise LayoutError(f"{name} {sizes} are for {len(sizes)} axes, shape {shape} has {len(shape)}")
    if any(size < 1 and size != -1 for size in sizes):
        raise LayoutError(f"{name} {sizes}: each is at least 1, or -1 for all of the axis")
    return tuple(max(n, 1) if size == -1 else min(size, max(n, 1)) for size, n in zip(sizes, shape, strict=True))


def default_chunks(shape: Index, dtype: np.dtype[Any]) -> Index:
    """Return blocks that follow each other in C order, and are neither small nor few."""
    nbytes = math.prod(n or 1 for n in shape) * dtype.itemsize
    aim = max(min(_BLOCK_NBYTES, nbytes // _BLOCKS), _BLOCK_MIN_NBYTES)
    row = dtype.itemsize
    chunks: list[int] = []
    for n in reversed(shape):
        if row > aim:
            chunks.append(1)
            continue
        count = max(n, 1)
        if row * count > aim:
            count = aim // row
            whole = _os_page // math.gcd(row, _os_page)  # so that blocks share no page
            count = count // whole * whole or count
        chunks.append(count)
        row *= max(n, 1)
    return tuple(reversed(chunks))


_os_page = 4096


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
    if os.path.lexists(draft):
        if not overwrite:
            raise exists(target, "there is an unfinished array")
        lock = lock_draft(draft, target)
        if lock is not None:
            lock.release()
    elif os.path.lexists(target) and not overwrite:
        raise exists(target, "it exists")
    if npy:
        for name in (draft, working_of(target), sidecar.path_of(working_of(target)), f"{working_of(target)}.partial"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
    elif os.path.lexists(target) and not _is_array(target) and os.listdir(target):
        raise FileExistsError(
            errno.EEXIST, "the folder is not empty, and no Zarr array: move it away, or pass another path", target
        )


def _is_array(folder: str) -> bool:
    """Whether a folder is a Zarr array, of what kind soever, and so may be replaced if that is asked for."""
    try:
        return decode_metadata(_read_metadata(folder), folder) is not None
    except FormatError:
        with contextlib.suppress(OSError, UnicodeDecodeError), open(os.path.join(folder, _METADATA)) as file:
            return '"array"' in file.read(1 << 20)
    except OSError:
        pass
    return False


def _create_npy(plan: Plan, draft: Draft) -> BlockArray:
    with contextlib.ExitStack() as undo:
        array = BlockArray(plan, None, partial(write_draft, draft_of(plan.path), draft))
        undo.callback(array._close, publish=False)
        for name in (draft_of(plan.path), working_of(plan.path), sidecar.path_of(working_of(plan.path))):
            undo.callback(_unlink, name)
        array._begin()
        undo.pop_all()
    return array


def _create_zarr(plan: Plan, draft: Draft) -> BlockArray:
    target, metadata = plan.path, plan.metadata
    if metadata is None:
        raise LayoutError("a Zarr array has metadata")
    parent, name = os.path.split(target)
    new, old = (os.path.join(parent, f".{name}.{which}") for which in ("new", "old"))
    if plan.reserve:
        _check_space(parent, plan.grid.nbytes, target)
    text = encode_metadata(metadata)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    with contextlib.ExitStack() as undo:
        os.mkdir(new)
        undo.callback(shutil.rmtree, new, ignore_errors=True)
        _write(os.path.join(new, _METADATA), text)
        _write(os.path.join(new, os.path.basename(draft_of(target))), draft.encode())
        _os.sync_directory(new)
        replaced = os.path.lexists(target)
        if replaced:
            os.rename(target, old)
            undo.callback(os.rename, old, target)
        os.rename(new, target)
        undo.callback(shutil.rmtree, target, ignore_errors=True)
        _os.sync_directory(parent)
        lock = lock_draft(draft_of(target), target)
        array = BlockArray(plan, lock, _starter(plan))
        undo.callback(array._close, publish=False)
        if math.prod(plan.grid.files) == 1:
            array._begin()
        undo.pop_all()
        if replaced:
            shutil.rmtree(old, ignore_errors=True)
    return array


def _check_space(folder: str, nbytes: int, path: str) -> None:
    if hasattr(os, "statvfs"):
        disk = os.statvfs(folder)
        if nbytes > (free := disk.f_bfree * disk.f_frsize):
            raise OSError(errno.ENOSPC, f"cannot reserve {nbytes} bytes: the disk has {free} bytes left", path)


def _write(path: str, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


# -- what is there --------------------------------------------------------------------------------------


def _starter(plan: Plan) -> Callable[[], _disk.FileLock]:
    """Return what makes the draft of a finished array that is to be written again."""
    npy = (plan.grid.shape, plan.grid.chunks, plan.grid.dtype.str) if plan.metadata is None else ()

    def start() -> _disk.FileLock:
        draft = Draft(secrets.token_hex(16), plan.checksum, plan.reserve, plan.keep_journal, True, None, *npy)
        try:
            return write_draft(draft_of(plan.path), draft)
        except FileExistsError:
            lock = lock_draft(draft_of(plan.path), plan.path)
            if lock is not None:
                lock.release()
            raise OSError(
                errno.ESTALE, "somebody else has begun to write the array since it was opened: open it again", plan.path
            ) from None

    return start


def _plan_of_npy(target: str, draft: Draft | None, mode: Literal["r", "r+"], options: Options) -> Plan:
    if draft is not None and os.path.lexists(working_of(target)):
        if draft.shape is None or draft.chunks is None or draft.dtype is None:
            raise FormatError(f"the record of the unfinished array {target!r} makes no sense")
        grid = _grid(check_shape(draft.shape), check_dtype(draft.dtype), draft.chunks, None, npy=True)
    else:
        header = read_header(target)
        if not header.shape:
            raise FormatError(f"{target!r} has no axis: blockstore's arrays have one at least; numpy.load reads it")
        chunks = header.shape if header.fortran_order else default_chunks(header.shape, header.dtype)
        whole = tuple(-(-max(n, 1) // max(c, 1)) * max(c, 1) for n, c in zip(header.shape, chunks, strict=True))
        grid = Grid(header.shape, header.dtype, tuple(max(c, 1) for c in chunks), whole)
        if draft is not None and draft.chunks is not None and draft.shape == header.shape:
            grid = _grid(header.shape, header.dtype, draft.chunks, None, npy=True)
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


def _plan_of_zarr(target: str, draft: Draft | None, mode: Literal["r", "r+"], options: Options) -> Plan:
    try:
        metadata = decode_metadata(_read_metadata(target), os.path.join(target, _METADATA))
    except (FileNotFoundError, NotADirectoryError):
        _explain_missing(target)
        raise
    if mode == "r+" and metadata.index != ShardIndex():
        raise FormatError(
            f"{target!r} was made by something else, in a layout that blockstore does not write: mode='r' reads it"
        )
    return _plan(target, metadata.grid, metadata.fill_value, metadata, mode, options, draft)


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
        return Plan(target, grid, fill, metadata, mode, options, True, None, False, True)
    checksum: Any = draft.checksum
    try:
        if checksum is not None:
            checksum_function(checksum)
    except ValueError as error:
        raise FormatError(f"the unfinished array {target!r} is of another version: {error}") from None
    return Plan(
        target, grid, fill, metadata, mode, options, draft.reserve, checksum, draft.keep_journal, draft.replaces
    )


def _read_metadata(folder: str) -> bytes:
    with open(os.path.join(folder, _METADATA), "rb") as file:
        return file.read(MAX_METADATA_NBYTES + 1)


def _explain_missing(target: str) -> None:
    """Say what is at a path that is no Zarr v3 array, if anything is."""
    if os.path.isfile(target):
        raise FormatError(f"{target!r} is a file: blockstore's arrays are .npy files and folders of Zarr v3") from None
    for name in (".zarray", ".zgroup"):
        if os.path.exists(os.path.join(target, name)):
            raise FormatError(f"{target!r} is of Zarr v2, blockstore reads v3: zarr.open reads it") from None
    if os.path.isdir(target):
        raise FormatError(f"the folder {target!r} has no zarr.json: it is no Zarr v3 array") from None
