"""Checksums are the published ones, of every array and without a copy; what is missing or unknown is said clearly."""

import mmap
import sys
import threading
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import run_python

from blockstore import checksums
from blockstore.checksums import KINDS, ChecksumFunction, checksum_function

PACKAGES = {"crc32c": "crc32c", "xxh3": "xxhash"}
"""The optional package that computes each kind."""

INSTALLED = {
    name: pytest.mark.skipif(
        find_spec(PACKAGES.get(name, "zlib")) is None,
        reason=f"needs the package {PACKAGES.get(name)}: pip install 'ndblockstore[checksum]'",
    )
    for name in KINDS
}

each_kind = pytest.mark.parametrize("name", [pytest.param(name, marks=INSTALLED[name]) for name in KINDS])
each_crc = pytest.mark.parametrize("name", ["crc32", pytest.param("crc32c", marks=INSTALLED["crc32c"])])

POLYNOMIALS = {"crc32": 0xEDB88320, "crc32c": 0x82F63B78}
"""Each with its bits in reverse, as both sums go from the lowest bit of a byte to the highest."""


def array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def bit_by_bit(polynomial: int, data: bytes) -> int:
    """Compute a CRC as its definition says."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ polynomial * (value & 1)
    return value ^ 0xFFFFFFFF


def sanity_buffer(nbytes: int) -> bytes:
    """Return the bytes over which xxHash's own sanity check computes its sums."""
    data, generator = bytearray(), 2654435761
    for _ in range(nbytes):
        data.append(generator >> 56)
        generator = generator * 11400714785074694797 % (1 << 64)
    return bytes(data)


# -- which sums -----------------------------------------------------------------------------------


@each_crc
@given(data=st.binary(max_size=300))
def test_a_crc_is_what_its_polynomial_says(name: str, data: bytes) -> None:
    assert checksum_function(name)(array(data)) == bit_by_bit(POLYNOMIALS[name], data)


@each_crc
@given(data=st.binary(max_size=64), piece=st.integers(1, 20))
def test_a_crc_does_not_depend_on_the_pieces_it_is_computed_in(name: str, data: bytes, piece: int) -> None:
    checksum = checksum_function(name)
    at_once = checksum(array(data))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(checksums, "_PIECE", piece)
        assert checksum(array(data)) == at_once


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(b"", 0, id="nothing"),
        pytest.param(b"123456789", 0xCBF43926, id="check value of the catalogue"),
        pytest.param(b"The quick brown fox jumps over the lazy dog", 0x414FA339, id="fox"),
    ],
)
def test_crc32_of_a_published_vector(data: bytes, expected: int) -> None:
    assert checksum_function("crc32")(array(data)) == expected


@INSTALLED["crc32c"]
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(b"", 0, id="nothing"),
        pytest.param(b"123456789", 0xE3069283, id="check value of the catalogue"),
        pytest.param(bytes(32), 0x8A9136AA, id="RFC 3720: zeros"),
        pytest.param(b"\xff" * 32, 0x62A8AB43, id="RFC 3720: ones"),
        pytest.param(bytes(range(32)), 0x46DD794E, id="RFC 3720: ascending"),
        pytest.param(bytes(range(31, -1, -1)), 0x113FDB5C, id="RFC 3720: descending"),
    ],
)
def test_crc32c_of_a_published_vector(data: bytes, expected: int) -> None:
    assert checksum_function("crc32c")(array(data)) == expected


@INSTALLED["xxh3"]
@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        pytest.param(0, 0x2D06800538D394C2, id="nothing"),
        pytest.param(1, 0xC44BDFF4074EECDB, id="1 to 3 bytes"),
        pytest.param(6, 0x27B56A84CD2D7325, id="4 to 8"),
        pytest.param(12, 0xA713DAF0DFBB77E7, id="9 to 16"),
        pytest.param(24, 0xA3FE70BF9D3510EB, id="17 to 32"),
        pytest.param(80, 0xBCDEFBBB2C47C90A, id="33 to 128"),
        pytest.param(195, 0xCD94217EE362EC3A, id="129 to 240"),
        pytest.param(512, 0x617E49599013CB6B, id="one block"),
        pytest.param(2367, 0xCB37AEB9E5D361ED, id="three blocks, the last stripe overlapping"),
    ],
)
def test_xxh3_of_a_vector_of_its_reference_implementation(nbytes: int, expected: int) -> None:
    assert checksum_function("xxh3")(array(sanity_buffer(nbytes))) == expected


