"""Views: a rank through which others count, as a number counts through its digits.

Comes in: a cascade. Goes out: the cascade whose outputs have the ranks of what they read, where one of their own only
counts through those (`ir.digits`):

    O[h,p] = X[h // 4,h % 4,p]  ->  O[g,n,p] = X[g,n,p]          with `h` as `g, n`

which is the same memory, and what a loop that makes X can write itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations

import sympy

from einscade.ir import Cascade, Einsum, Expr, var
from einscade.ir.digits import digits
from einscade.passes.terms import depends

__all__ = ["Views", "output_views"]

Views = Mapping[str, Mapping[str, tuple[str, ...]]]
"""By output, the ranks that are one rank of the result, the slowest first."""


def output_views(cascade: Cascade) -> tuple[Cascade, Views]:
    """The cascade whose outputs have the ranks of what they read, where one of theirs only counts through those."""
    views: dict[str, Mapping[str, tuple[str, ...]]] = {}
    body = []
    for e in cascade.body:
        alone = e.name in cascade.outputs and e.reduce is None and e.scan is None and not any(cascade.users(e.name))
        found = {r: read for r in e.output.ranks if alone and (read := _read_at_digits(cascade, e, r)) is not None}
        if found:
            names = {r: tuple(n for n, _ in read) for r, read in found.items()}
            ranks = tuple(n for r in e.output.ranks for n in names.get(r, (r,)))
            places = {index: var(n) for read in found.values() for n, index in read}
            if len(set(ranks)) == len(ranks):
                views[e.name] = names
                output = replace(e.output, ranks=ranks)
                e = e.replace(output=output, expr=e.expr.xreplace(places), domain=e.domain.xreplace(places))
        body.append(e)
    return (cascade.replace(body=tuple(body)), views) if views else (cascade, {})


def _read_at_digits(cascade: Cascade, e: Einsum, rank: str) -> list[tuple[str, Expr]] | None:
    """The ranks of what a statement reads at the digits of one of its own, the slowest first, with the digits; None
    where it is read at anything else, or where they are not all of it."""
    v = var(rank)
    found: dict[Expr, str] = {}
    for a in e.reads:
        for r, index in zip(cascade.tensors[a.tensor].ranks, a.index, strict=True):
            if depends(index, (rank,)):
                found.setdefault(index, r)
    places = {index: sympy.Dummy() for index in found}
    if v in found or any(depends(x.xreplace(places), (rank,)) for x in (e.expr, e.domain)):
        return None
    if len(found) < 2 or sympy.expand(sympy.Mul(*map(cascade.extent, found.values())) - cascade.extent(rank)) != 0:
        return None
    for order in permutations(found.items()):
        if digits(v, [cascade.extent(r) for _, r in order]) == tuple(index for index, _ in order):
            return [(r, index) for index, r in order]
    return None
