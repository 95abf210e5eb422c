"""Journal: the file beside a store's file that holds its records. Append, sync, read back.

One page of header, then records, then reserved space. Records are appended through a memory map, so that one costs no
system call, survives the process, and can fill no disk: the space is reserved before. Nothing read from a file is
executed: the header is a line of text and JSON, the records are checked one by one. This module knows one file and
how records follow each other; what they mean is known to `records` and `ledger`. Offsets and sizes are bytes.
"""

import contextlib
import errno
import io
import json
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import NoReturn
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from blockstore import _os
from blockstore.errors import JournalMismatchError, JournalSpaceError, LayoutError, NotRegularFileError
from blockstore.records import BODY, CRC, DURABLE, MAGIC, NBYTES, RECORD, Draft, own, valid

HEADER_NBYTES = 4096

_TITLE = b"blockstore journal, version 1, crc32 "
_SPARE_NBYTES = 8192
"""Zeros behind the map: half for a last DURABLE on a full disk; from the rest one sees that nothing was cut off."""
_GROW_MIN, _GROW_MAX = 1 << 16, 1 << 26
_LAST_WORDS_NBYTES = 512
_ROOM_NBYTES = 4096
"""What a closed journal keeps for more records, and the least that it grows by."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a journal says of its store."""

    uuid: str
    """32 hexadecimal digits, also in each record."""
    nbytes: int
    """Bytes of the store's file."""
    inode: int
    """Its inode, and the generation of that, 0 if unknown: a copy has others."""
    generation: int
    allocator: str
    checksum: str | None

    def encode(self) -> bytes:
        """Return the header page."""
        text = json.dumps(asdict(self)).encode("ascii")
        page = _TITLE + b"%08x\n" % crc32(text) + text
        return page.ljust(HEADER_NBYTES - 1) + b"\n"

    @staticmethod
    def decode(page: bytes, path: str) -> "Header":
        """Return the header that a page holds, or raise `JournalMismatchError`."""
        title, _, rest = page.partition(b"\n")
        if not title.startswith(_TITLE):
            raise JournalMismatchError(f"{path!r} is not a journal of blockstore: move it away, or pass another path")
        text = rest.rstrip()
        if title != _TITLE + b"%08x" % crc32(text):
            raise JournalMismatchError(f"the header of the journal {path!r} is damaged: {_DISCARD}")
        try:
            values = json.loads(text)
            header = Header(**{field.name: values[field.name] for field in fields(Header)})
            if len(bytes.fromhex(header.uuid)) == 16 and type(header.nbytes) is int:
                return header
        except (ValueError, TypeError, KeyError):
            pass
        raise JournalMismatchError(f"the header of the journal {path!r} makes no sense: {_DISCARD}")


_DISCARD = "open(..., discard=True) makes a new one, and the whole file free"


def is_journal(path: str) -> bool:
    """Whether a path names a journal of ours, by its first bytes."""
    try:
        file = _os.open_file(path, writable=False, follow=False)
    except (OSError, LayoutError):
        return False
    return os.read(file.fileno(), len(_TITLE)) == _TITLE


