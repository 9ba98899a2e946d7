"""Conditions on rows that a loop's reductions share: its tiles need not ask, its results are as interpreted."""

from __future__ import annotations

import pytest
import torch

from einscade.codegen import gluon, tiled_torch
from einscade.codegen.loops import plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.tiles import TileLoop, tile_loop
from einscade.ir import Cascade, Where
from einscade.ir.expr import accesses
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.online import Online
from tests.codegen.cascades import relative_error
from tests.codegen.generated import module
from tests.codegen.gluon_simulator import Simulator

B, P, M, F = 3, 4, 7, 2
READERS = {
    "guarded": "O[b,p,f] = N[b,p,f] / Z[b,p]   if Z[b,p] != 0",
    "a sum": "O[b,p,f] = N[b,p,f]",
    "scaled": "O[b,p,f] = N[b,p,f] * X[b,p]",
    "shifted": "O[b,p,f] = N[b,p,f] + X[b,p]",
    "a maximum": "O[b,p] = exp(0 - G[b,p])",
    "a logarithm": "O[b,p] = Where(Z[b,p] != 0, G[b,p] + log(Z[b,p]), 7)",
    "of a guarded one": "T[b,p,f] = N[b,p,f] / Z[b,p]   if Z[b,p] != 0\n O[b,p,f] = T[b,p,f] + 1",
    "over guarded ones": """T[b,p,f] = N[b,p,f] / Z[b,p]   if Z[b,p] != 0
          Y[b,p] = sum(f) T[b,p,f]
          O[b,p] = Y[b,p] + 1""",
    "behind": "T[b,p,f] = N[b,p,f] / Z[b,p]   if Z[b,p] != 0\n O[b,p] = X[b,p] + 1   if T[b,p,0] > 0",
    "of another row": "T[b,p,f] = N[b,p,f] / Z[b,p]   if Z[b,p] != 0\n O[b,p,f] = T[b,P - 1 - p,f] + N[b,p,f]",
    "of two": "T[b,p] = Where(Z[b,p] != 0, 1 / Z[b,p], 0)\n O[b,p,f] = N[b,p,f] * T[b,p] - T[b,p]",
}


def cascade(condition: str, reader: str) -> Cascade:
    return Online().apply(
        parse_cascade(f"""
        cascade rows(S0[b,p,m], V[b,m,f], X[b,p], A[b,p]: bool, L[b]: i64) -> O
          where b < {B}, p < P, m < M, f < {F}
          S[b,p,m] = S0[b,p,m]   if {condition}
          G[b,p] = max(m) S[b,p,m]
          W[b,p,m] = exp(S[b,p,m] - G[b,p])
          Z[b,p] = sum(m) W[b,p,m]
          N[b,p,f] = sum(m) W[b,p,m] * V[b,m,f]
          {reader}
        """)
    )


def the_loop(after: Cascade) -> TileLoop:
    program = plan(after)
    return next(tile_loop(program.cascade, nest) for nest in program.serial_nests if nest.scans)


@pytest.mark.parametrize("condition", ["A[b,p]", "A[b,p] & m < L[b]", "p >= 2 & m <= p + 3"])
@pytest.mark.parametrize("name", READERS)
def test_results_are_as_interpreted(name: str, condition: str) -> None:
    torch.manual_seed(0)
    after = cascade(condition, READERS[name])
    values = [torch.randn(B, P, M), torch.randn(B, M, F), torch.randn(B, P), torch.rand(B, P) < 0.5]
    values.append(torch.tensor([M, 0, 3]))
    tiles = {s: 2 for s in after.symbols if s not in "PM"}
    (expected,) = interpret(
        after, dict(zip(["S0", "V", "X", "A", "L"], values, strict=True)), {"P": P, "M": M, **tiles}
    ).values()
    source = tiled_torch.emit(plan(after), Schedule(tiles=tuple(tiles.items())))
    (made,) = module(source).run(*values, P=P, M=M)
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-5)


