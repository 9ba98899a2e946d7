"""Domains over tiles: may a tile hold a point, must it hold all of its points, and how far does a loop have to run.

Comes in: a predicate over coordinates (rank variables whose range in the tile is known) and the bounds of that range
as expressions. Goes out: conditions and bounds over the *edges* of the tile, which emitters print as code. Interval
reasoning on affine comparisons; a predicate that reads tensors may always hold and is never certain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import And, Boolean, Not, Or

from einscade.ir.expr import Access, Expr, FloorDiv, Mod, var

__all__ = [
    "Span",
    "certain",
    "conjuncts",
    "extremes",
    "full_range",
    "implied_limit",
    "is_data_dependent",
    "possible",
    "span",
]

Ranges = Mapping[str, tuple[Expr, Expr]]
"""Inclusive bounds of each coordinate in a tile; a name that is missing is a size, the same for the whole tile."""


def conjuncts(predicate: Boolean) -> tuple[Boolean, ...]:
    return tuple(And.make_args(predicate)) if predicate != sympy.true else ()


def is_data_dependent(predicate: Boolean) -> bool:
    return bool(predicate.has(Access))


def extremes(expr: Expr, ranges: Ranges) -> tuple[Expr, Expr] | None:
    """The least and greatest value over the tile of an affine expression (floor divisions by positive constants
    allowed), or None."""
    if isinstance(expr, Access) or expr.has(Access):
        return None
    names = {s.name for s in expr.free_symbols}
    if not names & set(ranges):
        return expr, expr
    if isinstance(expr, sympy.Symbol):
        return ranges[expr.name]
    if isinstance(expr, sympy.Add):
        parts = [extremes(a, ranges) for a in expr.args]
        if any(p is None for p in parts):
            return None
        return sympy.Add(*(p[0] for p in parts if p)), sympy.Add(*(p[1] for p in parts if p))
    if isinstance(expr, sympy.Mul):
        coefficient, rest = expr.as_coeff_Mul()
        inner = extremes(rest, ranges) if coefficient != 1 else None
        if inner is None or not coefficient.is_number:
            return None
        low, high = coefficient * inner[0], coefficient * inner[1]
        return (low, high) if coefficient.is_nonnegative else (high, low)
    if isinstance(expr, FloorDiv) and expr.args[1].is_Integer and expr.args[1].is_positive:
        inner = extremes(expr.args[0], ranges)
        return None if inner is None else (FloorDiv(inner[0], expr.args[1]), FloorDiv(inner[1], expr.args[1]))
    if isinstance(expr, Mod) and expr.args[1].is_Integer and expr.args[1].is_positive:
        return sympy.Integer(0), expr.args[1] - 1
    return None


_ORDERED = (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)


def _at_most_zero(predicate: Boolean) -> Expr | None:
    """`d` such that the comparison says `d <= 0` over the integers."""
    if not isinstance(predicate, _ORDERED):
        return None
    difference = predicate.lts - predicate.gts
    return difference + 1 if isinstance(predicate, (sympy.Lt, sympy.Gt)) else difference


def possible(predicate: Boolean, ranges: Ranges) -> Boolean:
    """A condition on the tile's edges without which no point of it can satisfy the predicate."""
    if predicate in (sympy.true, sympy.false):
        return predicate
    if isinstance(predicate, And):
        return And(*(possible(a, ranges) for a in predicate.args))
    if isinstance(predicate, Or):
        return Or(*(possible(a, ranges) for a in predicate.args))
    if isinstance(predicate, Not):
        return Not(certain(predicate.args[0], ranges))
    if (d := _at_most_zero(predicate)) is not None and (e := extremes(d, ranges)) is not None:
        return sympy.Le(e[0], 0)
    if isinstance(predicate, sympy.Eq) and (e := extremes(predicate.lhs - predicate.rhs, ranges)) is not None:
        return And(sympy.Le(e[0], 0), sympy.Ge(e[1], 0))
    return sympy.true


def certain(predicate: Boolean, ranges: Ranges) -> Boolean:
    """A condition on the tile's edges with which every point of it satisfies the predicate."""
    if predicate in (sympy.true, sympy.false):
        return predicate
    if isinstance(predicate, And):
        return And(*(certain(a, ranges) for a in predicate.args))
    if isinstance(predicate, Or):
        return Or(*(certain(a, ranges) for a in predicate.args))
    if isinstance(predicate, Not):
        return Not(possible(predicate.args[0], ranges))
    if (d := _at_most_zero(predicate)) is not None and (e := extremes(d, ranges)) is not None:
        return sympy.Le(e[1], 0)
    if isinstance(predicate, sympy.Eq) and (e := extremes(predicate.lhs - predicate.rhs, ranges)) is not None:
        return And(sympy.Ge(e[0], 0), sympy.Le(e[1], 0))
    if isinstance(predicate, sympy.Ne) and (e := extremes(predicate.lhs - predicate.rhs, ranges)) is not None:
        return Or(sympy.Gt(e[0], 0), sympy.Lt(e[1], 0))
    return sympy.false


