"""Statements that read nothing: numbers, sizes and positions where tensors are expected, through the torch emitter."""

from __future__ import annotations

import pytest
import torch

from einscade.codegen.cost import tile_symbols
from einscade.codegen.loops import LoopProgram, flat, plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.tiled_torch import emit, emit_flat
from einscade.ir.cascade import Cascade
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run
from tests.codegen.generated import module

SIZES = {"P": 4, "M": 5}
INPUTS = "X[p]: f64, V[m,f]: f64"
RANKS = "where p < P, m < M, f < 2, s < 2"
# In double precision: a constant in torch's default dtype would show.
VALUES = ("0.1", "-2", "P", "P / 3", "1 + p / 3", "Where(P < 2, 1, 0.1)", "Where(p < 2, 0.1, 2)", "Max(P, 9)", "exp(P)")


def programs(cascade: Cascade) -> tuple[LoopProgram, ...]:
    rewritten = run(cascade, "exact").cascade
    return flat(cascade), plan(cascade), plan(rewritten)


def check(cascade: Cascade) -> None:
    """Whole, differentiable, and in tiles of two positions, as the interpreter has it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SIZES["P"], generator=generator, dtype=torch.float64)
    v = torch.randn(SIZES["M"], 2, generator=generator, dtype=torch.float64)
    for program in (*programs(cascade), None):
        used = cascade if program is None else program.cascade
        source = emit_flat(cascade) if program is None else emit(program, tiles(program))
        known = {s: SIZES.get(s, 2) for s in used.symbols}
        expected = interpret(used, dict(zip((t.name for t in used.inputs), (x, v), strict=True)), known)
        made = module(source).run(x, v, **{s: n for s, n in SIZES.items() if s in used.symbols})
        for name, got in zip(used.outputs, made, strict=True):
            want = expected[name].to(got.dtype)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=f"{name} of\n{source.text}")


def tiles(program: LoopProgram) -> Schedule:
    return Schedule(tuple((s, 2) for s in tile_symbols(program)))


@pytest.mark.parametrize("domain", ["", "if m <= p", "if p < 2"])
@pytest.mark.parametrize("value", VALUES)
def test_weights(value: str, domain: str) -> None:
    """Averages over keys, whose weights are no scores: a sum, a product with values, a quotient."""
    check(parse_cascade(f"""cascade average({INPUTS}) -> O, N
      {RANKS}
      W[p,m] = {value}   {domain}
      Z[p] = sum(m) W[p,m]
      G[p] = max(m) W[p,m]
      N[p]: f64 = Where(Z[p] != 0, G[p] / Z[p] + X[p], 0)
      O[p,f]: f64 = sum(m) W[p,m] * V[m,f]
    """))


@pytest.mark.parametrize("value", VALUES)
def test_outputs(value: str) -> None:
    check(parse_cascade(f"""cascade constant({INPUTS}) -> O, A, R
      {RANKS}
      Y[p] = {value}   if p < 3
      O[p]: f64 = X[p] * Y[p]
      A[p,m]: f64 = {value}   if P < 9
      R[p]: f64 = prod(m) {value}   if m < 2
    """))


@pytest.mark.parametrize("value", ["true", "P < 9", "P > 9", "P > 1 & P < 9", "p < 2"])
def test_booleans(value: str) -> None:
    check(parse_cascade(f"""cascade boolean({INPUTS}) -> O, A, N
      {RANKS}
      B[p]: bool = {value}
      O[p]: f64 = Where(B[p] & X[p] > 0, X[p], 1)
      A[p]: bool = any(m) {value}   if m <= p
      N[p]: f64 = X[p]   if ~B[p]
    """))


@pytest.mark.parametrize("value", ["1", "p", "P", "0.1"])
def test_slots(value: str) -> None:
    """Equal points are chosen in their order."""
    check(parse_cascade(f"""cascade slots({INPUTS}) -> I
      {RANKS}
      I[p,s]: i64 = topk(m -> s) {value}   if m != 0
    """))


@pytest.mark.parametrize("step", ["1", "p", "S[p - 1] + 1", "S[p - 1] * 0.1", "S[p - 1] + P"])
def test_scans(step: str) -> None:
    check(parse_cascade(f"""cascade running({INPUTS}) -> O
      {RANKS}
      S[p] = {step}   along p from 1
      O[m]: f64 = S[P - 1] + V[m,0]
    """))
