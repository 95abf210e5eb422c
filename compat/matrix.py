"""Matrix: every case read by every reader, each read equal, a limit, or a finding.

A cell is one reader, one form of file, one dtype and one situation; it counts the reads in it by what came of them.
"""

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import blockstore as bs
from compat import environments
from compat.cases import Case, CreateArray, Item
from compat.differences import compare, nbytes
from compat.limits import LIMITS
from compat.readers import Answer, Job, Reader

EQUAL = "equal"

NPY, SHARD, ZARR = "npy", "shard", "zarr"
"""Forms of what is read: an ``.npy`` file, a shard file that is one at the same time, a Zarr array."""

Cell = tuple[str, str, str, str]
"""The name of a reader, the form, the dtype as NumPy's `dtype.str`, the situation."""

_MAKERS = 8
"""Threads that make arrays. What they do most is to wait for the disk."""

_ROOM_NBYTES = 1 << 30
"""Bytes that are enough for a whole run."""

_SECONDS = 900
"""How long one reader may take."""


@dataclass(slots=True)
class Matrix:
    """What came out."""

    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    """For each reader, of the tool and what it stands on."""
    cells: dict[Cell, Counter[str]] = field(default_factory=dict)
    """How many reads were `EQUAL`, or met the limit of a key."""
    findings: list[str] = field(default_factory=list)
    """Reads that were neither, limits that were not met, readers that broke."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Why a reader did not run."""

    @property
    def reads(self) -> int:
        """How many reads there were, those of findings left out."""
        return sum(cell.total() for cell in self.cells.values())


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder for the time of a run: in memory where there is enough of it, since no reader minds the disk.

    There blockstore warns that nothing is durable, which is of no concern here.
    """
    memory = Path("/dev/shm")  # noqa: S108
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free >= _ROOM_NBYTES
    folder = Path(tempfile.mkdtemp(prefix="compat-", dir=memory if roomy else None))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bs.FileSystemWarning)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def form(item: Item) -> str:
    """Return the form of an item."""
    if not item.npy:
        return ZARR
    return NPY if item.case.format == "npy" else SHARD


def run(
    cases: Sequence[Case],
    readers: Iterable[Reader],
    folder: Path,
    create_array: CreateArray,
    progress: Callable[[str], None] = lambda _: None,
) -> Matrix:
    """Make all cases in a folder and read them with each reader, some at a time."""
    matrix = Matrix()
    items: list[Item] = []
    with ThreadPoolExecutor(_MAKERS) as pool:
        for case, trouble in zip(cases, pool.map(lambda one: _make(one, folder, create_array), cases), strict=True):
            progress(f"making {case.name}")
            if trouble:
                matrix.findings.append(f"blockstore: {case.name}: {trouble}")
            else:
                items += case.items()
    ready = list(_ready(readers, matrix, progress))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for reader, answers in zip(ready, pool.map(lambda one: _read(one, items, folder), ready), strict=True):
            progress(f"comparing what {reader.name} read")
            _judge(reader, answers, matrix)
    return matrix


def _make(case: Case, folder: Path, create_array: CreateArray) -> str:
    """Make a case, and return what went wrong."""
    try:
        case.make(folder / case.name, create_array)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


Answers = tuple[list[Item], Path, Answer] | str
"""What was read, the file of its bytes, and the answer; or how the reader broke."""


def _ready(readers: Iterable[Reader], matrix: Matrix, progress: Callable[[str], None]) -> Iterator[Reader]:
    for reader in readers:
        progress(f"preparing {reader.name}")
        lacks = environments.missing(reader) if reader.environment == "here" else []
        try:
            environments.prepare(reader.environment)
        except environments.Unavailable as error:
            matrix.skipped[reader.name] = str(error)
            continue
        if lacks:
            matrix.skipped[reader.name] = f"not installed: {', '.join(lacks)}"
            continue
        yield reader


def _read(reader: Reader, items: Sequence[Item], folder: Path) -> Answers:
    """Let a reader read those items that are for it."""
    mine = [item for item in items if item.npy == reader.npy]
    place = folder / f"reader-{reader.read.replace(':', '-')}-{reader.environment}"
    place.mkdir()
    job: Job = {
        "read": reader.read,
        "versions": list(reader.packages),
        "paths": [str(folder / item.case.name / item.path) for item in mine],
        "bytes": str(place / "bytes"),
        "answer": str(place / "answer.json"),
    }
    (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
    try:
        environments.prepare(reader.environment).run(place / "job.json", _SECONDS)
    except (OSError, RuntimeError) as error:
        return str(error)
    answer: Answer = json.loads((place / "answer.json").read_text(encoding="utf-8"))
    return mine, place, answer


def _judge(reader: Reader, answers: Answers, matrix: Matrix) -> None:
    """Count what a reader read."""
    if isinstance(answers, str):
        matrix.findings.append(f"{reader.name}: {answers}")
        return
    items, place, answer = answers
    matrix.versions[reader.name] = answer["versions"]
    with open(place / "bytes", "rb") as file:
        for item, read in zip(items, answer["reads"], strict=True):
            difference = compare(item, read, file.read(nbytes(read)))
            where = f"{reader.name}: {item.case.name}/{item.path}"
            limits = [limit for limit in LIMITS if limit.holds(reader, answer["versions"], item)]
            met = [limit for limit in limits if difference and limit.shows(item, difference)]
            cell = matrix.cells.setdefault(
                (reader.name, form(item), item.case.dtype.str, item.case.situation), Counter()
            )
            sure = [limit for limit in limits if limit.sure]
            if difference is None and sure:
                matrix.findings.append(f"{where}: is equal, though limit {sure[0].key!r} holds for it")
            elif difference is None:
                cell[EQUAL] += 1
            elif met:
                cell[met[0].key] += 1
            else:
                matrix.findings.append(f"{where}: {difference.text}")
    shutil.rmtree(place)


def unmet(matrix: Matrix) -> list[str]:
    """Return the keys of limits that no read has met, of which there is no evidence."""
    met = {key for cell in matrix.cells.values() for key in cell}
    return [limit.key for limit in LIMITS if limit.key not in met]
