"""Launches without the JIT: the C function gets what the JIT would give it, for every kernel and alignment, and nothing
is computed twice. A stub stands for the GPU."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from benchmarks import launch as benchmark
from benchmarks.stub_device import hopper
from einscade.codegen import gluon, triton_emit
from einscade.codegen.loops import plan
from einscade.codegen.source import Source
from einscade.codegen.space import candidates
from einscade.ir.device import A100, H200
from einscade.ir.text import parse_cascade
from einscade.runtime import ahead, call, kernels, launch, tuning
from einscade.runtime import candidates as candidates_of
from einscade.runtime.modules import load
from tests.codegen.cascades import CASES, cascade, inputs

BY_NAME = {c.name: c for c in CASES}
SHAPE = {"dtype": "bf16", "h": 4, "g": 2, "e": 64, "f": 64}


@pytest.fixture
def launched() -> Iterator[list[tuple[Any, ...]]]:
    calls: list[tuple[Any, ...]] = []
    _forget()
    with hopper(calls):
        yield calls
    _forget()


def _forget() -> None:
    """No module keeps what it compiled for another device."""
    for cached in (load, kernels._build, launch._direct_launches):
        cached.cache_clear()
    call.calls.clear()


def _source(kind: str) -> Source:
    loops = plan(cascade(BY_NAME["causal"], **SHAPE)[1])
    if kind == "gluon":
        return gluon.emit(loops, gluon.schedules(loops)[0])
    device = A100 if kind == "triton, no descriptors" else H200
    return triton_emit.emit(loops, candidates(loops, device, {})[0])


def _inputs(n: int, offset: int = 0) -> tuple[Tensor, ...]:
    def normal(heads: int) -> Tensor:
        whole = torch.randn(heads * n * 64 + offset).bfloat16()
        return whole[offset:].view(1, heads, n, 64)

    return normal(4), normal(2), normal(2)


def _launchers(run: Callable[..., Any]) -> list[launch.Launcher]:
    return [x for x in run.__globals__.values() if isinstance(x, launch.Launcher)]


def _forms_forgotten(run: Callable[..., Any], call: Callable[[], object]) -> None:
    """A call of `run` whose launches go through the JIT."""
    with contextlib.ExitStack() as forgotten:
        for launcher in _launchers(run):
            forgotten.enter_context(mock.patch.object(launcher, "_forms", {}))
        call()


def _without_output(call: tuple[Any, ...], inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """What is passed, but hooks, the output's address, which differs, and the inputs as addresses."""
    known = {x.data_ptr() for x in inputs}

    def plain(x: Any) -> Any:
        if isinstance(x, Tensor):
            x = x.data_ptr()
        if isinstance(x, tuple):
            return tuple(map(plain, x))
        return "address" if isinstance(x, int) and x > 1 << 24 and x not in known else x

    head, rest = call[:10], call[13:]
    constants = [i for i, x in enumerate(rest) if isinstance(x, bool) or x is None]  # compiled in
    return tuple(map(plain, head)), tuple(plain(x) for i, x in enumerate(rest) if i not in constants)


def _case(name: str) -> tuple[Any, tuple[torch.Tensor, ...], dict[str, int]]:
    """The Gluon module of a case, with operands and sizes for it."""
    case = BY_NAME[name]
    plain, rewritten = cascade(case, **SHAPE)
    loops = plan(rewritten)
    run = load(gluon.emit(loops, gluon.schedules(loops)[0]), name)
    sizes = {s: 200 if s in "MP" else 1 for s in plain.symbols}
    return run, tuple(inputs(plain, case, sizes).values()), sizes


@pytest.mark.parametrize("kind", ["gluon", "triton", "triton, no descriptors"])
def test_a_launch_passes_what_the_jit_passes(kind: str, launched: list[tuple[Any, ...]]) -> None:
    run = load(_source(kind), "causal")
    for n, offset in ((256, 0), (250, 0), (250, 1), (17, 0), (1, 0), (33, 0), (16, 0), (257, 0), (256, 0), (1, 0)):
        operands = _inputs(n, offset)
        run(*operands, B=1, M=n, P=n)
        run(*operands, B=1, M=n, P=n)
        _forms_forgotten(run, functools.partial(run, *operands, B=1, M=n, P=n))
        direct, through_the_jit = launched[-2:]
        assert direct[10:13] == (None, None, None)
        assert _without_output(direct, operands) == _without_output(through_the_jit, operands), (n, offset)


@pytest.mark.parametrize("name", ["documents", "table"])
def test_every_kernel_of_a_module_is_launched_so(name: str, launched: list[tuple[Any, ...]]) -> None:
    """A list of tiles that a kernel of its own makes, and operands of other ranks and dtypes."""
    run, operands, sizes = _case(name)
    for _ in range(2):
        launched.clear()
        run(*operands, **sizes)
    direct = list(launched)
    launched.clear()
    _forms_forgotten(run, lambda: run(*operands, **sizes))
    assert len(direct) == (2 if name == "documents" else 1)
    for ours, theirs in zip(direct, launched, strict=True):
        assert ours[10:13] == (None, None, None)
        assert _without_output(ours, ()) == _without_output(theirs, ())


