"""Gradients of cascades against central differences of the reference interpreter, in float64."""

from __future__ import annotations

from zlib import crc32

import pytest
import sympy
import torch

from einscade.compiler.gradients import scan_free
from einscade.ir import Cascade, Mod
from einscade.ir.interpret import infer_sizes, interpret
from einscade.ir.text import parse_cascade
from einscade.ir.verify import verify
from einscade.passes.differentiate import Gradient, differentiate
from einscade.passes.rewrite import NotApplicable
from einscade.passes.terms import conjuncts

HEAD = "cascade c(Q[b,h,p,e], K[b,g,m,e], V[b,g,m,f]{more}) -> O[b,h,p,f]\n"
RANKS = "  where b < 2, h < 4, g < 2, p < 5, m < 6, e < 3, f < 2{more}\n"
SCORES = "  S[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h // 2,m,e] * 0.7{domain}\n"
SOFTMAX = """  G[b,h,p]   = max(m) {s}
  W[b,h,p,m] = exp({s} - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
"""
DEFERRED = """  N[b,h,p,f] = sum(m) W[b,h,p,m] * V[b,h // 2,m,f]
  O[b,h,p,f] = N[b,h,p,f] / Z[b,h,p]  if Z[b,h,p] != 0
"""
TEXTBOOK = "  O[b,h,p,f] = sum(m) W[b,h,p,m] * V[b,h // 2,m,f] / Z[b,h,p]\n"


def attention(
    *, more: str = "", ranks: str = "", domain: str = "", scores: str = "", s: str = "S[b,h,p,m]", tail: str = DEFERRED
) -> str:
    return (
        HEAD.format(more=more)
        + RANKS.format(more=ranks)
        + SCORES.format(domain=domain)
        + scores
        + SOFTMAX.format(s=s)
        + tail
    )


