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
