"""Tables: the gradient of a table that pairs of positions index, from sums over what shares an index.

Comes in: a cascade with outputs that are sums over two ranks and more, of which a condition says which entry each point
belongs to (`if bucket[p,m] == t`, what `differentiate` makes of a bias read at an index). Goes out: the cascade after
other rewrites, in which first everything is summed that has the same index (batches), point by point of the pairs, and
that is summed by entries in a statement of its own, last. Entries are then looked at once for each pair, not for each
batch, and no sum has pairs' ranks and the table's, as rows of pairs would have them.

The sums by pairs are as large as the scores of one batch, for emitters that keep them on chip
(`codegen.triton_tables`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import sympy
from sympy.logic.boolalg import Boolean

from einscade.ir import Access, Cascade, Einsum, Expr, Rank, Reduction, Tensor, accesses, var
from einscade.passes.pipeline import run
from einscade.passes.rewrite import NotApplicable, Rewrite
from einscade.passes.statements import Names, wide, without_unused
from einscade.passes.terms import conjoin, conjuncts, depends

__all__ = ["Tables", "entries", "is_total"]


def entries(domain: Boolean, ranks: tuple[str, ...]) -> dict[str, Expr]:
    """Of each of the ranks that a conjunct of the domain says it about: the one index that it has at a point."""
    found: dict[str, Expr] = {}
    for c in conjuncts(domain):
        sides = c.args if isinstance(c, sympy.Eq) else ()
        for own, other in zip(sides, sides[::-1], strict=True):
            if own.is_Symbol and own.name in ranks and own.name not in found and not depends(other, (own.name,)):
                found[own.name] = other
    return found


def is_total(s: Einsum) -> bool:
    """Whether a statement sums another's points by the entries of a table."""
    summed = s.reduce is not None and s.reduce.monoid == "sum" and s.scan is None and isinstance(s.expr, Access)
    return summed and bool(entries(s.domain, s.output.ranks))


@dataclass(frozen=True)
class _Table:
    """`sums`: what has the same index summed, after what it is made of; `total`: the sums by entry, of the last."""

    sums: tuple[Einsum, ...]
    total: Einsum


@dataclass(frozen=True)
class Tables:
    """`rewrites` are applied to everything but the sums by entry. `shared`: what has the same index is summed before;
    else every point is summed by itself, where there would be few sums for a whole device."""

    rewrites: tuple[Rewrite, ...]
    shared: bool = True

    name: ClassVar[str] = "tables"
    identity: ClassVar[str] = "sum(b,p,m) x[b,p,m] [i[p,m] = t] = sum(p,m) [i[p,m] = t] sum(b) x[b,p,m]"
    exact: ClassVar[bool] = True

    def apply(self, cascade: Cascade) -> Cascade:
        names = Names(cascade)
        tables = {o: t for o in cascade.outputs if (t := _table(cascade, o, names, self.shared)) is not None}
        if not tables:
            raise NotApplicable("no output is a sum by the entries of a table")
        body = tuple(x for s in cascade.body for x in (tables[s.name].sums if s.name in tables else (s,)))
        outputs = tuple(tables[o].sums[-1].name if o in tables else o for o in cascade.outputs)
        before = without_unused(cascade.replace(outputs=outputs, body=body))
        after = run(before, self.rewrites).cascade
        for place, name in enumerate(cascade.outputs):
            if name in tables:
                after = _with_total(before, after, place, tables[name].total, cascade)
        return after


