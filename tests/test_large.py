"""Large arrays: a terabyte of a million blocks takes the memory of a thousand, or a few bytes for each block.

Files are sparse. Counted are bytes and objects; nothing is timed, which ``python -m benchmarks.large`` does.
"""

import json
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from support import run_python

from benchmarks import large

FEW, MANY = 1_000, 1_000_000
BYTES_PER_BLOCK = 64
"""That a step may allocate at most, for a while: a few numbers of 64 bits."""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a file is sparse only if one asks for it")


def life(kind: str, count: int) -> dict[str, Any]:
    """Go through all steps of an array but those that iterate over each block, in this process.

    Returns by the name of the step what it allocated at most, how many objects it left, and what it returned; and the
    bytes of disk that all files take in the end.
    """
    with TemporaryDirectory(prefix="blockstore-large-") as folder:
        large.costs(large.steps(Path(folder) / f"w.{kind}", 10, 4096), trace=True)  # imports, caches
        told: dict[str, Any] = {}
        for name, step in large.steps(Path(folder) / f"x.{kind}", count):
            if not name.startswith("all of"):
                cost, returned = large.cost(step, trace=True)
                told[name] = cost.traced, cost.blocks, returned
        told["disk"] = sum(path.stat().st_blocks * 512 for path in Path(folder).rglob("*"))
    return told


@cache
def told(kind: str, count: int) -> dict[str, Any]:
    """Return `life` in a process of its own."""
    ran = run_python("import json, sys, test_large as t; print(json.dumps(t.life(sys.argv[1], int(sys.argv[2]))))",
                     kind, count)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


@pytest.mark.parametrize("kind", large.FORMATS)
def test_of_a_million_blocks_the_right_ones_are_written_pending_and_read(kind: str) -> None:
    returned = {name: each[2] for name, each in told(kind, MANY).items() if name != "disk"}

    assert returned["read of a block"] == returned["x[i, 5], reopened"] == returned["x[i, 5], to read"] == 1
    assert returned["x[i, 5]"] == 0
    assert returned["next(pending()), unfinished"] == [0, 0]
    assert returned["written, unfinished"] == 1
    assert returned["flush"] == 1
    assert f"{MANY} blocks of (1, 1048576), 1 written, 1 durable" in returned["repr, unfinished"]
    if kind == "zarr":
        assert returned["next(pending()), to read"] == [1, 0]
        assert returned["written, to read"] == 2


@pytest.mark.parametrize("kind", large.FORMATS)
def test_opening_and_creating_takes_the_same_whatever_the_number_of_blocks(kind: str) -> None:
    few, many = told(kind, FEW), told(kind, MANY)

    for name in ("open_array, unfinished", "open_array, to read", "create_array"):
        journal = 2 << 20 if name == "create_array" else 0  # it has space for some records, and is not kept in memory
        assert many[name][0] <= few[name][0] + (64 << 10) + journal, name
        assert many[name][0] < 4 << 20, name


@pytest.mark.parametrize("kind", large.FORMATS)
def test_no_step_leaves_an_object_for_each_block(kind: str) -> None:
    few, many = told(kind, FEW), told(kind, MANY)

    assert {name: each[1] for name, each in many.items() if name != "disk" and abs(each[1] - few[name][1]) > 100} == {}


@pytest.mark.parametrize("kind", large.FORMATS)
def test_no_step_takes_more_than_a_few_bytes_for_each_block(kind: str) -> None:
    few, many = told(kind, FEW), told(kind, MANY)
    most = BYTES_PER_BLOCK * MANY

    assert {name: each[0] for name, each in many.items() if name != "disk" and each[0] > few[name][0] + most} == {}


@pytest.mark.parametrize("kind", large.FORMATS)
def test_a_terabyte_of_which_two_blocks_are_written_takes_little_of_the_disk(kind: str) -> None:
    assert told(kind, MANY)["disk"] < 64 << 20
