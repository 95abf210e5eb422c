"""BlockStates: which blocks of one file are written, and under which numbers its journal has them.

Blocks are numbered as `ShardLayout` does. This module knows arrays of numbers and a ledger's two watermarks; where the
file is, and what kind, its `Shard` knows.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from blockstore.layouts.grid import Index, ShardLayout
from blockstore.plan import Plan

_NEVER = np.int64(2**63 - 1)
_PIECE = 1 << 16


class BlockStates(ABC):
    """Which blocks of one file are written.

    Attributes
    ----------
    sequences : ndarray of int64, shape (count,)
        The number under which the journal has each block, -1 of one that is not written.
    touched : ndarray of bool, shape (count,)
        Of the working file: whether a block may have other bytes than zeros.
    kind : {"unknown", "none", "working", "published"}
        What there is of the file.
    """

    def __init__(self, plan: Plan, index: Index) -> None:
        self.plan = plan
        self.index = index
        self.layout: ShardLayout = plan.grid.shard(index, npy=plan.metadata is None)
        self.kind: Literal["unknown", "none", "working", "published"] = "unknown"
        self._ledger: Any = None
        self._sequences: NDArray[np.int64] | None = None
        self._touched: NDArray[np.bool_] | None = None
        self._missing = self.layout.count

    @abstractmethod
    def find(self) -> None:
        """Find out what there is, once."""

    @property
    def sequences(self) -> NDArray[np.int64]:
        """The number under which the journal has each block, -1 of one that is not written."""
        if self._sequences is None:
            self._sequences = np.full(self.layout.count, -1, np.int64)
        return self._sequences

    @property
    def touched(self) -> NDArray[np.bool_]:
        """Whether a block of the working file may have other bytes than zeros."""
        if self._touched is None:
            self._touched = np.zeros(self.layout.count, np.bool_)
        return self._touched

    def note(self, number: int, sequence: int | None) -> None:
        """Remember under which number a block is in the journal, if at all. The ledger's lock is held."""
        sequences = self.sequences
        had, has = sequences[number] >= 0, sequence is not None
        sequences[number] = -1 if sequence is None else sequence
        self._missing += int(had) - int(has)
        if self._missing == 0 and not had:
            self.plan.completed.append(self)

    def is_written(self, number: int) -> bool:
        """Whether a block is written."""
        self.find()
        if self._sequences is None:
            return False
        return 0 <= int(self._sequences[number]) < self._void_from()

    def written(self) -> NDArray[np.bool_]:
        """Return which blocks are written, in order of their numbers: a copy, or a read-only constant."""
        self.find()
        if self._sequences is None:
            return np.broadcast_to(np.False_, self.layout.count)
        return np.asarray((self._sequences >= 0) & (self._sequences < self._void_from()))

    def counts(self) -> tuple[int, int]:
        """Return how many blocks are written, and how many of these are durable."""
        self.find()
        if self._sequences is None:
            return 0, 0
        return int(np.count_nonzero(self.written())), int(np.count_nonzero(self.durable()))

    def pending(self) -> Iterator[int]:
        """Iterate over the numbers of blocks that are not written."""
        self.find()
        if self._sequences is None:
            yield from range(self.layout.count)
            return
        pending = np.flatnonzero(~self.written())
        for first in range(0, len(pending), _PIECE):
            yield from pending[first : first + _PIECE].tolist()

    def durable(self) -> NDArray[np.bool_]:
        """Return which blocks survive a power loss, in order of their numbers."""
        written = self.written()
        if self._sequences is None or self.kind == "published" or self._ledger is None:
            return written
        return np.asarray(written & (self._sequences < min(self._ledger.durable_below, _NEVER)))

    def block_index(self, number: int) -> Index:
        """Return where a block lies in the array's grid of blocks."""
        first = self.plan.grid.shard_blocks(self.index)
        return tuple(part.start + i for part, i in zip(first, self.layout.inner(number), strict=True))

    def _void_from(self) -> int:
        return int(_NEVER) if self._ledger is None else min(self._ledger.void_from, int(_NEVER))

    @property
    def is_complete(self) -> bool:
        """Whether every block is written."""
        self.find()
        return self._missing == 0 and (self._ledger is None or self._ledger.void_from > int(_NEVER))
