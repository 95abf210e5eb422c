"""Sidecar: which journal belongs to which file, and how the two appear, are found, and are replaced together.

The journal of ``data.bin`` is ``data.bin.journal``. While a store is being created it is ``data.bin.journal.new``: the
moment in which the file gets its name is the moment in which the store is there. This module knows names and
identities; nothing of what records mean.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from typing import NamedTuple

from blockstore import _disk, _os
from blockstore.errors import JournalMismatchError
from blockstore.journal import (
    Header,
    Journal,
    NoSpaceError,
    is_journal,
    open_journal,
    read_header,
    space_for,
)

_USUAL_NBYTES, _MANY = 1 << 16, 1 << 16
"""Bytes of a range for which a new journal has space, and for how many at most; it grows when there is no more."""


def path_of(path: str) -> str:
    """Return where the journal of the file `path` is."""
    return f"{path}.journal"


def _fresh(path: str) -> str:
    return f"{path}.journal.new"


def new_header(file: _os.File, allocator: str, checksum: str | None) -> Header:
    """Return the header of a new journal for a file."""
    _, inode, generation, nbytes = _os.identity(file)
    return Header(secrets.token_hex(16), nbytes, inode, generation, allocator, checksum)


@contextlib.contextmanager
def created(path: str, file: _os.File, header: Header, epoch: int, *, overwrite: bool) -> Iterator[Journal]:
    """Make the journal of a new file, which the body gives its name. Both are there afterwards, or neither.

    The journal gets its preliminary name first and its own last; whoever finds the file in between finds both.
    Raises `FileExistsError` if there is something that is not a journal of ours in its place, or, without `overwrite`,
    the journal of a store whose file is not there.
    """
    with _disk.folder_to_oneself(path):
        _check_free(path, overwrite)
        fresh, final = _fresh(path), path_of(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        with _os.new_file(
            fresh, space_for(min(header.nbytes // _USUAL_NBYTES, _MANY)), overwrite=False, reserve=True
        ) as journal_file:
            journal = Journal.create(journal_file, header, epoch)
            journal.sync()
        with _os.removed_on_error(fresh, journal_file):
            yield journal
        with (
            contextlib.nullcontext() if overwrite else _os.removed_on_error(path, file),
            _os.removed_on_error(fresh, journal_file),
            contextlib.nullcontext() if overwrite else _os.removed_on_error(final, journal_file),
        ):
            os.replace(fresh, final)
            _os.sync_directory(os.path.dirname(path) or ".")


class Found(NamedTuple):
    """The journal of a file, as it was found."""

    file: _os.File
    header: Header
    path: str


def find(path: str, file: _os.File, *, writable: bool, adopt: bool) -> Found | None:
    """Find the journal of an existing file; None if it has none.

    Raises `JournalMismatchError` for the journal of another file, unless told to `adopt` that of a file of the same
    size: of a pair that was copied. Ends, if `writable`, what a creator was killed in.
    """
    found, problem = None, None
    for name in (path_of(path), _fresh(path)):
        try:
            opened = open_journal(name, writable=writable)
        except FileNotFoundError:
            continue
        try:
            header = read_header(opened, name)
            _check_identity(header, file, name, adopt=adopt and name == path_of(path))
            found = Found(opened, header, name)
            break
        except JournalMismatchError as error:
            if name == path_of(path):
                problem = error
    if found is None:
        if problem is not None:
            raise problem
        return None
    if writable and found.path == _fresh(path):
        with _disk.folder_to_oneself(path):
            os.replace(found.path, path_of(path))
            _os.sync_directory(os.path.dirname(path) or ".")
    return found


@contextlib.contextmanager
def replacing(
    path: str, header: Header, epoch: int, count: int, old: int = -1
) -> Iterator[tuple[Journal, Callable[[], None]]]:
    """Make a journal with space for `count` records, and a function that puts it in the place of what is there.

    `old` is the descriptor of the journal that must be there then, or -1. Without the call nothing is left behind.
    """
    directory = os.path.dirname(path) or "."
    with _os.nameless(directory) as (file, name):
        journal = Journal.create(file, header, epoch, count)
        journal.keep()

        def publish() -> None:
            with _disk.folder_to_oneself(path):
                if old >= 0 and not os.path.samestat(os.lstat(path_of(path)), os.fstat(old)):
                    raise NoSpaceError(errno.ESTALE, "the store was replaced by another one")
                _os.publish(file, name, path_of(path), directory, overwrite=True)

        try:
            yield journal, publish
        except BaseException:
            journal.close(trim=False)
            raise


def check_replaceable(path: str) -> None:
    """Refuse to replace what is no journal of ours."""
    for name in (path_of(path), _fresh(path)):
        if os.path.lexists(name) and not is_journal(name):
            raise FileExistsError(
                errno.EEXIST, "the journal would be here, but this is something else: move it away", name
            )


def _check_free(path: str, overwrite: bool) -> None:
    if not overwrite and os.path.lexists(path):
        raise _os.exists(path)
    check_replaceable(path)
    if not overwrite and os.path.lexists(path_of(path)):
        raise FileExistsError(
            errno.EEXIST,
            "this is the journal of a store whose file is not here; delete it, or pass overwrite=True to replace it",
            path_of(path),
        )


def _check_identity(header: Header, file: _os.File, name: str, *, adopt: bool) -> None:
    _, inode, generation, nbytes = _os.identity(file)
    if header.nbytes != nbytes:
        raise JournalMismatchError(
            f"the journal {name!r} is of a file of {header.nbytes} bytes, this one has {nbytes}: "
            "it was replaced or truncated; discard=True makes the whole file free"
        )
    same = header.inode == inode and (0 in (header.generation, generation) or header.generation == generation)
    if not same and not adopt:
        raise JournalMismatchError(
            f"the journal {name!r} is of another file (inode {header.inode}, this one is {inode}): pass adopt=True "
            "if both were copied together, or discard=True to make the whole file free"
        )
