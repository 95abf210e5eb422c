"""Layouts are checked before a byte is touched, and a loan finds what escaped from it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import blockstore as bs
from blockstore.views import BYTE, Loan, check_dtype, check_layout, check_shape, layout_nbytes

BUFFER_NBYTES = 256

untimed = settings(deadline=None)

dtypes = npst.nested_dtypes(npst.scalar_dtypes(), max_leaves=4, max_itemsize=64)
flat_dtypes = npst.scalar_dtypes() | npst.array_dtypes(npst.scalar_dtypes())
shapes = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
sides = st.sampled_from([0, 1, 2, 3, 2**16, 2**31, 2**32, 2**62, 2**63 - 1, 2**63])


# -- layouts against NumPy ------------------------------------------------------------------------


@untimed
@given(shape=shapes, dtype=dtypes)
def test_a_layout_is_the_one_that_numpy_gives_the_array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    expected = np.empty(shape, dtype)

    layout = check_layout(shape, dtype)

    assert layout == (expected.shape, expected.dtype)
    assert layout_nbytes(layout) == expected.nbytes


@untimed
@given(shape=st.lists(sides, max_size=5), dtype=flat_dtypes)
def test_a_layout_is_accepted_where_numpy_lays_it_over_a_buffer(shape: list[int], dtype: np.dtype[Any]) -> None:
    buffer = bytearray(BUFFER_NBYTES)
    refusal = None
    try:
        np.ndarray(shape, dtype, buffer, strides=[0] * len(shape))
    except ValueError:
        refusal = "more than NumPy can address"
    else:
        try:
            np.ndarray(shape, dtype, buffer)
        except TypeError:
            refusal = "needs"

    if refusal is None:
        assert layout_nbytes(check_layout(shape, dtype, BUFFER_NBYTES)) <= BUFFER_NBYTES
    else:
        with pytest.raises(bs.LayoutError, match=refusal):
            check_layout(shape, dtype, BUFFER_NBYTES)


@untimed
@given(nbytes=st.integers(1, 1000), dtype=flat_dtypes)
def test_without_a_shape_the_items_are_those_of_frombuffer(nbytes: int, dtype: np.dtype[Any]) -> None:
    try:
        expected = np.frombuffer(bytearray(nbytes), dtype)
    except ValueError:
        with pytest.raises(bs.LayoutError, match="are no whole number of"):
            check_layout(None, dtype, nbytes)
    else:
        assert check_layout(None, dtype, nbytes) == (expected.shape, expected.dtype)


@untimed
@given(nbytes=st.integers(1, 2**62))
def test_without_shape_and_dtype_the_items_are_bytes(nbytes: int) -> None:
    assert check_layout(None, None, nbytes) == ((nbytes,), BYTE)


@untimed
@given(shape=st.lists(st.integers(0, 2**70), max_size=6), dtype=flat_dtypes)
def test_the_bytes_of_a_layout_are_exact_at_any_size(shape: list[int], dtype: np.dtype[Any]) -> None:
    assert layout_nbytes((tuple(shape), dtype)) == math.prod(shape) * dtype.itemsize


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        pytest.param(3, (3,), id="int"),
        pytest.param(np.int8(3), (3,), id="numpy int"),
        pytest.param([2, np.uint64(3)], (2, 3), id="list"),
        pytest.param(np.array([2, 3]), (2, 3), id="array of ints"),
        pytest.param((), (), id="no axis"),
        pytest.param((1,) * 64, (1,) * 64, id="64 axes"),
    ],
)
def test_a_shape_is_an_int_or_any_sequence_of_ints(shape: Any, axes: tuple[int, ...]) -> None:
    checked = check_shape(shape)

    assert checked == axes
    assert [type(n) for n in checked] == [int] * len(axes)


@pytest.mark.parametrize(
    ("dtype", "nbytes", "layout"),
    [
        pytest.param(("i4", (2, 3)), 48, ((2, 2, 3), np.dtype("i4")), id="subarray"),
        pytest.param(((np.dtype(("i4", (2,))), (3,))), 48, ((2, 3, 2), np.dtype("i4")), id="subarray of subarrays"),
        pytest.param([("x", "f4", (3,))], 24, ((2,), np.dtype([("x", "f4", (3,))])), id="field that is a subarray"),
        pytest.param(">f8", 16, ((2,), np.dtype(">f8")), id="foreign byte order"),
        pytest.param("S3", 9, ((3,), np.dtype("S3")), id="strings of a fixed length"),
        pytest.param("M8[ns]", 16, ((2,), np.dtype("M8[ns]")), id="times"),
    ],
)
def test_a_dtype_alone_takes_the_whole_range(dtype: Any, nbytes: int, layout: tuple[Any, ...]) -> None:
    assert check_layout(None, dtype, nbytes) == layout


# -- what is refused ------------------------------------------------------------------------------

BAD_DTYPES = [
    pytest.param("O", "holds Python objects", id="object"),
    pytest.param([("a", "i4"), ("b", "O")], "holds Python objects", id="field of objects"),
    pytest.param([("a", [("b", "O")])], "holds Python objects", id="nested field of objects"),
    pytest.param(("O", (2,)), "holds Python objects", id="subarray of objects"),
    pytest.param(np.dtypes.StringDType(), "holds Python objects", id="StringDType"),
    pytest.param("S0", "itemsize of 0 bytes", id="S0"),
    pytest.param("U", "itemsize of 0 bytes", id="U without a length"),
    pytest.param("V0", "itemsize of 0 bytes", id="V0"),
    pytest.param([], "itemsize of 0 bytes", id="no field"),
    pytest.param(("i4", (0,)), "itemsize of 0 bytes", id="empty subarray"),
    pytest.param("garbage", "not a dtype: 'garbage'", id="garbage"),
    pytest.param(7, "not a dtype: 7", id="int"),
    pytest.param([("a", "i4"), ("a", "i4")], "not a dtype", id="two fields of one name"),
    pytest.param(("i4", -1), "not a dtype", id="negative subarray"),
    pytest.param(("i4", (2**40, 2**40)), "not a dtype", id="subarray past the address space"),
    pytest.param("i4,(2", "not a dtype", id="string that numpy cannot parse"),
]

BAD_SHAPES = [
    pytest.param((-1,), "has a negative axis", id="negative axis"),
    pytest.param((2, -3, 4), "has a negative axis", id="negative axis among others"),
    pytest.param(2.0, "an int or a sequence of ints, not 2.0", id="float"),
    pytest.param((2, 3.0), "an int or a sequence of ints", id="float axis"),
    pytest.param("12", "an int or a sequence of ints", id="string"),
    pytest.param(((2,), 3), "an int or a sequence of ints", id="nested"),
    pytest.param((2**62, 2**62), "more than NumPy can address", id="overflow"),
    pytest.param((2**62, 0), "more than NumPy can address", id="overflow in an empty array"),
    pytest.param((2**64,), "more than NumPy can address", id="axis past 64 bits"),
    pytest.param((1,) * 65, "more than NumPy can address", id="65 axes"),
]


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with bs.create(tmp_path / "data.bin", 1 << 16) as store:
        yield store


@pytest.mark.parametrize(("dtype", "message"), BAD_DTYPES)
def test_a_dtype_that_cannot_live_in_a_file_is_refused(dtype: Any, message: str) -> None:
    with pytest.raises(bs.DtypeError, match=message):
        check_dtype(dtype)


@pytest.mark.parametrize(("dtype", "message"), BAD_DTYPES)
def test_nothing_is_allocated_for_a_refused_dtype(store: bs.BlockStore, dtype: Any, message: str) -> None:
    with pytest.raises(bs.DtypeError, match=message):
        store.allocate(shape=(2,), dtype=dtype)

    assert (store.free, store.allocator.next_start) == (store.nbytes, 0)


@pytest.mark.parametrize(("shape", "message"), BAD_SHAPES)
def test_a_malformed_shape_is_refused(shape: Any, message: str) -> None:
    with pytest.raises(bs.LayoutError, match=message):
        check_layout(shape, "f8")


@pytest.mark.parametrize(("shape", "message"), BAD_SHAPES)
def test_nothing_is_allocated_for_a_refused_shape(store: bs.BlockStore, shape: Any, message: str) -> None:
    with pytest.raises(bs.LayoutError, match=message):
        store.allocate(shape=shape, dtype="f8")

    assert (store.free, store.allocator.next_start) == (store.nbytes, 0)


@pytest.mark.parametrize(("shape", "message"), BAD_SHAPES)
def test_a_writer_with_a_refused_shape_leaves_the_range_fresh(store: bs.BlockStore, shape: Any, message: str) -> None:
    r = store.allocate(100)

    with pytest.raises(bs.LayoutError, match=message):
        r.writer(shape, "f8")

    assert repr(r) == "<AllocatedRange [0, 4096) 100 bytes, fresh>"


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        pytest.param((13,), "f8", r"shape \(13,\) of float64 needs 104 bytes, the range has 100", id="past the range"),
        pytest.param((101,), None, r"needs 101 bytes, the range has 100", id="bytes past the range"),
        pytest.param(
            (5,), ("i4", (2, 3)), r"shape \(5, 2, 3\) of int32 needs 120 bytes", id="subarrays past the range"
        ),
        pytest.param(None, "f8", "100 bytes are no whole number of float64 items of 8 bytes", id="no whole number"),
        pytest.param(None, ("i4", (2, 3)), "are no whole number of", id="no whole number of subarrays"),
        pytest.param((1,) * 63, ("i1", (1, 1)), "more than NumPy can address", id="65 axes with the subarray's"),
    ],
)
def test_a_layout_that_does_not_fit_the_range_is_refused(
    store: bs.BlockStore, shape: Any, dtype: Any, message: str
) -> None:
    with pytest.raises(bs.LayoutError, match=message):
        store.allocate(100).writer(shape, dtype)


def test_a_dtype_alone_allocates_nothing(store: bs.BlockStore) -> None:
    with pytest.raises(bs.LayoutError, match="a dtype alone says no size"):
        store.allocate(dtype="f8")

    assert store.free == store.nbytes


# -- loans ----------------------------------------------------------------------------------------


def lend(shape: tuple[int, ...] = (4, 6), dtype: str = "u1") -> tuple[Loan, np.ndarray[Any, Any]]:
    loan = Loan()
    return loan, loan.lend(np.ndarray(shape, dtype, bytearray(BUFFER_NBYTES)))


def test_what_is_lent_is_a_writable_array_over_the_buffer_from_the_offset() -> None:
    buffer = bytearray(100)

    a = Loan().lend(np.ndarray((2, 3), "<u2", buffer, 10))
    a[...] = [[1, 2, 3], [4, 5, 6]]

    assert buffer == bytes(10) + np.arange(1, 7, dtype="<u2").tobytes() + bytes(78)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)], ids=str)
def test_from_an_array_of_any_shape_nothing_escapes_by_itself(shape: tuple[int, ...]) -> None:
    loan, a = lend(shape)

    assert a.shape == shape
    assert not loan.take_back()
    assert loan.count() == 0


def test_an_array_that_was_taken_back_is_read_only() -> None:
    loan, a = lend()

    loan.take_back()

    with pytest.raises(ValueError, match="read-only"):
        a[0, 0] = 1


def test_a_loan_that_nobody_keeps_is_taken_back_like_any_other() -> None:
    loan = lend()[0]

    assert not loan.take_back()


def test_a_view_made_after_taking_back_is_read_only_like_the_array() -> None:
    loan, a = lend()

    loan.take_back()

    assert not a[1:].flags.writeable


def test_an_alias_is_looked_at_and_not_counted() -> None:
    loan, a = lend()
    alias = [a]

    assert loan.take_back()
    assert loan.count() == 0
    assert alias[0] is a


@untimed
@given(data=st.data())
def test_whatever_basic_indexing_makes_is_found(data: st.DataObject) -> None:
    loan, a = lend()
    index = data.draw(npst.basic_indices(a.shape, allow_ellipsis=True, allow_newaxis=True))

    part = a[index]

    if part is a or not isinstance(part, np.ndarray):  # the whole of it, or a number
        assert loan.count() == 0
    else:
        assert loan.take_back()
        assert loan.count() == 1


@untimed
@given(steps=st.lists(st.none() | st.integers(0, 9), max_size=30))
def test_the_count_follows_the_views_that_are_alive(steps: list[int | None]) -> None:
    loan, a = lend()
    views: list[Any] = []

    for step in steps:
        if step is None:
            views.append(a[len(views) % 4 :])
        elif step < len(views):
            del views[step]
        assert loan.count() == len(views)


def test_two_loans_of_one_buffer_count_their_own_views_only() -> None:
    buffer = bytearray(100)
    first, second = Loan(), Loan()
    a, b = first.lend(np.ndarray(10, BYTE, buffer)), second.lend(np.ndarray(10, BYTE, buffer))

    part = b[1:]

    assert (first.take_back(), second.take_back(), first.count(), second.count()) == (False, True, 0, 1)
    assert len(part) == len(a) - 1
