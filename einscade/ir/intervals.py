"""Reasoning with the ranges of rank variables: which divisions vanish, how large an index gets, what a predicate is.

Comes in: index expressions and predicates, and `Ranges`, inclusive symbolic bounds of their rank variables. Goes out:
simpler expressions, bounds, and `True`, `False` or `None` (not decided). Variables without a range are symbols of
extents and at least 1. Everything is proved, nothing is guessed: "don't know" is the answer where a proof is not found.

Identities: (q·b + r) // b = q where 0 <= r < b;  (x // a) // b = x // (a·b);  (g·x + r) // (g·b) = x // b where
0 <= r < g;  x % b = x - b·(x // b);  b·(x // b) + x % b = x;  b·((x // b) % c) + x % b = x % (b·c).
A polynomial linear in a variable is nonnegative on a range if it is so at both of its ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import gcd, lcm
from typing import Any, TypeAlias

import sympy
from sympy.core.relational import Equality, Ge, Gt, Le, Lt, Relational, Unequality
from sympy.logic.boolalg import And, BooleanFalse, BooleanTrue, Not, Or

from einscade.ir.cascade import Cascade
from einscade.ir.expr import Access, Expr, FloorDiv, Mod, Where, var
from einscade.ir.polynomials import (
    ONE,
    Monomial,
    Poly,
    add,
    atoms,
    collect,
    constant,
    divide,
    from_expr,
    multiply,
    negate,
    substitute,
    to_expr,
)

Ranges: TypeAlias = Mapping[str, tuple[Expr, Expr]]

__all__ = ["Ranges", "bounds", "decide", "is_inside", "rank_ranges", "simplify"]


def rank_ranges(cascade: Cascade) -> dict[str, tuple[Expr, Expr]]:
    """`0 <= rank <= extent - 1` of every rank of the cascade."""
    return {r.name: (sympy.Integer(0), r.extent - 1) for r in cascade.ranks}


def simplify(expr: Any, ranges: Ranges) -> Any:
    """The expression (or predicate) without the divisions, maxima, choices and conjuncts that the ranges decide.
    Index arithmetic comes out multiplied out; other arithmetic keeps its form."""
    return _reasoner(ranges).simplify(sympy.sympify(expr))


def bounds(expr: Any, ranges: Ranges) -> tuple[Expr | None, Expr | None]:
    """Inclusive lower and upper bound over all ranks in `ranges`, as expressions over extents; None where unknown."""
    return _reasoner(ranges).bounds(sympy.sympify(expr))


def decide(predicate: Any, ranges: Ranges) -> bool | None:
    """Whether the predicate holds at every point (True), at none (False), or neither was proved (None)."""
    return _reasoner(ranges).decide(sympy.sympify(predicate))


def is_inside(index: Expr, extent: Expr, ranges: Ranges) -> bool:
    """Whether `0 <= index < extent` was proved for every point, be it one that exists or not."""
    return decide(And(Ge(index, 0), Lt(index, extent)), ranges) is True


def _reasoner(ranges: Ranges) -> _Reasoner:
    return _cached_reasoner(tuple(sorted((name, *map(sympy.sympify, ends)) for name, ends in ranges.items())))


@lru_cache(maxsize=256)
def _cached_reasoner(ranges: tuple[tuple[str, Expr, Expr], ...]) -> _Reasoner:
    return _Reasoner({var(name): (lower, upper) for name, lower, upper in ranges})


class _Reasoner:
    """The answers for one set of ranges, each found once."""

    def __init__(self, ranges: Mapping[Expr, tuple[Expr, Expr]]) -> None:
        self.ranges = {v: (from_expr(lo), from_expr(hi)) for v, (lo, hi) in ranges.items()}
        self.simplified: dict[Any, Any] = {}
        self.decided: dict[Any, bool | None] = {}
        self.proved: dict[frozenset[Any], bool] = {}
        self.ends: dict[Any, tuple[Poly | None, Poly | None]] = {}

    # -- simplify --

    def simplify(self, node: Any) -> Any:
        if not node.args or isinstance(node, (BooleanTrue, BooleanFalse)):
            return node
        if node not in self.simplified:
            self.simplified[node] = self.simpler(node)
        return self.simplified[node]

    def simpler(self, node: Any) -> Any:
        if isinstance(node, Access):
            return node.at(*(self.simplify(i) for i in node.index))
        args = [self.simplify(a) for a in node.args]
        if isinstance(node, FloorDiv):
            return self.floor_div(*args)
        if isinstance(node, Mod):
            return self.mod(*args)
        if isinstance(node, (sympy.Add, sympy.Mul, sympy.Pow)):
            return self.arithmetic(node.func(*args))
        if isinstance(node, Relational):
            return self.truth(node.func(*args))
        if isinstance(node, (sympy.Max, sympy.Min)):
            return self.extremum(node.func, args)
        if isinstance(node, Where):
            truth = self.decide(args[0])
            return node.func(*args) if truth is None else args[1 if truth else 2]
        return node.func(*args)

    def truth(self, node: Any) -> Any:
        decided = self.decide(node)
        return node if decided is None else sympy.true if decided else sympy.false

    def extremum(self, kind: Any, args: list[Any]) -> Any:
        """Max or Min without the arguments that another one dominates."""
        kept: list[Any] = []
        for i, a in enumerate(args):
            rest = kept + args[i + 1 :]
            if not any(self.decide(sympy.Ge(b, a) if kind is sympy.Max else sympy.Le(b, a)) for b in rest):
                kept.append(a)
        return kind(*kept)

    def arithmetic(self, node: Any) -> Any:
        """Integer arithmetic multiplied out, quotients and remainders of one division put together again."""
        if not _is_index(node):
            return node
        poly = from_expr(node)
        while (joined := self.joined(poly)) is not None:
            poly = from_expr(self.simplify(to_expr(joined)))
        return to_expr(poly)

    def joined(self, poly: Poly) -> Poly | None:
        """The polynomial with one remainder and the quotient it belongs to put together, or None."""
        for m, c in poly.items():
            for remainder, power in m:
                if not isinstance(remainder, Mod) or power != 1 or not self.positive(remainder.args[1]):
                    continue
                x, b = remainder.args
                rest: Poly = {m - {(remainder, 1)}: c}
                for n, d in poly.items():
                    for quotient, times in n:
                        if times != 1 or multiply(rest, from_expr(b)) != {n - {(quotient, 1)}: d}:
                            continue
                        if quotient == FloorDiv(x, b):
                            whole = x
                        elif isinstance(quotient, Mod) and quotient.args[0] == FloorDiv(x, b):
                            whole = Mod(x, b * quotient.args[1])
                        else:
                            continue
                        left = {k: v for k, v in poly.items() if k not in (m, n)}
                        return add(left, multiply(rest, from_expr(whole)))
        return None

    def floor_div(self, a: Any, b: Any) -> Any:
        if not (_is_index(a) and _is_index(b)):
            return FloorDiv(a, b)
        if isinstance(a, FloorDiv) and self.positive(a.args[1]) and self.positive(b):
            return self.floor_div(a.args[0], self.arithmetic(a.args[1] * b))
        quotient, rest, scale, _ = self.division(from_expr(a), from_expr(b))
        if rest is None:
            return to_expr(quotient)
        if scale is not None:
            inner = self.floor_div(to_expr(rest), to_expr(scale))
            return self.arithmetic(to_expr(quotient) + inner)
        return to_expr(quotient) + FloorDiv(to_expr(rest), b)

    def mod(self, a: Any, b: Any) -> Any:
        if not (_is_index(a) and _is_index(b)):
            return Mod(a, b)
        x, y = from_expr(a), from_expr(b)
        for m in x:  # what an inner remainder by a multiple of b took away changes nothing
            for atom, _ in m:
                if isinstance(atom, Mod) and len(m) == 1 and _quotient(from_expr(atom.args[1]), y) is not None:
                    return self.mod(to_expr(substitute(x, atom, from_expr(atom.args[0]))), b)
        quotient, rest, scale, low = self.division(x, y)
        if rest is None:
            return self.arithmetic(to_expr(add(x, multiply(quotient, y), -1)))
        if scale is not None:
            unit = _quotient(y, scale)
            assert unit is not None
            return self.arithmetic(to_expr(unit) * self.mod(to_expr(rest), to_expr(scale)) + to_expr(low))
        return Mod(to_expr(rest), b)

    def division(self, x: Poly, y: Poly) -> tuple[Poly, Poly | None, Poly | None, Poly]:
        """x // y as q (rest is None), or q + rest // scale where a common factor left (x = q*y + (y/scale)*rest + low),
        or q + rest // y (scale is None)."""
        quotient, rest = divide(x, y) if y else ({}, x)
        if self.within(rest, y):
            return quotient, None, None, {}
        if self.within(add(rest, y), y):
            return add(quotient, constant(1), -1), None, None, {}
        if len(y) == 1 and self.nonnegative(y):
            for unit in _common_factors(rest, y):
                multiple = {m: c for m, c in rest.items() if _quotient({m: c}, unit) is not None}
                low = add(rest, multiple, -1)
                if multiple and self.within(low, unit):
                    inner, scale = _quotient(multiple, unit), _quotient(y, unit)
                    assert scale is not None
                    return quotient, inner, scale, low
        return quotient, rest, None, {}

    def within(self, r: Poly, b: Poly) -> bool:
        """0 <= r < b."""
        return self.nonnegative(r) and self.nonnegative(add(add(b, constant(1), -1), r, -1))

    def positive(self, expr: Any) -> bool:
        return self.nonnegative(add(from_expr(expr), constant(1), -1))

    # -- decide --

    def decide(self, node: Any) -> bool | None:
        if isinstance(node, (BooleanTrue, BooleanFalse)):
            return bool(node)
        if node not in self.decided:
            self.decided[node] = self.decision(node)
        return self.decided[node]

    def decision(self, node: Any) -> bool | None:
        if isinstance(node, Not):
            inner = self.decide(node.args[0])
            return None if inner is None else not inner
        if isinstance(node, (And, Or)):
            parts = [self.decide(a) for a in node.args]
            decisive = isinstance(node, Or)
            if decisive in parts:
                return decisive
            return None if None in parts else not decisive
        if not isinstance(node, Relational) or isinstance(node, Access):
            return None
        left, right = (self.simplify(a) for a in node.args)
        if not (_is_arithmetic(left) and _is_arithmetic(right)):
            return None
        gap = _integral(add(from_expr(right), from_expr(left), -1))
        if isinstance(node, (Equality, Unequality)):
            equal = True if not gap else False if self.above(gap) or self.above(negate(gap)) else None
            return equal if isinstance(node, Equality) or equal is None else not equal
        if isinstance(node, (Gt, Ge)):
            gap = negate(gap)
        if isinstance(node, (Lt, Gt)):
            return True if self.above(gap) else False if self.nonnegative(negate(gap)) else None
        assert isinstance(node, (Le, Ge))
        return True if self.nonnegative(gap) else False if self.above(negate(gap)) else None

    def above(self, poly: Poly) -> bool:
        """poly > 0, where it is an integer."""
        return self.nonnegative(add(poly, constant(1), -1))

    # -- bounds and proofs --

    def bounds(self, node: Any) -> tuple[Expr | None, Expr | None]:
        lower, upper = self.interval(self.simplify(node))
        return (None if lower is None else to_expr(lower)), (None if upper is None else to_expr(upper))

    def interval(self, node: Any) -> tuple[Poly | None, Poly | None]:
        if node not in self.ends:
            self.ends[node] = self.find_interval(node)
        return self.ends[node]

    def find_interval(self, node: Any) -> tuple[Poly | None, Poly | None]:
        if node in self.ranges:
            return self.ranges[node]
        if isinstance(node, sympy.Symbol) or node.is_Rational:
            return (exact := from_expr(node)), exact
        if isinstance(node, Mod):
            b = from_expr(node.args[1])
            return ({}, add(b, constant(1), -1)) if self.above(b) else (None, None)
        if isinstance(node, FloorDiv):
            return self.quotient_interval(node)
        if isinstance(node, (sympy.Max, sympy.Min, Where)):
            ends = [self.interval(a) for a in (node.args[1:] if isinstance(node, Where) else node.args)]
            lowers, uppers = [e[0] for e in ends], [e[1] for e in ends]
            # The larger of two arguments is at least each one's lower bound, at most the larger upper bound.
            lower = self.extreme(lowers, 1, any_will_do=True) if node.func is sympy.Max else self.extreme(lowers, -1)
            upper = self.extreme(uppers, -1, any_will_do=True) if node.func is sympy.Min else self.extreme(uppers, 1)
            return lower, upper
        if _is_index(node) and (node.is_Add or node.is_Mul or node.is_Pow):
            poly = from_expr(node)
            lower, upper = self.least(poly), self.least(negate(poly))
            return lower, None if upper is None else negate(upper)
        return None, None

    def quotient_interval(self, node: FloorDiv) -> tuple[Poly | None, Poly | None]:
        a, b = node.args
        if not self.above(from_expr(b)) or any(v in self.ranges for v in b.free_symbols):
            return None, None
        ends = [None if end is None else to_expr(end) for end in self.interval(a)]
        lower, upper = (None if end is None else from_expr(self.floor_div(end, b)) for end in ends)
        return lower, upper

    def extreme(self, ends: list[Poly | None], sign: int, any_will_do: bool = False) -> Poly | None:
        """The largest (sign 1) or smallest (-1) of some bounds; None where one is unknown or they do not compare."""
        known = [e for e in ends if e is not None]
        if not known or (len(known) < len(ends) and not any_will_do):
            return None
        for e in known:
            if all(self.nonnegative(add(e, other, -1) if sign > 0 else add(other, e, -1)) for other in known):
                return e
        return known[0] if any_will_do else None

    def least(self, poly: Poly) -> Poly | None:
        """A lower bound free of ranks: each replaced by the end that its coefficient's sign asks for."""
        for atom in self.ranged(poly):
            parts = collect(poly, atom)
            lower, upper = self.interval(atom)
            if parts is None:
                return None
            factor, rest = parts
            if lower is not None and self.nonnegative(factor):
                poly = add(multiply(factor, lower), rest)
            elif upper is not None and self.nonnegative(negate(factor)):
                poly = add(multiply(factor, upper), rest)
            else:
                return None
        return poly

    def ranged(self, poly: Poly) -> list[Any]:
        """The atoms that depend on ranks, compound ones first (their ranges may hold extents only)."""
        found = [a for a in atoms(poly) if any(s in self.ranges for s in a.free_symbols)]
        return sorted(found, key=lambda a: (a.is_Symbol, str(a)))

    def nonnegative(self, poly: Poly) -> bool:
        """Whether poly >= 0 was proved at every point."""
        if all(m == ONE for m in poly):
            return poly.get(ONE, 0) >= 0
        key = frozenset(poly.items())
        if key not in self.proved:
            self.proved[key] = False  # a proof may not lean on itself
            self.proved[key] = self.proof(poly)
        return self.proved[key]

    def proof(self, poly: Poly) -> bool:
        straight = self.without_divisions(poly)
        if straight is not None and self.nonnegative(straight):
            return True
        ranged = self.ranged(poly)
        if not ranged:
            return self.nonnegative_over_extents(poly)
        atom = ranged[0]
        parts, (lower, upper) = collect(poly, atom), self.interval(atom)
        if parts is None:
            return False
        factor, rest = parts
        if lower is not None and self.nonnegative(factor):
            return self.nonnegative(add(multiply(factor, lower), rest))
        if upper is not None and self.nonnegative(negate(factor)):
            return self.nonnegative(add(multiply(factor, upper), rest))
        ends = (lower, upper)
        return all(e is not None and self.nonnegative(add(multiply(factor, e), rest)) for e in ends)

    def without_divisions(self, poly: Poly) -> Poly | None:
        """A smaller polynomial: b*(x // b) replaced by x - b + 1 or, subtracted, by x; a subtracted x // b or x % b of
        a nonnegative x by x. None where there is none."""
        for atom in atoms(poly):
            if not isinstance(atom, (FloorDiv, Mod)) or (parts := collect(poly, atom)) is None:
                continue
            factor, rest = parts
            x, b = (from_expr(a) for a in atom.args)
            if not self.above(b):
                continue
            if isinstance(atom, FloorDiv) and (count := _quotient(factor, b)) is not None:
                if self.nonnegative(count):
                    return add(rest, multiply(count, add(add(x, b, -1), constant(1))))
                if self.nonnegative(negate(count)):
                    return add(rest, multiply(count, x))
            elif self.nonnegative(negate(factor)) and self.nonnegative(x):
                return add(rest, multiply(factor, x))
        return None

    def nonnegative_over_extents(self, poly: Poly) -> bool:
        """Extents are 1 + something nonnegative: expand, and look at the signs of the coefficients."""
        for atom in list(atoms(poly)):
            if isinstance(atom, sympy.Symbol):
                poly = substitute(poly, atom, {frozenset({(atom, 1)}): 1, ONE: 1})
            elif not self.nonnegative_atom(atom):
                return False
        return all(c >= 0 for c in poly.values())

    def nonnegative_atom(self, atom: Any) -> bool:
        if isinstance(atom, FloorDiv):
            return self.nonnegative(from_expr(atom.args[0])) and self.above(from_expr(atom.args[1]))
        return isinstance(atom, Mod) and self.above(from_expr(atom.args[1]))


