"""The text form: what is printed parses back to an equal cascade, and what is no cascade says where and why."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from einscade.ir import (
    FUNCTIONS,
    Access,
    Cascade,
    CascadeError,
    Einsum,
    FloorDiv,
    Layout,
    Mod,
    ParseError,
    Rank,
    Reduction,
    Scan,
    Tensor,
    Where,
    ceil_div,
    const,
    parse_cascade,
    parse_expr,
    print_cascade,
    print_expr,
    var,
)
from tests.strategies import Case, cascades

ATTENTION = """\
cascade attention(Q[b,h,p,e]: bf16, K[b,g,m,e]: bf16, V[b,g,m,f]: bf16) -> O[b,h,p,f]: bf16
  where b < B, h < 32, g < 8, p < P, m < M, e < 128, f < 128
  S[b,h,p,m]       = sum(e) 0.125 * K[b,h // 4,m,e] * Q[b,h,p,e]   if m <= p
  G[b,h,p]         = max(m) S[b,h,p,m]
  W[b,h,p,m]       = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]         = sum(m) W[b,h,p,m]
  O[b,h,p,f]: bf16 = sum(m) V[b,h // 4,m,f] * W[b,h,p,m] / Z[b,h,p]"""

ONE_OF_EVERYTHING = """\
cascade everything(X[p,m], I[p]: i64, A[m]: bool, Y[m]: i8 quantized(bits=8, group="m:64", scales="c"), c[]: f16) -> \
O[p], I[p]: i64
  where p < P, m < M, m1 < ceil_div(M, M0) of m, m0 < M0 of m, s < 3
  R[p,m]      = Where(A[m], Max(X[p,m], 0), -oo)   if m <= p & (A[m] | m % 2 == 0) & ~(p < 3 & m != 1)
  S[p,m1,m0]  = abs(X[p,m1*M0 + m0])**3 + floor(X[p,0] / 2)   if m0 + m1*M0 < M
  G[p,m1]     = Max(L[p,m1], G[p,m1 - 1])   along m1 from -oo
  T[s,p]: i32 = topk(m -> s) X[p,m]
  B[p]: bool  = any(m) A[m] & X[p,m] < 0.5
  O[p]        = sum(m1,m0) 1 / 3 * S[p,m1,m0] * sqrt(pi)   if I[p] != 0"""


def test_it_reads_well() -> None:
    assert print_cascade(parse_cascade(ATTENTION)) == ATTENTION
    assert str(parse_cascade(ATTENTION)) == ATTENTION


def test_one_of_everything() -> None:
    text = ONE_OF_EVERYTHING.replace("  G[", "  L[p,m1] = max(m0) S[p,m1,m0]\n  G[")
    cascade = parse_cascade(text)
    assert parse_cascade(print_cascade(cascade)) == cascade
    assert cascade.inputs[3].layout == Layout("quantized", (("bits", 8), ("group", "m:64"), ("scales", "c")))
    assert cascade.rank_table["m1"] == Rank("m1", ceil_div(var("M"), var("M0")), "m")
    assert cascade.definitions["G"].scan == Scan("m1", -sympy.oo)
    assert cascade.definitions["T"].reduce == Reduction("topk", ("m",), "s")
    assert cascade.outputs == ("O", "I")


@settings(max_examples=200, deadline=None)
@given(case=cascades())
def test_random_cascades_come_back(case: Case) -> None:
    assert parse_cascade(print_cascade(case.cascade)) == case.cascade


def _numbers() -> st.SearchStrategy[sympy.Expr]:
    floats = st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: x != 0 and abs(x) > 1e-300)
    return st.one_of(
        st.integers(-9, 9).map(sympy.Integer),
        floats.map(sympy.Float),
        st.fractions(max_denominator=50).map(lambda q: sympy.Rational(q.numerator, q.denominator)),
        st.sampled_from([sympy.oo, -sympy.oo, sympy.pi, sympy.E]),
    )


Builder: TypeAlias = Callable[..., sympy.Expr]


def _built(builder: Builder, *args: sympy.Expr) -> sympy.Expr:
    """What a builder makes, or its first argument where sympy makes nothing a cascade may hold."""
    try:
        made = builder(*args)
    except (TypeError, ValueError):  # a comparison of what has no order
        return args[0]
    return made if _held(made) else args[0]


