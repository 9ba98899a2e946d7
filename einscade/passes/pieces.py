"""Pieces of an input as tensors of their own, and back.

Comes in: a cascade. Goes out: `apart`, the same cascade with a copy for every piece of an input that is read (keys and
values packed into one tensor, a cache read up to a length), and `together`, which reads the inputs themselves again.

    O[p] = sum(f) X[p,f + 8] * Y[f]                              with f < 6 and X[p,t], t < 14
    X1[p,f] = X[p,f + 8],   O[p] = sum(f) X1[p,f] * Y[f]         apart

What is made over such a piece, its gradient, then has the piece's ranks and no points beyond its ends.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from einscade.ir import Access, Cascade, Einsum, Expr, Tensor, var
from einscade.passes.statements import Names, redirect, without_unused
from einscade.passes.terms import depends, ordered

__all__ = ["apart", "together"]


def apart(cascade: Cascade) -> tuple[Cascade, tuple[Einsum, ...]]:
    """The cascade in which pieces are copied before they are read, and the statements that copy them."""
    names = Names(cascade)
    copies: dict[tuple[str, tuple[tuple[str, Expr], ...]], Einsum] = {}
    body = []
    for s in cascade.body:

        def read(access: Access, s: Einsum = s) -> Expr:
            dims = _piece(cascade, s, access)
            if dims is None:
                return access
            if (access.tensor, dims) not in copies:
                ranks = tuple(rank for rank, _ in dims)
                output = Tensor(names(access.tensor), ranks, cascade.tensors[access.tensor].dtype)
                copies[access.tensor, dims] = Einsum(output, access.at(*(var(r) + shift for r, shift in dims)))
            return copies[access.tensor, dims].output(*(i - d[1] for i, d in zip(access.index, dims, strict=True)))

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
        if copy is None:
            return access
        return copy.expr.xreplace(dict(zip(map(var, copy.output.ranks), access.index, strict=True)))

    body = tuple(redirect(s, read) for s in cascade.body if s.name not in by_name)
    return without_unused(cascade.replace(body=body))


def _piece(cascade: Cascade, s: Einsum, access: Access) -> tuple[tuple[str, Expr], ...] | None:
    """The rank and the offset at which each dimension of an input is read; None where all of it is, or where ranks do
    not say which part."""
    if access.tensor in cascade.definitions:
        return None
    dims = []
    for rank, index in zip(cascade.tensors[access.tensor].ranks, access.index, strict=True):
        along = [r for r in s.ranks if depends(index, (r,))]
        shift = index - var(along[0]) if len(along) == 1 else None
        moves = shift is not None and not shift.has(Access) and not depends(shift, s.ranks)
        part = moves and cascade.extent(along[0]) != cascade.extent(rank) and cascade.extent(rank) != 1
        dims.append((along[0], shift) if part else (rank, sympy.Integer(0)))
    ranks = [r for r, _ in dims]
    if ranks == list(cascade.tensors[access.tensor].ranks) or len(set(ranks)) < len(ranks):
        return None
    return tuple(dims)
