"""Masks become domains: a choice whose other branch is the monoid's identity says which points are reduced.

Comes in: a cascade of reductions, its masks spelled as `Where(c, s, -oo)` within a score, as fills with a very negative
number, as products with 0 and 1. Goes out: the conditions as conjuncts of the reductions' domains; a condition on the
row alone leaves the reduction instead, `sum(m) Where(c, x, 0) = Where(c, sum(m) x, 0)`.

A finite fill up to -1e4 counts as -oo where each row provably keeps a point (`m <= p` keeps m = p): its maximum is then
no fill, and exp of the difference is 0 in every float format. A fill below half of float32's lowest also counts where
the mask is one of positions and keys, and a row that keeps none is then 0, as everywhere in a cascade. A mask of
queries (padding multiplied out) keeps its finite fill: rows of padding are what the program says, the mean of all.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy
from sympy.logic.boolalg import Boolean

from einscade.ir import MONOIDS, Access, Cascade, Einsum, Expr, Tensor, Where, accesses, var
from einscade.ir.intervals import Ranges, decide, rank_ranges
from einscade.passes.existence import deciding, existence, lost, narrowed
from einscade.passes.normalise import limit, normal, predicate
from einscade.passes.statements import Names, wide
from einscade.passes.terms import conjoin, conjuncts, depends, reads_outside_where, variables

__all__ = ["masks_to_domains"]

LOWEST = -(2.0 - 2.0**-23) * 2.0**127 / 2
MODERATE = -1e4


def masks_to_domains(cascade: Cascade) -> Cascade:
    """The cascade with every condition in its domains under which a reduced expression is the monoid's identity."""
    names = Names(cascade)
    body: list[Einsum] = []
    rows: dict[str, tuple[Einsum, Boolean, Expr]] = {}
    for s in cascade.body:
        calls: dict[Expr, Expr] = {}
        for a in accesses(s.expr):
            if a.tensor in rows:
                made, condition, identity = rows[a.tensor]
                place = made.output.place(a)
                calls[a] = Where(condition.xreplace(place), a, identity)
        if calls:
            expr = normal(s.expr.xreplace(calls))
            parts = deciding(s.expr, s.reduce.ranks if s.reduce else ())
            whole = frozenset().union(*map(reads_outside_where, parts))
            own, points = (lost(r, expr, cascade) for r in (whole, reads_outside_where(s.expr) - whole))
            s = narrowed(s.replace(expr=expr), own, points, existence(cascade).results[s.name])
        if s.reduce is None or s.reduce.monoid not in ("sum", "max", "min") or s.scan is not None:
            body.append(_as_domain(s, cascade))
            continue
        s, row = _hoisted(s, cascade)
        if row != sympy.true:
            identity = MONOIDS[s.reduce.monoid].identity if s.reduce else sympy.Integer(0)
            if s.name in cascade.outputs:
                inner = Tensor(names(f"{s.name}m"), s.output.ranks, wide(s.output.dtype))
                body.append(s.replace(output=inner))
                there = existence(cascade).results[s.name]
                body.append(_as_domain(Einsum(s.output, Where(row, inner(), identity), domain=there), cascade))
                continue
            rows[s.name] = (s, row, identity)
        body.append(s)
    return cascade.replace(body=tuple(body))


def _as_domain(s: Einsum, cascade: Cascade) -> Einsum:
    """An output's `Where(c, x, 0)` as `x if c`: its missing points are 0, but to statements that read it."""
    if s.name not in cascade.outputs or any(cascade.users(s.name)):
        return s
    while isinstance(s.expr, Where) and s.expr.args[2] == 0 and s.scan is None and s.reduce is None:
        condition, kept, _ = s.expr.args
        s = s.replace(expr=kept, domain=conjoin([*conjuncts(s.domain), *conjuncts(condition)]))
    return s


def _hoisted(s: Einsum, cascade: Cascade) -> tuple[Einsum, Boolean]:
    """The reduction with every choice that its monoid ignores in its domain, and the condition on its rows."""
    assert s.reduce is not None
    identity = MONOIDS[s.reduce.monoid].identity
    rows: list[Boolean] = []
    for _ in range(len(s.expr.atoms(Where)) + 1):
        found = _ignored(s, identity, cascade)
        if found is None:
            break
        condition, kept = found
        inside = [c for c in conjuncts(condition) if depends(c, s.reduce.ranks)]
        rows += [c for c in conjuncts(condition) if c not in inside]
        s = s.replace(expr=kept, domain=conjoin([*conjuncts(s.domain), *inside]))
    return s, conjoin(rows)


