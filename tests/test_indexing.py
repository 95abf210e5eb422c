"""Reading and assigning by blocks gives what NumPy's basic indexing gives, refusals included."""

import math
import re
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from blockstore import SelectionError
from blockstore.indexing import Selection, aligned, block_range, overlap, parse

Index = tuple[int, ...]


class Blocks(NamedTuple):
    """An array cut into blocks: the dict is all that is left of it."""

    shape: Index
    chunks: Index
    dtype: np.dtype[Any]
    data: dict[Index, NDArray[Any]]


def cut(a: NDArray[Any], chunks: Index) -> Blocks:
    """Cut an array into blocks."""
    grid = [range(-(-n // chunk)) for n, chunk in zip(a.shape, chunks, strict=True)]
    data = {i: a[extent(i, a.shape, chunks)].copy() for i in product(*grid)}
    return Blocks(a.shape, chunks, a.dtype, data)


def extent(block: Index, shape: Index, chunks: Index) -> tuple[slice, ...]:
    return tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(block, chunks, shape, strict=True))


def places(block: Index, blocks: Blocks, selection: Selection) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return where in the gathered array the part of a block goes, and where in the block it is."""
    bounds = extent(block, blocks.shape, blocks.chunks)
    pairs = [overlap(axis, b.start, b.stop) for axis, b in zip(selection.axes, bounds, strict=True)]
    found = [pair for pair in pairs if pair is not None]
    assert len(found) == len(pairs), f"block {block} was listed, and has nothing of {selection}"
    return tuple(to for to, _ in found), tuple(at for _, at in found)


def read(blocks: Blocks, key: object) -> Any:
    """Index an array that lies in blocks."""
    selection = parse(key, blocks.shape)
    gathered = np.full(tuple(map(len, selection.axes)), -1, blocks.dtype)
    hit = [block_range(axis, chunk) for axis, chunk in zip(selection.axes, blocks.chunks, strict=True)]
    for block in product(*hit):
        to, at = places(block, blocks, selection)
        gathered[to] = blocks.data[block][at]
    return gathered[selection.post]


def assign(blocks: Blocks, key: object, value: NDArray[Any]) -> None:
    """Assign to whole blocks of an array that lies in blocks."""
    ranges, selection = aligned(key, blocks.shape, blocks.chunks)
    spread = np.broadcast_to(value, selection.shape)[selection.inverse]
    for block in product(*ranges):
        to, _ = places(block, blocks, selection)
        assert spread[to].shape == blocks.data[block].shape
        blocks.data[block] = spread[to]


def outcome(call: Callable[[], Any]) -> Any:
    """Return a result in a form that compares, with its type; of an exception the type."""
    try:
        result = call()
    except (IndexError, TypeError, ValueError) as error:
        return type(error)
    return type(result), result.shape, result.dtype, result.tolist()


def numbered(shape: Index) -> NDArray[Any]:
    return np.arange(math.prod(shape)).reshape(shape)


@st.composite
def cut_arrays(draw: st.DrawFn, min_side: int = 0) -> tuple[NDArray[Any], Index]:
    """Draw an array whose elements all differ, and chunks for it, some longer than its axes."""
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=min_side, max_side=9))
    return numbered(shape), tuple(draw(st.integers(1, n + 2)) for n in shape)


coordinates = st.none() | st.integers(-12, 12) | st.sampled_from([2**70, -(2**70)])
steps = st.none() | st.integers(-4, 4) | st.sampled_from([2**70, -(2**70)])
integers = st.integers(-10, 10)
parts = st.one_of(
    integers,
    integers.map(np.int8),
    integers.map(np.array),
    st.builds(slice, coordinates, coordinates, steps),
    st.just(...),
    st.none(),
    st.sampled_from([1.5, "a", slice(1.5), slice(None, "a"), slice(None, None, 0.0), np.array(1.0), b"a", {}]),
)
any_index = parts | st.lists(parts, max_size=5).map(tuple)


# -- reading --------------------------------------------------------------------------------------


@given(cut_arrays(), st.data())
def test_what_blocks_give_is_what_numpy_gives(drawn: tuple[NDArray[Any], Index], data: st.DataObject) -> None:
    a, chunks = drawn
    key = data.draw(hnp.basic_indices(a.shape, max_dims=8, allow_newaxis=True))

    assert outcome(lambda: read(cut(a, chunks), key)) == outcome(lambda: a[key])


@given(cut_arrays(), any_index)
def test_any_index_gives_what_it_gives_in_numpy_or_the_same_error(drawn: tuple[NDArray[Any], Index], key: Any) -> None:
    a, chunks = drawn

    assert outcome(lambda: read(cut(a, chunks), key)) == outcome(lambda: a[key])


@given(cut_arrays(), any_index)
def test_the_shape_of_a_selection_is_that_of_its_result(drawn: tuple[NDArray[Any], Index], key: Any) -> None:
    a, _ = drawn

    def shaped_by_numpy() -> Index:
        return np.shape(a[key])

    def shaped() -> Index:
        return parse(key, a.shape).shape

    assert outcome_of_shape(shaped) == outcome_of_shape(shaped_by_numpy)


def outcome_of_shape(call: Callable[[], Index]) -> Index | type[Exception]:
    try:
        return call()
    except (IndexError, TypeError, ValueError) as error:
        return type(error)


@given(cut_arrays(), st.data())
def test_data_indexed_with_the_inverse_is_shaped_as_gathered_and_shares_its_memory(
    drawn: tuple[NDArray[Any], Index], data: st.DataObject
) -> None:
    a, _ = drawn
    selection = parse(data.draw(hnp.basic_indices(a.shape, max_dims=8, allow_newaxis=True)), a.shape)
    value = np.zeros(selection.shape)

    spread = value[selection.inverse]

    assert spread.shape == tuple(map(len, selection.axes))
    assert spread.size == 0 or np.shares_memory(spread, value)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        pytest.param((1, 2), np.int64, id="integers"),
        pytest.param((1, 2, ...), np.ndarray, id="integers, then an ellipsis"),
        pytest.param((1, ..., 2), np.ndarray, id="an ellipsis for no axes"),
        pytest.param((1, 2, None), np.ndarray, id="integers, then None"),
        pytest.param((np.int8(1), np.array(2)), np.int64, id="integers of NumPy"),
        pytest.param((1, slice(2, 3)), np.ndarray, id="a slice of one element"),
    ],
)
def test_a_single_element_is_a_scalar_or_an_array_as_in_numpy(key: tuple[Any, ...], kind: type) -> None:
    a = numbered((3, 4))

    result = read(cut(a, (2, 2)), key)

    assert (type(result), np.shape(result)) == (type(a[key]), np.shape(a[key]))
    assert isinstance(result, kind)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        pytest.param((), np.int64, id="nothing"),
        pytest.param(..., np.ndarray, id="an ellipsis"),
        pytest.param(None, np.ndarray, id="None"),
    ],
)
def test_an_array_without_axes_is_one_block(key: Any, kind: type) -> None:
    a = np.array(7)

    result = read(cut(a, ()), key)

    assert (type(result), np.shape(result)) == (type(a[key]), np.shape(a[key]))
    assert isinstance(result, kind)
    assert np.all(result == 7)


# -- one axis -------------------------------------------------------------------------------------

axes = st.builds(range, st.integers(0, 60), st.integers(0, 60), st.integers(1, 30)) | st.builds(
    range, st.integers(0, 60), st.integers(-1, 60), st.integers(-30, -1)
)


@given(axes, st.integers(1, 20))
def test_the_blocks_of_an_axis_are_those_that_its_indices_lie_in(axis: range, chunk: int) -> None:
    assert list(block_range(axis, chunk)) == sorted({i // chunk for i in axis})


@given(axes, st.integers(0, 60), st.integers(0, 60))
def test_an_overlap_is_the_indices_that_lie_in_the_block(axis: range, start: int, length: int) -> None:
    taken = [(position, i - start) for position, i in enumerate(axis) if start <= i < start + length]
    found = overlap(axis, start, start + length)

    if found is None:
        assert taken == []
    else:
        to, at = found
        assert list(zip(range(len(axis))[to], range(length)[at], strict=True)) == taken
        assert taken, "an overlap without elements is None"


@pytest.mark.parametrize(
    ("axis", "to", "at"),
    [
        pytest.param(range(12), slice(4, 8), slice(0, 4, 1), id="whole"),
        pytest.param(range(5, 6), slice(0, 1), slice(1, 2, 1), id="one"),
        pytest.param(range(5, -1, -1), slice(0, 2), slice(1, None, -1), id="backwards to its first element"),
        pytest.param(range(11, 4, -1), slice(4, 7), slice(3, 0, -1), id="backwards, short of its first element"),
        pytest.param(range(4, -1, -1), slice(0, 1), slice(0, 1, 1), id="backwards, only its first element"),
        pytest.param(range(7, 0, -7), slice(0, 1), slice(3, 4, 1), id="a long step backwards"),
        pytest.param(range(1, 10**18, 3), slice(1, 3), slice(0, 4, 3), id="more than could be counted"),
    ],
)
def test_the_overlap_with_a_block_from_4_to_8(axis: range, to: slice, at: slice) -> None:
    assert overlap(axis, 4, 8) == (to, at)


@pytest.mark.parametrize(
    "axis",
    [
        pytest.param(range(0), id="nothing"),
        pytest.param(range(4), id="before"),
        pytest.param(range(8, 12), id="behind"),
        pytest.param(range(3, 12, 5), id="a step over it"),
        pytest.param(range(11, 2, -8), id="a step back over it"),
    ],
)
def test_no_overlap_with_a_block_from_4_to_8(axis: range) -> None:
    assert overlap(axis, 4, 8) is None


@pytest.mark.parametrize(
    ("axis", "blocks"),
    [
        pytest.param(range(10**15), range(10**14), id="without a step"),
        pytest.param(range(10**15, -1, -10), range(10**14 + 1), id="a step of a block, backwards"),
        pytest.param(range(5, 10**15, 50), range(0, 10**14, 5), id="a step of whole blocks"),
    ],
)
def test_many_blocks_are_a_range_and_not_counted_out(axis: range, blocks: range) -> None:
    assert block_range(axis, 10) == blocks


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "message"),
    [
        pytest.param(3, "index 3 is out of bounds for axis 0 with size 3", id="above"),
        pytest.param((0, -5), "index -5 is out of bounds for axis 1 with size 4", id="below"),
        pytest.param((..., 4), "index 4 is out of bounds for axis 1 with size 4", id="behind an ellipsis"),
        pytest.param(2**70, f"index {2**70} is out of bounds for axis 0 with size 3", id="above any integer of C"),
        pytest.param(
            (0, 0, None, 0),
            "too many indices for array: array is 2-dimensional, but 3 were indexed",
            id="too many",
        ),
        pytest.param((..., 0, ...), r"an index can only have a single ellipsis \('...'\)", id="two ellipses"),
        pytest.param((None,) * 63, "at most 64 axes, the result of this index would have 65", id="too many None"),
    ],
)
def test_an_index_that_does_not_fit_is_refused_with_its_numbers(key: object, message: str) -> None:
    with pytest.raises(IndexError, match=message):
        parse(key, (3, 4))


@pytest.mark.parametrize(
    ("key", "named"),
    [
        pytest.param([0, 1], "list", id="a list"),
        pytest.param([], "list", id="an empty list"),
        pytest.param(np.array([0, 1]), "ndarray", id="an array of integers"),
        pytest.param(np.array([0]), "ndarray", id="an array of one integer"),
        pytest.param(np.zeros((3, 4), bool), "ndarray", id="a mask"),
        pytest.param(np.array(True), "ndarray", id="a mask without axes"),
        pytest.param(True, "bool", id="a bool"),
        pytest.param(np.True_, "bool", id="a bool of NumPy"),
        pytest.param((slice(None), False), "bool", id="a bool in a tuple"),
        pytest.param(1.0, "float", id="a float"),
        pytest.param(np.float64(1), "float64", id="a float of NumPy"),
        pytest.param("a", "str", id="a string"),
        pytest.param(((0, 1),), "tuple", id="a tuple in a tuple"),
        pytest.param(range(2), "range", id="a range"),
    ],
)
def test_what_is_no_basic_index_is_refused_with_what_takes_it(key: object, named: str) -> None:
    message = (
        f"blockstore takes basic indexing: integers, slices, `...` and None, not {named}; "
        "`np.asarray(x)[...]` or dask (`blockstore.dask.from_array(x)[...]`) take the rest"
    )

    with pytest.raises(IndexError, match=re.escape(message)):
        parse(key, (3, 4))


@pytest.mark.parametrize("key", [slice(None, None, 0), (0, slice(1, 2, 0))])
def test_a_step_of_zero_is_refused(key: object) -> None:
    with pytest.raises(ValueError, match="slice step cannot be zero"):
        parse(key, (3, 4))


@pytest.mark.parametrize("key", [slice(1.0), slice("a", None), slice(None, None, 1.0), slice(np.array([1]))])
def test_a_slice_that_is_not_of_integers_is_refused(key: object) -> None:
    with pytest.raises(TypeError, match=r"slice indices must be integers|only integer scalar arrays"):
        parse(key, (3, 4))


# -- assigning ------------------------------------------------------------------------------------


@st.composite
def selections_of_blocks(draw: st.DrawFn, shape: Index, chunks: Index) -> tuple[Any, ...]:
    """Draw an index that takes whole blocks, written in the ways there are to write it."""
    items: list[Any] = []
    for n, chunk in zip(shape, chunks, strict=True):
        blocks = st.integers(0, -(-n // chunk))
        start, stop = sorted(min(draw(blocks) * chunk, n) for _ in range(2))
        ways: list[Any] = [slice(start, stop), slice(start - n if start < n else n, stop), slice(start, stop, 1)]
        if stop == n:
            ways.append(slice(start, None))
        if stop - start == 1:
            ways += [start, start - n, slice(start, stop, 5)]
        items.append(draw(st.sampled_from(ways)))
        items += [None] * draw(st.integers(0, 1))
    return tuple(items)


@given(cut_arrays(), st.data())
def test_assigning_whole_blocks_does_what_it_does_in_numpy(
    drawn: tuple[NDArray[Any], Index], data: st.DataObject
) -> None:
    a, chunks = drawn
    key = data.draw(selections_of_blocks(a.shape, chunks))
    shape = np.shape(a[key])
    kept = data.draw(st.integers(0, len(shape)))
    value = 1000 + numbered(tuple(data.draw(st.sampled_from([n, 1])) for n in shape[kept:]))
    blocks = cut(a, chunks)

    assign(blocks, key, value)
    a[key] = value

    assert read(blocks, ...).tolist() == a.tolist()


@given(cut_arrays(), st.data())
def test_what_is_accepted_are_the_blocks_that_make_up_the_selection(
    drawn: tuple[NDArray[Any], Index], data: st.DataObject
) -> None:
    a, chunks = drawn
    key = data.draw(hnp.basic_indices(a.shape, max_dims=8, allow_newaxis=True))
    try:
        ranges, selection = aligned(key, a.shape, chunks)
    except SelectionError:
        return

    covered = np.zeros(a.shape, bool)
    for block in product(*ranges):
        covered[extent(block, a.shape, chunks)] = True
    asked = np.zeros(a.shape, bool)
    asked[key] = True
    assert covered.tolist() == asked.tolist()
    assert selection == parse(key, a.shape)


@given(cut_arrays(min_side=1), st.data())
def test_what_is_refused_cuts_blocks_or_has_a_step_and_the_nearest_is_the_smallest_of_blocks_around_it(
    drawn: tuple[NDArray[Any], Index], data: st.DataObject
) -> None:
    a, chunks = drawn
    key = data.draw(hnp.basic_indices(a.shape, max_dims=8, allow_newaxis=True))
    try:
        aligned(key, a.shape, chunks)
    except SelectionError as error:
        message = str(error)
    else:
        return

    asked, nearest = re.fullmatch(
        r"(x\[.*\]) (?:cuts|steps through) blocks of .*: the nearest aligned selection is (x\[.*\])", message
    ).groups()  # type: ignore[union-attr]
    taken = np.zeros(a.shape, bool)
    taken[key] = True
    assert np.array_equal(eval(asked, {"x": a}), a[key])
    ranges, selection = aligned(eval(nearest, {"x": Brackets()}), a.shape, chunks)
    touched = parse(key, a.shape).axes
    assert [list(r) for r in ranges] == [
        list(range(min(block_range(axis, c)), max(block_range(axis, c)) + 1))
        for axis, c in zip(touched, chunks, strict=True)
    ]
    widened = np.zeros(a.shape, bool)
    widened[np.ix_(*selection.axes)] = True
    assert np.all(widened[taken])
    steps = any(axis.step != 1 for axis in touched)
    assert steps or widened.sum() > taken.sum(), "nothing was cut"


class Brackets:
    """Gives back what stands between the brackets."""

    def __getitem__(self, key: Any) -> Any:
        return key


@pytest.mark.parametrize(
    ("key", "message"),
    [
        pytest.param(
            slice(10, 300),
            "x[10:300] cuts blocks of (256, 100): the nearest aligned selection is x[0:512]",
            id="both ends",
        ),
        pytest.param(
            slice(800, None),
            "x[800:] cuts blocks of (256, 100): the nearest aligned selection is x[768:1000]",
            id="up to the edge",
        ),
        pytest.param(
            (slice(None), -1),
            "x[:, -1] cuts blocks of (256, 100): the nearest aligned selection is x[:, 200:300]",
            id="a column",
        ),
        pytest.param(
            (..., None, slice(np.int8(0), np.int64(50))),
            "x[..., None, 0:50] cuts blocks of (256, 100): the nearest aligned selection is x[..., None, 0:100]",
            id="behind an ellipsis",
        ),
        pytest.param(
            (np.array(3), ...),
            "x[3, ...] cuts blocks of (256, 100): the nearest aligned selection is x[0:256, ...]",
            id="integers of NumPy",
        ),
        pytest.param(
            slice(None, None, -1),
            "x[::-1] steps through blocks of (256, 100): the nearest aligned selection is x[0:1000]",
            id="backwards",
        ),
        pytest.param(
            slice(0, 600, 256),
            "x[0:600:256] steps through blocks of (256, 100): the nearest aligned selection is x[0:768]",
            id="a step of a block",
        ),
    ],
)
def test_an_assignment_that_cuts_blocks_is_refused_with_the_nearest_that_does_not(key: object, message: str) -> None:
    with pytest.raises(SelectionError, match=re.escape(message)):
        aligned(key, (1000, 300), (256, 100))


@pytest.mark.parametrize(
    ("key", "blocks"),
    [
        pytest.param(..., (range(3), range(5)), id="everything"),
        pytest.param((slice(4, 8), 3), (range(1, 2), range(3, 4)), id="an integer for a chunk of 1"),
        pytest.param(8, (range(2, 3), range(5)), id="an integer for a block of 1 at the edge"),
        pytest.param(slice(8, 5, -3), (range(2, 3), range(5)), id="backwards, of one element"),
        pytest.param((slice(4, 100), slice(-2, None)), (range(1, 3), range(3, 5)), id="past the edge"),
        pytest.param((slice(3, 3), slice(1, 3)), (range(0), range(0)), id="nothing, and not at a bound"),
        pytest.param((slice(4, 1), 2), (range(0), range(0)), id="nothing, since it ends before it starts"),
    ],
)
def test_the_blocks_of_9_by_5_elements_in_blocks_of_4_by_1(key: object, blocks: tuple[range, ...]) -> None:
    assert aligned(key, (9, 5), (4, 1))[0] == blocks


def test_an_array_without_axes_is_assigned_as_the_one_block_it_is() -> None:
    assert aligned((), (), ()) == ((), Selection((), ()))


@pytest.mark.parametrize("key", [5, (0, 0, 0), True, [0], (..., ...)])
def test_an_assignment_refuses_what_reading_refuses(key: object) -> None:
    with pytest.raises(IndexError) as reading:
        parse(key, (3, 4))

    with pytest.raises(IndexError, match=re.escape(str(reading.value))):
        aligned(key, (3, 4), (3, 4))
