"""Files are replaced in one step, written whole, and open for as long as they are used."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import PORTABLE, contents, in_threads

import blockstore as bs
from blockstore import _os
from blockstore.mapped import MappedFile

linux_only = pytest.mark.skipif(PORTABLE, reason="says what Linux does")

HANG_SECONDS = 60
"""After which a test that hangs fails."""


@pytest.fixture(params=["nameless", "named"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the new file without a name, or with a temporary one."""
    system_open = os.open

    def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
        return system_open(path, flags, *args, **kwargs)

    if request.param == "named" and not PORTABLE:
        monkeypatch.setattr(os, "open", open_)
    return str(request.param)


def create(path: Path, byte: int, nbytes: int = 4096, *, overwrite: bool = False) -> None:
    """Create a file whose bytes are all `byte` when it appears."""
    with _os.new_file(str(path), nbytes, overwrite=overwrite, reserve=True) as file:
        _os.map_file(file, writable=True)[:] = byte


# -- creators that publish at the same time -------------------------------------------------------

CREATORS = 3


def wins(path: Path, creator: int) -> bool:
    try:
        create(path, creator)
    except FileExistsError:
        return False
    return True


def unfair_rounds(folder: Path, rounds: int) -> list[tuple[list[int], bytes]]:
    """Let creators race for one path after another; return who won, where that is not the one whose file is there."""
    unfair = []
    for number in range(rounds):
        path = folder / f"{number}.bin"
        won = in_threads(CREATORS, lambda creator, path=path: wins(path, creator))
        winners = [creator for creator in range(CREATORS) if won[creator]]
        held = path.read_bytes()
        if len(winners) != 1 or held != bytes(winners) * 4096:
            unfair.append((winners, held[:1]))
        path.unlink()
    return unfair


