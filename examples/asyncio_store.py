"""Render tiles under asyncio: the event loop schedules, threads fill ranges, a flush covers many receipts.

Nothing in blockstore waits in the event loop: `asyncio.to_thread` runs what computes or syncs, and both release the
GIL. Each tile of the picture is one typed range; its tag says which.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import blockstore as bs

TILES, ROWS, COLUMNS, STEPS = 12, 32, 512, 40


def render(r: bs.AllocatedRange) -> None:
    """Compute one tile of the Mandelbrot set straight into its range."""
    with r.writer() as a:
        count_steps(a, r.tag)


def count_steps(a: NDArray[np.uint16], tile: int) -> None:
    """Set each point of the tile to the steps for which it stays in the circle of radius 2."""
    y = np.linspace(-1.2, 1.2, TILES * ROWS)[tile * ROWS : (tile + 1) * ROWS, None]
    c = np.linspace(-2.2, 0.8, COLUMNS) + 1j * y
    z = np.zeros_like(c)
    a[:] = 0
    for _ in range(STEPS):
        inside = np.abs(z) <= 2
        z[inside] = z[inside] ** 2 + c[inside]
        a += inside


async def main(path: Path) -> None:
    """Render the picture into `path`, all tiles at once."""
    with bs.create(path, TILES * bs.align_up(ROWS * COLUMNS * 2), access="dense", overwrite=True) as store:

        async def tile(index: int) -> None:
            r = store.allocate(shape=(ROWS, COLUMNS), dtype="<u2", tag=index)
            await asyncio.to_thread(render, r)
            await asyncio.to_thread(store.flush, r.receipt)

        async with asyncio.TaskGroup() as group:
            for index in range(TILES):
                group.create_task(tile(index))

        receipts = store.receipts()
        print(f"{receipts['durable'].sum()} of {TILES} tiles are durable, {receipts['nbytes'].sum()} bytes")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(sys.argv[1] if sys.argv[1:] else f"{folder}/tiles.bin")))
