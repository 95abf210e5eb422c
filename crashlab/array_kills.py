"""Array kills: a process that fills an array is ended by ``kill -9`` at random, and the next one goes on to the end.

A child creates or opens an array, fills its blocks in threads, flushes, publishes, rewrites and closes. It is killed at
a random instant of a chosen phase, or just before a random one of the calls to the system that the phase makes, for
what lies between two of these is over in microseconds. At the end the folder holds the very bytes of a run that nobody
interrupted, and nothing else. Meanwhile every block that was acknowledged is written, and nobody fills it again.

Acknowledged is a block that a writer has left, or that says itself that it is written; durable, what was written before
a flush or a publication that has returned. Some children begin a new boot, after which only that must be there. Blocks
are numbered in C order of the array's grid. Each attempt at a block must find the fill value, and leaves garbage
everywhere first; a third of the blocks keep the fill value in one half.

Examples
--------
>>> truth = Truth()
>>> for line in ("w 5", "w 7", "d 7", "b 5"):
...     truth.hear(line.split(), "here")
>>> truth.due, truth.findings
({5: False, 7: True}, ['here: block 5 is filled, which was acknowledged before'])
"""

import contextlib
import os
import random
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import blockstore as bs
from blockstore import _os
from crashlab.faulty import lower_thresholds
from crashlab.truth import BOOT, Child, boot_restored, fork, say_nothing

PHASES = ("creation", "opening", "filling", "flushing", "publishing", "closing", "rewriting")

_THREADS = 3
_MAX_DELAY = 0.05
"""Seconds after which every phase is surely over."""
_LIVES = 60
"""Kills after which an array should long be complete."""


@dataclass(frozen=True, slots=True)
class Case:
    """An array to fill."""

    name: str
    file: str
    options: dict[str, Any]
    """As `blockstore.create_array` takes them."""


CASES = (
    Case("npy", "x.npy", {"shape": (122, 60), "dtype": "f8", "chunks": (5, 60)}),
    Case("npy of blocks within rows", "x.npy", {"shape": (3, 40, 50), "dtype": ">i4", "chunks": (1, 7, 50)}),
    Case("one file", "x.zarr", {"shape": (122, 60), "dtype": "i4", "chunks": (5, 60), "fill_value": -1}),
    Case("one file of tiles", "x.zarr", {"shape": (70, 90), "dtype": "i4", "chunks": (16, 25), "fill_value": -1}),
    Case(
        "several files of tiles",
        "x.zarr",
        {"shape": (100, 90), "dtype": "i2", "chunks": (16, 25), "shards": (48, 50), "fill_value": 7},
    ),
    Case(
        "several files with journals",
        "x.zarr",
        {
            "shape": (122, 60),
            "dtype": "f4",
            "chunks": (5, 60),
            "shards": (20, 60),
            "fill_value": np.nan,
            "checksum": "crc32",
            "keep_journal": True,
        },
    ),
)
"""Blocks that divide nothing, fill values that are not zero, and one of everything that has its own way to publish."""


