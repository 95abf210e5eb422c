"""A file and its journal appear, are found and are replaced together, whatever ends the process on the way."""

import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import PORTABLE, in_child

import blockstore as bs
from blockstore import _os, opening, resume, sidecar

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="what is killed here is forked")
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")


@pytest.fixture
def disk(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> Path:
    """An empty folder where receipts can be durable."""
    bs.create(tmp_path / "probe", 4096).close()
    if any(warning.category is bs.FileSystemWarning for warning in recwarn.list):
        pytest.skip(f"{tmp_path} is in memory, where nothing is durable: pass --basetemp on a disk")
    (tmp_path / "probe").unlink()
    (tmp_path / "probe.journal").unlink()
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


PAIR = ["data.bin", "data.bin.journal"]

RECEIPTS = [(0, 4096, 5, 7), (4096, 12288, 5000, 8)]


def fill(path: Path, nbytes: int = 16384, **options: Any) -> None:
    """Create a store with a durable receipt, and one that is only written when the process lets go of it."""
    with bs.create(path, nbytes, **options) as store:
        store.allocate(5, tag=7).write(b"hello")
        store.flush()
        store.allocate(5000, tag=8).write(b"w" * 5000)


def state(path: Path, **how: Any) -> tuple[list[Any], bytes, int]:
    """Return the receipts, the content and the free bytes of a store, opened as told."""
    with bs.open(path, **how) as store:
        receipts = store.receipts()[["start", "stop", "nbytes", "tag"]].tolist()
        return receipts, store.raw.read_at(0, store.nbytes), store.free


def seen(path: Path, **how: Any) -> tuple[list[Any], bytes]:
    """Return the receipts and the content of a store, as a reader sees them."""
    return state(path, mode="r", **how)[:2]


FILLED = b"hello".ljust(4096, b"\0") + b"w" * 5000 + bytes(16384 - 9096)

OLD = (RECEIPTS, FILLED, 4096)


def new(nbytes: int) -> tuple[list[Any], bytes, int]:
    """Return the state of a store that was just created."""
    return [], bytes(nbytes), nbytes


# -- a process that ends at any step of a creation --------------------------------------------------

CALLS = ["open", "link", "rename", "replace", "unlink", "fsync", "fdatasync", "ftruncate", "pwrite", "write"]
CALLS += ["posix_fallocate"]


class Steps:
    """Counts the calls of `os` that change something or could fail, and does something at one of them.

    `named` is to be on a file system without nameless files.
    """

    def __init__(self, at: int, do: Callable[[], None], *, named: bool, after: bool = False) -> None:
        self.left, self.do, self.named, self.after = at, do, named, after
        self.last = ""

    def install(self, replace: Callable[[Any, str, Any], None]) -> None:
        for name in CALLS:
            if hasattr(os, name):
                replace(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and self.named and not PORTABLE and args[1] & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            self.left -= 1
            if self.left != 0:
                return call(*args, **kwargs)
            self.last = name
            if self.after:
                call(*args, **kwargs)
            return self.do()

        return counted


def die() -> None:
    os._exit(99)


def is_killed_in(call: Callable[[], object], at: int, *, named: bool) -> bool:
    """Run a call in a child that dies before its step `at`; return False if it has fewer steps, and ends well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later: threads are alive
        pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(30)
            Steps(at, die, named=named).install(setattr)
            call()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 99), f"step {at}: exit code {code}"
    return code == 99


def crashes(folder: Path, prepare: Callable[[Path], None], call: Callable[[Path], object], named: bool) -> list[Path]:
    """Kill a call at each of its steps, each in a folder of its own, which is returned; the last was not killed."""
    folders: list[Path] = []
    killed = True
    while killed:
        where = folder / str(len(folders))
        where.mkdir()
        prepare(where / "data.bin")
        killed = is_killed_in(lambda path=where / "data.bin": call(path), len(folders) + 1, named=named)
        folders.append(where)
    return folders


def nothing(path: Path) -> None:
    """Prepare nothing."""


def stopped_before_the_last_name(path: Path) -> None:
    """Leave what a creation leaves that was killed when the file had its name and the journal had not."""
    bs.create(path, 16384).close()
    os.rename(f"{path}.journal", f"{path}.journal.new")


def resave(path: Path) -> None:
    """Fill a store whose file is another one by now."""
    fill(path)
    shutil.copy(path, f"{path}.copy")
    os.replace(f"{path}.copy", path)


roads = pytest.mark.parametrize("named", [False, True], ids=["nameless", "named"])


@needs_fork
@roads
def test_a_creation_that_is_killed_at_any_step_leaves_nothing_under_the_path_or_a_whole_store(
    disk: Path, named: bool
) -> None:
    folders = crashes(disk, nothing, lambda path: bs.create(path, 12288), named)

    exist = [(folder / "data.bin").exists() for folder in folders]
    assert len(folders) > 10
    assert exist == sorted(exist)  # nothing up to some step, a store from there on
    assert (exist[0], exist[-1]) == (False, True)
    for folder, there in zip(folders, exist, strict=True):
        path = folder / "data.bin"
        if there:
            assert seen(path) == new(12288)[:2]
            fill_opened(path)
            assert state(path) == (RECEIPTS[:1], b"hello".ljust(12288, b"\0"), 8192)
        else:
            assert "data.bin.journal" not in listing(folder)
            fill(path)
            assert state(path) == OLD
        assert [name for name in listing(folder) if not name.startswith(".blockstore-")] == PAIR


def fill_opened(path: Path) -> None:
    with bs.open(path) as store:
        store.allocate(5, tag=7).write(b"hello")


@needs_fork
def test_the_steps_include_a_leftover_journal_without_a_file_and_one_with_it(disk: Path) -> None:
    left = {tuple(listing(folder)) for folder in crashes(disk, nothing, lambda path: bs.create(path, 4096), False)}

    assert {name for names in left for name in names if name.startswith("data")} == {*PAIR, "data.bin.journal.new"}
    if not PORTABLE:
        assert left == {(), ("data.bin.journal.new",), ("data.bin", "data.bin.journal.new"), tuple(PAIR)}


@needs_fork
def test_a_creation_in_two_steps_is_caught_by_the_same_check(disk: Path) -> None:
    def create(path: Path) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o666))
        bs.create(path, 4096, overwrite=True)

    halves = 0
    for folder in crashes(disk, nothing, create, False):
        if (folder / "data.bin").exists():
            try:
                halves += state(folder / "data.bin") != new(4096)
            except bs.LayoutError:
                halves += 1

    assert halves


@needs_fork
@roads
def test_two_creations_that_are_killed_one_after_the_other_leave_the_path_free(disk: Path, named: bool) -> None:
    steps = len(crashes(disk, nothing, lambda path: bs.create(path, 4096), named))
    path = disk / "data.bin"

    for step in range(1, steps):
        if not path.exists():
            is_killed_in(lambda: bs.create(path, 4096), step, named=named)

    assert state(path) == new(4096)


@needs_fork
@roads
@pytest.mark.parametrize("nbytes", [16384, 4096], ids=["of the same size", "smaller"])
@pytest.mark.parametrize("kind", ["a store", "a plain file"])
def test_a_replacement_that_is_killed_at_any_step_leaves_the_old_store_or_the_new_one(
    disk: Path, named: bool, nbytes: int, kind: str
) -> None:
    def prepare(path: Path) -> None:
        if kind == "a store":
            fill(path)
        else:
            path.write_bytes(FILLED)

    old = OLD if kind == "a store" else ([], FILLED, 0)

    folders = crashes(disk, prepare, lambda path: bs.create(path, nbytes, overwrite=True), named)

    read = [seen(folder / "data.bin") for folder in folders]
    states = [state(folder / "data.bin") for folder in folders]
    assert read == [found[:2] for found in states]
    olds = [found == old for found in states]
    assert olds == sorted(olds, reverse=True)
    assert all(found in (old, new(nbytes)) for found in states)
    assert (states[0], states[-1]) == (old, new(nbytes))
    for folder in folders:
        bs.create(folder / "data.bin", 8192, overwrite=True).close()
        assert state(folder / "data.bin") == new(8192)


@needs_fork
@roads
def test_a_replacement_of_a_journal_whose_file_is_gone_can_be_killed_at_any_step(disk: Path, named: bool) -> None:
    def orphan(path: Path) -> None:
        fill(path)
        path.unlink()

    for folder in crashes(disk, orphan, lambda path: bs.create(path, 16384, overwrite=True), named):
        if not (folder / "data.bin").exists():
            bs.create(folder / "data.bin", 16384, overwrite=True).close()
        assert state(folder / "data.bin") == new(16384)


@needs_fork
@roads
@pytest.mark.parametrize("how", ["discard", "adopt"])
def test_an_opening_that_is_killed_at_any_step_leaves_one_journal_or_the_other(
    disk: Path, named: bool, how: str
) -> None:
    prepare, after = (resave, OLD) if how == "adopt" else (fill, ([], FILLED, 16384))

    folders = crashes(disk, prepare, lambda path: bs.open(path, discard=how == "discard", adopt=how == "adopt"), named)

    states = [state(folder / "data.bin", adopt=True) for folder in folders]
    assert all(found in (OLD, after) for found in states)
    assert (states[0], states[-1]) == (OLD, after)


# -- a step that fails ------------------------------------------------------------------------------


def failures(
    folder: Path,
    prepare: Callable[[Path], None],
    call: Callable[[Path], bs.BlockStore],
    error: BaseException,
    *,
    named: bool,
    after: bool = False,
) -> Iterator[tuple[Path, str, BaseException | None]]:
    """Let each step of a call fail in turn, each in a folder of its own; yield the path, the step and what came of it.

    What came of it is what the call raised, or None. `after` raises when the step is done.
    """
    at, happened = 0, True
    while happened:
        at += 1
        where = folder / str(at)
        where.mkdir()
        prepare(where / "data.bin")

        def fail() -> None:
            raise type(error)(*error.args)

        steps, store, raised = Steps(at, fail, named=named, after=after), None, None
        with pytest.MonkeyPatch.context() as patch:
            steps.install(patch.setattr)
            try:
                store = call(where / "data.bin")
            except type(error) as refusal:
                raised = refusal
        if store is not None:
            store.close()
        happened = bool(steps.last)
        if happened:
            yield where / "data.bin", f"{at}: {steps.last}", raised


ERRORS = [OSError(errno.EIO, os.strerror(errno.EIO)), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()]


@roads
@pytest.mark.parametrize("error", ERRORS, ids=["EIO", "ENOSPC", "Ctrl-C"])
def test_a_creation_of_which_a_step_fails_leaves_nothing_behind(disk: Path, named: bool, error: BaseException) -> None:
    wrong, count = [], 0
    for path, step, raised in failures(disk, nothing, lambda path: bs.create(path, 12288), error, named=named):
        count += 1
        if raised is not None and listing(path.parent):
            wrong.append((step, listing(path.parent)))
        elif raised is None:
            assert state(path) == new(12288)
    assert count > 10
    assert wrong == []


@roads
@pytest.mark.parametrize("error", ERRORS, ids=["EIO", "ENOSPC", "Ctrl-C"])
def test_a_replacement_of_which_a_step_fails_leaves_the_old_store_or_the_new_one(
    disk: Path, named: bool, error: BaseException
) -> None:
    wrong, count = [], 0
    for path, step, raised in failures(disk, fill, lambda p: bs.create(p, 16384, overwrite=True), error, named=named):
        count += 1
        try:
            read = state(path)
        except (OSError, ValueError) as refusal:
            wrong.append((step, str(refusal)))
            continue
        if read not in ((OLD, new(16384)) if raised is not None else (new(16384),)) or listing(path.parent) != PAIR:
            wrong.append((step, str((read[0], read[2])) + str(listing(path.parent))))
    assert count > 10
    assert wrong == []


@roads
@pytest.mark.parametrize("prepare", [nothing, fill], ids=["new", "overwrite"])
def test_ctrl_c_behind_any_step_of_a_creation_leaves_what_was_there_or_a_whole_store(
    disk: Path, named: bool, prepare: Callable[[Path], None]
) -> None:
    def create(path: Path) -> bs.BlockStore:
        return bs.create(path, 16384, overwrite=prepare is fill)

    wrong = []
    for path, step, _ in failures(disk, prepare, create, KeyboardInterrupt(), named=named, after=True):
        try:
            if prepare is nothing and not path.exists():
                create(path).close()  # whatever was left beside it
            found = state(path)
            if found not in (OLD, new(16384)):
                wrong.append((step, str(found[::2])))
        except (OSError, ValueError) as refusal:
            wrong.append((step, str(refusal)))
    assert wrong == []


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_both_files_are_on_the_disk_before_the_file_has_its_name_and_the_names_thereafter(
    disk: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        fill(disk / "data.bin")
    kinds: dict[int, str] = {disk.stat().st_ino: "the folder"}
    happened: list[tuple[str, str | int]] = []

    def record(name: str, step: Callable[..., tuple[str, str | int]]) -> None:
        really = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, **kwargs: (really(*args, **kwargs), happened.append(step(*args)))[0]
        )

    def named(source: Any, target: str, *_: Any) -> tuple[str, str]:
        kinds[os.stat(target).st_ino] = "the journal" if ".journal" in target else "the file"
        return "name", os.path.basename(target)

    def on(verb: str) -> Callable[..., tuple[str, int]]:
        return lambda fd, *_: (verb, os.fstat(fd).st_ino)

    for call in ("link", "replace"):
        record(call, named)
    for call, verb in [("fsync", "sync"), ("fdatasync", "sync"), ("write", "fill"), ("pwrite", "fill")]:
        record(call, on(verb))
    bs.create(disk / "data.bin", 4096, overwrite=overwrite).close()

    steps = [f"{verb} {kinds.get(what, what) if isinstance(what, int) else what}" for verb, what in happened]
    preliminary, file, journal = (steps.index(f"name data.bin{end}") for end in (".journal.new", "", ".journal"))
    header = preliminary - steps[preliminary::-1].index("fill the journal")
    assert "sync the journal" in steps[header:preliminary]
    assert "sync the file" in steps[:file]
    assert "sync the folder" in steps[preliminary:file]
    assert "sync the folder" in steps[file:journal]
    assert "sync the folder" in steps[journal:]


# -- several processes ------------------------------------------------------------------------------

CREATORS, ROUNDS = 3, 30


def race(folder: Path, mark: int, together: Any, wins: Any, sabotage: Callable[[], None]) -> None:
    sabotage()
    for i in range(ROUNDS):
        together.wait(60)
        with contextlib.suppress(FileExistsError), bs.create(folder / str(i), 4096) as store:
            store.allocate(4096, tag=mark).write(bytes([mark]) * 4096)
            wins[i] += 1


def unfair_rounds(folder: Path, sabotage: Callable[[], None]) -> list[str]:
    """Let processes race for paths; return what is wrong with who won, or with what the winner left."""
    fork = multiprocessing.get_context("fork")
    together, wins = fork.Barrier(CREATORS), [fork.RawArray("i", ROUNDS) for _ in range(CREATORS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        others = [fork.Process(target=race, args=(folder, m, together, wins[m], sabotage)) for m in range(CREATORS)]
        for other in others:
            other.start()
        for other in others:
            other.join(60)
    found = [f"exit codes {[other.exitcode for other in others]}"] if any(other.exitcode for other in others) else []
    for i, won in enumerate(np.array(wins).T.tolist()):
        try:
            with bs.open(folder / str(i)) as store:
                marks = store.receipts()["tag"].tolist(), list(set(store.raw.read_at(0, 4096)))
        except (OSError, ValueError) as error:
            found.append(f"{i}: {error}")
        else:
            if sum(won) != 1 or marks != ([won.index(1)], [won.index(1)]):
                found.append(f"{i}: won by {won}, holds {marks}")
    return found


@needs_fork
def test_of_processes_that_create_one_path_exactly_one_wins_and_the_journal_is_its_own(disk: Path) -> None:
    assert unfair_rounds(disk, lambda: None) == []
    assert listing(disk) == sorted(f"{i}{suffix}" for i in range(ROUNDS) for suffix in ("", ".journal"))


@needs_fork
def test_processes_that_replace_each_other_are_caught_by_the_same_check(disk: Path) -> None:
    def replace() -> None:
        publish = _os.publish
        setattr(_os, "publish", lambda *args, overwrite: publish(*args, overwrite=True))  # noqa: B010
        setattr(sidecar, "_check_free", lambda path, overwrite: None)  # noqa: B010

    assert unfair_rounds(disk, replace) != []


REPLACED = [".journal"] if _os.PORTABLE else [".journal.tmp", ".journal"]
"""The names that a journal gets which replaces another one: where it has none before, one that nobody believes."""


@posix_only
@pytest.mark.parametrize(
    ("prepare", "call", "named"),
    [
        pytest.param(nothing, lambda path: bs.create(path, 16384), [".journal.new", "", ".journal"], id="create"),
        pytest.param(
            fill, lambda path: bs.create(path, 4096, overwrite=True), [".journal.new", "", ".journal"], id="overwrite"
        ),
        pytest.param(fill, lambda path: bs.open(path, discard=True), REPLACED, id="discard"),
        pytest.param(resave, lambda path: bs.open(path, adopt=True), REPLACED, id="adopt"),
        pytest.param(stopped_before_the_last_name, bs.open, [".journal"], id="end a creation"),
    ],
)
def test_names_are_given_by_one_process_at_a_time(
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[Path], None],
    call: Callable[[Path], bs.BlockStore],
    named: list[str],
) -> None:
    import fcntl

    happened: list[tuple[str, bool]] = []

    def watch(name: str) -> None:
        really = getattr(os, name)

        def watched(source: str, target: str, *args: Any, **kwargs: Any) -> None:
            folder = os.open(disk, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = False
            except BlockingIOError:
                alone = True
            finally:
                os.close(folder)
            if os.path.basename(target).startswith("data.bin"):
                happened.append((os.path.basename(target).removeprefix("data.bin"), alone))
            really(source, target, *args, **kwargs)

        monkeypatch.setattr(os, name, watched)

    prepare(disk / "data.bin")
    watch("link")
    watch("replace")
    call(disk / "data.bin").close()

    assert happened == [(name, True) for name in named]


# -- what else can be under the names ---------------------------------------------------------------


def _bind(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def _linked(path: Path) -> None:
    fill(path.with_name("other"))
    path.symlink_to("other.journal")


JUNK: dict[str, Callable[[Path], object]] = {
    "an empty file": lambda path: path.touch(),
    "a text": lambda path: path.write_text("precious"),
    "a journal of another version": lambda path: path.write_bytes(b"blockstore journal, version 9".ljust(9000)),
    "the first half of a title": lambda path: path.write_bytes(b"blockstore jour"),
    "zeros": lambda path: path.write_bytes(bytes(9000)),
    "a folder": lambda path: path.mkdir(),
    "a FIFO": lambda path: os.mkfifo(path),
    "a socket": _bind,
    "a symlink to a text": lambda path: (path.with_name("text").write_text("precious"), path.symlink_to("text")),
    "a symlink to a journal": _linked,
    "a symlink to nothing": lambda path: path.symlink_to("missing"),
    "a symlink to itself": lambda path: path.symlink_to(path.name),
}


def picture(folder: Path) -> dict[str, Any]:
    """Return what a folder holds, in every detail but the times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        status = path.lstat()
        held: Any = None
        if stat.S_ISLNK(status.st_mode):
            held = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            held = path.read_bytes()
        found[path.name] = (status.st_ino, status.st_mode, held)
    return found


@posix_only
@pytest.mark.parametrize("suffix", ["", ".new"], ids=["journal", "journal.new"])
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("old", [True, False], ids=["over a file", "without a file"])
@pytest.mark.parametrize("how", ["create", "overwrite", "discard"])
def test_what_is_no_journal_of_ours_is_never_replaced(disk: Path, junk: str, suffix: str, old: bool, how: str) -> None:
    path, planted = disk / "data.bin", disk / f"data.bin.journal{suffix}"
    if old:
        path.write_bytes(FILLED)
    JUNK[junk](planted)
    held = picture(disk)
    text, name = "the journal would be here, but this is something else: move it away", str(planted)
    if old and how == "create":
        text, name = "the file exists; open", str(path)

    error: type[Exception] = FileExistsError if old or how != "discard" else FileNotFoundError
    act = (
        partial(bs.open, path, discard=True)
        if how == "discard"
        else partial(bs.create, path, 4096, overwrite=how != "create")
    )
    with pytest.raises(error, match=text if error is FileExistsError else "No such file") as refusal:
        act()

    assert error is FileNotFoundError or refusal.value.filename == name
    assert picture(disk) == held


@posix_only
@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize("adopt", [False, True], ids=["plain", "adopt"])
@pytest.mark.parametrize("junk", JUNK)
def test_a_file_with_what_is_no_journal_of_ours_beside_it_is_not_opened(
    disk: Path, junk: str, mode: Any, adopt: bool
) -> None:
    (disk / "data.bin").write_bytes(FILLED)
    JUNK[junk](disk / "data.bin.journal")
    held = picture(disk)

    with pytest.raises(bs.JournalMismatchError, match=r"data\.bin\.journal'"):
        bs.open(disk / "data.bin", mode=mode, adopt=adopt)

    assert picture(disk) == held


@posix_only
@pytest.mark.parametrize("junk", JUNK)
def test_what_has_the_preliminary_name_hinders_no_opening_and_stays(disk: Path, junk: str) -> None:
    fill(disk / "data.bin")
    JUNK[junk](disk / "data.bin.journal.new")
    held = picture(disk)

    assert seen(disk / "data.bin") == OLD[:2]
    assert picture(disk) == held
    assert state(disk / "data.bin") == OLD
    assert picture(disk)["data.bin.journal.new"] == held["data.bin.journal.new"]


@posix_only
@pytest.mark.parametrize("junk", JUNK)
def test_a_preliminary_journal_does_not_replace_what_has_the_final_name(disk: Path, junk: str) -> None:
    stopped_before_the_last_name(disk / "data.bin")
    JUNK[junk](disk / "data.bin.journal")
    held = picture(disk)

    with pytest.raises((bs.JournalMismatchError, FileExistsError), match=r"data\.bin\.journal'"):
        bs.open(disk / "data.bin")

    assert picture(disk) == held


@posix_only
@pytest.mark.parametrize("dangling", [True, False], ids=["dangling", "to a file"])
def test_a_symlink_under_the_path_is_replaced_and_not_followed(disk: Path, dangling: bool) -> None:
    if not dangling:
        (disk / "target").write_bytes(b"precious")
    (disk / "data.bin").symlink_to("target")

    with pytest.raises(FileExistsError, match="the file exists; open"):
        bs.create(disk / "data.bin", 16384)
    assert listing(disk) == (["data.bin"] if dangling else ["data.bin", "target"])

    fill(disk / "data.bin", overwrite=True)

    assert not (disk / "data.bin").is_symlink()
    assert state(disk / "data.bin") == OLD
    assert not (disk / "target.journal").exists()
    assert (disk / "target").exists() == (not dangling)
    assert dangling or (disk / "target").read_bytes() == b"precious"


def test_the_journal_of_a_file_that_is_gone_is_not_taken_for_one_of_a_new_file(disk: Path) -> None:
    fill(disk / "data.bin")
    (disk / "data.bin").unlink()
    held = picture(disk)

    with pytest.raises(FileExistsError, match="the journal of a store whose file is not here") as refusal:
        bs.create(disk / "data.bin", 16384)
    assert refusal.value.filename == str(disk / "data.bin.journal")
    assert picture(disk) == held

    bs.create(disk / "data.bin", 16384, overwrite=True).close()
    assert state(disk / "data.bin") == new(16384)


def test_a_damaged_journal_is_refused_and_replaced_by_whoever_says_so(disk: Path) -> None:
    fill(disk / "data.bin")
    journal = disk / "data.bin.journal"
    page = bytearray(journal.read_bytes())
    page[60] ^= 1
    journal.write_bytes(page)

    with pytest.raises(bs.JournalMismatchError, match=r"the header of the journal .* is damaged"):
        bs.open(disk / "data.bin")
    assert journal.read_bytes() == page

    assert state(disk / "data.bin", discard=True)[::2] == ([], 16384)
    assert state(disk / "data.bin")[::2] == ([], 16384)


@pytest.mark.parametrize("how", ["create", "overwrite", "discard", "adopt"])
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o000], ids=oct)
@posix_only
@roads
def test_the_mode_of_a_journal_follows_the_umask_or_is_that_of_the_one_it_replaces(
    disk: Path, monkeypatch: pytest.MonkeyPatch, mask: int, how: str, named: bool
) -> None:
    path = disk / "data.bin"
    {"create": nothing, "adopt": resave}.get(how, fill)(path)
    expected = 0o666 & ~mask
    if how in ("discard", "adopt"):
        expected = 0o640
        (disk / "data.bin.journal").chmod(expected)
    Steps(0, die, named=named).install(monkeypatch.setattr)
    masked = os.umask(mask)
    try:
        if how in ("create", "overwrite"):
            bs.create(path, 4096, overwrite=how == "overwrite").close()
        else:
            bs.open(path, discard=how == "discard", adopt=how == "adopt").close()
    finally:
        os.umask(masked)

    assert stat.S_IMODE((disk / "data.bin.journal").stat().st_mode) == expected
    if how in ("create", "overwrite"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


# -- which journal is a file's ----------------------------------------------------------------------


def test_the_journal_of_another_file_is_refused(disk: Path) -> None:
    fill(disk / "data.bin")
    fill(disk / "other.bin")
    os.replace(disk / "other.bin", disk / "data.bin")
    held = picture(disk)

    for mode in ("r", "r+"):
        with pytest.raises(bs.JournalMismatchError, match=r"data\.bin\.journal' is of another file.*pass adopt=True"):
            bs.open(disk / "data.bin", mode=mode)

    assert picture(disk) == held


def copied(folder: Path) -> Path:
    """Return the path of a copy of a filled store and its journal."""
    fill(folder / "data.bin")
    shutil.copy(folder / "data.bin", folder / "copy.bin")
    shutil.copy(folder / "data.bin.journal", folder / "copy.bin.journal")
    return folder / "copy.bin"


def test_a_pair_that_was_copied_is_opened_by_whoever_says_so_and_keeps_its_receipts(disk: Path) -> None:
    path = copied(disk)
    with pytest.raises(bs.JournalMismatchError, match="pass adopt=True if both were copied together"):
        bs.open(path)
    held = picture(disk)

    assert seen(path, adopt=True) == OLD[:2]
    assert picture(disk) == held
    with bs.open(path, adopt=True) as store:
        assert store.receipts()["durable"].all()
        store.allocate(4096, tag=9).write(b"x" * 4096)

    assert state(path)[::2] == ([*RECEIPTS, (12288, 16384, 4096, 9)], 0)  # it is its own from now on
    assert state(disk / "data.bin") == OLD


def test_a_copy_is_adopted_where_the_refusal_is_handled(disk: Path) -> None:
    path = copied(disk)

    try:
        bs.open(path).close()
    except bs.JournalMismatchError:
        assert state(path, adopt=True) == OLD
    else:
        raise AssertionError("it was opened")


def test_a_store_whose_closing_failed_is_opened_where_the_error_is_handled(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = bs.create(disk / "data.bin", 16384)
    store.allocate(5, tag=7).write(b"hello")
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", refuse)
        try:
            store.close()
        except OSError:
            assert state(disk / "data.bin")[::2] == (RECEIPTS[:1], 12288)

    assert store.closed
    assert state(disk / "data.bin")[::2] == (RECEIPTS[:1], 12288)


def test_a_pair_that_was_renamed_needs_no_word(disk: Path) -> None:
    fill(disk / "data.bin")
    (disk / "sub").mkdir()
    os.rename(disk / "data.bin", disk / "sub" / "moved.bin")
    os.rename(disk / "data.bin.journal", disk / "sub" / "moved.bin.journal")

    assert state(disk / "sub" / "moved.bin") == OLD
    assert listing(disk / "sub") == ["moved.bin", "moved.bin.journal"]


@pytest.mark.parametrize("nbytes", [12288, 16383, 16385, 20480], ids=["cut", "one less", "one more", "grown"])
@pytest.mark.parametrize("adopt", [False, True], ids=["plain", "adopt"])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_file_that_has_another_size_by_now_is_refused(disk: Path, nbytes: int, adopt: bool, mode: Any) -> None:
    fill(disk / "data.bin")
    os.truncate(disk / "data.bin", nbytes)
    held = picture(disk)

    with pytest.raises(bs.JournalMismatchError, match=f"of a file of 16384 bytes, this one has {nbytes}"):
        bs.open(disk / "data.bin", mode=mode, adopt=adopt)

    assert picture(disk) == held
    assert state(disk / "data.bin", discard=True)[::2] == ([], nbytes)


def test_a_file_without_a_journal_has_nothing_free_until_everything_is(disk: Path) -> None:
    fill(disk / "data.bin")
    (disk / "data.bin.journal").unlink()

    for _ in range(2):
        with bs.open(disk / "data.bin") as store:
            assert (store.free, len(store.receipts())) == (0, 0)
            with pytest.raises(bs.OutOfSpaceError, match="cannot allocate 1 bytes: 0 bytes are free"):
                store.allocate(1)
            store.raw.write_at(0, b"HELLO")
    assert listing(disk) == ["data.bin"]

    assert state(disk / "data.bin", discard=True)[::2] == ([], 16384)
    assert state(disk / "data.bin")[::2] == ([], 16384)
    assert (disk / "data.bin").read_bytes()[:5] == b"HELLO"
    assert listing(disk) == PAIR


def test_discarding_forgets_the_journal_and_no_byte_of_the_file(disk: Path) -> None:
    fill(disk / "data.bin", checksum="crc32", allocator="concurrent")

    with bs.open(disk / "data.bin", discard=True) as store:
        assert (store.free, len(store.receipts()), store.pending().tolist()) == (16384, 0, [(0, 16384, 16384)])
        with pytest.raises(ValueError, match="have no checksums"):
            store.verify()
        assert store.allocate(5, tag=1).write(b"other").start == 0

    assert state(disk / "data.bin") == ([(0, 4096, 5, 1)], b"other" + FILLED[5:], 12288)


def test_a_journal_that_was_discarded_does_not_come_back_with_what_a_killed_creation_left(disk: Path) -> None:
    stopped_before_the_last_name(disk / "data.bin")

    with bs.open(disk / "data.bin", discard=True) as store:
        store.allocate(5, tag=7).write(b"hello")

    assert state(disk / "data.bin")[::2] == (RECEIPTS[:1], 12288)


def stopped_between_the_names(path: Path) -> None:
    """Leave what a killed replacement of a filled store by one of the same size leaves: both journals."""
    fill(path)
    shutil.copy(f"{path}.journal", f"{path}.old")
    bs.create(path, 16384, overwrite=True).close()
    os.rename(f"{path}.journal", f"{path}.journal.new")
    os.rename(f"{path}.old", f"{path}.journal")


@pytest.mark.parametrize("adopt", [False, True], ids=["plain", "adopt"])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_of_two_journals_the_one_of_the_file_is_taken(disk: Path, adopt: bool, mode: Any) -> None:
    stopped_between_the_names(disk / "data.bin")

    found = state(disk / "data.bin", mode=mode, adopt=adopt)

    assert found == (*new(16384)[:2], 16384 if mode == "r+" else 0)


@pytest.mark.parametrize("how", ["adopt", "discard"])
def test_a_store_that_replaces_the_file_while_it_is_opened_keeps_its_journal(
    disk: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path, happened = copied(disk), []
    module, name = (resume, "look") if how == "adopt" else (sidecar, "new_header")
    really = getattr(module, name)

    def replace_meanwhile(*args: Any, **kwargs: Any) -> Any:
        found = really(*args, **kwargs)
        if not happened:
            happened.append(True)
            fill(path, overwrite=True)
        return found

    monkeypatch.setattr(module, name, replace_meanwhile)
    with contextlib.suppress(OSError, bs.BlockStoreError):
        bs.open(path, adopt=how == "adopt", discard=how == "discard").close()

    assert happened
    assert state(path) == OLD


@posix_only
def test_a_symlink_to_a_file_leads_to_its_journal(disk: Path) -> None:
    fill(disk / "data.bin")
    (disk / "sub").mkdir()
    (disk / "sub" / "link.bin").symlink_to("../data.bin")

    assert state(disk / "sub" / "link.bin") == OLD
    with bs.open(disk / "sub" / "link.bin", discard=True) as store:
        store.allocate(5, tag=1).write(b"other")

    assert (listing(disk), listing(disk / "sub")) == ([*PAIR, "sub"], ["link.bin"])
    assert state(disk / "data.bin")[0] == [(0, 4096, 5, 1)]


def test_a_warning_that_is_an_error_leaves_nothing_behind(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening._disk, "filesystem", lambda file: "tmpfs")

    with warnings.catch_warnings():
        warnings.simplefilter("error", bs.FileSystemWarning)
        with pytest.raises(bs.FileSystemWarning, match="lives in memory"):
            bs.create(disk / "data.bin", 4096)

    assert listing(disk) == []


# -- reading only -----------------------------------------------------------------------------------


def times(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.lstat().st_mtime_ns, path.lstat().st_ctime_ns) for path in folder.iterdir()}


def fill_and_rewrite(path: Path) -> None:
    with bs.create(path, 16384) as store:
        r = store.allocate(5)
        for data in (b"hello", b"HELLO", b"world"):
            r.write(data, rewrite=True)
            store.flush()


def leave_written(path: Path) -> None:
    """Write two ranges in a child that is killed before it has flushed the second one."""

    def write() -> None:
        store = bs.create(path, 16384)
        store.allocate(5, tag=7).write(b"hello")
        store.flush()
        store.allocate(5000, tag=8).write(b"w" * 5000)
        die()

    assert is_killed_in(write, 0, named=False)


SITUATIONS: dict[str, Callable[[Path], object]] = {
    "as it was closed": fill,
    "as a killed creation left it": stopped_before_the_last_name,
    "as a killed replacement left it": stopped_between_the_names,
    "without a journal": lambda path: path.write_bytes(FILLED),
    "with revoked receipts": fill_and_rewrite,
    "as a killed writer left it": leave_written,
}


@needs_fork
@pytest.mark.parametrize("reset", [False, True], ids=["in this boot", "after a reset"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_reading_changes_no_byte(disk: Path, monkeypatch: pytest.MonkeyPatch, situation: str, reset: bool) -> None:
    SITUATIONS[situation](disk / "data.bin")
    if reset:
        monkeypatch.setenv("BLOCKSTORE_BOOT_ID", "another")
    held, when = picture(disk), times(disk)

    with bs.open(disk / "data.bin", mode="r") as store:
        store.receipts(), store.pending(), store.free, store.raw.read_at(0, store.nbytes)
        with pytest.raises(bs.ReadOnlyStoreError):
            store.allocate(1)
        assert (picture(disk), times(disk)) == (held, when)

    assert (picture(disk), times(disk)) == (held, when)


@needs_fork
def test_what_a_reader_drops_after_a_reset_a_writer_drops_for_good(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_written(disk / "data.bin")

    assert seen(disk / "data.bin")[0] == RECEIPTS
    monkeypatch.setenv("BLOCKSTORE_BOOT_ID", "another")
    assert seen(disk / "data.bin")[0] == RECEIPTS[:1]
    monkeypatch.delenv("BLOCKSTORE_BOOT_ID")
    assert seen(disk / "data.bin")[0] == RECEIPTS
    monkeypatch.setenv("BLOCKSTORE_BOOT_ID", "another")
    assert state(disk / "data.bin")[0] == RECEIPTS[:1]
    monkeypatch.delenv("BLOCKSTORE_BOOT_ID")
    assert state(disk / "data.bin")[0] == RECEIPTS[:1]


def test_reading_works_while_a_writer_has_the_file_open_and_sees_what_is_written(disk: Path) -> None:
    with bs.create(disk / "data.bin", 16384) as writer:
        writer.allocate(5, tag=7).write(b"hello")
        writer.flush()
        r = writer.allocate(5000, tag=8)
        r.write(b"w" * 5000)
        held = picture(disk)

        with bs.open(disk / "data.bin", mode="r") as store:
            assert store.receipts()[["start", "stop", "nbytes", "tag"]].tolist() == RECEIPTS
            assert store.receipts()["durable"].tolist() == [True, False]
            assert picture(disk) == held
            r.write(b"W" * 5000, rewrite=True)

        assert seen(disk / "data.bin") == (RECEIPTS, FILLED.replace(b"w" * 5000, b"W" * 5000))
        with pytest.raises(bs.StoreInUseError, match="of this process has it open; mode='r' reads it"):
            bs.open(disk / "data.bin")


@pytest.fixture
def closed_folder(disk: Path) -> Iterator[Path]:
    """A folder with a filled store in which nobody but root may write, and that anybody can enter."""
    with tempfile.TemporaryDirectory(dir="/var/tmp" if os.access("/var/tmp", os.W_OK) else None) as name:
        folder = Path(name)
        with warnings.catch_warnings(action="ignore", category=bs.FileSystemWarning):
            fill(folder / "data.bin")
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


@needs_fork
def test_reading_needs_no_right_to_write(closed_folder: Path) -> None:
    def read() -> Any:
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
        try:
            bs.open(closed_folder / "data.bin")
            return "it was opened for writing"
        except PermissionError:
            return seen(closed_folder / "data.bin")

    held = picture(closed_folder)

    assert in_child(read) == OLD[:2]
    assert picture(closed_folder) == held
