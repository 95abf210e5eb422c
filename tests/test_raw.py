"""Raw access is bytes at offsets, like a `bytearray` that is the file, and its bounds are checked all the same."""

import ctypes
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support import contents, in_threads

import blockstore as bs
from blockstore import BlockStore, _os

NBYTES = 20_001

untimed = settings(deadline=None)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    with bs.create(tmp_path / "data.bin", NBYTES) as store:
        yield store


# -- against a bytearray --------------------------------------------------------------------------

offsets = st.integers(0, NBYTES) | st.integers(NBYTES - 10, NBYTES + 10) | st.sampled_from([-1, 2**62, 2**64, -(2**64)])
counts = st.integers(0, 9000) | st.integers(-3, NBYTES + 3) | st.sampled_from([2**62, 2**64, -(2**64)])


class RawMachine(RuleBasedStateMachine):
    """The model is a bytearray of the size of the file."""

    @initialize(
        access=st.sampled_from([None, "dense", "sparse"]),
        guard=st.sampled_from(["flag", "seal"]),
    )
    def begin(self, **options: Any) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.store = bs.create(Path(self.folder.name, "data.bin"), NBYTES, **options)
        self.model = bytearray(NBYTES)

    def inside(self, offset: int, nbytes: int) -> bool:
        return min(offset, nbytes) >= 0 and offset + nbytes <= NBYTES

    def refused(self, call: Callable[[], object], offset: int, nbytes: int) -> None:
        with pytest.raises(bs.LayoutError, match=rf"bytes \[{offset}, {offset + nbytes}\) are not all in the file"):
            call()

    @rule(offset=offsets, data=st.binary(max_size=9000) | st.binary(max_size=10))
    def write_at(self, offset: int, data: bytes) -> None:
        if not self.inside(offset, len(data)):
            self.refused(lambda: self.store.raw.write_at(offset, data), offset, len(data))
            return
        assert self.store.raw.write_at(offset, data) == len(data)
        self.model[offset : offset + len(data)] = data

    @rule(offset=offsets, nbytes=counts)
    def read_at(self, offset: int, nbytes: int) -> None:
        if not self.inside(offset, nbytes):
            self.refused(lambda: self.store.raw.read_at(offset, nbytes), offset, nbytes)
            return
        assert self.store.raw.read_at(offset, nbytes) == self.model[offset : offset + nbytes]

    @rule(offset=offsets, nbytes=counts, value=st.integers(0, 255))
    def fill(self, offset: int, nbytes: int, value: int) -> None:
        if not self.inside(offset, nbytes):
            self.refused(lambda: self.store.raw.fill(offset, nbytes, value), offset, nbytes)
            return
        self.store.raw.fill(offset, nbytes, value)
        self.model[offset : offset + nbytes] = bytes([value]) * nbytes

    @rule(offset=offsets, nbytes=counts)
    def zero(self, offset: int, nbytes: int) -> None:
        if not self.inside(offset, nbytes):
            self.refused(lambda: self.store.raw.zero(offset, nbytes), offset, nbytes)
            return
        self.store.raw.zero(offset, nbytes)
        self.model[offset : offset + nbytes] = bytes(nbytes)

    @rule(offset=offsets, nbytes=counts)
    def flush_range(self, offset: int, nbytes: int) -> None:
        if not self.inside(offset, nbytes):
            self.refused(lambda: self.store.raw.flush_range(offset, nbytes), offset, nbytes)
            return
        self.store.raw.flush_range(offset, nbytes)

    @rule(offset=offsets, count=st.integers(0, 300), value=st.integers(0, 2**32 - 1))
    def change_an_array(self, offset: int, count: int, value: int) -> None:
        if not self.inside(offset, 4 * count):
            self.refused(lambda: self.store.raw.array(offset, count, "<u4"), offset, 4 * count)
            return
        a = self.store.raw.array(offset, count, "<u4")
        assert a.tobytes() == self.model[offset : offset + 4 * count]
        a[:] = value
        self.model[offset : offset + 4 * count] = struct.pack("<I", value) * count

    @invariant()
    def the_file_is_like_its_model(self) -> None:
        if hasattr(self, "store"):
            assert contents(self.store) == self.model

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()


