"""What is written, NumPy reads at byte 4096; what is read comes from anywhere, and damage is said and never obeyed."""

import io
import random
import re
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib import format as numpy_format

from blockstore.errors import DtypeError, FormatError, LayoutError
from blockstore.layouts.npy import MAX_HEADER_NBYTES, NpyHeader, decode_header, encode_header

DTYPES = [
    *("?", "i1", "u1", "<i2", ">i2", "<u4", ">u4", "<i8", ">u8", "<f2", ">f4", "<f8", "<c8", ">c16"),
    *("S1", "S17", "<U3", ">U3", "V5", "<M8[ns]", ">M8[25s]", "<m8[D]", "<m8"),
]

dtypes = st.sampled_from(DTYPES).map(np.dtype)
shapes = st.lists(st.integers(0, 5), max_size=6).map(tuple)


def header(text: str, version: tuple[int, int] = (1, 0)) -> bytes:
    width, encoding = (2, "latin1") if version == (1, 0) else (4, "utf-8" if version == (3, 0) else "latin1")
    encoded = text.encode(encoding)
    return b"\x93NUMPY" + bytes(version) + len(encoded).to_bytes(width, "little") + encoded


def entries(descr: str = "'<f8'", order: str = "False", shape: str = "(3, 4)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


@given(shape=shapes, dtype=dtypes)
def test_a_header_is_read_back_as_it_was_written(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    encoded = encode_header(shape, dtype)

    assert len(encoded) == 4096
    assert encoded.endswith(b" \n")
    assert decode_header(encoded + b"data", "a.npy") == NpyHeader(shape, dtype, False, 4096)


@given(shape=shapes, dtype=dtypes)
def test_numpy_reads_the_same_from_the_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    file = io.BytesIO(encode_header(shape, dtype))

    assert numpy_format.read_magic(file) == (1, 0)
    assert numpy_format.read_array_header_1_0(file) == (shape, False, dtype)
    assert file.tell() == 4096


@given(shape=shapes, dtype=dtypes, fortran=st.booleans(), version=st.sampled_from([(1, 0), (2, 0), (3, 0)]))
def test_headers_that_numpy_writes_are_read(
    shape: tuple[int, ...], dtype: np.dtype[Any], fortran: bool, version: tuple[int, int]
) -> None:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        numpy_format.write_array(file, np.zeros(shape, dtype, "F" if fortran else "C"), version)
        file.seek(0)
        numpy_format.read_magic(file)
        offset = len(file.getvalue()) - np.zeros(shape, dtype).nbytes
    decoded = decode_header(file.getvalue()[:MAX_HEADER_NBYTES], "a.npy")

    assert decoded == NpyHeader(shape, dtype, decoded.fortran_order, offset)
    array = np.zeros(shape, dtype, "F" if fortran else "C")
    assert decoded.fortran_order == (array.flags.f_contiguous and not array.flags.c_contiguous)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 3), (5,), (), (0, 3)], ids=str)
def test_numpy_load_and_open_memmap_read_the_file(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    data = np.arange(np.dtype(dtype).itemsize * 21, dtype=np.uint8) & 1
    a = data[: int(np.prod(shape)) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
    path = tmp_path / "a.npy"
    path.write_bytes(encode_header(shape, a.dtype) + a.tobytes() + b"a trailing index")
    loaded = np.load(path)

    assert loaded.dtype == a.dtype
    assert loaded.shape == shape
    assert loaded.tobytes() == a.tobytes()
    if a.size:
        for mapped in (np.load(path, mmap_mode="r"), numpy_format.open_memmap(path, mode="r")):
            assert mapped.offset == 4096
            assert mapped.tobytes() == a.tobytes()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(entries(), ((3, 4), "<f8", False), id="NumPy's"),
        pytest.param(entries() + " " * 40 + "\n", ((3, 4), "<f8", False), id="padded"),
        pytest.param("{'shape': (3,), 'fortran_order': True, 'descr': '>i2'}", ((3,), ">i2", True), id="other order"),
        pytest.param('{"descr": "|u1", "fortran_order": False, "shape": ()}', ((), "u1", False), id="double quotes"),
        pytest.param(entries(shape="(3L, 4L)"), ((3, 4), "<f8", False), id="Python 2's integers"),
        pytest.param(entries(shape="(3L,)"), ((3,), "<f8", False), id="one of Python 2's integers"),
        pytest.param(entries(shape="( 3,4 , )"), ((3, 4), "<f8", False), id="other spaces"),
        pytest.param("{'descr':'<f8','fortran_order':False,'shape':(2,)}", ((2,), "<f8", False), id="no spaces"),
        pytest.param(entries(descr="'f8'"), ((3, 4), "=f8", False), id="native order"),
        pytest.param(entries(shape=f"(0, {1 << 59})"), ((0, 1 << 59), "<f8", False), id="the largest"),
        pytest.param(entries(shape="(" + "1, " * 64 + ")"), ((1,) * 64, "<f8", False), id="64 axes"),
    ],
)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)], ids=str)
def test_headers_of_other_writers_are_read(
    text: str, expected: tuple[tuple[int, ...], str, bool], version: tuple[int, int]
) -> None:
    shape, dtype, fortran = expected
    head = header(text, version)

    assert decode_header(head, "a.npy") == NpyHeader(shape, np.dtype(dtype), fortran, len(head))


