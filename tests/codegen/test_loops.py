"""Which Einsums share a loop, worked out by hand."""

from __future__ import annotations

import pytest

from einscade.codegen.loops import FlatNest, SerialNest, flat, plan
from einscade.ir.text import parse_cascade
from tests.codegen.cascades import CASES, Case, cascade

TWO_PASSES = """cascade two(x[b,m]) -> D[b]
  where b < B, m < M, m1 < ceil_div(M, M0) of m, m0 < M0 of m
  L[b,m1]    = sum(m0) x[b,m1*M0 + m0]   if m1*M0 + m0 < M
  A[b,m1]    = A[b,m1 - 1] + L[b,m1]   along m1 from 0
  mu[b]      = A[b,ceil_div(M, M0) - 1] / M
  C[b,m1]    = sum(m0) (x[b,m1*M0 + m0] - mu[b])**2   if m1*M0 + m0 < M
  V[b,m1]    = V[b,m1 - 1] + C[b,m1]   along m1 from 0
  D[b]       = V[b,ceil_div(M, M0) - 1] / M"""

UNRELATED = """cascade both(x[b,m], y[c,m]) -> S[b], T[c]
  where b < B, c < C, m < M, m1 < ceil_div(M, M0) of m, m0 < M0 of m
  X[b,m1] = sum(m0) x[b,m1*M0 + m0]   if m1*M0 + m0 < M
  A[b,m1] = A[b,m1 - 1] + X[b,m1]   along m1 from 0
  Y[c,m1] = sum(m0) y[c,m1*M0 + m0]   if m1*M0 + m0 < M
  E[c,m1] = E[c,m1 - 1] + Y[c,m1]   along m1 from 0
  S[b]    = A[b,ceil_div(M, M0) - 1]
  T[c]    = E[c,ceil_div(M, M0) - 1]"""

TWO_WIDTHS = """cascade widths(S[p,m], x[p,e], y[p,f]) -> D[m,e], E[m,f]
  where p < P, m < M, e < A, f < B, p1 < ceil_div(P, P0) of p, p0 < P0 of p
  W[p1,p0,m] = exp(S[p1*P0 + p0,m])   if p1*P0 + p0 < P
  X[m,p1,e]  = sum(p0) W[p1,p0,m] * x[p1*P0 + p0,e]
  F[m,p1,e]  = F[m,p1 - 1,e] + X[m,p1,e]   along p1 from 0
  Y[m,p1,f]  = sum(p0) W[p1,p0,m] * y[p1*P0 + p0,f]
  G[m,p1,f]  = G[m,p1 - 1,f] + Y[m,p1,f]   along p1 from 0
  D[m,e]     = F[m,ceil_div(P, P0) - 1,e]
  E[m,f]     = G[m,ceil_div(P, P0) - 1,f]"""

NO_ROW_IN_COMMON = """cascade apart(x[m], y[b,m], z[c,m]) -> S[b], T[c]
  where b < B, c < C, m < M, m1 < ceil_div(M, M0) of m, m0 < M0 of m
  W[m1,m0] = exp(x[m1*M0 + m0])   if m1*M0 + m0 < M
  X[b,m1]  = sum(m0) y[b,m1*M0 + m0] * W[m1,m0]
  A[b,m1]  = A[b,m1 - 1] + X[b,m1]   along m1 from 0
  Y[c,m1]  = sum(m0) z[c,m1*M0 + m0] * W[m1,m0]
  E[c,m1]  = E[c,m1 - 1] + Y[c,m1]   along m1 from 0
  S[b]     = A[b,ceil_div(M, M0) - 1]
  T[c]     = E[c,ceil_div(M, M0) - 1]"""


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_attention_is_one_loop_over_the_grid_of_rows(case: Case) -> None:
    _, rewritten = cascade(case)
    (nest,) = plan(rewritten).nests
    assert isinstance(nest, SerialNest)
    assert nest.grid == ("b", "h", "p")
    assert nest.outputs == ("O",)
    assert set(nest.inputs) == {t.name for t in rewritten.inputs}
    assert {e.name for e in nest.einsums} == {e.name for e in rewritten.body}


def test_a_second_pass_is_a_second_loop_that_reads_the_firsts_last_value() -> None:
    first, second = plan(parse_cascade(TWO_PASSES)).nests
    assert isinstance(first, SerialNest)
    assert isinstance(second, SerialNest)
    assert first.outputs == ("mu",)
    assert "mu" in second.inputs
    assert {e.name for e in second.scans} == {"V"}


def test_unrelated_traversals_stay_apart() -> None:
    nests = plan(parse_cascade(UNRELATED)).serial_nests
    assert [n.grid for n in nests] == [("b",), ("c",)]
    assert [n.outputs for n in nests] == [("S",), ("T",)]


def test_sums_of_different_widths_share_the_loop_that_makes_their_weights() -> None:
    (nest,) = plan(parse_cascade(TWO_WIDTHS)).nests
    assert isinstance(nest, SerialNest)
    assert nest.grid == ("m",)
    assert nest.outputs == ("D", "E")


def test_what_two_loops_both_make_is_not_stored() -> None:
    nests = plan(parse_cascade(NO_ROW_IN_COMMON)).serial_nests
    assert [n.outputs for n in nests] == [("S",), ("T",)]
    assert all("W" in {e.name for e in n.body} for n in nests)


def test_a_cascade_without_scans_is_one_flat_nest() -> None:
    plain, _ = cascade(CASES[1])
    (nest,) = plan(plain).nests
    assert isinstance(nest, FlatNest)
    assert nest.outputs == ("O",)
    assert plan(plain).nests == flat(plain).nests


def test_what_a_loop_shares_with_another_statement_is_its_last_value() -> None:
    text = TWO_PASSES.replace("mu[b]      = A[b,ceil_div(M, M0) - 1] / M", "mu[d]      = A[d,ceil_div(M, M0) - 1] / M")
    text = text.replace("mu[b]", "mu[b]").replace("where b < B,", "where b < B, d < B,")
    first, *rest = plan(parse_cascade(text)).nests
    assert isinstance(first, SerialNest)
    assert first.outputs == ("A_last",)
    assert any("A_last" in n.inputs for n in rest)
