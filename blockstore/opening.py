"""Opening: how a store comes to be, from nothing, from a file and its journal, or from a pickle.

This module joins what `sidecar` finds and `resume` believes to the `BlockStore` that goes on with it.
"""

import contextlib
import copyreg
import errno
import operator
import os
import secrets
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from blockstore import _disk, _os, live, sidecar
from blockstore.allocators import Allocator, SequentialAllocator
from blockstore.checksums import ChecksumKind, checksum_function
from blockstore.errors import FileSystemWarning, JournalMismatchError, StaleReferenceError, StoreInUseError
from blockstore.journal import Journal
from blockstore.ledger import Ledger
from blockstore.options import Access, AllocatorKind, Escaped, Guard, Options, allocator_class, choice
from blockstore.records import RECEIPT, holes
from blockstore.resume import peek, settle
from blockstore.store import BlockStore

StrPath = str | os.PathLike[str]


def create(
    path: StrPath,
    nbytes: int,
    *,
    allocator: AllocatorKind = "sequential",
    overwrite: bool = False,
    reserve: bool = True,
    access: Access | None = None,
    guard: Guard = "flag",
    escaped: Escaped = "warn",
    checksum: ChecksumKind | None = None,
) -> BlockStore:
    """Create a file of zeros, with a journal beside it, and return the store that hands it out.

    Parameters
    ----------
    path : path
        Where the file appears, whole or not at all. Its journal is ``path + ".journal"``.
    nbytes : int
        Bytes of the file, at least 1. It never grows.
    allocator : {"sequential", "concurrent"}
        How space is handed out: see `SequentialAllocator` and `ConcurrentAllocator`.
    overwrite : bool
        Replace an existing regular file, and its journal. Until then both take up space. A store that is open on
        the old file goes on with it, though it has no name any more.
    reserve : bool
        Reserve the space on the disk now, so that a full disk is an `OSError` here. Without it the file is sparse,
        and a full disk kills the process with SIGBUS at the first write that finds no space.
    access : {"dense", "sparse"}, optional
        How the file will be filled. See Notes.
    guard : {"flag", "seal"}
        What becomes of an array when its writer exits. "flag": it is read-only, and what escaped is found. "seal":
        besides, its memory is cut off from the file, so that no late write reaches it.
    escaped : {"warn", "raise", "ignore"}
        What to do when a view outlives its writer: warn with `EscapedViewWarning`, make no receipt and raise
        `EscapedViewError`, or nothing.
    checksum : {"crc32", "crc32c", "xxh3"}, optional
        Keep a checksum of the bytes in each receipt, for `BlockStore.verify`. "crc32" is the standard library's; the
        others are faster and need ``pip install 'ndblockstore[checksum]'``. Each exit reads its bytes once more.

    Raises
    ------
    FileExistsError
        If there is a file, or the journal of one that is gone, and no `overwrite`; or, in any case, something else
        where the journal would be.
    OSError
        If the disk is full, the directory cannot be written, or the path is no regular file; nothing is left behind.
        Only if the directory cannot be synced after an `overwrite`, the new file stays.
    ValueError
        If a size or an option is none of the above.
    ModuleNotFoundError
        If the checksum's package is not installed.

    Warns
    -----
    FileSystemWarning
        If the file system keeps nothing through a power loss (tmpfs), or if reserving space protects nothing there
        (copy-on-write).

    Notes
    -----
    A crash leaves nothing at `path`, or a whole store.

    What `access` chooses:

    - "dense", for a file that is filled from end to end in any order and any number of threads: huge pages on the
      whole map. Writers lend views on the map; `write` copies up to 32 KiB through it, and more by ``pwrite``.
    - "sparse", for small ranges far apart: no read-ahead on the map, where huge pages would write 2 MiB to the disk
      for each 4 KiB touched. Writers of ranges below 4 MiB lend a private array, which a clean exit writes by
      ``pwrite``, and of larger ones a view on huge pages; `write` is by ``pwrite``.
    - None: views as "dense" if the space is reserved, and `write` by ``pwrite`` at any size. What cannot be known
      costs most for small ranges: if the filling turns out dense, `write` of 32 KiB or less takes up to 2.4 times as
      long as told; if it turns out sparse, each small view dirties 2 MiB.

    Examples
    --------
    >>> with create(tmp_path / "data.bin", 1 << 20, access="dense") as store:
    ...     receipt = store.allocate(5).write(b"hello")
    >>> receipt.durable
    True
    """
    options = Options(access, guard, escaped)
    allocator_class(allocator)
    target = absolute(path)
    return make(target, nbytes, options, allocator, checksum, overwrite=overwrite, reserve=reserve)


