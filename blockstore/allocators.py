"""Allocators: who gets which bytes. Exact, thread-safe, and usable without a file.

Both hand out every byte exactly once, round each request up to `ALIGNMENT`, and burn nothing for a request
that does not fit. They know byte counts and nothing of files, ranges or stores.

`SequentialAllocator` takes the lowest hole that fits, under a lock. `ConcurrentAllocator` takes the next
bytes of a *window* by one atomic fetch-and-add, without a lock, until the window is used up.

Examples
--------
>>> import numpy as np
>>> pool, allocator = np.zeros(16384, "u1"), ConcurrentAllocator(16384)
>>> pool[allocator.allocate(100)] = 1
>>> allocator.allocate(5000), allocator.free
(slice(4096, 12288, None), 4096)
"""

import heapq
import operator
import sys
import sysconfig
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from blockstore.alignment import ALIGNMENT, align_up
from blockstore.errors import OutOfSpaceError

T = TypeVar("T")

_ROUND = ALIGNMENT - 1


def check_nbytes(nbytes: object) -> int:
    """Return a byte count that may be asked for as an int."""
    try:
        checked = operator.index(nbytes)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"a byte count is an int, not {nbytes!r}") from None
    if checked < 1:
        raise ValueError(f"cannot allocate {checked} bytes: ask for at least 1")
    return checked


class Allocator(ABC):
    """What both allocators share. `nbytes` is the size of the space, in bytes.

    Parameters
    ----------
    nbytes : int
        Bytes to hand out, 1 to 2**62. Not necessarily a multiple of `ALIGNMENT`: the last range may own less.
    holes : array_like of int, shape (n, 2), optional
        What of that is free, as ``(start, stop)`` in bytes, ascending and apart from each other; each is a multiple of
        `ALIGNMENT`, but for a stop at `nbytes`. Default: all of it.

    Raises
    ------
    ValueError
        If `nbytes` is out of bounds, or `holes` are not as they should be.
    """

    def __init__(self, nbytes: int, *, holes: ArrayLike | None = None) -> None:
        self._nbytes = operator.index(nbytes)
        self._lock = threading.Lock()
        if not 1 <= self._nbytes <= 1 << 62:
            raise ValueError(f"an allocator hands out 1 to 2**62 bytes, not {nbytes}")
        self._begin([(0, self._nbytes)] if holes is None else _check_holes(holes, self._nbytes))

    @abstractmethod
    def _begin(self, holes: list[tuple[int, int]]) -> None:
        """Have these holes, ascending, and no other."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole space."""
        return self._nbytes

    @property
    @abstractmethod
    def free(self) -> int:
        """Bytes not handed out yet. A snapshot, O(holes)."""

    @property
    @abstractmethod
    def next_start(self) -> int:
        """Where the next small request would start, in bytes; `nbytes` when nothing is free. A snapshot."""

    def allocate(self, nbytes: int, *, partial: bool = False) -> slice:
        """Hand out bytes that nobody else gets.

        Parameters
        ----------
        nbytes : int
            Bytes, at least 1.
        partial : bool
            Take what the hole has if it has less.

        Returns
        -------
        slice
            ``slice(start, stop)`` in bytes: `start` is a multiple of `ALIGNMENT`, and `stop` is rounded up to
            one, or is the end of the space. With `partial` it may be shorter than `nbytes`, never empty.

        Raises
        ------
        ValueError
            If `nbytes` is less than 1.
        OutOfSpaceError
            If no hole is large enough; nothing is burned.
        """
        return slice(*self._take(check_nbytes(nbytes), partial))

    @abstractmethod
    def _take(self, nbytes: int, partial: bool) -> tuple[int, int]:
        """Hand out ``(start, stop)``; `nbytes` is an int of at least 1."""

    def allocate_many(self, count: int, nbytes: int) -> NDArray[np.int64]:
        """Hand out `count` ranges of `nbytes` bytes each in one reservation: all of them or none.

        Returns
        -------
        ndarray of int64, shape (count,)
            Where each range starts, in bytes; they are `align_up(nbytes)` apart.

        Raises
        ------
        ValueError
            If `count` or `nbytes` is less than 1.
        OutOfSpaceError
            If no hole takes them all; nothing is burned.

        Notes
        -----
        One `allocate`, and a few nanoseconds for each range.

        Examples
        --------
        >>> SequentialAllocator(1 << 20).allocate_many(3, 5000)
        array([    0,  8192, 16384])
        """
        if (count := operator.index(count)) < 1:
            raise ValueError(f"a count is at least 1, not {count}")
        nbytes = check_nbytes(nbytes)
        step = align_up(nbytes)
        start, _ = self._take((count - 1) * step + nbytes, False)
        return np.arange(start, start + count * step, step, dtype=np.int64)

    def ranges(self, nbytes: int) -> Iterator[slice]:
        """Iterate over ``allocate(nbytes, partial=True)`` until nothing is free.

        The iterator can be shared among threads. A slice is shorter where a hole ends.

        Examples
        --------
        >>> list(SequentialAllocator(10000).ranges(8192))
        [slice(0, 8192, None), slice(8192, 10000, None)]
        """
        checked = check_nbytes(nbytes)
        return UntilFull(lambda: slice(*self._take(checked, True)))

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.free} of {self._nbytes} bytes free>"


