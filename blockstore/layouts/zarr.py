"""The texts of Zarr version 3: an array's ``zarr.json``, its fill value, and the index of a shard.

Chunks are uncompressed: codec ``bytes``, alone or within ``sharding_indexed``. What is read comes from anywhere, and
ends in `FormatError` where it is damaged or says what is not supported. This module opens no file; offsets are bytes
from a file's start, shapes are numbers of elements. The format is that of https://zarr-specs.readthedocs.io/en/latest/v3/.

Examples
--------
>>> grid = Grid((1000, 300), np.dtype("<f4"), chunks=(100, 300), shards=(1000, 300))
>>> metadata = decode_metadata(encode_metadata(Metadata(grid, np.float32("nan"), index=ShardIndex())), "zarr.json")
>>> metadata.fill_value, metadata.grid == grid, metadata.key((0, 0)), metadata.index.nbytes(10)
(np.float32(nan), True, 'c/0/0', 164)
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any, Literal, NoReturn, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from blockstore.errors import DtypeError, FormatError
from blockstore.layouts.crc32c import crc32c
from blockstore.layouts.grid import Grid, Index, ShardLayout

MAX_METADATA_NBYTES = 1 << 24
"""Bytes of the longest ``zarr.json`` that is read: parsed, it may take 20 times as much memory."""

SUPPORTED: dict[str, np.dtype[Any]] = {
    name: np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
}
"""The dtypes that NumPy and the core of Zarr both have, by the name that both give them."""

_MAX_NDIM = 64
_MAX_NBYTES = 1 << 62
_MAX_DEPTH = 100
_EMPTY = (1 << 64) - 1
_MAX_INT_BITS = 8192

_KEYS = {
    *("zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs"),
    *("attributes", "dimension_names", "storage_transformers"),
}


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """How the index of a shard is written, and where in the file."""

    location: Literal["start", "end"] = "end"
    checksum: bool = True
    """Whether the CRC-32C of the entries follows them."""
    little: bool = True
    """Whether the numbers of the entries are little-endian; a checksum always is."""

    def nbytes(self, count: int) -> int:
        """Return the bytes of the index of a shard of `count` blocks, those beyond the array's edge included."""
        return 16 * count + 4 * self.checksum


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a ``zarr.json`` says of its array."""

    grid: Grid
    """Of an array without shards, these are the chunks."""
    fill_value: np.generic
    attributes: dict[str, Any] = field(default_factory=dict)
    dimension_names: tuple[str | None, ...] | None = None
    index: ShardIndex | None = None
    """None if each chunk is a file, of the bytes of its elements."""
    encoding: Literal["default", "v2"] = "default"
    separator: Literal["/", "."] = "/"

    def key(self, shard: Index) -> str:
        """Return the path of a shard's file from the array's folder on, such as ``"c/0/1"``; "/" is between folders."""
        numbers = map(str, shard)
        return self.separator.join(numbers if self.encoding == "v2" else ("c", *numbers))


def check_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Return `dtype` as a `numpy.dtype` that NumPy and Zarr both have; its byte order stays.

    Raises
    ------
    DtypeError
        If it is none of `SUPPORTED`.

    Examples
    --------
    >>> check_dtype(">f4"), check_dtype(bool)
    (dtype('>f4'), dtype('bool'))
    """
    try:
        checked = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError) as error:
        raise DtypeError(f"not a dtype: {dtype!r} ({error})") from None
    if checked.name not in SUPPORTED:
        raise DtypeError(f"dtype {checked} is not one of both NumPy and Zarr: supported are {', '.join(SUPPORTED)}")
    return np.dtype(checked.str)


