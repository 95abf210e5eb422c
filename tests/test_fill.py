"""The driver of a fill: every block is filled or reported, little is in flight, an interrupt starts nothing more."""

import gc
import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    _base,
    thread,
)
from contextlib import contextmanager
from functools import partial
from linecache import getline
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import run_python

import blockstore as bs
from blockstore import fill

Index = fill.Index
Call = Callable[[Index], int]


def run(call: Call, count: int = 12, todo: Iterator[Index] | None = None, **options: Any) -> int:
    """Fill `count` blocks of 8 bytes, with no bar and one thread, unless told otherwise."""
    settings: dict[str, Any] = {
        "workers": 1,
        "executor": None,
        "progress": False,
        "total_nbytes": 8 * count,
        "done_nbytes": 0,
        "block_nbytes": 8,
        "idle": lambda: None,
        "where": "x.zarr",
    }
    return fill.run(((i,) for i in range(count)) if todo is None else todo, count, call, **settings | options)


def eight(index: Index) -> int:
    return 8


def never(*_: object) -> int:
    raise AssertionError("nothing was to be called")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a fill call `idle` at once where it would wait, for `Stepwise` does all its work there."""
    monkeypatch.setattr(fill, "_IDLE_SECONDS", 0.0)


class Filled:
    """A call that notes which blocks it filled, and fails for some."""

    def __init__(self, failing: set[int] | None = None) -> None:
        self.indices: list[Index] = []
        self.failing = failing or set()

    def __call__(self, index: Index) -> int:
        if index[0] in self.failing:
            raise ValueError(f"no data for {index}")
        self.indices.append(index)
        return 8


class Inline(Executor):
    """Runs each task within `submit`; from the given one on, `submit` raises."""

    def __init__(self, raising_at: int | None = None) -> None:
        self.submitted = 0
        self.raising_at = raising_at

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self.submitted == self.raising_at:
            raise RuntimeError("this executor takes no more")
        self.submitted += 1
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class Stepwise(Executor):
    """Runs no task but the oldest one, and that in `step`, which a fill calls by `idle`, once it submits no more."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.most = self.submitted = self._seen = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, partial(fn, *args, **kwargs)))
        self.submitted += 1
        self.most = max(self.most, len(self.waiting))
        return future

    def step(self) -> None:
        if self._seen == self.submitted and self.waiting:
            future, task = self.waiting.pop(0)
            if future.set_running_or_notify_cancel():
                future.set_result(task())
        self._seen = self.submitted


# -- every block is filled or reported --------------------------------------------------------------


@given(
    count=st.integers(0, 90),
    failing=st.sets(st.integers(0, 89)),
    workers=st.integers(1, 5),
    block_nbytes=st.sampled_from([0, 8, 1 << 21, 1 << 30]),
    executor=st.sampled_from([None, Inline()]),
)
def test_what_is_filled_and_what_failed_are_the_blocks_each_of_them_once(
    count: int, failing: set[int], workers: int, block_nbytes: int, executor: Executor | None
) -> None:
    call = Filled(failing)
    advanced: list[int] = []
    caught: bs.FillError | None = None
    filled = None
    try:
        filled = run(
            call, count, workers=workers, block_nbytes=block_nbytes, executor=executor, progress=advanced.append
        )
    except bs.FillError as error:
        caught = error

    failed = caught.indices if caught else []
    assert filled == (None if failed else count)
    for index, each in zip(failed, caught.exceptions if caught else [], strict=True):
        assert (each.args, each.__notes__) == ((f"no data for {index}",), [f"in block {index}"])
    assert sorted(call.indices + failed) == [(i,) for i in range(count)]
    assert {index[0] for index in failed} == failing & set(range(count))
    assert sum(advanced) == 8 * len(call.indices)
    assert 0 not in advanced


def test_the_error_says_how_many_of_how_many_failed_and_what_to_do() -> None:
    with pytest.raises(bs.FillError) as caught:
        run(Filled({2, 3, 5}), 100)

    assert caught.value.message == (
        "3 of 100 blocks of 'x.zarr' failed; the others are written, filling again does only what is missing"
    )
    with pytest.raises(ExceptionGroup, match="3 of 100"):
        raise caught.value


