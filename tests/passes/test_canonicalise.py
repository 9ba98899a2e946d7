"""Canonicalise: equal over the reals, and one form for every spelling."""

from __future__ import annotations

import time

import pytest
import torch

from einscade.ir import Access, Cascade, Where, const, var
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade, print_cascade
from einscade.ir.verify import verify
from einscade.passes.canonicalise import Canonicalise
from einscade.passes.normalise import normal
from einscade.passes.rewrite import NotApplicable
from einscade.passes.terms import LONGEST, size
from tests.passes.cascades import ALL, SIZES, assert_equal, cascade, outputs, random_inputs

HEAD = """
cascade c(Q[b,h,p,e]: f32, K[b,h,m,e]: f32, V[b,h,m,f]: f32) -> O
  where b < B, h < 4, p < P, m < M, n < M, k < M, e < 3, d < 3, f < 5
"""
DOT = "S[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e]"
OUT = "O[b,h,p,f] = sum(m) W[b,h,p,m] * V[b,h,m,f] / Z[b,h,p]"
SOFTMAX = f"""
  G[b,h,p] = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p] = sum(m) W[b,h,p,m]
  {OUT}
"""
SCALED = {
    "in the contraction": f"S[b,h,p,m] = sum(e) 0.125 * Q[b,h,p,e] * K[b,h,m,e]\n{SOFTMAX}",
    "on q": f"A[b,h,p,e] = Q[b,h,p,e] * 0.125\n  S[b,h,p,m] = sum(e) A[b,h,p,e] * K[b,h,m,e]\n{SOFTMAX}",
    "on k": f"A[b,h,m,e] = K[b,h,m,e] / 8\n  S[b,h,p,m] = sum(e) A[b,h,m,e] * Q[b,h,p,e]\n{SOFTMAX}",
    "on both": "A[b,h,p,e] = Q[b,h,p,e] * 0.35355339059327379\n  D[b,h,m,e] = K[b,h,m,e] * 0.35355339059327379\n"
    f"  S[b,h,p,m] = sum(e) A[b,h,p,e] * D[b,h,m,e]\n{SOFTMAX}",
    "on scores": f"S0[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e]\n  S[b,h,p,m] = S0[b,h,p,m] * 0.125\n{SOFTMAX}",
    "divided": f"S0[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e]\n  S[b,h,p,m] = S0[b,h,p,m] / 8\n{SOFTMAX}",
    "other rank names": "S[b,h,p,n] = sum(d) 0.125 * Q[b,h,p,d] * K[b,h,n,d]\n  G[b,h,p] = max(k) S[b,h,p,k]\n"
    f"  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])\n  Z[b,h,p] = sum(n) W[b,h,p,n]\n  {OUT}",
    "no maximum": f"S[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e] / 8\n  W[b,h,p,m] = exp(S[b,h,p,m])\n"
    f"  Z[b,h,p] = sum(m) W[b,h,p,m]\n  {OUT}",
    "base 2": f"S[b,h,p,m] = sum(e) 0.18033688011112042 * Q[b,h,p,e] * K[b,h,m,e]\n  G[b,h,p] = max(m) S[b,h,p,m]\n"
    f"  W[b,h,p,m] = 2**(S[b,h,p,m] - G[b,h,p])\n  Z[b,h,p] = sum(m) W[b,h,p,m]\n  {OUT}",
    "log-sum-exp": "S[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e] / 8\n  G[b,h,p] = max(m) S[b,h,p,m]\n"
    "  Z[b,h,p] = sum(m) exp(S[b,h,p,m] - G[b,h,p])\n  L[b,h,p] = G[b,h,p] + log(Z[b,h,p])\n"
    "  O[b,h,p,f] = sum(m) exp(S[b,h,p,m] - L[b,h,p]) * V[b,h,m,f]",
    "normalised weights": "S[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e] / 8\n  G[b,h,p] = max(m) S[b,h,p,m]\n"
    "  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])\n  Z[b,h,p] = sum(m) W[b,h,p,m]\n"
    "  A[b,h,p,m] = W[b,h,p,m] / Z[b,h,p]\n  O[b,h,p,f] = sum(m) A[b,h,p,m] * V[b,h,m,f]",
    "scores computed twice": "S[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e] / 8\n"
    "  S1[b,h,p,n] = sum(d) 0.125 * K[b,h,n,d] * Q[b,h,p,d]\n  G[b,h,p] = max(m) S[b,h,p,m]\n"
    f"  W[b,h,p,m] = exp(S1[b,h,p,m] - G[b,h,p])\n  Z[b,h,p] = sum(m) W[b,h,p,m]\n  {OUT}",
}


