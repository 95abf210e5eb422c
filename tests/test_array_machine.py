"""An array goes on where it was left, and a reader sees nothing but what was published, however its writer ends.

Two ways to try it. A state machine kills and resets writers between calls, and compares with dicts. Behind it, forked
processes are killed at every single call that changes names or files, inside creating, publishing and closing.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

import blockstore as bs
from blockstore import _disk, _os, creation, live, publishing, sidecar, working
from blockstore.draft import draft_of, working_of
from blockstore.files import Files
from blockstore.journal import Journal
from blockstore.layouts.npy import encode_header
from blockstore.ledger import Ledger
from blockstore.mapped import MappedFile
from blockstore.plan import Plan
from blockstore.records import REVOKED
from blockstore.shard import Shard

try:
    import zarr
except ImportError:  # it is no dependency: then only the reader below looks
    zarr = None

Index = tuple[int, ...]
Blocks = dict[Index, bytes]

BOOT = "BLOCKSTORE_BOOT_ID"
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
DTYPE = np.dtype("<i4")
GARBAGE = -1


# -- what there is to fill ----------------------------------------------------------------------------


class Kind(NamedTuple):
    """What an array is created with."""

    name: str
    shape: Index
    chunks: Index
    shards: Index | None = None

    @property
    def grid(self) -> Index:
        return tuple(-(-n // chunk) for n, chunk in zip(self.shape, self.chunks, strict=True))

    @property
    def blocks(self) -> list[Index]:
        return list(itertools.product(*map(range, self.grid)))

    @property
    def per_file(self) -> Index:
        if self.shards is None:
            return self.grid
        return tuple(shard // chunk for shard, chunk in zip(self.shards, self.chunks, strict=True))

    @property
    def files(self) -> list[Index]:
        return sorted({self.file_of(index) for index in self.blocks})

    def file_of(self, index: Index) -> Index:
        return tuple(i // per for i, per in zip(index, self.per_file, strict=True))

    def of_file(self, file: Index) -> list[Index]:
        return [index for index in self.blocks if self.file_of(index) == file]

    def slices(self, index: Index) -> tuple[slice, ...]:
        each = zip(index, self.chunks, self.shape, strict=True)
        return tuple(slice(i * chunk, min((i + 1) * chunk, n)) for i, chunk, n in each)

    def path_of(self, file: Index) -> str:
        """Return the final name of a file, from the folder that the array is in."""
        return self.name if self.name == "x.npy" else f"{self.name}/c/{'/'.join(map(str, file))}"

    def create(self, folder: Path, **options: Any) -> bs.BlockArray:
        shards = {} if self.shards is None else {"shards": self.shards}
        return bs.create_array(
            folder / self.name, shape=self.shape, dtype=DTYPE, chunks=self.chunks, **shards, **options
        )


KINDS = {
    "npy": Kind("x.npy", (7, 3), (2, 3)),
    "zarr of one regular file": Kind("x.zarr", (7, 3), (2, 3)),
    "zarr of one file": Kind("x.zarr", (5, 5), (2, 3)),
    "zarr of several files": Kind("x.zarr", (7, 5), (2, 3), (4, 3)),
}


def see(folder: Path, kind: Kind) -> dict[Index, Blocks]:
    """Return of each file that there is under its final name its blocks, read by a reader that has nothing of ours.

    An ``.npy`` has all of them.
    """
    seen: dict[Index, Blocks] = {}
    for file in kind.files:
        path = folder / kind.path_of(file)
        if not path.exists():
            continue
        if kind.name == "x.npy":
            a = np.load(path)
            assert (a.shape, a.dtype) == (kind.shape, DTYPE)
            seen[file] = {index: a[kind.slices(index)].tobytes() for index in kind.blocks}
            continue
        codec = json.loads((folder / kind.name / "zarr.json").read_text())["codecs"][0]["configuration"]
        assert tuple(codec["chunk_shape"]) == kind.chunks
        raw = path.read_bytes()
        count = math.prod(kind.per_file)
        entries = np.frombuffer(raw[-16 * count - 4 : -4], "<u8").reshape(*kind.per_file, 2)
        seen[file] = {}
        for inner in itertools.product(*map(range, kind.per_file)):
            index = tuple(i * per + k for i, per, k in zip(file, kind.per_file, inner, strict=True))
            start, nbytes = entries[inner].tolist()
            if start == 2**64 - 1:
                assert nbytes == 2**64 - 1
                continue
            assert nbytes == math.prod(kind.chunks) * DTYPE.itemsize
            block = np.frombuffer(raw, DTYPE, math.prod(kind.chunks), start).reshape(kind.chunks)
            part = kind.slices(index)
            seen[file][index] = block[tuple(slice(p.stop - p.start) for p in part)].tobytes()
    return seen


def names(folder: Path) -> set[str]:
    return {str(each.relative_to(folder)) for each in folder.rglob("*") if not each.is_dir()}


def kill(x: bs.BlockArray, folder: Path) -> None:
    """Leave an array as a process does that is killed: nothing flushed, nothing written, every lock gone."""
    for store in live.stores():
        if Path(getattr(store, "path", "")).is_relative_to(folder):
            store._disown()
    _disk._leave_locks()
    x._files.close(publish=False)  # which has nothing to close any more


def hidden(path: str) -> tuple[str, str]:
    """Return the names of a working file and its journal."""
    head, _, tail = path.rpartition("/")
    work = f"{head}/.{tail}.filling" if head else f".{tail}.filling"
    return work, f"{work}.journal"


# -- against dicts ------------------------------------------------------------------------------------

picks = st.integers(0, 1 << 20)
ENDS = st.sampled_from(["kill", "reset", "close"])


class ArrayMachine(RuleBasedStateMachine):
    """The model is, of each file, a dict of the blocks that are written, and one of those that are published."""

    x: bs.BlockArray
    kind: Kind
    only: str | None = None
    """The one of `KINDS` to try, of those that are drawn if it is None."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(_disk, "filesystem", lambda file: "ext4")  # in memory, so that a sync costs nothing
        self.folder = Path(tempfile.mkdtemp(prefix="blockstore-machine-", dir=MEMORY))
        self.boots = 0
        self.patch.setenv(BOOT, "boot 0")
        self.version = 0
        self.held: list[tuple[Any, bytes, Index]] = []

    @initialize(
        kind=st.sampled_from(sorted(KINDS)),
        fill=st.sampled_from([0, 0, 9]),
        checksum=st.sampled_from([None, "crc32"]),
        keep=st.booleans(),
        reserve=st.booleans(),
        options=st.sampled_from([{}, {"access": "sparse"}, {"guard": "seal"}, {"access": None}]),
        open_files=st.sampled_from([64, 64, 1]),
    )
    def create(
        self, kind: str, fill: int, checksum: Any, keep: bool, reserve: bool, options: dict[str, Any], open_files: int
    ) -> None:
        self.patch.setattr(sys.modules[Plan.__module__], "OPEN_FILES", open_files)
        self.evicts = open_files == 1
        self.kind = KINDS[self.only or kind]
        self.fill_value = 0 if self.kind.name == "x.npy" else fill
        self.options = options
        self.created = {"checksum": checksum, "keep_journal": keep, "reserve": reserve, "fill_value": self.fill_value}
        self.published: dict[Index, Blocks | None] = dict.fromkeys(self.kind.files)
        self.kept: dict[Index, Any] = dict.fromkeys(self.kind.files)
        self.x = self.kind.create(self.folder, **self.created, **options)
        self.begin_model()

    def begin_model(self) -> None:
        """Say what there is of a new array."""
        several = len(self.kind.files) > 1
        self.content: dict[Index, Blocks] = {file: {} for file in self.kind.files}
        self.durable: dict[Index, Blocks] = {file: {} for file in self.kind.files}
        self.believed: set[Index] = set()  # what was written when the array was opened, which made it durable
        self.working = dict.fromkeys(self.kind.files, not several)
        self.draft, self.is_ours = True, False
        self.keep, self.checksum = self.in_draft = self.created["keep_journal"], self.created["checksum"]

    # -- the model

    def block(self, pick: int, *, written: bool | None = None) -> Index | None:
        """Return the index of a block: of one that is written, or not, if there is one."""
        found = [
            index
            for index in self.kind.blocks
            if written is None or (index in self.content[self.kind.file_of(index)]) == written
        ]
        return found[pick % len(found)] if found else None

    def data(self, index: Index) -> NDArray[Any]:
        """Return what no block ever held."""
        self.version += 1
        shape = np.empty(self.kind.shape)[self.kind.slices(index)].shape
        return 1000 * self.version + np.arange(math.prod(shape), dtype=DTYPE).reshape(shape)

    def fresh(self, index: Index) -> NDArray[Any]:
        """Return what a writer is lent."""
        known = self.content[self.kind.file_of(index)].get(index)
        like = np.empty(self.kind.shape, DTYPE)[self.kind.slices(index)]
        return np.full_like(like, self.fill_value) if known is None else np.frombuffer(known, DTYPE).reshape(like.shape)

    def enters(self, index: Index) -> None:
        """A writer enters a block: what was written there is void, and its file is being filled."""
        file = self.kind.file_of(index)
        kept = self.kept[file]
        if not self.working[file] and kept is not None and self.checksum is None:
            self.keep, self.checksum = True, kept[0]  # it goes on as it was finished
        if not self.draft:
            self.in_draft = self.keep, self.checksum
        self.working[file] = self.draft = True
        self.content[file].pop(index, None)
        self.durable[file].pop(index, None)
        self.believed.discard(index)

    def leaves(self, index: Index, data: NDArray[Any]) -> None:
        self.content[self.kind.file_of(index)][index] = data.tobytes()

    @property
    def is_complete(self) -> bool:
        return all(len(self.content[file]) == len(self.kind.of_file(file)) for file in self.kind.files)

    def all_durable(self) -> None:
        self.durable = {file: dict(blocks) for file, blocks in self.content.items()}

    def goes_public(self, file: Index) -> None:
        """A file gets its final name."""
        self.published[file] = dict(self.content[file])
        self.durable[file] = dict(self.content[file])
        self.working[file], self.is_ours = False, True
        self.kept[file] = (self.checksum,) if self.keep else None
        self.hold(file)

    def hold(self, file: Index) -> None:
        """Keep a map of a published file, which is not to change whatever comes."""
        path = self.folder / self.kind.path_of(file)
        self.held = [*self.held[-8:], (np.memmap(path, np.uint8, "r"), path.read_bytes(), file)]

    def lacks(self, file: Index) -> bool:
        """Whether a reader would lose a block if a file were published."""
        return self.kind.name == "x.zarr" and not self.content[file].keys() >= (self.published[file] or {}).keys()

    def publishes(self, call: Callable[[], object], *, closing: bool = False, busy: Index | None = None) -> None:
        """Publish all files, as the model says it goes, and compare how it ends."""
        is_hidden = self.kind.name == "x.npy" and not self.is_complete
        errors: set[type[Exception]] = {bs.NotWrittenError} if is_hidden else set()
        public: list[Index] = []
        for file in self.kind.files:
            if is_hidden or not (self.working[file] and self.content[file]):
                continue
            if busy is not None and self.kind.file_of(busy) == file and not closing:
                errors.add(bs.WriterBusyError)
            elif self.lacks(file):
                errors.add(bs.NotWrittenError)
            else:
                public.append(file)
        if closing:
            errors.clear()
        with pytest.raises(tuple(errors)) if errors else contextlib.nullcontext():
            call()
        if errors:  # in which order the others come is not promised
            found = names(self.folder)
            public = [file for file in public if hidden(self.kind.path_of(file))[0] not in found]
        left = [file for file in self.kind.files if self.working[file] and file not in public]
        ends = not errors and not left and self.is_complete
        if closing:
            self.all_durable()
        for file in public:
            self.goes_public(file)
        for file in self.kind.files:
            if closing and self.kind.name == "x.zarr" and not self.content[file] and self.published[file] is None:
                self.working[file] = False  # nothing was written, and nothing is lacking
        if ends:
            self.draft = False

    def publishes_completed(self) -> None:
        """A flush has made all durable, and published what is complete of several files."""
        self.all_durable()
        if len(self.kind.files) > 1:
            for file in self.kind.files:
                if self.working[file] and len(self.content[file]) == len(self.kind.of_file(file)):
                    self.goes_public(file)

    # -- writing

    def write(self, index: Index, how: str, *, rewrite: bool) -> None:
        data, block = self.data(index), self.x.blocks[index]
        if how == "assign":
            self.x[block.slices] = data
        elif how == "write":
            block.write(data, rewrite=rewrite)
        else:
            with block.writer(rewrite=rewrite) as a:
                assert np.array_equal(a, self.fresh(index))
                a[...] = data
        self.enters(index)
        self.leaves(index, data)

    @rule(pick=picks, how=st.sampled_from(["writer", "write", "assign"]), written=st.sampled_from([False, False, True]))
    def write_one(self, pick: int, how: str, written: bool) -> None:
        if (index := self.block(pick, written=written)) is not None:
            self.write(index, how, rewrite=written)

    @rule(pick=picks)
    def fail(self, pick: int) -> None:
        index = self.block(pick)
        assert index is not None
        with contextlib.suppress(ZeroDivisionError), self.x.blocks[index].writer(rewrite=True) as a:
            assert np.array_equal(a, self.fresh(index))
            a[...] = GARBAGE
            del a
            1 / 0
        self.enters(index)

    @rule(chosen=st.sets(st.integers(0, 7), min_size=2, max_size=6))
    def fill(self, chosen: set[int]) -> None:
        pending = [index for index in self.kind.blocks if index not in self.content[self.kind.file_of(index)]]
        failing = {pending[i] for i in chosen if i < len(pending)}
        data = {index: self.data(index) for index in pending}

        def fill(a: NDArray[Any], block: bs.Block) -> None:
            assert np.array_equal(a, np.full_like(a, self.fill_value))
            a[...] = GARBAGE
            if block.index in failing:
                del a
                1 / 0
            a[...] = data[block.index]

        try:
            assert self.x.fill(fill, workers=2, flush_every=None) == len(pending)
        except bs.FillError as error:
            assert all(isinstance(each, ZeroDivisionError) for each in error.exceptions)  # noqa: PT017
            assert failing
            del error
        else:
            assert not failing
        for index in pending:
            self.enters(index)
            if index not in failing:
                self.leaves(index, data[index])
        self.publishes_completed()

    # -- making it last, and seen

    @rule()
    def flush(self) -> None:
        news = sum(len(self.content[file].keys() - self.durable[file].keys()) for file in self.kind.files)
        assert self.x.flush() <= news
        self.publishes_completed()

    @rule()
    def publish(self) -> None:
        self.publishes(self.x.publish)

    @precondition(lambda self: self.kind.name == "x.npy" and not self.is_complete)
    @rule(fails=st.none() | picks)
    def publish_partial(self, fails: int | None) -> None:
        """Show of an ``.npy`` what there is; what was shown and is not written now stays as it was."""
        (file,) = self.kind.files
        if fails is not None:
            self.fail(fails)
        before = (self.published[file] or {}) if self.is_ours else {}
        self.x.publish(partial=True)
        self.published[file] = {**before, **self.content[file]}
        self.is_ours = True
        self.all_durable()
        self.hold(file)

    @rule(pick=picks, partial=st.booleans())
    def publish_while_somebody_writes(self, pick: int, partial: bool) -> None:
        index = self.block(pick)
        assert index is not None
        data = self.data(index)
        with self.x.blocks[index].writer(rewrite=True) as a:
            self.enters(index)
            a[...] = GARBAGE
            self.publishes(self.x.publish, busy=index)
            self.look()
            a[...] = data
        self.leaves(index, data)

    # -- how it ends, and goes on

    @rule(
        last=st.lists(picks, max_size=2),
        inside=st.none() | picks,
        end=ENDS,
        then=st.lists(
            st.sampled_from(["reset"]) | st.tuples(st.sampled_from(["", "flush", "publish"]), ENDS).map(" ".join),
            max_size=2,
        ),
    )
    def go_on(self, last: list[int], inside: int | None, end: str, then: list[str]) -> None:
        """Write, and end, in a writer or not; then perhaps begin again, do one thing at once, and end; and go on."""
        for pick in last:
            if (index := self.block(pick)) is not None:
                self.write(index, "write", rewrite=True)
        writer = None
        if inside is not None:
            index = self.block(inside, written=False) or self.block(inside) or (0, 0)
            writer = self.x.blocks[index].writer(rewrite=True)
            late = writer.__enter__()
            late[...] = GARBAGE
            self.enters(index)
        self.end(end)
        if writer is not None:
            if not _os.PORTABLE:  # elsewhere nothing cuts a map off from its file
                late[...] = 2 * GARBAGE
            if end == "close":
                with pytest.raises(bs.ClosedStoreError):
                    writer.__exit__(None, None, None)
            del writer, late
        for step in then:
            if step == "reset":
                self.reset()
                continue
            call, _, end = step.partition(" ")
            self.open()
            if call:
                getattr(self, call)()
            self.end(end)
        self.open()

    def end(self, how: str) -> None:
        if how == "close":
            self.close()
        else:
            kill(self.x, self.folder)
        self.read()
        if how == "reset":
            self.reset()

    def close(self) -> None:
        self.publishes(self.x.close, closing=True)
        assert self.x.closed

    def reset(self) -> None:
        """Begin another boot: what was flushed is there, and nothing that never was."""
        self.boots += 1
        self.patch.setenv(BOOT, f"boot {self.boots}")
        with contextlib.ExitStack() as stack:
            y = bs.open_array(self.folder / self.kind.name)
            stack.callback(y._files.close, publish=False)
            if y.chunks != self.kind.chunks:  # a finished .npy, of which nothing can be missing
                return
            for file in self.kind.files:
                there = {index for index in self.kind.of_file(file) if y.written[index]}
                assert self.durable[file].keys() <= there <= self.content[file].keys()
                self.content[file] = {index: self.content[file][index] for index in there}
                self.durable[file] = dict(self.content[file])

    def open(self) -> None:
        self.keep, self.checksum = self.in_draft if self.draft else (False, None)
        self.x = bs.open_array(self.folder / self.kind.name, **self.options)
        self.believed = set().union(*self.content.values())
        if self.x.chunks != self.kind.chunks:  # a finished .npy has forgotten its blocks
            self.x.close()
            self.begin_anew()

    def begin_anew(self) -> None:
        """Replace the array. Of an ``.npy`` what is published stays until the new one is."""
        with pytest.raises(FileExistsError):
            self.kind.create(self.folder, **self.created, **self.options)
        self.x = self.kind.create(self.folder, **self.created, **self.options, overwrite=True)
        if self.kind.name == "x.zarr":
            self.published = dict.fromkeys(self.kind.files)
            self.kept = dict.fromkeys(self.kind.files)
        self.begin_model()

    @rule(end=st.sampled_from(["kill", "close"]))
    def overwrite(self, end: str) -> None:
        if self.draft:
            with pytest.raises(bs.StoreInUseError):
                self.kind.create(self.folder, **self.created, overwrite=True)
        self.end(end)
        self.begin_anew()

    @rule()
    def finish(self) -> None:
        """Write what is missing, and leave nothing but the array."""
        self.fill(set())
        self.close()
        assert not self.draft
        for file in self.kind.files:
            if self.kept[file] is not None:
                os.unlink(self.folder / f"{self.kind.path_of(file)}.journal")
                self.kept[file] = None
        clean = {self.kind.path_of(file) for file in self.kind.files}
        assert names(self.folder) == (clean if self.kind.name == "x.npy" else {*clean, "x.zarr/zarr.json"})
        expected = self.expected(self.content)
        if self.kind.name == "x.npy":
            assert np.array_equal(np.load(self.folder / "x.npy"), expected)
        elif zarr is not None:
            assert np.array_equal(zarr.open_array(self.folder / "x.zarr", mode="r")[...], expected)
        self.open()

    def verify(self) -> None:
        sums = [
            self.checksum if self.working[file] else (self.kept[file] or (None,))[0]
            for file in self.kind.files
            if self.content[file]
        ]
        if all(sums):
            assert self.x.verify().shape == (0, 2)
        else:
            with pytest.raises(ValueError, match="checksum"):
                self.x.verify()

    # -- what is there

    def expected(self, content: dict[Index, Blocks]) -> NDArray[Any]:
        a = np.full(self.kind.shape, self.fill_value, DTYPE)
        for blocks in content.values():
            for index, data in blocks.items():
                part = a[self.kind.slices(index)]
                part[...] = np.frombuffer(data, DTYPE).reshape(part.shape)
        return a

    def compare(self, x: bs.BlockArray, content: dict[Index, Blocks]) -> None:
        """Compare what an array says with what it should."""
        assert np.array_equal(x[...], self.expected(content))
        if x.chunks != self.kind.chunks:  # a finished .npy, which has forgotten its blocks
            assert self.is_complete
            assert not self.draft
            assert x.written.all()
            return
        written = np.zeros(self.kind.grid, np.bool_)
        for blocks in content.values():
            for index in blocks:
                written[index] = True
        assert np.array_equal(x.written, written)
        assert sorted(block.index for block in x.pending()) == list(map(tuple, np.argwhere(~written).tolist()))

    @rule()
    def look(self) -> None:
        """See what the writer sees. That finds all files, and so is no invariant."""
        self.compare(self.x, self.content)
        self.verify()
        for index in self.kind.blocks:
            if index in self.content[self.kind.file_of(index)]:
                with pytest.raises(bs.AlreadyWrittenError):
                    self.x.blocks[index].write(self.fresh(index))
        durable = int(repr(self.x).rpartition(" durable")[0].rpartition(" ")[2])
        assert sum(map(len, self.durable.values())) <= durable
        if not self.evicts:  # a file that is closed because there are too many is flushed
            assert durable <= len(self.believed.union(*self.durable.values()))

    @invariant()
    def read(self) -> None:
        """Compare what a reader of ours sees, while the array is written, and when nobody does."""
        if not hasattr(self, "kind"):
            return
        with bs.open_array(self.folder / self.kind.name, mode="r") as y:
            sees = {
                file: (self.published[file] or {}) if self.lacks(file) else self.content[file]
                for file in self.kind.files
            }
            if self.kind.name == "x.npy" and y.written.all() and not self.is_complete:  # finished, and being rewritten
                sees = {file: blocks or {} for file, blocks in self.published.items()}
            self.compare(y, sees)

    @invariant()
    def a_reader_sees_what_was_published_and_nothing_else(self) -> None:
        if not hasattr(self, "kind"):
            return
        seen = see(self.folder, self.kind)
        for file in self.kind.files:
            expected = self.published[file]
            if expected is None:
                assert file not in seen
                continue
            if self.kind.name == "x.npy":
                zeros = self.expected({})
                rest = {index: zeros[self.kind.slices(index)].tobytes() for index in self.kind.blocks}
                expected = {**rest, **expected}
            assert seen[file] == expected

    @invariant()
    def a_published_file_never_changes(self) -> None:
        for mapped, before, _ in self.held:
            assert mapped.tobytes() == before

    @invariant()
    def there_are_no_other_files(self) -> None:
        if not hasattr(self, "kind"):
            return
        allowed: set[str] = set()
        if self.kind.name == "x.zarr":
            allowed.add("x.zarr/zarr.json")
        if self.draft:
            allowed.add(".x.npy.filling.json" if self.kind.name == "x.npy" else "x.zarr/.filling.json")
        for file in self.kind.files:
            path = self.kind.path_of(file)
            if self.published[file] is not None:
                allowed.add(path)
            if self.kept[file] is not None:
                allowed.add(f"{path}.journal")
            if self.working[file]:
                allowed.update(hidden(path))
        found = names(self.folder)
        if self.kind.name == "x.npy" and self.working[self.kind.files[0]]:
            found.discard(".x.npy.filling.partial")
        assert found == allowed, found ^ allowed

    def teardown(self) -> None:
        if hasattr(self, "x") and not self.x.closed:
            kill(self.x, self.folder)
        self.held.clear()
        self.patch.undo()
        shutil.rmtree(self.folder)


quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
ArrayMachine.TestCase.settings = settings(
    deadline=None, max_examples=40, stateful_step_count=30, suppress_health_check=quiet
)
TestArray = ArrayMachine.TestCase


# -- what the machine catches -------------------------------------------------------------------------


def _the_index_claims_all_blocks(patch: pytest.MonkeyPatch) -> None:
    encode = publishing.encode_index
    patch.setattr(publishing, "encode_index", lambda layout, per, written: encode(layout, per, np.ones_like(written)))


def _a_published_file_is_written_over(patch: pytest.MonkeyPatch) -> None:
    rename = publishing._rename

    def write_over(each: Shard) -> None:
        if not os.path.lexists(each.path):
            return rename(each)
        work = Path(working_of(each.path))
        with open(each.path, "r+b") as file:
            file.write(work.read_bytes())
        work.unlink()
        publishing.tidy(each.plan, each.path)
        return None

    patch.setattr(publishing, "_rename", write_over)


def _nothing_is_copied_of_a_file_that_is_written_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(working, "copy_bytes", lambda file, start, source: None)


def _attempts_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Shard, "touched", property(lambda self: np.zeros(self.layout.count, np.bool_)))


def _fresh_blocks_are_zeros_whatever_the_fill_value(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Plan, "fill_is_zero", property(lambda self: True, lambda self, value: None))


