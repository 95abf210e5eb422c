"""The command line: ``python -m blockstore demo [DIR] [--workers N] [--rounds N] [--keep PATH]``.

Tables go to standard output, progress and errors to standard error. The exit code is 0 if every byte was packed and
verified, 1 if anything was not, 2 for a command that makes no sense, and 130 after Ctrl-C.
"""

import argparse
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from blockstore import _disk, _os, demo
from blockstore.errors import FileSystemWarning

PROMISES = {
    "": "durable  overlap     receipts  full disk",
    "blockstore": "yes      impossible  yes       an error at the start",
    "numpy.memmap": "yes      unchecked   no        kills the process",
    "file I/O": "yes      unchecked   no        an error on the way",
}
"""What each way promises, as the columns of the table."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m blockstore", description="Fill large arrays in parallel.")
    command = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "demo",
        help="pack every file of a folder into one file, three ways, and check every byte",
        description="Pack every file of a folder into one file, three ways, and check every byte.",
    )
    command.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="default: the installed NumPy package")
    command.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, metavar="N", help="threads")
    command.add_argument("--rounds", type=_positive, default=5, metavar="N", help="runs of each way; default: 5")
    command.add_argument("--keep", type=Path, metavar="PATH", help="keep the packed file, and PATH.index beside it")
    options = parser.parse_args(argv)
    try:
        return run_demo(options.folder or Path(np.__file__).parent, options.workers, options.rounds, options.keep)
    except KeyboardInterrupt:
        print("interrupted: the temporary files are removed", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run_demo(folder: Path, workers: int, rounds: int, keep: Path | None = None) -> int:
    """Pack `folder` `rounds` times in each way, print the table, and return the exit code."""
    if keep is not None and os.path.lexists(keep):
        raise FileExistsError(f"{str(keep)!r} exists: --keep replaces nothing")
    failures: dict[Path, str] = {}
    sources, empty = demo.find(folder, failures)
    if not sources:
        _print_failures(failures)
        raise FileNotFoundError(f"nothing to pack: no file in {str(folder)!r} has a byte that can be read")
    timings: dict[str, list[float]] = {name: [] for name in demo.ROADS}
    packed: dict[str, dict[int, int]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="blockstore-demo-", dir=keep.parent if keep else ".") as temporary,
        _progress(len(sources) * rounds * len(demo.ROADS)) as advance,
        warnings.catch_warnings(action="ignore", category=FileSystemWarning),
    ):
        _print_note(temporary)
        target = Path(temporary, "packed")
        work = demo.Work(sources, workers, advance, failures)
        for name, seconds, starts in demo.runs(target, work, rounds):
            timings[name].append(seconds)
            packed[name] = starts
            if keep and name == "blockstore" and len(timings[name]) == rounds:
                _keep(target, keep, {start: sources[index] for index, start in starts.items()})
    _print_table(sources, empty, workers, timings, packed)
    _print_failures(failures)
    if failures:
        return 1
    print(f"Every byte was compared with its source after each of {rounds * len(timings)} runs.")
    return 0


def _print_table(
    sources: Sequence[demo.Source],
    empty: int,
    workers: int,
    timings: dict[str, list[float]],
    packed: dict[str, dict[int, int]],
) -> None:
    rounds = len(timings["blockstore"])
    print(f"{len(sources) + empty} files ({empty} empty), {workers} threads, medians of {rounds} rounds\n")
    print(f"{'':<13} {'files':>7} {'bytes':>14} {'seconds':>8} {'GB/s':>6}  {PROMISES['']}")
    for name, seconds in timings.items():
        nbytes, median = sum(sources[index].nbytes for index in packed[name]), statistics.median(seconds)
        count, speed = len(packed[name]) + empty, nbytes / median / 1e9
        print(f"{name:<13} {count:>7} {nbytes:>14} {median:>8.3f} {speed:>6.2f}  {PROMISES[name]}")
    print()


def _print_failures(failures: dict[Path, str]) -> None:
    for path, reason in failures.items():
        print(f"not packed, or not every time: {path}: {reason}", file=sys.stderr)


def _keep(target: Path, path: Path, sources: dict[int, demo.Source]) -> None:
    """Give the packed file a second name, and list what is where: start, nbytes and path, one source a line."""
    os.link(target, path)
    lines = [f"{start}\t{source.nbytes}\t{source.path}\n" for start, source in sorted(sources.items())]
    Path(f"{path}.index").write_text("".join(lines), encoding="utf-8", errors="surrogateescape")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], object]]:
    """Yield a function that counts files and shows how many: by tqdm if there is a terminal, or in lines."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is not None and sys.stderr.isatty():
        with tqdm(total=total, unit=" files", leave=False) as bar:
            yield bar.update
        return
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if done * 10 // total > (done - count) * 10 // total:
            print(f"{done} of {total} files", file=sys.stderr, flush=True)

    yield advance


def _print_note(folder: str) -> None:
    """Say once what the table does not hold for, where the library would warn in each round."""
    kind = ""
    with suppress(OSError):
        kind = _disk.filesystem(_os.File(os.open(folder, os.O_RDONLY)))
    if kind in _disk.FORGETFUL:
        print("note: this folder is in memory, where nothing is durable", file=sys.stderr)
    elif kind in _disk.COPY_ON_WRITE:
        print(f"note: this folder is on {kind}, where reserved space does not help on a full disk", file=sys.stderr)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1, not {value}")
    return value
