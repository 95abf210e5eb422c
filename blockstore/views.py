"""The guard: lend a plain ndarray over a buffer, take it back, and find what escaped.

A `Loan` makes two arrays: a *root* over the buffer and a *view* of the root. Only the view is lent.
NumPy collapses the base of every array derived from the view (a slice, a transpose, a field) to the
root, so references to the root count what escaped, and the borrower's own name is not among them.
What keeps the view itself instead (a memoryview, `numpy.lib.stride_tricks.as_strided`, a masked array) looks
like a mere alias in the counts and is told apart by asking the garbage collector. Reference counts differ between
Pythons (3.14 borrows some), so the baseline is measured at import, by the code that is later used.

CPython cannot revoke a pointer: finding is a diagnostic. Not found are raw addresses, DLPack capsules, what was
built from ``__array_interface__``, `numpy.nditer`, kernels that run on without the GIL, and what holds the view itself
where the borrower's own name for it is gone before the loan is taken back. This module knows shapes, dtypes and
buffers; nothing of files or ranges.

Examples
--------
>>> import numpy as np
>>> loan = Loan()
>>> a = loan.lend(np.ndarray(4, "u1", bytearray(4)))
>>> a[:] = 7
>>> row = a[1:3]
>>> loan.take_back(), loan.count(), a.flags.writeable
(True, 1, False)
>>> del row
>>> loan.count()
0
"""

import gc
import math
import operator
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from sys import getrefcount
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.typing import DTypeLike, NDArray

from blockstore.errors import DtypeError, LayoutError

BYTE = np.dtype(np.uint8)

Shape = tuple[int, ...]
Layout = tuple[Shape, np.dtype[Any]] | tuple[Shape, np.dtype[Any], Shape]
"""Shape, dtype and, of what is not C-ordered, strides in bytes."""

_MAX_NBYTES = (1 << 63) - 1
_MAX_NDIM = 64  # NPY_MAXDIMS of NumPy 2


def check_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Return `dtype` as a `numpy.dtype` whose items are plain bytes, or raise `DtypeError`."""
    try:
        checked = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError) as error:
        raise DtypeError(f"not a dtype: {dtype!r} ({error})") from None
    if checked.hasobject:
        raise DtypeError(f"dtype {checked} holds Python objects, whose addresses mean nothing in a file")
    if checked.itemsize == 0:
        raise DtypeError(f"dtype {checked!r} has an itemsize of 0 bytes: give it a length, such as 'S16'")
    return checked


def check_shape(shape: int | Sequence[int]) -> Shape:
    """Return `shape` as a tuple of non-negative ints, or raise `LayoutError`."""
    try:
        axes = tuple(map(operator.index, shape if isinstance(shape, Iterable) else (shape,)))
    except TypeError:
        raise LayoutError(f"a shape is an int or a sequence of ints, not {shape!r}") from None
    if any(n < 0 for n in axes):
        raise LayoutError(f"shape {axes} has a negative axis")
    return axes


def check_layout(shape: int | Sequence[int] | None, dtype: DTypeLike | None, nbytes: int | None = None) -> Layout:
    """Return shape and dtype of a C-ordered array that needs at most `nbytes` bytes (None: any number).

    Without `dtype` the items are bytes; without `shape` the array is one-dimensional and takes `nbytes`.
    """
    items = BYTE if dtype is None else check_dtype(dtype)
    if shape is not None:
        axes = check_shape(shape)
    elif nbytes is None:
        raise LayoutError("a dtype alone says no size: give nbytes or shape as well")
    elif nbytes % items.itemsize:
        raise LayoutError(f"{nbytes} bytes are no whole number of {items} items of {items.itemsize} bytes")
    else:
        axes = (nbytes // items.itemsize,)
    while items.subdtype is not None:
        items, inner = items.subdtype
        axes += inner
    if len(axes) > _MAX_NDIM or math.prod(n or 1 for n in axes) * items.itemsize > _MAX_NBYTES:
        raise LayoutError(f"shape {axes} of {items} is more than NumPy can address")
    if nbytes is not None and (needed := layout_nbytes((axes, items))) > nbytes:
        raise LayoutError(f"shape {axes} of {items} needs {needed} bytes, the range has {nbytes}")
    return axes, items


def layout_nbytes(layout: Layout) -> int:
    """Return the bytes of a C-ordered array, exact at any size."""
    return math.prod(layout[0]) * layout[1].itemsize


class Loan:
    """One array, lent out over a buffer until it is taken back. Not reusable, not thread-safe."""

    __slots__ = ("_root", "_view")

    _root: NDArray[Any]
    _view: NDArray[Any]

    def lend(self, root: NDArray[Any]) -> NDArray[Any]:
        """Lend `root`, an array that is over a buffer or owns its memory, and that nobody else holds."""
        self._root = root
        self._view = view = root.view()
        return view

    def take_back(self) -> bool:
        """Make the lent array read-only; return whether something else may still hold its memory."""
        self._view.setflags(False)  # type: ignore[call-arg]  # numpy's stub wants a keyword, which is slower
        return getrefcount(self._root) > _ROOT_REFS or getrefcount(self._view) > _VIEW_REFS

    def count(self, *, scan: bool = True, named: bool = True) -> int:
        """Count what else can reach the memory now.

        O(1), unless the view has other holders than the borrower's own name, which is gone if not `named`. Telling
        aliases from memoryviews among them asks the garbage collector for every object alive: some milliseconds,
        unless not `scan`.
        """
        with _scanning:
            count = max(getrefcount(self._root) - _ROOT_REFS, 0)
            if scan and getrefcount(self._view) > _VIEW_REFS - (not named):
                count += sum(map(_reaches_memory, gc.get_referrers(self._view))) + _subclass_views(self._view)
            return count

    def pass_on(self) -> "Loan":
        """Return another loan of the same array, which counts in place of this one."""
        loan = Loan()
        loan._root, loan._view = self._root, self._view
        del self._root, self._view
        return loan


_scanning = threading.RLock()
"""Held while counting: a scan holds every object alive for a moment, the temporary views of other threads too.

Reentrant, since what is finalized during a scan may be a generator with a loan of its own."""


def _unlock_after_fork() -> None:
    global _scanning
    _scanning = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_after_fork)


def _reaches_memory(holder: object) -> bool:
    """Whether what holds a reference to an array also reaches its memory, as a mere alias does not."""
    kind = type(holder)
    return kind.__name__ == "managedbuffer" or str(kind.__module__).partition(".")[0] in ("numpy", "ctypes", "_ctypes")


def _subclass_views(view: NDArray[Any]) -> int:
    """Count arrays of other types over `view`: NumPy does not collapse their base, nor tell the collector of it.

    Asks the types only: `isinstance` would ask each object alive for its ``__class__``, which runs code of theirs.
    """
    return sum(issubclass(type(each), ndarray) and _base_of(each) is view for each in gc.get_objects())


_base_of: Callable[[Any], object] = ndarray.base.__get__  # a getset descriptor of C


def _refs() -> tuple[int, int]:
    """Measure the reference counts of a loan from which nothing escaped."""
    loan = Loan()
    a = loan.lend(ndarray(1, BYTE, bytearray(1)))
    counts = getrefcount(loan._root), getrefcount(loan._view)
    del a
    return counts


_ROOT_REFS, _VIEW_REFS = _refs()