def _sequences_are_not_restored(patch: pytest.MonkeyPatch) -> None:
    open_working = Shard.open_working

    def forget(self: Shard) -> None:
        open_working(self)
        self._sequences, self._missing = None, self.layout.count

    patch.setattr(Shard, "open_working", forget)


def _journals_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(publishing, "tidy", lambda plan, path: None)


def _the_draft_stays(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Files, "_end_draft", lambda self: None)


def _a_partial_publication_is_no_copy(patch: pytest.MonkeyPatch) -> None:
    def share(each: Shard) -> None:
        each.find()
        if each.store is None:
            each.open_working()
        assert each.store is not None
        each.store.flush()
        _os.put_at(each.store._mapped.file, encode_header(each.layout.region, each.layout.dtype), 0)
        os.link(working_of(each.path), f"{each.path}.new")
        os.replace(f"{each.path}.new", each.path)

    patch.setattr("blockstore.files.snapshot", share)


def _attempts_are_published(patch: pytest.MonkeyPatch) -> None:
    runs = publishing.runs
    patch.setattr(
        publishing, "runs", lambda source, layout: runs(replace(source, written=np.ones_like(source.written)), layout)
    )


def _what_is_published_is_taken_away(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Shard, "lacking", lambda each: None)


def _revocations_are_not_recorded(patch: pytest.MonkeyPatch) -> None:
    append = Journal.append

    def append_others(journal: Journal, kind: int, *numbers: int) -> None:
        append(journal, 0 if kind == REVOKED else kind, *numbers)  # which says nothing

    patch.setattr(Journal, "append", append_others)


