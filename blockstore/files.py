"""Files: those of one array, found when they are come to, published as they are complete, and closed together.

A finished array has nothing beside its files. From the first write on there is a draft, until all is published. This
module knows blocks as numbers in their shards, and nothing of arrays in memory.
"""

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockstore._disk import FileLock
from blockstore.draft import draft_of
from blockstore.errors import LayoutError, NotWrittenError, WriterBusyError
from blockstore.layouts.grid import Index
from blockstore.plan import Plan, start_draft
from blockstore.publishing import publish, snapshot
from blockstore.shard import Shard
from blockstore.working import clear_leftovers, unlink

_MANY_BLOCKS = 1 << 32
_MANY_FILES = 1000
"""Files that are looked at only to say how an array stands."""


class Files:
    """The files of one array. Safe to share among threads.

    Parameters
    ----------
    plan : Plan
    lock : FileLock or None
        That of the draft, if there is one.
    """

    def __init__(self, plan: Plan, lock: FileLock | None) -> None:
        self.plan = plan
        self._lock = lock
        self._shards: dict[Index, Shard] = {}
        self._guard = threading.Lock()
        self._is_known = False  # whether all files were looked for that an earlier session may have left

    def shard(self, index: Index) -> Shard:
        """Return a shard by its index: always the same object."""
        shard = self._shards.get(index)
        if shard is None:
            with self._guard:
                if (shard := self._shards.get(index)) is None:
                    plan, metadata = self.plan, self.plan.metadata
                    path = plan.path if metadata is None else os.path.join(plan.path, metadata.key(index))
                    self._shards[index] = shard = Shard(plan, index, path, self._announce)
        return shard

    def place(self, index: Index) -> tuple[Shard, int]:
        """Return the shard of a block, and the block's number there. Raises `ClosedStoreError`."""
        self.plan.refuse_closed()
        at, inner = self.plan.grid.locate(index)
        shard = self.shard(at)
        return shard, shard.layout.number(inner)

    def known(self) -> list[Shard]:
        """Return the shards that were come to so far."""
        with self._guard:
            return list(self._shards.values())

    def all(self) -> Iterator[Shard]:
        """Iterate over all shards, in C order; an ``.npy`` of no element is a file, too."""
        if self.plan.metadata is None:
            return iter([self.shard((0,) * len(self.plan.grid.shape))])
        return map(self.shard, self.plan.grid.shard_indices())

    def over_blocks(self, of: Callable[[Shard], NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """Return what a function says of the blocks of each shard, over the array's grid of blocks."""
        self.plan.refuse_closed()
        grid = self.plan.grid
        if (count := math.prod(grid.blocks)) > _MANY_BLOCKS:
            raise LayoutError(f"{count} blocks are too many to be listed: iterate over what is pending")
        over = np.zeros(grid.blocks, np.bool_)
        for shard in self.all():
            shard.find()
            if shard.kind != "none":
                over[grid.shard_blocks(shard.index)] = of(shard).reshape(shard.layout.blocks)
        return over

    def counts(self) -> tuple[int, int, int]:
        """Return how many blocks are written and durable, and in how many files: all, or those that were come to."""
        many = math.prod(self.plan.grid.files) > _MANY_FILES
        found = [shard.counts() for shard in (self.known() if many else self.all())]
        return sum(written for written, _ in found), sum(durable for _, durable in found), len(found)

    def pending(self) -> Iterator[Index]:
        """Iterate over the indices of blocks that are not written: shard by shard, as each is when it is come to."""
        self.plan.refuse_closed()
        for shard in self.all():
            for number in shard.pending():
                yield shard.block_index(number)

    def apart(self, data: NDArray[Any]) -> NDArray[Any]:
        """Return data that is to be written, as a copy if it lies in a file that is written meanwhile."""
        stores = [store for shard in self.known() if (store := shard.store) is not None]
        maps = [frozen for store in stores if (frozen := store._mapped.frozen) is not None]
        return data.copy() if any(np.may_share_memory(data, frozen) for frozen in maps) else data

    def begin(self) -> None:
        """Make the working file of a new array of one file, with its space; then the draft, if it has none yet."""
        shard = self.shard((0,) * len(self.plan.grid.shape))
        with shard.lock:
            shard.begin(announced=True)
        self._announce()

    def check(self) -> None:
        """Raise `PoisonedStoreError` if a sync of an open file has failed."""
        for shard in self.plan.opened.copy():
            if (store := shard.store) is not None:
                store._ledger.check()

    def flush(self) -> int:
        """Make what is written durable, and publish what is complete; return how many blocks became durable."""
        count = sum(shard.flush() for shard in self._unfinished())
        self.publish_completed()
        return count

    def publish_completed(self) -> None:
        """Publish the files that are complete, of an array of several: those that were since the last time."""
        if self.plan.is_one_file:
            return
        completed = self.plan.completed
        while True:
            try:
                shard = completed.popleft()
            except IndexError:
                return
            if shard.is_complete and not shard.is_published:
                try:
                    publish(shard)
                except WriterBusyError:  # the writer of its last block is on its way out
                    completed.append(shard)
                    return

    def publish(self, *, partial: bool, closing: bool = False) -> None:
        """Publish what is written. See `BlockArray.publish` and `BlockArray.close`."""
        if self.plan.metadata is None:
            shard = self.shard((0,) * len(self.plan.grid.shape))
            if not shard.is_complete:
                if partial:
                    snapshot(shard)
                elif not closing:
                    left = int(np.count_nonzero(~shard.written()))
                    raise NotWrittenError(
                        f"cannot publish {self.plan.name!r}: {left} of {shard.layout.count} blocks are not written, "
                        "and an .npy file cannot say so; publish(partial=True) puts zeros there"
                    )
                return
        for shard in self._unfinished():
            publish(shard, closing=closing)
            if closing:
                shard.discard()
        self._end_draft()

    def close(self, *, publish: bool) -> None:
        """Flush and close all files; publish before, if that is wanted. They are closed whatever fails."""
        plan = self.plan
        if plan.is_closed:
            return
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(self._close_all)
                if publish and plan.mode == "r+":
                    self.publish(partial=False, closing=True)
        finally:
            self._let_go()

    def _unfinished(self) -> list[Shard]:
        """Return the shards that may have a working file: of this session, and of an earlier one that was killed."""
        if self._lock is not None and not self._is_known:
            for shard in self.all():
                shard.find()
            self._is_known = True
        return self.known()

    def _close_all(self) -> None:
        self.plan.is_closed = True  # nobody begins anything any more
        with contextlib.ExitStack() as stack:
            for shard in self.known():
                if shard.is_open:
                    stack.callback(shard.close)

    def _announce(self) -> None:
        """See to it that there is a draft, before a working file is made."""
        with self._guard:
            if self._lock is None or not os.path.lexists(draft_of(self.plan.path)):  # Ctrl-C as the draft was ended
                self._let_go()
                self._lock = start_draft(self.plan)
            self.plan.is_begun = True

    def _end_draft(self) -> None:
        """Remove the draft, if everything is published."""
        if self._lock is None or not all(shard.is_complete and shard.is_published for shard in self.all()):
            return
        with self._guard:  # whoever has begun to write since has said so in the shard, and waits here to announce it
            if any(shard.kind in ("working", "unknown") for shard in self._shards.values()):
                return
            for shard in self._shards.values():
                clear_leftovers(shard.path)
            self.plan.is_begun = False
            unlink(draft_of(self.plan.path))
            self._let_go()

    def _let_go(self) -> None:
        """Let others write the array."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()
