"""Cases: arrays to make with `blockstore.create_array`, and what whoever reads them must get.

A case is one dtype in one situation with one shape. Data are random bytes, so that floats are NaNs of every payload,
with the extremes of the dtype put in between; the same in every run. A file that a tool is to read, and the array that
it must give, is an `Item`: a case in Zarr is one for tools that read Zarr, and each of its shard files that is an
``.npy`` at the same time is one for NumPy. Nothing here knows a tool.

Examples
--------
>>> case = next(case for case in all_cases() if case.name == "zarr-rows-f8-2d-several-shards")
>>> case.shape, case.chunks, case.shards, case.dtype
((66, 70), (15, 70), (30, 70), dtype('float64'))
>>> [item.path for item in case.npy_items()]
['a/c/0/0', 'a/c/1/0', 'a/c/2/0']
"""

import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Index = tuple[int, ...]

_NATIVE = ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")

DTYPES: tuple[np.dtype[Any], ...] = tuple(
    np.dtype(order + code) for order in "<>" for code in _NATIVE if order == "<" or np.dtype(code).itemsize > 1
)
"""Little-endian ones, then big-endian ones."""

FULL, EDGE, SHARDS, PARTLY, SHARDS_PARTLY, EMPTY, FILL = (
    "full",
    "edge blocks",
    "several shards",
    "partly written",
    "several shards, partly",
    "empty",
    "fill values",
)

SITUATIONS = (FULL, EDGE, SHARDS, PARTLY, SHARDS_PARTLY, EMPTY, FILL)
"""In the order of the page's columns.

*edge blocks*: the shape is no multiple of the chunks. *several shards*: nor of the shards. *partly written*: every
other block. *several shards, partly*: one shard is missing, one has some blocks, the others all they can have. *empty*:
made, and closed. *fill values*: partly written, once with each value of `fill_values`.
"""


