"""`intervals`: every answer is compared with what happens at all points, for random expressions and extents."""

from __future__ import annotations

import itertools
import time

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from einscade.ir import FloorDiv, Mod, Where, ceil_div, var
from einscade.ir.intervals import bounds, decide, simplify
from einscade.ir.text import parse_expr, print_expr

EXTENTS = {
    "b": "B",
    "h": "H",
    "p": "P",
    "m": "M",
    "g": "8",
    "r": "4",
    "m1": "ceil_div(M, M0)",
    "m0": "M0",
    "x": "2*H*P",
}
RANGES = {name: (sympy.Integer(0), parse_expr(extent) - 1) for name, extent in EXTENTS.items()}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("(b*H + h) // H", "b"),
        ("(b*H + h) % H", "h"),
        ("((b*H + h)*P + p) // P // H", "b"),
        ("((b*H + h)*P + p) // (P*H)", "b"),
        ("((b*H + h)*P + p) // P % H", "h"),
        ("((b*H + h)*P + p) % P", "p"),
        ("(b*(M + N) + m) // (M + N)", "b"),
        ("(b*(M + N) + m) % (M + N)", "m"),
        ("(4*g + r) // 8", "g // 2"),
        ("(4*g + r) % 8", "4*(g % 2) + r"),
        ("(4*g + 5) // 4", "g + 1"),
        ("g // 4 * 4 + g % 4", "g"),
        ("x // P % H * P + x % P", "x % (H*P)"),
        ("x // P // H * H * P + x // P % H * P + x % P", "x"),
        ("h // 4 // 2", "h // 8"),
        ("(m1*M0 + m0) // M0", "m1"),
        ("x % (4*P) % (2*P)", "x % (2*P)"),
        ("Max(p, p + 3, 0)", "p + 3"),
        ("Where(m < M, m, 0)", "m"),
        ("m < M & m <= p", "m <= p"),
        ("m <= p | p < 0", "m <= p"),
        ("T[(b*H + h) // H] * 2.0", "T[b] * 2.0"),
        ("(p - m) // 4", "(p - m) // 4"),
    ],
)
def test_simplify(before: str, after: str) -> None:
    assert print_expr(simplify(parse_expr(before), RANGES)) == print_expr(parse_expr(after))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("m < M", True),
        ("m1*M0 < M", True),
        ("m1*M0 + m0 < M", None),
        ("m1*M0 + m0 < M + M0", True),
        ("m < 0", False),
        ("p + M < m", False),
        ("m == m + 1", False),
        ("p != p", False),
        ("h // 4 <= h", True),
        ("h % 4 <= h", True),
        ("p / 2 < P", True),
        ("b*H + h < B*H", True),
        ("m < M | p < m", True),
        ("m < M & p < m", None),
        ("~(m < 0)", True),
        ("mask[m]", None),
        ("m <= lengths[b]", None),
        ("m <= p", None),
    ],
)
def test_decide(text: str, answer: bool | None) -> None:
    assert decide(parse_expr(text), RANGES) is answer


def test_bounds_are_symbolic() -> None:
    assert [print_expr(e) for e in bounds(parse_expr("b*H + h"), RANGES)] == ["0", "B*H - 1"]
    assert [print_expr(e) for e in bounds(parse_expr("p - m"), RANGES)] == ["1 - M", "P - 1"]
    assert bounds(parse_expr("T[p] + p"), RANGES) == (None, None)


SIZES = st.fixed_dictionaries({"P": st.integers(1, 4), "M": st.integers(1, 5)})
SMALL_RANGES = {
    "p": (sympy.Integer(0), var("P") - 1),
    "m": (sympy.Integer(0), var("M") - 1),
    "t": (sympy.Integer(0), ceil_div(var("M"), 2) - 1),
    "u": (sympy.Integer(-1), sympy.Integer(2)),
}


def _indices() -> st.SearchStrategy[sympy.Expr]:
    leaves = st.sampled_from([*map(var, ("p", "m", "t", "u", "P", "M"))]) | st.integers(-4, 6).map(sympy.Integer)
    divisors = st.integers(1, 6).map(sympy.Integer) | st.sampled_from([var("P"), var("M"), 2 * var("M")])

    def grow(inner: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Expr]:
        pairs = st.tuples(inner, inner)
        return st.one_of(
            pairs.map(lambda x: x[0] + x[1]),
            pairs.map(lambda x: x[0] - x[1]),
            st.tuples(inner, divisors).map(lambda x: x[0] * x[1]),
            st.tuples(inner, divisors).map(lambda x: FloorDiv(*x)),
            st.tuples(inner, divisors).map(lambda x: Mod(*x)),
            st.tuples(inner, divisors, divisors).map(lambda x: x[1] * FloorDiv(x[0], x[1]) + Mod(x[0], x[1])),
            pairs.map(lambda x: sympy.Max(*x)),
            pairs.map(lambda x: sympy.Min(*x)),
            st.tuples(inner, inner, inner, inner).map(lambda x: Where(x[0] <= x[1], x[2], x[3])),
        )

    return st.recursive(leaves, grow, max_leaves=6)


def _points(sizes: dict[str, int]) -> list[dict[sympy.Expr, int]]:
    symbols = {var(n): sympy.Integer(v) for n, v in sizes.items()}
    ends = [(int(lo.xreplace(symbols)), int(hi.xreplace(symbols))) for lo, hi in SMALL_RANGES.values()]
    names = list(map(var, SMALL_RANGES))
    return [
        symbols | dict(zip(names, map(sympy.Integer, values), strict=True))
        for values in itertools.product(*(range(lo, hi + 1) for lo, hi in ends))
    ]


@settings(max_examples=150, deadline=None)
@given(expr=_indices(), sizes=SIZES)
def test_simplify_and_bounds_hold_at_every_point(expr: sympy.Expr, sizes: dict[str, int]) -> None:
    simpler = simplify(expr, SMALL_RANGES)
    lower, upper = bounds(expr, SMALL_RANGES)
    for point in _points(sizes)[::3]:
        value = expr.xreplace(point)
        assert simpler.xreplace(point) == value
        assert lower is None or lower.xreplace(point) <= value
        assert upper is None or value <= upper.xreplace(point)


@settings(max_examples=150, deadline=None)
@given(a=_indices(), b=_indices(), relation=st.sampled_from([sympy.Le, sympy.Lt, sympy.Eq, sympy.Ne]), sizes=SIZES)
def test_decide_holds_at_every_point(a: sympy.Expr, b: sympy.Expr, relation: type, sizes: dict[str, int]) -> None:
    predicate = relation(a, b)
    answer = decide(predicate, SMALL_RANGES)
    if answer is not None:
        for point in _points(sizes)[::3]:
            assert bool(predicate.xreplace(point)) is answer


def test_a_thousand_index_expressions_take_seconds_at_most() -> None:
    texts = [f"((b*H + h)*P + p) // P % H * {i + 2} + (m1*M0 + m0) // M0" for i in range(1000)]
    parsed = [parse_expr(t) for t in texts]
    start = time.perf_counter()
    for expr in parsed:
        simplify(expr, RANGES)
    assert time.perf_counter() - start < 5
