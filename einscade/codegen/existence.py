"""Where the points of a cascade's Einsums exist, as predicates over their own rank variables.

Comes in: a cascade. Goes out: for every Einsum, the predicate of the points it iterates over and that of its results,
with the existence of what it reads written out.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy
from sympy import Basic
from sympy.logic.boolalg import And, Boolean, Not, Or

from einscade.ir.cascade import Cascade
from einscade.ir.expr import Access, Where, free_vars, var
from einscade.passes.terms import conjuncts

__all__ = ["existence"]


def existence(cascade: Cascade) -> tuple[Mapping[str, Boolean], Mapping[str, Boolean]]:
    """For every Einsum, where the points that it iterates over exist, and where its result exists, both over its rank
    variables. A scan's own previous value always exists; of a `Where`, the branch that it takes has to."""
    points: dict[str, Boolean] = {}
    results: dict[str, Boolean] = {t.name: sympy.true for t in cascade.inputs}

    def exists(expr: Basic, own: str) -> Boolean:
        if isinstance(expr, Where):
            condition, yes, no = expr.args
            return And(exists(condition, own), _chosen(condition, exists(yes, own), exists(no, own)))
        parts = [exists(a, own) for a in expr.args]
        if isinstance(expr, Access) and expr.tensor != own and results[expr.tensor] != sympy.true:
            ranks = cascade.tensors[expr.tensor].ranks
            parts.append(results[expr.tensor].xreplace(dict(zip(map(var, ranks), expr.index, strict=True))))
        return And(*parts)

    for e in cascade.body:
        known = dict.fromkeys(conjuncts(e.domain), sympy.true)
        points[e.name] = And(e.domain, exists(e.expr, e.name).xreplace(known))
        reduced = set(e.reduce.ranks) if e.reduce else set()
        results[e.name] = And(*(c for c in conjuncts(points[e.name]) if not free_vars(c) & reduced))
    return points, results


def _chosen(condition: Boolean, yes: Boolean, no: Boolean) -> Boolean:
    """`yes` where the condition holds, else `no`, each without what the condition implies."""
    yes, no = _given(condition, yes), _given(Not(condition), no)
    return yes if yes == no else Or(And(condition, yes), And(Not(condition), no))


def _given(known: Boolean, predicate: Boolean) -> Boolean:
    return And(*(c for c in conjuncts(predicate) if c not in conjuncts(known)))