def _ignored(s: Einsum, identity: Expr, cascade: Cascade) -> tuple[Boolean, Expr] | None:
    """A condition without which all of the expression is the identity: the condition, and what is left under it. One
    choice may settle it (a masked score, whose shift is masked too), or all under the condition (a difference)."""
    choices = sorted(s.expr.atoms(Where), key=sympy.default_sort_key)
    choices.sort(key=lambda w: sum(v.has(w) for v in choices))
    same = {w.args[0]: [v for v in choices if v.args[0] == w.args[0]] for w in choices}
    for group in [*([w] for w in choices), *(g for g in same.values() if len(g) > 1)]:
        condition = group[0].args[0]
        for kept, taken, other in ((condition, 1, 2), (predicate(sympy.Not(condition)), 2, 1)):
            failing = {}
            for w in group:
                fills = _fills(w, w.args[other], s, kept, cascade)
                failing[w] = w.args[other].xreplace(dict.fromkeys(fills, -sympy.oo))
            if limit(s.expr.xreplace(failing)) == identity:
                holding = {v: v.args[taken] for v in same[condition]}
                true = dict.fromkeys((kept, *conjuncts(kept)), sympy.true)
                return kept, normal(s.expr.xreplace(holding).xreplace(true))
    return None


def _fills(choice: Expr, branch: Expr, s: Einsum, kept: Boolean, cascade: Cascade) -> tuple[Expr, ...]:
    """The numbers in a branch of a choice that count as -oo here."""
    assert s.reduce is not None
    numbers = [n for n in branch.atoms(sympy.Number) if n.is_finite and n <= MODERATE]
    if s.reduce.monoid != "sum" or not numbers:
        return ()
    conditions = [*conjuncts(s.domain), *conjuncts(kept)]
    along = _normalised(choice, s)
    if _keeps_a_point(conditions, along, cascade):
        return tuple(numbers)
    queries = _query_ranks(along, cascade)
    if any(depends(a, queries) for a in accesses(kept)):
        return ()
    return tuple(n for n in numbers if n <= LOWEST)


def _normalised(choice: Expr, s: Einsum) -> tuple[str, ...]:
    """The ranks whose points share a maximum with the choice: those that the shift in its exponent lacks. A gradient
    sums over the rows too, which says nothing of what a row keeps; without a shift, the ranks that are reduced."""
    assert s.reduce is not None
    exponents = [e.args[0] for e in s.expr.atoms(sympy.exp) if e.has(choice)]
    every = frozenset().union(*map(variables, exponents))
    shifts = [-t for e in exponents for t in sympy.Add.make_args(e) if isinstance(-t, Access)]
    rows = [variables(t) for t in shifts if variables(t) < every]
    return tuple(sorted(variables(choice) - frozenset().union(*rows))) if rows else s.reduce.ranks


def _query_ranks(reduced: tuple[str, ...], cascade: Cascade) -> frozenset[str]:
    """The ranks of what meets the reduced ranks in a contraction without having them: query positions, not heads."""
    found: set[str] = set()
    for s in cascade.body:
        if s.reduce is None or s.reduce.monoid != "sum" or not set(reduced) & set(s.output.ranks):
            continue
        operands = [f for f in sympy.Mul.make_args(s.expr) if isinstance(f, Access)]
        keys = frozenset().union(*(variables(f) for f in operands if depends(f, reduced)))
        found |= {v for f in operands if not depends(f, reduced) for v in variables(f)} - keys
    return frozenset(found)


def _keeps_a_point(conditions: Iterable[Boolean], reduced: tuple[str, ...], cascade: Cascade) -> bool:
    """Whether every row provably has a point at which all conditions hold."""
    conditions = [c for c in conditions if depends(c, reduced)]
    if len(reduced) != 1:
        return False
    rank = reduced[0]
    ranges = rank_ranges(cascade)
    m, last = var(rank), cascade.extent(rank) - 1
    candidates: dict[Expr, None] = {sympy.Integer(0): None, last: None}
    for c in conditions:
        for comparison in c.atoms(sympy.Le, sympy.Ge):
            difference = comparison.gts - comparison.lts
            slope = difference.coeff(m)
            if slope in (1, -1) and m not in (difference - slope * m).free_symbols:
                candidates[sympy.expand(-(difference - slope * m) / slope)] = None
    rows = {r: v for r, v in ranges.items() if r != rank}
    return any(
        all(_surely(c, rows) for c in (w >= 0, w <= last, *(c.xreplace({m: w}) for c in conditions)))
        for w in candidates
    )


def _surely(condition: Boolean, ranges: Ranges) -> bool:
    return condition == sympy.true or (not condition.has(Access) and decide(condition, ranges) is True)
