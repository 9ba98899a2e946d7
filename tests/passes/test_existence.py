"""Which results exist: predicates and rewrites against the interpreter, where a condition on the row comes with what a
reduction reads. The reduction is then over nothing, and its result is there."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import Tensor

from einscade.codegen.tiled_torch import emit_flat
from einscade.ir import Cascade, Einsum
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.canonicalise import Canonicalise
from einscade.passes.defer import Defer
from einscade.passes.differentiate import differentiate
from einscade.passes.existence import existence
from einscade.passes.online import Loops, Online
from einscade.passes.pipeline import run
from einscade.passes.rewrite import NotApplicable
from tests.codegen.generated import module
from tests.passes.cascades import assert_equal

P, M = 4, 3
# S is what is asked about.
BODIES = {
    "read at each point": "Y[p,m] = X[p,m]   if A[p]\n S[p] = sum(m) Y[p,m]",
    "read at each point, a maximum": "Y[p,m] = X[p,m]   if A[p]\n S[p] = max(m) Y[p,m] * V[m]",
    "read beside the row": "Y[p,m] = X[p,m]   if A[p]\n T[p] = U[p]   if p < 3\n S[p] = sum(m) Y[p,m] + T[p]",
    "of its own": "S[p] = sum(m) X[p,m]   if A[p]",
    "of its own, beside what is read": "Y[p,m] = X[p,m]   if p < 3\n S[p] = sum(m) Y[p,m]   if A[p]",
    "with the row": "Y[p] = U[p]   if A[p]\n S[p] = sum(m) X[p,m] * Y[p]",
    "with what the row makes": "Y[p] = max(m) X[p,m]   if A[p]\n T[p,m] = X[p,m] * Y[p]\n S[p] = sum(m) T[p,m]",
    "in a choice": "Y[p,m] = X[p,m]   if A[p]\n S[p] = sum(m) Where(U[p] > 0, Y[p,m], 1)",
    "that a domain reads": "Y[p,m] = X[p,m]   if A[p]\n S[p] = sum(m) X[p,m]   if Y[p,m] > 0",
    "in one of two": "Y[p,m] = X[p,m]   if A[p]\n T[p,m] = X[p,m]   if m != 1\n S[p] = sum(m) Y[p,m] + T[p,m]",
    "both ways": "Y[p] = sum(m) V[m]   if A[p] & p < 3\n T[p,m] = Y[p]   if A[p]\n S[p] = max(m) Y[p] + T[p,m]",
    "of an output": "Y[p,m] = X[p,m]   if U[p] > 0\n S[p] = sum(m) Y[p,m]   if A[p]\n T[p] = S[p] + 1",
}
REWRITES = {
    "canonicalise": Canonicalise().apply,
    "online": Online().apply,
    "loops": Loops().apply,
    "exact": lambda cascade: run(cascade, "exact").cascade,
}


def rows(body: str, outputs: str, reader: str = "R[p] = S[p] + U[p]") -> Cascade:
    return parse_cascade(f"""
        cascade rows(X[p,m], U[p], V[m], A[p]: bool) -> {outputs}
          where p < P, m < M
          {body}
          {reader}
    """)


def given() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"X": (P, M), "U": (P,), "V": (M,), "A": (P,)}
    made = {n: torch.randn(s, generator=rng) for n, s in shapes.items()}
    made["A"] = torch.tensor([True, False, False, True])
    made["U"][:2] = made["U"][:2].abs()
    return list(made.values())


def results(cascade: Cascade, values: list[Tensor]) -> list[Tensor]:
    sizes = {s: {"P": P, "M": M}.get(s, 2) for s in cascade.symbols}
    made = interpret(cascade, dict(zip((t.name for t in cascade.inputs), values, strict=True)), sizes)
    return [made[o] for o in cascade.outputs]


@pytest.mark.parametrize("name", BODIES)
def test_the_predicate_is_what_the_interpreter_does(name: str) -> None:
    cascade = rows(BODIES[name], "E", "E[p] = 1   if S[p] != 0.123")  # 1 where S is there to be read
    ones = Einsum(cascade.tensors["E"], sympy.Integer(1), domain=existence(cascade).results["S"])
    said = cascade.replace(body=(*cascade.body[:-1], ones))
    torch.testing.assert_close(results(said, given()), results(cascade, given()))


@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("outputs", ["R", "R, S"])
@pytest.mark.parametrize("name", BODIES)
def test_rewrites_keep_results_over_nothing(name: str, outputs: str, rewrite: str) -> None:
    """What is missing is 0 in an output, and takes its readers with it; a reduction over nothing does not."""
    cascade = rows(BODIES[name], outputs)
    try:
        after = REWRITES[rewrite](cascade)
    except NotApplicable:
        return
    torch.testing.assert_close(results(after, given()), results(cascade, given()))


RESIDUAL = """
    cascade block(Q[b,p,e], K[b,m,e], V[b,m,f], L[b]: i64, W0[f,o], X[b,p,o]) -> R
      where b < B, p < P, m < M, e < 4, f < 4, o < 4
      S[b,p,m] = sum(e) Q[b,p,e] * K[b,m,e]   if m + 1 < L[b]
      G[b,p]   = max(m) S[b,p,m]
      W[b,p,m] = exp(S[b,p,m] - G[b,p])
      Z[b,p]   = sum(m) W[b,p,m]
      O[b,p,f] = sum(m) W[b,p,m] * V[b,m,f] / Z[b,p]
      {}
