"""Several threads log into regions of one file, each through `logging` and without a lock between them.

A region is one range: its thread appends lines to it for as long as its writer is open, and the receipt says that the
region is complete. Then the file is opened again, and its lines are parsed back.
"""

import logging
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import blockstore as bs

THREADS, RECORDS, REGION = 4, 500, 1 << 16


class RegionHandler(logging.Handler):
    """Appends formatted lines to an array of bytes; a line that has no room is an error."""

    def __init__(self, a: NDArray[np.uint8]) -> None:
        super().__init__()
        self.a, self.used = a, 0

    def emit(self, record: logging.LogRecord) -> None:
        line = np.frombuffer(f"{self.format(record)}\n".encode(), np.uint8)
        self.a[self.used : self.used + line.size] = line
        self.used += line.size


def work(r: bs.AllocatedRange) -> None:
    """Log what one thread does to its own region."""
    with r.writer() as a:
        logger = logging.Logger(f"worker-{r.tag}")
        logger.addHandler(handler := RegionHandler(a))
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
        for step in range(RECORDS):
            logger.log(logging.WARNING if step % 100 == 99 else logging.INFO, "step %d", step)


def main(path: Path) -> None:
    """Log into `path` from all threads, then read it back."""
    with bs.create(path, THREADS * REGION, overwrite=True) as store, ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, [store.allocate(REGION, tag=thread) for thread in range(THREADS)]))
        store.flush()
        regions = store.receipts()
    with bs.open(path, mode="r") as store:
        for region in regions:
            lines = store.raw.read_at(region["start"], region["nbytes"]).rstrip(b"\0").decode().splitlines()
            warnings = sum(line.startswith("WARNING") for line in lines)
            print(f"region {region['tag']}: {len(lines)} lines, {warnings} warnings, last: {lines[-1]}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1] if sys.argv[1:] else f"{folder}/logs.bin"))
