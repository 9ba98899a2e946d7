"""How the benchmarks measure: interleaved medians of time, and a call's peak memory as the system sees it.

Comes in: callables without arguments. Goes out: seconds and bytes.
"""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["interleaved_medians", "peak_extra_memory"]


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, tuple[float, list[float]]]:
    """Median seconds of each call, and all of its times. The calls take turns, so that a drift of the machine's speed
    touches each of them alike. `repeats` >= 1 turns follow `warmup` unmeasured ones."""
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: at least 1 measured turn is needed")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn >= warmup:
                times[name].append(time.perf_counter() - started)
    return {name: (statistics.median(t), t) for name, t in times.items()}


def peak_extra_memory(call: Callable[[], object]) -> int:
    """Bytes by which the process's resident memory rises, at its highest, above what it held before `call`.

    What freed blocks the allocator still holds goes back to the system first: reused, they would not count.
    Linux only (/proc); raises OSError elsewhere.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return max(peak - before, 0)


def _status(field: str) -> int:
    """One of /proc/self/status's sizes, in bytes."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(match[1]) * 1024
