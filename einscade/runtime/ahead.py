"""Work done ahead, side by side: compiling kernels while none of them is needed yet.

Comes in: tasks, each of some jobs, the most wanted first, and a deadline. Goes out: for each task that was over by
then, what it raised.

Triton compiles outside the interpreter's lock but for building the first IR, about a tenth of it, so threads do: one a
core. Nothing is waited for after the deadline: what is under way then ends by itself and lands in Triton's cache.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

__all__ = ["side_by_side"]

REDRAWN = 0.2
"""Seconds between two calls of `progress` while nothing ends."""


def side_by_side(
    tasks: Sequence[Sequence[Callable[[], object]]], end: float, progress: Callable[[int], None]
) -> dict[int, BaseException | None]:
    """The number of each task that is over, and the exception of its first job that raised, if any. Returns when all
    are, or when `time.perf_counter()` has passed `end`, though not before one task succeeded if one will. `progress` is
    told how many are over. Every task has a job."""
    if not tasks:
        return {}
    with _without_collections():
        return _over_by(tasks, end, progress)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Python counts how deep its parser is for all threads together. A collection in the midst of parsing, which may
    call finalizers, lets another thread in, and both then fail with a SystemError (CPython issue 106905)."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _over_by(
    tasks: Sequence[Sequence[Callable[[], object]]], end: float, progress: Callable[[int], None]
) -> dict[int, BaseException | None]:
    pool = ThreadPoolExecutor(min(_cores(), sum(map(len, tasks))), thread_name_prefix="einscade")
    try:
        started = [[pool.submit(job) for job in jobs] for jobs in tasks]
        over: dict[int, BaseException | None] = {}
        while len(over) < len(tasks) and not (None in over.values() and time.perf_counter() > end):
            progress(len(over))
            left = [f for i, futures in enumerate(started) if i not in over for f in futures if not f.done()]
            wait(left, REDRAWN, FIRST_COMPLETED)
            over |= {i: _raised(futures) for i, futures in enumerate(started) if i not in over and _is_over(futures)}
        return over
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _is_over(futures: Sequence[Future[object]]) -> bool:
    return all(f.done() for f in futures)


def _raised(futures: Sequence[Future[object]]) -> BaseException | None:
    return next((error for f in futures if (error := f.exception()) is not None), None)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
