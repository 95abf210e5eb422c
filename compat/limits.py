"""Limits: what a reader is known not to do, and where that is written.

A limit says for which items it holds, and what then comes out. An item that it holds for must come out so: one that
turns out to be equal is a finding as much as a difference that no limit explains. Versions are those that were read
with, so that a limit which a release of the reader lifts does not hide what that release does.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compat.cases import Item
from compat.differences import Difference
from compat.readers import Reader

Versions = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Limit:
    """One thing that a reader does not do."""

    key: str
    holds: Callable[[Reader, Versions, Item], bool]
    shows: Callable[[Item, Difference], bool]
    """Whether a difference is the one that is described."""
    sentence: str
    """What happens, why, and where that is written, in Markdown."""
    sure: bool = True
    """Whether what it holds for cannot be equal. False where that is up to more than the versions that are known."""


# -- what is said of readers and items ------------------------------------------------------------


def _release(versions: Versions, package: str) -> tuple[int, ...]:
    """Return a version as numbers; () of a package that the reader does not use."""
    return tuple(int(n) for n in re.findall(r"\d+", versions.get(package, ""))[:3])


def _older(versions: Versions, package: str, release: tuple[int, ...]) -> bool:
    return () < _release(versions, package) < release


def _kind(item: Item) -> str:
    return item.expected.dtype.kind


def _parts(item: Item) -> NDArray[Any]:
    """Return the fill value, or real and imaginary part of it, as an array of one or two floats or others."""
    fill = np.array([item.case.fill_value])
    return fill.view(f"f{fill.itemsize // 2}") if fill.dtype.kind == "c" else fill


def _bits(a: NDArray[Any]) -> NDArray[Any]:
    return a.view(f"u{a.dtype.itemsize}")


def _odd_nans(item: Item) -> list[int]:
    """Return the bits of those parts of the fill value that are a NaN, and not the one that Zarr calls NaN."""
    if _kind(item) not in "fc":
        return []
    parts = _parts(item)
    plain = _bits(np.array([np.nan], parts.dtype))[0]
    return [int(bits) for part, bits in zip(parts, _bits(parts), strict=True) if np.isnan(part) and bits != plain]


def _quiet_bit(item: Item) -> int:
    return {2: 0x0200, 4: 0x00400000, 8: 0x0008000000000000}[_parts(item).dtype.itemsize]


def _partly(item: Item) -> bool:
    return not bool(item.written.all())


# -- what is said of differences ------------------------------------------------------------------


def _raises(*texts: str) -> Callable[[Item, Difference], bool]:
    return lambda item, difference: any(text in difference.error for text in texts)


def _unwritten_are(item: Item, difference: Difference, value: Any) -> bool:
    """Return whether just the elements that are not written differ, and all of them are this."""
    if difference.wrong is None or difference.got is None or not np.array_equal(difference.wrong, ~item.written):
        return False
    got = difference.got[difference.wrong]
    return got.tobytes() == np.full(got.shape, value, item.expected.dtype).tobytes()


def _unwritten_are_another_nan(item: Item, difference: Difference) -> bool:
    """Return whether just elements that are not written differ, and only in which NaN they are."""
    if difference.wrong is None or difference.got is None or not np.array_equal(difference.wrong, ~item.written):
        return False
    part = f"{item.expected.dtype.byteorder}f{_parts(item).dtype.itemsize}"
    got = np.ascontiguousarray(difference.got[difference.wrong]).view(part)
    expected = np.ascontiguousarray(item.expected[difference.wrong]).view(part)
    return bool(((got == expected) | (np.isnan(got) & np.isnan(expected))).all())


def _unwritten_are_the_hex_number(item: Item, difference: Difference) -> bool:
    return _unwritten_are(item, difference, item.expected.dtype.type(float(_odd_nans(item)[0])))


def _through_float(item: Item) -> int:
    """Return an integer fill value as JavaScript has it: rounded to a float, and cut to 64 bits."""
    bits = item.expected.dtype.itemsize * 8
    number = int(float(item.case.fill_value.item())) % (1 << bits)
    return number - (1 << bits) if _kind(item) == "i" and number >> (bits - 1) else number


def _unwritten_are_rounded(item: Item, difference: Difference) -> bool:
    return _unwritten_are(item, difference, _through_float(item))


def _in_cut_shards(item: Item) -> NDArray[np.bool_]:
    """Return which elements lie in a shard that reaches beyond the array, of which a part is read."""
    case = item.case
    cut = np.zeros(case.shape, np.bool_)
    for axis, (n, grid, chunk) in enumerate(zip(case.shape, case.grid, case.chunks, strict=True)):
        shard = case.shards[axis] if case.shards else grid * chunk
        edge = n - n % shard
        cut[(slice(None),) * axis + (slice(edge, None),)] = True
    return cut


def _cut_shards_are_swapped(item: Item, difference: Difference) -> bool:
    if difference.wrong is None or difference.got is None:
        return False
    where = item.written & _in_cut_shards(item)
    part = f">f{_parts(item).dtype.itemsize}"
    swapped = np.ascontiguousarray(item.expected).view(part).reshape(*item.expected.shape, 2)[..., ::-1].copy()
    expected = item.expected.copy()
    expected[where] = swapped.view(expected.dtype)[..., 0][where]
    return expected.tobytes() == difference.got.tobytes()


# -- the limits -----------------------------------------------------------------------------------

LIMITS: tuple[Limit, ...] = (
    Limit(
        "npy-incomplete",
        lambda reader, versions, item: reader.npy and item.case.format == "zarr" and _partly(item),
        _raises("This file contains pickled (object) data", "the magic string is not correct"),
        "**`.npy` cannot say that a block is missing**, nor what is to be read there: the format says shape, dtype and "
        "order, and nothing else (docstring of `numpy.lib.format`). So a shard file has no header while a block of it "
        "is missing, and NumPy refuses it with a `ValueError`. With the last block it becomes an `.npy`.",
    ),
    Limit(
        "zarr-old-nan",
        lambda reader, versions, item: not reader.npy and _older(versions, "zarr", (3, 1)) and bool(_odd_nans(item)),
        _raises("is not valid for dtype", "TypeError: complex()"),
        "**zarr-python before 3.1 refuses fill values that are a NaN with a payload**, with a `ValueError` or "
        "`TypeError` on opening. `zarr.json` says them in hex, as Zarr requires; `parse_fill_value` in its "
        "`zarr/core/metadata/v3.py` hands that text to NumPy. Since 3.1 it is parsed "
        "([zarr-python#2874](https://github.com/zarr-developers/zarr-python/pull/2874)).",
    ),
    Limit(
        "zarrs-nan",
        lambda reader, versions, item: "zarrs" in versions and bool(_odd_nans(item)) and _partly(item),
        _unwritten_are_another_nan,
        "**zarrs in Python has one NaN for fill values.** One with a payload reads as the plain NaN where nothing is "
        "written. zarrs is given the metadata as zarr-python writes it, not as the file has it, and `float_to_json_v3` "
        "of `zarr/core/dtype/npy/common.py` says so in a comment: *numpy does not represent these explicitly*.",
    ),
    Limit(
        "zarr-nan",
        lambda reader, versions, item: (
            not reader.npy
            and _release(versions, "zarr") >= (3, 1)
            and "zarrs" not in versions
            and _partly(item)
            and any(
                _parts(item).itemsize == 2 or (_parts(item).itemsize == 4 and not bits & _quiet_bit(item))
                for bits in _odd_nans(item)
            )
        ),
        _unwritten_are_another_nan,
        "**zarr-python, and xarray and dask on it, lose the payload of a float16 NaN, and the signal of a signalling "
        "float32 NaN, in fill values**: another NaN is read where nothing is written. `float_from_json_v3` in "
        "`zarr/core/dtype/npy/common.py` makes a Python float of it with `struct.unpack`, which quiets it and, before "
        "Python 3.14, drops that payload ([cpython#130317](https://github.com/python/cpython/issues/130317)).",
        sure=False,
    ),
    Limit(
        "zarrs-complex",
        lambda reader, versions, item: (
            "zarrs" in versions
            and _release(versions, "zarrs") <= (0, 2, 3)
            and item.expected.dtype.str[:2] == ">c"
            and bool((item.written & _in_cut_shards(item)).any())
        ),
        _cut_shards_are_swapped,
        "**zarrs 0.2.3 exchanges real and imaginary part of big-endian complex numbers where it reads a part of a "
        "shard**, silently: of a shard that the array's edge cuts, and in any slice. Whole shards are equal. The Rust "
        "crate in it, zarrs 0.23.8, turns the bytes of the whole number (`reverse_endianness` in its partial decoder "
        "of the codec `bytes`); 0.23.12 does not ([zarrs#380](https://github.com/zarrs/zarrs/pull/380)). "
        "**Take little-endian complex dtypes.**",
    ),
    Limit(
        "zarrita-complex",
        lambda reader, versions, item: "zarrita" in versions and _kind(item) == "c",
        _raises("Unknown or unsupported dataType: complex"),
        "**zarrita.js has no complex numbers**: `Unknown or unsupported dataType` on opening. `getCtr` in its "
        "`util.js` lists the typed arrays that JavaScript has, and it has none of them.",
    ),
    Limit(
        "zarrita-float16",
        lambda reader, versions, item: (
            "zarrita" in versions and _older(versions, "node", (24,)) and item.expected.dtype.name == "float16"
        ),
        _raises("Unknown or unsupported dataType: float16"),
        "**zarrita.js has float16 only where JavaScript has `Float16Array`**, which Node.js has since version 24; "
        "before, `Unknown or unsupported dataType` on opening "
        "([zarrita.js#250](https://github.com/manzt/zarrita.js/pull/250)).",
    ),
    Limit(
        "zarrita-nan",
        lambda reader, versions, item: (
            "zarrita" in versions and _kind(item) == "f" and bool(_odd_nans(item)) and _partly(item)
        ),
        _unwritten_are_the_hex_number,
        "**zarrita.js takes a fill value in hex for a number**: where nothing is written, a NaN with the bits "
        "`0xffc00005` reads as 4290772992, silently. `ensureCorrectScalar` in its `util.js` knows `NaN`, `Infinity` "
        "and `-Infinity` only, and JavaScript converts any other text.",
    ),
    Limit(
        "zarrita-int64",
        lambda reader, versions, item: (
            "zarrita" in versions
            and item.expected.dtype.name in ("int64", "uint64")
            and _through_float(item) != item.case.fill_value.item()
            and _partly(item)
        ),
        _unwritten_are_rounded,
        "**zarrita.js rounds fill values of int64 and uint64 beyond 2^53** to a float, silently: `JSON.parse` knows no "
        "other number, and `ensureCorrectScalar` in its `util.js` makes a `BigInt` of that. What is written is equal.",
    ),
)
