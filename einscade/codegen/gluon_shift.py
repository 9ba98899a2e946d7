"""Terms of a row leave the points of a tile: they are added to the row's maximum and in the exponent instead.

Comes in: the statements of a loop, exponentials in base 2. Goes out: equal ones, by

    x = u + r, r the same for all of a row:    max(x) = max(u) + r,    2**(k*x - g) = 2**(k*u + (k*r - g))

With the coordinate of the loop as `first + offset`, where the tile begins and the place in it, a slope `(m - p) * s`
is `offset * s`, one multiply-add for each point, and `(first - p) * s` for each row. What is added to scores is then as
small as it can be: beside a large number they would lose their last bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy

from einscade.codegen.base2 import Exp2
from einscade.codegen.tiles import Statement
from einscade.ir.expr import Access, Expr, accesses, free_vars, var

__all__ = ["coordinates", "row_terms_apart"]


def coordinates(m: str) -> tuple[sympy.Symbol, sympy.Symbol]:
    """Where a tile along `m` begins, and the place in it."""
    return var(f"{m}_first"), var(f"{m}_offset")


def row_terms_apart(statements: Sequence[Statement], p: str, m: str) -> tuple[Statement, ...]:
    """The statements, with the row terms of values that only maxima and exponents read as values of their own."""
    result = list(statements)
    for s in statements:
        users = [t for t in result if any(a.tensor == s.name for a in (*t.reads, *accesses(t.row)))]
        found = _apart(s.expr, m) if s.monoid is None and {p, m} <= set(s.ranks) else None
        if found is None or not users or not all(_takes(t, s, m) for t in users):
            continue
        row, rest = found
        ranks = tuple(r for r in s.ranks if r != m)
        term = Statement(f"{s.name}_row", ranks, row)
        value, added = Access(s.name, *map(var, s.ranks)), Access(term.name, *map(var, ranks))
        table: dict[Statement, list[Statement]] = {s: [term, replace(s, expr=rest)]}
        for t in users:
            if t.monoid is None:
                table[t] = [replace(t, expr=_spread(t.expr.xreplace({value: value + added})))]
                continue
            part = replace(t, name=f"{t.name}_part")
            whole = Access(part.name, *map(var, t.ranks)) + added
            table[t] = [part, Statement(t.name, t.ranks, whole, keep=t.row, row=t.row)]
        result = [x for t in result for x in table.get(t, [t])]
    return tuple(result)


def _spread(expr: Expr) -> Expr:
    """Exponents as sums, so that terms of a row are one."""
    return expr.xreplace({e: Exp2(sympy.expand(e.args[0])) for e in expr.atoms(Exp2)})


def _apart(expr: Expr, m: str) -> tuple[Expr, Expr] | None:
    """The terms that are the same for all of a row, and the others; None where no position is among the former."""
    first, offset = coordinates(m)
    held = {a: sympy.Dummy() for a in accesses(expr)}
    moving = {offset, *(d for a, d in held.items() if m in free_vars(a))}
    whole = expr.xreplace(held).xreplace({var(m): first + offset})
    terms = sympy.Add.make_args(sympy.expand(whole))
    rest = sympy.Add(*(t for t in terms if moving & t.free_symbols))
    row = whole.xreplace(dict.fromkeys(moving, sympy.Integer(0)))  # as it was factored, where positions are close
    if first not in row.free_symbols or sympy.expand(row + rest - whole) != 0:
        return None
    back = {d: a for a, d in held.items()}
    return row.xreplace(back), rest.xreplace(back)


def _takes(t: Statement, s: Statement, m: str) -> bool:
    """Whether a statement reads the value only as its greatest of a row or, with a number, in exponents."""
    access = Access(s.name, *map(var, s.ranks))
    if access in accesses(t.keep) or access in accesses(t.row):
        return False
    if t.monoid is not None:
        return t.monoid == "max" and t.reduced == (m,) and t.expr == access and t.fill is None
    inside = [e for e in t.expr.atoms(Exp2) if e.has(access)]
    outside = t.expr.xreplace({e: sympy.Dummy() for e in inside})
    arguments = [sympy.expand(e.args[0]) for e in inside]
    linear = all(a.coeff(access).is_number and not (a - a.coeff(access) * access).has(access) for a in arguments)
    return linear and not outside.has(access)
