"""Views: a rank through which others count, as a number counts through its digits.

Comes in: an index, or a cascade. Goes out: the ranks of an index `a * 6 + b * 3 + c` with b < 2, c < 3; and the cascade
whose outputs have the ranks of what they read, where one of their own only counts through those:

    O[h,p] = X[h // 4,h % 4,p]  ->  O[g,n,p] = X[g,n,p]          with `h` as `g, n`

which is the same memory, and what a loop that makes X can write itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import sympy

from einscade.ir import Cascade, Einsum, Expr, FloorDiv, Mod, var
from einscade.passes.terms import depends

__all__ = ["Views", "digits", "output_views"]

Views = Mapping[str, Mapping[str, tuple[str, ...]]]
"""By output, the ranks that are one rank of the result, the slowest first."""


def digits(index: Expr, extents: Mapping[str, Expr]) -> tuple[str, ...] | None:
    """The ranks through which an index counts as a number counts through its digits, the slowest first: `a, b, c` of
    `(a * |b| + b) * |c| + c`. None where they are not all of `extents`, each below its own."""
    found: list[str] = []
    stride: Expr = sympy.Integer(1)
    rest = sympy.expand(index)
    while len(found) < len(extents):
        left = (r for r in extents if r not in found)
        rank = next((r for r in left if sympy.expand(rest.coeff(var(r)) - stride) == 0), None)
        if rank is None:
            return None
        rest = sympy.expand(rest - stride * var(rank))
        stride *= extents[rank]
        found.insert(0, rank)
    return tuple(found) if rest == 0 else None


def output_views(cascade: Cascade) -> tuple[Cascade, Views]:
    """The cascade whose outputs have the ranks of what they read, where one of theirs only counts through those."""
    views: dict[str, Mapping[str, tuple[str, ...]]] = {}
    body = []
    for e in cascade.body:
        alone = e.name in cascade.outputs and e.reduce is None and e.scan is None and not any(cascade.users(e.name))
        found = {r: digits for r in e.output.ranks if alone and (digits := _digits(cascade, e, r)) is not None}
        if found:
            names = {r: tuple(n for n, _ in digits) for r, digits in found.items()}
            ranks = tuple(n for r in e.output.ranks for n in names.get(r, (r,)))
            places = {index: var(n) for digits in found.values() for n, index in digits}
            if len(set(ranks)) == len(ranks):
                views[e.name] = names
                output = replace(e.output, ranks=ranks)
                e = e.replace(output=output, expr=e.expr.xreplace(places), domain=e.domain.xreplace(places))
        body.append(e)
    return (cascade.replace(body=tuple(body)), views) if views else (cascade, {})


def _digits(cascade: Cascade, e: Einsum, rank: str) -> list[tuple[str, Expr]] | None:
    """The ranks of what a statement reads at the digits of one of its own, the slowest first, with the digits; None
    where it is read at anything else, or where they are not all of it."""
    v, extent = var(rank), cascade.extent(rank)
    found: dict[Expr, str] = {}
    for a in e.reads:
        for r, index in zip(cascade.tensors[a.tensor].ranks, a.index, strict=True):
            if depends(index, (rank,)):
                found.setdefault(index, r)
    places = {index: sympy.Dummy() for index in found}
    if v in found or any(depends(x.xreplace(places), (rank,)) for x in (e.expr, e.domain)):
        return None
    sizes = {r: cascade.extent(r) for r in found.values()}
    digits: list[tuple[str, Expr]] = []
    stride: Expr = sympy.Integer(1)
    while len(digits) < len(found):
        above = FloorDiv(v, stride)
        whole = {r: above if stride * size == extent else Mod(above, size) for r, size in sizes.items()}
        digit = next((index for index, r in found.items() if index == whole[r]), None)
        if digit is None or found[digit] in [r for r, _ in digits]:
            return None
        digits.insert(0, (found[digit], digit))
        stride *= sizes[found[digit]]
    return digits if len(digits) > 1 and stride == extent else None
