"""Bounded: a normaliser with terms beside its sum is taken relative to the greatest of them all.

Comes in: `N / (Z + exp(a - G))`, where G is the maximum that the sums N and Z are shifted by: it knows nothing of `a`
(a sink's logit), so the exponential overflows where `a` lies far above a row's scores, and its gradient, two infinities
over each other, is NaN long before. Goes out: the same with `T = Max(G, a)`, in which no exponent is positive. The sums
stay as they are, so the loop that makes them does not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from einscade.ir import Access, Cascade, Einsum, Expr, Tensor, Where
from einscade.passes.rewrite import NotApplicable
from einscade.passes.statements import Names, wide
from einscade.passes.terms import depends

__all__ = ["Bounded"]


@dataclass(frozen=True)
class Bounded:
    """Normalisers with terms beside their sum, relative to the greatest term of all."""

    name: ClassVar[str] = "bounded"
    identity: ClassVar[str] = "n / (z + exp(a - g)) = n*exp(g - t) / (z*exp(g - t) + exp(a - t)) with t = Max(g, a)"
    exact: ClassVar[bool] = True

    def apply(self, cascade: Cascade) -> Cascade:
        names = Names(cascade)
        maxima = {s.name for s in cascade.body if s.reduce is not None and s.reduce.monoid == "max"}
        body: list[Einsum] = []
        for s in cascade.body:
            plain = s.reduce is None and s.scan is None
            found = next((x for t in _totals(s) if (x := _shifted(t, maxima))), None) if plain else None
            if found is None:
                body.append(s)
                continue
            total, maximum, others = found
            top = sympy.Max(maximum, *others)
            ranks = tuple(r for r in s.output.ranks if depends(top, (r,)))
            made = Einsum(Tensor(names("T"), ranks, wide(s.output.dtype)), top)
            body += [made, _relative(s, total, maximum, made.output())]
        if len(body) == len(cascade.body):
            raise NotApplicable("no normaliser has a term beside the sum that its maximum was taken of")
        return cascade.replace(body=tuple(body))


def _totals(s: Einsum) -> list[Expr]:
    """The sums that a statement divides by or takes the logarithm of."""
    divisors = [p.base for p in s.expr.atoms(sympy.Pow) if p.exp.is_negative]
    logarithms = [x.args[0] for x in s.expr.atoms(sympy.log)]
    return sorted((t for t in {*divisors, *logarithms} if isinstance(t, sympy.Add)), key=sympy.default_sort_key)


def _shifted(total: Expr, maxima: set[str]) -> tuple[Expr, Access, list[Expr]] | None:
    """A sum with terms exp(a - G), where G is one of the maxima: the sum, G, and each a."""
    for term in total.args:
        exponents = [f.args[0] for f in sympy.Mul.make_args(term) if isinstance(f, sympy.exp)]
        for part in (p for e in exponents for p in sympy.Add.make_args(e)):
            maximum = -part
            if isinstance(maximum, Access) and maximum.tensor in maxima:
                others = [e + maximum for e in (_exponent(t) for t in total.args) if e is not None]
                return total, maximum, [a for a in others if not a.has(maximum)]
    return None


def _exponent(term: Expr) -> Expr | None:
    """`x` of a positive number times exp(x)."""
    number, rest = term.as_coeff_Mul()
    return rest.args[0] if isinstance(rest, sympy.exp) and number.is_positive else None


def _relative(s: Einsum, total: Expr, maximum: Access, top: Access) -> Einsum:
    """The statement with `total = exp(top - maximum) * relative`, where it divides by it or takes its logarithm."""
    down = sympy.exp(maximum - top)
    terms = []
    for t in total.args:
        exponent = _exponent(t)
        number = t.as_coeff_Mul()[0]
        terms.append(t * down if exponent is None else number * sympy.exp(exponent + maximum - top))
    relative = sympy.Add(*terms)

    def within(expr: Expr) -> Expr:
        if isinstance(expr, Access) or not expr.args:
            return expr
        if isinstance(expr, sympy.Pow) and expr.base == total:
            return relative**expr.exp * sympy.exp(-expr.exp * (maximum - top))
        if isinstance(expr, sympy.log) and expr.args[0] == total:
            return sympy.log(relative) + top - maximum
        if isinstance(expr, Where):
            return Where(_condition(expr.args[0], total, relative), *(within(a) for a in expr.args[1:]))
        return expr.func(*(within(a) for a in expr.args))

    return s.replace(expr=within(s.expr), domain=_condition(s.domain, total, relative))


def _condition(condition: sympy.Basic, total: Expr, relative: Expr) -> sympy.Basic:
    """`total != 0` where `relative != 0`: they differ by a positive factor."""
    return condition.xreplace({sympy.Ne(total, 0): sympy.Ne(relative, 0)})
