"""The sum is CRC-32C of RFC 3720, at every length, of every array that is contiguous."""

import tracemalloc
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import run_python

from blockstore.layouts.crc32c import crc32c


def naive(data: bytes) -> int:
    """The sum bit by bit, as the polynomial defines it."""
    state = 0xFFFFFFFF
    for octet in data:
        state ^= octet
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


@given(data=st.binary(max_size=1500))
def test_the_sum_is_that_of_the_polynomial(data: bytes) -> None:
    assert crc32c(data) == naive(data)


@given(
    nbytes=st.integers(0, 5) | st.sampled_from([16384, 32768, 49152, 65536]),
    more=st.integers(-6, 6),
    seed=st.integers(0, 1 << 32),
    cut=st.integers(0, 100_000),
)
def test_the_sum_of_a_whole_is_that_of_its_parts_in_turn(nbytes: int, more: int, seed: int, cut: int) -> None:
    # The sum of bytes and, behind them, their own sum is one constant: this needs no other implementation.
    data = np.random.default_rng(seed).bytes(max(nbytes + more, 0))

    assert crc32c(data + crc32c(data).to_bytes(4, "little")) == 0x48674BC7
    assert crc32c(data[:cut] + data[cut:]) == crc32c(data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(b"", 0, id="nothing"),
        pytest.param(b"123456789", 0xE3069283, id="the check value"),
        pytest.param(bytes(32), 0x8A9136AA, id="RFC 3720: zeros"),
        pytest.param(b"\xff" * 32, 0x62A8AB43, id="RFC 3720: ones"),
        pytest.param(bytes(range(32)), 0x46DD794E, id="RFC 3720: ascending"),
        pytest.param(bytes(range(31, -1, -1)), 0x113FDB5C, id="RFC 3720: descending"),
    ],
)
def test_published_sums_come_out(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


def test_every_length_up_to_1100_and_around_each_power_of_two_agrees_with_the_polynomial() -> None:
    data = np.random.default_rng(1).bytes(1100)
    state, expected = 0xFFFFFFFF, [0]
    for octet in data:
        state ^= octet
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
        expected.append(state ^ 0xFFFFFFFF)

    assert [crc32c(data[:n]) for n in range(1101)] == expected


@pytest.mark.skipif(
    find_spec("crc32c") is None, reason="needs the package crc32c: pip install 'ndblockstore[checksum]'"
)
def test_long_data_agrees_with_the_package() -> None:
    from crc32c import crc32c as package

    rng = np.random.default_rng(2)
    edges = [(1 << k) + d for k in range(8, 21) for d in range(-5, 6)]
    for nbytes in [*edges, *rng.integers(0, 1 << 20, 50).tolist(), (1 << 24) + 3]:
        data = rng.bytes(nbytes)

        assert crc32c(data) == package(data), nbytes


@pytest.mark.parametrize("dtype", ["u1", "<f8", ">f8", "<U3", "M8[s]", "?"])
def test_an_array_is_the_bytes_it_lies_in(dtype: str) -> None:
    a = np.arange(1200).astype("i8").view("u1").reshape(-1)[: 960 * 4].view("u1")
    a = (a & 1).view(dtype).reshape(2, -1)

    assert crc32c(a) == crc32c(a.tobytes()) == crc32c(memoryview(a.tobytes())) == crc32c(a.view("u1"))


def test_bytes_at_odd_addresses_and_of_read_only_arrays_count_the_same() -> None:
    data = np.random.default_rng(3).bytes(100_000)

    for offset in range(5):
        shifted = np.frombuffer(b"x" * offset + data, np.uint8)[offset:]
        assert crc32c(shifted) == crc32c(data)


@pytest.mark.parametrize("empty", [np.empty((0, 3)), np.empty((3, 0), "u1"), memoryview(b"")], ids=repr)
def test_nothing_has_the_sum_0(empty: "np.ndarray[tuple[int, ...], np.dtype[np.float64]] | memoryview") -> None:
    assert crc32c(empty) == 0


@pytest.mark.parametrize(
    "data",
    [np.arange(10)[::2], np.zeros((3, 3)).T[:2], memoryview(b"abcd")[::2]],
    ids=["step", "columns", "memoryview"],
)
def test_what_is_not_contiguous_is_refused(
    data: "np.ndarray[tuple[int, ...], np.dtype[np.int64]] | memoryview",
) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        crc32c(data)


def test_long_data_is_not_copied() -> None:
    a = np.ones(1 << 23, np.uint8)
    crc32c(a)
    tracemalloc.start()
    try:
        crc32c(a)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 1 << 20


def test_no_table_is_built_on_import() -> None:
    script = """
import blockstore.layouts.crc32c as module
print(*(table.cache_info().currsize for table in (module._byte_table, module._table, module._row_tables)))
"""

    assert run_python(script).stdout.split() == ["0", "0", "0"]
