"""Fill large arrays in parallel, at memory speed, and lose nothing.

A store is one memory-mapped file that is handed out in ranges. Each range is filled through a plain
`numpy.ndarray` that is writable only inside ``with range.writer()``; a clean exit leaves a receipt, and a flush
makes receipts durable.

>>> import blockstore as bs
>>> with bs.create(tmp_path / "data.bin", 1 << 20) as store:
...     r = store.allocate(shape=(100, 50), dtype="f4")
...     with r.writer() as a:
...         a[:] = 1
>>> r.receipt
<WriteReceipt [0, 20480) 20000 bytes, durable>
"""

from blockstore.allocators import ConcurrentAllocator, SequentialAllocator
from blockstore.array import BlockArray
from blockstore.blocks import Block
from blockstore.creation import create_array, open_array
from blockstore.errors import (
    AlreadyWrittenError,
    BlockStoreError,
    ClosedStoreError,
    DtypeError,
    EscapedViewError,
    EscapedViewWarning,
    FileSystemWarning,
    FillError,
    FingerprintError,
    FingerprintWarning,
    ForeignRangeError,
    ForkedStoreError,
    FormatError,
    JournalDamageWarning,
    JournalMismatchError,
    JournalSpaceError,
    LayoutError,
    LengthError,
    NotRegularFileError,
    NotWrittenError,
    OutOfSpaceError,
    PoisonedStoreError,
    RangeStateError,
    ReadOnlyStoreError,
    RevokedReceiptError,
    SelectionError,
    SpentRangeError,
    StaleReferenceError,
    StoreInUseError,
    WriterBusyError,
)
from blockstore.opening import create, open
from blockstore.ranges import ALIGNMENT, AllocatedRange, WriteReceipt, align_down, align_up
from blockstore.store import BlockStore

__all__ = [
    "ALIGNMENT",
    "AllocatedRange",
    "AlreadyWrittenError",
    "Block",
    "BlockArray",
    "BlockStore",
    "BlockStoreError",
    "ClosedStoreError",
    "ConcurrentAllocator",
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
    "SequentialAllocator",
    "SpentRangeError",
    "StaleReferenceError",
    "StoreInUseError",
    "WriteReceipt",
    "WriterBusyError",
    "align_down",
    "align_up",
    "create",
    "create_array",
    "open",
    "open_array",
]

__version__ = "0.1.0"
