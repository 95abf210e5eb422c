"""Every reader reads what `create_array` makes, byte for byte: the matrix of `compat`, a part of it here.

The readers run in processes of their own, as the whole matrix runs them: what they start, this one does not have.
"""

import doctest
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import run_python

import blockstore as bs
from compat import cases, environments, matrix, page
from compat.cases import Case, Item, all_cases, some_cases
from compat.differences import compare, nbytes
from compat.limits import LIMITS, Limit
from compat.matrix import Matrix
from compat.readers import READERS, Read, Reader

pytestmark = pytest.mark.filterwarnings("ignore::blockstore.FileSystemWarning")

HERE = [reader for reader in READERS if reader.environment == "here"]
LOAD = READERS[0]

each_reader_here = pytest.mark.parametrize("reader", HERE, ids=lambda reader: reader.name.replace("`", ""))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with matrix.scratch() as folder:
        yield folder


@pytest.fixture(scope="module")
def part(folder: Path) -> Matrix:
    """Return a part of the matrix: some of the arrays, the readers that are installed here."""
    return run(folder, some_cases(), HERE)


def run(folder: Path, some: list[Case], readers: list[Reader], create_array: Any = bs.create_array) -> Matrix:
    place = folder / f"run-{len(list(folder.iterdir()))}"
    place.mkdir()
    return matrix.run(some, readers, place, create_array)


def case(name: str) -> Case:
    return next(case for case in all_cases() if case.name == name)


# -- the matrix -----------------------------------------------------------------------------------


@each_reader_here
def test_what_is_written_is_read_byte_for_byte_or_as_the_limits_of_the_reader_say(part: Matrix, reader: Reader) -> None:
    if reader.name in part.skipped:
        pytest.skip(part.skipped[reader.name])

    assert [finding for finding in part.findings if finding.startswith((f"{reader.name}:", "blockstore:"))] == []
    dtypes = {dtype for name, _, dtype, _ in part.cells if name == reader.name}
    situations = {situation for name, _, _, situation in part.cells if name == reader.name}
    assert dtypes == {dtype.str for dtype in cases.DTYPES}
    assert situations == set(cases.SITUATIONS)


@pytest.mark.slow
def test_every_reader_reads_every_array_byte_for_byte_or_as_its_limits_say(folder: Path) -> None:
    ran = run(folder, all_cases(), list(READERS))

    assert ran.findings == []
    if ran.skipped:
        pytest.skip("; ".join(f"{name}: {reason}" for name, reason in ran.skipped.items()))


SAME_FILE = """
import sys
import numpy as np
import zarr
shard, array = sys.argv[1:]
a, z = np.load(shard, mmap_mode="r"), zarr.open_array(array, mode="r")
print(type(a).__name__, a.shape == z.shape, a.dtype == z.dtype, a.tobytes() == z[...].tobytes())
print(a[-1, -1], z[-1, -1])
"""


def test_numpy_maps_the_shard_file_that_zarr_reads_as_an_array(tmp_path: Path) -> None:
    if importlib.util.find_spec("zarr") is None:
        pytest.skip("not installed: zarr")
    a = np.random.default_rng(0).standard_normal((1000, 300))
    with bs.create_array(tmp_path / "x.zarr", shape=a.shape, dtype=a.dtype, chunks=(256, 300)) as x:
        x[:] = a

    ran = run_python(SAME_FILE, tmp_path / "x.zarr" / "c" / "0" / "0", tmp_path / "x.zarr", options=["-W", "ignore"])

    assert ran.stdout == f"memmap True True True\n{a[-1, -1]} {a[-1, -1]}\n", ran.stderr


NAMES = """
import sys
import xarray
with xarray.open_zarr(sys.argv[1], consolidated=False) as group:
    print(group["a"].dims, group["a"].attrs)
"""


