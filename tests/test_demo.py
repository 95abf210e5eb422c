"""The demo and its command line: what is killed goes on, all readers see the same, and what goes wrong is said."""

import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blockstore as bs
from blockstore import demo
from blockstore.cli import _progress, main

zarr = pytest.importorskip("zarr", reason="the demo needs zarr")
Image = pytest.importorskip("PIL.Image", reason="the demo needs Pillow")
pytest.importorskip("skimage", reason="the demo needs scikit-image")

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(bs.__file__).parents[1])}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    path = tmp_path / "here"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture(scope="module")
def picture() -> demo.Pixels:
    return demo.load_picture()


def begun(folder: Path, size: int = 1024) -> demo.Pyramid:
    """Return a pyramid in which nothing is written."""
    folder.mkdir()
    pyramid = demo.Pyramid(folder, size)
    pyramid.create()
    return pyramid


@pytest.fixture
def pyramid(tmp_path: Path, picture: demo.Pixels) -> demo.Pyramid:
    """A whole pyramid of 2048 pixels."""
    pyramid = begun(tmp_path / "x.zarr", 2048)
    for level, function in pyramid.functions(picture):
        with pyramid.open(level, mode="r+") as x:
            x.fill(function)
    return pyramid


def ignored(nbytes: int) -> None:
    """Take a number of bytes."""


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# -- the whole story ------------------------------------------------------------------------------


def test_the_command_is_killed_once_goes_on_and_leaves_what_zarr_numpy_and_eyes_can_read(here: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-m",
            "blockstore",
            "demo",
            "x.zarr",
            "--size",
            "2048",
            "--workers",
            "2",
            "--keep",
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    found = re.search(r"had reported (\d+) blocks when it died; .* the array has (\d+): none is lost", done.stdout)
    assert found
    reported, survived = map(int, found.groups())
    assert 24 <= reported <= survived < 48
    assert f"goes on with the other {48 - survived} blocks" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" +\d  3 x", line)]
    assert [(row[0], row[5], row[6], row[7]) for row in rows] == [
        ("0", "2048", "1", "48"),
        ("1", "1024", "3", "24"),
        ("2", "512", "1", "12"),
    ]

    files = {0: ["0/c/0/0/0"], 1: [f"1/c/{channel}/0/0" for channel in range(3)], 2: ["2/c/0/0/0"]}
    shards = {name for level in files.values() for name in level}
    metadata = {"zarr.json", *(f"{level}/zarr.json" for level in files)}
    assert names(here) == {"x.png", *(f"x.zarr/{name}" for name in shards | metadata)} | {
        f"x.zarr/{name}.journal" for name in shards
    }
    group = zarr.open_group("x.zarr", mode="r")
    levels = {level: group[str(level)][...] for level in files}
    for level, paths in files.items():
        mapped = [np.load(here / "x.zarr" / path, mmap_mode="r") for path in paths]
        np.testing.assert_array_equal(np.concatenate(mapped), levels[level])
    for level in (1, 2):
        means = levels[level - 1].reshape(3, 2048 >> level, 2, 2048 >> level, 2).mean((2, 4))
        np.testing.assert_array_equal(levels[level], np.floor(means + 0.5))
    image = Image.open("x.png")
    assert (image.size, image.mode) == ((1024, 512), "RGB")
    pixels = np.moveaxis(np.asarray(image), 2, 0)
    np.testing.assert_array_equal(pixels[:, :, :512], levels[2])
    np.testing.assert_array_equal(pixels[:, :, 512:], levels[0][:, 348:860, 819:1331])


