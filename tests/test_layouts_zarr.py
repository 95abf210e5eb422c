"""What is written, zarr-python and tensorstore read; what anyone wrote is read exactly, or refused with its reason."""

import copy
import json
import math
import random
import tracemalloc
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from blockstore.errors import DtypeError, FormatError
from blockstore.layouts.grid import Grid, Index
from blockstore.layouts.npy import encode_header
from blockstore.layouts.shard_index import ShardIndex, decode_index, encode_index
from blockstore.layouts.values import (
    SUPPORTED,
    check_dtype,
    check_fill_value,
    decode_fill_value,
    encode_fill_value,
)
from blockstore.layouts.zarr import MAX_METADATA_NBYTES, Metadata, decode_metadata, encode_metadata

EMPTY = (1 << 64) - 1

DTYPES = [np.dtype(name).newbyteorder(order) for name in SUPPORTED for order in "<>"]

dtypes = st.sampled_from(DTYPES)


def bits(scalar: np.generic) -> bytes:
    return scalar.tobytes()


@st.composite
def fills(draw: st.DrawFn, dtype: np.dtype[Any]) -> np.generic:
    """Any value of a dtype: of floats any bits, so NaNs of every kind."""
    if dtype.kind == "b":
        return np.bool(draw(st.booleans()))
    native = dtype.newbyteorder("=")
    scalar: np.generic = np.frombuffer(draw(st.binary(min_size=native.itemsize, max_size=native.itemsize)), native)[0]
    return scalar


@st.composite
def grids(draw: st.DrawFn, most: int = 12) -> Grid:
    ndim = draw(st.integers(1, 3))
    axis = st.tuples(st.integers(0, most), st.integers(1, 4), st.integers(1, 3))
    axes = draw(st.lists(axis, min_size=ndim, max_size=ndim))
    shape, chunks, per_shard = (tuple(numbers) for numbers in zip(*axes, strict=True))
    shards = tuple(chunk * per for chunk, per in zip(chunks, per_shard, strict=True))
    return Grid(shape, draw(dtypes), chunks, shards)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def metadatas(draw: st.DrawFn) -> Metadata:
    grid = draw(grids())
    index = draw(st.none() | st.builds(ShardIndex, st.sampled_from(["start", "end"]), st.booleans(), st.booleans()))
    if index is None:
        grid = Grid(grid.shape, grid.dtype, grid.chunks, grid.chunks)
    ndim = len(grid.shape)
    return Metadata(
        grid,
        draw(fills(grid.dtype)),
        draw(st.dictionaries(st.text(), json_values, max_size=3)),
        draw(st.none() | st.lists(st.none() | st.text(), min_size=ndim, max_size=ndim).map(tuple)),
        index,
        draw(st.sampled_from(["default", "v2"])),
        draw(st.sampled_from(["/", "."])),
    )


def assert_equal(given: Metadata, expected: Metadata) -> None:
    assert given.grid == expected.grid
    assert given.grid.dtype.str == expected.grid.dtype.str
    assert type(given.fill_value) is type(expected.fill_value)
    assert bits(given.fill_value) == bits(expected.fill_value)
    assert given.attributes == expected.attributes
    assert given.dimension_names == expected.dimension_names
    assert (given.index, given.encoding, given.separator) == (expected.index, expected.encoding, expected.separator)


@given(metadata=metadatas())
def test_metadata_is_read_back_as_it_was_written(metadata: Metadata) -> None:
    assert_equal(decode_metadata(encode_metadata(metadata), "zarr.json"), metadata)


