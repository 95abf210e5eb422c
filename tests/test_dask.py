"""Dask: what is stored is what `x.compute()` gives, in whole blocks; what does not fit says which rechunk helps."""

import inspect
import os
import re
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import run_python

import blockstore as bs

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
zarr = pytest.importorskip("zarr")

from dask.base import tokenize  # noqa: E402

from blockstore.dask import CreateOptions, _Sink, from_array, store  # noqa: E402

FORMATS = ("x.npy", "x.zarr")
DTYPES = ("?", "i1", "<i4", ">u2", ">f4", "<f8", ">c8")
SCHEDULERS = ("sync", "threads")


@pytest.fixture(params=FORMATS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


@pytest.fixture(autouse=True)
def _workers() -> Iterator[None]:
    with dask.config.set(scheduler="threads", num_workers=4):
        yield


def numbers(shape: tuple[int, ...], dtype: str = "<f8") -> np.ndarray[Any, Any]:
    """Return an array no two neighbours of which are equal."""
    return (np.arange(np.prod(shape)) % 101).reshape(shape).astype(dtype)


def read(path: Path) -> np.ndarray[Any, Any]:
    """Return what other programs find at a path."""
    return np.load(path) if path.suffix == ".npy" else np.asarray(zarr.open_array(path, mode="r")[...])


def suggested(error: pytest.ExceptionInfo[BaseException], x: Any) -> Any:
    """Return what the program in the message of an error makes of `x`."""
    found = re.search(r"x\.(?:rechunk\(\{.*?\}\)|\w+\([^()]*\))", str(error.value))
    assert found, str(error.value)
    return eval(found[0], {"x": x, "dask": dask})


class Counted:
    """A function of chunks that counts its calls, and raises at one of them."""

    def __init__(self, raise_at: int | None = None) -> None:
        self.indices: list[tuple[int, ...]] = []
        self.raise_at = raise_at

    def __call__(self, chunk: Any, block_id: tuple[int, ...]) -> Any:
        if len(self.indices) == self.raise_at:
            raise KeyError("the one that fails")
        self.indices.append(block_id)
        return chunk + 1

    def over(self, x: Any) -> Any:
        return da.map_blocks(self, x, dtype=x.dtype, meta=x._meta)


# -- store: what is stored -----------------------------------------------------------------------------


@st.composite
def regular(draw: st.DrawFn, *, contiguous: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Draw a shape, and chunks that blocks can be made of."""
    shape = tuple(draw(st.lists(st.integers(int(contiguous), 9), min_size=1, max_size=3)))
    chunks = [draw(st.integers(1, n or 1)) for n in shape]
    if contiguous:
        axis = draw(st.integers(0, len(shape) - 1))
        chunks = [1] * axis + chunks[axis : axis + 1] + [n or 1 for n in shape[axis + 1 :]]
    return shape, tuple(chunks)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_what_is_stored_is_what_compute_gives(
    tmp_path_factory: pytest.TempPathFactory, name: str, scheduler: str, data: st.DataObject, dtype: str
) -> None:
    shape, chunks = data.draw(regular(contiguous=name == "x.npy"))
    a = numbers(shape, dtype)
    x = da.from_array(a, chunks=chunks)
    path = tmp_path_factory.mktemp("x") / name

    with dask.config.set(scheduler=scheduler):
        store(x, path)

        if name == "x.npy":  # zarr-python reads everything in the byte order of the machine
            assert read(path).dtype == a.dtype
        np.testing.assert_array_equal(read(path), a)
        y = from_array(path)
        assert (y.dtype, y._meta.dtype, y.shape) == (a.dtype, a.dtype, shape)
        np.testing.assert_array_equal(y.compute(), a)
    assert {each.name for each in path.parent.iterdir()} == {name}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_chunks_of_any_sizes_are_stored_after_a_rechunk_that_the_error_names(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    axes = data.draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=3))
    shape = tuple(map(sum, axes))
    x = da.from_array(numbers(shape), chunks=tuple(map(tuple, axes)))
    options: dict[str, Any] = {}
    name = data.draw(st.sampled_from(FORMATS)) if all(shape) else "x.zarr"
    if name == "x.zarr" and data.draw(st.booleans()):
        options["chunks"] = tuple(data.draw(st.integers(1, n or 1)) for n in shape)
    path = tmp_path_factory.mktemp("x") / name

    try:
        store(x, path, **options)
    except (bs.LayoutError, bs.SelectionError):
        assert not list(path.parent.iterdir())
        with pytest.raises((bs.LayoutError, bs.SelectionError), match=r"x\.rechunk") as refused:
            store(x, path, **options)
        store(suggested(refused, x), path, **options)
        store(x, path.with_stem("y"), rechunk=True, **options)
        np.testing.assert_array_equal(read(path.with_stem("y")), numbers(shape))
    np.testing.assert_array_equal(read(path), numbers(shape))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)], ids=str)
def test_an_array_without_elements_is_stored(path: Path, shape: tuple[int, ...]) -> None:
    store(da.zeros(shape), path)
    assert read(path).shape == from_array(path).compute().shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_given_array_takes_what_assignment_would_cast(path: Path, dtype: str) -> None:
    a = numbers((10, 6), "<f8")
    with bs.create_array(path, shape=(10, 6), dtype=dtype, chunks=(4, 6)) as array:
        assert store(da.from_array(a, chunks=(8, 6)), array) is None  # type: ignore[func-returns-value]
        assert not array.closed
        np.testing.assert_array_equal(array[...], a.astype(dtype))


def test_a_given_array_is_durable_and_not_published(path: Path) -> None:
    with bs.create_array(path, shape=(10, 6), dtype="f8", chunks=(4, 6)) as array:
        store(da.ones((10, 6), chunks=(4, 6)), array)

        assert "3 written, 3 durable" in repr(array)
        assert not (path if path.suffix == ".npy" else path / "c/0/0").exists()


def test_options_are_those_of_create_array(tmp_path: Path) -> None:
    x = da.ones((8, 8), chunks=(4, 8), dtype="u1")
    store(x, tmp_path / "x.zarr", chunks=(2, 8), shards=(4, 8), fill_value=7, attributes={"unit": "K"})

    z = zarr.open_array(tmp_path / "x.zarr", mode="r")
    assert (z.chunks, z.shards, z.fill_value, z.attrs["unit"]) == ((2, 8), (4, 8), 7, "K")
    names = set(inspect.signature(bs.create_array).parameters) - {"path", "shape", "dtype"}
    assert set(CreateOptions.__annotations__) == names


def test_many_workers_store_many_chunks(path: Path) -> None:
    together = threading.Barrier(4)

    def wait(chunk: Any, block_id: tuple[int, int]) -> Any:
        if block_id[0] < 4:
            together.wait(timeout=30)  # passes only if four chunks are computed at once
        return chunk + block_id[0]

    x = da.map_blocks(wait, da.zeros((200, 6), chunks=(1, 6)), dtype="f8", meta=np.empty((0, 0)))
    store(x, path)

    assert read(path)[:, 5].tolist() == list(range(200))


def test_what_is_stored_long_before_the_end_is_durable_and_seen(tmp_path: Path) -> None:
    seen = []

    def look(chunk: Any, block_id: tuple[int, int]) -> Any:
        seen.append(len(list(tmp_path.glob("x.zarr/c/?/0"))))
        return chunk

    x = da.map_blocks(look, da.ones((8, 6), chunks=(2, 6)), dtype="f8", meta=np.empty((0, 0)))
    with dask.config.set(scheduler="sync"):
        store(x, tmp_path / "x.zarr", shards=(4, 6), flush_every=0)
        assert seen == [0, 0, 1, 1]
        seen.clear()
        store(x, tmp_path / "x.zarr", shards=(4, 6), flush_every=None, overwrite=True)
        assert seen == [0] * 4


# -- store: what fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_task_that_fails_leaves_what_can_be_resumed(path: Path, scheduler: str) -> None:
    x = da.from_array(numbers((10, 6)), chunks=(2, 6))
    first = Counted(raise_at=2)
    with dask.config.set(scheduler=scheduler), pytest.raises(KeyError, match="the one that fails"):
        store(first.over(x), path)

    assert not (path if path.suffix == ".npy" else path / "c/0/0").exists()
    with bs.open_array(path) as array:
        written = {b.index for b in array.blocks if b.written}
    assert written == set(first.indices[:2]) if scheduler == "sync" else written <= set(first.indices)

    second = Counted()
    store(second.over(x), path, resume=True)

    assert sorted(second.indices) == sorted(set(np.ndindex(5, 1)) - written)
    np.testing.assert_array_equal(read(path), numbers((10, 6)) + 1)


def test_nothing_is_closed_while_another_task_still_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, released = threading.Event(), threading.Event()
    assign, wait = bs.BlockArray.__setitem__, _Sink.wait

    def assign_late(array: bs.BlockArray, key: Any, data: Any) -> None:
        inside.set()
        assert released.wait(timeout=30)  # until `store` knows of the failure
        assign(array, key, data)

    def release_and_wait(sink: _Sink) -> None:
        released.set()
        wait(sink)

    def fail(chunk: Any, block_id: tuple[int, int]) -> Any:
        if block_id == (1, 0):
            assert inside.wait(timeout=30)
            raise KeyError("the one that fails")
        return chunk

    monkeypatch.setattr(bs.BlockArray, "__setitem__", assign_late)
    monkeypatch.setattr(_Sink, "wait", release_and_wait)
    with pytest.raises(KeyError, match="the one that fails"):
        store(da.map_blocks(fail, X, dtype="f8", meta=np.empty((0, 0))), path)

    with bs.open_array(path) as array:
        assert [b.written for b in array.blocks] == [True, False]


def test_resuming_writes_no_block_again(tmp_path: Path) -> None:
    x = Counted()
    with bs.create_array(tmp_path / "x.zarr", shape=(10, 6), dtype="f8", chunks=(2, 3)) as array:
        array[0:2] = -1.0
        array[4:6, 3:6] = -1.0
        store(x.over(da.from_array(numbers((10, 6)), chunks=(4, 3))), array, resume=True)

    expected = numbers((10, 6)) + 1
    expected[0:2] = expected[4:6, 3:6] = -1
    np.testing.assert_array_equal(read(tmp_path / "x.zarr"), expected)
    assert sorted(x.indices) == sorted(np.ndindex(3, 2))


def test_resuming_computes_no_chunk_all_of_which_is_written(tmp_path: Path) -> None:
    x = Counted()
    with bs.create_array(tmp_path / "x.zarr", shape=(10, 6), dtype="f8", chunks=(2, 3)) as array:
        array[0:4, 3:6] = -1.0
        store(x.over(da.from_array(numbers((10, 6)), chunks=(4, 3))), array, resume=True, compute=False).compute()  # type: ignore[union-attr]

    assert sorted(x.indices) == sorted(set(np.ndindex(3, 2)) - {(0, 1)})


def test_resuming_what_is_finished_computes_nothing_however_it_is_divided(path: Path) -> None:
    x, again = da.from_array(numbers((10, 6)), chunks=(3, 6)), Counted()
    store(x, path, resume=True)
    store(again.over(x), path, resume=True)
    store(again.over(x), path, resume=True, compute=False).compute()  # type: ignore[union-attr]

    assert again.indices == []
    np.testing.assert_array_equal(read(path), numbers((10, 6)))


def test_resuming_goes_on_with_the_settings_that_it_was_begun_with(path: Path) -> None:
    x = da.ones((10, 6), chunks=(4, 6))
    with pytest.raises(KeyError):
        store(Counted(raise_at=1).over(x), path, fingerprint={"seed": 1})
    with pytest.raises(bs.FingerprintError, match="seed"):
        store(x, path, fingerprint={"seed": 2}, resume=True)
    store(x + 1, path, fingerprint={"seed": 1}, resume=True)

    assert np.all(read(path) == 2)


def test_without_resume_what_is_written_is_written_again(path: Path) -> None:
    with bs.create_array(path, shape=(10, 6), dtype="f8", chunks=(4, 6)) as array:
        store(da.zeros((10, 6), chunks=(4, 6)), array)
        store(da.ones((10, 6), chunks=(4, 6)), array)
        assert np.all(array[...] == 1)


def test_a_chunk_that_comes_out_in_another_shape_is_refused_and_not_broadcast(path: Path) -> None:
    x = da.map_blocks(lambda chunk: chunk[:1], da.ones((10, 6), chunks=(4, 6)), dtype="f8", meta=np.empty((0, 0)))
    with pytest.raises(bs.LayoutError, match=r"came out with shape \(1, 6\), where x says \((4|2), 6\)"):
        store(x, path)
    with bs.open_array(path) as array:
        assert not array.written.any()


# -- store: what is refused ----------------------------------------------------------------------------


def test_chunks_that_cut_blocks_are_refused_with_what_helps(path: Path) -> None:
    x = da.ones((10, 6), chunks=(3, 6))
    with bs.create_array(path, shape=(10, 6), dtype="f8", chunks=(4, 6)) as array:
        message = (
            r"^a chunk of x ends at 3 along axis 0, within a block of \(4, 6\): x\.rechunk\(\{0: 4\}\) has chunks of "
            r"whole blocks, and rechunk=True does it$"
        )
        with pytest.raises(bs.SelectionError, match=message) as refused:
            store(x, array)
        assert not array.written.any()
        store(suggested(refused, x), array)
        store(x + 1, array, rechunk=True)
        assert np.all(array[...] == 2)


def test_chunks_that_cannot_be_blocks_of_an_npy_are_refused_with_what_helps(tmp_path: Path) -> None:
    x = da.ones((10, 6), chunks=(4, 3))
    with pytest.raises(bs.LayoutError, match=r"blocks of an \.npy, .* C order: x\.rechunk\(\{1: 6\}\) .* rechunk=True"):
        store(x, tmp_path / "x.npy")
    store(x, tmp_path / "x.zarr")


@pytest.mark.parametrize(
    ("shape", "chunks", "expected"),
    [
        ((40, 40), (4, 4), (4, 40)),
        ((100, 10, 10), (20, 5, 5), (10, 10, 10)),
        ((10, 5000), (10, 50), (1, 500)),
        ((4, 50, 50), (2, 10, 10), (1, 10, 50)),
    ],
    ids=["small rows", "large planes", "rows larger than a chunk", "planes larger than a chunk"],
)
def test_blocks_that_an_npy_takes_are_of_a_sensible_size(
    tmp_path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    x = da.zeros(shape, chunks=chunks)
    with dask.config.set({"array.chunk-size": "8000 B"}), pytest.raises(bs.LayoutError) as refused:
        store(x, tmp_path / "x.npy")

    assert suggested(refused, x).chunksize == expected


def test_a_rechunk_to_large_blocks_takes_no_more_of_them_than_memory_likes(tmp_path: Path) -> None:
    x = da.zeros((100, 10, 10), chunks=(20, 5, 5))
    with (
        dask.config.set({"array.chunk-size": "8000 B"}),
        bs.create_array(tmp_path / "x.npy", shape=x.shape, dtype="f8", chunks=(5, 10, 10)) as array,
        pytest.raises(bs.SelectionError) as refused,
    ):
        store(x, array)

    assert suggested(refused, x).chunksize == (10, 10, 10)


def test_chunks_of_unknown_size_are_refused_with_what_helps(path: Path) -> None:
    x = da.from_array(np.arange(10), chunks=5)
    x = x[x % 3 == 0]
    for rechunk in (False, True):
        with pytest.raises(bs.LayoutError, match="unknown size along axis 0") as refused:
            store(x, path, rechunk=rechunk)
    store(suggested(refused, x), path)

    assert read(path).tolist() == [0, 3, 6, 9]


def test_a_masked_array_is_refused_with_what_helps(path: Path) -> None:
    x = da.ma.masked_equal(da.arange(4, chunks=2), 2)
    with pytest.raises(bs.DtypeError, match="masked") as refused:
        store(x, path)
    found = re.search(r"dask\.array\.ma\.filled\(x\)", str(refused.value))
    assert found
    store(eval(found[0], {"x": da.ma.set_fill_value(x, 9) or x, "dask": dask}), path)

    assert read(path).tolist() == [0, 1, 9, 3]


X = da.ones((4, 6), chunks=(2, 6))


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (np.ones(3), {}, TypeError, "a dask array, not ndarray"),
        (X[0, 0], {}, bs.LayoutError, "one axis at least"),
        (X.astype(object), {}, bs.DtypeError, "object"),
        (X, {"chunks": (0, 6)}, bs.LayoutError, "at least 1"),
        (X, {"chunks": (2,)}, bs.LayoutError, "axes"),
        (X, {"dtype": "f4"}, TypeError, "dtype"),
        (X, {"compression": "zstd"}, TypeError, "compression"),
        (X, {"overwrite": True, "resume": True}, ValueError, "pass one of them"),
    ],
    ids=["no dask array", "no axis", "objects", "empty blocks", "too few axes", "dtype", "unknown option", "both"],
)
def test_what_makes_no_sense_is_refused_and_leaves_nothing(
    path: Path, x: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        store(x, path, **options)
    assert os.listdir(path.parent) == []


def test_a_target_that_does_not_take_it_is_refused(path: Path) -> None:
    with bs.create_array(path, shape=(4, 6), dtype="f8", chunks=(2, 6)) as array:
        with pytest.raises(bs.LayoutError, match=r"x has shape \(4, 3\), .* has \(4, 6\)"):
            store(da.ones((4, 3)), array)
        with pytest.raises(TypeError, match="created already: chunks would be for a path"):
            store(X, array, chunks=(2, 6))
        with pytest.raises(bs.StoreInUseError):
            store(X, path, resume=True)
        store(X, array)
    with pytest.raises(bs.ClosedStoreError):
        store(X, array)
    with bs.open_array(path, mode="r") as array, pytest.raises(bs.ReadOnlyStoreError):
        store(X, array)
    with pytest.raises(FileExistsError):
        store(X, path)
    with pytest.raises(bs.LayoutError, match=r"x is of float32, .* of float64: x\.astype\('<f8'\) fits"):
        store(X.astype("f4"), path, resume=True)
    with pytest.raises(bs.LayoutError, match="x has shape"):
        store(X[:2], path, resume=True)
    np.testing.assert_array_equal(read(path), np.ones((4, 6)))
    with bs.open_array(path):
        pass  # nobody has kept it open


@pytest.mark.parametrize("scheduler", ["processes", "multiprocessing"])
def test_a_scheduler_of_other_processes_is_refused_before_anything_is_made(path: Path, scheduler: str) -> None:
    with (
        dask.config.set(scheduler=scheduler),
        pytest.raises(TypeError, match=r"dask\.config\.set\(scheduler='threads'\)"),
    ):
        store(X, path)
    assert os.listdir(path.parent) == []


def test_an_executor_of_processes_is_refused_before_anything_is_made(path: Path) -> None:
    with ProcessPoolExecutor(1) as pool, dask.config.set(scheduler=pool), pytest.raises(TypeError, match="processes"):
        store(X, path)
    assert os.listdir(path.parent) == []


def test_a_cluster_is_refused_before_anything_is_made(path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.Client(processes=False, n_workers=1, dashboard_address=None),
        dask.config.set(scheduler=None),
        pytest.raises(TypeError, match="processes"),
    ):
        store(X, path)
    assert os.listdir(path.parent) == []


def test_an_executor_of_threads_serves(path: Path) -> None:
    with ThreadPoolExecutor(2) as pool, dask.config.set(scheduler=pool):
        store(X, path)
    assert np.all(read(path) == 1)


def test_without_dask_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "dask.py").write_text("raise ModuleNotFoundError('No module named dask', name='dask')", "utf-8")
    ran = run_python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import blockstore; import blockstore.dask")

    assert (
        "ModuleNotFoundError: blockstore.dask needs the package 'dask': pip install 'ndblockstore[dask]'" in ran.stderr
    )


# -- store: later --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_is_to_be_computed_later_closes_a_path_at_its_end(path: Path, scheduler: str) -> None:
    x = Counted()
    later = store(x.over(da.from_array(numbers((10, 6)), chunks=(4, 6))), path, compute=False)
    assert later is not None
    assert x.indices == []
    with pytest.raises(FileExistsError):
        store(X, path)

    assert later.compute(scheduler=scheduler) is None
    np.testing.assert_array_equal(read(path), numbers((10, 6)) + 1)
    with pytest.raises(bs.ClosedStoreError):
        later.compute(scheduler=scheduler)


def test_errors_are_as_early_as_without_later(path: Path) -> None:
    with pytest.raises(bs.LayoutError, match="rechunk"):
        store(da.ones((10, 6), chunks=((3, 7), 6)), path, compute=False)


def test_what_is_computed_later_leaves_a_given_array_open_and_durable(path: Path) -> None:
    with bs.create_array(path, shape=(10, 6), dtype="f8", chunks=(4, 6)) as array:
        later = store(da.ones((10, 6), chunks=(4, 6)), array, compute=False)
        assert later is not None
        for _ in range(2):
            later.compute()
            assert "3 written, 3 durable" in repr(array)


def test_what_is_never_computed_leaves_what_can_be_resumed(path: Path) -> None:
    with warnings.catch_warnings(action="error"):
        later = store(X, path, compute=False)
        del later
    store(X, path, resume=True)
    assert np.all(read(path) == 1)


def test_what_failed_later_is_computed_again_as_a_whole(path: Path) -> None:
    x = Counted(raise_at=1)
    later = store(x.over(da.from_array(numbers((10, 6)), chunks=(4, 6))), path, compute=False)
    assert later is not None
    with pytest.raises(KeyError):
        later.compute(scheduler="sync")
    x.raise_at = None
    later.compute(scheduler="sync")

    np.testing.assert_array_equal(read(path), numbers((10, 6)) + 1)


# -- from_array ----------------------------------------------------------------------------------------


def test_nothing_is_read_before_it_is_computed_and_what_is_not_written_is_the_fill_value(tmp_path: Path) -> None:
    with bs.create_array(tmp_path / "x.zarr", shape=(10, 6), dtype=">f4", chunks=(4, 6), fill_value=7) as array:
        x = from_array(array, chunks=array.chunks)
        array[4:8] = 1

        assert (x.dtype, x._meta.dtype, x._meta.shape) == (np.dtype(">f4"), np.dtype(">f4"), (0, 0))
        assert x.compute()[:, 0].tolist() == [7, 7, 7, 7, 1, 1, 1, 1, 7, 7]


def test_chunks_are_read_without_a_copy(path: Path) -> None:
    store(da.from_array(numbers((10, 6)), chunks=(2, 6)), path)
    chunks: list[Any] = []
    from_array(path, chunks=(2, 6)).map_blocks(chunks.append, dtype="f8", meta=np.empty((0, 0))).blocks[1].compute()

    assert not chunks[0].flags.writeable
    assert not chunks[0].flags.owndata
    np.testing.assert_array_equal(chunks[0], numbers((10, 6))[2:4])


@pytest.mark.parametrize(
    ("shape", "chunks", "shards", "limit", "expected"),
    [
        ((100, 8), (10, 8), None, "1 GiB", (100, 8)),
        ((100, 8), (10, 8), None, "2000 B", (30, 8)),
        ((100, 8), (10, 4), (20, 8), "2600 B", (40, 8)),
        ((0, 8), (1, 8), None, "1 kiB", (0, 8)),
    ],
    ids=["all", "blocks", "files", "nothing"],
)
def test_chunks_are_whole_files_or_blocks_of_the_size_that_dask_likes(
    tmp_path: Path,
    shape: tuple[int, int],
    chunks: tuple[int, int],
    shards: tuple[int, int] | None,
    limit: str,
    expected: tuple[int, int],
) -> None:
    with (
        dask.config.set({"array.chunk-size": limit}),
        bs.create_array(tmp_path / "x.zarr", shape=shape, dtype="f8", chunks=chunks, shards=shards) as array,
    ):
        assert from_array(array).chunksize == expected


def test_a_block_that_is_larger_than_dask_likes_is_read_in_parts(tmp_path: Path) -> None:
    with (
        dask.config.set({"array.chunk-size": "1 kiB"}),
        bs.create_array(tmp_path / "x.npy", shape=(100, 8), dtype="f8", chunks=(100, 8)) as array,
    ):
        assert 512 <= np.prod(from_array(array).chunksize) * 8 <= 1024


@pytest.mark.parametrize("chunks", [(4, 3), 5, -1, "auto", "64 B", {0: 3}, ((7, 3), (6,))], ids=str)
def test_chunks_are_given_as_to_dask(path: Path, chunks: Any) -> None:
    store(da.from_array(numbers((10, 6)), chunks=(2, 6)), path)
    x = from_array(path, chunks=chunks)

    np.testing.assert_array_equal(x.compute(), numbers((10, 6)))
    if chunks != "64 B":
        assert x.chunks == da.from_array(numbers((10, 6)), chunks=chunks).chunks


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_taken_of_it_is_what_numpy_takes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("x") / data.draw(st.sampled_from(FORMATS))
    a = numbers((10, 6))
    store(da.from_array(a, chunks=(4, 6)), path)
    chunks = tuple(data.draw(st.integers(1, n)) for n in a.shape)
    per_axis = [
        st.one_of(st.integers(-n, n - 1), st.slices(n), st.lists(st.integers(-n, n - 1), min_size=1)) for n in a.shape
    ]
    rows, columns = (data.draw(each) for each in per_axis)

    np.testing.assert_array_equal(from_array(path, chunks=chunks)[rows].compute(), a[rows])
    np.testing.assert_array_equal(from_array(path, chunks=chunks)[:, columns].compute(), a[:, columns])


def test_an_array_stored_from_another_and_onto_itself(path: Path) -> None:
    store(da.from_array(numbers((10, 6)), chunks=(4, 6)), path)
    with bs.open_array(path) as array:
        store(from_array(array, chunks=array.chunks) * 2, array)
    store(from_array(path, chunks=(5, 6)) + 1, path.with_stem("y"))

    np.testing.assert_array_equal(read(path.with_stem("y")), numbers((10, 6)) * 2 + 1)


def test_a_closed_array_is_refused(path: Path) -> None:
    with bs.create_array(path, shape=(4, 6), dtype="f8", chunks=(2, 6)) as array:
        pass
    with pytest.raises(bs.ClosedStoreError):
        from_array(array)


# -- names ---------------------------------------------------------------------------------------------


def test_the_name_is_the_same_while_the_content_is(path: Path) -> None:
    with bs.create_array(path, shape=(10, 6), dtype="f8", chunks=(2, 6)) as array:
        names = [from_array(array).name, from_array(array).name, from_array(array, chunks=(2, 6)).name]
        array[0:2] = 1
        names.append(from_array(array).name)
        array[0:2] = 2
        names.append(from_array(array).name)

    assert names[0] == names[1]
    assert len(set(names)) == 4


def test_the_name_of_what_was_finished_anew_is_another(path: Path) -> None:
    names, tokens = [], []
    for value in range(3):
        store(da.full((10, 6), float(value), chunks=(2, 6)), path, overwrite=True)
        with bs.open_array(path, mode="r") as array:
            names.append(from_array(array).name)
            tokens.append(tokenize(array))

    assert len(set(names)) == len(set(tokens)) == 3


def test_two_openings_of_what_is_finished_have_one_name(path: Path) -> None:
    store(da.ones((10, 6), chunks=(2, 6)), path)

    assert from_array(path).name == from_array(path).name


# -- dask as it is -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [False, True])
def test_dask_store_works_as_it_is(path: Path, lock: bool) -> None:
    with bs.create_array(path, shape=(10, 6), dtype="f8", chunks=(4, 6)) as array:
        da.store(da.from_array(numbers((10, 6)), chunks=(4, 6)), array, lock=lock)
    np.testing.assert_array_equal(read(path), numbers((10, 6)))


def test_dask_store_works_with_regions_of_whole_blocks(path: Path) -> None:
    with bs.create_array(path, shape=(10, 6), dtype="f8", chunks=(2, 6)) as array:
        region = (slice(4, 8), slice(None))
        da.store(da.from_array(numbers((4, 6)), chunks=(2, 6)), array, regions=region, lock=False)
        assert [b.written for b in array.blocks] == [False, False, True, True, False]
        np.testing.assert_array_equal(array[4:8], numbers((4, 6)))
        with pytest.raises(bs.SelectionError, match="cuts blocks"):
            da.store(da.ones((4, 6)), array, regions=(slice(3, 7), slice(None)), lock=False)


def test_dask_store_returns_what_it_stored(path: Path) -> None:
    with bs.create_array(path, shape=(10, 6), dtype="f8", chunks=(4, 6)) as array:
        x = da.from_array(numbers((10, 6)), chunks=(4, 6))
        stored = da.store(x, array, lock=False, return_stored=True)
        np.testing.assert_array_equal(stored.compute(), numbers((10, 6)))


def test_dask_reads_it_as_it_is(path: Path) -> None:
    store(da.from_array(numbers((10, 6)), chunks=(4, 6)), path)
    with bs.open_array(path, mode="r") as array:
        for x in (da.from_array(array), da.from_array(array, chunks=(3, 4)), da.asarray(array)):
            np.testing.assert_array_equal(x.compute(), numbers((10, 6)))
            np.testing.assert_array_equal(x[[7, 0]].compute(), numbers((10, 6))[[7, 0]])
            assert (x.dtype, type(x._meta)) == (np.dtype("f8"), np.ndarray)
        y = da.map_blocks(np.negative, da.from_array(array, chunks=(4, 6)))
        np.testing.assert_array_equal(y.compute(), -numbers((10, 6)))
        np.testing.assert_array_equal(np.asarray(array), numbers((10, 6)))
