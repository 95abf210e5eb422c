"""The demo: a picture made of itself, in Zarr arrays that are filled in parallel by a process that gets killed.

Level 0 is a mosaic of scikit-image's astronaut: each tile is the whole picture, small, turned, and in the colour that
the picture has there. Each further level halves the one before, down to the size of the picture itself. The levels are
the arrays "0", "1" and so on of a Zarr group, with the metadata of OME-Zarr, so that viewers know what they are.
Arrays are uint8 with the axes c, y, x; a `size` is in pixels along a side, and a power of two. This module prints
nothing: see `cli`.
"""

import json
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import blockstore as bs

SIDE, TILE = 512, 128
"""Pixels along a side of the picture, and of a tile. A block is one row of tiles of one colour."""
SIZES = [1 << power for power in range(10, 17)]
"""What the size of level 0 can be: up to as many tiles as the picture has pixels."""
SETTINGS = {"picture": "astronaut", "tile": TILE}
"""What the content depends on: going on with other settings is refused."""

Pixels = NDArray[np.uint8]
Function = Callable[[Pixels, bs.Block], object]
Advance = Callable[[int], object]
"""Called with the bytes that were done since the last call."""


class DemoError(Exception):
    """Something is not what it has to be."""


def load_picture() -> Pixels:
    """Return scikit-image's astronaut, shape (3, 512, 512), which the package ships; look for all that is needed."""
    try:
        import PIL  # noqa: F401
        import zarr  # noqa: F401
        from skimage import data
    except ModuleNotFoundError as error:
        text = f"the demo needs {error.name}: pip install 'ndblockstore[demo]'"
        raise ModuleNotFoundError(text, name=error.name) from None
    astronaut: Any = data.astronaut
    return np.ascontiguousarray(np.moveaxis(astronaut(), 2, 0), np.uint8)