@given(data=st.data(), dtype=dtypes)
def test_fill_values_are_read_back_to_the_bit(data: st.DataObject, dtype: np.dtype[Any]) -> None:
    fill = data.draw(fills(dtype))
    text = json.dumps(encode_fill_value(fill), allow_nan=False)
    decoded = decode_fill_value(json.loads(text), dtype, "zarr.json")

    assert type(decoded) is type(fill)
    assert bits(decoded) == bits(fill)
    assert bits(check_fill_value(fill, dtype)) == bits(fill)


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        ("f4", np.nan, "NaN"),
        ("f4", np.inf, "Infinity"),
        ("f4", -np.inf, "-Infinity"),
        ("f8", -0.0, -0.0),
        ("f4", np.uint32(0x7FC00001).view("f4"), "0x7fc00001"),
        ("f4", np.uint32(0xFFC00000).view("f4"), "0xffc00000"),
        ("f4", np.uint32(0x7F800001).view("f4"), "0x7f800001"),
        ("f2", np.uint16(0xFE00).view("f2"), "0xfe00"),
        (">f8", np.uint64(0xFFF8000000000000).view("f8"), "0xfff8000000000000"),
        ("c8", complex(-0.0, np.nan), [-0.0, "NaN"]),
        ("u8", EMPTY, EMPTY),
        ("i1", -128, -128),
        ("?", True, True),
    ],
)
def test_fill_values_are_said_as_the_specification_says(dtype: str, value: Any, expected: object) -> None:
    encoded = encode_fill_value(check_fill_value(value, np.dtype(dtype)))

    assert json.dumps(encoded) == json.dumps(expected)


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        ("0x7fc00000", "f4", 0x7FC00000),
        ("0xFFC0ABCD", "f4", 0xFFC0ABCD),
        ("0x3f800000", ">f4", 0x3F800000),
        ("NaN", "f2", 0x7E00),
        ("Infinity", "f4", 0x7F800000),
        ("-Infinity", "f2", 0xFC00),
        (1, "f4", 0x3F800000),
        (0.1, "f4", 0x3DCCCCCD),
        (3.0, "u4", 3),
        (1e-400, "f4", 0),
    ],
)
def test_fill_values_of_others_are_read(value: object, dtype: str, expected: int) -> None:
    decoded = decode_fill_value(value, np.dtype(dtype), "zarr.json")

    assert decoded.tobytes() == np.array(expected, f"u{np.dtype(dtype).itemsize}").tobytes()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        *[(value, "?") for value in (0, 1, "true", None, 1.0, [], {})],
        *[(value, "u1") for value in (-1, 256, 1.5, "0", True, None, [1], 10**400, 1e400)],
        *[(value, "i8") for value in (1 << 63, -(1 << 63) - 1, False, "NaN", "0x0000000000000000")],
        *[(value, "f4") for value in (True, None, "nan", "", "0x", "0x7fc0", "0x7fc000000", "0xZfc00000", "inf")],
        *[
            (value, "f4")
            for value in ("0x7fc0000_", "0x-fc00000", "7fc00000", "+Infinity", [1.0], 1e39, 10**400, 1e400)
        ],
        *[(value, "c8") for value in (1.0, [1.0], [1.0, 2.0, 3.0], [1.0, None], "NaN", [], {"re": 1}, [[1], [2]])],
    ],
    ids=lambda value: str(value)[:20],
)
def test_fill_values_that_are_none_of_the_dtype_are_refused(value: object, dtype: str) -> None:
    with pytest.raises(FormatError, match=f"^zarr.json: fill_value .* is none of {np.dtype(dtype).name}"):
        decode_fill_value(value, np.dtype(dtype), "zarr.json")


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (0, "?", np.False_),
        (1.0, "?", np.True_),
        (True, "u1", np.uint8(1)),
        (255.0, "u1", np.uint8(255)),
        (np.int64(-5), "i2", np.int16(-5)),
        (np.array(7), ">u4", np.uint32(7)),
        (0.1, "f4", np.float32(0.1)),
        (65504, "f2", np.float16(65504)),
        (np.inf, "f2", np.float16(np.inf)),
        (-np.inf, "c8", np.complex64(complex(-np.inf, 0))),
        (10**30, "f8", np.float64(1e30)),
        (np.longdouble(0.5), "f4", np.float32(0.5)),
        (2, "c16", np.complex128(2)),
        (np.float32(2), "c16", np.complex128(2)),
        (np.complex64(1j), "c16", np.complex128(1j)),
        (np.True_, "f8", np.float64(1)),
    ],
)
def test_fill_values_that_fit_become_scalars(value: object, dtype: str, expected: np.generic) -> None:
    checked = check_fill_value(value, np.dtype(dtype))

    assert type(checked) is type(expected)
    assert bits(checked) == bits(expected)


