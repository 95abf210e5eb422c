"""Side by side: blockstore and what else could do the same work, in one run, as Markdown.

``python -m benchmarks.side_by_side`` runs six sections, or those that are named: ``--section A``. Each measures its
ways in turns, each time in a new file on a real disk (``TMPDIR`` says where), and takes medians over the rounds. A
ratio is the median of the ratios within a round, so that a slow minute of the machine hits both sides. ``--quick``
takes small files and few rounds: it shows that all works, and no numbers to quote.

Bytes count as written when the page cache has them, as ``os.pwrite`` means it, unless a column says otherwise.
"""

import argparse
import itertools
import mmap
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

import numpy as np

import blockstore as bs
from benchmarks import arrays, cycles, disk, journal, machine, roads
from benchmarks.base import KIB, MIB
from benchmarks.roads import Road
from blockstore import mapped

T = TypeVar("T")

MakeRoad = Callable[..., Road]
Order = Callable[[int], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Run:
    """How much to measure, and where."""

    folder: Path
    rounds: int
    quick: bool

    def in_turns(self, ways: dict[str, Callable[[int], T]]) -> dict[str, list[T]]:
        """Call each way once per round, with the number of the round, and begin each round with another one."""
        names = list(ways)
        measured: dict[str, list[T]] = {name: [] for name in names}
        ways[names[0]](0)  # the first call pays for what all others find warm
        for number in range(self.rounds):
            turn = number * 3 % len(names)
            for name in names[turn:] + names[:turn]:
                measured[name].append(ways[name](number))
        print(".", end="", file=sys.stderr, flush=True)
        return measured


@dataclass(frozen=True, slots=True)
class Fill:
    """Seconds that the steps of filling one file took."""

    create: float
    reserve: float
    fill: float
    flush: float


def filled(
    number: int, run: Run, make: MakeRoad, nbytes: int, each: int, threads: int, order: Order | None = None
) -> Fill:
    """Fill a new file: the slots that `order` names for this round, or all, as the threads come for them, and flush."""
    source = roads.source_block(each)
    disk.touch_memory(nbytes + nbytes // 8)
    start = time.perf_counter()
    road = make(run.folder / "file", nbytes, each)
    created = time.perf_counter()
    try:
        if order is None:
            handles: Sequence[Iterable[Any]] = road.share(threads)
        else:
            reserved = road.reserve(order(number))
            handles = [reserved[thread::threads] for thread in range(threads)]
        ready = time.perf_counter()
        fill = roads.fill(road, handles, source)
        done = time.perf_counter()
        if order is None:
            road.flush()
        return Fill(created - start, ready - created, fill, time.perf_counter() - done)
    finally:
        road.close()


def ratio(over: Iterable[float], under: Iterable[float]) -> float:
    """Return the median of what `over` is to `under`, round by round."""
    return median(a / b for a, b in zip(over, under, strict=True))


def paragraph(*sentences: str) -> None:
    print(*sentences, end="\n\n")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def size(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


def section_a(run: Run) -> None:
    """Fill one large file from end to end."""
    each = 12 * MIB
    nbytes = (6 if run.quick else 42) * each
    ways: dict[str, MakeRoad] = {
        '`writer()`, `access="dense"`': partial(roads.Store, access="dense"),
        "bare loop over the same map": partial(roads.MapCopy, advice=mmap.MADV_HUGEPAGE),
        "`np.memmap`, sparse file": roads.Memmap,
        "`os.pwrite` of a ready buffer": roads.PlainWrite,
        "fill a buffer, `os.pwrite` it": roads.BufferWrite,
    }
    paragraph(f"## A. {size(nbytes)} ({nbytes / 1e6:.0f} MB) in ranges of {size(each)}")
    paragraph(
        "Fill is `a[:] = block`, timed from the first byte to the exit of the last writer.",
        '"With flush" goes on until `flush()`, `os.fdatasync` or `memmap.flush` has returned; "create" comes before.',
        "Ratios are blockstore's speed to the other's: above 1, blockstore is faster.",
        "Aims: 0.95 to the bare loop, 3 to `np.memmap`.",
    )
    rows = []
    for threads in (1, 2, 12):
        measured = run.in_turns(
            {
                name: partial(filled, run=run, make=make, nbytes=nbytes, each=each, threads=threads)
                for name, make in ways.items()
            }
        )
        own, *_ = measured.values()
        for name, fills in measured.items():
            speeds = sorted(nbytes / one.fill / 1e9 for one in fills)
            durable = [one.fill + one.flush for one in fills]
            rows.append(
                [
                    str(threads),
                    name,
                    f"{median(speeds):.2f} ({speeds[0]:.2f}-{speeds[-1]:.2f})",
                    f"{ratio((one.fill for one in fills), (one.fill for one in own)):.2f}",
                    f"{nbytes / median(durable) / 1e9:.2f}",
                    f"{ratio(durable, (one.fill + one.flush for one in own)):.2f}",
                    f"{1e3 * median(one.create for one in fills):.1f}",
                ]
            )
    table(["threads", "way", "GB/s (range)", "ratio", "with flush, GB/s", "ratio", "create, ms"], rows)


def section_b(run: Run) -> None:
    """Write ranges of every size, densely and far apart."""
    floors: dict[str, MakeRoad] = {
        "huge": partial(roads.MapCopy, advice=mmap.MADV_HUGEPAGE),
        "random": partial(roads.MapCopy, advice=mmap.MADV_RANDOM),
        "pwrite": roads.PlainWrite,
    }
    calls: dict[str, Callable[..., Road]] = {"write()": roads.StoreCopy, "writer()": roads.Store}
    paragraph("## B. Ranges of every size, dense and sparse")
    paragraph(
        "Dense is a whole file in order, sparse is an eighth of one, anywhere, in random order.",
        "The floors know their offsets and copy a ready block:",
        "through a map with huge pages, through one with `MADV_RANDOM`, or with `os.pwrite`; microseconds per range.",
        "The other columns are blockstore's time to that of the best floor: below 1, blockstore is faster.",
        "In parentheses the same with `allocate_many` and the making of range objects, which the floors go without.",
        '"Told" is with `access="dense"` or `access="sparse"`, as it is, and "not told" with neither. Aim: 1.2.',
    )
    rows = []
    for each, access, threads in itertools.product((4 * KIB, 64 * KIB, MIB, 12 * MIB), ("dense", "sparse"), (1, 2)):
        count, slots = _extent(each, access, run.quick)
        ways = dict(floors)
        for hint, given in (("told", access), ("not told", None)):
            ways |= {f"`{call}` {hint}": partial(make, access=given) for call, make in calls.items()}
        order = partial(roads.random_order, count, slots) if access == "sparse" else partial(_in_order, slots)
        common: dict[str, Any] = {"run": run, "nbytes": slots * each, "each": each, "threads": threads, "order": order}
        measured = run.in_turns({name: partial(filled, make=make, **common) for name, make in ways.items()})
        times = {name: [one.fill for one in fills] for name, fills in measured.items()}
        centre = {name: median(times[name]) for name in floors}
        best = min(centre, key=centre.__getitem__)
        row = [size(each), access, str(threads)]
        row += [f"{'**' * (name == best)}{centre[name] / count * 1e6:.2f}{'**' * (name == best)}" for name in floors]
        for name in list(ways)[len(floors) :]:
            whole = [one.fill + one.reserve for one in measured[name]]
            row.append(f"{ratio(times[name], times[best]):.2f} ({ratio(whole, times[best]):.2f})")
        rows.append(row)
    table(["each", "access", "threads", *ways], rows)


def _extent(each: int, access: str, quick: bool) -> tuple[int, int]:
    """Return how many ranges are written, and how many the file has."""
    dense = {4 * KIB: 64 * MIB, 64 * KIB: 128 * MIB, MIB: 256 * MIB, 12 * MIB: 252 * MIB}
    sparse = {4 * KIB: 32 * MIB, 64 * KIB: 64 * MIB, MIB: 64 * MIB, 12 * MIB: 96 * MIB}
    count = max((dense if access == "dense" else sparse)[each] // each // (8 if quick else 1), 2)
    return count, count if access == "dense" else 8 * count


def _in_order(slots: int, number: int) -> Sequence[int]:
    return range(slots)


def section_c(run: Run) -> None:
    """Time what a range costs beside its filling."""
    count = 2_000 if run.quick else 20_000
    whole = replace(run, rounds=run.rounds * 3)
    kinds: tuple[Literal["sequential", "concurrent"], ...] = ("sequential", "concurrent")
    with cycles.no_collector():
        measured = whole.in_turns(
            {
                "bare": partial(cycles.bare, run.folder, count),
                **{kind: partial(cycles.cycle, run.folder, count, kind) for kind in kinds},
            }
        )
    floors = {name: [one[name] for one in measured["bare"]] for name in measured["bare"][0]}
    bare = floors["mmap"]
    paragraph("## C. What a range costs beside its filling")
    paragraph(
        f"Ranges of 4 KiB with nothing written, {count} of each in each of {whole.rounds} rounds, in one thread;",
        "nanoseconds, and the ratio to the floor: a bare `np.ndarray(shape, dtype, map, offset)` over a `mmap.mmap`,",
        f"{median(bare):.0f} ns (over a `np.memmap` {median(floors['np.memmap']):.0f}, and a slice of a `np.memmap`",
        f"{median(floors['slice']):.0f}; a row of a plain array in `for row in a` {median(floors['row']):.0f}).",
        "Loops are included on both sides.",
    )
    rows = []
    for name, aim in cycles.AIMS.items():
        row = [name]
        for kind in kinds:
            own = [one[name] for one in measured[kind]]
            row += [f"{median(own):.{0 if median(own) >= 10 else 1}f}", f"{ratio(own, bare):.3g}"]
        rows.append([*row, aim])
    table(["what", "sequential, ns", "ratio", "concurrent, ns", "ratio", "aim"], rows)


def section_d(run: Run) -> None:
    """Compare guard="flag" with both roads of guard="seal"."""
    sizes = [64 * KIB, 256 * KIB, MIB, 2 * MIB, 4 * MIB, 12 * MIB]
    paragraph('## D. What `guard="seal"` costs')
    paragraph(
        'A dense file through `writer()`, `access="dense"`: microseconds per range with `guard="flag"`, and with both',
        "roads of sealing: a window on a map, which the exit replaces, and a private buffer, which the exit writes.",
        f"The library takes the window from {size(mapped.VIEW_MIN_NBYTES)} on.",
    )
    rows = []
    for each, threads in itertools.product(sizes, (1, 2)):
        count = max((16 if each < MIB else 128) * MIB // each, 16) // (4 if run.quick else 1)
        common: dict[str, Any] = {"run": run, "each": each, "count": count, "threads": threads}
        measured = run.in_turns(
            {
                "flag": partial(_sealed, guard="flag", window_min=0, **common),
                "window": partial(_sealed, guard="seal", window_min=0, **common),
                "buffer": partial(_sealed, guard="seal", window_min=1 << 62, **common),
            }
        )
        times = [[one.fill for one in fills] for fills in measured.values()]
        flag, window, buffer = times
        rows.append(
            [
                size(each),
                str(threads),
                *(f"{median(one) / count * 1e6:.1f}" for one in times),
                f"{ratio(window, flag):.2f}",
                f"{ratio(buffer, flag):.2f}",
                "window" if ratio(window, buffer) < 1 else "buffer",
                f"{max(ratio(window, buffer), ratio(buffer, window)):.2f}",
            ]
        )
    table(
        ["each", "threads", "flag, us", "window, us", "buffer, us", "window/flag", "buffer/flag", "faster", "by"], rows
    )


def _sealed(
    number: int, run: Run, guard: Literal["flag", "seal"], window_min: int, each: int, count: int, threads: int
) -> Fill:
    """Fill a file with the threshold between the two roads of sealing set to `window_min` bytes."""
    before, mapped.VIEW_MIN_NBYTES = mapped.VIEW_MIN_NBYTES, window_min
    try:
        make = partial(roads.Store, access="dense", guard=guard)
        return filled(number, run, make, count * each, each, threads, partial(_in_order, count))
    finally:
        mapped.VIEW_MIN_NBYTES = before


def section_e(run: Run) -> None:
    """Compare keeping receipts in a journal with keeping them in memory."""
    count, nbytes = (2_000, 32 * MIB) if run.quick else (50_000, 256 * MIB)
    records = 100_000 if run.quick else 1_000_000
    path = journal.million(run.folder, records)
    paragraph("## E. What the journal costs")
    paragraph(
        'One thread, `access="dense"`: with the journal, and with receipts that only memory has.',
        f"The replay of a journal of {records} records is compared with `np.fromfile` of the same bytes.",
        "Ratios are time to time. Aims: filling 1.05, cycle 1.6, replay 10.",
    )
    fills = {True: "by `write()`", False: "through `writer()`"}
    pairs: dict[str, tuple[Callable[[int], float], Callable[[int], float]]] = {
        f"{size(nbytes)} in ranges of 64 KiB {how}": (
            partial(journal.fill, folder=run.folder, nbytes=nbytes, journal=True, copy=copy),
            partial(journal.fill, folder=run.folder, nbytes=nbytes, journal=False, copy=copy),
        )
        for copy, how in fills.items()
    }
    pairs["empty cycle, each"] = (
        partial(journal.cycle, folder=run.folder, count=count, journal=True),
        partial(journal.cycle, folder=run.folder, count=count, journal=False),
    )
    pairs[f"replay of {records} records"] = (partial(journal.replay, path=path), partial(journal.read, path=path))
    rows = []
    for name, (own, floor) in pairs.items():
        measured = run.in_turns({"own": own, "floor": floor})
        own_us, floor_us = (median(measured[way]) * 1e6 for way in ("own", "floor"))
        rows.append([name, f"{own_us:.4g}", f"{floor_us:.4g}", f"{ratio(measured['own'], measured['floor']):.2f}"])
    table(["what", "with the journal, us", "floor, us", "ratio"], rows)


def section_f(run: Run) -> None:
    """Fill an array block by block, as others do."""
    work = arrays.Work(16 if run.quick else 128, 1024 if run.quick else 8192, blocks=64, threads=2)
    paragraph(f"## F. An array of {size(work.nbytes)} in blocks of {size(work.nbytes // work.blocks)}, 2 threads")
    paragraph(
        f"An array of {work.shape} float64 is made and filled in blocks of {work.chunks}, uncompressed: each of",
        "2 threads takes the next block and hands over what it is to hold, which is ready and warm in memory.",
        f"{arrays.versions()}.",
    )
    paragraph(
        "Three times from the start, in ms: until all is *written*, that is, the last call that was given data has",
        "returned; until it is *closed*, and so visible to everybody; and until the *disk* has it, for which the files",
        "and folders of the others are synced in 2 threads. Closing blockstore's includes that, and nothing is visible",
        "before. Ratios are the other's time to blockstore's in the first row, above 1 blockstore is faster:",
        "*without sync*, theirs until closed to blockstore's until written; *with sync*, until the disk has it, both;",
        "*against*, theirs closed without a sync to blockstore's closed with one. Wrong blocks are those that a reader",
        "finds to be something else, or cannot read: the most in a round.",
    )
    few = replace(run, rounds=min(run.rounds, 2))
    for title, ways, how in (
        ("One shard, block by block", arrays.ONE_SHARD, few),
        ("The same array in any layout", arrays.ANY_LAYOUT, run),
    ):
        there = list(arrays.present(ways))
        arrays.warm_up(run.folder, there)
        measured = how.in_turns(
            {way.label: partial(arrays.measure, make=way, folder=run.folder, work=work) for way in there}
        )
        paragraph(f"**{title}**, medians of {how.rounds} rounds.")
        own, *_ = measured.values()
        rows = []
        for way, (label, fills) in zip(there, measured.items(), strict=True):
            steps = [[getattr(one, step) for one in fills] for step in ("created", "written", "closed", "durable")]
            wrong = {name: max(one.wrong[name] for one in fills) for name in fills[0].wrong}
            rows.append(
                [
                    f"blockstore: {label}" if issubclass(way, arrays.Array) else label,
                    *(f"{1e3 * median(step):.{0 if median(step) >= 0.1 else 1}f}" for step in steps),
                    f"{ratio((getattr(one, way.unsynced) for one in fills), (one.written for one in own)):.2f}",
                    f"{ratio((one.durable for one in fills), (one.durable for one in own)):.2f}",
                    f"{ratio((one.closed for one in fills), (one.closed for one in own)):.2f}",
                    ", ".join(f"{count} ({name})" for name, count in wrong.items()),
                    way.promise,
                ]
            )
        columns = ["create", "written", "closed", "disk", "without sync", "with sync", "against"]
        table(["way", *columns, f"wrong of {work.blocks}, by", "what is promised when it is closed"], rows)


SECTIONS = {"A": section_a, "B": section_b, "C": section_c, "D": section_d, "E": section_e, "F": section_f}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.side_by_side", description="blockstore side by side")
    parser.add_argument("--quick", action="store_true", help="small files and two rounds: no numbers to quote")
    parser.add_argument("--rounds", type=int, metavar="N", help="measurements of each way; default: 15")
    parser.add_argument("--section", action="append", choices=SECTIONS, help="run only this one; may be repeated")
    options = parser.parse_args(argv)
    start = time.monotonic()
    try:
        folder = disk.new_folder()
    except NotImplementedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        run = Run(folder, options.rounds or (2 if options.quick else 15), options.quick)
        paragraph("# blockstore side by side")
        paragraph(
            f"blockstore {bs.__version__}, NumPy {np.__version__}, {platform.python_implementation()}",
            f"{platform.python_version()}; {machine.cpu()}, {os.cpu_count()} processors; {platform.system()}",
            f"{platform.release()}, {disk.filesystem(folder)}. Medians of {run.rounds} rounds"
            + (", a quick look: no numbers to quote." if run.quick else "."),
        )
        for name in options.section or SECTIONS:
            SECTIONS[name](run)
        print(f"All of it took {time.monotonic() - start:.0f} s.")
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
