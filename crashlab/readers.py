"""Readers: processes that poll an array while others fill, publish and rewrite it, are killed, and go on.

Each reader is a process of its own, ``python -m crashlab.readers zarr`` say, that is told on its standard input which
array to watch, and reads it with zarr-python, tensorstore or NumPy all the time: whole and block by block, opened
anew each time and kept open. Of each value that it ever gets it expects what is final or the fill value; of a block,
all or nothing; of what it has seen once, that it stays; of a file that it holds open, that no byte of it changes; and
no error, ever. Writers fill each block with garbage first, and rewrite what is published with what it holds.

A plant breaks blockstore in the writers; the readers must notice each.

Examples
--------
>>> watch = Watch(Scene("tiles", "x.zarr", (4, 6), (2, 3)), seed=0)
>>> a = watch.final.copy()
>>> watch.see("a read", a, (slice(0, 4), slice(0, 6)))
>>> a[0, 0] = -1
>>> watch.see("a read", a, (slice(0, 4), slice(0, 6)))
>>> watch.findings[0]
'a read: 1 values were seen before, and are the fill value now: the first at [0, 0]'
"""

import contextlib
import importlib
import importlib.util
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

import blockstore as bs
from crashlab.truth import Child, fork, say_nothing

KINDS = ("zarr", "tensorstore", "numpy")

_LIVES = 12
"""Writers of one array that come before the one that completes it, at most."""
_THREADS = 2
_DELAY = 0.04
"""Seconds in which a writer is killed."""
_PAUSE = 0.001
"""Seconds between two reads, so that whoever writes gets a processor, too."""
_SECONDS = 60
"""Seconds after which a reader should long have answered."""
_FINDINGS = 5
"""What a reader tells of one array; more would be more of the same."""


@dataclass(frozen=True, slots=True)
class Scene:
    """An array to fill and to watch; of int32."""

    name: str
    file: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None = None

    @property
    def is_npy(self) -> bool:
        """Whether it is an ``.npy`` file, which NumPy alone reads."""
        return self.file.endswith(".npy")

    @property
    def fill_value(self) -> int:
        """What is read where nothing is written: nothing that a hole in a file holds, where a format can say so."""
        return 0 if self.is_npy else -1


SCENES = (
    Scene("one file that is an .npy at last", "x.zarr", (90, 64), (6, 64)),
    Scene("one file of tiles", "x.zarr", (70, 90), (16, 25)),
    Scene("several files of tiles", "x.zarr", (100, 90), (16, 25), (48, 50)),
    Scene("several files, each an .npy at last", "x.zarr", (90, 64), (4, 64), (16, 64)),
    Scene(".npy", "x.npy", (90, 64), (6, 64)),
)
"""What has its own way to be published or to be read."""


def content(scene: Scene, seed: int) -> NDArray[np.int32]:
    """Return all values that an array has in the end: above 0, and garbage is below -1."""
    values = (np.arange(np.prod(scene.shape), dtype=np.int64) * 2654435761 + seed * 40503) % (1 << 30) + 1
    return values.astype(np.int32).reshape(scene.shape)


