"""A journal keeps what was appended, tells what is whole, and refuses what it is not."""

import contextlib
import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import PORTABLE, run_python

import blockstore as bs
from blockstore import _os, journal
from blockstore.errors import JournalSpaceError
from blockstore.journal import HEADER_NBYTES, Header, Journal
from blockstore.records import DURABLE, NBYTES, RECORD, REVOKED, VOID, WRITTEN, Draft

EPOCH = 5
HEADER = Header("00112233445566778899aabbccddeeff", 1 << 20, 77, 3, "sequential", None)
FIRST_SPACE = (1 << 16) // NBYTES
"""Records for which a new journal has space."""

RESERVE = "write" if PORTABLE else "posix_fallocate"


def empty_file(path: Path) -> _os.File:
    return _os.File(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL))


def reopened(path: Path, epoch: int = EPOCH) -> Journal:
    """Open a journal to append to it, behind what it holds."""
    file = journal.open_journal(str(path), writable=True)
    header = journal.read_header(file, str(path))
    return Journal(file, header, journal.read_records(file, header).count, epoch)


def content_of(path: Path) -> journal.Content:
    file = journal.open_journal(str(path), writable=False)
    return journal.read_records(file, journal.read_header(file, str(path)))


def append_many(log: Journal, count: int, first: int = 0) -> None:
    for n in range(first, first + count):
        log.append(WRITTEN, n, n * 4096, n * 4096 + 4096, n + 1, n, n * 7)


def made(count: int, first: int = 0) -> bytes:
    """Return the records that `append_many` appends."""
    draft = Draft(bytes.fromhex(HEADER.uuid), EPOCH)
    records = (draft.pack(WRITTEN, n, n * 4096, n * 4096 + 4096, n + 1, n, n * 7) for n in range(first, first + count))
    return b"".join(records)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.bin.journal"


@pytest.fixture
def log(path: Path) -> Iterator[Journal]:
    log = Journal.create(empty_file(path), HEADER, EPOCH)
    yield log
    log.close()


@pytest.fixture
def _cramped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let journals have space for 8 records, and grow by as many."""
    monkeypatch.setattr(journal, "_GROW_MIN", 8 * NBYTES)
    monkeypatch.setattr(journal, "_GROW_MAX", 8 * NBYTES)


cramped = pytest.mark.usefixtures("_cramped")


class Disk:
    """Refuses to reserve space, as often as it is told to."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.refusals = 0
        self._reserve: Callable[..., Any] = getattr(os, RESERVE)
        patch.setattr(os, RESERVE, self._call)

    def _call(self, *args: Any) -> Any:
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._reserve(*args)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


# -- append and read back -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, FIRST_SPACE, FIRST_SPACE + 1, 3 * FIRST_SPACE])
def test_what_was_appended_is_there_at_once_and_in_order(log: Journal, path: Path, count: int) -> None:
    append_many(log, count)

    assert log.count == count
    assert log.records().tobytes() == made(count)
    found = content_of(path)
    assert found.records.tobytes() == made(count)
    assert (found.count, len(found.damaged)) == (count, 0)


def test_a_journal_grows_past_the_first_64_kib_and_keeps_space_reserved(log: Journal, path: Path) -> None:
    append_many(log, FIRST_SPACE)
    before = path.stat().st_size

    append_many(log, 1, FIRST_SPACE)

    assert before == HEADER_NBYTES + (1 << 16) + 8192
    assert path.stat().st_size >= before + (1 << 16)
    assert path.stat().st_blocks * 512 >= path.stat().st_size
    assert path.read_bytes()[HEADER_NBYTES:].rstrip(b"\0") == made(FIRST_SPACE + 1).rstrip(b"\0")


def test_arrays_of_records_outlive_growth_and_close(log: Journal) -> None:
    append_many(log, 10)
    early = log.records()
    append_many(log, 2 * FIRST_SPACE, 10)
    late = log.records(5)
    log.close()

    assert early.tobytes() == made(10)
    assert late.tobytes() == made(2 * FIRST_SPACE + 5, 5)


@pytest.mark.parametrize(("first", "stop", "want"), [(0, 3, range(3)), (4, None, range(4, 10)), (7, 5, range(0))])
def test_a_part_of_the_records(log: Journal, first: int, stop: int | None, want: range) -> None:
    append_many(log, 10)

    assert log.records(first, stop)["sequence"].tolist() == list(want)


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_records_of_another_journal_are_added_as_they_are(log: Journal, path: Path, count: int) -> None:
    append_many(log, 3)

    log.extend(np.frombuffer(made(count, 100), RECORD))
    append_many(log, 1, 3)

    assert content_of(path).records.tobytes() == made(3) + made(count, 100) + made(1, 3)