class Journal:
    """An open journal. Callers see to it that one thread at a time appends.

    Attributes
    ----------
    header : Header
    count : int
        Records in it.
    """

    __slots__ = ("_draft", "_file", "_head", "_map", "_write", "header")

    _map: mmap.mmap
    _write: Callable[[bytes], int]

    def __init__(self, file: _os.File, header: Header, count: int, epoch: int) -> None:
        self._file: _os.File | None = file
        self.header = header
        self._draft = Draft(bytes.fromhex(header.uuid), epoch)
        self._head = self._draft.head
        self._map_space(HEADER_NBYTES + count * NBYTES, 0)

    @classmethod
    def create(cls, file: _os.File, header: Header, epoch: int, count: int = 0) -> "Journal":
        """Make a journal out of an empty file, with space for at least `count` records; not synced."""
        _reserve(file, 0, (space_for(count) - _SPARE_NBYTES,))
        _os.put_at(file, header.encode(), 0)
        return cls(file, header, 0, epoch)

    @property
    def count(self) -> int:
        """Records in it."""
        return (self._map.tell() - HEADER_NBYTES) // NBYTES

    @property
    def epoch(self) -> int:
        """Boot and mount that the records made here name."""
        return self._draft.epoch

    def append(
        self, kind: int, sequence: int, start: int, stop: int, nbytes: int = 0, tag: int = 0, checksum: int = 0
    ) -> None:
        """Add a record. It survives the process at once, and the power after a `sync`.

        Raises `JournalSpaceError`, with nothing added, if no space can be reserved.
        """
        body = BODY(MAGIC, kind, self._head, sequence, start, stop, nbytes, tag, checksum)  # as `Draft.pack` does
        try:
            self._write(body + CRC(crc32(body)))
        except ValueError:  # the map is full
            self._map_space(self._map.tell(), NBYTES, last_resort=kind == DURABLE)
            self._write(body + CRC(crc32(body)))

    def extend(self, records: NDArray[np.void]) -> None:
        """Add records as they are."""
        if self._map.tell() + records.nbytes > len(self._map):
            self._map_space(self._map.tell(), records.nbytes)
        self._write(records.tobytes())

    def append_last(self, kind: int, sequence: int, start: int, stop: int) -> None:
        """Add a record behind which there will be no other, without needing space."""
        if (file := self._file) is None:
            return
        record, position = self._draft.pack(kind, sequence, start, stop, 0, 0, 0), self._map.tell()
        try:
            _os.put_at(file, record, position)
        except OSError:  # the file system refuses, and yet the map may have room
            if position + NBYTES > len(self._map):
                raise
            _os.poke(int(np.frombuffer(self._map, np.uint8).ctypes.data) + position, record)

    def records(self, first: int = 0, stop: int | None = None) -> NDArray[np.void]:
        """Return records as an array over the map, which stays valid when the journal is closed."""
        stop = self.count if stop is None else stop
        return np.ndarray(max(stop - first, 0), RECORD, self._map, HEADER_NBYTES + first * NBYTES)

    def ends_with(self, sequence: int) -> bool:
        """Whether the last record has this sequence number."""
        count = self.count
        return count > 0 and int(self.records(count - 1)["sequence"][0]) == sequence

    def sync(self) -> None:
        """Return when the disk has every record so far."""
        if (file := self._file) is not None:
            _os.sync(file, self._map)

    def keep(self) -> None:
        """Keep the file open until `close`, which the caller is sure to call."""
        if self._file is not None:
            self._file.keep()

    def close(self, *, trim: bool = True) -> None:
        """Let go of the file, and give back the space that was reserved for more. Nobody appends any more."""
        file, self._file, self._write = self._file, None, _closed
        if file is not None:
            file.release()  # first, so that Ctrl-C leaks nothing
            if trim:
                with contextlib.suppress(OSError):  # nobody needs it
                    _os.shrink(file, self._map.tell() + _ROOM_NBYTES + _SPARE_NBYTES)

    def abandon(self) -> None:
        """In a forked child: close the descriptor, whoever was using it."""
        file, self._file, self._write = self._file, None, _closed
        if file is not None:
            file.close_now()

    def _map_space(self, position: int, nbytes: int, *, last_resort: bool = False) -> None:
        """Map the records up to `position`, where the next one goes, and space for at least `nbytes` more.

        As a `last_resort` half of the spare space is taken, if no other can be had.
        """
        if self._file is None:
            _closed(b"")
        spare = _SPARE_NBYTES
        if nbytes:
            usual = max(nbytes, min(max(position, _GROW_MIN), _GROW_MAX))
            try:
                _reserve(self._file, position, (usual, max(nbytes, _ROOM_NBYTES)))
            except JournalSpaceError:
                if not last_resort:
                    raise
                spare //= 2
        capacity = max(os.fstat(self._file.fileno()).st_size - spare, position)
        if capacity < position + nbytes:
            raise JournalSpaceError(errno.ENOSPC, "the space that the journal keeps for a full disk is used up")
        mapped = mmap.mmap(self._file.fileno(), capacity)
        mapped.seek(position)
        self._map, self._write = mapped, mapped.write


