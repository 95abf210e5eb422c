"""A store that is opened goes on where it was left, however it was left: killed, reset, poisoned or closed."""

import contextlib
import errno
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from support import in_child

import blockstore as bs
from blockstore import ALIGNMENT, _disk, _os, align_up, ledger, opening, resume, sidecar
from blockstore.journal import Journal
from blockstore.ledger import Ledger
from blockstore.records import DURABLE, REVOKED, WRITTEN, Draft

SHM = Path("/dev/shm")
BOOT = "BLOCKSTORE_BOOT_ID"

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="what is killed here is forked")


def in_memory(folder: Path) -> bool:
    """Whether nothing in a folder is ever durable."""
    fd = os.open(folder, os.O_RDONLY)
    return _disk.filesystem(_os.File(fd)) in _disk.FORGETFUL


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a store can be, in boot A."""
    if in_memory(tmp_path):
        pytest.skip(f"{tmp_path} is in memory, where nothing is durable: pass --basetemp on a disk")
    monkeypatch.setenv(BOOT, "A")
    return tmp_path / "data.bin"


def kill(store: bs.BlockStore) -> None:
    """Leave a store as a process does that is killed: nothing is flushed, nothing written, every descriptor closed."""
    store._disown()


def reset(store: bs.BlockStore, patch: pytest.MonkeyPatch, boot: str) -> None:
    """Leave a store as a machine does that is reset, and begin another boot."""
    kill(store)
    patch.setenv(BOOT, boot)


def tags(store: bs.BlockStore) -> list[int]:
    found: list[int] = store.receipts()["tag"].tolist()
    return found


def fill(store: bs.BlockStore, *tags: int, nbytes: int = 4096) -> list[bs.AllocatedRange]:
    """Write a range for each tag, full of it."""
    ranges = [store.allocate(nbytes, tag=tag) for tag in tags]
    for r in ranges:
        r.write(bytes([r.tag]) * nbytes)
    return ranges


# -- against a dict -----------------------------------------------------------------------------------

PAGES = 40
NBYTES = PAGES * ALIGNMENT + 100
KINDS = {"sequential": bs.SequentialAllocator, "concurrent": bs.ConcurrentAllocator}

picks = st.integers(0, 1 << 30)
request_sizes = st.integers(1, 3 * ALIGNMENT) | st.sampled_from([1, ALIGNMENT, ALIGNMENT + 1, 100, 30 * ALIGNMENT])


@dataclass
class Known:
    """A receipt, for the model."""

    stop: int
    nbytes: int
    tag: int
    data: bytes
    durable: bool


class ResumeMachine(RuleBasedStateMachine):
    """The model is a dict of the receipts that stand, by start, and what is handed out in this session."""

    store: bs.BlockStore

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.folder = Path(tempfile.mkdtemp(prefix="blockstore-resume-"))
        self.path = self.folder / "data.bin"
        self.boots = 0
        self.patch.setenv(BOOT, "boot 0")
        self.known: dict[int, Known] = {}
        self.held: dict[int, bs.AllocatedRange] = {}
        self.random = random.Random(0)

    @initialize(
        allocator=st.sampled_from(sorted(KINDS)),
        checksum=st.sampled_from([None, "crc32", "xxh3"]),
        options=st.sampled_from([{}, {"access": "dense"}, {"access": "sparse"}, {"guard": "seal"}]),
        compacts=st.booleans(),
    )
    def create(self, allocator: Any, checksum: Any, options: dict[str, Any], compacts: bool) -> None:
        if compacts:
            self.patch.setattr(ledger, "_COMPACT_MIN", 3)
        self.kind, self.checksum, self.options = KINDS[allocator], checksum, options
        self.store = bs.create(self.path, NBYTES, allocator=allocator, checksum=checksum, **options)

    # -- what is done in a session

    def free(self) -> list[int]:
        """Return of each page how many bytes are nobody's."""
        free = [ALIGNMENT] * PAGES + [NBYTES - PAGES * ALIGNMENT]
        taken = [(start, known.stop) for start, known in self.known.items()]
        taken += [(start, r.stop) for start, r in self.held.items()]
        for start, stop in taken:
            for page in range(start // ALIGNMENT, align_up(stop) // ALIGNMENT):
                free[page] = 0
        return free

    def largest(self) -> int:
        """Return the bytes of the largest hole."""
        best = current = 0
        for nbytes in self.free():
            current = current + nbytes if nbytes else 0
            best = max(best, current)
        return best

    def take(self, r: bs.AllocatedRange) -> bs.AllocatedRange:
        """Note that a range was handed out, of bytes that were nobody's."""
        free = self.free()
        assert all(free[page] for page in range(r.start // ALIGNMENT, align_up(r.stop) // ALIGNMENT)), r
        assert 0 <= r.start < r.stop <= NBYTES
        assert r.start % ALIGNMENT == 0
        self.held[r.start] = r
        return r

    def some(self, pick: int, *, written: bool) -> bs.AllocatedRange | None:
        """Return a range of this session that is written, or not; a new one if there is none."""
        starts = sorted(start for start in self.held if (start in self.known) == written)
        if starts:
            return self.held[starts[pick % len(starts)]]
        try:
            r = self.take(self.store.allocate(5000, partial=True, tag=pick))
        except bs.OutOfSpaceError:
            return None
        if written:
            self.fill(r)
        return r

    def new_data(self, r: bs.AllocatedRange) -> bytes:
        """Return other bytes for a range, of which it is noted that it has them."""
        data = self.random.randbytes(r.nbytes)
        self.known[r.start] = Known(r.stop, r.nbytes, r.tag, data, False)
        return data

    def fill(self, r: bs.AllocatedRange, *, rewrite: bool = False) -> None:
        data = self.new_data(r)
        layout = r._layout
        r.write(data if layout is None else np.frombuffer(data, layout[1]).reshape(layout[0]), rewrite=rewrite)

    @rule(nbytes=request_sizes, tag=st.integers(0, 2**64 - 1), partial=st.booleans())
    def allocate(self, nbytes: int, tag: int, partial: bool) -> None:
        largest = self.largest()
        try:
            r = self.store.allocate(nbytes, tag=tag, partial=partial)
        except bs.OutOfSpaceError as error:
            assert error.largest == largest < (1 if partial else nbytes)  # noqa: PT017
            return
        assert r.nbytes == nbytes or (partial and r.nbytes == r.stop - r.start < nbytes)
        assert r.tag == tag
        self.take(r)

    @rule(rows=st.integers(1, 40), dtype=st.sampled_from(["u1", "f8", "<c16", "S3"]), tag=st.integers(0, 9))
    def allocate_typed(self, rows: int, dtype: str, tag: int) -> None:
        with contextlib.suppress(bs.OutOfSpaceError):
            self.take(self.store.allocate(shape=(rows, 25), dtype=dtype, tag=tag))

    @rule(count=st.integers(1, 4), nbytes=request_sizes, tag=st.integers(0, 9))
    def allocate_many(self, count: int, nbytes: int, tag: int) -> None:
        with contextlib.suppress(bs.OutOfSpaceError):
            for r in self.store.allocate_many(count, nbytes, tag=tag):
                self.take(r)

    @rule(pick=picks, offset=st.integers(0, ALIGNMENT))
    def split(self, pick: int, offset: int) -> None:
        if (r := self.some(pick, written=False)) is not None:
            del self.held[r.start]
            for part in r.split_up(min(offset, r.nbytes)):
                if part is not None:
                    assert self.take(part).tag == r.tag

    @rule(pick=picks, rewrite=st.booleans())
    def write(self, pick: int, rewrite: bool) -> None:
        if (r := self.some(pick, written=False)) is not None:
            self.fill(r, rewrite=rewrite)

    @rule(pick=picks)
    def rewrite(self, pick: int) -> None:
        if (r := self.some(pick, written=True)) is not None:
            with pytest.raises(bs.AlreadyWrittenError):
                r.writer().__enter__()
            self.fill(r, rewrite=True)

    @rule(pick=picks, written=st.booleans(), fails=st.sampled_from([False, False, True]))
    def lend(self, pick: int, written: bool, fails: bool) -> None:
        if (r := self.some(pick, written=written)) is None:
            return
        with contextlib.suppress(ZeroDivisionError), r.writer(r.nbytes, "u1", rewrite=True) as a:
            assert r.receipt is None
            a[:] = np.frombuffer(self.new_data(r), np.uint8)
            if fails:
                del self.known[r.start]
                1 / 0

    def all_durable(self) -> int:
        """Note that every receipt is durable; return how many were not."""
        fresh = [known for known in self.known.values() if not known.durable]
        for known in fresh:
            known.durable = True
        return len(fresh)

    @rule()
    def flush_all(self) -> None:
        assert self.store.flush() == self.all_durable()

    @rule(chosen=st.lists(picks, max_size=4))
    def flush_some(self, chosen: list[int]) -> None:
        receipts = [r.receipt for start, r in sorted(self.held.items()) if start in self.known]
        wanted = [receipts[pick % len(receipts)] for pick in chosen if receipts]
        due = any(not self.known[receipt.start].durable for receipt in wanted if receipt is not None)
        assert self.store.flush([receipt for receipt in wanted if receipt is not None]) == (
            self.all_durable() if due else 0
        )

    @rule(wait=st.booleans())
    def sync(self, wait: bool) -> None:
        """Make nothing durable."""
        if wait:
            self.store.sync()
        else:
            self.store.flush(wait=False)

    @rule()
    def open_once_more(self) -> None:
        """While it is written, readers see what is written, and nobody else writes."""
        self.read()
        with pytest.raises(bs.StoreInUseError):
            bs.open(self.path)

    # -- how it ends, and goes on

    @rule(
        last=st.sampled_from(["write", "rewrite", "nothing"]),
        end=st.sampled_from(["kill", "reset", "close"]),
        then=st.lists(st.sampled_from(["read", "reset", "open", "open and reset"]), max_size=2),
        other=st.sampled_from([None, None, *sorted(KINDS)]),
    )
    def go_on(self, last: str, end: str, then: list[str], other: Any) -> None:
        if last != "nothing" and (r := self.some(0, written=last == "rewrite")) is not None:
            self.fill(r, rewrite=last == "rewrite")
        if end == "close":
            self.all_durable()
            self.store.close()
        else:
            kill(self.store)
        self.held.clear()
        for step in [end, *then]:
            if step == "read":
                self.read()
            if step.startswith("open"):
                self.open(None)
                kill(self.store)
            if step.endswith("reset"):
                self.boots += 1
                self.patch.setenv(BOOT, f"boot {self.boots}")
                self.known = {start: known for start, known in self.known.items() if known.durable}
        self.open(other)

    def open(self, allocator: Any) -> None:
        self.all_durable()
        self.store = bs.open(self.path, allocator=allocator, **self.options)
        assert type(self.store.allocator) is KINDS.get(allocator, self.kind)

    def read(self) -> None:
        with bs.open(self.path, mode="r") as reader:
            self.compare(reader)
            assert reader.free == 0

    # -- what is there

    def compare(self, store: bs.BlockStore) -> None:
        receipts = store.receipts()
        assert receipts[["start", "stop", "nbytes", "tag", "durable"]].tolist() == [
            (start, known.stop, known.nbytes, known.tag, known.durable) for start, known in sorted(self.known.items())
        ]
        for start, known in self.known.items():
            assert store.raw.read_at(start, known.nbytes) == known.data
        edges = [0, *(edge for start, known in sorted(self.known.items()) for edge in (start, known.stop)), NBYTES]
        between = zip(edges[::2], edges[1::2], strict=True)
        assert store.pending().tolist() == [(start, stop, stop - start) for start, stop in between if start < stop]
        if self.checksum is None:
            assert not receipts["checksum"].any()
        else:
            assert len(store.verify()) == 0

    @invariant()
    def the_store_says_what_the_model_says(self) -> None:
        self.compare(self.store)
        assert self.store.free == sum(self.free())
        for start, r in self.held.items():
            known = self.known.get(start)
            assert (r.receipt is None) == (known is None)
            if known is not None and r.receipt is not None:
                assert r.receipt.durable == known.durable
                assert r.read().tobytes() == known.data

    def teardown(self) -> None:
        if hasattr(self, "store") and not self.store.closed:
            kill(self.store)
        self.patch.undo()
        shutil.rmtree(self.folder)


quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
ResumeMachine.TestCase.settings = settings(
    deadline=None, max_examples=30, stateful_step_count=40, suppress_health_check=quiet
)
on_a_disk = pytest.mark.skipif(in_memory(Path(tempfile.gettempdir())), reason="in memory nothing is durable")
TestResume = on_a_disk(ResumeMachine.TestCase)


# -- what the machine catches -----------------------------------------------------------------------


def _revocations_not_recorded(patch: pytest.MonkeyPatch) -> None:
    append = Journal.append

    def append_others(journal: Journal, kind: int, *numbers: int) -> None:
        append(journal, 0 if kind == REVOKED else kind, *numbers)  # which says nothing

    patch.setattr(Journal, "append", append_others)


def _resets_not_noticed(patch: pytest.MonkeyPatch) -> None:
    standing = resume.standing

    def in_any_boot(records: Any, epoch: int) -> Any:
        records = records.copy()
        records["epoch"] = epoch
        return standing(records, epoch)

    patch.setattr(resume, "standing", in_any_boot)


def _flushes_not_recorded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "_say_durable", lambda self, journal, below: None)


def _promotion_not_recorded(patch: pytest.MonkeyPatch) -> None:
    settle = resume.settle
    patch.setattr(opening, "settle", lambda *args, lasting: settle(*args, lasting=False))


def _everything_free(patch: pytest.MonkeyPatch) -> None:
    holes = opening.holes
    patch.setattr(opening, "holes", lambda receipts, nbytes: holes(receipts[:0], nbytes))


def _records_kept_until_a_flush(patch: pytest.MonkeyPatch) -> None:
    append = Journal.append
    waiting: list[tuple[int, ...]] = []

    def append_later(journal: Journal, kind: int, *numbers: int) -> None:
        waiting.append((kind, *numbers))
        while waiting and kind == DURABLE:
            append(journal, *waiting.pop(0))

    patch.setattr(Journal, "append", append_later)


@on_a_disk
@pytest.mark.parametrize(
    "plant",
    [
        _revocations_not_recorded,
        _resets_not_noticed,
        _flushes_not_recorded,
        _promotion_not_recorded,
        _everything_free,
        _records_kept_until_a_flush,
    ],
)
def test_the_machine_catches(monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]) -> None:
    plant(monkeypatch)

    with pytest.raises((AssertionError, bs.BlockStoreError)):
        run_state_machine_as_test(
            ResumeMachine,
            settings=settings(
                deadline=None,
                derandomize=True,
                max_examples=100,
                stateful_step_count=40,
                phases=[Phase.generate],
                database=None,
                report_multiple_bugs=False,
                suppress_health_check=quiet,
            ),
        )


# -- killed and reset -------------------------------------------------------------------------------


def test_after_two_resets_in_a_row_what_was_durable_is_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = bs.create(path, 1 << 16)
    fill(store, 1)
    store.flush()
    fill(store, 2)
    reset(store, monkeypatch, "B")
    store = bs.open(path)
    assert tags(store) == [1]
    fill(store, 3)

    reset(store, monkeypatch, "C")

    with bs.open(path) as store:
        assert tags(store) == [1]
        assert store.receipts()["durable"].all()
        assert store.free == (1 << 16) - 4096


def test_a_machine_that_resets_again_and_again_while_it_opens_keeps_what_was_durable(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = bs.create(path, 1 << 16)
    fill(store, 1, 2)
    store.flush()
    for boot in "BCDEF":
        reset(store, monkeypatch, boot)
        store = bs.open(path)

    assert tags(store) == [1, 2]
    store.close()


def test_what_a_reset_dropped_does_not_come_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = bs.create(path, 1 << 16)
    fill(store, 1, 2)
    reset(store, monkeypatch, "B")
    with bs.open(path) as store:
        assert tags(store) == []
        assert store.free == 1 << 16
        fill(store, 3)

    monkeypatch.setenv(BOOT, "A")

    with bs.open(path) as store:
        assert tags(store) == [3]


def test_what_was_rewritten_and_not_flushed_is_gone_after_a_reset_and_so_is_what_was_there_before(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = bs.create(path, 1 << 16)
    r, _ = fill(store, 1, 2)
    store.flush()
    r.write(b"\7" * 4096, rewrite=True)
    reset(store, monkeypatch, "B")

    with bs.open(path) as store:
        assert tags(store) == [2]
        assert store.free == (1 << 16) - 4096


@pytest.mark.parametrize("boot", ["A", "B"])
def test_a_range_that_was_being_rewritten_is_free(path: Path, monkeypatch: pytest.MonkeyPatch, boot: str) -> None:
    store = bs.create(path, 1 << 16)
    (r,) = fill(store, 1)
    store.flush()
    writer = r.writer(rewrite=True)
    a = writer.__enter__()
    a[:100] = 9
    reset(store, monkeypatch, boot)

    with bs.open(path) as again:
        assert tags(again) == []
        assert again.free == 1 << 16
    with pytest.raises(bs.ForkedStoreError):
        writer.__exit__(None, None, None)


def test_space_is_used_again_with_other_boundaries_and_killed_once_more(path: Path) -> None:
    store = bs.create(path, 6 * 4096)
    for r in fill(store, 1, 2, 3, 4):
        with pytest.raises(ZeroDivisionError), r.writer(rewrite=True):
            1 / 0
    kill(store)
    store = bs.open(path)
    assert store.free == 6 * 4096
    fill(store, 5, 6, nbytes=3 * 4096)
    kill(store)

    store = bs.open(path)
    assert store.receipts()[["start", "stop", "tag"]].tolist() == [(0, 12288, 5), (12288, 24576, 6)]
    with bs.open(path, mode="r") as reader:
        assert tags(reader) == [5, 6]
    kill(store)


@pytest.mark.parametrize("end", ["killed", "reset"])
def test_what_was_dropped_and_is_used_with_other_boundaries_stays_so(
    path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    store = bs.create(path, 6 * 4096)
    fill(store, 1, 2, 3, 4, 5, 6)
    reset(store, monkeypatch, "B")
    store = bs.open(path)
    fill(store, 7, nbytes=3 * 4096)
    store.flush()
    fill(store, 8, nbytes=2 * 4096)
    reset(store, monkeypatch, "C" if end == "reset" else "B")

    with bs.open(path) as store:
        assert tags(store) == ([7] if end == "reset" else [7, 8])
        assert set(store.raw.read_at(0, 12288)) == {7}


@pytest.mark.parametrize("place", range(4))
def test_a_damaged_revocation_harms_no_other_receipt(path: Path, place: int) -> None:
    """Where the boundaries were others, two receipts would overlap."""
    store = bs.create(path, 6 * 4096)
    for r in fill(store, 1, 2):
        with pytest.raises(ZeroDivisionError), r.writer(rewrite=True):
            1 / 0
    fill(store, 3)
    store.close()
    with bs.open(path) as store:
        fill(store, 4, nbytes=2 * 4096)
    journal = Path(f"{path}.journal")
    raw = bytearray(journal.read_bytes())
    raw[4096 + 88 * place + 40] ^= 1
    journal.write_bytes(raw)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bs.JournalDamageWarning)
        for mode in ("r", "r+"):
            with bs.open(path, mode=mode) as store:
                assert set(tags(store)) <= {3, 4}
                assert len(tags(store)) >= 1


def test_a_disk_that_was_mounted_anew_is_like_a_reset(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = bs.create(path, 1 << 16)
    fill(store, 1)
    store.flush()
    fill(store, 2)
    kill(store)
    with bs.open(path, mode="r") as reader:
        assert tags(reader) == [1, 2]

    epoch = _disk.epoch
    monkeypatch.setattr(_disk, "epoch", lambda file: epoch(file) ^ 1)

    with bs.open(path, mode="r") as reader:
        assert tags(reader) == [1]
    with bs.open(path) as store:
        assert tags(store) == [1]


def test_where_no_boot_is_known_only_what_was_durable_is_believed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_disk, "epoch", lambda file: 0)
    store = bs.create(path, 1 << 16)
    fill(store, 1)
    store.flush()
    fill(store, 2)
    assert tags(store) == [1, 2]
    kill(store)

    for mode in ("r", "r+", "r+"):
        with bs.open(path, mode=mode) as store:
            assert tags(store) == [1]


# -- what an opening syncs ----------------------------------------------------------------------------


class Syncs:
    """Counts the syncs of the data and of journals, and lets some fail."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.data = self.journal = 0
        self.fails = ""
        sync, sync_file = _os.sync, _os.sync_file

        def sync_mapped(file: _os.File, mapped: Any) -> None:
            self._count("data" if isinstance(mapped, np.memmap) else "journal")
            sync(file, mapped)

        def sync_unmapped(file: _os.File) -> None:
            name = os.readlink(f"/proc/self/fd/{file.fileno()}")
            self._count("journal" if name.endswith(".journal") else "data")
            sync_file(file)

        patch.setattr(_os, "sync", sync_mapped)
        patch.setattr(_os, "sync_file", sync_unmapped)

    def _count(self, kind: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        if self.fails == kind:
            raise OSError(errno.EIO, "planted")


@pytest.fixture
def syncs(path: Path, monkeypatch: pytest.MonkeyPatch) -> Syncs:
    return Syncs(monkeypatch)


@pytest.mark.parametrize("count", [1, 500])
def test_what_was_only_written_is_made_durable_with_one_sync_of_the_data(path: Path, syncs: Syncs, count: int) -> None:
    store = bs.create(path, count * 4096)
    fill(store, *(n % 256 for n in range(count)))
    kill(store)
    syncs.data = syncs.journal = 0

    store = bs.open(path)

    assert (syncs.data, syncs.journal) == (1, 1)
    assert store.receipts()["durable"].tolist() == [True] * count
    kill(store)
    with bs.open(path, mode="r") as reader:
        assert reader.receipts()["durable"].all()


@pytest.mark.parametrize("end", ["flushed and killed", "closed", "nothing was written", "reset"])
def test_without_anything_to_make_durable_the_data_is_not_synced(
    path: Path, monkeypatch: pytest.MonkeyPatch, syncs: Syncs, end: str
) -> None:
    store = bs.create(path, 1 << 16)
    if end != "nothing was written":
        fill(store, 1)
    if end == "reset":
        reset(store, monkeypatch, "B")
    elif end == "closed":
        store.close()
    else:
        store.flush()
        kill(store)
    syncs.data = 0

    store = bs.open(path)

    assert syncs.data == 0
    kill(store)


def test_reading_syncs_no_data(path: Path, syncs: Syncs) -> None:
    store = bs.create(path, 1 << 16)
    fill(store, 1)
    kill(store)

    with bs.open(path, mode="r") as reader:
        assert reader.receipts()["durable"].tolist() == [False]

    assert syncs.data == 0


@pytest.mark.parametrize("fails", ["data", "journal"])
@pytest.mark.parametrize("anew", [False, True], ids=["the journal as it is", "a journal that is written anew"])
def test_if_what_was_only_written_cannot_be_synced_it_is_void_and_the_next_opening_has_what_was_durable(
    path: Path, syncs: Syncs, fails: str, anew: bool
) -> None:
    store = bs.create(path, 1 << 16)
    fill(store, 1)
    store.flush()
    r, *_ = fill(store, 2, 3)
    if anew:
        with pytest.raises(ZeroDivisionError), r.writer(rewrite=True):
            1 / 0
    kill(store)
    syncs.fails = fails

    with pytest.raises(bs.PoisonedStoreError, match="planted") as caught:
        bs.open(path)

    assert caught.value.errno == errno.EIO
    syncs.fails = ""
    with bs.open(path, mode="r") as reader:
        assert tags(reader) == [1]
    for _ in range(2):
        with bs.open(path) as store:
            assert tags(store) == [1]
            assert store.free == (1 << 16) - 4096


def test_an_opening_that_failed_lets_go_of_the_file(path: Path, syncs: Syncs) -> None:
    store = bs.create(path, 1 << 16)
    fill(store, 1)
    kill(store)
    syncs.fails = "data"
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()

    for _ in range(3):
        with contextlib.suppress(bs.PoisonedStoreError):
            bs.open(path).close()
            syncs.fails = "journal"

    assert (set(os.listdir("/proc/self/fd")) if before else set()) == before
    syncs.fails = ""
    bs.open(path).close()


# -- poison -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["data", "journal"])
@pytest.mark.parametrize("end", [bs.BlockStore.close, kill], ids=["closed", "killed"])
def test_what_a_failed_sync_voided_does_not_come_back_in_the_same_boot(
    path: Path, syncs: Syncs, fails: str, end: Callable[[bs.BlockStore], None]
) -> None:
    store = bs.create(path, 1 << 16)
    fill(store, 1)
    store.flush()
    fill(store, 2, 3)
    syncs.fails = fails
    with pytest.raises(bs.PoisonedStoreError):
        store.flush()
    syncs.fails = ""
    with contextlib.suppress(bs.PoisonedStoreError):
        end(store)

    with bs.open(path, mode="r") as reader:
        assert tags(reader) == [1]
    store = bs.open(path)
    assert tags(store) == [1]
    assert store.free == (1 << 16) - 4096
    fill(store, 4)
    kill(store)
    with bs.open(path) as store:
        assert tags(store) == [1, 4]


def test_after_a_failed_sync_of_a_rewrite_neither_version_is_there(path: Path, syncs: Syncs) -> None:
    store = bs.create(path, 1 << 16)
    r, _ = fill(store, 1, 2)
    store.flush()
    r.write(b"\7" * 4096, rewrite=True)
    syncs.fails = "data"
    with pytest.raises(bs.PoisonedStoreError):
        store.flush()
    syncs.fails = ""
    kill(store)

    with bs.open(path) as store:
        assert tags(store) == [2]


# -- several processes ------------------------------------------------------------------------------


class Holder:
    """A process that opens a store, writes a range, says so, and sits there until it is killed."""

    SCRIPT = """
import sys, blockstore as bs
store = bs.open(sys.argv[1])
store.allocate(4096, tag=77).write(b"M" * 4096)
print("written", flush=True)
sys.stdin.read()
"""

    def __init__(self, path: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT, str(path)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> "Holder":
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"written\n"
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_store_that_another_process_writes_is_in_use_until_that_is_killed(path: Path) -> None:
    bs.create(path, 1 << 16).close()
    with Holder(path) as holder:
        for discard in (False, True):
            with pytest.raises(bs.StoreInUseError, match="a store of another process has it open"):
                bs.open(path, discard=discard)
        with bs.open(path, mode="r") as reader:
            assert tags(reader) == [77]
            assert reader.receipts()["durable"].tolist() == [False]

        holder.kill()

        with bs.open(path) as store:
            assert tags(store) == [77]
            assert store.receipts()["durable"].tolist() == [True]
            assert set(store.raw.read_at(0, 4096)) == {ord("M")}


def test_a_store_of_this_process_is_in_use_until_it_is_closed(path: Path) -> None:
    store = bs.create(path, 1 << 16)
    with pytest.raises(bs.StoreInUseError, match=r"BlockStore 'data\.bin'.* of this process has it open") as caught:
        bs.open(path)
    assert isinstance(caught.value, BlockingIOError)

    store.close()

    bs.open(path).close()


@needs_fork
def test_a_child_that_was_forked_does_not_keep_the_store_in_use(path: Path) -> None:
    store = bs.create(path, 1 << 16)
    fill(store, 1)

    def child() -> list[int]:
        with bs.open(path, mode="r") as reader:
            return tags(reader)

    assert in_child(child) == [1]
    store.close()
    bs.open(path).close()


def test_readers_see_a_part_of_what_is_being_written_and_never_less_than_before(path: Path) -> None:
    store = bs.create(path, 300 * 4096)
    before: list[int] = []
    for n in range(300):
        store.allocate(4096, tag=n + 1).write(bytes([n % 256]) * 4096)
        if n % 50 == 49:
            store.flush()
        if n % 10 == 9:
            with bs.open(path, mode="r") as reader:
                assert tags(reader) == list(range(1, n + 2))
                durable = reader.receipts()["durable"].tolist()
                assert durable == [tag <= (n + 1) // 50 * 50 for tag in range(1, n + 2)]
                assert tags(reader)[: len(before)] == before
                before = tags(reader)
                assert len(reader.pending()) == (n < 299)
    store.close()


def test_what_a_reader_has_seen_does_not_change(path: Path) -> None:
    store = bs.create(path, 1 << 16)
    fill(store, 1)
    with bs.open(path, mode="r") as reader:
        fill(store, 2)
        store.flush()
        assert tags(reader) == [1]
        assert reader.receipts()["durable"].tolist() == [False]
        with pytest.raises(bs.ReadOnlyStoreError):
            reader.allocate(1)
    store.close()


# -- verify -----------------------------------------------------------------------------------------


@pytest.fixture(params=["crc32", "crc32c", "xxh3"])
def sums(request: pytest.FixtureRequest, path: Path) -> Iterator[bs.BlockStore]:
    with bs.create(path, 1 << 20, checksum=request.param) as store:
        for n in range(20):
            r = store.allocate(1 + n * 700, tag=n)
            r.write(np.random.default_rng(n).bytes(r.nbytes))
    with bs.open(path) as store:
        yield store


def test_verify_reports_what_was_changed_and_nothing_else(sums: bs.BlockStore) -> None:
    receipts = sums.receipts()
    assert len(sums.verify()) == 0
    changed = [0, 7, 13, 19]
    for n in changed:
        last = int(receipts["start"][n] + receipts["nbytes"][n]) - 1
        with open(sums.path, "r+b") as file:
            file.seek(last)
            (byte,) = file.read(1)
            file.seek(last)
            file.write(bytes([byte ^ 1]))

    assert sums.verify().tolist() == receipts[changed].tolist()


def test_verify_does_not_look_at_what_no_receipt_is_for(sums: bs.BlockStore) -> None:
    receipts = sums.receipts()
    between = int(receipts["start"][0] + receipts["nbytes"][0])
    sums.raw.write_at(between, b"!")
    sums.raw.write_at(int(receipts["stop"][-1]), b"!" * 4096)

    assert len(sums.verify()) == 0


def test_verify_says_how_far_it_is(sums: bs.BlockStore) -> None:
    told: list[int] = []
    sums.raw.write_at(0, b"?")

    found = sums.verify(progress=told.append)

    assert told == sums.receipts()["nbytes"].tolist()
    assert len(found) <= 1


def test_verify_knows_what_was_rewritten(sums: bs.BlockStore) -> None:
    r = sums.allocate(shape=(10, 10), dtype="f8", tag=99)
    for value in (1.0, 2.0):
        with r.writer(rewrite=True) as a:
            a[:] = value
        assert len(sums.verify()) == 0
    sums.raw.write_at(r.start, np.float64(1.0).tobytes())

    assert sums.verify()["tag"].tolist() == [99]


def test_verify_in_a_store_that_is_read_only(sums: bs.BlockStore) -> None:
    with bs.open(sums.path, mode="r") as reader:
        assert len(reader.verify()) == 0
    sums.raw.write_at(4096, b"????")
    with bs.open(sums.path, mode="r") as reader:
        assert reader.verify()["tag"].tolist() == [1]


def test_without_checksums_there_is_nothing_to_verify(path: Path) -> None:
    with bs.create(path, 8192) as store, pytest.raises(ValueError, match="have no checksums"):
        store.verify()


# -- in memory --------------------------------------------------------------------------------------


@pytest.fixture
def memory(path: Path) -> Iterator[Path]:
    """A path on a tmpfs."""
    if not SHM.is_dir() or not in_memory(SHM) or not os.access(SHM, os.W_OK):
        pytest.skip(f"{SHM} is no tmpfs")
    folder = Path(tempfile.mkdtemp(prefix="blockstore-", dir=SHM))
    yield folder / "data.bin"
    shutil.rmtree(folder)


def test_in_memory_nothing_is_ever_durable_and_it_is_said_so(memory: Path) -> None:
    with pytest.warns(bs.FileSystemWarning, match="is on tmpfs, which lives in memory"):
        store = bs.create(memory, 1 << 16)
    r, _ = fill(store, 1, 2)

    assert store.flush() == 0
    assert store.flush(r.receipt) == 0

    assert r.receipt is not None
    assert not r.receipt.durable
    assert not store.receipts()["durable"].any()
    store.close()
    with pytest.warns(bs.FileSystemWarning, match="is on tmpfs, which lives in memory"):
        store = bs.open(memory)
    assert tags(store) == [1, 2]
    assert not store.receipts()["durable"].any()
    assert store.flush() == 0
    store.close()


def test_in_memory_what_was_written_survives_the_process(memory: Path) -> None:
    with pytest.warns(bs.FileSystemWarning):
        store = bs.create(memory, 1 << 16)
    r, _ = fill(store, 1, 2)
    store.flush()
    with pytest.raises(ZeroDivisionError), r.writer(rewrite=True):
        1 / 0
    fill(store, 3)

    for _ in range(3):
        kill(store)
        with pytest.warns(bs.FileSystemWarning):
            store = bs.open(memory)
        assert tags(store) == [2, 3]
        assert not store.receipts()["durable"].any()
        assert store.free == (1 << 16) - 8192
        with bs.open(memory, mode="r") as reader:
            assert tags(reader) == [2, 3]
            assert not reader.receipts()["durable"].any()
    kill(store)


def test_a_pair_copied_from_a_disk_to_memory_keeps_its_receipts(path: Path, memory: Path) -> None:
    with bs.create(path, 1 << 16) as store:
        fill(store, 1, 2)
    shutil.copy(path, memory)
    shutil.copy(f"{path}.journal", f"{memory}.journal")

    for adopt in (True, False):
        with pytest.warns(bs.FileSystemWarning):
            store = bs.open(memory, adopt=adopt)
        assert tags(store) == [1, 2]
        assert store.free == (1 << 16) - 8192
        store.close()


# -- large ------------------------------------------------------------------------------------------


def journal_of(path: Path, count: int, order: Any) -> None:
    """Put a journal of `count` written ranges of a page each, in some order, and their flush, beside a file."""
    path.touch()
    os.truncate(path, count * 4096)
    file = _os.open_file(str(path), writable=True)
    header = sidecar.new_header(file, "sequential", None)
    draft = Draft(bytes.fromhex(header.uuid), _disk.epoch(file))
    with Path(f"{path}.journal").open("wb") as out:
        out.write(header.encode())
        for sequence, page in enumerate(order.tolist()):
            out.write(draft.pack(WRITTEN, sequence, page * 4096, page * 4096 + 4096, 4096, page, 0))
        out.write(draft.pack(DURABLE, count, 0, count // 2, 0, 0, 0))
        out.write(bytes(2 * 4096))


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_journal_of_a_million_records_is_opened_and_nothing_is_missing(path: Path, shuffled: bool) -> None:
    count = 1_000_000
    order = np.random.default_rng(0).permutation(count) if shuffled else np.arange(count)
    journal_of(path, count + 1, np.append(order, count))

    with bs.open(path, mode="r") as reader:
        assert np.array_equal(reader.receipts()["tag"], np.arange(count + 1))
        assert np.count_nonzero(reader.receipts()["durable"]) == (count + 1) // 2
    with bs.open(path) as store:
        assert np.array_equal(store.receipts()["tag"], np.arange(count + 1))
        assert store.receipts()["durable"].all()
        assert store.free == 0
        assert len(store.pending()) == 0


def test_a_journal_of_many_dead_records_is_written_anew(path: Path) -> None:
    store = bs.create(path, 1 << 16)
    (r,) = fill(store, 1)
    for n in range(2000):
        r.write(bytes([n % 256]) * 4096, rewrite=True)
    kill(store)

    with bs.open(path) as store:
        assert tags(store) == [1]
        assert set(store.raw.read_at(0, 4096)) == {1999 % 256}
        assert Path(f"{path}.journal").stat().st_size < 2 * 88 * 2000
    assert Path(f"{path}.journal").stat().st_size < 4 * 4096 + 10 * 88
    with bs.open(path) as store:
        assert tags(store) == [1]
