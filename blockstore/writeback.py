"""Writeback: one thread of the process lets the disk begin with what was written, while the writers go on.

The call that starts the writing of a piece of a file waits where the device has enough to do, so writers do not make it
themselves. Nothing is promised by it; who wants that syncs. The thread ends when there has been nothing to do for
`LINGER_SECONDS`, and is not there in a forked child. Offsets are bytes in a file.
"""

import contextlib
import os
import queue
import threading

from blockstore import _os

LINGER_SECONDS = 1.0

_Piece = tuple[_os.File, int, int]

_pieces: "queue.SimpleQueue[_Piece]" = queue.SimpleQueue()
_lock = threading.Lock()
_thread: threading.Thread | None = None


def begin(file: _os.File, start: int, stop: int) -> None:
    """Have ``[start, stop)`` of a file written to the disk soon; wait for nothing. The file stays open until then."""
    global _thread
    if _os.PORTABLE:
        return
    with _lock:
        _pieces.put((file, start, stop))
        if _thread is None:
            with contextlib.suppress(RuntimeError):  # the interpreter is ending, or the system has no more threads
                _thread = thread = threading.Thread(target=_run, name="blockstore-writeback", daemon=True)
                thread.start()


def _run() -> None:
    global _thread
    while True:
        try:
            piece = _pieces.get(timeout=LINGER_SECONDS)
        except queue.Empty:
            with _lock:
                if _pieces.empty():
                    _thread = None
                    return
            continue
        _os.start_writeback(*piece)
        del piece  # or it would keep its file open


def _forget() -> None:
    """In a forked child: the thread is the parent's."""
    global _pieces, _lock, _thread
    _pieces, _lock, _thread = queue.SimpleQueue(), threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
