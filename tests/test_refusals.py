"""What cannot be done is refused with one clear exception, and nothing is left behind. Each in a process of its own."""

import errno
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import PORTABLE, run_python

PRELUDE = """
import json, os, resource, socket, sys, warnings
import numpy as np
import blockstore as bs

folder = sys.argv[1]
path = os.path.join(folder, "data.bin")

def refused(call):
    try:
        outcome = {"returned": repr(call())}
    except BaseException as error:
        outcome = {
            "kinds": [kind.__name__ for kind in type(error).__mro__],
            "text": str(error),
            "errno": getattr(error, "errno", None),
            "others": repr(error.__cause__ or (None if error.__suppress_context__ else error.__context__)),
        }
    print(json.dumps(outcome), flush=True)

def enter(r, *args, **options):
    with r.writer(*args, **options):
        pass
"""


@dataclass(frozen=True)
class Case:
    """A call that is refused: what comes before it, and what the refusal looks like."""

    call: str
    kinds: tuple[str, ...]
    text: str
    before: str = ""
    left: tuple[str, ...] = ()
    code: int | None = None


def outcomes(script: str, folder: Path, **how: Any) -> list[Any]:
    """Run a script, which ends by itself and in order, and return what it printed, a JSON value a line."""
    done = run_python(PRELUDE + script, folder, **how)
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr}"
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(outcome: dict[str, Any], case: Case) -> None:
    """Check that an outcome is the refusal that is expected, and no other exception comes with it."""
    assert "returned" not in outcome, outcome
    assert set(case.kinds) <= set(outcome["kinds"]), outcome
    assert re.search(case.text, outcome["text"]), outcome["text"]
    assert outcome["others"] == "None"
    if case.code is not None:
        assert outcome["errno"] == case.code


# -- no file to be had ----------------------------------------------------------------------------