def test_xarray_has_the_names_of_the_axes_and_the_attributes(folder: Path) -> None:
    if importlib.util.find_spec("xarray") is None or importlib.util.find_spec("zarr") is None:
        pytest.skip("not installed: xarray, zarr")
    one = case("zarr-tiles-f4-3d-edge-blocks")
    one.make(folder / "names", bs.create_array)

    ran = run_python(NAMES, folder / "names", options=["-W", "ignore"])

    assert ran.stdout == f"('depth', 'y', 'x') {{'units': 'K', 'name': '{one.name}'}}\n", ran.stderr


# -- it notices what is wrong ---------------------------------------------------------------------


class Flipped:
    """Makes arrays with one bit of the data turned: the last of the file's first block."""

    def __init__(self, path: Path, **more: Any) -> None:
        self.path = path
        self.more = more

    def __enter__(self) -> bs.BlockArray:
        self.array = bs.create_array(self.path, **self.more)
        return self.array

    def __exit__(self, *error: object) -> None:
        self.array.close()
        with open(self.path, "r+b") as file:
            file.seek(4096)
            byte = file.read(1)[0]
            file.seek(4096)
            file.write(bytes([byte ^ 1]))


def test_one_bit_that_differs_is_a_finding(folder: Path) -> None:
    ran = run(folder, [case("npy-rows-f8-2d-full")], [LOAD], Flipped)

    [finding] = ran.findings
    assert finding.startswith(
        "`numpy.load`: npy-rows-f8-2d-full/a.npy: 1 of 4200 elements differ, the first at [0, 0]: "
    )


def test_an_array_that_cannot_be_made_is_a_finding(folder: Path) -> None:
    def refuse(path: Path, **more: Any) -> Any:
        raise OSError("the disk is full")

    ran = run(folder, [case("npy-rows-f8-2d-full")], [LOAD], refuse)

    assert ran.findings == ["blockstore: npy-rows-f8-2d-full: OSError: the disk is full"]


def test_a_reader_that_breaks_is_a_finding(folder: Path) -> None:
    broken = Reader("broken", "here", "with_numpy:nothing", ("numpy",), npy=True)

    [finding] = run(folder, [case("npy-rows-f8-2d-full")], [broken]).findings

    assert finding.startswith("broken: ")
    assert finding.endswith("AttributeError: module 'compat.readers.with_numpy' has no attribute 'nothing'")


@pytest.mark.parametrize(
    ("sure", "findings"),
    [(True, ["`numpy.load`: npy-rows-f8-2d-full/a.npy: is equal, though limit 'never' holds for it"]), (False, [])],
)
def test_a_limit_that_turns_out_to_work_is_a_finding_if_it_is_a_sure_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sure: bool, findings: list[str]
) -> None:
    never = Limit("never", lambda *_: True, lambda *_: True, "It never works.", sure)
    monkeypatch.setattr(matrix, "LIMITS", (never,))

    ran = run(folder, [case("npy-rows-f8-2d-full")], [LOAD])

    assert ran.findings == findings
    assert matrix.unmet(ran) == ["never"]


def test_a_limit_does_not_excuse_what_it_does_not_describe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Limit("other", lambda *_: True, lambda *_: False, "Something else.")
    monkeypatch.setattr(matrix, "LIMITS", (other,))

    ran = run(folder, [case("npy-rows-f8-2d-full")], [LOAD], Flipped)

    assert len(ran.findings) == 1
    assert "1 of 4200 elements differ" in ran.findings[0]


def test_a_reader_that_is_not_installed_is_skipped_with_a_reason(folder: Path) -> None:
    absent = Reader("absent", "here", "with_absent:read", ("no-such-package", "numpy"))

    ran = run(folder, [], [absent])

    assert (ran.skipped, ran.findings) == ({"absent": "not installed: no-such-package"}, [])


def test_an_environment_that_cannot_be_had_is_skipped_with_a_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments.prepare.cache_clear()
    monkeypatch.setattr(environments.shutil, "which", lambda name: None)

    ran = run(folder, [], [READERS[-1]])

    assert (ran.skipped, ran.findings) == ({"zarrita.js": "zarrita: node and npm are not there"}, [])