def _is_index(node: Any) -> bool:
    """Integer arithmetic over variables, divisions, maxima and choices: what indices are made of, gathers aside."""
    if node.is_Integer or isinstance(node, (sympy.Symbol, FloorDiv, Mod)):
        return True
    if node.is_Pow:
        return node.exp.is_Integer and node.exp.is_positive and _is_index(node.base)
    if isinstance(node, Where):
        return all(_is_index(a) for a in node.args[1:])
    return isinstance(node, (sympy.Add, sympy.Mul, sympy.Max, sympy.Min)) and all(_is_index(a) for a in node.args)


def _is_arithmetic(node: Any) -> bool:
    """As `_is_index`, with rational coefficients."""
    if node.is_Rational:
        return True
    if node.is_Add or node.is_Mul:
        return all(_is_arithmetic(a) for a in node.args)
    return _is_index(node)


def _integral(poly: Poly) -> Poly:
    """Multiplied by the denominators: the same sign, and an integer."""
    scale = lcm(*(c.denominator for c in poly.values())) if poly else 1
    return {m: int(c * scale) for m, c in poly.items()}


def _quotient(a: Poly, b: Poly) -> Poly | None:
    """a / b where b divides a."""
    if not b:
        return None
    quotient, rest = divide(a, b)
    return quotient if not rest else None


def _common_factors(poly: Poly, divisor: Poly) -> list[Poly]:
    """Factors that a term of the polynomial shares with the divisor (one term), the largest first."""
    ((lead, number),) = divisor.items()
    found: dict[Monomial, set[int]] = {}
    for m, c in poly.items():
        if not isinstance(c, int) or not isinstance(number, int):
            return []
        powers = dict(m)
        shared = frozenset((a, min(p, powers[a])) for a, p in lead if a in powers)
        found.setdefault(shared, set()).add(gcd(c, number))
    factors = [(m, n) for m, ns in found.items() for n in ns if (m, n) != (ONE, 1)]
    return [{m: n} for m, n in sorted(factors, key=lambda f: (-len(f[0]), -f[1], str(f[0])))]