NO_FILE = {
    "a file that exists": Case(
        "bs.create(path, 4096)",
        ("FileExistsError", "OSError"),
        r"the file exists; open\(\) it, or pass overwrite=True to replace it: '.*data\.bin'",
        "open(path, 'wb').write(b'precious')",
        ("data.bin",),
        errno.EEXIST,
    ),
    "a folder that is missing": Case(
        "bs.create(os.path.join(folder, 'missing', 'data.bin'), 4096)",
        ("FileNotFoundError", "OSError"),
        "No such file or directory: '.*missing",
        code=errno.ENOENT,
    ),
    "a folder that is a file": Case(
        "bs.create(os.path.join(path, 'data.bin'), 4096)",
        ("NotADirectoryError", "OSError"),
        r"Not a directory: '.*data\.bin",
        "open(path, 'wb').write(b'precious')",
        ("data.bin",),
    ),
    "a folder as the path": Case(
        "bs.create(path, 4096)",
        ("NotRegularFileError", "BlockStoreError", "OSError"),
        r"a store needs a regular file, this is a directory: '.*data\.bin'",
        "os.mkdir(path)",
        ("data.bin",),
        errno.EISDIR,
    ),
    "a folder to overwrite": Case(
        "bs.create(path, 4096, overwrite=True)",
        ("NotRegularFileError", "BlockStoreError", "OSError"),
        "this is a directory",
        "os.mkdir(path)",
        ("data.bin",),
    ),
    "a FIFO to overwrite": Case(
        "bs.create(path, 4096, overwrite=True)",
        ("NotRegularFileError", "BlockStoreError", "OSError"),
        "a store needs a regular file, this is a FIFO",
        "os.mkfifo(path)",
        ("data.bin",),
        errno.EINVAL,
    ),
    "a socket to overwrite": Case(
        "bs.create(path, 4096, overwrite=True)",
        ("NotRegularFileError", "BlockStoreError", "OSError"),
        "a store needs a regular file, this is a socket",
        "os.chdir(folder); socket.socket(socket.AF_UNIX).bind('data.bin')",
        ("data.bin",),
    ),
    "a device to overwrite": Case(
        "bs.create('/dev/null', 4096, overwrite=True)",
        ("NotRegularFileError", "BlockStoreError", "OSError"),
        "a store needs a regular file, this is a device: '/dev/null'",
    ),
    "a name that is too long": Case("bs.create(path * 300, 4096)", ("OSError",), "File name too long"),
    "a name with a zero byte": Case("bs.create(path + '\\0', 4096)", ("ValueError",), "embedded null"),
    "a number as the path": Case("bs.create(1, 4096)", ("TypeError",), "expected str, bytes or os.PathLike object"),
    "open: a file that is missing": Case(
        "bs.open(path)", ("FileNotFoundError", "OSError"), r"No such file or directory: '.*data\.bin'"
    ),
    "open: a folder that is missing": Case(
        "bs.open(os.path.join(folder, 'missing', 'data.bin'))",
        ("FileNotFoundError", "OSError"),
        r"No such file or directory: '.*missing/data\.bin'",
    ),
    "open: a folder": Case(
        "bs.open(folder)",
        ("NotRegularFileError", "BlockStoreError", "OSError"),
        "this is a directory",
        code=errno.EISDIR,
    ),
    "open: a folder to read": Case(
        "bs.open(folder, mode='r')",
        ("NotRegularFileError", "BlockStoreError", "OSError"),
        "this is a directory",
        code=errno.EISDIR,
    ),
    "open: a FIFO that nobody writes to": Case(
        "bs.open(path, mode='r')",
        ("NotRegularFileError", "BlockStoreError", "OSError"),
        "a store needs a regular file, this is a FIFO",
        "os.mkfifo(path)",
        ("data.bin",),
    ),
    "open: a FIFO that nobody reads from": Case(
        "bs.open(path)",
        ("NotRegularFileError", "BlockStoreError", "OSError"),
        "a store needs a regular file, this is a FIFO",
        "os.mkfifo(path)",
        ("data.bin",),
    ),
    "open: a socket": Case(
        "bs.open(path)",
        ("NotRegularFileError", "BlockStoreError", "OSError"),
        "a store needs a regular file, this is a socket",
        "os.chdir(folder); socket.socket(socket.AF_UNIX).bind('data.bin')",
        ("data.bin",),
    ),
    "open: a device": Case(
        "bs.open('/dev/null')",
        ("NotRegularFileError", "BlockStoreError", "OSError"),
        "a store needs a regular file, this is a device: '/dev/null'",
    ),
    "open: an empty file": Case(
        "bs.open(path)",
        ("LayoutError", "BlockStoreError", "ValueError"),
        r"data\.bin' is empty: there is nothing to map",
        "open(path, 'wb').close()",
        ("data.bin",),
    ),
    "open: a symlink to nothing": Case(
        "bs.open(path)",
        ("FileNotFoundError",),
        "No such file or directory",
        "os.symlink('missing', path)",
        ("data.bin",),
    ),
    "open: a symlink to itself": Case(
        "bs.open(path)",
        ("OSError",),
        "Too many levels of symbolic links",
        "os.symlink('data.bin', path)",
        ("data.bin",),
    ),
}


@pytest.mark.parametrize("name", NO_FILE)
def test_where_no_file_is_to_be_had_it_is_said_so(tmp_path: Path, name: str) -> None:
    case = NO_FILE[name]
    before = f"{case.before}\nkept = open(path, 'rb').read() if os.path.isfile(path) else None\n"
    after = "\nprint(json.dumps(kept == (open(path, 'rb').read() if os.path.isfile(path) else None)))"

    outcome, kept = outcomes(f"{before}refused(lambda: {case.call}){after}", tmp_path)

    check(outcome, case)
    assert kept
    assert sorted(os.listdir(tmp_path)) == list(case.left)


# -- sizes that make no sense ---------------------------------------------------------------------

