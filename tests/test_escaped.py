"""What outlives a writer is found and reported; what merely looks like it is not."""

import gc
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided, sliding_window_view
from support import PORTABLE

import blockstore as bs
from blockstore import mapped

Array = np.ndarray[Any, Any]
MakeStore = Callable[..., bs.BlockStore]
Make = Callable[..., bs.AllocatedRange]

HANG_SECONDS = 60
"""After which a test that hangs fails."""

SHAPE = (8, 16)
ONES = np.ones(SHAPE).tobytes()

MODES: dict[str, dict[str, Any]] = {
    "flag": {},
    "seal": {"guard": "seal"},
    "window": {"guard": "seal"},
    "sparse": {"access": "sparse"},
}
WINDOW = pytest.param("window", marks=pytest.mark.skipif(PORTABLE, reason="windows are sealed on Linux only"))


@pytest.fixture(params=["flag", "seal", WINDOW, "sparse"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeStore]:
    """Create the store with the given options."""
    if request.param == "window":
        monkeypatch.setattr(mapped, "VIEW_MIN_NBYTES", 1)
    with ExitStack() as stores:

        def make(**options: Any) -> bs.BlockStore:
            options |= MODES[request.param]
            return stores.enter_context(bs.create(tmp_path / "data.bin", 1 << 17, **options))

        yield make


@pytest.fixture
def make(make_store: MakeStore) -> Make:
    """Create the store with the given options, and allocate a range of 8 x 16 float64 that starts at 4096."""

    def make_range(**options: Any) -> bs.AllocatedRange:
        store = make_store(**options)
        store.allocate(100)
        return store.allocate(shape=SHAPE, dtype="f8")

    return make_range


# -- ways to escape -------------------------------------------------------------------------------


class Resident:
    """A thread that is running, and holds a slice until it is dropped."""

    def __init__(self, a: Array) -> None:
        self._release = threading.Event()
        started = threading.Event()
        self._thread = threading.Thread(target=self._hold, args=(a[1:3], started))
        self._thread.start()
        started.wait()

    def _hold(self, part: Array, started: threading.Event) -> None:
        started.set()
        self._release.wait()
        part.sum()

    def drop(self) -> None:
        self._release.set()
        self._thread.join()


def closure(a: Array) -> Callable[[], Any]:
    row = a[1]
    return lambda: row.sum()


def suspended(a: Array) -> Iterator[Any]:
    def sums() -> Iterator[Any]:
        for row in a:
            yield row.sum()

    rows = sums()
    next(rows)
    return rows


def traceback(a: Array) -> Exception:
    def fail(row: Array) -> None:
        raise ArithmeticError(row.sum())

    try:
        fail(a[1])
    except ArithmeticError as error:
        return error
    raise AssertionError("nothing was raised")


class Subclass(np.ndarray[Any, Any]):
    """A subclass as users write them."""


ESCAPES: dict[str, tuple[Callable[[Array], object], int]] = {
    "slice": (lambda a: a[1:3], 1),
    "row": (lambda a: a[1], 1),
    "new axis": (lambda a: a[None], 1),
    "reshape": (lambda a: a.reshape(-1), 1),
    "ravel": (lambda a: a.ravel(), 1),
    "T": (lambda a: a.T, 1),
    "diagonal that writes": (lambda a: np.einsum("ii->i", a[:, :8]), 1),
    "view(dtype)": (lambda a: a.view("u4"), 1),
    "field": (lambda a: a.view([("x", "f4"), ("y", "f4")])["x"], 1),
    "record": (lambda a: a.view([("x", "f4"), ("y", "f4")])[0, 0], 1),
    "real part": (lambda a: a.view("c16").real, 1),
    "split": (lambda a: np.split(a, 4), 4),
    "rows in a list": (lambda a: list(a), SHAPE[0]),
    "slice in a dict": (lambda a: {"row": a[1]}, 1),
    "slice in an attribute": (lambda a: types.SimpleNamespace(row=a[1]), 1),
    "slice in a partial": (lambda a: partial(np.sum, a[1]), 1),
    "closure over a slice": (closure, 1),
    "suspended generator that holds a row": (suspended, 1),
    "frame locals of a traceback": (traceback, 1),
    "running thread that holds a slice": (Resident, 1),
    "memoryview": (memoryview, 1),
    "memoryview of a slice": (lambda a: memoryview(a[1]), 1),
    "array over a memoryview": (lambda a: np.asarray(memoryview(a)), 1),
    "frombuffer": (lambda a: np.frombuffer(a), 1),
    "as_strided": (lambda a: as_strided(a, (2, 2)), 1),
    "sliding windows": (lambda a: sliding_window_view(a, (2, 2), writeable=True), 1),
    "subclass": (lambda a: a.view(Subclass), 1),
    "recarray": (lambda a: a.view(np.recarray), 1),
    "masked array": (lambda a: np.ma.array(a, copy=False), 1),
}

every_escape = pytest.mark.parametrize(("escape", "count"), list(ESCAPES.values()), ids=list(ESCAPES))


def write_and_keep(r: bs.AllocatedRange, escape: Callable[[Array], object], kept: list[Any], **options: Any) -> int:
    """Fill the range and keep what `escape` makes of it; return the number of the line that says ``with``."""
    line = sys._getframe().f_lineno + 1
    with r.writer(**options) as a:
        a[...] = 1
        kept.append(escape(a))
    return line


def write_and_fail(r: bs.AllocatedRange, error: BaseException, kept: list[Any]) -> None:
    """Fill the range, keep a slice, and raise."""
    with r.writer() as a:
        a[...] = 1
        kept.append(a[1:3])
        raise error


def drop(kept: list[Any]) -> None:
    """Let everything that escaped go."""
    while kept:
        holder = kept.pop()
        if isinstance(holder, Resident):
            holder.drop()


@pytest.fixture
def kept() -> Iterator[list[Any]]:
    """Hold what escapes, so that no frame of a test does."""
    holders: list[Any] = []
    yield holders
    drop(holders)


def take_slice(a: Array) -> Array:
    return a[1:3]


# -- escaped="warn" -------------------------------------------------------------------------------


@every_escape
def test_a_view_that_outlives_its_writer_is_warned_of_with_range_and_count(
    make: Make, kept: list[Any], escape: Callable[[Array], object], count: int
) -> None:
    views = "1 view" if count == 1 else f"{count} views"

    with pytest.warns(bs.EscapedViewWarning, match=rf"^{views} of range \[4096, 8192\) outlived the writer") as caught:
        write_and_keep(make(), escape, kept)

    assert len(caught) == 1


def test_the_warning_points_at_the_with_line_of_the_caller(make: Make, kept: list[Any]) -> None:
    with pytest.warns(bs.EscapedViewWarning, match="outlived") as caught:
        line = write_and_keep(make(), take_slice, kept)

    assert (caught[0].filename, caught[0].lineno) == (__file__, line)


def test_a_view_that_is_warned_of_costs_no_receipt(make: Make, kept: list[Any]) -> None:
    r = make()

    with pytest.warns(bs.EscapedViewWarning, match="outlived"):
        write_and_keep(r, take_slice, kept)

    assert r.receipt is not None
    assert r.read().tobytes() == ONES


def test_a_loop_variable_that_is_still_bound_is_a_warning_and_no_error(make: Make) -> None:
    r = make()

    def write_row_by_row() -> None:
        with r.writer() as a:
            for row in a:
                row[:] = 1

    with pytest.warns(bs.EscapedViewWarning, match=r"1 view of range \[4096, 8192\)"):
        write_row_by_row()

    assert r.read().tobytes() == ONES


def test_a_warning_that_is_made_an_error_leaves_no_receipt(make: Make, kept: list[Any]) -> None:
    r = make()

    with warnings.catch_warnings():
        warnings.simplefilter("error", bs.EscapedViewWarning)
        with pytest.raises(bs.EscapedViewWarning, match="outlived"):
            write_and_keep(r, take_slice, kept)

    assert r.receipt is None


def test_a_warning_that_was_made_an_error_leaves_a_range_that_can_be_written(make: Make, kept: list[Any]) -> None:
    r = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error", bs.EscapedViewWarning)
        with pytest.raises(bs.EscapedViewWarning, match="outlived"):
            write_and_keep(r, take_slice, kept)

    drop(kept)
    with r.writer() as a:
        a[...] = 1

    assert r.read().tobytes() == ONES


# -- escaped="raise" ------------------------------------------------------------------------------


@every_escape
def test_on_request_an_escaped_view_is_an_error_that_carries_range_and_count(
    make: Make, kept: list[Any], escape: Callable[[Array], object], count: int
) -> None:
    with pytest.raises(bs.EscapedViewError, match="no receipt was made; drop them and write again") as caught:
        write_and_keep(make(escaped="raise"), escape, kept)

    assert (caught.value.start, caught.value.stop, caught.value.count) == (4096, 8192, count)


def test_an_escaped_view_that_is_an_error_leaves_no_receipt(make: Make, kept: list[Any]) -> None:
    r = make(escaped="raise")

    with pytest.raises(bs.EscapedViewError, match="no receipt"):
        write_and_keep(r, take_slice, kept)

    assert r.receipt is None


def test_an_escaped_view_that_is_an_error_leaves_an_array_that_is_read_only(make: Make) -> None:
    r, names = make(escaped="raise"), {}

    with pytest.raises(bs.EscapedViewError, match="no receipt"), r.writer() as a:
        names["row"] = a[1]

    with pytest.raises(ValueError, match="read-only"):
        a[0, 0] = 1


@every_escape
def test_when_everything_is_dropped_the_range_can_be_written_after_all(
    make: Make, kept: list[Any], escape: Callable[[Array], object], count: int
) -> None:
    r = make(escaped="raise")
    with pytest.raises(bs.EscapedViewError, match=f"^{count} view"):
        write_and_keep(r, escape, kept)

    drop(kept)
    with r.writer() as a:
        a[...] = 1

    assert r.read().tobytes() == ONES


def test_an_error_in_the_body_is_passed_on_whatever_has_escaped(make: Make, kept: list[Any]) -> None:
    r = make(escaped="raise")

    with pytest.raises(ZeroDivisionError, match="by hand"):
        write_and_fail(r, ZeroDivisionError("by hand"), kept)

    assert r.receipt is None


# -- escaped="ignore" -----------------------------------------------------------------------------


def leave_quietly(r: bs.AllocatedRange, escape: Callable[[Array], object], kept: list[Any]) -> None:
    """Fill the range while every warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_and_keep(r, escape, kept)


@every_escape
def test_on_request_an_escaped_view_is_nobodys_business(
    make: Make, kept: list[Any], escape: Callable[[Array], object], count: int
) -> None:
    r = make(escaped="ignore")

    leave_quietly(r, escape, kept)

    assert r.receipt is not None


def test_a_view_that_is_ignored_still_keeps_new_writers_out(make: Make, kept: list[Any]) -> None:
    r = make(escaped="ignore")
    leave_quietly(r, take_slice, kept)

    with pytest.raises(bs.EscapedViewError, match="no new writer while they live"), r.writer(rewrite=True):
        pass


# -- what has not escaped -------------------------------------------------------------------------


def fill(a: Array) -> None:
    for index in range(len(a)):
        a[index, :] = 1


def finished_thread(a: Array) -> threading.Thread:
    thread = threading.Thread(target=fill, args=(a[1:3],))
    thread.start()
    thread.join()
    return thread


def caught_error(a: Array) -> None:
    def fail(row: Array) -> None:
        raise ArithmeticError(row.sum())

    with suppress(ArithmeticError):
        fail(a[1])


class Anonymous:
    """A class that says no module, as some that are made at run time."""

    __module__ = None  # type: ignore[assignment]

    def __init__(self, a: Array) -> None:
        self.a = a


MERE: dict[str, Callable[[Array], object]] = {
    "plain use": fill,
    "alias": lambda a: a,
    "alias in a list": lambda a: [a],
    "alias in a tuple": lambda a: (a, a),
    "alias in a dict": lambda a: {"a": a},
    "alias in an attribute": lambda a: types.SimpleNamespace(a=a),
    "alias in a closure": lambda a: lambda: a,
    "alias in a default": lambda a: lambda b=a: b,
    "alias in a partial": lambda a: partial(np.sum, a),
    "alias in a class without a module": Anonymous,
    "bound method": lambda a: a.fill,
    "iterator over the rows, not begun": iter,
    "flat": lambda a: a.flat,
    "copy": lambda a: a[1:3].copy(),
    "scalar": lambda a: a[1, 2],
    "result of arithmetic": lambda a: a[1:3] + 1,
    "fancy selection": lambda a: a[[1, 2]],
    "view that was dropped": lambda a: a[1:3].sum(),
    "memoryview that was released": lambda a: memoryview(a).release(),
    "thread that has finished": finished_thread,
    "generator that is exhausted": lambda a: [row.sum() for row in a],
    "error that was caught in the body": caught_error,
}


@pytest.mark.parametrize("use", list(MERE.values()), ids=list(MERE))
def test_plain_use_and_mere_aliases_are_not_warned_of(
    make: Make, kept: list[Any], use: Callable[[Array], object]
) -> None:
    r = make()

    leave_quietly(r, use, kept)

    assert r.receipt is not None


@pytest.mark.parametrize("use", list(MERE.values()), ids=list(MERE))
def test_mere_aliases_do_not_keep_new_writers_out(make: Make, kept: list[Any], use: Callable[[Array], object]) -> None:
    r = make()
    leave_quietly(r, use, kept)

    with r.writer(rewrite=True) as a:
        a[...] = 1

    assert r.read().tobytes() == ONES


def test_a_body_without_a_name_for_the_array_has_let_nothing_escape(make: Make) -> None:
    r = make()

    with r.writer():
        pass

    assert r.receipt is not None


def test_an_exit_stack_lets_nothing_escape(make: Make) -> None:
    r = make()

    with ExitStack() as stack:
        a = stack.enter_context(r.writer())
        a[...] = 1

    assert r.read().tobytes() == ONES


def test_a_writer_that_is_kept_lets_nothing_escape(make: Make) -> None:
    r = make()

    with (writer := r.writer()) as a:
        a[...] = 1

    assert (r.receipt is not None, writer is None) == (True, False)


# -- while an escaped view lives ------------------------------------------------------------------


@every_escape
def test_while_a_view_lives_the_range_takes_no_new_writer(
    make: Make, kept: list[Any], escape: Callable[[Array], object], count: int
) -> None:
    r = make()
    with pytest.warns(bs.EscapedViewWarning, match="outlived"):
        write_and_keep(r, escape, kept)

    with pytest.raises(bs.EscapedViewError, match="no new writer while they live") as caught, r.writer(rewrite=True):
        pass

    assert (caught.value.start, caught.value.stop, caught.value.count) == (4096, 8192, count)


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda r: r.write(np.zeros(SHAPE), rewrite=True), id="write"),
        pytest.param(lambda r: r.split_up(100), id="split_up"),
        pytest.param(lambda r: r.split_down(100), id="split_down"),
    ],
)
def test_while_a_view_lives_the_range_is_not_written_or_split_otherwise(
    make: Make, kept: list[Any], use: Callable[[bs.AllocatedRange], object]
) -> None:
    r = make()
    with pytest.warns(bs.EscapedViewWarning, match="outlived"):
        write_and_keep(r, take_slice, kept)

    with pytest.raises(bs.EscapedViewError, match="no new writer while they live"):
        use(r)


def test_a_rewrite_that_a_view_prevents_leaves_the_receipt_standing(make: Make, kept: list[Any]) -> None:
    r = make()
    with pytest.warns(bs.EscapedViewWarning, match="outlived"):
        write_and_keep(r, take_slice, kept)
    receipt = r.receipt

    with pytest.raises(bs.EscapedViewError, match="no new writer"), r.writer(rewrite=True):
        pass

    assert receipt is not None
    assert not receipt.revoked


@every_escape
def test_when_the_last_view_is_dropped_the_range_takes_a_new_writer(
    make: Make, kept: list[Any], escape: Callable[[Array], object], count: int
) -> None:
    r = make()
    with pytest.warns(bs.EscapedViewWarning, match=f"^{count} view"):
        write_and_keep(r, escape, kept)

    drop(kept)
    with r.writer(rewrite=True) as a:
        a[...] = 2

    assert r.read().tobytes() == (2 * np.ones(SHAPE)).tobytes()


def test_a_view_that_escaped_from_a_body_that_raised_keeps_new_writers_out(make: Make, kept: list[Any]) -> None:
    r = make()
    with pytest.raises(ZeroDivisionError):
        write_and_fail(r, ZeroDivisionError(), kept)

    with pytest.raises(bs.EscapedViewError, match="1 view"), r.writer():
        pass


def test_each_range_answers_for_its_own_views(make_store: MakeStore, kept: list[Any]) -> None:
    store = make_store()
    first, second = store.allocate(shape=SHAPE, dtype="f8"), store.allocate(shape=SHAPE, dtype="f8")
    with pytest.warns(bs.EscapedViewWarning, match="outlived"):
        write_and_keep(first, take_slice, kept)

    leave_quietly(second, fill, kept)

    assert second.read().tobytes() == ONES


# -- after the exit -------------------------------------------------------------------------------


def test_after_the_exit_the_array_is_read_only(make: Make) -> None:
    with make().writer() as a:
        a[...] = 1

    with pytest.raises(ValueError, match="read-only"):
        a[0, 0] = 2


def test_after_the_exit_an_alias_is_read_only(make: Make) -> None:
    aliases = []

    with make().writer() as a:
        aliases.append(a)

    with pytest.raises(ValueError, match="read-only"):
        aliases[0][...] = 2


def test_after_a_body_that_raised_the_array_is_read_only(make: Make) -> None:
    with pytest.raises(ZeroDivisionError), make().writer() as a:
        raise ZeroDivisionError

    with pytest.raises(ValueError, match="read-only"):
        a[0, 0] = 2


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_body_that_raised_leaves_no_receipt(make: Make, kept: list[Any], kind: type[BaseException]) -> None:
    r = make()

    with pytest.raises(kind):
        write_and_fail(r, kind(), kept)

    assert r.receipt is None


def test_the_error_of_the_body_is_passed_on_as_it_is(make: Make) -> None:
    error = ZeroDivisionError("by hand")

    with pytest.raises(ZeroDivisionError) as caught, make().writer():
        raise error

    assert caught.value is error


def test_after_a_body_that_raised_the_range_can_be_written(make: Make) -> None:
    r = make()
    with pytest.raises(ZeroDivisionError), r.writer() as a:
        raise ZeroDivisionError

    with r.writer() as a:
        a[...] = 1

    assert r.read().tobytes() == ONES


def test_a_body_that_is_left_by_return_is_a_clean_exit(make: Make) -> None:
    def write(r: bs.AllocatedRange) -> None:
        with r.writer() as a:
            a[...] = 1
            return

    r = make()
    write(r)

    assert r.read().tobytes() == ONES


# -- one writer at a time -------------------------------------------------------------------------


def test_a_writer_that_is_entered_twice_is_refused(make: Make) -> None:
    writer = make().writer()

    with writer, pytest.raises(bs.WriterBusyError, match=r"range \[4096, 8192\): another writer is inside"), writer:
        pass


def test_a_refused_second_entry_leaves_the_first_undisturbed(make: Make) -> None:
    r = make()
    writer = r.writer()

    with writer as a:
        with pytest.raises(bs.WriterBusyError, match="another writer"), writer:
            pass
        a[...] = 1

    assert r.read().tobytes() == ONES


def test_a_second_writer_of_the_same_range_is_refused(make: Make) -> None:
    r = make()

    with r.writer(), pytest.raises(bs.WriterBusyError, match="another writer is inside"), r.writer():
        pass


def test_a_writer_that_was_left_cleanly_cannot_be_entered_again(make: Make) -> None:
    writer = make().writer()
    with writer as a:
        a[...] = 1

    with pytest.raises(bs.AlreadyWrittenError, match="immutable unless rewrite=True"), writer:
        pass


def test_a_second_thread_is_refused_while_the_first_is_inside(make: Make) -> None:
    r = make()
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with r.writer() as a:
            inside.set()
            leave.wait()
            a[...] = 1

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    try:
        with pytest.raises(bs.WriterBusyError, match="another writer is inside"), r.writer():
            pass
    finally:
        leave.set()
        thread.join()

    assert r.read().tobytes() == ONES


def winners(r: bs.AllocatedRange, count: int) -> int:
    """Let `count` threads enter the range at once and stay; return how many got in."""
    begin, decided = (threading.Barrier(count, timeout=HANG_SECONDS) for _ in range(2))
    admitted = []

    def race() -> None:
        begin.wait()
        try:
            with r.writer():
                admitted.append(r)
                decided.wait()
        except bs.WriterBusyError:
            decided.wait()
        except bs.AlreadyWrittenError:  # a twin that let somebody in after the first had left
            admitted.append(r)

    threads = [threading.Thread(target=race) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(admitted)


def test_of_threads_that_enter_one_range_at_once_exactly_one_gets_in(make_store: MakeStore) -> None:
    ranges = make_store().allocate_many(20, 100)

    assert [winners(r, 4) for r in ranges] == [1] * 20


def test_that_race_is_won_twice_where_looking_and_taking_are_two_steps(make_store: MakeStore) -> None:
    both_looked = threading.Barrier(2, timeout=HANG_SECONDS)

    class TwoSteps(dict[int, object]):
        def setdefault(self, key: int, default: object = None) -> object:
            if key not in self:
                both_looked.wait()
                self[key] = default
                return default
            return self[key]

    store = make_store()
    store._claims = TwoSteps()

    assert winners(store.allocate(100), 2) == 2


# -- writers that Ctrl-C never let finish ---------------------------------------------------------


def test_a_range_whose_writer_is_gone_without_an_exit_can_be_written_again(make: Make) -> None:
    r = make()
    writer = r.writer()
    writer.__enter__()
    with pytest.raises(bs.WriterBusyError, match="another writer is inside"):
        r.write(ONES)

    del writer
    gc.collect()

    assert r.write(ONES) == r.receipt


def test_a_range_stays_busy_while_the_array_of_an_interrupted_exit_lives(make: Make) -> None:
    r = make()
    writer = r.writer()
    a = writer.__enter__()
    del writer
    gc.collect()
    with pytest.raises(bs.WriterBusyError, match="another writer is inside"):
        r.write(ONES)

    del a

    assert r.write(ONES) == r.receipt


def test_of_threads_that_take_over_from_a_writer_that_is_gone_one_wins(make_store: MakeStore) -> None:
    store = make_store()
    for _ in range(20):
        r = store.allocate(len(ONES))
        r.writer().__enter__()
        gc.collect()
        start = threading.Barrier(4)

        def write(r: bs.AllocatedRange = r, start: threading.Barrier = start) -> bool:
            start.wait()
            try:
                r.write(ONES)
            except bs.RangeStateError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert sorted(pool.map(lambda _: write(), range(4))) == [False, False, False, True]


def test_the_scan_of_one_thread_is_no_escape_in_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, scanned, left = threading.Event(), threading.Event(), threading.Event()

    def everything(get_objects: Callable[[], list[Any]] = gc.get_objects) -> list[Any]:
        found = get_objects()
        scanned.set()
        left.wait(1)  # with `found` in hand; the other cannot leave before this returns, unless it does not care
        return found

    def exit_with_an_alias(r: bs.AllocatedRange) -> None:
        with r.writer() as a:
            alias = a
            made.wait(HANG_SECONDS)
        del a, alias

    with bs.create(tmp_path / "data.bin", 1 << 17, escaped="raise") as store, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(gc, "get_objects", everything)
        scan = pool.submit(exit_with_an_alias, store.allocate(10))
        r = store.allocate(10)
        with r.writer() as a:
            view = memoryview(a)[1:]
            made.set()
            assert scanned.wait(HANG_SECONDS)
            del view
        left.set()
        scan.result()

    assert r.receipt is not None


def test_objects_that_answer_no_questions_do_not_disturb_a_scan(make: Make) -> None:
    class Gone:
        pass

    class Angry:
        @property
        def __class__(self) -> type:  # what isinstance() asks, and a lazy object answers by doing its work
            raise RuntimeError("do not ask")

        @__class__.setter
        def __class__(self, value: type) -> None: ...

    dead, angry = weakref.proxy(Gone()), Angry()
    r = make(escaped="raise")

    with r.writer() as a:
        alias = a
    del alias

    assert r.receipt is not None
    assert type(dead) is weakref.ProxyType
    assert type(angry) is Angry


def test_a_writer_that_is_finalized_during_the_scan_of_another_does_not_hang(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()
    inner, outer = store.allocate(10), store.allocate(10)

    def inside() -> Iterator[None]:
        with inner.writer() as a:
            alias = a
            yield
            del alias

    generators = [inside()]
    next(generators[0])

    def collect(get_objects: Callable[[], list[Any]] = gc.get_objects) -> list[Any]:
        if generators:
            generators.pop().close()
        return get_objects()

    def leave() -> None:
        with outer.writer() as a:
            alias = a
        del a, alias

    monkeypatch.setattr(gc, "get_objects", collect)
    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    thread.join(HANG_SECONDS / 4)

    assert not thread.is_alive()
    assert outer.receipt is not None
    assert inner.receipt is None
    assert inner.write(bytes(10)) == inner.receipt


# -- exits that belong to no block ----------------------------------------------------------------


def test_an_exit_that_was_never_entered_does_not_let_a_second_writer_in(make: Make) -> None:
    r = make()

    with r.writer():
        with pytest.raises(bs.RangeStateError, match="this writer is not inside"):
            r.writer().__exit__(None, None, None)
        with pytest.raises(bs.WriterBusyError, match="another writer is inside"):
            r.write(ONES)

    assert r.receipt is not None


def test_a_second_exit_makes_no_second_receipt(make: Make) -> None:
    r = make()
    writer = r.writer()
    with writer:
        pass
    receipt = r.receipt

    with pytest.raises(bs.RangeStateError, match="this writer is not inside"):
        writer.__exit__(None, None, None)

    assert r.receipt == receipt
    assert receipt is not None
    assert not receipt.revoked