@pytest.fixture
def publishing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold each creator until all have found the path free and have a whole file to publish."""
    publish, together = _os.publish, threading.Barrier(CREATORS)

    def wait_and_publish(*args: Any, **kwargs: Any) -> None:
        together.wait(HANG_SECONDS)
        publish(*args, **kwargs)

    monkeypatch.setattr(_os, "publish", wait_and_publish)


@pytest.mark.usefixtures("road", "publishing_at_once")
def test_of_threads_that_publish_at_once_exactly_one_wins(tmp_path: Path) -> None:
    assert unfair_rounds(tmp_path, 200) == []
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("publishing_at_once")
def test_creators_that_replace_each_other_are_caught_by_the_same_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = _os.publish

    def replace(*args: Any, overwrite: bool) -> None:
        publish(*args, overwrite=True)

    monkeypatch.setattr(_os, "publish", replace)

    assert [winners for winners, _ in unfair_rounds(tmp_path, 5)] == [[0, 1, 2]] * 5


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize("name", ["data.bin", "data.bin.journal.new"])
def test_a_symlink_that_appears_during_creation_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    planted, publish = tmp_path / name, _os.publish

    def plant_and_publish(file: _os.File, temporary: str | None, path: str, *args: Any, **kwargs: Any) -> None:
        if path == str(planted):
            planted.symlink_to(tmp_path / "target")
        publish(file, temporary, path, *args, **kwargs)

    monkeypatch.setattr(_os, "publish", plant_and_publish)
    with pytest.raises(FileExistsError, match="the file exists; open"):
        bs.create(tmp_path / "data.bin", 4096)

    assert (os.listdir(tmp_path), os.readlink(planted)) == ([name], str(tmp_path / "target"))


# -- replacing ------------------------------------------------------------------------------------


def seen_while_replacing(path: Path, monkeypatch: pytest.MonkeyPatch) -> set[bytes | None]:
    """Replace a file, and return what others see of it before and after every step."""
    create(path, 1, 4096)
    seen: set[bytes | None] = set()

    def look() -> None:
        seen.add(path.read_bytes() if path.exists() else None)

    def watch(call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            look()
            try:
                return call(*args, **kwargs)
            finally:
                look()

        return watched

    with monkeypatch.context() as patch:
        for name in ["posix_fallocate", "ftruncate", "fsync", "link", "rename", "replace", "unlink"]:
            if hasattr(os, name):
                patch.setattr(os, name, watch(getattr(os, name)))
        create(path, 2, 8192, overwrite=True)
    return seen


@pytest.mark.usefixtures("road")
def test_whoever_looks_between_two_steps_of_replacing_sees_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert seen_while_replacing(tmp_path / "data.bin", monkeypatch) == {b"\1" * 4096, b"\2" * 8192}


def test_a_replacement_in_two_steps_is_caught_by_the_same_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def remove_and_rename(source: str, target: str) -> None:
        os.unlink(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", remove_and_rename)

    assert None in seen_while_replacing(tmp_path / "data.bin", monkeypatch)


@pytest.mark.usefixtures("road")
def test_a_reader_that_polls_while_a_file_is_replaced_again_and_again_sees_only_whole_ones(tmp_path: Path) -> None:
    path, finished, looked = tmp_path / "data.bin", threading.Event(), threading.Semaphore(0)
    create(path, 0)

    def poll() -> set[bytes]:
        seen = set()
        while not finished.is_set():
            seen.add(path.read_bytes())
            looked.release()
        return seen

    with ThreadPoolExecutor(1) as pool:
        polling = pool.submit(poll)
        try:
            for number in range(1, 100):
                create(path, number, 4096 * (1 + number % 3), overwrite=True)
                looked.acquire(timeout=HANG_SECONDS)
        finally:
            finished.set()
        seen = polling.result()

    assert seen <= {bytes([number]) * (4096 * (1 + number % 3)) for number in range(100)}
    assert len(seen) > 1


# -- writing --------------------------------------------------------------------------------------


@pytest.fixture(params=["write", "sparse writer", "raw"])
def fill(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[np.ndarray[Any, Any]], bs.BlockStore]]:
    """Return a function that writes an array to the start of a new store, in one of the ways that use ``pwrite``."""
    with bs.create(tmp_path / "data.bin", 1 << 20, access="sparse") as store:

        def write(a: np.ndarray[Any, Any]) -> bs.BlockStore:
            if request.param == "raw":
                store.raw.write_at(0, a)
            elif request.param == "write":
                store.allocate(a.nbytes).write(a)
            else:
                with store.allocate(shape=a.shape, dtype=a.dtype).writer() as lent:
                    lent[...] = a
            return store

        yield write


@linux_only
@pytest.mark.parametrize("most", [1, 1000, 4096, 69_999])
@pytest.mark.parametrize(("shape", "dtype"), [((70_000,), "u1"), ((125, 70), "f8")], ids=["bytes", "floats"])
def test_what_the_system_writes_in_parts_is_written_whole(
    fill: Callable[[np.ndarray[Any, Any]], bs.BlockStore],
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    dtype: str,
    most: int,
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, memoryview(data).cast("B")[:most], at))
    a = np.random.default_rng(0).integers(1, 256, 70_000, np.uint8).view(dtype).reshape(shape)

    store = fill(a)

    assert contents(store) == a.tobytes() + bytes(store.nbytes - a.nbytes)


@linux_only
def test_starting_write_back_is_a_system_call_that_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, answers = _os._libc.sync_file_range, []
    monkeypatch.setattr(_os._libc, "sync_file_range", lambda *args: answers.append((args[1:], start(*args))))
    with bs.create(tmp_path / "data.bin", 1 << 20) as store:
        store.allocate(4096)
        receipt = store.allocate(5000).write(bytes(5000))

        store.flush(receipt, wait=False)

    write = 2  # SYNC_FILE_RANGE_WRITE
    assert answers == [((4096, 8192, write), 0)]


# -- descriptors ----------------------------------------------------------------------------------


def close_during_a_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, bytes]:
    """Close a store while a thread is on its way into ``pwrite``, and open another file.

    Returns the first bytes of the store's file, and of the other.
    """
    store, pwrite = bs.create(folder / "data.bin", 1 << 20), os.pwrite
    r, other = store.allocate(100_000), folder / "other.bin"
    other.write_bytes(bytes(100_000))
    inside, go_on = threading.Event(), threading.Event()

    def wait_and_write(*args: Any) -> int:
        inside.set()
        go_on.wait(HANG_SECONDS)
        return pwrite(*args)

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(os, "pwrite", wait_and_write)
        writing = pool.submit(r.write, b"\1" * 100_000)
        inside.wait(HANG_SECONDS)
        store.close()
        with open(other, "r+b"):
            go_on.set()
            with pytest.raises(bs.ClosedStoreError, match="is closed"):
                writing.result()
    return contents(store)[:1], other.read_bytes()[:1]


@linux_only
def test_a_descriptor_stays_open_while_a_thread_writes_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert close_during_a_write(tmp_path, monkeypatch) == (b"\1", b"\0")


@linux_only
def test_a_descriptor_that_is_closed_and_opened_again_is_caught_by_the_same_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = MappedFile.drop

    def close_and_open(mapped: MappedFile) -> None:
        if mapped._file is not None:
            fd = os.open(tmp_path / "other.bin", os.O_RDWR)
            os.dup2(fd, mapped._file.fileno())
            os.close(fd)
        drop(mapped)

    monkeypatch.setattr(MappedFile, "drop", close_and_open)

    assert close_during_a_write(tmp_path, monkeypatch) == (b"\0", b"\1")
