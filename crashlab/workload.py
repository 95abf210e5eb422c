"""Workload: what fills a store while the disk keeps its log.

``python -m crashlab.workload FOLDER POSITION EVENTS SEED AGAIN [PLANT]`` makes FOLDER/store, or goes on with it if
AGAIN is 1, and fills it in several lives, each a process of its own with four threads. They write ranges of mixed
sizes, rewrite some, give some up in the middle, and flush all or some of their own. A life ends by closing, by exiting
without, or in the midst of it; the next one resumes the store, in the same boot or after one that it takes for a
reset. The seed chooses all of it but the order among the threads. What was begun and promised goes to EVENTS (see
`crashlab.history`).
"""

import contextlib
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

import blockstore as bs
from blockstore import journal, ledger
from crashlab.check import Verdict, check_store
from crashlab.disk import Position
from crashlab.history import History, Recorder, content
from crashlab.plants import PLANTS

Outcome = Literal["closed", "left", "killed"]

LIVES = 6
_THREADS = 4
_ACTS = 20
_STORES = (12 << 20, (12 << 20) + 1000)
_ACCESS: tuple[Literal["dense", "sparse"] | None, ...] = (None, "dense", "sparse")
_OUTCOMES: tuple[Outcome, ...] = ("closed", "left", "left", "killed", "killed")
_BEYOND = 1 << 62  # a point after every event


class _GaveUp(Exception):
    """Raised inside a writer, on purpose."""