@pytest.mark.parametrize(
    ("value", "dtype", "error", "match"),
    [
        (300, "u1", ValueError, "300 is out of the range of uint8, 0 to 255"),
        (-1, "u8", ValueError, "-1 is out of the range"),
        (2, "?", ValueError, "out of the range of bool, 0 to 1"),
        (1.5, "i4", ValueError, "1.5 is no integer"),
        (np.nan, "i4", ValueError, "nan is no integer"),
        (np.inf, "i4", ValueError, "inf is no integer"),
        (1e300, "i8", ValueError, "out of the range of int64"),
        (1e300, "f4", ValueError, "out of the range of float32"),
        (10**30, "f2", ValueError, "out of the range of float16"),
        (np.float64(70000), "f2", ValueError, "out of the range of float16"),
        (10**400, "f8", ValueError, "out of the range of float64"),
        (10**400, "c8", ValueError, "out of the range of complex64"),
        (complex(0, 1e300), "c8", ValueError, "out of the range of complex64"),
        (1j, "f8", TypeError, "complex, but dtype float64 is not"),
        (np.complex64(1), "i4", TypeError, "complex, but dtype int32 is not"),
        ("x", "f4", TypeError, "'x' is no number"),
        (None, "f4", TypeError, "None is no number"),
        (np.zeros(1), "f4", TypeError, "is no number"),
        (np.datetime64(1, "s"), "i8", TypeError, "is no number"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_fill_values_that_do_not_fit_are_refused(value: object, dtype: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        check_fill_value(value, np.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.str)
def test_dtypes_of_both_stay_in_their_byte_order(dtype: np.dtype[Any]) -> None:
    assert check_dtype(dtype).str == dtype.str


@pytest.mark.parametrize("dtype", ["O", "S4", "U3", "V8", "M8[s]", "m8", "f4,f4", "(2,)f4", "S", "nonsense", "T"])
def test_dtypes_of_numpy_alone_are_refused(dtype: str) -> None:
    with pytest.raises(DtypeError, match=r"supported are bool, int8, .*complex128|not a dtype"):
        check_dtype(dtype)


@pytest.mark.parametrize(
    ("encoding", "separator", "expected"),
    [("default", "/", "c/0/12"), ("default", ".", "c.0.12"), ("v2", "/", "0/12"), ("v2", ".", "0.12")],
)
def test_a_shard_has_the_key_that_its_encoding_says(encoding: Any, separator: Any, expected: str) -> None:
    metadata = Metadata(Grid((1,), DTYPES[0], (1,), (1,)), np.False_, encoding=encoding, separator=separator)

    assert metadata.key((0, 12)) == expected


# The index.


@given(grid=grids(), data=st.data())
def test_an_index_is_read_back_as_what_was_written_of_each_block(grid: Grid, data: st.DataObject) -> None:
    for shard in grid.shard_indices():
        layout = grid.shard(shard, npy=False)
        flags = data.draw(st.lists(st.booleans(), min_size=layout.count, max_size=layout.count))
        raw = encode_index(layout, grid.per_shard, np.array(flags, bool))
        decoded = decode_index(raw, ShardIndex(), layout, grid.per_shard, layout.data_stop, "c/0")
        expected = [(layout.start(i), layout.block_nbytes) if flag else (EMPTY, EMPTY) for i, flag in enumerate(flags)]

        assert len(raw) == ShardIndex().nbytes(math.prod(grid.per_shard))
        assert decoded.dtype == np.uint64
        assert [tuple(entry) for entry in decoded.tolist()] == expected


@given(grid=grids())
def test_entries_of_an_index_lie_in_c_order_of_the_whole_shard(grid: Grid) -> None:
    for shard in grid.shard_indices():
        layout = grid.shard(shard, npy=False)
        raw = encode_index(layout, grid.per_shard, np.ones(layout.count, bool))
        entries = np.frombuffer(raw, "<u8", 2 * math.prod(grid.per_shard)).reshape(*grid.per_shard, 2)
        for inner in product(*map(range, grid.per_shard)):
            inside = all(i < n for i, n in zip(inner, layout.blocks, strict=True))
            expected = [layout.start(layout.number(inner)), layout.block_nbytes] if inside else [EMPTY, EMPTY]

            assert entries[inner].tolist() == expected


INDEX_GRID = Grid(
    (10, 6), np.dtype("<f4"), (4, 3), (12, 9)
)  # 3 * 3 blocks of 48 bytes, of which 3 * 2 are in the array


def index_entries() -> tuple[NDArray[np.uint64], int]:
    layout = INDEX_GRID.shard((0, 0), npy=False)
    raw = encode_index(layout, (3, 3), np.ones(6, bool))
    return np.frombuffer(raw, "<u8", 18).reshape(9, 2).copy(), layout.data_stop


def decode_entries(entries: NDArray[np.uint64], file_nbytes: int, **kwargs: Any) -> NDArray[np.uint64]:
    index = ShardIndex("end", checksum=False, **kwargs)
    layout = INDEX_GRID.shard((0, 0), npy=False)
    return decode_index(entries.tobytes(), index, layout, (3, 3), file_nbytes, "c/0/0")


@pytest.mark.parametrize(
    ("number", "entry", "match"),
    [
        pytest.param(0, (0, 47), r"block \(0, 0\) has 47 bytes from byte 0 on, not the 48", id="short"),
        pytest.param(4, (0, 0), r"block \(1, 1\) has 0 bytes", id="no bytes"),
        pytest.param(7, (EMPTY, 48), r"block \(2, 1\).*is not within the", id="half empty, of offset"),
        pytest.param(7, (0, EMPTY), r"block \(2, 1\).*not the 48 of its elements", id="half empty, of nbytes"),
        pytest.param(1, (EMPTY - 47, 48), r"block \(0, 1\) has 48.*is not within the 384 bytes", id="over 2**64"),
        pytest.param(1, (384, 48), ".*is not within the 384 bytes", id="behind"),
        pytest.param(1, (384 - 47, 48), ".*is not within the 384 bytes", id="past the last byte"),
    ],
)
def test_entries_that_no_block_has_are_refused(number: int, entry: tuple[int, int], match: str) -> None:
    entries, file_nbytes = index_entries()
    entries[number] = entry

    with pytest.raises(FormatError, match=f"^c/0/0: the shard's index is damaged: {match}"):
        decode_entries(entries, file_nbytes)


def test_entries_that_a_block_may_have_are_read() -> None:
    entries, file_nbytes = index_entries()
    entries[0] = file_nbytes - 48, 48
    entries[3] = 1, 48
    entries[2] = 5, 5  # beyond the edge of the array
    decoded = decode_entries(entries, file_nbytes)

    assert decoded[0].tolist() == [file_nbytes - 48, 48]
    assert decoded[2].tolist() == [1, 48]
    assert np.array_equal(decode_entries(entries.astype(">u8"), file_nbytes, little=False), decoded)


def test_blocks_in_a_file_shorter_than_one_are_refused_and_empty_ones_read() -> None:
    entries, _ = index_entries()
    with pytest.raises(FormatError, match=r"blocks of 48 bytes in a file of 40|not within the 40"):
        decode_entries(entries, 40)
    entries[:] = EMPTY
    assert (decode_entries(entries, 40) == EMPTY).all()
    entries[0] = 0, 48
    with pytest.raises(FormatError, match="blocks of 48 bytes in a file of 40"):
        decode_entries(entries, 40)


def test_an_index_of_another_length_or_checksum_is_refused() -> None:
    layout = INDEX_GRID.shard((0, 0), npy=False)
    raw = encode_index(layout, (3, 3), np.ones(6, bool))

    for cut in (raw[:-1], raw + b"x", b""):
        with pytest.raises(FormatError, match=f"index of 9 blocks has {len(cut)} bytes, not 148"):
            decode_index(cut, ShardIndex(), layout, (3, 3), 10_000, "c/0/0")
    for i in range(len(raw)):
        damaged = bytearray(raw)
        damaged[i] ^= 1 << (i % 8)
        with pytest.raises(FormatError, match=r"c/0/0: .*its checksum differs"):
            decode_index(bytes(damaged), ShardIndex(), layout, (3, 3), 10_000, "c/0/0")


def test_flags_of_another_shape_and_exact_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="6 whole blocks needs as many flags"):
        encode_index(INDEX_GRID.shard((0, 0), npy=False), (3, 3), np.ones(9, bool))
    with pytest.raises(ValueError, match="whole blocks"):
        encode_index(INDEX_GRID.shard((0, 0), npy=True), (3, 3), np.ones(6, bool))


# Other readers and writers.


def numbers(grid: Grid) -> NDArray[Any]:
    """Return an array of a grid with each element another, as far as the dtype goes."""
    count = math.prod(grid.shape)
    a = np.arange(1, count + 1).astype(grid.dtype.newbyteorder("="))
    if grid.dtype.kind == "c":
        a = a * (1 + 2j)
    return a.astype(grid.dtype).reshape(grid.shape)


def build(folder: Path, metadata: Metadata, a: NDArray[Any], *, some: bool) -> NDArray[Any]:
    """Write an array as Zarr by the functions under test, with every third block left out if `some`.

    Returns what is to be read. Bytes between blocks and in the padding of edge blocks are 0xAB; of bool
    they are 1, as tensorstore refuses what is neither 0 nor 1 there too.
    """
    grid = metadata.grid
    folder.mkdir()
    (folder / "zarr.json").write_bytes(encode_metadata(metadata))
    expected = a.copy()
    for shard in grid.shard_indices():
        layout = grid.shard(shard, npy=False)
        file = bytearray((b"\x01" if grid.dtype.kind == "b" else b"\xab") * layout.data_stop)
        if layout.is_array:
            file[:4096] = encode_header(layout.region, grid.dtype)
        written = np.ones(layout.count, bool)
        for block in product(*(range(s.start, s.stop) for s in grid.shard_blocks(shard))):
            number = layout.number(grid.locate(block)[1])
            if some and number % 3 == 1:
                written[number] = False
                expected[grid.slices(block)] = metadata.fill_value
                continue
            view = np.ndarray(
                layout.block_shape(number), grid.dtype, file, layout.start(number), layout.strides(number)
            )
            view[...] = a[grid.slices(block)]
        path = folder / metadata.key(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(file) + encode_index(layout, grid.per_shard, written))
    return expected


def cases() -> Iterator[Any]:
    for i, dtype in enumerate(DTYPES):
        fill = np.array([0x7F, 0xFF][i % 2] if dtype.kind in "iu" and dtype.itemsize > 1 else 1).astype(
            dtype.newbyteorder("=")
        )
        yield pytest.param(Grid((10, 6), dtype, (4, 3), (8, 6)), fill[()], id=f"edges-{dtype.str}")
    f8 = np.dtype("<f8")
    for name, fill_value in [
        ("NaN", np.float64("nan")),
        ("inf", np.float64("inf")),
        ("-inf", np.float64("-inf")),
        ("-0.0", np.float64(-0.0)),
        ("tiny", np.float64(5e-324)),
        ("huge", np.float64(1.7976931348623157e308)),
        ("a third", np.float64(1 / 3)),
        ("NaN of another kind", np.uint64(0xFFF8000000000001).view("f8")),
    ]:
        yield pytest.param(Grid((9,), f8, (2,), (4,)), fill_value, id=f"fill {name}")
    for name, kind, value in [
        ("f4 NaN of another kind", "<f4", np.uint32(0x7FC00001).view("f4")),
        ("f2 negative NaN", "<f2", np.uint16(0xFE00).view("f2")),
        ("c8 NaN and -0.0", "<c8", np.complex64(complex(np.nan, -0.0))),
        ("c16 -inf", "<c16", np.complex128(complex(-np.inf, 1))),
        ("u8 largest", "<u8", np.uint64(EMPTY)),
        ("i8 least", "<i8", np.int64(-1 << 63)),
    ]:
        yield pytest.param(Grid((9,), np.dtype(kind), (2,), (4,)), value, id=f"fill {name}")
    yield pytest.param(Grid((9, 5), np.dtype("<f4"), (2, 5), (10, 5)), np.float32(2), id="rows")
    yield pytest.param(
        Grid((2, 3, 4, 5, 6), np.dtype("<i2"), (1, 2, 2, 5, 3), (2, 2, 4, 5, 6)), np.int16(-1), id="5 axes"
    )
    yield pytest.param(Grid((700, 600), np.dtype("<f4"), (256, 600), (1024, 600)), np.float32(0), id="large blocks")
    yield pytest.param(Grid((300, 600), np.dtype(">f8"), (100, 100), (200, 200)), np.float64(0), id="large tiles")
    yield pytest.param(Grid((0, 3), f8, (2, 3), (2, 3)), np.float64(0), id="an axis of 0")
    yield pytest.param(Grid((3,), np.dtype("u1"), (8,), (64,)), np.uint8(7), id="less than a block")


@pytest.fixture(params=["zarr", "tensorstore"])
def read(request: pytest.FixtureRequest) -> Any:
    """Reading a folder as an array, by another library than this one."""
    library = pytest.importorskip(request.param)

    def read_zarr(folder: Path) -> NDArray[Any]:
        a: NDArray[Any] = library.open_array(str(folder), mode="r")[...]
        return a

    def read_tensorstore(folder: Path) -> NDArray[Any]:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
        a: NDArray[Any] = library.open(spec).result().read().result()
        return a

    return read_zarr if request.param == "zarr" else read_tensorstore


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize(("grid", "fill_value"), list(cases()))
def test_other_libraries_read_what_was_written(
    grid: Grid, fill_value: np.generic, some: bool, read: Any, tmp_path: Path
) -> None:
    names = ("x", None, "", "z", "y")[: len(grid.shape)]
    metadata = Metadata(grid, fill_value, {"units": "µm", "n": [1, {"a": None}]}, names, ShardIndex())
    expected = build(tmp_path / "a.zarr", metadata, numbers(grid), some=some)
    a = read(tmp_path / "a.zarr")
    native = grid.dtype.newbyteorder("=")

    assert a.shape == grid.shape
    assert a.dtype.newbyteorder("=") == native
    assert a.astype(native).tobytes() == expected.astype(native).tobytes()
    for shard in grid.shard_indices():
        layout = grid.shard(shard, npy=False)
        if layout.is_array and not some:
            region = tuple(slice(i * n, (i + 1) * n) for i, n in zip(shard, grid.shards, strict=True))
            assert np.array_equal(np.load(tmp_path / "a.zarr" / metadata.key(shard)), expected[region])


def read_own(folder: Path) -> tuple[Metadata, NDArray[Any]]:
    """Read an array by the functions under test alone."""
    metadata = decode_metadata((folder / "zarr.json").read_bytes(), "zarr.json")
    grid, index = metadata.grid, metadata.index
    a = np.full(grid.shape, metadata.fill_value, grid.dtype)
    for shard in grid.shard_indices():
        path = folder / metadata.key(shard)
        if not path.exists():
            continue
        raw = path.read_bytes()
        layout = grid.shard(shard, npy=False)
        entries = np.array([[0, grid.block_nbytes]], np.uint64)
        if index is not None:
            nbytes = index.nbytes(math.prod(grid.per_shard))
            part = raw[:nbytes] if index.location == "start" else raw[-nbytes:]
            entries = decode_index(part, index, layout, grid.per_shard, len(raw), str(path))
        for block in product(*(range(s.start, s.stop) for s in grid.shard_blocks(shard))):
            start, nbytes = entries[layout.number(grid.locate(block)[1])].tolist()
            if start != EMPTY:
                whole = np.frombuffer(raw, grid.dtype, math.prod(grid.chunks), start).reshape(grid.chunks)
                target = a[grid.slices(block)]
                target[...] = whole[tuple(map(slice, target.shape))]
    return metadata, a


@pytest.mark.parametrize("dtype", ["<f4", "u1", ">i8", "c16"])
@pytest.mark.parametrize("kind", ["chunks", "shards", "start", "no checksum", "big index", "v2", "points"])
def test_what_zarr_python_wrote_is_read(dtype: str, kind: str, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

    endian = "big" if dtype[0] == ">" else "little"
    inner, shards = (3, 4), (6, 8)
    sharding = {
        "start": {"index_location": "start"},
        "no checksum": {"index_codecs": [BytesCodec(endian="little")]},
        "big index": {"index_codecs": [BytesCodec(endian="big"), Crc32cCodec()]},
    }.get(kind, {})
    codec = BytesCodec(endian=endian)
    array = zarr.create(
        store=str(tmp_path / "a"),
        shape=(10, 15),
        chunks=inner if kind == "chunks" else shards,
        dtype=dtype,
        zarr_format=3,
        fill_value=7,
        attributes={"a": [1, 2.5, None]},
        dimension_names=["x", None],
        codecs=[codec if kind == "chunks" else ShardingCodec(chunk_shape=inner, codecs=[codec], **sharding)],
        chunk_key_encoding={"v2": ("v2", "."), "points": ("default", ".")}.get(kind, ("default", "/")),
    )
    array[:9, :10] = np.arange(90).reshape(9, 10)
    metadata, a = read_own(tmp_path / "a")

    assert metadata.attributes == {"a": [1, 2.5, None]}
    assert metadata.dimension_names == ("x", None)
    assert metadata.grid.chunks == inner
    assert (metadata.index is None) == (kind == "chunks")
    assert metadata.grid.dtype.str == np.dtype(dtype).str
    assert np.array_equal(a, array[...])
    assert (tmp_path / "a" / metadata.key((0, 0))).exists()


@pytest.mark.parametrize("dtype", ["float32", "uint8", "complex64", "bool"])
def test_what_tensorstore_wrote_is_read(dtype: str, tmp_path: Path) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    little = [{"name": "bytes", "configuration": {"endian": "little"}}]
    configuration = {"chunk_shape": [3, 4], "codecs": little, "index_codecs": [*little, {"name": "crc32c"}]}
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(tmp_path / "a")},
        "metadata": {
            "shape": [10, 15],
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [6, 8]}},
            "codecs": [{"name": "sharding_indexed", "configuration": configuration}],
        },
    }
    expected = np.arange(150).reshape(10, 15).astype(dtype)
    tensorstore.open(spec, create=True).result().write(expected).result()
    metadata, a = read_own(tmp_path / "a")

    assert metadata.index == ShardIndex()
    assert np.array_equal(a, expected)


