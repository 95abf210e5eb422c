"""Block: one cell of an array's chunk grid, and `BlockRange`, its bytes in the file that is being filled.

A block is a name: cheap, made when asked for, and the same for everybody. What is known of it is known to its `Shard`.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from blockstore.errors import WriterBusyError
from blockstore.files import Files
from blockstore.layouts.grid import Grid, Index, indices
from blockstore.ranges import AllocatedRange
from blockstore.receipts import WriteReceipt
from blockstore.shard import Shard
from blockstore.store import BlockStore
from blockstore.views import BYTE, Loan
from blockstore.writers import start_writeback


class BlockRange(AllocatedRange):
    """The bytes of a block in a file that is being filled. All ranges of one block share what is known of it."""

    __slots__ = ("_number", "_shard", "_was_touched")

    _owner: BlockStore
    _shard: Shard
    _number: int
    _was_touched: bool

    @property
    def _sequence(self) -> int | None:
        sequence = int(self._shard.sequences[self._number])
        return None if sequence < 0 else sequence

    @_sequence.setter
    def _sequence(self, sequence: int | None) -> None:
        self._shard.note(self._number, sequence)

    @property
    def _bar(self) -> str | Loan | None:
        return self._shard.escaped.get(self._number)

    @_bar.setter
    def _bar(self, loan: str | Loan | None) -> None:
        if not isinstance(loan, Loan):
            self._shard.escaped.pop(self._number, None)
        else:
            self._shard.escaped[self._number] = loan

    @property
    def _touched(self) -> bool:
        return self._was_touched

    @_touched.setter
    def _touched(self, touched: bool) -> None:
        self._was_touched = touched
        self._shard.touched[self._number] = True

    def _claim(self, token: "ref[Any]", rewrite: bool, verb: str = "write") -> None:
        """Become the one writer, and give a fresh block the fill value."""
        shard, owner, number = self._shard, self._owner, self._number
        with shard.lock:  # so that whoever publishes or closes the file sees this claim, or is seen here
            shard.handed.pop(id(self), None)
            if shard.store is not owner and owner._down is not None and not shard.plan.is_closed:
                raise WriterBusyError(f"cannot {verb} {self._where()}: its file was closed meanwhile; try again")
            held = owner._claims.setdefault(self._start, token)
            if held is not token:
                self._contest(held, token, verb)
        try:
            was_written = self._sequence is not None
            if was_written or self._bar is not None or owner._down is not None:
                self._admit(rewrite, verb)
            self._was_touched = bool(shard.touched[number])
            shard.touched[number] = True
            if not was_written and (self._was_touched or not shard.plan.fill_is_zero):
                layout = self._layout or ((self._nbytes,), BYTE)
                shared = owner._mapped.map
                np.ndarray(layout[0], layout[1], shared, self._start, *layout[2:])[...] = shard.plan.fill_value
                self._was_touched = True
        except BaseException:
            owner._claims.pop(self._start, None)
            raise

    def __del__(self) -> None:
        self._shard.handed.pop(id(self), None)

    def _where(self) -> str:
        return f"block {self._shard.block_index(self._number)} of {self._shard.plan.name!r}"


_new: Callable[[type[Any]], Any] = object.__new__


def block_range(shard: Shard, number: int, *, rewrite: bool) -> BlockRange:
    """Make the range of a block, in the file where its shard is being filled; that is made if need be."""
    layout = shard.layout
    start, nbytes, shape, strides = layout.place(number)
    r: BlockRange = _new(BlockRange)
    r._shard, r._number = shard, number
    r._owner = shard.store_to_write(number, rewrite=rewrite, token=id(r))
    r._start, r._stop, r._nbytes, r._tag = start, start + nbytes, nbytes, number
    r._layout = r._shown = (shape, layout.dtype) if strides is None else (shape, layout.dtype, strides)
    r._was_touched = bool(shard.touched[number])
    return r


class Owner(Protocol):
    """What a block needs of its array."""

    _grid: Grid
    _files: Files


class Block:
    """One cell of an array's chunk grid. Made by `BlockArray.blocks` and `BlockArray.pending`.

    Safe to share among threads: the second of two writers is refused with `WriterBusyError`.

    Attributes
    ----------
    index : tuple of int
        Where it lies in the grid of blocks.
    slices : tuple of slice
        Where it lies in the array.
    shape : tuple of int
        Elements along each axis; fewer than `BlockArray.chunks` at the edge.
    dtype : dtype
    nbytes : int
        Bytes of its elements.
    written : bool
        Whether a writer has left it cleanly.
    """

    __slots__ = ("_array", "index")

    def __init__(self, array: Owner, index: Index) -> None:
        self._array = array
        self.index = index

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where it lies in the array."""
        return self._array._grid.slices(self.index)

    @property
    def shape(self) -> Index:
        """Elements along each axis."""
        return self._array._grid.block_shape(self.index)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The array's dtype."""
        return self._array._grid.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        count = self.dtype.itemsize
        for n in self.shape:
            count *= n
        return count

    @property
    def written(self) -> bool:
        """Whether a writer has left it cleanly, and it is not being rewritten."""
        shard, number = self._array._files.place(self.index)
        return shard.is_written(number)

    def writer(self, *, rewrite: bool = False) -> AbstractContextManager[NDArray[Any]]:
        """Return a context manager that lends the block as a writable array.

        Parameters
        ----------
        rewrite : bool
            Allow writing a block that is written already, which is lent as it is. Of a published file a working copy is
            made first: published files never change.

        Returns
        -------
        context manager
            ``with b.writer() as a:`` binds `a` to a `numpy.ndarray` of the block's shape and dtype, which holds the
            fill value, on the file's memory map: C-ordered, or strided at an edge of a Zarr array. A clean exit makes
            `a` read-only and the block written. If the body raises, the block is pending, also one that was written
            before; what is published of it stays published.

        Raises
        ------
        AlreadyWrittenError, WriterBusyError, EscapedViewError
            If the block may not be written now.
        ReadOnlyStoreError, ClosedStoreError
            If the array may not be written.
        OSError
            If the file for its shard cannot be made: the disk is full, say.

        Notes
        -----
        Some microseconds, in and out. If the fill value is not zero, and where an earlier attempt may have left
        something, filling with it takes one more pass over the block.
        """
        shard, number = self._array._files.place(self.index)
        return block_range(shard, number, rewrite=rewrite).writer(rewrite=rewrite)

    def write(self, data: Any, *, rewrite: bool = False) -> WriteReceipt:
        """Copy `data`, an array of the block's shape and dtype, or as many bytes, into the block in one call.

        Returns
        -------
        WriteReceipt

        Raises
        ------
        LengthError, LayoutError, DtypeError
            If `data` does not match; before a byte moves.
        AlreadyWrittenError, WriterBusyError, EscapedViewError, ReadOnlyStoreError, ClosedStoreError, OSError
            As in `writer`.
        """
        shard, number = self._array._files.place(self.index)
        r = block_range(shard, number, rewrite=rewrite)
        receipt = r.write(data, rewrite=rewrite)
        if shard.plan.options.access == "dense":
            start_writeback(r)
        return receipt

    def read(self) -> NDArray[Any]:
        """Return the block, read-only and without a copy; if it is not written, the fill value.

        Returns
        -------
        ndarray of the block's shape and dtype
            Valid for as long as it lives, also when the array is closed.
        """
        shard, number = self._array._files.place(self.index)
        found = shard.read(number)
        return np.broadcast_to(np.asarray(shard.plan.fill_value, self.dtype), self.shape) if found is None else found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Block):
            return NotImplemented
        return self._array is other._array and self.index == other.index

    def __hash__(self) -> int:
        return hash((id(self._array), self.index))

    def __repr__(self) -> str:
        where = ", ".join(f"{part.start}:{part.stop}" for part in self.slices)
        plan = self._array._files.plan
        if plan.is_closed:
            return f"<Block {self.index} = [{where}] of {plan.name!r}, closed>"
        shard, number = self._array._files.place(self.index)
        return f"<Block {self.index} = [{where}] of {plan.name!r}, {shard.state_of(number)}>"


