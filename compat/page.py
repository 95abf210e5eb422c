"""Page: the matrix as docs/compatibility.md, and as compat/results.json, from which the page can be made again."""

import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compat.cases import DTYPES, SITUATIONS
from compat.environments import PROJECT
from compat.limits import LIMITS, Limit
from compat.matrix import EQUAL, NPY, SHARD, ZARR, Cell, Matrix
from compat.readers import READERS, Reader

PAGE = PROJECT / "docs" / "compatibility.md"
RESULTS = PROJECT / "compat" / "results.json"

_NONE = "-"
"""In a cell: there is nothing to read."""

_FORMS = {
    NPY: (
        "`.npy` files",
        'What `create_array("x.npy", ...)` publishes, with `publish(partial=True)` if it is partly written or empty.',
    ),
    SHARD: (
        "Shard files of Zarr arrays, read as `.npy`",
        'Where blocks split the leading axis, `numpy.load("x.zarr/c/0/0", mmap_mode="r")` reads the bytes that '
        '`zarr.open_array("x.zarr")` reads. A shard that is not complete is no `.npy`, an empty one has no file.',
    ),
    ZARR: ("Zarr arrays", 'What `create_array("x.zarr", ...)` publishes; partly written and empty just closed.'),
}

_INTRO = """\
# Compatibility

Made by `make compat`, which writes arrays with `create_array` and reads each with every tool below: {reads:,} reads,
compared with NumPy's array byte for byte. **equal** means that all of them were; a number, that those reads which the
limit of that number describes came out as it says, and **equal** beside it, that the others were equal. Nothing else
came out: the run fails on a difference that is no limit, and on a read that is equal though a limit says it cannot be.

Data are random bytes, so that there are NaNs of every payload, with 0, -0, infinities and the extremes of the dtype
among them. Each cell has arrays of rank 1 to 4, in blocks that split the leading axis, and for Zarr in tiles, too.

| situation | what it is |
|---|---|
| full | every block is written; one file |
| edge blocks | the same; the shape is no multiple of the chunks |
| several shards | the shape is no multiple of `shards=`, nor of the chunks; every block is written |
| partly written | every other block, the rest is `fill_value` |
| several shards, partly | one shard is missing, one has every other block, the others are complete |
| empty | made and closed |
| fill values | partly written, once with each of 2 to 11: NaN, -0.0, infinities, extremes, NaNs with a payload |
"""


def render(results: Mapping[str, Any]) -> str:
    """Return the page that says what `record` recorded."""
    cells = _cells(results)
    lines = [_INTRO.format(reads=sum(cell.total() for cell in cells.values())), *_readers(results, cells)]
    for form, (title, what) in _FORMS.items():
        lines += [f"## {title}", "", what, ""]
        readers = [reader for reader in READERS if any(name == reader.name and of == form for name, of, *_ in cells)]
        for alike in _alike(readers, form, cells):
            lines += _table(alike, form, cells)
    lines += ["## Limits", ""]
    lines += [f"{number}. {limit.sentence}" for number, limit in enumerate(_met(cells), 1)]
    lines += ["", *_TAIL.splitlines()]
    return "\n".join(lines) + "\n"


_TAIL = """\
## To make this page again

`make compat` needs PyPI and npm, node, and for the newest zarr-python an interpreter that it supports, which
`COMPAT_PYTHON` names if it is not found. What it installs is in `.venv-compat-*`, which `make clean` removes. It
writes this page and `compat/results.json`, or neither if it found anything. `python -m compat --help` says how to look
at a part. The readers that the extra `compat` installs run in `make test`, on a part of the arrays.
"""


def record(matrix: Matrix) -> dict[str, Any]:
    """Return versions and cells as what JSON has."""
    cells: dict[str, Any] = {}
    for (reader, form, dtype, situation), counts in matrix.cells.items():
        row = cells.setdefault(reader, {}).setdefault(form, {}).setdefault(dtype, {})
        row[situation] = dict(sorted(counts.items()))
    where = f"{platform.system()}, {platform.machine()}"
    return {"platform": where, "versions": matrix.versions, "cells": cells}


def write(matrix: Matrix, page: Path = PAGE, results: Path = RESULTS) -> None:
    """Write the page, and what it was made of."""
    recorded = record(matrix)
    results.write_text(_dump(recorded), encoding="utf-8")
    page.write_text(render(recorded), encoding="utf-8")


def _dump(recorded: Mapping[str, Any]) -> str:
    """Return JSON with a line for each dtype, so that differences can be read."""

    def lines(value: Any, depth: int) -> str:
        if not isinstance(value, dict) or depth == 0:
            return json.dumps(value)
        inner = ",\n".join(f"{json.dumps(key)}: {lines(item, depth - 1)}" for key, item in value.items())
        return f"{{\n{inner}\n}}"

    versions, cells = lines(recorded["versions"], 1), lines(recorded["cells"], 3)
    return f'{{"platform": {json.dumps(recorded["platform"])},\n"versions": {versions},\n"cells": {cells}}}\n'


