"""Tuning: what is measured, in which order, against whom, for how long; and by several processes at once."""

from __future__ import annotations

import ast
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import einscade
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Source
from einscade.runtime import ahead, call, kernels, progress, tuning
from einscade.runtime.candidates import Candidate
from einscade.runtime.tuning import tune
from tests.models.small import CausalAttention

X = torch.arange(6.0)


def _candidate(kind: str, number: int = 0) -> Candidate:
    return Candidate(kind, Source("torch", f"# {kind} {number}"), Schedule(), ())


SDPA, GLUON, TRITON, TILED, FLAT, INTERPRETER = map(
    _candidate, ("library:sdpa", "gluon", "triton", "tiled_torch", "flat", "interpreter")
)
ALL = [GLUON, TRITON, TILED, SDPA, FLAT, INTERPRETER]


def _seconds(monkeypatch: pytest.MonkeyPatch, of: dict[Candidate, float]) -> list[Candidate]:
    """Pretends these times; what was measured, in order."""
    measured: list[Candidate] = []

    def timed(run: Callable[[], object], device: torch.device) -> float:
        (candidate,) = run.args  # type: ignore[attr-defined]
        measured.append(candidate)
        return of[candidate]

    monkeypatch.setattr(tuning, "_timed", timed)
    return measured


def _nothing(candidate: Candidate) -> list[Callable[[], object]]:
    """There is nothing to compile."""
    return []


def _same(candidate: Candidate) -> tuple[Tensor, ...]:
    return (X * 2,)


