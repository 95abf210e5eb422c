"""The thread that starts write-back: it does its work, ends, comes again, and is not there in a forked child."""

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import PORTABLE, in_child

from blockstore import _os, writeback

pytestmark = pytest.mark.skipif(PORTABLE, reason="there is no such call")


@pytest.fixture
def file(tmp_path: Path) -> _os.File:
    (tmp_path / "file").write_bytes(bytes(8192))
    return _os.open_file(str(tmp_path / "file"), writable=True)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """What was started so far, by a thread that does not linger and that is not there at first."""
    pieces: list[tuple[int, int]] = []
    monkeypatch.setattr(writeback, "LINGER_SECONDS", 0.01)
    monkeypatch.setattr(_os, "start_writeback", lambda _file, start, stop: pieces.append((start, stop)))
    ended()
    yield pieces
    ended()


def ended() -> None:
    """Wait for the end of the thread."""
    while (thread := writeback._thread) is not None:
        thread.join()


def test_each_piece_is_started_once_and_the_thread_ends(file: _os.File, started: list[tuple[int, int]]) -> None:
    for start in range(100):
        writeback.begin(file, start, start + 1)
    ended()

    assert started == [(start, start + 1) for start in range(100)]
    assert "blockstore-writeback" not in [thread.name for thread in threading.enumerate()]


def test_it_comes_again_after_its_end(file: _os.File, started: list[tuple[int, int]]) -> None:
    writeback.begin(file, 0, 1)
    ended()
    writeback.begin(file, 1, 2)
    ended()

    assert started == [(0, 1), (1, 2)]


def test_a_forked_child_has_a_thread_of_its_own(file: _os.File, started: list[tuple[int, int]]) -> None:
    writeback.begin(file, 0, 1)

    def child() -> list[tuple[int, int]]:
        started.clear()
        writeback.begin(file, 5, 6)
        ended()
        return list(started)

    assert in_child(child) == [(5, 6)]


def test_a_file_is_closed_when_it_is_started_and_nobody_else_has_it(
    tmp_path: Path, started: list[tuple[int, int]]
) -> None:
    (tmp_path / "other").write_bytes(bytes(4096))
    other = _os.open_file(str(tmp_path / "other"), writable=True)
    descriptor = other.fileno()
    writeback.begin(other, 0, 4096)
    del other
    ended()
    gc.collect()

    assert started == [(0, 4096)]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
