"""Small tools on expressions that several rewrites share: conjuncts, factors, exponentials folded together.

Everything here is a pure function of expressions; nothing decides what to rewrite. Tools on statements are in
`statements`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import sympy
from sympy.logic.boolalg import Boolean

from einscade.ir import Access, Expr, Where, free_vars
from einscade.ir.expr import accesses

__all__ = [
    "LONGEST",
    "conjoin",
    "conjuncts",
    "depends",
    "factors",
    "fold",
    "opposed",
    "reads_by_choice",
    "reads_outside_where",
    "size",
    "split_factors",
    "variables",
]

LONGEST = 400
"""No expression longer than this is written out where it is read. All that makes a score or a weight is some dozens of
operations; in a chain whose links each read the one before twice, they double with every link."""

variables = lru_cache(maxsize=65536)(free_vars)


@lru_cache(maxsize=65536)
def size(expr: Expr | Boolean) -> int:
    """How long the expression is: its operations, numbers and accesses, counted as often as they occur."""
    return 1 if isinstance(expr, Access) else 1 + sum(size(a) for a in expr.args)


def depends(expr: Expr | Boolean, ranks: Iterable[str]) -> bool:
    """Whether any of the rank variables occurs in the expression, indices included."""
    return not variables(expr).isdisjoint(ranks)


def conjuncts(domain: Boolean) -> tuple[Boolean, ...]:
    """The parts of a domain that all must hold, in a fixed order; none for `true`."""
    if domain == sympy.true:
        return ()
    return tuple(domain.args) if isinstance(domain, sympy.And) else (domain,)


def conjoin(parts: Iterable[Boolean]) -> Boolean:
    """The domain in which all of the parts hold."""
    parts = tuple(dict.fromkeys(parts))
    if not parts:
        return sympy.true
    return parts[0] if len(parts) == 1 else sympy.And(*parts)


def split_factors(term: Expr, ranks: Iterable[str]) -> tuple[Expr, Expr]:
    """`term == free * bound`, with every factor that lacks all of the ranks in `free`."""
    free: list[Expr] = []
    bound: list[Expr] = []
    for factor in sympy.Mul.make_args(term):
        (bound if depends(factor, ranks) else free).append(factor)
    return sympy.Mul(*free), sympy.Mul(*bound)


@lru_cache(maxsize=65536)
def fold(expr: Expr) -> Expr:
    """Exponentials of a product as one, powers of numbers as exponentials, logarithms of exponentials undone.

    exp(a)*exp(b) = exp(a + b), 2**x = exp(x*log(2)), log(exp(a)*b) = a + log(b) for b > 0 (b is a sum of exponentials
    or a product of them wherever a cascade takes its logarithm). sympy does none of these by itself.
    """
    if not expr.args or isinstance(expr, (Access, Boolean)):
        return expr
    args = tuple(fold(a) for a in expr.args)
    if isinstance(expr, sympy.Mul):
        powers = [a for a in args if isinstance(a, sympy.exp)]
        if len(powers) > 1:
            rest = [a for a in args if not isinstance(a, sympy.exp)]
            exponent = sympy.Add(*(p.args[0] for p in powers))
            return sympy.Mul(*rest, sympy.exp(exponent))
    elif isinstance(expr, sympy.Pow):
        base, exponent = args
        if base.is_number and base.is_positive and base != sympy.E and not exponent.is_number:
            return fold(sympy.exp(sympy.expand_mul(exponent * sympy.Float(math.log(float(base))))))
    elif isinstance(expr, sympy.log):
        factors = sympy.Mul.make_args(args[0])
        exponents = [f.args[0] for f in factors if isinstance(f, sympy.exp)]
        if exponents:
            rest = [f for f in factors if not isinstance(f, sympy.exp)]
            return sympy.Add(*exponents, sympy.log(sympy.Mul(*rest)))
    return expr if args == expr.args else expr.func(*args)


def reads_outside_where(expr: Expr) -> frozenset[Access]:
    """The accesses an expression makes at each of its points: not those that only one branch of a Where makes."""
    if isinstance(expr, Access):
        return frozenset({expr}).union(*map(reads_outside_where, expr.index))
    args = expr.args[:1] if isinstance(expr, Where) else expr.args
    return frozenset().union(*map(reads_outside_where, args)) if args else frozenset()


def reads_by_choice(exprs: Iterable[Expr]) -> frozenset[Access]:
    """The accesses of all these that only a branch of a Where makes: where it is not taken, they may be outside."""
    exprs = tuple(exprs)
    return frozenset(a for x in exprs for a in accesses(x)).difference(*map(reads_outside_where, exprs))


def factors(expr: Expr) -> tuple[Expr, ...]:
    """The factors of a product (one factor, the expression itself, where it is none)."""
    return tuple(sympy.Mul.make_args(expr))


def opposed(expr: sympy.Add) -> tuple[Expr, Expr] | None:
    """Two terms of opposite signs that read one tensor along other ranks, neither along all: best taken from one
    another before anything else is added. Two places of a running sum are large beside their difference."""
    terms = sympy.Add.make_args(expr)
    split = {t: t.as_coeff_Mul() for t in terms if variables(t) < variables(expr)}
    read = {t: (number, x.tensor) for t, (number, x) in split.items() if isinstance(x, Access)}
    for plus, (number, tensor) in read.items():
        for minus, other in read.items():
            if number > 0 and other == (-number, tensor) and variables(plus) != variables(minus) and len(terms) > 2:
                return plus, minus
    return None