CASES = {
    "softmax": attention(),
    "textbook": attention(tail=TEXTBOOK),
    "causal with empty rows": attention(domain="  if m <= p & m > 1"),
    "softcap": attention(scores="  C[b,h,p,m] = 2.0 * tanh(S[b,h,p,m] / 2.0)\n", s="C[b,h,p,m]"),
    "rectified scores": attention(scores="  C[b,h,p,m] = Max(S[b,h,p,m], 0.1)\n", s="C[b,h,p,m]"),
    "alibi slopes": attention(more=", A[h]", scores="  C[b,h,p,m] = S[b,h,p,m] + A[h] * (m - p)\n", s="C[b,h,p,m]"),
    "slopes that heads share": attention(
        more=", A[g]", scores="  C[b,h,p,m] = S[b,h,p,m] + A[h // 2] * (m - p)\n", s="C[b,h,p,m]"
    ),
    "keys repeated all together": attention().replace("h // 2", "h % 2"),
    "keys of which heads are two ranks": attention()
    .replace("h // 2", "h // 2,h % 2")
    .replace("[b,g,", "[b,g,i,")
    .replace("g < 2", "g < 2, i < 2"),
    "some of the keys repeated": attention().replace("h // 2", "h % 3").replace("h < 4, g < 2", "h < 5, g < 4"),
    "queries of which heads are two ranks": attention(ranks=", i < 2, j < 2")
    .replace("b,h,p", "b,i,j,p")
    .replace("Q[b,i,j,p,e], K", "Q[b,h,p,e], K")
    .replace("Q[b,i,j,p,e] *", "Q[b,2*i + j,p,e] *")
    .replace("h // 2", "j"),
    "relative table": attention(
        more=", A[h,n]", ranks=", n < 10", scores="  C[b,h,p,m] = S[b,h,p,m] + A[h,m - p + 4]\n", s="C[b,h,p,m]"
    ),
    "bucket table": attention(
        more=", A[n,h], I[p,m]: i64",
        ranks=", n < 3",
        scores="  C[b,h,p,m] = S[b,h,p,m] + A[I[p,m],h]\n",
        s="C[b,h,p,m]",
    ),
    "dense bias shared by the batch": attention(
        more=", A[h,p,m]", scores="  C[b,h,p,m] = S[b,h,p,m] + A[h,p,m]\n", s="C[b,h,p,m]"
    ),
    "broadcast bias": attention(
        more=", A[n,h,p,m]", ranks=", n < 1", scores="  C[b,h,p,m] = S[b,h,p,m] + A[0,h,p,m]\n", s="C[b,h,p,m]"
    ),
    "talking heads": attention(
        more=", A[h,k]",
        ranks=", k < 4",
        scores="  C[b,h,p,m] = sum(k) A[h,k] * S[b,k,p,m]\n",
        s="C[b,h,p,m]",
    ),
    "masked by Where": attention(
        scores="  C[b,h,p,m] = Where(m < 3, S[b,h,p,m], Max(S[b,h,p,m], 0.1))\n", s="C[b,h,p,m]"
    ),
    "sigmoid": HEAD.format(more="")
    + RANKS.format(more="")
    + SCORES.format(domain="  if m <= p")
    + "  O[b,h,p,f] = sum(m) V[b,h // 2,m,f] / (1 + exp(-S[b,h,p,m]))\n",
    "squared weights": attention(
        scores="  W[b,h,p,m] = S[b,h,p,m] * S[b,h,p,m] + 0.5\n  Z[b,h,p] = sum(m) W[b,h,p,m]\n", tail=DEFERRED
    ).replace(SOFTMAX.format(s="S[b,h,p,m]"), ""),
    "log-sum-exp": "cascade c(X[p,m]) -> L[p]\n  where p < 3, m < 7\n  G[p] = max(m) X[p,m]\n"
    "  Z[p] = sum(m) exp(X[p,m] - G[p])\n  L[p] = G[p] + log(Z[p])\n",
    "maximum itself": "cascade c(X[p,m]) -> G[p], Y[p]\n  where p < 3, m < 7\n  G[p] = max(m) X[p,m]\n"
    "  Y[p] = sum(m) X[p,m] * G[p]\n",
    "steps": "cascade c(X[m]) -> O\n  where m < 9\n"
    "  O[] = sum(m) sign(X[m]) * X[m]**2 + floor(3 * X[m]) * X[m] + ceil(X[m] + floor(X[m])) * X[m]\n",
    "split rank": "cascade c(X[n]) -> Y[p]\n  where n < 15, p < 3, m < 4\n"
    "  Y[p] = sum(m) X[4*p + m + 2] * X[4*p + m] * m\n",
    "merged batches": "cascade c(Q[t,p,e], K[t,p,e], A[s,p], B[h,r,n]) -> O[b,h,r,p]\n"
    "  where b < 2, h < 3, r < 2, p < 2, e < 2, t < 12, s < 37, n < 4\n"
    "  S[b,h,r,p] = sum(e) Q[2*h + 6*b + r,p,e] * K[2*h + 6*b + r,p,e]\n"
    "  O[b,h,r,p] = S[b,h,r,p] * A[6*h + 18*b + 3*r + 2,p] * B[h,r,3*p] * B[h,r,2]\n",
    "digits": "cascade c(X[n], Y[k,l], U[n], V[i,g]) -> O[p,q]\n"
    "  where n < 24, k < 2, l < 4, p < 3, q < 8, s < 3, g < 5, i < 5\n"
    "  O[p,q] = sum(s) X[8*s + q] * U[s + 3*q] * U[4*s + q] * Y[q // 4,q % 4] * V[q % 4,q // 2] * Y[s // 2,s]\n",
    "the greatest weight alone": "cascade c(X[p,m], V[m,f]) -> O[p,f]\n  where p < 3, m < 5, f < 2, t < 1\n"
    "  I[p,t]: i64 = topk(m -> t) X[p,m]\n  G[p] = max(m) X[p,m]\n  W[p,m] = exp(X[p,m] - G[p])\n"
    "  Z[p] = sum(m) W[p,m]\n  R[p] = max(m) W[p,m] / Z[p]\n"
    "  O[p,f] = sum(m) V[m,f] * Where(I[p,0] == m, R[p], 0)\n",
    "a decay under a softmax": "cascade c(S[p,m], X[m], V[m,f]) -> O[p,f]\n  where p < 6, m < 6, f < 2\n"
    "  W[p,m] = exp(S[p,m] + X[p] - X[m])  if m <= p\n  Z[p] = sum(m) W[p,m]\n"
    "  O[p,f] = sum(m) W[p,m] * V[m,f] / Z[p]\n",
    "a decay by itself": "cascade c(S[p,m], X[m], V[m,f]) -> O[p,f]\n  where p < 6, m < 6, f < 2\n"
    "  O[p,f] = sum(m) S[p,m] * exp(X[p] - X[m]) * V[m,f]  if m <= p\n",
    "a decay from the place before": "cascade c(S[p,m], X[m], V[m,f]) -> O[p,f]\n  where p < 6, m < 6, f < 2\n"
    "  O[p,f] = sum(m) S[p,m] * exp(2 * X[p - 1] - 2 * X[m]) * V[m,f]  if m <= p & p > 0\n",
    "a decay at two places of the keys": "cascade c(S[p,m], X[m], V[m,f]) -> O[p,f]\n  where p < 6, m < 6, f < 2\n"
    "  O[p,f] = sum(m) S[p,m] * exp(X[p] - X[m]) * X[m] * V[m,f]\n",
    "one tensor in three roles": "cascade c(X[p,e]) -> O[p,f]\n  where p < 6, m < 6, e < 2, f < 2\n"
    "  S[p,m] = sum(e) X[p,e] * X[m,e]\n  W[p,m] = exp(S[p,m])\n  Z[p] = sum(m) W[p,m]\n"
    "  O[p,f] = sum(m) W[p,m] * X[m,f] / Z[p]\n",
    "two softmaxes apart": "cascade c(X[p,m], U[p,m], V[m,f], L[n]) -> O[p,f]\n"
    "  where p < 3, m < 5, f < 2, n < 1\n"
    "  W[p,m] = exp(X[p,m])\n  Z[p] = sum(m) W[p,m]\n  A[p,m] = exp(U[p,m])\n  B[p] = sum(m) A[p,m]\n"
    "  O[p,f] = sum(m) (W[p,m] / Z[p] - L[0] * A[p,m] / B[p]) * V[m,f]\n",
}


