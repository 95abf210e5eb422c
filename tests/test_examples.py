"""The examples: each runs by itself, says what it did, and leaves the bytes that it says."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import blockstore as bs

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(name: str, *arguments: str, cwd: Path) -> list[str]:
    """Run an example with warnings as errors; return the lines it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.bin"


@pytest.mark.parametrize("name", NAMES)
def test_each_runs_without_arguments_and_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    assert run(name, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_asyncio_store_renders_the_whole_picture(path: Path) -> None:
    assert run("asyncio_store.py", str(path), cwd=path.parent) == ["12 of 12 tiles are durable, 393216 bytes"]

    c = np.linspace(-2.2, 0.8, 512) + 1j * np.linspace(-1.2, 1.2, 384)[:, None]
    z, steps = np.zeros_like(c), np.zeros(c.shape, "<u2")
    for _ in range(40):
        inside = np.abs(z) <= 2
        z = np.where(inside, z * z + c, z)
        steps += inside
    assert 0 < (steps == 40).mean() < 1
    differ = np.fromfile(path, "<u2").reshape(384, 512) != steps
    assert differ.mean() < 0.001, "more than what another order of rounding explains"


def test_trio_store_stores_every_message_once(path: Path) -> None:
    expected = sorted(
        f"producer {producer}, message {number}\n".encode() * (1 + number * 7)
        for producer in range(3)
        for number in range(40)
    )

    total = sum(map(len, expected))
    output = run("trio_store.py", str(path), cwd=path.parent)

    assert output == [f"120 messages are durable, {total} bytes, 0 bytes are left"]
    data, found, start = path.read_bytes(), [], 0
    while start < len(data):
        line = data[start : data.index(b"\n", start) + 1]
        nbytes = len(line) * (1 + int(line.split()[-1]) * 7)
        stop = start + bs.align_up(nbytes)
        found.append(data[start : start + nbytes])
        assert not any(data[start + nbytes : stop])
        start = stop
    assert sorted(found) == expected


def test_thread_logs_leave_the_lines_of_each_thread_in_its_own_region(path: Path) -> None:
    output = run("thread_logs.py", str(path), cwd=path.parent)

    assert output == [
        f"region {thread}: 500 lines, 5 warnings, last: WARNING worker-{thread} step 499" for thread in range(4)
    ]
    expected = b""
    for thread in range(4):
        levels = ("WARNING" if step % 100 == 99 else "INFO" for step in range(500))
        lines = "".join(f"{level} worker-{thread} step {step}\n" for step, level in enumerate(levels))
        expected += lines.encode().ljust(1 << 16, b"\0")
    assert path.read_bytes() == expected


def test_block_update_leaves_the_balances_that_the_transfers_make(path: Path) -> None:
    output = run("block_update.py", str(path), cwd=path.parent)

    assert output == [
        "opened 16384 accounts: 64 blocks are durable",
        "after 2000 transfers: 16384000 in all accounts, 64 blocks are durable",
        "the first receipt of all: <WriteReceipt [0, 4096) 4096 bytes, revoked>",
    ]
    balances, changes = [1000] * 16384, [0] * 16384
    for source, target in np.random.default_rng(1).integers(16384, size=(2000, 2)).tolist():
        balances[source] -= 10
        balances[target] += 10
        changes[source] += 1
        changes[target] += 1
    accounts = np.fromfile(path, [("balance", "<i8"), ("changes", "<u8")])
    np.testing.assert_array_equal(accounts["balance"], balances)
    np.testing.assert_array_equal(accounts["changes"], changes)