class CreateArray(Protocol):
    """What makes the arrays: `blockstore.create_array`."""

    def __call__(self, path: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Make an array at a path."""


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """Something to read, and what must come out."""

    case: "Case"
    path: str
    """From the folder of the case."""
    expected: NDArray[Any]
    written: NDArray[np.bool_]
    """Which elements were written, of the same shape. The others are the fill value."""
    npy: bool
    """Whether it is to be read as ``.npy``; else as Zarr."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """An array to make. It lies in a folder of its own: ``a.npy``, or ``a`` in a Zarr group, which xarray needs."""

    format: str
    """``npy`` or ``zarr``."""
    layout: str
    """``rows``: blocks split the leading axis. ``tiles``: they split all."""
    dtype: np.dtype[Any]
    situation: str
    shape: Index
    chunks: Index
    shards: Index | None
    fill_value: np.generic
    number: int = 0
    """Of the fill value, in the situation *fill values*."""

    @property
    def name(self) -> str:
        """A name that is a folder's, too."""
        order = "be-" if self.dtype.byteorder == ">" else ""
        kind = "bool" if self.dtype.kind == "b" else self.dtype.str[1:]
        situation = self.situation.replace(",", "").replace(" ", "-")
        which = f"-{self.number}" if self.situation == FILL else ""
        return f"{self.format}-{self.layout}-{order}{kind}-{len(self.shape)}d-{situation}{which}"

    @property
    def grid(self) -> Index:
        """How many blocks there are along each axis."""
        return tuple(-(-n // chunk) for n, chunk in zip(self.shape, self.chunks, strict=True))

    @property
    def path(self) -> str:
        """Where the array lies in the folder of the case."""
        return "a.npy" if self.format == "npy" else "a"

    @property
    def dimension_names(self) -> list[str]:
        """A name for each axis."""
        return ["time", "depth", "y", "x"][-len(self.shape) :]

    def is_written(self, block: Index) -> bool:
        """Return whether a block is to be written."""
        if self.situation == EMPTY:
            return False
        if self.situation in (PARTLY, FILL):
            return int(np.ravel_multi_index(block, self.grid)) % 2 == 1
        if self.situation == SHARDS_PARTLY:
            shards = self.shards or self.shape
            shard = sum(i * chunk // n for i, chunk, n in zip(block, self.chunks, shards, strict=True))
            return shard > 1 or (shard == 1 and sum(block) % 2 == 1)
        return True

    def slices(self, block: Index) -> tuple[slice, ...]:
        """Return where in the array a block lies."""
        return tuple(
            slice(i * chunk, min((i + 1) * chunk, n))
            for i, chunk, n in zip(block, self.chunks, self.shape, strict=True)
        )

    def blocks(self) -> Iterator[Index]:
        """Iterate over the indices of the blocks to write."""
        return (block for block in itertools.product(*map(range, self.grid)) if self.is_written(block))

    def data(self) -> NDArray[Any]:
        """Return what would be there if every block were written."""
        return sample(self.dtype, self.shape, seed=zlib.crc32(self.name.encode()))

    def items(self) -> Iterator[Item]:
        """Iterate over what there is to read."""
        yield self.item()
        if self.format == "zarr":
            yield from self.npy_items()

    def item(self) -> Item:
        """Return the array as a whole."""
        written = np.zeros(self.shape, np.bool_)
        for block in self.blocks():
            written[self.slices(block)] = True
        expected = np.full(self.shape, self.fill_value, self.dtype)
        expected[written] = self.data()[written]
        return Item(self, self.path, expected, written, self.format == "npy")

    def npy_items(self) -> Iterator[Item]:
        """Iterate over the shard files that are ``.npy`` files, too. One of which nothing is written is not there."""
        if self.layout != "rows":
            return
        whole = self.item()
        rows = self.shards[0] if self.shards else self.shape[0]
        for shard, start in enumerate(range(0, self.shape[0], rows)):
            written = whole.written[start : start + rows]
            if written.any():
                path = "/".join([self.path, "c", str(shard), *"0" * (len(self.shape) - 1)])
                yield Item(self, path, whole.expected[start : start + rows], written, npy=True)

    def make(self, folder: Path, create_array: CreateArray) -> None:
        """Make the array in `folder`, which must not be there yet."""
        folder.mkdir()
        more: dict[str, Any] = {"shape": self.shape, "dtype": self.dtype, "chunks": self.chunks}
        if self.format == "zarr":
            (folder / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group"}), encoding="utf-8")
            more |= {
                "shards": self.shards,
                "fill_value": self.fill_value,
                "attributes": {"units": "K", "name": self.name},
                "dimension_names": self.dimension_names,
            }
        data = self.data()
        with create_array(folder / self.path, **more) as x:
            for block in self.blocks():
                with x.blocks[block].writer() as a:
                    a[...] = data[self.slices(block)]
            if self.format == "npy" and self.situation in (PARTLY, EMPTY):
                x.publish(partial=True)


# -- data -----------------------------------------------------------------------------------------


def _bits(dtype: np.dtype[Any], bits: int) -> Any:
    return np.array(bits, f"u{dtype.itemsize}").view(dtype.newbyteorder("="))[()]


def fill_values(dtype: np.dtype[Any]) -> list[np.generic]:
    """Return values to fill arrays of a dtype with, in native byte order: zero first, NaNs with a payload last."""
    native = dtype.newbyteorder("=")
    values: Sequence[Any]
    if native.kind == "b":
        values = [False, True]
    elif native.kind in "iu":
        extremes = np.iinfo(native)
        values = [0, 7, extremes.max, *([extremes.min, -1] if native.kind == "i" else [])]
    elif native.kind == "f":
        about = np.finfo(native)
        quiet = _bits(native, {2: 0xFE05, 4: 0xFFC00005, 8: 0xFFF8000000000123}[native.itemsize])
        loud = _bits(native, {2: 0x7D05, 4: 0x7FA00005, 8: 0x7FF4000000000123}[native.itemsize])
        values = [0.0, np.nan, -0.0, 7.5, np.inf, -np.inf, 1 / 3, about.max, about.smallest_subnormal, quiet, loud]
    else:
        part = np.dtype(f"f{native.itemsize // 2}")
        odd = np.array([1.5, _bits(part, {4: 0xFFC00005, 8: 0x7FF8000000000123}[part.itemsize])], part).view(native)[0]
        values = [0, 1 + 2j, complex(np.nan, np.inf), complex(-0.0, -0.0), complex(1 / 3, -np.inf), odd]
    return [value if isinstance(value, np.generic) else native.type(value) for value in values]


def sample(dtype: np.dtype[Any], shape: Index, seed: int) -> NDArray[Any]:
    """Return random bytes as an array, with the extremes of the dtype among them."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    raw = rng.integers(0, 256, count * dtype.itemsize, np.uint8)
    a = (raw & 1).view(dtype) if dtype.kind == "b" else raw.view(dtype)
    special = np.array(fill_values(dtype), dtype.newbyteorder("=")).astype(dtype)
    places = rng.permutation(count)[: 3 * len(special)]
    a[places] = np.resize(special, len(places))
    return a.reshape(shape)


# -- all of them ----------------------------------------------------------------------------------

_ROWS: dict[int, tuple[Index, Index, Index, Index]] = {
    1: ((4000,), (3701,), (1000,), (2000,)),
    2: ((60, 70), (66, 70), (15, 70), (30, 70)),
    3: ((12, 10, 17), (13, 10, 17), (3, 10, 17), (6, 10, 17)),
    4: ((8, 5, 6, 7), (9, 5, 6, 7), (2, 5, 6, 7), (4, 5, 6, 7)),
}
"""For each rank: a shape that is a multiple of the chunks, one that is not, chunks, shards."""

_TILES: dict[int, tuple[Index, Index, Index, Index]] = {
    2: ((60, 70), (66, 73), (15, 35), (30, 70)),
    3: ((12, 10, 18), (13, 11, 17), (3, 5, 6), (6, 10, 12)),
    4: ((8, 6, 6, 8), (9, 7, 6, 7), (2, 3, 3, 4), (4, 6, 6, 4)),
}


def _fill(dtype: np.dtype[Any], turn: int) -> np.generic:
    """Return a fill value that every format of a number can say; the others are for the situation *fill values*."""
    values = fill_values(dtype)
    usual = values[: {"b": 2, "i": 2, "u": 2, "f": 6, "c": 5}[dtype.kind]]
    return usual[turn % len(usual)]


def all_cases() -> list[Case]:
    """Return every case: for each dtype, all situations in all ranks and layouts that they exist for."""
    return [*npy_cases(), *zarr_cases()]


def npy_cases() -> Iterator[Case]:
    """Iterate over the cases that are ``.npy`` files."""
    for dtype, situation, rank in itertools.product(DTYPES, (FULL, EDGE, PARTLY, EMPTY), _ROWS):
        even, odd, chunks, _ = _ROWS[rank]
        shape = odd if situation == EDGE else even
        yield Case("npy", "rows", dtype, situation, shape, chunks, None, fill_values(dtype)[0])


def zarr_cases() -> Iterator[Case]:
    """Iterate over the cases that are Zarr arrays."""
    for dtype, (layout, shapes) in itertools.product(DTYPES, (("rows", _ROWS), ("tiles", _TILES))):
        for rank, (even, odd, chunks, shards) in shapes.items():
            for turn, situation in enumerate(SITUATIONS[:-1], rank):
                several = situation in (SHARDS, SHARDS_PARTLY)
                shape = odd if several or situation == EDGE else even
                fill = _fill(dtype, turn)
                yield Case("zarr", layout, dtype, situation, shape, chunks, shards if several else None, fill)
        for number, fill in enumerate(fill_values(dtype)):
            even, _, chunks, _ = shapes[2]
            yield Case("zarr", layout, dtype, FILL, even, chunks, None, fill, number)


def some_cases() -> list[Case]:
    """Return a part of them for a quick look: every dtype, and all of the rest for one of them."""
    ranks = itertools.cycle((2, 3, 1, 4))
    wanted = {dtype: next(ranks) for dtype in DTYPES}
    return [
        case
        for case in all_cases()
        if case.dtype == np.dtype("<f8")
        or (case.situation in (FULL, SHARDS_PARTLY) and len(case.shape) == wanted[case.dtype])
        or (case.situation == FILL and case.layout == "rows" and case.number == 1)
    ]
