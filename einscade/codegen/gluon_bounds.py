"""Which tiles of the loop a program visits, and which of them need no mask.

Comes in: the predicate over the loop's coordinate and the tile's rows. Goes out: `Bounds`, expressions for the first
and last tile that can hold a point, and for the run of tiles in between whose points all exist. A program goes through
them from the last to the first: tiles across the upper edge, full tiles, tiles across the lower edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import sympy
from sympy.logic.boolalg import And, Boolean, Or

from einscade.ir.expr import Access, Expr, FloorDiv, ceil_div, free_vars, var
from einscade.passes.domains import Ranges, extremes, span
from einscade.passes.terms import conjuncts

__all__ = ["Bounds", "bounds"]


@dataclass(frozen=True)
class Bounds:
    """Tiles `first <= t < end` can hold points; those in `full_first <= t < full_end` hold nothing else (None: no
    tile does). `upper`, `lower`: whether, beyond the one that is visited first, tiles across that edge can occur.
    `rising`: whether later rows visit more tiles."""

    first: Expr
    end: Expr
    full_first: Expr | None
    full_end: Expr | None
    upper: bool
    lower: bool
    rising: bool


@lru_cache(maxsize=256)
def bounds(predicate: Boolean, m: str, p: str, row: Expr, rows: int, step: int) -> Bounds:
    """For a tile of `rows` rows along `p` from `row` (a multiple of `rows`) and tiles of `step` along `m`."""
    ranges: Ranges = {p: (row, row + rows - 1)}
    reach = span(predicate, m, ranges)
    assert reach.stop is not None, "the limit is part of the predicate"
    first = FloorDiv(sympy.Max(reach.start, 0), sympy.Integer(step)) if reach.start is not None else sympy.Integer(0)
    end = ceil_div(sympy.Max(reach.stop, 1), sympy.Integer(step))
    edges = [_certain(c, m, p, ranges) for c in conjuncts(predicate)]
    if any(e is None for e in edges):
        return Bounds(first, end, None, None, True, True, row in reach.stop.atoms())
    starts = [e[0] for e in edges if e is not None and e[0] is not None]
    stops = [e[1] for e in edges if e is not None and e[1] is not None]
    full_first = ceil_div(sympy.Max(0, *starts), sympy.Integer(step)) if starts else sympy.Integer(0)
    full_end = FloorDiv(sympy.Max(0, sympy.Min(*stops)), sympy.Integer(step))
    last = [span(c, m, ranges).stop for c in conjuncts(predicate)]
    upper = not all(any(_within_one(s, stop, row, rows, step) for s in last if s is not None) for stop in stops)
    return Bounds(first, end, full_first, full_end, upper, bool(starts), row in reach.stop.atoms())


def _within_one(stop: Expr, full: Expr, row: Expr, rows: int, step: int) -> bool:
    """Whether at most one tile reaches from where points are certain (`full`) to where they end (`stop`)."""
    if stop == full:
        return True
    at = {row: var("row_tile") * rows}
    between = ceil_div(stop.xreplace(at), sympy.Integer(step)) - FloorDiv(full.xreplace(at), sympy.Integer(step))
    return bool(between.is_Integer and between <= 1)


def _certain(predicate: Boolean, m: str, p: str, ranges: Ranges) -> tuple[Expr | None, Expr | None] | None:
    """From where, and up to where, every row of the tile has the point; None where neither can be told. Of an Or one
    arm is enough: of several of a kind the widest, else the first."""
    if isinstance(predicate, Or):
        arms = [_certain(a, m, p, ranges) for a in predicate.args]
        known = [a for a in arms if a is not None]
        stops = [a[1] for a in known if a[0] is None]
        starts = [a[0] for a in known if a[1] is None]
        if starts:
            return sympy.Min(*starts), None
        if stops:
            return None, sympy.Max(*stops)
        return known[0] if known else None
    if isinstance(predicate, And):
        arms = [_certain(a, m, p, ranges) for a in predicate.args]
        if any(a is None for a in arms):
            return None
        starts = [a[0] for a in arms if a is not None and a[0] is not None]
        stops = [a[1] for a in arms if a is not None and a[1] is not None]
        return (sympy.Max(*starts) if starts else None), (sympy.Min(*stops) if stops else None)
    if not isinstance(predicate, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)) or predicate.has(Access):
        return None
    difference = predicate.lts - predicate.gts
    d = difference + 1 if isinstance(predicate, (sympy.Lt, sympy.Gt)) else difference
    slope = d.coeff(var(m))
    rest = d - slope * var(m)
    reach = extremes(rest, ranges)
    if m in free_vars(rest) or slope not in (1, -1) or reach is None:
        return None
    return (None, 1 - reach[1]) if slope == 1 else (reach[1], None)