@pytest.mark.parametrize("name", ["documents", "table"])
def test_compiling_ahead_launches_nothing_and_leaves_nothing_to_compile(
    name: str, launched: list[tuple[Any, ...]]
) -> None:
    run, operands, sizes = _case(name)
    copies = [x.clone() for x in operands]
    jobs = launch.compilations(run, operands, sizes)
    assert len(jobs) == (2 if name == "documents" else 1)
    assert ahead.side_by_side([jobs], time.perf_counter() + 200, lambda over: None) == {0: None}
    assert launched == []
    assert all(map(torch.equal, copies, operands))
    with contextlib.ExitStack() as stack:
        for launcher in _launchers(run):
            stack.enter_context(mock.patch.object(launcher.kernel, "_do_compile", side_effect=AssertionError))
        run(*operands, **sizes)
    assert len(launched) == len(jobs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_tuning_compiles_nothing_but_ahead(
    launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every kernel is compiled by a thread, also for tensors in place of which compiling gets addresses. (Launches do
    nothing here, so that results are whatever the memory had.)"""
    from triton import knobs

    compilers: list[tuple[str, bool]] = []

    def compiled(cache_hit: bool, **_: Any) -> None:
        compilers.append((threading.current_thread().name, cache_hit))

    monkeypatch.setenv("EINSCADE_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(candidates_of, "MOST_SCHEDULES", {"gluon": 1, "triton": 1, "tiled_torch": 1})
    monkeypatch.setattr(knobs.compilation, "listener", compiled)
    monkeypatch.setattr(tuning, "SECONDS", 200.0)  # however loaded the machine is
    monkeypatch.setattr(tuning, "COMPILING", 150.0)
    program = parse_cascade(benchmark.ATTENTION)
    sizes = {"B": 1, "M": 1024, "P": 1024}
    kernel = kernels.build(program, "exact", torch.device("cpu"), sizes)
    assert [c.kind for c in tuning.contenders(kernel.candidates)] == ["gluon", "triton", "library:sdpa"]
    kernel([torch.randn(1, h, 1024, 128).bfloat16() for h in (32, 8, 8)], [1, 1024, 1024])
    assert len(compilers) == 2
    assert [c for c in compilers if not c[0].startswith("einscade") or c[1]] == []
    assert len(launched) >= 2


def test_compiling_ahead_holds_no_memory_and_writes_zeros() -> None:
    """Torch operations between kernels may index by what those would have written."""
    seen: list[Any] = []
    kernel = SimpleNamespace(run=lambda *arguments, grid, warmup, **options: seen.extend((arguments, warmup, options)))
    given, made = torch.ones(3), torch.ones(3)
    described = SimpleNamespace(base=given, block_shape=[1])
    jobs: list[Any] = []
    launch._Noting(kernel, {given.untyped_storage().data_ptr()}, jobs)[(1,)](given[1:], made, described, 5, BLOCK=16)
    assert given.tolist() == [1, 1, 1]
    assert made.tolist() == [0, 0, 0]
    jobs[0]()
    (first, second, third, number), warmup, options = seen
    addresses = [given.data_ptr() + 4, made.data_ptr(), given.data_ptr()]
    assert [first, second, third.base] == [launch.Address(at, torch.float32) for at in addresses]
    assert (number, warmup, options) == (5, True, {"BLOCK": 16})
    assert described.base is given


def test_torch_code_has_nothing_to_compile() -> None:
    run = load(Source("torch", "def run(x):\n    raise AssertionError\n"), "plain")
    assert launch.compilations(run, [torch.ones(1)], {}) == []


@pytest.mark.parametrize("kind", ["gluon", "triton"])
def test_what_was_compiled_is_found_by_alignment_and_strides(kind: str, launched: list[tuple[Any, ...]]) -> None:
    """Only the first call of each kind goes through the JIT: the later ones find its kernel, with new addresses and
    lengths of the same kind too."""
    run = load(_source(kind), "causal")
    (launcher,) = _launchers(run)
    with mock.patch.object(launcher.kernel, "run", wraps=launcher.kernel.run) as through_the_jit:
        for n in (256, 256, 272, 1, 1):
            run(*_inputs(n), B=1, M=n, P=n)
    assert through_the_jit.call_count == (1 if kind == "gluon" else 2)  # a length of 1 is a constant to Triton
    assert len(launched) == 5


def test_a_hook_is_called(launched: list[tuple[Any, ...]]) -> None:
    """Profilers hook Triton's launches: they see ours."""
    from triton import knobs

    run, inputs = load(_source("gluon"), "causal"), _inputs(256)
    run(*inputs, B=1, M=256, P=256)
    hook = lambda metadata: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        run(*inputs, B=1, M=256, P=256)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert launched[-1][11] is knobs.runtime.launch_enter_hook
    run(*inputs, B=1, M=256, P=256)
    assert launched[-1][11] is None


def test_an_unknown_triton_launches_through_the_jit(
    launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "KNOWN_VERSIONS", ("1.0.",))
    run, inputs = load(_source("gluon"), "causal"), _inputs(256)
    for _ in range(2):
        run(*inputs, B=1, M=256, P=256)
        assert launched[-1][11] is not None


def test_descriptors_are_made_once_and_hold_no_memory(launched: list[tuple[Any, ...]]) -> None:
    describe = load(_source("gluon"), "causal").__globals__["tile_map"]
    x = torch.randn(1, 2, 64, 64).bfloat16()
    one = describe(x, 64, 64)
    assert describe(x.view(1, 2, 64, 64), 64, 64) is one
    assert one.base == launch.Address(x.data_ptr(), x.dtype)
    assert describe(x, 32, 64) is not one
    assert describe(x.view(2, 1, 64, 64), 64, 64) is not one
    assert describe(x.view(torch.float16), 64, 64) is not one


def test_a_tensor_that_cannot_be_described_is_looked_at_once() -> None:
    made = []

    def describe(x: Tensor, block: int) -> tuple[Tensor, bool]:
        made.append(block)
        return x, False

    look_up = launch.remembered(describe)
    x = torch.randn(4)
    for view in (x, x[:], x[:]):
        tensor, described = look_up(view, 2)
        assert tensor is view
        assert not described
    assert made == [2]


def test_a_copy_is_described_every_time(launched: list[tuple[Any, ...]]) -> None:
    """An operand that the copy engine cannot address is copied: the copy's contents are those of that call."""
    describe = load(_source("gluon"), "causal").__globals__["tile_map"]
    x = torch.randn(1, 2, 64, 64).bfloat16().transpose(-1, -2)
    one, other = describe(x, 64, 64), describe(x, 64, 64)
    assert one is not other
    assert isinstance(one.base, Tensor)
    assert torch.equal(one.base, x)


def test_another_view_of_the_same_memory_is_described_once() -> None:
    """Numbers of 64 bits as two words each, a vector as a row."""

    def describe(x: Tensor, ranks: int) -> Any:
        x = x.view(torch.int32)[(None,) * (ranks - x.dim())]
        return SimpleNamespace(base=x, block_shape=[1, 4], padding="zero")

    look_up = launch.remembered(describe)
    x = torch.arange(8)
    one = look_up(x, 2)
    assert look_up(x, 2) is one
    assert one.base == launch.Address(x.data_ptr(), torch.int32)


def test_descriptors_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST", 8)
    made = []

    def describe(x: Tensor, block: tuple[int, ...]) -> Any:
        made.append(x)
        return SimpleNamespace(base=x, block_shape=block, padding="zero")

    look_up = launch.remembered(describe)
    kept = [torch.randn(4) for _ in range(20)]
    for x in kept:
        assert look_up(x, (4,)) is look_up(x, (4,))
    assert len(made) == 20
    look_up(kept[0], (4,))
    assert len(made) == 21


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gluon", "triton", "triton, no descriptors"])
def test_launches_on_a_gpu(kind: str) -> None:
    if kind != "triton, no descriptors" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    run = load(_source(kind), "causal")
    for n, offset in ((256, 0), (256, 0), (250, 0), (250, 1), (1, 0), (257, 3), (256, 0)):
        for _ in range(2):
            q, k, v = inputs = [x.cuda() if not offset else _misaligned(x) for x in _inputs(n)]
            (out,) = run(*inputs, B=1, M=n, P=n)
            expected = torch.nn.functional.scaled_dot_product_attention(
                *(x.double() for x in (q, k, v)), is_causal=True, enable_gqa=True
            )
            assert float((out - expected).norm()) <= 1e-2 * float(expected.norm()), (n, offset)


def _misaligned(x: Tensor) -> Tensor:
    whole = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")
    return whole[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("site", benchmark.SITES)
def test_every_layer_of_the_benchmark(
    site: str, launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each layer of benchmarks/launch.py, from the bare launch to the operator for training, makes the same launches:
    what the C function gets, but for addresses, is the same."""
    monkeypatch.setenv("EINSCADE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("EINSCADE_AUTOTUNE", "0")
    calls = benchmark.layers(torch.device("cpu"), *benchmark.SITES[site], training=True)
    assert len(calls) == 8
    made = {}
    for name, layer in calls.items():
        layer(1)
        launched.clear()
        layer(2)
        made[name] = [_without_output(one, ()) for one in launched]
    least = made.pop("the operator, for training")  # saves more
    assert len(least) == len(made["the operator"]) == (2 if site == "a prompt" else 4)
    assert all(one == made["the operator"] for one in made.values())


def test_slopes_leave_out_what_surrounds_a_call() -> None:
    def call(number: int) -> None:
        time.sleep(0.01)
        for _ in range(number):
            time.sleep(0.001)

    assert 900 < benchmark.microseconds({"call": call}, seconds=0.5)["call"] < 2000