def test_of_many_failures_all_indices_are_kept_and_the_first_hundred_exceptions() -> None:
    with pytest.raises(bs.FillError, match=r"150 of 150 .*here are the first 100 exceptions") as caught:
        run(Filled(set(range(150))), 150)

    assert sorted(caught.value.indices) == [(i,) for i in range(150)]
    assert [f"no data for {index}" for index in caught.value.indices[:100]] == [
        each.args[0] for each in caught.value.exceptions
    ]


def test_a_call_without_a_frame_may_fail() -> None:
    with pytest.raises(bs.FillError, match="1 of 1") as caught:
        run([].pop, 1)  # type: ignore[arg-type]

    assert caught.value.exceptions[0].__traceback__ is None


def test_no_two_fills_submit_equal_tasks_which_an_executor_might_answer_from_memory() -> None:
    class Remembering(Inline):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            asked.append(pickle.dumps(args))
            return super().submit(fn, *args, **kwargs)

    asked: list[bytes] = []
    for _ in range(2):
        run(eight, 3, executor=Remembering())

    assert len(asked) == len(set(asked)) == 6


def test_nothing_to_do_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    executor = Inline()

    assert run(eight, 0, executor=executor, progress=True, idle=never) == 0
    assert executor.submitted == 0


def test_a_pool_of_its_own_is_gone_afterwards_and_a_given_one_goes_on() -> None:
    before = set(threading.enumerate())
    run(eight, 50, workers=3)
    assert set(threading.enumerate()) == before

    with ThreadPoolExecutor(2) as pool:
        assert run(eight, 50, executor=pool) == 50
        assert pool.submit(eight, (0,)).result() == 8


def test_blocks_are_taken_progress_told_and_idle_called_in_the_calling_thread() -> None:
    asked: set[int] = set()

    def todo() -> Iterator[Index]:
        for i in range(40):
            asked.add(threading.get_ident())
            yield (i,)

    filling: set[int] = set()

    def call(index: Index) -> int:
        filling.add(threading.get_ident())
        return 8

    run(
        call,
        40,
        todo(),
        workers=3,
        progress=lambda _: asked.add(threading.get_ident()),
        idle=lambda: asked.add(threading.get_ident()),
    )

    assert asked == {threading.get_ident()}
    assert not filling & asked


def test_as_many_blocks_as_there_are_workers_are_filled_at_once() -> None:
    together = threading.Barrier(3)

    def call(index: Index) -> int:
        together.wait(60)
        return 8

    assert run(call, 3, workers=3) == 3


def test_idle_is_called_while_the_only_task_is_not_done() -> None:
    waited, times = threading.Event(), []

    def idle() -> None:
        times.append(1)
        if len(times) == 3:
            waited.set()

    assert run(lambda index: 8 * waited.wait(60), 1, idle=idle) == 1


# -- how much is in flight --------------------------------------------------------------------------


def most_in_flight(workers: int) -> int:
    executor = Stepwise()
    assert run(eight, 100, workers=workers, executor=executor, block_nbytes=1 << 30, idle=executor.step) == 100
    assert executor.submitted == 100
    return executor.most


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("workers", [1, 3])
def test_twice_as_many_tasks_as_workers_are_in_flight_and_no_more(workers: int) -> None:
    assert most_in_flight(workers) == 2 * workers


@pytest.mark.usefixtures("no_waiting")
def test_a_fill_that_submits_all_at_once_is_caught_by_the_same_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "_TASKS_IN_FLIGHT", 1 << 30)

    assert most_in_flight(3) == 100


@pytest.mark.usefixtures("no_waiting")
def test_blocks_are_not_looked_for_before_there_are_workers_for_them() -> None:
    executor, taken = Stepwise(), []

    def todo() -> Iterator[Index]:
        for i in range(100):
            assert i - (executor.submitted - len(executor.waiting)) <= 3
            taken.append(i)
            yield (i,)

    run(eight, 100, todo(), executor=executor, block_nbytes=1 << 30, idle=executor.step)

    assert len(taken) == 100