RELATIONS: tuple[Builder, ...] = (sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.Ne, sympy.Eq)
EXPONENTS = (-3, -1, 2, 3, sympy.Rational(1, 2), sympy.Rational(-3, 2), sympy.Float(0.5))
UNARY: tuple[Builder, ...] = (*FUNCTIONS.values(), *(lambda x, n=n: sympy.Pow(x, n) for n in EXPONENTS))
BINARY: tuple[Builder, ...] = (
    lambda x, y: sympy.Add(x, y),
    lambda x, y: sympy.Mul(x, y),
    lambda x, y: x - y,
    lambda x, y: sympy.Mul(x, sympy.Pow(y, -1)),
    lambda x, y: sympy.Add(x, y, evaluate=False),
    lambda x, y: sympy.Mul(x, y, evaluate=False),
    lambda x, y: sympy.Max(x, y),
    lambda x, y: sympy.Min(x, y),
)
INDEX: tuple[Builder, ...] = (
    lambda x, y: FloorDiv(x * 3 + 1, y),
    lambda x, y: ceil_div(x, y),
    lambda x, y: Access("T", Mod(x + 5, y)),
    lambda x, y: Access("T", FloorDiv(x, y) * 2 - y, Access("I", x)),
)
CHOICE: tuple[Builder, ...] = tuple(
    lambda a, b, c, r=r, join=join: Where(join(r(a, b), var("p") <= var("m")), c, a)
    for r in RELATIONS
    for join in (sympy.And, sympy.Or, lambda x, y: sympy.Not(sympy.And(x, y)))
)


def _expressions() -> st.SearchStrategy[sympy.Expr]:
    variables = st.sampled_from("pmhM").map(var)
    reads = st.tuples(st.sampled_from("QKT"), variables).map(lambda x: Access(*x))
    divisors = st.integers(1, 9).map(sympy.Integer) | variables
    leaves = st.one_of(_numbers(), variables, reads, st.builds(_built, st.sampled_from(INDEX), variables, divisors))

    def grow(inner: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Expr]:
        return st.one_of(
            st.builds(_built, st.sampled_from(UNARY), inner),
            st.builds(_built, st.sampled_from(BINARY), inner, inner),
            st.builds(_built, st.sampled_from(CHOICE), inner, inner, inner),
            st.lists(inner, min_size=3, max_size=4).map(lambda x: _built(lambda *a: sympy.Add(*a), *x)),
            st.lists(inner, min_size=3, max_size=4).map(lambda x: _built(lambda *a: sympy.Mul(*a), *x)),
        )

    return st.recursive(leaves, grow, max_leaves=8)


def _held(expr: sympy.Expr) -> bool:
    """Whether a cascade may hold it: known nodes, no complex numbers or undefined forms, doubles only."""
    known = (sympy.Add, sympy.Mul, sympy.Pow, sympy.Max, sympy.Min, FloorDiv, Mod, Where, Access, *FUNCTIONS.values())
    for node in sympy.preorder_traversal(expr):
        if node.args and isinstance(node, sympy.Expr) and not isinstance(node, known):
            return False
        if node.is_Float and (abs(node) > 1e300 or sympy.Float(float(node)) != node):
            return False
        if node in (sympy.nan, sympy.zoo, sympy.I) or isinstance(node, sympy.AccumBounds):
            return False
    return True


@settings(max_examples=300, deadline=None)
@given(expr=_expressions())
def test_random_expressions_come_back(expr: sympy.Expr) -> None:
    text = print_expr(expr)
    assert parse_expr(text) == expr, text


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (const(0.1) * var("p"), "0.1*p"),
        (sympy.Float(2.0) * var("p"), "2.0*p"),
        (1 / (1 + sympy.exp(-Access("S", var("p")))), "1 / (exp(-S[p]) + 1)"),
        (var("p") - var("m") + var("N"), "N + p - m"),
        (-(var("p") - var("m")), "m - p"),
        (FloorDiv(var("p"), FloorDiv(var("h"), 4)), "p // (h // 4)"),
        (2 * FloorDiv(var("h"), 4), "(h // 4)*2"),
        (ceil_div(var("M"), 128), "ceil_div(M, 128)"),
        (ceil_div(var("M"), var("N")) - 1, "(M - 1) // N"),
        (Access("T", Access("I", var("p")), var("m")), "T[I[p],m]"),
        (sympy.Mul(2, var("p") + 1, evaluate=False), "Mul!(2, p + 1)"),
        (Access("alpha") * 2, "2 * alpha[]"),
        (sympy.Integer(-3) ** var("p"), "(-3)**p"),
    ],
)
def test_expressions_read_well(expr: sympy.Expr, text: str) -> None:
    assert print_expr(expr) == text
    assert parse_expr(text) == expr