def _earlier_sessions_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Files, "_unfinished", Files.known)


def _late_writes_reach_what_is_published(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MappedFile, "cut_off", lambda self: None)


def _the_working_file_is_believed_to_be_published(patch: pytest.MonkeyPatch) -> None:
    def forget(self: Shard) -> None:
        self.kind = "working"

    patch.setattr(Shard, "become_published", forget)


PLANTS: dict[Callable[[pytest.MonkeyPatch], None], str | None] = {
    _the_index_claims_all_blocks: None,
    _a_published_file_is_written_over: None,
    _nothing_is_copied_of_a_file_that_is_written_again: None,
    _attempts_are_forgotten: None,
    _fresh_blocks_are_zeros_whatever_the_fill_value: "zarr of one regular file",
    _sequences_are_not_restored: None,
    _journals_stay: None,
    _the_draft_stays: None,
    _a_partial_publication_is_no_copy: "npy",
    _attempts_are_published: "npy",
    _what_is_published_is_taken_away: "zarr of one file",
    _revocations_are_not_recorded: None,
    _earlier_sessions_are_forgotten: None,
    _late_writes_reach_what_is_published: "zarr of one file",
    _the_working_file_is_believed_to_be_published: None,
}
"""Each with the kind of array that shows it soonest, if that matters."""


