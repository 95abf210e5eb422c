"""Arrays that are filled by processes that are killed, and polled meanwhile: two parts of the laboratory, in small."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import blockstore as bs
from blockstore import publishing
from blockstore.files import Files
from blockstore.ledger import Ledger
from blockstore.receipts import Extent
from blockstore.records import WRITTEN
from blockstore.shard import Shard

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="writers to kill are forked, and there is no fork")

if hasattr(os, "fork"):
    from crashlab import array_kills, readers


@pytest.fixture
def disk(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> Path:
    bs.create(tmp_path / "probe", 4096).close()
    for path in tmp_path.iterdir():
        path.unlink()
    if any(warning.category is bs.FileSystemWarning for warning in recwarn.list):
        pytest.skip(f"{tmp_path} is in memory, where nothing is durable: pass --basetemp on a disk")
    return tmp_path


def test_arrays_whose_writers_are_killed_are_in_the_end_those_of_an_uninterrupted_run(disk: Path) -> None:
    report = array_kills.run(disk, kills=15, seeds=(2,))

    assert report.findings == ()
    assert report.ok
    assert sum(report.points.values()) >= 15
    assert report.acknowledged > 0
    assert report.completed > 0
    assert str(report).startswith(
        f"array kills: 0 lost of {report.acknowledged} acknowledged, 0 false, 0 filled twice, "
    )


def test_readers_see_what_is_final_or_the_fill_value_while_writers_publish_and_are_killed(disk: Path) -> None:
    if lacks := readers.missing():
        pytest.skip("; ".join(lacks))

    report = readers.run(disk, rounds=1, seeds=(0,), scenes=readers.SCENES[2::2], plants=tuple(readers.PLANTS))

    assert report.findings == ()
    assert report.ok
    assert report.plants.keys() == readers.PLANTS.keys()
    assert report.kills > 0
    assert report.between["zarr"] > 0
    assert report.between["tensorstore"] > 0
    assert report.reads["numpy"] > 0


def test_a_watch_finds_each_thing_that_no_reader_may_see() -> None:
    scene = readers.Scene("tiles", "x.zarr", (4, 6), (2, 3))
    first, whole = (slice(0, 2), slice(0, 3)), (slice(0, 4), slice(0, 6))

    def seen(*found: Callable[[Any], Any]) -> list[str]:
        watch = readers.Watch(scene, seed=5)
        for each in found:
            watch.see("read", each(watch.final.copy()), whole)
        return [text.removeprefix("read: ") for text in watch.findings]

    def with_first(value: int) -> Callable[[Any], Any]:
        def put(a: Any) -> Any:
            a[first] = value
            return a

        return put

    def torn(a: Any) -> Any:
        a[0, 0] = -1
        return a

    assert seen(with_first(-1), lambda a: a) == []
    assert seen(lambda a: a, with_first(-1)) == [
        "6 values were seen before, and are the fill value now: the first at [0, 0]"
    ]
    assert seen(with_first(0)) == ["6 values are neither final nor fill: 0 the first at [0, 0]"]
    assert seen(torn) == ["blocks [0] are there in part"]
    assert seen(lambda a: a[1:]) == ["got (3, 6) of int32"]


# -- the laboratory notices what is broken on purpose -----------------------------------------------


def _records_wait_for_a_flush() -> None:
    waiting: list[tuple[Extent, int, int]] = []
    flush = Ledger.flush

    def record(self: Ledger, extent: Extent, checksum: int = 0) -> int:
        with self._appending:
            extent._sequence = sequence = self._next
            self._next += 1
            waiting.append((extent, sequence, checksum))
        return sequence

    def append_and_flush(self: Ledger, wanted: Any, **options: Any) -> int:
        with self._appending:
            while waiting:
                extent, sequence, checksum = waiting.pop(0)
                if extent._sequence == sequence and self._journal is not None:
                    what = extent._start, extent._stop, extent._nbytes, extent._tag, checksum
                    self._journal.append(WRITTEN, sequence, *what)
        return flush(self, wanted, **options)

    Ledger.record = record  # type: ignore[method-assign]
    Ledger.flush = append_and_flush  # type: ignore[method-assign]


def _resuming_fills_everything_again() -> None:
    _after_opening(lambda shard: [shard.note(number, None) for number in range(shard.layout.count)])


def _what_an_attempt_left_stays() -> None:
    _after_opening(lambda shard: shard.touched.fill(False))


def _after_opening(step: Callable[[Shard], object]) -> None:
    open_working = Shard.open_working

    def open_and_step(self: Shard) -> None:
        open_working(self)
        step(self)

    Shard.open_working = open_and_step  # type: ignore[method-assign]


def _the_journal_goes_before_the_file_has_its_name() -> None:
    rename = publishing._rename

    def tidy_first(shard: Shard) -> None:
        publishing.tidy(shard.plan, shard.path)
        rename(shard)

    setattr(publishing, "_rename", tidy_first)  # noqa: B010


def _the_draft_stays() -> None:
    Files._end_draft = lambda self: None  # type: ignore[method-assign]


BUGS: list[tuple[Callable[[], None], str]] = [
    (_records_wait_for_a_flush, "was written, and is not any more"),
    (_resuming_fills_everything_again, "is not any more"),
    (_what_an_attempt_left_stays, "is lent with something else than the fill value"),
    (_the_journal_goes_before_the_file_has_its_name, "has no journal"),
    (_the_draft_stays, ".filling.json is left over"),
]


def _name(bug: object) -> str:
    return getattr(bug, "__name__", "").strip("_").replace("_", " ")


@pytest.mark.parametrize(("bug", "finding"), BUGS, ids=[_name(bug) for bug, _ in BUGS])
def test_kills_of_those_who_fill_find(disk: Path, bug: Callable[[], None], finding: str) -> None:
    report = array_kills.run(disk, kills=1000, seeds=(0,), cases=array_kills.CASES[:1], sabotage=bug)

    assert not report.ok
    assert any(finding in text for text in report.findings), report.findings