def make(
    target: str,
    nbytes: int,
    options: Options,
    kind: str,
    checksum: str | None,
    *,
    overwrite: bool,
    reserve: bool,
    begin: Callable[[_os.File, Journal], None] | None = None,
    sequence: int = 0,
) -> BlockStore:
    """Create a file, its journal and its store. See `create`.

    `kind` is an allocator's, or `BLOCKS`: then nothing is handed out. `begin` may write to both before they have names,
    durably, and then the next `sequence` number is above all that it has used.
    """
    digest = None if checksum is None else checksum_function(checksum)
    with contextlib.ExitStack() as undo:
        with (
            contextlib.ExitStack() as last,  # what gives the journal its name, once the file has its own
            _os.new_file(target, operator.index(nbytes), overwrite=overwrite, reserve=reserve) as file,
        ):
            lasting = say_limits(file, target, reserve=reserve)
            mapped = options.map(file, writable=True, zeroed=begin is None, advice="dense" if reserve else None)
            lock = _locked(file, target, undo)
            header, epoch = sidecar.new_header(file, kind, checksum), _epoch(file)
            journal = last.enter_context(sidecar.created(target, file, header, epoch, overwrite=overwrite))
            if begin is not None:
                begin(file, journal)
        replace = partial(sidecar.replacing, target, mapped.identity)
        ledger = Ledger(journal, mapped.sync, replace, sequence=sequence, lasting=lasting)
        store = BlockStore(target, mapped, options, _allocator(kind, mapped.nbytes), ledger, digest, lock)
        undo.pop_all()
        return store


def open(
    path: StrPath,
    *,
    mode: Literal["r", "r+"] = "r+",
    discard: bool = False,
    adopt: bool = False,
    allocator: AllocatorKind | None = None,
    access: Access | None = None,
    guard: Guard = "flag",
    escaped: Escaped = "warn",
    checksum: ChecksumKind | None = None,
) -> BlockStore:
    """Open an existing file as a store, and go on where its journal says.

    What is durable, or was written since the machine was last started and the disk last mounted, has its receipt;
    everything else is free again.

    Parameters
    ----------
    path : path
        A regular file that is not empty. Without a journal nothing of it is free, since nothing says which bytes
        matter; they can be read, and written, through `BlockStore.raw`.
    mode : {"r+", "r"}
        Reading and writing, or reading only. One store at a time, on one machine, has a file open with "r+".
    discard : bool
        Forget the journal, if there is one, and hand out the whole file again.
    adopt : bool
        Accept the journal of a file of the same size: for a file and a journal that were copied together.
    allocator : {"sequential", "concurrent"}, optional
        Default: what the store was created with, or "sequential" without a journal.
    access, guard, escaped
        As in `create`. They are not remembered.
    checksum : {"crc32", "crc32c", "xxh3"}, optional
        With `discard`, as in `create`. Otherwise the journal says.

    Raises
    ------
    FileNotFoundError
        If there is no file.
    OSError
        If the path is no regular file, or may not be opened in this mode.
    StoreInUseError
        If another store, of this process or another one, has the file open for writing.
    JournalMismatchError
        If the journal is not of this file, or no journal, or contradicts itself.
    PoisonedStoreError
        If what was only written could not be synced. It is void then; opening again has what was durable.
    ValueError
        If the file is empty, or an option is none of the above.
    ModuleNotFoundError
        If the checksum's package is not installed.

    Warns
    -----
    JournalDamageWarning
        If records in the midst of the journal are damaged; the others hold.
    FileSystemWarning
        As in `create`.

    Notes
    -----
    Syncs once, if something was only written; after that, every receipt is durable. A journal of a million receipts
    is read in a fraction of a second. Boundaries of ranges that were handed out and not written are not remembered.

    Examples
    --------
    >>> with create(tmp_path / "data.bin", 8192) as store:
    ...     receipt = store.allocate(5, tag=7).write(b"hello")
    >>> with open(tmp_path / "data.bin") as store:
    ...     print(store.receipts(), store.pending())
    [(0, 4096, 5, 7,  True, 0)] [(4096, 8192, 4096)]
    """
    options = Options(access, guard, escaped)
    choice("mode", mode, ("r", "r+"))
    if allocator is not None:
        allocator_class(allocator)
    if discard and mode == "r":
        raise ValueError("discard=True hands out space for writing: it needs mode='r+'")
    if checksum is not None:
        checksum_function(checksum)
    if checksum is not None and not discard:
        raise ValueError("the checksum is what the store was created with: pass one to create, or with discard=True")
    if discard and adopt:
        raise ValueError("adopt=True keeps a journal, discard=True forgets it: pass one of them")
    target = absolute(path)
    return reopen(
        target, options, mode, allocator=allocator, discard=discard, adopt=adopt, checksum=checksum, blocks=False
    )


