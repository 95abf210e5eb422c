"""Which stores this process has open, and what becomes of them when it forks.

A forked child shares every map with its parent. It must not go on with the parent's ranges, nor let an array that it
inherited reach the file; so each store is disowned in the child, before any of its code runs.
"""

import os
import weakref
from typing import Protocol

from blockstore.mapped import MappedFile


class Store(Protocol):
    """What is asked of a store here."""

    _mapped: MappedFile
    _down: str | None

    def _disown(self) -> None:
        """Cut everything off from the file, and refuse all further use."""


_stores: "weakref.WeakValueDictionary[int, Store]" = weakref.WeakValueDictionary()


def add(store: Store) -> None:
    """Keep an eye on a store, for as long as it lives."""
    _stores[id(store)] = store


def stores() -> list[Store]:
    """Return the stores that are open. Taking the list is one atomic step."""
    alive = [reference() for reference in _stores.valuerefs()]
    return [store for store in alive if store is not None and store._down is None]


def _disown_all() -> None:
    """Leave every store to the parent. Only the forking thread is left, so no lock may be taken."""
    for store in stores():
        store._disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)
