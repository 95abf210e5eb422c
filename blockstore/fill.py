"""The driver of a fill: pending blocks, an executor, and a bar.

`run` hands blocks to an executor in tasks, a few at a time, and collects what came of them. A block is an index here,
and a call that fills it and returns its bytes; this module knows no arrays, no files and no receipts. All sizes are in
bytes. `concurrent.futures` and tqdm are imported by the first fill that needs them, not by importing this module.

Examples
--------
>>> from blockstore import FillError
>>> def call(index):
...     if index == (2,):
...         raise ValueError("no data")
...     return 8
>>> def fill(*indices):
...     return run(
...         iter(indices), len(indices), call, workers=2, executor=None, progress=False,
...         total_nbytes=24, done_nbytes=0, block_nbytes=8, idle=lambda: None, where="x.zarr",
...     )
>>> fill((0,), (1,))
2
>>> try:
...     fill((0,), (1,), (2,))
... except FillError as error:
...     print(error.indices, error.exceptions, error.exceptions[0].__notes__)
[(2,)] (ValueError('no data'),) ['in block (2,)']
"""

import operator
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from queue import Empty, SimpleQueue
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from blockstore.errors import FillError

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

Index = tuple[int, ...]

_TASKS_IN_FLIGHT = 2  # per worker: one runs, and one waits so that the worker need not
_TASKS_PER_WORKER = 8  # at least, so that the last ones end at about the same time
_TASK_NBYTES = 4 << 20
_TASK_BLOCKS = 64
_IDLE_SECONDS = 0.1
_EXCEPTIONS_KEPT = 100