def _name(plant: Any) -> str:
    return plant.__name__.strip("_").replace("_", " ")


@pytest.mark.parametrize("plant", PLANTS, ids=_name)
def test_the_machine_catches(monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]) -> None:
    if plant is _late_writes_reach_what_is_published and _os.PORTABLE:
        pytest.skip("that is so where there are only plain maps")
    monkeypatch.setattr(ArrayMachine, "only", PLANTS[plant])
    plant(monkeypatch)

    with pytest.raises((AssertionError, ValueError, OSError, pytest.fail.Exception)):
        run_state_machine_as_test(
            ArrayMachine,
            settings=settings(
                deadline=None,
                derandomize=True,
                max_examples=300,
                stateful_step_count=30,
                phases=[Phase.generate],
                database=None,
                report_multiple_bugs=False,
                suppress_health_check=quiet,
            ),
        )


# -- killed at each call ------------------------------------------------------------------------------

SMALL = {
    "npy": Kind("x.npy", (5, 3), (2, 3)),
    "zarr": Kind("x.zarr", (3, 3), (2, 2)),
    "zarr of two files": Kind("x.zarr", (3, 3), (1, 3), (2, 3)),
}

CALLS = (
    *("replace", "link", "unlink", "rename", "mkdir", "rmdir", "pwrite"),
    "fsync" if _os.PORTABLE else "fdatasync",
)
"""What changes names and files, of `os`, and what the journal waits for. A kill before any other call, such as a sync
of a folder, leaves what a kill before the next of these leaves."""


