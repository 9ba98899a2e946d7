"""Differentiated cascades through loops and the tiled torch emitter, against the interpreter in float64."""

from __future__ import annotations

import pytest
import torch

from einscade.codegen.cost import tile_symbols
from einscade.codegen.loops import FlatNest, plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.space import candidates as space
from einscade.codegen.tiled_torch import emit
from einscade.codegen.triton_emit import emit as emit_kernels
from einscade.compiler.gradients import scan_free
from einscade.ir import Cascade
from einscade.ir.device import H200
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.differentiate import Gradient, differentiate
from einscade.passes.fusion import is_long
from einscade.passes.online import Loops, Online
from einscade.passes.pipeline import run
from einscade.passes.roles import separate

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

# Heads that the forward pass reads as groups, through an index that is several ranks or a part of one.
PARTS = """cascade c(Q[b,g,p,e]: f64, K[b,i,m,e]: f64, V[b,i,m,f]: f64) -> O[b,h,i,p,f]: f64{more}
  where b < B, h < 2, i < 3, g < 6, p < P, m < M, e < 8, f < 6
  S[b,h,i,p,m]: f64 = sum(e) Q[b,3*h + i,p,e] * K[b,i,m,e] * 0.7
  G[b,h,i,p]: f64 = max(m) S[b,h,i,p,m]
  W[b,h,i,p,m]: f64 = exp(S[b,h,i,p,m] - G[b,h,i,p])
  Z[b,h,i,p]: f64 = sum(m) W[b,h,i,p,m]
  N[b,h,i,p,f]: f64 = sum(m) W[b,h,i,p,m] * V[b,i,m,f]
  O[b,h,i,p,f]: f64 = N[b,h,i,p,f] / Z[b,h,i,p]  if Z[b,h,i,p] != 0
"""
WEIGHTS = ", A[b,h,i,p,m]: f64", "  A[b,h,i,p,m]: f64 = W[b,h,i,p,m] / Z[b,h,i,p]\n"
SQUARES = ", Y[b,g,p]: f64", "  Y[b,g,p]: f64 = sum(e) Q[b,g,p,e] * Q[b,g,p,e]\n"
VIEW = "heads as groups"
VIEWS = {
    VIEW: PARTS.format(more=""),
    f"{VIEW}, causal": PARTS.format(more="").replace("* 0.7", "* 0.7  if m <= p"),
    f"{VIEW}, whose weights are an output": PARTS.format(more=WEIGHTS[0]) + WEIGHTS[1],
    f"{VIEW}, and as they are": PARTS.format(more=SQUARES[0]) + SQUARES[1],
    f"{VIEW} of groups": PARTS.format(more="")
    .replace("h < 2", "a < 2, h < 2")
    .replace("g < 6", "g < 12")
    .replace("3*h", "6*a + 3*h")
    .replace("b,h,i", "b,a,h,i"),
    "heads of keys repeated one after the other": CASES["causal"],
    "heads of keys repeated all together": CASES["causal"].replace("h // 2", "h % 2"),
    "heads of keys that are groups and members": CASES["causal"]
    .replace("[b,g,m", "[b,g,i,m")
    .replace("h // 2", "h // 2,h % 2")
    .replace("g < 2", "g < 2, i < 2"),
}
CASES |= VIEWS