def test_the_fastest_is_first_and_the_last_resorts_last(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = _seconds(monkeypatch, {GLUON: 2.0, TRITON: 3.0, TILED: 9.0, SDPA: 1.0})
    found = tune("site", ALL, _same, _nothing, [X], False)
    assert found.order == (SDPA, GLUON, TRITON, TILED, FLAT, INTERPRETER)
    assert measured[:4] == [SDPA, GLUON, TRITON, TILED]  # the library call is known whenever the time runs out
    assert TILED not in measured[4:]
    assert GLUON in measured[4:]


@pytest.mark.parametrize(("challenger", "first"), [(0.95, GLUON), (0.85, TRITON)])
def test_the_model_is_overruled_beyond_the_noise_only(
    challenger: float, first: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    _seconds(monkeypatch, {GLUON: 1.0, TRITON: challenger, TILED: 9.0, SDPA: 9.0})
    assert tune("site", ALL, _same, _nothing, [X], False).order[0] == first


def test_a_busy_moment_is_nobodys_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest candidate is measured slow once, and fast when its turn comes again."""
    times = {SDPA: [1.0] * 9, TILED: [1.5, *[0.5] * 9], TRITON: [3.0], GLUON: [3.0]}
    monkeypatch.setattr(tuning, "_timed", lambda run, device: times[run.args[0]].pop(0))
    assert tune("site", [SDPA, TILED, TRITON, GLUON], _same, _nothing, [X], False).order[0] == TILED


@pytest.mark.parametrize(
    ("measured", "seconds", "calls"),
    [
        ([5e-4, 1e-4], 1e-4, [1, 2]),  # a busy moment, in a time of which two make a measurement
        ([9e-4, 1e-4], 1e-4, [1, 1]),  # one of which none does
        ([1e-5, 2e-5], 1e-5, [1, 50]),  # and one in the second series
        ([0.2], 0.2, [1]),
    ],
)
def test_a_busy_moment_in_the_first_call_is_no_measurement(
    measured: list[float], seconds: float, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(tuning, "_elapsed", lambda run, n, device: asked.append(n) or measured[len(asked) - 1])
    assert tuning._timed(lambda: None, X.device) == seconds
    assert asked == calls


def test_the_closest_are_timed_most_often(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = _seconds(monkeypatch, {GLUON: 1.02, TRITON: 1.0, TILED: 1.5, SDPA: 3.0})
    tune("site", [GLUON, TRITON, TILED, SDPA], _same, _nothing, [X], False)
    assert [measured.count(c) for c in (GLUON, TRITON, TILED, SDPA)] == [9, 9, 5, 1]


def test_no_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is started any more: the library call is known, the others stay in the model's order behind it."""
    monkeypatch.setattr(tuning, "SECONDS", -1.0)
    measured = _seconds(monkeypatch, {SDPA: 1.0})
    assert tune("site", ALL, _same, _nothing, [X], False).order == (SDPA, GLUON, TRITON, TILED, FLAT, INTERPRETER)
    assert measured == [SDPA]


def test_a_candidate_far_behind_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Candidate] = []

    def run(candidate: Candidate) -> tuple[Tensor, ...]:
        calls.append(candidate)
        return (X * 2,)

    monkeypatch.setattr(tuning, "_timed", lambda run, device: 1e-9)
    tune("site", [SDPA, TILED], run, _nothing, [X], False)
    assert calls == [SDPA, TILED]


def test_wrong_and_broken_candidates_are_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(candidate: Candidate) -> tuple[Tensor, ...]:
        if candidate == TRITON:
            raise RuntimeError("does not compile")
        return (X * (3 if candidate == GLUON else 2),)

    _seconds(monkeypatch, {TILED: 2.0, SDPA: 1.0})
    found = tune("site", ALL, run, _nothing, [X], False)
    assert found.order == (SDPA, TILED, FLAT, INTERPRETER)
    assert [type(found.failures[c]) for c in (GLUON, TRITON)] == [ArithmeticError, RuntimeError]


def test_without_the_library_the_others_are_held_to_torch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(candidate: Candidate) -> tuple[Tensor, ...]:
        if candidate == SDPA:
            raise RuntimeError("no such library")
        return (X * (3 if candidate == GLUON else 2),)

    _seconds(monkeypatch, {TILED: 2.0, TRITON: 1.0})
    found = tune("site", ALL, run, _nothing, [X], False)
    assert found.order == (TRITON, TILED, FLAT, INTERPRETER)
    assert set(found.failures) == {SDPA, GLUON}


FLASH, REFERENCE = _candidate("library:flash"), _candidate("tiled_torch", 1)


def _tripled(*wrong: Candidate) -> Callable[[Candidate], tuple[Tensor, ...]]:
    return lambda candidate: (X * (3 if candidate in wrong else 2),)


def test_where_none_is_trusted_candidates_are_held_to_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As gradients on a GPU are; a library's backward call is not trusted more than others."""
    times = {GLUON: 1.0, TRITON: 2.0, FLASH: 1.5}
    for wrong, order in ((GLUON, (FLASH, TRITON)), (FLASH, (GLUON, TRITON))):
        measured = _seconds(monkeypatch, times)
        found = tune("site", [*times, FLAT], _tripled(wrong), _nothing, [X], False, (), REFERENCE)
        assert found.order == (*order, FLAT)
        assert [type(e) for e in found.failures.values()] == [ArithmeticError]
        assert REFERENCE not in measured
        assert set(found.seconds) == set(order)


def test_a_reference_that_nobody_agrees_with_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _seconds(monkeypatch, {GLUON: 2.0, TRITON: 1.0})
    found = tune("site", [GLUON, TRITON, FLAT], _tripled(REFERENCE), _nothing, [X], False, (), REFERENCE)
    assert found.order == (TRITON, GLUON, FLAT)
    assert found.failures == {}


def test_a_reference_that_fails_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(candidate: Candidate) -> tuple[Tensor, ...]:
        if candidate is REFERENCE:
            raise torch.OutOfMemoryError("full")
        return (X * (3 if candidate is TRITON else 2),)

    _seconds(monkeypatch, {GLUON: 2.0, TRITON: 1.0})
    found = tune("site", [GLUON, TRITON, FLAT], run, _nothing, [X], False, (), REFERENCE)
    assert (found.order, found.failures) == ((TRITON, GLUON, FLAT), {})


def test_a_trusted_candidate_makes_a_reference_needless(monkeypatch: pytest.MonkeyPatch) -> None:
    _seconds(monkeypatch, {GLUON: 1.0, TILED: 2.0})
    found = tune("site", [GLUON, TILED], _tripled(REFERENCE), _nothing, [X], False, (), REFERENCE)
    assert (found.order, found.failures) == ((GLUON, TILED), {})


def test_too_little_memory_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(candidate: Candidate) -> tuple[Tensor, ...]:
        if candidate == GLUON:
            raise torch.OutOfMemoryError("while measuring")
        return (X * 2,)

    _seconds(monkeypatch, {TRITON: 1.0, TILED: 2.0, SDPA: 3.0})
    found = tune("site", ALL, run, _nothing, [X], False)
    assert found.order == (TRITON, TILED, SDPA, GLUON, FLAT, INTERPRETER)
    assert found.failures == {}


def test_threads_may_parse_python_side_by_side() -> None:
    """As building a kernel's first IR does. A collection that calls finalizers would let one thread into another's."""
    text = "".join(f"y{i} = (x + {i}) * [a for a in (x, {i})][0]\n" for i in range(300))

    class Ring:
        def __init__(self) -> None:
            self.me = self
            weakref.finalize(self, sum, range(300))

    def parse() -> None:
        for _ in range(30):
            Ring()
            ast.parse(text)

    before, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(50, 5, 5)
    sys.setswitchinterval(1e-6)
    try:
        over = ahead.side_by_side([[parse]] * 4, time.perf_counter() + 60, lambda done: None)
    finally:
        gc.set_threshold(*before)
        sys.setswitchinterval(interval)
    assert over == dict.fromkeys(range(4))
    assert gc.isenabled()


def test_candidates_are_compiled_side_by_side_before_any_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has nothing to compile is measured all the same; what raises is out only if it does so when it is run."""
    monkeypatch.setattr(ahead, "_cores", lambda: 2)
    both = threading.Barrier(2, timeout=60)
    done: list[Candidate] = []

    def compilations(candidate: Candidate) -> list[Callable[[], object]]:
        if candidate.kind == "tiled_torch":
            raise SyntaxError("not even Python")

        def job() -> None:
            both.wait()  # one after the other they would wait for ever
            done.append(candidate)
            if candidate is TRITON:
                raise RuntimeError("does not compile")

        return {"gluon": [job, job], "triton": [job, job], "library:sdpa": []}[candidate.kind]

    def run(candidate: Candidate) -> tuple[Tensor, ...]:
        assert done.count(GLUON) == 2
        assert done.count(TRITON) >= 1
        if candidate is TRITON:
            raise RuntimeError("does not compile")
        return (X * 2,)

    _seconds(monkeypatch, {GLUON: 1.0, TILED: 3.0, SDPA: 2.0})
    found = tune("site", ALL, run, compilations, [X], False)
    assert found.order == (GLUON, SDPA, TILED, FLAT, INTERPRETER)
    assert {c: type(e) for c, e in found.failures.items()} == {TRITON: RuntimeError}
    assert [(t.rank, t.kind) for t in found.timings(ALL)] == [(0, "gluon"), (2, "tiled_torch"), (3, "library:sdpa")]


def test_what_is_not_compiled_in_time_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that compiles is waited for however long it takes; what is under way then is left to itself."""
    monkeypatch.setattr(tuning, "COMPILING", -1.0)
    monkeypatch.setattr(ahead, "_cores", lambda: 2)
    monkeypatch.setattr(ahead, "REDRAWN", 0.01)
    enough = threading.Event()
    started: list[Candidate] = []

    def compilations(candidate: Candidate) -> list[Callable[[], object]]:
        def job() -> None:
            started.append(candidate)
            if candidate in (TRITON, GLUON):
                enough.wait(60)
            if candidate is TILED:
                raise RuntimeError("does not compile")
            if candidate is SDPA:
                time.sleep(0.1)

        return [job]

    _seconds(monkeypatch, {SDPA: 1.0})
    found = tune("site", [TRITON, TILED, SDPA, GLUON, FLAT], _same, compilations, [X], False)
    enough.set()
    assert started[:3] == [TRITON, TILED, SDPA]
    assert set(found.failures) == {TILED}
    assert found.order[0] == SDPA
    assert set(found.seconds) == {SDPA}
    assert {TRITON, GLUON} <= {*found.order}


def test_without_threads_candidates_are_compiled_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("no more threads")))
    _seconds(monkeypatch, {GLUON: 2.0, TRITON: 1.0, TILED: 9.0, SDPA: 9.0})
    found = tune("site", ALL, _same, lambda c: [lambda: None], [X], False)
    assert found.order[0] == TRITON
    assert found.failures == {}