# Refusals.


def document(**changes: Any) -> dict[str, Any]:
    """Return a valid zarr.json, parsed, with keys replaced, or left out where they are None."""
    metadata = Metadata(Grid((10, 6), np.dtype("<f4"), (4, 3), (8, 6)), np.float32(0), index=ShardIndex())
    return {key: v for key, v in {**json.loads(encode_metadata(metadata)), **changes}.items() if v is not None}


def sharding(**changes: Any) -> list[dict[str, Any]]:
    """Return the codecs of a valid zarr.json, with keys replaced, or left out where they are None."""
    [codec] = document()["codecs"]
    merged = {**codec["configuration"], **changes}
    return [{"name": "sharding_indexed", "configuration": {key: v for key, v in merged.items() if v is not None}}]


BYTES = {"name": "bytes", "configuration": {"endian": "little"}}


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(document(chunk_key_encoding="default"), id="key encoding by name"),
        pytest.param(document(data_type={"name": "float32"}), id="data type by object"),
        pytest.param(document(data_type={"name": "float32", "configuration": {}}), id="empty configuration"),
        pytest.param(document(codecs=sharding(index_codecs=[BYTES, "crc32c"])), id="codec by name"),
        pytest.param(document(codecs=sharding(index_location=None)), id="default location"),
        pytest.param(document(attributes=None), id="no attributes"),
        pytest.param(document(storage_transformers=[]), id="no storage transformers"),
        pytest.param(document(new={"must_understand": False, "x": 1}), id="extension to ignore"),
        pytest.param(document(chunk_key_encoding={"name": "default", "must_understand": True}), id="must_understand"),
    ],
)
def test_other_spellings_of_the_same_are_read(given: dict[str, Any]) -> None:
    expected = decode_metadata(json.dumps(document()).encode(), "zarr.json")

    assert_equal(decode_metadata(json.dumps(given).encode(), "zarr.json"), expected)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        pytest.param(b"", "no JSON", id="empty"),
        pytest.param(b"\xff\xfe", "no JSON", id="no UTF-8"),
        pytest.param(b"{", "no JSON", id="half"),
        pytest.param(b"null", "None is no metadata", id="null"),
        pytest.param(b"[" * 100_000, "no JSON, or damaged", id="nested lists"),
        pytest.param(b'{"a":' * 100_000, "no JSON, or damaged", id="nested objects"),
        pytest.param(b"9" * 100_000, "no JSON, or damaged", id="100 000 digits"),
        pytest.param(b" " * (MAX_METADATA_NBYTES + 1), "more than 16777216 bytes", id="too long"),
        pytest.param(json.dumps(document(attributes={"a": math.nan})).encode(), "JSON has no NaN", id="NaN"),
        pytest.param(json.dumps(document(fill_value=-math.inf)).encode(), "JSON has no -Infinity", id="infinity"),
    ],
)
def test_what_is_no_json_object_is_refused(text: bytes, match: str) -> None:
    with pytest.raises(FormatError, match=f"^dir/zarr.json: .*{match}"):
        decode_metadata(text, "dir/zarr.json")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        pytest.param(document(zarr_format=2), "zarr_format 2 is not supported, but 3 .zarr.open_array may", id="v2"),
        pytest.param(document(zarr_format=None), "zarr_format None", id="no version"),
        pytest.param(document(zarr_format=3.0), "zarr_format 3.0", id="version of float"),
        pytest.param(document(zarr_format=True), "zarr_format True", id="version true"),
        pytest.param(document(node_type="group"), "a Zarr group: give the path of one of its arrays", id="group"),
        pytest.param({"zarr_format": 3, "node_type": "group"}, "a Zarr group", id="mere group"),
        pytest.param(document(node_type=[]), r"node_type \[\]", id="node type of list"),
        pytest.param(document(fill_value=None), "fill_value is missing", id="no fill value"),
        pytest.param(document(codecs=None, shape=None), "codecs, shape is missing", id="two missing"),
        pytest.param(document(new={"must_understand": True}), "extension 'new' is not supported", id="extension"),
        pytest.param(document(new=False), "extension 'new'", id="extension of a mere value"),
        pytest.param(document(storage_transformers=[{"name": "x"}]), "storage_transformers", id="transformers"),
        pytest.param(document(storage_transformers=3), "storage_transformers 3", id="transformers of 3"),
        pytest.param(document(shape=[]), "without axes is not supported, but ranks from 1 up", id="no axes"),
        pytest.param(document(shape=[10, -1]), "no list of integers from 0 up", id="negative"),
        pytest.param(document(shape=[10, True]), "no list of integers", id="true as integer"),
        pytest.param(document(shape=[10, 6.0]), "no list of integers", id="float as integer"),
        pytest.param(document(shape=[10**400, 6]), r"absurd: of float32 that is more than 2\*\*62", id="10**400"),
        pytest.param(document(shape=[0, 1 << 61]), "absurd", id="2**61 beside a 0"),
        pytest.param(document(shape=[1] * 65), "65 axes, at most 64", id="65 axes"),
        pytest.param(document(shape="10"), "shape '10' is no list", id="shape of text"),
        pytest.param(document(shape={"0": 1}), "no list of integers", id="shape of object"),
        pytest.param(document(shape=[10]), "chunk_shape has 2 axes, those of the shape are 1", id="other rank"),
        pytest.param(document(data_type="string"), "data_type 'string' is not supported, but bool, int8", id="string"),
        pytest.param(document(data_type="r16"), "data_type 'r16'", id="raw"),
        pytest.param(
            document(data_type={"name": "numpy.datetime64", "configuration": {"unit": "s"}}), "datetime64", id="time"
        ),
        pytest.param(document(data_type=3), "data_type 3 has no name", id="dtype of 3"),
        pytest.param(
            document(data_type={"name": "float32", "configuration": {"x": 1}}), "data_type with 'x'", id="dtype with"
        ),
        pytest.param(document(data_type={"name": "float32", "new": 1}), "data_type with 'new'", id="dtype and"),
        pytest.param(
            document(data_type={"name": "float32", "configuration": 1}), "configuration 1, no object", id="no object"
        ),
        pytest.param(document(chunk_grid={"name": "rectilinear"}), "chunk_grid 'rectilinear'.*but regular", id="grid"),
        pytest.param(document(chunk_grid="regular"), "chunk_shape None", id="grid by name"),
        pytest.param(
            document(chunk_grid={"name": "regular", "configuration": {"chunk_shape": [0, 6]}}), "from 1 up", id="0"
        ),
        pytest.param(
            document(chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1 << 62, 6]}}),
            "absurd",
            id="huge",
        ),
        pytest.param(
            document(codecs=sharding(chunk_shape=[3, 3])), r"chunks of \(3, 3\) do not divide", id="no divisor"
        ),
        pytest.param(
            document(codecs=sharding(chunk_shape=[4])), "sharding_indexed has 1 axes", id="chunks of other rank"
        ),
        pytest.param(
            document(codecs=sharding(chunk_shape=None)), "chunk_shape of sharding_indexed None", id="no chunks"
        ),
        pytest.param(document(codecs=[]), r"codecs \[\] are no list", id="no codecs"),
        pytest.param(document(codecs="bytes"), "codecs 'bytes' are no list", id="codecs of text"),
        pytest.param(
            document(codecs=[BYTES, "gzip"]), r"codecs \['bytes', 'gzip'\] is not supported, but bytes", id="gzip"
        ),
        pytest.param(
            document(codecs=[{"name": "transpose", "configuration": {"order": [1, 0]}}, BYTES]), "transpose", id="order"
        ),
        pytest.param(
            document(codecs=[*sharding(), {"name": "crc32c"}]), "'sharding_indexed', 'crc32c'", id="shards summed"
        ),
        pytest.param(document(codecs=sharding(codecs=[BYTES, "zstd"])), r"inner codecs \['bytes', 'zstd'\]", id="zstd"),
        pytest.param(document(codecs=sharding(codecs=sharding())), r"inner codecs \['sharding_indexed'\]", id="nested"),
        pytest.param(document(codecs=sharding(codecs=None)), "inner codecs None are no list", id="no inner codecs"),
        pytest.param(
            document(codecs=sharding(index_codecs=[BYTES, "gzip"])), r"index_codecs .*but bytes, crc32c", id="index"
        ),
        pytest.param(document(codecs=sharding(index_codecs=["crc32c"])), "index_codecs", id="sum alone"),
        pytest.param(
            document(codecs=sharding(index_codecs=[BYTES, "crc32c", "crc32c"])), "index_codecs", id="two sums"
        ),
        pytest.param(
            document(codecs=sharding(index_location="middle")), "'middle' is neither start nor end", id="place"
        ),
        pytest.param(document(codecs=sharding(index_location=[])), "neither start nor end", id="place of list"),
        pytest.param(document(codecs=sharding(extra=1)), "sharding_indexed with 'extra'", id="sharding with"),
        pytest.param(document(codecs=["bytes"]), "endian None, neither little nor big", id="no endian"),
        pytest.param(
            document(codecs=[{"name": "bytes", "configuration": {"endian": []}}]), "neither little", id="endian of list"
        ),
        pytest.param(
            document(codecs=[{"name": "bytes", "configuration": {"x": 1}}]), "codec bytes with 'x'", id="bytes with"
        ),
        pytest.param(document(chunk_key_encoding="fanout"), "chunk_key_encoding 'fanout'", id="keys"),
        pytest.param(
            document(chunk_key_encoding={"name": "v2", "configuration": {"separator": ""}}), "separator ''", id="sep"
        ),
        pytest.param(
            document(chunk_key_encoding={"name": "v2", "configuration": {"separator": []}}), "separator", id="sep []"
        ),
        pytest.param(document(attributes=[]), r"attributes are \[\], no object", id="attributes of list"),
        pytest.param(document(dimension_names=["x"]), "1 dimension_names for 2 axes", id="one name"),
        pytest.param(document(dimension_names=["x", 1]), "dimension_names .* are no list of strings", id="name of 1"),
        pytest.param(document(dimension_names="xy"), "dimension_names 'xy'", id="names of text"),
    ],
)
def test_what_is_not_supported_is_refused_with_what_was_found(given: dict[str, Any], match: str) -> None:
    with pytest.raises(FormatError, match=f"^dir/zarr.json: .*{match}") as caught:
        decode_metadata(json.dumps(given).encode(), "dir/zarr.json")

    assert len(str(caught.value)) < 1000


