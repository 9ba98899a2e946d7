"""The verifier: each rule broken once, by text where the text can say it, else by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
from hypothesis import given, settings

from einscade.ir import (
    Access,
    Cascade,
    CascadeError,
    Einsum,
    Layout,
    Rank,
    Reduction,
    Scan,
    Tensor,
    Where,
    parse_cascade,
    var,
    verify,
)
from tests.strategies import Case, cascades

HEAD = "cascade c(X[p,m], I[p]: i64, A[p]: bool, s[]: f32) -> Y\n  where p < P, m < M, k < 2, t < T\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("Y[p] = X[p,0]\nY[p] = X[p,1]", "tensor Y is defined twice"),
        ("X[p] = I[p]\nY[p] = I[p]", "tensor X is defined twice"),
        ("Y[p] = Z[p]", "reads Z, which is not defined before it"),
        ("Y[p] = Z[p]\nZ[p] = I[p]", "reads Z, which is not defined before it"),
        ("Y[p] = Y[p] + 1", "reads Y, which is not defined before it"),
        ("Y[p] = X[p]", "has 1 indices, X has 2 ranks"),
        ("Y[p] = X[p,m]", "rank m is not bound here"),
        ("Y[p] = X[p,0]   if m < 3", "rank m is not bound here"),
        ("Y[q] = 1", "rank q of tensor Y is not in the rank table"),
        ("Y[p,p] = 1", "rank of tensor Y p appears twice"),
        ("Y[p] = sum(q) 1", "reduced rank q is not in the rank table"),
        ("Y[p] = sum(p) X[p,0]", "rank p is reduced and in the output"),
        ("Y[p] = sum(m,m) X[p,m]", "reduced rank m appears twice"),
        ("Y[p] = any(m) X[p,m]", "any over a real expression"),
        ("Y[p]: bool = max(m) A[p]", "max over a boolean expression"),
        ("Y[p] = A[p]", "the expression is boolean, the output's dtype f32 is not"),
        ("Y[p]: bool = I[p]", "the expression is integer, the output's dtype bool is not"),
        ("Y[p]: i8 = X[p,0]", "a real expression in dtype i8; Round or Trunc it first"),
        ("Y[p] = X[p,0] + A[p]", "is boolean, a number is needed"),
        ("Y[p] = Where(X[p,0], 1, 2)", "is real, a boolean is needed"),
        ("Y[p]: bool = A[p] & X[p,0]", "is real, a boolean is needed"),
        ("Y[p]: bool = A[p] < 2", "compares a boolean with a number"),
        ("Y[p] = 1   if I[p]", "is not boolean"),
        ("Y[p] = X[X[p,0],0]", "is not an integer"),
        ("Y[p] = X[p / 2,0]", "is not an integer"),
        ("Y[p] = X[p,0] // 2", r"divides what is not an integer; use floor\(a / b\)"),
        ("Y[p,k] = topk(m -> k) X[p,m]", "topk gives indices"),
        ("Y[p]: i32 = topk(m -> k) X[p,m]", "topk needs a slot that is a rank of the output"),
        ("Y[p,t] = Y[p,t - 2]   along t from 0", "reads itself at t - 1"),
        ("Y[p,t] = Y[0,t - 1]   along t from 0", "reads itself at t - 1"),
        ("Y[p,t] = Y[p,t]   along t from 0", "reads itself at t - 1"),
        ("Y[p] = Y[p]   along t from 0", "not a rank of the output"),
        ("Y[p,t] = Y[p,t - 1]   along t from Y[p,0]", "initial value reads the scan itself"),
        ("Y[p,t] = Y[p,t - 1]   along t from t", "rank t is not bound here"),
        ("Y[p,t] = Y[p,t - 1]   along t from true", "does not fit dtype"),
        ("Y[p,t] = 1   if Y[p,t - 1] < 2   along t from 0", "domain of a scan reads the scan itself"),
        ("Z[p] = 1", "output Y is not defined"),
        ("Y[p]: f32 vague() = 1", "unknown layout 'vague'"),
        ('Y[p]: i8 quantized(scales="C") = 1', "scales='C' is not a tensor of the cascade"),
        ("Y[p]: i8 quantized(bits=8, axis=1) = 1", "sorted by name"),
        ("P[p] = 1\nY[p] = 1", "both a tensor and a rank or symbol"),
        ("p[p] = 1\nY[p] = 1", "both a tensor and a rank or symbol"),
    ],
)
def test_broken_statements(body: str, message: str) -> None:
    with pytest.raises(CascadeError, match=message):
        parse_cascade(HEAD + body)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ("p < P, p < M", "rank p appears twice"),
        ("p < P, m < p", "extent of rank m depends on the rank p"),
        ("p < P / 2", "not a nonnegative integer over symbols"),
        ("p < -1", "not a nonnegative integer over symbols"),
        ("exp < P", "'exp' cannot name a rank: it is a function"),
        ("lambda < P", "'lambda' cannot name a rank"),
    ],
)
def test_broken_rank_tables(ranks: str, message: str) -> None:
    with pytest.raises(CascadeError, match=message):
        parse_cascade(f"cascade c(s[]) -> s\n  where {ranks}\n")


p, t = var("p"), var("t")
GOOD = Einsum(Tensor("Y", ("p",)), Access("X", p))


def _cascade(*body: Einsum, **changes: object) -> Cascade:
    ranks = (Rank("p", var("P")), Rank("t", var("T")))
    return replace(Cascade("c", ranks, (Tensor("X", ("p",)),), ("Y",), body), **changes)


@pytest.mark.parametrize(
    ("cascade", "message"),
    [
        (_cascade(GOOD.replace(expr=sympy.Symbol("p"))), "has assumptions of its own"),
        (_cascade(GOOD.replace(expr=sympy.gamma(Access("X", p)))), "gamma.* is not an expression a cascade may hold"),
        (_cascade(GOOD.replace(expr=sympy.nan)), "nan .* is not an expression"),
        (_cascade(GOOD.replace(expr=sympy.Float("0.1", 40))), "is not a double"),
        (_cascade(GOOD.replace(reduce=Reduction("xor", ("t",)))), "unknown monoid 'xor'"),
        (_cascade(GOOD.replace(reduce=Reduction("sum", ()))), "sum over no ranks"),
        (_cascade(GOOD.replace(reduce=Reduction("sum", ("t",), "p"))), "only topk has a slot"),
        (_cascade(GOOD.replace(output=Tensor("Y", ("p",), "f12"))), "unknown dtype 'f12'"),
        (_cascade(GOOD.replace(output=Tensor("my tensor", ("p",)))), "'my tensor' cannot name a tensor"),
        (_cascade(GOOD, outputs=()), "has no outputs"),
        (_cascade(GOOD, outputs=("Y", "Y")), "output Y appears twice"),
        (_cascade(GOOD, name="a-b"), "'a-b' cannot name a cascade"),
        (
            _cascade(GOOD.replace(reduce=Reduction("topk", ("t",), "p"), scan=Scan("p", sympy.Integer(0)))),
            "or of a topk",
        ),
        (_cascade(GOOD.replace(output=Tensor("Y", ("p",), "f32", Layout("dense", (("a", 1.5),))))), "a=1.5"),  # type: ignore[arg-type]
        (_cascade(GOOD.replace(expr=Where(Access("X", p), 1, 2))), "a boolean is needed"),
    ],
)
def test_broken_by_hand(cascade: Cascade, message: str) -> None:
    with pytest.raises(CascadeError, match=message):
        verify(cascade)


def test_the_error_names_the_pass_and_the_statement() -> None:
    with pytest.raises(CascadeError, match=r"after online: statement Y: .*cascade c") as caught:
        verify(_cascade(GOOD.replace(expr=Access("Z", p))), where="online")
    assert (caught.value.statement, caught.value.where) == ("Y", "online")


def test_what_is_legal_passes() -> None:
    parse_cascade(
        HEAD
        + """
        K[p,k]: i32 = topk(m -> k) X[p,m]   if m <= I[p] | A[p]
        D[p,t]      = sum(m) X[p,m] * D[p,t - 1]   along t from s[]
        B[p]: bool  = all(m) X[p,m] == s[]
        R[p]: i8    = round(X[p,0] / s[])
        Y[p]        = X[K[p,0],R[p] % 3]   if B[p] == A[p] & X[p,0] != 0
        """
    )


def test_a_matrix_recurrence_may_read_its_reduced_rank() -> None:
    """The delta rule: the state of the step before, contracted with a key."""
    parse_cascade(
        """cascade delta(K[t,e]) -> S
        where t < T, d < D, e < E
        S[t,d,e] = S[t - 1,d,e] - K[t,e]   along t from 0"""
    )
    with pytest.raises(CascadeError, match="its own other ranks"):
        parse_cascade("cascade c(K[t]) -> S\n where t < T, d < D\n S[t,d] = S[t - 1,d + 1]   along t from 0")
    parse_cascade(
        "cascade c(K[t,d,j]) -> S\n where t < T, d < D, j < D\n S[t,d] = sum(j) K[t,d,j] * S[t - 1,j]   along t from 1"
    )


@settings(max_examples=50, deadline=None)
@given(case=cascades())
def test_strategies_make_verified_cascades(case: Case) -> None:
    verify(case.cascade)
