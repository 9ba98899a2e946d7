"""Domains over tiles: how far a loop has to run, and where it needs no masks.

Comes in: a predicate over coordinates (rank variables whose range in the tile is known) and the bounds of that range
as expressions; `data`: what is known of tensors over the tile. Goes out: bounds over the *edges* of the tile, which
emitters print as code. The interval reasoning is that of `passes.restrict`; a predicate that reads tensors of which
nothing is known may always hold and is never certain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import And, Boolean, Or

from einscade.ir.expr import Access, Expr, var
from einscade.passes.restrict import NO_DATA, Data, certain, extremes, possible
from einscade.passes.terms import conjuncts

__all__ = [
    "Span",
    "certain",
    "extremes",
    "full_range",
    "implied_limit",
    "is_data_dependent",
    "possible",
    "span",
]

Ranges = Mapping[str, tuple[Expr, Expr]]
"""Inclusive bounds of each coordinate in a tile; a name that is missing is a size, the same for the whole tile."""


def is_data_dependent(predicate: Boolean) -> bool:
    return bool(predicate.has(Access))


_ORDERED = (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)


def _at_most_zero(predicate: Boolean) -> Expr | None:
    """`d` such that the comparison says `d <= 0` over the integers."""
    if not isinstance(predicate, _ORDERED):
        return None
    difference = predicate.lts - predicate.gts
    return difference + 1 if isinstance(predicate, (sympy.Lt, sympy.Gt)) else difference


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
    x = var(coordinate)
    if isinstance(predicate, And):
        parts = [span(a, coordinate, others, data) for a in predicate.args]
        return Span(
            _pick(sympy.Max, [p.start for p in parts], any),
            _pick(sympy.Min, [p.stop for p in parts], any),
            all(p.exact for p in parts),
        )
    if isinstance(predicate, Or):
        parts = [span(a, coordinate, others, data) for a in predicate.args]
        return Span(
            _pick(sympy.Min, [p.start for p in parts], all), _pick(sympy.Max, [p.stop for p in parts], all), False
        )
    if predicate == sympy.true:
        return Span(None, None, True)
    d = _at_most_zero(predicate)
    if d is None and isinstance(predicate, sympy.Eq):
        low, high = (
            span(sympy.Le(predicate.lhs, predicate.rhs), coordinate, others, data),
            span(sympy.Ge(predicate.lhs, predicate.rhs), coordinate, others, data),
        )
        return Span(
            low.start if low.start is not None else high.start, low.stop if low.stop is not None else high.stop, False
        )
    if d is None:
        return Span(None, None, False)
    slope = d.coeff(x)
    rest = d - slope * x
    if x in rest.free_symbols or slope not in (1, -1) or (e := extremes(rest, others, data)) is None:
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


def full_range(
    predicate: Boolean, coordinate: str, ranges: Ranges, data: Data = NO_DATA
) -> tuple[Expr | None, Expr | None] | None:
    """`(start, stop)` such that every point of the tile with `start <= coordinate < stop` satisfies the predicate,
    with None for a side that is unbounded; None where there is no such interval to be found."""
    others = {name: r for name, r in ranges.items() if name != coordinate}
    x = var(coordinate)
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
    d = _at_most_zero(predicate)
    if d is None:
        return None
    slope = d.coeff(x)
    rest = d - slope * x
    if x in rest.free_symbols or slope not in (1, -1) or (e := extremes(rest, others, data)) is None:
        return None
    return (None, 1 - e[1]) if slope == 1 else (e[1], None)
