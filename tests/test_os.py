"""A new file appears whole or not at all, whatever fails on the way and whoever else is creating it."""

import errno
import gc
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import PORTABLE, in_threads

import blockstore as bs
from blockstore import _os

NBYTES = 10_001
RESERVE = "write" if PORTABLE else "posix_fallocate"
"""The call of `os` that reserves space."""

linux_only = pytest.mark.skipif(PORTABLE, reason="a matter of what only Linux has")

untimed = settings(deadline=None)


class Faults:
    """Makes functions of `os` fail, each at one of its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.happened = 0

    def at(
        self, name: str, error: BaseException, *, call: int = 1, only: Callable[..., bool] = lambda *_: True
    ) -> None:
        """Let a function raise at the given call, counting those whose arguments fulfil `only`."""
        really, left = getattr(os, name), [call]

        def function(*args: Any, **kwargs: Any) -> Any:
            if only(*args):
                left[0] -= 1
                if left[0] == 0:
                    self.happened += 1
                    raise type(error)(*error.args)
            return really(*args, **kwargs)

        self._patch.setattr(os, name, function)

    def always(self, name: str, error: BaseException, *, only: Callable[..., bool]) -> None:
        """Let a function raise whenever its arguments fulfil `only`."""
        really = getattr(os, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            if only(*args):
                raise type(error)(*error.args)
            return really(*args, **kwargs)

        self._patch.setattr(os, name, function)

    def heal(self) -> None:
        self._patch.undo()


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


def without_nameless_files(faults: Faults) -> None:
    """Be a file system that has no `O_TMPFILE`."""
    if not PORTABLE:
        refusal = OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        faults.always("open", refusal, only=lambda path, flags, *_: flags & os.O_TMPFILE == os.O_TMPFILE)


@pytest.fixture(params=["nameless", "named"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the new file without a name, or with a temporary one."""
    road: str = request.param
    if road == "named":
        without_nameless_files(Faults(monkeypatch))
    return road


def new_file(path: Path, *, overwrite: bool = False, reserve: bool = True) -> None:
    with _os.new_file(str(path), NBYTES, overwrite=overwrite, reserve=reserve):
        pass


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


# -- a new file -----------------------------------------------------------------------------------


@untimed
@given(nbytes=st.integers(1, 1 << 20), overwrite=st.booleans(), reserve=st.booleans())
def test_a_new_file_is_zeros(
    tmp_path_factory: pytest.TempPathFactory, nbytes: int, overwrite: bool, reserve: bool
) -> None:
    folder = tmp_path_factory.mktemp("new")
    if overwrite:
        (folder / "data.bin").write_bytes(b"old")

    with _os.new_file(str(folder / "data.bin"), nbytes, overwrite=overwrite, reserve=reserve):
        assert (folder / "data.bin").exists() == overwrite

    assert (folder / "data.bin").read_bytes() == bytes(nbytes)
    assert os.listdir(folder) == ["data.bin"]


def test_a_new_file_can_be_made_on_either_road(tmp_path: Path, road: str) -> None:
    new_file(tmp_path / "data.bin")

    assert (tmp_path / "data.bin").read_bytes() == bytes(NBYTES)
    assert os.listdir(tmp_path) == ["data.bin"]


@linux_only
def test_a_new_file_has_a_name_on_the_way_where_it_must(tmp_path: Path, faults: Faults) -> None:
    without_nameless_files(faults)

    with _os.new_file(str(tmp_path / "data.bin"), NBYTES, overwrite=False, reserve=True):
        names = os.listdir(tmp_path)

    assert len(names) == 1
    assert names[0].startswith(".blockstore-")


@linux_only
def test_a_new_file_is_made_where_there_is_no_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_os, "_FDS", str(tmp_path / "no proc"))

    new_file(tmp_path / "data.bin")

    assert (tmp_path / "data.bin").read_bytes() == bytes(NBYTES)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_is_thereafter(
    tmp_path: Path, road: str, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    steps: list[str] = []

    def record(name: str, step: Callable[..., str]) -> None:
        really = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, **kwargs: (steps.append(step(*args)), really(*args, **kwargs))[1])

    path = str(tmp_path / "data.bin")
    record(RESERVE, lambda *_: "reserve")
    record("fsync", lambda fd: "sync the folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "sync the file")
    record("replace" if overwrite else "link", lambda source, target: "name" if target == path else "elsewhere")

    new_file(tmp_path / "data.bin", overwrite=overwrite)

    assert steps == ["reserve", "sync the file", "name", "sync the folder"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o000], ids=oct)