def masked(definition: str) -> str:
    return f"{DOT.replace('S[', 'S0[')}\n  {definition}\n{SOFTMAX}"


CAUSAL = {
    "domain": f"{DOT} if m <= p\n{SOFTMAX}",
    "choice": masked("S[b,h,p,m] = Where(m <= p, S0[b,h,p,m], -oo)"),
    "other way round": masked("S[b,h,p,m] = Where(m > p, -oo, S0[b,h,p,m])"),
    "strict": masked("S[b,h,p,m] = Where(m < p + 1, S0[b,h,p,m], -oo)"),
    "not": masked("S[b,h,p,m] = Where(~(p < m), S0[b,h,p,m], -oo)"),
    "difference": masked("S[b,h,p,m] = Where(p - m >= 0, S0[b,h,p,m], -oo)"),
    "additive": masked("S[b,h,p,m] = S0[b,h,p,m] + Where(m <= p, 0, -oo)"),
    "additive lowest": masked("S[b,h,p,m] = S0[b,h,p,m] + Where(m <= p, 0, -3.4028234663852886e38)"),
    "filled lowest": masked("S[b,h,p,m] = Where(m <= p, S0[b,h,p,m], -3.4028234663852886e38)"),
    "a number of a boolean": masked("S[b,h,p,m] = S0[b,h,p,m] + (1 - Where(m <= p, 1, 0)) * -3.4028234663852886e38"),
    "compared": masked("S[b,h,p,m] = Where(Where(m <= p, 1, 0) != 0, S0[b,h,p,m], -oo)"),
    "twice": masked("S[b,h,p,m] = Where(m <= p, S0[b,h,p,m], -oo) + Where(m > p, -oo, 0)"),
    "weights zeroed": f"{DOT}\n  G[b,h,p] = max(m) Where(m <= p, S[b,h,p,m], -oo)\n"
    "  W[b,h,p,m] = Where(m <= p, exp(S[b,h,p,m] - G[b,h,p]), 0)\n"
    f"  Z[b,h,p] = sum(m) W[b,h,p,m]\n  {OUT}",
    "weights multiplied": f"{DOT}\n  G[b,h,p] = max(m) S[b,h,p,m]\n"
    "  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p]) * Where(m <= p, 1, 0)\n"
    f"  Z[b,h,p] = sum(m) W[b,h,p,m]\n  {OUT}",
}


def canonical(c: Cascade) -> Cascade:
    try:
        after = Canonicalise().apply(c)
    except NotApplicable:
        return c
    verify(after, "canonicalise")
    return after


@pytest.mark.parametrize("name", ALL)
def test_equal_for_all_lengths(name: str) -> None:
    before = cascade(ALL[name])
    after = canonical(before)
    for m, p in [(7, 5), (1, 1), (6, 9), (0, 3), (3, 0)]:
        assert_equal(before, after, {**SIZES, "M": m, "P": p})


@pytest.mark.parametrize("name", ALL)
def test_canonical_form_is_a_fixed_point(name: str) -> None:
    after = canonical(cascade(ALL[name]))
    with pytest.raises(NotApplicable):
        Canonicalise().apply(after)