def test_the_newest_zarr_gets_the_interpreter_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPAT_PYTHON", "/opt/python")

    assert environments.newest_python() == "/opt/python"


# -- what differs ---------------------------------------------------------------------------------


def item(values: Any, dtype: str) -> Item:
    expected = np.array(values, dtype)
    return Item(case("npy-rows-f8-1d-full"), "a.npy", expected, np.ones(expected.shape, np.bool_), npy=True)


def answer(a: Any) -> tuple[Read, bytes]:
    a = np.asarray(a)
    return {"dtype": a.dtype.str, "shape": list(a.shape)}, a.tobytes()


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        (item([1, 2], "<i4"), np.array([1, 2], "<i4")),
        (item([1, 2], ">i4"), np.array([1, 2], "<i4")),
        (item([1, 2], "<i4"), np.array([1, 2], ">i4")),
        (item([1 + 2j], ">c8"), np.array([1 + 2j], "<c8")),
        (item([np.nan, -0.0], "<f8"), np.array([np.nan, -0.0], "<f8")),
        (item(np.ones((2, 0, 3)), "<f8"), np.ones((2, 0, 3))),
    ],
    ids=["the same", "turned to native", "turned from native", "complex, turned", "NaN and -0.0", "nothing"],
)
def test_the_same_numbers_do_not_differ_in_whatever_byte_order(expected: Item, got: Any) -> None:
    read, data = answer(got)

    assert nbytes(read) == len(data)
    assert compare(expected, read, data) is None


@pytest.mark.parametrize(
    ("expected", "got", "text"),
    [
        (item([1, 2], "<i4"), np.array([1, 2], "<i8"), r"gave dtype int64 and shape \(2,\), not int32 and \(2,\)"),
        (item([1, 2], "<i4"), np.array([1, 2], "<u4"), r"gave dtype uint32 and "),
        (item([1, 2], "<i4"), np.array([[1, 2]], "<i4"), r"gave dtype int32 and shape \(1, 2\), not int32 and \(2,\)"),
        (item([0.0, 1], "<f8"), np.array([-0.0, 1], "<f8"), r"1 of 2 elements differ, the first at \[0\]: -0.0 "),
        (item([np.nan], "<f4"), np.array([0xFFC00000], "<u4").view("<f4"), r"\(0x0000c0ff\), not nan \(0x0000c07f\)"),
        (item([1 + 2j], ">c8"), np.array([2 + 1j], "<c8"), r"1 of 1 elements differ"),
    ],
    ids=["wider", "unsigned", "another shape", "the zero of the other sign", "another NaN", "parts exchanged"],
)
def test_what_differs_is_told(expected: Item, got: Any, text: str) -> None:
    difference = compare(expected, *answer(got))

    assert difference is not None
    with pytest.raises(ValueError, match=text):
        raise ValueError(difference.text)


def test_an_error_is_a_difference_and_has_no_bytes() -> None:
    read: Read = {"error": "KeyError: 'c/0'"}

    difference = compare(item([1], "<i4"), read, b"")

    assert nbytes(read) == 0
    assert difference is not None
    assert (difference.text, difference.error) == ("raised KeyError: 'c/0'", "KeyError: 'c/0'")


# -- the cases ------------------------------------------------------------------------------------


def test_there_is_every_dtype_in_every_situation_and_rank_and_each_case_has_a_name() -> None:
    every = all_cases()

    assert len({case.name for case in every}) == len(every)
    zarr = {(case.dtype, case.situation, len(case.shape)) for case in every if case.format == "zarr"}
    for dtype in cases.DTYPES:
        for situation in cases.SITUATIONS[:-1]:
            assert {(dtype, situation, rank) for rank in (1, 2, 3, 4)} <= zarr
        assert (dtype, cases.FILL, 2) in zarr
    assert {case.name for case in some_cases()} < {case.name for case in every}