def test_the_mode_of_a_new_file_follows_the_umask(tmp_path: Path, road: str, mask: int) -> None:
    before = os.umask(mask)
    try:
        new_file(tmp_path / "data.bin")
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "data.bin").stat().st_mode) == 0o666 & ~mask


def test_space_is_reserved_on_the_disk(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 1 << 20):
        assert (tmp_path / "data.bin").stat().st_blocks * 512 >= 1 << 20


def test_without_reserving_the_file_is_sparse(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 1 << 30, reserve=False):
        status = (tmp_path / "data.bin").stat()
        assert (status.st_size, status.st_blocks * 512 < 1 << 20) == (1 << 30, True)


# -- what fails on the way ------------------------------------------------------------------------

CODES = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EPERM]

STEPS = [
    pytest.param(RESERVE, 1, True, False, id="reserve"),
    pytest.param("ftruncate", 1, False, False, id="set the size"),
    pytest.param("fsync", 1, True, False, id="sync the file"),
    pytest.param("link", 1, True, False, id="link"),
    pytest.param("replace", 1, True, True, id="replace"),
]


def wrong(code: int) -> OSError:
    return OSError(code, os.strerror(code))


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize(("name", "call", "reserve", "overwrite"), STEPS)
def test_a_step_that_fails_leaves_nothing_behind(
    tmp_path: Path, road: str, faults: Faults, name: str, call: int, reserve: bool, overwrite: bool, code: int
) -> None:
    if overwrite:
        (tmp_path / "data.bin").write_bytes(b"old")
    before = os.listdir(tmp_path)
    faults.at(name, wrong(code), call=call)

    with pytest.raises(OSError, match=os.strerror(code)) as refusal:
        new_file(tmp_path / "data.bin", overwrite=overwrite, reserve=reserve)

    assert faults.happened == 1
    assert refusal.value.errno == code
    assert os.listdir(tmp_path) == before
    if overwrite:
        assert (tmp_path / "data.bin").read_bytes() == b"old"


@pytest.mark.parametrize(("name", "call", "reserve", "overwrite"), STEPS)
def test_an_interrupt_leaves_nothing_behind(
    tmp_path: Path, road: str, faults: Faults, name: str, call: int, reserve: bool, overwrite: bool
) -> None:
    faults.at(name, KeyboardInterrupt(), call=call)

    with pytest.raises(KeyboardInterrupt):
        new_file(tmp_path / "data.bin", overwrite=overwrite, reserve=reserve)

    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("name", "call", "reserve", "overwrite"), STEPS)
def test_a_step_that_fails_holds_no_descriptor(
    tmp_path: Path, road: str, faults: Faults, name: str, call: int, reserve: bool, overwrite: bool
) -> None:
    before = open_descriptors()
    faults.at(name, wrong(errno.EIO), call=call)

    with suppress(OSError):
        new_file(tmp_path / "data.bin", overwrite=overwrite, reserve=reserve)

    assert faults.happened == 1
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("road", "name"),
    [
        pytest.param("nameless", "open", id="open the folder of a nameless file"),
        pytest.param("nameless", "fsync", id="sync the folder of a nameless file"),
        pytest.param("named", "unlink", id="remove the temporary name"),
        pytest.param("named", "open", id="open the folder"),
        pytest.param("named", "fsync", id="sync the folder"),
    ],
    indirect=["road"],
)
def test_a_file_that_is_linked_already_is_removed_if_its_creation_is_said_to_have_failed(
    tmp_path: Path, road: str, faults: Faults, name: str
) -> None:
    faults.at(name, wrong(errno.EIO), only=lambda *_: (tmp_path / "data.bin").exists())

    created = False
    with suppress(OSError):
        new_file(tmp_path / "data.bin")
        created = True

    assert faults.happened == 1
    assert os.listdir(tmp_path) == (["data.bin"] if created else [])


def test_a_body_that_raises_leaves_nothing_behind(tmp_path: Path, road: str) -> None:
    with pytest.raises(ZeroDivisionError), _os.new_file(str(tmp_path / "x"), NBYTES, overwrite=False, reserve=True):
        1 / 0

    assert os.listdir(tmp_path) == []


def test_a_map_that_fails_leaves_nothing_behind(tmp_path: Path, road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise wrong(errno.ENOMEM)

    monkeypatch.setattr(_os, "map_file", refuse)

    with pytest.raises(OSError, match="Cannot allocate memory"):
        bs.create(tmp_path / "data.bin", NBYTES)

    assert os.listdir(tmp_path) == []


@linux_only
@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL], ids=errno.errorcode.__getitem__)
def test_a_file_system_without_nameless_files_is_none_the_worse(tmp_path: Path, faults: Faults, code: int) -> None:
    faults.at("open", wrong(code))

    new_file(tmp_path / "data.bin")

    assert faults.happened == 1
    assert os.listdir(tmp_path) == ["data.bin"]