def nested(depth: int) -> Any:
    value: Any = None
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("attributes", "error", "match"),
    [
        pytest.param({"a": math.nan}, ValueError, r"attributes\['a'\] is nan, which JSON does not have", id="NaN"),
        pytest.param({"a": {"b": [0, -math.inf]}}, ValueError, r"attributes\['a'\]\['b'\]\[1\] is -inf", id="infinity"),
        pytest.param({"a": np.int64(3)}, TypeError, r"attributes\['a'\] is np.int64\(3\) of type int64", id="NumPy's"),
        pytest.param({"a": b"x"}, TypeError, "of type bytes", id="bytes"),
        pytest.param({"a": {1: 2}}, TypeError, r"attributes\['a'\] has the key 1", id="key"),
        pytest.param({"a": 1 << 10_000}, ValueError, "an integer of 10001 bits", id="long integer"),
        pytest.param({"a": ["\ud800"]}, ValueError, r"attributes\['a'\]\[0\] is '\\ud800', with half", id="surrogate"),
        pytest.param({"\udc00": 1}, ValueError, r"a key of attributes is '\\udc00'", id="surrogate in a key"),
        pytest.param({"a": nested(200)}, ValueError, "nested more than 100 levels", id="deep"),
        pytest.param({"a": "x" * MAX_METADATA_NBYTES}, ValueError, "at most 16777216 are read", id="too long"),
    ],
)
def test_attributes_that_json_cannot_say_are_refused(
    attributes: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        encode_metadata(Metadata(Grid((3,), np.dtype("f4"), (1,), (1,)), np.float32(0), attributes))


def test_attributes_within_themselves_are_refused() -> None:
    attributes: dict[str, Any] = {}
    attributes["a"] = attributes

    with pytest.raises(ValueError, match="nested more than 100 levels"):
        encode_metadata(Metadata(Grid((3,), np.dtype("f4"), (1,), (1,)), np.float32(0), attributes))


@pytest.mark.parametrize(
    ("names", "error", "match"),
    [
        (("x",), ValueError, "1 dimension names were given for 2 axes"),
        (("x", "\ud800"), ValueError, r"dimension_names\[1\] is '\\ud800'"),
        (("x", 3), TypeError, r"dimension names are str or None: \('x', 3\)"),
    ],
)
def test_dimension_names_that_do_not_fit_are_refused(names: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        encode_metadata(Metadata(Grid((3, 3), np.dtype("f4"), (1, 1), (1, 1)), np.float32(0), {}, names))


JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 1 << 63, 1 << 64, 10**400, 0.5, 1e308, "", "bytes", "NaN", "0x", "x" * 1000),
    *([], [[]], {}, [1, 2], [0, 0], [True, True], ["crc32c"], {"name": "bytes"}, {"name": []}, {"name": "transpose"}),
    *({"configuration": {}}, {"name": "regular", "configuration": []}, {"must_understand": False}, [None] * 100),
    *("little", "big", "start", "float64", "complex64", "bool", "v2", "sharding_indexed", [4, 3], [8, 6], [1.0, "NaN"]),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Iterate over each container within a document, and each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def test_damaged_and_hostile_metadata_are_refused_or_read_and_take_no_memory() -> None:
    rng = random.Random(6)
    texts = [
        json.dumps(document(dimension_names=["x", None], attributes={"a": 1})),
        json.dumps(document(codecs=[BYTES])),
    ]
    outcomes = {"read": 0, "refused": 0}
    tracemalloc.start()
    try:
        for i in range(6000):
            text = bytearray(rng.choice(texts).encode())
            if i % 3:
                given = json.loads(text)
                for _ in range(rng.randrange(1, 4)):
                    container, key = rng.choice(list(places(given)))
                    if rng.random() < 0.2:
                        del container[key]
                    elif rng.random() < 0.1 and isinstance(container, dict):
                        container["new"] = copy.deepcopy(rng.choice(JUNK))
                    else:
                        container[key] = copy.deepcopy(rng.choice(JUNK))
                    if not given:
                        break
                text = bytearray(json.dumps(given).encode())
            elif rng.random() < 0.8:
                for _ in range(rng.randrange(1, 4)):
                    text[rng.randrange(len(text))] = rng.choice(b'0123456789{}[]",:-.eE\\\xff tfn')
            else:
                del text[rng.randrange(len(text)) :]
            try:
                decoded = decode_metadata(bytes(text), "zarr.json")
            except FormatError as error:
                assert str(error).startswith("zarr.json: ")  # noqa: PT017
                outcomes["refused"] += 1
            else:
                assert_equal(decode_metadata(encode_metadata(decoded), "zarr.json"), decoded)
                outcomes["read"] += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 4 << 20
    assert min(outcomes.values()) > 100, outcomes


def test_damaged_indices_are_refused_or_read_within_the_file() -> None:
    rng = random.Random(7)
    layout = INDEX_GRID.shard((0, 0), npy=False)
    whole = encode_index(layout, (3, 3), np.ones(6, bool))
    outcomes = {"read": 0, "refused": 0}
    values = [0, 1, 47, 48, 49, 384, 336, 337, EMPTY, EMPTY - 1, 1 << 63]
    for i in range(4000):
        entries = np.frombuffer(whole, "<u8", 18).copy()
        for _ in range(rng.randrange(1, 3)):
            entries[rng.randrange(18)] = rng.choice(values) if i % 4 else rng.getrandbits(64)
        raw = entries.tobytes()[: 144 - (i % 10 == 0)]
        try:
            decoded = decode_index(raw, ShardIndex(checksum=False), layout, (3, 3), 384, "c/0/0")
        except FormatError as error:
            assert str(error).startswith("c/0/0: ")  # noqa: PT017
            outcomes["refused"] += 1
        else:
            for start, nbytes in decoded.tolist():
                assert (start, nbytes) == (EMPTY, EMPTY) or (nbytes == 48 and start + nbytes <= 384)
            outcomes["read"] += 1

    assert min(outcomes.values()) > 100, outcomes


def test_an_index_with_many_entries_costs_little_beside_itself() -> None:
    per_shard: Index = (1024, 1024)
    grid = Grid((1000, 1000), np.dtype("u1"), (1, 1), per_shard)
    layout = grid.shard((0, 0), npy=False)
    written = np.zeros(layout.count, bool)
    written[::7] = True
    raw = encode_index(layout, per_shard, written)
    decoded = decode_index(raw, ShardIndex(), layout, per_shard, layout.data_stop, "c/0/0")

    assert np.array_equal(decoded[:, 0] != EMPTY, written)
    assert np.array_equal(decoded[written, 0], layout.starts()[written])
