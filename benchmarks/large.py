"""Large: whether anything but the disk notices that an array has a million blocks.

An array of sparse blocks, of which two are written, goes through each step of its life; so does one with a thousand
times as few. Each step tells its seconds, the memory it took at most, and the Python objects it left behind. Files
are sparse, so that a terabyte of array takes a few megabytes of disk. ``python -m benchmarks.large`` prints a table
that has both counts, and the ratio, side by side.
"""

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

import blockstore as bs

BLOCK_NBYTES = 1 << 20
FORMATS = ("npy", "zarr")


class Cost(NamedTuple):
    """What a step took."""

    seconds: float
    resident: int
    """Bytes by which the memory in use has risen at most, as the kernel counts; 0 where it does not say."""
    traced: int
    """Bytes that Python and NumPy had allocated at most during the step; 0 if not traced."""
    blocks: int
    """Memory blocks of Python that the step has left behind: about as many as objects."""


def steps(path: Path, count: int, nbytes: int = BLOCK_NBYTES) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return the steps of an array of `count` blocks of `nbytes` bytes, each a name and what does it; in this order."""
    opened: dict[str, Any] = {}
    data = np.ones((1, nbytes), np.uint8)
    middle = count // 2

    def remember(array: bs.BlockArray) -> None:
        opened["x"] = array

    def x() -> bs.BlockArray:
        array: bs.BlockArray = opened["x"]
        return array

    def leave() -> None:
        x()._files.close(publish=False)  # as an exception does, or a kill

    def create() -> None:
        shape, chunks = (count, nbytes), (1, nbytes)
        remember(bs.create_array(path, shape=shape, dtype="u1", chunks=chunks, reserve=False, overwrite=True))

    def write(index: int, *, rewrite: bool = False) -> None:
        x().blocks[index, 0].write(data, rewrite=rewrite)

    def use(when: str) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield f"next(pending()), {when}", lambda: next(x().pending()).index
        yield f"all of pending(), {when}", lambda: sum(1 for _ in x().pending())
        yield f"written, {when}", lambda: int(np.count_nonzero(x().written))
        yield f"repr, {when}", lambda: repr(x())
        yield f"_repr_html_, {when}", lambda: x()._repr_html_()

    yield "create_array", create
    yield "first write", lambda: write(middle)
    yield "read of a block", lambda: int(x().blocks[middle, 0].read()[0, 0])
    yield "x[i, 5]", lambda: int(x()[middle + 1, 5])
    yield "flush", lambda: x().flush()
    yield from use("unfinished")
    yield "leave without publishing", leave
    yield "open_array, unfinished", lambda: remember(bs.open_array(path))
    yield "x[i, 5], reopened", lambda: int(x()[middle, 5])
    yield "write, reopened", lambda: write(0)
    yield "publish", lambda: x().publish(partial=True)
    yield "rewrite, published", lambda: write(middle, rewrite=True)
    yield "close", lambda: x().close()
    yield "open_array, to read", lambda: remember(bs.open_array(path, mode="r"))
    yield "x[i, 5], to read", lambda: int(x()[middle, 5])
    yield from use("to read")
    yield "close, read", lambda: x().close()


def full_steps(path: Path, count: int, nbytes: int = BLOCK_NBYTES) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return the steps of an array that is filled whole, with zeros that are never stored: its blocks stay holes."""
    opened: dict[str, Any] = {}

    def remember(array: bs.BlockArray) -> None:
        opened["x"] = array

    def fill() -> int:
        array: bs.BlockArray = opened["x"]
        return array.fill(lambda a, block: None, workers=1, flush_every=None)

    def create() -> None:
        shape, chunks = (count, nbytes), (1, nbytes)
        remember(bs.create_array(path, shape=shape, dtype="u1", chunks=chunks, reserve=False, overwrite=True))

    yield "create_array", create
    yield "fill with nothing, and flush", fill
    yield "leave without publishing", lambda: opened["x"]._files.close(publish=False)
    yield "open_array, all written", lambda: remember(bs.open_array(path))
    yield "written, all written", lambda: np.count_nonzero(opened["x"].written)
    yield "publish, all written", lambda: opened["x"].publish()
    yield "_repr_html_, all written", lambda: opened["x"]._repr_html_()
    yield "close", lambda: opened["x"].close()
    yield "open_array, finished", lambda: remember(bs.open_array(path))
    yield "x[i, 5], finished", lambda: opened["x"][count // 2, 5]
    yield "all of pending(), finished", lambda: sum(1 for _ in opened["x"].pending())
    yield "close, finished", lambda: opened["x"].close()


def cost(step: Callable[[], Any], *, trace: bool) -> tuple[Cost, Any]:
    """Run a step and return what it took, and what it returned. To `trace` memory makes it slower."""
    gc.collect()
    if trace:
        tracemalloc.start()
    before_blocks, before, start = sys.getallocatedblocks(), _resident(reset=True)[0], time.perf_counter()
    result = step()
    seconds, peak = time.perf_counter() - start, _resident(reset=False)[1]
    gc.collect()
    after_blocks = sys.getallocatedblocks()
    traced = tracemalloc.get_traced_memory()[1] if trace else 0
    tracemalloc.stop()
    return Cost(seconds, max(peak - before, 0), traced, after_blocks - before_blocks), result


def costs(each: Iterator[tuple[str, Callable[[], Any]]], *, trace: bool) -> dict[str, Cost]:
    """Run steps one after another and return what each took."""
    return {name: cost(step, trace=trace)[0] for name, step in each}


def _resident(*, reset: bool) -> tuple[int, int]:
    """Return the bytes of memory in use that are no file's, and the most that were since the last reset."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0, 0
    said = dict(line.split(":", 1) for line in text.splitlines())
    now, most = (int(said[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
    return now, most


def _measure(kind: str, of: str, count: int, folder: str) -> dict[str, Cost]:
    """Run all steps twice in this process: once on the clock, once with memory traced."""
    which = full_steps if of == "full" else steps
    with TemporaryDirectory(prefix="blockstore-large-", dir=folder or None) as place:
        path = Path(place) / f"x.{kind}"
        for warm in (True, False):  # what is imported and cached by the first array is not of this one
            small = Path(place) / f"{'w' if warm else 'v'}.{kind}"
            costs(which(small, 10, 4096), trace=not warm)
        timed = costs(which(path, count), trace=False)
        traced = costs(which(path, count), trace=True)
    return {name: cost._replace(traced=traced[name].traced) for name, cost in timed.items()}


def table(kind: str, of: str, counts: list[int], folder: str = "") -> str:
    """Measure arrays of some counts of blocks, each in a process of its own, and return a Markdown table."""
    measured = []
    for count in counts:
        command = [sys.executable, "-m", "benchmarks.large", "--measure", kind, of, str(count), "--folder", folder]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        measured.append({name: Cost(*cost) for name, cost in json.loads(answer).items()})
    heads = ["ms", "peak RSS, KiB", "peak allocated, KiB", "objects left"]
    lines = [
        f"| {kind}, {' / '.join(f'{count:,}' for count in counts)} blocks | " + " | ".join(heads) + " | time ratio |",
        "|---|" + "---:|" * (len(heads) + 1),
    ]
    for name in measured[0]:
        each = [one[name] for one in measured]
        cells = [
            " / ".join(f"{cost.seconds * 1000:,.1f}" for cost in each),
            " / ".join(f"{cost.resident >> 10:,}" for cost in each),
            " / ".join(f"{cost.traced >> 10:,}" for cost in each),
            " / ".join(f"{cost.blocks:,}" for cost in each),
            f"{each[-1].seconds / each[0].seconds:,.0f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 1_000_000], help="of blocks of 1 MiB")
    parser.add_argument("--folder", default="", help="where the sparse files go; default: the temporary folder")
    parser.add_argument("--full", action="store_true", help="instead, arrays of which every block is written: minutes")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        kind, of, count = given.measure
        with contextlib.redirect_stdout(sys.stderr):
            measured = _measure(kind, of, int(count), given.folder)
        print(json.dumps(measured))
        return
    for kind in FORMATS:
        print(table(kind, "full" if given.full else "two", given.counts, given.folder), flush=True)
        print()


if __name__ == "__main__":
    main()