@linux_only
@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC, errno.EROFS], ids=errno.errorcode.__getitem__)
def test_any_other_refusal_is_passed_on_at_once(tmp_path: Path, faults: Faults, code: int) -> None:
    faults.at("open", wrong(code))

    with pytest.raises(OSError, match=os.strerror(code)):
        new_file(tmp_path / "data.bin")

    assert os.listdir(tmp_path) == []


def test_a_file_larger_than_the_disk_is_refused_before_a_byte_is_reserved(tmp_path: Path, faults: Faults) -> None:
    faults.at(RESERVE, AssertionError("it tried"))

    with pytest.raises(OSError, match=rf"cannot reserve {2**50} bytes: the disk has \d+ bytes left") as refusal:
        bs.create(tmp_path / "data.bin", 2**50)

    assert refusal.value.errno == errno.ENOSPC
    assert refusal.value.filename == str(tmp_path / "data.bin")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("nbytes", [0, -1, 2**62 + 1, 2**63, 2**100])
def test_a_size_that_no_file_has_is_refused(tmp_path: Path, nbytes: int) -> None:
    with pytest.raises(bs.LayoutError, match=rf"a store takes 1 to 2\*\*62 bytes, {nbytes} were asked for"):
        bs.create(tmp_path / "data.bin", nbytes)

    assert os.listdir(tmp_path) == []


# -- who else is creating it ----------------------------------------------------------------------

ROUNDS = 200


def create_one(path: Path, mark: int) -> bool:
    """Create a file and mark it; return whether it was ours to create."""
    try:
        with bs.create(path, 4096, reserve=False) as store:
            with store.allocate(4096).writer() as a:
                a[:] = mark
            return True
    except FileExistsError as error:
        if error.filename != str(path) or "overwrite=True" not in str(error):
            raise
        return False


def check_journals(folder: Path) -> None:
    """Check that the journal of each file is the winner's: its receipt, and no other."""
    for i in range(ROUNDS):
        with bs.open(folder / str(i)) as store:
            assert (store.receipts()[["start", "stop", "durable"]].tolist(), store.free) == ([(0, 4096, True)], 0)