def inputs_of(cascade: Cascade, generator: torch.Generator) -> dict[str, torch.Tensor]:
    values = {}
    for t in cascade.inputs:
        shape = [int(n) for n in cascade.shape(t.name)]
        draw = torch.randint(0, 3, shape, generator=generator) if t.dtype == "i64" else None
        values[t.name] = torch.randn(shape, generator=generator, dtype=torch.float64) if draw is None else draw
    return values


def check(cascade: Cascade, values: dict[str, torch.Tensor], generator: torch.Generator) -> Gradient:
    result = differentiate(cascade)
    verify(result.cascade, "differentiate")
    verify(result.forward)
    forward = interpret(result.forward, values)
    seeds = {o: torch.randn(forward[o].shape, generator=generator, dtype=torch.float64) for o in result.cotangents}
    given = values | {n: forward[n] for n in result.saved} | {result.cotangents[o]: s for o, s in seeds.items()}
    sizes = infer_sizes(cascade, {n: tuple(v.shape) for n, v in values.items()})
    sizes = {s: n for s, n in sizes.items() if s in result.cascade.symbols}
    grads = interpret(result.cascade, {t.name: given[t.name] for t in result.cascade.inputs}, sizes)
    step = 1e-5
    for name, gradient in result.gradients.items():
        direction = torch.randn(values[name].shape, generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            moved = interpret(cascade, values | {name: values[name] + sign * step * direction})
            losses.append(sum((moved[o] * s).sum() for o, s in seeds.items()))
        numeric = (losses[0] - losses[1]) / (2 * step)
        exact = (grads[gradient] * direction).sum()
        assert abs(numeric - exact) <= 1e-7 * (1 + abs(numeric)), (name, float(numeric), float(exact))
    return result


@pytest.mark.parametrize("name", ["a decay under a softmax", "a decay by itself", "a decay from the place before"])
def test_a_difference_has_no_gradient_where_both_are_one_place(name: str) -> None:
    """There the contributions cancel, but for their rounding, beside which the rest of a strong decay is little."""
    result = differentiate(parse_cascade(CASES[name]))
    made = [s for s in result.cascade.body if s.name.startswith("dX") and s.reduce]
    assert len(made) == 2
    assert all(any(isinstance(c, sympy.Ne) for c in conjuncts(s.domain)) for s in made)


def test_a_tensor_that_is_read_beside_its_difference_keeps_every_point() -> None:
    result = differentiate(parse_cascade(CASES["a decay at two places of the keys"]))
    assert not any(isinstance(c, sympy.Ne) for s in result.cascade.body for c in conjuncts(s.domain))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_central_differences(name: str) -> None:
    cascade = parse_cascade(CASES[name])
    generator = torch.Generator().manual_seed(crc32(name.encode()))
    result = check(cascade, inputs_of(cascade, generator), generator)
    assert set(result.gradients) == {t.name for t in cascade.inputs if t.dtype == "f32"}


def test_indices_that_count_through_their_ranks_are_solved() -> None:
    """Nothing is compared with the points of another tensor, but a place that does not move."""
    gradient = differentiate(parse_cascade(CASES["merged batches"])).cascade
    assert not any(e.reduce for e in gradient.body if e.name in ("dQ", "dK", "dA"))
    equal = {c for e in gradient.body for c in e.domain.atoms(sympy.Eq)}
    assert all(c.lhs.is_Integer or c.lhs.has(Mod) for c in equal), equal


def test_nothing_quadratic_is_saved() -> None:
    for name, text in CASES.items():
        cascade = parse_cascade(text)
        gradient = differentiate(cascade)
        for saved in gradient.saved:
            assert not {"p", "m"} <= set(gradient.forward.tensors[saved].ranks), name


def test_the_maximum_of_a_softmax_has_no_gradient() -> None:
    result = differentiate(parse_cascade(CASES["causal with empty rows"]))
    assert "dG" not in result.cascade.tensors
    assert result.saved == ("G", "O", "R")


def test_an_extreme_of_sums_that_would_be_computed_again_has_none() -> None:
    """They may round to other numbers, of which none is equal to the extreme. What only shifts needs no gradient."""
    text = "cascade c(Q[p,e], K[m,e]) -> G[p]\n  where p < 3, m < 5, e < 2\n  S[p,m] = sum(e) Q[p,e] * K[m,e]\n"
    text += "  G[p] = max(m) abs(S[p,m])\n"
    with pytest.raises(NotApplicable, match="G is an extreme of what reads S, which would be summed up again"):
        differentiate(parse_cascade(text))


def test_what_is_saved_in_half_precision() -> None:
    """The log-sum-exp alone of a row's statistics; the output before it is rounded, which gives a row's mean."""
    text = CASES["causal with empty rows"].replace("V[b,g,m,f]", "V[b,g,m,f]: bf16")
    result = differentiate(parse_cascade(text.replace("O[b,h,p,f]", "O[b,h,p,f]: bf16")))
    assert {n: result.forward.tensors[n].dtype for n in result.saved} == {"Ow": "f32", "L": "f32"}


DIFFERENTIAL = """cascade differential(Q[p,e], K[m,e], R[p,e], L[m,e], V[m,f], X[]) -> O[p,f]
  where p < P, m < M, e < 3, f < 2
  S[p,m] = sum(e) Q[p,e] * K[m,e]
  T[p,m] = sum(e) R[p,e] * L[m,e]
  G[p]   = max(m) S[p,m]
  H[p]   = max(m) T[p,m]
  Y[p]   = sum(m) exp(S[p,m] - G[p])
  Z[p]   = sum(m) exp(T[p,m] - H[p])
  O[p,f] = sum(m) (exp(S[p,m] - G[p]) / Y[p] - X[] * exp(T[p,m] - H[p]) / Z[p]) * V[m,f]"""

SINK = """cascade sink(Q[p,e], K[m,e], V[m,f], X[]) -> O[p,f]
  where p < P, m < M, e < 3, f < 2
  S[p,m] = sum(e) Q[p,e] * K[m,e]
  G[p]   = max(m) S[p,m]
  Z[p]   = sum(m) exp(S[p,m] - G[p])
  O[p,f] = sum(m) exp(S[p,m] - G[p]) * V[m,f] / (Z[p] + exp(X[] - G[p]))"""


@pytest.mark.parametrize("text", [DIFFERENTIAL, SINK], ids=["differential", "sink"])
def test_guarded_quotients_do_not_see_maxima_move(text: str) -> None:
    """Deferred: the divisions are guarded, each on its own, and a sink's is relative to the greater of two."""
    result = differentiate(scan_free(parse_cascade(text), "exact"))
    assert not any(s.reduce and s.domain.has(sympy.Eq) for s in result.cascade.body)
    assert not any("count" in s.name for s in result.cascade.body)


@pytest.mark.parametrize(
    ("name", "dtype", "saved"), [("softmax", "bf16", "L"), ("softmax", "f32", "R"), ("squared weights", "bf16", "R")]
)
def test_the_contractions_of_a_gradient_read_inputs(name: str, dtype: str, saved: str) -> None:
    """The normaliser leaves them; it joins an exponent only where it is known to be positive, and in half precision."""
    result = differentiate(parse_cascade(CASES[name].replace("V[b,g,m,f]", f"V[b,g,m,f]: {dtype}")))
    assert saved in result.saved
    inputs = {t.name for t in result.cascade.inputs}
    (product,) = [s for s in result.cascade.body if s.reduce is not None and {"p", "m"} <= set(s.output.ranks)
                  and s.name != "S"]  # fmt: skip
    assert {a.tensor for a in product.reads} <= inputs


def test_only_what_is_asked_for() -> None:
    result = differentiate(parse_cascade(CASES["softmax"]), wrt=["V"])
    assert set(result.gradients) == {"V"}
    assert "O" not in result.saved


def test_a_cascade_of_integers_has_no_gradient() -> None:
    with pytest.raises(NotApplicable, match="floating"):
        differentiate(parse_cascade("cascade c(X[n]: i64) -> Y[n]: i64\n  where n < 3\n  Y[n]: i64 = X[n] + 1\n"))
