"""Dask: an array of dask's is computed into a `BlockArray`, chunk by chunk and in many threads, and one is made of it.

dask computes chunks, and blocks are written whole; so each chunk has to consist of whole blocks. This module finds out
whether it does, and otherwise which ``rechunk`` helps; dask does the rest. It needs dask: ``pip install
'ndblockstore[dask]'``. Nothing else in blockstore knows it. Chunks and shapes are numbers of elements.

``dask.array.store(x, array, lock=False)`` and ``dask.array.from_array(array)`` work as they are, too.

Examples
--------
>>> import dask.array as da
>>> from blockstore.dask import from_array, store
>>> x = da.arange(1_000_000, chunks=100_000).reshape(1000, 1000)
>>> store(x + 1, tmp_path / "x.npy")
>>> np.load(tmp_path / "x.npy", mmap_mode="r")[-1, -1]
np.int64(1000000)
>>> from_array(tmp_path / "x.npy")
dask.array<array, shape=(1000, 1000), dtype=int64, chunksize=(1000, 1000), chunktype=numpy.ndarray>
"""

# mypy: untyped-calls-exclude=dask

import contextlib
import math
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate, product
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from blockstore.array import BlockArray
from blockstore.checksums import ChecksumKind
from blockstore.chunking import divided
from blockstore.creation import create_array, open_array
from blockstore.draft import is_npy
from blockstore.errors import DtypeError, LayoutError, SelectionError
from blockstore.layouts.grid import Index, split_axis
from blockstore.opening import StrPath
from blockstore.options import Access, Escaped, Guard

try:
    import dask.array as da
    from dask import config
    from dask.array.core import normalize_chunks
    from dask.base import compute_as_if_collection, get_scheduler, named_schedulers
    from dask.delayed import Delayed, delayed
    from dask.utils import parse_bytes
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"blockstore.dask needs the package {error.name!r}: pip install 'ndblockstore[dask]'", name=error.name
    ) from error

__all__ = ["from_array", "store"]


class CreateOptions(TypedDict, total=False):
    """What `create_array` takes beside a shape and a dtype."""

    chunks: int | Sequence[int] | None
    shards: int | Sequence[int] | None
    fill_value: Any
    attributes: Mapping[str, Any] | None
    dimension_names: Sequence[str | None] | None
    fingerprint: Any
    overwrite: bool
    reserve: bool
    access: Access | None
    guard: Guard
    escaped: Escaped
    checksum: ChecksumKind | None
    keep_journal: bool


