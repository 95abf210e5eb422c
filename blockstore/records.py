"""Records: what a journal says, one fact each, in 88 bytes that say whose they are and whether they are whole.

Pure functions between bytes and arrays: nothing here knows files. A record is self-contained. It names its store
(16 bytes), the boot and mount it was made in (8), its sequence number, and ends with a CRC of all before.

| kind | `start`, `stop` | says |
|---|---|---|
| WRITTEN | bytes of the range | a writer has left it cleanly |
| DURABLE | sequence numbers | what was WRITTEN with a number in ``[start, stop)`` is on the disk |
| REVOKED | bytes of the range | what was WRITTEN there before counts no more |
| VOID | sequence numbers | what was WRITTEN with a number in ``[start, stop)`` may be lost: a sync failed |

Examples
--------
>>> draft = Draft(bytes(16), epoch=1)
>>> log = draft.pack(WRITTEN, 0, 4096, 8192, 5, 7, 0) + draft.pack(DURABLE, 1, 0, 1, 0, 0, 0)
>>> records = np.frombuffer(log, RECORD)
>>> valid(records)
array([ True,  True])
>>> print(receipts_of(records, standing(records, epoch=1)))
[(4096, 8192, 5, 7,  True, 0)]
"""

import struct
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

RECORD = np.dtype(
    [
        ("magic", "<u4"),
        ("kind", "u1"),
        ("spare", "V3"),
        ("uuid", "V16"),
        ("epoch", "<u8"),
        ("sequence", "<u8"),
        ("start", "<u8"),
        ("stop", "<u8"),
        ("nbytes", "<u8"),
        ("tag", "<u8"),
        ("checksum", "<u8"),
        ("spare2", "V4"),
        ("crc", "<u4"),
    ]
)
"""One record as it lies in the file."""

RECEIPT = np.dtype(
    [
        ("start", "<u8"),
        ("stop", "<u8"),
        ("nbytes", "<u8"),
        ("tag", "<u8"),
        ("durable", "?"),
        ("checksum", "<u8"),
    ]
)
"""The dtype of `BlockStore.receipts`."""

HOLE = np.dtype([("start", "<u8"), ("stop", "<u8"), ("nbytes", "<u8")])
"""The dtype of `BlockStore.pending`."""

WRITTEN, DURABLE, REVOKED, VOID = 1, 2, 3, 4

NBYTES = RECORD.itemsize
"""Bytes of a record."""

MAGIC = 0x01_6A_73_62  # "bsj", version 1
_HEAD = struct.Struct("<16sQ")
# What `Draft.pack` is made of, for who packs one record after the other.
BODY = struct.Struct("<IB3x24s6Q4x").pack
CRC = struct.Struct("<I").pack


class Draft:
    """Packs the records of one store in one boot and mount."""

    __slots__ = ("epoch", "head")

    def __init__(self, uuid: bytes, epoch: int) -> None:
        self.epoch = epoch
        self.head = _HEAD.pack(uuid, epoch)

    def pack(self, kind: int, sequence: int, start: int, stop: int, nbytes: int, tag: int, checksum: int) -> bytes:
        """Return the bytes of one record."""
        body = BODY(MAGIC, kind, self.head, sequence, start, stop, nbytes, tag, checksum)
        return body + CRC(crc32(body))


_LOG_BLOCK = 12


def _chain() -> list[int]:
    """Return the CRC of 1, 2, 4, ... whole records in a row.

    It is the same for all of them. A CRC is linear, and a message that ends with its own CRC leaves the register in
    one known state; so do any number of such messages, of equal length, one after the other.
    """
    whole = Draft(bytes(16), 0).pack(WRITTEN, 0, 0, 0, 0, 0, 0)
    chain = [crc32(whole)]
    for doublings in range(_LOG_BLOCK):
        chain.append(crc32(whole * (1 << doublings), chain[-1]))
    return chain


_CHAIN = _chain()


def valid(records: NDArray[np.void]) -> NDArray[np.bool_]:
    """Return which records are whole: their magic and CRC are right.

    Takes one CRC of 4096 records at a time, and looks closer only where it is not that of whole ones: as fast as the
    CRC itself.
    """
    raw = np.ascontiguousarray(records).view(np.uint8).data
    good: NDArray[np.bool_] = records["magic"] == MAGIC
    size = 1 << _LOG_BLOCK
    for first in range(0, len(records), size):
        _check(raw, good, first, min(size, len(records) - first))
    return good