TILES = """
    cascade tiles(Q[b,h,p,e]: bf16, K[b,h,m,e]: bf16, V[b,h,m,f]: bf16, X[b,h,p], A[b,p]: bool) -> {outputs}
      where b < 1, h < 2, p < P, m < M, e < 64, f < 64
      S[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e] * 0.125   if {condition}
      G[b,h,p] = max(m) S[b,h,p,m]
      W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
      Z[b,h,p] = sum(m) W[b,h,p,m]
      N[b,h,p,f] = sum(m) W[b,h,p,m] * V[b,h,m,f]
      {reader}
"""
AFTER_TILES = {
    "guarded": "O[b,h,p,f]: bf16 = N[b,h,p,f] / Z[b,h,p]   if Z[b,h,p] != 0",
    "a sum": "O[b,h,p,f]: bf16 = N[b,h,p,f]",
    "shifted": "O[b,h,p,f]: bf16 = N[b,h,p,f] + X[b,h,p]",
    "chosen": "O[b,h,p,f]: bf16 = Where(Z[b,h,p] != 0, N[b,h,p,f] / Z[b,h,p], X[b,h,p])",
    "with statistics": """O[b,h,p,f]: bf16 = N[b,h,p,f] / Z[b,h,p]   if Z[b,h,p] != 0
      R[b,h,p] = Where(Z[b,h,p] != 0, G[b,h,p] + log(Z[b,h,p]), 7)""",
}


@pytest.mark.parametrize("condition", ["A[b,p]", "A[b,p] & m <= p"])
@pytest.mark.parametrize("name", AFTER_TILES)
def test_whole_tiles_do_not_ask(name: str, condition: str) -> None:
    """A kernel whose whole tiles have no masks, in which states of rows that fail hold anything."""
    torch.manual_seed(0)
    outputs = "O, R" if "statistics" in name else "O"
    after = Online().apply(parse_cascade(TILES.format(outputs=outputs, condition=condition, reader=AFTER_TILES[name])))
    values = [*(torch.randn(1, 2, 200, 64).bfloat16() for _ in "QKV"), torch.randn(1, 2, 200), torch.rand(1, 200) < 0.5]
    sizes = {s: 200 if s in "PM" else 64 for s in after.symbols}
    expected = interpret(after, dict(zip("QKVXA", values, strict=True)), sizes)
    program = plan(after)
    source = gluon.emit(program, gluon.schedules(program)[0])
    assert "A_held" not in source.text, "no list of tiles"
    for made, exact in zip(Simulator(0).load(source.text).run(*values, P=200, M=200), expected.values(), strict=True):
        assert relative_error(made, exact) <= 2**-8


def test_what_is_stored_says_so_itself() -> None:
    """A result that is missing, or 0, without points has the condition as its own; others choose."""
    for name in ("guarded", "a sum", "scaled"):
        (after,) = the_loop(cascade("A[b,p]", READERS[name])).epilogue
        assert any(a.tensor == "A" for a in accesses(after.row)), name
        assert not after.expr.has(Where), name
    (after,) = the_loop(cascade("A[b,p]", READERS["shifted"])).epilogue
    assert after.expr.has(Where)
    assert not any(a.tensor == "A" for a in accesses(after.row))


def test_a_condition_of_one_reduction_stays_in_the_loop() -> None:
    after = Online().apply(
        parse_cascade("""
        cascade rows(S[b,p,m], V[b,m], A[b,p]: bool) -> O
          where b < 3, p < P, m < M
          T[b,p,m] = S[b,p,m]   if A[b,p]
          Z[b,p] = sum(m) exp(S[b,p,m])
          N[b,p] = sum(m) T[b,p,m] * V[b,m]
          O[b,p] = N[b,p] / Z[b,p]
        """)
    )
    values = [torch.randn(3, 4, 5), torch.randn(3, 5), torch.rand(3, 4) < 0.5]
    tiles = {s: 2 for s in after.symbols if s not in "PM"}
    expected = interpret(after, dict(zip("SVA", values, strict=True)), {"P": 4, "M": 5, **tiles})["O"]
    source = tiled_torch.emit(plan(after), Schedule(tiles=tuple(tiles.items())))
    (made,) = module(source).run(*values, P=4, M=5)
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-5)