def store(
    x: da.Array,
    target: StrPath | BlockArray,
    *,
    rechunk: bool = False,
    resume: bool = False,
    compute: bool = True,
    flush_every: float | None = 30.0,
    **options: Unpack[CreateOptions],
) -> Delayed | None:
    """Compute a dask array into an array on the disk, each chunk as soon as it is there, without a lock.

    Parameters
    ----------
    x : dask.array.Array
        Each of its chunks consists of whole blocks of the target.
    target : path or BlockArray
        Where an array of the shape and dtype of `x` is created, its blocks being the chunks of `x`; or an array of the
        same shape that is open to write, whose dtype `x` is cast to as NumPy's assignment does.
    rechunk : bool
        Rechunk `x` where its chunks do not fit, as the error would say otherwise.
    resume : bool
        Compute only the chunks in which a block is not written, and write only such blocks. What is at a path already,
        finished or not, is opened; if there is nothing, it is created. Without `resume`, all is written, whether it was
        or not.
    compute : bool
        Do it now, with the scheduler that dask is set to. Otherwise return what does it, when it is computed.
    flush_every : float, optional
        Seconds after which what is written is made durable, beside the computation. None: not before the end.
    **options
        Those of `create_array`, for a path. Of one that is resumed, `fingerprint`, `access`, `guard` and `escaped`
        count, and the others are as they were.

    Returns
    -------
    dask.delayed.Delayed or None
        None if `compute`. At the end a target that was given by its path is closed, and so published; a given array
        is flushed, and stays open. If a task fails, what is written is kept: the path is closed without publishing, to
        go on with ``resume=True``.

    Raises
    ------
    SelectionError
        If chunks of `x` cut blocks of the target; the message names the ``rechunk`` that helps.
    LayoutError
        If the chunks of `x` cannot be blocks: they are of several sizes along an axis, or not contiguous in an
        ``.npy``; or if they are of unknown size. The message says what helps. If the shape of the target is another, or
        the dtype of one that is resumed; if a chunk comes out in another shape than `x` says.
    DtypeError
        If `x` is masked, or of a dtype that cannot live in a file.
    TypeError
        If `x` is no dask array, or if dask is set to compute in other processes: a `BlockArray` does not go there yet.
    ValueError
        If both `resume` and ``overwrite=True`` are asked for.
    FileExistsError, StoreInUseError, FingerprintError, ReadOnlyStoreError, ClosedStoreError, OSError
        As in `create_array`, `open_array` and `BlockArray.blocks`. Whatever a task raises.

    Notes
    -----
    What does not fit is found before anything is computed, and a target is created at once, also if not `compute`. Then
    it belongs to what is returned, whose last task closes it. That can be computed again if it failed, not if it
    succeeded; once it is gone, the target is closed without publishing.

    O(chunks) of memory and time beside the computation: dask takes some tenths of a millisecond for each.

    Examples
    --------
    >>> import dask.array as da
    >>> x = da.ones((600, 400), chunks=(250, 400), dtype="f4")
    >>> store(x, tmp_path / "x.zarr", chunks=(100, 400))
    Traceback (most recent call last):
        ...
    blockstore.SelectionError: a chunk of x ends at 250 along axis 0, within a block of (100, 400): x.rechunk({0: 200})
    has chunks of whole blocks, and rechunk=True does it
    >>> store(x.rechunk({0: 200}), tmp_path / "x.zarr", chunks=(100, 400))
    >>> store(x * 2, tmp_path / "x.zarr", resume=True, rechunk=True)  # finished: nothing is computed
    >>> with open_array(tmp_path / "x.zarr") as array:
    ...     store(x * 3, array, rechunk=True)
    ...     array[599, 399]
    np.float32(3.0)
    """
    _check(x)
    if compute:
        _check_scheduler(x)
    if isinstance(target, BlockArray):
        if options:
            raise TypeError(f"a BlockArray is created already: {', '.join(options)} would be for a path")
        target._plan.refuse_writing()
        array, owned = target, False
    else:
        x, array = _open_or_create(x, target, options, rechunk=rechunk, resume=resume)
        owned = True
    with contextlib.ExitStack() as stack:
        if owned:
            stack.enter_context(array)
        if x.shape != array.shape:
            raise LayoutError(f"x has shape {x.shape}, {array.path!r} has {array.shape}")
        missing = ~array.written if resume else None
        if missing is None or missing.any():  # how a finished .npy was divided is not known any more
            x = _aligned(x, array.chunks, rechunk=rechunk)
        sink = _Sink(array, x, only_missing=resume, flush_every=flush_every)
        needed = [index for index in np.ndindex(x.numblocks) if missing is None or missing[sink.blocks(index)].any()]
        writes = _writes(x, sink)
        if not compute:
            tasks = writes.to_delayed()
            later: Delayed = delayed(_End(array, owned=owned))([tasks[index] for index in needed])
            stack.pop_all()
            return later
        if needed:
            stack.callback(sink.wait)
            compute_as_if_collection(da.Array, writes.dask, [(writes.name, *index) for index in needed])
        if not owned:
            array.flush()
    return None


