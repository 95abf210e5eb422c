"""Each block has bytes of its own, where the layout says; and where a file is said to be an array, it is one."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.alignment import ALIGNMENT
from blockstore.layouts.grid import HEADER_NBYTES, Grid, Index, ShardLayout, split_axis

dtypes = st.sampled_from(["u1", "<f4", ">f8", "S3", "c16"]).map(np.dtype)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Any grid of small numbers; blocks of some reach several pages."""
    ndim = draw(st.integers(1, 5))
    most = {1: 60, 2: 12, 3: 8, 4: 5, 5: 4}[ndim]
    axis = st.tuples(st.integers(0, most), st.integers(1, max(most // 2, 2)), st.integers(1, 3))
    axes = draw(st.lists(axis, min_size=ndim, max_size=ndim))
    factor = draw(st.sampled_from([1, 1, 1, 100, 700]))
    shape, chunks, per_shard = ([numbers[i] for numbers in axes] for i in range(3))
    shape[-1] *= factor
    chunks[-1] *= factor
    return Grid(
        tuple(shape),
        draw(dtypes),
        tuple(chunks),
        tuple(chunk * per for chunk, per in zip(chunks, per_shard, strict=True)),
    )


@st.composite
def split_grids(draw: st.DrawFn) -> Grid:
    """A grid whose blocks split one axis: 1 element along those before it, whole behind it. One shard holds all."""
    ndim = draw(st.integers(1, 5))
    shape = draw(st.lists(st.integers(0, 5), min_size=ndim, max_size=ndim))
    axis = draw(st.integers(0, ndim - 1))
    shape[axis] = draw(st.integers(0, 40))
    chunk = draw(st.integers(1, 12))
    chunks = tuple(1 if i < axis else chunk if i == axis else max(n, 1) for i, n in enumerate(shape))
    shards = tuple(max(-(-n // chunk), 1) * chunk for n, chunk in zip(shape, chunks, strict=True))
    return Grid(tuple(shape), draw(dtypes), chunks, shards)


def layouts(grid: Grid, *, npy: bool) -> list[ShardLayout]:
    return [grid.shard(index, npy=npy) for index in grid.shard_indices()]


def assert_disjoint_and_within(layout: ShardLayout) -> None:
    extents = sorted(layout.extent(number) for number in range(layout.count))
    stop = layout.first
    for start, nbytes in extents:
        assert start >= stop
        stop = start + nbytes

    assert stop <= layout.data_stop


@given(grid=grids())
def test_blocks_of_a_shard_have_bytes_of_their_own_within_the_data(grid: Grid) -> None:
    for layout in layouts(grid, npy=False):
        assert_disjoint_and_within(layout)


@given(grid=split_grids())
def test_blocks_of_an_npy_file_have_bytes_of_their_own_and_leave_none(grid: Grid) -> None:
    for layout in layouts(grid, npy=True):
        assert layout.is_array
        assert_disjoint_and_within(layout)
        assert sum(layout.extent(number)[1] for number in range(layout.count)) == grid.nbytes
        assert layout.data_stop == HEADER_NBYTES + grid.nbytes


@given(grid=grids())
def test_blocks_from_a_page_up_start_at_a_page_unless_the_file_is_an_array(grid: Grid) -> None:
    for layout in layouts(grid, npy=False):
        alignment = ALIGNMENT if layout.block_nbytes >= ALIGNMENT else 64
        if not layout.is_array:
            assert not (layout.starts() % np.uint64(alignment)).any()


@given(grid=grids() | split_grids(), npy=st.booleans())
def test_starts_are_those_of_each_block(grid: Grid, npy: bool) -> None:
    for layout in layouts(grid, npy=False if npy and split_axis(grid.shape, grid.chunks) is None else npy):
        starts = layout.starts()

        assert starts.dtype == np.uint64
        assert starts.tolist() == [layout.start(number) for number in range(layout.count)]


@given(grid=grids())
def test_numbers_count_the_blocks_of_a_shard_in_c_order(grid: Grid) -> None:
    for layout in layouts(grid, npy=False):
        inner = list(product(*map(range, layout.blocks)))

        assert [layout.number(index) for index in inner] == list(range(layout.count))
        assert [layout.inner(number) for number in range(layout.count)] == inner


@given(grid=grids())
def test_shards_hold_each_block_once_and_blocks_each_element(grid: Grid) -> None:
    covered = np.zeros(grid.shape, np.uint8)
    seen: set[Index] = set()
    for shard in grid.shard_indices():
        layout = grid.shard(shard, npy=False)
        slices = grid.shard_blocks(shard)
        assert tuple(s.stop - s.start for s in slices) == layout.blocks
        for block in product(*(range(s.start, s.stop) for s in slices)):
            owner, inner = grid.locate(block)
            covered[grid.slices(block)] += 1
            seen.add(block)

            assert owner == shard
            number = layout.number(inner)
            origin = [i * n for i, n in zip(shard, grid.shards, strict=True)]
            moved = [slice(s.start + o, s.stop + o) for s, o in zip(layout.slices(number), origin, strict=True)]
            assert tuple(moved) == grid.slices(block)
            assert layout.block_shape(number) == grid.block_shape(block)
            assert grid.block_shape(block) == covered[grid.slices(block)].shape

    assert seen == set(product(*map(range, grid.blocks)))
    assert (covered == 1).all()
    assert math.prod(grid.files) == len(list(grid.shard_indices()))


@given(grid=grids())
def test_a_block_is_the_corner_of_a_whole_one_in_c_order(grid: Grid) -> None:
    for layout in layouts(grid, npy=False):
        for number in range(layout.count):
            shape, strides = layout.block_shape(number), layout.strides(number)
            file = bytearray(layout.data_stop)
            view = np.ndarray(shape, grid.dtype, file, layout.start(number), strides)
            whole = np.ndarray(grid.chunks, grid.dtype, file, layout.start(number))
            corner = whole[tuple(map(slice, shape))]

            assert view.shape == corner.shape
            assert view.__array_interface__["data"] == corner.__array_interface__["data"]
            assert strides is None or strides == corner.strides
            assert strides is not None or view.size == 0 or (view.flags.c_contiguous and corner.flags.c_contiguous)


def assemble(layout: ShardLayout, region: "np.ndarray[Any, Any]") -> bytes:
    """Return the file of a shard, each of its blocks written through the view that the layout describes."""
    file = bytearray(layout.data_stop)
    for number in range(layout.count):
        shape = layout.block_shape(number)
        view = np.ndarray(shape, layout.dtype, file, layout.start(number), layout.strides(number))
        view[...] = region[layout.slices(number)]
    return bytes(file)


@given(grid=grids() | split_grids(), npy=st.booleans())
def test_a_file_that_is_an_array_holds_the_region_in_c_order(grid: Grid, npy: bool) -> None:
    # The array is of random bytes: each misplaced one shows.
    data = np.random.default_rng(0).bytes(grid.nbytes)
    a = np.frombuffer(data, grid.dtype).reshape(grid.shape)
    for shard in grid.shard_indices():
        layout = grid.shard(shard, npy=False)
        if npy and layout.split_axis is not None:
            layout = grid.shard(shard, npy=True)
        region = a[tuple(slice(i * n, (i + 1) * n) for i, n in zip(shard, grid.shards, strict=True))]
        assert layout.region == region.shape
        if layout.is_array:
            stop = HEADER_NBYTES + region.nbytes

            assert layout.first == HEADER_NBYTES
            assert layout.data_stop >= stop
            assert assemble(layout, region)[HEADER_NBYTES:stop] == region.tobytes()


@given(grid=grids() | split_grids())
def test_blocks_that_split_one_axis_are_those_that_are_contiguous_and_follow_each_other(grid: Grid) -> None:
    for layout in layouts(grid, npy=False):
        if 0 in layout.region or any(chunk > n for chunk, n in zip(layout.chunks, layout.region, strict=True)):
            continue
        addresses = np.arange(math.prod(layout.region)).reshape(layout.region)
        order = [
            addresses[tuple(slice(i * n, (i + 1) * n) for i, n in zip(inner, layout.chunks, strict=True))].reshape(-1)
            for inner in product(*map(range, layout.blocks))
        ]

        assert (layout.split_axis is not None) == np.array_equal(np.concatenate(order), addresses.reshape(-1))


@pytest.mark.parametrize(
    ("region", "chunks", "expected"),
    [
        pytest.param((10,), (3,), 0, id="one axis"),
        pytest.param((10, 4), (3, 4), 0, id="rows"),
        pytest.param((10, 4), (1, 2), 1, id="parts of rows"),
        pytest.param((10, 4), (2, 2), None, id="tiles"),
        pytest.param((10, 4), (10, 4), 0, id="one block"),
        pytest.param((10, 4), (3, 8), None, id="chunks wider than the region"),
        pytest.param((1, 4), (3, 2), 1, id="one row, chunks of more"),
        pytest.param((0, 4), (3, 4), 0, id="no rows"),
        pytest.param((3, 0, 4), (1, 2, 4), 1, id="an axis of 0"),
        pytest.param((2, 3, 4, 5), (1, 1, 2, 5), 2, id="four axes"),
    ],
)
def test_the_axis_that_blocks_split_is_the_one_behind_single_elements(
    region: Index, chunks: Index, expected: int | None
) -> None:
    assert split_axis(region, chunks) == expected


@pytest.mark.parametrize(
    ("shape", "chunks", "npy", "expected"),
    [
        pytest.param((8, 4), (2, 4), False, True, id="whole rows"),
        pytest.param((7, 4), (2, 4), False, True, id="padding behind the last row alone"),
        pytest.param((3, 7), (1, 2), False, False, id="padding within"),
        pytest.param((3, 7), (1, 2), True, True, id="exact"),
        pytest.param((1, 7), (1, 2), False, True, id="one row, padding behind it"),
        pytest.param((8, 4), (2, 2), False, False, id="tiles"),
        pytest.param((8, 4), (2, 8), False, False, id="padding behind each row"),
        pytest.param((0, 4), (2, 4), False, True, id="no rows"),
        pytest.param((1, 8), (2, 4), False, False, id="padding below each of two blocks"),
        pytest.param((1, 8), (2, 4), True, True, id="exact, chunks longer than the first axis"),
        pytest.param((1, 8), (2, 8), False, True, id="padding below the only block"),
    ],
)
def test_a_shard_is_an_array_if_nothing_lies_between_its_rows(
    shape: Index, chunks: Index, npy: bool, expected: bool
) -> None:
    shards = tuple(-(-max(n, 1) // chunk) * chunk for n, chunk in zip(shape, chunks, strict=True))
    layout = Grid(shape, np.dtype("f8"), chunks, shards).shard((0,) * len(shape), npy=npy)

    assert layout.is_array is expected
    assert layout.first == (HEADER_NBYTES if expected else 0)


def test_starts_beyond_4_gib_are_exact() -> None:
    grid = Grid((1 << 20, 1 << 20), np.dtype("f8"), (1 << 19, 1 << 19), (1 << 20, 1 << 20))
    layout = grid.shard((0, 0), npy=False)

    assert layout.starts().tolist() == [i << 41 for i in range(4)]
    layout = Grid((5 << 30,), np.dtype("f8"), (1 << 30,), (5 << 30,)).shard((0,), npy=True)
    assert layout.starts().tolist() == [HEADER_NBYTES + (i << 33) for i in range(5)]
