"""Options: what a caller of `create` or `open` may choose, and what each choice means for the layers below."""

from collections.abc import Callable
from typing import Literal

from blockstore import _os
from blockstore.allocators import Allocator, ConcurrentAllocator, SequentialAllocator
from blockstore.mapped import MappedFile
from blockstore.ranges import AllocatedRange
from blockstore.views import Layout
from blockstore.writers import DetachedWriter, EagerWriter, Writer, sparse_writer

AllocatorKind = Literal["sequential", "concurrent"]
Access = Literal["dense", "sparse"]
Guard = Literal["flag", "seal"]
Escaped = Literal["warn", "raise", "ignore"]

_ALLOCATORS: dict[str, type[Allocator]] = {"sequential": SequentialAllocator, "concurrent": ConcurrentAllocator}


class Options:
    """What a caller may choose, checked.

    `eager` is for files that are flushed when they are full: then the disk is to be at work before.
    """

    __slots__ = ("access", "escaped", "sealing", "writer")

    def __init__(self, access: str | None, guard: str, escaped: str, *, eager: bool = False) -> None:
        self.access = None if access is None else choice("access", access, tuple(_os.ADVICE))
        self.sealing = choice("guard", guard, ("flag", "seal")) == "seal"
        self.escaped = choice("escaped", escaped, ("warn", "raise", "ignore"))
        self.writer: Callable[[AllocatedRange, Layout | None, bool], Writer] = (
            DetachedWriter
            if self.sealing
            else sparse_writer
            if self.access == "sparse"
            else EagerWriter
            if eager and self.access == "dense"
            else Writer
        )

    def map(self, file: _os.File, *, writable: bool, zeroed: bool = False, advice: str | None = None) -> MappedFile:
        """Map a file as these options say; `advice` is for where the caller does not say how it is accessed."""
        return MappedFile(
            file,
            writable=writable,
            zeroed=zeroed,
            dense=self.access == "dense",
            advice=self.access or advice,
            sealing=self.sealing,
        )


def allocator_class(name: str) -> type[Allocator]:
    """Return the allocator of a name."""
    return _ALLOCATORS[choice("allocator", name, tuple(_ALLOCATORS))]


def choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return `value` if it is one of the allowed ones, or raise a `ValueError` that names them."""
    if value not in allowed:
        raise ValueError(f"{name} is one of {', '.join(map(repr, allowed))}, not {value!r}")
    return value