def run(
    todo: Iterator[Index],
    count: int,
    call: Callable[[Index], int],
    *,
    workers: int | None,
    executor: "Executor | None",
    progress: bool | Callable[[int], object],
    total_nbytes: int,
    done_nbytes: int,
    block_nbytes: int,
    idle: Callable[[], None],
    where: str,
) -> int:
    """Fill blocks through an executor, and return how many were filled.

    Parameters
    ----------
    todo : iterator of tuple of int
        The blocks, advanced in the calling thread only, as far as there are workers for them.
    count : int
        How many blocks `todo` yields.
    call : callable
        Fills the block of an index and returns its bytes. Must be picklable if the executor pickles.
    workers : int or None
        Threads, or with `executor` the workers to keep busy: twice as many tasks are in flight. None: as many as the
        executor says it has, else the CPUs that this process may use.
    executor : concurrent.futures.Executor or None
        Runs the tasks, and is not shut down. None: a `ThreadPoolExecutor`, which is gone afterwards.
    progress : bool or callable
        True: a bar of tqdm. A callable gets the bytes of each finished task, in the calling thread.
    total_nbytes, done_nbytes, block_nbytes : int
        Bytes of all blocks, of those that were written before, and of one block.
    idle : callable
        Called in the calling thread after each finished task, and at least every 0.1 s while waiting for one.
    where : str
        What is filled, for the bar and for messages.

    Returns
    -------
    int
        Blocks that this call filled, `count`.

    Raises
    ------
    FillError
        If the call failed for some blocks, or somebody else cancelled their task. All others are filled.
    ValueError, TypeError
        If `workers` is below 1, or an argument is of the wrong kind; before anything starts.
    ModuleNotFoundError
        If `progress` is True and there is no tqdm; before anything starts.
    BaseException
        What ends the fill early: `KeyboardInterrupt` here or in a worker, `SystemExit` in a worker, the error of an
        executor that broke or could not pickle, and whatever `progress`, `idle` or `todo` raises. What was not started
        is cancelled; each thread stops behind its current block, a process behind its tasks, and nobody waits for that.

    Notes
    -----
    Small blocks share a task, 64 or 4 MiB of them at most, and fewer where workers would lack tasks. O(workers) tasks
    are held at any time. What failed keeps its traceback, but nothing that was local to its frames: an array that
    outlives its writer would keep the block from being filled again.
    """
    workers = _check_workers(workers, executor)
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"progress is a bool or a callable that takes bytes, not {progress!r}")
    if count == 0:
        return 0
    per_task = min(_TASK_BLOCKS, _TASK_NBYTES // max(block_nbytes, 1), count // (_TASKS_PER_WORKER * workers))
    batches = iter(lambda: list(islice(todo, max(per_task, 1))), [])
    tally, window, pool = _Tally(), _Window(call), None
    try:
        with _bar(progress, total_nbytes, done_nbytes, where) as advance:
            if executor is None:
                from concurrent.futures import ThreadPoolExecutor

                executor = pool = ThreadPoolExecutor(workers, thread_name_prefix="blockstore-fill")
            batch = next(batches, [])
            while batch or window.pending:
                if room := bool(batch) and len(window.pending) < _TASKS_IN_FLIGHT * workers:
                    window.submit(executor, batch)
                    batch = next(batches, [])
                if (outcome := window.take(wait=not room)) is not None:
                    tally.add(outcome)
                    if outcome.nbytes:
                        advance(outcome.nbytes)
                idle()
        if pool is not None:
            pool.shutdown()
    except BaseException as error:
        window.cancel()
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        if window.submitted:
            error.add_note(f"the fill of {where!r} ended early: at least {tally.filled} of {count} blocks are written")
        raise
    if tally.indices:
        raise tally.error(count, where)
    return tally.filled


def _check_workers(workers: int | None, executor: "Executor | None") -> int:
    """Return how many workers to keep busy."""
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise TypeError(f"an executor has a method submit, unlike {executor!r}")
    if workers is None:
        known = getattr(executor, "_max_workers", None)
        return known if isinstance(known, int) and known > 0 else _cpus()
    if (workers := operator.index(workers)) < 1:
        raise ValueError(f"workers is at least 1, not {workers}")
    return workers


def _cpus() -> int:
    """Return how many CPUs this process may use."""
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _bar(
    progress: bool | Callable[[int], object], total_nbytes: int, done_nbytes: int, where: str
) -> Iterator[Callable[[int], object]]:
    """Yield what is to be called with the bytes of each finished task."""
    if progress is False:
        yield lambda _: None
    elif progress is not True:
        yield progress
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a notebook without ipywidgets gets a bar of text, and no sermon
                from tqdm.auto import tqdm
        except ModuleNotFoundError:
            text = "progress=True needs tqdm: pip install 'ndblockstore[progress]'"
            raise ModuleNotFoundError(text, name="tqdm") from None
        with tqdm(desc=where, total=total_nbytes, initial=done_nbytes, unit="B", unit_scale=True) as bar:
            yield bar.update


class _Stop:
    """Tells the threads of a fill that it has ended. Its copy in another process never learns of it."""

    def __init__(self) -> None:
        self.now = False
        self.token = os.urandom(16)  # no two fills ask the same, for dask answers from memory what it was asked before


class _Raised:
    """What a call raised, on its way to the thread that fills; from another process it brings its traceback as text."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> "tuple[Callable[[Exception, str], _Raised], tuple[Exception, str]]":
        error = self.error
        text = "".join(traceback.format_exception(error))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # which would break the executor
            error = RuntimeError("".join(traceback.format_exception_only(error)).strip())
        return _raised_elsewhere, (error, text)


class _RemoteTraceback(Exception):
    """Stands for the traceback of an exception that was raised in another process."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def _raised_elsewhere(error: Exception, text: str) -> _Raised:
    error.__cause__ = _RemoteTraceback(text)
    return _Raised(error)


class _Outcome(NamedTuple):
    """What came of a task: how many blocks are filled, their bytes, and the other blocks."""

    filled: int
    nbytes: int
    failures: list[tuple[Index, _Raised]]


def _fill_blocks(call: Callable[[Index], int], batch: list[Index], stop: _Stop) -> _Outcome:
    """Fill the blocks of a task, in a worker."""
    handled = sys.exception()  # by the caller, if the executor runs its tasks inline
    filled = nbytes = 0
    failures = []
    for index in batch:
        if stop.now:
            break
        try:
            nbytes += call(index)
            filled += 1
        except Exception as error:
            _release(error, handled)
            if error.__traceback__ is not None:  # without this frame, whose `failures` hold the error
                error.__traceback__ = error.__traceback__.tb_next
            failures.append((index, _Raised(error)))
        except BaseException as error:
            _release(error, handled)
            raise
    return _Outcome(filled, nbytes, failures)


def _release(error: BaseException, handled: BaseException | None) -> None:
    """Let go of what the frames of an exception hold, and the frames of all that led to it after `handled`."""
    chain: list[BaseException | None] = [error]
    seen = {id(None), id(handled)}
    while chain:
        link = chain.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        if isinstance(link, AttributeError) and not isinstance(link.obj, type | ModuleType | None):
            link.obj = type(link.obj)  # enough to ask "Did you mean"
        chain += [link.__cause__, link.__context__]
        if isinstance(link, BaseExceptionGroup):
            chain += link.exceptions


class _Window:
    """The tasks that are in flight."""

    def __init__(self, call: Callable[[Index], int]) -> None:
        self.submitted = 0
        self.pending: dict[int, tuple[Future[_Outcome], list[Index]]] = {}
        self._call = call
        self._stop = _Stop()
        self._done: SimpleQueue[int] = SimpleQueue()

    def submit(self, executor: "Executor", batch: list[Index]) -> None:
        self.submitted = number = self.submitted + 1
        future = executor.submit(_fill_blocks, self._call, batch, self._stop)
        self.pending[number] = future, batch
        future.add_done_callback(lambda _: self._done.put(number))

    def take(self, *, wait: bool) -> _Outcome | None:
        """Return the outcome of a task that has ended, or None; or raise what the executor did not get over."""
        try:
            number = self._done.get(wait, _IDLE_SECONDS)
        except Empty:
            return None
        from concurrent.futures import CancelledError

        future, batch = self.pending.pop(number)
        try:
            return future.result()
        except CancelledError:
            text = "the task of this block was cancelled, by another than the fill"
            return _Outcome(0, 0, [(index, _Raised(CancelledError(text))) for index in batch])
        finally:
            del future  # it may hold an error, whose traceback holds this frame

    def cancel(self) -> None:
        """Let nothing start any more, and forget all of it."""
        self._stop.now = True
        for future, _ in self.pending.values():
            future.cancel()
        self.pending.clear()


class _Tally:
    """What came of the blocks."""

    def __init__(self) -> None:
        self.filled = 0
        self.indices: list[Index] = []
        self._exceptions: list[Exception] = []

    def add(self, outcome: _Outcome) -> None:
        self.filled += outcome.filled
        for index, raised in outcome.failures:
            self.indices.append(index)
            if len(self._exceptions) < _EXCEPTIONS_KEPT:
                raised.error.add_note(f"in block {index}")
                self._exceptions.append(raised.error)

    def error(self, count: int, where: str) -> FillError:
        failed, kept = len(self.indices), len(self._exceptions)
        text = f"{failed} of {count} blocks of {where!r} failed; the others are written, "
        text += "filling again does only what is missing"
        if kept < failed:
            text += f" (here are the first {kept} exceptions)"
        return FillError(text, self._exceptions, self.indices)
