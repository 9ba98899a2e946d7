"""The normal form of one expression: constants, choices between constants, comparisons, exponentials.

Comes in: an expression or a predicate. Goes out: an equal one in which spellings of the same thing agree: `S / 8` and
`0.125 * S`, `2**x` and `exp(x*log(2))`, `p >= m` and `m <= p`, `(1 - Where(c, 1, 0)) * -1e4` and `Where(c, 0, -1e4)`.

A constant keeps 14 significant digits: scales reach a cascade through different roundings (`1/8 * log2(e) * log(2)`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Boolean, BooleanAtom, Not, Or

from einscade.ir import Access, Expr, Where, const
from einscade.passes.terms import fold

__all__ = ["limit", "normal", "predicate"]

DIGITS = 14
FILL = 1e30
_EXTREMES = (sympy.oo, -sympy.oo, sympy.nan, sympy.zoo)


@lru_cache(maxsize=65536)
def normal(expr: Any) -> Any:
    """The normal form. Booleans inside become predicates in theirs; indices of accesses stay as they are."""
    if isinstance(expr, Access) or expr.is_Symbol or expr.is_Integer or expr in _EXTREMES:
        return expr
    if isinstance(expr, (And, Or, Not, Relational, BooleanAtom)):
        return predicate(expr)
    if expr.is_number:
        return _number(expr)
    if isinstance(expr, sympy.Pow):
        return _power(normal(expr.base), expr.exp)
    if isinstance(expr, sympy.Mul) and sum(a.is_number for a in expr.args) > 1:
        numbers = sympy.Mul(*(a for a in expr.args if a.is_number), evaluate=False)  # rounded together, once
        expr = _number(numbers) * sympy.Mul(*(a for a in expr.args if not a.is_number))
        return normal(expr)
    args = tuple(normal(a) for a in expr.args)
    if isinstance(expr, Where):
        return _choice(*args)
    rebuilt = expr if args == expr.args else expr.func(*args)
    if isinstance(rebuilt, (sympy.Add, sympy.Mul)):
        rebuilt = _constants_into_choices(rebuilt)
    return fold(rebuilt)


def _number(value: Expr) -> Expr:
    evaluated = float(value)
    if abs(evaluated) >= FILL:  # the lowest float32, rounded, is no float32 any more
        return const(evaluated)
    return const(float(f"{evaluated:.{DIGITS}g}"))


def _power(base: Expr, exponent: Expr) -> Expr:
    if exponent.is_number and not exponent.is_Integer:
        doubled = const(2 * float(exponent))
        exponent = doubled / 2 if doubled.is_Integer else _number(exponent)
        return base**exponent
    return fold(base ** (exponent if exponent.is_Integer else normal(exponent)))


def _choice(condition: Boolean, a: Expr, b: Expr) -> Expr:
    if isinstance(condition, Not):
        condition, a, b = condition.args[0], b, a
    if isinstance(a, Where) and a.args[0] == condition:
        a = a.args[1]
    if isinstance(b, Where) and b.args[0] == condition:
        b = b.args[2]
    if isinstance(a, Where) and a.args[2] == b:
        condition, a = predicate(And(condition, a.args[0])), a.args[1]
    elif isinstance(b, Where) and b.args[1] == a:
        condition, b = predicate(Or(condition, b.args[0])), b.args[2]
    return Where(condition, a, b)


def _constants_into_choices(expr: Expr) -> Expr:
    """Arithmetic of a number and one choice between numbers; a product with a choice that may be 0."""
    choices = [a for a in expr.args if isinstance(a, Where)]
    if isinstance(expr, sympy.Mul):
        zeros = [w for w in choices if 0 in w.args[1:]]
        if not zeros:
            return expr if not choices else _distributed(expr, choices)
        condition, a, b = zeros[0].args
        rest = sympy.Mul(*(f for f in expr.args if f is not zeros[0]))
        if rest.has(sympy.oo, -sympy.oo):
            return _distributed(expr, choices)
        return normal(Where(condition, a * rest if a != 0 else a, b * rest if b != 0 else b))
    return _distributed(expr, choices)


def _distributed(expr: Expr, choices: list[Expr]) -> Expr:
    if len(choices) != 1:
        return expr
    condition, a, b = choices[0].args
    numbers = [x for x in expr.args if x.is_number]
    others = [x for x in expr.args if not x.is_number and x is not choices[0]]
    if not (a.is_number and b.is_number and numbers) or (others and isinstance(expr, sympy.Mul)):
        return expr
    return expr.func(normal(Where(condition, expr.func(a, *numbers), expr.func(b, *numbers))), *others)


@lru_cache(maxsize=65536)
def predicate(expr: Any) -> Boolean:
    """A predicate in normal form: `Not` only on what cannot be turned around, integer comparisons as `<=`."""
    if isinstance(expr, (Access, BooleanAtom)):
        return expr
    if isinstance(expr, Not):
        inner = predicate(expr.args[0])
        if isinstance(inner, (And, Or)):
            flipped = Or if isinstance(inner, And) else And
            return predicate(flipped(*(Not(a) for a in inner.args)))
        return predicate(inner.negated) if isinstance(inner, Relational) else Not(inner)
    if isinstance(expr, (And, Or)):
        return expr.func(*(predicate(a) for a in expr.args))
    if isinstance(expr, Relational):
        return _comparison(expr)
    return expr


def _comparison(expr: Relational) -> Boolean:
    a, b = (normal(x) if not isinstance(x, Boolean) or isinstance(x, Access) else predicate(x) for x in expr.args)
    for choice, other, flipped in ((a, b, False), (b, a, True)):
        if isinstance(choice, Where) and all(x.is_number for x in (*choice.args[1:], other)):
            condition, x, y = choice.args
            outcomes = [expr.func(other, v) if flipped else expr.func(v, other) for v in (x, y)]
            if outcomes[0] == outcomes[1]:
                return outcomes[0]
            return condition if outcomes[0] == sympy.true else predicate(Not(condition))
    expr = expr.func(a, b) if (a, b) != expr.args else expr
    if isinstance(expr, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
        below = sympy.Lt if isinstance(expr, (sympy.Lt, sympy.Gt)) else sympy.Le
        if isinstance(expr.lts, sympy.Abs):  # |x| <= b
            return predicate(And(below(expr.lts.args[0], expr.gts), below(-expr.lts.args[0], expr.gts)))
        if isinstance(expr.gts, sympy.Abs):
            return predicate(Or(below(expr.lts, expr.gts.args[0]), below(expr.lts, -expr.gts.args[0])))
    if not isinstance(expr, Relational) or isinstance(expr, (sympy.Eq, sympy.Ne)):
        return expr
    difference = expr.gts - expr.lts
    if not difference.is_integer or difference.has(Access):
        return expr if isinstance(expr, (sympy.Le, sympy.Lt)) else expr.reversed
    if isinstance(expr, (sympy.Lt, sympy.Gt)):
        difference -= 1
    constant, terms = sympy.expand(difference).as_coeff_Add()
    below = [-t for t in sympy.Add.make_args(terms) if t.could_extract_minus_sign()]
    above = [t for t in sympy.Add.make_args(terms) if not t.could_extract_minus_sign()]
    if not below:  # 0 <= above + constant
        return sympy.Ge(sympy.Add(*above), -constant)
    return sympy.Le(sympy.Add(*below), sympy.Add(*above, constant))


def limit(expr: Expr) -> Expr:
    """The expression with every access standing for some finite number, so that infinities settle what they reach:
    `exp(-oo + s)` is 0, `-oo + s` is -oo."""
    return expr.xreplace({a: sympy.Dummy(real=True) for a in expr.atoms(Access)})