def check_fill_value(value: object, dtype: np.dtype[Any]) -> np.generic:
    """Return a number as a scalar of a supported dtype.

    Parameters
    ----------
    value : int, float, complex, bool, numpy.generic or numpy.ndarray of shape ()
        A number the dtype has. One of float or complex is rounded; NaN, infinities and -0.0 stay what they are, and a
        scalar of the dtype itself keeps each bit.
    dtype : numpy.dtype
        One that `check_dtype` returned.

    Returns
    -------
    numpy.generic
        Of the dtype in native byte order.

    Raises
    ------
    TypeError
        If `value` is no number, or complex and the dtype is not.
    ValueError
        If the dtype does not have it.

    Examples
    --------
    >>> check_fill_value(1, np.dtype(">f4")), check_fill_value(0, np.dtype(bool))
    (np.float32(1.0), np.False_)
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if type(value) is dtype.type:
        return cast(np.generic, value)
    if not isinstance(value, bool | int | float | complex | np.bool | np.number):
        raise TypeError(f"fill_value {short(value)} is no number")
    if isinstance(value, complex | np.complexfloating) and dtype.kind != "c":
        raise TypeError(f"fill_value {value} is complex, but dtype {dtype.name} is not")
    if dtype.kind in "biu":
        return _integer(value, dtype)
    try:
        with np.errstate(all="ignore"):
            scalar: np.generic = dtype.type(value)
        pairs = zip(_parts(value), _parts(scalar), strict=False)
        overflow = any(math.isinf(part) and part != given for given, part in pairs)
    except OverflowError:
        overflow = True
    if overflow:
        raise ValueError(f"fill_value {short(value)} is out of the range of {dtype.name}")
    return scalar


def _parts(value: Any) -> tuple[Any, float]:
    """Return real and imaginary part, of a scalar of NumPy as floats, which compare with each number exactly."""
    if isinstance(value, int):
        return value, 0.0
    return (float(value.real), float(value.imag)) if isinstance(value, complex | np.inexact) else (value, 0.0)


def _integer(value: Any, dtype: np.dtype[Any]) -> np.generic:
    try:
        number = int(value)
    except (OverflowError, ValueError):
        number = None
    if number is None or number != value:
        raise ValueError(f"fill_value {value} is no integer, dtype {dtype.name} has nothing else")
    low, high = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    if not low <= number <= high:
        raise ValueError(f"fill_value {short(number)} is out of the range of {dtype.name}, {low} to {high}")
    scalar: np.generic = dtype.type(number)
    return scalar


def encode_fill_value(scalar: np.generic) -> Any:
    """Return what ``zarr.json`` says of a fill value; `decode_fill_value` returns it to the bit.

    Examples
    --------
    >>> [encode_fill_value(a) for a in (np.uint8(3), np.float32("inf"), np.complex64(-0.0))]
    [3, 'Infinity', [-0.0, 0.0]]
    """
    if isinstance(scalar, np.bool | np.integer):
        return scalar.item()
    width = scalar.dtype.itemsize // 2 if scalar.dtype.kind == "c" else scalar.dtype.itemsize
    parts = [_encode_float(bits) for bits in np.frombuffer(scalar.tobytes(), f"u{width}")]
    return parts if scalar.dtype.kind == "c" else parts[0]


def _encode_float(bits: np.unsignedinteger[Any]) -> float | str:
    width = bits.dtype.itemsize
    number = float(bits.view(f"f{width}"))
    if not math.isnan(number):
        return number if math.isfinite(number) else "Infinity" if number > 0 else "-Infinity"
    return "NaN" if bits == _nan_bits(width) else f"0x{int(bits):0{2 * width}x}"


def _nan_bits(width: int) -> int:
    """Return the one NaN that is called so: positive, the highest bit of the mantissa alone is set."""
    return {2: 0x7E00, 4: 0x7FC00000, 8: 0x7FF8000000000000}[width]


def decode_fill_value(value: Any, dtype: np.dtype[Any], path: str) -> np.generic:
    """Return the fill value that a ``zarr.json`` says.

    Parameters
    ----------
    value : object
        What the JSON parser made of it.
    dtype : numpy.dtype
        One of `SUPPORTED`, in any byte order.
    path : str
        For messages.

    Returns
    -------
    numpy.generic
        Of the dtype in native byte order.

    Raises
    ------
    FormatError
        If it is not of the dtype, or out of its range.

    Examples
    --------
    >>> decode_fill_value("0x7fc00001", np.dtype("f4"), "zarr.json").view("u4") == 0x7FC00001
    np.True_
    """
    where = f"fill_value {short(value)} is none of {dtype.name}"
    if dtype.kind == "b":
        if not isinstance(value, bool):
            _damaged(path, where)
        return np.bool(value)
    if dtype.kind in "iu":
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        info = np.iinfo(dtype)
        if not _is_int(value) or not info.min <= value <= info.max:
            _damaged(path, where)
        scalar: np.generic = dtype.type(value)
        return scalar
    parts = value if dtype.kind == "c" else [value]
    width = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    if not isinstance(parts, list) or len(parts) * width != dtype.itemsize:
        _damaged(path, where)
    bits = [_float_bits(part, width) for part in parts]
    if None in bits:
        _damaged(path, where)
    scalar = np.array(bits, f"u{width}").view(dtype.newbyteorder("="))[0]
    return scalar


def _float_bits(value: Any, width: int) -> int | None:
    """Return the bits of a float of `width` bytes as an integer; None if it is no such float."""
    if isinstance(value, str):
        digits = value.removeprefix("0x")
        if value != digits and len(digits) == 2 * width and set(digits) <= set("0123456789abcdefABCDEF"):
            return int(digits, 16)
        if value == "NaN":
            return _nan_bits(width)
        if value not in ("Infinity", "-Infinity"):
            return None
        number = float(value)
    elif isinstance(value, float) or _is_int(value):
        try:
            number = float(value)
        except OverflowError:
            return None
    else:
        return None
    with np.errstate(over="ignore"):
        rounded = np.array(number).astype(f"f{width}")
    if np.isinf(rounded) and not isinstance(value, str):
        return None
    return int(rounded.view(f"u{width}"))


def encode_metadata(metadata: Metadata) -> bytes:
    """Return the ``zarr.json`` of an array.

    Parameters
    ----------
    metadata : Metadata
        Its dtype one of `SUPPORTED`; its attributes of what JSON has: str, int, float, bool, None, lists (tuples
        become these) and dicts with keys of str, at most 100 levels deep.

    Returns
    -------
    bytes
        UTF-8, in fact ASCII. The byte order of the dtype is that of the codec.

    Raises
    ------
    TypeError, ValueError
        If JSON cannot say an attribute, as it cannot NaN and infinities (zarr-python writes them nevertheless, and what
        it wrote other readers refuse); if there is not one dimension name for each axis; if it would be longer than
        `MAX_METADATA_NBYTES`.
    DtypeError
        If the dtype is not supported.
    """
    grid, names = metadata.grid, metadata.dimension_names
    dtype = check_dtype(grid.dtype)
    _check_json(metadata.attributes, "attributes", 0)
    if names is not None:
        if len(names) != len(grid.shape):
            raise ValueError(f"{len(names)} dimension names were given for {len(grid.shape)} axes")
        if not all(name is None or isinstance(name, str) for name in names):
            raise TypeError(f"dimension names are str or None: {short(names)}")
        _check_json(names, "dimension_names", 0)
    codecs = [_bytes_codec(dtype.str[0] == "<" if dtype.itemsize > 1 else None)]
    if metadata.index is not None:
        index_codecs = [_bytes_codec(metadata.index.little), *([{"name": "crc32c"}] if metadata.index.checksum else [])]
        configuration = {
            "chunk_shape": [int(n) for n in grid.chunks],
            "codecs": codecs,
            "index_codecs": index_codecs,
            "index_location": metadata.index.location,
        }
        codecs = [{"name": "sharding_indexed", "configuration": configuration}]
    text = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [int(n) for n in grid.shape],
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [int(n) for n in grid.shards]}},
        "chunk_key_encoding": {"name": metadata.encoding, "configuration": {"separator": metadata.separator}},
        "fill_value": encode_fill_value(check_fill_value(metadata.fill_value, dtype)),
        "codecs": codecs,
        "attributes": metadata.attributes,
        **({} if names is None else {"dimension_names": list(names)}),
    }
    encoded = json.dumps(text, indent=2, allow_nan=False).encode()
    if len(encoded) > MAX_METADATA_NBYTES:
        raise ValueError(
            f"zarr.json has {len(encoded)} bytes, at most {MAX_METADATA_NBYTES} are read: shorten attributes"
        )
    return encoded


def _bytes_codec(little: bool | None) -> dict[str, Any]:
    if little is None:
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little" if little else "big"}}


def _check_json(value: Any, where: str, depth: int) -> None:
    """Raise if JSON cannot say a value, or not so that it is read back equal."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where[:200]} is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {short(key)}, and JSON has none but str")
            _check_text(key, f"a key of {where}")
            _check_json(item, f"{where}[{short(key)}]", depth + 1)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]", depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, which JSON does not have: give a str or None")
    elif isinstance(value, int):
        if value.bit_length() > _MAX_INT_BITS:
            raise ValueError(
                f"{where} is an integer of {value.bit_length()} bits, at most {_MAX_INT_BITS} are possible"
            )
    elif isinstance(value, str):
        _check_text(value, where)
    elif value is not None:
        raise TypeError(f"{where} is {short(value)} of type {type(value).__name__}, which JSON does not have")


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} is {text[:80]!a}, with half a surrogate pair: other readers refuse that") from None


