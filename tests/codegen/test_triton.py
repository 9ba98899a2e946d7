"""The Triton emitter without a GPU: under Triton's interpreter, compiled for every target, and as text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from einscade.codegen.cost import promises_no_spills, tile_symbols
from einscade.codegen.loops import LoopProgram, plan
from einscade.codegen.offline import SHARED_LIMITS, compile_offline
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.codegen.space import candidates
from einscade.codegen.tiled_torch import emit as emit_torch
from einscade.codegen.triton_emit import emit
from einscade.compiler.gradients import scan_free
from einscade.ir.device import A100, H200, MI300X, Device
from einscade.ir.text import parse_cascade
from einscade.passes.differentiate import differentiate
from einscade.passes.pipeline import run
from einscade.passes.recipes import recipe
from einscade.passes.tables import Tables
from tests.codegen.cascades import CASES, cascade
from tests.codegen.tables import forward as table_bias
from tests.codegen.tables import gradient as gradient_of
from tests.codegen.test_gluon_operands import HALVES
from tests.codegen.test_gradients import scored

GOLDEN = Path(__file__).parent / "golden"
CAUSAL = next(c for c in CASES if c.name == "causal")
SIZES = {"B": 1, "P": 4096, "M": 4096}


def program(name: str, **shape: object) -> LoopProgram:
    return plan(cascade(next(c for c in CASES if c.name == name), **shape)[1])  # type: ignore[arg-type]


@pytest.mark.long
def test_under_the_interpreter() -> None:
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/codegen/triton_interpreted.py",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


# Every case for both of Triton's compilers; for the other generations of CUDA one of each way to read and to mask.
@pytest.mark.parametrize(
    ("name", "target"),
    [(c.name, target) for target in ("cuda:90", "hip:gfx942") for c in CASES]
    + [(name, target) for target in ("cuda:80", "cuda:100")
       for name in ("causal", "documents", "boolean", "additive", "gathered", "sigmoid")],
)  # fmt: skip
def test_compiles_for_every_target(name: str, target: str) -> None:
    """At the cost model's first choice, a kernel fits the target, and spills nothing where that was promised."""
    loops = program(name, dtype="bf16", h=8, g=2, e=64, f=64)
    described: dict[str, Device] = {"cuda:80": A100, "cuda:90": H200, "cuda:100": H200, "hip:gfx942": MI300X}
    schedule = candidates(loops, described[target], SIZES)[0]
    descriptors = target in ("cuda:90", "cuda:100")
    for found in compile_offline(loops, schedule, target, descriptors):
        assert found.shared <= SHARED_LIMITS[target]
        assert found.spilled == 0 or not promises_no_spills(loops)
        assert ("wgmma" in found.assembly) == (target == "cuda:90")
        assert ("cp.async.bulk.tensor" in found.assembly) == descriptors


@pytest.mark.parametrize(("dtype", "width"), [
    (d, w) for d in ("bf16", "f16", "f32") for w in (32, 80, 96, 128, 256) if (d, w) != ("f32", 256)
])  # fmt: skip
def test_compiles_for_widths(width: int, dtype: str) -> None:
    loops = program("causal", dtype=dtype, h=4, g=2, e=width, f=width)
    schedule = candidates(loops, H200, SIZES)[0]
    for found in compile_offline(loops, schedule, "cuda:90", True):
        assert found.shared <= SHARED_LIMITS["cuda:90"]
        assert found.spilled == 0 or not promises_no_spills(loops)


@pytest.mark.parametrize(
    ("name", "width", "target"),
    [("additive", 64, "cuda:90"), ("additive", 128, "cuda:80"), ("documents", 64, "cuda:90")],
)
def test_gradients_of_short_static_lengths_fit(name: str, width: int, target: str) -> None:
    """At the cost model's first choice; a length below 512 is tiled as a long one is."""
    plain = cascade(next(c for c in CASES if c.name == name), dtype="bf16", e=width, f=width)[0]
    short = {"B": 2, "P": 333, "M": 333}
    forward = parse_cascade(re.sub(r"< ([BPM])\b", lambda m: f"< {short[m[1]]}", str(plain)))
    loops = plan(run(differentiate(scan_free(forward, "exact")).cascade, "exact").cascade)
    schedule = candidates(loops, H200 if target == "cuda:90" else A100, {})[0]
    assert {"p", "m"} <= {r for r, n in schedule.tiles if n > 1}
    for found in compile_offline(loops, schedule, target, target == "cuda:90"):
        assert found.shared <= SHARED_LIMITS[target]


