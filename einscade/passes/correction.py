"""The correction of a running reduction when what it depends on moves: derived, for any reduction that has one.

Comes in: the expression f(x, s) that a reduction R = red(m) f(x[m], s) takes, its monoid, and the states s (what it
reads of other reductions over m, so far). Goes out: how R is carried from the old states s to new ones s':

    max, min      f(x, s') - f(x, s) = d(s, s')  free of x              R' = R + d
    sum           f(x, s') = r(s, s') * f(x, s)                         R' = r * R
    sum, affine   f = E * P, E with a ratio r as above, P a polynomial in s, so that by Taylor
                  P(s') = P(s) + sum_j (s' - s)^j / j! * P^(j)(s)       R' = r * (R + sum_j (s' - s)^j / j! * A_j)
                  with A_j = sum E * P^(j), a lower moment, carried along in the same way

or `NoCorrection`. The ratio is the condition of RedFuser (arXiv 2603.10026): f(x, G') = c(G, G') * f(x, G). The affine
form adds shifted moments (Chan, Golub and LeVeque 1983): what sum (x - mu)^2 gains when mu moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from einscade.ir import Access, Expr
from einscade.passes.terms import depends, fold, size

__all__ = ["Correction", "NoCorrection", "derive", "old"]

# Moments beyond this total degree cost more than another pass.
DEGREE = 4
# What sympy's cancel() takes grows fast with an expression's length; those of attention have some dozens of terms.
LONGEST = 200


class NoCorrection(Exception):
    """The reduction cannot be carried along; the message says what stands in the way."""


@dataclass(frozen=True)
class Correction:
    """R' = scale * (R + shift + sum of coefficient * sum(moment)); old states appear as `old(state)`.

    `moments` pairs each coefficient with the expression (over the states' old values, written as the states
    themselves) whose sum so far it multiplies.
    """

    scale: Expr = sympy.S.One
    shift: Expr = sympy.S.Zero
    moments: tuple[tuple[Expr, Expr], ...] = ()


def old(state: Expr) -> sympy.Symbol:
    """The symbol of a state's value before the step."""
    return sympy.Symbol(f"old {state}", real=True)


def derive(f: Expr, monoid: str, states: Sequence[Access], along: str) -> Correction:
    """The correction of `red(along) f` when each of `states` moves from `old(state)` to itself.

    `f` holds the states as atoms; whatever varies with `along` must show it as a variable (in an index).
    Raises NoCorrection.
    """
    moved = {s: old(s) for s in states if f.has(s)}
    if not moved:
        return Correction()
    if size(f) > LONGEST:
        raise NoCorrection(f"{monoid} of an expression of more than {LONGEST} operations")
    f = _expanded_exponents(f)
    before = f.xreplace(moved)
    if monoid in ("max", "min"):
        shift = _without(f - before, along)
        if shift is None:
            raise NoCorrection(f"{monoid} of {f} moves with {_names(moved)} by an amount that depends on {along}")
        return Correction(shift=shift)
    if monoid != "sum":
        raise NoCorrection(f"no correction is known for a running {monoid}")
    scale, carried, rest = sympy.Integer(1), [], []
    for factor in sympy.Mul.make_args(f):
        ratio = None if _polynomial(factor, moved) else _without(factor / factor.xreplace(moved), along)
        if ratio is None:
            rest.append(factor)
        else:
            scale *= ratio
            carried.append(factor)
    p = sympy.Mul(*rest)
    if not p.has(*moved):
        return Correction(scale=fold(scale))
    if not _polynomial(p, moved):
        whole = _without(f / before, along)
        if whole is None:
            raise NoCorrection(
                f"sum of {f}: its ratio for two values of {_names(moved)} depends on {along}, and it is no polynomial "
                f"in {_names(moved)}"
            )
        return Correction(scale=whole)
    return Correction(fold(scale), moments=_taylor(p, sympy.Mul(*carried), list(moved), f))


