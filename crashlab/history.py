"""History: what a workload began and what it was promised, and the bytes that each version of a range has.

Each event has a position: how long the log of the disk was. Of a promise it is read after the call that made it, so a
crash at that point or later must keep it; of a beginning before the call, so a crash at that point or earlier has
none of it. Events are lines of a file outside the disk. This module knows numbers and bytes; nothing of stores.
"""

import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=4096)
def content(seed: int, tag: int, version: int, nbytes: int) -> NDArray[np.uint8]:
    """Return the bytes of one version of a range: words of 8 bytes, each of them a hash of all that and of its place.

    Returns
    -------
    ndarray, shape (nbytes,), uint8
        Read-only. No word is 0 but by chance.
    """
    key = np.uint64((seed * 0x9E3779B97F4A7C15 + tag * 0xD1B54A32D192ED03 + version * 0x8CB92BA72F3D8DD7) % 2**64)
    words = np.arange(-(-nbytes // 8), dtype=np.uint64) * np.uint64(0xA0761D6478BD642F) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(31)
    bytes_ = words.view(np.uint8)[:nbytes]
    bytes_.flags.writeable = False
    return bytes_


class Recorder:
    """Appends events to a file. Safe to share among threads and processes; what was recorded survives their end."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, event: str, position: int, *numbers: int) -> None:
        os.write(self._handle, f"{event} {position} {' '.join(map(str, numbers))}\n".encode())


@dataclass(slots=True)
class Life:
    """What happened to one range, which its tag tells from all others."""

    nbytes: int
    begun: list[tuple[int, int]] = field(default_factory=list)
    """Position before it began, and version, in order."""
    durable: list[tuple[int, int]] = field(default_factory=list)
    """Position after it was promised, and version."""

    def begun_by(self, point: int) -> list[int]:
        """Return the versions of which the disk may have something after `point` entries, in order."""
        return [version for position, version in self.begun if position <= point]

    def promised_by(self, point: int) -> int:
        """Return the last version that was promised to be durable after `point` entries; 0 if none."""
        return max((version for position, version in self.durable if position <= point), default=0)


@dataclass(slots=True)
class History:
    """All events of one workload."""

    seed: int
    nbytes: int = 0
    """Of the store."""
    created: int | None = None
    """Position after the creation was promised."""
    lives: dict[int, Life] = field(default_factory=dict)
    """By tag."""

    @classmethod
    def load(cls, path: Path, seed: int) -> "History":
        """Read what a `Recorder` wrote: lines ``created``, ``begun`` and ``durable``, the position, and numbers.

        The numbers are the bytes of the store; tag, version and bytes of the range; tag and version.
        """
        history = cls(seed)
        for line in path.read_text().splitlines():
            event, *words = line.split()
            position, *numbers = map(int, words)
            match event, numbers:
                case "created", [nbytes]:
                    history.created, history.nbytes = position, nbytes
                case "begun", [tag, version, nbytes]:
                    history.lives.setdefault(tag, Life(nbytes)).begun.append((position, version))
                case "durable", [tag, version]:
                    history.lives[tag].durable.append((position, version))
                case _:
                    raise ValueError(f"no event: {line!r}")
        return history

    def promises(self) -> list[int]:
        """Return the positions at which something was promised, as often as there were promises."""
        found = [position for life in self.lives.values() for position, _ in life.durable]
        return sorted(found if self.created is None else [*found, self.created])

    def version_of(self, tag: int, data: NDArray[np.uint8], point: int) -> int:
        """Return the version that `data` is, exactly, of those begun; 0 if it is none."""
        life = self.lives.get(tag)
        if life is not None and len(data) == life.nbytes:
            for version in reversed(life.begun_by(point)):
                if np.array_equal(data, content(self.seed, tag, version, life.nbytes)):
                    return version
        return 0