@dataclass(frozen=True, slots=True)
class Report:
    """What random kills of filling processes found. `str` is one line."""

    acknowledged: int
    """Blocks that were acknowledged before a kill, and due after it."""
    lost: int
    """Of these, the ones that were not written any more."""
    false: int
    """Blocks that were written without having been begun, or with other values."""
    twice: int
    """Blocks that were filled again after they had been acknowledged."""
    points: dict[str, int]
    """Kills that hit each phase."""
    calls: int
    """Of these, the ones before a chosen call to the system."""
    resets: int
    """Openings where only what was durable was due."""
    completed: int
    """Arrays that were filled to the end in spite of the kills, and equal the uninterrupted run byte for byte."""
    seeds: tuple[int, ...]
    findings: tuple[str, ...]
    """What was found, in words; with whatever else went wrong."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not (self.lost or self.false or self.twice or self.findings)

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {self.points.get(name, 0)}" for name in PHASES)
        return (
            f"array kills: {self.lost} lost of {self.acknowledged} acknowledged, {self.false} false, {self.twice} "
            f"filled twice, {sum(self.points.values())} points ({phases}; {self.calls} before a chosen call), "
            f"{self.resets} opened after a reset, {self.completed} arrays completed as uninterrupted, "
            f"{len(self.findings)} findings, seeds {', '.join(map(str, self.seeds))}"
        )


@dataclass(slots=True)
class Truth:
    """What an array must and may hold, and what was found wrong with it."""

    due: dict[int, bool] = field(default_factory=dict)
    """The blocks that must be written, and whether they were called durable."""
    begun: set[int] = field(default_factory=set)
    """Blocks that may be written: somebody has begun, and was not seen to end."""
    acknowledged: int = 0
    lost: int = 0
    false: int = 0
    twice: int = 0
    findings: list[str] = field(default_factory=list)

    def hear(self, words: Sequence[str], where: str) -> None:
        """Take a line of a child into account.

        ``b block``: it is filled now. ``R block``: it is rewritten now. ``w block``: it is written. ``r block``: the
        attempt has raised, and is over. ``d blocks``: they are durable. ``o blocks``: these were written when the array
        was opened. ``v block``: it has other values than it should. ``x ...``: an error that should not be. Others are
        ignored.
        """
        kind = words[0]
        blocks = [int(word) for word in words[1:]] if kind in ("b", "R", "w", "r", "d", "o", "v") else []
        if kind == "b":
            if blocks[0] in self.due:
                self.twice += 1
                self.findings.append(f"{where}: block {blocks[0]} is filled, which was acknowledged before")
            self.begun.add(blocks[0])
        elif kind == "R":
            self.due.pop(blocks[0], None)
            self.begun.add(blocks[0])
        elif kind == "w":
            self.due.setdefault(blocks[0], False)
        elif kind == "r":
            self.begun.discard(blocks[0])
        elif kind == "d":
            self.due.update((block, True) for block in blocks if block in self.due)
        elif kind == "o":
            self._hold(set(blocks), where)
        elif kind == "v":
            self.false += 1
            self.findings.append(f"{where}: block {blocks[0]} is written, with other values")
        elif kind == "x":
            self.findings.append(f"{where}: {' '.join(words[1:])}")

    def reset(self) -> None:
        """Expect no more than what is durable."""
        self.begun |= self.due.keys()
        self.due = {block: True for block, durable in self.due.items() if durable}

    def _hold(self, written: set[int], where: str) -> None:
        self.acknowledged += len(self.due)
        for block in sorted(self.due.keys() - written):
            self.lost += 1
            what = "durable" if self.due[block] else "written"
            self.findings.append(f"{where}: block {block} was {what}, and is not any more")
        for block in sorted(written - self.due.keys() - self.begun):
            self.false += 1
            self.findings.append(f"{where}: block {block} is written, which nobody has begun")
        self.due = {block: self.due.get(block, False) for block in written}
        self.begun = set()


class _DoomedError(Exception):
    """Ends an attempt at a block, with garbage in it."""


def rows_of(number: int, shape: tuple[int, ...]) -> int:
    """Return how many of its first rows are put into a block; the others keep the fill value."""
    return (shape[0] + 1) // 2 if number % 3 == 1 else shape[0]


def content(case: Case, seed: int) -> NDArray[Any]:
    """Return all values that the array of a case has in the end."""
    shape, chunks = case.options["shape"], case.options["chunks"]
    values = (np.arange(np.prod(shape)) * 37 + seed * 31) % 30_000 + 10
    a = values.astype(case.options["dtype"]).reshape(shape)
    counts = [-(-n // chunk) for n, chunk in zip(shape, chunks, strict=True)]
    for number, index in enumerate(np.ndindex(*counts)):
        block = a[tuple(slice(i * chunk, (i + 1) * chunk) for i, chunk in zip(index, chunks, strict=True))]
        block[rows_of(number, block.shape) :] = case.options.get("fill_value", 0)
    return a


class Filler:
    """The process that is killed: works on one array, and says what it does.

    Besides the lines that `Truth` takes it says ``p phase`` where a phase begins, ``c`` when the array is created, and
    ``e`` at the end.
    """

    def __init__(self, path: str, case: Case, seed: int, life: int, say: Callable[..., None], call: int | None) -> None:
        self._path, self._case, self._seed, self._say, self._call = path, case, seed, say, call
        self._random = random.Random(f"{seed} {life}")
        self._content = content(case, seed)
        self._told: dict[int, bool] = {}
        self._lock = threading.Lock()

    def live(self, phase: str, *, created: bool) -> None:
        """Do what leads to `phase`, then that, then close."""
        self._live(phase, created)
        self._say("e")

    def _live(self, phase: str, created: bool) -> None:
        self._phase(phase, "opening" if created else "creation")
        x = self._opened(phase) if created else self._created(phase)
        with x:
            if x.chunks != self._case.options["chunks"]:
                self._work_on_whole(x, phase)
                self._phase(phase, "closing")
                return
            self._told = dict.fromkeys(np.flatnonzero(x.written.ravel()).tolist(), True)
            self._say("o", *self._told)
            self._check(x)
            if phase in ("opening", "creation"):
                self._say("p", "opened")
            todo = [block for block in x.blocks if self._number(x, block) not in self._told]
            if phase == "flushing":
                self._by_turns(x, todo, phase, x.flush)
            elif phase == "publishing":
                self._by_turns(x, todo, phase, lambda: x.publish(partial=True))
            elif phase == "rewriting":
                self._fill_in_threads(x, todo)
                self._phase(phase, phase)
                for _ in range(3):
                    self._rewrite(x)
            else:
                if phase == "closing" and self._random.random() < 0.6:
                    todo = todo[: self._random.choice((0, self._random.randrange(len(todo) + 1)))]
                if phase == "filling":
                    self._phase(phase, phase)
                if len(todo) == len(self._pending(x)) and self._random.random() < 0.5:
                    self._fill(x)
                else:
                    self._fill_in_threads(x, todo)
            self._phase(phase, "closing")

    # -- coming to the array ----------------------------------------------------------------------------

    def _phase(self, wanted: str, phase: str) -> None:
        """Say that a phase begins; from here on the calls are counted of the one that is wanted."""
        self._say("p", phase)
        if phase == wanted and self._call is not None:
            _die_before(self._call)
            self._call = None

    def _options(self) -> dict[str, Any]:
        return {
            "access": self._random.choice((None, "dense", "dense", "sparse")),
            "guard": self._random.choice(("flag", "flag", "seal")),
        }

    def _opened(self, phase: str) -> bs.BlockArray:
        return bs.open_array(self._path, **self._options())

    def _created(self, phase: str) -> bs.BlockArray:
        """Create the array, unless that was begun before: whoever asks with the fingerprint gets that, or an error."""
        fingerprint = {"seed": self._seed, "case": self._case.name}
        try:
            x = bs.open_array(self._path, fingerprint=fingerprint, **self._options())
        except (FileNotFoundError, bs.FingerprintError, bs.FingerprintWarning):
            reserve = self._random.random() < 0.5
            x = bs.create_array(
                self._path,
                **self._case.options,
                **self._options(),
                fingerprint=fingerprint,
                overwrite=True,
                reserve=reserve,
            )
        self._say("c")
        return x

    def _check(self, x: bs.BlockArray) -> None:
        for block in x.blocks:
            number = self._number(x, block)
            if number in self._told:
                values = self._content[block.slices]
                if not _equal(block.read(), values) or not _equal(x[block.slices], values):
                    self._say("v", number)

    def _number(self, x: bs.BlockArray, block: bs.Block) -> int:
        return int(np.ravel_multi_index(block.index, x.blocks.shape))

    def _pending(self, x: bs.BlockArray) -> list[bs.Block]:
        return list(x.pending())

    # -- working on it ----------------------------------------------------------------------------------

    def _put(self, a: NDArray[Any], number: int, x: bs.BlockArray, block: bs.Block) -> None:
        """Make one attempt at a block, which may be doomed."""
        self._say("b", number)
        if not _equal(a, np.full(a.shape, x.fill_value, a.dtype)):
            self._say("x", f"block {number} is lent with something else than the fill value in it")
        rows, values = rows_of(number, a.shape), self._content[block.slices]
        with self._lock:
            doomed = self._random.random() < 0.2
        if doomed:
            a[...] = -9
            time.sleep(0.001)  # waits for nothing: garbage is there for long enough to be killed
            self._say("r", number)
            raise _DoomedError
        a[:rows] = -8
        a[:rows] = values[:rows]

    def _acknowledge(self, x: bs.BlockArray) -> None:
        """Say of what is written that it is: it says so itself."""
        for number in [number for number, said in self._told.copy().items() if not said]:
            if x.blocks[tuple(map(int, np.unravel_index(number, x.blocks.shape)))].written:
                self._say("w", number)
                self._told[number] = True

    def _fill(self, x: bs.BlockArray) -> None:
        """Let the library drive."""

        def func(a: NDArray[Any], block: bs.Block) -> None:
            self._acknowledge(x)
            number = self._number(x, block)
            self._put(a, number, x, block)
            self._told[number] = False

        while self._pending(x):
            try:
                x.fill(func, workers=_THREADS, flush_every=self._random.choice((None, 0.0, 0.002)))
            except bs.FillError as error:
                if not all(isinstance(each, _DoomedError) for each in error.exceptions):
                    raise
            self._acknowledge(x)
            self._say("d", *(number for number, said in self._told.items() if said))

    def _fill_in_threads(self, x: bs.BlockArray, blocks: Sequence[bs.Block]) -> None:
        """Drive threads that enter and leave writers."""
        _together(lambda thread: self._fill_all(x, blocks[thread::_THREADS]))

    def _fill_all(self, x: bs.BlockArray, blocks: Sequence[bs.Block]) -> None:
        for block in blocks:
            number = self._number(x, block)
            while number not in self._told:
                try:
                    with block.writer() as a:
                        self._put(a, number, x, block)
                except (_DoomedError, bs.WriterBusyError):
                    continue  # the file may just be being published
                self._say("w", number)
                self._told[number] = True

    def _by_turns(
        self, x: bs.BlockArray, blocks: Sequence[bs.Block], phase: str, make_durable: Callable[[], Any]
    ) -> None:
        """Fill some blocks, and make them durable, while others may go on."""
        beside = self._random.random() < 0.5
        mine = blocks[: len(blocks) // 2] if beside else blocks
        others = blocks[len(mine) :]
        step = max(len(mine) // 4, 1)
        parts = [mine[at : at + step] for at in range(0, len(mine), step)] or [[]]

        def drive(thread: int) -> None:
            if thread:
                self._fill_all(x, others)
                return
            for turn, part in enumerate(parts):
                self._fill_all(x, part)
                said = [number for number, written in self._told.copy().items() if written]
                if turn == 0:
                    self._phase(phase, phase)
                try:
                    make_durable()
                except (bs.WriterBusyError, bs.NotWrittenError):
                    continue  # somebody is writing, or a rewrite was killed, and readers would lose a block
                self._say("d", *said)

        _together(drive, 2)

    def _rewrite(self, x: bs.BlockArray) -> None:
        """Write some blocks again, with what they hold, and publish that or not."""
        blocks = self._random.sample(list(x.blocks), 4)

        def again(thread: int) -> None:
            for block in blocks[thread::_THREADS]:
                number = self._number(x, block)
                self._say("R", number)
                with block.writer(rewrite=True) as a:
                    a[...] = -7
                    a[...] = self._content[block.slices]
                self._say("w", number)

        _together(again)
        if self._random.random() < 0.5:
            said = list(self._told)
            x.publish()
            self._say("d", *said)

    def _work_on_whole(self, x: bs.BlockArray, phase: str) -> None:
        """Work on an ``.npy`` that was finished, which forgets its blocks: it is one, of all values."""
        every = range(
            int(np.prod([-(-n // chunk) for n, chunk in zip(x.shape, self._case.options["chunks"], strict=True)]))
        )
        block = next(iter(x.blocks))
        written = bool(x.written.all())
        self._say("o", *every if written else ())
        if written and not _equal(x[...], self._content):
            self._say("v", 0)
        if not written or phase == "rewriting":
            self._phase(phase, phase)
            for number in every:
                self._say("R", number)
            with block.writer(rewrite=True) as a:
                a[...] = -7
                a[...] = self._content
            for number in every:
                self._say("w", number)


def _die_before(count: int) -> None:
    """End this process by SIGKILL just before one of the next calls to the system that Python audits."""
    left = iter(range(count))

    def hook(event: str, arguments: object) -> None:
        if event == "open" or event.startswith(("os.", "mmap.", "fcntl.", "shutil.")):
            if event == "os.kill":
                return
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _together(step: Callable[[int], None], threads: int = _THREADS) -> None:
    def run(thread: int) -> None:
        try:
            step(thread)
        except BaseException as error:
            errors.append(error)

    errors: list[BaseException] = []
    running = [threading.Thread(target=run, args=(thread,)) for thread in range(threads)]
    for each in running:
        each.start()
    for each in running:
        each.join()
    if errors:
        raise errors[0]


class Siege:
    """Arrays that are killed again and again, for one seed.

    Parameters
    ----------
    folder : Path
        Empty, on a real disk.
    seed : int
        Drives all that is random but the scheduling of the system.
    cases : sequence of Case
        Taken by turns.
    sabotage : callable, optional
        Called in each child before it begins, to break blockstore there and see that it is noticed.
    """

    def __init__(
        self, folder: Path, seed: int, cases: Sequence[Case] = CASES, sabotage: Callable[[], None] | None = None
    ) -> None:
        self.points: Counter[str] = Counter()
        self.calls = self.resets = self.completed = 0
        self.accounts: list[Truth] = []
        self._folder, self._seed, self._cases, self._sabotage = folder, seed, cases, sabotage
        self._random = random.Random(seed)
        self._lives = self._boots = 0
        self._delay = dict.fromkeys(PHASES, _MAX_DELAY / 10)  # learnt from hits and misses, as the next
        self._call = dict.fromkeys(PHASES, 20.0)
        self._expected: dict[str, dict[str, bytes]] = {}

    @property
    def failed(self) -> bool:
        """Whether anything was found."""
        return any(truth.findings for truth in self.accounts)

    def fill(self) -> Iterator[None]:
        """Kill those who fill one array, until it is complete, and compare it; yield after each kill."""
        case = self._cases[(self._seed + len(self.accounts)) % len(self._cases)]
        truth = Truth()
        self.accounts.append(truth)
        place = self._folder / "arrays"
        path = str(place / case.file)
        place.mkdir()
        if self._random.random() < 0.4:
            self._leave_another(path, case)
        created, phase = False, "creation"
        until = self._random.randrange(6, 16)
        for life in range(_LIVES):
            created = self._kill(phase, path, case, truth, created)
            yield
            if truth.findings:
                break
            if life >= until or not self._random.randrange(12):
                self._complete(path, case, truth, created)
                created = True
                if self._random.random() < 0.6 or truth.findings or life >= until:
                    break
            phase = self._random.choice(PHASES[1:] if created else ("creation", *PHASES[2:]))
        else:
            self._complete(path, case, truth, created)
        shutil.rmtree(place)

    def _leave_another(self, path: str, case: Case) -> None:
        """Leave an array of other values, finished or not, for a creation to overwrite."""
        with contextlib.suppress(_DoomedError), bs.create_array(path, **{**case.options, "keep_journal": False}) as x:
            x[...] = 3
            if self._random.random() < 0.5:
                x.publish()
                x[: x.chunks[0]] = 4
                raise _DoomedError

    def _complete(self, path: str, case: Case, truth: Truth, created: bool) -> None:
        """Go on to the end, and compare with the uninterrupted run."""
        if case.name not in self._expected:
            place = self._folder / "uninterrupted"
            place.mkdir()
            child = self._child("closed", str(place / case.file), case, False, None, broken=False)
            self._end(child, alone := Truth(), "uninterrupted")
            self._expected[case.name] = files = _files(place)
            hidden = [f"uninterrupted, {case.name}: {name} is left over" for name in files if "/." in f"/{name}"]
            truth.findings += alone.findings + hidden
            shutil.rmtree(place)
        self._end(self._child("closed", path, case, created, None), truth, "complete")
        expected, found = self._expected[case.name], _files(Path(path).parent)
        different = sorted(expected.keys() ^ found.keys())
        for name in [name for name in different if str(Path(name).parent) not in different]:
            what = "left over" if name in found else "not there"
            truth.findings.append(f"{self._where(case, 'complete')}: {name} is {what}")
        for name in sorted(expected.keys() & found.keys()):
            if expected[name] != found[name]:
                truth.findings.append(f"{self._where(case, 'complete')}: {name} has other bytes than uninterrupted")
        if not truth.findings and case.options.get("keep_journal"):
            with bs.open_array(path, mode="r") as x:
                if wrong := x.verify().tolist():
                    truth.findings.append(f"{self._where(case, 'complete')}: wrong checksums of {wrong}")
        self.completed += not truth.findings

    def _end(self, child: Child, truth: Truth, what: str) -> None:
        child.end()
        for line in child.lines:
            truth.hear(line, f"life {self._lives}, {what}")
        if ["e"] not in child.lines:
            truth.findings.append(f"life {self._lives}, {what}: did not come to its end")

    def _kill(self, phase: str, path: str, case: Case, truth: Truth, created: bool) -> bool:
        """Start a child, and kill it in `phase`; return whether the array is created for good."""
        if reset := created and self._random.random() < 0.15:
            self._boots += 1
            self.resets += 1
            os.environ[BOOT] = f"crashlab-{self._seed}-{self._boots}"
            truth.reset()
        call = self._random.randrange(int(self._call[phase]) + 1) if self._random.random() < 0.5 else None
        child = self._child(phase, path, case, created, call)
        if call is None:
            child.hear(until=lambda line: line in (["p", phase], ["e"]) or line[0] == "x")
            if phase in ("filling", "rewriting"):
                child.hear_lines(self._random.randrange(40))
            time.sleep(self._random.random() * self._delay[phase])  # waits for nothing: this is the random instant
            status = child.end(signal.SIGKILL)
        else:
            status = child.end()
        point = next((line[1] for line in reversed(child.lines) if line[0] == "p"), "")
        where = self._where(case, f"{phase}, point {point}{' after a reset' if reset else ''}")
        for line in child.lines:
            truth.hear(line, where)
        killed = os.WIFSIGNALED(status) and ["e"] not in child.lines
        hit = killed and point == phase
        limits, most = (self._delay, _MAX_DELAY) if call is None else (self._call, 200.0)
        limits[phase] = max(min(limits[phase] * (1.1 if hit else 0.8), most), most / 100)
        if killed:
            self.points["opening" if point == "opened" else point] += 1
            self.calls += call is not None
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
            truth.findings.append(f"{where}: signal {os.WTERMSIG(status)}")
        return created or ["c"] in child.lines

    def _child(
        self, phase: str, path: str, case: Case, created: bool, call: int | None, *, broken: bool = True
    ) -> Child:
        self._lives += 1

        def main(say: Callable[..., None]) -> None:
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", bs.FileSystemWarning)
            lower_thresholds()
            if self._sabotage is not None and broken:
                self._sabotage()
            Filler(path, case, self._seed, self._lives, say, call).live(phase, created=created)

        return fork(main)

    def _where(self, case: Case, what: str) -> str:
        return f"seed {self._seed}, {case.name}, life {self._lives}, {what}"


def _files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file below a folder; of a journal no more than that it is there.

    Where a new file must have a name from the start, that of one which a kill has interrupted stays, and is left out.
    """
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if not (_os.PORTABLE and path.match(".blockstore-*.tmp")):
            found[name] = b"" if path.is_dir() or _is_journal(name) else path.read_bytes()
    return found