@pytest.mark.parametrize("spelling", SCALED)
def test_scaled_softmax_has_one_form(spelling: str) -> None:
    before = cascade(HEAD + "  " + SCALED[spelling])
    after = canonical(before)
    assert print_cascade(after) == print_cascade(canonical(cascade(HEAD + "  " + SCALED["in the contraction"])))
    assert_equal(before, after, SIZES)


@pytest.mark.parametrize("spelling", CAUSAL)
def test_causal_mask_has_one_form(spelling: str) -> None:
    before = cascade(HEAD + "  " + CAUSAL[spelling])
    after = canonical(before)
    assert print_cascade(after) == print_cascade(canonical(cascade(HEAD + "  " + CAUSAL["domain"])))
    assert_equal(before, after, {"B": 2, "P": 5, "M": 5})


def test_moderate_fills_are_masks_only_where_each_row_keeps_a_point() -> None:
    square = HEAD.replace("m < M", "m < P").replace("n < M, k < M, ", "")
    causal = canonical(cascade(square + "  " + masked("S[b,h,p,m] = Where(m <= p, S0[b,h,p,m], -1e9)")))
    assert causal == canonical(cascade(square + "  " + CAUSAL["domain"]))
    # The first rows of `m < p` keep nothing: torch gives them the mean of all values, and so must we.
    before = cascade(square + "  " + masked("S[b,h,p,m] = Where(m < p, S0[b,h,p,m], -1e9)"))
    after = canonical(before)
    assert "-1000000000" in print_cascade(after)
    assert_equal(before, after, {"B": 2, "P": 5})


def test_conjuncts_stay_apart_and_tensors_join_them() -> None:
    head = HEAD.replace(") -> O", ", A[b,m]: bool) -> O")
    text = masked("S[b,h,p,m] = Where(m <= p & p - m < 3 & A[b,m], S0[b,h,p,m], -oo)")
    after = canonical(cascade(head + "  " + text))
    assert sorted(map(str, after.definitions["S"].domain.args)) == ["m <= p", "mask[b,m]", "p <= m + 2"]
    # Rows that keep nothing are 0, so the reference has the conditions as its domain.
    domain = masked("S[b,h,p,m] = S0[b,h,p,m] if m <= p & p - m < 3 & A[b,m]")
    assert canonical(cascade(head + "  " + domain)) == after
    assert_equal(cascade(head + "  " + domain), after, {"B": 2, "P": 5, "M": 5})


def test_what_is_read_under_a_condition_of_its_own_is_still_made() -> None:
    """Keys and values in one tensor, as its gradient has them: each is there only where the condition holds."""
    before = cascade("""
cascade c(X[m,e]: f32, Y[m,e]: f32) -> O
  where v < 2, m < 3, e < 4, w < 4
  A[v,m,e] = X[m,e] * Y[m,e]  if 0 == v
  C[v,m,e] = X[m,e] + Y[m,e]  if 1 == v
  O[v,m,w] = Where(0 == v, A[v,m,w], 0) + Where(1 == v & X[m,w] > 0, C[v,m,w], 0)
""")
    assert_equal(before, canonical(before), {})


@pytest.mark.parametrize("row", ["Y[p] * Where(X[p] > 0, 1, 0)", "sum(f) Y[p] * F[f] * Where(X[p] > 0, 1, 0)"])
def test_points_stay_those_that_every_factor_has(row: str) -> None:
    """A factor that goes into a choice is read under its condition; where it exists, the point still does alone."""
    before = cascade(f"""
cascade c(A[p,m]: f32, B[p,m]: f32, X[p]: f32, Y[p]: f32, F[f]: f32) -> O
  where p < P, m < M, f < 3, e < 1
  S[p,m] = sum(e) A[p,m] + e  if m <= p
  D[p]   = {row}
  T[p,m] = B[p,m] + D[p] * Where(S[p,m] >= 0, 1, -1)
  O[p]   = sum(m) A[p,m] * T[p,m]
""")
    assert_equal(before, canonical(before), {"P": 5, "M": 7})


