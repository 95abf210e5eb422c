"""Publishing: how the working file of a shard gets its final name, and what is there if that is interrupted.

Write what makes it a file of the format, flush, rename, and only then remove the journal: at each instant either the
working file and its journal tell what is written, or the published file does. From the moment in which the working file
is closed the shard knows nothing by itself, so that after an error or Ctrl-C it is the disk that says what there is.
"""

import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from blockstore import _os, sidecar
from blockstore.draft import copy_of, mark_of, working_of
from blockstore.errors import ClosedStoreError, NotWrittenError, WriterBusyError
from blockstore.layouts.npy import encode_header
from blockstore.layouts.shard_index import encode_index
from blockstore.published import Published
from blockstore.shard import Shard
from blockstore.working import copy_bytes, mark, runs, tidy, unlink


def publish(shard: Shard, *, closing: bool = False) -> None:
    """Flush, and bring the working file under its final name, in one step; do nothing if there is none.

    What is not written stays out. Raises `WriterBusyError` if somebody is writing; when `closing`, what they write
    is cut off from the file instead, and they get `ClosedStoreError`. Takes nothing away that is published: raises
    `NotWrittenError` if a rewrite did not come to its end, or, when `closing`, leaves all as it is.
    """
    with shard.lock:
        shard.find()
        if shard.kind != "working":
            return
        if shard.store is None:
            shard.open_working()
        store = shard.store
        if store is None or (not shard.written().any() and shard.layout.count):
            return
        if shard.plan.metadata is None and not shard.written().all():
            return
        busy = [start for start, held in store._claims.copy().items() if held() is not None]
        if busy and not closing:
            at = int(np.searchsorted(shard.layout.starts(), busy[0]))
            raise WriterBusyError(f"cannot publish {shard.plan.name!r}: block {shard.block_index(at)} is being written")
        if (number := shard.lacking()) is not None:
            if closing:
                return
            raise NotWrittenError(
                f"cannot publish {shard.plan.name!r}: block {shard.block_index(number)} is published, and not written "
                "since a rewrite of it began: a reader would lose it"
            )
        file = store._mapped.file
        for offset, text in _frame(shard, shard.written()):
            _os.put_at(file, text, offset)
        if store.flush() == 0:  # which may have found nothing to do
            store.sync()
        shard.leave_working()
        _rename(shard)
        shard.become_published()


def _frame(shard: Shard, written: NDArray[np.bool_]) -> Iterator[tuple[int, bytes]]:
    """Return what makes the bytes of blocks a file of the format, and where it goes."""
    layout = shard.layout
    if layout.is_array and written.all():
        yield 0, encode_header(layout.region, layout.dtype)
    if shard.plan.metadata is not None:
        yield layout.data_stop, encode_index(layout, shard.plan.grid.per_shard, written)


def _rename(shard: Shard) -> None:
    work, directory = working_of(shard.path), os.path.dirname(shard.path)
    if shard.plan.keep_journal:
        sidecar.check_replaceable(shard.path)
    if shard.plan.metadata is not None or shard.plan.replaces or os.path.lexists(mark_of(shard.path)):
        os.replace(work, shard.path)
    else:
        try:
            os.link(work, shard.path)
        except FileExistsError:
            raise _os.exists(shard.path) from None
        os.unlink(work)
    shard.plan.replaces = True
    tidy(shard.plan, shard.path)
    _os.sync_directory(directory)


def snapshot(shard: Shard) -> None:
    """Put a copy of an incomplete ``.npy`` file under its final name; it is filled further where it is.

    What is published and not written now is kept as it is published.
    """
    with shard.lock:
        shard.find()
        if shard.kind == "working" and shard.store is None:
            shard.open_working()
        store = shard.store
        if store is None:
            return
        store.flush()
        layout, written = shard.layout, shard.written()
        frozen = store._mapped.frozen
        if frozen is None:
            raise ClosedStoreError(f"the array {shard.plan.path!r} is closed")
        directory = os.path.dirname(shard.path)
        source = Published(layout, frozen, written, None, (), None)
        with _os.nameless(directory) as (file, name):
            os.ftruncate(file.fileno(), shard.total_nbytes)
            _os.put_at(file, encode_header(layout.region, layout.dtype), 0)
            for start, run in runs(source, layout):
                copy_bytes(file, start, run)
            if (old := _published_before(shard)) is not None:
                for number in np.flatnonzero(~written).tolist():
                    copy_bytes(file, layout.start(number), old.raw(number))
            _os.sync_file(file)
            _own_name(shard)
            unlink(copy_of(shard.path))
            _os.publish(file, name, copy_of(shard.path), directory, overwrite=False)
        os.replace(copy_of(shard.path), shard.path)
        mark(shard.path)  # only now where another file was replaced
        _os.sync_directory(directory)


def _published_before(shard: Shard) -> Published | None:
    """Return the ``.npy`` under the final name, if it is of this array."""
    if not (shard.plan.rewrites or os.path.lexists(mark_of(shard.path))) or not os.path.lexists(shard.path):
        return None
    return shard.read_published()


def _own_name(shard: Shard) -> None:
    """See to it that the final name of an ``.npy`` file may be replaced from now on, also by whoever goes on."""
    if shard.plan.replaces:
        return
    if not os.path.lexists(mark_of(shard.path)):
        if os.path.lexists(shard.path):
            raise _os.exists(shard.path)
        mark(shard.path)
        _os.sync_directory(os.path.dirname(shard.path))
    shard.plan.replaces = True