# -- of which arrays ------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("nbytes", [0, 1, 100_000])
@pytest.mark.parametrize("writable", [True, False], ids=["writable", "read-only"])
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "private"])
def test_equal_bytes_have_equal_sums_wherever_they_are(
    name: str, nbytes: int, writable: bool, mapped: bool, tmp_path: Path
) -> None:
    data = np.random.default_rng(1).bytes(nbytes)
    path = tmp_path / "data"
    path.write_bytes(b"?" + data + b"?")
    with path.open("r+b") as file:
        file_map = mmap.mmap(file.fileno(), 0)
    a = np.frombuffer(file_map if mapped else bytearray(path.read_bytes()), np.uint8)[1:-1]
    a.flags.writeable = writable

    assert checksum_function(name)(a) == checksum_function(name)(array(data))


@each_kind
def test_an_array_with_gaps_is_refused(name: str) -> None:
    checksum = checksum_function(name)

    with pytest.raises(ValueError, match="ndarray is not C-contiguous"):
        checksum(np.zeros(100, np.uint8)[::2])


@pytest.mark.slow
@each_kind
def test_bytes_beyond_4_gib_count(name: str) -> None:
    checksum = checksum_function(name)
    a = np.zeros((1 << 32) + 5, np.uint8)
    sums = [checksum(a)]
    for index in (0, -1):
        a[index] = 1
        sums.append(checksum(a))

    assert len(set(sums)) == 3


# -- at what cost ---------------------------------------------------------------------------------


def allocated(checksum: ChecksumFunction, a: NDArray[np.uint8]) -> int:
    """Return how many bytes of Python's and NumPy's memory a sum takes at its peak."""
    tracemalloc.start()
    try:
        checksum(a)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@each_kind
def test_nothing_is_copied(name: str) -> None:
    checksum = checksum_function(name)
    a = np.ones(1 << 20, np.uint8)

    assert allocated(checksum, a) < 10_000
    assert allocated(lambda a: checksum(array(a.tobytes())), a) >= a.nbytes  # so that a copy would be seen


def lets_others_run(checksum: ChecksumFunction, a: NDArray[np.uint8]) -> bool:
    """Return whether a thread that waits for nothing but the GIL gets it within some 100000 sums."""
    interval = sys.getswitchinterval()
    started, go, ran = threading.Event(), threading.Lock(), []

    def other() -> None:
        started.set()
        with go:
            ran.append(True)

    thread = threading.Thread(target=other)
    sys.setswitchinterval(1000)  # seconds: from here on the GIL goes to others only where it is given up
    try:
        with go:
            thread.start()
            started.wait()
        sums = 0
        while not ran and sums < 100_000:
            checksum(a)
            sums += 1
        return bool(ran)
    finally:
        sys.setswitchinterval(interval)
        thread.join()


@each_kind
@pytest.mark.skipif(not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="there is no GIL to give up")
def test_the_gil_is_given_up_for_large_arrays_only(name: str) -> None:
    checksum = checksum_function(name)

    assert lets_others_run(checksum, np.ones(1 << 20, np.uint8))
    assert not lets_others_run(checksum, np.ones(1 << 10, np.uint8))


# -- names, codes, and what may be missing --------------------------------------------------------


@pytest.mark.parametrize("name", ["md5", "CRC32", "", None, ["crc32"]])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^checksum is one of 'crc32', 'crc32c', 'xxh3', not "):
        checksum_function(name)


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_a_missing_package_is_an_error_that_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)

    message = rf"^checksum='{name}' needs the package '{package}': pip install 'ndblockstore\[checksum\]'$"
    with pytest.raises(ModuleNotFoundError, match=message) as caught:
        checksum_function(name)
    assert caught.value.name == package


def test_packages_are_imported_when_their_kind_is_asked_for_and_not_before() -> None:
    script = """
import sys
from blockstore.checksums import checksum_function
checksum_function("crc32")
print({"crc32c", "xxhash"} & set(sys.modules))
"""
    ran = run_python(script)

    assert (ran.stdout, ran.stderr) == ("set()\n", "")
