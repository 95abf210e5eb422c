"""Verifying: read the blocks of a file back, and compare them with the checksums that its journal keeps."""

from collections.abc import Callable

import numpy as np

from blockstore import _os, sidecar
from blockstore.checksums import checksum_function
from blockstore.resume import peek
from blockstore.shard import Shard


def verify(shard: Shard, progress: Callable[[int], object] | None) -> list[int]:
    """Return the numbers of the blocks whose bytes have not the checksum that their journal keeps.

    Raises `ValueError` if there is none.
    """
    if not shard.counts()[0]:
        return []
    with shard.lock:
        shard._frozen()
        store, published = shard.store, shard._published
    if store is not None:
        differing: list[int] = store.verify(progress=progress)["tag"].tolist()
        return differing
    file = _os.open_file(shard.path, writable=False)
    found = sidecar.find(shard.path, file, writable=False, adopt=True)
    if found is None or found.header.checksum is None or published is None:
        why = "it was published without keep_journal=True" if found is None else "it was created without checksum="
        raise ValueError(f"there are no checksums of {shard.plan.path!r}: {why}")
    digest, starts = checksum_function(found.header.checksum), shard.layout.starts()
    wrong: list[int] = []
    for start, nbytes, checksum in peek(found, 0)[["start", "nbytes", "checksum"]].tolist():
        if digest(published.frozen[start : start + nbytes]) != checksum:
            wrong.append(int(np.searchsorted(starts, start, "right")) - 1)  # an .npy may be opened in other blocks
        if progress is not None:
            progress(nbytes)
    return sorted(set(wrong))
