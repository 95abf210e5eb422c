"""BlockArray: an array whose chunk grid is laid over the files that its shards are, filled block by block.

Reading is NumPy's basic indexing; writing is by whole blocks. This module joins `indexing` (which blocks), `shard`
(where their bytes are) and `fill` (who fills them). How an array comes to be is in `creation`.

Examples
--------
>>> import numpy as np
>>> import blockstore as bs
>>> x = bs.create_array(tmp_path / "x.npy", shape=(1000, 300), dtype="f8", chunks=(256, 300))
>>> for b in x.pending():
...     with b.writer() as a:
...         a[:] = b.index[0]
>>> x
<BlockArray 'x.npy': (1000, 300) float64, 4 blocks of (256, 300), 4 written, 0 durable, open "r+">
>>> x.close()
>>> np.load(tmp_path / "x.npy")[[0, 300, 999], 5]
array([0., 1., 3.])
"""

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from html import escape
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from blockstore import fill, picture
from blockstore.blocks import Block, BlockGrid
from blockstore.errors import AlreadyWrittenError
from blockstore.files import Files
from blockstore.indexing import aligned, is_plain
from blockstore.layouts.grid import Grid, Index
from blockstore.reading import as_source, parts, spread, take
from blockstore.shard import Shard
from blockstore.verifying import verify

if TYPE_CHECKING:
    from concurrent.futures import Executor


_MOST_SHOWN = 1 << 24
_MOST_FILES_SHOWN = 10_000
"""Blocks and files up to which there is a picture of them all."""


