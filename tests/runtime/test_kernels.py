"""Kernels: made once, kept on disk, chosen by measuring, replaced when they fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import einscade
from einscade.codegen.source import Source
from einscade.compiler.gradients import gradient, scan_free
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade, print_cascade
from einscade.passes.differentiate import differentiate
from einscade.runtime import call, kernels, library_call, tuning
from einscade.runtime import device as machine
from einscade.runtime.cache import DiskCache
from einscade.runtime.call import call_for
from einscade.runtime.candidates import Candidate
from einscade.runtime.kernels import Kernel, build
from einscade.runtime.messages import warn_once
from einscade.runtime.program import DTYPES, Program, parse_program
from einscade.runtime.recompute import recompute_gradients
from tests.codegen.tables import forward as table_bias
from tests.codegen.tables import gradient as gradient_of
from tests.models.small import CausalAttention
from tests.runtime.test_library_gradient import SQUARE

ATTENTION = parse_cascade("""
cascade attention(Q[b,h,p,e], K[b,h,m,e], V[b,h,m,f]) -> O
  where b < B, h < 4, p < P, m < M, e < 8, f < 8
  S[b,h,p,m] = sum(e) 0.25 * Q[b,h,p,e] * K[b,h,m,e] if m <= p
  G[b,h,p] = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p] = sum(m) W[b,h,p,m]
  O[b,h,p,f] = sum(m) W[b,h,p,m] * V[b,h,m,f] / Z[b,h,p]
""")
PROGRAM = Program("exact", ATTENTION)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of its own, and no kernel in memory, before and after."""

    def forget() -> None:
        kernels._build.cache_clear()
        call.calls.clear()
        warn_once.cache_clear()

    monkeypatch.setenv("EINSCADE_CACHE_DIR", str(tmp_path / "kernels"))
    forget()
    yield
    forget()


def _inputs(b: int = 2, p: int = 9, m: int = 9) -> tuple[tuple[torch.Tensor, ...], dict[str, int]]:
    q, k, v = torch.randn(b, 4, p, 8), torch.randn(b, 4, m, 8), torch.randn(b, 4, m, 8)
    return (q, k, v), {"B": b, "M": m, "P": p}


def _run(kernel: Kernel, inputs: tuple[torch.Tensor, ...], sizes: dict[str, int]) -> tuple[torch.Tensor, ...]:
    return kernel(inputs, [sizes[name] for name in kernel.program.cascade.symbols])


