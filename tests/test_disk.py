"""What is asked of the machine, the boot, the mount, the file system and the lock, and what if they are unknown."""

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import PORTABLE, in_child

import blockstore as bs
from blockstore import _disk, _os, sidecar

posix_only = pytest.mark.skipif(not hasattr(os, "fork"), reason="locks are those of POSIX")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data.bin").write_bytes(bytes(8192))
    return tmp_path / "data.bin"


@pytest.fixture
def file(path: Path) -> _os.File:
    return _os.open_file(str(path), writable=True)


def refusing(call: Callable[..., Any], code: int, when: Callable[..., bool]) -> Callable[..., Any]:
    """Return `call`, but with an error where its arguments are such."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            raise OSError(code, os.strerror(code))
        return call(*args, **kwargs)

    return refused


# -- boot, mount, file system -----------------------------------------------------------------------


def test_the_epoch_is_that_of_the_boot_and_differs_from_any_other(
    file: _os.File, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BLOCKSTORE_BOOT_ID", raising=False)
    now = _disk.epoch(file)
    assert now == _disk.epoch(file)
    monkeypatch.setenv("BLOCKSTORE_BOOT_ID", "another")

    assert _disk.epoch(file) not in (0, now)
    assert _disk.epoch(file) == _disk.epoch(file)


@pytest.mark.parametrize("known", [True, False])
def test_where_no_boot_is_known_what_was_only_written_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    monkeypatch.setattr(_disk, "boot", lambda: "now" if known else "")
    store = bs.create(tmp_path / "new.bin", 1 << 16)
    store.allocate(5, tag=1).write(b"hello")
    store.flush()
    store.allocate(5, tag=2).write(b"world")
    assert store.receipts()["tag"].tolist() == [1, 2]
    store._disown()

    with bs.open(tmp_path / "new.bin") as store:
        assert store.receipts()["tag"].tolist() == ([1, 2] if known else [1])


def test_an_error_that_says_nothing_of_the_boot_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLOCKSTORE_BOOT_ID", raising=False)
    for error, known in ((FileNotFoundError(), True), (PermissionError(), True), (OSError(errno.EMFILE, ""), False)):

        def fail(*args: Any, error: OSError = error) -> str:
            raise error

        monkeypatch.setattr(Path, "read_text", fail)
        if known:
            assert _disk.boot() == ""
        else:
            with pytest.raises(OSError, match="Errno 24"):
                _disk.boot()


@pytest.mark.parametrize(
    ("kind", "text", "lasts"),
    [
        ("tmpfs", "lives in memory", False),
        ("ramfs", "lives in memory", False),
        ("btrfs", "copies on write", True),
        ("zfs", "copies on write", True),
    ],
)
def test_what_a_file_system_cannot_promise_is_said_once_and_before_anything_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, text: str, lasts: bool
) -> None:
    monkeypatch.setattr(_disk, "filesystem", lambda file: kind)

    with pytest.raises(bs.FileSystemWarning, match=f"is on {kind}, which {text}"):
        bs.create(tmp_path / "new.bin", 8192)
    assert list(tmp_path.iterdir()) == []

    with pytest.warns(bs.FileSystemWarning) as told:
        store = bs.create(tmp_path / "new.bin", 8192)
    assert len(told) == 1
    store.allocate(5).write(b"hello")
    assert store.flush() == int(lasts)
    assert store.receipts()["durable"].tolist() == [lasts]
    store.close()


def test_without_reserving_nothing_is_said_of_copying_on_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_disk, "filesystem", lambda file: "btrfs")

    bs.create(tmp_path / "new.bin", 8192, reserve=False).close()


def test_an_unknown_file_system_has_no_name(file: _os.File, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", gone)

    assert _disk.filesystem(file) == ""


# -- the lock ---------------------------------------------------------------------------------------


@posix_only
@pytest.mark.parametrize("proc", [True, False], ids=["by proc", "by name"])
def test_a_lock_keeps_others_out_until_it_is_released(
    file: _os.File, path: Path, monkeypatch: pytest.MonkeyPatch, proc: bool
) -> None:
    if not proc:
        missing = refusing(os.open, errno.ENOENT, lambda name, *_: str(name).startswith("/proc/self/fd/"))
        monkeypatch.setattr(os, "open", missing)
    lock = _disk.FileLock(file, str(path))

    with pytest.raises(BlockingIOError):
        _disk.FileLock(file, str(path))
    assert _disk.is_locked_here(file)
    lock.release()
    assert not _disk.is_locked_here(file)
    _disk.FileLock(file, str(path)).release()


@posix_only
def test_a_file_that_has_another_name_by_now_is_not_locked_by_that(
    file: _os.File, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = refusing(os.open, errno.ENOENT, lambda name, *_: str(name).startswith("/proc/self/fd/"))
    monkeypatch.setattr(os, "open", missing)
    os.replace(path, path.with_name("moved"))
    _disk.FileLock(file, str(path)).release()
    path.write_bytes(b"other")

    _disk.FileLock(file, str(path)).release()

    assert not _disk.is_locked_here(file)


@posix_only
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL], ids=errno.errorcode.get)
def test_a_file_system_without_locks_keeps_nobody_out(
    file: _os.File, path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(_disk, "_set_lock", refusing(_disk._set_lock, code, lambda *_: True))

    first, second = _disk.FileLock(file, str(path)), _disk.FileLock(file, str(path))

    first.release()
    second.release()


@posix_only
@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE], ids=errno.errorcode.get)
def test_any_other_refusal_of_a_lock_is_passed_on(
    file: _os.File, path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(_disk, "_set_lock", refusing(_disk._set_lock, code, lambda *_: True))
    with pytest.raises(OSError, match=os.strerror(code)):
        _disk.FileLock(file, str(path))

    monkeypatch.undo()
    monkeypatch.setattr(os, "open", refusing(os.open, code, lambda name, *_: str(name).startswith("/proc/self/fd/")))
    with pytest.raises(OSError, match=os.strerror(code)):
        _disk.FileLock(file, str(path))


# -- the folder -------------------------------------------------------------------------------------


@posix_only
def test_of_those_who_want_a_folder_to_themselves_one_waits_for_the_other(path: Path) -> None:
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with _disk.folder_to_oneself(str(path)):
            inside.set()
            leave.wait(60)
            order.append("first")

    def second() -> None:
        with _disk.folder_to_oneself(str(path)):
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    leave.set()
    for thread in threads:
        thread.join()

    assert order == ["first", "second"]


@posix_only
def test_a_folder_that_somebody_keeps_keeps_nobody_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_disk, "_PATIENCE_SECONDS", 0.0)
    with _disk.folder_to_oneself(str(path)):
        bs.create(path.with_name("new.bin"), 8192).close()

    bs.open(path.with_name("new.bin")).close()


@posix_only
def test_a_child_that_was_forked_meanwhile_keeps_no_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asking, answering = os.pipe()
    reading, writing = os.pipe()

    def wait() -> None:
        os.write(answering, b"?")
        os.read(reading, 1)

    with ThreadPoolExecutor(1) as pool:
        with _disk.folder_to_oneself(str(path)):
            child = pool.submit(in_child, wait)
            os.read(asking, 1)
        monkeypatch.setattr(_disk, "_PATIENCE_SECONDS", 0.0)
        with _disk.folder_to_oneself(str(path)):
            folder = _os.File(os.open(path.parent, os.O_RDONLY))
            taken = not _disk._try_folder(folder)
        free = _disk._try_folder(folder)
        os.write(writing, b"!")
        child.result()

    assert (taken, free) == (True, True)


@posix_only
def test_a_file_that_is_replaced_while_it_is_opened_is_said_to_be(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bs.create(path, 8192, overwrite=True).close()
    find = sidecar.find

    def replace_and_find(*args: Any, **how: Any) -> Any:
        monkeypatch.setattr(sidecar, "find", find)
        bs.create(path, 4096, overwrite=True).close()
        return find(*args, **how)

    monkeypatch.setattr(sidecar, "find", replace_and_find)

    with pytest.raises(OSError, match="was replaced by another one while it was being opened"):
        bs.open(path)
    bs.open(path).close()


@posix_only
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EIO], ids=errno.errorcode.get)
def test_a_folder_without_locks_is_used_all_the_same(path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(_disk.fcntl, "flock", refusing(_disk.fcntl.flock, code, lambda *_: True))

    if code == errno.ENOLCK:
        with _disk.folder_to_oneself(str(path)):
            pass
    else:
        with pytest.raises(OSError, match="Input/output"), _disk.folder_to_oneself(str(path)):
            pass


@pytest.mark.skipif(PORTABLE, reason="says what Linux does")
def test_the_mount_of_a_file_is_known(file: _os.File) -> None:
    assert _disk._mount(file) > 0
    assert _disk.filesystem(file) != ""
