"""A range is split without a byte lost, written whole or refused, and immutable once it has a receipt."""

import array
import copy
import ctypes
import errno
import os
import pickle
import resource
import tempfile
import threading
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from support import PORTABLE, contents

import blockstore as bs
from blockstore import ALIGNMENT, AllocatedRange, WriteReceipt, align_down, align_up

MIB = 1 << 20
RESTING = 0xAA
"""A byte that no test writes: what is still there was not touched."""

untimed = settings(deadline=None)

Parts = tuple[AllocatedRange | None, AllocatedRange | None]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[bs.BlockStore]:
    with bs.create(tmp_path / "data.bin", MIB) as store:
        yield store


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bs.BlockStore]:
    """A store with room for every example of a property."""
    with bs.create(tmp_path_factory.mktemp("arena") / "data.bin", 1 << 32, reserve=False) as store:
        yield store


def on_disk(r: AllocatedRange) -> bytes:
    """Return the bytes that a range was asked for, read as any other program would."""
    with open(r._owner.path, "rb") as file:  # type: ignore[attr-defined]
        file.seek(r.start)
        return file.read(r.nbytes)


# -- splitting ------------------------------------------------------------------------------------

cuts = st.integers(1, 6 * ALIGNMENT).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


@untimed
@given(cut=cuts, up=st.booleans(), tag=st.integers(0, 2**64 - 1))
def test_the_parts_of_a_split_range_are_its_bytes(
    arena: bs.BlockStore, cut: tuple[int, int], up: bool, tag: int
) -> None:
    nbytes, offset = cut
    r = arena.allocate(nbytes, tag=tag)
    expected = (align_up if up else align_down)(offset)

    low, high = r.split_up(offset) if up else r.split_down(offset)

    parts = [part for part in (low, high) if part is not None]
    assert [parts[0].start, *(part.stop for part in parts)] == [r.start, *(p.start for p in parts[1:]), r.stop]
    assert (low is None, high is None) == (expected == 0, expected >= nbytes)
    assert sum(part.nbytes for part in parts) == nbytes
    assert low is None or low.nbytes == min(expected, nbytes)
    assert [part.tag for part in parts] == [tag] * len(parts)


@untimed
@given(cut=cuts, up=st.booleans(), seed=st.binary(min_size=1))
def test_parts_that_are_written_one_by_one_make_up_the_whole(
    arena: bs.BlockStore, cut: tuple[int, int], up: bool, seed: bytes
) -> None:
    nbytes, offset = cut
    data = (seed * nbytes)[:nbytes]
    r = arena.allocate(nbytes)

    low, high = r.split_up(offset) if up else r.split_down(offset)
    if high is not None:
        high.write(data[nbytes - high.nbytes :])
    if low is not None:
        low.write(data[: low.nbytes])

    assert on_disk(r) == data


@untimed
@given(nbytes=st.integers(1, 12 * ALIGNMENT), offsets=st.lists(st.floats(0, 1), max_size=8))
def test_parts_can_be_split_again(arena: bs.BlockStore, nbytes: int, offsets: list[float]) -> None:
    r = arena.allocate(nbytes)
    parts = [r]

    for fraction in offsets:
        part = parts.pop(int(fraction * (len(parts) - 1)))
        parts += filter(None, part.split_up(int(fraction * part.nbytes)))
    parts.sort(key=lambda part: part.start)

    assert [parts[0].start, *(part.stop for part in parts)] == [*(part.start for part in parts), r.stop]
    assert sum(part.nbytes for part in parts) == nbytes


@pytest.mark.parametrize(
    ("nbytes", "offset", "up", "down"),
    [
        pytest.param(100, 0, (None, (0, 4096, 100)), (None, (0, 4096, 100)), id="at the start"),
        pytest.param(100, 50, ((0, 4096, 100), None), (None, (0, 4096, 100)), id="inside the only page"),
        pytest.param(100, 100, ((0, 4096, 100), None), (None, (0, 4096, 100)), id="at the stop of a part of a page"),
        pytest.param(4096, 4096, ((0, 4096, 4096), None), ((0, 4096, 4096), None), id="at the stop of a page"),
        pytest.param(
            8192, 4096, ((0, 4096, 4096), (4096, 8192, 4096)), ((0, 4096, 4096), (4096, 8192, 4096)), id="between pages"
        ),
        pytest.param(
            10_000, 5000, ((0, 8192, 8192), (8192, 12288, 1808)), ((0, 4096, 4096), (4096, 12288, 5904)), id="in a page"
        ),
        pytest.param(10_000, 9000, ((0, 12288, 10_000), None), ((0, 8192, 8192), (8192, 12288, 1808)), id="last page"),
    ],
)
def test_a_split_at_an_edge(
    store: bs.BlockStore, nbytes: int, offset: int, up: tuple[Any, Any], down: tuple[Any, Any]
) -> None:
    def extents(parts: Parts, origin: int) -> tuple[Any, ...]:
        return tuple(part and (part.start - origin, part.stop - origin, part.nbytes) for part in parts)

    first, second = store.allocate(nbytes), store.allocate(nbytes)

    assert extents(first.split_up(offset), first.start) == up
    assert extents(second.split_down(offset), second.start) == down


def test_the_short_last_page_of_a_file_stays_with_the_high_part(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 10_000) as store:
        low, high = store.allocate(10_000).split_up(4096)

        assert low is not None
        assert high is not None
        assert (low.stop, high.start, high.stop, high.nbytes) == (4096, 4096, 10_000, 5904)


