"""Run the matrix: ``python -m compat``, or only the readers whose names contain a word. See docs/compatibility.md.

The whole writes that page and compat/results.json, unless it found anything. The exit code is 1 if it found anything,
or if a reader could not run. It needs the network where an environment has to be made.
"""

import argparse
import sys
from collections.abc import Sequence

import blockstore as bs
from compat import cases, matrix, page
from compat.readers import READERS


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run what is asked for, print what came out, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m compat", description="Read blockstore's arrays with every tool.")
    parser.add_argument("readers", nargs="*", metavar="word", help="only readers with it in their names")
    parser.add_argument("--quick", action="store_true", help="an eighth of the arrays")
    parser.add_argument("--check", action="store_true", help="everything, but write nothing; parts never do")
    chosen = parser.parse_args(arguments)
    readers = [
        reader
        for reader in READERS
        if not chosen.readers or any(word.lower() in reader.name.lower() for word in chosen.readers)
    ]
    if not readers:
        parser.error(f"no reader is called so: {', '.join(reader.name for reader in READERS)}")
    with matrix.scratch() as folder:
        chosen_cases = cases.some_cases() if chosen.quick else cases.all_cases()
        ran = matrix.run(chosen_cases, readers, folder, bs.create_array, progress=_tell)
    _tell("")
    whole = not chosen.quick and readers == list(READERS)
    for name, versions in ran.versions.items():
        print(f"{name}: {', '.join(f'{package} {version}' for package, version in versions.items())}")
    for name, reason in ran.skipped.items():
        print(f"{name}: skipped: {reason}")
    for key in matrix.unmet(ran) if whole else []:
        print(f"limit {key!r} was met by no read, so that the page does not have it")
    for finding in ran.findings[:200]:
        print(f"  {finding}")
    print(f"{ran.reads} reads equal or within limits, {len(ran.findings)} findings")
    if ran.findings or ran.skipped:
        return 1
    if whole and not chosen.check:
        page.write(ran)
        print(f"wrote {page.PAGE} and {page.RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
