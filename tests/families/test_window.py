"""A window with a sink: tiles classified from the predicate alone, and visited accordingly by generated code."""

from __future__ import annotations

from itertools import product
from unittest import mock

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from einscade.ir import Cascade, var
from einscade.passes.defer import Defer
from einscade.passes.domains import certain, edges, possible, span
from einscade.passes.online import Loops, Online
from tests.families.cascades import (
    ATTENTION,
    WINDOW_WITH_SINK,
    apply,
    assert_same,
    cascade,
    generated,
    inputs,
    interpreted,
)

ONE_PASS = (Defer(), Online(), Loops())


def domain_of(window: int, sink: int) -> str:
    return f"m <= p & (p - m < {window} | m < {sink})"


def exists(p: int, m: int, window: int, sink: int) -> bool:
    return m <= p and (p - m < window or m < sink)


def classes(rows: range, columns: range, window: int, sink: int) -> str:
    points = [exists(p, m, window, sink) for p, m in product(rows, columns)]
    return "full" if all(points) else "partial" if any(points) else "empty"


def tiles(length: int, size: int) -> list[range]:
    return [range(lo, min(lo + size, length)) for lo in range(0, length, size)]


@given(
    length=st.integers(1, 24),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    window=st.integers(1, 12),
    sink=st.integers(0, 7),
)
@settings(max_examples=60, deadline=None)
def test_tiles_are_classified(length: int, rows: int, columns: int, window: int, sink: int) -> None:
    """No tile with a point is called empty, and none without all is called full; whole tiles of the three parts (sink,
    gap, window) are found."""
    c = cascade(ATTENTION, domain_of(window, sink))
    domain, tile = c.definitions["S"].domain, edges(r.name for r in c.ranks)
    found = possible(domain, tile), certain(domain, tile)
    for ps, ms in product(tiles(length, rows), tiles(length, columns)):
        at = {var("p_lo"): ps[0], var("p_hi"): ps[-1], var("m_lo"): ms[0], var("m_hi"): ms[-1], var("M"): length}
        maybe, full = (bool(x.xreplace({k: sympy.Integer(v) for k, v in at.items()})) for x in found)
        true = classes(ps, ms, window, sink)
        assert maybe or true == "empty"
        assert not full or true == "full"
        if true == "full" and (ms[-1] < sink or ps[-1] - ms[0] < window):
            assert full, "a tile inside the sink, or inside the window"
        if (ps[0] - ms[-1] >= window and ms[0] >= sink) or ms[0] > ps[-1]:
            assert not maybe, "a tile between sink and window, or in the future"


def test_the_gap_between_sink_and_window_is_a_hole() -> None:
    c = cascade(ATTENTION, WINDOW_WITH_SINK)
    found = span(c.definitions["S"].domain, "m", edges(r.name for r in c.ranks))
    assert not found.exact
    assert found.stop == var("p_hi") + 1


def one_pass(window: int, sink: int) -> Cascade:
    return apply(cascade(ATTENTION, domain_of(window, sink)), optional=ONE_PASS)


@pytest.mark.parametrize(("p", "m"), [(40, 40), (13, 13), (5, 17), (1, 1)])
@pytest.mark.parametrize(("window", "sink"), [(5, 2), (1, 0), (9, 9)])
def test_generated_code_agrees(p: int, m: int, window: int, sink: int) -> None:
    c = one_pass(window, sink)
    data = inputs(c, B=2, P=p, M=m)
    expected = interpreted(cascade(ATTENTION, domain_of(window, sink)), data)
    assert_same(interpreted(c, data), expected)
    assert_same(generated(c, data, tile=4, grid={"p": 8}), expected)


@pytest.mark.parametrize(("window", "sink"), [(5, 2), (12, 4), (3, 0)])
def test_generated_code_visits_the_tiles_that_are_not_empty(window: int, sink: int) -> None:
    """Two products a tile, so counting them counts the tiles."""
    length, rows, columns = 64, 8, 4
    c = one_pass(window, sink)
    data = inputs(c, B=1, P=length, M=length)
    with mock.patch("torch.matmul", wraps=torch.matmul) as products:
        generated(c, data, tile=columns, grid={"p": rows})
    pairs = product(tiles(length, rows), tiles(length, columns))
    visited = sum(classes(ps, ms, window, sink) != "empty" for ps, ms in pairs)
    assert products.call_count == 2 * visited < 2 * len(tiles(length, rows)) * len(tiles(length, columns)) / 2
