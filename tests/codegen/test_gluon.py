"""The Hopper emitter: what it accepts, that its modules compile without a GPU and without spills, and, on a Hopper GPU,
that they are right."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from einscade.codegen.gluon import emit, schedules
from einscade.codegen.gluon_bounds import bounds
from einscade.codegen.gluon_form import form
from einscade.codegen.loops import LoopProgram, plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.ir.expr import var
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run as rewrite
from tests.codegen.cascades import CASES, cascade, inputs, relative_error
from tests.codegen.generated import module

GOLDEN = Path(__file__).parent / "golden" / "causal_gluon.py"
BY_NAME = {c.name: c for c in CASES}
NARROW = {"dtype": "bf16", "h": 4, "g": 2, "e": 64, "f": 64}
WIDE = {"dtype": "bf16", "h": 4, "g": 2, "e": 128, "f": 128}


def program(name: str, **shape: Any) -> LoopProgram:
    return plan(cascade(BY_NAME[name], **shape)[1])


def test_golden() -> None:
    """One example of the emitter's text, kept to be read. `EINSCADE_UPDATE_GOLDEN=1` writes it anew."""
    loops = program("causal", dtype="bf16", h=32, g=8, e=128, f=128)
    text = emit(loops, schedules(loops)[0]).text
    if os.environ.get("EINSCADE_UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(text)
    assert GOLDEN.read_text() == text


@pytest.mark.parametrize("name", BY_NAME)
def test_every_case_has_a_module(name: str) -> None:
    loops = program(name, **NARROW)
    for schedule in schedules(loops):
        compile(emit(loops, schedule).text, name, "exec")


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"dtype": "f32", "e": 64, "f": 64}, "dense f32"),
        ({"dtype": "bf16", "e": 36, "f": 64}, "width 36"),
        ({"dtype": "bf16", "e": 64, "f": 20}, "width 20"),
        ({"dtype": "bf16", "e": 264, "f": 64}, "width 264"),
    ],
)
def test_unsupported_operands(shape: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        schedules(program("causal", **shape))


@pytest.mark.parametrize(
    ("tiles", "stages", "reason"),
    [
        ({"M0": 128, "p": 96}, 2, "tile of 96 rows"),
        ({"M0": 48, "p": 128}, 2, "tile of 48"),
        ({"M0": 128, "p": 128}, 4, "shared memory"),
        ({"M0": 128, "p": 192}, 2, "registers"),
    ],
)
def test_unsupported_schedules(tiles: dict[str, int], stages: int, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        emit(program("causal", **WIDE), Schedule(tuple(sorted(tiles.items())), 4, stages, (), "cuda:90", True))


def made_of(text: str) -> LoopProgram:
    return plan(rewrite(parse_cascade(text), "exact").cascade)


TWO_SUMS = """cascade two(Q[p,e]: bf16, K[m,e]: bf16, V[m,f]: bf16, U[m,f]: bf16) -> O[p,f]: bf16, R[p,f]: bf16
  where p < P, m < M, e < 64, f < 64
  S[p,m] = sum(e) Q[p,e] * K[m,e]
  O[p,f]: bf16 = sum(m) S[p,m] * V[m,f]
  R[p,f]: bf16 = sum(m) S[p,m] * S[p,m] * U[m,f]
"""

TWO_SOFTMAXES = """cascade differential(Q[b,g,p,e]: bf16, K[b,g,m,e]: bf16, L[], V[b,h,m,f]: bf16) -> O[b,h,p,f]: bf16
  where b < B, g < 8, h < 4, p < P, m < M, e < 64, f < {f}
  A[b,g,p,m] = sum(e) 0.125 * Q[b,g,p,e] * K[b,g,m,e]   if m <= p
  G[b,g,p]   = max(m) A[b,g,p,m]
  W[b,g,p,m] = exp(A[b,g,p,m] - G[b,g,p])
  Z[b,g,p]   = sum(m) W[b,g,p,m]
  O[b,h,p,f]: bf16 = sum(m) (W[b,2*h,p,m] / Z[b,2*h,p] - L[] * W[b,2*h + 1,p,m] / Z[b,2*h + 1,p]) * V[b,h,m,f]
"""


def test_a_tensor_that_two_sums_read_is_loaded_once() -> None:
    """One form for every number of products and sums."""
    shape = form(made_of(TWO_SOFTMAXES.format(f=64)))
    assert [len(x) for x in (shape.products, shape.sums, shape.stills, shape.moving)] == [2, 2, 2, 3]
    shape = form(made_of(TWO_SUMS))
    assert (len(shape.products), len(shape.sums)) == (1, 2)
    assert {x.tensor for x in shape.written} == set(shape.results)


def test_operands_that_are_one_tensor_have_names_of_their_own() -> None:
    text = """cascade own(X[b,m,e]: bf16) -> O[b,p,f]: bf16
  where b < B, p < M, m < M, e < 64, f < 64
  S[b,p,m] = sum(e) 0.125 * X[b,p,e] * X[b,m,e]
  G[b,p]   = max(m) S[b,p,m]
  W[b,p,m] = exp(S[b,p,m] - G[b,p])
  Z[b,p]   = sum(m) W[b,p,m]
  O[b,p,f]: bf16 = sum(m) W[b,p,m] * X[b,m,f] / Z[b,p]
"""
    loops = made_of(text)
    assert len(form(loops).moving) == 1
    for schedule in schedules(loops):
        names = re.findall(r"^    (\w+) = gl.allocate_shared_memory", emit(loops, schedule).text, re.M)
        assert len(names) == len(set(names))


# -- which tiles are masked -------------------------------------------------------------------------------------------


def tiles_of(predicate: str, row: int, length: int, rows: int, step: int) -> tuple[set[int], set[int]]:
    """The tiles that the bounds visit, and those among them that run without a mask."""
    text = f"cascade c(X[p]) -> Y[p,m]\n  where p < P, m < M\n  Y[p,m] = X[p]  if ({predicate}) & m < M\n"
    domain = parse_cascade(text).body[0].domain
    b = bounds(domain, "m", "p", var("row"), rows, step)
    known = {var(n): sympy.Integer(x) for n, x in (("row", row), ("M", length), ("P", length))}

    def at(expr: sympy.Expr) -> int:
        return int(expr.xreplace(known))

    first, end = at(b.first), at(b.end)
    visited = set(range(min(first, end - 1), end))
    if b.full_first is None or b.full_end is None:
        return visited, set()
    full_end = at(b.full_end) if b.upper else end - 1
    full_first = at(b.full_first) if b.lower else 0
    return visited, {t for t in visited if full_first <= t < min(full_end, end - 1)}


@pytest.mark.parametrize(
    "predicate",
    ["m <= p", "m <= p + 37", "m <= p & p - m < 100", "m <= p | m < 70", "p - m < 50 & m - p < 50", "m < 99"],
)
@pytest.mark.parametrize(("rows", "step"), [(128, 128), (192, 128), (128, 64), (64, 128)])
def test_bounds(predicate: str, rows: int, step: int) -> None:
    """Every tile with a point is visited; a tile without a mask has nothing but points."""
    length = 500
    python = predicate.replace("&", "and").replace("|", "or")
    for row in range(0, length, rows):
        visited, full = tiles_of(predicate, row, length, rows, step)
        for t in range(-(-length // step)):
            points = [
                eval(python, {"p": p, "m": m}) and m < length
                for p in range(row, row + rows)
                for m in range(t * step, t * step + step)
            ]
            assert not any(points) or t in visited
            assert all(points) or t not in full


# -- compiled without a GPU -------------------------------------------------------------------------------------------


class _Recorder:
    """Stands in for a kernel and keeps what it was launched with."""

    def __init__(self) -> None:
        self.arguments: tuple[Any, ...] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **_: Any) -> None:
            self.arguments = arguments

        return launch


def compiled(made: ModuleType, given: list[Tensor], sizes: dict[str, int]) -> dict[str, tuple[int, str]]:
    """Shared memory, and ptxas' report, of a module's kernels as its `run` would launch them for these inputs."""
    launched = dict.fromkeys(re.findall(r"(\w+)\[\(", inspect.getsource(made.run)))
    kernels = {name: getattr(made, name) for name in launched}
    recorders = {name: _Recorder() for name in kernels}
    vars(made).update(recorders)
    try:
        made.run(*given, **sizes)
    finally:
        vars(made).update(kernels)
    return {name: _compiled(kernel, recorders[name].arguments) for name, kernel in kernels.items()}


def _compiled(kernel: Any, arguments: tuple[Any, ...]) -> tuple[int, str]:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    names = {
        torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
        torch.bool: "i1",
    }  # fmt: skip
    signature = {}
    for name, x in zip(kernel.arg_names, arguments, strict=True):
        if isinstance(x, TensorDescriptor):
            signature[name] = f"tensordesc<{names[x.base.dtype]}{list(x.block_shape)},{x.layout!r}>"
        else:
            signature[name] = f"*{names[x.dtype]}" if isinstance(x, Tensor) else "i32"
    source = GluonASTSource(kernel, signature, {})
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if not ptxas.exists():
        pytest.skip("this Triton has no ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(result.asm["ptx"])
        file.flush()
        command = [str(ptxas), "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return result.metadata.shared, report


def assert_fits(made: ModuleType, given: list[Tensor], sizes: dict[str, int]) -> None:
    """Every kernel of a module compiles for Hopper, fits in shared memory and does not spill."""
    for shared, report in compiled(made, given, sizes).values():
        assert shared <= 227 << 10
        assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report
        assert "serialized" not in report  # what ptxas says where products do not run in the background


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("full", NARROW), ("causal", WIDE), ("causal_end", NARROW), ("window_sink", WIDE), ("documents", WIDE),
        ("slopes", WIDE), ("softcap", WIDE), ("table", WIDE), ("sigmoid", WIDE), ("sink", NARROW),
        ("full", {"dtype": "f16", "e": 96, "f": 80}), ("full", {"dtype": "bf16", "e": 256, "f": 256}),
    ],
)  # fmt: skip
def test_compiles(name: str, shape: dict[str, Any]) -> None:
    plain, _ = cascade(BY_NAME[name], **shape)
    loops = program(name, **shape)
    sizes = {"B": 1, "P": 300, "M": 300}
    given = list(inputs(plain, BY_NAME[name], sizes).values())
    assert_fits(module(emit(loops, schedules(loops)[0])), given, sizes)


@pytest.mark.parametrize("text", [TWO_SUMS, TWO_SOFTMAXES.format(f=64), TWO_SOFTMAXES.format(f=128)])
def test_several_products_compile(text: str) -> None:
    loops = made_of(text)
    sizes = {s: {"B": 1}.get(s, 300) for s in loops.cascade.symbols if s != "M0"}
    given = []
    for t in loops.cascade.inputs:
        shape = [int(loops.cascade.extent(r).subs({var(n): x for n, x in sizes.items()})) for r in t.ranks]
        given.append(torch.zeros(shape, dtype={"bf16": torch.bfloat16, "f32": torch.float32}[t.dtype]))
    assert_fits(module(emit(loops, schedules(loops)[0])), given, sizes)


# -- on a GPU ---------------------------------------------------------------------------------------------------------

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("shape", [NARROW, WIDE, {"dtype": "f16", "e": 96, "f": 80}])
@pytest.mark.parametrize("lengths", [(1, 1), (129, 129), (300, 77), (77, 300), (1000, 1000)])
def test_right(name: str, shape: dict[str, Any], lengths: tuple[int, int]) -> None:
    """Error against float64 at most three times that of rounding the exact result: weights are rounded, too."""
    sizes = {"B": 2, "P": lengths[0], "M": lengths[1]}
    plain, _ = cascade(BY_NAME[name], **shape)
    given = inputs(plain, BY_NAME[name], sizes, "cuda")
    loops = program(name, **shape)
    exact = interpret(plain, {n: x.cpu() for n, x in given.items()}, {})["O"]
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[shape["dtype"]]
    rounding = relative_error(exact.to(dtype), exact)
    for schedule in schedules(loops):
        poison = torch.full((1 << 24,), float("nan"), device="cuda")
        del poison
        (out,) = module(emit(loops, schedule)).run(*given.values(), **sizes)
        assert relative_error(out, exact) <= 3 * rounding
