"""Where the points of a cascade's Einsums exist, as predicates over their own rank variables.

Comes in: a cascade. Goes out: for every Einsum, the predicate of the points it iterates over and that of its results,
with the existence of what it reads written out.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy
from sympy.logic.boolalg import And, Boolean

from einscade.ir.cascade import Cascade
from einscade.ir.expr import accesses, free_vars, var
from einscade.passes.terms import conjuncts

__all__ = ["existence"]


def existence(cascade: Cascade) -> tuple[Mapping[str, Boolean], Mapping[str, Boolean]]:
    """For every Einsum, where the points that it iterates over exist, and where its result exists, both over its rank
    variables. A scan's own previous value always exists; reads inside a `Where`'s branches count as read."""
    points: dict[str, Boolean] = {}
    results: dict[str, Boolean] = {t.name: sympy.true for t in cascade.inputs}
    for e in cascade.body:
        parts = [e.domain]
        for a in accesses(e.expr):
            if a.tensor == e.name or results[a.tensor] == sympy.true:
                continue
            ranks = cascade.tensors[a.tensor].ranks
            parts.append(results[a.tensor].xreplace(dict(zip(map(var, ranks), a.index, strict=True))))
        points[e.name] = And(*parts)
        reduced = set(e.reduce.ranks) if e.reduce else set()
        results[e.name] = And(*(c for c in conjuncts(points[e.name]) if not free_vars(c) & reduced))
    return points, results