class BlockArray:
    """An array that many threads fill block by block. Made by `create_array` and `open_array`; safe to share.

    A context manager: leaving it closes, which publishes what is written; leaving it by an exception flushes and keeps
    everything to go on with `open_array`, and publishes nothing.

    Attributes
    ----------
    path : str
        Absolute path.
    shape, chunks, shards : tuple of int
        Elements along each axis: of the array, of a block, of a file.
    dtype : dtype
    ndim, size, nbytes : int
        Axes, elements, and bytes of these.
    fill_value : scalar of `dtype`
        What is read where nothing is written.
    attributes : dict
        A copy of the user's own, as Zarr's; empty for ``.npy``.
    dimension_names : tuple of (str or None), or None
    blocks : BlockGrid
        ``x.blocks[3, 0]`` is a `Block`.
    mode : {"r", "r+"}
    closed : bool
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._plan = files.plan
        self._grid = files.plan.grid

    # -- what it is -----------------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """Absolute path."""
        return self._plan.path

    @property
    def shape(self) -> Index:
        """Elements along each axis."""
        return self._grid.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype, in the byte order of the file."""
        return self._grid.dtype

    @property
    def ndim(self) -> int:
        """How many axes it has, at least 1."""
        return len(self._grid.shape)

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self._grid.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self._grid.nbytes

    @property
    def chunks(self) -> Index:
        """Elements of a block along each axis; blocks at the edge have fewer."""
        return self._grid.chunks

    @property
    def shards(self) -> Index:
        """Elements of a file along each axis."""
        return self._grid.shards

    @property
    def fill_value(self) -> np.generic:
        """What is read where nothing is written."""
        return self._plan.fill_value

    @property
    def attributes(self) -> dict[str, Any]:
        """A copy of the user's own, as Zarr's."""
        metadata = self._plan.metadata
        return {} if metadata is None else dict(metadata.attributes)

    @property
    def dimension_names(self) -> tuple[str | None, ...] | None:
        """The names of the axes, if they have any."""
        metadata = self._plan.metadata
        return None if metadata is None else metadata.dimension_names

    @property
    def blocks(self) -> BlockGrid:
        """The grid of blocks: ``x.blocks[3, 0]`` is a `Block`; iterates in C order."""
        return BlockGrid(self, self._grid.blocks)

    @property
    def mode(self) -> str:
        """``"r+"`` or ``"r"``."""
        return self._plan.mode

    @property
    def closed(self) -> bool:
        """Whether the array may not be used any more."""
        return self._plan.is_closed

    @property
    def written(self) -> NDArray[np.bool_]:
        """Which blocks are written: an array of bool over the grid of blocks. A copy. O(blocks)."""
        return self._files.over_blocks(Shard.written)

    # -- filling --------------------------------------------------------------------------------------

    def pending(self) -> Iterator[Block]:
        """Iterate over the blocks that are not written, in C order within each file, and the files in C order.

        A report of when each file is come to: what others write meanwhile may be among them.
        """
        return (Block(self, index) for index in self._files.pending())

    def fill(
        self,
        func: Callable[[NDArray[Any], Block], object],
        *,
        workers: int | None = None,
        executor: "Executor | None" = None,
        progress: bool | Callable[[int], object] = False,
        flush_every: float | None = 30.0,
    ) -> int:
        """Call ``func(a, block)`` for each block that is not written, in many threads, to fill the array `a`.

        Parameters
        ----------
        func : callable
            Called with a writable ndarray of the block's shape and dtype, which holds the fill value, and the `Block`.
            What it returns is ignored. It should release the GIL, as NumPy does.
        workers : int, optional
            Threads. Default: as many as there are processors for this process.
        executor : concurrent.futures.Executor, optional
            Where to run instead; it is not shut down. `workers` then says how many tasks it is given at a time.
        progress : bool or callable
            True shows a bar with bytes per second and time left, by tqdm: ``pip install 'ndblockstore[progress]'``. A
            callable is called with the bytes of what has been filled since the last call.
        flush_every : float, optional
            Seconds after which what is written is made durable, beside the filling. None: not before the end.

        Returns
        -------
        int
            Blocks that this call has filled. At the end all that is written is durable.

        Raises
        ------
        FillError
            If calls have failed: an `ExceptionGroup` of what they raised. All other blocks are written, and calling
            again does only what is missing.
        PoisonedStoreError, OSError
            If a flush failed, or the file of a shard could not be made; the fill ends there.
        KeyboardInterrupt
            At once, after Ctrl-C. Calls that are running end by themselves, and no other begins.

        Notes
        -----
        A few microseconds for each block beside the call. Each file of an array of several is published as soon as it
        is complete.
        """
        self._plan.refuse_writing()
        written = self.written
        last = time.monotonic()

        def idle() -> None:
            nonlocal last
            self._files.check()
            self._files.publish_completed()
            if flush_every is not None and time.monotonic() - last >= flush_every:
                self.flush()
                last = time.monotonic()

        try:
            return fill.run(
                (index for index in self._files.pending() if not written[index]),
                int(np.count_nonzero(~written)),
                partial(_fill_block, self, func),
                workers=workers,
                executor=executor,
                progress=progress,
                total_nbytes=self.nbytes,
                done_nbytes=_nbytes_of(self._grid, written),
                block_nbytes=self._grid.block_nbytes,
                idle=idle,
                where=self._plan.name,
            )
        finally:
            if not isinstance(sys.exception(), KeyboardInterrupt | SystemExit | GeneratorExit):
                self.flush()

    def flush(self) -> int:
        """Make what is written durable; of an array of several files, publish those that are complete.

        Returns
        -------
        int
            How many blocks this call has made durable.

        Raises
        ------
        PoisonedStoreError
            If a sync failed, now or before: open the array anew to go on.

        Notes
        -----
        Two syncs for each file that has something new, whatever the number of blocks; others go on meanwhile.
        """
        self._plan.refuse_writing()
        return self._files.flush()

    def publish(self, *, partial: bool = False) -> None:
        """Bring what is written under the final name, in one step for each file, and go on.

        Parameters
        ----------
        partial : bool
            Of an incomplete ``.npy``, put a copy under the final name, with zeros where nothing is written. A reader
            cannot tell. Zarr says itself what is not written, so parts of it are published in any case.

        Raises
        ------
        NotWrittenError
            If an ``.npy`` is incomplete, and `partial` was not asked for; or if a block that is published was opened
            for rewriting and is not written yet.
        FileExistsError
            If something else came to be where an ``.npy`` is to go.
        WriterBusyError
            If somebody is writing.
        PoisonedStoreError, OSError
            If the disk fails. Nothing that is durable is lost: open the array anew to go on.

        Notes
        -----
        A published file never changes. To write a part of it again, or what is missing of it, a working copy of that
        file is made first, which takes the time and space of what is written of it.
        """
        self._plan.refuse_writing()
        self._files.publish(partial=partial)

    def verify(self, *, progress: Callable[[int], object] | None = None) -> NDArray[np.intp]:
        """Read back what is written, and compare the checksums.

        Returns
        -------
        ndarray of int, shape (n, ndim)
            Indices of the blocks whose bytes differ from what was written; empty if all is well.

        Raises
        ------
        ValueError
            If there are no checksums: the array was created without ``checksum=``, or published without
            ``keep_journal=True``.
        """
        self._plan.refuse_closed()
        wrong = [shard.block_index(n) for shard in self._files.all() for n in verify(shard, progress)]
        return np.array(wrong, np.intp).reshape(len(wrong), self.ndim)

    def close(self) -> None:
        """Flush, publish what is written, and use the files no more. Closing twice does nothing.

        An ``.npy`` that is not complete stays hidden, to go on with `open_array`; so does a file of a Zarr array in
        which a block that is published was opened for rewriting and is not written. Arrays that were read stay valid.
        Writers that are still inside get `ClosedStoreError` instead of a receipt, and their block stays pending.

        Raises
        ------
        PoisonedStoreError, OSError
            If the disk failed, or if something else came to be where an ``.npy`` is to go; the array is closed all the
            same, and nothing that was durable is lost.
        """
        self._files.close(publish=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.close(publish=kind is None)

    def __del__(self) -> None:
        plan = getattr(self, "_plan", None)
        if plan is not None and not plan.is_closed:
            try:
                if plan.mode == "r+" and any(shard.store is not None for shard in self._files.known()):
                    warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)
            finally:
                self._files.close(publish=False)

    # -- reading and assigning ------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Any:
        """Return what NumPy's basic indexing takes: read-only, and without a copy where the layout allows.

        No copy is made of a part of one block, or of one file whose blocks follow each other, if all of it is written.
        What is not written reads as the fill value.

        Raises
        ------
        IndexError
            If the index is out of bounds, or none of basic indexing.
        FormatError
            If a file is damaged.
        """
        if (whole := self._plan.whole) is not None and is_plain(key):
            return whole[key]
        self._plan.refuse_closed()
        return take(self._files, key)

    def __setitem__(self, key: Any, data: ArrayLike) -> None:
        """Write whole blocks, written or not, with data that broadcasts to them and is cast as NumPy's assignment does.

        Raises
        ------
        SelectionError
            If the selection cuts blocks; the message names the nearest one that does not.
        ValueError
            If the data does not broadcast; before a byte moves.
        WriterBusyError, EscapedViewError, ReadOnlyStoreError, ClosedStoreError, OSError
            As in `Block.writer`.
        """
        self._plan.refuse_writing()
        _, selection = aligned(key, self.shape, self.chunks)
        source = spread(self._files.apart(as_source(data, self.dtype)), selection)
        for index, targets, _ in parts(self._files, selection):
            Block(self, index).write(source[targets].astype(self.dtype, copy=False), rewrite=True)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        self._plan.refuse_closed()
        if copy is False and dtype is not None and self.dtype != dtype:
            raise ValueError(f"cannot convert {self.dtype} to {np.dtype(dtype)} without a copy")
        array: NDArray[Any] = take(self._files, ..., copy=copy)
        return array if dtype is None else array.astype(dtype, copy=False)

    def __len__(self) -> int:
        return self.shape[0]

    def __dask_tokenize__(self) -> tuple[object, ...]:
        self._plan.refuse_closed()
        grid = self._grid
        what = (self.path, grid.shape, grid.dtype.str, grid.chunks, grid.shards, self.fill_value.tobytes())
        return (type(self).__name__, *what, *(shard.identity() for shard in self._files.all()))

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(f"{self!r} does not pickle: pass its path, and open_array it there")

    # -- showing --------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        if sys.is_finalizing():  # NumPy may want to import something to name a dtype
            return f"<BlockArray {self._plan.name!r}>"
        what = f"{self.shape} {self.dtype}"
        count = math.prod(self._grid.blocks)
        blocks = f"{count} block{'s' * (count != 1)} of {self.chunks}"
        if self.closed:
            return f"<BlockArray {self._plan.name!r}: {what}, {blocks}, closed>"
        written, durable, looked_at = self._files.counts()
        files = math.prod(self._grid.files)
        where = "" if looked_at == files else f" in the {looked_at} of {files} files that were looked at"
        return (
            f"<BlockArray {self._plan.name!r}: {what}, {blocks}, {written} written, {durable} durable{where}, "
            f'open "{self.mode}">'
        )

    def _repr_html_(self) -> str:
        if self.closed or math.prod(self._grid.blocks) > _MOST_SHOWN or math.prod(self._grid.files) > _MOST_FILES_SHOWN:
            return f"<pre>{escape(repr(self))}</pre>"
        states = self._files.over_blocks(Shard.written).astype(np.uint8)
        states += self._files.over_blocks(Shard.durable)
        files = math.prod(self._grid.files)
        facts = [
            ("shape", str(self.shape)),
            ("dtype", str(self.dtype)),
            ("bytes", f"{self.nbytes:,}"),
            ("blocks", f"{states.size:,} of {self.chunks}"),
            *([("files", f"{files:,} of {self.shards}")] if files > 1 else []),
            ("fill value", str(self.fill_value)),
        ]
        return picture.html(f"BlockArray {self._plan.name}", facts, states)


def _fill_block(array: BlockArray, func: Callable[[NDArray[Any], Block], object], index: Index) -> int:
    """Fill one block, and return its bytes."""
    block = Block(array, index)
    try:
        with block.writer() as a:
            func(a, block)
    except AlreadyWrittenError:
        if not block.written:
            raise  # it is func's own
    return block.nbytes


def _nbytes_of(grid: Grid, blocks: NDArray[np.bool_]) -> int:
    """Return the bytes of the elements of some blocks, given over the grid of blocks."""
    lengths = np.full(int(np.count_nonzero(blocks)), grid.dtype.itemsize, np.int64)
    for i, n, chunk in zip(np.nonzero(blocks), grid.shape, grid.chunks, strict=True):
        lengths *= np.minimum(chunk, n - i * chunk)
    return int(lengths.sum())
