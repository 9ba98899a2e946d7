"""What a change of one tensor does to everything computed from it.

Comes in: a cascade and the affine changes `x -> scale * x + shift` made to some of its statements. Goes out: the change
of every statement that reads them, derived with sympy, or `NotApplicable` where a statement's change is not affine.
A rewrite that alters a tensor is exact when every output of the cascade comes out unchanged: that is how "softmax does
not see a shift along its rank" is found for textbook, deferred and maximum-free softmax alike, and refused for sigmoid.

A change is one of a whole fiber: its scale and shift hold none of the ranks a statement reduces. With x + c:
max(x + c) = max(x) + c, exp(x + c) = exp(c) * exp(x), sum(c * x) = c * sum(x), and what cancels, cancels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import Boolean

from einscade.ir import Access, Cascade, Einsum, Expr, Where, accesses, free_vars, var
from einscade.passes.rewrite import NotApplicable
from einscade.passes.terms import conjuncts

__all__ = ["UNCHANGED", "Change", "is_felt", "propagate"]


@dataclass(frozen=True)
class Change:
    """`x -> scale * x + shift`, over the variables of x's own ranks; neither reads a tensor of the cascade."""

    scale: Expr = sympy.S.One
    shift: Expr = sympy.S.Zero


UNCHANGED = Change()


def propagate(cascade: Cascade, changes: Mapping[str, Change]) -> dict[str, Change]:
    """The change of every tensor of the cascade, from those of some of its statements.

    Raises NotApplicable, naming the statement, where a change does not stay affine.
    """
    result = dict.fromkeys(cascade.tensors, UNCHANGED) | dict(changes)
    for statement in cascade.body:
        if statement.name not in changes:
            result[statement.name] = _change_of(statement, cascade, result)
    return result


def is_felt(cascade: Cascade, name: str, still: Iterable[str] = ()) -> bool:
    """Whether an output sees a statement move, at each of its points by an amount of its own, as far as is known.

    still: statements that are taken not to move, whatever they read.
    """
    shift = sympy.Function("shift", real=True)(*map(var, cascade.tensors[name].ranks))
    try:
        changes = propagate(cascade, {**dict.fromkeys(still, UNCHANGED), name: Change(shift=shift)})
    except NotApplicable:
        return True
    return any(changes[output] != UNCHANGED for output in cascade.outputs)


def _change_of(statement: Einsum, cascade: Cascade, changes: Mapping[str, Change]) -> Change:
    touched = [a for a in accesses(statement.expr) if changes[a.tensor] != UNCHANGED]
    in_domain = {a: _changed(a, cascade, changes) for a in accesses(statement.domain) if changes[a.tensor] != UNCHANGED}
    if not all(_same_zeros(part, in_domain) for part in conjuncts(statement.domain)):
        raise NotApplicable(f"the domain of {statement.name} reads a tensor that would change")
    if not touched:
        return UNCHANGED
    if statement.scan is not None:
        raise NotApplicable(f"{statement.name} scans a tensor that would change")
    if any(_inside_index(access, statement.expr) for access in touched):
        raise NotApplicable(f"{statement.name} indexes by a tensor that would change")
    changed = _rewritten(statement.expr, {a: _changed(a, cascade, changes) for a in touched})
    known = {a.tensor for a in touched}
    reduced = set(statement.reduce.ranks) if statement.reduce else set()
    monoid = statement.reduce.monoid if statement.reduce else None

    if not isinstance(statement.expr, sympy.Expr):
        raise NotApplicable(f"{statement.name} = {statement.expr} compares a tensor that would change")
    shift = _difference(changed, statement.expr)
    if shift == 0:
        return UNCHANGED
    if monoid != "sum" and monoid != "prod" and _holds_for_fiber(shift, known, reduced):
        return UNCHANGED if monoid == "topk" else Change(shift=shift)
    scale = sympy.powsimp(sympy.cancel(sympy.expand(changed, power_exp=True) / sympy.expand(statement.expr)))
    ordered = monoid in ("max", "min", "topk")
    if monoid != "prod" and _holds_for_fiber(scale, known, reduced) and (scale.is_positive or not ordered):
        return UNCHANGED if monoid == "topk" or scale == 1 else Change(scale=scale)
    raise NotApplicable(f"{statement.name} = {statement.expr} tells the change apart")


def _changed(access: Access, cascade: Cascade, changes: Mapping[str, Change]) -> Expr:
    change = changes[access.tensor]
    place = cascade.tensors[access.tensor].place(access)
    return change.scale.xreplace(place) * access + change.shift.xreplace(place)


def _difference(changed: Expr, original: Expr) -> Expr:
    """`changed - original`; a branch that is infinite stays so under a finite shift, so the other branch decides."""
    if isinstance(original, Where) and isinstance(changed, Where) and original.args[0] == changed.args[0]:
        _, a, b = original.args
        _, changed_a, changed_b = changed.args
        if b.is_infinite:
            return _difference(changed_a, a)
        if a.is_infinite:
            return _difference(changed_b, b)
    return sympy.expand(changed - original)


def _holds_for_fiber(change: Expr, tensors: set[str], reduced: set[str]) -> bool:
    reads = {a.tensor for a in accesses(change)}
    return not reads & tensors and not reads and not free_vars(change) & reduced


def _rewritten(expr: Expr, values: Mapping[Access, Expr]) -> Expr:
    """The expression over the changed values; a choice whose condition they do not alter keeps it."""
    if isinstance(expr, Where) and _same_zeros(expr.args[0], values):
        return Where(expr.args[0], *(_rewritten(a, values) for a in expr.args[1:]))
    if isinstance(expr, (sympy.Add, sympy.Mul)) and expr.has(Where):
        return expr.func(*(_rewritten(a, values) for a in expr.args))
    return expr.xreplace(dict(values))


def _same_zeros(condition: Boolean, values: Mapping[Access, Expr]) -> bool:
    """Whether a condition holds as before: nothing it reads changes, or it asks if something only scaled is zero."""
    if not any(a in values for a in accesses(condition)):
        return True
    if not isinstance(condition, (sympy.Ne, sympy.Eq)) or condition.args[1] != 0:
        return False
    value = condition.args[0]
    changed = sympy.expand(value.xreplace(dict(values)), power_exp=True)
    scale = sympy.cancel(changed / sympy.expand(value, power_exp=True))
    return not scale.has(Access) and bool(scale.is_nonzero)


def _inside_index(access: Access, expr: Expr) -> bool:
    return any(access in accesses(index) for other in accesses(expr) for index in other.index)
