"""The families' starting points, as text, and how a cascade is run: by the interpreter, and by generated code."""

from __future__ import annotations

import types
from collections.abc import Mapping

import sympy
import torch

from einscade.codegen.loops import plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.tiled_torch import emit
from einscade.ir import Cascade, var
from einscade.ir.interpret import infer_sizes, interpret
from einscade.ir.text import parse_cascade, print_cascade
from einscade.ir.verify import verify
from einscade.passes.rewrite import NotApplicable, Rewrite

ATTENTION = """
cascade attention(Q[b,h,p,e]: f64, K[b,g,m,e]: f64, V[b,g,m,f]: f64) -> O
  where b < B, h < 4, g < 2, p < P, m < M, e < 8, f < 6
  S[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h // 2,m,e] * 0.35 if {domain}
  G[b,h,p]   = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f]: f64 = sum(m) W[b,h,p,m] * V[b,h // 2,m,f] / Z[b,h,p]
"""

LINEAR = """
cascade linear(Q[b,h,p,e]: f64, K[b,g,m,e]: f64, V[b,g,m,f]: f64) -> O
  where b < B, h < 4, g < 2, p < P, m < M, e < 8, f < 6
  A[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h // 2,m,e] if {domain}
  O[b,h,p,f]: f64 = sum(m) A[b,h,p,m] * V[b,h // 2,m,f]
"""

NORMALISED = """
cascade normalised(Q[b,h,p,e]: f64, K[b,h,m,e]: f64, V[b,h,m,f]: f64) -> O
  where b < B, h < 3, p < P, m < M, e < 8, f < 6
  A[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e] if {domain}
  N[b,h,p,f]: f64 = sum(m) A[b,h,p,m] * V[b,h,m,f]
  Z[b,h,p]: f64 = sum(m) A[b,h,p,m]
  O[b,h,p,f]: f64 = N[b,h,p,f] / Z[b,h,p] if Z[b,h,p] != 0
"""

DECAYED = """
cascade decayed(Q[b,h,p,e]: f64, K[b,h,m,e]: f64, V[b,h,m,f]: f64, l[h]: f64) -> O
  where b < B, h < 3, p < P, m < P, e < 8, f < 6
  A[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e] if m <= p
  O[b,h,p,f]: f64 = sum(m) l[h]**(p - m) * A[b,h,p,m] * V[b,h,m,f]
"""

GATED = """
cascade gated(Q[b,h,p,e]: f64, K[b,h,m,e]: f64, V[b,h,m,f]: f64, g[b,h,p]: f64) -> O
  where b < B, h < 3, p < P, m < P, e < 8, f < 6
  A[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e] if m <= p
  O[b,h,p,f]: f64 = sum(m) exp(g[b,h,p] - g[b,h,m]) * A[b,h,p,m] * V[b,h,m,f]
"""

FEATURE_GATED = """
cascade feature_gated(Q[b,h,p,e]: f64, K[b,h,m,e]: f64, V[b,h,m,f]: f64, g[b,h,p,e]: f64) -> O
  where b < B, h < 3, p < P, m < P, e < 8, f < 6
  A[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e] * exp(g[b,h,p,e] - g[b,h,m,e]) if m <= p
  O[b,h,p,f]: f64 = sum(m) A[b,h,p,m] * V[b,h,m,f]
"""

WINDOW_WITH_SINK = "m <= p & (p - m < 5 | m < 2)"


def cascade(text: str, domain: str = "true") -> Cascade:
    made = parse_cascade(text.replace("{domain}", domain))
    verify(made)
    return made


def inputs(c: Cascade, seed: int = 0, **sizes: int) -> dict[str, torch.Tensor]:
    """Random inputs of the cascade's shapes, in float64."""
    generator = torch.Generator().manual_seed(seed)
    known = {var(name): sympy.Integer(size) for name, size in sizes.items()}
    lengths = {r.name: r.extent.xreplace(known) for r in c.ranks}
    return {
        t.name: torch.randn([int(lengths[r]) for r in t.ranks], dtype=torch.float64, generator=generator)
        for t in c.inputs
    }


def apply(c: Cascade, *rewrites: Rewrite, optional: tuple[Rewrite, ...] = ()) -> Cascade:
    """The rewrites one after another, verified and printed and parsed after each; `optional` ones where they apply."""
    for rewrite in (*rewrites, *optional):
        try:
            c = rewrite.apply(c)
        except NotApplicable:
            if rewrite in rewrites:
                raise
            continue
        verify(c, rewrite.name)
        assert parse_cascade(print_cascade(c)) == c
    return c


def tile_sizes(c: Cascade, tile: int, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """That size for every symbol that neither an input's shape nor `sizes` gives."""
    given = {str(x) for t in c.inputs for r in t.ranks for x in c.extent(r).free_symbols} | {*(sizes or {})}
    return {s: tile for s in c.symbols if s not in given}


def generated(
    c: Cascade,
    data: Mapping[str, torch.Tensor],
    tile: int = 4,
    grid: Mapping[str, int] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, torch.Tensor]:
    """The outputs of the tiled-PyTorch emitter's module for the cascade. `grid` tiles further ranks, `sizes` gives
    symbols that are not tiles."""
    tiles = tile_sizes(c, tile, sizes)
    source = emit(plan(c), Schedule(tiles=tuple(sorted({**tiles, **(grid or {})}.items()))))
    module = types.ModuleType(c.name)
    exec(compile(source.text, f"<{c.name}>", "exec"), module.__dict__)
    known = infer_sizes(c, {name: tuple(t.shape) for name, t in data.items()}, {**tiles, **(sizes or {})})
    outputs = module.run(*(data[t.name] for t in c.inputs), **{s: known[s] for s in c.symbols if s not in tiles})
    return dict(zip(c.outputs, outputs, strict=True))


def interpreted(
    c: Cascade, data: Mapping[str, torch.Tensor], tile: int = 4, sizes: Mapping[str, int] | None = None
) -> dict[str, torch.Tensor]:
    return interpret(c, data, {**tile_sizes(c, tile, sizes), **(sizes or {})})


def assert_same(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Equal up to the rounding of float64, relative to the largest element."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        bound = 1e-11 * max(1.0, float(value.abs().max()) if value.numel() else 0.0)
        torch.testing.assert_close(actual[name].double(), value.double(), rtol=0, atol=bound)