def test_outputs_may_be_bare_and_lend_their_type() -> None:
    bare = parse_cascade("cascade c(X[p]) -> Y\n where p < P\n Y[p]: f16 = X[p]")
    lent = parse_cascade("cascade c(X[p]) -> Y[p]: f16\n where p < P\n Y[p] = X[p]")
    assert bare == lent
    with pytest.raises(ParseError, match="output Y"):
        parse_cascade("cascade c(X[p]) -> Y[p]: f16\n where p < P\n Y[p]: bf16 = X[p]")


@pytest.mark.parametrize("body", ["", "\n  Y[]       = exp(s[])\n  Z[]: bool = Y[] < 2"])
def test_a_cascade_without_ranks(body: str) -> None:
    text = f"cascade scalar(s[]) -> s[]{body}"
    assert print_cascade(parse_cascade(text)) == text


def test_names_of_monoids_may_name_tensors_and_symbols() -> None:
    text = "cascade c(sum[p], max[p]) -> any[p]\n  where p < prod\n  any[p] = max[p] + sum[p]*prod"
    assert parse_cascade(print_cascade(parse_cascade(text))) == parse_cascade(text)


def test_comments_blank_lines_and_broken_lines() -> None:
    text = """
    # a doubling
    cascade c(
        X[p],   # the input
        Y[p]
    ) -> Z
      where p < P,
            m < M

      Z[p] = X[p] + (
        Y[p])   # the sum
    """
    assert parse_cascade(text).body[0].expr == Access("X", var("p")) + Access("Y", var("p"))


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        ("kaskade c() -> X", 1, 1, "expected 'cascade'"),
        ("cascade c(X[p] -> Y", 1, 16, r"expected '\)'"),
        ("cascade c(X[p]: f99) -> X\n where p < P", 1, 17, "expected a dtype"),
        ("cascade c(X[p]) -> Y\n where p < P\n Y[p] = X[p] +* 2", 3, 15, "expected an expression"),
        ("cascade c(X[p]) -> Y\n where p < P\n Y[p] = X[p] 2", 3, 14, "expected the end of the line"),
        ("cascade c(X[p]) -> Y\n where p < P\n Y[p] = spam(X[p])", 3, 9, "expected a function"),
        ("cascade c(X[p]) -> Y\n where p < P\n Y[p] = exp(X[p], 2)", 3, 9, "exp takes 1 arguments, not 2"),
        ("cascade c(X[p]) -> Y\n where p < P\n Y[p] = X[p] $ 2", 3, 14, r"unexpected character '\$'"),
        ("cascade c(X[p]) -> Y\n where p < P\n Y[p] = X[p] if", 3, 16, "expected an expression, found the end"),
        ("cascade c(X[p]) -> Y\n where p < P\n Y[p] = 9**9**9", 3, 12, "a power of numbers this large"),
        ("cascade c(X[p]) -> Y\n where p < P\n Y[p] = (X[p] < 2) + 1", 3, 23, "not an expression"),
    ],
)
def test_errors_show_the_place(text: str, line: int, column: int, message: str) -> None:
    with pytest.raises(ParseError, match=message) as caught:
        parse_cascade(text)
    assert (caught.value.line, caught.value.column) == (line, column)
    shown = str(caught.value).split("\n")
    assert shown[-1].index("^") - 2 == column - 1
    assert shown[-2][2:] == text.split("\n")[line - 1]


def test_a_broken_cascade_is_refused_even_if_it_parses() -> None:
    with pytest.raises(CascadeError, match="after parsing: statement Y"):
        parse_cascade("cascade c(X[p]) -> Y\n where p < P\n Y[p] = Z[p]")


def test_deep_nesting_is_an_error_not_a_crash() -> None:
    with pytest.raises(ParseError, match="nested too deeply"):
        parse_expr("(" * 100_000 + "1" + ")" * 100_000)


def test_layouts_and_origins_come_back() -> None:
    layout = Layout("paged", (("page", 16), ("table", "T")))
    cascade = Cascade(
        "paged",
        (Rank("p", var("P")), Rank("m", var("M"), "n")),
        (Tensor("T", ("m",), "i32"), Tensor("K", ("p",), "f32", layout)),
        ("O",),
        (Einsum(Tensor("O", ("p",), "f8e4m3", replace(layout, params=(("page", -1),))), Access("K", var("p"))),),
    )
    assert parse_cascade(print_cascade(cascade)) == cascade


def test_thirty_sites_take_a_moment() -> None:
    texts = [ATTENTION.replace("attention", f"site{i}").replace("0.125", f"0.{2 * i + 11}") for i in range(30)]
    start = time.perf_counter()
    for text in texts:
        assert print_cascade(parse_cascade(text)) == text
    assert time.perf_counter() - start < 30 * 0.1
