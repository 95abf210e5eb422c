"""Sidecar: which journal belongs to which file, and how the two appear, are found, and are replaced together.

The journal of ``data.bin`` is ``data.bin.journal``. While a store is being created it is ``data.bin.journal.new``: the
moment in which the file gets its name is the moment in which the store is there. This module knows names and
identities; nothing of what records mean.
"""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from blockstore import _disk, _os
from blockstore.errors import JournalMismatchError, JournalSpaceError
from blockstore.journal import (
    Header,
    Journal,
    is_journal,
    open_journal,
    read_header,
    space_for,
)

BLOCKS = "blocks"
"""What a header says in place of an allocator if the file is one of an array, whose blocks lie where the grid says."""

_FOREIGN = "the journal would be here, but this is something else: move it away"
_USUAL_NBYTES, _MANY = 1 << 16, 1 << 16
"""Bytes of a range for which a new journal has space, and for how many at most; it grows when there is no more."""


def path_of(path: str) -> str:
    """Return where the journal of the file `path` is."""
    return f"{path}.journal"


def temporary_of(path: str) -> str:
    """Return the name that a journal has for a moment which is about to replace another one; nobody believes it."""
    return f"{path}.journal.tmp"


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
        try:
            yield journal
        except BaseException:
            with contextlib.suppress(OSError):  # after an error the file may have its name all the same, and keeps it
                if is_file(path, _os.identity(file)):
                    os.replace(fresh, final)
                else:
                    os.unlink(fresh)
            raise
        with contextlib.ExitStack() as undo:
            if not overwrite:
                for name, named in ((path, file), (fresh, journal_file), (final, journal_file)):
                    undo.enter_context(_os.removed_on_error(name, named))
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
    fresh, final, found = _fresh(path), path_of(path), None
    with contextlib.suppress(JournalMismatchError):
        found = _match(fresh, file, writable=writable)
    if found is None:
        return _match(final, file, writable=writable, adopt=adopt)
    if os.path.lexists(final) and not is_journal(final):
        raise JournalMismatchError(f"{final!r}: {_FOREIGN}")
    if writable:
        with _disk.folder_to_oneself(path):
            os.replace(fresh, final)
            _os.sync_directory(os.path.dirname(path) or ".")
    return found


def _match(name: str, file: _os.File, *, writable: bool, adopt: bool = False) -> Found | None:
    """Return the journal of this name, if it is that of the file; None if there is none."""
    try:
        opened = open_journal(name, writable=writable)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # so there can be none
            return None
        raise
    header = read_header(opened, name)
    _check_identity(header, file, name, adopt=adopt)
    return Found(opened, header, name)


class Replacement(NamedTuple):
    """A new journal, and what it takes to put it in the place of the old one."""

    journal: Journal
    publish: Callable[[], None]
    """Gives it the name, in one step, and syncs the folder."""
    is_in_place: Callable[[], bool]
    """Whether it has the name: `publish` may be interrupted behind that step."""


@contextlib.contextmanager
def replacing(path: str, identity: tuple[int, ...], header: Header, epoch: int, count: int) -> Iterator[Replacement]:
    """Make a journal with space for `count` records, and a function that puts it in the place of what is there.

    `identity` is that of the file, which must still be at `path` then. Without the call nothing is left behind. Raises
    `JournalSpaceError`, with nothing changed, if it cannot be made.
    """
    directory = os.path.dirname(path) or "."
    with contextlib.ExitStack() as stack:
        try:
            file, name = stack.enter_context(_os.nameless(directory))
            keep_access(file, path_of(path))
            journal = Journal.create(file, header, epoch, count)
        except OSError as error:
            raise JournalSpaceError(
                error.errno, f"cannot write the journal anew: {error.strerror}", path_of(path)
            ) from error

        def publish() -> None:
            with _disk.folder_to_oneself(path):
                if not is_file(path, identity):
                    raise JournalSpaceError(
                        errno.ESTALE, "the file was renamed or replaced, so its journal stays", path
                    )
                check_replaceable(path)
                for left in (_fresh(path), temporary_of(path)):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(left)
                _os.publish(file, name, path_of(path), directory, overwrite=True, temporary=temporary_of(path))

        def is_in_place() -> bool:
            return is_file(path_of(path), _os.identity(file))

        try:
            yield Replacement(journal, publish, is_in_place)
        except BaseException:
            if not is_in_place():
                journal.close(trim=False)
            raise


def is_file(path: str, identity: tuple[int, ...]) -> bool:
    """Whether a path names the file of this identity."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    return (status.st_dev, status.st_ino) == identity[:2]


def keep_access(file: _os.File, old: str) -> None:
    """Give a new file the mode and, as far as that is allowed, the owner of the one that it will replace."""
    if hasattr(os, "fchown"):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            status = os.lstat(old)
            os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode))
            os.fchown(file.fileno(), status.st_uid, status.st_gid)


def check_replaceable(path: str) -> None:
    """Refuse to replace what is no journal of ours."""
    for name in (path_of(path), _fresh(path)):
        if os.path.lexists(name) and not is_journal(name):
            raise FileExistsError(errno.EEXIST, _FOREIGN, name)


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
            f"the journal {name!r} is of another file (inode {header.inode}, generation {header.generation}; this one "
            f"is {inode}, {generation}): pass adopt=True "
            "if both were copied together, or discard=True to make the whole file free"
        )