@dataclass(frozen=True)
class Span:
    """Where along a coordinate points can be: `start <= x < stop`; None is unbounded. `exact`: the bounds are all that
    the predicate asks of a tile, so that every tile they reach holds a point (as far as tiles can tell)."""

    start: Expr | None
    stop: Expr | None
    exact: bool


def span(predicate: Boolean, coordinate: str, ranges: Ranges) -> Span:
    """Bounds of the coordinate over the points of a tile of all the *other* coordinates."""
    others = {name: r for name, r in ranges.items() if name != coordinate}
    x = var(coordinate)
    if isinstance(predicate, And):
        parts = [span(a, coordinate, others) for a in predicate.args]
        return Span(
            _pick(sympy.Max, [p.start for p in parts], any),
            _pick(sympy.Min, [p.stop for p in parts], any),
            all(p.exact for p in parts),
        )
    if isinstance(predicate, Or):
        parts = [span(a, coordinate, others) for a in predicate.args]
        return Span(
            _pick(sympy.Min, [p.start for p in parts], all), _pick(sympy.Max, [p.stop for p in parts], all), False
        )
    if predicate == sympy.true:
        return Span(None, None, True)
    d = _at_most_zero(predicate)
    if d is None and isinstance(predicate, sympy.Eq):
        low, high = (
            span(sympy.Le(predicate.lhs, predicate.rhs), coordinate, others),
            span(sympy.Ge(predicate.lhs, predicate.rhs), coordinate, others),
        )
        return Span(
            low.start if low.start is not None else high.start, low.stop if low.stop is not None else high.stop, False
        )
    if d is None:
        return Span(None, None, False)
    slope = d.coeff(x)
    rest = d - slope * x
    if x in rest.free_symbols or slope not in (1, -1) or (e := extremes(rest, others)) is None:
        return Span(
            None,
            None,
            x not in d.free_symbols and not is_data_dependent(d) and not set(others) & {s.name for s in d.free_symbols},
        )
    # x + rest <= 0 reaches as far as the least rest; -x + rest <= 0 starts at the least rest
    return Span(None, 1 - e[0], True) if slope == 1 else Span(e[0], None, True)


def _pick(choose: type, bounds: list[Expr | None], needed: object) -> Expr | None:
    known = [b for b in bounds if b is not None]
    if not known or (needed is all and len(known) < len(bounds)):
        return None
    return choose(*known)


def implied_limit(predicate: Boolean, coordinate: str, sizes_only: frozenset[str]) -> Expr | None:
    """`X` where the predicate includes `coordinate < X` for an X made of sizes alone."""
    x = var(coordinate)
    for c in conjuncts(predicate):
        d = _at_most_zero(c)
        if d is None or d.has(Access) or d.coeff(x) != 1:
            continue
        rest = d - x
        if x not in rest.free_symbols and {s.name for s in rest.free_symbols} <= sizes_only:
            return 1 - rest
    return None


def full_range(predicate: Boolean, coordinate: str, ranges: Ranges) -> tuple[Expr | None, Expr | None] | None:
    """`(start, stop)` such that every point of the tile with `start <= coordinate < stop` satisfies the predicate,
    with None for a side that is unbounded; None where there is no such interval to be found."""
    others = {name: r for name, r in ranges.items() if name != coordinate}
    x = var(coordinate)
    if predicate == sympy.true:
        return None, None
    if isinstance(predicate, And):
        parts = [full_range(a, coordinate, ranges) for a in predicate.args]
        if any(p is None for p in parts):
            return None
        starts = [p[0] for p in parts if p is not None]
        stops = [p[1] for p in parts if p is not None]
        return _pick(sympy.Max, starts, any), _pick(sympy.Min, stops, any)
    if isinstance(predicate, Or):  # any one alternative will do: the one with most ends, which is the widest band
        found = [p for a in predicate.args if (p := full_range(a, coordinate, ranges)) is not None]
        return max(found, key=lambda p: (p[0] is not None) + (p[1] is not None), default=None)
    d = _at_most_zero(predicate)
    if d is None:
        return None
    slope = d.coeff(x)
    rest = d - slope * x
    if x in rest.free_symbols or slope not in (1, -1) or (e := extremes(rest, others)) is None:
        return None
    return (None, 1 - e[1]) if slope == 1 else (e[1], None)
