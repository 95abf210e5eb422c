"""Foreign files: what others made is read, or refused with a reason; what is damaged or hostile is a typed error.

All of it goes through `open_array` on whole files. Pure functions are fuzzed in test_layouts_npy and test_layouts_zarr.
"""

import contextlib
import copy
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from support import in_child, run_python

import blockstore as bs
from blockstore.draft import draft_of, working_of

A = np.arange(60, dtype="<i4").reshape(10, 6)
MODES: tuple[Literal["r", "r+"], ...] = ("r", "r+")
REFUSALS = (bs.FormatError, bs.JournalMismatchError)

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs what POSIX has")


def read(path: Path, mode: Literal["r", "r+"] = "r", **options: Any) -> NDArray[Any]:
    """Open an array, read all of it in two ways that must agree, and return a copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = bs.open_array(path, mode=mode, **options)
        try:
            a = np.array(x)
            written = x.written
            assert (a.shape, a.dtype, written.shape) == (x.shape, x.dtype, x.blocks.shape)
            assert f"{np.count_nonzero(written)} written" in repr(x)
            for b in x.blocks:
                part = b.read()
                assert np.array_equal(part.view("V1") if part.dtype.kind == "V" else part, a[b.slices]) or (
                    part.tobytes() == a[b.slices].tobytes()
                )
            assert [b.index for b in x.pending()] == [tuple(i) for i in np.argwhere(~written).tolist()]
            return a
        finally:
            x._files.close(publish=False)


def same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays have the same values, to the bit, in whatever byte order."""
    return a.shape == b.shape and a.tobytes() == b.astype(a.dtype).tobytes()


# -- .npy files of NumPy ------------------------------------------------------------------------------------

NPY: dict[str, NDArray[Any]] = {
    "C order": A,
    "Fortran order": np.asfortranarray(A),
    "big endian": A.astype(">f8"),
    "a transposed view": np.zeros((3, 4, 5), "i1").transpose(),
    "bool": np.ones((3, 3), bool),
    "complex": A.astype("c16") * 1j,
    "long double": np.linspace(0, 1, 7, dtype=np.longdouble),
    "text": np.array(["a", "bc"]),
    "text, big endian": np.array(["a", "bc"], ">U3"),
    "bytes": np.array([b"a", b"bc"]),
    "dates": np.array(["2020-01-01", "NaT"], "M8[D]"),
    "durations": np.array([3, 4], "m8[25us]"),
    "void": np.frombuffer(b"12345abcde", "V5"),
    "empty": np.zeros((0, 3)),
    "empty within": np.zeros((3, 0, 2), ">i2"),
    "32 axes": np.arange(4.0).reshape((2, 2) + (1,) * 30),
}
UNWRITABLE = {"Fortran order", "a transposed view", "long double", "void", "text", "text, big endian", "bytes"} | {
    "dates",
    "durations",
}