def test_without_keep_the_picture_alone_stays(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--size", "1024", "--workers", "1"]) == 0

    assert names(here) == {"blockstore-demo.png"}
    assert list(here.iterdir()) == [here / "blockstore-demo.png"]
    out, err = capsys.readouterr()
    assert "All 36 blocks are right." in out
    assert out.endswith(
        "\nblockstore-demo.png is yours to look at. The arrays are removed; --keep would have left them.\n"
    )
    assert err.splitlines()[-1] == "   compare: 100 %"


def test_the_filling_is_really_killed_and_goes_on_in_another_process(here: Path, picture: demo.Pixels) -> None:
    pyramid, nbytes = begun(here / "x.zarr"), list[int]()

    reported = demo.fill_until_killed(pyramid, picture, 2, nbytes.append)

    assert (reported, sum(nbytes)) == (12, 12 * 128 * 1024)
    assert pyramid.npy_files(0) == []  # a process that closes the array publishes what is written
    with pyramid.open(0, mode="r+") as x:
        survived = int(x.written.sum())
        assert reported <= survived < 24
        assert x.fill(demo.mosaic(picture, 1024)) == 24 - survived
        assert [x.blocks[index].index for index in x.verify()] == []


def test_going_on_with_other_settings_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyramid = begun(here / "x.zarr")
    monkeypatch.setattr(demo, "SETTINGS", {**demo.SETTINGS, "tile": 64})

    with pytest.raises(bs.FingerprintError):
        pyramid.open(0, mode="r+")


# -- what is computed -----------------------------------------------------------------------------


def test_each_tile_is_the_picture_turned_in_the_colour_that_is_there(pyramid: demo.Pyramid, picture: Any) -> None:
    small = picture.reshape(3, 128, 4, 128, 4).mean((2, 4))
    detail = np.trunc((small - small.mean((1, 2), keepdims=True)) / 2)
    ways = [np.rot90(way, turns, (1, 2)) for way in (detail, np.flip(detail, 2)) for turns in range(4)]
    with pyramid.open(0) as x:
        level = x[...]

    chosen = []
    for row in range(16):
        for column in range(16):
            tile = level[:, row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
            colour = picture[:, row * 32 : row * 32 + 32, column * 32 : column * 32 + 32].mean((1, 2)).astype(int)
            fits = [np.array_equal(tile, np.clip(way + colour[:, None, None], 0, 255)) for way in ways]
            assert fits.count(True) == 1
            chosen.append(fits.index(True))
    assert set(chosen) == set(range(8))


def test_the_group_tells_viewers_which_levels_there_are(pyramid: demo.Pyramid) -> None:
    text = json.loads((pyramid.folder / "zarr.json").read_text())

    ome = text["attributes"]["ome"]
    (multiscale,) = ome["multiscales"]
    assert ome["version"] == "0.5"
    assert [axis["name"] for axis in multiscale["axes"]] == ["c", "y", "x"]
    for number, dataset in enumerate(multiscale["datasets"]):
        x = zarr.open_group(pyramid.folder, mode="r")[dataset["path"]]
        (transformation,) = dataset["coordinateTransformations"]
        assert x.metadata.dimension_names == ("c", "y", "x")
        assert x.shape == (3, 2048 >> number, 2048 >> number)
        assert transformation == {"type": "scale", "scale": [1, 2**number, 2**number]}


# -- what goes wrong is found ---------------------------------------------------------------------


def spoil(path: Path, old: bytes, new: bytes) -> None:
    data = bytearray(path.read_bytes())
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize("file", ["0/c/0/0/0", "1/c/2/0/0", "2/c/0/0/0"])
def test_verifying_finds_one_wrong_byte(pyramid: demo.Pyramid, picture: demo.Pixels, file: str) -> None:
    assert demo.verify(pyramid, picture, 2, ignored) == 84

    with open(pyramid.folder / file, "r+b") as shard:
        shard.seek(4096 + 1)
        byte = shard.read(1)[0]
        shard.seek(4096 + 1)
        shard.write(bytes([byte ^ 1]))

    channel = int(file[4])
    with pytest.raises(demo.DemoError, match=rf"block \({channel}, 0, 0\) of level {file[0]} is not what was written"):
        demo.verify(pyramid, picture, 2, ignored)


def test_verifying_finds_what_was_computed_wrong(pyramid: demo.Pyramid, picture: demo.Pixels) -> None:
    with pyramid.open(2, mode="r") as x:
        wrong = x[...] ^ np.uint8(1)
    shutil.rmtree(pyramid.folder / "2")
    with bs.create_array(
        pyramid.folder / "2",
        shape=(3, 512, 512),
        dtype="u1",
        chunks=(1, 128, 512),
        checksum="crc32",
        keep_journal=True,
    ) as x:
        x[...] = wrong

    with pytest.raises(demo.DemoError, match=r"block \(0, 0, 0\) of level 2 is not"):
        demo.verify(pyramid, picture, 2, ignored)


def test_comparing_finds_what_the_readers_see_otherwise(pyramid: demo.Pyramid) -> None:
    nbytes: list[int] = []
    demo.compare(pyramid, nbytes.append)
    assert sum(nbytes) == pyramid.nbytes

    spoil(pyramid.folder / "1/c/2/0/0", b"'|u1'", b"'|i1'")

    with pytest.raises(demo.DemoError, match=r"differ in .* of channel 2 of level 1"):
        demo.compare(pyramid, ignored)


def test_what_ends_the_filling_by_itself_comes_to_the_parent(here: Path, picture: demo.Pixels) -> None:
    pyramid = begun(here / "x.zarr")
    shutil.rmtree(pyramid.folder / "0")

    with pytest.raises(FileNotFoundError):
        demo.fill_until_killed(pyramid, picture, 1, ignored)


def end_at_once(*arguments: object) -> None:
    """Stand for a process that fills, and is killed by somebody else."""
    os._exit(1)


def test_a_process_that_somebody_else_killed_is_reported(
    here: Path, picture: demo.Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_fill_for", end_at_once)

    with pytest.raises(demo.DemoError, match="was killed by somebody else"):
        demo.fill_until_killed(begun(here / "x.zarr"), picture, 1, ignored)


class Pipe:
    """The end of a pipe that the child of `fill_until_killed` has: it is told to go on, `count` times."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.sent: list[Any] = []

    def recv(self) -> str:
        if not self.count:
            raise EOFError
        self.count -= 1
        return "go on"

    def send(self, answer: object) -> None:
        self.sent.append(answer)


@pytest.mark.parametrize("count", [0, 3])
def test_the_filling_ends_when_its_parent_is_gone(here: Path, picture: demo.Pixels, count: int) -> None:
    pyramid, pipe, before = begun(here / "x.zarr"), Pipe(count), signal.getsignal(signal.SIGINT)
    try:
        demo._fill_for(pipe, pyramid, picture, 1)  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGINT, before)

    assert len(pipe.sent) == count
    with pyramid.open(0) as x:
        assert sum(pipe.sent) <= x.written.sum() * 128 * 1024 < x.nbytes


@pytest.mark.parametrize(
    ("reported", "survived", "message"),
    [(5, 4, "5 blocks were reported, and 4 survived"), (3, 4, "4 of 24 blocks survived, and 19 were filled")],
    ids=["lost", "filled-too-few"],
)
def test_what_does_not_add_up_is_exit_code_1(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reported: int,
    survived: int,
    message: str,
) -> None:
    def fill_some(pyramid: demo.Pyramid, picture: demo.Pixels, *_: object) -> int:
        with pyramid.open(0, mode="r+") as x:
            for index in range(survived):
                x.blocks[0, index, 0].write(np.zeros((1, 128, 1024), np.uint8))
        return reported

    fill = bs.BlockArray.fill
    monkeypatch.setattr(demo, "fill_until_killed", fill_some)
    monkeypatch.setattr(bs.BlockArray, "fill", lambda self, *args, **options: fill(self, *args, **options) - 1)

    assert main(["demo", "--size", "1024"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"
    assert list(here.iterdir()) == []


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder"], "'folder' exists: move it away, or name another folder"),
        (["."], "'.' exists: move it away, or name another folder"),
        (["file"], "'file' exists: move it away, or name another folder"),
        (["link"], "'link' exists: move it away, or name another folder"),
        (["mine.zarr"], "'mine.png' exists: move it away, or name another folder"),
        (["missing/x.zarr"], "No such file or directory: 'missing/x.zarr'"),
        (["file/x.zarr"], "Not a directory: 'file/x.zarr'"),
    ],
    ids=["folder", "here", "file", "dangling-link", "picture", "below-missing", "below-a-file"],
)
def test_what_is_in_the_way_is_one_line_and_exit_code_1(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (here / "folder").mkdir()
    (here / "file").write_bytes(b"precious")
    (here / "mine.png").write_bytes(b"precious")
    (here / "link").symlink_to("nowhere")

    assert main(["demo", *arguments, "--size", "1024"]) == 1

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert {path.name for path in here.iterdir()} == {"folder", "file", "mine.png", "link"}
    assert (here / "mine.png").read_bytes() == (here / "file").read_bytes() == b"precious"


def test_a_disk_that_is_too_small_says_so_and_nothing_stays(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SIZES", [1 << 26])

    assert main(["demo", "--size", str(1 << 26)]) == 1
    assert re.search(r"error: .*cannot reserve \d+ bytes: the disk has \d+ bytes left", capsys.readouterr().err)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", ["skimage", "PIL", "zarr"])
def test_a_package_that_is_missing_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for module in [each for each in sys.modules if each.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)

    assert main(["demo"]) == 1
    assert capsys.readouterr().err == f"error: the demo needs {name}: pip install 'ndblockstore[demo]'\n"
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [[], ["demo", "--workers", "0"], ["demo", "--size", "1000"], ["demo", "--size", "x"], ["dance"]]
)
def test_a_command_that_makes_no_sense_is_exit_code_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["blockstore", *arguments])

    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("blockstore", run_name="__main__")

    assert exit_.value.code == 2
    assert "usage: python -m blockstore" in capsys.readouterr().err


# -- Ctrl-C ---------------------------------------------------------------------------------------


def stopped(process: "subprocess.Popen[str]") -> list[str]:
    """Press Ctrl-C until it works, since Python ignores one that comes while it finalizes an object."""
    for _ in range(12):
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=5)[1].splitlines()
    process.kill()
    return process.communicate()[1].splitlines()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("step", ["2", "3", "5"], ids=["in-the-child", "going-on", "verifying"])
def test_ctrl_c_leaves_nothing_and_nobody_behind(here: Path, step: str) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite in the background hands on that it is ignored
    process = subprocess.Popen(
        [sys.executable, "-m", "blockstore", "demo", "--size", "4096"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    signal.signal(signal.SIGINT, before)
    assert process.stdout
    while not process.stdout.readline().startswith(f"{step}. "):
        assert process.poll() is None

    errors = stopped(process)  # which also waits for the process that fills, since that has the same stderr

    assert errors[-1] == "interrupted: what was made is removed"
    assert all(re.fullmatch(r"   [a-z0-9 ]+: \d+ %", line) for line in errors[:-1])
    assert process.returncode == 130
    assert list(here.iterdir()) == []


def test_an_interrupt_is_exit_code_130(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "write_preview", interrupt)

    assert main(["demo", "--size", "1024", "--keep"]) == 130
    assert capsys.readouterr().err.endswith("interrupted: what was made is removed\n")
    assert list(here.iterdir()) == []


# -- progress and notes ---------------------------------------------------------------------------


class Terminal(io.StringIO):
    """Standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_plain_lines_come_for_each_quarter(capsys: pytest.CaptureFixture[str]) -> None:
    with _progress("some", 70, 20) as advance:
        for _ in range(25):
            advance(2)

    assert capsys.readouterr().err.splitlines() == ["   some: 51 %", "   some: 77 %", "   some: 100 %"]


def test_tqdm_shows_a_bar_on_a_terminal_that_begins_with_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm", reason="bars are tqdm's")
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # no thread that stays
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())

    with _progress("some", 1000, 500) as advance:
        advance(500)

    first, last = terminal.getvalue().strip().split("\r")
    assert re.match(r"some:  50%\|.* 500/1\.00k \[", first)
    assert re.match(r" *some: 100%\|.* 1\.00k/1\.00k \[", last)


def test_without_tqdm_a_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())

    with _progress("some", 1000) as advance:
        advance(1000)

    assert terminal.getvalue() == "   some: 100 %\n"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no folder that is known to be in memory")
def test_what_the_file_system_cannot_keep_is_said_once() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        done = subprocess.run(
            [sys.executable, "-m", "blockstore", "demo", f"{memory}/x.zarr", "--size", "2048"],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=60,
        )

    assert done.returncode == 0
    first, *others = done.stderr.splitlines()
    assert re.match("note: .* in memory", first)
    assert all(re.fullmatch(r"   [a-z0-9 ]+: \d+ %", line) for line in others)