def from_array(x: BlockArray | StrPath, *, chunks: Any = None) -> da.Array:
    """Return a dask array that reads from an array on the disk when it is computed.

    Parameters
    ----------
    x : BlockArray or path
        An array, of either mode; it must not be closed before what is made of this is computed. A path is opened with
        ``mode="r"``.
    chunks : optional
        As `dask.array.from_array` takes them; ``x.chunks`` makes each block a chunk. Default: as many whole blocks, or
        whole files, as make a chunk of about the size that dask's ``array.chunk-size`` says, 128 MiB; a part of a
        block, if that is larger.

    Returns
    -------
    dask.array.Array
        Of the shape and dtype of `x`, byte order included. Its name is made of the content, so that what was computed
        of the same content is known again.

    Raises
    ------
    FileNotFoundError, FormatError
        As `open_array`.
    ClosedStoreError
        If `x` is closed.
    ValueError
        If `chunks` do not fit.

    Notes
    -----
    Nothing is read here. Chunks are read without a lock, as ``x[...]``: read-only, and without a copy if they lie in
    one block, or in one file whose blocks follow each other; what is not written by then is the fill value.

    Examples
    --------
    >>> with create_array(tmp_path / "x.npy", shape=(600, 400), dtype=">f4", chunks=(200, 400)) as x:
    ...     filled = x.fill(lambda a, block: np.copyto(a, block.index[0]))
    >>> x = from_array(tmp_path / "x.npy", chunks=(200, 400))
    >>> x.dtype, x.numblocks, float(x[[0, 599]].mean().compute())
    (dtype('>f4'), (3, 1), 1.0)
    """
    array = x if isinstance(x, BlockArray) else open_array(x, mode="r")
    array._plan.refuse_closed()
    whole = math.prod(map(min, array.shards, array.shape)) * array.dtype.itemsize
    normalized = normalize_chunks(
        "auto" if chunks is None else chunks,
        shape=array.shape,
        dtype=array.dtype,
        previous_chunks=array.shards if whole <= _chunk_nbytes() else array.chunks,
    )
    meta: NDArray[Any] = np.empty((0,) * array.ndim, array.dtype)
    lazy: da.Array = da.from_array(array, chunks=normalized, lock=False, fancy=False, meta=meta)
    return lazy


# -- what is checked before anything is computed --------------------------------------------------------


def _check(x: object) -> None:
    """Raise the error that says why something cannot be stored in any target, if so."""
    if not isinstance(x, da.Array):
        raise TypeError(f"store takes a dask array, not {type(x).__name__}: dask.array.asarray(x) makes one")
    if isinstance(x._meta, np.ma.MaskedArray):
        raise DtypeError("x is masked, and there is no place for its mask: dask.array.ma.filled(x) has none")
    unknown = [axis for axis, chunks in enumerate(x.chunks) if any(map(math.isnan, chunks))]
    if unknown:
        raise LayoutError(
            f"chunks of x are of unknown size along axis {unknown[0]}: x.compute_chunk_sizes() finds them out, which "
            "computes x once"
        )


def _check_scheduler(x: da.Array) -> None:
    """Raise `TypeError` if dask is set to compute where an array cannot be."""
    get = get_scheduler(collections=[x])
    owner: Any = getattr(get, "__self__", None)  # of the `get` of a distributed.Client
    submit: Any = next(iter(getattr(get, "args", ())), None)  # of an executor
    if (
        get is named_schedulers["processes"]
        or type(owner).__module__.partition(".")[0] == "distributed"
        or isinstance(getattr(submit, "__self__", None), ProcessPoolExecutor)
    ):
        raise TypeError(
            "dask is set to compute in other processes, and a BlockArray does not go there: "
            "with dask.config.set(scheduler='threads'), it works"
        )


def _as_blocks(x: da.Array, *, npy: bool) -> tuple[Index, dict[int, int]]:
    """Return blocks as like the chunks of `x` as can be, and the sizes, by axis, that its chunks do not have yet."""
    blocks = tuple(int(max(chunks)) or 1 for chunks in x.chunks)
    if npy and split_axis(x.shape, blocks) is None:
        blocks = _contiguous(x, blocks)
    return blocks, {axis: n for axis, n in enumerate(blocks) if not _is_regular(x.chunks[axis], n)}


