"""Which candidate is fastest, measured on the inputs of a real call.

Comes in: candidates, likely ones first, and a way to run one. Goes out: a `Tuned`: their order, the times, and what
failed. What has to be compiled is, side by side, before anything is measured. Every candidate is held to the outputs of
one that rests on none of our code, or on torch's operations alone, then timed; those that are close to the best are
timed again, in turns, so that a busy moment of the machine is nobody's loss. The first candidate, the cost model's
choice, stays first unless another beats it by more than measurements are off.

`EINSCADE_AUTOTUNE=0` turns all of it off: the cost model decides.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from einscade.codegen.schedule import Schedule
from einscade.runtime import progress
from einscade.runtime.agreement import disagreement
from einscade.runtime.ahead import side_by_side
from einscade.runtime.candidates import LAST_RESORTS, Candidate

__all__ = ["Timing", "Tuned", "contenders", "enabled", "has_trusted", "tune"]

SECONDS = 15.0
"""No measurement is started after so long: with what is under way a site is tuned within 20."""

COMPILING = 11.0
"""Of these seconds so many are for compiling. What is not compiled then is not measured: the likely ones came first."""

ROUNDS = ((2.0, 4), (1.05, 4))
"""Candidates that take at most so many times the best's time are timed again so often: what is far from the best soon
counts no more, and between the last few a measurement's spread would decide."""

FAR = 4.0
"""A candidate whose first call takes so many times the best's is not called again (where calls compile nothing)."""

MARGIN = {"cpu": 0.9, "cuda": 0.99}
"""Another candidate takes the first one's place if it needs less than this part of its time: so much may measurements
on a machine with other work be off, and so much on a GPU."""

LEAST_SECONDS = 1e-3
"""A measurement repeats its call until it takes about so long: one short call is the clock's and the host's noise."""

MOST_CALLS = 50

LONG = 0.1
"""A call of so many seconds is timed once. Others are timed again, whatever the first time was: a busy moment in it
would be the candidate's loss, which is not close to the best then."""

TRUSTED = ("library:sdpa", "tiled_torch")
"""The kinds that others are checked against before they are timed: torch's own code, then code of torch operations. A
library's backward call is none of them: it computes what a gradient was derived from, not what the gradient says."""

Run = Callable[[Candidate], tuple[Tensor, ...]]

Compilations = Callable[[Candidate], Sequence[Callable[[], object]]]
"""What compiles each of a candidate's kernels; none of them runs."""


@dataclass(frozen=True)
class Timing:
    """Seconds that a candidate took. `rank`: its place in the cost model's order."""

    rank: int
    kind: str
    schedule: Schedule
    seconds: float


@dataclass(frozen=True)
class Tuned:
    """`order`: all candidates but those that failed, fastest first; those that were not measured keep their order
    behind them. `seconds` of those that were; `failures` say why a candidate cannot be used. `compiling` and
    `measuring`: the seconds that this took."""

    order: tuple[Candidate, ...]
    seconds: Mapping[Candidate, float]
    failures: Mapping[Candidate, Exception]
    compiling: float
    measuring: float

    def timings(self, candidates: Sequence[Candidate]) -> tuple[Timing, ...]:
        """What was measured of the candidates, which come in the cost model's order."""
        return tuple(
            Timing(i, c.kind, c.schedule, self.seconds[c]) for i, c in enumerate(candidates) if c in self.seconds
        )


def enabled() -> bool:
    return os.environ.get("EINSCADE_AUTOTUNE", "1") != "0"