def test_of_threads_that_create_one_file_exactly_one_wins(tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def race(thread: int) -> list[bool]:
        wins = []
        for i in range(ROUNDS):
            together.wait()
            wins.append(create_one(tmp_path / str(i), thread + 1))
        return wins

    wins = np.array(in_threads(4, race))

    assert (wins.sum(axis=0) == 1).all()
    for i, winner in enumerate(wins.argmax(axis=0)):
        assert (tmp_path / str(i)).read_bytes() == bytes([int(winner) + 1]) * 4096
    assert sorted(os.listdir(tmp_path)) == sorted(f"{i}{suffix}" for i in range(ROUNDS) for suffix in ("", ".journal"))
    check_journals(tmp_path)


def race_in_a_process(folder: Path, mark: int, together: Any, wins: Any) -> None:
    for i in range(ROUNDS):
        together.wait(60)
        wins[i] += create_one(folder / str(i), mark) << mark


def test_of_processes_that_create_one_file_exactly_one_wins(tmp_path: Path) -> None:
    spawn = get_context("spawn")
    together, wins = spawn.Barrier(2), [spawn.RawArray("i", ROUNDS) for _ in range(2)]
    others = [spawn.Process(target=race_in_a_process, args=(tmp_path, mark, together, wins[mark])) for mark in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join()

    assert [other.exitcode for other in others] == [0, 0]
    winners = np.array(wins).sum(axis=0)
    assert set(winners.tolist()) <= {1, 2}
    for i, winner in enumerate(winners.tolist()):
        assert (tmp_path / str(i)).read_bytes() == bytes([winner - 1]) * 4096
    check_journals(tmp_path)


def test_of_threads_that_replace_one_file_the_last_one_stays_whole(tmp_path: Path, road: str) -> None:
    def replace(thread: int) -> None:
        for _ in range(20):
            with bs.create(tmp_path / "data.bin", 4096 * (thread + 1), overwrite=True, reserve=False) as store:
                store.allocate(store.nbytes, tag=thread).write(bytes([thread + 1]) * store.nbytes)

    in_threads(4, replace)

    data = (tmp_path / "data.bin").read_bytes()
    assert data == bytes([len(data) // 4096]) * len(data)
    assert sorted(os.listdir(tmp_path)) == ["data.bin", "data.bin.journal"]
    with bs.open(tmp_path / "data.bin") as store:
        assert store.receipts()[["start", "stop", "tag"]].tolist() == [(0, len(data), data[0] - 1)]


def test_nobody_sees_a_file_that_is_not_whole(tmp_path: Path, road: str) -> None:
    ended = threading.Event()

    def look(thread: int) -> set[int]:
        if thread == 0:
            for i in range(50):
                new_file(tmp_path / f"{i}.bin")
            ended.set()
            return {NBYTES}
        sizes = set()
        while not ended.is_set():
            for path in tmp_path.glob("[0-9]*.bin"):
                sizes.add(path.stat().st_size)
        return sizes

    assert in_threads(2, look) in ([{NBYTES}, {NBYTES}], [{NBYTES}, set()])


# -- links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dangling", [True, False], ids=["dangling", "to a file"])
def test_a_symlink_is_never_followed_by_a_creation(tmp_path: Path, road: str, dangling: bool) -> None:
    if not dangling:
        (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "data.bin").symlink_to(tmp_path / "target")

    with pytest.raises(FileExistsError, match="the file exists; open"):
        new_file(tmp_path / "data.bin")

    assert (tmp_path / "target").exists() == (not dangling)


@pytest.mark.parametrize("dangling", [True, False], ids=["dangling", "to a file"])
def test_overwriting_replaces_a_symlink_and_not_its_target(tmp_path: Path, road: str, dangling: bool) -> None:
    if not dangling:
        (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "data.bin").symlink_to(tmp_path / "target")

    new_file(tmp_path / "data.bin", overwrite=True)

    assert not (tmp_path / "data.bin").is_symlink()
    assert (tmp_path / "data.bin").read_bytes() == bytes(NBYTES)
    assert dangling or (tmp_path / "target").read_bytes() == b"precious"


def test_a_symlink_under_the_temporary_name_is_not_followed(
    tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_nameless_files(faults)
    monkeypatch.setattr(_os, "_temporary", lambda folder: os.path.join(folder, ".guessed"))
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / ".guessed").symlink_to(tmp_path / "target")

    with pytest.raises(FileExistsError):
        new_file(tmp_path / "data.bin")

    assert (tmp_path / "target").read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == [".guessed", "target"]


def test_a_folder_may_be_a_symlink(tmp_path: Path, road: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")

    new_file(tmp_path / "link" / "data.bin")

    assert os.listdir(tmp_path / "folder") == ["data.bin"]


# -- open files -----------------------------------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[_os.File]:
    yield _os.open_file(str(path), writable=False)


def test_a_file_has_one_identity_under_all_its_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    os.link(tmp_path / "a", tmp_path / "b")

    with opened(tmp_path / "a") as a, opened(tmp_path / "b") as b:
        assert _os.identity(a) == _os.identity(b)


def test_two_files_have_two_identities(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").write_bytes(b"x")

    with opened(tmp_path / "a") as a, opened(tmp_path / "b") as b:
        assert _os.identity(a) != _os.identity(b)


def test_a_file_that_grew_is_another_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with opened(tmp_path / "a") as a:
        before = _os.identity(a)
        with open(tmp_path / "a", "ab") as file:
            file.write(b"y")

        assert _os.identity(a) != before


def test_a_descriptor_is_closed_with_the_last_reference_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    file = _os.open_file(str(tmp_path / "a"), writable=False)
    other, fd = file, file.fileno()
    del file
    os.fstat(fd)

    del other

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@linux_only
@pytest.mark.parametrize("guard", ["flag", "seal"])
def test_a_store_that_was_closed_holds_no_descriptor(tmp_path: Path, guard: Any) -> None:
    before = open_descriptors()

    with bs.create(tmp_path / "data.bin", 4096, guard=guard) as store:
        store.allocate(5).write(b"hello")

    assert store.closed
    assert open_descriptors() == before


def test_opening_that_fails_holds_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    before = open_descriptors()

    for name in ("empty", "fifo", "missing", "."):
        with suppress(OSError, ValueError):
            bs.open(tmp_path / name)

    assert open_descriptors() == before


@pytest.mark.parametrize("access", list(_os.ADVICE))
def test_advice_is_a_hint_and_changes_nothing(tmp_path: Path, access: str) -> None:
    with bs.create(tmp_path / "data.bin", NBYTES) as store:
        store.raw.fill(0, NBYTES, 7)

        assert store._mapped.map is not None
        _os.advise(store._mapped.map, access, 100, NBYTES)

        assert store.raw.read_at(0, NBYTES) == b"\7" * NBYTES


@pytest.mark.skipif(sys.platform != "linux", reason="there is nothing to switch off")
def test_the_portable_road_is_chosen_by_the_environment() -> None:
    assert (os.environ.get("BLOCKSTORE_PORTABLE", "0") not in ("", "0")) == _os.PORTABLE
