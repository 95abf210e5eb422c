"""Indexing: which elements and which blocks of an array NumPy's basic indexing takes, and where in the result they go.

An index becomes a `Selection`: a `range` of indices for each axis, and what is still to be done once these elements are
gathered. Shapes, chunks, starts and stops are numbers of elements along an axis, blocks are numbered from 0 along each.
This module knows no files, no dtypes and no data.

Examples
--------
>>> import numpy as np
>>> a = np.arange(10)
>>> (axis,), post = parse(slice(8, 1, -3), a.shape)
>>> gathered = np.empty(len(axis), a.dtype)
>>> for i in block_range(axis, 4):
...     block = a[4 * i : 4 * i + 4]
...     if place := overlap(axis, 4 * i, 4 * i + 4):
...         gathered[place[0]] = block[place[1]]
>>> gathered[post], a[8:1:-3]
(array([8, 5, 2]), array([8, 5, 2]))
"""

import operator
from collections.abc import Sequence
from types import EllipsisType
from typing import NamedTuple

from blockstore.errors import SelectionError

__all__ = ["Selection", "aligned", "block_range", "is_plain", "overlap", "parse"]

Item = int | slice | EllipsisType | None
"""One part of a basic index."""

_MAX_RANK = 64
"""The axes that an array of NumPy 2 may have."""


class Selection(NamedTuple):
    """The elements that an index takes, and the shape NumPy gives them."""

    axes: tuple[range, ...]
    """For each axis of the array the indices taken; that of an integer has length 1. Steps may be negative."""
    post: tuple[Item, ...]
    """What to index the gathered array, of shape ``tuple(map(len, axes))``, with for the result that NumPy gives."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result: what data that is assigned must broadcast to."""
        shape: list[int] = []
        axes = iter(self.axes)
        for item in self.post:
            if item is None:
                shape.append(1)
            elif item is not Ellipsis:
                axis = next(axes)
                if isinstance(item, slice):
                    shape.append(len(axis))
        return tuple(shape)

    @property
    def inverse(self) -> tuple[Item, ...]:
        """What to index data of shape `shape` with, to give it the shape of the gathered array, without a copy."""
        undo: list[Item] = []
        for item in self.post:
            if item is None:
                undo.append(0)
            elif item is not Ellipsis:
                undo.append(item if isinstance(item, slice) else None)
        return (*undo, ...)


def parse(key: object, shape: tuple[int, ...]) -> Selection:
    """Return what an index takes from an array.

    Parameters
    ----------
    key : object
        What stands between the brackets: integers, slices, ``...``, None, or a tuple of these.
    shape : tuple of int
        Elements of the array along each axis.

    Returns
    -------
    Selection
        The indices along each axis, and how the result gets its shape.

    Raises
    ------
    IndexError
        If an index is out of bounds, if there are too many of them or two ellipses, if the result had more than 64
        axes, or if anything else than basic indexing is asked for.
    TypeError
        If a bound or step of a slice is neither an integer nor None.
    ValueError
        If the step of a slice is zero.

    Notes
    -----
    O(axes), however many elements are taken.

    Examples
    --------
    >>> parse((3, slice(None, None, -2)), (10, 5))
    Selection(axes=(range(3, 4), range(4, -1, -2)), post=(0, slice(None, None, None)))
    >>> parse((..., None, -1), (10,))
    Selection(axes=(range(9, 10),), post=(None, 0, Ellipsis))
    """
    items, has_ellipsis = _items(key, len(shape))
    axes: list[range] = []
    post: list[Item] = []
    for item in items:
        if item is None:
            post.append(None)
            continue
        n = shape[len(axes)]
        if isinstance(item, slice):
            axes.append(_taken(item, n))
            post.append(slice(None))
        else:
            axes.append(_one(item, n, axis=len(axes)))
            post.append(0)
    rank = len(post) - post.count(0)
    if rank > _MAX_RANK:
        raise IndexError(f"an array has at most {_MAX_RANK} axes, the result of this index would have {rank}")
    if has_ellipsis:
        post.append(Ellipsis)
    return Selection(tuple(axes), tuple(post))


_PLAIN = {int, slice, EllipsisType}