def test_weights_among_the_results_fit() -> None:
    """A program holds a tile of rows of weights whole, and changes its layout to store it: under every schedule."""
    text = scored("S[b,h,p,m] + A[p,m]", ", A[p,m]: f64").replace("-> O[b,h,p,f]", "-> R[b,h,p,m]: f64, O[b,h,p,f]")
    text = text.replace("m < M", "m < 600").replace("e < 8, f < 6", "e < 32, f < 32").replace("f64", "bf16")
    loops = plan(run(parse_cascade(text + "  R[b,h,p,m]: bf16 = W[b,h,p,m] / Z[b,h,p]\n"), "exact").cascade)
    tried = candidates(loops, H200, SIZES)
    rows = loops.cascade.tensors[loops.cascade.outputs[0]].ranks[2]
    assert all(dict(s.tiles).get(rows, 1) * 1024 * 4 <= SHARED_LIMITS["cuda:90"] for s in tried)
    for found in compile_offline(loops, tried[0], "cuda:90", True):
        assert found.shared <= SHARED_LIMITS["cuda:90"]


@pytest.mark.parametrize(
    ("name", "target", "shared"),
    [
        ("buckets of distances", "cuda:90", True),
        ("a table of two ranks", "cuda:90", False),
        ("all distances", "cuda:80", True),
        ("lengths", "hip:gfx942", True),
    ],
)
def test_gradients_of_tables_compile(name: str, target: str, shared: bool) -> None:
    """At the cost model's first choice, with what shares an index summed in a loop, and without."""
    made = gradient_of(table_bias(name, "bf16", 8, 2, 64))
    described: dict[str, Device] = {"cuda:80": A100, "cuda:90": H200, "hip:gfx942": MI300X}
    loops = plan(run(made.cascade, (Tables(recipe("exact"), shared),)).cascade)
    schedule = candidates(loops, described[target], {"B": 4, "P": 4096, "M": 4096})[0]
    found = compile_offline(loops, schedule, target, target == "cuda:90")
    assert all(k.shared <= SHARED_LIMITS[target] for k in found)
    (adding,) = (k for k in found if re.search(r"\b(atom|red)\.\S*add|atomic_add", k.assembly))
    assert not adding.spilled


def test_one_tensor_read_in_two_ways() -> None:
    """The half of a tensor's width that a descriptor could bring is read by address, as the other half is."""
    loops = plan(run(parse_cascade(HALVES), "exact").cascade)
    schedule = candidates(loops, H200, SIZES)[0]
    for found in compile_offline(loops, schedule, "cuda:90", True):
        assert found.shared <= SHARED_LIMITS["cuda:90"]


COMPUTED_MASK = """
cascade masked(X[b,p,e]: f16, Y[b,p,n]: f16, Z[b,p]) -> O
  where b < B, p < P, e < 32, n < 128
  G[b,p]   = max(e) X[b,p,e]
  O[b,e,n] = sum(p) exp(X[b,p,e] - G[b,p]) * Z[b,p] * Y[b,p,n]   if Z[b,p] * exp(G[b,p]) != 0
"""


@pytest.mark.parametrize(("target", "device"), [("cuda:90", H200), ("cuda:80", A100)], ids=["hopper", "ampere"])
def test_a_mask_that_a_tile_computes_compiles(target: str, device: Device) -> None:
    """Operands of the older matrix unit get a layout of their own, which Triton 3.6 cannot give to booleans."""
    loops = plan(run(parse_cascade(COMPUTED_MASK), "exact").cascade)
    schedule = candidates(loops, device, {"B": 8, "P": 4096})[0]
    for found in compile_offline(loops, schedule, target, target == "cuda:90"):
        assert found.shared <= SHARED_LIMITS[target]