def _cells(results: Mapping[str, Any]) -> dict[Cell, Counter[str]]:
    return {
        (reader, form, dtype, situation): Counter(counts)
        for reader, forms in results["cells"].items()
        for form, dtypes in forms.items()
        for dtype, situations in dtypes.items()
        for situation, counts in situations.items()
    }


def _readers(results: Mapping[str, Any], cells: Mapping[Cell, Counter[str]]) -> Iterable[str]:
    yield from ("## Readers", "", "| reader | reads | equal | limits | versions |", "|---|---|---|---|---|")
    for reader in READERS:
        if reader.name in results["versions"]:
            total = sum((counts for (name, *_), counts in cells.items() if name == reader.name), Counter[str]())
            met = " ".join(str(number) for number, limit in enumerate(_met(cells), 1) if total[limit.key])
            said = [f"{name} {version}" for name, version in results["versions"][reader.name].items()]
            versions = ", ".join([*said[1:], said[0]])
            yield f"| {reader.name} | {total.total():,} | {total[EQUAL]:,} | {met or 'none'} | {versions} |"
    yield from (
        "",
        f"Those of `.npy` read files of that name and shard files. All of it ran on {results['platform']}.",
        "The oldest zarr-python is yanked, since `zarr.load` of releases before 3.0.8 may delete what it is pointed at",
        "([zarr-python#3061](https://github.com/zarr-developers/zarr-python/issues/3061)): use `zarr.open_array`.",
        "zarrs is the codec pipeline for zarr-python, here with `codec_pipeline.strict`, so that nothing is left to",
        "zarr-python. xarray finds an array in the group that is the folder it lies in, by its `dimension_names`.",
        "",
    )


def _met(cells: Mapping[Cell, Counter[str]]) -> list[Limit]:
    """Return the limits that were met, in the order of their numbers."""
    met = {key for counts in cells.values() for key in counts}
    return [limit for limit in LIMITS if limit.key in met]


def _rows(reader: Reader, form: str, cells: Mapping[Cell, Counter[str]]) -> dict[str, tuple[str, ...]]:
    """Return for each dtype what the columns say."""
    limits = _met(cells)
    return {
        dtype.str: tuple(
            _text(cells.get((reader.name, form, dtype.str, situation)), limits) for situation in SITUATIONS
        )
        for dtype in DTYPES
    }


def _text(counts: Counter[str] | None, limits: Sequence[Limit]) -> str:
    if not counts:
        return _NONE
    numbers = [str(number) for number, limit in enumerate(limits, 1) if counts[limit.key]]
    return ", ".join(([EQUAL] if counts[EQUAL] else []) + ([f"({' '.join(numbers)})"] if numbers else []))


def _alike(readers: Iterable[Reader], form: str, cells: Mapping[Cell, Counter[str]]) -> list[list[Reader]]:
    """Return the readers in groups for which a table says the same."""
    groups: list[list[Reader]] = []
    for reader in readers:
        rows = _rows(reader, form, cells)
        for group in groups:
            if _rows(group[0], form, cells) == rows:
                group.append(reader)
                break
        else:
            groups.append([reader])
    return groups


def _table(readers: list[Reader], form: str, cells: Mapping[Cell, Counter[str]]) -> Iterable[str]:
    rows = _rows(readers[0], form, cells)
    columns = [i for i in range(len(SITUATIONS)) if any(row[i] != _NONE for row in rows.values())]
    total = sum(counts.total() for (name, of, *_), counts in cells.items() if name == readers[0].name and of == form)
    each = " each" if len(readers) > 1 else ""
    yield from (f"### {' / '.join(reader.name for reader in readers)}", "", f"{total:,} reads{each}.", "")
    yield f"| dtype | {' | '.join(SITUATIONS[i] for i in columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    merged: dict[tuple[str, ...], list[str]] = {}
    for dtype, row in rows.items():
        merged.setdefault(tuple(row[i] for i in columns), []).append(dtype)
    for row, dtypes in merged.items():
        yield f"| {_names(dtypes)} | {' | '.join(row)} |"
    yield ""


def _names(dtypes: list[str]) -> str:
    """Return what a row is called that says the same of several dtypes."""
    if len(dtypes) == len(DTYPES):
        return f"all {len(DTYPES)}"
    little = [np.dtype(dtype) for dtype in dtypes if dtype[0] != ">"]
    big = [np.dtype(dtype).name for dtype in dtypes if dtype[0] == ">"]
    names = [dtype.name for dtype in little]
    if big and big == [dtype.name for dtype in little if dtype.itemsize > 1]:
        return f"{', '.join(names)}, and big-endian"
    return ", ".join([*names, *(f"big-endian {name}" for name in big)])