def space_for(count: int) -> int:
    """Return the bytes of a new journal that has space for at least `count` records."""
    return HEADER_NBYTES + max(count * NBYTES, _GROW_MIN) + _SPARE_NBYTES


def _reserve(file: _os.File, position: int, sizes: Sequence[int]) -> None:
    """Reserve space for one of `sizes` bytes from `position`, the first that is to be had, and the spare space.

    Keeps no error in a variable: the cycle would hold the frames of all callers, and the arrays that they know.
    """
    *generous, least = (position + nbytes + _SPARE_NBYTES for nbytes in sizes)
    for nbytes in generous:
        with contextlib.suppress(OSError):
            return _os.reserve_space(file, nbytes)
    try:
        return _os.reserve_space(file, least)
    except OSError as error:
        text = f"cannot reserve {least} bytes for the journal: {error.strerror}; nothing was recorded"
        raise JournalSpaceError(error.errno, text) from None


def _closed(record: bytes) -> NoReturn:
    raise OSError(errno.EBADF, "the journal is closed")


@dataclass(frozen=True, slots=True)
class Content:
    """What a journal file was found to hold."""

    records: NDArray[np.void]
    """The valid records of this store, in the order in which they were appended."""
    index: NDArray[np.intp]
    """Where each lies, counted in records."""
    count: int
    """Where the next record goes: behind the last valid one."""
    damaged: NDArray[np.intp]
    """Where, before that, there is none of ours that is whole."""
    is_cut: bool = False
    """Whether the zeros are missing that every journal ends with, and so maybe records before them."""


def read_header(file: _os.File, path: str) -> Header:
    """Read the first page of a journal. Raises `JournalMismatchError` if it is none of ours."""
    with io.FileIO(file.fileno(), "r", closefd=False) as opened:
        opened.seek(0)
        page = opened.read(HEADER_NBYTES)
    header = Header.decode(page, path)
    if len(page) < HEADER_NBYTES:
        raise JournalMismatchError(f"the journal {path!r} is cut off in its header: {_DISCARD}")
    return header


def read_records(file: _os.File, header: Header) -> Content:
    """Read the records of a journal, and check each."""
    content, nbytes = _read(file, header, -1)
    if len(content.damaged):  # or it was appended to while it was read, page by page: what is missing is there by now
        content, _ = _read(file, header, content.count * NBYTES)
    left = nbytes - content.count * NBYTES
    return replace(content, is_cut=left < _SPARE_NBYTES // 2 - _LAST_WORDS_NBYTES)


def _read(file: _os.File, header: Header, nbytes: int) -> tuple[Content, int]:
    with io.FileIO(file.fileno(), "r", closefd=False) as opened:
        opened.seek(HEADER_NBYTES)
        raw = np.fromfile(opened, np.uint8, nbytes)
    slots = raw[: len(raw) // NBYTES * NBYTES].view(RECORD)
    used = np.flatnonzero(slots["magic"])
    slots = slots[: int(used[-1]) + 1 if len(used) else 0]
    ours = valid(slots) & own(slots, bytes.fromhex(header.uuid))
    found = np.flatnonzero(ours)
    count = int(found[-1]) + 1 if len(found) else 0
    damaged = np.flatnonzero(~ours[:count])
    return Content(slots[:count] if len(damaged) == 0 else slots[found], found, count, damaged), len(raw)


def open_journal(path: str, *, writable: bool) -> _os.File:
    """Open a journal's file, not through a symlink."""
    try:
        return _os.open_file(path, writable=writable, follow=False)
    except LayoutError:
        raise JournalMismatchError(
            f"the journal {path!r} is an empty file: delete it if it is of no use; without a journal {_DISCARD}"
        ) from None
    except OSError as error:
        if isinstance(error, NotRegularFileError) or error.errno == errno.ELOOP:
            raise JournalMismatchError(f"the journal {path!r} is no regular file: {error.strerror}") from None
        raise