SIZES = {
    "zero": ("0", ("LayoutError", "ValueError"), "1 to 2\\*\\*62 bytes, 0 were asked for"),
    "negative": ("-4096", ("LayoutError", "ValueError"), "1 to 2\\*\\*62 bytes, -4096 were asked for"),
    "2**62": ("2**62", ("OSError",), f"{2**62}"),
    "2**63": ("2**63", ("LayoutError", "ValueError"), f"{2**63} were asked for"),
    "2**100": ("2**100", ("LayoutError", "ValueError"), f"{2**100} were asked for"),
    "past the disk": ("2**50", ("OSError",), rf"cannot reserve {2**50} bytes: the disk has \d+ bytes left"),
    "past the address space": ("2**50, reserve=False", ("OSError",), f"{2**50}"),
    "past what any file has": ("2**62, reserve=False", ("OSError",), f"{2**62}"),
    "float": ("4096.0", ("TypeError",), "'float' object cannot be interpreted as an integer"),
    "None": ("None", ("TypeError",), "'NoneType' object cannot be interpreted as an integer"),
    "string": ("'4096'", ("TypeError",), "'str' object cannot be interpreted as an integer"),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_file_of_a_size_that_makes_no_sense_is_not_created(tmp_path: Path, name: str) -> None:
    arguments, kinds, text = SIZES[name]

    (outcome,) = outcomes(f"refused(lambda: bs.create(path, {arguments}))", tmp_path)

    check(outcome, Case("", kinds, text))
    assert os.listdir(tmp_path) == []


# -- a system that has no more to give ------------------------------------------------------------

LIMITED = {
    "no more file than 1 MiB": (
        "RLIMIT_FSIZE",
        1 << 20,
        Case(
            "bs.create(path, 1 << 21)", ("OSError",), "cannot reserve 2097152 bytes: File too large", code=errno.EFBIG
        ),
    ),
    "no more sparse file than 1 MiB": (
        "RLIMIT_FSIZE",
        1 << 20,
        Case("bs.create(path, 1 << 21, reserve=False)", ("OSError",), "2097152.*File too large", code=errno.EFBIG),
    ),
    "no more memory than 8 GiB": (
        "RLIMIT_AS",
        1 << 33,
        Case("bs.create(path, 1 << 34, reserve=False)", ("OSError",), f"{1 << 34}.*Cannot allocate memory"),
    ),
}


@pytest.mark.parametrize("name", LIMITED)
def test_a_limit_of_the_system_is_an_error_and_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    limit, value, case = LIMITED[name]

    refusal, usable = outcomes(
        f"""
resource.setrlimit(resource.{limit}, ({value}, {value}))
refused(lambda: {case.call})
with bs.create(os.path.join(folder, "small.bin"), 4096) as store:
    print(json.dumps(store.allocate(5).write(b"hello").nbytes))
""",
        tmp_path,
    )

    check(refusal, case)
    assert usable == 5
    assert sorted(os.listdir(tmp_path)) == ["small.bin", "small.bin.journal"]


SPARE_DESCRIPTORS = """
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

def create():
    global store
    store = bs.create(path, 4096)

for spare in range(16):
    store, taken = None, []
    try:
        while True:
            taken.append(os.open("/", os.O_RDONLY))
    except OSError:
        for _ in range(spare):
            os.close(taken.pop())
    refused(create)
    for fd in taken:
        os.close(fd)
    print(json.dumps(sorted(os.listdir(folder))))
    if store is not None:
        store.close()
    for name in os.listdir(folder):
        os.unlink(os.path.join(folder, name))
"""


def test_a_creation_without_enough_descriptors_leaves_nothing_behind(tmp_path: Path) -> None:
    results = outcomes(SPARE_DESCRIPTORS, tmp_path)

    created = ["returned" in outcome for outcome in results[::2]]
    for outcome, ours in zip(results[::2], created, strict=True):
        if not ours:
            check(outcome, Case("", ("OSError",), "Too many open files", code=errno.EMFILE))
    assert results[1::2] == [["data.bin", "data.bin.journal"] if ours else [] for ours in created]
    assert (created[0], created[-1]) == (False, True)


# -- disks ----------------------------------------------------------------------------------------


def mounted(options: str, folder: Path) -> list[str]:
    """Return what a command must be run under to find a small file system mounted on a folder, or skip.

    It is mounted in a namespace of its own, so that it is gone with the command.
    """
    unshare, mount = shutil.which("unshare"), shutil.which("mount")
    if unshare is None or mount is None:
        pytest.skip("needs unshare and mount")
    script = f'"$0" -t tmpfs -o {options} tmpfs "$1" || exit 77; shift; exec "$@"'
    under = [unshare, "--mount", "sh", "-c", script, mount, str(folder)]
    tried = subprocess.run([*under, "true"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip("nothing may be mounted here")
    return under


@pytest.fixture
def small_disk(tmp_path: Path) -> list[str]:
    return mounted("size=1m", tmp_path)


@pytest.fixture
def read_only_disk(tmp_path: Path) -> list[str]:
    return mounted("ro", tmp_path)


def test_a_full_disk_is_an_error_at_creation(tmp_path: Path, small_disk: list[str]) -> None:
    refusal, left = outcomes(
        "refused(lambda: bs.create(path, 2 << 20))\nprint(json.dumps(os.listdir(folder)))", tmp_path, under=small_disk
    )

    text = r"cannot reserve 2097152 bytes: the disk has 1048576 bytes left: '.*data\.bin'"
    check(refusal, Case("", ("OSError",), text, code=errno.ENOSPC))
    assert left == []


def test_what_fits_on_a_full_disk_goes_on(tmp_path: Path, small_disk: list[str]) -> None:
    script = """
warnings.simplefilter("ignore", bs.FileSystemWarning)
store = bs.create(path, 400 << 10)
refused(lambda: bs.create(os.path.join(folder, "other.bin"), 600 << 10))
refused(lambda: bs.create(path, 600 << 10, overwrite=True))
for r in store.ranges(4096):
    r.write(bytes([7]) * 4096)
store.flush()
print(json.dumps([len(store.receipts()), sorted(os.listdir(folder)), len(open(path, "rb").read().strip(bytes([7])))]))
store.close()
bs.create(os.path.join(folder, "rest.bin"), 400 << 10).close()
"""
    other, overwrite, after = outcomes(script, tmp_path, under=small_disk)

    for refusal in (other, overwrite):
        text = r"cannot reserve 614400 bytes: the disk has \d+ bytes left"
        check(refusal, Case("", ("OSError",), text, code=errno.ENOSPC))
    assert after == [100, ["data.bin", "data.bin.journal"], 0]


def test_a_file_that_fits_without_its_journal_is_not_created(tmp_path: Path, small_disk: list[str]) -> None:
    script = """
warnings.simplefilter("ignore", bs.FileSystemWarning)
refused(lambda: bs.create(path, 1 << 20))
print(json.dumps(os.listdir(folder)))
"""

    refusal, left = outcomes(script, tmp_path, under=small_disk)

    text = r"cannot reserve \d+ bytes: the disk has 0 bytes left: '.*data\.bin\.journal\.new'"
    check(refusal, Case("", ("OSError",), text, code=errno.ENOSPC))
    assert left == []


def test_a_record_that_finds_no_space_is_an_error_and_the_store_goes_on_when_there_is_some(
    tmp_path: Path, small_disk: list[str]
) -> None:
    script = """
warnings.simplefilter("ignore", bs.FileSystemWarning)
store = bs.create(path, 8192)
r = store.allocate(4)
kept = store.allocate(4).write(b"kept")
r.write(b"0000")
with open(os.path.join(folder, "filler"), "wb", buffering=0) as filler:
    try:
        while filler.write(bytes(4096)):
            pass
    except OSError:
        pass

def rewrite_until_refused():
    for number in range(10_000):
        r.write(b"%04d" % number, rewrite=True)

refused(rewrite_until_refused)
print(json.dumps([r.receipt is None, kept.revoked, len(store.receipts())]))
os.unlink(os.path.join(folder, "filler"))
r.write(b"last", rewrite=True)
store.close()
with bs.open(path) as store:
    print(json.dumps([store.raw.read_at(0, 4).decode(), store.receipts()["start"].tolist()]))
"""
    refusal, (unwritten, revoked, receipts), after = outcomes(script, tmp_path, under=small_disk)

    check(
        refusal, Case("", ("OSError",), r"cannot reserve \d+ bytes for the journal: No space left", code=errno.ENOSPC)
    )
    assert (receipts, revoked) == (1 if unwritten else 2, False)
    assert after == ["last", [0, 4096]]


@pytest.mark.skipif(PORTABLE, reason="the portable road is a copy through the map")
def test_a_sparse_file_on_a_full_disk_is_an_error_where_a_write_finds_no_space(
    tmp_path: Path, small_disk: list[str]
) -> None:
    script = """
warnings.simplefilter("ignore", bs.FileSystemWarning)
store = bs.create(path, 2 << 20, reserve=False, access="sparse")
rs = store.allocate_many(2, 1 << 19)
rs[0].write(bytes(1 << 19))
refused(lambda: rs[1].write(bytes(1 << 19)))
print(json.dumps([rs[1].receipt, store.flush(), store.receipts()["start"].tolist()]))
store.close()
"""
    refusal, after = outcomes(script, tmp_path, under=small_disk)

    check(refusal, Case("", ("OSError",), "No space left on device", code=errno.ENOSPC))
    assert after == [None, 0, [0]]


def test_nothing_is_created_on_a_read_only_disk(tmp_path: Path, read_only_disk: list[str]) -> None:
    refusal, left = outcomes(
        "refused(lambda: bs.create(path, 4096))\nprint(json.dumps(os.listdir(folder)))", tmp_path, under=read_only_disk
    )

    check(refusal, Case("", ("OSError",), "Read-only file system", code=errno.EROFS))
    assert left == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_nothing_is_created_in_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        (refusal,) = outcomes("refused(lambda: bs.create(path, 4096))", tmp_path)
    finally:
        tmp_path.chmod(0o755)

    check(refusal, Case("", ("PermissionError", "OSError"), "Permission denied", code=errno.EACCES))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_written_is_opened_to_read_only(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"hello")
    (tmp_path / "data.bin").chmod(0o444)

    refusal, read = outcomes(
        "refused(lambda: bs.open(path))\n"
        "with bs.open(path, mode='r') as store: print(json.dumps(store.raw.read_at(0, 5).decode()))",
        tmp_path,
    )

    check(refusal, Case("", ("PermissionError", "OSError"), "Permission denied", code=errno.EACCES))
    assert read == "hello"


# -- a store that is asked for what it does not do ------------------------------------------------

SETUP = """
store = bs.create(path, 1 << 16)
other = bs.create(os.path.join(folder, "other.bin"), 1 << 16)
spent = store.allocate(5000)
spent.split_up(4096)
written = store.allocate(8)
written.write(b"12345678")
busy = store.allocate(8)
inside = busy.writer()
inside.__enter__()
typed = store.allocate(shape=(2, 3), dtype="i4")
foreign = other.allocate(8).write(b"12345678")
fresh = store.allocate(8)
before = store.free, store.allocator.next_start, store.raw.read_at(0, 1 << 16)
"""

AFTERWARDS = """
print(json.dumps((store.free, store.allocator.next_start, store.raw.read_at(0, 1 << 16)) == before))
inside.__exit__(None, None, None)
with fresh.writer() as a:
    a[:] = list(b"87654321")
store.flush(fresh.receipt)
print(json.dumps([fresh.receipt.durable, busy.receipt.durable, fresh.read().tobytes().decode()]))
closed = [store.close(), other.close()]
"""

USES = {
    "allocate 0": Case("store.allocate(0)", ("ValueError",), "cannot allocate 0 bytes: ask for at least 1"),
    "allocate -1": Case("store.allocate(-1)", ("ValueError",), "cannot allocate -1 bytes: ask for at least 1"),
    "allocate too much": Case(
        "store.allocate(1 << 16)",
        ("OutOfSpaceError", "BlockStoreError", "OSError"),
        "cannot allocate 65536 bytes: 40960 bytes are free",
        code=errno.ENOSPC,
    ),
    "allocate 2**62": Case("store.allocate(2**62)", ("OutOfSpaceError", "OSError"), f"cannot allocate {2**62} bytes"),
    "allocate 2**63": Case("store.allocate(2**63)", ("OutOfSpaceError", "OSError"), f"cannot allocate {2**63} bytes"),
    "allocate 2**100": Case("store.allocate(2**100)", ("OutOfSpaceError", "OSError"), f"{2**100} bytes: 40960 bytes"),
    "allocate 1.5": Case("store.allocate(1.5)", ("TypeError",), "a byte count is an int, not 1.5"),
    "allocate nothing in particular": Case("store.allocate()", ("TypeError",), "a byte count is an int, not None"),
    "allocate a string": Case("store.allocate('8')", ("TypeError",), "a byte count is an int, not '8'"),
    "allocate an empty array": Case("store.allocate(shape=0, dtype='f8')", ("ValueError",), "cannot allocate 0 bytes"),
    "allocate a negative array": Case(
        "store.allocate(shape=-1, dtype='f8')", ("LayoutError", "ValueError"), r"shape \(-1,\) has a negative axis"
    ),
    "allocate an absurd array": Case(
        "store.allocate(shape=2**100, dtype='f8')", ("LayoutError", "ValueError"), "more than NumPy can address"
    ),
    "allocate objects": Case(
        "store.allocate(shape=1, dtype='O')", ("DtypeError", "BlockStoreError", "TypeError"), "holds Python objects"
    ),
    "allocate with a negative tag": Case("store.allocate(8, tag=-1)", ("ValueError",), "a tag is 64 bits.* not -1"),
    "allocate too many": Case(
        "store.allocate_many(11, 4096)", ("OutOfSpaceError",), "cannot allocate 45056 bytes: 40960 bytes are free"
    ),
    "allocate absurdly many": Case("store.allocate_many(2**62, 1)", ("OutOfSpaceError",), "40960 bytes are free"),
    "ranges of 0": Case("store.ranges(0).__next__()", ("ValueError",), "cannot allocate 0 bytes"),
    "flush a foreign receipt": Case(
        "store.flush(foreign)",
        ("ForeignRangeError", "BlockStoreError", "ValueError"),
        r"is of <BlockStore 'other\.bin'.* not of <BlockStore 'data\.bin'",
    ),
    "flush a range": Case(
        "store.flush([written])", ("TypeError",), "flush takes receipts, such as r.receipt, not <AllocatedRange"
    ),
    "write a spent range": Case(
        "spent.write(bytes(5000))",
        ("SpentRangeError", "RangeStateError", "BlockStoreError", "ValueError"),
        r"cannot write range \[0, 8192\): it was split",
    ),
    "enter a spent range": Case("enter(spent)", ("SpentRangeError", "ValueError"), "it was split: use its parts"),
    "read a spent range": Case("spent.read()", ("SpentRangeError", "ValueError"), "it was split: use its parts"),
    "read a fresh range": Case("fresh.read()", ("NotWrittenError", "ValueError"), "no writer has left it cleanly"),
    "write a written range": Case(
        "written.write(b'87654321')", ("AlreadyWrittenError", "ValueError"), r"range \[8192, 12288\).*rewrite=True"
    ),
    "write a busy range": Case(
        "busy.write(b'87654321')",
        ("WriterBusyError", "ValueError"),
        r"range \[12288, 16384\): another writer is inside",
    ),
    "write 7 bytes": Case(
        "fresh.write(b'1234567')",
        ("LengthError", "BlockStoreError", "ValueError"),
        "takes exactly 8 bytes, 7 bytes were given",
    ),
    "write 9 bytes": Case("fresh.write(b'123456789')", ("LengthError", "ValueError"), "9 bytes were given"),
    "write a list": Case("fresh.write([0] * 8)", ("TypeError",), "a contiguous bytes-like object or an array"),
    "write another dtype": Case(
        "typed.write(np.zeros((2, 3), 'f4'))",
        ("DtypeError", "BlockStoreError", "TypeError"),
        "the range holds int32, an array of float32 was given",
    ),
    "write another shape": Case(
        "typed.write(np.zeros((3, 2), 'i4'))",
        ("LayoutError", "BlockStoreError", "ValueError"),
        r"the range has shape \(2, 3\), an array of shape \(3, 2\) was given",
    ),
    "a writer that is too long": Case(
        "fresh.writer(2, 'f8')", ("LayoutError", "ValueError"), "needs 16 bytes, the range has 8"
    ),
    "a writer of a fraction": Case(
        "fresh.writer(dtype='c16')", ("LayoutError", "ValueError"), "are no whole number of"
    ),
    "split out of bounds": Case(
        "fresh.split_up(9)", ("ValueError",), r"offset 9 is out of bounds: range \[20480, 24576\) has 8 bytes"
    ),
    "split at a fraction": Case("fresh.split_up(0.5)", ("TypeError",), "'float' object cannot be interpreted"),
    "raw past the end": Case(
        "store.raw.write_at(65535, b'12')",
        ("LayoutError", "BlockStoreError", "ValueError"),
        r"bytes \[65535, 65537\) are not all in the file, which has 65536 bytes",
    ),
    "raw at an absurd offset": Case("store.raw.read_at(2**64, 1)", ("LayoutError", "ValueError"), "are not all in"),
    "open what is open": Case(
        "bs.open(path)",
        ("StoreInUseError", "BlockStoreError", "BlockingIOError", "OSError"),
        r"cannot open '.*data\.bin' for writing: <BlockStore 'data\.bin'.* of this process has it open; mode='r'",
    ),
    "discard what is open": Case(
        "bs.open(path, discard=True)",
        ("StoreInUseError", "BlockStoreError", "BlockingIOError", "OSError"),
        r"cannot open '.*data\.bin' for writing: <BlockStore 'data\.bin'.* of this process has it open; mode='r'",
    ),
    "create what is open": Case("bs.create(path, 4096)", ("FileExistsError", "OSError"), "the file exists"),
    "an allocator that does not exist": Case(
        "bs.create(path + '2', 4096, allocator='best')",
        ("ValueError",),
        "allocator is one of 'sequential', 'concurrent'",
    ),
}

UNDER_OPTIMIZATION = [
    "allocate 0",
    "allocate too much",
    "allocate an empty array",
    "flush a foreign receipt",
    "write a spent range",
    "write a written range",
    "write a busy range",
    "write 7 bytes",
    "write another dtype",
    "raw past the end",
]


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(name, (), id=name) for name in USES]
    + [pytest.param(name, ("-O",), id=f"{name}, optimized") for name in UNDER_OPTIMIZATION],
)
def test_what_a_store_does_not_do_is_refused_and_it_goes_on(
    tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    script = f"{SETUP}refused(lambda: {USES[name].call}){AFTERWARDS}"

    outcome, unchanged, after = outcomes(script, tmp_path, options=options)

    check(outcome, USES[name])
    assert unchanged
    assert after == [True, True, "87654321"]
    names = ["data.bin", "data.bin.journal", "other.bin", "other.bin.journal"]
    assert sorted(os.listdir(tmp_path)) == names


CLOSED = {
    "allocate": "store.allocate(8)",
    "allocate_many": "store.allocate_many(2, 8)",
    "ranges": "store.ranges(8)",
    "next of ranges": "next(rest)",
    "flush": "store.flush()",
    "flush a receipt": "store.flush(receipt)",
    "sync": "store.sync()",
    "raw.write_at": "store.raw.write_at(0, b'x')",
    "raw.read_at": "store.raw.read_at(0, 1)",
    "raw.array": "store.raw.array(0, 1)",
    "raw.address": "store.raw.address()",
    "enter": "enter(fresh)",
    "write": "fresh.write(b'12345678')",
    "rewrite": "written.write(b'87654321', rewrite=True)",
    "read": "written.read()",
    "split": "fresh.split_up(0)",
}


@pytest.mark.parametrize("options", [(), ("-O",)], ids=["plain", "optimized"])
def test_whatever_is_asked_of_a_closed_store_is_refused(tmp_path: Path, options: tuple[str, ...]) -> None:
    script = """
store = bs.create(path, 1 << 16)
fresh, written, rest = store.allocate(8), store.allocate(8), store.ranges(8)
receipt = written.write(b"12345678")
store.close()
""" + "".join(f"refused(lambda: {call})\n" for call in CLOSED.values())

    results = outcomes(script, tmp_path, options=options)

    assert len(results) == len(CLOSED)
    for outcome in results:
        kinds = ("ClosedStoreError", "BlockStoreError", "ValueError")
        check(outcome, Case("", kinds, r"the store of '.*data\.bin' is closed"))
    assert (tmp_path / "data.bin").read_bytes()[4096:4104] == b"12345678"