def save(path: Path, a: NDArray[Any], version: tuple[int, int] | None = None) -> None:
    with path.open("wb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.lib.format.write_array(file, a, version)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)], ids=["1", "2", "3"])
@pytest.mark.parametrize("name", NPY)
def test_what_numpy_saved_is_read(name: str, version: tuple[int, int], tmp_path: Path) -> None:
    a = NPY[name]
    save(tmp_path / "x.npy", a, version)
    found = read(tmp_path / "x.npy")

    assert found.dtype == a.dtype
    assert same(found, a)


@pytest.mark.parametrize("name", NPY)
def test_what_numpy_saved_is_rewritten_or_refused_with_what_would_work(name: str, tmp_path: Path) -> None:
    a, path = NPY[name], tmp_path / "x.npy"
    save(path, a)
    before = path.read_bytes()
    if name in UNWRITABLE:
        with pytest.raises(bs.FormatError, match=re.escape(f"({a.dtype})") + ".*mode='r' reads it"):
            bs.open_array(path)
        assert path.read_bytes() == before
        return
    with bs.open_array(path) as x:
        for b in x.blocks:
            b.write(np.ones(b.shape, b.dtype), rewrite=True)
        assert path.read_bytes() == before
    found = np.load(path)

    assert found.dtype == a.dtype
    assert same(found, np.ones_like(a))


@pytest.mark.parametrize(
    ("a", "match"),
    [
        pytest.param(np.zeros(3, [("a", "i4"), ("b", "f8")]), "fields.*supported is every dtype", id="fields"),
        pytest.param(np.array([1, None], object), "Python objects.*supported is every dtype", id="objects"),
        pytest.param(np.array(3.0), "no axis.*numpy.load reads it", id="no axis"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_what_numpy_saved_of_no_use_here_is_refused(
    a: NDArray[Any], match: str, mode: Literal["r", "r+"], tmp_path: Path
) -> None:
    save(tmp_path / "x.npy", a)
    with pytest.raises(bs.FormatError, match=match):
        bs.open_array(tmp_path / "x.npy", mode=mode)


# -- Zarr arrays of zarr-python and tensorstore -------------------------------------------------------------


def zarr_python(path: Path, a: NDArray[Any] = A, *, some: bool = False, **options: Any) -> None:
    """Write an array by zarr-python, or of `some` only the first block."""
    zarr = pytest.importorskip("zarr")
    given = {"chunks": (4, 3), "compressors": None, "dtype": a.dtype, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        z = zarr.create_array(str(path), shape=a.shape, **given)
        if some:
            z[:4, :3] = a[:4, :3]
        else:
            z[...] = a


def by_zarr_python(path: Path) -> NDArray[Any]:
    zarr = pytest.importorskip("zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(zarr.open_array(str(path), mode="r")[...])


def indexed(location: str, *codecs: str) -> dict[str, Any]:
    """Return the options of shards whose index is so."""
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

    made = {"little": BytesCodec(), "big": BytesCodec(endian="big"), "crc": Crc32cCodec()}
    index_codecs = [made[name] for name in codecs]
    inner = {"chunk_shape": (4, 3), "codecs": [BytesCodec()], "index_codecs": index_codecs}
    return {"chunks": (8, 6), "serializer": ShardingCodec(**inner, index_location=location)}


def key(name: str, separator: str) -> dict[str, Any]:
    return {"chunk_key_encoding": {"name": name, "separator": separator}}


def big_endian() -> dict[str, Any]:
    from zarr.codecs import BytesCodec

    return {"serializer": BytesCodec(endian="big")}


READ: dict[str, tuple[Callable[[], dict[str, Any]], bool]] = {
    "chunks": (dict, False),
    "chunks, some": (lambda: {"some": True, "fill_value": -5}, False),
    "chunks, big endian": (big_endian, False),
    "chunks, keys of v2": (lambda: key("v2", "."), False),
    "chunks, keys of v2 with /": (lambda: key("v2", "/"), False),
    "chunks, keys with points": (lambda: key("default", "."), False),
    "chunks, attributes and names": (lambda: {"attributes": {"a": [1.5]}, "dimension_names": ("y", None)}, False),
    "shards": (lambda: {"shards": (8, 6)}, True),
    "shards, some": (lambda: {"shards": (8, 6), "some": True, "fill_value": 7}, True),
    "one shard, some": (lambda: {"shards": (12, 6), "some": True, "fill_value": -1}, True),
    "shards, keys with points": (lambda: {"shards": (8, 6), **key("v2", ".")}, True),
    "index at the end, no sum": (lambda: indexed("end", "little"), False),
    "index at the end, big endian": (lambda: indexed("end", "big", "crc"), False),
    "index at the start": (lambda: indexed("start", "little", "crc"), False),
    "index at the start, no sum": (lambda: indexed("start", "little"), False),
    "index at the start, big endian, no sum": (lambda: indexed("start", "big"), False),
}


@pytest.mark.parametrize("name", READ)
def test_what_zarr_python_wrote_is_read(name: str, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    zarr_python(tmp_path / "x.zarr", **READ[name][0]())

    assert same(read(tmp_path / "x.zarr"), by_zarr_python(tmp_path / "x.zarr"))


@pytest.mark.parametrize("name", READ)
def test_what_zarr_python_wrote_is_gone_on_with_or_refused_with_what_would_work(name: str, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    path = tmp_path / "x.zarr"
    options, writable = READ[name]
    zarr_python(path, **options())
    expected = by_zarr_python(path)
    if not writable:
        with pytest.raises(bs.FormatError, match="in a layout that blockstore does not write: mode='r' reads it"):
            bs.open_array(path)
        return
    with bs.open_array(path) as x:
        assert len(list(x.pending())) == (5 if "some" in name else 0)
        for b in [*x.pending()][:2]:
            b.write(np.full(b.shape, 99, "i4"))
            expected[b.slices] = 99
        x[8:, 3:] = 98
        expected[8:, 3:] = 98

    assert same(read(path), expected)
    assert same(by_zarr_python(path), expected)
    with bs.open_array(path, mode="r") as x:
        assert {each.name for each in path.rglob(".*")} == ({".filling.json"} if list(x.pending()) else set())


def codec(name: str, **options: Any) -> dict[str, Any]:
    import zarr.codecs

    made = getattr(zarr.codecs, name)(**options)
    return {"filters": [made]} if name == "TransposeCodec" else {"compressors": made}


def nested() -> dict[str, Any]:
    from zarr.codecs import BytesCodec, ShardingCodec

    inner = ShardingCodec(chunk_shape=(4, 3), codecs=[BytesCodec()])
    return {"chunks": (8, 6), "serializer": ShardingCodec(chunk_shape=(4, 6), codecs=[inner])}


TEXT = np.array(["a", "bcd"] * 3).reshape(3, 2)
REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], NDArray[Any], str]] = {
    "zstd": (lambda: codec("ZstdCodec"), A, r"codecs \['bytes', 'zstd'\] is not supported, but bytes, alone or in"),
    "gzip": (lambda: codec("GzipCodec"), A, r"codecs \['bytes', 'gzip'\] is not supported, but bytes"),
    "blosc": (lambda: codec("BloscCodec"), A, r"codecs \['bytes', 'blosc'\] is not supported, but bytes"),
    "crc32c of chunks": (lambda: codec("Crc32cCodec"), A, r"codecs \['bytes', 'crc32c'\] is not supported"),
    "zarr-python's default": (lambda: {"compressors": "auto"}, A, "'zstd'.*zarr.open_array may read it"),
    "shards of zstd": (lambda: {**codec("ZstdCodec"), "shards": (8, 6)}, A, r"inner codecs \['bytes', 'zstd'\]"),
    "transposed": (lambda: codec("TransposeCodec", order=(1, 0)), A, r"codecs \['transpose', 'bytes'\]"),
    "shards in shards": (nested, A, r"inner codecs \['sharding_indexed'\] is not supported"),
    "Zarr v2": (lambda: {"zarr_format": 2}, A, "of Zarr v2, blockstore reads v3: zarr.open reads it"),
    "strings": (lambda: {"dtype": str, "chunks": (2, 2)}, TEXT, "data_type 'string' is not supported, but bool, int8"),
    "text": (lambda: {"chunks": (2, 2)}, TEXT, "data_type 'fixed_length_utf32' is not supported"),
    "bytes": (lambda: {"chunks": (2, 2)}, TEXT.astype("S3"), "data_type 'null_terminated_bytes' is not supported"),
    "dates": (lambda: {"chunks": (2,)}, np.zeros(3, "M8[s]"), "data_type 'numpy.datetime64' is not supported"),
    "void": (lambda: {"chunks": (2,)}, np.zeros(3, "V5"), "data_type 'raw_bytes' is not supported"),
    "fields": (lambda: {"chunks": (2,)}, np.zeros(3, [("a", "i4")]), "data_type 'struct(ured)?' is not supported"),
    "no axis": (lambda: {"chunks": ()}, np.array(3.0), "without axes is not supported, but ranks from 1 up"),
    "NaN in attributes": (lambda: {"attributes": {"a": math.nan}}, A, "JSON has no NaN"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REFUSED)
def test_what_zarr_python_wrote_that_cannot_be_mapped_is_refused_with_what_was_found(
    name: str, mode: Literal["r", "r+"], tmp_path: Path
) -> None:
    pytest.importorskip("zarr")
    options, a, match = REFUSED[name]
    path = tmp_path / "x.zarr"
    try:
        zarr_python(path, a, **options())
    except (TypeError, ValueError) as error:
        pytest.skip(f"this zarr-python does not write it: {error}")
    with pytest.raises(bs.FormatError, match=match) as caught:
        bs.open_array(path, mode=mode)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("consolidated", [False, True])
def test_groups_are_refused_and_their_arrays_read(version: int, consolidated: bool, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    path = tmp_path / "g.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(str(path), mode="w", zarr_format=version)
        group.create_array("a", shape=A.shape, dtype="i4", chunks=(5, 6), compressors=None)[...] = A
        if consolidated:
            zarr.consolidate_metadata(str(path))
    with pytest.raises(bs.FormatError, match="is of Zarr v2" if version == 2 else "a Zarr group: give the path of one"):
        bs.open_array(path, mode="r")
    if version == 3:
        assert same(read(path / "a"), A)


@pytest.mark.parametrize("dtype", ["?", "i1", "u2", ">u4", "i8", "u8", "f2", ">f4", "f8", "c8", ">c16"])
def test_each_dtype_of_zarr_python_is_read_to_the_bit(dtype: str, tmp_path: Path) -> None:
    zarr_python(tmp_path / "x.zarr", (A * (1 + 1j if "c" in dtype else 1)).astype(dtype), shards=(8, 6))

    assert same(read(tmp_path / "x.zarr"), by_zarr_python(tmp_path / "x.zarr"))


LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}


def tensorstore(path: Path, codecs: list[Any] | None, shards: tuple[int, ...] = (8, 6)) -> None:
    ts = pytest.importorskip("tensorstore")
    metadata: dict[str, Any] = {"shape": A.shape, "data_type": "int32"}
    if codecs is not None:
        metadata |= {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shards}}, "codecs": codecs}
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}, "metadata": metadata}
    ts.open(spec, create=True).result().write(A).result()


def sharding(location: str, *more: str) -> list[Any]:
    configuration = {
        "chunk_shape": [4, 3],
        "codecs": [LITTLE, *({"name": name} for name in more)],
        "index_codecs": [LITTLE, {"name": "crc32c"}],
        "index_location": location,
    }
    return [{"name": "sharding_indexed", "configuration": configuration}]


@pytest.mark.parametrize(
    ("codecs", "match"),
    [
        pytest.param(None, None, id="default"),
        pytest.param([LITTLE], None, id="chunks"),
        pytest.param([{"name": "bytes", "configuration": {"endian": "big"}}], None, id="big endian"),
        pytest.param(sharding("end"), None, id="shards"),
        pytest.param(sharding("start"), None, id="index at the start"),
        pytest.param(sharding("end", "gzip"), r"inner codecs \['bytes', 'gzip'\] is not supported", id="gzip"),
        pytest.param(
            [{"name": "transpose", "configuration": {"order": [1, 0]}}, LITTLE],
            r"codecs \['transpose', 'bytes'\] is not supported",
            id="transposed",
        ),
    ],
)
def test_what_tensorstore_wrote_is_read_or_refused(codecs: list[Any] | None, match: str | None, tmp_path: Path) -> None:
    tensorstore(tmp_path / "x.zarr", codecs)
    if match is None:
        assert same(read(tmp_path / "x.zarr"), A)
    else:
        with pytest.raises(bs.FormatError, match=match):
            bs.open_array(tmp_path / "x.zarr", mode="r")


# -- what stands where a file should be ---------------------------------------------------------------------


def _socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


def _device(path: Path) -> None:
    try:
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        path.symlink_to("/dev/zero")


ODD: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: path.mkdir(),
    "a FIFO": lambda path: os.mkfifo(path),
    "a socket": _socket,
    "a device": _device,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "an empty file": lambda path: path.touch(),
}


def finished(folder: Path, kind: str) -> Path:
    path = folder / f"x.{kind}"
    with bs.create_array(path, shape=A.shape, dtype="i4", chunks=(4, 6)) as x:
        x[...] = A
    return path


def unfinished(folder: Path, kind: str, **options: Any) -> Path:
    """Make an array of which one block of three is written."""
    path = folder / f"u.{kind}"
    x = bs.create_array(path, shape=A.shape, dtype="i4", chunks=(4, 6), **options)
    x[4:8] = A[4:8]
    x.flush()
    x._files.close(publish=False)
    return path


def work_of(path: Path) -> Path:
    """Return the working file of an array of one file."""
    return Path(working_of(str(path if path.suffix == ".npy" else path / "c/0/0")))


def place(path: Path, odd: str) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    ODD[odd](path)


def refused_within_seconds(path: Path, mode: Literal["r", "r+"]) -> str:
    """Return what opening and reading says, which must be a typed error; whoever waits for a FIFO is ended."""

    def call() -> str:
        signal.alarm(5)
        try:
            read(path, mode)
        except (*REFUSALS, OSError) as error:
            return f"{type(error).__name__}: {error}"
        return "was read"

    return in_child(call)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("where", ["x.npy", "x.zarr", "x.zarr/zarr.json", "x.zarr/c/0/0"])
def test_what_is_no_file_is_refused_and_nobody_waits(
    where: str, odd: str, mode: Literal["r", "r+"], tmp_path: Path
) -> None:
    path = finished(tmp_path, where[2:6].rstrip("/"))
    place(tmp_path / where, odd)
    said = refused_within_seconds(path, mode)

    if odd == "a link to itself":
        assert re.match(r"OSError: \[Errno \d+\] Too many levels of symbolic links", said)
    elif odd == "a link to nothing" and where in ("x.npy", "x.zarr"):
        assert said.startswith("FileNotFoundError")
    else:
        assert said.startswith("FormatError"), said
    assert str(tmp_path) in said or "/dev/zero" in said


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_what_is_in_the_way_of_hidden_names_is_refused_by_an_unfinished_array(
    kind: str, odd: str, mode: Literal["r", "r+"], tmp_path: Path
) -> None:
    for where in (lambda path: Path(draft_of(str(path))), work_of):
        path = unfinished(tmp_path, kind)
        place(where(path), odd)
        said = refused_within_seconds(path, mode)

        assert said != "was read"
        assert str(tmp_path) in said
        assert said.split(":")[0] in ("FormatError", "OSError", "NotRegularFileError", "JournalMismatchError"), said
        for each in tmp_path.iterdir():
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_a_finished_array_is_read_whatever_has_the_name_of_its_working_file(
    kind: str, odd: str, mode: Literal["r", "r+"], tmp_path: Path
) -> None:
    path = finished(tmp_path, kind)
    place(work_of(path), odd)

    assert same(read(path, mode), A)


@pytest.mark.parametrize("where", ["x.npy", "x.zarr", "x.zarr/zarr.json", "x.zarr/c", "x.zarr/c/0/0"])
def test_what_may_not_be_read_is_a_permission_error(where: str) -> None:
    def call() -> str:
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            read(path)
        except PermissionError as error:
            return str(error.filename)
        return "was read"

    with TemporaryDirectory() as made:  # where another user may come, too
        folder = Path(made)
        folder.chmod(0o755)
        path = finished(folder, where[2:6].rstrip("/"))
        (folder / where).chmod(0)
        try:
            assert in_child(call).startswith(str(folder / where))
        finally:
            (folder / where).chmod(0o755)


# -- truncated, flipped, swapped ----------------------------------------------------------------------------


def test_an_npy_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    save(path, A[:2])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(bs.FormatError, match=r"cut off|is empty|not an \.npy file"):
            read(path)
    path.write_bytes(whole + b"more")
    assert same(read(path), A[:2])


@pytest.mark.parametrize(
    ("where", "shards"),
    [("zarr.json", (8, 6)), ("c/0/0", (8, 6)), ("c/0/0", None)],
    ids=["metadata", "a shard", "a chunk"],
)
def test_a_zarr_array_cut_off_anywhere_is_refused(where: str, shards: tuple[int, int] | None, tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    zarr_python(path, shards=shards)
    whole = (path / where).read_bytes().rstrip()
    for length in range(len(whole)):
        (path / where).write_bytes(whole[:length])
        with pytest.raises(bs.FormatError, match=re.escape(str(path / where))):
            read(path)


def test_each_flipped_bit_of_an_index_is_found_and_each_of_the_data_is_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    zarr_python(path, shards=(12, 6))
    file = path / "c/0/0"
    whole = file.read_bytes()
    index = len(whole) - 16 * 6 - 4
    for byte in range(len(whole)):
        bit = 1 << byte % 8
        file.write_bytes(whole[:byte] + bytes([whole[byte] ^ bit]) + whole[byte + 1 :])
        if byte >= index:
            with pytest.raises(bs.FormatError, match="checksum differs"):
                read(path)
        else:
            differs = (read(path) ^ A).view(np.uint8)
            assert differs[differs != 0].tolist() in ([], [bit])  # it may lie in the padding of the edge


@pytest.mark.parametrize("shards", [None, (4, 3), (8, 6)], ids=["chunks", "small shards", "shards"])
def test_files_that_changed_places_read_as_they_do_elsewhere(shards: tuple[int, int] | None, tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    zarr_python(path, shards=shards)
    if shards == (8, 6):
        a, b = path / "c/0/0", path / "c/1/0"
    else:
        a, b = path / "c/0/0", path / "c/2/1"
    a.rename(tmp_path / "a")
    b.rename(a)
    (tmp_path / "a").rename(b)

    assert same(read(path), by_zarr_python(path))


# -- hostile working states ---------------------------------------------------------------------------------


def damaged_draft(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        draft = Path(draft_of(str(path)))
        document = json.loads(draft.read_bytes())
        change(document)
        draft.write_text(json.dumps(document))

    return damage


def text_of_draft(text: bytes) -> Callable[[Path], object]:
    return lambda path: Path(draft_of(str(path))).write_bytes(text)


def journal_of(path: Path) -> Path:
    return Path(f"{work_of(path)}.journal")


def _journal_of_another(path: Path) -> None:
    (path.parent / "other").mkdir()
    other = unfinished(path.parent / "other", path.suffix[1:])
    journal_of(path).write_bytes(journal_of(other).read_bytes())


def _other_chunks(path: Path) -> None:
    """Put working file and journal of an array of the same bytes in the place of this one's, with other blocks."""
    (path.parent / "other").mkdir()
    other = path.parent / f"other/o{path.suffix}"
    with contextlib.suppress(KeyError), bs.create_array(other, shape=A.shape, dtype="i4", chunks=(3, 6)) as x:
        x[3:6] = 1
        raise KeyError
    if path.suffix == ".npy":
        work_of(other).replace(work_of(path))
        journal_of(other).replace(journal_of(path))
    else:
        work, journal = work_of(other), journal_of(other)
        work.replace(work_of(path))
        journal.replace(journal_of(path))


def _plain_store(path: Path) -> None:
    nbytes = work_of(path).stat().st_size
    with bs.create(work_of(path), nbytes, overwrite=True) as store:
        store.allocate(96).write(bytes(96))


REFUSED_STATES: dict[str, Callable[[Path], object]] = {
    "no draft text": text_of_draft(b""),
    "a draft of spaces": text_of_draft(b" " * 5000),
    "a nested draft": text_of_draft(b"[" * 200_000),
    "a long draft": text_of_draft(b"[" + b"{}," * 3_000_000 + b"0]"),
    "a draft of another version": damaged_draft(lambda d: d.update(blockstore_draft=2)),
    "a draft without uuid": damaged_draft(lambda d: d.pop("uuid")),
    "a draft with a fingerprint that is none": damaged_draft(lambda d: d.update(fingerprint=5)),
    "a draft with a broken fingerprint": damaged_draft(lambda d: d.update(fingerprint="{bad")),
    "a draft with an unknown checksum": damaged_draft(lambda d: d.update(checksum="md5")),
    "a draft with a list of checksums": damaged_draft(lambda d: d.update(checksum=[])),
    "a draft with an infinite shape": damaged_draft(lambda d: d.update(shape=[1e400])),
    "a cut-off working file": lambda path: os.truncate(work_of(path), 100),
    "a longer working file": lambda path: os.truncate(work_of(path), 1 << 20),
    "an empty journal": lambda path: os.truncate(journal_of(path), 0),
    "a journal that is none": lambda path: journal_of(path).write_bytes(b"x" * 5000),
    "the journal of another array": _journal_of_another,
    "a plain store": _plain_store,
    "blocks of another size": _other_chunks,
}
NPY_DRAFTS = {
    "no shape": {"shape": None},
    "an empty shape": {"shape": []},
    "a negative shape": {"shape": [-1, 6]},
    "a shape of text": {"shape": ["10", "6"]},
    "a huge shape": {"shape": [1 << 70, 6]},
    "fewer axes": {"shape": [60]},
    "another shape": {"shape": [11, 6]},
    "no chunks": {"chunks": None},
    "chunks of 0": {"chunks": [0, 6]},
    "chunks that do not follow each other": {"chunks": [2, 3]},
    "dtype of objects": {"dtype": "O"},
    "dtype of fields": {"dtype": "f8,i4"},
    "no dtype": {"dtype": None},
    "a number as dtype": {"dtype": 5},
}
for _name, _values in NPY_DRAFTS.items():
    REFUSED_STATES[f"npy: {_name}"] = damaged_draft(lambda d, values=_values: d.update(values))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "name"),
    [("npy", name) for name in REFUSED_STATES]
    + [("zarr", name) for name in REFUSED_STATES if not name.startswith("npy: ")],  # for the others, zarr.json says it
)
def test_a_hostile_working_state_is_refused_and_stays_as_it_is(
    kind: str, name: str, mode: Literal["r", "r+"], tmp_path: Path
) -> None:
    path = unfinished(tmp_path, kind, fingerprint={"seed": 7})
    REFUSED_STATES[name](path)
    before = work_of(path).read_bytes()
    with pytest.raises(REFUSALS, match=r"overwrite=True|makes no sense|another version") as caught:
        read(path, mode, fingerprint={"seed": 7})

    assert "discard" not in str(caught.value)
    assert work_of(path).read_bytes() == before
    bs.create_array(path, shape=A.shape, dtype="i4", chunks=(4, 6), overwrite=True).close()


@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_without_its_journal_a_working_file_is_not_written(kind: str, tmp_path: Path) -> None:
    path = unfinished(tmp_path, kind)
    journal_of(path).unlink()
    with pytest.raises(bs.JournalMismatchError, match="has no journal"):
        read(path, "r+")


@pytest.mark.parametrize("mode", MODES)
def test_a_draft_alone_says_that_nothing_is_written(mode: Literal["r", "r+"], tmp_path: Path) -> None:
    path = unfinished(tmp_path, "zarr", fill_value=3)
    work_of(path).unlink()
    assert np.all(read(path, mode) == 3)

    path = unfinished(tmp_path, "npy")
    work_of(path).unlink()
    with pytest.raises(FileNotFoundError):
        bs.open_array(path, mode=mode)


# -- huge claims --------------------------------------------------------------------------------------------


def claim(folder: Path, shape: list[int], chunks: list[int], shards: list[int] | None = None) -> Path:
    """Make a Zarr array of no file but its metadata."""
    codecs: list[Any] = [LITTLE]
    if shards is not None:
        configuration = {"chunk_shape": chunks, "codecs": codecs, "index_codecs": [LITTLE, {"name": "crc32c"}]}
        codecs = [{"name": "sharding_indexed", "configuration": configuration}]
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shards or chunks}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": 9,
        "codecs": codecs,
    }
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_text(json.dumps(document))
    return folder