@pytest.mark.parametrize(
    ("count", "workers", "block_nbytes", "tasks"),
    [
        pytest.param(1, 1, 8, 1, id="one-block"),
        pytest.param(16, 2, 8, 16, id="a-task-each-for-few-blocks"),
        pytest.param(33, 2, 8, 17, id="eight-tasks-per-worker"),
        pytest.param(6400, 1, 8, 100, id="64-blocks-a-task"),
        pytest.param(6400, 1, 1 << 20, 1600, id="4-MiB-a-task"),
        pytest.param(100, 1, 5 << 20, 100, id="a-large-block-is-a-task"),
        pytest.param(6400, 1, 0, 100, id="blocks-of-no-bytes"),
    ],
)
def test_small_blocks_share_a_task(count: int, workers: int, block_nbytes: int, tasks: int) -> None:
    executor = Inline()

    assert run(eight, count, workers=workers, block_nbytes=block_nbytes, executor=executor) == count
    assert executor.submitted == tasks


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(
    ("given", "most"), [pytest.param(3, 6, id="its-own-word"), pytest.param(None, 2 * fill._cpus(), id="cpus")]
)
def test_without_a_number_of_workers_the_executor_is_asked_and_then_the_system(given: int | None, most: int) -> None:
    executor = Stepwise()
    executor._max_workers = given  # type: ignore[attr-defined]
    run(eight, 1000, workers=None, executor=executor, block_nbytes=1 << 30, idle=executor.step)

    assert executor.most == most


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        pytest.param({"workers": 0}, ValueError, "workers is at least 1, not 0", id="no-worker"),
        pytest.param({"workers": -1, "executor": Inline()}, ValueError, "not -1", id="below-none"),
        pytest.param({"workers": 1.5}, TypeError, "float", id="half-a-worker"),
        pytest.param({"executor": 4}, TypeError, "has a method submit, unlike 4", id="no-executor"),
        pytest.param({"progress": "bar"}, TypeError, "progress is a bool or a callable", id="no-progress"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        run(never, **options)
    with pytest.raises(error, match=match):
        run(never, 0, **options)


# -- other processes --------------------------------------------------------------------------------


class Awkward(Exception):
    """Pickles, and does not unpickle, as an exception does whose `__init__` takes more than its text."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.never = Never()  # for where another package has taught exceptions to unpickle without `__init__`


class Never:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return int, ("never",)


class Unpicklable(Exception):
    def __reduce__(self) -> str:
        raise TypeError("never")


def touch(folder: Path, failing: Mapping[int, BaseException], index: Index) -> int:
    """Fill a block by making a file of its name, or fail as told; -1 is the end of the process."""
    if index[0] in failing:
        error = failing[index[0]]
        if isinstance(error, SystemError):
            os._exit(1)
        if isinstance(error, LookupError):
            raise Awkward(7, "awkward")
        if isinstance(error, TypeError):
            raise Unpicklable("stays where it is")
        raise error
    (folder / str(index[0])).touch()
    return 8


def touched(folder: Path) -> set[int]:
    return {int(path.name) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


def test_blocks_that_fail_in_another_process_lose_nothing_and_say_where(
    tmp_path: Path, processes: ProcessPoolExecutor
) -> None:
    failing = {3: ValueError("three"), 40: LookupError(), 55: TypeError()}

    with pytest.raises(bs.FillError, match="3 of 64") as caught:
        run(partial(touch, tmp_path, failing), 64, executor=processes, workers=None)

    assert touched(tmp_path) == set(range(64)) - set(failing)
    found = dict(zip(caught.value.indices, caught.value.exceptions, strict=True))
    assert {index: (type(error), str(error)) for index, error in found.items()} == {
        (3,): (ValueError, "three"),
        (40,): (RuntimeError, "test_fill.Awkward: 7: awkward"),
        (55,): (RuntimeError, "test_fill.Unpicklable: stays where it is"),
    }
    for index, error in found.items():
        assert error.__notes__ == [f"in block {index}"]
        assert "in touch\n    raise " in "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        pytest.param(ValueError("three"), ValueError, "three", id="plain"),
        pytest.param(Awkward(7, "awkward"), RuntimeError, "test_fill.Awkward: 7: awkward", id="does-not-unpickle"),
        pytest.param(Unpicklable("stays"), RuntimeError, "test_fill.Unpicklable: stays", id="does-not-pickle"),
    ],
)
def test_whatever_was_raised_pickles_with_its_traceback(error: Exception, kind: type[Exception], text: str) -> None:
    try:
        raise error
    except Exception as raised:
        again = pickle.loads(pickle.dumps(fill._Raised(raised))).error

    assert (type(again), str(again)) == (kind, text)
    assert "    raise error\n" in str(again.__cause__)


def test_the_error_of_other_processes_pickles_itself(tmp_path: Path, processes: ProcessPoolExecutor) -> None:
    with pytest.raises(bs.FillError) as caught:
        run(partial(touch, tmp_path, {3: ValueError("three")}), executor=processes)

    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.indices, str(again.exceptions[0])) == ([(3,)], "three")


def test_an_exit_in_another_process_ends_the_fill(tmp_path: Path, processes: ProcessPoolExecutor) -> None:
    with pytest.raises(SystemExit, match="enough") as caught:
        run(partial(touch, tmp_path, {3: SystemExit("enough")}), 1000, executor=processes)

    assert len(touched(tmp_path)) < 999
    assert caught.value.__notes__[-1].startswith("the fill of 'x.zarr' ended early: at least ")


def test_a_process_that_dies_ends_the_fill_and_what_was_filled_before_stays(tmp_path: Path) -> None:
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        pytest.raises(BrokenExecutor) as caught,
    ):
        run(partial(touch, tmp_path, {20: SystemError()}), 1000, executor=pool, block_nbytes=1 << 30)

    assert touched(tmp_path) == set(range(20))
    assert caught.value.__notes__ == ["the fill of 'x.zarr' ended early: at least 20 of 1000 blocks are written"]


def test_a_call_that_does_not_pickle_ends_the_fill_with_what_pickle_says(processes: ProcessPoolExecutor) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        run(lambda index: 8, executor=processes)

    assert run(eight, executor=processes) == 12


# -- executors that fail ----------------------------------------------------------------------------


def test_an_executor_that_takes_no_more_ends_the_fill_and_what_was_filled_stays() -> None:
    call, idles = Filled({2}), []

    with pytest.raises(RuntimeError, match="takes no more") as caught:
        run(call, executor=Inline(raising_at=7), idle=lambda: idles.append(len(call.indices)))

    assert call.indices == [(i,) for i in (0, 1, 3, 4, 5, 6)]
    assert idles[-1] == 6
    assert caught.value.__notes__ == ["the fill of 'x.zarr' ended early: at least 6 of 12 blocks are written"]


@pytest.mark.usefixtures("no_waiting")
def test_a_task_that_somebody_cancels_fails_with_its_blocks() -> None:
    executor, call = Stepwise(), Filled()

    def idle() -> None:
        if executor.submitted == 12 and len(executor.waiting) == 2:
            executor.waiting[1][0].cancel()
        executor.step()

    with pytest.raises(bs.FillError, match="1 of 12") as caught:
        run(call, executor=executor, idle=idle)

    assert caught.value.indices == [(11,)]
    assert sorted(call.indices) == [(i,) for i in range(11)]
    assert isinstance(caught.value.exceptions[0], CancelledError)
    assert str(caught.value.exceptions[0]) == "the task of this block was cancelled, by another than the fill"


class Broken(Executor):
    """Ends all its tasks by one and the same error, as a process pool does that lost a process."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.futures.append(future)
        if len(self.futures) == 4:
            error = BrokenExecutor("broken")
            while self.futures:
                self.futures.pop().set_exception(error)
            del error
        return future


def held_by_a_broken_executor() -> bool:
    """Whether the call outlives the error that it ended by, without the garbage collector."""
    call = Filled()
    gone = weakref.ref(call)
    gc.disable()
    try:
        with pytest.raises(BrokenExecutor):
            run(call, executor=Broken(), workers=2)
        del call
        return gone() is not None
    finally:
        gc.enable()


def test_the_error_of_a_broken_executor_leaves_no_cycle_that_holds_the_call() -> None:
    assert not held_by_a_broken_executor()


def test_a_fill_that_keeps_what_was_in_flight_is_caught_by_the_same_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill._Window, "cancel", lambda self: None)

    assert held_by_a_broken_executor()


