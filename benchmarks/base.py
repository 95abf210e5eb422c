"""What the benchmark classes share: a temporary folder per sample, and how often asv measures.

asv calls `setup` before and `teardown` after each timed call, so every sample starts from fresh files.
"""

import shutil
from pathlib import Path

from benchmarks import disk

KIB = 1 << 10
MIB = 1 << 20


class OnDisk:
    """A benchmark that writes. Each timed call is one sample; `repeat` is samples at least and at most, and seconds."""

    number = 1
    rounds = 2
    repeat = (5, 10, 5.0)
    warmup_time = 0.0
    timeout = 120.0

    folder: Path | None = None

    def make_folder(self) -> Path:
        """Return a new temporary folder on a real disk, which `teardown` removes."""
        self.folder = disk.new_folder()
        return self.folder

    def teardown(self, *params: object) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder)
            self.folder = None
