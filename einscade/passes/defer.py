"""Defer: a factor that lacks the reduced rank leaves the reduction.

Comes in: O = sum(m) W * V / Z, where Z is itself a reduction over m. Goes out: N = sum(m) W * V, O = N / Z if Z != 0:
one pass over m less, since N no longer waits for Z. A sum of such terms is split first, (W1/Z1 - c*W2/Z2) * V into two
sums, when their factors differ. The guard keeps an empty row what it was, a sum over nothing: 0, as an output's missing
points are. What others read is there to be read: O = Where(Z != 0, N / Z, 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import sympy
from sympy.logic.boolalg import Boolean

from einscade.ir import Cascade, Einsum, Expr, Tensor, Where, accesses
from einscade.passes.existence import Existence, existence, narrowed
from einscade.passes.rewrite import NotApplicable
from einscade.passes.statements import Names, reduced_over, wide
from einscade.passes.terms import conjoin, conjuncts, depends, split_factors

__all__ = ["Defer", "guards"]


@dataclass(frozen=True)
class Defer:
    """Factors that are themselves reduced over the summed rank leave their sums."""

    name: ClassVar[str] = "defer"
    identity: ClassVar[str] = "sum(m) a * x[m] = a * sum(m) x[m]"
    exact: ClassVar[bool] = True

    def apply(self, cascade: Cascade) -> Cascade:
        over = reduced_over(cascade)
        names = Names(cascade)
        points = existence(cascade)
        body: list[Einsum] = []
        changed = False
        for statement in cascade.body:
            made = _deferred(statement, names, over, points, any(cascade.users(statement.name)))
            changed |= len(made) > 1
            body += made
        if not changed:
            raise NotApplicable("no sum has a factor that is itself reduced over the summed rank")
        return cascade.replace(body=tuple(body))


def _deferred(s: Einsum, names: Names, over: dict[str, frozenset[str]], points: Existence, read: bool) -> list[Einsum]:
    if s.reduce is None or s.reduce.monoid != "sum" or s.scan is not None:
        return [s]
    ranks = s.reduce.ranks

    def waits(factor: Expr) -> bool:
        """A factor that leaves, and for which the sum would otherwise wait a pass."""
        return not depends(factor, ranks) and any(not over[a.tensor].isdisjoint(ranks) for a in accesses(factor))

    parts: dict[Expr, list[Expr]] = {}
    for term in _terms(s.expr, waits):
        out = [f for f in sympy.Mul.make_args(term) if waits(f)]
        rest = sympy.Mul(*(f for f in sympy.Mul.make_args(term) if f not in out)) if out else term
        parts.setdefault(sympy.Mul(*out), []).append(rest)
    if set(parts) == {sympy.Integer(1)}:
        return [s]
    # A point that one term misses is missing from all: what the other terms do not say themselves, they are told.
    everywhere = conjuncts(points.of(s.expr))
    result = points.results[s.name]
    sums: list[Einsum] = []
    total: list[tuple[Boolean, Expr]] = []
    for factor, rests in parts.items():
        constant, inner = split_factors(sympy.Add(*rests), ranks)
        tensor = Tensor(names("N"), s.output.ranks, wide(s.output.dtype))
        lost = [c for c in everywhere if c not in conjuncts(points.of(inner))]
        sums.append(narrowed(Einsum(tensor, inner, s.reduce, s.domain), (), lost, result))
        total.append((conjoin(guards(factor)), constant * factor * tensor()))
    if len(total) == 1 and not read:  # an output's missing points are 0
        return [*sums, Einsum(s.output, total[0][1], domain=total[0][0])]
    return [*sums, Einsum(s.output, sympy.Add(*(Where(g, t, 0) for g, t in total)))]


def _terms(expr: Expr, waits: Callable[[Expr], bool]) -> tuple[Expr, ...]:
    """The expression as terms of a sum, multiplied out only where that frees a factor for which it waits: what has none
    stays one term, a product that emitters can contract."""
    if isinstance(expr, sympy.Add):
        return tuple(t for a in expr.args for t in _terms(a, waits))
    factors = sympy.Mul.make_args(expr)
    for factor in factors:
        if isinstance(factor, sympy.Add) and any(waits(f) for t in factor.args for f in sympy.Mul.make_args(t)):
            rest = sympy.Mul(*(f for f in factors if f is not factor))
            freed = [t for t in factor.args if _frees(t, waits)]
            kept = sympy.Add(*(t for t in factor.args if t not in freed))
            return tuple(t for a in (kept, *freed) if a != 0 for t in _terms(a * rest, waits))
    return (expr,)


def _frees(expr: Expr, waits: Callable[[Expr], bool]) -> bool:
    """Whether a factor for which the sum waits is one of the expression, or of a term in a sum that is one."""
    factors = sympy.Mul.make_args(expr)
    return any(waits(f) or (isinstance(f, sympy.Add) and any(_frees(t, waits) for t in f.args)) for f in factors)


def guards(factor: Expr) -> list[Boolean]:
    """What must not be zero for the factor to be defined: its denominators."""
    found = []
    for f in sympy.Mul.make_args(factor):
        base, exponent = f.as_base_exp()
        if exponent.is_negative and accesses(base):
            found.append(sympy.Ne(base, 0))
    return found