# -- what an exception keeps alive ------------------------------------------------------------------


class Held:
    """Stands for a view of a block."""


def directly(a: Held) -> None:
    raise ValueError("direct")


def by_cause(a: Held) -> None:
    def inner(b: Held) -> None:
        raise KeyError("inner")

    try:
        inner(a)
    except KeyError as error:
        raise ValueError("outer") from error


def in_context(a: Held) -> None:
    try:
        directly(a)
    except ValueError:
        del a
        raise KeyError("context")  # noqa: B904


def in_a_group(a: Held) -> None:
    errors = []
    try:
        directly(a)
    except ValueError as error:
        errors.append(error)
    raise ExceptionGroup("group", errors)


def by_a_wrong_name(a: Held) -> None:
    a.missing  # type: ignore[attr-defined]


def from_a_generator(a: Held) -> None:
    any(by_cause(b) for b in [a])  # type: ignore[func-returns-value]


FAILING = [directly, by_cause, in_context, in_a_group, by_a_wrong_name, from_a_generator]
every_way_to_fail = pytest.mark.parametrize("fail", FAILING, ids=lambda fail: fail.__name__)


def held_by_the_error(fail: Callable[[Held], None], executor: Executor | None) -> bool:
    """Whether what only a failed call held is alive as long as the error, without the garbage collector."""
    views: list[weakref.ref[Held]] = []

    def call(index: Index) -> int:
        a = Held()
        views.append(weakref.ref(a))
        fail(a)
        return 8

    gc.disable()
    try:
        with pytest.raises(bs.FillError, match="12 of 12") as caught:
            run(call, executor=executor)
        assert len(views) == len(caught.value.exceptions) == 12
        assert all(
            f"in {fail.__name__}" in "".join(traceback.format_exception(each)) for each in caught.value.exceptions
        )
        return any(view() is not None for view in views)
    finally:
        gc.enable()