"""
READERS = {
    "beside it": "R[b,p,o] = 2 * O[b,p,o] + X[b,p,o]",
    "after a projection": "Y[b,p,o] = sum(f) O[b,p,f] * W0[f,o]\n R[b,p,o] = Y[b,p,o] + X[b,p,o]",
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_added_to_attention_stays_where_no_key_is_seen(reader: str) -> None:
    before = parse_cascade(RESIDUAL.format(READERS[reader]))
    sizes = {"B": 4, "P": 3, "M": 5}
    for after in (Defer().apply(before), run(before, "exact").cascade):
        assert_equal(before, after, sizes, tiles=(2,))


def test_terms_of_a_deferred_sum_are_missing_together() -> None:
    before = parse_cascade("""
        cascade two(X[p,m], V[m], A[p]: bool) -> R
          where p < P, m < M
          Z[p]   = sum(m) abs(X[p,m])
          Y[p,m] = X[p,m]   if A[p]
          S[p]   = sum(m) V[m] / Z[p] + Y[p,m]
          R[p]   = S[p] + 1
    """)
    assert_equal(before, Defer().apply(before), {"P": P, "M": M})


@pytest.mark.parametrize(
    "body",
    [
        "Y[p,m] = X[p,m]**2   if A[p]\n S[p] = sum(m) Y[p,m]\n R[p] = S[p] * U[p] + U[p]",
        "Y[p] = U[p]**2\n S[p] = sum(m) Y[p]\n R[p] = S[p]",
        "Y[p] = U[p]**2\n R[p] = Y[p]   if A[p]",
        "Y[p,m] = U[p] * V[m]   if A[p]\n S[p] = sum(m) Y[p,m]\n R[p] = sin(S[p] + U[p])",
        "S[p] = sum(m) X[p,m]**2   if A[p]\n R[p] = exp(S[p] + U[p])",
        "S[p] = sum(m) X[p,m]**2   if A[p]\n T[p] = S[p] * U[p]\n R[p] = sin(T[p] + U[p])",
        "S[p] = sum(m) X[p,m]**2   if A[p]\n R[p] = Where(U[p] > 0, S[p] * U[p], U[p])",
        "Y[p] = U[p]**2   if A[p]\n R[p] = Where(U[p] > 0, Y[p], U[p])",
    ],
)
def test_gradients_of_results_over_nothing(body: str) -> None:
    cascade = parse_cascade(f"""
        cascade rows(X[p,m]: f64, U[p]: f64, V[m]: f64, A[p]: bool) -> R[p]: f64
          where p < P, m < M
          {body}
    """)
    gradient = differentiate(cascade)
    values = dict(zip((t.name for t in cascade.inputs), given(), strict=True))
    leaves = {n: v if n == "A" else v.double().requires_grad_() for n, v in values.items()}
    (out,) = module(emit_flat(cascade)).run(*leaves.values(), P=P, M=M)
    seed = torch.arange(1.0, P + 1, dtype=torch.float64)
    wanted = torch.autograd.grad(out, [leaves[n] for n in gradient.gradients], seed)
    saved = interpret(gradient.forward, {t.name: values[t.name] for t in gradient.forward.inputs})
    pool = {**values, **saved, gradient.cotangents["R"]: seed}
    sizes = {s: {"P": P, "M": M}[s] for s in gradient.cascade.symbols}
    made = interpret(gradient.cascade, {t.name: pool[t.name] for t in gradient.cascade.inputs}, sizes)
    torch.testing.assert_close([made[d] for d in gradient.gradients.values()], list(wanted), rtol=1e-6, atol=1e-6)
