"""A damaged journal is believed in what is whole, and in nothing else: the crash laboratory's fuzzing, in small."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import PORTABLE

from blockstore import journal, resume
from blockstore.records import RECORD, Draft
from crashlab import fuzz

Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.skipif(PORTABLE, reason="a journal is read by the same code everywhere")
def test_cut_off_anywhere_flipped_and_mixed_up_a_journal_says_what_its_whole_records_say(tmp_path: Path) -> None:
    report = fuzz.run(flips=2_400, splices=140, seeds=(0,), folder=tmp_path)

    assert report.findings == ()
    assert report.ok
    assert report.truncations >= 4096 + fuzz.COUNT * RECORD.itemsize
    assert report.believed > 100_000
    assert report.refused > 4096
    assert str(report) == (
        f"journal fuzzing: 0 false of {report.believed} receipts believed, 0 missed, 0 damages unreported, "
        f"0 undocumented exceptions, {report.truncations} truncations, 2400 flips, 140 splices, seeds 0"
    )


def test_so_it_is_for_a_store_that_was_closed_and_one_that_was_poisoned(tmp_path: Path) -> None:
    report = fuzz.run(truncations=False, flips=600, splices=60, seeds=(1, 2), folder=tmp_path)

    assert report.findings == ()
    assert report.ok


# -- what fuzzing goes by ---------------------------------------------------------------------------


def test_the_reading_in_plain_python_takes_a_record_for_what_it_is() -> None:
    raw = Draft(bytes(range(16)), 77).pack(1, 5, 4096, 8192, 100, 9, 3)

    assert fuzz.fact_of(raw, bytes(range(16))) == (1, 77, 5, 4096, 8192, 100, 9, 3)
    assert fuzz.fact_of(raw, bytes(16)) is None
    assert fuzz.fact_of(raw[:-1], bytes(range(16))) is None
    assert fuzz.fact_of(raw[:50] + b"!" + raw[51:], bytes(range(16))) is None


# -- the laboratory notices what is broken on purpose -------------------------------------------------


def _crc_not_checked(patch: pytest.MonkeyPatch) -> None:
    magic = np.frombuffer(Draft(bytes(16), 0).pack(1, 0, 0, 0, 0, 0, 0), RECORD)["magic"]
    patch.setattr(journal, "valid", lambda records: records["magic"] == magic)


def _uuid_not_checked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(journal, "own", lambda records, uuid: np.ones(len(records), np.bool_))


def _damage_not_told(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(resume, "_lost", lambda content, epoch: 0)


def _stops_at_the_first_damage(patch: pytest.MonkeyPatch) -> None:
    valid = journal.valid
    patch.setattr(journal, "valid", lambda records: np.logical_and.accumulate(valid(records)))


def _void_not_known(patch: pytest.MonkeyPatch) -> None:
    standing = resume.standing

    def without(records: np.ndarray[Any, Any], epoch: int) -> Any:
        kept = records.copy()
        kept["kind"][kept["kind"] == 4] = 0
        return standing(kept, epoch)

    patch.setattr(resume, "standing", without)


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (_crc_not_checked, "false"),
        (_uuid_not_checked, "false"),
        (_damage_not_told, "unreported"),
        (_stops_at_the_first_damage, "missed"),
        (_void_not_known, "false"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Patch, kind: str) -> None:
    plant(monkeypatch)

    report = fuzz.run(truncations=False, flips=150, splices=70, seeds=(2,), folder=tmp_path)

    assert getattr(report, kind) > 0
    assert report.findings
    assert not report.ok
