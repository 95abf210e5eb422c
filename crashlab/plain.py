"""Plain: the laboratory tested on files without blockstore, where it is known what a power loss may do.

``python -m crashlab.plain FOLDER POSITION EVENTS SEED 0 [no-sync]`` writes files with ``pwrite`` and ``fdatasync`` and
promises each after that; with ``no-sync`` it leaves out one sync in ten, which the laboratory must notice.
"""

import os
import random
import sys
from pathlib import Path

import numpy as np

from crashlab.check import Verdict
from crashlab.disk import Position
from crashlab.history import History, Recorder, content

_ROUNDS = 60


def fill(folder: Path, position: Position, record: Recorder, seed: int, *, sync: bool) -> None:
    """Write files, and rewrite some, and promise each version."""
    rng = random.Random(seed)
    versions: dict[int, tuple[int, int]] = {}
    parent = os.open(folder, os.O_RDONLY)
    for number in range(1, _ROUNDS + 1):
        tag = rng.choice(list(versions)) if versions and rng.random() < 0.3 else number
        version, nbytes = versions.get(tag, (0, rng.choice((8, 5000, 70_000, 400_000))))
        versions[tag] = version + 1, nbytes
        record("begun", position(), tag, version + 1, nbytes)
        handle = os.open(folder / str(tag), os.O_WRONLY | os.O_CREAT)
        os.pwrite(handle, content(seed, tag, version + 1, nbytes).data, 0)
        if sync or number % 10:
            os.fdatasync(handle)
            os.fsync(parent)
        os.close(handle)
        record("durable", position(), tag, version + 1)
    os.close(parent)


def check_files(folder: Path, history: History, point: int, *, thorough: bool) -> Verdict:
    """Check that each file which was promised last is there."""
    verdict = Verdict()
    for tag, life in history.lives.items():
        promised = life.promised_by(point)
        if promised and promised == max(life.begun_by(point)):
            verdict.promised += 1
            path = folder / str(tag)
            data = np.fromfile(path, np.uint8) if path.exists() else np.empty(0, np.uint8)
            if history.version_of(tag, data, point) != promised:
                verdict.lost.append(f"file {tag} is not what was promised")
    return verdict


if __name__ == "__main__":
    fill(
        Path(sys.argv[1]),
        Position(Path(sys.argv[2])),
        Recorder(Path(sys.argv[3])),
        int(sys.argv[4]),
        sync=sys.argv[6:] != ["no-sync"],
    )
