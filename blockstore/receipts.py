"""WriteReceipt: proof of one clean exit, and `Extent`, what it has in common with the range it is for.

This module knows byte counts only. Whose the receipt is, it keeps as an opaque object.
"""

from typing import NoReturn


class Extent:
    """What a range and its receipt have in common."""

    __slots__ = ("_nbytes", "_owner", "_start", "_stop", "_tag")

    _owner: object
    _start: int
    _stop: int
    _nbytes: int
    _tag: int

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
        return f"{type(self).__name__} [{self._start}, {self._stop}) {self._nbytes} bytes{tag}"


class WriteReceipt(Extent):
    """Proof that a writer of ``[start, stop)`` left its ``with`` block without an error.

    Made by a clean exit and by nothing else. It says *written* until a flush makes it *durable*, and is
    *revoked* for good when its range is opened for rewriting.
    """

    __slots__ = ("_durable", "_revoked")

    _durable: bool
    _revoked: bool

    def __init__(self) -> None:
        raise TypeError("a receipt is made by a clean exit from a writer, and by nothing else")

    @property
    def durable(self) -> bool:
        """Whether a flush that covers this receipt has returned, and nothing was rewritten since."""
        return self._durable and not self._revoked

    @property
    def revoked(self) -> bool:
        """Whether a rewrite has voided this receipt."""
        return self._revoked

    def __reduce__(self) -> NoReturn:
        raise TypeError("a receipt does not pickle: BlockStore.receipts() is an array, which does")

    def __repr__(self) -> str:
        state = "revoked" if self._revoked else "durable" if self._durable else "written"
        return f"<{self._text()}, {state}>"