def decode_metadata(text: bytes, path: str) -> Metadata:
    """Return what a ``zarr.json`` says, of our arrays and of others' that keep their chunks uncompressed.

    Parameters
    ----------
    text : bytes
        All of the file; the caller reads no more than `MAX_METADATA_NBYTES` and 1.
    path : str
        For messages.

    Returns
    -------
    Metadata
        Each of its shapes has 1 to 64 axes and, axes of 0 left out, below 2**62 bytes.

    Raises
    ------
    FormatError
        If it is damaged, or says something that is not supported: compressed or transposed chunks, shards in shards,
        other dtypes and grids, extensions that must be understood, no axes, a group, another version of Zarr.

    Notes
    -----
    O(n), and up to 20 times as much memory as `text`. ``NaN`` and ``Infinity`` without quotes are refused anywhere, as
    JSON has no such numbers.
    """
    document = _document(text, path)
    if not _is_int(document.get("zarr_format")) or document["zarr_format"] != 3:
        _unsupported(path, f"zarr_format {short(document.get('zarr_format'))}", "3")
    if document.get("node_type") == "group":
        _damaged(path, "this is a Zarr group: give the path of one of its arrays (zarr.open_group lists them)")
    if document.get("node_type") != "array":
        _damaged(path, f"node_type {short(document.get('node_type'))} is neither array nor group")
    for name, value in document.items():
        if name not in _KEYS and not (isinstance(value, dict) and value.get("must_understand") is False):
            _unsupported(path, f"extension {short(name)}", "none that must be understood")
    missing = _KEYS - document.keys() - {"attributes", "dimension_names", "storage_transformers"}
    if missing:
        _damaged(path, f"{', '.join(sorted(missing))} is missing")
    if document.get("storage_transformers", []) != []:
        _unsupported(path, f"storage_transformers {short(document['storage_transformers'])}", "none")

    name, configuration = _named(document["data_type"], "data_type", path)
    if name not in SUPPORTED:
        _unsupported(path, f"data_type {short(name)}", ", ".join(SUPPORTED))
    _check_keys(configuration, "data_type", (), path)
    dtype = SUPPORTED[name]
    shape = _shape(document["shape"], "shape", None, dtype, path)
    if not shape:
        _unsupported(path, "an array without axes", "ranks from 1 up")
    name, configuration = _named(document["chunk_grid"], "chunk_grid", path)
    if name != "regular":
        _unsupported(path, f"chunk_grid {short(name)}", "regular")
    _check_keys(configuration, "chunk_grid", ("chunk_shape",), path)
    shards = _shape(configuration.get("chunk_shape"), "chunk_shape", len(shape), dtype, path)
    chunks, index, little = _codec(document["codecs"], shards, dtype, path)
    if not little:
        dtype = dtype.newbyteorder(">")
    fill_value = decode_fill_value(document["fill_value"], dtype, path)
    encoding, separator = _key_encoding(document["chunk_key_encoding"], path)
    attributes = document.get("attributes", {})
    if not isinstance(attributes, dict):
        _damaged(path, f"attributes are {short(attributes)}, no object")
    names = document.get("dimension_names")
    if names is not None:
        if not isinstance(names, list) or not all(name is None or isinstance(name, str) for name in names):
            _damaged(path, f"dimension_names {short(names)} are no list of strings and nulls")
        if len(names) != len(shape):
            _damaged(path, f"there are {len(names)} dimension_names for {len(shape)} axes")
        names = tuple(names)
    return Metadata(Grid(shape, dtype, chunks, shards), fill_value, attributes, names, index, encoding, separator)


