"""RangeSequence: many ranges of one reservation, whose objects are made when they are touched.

Examples
--------
>>> import blockstore as bs
>>> store = bs.create(tmp_path / "data.bin", 1 << 20)
>>> rs = store.allocate_many(3, 5000)
>>> rs
<RangeSequence: 3 ranges of 5000 bytes from 0>
>>> rs[-1]
<AllocatedRange [16384, 24576) 5000 bytes, fresh>
>>> rs[2] is rs[-1], rs.starts
(True, array([    0,  8192, 16384]))
>>> store.close()
"""

import operator
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from blockstore.alignment import align_up
from blockstore.ranges import AllocatedRange, Owner, allocated
from blockstore.views import Layout


class RangeSequence(Sequence[AllocatedRange]):
    """What `BlockStore.allocate_many` returns. Indexing twice gives the same object, in every thread.

    Attributes
    ----------
    starts : ndarray of int64, shape (n,)
        Where each range starts, in bytes; read-only.
    nbytes : int
        Bytes of each range.
    """

    __slots__ = ("_layout", "_made", "_owner", "_tag", "nbytes", "starts")

    def __init__(self, owner: Owner, starts: NDArray[np.int64], nbytes: int, tag: int, layout: Layout | None) -> None:
        starts.setflags(write=False)
        self.starts = starts
        self.nbytes = nbytes
        self._owner = owner
        self._tag = tag
        self._layout = layout
        self._made: dict[int, AllocatedRange] = {}

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> AllocatedRange: ...
    @overload
    def __getitem__(self, index: slice) -> list[AllocatedRange]: ...
    def __getitem__(self, index: int | slice) -> AllocatedRange | list[AllocatedRange]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = operator.index(index)
        if not -len(self) <= at < len(self):
            raise IndexError(f"index {at} is out of bounds for {len(self)} ranges")
        return self._touch(int(self.starts[at]))

    def __iter__(self) -> Iterator[AllocatedRange]:
        return map(self._touch, self.starts.tolist())

    def _touch(self, start: int) -> AllocatedRange:
        """Return the range at `start`, the same object every time."""
        if (made := self._made.get(start)) is not None:
            return made
        stop = min(start + align_up(self.nbytes), self._owner._mapped.nbytes)
        made = allocated(self._owner, start, stop, self.nbytes, self._tag, self._layout)
        return self._made.setdefault(start, made)

    def __repr__(self) -> str:
        return f"<RangeSequence: {len(self)} ranges of {self.nbytes} bytes from {self.starts[0]}>"