@every_way_to_fail
@pytest.mark.parametrize("executor", [None, Inline()], ids=["threads", "inline"])
def test_an_exception_of_a_fill_holds_no_view_and_still_says_where_it_was_raised(
    fail: Callable[[Held], None], executor: Executor | None
) -> None:
    assert not held_by_the_error(fail, executor)


@every_way_to_fail
def test_a_fill_that_leaves_the_frames_alone_is_caught_by_the_same_check(
    monkeypatch: pytest.MonkeyPatch, fail: Callable[[Held], None]
) -> None:
    monkeypatch.setattr(fill, "_release", lambda *_: None)

    assert held_by_the_error(fail, None)


def test_an_exit_in_a_worker_holds_no_view_either() -> None:
    views: list[weakref.ref[Held]] = []

    def call(index: Index) -> int:
        a = Held()
        views.append(weakref.ref(a))
        raise SystemExit("enough")

    with pytest.raises(SystemExit, match="enough") as caught:
        run(call, 1)

    assert "in call" in "".join(traceback.format_exception(caught.value))
    assert [view() for view in views] == [None]


def test_a_block_that_failed_is_filled_again_while_its_error_is_alive(tmp_path: Path) -> None:
    with bs.create(tmp_path / "data.bin", 1 << 20) as store:
        ranges = store.allocate_many(6, 4096)
        failing = {2, 3}

        def call(index: Index) -> int:
            with ranges[index[0]].writer() as a:
                part = a[8:]
                if index[0] in failing:
                    raise ValueError(f"no data for {part.shape}")
                a[:] = index[0]
                del part
            return 4096

        try:
            run(call, 6, workers=2)
        except bs.FillError as error:
            failing.clear()
            todo = sorted(error.indices)
            assert todo == [(2,), (3,)]
            assert [call(index) for index in todo] == [4096, 4096]
        assert len(store.receipts()) == 6


def test_a_wrong_name_is_still_suggested_for() -> None:
    def call(index: Index) -> int:
        "text".uper()  # type: ignore[attr-defined]
        return 8

    with pytest.raises(bs.FillError) as caught:
        run(call, 1)

    said = io.StringIO()
    traceback.print_exception(caught.value.exceptions[0], file=said)
    assert "has no attribute 'uper'" in said.getvalue()
    assert caught.value.exceptions[0].obj is str  # type: ignore[union-attr]


def test_an_error_that_is_handled_around_the_fill_keeps_its_frames() -> None:
    def fail(a: Held) -> None:
        raise KeyError("before")

    a = Held()
    try:
        fail(a)
    except KeyError as error:
        with pytest.raises(bs.FillError):
            run(Filled({1}), executor=Inline())
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]

    assert frames[-1].f_locals["a"] is a


