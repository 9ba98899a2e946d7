"""Tile classes of predicates on data: sound for any data, given its least and greatest value over the tile."""

from __future__ import annotations

import random

import pytest
import sympy

from einscade.ir import Access, Expr, FloorDiv, var
from einscade.passes.domains import Data, certain, full_range, possible, span

b, p, m = map(var, ("b", "p", "m"))
N, M, TILE = 12, 17, 4
DATA = {"D": (p,), "E": (m,), "X": (b,), "start": (p,), "there": (m,)}
D, E, X, start, there = (Access(name, *index) for name, index in DATA.items())
PREDICATES = {
    "lengths": m < X,
    "lengths and causal": sympy.And(m < X, m <= p),
    "positions": m <= start,
    "from an offset": sympy.And(m >= start, m <= p),
    "sum": m + 2 <= start + p - X,
    "documents": sympy.Eq(D, E),
    "causal documents": sympy.And(m <= p, sympy.Eq(D, E)),
    "other documents": sympy.Ne(D, E),
    "later documents": D <= FloorDiv(E, 2),
    "mask": sympy.And(m <= p, there),
    "not masked, or the diagonal": sympy.Or(sympy.Not(there), sympy.Eq(m, p)),
    "nested": sympy.And(sympy.Or(m < X, sympy.Eq(D, E)), sympy.Max(D, start) >= m),
}


def ends(name: str, values: list[int]) -> tuple[sympy.Basic, sympy.Basic]:
    if name == "there":
        return (sympy.true if all(values) else sympy.false), (sympy.true if any(values) else sympy.false)
    return sympy.Integer(min(values)), sympy.Integer(max(values))


def at(expr: sympy.Basic, data: dict[str, list[int]], i: int, j: int) -> bool:
    table: dict[Expr, sympy.Basic] = {}
    for a in (D, E, X, start, there):
        value = data[a.tensor][{"p": i, "m": j, "b": 0}[str(a.index[0])]]
        table[a] = (sympy.true if value else sympy.false) if a is there else sympy.Integer(value)
    return bool(expr.xreplace(table).xreplace({p: sympy.Integer(i), m: sympy.Integer(j)}))


@pytest.mark.parametrize("name", PREDICATES)
def test_tiles_called_empty_are_and_tiles_called_full_are(name: str) -> None:
    predicate = PREDICATES[name]
    rng = random.Random(name)
    decided = 0
    for _ in range(4):
        data = {
            "D": sorted(rng.randint(-1, 4) for _ in range(N)), "E": sorted(rng.randint(-1, 4) for _ in range(M)),
            "X": [rng.randint(-2, M + 2)], "start": [rng.randint(-3, M) for _ in range(N)],
            "there": [int(j > 6) for j in range(M)],
        }  # fmt: skip
        for p_lo in range(0, N, TILE):
            rows = range(p_lo, min(p_lo + TILE, N))
            over_rows = {a: ends(a.tensor, [data[a.tensor][i] for i in rows]) for a in (D, start)}
            over_rows[X] = ends("X", data["X"])
            tiles = {"p": (sympy.Integer(rows[0]), sympy.Integer(rows[-1]))}
            decided += check_range(predicate, data, rows, tiles, over_rows)
            for m_lo in range(0, M, TILE):
                columns = range(m_lo, min(m_lo + TILE, M))
                known = over_rows | {a: ends(a.tensor, [data[a.tensor][j] for j in columns]) for a in (E, there)}
                tile = tiles | {"m": (sympy.Integer(columns[0]), sympy.Integer(columns[-1]))}
                points = [at(predicate, data, i, j) for i in rows for j in columns]
                may, all_of_it = bool(possible(predicate, tile, known)), bool(certain(predicate, tile, known))
                assert may or not any(points)
                assert not all_of_it or all(points)
                decided += not may or all_of_it
    assert decided, "nothing was decided of any tile"


def check_range(
    predicate: sympy.Basic, data: dict[str, list[int]], rows: range, tiles: dict[str, tuple[Expr, Expr]], known: Data
) -> int:
    """The bounds of the loop, where they are closed forms: how many there were."""
    reach, full = span(predicate, "m", tiles, known), full_range(predicate, "m", tiles, known)
    for i in rows:
        for j in range(M):
            holds = at(predicate, data, i, j)
            assert not holds or ((reach.start is None or j >= reach.start) and (reach.stop is None or j < reach.stop))
            if full is not None and (full[0] is None or j >= full[0]) and (full[1] is None or j < full[1]):
                assert holds
    return (reach.start is not None) + (reach.stop is not None)


def test_data_of_which_nothing_is_known_decides_nothing() -> None:
    tile = {"p": (var("p_lo"), var("p_hi")), "m": (var("m_lo"), var("m_hi"))}
    for predicate in (m < X, sympy.Eq(D, E), there):
        assert possible(predicate, tile) == sympy.true
        assert certain(predicate, tile) == sympy.false
    assert span(m < X, "m", tile).stop is None


def test_negative_data_is_not_taken_for_nonnegative() -> None:
    least, most = sympy.Symbol("least", integer=True), sympy.Symbol("most", integer=True)
    assert possible(D >= 0, {}, {D: (least, most)}) == (most >= 0)
    assert certain(D >= 0, {}, {D: (least, most)}) == (least >= 0)
