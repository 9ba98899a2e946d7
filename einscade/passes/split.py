"""Split: the reductions over a rank in parts that run side by side, and the merge of the parts.

Comes in: a cascade whose reductions over a rank m depend on each other, as for `online`. Goes out: m in parts,
m = s*L + u; every reduction over each part alone; and its merge over s, which is the correction that `online` uses for
one step, from the part's own states to the merged ones: Z = sum(s) c(G_s, G) * Z_s. The correction is derived
(`correction`), so whatever has a one-pass form can be split, moments included: split-K decoding, prefixes shared by
requests, keys spread over devices. The parts themselves are reductions as before: `online` makes each one pass.
(Flash-decoding; cascade inference in FlashInfer; ring attention, arXiv 2310.01889.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
from sympy.logic.boolalg import Boolean

from einscade.ir import MONOIDS, Access, Cascade, Einsum, Expr, Rank, Reduction, Tensor, accesses, ceil_div, var
from einscade.passes.correction import old
from einscade.passes.fusion import Carried, Loop, common_ranks, plan_loops
from einscade.passes.rewrite import NotApplicable
from einscade.passes.statements import Names, ordered, without_unused
from einscade.passes.terms import conjoin, conjuncts, depends, reads_outside_where

__all__ = ["Split"]


@dataclass(frozen=True)
class Split:
    """Cut `rank` into `parts` parts of equal length, or into parts of `length` positions: a number, or the name of a
    symbol that the schedule decides. Raises ValueError for a number below 1."""

    rank: str
    parts: int | str = "S"
    length: int | str | None = None
    name: ClassVar[str] = "split"
    identity: ClassVar[str] = "red(m) f(x[m], G) = red(s) c(G_s, G) * red(m in s) f(x[m], G_s), with c derived"
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("parts", "length"):
            if isinstance(value := getattr(self, name), int) and value < 1:
                raise ValueError(f"Split: {name}={value}; it must be at least 1")

    def apply(self, cascade: Cascade) -> Cascade:
        done = 0
        while loop := next((loop for loop in plan_loops(cascade).loops if loop.rank == self.rank), None):
            cascade = _Parts(cascade, loop, self).run()
            done += 1
        if not done:
            reasons = plan_loops(cascade).refusals
            raise NotApplicable("; ".join(reasons) or f"no reductions over {self.rank} that share a traversal")
        return cascade


def _number(value: int | str) -> Expr:
    return sympy.Integer(value) if isinstance(value, int) else var(value)


class _Parts:
    """Writes the parts of one loop's reductions, and their merges, into a cascade."""

    def __init__(self, cascade: Cascade, loop: Loop, split: Split) -> None:
        self.cascade, self.loop, self.m = cascade, loop, loop.rank
        self.names = Names(cascade)
        self.extent = cascade.extent(self.m)
        if split.length is None:
            count = _number(split.parts)
            length = ceil_div(self.extent, count)
        else:
            length = _number(split.length)
            count = ceil_div(self.extent, length)
        self.part = Rank(self.names(f"{self.m}s"), count, self.m)
        self.inner = Rank(self.names(f"{self.m}u"), length, self.m)
        self.index = var(self.part.name) * length + var(self.inner.name)
        # The length of a part, for what divides by the length of the rank: any path to the whole will do, and a part
        # beyond the end has nothing to divide.
        self.length = sympy.Max(1, sympy.Min(length, self.extent - var(self.part.name) * length))
        self.dtype = "f64" if any(t.dtype == "f64" for t in cascade.inputs) else "f32"
        self.common = common_ranks(cascade, [c.name for c in loop.reductions])
        members = (*loop.along, *loop.rows, *(c.name for c in loop.reductions))
        self.inside = {name: self._inside(name) for name in members}

    def run(self) -> Cascade:
        c = self.cascade
        reductions = {r.name for r in self.loop.reductions}
        made = [self._within(c.definitions[n]) for n in self.inside]
        for carried in self.loop.reductions:
            made += self._merged(carried)
        kept = [s for s in c.body if s.name not in reductions]
        body = ordered([*kept, *made], [t.name for t in c.inputs])
        return without_unused(c.replace(ranks=(*c.ranks, self.part, self.inner), body=body))

    # -- a part --

    def _inside(self, name: str) -> Tensor:
        ranks = self.cascade.tensors[name].ranks
        if name in self.loop.along:
            own = tuple(q for r in ranks for q in ((self.part.name, self.inner.name) if r == self.m else (r,)))
        else:  # after the ranks that all of the loop's reductions have, as the serial rank of a loop is
            place = 1 + max((i for i, r in enumerate(ranks) if r in self.common), default=-1)
            own = (*ranks[:place], self.part.name, *ranks[place:])
        return Tensor(self.names(f"{name}s"), own, self.dtype)

    def _in_part(self, expr: Expr) -> Expr:
        """An expression of the old cascade at a point of a part, with the part's own values."""
        values = {a: self.inside[a.tensor]() for a in accesses(expr) if a.tensor in self.inside}
        return expr.xreplace(values).xreplace({var(self.m): self.index})

    def _within(self, s: Einsum) -> Einsum:
        reduce = s.reduce
        if s.name in self.loop.rows:
            length = {self.extent: self.length} if self.extent.is_Symbol else {}
            expr = self._in_part(s.expr.xreplace(length))
            return Einsum(self.inside[s.name], expr, domain=self._in_part(s.domain))
        if reduce is not None:
            ranks = tuple(self.inner.name if r == self.m else r for r in reduce.ranks)
            reduce = Reduction(reduce.monoid, ranks)
        return Einsum(self.inside[s.name], self._in_part(s.expr), reduce, self._points(s))

    def _points(self, s: Einsum) -> Boolean:
        """The domain in a part, with the end of the rank, unless a statement along the rank that is read has it."""
        domain = self._in_part(s.domain)
        own = {r for r in s.reduce.ranks if r != self.m} if s.reduce and s.name in self.loop.along else set()
        if any(a.tensor in self.loop.along and not depends(a, own) for a in reads_outside_where(s.expr)):
            return domain
        return conjoin([self.index < self.extent, *conjuncts(domain)])

    # -- the merge --

    def _merged(self, carried: Carried) -> list[Einsum]:
        """The reduction over parts, each corrected from its own states to the merged ones."""
        s = self.cascade.definitions[carried.name]
        assert s.reduce is not None
        correction, part = carried.correction, self.inside[carried.name]
        total = part() + correction.shift
        sums = []
        for coefficient, moment in correction.moments:
            sums.append(self._moment(s, moment))
            total += coefficient * sums[-1].output()
        before = {old(state): self._in_part(state) for state in carried.states}
        expr = (correction.scale * total).xreplace(before)
        guard = self._undefined_for_nothing(expr, [a for e in before.values() for a in accesses(e)])
        return [*sums, Einsum(s.output, expr, Reduction(s.reduce.monoid, (self.part.name,)), guard)]

    def _moment(self, s: Einsum, moment: Expr) -> Einsum:
        """The sum over a part of a moment that a correction needs, over the points that the reduction takes."""
        output = Tensor(self.names(f"{s.name}moment"), self.inside[s.name].ranks, self.dtype)
        points = dict.fromkeys(self._existing(s))
        domain = conjoin([self.index < self.extent, *map(self._in_part, points)])
        return Einsum(output, self._in_part(moment), Reduction("sum", (self.inner.name,)), domain)

    def _existing(self, s: Einsum) -> list[Boolean]:
        """When the reduction takes a point: its own conditions, and those of what it reads along the rank (but for
        what those reduce themselves)."""
        found = list(conjuncts(s.domain))
        for read in (self.cascade.definitions[a.tensor] for a in s.reads if a.tensor in self.loop.along):
            inner = read.reduce.ranks if read.reduce else ()
            found += [c for c in self._existing(read) if not depends(c, inner)]
        return found

    def _undefined_for_nothing(self, expr: Expr, states: list[Access]) -> Boolean:
        """Where a part has no points its states are identities; a correction that is undefined there skips the part."""
        monoids = {self.inside[c.name].name: c.name for c in self.loop.reductions}
        empty = {}
        for a in states:
            if a.tensor in monoids:
                reduce = self.cascade.definitions[monoids[a.tensor]].reduce
                assert reduce is not None
                empty[a] = MONOIDS[reduce.monoid].identity
        others = {a: sympy.Symbol(f"x{i}", positive=True) for i, a in enumerate(accesses(expr)) if a not in empty}
        if not expr.xreplace(empty).xreplace(others).has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
            return sympy.true
        return conjoin(sympy.Ne(a, value) for a, value in empty.items())