def test_what_is_promised() -> None:
    assert promises_no_spills(program("causal", dtype="bf16"))
    assert promises_no_spills(program("boolean", dtype="f16"))
    assert not promises_no_spills(program("causal", dtype="f32"))
    assert not promises_no_spills(program("gathered", dtype="bf16"))


def test_the_scale_and_log2e_are_one_factor() -> None:
    loops = program("causal", dtype="bf16", e=64, f=64)
    text = emit(loops, Schedule((("M0", 64), ("p", 64)), target="cuda:90")).text
    assert "tl.exp2(" in text
    assert "tl.exp(" not in text
    assert text.count("0.18033688") >= 2  # 64 ** -0.5 * log2(e)


def test_a_domain_decides_which_loops_are_written() -> None:
    def loops_of(name: str) -> int:
        return emit(program(name), Schedule((("M0", 16), ("p", 16)))).text.count("for m_lo in range(")

    assert loops_of("causal") == 2  # full tiles, then those across the diagonal
    assert loops_of("window") == 3  # across the window's start, full, across the diagonal
    assert loops_of("boolean") == 1  # every tile may be partial


def test_a_row_of_another_statement_in_a_loop_over_rows() -> None:
    """What is computed before the kernels is stored by tiles, and read at a place that a tile's size gives."""
    text = """cascade rows(
        Q[b,p,e]: bf16, K[b,m,e]: bf16, Q1[b,p,e]: bf16, K1[b,m,e]: bf16, N[b,p,f], Z[b,p], Y[b,p,f]: bf16
    ) -> D[b,m,e]: bf16, D1[b,p,e]: bf16
      where b < 2, p < 521, m < 521, e < 64, f < 64
      S[b,p,m] = sum(e) Q[b,p,e] * K[b,m,e]
      S1[b,p,m] = sum(e) Q1[b,p,e] * K1[b,m,e]
      R[b,p]   = sum(f) Y[b,p,f] * Where(Z[b,p] != 0, -N[b,p,f] / Z[b,p]**2, 0)
      W[b,p,m] = (S1[b,p,m] + R[b,p]) * exp(S[b,p,m])
      D[b,m,e]: bf16 = sum(p) W[b,p,m] * Q[b,p,e]
      D1[b,p,e]: bf16 = sum(m) W[b,p,m] * K[b,m,e]
    """
    loops = plan(run(parse_cascade(text), "exact").cascade)
    sizes = {*tile_symbols(loops)}
    for schedule in candidates(loops, H200, {}):
        code = "\n".join(line.split("#")[0] for line in emit(loops, schedule).text.splitlines())
        assert not sizes & set(re.findall(r"[A-Za-z_]\w*", code.split('"""')[-1]))


def test_refuses_with_the_reason() -> None:
    with pytest.raises(Unsupported, match="float64"):
        emit(program("causal", dtype="f64"), Schedule((("M0", 16), ("p", 16))))
    with pytest.raises(Unsupported, match="power of two"):
        emit(program("causal"), Schedule((("M0", 24), ("p", 16))))
    with pytest.raises(Unsupported, match="only known at run time"):
        emit(program("causal"), Schedule((("p", 16),)))
    with pytest.raises(Unsupported, match="would not stay on chip"):
        emit(program("causal", e=256, f=64), Schedule((("M0", 16), ("p", 16))))
    with pytest.raises(Unsupported, match="no loop"):
        emit(plan(cascade(CAUSAL)[0]), Schedule())


@pytest.mark.parametrize("emitter", ["torch", "triton"])
def test_golden(emitter: str) -> None:
    """One example of each emitter's text, kept to be read. `EINSCADE_UPDATE_GOLDEN=1` writes it anew."""
    loops = program("causal", dtype="bf16", h=32, g=8, e=128, f=128)
    schedule = Schedule((*((s, 64) for s in tile_symbols(loops)), ("p", 128)), 8, 3, (), "cuda:90", True)
    text = (emit_torch if emitter == "torch" else emit)(loops, schedule).text
    path = GOLDEN / f"causal_{emitter}.py"
    if os.environ.get("EINSCADE_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text