def reopen(
    target: str,
    options: Options,
    mode: str,
    *,
    allocator: AllocatorKind | None = None,
    discard: bool = False,
    adopt: bool = False,
    checksum: ChecksumKind | None = None,
    blocks: bool,
) -> BlockStore:
    """Open a file as a store. See `open`. With `blocks` it is one of an array, whose journal says so."""
    writable = mode == "r+"
    real = os.path.realpath(target)  # the journal is beside the file, not beside a link to it
    with contextlib.ExitStack() as undo:
        file = _os.open_file(target, writable=writable)
        lock = _locked(file, target, undo) if writable else None
        try:
            found = None if discard else sidecar.find(real, file, writable=writable, adopt=adopt)
        except JournalMismatchError:
            if sidecar.is_file(real, _os.identity(file)):
                raise
            raise _replaced(target) from None
        if found is None and not sidecar.is_file(real, _os.identity(file)):
            raise _replaced(target)
        lasting = not writable or say_limits(file, target, reserve=False)
        epoch = _epoch(file)
        remembered = found.header if found else sidecar.new_header(file, "sequential", checksum)
        kind, checksum_kind = allocator or remembered.allocator, remembered.checksum
        if found is not None and blocks != (found.header.allocator == sidecar.BLOCKS):
            which = "no array's" if blocks else "an unfinished array's: open_array goes on with it"
            raise JournalMismatchError(f"the journal of {target!r} is {which}")
        try:
            _allocator(kind, 1)
            digest = None if checksum_kind is None else checksum_function(checksum_kind)
        except ValueError as error:
            raise JournalMismatchError(f"the journal of {target!r} is of another version: {error}") from None
        journal, sequence, receipts = None, 0, np.empty(0, RECEIPT)
        if discard:
            header = sidecar.new_header(file, kind, checksum)
            with sidecar.replacing(real, _os.identity(file), header, epoch, 0) as (journal, publish, _):
                journal.sync()
                publish()
        elif found is not None and writable:
            journal, receipts, sequence = settle(real, file, found, epoch, lasting=lasting)
        elif found is not None:
            receipts = peek(found, epoch)
        mapped = options.map(file, writable=writable)
        replace = partial(sidecar.replacing, real, mapped.identity)
        ledger = Ledger(journal, mapped.sync, replace, sequence=sequence, lasting=lasting, known=receipts)
        free = holes(receipts, mapped.nbytes)[slice(0 if journal is None else None)]
        handout = _allocator(kind, mapped.nbytes, np.stack((free["start"], free["stop"]), axis=1))
        store = BlockStore(target, mapped, options, handout, ledger, digest, lock)
        undo.pop_all()
        return store


def _allocator(kind: str, nbytes: int, holes: NDArray[np.uint64] | None = None) -> Allocator:
    """Return what hands out the holes of a file, or all of it; nothing of a file of an array."""
    if kind == sidecar.BLOCKS:
        return SequentialAllocator(nbytes, holes=())
    return allocator_class(kind)(nbytes, holes=holes)


def _locked(file: _os.File, path: str, undo: contextlib.ExitStack) -> _disk.FileLock:
    """Lock a file, until an error or the store lets go of it."""
    try:
        lock = _disk.FileLock(file, path)
    except BlockingIOError:
        identity = _os.identity(file)
        here = [f"{s!r}" for s in live.stores() if s._mapped.writable and s._mapped.identity == identity]
        if here:
            who = f"{here[0]} of this process has it open"
        elif _disk.is_locked_here(file):
            who = "arrays of a closed store of this process can still write it, drop them first"
        else:
            who = "a store of another process has it open"
        raise StoreInUseError(f"cannot open {path!r} for writing: {who}; mode='r' reads it") from None
    undo.callback(lock.release)
    return lock


def _replaced(path: str) -> OSError:
    return OSError(errno.ESTALE, "the file was replaced by another one while it was being opened: open it again", path)


def _epoch(file: _os.File) -> int:
    """Return what names this boot and mount, and where that is not known, this moment."""
    return _disk.epoch(file) or secrets.randbits(64) | 1


def say_limits(file: _os.File, path: str, *, reserve: bool) -> bool:
    """Warn of what the file system cannot promise; return whether a sync means anything there."""
    kind = _disk.filesystem(file)
    if kind in _disk.FORGETFUL:
        text = "lives in memory: nothing there survives a power loss, and no receipt is ever called durable"
    elif kind in _disk.COPY_ON_WRITE and reserve:
        text = "copies on write, so that reserved space protects nothing: a full disk can be a SIGBUS while filling"
    else:
        return True
    warnings.warn(f"{path!r} is on {kind}, which {text}", FileSystemWarning, stacklevel=4)
    return kind not in _disk.FORGETFUL


def absolute(path: StrPath) -> str:
    """Return a path as text, from the root."""
    return str(Path(os.fsdecode(path)).absolute())


def _reduce(store: BlockStore) -> tuple[Any, ...]:
    """Pickle a store as a reference."""
    if store._down is not None:
        store._refuse()
    return _reopen, (store.path, store._mapped.identity, store.mode, store._token)


copyreg.pickle(BlockStore, _reduce)


def _reopen(path: str, identity: tuple[int, ...], mode: str, token: bytes) -> BlockStore:
    """Unpickle a store: itself, or one of this process that grants no more, or the same file opened to read."""
    found = [s for s in live.stores() if isinstance(s, BlockStore) and s._mapped.identity == identity]
    for store in sorted(found, key=lambda s: s._token != token):
        if store._token == token or mode == "r+" or store.mode == "r":
            return store
    store = open(path, mode="r")
    store._quiet = True  # it goes with the last range or array that refers to it
    if store._mapped.identity != identity:
        store.close()
        raise StaleReferenceError(f"{path!r} is not the file that this reference was made for: it was replaced")
    return store