def test_a_record_names_the_store_and_the_epoch(log: Journal) -> None:
    log.append(REVOKED, 9, 4096, 8192)

    (found,) = log.records()
    assert found["uuid"].item().hex() == HEADER.uuid
    assert (found["epoch"], found["kind"], found["nbytes"], found["tag"]) == (EPOCH, REVOKED, 0, 0)


Step = tuple[str, int]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["append", "extend", "close", "abandon"]), st.integers(0, 40)), max_size=12
    ),
    grow=st.integers(1, 40 * NBYTES),
)
def test_a_journal_is_a_list_that_survives_being_closed_and_being_left(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step], grow: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "_GROW_MIN", grow)
        patch.setattr(journal, "_GROW_MAX", 2 * grow)
        path = tmp_path_factory.mktemp("journal") / "journal"
        log, model = Journal.create(empty_file(path), HEADER, EPOCH), b""
        for step, count in steps:
            if step == "append":
                append_many(log, count)
                model += made(count)
            elif step == "extend":
                log.extend(np.frombuffer(made(count, 50), RECORD))
                model += made(count, 50)
            else:
                (log.close if step == "close" else log.abandon)()
                if step == "close":
                    assert HEADER_NBYTES + len(model) + 8192 <= path.stat().st_size <= ended(model)
                log = reopened(path)
            assert log.records().tobytes() == model
        assert content_of(path).records.tobytes() == model
        log.close()
        assert path.stat().st_size <= ended(model)
        assert path.read_bytes().rstrip(b"\0") == (HEADER.encode() + model).rstrip(b"\0")


def ended(records: bytes) -> int:
    """Return the bytes of a closed journal: there is room for 46 more records, and two pages of zeros."""
    return HEADER_NBYTES + len(records) + 3 * 4096