@pytest.mark.parametrize(
    ("head", "match"),
    [
        pytest.param(b"", "not an .npy file", id="empty"),
        pytest.param(b"\x93NUM", "not an .npy file", id="half a magic"),
        pytest.param(b"PK\x03\x04" + bytes(100), r"not an .npy file: it begins with b'PK", id="npz"),
        pytest.param(b"\x93NUMPY", "cut off: 6 bytes", id="no version"),
        pytest.param(b"\x93NUMPY\x01\x00\x76", "cut off: 9 bytes", id="half a length"),
        pytest.param(b"\x93NUMPY\x02\x00\x76\x00\x00", "cut off: 11 bytes", id="half a length, 2.0"),
        pytest.param(header(entries())[:-1], r"cut off: \d+ bytes of \d+ are there", id="no last byte"),
        pytest.param(header(entries(), (4, 0)), "version 4.0 is unknown: 1.0, 2.0 and 3.0", id="version 4.0"),
        pytest.param(header(entries(), (1, 1)), "version 1.1 is unknown", id="version 1.1"),
        pytest.param(header(entries().ljust(10_001)), "10001 bytes; no more than 10000.*numpy.load", id="long"),
        pytest.param(b"\x93NUMPY\x02\x00" + b"\xff" * 100, "4294967295 bytes; no more", id="4 GiB"),
        pytest.param(header("{" * 9000), "damaged", id="nested braces"),
        pytest.param(header(entries(shape="(" * 4000 + ")" * 4000)), "damaged", id="nested tuples"),
        pytest.param(header(entries(descr="[" * 4000)), "has fields", id="nested lists"),
        pytest.param(header(""), "damaged", id="no text"),
        pytest.param(header("None"), "damaged", id="no dict"),
        pytest.param(header("{}"), r"it has the keys \[\]", id="no keys"),
        pytest.param(header("{'descr': '<f8', 'fortran_order': False}"), "it has the keys", id="no shape"),
        pytest.param(header(entries()[:-1] + "'x': True}"), "it has the keys", id="another key"),
        pytest.param(header(entries()[:-1] + "'shape': (1,)}"), "'shape' is there twice", id="a key twice"),
        pytest.param(header(entries() + "}"), "damaged", id="another brace"),
        pytest.param(header(entries() + "; import os"), "damaged", id="code behind"),
        pytest.param(header(entries(shape="__import__('os')")), "damaged", id="code"),
        pytest.param(header(entries(shape="(3 4)")), "shape is no tuple", id="no comma"),
        pytest.param(header(entries(shape="(3)")), "shape is no tuple", id="an integer in brackets"),
        pytest.param(header(entries(shape="(,)")), "shape is no tuple", id="a comma alone"),
        pytest.param(header(entries(shape="(03,)")), "shape is no tuple", id="a leading zero"),
        pytest.param(header(entries(shape="True")), "shape is no tuple", id="shape True"),
        pytest.param(header(entries(order="'no'")), "fortran_order is neither", id="order of text"),
        pytest.param(header(entries(descr="True")), "descr is no text", id="descr True"),
        pytest.param(header(entries(shape="(3, -1)")), r"\(3, -1\) has a negative number", id="negative"),
        pytest.param(header(entries(shape=f"({1 << 63},)")), r"absurd.* more than 2\*\*62 bytes", id="2**63"),
        pytest.param(header(entries(shape=f"(0, {1 << 60})")), "absurd", id="over 2**62 bytes beside a 0"),
        pytest.param(header(entries(shape="(" + "9" * 5000 + ",)")), "an axis has 99999", id="5000 digits"),
        pytest.param(header(entries(shape="(-" + "9" * 5000 + ",)")), "absurd", id="5000 negative digits"),
        pytest.param(header(entries(shape="(" + "1, " * 65 + ")")), "65 axes, at most 64", id="65 axes"),
        pytest.param(header(entries(descr="'|O'")), r"'\|O', Python objects: supported is", id="objects"),
        pytest.param(header(entries(descr="[('x', '<f8')]")), "its dtype has fields: supported is", id="fields"),
        pytest.param(header(entries(descr="'i4,f8'")), "no dtype 'i4,f8'", id="fields by comma"),
        pytest.param(header(entries(descr="'(9,)f8'")), "no dtype", id="subarray"),
        pytest.param(header(entries(descr="'object'")), "no dtype", id="objects by name"),
        pytest.param(header(entries(descr="'<f9'")), "no dtype '<f9' here", id="no such dtype"),
        pytest.param(header(entries(descr="'<M8[x]'")), "no dtype", id="no such unit"),
        pytest.param(header(entries(descr="'S9999999999'")), "no dtype", id="10 GB in an item"),
        pytest.param(header(entries(descr="'<U0'")), "itemsize of 0 bytes", id="itemsize 0"),
        pytest.param(header(entries(descr="''")), "no dtype ''", id="empty descr"),
        pytest.param(b"\x93NUMPY\x03\x00\x02\x00\x00\x00\xff\xff", "damaged: 'utf-8' codec", id="no UTF-8"),
    ],
)
def test_what_is_no_header_is_refused_with_path_and_reason(head: bytes, match: str) -> None:
    with pytest.raises(FormatError, match=match) as caught:
        decode_header(head[:MAX_HEADER_NBYTES], "dir/a.npy")

    assert str(caught.value).startswith("dir/a.npy: ")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "match"),
    [
        pytest.param((3,), "O", DtypeError, "supported is every dtype of one size", id="objects"),
        pytest.param((3,), "f8,i4", DtypeError, "supported is", id="fields"),
        pytest.param((3,), "(2,)f8", DtypeError, "supported is", id="subarray"),
        pytest.param((3,), "S", DtypeError, "itemsize of 0 bytes", id="itemsize 0"),
        pytest.param((3, -1), "f8", LayoutError, "negative", id="negative"),
        pytest.param((1 << 60,), "f8", LayoutError, "more than 2[*][*]62 bytes", id="too long"),
        pytest.param((1,) * 65, "f8", LayoutError, "65 axes", id="axes"),
    ],
)
def test_what_a_header_cannot_say_is_refused(
    shape: tuple[int, ...], dtype: str, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        encode_header(shape, np.dtype(dtype))


def test_damaged_and_hostile_headers_are_refused_or_read_and_take_no_memory() -> None:
    rng = random.Random(4)
    valid = [encode_header((rng.randrange(9), 3), np.dtype(dtype)) for dtype in DTYPES]
    valid += [header(entries(descr=repr(dtype), shape="(2L, 5)"), (2, 0)) for dtype in DTYPES]
    scraps = ["9" * 400, "'descr'", "True", "<f8", *"(){}['L,:-\\\0O", '"']
    outcomes = {"read": 0, "refused": 0}
    tracemalloc.start()
    try:
        for i in range(5000):
            head = bytearray(rng.choice(valid))
            if i % 4 == 0:
                for _ in range(rng.randrange(1, 3)):
                    junk = rng.randrange(256) if rng.random() < 0.3 else rng.choice(b"0123456789")
                    head[rng.randrange(min(len(head), 90))] = junk
            elif i % 4 == 1:
                del head[rng.randrange(len(head)) :]
            elif i % 4 == 2:
                head = bytearray(header("".join(rng.choice(scraps) for _ in range(rng.randrange(20))), (1, 0)))
            else:
                text = entries()
                for _ in range(rng.randrange(1, 4)):
                    at = rng.randrange(len(text))
                    text = text[:at] + rng.choice(scraps) + text[at + rng.randrange(5) :]
                head = bytearray(header(text, (3, 0)))
            try:
                decoded = decode_header(bytes(head), "a.npy")
            except FormatError as error:
                assert str(error).startswith("a.npy: ")  # noqa: PT017
                outcomes["refused"] += 1
            else:
                assert isinstance(decoded, NpyHeader)
                assert decoded.dtype.itemsize > 0
                assert not decoded.dtype.hasobject
                assert decoded.offset <= len(head)
                outcomes["read"] += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 4 << 20
    assert min(outcomes.values()) > 20, outcomes


def test_what_is_read_is_what_numpy_reads_wherever_both_do() -> None:
    rng = random.Random(5)
    compared = 0
    for _ in range(3000):
        text = list(entries())
        for _ in range(rng.randrange(1, 3)):
            text[rng.randrange(len(text))] = rng.choice("0123456789,' <>|=fiucSUV(){}L-")
        head = header("".join(text))
        try:
            decoded = decode_header(head, "a.npy")
        except FormatError:
            continue
        file = io.BytesIO(head)
        numpy_format.read_magic(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = numpy_format.read_array_header_1_0(file)
        compared += 1

        assert (decoded.shape, decoded.fortran_order, decoded.dtype) == expected, re.sub(r"\s+", " ", str(head))

    assert compared > 50
