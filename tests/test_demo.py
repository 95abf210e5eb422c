"""The demo and its command line: what is packed is what was there, and what goes wrong is said."""

import io
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import blockstore as bs
from blockstore import _disk, demo
from blockstore.cli import _progress, main

CONTENTS = {
    "a.txt": b"alpha",
    "empty.txt": b"",
    "exact.bin": bytes(range(256)) * 16,
    "sub/b.bin": b"\1" * 10_000,
    "sub/deep/c.bin": bytes(100_000),
}
NBYTES = sum(map(len, CONTENTS.values()))


@pytest.fixture(autouse=True)
def _cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip what only makes timings fair."""
    monkeypatch.setattr(demo, "_MEMORY", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small folder of files, with a link and a FIFO, which are no regular files."""
    for name, data in CONTENTS.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "source" / "fifo")
        os.symlink("a.txt", tmp_path / "source" / "link")
    return tmp_path / "source"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    path = tmp_path / "here"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def work_on(folder: Path) -> demo.Work:
    failures: dict[Path, str] = {}
    sources, _ = demo.find(folder, failures)
    return demo.Work(sources, 3, lambda count: None, failures)


def rows(table: str) -> dict[str, list[str]]:
    """Return the columns of the table's rows, by name."""
    lines = [line for line in table.splitlines() if line.startswith(tuple(demo.ROADS))]
    return {line[:13].strip(): line[13:].split() for line in lines}


def test_the_table_has_a_row_for_each_way_with_all_files_and_bytes(
    folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["demo", str(folder), "--workers", "2", "--rounds", "2"])

    out, err = capsys.readouterr()
    assert code == 0
    assert out.startswith("5 files (1 empty), 2 threads, medians of 2 rounds\n")
    assert {name: row[:2] for name, row in rows(out).items()} == {name: ["5", str(NBYTES)] for name in demo.ROADS}
    assert out.endswith("Every byte was compared with its source after each of 6 runs.\n")
    assert err.splitlines()[-1] == "24 of 24 files"
    assert list(here.iterdir()) == []


