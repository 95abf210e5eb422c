"""Draft: the hidden record of an array that is being filled: what it will be, and that somebody is at it.

The draft of ``x.npy`` is ``.x.npy.filling.json`` beside it, that of ``x.zarr`` is ``x.zarr/.filling.json``. It is there
from the creation of an array until all of it is published. Whoever writes the array holds its lock. Each file of
an array is filled under a hidden name, which `working_of` says. This module knows names and JSON; nothing of blocks.

Examples
--------
>>> working_of("data/x.npy"), draft_of("data/x.npy"), draft_of("data/x.zarr")
('data/.x.npy.filling', 'data/.x.npy.filling.json', 'data/x.zarr/.filling.json')
"""

import contextlib
import errno
import json
import os
import warnings
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from blockstore import _disk, _os
from blockstore.errors import (
    FingerprintError,
    FingerprintWarning,
    FormatError,
    LayoutError,
    NotRegularFileError,
    StoreInUseError,
)

_VERSION = 1
_MAX_NBYTES = 1 << 20
"""Bytes of the longest draft, and so of a fingerprint."""


def is_npy(path: str) -> bool:
    """Whether an array at this path is an ``.npy`` file, and not a Zarr array."""
    return path.lower().endswith(".npy")


def working_of(path: str) -> str:
    """Return the hidden name under which the file `path` of an array is filled."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.filling")


def mark_of(path: str) -> str:
    """Return the name of an empty file that says that the ``.npy`` at `path` is of this array, and to be replaced."""
    return f"{working_of(path)}.partial"


def copy_of(path: str) -> str:
    """Return the name that a copy of an incomplete ``.npy`` has for a moment, before it is published."""
    return f"{working_of(path)}.copy"


def draft_of(path: str) -> str:
    """Return the name of the draft of the array at `path`."""
    return f"{working_of(path)}.json" if is_npy(path) else os.path.join(path, ".filling.json")


@dataclass(frozen=True, slots=True)
class Draft:
    """What is to be remembered of an array until it is finished."""

    uuid: str
    """32 hexadecimal digits."""
    checksum: str | None
    reserve: bool
    keep_journal: bool
    replaces: bool
    """Whether a file of the same name is to be replaced when the array is published."""
    rewrites: bool
    """Whether that file is this array, finished before, and written again."""
    fingerprint: str | None
    """The settings that it was created with, as `canonical` text."""
    shape: tuple[int, ...] | None = None
    """Of an ``.npy`` array, which has no metadata before it is published; so are the next two."""
    chunks: tuple[int, ...] | None = None
    dtype: str | None = None

    def encode(self) -> bytes:
        """Return the text of the file."""
        return json.dumps({"blockstore_draft": _VERSION, **asdict(self)}, indent=1).encode("ascii") + b"\n"

    def _makes_sense(self) -> bool:
        """Whether what was read from a file is of the types that it should be."""
        values: dict[str, Any] = asdict(self)
        if values["fingerprint"] is not None:
            json.loads(values["fingerprint"])
        return (
            isinstance(values["uuid"], str)
            and isinstance(values["checksum"], str | None)
            and isinstance(values["dtype"], str | None)
            and all(isinstance(values[name], bool) for name in ("reserve", "keep_journal", "replaces", "rewrites"))
            and all(type(n) is int for name in ("shape", "chunks") for n in values[name] or ())
        )

    @staticmethod
    def decode(text: bytes, path: str) -> "Draft":
        """Return the draft that a text holds, or raise `FormatError`."""
        try:
            values = json.loads(text if len(text) <= _MAX_NBYTES else b"")
            if values.pop("blockstore_draft") == _VERSION:
                draft = Draft(**{field.name: _as_kept(values[field.name]) for field in fields(Draft)})
                if draft._makes_sense():
                    return draft
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        raise FormatError(
            f"{path!r} should say what the unfinished array is, and makes no sense: create it with overwrite=True"
        )


def write_draft(path: str, draft: Draft) -> _disk.FileLock:
    """Put the draft where it belongs, and hold its lock. Raises `FileExistsError` if there is one already."""
    directory = os.path.dirname(path)
    with _os.nameless(directory) as (file, name):
        _os.put_at(file, draft.encode(), 0)
        os.fsync(file.fileno())
        lock = _disk.FileLock(file, name or path)
        lock.keep()
        try:
            _os.publish(file, name, path, directory, overwrite=False)
        except BaseException:
            lock.release()
            raise
    return lock


def read_draft(path: str) -> tuple[_os.File, Draft] | None:
    """Read the draft of this name; None if there is none."""
    try:
        file = _os.open_file(path, writable=False, follow=False)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except LayoutError:
        return _os.File(os.open(path, os.O_RDONLY)), Draft.decode(b"", path)
    except NotRegularFileError:
        raise FormatError(f"{path!r} is in the way of the record of an unfinished array: move it away") from None
    size = min(os.fstat(file.fileno()).st_size, _MAX_NBYTES + 1)
    return file, Draft.decode(os.pread(file.fileno(), size, 0), path)


def lock_draft(path: str, array: str) -> _disk.FileLock | None:
    """Hold the lock of the draft of an array, to write it; None if it has none. Raises `StoreInUseError`."""
    try:
        file = _os.open_file(path, writable=True, follow=False)
    except (FileNotFoundError, NotADirectoryError, LayoutError, NotRegularFileError):
        return None  # `read_draft` says what is wrong
    try:
        lock = _disk.FileLock(file, path)
    except BlockingIOError:
        here = "this process" if _disk.is_locked_here(file) else "another process"
        raise StoreInUseError(
            f"cannot open {array!r} for writing: an array of {here} has it open; mode='r' reads it"
        ) from None
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.lstat(path), os.fstat(file.fileno())):
            lock.keep()
            return lock
    lock.release()  # whoever held it has finished the array meanwhile
    return lock_draft(path, array)


def canonical(fingerprint: Any) -> str:
    """Return settings as text that is the same for equal ones.

    Raises `TypeError` for what JSON cannot say, and `ValueError` for what is too long. NumPy's scalars, arrays and
    dtypes, and paths count as the plain values that they stand for.
    """
    try:
        text = json.dumps(fingerprint, sort_keys=True, separators=(",", ":"), default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"a fingerprint is what JSON can say, such as a dict of settings: {error}") from None
    if len(text) > _MAX_NBYTES // 4:  # as JSON within JSON it may grow
        raise ValueError(
            f"a fingerprint takes {_MAX_NBYTES // 4} bytes at most, this one {len(text)}: pass a digest of it"
        )
    return text


def _as_kept(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: object) -> object:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, np.dtype):
        return value.str
    if isinstance(value, os.PathLike):
        return os.fsdecode(os.fspath(value))
    raise TypeError(f"{value!r} of type {type(value).__name__} is not")


def check_fingerprint(path: str, kept: str | None, given: Any) -> None:
    """Raise `FingerprintError` if an unfinished array was begun with other settings than `given`."""
    text = canonical(given)
    if text == kept:
        return
    if kept is None:
        raise FingerprintError(
            f"{path!r} was created without a fingerprint, so nothing says that its settings are these", None, given
        )
    old, new = json.loads(kept), json.loads(text)
    raise FingerprintError(
        f"{path!r} was begun with other settings: {_difference(old, new)}; go on with those, or create it anew with "
        "overwrite=True",
        old,
        new,
    )


def warn_of_fingerprint(path: str) -> None:
    """Say that nothing can be compared with a fingerprint any more."""
    warnings.warn(
        f"{path!r} is finished and keeps no fingerprint: nothing says whether its settings were these",
        FingerprintWarning,
        stacklevel=4,
    )


def _difference(old: Any, new: Any) -> str:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{_short(old)}, not {_short(new)}"
    missing = object()
    keys = [key for key in sorted({*old, *new}) if old.get(key, missing) != new.get(key, missing)]
    told = [
        f"{key!r} was {_short(old[key]) if key in old else 'not there'}, now "
        f"{_short(new[key]) if key in new else 'is not there'}"
        for key in keys[:5]
    ]
    return ", ".join(told) + (f", and {len(keys) - 5} more" if len(keys) > 5 else "")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def exists(path: str, what: str) -> FileExistsError:
    """Return the error of a creation where there is something already."""
    return FileExistsError(errno.EEXIST, f"{what}; open_array() it, or pass overwrite=True to replace it", path)
