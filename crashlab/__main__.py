"""Run the crash laboratory: ``python -m crashlab``, or only the parts that are named. See docs/durability.md.

Each part prints one line, and what it found; the exit code is 1 if it found anything, or missed a planted bug. Parts
that need root, or programs that are not there, say so and are skipped, with exit code 0 unless ``--strict``.

``arrays`` kills processes that fill arrays, and compares what the last one leaves with an uninterrupted run, byte for
byte. ``readers`` polls arrays with zarr-python, tensorstore and NumPy meanwhile, and plants bugs that it must see.
"""

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from crashlab import array_kills, badsectors, faults, fuzz, kills, powerloss, readers, shutdown
from crashlab.plants import BAD_SECTORS, POWER_LOSS


def _findings(report: object) -> Sequence[str]:
    """Return what a report has found; empty if all is well."""
    name = "findings" if hasattr(report, "findings") else "failures"
    found: Sequence[str] = getattr(report, name)
    return found


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = tempfile.mkdtemp(prefix="crashlab-")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _kills(full: int) -> list[object]:
    with _folder() as folder:
        return [kills.run(folder, kills=1000 // full, seeds=range(10), progress=_tell)]


def _array_kills(full: int) -> list[object]:
    with _folder() as folder:
        return [array_kills.run(folder, kills=200 // full, seeds=range(10), progress=_tell)]


def _readers(full: int) -> list[object]:
    """Let readers poll, and plant what they must notice."""
    with _folder() as folder:
        rounds = 20 // full
        return [readers.run(folder, rounds=rounds, seeds=range(10), plants=tuple(readers.PLANTS), progress=_tell)]


def _faults(full: int) -> list[object]:
    with _folder() as folder:
        reports: list[object] = [faults.run(folder, everything=True, every=full, progress=_tell)]
    if full == 1 and not faults.missing():
        with _folder() as folder:
            reports.append(faults.run(folder, strace=True, progress=_tell))
    return reports


def _fuzz(full: int) -> list[object]:
    return [fuzz.run(flips=50_000 // full, splices=1000 // full, seeds=range(10), progress=_tell)]


def _power_loss(full: int) -> list[object]:
    return [
        powerloss.run("ext4", 1000 // full, range(10), progress=_tell),
        powerloss.run("xfs", 100 // full, range(10), progress=_tell),
    ]


def _bad_sectors(full: int) -> list[object]:
    return [badsectors.run(fs, range(10 // full or 1), progress=_tell) for fs in ("ext4", "xfs")]


def _shutdown(full: int) -> list[object]:
    with _folder() as folder:
        return [shutdown.run(folder, rounds=20 // full, seeds=range(5), progress=_tell)]


def _planted(full: int) -> list[object]:
    """Plant each bug, and report those that were not caught."""
    return [Planted(*_missed())]


class Planted:
    """Which planted bugs were caught."""

    def __init__(self, caught: dict[str, str], missed: list[str]) -> None:
        self.caught = caught
        self.findings = [f"{plant!r} was planted and not caught" for plant in missed]

    def __str__(self) -> str:
        lines = [f"  {plant}: {how}" for plant, how in self.caught.items()]
        return "\n".join(
            [*lines, f"planted bugs: {len(self.caught)} of {len(self.caught) + len(self.findings)} caught"]
        )


def _missed() -> tuple[dict[str, str], list[str]]:
    caught, missed = {}, []
    for plant in (*POWER_LOSS, *BAD_SECTORS):
        _tell(f"planting {plant}")
        reports: list[powerloss.Report | badsectors.Report] = []
        for seed in range(10):
            if plant in POWER_LOSS:
                reports.append(powerloss.run("ext4", 100, [seed], plant, enough=1))
            else:
                reports.append(badsectors.run("ext4", [seed], plant))
            if reports[-1].findings:
                break
        if reports[-1].findings:
            caught[plant] = (
                f"caught with seed {reports[-1].seeds[-1]}: {reports[-1].findings[0].strip().splitlines()[-1]}"
            )
        else:
            missed.append(plant)
    return caught, missed


_PARTS: dict[str, tuple[Callable[[int], list[object]], Callable[[], list[str]]]] = {
    "kills": (_kills, list),
    "arrays": (_array_kills, list),
    "readers": (_readers, readers.missing),
    "faults": (_faults, list),
    "fuzz": (_fuzz, list),
    "powerloss": (_power_loss, powerloss.missing),
    "badsectors": (_bad_sectors, powerloss.missing),
    "shutdown": (_shutdown, shutdown.missing),
    "planted": (_planted, powerloss.missing),
}


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run the parts that are named, or all, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m crashlab", description="Crash blockstore on purpose.")
    parser.add_argument("parts", nargs="*", choices=[[], *_PARTS], metavar="part", help=f"of {', '.join(_PARTS)}")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--strict", action="store_true", help="fail if a part must be skipped")
    chosen = parser.parse_args(arguments)
    bad = False
    for name in chosen.parts or _PARTS:
        run, missing = _PARTS[name]
        if lacks := missing():
            print(f"{name}: skipped: {'; '.join(lacks)}", flush=True)
            bad |= chosen.strict
            continue
        for report in run(10 if chosen.quick else 1):
            _tell("")
            for finding in _findings(report)[:20]:
                print(f"  {finding}")
            print(report, flush=True)
            bad |= bool(_findings(report))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