def test_the_module_runs_as_a_command(folder: Path, here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "blockstore", "demo", str(folder), "--rounds", "1"],
        env={**os.environ, "PYTHONPATH": str(Path(bs.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (done.returncode, list(rows(done.stdout))) == (0, list(demo.ROADS))


def test_without_a_folder_it_packs_numpy_itself(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources, empty = demo.find(Path(np.__file__).parent, {})

    assert main(["demo", "--rounds", "1"]) == 0
    assert rows(capsys.readouterr().out)["blockstore"][0] == str(len(sources) + empty)


def test_kept_files_hold_every_source_where_the_index_says(folder: Path, here: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.bin"

    assert main(["demo", str(folder), "--rounds", "2", "--keep", str(kept)]) == 0

    packed, found = kept.read_bytes(), {}
    for line in Path(f"{kept}.index").read_text().splitlines():
        start, nbytes, path = line.split("\t")
        found[Path(path).relative_to(folder).as_posix()] = packed[int(start) :][: int(nbytes)]
    assert found == {name: data for name, data in CONTENTS.items() if data}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "kept.bin", "kept.bin.index", "source"]


def test_keep_replaces_nothing(folder: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine").write_bytes(b"precious")

    assert main(["demo", str(folder), "--keep", "mine"]) == 1
    assert capsys.readouterr().err == "error: 'mine' exists: --keep replaces nothing\n"
    assert (here / "mine").read_bytes() == b"precious"


@pytest.mark.parametrize("name", demo.ROADS)
@pytest.mark.parametrize("path", ["a.txt", "sub/deep/c.bin"])
def test_verifying_finds_one_wrong_byte(folder: Path, tmp_path: Path, name: str, path: str) -> None:
    work, target = work_on(folder), tmp_path / "packed"
    starts = demo.ROADS[name](target, work)
    index = [source.path for source in work.sources].index(folder / path)
    where = starts[index] + work.sources[index].nbytes - 1

    demo.verify(target, starts, work)
    assert work.failures == {}

    data = bytearray(target.read_bytes())
    data[where] ^= 1
    target.write_bytes(data)
    demo.verify(target, starts, work)
    assert list(work.failures) == [folder / path]
    assert "are not those of the file" in work.failures[folder / path]


@pytest.mark.parametrize("name", demo.ROADS)
def test_files_that_change_are_reported_and_the_others_are_packed(folder: Path, tmp_path: Path, name: str) -> None:
    work, target = work_on(folder), tmp_path / "packed"
    (folder / "a.txt").unlink()
    (folder / "exact.bin").write_bytes(b"shorter")
    (folder / "sub" / "b.bin").write_bytes(bytes(10_001))

    starts = demo.ROADS[name](target, work)

    assert work.failures.keys() == {folder / "a.txt", folder / "exact.bin", folder / "sub" / "b.bin"}
    assert "No such file" in work.failures.pop(folder / "a.txt")
    assert all("has changed its size" in reason for reason in work.failures.values())
    assert [work.sources[index].path.name for index in starts] == ["c.bin"]
    work.failures.clear()
    demo.verify(target, starts, work)
    assert work.failures == {}


def test_a_file_that_vanishes_before_it_is_verified_is_reported(folder: Path, tmp_path: Path) -> None:
    work, target = work_on(folder), tmp_path / "packed"
    starts = demo.with_blockstore(target, work)
    (folder / "a.txt").unlink()

    demo.verify(target, starts, work)

    assert list(work.failures) == [folder / "a.txt"]


def test_a_failure_makes_the_exit_code_1_and_is_printed(
    folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = demo.with_memmap

    def pack_and_spoil(target: Path, work: demo.Work) -> dict[int, int]:
        starts = pack(target, work)
        with open(target, "r+b") as file:
            file.seek(starts[0])
            file.write(b"A")
        return starts

    monkeypatch.setitem(demo.ROADS, "numpy.memmap", pack_and_spoil)

    assert main(["demo", str(folder), "--rounds", "1"]) == 1
    out, err = capsys.readouterr()
    assert "Every byte" not in out
    assert f"not packed, or not every time: {folder / 'a.txt'}: bytes [0, 5) of packed are not" in err


@contextmanager
def without_privileges() -> Iterator[None]:
    """Let permissions count for root, too."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX permissions")
def test_what_may_not_be_read_is_reported_and_the_rest_is_found() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "closed").mkdir(mode=0)
        (folder / "secret").write_bytes(b"x")
        (folder / "secret").chmod(0)
        (folder / "open").write_bytes(b"y")
        failures: dict[Path, str] = {}

        with without_privileges():
            sources, empty = demo.find(folder, failures)

        assert (sources, empty) == ([demo.Source(folder / "open", 1)], 0)
        assert failures.keys() == {folder / "closed", folder / "secret"}
        (folder / "closed").chmod(0o700)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "there is no folder 'missing'"),
        (["file"], "there is no folder 'file'"),
        (["nothing"], "nothing to pack: no file in 'nothing' has a byte that can be read"),
        (["some", "--keep", "missing/kept"], "No such file or directory"),
    ],
    ids=["missing", "file", "only-empty-files", "keep-in-missing"],
)
def test_bad_input_is_one_line_and_exit_code_1(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (here / "file").write_bytes(b"x")
    (here / "nothing").mkdir()
    (here / "nothing" / "empty").touch()
    (here / "some").mkdir()
    (here / "some" / "file").write_bytes(b"x")

    assert main(["demo", *arguments]) == 1

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["demo", "--workers", "0"], ["demo", "--rounds", "x"], ["dance"]])
def test_a_command_that_makes_no_sense_is_exit_code_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["blockstore", *arguments])

    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("blockstore", run_name="__main__")

    assert exit_.value.code == 2
    assert "usage: python -m blockstore" in capsys.readouterr().err


def stopped(process: "subprocess.Popen[str]") -> list[str]:
    """Press Ctrl-C until it works, since Python ignores one that comes while it finalizes an object."""
    for _ in range(12):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=5)[1].splitlines()
    process.kill()
    return process.communicate()[1].splitlines()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_leaves_nothing_behind(folder: Path, here: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite in the background hands on that it is ignored
    process = subprocess.Popen(
        [sys.executable, "-m", "blockstore", "demo", str(folder), "--rounds", "1000000"],
        env={**os.environ, "PYTHONPATH": str(Path(bs.__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    while not list(here.glob("blockstore-demo-*/packed")):
        assert process.poll() is None

    assert stopped(process)[-1] == "interrupted: the temporary files are removed"
    assert process.returncode == 130
    assert list(here.iterdir()) == []


def test_an_interrupt_is_exit_code_130(
    folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(target: Path, work: demo.Work) -> dict[int, int]:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setitem(demo.ROADS, "file I/O", interrupt)

    assert main(["demo", str(folder)]) == 130
    assert capsys.readouterr().err.endswith("interrupted: the temporary files are removed\n")
    assert list(here.iterdir()) == []


def test_an_interrupt_stops_the_threads_at_the_file_they_are_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, started, joined = work_on(folder), [], threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            joined.set()
            super().shutdown(wait, cancel_futures=cancel_futures)

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    def call(index: int, source: demo.Source) -> None:
        started.append(index)
        joined.wait()

    monkeypatch.setattr(demo, "ThreadPoolExecutor", Pool)
    work.workers, work.advance = 1, interrupt
    with pytest.raises(KeyboardInterrupt):
        work.each(call)

    assert started == [0]


def test_an_error_that_is_no_files_fault_ends_the_run(folder: Path) -> None:
    def call(index: int, source: demo.Source) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work_on(folder).each(call)


class Terminal(io.StringIO):
    """Standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_plain_lines_come_for_each_tenth_of_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    with _progress(70) as advance:
        for _ in range(35):
            advance(2)

    assert capsys.readouterr().err.splitlines() == [
        f"{done} of 70 files" for done in (8, 14, 22, 28, 36, 42, 50, 56, 64, 70)
    ]


def test_tqdm_shows_a_bar_on_a_terminal(folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm")
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # no thread that stays
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())

    assert main(["demo", str(folder), "--rounds", "1"]) == 0
    assert "| 0/12 [" in terminal.getvalue()


def test_without_tqdm_a_terminal_gets_lines(folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())

    assert main(["demo", str(folder), "--rounds", "1"]) == 0
    assert terminal.getvalue().splitlines()[-1] == "12 of 12 files"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no folder that is known to be in memory")
def test_a_folder_in_memory_is_said_to_be_no_disk(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        done = subprocess.run(
            [sys.executable, "-m", "blockstore", "demo", str(folder), "--rounds", "2", "--keep", f"{memory}/kept"],
            env={**os.environ, "PYTHONPATH": str(Path(bs.__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=60,
        )

    assert (done.returncode, list(rows(done.stdout))) == (0, list(demo.ROADS))
    first, *others = done.stderr.splitlines()
    assert first == "note: this folder is in memory, where nothing is durable"
    assert all(re.fullmatch(r"\d+ of 24 files", line) for line in others)


def test_a_folder_where_reserving_protects_nothing_is_said_to_be_one(
    folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_disk, "filesystem", lambda file: "btrfs")

    assert main(["demo", str(folder), "--rounds", "1"]) == 0

    note = "note: this folder is on btrfs, where reserved space does not help on a full disk"
    assert capsys.readouterr().err.splitlines()[0] == note


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_run_leaves_no_journal_to_the_next_one(folder: Path, tmp_path: Path, rounds: int) -> None:
    target, beside = tmp_path / "packed", []

    for name, _, starts in demo.runs(target, work := work_on(folder), rounds):
        beside.append((name, (tmp_path / "packed.journal").exists()))
        assert len(starts) == len(work.sources)

    assert sorted(beside) == sorted([(name, name == "blockstore") for name in demo.ROADS] * rounds)
    assert (sorted(path.name for path in tmp_path.iterdir()), work.failures) == (["source"], {})
