"""Calls of the system that fail are told and believed: the crash laboratory's faults, in small."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import blockstore as bs
from blockstore import _os, sidecar
from blockstore.journal import Journal
from blockstore.ledger import Ledger

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes that meet faults are forked")

if hasattr(os, "fork"):
    from crashlab import faults
    from crashlab.faulty import Fault, Trial
    from crashlab.truth import boot_restored

DATA_SYNC = "fsync" if _os.PORTABLE else "fdatasync"


@pytest.fixture
def disk(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> Path:
    bs.create(tmp_path / "probe", 4096).close()
    for path in tmp_path.iterdir():
        path.unlink()
    if any(warning.category is bs.FileSystemWarning for warning in recwarn.list):
        pytest.skip(f"{tmp_path} is in memory, where nothing is durable: pass --basetemp on a disk")
    return tmp_path


def test_every_call_that_fails_is_told_and_nothing_is_believed_that_is_not_there(disk: Path) -> None:
    report = faults.run(disk, every=17, seeds=(0,))

    assert report.findings == ()
    assert report.ok
    assert report.acknowledged > 0
    assert report.waiting == 8
    assert set(report.calls) >= {"fsync", "pwrite", "link", "replace"}
    assert str(report).startswith(f"faults (in process): 0 lost of {report.acknowledged} acknowledged, 0 false, ")


def test_a_call_that_the_kernel_lets_fail_is_told_as_well(disk: Path) -> None:
    if missing := faults.missing():
        pytest.skip("; ".join(missing))

    report = faults.run(disk, strace=True, calls=["fdatasync"], every=40, seeds=(0,))

    assert report.findings == ()
    assert str(report).startswith("faults (strace): 0 lost of ")


# -- the laboratory notices what is broken on purpose -----------------------------------------------


def _a_failed_sync_is_tried_again() -> None:
    def twice(self: Ledger, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError:
            call()

    Ledger._or_poison = twice  # type: ignore[method-assign]


def _a_failed_sync_is_forgotten() -> None:
    def report(self: Ledger, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError as error:
            raise bs.PoisonedStoreError(errno.EIO, "the sync failed") from error

    Ledger._or_poison = report  # type: ignore[method-assign]


def _a_failed_sync_is_not_noted_in_the_journal() -> None:
    Journal.append_last = lambda *args: None  # type: ignore[method-assign]


def _a_flush_keeps_errors_to_itself() -> None:
    flush = Ledger.flush

    def quiet(self: Ledger, wanted: Any) -> int:
        with contextlib.suppress(OSError):
            return flush(self, wanted)
        return 0

    Ledger.flush = quiet  # type: ignore[method-assign]


def _a_failed_creation_leaves_files() -> None:
    @contextlib.contextmanager
    def leave(path: str, file: Any) -> Iterator[None]:
        yield

    for module in (_os, sidecar):
        if hasattr(module, "removed_on_error"):
            setattr(module, "removed_on_error", leave)  # noqa: B010


BUGS: list[tuple[Callable[[], None], str]] = [
    (_a_failed_sync_is_tried_again, "succeeded though"),
    (_a_failed_sync_is_forgotten, "succeeded on a poisoned store"),
    (_a_failed_sync_is_not_noted_in_the_journal, "not the bytes of a version that was begun"),
    (_a_flush_keeps_errors_to_itself, "succeeded though"),
    (_a_failed_creation_leaves_files, "a failed creation left"),
]


def _name(bug: object) -> str:
    return getattr(bug, "__name__", "").strip("_").replace("_", " ")


@pytest.mark.parametrize(("bug", "finding"), BUGS, ids=[_name(bug) for bug, _ in BUGS])
def test_faults_find(disk: Path, bug: Callable[[], None], finding: str) -> None:
    call = "fsync" if bug is _a_failed_creation_leaves_files else DATA_SYNC
    report = faults.run(disk, calls=[call], every=3, seeds=(0,), sabotage=bug)

    assert not report.ok
    assert any(finding in text for text in report.findings), report.findings


@pytest.mark.parametrize("bug", [_a_failed_sync_is_tried_again, _a_failed_sync_is_forgotten], ids=_name)
def test_threads_that_wait_find(disk: Path, bug: Callable[[], None]) -> None:
    assert faults.waiting(disk / "data.bin", 1, bug) != []


def test_a_call_that_was_not_made_to_fail_is_noticed(disk: Path) -> None:
    judge = faults.Judge(disk, 0)
    path, trial = judge.path(), Trial(Fault("link", 99), False, False)

    with boot_restored():
        judge.judge(trial, path, *faults.in_process(path, 0, trial))

    assert judge.failures == ["seed 0, link 99 EIO, gone on: the first call that failed was None"]