def contenders(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that are worth measuring."""
    return [c for c in candidates if c.kind not in LAST_RESORTS]


def has_trusted(candidates: Sequence[Candidate]) -> bool:
    return any(c.kind in TRUSTED for c in candidates)


def tune(
    name: str,
    candidates: Sequence[Candidate],
    run: Run,
    compilations: Compilations,
    inputs: Sequence[Tensor],
    empty_rows: bool,
    cotangents: Collection[int] = (),
    reference: Candidate | None = None,
) -> Tuned:
    """The candidates' order for inputs like these. `name` is for the progress line; `empty_rows` and `cotangents` as in
    `disagreement`. `reference`: what candidates are held to where none of them can be trusted; one that none of them
    agrees with decides nothing.

    A candidate for which the memory does not suffice, or the time, is not measured, but has not failed either.
    """
    device = inputs[0].device
    competing = contenders(candidates)
    seconds: dict[Candidate, float] = {}
    failures: dict[Candidate, Exception] = {}
    start = compiled = time.perf_counter()
    if len(competing) > 1:
        late = _compile_all(name, competing, compilations, device, start + COMPILING)
        compiled = time.perf_counter()
        end = start + SECONDS
        trusted = _trusted(competing, run, failures)
        disputed: dict[Candidate, Exception] = {}
        if trusted is not None:  # warm now, and known if the time runs out
            seconds[trusted[0]] = _timed(partial(run, trusted[0]), device)
        elif reference is not None:
            with contextlib.suppress(Exception):
                trusted = reference, run(reference)
        untried = [c for c in competing if c not in seconds and c not in failures and c not in late]
        for candidate in untried:
            if time.perf_counter() > end:
                break
            progress.tuning(len(seconds), len(competing), "measured", name)
            try:
                begun = time.perf_counter()
                outputs = run(candidate)
                once = time.perf_counter() - begun
                if trusted is not None and (wrong := disagreement(outputs, trusted[1], inputs, empty_rows, cotangents)):
                    if trusted[0] is not reference:
                        raise ArithmeticError(wrong)
                    disputed[candidate] = ArithmeticError(wrong)
                del outputs
                far = device.type == "cpu" and seconds and once > FAR * min(seconds.values())
                seconds[candidate] = once if far else _timed(partial(run, candidate), device)
            except torch.OutOfMemoryError:
                continue
            except Exception as error:
                failures[candidate] = error
        del trusted
        if any(c not in disputed for c in seconds):
            seconds = {c: s for c, s in seconds.items() if c not in disputed}
            failures |= disputed
        _repeat(seconds, run, device, end)
    likely = next((c for c in competing if c in seconds), None)

    def rank(candidate: Candidate) -> float:
        return seconds.get(candidate, float("inf")) * (MARGIN[device.type] if candidate == likely else 1)

    order = sorted((c for c in candidates if c not in failures), key=rank)
    return Tuned(tuple(order), seconds, failures, compiled - start, time.perf_counter() - compiled)


def _compile_all(
    name: str, competing: Sequence[Candidate], compilations: Compilations, device: torch.device, end: float
) -> set[Candidate]:
    """Compiles what has kernels, in threads. Returns those that are not compiled yet when the time is over. What raises
    here is told when it is run: only that decides whether a candidate failed."""
    tasks: dict[Candidate, list[Callable[[], object]]] = {}
    for candidate in competing:
        with contextlib.suppress(Exception):
            if jobs := compilations(candidate):
                tasks[candidate] = [partial(_on, device, job) for job in jobs]
    try:
        over = side_by_side(list(tasks.values()), end, lambda done: progress.tuning(done, len(tasks), "compiled", name))
    except RuntimeError:  # no thread can be started: each is compiled when its turn comes
        return set()
    return {c for i, c in enumerate(tasks) if i not in over}


def _on(device: torch.device, job: Callable[[], object]) -> None:
    """A job in a thread of its own, for whom the device is another than the first."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        job()


def _trusted(
    contenders: Sequence[Candidate], run: Run, failures: dict[Candidate, Exception]
) -> tuple[Candidate, tuple[Tensor, ...]] | None:
    """The candidate that rests on least of our own, and its outputs: the others are held to them."""
    for kind in TRUSTED:
        candidate = next((c for c in contenders if c.kind == kind), None)
        if candidate is None:
            continue
        try:
            return candidate, run(candidate)
        except torch.OutOfMemoryError:
            continue
        except Exception as error:
            failures[candidate] = error
    return None


def _repeat(seconds: dict[Candidate, float], run: Run, device: torch.device, end: float) -> None:
    """Times those that are close to the best again, in turns, and keeps the least of each."""
    for near in (near for near, rounds in ROUNDS for _ in range(rounds)):
        close = [c for c, s in seconds.items() if s <= near * min(seconds.values())]
        if len(close) < 2 or time.perf_counter() > end:
            return
        for candidate in close:
            seconds[candidate] = min(seconds[candidate], _timed(partial(run, candidate), device))


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one warm call: the first's, or the mean of as many as make a measurement that the clock can tell."""
    first = _elapsed(run, 1, device)
    calls = max(1, min(MOST_CALLS, int(LEAST_SECONDS / max(first, 1e-9))))
    return first if first > LONG else min(first, _elapsed(run, calls, device))


def _elapsed(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds of a call. On a GPU the host first queues a wait, so that it is ahead and only the device is timed."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    torch.cuda._sleep(1_000_000)
    before.record()
    for _ in range(calls):
        run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) * 1e-3 / calls