class Life:
    """What a process that is to be killed knows and says. Each thing that it says is on its way before it goes on."""

    def __init__(self, kind: Kind, folder: Path, tell: Callable[[str], object], last: int = 0) -> None:
        self.kind, self.folder = kind, folder
        self._tell, self._left = tell, last
        self._is_armed = False

    def say(self, *words: object) -> None:
        self._tell(" ".join(map(str, words)))

    def arm(self) -> None:
        """Be killed before one of the calls that come from here on."""
        self._is_armed = True

    def count(self) -> None:
        if self._is_armed:
            self._left -= 1
            if self._left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def create(self, **options: Any) -> bs.BlockArray:
        x = self.kind.create(self.folder, **options)
        self.say("created")
        return x

    def open(self) -> bs.BlockArray:
        return bs.open_array(self.folder / self.kind.name)

    def write(self, x: bs.BlockArray, version: int, blocks: Sequence[Index] | None = None) -> None:
        for index in self.kind.blocks if blocks is None else blocks:
            self.say("begins", self.kind.blocks.index(index), version)
            x.blocks[index].write(of_version(self.kind, index, version), rewrite=True)
            self.say("written", self.kind.blocks.index(index), version)

    def fail(self, x: bs.BlockArray, index: Index) -> None:
        self.say("begins", self.kind.blocks.index(index), 0)
        with contextlib.suppress(ZeroDivisionError), x.blocks[index].writer(rewrite=True) as a:
            a[...] = GARBAGE
            del a
            1 / 0

    def publish(self, x: bs.BlockArray, *, partial: bool = False) -> None:
        self.say("publishing")
        x.publish(partial=partial)
        self.say("published")

    def close(self, x: bs.BlockArray) -> None:
        self.say("publishing")
        x.close()
        self.say("published" if self.kind.name == "x.zarr" or (self.folder / "x.npy").exists() else "flushed")

    def flush(self, x: bs.BlockArray) -> None:
        self.say("publishing")
        x.flush()
        self.say("flushed")


def of_version(kind: Kind, index: Index, version: int) -> NDArray[Any]:
    """Return what a block holds; 0 is the fill value."""
    shape = np.empty(kind.shape)[kind.slices(index)].shape
    if version == 0:
        return np.zeros(shape, DTYPE)
    return 1000 * version + 10 * kind.blocks.index(index) + np.arange(math.prod(shape), dtype=DTYPE).reshape(shape)