def is_plain(key: object) -> bool:
    """Whether an index is so plain that NumPy itself may be asked: it takes nothing else by it."""
    return type(key) in _PLAIN or (type(key) is tuple and all(type(item) in _PLAIN for item in key))


def block_range(axis: range, chunk: int) -> Sequence[int]:
    """Return the blocks along an axis that indices lie in, ascending.

    Parameters
    ----------
    axis : range
        The indices, at least 0, in either direction.
    chunk : int
        Elements of a block along the axis, at least 1.

    Returns
    -------
    range or tuple of int
        The numbers of the blocks, none of which is without an index; a range wherever one can say it.

    Notes
    -----
    O(1), or O(indices) where a step is longer than a block and no multiple of it, so that each has its own block.

    Examples
    --------
    >>> block_range(range(3, 9), 4), block_range(range(30, -1, -10), 4)
    (range(0, 3), (0, 2, 5, 7))
    """
    if not axis:
        return range(0)
    ascending = axis if axis.step > 0 else axis[::-1]
    first, last = ascending[0] // chunk, ascending[-1] // chunk
    if ascending.step <= chunk:
        return range(first, last + 1)
    if ascending.step % chunk == 0:
        return range(first, last + 1, ascending.step // chunk)
    return tuple(i // chunk for i in ascending)


def overlap(axis: range, start: int, stop: int) -> tuple[slice, slice] | None:
    """Return where the part of a selection that lies in one block goes, and where in the block it is.

    Parameters
    ----------
    axis : range
        The indices taken along an axis, in either direction.
    start, stop : int
        The elements of the block along this axis, ``[start, stop)``.

    Returns
    -------
    tuple of slice, or None
        The positions in the gathered result, with step 1, and the elements of the block, from its start, in the same
        order; None if the block has none of the indices.

    Notes
    -----
    O(1).

    Examples
    --------
    >>> overlap(range(8, 1, -3), 4, 8)
    (slice(1, 2, None), slice(1, 2, 1))
    >>> overlap(range(9, -1, -3), 0, 4)
    (slice(2, 4, None), slice(3, None, -3))
    """
    if axis.step > 0:
        begin = -((axis.start - start) // axis.step)
        end = -((axis.start - stop) // axis.step)
    else:
        begin = (axis.start - stop) // -axis.step + 1
        end = (axis.start - start) // -axis.step + 1
    begin, end = max(begin, 0), min(end, len(axis))
    if begin >= end:
        return None
    return slice(begin, end), _as_slice(axis[begin:end], start)


def aligned(key: object, shape: tuple[int, ...], chunks: tuple[int, ...]) -> tuple[tuple[range, ...], Selection]:
    """Return the blocks that an assignment replaces, all of them whole and in order.

    Parameters
    ----------
    key : object
        What stands between the brackets, as in `parse`.
    shape : tuple of int
        Elements of the array along each axis.
    chunks : tuple of int
        Elements of a block along each axis, at least 1; a block at the edge of the array has what is left.

    Returns
    -------
    blocks : tuple of range
        For each axis the numbers of the blocks, with step 1. If nothing is selected, all are empty.
    selection : Selection
        The elements, each axis with step 1: data broadcast to `Selection.shape` and indexed with `Selection.inverse`
        has the shape of the elements.

    Raises
    ------
    SelectionError
        If part of a block is selected, or elements with a step other than 1. It names the smallest selection of whole
        blocks that has all these elements.
    IndexError, TypeError, ValueError
        As in `parse`.

    Notes
    -----
    O(axes).

    Examples
    --------
    >>> aligned((slice(4, None), 0), (10, 1), (4, 1))
    ((range(1, 3), range(0, 1)), Selection(axes=(range(4, 10), range(0, 1)), post=(slice(None, None, None), 0)))
    >>> aligned(slice(10, 300), (1000, 8192), (256, 8192))
    Traceback (most recent call last):
        ...
    blockstore.SelectionError: x[10:300] cuts blocks of (256, 8192): the nearest aligned selection is x[0:512]
    """
    selection = parse(key, shape)
    if not all(selection.axes):
        return tuple(range(0) for _ in shape), selection
    blocks = tuple(
        range(min(r[0], r[-1]) // chunk, max(r[0], r[-1]) // chunk + 1)
        for r, chunk in zip(selection.axes, chunks, strict=True)
    )
    whole = tuple(
        range(b.start * chunk, min(b.stop * chunk, n)) for b, chunk, n in zip(blocks, chunks, shape, strict=True)
    )
    if selection.axes != whole:
        raise SelectionError(_refusal(key, selection, whole, chunks))
    return blocks, selection


def _items(key: object, rank: int) -> tuple[list[int | slice | None], bool]:
    """Return the parts of an index, with slices in place of an ellipsis and at the end, and whether there was one."""
    before: list[int | slice | None] = []
    after: list[int | slice | None] = []
    items = before
    for item in key if isinstance(key, tuple) else (key,):
        if item is not Ellipsis:
            items.append(_basic(item))
        elif items is after:
            raise IndexError("an index can only have a single ellipsis ('...')")
        else:
            items = after
    given = sum(item is not None for item in (*before, *after))
    if given > rank:
        raise IndexError(f"too many indices for array: array is {rank}-dimensional, but {given} were indexed")
    return [*before, *[slice(None)] * (rank - given), *after], items is after


def _basic(item: object) -> int | slice | None:
    """Return an integer as an int, a slice or None as it is, and refuse all else."""
    if type(item) is int or item is None or isinstance(item, slice):
        return item
    if hasattr(item, "__index__") and not isinstance(item, bool):
        try:
            return operator.index(item)
        except TypeError:  # an array that is no integer has the method, too
            pass
    raise IndexError(
        f"blockstore takes basic indexing: integers, slices, `...` and None, not {type(item).__name__}; "
        "`np.asarray(x)[...]` or dask (`blockstore.dask.from_array(x)[...]`) take the rest"
    )


def _one(index: int, n: int, *, axis: int) -> range:
    if not -n <= index < n:
        raise IndexError(f"index {index} is out of bounds for axis {axis} with size {n}")
    return range(index % n, index % n + 1)


def _taken(item: slice, n: int) -> range:
    """Return the indices that a slice takes, with step 1 where there are fewer than two."""
    taken = range(*item.indices(n))
    if not taken:
        return range(0)
    return taken if len(taken) > 1 else range(taken[0], taken[0] + 1)


def _as_slice(taken: range, start: int) -> slice:
    """Return indices, at least one, as a slice of what begins at `start`."""
    first, last = taken[0] - start, taken[-1] - start
    if first == last:
        return slice(first, first + 1, 1)
    if taken.step > 0:
        return slice(first, last + 1, taken.step)
    return slice(first, last - 1 if last else None, taken.step)


def _refusal(key: object, selection: Selection, whole: tuple[range, ...], chunks: tuple[int, ...]) -> str:
    """Say why an assignment is refused, and which one, of the blocks that have all its elements, is not."""
    items: list[Item] = [
        item if item is Ellipsis else _basic(item) for item in (key if isinstance(key, tuple) else (key,))
    ]
    skipped = len(selection.axes) - sum(item is not None and item is not Ellipsis for item in items)
    nearest: list[Item] = []
    axis = 0
    for item in items:
        if item is None or item is Ellipsis:
            nearest.append(item)
            axis += skipped if item is Ellipsis else 0
        else:
            widened = whole[axis]
            nearest.append(item if selection.axes[axis] == widened else slice(widened.start, widened.stop))
            axis += 1
    verb = "steps through" if any(r.step != 1 for r in selection.axes) else "cuts"
    return f"{_printed(items)} {verb} blocks of {chunks}: the nearest aligned selection is {_printed(nearest)}"


def _printed(items: Sequence[Item]) -> str:
    """Return an index as it would stand in a program, of an array `x`."""
    return f"x[{', '.join(map(_printed_item, items)) or '()'}]"


def _printed_item(item: Item) -> str:
    if item is Ellipsis:
        return "..."
    if not isinstance(item, slice):
        return str(item)
    bounds = ["" if bound is None else str(operator.index(bound)) for bound in (item.start, item.stop, item.step)]
    return ":".join(bounds if bounds[2] else bounds[:2])
