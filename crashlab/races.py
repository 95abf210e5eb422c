"""Races: two processes create a store at one path at the same time, and exactly one of them has it."""

import mmap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import blockstore as bs
from crashlab.truth import SIZE, Truth, content, fork, nbytes_of

_JOBS = 4


def race(folder: Path, rounds: int, sabotage: Callable[[], object] | None = None) -> list[str]:
    """Let two processes create the same path at the same time, many times; return what went wrong, in words.

    Each round, one wins, fills the store and closes it; the other gets `FileExistsError`, and does no harm. `sabotage`
    is called in both first, to break blockstore there.
    """
    shared = mmap.mmap(-1, 16)
    turns = np.frombuffer(shared, np.uint64)
    paths = [folder / f"race-{number}.bin" for number in range(rounds)]

    def compete(me: int, say: Callable[..., None]) -> None:
        if sabotage is not None:
            sabotage()
        for number, path in enumerate(paths):
            turns[me] = number + 1
            while turns[1 - me] <= number:
                time.sleep(0)
            try:
                with bs.create(path, _JOBS * SIZE) as store:
                    for job in range(_JOBS):
                        store.allocate(nbytes_of(job), tag=job).write(content(me, job, number))
                say("won", number)
            except FileExistsError:
                say("lost", number)

    children = [fork(lambda say, me=me: compete(me, say)) for me in range(2)]  # type: ignore[misc]
    failures = [f"race: wait status {status}" for child in children if (status := child.end())]
    told = [{line[1]: line[0] for line in child.lines if line[0] in ("won", "lost")} for child in children]
    failures += [" ".join(line) for child in children for line in child.lines if line[0] == "x"]
    for number, path in enumerate(paths):
        winners = [me for me in range(2) if told[me].get(str(number)) == "won"]
        if len(winners) != 1 or len([1 for told_by in told if str(number) in told_by]) != 2:
            failures.append(f"race {number}: won by {winners}")
            continue
        truth = Truth(str(path), winners[0])
        for job in range(_JOBS):
            truth.hear(["b", str(job), str(number), "0", "0"])
            truth.hear(["w", str(job), str(number)])
        truth.check(f"race {number}")
        failures += truth.failures
    names = {path.name for path in folder.iterdir()} - {path.name for path in paths}
    strays = [name for name in names if not any(name.startswith(path.name) for path in paths)]
    failures += [f"race: {name} is left over" for name in strays]
    for path in folder.iterdir():
        path.unlink()
    return failures