def test_the_parts_of_a_typed_range_are_bytes(store: bs.BlockStore) -> None:
    low, high = store.allocate(shape=(1024, 2), dtype="f8").split_up(4096)

    assert low is not None
    assert high is not None
    for part, nbytes in ((low, 4096), (high, 12288)):
        with part.writer() as a:
            assert (a.shape, a.dtype) == ((nbytes,), np.uint8)


def spent(store: bs.BlockStore) -> AllocatedRange:
    r = store.allocate(5000)
    r.split_up(4096)
    return r


def written(store: bs.BlockStore) -> AllocatedRange:
    r = store.allocate(5000)
    r.write(bytes(5000))
    return r


def reference(store: bs.BlockStore) -> AllocatedRange:
    r: AllocatedRange = pickle.loads(pickle.dumps(written(store)))
    return r


STATES = [
    pytest.param(spent, bs.SpentRangeError, "it was split: use its parts", id="spent"),
    pytest.param(written, bs.AlreadyWrittenError, "it is written, and immutable", id="written"),
    pytest.param(reference, bs.SpentRangeError, "a reference is for reading", id="reference"),
]


def enter(r: AllocatedRange) -> None:
    with r.writer():
        pass


CALLS = [
    pytest.param(lambda r: r.split_up(0), id="split_up"),
    pytest.param(lambda r: r.split_down(4096), id="split_down"),
    pytest.param(lambda r: r.write(bytes(5000)), id="write"),
    pytest.param(enter, id="writer"),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("make", "error", "message"), STATES)
def test_a_range_in_a_state_that_forbids_it_is_refused(
    store: bs.BlockStore,
    make: Callable[[bs.BlockStore], AllocatedRange],
    error: type[Exception],
    message: str,
    call: Callable[[AllocatedRange], object],
) -> None:
    r = make(store)

    with pytest.raises(error, match=rf"cannot (write|split) range \[{r.start}, {r.stop}\): .*{message}"):
        call(r)


@pytest.mark.parametrize("call", CALLS)
def test_a_range_that_is_being_written_is_refused(store: bs.BlockStore, call: Callable[[Any], object]) -> None:
    r = store.allocate(5000)

    with r.writer(), pytest.raises(bs.WriterBusyError, match=r"range \[0, 8192\): another writer is inside"):
        call(r)


@pytest.mark.parametrize("call", CALLS)
def test_the_writer_that_is_inside_is_not_disturbed_by_a_refusal(
    store: bs.BlockStore, call: Callable[[AllocatedRange], object]
) -> None:
    r = store.allocate(5000)

    with r.writer() as a:
        with suppress(bs.WriterBusyError):
            call(r)
        a[:] = 7

    assert on_disk(r) == b"\x07" * 5000
    assert r.receipt is not None


