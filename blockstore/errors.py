"""Every error and warning blockstore raises, in one tree.

Each error is also the built-in a caller would expect, carries its numbers as attributes, and says
what was asked, what was there, and in which unit. Errors of the system itself (`FileExistsError`,
`FileNotFoundError`, `PermissionError`, ...) are passed on as they are.

::

    BlockStoreError(Exception)
    ├── OutOfSpaceError          OSError(ENOSPC)     no hole is large enough
    ├── LengthError              ValueError          data does not fill the range exactly
    ├── LayoutError              ValueError          this shape does not fit
    ├── DtypeError               TypeError           this dtype cannot live in a file
    ├── RangeStateError          ValueError          the range may not be used like this now
    │   ├── SpentRangeError                          it was split, or is a mere reference
    │   ├── AlreadyWrittenError                      it is written, and immutable
    │   ├── NotWrittenError                          it has no receipt, so nothing to read
    │   └── WriterBusyError                          another writer is inside
    ├── EscapedViewError         BufferError         views of an earlier writer are alive
    ├── ForeignRangeError        ValueError          the range or receipt is not this store's
    ├── RevokedReceiptError      ValueError          a rewrite voided the receipt
    ├── StoreInUseError          BlockingIOError     another store has the file open to write
    ├── StaleReferenceError      ValueError          the file of a pickled store was replaced
    ├── ClosedStoreError         ValueError          the store is closed
    ├── ForkedStoreError         RuntimeError        the store was inherited through a fork
    ├── ReadOnlyStoreError       io.UnsupportedOperation   the store was opened with mode="r"
    ├── JournalMismatchError     ValueError          the journal is another file's, or none
    ├── JournalSpaceError        OSError             the journal has no space for more
    ├── NotRegularFileError      OSError             a directory, FIFO or device
    ├── FormatError              ValueError          no array, a damaged one, or one of a kind not supported
    ├── FingerprintError         ValueError          the array was begun with other settings
    ├── SelectionError           IndexError          an assignment that cuts blocks
    ├── FillError                ExceptionGroup      blocks of a fill failed; all others are written
    └── PoisonedStoreError       OSError(EIO)        an earlier sync failed

    EscapedViewWarning(UserWarning)
    FileSystemWarning(UserWarning)
    FingerprintWarning(UserWarning)
    JournalDamageWarning(UserWarning)

Examples
--------
>>> from blockstore import SequentialAllocator
>>> try:
...     SequentialAllocator(4096).allocate(8192)
... except OSError as error:
...     print(error.strerror)
cannot allocate 8192 bytes: 4096 bytes are free
"""

import errno
import io
from collections.abc import Sequence

__all__ = [
    "AlreadyWrittenError",
    "BlockStoreError",
    "ClosedStoreError",
    "DtypeError",
    "EscapedViewError",
    "EscapedViewWarning",
    "FileSystemWarning",
    "FillError",
    "FingerprintError",
    "FingerprintWarning",
    "ForeignRangeError",
    "ForkedStoreError",
    "FormatError",
    "JournalDamageWarning",
    "JournalMismatchError",
    "JournalSpaceError",
    "LayoutError",
    "LengthError",
    "NotRegularFileError",
    "NotWrittenError",
    "OutOfSpaceError",
    "PoisonedStoreError",
    "RangeStateError",
    "ReadOnlyStoreError",
    "RevokedReceiptError",
    "SelectionError",
    "SpentRangeError",
    "StaleReferenceError",
    "StoreInUseError",
    "WriterBusyError",
]


class BlockStoreError(Exception):
    """Base of every error that blockstore itself raises."""


class OutOfSpaceError(BlockStoreError, OSError):
    """No hole is large enough; nothing was allocated. `errno` is ``ENOSPC``.

    Attributes
    ----------
    requested : int
        Bytes that were asked for.
    free : int
        Bytes that are free in total.
    largest : int
        Bytes of the largest contiguous hole.
    """

    def __init__(self, requested: int, free: int, largest: int, hint: str = "") -> None:
        where = "" if largest == free else f", the largest hole has {largest} bytes"
        super().__init__(errno.ENOSPC, f"cannot allocate {requested} bytes: {free} bytes are free{where}{hint}")
        self.requested = requested
        self.free = free
        self.largest = largest
        self._hint = hint

    def __reduce__(self) -> tuple[type["OutOfSpaceError"], tuple[int, int, int, str]]:
        return type(self), (self.requested, self.free, self.largest, self._hint)


class LengthError(BlockStoreError, ValueError):
    """Data and range differ in length; not a byte was moved.

    Attributes
    ----------
    expected, given : int
        Bytes that the range takes, bytes that were passed.
    """

    def __init__(self, expected: int, given: int) -> None:
        super().__init__(expected, given)
        self.expected = expected
        self.given = given

    def __str__(self) -> str:
        return f"the range takes exactly {self.expected} bytes, {self.given} bytes were given"


class LayoutError(BlockStoreError, ValueError):
    """A shape that is malformed, or needs more bytes than the range or file has."""


class DtypeError(BlockStoreError, TypeError):
    """A dtype that cannot live in a file, or is not the dtype of the range."""


class RangeStateError(BlockStoreError, ValueError):
    """The range may not be used in this way in the state it is in."""