RawMachine.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestRaw = RawMachine.TestCase


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockStore]:
    """A store for every example of a property."""
    with bs.create(tmp_path_factory.mktemp("arena") / "data.bin", NBYTES) as store:
        yield store


@untimed
@given(
    a=npst.arrays(npst.scalar_dtypes(), npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6)),
    offset=st.integers(0, 1000),
    transpose=st.booleans(),
)
def test_an_array_is_written_in_c_order_at_any_offset(
    arena: BlockStore, a: np.ndarray[Any, Any], offset: int, transpose: bool
) -> None:
    data = a.T if transpose else a

    assert arena.raw.write_at(offset, data) == data.nbytes

    assert arena.raw.read_at(offset, data.nbytes) == data.tobytes()
    b = arena.raw.array(offset, data.shape, data.dtype)
    assert (b.shape, b.dtype, b.tobytes()) == (data.shape, data.dtype, data.tobytes())


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(b"hello", b"hello", id="bytes"),
        pytest.param(bytearray(b"hello"), b"hello", id="bytearray"),
        pytest.param(memoryview(b"hello"), b"hello", id="memoryview"),
        pytest.param(memoryview(np.arange(3, dtype="<u2")), b"\0\0\1\0\2\0", id="memoryview of items"),
        pytest.param((ctypes.c_char * 5)(*b"hello"), b"hello", id="ctypes array"),
        pytest.param(np.uint8(7), b"\7", id="numpy scalar"),
        pytest.param(b"", b"", id="nothing"),
        pytest.param(np.zeros((0, 3)), b"", id="empty array"),
    ],
)
def test_whatever_has_bytes_is_written(store: BlockStore, data: Any, expected: bytes) -> None:
    assert store.raw.write_at(10, data) == len(expected)

    assert contents(store) == bytes(10) + expected + bytes(NBYTES - 10 - len(expected))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda raw: raw.write_at(NBYTES - 4, b"hello"), "19997, 20002", id="write_at past the end"),
        pytest.param(lambda raw: raw.write_at(-1, b"hello"), "-1, 4", id="write_at before the start"),
        pytest.param(lambda raw: raw.write_at(NBYTES + 1, b""), "20002, 20002", id="nothing past the end"),
        pytest.param(lambda raw: raw.read_at(0, NBYTES + 1), "0, 20002", id="read_at past the end"),
        pytest.param(lambda raw: raw.read_at(5, -1), "5, 4", id="read_at backwards"),
        pytest.param(lambda raw: raw.fill(0, 2**64, 0), f"0, {2**64}", id="fill of an absurd size"),
        pytest.param(lambda raw: raw.zero(2**64, 1), f"{2**64}, {2**64 + 1}", id="zero at an absurd offset"),
        pytest.param(lambda raw: raw.flush_range(NBYTES, 1), "20001, 20002", id="flush_range past the end"),
        pytest.param(lambda raw: raw.array(2, 2500, "f8"), "2, 20002", id="array past the end"),
        pytest.param(lambda raw: raw.address(NBYTES + 1), "20002, 20002", id="address past the end"),
        pytest.param(lambda raw: raw.address(-1), "-1, -1", id="address before the start"),
    ],
)
def test_bytes_outside_the_file_are_refused_and_nothing_is_written(
    store: BlockStore, call: Callable[[Any], object], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"bytes \[{message}\) are not all in the file, which has 20001") as refusal:
        call(store.raw)

    assert isinstance(refusal.value, bs.LayoutError)
    assert contents(store) == bytes(NBYTES)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(lambda raw: raw.fill(0, 1, 256), bs.LayoutError, "a byte is 0 to 255, not 256", id="value of 256"),
        pytest.param(lambda raw: raw.fill(0, 1, -1), bs.LayoutError, "a byte is 0 to 255, not -1", id="value of -1"),
        pytest.param(lambda raw: raw.fill(0, 1, 0.5), TypeError, "integer", id="value of 0.5"),
        pytest.param(lambda raw: raw.write_at(0, [1, 2]), TypeError, "bytes-like object is required", id="list"),
        pytest.param(lambda raw: raw.write_at(0, "hello"), TypeError, "bytes-like object is required", id="string"),
        pytest.param(lambda raw: raw.write_at(0, np.array([None])), ValueError, "holds Python objects", id="objects"),
        pytest.param(lambda raw: raw.write_at(0.0, b"x"), TypeError, "integer", id="offset of 0.0"),
        pytest.param(lambda raw: raw.read_at(0, 1.0), TypeError, "integer", id="count of 1.0"),
        pytest.param(lambda raw: raw.array(0, -1), bs.LayoutError, "has a negative axis", id="negative shape"),
        pytest.param(lambda raw: raw.array(0, 1, "O"), bs.DtypeError, "holds Python objects", id="array of objects"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(
    store: BlockStore, call: Callable[[Any], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(store.raw)

    assert contents(store) == bytes(NBYTES)


def test_the_last_byte_of_the_file_is_inside(store: BlockStore) -> None:
    store.raw.array(1, 2500, "<u8")[-1] = 2**64 - 1
    store.raw.fill(NBYTES - 9, 1, 7)
    store.raw.zero(NBYTES, 0)
    store.raw.write_at(NBYTES - 1, b"x")

    assert store.raw.read_at(NBYTES - 9, 9) == b"\7" + b"\xff" * 7 + b"x"


def test_an_array_shows_the_file_and_writes_to_it(store: BlockStore) -> None:
    a = store.raw.array(1, (2, 3), "<i4")
    store.raw.write_at(1, np.arange(6, dtype="<i4"))
    assert a.tolist() == [[0, 1, 2], [3, 4, 5]]

    a[1, 2] = -1

    assert contents(store)[21:25] == b"\xff" * 4


def test_an_array_outlives_the_store(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", NBYTES) as store:
        a = store.raw.array(0, 5)
        a[:] = list(b"hello")

    a[0] = ord("H")

    assert a.tobytes() == b"Hello"
    assert (tmp_path / "data.bin").read_bytes()[:5] == b"Hello"


def test_an_address_is_that_of_the_byte(store: BlockStore) -> None:
    store.raw.write_at(100, b"hello")

    assert ctypes.string_at(store.raw.address(100), 5) == b"hello"
    assert store.raw.address(NBYTES) - store.raw.address() == NBYTES


def test_a_file_that_is_open_to_read_has_arrays_that_nothing_makes_writable(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"hello")
    with bs.open(tmp_path / "data.bin", mode="r") as store:
        a = store.raw.array(0, 5)

        with pytest.raises(ValueError, match="WRITEABLE"):
            a.setflags(write=True)
        assert (a.tobytes(), store.raw.read_at(1, 3)) == (b"hello", b"ell")


def test_flushing_a_part_is_a_sync_of_everything(store: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs: list[object] = []
    sync = _os.sync
    monkeypatch.setattr(_os, "sync", lambda *args: syncs.append(sync(*args)))
    store.raw.write_at(0, b"hello")

    store.raw.flush_range(0, 5)

    assert len(syncs) == 1


def test_nothing_that_raw_access_does_leaves_a_receipt(store: BlockStore) -> None:
    store.raw.write_at(0, b"hello")
    store.raw.flush_range(0, 5)

    assert (len(store.receipts()), store.free, store.flush()) == (0, NBYTES, 0)


def test_zeroing_keeps_the_space(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 1 << 20) as store:
        store.raw.zero(0, 1 << 20)
        store.sync()

        assert os.stat(store.path).st_blocks * 512 >= 1 << 20


def test_threads_that_keep_to_their_own_bytes_do_not_disturb_each_other(store: BlockStore) -> None:
    def work(thread: int) -> None:
        for _ in range(50):
            store.raw.write_at(thread, bytes([thread + 1]))
            for offset in range(8 + thread, NBYTES - 8, 800):
                store.raw.fill(offset, 1, thread + 1)

    in_threads(8, work)

    data = contents(store)
    assert data[:8] == bytes(range(1, 9))
    assert all(data[offset : offset + 8] == bytes(range(1, 9)) for offset in range(8, NBYTES - 16, 800))


def test_raw_access_says_whose_it_is(store: BlockStore) -> None:
    assert repr(store.raw) == f"<RawStore of {store!r}>"
