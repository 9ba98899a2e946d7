"""Where the points of tiles are, against every point of small tiles; the rewrite and its note."""

from __future__ import annotations

from itertools import product

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from einscade.ir import FloorDiv, Mod, var
from einscade.passes.domains import Span, certain, edges, full_range, possible, span
from einscade.passes.pipeline import run
from einscade.passes.restrict import Restrict
from tests.passes.cascades import ATTENTION, SIZES, assert_equal, cascade

p, m, h = map(var, ("p", "m", "h"))
N, M = 11, 13
TILE = edges(("p", "m"))

WINDOW_AND_SINK = sympy.And(m <= p, sympy.Or(m < 2, p - m < 3))
DOMAINS = {
    "all": sympy.true,
    "causal": m <= p,
    "shifted": m <= p + 2,
    "window": sympy.And(m <= p, p - m < 4),
    "around": sympy.And(p - m < 3, m - p < 3),
    "window and sink": WINDOW_AND_SINK,
    "blocks": sympy.Le(FloorDiv(m, 4), FloorDiv(p, 4)),
    "dilated": sympy.And(m <= p, sympy.Eq(Mod(p - m, 3), 0)),
    "rows": sympy.And(p < 5, m <= p),
    "twice": 2 * m <= p,
    "backwards": 3 * m >= 2 * p - 4,
    "prefix": sympy.Or(m <= p, m < 4),
    "apart": sympy.Ne(m, p),
    "same": sympy.Eq(m, p),
    "not": sympy.Not(sympy.And(m > p, m > 3)),
}


def holds(expr: sympy.Basic, values: dict[str, int]) -> bool:
    return bool(expr.xreplace({var(k): sympy.Integer(v) for k, v in values.items()}))


def within(x: int, bounds: tuple[sympy.Expr | None, sympy.Expr | None], values: dict[str, int]) -> bool:
    """Whether `start <= x < stop` for bounds over a tile's edges; None is unbounded."""
    start, stop = (
        None if b is None else b.xreplace({var(k): sympy.Integer(v) for k, v in values.items()}) for b in bounds
    )
    return (start is None or x >= start) and (stop is None or x < stop)


def check(domain: sympy.Basic, serial: str, sizes: tuple[int, int]) -> None:
    other = "p" if serial == "m" else "m"
    reach, full = span(domain, serial, TILE), full_range(domain, serial, TILE)
    maybe, always = possible(domain, TILE), certain(domain, TILE)
    lengths = {"p": N, "m": M}
    points = {(i, j): holds(domain, {"p": i, "m": j}) for i in range(N) for j in range(M)}

    def exists(a: int, b: int) -> bool:
        return points[(a, b) if other == "p" else (b, a)]

    for lo in range(0, lengths[other], sizes[0]):
        rows = range(lo, min(lo + sizes[0], lengths[other]))
        ends = {f"{other}_lo": rows[0], f"{other}_hi": rows[-1]}
        for x in range(lengths[serial]):
            column = [exists(row, x) for row in rows]
            assert within(x, (reach.start, reach.stop), ends) or not any(column)
            assert all(column) or full is None or not within(x, full, ends)
        for start in range(0, lengths[serial], sizes[1]):
            tile = range(start, min(start + sizes[1], lengths[serial]))
            at = {**ends, f"{serial}_lo": tile[0], f"{serial}_hi": tile[-1]}
            inside = [exists(row, x) for row, x in product(rows, tile)]
            assert holds(maybe, at) or not any(inside)
            assert all(inside) or not holds(always, at)


@pytest.mark.parametrize("serial", ["m", "p"])
@pytest.mark.parametrize("name", DOMAINS)
def test_sound_on_every_tile(name: str, serial: str) -> None:
    for sizes in [(1, 1), (2, 3), (4, 4), (16, 16)]:
        check(DOMAINS[name], serial, sizes)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_sound_on_random_domains(data: st.DataObject) -> None:
    small = st.integers(-4, 6)

    def comparison() -> sympy.Basic:
        a, b, c = (
            data.draw(st.sampled_from([1, -1, 2, -2])),
            data.draw(st.sampled_from([0, 1, -1, 2])),
            data.draw(small),
        )
        return sympy.Le(a * m + b * p, c)

    domain = sympy.And(comparison(), sympy.Or(comparison(), comparison()), comparison())
    check(domain, data.draw(st.sampled_from(["m", "p"])), (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))))


def test_causal_is_tight() -> None:
    low, high = var("p_lo"), var("p_hi")
    assert span(m <= p, "m", TILE) == Span(None, high + 1, exact=True)
    assert full_range(m <= p, "m", TILE) == (None, low + 1)
    assert span(m <= p, "p", TILE) == Span(var("m_lo"), None, exact=True)
    assert full_range(m <= p, "p", TILE) == (var("m_hi"), None)


def test_a_window_with_a_sink_has_holes_that_tiles_can_skip() -> None:
    reach = span(WINDOW_AND_SINK, "m", TILE)
    assert not reach.exact
    skipped = {"p_lo": 9, "p_hi": 10, "m_lo": 2, "m_hi": 5}
    assert not holds(possible(WINDOW_AND_SINK, TILE), skipped)
    assert within(2, (reach.start, reach.stop), skipped)


def test_the_note_says_what_no_range_does() -> None:
    def note(domain: str) -> str:
        text = ATTENTION.replace("Q[b,h,p,e]: f32,", "Q[b,h,p,e]: f32, T[b,m]: bool,", 1)
        return Restrict().note(cascade(text.replace("m <= p", domain)))

    assert note("m <= p & T[b,m]") == (
        "S: m from 0 to Min(M, p_hi + 1), nowhere known to be full, to be checked: T[b,m]"
    )
    assert note("m <= p & (m < 2 | p - m < 3)").endswith(", with holes")


def test_the_rewrite_drops_what_ranges_decide() -> None:
    text = ATTENTION.replace("if m <= p", "if m < M & m <= p & h < 4")
    before = cascade(text)
    after = Restrict().apply(before)
    assert after.definitions["S"].domain == (m <= p)
    assert_equal(before, after, SIZES)
    note = Restrict().note(after)
    assert "m from 0 to" in note
    assert "p_hi + 1" in note


def test_the_classification_is_in_the_step() -> None:
    steps = {s.name: s for s in run(cascade(ATTENTION), "exact").steps}
    assert "full from 0 to Min(M, p_lo + 1)" in steps["restrict"].note