CLAIMS: dict[str, tuple[list[int], list[int], list[int] | None]] = {
    "2**60 chunks": ([1 << 60], [1], None),
    "2**33 chunks": ([1 << 33], [1], None),
    "2**60 blocks of one file": ([1 << 60], [1], [1 << 60]),
    "2**40 blocks of one file": ([1 << 40], [1], [1 << 40]),
    "2**30 files of 2**30 blocks": ([1 << 60], [1], [1 << 30]),
    "2**60 rows of nothing": ([1 << 60, 0], [1, 1], None),
    "2**60 rows of nothing in one file": ([1 << 60, 0], [1, 1], [1 << 60, 1]),
    "nothing, 2**60 times": ([0, 1 << 60], [1, 1], None),
    "one chunk of 2**60": ([1 << 60], [1 << 60], None),
    "one element of a file of 2**60 blocks": ([1], [1], [1 << 60]),
    "64 axes": ([1] * 63 + [1 << 60], [1] * 64, [1] * 63 + [1 << 60]),
}


def claims(which: str, path: Path, log: Path) -> tuple[dict[tuple[str, str], Any], int]:
    """Use an array of a huge claim, with little memory; tell in `log` what is being done, since this may hang.

    Returns what each use came to, and the bytes that were allocated at most.
    """
    shape, chunks, shards = CLAIMS[which]
    _limit(1 << 30)
    tracemalloc.start()
    said: dict[tuple[str, str], Any] = {}
    claim(path, shape, chunks, shards)
    for mode in MODES[: 1 + (shards is not None)]:
        x = bs.open_array(path, mode=mode)
        first, last = (0,) * len(shape), (-1,) * len(shape)
        uses: dict[str, Callable[[], object]] = {
            "first": lambda x=x, first=first: int(x[first]),
            "last": lambda x=x, last=last: int(x[last]),
            "part": lambda x=x: int(np.sum(x[..., 5:9])),
            "empty": lambda x=x: x[..., 5:5].size,
            "repr": lambda x=x: len(repr(x)) > 20,
            "block": lambda x=x, first=first: len(repr(x.blocks[first])) > 20,
            "blocks": lambda x=x: repr(x.blocks).startswith("<BlockGrid of"),
            "pending": lambda x=x: len(list(itertools.islice(x.pending(), 3))),
            "written": lambda x=x: int(np.count_nonzero(x.written)),
            "html": lambda x=x: len(x._repr_html_()) > 20,
            "close": lambda x=x: x.close(),
        }
        for name, use in uses.items():
            log.write_text(f"{mode} {name}")
            try:
                said[mode, name] = use()
            except (MemoryError, IndexError, bs.LayoutError) as error:
                said[mode, name] = f"{type(error).__name__}: {error}"
    peak = tracemalloc.get_traced_memory()[1]
    log.write_text("all of it")
    with bs.open_array(path, mode="r") as x:
        try:
            said["r", "all"] = int(np.asarray(x).sum())
        except MemoryError as error:
            said["r", "all"] = str(error)
    return said, peak