def _is_journal(name: str) -> bool:
    return name.endswith(".journal")


def run(
    folder: Path,
    *,
    kills: int = 200,
    seeds: Sequence[int] = (0, 1),
    cases: Sequence[Case] = CASES,
    progress: Callable[[str], None] = say_nothing,
    sabotage: Callable[[], None] | None = None,
) -> Report:
    """Kill those who fill arrays at `kills` points or some more, shared out among the seeds, in an empty folder.

    The folder is on a real disk. With `sabotage`, which is called in each child first, it ends with the first finding.
    """
    points: Counter[str] = Counter()
    accounts: list[Truth] = []
    calls = resets = completed = 0
    with boot_restored():
        for number, seed in enumerate(seeds):
            siege = Siege(folder, seed, cases, sabotage)
            share = kills * (number + 1) // len(seeds) - kills * number // len(seeds)
            while siege.points.total() < share and not (sabotage and siege.failed):
                for _ in siege.fill():
                    progress(f"array kills: {points.total() + siege.points.total()} of {kills}")
            points += siege.points
            accounts += siege.accounts
            calls += siege.calls
            resets += siege.resets
            completed += siege.completed
    return Report(
        acknowledged=sum(truth.acknowledged for truth in accounts),
        lost=sum(truth.lost for truth in accounts),
        false=sum(truth.false for truth in accounts),
        twice=sum(truth.twice for truth in accounts),
        points=dict(points),
        calls=calls,
        resets=resets,
        completed=completed,
        seeds=tuple(seeds),
        findings=tuple(text for truth in accounts for text in truth.findings),
    )