def live_until(last: int, kind: Kind, folder: Path, live_it: Callable[[Life], None]) -> tuple[list[list[str]], bool]:
    """Live in a forked process that is killed before a call to the system; return what it said, and if it came through.

    A real kill, and not an exception that plays one: no handler, no finalizer and no buffer has a last word.
    """
    reading_end, writing_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later: threads are alive
        pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(20)
            life = Life(kind, folder, lambda line: os.write(writing_end, f"{line}\n".encode()), last)

            def counted(call: Callable[..., Any]) -> Callable[..., Any]:
                def count_and_call(*args: Any, **kwargs: Any) -> Any:
                    life.count()
                    return call(*args, **kwargs)

                return count_and_call

            for name in CALLS:
                if hasattr(os, name):
                    setattr(os, name, counted(getattr(os, name)))
            _os.exchange = counted(_os.exchange)  # type: ignore[assignment]
            live_it(life)
            life.say("through")
        except BaseException as error:
            os.write(writing_end, f"raised {type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(0)
    os.close(writing_end)
    with os.fdopen(reading_end) as pipe:
        said = [line.split() for line in pipe]
    os.waitpid(pid, 0)
    if said and said[-1][0] == "raised":
        raise AssertionError(" ".join(said[-1]))
    return said, bool(said) and said[-1] == ["through"]


class Known:
    """What follows from what a process has said: which versions of each block there may be, and which must be."""

    def __init__(self, kind: Kind) -> None:
        self.is_created = False
        self.written = dict.fromkeys(kind.blocks, 0)  # acknowledged
        self.durable = dict.fromkeys(kind.blocks, 0)
        self.public = dict.fromkeys(kind.blocks, 0)  # at least
        self.begun: dict[Index, set[int]] = {index: set() for index in kind.blocks}  # and maybe there
        self.ever: dict[Index, set[int]] = {index: {0} for index in kind.blocks}
        self.lasts = dict.fromkeys(kind.blocks, True)  # whether what is durable was not opened for rewriting since

    def hear(self, kind: Kind, said: list[list[str]]) -> None:
        for word, *numbers in said:
            if word == "created":
                self.is_created = True
            elif word in ("begins", "written"):
                index, version = kind.blocks[int(numbers[0])], int(numbers[1])
                if word == "begins":
                    self.begun[index] = {self.written[index], version, 0}
                    self.lasts[index] = False
                    if version:
                        self.ever[index].add(version)
                    else:
                        self.written[index] = 0
                else:
                    self.written[index] = version
                    self.begun[index] = set()
            elif word in ("flushed", "published"):
                self.durable = dict(self.written)
                self.lasts = dict.fromkeys(kind.blocks, True)
                if word == "published":
                    self.public = {index: version or self.public[index] for index, version in self.written.items()}


def finished_before(life: Life) -> bs.BlockArray:
    with life.create() as x:
        life.write(x, 1)
        life.close(x)
    return x


def unfinished_before(life: Life) -> bs.BlockArray:
    x = life.create()
    life.write(x, 1, life.kind.blocks[:2])
    life.flush(x)
    life.write(x, 1, life.kind.blocks[2:])
    return x


def partly_published_before(life: Life) -> bs.BlockArray:
    x = life.create()
    life.write(x, 1, life.kind.blocks[::2])
    life.publish(x, partial=True)
    life.write(x, 1, life.kind.blocks[1:2])
    return x


def creates(life: Life) -> None:
    life.arm()
    life.close(life.create(fingerprint={"version": 2}))


def replaces(life: Life) -> None:
    life.arm()
    life.close(life.create(overwrite=True, fingerprint={"version": 2}))


def publishes(life: Life) -> None:
    x = life.create()
    life.write(x, 2)
    life.arm()
    life.publish(x)
    life.close(x)


def fills_and_flushes(life: Life) -> None:
    x = life.create()
    life.arm()
    life.write(x, 2, life.kind.blocks[:3])
    life.flush(x)
    life.write(x, 2, life.kind.blocks[3:])
    life.flush(x)
    life.write(x, 3, life.kind.blocks[:1])


def publishes_in_parts(life: Life) -> None:
    x = life.create()
    life.write(x, 2, life.kind.blocks[:1])
    life.arm()
    publish_the_rest_in_parts(life, x)


def replaces_in_parts(life: Life) -> None:
    x = life.create(overwrite=True)
    life.write(x, 2, life.kind.blocks[:1])
    life.arm()
    publish_the_rest_in_parts(life, x)


def publish_the_rest_in_parts(life: Life, x: bs.BlockArray) -> None:
    life.publish(x, partial=True)
    life.write(x, 2, life.kind.blocks[1:2])
    if life.kind.name == "x.npy":  # where that is possible with a block that is published, and not written any more
        life.fail(x, life.kind.blocks[0])
    life.publish(x, partial=True)
    life.write(x, 2, life.kind.blocks[2:])
    life.write(x, 3, life.kind.blocks[:1])
    life.close(x)


def rewrites(life: Life) -> None:
    x = life.open()
    life.arm()
    life.write(x, 2, life.kind.blocks[:1])
    life.publish(x)
    life.write(x, 3, life.kind.blocks[:2])
    life.close(x)


def fails_to_rewrite(life: Life) -> None:
    x = life.open()
    life.arm()
    life.fail(x, life.kind.blocks[0])
    life.close(x)


def closes(life: Life) -> None:
    x = life.create()
    life.write(x, 2)
    life.arm()
    life.close(x)


def keeps_its_journal(life: Life) -> None:
    x = life.create(keep_journal=True, checksum="crc32")
    life.write(x, 2)
    life.arm()
    life.publish(x)
    life.write(x, 3, life.kind.blocks[:1])
    life.close(x)


def goes_on(life: Life) -> None:
    life.arm()
    x = life.open()
    life.write(x, 2, [block.index for block in x.pending()])
    life.close(x)


def goes_on_to_flush(life: Life) -> None:
    life.arm()
    x = life.open()
    life.flush(x)
    life.close(x)


LIVES: list[tuple[Callable[[Life], bs.BlockArray] | None, Callable[[Life], None]]] = [
    (None, creates),
    (finished_before, replaces),
    (unfinished_before, replaces),
    (unfinished_before, replaces_in_parts),
    (finished_before, replaces_in_parts),
    (None, publishes),
    (None, fills_and_flushes),
    (None, publishes_in_parts),
    (finished_before, rewrites),
    (finished_before, fails_to_rewrite),
    (None, closes),
    (None, keeps_its_journal),
    (unfinished_before, goes_on),
    (unfinished_before, goes_on_to_flush),
    (partly_published_before, goes_on),
]


def check_what_is_seen(kind: Kind, folder: Path, old: Known, new: Known) -> None:
    """Each block that a reader finds is whole, none is older than what was published, and none was never written."""
    seen = see(folder, kind) if kind.name == "x.npy" or (folder / "x.zarr" / "zarr.json").exists() else {}
    found = {index: data for blocks in seen.values() for index, data in blocks.items()}
    for index in kind.blocks:
        there = {version: of_version(kind, index, version).tobytes() for version in old.ever[index] | new.ever[index]}
        versions = {version for version, data in there.items() if found.get(index, there[0]) == data}
        assert versions, f"block {index} is torn"
        assert max(versions) >= new.public[index], f"block {index} is taken away: {versions}"


def check_what_is_written(kind: Kind, x: bs.BlockArray, known: Known, *, reset: bool) -> None:
    """What was acknowledged is there after a kill; what was made durable, after a reset."""
    for index in kind.blocks:
        block = x.blocks[index]
        data = block.read().tobytes()
        there = {version for version in known.ever[index] if of_version(kind, index, version).tobytes() == data}
        assert there, f"block {index} is torn"
        if reset:
            due = {known.durable[index]} if known.lasts[index] else set(known.ever[index])
            due |= {known.written[index]} | known.begun[index]
        else:
            due = known.begun[index] or {known.written[index]}
        assert there <= due, f"block {index} is {there}, not {due}"
        assert block.written == (there != {0})


def check_and_finish(kind: Kind, folder: Path, old: Known, new: Known, *, reset: bool, keeps: bool) -> None:
    """Go on with what a killed process left: nothing is lost, nothing in the way, and in the end nothing left."""
    check_what_is_seen(kind, folder, old, new)
    path = folder / kind.name
    found: bs.BlockArray | None = None
    with contextlib.suppress(FileNotFoundError), bs.open_array(path, mode="r") as y:
        if new.is_created:
            check_what_is_written(kind, y, new, reset=reset) if y.chunks == kind.chunks else None
    with contextlib.suppress(FileNotFoundError):
        found = bs.open_array(path)
    was_created = found is not None
    if found is None:
        assert not new.is_created
        assert not any(old.public.values()), "what was to be replaced is gone, and so is what was to replace it"
        found = kind.create(folder)
    elif new.is_created or not old.is_created:
        if found.chunks == kind.chunks:  # a finished .npy has forgotten its blocks
            check_what_is_written(kind, found, new, reset=reset)
        else:
            assert all(new.durable.values()) or all(new.written.values())
    elif found.chunks == kind.chunks and found.written.any():
        check_what_is_written(kind, found, old, reset=reset)
    with found as x:
        x.fill(lambda a, block: np.copyto(a, 7))
        x[: x.chunks[0]] = 8
        x.publish()
        x[...] = 9
    found = None
    assert np.all(bs.open_array(path, mode="r")[...] == 9)
    left = {name for name in names(folder) if not (keeps and name.endswith(".journal"))}
    if _os.PORTABLE:  # where each new file has a name for a moment, which docs/durability.md owns up to
        left = {name for name in left if not Path(name).match(".blockstore-*.tmp")}
    if was_created and not new.is_created:
        left = {name for name in left if not name.startswith(".x.zarr.new/")}  # which the next to create it removes
    clean = {kind.path_of(file) for file in kind.files}
    assert left == (clean if kind.name == "x.npy" else {*clean, "x.zarr/zarr.json"})


def _note(said: list[list[str]], line: str) -> None:
    said.append(line.split())


def _life_name(value: Any) -> str:
    return "nothing before" if value is None else value.__name__.replace("_", " ")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="what is killed here is forked")
