"""Both allocators hand out every byte exactly once, whatever is asked for, in any number of threads."""

import errno
import heapq
import math
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray
from support import in_threads

from blockstore import ALIGNMENT, ConcurrentAllocator, OutOfSpaceError, SequentialAllocator, align_up, allocators
from blockstore.allocators import Allocator

THREADS = 8
ABSURD = (2**62, 2**63 - 1, 2**63, 2**64, 2**100)

Extents = NDArray[np.int64]
Kind = type[SequentialAllocator] | type[ConcurrentAllocator]


def with_holes(kind: Kind, nbytes: int, holes: Sequence[tuple[int, int]]) -> Allocator:
    """Return an allocator in which only these parts are free, as in a file that is written here and there."""
    allocator = kind(nbytes)
    if isinstance(allocator, SequentialAllocator):
        (allocator._start, allocator._stop), *rest = holes
        allocator._holes.extend(rest)
    else:
        allocator._holes = [(start - stop, start, stop) for start, stop in holes]
        heapq.heapify(allocator._holes)
        allocator._open_next(allocator._window)
    return allocator


class Audit(NamedTuple):
    """Bytes that were handed out more than once, never, and outside the space."""

    twice: int
    missing: int
    outside: int


EXACT = Audit(0, 0, 0)


def audit(extents: Extents, nbytes: int) -> Audit:
    """Compare extents, shape (n, 2), with a space of which each byte is to be handed out once."""
    starts, stops = extents[np.argsort(extents[:, 0], kind="stable")].T
    reach = np.concatenate([[0], np.maximum.accumulate(stops)[:-1]])
    covered = int(np.maximum(stops - np.maximum(starts, reach), 0).sum())
    outside = max(int(stops.max()) - nbytes, 0) + max(-int(starts.min()), 0)
    return Audit(int((stops - starts).sum()) - covered, nbytes - covered + outside, outside)


def drain(allocator: Allocator) -> list[tuple[int, int]]:
    """Hand out what is left."""
    return [(found.start, found.stop) for found in allocator.ranges(1 << 30)]