class Filler:
    """One thread of one life: it alone writes its ranges, while others flush them.

    Parameters
    ----------
    life : Life
    number : int
        Which thread it is.
    """

    def __init__(self, life: "Life", number: int) -> None:
        self._life = life
        self._random = random.Random(f"{life.seed} {life.number} {number}")
        self._tag = (life.number * _THREADS + number + 1) << 20
        self._ranges: dict[int, bs.AllocatedRange] = {}
        self._versions: dict[int, int] = {}

    def act(self) -> None:
        """Do one thing, chosen at random."""
        choice = self._random.random()
        if choice < 0.45 or not self._ranges:
            self._write_fresh()
        elif choice < 0.65:
            self._rewrite()
        elif choice < 0.80:
            self._flush_own()
        elif choice < 0.92:
            self._flush_all()
        elif choice < 0.96:
            self._life.store.flush(wait=False)
        else:
            self._read_back()

    def _write_fresh(self) -> None:
        self._tag += 1
        try:
            r = self._life.store.allocate(_any_size(self._random), tag=self._tag)
        except bs.OutOfSpaceError:
            if self._ranges:
                self._rewrite()
            return
        self._ranges[r.tag] = r
        self._versions[r.tag] = 0
        self._write(r)

    def _rewrite(self) -> None:
        self._write(self._ranges[self._random.choice(list(self._ranges))])

    def _write(self, r: bs.AllocatedRange) -> None:
        """Write the next version of a range, one way or another."""
        life = self._life
        version = self._versions[r.tag] = self._versions[r.tag] + 1
        life.current.pop(r.tag, None)
        life.record("begun", life.position(), r.tag, version, r.nbytes)
        data = content(life.seed, r.tag, version, r.nbytes)
        half = self._random.randint(0, r.nbytes)
        way = self._random.random()
        if way < 0.5:
            r.write(data, rewrite=True)
        else:
            with contextlib.suppress(_GaveUp), r.writer(rewrite=True) as a:
                a[:half] = data[:half]
                if way > 0.95:
                    raise _GaveUp
                a[half:] = data[half:]
        if way <= 0.95:
            life.current[r.tag] = version, r

    def _flush_own(self) -> None:
        own = {tag: self._life.current[tag] for tag in self._ranges if tag in self._life.current}
        if self._random.random() < 0.5:
            own = dict(self._random.sample(sorted(own.items(), key=lambda item: item[0]), len(own) // 2))
        receipts = [r.receipt for _, r in own.values()]
        self._life.store.flush([receipt for receipt in receipts if receipt is not None])
        position = self._life.position()
        for tag, (version, r) in own.items():
            if r.receipt is None or not r.receipt.durable:
                raise RuntimeError(f"range {tag} was flushed, and its receipt is {r.receipt}")
            self._life.record("durable", position, tag, version)

    def _flush_all(self) -> None:
        """Flush what everybody has written; what is rewritten meanwhile is promised nothing."""
        life = self._life
        before = [(tag, version, r.receipt) for tag, (version, r) in life.current.copy().items()]
        life.store.flush()
        position = life.position()
        for tag, version, receipt in before:
            if receipt is not None and receipt.durable and life.current.get(tag, (0,))[0] == version:
                life.record("durable", position, tag, version)

    def _read_back(self) -> None:
        tag = self._random.choice(list(self._ranges))
        if tag in self._life.current:
            version, r = self._life.current[tag]
            if r.read().tobytes() != content(self._life.seed, tag, version, r.nbytes).tobytes():
                raise RuntimeError(f"range {tag} does not have the bytes of version {version} right after writing")


class Life:
    """One process that fills the store for a while."""

    def __init__(self, store: bs.BlockStore, position: Position, record: Recorder, seed: int, number: int) -> None:
        self.store = store
        self.position = position
        self.record = record
        self.seed = seed
        self.number = number
        self.current: dict[int, tuple[int, bs.AllocatedRange]] = {}
        """By tag: the version that was written last and its range, of all threads; not while it is rewritten."""
        self._failed = False

    def fill(self, rng: random.Random, outcome: Outcome) -> None:
        """Run the threads, and end as `outcome` says."""
        killer = rng.randrange(_THREADS), rng.randrange(_ACTS)
        threads = [
            threading.Thread(target=self._run, args=(number, killer if outcome == "killed" else None))
            for number in range(_THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failed:
            os._exit(1)
        if outcome == "closed":
            standing = {tag: version for tag, (version, _) in self.current.items()}
            self.store.close()
            position = self.position()
            for tag, version in standing.items():
                self.record("durable", position, tag, version)

    def _run(self, number: int, killer: tuple[int, int] | None) -> None:
        try:
            filler = Filler(self, number)
            for act in range(_ACTS):
                if killer == (number, act):
                    os._exit(0)
                filler.act()
        except BaseException:
            traceback.print_exc()
            self._failed = True


def live(
    folder: Path, position: Position, record: Recorder, events: Path, seed: int, number: int, outcome: Outcome
) -> None:
    """Create or resume the store, check what was resumed, fill it, and end as `outcome` says."""
    rng = random.Random(f"{seed} {number}")
    path = folder / "store"
    if rng.random() < 0.5:
        _write_journals_often()
    access = rng.choice(_ACCESS)
    if number == 0:
        nbytes = rng.choice(_STORES)
        store = bs.create(
            path,
            nbytes,
            access=access,
            allocator=rng.choice(("sequential", "concurrent")),
            reserve=rng.random() < 0.75,
            checksum=rng.choice((None, "crc32")),
        )
        record("created", position(), nbytes)
    else:
        store = bs.open(path, access=access)
        now = position()
        verdict = Verdict()
        found = check_store(store, History.load(events, seed), _BEYOND, verdict)
        if verdict.findings:
            raise RuntimeError("after reopening: " + "; ".join(verdict.findings[:10]))
        for tag, version in found.items():
            record("durable", now, tag, version)
    Life(store, position, record, seed, number).fill(rng, outcome)


def _write_journals_often() -> None:
    """Let journals be written anew, and grow, after some dozens of records instead of thousands."""
    for module, name, value in ((ledger, "_COMPACT_MIN", 25), (journal, "_GROW_MIN", 4096)):
        if not hasattr(module, name):
            raise AttributeError(f"{module.__name__} has no {name} any more")
        setattr(module, name, value)


def main(folder: Path, position_path: Path, events: Path, seed: int, *, again: bool) -> None:
    """Live all lives, one after the other, each in a child; or, `again`, some more that resume from the start."""
    rng = random.Random(f"{seed} {again}")
    position, record = Position(position_path), Recorder(events)
    numbers = range(LIVES, LIVES + 2) if again else range(LIVES)
    for number in numbers:
        outcome = rng.choice(_OUTCOMES) if number < numbers[-1] else "closed"
        reset = rng.random() < 0.4
        if reset and number > numbers[0]:
            os.environ["BLOCKSTORE_BOOT_ID"] = f"workload, life {number}"
        child = os.fork()
        if child == 0:
            _exit_after(partial(live, folder, position, record, events, seed, number, outcome))
        _, status = os.waitpid(child, 0)
        if status != 0:
            sys.exit(f"life {number} (ends {outcome}, reset before: {reset}) ended with {status}")


def _exit_after(act: Callable[[], None]) -> NoReturn:
    status = 1
    try:
        act()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _any_size(rng: random.Random) -> int:
    low, high = rng.choice(((8, 4096), (4096, 4096), (4097, 20_000), (20_000, 131_072), (20_000, 131_072)))
    return rng.randint(low, high) if rng.random() < 0.95 else 512 << 10


if __name__ == "__main__":
    if sys.argv[6:]:
        PLANTS[sys.argv[6]]()
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), again=sys.argv[5] == "1")
