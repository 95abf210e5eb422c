"""The command line: ``python -m blockstore demo [FOLDER] [--workers N] [--size N] [--keep]``.

What happens goes to standard output, progress and errors to standard error. The exit code is 0 if everything was
verified, 1 if anything was not or could not be done, 2 for a command that makes no sense, and 130 after Ctrl-C.
"""

import argparse
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from blockstore import demo
from blockstore.errors import BlockStoreError, FileSystemWarning

_ERRORS = (OSError, BlockStoreError, demo.DemoError, ModuleNotFoundError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m blockstore", description="Fill large arrays in parallel.")
    command = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "demo",
        help="make a picture of itself in parallel, be killed halfway, go on, and check all of it",
        description="Make a picture of itself in parallel, be killed halfway, go on, and check all of it. "
        "Needs 4 * N * N bytes of disk, leaves the PNG beside FOLDER, and replaces nothing.",
    )
    default = Path("blockstore-demo.zarr")
    command.add_argument("folder", nargs="?", type=Path, default=default, metavar="FOLDER", help=f"default: {default}")
    command.add_argument("--workers", type=_positive, default=min(os.cpu_count() or 1, 32), metavar="N", help="threads")
    sizes = f"{', '.join(map(str, demo.SIZES[:-1]))} or {demo.SIZES[-1]}"
    command.add_argument(
        "--size", type=int, choices=demo.SIZES, default=1 << 14, metavar="N", help=f"pixels: {sizes}; default: 16384"
    )
    command.add_argument("--keep", action="store_true", help="keep FOLDER")
    options = parser.parse_args(argv)
    picture = Path(f"{str(options.folder).removesuffix('.zarr')}.png")
    try:
        run_demo(demo.Pyramid(options.folder, options.size), picture, options.workers, keep=options.keep)
    except KeyboardInterrupt:
        print("interrupted: what was made is removed", file=sys.stderr)
        return 130
    except _ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_demo(pyramid: demo.Pyramid, preview: Path, workers: int, *, keep: bool) -> None:
    """Tell the story, and leave the picture `preview`, and with `keep` the arrays; after an error, leave nothing."""
    for path in (pyramid.folder, preview):
        if os.path.lexists(path):
            raise FileExistsError(f"{str(path)!r} exists: move it away, or name another folder")
    picture = demo.load_picture()
    pyramid.folder.mkdir()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FileSystemWarning)
            seconds = _tell(pyramid, picture, workers)
        made = pyramid.folder / "preview.png"
        demo.write_preview(pyramid, made)
        made.rename(preview)
        _say(f"7. Wrote {preview}: left all of level {len(seconds) - 1}; right a part of level 0, pixel by pixel.")
        _print_table(pyramid, seconds)
    except BaseException:
        keep = False
        raise
    finally:
        if not keep:
            with demo.no_ctrl_c():
                shutil.rmtree(pyramid.folder)
    if keep:
        print(f"\n{preview} is yours, and so is {pyramid.folder}: OME-Zarr, for any viewer of that.")
    else:
        print(f"\n{preview} is yours to look at. The arrays are removed; --keep would have left them.")