def _check_holes(holes: ArrayLike, nbytes: int) -> list[tuple[int, int]]:
    """Return holes as pairs of ints, if an allocator can have them."""
    pairs = np.asarray(holes)
    if pairs.size == 0:
        return []
    if pairs.dtype.kind not in "iu" or pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(
            f"holes are pairs of ints, (start, stop), not an array of {pairs.dtype} and shape {pairs.shape}"
        )
    starts, stops = pairs[:, 0], pairs[:, 1]
    if (
        np.any(starts >= stops)
        or np.any(stops[:-1] > starts[1:])
        or not 0 <= int(starts[0]) < int(stops[-1]) <= nbytes
        or np.any(starts % ALIGNMENT)
        or np.any((stops % ALIGNMENT != 0) & (stops != nbytes))
    ):
        raise ValueError(f"holes are ascending, apart, aligned to {ALIGNMENT} bytes, and within [0, {nbytes})")
    return [(start, stop) for start, stop in pairs.tolist()]


class UntilFull(Generic[T]):
    """Iterator that calls until there is no space left. Safe to share among threads."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call

    def __iter__(self) -> "UntilFull[T]":
        return self

    def __next__(self) -> T:
        try:
            return self._call()
        except OutOfSpaceError:
            raise StopIteration from None


class SequentialAllocator(Allocator):
    """Hand out the lowest hole that fits, in order of the calls.

    Notes
    -----
    One lock, held for a few hundred nanoseconds. O(1) while the first hole fits, O(holes) otherwise.
    """

    def _begin(self, holes: list[tuple[int, int]]) -> None:
        self._holes = deque(holes)  # all but the lowest, ascending
        end = (self._nbytes, self._nbytes)
        self._start, self._stop = self._holes.popleft() if holes else end  # empty only when no other is left

    @property
    def free(self) -> int:
        with self._lock:
            return sum(self._sizes())

    @property
    def next_start(self) -> int:
        with self._lock:
            return self._start if self._start < self._stop else self._nbytes

    def _take(self, nbytes: int, partial: bool) -> tuple[int, int]:
        step = (nbytes + _ROUND) & ~_ROUND
        with self._lock:
            start = self._start
            cut = start + step
            if cut < self._stop:
                self._start = cut
                return start, cut
            return self._search(nbytes, step, partial)

    def _search(self, nbytes: int, step: int, partial: bool) -> tuple[int, int]:
        """Take from the lowest hole that fits, which may use it up. The lock is held."""
        start, stop = self._start, self._stop
        if start < stop and (partial or nbytes <= stop - start):
            self._start, self._stop = self._holes.popleft() if self._holes else (stop, stop)
            return start, stop
        for index, (start, stop) in enumerate(self._holes):
            if partial or nbytes <= stop - start:
                cut = min(start + step, stop)
                if cut < stop:
                    self._holes[index] = (cut, stop)
                else:
                    del self._holes[index]
                return start, cut
        sizes = self._sizes()
        raise OutOfSpaceError(nbytes, sum(sizes), max(sizes))

    def _sizes(self) -> list[int]:
        return [self._stop - self._start, *(stop - start for start, stop in self._holes)]


class ConcurrentAllocator(Allocator):
    """Hand out the next bytes without a lock; for many threads that allocate at once.

    Notes
    -----
    The fast path is one atomic fetch-and-add on the cursor of the *window*, a hole that is being used up. Exactly
    one caller moves the cursor from below the window's stop to it or past it: that one owns the tail, and under
    a lock puts back what it cannot use and opens the largest hole as the next window. A caller that comes in
    between waits for that. Those steps are O(log holes). With several holes the order of starts is not defined.
    """

    def _begin(self, holes: list[tuple[int, int]]) -> None:
        self._holes = [(start - stop, start, stop) for start, stop in holes]  # a heap, the largest first
        heapq.heapify(self._holes)
        self._window = _Window(*(heapq.heappop(self._holes)[1:] if holes else (self._nbytes, self._nbytes)))

    @property
    def free(self) -> int:
        return self._measure()[0]

    @property
    def next_start(self) -> int:
        window = self._window
        start = window.tell()
        return start if start < window.stop else self._nbytes

    def _take(self, nbytes: int, partial: bool) -> tuple[int, int]:
        if nbytes > self._nbytes:
            if not partial:
                raise OutOfSpaceError(nbytes, *self._measure())
            step = align_up(self._nbytes)
        else:
            step = (nbytes + _ROUND) & ~_ROUND
        while True:
            window = self._window
            try:
                stop = window.advance(step, 1)
            except OverflowError:  # many absurd requests at once: past the window, and not the first to be
                stop = window.stop + step
            if stop < window.stop:
                return stop - step, stop
            if (found := self._turn(window, stop - step, nbytes, partial)) is not None:
                return found

    def _turn(self, window: "_Window", start: int, nbytes: int, partial: bool) -> tuple[int, int] | None:
        """Go on from a window whose stop was reached. None means: try again on the current one."""
        if start < window.stop:
            with self._lock:
                found = (start, window.stop) if partial or nbytes <= window.stop - start else None
                if found is None:
                    heapq.heappush(self._holes, (start - window.stop, start, window.stop))
                self._open_next(window)
            if found is not None:
                return found
        elif not window.settled.wait(_SETTLE_SECONDS):
            with self._lock:
                self._open_next(window)
        with self._lock:
            left = self._left()
            if left is None or left >= (1 if partial else nbytes):
                return None
            largest = -self._holes[0][0] if self._holes else 0
            if largest < (1 if partial else nbytes):
                raise OutOfSpaceError(nbytes, left - sum(hole[0] for hole in self._holes), max(left, largest))
            _, start, stop = heapq.heappop(self._holes)
            cut = min(start + align_up(nbytes), stop)
            if cut < stop:
                heapq.heappush(self._holes, (cut - stop, cut, stop))
            return start, cut

    def _open_next(self, window: "_Window") -> None:
        """Open the largest hole as the next window, once. The lock is held."""
        if self._window is window:
            start, stop = heapq.heappop(self._holes)[1:] if self._holes else (self._nbytes, self._nbytes)
            self._window = _Window(start, stop)
        window.settled.set()

    def _left(self) -> int | None:
        """Return the bytes left in the window, or None while the owner of its tail has not put it back."""
        window = self._window
        left = window.stop - window.tell()
        return left if left > 0 else 0 if window.settled.is_set() else None

    def _measure(self) -> tuple[int, int]:
        """Return the free bytes and the largest hole."""
        while True:
            window = self._window
            with self._lock:
                left = self._left()
                if left is not None:
                    sizes = [-hole[0] for hole in self._holes]
                    return left + sum(sizes), max(left, *sizes[:1], 0)
            if not window.settled.wait(_SETTLE_SECONDS):
                with self._lock:
                    self._open_next(window)


_SETTLE_SECONDS = 10.0
"""How long to wait for the owner of a tail: it can only fail to come when it was interrupted on its way, by
Ctrl-C. Then the others go on, and the tail comes back if its owner does."""


class _Window:
    """A hole that is used up by an atomic cursor. `advance(step, 1)` returns the cursor after the step."""

    __slots__ = ("advance", "settled", "stop", "tell")

    def __init__(self, start: int, stop: int) -> None:
        self.stop = stop
        self.settled = threading.Event()
        cursor = _Cursor()
        cursor.seek(start)
        self.tell: Callable[[], int] = cursor.tell
        self.advance: Callable[[int, int], int] = cursor.seek
        if start == stop:  # nothing to use up: always past the stop, without a cursor that grows
            self.advance = lambda step, _: stop + step
            self.settled.set()


class _LockedCursor:
    """What `io.BytesIO` is as a counter, for Pythons where its `seek` is not atomic."""

    def __init__(self) -> None:
        self._position = 0
        self._lock = threading.Lock()

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        with self._lock:
            self._position = position = self._position * whence + offset
        return position


# One C call moves the cursor and returns it: atomic under the GIL, and on free-threaded builds since 3.14.1
# (CPython gh-132551). The cursor's position is a count; the BytesIO stays empty.
_SEEK_IS_ATOMIC = not sysconfig.get_config_var("Py_GIL_DISABLED") or sys.version_info >= (3, 14, 1)
_Cursor: type[BytesIO | _LockedCursor] = BytesIO if _SEEK_IS_ATOMIC else _LockedCursor