def _is_regular(chunks: Sequence[int], size: int) -> bool:
    """Whether all chunks along an axis are of a size, the last one possibly smaller. Empty ones do not count."""
    sizes = [n for n in chunks if n] or [size]
    return all(n == size for n in sizes[:-1]) and sizes[-1] <= size


def _chunk_nbytes() -> int:
    """Return how many bytes a chunk should have, by dask's configuration."""
    return int(parse_bytes(config.get("array.chunk-size")))


def _sensible_nbytes(x: da.Array) -> int:
    """Return how many bytes a chunk of `x` may have when it is rechunked: as many as one has, or as dask likes."""
    return max(int(math.prod(map(max, x.chunks)) * x.dtype.itemsize), _chunk_nbytes())


def _contiguous(x: da.Array, blocks: Index) -> Index:
    """Return blocks that follow each other in C order, and have about as many bytes as `blocks`."""
    shape = tuple(n or 1 for n in x.shape)
    most, count = _sensible_nbytes(x) // x.dtype.itemsize, math.prod(blocks)
    axis, row = 0, math.prod(shape[1:])
    while row > most:
        axis += 1
        row = math.prod(shape[axis + 1 :])
    rows = min(max(blocks[axis], count // row), most // row, shape[axis])
    return (1,) * axis + (rows, *shape[axis + 1 :])


def _aligned(x: da.Array, blocks: Index, *, rechunk: bool) -> da.Array:
    """Return `x` with chunks that consist of whole blocks, or raise the `SelectionError` that says how to get there."""
    ends = [
        next((end for end in accumulate(chunks) if end % block and end < n), None)
        for chunks, block, n in zip(x.chunks, blocks, x.shape, strict=True)
    ]
    axes = [axis for axis, end in enumerate(ends) if end is not None]
    if not axes:
        return x
    sizes = [int(max(chunks)) for chunks in x.chunks]
    for axis in axes:
        sizes[axis] = max(round(sizes[axis] / blocks[axis]), 1) * blocks[axis]
    for axis in sorted(range(x.ndim), key=lambda axis: ends[axis] is None):  # those first that change anyway
        excess = math.prod(sizes) * x.dtype.itemsize / _sensible_nbytes(x)
        if excess > 1:
            sizes[axis] = max(int(sizes[axis] / excess) // blocks[axis], 1) * blocks[axis]
    changes = {axis: n for axis, n in enumerate(sizes) if axis in axes or n < max(x.chunks[axis])}
    if rechunk:
        fitting: da.Array = x.rechunk(changes)
        return fitting
    raise SelectionError(
        f"a chunk of x ends at {ends[axes[0]]} along axis {axes[0]}, within a block of {blocks}: "
        f"x.rechunk({changes}) has chunks of whole blocks, and rechunk=True does it"
    )


# -- where it goes --------------------------------------------------------------------------------------


def _open_or_create(
    x: da.Array, path: StrPath, options: CreateOptions, *, rechunk: bool, resume: bool
) -> tuple[da.Array, BlockArray]:
    """Return `x`, rechunked if a new array needs that, and the array at a path."""
    if resume:
        if options.get("overwrite"):
            raise ValueError("resume=True goes on with what is there, overwrite=True replaces it: pass one of them")
        with contextlib.suppress(FileNotFoundError):
            return x, _resumed(path, x, options)
    npy = is_npy(os.fspath(path))
    chunks = options.get("chunks")
    if chunks is not None:
        x = _aligned(x, divided(x.shape, x.dtype, chunks, options.get("shards"), npy=npy).chunks, rechunk=rechunk)
    elif x.ndim:
        chunks, changes = _as_blocks(x, npy=npy)
        if changes and not rechunk:
            raise LayoutError(
                f"chunks of x, of up to {x.chunksize}, cannot be blocks of "
                f"{'an .npy, which follow each other in C order' if npy else 'one size'}: "
                f"x.rechunk({changes}) has chunks that can, and rechunk=True does it"
            )
        x = x.rechunk(changes) if changes else x
    options = options.copy()
    options["chunks"] = chunks
    return x, create_array(path, shape=x.shape, dtype=x.dtype, **options)


def _resumed(path: StrPath, x: da.Array, options: CreateOptions) -> BlockArray:
    """Return the array that is at a path."""
    array = open_array(
        path,
        fingerprint=options.get("fingerprint"),
        access=options.get("access", "dense"),
        guard=options.get("guard", "flag"),
        escaped=options.get("escaped", "warn"),
    )
    if array.dtype != x.dtype:
        with array:
            raise LayoutError(f"x is of {x.dtype}, {array.path!r} of {array.dtype}: x.astype({array.dtype.str!r}) fits")
    return array


# -- what is computed -----------------------------------------------------------------------------------


class _Sink:
    """Writes chunks, each where it belongs; whole, or what is pending of it."""

    def __init__(self, array: BlockArray, x: da.Array, *, only_missing: bool, flush_every: float | None) -> None:
        self._array = array
        self._edges = [list(accumulate(chunks, initial=0)) for chunks in x.chunks]
        self._only_missing = only_missing
        self._flush_every = math.inf if flush_every is None else flush_every
        self._flushed = time.monotonic()
        self._inside = 0
        self._turn = threading.Condition()

    def slices(self, index: Index) -> tuple[slice, ...]:
        """Return where a chunk lies in the array."""
        return tuple(slice(edges[i], edges[i + 1]) for edges, i in zip(self._edges, index, strict=True))

    def blocks(self, index: Index) -> tuple[slice, ...]:
        """Return of which blocks a chunk consists."""
        return tuple(
            slice(part.start // n, -(-part.stop // n))
            for part, n in zip(self.slices(index), self._array.chunks, strict=True)
        )

    def __call__(self, chunk: ArrayLike, block_id: Index) -> None:
        """Write a chunk. dask passes its index by the name of `block_id`."""
        data, shape = np.asarray(chunk), tuple(part.stop - part.start for part in self.slices(block_id))
        if data.shape != shape:
            raise LayoutError(f"chunk {block_id} of x came out with shape {data.shape}, where x says {shape}")
        with self._turn:
            self._inside += 1
        try:
            self._write(data, block_id)
        finally:
            with self._turn:
                self._inside -= 1
                self._turn.notify_all()

    def wait(self) -> None:
        """Wait until no thread is writing. dask goes on when a task fails, and leaves those alone that are running."""
        with self._turn:
            self._turn.wait_for(lambda: not self._inside)

    def _write(self, data: NDArray[Any], index: Index) -> None:
        array, where = self._array, self.slices(index)
        if not self._only_missing:
            array[where] = data
        else:
            for number in product(*(range(part.start, part.stop) for part in self.blocks(index))):
                block = array.blocks[number]
                if not block.written:
                    inner = zip(block.slices, where, strict=True)
                    array[block.slices] = data[tuple(slice(b.start - c.start, b.stop - c.start) for b, c in inner)]
        if (now := time.monotonic()) - self._flushed >= self._flush_every:
            self._flushed = now
            array.flush()


class _End:
    """The last task: closes a target that nobody else has, which is published then, or flushes a given one.

    If it is dropped without having been called, such a target is closed without publishing.
    """

    def __init__(self, array: BlockArray, *, owned: bool) -> None:
        self._array = array
        self._owned = owned

    def __call__(self, _: object) -> None:
        if self._owned:
            self._array.close()
        else:
            self._array.flush()

    def __del__(self) -> None:
        if self._owned:
            self._array.__exit__(GeneratorExit, None, None)


def _writes(x: da.Array, sink: _Sink) -> da.Array:
    """Return an array each of whose chunks, when it is computed, computes and writes one of `x`."""
    writes: da.Array = da.map_blocks(
        sink,
        x,
        name=f"blockstore-{uuid.uuid4().hex}",  # what has an effect is never what was done before
        chunks=tuple((1,) * n for n in x.numblocks),
        meta=np.empty((0,) * x.ndim, np.bool_),
    )
    return writes
