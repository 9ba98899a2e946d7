"""What a loop computes at every point, so that nothing is computed twice and as little as possible is held.

Comes in: a loop's statements in order. Goes out: statements of the same values, where functions that several need are
statements of their own (`shared`), and factors that wait for the same scores are one value (`joined`). A gradient
multiplies a weight, the derivative of what modifies its score, and what a later product says: the first two are known
before, and what they come to, `w * (1 - tanh(s)**2)` say, is all that has to be held until that product is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import sympy

from einscade.codegen.base2 import Exp2
from einscade.codegen.gluon_form import Form
from einscade.codegen.tiles import Statement
from einscade.ir.expr import Access, Expr, accesses, var

__all__ = ["joined", "shared"]


def shared(statements: Sequence[Statement], ranks: tuple[str, str]) -> tuple[Statement, ...]:
    """The statements, with functions of a point that several of them (or a power) need as statements of their own; of a
    value's negative powers the inverse is such a function."""
    count: Counter[Expr] = Counter()
    for s in statements:
        for x in _shareable(s.expr):
            count[x] += 2 if any(isinstance(y, sympy.Pow) and x in (y.base, 1 / y.base) and abs(y.exp) > 1
                                 for y in s.expr.atoms(sympy.Pow)) else 1  # fmt: skip
    result = list(statements)
    wide = {s.name for s in statements if set(ranks) <= set(s.ranks)}
    for i, x in enumerate(sorted((x for x, n in count.items() if n > 1), key=sympy.default_sort_key)):
        users = [s for s in result if x in _shareable(s.expr)]
        if not users or not any(set(ranks) <= set(s.ranks) for s in users):
            continue
        first = next(s for s in users if set(ranks) <= set(s.ranks))
        name = f"{first.name}_{x.func.__name__.lower() if not isinstance(x, sympy.Pow) else 'inverse'}{i or ''}"
        access = Access(name, *map(var, first.ranks))
        table: dict[Expr, Expr] = {x: access}
        if isinstance(x, sympy.Pow):
            powers = {y for s in users for y in s.expr.atoms(sympy.Pow) if y.base == x.base and y.exp.is_negative}
            table = {y: access ** (-y.exp) for y in powers}
        made = Statement(name, first.ranks, x, keep=first.keep, row=first.row)
        result = [replace(s, expr=s.expr.xreplace(table)) if s in users else s for s in result]
        result.insert(min(j for j, s in enumerate(result) if s.name in {u.name for u in users}), made)
    return tuple(result) if wide else tuple(statements)


def joined(statements: Sequence[Statement], shape: Form) -> tuple[Statement, ...]:
    """The statements, with factors that wait for the same scores, fewer than their product does, as one value; a number
    in front of it stays with the product."""
    made = {s.name: s for s in statements}
    readers = Counter(name for s in statements for name in {a.tensor for a in s.reads})

    def awaited(expr: Expr) -> frozenset[str]:
        read = {a.tensor for a in accesses(expr)}
        scores = read & {*shape.scores}
        return frozenset(scores).union(*(awaited(made[n].expr) for n in (read - scores) & made.keys()))

    def written_out(expr: Expr) -> Expr:
        """With polynomials that nothing else reads in their places."""
        alone = {a: made[a.tensor] for a in accesses(expr) if a.tensor in made and readers[a.tensor] == 1}
        plain = {a: s for a, s in alone.items() if s.monoid is s.fill is None and a.index == (*map(var, s.ranks),)}
        return expr.xreplace(
            {a: written_out(s.expr) for a, s in plain.items() if s.expr.is_polynomial(*accesses(s.expr))}
        )

    result: list[Statement] = []
    for s in statements:
        factors = sympy.Mul.make_args(s.expr) if s.monoid is None else ()
        waiting = [awaited(x) for x in factors]
        every = frozenset[str]().union(*waiting)
        for scores in dict.fromkeys(waiting):
            group = [x for x, waits in zip(factors, waiting, strict=True) if waits == scores]
            if scores and scores < every and len(group) > 1:
                number, expr = _number_apart([written_out(x) for x in group])
                value = Statement(f"{s.name}_{'_'.join(sorted(scores))}", s.ranks, expr, keep=s.keep, row=s.row)
                rest = sympy.Mul(*(x for x in sympy.Mul.make_args(s.expr) if x not in group))
                s = replace(s, expr=number * Access(value.name, *map(var, s.ranks)) * rest)
                result.append(value)
        result.append(s)
    needed = {x.weights for x in shape.sums} | {s.name for s in statements if not readers[s.name]}
    for s in reversed(result):
        needed |= {a.tensor for a in s.reads} if s.name in needed else set()
    return tuple(s for s in result if s.name in needed)


def _number_apart(factors: Sequence[Expr]) -> tuple[Expr, Expr]:
    """A number and what it multiplies. That of a sum is what the numbers of its terms are but for their signs."""
    number, rest = sympy.Mul(*factors).as_coeff_Mul()
    found = []
    for x in sympy.Mul.make_args(rest):
        sizes = {abs(t.as_coeff_Mul()[0]) for t in x.args} if x.is_Add else {sympy.Integer(1)}
        size = sizes.pop() if len(sizes) == 1 else sympy.Integer(1)
        number *= size
        found.append(x if size == 1 else sympy.Add(*(t / size for t in x.args)))
    return number, sympy.Mul(*found)


def _shareable(expr: Expr) -> set[Expr]:
    """The functions of one argument in an expression, and the inverses."""
    found = {x for x in expr.atoms(sympy.Function) if isinstance(x, (Exp2, sympy.tanh, sympy.exp)) and x.has(Access)}
    inverse = {1 / x.base for x in expr.atoms(sympy.Pow) if x.exp.is_Integer and x.exp < 0 and x.has(Access)}
    return found | inverse
