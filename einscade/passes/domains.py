"""Domains over tiles: whether a tile has points, whether it has nothing else, how far along a rank its points reach.

Comes in: a predicate over rank variables and the bounds of each variable in a tile; `data`: what is known of tensors
over the tile. Goes out: predicates and bounds over the *edges* of the tile, which emitters print as code. A predicate
that reads tensors of which nothing is known may always hold and is never certain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Boolean, Or

from einscade.ir.expr import Access, Expr, FloorDiv, Mod, Where, free_vars, var
from einscade.passes.terms import conjuncts, depends

__all__ = [
    "NO_DATA", "Data", "Ranges", "Span", "certain", "edges", "extremes", "full_range", "implied_limit",
    "is_data_dependent", "limits_apart", "one_limit_a_side", "possible", "span",
]  # fmt: skip

_ZERO = sympy.Integer(0)

Ranges = Mapping[str, tuple[Expr, Expr]]
"""First and last index of each rank in a tile; a name that is missing is a size, the same for the whole tile."""


def edges(ranks: Iterable[str]) -> Ranges:
    """The first and last index of each rank in a tile, `r_lo` and `r_hi`."""
    return {r: (var(f"{r}_lo"), var(f"{r}_hi")) for r in ranks}


Data = Mapping[Access, tuple[Expr | Boolean, Expr | Boolean]]
"""Least and greatest value of an access over a tile, as expressions of whatever the caller will compute; of a boolean
access, whether it holds at all points and at any. Symbols in them must not be assumed nonnegative: data need not be."""

NO_DATA: Data = MappingProxyType({})


def extremes(expr: Expr, tiles: Ranges, data: Data = NO_DATA) -> tuple[Expr, Expr] | None:
    """Least and greatest value over a tile; None for what intervals do not bound, accesses without `data` included."""
    if isinstance(expr, Access):
        return data.get(expr)
    if not depends(expr, tiles) and not expr.has(Access):
        return expr, expr
    if isinstance(expr, sympy.Symbol):
        return tiles[expr.name]
    if isinstance(expr, (sympy.Add, sympy.Max, sympy.Min)):
        parts = [extremes(a, tiles, data) for a in expr.args]
        known = [p for p in parts if p is not None]
        if len(known) < len(parts):
            return None
        return expr.func(*(p[0] for p in known)), expr.func(*(p[1] for p in known))
    if isinstance(expr, sympy.Mul):
        coefficient, rest = expr.as_coeff_Mul()
        inner = extremes(rest, tiles, data) if coefficient != 1 else None
        if inner is None:
            return None
        ends = coefficient * inner[0], coefficient * inner[1]
        return ends if coefficient > 0 else (ends[1], ends[0])
    if isinstance(expr, (FloorDiv, Mod)) and expr.args[1].is_Integer and expr.args[1] > 0:
        if isinstance(expr, Mod):
            return _ZERO, expr.args[1] - 1
        inner = extremes(expr.args[0], tiles, data)
        return None if inner is None else (FloorDiv(inner[0], expr.args[1]), FloorDiv(inner[1], expr.args[1]))
    return None


def possible(condition: Boolean, tiles: Ranges, data: Data = NO_DATA) -> Boolean:
    """False only where no point of the tile satisfies the condition."""
    return _holds(condition, tiles, data, everywhere=False)


def certain(condition: Boolean, tiles: Ranges, data: Data = NO_DATA) -> Boolean:
    """True only where every point of the tile satisfies the condition."""
    return _holds(condition, tiles, data, everywhere=True)


def _holds(condition: Boolean, tiles: Ranges, data: Data, everywhere: bool) -> Boolean:
    """Whether the condition holds at some point, or at all; what is not known of it errs to the side of a tile that is
    visited, and masked."""
    unknown = sympy.false, sympy.true
    end = 0 if everywhere else 1
    if isinstance(condition, (sympy.And, sympy.Or)):
        return condition.func(*(_holds(a, tiles, data, everywhere) for a in condition.args))
    if isinstance(condition, sympy.Not):
        return sympy.Not(_holds(condition.args[0], tiles, data, not everywhere))
    if isinstance(condition, Access):
        return data.get(condition, unknown)[end]
    difference = _nonnegative(condition)
    if difference is not None:
        ends = extremes(difference, tiles, data)
        return unknown[end] if ends is None else sympy.Ge(ends[end], 0)
    if isinstance(condition, Relational) and (ends := extremes(_gap(condition), tiles, data)) is not None:
        low, high = ends
        if isinstance(condition, sympy.Eq):
            if everywhere:
                return sympy.And(sympy.Eq(low, 0), sympy.Eq(high, 0))
            return sympy.And(sympy.Le(low, 0), sympy.Ge(high, 0))
        if everywhere:
            return sympy.Or(sympy.Gt(low, 0), sympy.Lt(high, 0))
        return sympy.Or(sympy.Ne(low, 0), sympy.Ne(high, 0))
    return condition if condition in (sympy.true, sympy.false) else unknown[end]


def _gap(condition: Relational) -> Expr:
    a, b = condition.args
    return sympy.nan if isinstance(a, Boolean) and not isinstance(a, sympy.Expr) else sympy.expand(a - b)


def _nonnegative(condition: Boolean) -> Expr | None:
    """`d` with `d >= 0` for an ordering of integers."""
    if not isinstance(condition, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
        return None
    difference = sympy.expand(condition.gts - condition.lts)
    return difference - 1 if isinstance(condition, (sympy.Lt, sympy.Gt)) else difference


def is_data_dependent(predicate: Boolean) -> bool:
    """Whether the predicate reads a tensor."""
    return bool(predicate.has(Access))


@dataclass(frozen=True)
class Span:
    """Where along a coordinate points can be: `start <= x < stop`; None is unbounded. `exact`: the bounds are all that
    the predicate asks of a tile, so that every tile they reach holds a point (as far as tiles can tell)."""

    start: Expr | None
    stop: Expr | None
    exact: bool


def span(predicate: Boolean, coordinate: str, ranges: Ranges, data: Data = NO_DATA) -> Span:
    """Bounds of the coordinate over the points of a tile of all the *other* coordinates."""
    others = {name: r for name, r in ranges.items() if name != coordinate}
    if isinstance(predicate, And):
        parts = [span(a, coordinate, others, data) for a in predicate.args]
        start, stop = _pick(sympy.Max, [p.start for p in parts], any), _pick(sympy.Min, [p.stop for p in parts], any)
        return Span(start, stop, all(p.exact for p in parts))
    if isinstance(predicate, Or):
        parts = [span(a, coordinate, others, data) for a in predicate.args]
        start, stop = _pick(sympy.Min, [p.start for p in parts], all), _pick(sympy.Max, [p.stop for p in parts], all)
        return Span(start, stop, False)
    if predicate == sympy.true:
        return Span(None, None, True)
    if isinstance(predicate, sympy.Eq):
        low, high = (
            span(compare(predicate.lhs, predicate.rhs), coordinate, others, data) for compare in (sympy.Le, sympy.Ge)
        )
        start = low.start if low.start is not None else high.start
        return Span(start, low.stop if low.stop is not None else high.stop, False)
    d = _nonnegative(predicate)
    if d is None:
        return Span(None, None, False)
    side = _side(d, coordinate)
    ends = None if side is None else extremes(side[1], others, data)
    if side is None or ends is None:
        same = not is_data_dependent(d) and not {coordinate, *others} & {s.name for s in d.free_symbols}
        return Span(None, None, same)
    # points reach as far as the rest that reaches furthest
    return Span(-ends[1], None, True) if side[0] == 1 else Span(None, ends[1] + 1, True)


def _side(d: Expr, coordinate: str) -> tuple[int, Expr] | None:
    """`(slope, rest)` where `d` is `slope * coordinate + rest`, with slope 1 or -1 and a rest free of it."""
    x = var(coordinate)
    slope = d.coeff(x)
    rest = d - slope * x
    return (int(slope), rest) if slope in (1, -1) and x not in rest.free_symbols else None


def _pick(choose: type, bounds: list[Expr | None], needed: object) -> Expr | None:
    known = [b for b in bounds if b is not None]
    if not known or (needed is all and len(known) < len(bounds)):
        return None
    return choose(*known)


def implied_limit(predicate: Boolean, coordinate: str, sizes_only: frozenset[str]) -> Expr | None:
    """`X` where the predicate includes `coordinate < X` for an X made of sizes alone."""
    for c in conjuncts(predicate):
        d = _nonnegative(c)
        side = None if d is None or d.has(Access) else _side(d, coordinate)
        if side is not None and side[0] == -1 and {s.name for s in side[1].free_symbols} <= sizes_only:
            return side[1] + 1
    return None


def one_limit_a_side(predicate: Boolean, coordinate: str) -> Boolean:
    """An equal predicate over `coordinate >= 0` that compares it at most once from each side: with the least of what it
    stays below, which is -1 where a condition without the coordinate fails, and the greatest of what it stays above.
    On a tile the limits are computed once a row and compared once a point."""
    x = var(coordinate)
    above: list[Expr] = []
    below: list[Expr] = []
    free: list[Boolean] = []
    others: list[Boolean] = []
    for c in conjuncts(predicate):
        d = _nonnegative(c)
        side = None if d is None else _side(d, coordinate)
        if coordinate not in free_vars(c):
            free.append(c)
        elif side is None:
            others.append(c)
        elif side[0] == 1:
            above.append(-side[1])
        else:
            below.append(side[1])
    if not below:
        others += free
    else:
        least = sympy.Min(*below)
        others.append(sympy.Le(x, Where(And(*free), least, -1) if free else least))
    if above:
        others.append(sympy.Ge(x, sympy.Max(*above)))
    return And(*others)


def limits_apart(predicate: Boolean, coordinate: str) -> tuple[Boolean, Boolean] | None:
    """The predicate's limit from above and that from below, where `one_limit_a_side` leaves these two and nothing else;
    None else."""
    parts = conjuncts(one_limit_a_side(predicate, coordinate))
    above = [c for c in parts if isinstance(c, sympy.Le) and c.lhs == var(coordinate)]
    below = [c for c in parts if isinstance(c, sympy.Ge) and c.lhs == var(coordinate)]
    return (above[0], below[0]) if len(above) == len(below) == 1 and len(parts) == 2 else None


def full_range(
    predicate: Boolean, coordinate: str, ranges: Ranges, data: Data = NO_DATA
) -> tuple[Expr | None, Expr | None] | None:
    """`(start, stop)` such that every point of the tile with `start <= coordinate < stop` satisfies the predicate,
    with None for a side that is unbounded; None where there is no such interval to be found."""
    if predicate == sympy.true:
        return None, None
    if isinstance(predicate, And):
        parts = [full_range(a, coordinate, ranges, data) for a in predicate.args]
        if any(p is None for p in parts):
            return None
        starts = [p[0] for p in parts if p is not None]
        stops = [p[1] for p in parts if p is not None]
        return _pick(sympy.Max, starts, any), _pick(sympy.Min, stops, any)
    if isinstance(predicate, Or):  # any one alternative will do: the one with most ends, which is the widest band
        found = [p for a in predicate.args if (p := full_range(a, coordinate, ranges, data)) is not None]
        return max(found, key=lambda p: (p[0] is not None) + (p[1] is not None), default=None)
    d = _nonnegative(predicate)
    side = None if d is None else _side(d, coordinate)
    if side is None:
        return None
    ends = extremes(side[1], {name: r for name, r in ranges.items() if name != coordinate}, data)
    if ends is None:
        return None
    return (-ends[0], None) if side[0] == 1 else (None, ends[0] + 1)