def _check(raw: memoryview, good: NDArray[np.bool_], first: int, count: int) -> None:
    """Clear the flags of the damaged ones among `count` records from `first`."""
    level = count.bit_length() - 1
    size = 1 << level
    if crc32(raw[first * NBYTES : (first + size) * NBYTES]) != _CHAIN[level]:
        if level == 0:
            good[first] = False
        else:
            _check(raw, good, first, size >> 1)
            _check(raw, good, first + (size >> 1), size >> 1)
    if size < count:
        _check(raw, good, first + size, count - size)


def own(records: NDArray[np.void], uuid: bytes) -> NDArray[np.bool_]:
    """Return which records name the store `uuid`."""
    if len(records) == 0:
        return np.zeros(0, np.bool_)
    words = np.frombuffer(uuid, "<u8")
    halves = _fields(records, "uuid", "<u8", 2)
    return np.asarray((halves[:, 0] == words[0]) & (halves[:, 1] == words[1]))


def _fields(records: NDArray[np.void], name: str, dtype: str, count: int) -> NDArray[Any]:
    """Return `count` numbers from where the field `name` starts, of each record, without a copy."""
    offset = RECORD.fields[name][1] if RECORD.fields else 0
    return np.ndarray((len(records), count), dtype, records, offset, (records.strides[0], np.dtype(dtype).itemsize))


class Standing(NamedTuple):
    """Which records are receipts that stand."""

    where: NDArray[np.intp]
    """Their indices among the records, in order of `start`."""
    durable: NDArray[np.bool_]
    """Which of them are on the disk, as the records tell."""
    dropped: int
    """How many ranges were written last by a writer whose receipt does not stand."""


def standing(records: NDArray[np.void], epoch: int) -> Standing:
    """Return the receipts that stand in the boot and mount `epoch`.

    The last record of a range counts. A receipt that is not durable stands only in the boot and mount in which it
    was made, and nowhere once it is void. O(n log n) at worst, O(n) if ranges were written in order of `start`.
    """
    kinds = np.ascontiguousarray(records["kind"])
    index = np.flatnonzero((kinds == WRITTEN) | (kinds == REVOKED))
    starts = _pick(records["start"], index)
    if not np.all(starts[1:] > starts[:-1]):
        order = np.argsort(starts, kind="stable")
        starts = starts[order]
        index = index[order][np.append(starts[1:] != starts[:-1], True)]
    if np.any(kinds == REVOKED):
        index = index[kinds[index] == WRITTEN]
    sequences = _pick(records["sequence"], index)
    void = _within(sequences, records[kinds == VOID])
    durable = _within(sequences, records[kinds == DURABLE]) & ~void
    stands = durable | ((_pick(records["epoch"], index) == epoch) & ~void)
    if stands.all():
        return Standing(index, durable, 0)
    return Standing(index[stands], durable[stands], int(np.count_nonzero(~stands)))


def _pick(field: NDArray[Any], index: NDArray[np.intp]) -> NDArray[Any]:
    """Return ``field[index]``, by a plain copy where `index` is simply all there is, in order."""
    count = len(index)
    if count and count <= len(field) and index[0] == 0 and index[-1] == count - 1 and np.all(index[1:] > index[:-1]):
        return np.ascontiguousarray(field[:count])
    return np.asarray(field[index])


def _within(sequences: NDArray[np.uint64], spans: NDArray[np.void]) -> NDArray[np.bool_]:
    """Return which sequence numbers lie in ``[start, stop)`` of any of some records."""
    if len(spans) == 0:
        return np.zeros(len(sequences), np.bool_)
    order = np.argsort(spans["start"], kind="stable")
    lows = spans["start"][order]
    highs = np.maximum.accumulate(spans["stop"][order])
    at = np.searchsorted(lows, sequences, side="right")
    return np.asarray((at > 0) & (sequences < highs[np.maximum(at, 1) - 1]))


def receipts_of(records: NDArray[np.void], which: Standing) -> NDArray[np.void]:
    """Return the receipts as users see them, in order of `start`."""
    receipts = np.empty(len(which.where), RECEIPT)
    for name in ("start", "stop", "nbytes", "tag", "checksum"):
        receipts[name] = _pick(records[name], which.where)
    receipts["durable"] = which.durable
    return receipts


def holes(receipts: NDArray[np.void], nbytes: int) -> NDArray[np.void]:
    """Return what of ``[0, nbytes)`` the receipts leave: an array of `HOLE`, in order of `start`."""
    edges = np.zeros((len(receipts) + 1, 2), "<u8")
    edges[1:, 0] = receipts["stop"]
    edges[:-1, 1] = receipts["start"]
    edges[-1, 1] = nbytes
    edges = edges[edges[:, 0] < edges[:, 1]]
    found = np.empty(len(edges), HOLE)
    found["start"], found["stop"] = edges[:, 0], edges[:, 1]
    found["nbytes"] = found["stop"] - found["start"]
    return found
