"""Row factors: in a gradient, what belongs to a row is computed once a row.

Comes in: the gradient of a deferred cascade, in which the division that followed the sum comes back in front of the
contractions: `dN[p,f] = dO[p,f] / Z[p] if Z[p] != 0` is contracted with the values, and multiplies the weights. Goes
out: an equal cascade whose contractions read inputs themselves:

* `sum(f) V[m,f] * (dO[p,f] * r[p]) = r[p] * sum(f) V[m,f] * dO[p,f]`: a row's factor leaves the operand, and the sum.
  Where its domain has no row, the factor is 0: what it multiplies is summed or not there at all.
* `exp(S[p,m] - G[p]) * r[p] = exp(S[p,m] - L[p])` with `L = G - log r`, where every use of the exponential has the
  factor and it is positive: the multiplication at every point joins the exponent. `L` is rounded where it is large
  (by 6e-5 at a thousand, in float32): less than half precision rounds the weights, but more than float32 does. And it
  has to hold both numbers: a row that a finite fill masks whole has G = -1e9, in which log r is lost. Where S may hold
  large numbers, or tensors added point by point that do, the exponential takes the factor in as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import sympy

from einscade.ir import Access, Cascade, Einsum, Expr, Tensor, Where, accesses, var
from einscade.ir.analysis import is_moderate
from einscade.passes.statements import Names, inlined, redirect
from einscade.passes.terms import depends, variables

__all__ = ["positive", "row_factors"]


def row_factors(cascade: Cascade, names: Names, positive: Iterable[str] = (), dtype: str = "f32") -> Cascade:
    """The cascade with both identities applied. `names` gives names to the rows' values, which are kept in `dtype`;
    `positive` are the inputs that are positive wherever a row has points, and may join an exponent."""
    rows: dict[str, Einsum] = {}
    for s in cascade.body:
        split = _scaled_input(cascade, s)
        if split is None:
            continue
        operand, factor, ranks = split
        made = Einsum(Tensor(names("R"), ranks, dtype), Where(s.domain, factor, sympy.Integer(0)))
        rows[made.name] = made
        product = s.replace(expr=operand * made.output(), domain=sympy.true)
        cascade = _replaced(cascade, s.name, product, made)
        same = {factor: made.output()}  # the factor elsewhere: rows without points aside, it is the same
        cascade = cascade.replace(
            body=tuple(x if x is made else x.replace(expr=x.expr.xreplace(same)) for x in cascade.body)
        )
    if rows:
        cascade = _leave_sums(cascade, rows)
        cascade = _join_exponents(cascade, rows, frozenset(positive), names)
    return cascade


def positive(cascade: Cascade) -> frozenset[str]:
    """The statements whose values are positive where any point enters them: exponentials, their sums and products."""
    found: set[str] = set()

    def holds(expr: Expr) -> bool:
        if isinstance(expr, Access):
            return expr.tensor in found
        if isinstance(expr, (sympy.Add, sympy.Mul)):
            return all(map(holds, expr.args))
        return bool(isinstance(expr, sympy.exp) or (expr.is_number and expr.is_positive))

    for s in cascade.body:
        if s.scan is None and (s.reduce is None or s.reduce.monoid in ("sum", "max")) and holds(s.expr):
            found.add(s.name)
    return frozenset(found)


def _scaled_input(cascade: Cascade, s: Einsum) -> tuple[Access, Expr, tuple[str, ...]] | None:
    """Of a statement that is an input times a factor with fewer ranks, under a condition on those: all three."""
    if s.reduce is not None or s.scan is not None or s.name in cascade.outputs:
        return None
    inputs = {t.name for t in cascade.inputs}
    own = tuple(map(var, s.output.ranks))
    parts = sympy.Mul.make_args(s.expr)
    operands = [x for x in parts if isinstance(x, Access) and x.tensor in inputs and x.index == own]
    if len(operands) != 1:
        return None
    factor = sympy.Mul(*(x for x in parts if x is not operands[0]))
    ranks = tuple(r for r in s.output.ranks if depends(factor, (r,)) or depends(s.domain, (r,)))
    linear = all(_is_linear(u, s.name) for u in cascade.users(s.name))
    return (operands[0], factor, ranks) if linear and ranks and ranks != s.output.ranks and accesses(factor) else None


def _is_linear(user: Einsum, name: str) -> bool:
    """Whether a sum has the tensor as one factor: points where it is 0 then count as those where it is not."""
    read = [a for a in user.reads if a.tensor == name]
    if user.reduce is None or user.reduce.monoid != "sum" or len(read) != 1 or read[0] in accesses(user.domain):
        return False
    return read[0] in sympy.Mul.make_args(user.expr)


def _replaced(cascade: Cascade, name: str, made: Einsum, before: Einsum) -> Cascade:
    """The cascade without a statement: its readers have what it is in its place; `before` comes where it was."""
    body = [
        before if s.name == name else redirect(s, lambda a: inlined(a, made) if a.tensor == name else a)
        for s in cascade.body
    ]
    return cascade.replace(body=tuple(body))


def _leave_sums(cascade: Cascade, rows: Iterable[str]) -> Cascade:
    """Row factors out of the sums over other ranks, into what reads those."""
    for s in cascade.body:
        s = cascade.definitions[s.name]
        if s.reduce is None or s.reduce.monoid != "sum" or s.scan is not None or s.name in cascade.outputs:
            continue
        leave = [
            x
            for x in sympy.Mul.make_args(s.expr)
            if isinstance(x, Access) and x.tensor in rows and not depends(x, s.reduce.ranks)
        ]
        factor = sympy.Mul(*leave)
        if leave and not any(a.tensor == s.name for u in cascade.users(s.name) for a in accesses(u.domain)):
            rest = s.replace(expr=s.expr / factor)
            scaled = s.replace(expr=s.output() * factor, reduce=None)
            body = [
                rest
                if x.name == s.name
                else redirect(x, lambda a, s=s, scaled=scaled: inlined(a, scaled) if a.tensor == s.name else a)  # type: ignore[misc]
                for x in cascade.body
            ]
            cascade = cascade.replace(body=tuple(body))
    return cascade


def _join_exponents(cascade: Cascade, rows: dict[str, Einsum], positive: frozenset[str], names: Names) -> Cascade:
    for row in rows.values():
        cascade = _merged(cascade, row.name)
        for s in cascade.body:
            if isinstance(s.expr, sympy.exp) and s.reduce is None and s.name not in cascade.outputs:
                cascade = _joined(cascade, s, row, positive, names)
    return cascade


def _merged(cascade: Cascade, row: str) -> Cascade:
    """Pointwise statements that read the row factor, in the place of their only reader: the factor becomes common."""
    for s in reversed(cascade.body):
        s = cascade.definitions[s.name]
        users = [u for u in cascade.body if any(a.tensor == s.name for a in u.reads)]
        if s.reduce is None and s.scan is None and s.domain == sympy.true and s.name not in cascade.outputs:
            reads = any(a.tensor == row for a in s.reads) and s.name != row
            if reads and len(users) == 1 and not any(a.tensor == s.name for a in accesses(users[0].domain)):
                user = redirect(users[0], lambda a, s=s: inlined(a, s) if a.tensor == s.name else a)  # type: ignore[misc]
                body = tuple(user if x is users[0] else x for x in cascade.body if x is not s)
                cascade = cascade.replace(body=body)
    return cascade


def _joined(cascade: Cascade, s: Einsum, row: Einsum, positive: frozenset[str], names: Names) -> Cascade:
    """`exp(a - g) * r` as `exp(a - (g - log r))`, where all that read the exponential have the factor."""
    guarded = isinstance(row.expr, Where) and row.expr.args[2] == 0
    there, factor = row.expr.args[:2] if guarded else (sympy.true, row.expr)
    inverse = 1 / factor
    if not all(a.tensor in positive for a in accesses(factor)) or not (
        isinstance(inverse, Access) or inverse.is_number
    ):
        return cascade
    users = [u for u in cascade.body if any(a.tensor == s.name for a in u.reads)]
    changed: dict[str, Einsum] = {}
    for u in users:
        here = [a for a in accesses(u.expr) if a.tensor == s.name]
        given = dict(zip(s.output.ranks, here[0].index, strict=True)) if len(here) == 1 else {}
        if not given or here[0] in accesses(u.domain):
            return cascade
        r = row.output().xreplace({var(rank): given[rank] for rank in row.output.ranks})
        terms = sympy.Add.make_args(sympy.expand(u.expr, deep=False))
        if not all({r, here[0]} <= set(sympy.Mul.make_args(t)) for t in terms):
            return cascade
        changed[u.name] = u.replace(expr=sympy.factor_terms(sympy.Add(*(t / r for t in terms))))
    if not changed:
        return cascade
    argument = s.expr.args[0]
    own = [t for t in sympy.Add.make_args(argument) if variables(t) <= set(row.output.ranks)]
    made: tuple[Einsum, ...] = (s.replace(expr=s.expr * row.output()),)
    if is_moderate(sympy.Add(argument, *(-t for t in own)), functools.partial(_defined, cascade)):
        level = Einsum(
            Tensor(names("L"), row.output.ranks, row.output.dtype),
            Where(there, sympy.log(inverse) - sympy.Add(*own), sympy.oo),
        )
        made = (level, s.replace(expr=sympy.exp(argument - sympy.Add(*own) - level.output())))
    body: list[Einsum] = []
    for x in cascade.body:
        if x.name == s.name:
            body += made
        else:
            body.append(changed.get(x.name, x))
    return cascade.replace(body=tuple(body))


def _defined(cascade: Cascade, name: str) -> Expr | None:
    made = cascade.definitions.get(name)
    return None if made is None else made.expr if made.reduce is None else sympy.Integer(0)
