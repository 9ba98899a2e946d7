"""Differentiated cascades through loops and the tiled torch emitter, against the interpreter in float64."""

from __future__ import annotations

import pytest
import torch

from einscade.codegen.loops import plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.tiled_torch import emit
from einscade.ir import Cascade
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.differentiate import differentiate
from einscade.passes.online import Loops, Online

HEAD = """cascade c(Q[b,h,p,e]: f64, K[b,g,m,e]: f64, V[b,g,m,f]: f64{more}) -> O[b,h,p,f]: f64
  where b < B, h < 4, g < 2, p < P, m < M, e < 8, f < 6
  S[b,h,p,m]: f64 = sum(e) Q[b,h,p,e] * K[b,h // 2,m,e] * 0.7{domain}
"""
SOFTMAX = """  G[b,h,p]: f64 = max(m) {s}
  W[b,h,p,m]: f64 = exp({s} - G[b,h,p])
  Z[b,h,p]: f64 = sum(m) W[b,h,p,m]
  N[b,h,p,f]: f64 = sum(m) W[b,h,p,m] * V[b,h // 2,m,f]
  O[b,h,p,f]: f64 = N[b,h,p,f] / Z[b,h,p]  if Z[b,h,p] != 0
"""
SIGMOID = "  O[b,h,p,f]: f64 = sum(m) V[b,h // 2,m,f] / (1 + exp(-S[b,h,p,m]))\n"


def scored(score: str, more: str = "", domain: str = "") -> str:
    """Attention by softmax over `score`, of the products S and of what `more` adds to the inputs."""
    return HEAD.format(more=more, domain=domain) + f"  C[b,h,p,m]: f64 = {score}\n" + SOFTMAX.format(s="C[b,h,p,m]")


CASES = {
    "full": HEAD.format(more="", domain="") + SOFTMAX.format(s="S[b,h,p,m]"),
    "causal": HEAD.format(more="", domain="  if m <= p") + SOFTMAX.format(s="S[b,h,p,m]"),
    "window with empty rows": HEAD.format(more="", domain="  if m <= p & p - m < 9 & m > 3")
    + SOFTMAX.format(s="S[b,h,p,m]"),
    "boolean mask": HEAD.format(more=", A[b,m]: bool", domain="  if A[b,m]") + SOFTMAX.format(s="S[b,h,p,m]"),
    "softcap": scored("2.0 * tanh(S[b,h,p,m] / 2.0)", domain="  if m <= p"),
    "slopes": scored("S[b,h,p,m] + A[h] * (m - p)", ", A[h]: f64", "  if m <= p"),
    "dense bias": scored("S[b,h,p,m] + A[h,p,m]", ", A[h,p,m]: f64"),
    "dense bias of batches and heads together": scored("S[b,h,p,m] + A[p,m]", ", A[p,m]: f64", "  if m <= p"),
    "dense bias of each head": scored("S[b,h,p,m] + A[b,h,p,m]", ", A[b,h,p,m]: f64"),
    "dense bias of each head, causal": scored("S[b,h,p,m] + A[b,h,p,m]", ", A[b,h,p,m]: f64", "  if m <= p"),
    "dense bias of sequences with lengths": scored(
        "S[b,h,p,m] + A[h,p,m]", ", L[b]: i64, A[h,p,m]: f64", "  if m < L[b]"
    ),
    "dense bias of causal sequences with lengths and heads together": scored(
        "S[b,h,p,m] + A[p,m]", ", L[b]: i64, A[p,m]: f64", "  if m < L[b] & m <= p"
    ),
    "sigmoid": HEAD.format(more="", domain="  if m <= p") + SIGMOID,
    "keys and values in one tensor": (HEAD.format(more="", domain="  if m <= p") + SOFTMAX.format(s="S[b,h,p,m]"))
    .replace("K[b,g,m,e]: f64, V[b,g,m,f]: f64", "K[b,g,m,t]: f64")
    .replace("f < 6", "f < 6, t < 14")
    .replace("V[b,h // 2,m,f]", "K[b,h // 2,m,f + 8]"),
}


def compiled(cascade: Cascade, tile: int):  # type: ignore[no-untyped-def]
    tiles = {s: tile for s in cascade.symbols if s not in ("B", "P", "M")} | {"p": tile + 3, "m": tile - 3}
    space: dict[str, object] = {}
    exec(compile(emit(plan(cascade), Schedule(tiles=tuple(sorted(tiles.items())))).text, "kernel", "exec"), space)
    return space["run"]


def values_of(cascade: Cascade, sizes: dict[str, int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    values = {}
    for t in cascade.inputs:
        shape = [int(n.xreplace({s: sizes[s.name] for s in n.free_symbols})) for n in cascade.shape(t.name)]
        draw = torch.randn(shape, generator=generator, dtype=torch.float64)
        values[t.name] = draw > 0 if t.dtype == "bool" else (20 * draw.abs()).long() if t.dtype == "i64" else draw
    return values


@pytest.mark.parametrize("lengths", [(37, 37), (1, 19), (23, 5)])
@pytest.mark.parametrize("name", CASES)
def test_gradients_in_loops_match_the_interpreter(name: str, lengths: tuple[int, int]) -> None:
    forward = parse_cascade(CASES[name])
    gradient = differentiate(forward)
    looped = Loops().apply(gradient.cascade)
    generator = torch.Generator().manual_seed(len(name))
    sizes = {"B": 2, "P": lengths[0], "M": lengths[1]}
    values = values_of(forward, sizes, generator)
    saved = interpret(gradient.forward, values)
    values |= {n: saved[n] for n in gradient.saved}
    for output, cotangent in gradient.cotangents.items():
        values[cotangent] = torch.randn(saved[output].shape, generator=generator, dtype=torch.float64)
    used = {t.name: values[t.name] for t in gradient.cascade.inputs}
    expected = interpret(gradient.cascade, used, {s: n for s, n in sizes.items() if s in gradient.cascade.symbols})
    got = compiled(looped, 16)(
        *(values[t.name] for t in looped.inputs), **{s: n for s, n in sizes.items() if s in looped.symbols}
    )
    for output, value in zip(looped.outputs, got, strict=True):
        reference = expected[output]
        assert value.shape == reference.shape
        scale = reference.norm() + 0.1 * values["dO"].norm()  # a gradient that cancels to 0 keeps its terms' rounding
        assert (value - reference).norm() <= 1e-13 * scale, output


def test_the_forward_pass_saves_what_the_gradient_reads() -> None:
    forward = parse_cascade(CASES["causal"])
    gradient = differentiate(forward)
    wanted = gradient.forward
    sizes = {"B": 2, "P": 37, "M": 37}
    values = values_of(forward, sizes, torch.Generator().manual_seed(0))
    expected = interpret(wanted, values)
    looped = Online().apply(wanted)
    got = compiled(looped, 16)(*(values[t.name] for t in looped.inputs), **sizes)
    for output, value in zip(looped.outputs, got, strict=True):
        assert (value - expected[output]).norm() <= 1e-13 * expected[output].norm(), output