class SpentRangeError(RangeStateError):
    """The range was split, or is a mere reference to one allocated elsewhere."""


class AlreadyWrittenError(RangeStateError):
    """The range has a receipt and is immutable unless ``rewrite=True`` is asked for."""


class NotWrittenError(RangeStateError):
    """The range has no receipt: its bytes are nobody's result yet."""


class WriterBusyError(RangeStateError):
    """Another writer of the same range is still inside its ``with`` block."""


class EscapedViewError(BlockStoreError, BufferError):
    """Views of the range outlived the writer that handed them out.

    Attributes
    ----------
    start, stop : int
        The range, in bytes from the start of the data.
    count : int
        Views that were found.
    """

    def __init__(self, start: int, stop: int, count: int, consequence: str) -> None:
        super().__init__(start, stop, count, consequence)
        self.start = start
        self.stop = stop
        self.count = count
        self.consequence = consequence

    def __str__(self) -> str:
        return f"{escaped_text(self.start, self.stop, self.count)}: {self.consequence}"


class EscapedViewWarning(UserWarning):
    """Views of a range outlived the writer that handed them out."""


def escaped_text(start: int, stop: int, count: int) -> str:
    """Say which views escaped from which range."""
    views = "1 view" if count == 1 else f"{count} views"
    return f"{views} of range [{start}, {stop}) outlived the writer (a slice, memoryview, closure or running thread)"


class ForeignRangeError(BlockStoreError, ValueError):
    """A range or receipt that belongs to another store."""


class RevokedReceiptError(BlockStoreError, ValueError):
    """A receipt whose range has been opened for rewriting since, or which a failed sync has voided."""


class JournalMismatchError(BlockStoreError, ValueError):
    """The file where the journal of a store should be is another store's journal, or no journal at all."""


class JournalSpaceError(BlockStoreError, OSError):
    """No space could be had for a record or a new journal: nothing was recorded, and what was recorded stands."""


class JournalDamageWarning(UserWarning):
    """Records in the midst of a journal are damaged: what they said is lost, the others hold."""


class FileSystemWarning(UserWarning):
    """The file system cannot keep a promise that was asked for: durability, or reserved space."""


class StaleReferenceError(BlockStoreError, ValueError):
    """A pickled store whose path now names another file."""


class StoreInUseError(BlockStoreError, BlockingIOError):
    """Another store, of this process or another one, has the file open for writing."""


class ClosedStoreError(BlockStoreError, ValueError):
    """The store is closed."""


class ForkedStoreError(BlockStoreError, RuntimeError):
    """The store was inherited through ``fork``: the parent goes on with it, the child reopens it."""


class ReadOnlyStoreError(BlockStoreError, io.UnsupportedOperation):
    """The store was opened with ``mode="r"``."""


class NotRegularFileError(BlockStoreError, OSError):
    """The path names a directory, FIFO, socket or device."""


class FormatError(BlockStoreError, ValueError):
    """A file that is not the array it should be: damaged, cut off, or of a kind that is not supported."""


class FingerprintError(BlockStoreError, ValueError):
    """An unfinished array was begun with other settings than those that are to go on with it.

    Attributes
    ----------
    expected, given : object
        The fingerprint that the array was created with, and the other one, as JSON knows them; `expected` is None if
        it was too large to be kept as more than a digest.
    """

    def __init__(self, message: str, expected: object, given: object) -> None:
        super().__init__(message, expected, given)
        self.expected = expected
        self.given = given

    def __str__(self) -> str:
        return str(self.args[0])


class FingerprintWarning(UserWarning):
    """A fingerprint was given for an array that keeps none, as a finished one does."""


class SelectionError(BlockStoreError, IndexError):
    """An assignment to a part of an array that is not made of whole blocks; nothing was written."""


class FillError(BlockStoreError, ExceptionGroup[Exception]):
    """Some blocks of a fill failed. All others are written; filling again does only what is missing.

    Attributes
    ----------
    indices : list of tuple of int
        The blocks that failed, all of them.
    exceptions : tuple of Exception
        What was raised, in the same order, of the first ones. Each has a note that says for which block.
    """

    indices: "list[tuple[int, ...]]"

    def __new__(
        cls, message: str, exceptions: "Sequence[Exception]", indices: "Sequence[tuple[int, ...]]" = ()
    ) -> "FillError":
        error = super().__new__(cls, message, exceptions)
        error.indices = list(indices)
        return error

    def __init__(
        self, message: str, exceptions: "Sequence[Exception]", indices: "Sequence[tuple[int, ...]]" = ()
    ) -> None:
        super().__init__(message, exceptions)

    def derive(self, excs: "Sequence[Exception]") -> "FillError":  # type: ignore[override]
        """Return one of a part of the exceptions, for `split` and `subgroup`."""
        return FillError(self.message, excs, self.indices)

    def __reduce__(self) -> "tuple[type[FillError], tuple[str, Sequence[Exception], list[tuple[int, ...]]]]":
        return type(self), (self.message, self.exceptions, self.indices)


class PoisonedStoreError(BlockStoreError, OSError):
    """An earlier sync failed, so the kernel may have dropped data: reopen the store to go on."""


for _name in __all__:  # so that tracebacks say the public name
    globals()[_name].__module__ = "blockstore"
