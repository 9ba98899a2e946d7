"""Polynomials over expressions, as plain dictionaries: what `intervals` computes with.

Comes in: sympy expressions built by `+ - * **`. Goes out: `Poly`, a mapping from monomials to rational coefficients,
where a monomial is a set of (atom, power) and an atom is any expression of another kind (a variable, a `FloorDiv`,
an access). Sums and products of these cost microseconds where sympy's `expand` costs milliseconds.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, TypeAlias

import sympy

from einscade.ir.expr import Expr

Monomial: TypeAlias = frozenset[tuple[Any, int]]
Number: TypeAlias = int | Fraction
Poly: TypeAlias = dict[Monomial, Number]

__all__ = [
    "ONE",
    "Monomial",
    "Poly",
    "add",
    "atoms",
    "collect",
    "constant",
    "divide",
    "from_expr",
    "multiply",
    "negate",
    "substitute",
    "to_expr",
]

ONE: Monomial = frozenset()


def from_expr(expr: Any) -> Poly:
    """The expression multiplied out."""
    if expr.is_Rational:
        return constant(int(expr.p) if expr.q == 1 else Fraction(int(expr.p), int(expr.q)))
    if expr.is_Add:
        total: Poly = {}
        for arg in expr.args:
            total = add(total, from_expr(arg))
        return total
    if expr.is_Mul:
        product: Poly = {ONE: 1}
        for arg in expr.args:
            product = multiply(product, from_expr(arg))
        return product
    if expr.is_Pow and expr.exp.is_Integer and 0 < expr.exp <= 8:
        product, base = constant(1), from_expr(expr.base)
        for _ in range(int(expr.exp)):
            product = multiply(product, base)
        return product
    return {frozenset({(expr, 1)}): 1}


def to_expr(poly: Poly) -> Expr:
    """The sum of its monomials, in sympy's order."""
    terms = []
    for m, c in poly.items():
        number = sympy.Integer(c) if isinstance(c, int) else sympy.Rational(c.numerator, c.denominator)
        terms.append(sympy.Mul(number, *(atom**power for atom, power in m)))
    return sympy.Add(*terms)


def constant(value: Number) -> Poly:
    """The polynomial of that value; 0 has no monomials."""
    return {ONE: value} if value else {}


def add(a: Poly, b: Poly, times: Number = 1) -> Poly:
    """a + times * b."""
    total = dict(a)
    for m, c in b.items():
        value = total.get(m, 0) + times * c
        if value:
            total[m] = value
        else:
            total.pop(m, None)
    return total


def negate(a: Poly) -> Poly:
    """-a."""
    return {m: -c for m, c in a.items()}


def multiply(a: Poly, b: Poly) -> Poly:
    """a * b."""
    total: Poly = {}
    for m, c in a.items():
        for n, d in b.items():
            key = _times(m, n)
            value = total.get(key, 0) + c * d
            if value:
                total[key] = value
            else:
                total.pop(key, None)
    return total


def _times(m: Monomial, n: Monomial) -> Monomial:
    if not m or not n:
        return m or n
    powers = dict(m)
    for atom, power in n:
        powers[atom] = powers.get(atom, 0) + power
    return frozenset(powers.items())


def _over(m: Monomial, n: Monomial) -> Monomial | None:
    """m / n where n divides m."""
    if not n:
        return m
    powers = dict(m)
    for atom, power in n:
        left = powers.get(atom, 0) - power
        if left < 0:
            return None
        if left:
            powers[atom] = left
        else:
            del powers[atom]
    return frozenset(powers.items())


def divide(a: Poly, b: Poly) -> tuple[Poly, Poly]:
    """(q, r) with a == q * b + r: every term of `a` that the leading term of `b` divides goes into q. Coefficients
    of q are integers, rounded down in the constant term and towards zero in the others."""
    lead = max(b, key=lambda m: (sum(p for _, p in m), sorted(str(atom) for atom, _ in m)))
    quotient: Poly = {}
    for m in sorted(a, key=lambda m: -sum(p for _, p in m)):
        whole = _over(m, lead)
        if whole is None:
            continue
        ratio = Fraction(a[m]) / Fraction(b[lead])
        count = ratio.numerator // ratio.denominator if not whole else int(ratio)
        if count:
            quotient = add(quotient, {whole: count})
    return quotient, add(a, multiply(quotient, b), -1)


def atoms(poly: Poly) -> set[Any]:
    """What the polynomial is one in."""
    return {atom for m in poly for atom, _ in m}


def collect(poly: Poly, atom: Any) -> tuple[Poly, Poly] | None:
    """(a, b) with poly == a * atom + b, b free of the atom; None where a higher power occurs."""
    a: Poly = {}
    b: Poly = {}
    for m, c in poly.items():
        power = next((p for x, p in m if x == atom), 0)
        if power > 1:
            return None
        if power:
            a[m - {(atom, 1)}] = c
        else:
            b[m] = c
    return a, b


def substitute(poly: Poly, atom: Any, value: Poly) -> Poly:
    """The polynomial with an atom replaced."""
    powers: list[Poly] = [{ONE: 1}, value]
    total: Poly = {}
    for m, c in poly.items():
        power = next((p for x, p in m if x == atom), 0)
        while len(powers) <= power:
            powers.append(multiply(powers[-1], value))
        total = add(total, multiply({m - {(atom, power)}: c}, powers[power]))
    return total