def _names(states: object) -> str:
    return ", ".join(sorted(str(s.tensor) for s in states))  # type: ignore[attr-defined]


def _polynomial(p: Expr, states: object) -> bool:
    """Whether the states occur in sums, products and small powers only, never within anything else."""
    if not p.has(*states):  # type: ignore[misc]
        return True
    if p in states:  # type: ignore[operator]
        return True
    if isinstance(p, (sympy.Add, sympy.Mul)):
        return all(_polynomial(a, states) for a in p.args)
    if isinstance(p, sympy.Pow):
        return p.exp.is_Integer and 0 < p.exp <= DEGREE and _polynomial(p.base, states)
    return False


def _taylor(p: Expr, carried: Expr, states: list[Access], f: Expr) -> tuple[tuple[Expr, Expr], ...]:
    """The terms of P(s') beyond P(s): a power of the step times a derivative, for each."""
    symbols = [sympy.Dummy() for _ in states]
    q = p.xreplace(dict(zip(states, symbols, strict=True)))
    back = dict(zip(symbols, states, strict=True))
    derivatives: dict[tuple[int, ...], Expr] = {}  # by how often each state is differentiated by
    last: dict[tuple[int, ...], Expr] = {(0,) * len(states): q}
    for degree in range(1, DEGREE + 2):
        last = _differentiated(last, symbols)
        if last and degree > DEGREE:
            raise NoCorrection(f"sum of {f} is a polynomial of more than degree {DEGREE} in {_names(states)}")
        derivatives |= last
    found = []
    for orders, derivative in sorted(derivatives.items(), key=lambda item: item[0]):
        coefficient: Expr = sympy.Integer(1)
        for state, order in zip(states, orders, strict=True):
            coefficient *= (state - old(state)) ** order / sympy.factorial(order)
        number, moment = sympy.factor_terms(derivative.xreplace(back)).as_coeff_Mul()
        found.append((number * coefficient, carried * moment))
    return tuple(found)


def _differentiated(
    derivatives: dict[tuple[int, ...], Expr], symbols: list[sympy.Symbol]
) -> dict[tuple[int, ...], Expr]:
    """All derivatives of one order more that are not 0."""
    found = {}
    for orders, derivative in derivatives.items():
        for k, symbol in enumerate(symbols):
            more = (*orders[:k], orders[k] + 1, *orders[k + 1 :])
            if more not in found and (value := sympy.expand(derivative.diff(symbol))) != 0:
                found[more] = value
    return found


def _without(expr: Expr, along: str) -> Expr | None:
    """The expression in a form without `along`, if a simplification finds one."""
    for attempt in (_expanded_exponents, _cancelled):
        expr = attempt(expr)
        if not depends(expr, (along,)):
            return expr
    return None


def _expanded_exponents(expr: Expr) -> Expr:
    folded = fold(expr)
    if isinstance(folded, sympy.Add):
        folded = sympy.expand_mul(folded)
    exponentials = {e: sympy.exp(sympy.expand_mul(e.args[0])) for e in folded.atoms(sympy.exp)}
    return folded.xreplace({k: v for k, v in exponentials.items() if k != v})


def _cancelled(expr: Expr) -> Expr:
    """cancel() over plain symbols: it knows rational functions of those, and nothing of accesses. What is long stays as
    it is."""
    if size(expr) > LONGEST / 2:
        return expr
    forth: dict[Expr, Expr] = {}
    for index, access in enumerate(sorted(expr.atoms(Access), key=sympy.default_sort_key)):
        forth[access] = sympy.Symbol(f"x{index}", real=True)
    plain = expr.xreplace(forth)
    if plain.has(sympy.Max, sympy.Min, sympy.Function("Where")):
        return expr
    return fold(sympy.powsimp(sympy.cancel(plain))).xreplace({v: k for k, v in forth.items()})