def _check(outputs: tuple[torch.Tensor, ...] | list[torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> None:
    expected = interpret(ATTENTION, dict(zip("QKV", inputs, strict=True)))["O"]
    torch.testing.assert_close(outputs[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_every_candidate_computes_the_cascade() -> None:
    inputs, sizes = _inputs(p=70, m=133)
    kernel = build(ATTENTION, "exact", CPU, sizes)
    kinds = [c.kind for c in kernel.candidates]
    assert kinds[0] == "library:sdpa"
    assert "tiled_torch" in kinds
    assert kinds[-2:] == ["flat", "interpreter"]
    for candidate in kernel.candidates:
        _check(kernel.prepared(candidate)(inputs, list(sizes.values())), inputs)


def test_a_triangle_spelled_as_a_bias_is_the_librarys_flag() -> None:
    """Recognised as raised it would be a mask tensor, under which the library computes every tile."""
    spelled = parse_cascade("""
cascade attention(Q[b,h,p,e]: f32, K[b,h,m,e]: f32, V[b,h,m,f]: f32) -> O[b,h,p,f]: f32
  where b < 2, h < 4, p < N, m < N, e < 8, f < 8
  S[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e]
  A[b,h,p,m] = 0.25 * S[b,h,p,m] + Where(m <= p, 0, -3.4028234663852886e+38)
  G[b,h,p]   = max(m) A[b,h,p,m]
  W[b,h,p,m] = exp(A[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f] = sum(m) W[b,h,p,m] * V[b,h,m,f] / Z[b,h,p]
""")
    assert library_call.needs_mask(spelled)
    kernel = build(spelled, "exact", CPU, {"N": 70})
    calls = [c for c in kernel.candidates if c.kind == "library:sdpa"]
    assert len(calls) == 1
    assert "mask, causal = None, True" in calls[0].source.text
    inputs, _ = _inputs(p=70, m=70)
    expected = interpret(spelled, dict(zip("QKV", inputs, strict=True)))["O"]
    (output,) = kernel.prepared(calls[0])(inputs, [70])
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)


def _gradient_of(text: str) -> Program:
    found = gradient(Program("exact", parse_cascade(text)), (True, True, True)).backward
    assert found is not None
    return found


def _gradient_inputs(program: Program, n: int) -> tuple[list[torch.Tensor], list[int], dict[str, torch.Tensor]]:
    """Inputs of a gradient of attention over n positions, sizes, and what the interpreter makes of them."""
    assert program.derived is not None
    sizes = {s: {"B": 2}.get(s, n) for s in program.cascade.symbols}
    forward = program.derived.forward
    values = {
        t.name: torch.randn(2, 4, n, int(forward.shape(t.name)[-1])).to(DTYPES[t.dtype]) for t in forward.inputs
    }  # fmt: skip
    values |= interpret(forward, values, sizes)
    tensors = program.cascade.inputs
    values["dO"] = torch.randn_like(values["O"])
    inputs = [values[t.name].to(DTYPES[t.dtype]) for t in tensors]
    named = dict(zip((t.name for t in tensors), inputs, strict=True))
    return inputs, list(sizes.values()), interpret(program.cascade, named, sizes)


def _built(program: Program, sizes: Sequence[int]) -> Kernel:
    named = dict(zip(program.cascade.symbols, sizes, strict=True))
    return build(program.cascade, program.recipe, CPU, named, program.out_order, program.derived)


def test_every_candidate_of_a_gradient_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's call is first on a CPU, is held to torch operations, and what was chosen is found again."""
    program = _gradient_of(str(ATTENTION))
    inputs, sizes, expected = _gradient_inputs(program, 70)
    kernel = _built(program, sizes)
    kinds = [c.kind for c in kernel.candidates]
    assert kinds[0] == "library:flash"
    assert "tiled_torch" in kinds
    assert kinds[-2:] == ["flat", "interpreter"]
    for candidate in kernel.candidates:
        for got, exact in zip(kernel.prepared(candidate)(inputs, sizes), expected.values(), strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)
    _pretend(monkeypatch, {"library:flash": 1.0, "tiled_torch": 3.0})
    kernel(inputs, sizes)
    kernels._build.cache_clear()
    read = _built(program, sizes)
    assert (read.candidate, read.tuned, read.from_disk) == ("library:flash", True, True)


def test_a_backward_call_that_is_wrong_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch operations say so, also where all gradients are tiny."""
    program = _gradient_of(str(ATTENTION))
    inputs, sizes, _ = _gradient_inputs(program, 70)
    inputs[-1] *= 1e-6
    kernel = _built(program, sizes)
    text = kernel.source.replace("scale=scale", "scale=2 * scale")
    assert text != kernel.source
    kernel.candidates[0] = replace(kernel.chosen, source=Source("torch", text))
    with pytest.warns(RuntimeWarning, match=r"the library:flash kernel failed \(ArithmeticError: output 0 is off by"):
        kernel(inputs, sizes)
    assert kernel.candidate == "tiled_torch"


def test_a_gpus_gradient_has_library_calls_and_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls come behind our kernels, which run where nothing is measured. None of them is trusted: what they are
    held to is the same gradient in torch's operations."""
    pytest.importorskip("triton")
    from benchmarks.stub_device import hopper

    half = SQUARE.replace("f32", "bf16").replace("e < 8", "e < 64").replace("f < 8", "f < 64")
    program = _gradient_of(half)
    held: list[Candidate] = []

    def tune(name: str, found: list[Candidate], run: object, compilations: object, *rest: object) -> tuning.Tuned:
        assert list(rest[2]) == [len(program.cascade.inputs) - 1]  # type: ignore[call-overload]
        held.append(rest[-1])  # type: ignore[arg-type]
        return tuning.Tuned(tuple(found), {}, {}, 0.0, 0.0)

    monkeypatch.setattr(tuning, "tune", tune)
    inputs, sizes, expected = _gradient_inputs(program, 70)
    with hopper():
        kernel = _built(program, [2, 4096])
        kinds = [c.kind for c in kernel.candidates]
        assert kinds.index("gluon") < kinds.index("library:cudnn") < kinds.index("library:flash")
        kernel._tune(inputs, sizes)
        torch.use_deterministic_algorithms(True)
        try:
            assert not any(c.kind.startswith("library:") for c in _built(program, [2, 4096]).candidates)
        finally:
            torch.use_deterministic_algorithms(False)
    (reference,) = held
    assert (reference.kind, reference in kernel.candidates) == ("tiled_torch", False)
    for got, exact in zip(kernel.prepared(reference)(inputs, sizes), expected.values(), strict=True):
        assert float((got.double() - exact).norm()) < 5e-3 * float(exact.norm())


def test_equal_programs_share_one_kernel_and_neighbouring_lengths_too() -> None:
    first = build(ATTENTION, "exact", CPU, {"B": 2, "P": 100, "M": 100})
    assert build(parse_cascade(str(ATTENTION)), "exact", CPU, {"B": 2, "P": 128, "M": 65}) is first
    assert build(ATTENTION, "exact", CPU, {"B": 2, "P": 129, "M": 65}) is not first


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((0, 1, 2, 3, 5, 8, 9), (0, 1, 2, 4, 8, 8, 16)),
        ((129, 256, 257, 362, 363), (256, 256, 256, 256, 512)),
        ((5793, 8000, 8192, 8200, 11585, 11586), (8192, 8192, 8192, 8192, 8192, 16384)),
    ],
)
def test_sizes_count_as_powers_of_two(sizes: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert tuple(machine.bucket({"n": n})[0][1] for n in sizes) == expected


def test_a_call_takes_the_kernel_that_build_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways to a bucket, written out in the call and looked up in `build`, are one."""
    used: list[Kernel] = []
    plain = Kernel.__call__
    monkeypatch.setattr(Kernel, "__call__", lambda self, *given: used.append(self) or plain(self, *given))  # type: ignore[func-returns-value]
    found = call_for(PROGRAM.text, CPU)
    for n in (1, 2, 3, 9, 250, 256, 257, 500, 512, 520, 725):
        inputs, sizes = _inputs(b=1, p=n, m=n)
        found.run(inputs, [sizes[s] for s in ATTENTION.symbols])
        assert used[-1] is build(ATTENTION, "exact", CPU, sizes)
    assert len(found.kernels) == 7


def test_a_choice_serves_the_lengths_around_it(tuned: list[str], fresh_dynamo: None) -> None:
    """With lengths as symbols, one that was measured is not measured again a little above or below a power of two."""
    layer = CausalAttention()
    fast = einscade.optimize(layer, dynamic=True, inner="eager")
    with torch.no_grad():
        for n in (512, 500, 520, 724):
            x = torch.randn(2, n, 32)
            torch.testing.assert_close(fast(x), layer(x), rtol=1e-4, atol=1e-5)
    assert len(tuned) == 1


def test_a_second_process_starts_from_the_disk() -> None:
    """It neither rewrites nor emits nor measures: each would raise."""
    inputs, sizes = _inputs()
    first = build(ATTENTION, "exact", CPU, sizes)
    _run(first, inputs, sizes)
    assert first.timings
    code = f"""
import torch
from einscade.ir.text import parse_cascade, print_cascade
from einscade.runtime import kernels
def forbidden(*args): raise AssertionError("compiled again")
kernels._make = kernels.tuning.tune = forbidden
kernel = kernels.build(parse_cascade('''{ATTENTION}'''), "exact", torch.device("cpu"), {sizes!r})
assert kernel.from_disk and kernel.tuned and len(kernel.timings) == {len(first.timings)}
print(kernel.candidate, len(kernel.steps), hash(kernel.source) == hash(kernel.candidates[0].source.text))
q = torch.randn(2, 4, 9, 8)
print(kernel((q, q, q), list({sizes!r}.values()))[0].shape)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    source_key = "from einscade.runtime import cache; print(cache.source_fingerprint())"
    here = kernels.cache.source_fingerprint()
    there = subprocess.run([sys.executable, "-c", source_key], capture_output=True, text=True, env=environment).stdout
    if there.strip() != here:
        pytest.skip("the sources were edited while this test ran")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == f"{first.candidate} {len(first.steps)} True"


def test_what_comes_from_disk_is_what_went_there() -> None:
    _, sizes = _inputs()
    made = build(ATTENTION, "exact", CPU, sizes)
    kernels._build.cache_clear()
    read = build(ATTENTION, "exact", CPU, sizes)
    assert (made.from_disk, read.from_disk) == (False, True)
    assert read.candidates == made.candidates
    assert read.rewritten == made.rewritten
    assert read.steps == made.steps


def test_a_gpus_kernels_come_from_disk_as_they_went_there() -> None:
    """Schedules of every emitter, with all that they hold."""
    pytest.importorskip("triton")
    from benchmarks.launch import ATTENTION as HALF_PRECISION
    from benchmarks.stub_device import hopper

    half = parse_cascade(HALF_PRECISION)
    with hopper():
        for sizes in ({"B": 2, "M": 4096, "P": 4096}, {"B": 2, "M": 4096, "P": 1}):
            made = build(half, "exact", CPU, sizes)
            kinds = {c.kind for c in made.candidates}
            assert ("gluon" in kinds) is (sizes["P"] > 1)  # one row is none for the Hopper kernel
            assert "triton" in kinds
            kernels._build.cache_clear()
            read = build(half, "exact", CPU, sizes)
            assert (made.from_disk, read.from_disk) == (False, True)
            assert read.candidates == made.candidates


def test_where_determinism_is_asked_for_no_sum_is_added_up_in_any_order() -> None:
    """A gradient's kernels for a GPU; the other kind is asked for, and kept, beside them."""
    pytest.importorskip("triton")
    from benchmarks.launch import ATTENTION as HALF_PRECISION
    from benchmarks.stub_device import hopper

    forward = scan_free(parse_cascade(HALF_PRECISION), "exact")
    backward = differentiate(forward, [t.name for t in forward.inputs]).cascade
    with hopper():
        sizes = {"B": 2, "M": 4096, "P": 4096}
        assert any(c.schedule.unordered for c in build(backward, "exact", CPU, sizes).candidates)
        torch.use_deterministic_algorithms(True)
        try:
            found = build(backward, "exact", CPU, sizes).candidates
        finally:
            torch.use_deterministic_algorithms(False)
        assert "gluon" in {c.kind for c in found}
        assert not any(c.schedule.unordered for c in found)
        assert any(c.schedule.unordered for c in build(backward, "exact", CPU, sizes).candidates)


@pytest.mark.parametrize(("batch", "length"), [(2, 4096), (512, 64)])
def test_gradients_of_tables_are_added_up_where_any_order_will_do(batch: int, length: int) -> None:
    """By kernels, whose loops are over the batch where one batch's tiles are enough programs."""
    pytest.importorskip("triton")
    from benchmarks.stub_device import hopper

    cascade = gradient_of(table_bias("buckets of distances", "bf16", 8, 8, 64)).cascade
    sizes = {"B": batch, "M": length, "P": length}
    with hopper():
        found = build(cascade, "exact", CPU, sizes).candidates
        torch.use_deterministic_algorithms(True)
        try:
            ordered = build(cascade, "exact", CPU, sizes).candidates
        finally:
            torch.use_deterministic_algorithms(False)
    generated = [c for c in found if c.kind in ("gluon", "triton")]
    assert generated
    assert all("tl.atomic_add(" in c.source.text for c in generated)
    assert all(("loops along b" in c.source.text) == (length == 4096) for c in generated)
    assert not any("tl.atomic_add(" in c.source.text or c.kind in ("gluon", "triton") for c in ordered)
    assert "tiled_torch" in {c.kind for c in ordered}


def test_a_corrupt_entry_is_made_anew() -> None:
    inputs, sizes = _inputs()
    made = build(ATTENTION, "exact", CPU, sizes)
    DiskCache().path(made.address).write_bytes(b"einscade-cache-1 00\n{}")
    kernels._build.cache_clear()
    again = build(ATTENTION, "exact", CPU, sizes)
    assert not again.from_disk
    _check(_run(again, inputs, sizes), inputs)


@pytest.mark.parametrize(
    "change",
    [{"candidates": []}, {"candidates": [3]}, {"steps": None}, {"rewritten": None}, {"timings": [1]}, {"spent": []}],
)
def test_a_foreign_entry_is_made_anew(change: dict[str, object]) -> None:
    """Whole, with the right address and checksum, but not what this version writes."""
    inputs, sizes = _inputs()
    made = build(ATTENTION, "exact", CPU, sizes)
    entry = DiskCache().get(made.address)
    assert entry is not None
    DiskCache().put(made.address, {**entry, **change})
    kernels._build.cache_clear()
    again = build(ATTENTION, "exact", CPU, sizes)
    assert not again.from_disk
    _check(_run(again, inputs, sizes), inputs)


def test_a_failure_while_tuning_names_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, {"library:sdpa": 3.0, "tiled_torch": 1.0})
    inputs, sizes = _inputs()
    kernel = build(ATTENTION, "exact", CPU, sizes)
    broken = Source("torch", "def run(*inputs, **sizes):\n    raise RuntimeError('illegal instruction')\n")
    kernel.candidates.insert(0, Candidate("triton", broken, kernel.schedule, ATTENTION.symbols))
    with pytest.warns(RuntimeWarning, match=r"the triton kernel failed .*; running tiled_torch instead"):
        _check(_run(kernel, inputs, sizes), inputs)
    assert kernel.candidate == "tiled_torch"


def _pretend(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
    monkeypatch.setattr(tuning, "_timed", lambda run, device: seconds[run.args[0].kind])


def test_a_measurement_within_the_noise_does_not_overrule_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, {"library:sdpa": 1.05, "tiled_torch": 1.0})
    inputs, sizes = _inputs()
    kernel = build(ATTENTION, "exact", CPU, sizes)
    _check(_run(kernel, inputs, sizes), inputs)
    assert (kernel.candidate, kernel.tuned) == ("library:sdpa", True)


def test_a_single_query_leaves_nothing_to_choose() -> None:
    """One query makes the library's call the only candidate on a CPU; of more there is a choice."""
    single = parse_cascade(print_cascade(ATTENTION).replace("p < P", "p < 1").replace(" if m <= p", ""))
    kernel = build(single, "exact", CPU, {"B": 2, "M": 9})
    assert [c.kind for c in kernel.candidates] == ["library:sdpa", "flat", "interpreter"]
    assert kernel.library_call is not None
    (q, k, v), _ = _inputs(p=1)
    (actual,) = kernel.library_call(q, k, v, B=2, M=9)
    torch.testing.assert_close(actual.double(), interpret(single, {"Q": q, "K": k, "V": v})["O"], rtol=1e-5, atol=1e-6)
    assert build(ATTENTION, "exact", CPU, _inputs(p=1)[1]).library_call is None


def test_no_candidate_stands_twice() -> None:
    kernel = build(ATTENTION, "exact", CPU, _inputs()[1])
    assert len(set(kernel.candidates)) == len(kernel.candidates)


def test_the_fastest_candidate_is_found_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, {"library:sdpa": 3.0, "tiled_torch": 1.0})
    inputs, sizes = _inputs()
    kernel = build(ATTENTION, "exact", CPU, sizes)
    assert kernel.candidate == "library:sdpa"
    _check(_run(kernel, inputs, sizes), inputs)
    assert kernel.candidate == "tiled_torch"
    kernels._build.cache_clear()
    read = build(ATTENTION, "exact", CPU, sizes)
    assert (read.candidate, read.tuned) == ("tiled_torch", True)