@pytest.fixture(params=["sequential", "concurrent", "concurrent with a locked cursor"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    if request.param.endswith("cursor"):
        monkeypatch.setattr(allocators, "_Cursor", allocators._LockedCursor)
    return SequentialAllocator if request.param == "sequential" else ConcurrentAllocator


@pytest.fixture
def _impatient() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


impatient = pytest.mark.usefixtures("_impatient")


# -- against a list of holes ----------------------------------------------------------------------

PAGES = 40

pages = st.integers(1, PAGES).map(lambda count: count * ALIGNMENT)
sizes = st.integers(1, 3 * ALIGNMENT) | st.integers(1, PAGES * ALIGNMENT) | pages | st.sampled_from(ABSURD)


@st.composite
def spaces(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """Draw the bytes of a space, most often an odd number, and the holes in it."""
    nbytes = draw(st.integers(1, PAGES * ALIGNMENT))
    if draw(st.booleans()):
        return nbytes, [(0, nbytes)]
    edges = sorted(draw(st.sets(st.integers(0, -(-nbytes // ALIGNMENT)), min_size=2, max_size=8)))
    pairs = zip(edges[::2], edges[1::2], strict=False)
    return nbytes, [(start * ALIGNMENT, min(stop * ALIGNMENT, nbytes)) for start, stop in pairs]


class AllocatorMachine(RuleBasedStateMachine):
    """The model is the list of free holes, ascending."""

    kind: ClassVar[Kind]
    locked_cursor = False

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        if self.locked_cursor:
            self.patch.setattr(allocators, "_Cursor", allocators._LockedCursor)

    @initialize(space=spaces(), nbytes=sizes)
    def begin(self, space: tuple[int, list[tuple[int, int]]], nbytes: int) -> None:
        self.nbytes, holes = space
        self.holes = list(holes)
        self.owed = sum(stop - start for start, stop in holes)
        self.taken: list[tuple[int, int]] = []
        self.allocator = with_holes(self.kind, self.nbytes, holes)
        self.step = nbytes
        self.iterator = self.allocator.ranges(nbytes)

    def fits(self, nbytes: int) -> bool:
        return any(nbytes <= stop - start for start, stop in self.holes)

    def take(self, start: int, stop: int, nbytes: int, *, partial: bool) -> None:
        """Check what was handed out for a request of `nbytes` bytes, and take it out of the model."""
        fitting = [hole for hole in self.holes if partial or nbytes <= hole[1] - hole[0]]
        hole = next(hole for hole in fitting if hole[0] == start)
        if self.kind is SequentialAllocator:
            assert hole == fitting[0]
        assert stop == min(start + align_up(nbytes), hole[1])
        at = self.holes.index(hole)
        self.holes[at : at + 1] = [(stop, hole[1])] if stop < hole[1] else []
        self.taken.append((start, stop))

    def refused(self, call: Callable[[], object], requested: int) -> None:
        """Check that a request which does not fit is refused, with its numbers."""
        with pytest.raises(OutOfSpaceError) as refusal:
            call()
        error = refusal.value
        largest = max((stop - start for start, stop in self.holes), default=0)
        assert (error.requested, error.free, error.largest) == (requested, self.free(), largest)

    def free(self) -> int:
        return sum(stop - start for start, stop in self.holes)

    @rule(nbytes=sizes)
    def allocate(self, nbytes: int) -> None:
        if self.fits(nbytes):
            found = self.allocator.allocate(nbytes)
            self.take(found.start, found.stop, nbytes, partial=False)
        else:
            self.refused(lambda: self.allocator.allocate(nbytes), nbytes)

    @rule(nbytes=sizes)
    def allocate_partial(self, nbytes: int) -> None:
        if self.holes:
            found = self.allocator.allocate(nbytes, partial=True)
            self.take(found.start, found.stop, nbytes, partial=True)
        else:
            self.refused(
                lambda: self.allocator.allocate(min(nbytes, self.nbytes), partial=True), min(nbytes, self.nbytes)
            )

    @rule(count=st.integers(1, 5) | st.sampled_from(ABSURD), nbytes=sizes)
    def allocate_many(self, count: int, nbytes: int) -> None:
        step = align_up(nbytes)
        total = (count - 1) * step + nbytes
        if self.fits(total):
            starts = self.allocator.allocate_many(count, nbytes)
            assert starts.tolist() == [int(starts[0]) + i * step for i in range(count)]
            self.take(int(starts[0]), min(int(starts[0]) + count * step, self.nbytes), total, partial=False)
        else:
            self.refused(lambda: self.allocator.allocate_many(count, nbytes), total)

    @rule()
    def go_on_with_the_iterator(self) -> None:
        found = next(self.iterator, None)
        if found is None:
            assert not self.holes
        else:
            self.take(found.start, found.stop, self.step, partial=True)

    @rule(nbytes=st.integers(-(2**70), 0), partial=st.booleans())
    def ask_for_less_than_nothing(self, nbytes: int, partial: bool) -> None:
        with pytest.raises(ValueError, match=f"cannot allocate {nbytes} bytes: ask for at least 1"):
            self.allocator.allocate(nbytes, partial=partial)

    @precondition(lambda self: self.kind is SequentialAllocator)
    @rule()
    def the_next_start_is_that_of_the_lowest_hole(self) -> None:
        assert self.allocator.next_start == (self.holes[0][0] if self.holes else self.nbytes)

    @rule()
    def the_next_small_request_starts_where_it_was_said(self) -> None:
        expected = self.allocator.next_start
        if self.holes:
            found = self.allocator.allocate(1)
            assert found.start == expected
            self.take(found.start, found.stop, 1, partial=False)
        else:
            assert expected == self.nbytes

    @invariant()
    def the_accounts_are_exact(self) -> None:
        if hasattr(self, "allocator"):
            assert (self.allocator.free, self.allocator.nbytes) == (self.free(), self.nbytes)

    def teardown(self) -> None:
        if hasattr(self, "allocator"):
            self.taken += drain(self.allocator)
            assert sum(stop - start for start, stop in self.taken) == self.owed
            if self.taken:
                assert audit(np.array(self.taken), self.nbytes) == Audit(0, self.nbytes - self.owed, 0)
            assert self.allocator.free == 0
        self.patch.undo()


class SequentialMachine(AllocatorMachine):
    kind = SequentialAllocator


class ConcurrentMachine(AllocatorMachine):
    kind = ConcurrentAllocator


class LockedCursorMachine(AllocatorMachine):
    kind = ConcurrentAllocator
    locked_cursor = True


unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

for machine in (SequentialMachine, ConcurrentMachine, LockedCursorMachine):
    machine.TestCase.settings = unhurried

TestSequentialAllocator = SequentialMachine.TestCase
TestConcurrentAllocator = ConcurrentMachine.TestCase
TestConcurrentAllocatorWithALockedCursor = LockedCursorMachine.TestCase


# -- a million requests in eight threads ----------------------------------------------------------

WHOLE, PARTIAL, MANY = range(3)
REQUESTS = 125_000
"""Of each thread."""


def mixed_requests(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Return pairs of a way to ask and the bytes to ask for. Every hundredth never fits."""
    rng = random.Random(seed)
    ways = rng.choices([WHOLE, PARTIAL, MANY], [90, 8, 2], k=count)
    sizes = rng.choices([1, 100, ALIGNMENT, ALIGNMENT + 1, 10_000, 1 << 16, 0], [16, 16, 32, 16, 14, 5, 1], k=count)
    absurd = [rng.choice([1 << 36, 1 << 45, *ABSURD]) for _ in range(count // 10)]
    return [(way, nbytes) if nbytes else (WHOLE, absurd.pop()) for way, nbytes in zip(ways, sizes, strict=True)]


def demand(requests: list[tuple[int, int]]) -> int:
    """Return the bytes that all of it takes, but for the absurd."""
    return sum(align_up(nbytes) * (3 if way == MANY else 1) for way, nbytes in requests if nbytes < 1 << 36)


def fill_in_threads(allocator: Allocator, requests: list[tuple[int, int]]) -> Extents:
    """Ask for all of it in each thread; return every extent that anyone got."""

    def ask(thread: int) -> Extents:
        extents: list[int] = []
        keep, allocate, allocate_many = extents.append, allocator.allocate, allocator.allocate_many
        first = thread * len(requests) // THREADS
        for way, nbytes in requests[first:] + requests[:first]:
            try:
                if way == MANY:
                    start = int(allocate_many(3, nbytes)[0])
                    stop = min(start + 3 * align_up(nbytes), allocator.nbytes)
                    found = slice(start, stop)
                else:
                    found = allocate(nbytes, partial=way == PARTIAL)
            except OutOfSpaceError:
                continue
            keep(found.start)
            keep(found.stop)
        return np.array(extents, np.int64).reshape(-1, 2)

    return np.concatenate(in_threads(THREADS, ask))


def with_the_rest(extents: Extents, allocator: Allocator) -> Extents:
    return np.concatenate([extents, np.array(drain(allocator), np.int64).reshape(-1, 2)])


@impatient
def test_of_a_million_mixed_requests_in_eight_threads_none_shares_or_loses_a_byte(kind: Kind) -> None:
    requests = mixed_requests(REQUESTS)
    allocator = kind(demand(requests) * THREADS * 49 // 50 + 321)  # so that the space is used up on the way

    extents = fill_in_threads(allocator, requests)

    assert not (extents[:, 0] % ALIGNMENT).any()
    assert allocator.free == allocator.nbytes - int((extents[:, 1] - extents[:, 0]).sum())
    assert audit(with_the_rest(extents, allocator), allocator.nbytes) == EXACT


def let_others_in() -> None:
    """Give up the GIL, and wait for nothing: so that a gap between two steps is never too narrow to be hit."""
    time.sleep(0)


class TwoSteps(SequentialAllocator):
    """A broken twin: it reads the cursor, and moves it later."""

    def _take(self, nbytes: int, partial: bool) -> tuple[int, int]:
        start = self._start
        stop = min(start + align_up(nbytes), self._stop)
        if start == stop or (nbytes > stop - start and not partial):
            raise OutOfSpaceError(nbytes, stop - start, stop - start)
        let_others_in()
        self._start = stop
        return start, stop


class TwoStepCursor(allocators._LockedCursor):
    """A broken twin of the cursor: a count that is read, and set later."""

    def seek(self, offset: int, whence: int = 0) -> int:
        position = self.tell() * whence + offset
        let_others_in()
        self._position = position
        return position


class BurnsWhatDoesNotFit(SequentialAllocator):
    """A broken twin: it moves the cursor before it looks whether the request fits."""

    def _take(self, nbytes: int, partial: bool) -> tuple[int, int]:
        with self._lock:
            start = self._start
            self._start = stop = min(start + align_up(nbytes), self._stop)
        if start == stop or (nbytes > stop - start and not partial):
            raise OutOfSpaceError(nbytes, 0, 0)
        return start, stop


class BurnsTheTail(ConcurrentAllocator):
    """A broken twin: whoever moves the cursor past the stop does not put back what is left."""

    def _turn(self, window: allocators._Window, start: int, nbytes: int, partial: bool) -> tuple[int, int] | None:
        window.settled.set()
        raise OutOfSpaceError(nbytes, 0, 0)


@impatient
@pytest.mark.parametrize("twin", ["sequential", "concurrent"])
def test_the_audit_catches_a_twin_that_hands_out_bytes_twice(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocators, "_Cursor", TwoStepCursor)
    requests = mixed_requests(1_000)
    nbytes = 2 * demand(requests) * THREADS
    allocator = TwoSteps(nbytes) if twin == "sequential" else ConcurrentAllocator(nbytes)

    assert audit(fill_in_threads(allocator, requests), nbytes).twice > 0


@impatient
@pytest.mark.parametrize("twin", [BurnsWhatDoesNotFit, BurnsTheTail])
def test_the_audit_catches_a_twin_that_loses_bytes(twin: Kind) -> None:
    requests = mixed_requests(2_000)
    allocator = twin(demand(requests) * THREADS * 49 // 50 + 321)

    extents = with_the_rest(fill_in_threads(allocator, requests), allocator)

    assert audit(extents, allocator.nbytes).missing > 0


@pytest.mark.parametrize(
    ("extents", "found"),
    [
        pytest.param([(0, 40), (40, 100)], EXACT, id="exact"),
        pytest.param([(40, 100), (0, 40)], EXACT, id="in any order"),
        pytest.param([(0, 60), (40, 100)], Audit(20, 0, 0), id="overlap"),
        pytest.param([(0, 100), (10, 20), (30, 40)], Audit(20, 0, 0), id="inside another"),
        pytest.param([(0, 100), (0, 100), (0, 100)], Audit(200, 0, 0), id="three times"),
        pytest.param([(10, 40), (50, 90)], Audit(0, 30, 0), id="gaps"),
        pytest.param([(0, 110)], Audit(0, 0, 10), id="past the end"),
    ],
)
def test_the_audit_counts_bytes(extents: list[tuple[int, int]], found: Audit) -> None:
    assert audit(np.array(extents), 100) == found


# -- races ----------------------------------------------------------------------------------------


@impatient
def test_in_a_race_for_the_last_bytes_all_of_them_are_handed_out(kind: Kind) -> None:
    rounds = [kind((5 + i % 30) * ALIGNMENT + i * 37 % ALIGNMENT + 1) for i in range(300)]
    together = threading.Barrier(THREADS)

    def grab(thread: int) -> list[list[tuple[int, int]]]:
        found = []
        for i, allocator in enumerate(rounds):
            mine: list[tuple[int, int]] = []
            found.append(mine)
            together.wait()
            for partial in (False, True):
                try:
                    while True:
                        part = allocator.allocate((1 + (thread + i) % 4) * ALIGNMENT, partial=partial)
                        mine.append((part.start, part.stop))
                except OutOfSpaceError:
                    pass
        return found

    for allocator, *parts in zip(rounds, *in_threads(THREADS, grab), strict=True):
        extents = np.array([extent for part in parts for extent in part])
        assert audit(extents, allocator.nbytes) == EXACT


@impatient
def test_a_request_that_fits_is_never_refused_because_of_one_that_does_not(kind: Kind) -> None:
    each = 1_000
    allocator = kind((THREADS // 2 * each + 1) * ALIGNMENT)
    allocator.allocate(1)  # from now on the whole space is more than there is

    def ask(thread: int) -> None:
        for _ in range(each):
            if thread % 2:
                allocator.allocate(ALIGNMENT)
            else:
                with pytest.raises(OutOfSpaceError):
                    allocator.allocate(allocator.nbytes)

    in_threads(THREADS, ask)

    assert allocator.free == 0


@impatient
def test_an_iterator_of_ranges_is_shared_by_threads(kind: Kind) -> None:
    allocator = kind(10_000 * ALIGNMENT + 1)
    ranges = allocator.ranges(2 * ALIGNMENT)

    shares = in_threads(THREADS, lambda _: [(found.start, found.stop) for found in ranges])

    assert sum(map(len, shares)) == 5_001
    extents = np.array([extent for share in shares for extent in share])
    assert audit(extents, allocator.nbytes) == EXACT


# -- a thread that is interrupted on its way ------------------------------------------------------


@pytest.fixture(params=[None, allocators._LockedCursor], ids=["cursor of this Python", "locked cursor"])
def interrupted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ConcurrentAllocator:
    """Return an allocator with 3 of 10 pages free, where a caller moved the cursor past them and vanished."""
    monkeypatch.setattr(allocators, "_Cursor", request.param or allocators._Cursor)
    monkeypatch.setattr(allocators, "_SETTLE_SECONDS", 0)
    allocator = ConcurrentAllocator(10 * ALIGNMENT)
    allocator.allocate(7 * ALIGNMENT)
    allocator._window.advance(4 * ALIGNMENT, 1)
    return allocator


@pytest.mark.parametrize("nbytes", [1, 10 * ALIGNMENT])
def test_the_others_do_not_wait_for_a_caller_that_was_interrupted(
    interrupted: ConcurrentAllocator, nbytes: int
) -> None:
    with pytest.raises(OutOfSpaceError, match="0 bytes are free"):
        interrupted.allocate(nbytes)


def test_bytes_come_back_with_a_caller_that_was_interrupted(interrupted: ConcurrentAllocator) -> None:
    window = interrupted._window
    with pytest.raises(OutOfSpaceError):
        interrupted.allocate(1)

    with pytest.raises(OutOfSpaceError, match="12288 bytes are free"):
        interrupted._turn(window, 7 * ALIGNMENT, 4 * ALIGNMENT, False)

    assert interrupted.free == 3 * ALIGNMENT
    assert drain(interrupted) == [(7 * ALIGNMENT, 10 * ALIGNMENT)]


def test_the_free_bytes_are_known_although_a_caller_was_interrupted(
    interrupted: ConcurrentAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Impatient(threading.Event):
        waits = 0

        def wait(self, timeout: float | None = None) -> bool:
            self.waits += 1
            if self.waits > 100:
                pytest.fail("it waits for ever for a caller that does not come")
            return super().wait(timeout)

    monkeypatch.setattr(interrupted._window, "settled", Impatient())

    assert interrupted.free == 0


def test_absurd_requests_cannot_move_the_cursor_past_what_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocators, "_SETTLE_SECONDS", 0)
    allocator = ConcurrentAllocator(2**62)
    allocator.allocate(1)
    allocator._window.advance(2**62, 1)

    with pytest.raises(OutOfSpaceError, match="0 bytes are free"):
        allocator.allocate(2**62)


# -- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 8191, 2**31 + 1, 2**62 - 1, 2**62])
def test_a_space_of_any_size_can_be_taken_whole(kind: Kind, nbytes: int) -> None:
    allocator = kind(nbytes)

    assert allocator.allocate(nbytes) == slice(0, nbytes)
    assert (allocator.free, allocator.next_start) == (0, nbytes)


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        pytest.param(1, (0, 4096), id="a byte takes a page"),
        pytest.param(4096, (0, 4096), id="a page"),
        pytest.param(4097, (0, 8192), id="a page and a byte take two"),
        pytest.param(8193, (0, 10_000), id="the last page is short"),
        pytest.param(10_000, (0, 10_000), id="all of it"),
    ],
)
def test_a_request_is_rounded_up_to_pages_and_cut_at_the_end(kind: Kind, asked: int, given: tuple[int, int]) -> None:
    assert kind(10_000).allocate(asked) == slice(*given)


@pytest.mark.parametrize("nbytes", [*ABSURD, 10_001])
def test_a_partial_request_takes_what_there_is(kind: Kind, nbytes: int) -> None:
    allocator = kind(10_000)
    allocator.allocate(1)

    assert allocator.allocate(nbytes, partial=True) == slice(4096, 10_000)


@pytest.mark.parametrize("nbytes", [np.int16(5000), np.uint64(5000), np.int64(5000)], ids=repr)
def test_a_byte_count_may_be_a_numpy_integer(kind: Kind, nbytes: int) -> None:
    found = kind(10_000).allocate(nbytes)

    assert found == slice(0, 8192)
    assert (type(found.start), type(found.stop)) == (int, int)


def test_many_ranges_are_an_array_of_starts(kind: Kind) -> None:
    allocator = kind(1 << 20)
    allocator.allocate(1)

    starts = allocator.allocate_many(4, 5000)

    assert starts.dtype == np.int64
    np.testing.assert_array_equal(starts, 4096 + 8192 * np.arange(4))
    assert allocator.free == (1 << 20) - 4096 - 4 * 8192


def test_the_last_of_many_ranges_may_end_in_the_last_page(kind: Kind) -> None:
    allocator = kind(8192 + 5000)

    assert allocator.allocate_many(2, 5000).tolist() == [0, 8192]
    assert allocator.free == 0


def test_many_ranges_are_all_handed_out_or_none(kind: Kind) -> None:
    allocator = kind(4 * 8192)

    with pytest.raises(OutOfSpaceError, match="cannot allocate 37768 bytes: 32768 bytes are free"):
        allocator.allocate_many(5, 5000)

    assert (allocator.free, allocator.next_start) == (4 * 8192, 0)


def test_the_sequential_allocator_takes_the_lowest_hole_that_fits() -> None:
    allocator = with_holes(SequentialAllocator, 100_000, [(4096, 8192), (12288, 24576), (32768, 100_000)])

    assert [allocator.allocate(nbytes).start for nbytes in (8192, 4096, 8192, 1)] == [12288, 4096, 32768, 20480]


def test_the_concurrent_allocator_takes_from_every_hole() -> None:
    holes = [(4096, 8192), (12288, 24576), (32768, 100_000)]
    allocator = with_holes(ConcurrentAllocator, 100_000, holes)

    found = [allocator.allocate(nbytes) for nbytes in (100_000 - 32768, 8192, 4096, 4096)]

    assert sorted((part.start, part.stop) for part in found) == [
        (4096, 8192),
        (12288, 20480),
        (20480, 24576),
        (32768, 100_000),
    ]


def test_the_next_hole_may_be_just_large_enough(kind: Kind) -> None:
    allocator = with_holes(kind, 100_000, [(4096, 16384), (20480, 28672)])

    assert [allocator.allocate(8192).start for _ in range(2)] == [4096, 20480]
    assert allocator.free == 4096


def test_a_hole_that_is_too_small_is_kept_for_a_smaller_request(kind: Kind) -> None:
    allocator = with_holes(kind, 100_000, [(4096, 8192), (12288, 24576)])

    with pytest.raises(OutOfSpaceError):
        allocator.allocate(12289)

    assert sorted(allocator.allocate(nbytes).start for nbytes in (12288, 4096)) == [4096, 12288]


def test_an_allocator_says_how_much_is_free(kind: Kind) -> None:
    allocator = kind(10_000)
    allocator.allocate(1)

    assert repr(allocator) == f"<{kind.__name__}: 5904 of 10000 bytes free>"


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("holes", "nbytes", "message"),
    [
        pytest.param([(0, 10_000)], 10_001, "cannot allocate 10001 bytes: 10000 bytes are free", id="one hole"),
        pytest.param(
            [(0, 4096), (8192, 10_000)],
            4097,
            "cannot allocate 4097 bytes: 5904 bytes are free, the largest hole has 4096 bytes",
            id="two holes",
        ),
        pytest.param([(8192, 10_000)], 2**100, f"cannot allocate {2**100} bytes: 1808 bytes are free", id="absurd"),
    ],
)
def test_a_refusal_says_what_was_asked_and_what_is_there(
    kind: Kind, holes: list[tuple[int, int]], nbytes: int, message: str
) -> None:
    free = [stop - start for start, stop in holes]

    with pytest.raises(OSError, match=f"{message}$") as refusal:
        with_holes(kind, 10_000, holes).allocate(nbytes)

    error = refusal.value
    assert isinstance(error, OutOfSpaceError)
    assert (error.requested, error.free, error.largest) == (nbytes, sum(free), max(free))
    assert (error.errno, error.strerror) == (errno.ENOSPC, message)


def test_a_full_space_refuses_even_a_partial_request(kind: Kind) -> None:
    allocator = kind(10_000)
    allocator.allocate(10_000)

    with pytest.raises(OutOfSpaceError, match="cannot allocate 1 bytes: 0 bytes are free"):
        allocator.allocate(1, partial=True)


def test_a_refusal_of_a_partial_request_says_what_was_asked(kind: Kind) -> None:
    allocator = kind(10_000)
    allocator.allocate(10_000)

    with pytest.raises(OutOfSpaceError, match="cannot allocate 10001 bytes: 0 bytes are free"):
        allocator.allocate(10_001, partial=True)


def test_a_refusal_crosses_processes_with_its_numbers() -> None:
    error = pickle.loads(pickle.dumps(OutOfSpaceError(5, 4, 3)))

    assert (error.requested, error.free, error.largest, error.errno) == (5, 4, 3, errno.ENOSPC)
    assert str(error) == str(OutOfSpaceError(5, 4, 3))


@pytest.mark.parametrize("nbytes", [0, -1, -(2**63), 2**62 + 1, 2**63, 2**100])
def test_a_space_that_no_file_has_is_refused(kind: Kind, nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"hands out 1 to 2\\*\\*62 bytes, not {nbytes}$"):
        kind(nbytes)


@pytest.mark.parametrize("nbytes", [1.0, math.inf, "1", None, b"1"], ids=repr)
def test_a_byte_count_that_is_no_integer_is_refused(kind: Kind, nbytes: int) -> None:
    allocator = kind(10_000)
    calls: list[Callable[[], object]] = [
        lambda: allocator.allocate(nbytes),
        lambda: allocator.allocate(nbytes, partial=True),
        lambda: allocator.allocate_many(1, nbytes),
        lambda: allocator.allocate_many(nbytes, 1),
        lambda: allocator.ranges(nbytes),
        lambda: kind(nbytes),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="int"):
            call()
    assert (allocator.free, allocator.next_start) == (10_000, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda a: a.allocate(0), "cannot allocate 0 bytes: ask for at least 1", id="allocate"),
        pytest.param(lambda a: a.allocate_many(2, 0), "cannot allocate 0 bytes: ask for at least 1", id="many of 0"),
        pytest.param(lambda a: a.allocate_many(0, 2), "a count is at least 1, not 0", id="0 of many"),
        pytest.param(lambda a: a.allocate_many(-1, 2), "a count is at least 1, not -1", id="-1 of many"),
        pytest.param(lambda a: a.ranges(0), "cannot allocate 0 bytes: ask for at least 1", id="ranges"),
        pytest.param(lambda a: a.ranges(-1), "cannot allocate -1 bytes: ask for at least 1", id="ranges of -1"),
    ],
)
def test_less_than_a_byte_is_refused_at_once(kind: Kind, call: Callable[[Allocator], object], message: str) -> None:
    allocator = kind(10_000)

    with pytest.raises(ValueError, match=message):
        call(allocator)

    assert (allocator.free, allocator.next_start) == (10_000, 0)