def _limit(nbytes: int) -> None:
    """Allow this process to map some more bytes of memory, and no more."""
    import resource

    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    limit = pages * resource.getpagesize() + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.mark.parametrize("which", CLAIMS)
def test_a_huge_claim_ends_quickly_in_an_answer_or_a_clear_error(which: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    try:
        said, peak = in_child(lambda: claims(which, tmp_path / "x.zarr", log))
    except AssertionError as error:
        raise AssertionError(f"{error}, at {log.read_text()}") from None
    shape, chunks, _ = CLAIMS[which]
    count = math.prod(-(-n // chunk) for n, chunk in zip(shape, chunks, strict=True))

    assert peak < 4 << 20
    for (mode, name), answer in said.items():
        if name in ("first", "last"):
            assert answer == 9 if 0 not in shape else answer.startswith("IndexError"), (mode, name, answer)
        elif name == "part":
            assert answer == 9 * 4 * (0 not in shape and shape[-1] > 1), (mode, answer)
        elif name == "empty":
            assert answer == 0
        elif name == "pending":
            assert answer == min(count, 3)
        elif name in ("repr", "blocks", "html"):
            assert answer is True, (mode, name, answer)
        elif name == "written":
            assert answer == 0 if count <= 1 else "too many to be listed" in answer, (mode, answer)
        elif name == "all":
            assert answer == 9 * math.prod(shape) if shape in ([1], [0, 1 << 60], [1 << 60, 0]) else "Unable" in answer


# -- ten thousand damages -----------------------------------------------------------------------------------

_NUMBERS = [0, 1, 2, 7, 47, 48, 96, 4096, 1 << 31, 1 << 32, 1 << 40, (1 << 62) + 1, 1 << 63, (1 << 64) - 1]
_VALUES: list[Any] = [
    *(None, True, 0, 1, -1, 3, 1.5, 1e400, "", "x", "NaN", "crc32", "<i4", "O", "v2", ".", "/", "big", "start", "end"),
    *([], {}, [0], [0, 0], [1, 1], [4, 6], [-1, 6], [1 << 60, 1], [1 << 31, 1 << 31], [1 << 70], [1] * 65, ["4", "6"]),
    *({"name": "bytes"}, [{"name": "bytes"}], "bytes", "uint8", "float64", "complex128", "bool", 1 << 70),
]

Tree = dict[str, bytes]


def trees(folder: Path) -> dict[str, tuple[str, Tree, NDArray[Any]]]:
    """Make arrays of many kinds, and return of each the name, all files and what it reads as."""
    made: dict[str, tuple[str, Tree, NDArray[Any]]] = {}

    def keep(which: str) -> None:
        name = "x.zarr" if (folder / "x.zarr").exists() else "x.npy"
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        made[which] = name, files, read(folder / name)
        for each in folder.iterdir():
            shutil.rmtree(each) if each.is_dir() else each.unlink()

    def create(kind: str, *, complete: bool, **options: Any) -> None:
        x = bs.create_array(folder / f"x.{kind}", shape=A.shape, dtype="i4", chunks=(4, 6), **options)
        x[0:4] = A[0:4]
        if complete:
            x[4:] = A[4:]
        x.flush()
        x._files.close(publish=complete)

    save(folder / "x.npy", A)
    keep("npy of NumPy")
    save(folder / "x.npy", np.asfortranarray(A.astype(">f8")), (3, 0))
    keep("npy in Fortran order")
    create("npy", complete=True, checksum="crc32", keep_journal=True)
    keep("npy with journal")
    create("npy", complete=False, fingerprint={"seed": 7})
    keep("npy, unfinished")
    create("zarr", complete=True)
    keep("zarr")
    create("zarr", complete=True, shards=(8, 6), dimension_names=("a", None), attributes={"a": 1})
    keep("zarr of shards")
    create("zarr", complete=False, shards=(8, 6), fill_value=5)
    keep("zarr, unfinished")
    create("zarr", complete=True, shards=(8, 6))
    path = folder / "x.zarr/zarr.json"
    document = json.loads(path.read_bytes())
    document["codecs"] = [LITTLE]
    document["chunk_grid"]["configuration"]["chunk_shape"] = [8, 6]
    path.write_text(json.dumps(document))
    for i in range(2):
        block = np.zeros((8, 6), "<i4")
        block[: 8 - 6 * i] = A[8 * i : 8 * i + 8]
        (folder / f"x.zarr/c/{i}/0").write_bytes(block.tobytes())
    keep("zarr of chunks")
    create("zarr", complete=True, shards=(8, 6))
    document = json.loads(path.read_bytes())
    document["codecs"][0]["configuration"] |= {"index_codecs": [LITTLE], "index_location": "start"}
    path.write_text(json.dumps(document))
    for i in range(2):
        whole = A[8 * i : 8 * i + 4].tobytes() + (A[4:8].tobytes() if i == 0 else bytes(96))
        second = [128, 96] if i == 0 else [(1 << 64) - 1] * 2
        index = np.array([32, 96, *second], "<u8").tobytes()
        if i == 1:
            whole = A[8:].tobytes() + bytes(48)
        (folder / f"x.zarr/c/{i}/0").write_bytes(index + whole)
    keep("zarr with unchecked indices")
    return made


def damage(rng: random.Random, tree: Tree, others: list[Tree]) -> tuple[Tree, dict[str, str]]:
    """Return a copy of a tree with one to three damages, and what is no file in it any more."""
    tree, odd = dict(tree), {}
    for _ in range(rng.choice([1, 1, 2, 3])):
        name = rng.choice(sorted(tree))
        data = bytearray(tree[name])
        kind = rng.random()
        if name.endswith(".json") and kind < 0.6:
            with contextlib.suppress(ValueError):
                data = bytearray(_changed(rng, bytes(data)))
        elif kind < 0.15:
            del data[rng.randrange(len(data) + 1) :]
        elif kind < 0.25:
            data += rng.randbytes(rng.choice([1, 8, 16, 100]))
        elif kind < 0.55 and data:
            edge = min(len(data), 200)
            for _ in range(rng.choice([1, 1, 3, 20])):
                at = rng.choice([rng.randrange(edge), len(data) - 1 - rng.randrange(edge), rng.randrange(len(data))])
                data[at] = rng.choice([data[at] ^ 1 << rng.randrange(8), rng.choice(b"0123456789,()[]{}'\" -")])
        elif kind < 0.7 and len(data) >= 8:
            at = rng.randrange(len(data) - 7)
            at = rng.choice([at, at // 8 * 8, len(data) // 8 * 8 - 8 * rng.randrange(1, min(len(data) // 8, 6) + 1)])
            data[at : at + 8] = rng.choice(_NUMBERS).to_bytes(8, rng.choice(["little", "big"]))
        elif kind < 0.8:
            other = rng.choice([tree, rng.choice(others)])
            data = bytearray(other[rng.choice(sorted(other))])
        elif kind < 0.88 and len(tree) > 1:
            del tree[name]
            continue
        elif kind < 0.94:
            odd[name] = rng.choice(sorted(ODD))
        else:
            data = bytearray(rng.randbytes(rng.randrange(300)))
        tree[name] = bytes(data)
    return tree, odd


def _changed(rng: random.Random, text: bytes) -> bytes:
    """Return a JSON text with some values replaced."""
    document = json.loads(text)
    for _ in range(rng.choice([1, 1, 2, 4])):
        holders = [document]
        for holder in holders:
            values = list(holder.values() if isinstance(holder, dict) else holder)
            holders += [value for value in values if isinstance(value, dict | list) and value]
        holder = rng.choice(holders)
        at = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[at] = copy.deepcopy(rng.choice(_VALUES))
        if rng.random() < 0.15:
            del holder[at]
        if not document:
            break
    return json.dumps(document).encode()


def use(path: Path, rng: random.Random) -> NDArray[Any] | None:
    """Open an array that may be damaged and use all of it that is not too large; return what it reads as."""
    mode = "r" if rng.random() < 0.9 else "r+"
    fingerprint = {"seed": 7} if "u" in mode else None
    x = bs.open_array(path, mode=mode, adopt=True, fingerprint=fingerprint)
    try:
        if x.size == 0:
            return np.asarray(x) if math.prod(n or 1 for n in x.shape) < 1 << 20 else None
        small = x.nbytes <= 1 << 16
        text = repr(x)
        corner = x[(-1,) * x.ndim]
        next(x.pending(), None)
        if not small:
            return None
        a = np.array(x)
        assert corner.tobytes() == a[(-1,) * x.ndim].tobytes()
        assert f", {np.count_nonzero(x.written)} written" in text
        x._repr_html_()
        for b in itertools.islice(x.blocks, 20):
            assert b.read().tobytes() == a[b.slices].tobytes()
        with contextlib.suppress(ValueError):
            x.verify()
        return a
    finally:
        x.close() if rng.random() < 0.5 else x._files.close(publish=False)


_TYPED: tuple[type[Exception], ...] = (
    *REFUSALS,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    bs.NotRegularFileError,
)


def damages(count: int, seed: int, place_at: str) -> None:
    """Use `count` damaged arrays with little memory, and print as JSON what came of it."""
    warnings.simplefilter("ignore")
    home = Path(place_at)
    kinds = trees(home)
    every = [tree for _, tree, _ in kinds.values()]
    outcomes: Counter[str] = Counter()
    findings: list[str] = []
    peak = 0
    _limit(1 << 30)
    for turn in range(count):
        rng = random.Random(seed + turn)
        which = rng.choice(sorted(kinds))
        name, tree, expected = kinds[which]
        damaged, odd = damage(rng, tree, every)
        folder = home / str(turn)
        _lay(folder, damaged, odd)
        if traced := turn % 4 == 0:  # it takes time
            tracemalloc.start()
        signal.alarm(10)
        outcome = "read"
        try:
            a = use(folder / name, rng)
        except _TYPED as error:
            outcome = type(error).__name__
        except OSError as error:
            outcome = f"OSError {error.errno}"
        except BaseException as error:
            findings.append(f"{turn} {which}: {type(error).__name__}: {error}"[:300])
        else:
            theirs = None
            if damaged == tree and not odd:
                theirs = expected
            elif name == "x.npy" and not work_of(folder / name).exists():
                try:
                    theirs = np.load(folder / name)
                except ValueError:  # of what is behind the header's text, such as a no-break space, it minds more
                    outcome = "read, not by NumPy"
            if a is not None and theirs is not None and (a.dtype != theirs.dtype or not same(a, theirs)):
                findings.append(f"{turn} {which}: reads as something else")
        signal.alarm(0)
        outcomes[outcome] += 1
        if traced:
            peak = max(peak, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        shutil.rmtree(folder)
    print(json.dumps({"outcomes": outcomes, "findings": findings, "peak": peak}))


def _lay(folder: Path, tree: Tree, odd: dict[str, str]) -> None:
    for name, data in tree.items():
        path = folder / name
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            os.makedirs(path.parent, exist_ok=True)
            if name in odd:
                ODD[odd[name]](path)
            else:
                path.write_bytes(data)
    folder.mkdir(exist_ok=True)


def test_ten_thousand_damages_end_in_answers_and_typed_errors_with_little_memory_and_no_signal(tmp_path: Path) -> None:
    count = 10_000
    with TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else tmp_path) as folder:
        script = "import sys, test_foreign as t; t.damages(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
        ran = run_python(script, count, 1, folder)
    assert ran.returncode == 0, (ran.returncode, ran.stdout[-500:], ran.stderr[-2000:])
    told = json.loads(ran.stdout)
    outcomes = told["outcomes"]

    assert told["findings"] == []
    assert sum(outcomes.values()) == count
    assert outcomes.keys() <= {"read", "read, not by NumPy", "OSError 40", *(each.__name__ for each in _TYPED)}
    assert outcomes["read"] > count // 20 < outcomes["FormatError"]
    assert outcomes["JournalMismatchError"] > 100
    assert told["peak"] < 8 << 20