def test_without_autotuning_the_model_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EINSCADE_AUTOTUNE", "0")
    monkeypatch.setattr(tuning, "_timed", None)
    inputs, sizes = _inputs()
    kernel = build(ATTENTION, "exact", CPU, sizes)
    _check(_run(kernel, inputs, sizes), inputs)
    assert kernel.candidate == "library:sdpa"


def test_while_a_graph_is_captured_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost model's choice runs, and the first call after it tunes."""
    inputs, sizes = _inputs()
    kernel = build(ATTENTION, "exact", CPU, sizes)
    with monkeypatch.context() as capture:
        capture.setattr(kernels, "_capturing", lambda device: True)
        capture.setattr(tuning, "tune", None)
        _check(_run(kernel, inputs, sizes), inputs)
    assert not kernel.tuned
    _check(_run(kernel, inputs, sizes), inputs)
    assert kernel.tuned


def _check_on_gpu(out: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    expected = interpret(ATTENTION, dict(zip("QKV", (x.cpu() for x in inputs), strict=True)))["O"]
    assert float((out.cpu().double() - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.gpu
def test_a_cuda_graph_captures_a_call() -> None:
    """A graph that is replayed reads what its inputs hold then."""
    device = torch.device("cuda")
    inputs = [torch.randn(2, 4, 64, 8, device=device) for _ in range(3)]
    run = call_for(PROGRAM.text, inputs[0].device).run
    run(inputs, (2, 64, 64))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (out,) = run(inputs, (2, 64, 64))
    for x in inputs:
        x.normal_()
    graph.replay()
    _check_on_gpu(out, inputs)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_call_runs_on_the_device_of_its_inputs() -> None:
    inputs = [torch.randn(2, 4, 64, 8, device="cuda:1") for _ in range(3)]
    assert torch.cuda.current_device() == 0
    (out,) = call_for(PROGRAM.text, inputs[0].device).run(inputs, (2, 64, 64))
    assert out.device == inputs[0].device
    _check_on_gpu(out, inputs)


def test_the_last_candidates_failure_is_the_callers() -> None:
    inputs, sizes = _inputs()
    kernel = build(ATTENTION, "exact", CPU, sizes)
    kernel.tuned = True
    broken = Source("torch", "def run(*inputs, **sizes):\n    raise RuntimeError('nothing works')\n")
    kernel.candidates[:] = [Candidate("interpreter", broken, kernel.schedule, ATTENTION.symbols)]
    with pytest.raises(RuntimeError, match="nothing works"):
        _run(kernel, inputs, sizes)


def test_out_of_memory_is_no_broken_kernel() -> None:
    """It is the caller's, and the next call tries the same candidate again."""
    inputs, sizes = _inputs()
    kernel = build(ATTENTION, "exact", CPU, sizes)
    kernel.tuned = True
    full = Source("torch", "import torch\ndef run(*inputs, **sizes):\n    raise torch.OutOfMemoryError('full')\n")
    kernel.candidates.insert(0, Candidate("triton", full, kernel.schedule, ATTENTION.symbols))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        _run(kernel, inputs, sizes)
    assert kernel.candidate == "triton"


@pytest.mark.filterwarnings("default:einscade")
def test_a_kernel_that_fails_is_replaced_and_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, sizes = _inputs()
    kernel = build(ATTENTION, "exact", CPU, sizes)
    kernel.tuned = True
    broken = Source("torch", "def run(*inputs, **sizes):\n    raise RuntimeError('illegal instruction')\n")
    unparsable = Source("torch", "def run(")
    symbols = ATTENTION.symbols
    kernel.candidates[:0] = [Candidate("triton", s, kernel.schedule, symbols) for s in (broken, unparsable)]
    with pytest.warns(RuntimeWarning) as told:
        _check(_run(kernel, inputs, sizes), inputs)
    first, second = (str(w.message).split(": ", 1)[1] for w in told)
    failed = "attention: the triton kernel failed"
    assert first == f"{failed} (RuntimeError: illegal instruction); running another schedule instead"
    assert second.startswith(f"{failed} (SyntaxError")
    assert second.endswith("running library:sdpa instead")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _check(_run(kernel, inputs, sizes), inputs)
    assert kernel.candidate == "library:sdpa"


def test_a_pass_that_breaks_costs_speed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise AssertionError("a pass is wrong")

    monkeypatch.setattr(kernels, "run", broken)
    kernels._rewrite.cache_clear()
    inputs, sizes = _inputs()
    with pytest.warns(RuntimeWarning, match="rewriting failed"):
        kernel = build(ATTENTION, "exact", CPU, sizes)
    kernels._rewrite.cache_clear()
    assert kernel.rewritten == ATTENTION
    _check(_run(kernel, inputs, sizes), inputs)


def test_unknown_recipes_and_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown recipe 'exat'"):
        build(ATTENTION, "exat", CPU, {"B": 1, "P": 1, "M": 1})
    with pytest.raises(ValueError, match="kernels are generated for cpu and cuda"):
        build(ATTENTION, "exact", torch.device("mps"), {"B": 1, "P": 1, "M": 1})


def test_no_entry_is_anything_but_text() -> None:
    _, sizes = _inputs()
    made = build(ATTENTION, "exact", CPU, sizes)
    header, body = DiskCache().path(made.address).read_text().split("\n", 1)
    assert header.startswith("einscade-cache-1 ")
    assert json.loads(body)["entry"]["candidates"][0]["source"]["text"] == made.source


# --- programs --------------------------------------------------------------------------------------------------------


def test_programs_print_and_parse() -> None:
    program = Program("exact", ATTENTION, (("O", ("b", "p", "h", "f")),))
    assert program.text.startswith("exact -> O[b,p,h,f] ;; cascade attention(")
    assert "\n" not in program.text  # compilers quote it in comments
    assert parse_program(program.text) == program
    assert parse_program(PROGRAM.text) == PROGRAM
    assert program.dtypes == (torch.float32,)
    assert program.layouts((2, 3, 5)) == (((2, 4, 5, 8), (160, 8, 32, 1)),)
    with pytest.raises(ValueError, match="not a program"):
        parse_program("exact")
    with pytest.raises(ValueError, match="does not order"):
        parse_program(PROGRAM.text.replace("exact", "exact -> O[b,p,f]", 1))


def test_gradients_say_what_they_are_derived_from() -> None:
    program = _gradient_of(str(ATTENTION))
    assert " ;; derived O by dO, Q by dQ, K by dK, V by dV ;; cascade attention(" in program.text
    assert "\n" not in program.text
    assert parse_program(program.text) == program
    plain = Program(program.recipe, program.cascade)
    assert parse_program(plain.text) == plain
    with pytest.raises(ValueError, match="dX is not the gradient of Q"):
        parse_program(program.text.replace("Q by dQ", "Q by dX"))


def test_outputs_come_in_the_memory_order_asked_for() -> None:
    program = Program("exact", ATTENTION, (("O", ("b", "p", "h", "f")),))
    inputs, _ = _inputs(p=33, m=33)
    (out,) = call_for(program.text, CPU).run(inputs, (2, 33, 33))
    _check((out,), inputs)
    assert out.transpose(1, 2).is_contiguous()


def test_inputs_that_contradict_the_program_are_refused() -> None:
    (q, k, v), _ = _inputs()
    with pytest.raises(ValueError, match=r"input K has shape \(2, 4, 3, 8\), the sizes say b=2, h=4, m=9, e=8"):
        call_for(PROGRAM.text, CPU).run((q, k[:, :, :3], v), (2, 9, 9))
    with pytest.raises(ValueError, match=r"input Q is torch.float64, the cascade says torch.float32"):
        call_for(PROGRAM.text, CPU).run((q.double(), k, v), (2, 9, 9))
    with pytest.raises(ValueError, match="has 3 inputs, 2 were given"):
        call_for(PROGRAM.text, CPU).run((q, k), (2, 9, 9))


@pytest.mark.parametrize(("b", "p", "m"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (0, 0, 0)])
def test_empty_ranks(b: int, p: int, m: int) -> None:
    inputs, _ = _inputs(b, p, m)
    (out,) = call_for(PROGRAM.text, CPU).run(inputs, (b, m, p))
    assert out.shape == (b, 4, p, 8)
    assert (out == 0).all()


def test_recomputed_gradients_are_those_of_the_flat_form() -> None:
    inputs, _ = _inputs(p=6, m=6)
    leaves = [x.double().requires_grad_() for x in inputs]
    scores = (leaves[0] @ leaves[1].mT * 0.25).masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf)
    out = scores.softmax(-1) @ leaves[2]
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, [leaves[0], leaves[2]], grad)
    found = recompute_gradients(PROGRAM.text, inputs, [grad.float()], [True, False, True], (2, 6, 6))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