class BlockGrid:
    """The blocks of an array, as `BlockArray.blocks`: indexed by one int for each axis, iterated in C order."""

    __slots__ = ("_array", "shape")

    def __init__(self, array: Owner, shape: Index) -> None:
        self._array = array
        self.shape = shape
        """How many blocks there are along each axis."""

    def __len__(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count

    def __getitem__(self, key: int | tuple[int, ...]) -> Block:
        items = key if isinstance(key, tuple) else (key,)
        if len(items) != len(self.shape):
            whole = ", ".join([*map(str, items), *["0"] * (len(self.shape) - len(items))])
            hint = f", such as blocks[{whole}]" if len(items) < len(self.shape) else ""
            raise IndexError(f"a block is named by one int for each of {len(self.shape)} axes{hint}: {key!r} was given")
        index = []
        for axis, (item, n) in enumerate(zip(items, self.shape, strict=True)):
            try:
                i = operator.index(item)
            except TypeError:
                raise TypeError(f"a block is named by ints, one for each axis, not by {key!r}") from None
            if not -n <= i < n:
                raise IndexError(f"block {i} is out of bounds along axis {axis}, which has {n} blocks")
            index.append(i % n)
        return Block(self._array, tuple(index))

    def __iter__(self) -> Iterator[Block]:
        return (Block(self._array, index) for index in indices(self.shape))

    def __repr__(self) -> str:
        return f"<BlockGrid of {' x '.join(map(str, self.shape))} blocks>"