def test_progress_is_drawn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_visible", lambda: True)
    _seconds(monkeypatch, dict.fromkeys(ALL, 1.0))
    compilations = lambda c: [lambda: None] if c is GLUON else []  # noqa: E731
    tune("attention", ALL, _same, compilations, [X], False)
    progress.finish()
    drawn = capsys.readouterr().err
    assert "0/1 kernels compiled" in drawn
    assert "3/4 kernels measured" in drawn
    assert "attention" in drawn
    assert drawn.endswith("\r\x1b[K")


def test_equal_layers_are_tuned_once(
    tuned: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None
) -> None:
    monkeypatch.setenv("EINSCADE_CACHE_DIR", str(tmp_path))
    kernels._build.cache_clear()
    call.calls.clear()
    layers = torch.nn.Sequential(*[CausalAttention() for _ in range(5)])
    fast = einscade.optimize(layers, inner="eager")
    with torch.no_grad():
        fast(torch.randn(2, 19, 32))
        fast(torch.randn(2, 19, 32))
    assert len(fast.report.sites) == 5
    assert len(tuned) == 1


_TUNE = """
import sys, torch
from einscade.ir.text import parse_cascade
from einscade.runtime.kernels import build
from einscade.runtime import kernels
sizes = {"B": 2, "M": 33, "P": 33}
cascade = parse_cascade(open(sys.argv[1]).read())
sys.stdin.readline()  # all start at once
kernel = build(cascade, "exact", torch.device("cpu"), sizes)
torch.manual_seed(0)
inputs = [torch.randn(2, 4, 33, 8) for _ in range(3)]
(out,) = kernel(inputs, [2, 33, 33])
reference = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.25)
torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-5)
kernels._build.cache_clear()
again = build(cascade, "exact", torch.device("cpu"), sizes)
assert again.tuned and again.from_disk, (again.tuned, again.from_disk)
"""


def test_processes_that_tune_one_site_at_once(tmp_path: Path) -> None:
    from tests.runtime.test_kernels import ATTENTION

    text = tmp_path / "cascade.txt"
    text.write_text(str(ATTENTION))
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "EINSCADE_CACHE_DIR": str(tmp_path / "kernels"),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _TUNE, str(text)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        for _ in range(3)
    ]
    errors = [process.communicate(b"\n", timeout=300)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert [p.suffix for p in (tmp_path / "kernels").rglob("*") if p.is_file()] == [".json"]
