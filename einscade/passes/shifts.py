"""One form for exponentials under a sum: shifted by the maximum of their exponents, however they were written.

Comes in: sums of exp(X) * y, shifted by hand, by something else, or not at all. First every shift g that lacks the
reduced rank leaves, sum(m) exp(X - g) * y = exp(-g) * sum(m) exp(X) * y, and what cancels, cancels. Then each sum gets
the shift that keeps it finite, exp(X - G) with G = max(m) X, under the same identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sympy

from einscade.ir import Access, Cascade, Einsum, Expr, Reduction, Tensor, accesses
from einscade.passes.normalise import normal
from einscade.passes.statements import Names, reduced_over, wide, without_unused
from einscade.passes.terms import conjuncts, depends

__all__ = ["factored", "stabilised", "unshifted"]


def unshifted(cascade: Cascade) -> tuple[Cascade, frozenset[str]]:
    """Exponentials without shifts, and the names of the reductions that had one. Only what is itself reduced over the
    rank is a shift: a term like -slope*p of a bias slope*(m - p) stays, where it keeps the exponent small."""
    over = reduced_over(cascade)

    def without_shift(s: Einsum) -> tuple[Einsum, Expr] | None:
        assert s.reduce is not None
        if s.reduce.monoid == "sum":
            exponent, rest = exponential(s.expr)
            shift, kept = (sympy.S.Zero, exponent) if exponent is None else _split(exponent, s, over)
            if shift == 0 or _is_maximum(shift, kept, s, cascade):
                return None
            return s.replace(expr=rest * sympy.exp(kept)), sympy.exp(shift)
        if s.reduce.monoid in ("max", "min"):
            shift, kept = _split(s.expr, s, over)
            if shift != 0:
                return s.replace(expr=kept), shift
        return None

    return _rescaled(cascade, without_shift)


def stabilised(cascade: Cascade, shifted: frozenset[str]) -> Cascade:
    """Sums of exponentials that had a shift, and those of computed scores that are normalised (one of them is the sum
    of nothing but exp(X)), shifted by their maximum."""
    names = Names(cascade)
    over = reduced_over(cascade)
    normalised = set()
    for s in cascade.body:
        exponent, rest = exponential(s.expr) if s.reduce and s.reduce.monoid == "sum" else (None, s.expr)
        computed = exponent is not None and any(a.tensor in cascade.definitions for a in accesses(exponent))
        if computed and rest.is_number and s.reduce:
            normalised.add((exponent, s.reduce.ranks))
    made: dict[tuple[Expr, tuple[str, ...], frozenset[object]], Tensor] = {}
    before: dict[str, list[Einsum]] = {}

    def with_shift(s: Einsum) -> tuple[Einsum, Expr] | None:
        assert s.reduce is not None
        if s.reduce.monoid != "sum":
            return None
        exponent, rest = exponential(s.expr)
        if exponent is None or not depends(exponent, s.reduce.ranks):
            return None
        if _split(exponent, s, over)[0] != 0 or not (s.name in shifted or (exponent, s.reduce.ranks) in normalised):
            return None
        domain = frozenset(conjuncts(s.domain))
        rows = tuple(r for r in s.output.ranks if depends(exponent, (r,)) or depends(s.domain, (r,)))
        key = next((k for k in made if k[:2] == (exponent, s.reduce.ranks) and k[2] <= domain), None)
        if key is None:
            key = (exponent, s.reduce.ranks, domain)
            made[key] = Tensor(names("G"), rows, wide(s.output.dtype))
            over[made[key].name] = frozenset(s.reduce.ranks)
            before[s.name] = [Einsum(made[key], exponent, Reduction("max", s.reduce.ranks), s.domain)]
        shift = made[key]()
        return s.replace(expr=rest * sympy.exp(exponent - shift)), sympy.exp(shift)

    return _rescaled(cascade, with_shift, before)[0]


def _is_maximum(shift: Expr, kept: Expr, s: Einsum, cascade: Cascade) -> bool:
    """Whether a sum of exp(kept + shift) already has the shift that it should have."""
    made = cascade.definitions.get((-shift).tensor) if isinstance(-shift, Access) else None
    if made is None or made.reduce is None or s.reduce is None or -shift != made.output():
        return False
    same = made.reduce.monoid == "max" and made.reduce.ranks == s.reduce.ranks and made.expr == kept
    return same and set(conjuncts(made.domain)) == set(conjuncts(s.domain))


def exponential(expr: Expr) -> tuple[Expr | None, Expr]:
    """`(X, y)` where the expression is exp(X) * y (X is None where it is no such product)."""
    for factor in sympy.Mul.make_args(expr):
        if isinstance(factor, sympy.exp):
            rest = sympy.Mul(*(f for f in sympy.Mul.make_args(expr) if f is not factor))
            return factor.args[0], rest
    return None, expr


def _split(expr: Expr, s: Einsum, over: Mapping[str, frozenset[str]]) -> tuple[Expr, Expr]:
    """`expr == shift + kept`: the terms that lack the reduced ranks but read what is reduced over them; the rest."""
    assert s.reduce is not None
    ranks = s.reduce.ranks

    def is_shift(term: Expr) -> bool:
        return not depends(term, ranks) and any(over.get(a.tensor, frozenset()) & set(ranks) for a in accesses(term))

    terms: list[Expr] = []
    for term in sympy.Add.make_args(expr):
        sums = [f for f in sympy.Mul.make_args(term) if isinstance(f, sympy.Add) and any(map(is_shift, f.args))]
        terms += sympy.Add.make_args(sympy.expand_mul(term)) if sums else (term,)
    shift = [t for t in terms if is_shift(t)]
    return sympy.Add(*shift), sympy.Add(*(t for t in terms if t not in shift))


def _rescaled(
    cascade: Cascade,
    change: Callable[[Einsum], tuple[Einsum, Expr] | None],
    before: dict[str, list[Einsum]] | None = None,
) -> tuple[Cascade, frozenset[str]]:
    """Reductions replaced by `change`'s (new statement, what it must be multiplied by, or for a maximum added), and the
    new statements' names: an output's is another than its own."""
    names = Names(cascade)
    body: list[Einsum] = []
    new: dict[str, tuple[Einsum, Expr]] = {}
    replaced: set[str] = set()
    for s in cascade.body:
        calls = {}
        for a in accesses(s.expr):
            if a.tensor in new:
                calls[a] = _undone(*new[a.tensor], a)
        if calls:
            s = s.replace(expr=factored(s.expr.xreplace(calls)))
        changed = change(s) if s.reduce is not None and s.scan is None else None
        if changed is None:
            body.append(s)
            continue
        body += (before or {}).get(s.name, [])
        statement, factor = changed
        statement = statement.replace(expr=normal(statement.expr))
        if s.name in cascade.outputs:
            inner = Tensor(names(f"{s.name}u"), s.output.ranks, wide(s.output.dtype))
            statement = statement.replace(output=inner)
            body.append(statement)
            body.append(Einsum(s.output, factored(_undone(statement, factor, inner()))))
        else:
            new[s.name] = (statement, factor)
            body.append(statement)
        replaced.add(statement.name)
    return without_unused(cascade.replace(body=tuple(body))), frozenset(replaced)


def _undone(statement: Einsum, factor: Expr, access: Access) -> Expr:
    moved = factor.xreplace(statement.output.place(access))
    assert statement.reduce is not None
    return moved * access if statement.reduce.monoid == "sum" else moved + access


def factored(expr: Expr) -> Expr:
    """Exponentials that stand beside each other in a sum leave it where another factor cancels them:
    exp(G)*N / (exp(G)*Z + exp(s)) = N / (Z + exp(s - G)), log(exp(G)*Z + 1) = G + log(Z + exp(-G))."""
    if not expr.args or isinstance(expr, Access):
        return expr
    args = tuple(factored(a) for a in expr.args)
    expr = expr if args == expr.args else expr.func(*args)
    if isinstance(expr, sympy.Pow) and isinstance(expr.base, sympy.Add):
        factor, rest = _common(expr.base)
        expr = factor**expr.exp * rest**expr.exp
    elif isinstance(expr, sympy.log) and isinstance(expr.args[0], sympy.Add):
        factor, rest = _common(expr.args[0])
        expr = sympy.log(factor * rest, evaluate=False) if factor != 1 else expr
    return normal(expr)


def _common(total: Expr) -> tuple[Expr, Expr]:
    """`total == factor * rest`: the exponential that a sum's terms multiply accumulators by, taken out."""
    candidates = []
    for term in total.args:
        exponent, rest = exponential(term)
        if exponent is not None and accesses(rest):
            candidates.append(exponent)
    if not candidates:
        return sympy.Integer(1), total
    factor = sympy.exp(candidates[0])
    rest = sympy.Add(*(normal(sympy.expand_mul(t * sympy.exp(-candidates[0]))) for t in total.args))
    return factor, rest