def test_of_threads_that_write_one_range_at_once_one_is_let_in(store: bs.BlockStore) -> None:
    r = store.allocate(100)
    refused = threading.Semaphore(0)
    outcomes: list[int | str] = []

    def write(value: int) -> None:
        try:
            with r.writer() as a:
                a[:] = value
                for _ in range(7):
                    refused.acquire()  # until all others have been refused
                outcomes.append(value)
        except bs.WriterBusyError:
            outcomes.append("busy")
            refused.release()

    threads = [threading.Thread(target=write, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    (value,) = set(outcomes) - {"busy"}
    assert outcomes.count("busy") == 7
    assert on_disk(r) == bytes([int(value)]) * 100


@pytest.mark.parametrize("offset", [-1, 101, 4096, 2**64, -(2**64)])
@pytest.mark.parametrize("split", ["split_up", "split_down"])
def test_an_offset_outside_the_range_is_refused(store: bs.BlockStore, split: str, offset: int) -> None:
    r = store.allocate(100)

    with pytest.raises(ValueError, match=rf"offset {offset} is out of bounds: range \[0, 4096\) has 100 bytes"):
        getattr(r, split)(offset)

    assert r.split_down(0)[1] is not None  # it is not spent


@pytest.mark.parametrize("offset", [1.5, None, "1"], ids=repr)
def test_an_offset_that_is_no_integer_is_refused(store: bs.BlockStore, offset: Any) -> None:
    r = store.allocate(100)

    with pytest.raises(TypeError, match="integer"):
        r.split_up(offset)

    assert r.write(bytes(100)).nbytes == 100


# -- writing what is given ------------------------------------------------------------------------

arrays = npst.arrays(
    npst.scalar_dtypes() | npst.nested_dtypes(npst.scalar_dtypes(), max_leaves=3),
    npst.array_shapes(min_dims=0, max_dims=3, max_side=6),
)


def rearranged(a: np.ndarray[Any, Any], how: str) -> np.ndarray[Any, Any]:
    """Return an array that has its items in another order in memory."""
    if how == "reversed" and a.ndim:
        return a[::-1]
    if how == "strided" and a.ndim:
        return np.repeat(a, 2, axis=0)[::2]
    return a.T if how == "transposed" else a


@untimed
@given(a=arrays, how=st.sampled_from(["as it is", "reversed", "strided", "transposed"]), typed=st.booleans())
def test_an_array_is_written_in_c_order_whatever_its_strides(
    arena: bs.BlockStore, a: np.ndarray[Any, Any], how: str, typed: bool
) -> None:
    data = rearranged(a, how)
    data = data if data.nbytes else np.zeros(3, np.uint8)
    r = arena.allocate(shape=data.shape, dtype=data.dtype) if typed else arena.allocate(data.nbytes)

    receipt = r.write(data)

    assert (receipt.start, receipt.stop, receipt.nbytes) == (r.start, r.stop, data.nbytes)
    items = np.ndarray(data.shape, data.dtype, on_disk(r))
    assert items.astype(data.dtype, "C").tobytes() == data.astype(data.dtype, "C").tobytes()
    if typed:
        assert (r.read().shape, r.read().dtype) == (data.shape, data.dtype)


PAYLOADS: list[Any] = [
    pytest.param(b"12345678", b"12345678", id="bytes"),
    pytest.param(bytearray(b"12345678"), b"12345678", id="bytearray"),
    pytest.param(memoryview(b"12345678"), b"12345678", id="memoryview"),
    pytest.param(memoryview(array.array("h", [1, 2, 3, 4])), np.array([1, 2, 3, 4], "i2").tobytes(), id="int16 view"),
    pytest.param(array.array("d", [1.5]), np.float64(1.5).tobytes(), id="array.array"),
    pytest.param((ctypes.c_char * 8)(*b"12345678"), b"12345678", id="ctypes array"),
    pytest.param(np.array(1.5), np.float64(1.5).tobytes(), id="0-d array"),
    pytest.param(np.float64(1.5), np.float64(1.5).tobytes(), id="numpy scalar"),
    pytest.param(np.array([1, 2], ">i4"), b"\0\0\0\1\0\0\0\2", id="foreign byte order"),
    pytest.param(np.array([[1, 2], [3, 4]], "u2", order="F"), np.array([1, 2, 3, 4], "u2").tobytes(), id="F order"),
    pytest.param(np.arange(16, dtype="u1")[::-2], bytes(range(15, 0, -2)), id="negative stride"),
    pytest.param(np.broadcast_to(np.uint8(3), 8), b"\3" * 8, id="broadcast"),
    pytest.param(np.array([True, False] * 4), b"\1\0" * 4, id="bool"),
    pytest.param(np.array(["2024-01-01"], "M8[D]"), np.array([19723], "i8").tobytes(), id="times"),
    pytest.param(np.array(["ab"], "U2"), "ab".encode("utf-32-le"), id="strings"),
    pytest.param(np.frombuffer(b"12345678", "u1"), b"12345678", id="read-only array"),
]


@pytest.mark.parametrize(("data", "expected"), PAYLOADS)
def test_write_takes_whatever_has_bytes(store: bs.BlockStore, data: Any, expected: bytes) -> None:
    r = store.allocate(8)

    r.write(data)

    assert on_disk(r) == expected


@pytest.mark.parametrize(
    ("typed", "data", "error", "message"),
    [
        pytest.param({"nbytes": 8}, b"1234567", bs.LengthError, "exactly 8 bytes, 7 bytes were given", id="short"),
        pytest.param({"nbytes": 8}, b"123456789", bs.LengthError, "exactly 8 bytes, 9 bytes were given", id="long"),
        pytest.param({"nbytes": 8}, b"", bs.LengthError, "exactly 8 bytes, 0 bytes were given", id="no bytes"),
        pytest.param({"nbytes": 8}, np.zeros(8), bs.LengthError, "8 bytes, 64 bytes were given", id="long array"),
        pytest.param({"nbytes": 8}, np.zeros((0, 5)), bs.LengthError, "8 bytes, 0 bytes were given", id="empty array"),
        pytest.param({"nbytes": 8}, np.array([None]), bs.DtypeError, "holds Python objects", id="objects"),
        pytest.param(
            {"nbytes": 8}, np.zeros(1, [("a", "O")]), bs.DtypeError, "holds Python objects", id="field of objects"
        ),
        pytest.param({"nbytes": 8}, [1, 2, 3, 4, 5, 6, 7, 8], TypeError, "contiguous bytes-like object", id="list"),
        pytest.param({"nbytes": 8}, "12345678", TypeError, "contiguous bytes-like object or an array", id="string"),
        pytest.param({"nbytes": 8}, 8, TypeError, "contiguous bytes-like object or an array", id="int"),
        pytest.param({"nbytes": 8}, None, TypeError, "contiguous bytes-like object or an array", id="None"),
        pytest.param({"nbytes": 8}, iter(b"12345678"), TypeError, "contiguous bytes-like", id="iterator"),
        pytest.param({"nbytes": 8}, memoryview(bytes(16))[::2], TypeError, "contiguous bytes-like", id="strided view"),
        pytest.param(
            {"shape": 2, "dtype": "<i4"}, np.zeros(2, "<f4"), bs.DtypeError, "holds int32, .* float32", id="dtype"
        ),
        pytest.param(
            {"shape": 2, "dtype": "<i4"}, np.zeros(2, ">i4"), bs.DtypeError, "holds int32, .* >i4", id="byte order"
        ),
        pytest.param(
            {"shape": 2, "dtype": "i4"}, np.zeros((2, 1), "i4"), bs.LayoutError, r"\(2,\), .* \(2, 1\)", id="shape"
        ),
        pytest.param(
            {"shape": (), "dtype": "i8"}, np.zeros(1, "i8"), bs.LayoutError, r"shape \(\), .* \(1,\)", id="0-d"
        ),
        pytest.param({"shape": 2, "dtype": "i4"}, b"1234567", bs.LengthError, "7 bytes were given", id="typed, bytes"),
    ],
)
def test_data_that_does_not_fill_the_range_is_refused_before_a_byte_moves(
    store: bs.BlockStore, typed: dict[str, Any], data: Any, error: type[Exception], message: str
) -> None:
    store.raw.fill(0, MIB, RESTING)
    r = store.allocate(**typed)

    with pytest.raises(error, match=message):
        r.write(data)

    assert contents(store) == bytes([RESTING]) * MIB
    assert repr(r) == "<AllocatedRange [0, 4096) 8 bytes, fresh>"


def test_a_rewrite_with_data_that_does_not_fit_leaves_the_receipt_as_it_is(store: bs.BlockStore) -> None:
    r = store.allocate(8)
    receipt = r.write(b"12345678")

    with pytest.raises(bs.LengthError, match="7 bytes were given"):
        r.write(b"1234567", rewrite=True)

    assert r.receipt == receipt
    assert not receipt.revoked
    assert on_disk(r) == b"12345678"


def test_a_length_error_has_both_lengths() -> None:
    error = pickle.loads(pickle.dumps(bs.LengthError(8, 7)))

    assert (error.expected, error.given) == (8, 7)


# -- writers and readers --------------------------------------------------------------------------


@untimed
@given(dtype=npst.scalar_dtypes(), shape=npst.array_shapes(max_dims=4, max_side=5), spare=st.integers(0, 100))
def test_a_range_reads_like_the_array_of_its_last_writer(
    arena: bs.BlockStore, dtype: np.dtype[Any], shape: tuple[int, ...], spare: int
) -> None:
    expected = np.frombuffer(np.random.default_rng(0).bytes(int(np.prod(shape)) * dtype.itemsize), dtype)
    r = arena.allocate(expected.nbytes + spare)

    with r.writer(shape, dtype) as a:
        assert (a.shape, a.dtype, a.flags.c_contiguous) == (shape, dtype, True)
        a[...] = expected.reshape(shape)

    b = r.read()
    assert (b.shape, b.dtype, b.flags.writeable) == (shape, dtype, False)
    np.testing.assert_array_equal(b, expected.reshape(shape))
    assert on_disk(r)[: b.nbytes] == expected.reshape(shape).tobytes()


@pytest.mark.parametrize(
    ("allocation", "shape", "dtype", "expected"),
    [
        pytest.param({"nbytes": 24}, None, None, ((24,), "u1"), id="bytes"),
        pytest.param({"nbytes": 24}, None, "f8", ((3,), "f8"), id="dtype only"),
        pytest.param({"nbytes": 24}, (2, 3), None, ((2, 3), "u1"), id="shape only"),
        pytest.param({"nbytes": 24}, 2, "f4", ((2,), "f4"), id="a part of it"),
        pytest.param({"nbytes": 24}, (3, 0), "f4", ((3, 0), "f4"), id="nothing of it"),
        pytest.param({"nbytes": 24}, (), "f8", ((), "f8"), id="0-d"),
        pytest.param({"nbytes": 24}, 2, ("i2", 3), ((2, 3), "i2"), id="subarray"),
        pytest.param({"shape": (3, 2), "dtype": "i4"}, None, None, ((3, 2), "i4"), id="typed"),
        pytest.param({"shape": (3, 2), "dtype": "i4"}, 3, "f8", ((3,), "f8"), id="typed otherwise"),
        pytest.param({"nbytes": 24, "dtype": "c8"}, None, None, ((3,), "c8"), id="nbytes and dtype"),
        pytest.param({"nbytes": 24, "shape": (2, 2), "dtype": "u2"}, None, None, ((2, 2), "u2"), id="with spare bytes"),
    ],
)
def test_a_writer_has_the_shape_and_dtype_that_were_asked_for(
    store: bs.BlockStore, allocation: dict[str, Any], shape: Any, dtype: Any, expected: tuple[Any, str]
) -> None:
    with store.allocate(**allocation).writer(shape, dtype) as a:
        assert (a.shape, a.dtype) == (expected[0], np.dtype(expected[1]))


def test_a_writer_without_a_shape_goes_back_to_that_of_the_allocation(store: bs.BlockStore) -> None:
    r = store.allocate(24)
    with r.writer(3, "f8"):
        pass

    with r.writer(rewrite=True) as a:
        assert (a.shape, a.dtype) == ((24,), np.uint8)


def test_write_compares_with_the_allocation_and_not_with_the_last_writer(store: bs.BlockStore) -> None:
    r = store.allocate(shape=(2, 3), dtype="i4")
    with r.writer(3, "f8"):
        pass

    r.write(np.ones((2, 3), "i4"), rewrite=True)

    np.testing.assert_array_equal(r.read(), np.ones((2, 3), "i4"))


def test_a_writer_shows_what_the_range_holds(store: bs.BlockStore) -> None:
    r = store.allocate(8)
    r.write(b"12345678")

    with r.writer(rewrite=True) as a:
        assert bytes(a) == b"12345678"


@pytest.mark.parametrize("guard", ["flag", "seal"])
@pytest.mark.parametrize("access", [None, "dense", "sparse"])
@pytest.mark.parametrize("nbytes", [100, 1 << 22], ids=["small", "large"])
def test_a_writer_shows_what_raw_access_wrote(tmp_path: Path, access: Any, guard: Any, nbytes: int) -> None:
    with bs.create(tmp_path / "data.bin", 1 << 23, access=access, guard=guard) as store:
        r = store.allocate(nbytes)
        store.raw.write_at(r.start, b"header")

        with r.writer() as a:
            a[6:10] = list(b"body")

        assert on_disk(r)[:10] == b"headerbody"


def test_what_is_read_is_read_only_for_good(store: bs.BlockStore) -> None:
    a = written(store).read()

    with pytest.raises(ValueError, match="WRITEABLE"):
        a.setflags(write=True)


def test_what_is_read_outlives_the_store(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", MIB) as store:
        r = store.allocate(5)
        r.write(b"hello")
        a = r.read()

    assert bytes(a) == b"hello"


def test_what_was_read_shows_a_later_rewrite(store: bs.BlockStore) -> None:
    r = store.allocate(5)
    r.write(b"hello")
    a = r.read()

    r.write(b"HELLO", rewrite=True)

    assert bytes(a) == b"HELLO"


def test_reading_copies_nothing(store: bs.BlockStore) -> None:
    r = store.allocate(5)
    r.write(b"hello")

    assert r.read().ctypes.data == store.raw.address(r.start)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(lambda s: s.allocate(5000), bs.NotWrittenError, "no writer has left it cleanly", id="fresh"),
        pytest.param(spent, bs.SpentRangeError, "it was split: use its parts", id="spent"),
    ],
)
def test_a_range_without_a_receipt_cannot_be_read(
    store: bs.BlockStore, make: Callable[[bs.BlockStore], AllocatedRange], error: type[Exception], message: str
) -> None:
    r = make(store)

    with pytest.raises(error, match=rf"cannot read range \[0, 8192\): {message}"):
        r.read()


SIZES = [1, 100, 4096, 65536, 65537, MIB]


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("guard", ["flag", "seal"])
@pytest.mark.parametrize("access", [None, "dense", "sparse"])
def test_every_road_into_the_file_carries_every_byte(tmp_path: Path, access: Any, guard: Any, nbytes: int) -> None:
    data = np.random.default_rng(nbytes).integers(0, 256, (4, nbytes), np.uint8)
    with bs.create(tmp_path / "data.bin", 4 * align_up(nbytes), access=access, guard=guard) as store:
        ranges = store.allocate_many(4, nbytes)
        ranges[0].write(data[0])
        ranges[1].write(data[1][::-1])
        with ranges[2].writer() as a:
            a[:] = data[2]
        ranges[3].write(bytes(nbytes))
        ranges[3].write(data[3].tobytes(), rewrite=True)

        for r, expected in zip(ranges, [data[0], data[1][::-1], data[2], data[3]], strict=True):
            assert on_disk(r) == expected.tobytes()
            np.testing.assert_array_equal(r.read(), expected)


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("guard", ["flag", "seal"])
@pytest.mark.parametrize("access", [None, "dense", "sparse"])
def test_a_write_changes_no_byte_beside_its_own(tmp_path: Path, access: Any, guard: Any, nbytes: int) -> None:
    with bs.create(tmp_path / "data.bin", align_up(nbytes) + 2 * ALIGNMENT, access=access, guard=guard) as store:
        store.raw.fill(0, store.nbytes, RESTING)
        store.allocate(1)
        r = store.allocate(nbytes)
        r.write(bytes(nbytes))
        with r.writer(rewrite=True) as a:
            a[:] = 0

        untouched = bytes([RESTING])
        assert contents(store) == untouched * ALIGNMENT + bytes(nbytes) + untouched * (store.nbytes - 4096 - nbytes)


# -- receipts -------------------------------------------------------------------------------------


def test_a_receipt_says_what_was_written(store: bs.BlockStore) -> None:
    store.allocate(1)

    receipt = store.allocate(5, tag=9).write(b"hello")

    assert (receipt.start, receipt.stop, receipt.nbytes, receipt.tag) == (4096, 8192, 5, 9)
    assert (receipt.durable, receipt.revoked) == (False, False)


def test_receipts_of_one_exit_are_equal(store: bs.BlockStore) -> None:
    r = store.allocate(5)
    receipt = r.write(b"hello")

    assert r.receipt == receipt
    assert {r.receipt, receipt, r.receipt} == {receipt}


def test_receipts_of_two_exits_differ(store: bs.BlockStore) -> None:
    r = store.allocate(5)
    first = r.write(b"hello")
    second = r.write(b"HELLO", rewrite=True)

    assert first != second
    assert len({first, second, written(store).receipt}) == 3
    assert first != "a receipt"


def write_and_raise(r: AllocatedRange, error: type[BaseException], *, rewrite: bool = False) -> None:
    with r.writer(rewrite=rewrite) as a:
        a[:] = 1
        raise error


@pytest.mark.parametrize("leave", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_a_body_that_raises_leaves_no_receipt(store: bs.BlockStore, leave: type[BaseException]) -> None:
    r = store.allocate(5)

    with pytest.raises(leave):
        write_and_raise(r, leave)

    assert r.receipt is None
    assert len(store.receipts()) == 0


def test_a_range_whose_body_raised_can_be_written_again(store: bs.BlockStore) -> None:
    r = store.allocate(5)
    with pytest.raises(ZeroDivisionError):
        write_and_raise(r, ZeroDivisionError)

    r.write(b"hello")

    assert on_disk(r) == b"hello"


def test_a_receipt_is_made_at_the_exit_and_not_before(store: bs.BlockStore) -> None:
    r = store.allocate(5)

    with r.writer() as a:
        a[:] = 1
        assert r.receipt is None
        assert (repr(r), len(store.receipts())) == ("<AllocatedRange [0, 4096) 5 bytes, being written>", 0)

    assert r.receipt is not None


@pytest.mark.parametrize(
    "rewrite",
    [
        pytest.param(lambda r, look: look_inside(r, look), id="writer"),
        pytest.param(lambda r, look: (r.write(b"HELLO", rewrite=True), look()), id="write"),
    ],
)
def test_a_rewrite_revokes_the_receipt_that_was(store: bs.BlockStore, rewrite: Callable[..., object]) -> None:
    r = store.allocate(5)
    receipt = r.write(b"hello")
    store.flush()
    states = [(receipt.durable, receipt.revoked)]

    rewrite(r, lambda: states.append((receipt.durable, receipt.revoked)))

    assert states == [(True, False), (False, True)]
    assert r.receipt != receipt


def look_inside(r: AllocatedRange, look: Callable[[], object]) -> None:
    with r.writer(rewrite=True):
        look()


def test_the_receipt_is_revoked_before_the_first_byte_can_change(store: bs.BlockStore) -> None:
    r = store.allocate(5)
    r.write(b"hello")

    with r.writer(rewrite=True):
        assert (r.receipt, len(store.receipts())) == (None, 0)
        assert on_disk(r) == b"hello"


def test_a_rewrite_that_fails_leaves_no_receipt(store: bs.BlockStore) -> None:
    r = store.allocate(5)
    receipt = r.write(b"hello")

    with pytest.raises(ZeroDivisionError):
        write_and_raise(r, ZeroDivisionError, rewrite=True)

    assert (r.receipt, receipt.revoked, len(store.receipts())) == (None, True, 0)
    with pytest.raises(bs.NotWrittenError, match="no writer has left it cleanly"):
        r.read()


def test_a_fresh_range_may_be_opened_for_rewriting(store: bs.BlockStore) -> None:
    r = store.allocate(5)

    assert r.write(b"hello", rewrite=True) == r.receipt


def test_a_writer_that_is_not_entered_changes_nothing(store: bs.BlockStore) -> None:
    r = store.allocate(5)
    receipt = r.write(b"hello")

    r.writer(rewrite=True)

    assert (r.receipt, receipt.revoked) == (receipt, False)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        pytest.param(WriteReceipt, "made by a clean exit from a writer, and by nothing else", id="receipt"),
        pytest.param(AllocatedRange, "ranges are handed out by a store", id="range"),
    ],
)
def test_nobody_else_makes_one(kind: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        kind()


@pytest.mark.parametrize("copy_", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_a_receipt_cannot_be_copied(store: bs.BlockStore, copy_: Callable[[object], object]) -> None:
    receipt = written(store).receipt

    with pytest.raises(TypeError, match=r"a receipt does not pickle: BlockStore\.receipts"):
        copy_(receipt)


@pytest.mark.parametrize("copy_", [copy.copy, copy.deepcopy])
def test_the_copy_of_a_range_is_the_range(store: bs.BlockStore, copy_: Callable[[object], object]) -> None:
    r = store.allocate(5)

    assert copy_(r) is r


def test_a_fresh_range_does_not_travel(store: bs.BlockStore) -> None:
    with pytest.raises(bs.NotWrittenError, match="only a written range travels, as a reference"):
        pickle.dumps(store.allocate(5))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        pytest.param(lambda s: s.allocate(5), "<AllocatedRange [0, 4096) 5 bytes, fresh>", id="fresh"),
        pytest.param(lambda s: s.allocate(5, tag=7), "<AllocatedRange [0, 4096) 5 bytes, tag 7, fresh>", id="tag"),
        pytest.param(spent, "<AllocatedRange [0, 8192) 5000 bytes, spent>", id="spent"),
        pytest.param(written, "<AllocatedRange [0, 8192) 5000 bytes, written>", id="written"),
        pytest.param(reference, "<AllocatedRange [0, 8192) 5000 bytes, a reference>", id="reference"),
        pytest.param(lambda s: written(s).receipt, "<WriteReceipt [0, 8192) 5000 bytes, written>", id="receipt"),
        pytest.param(
            lambda s: s.allocate(5).writer(),
            "<Writer of <AllocatedRange [0, 4096) 5 bytes, fresh>>",
            id="writer",
        ),
    ],
)
def test_everything_says_what_it_is(store: bs.BlockStore, make: Callable[[bs.BlockStore], object], text: str) -> None:
    assert repr(make(store)) == text