def mosaic(picture: Pixels, size: int) -> Function:
    """Return what fills a block of level 0, with tiles of `picture` that show it from afar."""

    def shrunk(side: int) -> Any:
        return picture.reshape(3, side, SIDE // side, side, SIDE // side).mean((2, 4))

    count = size // TILE  # of tiles, along a side
    colours = shrunk(count).astype(np.int16)
    detail = shrunk(TILE)
    detail = (detail - detail.mean((1, 2), keepdims=True)) / 2
    turned = [np.rot90(way, turns, (1, 2)) for way in (detail, detail[:, :, ::-1]) for turns in range(4)]
    details = np.stack(turned, 1).astype(np.int16)

    def paint(a: Pixels, block: bs.Block) -> None:
        channel, row, _ = block.index
        ways = np.random.default_rng(row).integers(len(turned), size=count)
        tiles = details[channel, ways]  # a copy, shape (count, TILE, TILE)
        tiles += colours[channel, row, :, None, None]
        np.clip(tiles.swapaxes(0, 1), 0, 255, out=a.reshape(TILE, count, TILE), casting="unsafe")

    return paint


def halve(above: bs.BlockArray) -> Function:
    """Return what fills a block of a level, with the means of 2 x 2 pixels of the level above, read without a copy."""

    def paint(a: Pixels, block: bs.Block) -> None:
        channel, rows, _ = block.slices
        wide = above[channel, 2 * rows.start : 2 * rows.stop].astype(np.uint16)
        pairs = wide[:, 0::2] + wide[:, 1::2]
        a[...] = (pairs[..., 0::2] + pairs[..., 1::2] + 2) // 4

    return paint


@dataclass(frozen=True, slots=True)
class Pyramid:
    """The levels of the mosaic of a picture, as a Zarr group in `folder`."""

    folder: Path
    size: int

    @property
    def sizes(self) -> list[int]:
        """The size of each level."""
        return [self.size >> level for level in range((self.size // SIDE).bit_length())]

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels of all levels."""
        return sum(3 * size * size for size in self.sizes)

    def create(self) -> None:
        """Make the group and its arrays in the folder, all at once, so that a full disk is an error now."""
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": self._ome()}}
        (self.folder / "zarr.json").write_text(json.dumps(group, indent=2))
        with ExitStack() as arrays:
            for level, size in enumerate(self.sizes):
                x = bs.create_array(
                    self.folder / str(level),
                    shape=(3, size, size),
                    dtype=np.uint8,
                    chunks=(1, TILE, size),
                    shards=(1, size, size) if level == 1 else None,  # a file for each colour; else one for all
                    dimension_names=("c", "y", "x"),
                    fingerprint=SETTINGS,
                    checksum="crc32",
                    keep_journal=True,  # it has the checksums
                )
                arrays.enter_context(x)

    def open(self, level: int, *, mode: Any = "r") -> bs.BlockArray:
        """Open a level to read, or with mode "r+" to begin or go on filling it."""
        return bs.open_array(self.folder / str(level), mode=mode, fingerprint=SETTINGS if mode == "r+" else None)

    def functions(self, picture: Pixels) -> Iterator[tuple[int, Function]]:
        """Iterate over the levels, each with what fills its blocks; by then the level above has to be filled."""
        yield 0, mosaic(picture, self.size)
        for level in range(1, len(self.sizes)):
            with self.open(level - 1) as above:
                yield level, halve(above)

    def npy_files(self, level: int) -> list[Path]:
        """Return the files of a level that is filled, each a Zarr shard and an ``.npy`` file at once."""
        return sorted((self.folder / str(level) / "c").glob("*/0/0"))

    def _ome(self) -> dict[str, Any]:
        """Return what the group says of its levels: https://ngff.openmicroscopy.org/0.5/."""
        axes = [{"name": "c", "type": "channel"}, {"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
        levels = [
            {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": [1, 1 << level, 1 << level]}]}
            for level in range(len(self.sizes))
        ]
        return {"version": "0.5", "multiscales": [{"name": "mosaic", "axes": axes, "datasets": levels}]}


def fill_until_killed(pyramid: Pyramid, picture: Pixels, workers: int, advance: Advance) -> int:
    """Let another process fill level 0, and kill it when half is done; return how many blocks it had reported."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_fill_for, args=(theirs, pyramid, picture, workers), daemon=True)
    with no_ctrl_c():
        child.start()
    theirs.close()
    nbytes = 0
    try:
        while nbytes < 3 * pyramid.size**2 // 2:
            ours.send("go on")
            answer = ours.recv()
            if isinstance(answer, Exception):
                raise answer
            advance(answer)
            nbytes += answer
    except (EOFError, ConnectionError):
        raise DemoError("the process that fills level 0 was killed by somebody else") from None
    finally:
        child.kill()
        child.join()
    return nbytes // (TILE * pyramid.size)


def _fill_for(pipe: Connection, pyramid: Pyramid, picture: Pixels, workers: int) -> None:
    """Fill level 0 in this process, and say through a pipe how many bytes are, each time when told to go on."""

    def report(nbytes: int) -> None:
        pipe.recv()
        pipe.send(nbytes)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    warnings.simplefilter("ignore", bs.FileSystemWarning)  # the parent has shown it
    try:
        with pyramid.open(0, mode="r+") as x:
            x.fill(mosaic(picture, pyramid.size), workers=workers, progress=report)
    except (EOFError, ConnectionError):
        pass  # the parent is gone
    except Exception as error:
        pipe.send(error)


@contextmanager
def no_ctrl_c() -> Iterator[None]:
    """Hold Ctrl-C back until the end, and for good from a process that is started meanwhile."""
    mask: Any = getattr(signal, "pthread_sigmask", lambda how, signals: signals)  # Windows has none
    before = mask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        mask(signal.SIG_SETMASK, before)


def verify(pyramid: Pyramid, picture: Pixels, workers: int, advance: Advance) -> int:
    """Compare all blocks with their checksums, and with what they are computed from; return how many there are."""
    count = 0
    for level, paint in pyramid.functions(picture):
        with pyramid.open(level) as x, ThreadPoolExecutor(workers) as pool:
            wrong = [tuple(index) for index in x.verify().tolist()]
            for block, same in pool.map(_check, x.blocks, [paint] * len(x.blocks)):
                wrong += [] if same else [block.index]
                advance(block.nbytes)
                count += 1
            if wrong:
                raise DemoError(f"block {wrong[0]} of level {level} is not what was written")
    return count


def _check(block: bs.Block, paint: Function) -> tuple[bs.Block, bool]:
    paint(expected := np.empty(block.shape, block.dtype), block)
    return block, np.array_equal(expected, block.read())


def compare(pyramid: Pyramid, advance: Advance) -> None:
    """Read all levels by zarr, and the same files by `numpy.load`; raise `DemoError` if these differ."""
    import zarr

    group = zarr.open_group(pyramid.folder, mode="r")
    for level, size in enumerate(pyramid.sizes):
        array: Any = group[str(level)]
        files = [np.load(path, mmap_mode="r") for path in pyramid.npy_files(level)]
        for channel, plane in enumerate(plane for file in files for plane in file):
            for rows in (slice(start, start + 8 * TILE) for start in range(0, size, 8 * TILE)):
                if not np.array_equal(array[channel, rows], plane[rows]):
                    raise DemoError(f"zarr and numpy.load differ in {rows} of channel {channel} of level {level}")
                advance(plane[rows].nbytes)


def write_preview(pyramid: Pyramid, path: Path) -> None:
    """Write a PNG: the smallest level, and beside it, as large, a part of level 0 from the middle of the face."""
    from PIL import Image

    with pyramid.open(len(pyramid.sizes) - 1) as smallest, pyramid.open(0) as x:
        top, left = (min(int(pyramid.size * part), pyramid.size - SIDE) for part in (0.17, 0.4))
        panels = np.concatenate([smallest[...], x[:, top : top + SIDE, left : left + SIDE]], axis=2)
    Image.fromarray(np.ascontiguousarray(np.moveaxis(panels, 0, 2))).save(path)