def test_edges_shards_and_missing_blocks_are_what_the_situations_say() -> None:
    for one in all_cases():
        even = all(n % chunk == 0 for n, chunk in zip(one.shape, one.chunks, strict=True))
        several = one.situation in (cases.SHARDS, cases.SHARDS_PARTLY)
        written = one.item().written
        assert even == (one.situation not in (cases.EDGE, cases.SHARDS, cases.SHARDS_PARTLY)), one.name
        assert (one.shards is not None) == several, one.name
        assert written.all() == (one.situation in (cases.FULL, cases.EDGE, cases.SHARDS)), one.name
        assert written.any() == (one.situation != cases.EMPTY), one.name


@pytest.mark.parametrize(
    ("name", "shards"),
    [
        ("zarr-tiles-f8-2d-empty", []),
        ("zarr-tiles-f8-2d-partly-written", ["c/0/0"]),
        ("zarr-rows-f8-2d-several-shards-partly", ["c/1/0", "c/2/0"]),
        ("zarr-rows-f8-2d-several-shards", ["c/0/0", "c/1/0", "c/2/0"]),
    ],
)
def test_a_shard_has_a_file_if_something_of_it_is_written(tmp_path: Path, name: str, shards: list[str]) -> None:
    case(name).make(tmp_path / name, bs.create_array)

    array = tmp_path / name / "a"
    files = sorted(path.relative_to(array).as_posix() for path in array.rglob("*") if path.is_file())
    assert [file for file in files if file.startswith("c/")] == shards


def test_data_and_fill_values_have_what_is_lost_most_easily() -> None:
    floats = np.array([value for value in cases.fill_values(np.dtype("f8")) if not np.isnan(value)])
    data = case("zarr-rows-f8-2d-full").data()

    assert {0.0, np.inf, -np.inf, np.finfo("f8").max} <= set(floats.tolist())
    assert np.signbit(floats[floats == 0]).any()
    assert len(np.unique(data[np.isnan(data)].view("u8"))) >= 3
    assert {-(2**63), 2**63 - 1} <= set(case("zarr-rows-i8-2d-full").data().ravel().tolist())


def test_the_examples_of_the_cases_are_right() -> None:
    assert doctest.testmod(cases).failed == 0


# -- the page -------------------------------------------------------------------------------------


def recorded() -> Any:
    return json.loads(page.RESULTS.read_text(encoding="utf-8"))


def test_the_page_says_what_was_recorded() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.render(recorded())


def test_every_reader_was_recorded_in_the_versions_that_are_asked_for() -> None:
    versions = recorded()["versions"]
    asked = json.loads((environments.PROJECT / "compat" / "package.json").read_text(encoding="utf-8"))["dependencies"]

    assert list(versions) == [reader.name for reader in READERS]
    assert f"zarr=={versions['zarr-python (oldest)']['zarr']}" == environments.OLDEST
    assert {name: versions["zarrita.js"][name] for name in asked} == asked


def test_the_record_is_of_every_case_and_of_limits_that_are_known() -> None:
    cells = recorded()["cells"]
    keys = {matrix.EQUAL, *(limit.key for limit in LIMITS)}
    expected = [item for one in all_cases() for item in one.items()]

    for reader in READERS:
        counts = [counts for rows in cells[reader.name].values() for row in rows.values() for counts in row.values()]
        assert {key for count in counts for key in count} <= keys
        assert sum(sum(count.values()) for count in counts) == sum(item.npy == reader.npy for item in expected)


def test_what_is_written_is_read_again_as_the_same_page(tmp_path: Path, folder: Path) -> None:
    ran = run(folder, [case("npy-rows-f8-2d-full"), case("zarr-rows-f8-2d-partly-written")], [LOAD])

    page.write(ran, tmp_path / "page.md", tmp_path / "results.json")

    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page.render(results) == text
    assert "2 reads" in text
    assert "| `numpy.load` | 2 | 1 | 1 |" in text
    assert "1. **`.npy` cannot say that a block is missing**" in text
    assert "zarrita" not in text.partition("## Limits")[2].partition("## To make")[0]