def test_the_lowest_float_stays_one() -> None:
    """A fill that is kept (each row may be masked whole by a tensor, twice) is not rounded out of float32."""
    lowest = torch.finfo(torch.float32).min
    kept = normal(Where(Access("X", var("m")) > 0, const(lowest), Access("Y", var("m"))))
    assert float(kept.args[1]) == lowest


def test_a_condition_on_the_row_leaves_the_reduction() -> None:
    head = HEAD.replace(") -> O", ", A[b,p]: bool) -> O")
    text = masked("S[b,h,p,m] = Where(A[b,p], S0[b,h,p,m], -oo)")
    after = canonical(cascade(head + "  " + text))
    inputs = random_inputs(after, SIZES)
    mask = inputs[3]
    assert not mask.all()
    (o,) = outputs(after, inputs, SIZES)
    assert (o[~mask[:, None].expand(o.shape[:-1])] == 0).all()
    q, k, v = inputs[:3]
    expected = (q @ k.mT).softmax(-1) @ v
    torch.testing.assert_close(o[mask[:, None].expand(o.shape[:-1])], expected[mask[:, None].expand(o.shape[:-1])])


def test_a_bias_keeps_its_small_difference() -> None:
    """slope * (m - p) is small where it matters; slope * m - slope * p would round."""
    head = HEAD.replace(") -> O", ", A[h]: f32) -> O")
    text = masked("S[b,h,p,m] = Where(m <= p, S0[b,h,p,m] + A[h] * (m - p), -oo)")
    after = canonical(cascade(head + "  " + text))
    assert "(m - p)" in print_cascade(after).replace("(-p + m)", "(m - p)")
    assert_equal(cascade(head + "  " + text), after, {"B": 2, "P": 5, "M": 5})


def test_names_do_not_matter() -> None:
    one = cascade(HEAD + "  " + CAUSAL["choice"])
    text = HEAD + "  " + CAUSAL["choice"]
    for old, new in (
        ("S0", "zz"),
        ("S[", "aa["),
        ("G[", "yy["),
        ("W[", "bb["),
        ("Z[", "cc["),
        ("Q", "xx"),
        ("K", "dd"),
    ):
        text = text.replace(old, new)
    other = parse_cascade(text.strip())
    assert other != one
    assert canonical(other) == canonical(one)
    assert hash(canonical(other)) == hash(canonical(one))


def test_feature_maps_stay_operands_of_their_contraction() -> None:
    text = """
    cascade linear(Q[b,p,e]: f32, K[b,m,e]: f32, V[b,m,f]: f32) -> O
      where b < B, p < P, m < M, e < 3, f < 5
      A[b,p,e] = Max(Q[b,p,e], 0) + 1
      D[b,m,e] = Max(K[b,m,e], 0) + 1
      S[b,p,m] = sum(e) A[b,p,e] * D[b,m,e] if m <= p
      Z[b,p] = sum(m) S[b,p,m]
      O[b,p,f] = sum(m) S[b,p,m] * V[b,m,f] / Z[b,p]
    """
    before = cascade(text)
    after = canonical(before)
    assert len(after.body) == 5
    assert_equal(before, after, {"B": 2, "P": 5, "M": 5})


def test_interleaved_heads_become_two_scores() -> None:
    text = """
    cascade differential(Q[b,c,p,e]: f32, K[b,c,m,e]: f32, V[b,h,m,f]: f32, A[h]: f32) -> O
      where b < B, c < 4, h < 2, p < P, m < M, e < 3, f < 5
      S[b,c,p,m] = sum(e) Q[b,c,p,e] * K[b,c,m,e]
      G[b,c,p] = max(m) S[b,c,p,m]
      W[b,c,p,m] = exp(S[b,c,p,m] - G[b,c,p])
      Z[b,c,p] = sum(m) W[b,c,p,m]
      D[b,h,p,m] = W[b,2*h,p,m] / Z[b,2*h,p] - A[h] * W[b,2*h + 1,p,m] / Z[b,2*h + 1,p]
      O[b,h,p,f] = sum(m) D[b,h,p,m] * V[b,h,m,f]
    """
    before = cascade(text)
    after = canonical(before)
    assert sum(s.reduce is not None and s.reduce.monoid == "max" for s in after.body) == 2
    assert all(len(s.output.ranks) <= 4 for s in after.body)
    assert_equal(before, after, SIZES)


