"""Conditions on the rows of a loop: asked once, of its results, and not of each tile.

Comes in: a planned cascade and a serial nest of it. Goes out: the statements of the loop and those after it, `Placed`.

A reduction over points that a condition on its row takes away is over nothing: it gives its identity, and the row goes
on. Where all reductions of a loop share the condition, the loop does not need it: as if they had no results there,
states hold anything in such a row. After the loop a state is what it was at first where the condition fails. An output
that is missing, or 0, with such states says so as a condition of its own, with which it is not stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import Boolean

from einscade.codegen.loops import SerialNest
from einscade.ir.cascade import Cascade, Einsum
from einscade.ir.expr import Expr, Where, accesses, free_vars
from einscade.passes.existence import Existence, deciding, existence
from einscade.passes.terms import conjoin, conjuncts, reads_outside_where

__all__ = ["Placed", "apart"]


@dataclass(frozen=True)
class Placed:
    """A statement with the points that it iterates over and those of its results."""

    einsum: Einsum
    points: Boolean
    results: Boolean

    @classmethod
    def of(cls, e: Einsum, there: Existence) -> Placed:
        return cls(e, there.points[e.name], there.results[e.name])


def apart(
    cascade: Cascade, nest: SerialNest, found: Existence, tiled: Collection[str]
) -> tuple[list[Placed], list[Placed]] | None:
    """The statements of the loop and those after it, of a nest whose states are what they were after an iteration
    without points; None where no condition is asked apart. `found`: where the cascade's points exist; `tiled`: the
    ranks of its tiles."""
    reducing = [e for e in nest.body if e.reduce is not None and not {*tiled}.isdisjoint(e.reduce.ranks)]
    shared = _shared(nest, found, reducing)
    if not shared or nest.totals or any(e.name in nest.outputs for e in nest.body):
        return None
    narrow = {e.name: e.replace(domain=conjoin((*conjuncts(e.domain), *shared))) for e in reducing}
    inside = existence(cascade.replace(body=tuple(narrow.get(e.name, e) for e in cascade.body)))
    states = {e.name: e for e in nest.scans}
    missing: set[str] = set()
    after: list[Placed] = []
    rows = frozenset().union(*map(free_vars, shared))
    for e in nest.epilogue:
        reads = [a for a in (*accesses(e.expr), *accesses(e.domain)) if a.tensor in states or a.tensor in missing]
        aligned = all(rows.isdisjoint(map(str, cascade.tensors[a.tensor].place(a))) for a in reads)
        last = e.name in cascade.outputs and not any(cascade.users(e.name))
        if aligned and _is_missing(e, states, missing):
            missing.add(e.name)
            after.append(Placed.of(e, inside))
        elif aligned and last and _at_first(e.expr, states) == 0:
            after.append(Placed.of(e, inside))
        else:
            after.append(_as_at_first(Placed.of(e, found), states, shared, cascade))
    return [Placed.of(e, inside) for e in nest.body], after


def _shared(nest: SerialNest, found: Existence, reducing: list[Einsum]) -> tuple[Boolean, ...]:
    """The conditions on rows that all reductions along the tiles have, and not all as ones of their results."""
    local = {e.name for e in nest.body}
    each: list[tuple[Boolean, ...]] = []
    for e in reducing:
        assert e.reduce is not None
        inner = {nest.serial, *e.reduce.ranks}
        rows = (c for c in conjuncts(found.points[e.name]) if inner.isdisjoint(free_vars(c)))
        each.append(tuple(c for c in rows if not any(a.tensor in local for a in accesses(c))))
    own = [conjuncts(found.results[e.name]) for e in reducing]
    everywhere = (c for c in (each[0] if each else ()) if all(c in rows for rows in each))
    return tuple(c for c in everywhere if not all(c in results for results in own))


def _is_missing(e: Einsum, states: Mapping[str, Einsum], missing: Collection[str]) -> bool:
    """Whether a statement has no result where states are what they were at first."""
    reduced = e.reduce.ranks if e.reduce else ()
    read = frozenset().union(*map(reads_outside_where, deciding(e.expr, reduced)))
    guards = {sympy.Ne(a, _first(states[a.tensor])) for a in accesses(e.domain) if a.tensor in states}
    own = {c for c in conjuncts(e.domain) if free_vars(c).isdisjoint(reduced)}
    return bool(guards & own) or any(a.tensor in missing for a in read)


def _at_first(expr: Expr, states: Mapping[str, Einsum]) -> Expr:
    """An expression where states are what they were at first."""
    return expr.xreplace({a: _first(states[a.tensor]) for a in accesses(expr) if a.tensor in states})


def _as_at_first(s: Placed, states: Mapping[str, Einsum], shared: tuple[Boolean, ...], cascade: Cascade) -> Placed:
    """A statement after the loop with states as they were at first where a condition fails."""
    chosen: dict[Expr, Expr] = {}
    for a in dict.fromkeys(x for e in (s.einsum.expr, s.points, s.results) for x in accesses(e)):
        if a.tensor in states:
            place = cascade.tensors[a.tensor].place(a)
            chosen[a] = Where(conjoin(c.xreplace(place) for c in shared), a, _first(states[a.tensor]))
    expr = s.einsum.expr.xreplace(chosen)
    return Placed(s.einsum.replace(expr=expr), s.points.xreplace(chosen), s.results.xreplace(chosen))


def _first(state: Einsum) -> Expr:
    assert state.scan is not None
    return state.scan.init
