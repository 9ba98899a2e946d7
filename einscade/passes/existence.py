"""Where the points of a cascade's Einsums exist, as predicates over their own rank variables.

Comes in: a cascade. Goes out: for every Einsum, the predicate of the points it iterates over and that of its results,
with the existence of what it reads written out ("Existence" in `ir.cascade` is what this says as predicates).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import sympy
from sympy import Basic
from sympy.logic.boolalg import And, Boolean, Not, Or

from einscade.ir.cascade import Cascade, Einsum
from einscade.ir.expr import Access, Where, free_vars
from einscade.ir.intervals import decide, rank_ranges
from einscade.passes.terms import conjuncts, reads_outside_where

__all__ = ["Existence", "existence", "lost"]


@dataclass(frozen=True)
class Existence:
    """`points`: of every Einsum, where the points that it iterates over exist; `results`: of every Einsum and input,
    where its elements do; both over rank variables, a scan's previous value taken to exist (see `ended`)."""

    cascade: Cascade
    points: Mapping[str, Boolean]
    results: Mapping[str, Boolean]

    def of(self, expr: Basic) -> Boolean:
        """Where everything exists that an expression reads; of a `Where` the branch that it takes."""
        return _exists(self.cascade, self.results, expr)

    @cached_property
    def ended(self) -> tuple[Einsum, Boolean] | None:
        """A scan with the condition under which it has a step, where some step may be missing: what reads a missing
        value is missing, so that there are no values after that. None where all scans have all steps."""
        ranges = rank_ranges(self.cascade)
        for e in self.cascade.body:
            for c in conjuncts(self.results[e.name]) if e.scan else ():
                if e.scan and e.scan.rank in free_vars(c) and decide(c, ranges) is not True:
                    return e, c
        return None


@lru_cache(maxsize=256)
def existence(cascade: Cascade) -> Existence:
    """Where the points of a verified cascade exist."""
    points: dict[str, Boolean] = {}
    results: dict[str, Boolean] = {t.name: sympy.true for t in cascade.inputs}
    for e in cascade.body:
        known = dict.fromkeys(conjuncts(e.domain), sympy.true)
        reads = (_exists(cascade, results, x).xreplace(known) for x in (*conjuncts(e.domain), e.expr))
        points[e.name] = And(e.domain, *reads)
        reduced = set(e.reduce.ranks) if e.reduce else set()
        results[e.name] = And(*(c for c in conjuncts(points[e.name]) if not free_vars(c) & reduced))
    return Existence(cascade, points, results)


def lost(read: Iterable[Access], expr: Basic, cascade: Cascade) -> tuple[Boolean, ...]:
    """What a statement that is rewritten to `expr` needs in its domain to keep its points: where that exists which it
    `read` at each of them, and reads no more, or under a condition only (`x * Where(c, y, 0) = Where(c, x * y, 0)`)."""
    gone = [a for a in read if a.tensor in cascade.definitions and a not in reads_outside_where(expr)]
    if not gone:
        return ()
    there = existence(cascade)
    known = conjuncts(there.of(expr))
    return tuple(c for a in sorted(gone, key=str) for c in conjuncts(there.of(a)) if c not in known)


def _exists(cascade: Cascade, results: Mapping[str, Boolean], expr: Basic) -> Boolean:
    """A tensor without a result yet is a scan that reads itself."""

    @cache  # a chain may read each of its links twice
    def of(expr: Basic) -> Boolean:
        parts = [of(a) for a in expr.args]
        if isinstance(expr, Where):
            return And(parts[0], _chosen(expr.args[0], *parts[1:]))
        if isinstance(expr, (And, Or)) and any(p != sympy.true for p in parts):
            deciding = expr.args if isinstance(expr, Or) else map(Not, expr.args)
            return Or(And(*parts), *map(And, parts, deciding))
        if isinstance(expr, Access) and results.get(expr.tensor, sympy.true) != sympy.true:
            parts.append(results[expr.tensor].xreplace(cascade.tensors[expr.tensor].place(expr)))
        return And(*parts)

    return of(expr)


def _chosen(condition: Boolean, yes: Boolean, no: Boolean) -> Boolean:
    """`yes` where the condition holds, else `no`, each without what the condition implies."""
    yes, no = _given(condition, yes), _given(Not(condition), no)
    return yes if yes == no else Or(And(condition, yes), And(Not(condition), no))


def _given(known: Boolean, predicate: Boolean) -> Boolean:
    return And(*(c for c in conjuncts(predicate) if c not in conjuncts(known)))
