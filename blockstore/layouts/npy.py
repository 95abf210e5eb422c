"""The header of an ``.npy`` file: bytes that say shape and dtype of the array behind them.

What is written is version 1.0, padded so that the data begins at byte 4096. What is read comes from anywhere, and is
parsed without evaluating it. This module opens no file and knows no blocks; offsets are bytes from the file's start.
The format is that of `numpy.lib.format`.

Examples
--------
>>> header = decode_header(encode_header((3, 4), np.dtype("f4")), "a.npy")
>>> header.shape, header.dtype, header.offset
((3, 4), dtype('float32'), 4096)
"""

import math
import re
from typing import Any, NamedTuple, NoReturn

import numpy as np

from blockstore.errors import DtypeError, FormatError, LayoutError
from blockstore.layouts.grid import HEADER_NBYTES, Index

MAGIC = b"\x93NUMPY"

_MAX_TEXT_NBYTES = 10_000
"""`numpy.load` refuses longer ones unless told otherwise."""

MAX_HEADER_NBYTES = _MAX_TEXT_NBYTES + 12
"""Bytes from the start of a file that hold every header this module reads."""

_MAX_NDIM = 64
_MAX_NBYTES = 1 << 62
_PREFIXES = {b"\x01\x00": (2, "latin1"), b"\x02\x00": (4, "latin1"), b"\x03\x00": (4, "utf-8")}
"""By version: bytes of the length that follows it, and the encoding of the text."""

_ENTRY = re.compile(
    r"""\s*(?:'(?P<key>[a-z_]{1,20})'|"(?P<key2>[a-z_]{1,20})")\s*:\s*
    (?:'(?P<text>[^'\\]*)'|"(?P<text2>[^"\\]*)"|(?P<flag>True|False)|(?P<tuple>\([-0-9L,\s]*\))|(?P<fields>\[))
    \s*(?P<comma>,?)\s*""",
    re.VERBOSE | re.ASCII,
)
_TUPLE = re.compile(
    r"\(\s*(?:INT\s*,\s*(?:INT\s*,\s*)*(?:INT\s*)?)?\)".replace("INT", r"-?(?:0|[1-9][0-9]*)L?"), re.ASCII
)
_DTYPE = re.compile(r"[<>|=]?(?:\?|[biufcSUV][0-9]{1,10}|[mM]8(?:\[[0-9]{0,10}[A-Za-z]{1,7}(?:/[0-9]{1,10})?\])?)")
_SUPPORTED = "supported is every dtype of one size without fields and Python objects"


class NpyHeader(NamedTuple):
    """What an ``.npy`` file says of its array."""

    shape: Index
    dtype: np.dtype[Any]
    fortran_order: bool
    offset: int
    """Bytes before the data."""


def encode_header(shape: Index, dtype: np.dtype[Any]) -> bytes:
    """Return the header of an array in C order.

    Parameters
    ----------
    shape : tuple of int
        At most 64 axes.
    dtype : numpy.dtype
        Of one size, without fields and objects.

    Returns
    -------
    bytes
        Exactly 4096, all of the file that is before the data.

    Raises
    ------
    DtypeError
        If the header cannot say this dtype.
    LayoutError
        If the shape is not that of an array below 2**62 bytes.

    Examples
    --------
    >>> encode_header((7,), np.dtype("<f8"))[:67]
    b"\\x93NUMPY\\x01\\x00\\xf6\\x0f{'descr': '<f8', 'fortran_order': False, 'shape': (7,), }"
    """
    if dtype.hasobject or dtype.subdtype is not None or dtype.kind not in "biufcSUVmM" or dtype.fields is not None:
        raise DtypeError(f"an .npy header cannot say {dtype}: {_SUPPORTED}")
    if dtype.itemsize == 0:
        raise DtypeError(f"dtype {dtype!r} has an itemsize of 0 bytes: give it a length, such as 'S16'")
    wrong = _wrong_shape(shape, dtype)
    if wrong:
        raise LayoutError(wrong)
    numbers = tuple(int(n) for n in shape)
    text = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': {numbers!r}, }}".encode("latin1")
    nbytes = HEADER_NBYTES - len(MAGIC) - 4
    return MAGIC + b"\x01\x00" + nbytes.to_bytes(2, "little") + text.ljust(nbytes - 1) + b"\n"


