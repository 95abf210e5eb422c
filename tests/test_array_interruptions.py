"""Arrays that live on after a step of theirs was interrupted or failed, and steps that come in between each other."""

import contextlib
import errno
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import interrupt_at

import blockstore as bs
from blockstore import _os, files, mapped, publishing, shard, store, working
from blockstore.draft import draft_of, working_of
from blockstore.files import Files
from blockstore.shard import Shard

WATCHED = {module.__file__ for module in (files, publishing, shard, working, store, mapped)}
FORMATS = ("x.npy", "x.zarr", "several.zarr")


@pytest.fixture(params=FORMATS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def created(path: Path, *, overwrite: bool = False) -> bs.BlockArray:
    shards = 2 if path.name.startswith("several") else None
    return bs.create_array(path, shape=(4,), dtype="i8", chunks=(1,), shards=shards, overwrite=overwrite)


def goes_on(x: bs.BlockArray, value: int) -> dict[int, int]:
    """Write every block, and return what was acknowledged. Whatever is refused is refused with an error."""
    written = {}
    for i in range(4):
        try:
            x[i] = value + i
        except (bs.BlockStoreError, OSError):
            continue
        written[i] = value + i
    return written


def abandoned(x: bs.BlockArray) -> None:
    """Leave an array by an exception, which itself may find that the array is in no state to be flushed."""
    with contextlib.suppress(bs.BlockStoreError, OSError):
        x.__exit__(KeyError, KeyError(), None)


def read_anew(path: Path) -> list[int]:
    with bs.open_array(path, mode="r") as x:
        return [int(value) for value in x[:]]


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
def test_an_array_that_was_interrupted_in_publish_loses_nothing_of_what_is_written_afterwards(
    path: Path, again: bool
) -> None:
    for moment in range(0, 10_000, 5):
        x = created(path, overwrite=True)
        x[:] = [1, 2, 3, 4]
        if again:
            x.publish()
            x[:] = [5, 6, 7, 8]
        came = interrupt_at(moment, x.publish, WATCHED)
        acknowledged = goes_on(x, 10)
        abandoned(x)
        with bs.open_array(path) as x:
            found = {i: int(x[i]) for i in acknowledged}
        assert found == acknowledged, f"at moment {moment}"
        if not came:
            break
    assert 50 < moment < 9_999


STEPS = {
    "the index or header": (_os, "put_at"),
    "the flush": (store.BlockStore, "flush"),
    "the sync": (store.BlockStore, "sync"),
    "the close": (store.BlockStore, "close"),
    "the cut": (mapped.MappedFile, "cut_off"),
    "the name": (publishing, "_rename"),
    "the replacement": (os, "replace"),
    "what is left": (publishing, "tidy"),
    "the folder": (_os, "sync_directory"),
}


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("step", STEPS)
def test_an_array_whose_publication_failed_at_any_step_loses_nothing_of_what_is_written_afterwards(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str, behind: bool
) -> None:
    owner, name = STEPS[step]
    really = getattr(owner, name)

    def fail(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, really)
        if behind:
            really(*args, **kwargs)
        raise OSError(errno.EFBIG, "File too large")

    x = created(path)
    x[:] = [1, 2, 3, 4]
    monkeypatch.setattr(owner, name, fail)
    with contextlib.suppress(OSError):  # not every one of the three takes every step
        x.publish()
    monkeypatch.setattr(owner, name, really)
    for i in range(4):
        x[i] = 10 + i
    assert [int(value) for value in x[:]] == [10, 11, 12, 13]
    x.close()

    assert read_anew(path) == [10, 11, 12, 13]


def test_a_rewrite_that_begins_while_the_last_file_is_published_has_its_draft(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, leave = threading.Event(), threading.Event()
    x = created(path)
    x[:] = [1, 2, 3, 4]

    def rewrite() -> None:
        with x.blocks[0].writer(rewrite=True) as a:
            inside.set()
            leave.wait()
            a[:] = 9

    thread = threading.Thread(target=rewrite)
    is_published = Shard.is_published.fget
    assert is_published is not None

    def and_then_somebody_begins(self: Shard) -> bool:
        answer: bool = is_published(self)
        if answer and last(self) and not thread.ident:
            thread.start()
            inside.wait()
        return answer

    monkeypatch.setattr(Shard, "is_published", property(and_then_somebody_begins))
    x.publish()
    monkeypatch.undo()
    try:
        assert inside.is_set()
        assert os.path.lexists(working_of(x._files.shard((0,)).path))
        assert os.path.lexists(draft_of(x.path))
        with pytest.raises(bs.StoreInUseError):
            bs.open_array(path)
    finally:
        leave.set()
        thread.join()
    abandoned(x)
    with bs.open_array(path) as x:
        assert [int(value) for value in x[:]] == [9, 2, 3, 4]


def last(self: Shard) -> bool:
    return self.index == tuple(n - 1 for n in self.plan.grid.files)


def test_no_block_is_lost_of_rewriters_beside_a_publisher(tmp_path: Path) -> None:
    stop = threading.Event()
    x = bs.create_array(tmp_path / "x.zarr", shape=(8, 100), dtype="i8", chunks=(2, 100), shards=(4, 100))
    x[...] = 0

    def publish() -> None:
        while not stop.is_set():
            with contextlib.suppress(bs.WriterBusyError, bs.NotWrittenError):
                x.publish()

    done = dict.fromkeys(range(4), 0)

    def rewrite(block: int) -> None:
        value = 0
        while not stop.is_set():
            value += 1
            try:
                x[2 * block : 2 * block + 2] = value
            except bs.WriterBusyError:
                continue
            done[block] = value
            assert os.path.lexists(draft_of(x.path)) or x._files.shard((block // 2,)).kind == "published"

    threads = [threading.Thread(target=publish), *(threading.Thread(target=rewrite, args=(i,)) for i in range(4))]
    for thread in threads:
        thread.start()
    while min(done.values()) < 20:
        stop.wait(0.001)
    stop.set()
    for thread in threads:
        thread.join()
    abandoned(x)

    with bs.open_array(tmp_path / "x.zarr") as x:
        assert {i: int(x[2 * i, 0]) for i in range(4)} == done
    assert isinstance(x._files, Files)
    assert np.all(np.asarray(list(done.values())) >= 20)