def test_a_single_key_that_is_masked_leaves_no_point() -> None:
    """exp(x - x) is 1, but not where x is -oo."""
    before = cascade("""cascade c(Q[p,e], K[e], V[f], I[p]: bool) -> O[p,f]
      where p < 5, e < 3, f < 2
      S[p] = sum(e) Q[p,e] * K[e]
      A[p] = Where(I[p], -oo, S[p])
      G[p] = A[p]
      W[p] = exp(A[p] - G[p])
      Z[p] = W[p]
      O[p,f] = V[f] * W[p] / Z[p]
    """)
    (out,) = canonical(before).body
    assert (str(out.expr), str(out.domain), out.reduce) == ("X2[p]", "~mask[b]", None)


def test_a_single_key_that_is_always_masked_is_a_number() -> None:
    """A first token that may not see itself, beside a sink: -oo less -oo is 0 here, and no number in sympy."""
    before = cascade("""
cascade c(X[p]: f32, B[p]: f32) -> O
  where p < 3
  A[p] = -oo
  G[p] = A[p]
  Z[p] = exp(A[p] - G[p])
  O[p] = X[p] * exp(A[p] - Max(B[p], G[p] + log(Z[p]))) + B[p]
""")
    assert_equal(before, canonical(before), {})


def test_an_output_with_another_shift_than_its_own_maximum_stays_finite() -> None:
    """All blocks read the first one's maximum: that shift leaves, and one that keeps the sum finite takes its place."""
    before = parse_cascade("""
cascade blocks(S[p,u,m], V[u,m,f]) -> O[p,u,f], G[p,u]
  where p < 3, u < 2, m < 5, f < 2
  G[p,u]   = max(m) S[p,u,m]
  O[p,u,f] = sum(m) exp(S[p,0,m] - G[p,0]) * V[u,m,f]
""")
    after = canonical(before)
    inputs = [4000 * torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(2, 5, 2, dtype=torch.float64)]
    given = [{t.name: x for t, x in zip(c.inputs, inputs, strict=True)} for c in (before, after)]
    exact, found = (interpret(c, x, {}) for c, x in zip((before, after), given, strict=True))
    for name, other in zip(before.outputs, after.outputs, strict=True):
        assert exact[name].isfinite().all()
        torch.testing.assert_close(found[other], exact[name])


def test_a_chain_that_doubles_with_every_link_is_not_written_out() -> None:
    links = "\n".join(f"      T{i + 1}[p,m] = T{i}[p,m] + sin(T{i}[p,m])" for i in range(40))
    before = cascade(f"""
    cascade chain(Q[p,e], K[m,e], V[m,f]) -> O
      where p < P, m < M, e < 3, f < 5
      T0[p,m] = sum(e) Q[p,e] * K[m,e]
{links}
      O[p,f] = sum(m) sin(T40[p,m]) * V[m,f]
    """)
    after = canonical(before)
    assert max(size(s.expr) for s in after.body) <= LONGEST
    assert canonical(after) == after
    assert_equal(before, after, {"P": 5, "M": 7})


def test_dead_statements_and_ranks_go() -> None:
    text = HEAD + "  " + CAUSAL["domain"] + "  U[b,h,p,n] = sum(d) K[b,h,n,d] * Q[b,h,p,d]\n"
    assert canonical(cascade(text)) == canonical(cascade(HEAD + "  " + CAUSAL["domain"]))


def test_it_is_fast() -> None:
    """Well under a tenth of a second for a masked attention, whose cascade many layers share."""
    c = cascade(HEAD + "  " + CAUSAL["additive lowest"])
    canonical(c)
    start = time.perf_counter()
    Canonicalise().apply(c)
    assert time.perf_counter() - start < 0.5
