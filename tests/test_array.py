"""BlockArray: what is written is read, what is not is the fill value, and a published file never changes."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import in_threads

import blockstore as bs
from blockstore.shard import Shard

FORMATS = ("x.npy", "x.zarr")


@pytest.fixture(params=FORMATS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


@pytest.fixture
def x(path: Path) -> Iterator[bs.BlockArray]:
    with bs.create_array(path, shape=(10, 6), dtype="i4", chunks=(4, 6)) as array:
        yield array


def number(a: np.ndarray[Any, Any], block: bs.Block) -> None:
    a[...] = 1 + block.index[0]


def names(folder: Path) -> set[str]:
    return {str(each.relative_to(folder)) for each in folder.rglob("*")}


def test_a_finished_array_is_a_clean_artefact(path: Path) -> None:
    with bs.create_array(path, shape=(10, 6), dtype="i4", chunks=(4, 6)) as x:
        x.fill(number)

    found = names(path.parent)
    assert found in ({"x.npy"}, {"x.zarr", "x.zarr/zarr.json", "x.zarr/c", "x.zarr/c/0", "x.zarr/c/0/0"})


def test_nothing_is_under_the_final_name_of_an_npy_before_it_is_complete(tmp_path: Path) -> None:
    with bs.create_array(tmp_path / "x.npy", shape=(10, 6), dtype="i4", chunks=(4, 6)) as x:
        x[0:4] = 1
        x.flush()
        assert not (tmp_path / "x.npy").exists()
    assert not (tmp_path / "x.npy").exists()

    with bs.open_array(tmp_path / "x.npy") as x:
        assert [b.index for b in x.pending()] == [(1, 0), (2, 0)]
        x.fill(number)
    assert np.load(tmp_path / "x.npy")[:, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]


def test_an_exception_publishes_nothing_and_loses_nothing(path: Path) -> None:
    with (
        contextlib.suppress(KeyError),
        bs.create_array(path, shape=(10, 6), dtype="i4", chunks=(4, 6)) as x,
    ):
        x[0:4] = 5
        raise KeyError

    assert not path.exists() or not (path / "c/0/0").exists()
    with bs.open_array(path) as x:
        assert x.written.tolist() == [[True], [False], [False]]
        assert x[0:5, 0].tolist() == [5, 5, 5, 5, 0]


def test_a_published_file_never_changes(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    with bs.create_array(path, shape=(10, 6), dtype="i4", chunks=(4, 6), fill_value=7) as x:
        x[0:4] = 1
        x.publish()
        before = (path / "c/0/0").read_bytes()
        old = np.memmap(path / "c/0/0", np.uint8, "r")
        x[4:8] = 2
        x[0:4] = 3
        x.flush()
        assert old.tobytes() == before == (path / "c/0/0").read_bytes()
        assert x[:, 0].tolist() == [3, 3, 3, 3, 2, 2, 2, 2, 7, 7]
        x.publish()
        assert old.tobytes() == before != (path / "c/0/0").read_bytes()
    with bs.open_array(path, mode="r") as y:
        assert y[:, 0].tolist() == [3, 3, 3, 3, 2, 2, 2, 2, 7, 7]


def test_a_view_that_escaped_cannot_change_a_published_file(path: Path) -> None:
    x = bs.create_array(path, shape=(4, 6), dtype="i4", chunks=(4, 6), escaped="ignore")
    with x.blocks[0, 0].writer() as a:
        a[:] = 1
        late = a[1:]
    x.close()
    late[:] = 9

    expected = 9 if os.environ.get("BLOCKSTORE_PORTABLE", "0") not in ("", "0") else 1
    with bs.open_array(path, mode="r") as y:
        assert int(y[1, 0]) == expected


def test_each_file_of_several_is_seen_when_it_is_complete_and_durable(tmp_path: Path) -> None:
    with bs.create_array(tmp_path / "x.zarr", shape=(8, 8), dtype="u1", chunks=(2, 8), shards=(4, 8)) as x:
        x[0:2] = 1
        x.flush()
        assert not (tmp_path / "x.zarr/c/0/0").exists()
        x[2:4] = 2
        assert not (tmp_path / "x.zarr/c/0/0").exists()
        x.flush()
        assert (tmp_path / "x.zarr/c/0/0").exists()
        assert not (tmp_path / "x.zarr/c/1/0").exists()


def test_a_fresh_block_holds_the_fill_value_also_after_an_attempt_that_failed(path: Path) -> None:
    fill = 0 if path.suffix == ".npy" else 9
    x = bs.create_array(path, shape=(10, 6), dtype="i4", chunks=(4, 6), fill_value=fill)
    with contextlib.suppress(KeyError), x.blocks[1, 0].writer() as a:
        assert np.all(a == fill)
        a[:] = 5
        raise KeyError
    assert np.all(x[4:8] == fill)
    with x.blocks[1, 0].writer() as a:
        assert np.all(a == fill)
        a[0] = 5
    with contextlib.suppress(KeyError), x.blocks[0, 0].writer() as a:
        a[:] = 6
        raise KeyError
    del a
    x._files.close(publish=False)

    with bs.open_array(path) as x, x.blocks[0, 0].writer() as a:
        assert np.all(a == fill)


def test_a_written_block_is_immutable_unless_asked(x: bs.BlockArray) -> None:
    x[0:4] = 1
    with pytest.raises(bs.AlreadyWrittenError, match=r"cannot write block \(0, 0\) of 'x\.(npy|zarr)'"):
        x.blocks[0, 0].write(np.ones((4, 6), "i4"))
    with x.blocks[0, 0].writer(rewrite=True) as a:
        assert np.all(a == 1)
        a[:] = 2
    assert np.all(x[0:4] == 2)


def test_a_second_writer_of_a_block_is_refused(x: bs.BlockArray) -> None:
    with x.blocks[0, 0].writer() as a:
        a[:] = 1
        with pytest.raises(bs.WriterBusyError, match="block"), x.blocks[0, 0].writer():
            pass
        with pytest.raises(bs.WriterBusyError, match=r"cannot write block \(0, 0\)"):
            x.blocks[0, 0].write(bytes(96))


def test_publishing_while_somebody_writes_is_refused_and_harms_nobody(tmp_path: Path) -> None:
    with bs.create_array(tmp_path / "x.zarr", shape=(10, 6), dtype="i4", chunks=(4, 6)) as x:
        x[0:4] = 1
        with x.blocks[1, 0].writer() as a:
            a[:] = 2
            with pytest.raises(bs.WriterBusyError, match=r"cannot publish 'x.zarr': block \(1, 0\) is being written"):
                x.publish()
        assert x[:, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 0, 0]


def test_rewriting_after_reopening_a_finished_array(path: Path) -> None:
    with bs.create_array(path, shape=(10, 6), dtype="i4", chunks=(4, 6)) as x:
        x.fill(number)
    with bs.open_array(path) as x:
        chunk = x.chunks[0]
        x[0:chunk] = 7
        assert int(x[0, 0]) == 7
    with bs.open_array(path, mode="r") as x:
        assert int(x[0, 0]) == 7
        assert int(x[9, 0]) == (7 if chunk == 10 else 3)


def test_a_receipt_stays_true_through_publishing_and_going_on(tmp_path: Path) -> None:
    with bs.create_array(tmp_path / "x.zarr", shape=(10, 6), dtype="i4", chunks=(4, 6)) as x:
        first = x.blocks[0, 0].write(np.ones((4, 6), "i4"))
        second = x.blocks[1, 0].write(np.ones((4, 6), "i4"))
        assert not first.durable
        x.publish()
        assert first.durable
        x[8:10] = 1
        assert first.durable
        assert second.durable
        x[0:4] = 2
        assert first.revoked
        assert second.durable


def test_publishing_takes_nothing_away_that_is_published(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    x = bs.create_array(path, shape=(10, 6), dtype="i4", chunks=(4, 6))
    x[0:8] = 1
    x.publish()
    with contextlib.suppress(KeyError), x.blocks[0, 0].writer(rewrite=True) as a:
        a[:] = 2
        raise KeyError
    x[8:10] = 3
    with pytest.raises(bs.NotWrittenError, match=r"block \(0, 0\) is published"):
        x.publish()
    x.close()
    del a
    with bs.open_array(path, mode="r") as y:  # sees what is published, as zarr does
        assert y.written.tolist() == [[True], [True], [False]]
    assert zarr_values(path) == [1] * 8 + [0] * 2

    with bs.open_array(path) as x:
        assert x.fill(number) == 1
    assert zarr_values(path) == [1] * 8 + [3] * 2


def zarr_values(path: Path) -> list[int]:
    return [int(value) for value in pytest.importorskip("zarr").open_array(path, mode="r")[:, 0]]


def test_closing_publishes_what_a_killed_process_left(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    x = bs.create_array(path, shape=(10, 6), dtype="i4", chunks=(4, 6))
    x[0:4] = 1
    x._files.close(publish=False)
    bs.open_array(path).close()

    assert zarr_values(path) == [1] * 4 + [0] * 6
    with bs.open_array(path) as x:
        assert x.fill(number) == 2


def test_a_source_that_lies_in_the_array_itself_is_read_before_it_is_overwritten(path: Path) -> None:
    with bs.create_array(path, shape=(8,), dtype="i4", chunks=(2,)) as x:
        x[:] = np.arange(8)
        x[:] = x[::-1]
        assert x[:].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


def test_an_assignment_that_numpy_refuses_changes_nothing(path: Path) -> None:
    with bs.create_array(path, shape=(8,), dtype="u1", chunks=(2,)) as x:
        x[:] = 1
        for wrong, error in (
            (300, OverflowError),
            (["a"] * 8, ValueError),
            (np.arange(7), ValueError),
            (1j, TypeError),
        ):
            with pytest.raises(error):
                x[:] = wrong
        assert x[:].tolist() == [1] * 8


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,), (3, 0, 2)], ids=str)
def test_an_array_without_elements_is_published_like_any_other(path: Path, shape: tuple[int, ...]) -> None:
    with bs.create_array(path, shape=shape, dtype="f8") as x:
        assert x.fill(number) == 0
        assert x[...].shape == shape
    with bs.open_array(path) as x:
        assert (x.shape, x[...].shape, list(x.pending())) == (shape, shape, [])
    if path.suffix == ".npy":
        assert np.load(path).shape == shape
    assert not [name for name in names(path.parent) if "filling" in name]


def test_more_files_than_may_be_open_are_filled_by_more_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockstore.plan.OPEN_FILES", 1)
    with bs.create_array(tmp_path / "x.zarr", shape=(64, 8), dtype="i4", chunks=(2, 8), shards=(4, 8)) as x:
        assert x.fill(number, workers=8) == 32
        assert x[:, 0].tolist() == [1 + i // 2 for i in range(64)]


def test_a_file_that_rests_is_opened_again_to_be_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockstore.plan.OPEN_FILES", 1)
    with bs.create_array(tmp_path / "x.zarr", shape=(12, 8), dtype="i4", chunks=(2, 8), shards=(4, 8)) as x:
        for i in (0, 4, 8):
            x[i : i + 2] = i + 1
        assert x[:, 0].tolist() == [1, 1, 0, 0, 5, 5, 0, 0, 9, 9, 0, 0]
        for i in (2, 6, 10):
            x[i : i + 2] = i
        assert x[:, 0].tolist() == [1, 1, 2, 2, 5, 5, 6, 6, 9, 9, 10, 10]


def test_a_link_to_nothing_is_an_error_and_not_the_fill_value(tmp_path: Path) -> None:
    with bs.create_array(tmp_path / "x.zarr", shape=(4,), dtype="i4") as x:
        x[:] = 1
    (tmp_path / "x.zarr/c/0").rename(tmp_path / "away")
    (tmp_path / "x.zarr/c/0").symlink_to("nowhere")
    with bs.open_array(tmp_path / "x.zarr", mode="r") as x, pytest.raises(bs.FormatError, match="link to nothing"):
        x[:]


def test_a_flush_makes_durable_what_a_killed_process_wrote(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKSTORE_BOOT_ID", "A")
    x = bs.create_array(path, shape=(4,), dtype="i4", chunks=(2,))
    x[:] = 1
    for shard in x._files.known():  # as a kill leaves it: nothing is flushed
        assert shard.store is not None
        monkeypatch.setattr(shard.store._ledger, "flush", lambda *_, **__: 0)
    x._files.close(publish=False)

    x = bs.open_array(path)
    x.flush()
    monkeypatch.setenv("BLOCKSTORE_BOOT_ID", "B")
    x._files.close(publish=False)
    with bs.open_array(path) as x:
        assert x.written.all()


def lost_blocks(folder: Path, rounds: int) -> int:
    """Write the first blocks of new arrays from many threads at once; return how many are not there afterwards."""
    lost = 0
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(rounds):
            with bs.create_array(folder / "x.zarr", shape=(8,), dtype="f8", chunks=1, overwrite=True) as x:
                in_threads(8, lambda i, x=x: x.blocks[i].write(np.ones(1)))  # type: ignore[misc]
                lost += int(np.count_nonzero(~x.written))
    finally:
        sys.setswitchinterval(interval)
    return lost


def test_the_first_blocks_of_an_array_may_be_written_by_many_threads_at_once(tmp_path: Path) -> None:
    assert lost_blocks(tmp_path, 100) == 0


def test_state_that_the_first_writers_make_is_caught_by_the_same_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_to_write = Shard.store_to_write

    def lazily(self: Shard, number: int, **options: Any) -> bs.BlockStore:
        made = self._sequences
        store = store_to_write(self, number, **options)
        self._sequences = made
        return store

    monkeypatch.setattr(Shard, "store_to_write", lazily)
    monkeypatch.setattr(Shard, "sequences", property(made_by_whoever_comes))

    assert lost_blocks(tmp_path, 10) > 0


def made_by_whoever_comes(shard: Shard) -> np.ndarray[Any, Any]:
    made = shard._sequences
    if made is None:
        made = np.full(shard.layout.count, -1, np.int64)
        time.sleep(0)  # so that others come in between for sure, and not once in a hundred times
        shard._sequences = made
    return made


def test_what_is_merely_true_is_remembered_as_a_flag(path: Path) -> None:
    x = bs.create_array(path, shape=(4,), dtype="i4", chunks=(2,), overwrite=1, reserve=0, keep_journal=1)  # type: ignore[arg-type]
    x[0:2] = 1
    x._files.close(publish=False)

    with bs.open_array(path) as x:
        assert x.written.tolist() == [True, False]


def test_a_rewrite_of_one_block_does_not_hide_what_happened_to_another(path: Path) -> None:
    with bs.create_array(path, shape=(64, 64), dtype="i4", chunks=(32, 64), checksum="crc32", keep_journal=True) as x:
        x[:] = 1
    file = path if path.suffix == ".npy" else path / "c/0/0"
    with open(file, "r+b") as opened:
        opened.seek(4096 + 5)
        opened.write(b"!")
    with bs.open_array(path) as x:
        assert x.verify().tolist() == [[0, 0]]
        if path.suffix == ".zarr":  # an .npy does not remember its blocks
            x[32:64] = 2
    with bs.open_array(path, mode="r") as x:
        assert x.verify().tolist() == [[0, 0]]


def test_a_block_of_a_closed_array_can_be_shown(x: bs.BlockArray) -> None:
    block = x.blocks[0, 0]
    x.close()

    assert repr(block) == f"<Block (0, 0) = [0:4, 0:6] of {Path(x.path).name!r}, closed>"


def test_a_reader_is_told_that_the_array_was_replaced(tmp_path: Path) -> None:
    def create(dtype: str) -> bs.BlockArray:
        return bs.create_array(
            tmp_path / "x.zarr", shape=(4, 10), dtype=dtype, chunks=(1, 10), shards=(1, 10), overwrite=True
        )

    with create("f8") as x:
        x[:] = 1.5
    with bs.open_array(tmp_path / "x.zarr", mode="r") as y:
        assert float(y[0, 0]) == 1.5
        with create("i8") as x:
            x[:] = 3
        assert float(y[0, 0]) == 1.5
        with pytest.raises(OSError, match="replaced by another one since it was opened: open it again"):
            y[1, 0]


def test_who_only_reads_sees_what_is_published_of_a_block_that_is_rewritten(path: Path) -> None:
    with bs.create_array(path, shape=(4, 6), dtype="i4", chunks=(2, 6)) as x:
        x[:] = 7
    x = bs.open_array(path)
    with x.blocks[0, 0].writer(rewrite=True) as a:
        a[:] = 8
        with bs.open_array(path, mode="r") as y:
            assert np.all(y[:] == 7)
            assert y.written.all()
    x.close()
    with bs.open_array(path, mode="r") as y:
        assert int(y[0, 0]) == 8


@pytest.mark.skipif(not hasattr(os, "fchmod"), reason="there are no such permissions")
def test_a_file_that_is_written_again_keeps_its_permissions(path: Path) -> None:
    file = path if path.suffix == ".npy" else path / "c/0/0"
    with bs.create_array(path, shape=(4, 6), dtype="i4") as x:
        x[:] = 7
    file.chmod(0o660)
    with bs.open_array(path) as x:
        x[:] = 8

    assert file.stat().st_mode & 0o777 == 0o660


def test_a_block_that_is_named_by_too_few_ints_says_how(tmp_path: Path) -> None:
    with (
        bs.create_array(tmp_path / "x.zarr", shape=(4, 6, 5), dtype="i4", chunks=(1, 6, 5)) as x,
        pytest.raises(IndexError, match=r"for each of 3 axes, such as blocks\[3, 0, 0\]: 3 was given"),
    ):
        x.blocks[3]