def test_without_any_sync_records_survive_kill_9(path: Path) -> None:
    script = """
import os, signal, sys
from blockstore import _os
from blockstore.journal import Header, Journal
file = _os.File(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_EXCL))
log = Journal.create(file, Header(sys.argv[2], 1 << 20, 77, 3, "sequential", None), 5)
for n in range(2000):
    log.append(1, n, n * 4096, n * 4096 + 4096, n + 1, n, n * 7)
os.fsync = os.fdatasync = None
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = run_python(script, path, HEADER.uuid)

    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert content_of(path).records.tobytes() == made(2000)
    log = reopened(path)
    append_many(log, 1, 2000)
    log.close()
    assert content_of(path).records.tobytes() == made(2001)


# -- close ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2 * FIRST_SPACE])
def test_close_gives_back_the_space_that_was_reserved(log: Journal, path: Path, count: int) -> None:
    append_many(log, count)

    log.close()

    assert path.read_bytes() == HEADER.encode() + made(count) + bytes(3 * 4096)


def test_close_can_leave_the_file_as_it_is(log: Journal, path: Path) -> None:
    append_many(log, 1)
    before = path.read_bytes()

    log.close(trim=False)

    assert path.read_bytes() == before


def test_a_closed_journal_takes_no_record(log: Journal, path: Path) -> None:
    append_many(log, 1)
    log.close()
    log.close()

    for call in (lambda: append_many(log, 1), lambda: log.extend(log.records())):
        with pytest.raises(OSError, match="the journal is closed"):
            call()
    log.append_last(VOID, 1, 0, 1)
    log.sync()
    assert path.read_bytes() == HEADER.encode() + made(1) + bytes(3 * 4096)


# -- without space ------------------------------------------------------------------------------------


@cramped
def test_without_space_nothing_is_added_and_the_journal_goes_on(log: Journal, path: Path, disk: Disk) -> None:
    append_many(log, 8)
    disk.refusals = 4

    with pytest.raises(JournalSpaceError, match=r"cannot reserve \d+ bytes for the journal") as caught:
        append_many(log, 1, 8)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(JournalSpaceError):
        log.extend(np.frombuffer(made(3), RECORD))
    assert content_of(path).records.tobytes() == log.records().tobytes() == made(8)

    append_many(log, 20, 8)
    assert content_of(path).records.tobytes() == made(28)


@cramped
def test_the_last_word_needs_no_space(log: Journal, path: Path, disk: Disk) -> None:
    append_many(log, 8)
    disk.refusals = 10**9

    log.append_last(VOID, 8, 3, 8)

    last = content_of(path).records[-1]
    assert (last["kind"], last["start"], last["stop"]) == (VOID, 3, 8)
    disk.refusals = 0
    log = reopened(path)
    append_many(log, 1, 9)
    assert content_of(path).records["sequence"].tolist() == [*range(10)]


@cramped
def test_a_journal_that_cannot_be_made_is_an_error_of_create(tmp_path: Path, disk: Disk) -> None:
    reserve = disk._reserve
    calls: list[int] = []

    def second(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return reserve(*args)

    disk._reserve = second
    with pytest.raises(OSError, match="No space left"):
        bs.create(tmp_path / "data.bin", 4096)

    assert list(tmp_path.iterdir()) == []


class Full:
    """A store whose journal is full, of 8 written ranges, and two fresh ranges."""

    def __init__(self, path: Path) -> None:
        self.store = bs.create(path, 64 * 4096)
        self.written = [self.store.allocate(4096, tag=n + 1) for n in range(8)]
        for r in self.written:
            r.write(bytes([r.tag]) * 4096)
        self.fresh = self.store.allocate(4096, tag=100)
        self.other = self.store.allocate(4096, tag=101)

    def tags(self) -> list[int]:
        tags: list[int] = self.store.receipts()["tag"].tolist()
        return tags


@pytest.fixture
def full(_cramped: None, tmp_path: Path, disk: Disk) -> Iterator[Full]:
    full = Full(tmp_path / "data.bin")
    yield full
    disk.refusals = 0
    full.store.close()


def _leave_writer(r: bs.AllocatedRange) -> None:
    with r.writer() as a:
        a[:] = 9


@pytest.mark.parametrize("write", [_leave_writer, lambda r: r.write(b"\x09" * 4096)], ids=["writer", "write"])
def test_an_exit_that_finds_no_space_makes_no_receipt_and_all_else_goes_on(
    full: Full, disk: Disk, write: Callable[[bs.AllocatedRange], object]
) -> None:
    receipts = [r.receipt for r in full.written]
    disk.refusals = 2

    with pytest.raises(JournalSpaceError):
        write(full.fresh)

    assert full.fresh.receipt is None
    with pytest.raises(bs.NotWrittenError):
        full.fresh.read()
    assert full.tags() == [*range(1, 9)]
    assert not any(receipt is None or receipt.revoked for receipt in receipts)

    write(full.other)
    write(full.fresh)
    assert full.tags() == [*range(1, 9), 100, 101]
    assert full.store.flush() == 10
    assert all(receipt is not None and receipt.durable for receipt in receipts)
    full.store.close()
    with bs.open(full.store.path) as again:
        assert again.receipts()["tag"].tolist() == [*range(1, 9), 100, 101]


def test_a_rewrite_that_finds_no_space_leaves_the_receipt_and_the_bytes(full: Full, disk: Disk) -> None:
    r = full.written[3]
    disk.refusals = 2

    with pytest.raises(JournalSpaceError):
        r.write(bytes(4096), rewrite=True)

    assert r.receipt is not None
    assert not r.receipt.revoked
    assert set(r.read()) == {4}
    assert full.tags() == [*range(1, 9)]
    r.write(bytes(4096), rewrite=True)
    assert full.tags() == [*range(1, 9)]
    assert set(r.read()) == {0}


def test_a_flush_that_finds_no_space_takes_what_is_kept_for_it(full: Full, disk: Disk) -> None:
    disk.refusals = 10**9

    assert full.store.flush() == 8
    assert full.store.receipts()["durable"].all()

    disk.refusals = 0
    full.fresh.write(bytes(4096))
    assert full.store.flush() == 1


def test_a_flush_that_finds_no_space_at_all_makes_nothing_durable_and_poisons_nothing(full: Full, disk: Disk) -> None:
    disk.refusals = 10**9

    def use_up() -> None:  # each takes a record of the space that is kept
        for _ in range(100):
            full.store.flush()
            full.written[0].write(bytes(4096), rewrite=True)

    with pytest.raises(JournalSpaceError):
        use_up()
    flushed = [r for r in full.written if r.receipt is not None and r.receipt.durable]

    with contextlib.suppress(JournalSpaceError):
        full.store.flush()

    assert all(r.receipt is not None and r.receipt.durable for r in flushed)
    disk.refusals = 0
    full.fresh.write(bytes(4096))
    full.store.flush()
    assert full.store.receipts()["durable"].all()
    assert 100 in full.tags()


def test_a_store_that_closes_without_space_keeps_what_was_written(full: Full, disk: Disk) -> None:
    disk.refusals = 10**9

    full.store.close()

    with bs.open(full.store.path) as again:
        assert again.receipts()["tag"].tolist() == [*range(1, 9)]
        assert again.receipts()["durable"].all()


def test_opening_needs_no_space(full: Full, disk: Disk) -> None:
    path = full.store.path
    full.store._disown()
    disk.refusals = 10**9

    again = bs.open(path)

    assert again.receipts()["tag"].tolist() == [*range(1, 9)]
    assert again.receipts()["durable"].all()
    disk.refusals = 0
    again.close()


def test_opening_without_space_for_a_new_journal_voids_nothing(full: Full, disk: Disk) -> None:
    path = Path(full.store.path)
    with pytest.raises(ZeroDivisionError), full.written[0].writer(rewrite=True):
        1 / 0  # the next to open writes the journal anew
    full.store._disown()
    disk.refusals = 10**9

    with pytest.raises(JournalSpaceError):
        bs.open(path)

    disk.refusals = 0
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["data.bin", "data.bin.journal"]
    with bs.open(path) as again:
        assert again.receipts()["tag"].tolist() == [*range(2, 9)]


# -- the header -------------------------------------------------------------------------------------

headers = st.builds(
    Header,
    st.binary(min_size=16, max_size=16).map(bytes.hex),
    st.integers(1, 2**62),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["sequential", "concurrent"]),
    st.sampled_from([None, "crc32", "crc32c", "xxh3"]),
)


@given(header=headers)
def test_a_header_reads_back(header: Header) -> None:
    page = header.encode()

    assert len(page) == HEADER_NBYTES
    assert Header.decode(page, "j") == header


def test_a_header_is_a_line_of_text_and_json_for_ever() -> None:
    text = (
        b'{"uuid": "00112233445566778899aabbccddeeff", "nbytes": 1048576, "inode": 77, "generation": 3, '
        b'"allocator": "sequential", "checksum": null}'
    )

    title = b"blockstore journal, version 1, crc32 %08x\n" % crc32(text)
    assert HEADER.encode() == (title + text).ljust(4095) + b"\n"


@given(header=headers, bit=st.integers(0, 8 * HEADER_NBYTES - 1))
def test_no_flipped_bit_makes_another_header(header: Header, bit: int) -> None:
    page = bytearray(header.encode())
    page[bit // 8] ^= 1 << bit % 8

    try:
        assert Header.decode(bytes(page), "j") == header
        assert bit >= 8 * (HEADER_NBYTES - 1)  # the last newline says nothing
    except bs.JournalMismatchError:
        pass


def page_of(text: bytes) -> bytes:
    """Return a header page with a right CRC."""
    return (b"blockstore journal, version 1, crc32 %08x\n" % crc32(text) + text).ljust(HEADER_NBYTES)


GOOD = json.loads(HEADER.encode().split(b"\n")[1])


def json_of(**changes: Any) -> bytes:
    return page_of(json.dumps(GOOD | changes).encode())


def without(name: str) -> bytes:
    return page_of(json.dumps({key: value for key, value in GOOD.items() if key != name}).encode())


@pytest.mark.parametrize(
    ("page", "match"),
    [
        (b"", "is not a journal of blockstore"),
        (bytes(4096), "is not a journal of blockstore"),
        (b"\x93NUMPY\x01\x00".ljust(4096), "is not a journal of blockstore"),
        (b"blockstore journal, version 2, crc32 00000000\n{}".ljust(4096), "is not a journal of blockstore"),
        (HEADER.encode().replace(b"1048576", b"1048577"), "is damaged"),
        (HEADER.encode().replace(b"crc32 ", b"crc32 f", 1), "is damaged"),
        (HEADER.encode()[:120], "is damaged"),
        (b"blockstore journal, version 1, crc32 \n".ljust(4096), "is damaged"),
        (page_of(b""), "makes no sense"),
        (page_of(b"{"), "makes no sense"),
        (page_of(b"[]"), "makes no sense"),
        (page_of(b"7"), "makes no sense"),
        (page_of(b"null"), "makes no sense"),
        (page_of(b"\xff\xfe\xfd"), "makes no sense"),
        (page_of(b"[" * 100), "makes no sense"),
        (page_of(b"9" * 4000), "makes no sense"),
        *((without(name), "makes no sense") for name in GOOD),
        (json_of(uuid="0011"), "makes no sense"),
        (json_of(uuid="x" * 32), "makes no sense"),
        (json_of(uuid=7), "makes no sense"),
        (json_of(uuid=None), "makes no sense"),
        (json_of(nbytes="1048576"), "makes no sense"),
        (json_of(nbytes=1048576.0), "makes no sense"),
        (json_of(nbytes=True), "makes no sense"),
    ],
)
def test_a_page_that_is_no_header_is_refused(page: bytes, match: str) -> None:
    with pytest.raises(bs.JournalMismatchError, match=match):
        Header.decode(page, "j")


def test_unknown_fields_of_a_header_are_passed_over() -> None:
    assert Header.decode(json_of(colour="red"), "j") == HEADER


def test_a_header_that_is_cut_off_anywhere_is_refused(log: Journal, path: Path) -> None:
    file = journal.open_journal(str(path), writable=True)
    for nbytes in range(HEADER_NBYTES - 1, -1, -1):
        os.ftruncate(file.fileno(), nbytes)
        with pytest.raises(bs.JournalMismatchError, match=r"cut off|damaged|is not a journal"):
            journal.read_header(file, str(path))
    os.ftruncate(file.fileno(), HEADER_NBYTES)  # with zeros


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\n"),
        lambda path: path.write_text("my own diary"),
        lambda path: path.write_bytes(HEADER.encode()),
        lambda path: path.write_bytes(path.read_bytes()[:2000]),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to("nowhere")),
        lambda path: (path.rename(path.with_name("elsewhere")), path.symlink_to("elsewhere")),
        lambda path: (path.unlink(), os.mkfifo(path)),
    ],
    ids=["empty", "newline", "text", "another file's", "cut off", "folder", "dangling link", "link", "fifo"],
)
def test_what_is_no_journal_of_the_file_is_refused(tmp_path: Path, spoil: Callable[[Path], object], mode: str) -> None:
    bs.create(tmp_path / "data.bin", 8192).close()
    spoil(tmp_path / "data.bin.journal")

    with pytest.raises(bs.JournalMismatchError, match=r"data\.bin\.journal"):
        bs.open(tmp_path / "data.bin", mode=mode)  # type: ignore[arg-type]


# -- what is found in a file ------------------------------------------------------------------------


def test_a_journal_is_known_by_its_first_bytes(log: Journal, path: Path, tmp_path: Path) -> None:
    others = {"text": b"hello", "empty": b"", "almost": HEADER.encode()[:20]}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link").symlink_to(path)

    assert journal.is_journal(str(path))
    assert not any(journal.is_journal(str(tmp_path / name)) for name in [*others, "link", "missing", "."])


def test_only_whole_records_of_this_store_are_found_and_the_others_told(log: Journal, path: Path) -> None:
    append_many(log, 10)
    foreign = Draft(bytes(16), EPOCH).pack(DURABLE, 99, 0, 99, 0, 0, 0)
    log.close()
    raw = bytearray(path.read_bytes())
    raw[HEADER_NBYTES + 2 * NBYTES + 50] ^= 4
    raw[HEADER_NBYTES + 4 * NBYTES : HEADER_NBYTES + 5 * NBYTES] = foreign
    raw[HEADER_NBYTES + 5 * NBYTES : HEADER_NBYTES + 6 * NBYTES] = bytes(NBYTES)
    path.write_bytes(raw + foreign + b"torn")

    found = content_of(path)

    assert found.records["sequence"].tolist() == found.index.tolist() == [0, 1, 3, 6, 7, 8, 9]
    assert found.damaged.tolist() == [2, 4, 5]
    assert found.count == 10


@pytest.mark.parametrize("tail", [b"", b"x", b"x" * NBYTES, bytes(500), bytes(NBYTES) + b"y" * 90])
def test_a_torn_tail_is_no_damage_and_is_written_over(log: Journal, path: Path, tail: bytes) -> None:
    append_many(log, 3)
    log.close()
    path.write_bytes(path.read_bytes() + tail)

    found = content_of(path)
    assert (found.count, found.records.tobytes(), len(found.damaged)) == (3, made(3), 0)

    log = reopened(path)
    append_many(log, 4, 3)
    assert content_of(path).records.tobytes() == made(7)
    log.close()


def test_a_journal_of_garbage_only_holds_nothing(log: Journal, path: Path) -> None:
    log.close()
    path.write_bytes(path.read_bytes() + np.random.default_rng(0).bytes(100 * NBYTES))

    found = content_of(path)

    assert (found.count, len(found.records), len(found.damaged)) == (0, 0, 0)
