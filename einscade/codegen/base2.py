"""Exponentials in base 2, with their factors folded: what GPUs compute in one instruction.

Comes in: a `TileLoop`. Goes out: an equal one in which `exp(S - G)` is `Exp2(S*c - G*c)`. The identity is
`exp(x) = 2**(x log2 e)` together with `max(u x) = u max(x)` for u > 0: values that meet only in maxima and in
exponents (scores, their running maximum) are kept in the unit in which they come out of the contraction, so that the
scale of the scores costs no operation of its own: it joins `log2 e` in the multiply-add of the exponent.

Scores to which a tensor or a fill is added may be as low as a dtype goes (a mask that adds its least number). In
another unit such a number is -inf: a row of nothing else would lose all its keys. And `S*c - G*c` of two large numbers
is what rounding leaves, not 0. There the exponent stays `exp(S - G)`, which is multiplied by `log2 e` behind the
difference, and scores stay in their own unit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import sympy

from einscade.codegen.tiles import Finite, State, Statement, TileLoop
from einscade.ir.analysis import is_moderate
from einscade.ir.expr import Access, Expr

__all__ = ["Exp2", "base2", "logistic_exponent"]


class Exp2(sympy.Function):
    """`2**x`."""

    nargs = (1,)
    is_extended_real = True


def base2(loop: TileLoop, unit: Expr | None = None) -> TileLoop:
    """The loop with every exponential in base 2, scores and maxima in the unit of their contraction, or in `unit`; the
    loop as it is where an exponent may have large numbers."""
    if not _moderate(loop):
        return loop
    chain = _chain(loop)
    unit = unit or _unit(loop, chain)

    def units(expr: sympy.Basic) -> sympy.Basic:
        return expr.xreplace({a: unit * a for a in expr.atoms(Access) if a.tensor in chain})

    def statement(s: Statement) -> Statement:
        if s.name in chain:
            homogeneous = _reads(s) & chain
            expr = s.expr if homogeneous else s.expr / unit
            return replace(s, expr=_exponents(expr))
        return replace(s, expr=_exponents(units(s.expr)), keep=units(s.keep), row=units(s.row))

    def state(v: State) -> State:
        return replace(v, init=v.init / unit) if v.name in chain and v.init.is_finite else v

    return replace(
        loop,
        prologue=tuple(map(statement, loop.prologue)),
        states=tuple(map(state, loop.states)),
        body=tuple(map(statement, loop.body)),
        epilogue=tuple(map(statement, loop.epilogue)),
    )


def logistic_exponent(expr: Expr) -> Expr | None:
    """The x of an expression that is `2**x / (1 + 2**x)`, as `1 / (1 + 2**-x)` is; None of any other."""
    numerator, denominator = expr.as_numer_denom()
    power = denominator - 1
    if not isinstance(power, Exp2):
        return None
    if numerator == 1:
        return -power.args[0]
    return power.args[0] if numerator == power else None


def _moderate(loop: TileLoop) -> bool:
    """Whether no exponent has fills or tensors of every point in it. What is subtracted there (the maximum, or the
    logarithm of a sum, as gradients read them) is no more than what it is subtracted from."""
    states = {x for v in loop.states for x in (v.name, v.new)}
    made = {s.name: s.expr if s.monoid is None and s.name not in states else sympy.Integer(0) for s in loop.statements}
    made |= dict.fromkeys(states, sympy.Integer(0))
    return all(
        is_moderate(t, made.get)
        for s in loop.statements
        for e in s.expr.atoms(sympy.exp)
        for t in sympy.Add.make_args(sympy.expand_mul(e.args[0]))
        if not isinstance(-t, Access)
    )


def _reads(s: Statement) -> set[str]:
    return {a.tensor for a in s.reads}


def _exponents(expr: sympy.Basic) -> sympy.Basic:
    """Every `exp` as `Exp2`, the logarithm's factor multiplied into each term."""
    found = {}
    for e in expr.atoms(sympy.exp):
        inner = _exponents(e.args[0])
        found[e] = Exp2(sympy.Add(*(_per_log2(t) for t in sympy.Add.make_args(sympy.expand_mul(inner)))))
    return expr.xreplace(found)


def _per_log2(term: Expr) -> Expr:
    """`term * log2(e)`, exact where the term has a factor log(2), else with one number in front."""
    factor = term / sympy.log(2)
    if not factor.has(sympy.log(2)):
        return factor
    numbers, rest = factor.as_independent(Access, *factor.free_symbols, as_Add=False)
    return sympy.Float(float(numbers)) * rest if numbers.is_number else factor


def _definitions(loop: TileLoop) -> dict[str, list[Statement]]:
    """Who defines each value; a state is defined by its update, under both of its names."""
    made: dict[str, list[Statement]] = {}
    for s in loop.body:
        made.setdefault(s.name, []).append(s)
    for v in loop.states:
        made[v.name] = made[v.new]
    return made


def _homogeneous(s: Statement) -> set[str] | None:
    """What the statement takes the maximum of, if that is all it does."""
    e = s.expr
    if isinstance(e, Finite):
        e = e.args[0]
    parts = e.args if isinstance(e, (sympy.Max, sympy.Min)) else (e,)
    if s.monoid not in (None, "max", "min") or not all(isinstance(p, Access) for p in parts):
        return None
    return {p.tensor for p in parts}


def _chain(loop: TileLoop) -> frozenset[str]:
    """The values of the loop that occur in exponents, with those that they are maxima of, both names of a state."""
    made = _definitions(loop)
    chain: set[str] = set()
    for s in loop.body:
        for e in s.expr.atoms(sympy.exp):
            terms = sympy.Add.make_args(e.args[0])
            chain |= {t.tensor for x in terms for t in (x, -x) if isinstance(t, Access) and t.tensor in made}
    if not chain:
        return frozenset()
    grown: set[str] = set()
    while grown != chain:
        grown = set(chain)
        for name in grown:
            for s in made[name]:
                chain |= {n for n in _homogeneous(s) or set() if n in made}
        for v in loop.states:
            if {v.name, v.new} & chain:
                chain |= {v.name, v.new}
    for name in chain:  # a maximum of something outside (an input) would mix units
        for s in made[name]:
            parts = _homogeneous(s)
            if parts is not None and parts & chain and not parts <= chain:
                return frozenset()
            if parts is None and _reads(s) & chain:
                return frozenset()
    return frozenset(chain)


def _unit(loop: TileLoop, chain: Iterable[str]) -> Expr:
    """What one of the chain's values is worth: the positive factor that all of its contractions share, else log(2),
    in which the exponent needs no factor at all."""
    made = _definitions(loop)
    factors: set[Expr] = set()
    for name in chain:
        for s in made[name]:
            if not _reads(s) & set(chain):
                coefficient = s.expr.as_coeff_Mul()[0]
                factors.add(coefficient if s.monoid == "sum" and coefficient.is_positive else sympy.Integer(0))
    if len(factors) == 1 and (factor := factors.pop()) != 0:
        return factor
    return sympy.log(2)
