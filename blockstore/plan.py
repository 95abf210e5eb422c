"""Plan: what the files of one array share: where it is, how it is divided, and how it is written.

The plan knows which of them have a file open, and asks those that rest to close it when there are too many.
"""

import errno
import math
import os
import secrets
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from blockstore._disk import FileLock
from blockstore.checksums import ChecksumKind
from blockstore.draft import Draft, draft_of, lock_draft, write_draft
from blockstore.errors import ClosedStoreError, ReadOnlyStoreError
from blockstore.layouts.grid import Grid
from blockstore.layouts.zarr import Metadata
from blockstore.options import Options

OPEN_FILES = 64
"""Files of an array that are kept open at once; what nobody is writing is closed, and opened again if need be."""


class Resting(Protocol):
    """What the plan asks of a shard."""

    store: Any

    def rest(self) -> None:
        """Close the file, if nobody is using it."""


@dataclass(slots=True)
class Plan:
    """What the shards of one array share."""

    path: str
    grid: Grid
    fill_value: np.generic
    metadata: Metadata | None
    """None for ``.npy``."""
    mode: Literal["r", "r+"]
    options: Options
    reserve: bool
    checksum: ChecksumKind | None
    keep_journal: bool
    replaces: bool
    """Whether an ``.npy`` file may be replaced that is not of this array."""
    fingerprint: str | None
    """The settings that it is filled with, as `canonical` text."""
    rewrites: bool = False
    """Whether the ``.npy`` under the final name is this array, as it was before."""
    is_begun: bool = True
    """Whether there is a draft, without which no hidden file is believed."""
    adopt: bool = False
    """Whether the journal of another file of the same size is accepted."""
    is_closed: bool = False
    opened: "OrderedDict[Resting, None]" = field(default_factory=OrderedDict)
    """Those that have a file open, the one that was used last at the end."""
    completed: "deque[Any]" = field(default_factory=deque)
    """Those whose last block was written, and which are not published."""
    lock: Any = field(default_factory=threading.Lock)
    """Held to change `opened`."""
    whole: NDArray[Any] | None = None
    """All of an array that is one published file, complete and regular; None if it is not, or not known to be."""
    folder: tuple[int, int] | None = None
    """Device and inode of a Zarr array's folder, as it was opened."""
    nonce: str = field(default_factory=lambda: secrets.token_hex(8))
    """What no other opening of the array has."""
    fill_is_zero: bool = field(init=False)
    """Whether the fill value is what a new file holds."""

    def __post_init__(self) -> None:
        self.fill_is_zero = not any(self.fill_value.tobytes())

    @property
    def name(self) -> str:
        """The last part of the path."""
        return os.path.basename(self.path)

    @property
    def is_one_file(self) -> bool:
        """Whether the array is a single file."""
        return self.metadata is None or math.prod(self.grid.files) == 1

    def refuse_writing(self) -> None:
        """Raise the error that says why nothing may be written, if so."""
        self.refuse_closed()
        if self.mode == "r":
            raise ReadOnlyStoreError(f"{self.path!r} was opened with mode='r', which writes nothing")

    def refuse_closed(self) -> None:
        """Raise `ClosedStoreError` if the array is closed."""
        if self.is_closed:
            raise ClosedStoreError(f"the array {self.path!r} is closed")

    def check_same(self) -> None:
        """Raise `OSError` (``ESTALE``) if the folder of a Zarr array is not the one that was opened."""
        if self.folder is not None and folder_of(self.path) != self.folder:
            raise OSError(
                errno.ESTALE, "the array was replaced by another one since it was opened: open it again", self.path
            )

    def use(self, shard: Resting) -> None:
        """Note that a shard has a file open and is being used; close others if there are too many."""
        with self.lock:
            self.opened[shard] = None
            self.opened.move_to_end(shard)
            others = [] if len(self.opened) <= OPEN_FILES else list(self.opened)[: len(self.opened) - OPEN_FILES]
        for other in others:
            other.rest()


def folder_of(path: str) -> tuple[int, int] | None:
    """Return what names a folder; None if there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def draft_from(plan: Plan) -> Draft:
    """Return what is to be remembered of an array that is planned."""
    npy = (plan.grid.shape, plan.grid.chunks, plan.grid.dtype.str) if plan.metadata is None else ()
    return Draft(
        secrets.token_hex(16),
        plan.checksum,
        plan.reserve,
        plan.keep_journal,
        plan.replaces,
        plan.rewrites,
        plan.fingerprint,
        *npy,
    )


def start_draft(plan: Plan) -> FileLock:
    """Make the draft of an array, and return its lock. Raises `OSError` (``ESTALE``) if somebody else has made it."""
    plan.rewrites = not plan.is_begun
    try:
        lock = write_draft(draft_of(plan.path), draft_from(plan))
    except FileExistsError:
        if (held := lock_draft(draft_of(plan.path), plan.path)) is not None:
            held.release()
        raise OSError(
            errno.ESTALE, "somebody else has begun to write the array since it was opened: open it again", plan.path
        ) from None
    return lock
