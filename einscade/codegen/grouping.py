"""Ranks that are read in groups (`h // 4`) become two ranks, so that a shared head is a broadcast dimension of a view
and is never repeated in memory.

Comes in: a cascade. Goes out: the cascade in which such a rank `h` is `hg, hr` with `h = hg*4 + hr`, and the pairs, for
the emitter to split and join dimensions of the tensors at the boundary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from einscade.ir.cascade import Cascade, Einsum, Rank, Tensor
from einscade.ir.expr import Access, Expr, FloorDiv, Mod, var

__all__ = ["Group", "split_groups"]


@dataclass(frozen=True)
class Group:
    """`rank` is `outer * size + inner`."""

    rank: str
    outer: str
    inner: str
    size: int


def split_groups(cascade: Cascade) -> tuple[Cascade, tuple[Group, ...]]:
    """Split every rank with a constant extent that occurs as `rank // c`, with one c that divides the extent."""
    groups: list[Group] = []
    for rank in cascade.ranks:
        size = _group_size(cascade, rank)
        if size is None:
            continue
        group = Group(rank.name, cascade.fresh(f"{rank.name}g"), cascade.fresh(f"{rank.name}r"), size)
        cascade = _split(cascade, rank, group)
        groups.append(group)
    return cascade, tuple(groups)


def _group_size(cascade: Cascade, rank: Rank) -> int | None:
    if not rank.extent.is_Integer:
        return None
    v = var(rank.name)
    sizes: set[Expr] = set()
    for e in cascade.body:
        for expr in (e.expr, e.domain):
            sizes |= {d.args[1] for d in expr.atoms(FloorDiv, Mod) if d.args[0] == v}
        if (e.reduce and e.reduce.monoid == "topk" and rank.name in (*e.reduce.ranks, e.reduce.slot)) or (
            e.scan and e.scan.rank == rank.name
        ):
            return None
    size = sizes.pop() if len(sizes) == 1 else None
    return (
        int(size) if size is not None and size.is_Integer and rank.extent % size == 0 and size != rank.extent else None
    )


def _split(cascade: Cascade, rank: Rank, group: Group) -> Cascade:
    v, outer, inner = var(rank.name), var(group.outer), var(group.inner)
    size = sympy.Integer(group.size)
    had = {t.name: t.ranks for t in cascade.tensors.values()}

    def names(ranks: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(n for r in ranks for n in ((group.outer, group.inner) if r == rank.name else (r,)))

    def rewrite(expr: sympy.Basic) -> sympy.Basic:
        if isinstance(expr, Access):
            index: list[Expr] = []
            for r, i in zip(had[expr.tensor], expr.index, strict=True):
                if r != rank.name:
                    index.append(rewrite(i))
                elif i == v:
                    index += [outer, inner]
                else:
                    index += [FloorDiv(rewrite(i), size), Mod(rewrite(i), size)]
            return Access(expr.tensor, *index)
        if expr == FloorDiv(v, size):
            return outer
        if expr == Mod(v, size):
            return inner
        if expr == v:
            return outer * size + inner
        return expr.func(*map(rewrite, expr.args)) if expr.args else expr

    def tensor(t: Tensor) -> Tensor:
        return replace(t, ranks=names(t.ranks))

    def statement(e: Einsum) -> Einsum:
        reduce = e.reduce and replace(e.reduce, ranks=names(e.reduce.ranks))
        scan = e.scan and replace(e.scan, init=rewrite(e.scan.init))
        return Einsum(tensor(e.output), rewrite(e.expr), reduce, rewrite(e.domain), scan)

    ranks: list[Rank] = []
    for r in cascade.ranks:
        if r.name == rank.name:
            ranks += [Rank(group.outer, rank.extent / size, None), Rank(group.inner, size, None)]
        else:
            ranks.append(r)
    return replace(
        cascade, ranks=tuple(ranks), inputs=tuple(map(tensor, cascade.inputs)), body=tuple(map(statement, cascade.body))
    )
