"""Whatever is written of an array, in any order: it reads and assigns as NumPy does, and its files say the same."""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import blockstore as bs
from blockstore import _disk

try:
    import zarr
except ImportError:  # it is no dependency, and then only np.load looks
    zarr = None

Index = tuple[int, ...]

NAMES = ("x.npy", "x.zarr")
KINDS = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
DTYPES = sorted({np.dtype(name).newbyteorder(order).str for name in KINDS for order in "<>"})
MAX_SIDE = {1: 40, 2: 12, 3: 6, 4: 4, 5: 3}


@pytest.fixture(autouse=True, scope="module")
def _a_disk_that_forgets_nothing() -> Iterator[None]:
    """Nothing here loses power: a file system in memory will do, without the warning that it forgets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_disk, "filesystem", lambda file: "ext4")
        yield


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Yield an empty folder, in memory where that can be had: a sync of a disk takes a hundred times as long."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="blockstore-reading-", dir=memory))
    try:
        yield path
    finally:
        shutil.rmtree(path)


# -- what is drawn ------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What an array is created with."""

    name: str
    shape: Index
    dtype: np.dtype[Any]
    chunks: Index
    shards: Index | None
    fill: np.generic

    def create(self, path: Path, **options: Any) -> bs.BlockArray:
        more = {} if self.name == "x.npy" else {"shards": self.shards, "fill_value": self.fill}
        return bs.create_array(
            path / self.name, shape=self.shape, dtype=self.dtype, chunks=self.chunks, **more, **options
        )

    @property
    def grid(self) -> Index:
        return tuple(-(-n // chunk) for n, chunk in zip(self.shape, self.chunks, strict=True))

    @property
    def blocks(self) -> list[Index]:
        return list(itertools.product(*map(range, self.grid)))

    def slices(self, index: Index) -> tuple[slice, ...]:
        """Return where a block lies, ended at the edge."""
        each = zip(index, self.chunks, self.shape, strict=True)
        return tuple(slice(i * chunk, min((i + 1) * chunk, n)) for i, chunk, n in each)

    def file_of(self, index: Index) -> Index:
        if self.shards is None:
            return (0,) * len(index)
        per_file = (shard // chunk for shard, chunk in zip(self.shards, self.chunks, strict=True))
        return tuple(i // per for i, per in zip(index, per_file, strict=True))


@st.composite
def fills(draw: st.DrawFn, dtype: np.dtype[Any]) -> np.generic:
    if dtype.kind == "b":
        values: list[Any] = [False, True]
    elif dtype.kind in "iu":
        values = [0, 7, np.iinfo(dtype).max, np.iinfo(dtype).min]
    else:
        values = [0.0, -0.0, 1.5, math.nan, -math.nan, math.inf, -math.inf]
    value = draw(st.sampled_from(values))
    if dtype.kind == "c":
        value = complex(value, draw(st.sampled_from(values)))
    fill: np.generic = dtype.newbyteorder("=").type(value)
    return fill


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw an array of at most 40 blocks in at most 8 files."""
    name = draw(st.sampled_from(NAMES))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    ndim = draw(st.integers(1, 5))
    shape = tuple(draw(st.lists(st.integers(0, MAX_SIDE[ndim]), min_size=ndim, max_size=ndim)))
    if name == "x.npy":
        axis = draw(st.integers(0, ndim - 1))
        if math.prod(shape[:axis]) > 10:
            axis = 0
        chunk = draw(st.integers(-(-shape[axis] // 4) or 1, shape[axis] or 1))
        chunks = (*(1,) * axis, chunk, *(n or 1 for n in shape[axis + 1 :]))
        return Case(name, shape, dtype, chunks, None, dtype.type(0))
    left, files, sides, shards = 40, 8, [], []
    for n in shape:
        chunk = draw(st.integers(-(-n // left) or 1, n or 1))
        count = -(-n // chunk) or 1
        per = draw(st.integers(-(-count // files), count))
        left, files = left // count, files // -(-count // per)
        sides.append(chunk)
        shards.append(chunk * per)
    one_file = draw(st.booleans())
    return Case(name, shape, dtype, tuple(sides), None if one_file else tuple(shards), draw(fills(dtype)))


def random_bytes(random: np.random.Generator, shape: Index, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an array of any bytes that the dtype has, so NaNs of every kind."""
    if dtype.kind == "b":
        return random.integers(0, 2, shape).astype(dtype)
    return np.frombuffer(random.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


Key = Any


def keys(shape: Index) -> st.SearchStrategy[Key]:
    return hnp.basic_indices(shape, allow_newaxis=True, max_dims=7) | st.sampled_from([..., (), np.s_[::-1]])


# -- what is expected ---------------------------------------------------------------------------------


def assert_same(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert got.tobytes() == expected.tobytes()


def is_regular(case: Case, file: Index) -> bool:
    """Whether the blocks of a file, one behind the other, are its part of the array in C order."""
    blocks = [index for index in case.blocks if case.file_of(index) == file]
    elements = np.arange(math.prod(case.shape)).reshape(case.shape)
    parts = [elements[case.slices(index)] for index in blocks]
    if case.name == "x.zarr":
        whole = np.arange(math.prod(case.chunks)).reshape(case.chunks)
        for part in parts:
            lies = whole[tuple(map(slice, part.shape))].ravel()
            if not np.array_equal(lies, np.arange(part.size)) or (part is not parts[-1] and part.size < whole.size):
                return False
    first, last = case.slices(blocks[0]), case.slices(blocks[-1])
    region = elements[tuple(slice(a.start, b.stop) for a, b in zip(first, last, strict=True))]
    return np.array_equal(np.concatenate([part.ravel() for part in parts]), region.ravel())


class Model(NamedTuple):
    """An array in memory, and which of its blocks are written."""

    case: Case
    a: NDArray[Any]
    written: NDArray[np.bool_]

    def is_zero_copy(self, key: Key) -> bool:
        """Whether there has to be no copy of what an index takes."""
        numbers = np.empty(self.case.shape, np.intp)
        blocks = self.case.blocks
        for number, index in enumerate(blocks):
            numbers[self.case.slices(index)] = number
        taken = [blocks[number] for number in np.unique(numbers[key]).tolist()]
        if len(taken) == 1:
            return bool(self.written[taken[0]])
        files = {self.case.file_of(index) for index in taken}
        if len(files) != 1:
            return False
        (file,) = files
        whole = all(self.written[index] for index in blocks if self.case.file_of(index) == file)
        return whole and is_regular(self.case, file)


def check_reading(x: bs.BlockArray, model: Model, chosen: list[Key]) -> None:
    """Compare all that can be read."""
    assert_same(x[...], model.a[...])
    for key in chosen:
        got, expected = x[key], model.a[key]
        assert_same(got, expected)
        if not isinstance(got, np.ndarray):
            continue
        assert not got.flags.writeable
        if got.size and model.is_zero_copy(key):
            assert np.shares_memory(got, x[key]), f"x[{key}] was copied"
            assert not got.flags.owndata
            with pytest.raises(ValueError, match="WRITEABLE"):
                got.setflags(write=True)
    assert np.array_equal(x.written, model.written)
    assert x.written.dtype == np.bool_
    if x.mode == "r+":
        assert sorted(b.index for b in x.pending()) == list(map(tuple, np.argwhere(~model.written).tolist()))
    for block in x.blocks:
        expected = model.a[model.case.slices(block.index)]
        assert_same(block.read(), expected)
        assert not block.read().flags.writeable
        assert block.written == model.written[block.index]
        assert (block.slices, block.shape) == (model.case.slices(block.index), expected.shape)
        assert (block.dtype, block.nbytes) == (expected.dtype, expected.nbytes)
    assert f"{int(model.written.sum())} written, " in repr(x)


def check_others(path: Path, model: Model) -> None:
    """Compare what is read by those who know nothing of blockstore."""
    if model.case.name == "x.npy":
        assert_same(np.load(path), model.a)
    elif zarr is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = zarr.open_array(path, mode="r")
        assert (array.shape, array.chunks) == (model.a.shape, model.case.chunks)
        assert_same(np.asarray(array[...]).astype(model.a.dtype), model.a)  # it gives them in native byte order


def write(x: bs.BlockArray, index: Index, data: NDArray[Any], how: str) -> None:
    block = x.blocks[index]
    if how == "writer":
        with block.writer() as a:
            assert_same(np.array(a), np.full(data.shape, x.fill_value, data.dtype))
            a[...] = data
    elif how == "write":
        block.write(data)
    else:
        x[block.slices] = data


@given(
    case=cases(),
    data=st.data(),
    seed=st.integers(0, 1 << 32),
    how_many=st.sampled_from(["none", "some", "all"]),
    options=st.sampled_from([{}, {}, {"access": "sparse"}, {"guard": "seal"}, {"reserve": False}]),
)
@settings(deadline=None)
def test_what_is_written_in_any_order_is_read_as_from_numpy(
    case: Case, data: st.DataObject, seed: int, how_many: str, options: dict[str, Any]
) -> None:
    chosen = data.draw(st.lists(keys(case.shape), min_size=1, max_size=5), "keys")
    random = np.random.default_rng(seed)
    expected = random_bytes(random, case.shape, case.dtype)
    order = [case.blocks[i] for i in random.permutation(len(case.blocks))]
    count = {"none": 0, "some": int(random.integers(0, len(order) + 1)), "all": len(order)}[how_many]
    model = Model(case, np.full(case.shape, case.fill, case.dtype), np.zeros(case.grid, np.bool_))
    with folder() as path:
        with case.create(path, **options) as x:
            assert (x.shape, x.dtype, x.chunks) == (case.shape, case.dtype, case.chunks)
            assert x.fill_value.tobytes() == case.fill.tobytes()
            for n, index in enumerate(order[:count]):
                part = expected[case.slices(index)]
                write(x, index, part, ("writer", "write", "assign")[random.integers(3)])
                model.a[case.slices(index)], model.written[index] = part, True
                if n % 8 == 0:
                    check_reading(x, model, chosen[:1])
            check_reading(x, model, chosen)
            x.publish(partial=True)
            check_reading(x, model, chosen)
            check_others(path / case.name, model)
        is_final = case.name == "x.zarr" or count == len(order)
        if is_final:
            check_others(path / case.name, model)
        for mode in ("r", "r+"):
            with bs.open_array(path / case.name, mode=mode) as x:
                if count == len(order) and case.name == "x.npy":  # it has forgotten its blocks
                    assert_same(x[...], model.a)
                    assert x.written.all()
                    for key in chosen:
                        assert_same(x[key], model.a[key])
                        assert not math.prod(x[key].shape) or np.shares_memory(x[key], x[key]) or not x[key].shape
                else:
                    check_reading(x, model, chosen)
        if is_final:
            check_others(path / case.name, model)


# -- what else NumPy does with an array ---------------------------------------------------------------


def outcome(call: Callable[[], Any]) -> Any:
    """Return a result in a form that compares; of an exception the type."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = call()
        except (IndexError, TypeError, ValueError, OverflowError) as error:
            kinds = (IndexError, TypeError, ValueError, OverflowError)
            return next(kind for kind in kinds if isinstance(error, kind))
    return type(result), result.shape, result.dtype, result.tobytes()


bounds = st.none() | st.integers(-12, 12) | st.just(2**70)
anything = st.one_of(
    st.integers(-10, 10),
    st.integers(-10, 10).map(np.int8),
    st.builds(slice, bounds, bounds, bounds),
    st.sampled_from([..., None, 1.0, slice(None, None, 0), slice("a")]),
)


@given(key=anything | st.lists(anything, max_size=4).map(tuple), gaps=st.booleans())
@settings(deadline=None)
def test_any_index_gives_or_raises_what_numpys_does(key: Any, gaps: bool) -> None:
    a = np.arange(35, dtype=">i4").reshape(7, 5)
    x = _shared(gaps)
    expected = a.copy()
    if gaps:
        expected[3:6] = 9

    assert outcome(lambda: x[key]) == outcome(lambda: expected[key])


_open: dict[bool, bs.BlockArray] = {}


def _shared(gaps: bool) -> bs.BlockArray:
    """Return an array that is only read, the same each time: not all of it is written if there are to be `gaps`."""
    return _open[gaps]


@pytest.fixture(autouse=True, scope="module")
def _arrays_to_share(_a_disk_that_forgets_nothing: None) -> Iterator[None]:
    with folder() as path, contextlib.ExitStack() as stack:
        for gaps in (False, True):
            x = stack.enter_context(
                bs.create_array(path / f"{gaps}.zarr", shape=(7, 5), dtype=">i4", chunks=(3, 5), fill_value=9)
            )
            for block in x.blocks:
                if not gaps or block.index != (1, 0):
                    with block.writer() as a:
                        a[...] = np.arange(35).reshape(7, 5)[block.slices]
            _open[gaps] = x
        yield
        _open.clear()


@pytest.fixture(params=NAMES)
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    with folder() as each:
        yield each / str(request.param)


@pytest.fixture
def tmp() -> Iterator[Path]:
    with folder() as each:
        yield each


def number(a: NDArray[Any], block: bs.Block) -> None:
    a[...] = np.arange(a.size).reshape(a.shape) + 100 * block.index[0]


@pytest.fixture
def x(path: Path) -> Iterator[bs.BlockArray]:
    """Ten rows of six in blocks of four rows, all written."""
    with bs.create_array(path, shape=(10, 6), dtype="i4", chunks=(4, 6)) as array:
        array.fill(number)
        yield array


def test_asarray_of_what_is_written_whole_copies_nothing_unless_asked(x: bs.BlockArray) -> None:
    a = np.asarray(x)
    assert not a.flags.writeable
    assert np.shares_memory(a, np.asarray(x, copy=False))
    assert_same(np.asarray(x, "f8"), a.astype("f8"))
    assert_same(np.asarray(x, "i4"), a)
    with pytest.raises(ValueError, match="cannot convert int32 to float64 without a copy"):
        np.asarray(x, "f8", copy=False)

    copied = np.array(x)
    copied[:] = 0
    assert_same(x[...], a)
    assert a.any()


def test_asarray_of_what_is_not_written_whole_cannot_but_copy(path: Path) -> None:
    with bs.create_array(path, shape=(10, 6), dtype="i4", chunks=(4, 6)) as x:
        x[0:4] = 3
        assert np.asarray(x).tolist() == [[3] * 6] * 4 + [[0] * 6] * 6
        with pytest.raises(ValueError, match=rf"'{path.name}' is not all written, or not in one piece"):
            np.asarray(x, copy=False)


def test_an_empty_array_needs_no_copy(path: Path) -> None:
    with bs.create_array(path, shape=(0, 6), dtype="i4") as x:
        assert np.asarray(x, copy=False).shape == (0, 6)
        assert len(x) == 0
        assert list(x) == []
        assert x.written.size == 0
        assert len(x.blocks) == 0


def test_len_iteration_and_numpys_functions_see_a_sequence_of_rows(x: bs.BlockArray) -> None:
    a = np.asarray(x)
    assert len(x) == 10
    assert [row.tolist() for row in x] == a.tolist()
    assert np.sum(x) == a.sum()
    assert (a + x).tolist() == (a + a).tolist()
    assert np.concatenate([x, x]).tolist() == np.concatenate([a, a]).tolist()


def test_what_was_read_stays_valid_when_the_array_is_closed(path: Path) -> None:
    x = bs.create_array(path, shape=(10, 6), dtype="i4", chunks=(4, 6))
    x.fill(number)
    working = x[2:9]
    expected = working.copy()
    x.close()
    with bs.open_array(path, mode="r") as x:
        published = x[2:9]

    assert_same(working.copy(), expected)
    assert_same(published.copy(), expected)


def test_a_closed_array_reads_and_says_nothing_but_what_it_is(x: bs.BlockArray) -> None:
    block = x.blocks[0, 0]
    x.close()

    assert re.fullmatch(r"<BlockArray 'x\.(npy|zarr)': \(10, 6\) int32, 3 blocks of \(4, 6\), closed>", repr(x))
    for use in (
        lambda: x[0],
        lambda: x.written,
        lambda: list(x.pending()),
        lambda: x.__setitem__(0, 0),
        lambda: np.asarray(x),
        block.read,
        lambda: block.written,
        lambda: block.writer(),
        x.flush,
        x.publish,
    ):
        with pytest.raises(bs.ClosedStoreError, match="is closed"):
            use()


def test_repr_says_what_is_written_and_how_much_of_it_lasts(path: Path) -> None:
    with bs.create_array(path, shape=(10, 6), dtype=">f4", chunks=(4, 6)) as x:
        what = f"<BlockArray '{path.name}': (10, 6) >f4, 3 blocks of (4, 6)"
        assert repr(x) == f'{what}, 0 written, 0 durable, open "r+">'
        x[0:8] = 1
        assert repr(x) == f'{what}, 2 written, 0 durable, open "r+">'
        x.flush()
        x[8:] = 1
        assert repr(x) == f'{what}, 3 written, 2 durable, open "r+">'
        assert repr(x.blocks[0, 0]) == f"<Block (0, 0) = [0:4, 0:6] of '{path.name}', durable>"
        assert repr(x.blocks[2, 0]) == f"<Block (2, 0) = [8:10, 0:6] of '{path.name}', written>"
        x.publish()
        assert repr(x) == f'{what}, 3 written, 3 durable, open "r+">'
    assert repr(x) == f"{what}, closed>"


def test_the_grid_of_blocks_is_indexed_as_a_list_is(x: bs.BlockArray) -> None:
    blocks = x.blocks
    assert blocks.shape == (3, 1)
    assert len(blocks) == 3
    assert [block.index for block in blocks] == [(0, 0), (1, 0), (2, 0)]
    assert blocks[-1, -1] == blocks[2, 0] == blocks[np.int8(2), np.uint64(0)]
    assert blocks[2, 0] != blocks[1, 0]
    assert len({blocks[0, 0], blocks[-3, 0], blocks[1, 0]}) == 2
    assert repr(blocks) == "<BlockGrid of 3 x 1 blocks>"


@pytest.mark.parametrize(
    ("key", "error", "match"),
    [
        ((3, 0), IndexError, "block 3 is out of bounds along axis 0, which has 3 blocks"),
        ((-4, 0), IndexError, "block -4 is out of bounds along axis 0, which has 3 blocks"),
        ((0, 1), IndexError, "block 1 is out of bounds along axis 1, which has 1 blocks"),
        (0, IndexError, "a block is named by one int for each of 2 axes, such as blocks.0, 0.: 0 was given"),
        ((0, 0, 0), IndexError, r"one int for each of 2 axes: \(0, 0, 0\) was given"),
        ((slice(None), 0), TypeError, r"a block is named by ints, one for each axis, not by \(slice"),
        ((0.0, 0), TypeError, r"a block is named by ints, one for each axis, not by \(0.0, 0\)"),
    ],
)
def test_the_grid_of_blocks_refuses(x: bs.BlockArray, key: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        x.blocks[key]


# -- assignment ---------------------------------------------------------------------------------------


OTHERS = [None, "1", "one", b"1", np.float64(2), np.int8(-1), {}]


@st.composite
def assignments(draw: st.DrawFn, case: Case) -> tuple[Key, Any]:
    """Draw an index of whole blocks, and what may be assigned to it."""
    key: list[Any] = []
    for n, chunk, count in zip(case.shape, case.chunks, case.grid, strict=True):
        low = draw(st.integers(0, count))
        high = draw(st.integers(low, count))
        start, stop = min(low * chunk, n), min(high * chunk, n)
        if chunk == 1 and stop > start and draw(st.booleans()):
            key.append(draw(st.sampled_from([start, start - n])))
        else:
            key.append(draw(st.sampled_from([slice(start, stop), slice(start - n if start else None, stop, 1)])))
        if draw(st.integers(0, 5)) == 0:
            key.insert(draw(st.integers(0, len(key))), None)
    if not any(isinstance(item, slice) for item in key):
        key.append(...)  # an item alone takes a scalar, and is no matter of broadcasting
    target = np.empty(case.shape, case.dtype)[tuple(key)]
    shape = np.shape(target)
    lengths = [draw(st.sampled_from([n, n, n, 1])) for n in shape]
    lengths = [*(1,) * draw(st.integers(0, 1)), *lengths[draw(st.integers(0, len(lengths))) if lengths else 0 :]]
    if draw(st.integers(0, 9)) == 0:
        lengths.append(draw(st.integers(0, 4)))
    source = np.dtype(draw(st.sampled_from([case.dtype.str, case.dtype.str, *DTYPES])))
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    data: Any = random_bytes(random, tuple(lengths), source)
    if source.kind in "fc" and case.dtype.kind in "iu":  # what else C makes of floats is up to the loop
        data = random.integers(0, 100, tuple(lengths)).astype(source)
    if draw(st.integers(0, 2)) == 0:  # NumPy takes no lists deeper than the target, though arrays of 1s in front
        lists = [data.tolist()] if data.ndim <= len(shape) else []
        data = draw(st.sampled_from([*lists, 0, 1, 300, -1, 2**70, 1.5, math.nan, 1j, True, *OTHERS]))
    return tuple(key), data


def assigned(target: Any, key: Key, data: Any) -> object:
    """Assign, and return the kind of error if there is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target[key] = data
        except (IndexError, TypeError, ValueError, OverflowError) as error:
            return next(kind for kind in (IndexError, TypeError, OverflowError, ValueError) if isinstance(error, kind))
    return None


@given(case=cases(), data=st.data(), before=st.sampled_from(["pending", "written", "published"]))
@settings(deadline=None)
def test_assignment_broadcasts_casts_and_fails_as_numpys(case: Case, data: st.DataObject, before: str) -> None:
    key, value = data.draw(assignments(case), "assignment")
    expected = np.full(case.shape, case.fill, case.dtype)
    with folder() as path, case.create(path) as x:
        if before != "pending":
            expected[...] = 1
            x[...] = expected
        if before == "published":
            x.publish()
        written, before_it = x.written, expected.copy()
        error = assigned(expected, key, value)

        assert assigned(x, key, value) == error
        if error is not None:
            expected = before_it  # NumPy may stop halfway, blockstore changes nothing
        else:
            touched = np.zeros(case.shape, np.bool_)
            touched[key] = True
            for index in case.blocks:
                written[index] |= touched[case.slices(index)].any()
        assert_same(x[...], expected[...])
        assert np.array_equal(x.written, written)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("nought", id="text"),
        pytest.param(np.array(["1", "2", "nought"] + ["4"] * 7)[:, None], id="text in the second block"),
        pytest.param(np.zeros((3, 2)), id="shape"),
        pytest.param(np.zeros((1, 2, 10, 6)), id="too many axes"),
        pytest.param(300, id="number that the dtype does not have"),
        pytest.param([[300]] * 10, id="list of such"),
        pytest.param(math.nan, id="not a number"),
        pytest.param(1j, id="complex"),
        pytest.param(None, id="None"),
        pytest.param({}, id="dict"),
    ],
)
def test_an_assignment_that_fails_changes_nothing(path: Path, value: Any) -> None:
    a = np.full((10, 6), 5, "u1")
    with bs.create_array(path, shape=(10, 6), dtype="u1", chunks=(2, 6)) as x:
        x[...] = 5
        kind = assigned(a, np.s_[:], value)
        assert kind is not None
        assert assigned(x, np.s_[:], value) == kind
        assert x.written.all()
        assert np.all(x[...] == 5)


@pytest.mark.parametrize("source", ["reversed", "shifted", "transposed", "itself"])
@pytest.mark.parametrize("published", [False, True])
def test_an_array_may_be_assigned_to_itself(path: Path, source: str, published: bool) -> None:
    views: dict[str, Callable[[Any], Any]] = {
        "reversed": lambda a: a[::-1, ::-1],
        "shifted": lambda a: a[[*range(2, 8), 0, 1]] if isinstance(a, list) else a[2:3],
        "transposed": lambda a: a[...].T,
        "itself": lambda a: a,
    }
    a = np.arange(64, dtype="i2").reshape(8, 8)
    with bs.create_array(path, shape=(8, 8), dtype="i2", chunks=(2, 8)) as x:
        x[...] = a
        if published:
            x.publish()
        x[:] = views[source](x)
        a[:] = views[source](a)
        assert_same(x[...], a)


def test_rows_of_an_array_move_within_it(path: Path) -> None:
    a = np.arange(64, dtype="i2").reshape(8, 8)
    with bs.create_array(path, shape=(8, 8), dtype="i2", chunks=(2, 8)) as x:
        x[...] = a
        x[2:8] = x[0:6]
        a[2:8] = a[0:6]
        assert_same(x[...], a)


@pytest.mark.parametrize(
    ("key", "match"),
    [
        (np.s_[0:3], r"x\[0:3\] cuts blocks of \(4, 6\): the nearest aligned selection is x\[0:4\]"),
        (np.s_[5], r"x\[5\] cuts blocks of \(4, 6\): the nearest aligned selection is x\[4:8\]"),
        (np.s_[::2], r"x\[::2\] steps through blocks of \(4, 6\)"),
        (np.s_[::-1], r"x\[::-1\] steps through blocks of \(4, 6\)"),
        (np.s_[:, 0], r"x\[:, 0\] cuts blocks of \(4, 6\): the nearest aligned selection is x\[:, 0:6\]"),
    ],
)
def test_an_assignment_that_cuts_blocks_names_one_that_does_not(x: bs.BlockArray, key: Any, match: str) -> None:
    before = x[...].copy()
    with pytest.raises(bs.SelectionError, match=match):
        x[key] = 1
    assert_same(x[...].copy(), before)


def test_what_is_opened_to_read_is_not_assigned_to(x: bs.BlockArray, path: Path) -> None:
    x.publish()
    with bs.open_array(path, mode="r") as y:
        for use in (
            lambda: y.__setitem__(0, 0),
            lambda: y.blocks[0, 0].writer(rewrite=True),
            lambda: y.blocks[0, 0].write(bytes(96), rewrite=True),
            lambda: y.fill(number),
            y.flush,
            y.publish,
        ):
            with pytest.raises(bs.ReadOnlyStoreError, match="was opened with mode='r', which writes nothing"):
                use()


# -- files that others made ---------------------------------------------------------------------------


def test_an_npy_that_numpy_saved_is_read_without_a_copy_and_written_again(tmp: Path) -> None:
    a = np.arange(60.0).reshape(10, 6)
    np.save(tmp / "x.npy", a)
    before = np.load(tmp / "x.npy", mmap_mode="r")
    with bs.open_array(tmp / "x.npy") as x:
        assert_same(x[2:5, ::-1], a[2:5, ::-1])
        assert np.shares_memory(x[2:5], x[2:5])
        x[...] = 7
    assert_same(np.asarray(before).copy(), a)
    assert np.load(tmp / "x.npy").tolist() == [[7.0] * 6] * 10
    assert os.listdir(tmp) == ["x.npy"]


def test_an_npy_in_fortran_order_is_read_only(tmp: Path) -> None:
    a = np.asfortranarray(np.arange(60.0).reshape(10, 6))
    np.save(tmp / "x.npy", a)
    with bs.open_array(tmp / "x.npy", mode="r") as x:
        assert_same(x[3:5, ::-1], a[3:5, ::-1])
        assert np.shares_memory(x[2:5], x[2:5])
    with pytest.raises(bs.FormatError, match=r"is in Fortran order.*mode='r' reads it"):
        bs.open_array(tmp / "x.npy")


# -- refusals -----------------------------------------------------------------------------------------


def in_folder(folder: Path) -> dict[str, str | None]:
    """Return every name below a folder, and what files hold."""
    return {
        str(each.relative_to(folder)): each.read_bytes().hex() if each.is_file() else None for each in folder.rglob("*")
    }


REFUSED: list[Any] = [
    (
        "x.npy",
        {"shape": (4, 6), "chunks": (2, 3)},
        bs.LayoutError,
        r"blocks of \(2, 3\) do not follow.*chunks=\(2, 6\)",
    ),
    ("x.npy", {"shape": (4, 6, 3), "chunks": (1, 2, 1)}, bs.LayoutError, r"chunks=\(1, 6, 3\) would"),
    ("x.npy", {"shape": (4, 6, 3), "chunks": (2, 2, 3)}, bs.LayoutError, r"chunks=\(2, 6, 3\) would"),
    ("x.npy", {"shape": (4, 6), "chunks": (2, 6), "shards": (4, 6)}, bs.LayoutError, "one file: shards are for Zarr"),
    ("x.npy", {"fill_value": 1}, ValueError, r"an .npy cannot say what is not written.*fill_value np.float64\(1.0\)"),
    ("x.npy", {"fill_value": -0.0}, ValueError, "fill_value .* is for Zarr"),
    ("x.npy", {"attributes": {"a": 1}}, ValueError, "an .npy keeps no attributes"),
    ("x.npy", {"dimension_names": ["a", "b"]}, ValueError, "an .npy keeps no dimension_names"),
    (
        "x.zarr",
        {"shards": (3, 6), "chunks": (2, 6)},
        bs.LayoutError,
        r"no multiples of the chunks.*shards=\(4, 6\) would",
    ),
    (
        "x.zarr",
        {"shards": (4, 4), "chunks": (2, 3)},
        bs.LayoutError,
        r"no multiples of the chunks.*shards=\(4, 6\) would",
    ),
    ("x.zarr", {"shards": 3, "chunks": 2}, bs.LayoutError, r"no multiples of the chunks.*shards=\(4, 4\) would"),
    ("x.zarr", {"dimension_names": ["a"]}, ValueError, "1 dimension names were given for 2 axes"),
    ("x.zarr", {"dimension_names": ["a", 1]}, TypeError, "dimension names are str or None"),
    ("x.zarr", {"attributes": {"a": math.nan}}, ValueError, "which JSON does not have"),
    ("x.zarr", {"attributes": {1: 1}}, TypeError, "JSON has none but str"),
    ("x.zarr", {"fill_value": "0"}, TypeError, "fill_value '0' is no number"),
    ("x.zarr", {"fill_value": 300, "dtype": "u1"}, ValueError, "fill_value 300 is out of the range of uint8"),
    ("x.zarr", {"fill_value": 1j}, TypeError, "fill_value 1j is complex"),
    *(
        (name, options, error, match)
        for name in NAMES
        for options, error, match in (
            ({"shape": ()}, bs.LayoutError, r"an array has one axis at least: shape \(\) was given"),
            ({"shape": (-1, 6)}, bs.LayoutError, "negative axis"),
            ({"shape": "ab"}, bs.LayoutError, "a shape is an int or a sequence of ints"),
            ({"shape": (1 << 40, 1 << 40)}, bs.LayoutError, "is more than a file can hold"),
            ({"chunks": (2,)}, bs.LayoutError, r"chunks \(2,\) are for 1 axes, shape \(4, 6\) has 2"),
            ({"chunks": (0, 6)}, bs.LayoutError, r"chunks \(0, 6\): each is at least 1, or -1"),
            ({"chunks": (-2, 6)}, bs.LayoutError, r"chunks \(-2, 6\): each is at least 1, or -1"),
            ({"chunks": 2.0}, bs.LayoutError, "chunks are an int or ints, one for each axis, not 2.0"),
            ({"chunks": "ab"}, bs.LayoutError, "chunks are an int or ints, one for each axis, not 'ab'"),
            ({"dtype": "O"}, bs.DtypeError, "dtype object is not one of both NumPy and Zarr: supported are bool"),
            ({"dtype": "M8[s]"}, bs.DtypeError, "supported are bool"),
            ({"dtype": "S3"}, bs.DtypeError, "supported are bool"),
            ({"dtype": "i4,f4"}, bs.DtypeError, "supported are bool"),
            ({"dtype": "nonsense"}, bs.DtypeError, "not a dtype: 'nonsense'"),
            ({"dtype": np.longdouble}, bs.DtypeError, "supported are bool"),
            ({"fingerprint": {1, 2}}, TypeError, "a fingerprint is what JSON can say"),
            ({"checksum": "md5"}, ValueError, "checksum"),
            ({"access": "often"}, ValueError, "access"),
            ({"guard": "dog"}, ValueError, "guard"),
            ({"escaped": "pod"}, ValueError, "escaped"),
        )
    ),
]


@pytest.mark.parametrize(("name", "options", "error", "match"), REFUSED)
def test_create_array_refuses_and_leaves_nothing(
    tmp: Path, name: str, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match) as caught:
        bs.create_array(tmp / name, **{"shape": (4, 6), "dtype": "f8", **options})
    assert in_folder(tmp) == {}

    if suggested := re.search(r"(chunks|shards)=\(.*?\)", str(caught.value)):
        better = eval(f"dict({suggested.group()})")  # as the reader would
        bs.create_array(tmp / name, **{"shape": (4, 6), "dtype": "f8", **options, **better}).close()


@given(case=cases(), data=st.data())
@settings(deadline=None)
def test_what_a_refusal_suggests_is_taken(case: Case, data: st.DataObject) -> None:
    sides = st.tuples(*(st.integers(1, n + 2) for n in case.shape))
    options = {"chunks": data.draw(sides)}
    if case.name == "x.zarr":
        options["shards"] = data.draw(sides)
    with folder() as path:
        for _ in range(2):
            try:
                bs.create_array(path / case.name, shape=case.shape, dtype=case.dtype, **options).close()
                break
            except bs.LayoutError as error:
                suggested = re.search(r"(chunks|shards)=\(.*?\)", str(error))
                assert suggested is not None
                options.update(eval(f"dict({suggested.group()})"))
        else:
            pytest.fail(f"{options} were suggested, and refused")


def make_file(path: Path) -> None:
    path.write_bytes(b"precious")


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_bytes(b"data")


def make_group(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_text(
        json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"kind": "array"}})
    )
    (path / "a").mkdir()
    (path / "a" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "array"}')


def make_consolidated_group(path: Path) -> None:
    make_group(path)
    inside = {"metadata": {"a": {"zarr_format": 3, "node_type": "array"}}, "must_understand": False, "kind": "inline"}
    group = {"zarr_format": 3, "node_type": "group", "attributes": {}, "consolidated_metadata": inside}
    (path / "zarr.json").write_text(json.dumps(group))


def make_foreign_json(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_text('["array", "node_type"]')
    (path / "precious").write_bytes(b"data")


def make_v2(path: Path) -> None:
    path.mkdir()
    (path / ".zarray").write_text('{"zarr_format": 2}')
    (path / "0.0").write_bytes(b"data")


def make_link_to_nowhere(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


IN_THE_WAY: list[Any] = [
    pytest.param("x.npy", make_folder, "this is a folder: move it away", True, id="npy folder"),
    pytest.param("x.zarr", make_file, "this is a file: move it away", True, id="zarr file"),
    pytest.param("x.npy", make_file, "it exists; open_array.. it, or pass overwrite=True", False, id="npy file"),
    pytest.param("x.zarr", make_folder, "no Zarr array", True, id="zarr folder"),
    pytest.param("x.zarr", make_group, "no Zarr array", True, id="zarr group"),
    pytest.param("x.zarr", make_consolidated_group, "no Zarr array", True, id="zarr consolidated group"),
    pytest.param("x.zarr", make_foreign_json, "no Zarr array", True, id="zarr.json of something else"),
    pytest.param("x.zarr", make_v2, "no Zarr array", True, id="zarr v2"),
]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("name", "make", "match", "always"), IN_THE_WAY)
def test_what_is_in_the_way_and_no_array_stays(
    tmp: Path, name: str, make: Callable[[Path], None], match: str, always: bool, overwrite: bool
) -> None:
    make(tmp / name)
    before = in_folder(tmp)
    if overwrite and not always:
        pytest.skip("this is replaced")

    with pytest.raises(FileExistsError, match=match if overwrite else "move it away|overwrite=True") as caught:
        bs.create_array(tmp / name, shape=(4, 6), dtype="f8", overwrite=overwrite)
    assert caught.value.filename == str(tmp / name)
    assert in_folder(tmp) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_journal_of_something_else_is_not_touched(tmp: Path, name: str, overwrite: bool) -> None:
    """What is not ours and has the name of a journal, a draft or a working file stays as it is."""
    keep = tmp / f"{name}.journal"
    keep.write_bytes(b"my diary")
    with (
        contextlib.suppress(OSError, ValueError),
        bs.create_array(tmp / name, shape=(4, 6), dtype="f8", overwrite=overwrite) as x,
    ):
        x[...] = 1
    assert keep.read_bytes() == b"my diary"


def unfinished(path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), bs.create_array(path, shape=(4,), dtype="i8", chunks=(2,)) as x:
        x[0:2] = 5
        1 / 0


def finished(path: Path) -> None:
    with bs.create_array(path, shape=(4,), dtype="i8", chunks=(2,)) as x:
        x[...] = 5


@pytest.mark.parametrize(
    ("make", "match"),
    [(unfinished, "there is an unfinished array; open_array.. it, or"), (finished, "it exists; open_array.. it, or")],
)
def test_an_array_is_replaced_only_if_that_is_asked_for(path: Path, make: Callable[[Path], None], match: str) -> None:
    make(path)
    before = in_folder(path.parent)
    with pytest.raises(FileExistsError, match=match):
        bs.create_array(path, shape=(3,), dtype="f4")
    assert in_folder(path.parent) == before

    with bs.create_array(path, shape=(3,), dtype="f4", overwrite=True) as x:
        assert np.all(x[...] == 0)
        assert not x.written.any()
        x[...] = 2
    with bs.open_array(path, mode="r") as x:
        assert_same(x[...].copy(), np.full(3, 2, "f4"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        finished(path.parent / f"other{path.suffix}")
    assert in_folder(path.parent).keys() == clean(path) | clean(path.parent / f"other{path.suffix}")


def clean(path: Path) -> set[str]:
    """Return the names that a finished array of one axis and one file has."""
    parts = [""] if path.suffix == ".npy" else ["", "/zarr.json", "/c", "/c/0"]
    return {f"{path.name}{part}" for part in parts}


@pytest.mark.parametrize("make", [unfinished, finished])
def test_an_array_that_somebody_writes_is_not_replaced(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    with bs.open_array(path) as x:
        x[...] = 6
        before = in_folder(path.parent)
        with pytest.raises(bs.StoreInUseError, match="has it open"):
            bs.create_array(path, shape=(3,), dtype="f4", overwrite=True)
        with pytest.raises(bs.StoreInUseError, match="has it open"):
            bs.open_array(path)
        assert in_folder(path.parent) == before
    with bs.open_array(path, mode="r") as x:
        assert x[...].tolist() == [6] * 4


@pytest.mark.parametrize("times", [1, 2])
def test_a_link_to_a_zarr_array_is_overwritten_again_and_again(tmp: Path, times: int) -> None:
    """What the link leads to is replaced, or it stays and the link goes; nothing hidden is left."""
    (tmp / "far").mkdir()
    finished(tmp / "far" / "x.zarr")
    (tmp / "x.zarr").symlink_to(tmp / "far" / "x.zarr")
    for _ in range(times):
        with bs.create_array(tmp / "x.zarr", shape=(4,), dtype="i8", overwrite=True) as x:
            x[...] = 7
    with bs.open_array(tmp / "x.zarr", mode="r") as x:
        assert x[...].tolist() == [7] * 4
    assert sorted(os.listdir(tmp)) == ["far", "x.zarr"]


OPENED: list[Any] = [
    pytest.param("x.npy", None, FileNotFoundError, "x.npy", id="no npy"),
    pytest.param("x.zarr", None, FileNotFoundError, "x.zarr", id="no zarr"),
    pytest.param("x.npy", make_file, bs.FormatError, "x.npy", id="npy of something else"),
    pytest.param("x.npy", make_folder, bs.FormatError, "x.npy", id="npy folder"),
    pytest.param("x.npy", make_link_to_nowhere, FileNotFoundError, "nowhere|x.npy", id="npy to nowhere"),
    pytest.param("x.zarr", make_file, bs.FormatError, "is no folder: blockstore's arrays are", id="zarr file"),
    pytest.param("x.zarr", make_folder, bs.FormatError, "has no zarr.json: it is no Zarr v3 array", id="zarr folder"),
    pytest.param("x.zarr", make_group, bs.FormatError, "this is a Zarr group", id="zarr group"),
    pytest.param("x.zarr", make_foreign_json, bs.FormatError, "no metadata of Zarr", id="zarr.json of something else"),
    pytest.param("x.zarr", make_v2, bs.FormatError, "is of Zarr v2, blockstore reads v3", id="zarr v2"),
]


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize(("name", "make", "error", "match"), OPENED)
def test_open_array_refuses_and_changes_nothing(
    tmp: Path, name: str, make: Callable[[Path], None] | None, error: type[Exception], match: str, mode: Any
) -> None:
    if make is not None:
        make(tmp / name)
    before = in_folder(tmp)
    with pytest.raises(error, match=match):
        bs.open_array(tmp / name, mode=mode)
    assert in_folder(tmp) == before


def test_open_array_takes_two_modes(tmp: Path) -> None:
    with pytest.raises(ValueError, match="mode"):
        bs.open_array(tmp / "x.npy", mode="w")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_an_unfinished_array_is_not_taken_for_one_with_other_settings(tmp: Path, name: str) -> None:
    path = tmp / name
    with (
        contextlib.suppress(ZeroDivisionError),
        bs.create_array(path, shape=(4,), dtype="i8", chunks=(2,), fingerprint={"seed": 7}) as x,
    ):
        x[0:2] = 5
        1 / 0
    before = in_folder(tmp)
    with pytest.raises(bs.FingerprintError, match="'seed' was 7, now 8"):
        bs.open_array(path, fingerprint={"seed": 8})
    assert in_folder(tmp) == before
    with bs.open_array(path, fingerprint={"seed": 7}) as x:
        assert [b.index for b in x.pending()] == [(1,)]
        x[2:4] = 6
    with pytest.warns(bs.FingerprintWarning, match="is finished and keeps no fingerprint"):
        bs.open_array(path, fingerprint={"seed": 7}).close()
