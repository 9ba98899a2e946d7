"""Work done ahead, side by side: compiling several kernels while none of them is needed yet.

Comes in: jobs, the most wanted first, and a deadline. Goes out: for each job that was over by then, what it raised.

Triton compiles outside the interpreter's lock but for building the first IR, about a tenth of it, so threads do: one a
core. Nothing is waited for after the deadline: what is under way then ends by itself and lands in Triton's cache.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

__all__ = ["side_by_side"]

REDRAWN = 0.2
"""Seconds between two calls of `progress` while nothing ends."""


def side_by_side(
    jobs: Sequence[Callable[[], None]], end: float, progress: Callable[[int], None]
) -> list[tuple[int, BaseException | None]]:
    """The number of each job that is over, and its exception, if any. Returns when all are, or when
    `time.perf_counter()` has passed `end`, though not before one job succeeded if one will. `progress` is told how many
    are over."""
    if not jobs:
        return []
    pool = ThreadPoolExecutor(min(_cores(), len(jobs)), thread_name_prefix="einscade")
    try:
        futures = [pool.submit(job) for job in jobs]
        under_way = set(futures)
        useful = False
        while under_way and not (useful and time.perf_counter() > end):
            progress(len(futures) - len(under_way))
            done, under_way = wait(under_way, REDRAWN, FIRST_COMPLETED)
            useful = useful or any(f.exception() is None for f in done)
        return [(i, f.exception()) for i, f in enumerate(futures) if f.done()]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
