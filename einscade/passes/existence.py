"""Where the points of a cascade's Einsums exist, as predicates over their own rank variables.

Comes in: a cascade. Goes out: for every Einsum, the predicate of the points it iterates over and that of its results,
with the existence of what it reads written out ("Existence" in `ir.cascade` is what this says as predicates).

A condition that is free of a reduction's ranks says of its result whether it exists in two places only: in the
reduction's own domain, and in what is read there (`deciding`). Where it comes with what is read point by point, the
reduction is over nothing, and gives the identity: a rewrite that moves such a condition to the reduction itself has it
passed over (`narrowed`, `passing_over`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import sympy
from sympy import Basic
from sympy.logic.boolalg import And, Boolean, Not, Or

from einscade.ir.cascade import MONOIDS, Cascade, Einsum
from einscade.ir.expr import Access, Expr, Where, free_vars
from einscade.ir.intervals import decide, rank_ranges
from einscade.passes.terms import conjoin, conjuncts, reads_outside_where

__all__ = ["Existence", "deciding", "existence", "lost", "narrowed", "passing_over"]


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
        reduced = e.reduce.ranks if e.reduce else ()
        own = conjuncts(e.domain)
        known = dict.fromkeys(own, sympy.true)
        points[e.name] = And(*own, *(_exists(cascade, results, x).xreplace(known) for x in (*own, e.expr)))
        rows = [c for c in own if not free_vars(c) & {*reduced}]
        reads = (*rows, *deciding(e.expr, reduced))
        results[e.name] = And(*rows, *(_exists(cascade, results, x).xreplace(known) for x in reads))
    return Existence(cascade, points, results)


def deciding(expr: Basic, reduced: Iterable[str]) -> tuple[Basic, ...]:
    """The parts of a reduced expression that say whether there is a result: those free of the reduced ranks. The others
    say what is reduced."""
    if not free_vars(expr) & {*reduced}:
        return (expr,)
    if isinstance(expr, (Access, And, Or)):
        return ()
    args = expr.args[:1] if isinstance(expr, Where) else expr.args
    return tuple(part for a in args for part in deciding(a, reduced))


def passing_over(expr: Expr, conditions: Iterable[Boolean], monoid: str) -> Expr:
    """A reduced expression that is the identity where a condition fails, which a reduction passes over."""
    kept = conjoin(conditions)
    if monoid in ("any", "all"):
        return And(kept, expr) if monoid == "any" else Or(Not(kept), expr)
    return Where(kept, expr, MONOIDS[monoid].identity if monoid in MONOIDS else -sympy.oo)


def narrowed(s: Einsum, own: Iterable[Boolean], inner: Iterable[Boolean], result: Boolean) -> Einsum:
    """The statement under further conditions: its `own`, without which there is no result, and those of its points.
    `result` is where there is one."""
    domain = dict.fromkeys((*conjuncts(s.domain), *own))
    if s.reduce is None:
        return s.replace(domain=conjoin((*domain, *inner)))
    inner = dict.fromkeys(c for c in inner if c not in domain)
    moving = [c for c in inner if free_vars(c) & {*s.reduce.ranks}]
    passed = [c for c in inner if c not in moving and c not in conjuncts(result)]
    if passed:  # what decides is read under a condition now
        domain |= dict.fromkeys(conjuncts(result))
    return s.replace(expr=passing_over(s.expr, passed, s.reduce.monoid), domain=conjoin((*domain, *moving)))


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