@pytest.mark.parametrize("name", ["npy", "zarr of two files"])
@pytest.mark.parametrize(("before", "life"), LIVES, ids=_life_name)
def test_a_process_that_is_killed_at_any_call_loses_nothing_and_leaves_nothing_in_the_way(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    before: Callable[[Life], bs.BlockArray] | None,
    life: Callable[[Life], None],
) -> None:
    monkeypatch.setattr(_disk, "filesystem", lambda file: "ext4")
    kind = SMALL[name]
    if name == "npy" and before is finished_before:
        kind = kind._replace(chunks=kind.shape)  # it has forgotten its blocks, and takes itself for one
    for last in itertools.count():
        monkeypatch.setenv(BOOT, "A")
        folder = Path(tempfile.mkdtemp(prefix="blockstore-killed-", dir=MEMORY))
        try:
            old, new = Known(kind), Known(kind)
            said: list[list[str]] = []
            if before is not None:
                kill(before(Life(kind, folder, partial(_note, said))), folder)
                old.hear(kind, said)
                if life not in (replaces, replaces_in_parts):
                    new.hear(kind, said)
            said, is_through = live_until(last, kind, folder, life)
            new.hear(kind, said)
            reset = last % 2 == 1
            if reset:
                monkeypatch.setenv(BOOT, "B")
            check_and_finish(kind, folder, old, new, reset=reset, keeps=life is keeps_its_journal)
        except BaseException as error:
            error.add_note(f"killed before call {last}, {'reset' if last % 2 else 'not reset'}; it had said {said}")
            raise
        finally:
            shutil.rmtree(folder)
        if is_through:
            break
    assert last > 1


def _journals_are_removed_before_the_rename(patch: pytest.MonkeyPatch) -> None:
    rename = publishing._rename

    def tidy_and_rename(each: Shard) -> None:
        working.unlink(sidecar.path_of(working_of(each.path)))
        rename(each)

    patch.setattr(publishing, "_rename", tidy_and_rename)


def _flushes_are_not_recorded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "_say_durable", lambda self, journal, below: None)


def _what_is_moved_aside_is_not_put_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_os, "exchange", lambda a, b: False)
    patch.setattr(creation, "_recover", lambda target: None)


def _the_draft_goes_before_the_working_file(patch: pytest.MonkeyPatch) -> None:
    rename = publishing._rename

    def undraft_and_rename(each: Shard) -> None:
        working.unlink(draft_of(each.plan.path))
        rename(each)

    patch.setattr(publishing, "_rename", undraft_and_rename)


def _a_partial_publication_is_not_marked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(publishing, "mark", lambda path: None)


def _a_file_that_has_both_names_is_taken_for_a_working_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Shard, "_is_linked", lambda self, work: False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="what is killed here is forked")
@pytest.mark.parametrize(
    ("plant", "name", "before", "life"),
    [
        (_journals_are_removed_before_the_rename, "zarr", None, closes),
        (_flushes_are_not_recorded, "npy", None, fills_and_flushes),
        (_what_is_moved_aside_is_not_put_back, "zarr", finished_before, replaces),
        (_the_draft_goes_before_the_working_file, "npy", None, publishes),
        (_a_partial_publication_is_not_marked, "npy", None, publishes_in_parts),
        (_a_file_that_has_both_names_is_taken_for_a_working_one, "npy", None, publishes),
    ],
    ids=lambda value: value if isinstance(value, str) else _life_name(value).strip(),
)
def test_a_process_that_is_killed_at_any_call_shows(
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
    name: str,
    before: Callable[[Life], bs.BlockArray] | None,
    life: Callable[[Life], None],
) -> None:
    plant(monkeypatch)

    with pytest.raises((AssertionError, ValueError, OSError)):
        test_a_process_that_is_killed_at_any_call_loses_nothing_and_leaves_nothing_in_the_way(
            monkeypatch, name, before, life
        )