def decode_header(head: bytes, path: str) -> NpyHeader:
    """Return what the header of an ``.npy`` file says.

    Parameters
    ----------
    head : bytes
        The first bytes of the file, `MAX_HEADER_NBYTES` or all that it has.
    path : str
        For messages.

    Returns
    -------
    NpyHeader
        The shape has at most 64 axes and, axes of 0 left out, below 2**62 bytes; the file may be shorter nevertheless.

    Raises
    ------
    FormatError
        If it is no header, a damaged one, or says a dtype that is not supported.

    Notes
    -----
    O(1), as no header over 10 000 bytes is read. Nothing of the text is evaluated.

    Examples
    --------
    >>> decode_header(b"no array", "a.txt")
    Traceback (most recent call last):
    blockstore.FormatError: a.txt: not an .npy file: it begins with b'no arr', not with b'\\x93NUMPY'
    """
    if head[: len(MAGIC)] != MAGIC:
        _refuse(path, f"not an .npy file: it begins with {bytes(head[: len(MAGIC)])!r}, not with {MAGIC!r}")
    version = bytes(head[6:8])
    if len(version) == 2 and version not in _PREFIXES:
        _refuse(path, f".npy version {version[0]}.{version[1]} is unknown: 1.0, 2.0 and 3.0 are read")
    width, encoding = _PREFIXES.get(version, (2, "latin1"))
    begin = 8 + width
    nbytes = int.from_bytes(head[8:begin], "little")
    if len(head) >= begin and nbytes > _MAX_TEXT_NBYTES:
        _refuse(path, f"the .npy header has {nbytes} bytes; no more than {_MAX_TEXT_NBYTES} are read, as by numpy.load")
    offset = begin + nbytes
    if len(head) < max(offset, begin):
        _refuse(
            path, f"the .npy header is cut off: {len(head)} bytes of {offset if len(head) >= begin else 'it'} are there"
        )
    try:
        text = bytes(head[begin:offset]).decode(encoding)
    except UnicodeDecodeError as error:
        _refuse(path, f"the .npy header is damaged: {error}")
    entries = _entries(text, path)
    dtype = _dtype(entries["descr"], path)
    shape = _shape(entries["shape"], path)
    wrong = _wrong_shape(shape, dtype)
    if wrong:
        _refuse(path, wrong)
    return NpyHeader(shape, dtype, entries["fortran_order"].group("flag") == "True", offset)


def _refuse(path: str, what: str) -> NoReturn:
    raise FormatError(f"{path}: {what}")


def _entries(text: str, path: str) -> dict[str, re.Match[str]]:
    """Return the value of each key, as what matched the entry."""
    text = text.strip()
    entries: dict[str, re.Match[str]] = {}
    position, comma = 1, ","
    while text[:1] == "{" and comma and (match := _ENTRY.match(text, position)):
        key = match["key"] or match["key2"]
        if key == "descr" and match["fields"]:
            _refuse(path, f"its dtype has fields: {_SUPPORTED}")
        if key in entries:
            _refuse(path, f"the .npy header is damaged: {key!r} is there twice")
        entries[key] = match
        position, comma = match.end(), match["comma"]
    if text[:1] != "{" or text[position:].strip() != "}":
        _refuse(path, f"the .npy header is damaged: {text[:80]!r} is no dict of descr, fortran_order and shape")
    if entries.keys() != {"descr", "fortran_order", "shape"}:
        _refuse(
            path, f"the .npy header is damaged: it has the keys {sorted(entries)}, not descr, fortran_order and shape"
        )
    if entries["fortran_order"]["flag"] is None:
        _refuse(path, "the .npy header is damaged: fortran_order is neither True nor False")
    return entries


def _dtype(entry: re.Match[str], path: str) -> np.dtype[Any]:
    text = entry["text"] if entry["text"] is not None else entry["text2"]
    if text is None:
        _refuse(path, "the .npy header is damaged: descr is no text")
    if text.lstrip("<>|=")[:1] == "O":
        _refuse(path, f"its dtype is {text!r}, Python objects: {_SUPPORTED}")
    try:
        dtype = np.dtype(text) if _DTYPE.fullmatch(text) else None
    except (TypeError, ValueError, OverflowError, SyntaxError):
        dtype = None
    if dtype is None:
        _refuse(path, f"there is no dtype {text[:80]!r} here: {_SUPPORTED}")
    if dtype.itemsize == 0:
        _refuse(path, f"its dtype {text!r} has an itemsize of 0 bytes")
    return dtype


def _shape(entry: re.Match[str], path: str) -> Index:
    text = entry["tuple"]
    if text is None or not _TUPLE.fullmatch(text):
        _refuse(path, f"the .npy header is damaged: shape is no tuple of integers: {(text or entry.group())[:80]!r}")
    numbers = re.findall(r"-?[0-9]+", text)
    long = [number for number in numbers if len(number) > 20]
    if long:
        _refuse(path, f"its shape is absurd: an axis has {long[0][:20]}... elements")
    return tuple(int(number) for number in numbers)


def _wrong_shape(shape: Index, dtype: np.dtype[Any]) -> str | None:
    """Say why there is no array of this shape; None if there may be."""
    if len(shape) > _MAX_NDIM:
        return f"its shape is absurd: it has {len(shape)} axes, at most {_MAX_NDIM} are possible"
    if any(n < 0 for n in shape):
        return f"its shape {shape} has a negative number"
    nbytes = math.prod(max(int(n), 1) for n in shape) * dtype.itemsize
    if nbytes > _MAX_NBYTES:
        return f"its shape {shape} is absurd: of {dtype} that is more than 2**62 bytes"
    return None
