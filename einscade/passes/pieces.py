"""Pieces and views of an input as tensors of their own, and back.

Comes in: a cascade. Goes out: `apart`, the same cascade with a copy for every piece of an input that is read (keys and
values packed into one tensor, a cache read up to a length), and for every view in which one of its dimensions is
several (heads as groups and members); and `together`, which reads the inputs themselves again.

    O[p] = sum(f) X[p,f + 8] * Y[f]                              with f < 6 and X[p,t], t < 14
    X1[p,f] = X[p,f + 8],   O[p] = sum(f) X1[p,f] * Y[f]         apart

    S[h,i,m] = sum(e) X[3*h + i,e] * Y[i,m,e]                    with h < 2, i < 3 and X[g,e], g < 6
    X1[h,i,e] = X[3*h + i,e],   S[h,i,m] = sum(e) X1[h,i,e] * Y[i,m,e]

What is made over such a tensor, its gradient, then has the ranks that its readers have, and no points beyond the ends
of a piece.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from einscade.ir import Access, Cascade, Einsum, Expr, Tensor, var
from einscade.ir.digits import counted
from einscade.passes.statements import Names, inlined, ordered, redirect, without_unused
from einscade.passes.terms import depends

__all__ = ["apart", "together"]


def apart(cascade: Cascade) -> tuple[Cascade, tuple[Einsum, ...]]:
    """The cascade in which pieces are copied before they are read, and the statements that copy them."""
    names = Names(cascade)
    copies: dict[tuple[str, tuple[_Dim, ...]], Einsum] = {}
    body = []
    for s in cascade.body:

        def read(access: Access, s: Einsum = s) -> Expr:
            dims = _apart(cascade, s, access)
            if dims is None:
                return access
            if (access.tensor, dims) not in copies:
                ranks = tuple(r for ranks, _ in dims for r in ranks)
                output = Tensor(names(access.tensor), ranks, cascade.tensors[access.tensor].dtype)
                copies[access.tensor, dims] = Einsum(output, access.at(*(place for _, place in dims)))
            index: list[Expr] = []
            for i, (ranks, place) in zip(access.index, dims, strict=True):
                index += [i - (place - var(ranks[0]))] if len(ranks) == 1 else map(var, ranks)
            return copies[access.tensor, dims].output(*index)

        body.append(redirect(s, read))
    made = tuple(copies.values())
    if not made:
        return cascade, ()
    return cascade.replace(body=ordered((*made, *body), [t.name for t in cascade.inputs])), made


def together(cascade: Cascade, copies: Iterable[Einsum]) -> Cascade:
    """The cascade without the copies: what they copied is read in their place."""
    by_name = {c.name: c for c in copies}

    def read(access: Access) -> Expr:
        copy = by_name.get(access.tensor)
        return access if copy is None else inlined(access, copy)

    body = tuple(redirect(s, read) for s in cascade.body if s.name not in by_name)
    return without_unused(cascade.replace(body=body))


_Dim = tuple[tuple[str, ...], Expr]
"""The ranks that a copy has for a dimension, and the index at which it reads that."""


def _apart(cascade: Cascade, s: Einsum, access: Access) -> tuple[_Dim, ...] | None:
    """How each dimension of an input is copied; None where all of it is as it stands, or where ranks do not say which
    part."""
    if access.tensor in cascade.definitions:
        return None
    own = cascade.tensors[access.tensor].ranks
    dims = tuple(_dim(cascade, s, rank, index) for rank, index in zip(own, access.index, strict=True))
    ranks = [r for ranks, _ in dims for r in ranks]
    return None if ranks == list(own) or len(set(ranks)) < len(ranks) else dims


def _dim(cascade: Cascade, s: Einsum, rank: str, index: Expr) -> _Dim:
    extent = cascade.extent(rank)
    along = [r for r in s.ranks if depends(index, (r,))]
    if len(along) == 1:
        shift = index - var(along[0])
        moves = not shift.has(Access) and not depends(shift, s.ranks)
        if moves and cascade.extent(along[0]) != extent and extent != 1:
            return (along[0],), index
    elif not {*along}.isdisjoint(s.output.ranks):  # what is only summed together may stay one rank
        found = counted(index, {r: cascade.extent(r) for r in along})
        if found and sympy.expand(sympy.Mul(*map(cascade.extent, found)) - extent) == 0:
            return found, index
    return (rank,), var(rank)
