"""Index arithmetic of views: what an index into a reshaped tensor is in the tensor it was made from.

Comes in: indices as sympy expressions over rank variables, the extent of every variable, shapes. Goes out: simplified
indices. Everything is exact integer arithmetic over the *existing* points: extents are taken to be at least 1, because
at a length of 0 there is no point at which an index could be wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import sympy

from einscade.ir.expr import Access, Expr, FloorDiv, Mod

__all__ = [
    "at_least",
    "bounds",
    "exact_quotient",
    "is_one",
    "one",
    "product",
    "quotient_and_rest",
    "reshape_index",
    "same",
    "solved_digits",
]

Index = tuple[Expr, ...]
Extents = Mapping[str, Expr]

_ZERO, _ONE = sympy.Integer(0), sympy.Integer(1)


def product(extents: Iterable[Expr]) -> Expr:
    """The expanded product of extents (1 for none)."""
    return sympy.expand(sympy.Mul(*extents))


def same(a: Expr, b: Expr) -> bool:
    """Whether two extents are equal for every value of their symbols."""
    return a == b or sympy.expand(a - b) == 0


def one(name: str) -> Expr:
    """The opaque extent of a rank of 1 that is kept as a rank (a batch of one is still a batch)."""
    return sympy.Symbol(f"_one{name}", integer=True, nonnegative=True)


def is_one(extent: Expr) -> bool:
    return extent == 1 or (extent.is_Symbol and extent.name.startswith("_one"))


@lru_cache(maxsize=65536)
def exact_quotient(a: Expr, b: Expr) -> Expr | None:
    """`a / b` where it is an integer expression without a denominator, else None."""
    if b == 1:
        return a
    if a.is_Integer and b.is_Integer:
        return sympy.Integer(int(a) // int(b)) if int(b) and int(a) % int(b) == 0 else None
    if a == b:
        return _ONE
    if b.is_Integer:
        parts = [(*term.as_coeff_Mul(),) for term in sympy.Add.make_args(sympy.expand(a))]
        if all(c.is_Integer and int(c) % int(b) == 0 for c, _ in parts):
            return sympy.Add(*(c // b * rest for c, rest in parts))
        return None
    quotient = sympy.cancel(a / b) if a.is_Add or b.is_Add else a / b
    return sympy.expand(quotient) if quotient.as_numer_denom()[1] == 1 else None


@lru_cache(maxsize=65536)
def at_least(expr: Expr, bound: int = 0) -> bool:
    """Whether `expr >= bound` is certain, every symbol in it being an extent (at least 1)."""
    symbols = [s for s in expr.free_symbols if isinstance(s, sympy.Symbol)]
    if expr.has(Access, FloorDiv, Mod):
        return bound == 0 and bool(expr.is_nonnegative)
    shifted = sympy.expand(expr.xreplace({s: s + 1 for s in symbols}) - bound)
    if not all(term.as_coeff_Mul()[0].is_nonnegative for term in sympy.Add.make_args(shifted)):
        return False
    return all(f.is_Symbol or f.is_Pow for term in sympy.Add.make_args(shifted)
               for f in sympy.Mul.make_args(term.as_coeff_Mul()[1]) if not f.is_number)  # fmt: skip


def bounds(expr: Expr, extents: Extents) -> tuple[Expr | None, Expr | None]:
    """The least and greatest value of an index over the ranges of its rank variables; None where unknown."""
    if expr.is_Integer:
        return expr, expr
    if isinstance(expr, sympy.Symbol):
        extent = extents.get(expr.name)
        if extent is None:
            return expr, expr
        return _ZERO, _ZERO if is_one(extent) else extent - 1
    if isinstance(expr, Mod):
        return _ZERO, expr.args[1] - 1
    if isinstance(expr, FloorDiv):
        low, high = bounds(expr.args[0], extents)
        by = expr.args[1]
        return (None if low is None else FloorDiv(low, by)), (None if high is None else FloorDiv(high, by))
    if expr.is_Add:
        lows, highs = zip(*(bounds(term, extents) for term in expr.args), strict=True)
        return (None if None in lows else sympy.Add(*lows)), (None if None in highs else sympy.Add(*highs))
    if expr.is_Mul:
        factor = sympy.Mul(*(f for f in expr.args if not _varies(f, extents)))
        rest = sympy.Mul(*(f for f in expr.args if _varies(f, extents)))
        if rest == 1:
            return factor, factor
        if rest.is_Mul:
            return None, None
        low, high = bounds(rest, extents)
        if low is None or high is None:
            return None, None
        if at_least(factor):
            return low * factor, high * factor
        if at_least(-factor):
            return high * factor, low * factor
    return None, None


def _varies(expr: Expr, extents: Extents) -> bool:
    return expr.has(Access) or any(s.name in extents for s in expr.free_symbols)


def _inside(expr: Expr, extent: Expr, extents: Extents) -> bool:
    low, high = bounds(expr, extents)
    if low is None or high is None:
        return False
    return at_least(sympy.expand(low)) and at_least(sympy.expand(extent - 1 - high))


def quotient_and_rest(index: Expr, by: Expr, extents: Extents) -> tuple[Expr, Expr]:
    """`(index // by, index % by)`, solved by the ranges of the variables where they allow it."""
    if by == 1:
        return index, _ZERO
    index = sympy.expand(index)
    for near in (False, True):
        whole, rest = _split(index, by, extents, near)
        if _inside(rest, by, extents):
            return whole, rest
        for shift in (1, -1):
            if _inside(rest - shift * by, by, extents):
                return whole + shift, rest - shift * by
    whole, rest = _split(index, by, extents, near=False)
    return whole + FloorDiv(rest, by), Mod(rest, by)


def solved_digits(index: Expr, sizes: Sequence[Expr], extents: Extents) -> Index:
    """The digits of an index, the slowest first, where each is below its size (`ir.digits`), solved by the ranges of
    the variables."""
    found: list[Expr] = []
    for size in reversed(sizes[1:]):
        index, digit = quotient_and_rest(index, size, extents)
        found.insert(0, digit)
    return (index, *found) if sizes else ()


def _split(index: Expr, by: Expr, extents: Extents, near: bool) -> tuple[Expr, Expr]:
    """`index == whole * by + rest`; with `near`, a coefficient may miss a multiple of `by` a little."""
    whole: list[Expr] = []
    rest: list[Expr] = []
    for variable, coefficient in _coefficients(index, extents):
        quotient = exact_quotient(coefficient, by)
        if quotient is None and near:
            quotient = _nearest(coefficient, by)
        if quotient is None:
            rest.append(coefficient * variable)
        else:
            whole.append(quotient * variable)
            rest.append((coefficient - quotient * by) * variable)
    return sympy.Add(*whole), sympy.expand(sympy.Add(*rest))


def _coefficients(index: Expr, extents: Extents) -> list[tuple[Expr, Expr]]:
    """The index as a sum of (something that varies, its coefficient), and (1, what does not vary)."""
    table: dict[Expr, Expr] = {}
    for term in sympy.Add.make_args(index):
        factors = sympy.Mul.make_args(term)
        varying = sympy.Mul(*(f for f in factors if _varies(f, extents)))
        table[varying] = table.get(varying, _ZERO) + sympy.Mul(*(f for f in factors if not _varies(f, extents)))
    return list(table.items())


def _nearest(coefficient: Expr, by: Expr) -> Expr | None:
    if coefficient.is_Integer and by.is_Integer:
        return sympy.Integer(round(int(coefficient) / int(by)))
    symbols = sorted(coefficient.free_symbols | by.free_symbols, key=str)
    if not (coefficient.is_polynomial(*symbols) and by.is_polynomial(*symbols)):
        return None
    quotient, _ = sympy.div(coefficient, by, *symbols, domain="QQ")
    return (
        quotient if quotient.is_Integer or all(c.is_Integer for c in quotient.as_coefficients_dict().values()) else None
    )


def reshape_index(index: Index, new: Index, old: Index, extents: Extents) -> Index:
    """The index into shape `old` of the element at `index` in shape `new` (same elements, row-major order)."""
    result: list[Expr] = []
    for here, there in groups(new, old):
        if len(here) == len(there) == 1:
            result.append(index[here[0]])
            continue
        flat = _ZERO
        for k in here:
            # A leading dimension of 1 keeps its variable (a batch of 1 stays a rank); an inner one has only index 0.
            if k == here[0] or new[k] != 1:
                flat = joined(sympy.expand(flat * new[k] + index[k]))
        result += solved_digits(flat, [old[k] for k in there], extents)
    return tuple(result)


def joined(index: Expr) -> Expr:
    """The index with every `b * (x // b) + x % b` written as `x`."""
    if not index.has(Mod):
        return index
    terms = dict(index.as_coefficients_dict())
    for rest in [t for t in terms if isinstance(t, Mod)]:
        x, by = rest.args
        whole = sympy.Add(*(c * t for t, c in terms.items() if t.has(FloorDiv(x, by))))
        if same(whole, terms[rest] * by * FloorDiv(x, by)):
            return joined(sympy.expand(index - whole - terms[rest] * rest + terms[rest] * x))
    return index


def groups(new: Index, old: Index) -> Iterator[tuple[range, range]]:
    """The smallest runs of dimensions of two shapes that hold the same elements, in order."""
    i = j = 0
    while i < len(new) or j < len(old):
        i0, j0 = i, j
        i, j = _group(new, old, i, j)
        yield range(i0, i), range(j0, j)


def _group(new: Index, old: Index, i: int, j: int) -> tuple[int, int]:
    """The ends of the smallest groups of dimensions from `i` and `j` on that hold the same elements."""
    if i < len(new) and j < len(old) and same(new[i], old[j]):
        return i + 1, j + 1
    a = b = _ONE
    while i < len(new) or j < len(old):
        if i < len(new) and (j >= len(old) or _wants(a, b)):
            a, i = sympy.expand(a * new[i]), i + 1
        else:
            b, j = sympy.expand(b * old[j]), j + 1
        if a != 1 and same(a, b):
            break
    return i, j


def _wants(a: Expr, b: Expr) -> bool:
    """Whether the first group is the one to grow: it holds no more than the second, as far as can be told."""
    if a.is_Integer and b.is_Integer:
        return bool(a <= b)
    if exact_quotient(b, a) is not None:
        return True
    return exact_quotient(a, b) is None