def block_slices(scene: Scene) -> list[tuple[slice, ...]]:
    """Return where each block lies, in C order."""
    counts = [-(-n // chunk) for n, chunk in zip(scene.shape, scene.chunks, strict=True)]
    return [
        tuple(
            slice(i * chunk, min((i + 1) * chunk, n))
            for i, chunk, n in zip(index, scene.chunks, scene.shape, strict=True)
        )
        for index in np.ndindex(*counts)
    ]


# -- those who read -----------------------------------------------------------------------------------


class Watch:
    """What a reader has seen of one array, and what it found odd."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self.final = content(scene, seed)
        self.findings: list[str] = []
        self.reads = self.between = 0
        self.blocks = block_slices(scene)
        self._fill_value = scene.fill_value
        self._seen = np.zeros(scene.shape, np.bool_)
        self._block_of = np.zeros(scene.shape, np.intp)
        for number, where in enumerate(self.blocks):
            self._block_of[where] = number
        self._size_of = np.bincount(self._block_of.ravel())

    def see(self, how: str, found: NDArray[Any], where: tuple[slice, ...]) -> None:
        """Take what was read of a part of the array, which is all of it or a block."""
        self.reads += 1
        final, seen = self.final[where], self._seen[where]
        if found.shape != final.shape or found.dtype != final.dtype:
            self.find(f"{how}: got {found.shape} of {found.dtype}")
            return
        is_final, is_fill = found == final, found == self._fill_value
        if not np.all(is_final | is_fill):
            at = np.argwhere(~(is_final | is_fill))
            self.find(f"{how}: {len(at)} values are neither final nor fill: {found[tuple(at[0])]} {_at(at, where)}")
        if np.any(seen & is_fill):
            at = np.argwhere(seen & is_fill)
            self.find(f"{how}: {len(at)} values were seen before, and are the fill value now: {_at(at, where)}")
        per_block = np.bincount(self._block_of[where][is_final], minlength=len(self._size_of))
        if torn := np.flatnonzero((per_block != 0) & (per_block != self._size_of)).tolist():
            self.find(f"{how}: blocks {torn} are there in part")
        self.between += bool(is_final.any() and not is_final.all())
        seen |= is_final

    def find(self, text: str) -> None:
        """Note what is odd."""
        if len(self.findings) < _FINDINGS:
            self.findings.append(text)


def _at(places: NDArray[np.intp], where: tuple[slice, ...]) -> str:
    first = [int(i) + part.start for i, part in zip(places[0], where, strict=True)]
    return f"the first at {first}"


class _Reader:
    """Reads one array in several ways."""

    def __init__(self, path: str, scene: Scene, seed: int) -> None:
        self.watch = Watch(scene, seed)
        self._path, self._scene = path, scene
        self._is_there = False
        self._whole = tuple(slice(0, n) for n in scene.shape)
        self._random = random.Random(f"{seed} {type(self).__name__}")

    def ways(self) -> Sequence[tuple[str, Callable[[], None]]]:
        """Return each way to read once, with its name."""
        raise NotImplementedError

    def step(self, ways: Sequence[tuple[str, Callable[[], None]]]) -> None:
        """Read in these ways; once the array is there, it has to be."""
        if not self._is_there:
            if not os.path.exists(self._path):
                return
            self._is_there = True
        for name, read in ways:
            try:
                read()
            except Exception as error:
                frames = traceback.extract_tb(error.__traceback__)
                at = ", ".join(f"{frame.name}:{frame.lineno}" for frame in frames[-3:])
                self.watch.find(f"{name}: {type(error).__name__}: {str(error)[:300]} ({at})")

    def one(self) -> None:
        """Read in one way."""
        self.step([self._random.choice(self.ways())])

    def every(self) -> None:
        """Read in every way."""
        self.step(self.ways())

    def _read(self, how: str, a: Any, *, whole: bool) -> None:
        """Read an array that slices, whole or in a block."""
        where = self._whole if whole else self._random.choice(self.watch.blocks)
        self.watch.see(f"{how}, {'whole' if whole else 'a block'}", np.asarray(a[where]), where)


class _ZarrReader(_Reader):
    def __init__(self, path: str, scene: Scene, seed: int) -> None:
        super().__init__(path, scene, seed)
        self._zarr: Any = importlib.import_module("zarr")
        self._kept: Any = None

    def ways(self) -> Sequence[tuple[str, Callable[[], None]]]:
        return [
            (f"zarr-python, {opened}, {part}", lambda opened=opened, part=part: self._once(opened, part))  # type: ignore[misc]
            for opened in ("opened anew", "kept open")
            for part in ("whole", "a block")
        ]

    def _once(self, opened: str, part: str) -> None:
        if opened == "opened anew" or self._kept is None:
            a = self._zarr.open_array(self._path, mode="r")
            self._kept = a if self._kept is None else self._kept
        else:
            a = self._kept
        self._read(f"zarr-python, {opened}", a, whole=part == "whole")


class _TensorStoreReader(_Reader):
    def __init__(self, path: str, scene: Scene, seed: int) -> None:
        super().__init__(path, scene, seed)
        self._tensorstore: Any = importlib.import_module("tensorstore")
        self._kept: Any = None

    def ways(self) -> Sequence[tuple[str, Callable[[], None]]]:
        return [
            (f"tensorstore, {opened}, {part}", lambda opened=opened, part=part: self._once(opened, part))  # type: ignore[misc]
            for opened in ("opened anew", "kept open")
            for part in ("whole", "a block")
        ]

    def _open(self) -> Any:
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": self._path + "/"},
            "recheck_cached_data": True,
            "recheck_cached_metadata": True,
        }
        context = self._tensorstore.Context({"cache_pool": {"total_bytes_limit": 1 << 24}})
        return self._tensorstore.open(spec, context=context, open=True, read=True).result()

    def _once(self, opened: str, part: str) -> None:
        if opened == "opened anew" or self._kept is None:
            a = self._open()
            self._kept = a if self._kept is None else self._kept
        else:
            a = self._kept
        where = self._whole if part == "whole" else self._random.choice(self.watch.blocks)
        self.watch.see(f"tensorstore, {opened}, {part}", a[where].read().result(), where)


class _NumPyReader(_Reader):
    """Reads each file that is an ``.npy``; and holds files, of which no byte may change."""

    def __init__(self, path: str, scene: Scene, seed: int) -> None:
        super().__init__(path, scene, seed)
        shards = scene.shards or tuple(
            -(-n // chunk) * chunk for n, chunk in zip(scene.shape, scene.chunks, strict=True)
        )
        self._files: dict[str, tuple[slice, ...]] = {}
        for index in np.ndindex(*(-(-n // shard) for n, shard in zip(scene.shape, shards, strict=True))):
            file = path if scene.is_npy else os.path.join(path, "c", *map(str, index))
            self._files[file] = tuple(
                slice(i * shard, min((i + 1) * shard, n))
                for i, shard, n in zip(index, shards, scene.shape, strict=True)
            )
        self._there: set[str] = set()
        self._npy: set[str] = set()
        self._held: dict[tuple[str, int], tuple[Any, bytes]] = {}

    def ways(self) -> Sequence[tuple[str, Callable[[], None]]]:
        return [
            ("numpy, mapped", lambda: self._load("r")),
            ("numpy, loaded", lambda: self._load(None)),
            ("numpy, files that are held", self._hold),
        ]

    def _load(self, mode: Any) -> None:
        for file, where in self._files.items():
            try:
                with open(file, "rb") as opened:
                    is_npy = opened.read(6) == b"\x93NUMPY"
            except FileNotFoundError:
                if file in self._there:
                    raise
                continue
            self._there.add(file)
            if is_npy or file in self._npy:
                self._npy.add(file)
                self.watch.see(f"numpy, {'mapped' if mode else 'loaded'}", np.load(file, mmap_mode=mode), where)

    def _hold(self) -> None:
        for file in self._files:
            try:
                with open(file, "rb") as opened:
                    key = file, os.fstat(opened.fileno()).st_ino
                    if key not in self._held:
                        held = np.memmap(opened, np.uint8, "r")
                        self._held[key] = held, held.tobytes()
            except FileNotFoundError:
                if file in self._there:
                    raise
        for (file, _), (held, before) in list(self._held.items())[-20:]:
            if held.tobytes() != before:
                self.watch.find(
                    f"numpy: bytes of {os.path.relpath(file, self._path)} have changed in the published file"
                )


_READERS: dict[str, type[_Reader]] = {"zarr": _ZarrReader, "tensorstore": _TensorStoreReader, "numpy": _NumPyReader}


def serve(kind: str, commands: IO[str], answers: IO[str]) -> None:
    """Do as told, line by line, and poll meanwhile.

    Each command is answered before the next one is sent, so that none waits in a buffer where `select` does not see it.
    ``watch {...}`` begins with an array. ``every`` reads in every way, and ``stop`` does so for the last time: both
    answer with the counts and findings so far.
    """
    reader: _Reader | None = None
    importlib.import_module(kind)
    print("ready", file=answers, flush=True)
    while True:
        if reader is not None and not select.select([commands], [], [], _PAUSE)[0]:
            reader.one()
            continue
        command, _, text = commands.readline().strip().partition(" ")
        if not command:
            return
        if command == "watch":
            told = json.loads(text)
            parts: dict[str, Any] = {
                name: tuple(part) if isinstance(part, list) else part for name, part in told["scene"].items()
            }
            scene = Scene(**parts)
            reader = _READERS[kind](told["path"], scene, told["seed"])
            print("ready", file=answers, flush=True)
        elif reader is not None:
            reader.every()
            watch = reader.watch
            seen = {"reads": watch.reads, "between": watch.between, "findings": watch.findings}
            print(json.dumps(seen), file=answers, flush=True)
            reader = None if command == "stop" else reader


class _Process:
    """A reader, as its parent has it."""

    def __init__(self, kind: str) -> None:
        root = str(Path(__file__).parents[1])
        self.kind = kind
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "crashlab.readers", kind],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> None:
        """Wait until it is ready."""
        if self._answer() != "ready":
            raise RuntimeError(f"the reader {self.kind} does not answer")

    def watch(self, path: str, scene: Scene, seed: int) -> None:
        """Let it poll an array."""
        self._say(f"watch {json.dumps({'path': path, 'scene': asdict(scene), 'seed': seed})}")
        self.wait()

    def ask(self, command: str) -> dict[str, Any]:
        """Let it read in every way, and return what it has seen so far."""
        self._say(command)
        seen: dict[str, Any] = json.loads(
            self._answer() or '{"reads": 0, "between": 0, "findings": ["does not answer"]}'
        )
        return seen

    def end(self) -> None:
        """Let it end."""
        with contextlib.suppress(subprocess.TimeoutExpired, OSError):
            self._process.communicate(timeout=10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _say(self, text: str) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(text + "\n")
                self._process.stdin.flush()

    def _answer(self) -> str:
        """Return a line; an empty one if it has ended, or hangs."""
        answers = self._process.stdout
        if answers is None or not select.select([answers], [], [], _SECONDS)[0]:
            return ""
        return answers.readline().strip()


@contextlib.contextmanager
def _processes(kinds: Sequence[str]) -> Iterator[list[_Process]]:
    processes = [_Process(kind) for kind in kinds]
    try:
        for process in processes:
            process.wait()
        yield processes
    finally:
        for process in processes:
            process.end()


# -- those who write ----------------------------------------------------------------------------------


class Writer:
    """The process that is killed: fills, flushes, publishes, rewrites and closes at random.

    It says ``c`` when it has created or opened the array, ``p`` before each publication, and ``e`` at the end.
    """

    def __init__(self, path: str, scene: Scene, seed: int, life: int, say: Callable[..., None]) -> None:
        self._path, self._scene, self._say = path, scene, say
        self._random = random.Random(f"{seed} {life}")
        self._final = content(scene, seed)

    def live(self, *, complete: bool) -> None:
        """Work for a while; or, to `complete` it, until everything is written and published."""
        x = self._array()
        self._say("c")
        try:
            with x:
                if complete:
                    self._fill_rest(x)
                else:
                    for _ in range(self._random.randrange(2, 8)):
                        self._work(x)
                    if self._random.random() < 0.15:
                        raise _LeftError
        except _LeftError:
            pass  # what is written stays hidden
        self._say("e")

    def _array(self) -> bs.BlockArray:
        scene = self._scene
        try:
            return bs.open_array(self._path)
        except FileNotFoundError:
            return bs.create_array(
                self._path,
                shape=scene.shape,
                dtype=np.int32,
                chunks=scene.chunks,
                shards=scene.shards,
                fill_value=scene.fill_value,
            )

    def _work(self, x: bs.BlockArray) -> None:
        act = self._random.choice(("fill", "fill", "fill all", "flush", "publish", "publish", "rewrite"))
        if act == "fill":
            blocks = list(x.pending())
            self._fill(x, self._random.sample(blocks, min(len(blocks), self._random.randrange(1, 5))))
        elif act == "fill all" and self._random.random() < 0.3:
            self._fill_rest(x)
        elif act == "flush":
            x.flush()
        elif act == "publish":
            self._say("p")
            with contextlib.suppress(bs.NotWrittenError):  # a rewrite was killed, and readers would lose a block
                x.publish(partial=True)
        elif act == "rewrite":
            written = [block for block in x.blocks if block.written]
            self._fill(x, self._random.sample(written, min(len(written), 2)), rewrite=True)

    def _fill_rest(self, x: bs.BlockArray) -> None:
        def put(a: NDArray[Any], block: bs.Block) -> None:
            self._put(a, block)

        x.fill(put, workers=_THREADS, flush_every=0.01)

    def _fill(self, x: bs.BlockArray, blocks: Sequence[bs.Block], *, rewrite: bool = False) -> None:
        def run(thread: int) -> None:
            try:
                for block in blocks[thread::_THREADS]:
                    with block.writer(rewrite=rewrite) as a:
                        self._put(a, block)
            except BaseException as error:
                errors.append(error)

        errors: list[BaseException] = []
        threads = [threading.Thread(target=run, args=(thread,)) for thread in range(_THREADS)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        if errors:
            raise errors[0]

    def _put(self, a: NDArray[Any], block: bs.Block) -> None:
        a[...] = -2 - self._random.randrange(1000)
        time.sleep(self._random.random() * 0.002)  # waits for nothing: garbage is there for long enough to be seen
        a[...] = self._final[block.slices]


class _LeftError(Exception):
    """Ends a writer without a publication."""


# -- bugs to plant ------------------------------------------------------------------------------------
#
# They reach into the parts of blockstore that publish; what they need there is checked when they are planted.


def _in_place() -> None:
    """Go on in the published file itself, instead of a copy."""
    from blockstore import _os
    from blockstore.shard import Shard

    begin, nameless = Shard.begin, _os.nameless

    def begin_in_place(self: Shard, *args: Any, **options: Any) -> None:
        def published(directory: str) -> Any:
            name = os.path.join(directory, ".in-place.tmp")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            os.link(self.path, name)
            return contextlib.nullcontext((_os.File(os.open(name, os.O_RDWR)), name))

        if os.path.exists(self.path):
            self._announce()  # which makes a file as well
            setattr(_os, "nameless", _first_then(published, nameless))  # noqa: B010
        try:
            begin(self, *args, **options)
        finally:
            setattr(_os, "nameless", nameless)  # noqa: B010

    setattr(Shard, "begin", begin_in_place)  # noqa: B010


def _first_then(first: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter([first])
    return lambda *args, **options: next(calls, then)(*args, **options)


def _index_of_all() -> None:
    """Say of every block of a published file that it is there."""
    _wrap_in_publishing(
        "encode_index", lambda encode, layout, per_shard, written: encode(layout, per_shard, written | True)
    )


def _gone_before() -> None:
    """Remove the published file before the new one is given its name."""

    def rename(real: Callable[..., Any], shard: Any) -> Any:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(shard.path)
        time.sleep(0.002)
        return real(shard)

    _wrap_in_publishing("_rename", rename)


def _wrap_in_publishing(name: str, wrapper: Callable[..., Any]) -> None:
    module = importlib.import_module("blockstore.publishing")
    real = getattr(module, name)
    setattr(module, name, lambda *args: wrapper(real, *args))


PLANTS: dict[str, Callable[[], None]] = {
    "filled further in the published file": _in_place,
    "an index that says too much": _index_of_all,
    "removed before it is replaced": _gone_before,
}
"""Bugs to put into the writers on purpose."""


# -- the laboratory -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Report:
    """What readers saw. `str` is one line."""

    reads: dict[str, int]
    """Reads of each reader, each compared with all that may be seen."""
    between: dict[str, int]
    """Of these, the ones that saw an array in part."""
    arrays: int
    writers: int
    """Processes that have worked on these."""
    kills: int
    """Of these, the ones that were killed."""
    publications: int
    """Publications that were begun, beside those of a fill and of a close."""
    seeds: tuple[int, ...]
    plants: dict[str, str] = field(default_factory=dict)
    """Planted bugs that were caught, and how."""
    findings: tuple[str, ...] = ()
    """What was found, in words; among it planted bugs that were not."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found, but for what was planted."""
        return not self.findings

    def __str__(self) -> str:
        reads = ", ".join(f"{kind} {n} ({self.between.get(kind, 0)} in part)" for kind, n in self.reads.items())
        caught = "".join(f"  {plant}: caught: {how}\n" for plant, how in self.plants.items())
        planted = f"{len(self.plants)} planted bugs caught, " if self.plants else ""
        return (
            f"{caught}readers: {len(self.findings)} findings, {sum(self.reads.values())} reads ({reads}) of "
            f"{self.arrays} arrays, {self.writers} writers, {self.kills} of them killed, {self.publications} "
            f"publications, {planted}seeds {', '.join(map(str, self.seeds))}"
        )


class _Stage:
    """Where writers and readers meet, for one seed."""

    def __init__(
        self, folder: Path, seed: int, processes: Sequence[_Process], sabotage: Callable[[], None] | None
    ) -> None:
        self.reads: Counter[str] = Counter()
        self.between: Counter[str] = Counter()
        self.findings: list[str] = []
        self.arrays = self.writers = self.kills = self.publications = 0
        self._folder, self._seed, self._processes, self._sabotage = folder, seed, processes, sabotage
        self._random = random.Random(seed)

    def play(self, scene: Scene) -> None:
        """Fill one array, while all who can read it do; then rewrite it."""
        place = self._folder / f"{self.arrays}"
        place.mkdir()
        path = str(place / scene.file)
        self.arrays += 1
        seed = self._seed * 1000 + self.arrays
        watching = [process for process in self._processes if process.kind == "numpy" or not scene.is_npy]
        for process in watching:
            process.watch(path, scene, seed)
        before = len(self.findings)
        lives = self._random.randrange(_LIVES // 2, _LIVES + 1)
        for life in range(lives + 4):
            self._write(path, scene, seed, life, complete=life in (lives, lives + 3))
            seen = [process.ask("every") for process in watching]
            if len(self.findings) > before or any(each["findings"] for each in seen):
                break
        seen = [process.ask("stop") for process in watching]
        for process, each in zip(watching, seen, strict=True):
            self.reads[process.kind] += each["reads"]
            self.between[process.kind] += each["between"]
            self.findings += [f"seed {self._seed}, {scene.name}: {finding}" for finding in each["findings"]]
        if len(self.findings) == before and self._sabotage is None:
            self._compare(path, scene, seed)
        shutil.rmtree(place)

    def _write(self, path: str, scene: Scene, seed: int, life: int, *, complete: bool) -> None:
        """Let a process write, and kill it, or not."""

        def main(say: Callable[..., None]) -> None:
            warnings.simplefilter("ignore")
            if self._sabotage is not None:
                self._sabotage()
            Writer(path, scene, seed, life, say).live(complete=complete)

        child = fork(main)
        self.writers += 1
        if not complete and self._random.random() < 0.7:
            self._kill(child)
        else:
            child.end()
        self.publications += child.lines.count(["p"])
        if not self._sabotage:
            found = [" ".join(line[1:]) for line in child.lines if line[0] == "x"]
            self.findings += [f"seed {self._seed}, {scene.name}, writer {life}: {text}" for text in found]

    def _kill(self, child: Child) -> None:
        if self._random.random() < 0.5:
            child.hear(until=lambda line: line in (["p"], ["e"]) or line[0] == "x")
            time.sleep(self._random.random() * _DELAY / 10)  # waits for nothing: this is the random instant
        else:
            child.hear(until=lambda line: line in (["c"], ["e"]) or line[0] == "x")
            time.sleep(self._random.random() * _DELAY)
        child.end(signal.SIGKILL)
        self.kills += ["e"] not in child.lines

    def _compare(self, path: str, scene: Scene, seed: int) -> None:
        with bs.open_array(path, mode="r") as x:
            if not x.written.all() or not np.array_equal(x[...], content(scene, seed)):
                self.findings.append(f"seed {self._seed}, {scene.name}: it is not what it should be in the end")


def missing() -> list[str]:
    """Return what is not there of what the readers need."""
    lacks = [f"{kind} is not installed" for kind in KINDS if importlib.util.find_spec(kind) is None]
    return lacks if hasattr(os, "fork") else [*lacks, "there is no fork"]


def run(
    folder: Path,
    *,
    rounds: int = 6,
    seeds: Sequence[int] = (0, 1),
    scenes: Sequence[Scene] = SCENES,
    plants: Sequence[str] = (),
    kinds: Sequence[str] = KINDS,
    progress: Callable[[str], None] = say_nothing,
) -> Report:
    """Fill each scene `rounds` times, shared out among the seeds, while readers poll; then plant bugs.

    Parameters
    ----------
    folder : Path
        Empty, on a real disk.
    plants : sequence of str
        Names in `PLANTS`; each is put into writers until the readers notice, which they must within `rounds` of each
        scene.
    """
    with _processes(kinds) as processes:
        stages = [_Stage(folder, seed, processes, None) for seed in seeds]
        for number in range(rounds):
            for scene in scenes:
                progress(f"readers: round {number + 1} of {rounds}, {scene.name}")
                stages[number % len(stages)].play(scene)
        findings = [text for stage in stages for text in stage.findings]
        caught: dict[str, str] = {}
        for plant in plants:
            progress(f"readers: planting {plant}")
            stage = _Stage(folder, seeds[0], processes, PLANTS[plant])
            for scene in [*scenes] * rounds:
                if not stage.findings:
                    stage.play(scene)
            if stage.findings:
                caught[plant] = stage.findings[0]
            else:
                findings.append(f"{plant!r} was planted and not caught")
    return Report(
        reads={kind: sum(stage.reads[kind] for stage in stages) for kind in kinds},
        between={kind: sum(stage.between[kind] for stage in stages) for kind in kinds},
        arrays=sum(stage.arrays for stage in stages),
        writers=sum(stage.writers for stage in stages),
        kills=sum(stage.kills for stage in stages),
        publications=sum(stage.publications for stage in stages),
        seeds=tuple(seeds),
        plants=caught,
        findings=tuple(findings),
    )


if __name__ == "__main__":
    serve(sys.argv[1], sys.stdin, sys.stdout)