# -- interrupts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("executor", [None, Inline()], ids=["threads", "inline"])
def test_an_interrupt_or_exit_in_a_worker_ends_the_fill(error: type[BaseException], executor: Executor | None) -> None:
    begun = []

    def call(index: Index) -> int:
        begun.append(index)
        if index == (5,):
            raise error("now")
        return 8

    with pytest.raises(error, match="now"):
        run(call, 1000, executor=executor)

    assert begun[:6] == [(i,) for i in range(6)]
    assert (6,) not in begun


@pytest.mark.parametrize("executor", [None, Inline()], ids=["threads", "inline"])
@pytest.mark.parametrize("who", ["idle", "progress", "todo"])
def test_what_the_calling_thread_raises_ends_the_fill(who: str, executor: Executor | None) -> None:
    call = Filled()

    def fail(*_: object) -> None:
        raise OSError("disk on fire")

    def todo() -> Iterator[Index]:
        yield (0,)
        fail()

    with pytest.raises(OSError, match="disk on fire"):
        run(
            call,
            1000,
            todo() if who == "todo" else None,
            executor=executor,
            progress=fail if who == "progress" else False,
            idle=fail if who == "idle" else lambda: None,
        )

    assert len(call.indices) < 1000


@pytest.mark.usefixtures("no_waiting")
def test_tasks_that_wait_when_the_fill_ends_are_cancelled() -> None:
    executor = Stepwise()

    def idle() -> None:
        if len(executor.waiting) == 6:
            raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        run(never, 100, executor=executor, workers=3, idle=idle)

    assert [future.cancelled() for future, _ in executor.waiting] == [True] * 6


class NeverStops:
    now = property(lambda self: False, lambda self, now: None)


@contextmanager
def interrupt_at(line: int, *files: str) -> Iterator[None]:
    """Raise `KeyboardInterrupt` in this thread as it comes to the given line of these files, counting all it passes.

    Lines that begin with ``with`` do not count: Python comes to them again as it leaves the block, before it releases
    what they hold, where it would look for no signal.
    """
    passed = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal passed
        if frame.f_code.co_filename not in files or frame.f_code is fill._fill_blocks.__code__:
            return None
        if event == "line" and not getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            passed += 1
            if passed == line:
                raise KeyboardInterrupt
        return trace

    tracing = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(tracing)


def begun_after_an_interrupt(line: int) -> int | None:
    """Interrupt a fill at a line, let its tasks run all the same, and count the blocks that begin.

    Returns None if the fill ends before that line.
    """
    executor, call = Stepwise(), Filled({3})
    try:
        with interrupt_at(line, fill.__file__):
            run(call, 6, executor=executor, idle=executor.step, block_nbytes=1 << 30)
    except KeyboardInterrupt:
        pass
    except bs.FillError:
        return None
    before = len(call.indices)
    while executor.waiting:
        executor._seen = executor.submitted
        executor.step()
    return len(call.indices) - before


def begun_after_interrupts() -> list[int]:
    found: list[int] = []
    while (begun := begun_after_an_interrupt(len(found) + 1)) is not None:
        found.append(begun)
    return found


@pytest.mark.usefixtures("no_waiting")
def test_no_block_begins_after_an_interrupt_at_any_line_of_the_fill() -> None:
    found = begun_after_interrupts()

    assert len(found) > 50
    assert set(found) == {0}


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("forgotten", ["stop", "cancel"])
def test_an_end_that_stops_nothing_is_caught_by_the_same_check(monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    if forgotten == "stop":  # without it, a task that was submitted a moment ago runs, which is not yet in the window
        monkeypatch.setattr(fill, "_Stop", NeverStops)
    else:
        monkeypatch.setattr(fill._Window, "cancel", lambda self: None)

    assert set(begun_after_interrupts()) > {0}


def begun_beside_an_interrupt(line: int) -> int:
    """Interrupt a fill at a line of it or of its pool while its two workers are held; count the blocks that begin."""
    first, released, begun = threading.Event(), threading.Event(), []

    def call(index: Index) -> int:
        begun.append(index)
        first.set()
        released.wait()
        return 8

    with pytest.raises(KeyboardInterrupt), interrupt_at(line, fill.__file__, thread.__file__, _base.__file__):
        run(call, 64, workers=2, idle=lambda: first.wait(60))
    released.set()
    for each in threading.enumerate():
        if each.name.startswith("blockstore-fill"):
            each.join()
    return len(begun)


LINES = range(1, 500)


@pytest.mark.usefixtures("no_waiting")
def test_an_interrupt_at_any_line_of_the_fill_or_its_pool_leaves_the_blocks_that_run_and_no_thread() -> None:
    begun = [begun_beside_an_interrupt(line) for line in LINES]

    assert (begun[0], begun[-1] > 0) == (0, True)
    assert max(begun) <= 2


@pytest.mark.usefixtures("no_waiting")
def test_threads_that_are_not_told_to_stop_are_caught_by_the_same_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "_Stop", NeverStops)

    assert max(begun_beside_an_interrupt(line) for line in LINES) > 2


