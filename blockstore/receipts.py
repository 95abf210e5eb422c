"""WriteReceipt: proof of one clean exit, and `Extent`, the bytes that it is for.

A receipt is a range and the sequence number that its ledger gave the exit. It is durable once the ledger's watermark
has passed the number, and revoked once the range has another. This module knows byte counts and numbers only.
"""

from collections.abc import Callable
from typing import Any, NoReturn, Protocol


class Watermark(Protocol):
    """What a receipt needs of a ledger."""

    @property
    def durable_below(self) -> int:
        """Records with a smaller sequence number are durable."""

    @property
    def void_from(self) -> int:
        """Records with this sequence number or a larger one are void."""


class Recorder(Protocol):
    """What a receipt needs of a store."""

    @property
    def _ledger(self) -> Watermark: ...


class Extent:
    """Bytes ``[start, stop)`` of a store, and the sequence number of what was written there."""

    __slots__ = ("_nbytes", "_owner", "_sequence", "_start", "_stop", "_tag")

    _owner: Recorder
    _start: int
    _stop: int
    _nbytes: int
    _tag: int
    _sequence: int | None

    @property
    def start(self) -> int:
        """Bytes from the start of the data to the first byte; a multiple of `ALIGNMENT`."""
        return self._start

    @property
    def stop(self) -> int:
        """Bytes from the start of the data to past the last byte that is owned."""
        return self._stop

    @property
    def nbytes(self) -> int:
        """Bytes that were asked for, at most ``stop - start``: what is written and read."""
        return self._nbytes

    @property
    def tag(self) -> int:
        """The caller's own 64 bits, as given to `BlockStore.allocate`."""
        return self._tag

    def _text(self) -> str:
        tag = f", tag {self._tag}" if self._tag else ""
        return f"[{self._start}, {self._stop}) {self._nbytes} bytes{tag}"


class WriteReceipt:
    """Proof that a writer of ``[start, stop)`` left its ``with`` block without an error.

    Made by a clean exit and by nothing else. It says *written* until a flush makes it *durable*, and is *revoked* for
    good when its range is opened for rewriting. Receipts of the same exit are equal and hash alike.
    """

    __slots__ = ("_extent", "_sequence")

    _extent: Extent
    _sequence: int

    def __init__(self) -> None:
        raise TypeError("a receipt is made by a clean exit from a writer, and by nothing else")

    @property
    def start(self) -> int:
        """Bytes from the start of the data to the first byte of the range."""
        return self._extent._start

    @property
    def stop(self) -> int:
        """Bytes from the start of the data to past the last byte that the range owns."""
        return self._extent._stop

    @property
    def nbytes(self) -> int:
        """Bytes that were asked for, at most ``stop - start``."""
        return self._extent._nbytes

    @property
    def tag(self) -> int:
        """The caller's own 64 bits, as given to `BlockStore.allocate`."""
        return self._extent._tag

    @property
    def durable(self) -> bool:
        """Whether a flush that covers this receipt has returned, and nothing was rewritten since."""
        return not self.revoked and self._sequence < self._extent._owner._ledger.durable_below

    @property
    def revoked(self) -> bool:
        """Whether the range was opened for rewriting since, or a sync failed that should have covered it."""
        return self._extent._sequence != self._sequence or self._sequence >= self._extent._owner._ledger.void_from

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WriteReceipt):
            return NotImplemented
        return self._extent is other._extent and self._sequence == other._sequence

    def __hash__(self) -> int:
        return hash((id(self._extent), self._sequence))

    def __reduce__(self) -> NoReturn:
        raise TypeError("a receipt does not pickle: BlockStore.receipts() is an array, which does")

    def __repr__(self) -> str:
        void = self._sequence >= self._extent._owner._ledger.void_from
        state = "void" if void else "revoked" if self.revoked else "durable" if self.durable else "written"
        return f"<WriteReceipt {self._extent._text()}, {state}>"


def receipt_of(extent: Extent, sequence: int) -> WriteReceipt:
    """Make the receipt of an exit that a ledger has recorded. For ranges."""
    receipt: WriteReceipt = _new(WriteReceipt)
    receipt._extent = extent
    receipt._sequence = sequence
    return receipt


_new: Callable[[type[Any]], Any] = object.__new__
