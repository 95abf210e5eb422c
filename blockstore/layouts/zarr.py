"""The metadata of a Zarr array of version 3: the text of its ``zarr.json``.

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
from typing import Any, Literal, NoReturn

import numpy as np

from blockstore.errors import FormatError
from blockstore.layouts.grid import Grid, Index
from blockstore.layouts.shard_index import ShardIndex
from blockstore.layouts.values import (
    SUPPORTED,
    check_dtype,
    check_fill_value,
    decode_fill_value,
    encode_fill_value,
)

MAX_METADATA_NBYTES = 1 << 24
"""Bytes of the longest ``zarr.json`` that is read: parsed, it may take 20 times as much memory."""


_MAX_NDIM = 64
_MAX_NBYTES = 1 << 62
_MAX_DEPTH = 100
_MAX_INT_BITS = 8192

_KEYS = {
    *("zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs"),
    *("attributes", "dimension_names", "storage_transformers"),
}


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
