"""Values that NumPy and the core of Zarr both know: dtypes, and a scalar of one that is read where nothing is written.

What JSON cannot say of a float, Zarr says as text. Every bit of a fill value survives. This module opens no file.

Examples
--------
>>> encode_fill_value(np.float32("-inf")), decode_fill_value("NaN", np.dtype("f8"), "zarr.json")
('-Infinity', np.float64(nan))
"""

import math
from reprlib import repr as short
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike

from blockstore.errors import DtypeError, FormatError

SUPPORTED: dict[str, np.dtype[Any]] = {
    name: np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
}
"""The dtypes that NumPy and the core of Zarr both have, by the name that both give them."""


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
            raise FormatError(f"{path}: {where}")
        return np.bool(value)
    if dtype.kind in "iu":
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        info = np.iinfo(dtype)
        if not _is_int(value) or not info.min <= value <= info.max:
            raise FormatError(f"{path}: {where}")
        scalar: np.generic = dtype.type(value)
        return scalar
    parts = value if dtype.kind == "c" else [value]
    width = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    if not isinstance(parts, list) or len(parts) * width != dtype.itemsize:
        raise FormatError(f"{path}: {where}")
    bits = [_float_bits(part, width) for part in parts]
    if None in bits:
        raise FormatError(f"{path}: {where}")
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


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
