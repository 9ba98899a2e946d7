"""Tile classes, against every point of small tiles."""

from __future__ import annotations

from itertools import product

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from einscade.ir import Access, FloorDiv, Mod, var
from einscade.passes.pipeline import run
from einscade.passes.restrict import Restrict, tile_classes
from tests.passes.cascades import ATTENTION, SIZES, assert_equal, cascade

p, m, h = map(var, ("p", "m", "h"))
N, M = 11, 13
EXTENTS = {"p": sympy.Integer(N), "m": sympy.Integer(M)}

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


def number(expr: sympy.Expr, values: dict[str, int]) -> float:
    return float(expr.xreplace({var(k): sympy.Integer(v) for k, v in values.items()}))


def check(domain: sympy.Basic, serial: str, sizes: tuple[int, int]) -> None:
    other = "p" if serial == "m" else "m"
    classes = tile_classes(domain, serial, EXTENTS)
    lengths = {"p": N, "m": M}
    points = {(i, j): holds(domain, {"p": i, "m": j}) for i in range(N) for j in range(M)}

    def exists(a: int, b: int) -> bool:
        return points[(a, b) if other == "p" else (b, a)]

    for lo in range(0, lengths[other], sizes[0]):
        rows = range(lo, min(lo + sizes[0], lengths[other]))
        ends = {f"{other}_lo": rows[0], f"{other}_hi": rows[-1]}
        lower, upper = number(classes.lower, ends), number(classes.upper, ends)
        full = number(classes.full_lower, ends), number(classes.full_upper, ends)
        for x in range(lengths[serial]):
            column = [exists(row, x) for row in rows]
            assert lower <= x < upper or not any(column)
            assert all(column) or not full[0] <= x < full[1]
        for start in range(0, lengths[serial], sizes[1]):
            tile = range(start, min(start + sizes[1], lengths[serial]))
            at = {**ends, f"{serial}_lo": tile[0], f"{serial}_hi": tile[-1]}
            inside = [exists(row, x) for row, x in product(rows, tile)]
            assert holds(classes.maybe, at) or not any(inside)
            assert all(inside) or not holds(classes.full, at)


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
    classes = tile_classes(m <= p, "m", {"p": var("P"), "m": var("M")})
    low, high = var("p_lo"), var("p_hi")
    assert classes.upper == sympy.Min(var("M"), high + 1)
    assert classes.full_upper == sympy.Min(var("M"), low + 1)
    assert not classes.holes
    transposed = tile_classes(m <= p, "p", {"p": var("P"), "m": var("M")})
    assert transposed.lower == sympy.Max(0, var("m_lo"))
    assert transposed.full_lower == sympy.Max(0, var("m_hi"))


def test_a_window_with_a_sink_has_holes_that_tiles_can_skip() -> None:
    classes = tile_classes(WINDOW_AND_SINK, "m", EXTENTS)
    assert classes.holes
    skipped = {"p_lo": 9, "p_hi": 10, "m_lo": 2, "m_hi": 5}
    assert not holds(classes.maybe, skipped)
    assert number(classes.lower, skipped) == 0


def test_bounds_that_need_tensors_are_rows() -> None:
    b = var("b")
    domain = sympy.And(m <= Access("pos", b, p), Access("mask", b, m))
    classes = tile_classes(domain, "m", {"b": var("B"), "p": var("P"), "m": var("M")})
    assert [(r.monoid, r.expr) for r in classes.row_upper] == [("max", Access("pos", b, p) + 1)]
    assert [(r.monoid, r.expr) for r in classes.row_full_upper] == [("min", Access("pos", b, p) + 1)]
    assert classes.needs_check == (Access("mask", b, m),)
    assert classes.full_upper == 0


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
