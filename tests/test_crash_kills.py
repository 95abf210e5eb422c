"""Writers that are killed lose nothing that they acknowledged: the crash laboratory's kills, in small."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import blockstore as bs
from blockstore import _os, opening, sidecar
from blockstore.ledger import Ledger
from blockstore.receipts import Extent
from blockstore.records import WRITTEN, holes

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="writers to kill are forked, and there is no fork")

if hasattr(os, "fork"):
    from crashlab import kills, races


@pytest.fixture
def disk(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> Path:
    bs.create(tmp_path / "probe", 4096).close()
    for path in tmp_path.iterdir():
        path.unlink()
    if any(warning.category is bs.FileSystemWarning for warning in recwarn.list):
        pytest.skip(f"{tmp_path} is in memory, where nothing is durable: pass --basetemp on a disk")
    return tmp_path


def test_writers_that_are_killed_lose_nothing_and_the_next_ones_complete_the_store(disk: Path) -> None:
    report = kills.run(disk, kills=25, races=0, seeds=(0,))

    assert report.findings == ()
    assert report.ok
    assert sum(report.points.values()) >= 25
    assert report.acknowledged > 0
    assert str(report).startswith(f"kills: 0 lost of {report.acknowledged} acknowledged, 0 false, 0 overlaps, ")


def test_of_two_processes_that_create_one_path_one_has_it(disk: Path) -> None:
    assert races.race(disk, 20) == []


# -- the laboratory notices what is broken on purpose -----------------------------------------------


def _late(flush: bool) -> None:
    """Keep records in memory: all until a flush, or each until the next one is made."""
    waiting: list[tuple[Extent, int, int]] = []
    flush_now = Ledger.flush

    def append(ledger: Ledger) -> None:
        while waiting:
            extent, sequence, checksum = waiting.pop(0)
            if extent._sequence == sequence and ledger._journal is not None:
                what = extent._start, extent._stop, extent._nbytes, extent._tag, checksum
                ledger._journal.append(WRITTEN, sequence, *what)

    def record(self: Ledger, extent: Extent, checksum: int = 0) -> int:
        with self._appending:
            if not flush:
                append(self)
            extent._sequence = sequence = self._next
            self._next += 1
            waiting.append((extent, sequence, checksum))
        return sequence

    def append_and_flush(self: Ledger, wanted: Any) -> int:
        with self._appending:
            append(self)
        return flush_now(self, wanted)

    Ledger.record = record  # type: ignore[method-assign]
    Ledger.flush = append_and_flush  # type: ignore[method-assign]


def _records_wait_for_a_flush() -> None:
    _late(flush=True)


def _a_receipt_comes_before_its_record() -> None:
    _late(flush=False)


def _a_rewrite_revokes_nothing() -> None:
    def revoke(self: Ledger, extent: Extent) -> None:
        extent._sequence = None

    Ledger.revoke = revoke  # type: ignore[method-assign]


def _resuming_hands_out_everything() -> None:
    setattr(opening, "holes", lambda receipts, nbytes: holes(receipts[:0], nbytes))  # noqa: B010


def _a_file_has_its_name_before_it_is_whole() -> None:
    create = bs.create

    def create_in_place(path: str, nbytes: int, *, overwrite: bool = False, **options: Any) -> bs.BlockStore:
        Path(path).write_bytes(b"")
        return create(path, nbytes, overwrite=True, **options)

    bs.create = create_in_place  # type: ignore[assignment]


BUGS: list[tuple[Callable[[], None], str]] = [
    (_records_wait_for_a_flush, "written: found None"),
    (_a_receipt_comes_before_its_record, "written: found None"),
    (_a_rewrite_revokes_nothing, "not the bytes of a version that was begun"),
    (_resuming_hands_out_everything, "found None"),
    (_a_file_has_its_name_before_it_is_whole, "does not open"),
]


def _name(bug: object) -> str:
    return getattr(bug, "__name__", "").strip("_").replace("_", " ")


@pytest.mark.parametrize(("bug", "finding"), BUGS, ids=[_name(bug) for bug, _ in BUGS])
def test_kills_find(disk: Path, bug: Callable[[], None], finding: str) -> None:
    report = kills.run(disk, kills=2000, races=0, seeds=(0,), sabotage=bug)

    assert not report.ok
    assert any(finding in text for text in report.findings), report.findings


def test_races_find_a_creation_that_replaces(disk: Path) -> None:
    def replace() -> None:
        publish = _os.publish
        setattr(_os, "publish", lambda *args, overwrite: publish(*args, overwrite=True))  # noqa: B010
        setattr(sidecar, "_check_free", lambda path, overwrite: None)  # noqa: B010

    assert any("won by [0, 1]" in text for text in races.race(disk, 50, replace))