def _damaged(path: str, what: str) -> NoReturn:
    raise FormatError(f"{path}: {what}")


def _unsupported(path: str, found: str, supported: str) -> NoReturn:
    raise FormatError(f"{path}: {found} is not supported, but {supported} (zarr.open_array may read it)")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


def _document(text: bytes, path: str) -> dict[str, Any]:
    if len(text) > MAX_METADATA_NBYTES:
        _damaged(path, f"a zarr.json of more than {MAX_METADATA_NBYTES} bytes is not read")
    try:
        document = json.loads(text.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _damaged(path, f"this is no JSON, or damaged: {str(error)[:200]}")
    if not isinstance(document, dict):
        _damaged(path, f"{short(document)} is no metadata of Zarr")
    return document


def _named(value: Any, what: str, path: str) -> tuple[str, dict[str, Any]]:
    """Return name and configuration of what is a mere name, or an object with both."""
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        _damaged(path, f"{what} {short(value)} has no name")
    configuration = value.get("configuration", {})
    if not isinstance(configuration, dict):
        _damaged(path, f"{what} has the configuration {short(configuration)}, no object")
    _check_keys(value, what, ("name", "configuration", "must_understand"), path)
    return value["name"], configuration


def _check_keys(configuration: dict[str, Any], what: str, known: Sequence[str], path: str) -> None:
    for key in configuration:
        if key not in known:
            _unsupported(path, f"{what} with {short(key)}", f"with {', '.join(known) or 'no configuration'}")


def _shape(value: Any, what: str, ndim: int | None, dtype: np.dtype[Any], path: str) -> Index:
    """Return a shape of any number of axes, or that of a chunk of `ndim` axes, in which there is no 0."""
    least = 0 if ndim is None else 1
    if not isinstance(value, list) or not all(_is_int(n) and n >= least for n in value):
        _damaged(path, f"{what} {short(value)} is no list of integers from {least} up")
    if len(value) > _MAX_NDIM or ndim not in (None, len(value)):
        axes = f"at most {_MAX_NDIM}" if ndim is None else f"those of the shape are {ndim}"
        _damaged(path, f"{what} has {len(value)} axes, {axes}")
    if math.prod(max(n, 1) for n in value) * dtype.itemsize > _MAX_NBYTES:
        _damaged(path, f"{what} {short(value)} is absurd: of {dtype.name} that is more than 2**62 bytes")
    return tuple(value)


def _codec(value: Any, shards: Index, dtype: np.dtype[Any], path: str) -> tuple[Index, ShardIndex | None, bool]:
    """Return the shape of a chunk, how shards are indexed, and whether elements are little-endian."""
    codecs = _codecs(value, "codecs", path)
    if [name for name, _ in codecs] != ["sharding_indexed"]:
        return shards, None, _little(codecs, "codecs", dtype, path)
    [(_, configuration)] = codecs
    _check_keys(configuration, "sharding_indexed", ("chunk_shape", "codecs", "index_codecs", "index_location"), path)
    chunks = _shape(configuration.get("chunk_shape"), "chunk_shape of sharding_indexed", len(shards), dtype, path)
    if any(shard % chunk for shard, chunk in zip(shards, chunks, strict=True)):
        _damaged(path, f"chunks of {short(chunks)} do not divide shards of {short(shards)}")
    little = _little(_codecs(configuration.get("codecs"), "inner codecs", path), "inner codecs", dtype, path)

    codecs = _codecs(configuration.get("index_codecs"), "index_codecs", path)
    checksum = [name for name, _ in codecs[1:]] == ["crc32c"]
    if checksum:
        _check_keys(codecs[1][1], "crc32c", (), path)
    index_little = _little(codecs[:1] if checksum else codecs, "index_codecs", np.dtype(np.uint64), path)
    location = configuration.get("index_location", "end")
    if location not in ("start", "end"):
        _damaged(path, f"index_location {short(location)} is neither start nor end")
    return chunks, ShardIndex(location, checksum, index_little), little


def _codecs(value: Any, what: str, path: str) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(value, list) or not value:
        _damaged(path, f"{what} {short(value)} are no list of codecs")
    return [_named(codec, "codec", path) for codec in value]


def _little(codecs: list[tuple[str, dict[str, Any]]], what: str, dtype: np.dtype[Any], path: str) -> bool:
    """Return whether the one codec, ``bytes``, is little-endian, or the dtype of one byte."""
    names = [name for name, _ in codecs]
    if names != ["bytes"]:
        supported = (
            "bytes, crc32c behind it or not" if what == "index_codecs" else "bytes, alone or in sharding_indexed"
        )
        _unsupported(path, f"{what} {short(names)}", supported)
    [(_, configuration)] = codecs
    _check_keys(configuration, "codec bytes", ("endian",), path)
    endian = configuration.get("endian")
    if endian not in ("little", "big") and (dtype.itemsize > 1 or endian is not None):
        _damaged(path, f"codec bytes has the endian {short(endian)}, neither little nor big")
    return endian != "big" or dtype.itemsize == 1


def _key_encoding(value: Any, path: str) -> tuple[Literal["default", "v2"], Literal["/", "."]]:
    name, configuration = _named(value, "chunk_key_encoding", path)
    if name not in ("default", "v2"):
        _unsupported(path, f"chunk_key_encoding {short(name)}", "default and v2")
    _check_keys(configuration, "chunk_key_encoding", ("separator",), path)
    separator = configuration.get("separator", "/" if name == "default" else ".")
    if separator not in ("/", "."):
        _damaged(path, f"separator {short(separator)} is neither / nor .")
    return ("v2" if name == "v2" else "default"), ("." if separator == "." else "/")


def encode_index(layout: ShardLayout, per_shard: Index, written: NDArray[np.bool]) -> bytes:
    """Return the index of a shard, little-endian, with its checksum.

    Parameters
    ----------
    layout : ShardLayout
        Not `exact`: each block has all its bytes in the file, also at the edge of the array.
    per_shard : tuple of int
        Blocks of a shard along each axis, those beyond the edge included, which are empty.
    written : numpy.ndarray
        Of shape ``(layout.count,)``: whether a block has been written, in order of their numbers.

    Returns
    -------
    bytes
        ``ShardIndex().nbytes(math.prod(per_shard))``, for the end of the file.

    Raises
    ------
    ValueError
        If `written` has another shape, or the layout is exact.

    Examples
    --------
    >>> layout = Grid((3,), np.dtype("u1"), chunks=(2,), shards=(6,)).shard((0,), npy=False)
    >>> np.frombuffer(encode_index(layout, (3,), np.array([False, True])), "<i8", 6).reshape(3, 2).tolist()
    [[-1, -1], [4098, 2], [-1, -1]]
    """
    if layout.exact or written.shape != (layout.count,):
        raise ValueError(f"an index of {layout.count} whole blocks needs as many flags: {written.shape} were given")
    entries = np.full((math.prod(per_shard), 2), _EMPTY, "<u8")
    numbers = _positions(layout.blocks, per_shard)[written]
    entries[numbers, 0] = layout.starts()[written]
    entries[numbers, 1] = layout.block_nbytes
    encoded = entries.tobytes()
    return encoded + crc32c(encoded).to_bytes(4, "little")


def decode_index(
    raw: bytes, index: ShardIndex, layout: ShardLayout, per_shard: Index, file_nbytes: int, path: str
) -> NDArray[np.uint64]:
    """Return where the blocks of a shard lie in its file.

    Parameters
    ----------
    raw : bytes
        The index, and nothing else: ``index.nbytes(math.prod(per_shard))`` bytes from the start or end of the file.
    index : ShardIndex
        How it is written.
    layout : ShardLayout
        What blocks there are; where it would put them does not matter.
    per_shard : tuple of int
        Blocks of a shard along each axis, those beyond the edge included, whose entries are not looked at.
    file_nbytes : int
        Bytes of the file.
    path : str
        For messages.

    Returns
    -------
    numpy.ndarray
        Of shape ``(layout.count, 2)``, in order of the blocks' numbers: bytes from the file's start, and of the block,
        which are `layout.block_nbytes`; both 2**64 - 1 of an empty one.

    Raises
    ------
    FormatError
        If its length or checksum is wrong, a block is not within the file, or not as long as its elements.

    Notes
    -----
    O(n) in the entries of the index.
    """
    count = math.prod(per_shard)
    if len(raw) != index.nbytes(count):
        _damaged(path, f"the index of {count} blocks has {len(raw)} bytes, not {index.nbytes(count)}")
    if index.checksum and crc32c(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        _damaged(path, "the shard's index is damaged: its checksum differs")
    stored = np.frombuffer(raw, "<u8" if index.little else ">u8", 2 * count).reshape(count, 2)
    entries = stored[_positions(layout.blocks, per_shard)].astype(np.uint64, copy=False)
    starts, lengths = entries.T
    nbytes = layout.block_nbytes
    empty = (starts == _EMPTY) & (lengths == _EMPTY)
    for wrong, what in (
        (lengths != nbytes, f"not the {nbytes} of its elements"),
        (starts > max(file_nbytes - nbytes, 0), f"which is not within the {file_nbytes} bytes of the file"),
    ):
        numbers = np.flatnonzero(wrong & ~empty)
        if numbers.size:
            start, length = entries[numbers[0]].tolist()
            block = layout.inner(int(numbers[0]))
            _damaged(
                path, f"the shard's index is damaged: block {block} has {length} bytes from byte {start} on, {what}"
            )
    if file_nbytes < nbytes and not empty.all():
        _damaged(path, f"the shard's index is damaged: blocks of {nbytes} bytes in a file of {file_nbytes}")
    return entries


def _positions(blocks: Index, per_shard: Index) -> NDArray[np.intp]:
    """Return the number that each block has if those beyond the array's edge count too."""
    positions = np.zeros(1, np.intp)
    for n, per in zip(blocks, per_shard, strict=True):
        positions = (positions[:, np.newaxis] * per + np.arange(n)).reshape(-1)
    return positions