def _tell(pyramid: demo.Pyramid, picture: demo.Pixels, workers: int) -> list[float]:
    """Do everything, say so step by step, and return the seconds that each level took."""
    size, seconds, name = pyramid.size, [0.0] * len(pyramid.sizes), pyramid.folder.name
    last = len(seconds) - 1
    count = (size // demo.TILE) ** 2
    _say(f"A picture of {size} x {size} pixels, made of {count} small copies of itself in {workers} threads.\n")

    _print_note(pyramid.create)
    mosaic = demo.mosaic(picture, size)
    with pyramid.open(0) as x:
        blocks, nbytes = len(x.blocks), x.nbytes
    _say(f"1. Created {name}: levels 0 to {last}, {pyramid.nbytes / 1e6:.0f} MB. Level 0 has {blocks} blocks to fill.")

    _say("2. Another process fills level 0, and is killed halfway (SIGKILL).")
    with _progress("level 0", nbytes) as advance, _timed(seconds, 0):
        reported = demo.fill_until_killed(pyramid, picture, workers, advance)
    with pyramid.open(0) as x:
        survived = int(x.written.sum())
    if survived < reported:
        raise demo.DemoError(f"{reported} blocks were reported, and {survived} survived")
    _say(f"   It had reported {reported} blocks when it died; opened again, the array has {survived}: none is lost.")

    _say(f"3. Filling goes on with the other {blocks - survived} blocks.")
    with (
        _progress("level 0", nbytes, survived * nbytes // blocks) as advance,
        _timed(seconds, 0),
        pyramid.open(0, mode="r+") as x,
    ):
        filled = x.fill(mosaic, workers=workers, progress=advance)
    if survived + filled != blocks:
        raise demo.DemoError(f"{survived} of {blocks} blocks survived, and {filled} were filled")

    _say("4. The other levels: each pixel is the mean of 2 x 2 of the level above, which is read without a copy.")
    with _progress("other levels", pyramid.nbytes - nbytes) as advance:
        for level, paint in islice(pyramid.functions(picture), 1, None):
            with _timed(seconds, level), pyramid.open(level, mode="r+") as x:
                x.fill(paint, workers=workers, progress=advance)

    _say("5. Verifying: each block against its checksum, and against what it was computed from.")
    with _progress("verify", pyramid.nbytes) as advance:
        count = demo.verify(pyramid, picture, workers, advance)
    _say(f"   All {count} blocks are right.")

    file = pyramid.npy_files(0)[0].relative_to(pyramid.folder).as_posix()
    _say(f"6. Reading all of it without blockstore: zarr.open_group({name!r}), and the same files by NumPy,")
    _say(f"   numpy.load('{name}/{file}', mmap_mode='r').")
    with _progress("compare", pyramid.nbytes) as advance:
        demo.compare(pyramid, advance)
    _say("   Both read the same.")

    return seconds


def _print_table(pyramid: demo.Pyramid, seconds: Sequence[float]) -> None:
    print(f"\n{'level':>5}  {'shape':<17} {'files':>5} {'blocks':>6} {'MB':>7} {'seconds':>8} {'GB/s':>6}")
    for level, taken in enumerate(seconds):
        with pyramid.open(level) as x:
            shape, files = " x ".join(map(str, x.shape)), len(pyramid.npy_files(level))
            row = f"{level:>5}  {shape:<17} {files:>5} {len(x.blocks):>6} {x.nbytes / 1e6:>7.1f}"
            print(f"{row} {taken:>8.2f} {x.nbytes / taken / 1e9:>6.2f}")
    print("Seconds are until all is computed and on the disk; of level 0 with what it took to start again.")


def _print_note(create: Callable[[], object]) -> None:
    """Make the arrays, and say once what the file system does not keep, where the library would warn for each."""
    with warnings.catch_warnings(record=True, action="always", category=FileSystemWarning) as caught:
        create()
    if caught:
        print(f"note: {caught[0].message}", file=sys.stderr)


def _say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def _timed(seconds: list[float], level: int) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[level] += time.perf_counter() - began


@contextmanager
def _progress(name: str, total: int, done: int = 0) -> Iterator[Callable[[int], object]]:
    """Yield a function that counts bytes and shows how many: by tqdm if there is a terminal, or in lines."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is not None and sys.stderr.isatty():
        with tqdm(desc=f"   {name}", total=total, initial=done, unit="B", unit_scale=True) as bar:
            yield bar.update
        return

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if done * 4 // total > (done - nbytes) * 4 // total:
            print(f"   {name}: {done * 100 // total} %", file=sys.stderr, flush=True)

    yield advance


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1, not {value}")
    return value