def _table(cascade: Cascade, output: str, names: Names, shared: bool) -> _Table | None:
    """The output as a sum by entry of sums over what shares an index, if it is one."""
    s = _whole(cascade, cascade.definitions[output]) if output in cascade.definitions else None
    if s is None or s.reduce is None or any(True for _ in cascade.users(output)):
        return None
    at = entries(s.domain, s.output.ranks)
    rest = [c for c in conjuncts(s.domain) if not (isinstance(c, sympy.Eq) and {*map(var, at)} & {*c.args})]
    made = [a for a in accesses(s.expr) if a.tensor in cascade.definitions]
    moving = [a for i in at.values() for a in accesses(i) if a.tensor in cascade.definitions]
    picked = tuple(r for r in s.reduce.ranks if any(depends(i, (r,)) for i in at.values()))
    if len(picked) < 2 or moving or not made or any(depends(x, at) for x in (*rest, s.expr)):
        return None
    pairs = max(made, key=lambda a: len(a.index))
    widths = tuple(r for r in s.reduce.ranks if r not in picked and not depends(pairs, (r,)))
    alike = tuple(r for r in s.reduce.ranks if r not in (*picked, *widths))
    by_entry = picked if shared else (*alike, *picked)
    place = {i: n for n, i in enumerate(pairs.index)}

    def tensor(name: str, ranks: Iterable[str]) -> Tensor:
        """One with the pairs' ranks, in their order, and not the table's."""
        kept = sorted((r for r in (*s.output.ranks, *ranks) if r not in at), key=lambda r: place.get(var(r), -1))
        return Tensor(names(name), tuple(kept), wide(s.output.dtype))

    point = tensor(f"{output}p", (*alike, *picked))
    sums = [Einsum(point, s.expr, Reduction("sum", widths) if widths else None, conjoin(rest))]
    if shared and alike:
        sums.append(Einsum(tensor(f"{output}s", picked), point(), Reduction("sum", alike)))
    picks = conjoin(sympy.Eq(i, var(r), evaluate=False) for r, i in at.items())
    return _Table(tuple(sums), Einsum(s.output, sums[-1].output(), Reduction("sum", by_entry), picks))


def _whole(cascade: Cascade, s: Einsum) -> Einsum | None:
    """A sum of sums (rows first, times what belongs to a row) as one, if it is a sum."""
    while s.reduce is not None and s.reduce.monoid == "sum" and s.scan is None:
        for a in accesses(s.expr):
            inner = cascade.definitions.get(a.tensor)
            if inner is None or inner.reduce is None or inner.reduce.monoid != "sum" or inner.scan is not None:
                continue
            alone = a in sympy.Mul.make_args(s.expr)
            own = a.index == tuple(map(var, inner.output.ranks)) and not {*s.ranks} & {*inner.reduce.ranks}
            if alone and own and entries(inner.domain, inner.output.ranks) and len(list(cascade.users(a.tensor))) == 1:
                reduce = Reduction("sum", s.reduce.ranks + inner.reduce.ranks)
                domain = conjoin([*conjuncts(s.domain), *conjuncts(inner.domain)])
                s = s.replace(expr=s.expr.xreplace({a: inner.expr}), reduce=reduce, domain=domain)
                break
        else:
            return s
    return None


def _with_total(before: Cascade, after: Cascade, place: int, total: Einsum, cascade: Cascade) -> Cascade:
    """The rewritten cascade with the sum by entry of its output at a place, in the names that it has now."""
    if len(before.inputs) != len(after.inputs):
        raise NotApplicable(f"the rewrites leave out inputs of {cascade.name}")
    sums = after.tensors[after.outputs[place]]
    same = [*zip(before.inputs, after.inputs, strict=True), (before.tensors[before.outputs[place]], sums)]
    tensors = {a.name: b.name for a, b in same}
    ranks: dict[str, str] = {x: y for a, b in same for x, y in zip(a.ranks, b.ranks, strict=True)}
    names = Names(after)
    for r in total.output.ranks:
        if r not in ranks:
            ranks[r] = names(r)
            after = after.replace(ranks=(*after.ranks, Rank(ranks[r], cascade.extent(r))))
    renamed: Mapping[Expr, Expr] = {var(a): var(b) for a, b in ranks.items()}

    def moved(expr: sympy.Basic) -> sympy.Basic:
        if isinstance(expr, Access):
            return Access(tensors[expr.tensor], *map(moved, expr.index))
        return expr.func(*map(moved, expr.args)) if expr.args else renamed.get(expr, expr)

    own = tuple(ranks[r] for r in total.output.ranks)
    output = Tensor(names(total.name), own, total.output.dtype)
    made = output if output.dtype == sums.dtype else Tensor(names(f"{total.name}w"), own, sums.dtype)
    assert total.reduce is not None
    reduce = Reduction("sum", tuple(ranks[r] for r in total.reduce.ranks))
    body = [Einsum(made, sums(), reduce, moved(total.domain))]
    body += [Einsum(output, made())] if made != output else []
    outputs = (*after.outputs[:place], output.name, *after.outputs[place + 1 :])
    return after.replace(body=(*after.body, *body), outputs=outputs)