def test_a_durable_range_says_so_until_it_is_rewritten(store: bs.BlockStore) -> None:
    r = store.allocate(5)
    receipt = r.write(b"hello")
    store.flush()
    durable = repr(r), repr(receipt)
    r.write(b"HELLO", rewrite=True)

    assert durable == ("<AllocatedRange [0, 4096) 5 bytes, durable>", "<WriteReceipt [0, 4096) 5 bytes, durable>")
    assert (repr(r), repr(receipt)) == (
        "<AllocatedRange [0, 4096) 5 bytes, written>",
        "<WriteReceipt [0, 4096) 5 bytes, revoked>",
    )


# -- a system that refuses ------------------------------------------------------------------------

pwrite_only = pytest.mark.skipif(PORTABLE, reason="the portable road is a copy through the map")


@contextmanager
def limited_to(nbytes: int) -> Iterator[None]:
    """Let no file of this process grow or be written past `nbytes`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pwrite_only
def test_a_write_that_the_system_refuses_halfway_leaves_no_receipt(store: bs.BlockStore) -> None:
    r = store.allocate(100_000)

    with limited_to(50_000), pytest.raises(OSError, match="File too large") as refusal:
        r.write(b"x" * 100_000)

    assert refusal.value.errno == errno.EFBIG
    assert on_disk(r) == b"x" * 50_000 + bytes(50_000)
    assert (r.receipt, len(store.receipts())) == (None, 0)


@pwrite_only
def test_a_range_whose_write_was_refused_can_be_written_again(store: bs.BlockStore) -> None:
    r = store.allocate(100_000)
    with limited_to(50_000), pytest.raises(OSError, match="File too large"):
        r.write(b"x" * 100_000)

    receipt = r.write(b"y" * 100_000)

    assert on_disk(r) == b"y" * 100_000
    assert r.receipt == receipt


@pwrite_only
def test_a_rewrite_that_the_system_refuses_leaves_no_receipt(store: bs.BlockStore) -> None:
    r = store.allocate(100_000)
    receipt = r.write(b"x" * 100_000)

    with limited_to(50_000), pytest.raises(OSError, match="File too large"):
        r.write(b"y" * 100_000, rewrite=True)

    assert (r.receipt, receipt.revoked, len(store.receipts())) == (None, True, 0)


@pwrite_only
def test_a_detached_writer_whose_copy_is_refused_leaves_no_receipt(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", MIB, access="sparse") as store:
        r = store.allocate(100_000)

        with limited_to(50_000), pytest.raises(OSError, match="File too large"), r.writer() as a:
            a[:] = 1

        assert (r.receipt, len(store.receipts())) == (None, 0)
        r.write(b"y" * 100_000)
        assert on_disk(r) == b"y" * 100_000


@pwrite_only
def test_an_error_of_a_single_write_is_passed_on_once(store: bs.BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    really, errors = os.pwrite, [OSError(errno.ENOSPC, "No space left on device")]

    def pwrite(fd: int, data: Any, offset: int) -> int:
        if errors:
            raise errors.pop()
        return really(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    r = store.allocate(8)
    with pytest.raises(OSError, match="No space left on device"):
        r.write(b"12345678")
    assert r.receipt is None

    r.write(b"87654321")

    assert on_disk(r) == b"87654321"


@pwrite_only
def test_a_write_that_the_system_cuts_short_is_continued(store: bs.BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    really, calls = os.pwrite, []

    def pwrite(fd: int, data: Any, offset: int) -> int:
        calls.append(offset)
        return really(fd, memoryview(data)[:1000], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    data = np.random.default_rng(0).bytes(3500)
    r = store.allocate(3500)

    r.write(data)

    assert on_disk(r) == data
    assert calls == [r.start + done for done in (0, 1000, 2000, 3000)]


# -- everything at once, against an image of the file ---------------------------------------------


class BodyError(Exception):
    """Raised in the body of a writer."""


class StoreMachine(RuleBasedStateMachine):
    """The model is an image of the file, and the bytes of each range that has a receipt."""

    NBYTES = 40 * ALIGNMENT + 123

    ranges = Bundle("ranges")

    @initialize(
        target=ranges,
        access=st.sampled_from([None, "dense", "sparse"]),
        guard=st.sampled_from(["flag", "seal"]),
        allocator=st.sampled_from(["sequential", "concurrent"]),
    )
    def begin(self, **options: Any) -> AllocatedRange:
        self.folder = tempfile.TemporaryDirectory()
        self.options = options
        self.in_place = options["guard"] == "flag" and options["access"] != "sparse"
        self.image = bytearray(self.NBYTES)
        self.own(bs.create(Path(self.folder.name, "data.bin"), self.NBYTES, **options))
        self.taken = 2 * ALIGNMENT
        return self.store.allocate(5000)

    def own(self, store: bs.BlockStore) -> None:
        """Begin a model of a store that was just opened."""
        self.store = store
        self.taken = 0
        self.spent: set[AllocatedRange] = set()
        self.written: dict[AllocatedRange, bytes] = {}
        self.durable: set[AllocatedRange] = set()

    def refuses(self, r: AllocatedRange, *, rewrite: bool) -> type[Exception] | None:
        """Return what must be raised when this range is opened for writing."""
        if r._owner is not self.store:
            return bs.ClosedStoreError
        if r in self.spent:
            return bs.SpentRangeError
        return bs.AlreadyWrittenError if r in self.written and not rewrite else None

    def void(self, r: AllocatedRange) -> None:
        self.written.pop(r, None)
        self.durable.discard(r)

    def hold(self, r: AllocatedRange, data: bytes) -> None:
        self.image[r.start : r.start + len(data)] = data
        self.written[r] = data

    @rule(target=ranges, nbytes=st.integers(1, 5 * ALIGNMENT), tag=st.integers(0, 2**64 - 1))
    def allocate(self, nbytes: int, tag: int) -> Any:
        step = align_up(nbytes)
        if nbytes > self.NBYTES - self.taken:
            with pytest.raises(bs.OutOfSpaceError):
                self.store.allocate(nbytes)
            return multiple()
        r = self.store.allocate(nbytes, tag=tag)
        stop = min(self.taken + step, self.NBYTES)
        assert (r.start, r.stop, r.nbytes, r.tag) == (self.taken, stop, nbytes, tag)
        self.taken = stop
        return r

    @rule(target=ranges, nbytes=st.integers(1, 5 * ALIGNMENT))
    def allocate_partial(self, nbytes: int) -> Any:
        if self.taken == self.NBYTES:
            with pytest.raises(bs.OutOfSpaceError):
                self.store.allocate(nbytes, partial=True)
            return multiple()
        r = self.store.allocate(nbytes, partial=True)
        assert (r.start, r.nbytes) == (self.taken, min(nbytes, self.NBYTES - self.taken))
        self.taken = r.stop
        return r

    @rule(target=ranges, r=ranges, fraction=st.floats(0, 1), up=st.booleans())
    def split(self, r: AllocatedRange, fraction: float, up: bool) -> Any:
        split = r.split_up if up else r.split_down
        if error := self.refuses(r, rewrite=False):
            with pytest.raises(error):
                split(int(fraction * r.nbytes))
            return multiple()
        parts = [part for part in split(int(fraction * r.nbytes)) if part is not None]
        self.spent.add(r)
        return multiple(*parts)

    @rule(r=ranges, rewrite=st.booleans(), byte=st.integers(0, 255))
    def write(self, r: AllocatedRange, rewrite: bool, byte: int) -> None:
        data = bytes([byte]) * r.nbytes
        if error := self.refuses(r, rewrite=rewrite):
            with pytest.raises(error):
                r.write(data, rewrite=rewrite)
            return
        self.void(r)
        r.write(data, rewrite=rewrite)
        self.hold(r, data)

    @rule(r=ranges, rewrite=st.booleans(), byte=st.integers(0, 255), at=st.floats(0, 1), fails=st.booleans())
    def change_from_somewhere_on(self, r: AllocatedRange, rewrite: bool, byte: int, at: float, fails: bool) -> None:
        first = int(at * (r.nbytes - 1))
        before = bytes(self.image[r.start : r.start + r.nbytes])
        after = before[:first] + bytes([byte]) * (r.nbytes - first)
        if error := self.refuses(r, rewrite=rewrite):
            with pytest.raises(error), r.writer(rewrite=rewrite):
                pytest.fail("the body was entered")
            return
        self.void(r)
        with suppress(BodyError), r.writer(rewrite=rewrite) as a:
            assert bytes(a) == before
            a[first:] = byte
            if fails:
                raise BodyError
        if not fails:
            self.hold(r, after)
        elif self.in_place:
            self.image[r.start : r.start + r.nbytes] = after

    @rule()
    def flush(self) -> None:
        self.store.flush()
        self.durable = set(self.written)

    @rule(r=ranges)
    def flush_one(self, r: AllocatedRange) -> None:
        receipt = r.receipt
        if receipt is None:
            return
        if r._owner is not self.store:
            with pytest.raises(bs.ForeignRangeError):
                self.store.flush(receipt)
        else:
            assert (self.store.flush(receipt) == 0) == (r in self.durable)
            if r not in self.durable:
                self.durable = set(self.written)

    @rule()
    def start_writing_back(self) -> None:
        assert self.store.flush(wait=False) == 0

    @rule(r=ranges)
    def read(self, r: AllocatedRange) -> None:
        if r._owner is not self.store:
            with pytest.raises(bs.ClosedStoreError):
                r.read()
        elif r in self.spent:
            with pytest.raises(bs.SpentRangeError):
                r.read()
        elif r not in self.written:
            with pytest.raises(bs.NotWrittenError):
                r.read()
        else:
            assert bytes(r.read()) == self.written[r]

    def rows(self, ranges: Iterable[AllocatedRange], durable: Container[AllocatedRange]) -> list[tuple[Any, ...]]:
        """Return the receipts of ranges as rows."""
        return sorted((r.start, r.stop, r.nbytes, r.tag, r in durable, 0) for r in ranges)

    @rule(reset=st.booleans())
    def read_in_another_store(self, reset: bool) -> None:
        boot = {"BLOCKSTORE_BOOT_ID": "another"} if reset else {}
        with patch.dict(os.environ, boot), bs.open(self.store.path, mode="r") as reader:
            assert reader.receipts().tolist() == self.rows(self.durable if reset else self.written, self.durable)

    @rule()
    def start_over(self) -> None:
        old, written = self.store, self.written
        old.close()
        assert all(r.receipt is not None and r.receipt.durable for r in written)
        with pytest.raises(bs.ClosedStoreError):
            old.allocate(1)
        with bs.open(old.path) as again:
            assert again.receipts().tolist() == self.rows(written, durable=written)
            assert again.free == self.NBYTES - sum(r.stop - r.start for r in written)
            assert all(again.raw.read_at(r.start, r.nbytes) == data for r, data in written.items())
            assert type(again.allocator) is type(old.allocator)
            for r in again.ranges(self.NBYTES):
                assert not any(r.start < other.stop and other.start < r.stop for other in written)
        self.own(bs.open(old.path, discard=True, **self.options))

    @invariant()
    def the_file_is_like_its_image(self) -> None:
        if hasattr(self, "store"):
            assert contents(self.store) == self.image

    @invariant()
    def the_receipts_are_those_of_the_ranges_that_are_written(self) -> None:
        if hasattr(self, "store"):
            assert self.store.receipts().tolist() == self.rows(self.written, self.durable)
            assert all(r.receipt is not None and r.receipt.durable == (r in self.durable) for r in self.written)

    @invariant()
    def what_is_pending_is_what_no_receipt_is_for(self) -> None:
        if hasattr(self, "store"):
            written = bytearray(self.NBYTES)
            for r in self.written:
                written[r.start : r.stop] = b"\1" * (r.stop - r.start)
            for hole in self.store.pending():
                assert hole["nbytes"] == hole["stop"] - hole["start"] > 0
                assert not any(written[hole["start"] : hole["stop"]])
                written[hole["start"] : hole["stop"]] = b"\1" * int(hole["nbytes"])
            assert all(written)

    @invariant()
    def what_is_free_was_not_handed_out(self) -> None:
        if hasattr(self, "store"):
            assert self.store.free == self.NBYTES - self.taken

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()


StoreMachine.TestCase.settings = settings(deadline=None, max_examples=150, stateful_step_count=40)
TestStore = StoreMachine.TestCase


def test_a_masked_array_is_refused_since_its_mask_has_no_place(tmp_path: Path) -> None:
    with bs.create(tmp_path / "masked.bin", 4096) as store:
        r = store.allocate(8)
        with pytest.raises(bs.DtypeError, match="no bytes for its mask"):
            r.write(np.ma.masked_array([1, 2], [True, False], "i4"))

        assert r.receipt is None


def test_the_parts_of_a_large_sparse_range_show_what_a_failed_writer_left(tmp_path: Path) -> None:
    def fail(r: AllocatedRange) -> None:
        with r.writer() as a:
            a[:] = 7
            raise KeyError("half-way")

    with bs.create(tmp_path / "sparse.bin", 1 << 23, access="sparse") as store:
        r = store.allocate(1 << 22)
        with pytest.raises(KeyError, match="half-way"):
            fail(r)
        low, _ = r.split_up(4096)
        assert low is not None
        with low.writer() as a:
            seen = a.tolist()

    assert seen == [7] * 4096