DECAY = """cascade c(Q[b,h,p,e]: f64, K[b,h,m,e]: f64, V[b,h,m,f]: f64, X[b,h,m]: f64) -> O[b,h,p,f]: f64
  where b < B, h < 2, p < P, m < P, e < 8, f < 6
  S[b,h,p,m]: f64 = sum(e) Q[b,h,p,e] * K[b,h,m,e] * 0.7
"""
ROLES = {
    "a decay under a softmax": DECAY
    + "  C[b,h,p,m]: f64 = S[b,h,p,m] + X[b,h,p] - X[b,h,m]  if m <= p\n"
    + SOFTMAX.format(s="C[b,h,p,m]").replace("h // 2", "h"),
    "a decay by itself": DECAY
    + "  O[b,h,p,f]: f64 = sum(m) S[b,h,p,m] * exp(X[b,h,p] - X[b,h,m]) * V[b,h,m,f]  if m <= p\n",
    "queries and keys in one tensor": (DECAY + SOFTMAX.format(s="S[b,h,p,m]").replace("h // 2", "h"))
    .replace("Q[b,h,p,e]: f64, K[b,h,m,e]: f64", "K[b,h,m,e]: f64")
    .replace(", X[b,h,m]: f64", "")
    .replace("Q[b,h,p,e]", "K[b,h,p,e]"),
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


@pytest.mark.parametrize("name", ROLES)
def test_gradients_of_roles_are_two_loops(name: str) -> None:
    """One along the queries and one along the keys: nothing of both lengths goes to memory."""
    forward, gradient, of = of_roles(ROLES[name])
    looped = run(gradient.cascade, "exact").cascade
    program = plan(looped)
    assert len(program.serial_nests) == 2
    lengths = {r for r in looped.rank_table if is_long(looped, r)} - {"b"}
    for e in (e for nest in program.nests if isinstance(nest, FlatNest) for e in nest.einsums):
        assert len(lengths & {*e.ranks}) < 2, e
    generator, sizes = torch.Generator().manual_seed(len(name)), {"B": 2, "P": 37}
    values = values_of(forward, sizes, generator)
    saved = interpret(gradient.forward, values | {role: values[k] for role, k in of.items()})
    seed = torch.randn(saved["O"].shape, generator=generator, dtype=torch.float64)
    given = values | {role: values[k] for role, k in of.items()} | saved | {gradient.cotangents["O"]: seed}
    known = {s: n for s, n in sizes.items() if s in looped.symbols}
    got = compiled(looped, 16)(*(given[t.name] for t in gradient.cascade.inputs), **known)
    outputs = dict(zip(gradient.cascade.outputs, got, strict=True))
    leaves = [v.requires_grad_() for v in values.values()]
    wanted = torch.autograd.grad(by_torch(name, *leaves), leaves, seed)
    for k, exact in zip(values, wanted, strict=True):
        made = torch.stack([outputs[out] for n, out in gradient.gradients.items() if of.get(n, n) == k]).sum(0)
        assert (made - exact).norm() <= 1e-12 * exact.norm(), k


@pytest.mark.parametrize("name", ROLES)
def test_gradients_of_roles_are_kernels(name: str) -> None:
    _, gradient, _ = of_roles(ROLES[name].replace("f64", "f32"))
    program = plan(run(gradient.cascade, "exact").cascade)
    assert emit_kernels(program, space(program, H200, {})[0]).text.count("@triton.jit\ndef c_gradient_kernel") == 2


def of_roles(text: str) -> tuple[Cascade, Gradient, dict[str, str]]:
    """The cascade, its gradient where every input has one role, and which inputs of that are one tensor."""
    forward = scan_free(parse_cascade(text), "exact")
    apart, of = separate(forward, [t.name for t in forward.inputs])
    return forward, differentiate(apart, roles=of), of


def by_torch(name: str, *inputs: torch.Tensor) -> torch.Tensor:
    """The same by torch operations."""
    q, k, v, *x = inputs if len(inputs) > 2 else (inputs[0], *inputs)
    s = 0.7 * q @ k.mT
    if not x:
        return s.softmax(-1) @ v
    decay = (x[0][..., :, None] - x[0][..., None, :]).masked_fill(torch.ones_like(s).triu(1) > 0, float("-inf"))
    return (s + decay).softmax(-1) @ v if "softmax" in name else (s * decay.exp()) @ v


@pytest.mark.parametrize("name", VIEWS)
def test_heads_in_parts_are_summed_in_loops(name: str) -> None:
    """Nothing of both lengths goes to memory."""
    program = plan(run(differentiate(parse_cascade(VIEWS[name])).cascade, "exact").cascade)
    lengths = {r for r in program.cascade.rank_table if is_long(program.cascade, r)} - {"b"}
    for e in (e for nest in program.nests if isinstance(nest, FlatNest) for e in nest.einsums):
        assert len(lengths & {*e.ranks}) < 2, e


@pytest.mark.parametrize(("name", "result"), [(VIEW, "flatten(1, 2)"), (f"{VIEW} of groups", "flatten(1, 3)")])
def test_a_gradient_over_groups_and_members_is_a_view_of_what_a_kernel_wrote(name: str, result: str) -> None:
    program = plan(run(differentiate(parse_cascade(VIEWS[name].replace("f64", "f32"))).cascade, "exact").cascade)
    tiles = {**dict.fromkeys(tile_symbols(program), 16), "p": 16, "m": 16}
    code = emit_kernels(program, Schedule(tuple(tiles.items()), target="cuda:90")).text
    assert ".clamp(" not in code
    (output,) = program.views
    assert f"{output}.{result}" in code.splitlines()[-1]
    assert any(output in nest.outputs for nest in program.serial_nests)


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