INTERRUPTED = """
import sys, threading
from blockstore import fill

released, begun, lock = threading.Event(), [], threading.Lock()

def call(index):
    with lock:
        begun.append(index)
        if len(begun) == 2:
            print("filling", flush=True)
    released.wait()
    return 8

{plant}

try:
    fill.run(((i,) for i in range(1000)), 1000, call, workers=2, executor=None, progress={progress}, total_nbytes=8000,
             done_nbytes=0, block_nbytes=8, idle=lambda: None, where="x.zarr")
except KeyboardInterrupt as error:
    print("interrupted", len(begun), released.is_set(), *error.__notes__)
    released.set()
for thread in threading.enumerate():
    if thread.name.startswith("blockstore-fill"):
        thread.join()
print("in the end", len(begun))
"""

NEVER_STOPS = """
class Never:
    now = property(lambda self: False, lambda self, now: None)
fill._Stop = Never
"""


def interrupted(plant: str = "", progress: bool = False) -> list[str]:
    """Send a real Ctrl-C to a process whose two workers are both within a call; return the lines that it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = INTERRUPTED.format(plant=plant, progress=progress)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip()]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return [*lines, *out.splitlines()]


EARLY = "the fill of 'x.zarr' ended early: at least 0 of 1000 blocks are written"


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
@pytest.mark.parametrize("progress", [False, True], ids=["quiet", "bar"])
def test_ctrl_c_returns_while_calls_run_and_no_block_begins_after_it(progress: bool) -> None:
    if progress:
        pytest.importorskip("tqdm")

    assert interrupted(progress=progress) == ["filling", f"interrupted 2 False {EARLY}", "in the end 2"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_a_batch_that_goes_on_after_ctrl_c_is_caught_by_the_same_check() -> None:
    *_, end = interrupted(NEVER_STOPS)

    assert int(end.removeprefix("in the end ")) > 2


# -- the bar ----------------------------------------------------------------------------------------


def test_the_bar_counts_bytes_from_what_was_written_before(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = pytest.importorskip("tqdm.auto")
    bars = []

    class Kept(auto.tqdm):  # type: ignore[misc, name-defined]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            bars.append(self)

    monkeypatch.setattr(auto, "tqdm", Kept)
    run(eight, 125, workers=2, progress=True, total_nbytes=3000, done_nbytes=2000)

    (bar,) = bars
    assert (bar.n, bar.total, bar.initial, bar.disable) == (3000, 3000, 2000, True)
    shown = capsys.readouterr().err
    assert shown.startswith("\rx.zarr:  67%")
    assert "x.zarr: 100%" in shown
    assert "3.00k/3.00k [" in shown
    assert "B/s]" in shown


def test_the_bar_is_closed_when_the_fill_fails(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    with pytest.raises(bs.FillError):
        run(Filled({1}), progress=True)

    shown = capsys.readouterr().err
    assert "88.0/96.0" in shown
    assert shown.endswith("\n")


def test_without_tqdm_a_bar_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)

    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ndblockstore\[progress\]'") as caught:
        run(never, progress=True)
    assert (caught.value.name, getattr(caught.value, "__notes__", [])) == ("tqdm", [])


LOADED = """
import sys
import blockstore.fill
print(sorted({"concurrent.futures", "tqdm", "asyncio", "multiprocessing"} & set(sys.modules)))
"""


def test_importing_it_loads_neither_executors_nor_bars() -> None:
    ran = run_python(LOADED)

    assert (ran.stdout, ran.stderr) == ("[]\n", "")
