"""Derivatives of one statement's expression.

Comes in: a statement and one of the accesses that its value is made of. Goes out: `derivative`, the slope along that
access; `outer_accesses`, which those are; and `differences`, where two of them cancel.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy
from sympy.logic.boolalg import Boolean

from einscade.ir import Access, Einsum, Expr, Where
from einscade.passes.terms import variables

__all__ = ["derivative", "differences", "outer_accesses"]


def outer_accesses(expr: Expr) -> tuple[Access, ...]:
    """The accesses that are values of the expression, not those inside an index or a condition."""
    found: dict[Access, None] = {}

    def visit(e: Expr) -> None:
        if isinstance(e, Access):
            found[e] = None
        elif not isinstance(e, (sympy.core.relational.Relational, sympy.logic.boolalg.BooleanFunction)):
            for a in e.args:
                visit(a)

    visit(expr)
    return tuple(found)


def differences(expr: Expr, roles: Mapping[str, str]) -> dict[Access, tuple[Boolean, ...]]:
    """Of accesses whose difference is all that the expression reads of a tensor: where they are two places of it. At
    one place their contributions cancel, and are large beside the rest where a decay leaves little of other points."""
    read: dict[str, list[Access]] = {}
    for access in outer_accesses(expr):
        read.setdefault(roles.get(access.tensor, access.tensor), []).append(access)
    found: dict[Access, tuple[Boolean, ...]] = {}
    for pair in read.values():
        if len(pair) != 2 or expr.xreplace({pair[0]: pair[1] + sympy.Dummy()}).has(pair[1]):
            continue
        two = [(i, k) for i, k in zip(pair[0].index, pair[1].index, strict=True) if i != k]
        if len(two) == 1 and not any(i.has(Access) for i in two[0]):
            found |= dict.fromkeys(pair, (sympy.Ne(*two[0]),))
    return found


def derivative(s: Einsum, access: Access, value: Access) -> Expr:
    """d expr / d access, written with the statement's own value where that occurs in it (exp' = exp)."""
    smooth = _smooth(s.expr)
    flat = {step: sympy.Dummy() for step in smooth.atoms(sympy.floor, sympy.ceiling, sympy.sign)}  # but for jumps
    slope = smooth.xreplace(flat).diff(access).xreplace({number: step for step, number in flat.items()})
    slope = _bounded(slope)
    if s.reduce is None and s.expr.args and not variables(s.expr).isdisjoint(s.output.ranks):
        slope = slope.xreplace({s.expr: value})
    return slope


def _bounded(slope: Expr) -> Expr:
    """The slope without an exponential over a power of a sum that has it: both overflow where the quotient does not.
    exp(a) / (c + exp(a))**n = 1 / ((c + exp(a))**(n - 1) * (1 + c*exp(-a)))."""
    if isinstance(slope, (sympy.Add, Where)):
        return slope.func(*(_bounded(a) for a in slope.args))
    if not isinstance(slope, sympy.Mul):
        return slope
    for power in slope.args:
        if not isinstance(power, sympy.Pow) or not isinstance(power.base, sympy.Add) or not power.exp.is_negative:
            continue
        number, term = power.base.as_coeff_Add()
        if term in slope.args and isinstance(term, sympy.exp) and number.is_positive and power.exp.is_Integer:
            rest = slope / (power * term)
            return rest * power * power.base / (1 + number * sympy.exp(-term.args[0]))
    return slope


def _smooth(expr: Expr) -> Expr:
    """Max, Min and abs as Where: their derivative is that of the branch taken."""
    if isinstance(expr, Access) or not expr.args:
        return expr
    args = [_smooth(a) for a in expr.args]
    if isinstance(expr, (sympy.Max, sympy.Min)):
        result = args[0]
        for a in args[1:]:
            first = sympy.Gt(result, a) if isinstance(expr, sympy.Max) else sympy.Lt(result, a)
            result = Where(first, result, a)
        return result
    if isinstance(expr, sympy.Abs):
        return Where(sympy.Ge(args[0], 0), args[0], -args[0])
    return expr.func(*args) if tuple(args) != expr.args else expr
